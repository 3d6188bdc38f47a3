"""The package as it arrives: what it imports, exports and ships."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import weighted_soft_labels


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_public_names():
    assert weighted_soft_labels.__all__ == ["WSLLoss", "wsl_loss"]
    assert weighted_soft_labels.__version__ == version("weighted-soft-labels")
    assert (Path(weighted_soft_labels.__file__).parent / "py.typed").exists()


def test_works_without_triton():
    run = run_python("""
import sys
sys.modules["triton"] = None  # any import of it raises
import torch
from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms
student = torch.zeros(2, 3, requires_grad=True)
wsl_loss(student, torch.zeros(2, 3), torch.tensor([0, 1])).backward()
wsl_terms(student, student, torch.tensor([0, 1]))
""")
    assert run.returncode == 0, run.stderr


def test_import_brings_neither_triton_nor_the_reference():
    run = run_python("""
import sys, torch
before = set(sys.modules)
import weighted_soft_labels
new = set(sys.modules) - before
assert not any(name.startswith("triton") for name in new), new
ours = {name for name in new if name.startswith("weighted_soft_labels")}
assert ours == {"weighted_soft_labels", "weighted_soft_labels.loss", "weighted_soft_labels._eager"}, ours
""")
    assert run.returncode == 0, run.stderr


def test_implementations_do_not_import_one_another():
    package = Path(weighted_soft_labels.__file__).parent
    for name in ("_eager", "_triton", "reference"):
        lines = (package / f"{name}.py").read_text().splitlines()
        imports = [line for line in lines if "import" in line and "weighted_soft_labels" in line]
        assert imports in ([], ["    from weighted_soft_labels.loss import Options"]), (
            name,
            imports,
        )  # a type
