"""Which backend runs, how to force one, and what happens if one cannot be loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from budget import assert_as_reference, exact_terms, step
from conftest import BUILT, TRITON
from processes import run_python
from test_loss import STRIDED, problem

import weighted_soft_labels
from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms
from weighted_soft_labels.backends import choose, eager, use_backend

needs_kernel = pytest.mark.skipif(not BUILT, reason="the C kernel is not built")
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")

STUDENT, TEACHER, TARGET = problem((6, 10))
PROBABILITIES = TEACHER.softmax(1)


def chosen(*tensors):
    return choose(*tensors).__name__.rpartition(".")[2]


# --- choose ---


@needs_kernel
@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ((STUDENT, TEACHER, TARGET), "cpu"),
        ((STUDENT.half(), TEACHER.bfloat16(), TARGET.int()), "cpu"),
        ((STUDENT.double(), TEACHER, TARGET), "eager"),
        ((STUDENT, TEACHER.double(), TARGET), "eager"),
        ((STUDENT, TEACHER, PROBABILITIES), "eager"),
        (tuple(x.to("meta") for x in (STUDENT, TEACHER, TARGET)), "eager"),
    ],
)
def test_choose_names_the_backend_that_runs(tensors, expected, monkeypatch):
    assert chosen(*tensors) == expected
    calls = []
    module = choose(*tensors)
    run = module.run
    monkeypatch.setattr(module, "run", lambda *arguments: calls.append(1) or run(*arguments))
    wsl_loss(*tensors)
    assert calls


# --- use_backend ---


def test_a_backend_is_forced_at_once_and_until_the_next():
    try:
        use_backend("eager")
        assert chosen(STUDENT, TEACHER, TARGET) == "eager"
    finally:
        use_backend("auto")
    assert chosen(STUDENT, TEACHER, TARGET) == ("cpu" if BUILT else "eager")


@needs_kernel
def test_with_blocks_restore_the_backend_before_in_any_nesting_and_after_an_error():
    with use_backend("eager"):
        with use_backend("cpu"):
            assert chosen(STUDENT, TEACHER, TARGET) == "cpu"
            with use_backend("auto"):
                assert chosen(STUDENT, TEACHER, PROBABILITIES) == "eager"
        assert chosen(STUDENT, TEACHER, TARGET) == "eager"
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert chosen(STUDENT, TEACHER, TARGET) == "eager"
    assert chosen(STUDENT, TEACHER, TARGET) == "cpu"


def test_a_name_that_is_no_backend_is_an_error_and_changes_nothing():
    with use_backend("eager"):
        with pytest.raises(ValueError, match="one of auto, eager, cpu, triton, got 'cuda'"):
            use_backend("cuda")
        assert chosen(STUDENT, TEACHER, TARGET) == "eager"


@needs_kernel
@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ((STUDENT.double(), TEACHER, TARGET), "float64 logits"),
        ((STUDENT, TEACHER, PROBABILITIES), "class probabilities as target"),
        (tuple(x.to("meta") for x in (STUDENT, TEACHER, TARGET)), "tensors on meta"),
    ],
)
def test_the_forced_kernel_refuses_what_it_cannot_run_and_says_why(tensors, reason):
    message = f"backend 'cpu' was forced and cannot run these tensors: {reason}"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        wsl_loss(*tensors)


def test_forced_triton_refuses_float64():
    message = "backend 'triton' was forced and cannot run these tensors: float64 logits"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        wsl_loss(STUDENT.double(), TEACHER, TARGET)


@needs_triton
def test_forced_triton_on_a_cpu_without_the_interpreter_says_why():
    run_python(
        """
import torch
from weighted_soft_labels import wsl_loss
from weighted_soft_labels.backends import use_backend
use_backend("triton")
student, target = torch.zeros(2, 3), torch.tensor([0, 1])
for _ in range(2):
    try:
        wsl_loss(student, student, target)
    except RuntimeError as error:
        assert "backend 'triton' was forced and cannot run these tensors: " in str(error), error
        assert "got cpu" in str(error), error
    else:
        raise AssertionError("no error")
""",
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )


@needs_kernel
def test_compiled_code_obeys_at_run_time(monkeypatch):
    """The operator is opaque: the compiled code chooses at every call."""
    torch._dynamo.reset()
    function = torch.compile(wsl_loss, fullgraph=True)
    expected = step(function, STUDENT, TEACHER, TARGET)
    calls = []
    run = eager.run
    monkeypatch.setattr(eager, "run", lambda *arguments: calls.append(1) or run(*arguments))
    torch.testing.assert_close(step(function, STUDENT, TEACHER, TARGET), expected)
    assert calls == []
    with torch._dynamo.config.patch(error_on_recompile=True):
        with use_backend("eager"):
            torch.testing.assert_close(step(function, STUDENT, TEACHER, TARGET), expected)
        assert calls
        calls.clear()
        step(function, STUDENT, TEACHER, TARGET)
        assert not calls


# --- a backend that cannot be loaded ---

CHECK = """
import sys, warnings
import torch
import weighted_soft_labels
from weighted_soft_labels import reference, wsl_loss
from weighted_soft_labels.backends import use_backend
folder = sys.argv[1] if len(sys.argv) > 1 else ""
assert weighted_soft_labels.__file__.startswith(folder), weighted_soft_labels.__file__
student, teacher = torch.randn(2, 6, 10).unbind(0)
target = torch.arange(6)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        loss = wsl_loss(student, teacher, target)
        torch.testing.assert_close(loss, reference.wsl_loss(student, teacher, target))
messages = [str(each.message) for each in caught if each.category is RuntimeWarning]
assert len(messages) == 1, messages
for part in ("cpu backend cannot run here", "cpu_kernel", "several times slower", "C compiler",
             "use_backend('eager')"):
    assert part in messages[0], messages
with warnings.catch_warnings():
    warnings.simplefilter("error")
    use_backend("eager")
    wsl_loss(student, teacher, target)
use_backend("cpu")
try:
    wsl_loss(student, teacher, target)
except RuntimeError as error:
    assert "backend 'cpu' was forced and cannot run these tensors: " in str(error), error
    assert "cpu_kernel" in str(error), error
else:
    raise AssertionError("no error")
"""


@pytest.mark.parametrize("extension", ["missing", "garbage"])
def test_a_kernel_that_does_not_load_is_one_warning_and_right_numbers(extension, tmp_path):
    package = Path(weighted_soft_labels.__file__).parent
    copy = tmp_path / "weighted_soft_labels"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    if extension == "garbage":
        suffix = ".pyd" if os.name == "nt" else ".abi3.so"
        (copy / "backends" / f"cpu_kernel{suffix}").write_bytes(b"a library for another platform")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = [{str(tmp_path)!r}]"
    run_python(code + CHECK, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})


def test_a_stub_in_place_of_triton_breaks_neither_import_nor_cpu():
    run_python("""
import sys, types
stub = types.ModuleType("triton")  # as documentation builders put it there
del stub.__spec__
sys.modules["triton"] = stub
import warnings
warnings.simplefilter("error", RuntimeWarning)
import torch
from weighted_soft_labels import wsl_loss
from weighted_soft_labels.backends import use_backend
student, target = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])
wsl_loss(student, torch.zeros(2, 3), target).backward()
use_backend("triton")
try:
    wsl_loss(student, student, target)
except RuntimeError as error:
    assert "backend 'triton' was forced and cannot run these tensors: " in str(error), error
    assert "triton" in str(error).partition("tensors: ")[2], error
else:
    raise AssertionError("no error")
""")


# --- the eager backend ---


@pytest.mark.parametrize("shape", [(7, 10), (3, 5, 40), (2, 3, 7, 11), (5, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_and_their_remainders(shape, dtype, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK", 64)
    inputs = problem(shape, ignored=True, dtype=dtype)
    with use_backend("eager"):
        assert_as_reference(*inputs)
        assert_as_reference(*problem(shape, probabilities=True, dtype=dtype), reduction="sum")
        terms = wsl_terms(*inputs)
    monkeypatch.undo()
    for term, exact in zip(terms, exact_terms(*inputs)):
        torch.testing.assert_close(term.double(), exact.double(), rtol=1e-5, atol=1e-6)


# --- what a backend does with layouts of its own ---


@pytest.mark.parametrize("layout", STRIDED)
def test_terms_are_the_same_in_every_layout_on_every_backend(layout, backend):
    student, teacher, target = problem((3, 5, 4, 6), ignored=True)
    terms = wsl_terms(STRIDED[layout](student), teacher, target)
    for term, exact in zip(terms, exact_terms(STRIDED[layout](student), teacher, target)):
        torch.testing.assert_close(term.double(), exact.double(), rtol=1e-5, atol=1e-6)
