"""Time and memory of the WSL loss, forward + backward, against what it replaces.

All providers are interleaved in one process, so that what else the machine does meets them alike; compare the
ratios of one run, not microseconds of two. Run `python benchmarks/bench_loss.py`; the table is printed and appended
as CSV, one row a shape and provider, with the hardware and the versions on every row.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from weighted_soft_labels import wsl_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

BURST_SECONDS = 0.01

SHAPES = {
    "CIFAR-100": (128, 100),
    "ImageNet": (256, 1000),
    "ImageNet, large batch": (4096, 1000),
    "ImageNet-21k": (512, 21841),
    "LLM vocabulary": (1024, 32000),
}


def official(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The formula of the paper's ImageNet script (T = 2, alpha = 2.5), operator by operator as its users run it."""
    temperature, alpha = 2.0, 2.5
    soft = -torch.sum(
        torch.softmax(teacher / temperature, 1) * torch.log_softmax(student / temperature, 1), 1, keepdim=True
    )
    one_hot = F.one_hot(target, student.shape[1]).float()
    student_ce = -torch.sum(one_hot * torch.log_softmax(student.detach(), 1), 1, keepdim=True)
    teacher_ce = -torch.sum(one_hot * torch.log_softmax(teacher.detach(), 1), 1, keepdim=True)
    ratio = torch.max(student_ce / (teacher_ce + 1e-7), torch.zeros(1, device=student.device))
    weight = 1 - torch.exp(-ratio)
    return F.cross_entropy(student, target) + alpha * temperature**2 * torch.mean(weight * soft)


def cross_entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The plain loss, which never looks at the teacher: less work than any distillation."""
    return F.cross_entropy(student, target)


def providers() -> dict[str, Loss]:
    # One compiled function a shape, as a training run has: no provider is measured with guards for dynamic shapes.
    torch._dynamo.reset()
    return {
        "official": official,
        "official, compiled": torch.compile(official, dynamic=False),
        "cross_entropy": cross_entropy,
        "cross_entropy, compiled": torch.compile(cross_entropy, dynamic=False),
        "wsl_loss": wsl_loss,
        "wsl_loss, compiled": torch.compile(wsl_loss, fullgraph=True, dynamic=False),
    }


def step(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor) -> None:
    student.grad = None
    loss(student, teacher, target).backward()


def measure(losses: dict[str, Loss], inputs: tuple[Tensor, Tensor, Tensor], seconds: float) -> dict[str, list[float]]:
    """Seconds a step of every provider, taken in turns.

    A turn is a burst of steps: where one takes microseconds, a single step would measure how cold the others have
    left the caches, which is not what a training loop sees.
    """
    times: dict[str, list[float]] = {name: [] for name in losses}
    bursts = {}
    for name, loss in losses.items():
        for _ in range(5):
            start = time.perf_counter()
            step(loss, *inputs)
        bursts[name] = max(1, round(BURST_SECONDS / (time.perf_counter() - start)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["wsl_loss"]) < 7:
        for name, loss in losses.items():
            start = time.perf_counter()
            for _ in range(bursts[name]):
                step(loss, *inputs)
            times[name].append((time.perf_counter() - start) / bursts[name])
    return times


def peak_bytes(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> int:
    """Most resident memory above the inputs during a step, from the kernel's high-water mark (Linux)."""
    inputs[0].grad = None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(loss, *inputs)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="time to spend on each shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    for name in args.shapes:
        n, classes = SHAPES[name]
        generator = torch.Generator().manual_seed(0)
        student = (3 * torch.randn(n, classes, generator=generator)).requires_grad_()
        teacher = 3 * torch.randn(n, classes, generator=generator)
        inputs = (student, teacher, torch.randint(classes, (n,), generator=generator))
        losses = providers()
        times = measure(losses, inputs, args.seconds)
        median = {provider: statistics.median(taken) for provider, taken in times.items()}
        print(f"\n{name} {n}x{classes}: microseconds a step, times faster than, peak memory in logits tensors")
        print(f"{'':23s} {'p20':>10s} {'p50':>10s} {'p80':>10s} {'official':>10s} {'compiled':>10s} {'peak':>6s}")
        for provider, taken in times.items():
            p20, _, _, p80 = (1e6 * quantile for quantile in statistics.quantiles(taken, n=5))
            peak = peak_bytes(losses[provider], inputs) / (student.numel() * student.element_size())
            row = {
                "shape": name,
                "n": n,
                "classes": classes,
                "dtype": "float32",
                "provider": provider,
                "rounds": len(taken),
                "p20_us": round(p20, 1),
                "p50_us": round(1e6 * median[provider], 1),
                "p80_us": round(p80, 1),
                "speedup_over_official": round(median["official"] / median[provider], 2),
                "speedup_over_compiled_official": round(median["official, compiled"] / median[provider], 2),
                "peak_logits": round(peak, 2),
                "device": hardware(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "commit": commit(),
            }
            rows.append(row)
            columns = ("p20_us", "p50_us", "p80_us", "speedup_over_official", "speedup_over_compiled_official")
            print(f"{provider:23s} " + " ".join(f"{row[column]:10}" for column in columns) + f" {row['peak_logits']:6}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{hardware()}; torch {torch.__version__}; {commit()}; written to {args.out}")


if __name__ == "__main__":
    main()
