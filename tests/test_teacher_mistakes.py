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
            "masked": 15,
            "balanced": 15,
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


def invented_rows(args: argparse.Namespace, seed: int, gain: float) -> list[study.Row]:
    accuracies = {
        "KD": 60.0,
        "WSL": 60 + gain,
        "uniform": 60.5,
        "masked": 61.0,
        "balanced": 60 + 2 * gain,
    }
    measured = {"teacher_wrong": 0.25, "weight_right": 0.75, "weight_wrong": 0.125}
    rows = []
    for setting in script.settings(args):
        described = {"seed": seed, **setting._asdict()}
        for method, accuracy in accuracies.items():
            rows.append({**described, "method": method, "accuracy": accuracy, **measured})
    for noise in (0.0, 0.2, 0.4):
        described = {"seed": seed, **script.Setting(noise=noise)._asdict()}
        empty = dict.fromkeys(measured)
        rows.append({**described, "method": "CE", "accuracy": 50 - 100 * noise, **empty})
    return rows


def printed_tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Return every Markdown table as its rows by name, each a cell by column."""
    tables = []
    for block in text.split("\n\n"):
        if block.startswith("| teacher |"):
            header, _, *lines = ([x.strip() for x in y.split("|")[1:-1]] for y in block.split("\n"))
            tables.append({line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines})
    return tables


def test_the_report_is_made_of_the_table_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The accuracies are invented: WSL is 1 or 3 points above KD in two seeds."""
    args = argparse.Namespace(sizes=[60, 450], alpha=2.25)
    rows = invented_rows(args, 0, gain=1.0) + invented_rows(args, 1, gain=3.0)
    study.write_table(tmp_path / TABLE, rows)
    script.report(tmp_path, {"dataset": "digits", "alpha": 2.25})
    accuracies, differences = printed_tables(capsys.readouterr().out)
    assert accuracies["450 images, 20 % noisy labels"] == {
        "wrong": "25.0",
        "CE": "30.00",
        "KD": "60.00",
        "WSL": "62.00",
        "uniform": "60.50",
        "masked": "61.00",
        "balanced": "64.00",
        "weight if right": "0.75",
        "if wrong": "0.12",
    }
    half = "12.71"  # Student's t of two values that differ by 2
    assert differences["60 images"] == {
        "WSL - KD": f"+2.00 +- {half}",
        "WSL - uniform": f"+1.50 +- {half}",
        "WSL - CE": f"+12.00 +- {half}",
        "KD - CE": "+10.00 +- 0.00",
        "masked - KD": "+1.00 +- 0.00",
        "WSL - masked": f"+1.00 +- {half}",
        "balanced - KD": "+4.00 +- 25.41",
        "balanced - WSL": f"+2.00 +- {half}",
    }
    assert list(accuracies) == list(differences)
    names = {"450 images", "450 images, 40 % systematic", "450 images, 20 % random, T = 1"}
    assert names < set(accuracies)

    summary = table(tmp_path / "teacher_mistakes_summary.csv")
    assert len(summary) == len(script.settings(args)) == 15
    assert float(summary[0]["balanced - KD"]) == 4
    assert float(summary[0]["balanced - KD half"]) == pytest.approx(25.412)
    assert (tmp_path / "teacher_mistakes.png").read_bytes().startswith(b"\x89PNG")
    gains = {"KD": 2, "uniform": 1.5, "CE": 12, "masked": 1, "balanced": -2}
    row = script.summarize(rows)[0]
    assert {other: script.gain_of_wsl(row, other)[0] for other in gains} == gains


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
