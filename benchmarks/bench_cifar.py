"""An epoch of examples/cifar.py, whose data lives on the device, against a plain torchvision DataLoader loop.

    python benchmarks/bench_cifar.py

resnet32x4 -> resnet8x4 at batch 64 on 50 000 images of noise of CIFAR-100's shape. Networks, loss and optimizer are the
example's in both loops, which differ in where a batch comes from. They are run in turns, in pieces of an epoch. Prints
and writes benchmarks/results/<device>_cifar_epoch.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_loss import RESULTS, machine, show, write
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from weighted_soft_labels import wsl_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar
from cifar_models import MODELS

MEAN, STD = cifar.DATASETS["cifar100"][2:]
BATCH = 64

Batches = Iterator[tuple[Tensor, Tensor]]


def options(images: int, device: torch.device) -> argparse.Namespace:
    given = ("--loss", "ce", "--out", "unused", "--batch-size", BATCH, "--fake-data", images, "--device", device)
    return cifar.parse_args([str(option) for option in given])


def on_the_device(images: int, device: torch.device) -> Batches:
    """Epoch after epoch, as the example makes its batches."""
    batches = cifar.Batches(options(images, device), train=True)
    while True:
        yield from batches


class InMemory(Dataset[tuple[Tensor, int]]):
    """Images in memory, one at a time, as torchvision's CIFAR100 has them."""

    def __init__(self, images: Tensor, labels: Tensor, transform: transforms.Compose) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def from_a_loader(images: int, device: torch.device, workers: int) -> Batches:
    """As everybody writes it."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(
        InMemory(*cifar.load_split(options(images, device), train=True), transform),
        BATCH,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    while True:
        for batch, labels in loader:
            yield batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def train(batches: Batches, count: int, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.SGD) -> float:
    """Seconds for `count` steps."""
    begin = time.perf_counter()
    for images, labels in itertools.islice(batches, count):
        with torch.no_grad():
            taught = teacher(images)
        optimizer.zero_grad()
        wsl_loss(student(images), taught, labels, temperature=4.0, alpha=2.25).backward()
        optimizer.step()
    if next(student.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)

    student = MODELS["resnet8x4"](num_classes=100).to(device).train()
    teacher = MODELS["resnet32x4"](num_classes=100).to(device).eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=5e-4)
    sources = {
        "examples/cifar.py": on_the_device(args.images, device),
        f"DataLoader, {args.workers} workers": from_a_loader(args.images, device, args.workers),
    }
    times: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(args.turns + 1):
        for name, batches in sources.items():
            taken = train(batches, args.steps, student, teacher, optimizer)
            if turn:  # the first warms up
                times[name].append(taken / args.steps)
    epoch = {name: statistics.median(taken) * args.images / BATCH for name, taken in times.items()}
    rows = [
        {
            "data": name,
            "epoch_s": round(seconds, 2),
            "images_per_s": round(args.images / seconds, 1),
            "time_over_example": round(seconds / epoch["examples/cifar.py"], 3),
            "turns": args.turns,
            **machine(device.type),
        }
        for name, seconds in epoch.items()
    ]
    show(rows, "an epoch, resnet32x4 -> resnet8x4, batch 64", list(rows[0])[:5])
    write(rows, args.out / f"{device.type}_cifar_epoch.csv")


if __name__ == "__main__":
    main()
