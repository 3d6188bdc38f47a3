"""Bias and variance of students trained with cross-entropy, KD and WSL, on real data.

    pip install "weighted-soft-labels[examples]"
    python bias_variance.py

The expected cross-entropy of a student, over training sets, is a bias plus a variance (see
`weighted_soft_labels.analysis.bias_variance`). For every seed, the training images are split into M
disjoint parts. On each part, students are trained with

    CE   cross-entropy with the labels alone
    KD   CE + alpha * T^2 * KL(teacher || student), Hinton et al. 2015: every sample has weight 1
    WSL  CE + alpha * T^2 * weight * soft cross-entropy, `weighted_soft_labels.wsl_loss`

KD and WSL run at several temperatures T. The M students of a loss give its bias and its variance on
every test image. Each student has its own teacher, a network three times as wide that was trained
on the same part. So the soft labels tell the student nothing about other images.
`--shared-teacher` trains one teacher on all parts together, the usual case in practice.

With M models, the variance is too small by a factor of about 1 - 1/M, and the bias is too large by
the same amount.

The folder --out gets bias_variance.csv (a row for every seed, loss, temperature and measured
epoch), bias_variance_samples.csv (a row for every test image: means over the seeds, at the
temperature nearest to the paper's 4), options and hardware in bias_variance.json, and two figures.
STUDY.md has the results on Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import study
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from study import COLORS, Row, Task, column, confidence_interval, show
from torch import Tensor, nn

from weighted_soft_labels.analysis import bias_variance

PAPER_TEMPERATURE = 4.0  # CIFAR-100
MEASURES = ("bias", "variance", "nll")
LABELS = {"bias": "bias (nats)", "variance": "variance (nats)", "nll": "test NLL (nats)"}
# How bias and variance change from CE to another loss.
TRADES = (("up", "down"), ("up", "up"), ("down", "down"), ("down", "up"))


class Method(NamedTuple):
    loss: str
    temperature: float | None  # None for CE


class Measured(NamedTuple):
    """Bias and variance (N,) of the M students of a method on the test images.

    The accuracy is the mean over the students, in percent.
    """

    bias: Tensor
    variance: Tensor
    accuracy: float


# --- one seed ---


def methods(args: argparse.Namespace) -> list[Method]:
    distilled = [Method(loss, T) for loss in ("KD", "WSL") for T in args.temperatures]
    return [Method("CE", None), *distilled]


def replicate(args: argparse.Namespace, seed: int) -> tuple[list[Row], dict[str, Tensor]]:
    """Return the rows of a seed, and the columns of its samples."""
    task = study.load_task(args.dataset, args.data, args.device)
    torch.manual_seed(seed)
    parts = study.draw(task, args.train_images).tensor_split(args.models)
    first = study.make_network(task, study.STUDENT_WIDTH)
    if args.shared_teacher:
        teachers = study.train_teachers(task, torch.cat(parts), args.teacher_epochs) * args.models
    else:
        teachers = [
            teacher
            for part in parts
            for teacher in study.train_teachers(task, part, args.teacher_epochs)
        ]

    def student(method: Method, part: Tensor, teacher: nn.Module) -> study.Learner:
        loss = study.make_loss(method.loss, method.temperature, args.alpha)
        steps = args.epochs * study.steps_per_epoch(len(part))
        used_teacher = None if method.temperature is None else teacher
        return study.Learner(copy.deepcopy(first), loss, steps, used_teacher)

    students = [
        [student(method, part, teacher) for method in methods(args)]
        for part, teacher in zip(parts, teachers)
    ]
    rows = []
    for epoch in range(1, args.epochs + 1):
        for part, learners in zip(parts, students):
            study.train_epoch(task, part, learners)
        if epoch in snapshots(args.epochs):
            measured = {
                method: measure(task, learners)
                for method, learners in zip(methods(args), zip(*students))
            }
            rows += [make_row(seed, epoch, method, measured) for method in measured]
    return rows, make_samples(args, task, measured)


def snapshots(epochs: int) -> list[int]:
    """Return the epochs after which to measure: the first, the last, and some in between."""
    return sorted({max(1, round(share * epochs)) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)})


def measure(task: Task, learners: Sequence[study.Learner]) -> Measured:
    logits = torch.stack([study.predict(task, learner.network) for learner in learners])
    bias, variance = bias_variance(logits, task.test_labels)
    return Measured(bias, variance, study.accuracy(logits, task.test_labels))


def make_row(seed: int, epoch: int, method: Method, measured: dict[Method, Measured]) -> Row:
    """Return means over the test images, and the share of images with each change from CE."""
    bias, variance, percent = measured[method]
    ce = measured[Method("CE", None)]
    biases = {"up": bias > ce.bias, "down": bias < ce.bias}
    variances = {"up": variance > ce.variance, "down": variance < ce.variance}
    trades = {
        f"bias_{i}_variance_{j}": (biases[i] & variances[j]).float().mean().item()
        for i, j in TRADES
    }
    return {
        "seed": seed,
        "loss": method.loss,
        "temperature": method.temperature,
        "epoch": epoch,
        "bias": bias.double().mean().item(),
        "variance": variance.double().mean().item(),
        "nll": (bias + variance).double().mean().item(),
        "accuracy": percent,
        **trades,
    }


def shown(temperatures: list[float]) -> float:
    """Return the temperature of KD and WSL for tables and figures that show only one."""
    return min(temperatures, key=lambda T: abs(T - PAPER_TEMPERATURE))


def make_samples(
    args: argparse.Namespace, task: Task, measured: dict[Method, Measured]
) -> dict[str, Tensor]:
    T = shown(args.temperatures)
    columns = {"label": task.test_labels}
    for method in (Method("CE", None), Method("KD", T), Method("WSL", T)):
        columns[f"bias_{method.loss}"] = measured[method].bias
        columns[f"variance_{method.loss}"] = measured[method].variance
    return {name: values.cpu() for name, values in columns.items()}


def make_tables(results: list[tuple[list[Row], dict[str, Tensor]]]) -> dict[str, list[Row]]:
    """Return the rows of all seeds, and the samples as means over the seeds."""
    names = results[0][1]
    samples = {name: torch.stack([columns[name] for _, columns in results]) for name in names}
    labels = samples.pop("label")[0].tolist()
    means = (values.double().mean(0).tolist() for values in samples.values())
    return {
        "bias_variance": [row for rows, _ in results for row in rows],
        "bias_variance_samples": [
            dict(zip(("label", *samples), row)) for row in zip(labels, *means)
        ],
    }


# --- the report, from the tables alone ---


def report(out: Path, options: Row) -> None:
    rows = study.read_table(out / "bias_variance.csv")
    samples = study.read_table(out / "bias_variance_samples.csv")
    print_report(rows, options)
    save_figure(out / "bias_variance.png", rows, options)
    save_samples_figure(out / "bias_variance_samples.png", samples, options)
    print(f"\nFigures: {out / 'bias_variance.png'} and {out / 'bias_variance_samples.png'}")


def print_report(rows: list[Row], options: Row) -> None:
    last = [row for row in rows if row["epoch"] == options["epochs"]]
    seeds, epochs = study.count_seeds(rows), options["epochs"]
    print(f"\n{options['models']} students a loss, {seeds} seeds, after {epochs} epochs:")
    print("mean over the seeds +- half a 95 % confidence interval (Student's t)\n")
    print(f"{'':14}{'bias':>18}{'variance':>18}{'test NLL':>18}{'accuracy, %':>16}")
    for method in methods_of(last):
        cells = [show(column(last, name, **method._asdict()), 4) for name in MEASURES]
        percent = show(column(last, "accuracy", **method._asdict()))
        print(f"{title(method):14}" + "".join(f"{cell:>18}" for cell in cells) + f"{percent:>16}")

    print("\nDifferences within a seed\n")
    for a, b in pairs(methods_of(last)):
        names = (*MEASURES, "accuracy")
        values = [
            column(last, name, **a._asdict()) - column(last, name, **b._asdict()) for name in names
        ]
        cells = "".join(f"{show(value, 4, '+'):>18}" for value in values[:-1])
        print(f"{title(a) + ' - ' + b.loss:14}{cells}{show(values[-1], 2, '+'):>16}")

    print("\nTest images, in %, by what became of them from CE to the other loss\n")
    print("bias, variance" + "".join(f"{', '.join(trade):>18}" for trade in TRADES))
    for method in methods_of(last)[1:]:
        print_trades(title(method), last, method)
    method = Method("KD", shown(options["temperatures"]))
    print(f"\nThe same of {title(method)} by epoch\n")
    for epoch in sorted({row["epoch"] for row in rows}):
        print_trades(f"epoch {epoch:g}", [row for row in rows if row["epoch"] == epoch], method)


def print_trades(name: str, rows: list[Row], method: Method) -> None:
    shares = [
        column(rows, f"bias_{bias}_variance_{variance}", **method._asdict())
        for bias, variance in TRADES
    ]
    cells = [show(100 * share, 1) for share in shares]
    print(f"{name:14}" + "".join(f"{cell:>18}" for cell in cells))


def methods_of(rows: list[Row]) -> list[Method]:
    return list(dict.fromkeys(Method(row["loss"], row["temperature"]) for row in rows))


def title(method: Method) -> str:
    suffix = "" if method.temperature is None else f", T = {method.temperature:g}"
    return method.loss + suffix


def pairs(methods: list[Method]) -> list[tuple[Method, Method]]:
    """Return KD against CE, then WSL against KD at the same temperature."""
    kd = [method for method in methods if method.loss == "KD"]
    against_ce = [(method, Method("CE", None)) for method in kd]
    return against_ce + [(method._replace(loss="WSL"), method) for method in kd]


def save_figure(path: Path, rows: list[Row], options: Row) -> None:
    """Draw each measure by epoch at one temperature; below, by temperature after the last epoch."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, len(MEASURES))
    temperature = shown(options["temperatures"])
    last = [row for row in rows if row["epoch"] == options["epochs"]]
    for measure, above, below in zip(MEASURES, *axes):
        for method in methods_of(rows):
            if method.temperature in (None, temperature):
                epochs = sorted({row["epoch"] for row in rows})
                values = [
                    column(rows, measure, epoch=epoch, **method._asdict()) for epoch in epochs
                ]
                errorbar(above, epochs, values, method.loss)
        temperatures = sorted({row["temperature"] for row in last} - {None})
        for loss in ("KD", "WSL"):
            values = [column(last, measure, loss=loss, temperature=T) for T in temperatures]
            errorbar(below, temperatures, values, loss)
        mean, half = confidence_interval(column(last, measure, loss="CE"))
        below.axhspan(mean - half, mean + half, color=COLORS["CE"], alpha=0.25, linewidth=0)
        below.axhline(mean, color=COLORS["CE"], label="CE")
        for axis in (above, below):
            axis.set_ylabel(LABELS[measure])
            axis.legend(fontsize=8)
        above.set_yscale("log")
        above.xaxis.set_major_locator(MaxNLocator(integer=True))
        above.set_xlabel(f"epoch (KD and WSL: T = {temperature:g})")
        below.set_xlabel("temperature")
        below.set_xscale("log", base=2)
        below.set_xticks(temperatures, [f"{T:g}" for T in temperatures])
    teachers = "one teacher for all" if options["shared_teacher"] else "a teacher for each student"
    interval = f"mean and 95 % interval over {study.count_seeds(rows)} seeds"
    figure.suptitle(f"{options['dataset']}, {teachers}: {interval}", fontsize=11)
    figure.savefig(path, dpi=120)


def errorbar(axis: Axes, x: list[float], values: list[Tensor], loss: str) -> None:
    means, halves = zip(*(confidence_interval(value) for value in values))
    style = {"capsize": 3, "marker": "o", "markersize": 3}
    axis.errorbar(x, means, halves, color=COLORS[loss], label=loss, **style)


def save_samples_figure(path: Path, samples: list[Row], options: Row) -> None:
    """Draw one point per test image: the change in bias and variance from CE to KD and WSL."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    values = {name: torch.tensor([row[name] for row in samples]) for name in samples[0]}
    for axis, loss in zip(axes, ("KD", "WSL")):
        change = [values[f"{name}_{loss}"] - values[f"{name}_CE"] for name in ("bias", "variance")]
        axis.scatter(*change, s=3, alpha=0.3, color=COLORS[loss], linewidths=0)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axvline(0, color="black", linewidth=0.6)
        # Most images move by less than 0.01 and few move far, so the axes are logarithmic beyond.
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_xlabel(f"change in bias from CE to {loss} (nats)")
        axis.set_title(f"{loss}, T = {shown(options['temperatures']):g}", fontsize=10)
    axes[0].set_ylabel("change in variance from CE (nats)")
    figure.suptitle(
        f"{options['dataset']}: {len(samples)} test images, means over the seeds", fontsize=11
    )
    figure.savefig(path, dpi=120)


# --- command line ---


def parse_args() -> argparse.Namespace:
    parser = study.make_parser(__doc__, epochs=50, out="runs/bias_variance")
    add = parser.add_argument
    add("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0], help="(1 2 4 8)")
    add("--models", type=int, default=4, help="parts of the training set, >= 2 (4)")
    add("--shared-teacher", action="store_true", help="one teacher, trained on all parts")
    args = parser.parse_args()
    args.temperatures = sorted(set(args.temperatures))
    return args


def main() -> None:
    study.run(parse_args(), replicate, make_tables, report)


if __name__ == "__main__":
    main()
