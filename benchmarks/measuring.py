"""What the benchmarks share: how a time is taken, and which run may be written into benchmarks/results.

Providers take turns in one process, a burst of steps each: a single step of microseconds would measure how cold the
others left the caches. A time is the low fifth (20th percentile) of the bursts, its spread the 80th percentile over
that. Load on the machine does not meet all providers alike, so the result of a noisy run is worth nothing. A shape is
measured up to three times, until no spread exceeds 1.5 and others took at most 5 % of the machine's CPU time; what is
noisy then is refused. (Steady load slows everything down without spreading it: the spread alone does not show it.) So
is what no commit can reproduce.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import platform
import re
import resource
import statistics
import subprocess
import timeit
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer  # waits for a GPU

import weighted_soft_labels

Step = Callable[[], object]
Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BURST_SECONDS, LEAST_BURSTS = 0.01, 10
MAX_SPREAD, MAX_LOAD, ATTEMPTS = 1.5, 0.05, 3


# Time and memory ----------------------------------------------------------------------------------------------------


def measure(steps: dict[str, Step], seconds: float) -> tuple[dict[str, list[float]], float]:
    """Seconds a step, by provider and burst, and the share of the machine's CPU time that others took meanwhile.

    On a GPU a step takes as long as the host or the GPU does, whichever is slower.
    """
    keep_freed_memory()
    timers = {name: timeit.Timer(step, timer=timer) for name, step in steps.items()}
    bursts = {
        name: max(1, round(BURST_SECONDS / min(each.repeat(5, 1)))) for name, each in timers.items()
    }
    for _ in range(ATTEMPTS):
        times: dict[str, list[float]] = {name: [] for name in steps}
        begin, others = timer(), seconds_of_others()
        while timer() < begin + seconds or min(map(len, times.values())) < LEAST_BURSTS:
            for name, each in timers.items():
                times[name].append(each.timeit(bursts[name]) / bursts[name])
        load = (seconds_of_others() - others) / (timer() - begin) / (os.cpu_count() or 1)
        if load <= MAX_LOAD and all(spread(taken) <= MAX_SPREAD for taken in times.values()):
            break
    return times, load


def keep_freed_memory() -> None:
    """Else glibc returns it to the system now and then, and a step of tensors of 16 MB takes 25 or 55 ms by what the
    others left of the heap. From 32 MiB on a tensor is new memory at every step, as always with glibc."""
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # of malloc.h
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_threshold, 2**25)


def seconds_of_others() -> float:
    """CPU time since boot that other processes and other virtual machines (steal) took."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    own = resource.getrusage(resource.RUSAGE_SELF)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def low_fifth(times: list[float]) -> float:
    return statistics.quantiles(times, n=5, method="inclusive")[0]


def spread(times: list[float]) -> float:
    return statistics.quantiles(times, n=5, method="inclusive")[3] / low_fifth(times)


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
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)[0])


def kernels(step: Step) -> int:
    """What a step starts on the GPU: kernels, fills and copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def host_seconds(step: Step) -> float:
    """What a step costs the host, which does not wait for the GPU."""
    return statistics.median(timeit.Timer(step, torch.cuda.synchronize).repeat(50, 1))


# What goes on every row ---------------------------------------------------------------------------------------------


def machine(device: str) -> Row:
    processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [
        platform.machine()
    ]
    instructions = torch.backends.cpu.get_cpu_capability()
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{processor[0]} with {instructions}",
        "threads": torch.get_num_threads(),
        "driver": output_of(*driver).partition("\n")[0] if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "",
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit(root: Path = ROOT) -> str:
    """Of a checkout; with "-dirty" if a file is changed or new, results and figures aside, which come of it."""
    git = ("git", "-C", str(root))
    changed = output_of(
        *git, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/figures"
    )
    return output_of(*git, "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def output_of(*command: str) -> str:
    """Of a command, stripped; "unknown" if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# Tables, and which are kept -----------------------------------------------------------------------------------------


def show(rows: list[Row], title: str, columns: list[str]) -> None:
    print(f"\n{title}")
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for line in (dict(zip(columns, columns)), *rows):
        print(
            "  ".join(str(line[column]).rjust(width) for column, width in zip(columns, widths)),
            flush=True,
        )


def refusals(rows: list[Row]) -> list[str]:
    """Why these rows, each with its spread, load and commit, may not be published: one reason a line."""
    reasons = []
    for row in rows:
        what = ", ".join(str(row[name]) for name in ("use", "shape", "dtype") if name in row)
        if float(row["load"]) > MAX_LOAD:
            reasons.append(
                f"load: {what}: others took {row['load']} of the CPU time, more than {MAX_LOAD}"
            )
        if float(row["spread"]) > MAX_SPREAD:
            reasons.append(
                f"noise: {what}: {row['provider']}: p80/p20 is {row['spread']}, more than {MAX_SPREAD}"
            )
    for state in {row["commit"] for row in rows if not re.fullmatch("[0-9a-f]+", row["commit"])}:
        reasons.append(f"not a clean checkout: {state}; commit or remove what `git status` names")
    source = Path(weighted_soft_labels.__file__).resolve()
    if not source.is_relative_to(ROOT):
        reasons.append(f"not the package of this checkout: {source}")
    return list(dict.fromkeys(reasons))


def publish(rows: list[Row], name: str, out: Path | None) -> int:
    """Write the rows into benchmarks/results, unless they are refused, or into `out` in any case; the exit status."""
    reasons = refusals(rows)
    path = (out or RESULTS) / name
    if out or not reasons:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print(f"\n{path} is {'written' if out or not reasons else 'not written'}")
    if reasons:
        print("REFUSED for benchmarks/results:")
    print(*(f"  {reason}" for reason in reasons), sep="\n", flush=True)
    return int(bool(reasons))


def folder(text: str) -> Path:
    """The argument --out."""
    path = Path(text).resolve()
    if path.is_relative_to(ROOT):
        raise argparse.ArgumentTypeError(f"must be outside of the repository {ROOT}, got {text}")
    return path
