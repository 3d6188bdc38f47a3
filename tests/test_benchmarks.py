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
    """One number of classes, with every kernel; continuous integration reports on all."""
    report = run("compile_report.py", "--classes", "100")
    assert report.returncode == 0, report.stdout + report.stderr
    for target in ("sm_80", "sm_90", "gfx942"):
        for kernel in ("_forward_kernel", "_backward_kernel", "_scale_kernel", "_count_kernel"):
            assert any(kernel in line and target in line for line in report.stdout.splitlines())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed beside this build of torch")
def test_report_tells_narrow_from_wide_and_a_spill():
    """The checks themselves: rows of 24 bf16 can be taken 16 bytes at a time, rows of 10 cannot."""
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import compile_report as report
for classes, is_wide in ((24, True), (10, False)):
    case = report.Case(classes, report.BF16)
    launch = report.launches(case)[-1]
    _, spilled, loads, stores = report.resources(launch.compile(report.TARGETS["sm_90"]))
    assert case.is_wide() == bool(loads[16]) == bool(stores[16]) == is_wide and not spilled, (classes, loads, stores)
assert report.resources(launch.compile(report.TARGETS["sm_90"], maxnreg=32))[1]
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(BENCHMARKS)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed beside this build of torch")
def test_another_batch_size_compiles_nothing():
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
import compile_report as report
from weighted_soft_labels import _triton, loss
kernel, found = _triton._forward_kernel, []
_triton._forward_kernel = report.Recorder(kernel, found)
for rows in (1, 2, 16, 63, 64, 1000):
    x, y = torch.empty(rows, 100, device="meta"), torch.empty(rows, dtype=torch.int64, device="meta")
    logits = loss._logits(x)
    _triton.forward(logits, logits, loss._rows(y), loss.Options(), logits)
assert len(found) == 6 and len(set(map(repr, found))) == 1, found
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(BENCHMARKS)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loss_benchmark_writes_its_table_and_the_figures_follow_from_it(tmp_path):
    report = run(
        "bench_loss.py", "--device", "cpu", "--seconds", "0.5", "--shapes", "CIFAR-100", "ImageNet",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    rows = list(csv.DictReader((tmp_path / "cpu.csv").open()))
    assert [row["provider"] for row in rows if row["logits"] == "128x100"] == [
        "official",
        "official, compiled",
        "cross_entropy",
        "cross_entropy, compiled",
        "wsl_loss",
        "wsl_loss, compiled",
        "copy",
    ]
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert float(row["share_of_copy"]) > 0
        tensors = 2 if row["provider"].startswith(("cross_entropy", "copy")) else 3
        elements = 128 * 100 if row["logits"] == "128x100" else 256 * 1000
        assert int(row["ideal_bytes"]) == tensors * elements * 4
        assert all(row[column] for column in ("device", "torch", "commit"))

    figures = run("plot.py", "--results", str(tmp_path), "--figures", str(tmp_path / "figures"))
    assert figures.returncode == 0, figures.stderr
    for name in ("time", "bandwidth", "memory"):
        assert (tmp_path / "figures" / f"cpu_float32_{name}.png").stat().st_size > 10_000


def test_benchmarks_say_what_they_lack(tmp_path):
    assert "ImageNet-21k" in run("bench_loss.py", "--shapes", "no such use").stderr
    nothing = run("plot.py", "--results", str(tmp_path))
    assert nothing.returncode != 0
    assert "bench_loss.py" in nothing.stderr


def test_training_step_is_measured_with_real_networks(tmp_path):
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import bench_loss
for use in bench_loss.STEPS[:1]:
    for row in bench_loss.training_rows(use, "cpu", 0.1):
        assert 0 < row["loss_share_of_step"] < 1, row
"""
    found = subprocess.run([sys.executable, "-c", code, str(BENCHMARKS)], capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed beside this build of torch")
def test_an_epoch_is_measured_with_both_ways_to_the_data(tmp_path):
    arguments = ("--images", "128", "--steps", "1", "--turns", "2", "--workers", "1", "--device", "cpu")
    report = run("bench_cifar.py", *arguments, "--out", str(tmp_path))
    assert report.returncode == 0, report.stderr
    rows = list(csv.DictReader((tmp_path / "cpu_cifar_epoch.csv").open()))
    assert [row["data"] for row in rows] == ["examples/cifar.py", "DataLoader, 1 workers"]
    assert all(float(row["images_per_s"]) > 0 for row in rows)
