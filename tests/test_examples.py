"""The examples run as their users run them: as programs, in a folder of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

for _module in ("sklearn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(_module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]")

DIGITS = Path(__file__).parents[1] / "examples" / "digits.py"


def run_digits(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DIGITS), *options], cwd=folder, capture_output=True, text=True, timeout=120
    )


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Before any training, with the message as the one line of error."""
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "teacher" not in done.stderr, "the progress bar has started"
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert errors == [done.stderr.splitlines()[-1]]
    assert message in errors[0]


def test_digits_reports_three_losses_and_saves_the_figure(tmp_path: Path) -> None:
    figure = tmp_path / "x.png"
    tiny = ("--seeds", "2", "--epochs", "2", "--teacher-epochs", "2")
    done = run_digits(tmp_path, *tiny, "--figure", str(figure))
    assert done.returncode == 0, done.stderr

    accuracies = re.findall(r"^ +(CE|KD|WSL) +(\S+) \+- (\S+)$", done.stdout, flags=re.MULTILINE)
    assert [name for name, _, _ in accuracies] == ["CE", "KD", "WSL"]
    for name, mean, spread in accuracies:
        assert 0 <= float(mean) <= 100, name
        assert 0 <= float(spread) <= 100, name  # false for NaN, too
    differences = re.findall(r"^ +(\w+ - \w+) +(\S+)  \[(\S+), (\S+)\]$", done.stdout, flags=re.MULTILINE)
    assert [pair for pair, *_ in differences] == ["WSL - CE", "WSL - KD", "KD - CE"]
    for pair, mean, low, high in differences:
        assert float(low) <= float(mean) <= float(high), pair

    content = figure.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 5_000


def test_digits_refuses_a_missing_figure_folder_before_training(tmp_path: Path) -> None:
    assert_refused(run_digits(tmp_path, "--figure", str(tmp_path / "missing" / "x.png")), "does not exist")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0", "argument --seeds: must be at least 2, got 0"),
        ("--epochs", "-3", "argument --epochs: must be at least 1, got -3"),
        ("--temperature", "nan", "argument --temperature: must be finite and > 0, got nan"),
    ],
)
def test_digits_refuses_an_option_out_of_range(tmp_path: Path, option: str, value: str, message: str) -> None:
    assert_refused(run_digits(tmp_path, option, value), message)
