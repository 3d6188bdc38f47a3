"""Time and memory of the losses from a cached teacher, forward + backward, and the cache's bytes.

    python benchmarks/bench_cached.py
    python benchmarks/bench_cached.py --seconds 1 --out /tmp/try            # a look

On a CPU under Linux with two threads, float32, T = 1, k = 64. Providers:

    cached_wsl_loss          the student's logits and a cache of k classes per row
    cross_entropy            F.cross_entropy of the same logits: no teacher
    wsl_loss                 with the teacher's logits, which have to be computed or read as well
    cached_linear_wsl_loss   hidden states of the student and a cache
    linear_wsl_loss          hidden states of both models

Memory is the peak above the inputs, in tensors of float32 logits (N x C x 4 bytes). From hidden
states, the returned gradients do not count. `bytes_per_row` is what one row of the teacher takes:
of the cache, of dense float16 logits, or of float16 hidden states of width 4096. Measured, written
and refused as in bench_loss.py: see `measuring.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import (
    Row,
    Step,
    folder,
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
from weighted_soft_labels.cached import (
    CachedTeacher,
    cached_linear_wsl_loss,
    cached_wsl_loss,
    compress,
)
from weighted_soft_labels.linear import linear_wsl_loss

THREADS, K, HIDDEN = 2, 64, 4096
LOGITS = ((1024, 32000), (512, 128256))
LINEAR = (2048, 256, 64000)


def bytes_per_row(cached: CachedTeacher) -> int:
    rows = cached.label_log_prob.numel()
    return sum(x.numel() * x.element_size() for x in cached) // rows


def print_sizes(classes: int) -> None:
    """What a store holds per token; speed does not enter."""
    logits, target = torch.randn(4, classes), torch.zeros(4).long()
    sizes = {
        f"cache, k = {k}": bytes_per_row(compress(logits, target, k, temperature=1.0))
        for k in (16, 64, 128)
    }
    sizes |= {"dense float16": 2 * classes, f"hidden states, H = {HIDDEN}": 2 * HIDDEN}
    print(f"\nbytes per token, {classes} classes")
    for name, size in sizes.items():
        print(f"{name:>24} {size:>8}", flush=True)


def logits_steps(rows: int, classes: int) -> tuple[dict[str, Step], list[Tensor], dict[str, int]]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    target = torch.randint(classes, (rows,), generator=generator)
    cached = compress(teacher, target, K, temperature=1.0)
    student.requires_grad_()
    losses = {
        "cached_wsl_loss": lambda: cached_wsl_loss(student, cached, target, temperature=1.0),
        "cross_entropy": lambda: F.cross_entropy(student, target),
        "wsl_loss": lambda: wsl_loss(student, teacher, target, temperature=1.0),
    }
    sizes = {"cached_wsl_loss": bytes_per_row(cached), "wsl_loss": 2 * classes}
    return steps_of(losses, [student]), [student], sizes


def linear_steps(
    rows: int, width: int, classes: int
) -> tuple[dict[str, Step], list[Tensor], dict[str, int]]:
    generator = torch.Generator().manual_seed(0)
    x, teacher_x = (torch.randn(rows, width, generator=generator) for _ in range(2))
    weight, teacher_weight = (
        torch.randn(classes, width, generator=generator) / width**0.5 for _ in range(2)
    )
    target = torch.randint(classes, (rows,), generator=generator)
    with torch.no_grad():
        cached = compress(F.linear(teacher_x, teacher_weight), target, K, temperature=1.0)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    losses = {
        "cached_linear_wsl_loss": lambda: cached_linear_wsl_loss(
            x, weight, cached, target, temperature=1.0
        ),
        "linear_wsl_loss": lambda: linear_wsl_loss(
            x, weight, teacher_x, teacher_weight, target, temperature=1.0
        ),
    }
    sizes = {"cached_linear_wsl_loss": bytes_per_row(cached), "linear_wsl_loss": 2 * HIDDEN}
    return steps_of(losses, leaves), leaves, sizes


def steps_of(losses: dict[str, Callable[[], Tensor]], leaves: list[Tensor]) -> dict[str, Step]:
    def step_of(loss: Callable[[], Tensor]) -> Step:
        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss().backward()

        return step

    return {name: step_of(loss) for name, loss in losses.items()}


def peak_logits(step: Step, leaves: list[Tensor], logits: int) -> float:
    returned = sum(x.nbytes for x in leaves) if len(leaves) > 1 else 0
    for _ in range(2):  # the first also starts threads and libraries
        for leaf in leaves:
            leaf.grad = None
        peak = peak_bytes(step, leaves[0], "cpu") - returned
    return peak / (4 * logits)


def rows_of(shape: tuple[int, ...], seconds: float, common: Row) -> list[Row]:
    linear = len(shape) == 3
    steps, leaves, sizes = linear_steps(*shape) if linear else logits_steps(*shape)
    logits = shape[0] * shape[-1]
    peaks = {name: peak_logits(step, leaves, logits) for name, step in steps.items()}
    times, load = measure(steps, seconds)
    low = {name: percentile_20(taken) for name, taken in times.items()}
    base = low["linear_wsl_loss" if linear else "cross_entropy"]
    return [
        {
            "use": "LLM vocabulary",
            "shape": "x".join(map(str, shape)),
            "dtype": "float32",
            "provider": name,
            "bursts": len(times[name]),
            "p20_ms": f"{1e3 * low[name]:.1f}",
            "spread": f"{spread(times[name]):.2f}",
            "load": f"{load:.3f}",
            "time_over_base": f"{low[name] / base:.2f}",
            "peak_float32_logits": f"{peaks[name]:.3f}",
            "bytes_per_row": sizes.get(name, ""),
            **common,
        }
        for name in steps
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, help="to measure each shape for, default 60; needs --out"
    )
    parser.add_argument(
        "--out", type=folder, help="folder of the CSV file, instead of benchmarks/results"
    )
    args = parser.parse_args()
    if args.seconds and not args.out:
        parser.error("--seconds needs --out: benchmarks/results holds whole runs")
    torch.set_num_threads(THREADS)
    common = machine("cpu")
    print(*common.values(), sep=", ")
    rows = []
    for shape in (*LOGITS, LINEAR):
        print_sizes(shape[-1])
        measured = rows_of(shape, args.seconds or 60.0, common)
        title = f"{measured[0]['shape']}, others took {measured[0]['load']} of the CPU time"
        show(measured, title, list(measured[0])[: -len(common)])
        rows += measured
    return publish(rows, "cpu_cached.csv", args.out)


if __name__ == "__main__":
    sys.exit(main())
