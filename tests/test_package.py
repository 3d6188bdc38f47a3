"""The package as it arrives: what it imports, exports and ships."""

from __future__ import annotations

import ast
from importlib.metadata import version
from pathlib import Path

from processes import run_python

import weighted_soft_labels

PACKAGE = Path(weighted_soft_labels.__file__).parent


def test_public_names():
    assert weighted_soft_labels.__all__ == ["WSLLoss", "wsl_loss"]
    assert weighted_soft_labels.__version__ == version("weighted-soft-labels")
    assert (PACKAGE / "py.typed").exists()


def test_works_without_triton():
    run_python("""
import sys
sys.modules["triton"] = None  # any import of it raises
import torch
from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms
student = torch.zeros(2, 3, requires_grad=True)
wsl_loss(student, torch.zeros(2, 3), torch.tensor([0, 1])).backward()
wsl_terms(student, student, torch.tensor([0, 1]))
""")


def test_import_brings_neither_triton_nor_the_reference():
    run_python("""
import sys, torch
before = set(sys.modules)
import weighted_soft_labels
new = set(sys.modules) - before
assert not any(name.startswith("triton") for name in new), new
ours = {name.removeprefix("weighted_soft_labels") for name in new if "soft_labels" in name}
assert ours == {"", ".loss", "._operator", "._options", ".backends", ".backends.eager"}, ours
""")


def imports(path):
    """Return the modules of the package that a file imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{each.name}" for each in node.names}
    modules = {
        name.removeprefix("weighted_soft_labels.") for name in names if "soft_labels" in name
    }
    files = {module: PACKAGE / (module.replace(".", "/")) for module in modules}
    return {m for m, f in files.items() if f.with_suffix(".py").exists() or f.is_dir()}


def test_imports_run_one_way():
    """Backends do not import one another, except that cpu falls back on eager."""
    allowed = {
        "_options": set(),
        "reference": set(),
        "backends/eager": {"_options"},
        "backends/triton": {"_options"},
        "backends/cpu": {"_options", "backends", "backends.eager"},
        "backends/__init__": {"_options", "backends", "backends.eager"},
        "_operator": {"_options", "backends", "backends.eager"},
        "loss": {"_options", "_operator"},
        "analysis": {"_options", "_operator"},
    }
    for name, modules in allowed.items():
        assert imports(PACKAGE / f"{name}.py") <= modules, name
