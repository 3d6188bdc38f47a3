"""When does WSL pay? Students of teachers, and of labels, that are wrong in several ways.

    pip install "weighted-soft-labels[examples]"
    python teacher_mistakes.py

For every seed, students overfit a few images, which are not augmented, by

    CE        cross-entropy with the labels alone
    KD        CE + alpha * T^2 * KL(teacher || student), Hinton et al. 2015: every image has
              weight 1
    WSL       CE + alpha * T^2 * weight * soft cross-entropy, `weighted_soft_labels.wsl_loss`
    uniform   KD, but every image gets the batch's mean WSL weight: separates the weighting from
              less soft label
    masked    KD, but weight 0 where the teacher's largest logit is not the label that the student
              gets: the simplest way to distrust a teacher
    balanced  WSL, but the weights of a batch are divided by their mean: the weighting with as much
              soft label as KD

The teacher is trained on other images. It is

    naturally worse      trained on fewer images (four sizes; the cases below use the largest)
    wrong at random      on 10, 20 or 40 % of the images, its logits are rolled to a wrong class
    wrong by a system    one or two pairs of classes, 20 or 40 % of all, are swapped in its logits
    better than labels   20 or 40 % of the labels that the student gets are wrong

at T = 4 and alpha = 2.25. T = 1, T = 2 and alpha = 0.5 are tried one at a time, without mistakes
and with 20 % at random. All students of a seed, networks with 256 hidden units, start alike and see
the same images in the same order.

    dataset         student's images   teachers'                epochs   teachers'   seeds
    digits          540, made noisy    60, 120, 250, 450            50          40       8
    fashion-mnist   3000               300, 1000, 3000, 10000       15          10      10

The folder --out gets teacher_mistakes.csv (a row for every seed, setting and loss), its means and
95 % intervals in teacher_mistakes_summary.csv, options and hardware in teacher_mistakes.json, and a
figure. The table is complete after every seed. The same command continues a run that was killed.
With more --seeds, it adds them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import study
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import COLORS, Row, Task, column, confidence_interval
from torch import Tensor, nn

from weighted_soft_labels.analysis import wsl_terms

LR = 3e-3  # maximum of the one-cycle schedule
METHODS = ("CE", "KD", "WSL", "uniform", "masked", "balanced")
MARKERS = dict(zip(METHODS, "DoXs^v"))
DIFFERENCES = (
    ("WSL", "KD"),
    ("WSL", "uniform"),
    ("WSL", "CE"),
    ("KD", "CE"),
    ("masked", "KD"),
    ("WSL", "masked"),
    ("balanced", "KD"),
    ("balanced", "WSL"),
)
SHARES = ("teacher_wrong", "weight_right", "weight_wrong")
OPTIONS = ("train_images", "sizes", "epochs", "teacher_epochs", "seeds")
BY_DATASET = {
    "digits": (540, [60, 120, 250, 450], 50, 40, 8),
    "fashion-mnist": (3000, [300, 1000, 3000, 10000], 15, 10, 10),
}


class Setting(NamedTuple):
    """How students differ apart from their loss. For CE, only `noise` is set."""

    teacher_images: int | None = None
    mistakes: str | None = None  # added to the teacher's logits: none, random or systematic
    share: float | None = None  # of the images or classes with such mistakes
    noise: float = 0.0  # share of wrong labels
    temperature: float | None = None
    alpha: float | None = None


def settings(args: argparse.Namespace) -> list[Setting]:
    natural = [Setting(size, "none", 0.0, 0.0, 4.0, args.alpha) for size in args.sizes]
    good = natural[-1]
    random = [good._replace(mistakes="random", share=share) for share in (0.1, 0.2, 0.4)]
    changes: list[dict[str, float]] = [{"temperature": 1.0}, {"temperature": 2.0}, {"alpha": 0.5}]
    return [
        *natural,
        *random,
        *(good._replace(mistakes="systematic", share=share) for share in (0.2, 0.4)),
        *(good._replace(noise=noise) for noise in (0.2, 0.4)),
        *(start._replace(**change) for start in (good, random[1]) for change in changes),
    ]


# --- mistakes: those of a share include those of every smaller share, for the same seed ---


def make_noisy(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """Replace a share of the labels by a wrong one, uniformly."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(labels), generator=generator) < share * len(labels)
    wrong = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    return torch.where(drawn, wrong, labels)


def roll(logits: Tensor, labels: Tensor, share: float, seed: int) -> Tensor:
    """Roll a share of the rows, so that the largest logit is at a wrong class, uniformly."""
    classes = logits.shape[1]
    noisy = make_noisy(labels, classes, share, seed)
    steps = (noisy - logits.argmax(1)).where(noisy != labels, 0)
    return logits.gather(1, (torch.arange(classes) - steps[:, None]) % classes)


def swap_classes(logits: Tensor, share: float, seed: int) -> Tensor:
    """Swap the logits of pairs of classes, a share of all classes, as a broken label map does."""
    generator = torch.Generator().manual_seed(seed)
    classes = logits.shape[1]
    swapped = 2 * round(share * classes / 2)
    pairs = torch.randperm(classes, generator=generator)[:swapped].view(-1, 2)
    order = torch.arange(classes)
    order[pairs] = pairs.flip(1)
    return logits[:, order]


# --- one seed ---


def train_student(
    images: Tensor, teacher_logits: Tensor, labels: Tensor, loss: study.Loss, epochs: int
) -> tuple[nn.Module, Tensor]:
    """Return the student, and the mean over the training of every image's WSL weight.

    The weight is computed for every loss, whether or not the loss uses it.
    """
    layers = (
        nn.Flatten(),
        nn.Linear(images[0].numel(), 256),
        nn.ReLU(),
        nn.Linear(256, teacher_logits.shape[1]),
    )
    student = nn.Sequential(*layers).to(images.device)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    steps = epochs * study.steps_per_epoch(len(images))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    weight = torch.zeros(len(images), device=images.device)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).to(images.device).split(study.BATCH):
            student_logits = student(images[batch])
            inputs = student_logits, teacher_logits[batch], labels[batch]
            optimizer.zero_grad()
            loss(*inputs).backward()
            optimizer.step()
            schedule.step()
            weight[batch] += wsl_terms(*inputs).weight / epochs
    return student, weight.cpu()


def load_task(args: argparse.Namespace) -> Task:
    task = study.load_task(args.dataset, args.data, args.device)
    if args.dataset == "fashion-mnist":  # remove the padding
        train = task.train_images[..., 2:-2, 2:-2].contiguous()
        test = task.test_images[..., 2:-2, 2:-2].contiguous()
        task = task._replace(train_images=train, test_images=test)
    return task


def replicate(args: argparse.Namespace, seed: int) -> list[Row]:
    task = load_task(args)
    torch.manual_seed(seed)
    drawn = study.draw(task, args.train_images + max(args.sizes))
    own, others = drawn.split([args.train_images, max(args.sizes)])
    images, labels = task.train_images[own], task.train_labels[own].cpu()
    classes = int(task.train_labels.max()) + 1
    if args.dataset == "digits":
        images = task.augment(images)
    cached = cache_teachers(args, task, others, images)

    rows = {}
    for setting in settings(args):
        teacher_logits = make_mistakes(setting, cached[setting.teacher_images], labels, seed)
        given = make_noisy(labels, classes, setting.noise, seed)
        right = teacher_logits.argmax(1) == given
        for method in METHODS:
            key = Setting(noise=setting.noise) if method == "CE" else setting
            if (key, method) in rows:  # CE needs no teacher, so one student serves all of them
                continue
            torch.manual_seed(seed)
            loss = study.make_loss(method, setting.temperature, setting.alpha)
            data = images, teacher_logits.to(args.device), given.to(args.device)
            student, weight = train_student(*data, loss, args.epochs)
            shares = dict.fromkeys(SHARES)
            accuracy = study.accuracy(study.predict(task, student), task.test_labels)
            if method != "CE":
                wrong = (teacher_logits.argmax(1) != labels).float().mean()
                values = wrong, weight[right].mean(), weight[~right].mean()
                shares = dict(zip(SHARES, map(float, values)))
            row = {"seed": seed, **key._asdict(), "method": method, "accuracy": accuracy}
            rows[key, method] = row | shares
    return list(rows.values())


def cache_teachers(
    args: argparse.Namespace, task: Task, drawn: Tensor, images: Tensor
) -> dict[int, Tensor]:
    """Train a teacher per size, each for as many steps, and return their logits of the images."""
    steps = args.teacher_epochs * study.steps_per_epoch(max(args.sizes))
    cached = {}
    for size in args.sizes:
        epochs = steps // study.steps_per_epoch(size)
        (teacher,) = study.train_teachers(task, drawn[:size], epochs)
        with torch.inference_mode():
            logits = [teacher(part) for part in images.split(study.EVALUATION_BATCH)]
            cached[size] = torch.cat(logits).cpu()
    return cached


def make_mistakes(setting: Setting, logits: Tensor, labels: Tensor, seed: int) -> Tensor:
    if setting.mistakes == "random":
        return roll(logits, labels, setting.share, seed)
    if setting.mistakes == "systematic":
        return swap_classes(logits, setting.share, seed)
    return logits


def make_tables(results: list[list[Row]]) -> dict[str, list[Row]]:
    return {"teacher_mistakes": [row for rows in results for row in rows]}


def restore(out: Path) -> dict[int, list[Row]]:
    results: dict[int, list[Row]] = {}
    for row in study.read_table(out / "teacher_mistakes.csv"):
        results.setdefault(int(row["seed"]), []).append(row)
    return results


# --- the report, from the table alone ---


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Return one row per setting, with mean and half the 95 % interval of every value.

    The values are accuracies, their differences within a seed, and shares.
    """
    all_settings = dict.fromkeys(
        Setting(*(row[name] for name in Setting._fields)) for row in rows if row["method"] != "CE"
    )
    summary = []
    for setting in all_settings:
        where = {method: {**setting._asdict(), "method": method} for method in METHODS}
        where["CE"] |= Setting(noise=setting.noise)._asdict()
        values = {method: column(rows, "accuracy", **where[method]) for method in METHODS}
        values |= {f"{a} - {b}": values[a] - values[b] for a, b in DIFFERENCES}
        values |= {name: column(rows, name, **where["WSL"]) for name in SHARES}
        summary.append({**setting._asdict(), "seeds": study.count_seeds(rows)})
        for name, value in values.items():
            summary[-1][name], summary[-1][f"{name} half"] = confidence_interval(value)
    return summary


def name_of(row: Row) -> str:
    name = f"{row['teacher_images']:,.0f} images".replace(",", " ")
    if row["share"]:
        name += f", {100 * row['share']:.0f} % {row['mistakes']}"
    if row["noise"]:
        name += f", {100 * row['noise']:.0f} % noisy labels"
    name += f", T = {row['temperature']:g}" if row["temperature"] != 4 else ""
    return name + (f", alpha = {row['alpha']:g}" if row["alpha"] == 0.5 else "")


def accuracy_cells(row: Row) -> list[str]:
    return [
        name_of(row),
        f"{100 * row['teacher_wrong']:.1f}",
        *(f"{row[method]:.2f}" for method in METHODS),
        *(f"{row[name]:.2f}" for name in SHARES[1:]),
    ]


def difference_cells(row: Row) -> list[str]:
    names = map(" - ".join, DIFFERENCES)
    return [name_of(row), *(f"{row[name]:+.2f} +- {row[f'{name} half']:.2f}" for name in names)]


def print_table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for cells in lines:
        print("| " + " | ".join(cells) + " |")


def print_tables(summary: Sequence[Row]) -> None:
    print(f"\n{summary[0]['seeds']} seeds. Test accuracy: mean in %.")
    print("wrong: share of the student's images on which the teacher is wrong, in %.")
    print("Weights: means over the training by WSL, where the teacher is right or wrong by the")
    print("label that the student gets.")
    names = ["teacher", "wrong", *METHODS, "weight if right", "if wrong"]
    print_table(names, map(accuracy_cells, summary))
    print("\nDifferences in test accuracy within a seed, in points: mean +- half a 95 % confidence")
    print("interval (Student's t).")
    names = ["teacher", *map(" - ".join, DIFFERENCES)]
    print_table(names, map(difference_cells, summary))


def plot_accuracies(axes: Axes, rows: Sequence[Row], title: str, x: str) -> None:
    rows = sorted(rows, key=lambda row: row[x])
    for i, method in enumerate(METHODS):
        places = [100 * row[x] + 0.3 * (i - (len(METHODS) - 1) / 2) for row in rows]
        means, halves = zip(*((row[method], row[f"{method} half"]) for row in rows))
        style = {"markersize": 5, "capsize": 3, "color": COLORS[method]}
        axes.errorbar(places, means, halves, fmt=f"{MARKERS[method]}-", label=method, **style)
    what = "labels that are wrong" if x == "noise" else "images on which the teacher is wrong"
    axes.set(xlabel=f"{what} (%)", ylabel="test accuracy (%)")
    axes.set_title(title, fontsize=10)


def gain_of_wsl(row: Row, other: str) -> tuple[float, float]:
    """Return mean and half the interval of WSL - `other`."""
    if ("WSL", other) in DIFFERENCES:
        return row[f"WSL - {other}"], row[f"WSL - {other} half"]
    return -row[f"{other} - WSL"], row[f"{other} - WSL half"]


def plot_gains(axes: Axes, summary: Sequence[Row]) -> None:
    others = [method for method in METHODS if method != "WSL"]
    for i, other in enumerate(others):
        places = [-place - 0.15 * (i - (len(others) - 1) / 2) for place in range(len(summary))]
        means, halves = zip(*(gain_of_wsl(row, other) for row in summary))
        style = {"fmt": MARKERS[other], "markersize": 4, "capsize": 2, "color": COLORS[other]}
        axes.errorbar(means, places, xerr=halves, label=f"above {other}", **style)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    names = [name_of(row) for row in summary]
    axes.set_yticks([-place for place in range(len(summary))], names, fontsize=8)
    axes.set_xlabel("test accuracy of WSL (points)")
    axes.margins(y=0.01)
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))


def save_figure(path: Path, summary: Sequence[Row], options: Row) -> None:
    base = [row for row in summary if row["temperature"] == 4 and row["alpha"] == options["alpha"]]
    largest = max(row["teacher_images"] for row in base)
    good = [row for row in base if row["teacher_images"] == largest and not row["noise"]]
    panels = {
        "naturally worse teachers": [row for row in base if not row["share"] and not row["noise"]],
        "mistakes at random": [row for row in good if row["mistakes"] in ("none", "random")],
        "classes swapped": [row for row in good if row["mistakes"] in ("none", "systematic")],
        "noisy labels": [
            row for row in base if row["teacher_images"] == largest and not row["share"]
        ],
    }
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.1))
    for i, (title, rows) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[i // 2, i % 2])
        plot_accuracies(axes, rows, title, "noise" if "labels" in title else "teacher_wrong")
    axes.legend(fontsize=8)
    plot_gains(figure.add_subplot(grid[:, 2]), summary)
    interval = f"mean and 95 % interval over {summary[0]['seeds']} seeds"
    figure.suptitle(f"{options['dataset']}: {interval}", fontsize=11)
    figure.savefig(path, dpi=120)


def report(out: Path, options: Row) -> None:
    summary = summarize(study.read_table(out / "teacher_mistakes.csv"))
    study.write_table(out / "teacher_mistakes_summary.csv", summary)
    print_tables(summary)
    save_figure(out / "teacher_mistakes.png", summary, options)
    print(f"\nFigure: {out / 'teacher_mistakes.png'}")


# --- command line ---


def main() -> None:
    parser = study.make_parser(__doc__, epochs=None, out="runs/teacher_mistakes")
    sizes = "images of the teachers (by dataset, see above)"
    parser.add_argument("--sizes", type=int, nargs="+", help=sizes)
    args = parser.parse_args()
    if args.dataset not in BY_DATASET:
        parser.error(f"--dataset must be {' or '.join(BY_DATASET)}, got {args.dataset}")
    parser.set_defaults(**dict(zip(OPTIONS, BY_DATASET[args.dataset])))
    args = parser.parse_args()
    args.sizes = sorted(set(args.sizes))
    study.run(args, replicate, make_tables, report, restore)


if __name__ == "__main__":
    main()
