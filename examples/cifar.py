"""Train a teacher, then distil it into a student, on CIFAR-100, CIFAR-10 or Fashion-MNIST.

    pip install "weighted-soft-labels[examples]"
    mkdir data
    python cifar.py --train-teacher --out runs/teacher                                  # resnet32x4
    python cifar.py --teacher-checkpoint runs/teacher/last.pt --out runs/wsl             # resnet8x4
    python cifar.py --teacher-checkpoint runs/teacher/last.pt --loss kd --out runs/kd
    python cifar.py --loss ce --out runs/ce

The student is trained with

    ce   cross-entropy with the labels alone
    kd   CE + alpha * T^2 * KL(teacher || student), Hinton et al. 2015: the same weight for every sample
    wsl  CE + alpha * T^2 * weight * soft cross-entropy, `weighted_soft_labels.wsl_loss`

The defaults are the CIFAR-100 settings of the WSL paper: T = 4, alpha = 2.25, and the schedule of CRD (240 epochs of
SGD, batches of 64, learning rate 0.05, or 0.01 for MobileNetV2 and the ShuffleNets, divided by 10 after epochs 150, 180
and 210, weight decay 5e-4, random crops with a padding of 4, random flips). KD runs under the same T and alpha. Flips
are on for Fashion-MNIST, too, as is usual in its literature. Instead of training a teacher, you can fetch one of
RepDistiller's (see cifar_models.py) and give `--teacher resnet32x4 --teacher-checkpoint ckpt_epoch_240.pth`.

A run fills a folder with log.csv (a row an epoch), curves.png, last.pt and best.pt. The best epoch is chosen by its
test accuracy, which flatters it: compare methods by the last. A run that was killed goes on where its last checkpoint
was if the same command is given with `--resume`; on a CPU it ends with the same weights, bit for bit, as if nothing had
happened. Of checkpoints, `torch.load(path)["model"]` is the state dict of a network in cifar_models.py.

Accuracy of full runs: not measured yet.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from cifar_models import MODELS
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from tqdm import tqdm

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import regularization_samples, wsl_terms

SIZE = 32  # of an image, in pixels
PADDING = 4
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
EVALUATION_BATCH = 500
STEPS_PER_REPORT = 50  # between two looks at the loss: each makes a GPU wait
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATE = ("model", "optimizer", "scaler", "rng", "progress", "configuration")  # the entries of a checkpoint
OUTPUTS = ("last.pt", "previous.pt", "best.pt", "log.csv", "curves.png")


class Refusal(Exception):
    """What the user has to change, in one line."""


# The data: on the device as uint8, augmented there ------------------------------------------------------------------


class Dataset(NamedTuple):
    """Mean and standard deviation are those of the training set, by channel, for pixels from 0 to 1."""

    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    torchvision: str  # the class there
    folder: str  # in which that class keeps its files, below the root


DATASETS = {  # CIFAR-100 is normalised as for RepDistiller's teachers
    "cifar100": Dataset(100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "CIFAR100", "cifar-100-python"),
    "cifar10": Dataset(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR10", "cifar-10-batches-py"),
    "fashion-mnist": Dataset(10, (0.2860,) * 3, (0.3530,) * 3, "FashionMNIST", "FashionMNIST/raw"),
}


class Split(NamedTuple):
    """images: (N, height, width, channels), uint8; labels: (N,), int64."""

    images: Tensor
    labels: Tensor


def load_split(name: str, root: Path, train: bool) -> Split:
    """From the files below `root`, which are downloaded if there are none."""
    try:
        images, labels = read_fashion_mnist(root, train) if name == "fashion-mnist" else read_cifar(name, root, train)
        if len(images) != len(labels) or not 0 <= labels.min() <= labels.max() < DATASETS[name].classes:
            raise ValueError(f"{len(images)} images have {len(labels)} labels from {labels.min()} to {labels.max()}")
    except Exception as error:  # of the network, the file system, gzip, pickle, torchvision: to the user all the same
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f"cannot load {name} from the folder {str(root)!r}: {reason}") from None
    return Split(images, labels)


def read_cifar(name: str, root: Path, train: bool) -> Split:
    files = torchvision_dataset(name, root, train)
    return Split(torch.from_numpy(files.data), torch.tensor(files.targets))


def read_fashion_mnist(root: Path, train: bool) -> Split:
    """From `root` itself, too, which is where Debian's package dataset-fashion-mnist has the files."""
    prefix = "train" if train else "t10k"
    folder = root
    if not any(root.glob("*-ubyte*")):
        folder = root / DATASETS["fashion-mnist"].folder
        if not any(folder.glob("*-ubyte*")):
            torchvision_dataset("fashion-mnist", root, train)
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte")
    images = F.pad(images, ((SIZE - images.shape[2]) // 2,) * 2 + ((SIZE - images.shape[1]) // 2,) * 2)
    return Split(images.unsqueeze(-1), read_idx(folder / f"{prefix}-labels-idx1-ubyte").long())


def read_idx(path: Path) -> Tensor:
    """Bytes in the format of MNIST, plain or gzipped: a magic number that ends in the rank, the shape, the values."""
    packed = path.with_name(path.name + ".gz")
    content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    header = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if len(content) != header + math.prod(shape):
        raise ValueError(f"{path.name} is incomplete")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def torchvision_dataset(name: str, root: Path, train: bool) -> Any:
    """Files that are there are used or refused, but never replaced by a download."""
    import torchvision  # here, as it is slow to import and not always needed

    folder = root / DATASETS[name].folder
    absent = not (folder.exists() and any(folder.iterdir()))
    return getattr(torchvision.datasets, DATASETS[name].torchvision)(root, train=train, download=absent)


def fake_split(name: str, count: int, seed: int) -> Split:
    """Noise of the shape of the dataset."""
    generator = torch.Generator().manual_seed(seed)
    channels = 1 if name == "fashion-mnist" else 3
    images = torch.randint(256, (count, SIZE, SIZE, channels), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(DATASETS[name].classes, (count,), generator=generator))


class Data(NamedTuple):
    """Everything on the device. Training images come padded with zeros, ready to be cropped."""

    train: Split
    test: Split
    mean: Tensor
    std: Tensor


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    if args.fake_data:
        train, test = (fake_split(args.dataset, args.fake_data, seed) for seed in (0, 1))
    elif not args.data.is_dir():
        raise Refusal(f"there is no folder {str(args.data)!r}: make it, and {args.dataset} is downloaded into it")
    else:
        train, test = (load_split(args.dataset, args.data, train) for train in (True, False))
    train = Split(F.pad(train.images, (0, 0) + (PADDING,) * 4), train.labels)
    statistics = (255 * torch.tensor(values, device=device) for values in DATASETS[args.dataset][1:3])
    return Data(*(Split(*(x.to(device) for x in split)) for split in (train, test)), *statistics)


class Plan(NamedTuple):
    """One epoch: which image comes when, where it is cropped, and whether it is flipped."""

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor


def plan_epoch(seed: int, epoch: int, count: int, device: torch.device) -> Plan:
    """A function of seed and epoch alone, so that a resumed epoch needs no other state than its step."""
    generator = torch.Generator().manual_seed(100_000 * seed + epoch)
    order = torch.randperm(count, generator=generator)
    top, left = torch.randint(2 * PADDING + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    return Plan(*(x.to(device) for x in (order, top, left, flip)))


def crop_and_flip(images: Tensor, plan: Plan) -> Tensor:
    """Padded images (N, height, width, channels) to (len(plan.order), SIZE, SIZE, channels): one gather for it all."""
    pixels = torch.arange(SIZE, device=images.device)
    rows = plan.top[:, None] + pixels
    columns = plan.left[:, None] + torch.where(plan.flip[:, None], SIZE - 1 - pixels, pixels)
    return images[plan.order[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, data: Data, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """(N, height, width, 1 or 3), uint8, to (N, 3, height, width). In float32, then rounded to dtype once."""
    scaled = (images - data.mean) / data.std
    return scaled.permute(0, 3, 1, 2).to(dtype, memory_format=memory_format)


# The losses: what to lift into a project of your own ----------------------------------------------------------------

Loss = Callable[..., Tensor]  # of student_logits, teacher_logits, labels


def make_loss(name: str, temperature: float, alpha: float) -> Loss:
    def ce(student_logits: Tensor, teacher_logits: None, labels: Tensor) -> Tensor:
        return F.cross_entropy(student_logits.float(), labels)

    def kd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        student = F.log_softmax(student_logits.float() / temperature, dim=1)
        teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
        soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return F.cross_entropy(student_logits.float(), labels) + alpha * temperature**2 * soft

    def wsl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return wsl_loss(student_logits, teacher_logits, labels, temperature=temperature, alpha=alpha)

    return {"ce": ce, "kd": kd, "wsl": wsl}[name]


# A run and its checkpoints ------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run is; all of it goes into the checkpoints."""

    epoch: int = 0  # epochs that are complete
    step: int = 0  # of the epoch that is not
    sums: dict[str, float] = field(default_factory=dict)  # over the images of that epoch
    seconds: float = 0.0  # spent on it
    best: float = -1.0  # test accuracy
    rows: list[dict[str, float]] = field(default_factory=list)  # of the log


@dataclass
class Run:
    args: argparse.Namespace
    configuration: dict[str, Any]
    device: torch.device
    data: Data
    student: nn.Module  # holds the parameters
    network: nn.Module  # the student, perhaps compiled: what is called
    teacher: nn.Module | None
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.args.channels_last else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, AMP[self.args.amp], enabled=self.args.amp != "off")

    def normalise(self, images: Tensor) -> Tensor:
        return normalise(images, self.data, AMP[self.args.amp], self.memory_format)


def configuration_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the result. Where things lie does not, so the teacher goes by its content."""
    elsewhere = ("out", "resume", "data", "device", "checkpoint_every", "teacher_checkpoint")
    configuration = {name: value for name, value in vars(args).items() if name not in elsewhere}
    if args.teacher_checkpoint is not None:
        configuration["teacher_sha256"] = hashlib.sha256(args.teacher_checkpoint.read_bytes()).hexdigest()
    return configuration


def save(path: Path, content: dict[str, Any]) -> None:
    """All or nothing: under its name there is always a complete file."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if path.name == "last.pt" and path.exists():
        os.replace(path, path.with_name("previous.pt"))
    os.replace(temporary, path)


def save_last(run: Run) -> None:
    cuda = run.device.type == "cuda"
    state = (
        run.student.state_dict(),
        run.optimizer.state_dict(),
        run.scaler.state_dict(),
        {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(run.device) if cuda else None},
        asdict(run.progress),
        run.configuration,
    )
    save(run.args.out / "last.pt", dict(zip(STATE, state)))


def read_checkpoint(path: Path, *entries: str) -> dict[str, Any]:
    if not path.is_file():
        raise Refusal(f"there is no file {str(path)!r}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data, which RepDistiller's hold
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has a dozen kinds for a file that is cut off or was never a checkpoint
        raise Refusal(f"{str(path)!r} is not a complete checkpoint ({type(error).__name__})") from None
    for entry in entries:
        if not isinstance(content, dict) or entry not in content:
            raise Refusal(f"{str(path)!r} is not such a checkpoint: it holds no {entry!r}")
    return content


def find_checkpoint(args: argparse.Namespace, configuration: dict[str, Any]) -> dict[str, Any] | None:
    """The newest readable one of the folder, None if it holds no run. Never lets one run overwrite another."""
    out = args.out
    if not any((out / name).exists() for name in OUTPUTS):
        return None
    if not args.resume:
        raise Refusal(f"{str(out)!r} holds a run: add --resume to go on with it, or choose another --out")
    try:
        checkpoint = read_checkpoint(out / "last.pt", *STATE)
    except Refusal as last:
        try:
            checkpoint = {**read_checkpoint(out / "previous.pt", *STATE), "replaces": out / "last.pt"}
        except Refusal as previous:
            raise Refusal(f"nothing to resume from: {last}, {previous}") from None
        print(f"cifar.py: warning: {last}: resuming from previous.pt", file=sys.stderr)
    saved = checkpoint["configuration"]
    for name in {**configuration, **saved}:
        if saved.get(name) != configuration.get(name):
            change = f"{name} = {saved.get(name)}, not {configuration.get(name)}"
            raise Refusal(
                f"{str(out)!r} holds a run with {change}: resume it with its own options, or choose another --out"
            )
    return checkpoint


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    unreadable = checkpoint.get("replaces")
    if unreadable is not None and unreadable.exists():  # the next save would put it in place of previous.pt
        os.replace(unreadable, unreadable.with_name("last.pt.unreadable"))
    run.student.load_state_dict(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.progress = Progress(**checkpoint["progress"])
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    if run.device.type == "cuda" and checkpoint["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], run.device)


def load_teacher(args: argparse.Namespace, classes: int) -> nn.Module | None:
    """Of this script, of RepDistiller, or of anyone who saves {'model': state_dict}."""
    if args.teacher_checkpoint is None:
        return None
    state = read_checkpoint(args.teacher_checkpoint, "model")["model"]
    teacher = MODELS[args.teacher](num_classes=classes)
    expected = teacher.state_dict()
    bias = list(expected)[-1]  # of the classifier, the last layer of every network here
    where = f"the teacher checkpoint {str(args.teacher_checkpoint)!r}"
    if bias in state and len(state[bias]) != classes:
        raise Refusal(f"{where} has {len(state[bias])} classes, but {args.dataset} has {classes}")
    for name in {**expected, **state}:
        shapes = [list(tensors[name].shape) if name in tensors else "absent" for tensors in (state, expected)]
        if shapes[0] != shapes[1]:
            raise Refusal(f"{where} is not one of --teacher {args.teacher}: {name} is {shapes[0]}, not {shapes[1]}")
    teacher.load_state_dict(state)
    return teacher.eval().requires_grad_(False)


# Training -----------------------------------------------------------------------------------------------------------


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Of an epoch, counted from 0. Steps after 5/8, 6/8 and 7/8 of the epochs: 150, 180 and 210 of 240."""
    if args.schedule == "cosine":
        return args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    return args.lr * 0.1 ** sum(8 * epoch >= eighths * args.epochs for eighths in (5, 6, 7))


@torch.no_grad()
def add_up(run: Run, batches: list[tuple[Tensor, ...]]) -> dict[str, float]:
    """Move what batches hold into the sums over the epoch. Now and then, as it waits for the device."""
    sums = run.progress.sums
    if batches:
        loss, labels, *logits = (torch.cat(parts) for parts in zip(*batches))
        batches.clear()
        values = {"loss": loss, "train_accuracy": 100.0 * (logits[0].argmax(1) == labels)}
        if run.teacher is not None:
            terms = wsl_terms(*logits, labels, temperature=run.args.temperature)
            values |= {"hard": terms.student_ce, "soft": terms.soft, "weight": terms.weight}
            values["regularization_share"] = regularization_samples(*logits, labels, temperature=run.args.temperature)
        totals = torch.stack([value.float().sum() for value in values.values()]).tolist()
        for name, total in zip((*values, "images"), (*totals, len(labels))):
            sums[name] = sums.get(name, 0.0) + total
    return sums


def train_epoch(run: Run) -> dict[str, float]:
    """Or what is left of it. Returns means over its images."""
    args, progress = run.args, run.progress
    images, labels = run.data.train
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(args, progress.epoch)
    plan = plan_epoch(args.seed, progress.epoch, len(images), run.device)
    plans = [Plan(*parts) for parts in zip(*(x.split(args.batch_size) for x in plan))]
    batches = []  # of loss, labels and logits, not added up yet
    start = time.perf_counter() - progress.seconds

    run.network.train()
    name, done = f"epoch {progress.epoch + 1}/{args.epochs}", progress.step * args.batch_size
    bar = tqdm(desc=name, total=len(images), initial=done, unit=" images", leave=False)
    for part in plans[progress.step :]:
        batches.append(train_step(run, run.normalise(crop_and_flip(images, part)), labels[part.order]))
        bar.update(len(part.order))
        progress.step += 1
        due = progress.step % args.checkpoint_every == 0 and progress.step < len(plans)
        if due or progress.step % STEPS_PER_REPORT == 0:
            sums = add_up(run, batches)
            bar.set_postfix(loss=f"{sums['loss'] / sums['images']:.3f}")
        if due:
            progress.seconds = time.perf_counter() - start
            save_last(run)
    bar.close()
    sums = add_up(run, batches)
    means = {name: total / sums["images"] for name, total in sums.items() if name != "images"}
    return {**means, "images_per_second": sums["images"] / (time.perf_counter() - start)}


def train_step(run: Run, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Returns the loss of the batch, repeated for every image, the labels, and the logits of student and teacher."""
    with run.autocast():
        teacher_logits = None
        if run.teacher is not None:
            with torch.no_grad():
                teacher_logits = run.teacher(images)
        student_logits = run.network(images)
    loss = run.loss(student_logits, teacher_logits, labels)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    result = (loss.detach().expand(len(labels)), labels, student_logits.detach())
    return result if teacher_logits is None else (*result, teacher_logits)


@torch.no_grad()
def evaluate(run: Run, network: nn.Module) -> tuple[float, float]:
    """Accuracy in percent and cross-entropy on the test images."""
    network.eval()
    hits, losses = [], []
    for images, labels in zip(*(x.split(EVALUATION_BATCH) for x in run.data.test)):
        with run.autocast():
            logits = network(run.normalise(images))
        hits.append(logits.argmax(1) == labels)
        losses.append(F.cross_entropy(logits.float(), labels, reduction="none"))
    return 100 * torch.cat(hits).float().mean().item(), torch.cat(losses).mean().item()


def train(run: Run) -> None:
    args, progress = run.args, run.progress
    teacher_accuracy = None
    if run.teacher is not None:
        teacher_accuracy, _ = evaluate(run, run.teacher)
        print(f"teacher {args.teacher}: {teacher_accuracy:.2f} % on the test set")
    if progress.epoch or progress.step:
        print(f"resuming after {progress.epoch} epochs and {progress.step} steps")
    else:
        save_last(run)  # from here on the folder is this run's
    write_log(run)

    while progress.epoch < args.epochs:
        row = {"epoch": progress.epoch + 1, "learning_rate": learning_rate(args, progress.epoch), **train_epoch(run)}
        row["test_accuracy"], row["test_loss"] = evaluate(run, run.network)
        run.progress = progress = Progress(progress.epoch + 1, best=progress.best, rows=[*progress.rows, row])
        if row["test_accuracy"] > progress.best:
            progress.best = row["test_accuracy"]
            best = {"model": run.student.state_dict(), "epoch": progress.epoch, "test_accuracy": progress.best}
            save(args.out / "best.pt", {**best, "configuration": run.configuration})
        save_last(run)
        write_log(run)
        print(
            f"epoch {progress.epoch}/{args.epochs}: loss {row['loss']:.3f}, train {row['train_accuracy']:.2f} %, "
            f"test {row['test_accuracy']:.2f} %, {row['images_per_second']:,.0f} images/s",
            flush=True,
        )

    save_figure(args.out / "curves.png", progress.rows, teacher_accuracy)
    print(f"test accuracy: last {progress.rows[-1]['test_accuracy']:.2f} %, best {progress.best:.2f} %; see {args.out}")


# The report ---------------------------------------------------------------------------------------------------------

LOSSES = ("loss", "hard", "soft")  # soft before its scale, alpha * T^2 * weight
SHARES = ("weight", "regularization_share")
ACCURACIES = ("train_accuracy", "test_accuracy")
COLUMNS = ("epoch", "learning_rate", *LOSSES, *SHARES, *ACCURACIES, "test_loss", "images_per_second")


def write_log(run: Run) -> None:
    """Anew from the rows of the checkpoint, so that no epoch is ever missing or there twice."""
    path = run.args.out / "log.csv"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in run.progress.rows)
    os.replace(temporary, path)


def save_figure(path: Path, rows: list[dict[str, float]], teacher_accuracy: float | None) -> None:
    panels = [("mean over the training images", LOSSES), ("mean over the training images", SHARES), ("%", ACCURACIES)]
    panels = [(label, [name for name in names if name in rows[0]]) for label, names in panels]
    panels = [(label, names) for label, names in panels if names]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), layout="constrained")
    for axis, (label, names) in zip(axes, panels):
        for name in names:
            axis.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=name.replace("_", " "))
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_yscale("log")  # alpha * T^2 = 36 by default sets the loss far above its terms
    if teacher_accuracy is not None:
        axes[-1].axhline(teacher_accuracy, color="black", linestyle=":", label="teacher, test accuracy")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# The command line ---------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option, models = parser.add_argument, "a network of cifar_models.py"
    goal = parser.add_mutually_exclusive_group().add_argument
    goal("--train-teacher", action="store_true", help="train a network with cross-entropy, to be a teacher")
    goal("--loss", choices=("ce", "kd", "wsl"), help="of the student (wsl)")
    option("--model", choices=MODELS, metavar="NAME", help=f"{models} (teacher: resnet32x4, student: resnet8x4)")
    option("--teacher", choices=MODELS, default="resnet32x4", metavar="NAME", help=f"{models} (resnet32x4)")
    option(
        "--teacher-checkpoint", type=Path, metavar="PATH", help="{'model': state_dict} of the teacher, for kd and wsl"
    )
    option("--temperature", type=float, default=4.0, metavar="T", help="of kd and wsl (4.0)")
    option("--alpha", type=float, default=2.25, metavar="A", help="of kd and wsl (2.25)")

    option("--dataset", choices=DATASETS, default="cifar100", help="(cifar100)")
    option("--data", type=Path, default="data", metavar="DIR", help="holds the dataset, or is to hold it (data)")
    option("--fake-data", type=int, nargs="?", const=2000, metavar="N", help="N images of noise (2000)")

    option("--epochs", type=int, default=240, metavar="N", help="(240)")
    option("--batch-size", type=int, default=64, metavar="N", help="(64)")
    option("--lr", type=float, metavar="LR", help="(0.05; MobileNetV2 and ShuffleNets: 0.01)")
    option("--schedule", choices=("step", "cosine"), default="step", help="x 0.1 at 5/8, 6/8, 7/8, or cosine (step)")
    option("--seed", type=int, default=0, metavar="N", help="of weights, order and augmentation (0)")

    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(cuda if there is one, else cpu)")
    option("--amp", choices=AMP, default="off", help="mixed precision (off)")
    option("--channels-last", action="store_true", help="memory layout of images and weights")
    option("--compile", action="store_true", help="torch.compile the networks")

    option("--out", type=Path, required=True, metavar="DIR", help="folder of this run; made if needed")
    option("--resume", action="store_true", help="go on with the run in --out, if there is one")
    option("--checkpoint-every", type=int, default=500, metavar="N", help="steps; epochs end with one (500)")
    args = parser.parse_args()

    for name in ("temperature", "alpha", "lr", "epochs", "batch_size", "fake_data", "checkpoint_every"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: must be finite and > 0, got {value}")
    args.loss = args.loss or ("ce" if args.train_teacher else "wsl")
    args.model = args.model or ("resnet32x4" if args.train_teacher else "resnet8x4")
    args.lr = args.lr or (0.01 if args.model.startswith(("MobileNet", "Shuffle")) else 0.05)
    if args.loss == "ce" and args.teacher_checkpoint is not None:
        parser.error("--teacher-checkpoint is of no use without --loss kd or wsl")
    if args.loss != "ce" and args.teacher_checkpoint is None:
        parser.error(f"--loss {args.loss} needs a --teacher-checkpoint")
    return args


def open_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {name}: {str(error).splitlines()[0]}") from None


def prepare(args: argparse.Namespace) -> Run:
    """Whatever may be refused is, before the first file is written."""
    device = open_device(args.device)
    classes = DATASETS[args.dataset].classes
    teacher = load_teacher(args, classes)
    configuration = configuration_of(args)
    checkpoint = find_checkpoint(args, configuration)
    data = load_data(args, device)

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    student = MODELS[args.model](num_classes=classes).to(device, memory_format=memory_format)
    teacher = None if teacher is None else teacher.to(device, memory_format=memory_format)
    run = Run(
        args=args,
        configuration=configuration,
        device=device,
        data=data,
        student=student,
        network=torch.compile(student, dynamic=False) if args.compile else student,
        teacher=torch.compile(teacher, dynamic=False) if args.compile and teacher is not None else teacher,
        loss=make_loss(args.loss, args.temperature, args.alpha),
        # Fused, the optimizer looks for fp16's overflows on the GPU, and no step waits for the answer.
        optimizer=torch.optim.SGD(
            student.parameters(), args.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
        progress=Progress(),
    )
    if checkpoint is not None:
        restore(run, checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    return run


def main() -> None:
    args = parse_args()
    try:
        train(prepare(args))
    except (Refusal, OSError) as error:
        sys.exit(f"cifar.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"cifar.py: interrupted; --resume goes on from the last checkpoint in {str(args.out)!r}")


if __name__ == "__main__":
    main()
