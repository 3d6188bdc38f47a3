"""What the benchmarks share: how to take a time, and which runs may go into benchmarks/results.

Providers take turns in one process, a burst of steps each. A single step of microseconds would
mostly measure caches that another provider filled. A time is the 20th percentile of the bursts. A
spread is the 80th percentile over the 20th.

A shape is measured up to three times, until no spread exceeds 1.5 and other processes took at most
5 % of the machine's CPU time. A run is refused if the last attempt exceeds either limit: load does
not hit all providers alike, and steady load slows everything down without a spread. A run is also
refused if no commit reproduces it.
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


# --- time and memory ---


def measure(steps: dict[str, Step], seconds: float) -> tuple[dict[str, list[float]], float]:
    """Return seconds per step, by provider and burst, and the load.

    The load is the share of the machine's CPU time that other processes took. On a GPU the time is
    that of the host or of the GPU, whichever is longer.
    """
    keep_freed_memory()
    timers = {name: timeit.Timer(step, timer=timer) for name, step in steps.items()}
    steps_per_burst = {
        name: max(1, round(BURST_SECONDS / min(each.repeat(5, 1)))) for name, each in timers.items()
    }
    for _ in range(ATTEMPTS):
        times: dict[str, list[float]] = {name: [] for name in steps}
        begin, others = timer(), seconds_of_others()
        while timer() < begin + seconds or min(map(len, times.values())) < LEAST_BURSTS:
            for name, each in timers.items():
                number = steps_per_burst[name]
                times[name].append(each.timeit(number) / number)
        load = (seconds_of_others() - others) / (timer() - begin) / (os.cpu_count() or 1)
        if load <= MAX_LOAD and all(spread(bursts) <= MAX_SPREAD for bursts in times.values()):
            break
    return times, load


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory below 32 MiB.

    Otherwise glibc returns it to the system now and then. A step with tensors of 16 MB then takes
    25 or 55 ms, depending on what ran before.
    """
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_threshold, 2**25)


def seconds_of_others() -> float:
    """Return the CPU time that other processes and virtual machines (steal) took since boot."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    own = resource.getrusage(resource.RUSAGE_SELF)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def percentile_20(times: list[float]) -> float:
    return statistics.quantiles(times, n=5, method="inclusive")[0]


def spread(times: list[float]) -> float:
    return statistics.quantiles(times, n=5, method="inclusive")[3] / percentile_20(times)


def peak_bytes(step: Step, student: Tensor, device: str) -> int:
    """Return the peak memory of a step above the inputs.

    It comes from the CUDA allocator, or from Linux's high-water mark.
    """
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
    """Count what a step launches on the GPU: kernels, fills and copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def host_seconds(step: Step) -> float:
    """Return the time of a step on the host, which does not wait for the GPU."""
    return statistics.median(timeit.Timer(step, torch.cuda.synchronize).repeat(50, 1))


# --- columns of every row ---


def machine(device: str) -> Row:
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "driver": output_of(*driver).partition("\n")[0] if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "",
        "python": platform.python_version(),
        "commit": commit(),
    }


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = names[0] if names else platform.machine()
    return f"{name} with {torch.backends.cpu.get_cpu_capability()}"


def commit(root: Path = ROOT) -> str:
    """Return the commit of the checkout, with "-dirty" if a file is changed or new.

    Results and figures do not count, because a run writes them.
    """
    git = ("git", "-C", str(root))
    paths = (".", ":!benchmarks/results", ":!benchmarks/figures")
    changed = output_of(*git, "status", "--porcelain", "--", *paths)
    return output_of(*git, "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def output_of(*command: str) -> str:
    """Return what a command prints, stripped, or "unknown" if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- tables, and which are published ---


def show(rows: list[Row], title: str, columns: list[str]) -> None:
    print(f"\n{title}")
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for cells in (columns, *([str(row[column]) for column in columns] for row in rows)):
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))
        print(line, flush=True)


def refusals(rows: list[Row]) -> list[str]:
    """Return why these rows may not be published, one line per reason."""
    reasons = []
    for row in rows:
        case = ", ".join(str(row[name]) for name in ("use", "shape", "dtype") if name in row)
        load, ratio = row["load"], row["spread"]
        if float(load) > MAX_LOAD:
            reasons.append(
                f"load: {case}: others took {load} of the CPU time, more than {MAX_LOAD}"
            )
        if float(ratio) > MAX_SPREAD:
            reasons.append(
                f"noise: {case}: {row['provider']}: p80/p20 is {ratio}, more than {MAX_SPREAD}"
            )
    for state in {row["commit"] for row in rows if not re.fullmatch("[0-9a-f]+", row["commit"])}:
        reasons.append(f"not a clean checkout: {state}; commit or remove what `git status` names")
    source = Path(weighted_soft_labels.__file__).resolve()
    if not source.is_relative_to(ROOT):
        reasons.append(f"not the package of this checkout: {source}")
    return list(dict.fromkeys(reasons))


def publish(rows: list[Row], name: str, out: Path | None) -> int:
    """Write the rows as CSV, and return the exit status: 1 if they are refused.

    Rows go into `out`, or into benchmarks/results unless they are refused.
    """
    reasons = refusals(rows)
    path = (out or RESULTS) / name
    written = bool(out) or not reasons
    if written:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print(f"\n{path} is {'written' if written else 'not written'}")
    if reasons:
        print("REFUSED for benchmarks/results:")
    print(*(f"  {reason}" for reason in reasons), sep="\n", flush=True)
    return int(bool(reasons))


def folder(text: str) -> Path:
    """Parse the argument --out."""
    path = Path(text).resolve()
    if path.is_relative_to(ROOT):
        raise argparse.ArgumentTypeError(f"must be outside of the repository {ROOT}, got {text}")
    return path
