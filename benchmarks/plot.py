"""Draw the figures and print the tables of the benchmarks, from the CSV files alone.

    python benchmarks/plot.py

For every device and dtype in benchmarks/results: time over `F.cross_entropy` by shape, eager and
compiled, and peak memory. For a GPU also the roofline: ideal bytes per second as a share of what a
copy reaches. A time is the 20th percentile of its bursts; the line above it ends at the 80th.

Prints the tables of benchmarks/README.md, then the four rows of README.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, str]

STYLES = {  # colour and marker of a loss
    "official": ("#6b6b6b", "s"),
    "distillation": ("#009e73", "^"),
    "liger": ("#cc79a7", "v"),
    "cross_entropy": ("#0072b2", "D"),
    "wsl_loss": ("#d55e00", "o"),
    "balanced": ("#e69f00", "o"),
}
PANELS = {  # label: column, forms
    "time over F.cross_entropy,\neager": ("time_over_cross_entropy", ("", "graph")),
    "time over F.cross_entropy,\nboth compiled": ("time_over_cross_entropy", ("compiled",)),
    "peak memory above the inputs,\ntensors of logits": ("peak_logits", ("",)),
    "roofline: GB/s as a share\nof a copy's": ("share_of_copy", ("", "compiled", "graph")),
}


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw_panel(axes: Axes, rows: list[Row], label: str) -> None:
    """Draw one dot per provider above each shape, side by side."""
    column, forms = PANELS[label]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    shown = [
        row
        for row in rows
        if row["provider"].partition(", ")[2] in forms and row["provider"] != "copy"
    ]
    providers = list(dict.fromkeys(row["provider"] for row in shown))
    for index, provider in enumerate(providers):
        name, _, form = provider.partition(", ")
        color, marker = STYLES[name]
        fill = "none" if form else "full"
        points = [row for row in shown if row["provider"] == provider and row[column]]
        offset = 0.1 * (index - (len(providers) - 1) / 2)
        x = [shapes.index(row["shape"]) + offset for row in points]
        y = [float(row[column]) for row in points]
        axes.plot(x, y, marker, color=color, fillstyle=fill, label=provider)
        if column == "time_over_cross_entropy":
            p80 = [float(row["spread"]) * p20 for row, p20 in zip(points, y)]
            axes.vlines(x, y, p80, color=color)
    if column == "time_over_cross_entropy":
        axes.set_yscale("log", subs=(2, 5))
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(ylabel=label, xlim=(-0.5, len(shapes) - 0.5), axisbelow=True)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.grid(axis="y", which="both", color="#e0e0e0", linewidth=0.6)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw(rows: list[Row], path: Path) -> None:
    labels = list(PANELS) if path.name.startswith("cuda") else list(PANELS)[:-1]
    figure, panels = plt.subplots(
        len(labels), figsize=(11, 2.8 * len(labels)), sharex=True, layout="constrained"
    )
    for axes, label in zip(panels, labels):
        draw_panel(axes, rows, label)
    uses = {row["shape"]: f"{row['use']}\n{row['shape']}" for row in rows}
    panels[-1].set_xticks(range(len(uses)), list(uses.values()), fontsize=8)
    row = rows[0]
    names = ("torch", "triton", "threads", "dtype", "commit")
    versions = ", ".join(f"{name} {row[name]}" for name in names if row[name])
    figure.suptitle(f"forward + backward: {row['device']}, {versions}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def table(rows: list[Row]) -> str:
    """Return the table of one dtype: one line per shape, every cell eager / compiled."""
    lines = [
        f"| {rows[0]['dtype']} logits | `wsl_loss` | time over `F.cross_entropy` "
        "| speed over official | speed over `F.cross_entropy` + `F.kl_div` "
        "| peak memory, in logits | time of `balance=True` over `wsl_loss` |",
        "|---" * 7 + "|",
    ]
    cells = {(row["shape"], row["provider"]): row for row in rows}
    for shape, use in {row["shape"]: row["use"] for row in rows}.items():
        eager, compiled = cells[shape, "wsl_loss"], cells[shape, "wsl_loss, compiled"]
        line = [
            f"{shape} ({use})",
            f"{float(eager['p20_us']):,.0f} / {float(compiled['p20_us']):,.0f} us",
        ]
        for column in ("time_over_cross_entropy", "speed_over_official", "speed_over_distillation"):
            line.append(f"{float(eager[column]):.2g} / {float(compiled[column]):.2g}")
        balanced = [
            float(cells[shape, f"balanced{form}"]["p20_us"])
            / float(cells[shape, f"wsl_loss{form}"]["p20_us"])
            for form in ("", ", compiled")
        ]
        line += [eager["peak_logits"] or "-", " / ".join(f"{x:.2g}" for x in balanced)]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def linear_table(rows: list[Row]) -> str:
    """Return the table of cpu_linear.csv: one line per provider and dtype."""
    lines = ["| provider | dtype | time | peak memory |", "|---" * 4 + "|"]
    for row in rows:
        cells = row["provider"], row["dtype"], f"{float(row['p20_ms']):,.0f} ms"
        lines.append(f"| {' | '.join(cells)} | {float(row['peak_float32_logits']):.2f} |")
    return "\n".join(lines)


def cached_table(rows: list[Row]) -> str:
    """Return the table of cpu_cached.csv: one line per shape and provider."""
    lines = ["| shape | provider | time | relative | peak memory |", "|---" * 5 + "|"]
    for row in rows:
        cells = [row["shape"], row["provider"], f"{float(row['p20_ms']):,.0f} ms"]
        cells += [row["time_over_base"], f"{float(row['peak_float32_logits']):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SUMMARY = {"256x1000": "ImageNet", "1024x32000": "LLM vocabulary", "2x19x256x256": "segmentation"}


def summary(rows: list[Row], linear: list[Row]) -> str:
    """Return the README's rows, float32: three shapes of cpu.csv, then one of cpu_linear.csv."""
    cells = {(row["shape"], row["provider"]): row for row in rows if row["dtype"] == "float32"}
    lines = []
    for shape, use in SUMMARY.items():
        line = [f"`wsl_loss`, {shape} ({use})", "`F.cross_entropy` + `F.kl_div`"]
        for form in ("", ", compiled"):
            ours, theirs = cells[shape, f"wsl_loss{form}"], cells[shape, f"distillation{form}"]
            line.append(milliseconds(ours["p20_us"], theirs["p20_us"], 1000))
        ours, theirs = cells[shape, "wsl_loss"], cells[shape, "distillation"]
        memory = f"{ours['peak_logits']} vs {theirs['peak_logits']}"
        lines.append([*line, memory if ours["peak_logits"] else "-"])
    ours, theirs = linear[:2]
    length, width, classes = ours["shape"].split("x")
    lines.append(
        [
            f"`linear_wsl_loss`, {length}x{classes}, {width} features",
            "`F.linear` twice + `wsl_loss`",
            milliseconds(ours["p20_ms"], theirs["p20_ms"], 1),
            "-",
            " vs ".join(f"{float(row['peak_float32_logits']):.2f}" for row in (ours, theirs)),
        ]
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(ours: str, theirs: str, divisor: int) -> str:
    times = (float(time) / divisor for time in (ours, theirs))
    return " vs ".join(f"{time:.3g}" if time < 100 else f"{time:,.0f}" for time in times) + " ms"


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=here / "results", help="of the CSV files")
    parser.add_argument("--figures", type=Path, default=here / "figures", help="to draw into")
    args = parser.parse_args()
    paths = [args.results / "cpu.csv", args.results / "cuda.csv"]
    paths = [path for path in paths if path.exists()]
    if not paths:
        parser.error(f"{args.results} has neither cpu.csv nor cuda.csv; run bench_loss.py first")
    args.figures.mkdir(parents=True, exist_ok=True)
    for path in paths:
        rows = read(path)
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            chosen = [row for row in rows if row["dtype"] == dtype]
            draw(chosen, args.figures / f"{path.stem}_{dtype}.png")
            print(table(chosen))
    linear = args.results / "cpu_linear.csv"
    if linear.exists() and paths[0].stem == "cpu":
        rows = read(linear)
        print(linear_table(rows), summary(read(paths[0]), rows), sep="\n\n")
    cached = args.results / "cpu_cached.csv"
    if cached.exists():
        print(cached_table(read(cached)))


if __name__ == "__main__":
    main()
