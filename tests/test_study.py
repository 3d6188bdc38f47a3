"""examples/bias_variance.py and examples/regularization_samples.py: as programs on real digits, and what they share."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

for _module in ("sklearn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(_module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import digits  # noqa: E402
import regularization_samples as script  # noqa: E402
import study  # noqa: E402

from weighted_soft_labels.analysis import regularization_samples, wsl_terms  # noqa: E402

SCRIPTS = ("bias_variance.py", "regularization_samples.py")
TINY = ("--train-images", "120", "--seeds", "2", "--epochs", "2", "--teacher-epochs", "2", "--temperatures", "1", "4")
FEW = {"bias_variance.py": ("--models", "2"), "regularization_samples.py": ("--smoothings", "0", "0.1")}

pytestmark = pytest.mark.usefixtures("one_thread")


def command(name: str, *options: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *map(str, options)]


def run(folder: Path, name: str, *options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(name, *options), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """By script: a folder of results, and what was printed."""
    found = {}
    for name in SCRIPTS:
        folder = tmp_path_factory.mktemp("study")
        done = run(folder, name, *TINY, *FEW[name], "--out", "out")
        assert done.returncode == 0, done.stderr
        found[name] = folder / "out", done.stdout
    return found


def numbers(line: str) -> list[tuple[float, float]]:
    return [(float(mean), float(half)) for mean, half in re.findall(r"([+-]?\d+\.\d+) \+- (\d+\.\d+)", line)]


# --- as programs ---


def test_bias_variance_writes_a_row_for_every_seed_loss_and_epoch(finished: dict[str, tuple[Path, str]]) -> None:
    out, printed = finished["bias_variance.py"]
    rows = table(out / "bias_variance.csv")
    methods = [("CE", ""), ("KD", "1"), ("KD", "4"), ("WSL", "1"), ("WSL", "4")]
    assert [(row["loss"], row["temperature"], row["epoch"], row["seed"]) for row in rows] == [
        (*method, epoch, seed) for seed in "01" for epoch in "12" for method in methods
    ]
    for row in rows:
        bias, variance, nll, accuracy = (float(row[name]) for name in ("bias", "variance", "nll", "accuracy"))
        assert bias > 0
        assert variance > 0
        assert nll == pytest.approx(bias + variance, rel=1e-4)  # five digits are written
        assert 0 < accuracy < 100
        shares = [float(row[name]) for name in row if name.startswith("bias_")]
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(0 if row["loss"] == "CE" else 1, abs=0.01)

    samples = table(out / "bias_variance_samples.csv")
    assert len(samples) == digits.TEST_IMAGES * digits.TEST_VERSIONS
    last = [row for row in rows if row["epoch"] == "2" and row["temperature"] in ("", "4")]
    for loss in ("CE", "KD", "WSL"):
        for name in ("bias", "variance"):
            mean = sum(float(row[f"{name}_{loss}"]) for row in samples) / len(samples)
            seeds = [float(row[name]) for row in last if row["loss"] == loss]
            assert mean == pytest.approx(sum(seeds) / len(seeds), rel=1e-3), (name, loss)

    for loss, T in methods:
        title = f"{loss}, T = {T}" if T else loss
        lines = printed.split("Differences within")[0].splitlines()
        (line,) = (line for line in lines if line.startswith(f"{title:14}"))
        of = [row for row in rows if (row["loss"], row["temperature"], row["epoch"]) == (loss, T, "2")]
        for name, (mean, half) in zip(("bias", "variance", "nll"), numbers(line)):
            a, b = (float(row[name]) for row in of)
            assert mean == pytest.approx((a + b) / 2, abs=1e-4)
            assert half == pytest.approx(12.706 * abs(a - b) / 2, abs=3e-4, rel=1e-3)  # Student's t of 2 values


def test_regularization_samples_writes_a_row_for_every_seed_loss_and_epoch(
    finished: dict[str, tuple[Path, str]],
) -> None:
    out, printed = finished["regularization_samples.py"]
    rows = table(out / "regularization_samples.csv")
    of_teachers = [row for row in rows if row["loss"] == "teacher"]
    assert [(row["seed"], row["smoothing"]) for row in of_teachers] == [(s, x) for s in "01" for x in ("0", "0.1")]
    students = [row for row in rows if row["loss"] not in ("teacher", "CE")]
    assert len(students) == 2 * 2 * 4 * 2 * 2  # seeds, epochs, losses, smoothings, temperatures
    for row in students:
        assert float(row["share"]) == pytest.approx(int(row["regularization_samples"]) / 120, abs=1e-4)
        assert 0 < float(row["weight"]) < 1
        above, share = float(row["share_above"]), float(row["share"])
        assert above == share if row["temperature"] == "1" else above <= share
        assert (row["test_accuracy"] != "") == (row["epoch"] == "2")
    assert sum(int(row["regularization_samples"]) for row in students) > 0

    last = [row for row in students if (row["smoothing"], row["temperature"], row["epoch"]) == ("0.1", "4", "2")]
    accuracies = {(row["seed"], row["loss"]): float(row["test_accuracy"]) for row in last}
    differences = [accuracies[seed, "WSL"] - accuracies[seed, "KD"] for seed in "01"]
    (line,) = re.findall(r"^ 4 +0\.1 .*$", printed.split("within a seed")[1], re.MULTILINE)[:1]
    assert numbers(line)[2][0] == pytest.approx(sum(differences) / 2, abs=0.011)


@pytest.mark.parametrize("name", SCRIPTS)
def test_results_say_how_they_were_made_and_are_drawn(finished: dict[str, tuple[Path, str]], name: str) -> None:
    out, _ = finished[name]
    described = json.loads((out / name.replace(".py", ".json")).read_text())
    assert described["torch"] == torch.__version__
    assert (described["dataset"], described["train_images"], described["seeds"]) == ("digits", 120, 2)
    assert described["device"]
    figures = list(out.glob("*.png"))
    assert len(figures) == 2
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert figure.stat().st_size > 10_000
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_report_needs_the_tables_alone(finished: dict[str, tuple[Path, str]], name: str, tmp_path: Path) -> None:
    out, printed = finished[name]
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("*.png"))
    tables = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = run(tmp_path, name, "--report", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert {path: path.read_bytes() for path in tables} == tables


def test_seeds_do_not_depend_on_the_number_of_workers_and_a_teacher_can_be_shared(
    finished: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    """Nor does CE on the teacher; KD does."""
    out, _ = finished["bias_variance.py"]
    options = (*TINY, *FEW["bias_variance.py"])
    done = run(tmp_path, "bias_variance.py", *options, "--workers", 1, "--out", "one")
    assert done.returncode == 0, done.stderr
    assert table(tmp_path / "one" / "bias_variance.csv") == table(out / "bias_variance.csv")

    done = run(tmp_path, "bias_variance.py", *options, "--shared-teacher", "--out", "shared")
    assert done.returncode == 0, done.stderr
    changed = [
        row["loss"]
        for row, other in zip(table(tmp_path / "shared" / "bias_variance.csv"), table(out / "bias_variance.csv"))
        if row["bias"] != other["bias"]
    ]
    assert "KD" in changed
    assert "WSL" in changed


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in Linux's /proc")
@pytest.mark.parametrize("victim", ["program", "worker"])
def test_after_a_kill_no_process_is_left_and_no_file_half_written(tmp_path: Path, victim: str) -> None:
    options = (*TINY, "--seeds", 40, "--epochs", 1, "--models", 2, "--workers", 2, "--out", "killed")
    process = subprocess.Popen(
        command("bias_variance.py", *options),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    described = tmp_path / "killed" / "bias_variance.json"
    wait_until(lambda: described.exists() or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(workers) == 2
    if victim == "program":
        process.kill()
        assert process.wait() == -signal.SIGKILL
    else:
        os.kill(int(workers[0]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 1
        assert stderr.splitlines()[-1].startswith("bias_variance.py: error: interrupted; 'killed' holds the seeds")
        assert "Traceback" not in stderr
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))

    rows = table(tmp_path / "killed" / "bias_variance.csv")
    assert {len([row for row in rows if row["seed"] == seed]) for seed in {row["seed"] for row in rows}} == {5}
    again = run(tmp_path, "bias_variance.py", *options)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("bias_variance.py: error: 'killed' holds results")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_fashion_mnist_as_its_files_lie_there(tmp_path: Path) -> None:
    from test_cifar import write_fashion_mnist

    write_fashion_mnist(tmp_path / "data", packed=True)
    task = study.load_task("fashion-mnist", tmp_path / "data", torch.device("cpu"))
    assert task.train_images.shape == (6, 1, 32, 32)
    assert task.test_labels.shape == (4,)
    assert task.classes == 10
    assert study.make_network(task, 8)(task.augment(task.train_images)).shape == (6, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "1"), "argument --seeds: must be at least 2, got 1"),
        (("--temperatures", "1", "0"), "argument --temperatures: must be finite and > 0, got 0"),
        (("--train-images", "998"), "--train-images 998: there are 997"),
        (("--dataset", "fashion-mnist", "--data", "nowhere"), "there is no folder 'nowhere'"),
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--report",), "run without --report first"),
    ],
)
def test_refuses_before_anything_is_written(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = run(tmp_path, "regularization_samples.py", *options)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[-1]
    assert "error: " in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("smoothing", ["1", "-0.1", "nan", "much"])
def test_refuses_a_label_smoothing_out_of_range(tmp_path: Path, smoothing: str) -> None:
    done = run(tmp_path, "regularization_samples.py", f"--smoothings={smoothing}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"argument --smoothings: must be in [0, 1), got {smoothing}")


# --- what they share ---


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(60, 10, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(10, (60,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_losses_of_the_ablation_differ_in_the_weight_of_the_soft_term_alone(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor], temperature: float
) -> None:
    """Gradients, from the closed form: KD and WSL have other constants."""
    student, teacher, labels = logits
    hard = (student.detach().softmax(1) - F.one_hot(labels, 10)) / 60
    soft = temperature * ((student.detach() / temperature).softmax(1) - (teacher / temperature).softmax(1)) / 60
    weight = wsl_terms(*logits).weight
    found = regularization_samples(*logits, temperature=temperature)
    assert 0 < found.sum() < 60
    weights = {
        "KD": torch.ones(60),
        "dropped": (~found).float(),
        "uniform": weight.mean().expand(60),
        "WSL": weight,
    }
    assert tuple(weights) == script.LOSSES
    for name, values in weights.items():
        loss = script.make_student_loss(script.Method(name, 0.0, temperature), alpha=2.25)(student, teacher, labels)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, hard + 2.25 * values[:, None] * soft, rtol=1e-4, atol=1e-7)


def test_students_of_one_seed_differ_in_their_loss_alone() -> None:
    """With next to no soft term all of them are the student of cross-entropy."""
    task = study.load_task("digits", Path(), torch.device("cpu"))
    torch.manual_seed(0)
    drawn = study.draw(task, 100)
    first = study.make_network(task, study.STUDENT_WIDTH)
    (teacher,) = study.train_teachers(task, drawn, 1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

    methods = [script.Method("CE"), *(script.Method(loss, 0.0, 4.0) for loss in script.LOSSES)]
    learners = []
    for method in methods:
        network = study.make_network(task, study.STUDENT_WIDTH)
        network.load_state_dict(first.state_dict())
        learned_from = None if method.loss == "CE" else teacher
        learners.append(study.Learner(network, script.make_student_loss(method, 1e-9), 2, learned_from))
    seen = study.train_epoch(task, drawn, learners)
    assert seen.labels.sort().values.equal(task.train_labels[drawn].sort().values)
    assert list(seen.teacher_logits) == [teacher]
    for other in seen.student_logits[1:]:
        torch.testing.assert_close(other, seen.student_logits[0])
    for value, expected in zip(teacher.state_dict().values(), before.values()):
        assert value.equal(expected), "the teacher has changed"
    with torch.no_grad():
        assert not study.predict(task, learners[0].network).equal(study.predict(task, first))


def test_smoothed_teachers_are_less_sure() -> None:
    task = study.load_task("digits", Path(), torch.device("cpu"))
    torch.manual_seed(0)
    plain, smoothed = study.train_teachers(task, study.draw(task, None), 8, (0.0, 0.3))
    likeliest = [study.predict(task, teacher).softmax(1).amax(1).mean() for teacher in (plain, smoothed)]
    assert likeliest[1] < likeliest[0] - 0.05
    for teacher in (plain, smoothed):
        assert study.accuracy(study.predict(task, teacher), task.test_labels) > 60


def test_images_are_moved_by_up_to_one_pixel_and_flipped() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 3] = 1
    torch.manual_seed(0)
    moved = study.shift_and_flip(image.expand(500, 1, 8, 8))
    assert moved.sum() == 500
    places = {(row, column) for _, _, row, column in moved.nonzero().tolist()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (2, 3, 4, 5)}


def test_interval_is_student_s() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    mean, half = digits.confidence_interval(values)
    assert mean == 4.0
    assert half == pytest.approx(3.182446 * math.sqrt(38 / 3) / 2, rel=1e-6)


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(study.Refusal, match="at least two seeds, and 1 is finished"):
        study.count_seeds([{"seed": 3.0}, {"seed": 3.0}])


# --- the study ---

STUDY = EXAMPLES / "STUDY.md"


def test_the_page_prints_what_the_tables_say_and_shows_their_figures(tmp_path: Path) -> None:
    page = STUDY.read_text()
    reports = []
    for described in (EXAMPLES / "results").rglob("*.json"):
        shutil.copytree(described.parent, tmp_path / described.parent.name, dirs_exist_ok=True)
        done = run(tmp_path, described.with_suffix(".py").name, "--report", "--out", described.parent.name)
        assert done.returncode == 0, done.stderr
        reports.append(done.stdout)
    printed = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(printed) >= 6
    for block in printed:
        assert any(block in report for report in reports), block

    linked = re.findall(r"\((results/[^)]+)\)", page)
    assert len([name for name in linked if name.endswith(".png")]) >= 4
    for name in linked:
        assert (EXAMPLES / name).exists(), name


def test_the_study_has_the_seeds_and_the_images_that_its_page_names() -> None:
    page = STUDY.read_text()
    for path in (EXAMPLES / "results").rglob("*.json"):
        described = json.loads(path.read_text())
        seeds = {row["seed"] for row in table(path.with_suffix(".csv"))}
        assert len(seeds) == described["seeds"] >= 10
        assert (described["dataset"], described["train_images"]) == ("fashion-mnist", 10000)
        assert f"{described['seeds']} seeds" in page
        assert described["torch"].split("+")[0] in page
        assert described["device"] in page
