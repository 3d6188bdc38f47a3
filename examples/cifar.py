"""Knowledge distillation on CIFAR-100, CIFAR-10 or Fashion-MNIST: Weighted Soft Labels or Hinton's.

    pip install "weighted-soft-labels[examples]"
    # a teacher, resnet32x4; then a student of that teacher, resnet8x4
    python cifar.py --loss ce --model resnet32x4 --out runs/teacher --download
    python cifar.py --teacher-checkpoint runs/teacher/last.pt --out runs/wsl
    # for comparison: Hinton's loss, and the student without a teacher
    python cifar.py --teacher-checkpoint runs/teacher/last.pt --out runs/kd --loss kd
    python cifar.py --loss ce --out runs/ce

The losses, with T = --temperature:

    ce   cross-entropy with the labels
    kd   hard_weight * CE + alpha * T^2 * KL(teacher || student), Hinton et al. 2015
    wsl  hard_weight * CE + alpha * T^2 * weight * soft cross-entropy, with a weight for each image:
         `weighted_soft_labels.wsl_loss`

The defaults are the CIFAR-100 settings of the WSL paper: T = 4, alpha = 2.25, and CRD's schedule of
240 epochs. The learning rate starts at 0.05, or at 0.01 for MobileNetV2 and the ShuffleNets. It is
divided by 10 after 5/8, 6/8 and 7/8 of --epochs.

RepDistiller's teachers load: --teacher-checkpoint ckpt_epoch_240.pth. The KD of its tables is
--loss kd --hard-weight 0.1 --alpha 0.9.

The folder --out receives log.csv (a row an epoch), curves.png and last.pt. The entry "model" of
last.pt is a state dict for cifar_models.py.

All random numbers of an epoch follow from --seed and the epoch's number. If a run was killed, the
same command with --resume continues after the last whole epoch. On a CPU the resumed run ends with
the same bits as an uninterrupted run.

Accuracy after 240 epochs: not measured.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar_models import MODELS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from torchvision import datasets
from tqdm import tqdm

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms

# torchvision's name, number of classes, mean and standard deviation of the channels.
# The statistics of CIFAR-100 are RepDistiller's.
DATASETS = {
    "cifar100": ("CIFAR100", 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ("CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion-mnist": ("FashionMNIST", 10, (0.2860,) * 3, (0.3530,) * 3),
}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Options that may differ when a run is resumed.
MAY_CHANGE = {"data", "download", "out", "resume", "epochs"}
MAY_CHANGE |= {"device", "amp", "channels_last", "compile"}
# Options without effect on --loss ce.
DISTILLATION = {"teacher", "teacher_checkpoint", "temperature", "alpha", "hard_weight"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="cifar100")
    parser.add_argument(
        "--data",
        type=Path,
        default="data",
        help="folder of torchvision's datasets, or of Debian's Fashion-MNIST",
    )
    parser.add_argument("--download", action="store_true", help="the dataset into --data")
    parser.add_argument(
        "--fake-data",
        type=int,
        nargs="?",
        const=2000,
        metavar="N",
        help="train and test on N images of noise",
    )

    parser.add_argument(
        "--model",
        choices=MODELS,
        default="resnet8x4",
        metavar="NAME",
        help="model to train, from cifar_models.py",
    )
    parser.add_argument(
        "--teacher",
        choices=MODELS,
        default="resnet32x4",
        metavar="NAME",
        help="model of --teacher-checkpoint",
    )
    parser.add_argument(
        "--teacher-checkpoint",
        type=Path,
        metavar="FILE",
        help="{'model': state_dict}, for kd and wsl",
    )
    parser.add_argument(
        "--loss", choices=("ce", "kd", "wsl"), default="wsl", help="ce needs no teacher"
    )
    parser.add_argument("--temperature", type=float, default=4.0, help="of the soft term")
    parser.add_argument("--alpha", type=float, default=2.25, help="scale of the soft term")
    parser.add_argument(
        "--hard-weight", type=float, default=1.0, help="scale of the cross-entropy in kd and wsl"
    )

    parser.add_argument("--epochs", type=int, default=240, help="total number")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    parser.add_argument(
        "--lr", type=float, help="0.05, or 0.01 for MobileNetV2 and the ShuffleNets"
    )
    parser.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of all parameters")
    parser.add_argument(
        "--seed", type=int, default=0, help="of initialisation, order and augmentation"
    )

    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch"
    )
    parser.add_argument("--amp", choices=AMP, help="mixed precision")
    parser.add_argument(
        "--channels-last", action="store_true", help="memory format of the networks"
    )
    parser.add_argument("--compile", action="store_true", help="the networks, by torch.compile")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out; start it if there is none"
    )
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 0.01 if args.model.startswith(("MobileNet", "Shuffle")) else 0.05
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if args.loss == "ce" and args.teacher_checkpoint is not None:
        parser.error("--loss ce has no teacher: omit --teacher-checkpoint")
    if args.loss != "ce" and args.teacher_checkpoint is None:
        parser.error(f"--loss {args.loss} needs a --teacher-checkpoint; --loss ce trains one")
    return args


# Data: uint8, on the device, where images are also cropped and flipped ----------------------------


def load_split(args: argparse.Namespace, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 1 or 3, 32, 32), uint8, and labels (N,), int64."""
    if args.fake_data:
        return fake_split(args.fake_data, DATASETS[args.dataset][1], train)
    if not args.data.exists() and not args.download:
        raise FileNotFoundError(
            f"--data {args.data} does not exist: --download puts {args.dataset} there"
        )
    try:
        images, labels = read_split(args, train)
    except (OSError, EOFError, RuntimeError) as error:
        if args.download:
            raise RuntimeError(f"cannot download {args.dataset}: {error}") from error
        raise RuntimeError(
            f"{args.dataset} is missing or damaged in {args.data}: --download puts it there"
        ) from error
    if images.ndim == 3:
        return F.pad(images[:, None], (2, 2, 2, 2)), labels.long()
    return images.permute(0, 3, 1, 2), labels.long()


def fake_split(count: int, classes: int, train: bool) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(int(train))
    images = torch.randint(256, (count, 3, 32, 32), generator=noise, dtype=torch.uint8)
    return images, torch.randint(classes, (count,), generator=noise)


def read_split(args: argparse.Namespace, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, height, width) or (N, height, width, 3), and labels."""
    prefix = "train" if train else "t10k"
    image_file = args.data / f"{prefix}-images-idx3-ubyte.gz"  # Debian's
    label_file = args.data / f"{prefix}-labels-idx1-ubyte.gz"
    if args.dataset == "fashion-mnist" and image_file.exists():
        images, labels = read_bytes(image_file), read_bytes(label_file)
        return images[16:].view(-1, 28, 28), labels[8:]  # without the headers
    dataset = getattr(datasets, DATASETS[args.dataset][0])
    split = dataset(args.data, train=train, download=args.download)
    return torch.as_tensor(split.data), torch.as_tensor(split.targets)


def read_bytes(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)


class Batches:
    """An epoch: normalised float32 images (B, 3, 32, 32) and labels (B,), on the device.

    For training the order is random. Each image is padded by 4 black pixels, cropped at random, and
    flipped with probability 1/2.
    """

    def __init__(self, args: argparse.Namespace, train: bool) -> None:
        images, labels = load_split(args, train)
        self.labels = labels.to(args.device)
        # A view of every crop, (N, channels, 9, 9, 32, 32): indexing copies rows of pixels.
        frames = F.pad(images.to(args.device), (4, 4, 4, 4))
        self.crops = frames.unfold(2, 32, 1).unfold(3, 32, 1)
        statistics = 255 * torch.tensor(DATASETS[args.dataset][2:], device=args.device)
        self.mean, self.std = statistics.view(2, 3, 1, 1)
        self.train = train
        self.batch_size = args.batch_size if train else 500

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.labels)
        if self.train:
            order, corners, flips = (
                torch.randperm(n),
                torch.randint(9, (2, n)),
                torch.randint(2, (n,)),
            )
        else:
            order, corners, flips = torch.arange(n), torch.full((2, n), 4), torch.zeros(n).long()
        draws = torch.stack([order, corners[0], corners[1], flips]).to(self.labels.device)
        for index, row, column, flip in draws.split(self.batch_size, dim=1):
            images = self.crops[index, :, row, column]
            images = torch.where(flip.bool()[:, None, None, None], images.flip(-1), images)
            yield (images - self.mean) / self.std, self.labels[index]


def progress(batches: Batches, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, with a bar on a terminal. Where there is no terminal, prints four lines."""
    if sys.stderr.isatty():
        yield from tqdm(batches, title, leave=False)
        return
    every = math.ceil(len(batches) / 4)
    for step, batch in enumerate(batches, 1):
        yield batch
        if step % every == 0:
            print(f"{title}: {step} of {len(batches)} steps", flush=True)


# Models, loss and learning rate -------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in RepDistiller's files
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type depends on where a truncated file ends
        raise ValueError(
            f"cannot read checkpoint {path}: it is truncated or of another format. "
            "Copy it again, or delete it and train again"
        ) from error


def make_model(args: argparse.Namespace, name: str, checkpoint: Path | None = None) -> nn.Module:
    classes = DATASETS[args.dataset][1]
    model = MODELS[name](num_classes=classes)
    if checkpoint is not None:
        content = load(checkpoint)
        try:
            model.load_state_dict(content.get("model", content))
        except RuntimeError as error:
            # The message of load_state_dict names every key, so show its beginning alone.
            keys = textwrap.shorten(str(error).partition("\n")[2], 200)
            raise ValueError(
                f"{checkpoint} does not fit {name} with {classes} classes "
                f"(--teacher, --dataset): {keys}"
            ) from None
    if args.compile:
        model.compile(dynamic=False)
    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    return model.to(args.device, memory_format=memory_format)


def loss_function(
    loss: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    hard_weight: float,
) -> Tensor:
    """The loss "ce", "kd" or "wsl" of logits (B, C)."""
    if loss == "wsl":
        return wsl_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=temperature,
            alpha=alpha,
            hard_weight=hard_weight,
        )
    hard = F.cross_entropy(student_logits.float(), labels)
    if loss == "ce":
        return hard
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return hard_weight * hard + alpha * temperature**2 * soft


def make_schedule(optimizer: SGD, epochs: int) -> MultiStepLR:
    milestones = [math.ceil(eighths * epochs / 8) for eighths in (5, 6, 7)]
    return MultiStepLR(optimizer, milestones, gamma=0.1)


# Checkpoints --------------------------------------------------------------------------------------


def options_of_run(args: argparse.Namespace) -> dict[str, Any]:
    """The options that --resume must not change. The loss comes first, as others depend on it."""
    unused = MAY_CHANGE | DISTILLATION if args.loss == "ce" else MAY_CHANGE
    options = {name: value for name, value in vars(args).items() if name not in unused}
    if args.loss != "ce":  # the teacher's content, as the file may move
        content = args.teacher_checkpoint.read_bytes()
        options["teacher_checkpoint"] = hashlib.sha256(content).hexdigest()
    return {"loss": args.loss, **options}


def resume(
    path: Path,
    options: dict[str, Any],
    student: nn.Module,
    optimizer: SGD,
    scaler: torch.amp.GradScaler,
    schedule: LRScheduler,
) -> list[dict[str, float]]:
    """Restore a run after its last whole epoch. Returns the rows of its log."""
    checkpoint = load(path)
    saved = checkpoint.get("options", {})
    for name, value in options.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} was trained with --{name.replace('_', '-')} {saved.get(name)}, "
                f"not {value}: repeat the options of that run, or choose another --out"
            )
    student.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty unless the run had --amp fp16
        scaler.load_state_dict(checkpoint["scaler"])
    rows = checkpoint["rows"]
    # --epochs may have changed and with it the milestones, so the schedule starts again from --lr.
    for group in optimizer.param_groups:
        group["lr"] = options["lr"]
    optimizer.step()  # changes nothing without gradients, but the schedule warns if it comes first
    for _ in rows:
        schedule.step()
    return rows


def save(path: Path, content: dict[str, Any]) -> None:
    """Write beside the file and rename, so that a killed process leaves a whole checkpoint."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


# Training -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.resume and args.out.exists() and any(args.out.iterdir()):
        raise FileExistsError(
            f"--out {args.out} is not empty: continue its run by --resume, or choose another folder"
        )
    train_batches, test_batches = Batches(args, train=True), Batches(args, train=False)
    torch.manual_seed(1000 * args.seed)
    student = make_model(args, args.model)
    teacher = None
    if args.loss != "ce":
        teacher = make_model(args, args.teacher, args.teacher_checkpoint)
        teacher.eval().requires_grad_(False)
    optimizer = SGD(
        student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    schedule = make_schedule(optimizer, args.epochs)
    device = torch.device(args.device).type
    autocast = torch.autocast(device, AMP.get(args.amp), enabled=args.amp is not None)
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "fp16")
    criterion = partial(
        loss_function,
        args.loss,
        temperature=args.temperature,
        alpha=args.alpha,
        hard_weight=args.hard_weight,
    )
    torch.backends.cudnn.benchmark = True

    last = args.out / "last.pt"
    options = options_of_run(args)
    rows: list[dict[str, float]] = []  # of the log, one an epoch
    if args.resume and last.exists():
        rows = resume(last, options, student, optimizer, scaler, schedule)
        print(f"resumed {last} after epoch {len(rows)}")
    args.out.mkdir(parents=True, exist_ok=True)

    if teacher is not None and len(rows) < args.epochs:
        accuracy = evaluate(teacher, test_batches, autocast)["test_accuracy"]
        print(f"{args.teacher}: test_accuracy {accuracy:.5g}", flush=True)
    for epoch in range(len(rows) + 1, args.epochs + 1):
        torch.manual_seed(1000 * args.seed + epoch)
        student.train()
        teacher_logits = None
        outputs = []  # read after the epoch, as reading earlier would wait for the device
        start = time.perf_counter()
        for images, labels in progress(train_batches, f"epoch {epoch}/{args.epochs}"):
            with autocast:
                if teacher is not None:
                    with torch.inference_mode():
                        teacher_logits = teacher(images)
                student_logits = student(images)
            loss = criterion(student_logits, teacher_logits, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            outputs.append((student_logits.detach(), teacher_logits, labels))

        row = {"epoch": epoch, "lr": schedule.get_last_lr()[0]}
        row |= train_statistics(criterion, args.temperature, outputs)
        row["images_per_second"] = len(train_batches.labels) / (time.perf_counter() - start)
        row |= evaluate(student, test_batches, autocast)
        rows.append(row)
        schedule.step()
        print(", ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
        write_log(args.out / "log.csv", rows)
        content = {
            "model": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "options": options,
            "rows": rows,
        }
        save(last, content)
    save_figure(args.out / "curves.png", rows)
    print(f"finished {len(rows)} epochs: log.csv, curves.png and last.pt are in {args.out}")


@torch.no_grad()
def train_statistics(
    criterion: Callable[..., Tensor],
    temperature: float,
    outputs: list[tuple[Tensor, Tensor | None, Tensor]],
) -> dict[str, float]:
    """Means over the images of an epoch. `soft` is the soft term without alpha * T^2 * weight."""
    students, teachers, labels = zip(*outputs)
    student_logits, target = torch.cat(students), torch.cat(labels)
    teacher_logits = None if teachers[0] is None else torch.cat(teachers)
    means = {"loss": criterion(student_logits, teacher_logits, target)}
    if teacher_logits is not None:
        terms = wsl_terms(student_logits, teacher_logits, target, temperature=temperature)
        means["hard"] = terms.student_ce.mean()
        means["soft"] = terms.soft.mean()
        means["weight"] = terms.weight.mean()
    means["train_accuracy"] = 100 * (student_logits.argmax(1) == target).float().mean()
    return {name: mean.item() for name, mean in means.items()}


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, autocast: torch.autocast) -> dict[str, float]:
    model.eval()
    with autocast:
        logits = torch.cat([model(images).float() for images, _ in batches])
    accuracy = 100 * (logits.argmax(1) == batches.labels).float().mean()
    loss = F.cross_entropy(logits, batches.labels)
    return {"test_accuracy": accuracy.item(), "test_loss": loss.item()}


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)


def save_figure(path: Path, rows: list[dict[str, float]]) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    plot(losses, rows, ("loss", "hard", "soft", "weight"))
    plot(accuracies, rows, ("train_accuracy", "test_accuracy"))
    losses.set_yscale("log")  # alpha * T^2 = 36 puts the loss far above its terms
    accuracies.set_ylabel("%")
    figure.savefig(path, dpi=150)


def plot(axes: Axes, rows: list[dict[str, float]], names: tuple[str, ...]) -> None:
    epochs = [row["epoch"] for row in rows]
    for name in names:
        if name in rows[0]:  # --loss ce has a loss alone
            axes.plot(epochs, [row[name] for row in rows], label=name.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.legend()


if __name__ == "__main__":
    main()
