"""examples/study: two scripts as programs on real digits, shared code, and the page of results."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

for _module in ("sklearn", "scipy", "matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]"
    )

STUDY = Path(__file__).parents[1] / "examples" / "study"
sys.path.insert(0, str(STUDY))

import bias_variance  # noqa: E402
import regularization_samples as script  # noqa: E402
import study  # noqa: E402
import teacher_mistakes  # noqa: E402

from weighted_soft_labels.analysis import regularization_samples, wsl_terms  # noqa: E402

REPORTS = {"bias_variance": bias_variance.report, "regularization_samples": script.report}
TINY = (
    "--train-images",
    "120",
    "--seeds",
    "2",
    "--epochs",
    "2",
    "--teacher-epochs",
    "2",
    "--temperatures",
    "1",
    "4",
)
FEW = {"bias_variance": ("--models", "2"), "regularization_samples": ("--smoothings", "0", "0.1")}

Finished = dict[str, tuple[Path, str]]  # by script: a folder of results, and what was printed

pytestmark = pytest.mark.usefixtures("one_thread")


def command(name: str, *options: object) -> list[str]:
    return [sys.executable, str(STUDY / f"{name}.py"), *map(str, options)]


def run(folder: Path, name: str, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *options), cwd=folder, capture_output=True, text=True, timeout=300
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    finished = {}
    for name in REPORTS:
        folder = tmp_path_factory.mktemp("study")
        done = run(folder, name, *TINY, *FEW[name], "--out", "out")
        assert done.returncode == 0, done.stderr
        finished[name] = folder / "out", done.stdout
    return finished


@pytest.mark.slow
def test_bias_variance_writes_a_row_for_every_seed_loss_and_epoch(finished: Finished) -> None:
    out, printed = finished["bias_variance"]
    rows = table(out / "bias_variance.csv")
    methods = [("CE", ""), ("KD", "1"), ("KD", "4"), ("WSL", "1"), ("WSL", "4")]
    assert [(row["loss"], row["temperature"], row["epoch"], row["seed"]) for row in rows] == [
        (*method, epoch, seed) for seed in "01" for epoch in "12" for method in methods
    ]
    for row in rows:
        bias, variance, nll = (float(row[name]) for name in ("bias", "variance", "nll"))
        assert min(bias, variance) > 0
        assert nll == pytest.approx(bias + variance, rel=1e-4)  # five digits are written
        shares = [float(row[name]) for name in row if name.startswith("bias_")]
        assert sum(shares) == pytest.approx(0 if row["loss"] == "CE" else 1, abs=0.01)

    (line,) = (
        x for x in printed.split("Differences")[0].splitlines() if x.startswith("WSL, T = 4")
    )
    mean, half = re.findall(r"\d+\.\d+", line)[:2]
    a, b = (
        float(row["bias"])
        for row in rows
        if (row["loss"], row["temperature"], row["epoch"]) == ("WSL", "4", "2")
    )
    assert float(mean) == pytest.approx((a + b) / 2, abs=1e-4)
    assert float(half) == pytest.approx(
        12.706 * abs(a - b) / 2, abs=3e-4, rel=1e-3
    )  # Student's t of 2 values


@pytest.mark.slow
def test_regularization_samples_writes_a_row_for_every_seed_loss_and_epoch(
    finished: Finished,
) -> None:
    out, printed = finished["regularization_samples"]
    rows = table(out / "regularization_samples.csv")
    students = [row for row in rows if row["loss"] not in ("teacher", "CE")]
    assert len(students) == 2 * 2 * 4 * 2 * 2  # seeds, epochs, losses, smoothings, temperatures
    for row in students:
        assert float(row["share"]) == pytest.approx(
            int(row["regularization_samples"]) / 120, abs=1e-4
        )
        assert 0 < float(row["weight"]) < 1
        opposing, share = float(row["share_opposing"]), float(row["share"])
        assert opposing == share if row["temperature"] == "1" else opposing <= share
        assert (row["test_accuracy"] != "") == (row["epoch"] == "2")

    assert "Differences in test accuracy within a seed" in printed


@pytest.mark.slow
def test_seeds_do_not_depend_on_the_number_of_workers(finished: Finished, tmp_path: Path) -> None:
    out, _ = finished["bias_variance"]
    done = run(tmp_path, "bias_variance", *TINY, "--models", 2, "--workers", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert table(tmp_path / "out" / "bias_variance.csv") == table(out / "bias_variance.csv")
    assert json.loads((out / "bias_variance.json").read_text())["torch"] == torch.__version__
    again = run(tmp_path, "bias_variance", *TINY, "--out", "out")
    assert again.returncode == 1
    assert "FileExistsError: out holds results" in again.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="children are listed in Linux's /proc"
)
def test_after_a_kill_no_process_is_left_and_no_file_half_written(tmp_path: Path) -> None:
    options = (
        *TINY,
        "--seeds",
        40,
        "--epochs",
        1,
        "--models",
        2,
        "--shared-teacher",
        "--workers",
        2,
        "--out",
        "killed",
    )
    process = subprocess.Popen(
        command("bias_variance", *options), cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    described = tmp_path / "killed" / "bias_variance.json"
    while not described.exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rows = table(tmp_path / "killed" / "bias_variance.csv")
    assert {
        len([row for row in rows if row["seed"] == seed]) for seed in {row["seed"] for row in rows}
    } == {5}


def test_fashion_mnist_as_torchvision_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", 10), ("t10k", 4)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = bytes((0, 0, 8, len(shape))) + b"".join(
                size.to_bytes(4, "big") for size in shape
            )
            values = (
                bytes(range(count))
                if kind == "labels-idx1"
                else bytes(255 for _ in range(math.prod(shape)))
            )
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + values)
    task = study.load_task("fashion-mnist", tmp_path, torch.device("cpu"))
    assert task.train_images.shape == (10, 1, 32, 32)
    assert task.test_labels.tolist() == [0, 1, 2, 3]
    assert task.test_images[0, 0, 16, 16].item() == pytest.approx((1 - 0.2860) / 0.3530)
    assert task.test_images[0, 0, 0, 0].item() == pytest.approx(-0.2860 / 0.3530)
    assert study.make_network(task, 8)(task.augment(task.train_images)).shape == (10, 10)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of student, teacher, labels


@pytest.fixture
def batch() -> Batch:
    """60 rows in float64; the teacher's largest logit is the label in the first 24 alone."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        3 * torch.randn(60, 10, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    top = teacher.argmax(1)
    labels = torch.where(torch.arange(60) < 24, top, (top + 3) % 10)
    return student.requires_grad_(), teacher, labels


def loss_by_hand(
    name: str, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, T: float
) -> torch.Tensor:
    """Return the loss for alpha = 2.25, row by row from exponentials and logarithms."""
    losses, weights, soft, divergence, right = [], [], [], [], []
    for s, t, y in zip(student, teacher, labels.tolist()):
        p, q = (s / T).exp() / (s / T).exp().sum(), (t / T).exp() / (t / T).exp().sum()
        losses.append(-(s[y].exp() / s.exp().sum()).log())
        teacher_ce = -(t[y].exp() / t.exp().sum()).log()
        weights.append(1 - (-losses[-1].detach() / (teacher_ce + 1e-7)).exp())
        soft.append(-(q * p.log()).sum())
        divergence.append((q * (q / p).log()).sum())
        right.append(all(t[y] >= other for other in t))
    mean_weight = sum(weights) / len(weights)
    terms = {
        "CE": [0 * x for x in soft],
        "KD": divergence,
        "WSL": [w * x for w, x in zip(weights, soft)],
        "uniform": [mean_weight * x for x in soft],
        "masked": [x if ok else 0 * x for ok, x in zip(right, divergence)],
        "balanced": [w / mean_weight * x for w, x in zip(weights, soft)],
    }
    return (sum(losses) + 2.25 * T**2 * sum(terms[name])) / len(losses)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", teacher_mistakes.METHODS)
def test_losses_and_gradients_are_those_written_by_hand(
    batch: Batch, name: str, temperature: float
) -> None:
    loss = study.make_loss(name, temperature, 2.25)(*batch)
    expected = loss_by_hand(name, *batch, temperature)
    # wsl_terms returns float32, so two of the losses have float32's accuracy.
    rtol = 1e-6 if name in ("uniform", "balanced") else 1e-11
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    gradients = (torch.autograd.grad(each, batch[0])[0] for each in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol)


def test_masked_drops_the_rows_whose_teacher_is_wrong_and_no_other(batch: Batch) -> None:
    student, teacher, labels = batch
    masked, kd, ce = (
        torch.autograd.grad(study.make_loss(name, 4.0, 2.25)(student, teacher, labels), student)[0]
        for name in ("masked", "KD", "CE")
    )
    assert masked[:24].equal(kd[:24])
    assert masked[24:].equal(ce[24:])
    assert (kd != ce).any(1).all()
    dropped = student[24:], teacher[24:], labels[24:]
    assert study.make_loss("masked", 4.0, 2.25)(*dropped).equal(study.make_loss("CE")(*dropped))


def test_weights_that_are_all_0_are_balanced_to_a_soft_term_of_0() -> None:
    labels = torch.arange(10)
    student = (500.0 * F.one_hot(labels, 10)).requires_grad_()  # cross-entropy 0: weight 0
    teacher = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    assert (wsl_terms(student, teacher, labels).weight == 0).all()
    loss = study.make_loss("balanced", 4.0, 2.25)(student, teacher, labels)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_losses_of_the_ablation_differ_in_the_weight_of_the_soft_term_alone(
    temperature: float,
) -> None:
    """Gradients, from the closed form: KD and WSL have other constants."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(60, 10, generator=generator) for _ in range(2))
    labels = torch.randint(10, (60,), generator=generator)
    hard = (student.softmax(1) - F.one_hot(labels, 10)) / 60
    soft = (
        temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / 60
    )
    weight = wsl_terms(student, teacher, labels).weight
    samples = regularization_samples(student, teacher, labels, temperature=temperature)
    assert 0 < samples.sum() < 60
    weights = {
        "KD": torch.ones(60),
        "dropped": (~samples).float(),
        "uniform": weight.mean().expand(60),
        "WSL": weight,
    }
    assert tuple(weights) == script.LOSSES
    for name, values in weights.items():
        logits = student.clone().requires_grad_()
        script.make_student_loss(script.Method(name, 0.0, temperature), alpha=2.25)(
            logits, teacher, labels
        ).backward()
        torch.testing.assert_close(
            logits.grad, hard + 2.25 * values[:, None] * soft, rtol=1e-4, atol=1e-7
        )


def test_students_of_one_seed_differ_in_their_loss_alone() -> None:
    """With next to no soft term all of them are the student of cross-entropy."""
    task = study.load_task("digits", Path(), torch.device("cpu"))
    drawn = study.draw(task, 100)
    first = study.make_network(task, study.STUDENT_WIDTH)
    (teacher,) = study.train_teachers(task, drawn, 1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    methods = [script.Method("CE"), *(script.Method(loss, 0.0, 4.0) for loss in script.LOSSES)]
    learners = []
    for method in methods:
        network = study.make_network(task, study.STUDENT_WIDTH)
        network.load_state_dict(first.state_dict())
        learned_from = None if method.loss == "CE" else teacher
        learners.append(
            study.Learner(network, script.make_student_loss(method, 1e-9), 2, learned_from)
        )
    seen = study.train_epoch(task, drawn, learners)
    assert seen.labels.sort().values.equal(task.train_labels[drawn].sort().values)
    for other in seen.student_logits[1:]:
        torch.testing.assert_close(other, seen.student_logits[0])
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items()), (
        "the teacher has changed"
    )
    assert not study.predict(task, learners[0].network).equal(study.predict(task, first))


def test_images_are_moved_by_up_to_one_pixel_and_flipped() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 3] = 1
    torch.manual_seed(0)
    moved = study.shift_and_flip(image.expand(500, 1, 8, 8))
    places = {(row, column) for _, _, row, column in moved.nonzero().tolist()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (2, 3, 4, 5)}


def test_the_page_prints_what_the_tables_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (STUDY / "STUDY.md").read_text()
    results, only_tables = STUDY / "results" / "fashion-mnist", shutil.ignore_patterns("*.png")
    shutil.copytree(results, tmp_path, ignore=only_tables, dirs_exist_ok=True)
    for name, report in (REPORTS | {"teacher_mistakes": teacher_mistakes.report}).items():
        described = json.loads((tmp_path / f"{name}.json").read_text())
        report(tmp_path, described)
        assert (
            len({row["seed"] for row in table(tmp_path / f"{name}.csv")})
            == described["seeds"]
            >= 10
        )
        for value in (
            f"{described['seeds']} seeds",
            described["torch"].split("+")[0],
            described["device"],
        ):
            assert value in page
    digits = tmp_path / "digits"
    shutil.copytree(STUDY / "results" / "digits", digits, ignore=only_tables)
    teacher_mistakes.report(digits, json.loads((digits / "teacher_mistakes.json").read_text()))
    printed, blocks = (
        capsys.readouterr().out,
        re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL),
    )
    assert len(blocks) >= 6
    assert all(block in printed for block in blocks)
    header = r"^\| teacher \| (?:wrong|WSL - KD) \|"
    tables = re.findall(rf"{header}.*?^\n", page, re.MULTILINE | re.DOTALL)
    assert len(tables) == 4
    assert all(table in printed for table in tables)
    linked = re.findall(r"\((results/[^)]+)\)", page)
    drawn = {f"results/fashion-mnist/{figure.name}" for figure in tmp_path.glob("*.png")}
    assert drawn == {name for name in linked if re.match(r"results/fashion.*\.png$", name)}
    assert all((STUDY / name).exists() for name in linked)
