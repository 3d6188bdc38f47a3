"""The benchmark scripts run, and the kernels compile for GPUs that are not here: none may work interpreted only."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed beside this build of torch")
def test_kernels_compile_ahead_of_time_without_spilling():
    report = run("compile_report.py")
    assert report.returncode == 0, report.stdout + report.stderr
    for target in ("sm_80", "sm_90", "gfx942"):
        for kernel in ("_forward_kernel", "_backward_kernel", "_scale_kernel"):
            assert any(kernel in line and target in line for line in report.stdout.splitlines())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loss_benchmark_writes_its_table(tmp_path):
    out = tmp_path / "results.csv"
    report = run("bench_loss.py", "--seconds", "0.5", "--shapes", "CIFAR-100", "--out", str(out))
    assert report.returncode == 0, report.stderr
    rows = list(csv.DictReader(out.open()))
    assert [row["provider"] for row in rows] == [
        "official",
        "official, compiled",
        "cross_entropy",
        "cross_entropy, compiled",
        "wsl_loss",
        "wsl_loss, compiled",
    ]
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["device"]
        assert row["torch"]
