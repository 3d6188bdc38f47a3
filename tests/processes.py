"""Processes that tests start."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 600  # seconds; a busy machine needs minutes to import torch several times


def in_processes(function: Callable[[int, int, str], None], world: int, tmp_path: Path) -> None:
    """Run `function(rank, world, folder)` in `world` new processes."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run_and_exit, args=(function, rank, world, str(tmp_path)))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    wait(processes)


def _run_and_exit(function: Callable[[int, int, str], None], *arguments: object) -> None:
    function(*arguments)
    # Without the interpreter's shutdown, in which threads of torch's collectives sometimes abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wait(processes: list[multiprocessing.process.BaseProcess], limit: float = LIMIT) -> None:
    """Wait until all processes end; a process that fails or hangs is named with its exit code."""
    try:
        for rank, process in enumerate(processes):
            process.join(limit)
            code = process.exitcode
            state = f"exit code {code}" if code is not None else f"still runs after {limit} s"
            assert code == 0, f"process {rank} of {len(processes)}: {state}"
    finally:
        for process in processes:
            process.kill()


def joined(rank: int, world: int, folder: str) -> None:
    """Join the process group of `in_processes`."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, which must succeed."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, **options)
    assert run.returncode == 0, f"exit code {run.returncode}:\n{run.stdout}\n{run.stderr}"
    return run
