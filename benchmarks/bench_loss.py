"""Time and memory of the WSL loss, forward + backward, against what it replaces.

    python benchmarks/bench_loss.py                                                       # all shapes of this device
    python benchmarks/bench_loss.py --shapes 64x100 --seconds 1 --out /tmp/try            # a look

On a GPU, where there is one, else on a CPU under Linux with two threads. Prints a table for every shape and writes all
as one CSV file into benchmarks/results, with hardware, versions and commit on every row; `plot.py` draws from it.

Providers, and what they compute:

    official        the paper's formula, operator by operator as its users run it
    distillation    F.cross_entropy + alpha * T^2 * F.kl_div, as plain distillation is written: no weight, and no
                    cross-entropy of the teacher
    cross_entropy   F.cross_entropy alone, which never looks at the teacher
    wsl_loss        this package
    liger           distillation by Liger's operators, on a GPU if `liger_kernel` is installed. It writes the gradient
                    over the logits and therefore gets a copy, whose time is included
    copy            one tensor of logits copied to another: the memory's limit

The first four also compiled, by torch.compile(fullgraph=True); "wsl_loss, graph" replays a CUDA graph.

Every shape has a process of its own, in which the providers take turns, a burst of steps each. A time is the low fifth
(20th percentile) of the bursts, its spread the 80th percentile over that. Ratios are between times of the same form:
compiled is compared with compiled, everything else with eager.

A run on a noisy or loaded machine, or of a checkout that is not a commit, is refused: tables are printed, nothing is
written into benchmarks/results, the exit status is 1 (`measuring.py` has the rules). --out, a folder outside of the
repository, is for trying out and takes any run; its rows say how noisy it was and whether the commit was "-dirty".

GB/s are ideal bytes over time, not bytes moved: a provider that passes over the logits more often shows fewer. Ideal
are 3 tensors of logits for distillation (both sets read, the gradient written), 2 for cross-entropy and for the copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
    low_fifth,
    machine,
    measure,
    peak_bytes,
    publish,
    show,
    spread,
)
from torch import Tensor

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.loss import implementation

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

TEMPERATURE, ALPHA = 2.0, 2.5  # of the paper's ImageNet script
THREADS = 2

SHAPES = {  # of the logits, and what they are used for
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


# The losses ---------------------------------------------------------------------------------------------------------


def official(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The formula of the paper's ImageNet script (T = 2, alpha = 2.5), operator by operator as its users run it."""
    soft = -torch.sum(
        torch.softmax(teacher / TEMPERATURE, 1) * torch.log_softmax(student / TEMPERATURE, 1),
        1,
        keepdim=True,
    )
    one_hot = F.one_hot(target, student.shape[1]).movedim(-1, 1).float()
    student_ce = -torch.sum(one_hot * torch.log_softmax(student.detach(), 1), 1, keepdim=True)
    teacher_ce = -torch.sum(one_hot * torch.log_softmax(teacher.detach(), 1), 1, keepdim=True)
    ratio = torch.max(student_ce / (teacher_ce + 1e-7), torch.zeros(1, device=student.device))
    weight = 1 - torch.exp(-ratio)
    return F.cross_entropy(student, target) + ALPHA * TEMPERATURE**2 * torch.mean(weight * soft)


def distillation(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_student, probabilities = (
        F.log_softmax(student / TEMPERATURE, 1),
        F.softmax(teacher / TEMPERATURE, 1),
    )
    soft = F.kl_div(log_student, probabilities, reduction="batchmean")
    return F.cross_entropy(student, target) + ALPHA * TEMPERATURE**2 * soft


def cross_entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student, target)


def liger(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div

    log_student, probabilities = (
        F.log_softmax(student / TEMPERATURE, 1),
        F.softmax(teacher / TEMPERATURE, 1),
    )
    soft: Tensor = liger_kl_div(log_student, probabilities, reduction="batchmean")
    hard: Tensor = liger_cross_entropy(student.clone(), target)
    return hard + ALPHA * TEMPERATURE**2 * soft


LOSSES: dict[str, Loss] = {
    "official": official,
    "distillation": distillation,
    "cross_entropy": cross_entropy,
    "wsl_loss": wsl_loss,
}


def inputs(shape: str, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    size = n, classes, *rest = [int(length) for length in shape.split("x")]
    student, teacher = (3 * torch.randn(size, generator=generator, device=device) for _ in range(2))
    target = torch.randint(classes, (n, *rest), generator=generator, device=device)
    return (
        student.to(getattr(torch, dtype)).requires_grad_(),
        teacher.to(getattr(torch, dtype)),
        target,
    )


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
    losses |= {
        f"{name}, compiled": torch.compile(x, fullgraph=True, dynamic=False)
        for name, x in LOSSES.items()
    }
    if student.is_cuda and find_spec("liger_kernel") and student.dim() == 2:
        losses["liger"] = liger
    steps = {name: step_of(loss, student, teacher, target) for name, loss in losses.items()}
    if student.is_cuda:
        steps["wsl_loss, graph"] = graph_of(wsl_loss, student, teacher, target)
    destination = torch.empty_like(teacher)
    return {**steps, "copy": lambda: destination.copy_(teacher)}


# Rows -----------------------------------------------------------------------------------------------------------------


def loss_rows(shape: str, dtype: str, device: str, seconds: float, common: Row) -> list[Row]:
    torch.set_num_threads(THREADS)
    student, teacher, target = inputs(shape, dtype, device)
    steps = providers(student, teacher, target)
    times, load = measure(steps, seconds)
    low = {provider: low_fifth(taken) for provider, taken in times.items()}
    size = student.numel() * student.element_size()
    visible = (
        device == "cuda" or size >= 2**20
    )  # under 1 MiB the high-water mark shows pages, not tensors
    rows = []
    for provider, step in steps.items():
        form = ", compiled" if provider.endswith("compiled") else ""
        tensors = 2 if provider.startswith(("cross_entropy", "copy")) else 3
        rows.append({
            "use": SHAPES[device][shape],
            "shape": shape,
            "dtype": dtype,
            "provider": provider,
            "implementation": implementation(student, teacher).__name__ if provider.startswith("wsl_loss") else "",
            "bursts": len(times[provider]),
            "p20_us": f"{1e6 * low[provider]:.1f}",
            "spread": f"{spread(times[provider]):.2f}",
            "load": f"{load:.3f}",
            "time_over_cross_entropy": f"{low[provider] / low['cross_entropy' + form]:.2f}",
            "speed_over_official": f"{low['official' + form] / low[provider]:.2f}",
            "speed_over_distillation": f"{low['distillation' + form] / low[provider]:.2f}",
            "peak_logits": f"{peak_bytes(step, student, device) / size:.2f}" if visible else "",
            "ideal_bytes_formula": f"{tensors} tensors * {student.numel()} elements * {student.element_size()} bytes",
            "ideal_bytes": tensors * size,
            "gb_per_s": f"{tensors * size / low[provider] / 1e9:.1f}",
            "share_of_copy": f"{tensors / 2 * low['copy'] / low[provider]:.3f}",
            "kernels": kernels(step) if device == "cuda" else "",
            "host_us": f"{1e6 * host_seconds(step):.1f}" if device == "cuda" else "",
            **common,
        })  # fmt: skip
    return rows


COLUMNS = [
    "provider", "p20_us", "spread", "time_over_cross_entropy", "speed_over_official", "speed_over_distillation",
    "peak_logits", "gb_per_s", "share_of_copy", "kernels", "host_us",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--device", choices=SHAPES, default=device)
    option("--shapes", nargs="+", help="only these; needs --out")
    option("--dtypes", nargs="+", choices=DTYPES, help="only these; needs --out")
    option("--seconds", type=float, help="to measure each shape for, default 4; needs --out")
    option("--out", type=folder, help="folder of the CSV file, instead of benchmarks/results")
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
            with ProcessPoolExecutor(
                1, get_context("spawn")
            ) as pool:  # memory and compiled code of no other shape
                found = pool.submit(
                    loss_rows, shape, dtype, device, args.seconds or 4.0, common
                ).result()
            title = f"{SHAPES[device][shape]} {shape} {dtype}, others took {found[0]['load']} of the CPU time"
            show(found, title, COLUMNS if device == "cuda" else COLUMNS[:-3])
            rows += found
    return publish(rows, f"{device}.csv", args.out)


if __name__ == "__main__":
    sys.exit(main())
