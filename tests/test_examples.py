"""examples/digits.py as its users run it: as a program, in another folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

for _module in ("sklearn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]"
    )

DIGITS = Path(__file__).parents[1] / "examples" / "digits.py"
TEACHERS = ("good teacher", "10 % misaligned", "20 % misaligned", "40 % misaligned", "weak teacher")
COLUMNS = (
    "wrong",
    "CE",
    "CE spread",
    "KD",
    "KD spread",
    "WSL",
    "WSL spread",
    "balanced",
    "balanced spread",
    "gain",
    "half",
    "if right",
    "if wrong",
)


def run_digits(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DIGITS), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_weights_help_where_the_teacher_is_wrong(tmp_path: Path) -> None:
    done = run_digits(tmp_path, "--seeds", "2", "--epochs", "30", "--teacher-epochs", "10")
    assert done.returncode == 0, done.stderr
    lines = {
        name: line
        for line in done.stdout.splitlines()
        for name in TEACHERS
        if line.startswith(name)
    }
    assert tuple(lines) == TEACHERS
    table = {}
    for name, line in lines.items():
        values = re.findall(r"[+-]?\d+\.?\d*", line.removeprefix(name))
        table[name] = dict(zip(COLUMNS, map(float, values), strict=True))
        assert table[name]["gain"] == pytest.approx(
            table[name]["WSL"] - table[name]["KD"], abs=0.11
        )
        assert 0 < table[name]["if wrong"] < table[name]["if right"] < 1
    worst = table["40 % misaligned"]
    assert worst["wrong"] > table["20 % misaligned"]["wrong"] > table["good teacher"]["wrong"]
    assert worst["gain"] > 1  # percentage point; more after the default number of epochs
    assert worst["WSL"] > worst["CE"] > 40
    assert worst["balanced"] > worst["KD"]

    figure = (tmp_path / "digits.png").read_bytes()
    assert figure.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(figure) > 20_000


def test_digits_refuses_a_missing_figure_folder_before_training(tmp_path: Path) -> None:
    done = run_digits(tmp_path, "--figure", "missing/x.png")
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == "digits.py: error: the folder of --figure missing/x.png does not exist"
    )
