"""When does WSL pay for language models? Students of stored teachers, wrong in several ways.

    pip install "weighted-soft-labels[frameworks]"
    python language_models.py

Students and teachers are small Llamas. The student's text is the source of Python's standard
library, split by file into training and held-out text. The result is the number of bits per byte of
the held-out text. Lower is better. For every seed, students train at T = 1 and alpha = 1 by

    CE        cross-entropy with the tokens alone
    KD        hard_weight * CE + alpha * soft cross-entropy: every token has weight 1
    WSL       hard_weight * CE + alpha * weight * soft cross-entropy, `cached_wsl_loss`
    uniform   KD, but every token gets the batch's mean WSL weight: separates the weighting from
              less soft label
    masked    KD, but the soft term is 0 for tokens that are not the teacher's likeliest class
    balanced  WSL, but the weights of a batch are divided by their mean

The teacher runs once. For every token, the 64 likeliest of 512 classes are stored. The others count
as one class. The teacher is

    good          larger than the student, trained on seven times as much text, in other rows
    weak          the same model after 160 steps instead of 900
    other text    the same model trained on Python's documentation (`pydoc_data.topics`)

and the good teacher's logits are wrong before they are stored:

    exchanged     5, 20 or 50 % of the sequences have the logits of another sequence
    shifted       in 20 % of the sequences, every logit row stands one token too late

hard_weight is 0.5. KD, WSL and balanced also train at 0 and 1, from the good teacher as it is and
with 20 % exchanged. KD and WSL also train from 8, 16 and all classes of the good teacher.

A seed decides the first weights, the batches, the rows of student and teacher, and which sequences
have wrong logits. The tokenizer and the held-out text are the same for all seeds. All students of a
seed start alike and see the same batches. A seed trains 54 students and three teachers, which takes
about 12 minutes of one core.

The folder --out gets language_models.csv (a row for every seed, setting and loss), its means and
95 % intervals in language_models_summary.csv, options and hardware in language_models.json, and a
figure. The table is complete after every seed. The same command continues a run that was killed.
With more --seeds, it adds them.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import study
import torch
import torch.nn.functional as F
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import COLORS, Row, column, confidence_interval
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from weighted_soft_labels.cached import CachedTeacher, cached_wsl_loss, compress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import language_model as lm

METHODS = ("CE", "KD", "WSL", "uniform", "masked", "balanced")
DIFFERENCES = (
    ("KD", "CE"),
    ("WSL", "CE"),
    ("WSL", "KD"),
    ("masked", "KD"),
    ("balanced", "KD"),
    ("WSL", "masked"),
    ("balanced", "WSL"),
    ("WSL", "uniform"),
)
HARD_WEIGHT = 0.5
KEPT = 64  # classes of a token
HELD_OUT = 24  # files
GAINS = tuple((method, "CE") for method in METHODS[1:])
RARE = 0.05  # the rarest classes that together are this share of the student's tokens
# Kinds of tokens. The first four share out all tokens; the others overlap with them.
KINDS = ("first", "space", "rare", "other", "right", "wrong", "misaligned")

MEASURED = ("teacher_bits", "teacher_right", "outside", "weight", *(f"weight_{x}" for x in KINDS))

Loss = Callable[[Tensor, CachedTeacher, Tensor], Tensor]


class Setting(NamedTuple):
    """How students differ apart from their loss. For CE, nothing is set."""

    teacher: str | None = None  # good, weak or other text
    mistakes: str | None = None  # none, exchanged or shifted
    share: float | None = None  # of the sequences with such mistakes
    hard_weight: float | None = None
    k: int | None = None  # classes that are stored for a token


def settings(args: argparse.Namespace) -> dict[Setting, tuple[str, ...]]:
    """Return the settings with their losses. Settings of one teacher follow one another."""
    good = Setting("good", "none", 0.0, HARD_WEIGHT, KEPT)
    exchanged = good._replace(mistakes="exchanged", share=0.2)
    soft = METHODS[1:]
    chosen = {
        good: soft,
        exchanged._replace(share=0.05): soft,
        exchanged: soft,
        exchanged._replace(share=0.5): soft,
        exchanged._replace(mistakes="shifted"): soft,
    }
    for setting in (good, exchanged):
        for hard_weight in (0.0, 1.0):
            chosen[setting._replace(hard_weight=hard_weight)] = ("KD", "WSL", "balanced")
    for k in (8, 16, args.vocabulary):
        chosen[good._replace(k=k)] = ("KD", "WSL")
    chosen[good._replace(teacher="weak")] = soft
    chosen[good._replace(teacher="other text")] = soft
    return chosen


# --- text ---


class Text(NamedTuple):
    """Token ids. A row of n tokens predicts n - 1. All rows of `library` and `other` are full."""

    tokenizer: PreTrainedTokenizerBase
    library: Tensor  # (rows, length + 1), training text
    other: Tensor  # (rows, length + 1), documentation
    held_out: list[dict[str, Any]]  # batches
    bytes: int  # of the held-out text


@cache
def load_text(vocabulary: int, length: int, characters: int) -> Text:
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = lm.read(sorted(folder.glob("*.py")))
    held_out = [text[:characters] for text in documents[:HELD_OUT]]
    documents = documents[HELD_OUT:]
    tokenizer = lm.train_tokenizer(documents, vocabulary)
    rows = list(lm.windows(held_out, tokenizer, length))
    batches = [lm.collate(rows[i : i + 32]) for i in range(0, len(rows), 32)]
    return Text(
        tokenizer,
        full_rows(documents, tokenizer, length),
        full_rows(list(topics.values()), tokenizer, length),
        batches,
        sum(len(text.encode()) for text in held_out),
    )


def full_rows(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    rows = lm.windows(documents, tokenizer, length)[:]["input_ids"]
    return torch.tensor([row for row in rows if len(row) == length + 1])


def check_text(args: argparse.Namespace) -> None:
    rows = len(load_text(args.vocabulary, args.length, args.characters).library)
    most = rows - args.batch_size  # the teacher trains on the other rows
    if not args.batch_size <= args.rows <= most:
        raise ValueError(f"--rows must be in [--batch-size, {most}], got {args.rows}")


def kinds_of(rows: Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return the four kinds that share out the labels: one mask of the labels for each."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    of_word = [[c.isalnum() or c == "_" for c in text] for text in texts]
    blank = torch.tensor([text.isspace() for text in texts])
    begins = torch.tensor([any(word) for word in of_word])
    ends = torch.tensor([bool(word) and word[-1] for word in of_word])
    spaced = torch.tensor([text[:1].isspace() for text in texts])
    labels = rows[:, 1:]
    counts = labels.flatten().bincount(minlength=len(texts))
    order = counts.argsort()
    uncommon = torch.zeros_like(blank)
    uncommon[order] = counts[order].cumsum(0) <= RARE * counts.sum()

    space = blank[labels]
    rare = uncommon[labels] & ~space
    first = begins[labels] & (spaced[labels] | ~ends[rows[:, :-1]]) & ~space & ~rare
    return {"first": first, "space": space, "rare": rare, "other": ~(first | space | rare)}


# --- mistakes: those of a share include those of every smaller share, for the same seed ---


def make_mistakes(logits: Tensor, mistakes: str, share: float) -> Tensor:
    """Return the logits, wrong in the first rows. Rows are in random order, so these are too."""
    wrong = round(share * len(logits))
    rolled = logits[:wrong].roll(1, 0 if mistakes == "exchanged" else 1)
    return torch.cat((rolled, logits[wrong:]))


# --- losses, at T = 1 ---


def weights(logits: Tensor, cached: CachedTeacher, target: Tensor) -> Tensor:
    """Return the WSL weight of every token: 1 - exp(-CE_s / CE_t)."""
    logits = logits.detach().flatten(0, 1)
    student_ce = F.cross_entropy(logits, target.flatten(), reduction="none").view_as(target)
    return -torch.expm1(-student_ce / (1e-7 - cached.label_log_prob))


def likeliest(cached: CachedTeacher) -> Tensor:
    """Return whether the label, column 0, is the teacher's likeliest class."""
    return cached.log_prob[..., 0] == cached.log_prob.amax(-1)


def make_loss(name: str, alpha: float, hard_weight: float) -> Loss:
    scales = {"alpha": alpha, "hard_weight": hard_weight}

    def ce(logits: Tensor, cached: CachedTeacher, target: Tensor) -> Tensor:
        return lm.ce_loss(logits, target) / target.numel()

    def kd(logits: Tensor, cached: CachedTeacher, target: Tensor) -> Tensor:
        return lm.kd_loss(logits, cached, target, alpha, hard_weight) / target.numel()

    def wsl(logits: Tensor, cached: CachedTeacher, target: Tensor) -> Tensor:
        return cached_wsl_loss(logits, cached, target, temperature=1.0, **scales)

    def uniform(logits: Tensor, cached: CachedTeacher, target: Tensor) -> Tensor:
        weight = weights(logits, cached, target).mean()
        soft = lm.soft_loss(logits, cached).mean()
        return hard_weight * ce(logits, cached, target) + alpha * weight * soft

    def masked(logits: Tensor, cached: CachedTeacher, target: Tensor) -> Tensor:
        soft = (likeliest(cached) * lm.soft_loss(logits, cached)).mean()
        return hard_weight * ce(logits, cached, target) + alpha * soft

    def balanced(logits: Tensor, cached: CachedTeacher, target: Tensor) -> Tensor:
        return cached_wsl_loss(logits, cached, target, temperature=1.0, balance=True, **scales)

    losses = {
        "CE": ce,
        "KD": kd,
        "WSL": wsl,
        "uniform": uniform,
        "masked": masked,
        "balanced": balanced,
    }
    return losses[name]


# --- one seed ---


def train(
    args: argparse.Namespace,
    model: nn.Module,
    rows: Tensor,
    steps: int,
    loss: Loss,
    seed: int,
    cached: CachedTeacher | None = None,
) -> Tensor | None:
    """Return the mean over the training of every token's WSL weight, None without a teacher.

    The weight is computed for every loss, whether or not the loss uses it.
    """
    optimizer = lm.make_optimizer(model)
    total = torch.zeros(rows[:, 1:].shape)
    count = torch.zeros(len(rows), 1)
    part = None
    for step, batch in enumerate(lm.draw_order(len(rows), steps, args.batch_size, seed)):
        logits, target = predict(args, model, rows[batch]), rows[batch, 1:]
        if cached is not None:
            part = CachedTeacher(*(x[batch] for x in cached))
            total[batch] += weights(logits, part, target)
            count[batch] += 1
        loss(logits, part, target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lm.schedule((step + 1) / steps)
        optimizer.step()
        optimizer.zero_grad()
    return None if cached is None else total / count


def predict(args: argparse.Namespace, model: nn.Module, rows: Tensor) -> Tensor:
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    return lm.predict(model, batch, args.vocabulary)


@torch.inference_mode()
def bits_per_byte(args: argparse.Namespace, model: nn.Module, text: Text) -> float:
    nats = 0.0
    for batch in text.held_out:
        logits = lm.predict(model, batch, args.vocabulary)
        nats += lm.ce_loss(logits, batch["target"]).item()
    return nats / math.log(2) / text.bytes


class Split(NamedTuple):
    """Rows of the training text, in random order."""

    student: Tensor
    teacher: Tensor


class Teacher(NamedTuple):
    logits: Tensor  # of the student's rows, (rows, length, vocabulary)
    bits: float  # per byte of the held-out text


def make_teacher(
    args: argparse.Namespace, name: str, text: Text, split: Split, seed: int
) -> Teacher:
    torch.manual_seed(seed)
    model = lm.small_llama(args.vocabulary, width=128, layers=3)
    steps = args.weak_steps if name == "weak" else args.teacher_steps
    rows = text.other if name == "other text" else split.teacher
    train(args, model, rows, steps, make_loss("CE", 0.0, 1.0), seed)
    with torch.inference_mode():
        logits = torch.cat([predict(args, model, part) for part in split.student.split(32)])
    return Teacher(logits, bits_per_byte(args, model, text))


def replicate(args: argparse.Namespace, seed: int) -> list[Row]:
    text = load_text(args.vocabulary, args.length, args.characters)
    order = torch.randperm(len(text.library), generator=torch.Generator().manual_seed(seed))
    split = Split(text.library[order[: args.rows]], text.library[order[args.rows :]])
    row, _ = make_student(args, seed, text, split.student, "CE", Setting(), None)
    results = [row | dict.fromkeys(MEASURED)]
    teachers: dict[str, Teacher] = {}
    for setting, methods in settings(args).items():
        if setting.teacher not in teachers:  # one at a time, as the logits take 270 MB
            teachers = {setting.teacher: make_teacher(args, setting.teacher, text, split, seed)}
        teacher = teachers[setting.teacher]
        results += distill(args, seed, text, split.student, setting, methods, teacher)
    return results


def distill(
    args: argparse.Namespace,
    seed: int,
    text: Text,
    rows: Tensor,
    setting: Setting,
    methods: Sequence[str],
    teacher: Teacher,
) -> list[Row]:
    logits = make_mistakes(teacher.logits, setting.mistakes, setting.share)
    cached = compress(logits, rows[:, 1:], setting.k, temperature=1.0)
    right = likeliest(cached)
    masks = kinds_of(rows, text.tokenizer) | {"right": right, "wrong": ~right}
    if setting.share:
        masks["misaligned"] = (logits != teacher.logits).any(-1)
    measured = dict.fromkeys(MEASURED) | {
        "teacher_bits": teacher.bits,
        "teacher_right": right.float().mean().item(),
        "outside": cached.log_rest.exp().mean().item(),
    }
    results = []
    for method in methods:
        row, weight = make_student(args, seed, text, rows, method, setting, cached)
        means = {f"weight_{name}": weight[mask].nanmean().item() for name, mask in masks.items()}
        results.append(row | measured | {"weight": weight.nanmean().item()} | means)
    return results


def make_student(
    args: argparse.Namespace,
    seed: int,
    text: Text,
    rows: Tensor,
    method: str,
    setting: Setting,
    cached: CachedTeacher | None,
) -> tuple[Row, Tensor | None]:
    torch.manual_seed(seed)
    model = lm.small_llama(args.vocabulary, width=64, layers=2)
    loss = make_loss(method, args.alpha, setting.hard_weight)
    weight = train(args, model, rows, args.steps, loss, seed, cached)
    bits = bits_per_byte(args, model, text)
    return {"seed": seed, **setting._asdict(), "method": method, "bits": bits}, weight


def make_tables(results: list[list[Row]]) -> dict[str, list[Row]]:
    return {"language_models": [row for rows in results for row in rows]}


def restore(out: Path) -> dict[int, list[Row]]:
    results: dict[int, list[Row]] = {}
    for row in study.read_table(out / "language_models.csv"):
        results.setdefault(int(row["seed"]), []).append(row)
    return results


# --- the report, from the table alone ---


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Return one row per setting, with mean and half the 95 % interval of every value.

    The values are bits per byte, their differences within a seed, what more classes than k save,
    and means over the training of the WSL student. A value is None if the setting lacks the loss.
    """
    summary = []
    most = max(row["k"] for row in rows if row["method"] != "CE")
    for setting in dict.fromkeys(setting_of(row) for row in rows if row["method"] != "CE"):
        bits = bits_by_method(rows, setting)
        values = {method: bits.get(method) for method in METHODS}
        for a, b in dict.fromkeys((*DIFFERENCES, *GAINS)):
            both = a in bits and b in bits
            values[f"{a} - {b}"] = bits[a] - bits[b] if both else None
        every = bits_by_method(rows, setting._replace(k=most))
        for method in ("KD", "WSL"):
            both = method in every and setting.k != most
            values[f"{method} - all"] = bits[method] - every[method] if both else None
        for name in MEASURED:
            value = column(rows, name, method="WSL", **setting._asdict())
            values[name] = None if value.isnan().any() else value
        summary.append({**setting._asdict(), "seeds": study.count_seeds(rows)})
        for name, value in values.items():
            interval = (None, None) if value is None else confidence_interval(value)
            summary[-1][name], summary[-1][f"{name} half"] = interval
    return summary


def setting_of(row: Row) -> Setting:
    return Setting(*(row[name] for name in Setting._fields))


def bits_by_method(rows: Sequence[Row], setting: Setting) -> dict[str, Tensor]:
    """Return one value per seed for every loss of the setting, and for CE."""
    present = {row["method"] for row in rows if setting_of(row) == setting}
    bits = {
        method: column(rows, "bits", method=method, **setting._asdict())
        for method in METHODS
        if method in present
    }
    return {"CE": column(rows, "bits", method="CE"), **bits}


def name_of(row: Row, classes: int) -> str:
    name = row["teacher"]
    if row["share"]:
        name += f", {100 * row['share']:.0f} % {row['mistakes']}"
    if row["hard_weight"] != HARD_WEIGHT:
        name += f", hard_weight {row['hard_weight']:g}"
    if row["k"] == classes:
        name += ", all classes"
    elif row["k"] != KEPT:
        name += f", k = {row['k']:g}"
    return name


def print_table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for cells in lines:
        print("| " + " | ".join(cells) + " |")


def show(row: Row, name: str, digits: int = 3) -> str:
    return "" if row[name] is None else f"{row[name]:.{digits}f}"


def show_interval(row: Row, name: str) -> str:
    return "" if row[name] is None else f"{row[name]:+.3f} +- {row[f'{name} half']:.3f}"


def print_report(summary: Sequence[Row], classes: int) -> None:
    names = [name_of(row, classes) for row in summary]
    print(f"\n{summary[0]['seeds']} seeds: mean +- half a 95 % confidence interval (Student's t)")

    print("\nBits per byte of held-out text; right: the teacher's likeliest class is the label\n")
    columns = ("teacher", "teacher's bits", "right, %", *METHODS)
    lines = []
    for name, row in zip(names, summary):
        cells = [name, show(row, "teacher_bits"), f"{100 * row['teacher_right']:.1f}"]
        lines.append(cells + [show(row, method) for method in METHODS])
    print_table(columns, lines)

    print("\nDifferences within a seed, bits per byte; below 0, the first loss is better\n")
    differences = [" - ".join(pair) for pair in DIFFERENCES]
    lines = [
        [name] + [show_interval(row, difference) for difference in differences]
        for name, row in zip(names, summary)
    ]
    print_table(("teacher", *differences), lines)

    print(
        "\nWeights, means over the training by WSL: all tokens; first tokens of words, whitespace, "
        f"the rarest\n{100 * RARE:.0f} %, all others; by whether the teacher is right; sequences "
        "with wrong logits\n"
    )
    weights = ("weight", *(f"weight_{kind}" for kind in KINDS))
    lines = [
        [name] + [show(row, weight, 2) for weight in weights] for name, row in zip(names, summary)
    ]
    print_table(("teacher", "all tokens", *KINDS), lines)

    print("\nStored classes: the teacher's mass outside, and bits per byte lost to all classes\n")
    lines = []
    for row in sorted(stored_classes(summary), key=lambda row: row["k"]):
        cells = [f"{row['k']:.0f}", f"{100 * row['outside']:.1f}"]
        lines.append(cells + [show_interval(row, name) for name in ("KD - all", "WSL - all")])
    print_table(("k", "outside, %", "KD", "WSL"), lines)


def stored_classes(summary: Sequence[Row]) -> list[Row]:
    """Return the rows of the good teacher that differ in k alone."""
    return [
        row
        for row in summary
        if row["teacher"] == "good" and not row["share"] and row["hard_weight"] == HARD_WEIGHT
    ]


def plot_lines(axes: Axes, rows: Sequence[Row], x: str, methods: Sequence[str], style: str) -> None:
    rows = sorted(rows, key=lambda row: row[x])
    places = [row[x] for row in rows]
    for method in methods:
        means, halves = zip(*((row[method], row[f"{method} half"]) for row in rows))
        marks = {"fmt": style, "markersize": 4, "capsize": 3, "color": COLORS[method]}
        axes.errorbar(places, means, halves, label=method, **marks)
    axes.set_ylabel("bits per byte of held-out text")


def plot_gains(axes: Axes, rows: Sequence[Row], classes: int) -> None:
    for i, method in enumerate(METHODS[1:]):
        places = [-place - 0.15 * (i - 2) for place in range(len(rows))]
        means = [-row[f"{method} - CE"] for row in rows]
        halves = [row[f"{method} - CE half"] for row in rows]
        style = {"fmt": "o", "markersize": 4, "capsize": 2, "color": COLORS[method]}
        axes.errorbar(means, places, xerr=halves, label=method, **style)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(rows))], [name_of(r, classes) for r in rows])
    axes.set_xlabel("bits per byte below CE (right is better)")


def save_figure(path: Path, summary: Sequence[Row], classes: int) -> None:
    base = [row for row in summary if row["hard_weight"] == HARD_WEIGHT and row["k"] == KEPT]
    figure = Figure(figsize=(12, 8), layout="constrained")
    teachers, exchanged, hard, kept = figure.subplots(2, 2).flat
    plot_gains(teachers, base, classes)
    teachers.legend(fontsize=8)

    rows = [row for row in base if row["teacher"] == "good" and row["mistakes"] != "shifted"]
    plot_lines(exchanged, rows, "share", METHODS, "o-")
    exchanged.set_xlabel("share of the sequences with another sequence's logits")
    exchanged.legend(fontsize=8)

    rows = [row for row in summary if row["teacher"] == "good" and row["k"] == KEPT]
    for share, style in ((0.0, "o-"), (0.2, "s--")):
        of_share = [row for row in rows if row["share"] == share and row["mistakes"] != "shifted"]
        plot_lines(hard, of_share, "hard_weight", ("KD", "WSL", "balanced"), style)
    hard.set_xlabel("hard_weight (solid: good teacher, dashed: 20 % exchanged)")

    plot_lines(kept, stored_classes(summary), "k", ("KD", "WSL"), "o-")
    kept.set_xscale("log", base=2)
    kept.set_xlabel("classes that are stored for a token")
    interval = f"mean and 95 % interval over {summary[0]['seeds']} seeds"
    figure.suptitle(f"Language models: {interval}", fontsize=11)
    figure.savefig(path, dpi=120)


def report(out: Path, options: Row) -> None:
    summary = summarize(study.read_table(out / "language_models.csv"))
    study.write_table(out / "language_models_summary.csv", summary)
    print_report(summary, options["vocabulary"])
    save_figure(out / "language_models.png", summary, options["vocabulary"])
    print(f"\nFigure: {out / 'language_models.png'}")


# --- command line ---


def main() -> None:
    parser = study.make_short_parser(__doc__, seeds=6, out="runs/language_models")
    add = parser.add_argument
    add("--steps", type=int, default=256, help="of a student (256)")
    add("--teacher-steps", type=int, default=900, help="of the other teachers (900)")
    add("--weak-steps", type=int, default=160, help="of the weak teacher (160)")
    add("--rows", type=int, default=1024, help="of text for the students (1024)")
    add("--length", type=int, default=128, help="tokens that a row predicts (128)")
    add("--batch-size", type=int, default=8, help="rows (8)")
    add("--vocabulary", type=int, default=512, help="classes (512)")
    # A limit, so that no file dominates the result.
    add("--characters", type=int, default=10_000, help="of a held-out file (10 000)")
    add("--alpha", type=float, default=1.0, help="scale of the soft term (1)")
    add("--lr", type=float, default=8e-3, help="largest learning rate (0.008)")
    # Results depend on both, so a run does not continue with others. The text is Python's own.
    versions = {"transformers": transformers.__version__, "python": platform.python_version()}
    parser.set_defaults(device=torch.device("cpu"), **versions)
    study.run(parser.parse_args(), replicate, make_tables, report, restore, check_text)


if __name__ == "__main__":
    main()
