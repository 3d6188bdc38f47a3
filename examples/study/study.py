"""What the scripts of this folder share: data, networks, losses, training, seeds, result tables.

A seed decides everything in a replicate: the training images, the teachers, the first weights of
the students, the order of the images and their augmentation. Students with different losses differ
in nothing else, so their differences are computed within a seed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import io
import json
import math
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor, nn
from tqdm import tqdm

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms

BATCH = 100
EVALUATION_BATCH = 500
LR = 0.01
STUDENT_WIDTH = 8
TEACHER_WIDTH = 24
COLORS = {
    "CE": "#6b6b6b",
    "KD": "#0072b2",
    "WSL": "#d55e00",
    "dropped": "#009e73",
    "uniform": "#cc79a7",
    "masked": "#56b4e9",
    "balanced": "#e69f00",
}
# torchvision's name; mean and standard deviation of the training set by channel, pixels in [0, 1]
DATASETS = {
    "cifar100": ("CIFAR100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion-mnist": ("FashionMNIST", (0.2860,), (0.3530,)),
}

Result = TypeVar("Result")
Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (student_logits, teacher_logits, labels)


# --- data ---


class Task(NamedTuple):
    """Images (N, channels, size, size), float32, and labels (N,), on the device.

    `augment` maps a batch of images to a batch of images.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augment: Callable[[Tensor], Tensor]


@cache
def load_task(dataset: str, root: Path, device: torch.device) -> Task:
    if dataset == "digits":
        tensors, augment = load_digits(), distort
    else:
        train, test = (load_split(dataset, root, train) for train in (True, False))
        tensors, augment = train + test, shift_and_flip
    return Task(*(x.to(device) for x in tensors), augment)


def load_digits() -> tuple[Tensor, ...]:
    """Return training and test split. Each of the 800 test images comes in ten distorted versions.

    The distortions are the same for every seed of the study.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    test, train = torch.randperm(len(images)).split([800, len(images) - 800])
    test = test.repeat(10)
    return images[train], labels[train], distort(images[test]), labels[test]


def load_split(dataset: str, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return normalised images, Fashion-MNIST's padded to 32 x 32, and labels.

    Reads Debian's files of Fashion-MNIST if `root` has them, else torchvision's, which are
    downloaded if necessary.
    """
    name, mean, std = DATASETS[dataset]
    prefix = "train" if train else "t10k"
    debian = [root / f"{prefix}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")]
    if dataset == "fashion-mnist" and debian[0].exists():
        contents = (bytearray(gzip.decompress(file.read_bytes())) for file in debian)
        images, labels = (torch.frombuffer(content, dtype=torch.uint8) for content in contents)
        images, labels = images[16:].view(-1, 28, 28), labels[8:].long()
    else:
        import torchvision  # slow to import, and not always needed

        split = getattr(torchvision.datasets, name)(root, train=train, download=True)
        images, labels = torch.as_tensor(split.data), torch.as_tensor(split.targets)
    if name == "FashionMNIST":
        images = F.pad(images, (2, 2, 2, 2)).unsqueeze(3)
    images = (images - 255 * torch.tensor(mean)) / (255 * torch.tensor(std))
    return images.permute(0, 3, 1, 2).contiguous(), labels


def shift(images: Tensor) -> Tensor:
    """Shift every image by up to one pixel in each direction."""
    n, _, height, width = images.shape
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n), :, torch.randint(3, (n,)), torch.randint(3, (n,))]


def distort(images: Tensor) -> Tensor:
    shifted = shift(images)
    return shifted + 0.2 * torch.randn_like(shifted)


def shift_and_flip(images: Tensor) -> Tensor:
    flip = torch.rand(len(images), 1, 1, 1).to(images.device) < 0.5
    images = shift(images)
    return torch.where(flip, images.flip(3), images)


def draw(task: Task, count: int | None) -> Tensor:
    """Return the indices of `count` training images (default: all) in random order."""
    available = len(task.train_labels)
    if count is not None and count > available:
        raise ValueError(f"--train-images {count}: there are {available}")
    return torch.randperm(available)[:count]


# --- networks, losses, training ---


def make_network(task: Task, width: int) -> nn.Module:
    """Return three convolutions down to 4 x 4 and a linear layer; 10,000 weights at width 8."""
    channels, size = task.train_images.shape[1:3]
    classes = int(task.train_labels.max()) + 1
    layers: list[nn.Module] = []
    for out in (width, 2 * width, 4 * width):
        stride = 2 if size > 4 else 1
        layers += [
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
        channels, size = out, -(-size // stride)
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, classes))
    return network.to(task.train_images.device, memory_format=torch.channels_last)


def make_loss(
    name: str, temperature: float | None = None, alpha: float = 0.0, label_smoothing: float = 0.0
) -> Loss:
    def ce(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
        return F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)

    def divergences(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the terms of KL(teacher || student), one per image and class."""
        student = F.log_softmax(student_logits / temperature, dim=1)
        teacher = F.log_softmax(teacher_logits / temperature, dim=1)
        return F.kl_div(student, teacher, reduction="none", log_target=True)

    def kd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        soft = divergences(student_logits, teacher_logits).sum() / len(labels)
        return F.cross_entropy(student_logits, labels) + alpha * temperature**2 * soft

    def masked(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """KD, but the soft term is 0 where the teacher's largest logit is not the label's."""
        right = teacher_logits.argmax(1) == labels
        soft = divergences(student_logits, teacher_logits)[right].sum() / len(labels)
        return F.cross_entropy(student_logits, labels) + alpha * temperature**2 * soft

    def wsl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return wsl_loss(
            student_logits, teacher_logits, labels, temperature=temperature, alpha=alpha
        )

    def uniform(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """WSL, but every sample gets the batch's mean weight."""
        weight = wsl_terms(student_logits, teacher_logits, labels).weight.mean()
        probabilities = (teacher_logits / temperature).softmax(1)
        soft = F.cross_entropy(student_logits / temperature, probabilities)
        return F.cross_entropy(student_logits, labels) + alpha * temperature**2 * weight * soft

    def balanced(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """WSL, but the weights of a batch are divided by their mean."""
        inputs = student_logits, teacher_logits, labels
        return wsl_loss(*inputs, temperature=temperature, alpha=alpha, balance=True)

    losses = {
        "CE": ce,
        "KD": kd,
        "WSL": wsl,
        "uniform": uniform,
        "masked": masked,
        "balanced": balanced,
    }
    return losses[name]


class Learner:
    """A network with its loss, its optimizer and its teacher; None if it learns from labels."""

    def __init__(
        self, network: nn.Module, loss: Loss, steps: int, teacher: nn.Module | None = None
    ) -> None:
        self.network, self.loss, self.teacher = network, loss, teacher
        # AdamW's steps do not depend on the scale of the loss, which grows with alpha.
        self.optimizer = torch.optim.AdamW(network.parameters(), LR)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, images: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
        logits = self.network(images)
        loss = self.loss(logits, teacher_logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return logits.detach()


class Epoch(NamedTuple):
    """Labels and logits of one pass over the images, in the order of training."""

    labels: Tensor
    teacher_logits: dict[nn.Module, Tensor]
    student_logits: list[Tensor]


def steps_per_epoch(images: int) -> int:
    return -(-images // BATCH)


def train_epoch(task: Task, drawn: Tensor, learners: Sequence[Learner]) -> Epoch:
    """Train all learners side by side, on the same images in the same order."""
    teachers = list(dict.fromkeys(each.teacher for each in learners if each.teacher is not None))
    for learner in learners:
        learner.network.train()
    batches = []
    for batch in drawn[torch.randperm(len(drawn))].to(task.train_labels.device).split(BATCH):
        images, labels = task.augment(task.train_images[batch]), task.train_labels[batch]
        with torch.inference_mode():
            teacher_logits = {teacher: teacher(images) for teacher in teachers}
        student_logits = [
            learner.step(images, teacher_logits.get(learner.teacher), labels)
            for learner in learners
        ]
        batches.append((labels, *teacher_logits.values(), *student_logits))
    labels, *logits = (torch.cat(parts) for parts in zip(*batches))
    return Epoch(labels, dict(zip(teachers, logits)), logits[len(teachers) :])


def train_teachers(
    task: Task, drawn: Tensor, epochs: int, smoothings: Iterable[float] = (0.0,)
) -> list[nn.Module]:
    """Return one teacher per label smoothing, in evaluation mode; they differ in nothing else."""
    steps = epochs * steps_per_epoch(len(drawn))
    first = make_network(task, TEACHER_WIDTH)
    losses = [make_loss("CE", label_smoothing=smoothing) for smoothing in smoothings]
    learners = [Learner(copy.deepcopy(first), loss, steps) for loss in losses]
    for _ in range(epochs):
        train_epoch(task, drawn, learners)
    return [learner.network.eval() for learner in learners]


@torch.inference_mode()
def predict(task: Task, network: nn.Module) -> Tensor:
    """Return the logits of the test images."""
    network.eval()
    return torch.cat([network(images) for images in task.test_images.split(EVALUATION_BATCH)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * (logits.argmax(-1) == labels).float().mean().item()


# --- seeds, each in a worker process ---


def run_seeds(
    replicate: Callable[[argparse.Namespace, int], Result],
    args: argparse.Namespace,
    seeds: Sequence[int],
) -> Iterator[tuple[int, Result]]:
    """Yield each seed with its result, in the order in which they finish.

    `replicate` must be a function of a module, because workers import it.
    """
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(args.workers, len(seeds)))
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        futures = {pool.submit(replicate, args, seed): seed for seed in seeds}
        for future in tqdm(as_completed(futures), total=len(seeds), unit="seed"):
            yield futures[future], future.result()


def start_worker() -> None:
    """Use one thread, as such small networks gain little from more; exit if the parent dies."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# --- results: CSV tables, the only source of reports and figures ---


def write(path: Path, text: str) -> None:
    """Write atomically, so that a killed run leaves no incomplete file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()}
        writer.writerow(cells)
    write(path, text.getvalue())


def read_table(path: Path) -> list[Row]:
    """Return the rows, with numbers as floats and empty cells as None."""

    def parse(text: str) -> Any:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{name: parse(text) for name, text in row.items()} for row in csv.DictReader(file)]


def count_seeds(rows: Iterable[Row]) -> int:
    return len({row["seed"] for row in rows})


def column(rows: Iterable[Row], name: str, **where: Any) -> Tensor:
    """Return one value per seed, in the order of the seeds, from the rows that `where` selects.

    The value of an empty cell is NaN.
    """
    by_seed = {
        row["seed"]: math.nan if row[name] is None else row[name]
        for row in rows
        if all(row[key] == value for key, value in where.items())
    }
    return torch.tensor([by_seed[seed] for seed in sorted(by_seed)], dtype=torch.float64)


def confidence_interval(values: Tensor) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval (Student's t)."""
    half = student_t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values))
    return values.mean().item(), half.item()


def show(values: Tensor, digits: int = 2, sign: str = "") -> str:
    mean, half = confidence_interval(values)
    return f"{mean:{sign}.{digits}f} +- {half:.{digits}f}"


def options(args: argparse.Namespace) -> Row:
    """Return the options on which the results depend."""
    others = ("out", "data", "report", "workers", "device")
    return {name: value for name, value in vars(args).items() if name not in others}


def describe_run(args: argparse.Namespace, seconds: float) -> Row:
    """Return options and machine, for the JSON file beside the tables."""
    cuda = args.device.type == "cuda"
    return {
        **options(args),
        "device": torch.cuda.get_device_name(args.device) if cuda else processor(),
        "workers": args.workers,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "minutes": round(seconds / 60, 1),
    }


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


# --- command line ---


def make_parser(doc: str, *, epochs: int | None, out: str) -> argparse.ArgumentParser:
    parser = make_short_parser(doc, seeds=4, out=out)
    default = epochs or "by dataset, see above"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--dataset", choices=("digits", *DATASETS), default="digits", help="(digits)")
    add("--data", type=Path, default=Path("data"), help="of the dataset, else downloaded (data)")
    add("--train-images", type=int, help="drawn for each seed (all)")
    add("--epochs", type=int, default=epochs, help=f"of a student ({default})")
    add("--teacher-epochs", type=int, default=epochs, help=f"({default})")
    add("--alpha", type=float, default=2.25, help="of KD and WSL (2.25, as the paper's CIFAR-100)")
    add("--device", type=torch.device, default=device)
    return parser


def make_short_parser(doc: str, *, seeds: int, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options that do not depend on the data."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=seeds, help=f"at least 2, for the intervals ({seeds})")
    add("--workers", type=int, default=os.cpu_count(), help="parallel seeds (number of cores)")
    add("--out", type=Path, default=Path(out), help=f"folder of the results ({out})")
    add("--report", action="store_true", help="print and draw the results in --out; no training")
    return parser


def check_images(args: argparse.Namespace) -> None:
    """Raise if the dataset cannot be loaded or has too few images."""
    draw(load_task(args.dataset, args.data, args.device), args.train_images)


def run(
    args: argparse.Namespace,
    replicate: Callable[[argparse.Namespace, int], Result],
    tables: Callable[[list[Result]], dict[str, list[Row]]],
    report: Callable[[Path, Row], None],
    restore: Callable[[Path], dict[int, Result]] | None = None,
    check: Callable[[argparse.Namespace], None] = check_images,
) -> None:
    """Train, unless --report is given, then report.

    After every seed, `tables` turns all results so far into CSV files, and the options and the
    hardware are written as JSON under the script's name. With `restore`, which reads results from
    the CSV files, a run continues after a kill, or adds seeds. `check` raises errors in the options
    before the training.
    """
    json_path = args.out / f"{Path(sys.argv[0]).stem}.json"
    if not args.report:
        train(args, replicate, tables, restore, check, json_path)
    report(args.out, json.loads(json_path.read_text()))


def train(
    args: argparse.Namespace,
    replicate: Callable[[argparse.Namespace, int], Result],
    tables: Callable[[list[Result]], dict[str, list[Row]]],
    restore: Callable[[Path], dict[int, Result]] | None,
    check: Callable[[argparse.Namespace], None],
    json_path: Path,
) -> None:
    results, seconds = {}, 0.0
    if json_path.exists():
        if restore is None:
            raise FileExistsError(
                f"{args.out} holds results: --report shows them; choose another --out for new ones"
            )
        before = json.loads(json_path.read_text())
        check_same_options(args, before)
        results, seconds = restore(args.out), 60 * before["minutes"]
    if args.seeds < 2:
        raise ValueError(f"--seeds must be at least 2, got {args.seeds}")
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter() - seconds
    missing = [seed for seed in range(args.seeds) if seed not in results]
    for seed, result in run_seeds(replicate, args, missing):
        results[seed] = result
        for name, rows in tables([results[seed] for seed in sorted(results)]).items():
            write_table(args.out / f"{name}.csv", rows)
        description = describe_run(args, time.perf_counter() - start)
        write(json_path, json.dumps(description, indent=2) + "\n")


def check_same_options(args: argparse.Namespace, before: Row) -> None:
    for name, value in options(args).items():
        if name != "seeds" and value != before[name]:
            raise ValueError(
                f"{args.out} holds results of {name} {before[name]}, got {value}: "
                "choose another --out"
            )
