"""Draw the figures of the benchmark from its CSV files, and from nothing else.

    python benchmarks/plot.py

For every device that benchmarks/results holds a CSV file of: time against the number of classes with the roofline, the
share of the bandwidth of a copy, and memory. Figures go to benchmarks/figures.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, str]

# One colour a loss; compiled by torch.compile: the same, dashed.
COLORS = {
    "official": "#6b6b6b",
    "cross_entropy": "#0072b2",
    "liger": "#009e73",
    "wsl_loss": "#d55e00",
}


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def providers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "copy"))


def look(provider: str) -> dict[str, str]:
    name, _, form = provider.partition(", ")
    return {"color": COLORS[name], "linestyle": {"": "-", "compiled": "--", "graph": ":"}[form]}


def row_of(rows: list[Row], provider: str, logits: str) -> Row | None:
    return next((row for row in rows if row["provider"] == provider and row["logits"] == logits), None)


def draw_time(axes: Axes, rows: list[Row]) -> None:
    """Time an element against the number of classes; the roofline is the ideal bytes at the speed of the copy.

    Of several batches with as many classes the largest is drawn.
    """
    flat = [row for row in rows if row["logits"].count("x") == 1]
    largest = {row["classes"]: row["logits"] for row in sorted(flat, key=lambda row: int(row["logits"].split("x")[0]))}
    for provider in [*providers(rows), "roofline"]:
        points = []
        for logits in largest.values():
            row = row_of(rows, "wsl_loss" if provider == "roofline" else provider, logits)
            if row is None:
                continue
            n, classes = map(int, row["logits"].split("x"))
            microseconds = float(row["p50_us"])
            if provider == "roofline":
                copy = row_of(rows, "copy", row["logits"])
                assert copy is not None
                microseconds = float(row["ideal_bytes"]) / float(copy["gb_per_s"]) / 1e3
            points.append((classes, n, 1e6 * microseconds / (n * classes)))
        points.sort()
        style = {"color": "black", "linestyle": "-.", "linewidth": 1} if provider == "roofline" else look(provider)
        axes.plot([p[0] for p in points], [p[2] for p in points], marker=".", label=provider, **style)
    axes.set(xscale="log", yscale="log", xlabel="classes", ylabel="picoseconds an element, forward + backward")
    axes.legend(fontsize=7, handlelength=4, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_bars(axes: Axes, rows: list[Row], column: str, label: str) -> None:
    """A group of bars for every shape, in the order of the file."""
    shapes = list(dict.fromkeys((row["use"], row["logits"]) for row in rows))
    shown = [provider for provider in providers(rows) if not provider.endswith("graph")]
    width = 0.8 / len(shown)
    for index, provider in enumerate(shown):
        found = [row_of(rows, provider, logits) for _, logits in shapes]
        heights = [float(row[column]) if row else 0.0 for row in found]
        places = [place + index * width for place in range(len(shapes))]
        compiled = provider.endswith("compiled")
        color = look(provider)["color"]
        axes.bar(
            places, heights, width, label=provider, edgecolor=color, color="white" if compiled else color,
            hatch="///" if compiled else None,
        )  # fmt: skip
    ticks = [place + 0.4 - width / 2 for place in range(len(shapes))]
    axes.set_xticks(ticks, [f"{use}\n{logits}" for use, logits in shapes], rotation=30, ha="right", fontsize=7)
    axes.set_ylabel(label)
    axes.legend(fontsize=7)


def save(figure: Figure, rows: list[Row], path: Path) -> None:
    row = rows[0]
    triton = f", triton {row['triton']}" if row["triton"] else ""
    figure.suptitle(f"{row['device']}, torch {row['torch']}{triton}, {row['dtype']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(path)


def draw(rows: list[Row], device: str, folder: Path) -> None:
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        chosen = [row for row in rows if row["dtype"] == dtype]
        name = f"{device}_{dtype}"
        figure, axes = plt.subplots(figsize=(7, 4.5))
        draw_time(axes, chosen)
        save(figure, chosen, folder / f"{name}_time.png")
        figure, axes = plt.subplots(figsize=(9, 4.5))
        draw_bars(axes, chosen, "share_of_copy", "ideal bytes over time,\nas a share of a copy's")
        axes.axhline(1, color="black", linewidth=0.8, linestyle="-.")
        save(figure, chosen, folder / f"{name}_bandwidth.png")
        figure, axes = plt.subplots(figsize=(9, 4.5))
        draw_bars(axes, chosen, "peak_logits", "peak memory above the inputs,\nin tensors of logits")
        save(figure, chosen, folder / f"{name}_memory.png")


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=here / "results", help="folder of the CSV files")
    parser.add_argument("--figures", type=Path, default=here / "figures", help="folder to draw into")
    args = parser.parse_args()
    found = [args.results / f"{device}.csv" for device in ("cpu", "cuda") if (args.results / f"{device}.csv").exists()]
    if not found:
        parser.error(f"{args.results} holds neither cpu.csv nor cuda.csv; run bench_loss.py first")
    args.figures.mkdir(parents=True, exist_ok=True)
    for path in found:
        draw(read(path), path.stem, args.figures)


if __name__ == "__main__":
    main()
