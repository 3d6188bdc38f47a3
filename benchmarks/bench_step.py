"""The share of the loss in a whole training step; on a GPU also the first step of a process.

    python benchmarks/bench_step.py

A training step is SGD with the teacher's forward pass. Each loss is also measured by itself, on the
same logits. `measuring.py` has the rules of measuring and refusing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

import torch
from bench_loss import LOSSES, THREADS, Loss, step_of
from measuring import (
    ROOT,
    Row,
    Step,
    folder,
    machine,
    measure,
    percentile_20,
    publish,
    show,
    spread,
)
from torch import Tensor, nn

CIFAR, IMAGENET = "CIFAR-100, resnet32x4 -> resnet8x4", "ImageNet, ResNet-34 -> ResNet-18"
COMPARED = ("official", "distillation", "wsl_loss")


def networks(use: str, device: str) -> tuple[nn.Module, nn.Module, Tensor, int]:
    """Return student, teacher, a batch of images and the number of classes."""
    if use == CIFAR:
        sys.path.insert(0, str(ROOT / "examples"))
        from cifar_models import MODELS

        student, teacher = (MODELS[name](num_classes=100) for name in ("resnet8x4", "resnet32x4"))
        return student, teacher, torch.rand(64, 3, 32, 32), 100
    from torchvision.models import resnet18, resnet34

    return resnet18(), resnet34(), torch.rand(256 if device == "cuda" else 8, 3, 224, 224), 1000


def training_rows(use: str, device: str, seconds: float, common: Row) -> list[Row]:
    student, teacher, images, classes = networks(use, device)
    student = student.to(device, memory_format=torch.channels_last)
    teacher = teacher.to(device, memory_format=torch.channels_last)
    images = images.to(device, memory_format=torch.channels_last)
    target = torch.randint(classes, (len(images),), device=device)
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def logits() -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                teacher_logits = teacher(images)
            return student(images), teacher_logits

    def training(loss: Loss) -> Step:
        def step() -> None:
            optimizer.zero_grad()
            loss(*logits(), target).backward()
            optimizer.step()

        return step

    student_logits, teacher_logits = (x.detach().clone() for x in logits())
    student_logits.requires_grad_()
    steps = {f"step, {name}": training(LOSSES[name]) for name in COMPARED}
    for name in COMPARED:
        steps[f"loss, {name}"] = step_of(LOSSES[name], student_logits, teacher_logits, target)
    times, load = measure(steps, seconds)
    p20 = {name: percentile_20(bursts) for name, bursts in times.items()}
    return [
        {
            "use": use,
            "batch": len(images),
            "dtype": str(student_logits.dtype).removeprefix("torch."),
            "provider": name,
            "bursts": len(times[f"step, {name}"]),
            "step_ms": f"{1e3 * p20[f'step, {name}']:.3f}",
            "loss_us": f"{1e6 * p20[f'loss, {name}']:.1f}",
            "spread": f"{max(spread(times[f'{what}, {name}']) for what in ('step', 'loss')):.2f}",
            "load": f"{load:.3f}",
            "loss_share_of_step": f"{p20[f'loss, {name}'] / p20[f'step, {name}']:.4f}",
            "loss_speed_over_official": f"{p20['loss, official'] / p20[f'loss, {name}']:.2f}",
            **common,
        }
        for name in COMPARED
    ]


FIRST_STEP = """
import time, torch
student = torch.randn(256, 1000, device="cuda", requires_grad=True)
teacher, target = torch.randn(256, 1000, device="cuda"), torch.randint(1000, (256,), device="cuda")
torch.nn.functional.cross_entropy(student, target).backward()
torch.cuda.synchronize()
begin = time.perf_counter()
from weighted_soft_labels import wsl_loss
wsl_loss(student, teacher, target).backward()
torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def first_call_rows() -> list[Row]:
    """Time the first step of processes with an empty, then a full, Triton cache.

    The time includes the import of the package, but not the start of the GPU.
    """
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        for state in ("cold", "warm", "warm", "warm"):
            command = [sys.executable, "-c", FIRST_STEP]
            seconds = subprocess.check_output(command, text=True, env=environment)
            rows.append({"cache": state, "first_step_s": round(float(seconds), 3)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--out", type=folder, help="folder of the CSV file (benchmarks/results)")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    common = machine(args.device)
    print(*common.values(), sep=", ")
    rows = []
    for use in (CIFAR, IMAGENET):
        rows += training_rows(use, args.device, 30.0, common)
    show(rows, "a training step", list(rows[0])[: -len(common)])
    if args.device == "cuda":
        show(first_call_rows(), "the first step of a process", ["cache", "first_step_s"])
    return publish(rows, f"{args.device}_training_step.csv", args.out)


if __name__ == "__main__":
    sys.exit(main())
