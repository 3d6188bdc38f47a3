"""Knowledge distillation on CIFAR-100, CIFAR-10 or Fashion-MNIST, by Hinton's loss or by Weighted Soft Labels.

    pip install "weighted-soft-labels[examples]"
    python cifar.py --loss ce --model resnet32x4 --out runs/teacher --download      # a teacher
    python cifar.py --teacher-checkpoint runs/teacher/last.pt --out runs/wsl        # resnet32x4 -> resnet8x4
    python cifar.py --teacher-checkpoint runs/teacher/last.pt --out runs/kd --loss kd
    python cifar.py --loss ce --out runs/ce                                         # the student alone

    ce   cross-entropy with the labels
    kd   hard_weight * CE + alpha * T^2 * KL(teacher || student), Hinton et al. 2015: the same weight for every image
    wsl  hard_weight * CE + alpha * T^2 * weight * soft cross-entropy, `weighted_soft_labels.wsl_loss`

The defaults are the CIFAR-100 settings of the WSL paper: T = 4, alpha = 2.25, and CRD's schedule of 240 epochs. The
learning rate, 0.05, or 0.01 for MobileNetV2 and the ShuffleNets, is divided by 10 after 5/8, 6/8 and 7/8 of --epochs.
RepDistiller's teachers load (--teacher-checkpoint ckpt_epoch_240.pth), and --loss kd --hard-weight 0.1 --alpha 0.9 is
the KD of its tables. --out gets log.csv (a row an epoch), curves.png and last.pt, whose entry "model" is a state dict
for cifar_models.py.

What is random in an epoch follows from --seed and the epoch's number. So a run that was killed goes on after its last
whole epoch if the same command is given with --resume, and on a CPU it ends with the same bits.

Accuracy after 240 epochs: not measured.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar_models import MODELS
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD
from torchvision import datasets
from tqdm import tqdm

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms

DATASETS = {  # torchvision's name, classes, mean and standard deviation of the channels; CIFAR-100's are RepDistiller's
    "cifar100": ("CIFAR100", 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ("CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion-mnist": ("FashionMNIST", 10, (0.2860,) * 3, (0.3530,) * 3),
}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAY_CHANGE = (
    "data",
    "download",
    "out",
    "resume",
    "epochs",
    "device",
    "amp",
    "channels_last",
    "compile",
)  # in a run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("--dataset", choices=DATASETS, default="cifar100")
    option(
        "--data",
        type=Path,
        default="data",
        help="folder of torchvision's datasets, or of Debian's Fashion-MNIST",
    )
    option("--download", action="store_true", help="the dataset into --data")
    option(
        "--fake-data",
        type=int,
        nargs="?",
        const=2000,
        metavar="N",
        help="train and test on N images of noise",
    )

    option(
        "--model",
        choices=MODELS,
        default="resnet8x4",
        metavar="NAME",
        help="to train; from cifar_models.py",
    )
    option(
        "--teacher",
        choices=MODELS,
        default="resnet32x4",
        metavar="NAME",
        help="model of --teacher-checkpoint",
    )
    option(
        "--teacher-checkpoint",
        type=Path,
        metavar="FILE",
        help="{'model': state_dict}, for kd and wsl",
    )
    option("--loss", choices=("ce", "kd", "wsl"), default="wsl", help="ce needs no teacher")
    option("--temperature", type=float, default=4.0, help="of the soft term")
    option("--alpha", type=float, default=2.25, help="scale of the soft term")
    option(
        "--hard-weight", type=float, default=1.0, help="scale of the cross-entropy in kd and wsl"
    )

    option("--epochs", type=int, default=240, help="in all")
    option("--batch-size", type=int, default=64, help="images a step")
    option("--lr", type=float, help="0.05, or 0.01 for MobileNetV2 and the ShuffleNets")
    option("--momentum", type=float, default=0.9, help="of SGD")
    option("--weight-decay", type=float, default=5e-4, help="of all parameters")
    option("--seed", type=int, default=0, help="of initialisation, order and augmentation")

    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch")
    option("--amp", choices=AMP, help="mixed precision")
    option("--channels-last", action="store_true", help="memory format of the networks")
    option("--compile", action="store_true", help="the networks, by torch.compile")
    option("--out", type=Path, required=True, help="folder of this run")
    option(
        "--resume", action="store_true", help="continue the run in --out; start it if there is none"
    )
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 0.01 if args.model.startswith(("MobileNet", "Shuffle")) else 0.05
    if (args.loss == "ce") != (args.teacher_checkpoint is None):
        parser.error("--loss kd and wsl need a --teacher-checkpoint, ce takes none")
    return args


# Data: uint8, all of it on the device, cropped and flipped there ----------------------------------------------------


def load_split(args: argparse.Namespace, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 1 or 3, 32, 32), uint8, and labels (N,), int64."""
    name, classes, _, _ = DATASETS[args.dataset]
    if args.fake_data:
        noise = torch.Generator().manual_seed(int(train))
        images = torch.randint(256, (args.fake_data, 3, 32, 32), generator=noise, dtype=torch.uint8)
        return images, torch.randint(classes, (args.fake_data,), generator=noise)
    prefix = "train" if train else "t10k"
    files = [
        args.data / f"{prefix}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")
    ]  # Debian's
    try:
        if args.dataset == "fashion-mnist" and files[0].exists():
            contents = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
            images, labels = (torch.frombuffer(content, dtype=torch.uint8) for content in contents)
            images, labels = images[16:].view(-1, 28, 28), labels[8:]
        else:
            split = getattr(datasets, name)(args.data, train=train, download=args.download)
            images, labels = torch.as_tensor(split.data), torch.as_tensor(split.targets)
    except (OSError, EOFError, RuntimeError) as error:
        raise RuntimeError(
            f"cannot read {args.dataset} in {str(args.data)!r}; --download puts it there"
        ) from error
    images = (
        images.permute(0, 3, 1, 2) if images.ndim == 4 else F.pad(images[:, None], (2, 2, 2, 2))
    )
    return images, labels.long()


class Batches:
    """An epoch of images (B, 3, 32, 32), float32, normalised, and labels (B,), on the device.

    For training in a random order, each image cropped at random from its frame of 4 black pixels, and flipped or not.
    """

    def __init__(self, args: argparse.Namespace, train: bool) -> None:
        images, self.labels = (x.to(args.device) for x in load_split(args, train))
        # A view of every crop, (N, channels, 9, 9, 32, 32). Indexing it copies rows of pixels, not single ones.
        self.crops = F.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)
        self.mean, self.std = 255 * torch.tensor(
            DATASETS[args.dataset][2:], device=args.device
        ).view(2, 3, 1, 1)
        self.train, self.batch_size = train, args.batch_size if train else 500

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.labels)
        if self.train:
            plan = torch.stack(
                [torch.randperm(n), *torch.randint(9, (2, n)), torch.randint(2, (n,))]
            )
        else:
            plan = torch.stack([torch.arange(n), *torch.tensor([[4], [4], [0]]).expand(3, n)])
        for index, top, left, flip in plan.to(self.labels.device).split(self.batch_size, dim=1):
            images = self.crops[index, :, top, left]
            images = torch.where(flip.bool()[:, None, None, None], images.flip(-1), images)
            yield (images - self.mean) / self.std, self.labels[index]


# Models and loss ----------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # RepDistiller's hold one
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is cut off raises one of many kinds, without its name
        raise ValueError(f"{str(path)!r} is not a readable checkpoint") from error


def make_model(args: argparse.Namespace, name: str, checkpoint: Path | None = None) -> nn.Module:
    classes = DATASETS[args.dataset][1]
    model = MODELS[name](num_classes=classes)
    if checkpoint is not None:
        try:
            model.load_state_dict(load(checkpoint)["model"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{str(checkpoint)!r} does not hold a {name} for {classes} classes"
            ) from error
    if args.compile:
        model.compile(dynamic=False)
    return model.to(
        args.device,
        memory_format=torch.channels_last if args.channels_last else torch.preserve_format,
    )


def loss_function(
    args: argparse.Namespace, student: Tensor, teacher: Tensor | None, labels: Tensor
) -> Tensor:
    """Of logits (B, C) of student and teacher."""
    T, alpha, hard_weight = args.temperature, args.alpha, args.hard_weight
    if args.loss == "wsl":
        return wsl_loss(
            student, teacher, labels, temperature=T, alpha=alpha, hard_weight=hard_weight
        )
    hard = F.cross_entropy(student.float(), labels)
    if args.loss == "ce":
        return hard
    log_student, log_teacher = (
        F.log_softmax(logits.float() / T, dim=1) for logits in (student, teacher)
    )
    soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return hard_weight * hard + alpha * T**2 * soft


# Training -----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    train_batches, test_batches = Batches(args, train=True), Batches(args, train=False)
    torch.manual_seed(1000 * args.seed)
    student, teacher = make_model(args, args.model), None
    if args.loss != "ce":
        teacher = (
            make_model(args, args.teacher, args.teacher_checkpoint).eval().requires_grad_(False)
        )
    optimizer = SGD(
        student.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    device = torch.device(args.device).type
    autocast = torch.autocast(device, AMP.get(args.amp), enabled=args.amp is not None)
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "fp16")
    torch.backends.cudnn.benchmark = True

    rows: list[dict[str, float]] = []  # of the log, one an epoch
    last = args.out / "last.pt"
    options = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    if teacher is not None:  # by its content, as the file may move
        options["teacher_checkpoint"] = hashlib.sha256(
            args.teacher_checkpoint.read_bytes()
        ).hexdigest()
    if args.resume and last.exists():
        checkpoint = load(last)
        for name, value in options.items():
            if checkpoint["options"][name] != value:
                raise ValueError(
                    f"{str(last)!r} was trained with {name} = {checkpoint['options'][name]}, not {value}"
                )
        student.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty if it was not fp16
            scaler.load_state_dict(checkpoint["scaler"])
        rows = checkpoint["rows"]
    elif not args.resume and args.out.exists() and any(args.out.iterdir()):
        raise FileExistsError(
            f"{str(args.out)!r} is not empty: --resume continues its last.pt; or choose another one"
        )
    args.out.mkdir(parents=True, exist_ok=True)

    if teacher is not None:
        print(
            f"{args.teacher}: test_accuracy {evaluate(teacher, test_batches, autocast)['test_accuracy']:.5g}"
        )
    for epoch in range(len(rows) + 1, args.epochs + 1):
        torch.manual_seed(1000 * args.seed + epoch)
        lr = args.lr * 0.1 ** sum(8 * (epoch - 1) >= eighths * args.epochs for eighths in (5, 6, 7))
        for group in optimizer.param_groups:
            group["lr"] = lr
        student.train()
        outputs, teacher_logits, start = [], None, time.perf_counter()
        for images, labels in tqdm(
            train_batches, f"epoch {epoch}/{args.epochs}", leave=False, disable=None
        ):
            with autocast:
                if teacher is not None:
                    with torch.inference_mode():
                        teacher_logits = teacher(images)
                student_logits = student(images)
            loss = loss_function(args, student_logits, teacher_logits, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            outputs.append(
                (student_logits.detach(), teacher_logits, labels)
            )  # looked at after the epoch: no waiting

        row = {"epoch": epoch, "lr": lr, **train_statistics(args, outputs)}
        row["images_per_second"] = len(train_batches.labels) / (time.perf_counter() - start)
        rows.append({**row, **evaluate(student, test_batches, autocast)})
        print(", ".join(f"{name} {value:.5g}" for name, value in rows[-1].items()), flush=True)
        write_log(args.out / "log.csv", rows)
        state = {
            "model": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        torch.save({**state, "options": options, "rows": rows}, last.with_suffix(".tmp"))
        os.replace(
            last.with_suffix(".tmp"), last
        )  # so that last.pt is whole whenever the process is killed
    save_figure(args.out / "curves.png", rows)


@torch.no_grad()
def train_statistics(
    args: argparse.Namespace, outputs: list[tuple[Tensor | None, ...]]
) -> dict[str, float]:
    """Means over the images of an epoch. `soft` comes before its scale, alpha * T^2 * weight."""
    student, teacher, labels = (
        None if parts[0] is None else torch.cat(parts) for parts in zip(*outputs)
    )
    means = {"loss": loss_function(args, student, teacher, labels)}
    if teacher is not None:
        terms = wsl_terms(student, teacher, labels, temperature=args.temperature)
        means |= {
            "hard": terms.student_ce.mean(),
            "soft": terms.soft.mean(),
            "weight": terms.weight.mean(),
        }
    means["train_accuracy"] = 100 * (student.argmax(1) == labels).float().mean()
    return {name: mean.item() for name, mean in means.items()}


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, autocast: torch.autocast) -> dict[str, float]:
    model.eval()
    with autocast:
        logits = torch.cat([model(images).float() for images, _ in batches])
    accuracy = 100 * (logits.argmax(1) == batches.labels).float().mean()
    return {
        "test_accuracy": accuracy.item(),
        "test_loss": F.cross_entropy(logits, batches.labels).item(),
    }


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)


def save_figure(path: Path, rows: list[dict[str, float]]) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, names in zip(
        (left, right), [("loss", "hard", "soft", "weight"), ("train_accuracy", "test_accuracy")]
    ):
        for name in [name for name in names if name in rows[0]]:
            axis.plot(
                [row["epoch"] for row in rows],
                [row[name] for row in rows],
                label=name.replace("_", " "),
            )
        axis.set_xlabel("epoch")
        axis.legend()
    left.set_yscale("log")  # alpha * T^2 = 36 sets the loss far above its terms
    right.set_ylabel("%")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
