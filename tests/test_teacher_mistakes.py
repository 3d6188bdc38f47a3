"""examples/study/teacher_mistakes.py as a program on real digits, also resumed; the mistakes."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

for _module in ("sklearn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]"
    )

STUDY = Path(__file__).parents[1] / "examples" / "study"
sys.path.insert(0, str(STUDY))

import study  # noqa: E402
import teacher_mistakes as script  # noqa: E402

from weighted_soft_labels.analysis import wsl_terms  # noqa: E402

TINY = (
    "--train-images",
    "100",
    "--sizes",
    "60",
    "120",
    "--epochs",
    "1",
    "--teacher-epochs",
    "2",
    "--workers",
    "1",
)
TABLE = "teacher_mistakes.csv"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STUDY / "teacher_mistakes.py"), *map(str, options)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_table(tmp_path: Path) -> None:
    done = run(tmp_path, *TINY, "--seeds", 2, "--out", "out")
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "out" / TABLE)
    for seed in "01":  # 15 settings of two sizes, and CE once for every share of noisy labels
        assert Counter(row["method"] for row in rows if row["seed"] == seed) == {
            "CE": 3,
            "KD": 15,
            "WSL": 15,
            "uniform": 15,
        }
    assert all(
        0 < float(row["weight_wrong"]) < float(row["weight_right"]) < 1
        for row in rows
        if row["method"] != "CE"
    )

    # What a kill before the end of seed 1 leaves. Seed 0 is kept as it stands, not computed again.
    text = "".join(
        line for line in (tmp_path / "out" / TABLE).read_text().splitlines(True) if line[:2] != "1,"
    )
    assert text.count("\n") == 1 + len(rows) / 2
    (tmp_path / "out" / TABLE).write_text(
        text.replace(f"CE,{rows[0]['accuracy']},", "CE,12.34,", 1)
    )
    again = run(tmp_path, *TINY, "--seeds", 2, "--out", "out")
    assert again.returncode == 0, again.stderr
    assert table(tmp_path / "out" / TABLE) == [{**rows[0], "accuracy": "12.34"}, *rows[1:]]


def test_a_run_does_not_go_on_with_other_options() -> None:
    args, before = (
        argparse.Namespace(out="out", seeds=seeds, epochs=1, sizes=[60, 120]) for seeds in (10, 8)
    )
    study.check_same_options(args, vars(before))  # more seeds are welcome
    args.epochs = 2
    with pytest.raises(
        ValueError, match="out holds results of epochs 1, got 2: choose another --out"
    ):
        study.check_same_options(args, vars(before))


def test_the_report_is_made_of_the_table_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of invented accuracies: WSL is 1 or 3 points above KD in two seeds."""
    rows = []
    args = argparse.Namespace(sizes=[60, 450], alpha=2.25)
    for seed, gain in ((0, 1.0), (1, 3.0)):
        for setting in script.settings(args):
            ce = script.Setting(noise=setting.noise)
            for method, value in {
                "CE": 50.0 - 100 * setting.noise,
                "KD": 60.0,
                "WSL": 60 + gain,
                "uniform": 60.5,
            }.items():
                of = ce if method == "CE" else setting
                shares = {"teacher_wrong": 0.25, "weight_right": 0.75, "weight_wrong": 0.125}
                measured = dict.fromkeys(shares) if method == "CE" else shares
                row = {
                    "seed": seed,
                    **of._asdict(),
                    "method": method,
                    "accuracy": value,
                    **measured,
                }
                rows += [] if row in rows else [row]
    study.write_table(tmp_path / TABLE, rows)
    script.report(tmp_path, {"dataset": "digits", "alpha": 2.25})
    printed = capsys.readouterr().out
    lines = {
        cells[1]: cells[2:]
        for cells in ([x.strip() for x in y.split("|")] for y in printed.splitlines())
        if cells[1:]
    }
    half = "12.71"  # Student's t of two values that differ by 2
    assert lines["450 images, 20 % noisy labels"][:6] == [
        "25.0",
        "30.00",
        "60.00",
        "62.00",
        "60.50",
        f"+2.00 +- {half}",
    ]
    assert lines["60 images"][6:-1] == [
        f"+1.50 +- {half}",
        f"+12.00 +- {half}",
        "+10.00 +- 0.00",
        "0.75",
        "0.12",
    ]
    assert {"450 images", "450 images, 40 % systematic", "450 images, 20 % random, T = 1"} < set(
        lines
    )
    assert len(table(tmp_path / "teacher_mistakes_summary.csv")) == len(script.settings(args)) == 15
    assert (tmp_path / "teacher_mistakes.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_random_mistakes_are_wrong_on_so_many_images_and_leave_the_others(
    logits: torch.Tensor, share: float
) -> None:
    labels = logits.argmax(1).roll(1)  # wrong on most, before
    labels[:500] = logits[:500].argmax(1)
    wrong = script.roll(logits, labels, share, seed=3)
    changed = (wrong != logits).any(1)
    rolled = (wrong.argmax(1) != labels) & ((wrong.sort(1).values == logits.sort(1).values).all(1))
    assert (rolled | ~changed).all(), (
        "a row that was rolled to the label, or was not rolled but rewritten"
    )
    assert (changed[:500].sum() / 500).item() == pytest.approx(share, abs=0.05)
    assert (
        changed.sum() <= share * 1000
    )  # all of those drawn, but those rolled to where they were: wrong before
    assert (script.roll(logits, logits.argmax(1), share, seed=3) != logits).any(
        1
    ).sum() == share * 1000
    more = (script.roll(logits, logits.argmax(1), 0.5, seed=3) != logits).any(1)
    assert more[(script.roll(logits, logits.argmax(1), share, seed=3) != logits).any(1)].all()


@pytest.mark.parametrize(("share", "swapped"), [(0.2, 2), (0.4, 4)])
def test_systematic_mistakes_swap_pairs_of_classes_and_no_other(
    logits: torch.Tensor, share: float, swapped: int
) -> None:
    wrong = script.swap_classes(logits, share, seed=3)
    partner = [(wrong == logits[:, [c]]).all(0).nonzero().item() for c in range(10)]
    assert sum(partner[c] != c for c in range(10)) == swapped
    assert all(partner[partner[c]] == c for c in range(10))
    assert (wrong.argmax(1) != logits.argmax(1)).float().mean().item() == pytest.approx(
        share, abs=0.05
    )
    assert script.swap_classes(wrong, share, seed=3).equal(logits)
    assert not script.swap_classes(logits, share, seed=4).equal(wrong)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_noisy_labels_are_wrong_on_so_many_images(share: float) -> None:
    labels = torch.arange(10).repeat(100)
    noisy = script.make_noisy(labels, 10, share, seed=3)
    assert (noisy != labels).sum() == share * 1000
    assert noisy.min() >= 0
    assert noisy.max() <= 9


def test_uniform_gives_every_image_the_mean_weight_of_the_batch(logits: torch.Tensor) -> None:
    """KD whose alpha is multiplied by it: the same gradient, to rounding."""
    student, teacher, labels = (
        logits[:100].clone().requires_grad_(),
        logits[100:200],
        torch.arange(10).repeat(10),
    )
    weight = wsl_terms(student, teacher, labels).weight.mean().item()
    assert 0.1 < weight < 0.9
    uniform, kd = (
        torch.autograd.grad(study.make_loss(name, 4.0, alpha)(student, teacher, labels), student)[0]
        for name, alpha in (("uniform", 2.25), ("KD", 2.25 * weight))
    )
    torch.testing.assert_close(uniform, kd)


def test_a_student_learns_and_its_weights_are_those_of_its_training() -> None:
    task = study.load_task("digits", Path(), torch.device("cpu"))
    images, labels = task.train_images[:300], task.train_labels[:300]
    right = 6.0 * F.one_hot(labels, 10)
    wrong = script.roll(right, labels, 0.3, seed=0)
    torch.manual_seed(0)
    student, weight = script.train_student(
        images, wrong, labels, study.make_loss("WSL", 4.0, 2.25), epochs=20
    )
    mistaken = wrong.argmax(1) != labels
    assert mistaken.sum() == 90
    assert weight[~mistaken].mean() > 0.9
    assert weight[mistaken].mean() < 0.3
    assert study.accuracy(student(images), labels) > 85
