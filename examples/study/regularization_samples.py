"""How many regularization samples teachers and temperatures make, and what it is worth to drop or to weigh them.

    pip install "weighted-soft-labels[examples]"
    python regularization_samples.py

A regularization sample is one on which distillation pulls more on the variance than on the bias (see
`weighted_soft_labels.analysis.regularization_samples`). The paper finds that students do worse the more there are, for
one temperature, that teachers trained with label smoothing make more of them and teach worse, that dropping them all
hurts, too, and that weighing every sample (WSL) beats both. For every seed, teachers are trained with several label
smoothings, and from each of them, at several temperatures T, students with

    KD        CE + alpha * T^2 * KL(teacher || student), Hinton et al. 2015: the same weight for every sample
    dropped   KD without the soft term of what is a regularization sample at that step
    WSL       CE + alpha * T^2 * weight * soft cross-entropy, `weighted_soft_labels.wsl_loss`
    uniform   WSL with the mean weight of the batch in place of each sample's own: just as much soft label, but the same
              for every sample. What WSL gains over it is gained by telling samples apart

and one student with cross-entropy alone (CE). Regularization samples are counted on the images of every training step,
as the student sees them then. Which rule the paper prints could not be verified, so they are counted by all three:
opposing, where the soft term pulls the logit of the label down; magnitude, those and the ones far below, where it pulls
up by more than twice what the hard term does; signed, all but the ones far below. At T = 1 none is far below. All
students of a seed start alike and see the same images in the same order.

The folder --out gets regularization_samples.csv (a row for every seed, label smoothing, T, loss and epoch; test
accuracy and NLL in the last), options and hardware in regularization_samples.json, and two figures. STUDY.md holds what
came out on Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import study
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from study import COLORS, Row, Task, column, confidence_interval, show
from torch import Tensor, nn

from weighted_soft_labels.analysis import regularization_samples, wsl_terms

LOSSES = ("KD", "dropped", "uniform", "WSL")
RULES = ("magnitude", "opposing", "signed")
PAIRS = (("KD", "CE"), ("dropped", "KD"), ("WSL", "KD"), ("WSL", "dropped"), ("WSL", "uniform"))
COLUMNS = (
    "regularization_samples",
    "share",
    "share_opposing",
    "weight",
    "test_accuracy",
    "test_nll",
)


class Method(NamedTuple):
    loss: str
    smoothing: float | None = None  # of the teacher; CE has neither
    temperature: float | None = None


# The loss that is here to be compared with -----------------------------------------------------------------------


def make_student_loss(method: Method, alpha: float) -> study.Loss:
    T = method.temperature

    def dropped(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        kept = ~regularization_samples(student_logits, teacher_logits, labels, temperature=T)
        soft = F.cross_entropy(
            student_logits / T, (teacher_logits / T).softmax(1), reduction="none"
        )
        return F.cross_entropy(student_logits, labels) + alpha * T**2 * (kept * soft).mean()

    return dropped if method.loss == "dropped" else study.make_loss(method.loss, T, alpha)


# One seed -----------------------------------------------------------------------------------------------------------


def methods(args: argparse.Namespace) -> list[Method]:
    return [
        Method("CE"),
        *(Method(*of) for of in product(LOSSES, args.smoothings, args.temperatures)),
    ]


def replicate(args: argparse.Namespace, seed: int) -> list[Row]:
    task = study.load_task(args.dataset, args.data, args.device)
    torch.manual_seed(seed)
    drawn = study.draw(task, args.train_images)
    first = study.make_network(task, study.STUDENT_WIDTH)
    teachers = dict(
        zip(
            args.smoothings, study.train_teachers(task, drawn, args.teacher_epochs, args.smoothings)
        )
    )
    steps = args.epochs * study.steps_per_epoch(len(drawn))
    students = {
        method: study.Learner(
            copy.deepcopy(first),
            make_student_loss(method, args.alpha),
            steps,
            teachers.get(method.smoothing),
        )
        for method in methods(args)
    }

    rows = [
        make_row(seed, Method("teacher", smoothing), args.teacher_epochs, evaluate(task, teacher))
        for smoothing, teacher in teachers.items()
    ]
    for epoch in range(1, args.epochs + 1):
        seen = study.train_epoch(task, drawn, list(students.values()))
        for (method, student), logits in zip(students.items(), seen.student_logits):
            tested = evaluate(task, student.network) if epoch == args.epochs else {}
            counted = (
                {}
                if student.teacher is None
                else count(seen, logits, student.teacher, method.temperature)
            )
            rows.append(make_row(seed, method, epoch, counted, tested))
    return rows


def count(seen: study.Epoch, student_logits: Tensor, teacher: nn.Module, temperature: float) -> Row:
    of = student_logits, seen.teacher_logits[teacher], seen.labels
    found, opposing = (
        regularization_samples(*of, temperature=temperature, rule=rule) for rule in RULES[:2]
    )
    return {
        "regularization_samples": int(found.sum()),
        "share": found.float().mean().item(),
        "share_opposing": opposing.float().mean().item(),
        "weight": wsl_terms(*of).weight.mean().item(),
    }


def evaluate(task: Task, network: nn.Module) -> Row:
    logits = study.predict(task, network)
    nll = F.cross_entropy(logits, task.test_labels).item()
    return {"test_accuracy": study.accuracy(logits, task.test_labels), "test_nll": nll}


def make_row(seed: int, method: Method, epoch: int, *measured: Row) -> Row:
    """What was not measured stays empty."""
    row = {"seed": seed, **method._asdict(), "epoch": epoch, **dict.fromkeys(COLUMNS)}
    for values in measured:
        row |= values
    return row


def make_tables(results: list[list[Row]]) -> dict[str, list[Row]]:
    return {"regularization_samples": [row for rows in results for row in rows]}


# The report, from the table alone -----------------------------------------------------------------------------------


def report(out: Path, options: Row) -> None:
    results = Results(study.read_table(out / "regularization_samples.csv"), options["epochs"])
    print_report(results, options)
    save_counts(out / "regularization_samples.png", results, options)
    save_losses(out / "regularization_samples_losses.png", results, options)
    print(
        f"\nFigures: {out / 'regularization_samples.png'} and {out / 'regularization_samples_losses.png'}"
    )


class Results(NamedTuple):
    """Values by seed, in the order of the seeds."""

    rows: list[Row]
    epochs: int

    @property
    def seeds(self) -> int:
        return study.count_seeds(self.rows)

    def of(self, method: Method, name: str, epoch: int | None = None) -> Tensor:
        """After the last epoch, unless another one is asked for."""
        return column(self.rows, name, epoch=epoch or self.epochs, **method._asdict())

    def shares(self, method: Method) -> dict[str, Tensor]:
        """Regularization samples by rule, in % of the images of all epochs."""
        magnitude, opposing = (
            100
            * torch.stack(
                [self.of(method, name, epoch) for epoch in range(1, self.epochs + 1)]
            ).mean(0)
            for name in ("share", "share_opposing")
        )
        return dict(
            zip(RULES, (magnitude, opposing, 100 - (magnitude - opposing)))
        )  # signed: all but those far below

    def accuracy(self, method: Method) -> Tensor:
        return self.of(method, "test_accuracy")

    def difference(self, a: str, b: str, smoothing: float, temperature: float) -> Tensor:
        """In test accuracy, within a seed, in points."""
        one, other = (
            Method(loss) if loss == "CE" else Method(loss, smoothing, temperature)
            for loss in (a, b)
        )
        return self.accuracy(one) - self.accuracy(other)


def print_table(
    names: Iterable[str], rows: dict[tuple[float, float], Iterable[Tensor]], sign: str = ""
) -> None:
    """Rows by temperature and smoothing."""
    print(f"{'T':>2}{'smoothing':>11}" + "".join(f"{name:>18}" for name in names))
    for (T, smoothing), values in rows.items():
        print(f"{T:2g}{smoothing:11g}" + "".join(f"{show(value, 2, sign):>18}" for value in values))


def print_report(results: Results, options: Row) -> None:
    smoothings, temperatures = options["smoothings"], options["temperatures"]
    settings = list(product(temperatures, smoothings))
    print(f"\n{results.seeds} seeds: mean +- half a 95 % confidence interval (Student's t)\n")
    for smoothing in smoothings:
        tested = results.of(
            Method("teacher", smoothing), "test_accuracy", options["teacher_epochs"]
        )
        print(f"teacher, label smoothing {smoothing:g}: accuracy {show(tested)} %")
    print(f"CE: accuracy {show(results.accuracy(Method('CE')))} %")

    print("\nTest accuracy in %\n")
    print(f"{'T':>2}{'smoothing':>11}" + "".join(f"{loss:>16}" for loss in LOSSES))
    for T, smoothing in settings:
        cells = [results.accuracy(Method(loss, smoothing, T)) for loss in LOSSES]
        print(f"{T:2g}{smoothing:11g}" + "".join(f"{show(cell):>16}" for cell in cells))

    print("\nDifferences in test accuracy within a seed, in points\n")
    rows = {
        (T, smoothing): [results.difference(*pair, smoothing, T) for pair in PAIRS]
        for T, smoothing in settings
    }
    print_table(map(" - ".join, PAIRS), rows, "+")

    print("\nRegularization samples of KD by three rules, in % of the images of all epochs\n")
    shares = {
        (T, smoothing): results.shares(Method("KD", smoothing, T)) for T, smoothing in settings
    }
    print_table(RULES, {setting: found.values() for setting, found in shares.items()})

    if len(smoothings) > 1:
        print(
            f"\nKD within a seed, against smoothing {smoothings[0]:g}: these shares and test accuracy, in points\n"
        )
        rows = {}
        for T, smoothing in product(temperatures, smoothings[1:]):
            changes = [
                shares[T, smoothing][rule] - shares[T, smoothings[0]][rule] for rule in RULES
            ]
            tested = [results.accuracy(Method("KD", of, T)) for of in (smoothing, smoothings[0])]
            rows[T, smoothing] = [*changes, tested[0] - tested[1]]
        print_table((*RULES, "accuracy"), rows, "+")


def save_counts(path: Path, results: Results, options: Row) -> None:
    """Regularization samples by epoch, one panel a temperature; then accuracy against their share, one a rule."""
    smoothings, temperatures = options["smoothings"], options["temperatures"]
    shades = colormaps["viridis"](torch.linspace(0, 0.85, len(smoothings)).numpy())
    panels = len(temperatures) + len(RULES)
    figure = Figure(figsize=(3.6 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels)
    for axis, T in zip(axes, temperatures):
        for shade, smoothing in zip(shades, smoothings):
            epochs = range(1, results.epochs + 1)
            values = [
                100 * results.of(Method("KD", smoothing, T), "share", epoch) for epoch in epochs
            ]
            means, halves = zip(*map(confidence_interval, values))
            axis.errorbar(epochs, means, halves, color=shade, capsize=2, label=f"{smoothing:g}")
        axis.set_title(f"KD, T = {T:g}", fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.sharey(axes[0])
    axes[0].set_ylabel("regularization samples (% of images)")
    axes[0].legend(title="label smoothing\nof the teacher", fontsize=8, title_fontsize=8)

    for axis, rule in zip(axes[-len(RULES) :], RULES):
        for marker, T in zip("os^Dv<>p*hX", temperatures):
            for shade, smoothing in zip(shades, smoothings):
                method = Method("KD", smoothing, T)
                values = results.shares(method)[rule], results.accuracy(method)
                (x, dx), (y, dy) = map(confidence_interval, values)
                axis.errorbar(x, y, dy, dx, color=shade, marker=marker, capsize=2)
            axis.plot([], [], marker, color="black", label=f"T = {T:g}")
        axis.set_title(f"KD, by the rule {rule}", fontsize=10)
        axis.set_xlabel("regularization samples (% of images)")
        axis.set_ylabel("test accuracy (%)")
    axes[-1].legend(fontsize=8)
    finish(figure, path, results, options)


def save_losses(path: Path, results: Results, options: Row) -> None:
    """What a loss gains over KD, one panel a teacher."""
    smoothings, temperatures = options["smoothings"], options["temperatures"]
    figure = Figure(figsize=(3.8 * len(smoothings), 3.8), layout="constrained")
    axes = figure.subplots(1, len(smoothings), sharey=True, squeeze=False)
    for axis, smoothing in zip(axes[0], smoothings):
        for i, loss in enumerate(LOSSES[1:]):
            values = [results.difference(loss, "KD", smoothing, T) for T in temperatures]
            means, halves = zip(*map(confidence_interval, values))
            places = [place + 0.15 * (i - 1) for place in range(len(temperatures))]
            axis.errorbar(places, means, halves, fmt="o", color=COLORS[loss], capsize=3, label=loss)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(temperatures)), [f"{T:g}" for T in temperatures])
        axis.set_xlim(-0.5, len(temperatures) - 0.5)
        axis.set_title(f"teacher with label smoothing {smoothing:g}", fontsize=10)
        axis.set_xlabel("temperature")
    axes[0, 0].set_ylabel("test accuracy above KD (points)")
    axes[0, 0].legend(fontsize=8)
    finish(figure, path, results, options)


def finish(figure: Figure, path: Path, results: Results, options: Row) -> None:
    figure.suptitle(
        f"{options['dataset']}: mean and 95 % interval over {results.seeds} seeds", fontsize=11
    )
    figure.savefig(path, dpi=120)


# The command line ---------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = study.make_parser(__doc__, epochs=20, out="runs/regularization_samples")
    option = parser.add_argument
    option(
        "--smoothings",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.2],
        help="of teachers (0 0.1 0.2)",
    )
    option("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="(1 2 4)")
    args = parser.parse_args()
    args.smoothings, args.temperatures = (
        sorted(set(args.smoothings)),
        sorted(set(args.temperatures)),
    )
    return args


def main() -> None:
    study.run(parse_args(), replicate, make_tables, report)


if __name__ == "__main__":
    main()
