"""Time and memory from hidden states to the loss, forward + backward.

    python benchmarks/bench_linear.py
    python benchmarks/bench_linear.py --seconds 1 --out /tmp/try    # a quick look

On a CPU under Linux with two threads. Providers:

    linear_wsl_loss         hidden states of both models to the loss and all gradients, in chunks
    linear + wsl_loss       F.linear twice, then the loss: keeps all logits and their gradient
    linear_cross_entropy    F.linear_cross_entropy in chunks, if torch has it: the student alone
    liger jsd, its version  Liger's fused linear JSD on torch operators, if `liger_kernel` is
                            installed: no weight

Memory is the peak above the inputs and the returned gradients. The unit is all logits in float32,
N x C x 4 bytes, for every dtype: in bfloat16 the weight's gradient is summed in float32, too. In
bfloat16 only linear_wsl_loss is measured, because without bfloat16 instructions one step of the
others takes minutes. `measuring.py` has the rules of measuring and refusing.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

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
from weighted_soft_labels.linear import linear_wsl_loss

ROWS, WIDTH, CLASSES, THREADS = 2048, 256, 64000, 2
OURS, UNFUSED = "linear_wsl_loss", "linear + wsl_loss"
DTYPES = ("float32", "bfloat16")


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weight, teacher_x, teacher_weight = (
        torch.randn(shape, generator=generator) for shape in ((ROWS, WIDTH), (CLASSES, WIDTH)) * 2
    )
    x, teacher_x = x.to(dtype), teacher_x.to(dtype)
    weight = (weight / WIDTH**0.5).to(dtype)
    teacher_weight = (teacher_weight / WIDTH**0.5).to(dtype)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), teacher_x, teacher_weight, target


def providers(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, target: Tensor
) -> dict[str, Step]:
    losses: dict[str, Any] = {
        OURS: lambda: linear_wsl_loss(x, weight, teacher_x, teacher_weight, target)
    }
    if x.dtype != torch.float32:
        return {OURS: step_of(losses[OURS], x, weight)}
    losses[UNFUSED] = lambda: wsl_loss(
        F.linear(x, weight), F.linear(teacher_x, teacher_weight), target
    )
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        losses["linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            x, weight, target, options=options
        )
    if find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        jsd = LigerFusedLinearJSDLoss(compiled=False)
        losses[f"liger jsd {version('liger-kernel')}"] = lambda: jsd(
            x, weight, teacher_x, teacher_weight, target
        )
    return {name: step_of(loss, x, weight) for name, loss in losses.items()}


def step_of(loss: Any, x: Tensor, weight: Tensor) -> Step:
    def step() -> None:
        x.grad = weight.grad = None
        loss().backward()

    return step


def rows_of(dtype: str, seconds: float, common: Row) -> list[Row]:
    x, weight, *others = inputs(getattr(torch, dtype))
    steps = providers(x, weight, *others)
    returned = x.numel() * x.element_size() + weight.numel() * weight.element_size()
    peaks = {}
    for name, step in steps.items():
        for _ in range(2):  # the first step also starts threads and libraries; the second counts
            x.grad = weight.grad = None
            peaks[name] = (peak_bytes(step, x, "cpu") - returned) / (4 * ROWS * CLASSES)
    times, load = measure(steps, seconds)
    p20 = {name: percentile_20(bursts) for name, bursts in times.items()}
    return [
        {
            "use": "LLM vocabulary",
            "shape": f"{ROWS}x{WIDTH}x{CLASSES}",
            "dtype": dtype,
            "provider": name,
            "bursts": len(times[name]),
            "p20_ms": f"{1e3 * p20[name]:.0f}",
            "spread": f"{spread(times[name]):.2f}",
            "load": f"{load:.3f}",
            "time_over_unfused": f"{p20[name] / p20[UNFUSED]:.2f}" if UNFUSED in p20 else "",
            "peak_float32_logits": f"{peaks[name]:.3f}",
            **common,
        }
        for name in steps
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these; needs --out")
    parser.add_argument("--seconds", type=float, help="per dtype, default 60; needs --out")
    parser.add_argument("--out", type=folder, help="folder of the CSV file (benchmarks/results)")
    args = parser.parse_args()
    if (args.dtypes or args.seconds) and not args.out:
        parser.error("--dtypes and --seconds need --out: benchmarks/results holds whole runs")
    torch.set_num_threads(THREADS)
    common = machine("cpu")
    print(*common.values(), sep=", ")
    rows = []
    for dtype in args.dtypes or DTYPES:
        measured = rows_of(dtype, args.seconds or 60.0, common)
        title = f"{dtype}, others took {measured[0]['load']} of the CPU time"
        show(measured, title, list(measured[0])[: -len(common)])
        rows += measured
    return publish(rows, "cpu_linear.csv", args.out)


if __name__ == "__main__":
    sys.exit(main())
