"""Time and memory of the WSL loss, forward + backward, against what it replaces.

    python benchmarks/bench_loss.py                                   # all shapes of this device
    python benchmarks/bench_loss.py --shapes 64x100 --seconds 1 --out /tmp/try    # a quick look

Runs on a GPU if there is one, else on a CPU under Linux with two threads. Prints a table for each
shape. Writes one CSV file into benchmarks/results, with hardware, versions and commit on every row;
`plot.py` draws the figures from it.

Providers, and what they compute:

    official        the paper's formula, operator by operator, as its users run it
    distillation    F.cross_entropy + alpha * T^2 * F.kl_div: no weight, and no cross-entropy of
                    the teacher
    cross_entropy   F.cross_entropy alone, which reads no teacher
    wsl_loss        this package
    balanced        the same with balance=True, which computes the weights once more
    liger           distillation by Liger's operators, on a GPU if `liger_kernel` is installed.
                    Liger writes the gradient over the logits, so it gets a copy; the time includes
                    the copy
    copy            one tensor of logits copied to another: the limit of the memory

The first five also run compiled, by torch.compile(fullgraph=True). "wsl_loss, graph" replays a CUDA
graph.

Each shape has its own process, in which the providers take turns, a burst of steps each. A time is
the 20th percentile of the bursts. A spread is the 80th percentile over the 20th. Ratios compare
compiled with compiled, and every other form with eager.

A run is refused if the machine is noisy or loaded, or if the checkout is not a clean commit. A
refused run prints its tables, writes nothing into benchmarks/results and exits with 1;
`measuring.py` has the rules. --out names a folder outside of the repository and accepts any run.

GB/s are ideal bytes over time, not bytes moved: a provider that reads the logits more often shows
fewer. The ideal is 3 tensors of logits for distillation (read both, write the gradient), and 2 for
cross-entropy and the copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from measuring import (
    Row,
    Step,
    folder,
    host_seconds,
    kernels,
    machine,
    measure,
    peak_bytes,
    percentile_20,
    publish,
    show,
    spread,
)
from torch import Tensor

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.backends import choose

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

TEMPERATURE, ALPHA = 2.0, 2.5  # the paper's ImageNet script
THREADS = 2

SHAPES = {  # shape of the logits: use
    "cpu": {
        "64x100": "CIFAR-100",
        "128x100": "CIFAR-100",
        "256x1000": "ImageNet",
        "4096x1000": "ImageNet, large batch",
        "512x21841": "ImageNet-21k",
        "1024x32000": "LLM vocabulary",
        "2x19x256x256": "segmentation",
    },
    "cuda": {
        "128x100": "CIFAR-100",
        "256x1000": "ImageNet",
        "65536x1000": "ImageNet, large batch",
        "4096x21841": "ImageNet-21k",
        "8192x32000": "LLM vocabulary, 32k",
        "4096x128256": "LLM vocabulary, 128k",
        "8x19x512x1024": "segmentation",
    },
}
DTYPES = ("float32", "bfloat16")


# --- the losses ---


def official(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The paper's ImageNet script, operator by operator."""
    soft_teacher = torch.softmax(teacher / TEMPERATURE, 1)
    log_soft_student = torch.log_softmax(student / TEMPERATURE, 1)
    soft = -torch.sum(soft_teacher * log_soft_student, 1, keepdim=True)
    one_hot = F.one_hot(target, student.shape[1]).movedim(-1, 1).float()
    student_ce = -torch.sum(one_hot * torch.log_softmax(student.detach(), 1), 1, keepdim=True)
    teacher_ce = -torch.sum(one_hot * torch.log_softmax(teacher.detach(), 1), 1, keepdim=True)
    ratio = torch.max(student_ce / (teacher_ce + 1e-7), torch.zeros(1, device=student.device))
    weight = 1 - torch.exp(-ratio)
    return F.cross_entropy(student, target) + ALPHA * TEMPERATURE**2 * torch.mean(weight * soft)


def distillation(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_student = F.log_softmax(student / TEMPERATURE, 1)
    probabilities = F.softmax(teacher / TEMPERATURE, 1)
    soft = F.kl_div(log_student, probabilities, reduction="batchmean")
    return F.cross_entropy(student, target) + ALPHA * TEMPERATURE**2 * soft


def cross_entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student, target)


def liger(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div

    log_student = F.log_softmax(student / TEMPERATURE, 1)
    probabilities = F.softmax(teacher / TEMPERATURE, 1)
    soft: Tensor = liger_kl_div(log_student, probabilities, reduction="batchmean")
    hard: Tensor = liger_cross_entropy(student.clone(), target)
    return hard + ALPHA * TEMPERATURE**2 * soft


LOSSES: dict[str, Loss] = {
    "official": official,
    "distillation": distillation,
    "cross_entropy": cross_entropy,
    "wsl_loss": wsl_loss,
    "balanced": partial(wsl_loss, balance=True),
}


def inputs(shape: str, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    size = [int(length) for length in shape.split("x")]
    student = 3 * torch.randn(size, generator=generator, device=device)
    teacher = 3 * torch.randn(size, generator=generator, device=device)
    index_shape = size[:1] + size[2:]
    target = torch.randint(size[1], index_shape, generator=generator, device=device)
    wanted = getattr(torch, dtype)
    return student.to(wanted).requires_grad_(), teacher.to(wanted), target


def step_of(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
    def step() -> None:
        student.grad = None
        loss(student, teacher, target).backward()

    return step


def graph_of(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor) -> Step:
    def step() -> None:
        torch.autograd.grad(loss(student, teacher, target), student)

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def providers(student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Step]:
    losses = dict(LOSSES)
    for name, loss in LOSSES.items():
        losses[f"{name}, compiled"] = torch.compile(loss, fullgraph=True, dynamic=False)
    if student.is_cuda and find_spec("liger_kernel") and student.dim() == 2:
        losses["liger"] = liger
    steps = {name: step_of(loss, student, teacher, target) for name, loss in losses.items()}
    if student.is_cuda:
        steps["wsl_loss, graph"] = graph_of(wsl_loss, student, teacher, target)
    destination = torch.empty_like(teacher)
    steps["copy"] = lambda: destination.copy_(teacher)
    return steps


# --- rows ---


def loss_rows(shape: str, dtype: str, device: str, seconds: float, common: Row) -> list[Row]:
    torch.set_num_threads(THREADS)
    student, teacher, target = inputs(shape, dtype, device)
    steps = providers(student, teacher, target)
    times, load = measure(steps, seconds)
    p20 = {provider: percentile_20(bursts) for provider, bursts in times.items()}
    backend = choose(student, teacher, target).__name__
    size = student.numel() * student.element_size()
    # Below 1 MiB, Linux's high-water mark counts pages, not tensors.
    shows_memory = device == "cuda" or size >= 2**20
    rows = []
    for provider, step in steps.items():
        form = ", compiled" if provider.endswith("compiled") else ""
        tensors = 2 if provider.startswith(("cross_entropy", "copy")) else 3
        formula = f"{tensors} tensors * {student.numel()} elements * {student.element_size()} bytes"
        time = p20[provider]
        rows.append(
            {
                "use": SHAPES[device][shape],
                "shape": shape,
                "dtype": dtype,
                "provider": provider,
                "implementation": backend if provider.startswith(("wsl_loss", "balanced")) else "",
                "bursts": len(times[provider]),
                "p20_us": f"{1e6 * time:.1f}",
                "spread": f"{spread(times[provider]):.2f}",
                "load": f"{load:.3f}",
                "time_over_cross_entropy": f"{time / p20['cross_entropy' + form]:.2f}",
                "speed_over_official": f"{p20['official' + form] / time:.2f}",
                "speed_over_distillation": f"{p20['distillation' + form] / time:.2f}",
                "peak_logits": f"{peak_bytes(step, student, device) / size:.2f}"
                if shows_memory
                else "",
                "ideal_bytes_formula": formula,
                "ideal_bytes": tensors * size,
                "gb_per_s": f"{tensors * size / time / 1e9:.1f}",
                "share_of_copy": f"{tensors / 2 * p20['copy'] / time:.3f}",
                "kernels": kernels(step) if device == "cuda" else "",
                "host_us": f"{1e6 * host_seconds(step):.1f}" if device == "cuda" else "",
                **common,
            }
        )
    return rows


COLUMNS = [
    "provider",
    "p20_us",
    "spread",
    "time_over_cross_entropy",
    "speed_over_official",
    "speed_over_distillation",
    "peak_logits",
    "gb_per_s",
]
GPU_COLUMNS = [*COLUMNS, "share_of_copy", "kernels", "host_us"]


def loss_table(shape: str, dtype: str, device: str, seconds: float, common: Row) -> list[Row]:
    """Measure in a new process, which shares neither memory nor compiled code with other shapes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        rows = pool.submit(loss_rows, shape, dtype, device, seconds, common).result()
    title = (
        f"{SHAPES[device][shape]} {shape} {dtype}, others took {rows[0]['load']} of the CPU time"
    )
    show(rows, title, GPU_COLUMNS if device == "cuda" else COLUMNS)
    return rows


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SHAPES, default=device)
    parser.add_argument("--shapes", nargs="+", help="only these; needs --out")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these; needs --out")
    parser.add_argument("--seconds", type=float, help="per shape, default 4; needs --out")
    parser.add_argument("--out", type=folder, help="folder of the CSV file (benchmarks/results)")
    args = parser.parse_args(argv)
    device, shapes = args.device, args.shapes or list(SHAPES[args.device])
    if unknown := set(shapes) - set(SHAPES[device]):
        parser.error(f"--shapes must be of {', '.join(SHAPES[device])}, got {', '.join(unknown)}")
    if (args.shapes or args.dtypes or args.seconds) and not args.out:
        parser.error(
            "--shapes, --dtypes and --seconds need --out: benchmarks/results holds whole runs"
        )
    torch.set_num_threads(THREADS)
    common = machine(device)
    print(*common.values(), sep=", ")
    rows = []
    for dtype in args.dtypes or DTYPES:
        for shape in shapes:
            rows += loss_table(shape, dtype, device, args.seconds or 4.0, common)
    return publish(rows, f"{device}.csv", args.out)


if __name__ == "__main__":
    sys.exit(main())
