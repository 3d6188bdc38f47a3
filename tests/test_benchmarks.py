"""The benchmark scripts run, and the kernels compile for GPUs that this machine does not have."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import run_python

import weighted_soft_labels

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_cached
import bench_linear
import bench_loss
import bench_step
import measuring

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed beside this build of torch"
)
def test_kernels_compile_ahead_of_time_without_spilling():
    """One number of classes, with every kernel; continuous integration reports on all."""
    # Triton 3.3's wheel has no linker for AMD.
    targets = ["sm_80", "sm_90"] + ["gfx942"] * (not version("triton").startswith("3.3"))
    report = run("compile_report.py", "--classes", "100", "--targets", *targets)
    assert report.returncode == 0, report.stdout + report.stderr
    for target in targets:
        for kernel in ("_forward_kernel", "_scale_kernel", "_count_kernel"):
            assert any(kernel in line and target in line for line in report.stdout.splitlines())


@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed beside this build of torch"
)
def test_report_tells_narrow_from_wide_and_a_spill():
    """Rows of 24 bfloat16 fill pieces of 16 bytes, and rows of 10 do not."""
    compiling("""
for classes, is_wide in ((24, True), (10, False)):
    case = report.Case(classes, report.BF16)
    launch = report.launches(case)[-1]
    resources = report.resources(launch.compile(report.TARGETS["sm_90"]))
    _, spilled, loads, stores = resources
    assert case.is_wide() == bool(loads[16]) == bool(stores[16]) == is_wide, (classes, resources)
    assert not spilled, classes
narrow = launch._replace(options=launch.options | {"maxnreg": 32})
assert report.resources(narrow.compile(report.TARGETS["sm_90"]))[1]
""")


@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed beside this build of torch"
)
def test_another_batch_size_compiles_nothing():
    compiling("""
import torch
from weighted_soft_labels._options import Options
from weighted_soft_labels.backends import triton
launches = []
triton._forward_kernel = report.Recorder(triton._forward_kernel, launches)
for rows in (1, 2, 16, 63, 64, 1000):
    logits = torch.empty(rows, 100, device="meta")
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    triton.run(logits, logits, target, Options(), torch.empty_like(logits))
assert len(launches) == 6, launches
assert len(set(map(repr, launches))) == 1, launches
""")


def compiling(code):
    """Run code beside the report in a process with Triton's compiler, not its interpreter."""
    path = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nimport compile_report as report\n"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run_python(path + code, env=environment)


# --- the benchmark of the loss ---

linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="load and memory are read from /proc"
)


@linux
@pytest.mark.slow
def test_benchmark_prints_and_writes_what_it_measured_and_figures_follow(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "OMP_WAIT_POLICY", "passive"
    )  # threads that wait for one another do not spin
    small = (
        "--device",
        "cpu",
        "--shapes",
        "64x100",
        "128x100",
        "--dtypes",
        "float32",
        "--seconds",
        "0.1",
    )
    report = run("bench_loss.py", *small, "--out", str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "cpu.csv").open()))
    losses = ["official", "distillation", "cross_entropy", "wsl_loss", "balanced"]
    for shape, elements in (("64x100", 6400), ("128x100", 12800)):
        by_provider = {row["provider"]: row for row in rows if row["shape"] == shape}
        assert list(by_provider) == [*losses, *(f"{loss}, compiled" for loss in losses), "copy"]
        for provider, row in by_provider.items():
            tensors = 2 if provider.startswith(("cross_entropy", "copy")) else 3
            assert int(row["ideal_bytes"]) == tensors * elements * 4
            assert (
                row["ideal_bytes_formula"] == f"{tensors} tensors * {elements} elements * 4 bytes"
            )
            assert all(row[column] for column in ("device", "torch", "commit"))
            assert row["threads"] == "2"
            base = by_provider[
                "cross_entropy, compiled" if "compiled" in provider else "cross_entropy"
            ]
            ratio = float(row["p20_us"]) / float(base["p20_us"])
            assert float(row["time_over_cross_entropy"]) == pytest.approx(ratio, rel=0.05, abs=0.01)
            noisy = (
                f"noise: CIFAR-100, {shape}, float32: {provider}: p80/p20 is {row['spread']},"
                in report.stdout
            )
            assert noisy == (float(row["spread"]) > measuring.MAX_SPREAD), report.stdout
    assert report.returncode == ("REFUSED" in report.stdout), report.stderr

    figures = run("plot.py", "--results", str(tmp_path), "--figures", str(tmp_path))
    assert figures.returncode == 0, figures.stderr
    assert (tmp_path / "cpu_float32.png").stat().st_size > 10_000
    assert figures.stdout.count("\n| ") == 2 + 1  # shapes and header


GOOD = {
    "use": "CIFAR-100",
    "shape": "64x100",
    "dtype": "float32",
    "provider": "wsl_loss",
    "commit": "0123abc",
}
GOOD |= {"spread": "1.50", "load": "0.050"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Stands for benchmarks/results of the checkout whose package is tested."""
    monkeypatch.setattr(measuring, "ROOT", Path(weighted_soft_labels.__file__).resolve().parents[1])
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"spread": "1.51"}, "CIFAR-100, 64x100, float32: official: p80/p20 is 1.51"),
        ({"load": "0.051"}, "CIFAR-100, 64x100, float32: others took 0.051"),
        ({"commit": "0123abc-dirty"}, "not a clean checkout: 0123abc-dirty"),
        ({"commit": "unknown-dirty"}, "not a clean checkout: unknown-dirty"),
    ],
)
def test_refused_rows_are_not_written_into_the_results(results, tmp_path, capsys, bad, reason):
    assert measuring.publish([GOOD, GOOD], "good.csv", None) == 0
    assert list(csv.DictReader((results / "good.csv").open())) == [GOOD, GOOD]
    rows = [GOOD, {**GOOD, "provider": "official", **bad}]
    assert measuring.publish(rows, "bad.csv", None) == 1
    assert reason in capsys.readouterr().out
    assert not (results / "bad.csv").exists()
    assert measuring.publish(rows, "bad.csv", tmp_path / "out") == 1
    assert list(csv.DictReader((tmp_path / "out" / "bad.csv").open())) == rows


def test_package_of_another_checkout_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "ROOT", tmp_path)
    assert "not the package of this checkout" in measuring.refusals([GOOD])[0]


@linux
def test_busy_machine_is_noticed():
    """Also where the load is so steady that no burst is slower than another."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())
    ]
    try:
        times, load = measuring.measure({"sum": lambda: sum(range(1000))}, 0.3)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert min(times["sum"]) > 0
    assert load > 4 * measuring.MAX_LOAD


def test_changed_or_new_file_makes_a_checkout_dirty(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    assert measuring.commit(tmp_path) == "unknown-dirty"
    code, figure = tmp_path / "loss.py", tmp_path / "benchmarks" / "results" / "cpu.csv"
    figure.parent.mkdir(parents=True)
    for path in (code, figure):
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = measuring.commit(tmp_path)
    assert clean.isalnum()
    figure.write_text("2")
    assert measuring.commit(tmp_path) == clean
    code.write_text("2")
    assert measuring.commit(tmp_path) == f"{clean}-dirty"
    git("commit", "-am", "second")
    assert measuring.commit(tmp_path).isalnum()
    (tmp_path / "new.py").touch()
    assert measuring.commit(tmp_path).endswith("-dirty")


@pytest.mark.parametrize(
    "path", sorted(measuring.RESULTS.glob("*.csv")), ids=lambda path: path.name
)
def test_published_results_are_those_of_a_quiet_run_of_a_commit(results, path):
    assert measuring.refusals(list(csv.DictReader(path.open()))) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--shapes", "1x1"], "512x21841"),
        (["--seconds", "1"], "need --out"),
        (["--out", str(BENCHMARKS / "results")], "outside of the repository"),
    ],
)
def test_benchmark_refuses_what_would_not_be_a_whole_run(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_loss.main(arguments)
    assert message in capsys.readouterr().err


def test_plot_says_what_it_lacks(tmp_path):
    nothing = run("plot.py", "--results", str(tmp_path))
    assert nothing.returncode != 0
    assert "bench_loss.py" in nothing.stderr


@linux
def test_training_step_is_measured_with_real_networks(monkeypatch, one_thread):
    def few_images(*arguments, networks=bench_step.networks):
        student, teacher, images, classes = networks(*arguments)
        return student, teacher, images[:2], classes

    monkeypatch.setattr(bench_step, "networks", few_images)
    monkeypatch.setattr(measuring, "LEAST_BURSTS", 2)
    monkeypatch.setattr(measuring, "ATTEMPTS", 1)
    rows = bench_step.training_rows(bench_step.CIFAR, "cpu", 0.1, {"commit": "0123abc"})
    assert [row["provider"] for row in rows] == ["official", "distillation", "wsl_loss"]
    for row in rows:
        assert 0 < float(row["loss_share_of_step"]) < 1, row
    measuring.refusals(rows)


@linux
def test_hidden_states_to_loss_are_measured(monkeypatch, one_thread):
    """Also the memory: chunks of logits, where whole ones are three tensors."""
    for name, value in {"ROWS": 512, "WIDTH": 16, "CLASSES": 16000}.items():
        monkeypatch.setattr(bench_linear, name, value)
    monkeypatch.setattr(measuring, "LEAST_BURSTS", 2)
    monkeypatch.setattr(measuring, "ATTEMPTS", 1)
    rows = {
        row["provider"]: row for row in bench_linear.rows_of("float32", 0.1, {"commit": "0123abc"})
    }
    ours, unfused = rows["linear_wsl_loss"], rows["linear + wsl_loss"]
    assert unfused["time_over_unfused"] == "1.00"
    assert float(ours["peak_float32_logits"]) < 1.5 < float(unfused["peak_float32_logits"])
    measuring.refusals(list(rows.values()))


@linux
def test_stored_teachers_are_measured(monkeypatch, one_thread):
    """Also the memory: the gradient alone, and from hidden states a few chunks of logits."""
    monkeypatch.setattr(measuring, "LEAST_BURSTS", 2)
    monkeypatch.setattr(measuring, "ATTEMPTS", 1)
    logits = bench_cached.rows_of((512, 16000), 0.1, {"commit": "0123abc"})
    linear = bench_cached.rows_of((512, 16, 16000), 0.1, {"commit": "0123abc"})
    rows = {row["provider"]: row for row in logits + linear}
    assert rows["cross_entropy"]["time_over_base"] == "1.00"
    assert float(rows["cached_wsl_loss"]["peak_float32_logits"]) < 1.5
    assert float(rows["cached_linear_wsl_loss"]["peak_float32_logits"]) < 1.5
    assert rows["cached_wsl_loss"]["bytes_per_row"] == 392
    measuring.refusals(list(rows.values()))
