"""torch.compile: one graph, the same numbers, no compilation for another batch size."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo
from budget import step
from test_loss import INF, NAN, problem

from weighted_soft_labels import WSLLoss, wsl_loss
from weighted_soft_labels.analysis import wsl_terms


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function=wsl_loss, **options):
    return torch.compile(function, fullgraph=True, **options)


OPTIONS = [
    ("index", {}),
    ("ignored", {"temperature": 4.0, "label_smoothing": 0.1}),
    ("probabilities", {"temperature": 3.0, "reduction": "sum"}),
    ("ignored", {"temperature": 1.0, "reduction": "none", "hard_weight": 0.0}),
    ("index", {"alpha": 0.0, "label_smoothing": 1.0}),
]


@pytest.mark.parametrize("shape", [(6, 10), (2, 5, 3, 4)])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_compiled_is_eager(shape, kind, options):
    inputs = problem(shape, ignored=kind == "ignored", probabilities=kind == "probabilities")
    expected = step(wsl_loss, *inputs, **options)
    torch.testing.assert_close(step(compiled(), *inputs, **options), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_half_precision(dtype):
    student, teacher, target = problem((6, 10), dtype=dtype)
    upstream = torch.tensor(1024.0)
    expected = step(wsl_loss, student, teacher, target, upstream=upstream)
    ours = step(compiled(), student, teacher, target, upstream=upstream)
    assert ours[1].dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


def test_compiled_on_extreme_rows():
    student = torch.tensor([[0, -INF, 1.0], [1e30, -1e30, 0], [NAN, 0, 0], [NAN, 0, 0], [0, -INF, 0], [20, 0, 0]])
    teacher = torch.tensor([[1.0, -INF, 0], [-1e30, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [21, 0, 0]])
    target = torch.tensor([0, 0, 1, -100, 0, 0])
    expected = step(wsl_loss, student, teacher, target, reduction="none")
    ours = step(compiled(), student, teacher, target, reduction="none")
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_compiled_weight_is_exact():
    teacher = torch.zeros(57, 100)
    teacher[:, 1] = torch.linspace(4, 32, 57)
    student = teacher.clone()
    student[:, 1] -= 0.5
    target = torch.ones(57, dtype=torch.long)
    ours = compiled(wsl_terms)(student, teacher, target).weight
    expected = wsl_terms(student.double(), teacher.double(), target).weight
    assert (ours - expected).abs().max() < 1e-6


@pytest.mark.parametrize("index", [10, -1, 2**40])
def test_compiled_index_that_names_no_class_is_never_a_plausible_number(index):
    student, teacher, target = problem((4, 10))
    target[2] = index
    try:
        loss = compiled()(student, teacher, target)
    except (IndexError, RuntimeError):
        return
    assert loss.isnan()


def test_one_compilation_serves_all_batch_sizes():
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = compiled(dynamic=True)
        for n in (8, 12, 64, 7):
            inputs = problem((n, 10), ignored=True)
            torch.testing.assert_close(step(function, *inputs), step(wsl_loss, *inputs), rtol=1e-5, atol=1e-6)


def test_default_compilation_learns_that_the_batch_varies_once():
    """By default the compiler takes the first size as fixed, and generalises at the second: then it is done."""
    function = compiled()
    for n in (8, 12):
        step(function, *problem((n, 10)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (16, 33, 128):
            inputs = problem((n, 10))
            torch.testing.assert_close(step(function, *inputs), step(wsl_loss, *inputs), rtol=1e-5, atol=1e-6)


def test_batch_dimension_can_be_marked_dynamic():
    student, teacher, target = problem((8, 10))
    for tensor in (student, teacher, target):
        torch._dynamo.mark_dynamic(tensor, 0)
    assert compiled()(student, teacher, target).isfinite()


def test_module_inside_a_compiled_training_step():
    model, criterion = torch.nn.Linear(4, 10), WSLLoss(temperature=4.0)

    def training_step(x, teacher, target):
        return criterion(model(x), teacher, target)

    _, teacher, target = problem((8, 10))
    x = torch.randn(8, 4)
    expected = torch.autograd.grad(training_step(x, teacher, target), model.weight)
    ours = torch.autograd.grad(compiled(training_step)(x, teacher, target), model.weight)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_compiled_func_grad_is_right_or_refused():
    """The compiler of torch 2.11 to 2.13 differentiates through the forward of an autograd.Function here."""
    student, teacher, target = problem((4, 10))
    try:
        gradient = compiled(torch.func.grad(lambda s: wsl_loss(s, teacher, target)))(student)
    except Exception as error:
        assert "leave the transform out of the compiled code" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(gradient, step(wsl_loss, student, teacher, target)[1], rtol=1e-5, atol=1e-6)


def run_python(code, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_cold_compilation_as_the_first_thing_a_process_does():
    run = run_python("""
        import torch
        from weighted_soft_labels import wsl_loss
        student = torch.randn(4, 5, requires_grad=True)
        torch.compile(wsl_loss, fullgraph=True)(student, torch.randn(4, 5), torch.tensor([0, 1, 2, 3])).backward()
        assert student.grad.isfinite().all()
    """)
    assert run.returncode == 0, run.stderr
