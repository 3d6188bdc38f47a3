"""How many regularization samples there are, and whether dropping or weighting them helps.

    pip install "weighted-soft-labels[examples]"
    python regularization_samples.py

On a regularization sample, distillation acts more on the variance than on the bias (see
`weighted_soft_labels.analysis.regularization_samples`). The paper finds, at one temperature:

- Students do worse, the more of these samples there are.
- Teachers trained with label smoothing make more of them, and teach worse.
- Dropping all of them also hurts. Weighting every sample (WSL) beats both.

For every seed, teachers are trained with several label smoothings. From each teacher, at several
temperatures T, students are trained with

    KD        CE + alpha * T^2 * KL(teacher || student), Hinton et al. 2015: every sample has
              weight 1
    dropped   KD without the soft term of the regularization samples of each step
    WSL       CE + alpha * T^2 * weight * soft cross-entropy, `weighted_soft_labels.wsl_loss`
    uniform   WSL, but every sample gets the batch's mean weight: as much soft label in total. WSL's
              gain over uniform comes from telling samples apart

and one student with cross-entropy alone (CE). Regularization samples are counted at every training
step, on the logits of that step. We could not verify which rule the paper uses, so there are three:

    opposing   the soft term lowers the label's logit
    magnitude  opposing, or far below: the soft term raises the label's logit by more than twice
               what the hard term does
    signed     every sample that is not far below; at T = 1 no sample is far below

All students of a seed start alike and see the same images in the same order.

The folder --out gets regularization_samples.csv (a row for every seed, label smoothing, T, loss and
epoch; test accuracy and NLL for the last epoch), options and hardware in
regularization_samples.json, and two figures. STUDY.md has the results on Fashion-MNIST.
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
    smoothing: float | None = None  # of the teacher's labels
    temperature: float | None = None


# --- the loss without regularization samples ---


def make_student_loss(method: Method, alpha: float) -> study.Loss:
    T = method.temperature

    def dropped(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        kept = ~regularization_samples(student_logits, teacher_logits, labels, temperature=T)
        probabilities = (teacher_logits / T).softmax(1)
        soft = F.cross_entropy(student_logits / T, probabilities, reduction="none")
        return F.cross_entropy(student_logits, labels) + alpha * T**2 * (kept * soft).mean()

    return dropped if method.loss == "dropped" else study.make_loss(method.loss, T, alpha)


# --- one seed ---


def methods(args: argparse.Namespace) -> list[Method]:
    cases = product(LOSSES, args.smoothings, args.temperatures)
    return [Method("CE"), *(Method(loss, smoothing, T) for loss, smoothing, T in cases)]


def replicate(args: argparse.Namespace, seed: int) -> list[Row]:
    task = study.load_task(args.dataset, args.data, args.device)
    torch.manual_seed(seed)
    drawn = study.draw(task, args.train_images)
    first = study.make_network(task, study.STUDENT_WIDTH)
    trained = study.train_teachers(task, drawn, args.teacher_epochs, args.smoothings)
    teachers = dict(zip(args.smoothings, trained))
    steps = args.epochs * study.steps_per_epoch(len(drawn))
    students = {}
    for method in methods(args):
        loss, teacher = make_student_loss(method, args.alpha), teachers.get(method.smoothing)
        students[method] = study.Learner(copy.deepcopy(first), loss, steps, teacher)

    rows = [
        make_row(seed, Method("teacher", smoothing), args.teacher_epochs, evaluate(task, teacher))
        for smoothing, teacher in teachers.items()
    ]
    for epoch in range(1, args.epochs + 1):
        logits = study.train_epoch(task, drawn, list(students.values()))
        for (method, student), student_logits in zip(students.items(), logits.student_logits):
            counts, tested = {}, {}
            if student.teacher is not None:
                counts = count(logits, student_logits, student.teacher, method.temperature)
            if epoch == args.epochs:
                tested = evaluate(task, student.network)
            rows.append(make_row(seed, method, epoch, counts, tested))
    return rows


def count(
    logits: study.Epoch, student_logits: Tensor, teacher: nn.Module, temperature: float
) -> Row:
    inputs = student_logits, logits.teacher_logits[teacher], logits.labels
    magnitude, opposing = (
        regularization_samples(*inputs, temperature=temperature, rule=rule) for rule in RULES[:2]
    )
    return {
        "regularization_samples": int(magnitude.sum()),
        "share": magnitude.float().mean().item(),
        "share_opposing": opposing.float().mean().item(),
        "weight": wsl_terms(*inputs).weight.mean().item(),
    }


def evaluate(task: Task, network: nn.Module) -> Row:
    logits = study.predict(task, network)
    nll = F.cross_entropy(logits, task.test_labels).item()
    return {"test_accuracy": study.accuracy(logits, task.test_labels), "test_nll": nll}


def make_row(seed: int, method: Method, epoch: int, *measured: Row) -> Row:
    """Return a row in which the columns without a measured value are None."""
    row = {"seed": seed, **method._asdict(), "epoch": epoch, **dict.fromkeys(COLUMNS)}
    for values in measured:
        row |= values
    return row


def make_tables(results: list[list[Row]]) -> dict[str, list[Row]]:
    return {"regularization_samples": [row for rows in results for row in rows]}


# --- the report, from the table alone ---


def report(out: Path, options: Row) -> None:
    results = Results(study.read_table(out / "regularization_samples.csv"), options["epochs"])
    print_report(results, options)
    counts, losses = (out / f"regularization_samples{suffix}.png" for suffix in ("", "_losses"))
    save_counts(counts, results, options)
    save_losses(losses, results, options)
    print(f"\nFigures: {counts} and {losses}")


class Results(NamedTuple):
    """The table; every method returns one value per seed, in the order of the seeds."""

    rows: list[Row]
    epochs: int

    @property
    def seeds(self) -> int:
        return study.count_seeds(self.rows)

    def of(self, method: Method, name: str, epoch: int | None = None) -> Tensor:
        """Return a column after `epoch` (default: the last)."""
        return column(self.rows, name, epoch=epoch or self.epochs, **method._asdict())

    def shares(self, method: Method) -> dict[str, Tensor]:
        """Return the regularization samples by rule, in % of the images of all epochs."""
        epochs = range(1, self.epochs + 1)
        magnitude, opposing = (
            100 * torch.stack([self.of(method, name, epoch) for epoch in epochs]).mean(0)
            for name in ("share", "share_opposing")
        )
        return dict(zip(RULES, (magnitude, opposing, 100 - (magnitude - opposing))))

    def accuracy(self, method: Method) -> Tensor:
        return self.of(method, "test_accuracy")

    def difference(self, a: str, b: str, smoothing: float, temperature: float) -> Tensor:
        """Return loss a - loss b in test accuracy, in points."""
        accuracy_a, accuracy_b = (
            self.accuracy(Method("CE") if loss == "CE" else Method(loss, smoothing, temperature))
            for loss in (a, b)
        )
        return accuracy_a - accuracy_b


def print_table(
    names: Iterable[str], rows: dict[tuple[float, float], Iterable[Tensor]], sign: str = ""
) -> None:
    """Print one row per temperature and smoothing."""
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
    print_table(RULES, {setting: by_rule.values() for setting, by_rule in shares.items()})

    if len(smoothings) > 1:
        base = smoothings[0]
        print(
            f"\nKD within a seed, against smoothing {base:g}: "
            "these shares and test accuracy, in points\n"
        )
        rows = {}
        for T, smoothing in product(temperatures, smoothings[1:]):
            changes = [shares[T, smoothing][rule] - shares[T, base][rule] for rule in RULES]
            accuracy = results.accuracy(Method("KD", smoothing, T))
            rows[T, smoothing] = [*changes, accuracy - results.accuracy(Method("KD", base, T))]
        print_table((*RULES, "accuracy"), rows, "+")


def save_counts(path: Path, results: Results, options: Row) -> None:
    """Draw one panel per temperature, the share of regularization samples by epoch.

    Then one panel per rule, accuracy by share.
    """
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
    """Draw one panel per teacher, the gain of each loss over KD."""
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


# --- command line ---


def parse_args() -> argparse.Namespace:
    parser = study.make_parser(__doc__, epochs=20, out="runs/regularization_samples")
    smoothings, temperatures = [0.0, 0.1, 0.2], [1.0, 2.0, 4.0]
    add = parser.add_argument
    add("--smoothings", type=float, nargs="+", default=smoothings, help="of teachers (0 0.1 0.2)")
    add("--temperatures", type=float, nargs="+", default=temperatures, help="(1 2 4)")
    args = parser.parse_args()
    args.smoothings = sorted(set(args.smoothings))
    args.temperatures = sorted(set(args.temperatures))
    return args


def main() -> None:
    study.run(parse_args(), replicate, make_tables, report)


if __name__ == "__main__":
    main()
