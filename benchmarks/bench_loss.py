"""Time and memory of the WSL loss, forward + backward, against what it replaces, and its share of a training step.

    python benchmarks/bench_loss.py

On a GPU, where there is one, else on the CPU with shapes that suit it. All providers of a shape are interleaved in one
process, so that what else the machine does meets them alike: compare the ratios of one run, not microseconds of two.
Tables are printed and written as CSV into benchmarks/results, with the hardware and the versions on every row;
`plot.py` draws from these files alone.

Providers, and what they compute:

    official        the paper's formula, operator by operator as its users run it
    cross_entropy   F.cross_entropy: the hard term alone, which never looks at the teacher
    liger           Liger's KL divergence and cross-entropy, if `liger_kernel` is installed (GPU only): neither the
                    teacher's cross-entropy nor the weight. Liger writes the gradient over the logits and therefore
                    gets a copy, whose time is included
    wsl_loss        this package
    copy            one tensor of logits copied to another, the memory's limit

each but the last also compiled by torch.compile (Liger is not); `graph` replays a CUDA graph of the same step.

GB/s are ideal bytes over time, not bytes moved: a provider that passes over the logits more often shows fewer. Ideal
are, for logits of b bytes an element, 3b for a distillation loss (both sets of logits read, the gradient written) and
2b for cross-entropy (logits read, gradient written) and for the copy (read, written).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighted_soft_labels import wsl_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], None]

TEMPERATURE, ALPHA = 2.0, 2.5  # of the paper's ImageNet script
RESULTS = Path(__file__).parent / "results"
BURST_SECONDS = 0.01


class Shape(NamedTuple):
    use: str
    logits: tuple[int, ...]

    def __str__(self) -> str:
        return "x".join(map(str, self.logits))


SHAPES = {
    "cpu": [
        Shape("CIFAR-100", (128, 100)),
        Shape("ImageNet", (256, 1000)),
        Shape("ImageNet, large batch", (4096, 1000)),
        Shape("ImageNet-21k", (512, 21841)),
        Shape("LLM vocabulary", (1024, 32000)),
    ],
    "cuda": [
        Shape("CIFAR-100", (128, 100)),
        Shape("ImageNet", (256, 1000)),
        Shape("ImageNet, large batch", (65536, 1000)),
        Shape("ImageNet-21k", (4096, 21841)),
        Shape("LLM vocabulary, 32k", (8192, 32000)),
        Shape("LLM vocabulary, 128k", (4096, 128256)),
        Shape("segmentation", (8, 19, 512, 1024)),
    ],
}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}


# The losses ---------------------------------------------------------------------------------------------------------


def official(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The formula of the paper's ImageNet script (T = 2, alpha = 2.5), operator by operator as its users run it."""
    soft = -torch.sum(
        torch.softmax(teacher / TEMPERATURE, 1) * torch.log_softmax(student / TEMPERATURE, 1), 1, keepdim=True
    )
    one_hot = F.one_hot(target, student.shape[1]).movedim(-1, 1).float()
    student_ce = -torch.sum(one_hot * torch.log_softmax(student.detach(), 1), 1, keepdim=True)
    teacher_ce = -torch.sum(one_hot * torch.log_softmax(teacher.detach(), 1), 1, keepdim=True)
    ratio = torch.max(student_ce / (teacher_ce + 1e-7), torch.zeros(1, device=student.device))
    weight = 1 - torch.exp(-ratio)
    return F.cross_entropy(student, target) + ALPHA * TEMPERATURE**2 * torch.mean(weight * soft)


def cross_entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student, target)


def liger(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div

    log_probabilities, probabilities = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    soft: Tensor = liger_kl_div(log_probabilities, probabilities, reduction="batchmean")
    hard: Tensor = liger_cross_entropy(student.clone(), target)
    return hard + ALPHA * TEMPERATURE**2 * soft


def losses(shape: Shape, device: str) -> dict[str, Loss]:
    # One compiled function a shape, as a training run has: no provider is measured with guards for dynamic shapes.
    torch._dynamo.reset()
    found: dict[str, Loss] = {
        "official": official,
        "official, compiled": torch.compile(official, dynamic=False),
        "cross_entropy": cross_entropy,
        "cross_entropy, compiled": torch.compile(cross_entropy, dynamic=False),
        "wsl_loss": wsl_loss,
        "wsl_loss, compiled": torch.compile(wsl_loss, fullgraph=True, dynamic=False),
    }
    if device == "cuda" and find_spec("liger_kernel") and len(shape.logits) == 2:
        found["liger"] = liger
    return found


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    classes = shape.logits[1]
    student, teacher = ((3 * torch.randn(shape.logits, generator=generator, device=device)).to(dtype) for _ in range(2))
    target = torch.randint(classes, shape.logits[:1] + shape.logits[2:], generator=generator, device=device)
    return student.requires_grad_(), teacher, target


def steps(shape: Shape, dtype: torch.dtype, device: str) -> tuple[dict[str, Step], Tensor]:
    """Forward and backward of every provider, on the same logits, the student's of which are returned as well.

    The incoming gradient is given, and is 1.
    """
    student, teacher, target = inputs(shape, dtype, device)

    def step(loss: Loss) -> Step:
        one = torch.ones((), device=device)

        def run() -> None:
            student.grad = None
            value = loss(student, teacher, target)
            value.backward(one.to(value.dtype))

        return run

    found = {name: step(loss) for name, loss in losses(shape, device).items()}
    if device == "cuda":
        found["wsl_loss, graph"] = graph(lambda: wsl_loss(student, teacher, target), student)
    destination = torch.empty_like(teacher)

    def copy() -> None:
        destination.copy_(teacher)

    return {**found, "copy": copy}, student


def graph(loss: Callable[[], Tensor], student: Tensor) -> Step:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(), student)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        torch.autograd.grad(loss(), student)
    return captured.replay


# Measuring ----------------------------------------------------------------------------------------------------------


def timed(step: Step, count: int, device: str) -> float:
    """Seconds a step, of `count` in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def measure(providers: dict[str, Step], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds a step of every provider, taken in turns.

    A turn is a burst of steps: where one takes microseconds, a single step would measure how cold the others have
    left the caches, which is not what a training loop sees. On a GPU small steps are bound by the host and the burst
    shows the time of the slower of both.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    bursts = {}
    for name, step in providers.items():
        for _ in range(5):
            single = timed(step, 1, device)
        bursts[name] = max(1, round(BURST_SECONDS / single))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["wsl_loss"]) < 7:
        for name, step in providers.items():
            times[name].append(timed(step, bursts[name], device))
    return times


def peak_bytes(step: Step, student: Tensor, device: str) -> int:
    """Most memory above the inputs during a step, by the CUDA allocator or by Linux's high-water mark."""
    student.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def kernels(step: Step) -> int:
    """What a step starts on the GPU: kernels, fills and copies."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def host_seconds(step: Step) -> float:
    """What a step costs the host, which does not wait for the GPU: the median of 50."""
    taken = []
    for _ in range(50):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


# Rows ---------------------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What goes on every row."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "driver": driver() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "",
        "python": platform.python_version(),
        "commit": commit(),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def ideal_tensors(provider: str) -> int:
    """How many tensors of logits the provider's task has to move."""
    return 2 if provider.startswith(("cross_entropy", "copy")) else 3


def percentiles(taken: list[float]) -> dict[str, float]:
    p20, _, _, p80 = (1e6 * quantile for quantile in statistics.quantiles(taken, n=5))
    return {"p20_us": round(p20, 1), "p50_us": round(1e6 * statistics.median(taken), 1), "p80_us": round(p80, 1)}


def loss_rows(shape: Shape, dtype: torch.dtype, device: str, seconds: float) -> list[dict[str, Any]]:
    providers, student = steps(shape, dtype, device)
    times = measure(providers, seconds, device)
    median = {provider: statistics.median(taken) for provider, taken in times.items()}
    size = student.numel() * student.element_size()
    speed = {provider: ideal_tensors(provider) * size / taken / 1e9 for provider, taken in median.items()}
    return [
        {
            "use": shape.use,
            "logits": str(shape),
            "classes": shape.logits[1],
            "dtype": str(dtype).removeprefix("torch."),
            "provider": provider,
            "rounds": len(times[provider]),
            **percentiles(times[provider]),
            "speedup_over_official": round(median["official"] / median[provider], 2),
            "speedup_over_compiled_official": round(median["official, compiled"] / median[provider], 2),
            "time_over_cross_entropy": round(median[provider] / median["cross_entropy"], 2),
            "ideal_bytes": ideal_tensors(provider) * size,
            "gb_per_s": round(speed[provider], 1),
            "share_of_copy": float(f"{speed[provider] / speed['copy']:.3g}"),
            "peak_logits": round(peak_bytes(step, student, device) / size, 2),
            "kernels": kernels(step) if device == "cuda" else "",
            "host_us": round(1e6 * host_seconds(step), 1) if device == "cuda" else "",
            **machine(device),
        }
        for provider, step in providers.items()
    ]


# A whole training step ----------------------------------------------------------------------------------------------


def networks(use: str, device: str) -> tuple[nn.Module, nn.Module, Tensor, int]:
    """Student, teacher, a batch of images and the number of classes."""
    if use == "CIFAR-100, resnet32x4 -> resnet8x4":
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        from cifar_models import MODELS

        return (
            MODELS["resnet8x4"](num_classes=100),
            MODELS["resnet32x4"](num_classes=100),
            torch.rand(64, 3, 32, 32),
            100,
        )
    from torchvision.models import resnet18, resnet34

    batch = 256 if device == "cuda" else 8
    return resnet18(), resnet34(), torch.rand(batch, 3, 224, 224), 1000


def training_rows(use: str, device: str, seconds: float) -> list[dict[str, Any]]:
    """A step of SGD with each loss, the teacher's forward included, and the loss by itself on the same logits."""
    student, teacher, images, classes = networks(use, device)
    student, teacher = (network.to(device, memory_format=torch.channels_last) for network in (student, teacher))
    images = images.to(device, memory_format=torch.channels_last)
    target = torch.randint(classes, (len(images),), device=device)
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def logits() -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                taught = teacher(images)
            return student(images), taught

    def training(loss: Loss) -> Step:
        def run() -> None:
            optimizer.zero_grad()
            loss(*logits(), target).backward()
            optimizer.step()

        return run

    def alone(loss: Loss) -> Step:
        own, taught = (tensor.detach().clone() for tensor in logits())
        own.requires_grad_()

        def run() -> None:
            own.grad = None
            loss(own, taught, target).backward()

        return run

    compared = {"official": official, "wsl_loss": wsl_loss}
    providers = {f"step, {name}": training(loss) for name, loss in compared.items()}
    providers |= {f"loss, {name}": alone(loss) for name, loss in compared.items()}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for step in providers.values():
        for _ in range(3):
            timed(step, 1, device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["step, wsl_loss"]) < 7:
        for name, step in providers.items():
            times[name].append(timed(step, 1, device))
    median = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        {
            "use": use,
            "batch": len(images),
            "provider": name,
            "rounds": len(times[f"step, {name}"]),
            "step_ms": round(1e3 * median[f"step, {name}"], 3),
            "loss_us": round(1e6 * median[f"loss, {name}"], 1),
            "loss_share_of_step": round(median[f"loss, {name}"] / median[f"step, {name}"], 4),
            **machine(device),
        }
        for name in compared
    ]


# The first call of a process ----------------------------------------------------------------------------------------

FIRST_CALL = """
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


def first_call_rows() -> list[dict[str, Any]]:
    """Seconds of the first step of a process whose GPU is up, import included, with an empty Triton cache and again."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm", "warm", "warm"):
            run = subprocess.run(
                [sys.executable, "-c", FIRST_CALL],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "TRITON_CACHE_DIR": cache},
            )
            rows.append({"cache": state, "first_step_s": round(float(run.stdout), 3), **machine("cuda")})
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]], title: str, columns: list[str]) -> None:
    print(f"\n{title}")
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for line in (dict(zip(columns, columns)), *rows):
        print("  ".join(str(line[column]).rjust(width) for column, width in zip(columns, widths)), flush=True)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}")


LOSS_COLUMNS = [
    "provider", "p20_us", "p50_us", "p80_us", "speedup_over_official", "speedup_over_compiled_official",
    "time_over_cross_entropy", "gb_per_s", "share_of_copy", "peak_logits", "kernels", "host_us",
]  # fmt: skip
STEPS = ["CIFAR-100, resnet32x4 -> resnet8x4", "ImageNet, ResNet-34 -> ResNet-18"]


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default=default)
    parser.add_argument("--seconds", type=float, help="time to spend on each shape; default 5 on a GPU, 15 on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--shapes", nargs="*", metavar="USE", help="only these, by what they are used for")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    args = parser.parse_args()
    device = args.device
    seconds = args.seconds or (5.0 if device == "cuda" else 15.0)
    shapes = [shape for shape in SHAPES[device] if args.shapes is None or shape.use in args.shapes]
    if len(shapes) < len(args.shapes or []):
        parser.error(f"--shapes must be of {[shape.use for shape in SHAPES[device]]}, got {args.shapes}")
    torch.set_num_threads(args.threads)
    print(*machine(device).values(), sep=", ")

    rows = []
    for dtype in DTYPES[device]:
        for shape in shapes:
            found = loss_rows(shape, dtype, device, seconds)
            show(found, f"{shape.use} {shape} {found[0]['dtype']}", LOSS_COLUMNS)
            rows += found
    write(rows, args.out / f"{device}.csv")
    if args.shapes is None:
        rows = [row for use in STEPS for row in training_rows(use, device, seconds)]
        show(rows, "a training step", ["use", "batch", "provider", "step_ms", "loss_us", "loss_share_of_step"])
        write(rows, args.out / f"{device}_training_step.csv")
        if device == "cuda":
            rows = first_call_rows()
            show(rows, "the first step of a process", ["cache", "first_step_s"])
            write(rows, args.out / "cuda_first_call.csv")


if __name__ == "__main__":
    main()
