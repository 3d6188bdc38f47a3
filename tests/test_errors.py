"""Errors: their type, and a message that says what was expected and what came.

Tensors whose numbers do not lie at their address are no errors. The loss handles them or refuses.
"""

from __future__ import annotations

import re

import pytest
import torch
from budget import assert_as_reference, step
from test_loss import problem

from weighted_soft_labels import WSLLoss, wsl_loss
from weighted_soft_labels.analysis import wsl_terms
from weighted_soft_labels.backends import use_backend

LOGITS, TARGET = torch.zeros(8, 10), torch.zeros(8, dtype=torch.long)
PIXELS = torch.zeros(2, 3, 4)

INPUTS = [
    (
        (LOGITS, torch.zeros(8, 100), TARGET),
        ValueError,
        "must have the same shape, got (8, 10) and (8, 100)",
    ),
    ((LOGITS, LOGITS, TARGET[:4]), ValueError, "(8,) for logits of (8, 10), got (4,)"),
    ((LOGITS, LOGITS, TARGET[:, None]), ValueError, "(8,) for logits of (8, 10), got (8, 1)"),
    ((LOGITS, LOGITS, torch.zeros(8)), ValueError, "(8, 10) for logits of (8, 10), got (8,)"),
    (
        (PIXELS, PIXELS, torch.zeros(2, 3).long()),
        ValueError,
        "(2, 4) for logits of (2, 3, 4), got (2, 3)",
    ),
    ((torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0)), ValueError, "got a scalar"),
    (
        (torch.zeros(8, 0), torch.zeros(8, 0), TARGET),
        ValueError,
        "at least one class, got shape (8, 0)",
    ),
    ((LOGITS, LOGITS.to("meta"), TARGET), ValueError, "same device, got cpu, meta and cpu"),
    ((LOGITS, LOGITS, TARGET.to("meta")), ValueError, "same device, got cpu, cpu and meta"),
    (
        (LOGITS.long(), LOGITS, TARGET),
        TypeError,
        "student_logits must be float16, bfloat16, float32 or float64, got",
    ),
    ((LOGITS, LOGITS.to(torch.complex64), TARGET), TypeError, "teacher_logits must be float16"),
    ((LOGITS, LOGITS, TARGET.bool()), TypeError, "got torch.bool"),
    ((LOGITS, LOGITS, TARGET.to(torch.complex64)), TypeError, "got torch.complex64"),
    (([[0.0]], LOGITS, TARGET), TypeError, "student_logits must be a Tensor, got list"),
    ((LOGITS, None, TARGET), TypeError, "teacher_logits must be a Tensor, got NoneType"),
    ((LOGITS, LOGITS, 3), TypeError, "target must be a Tensor, got int"),
    (
        (LOGITS, LOGITS, TARGET + 10),
        IndexError,
        "class indices in [0, 10) or ignore_index (-100), got 10",
    ),
    (
        (LOGITS, LOGITS, TARGET - 1),
        IndexError,
        "class indices in [0, 10) or ignore_index (-100), got -1",
    ),
    ((LOGITS[0], LOGITS[0], torch.tensor(10)), IndexError, "got 10"),
]


@pytest.mark.parametrize("function", [wsl_loss, WSLLoss(), wsl_terms])
@pytest.mark.parametrize(("inputs", "error", "message"), INPUTS)
def test_inputs(function, inputs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        function(*inputs)


OPTIONS = [
    ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
    ({"temperature": -2}, "temperature must be finite and > 0, got -2"),
    ({"temperature": float("nan")}, "temperature must be finite and > 0, got nan"),
    ({"temperature": float("inf")}, "temperature must be finite and > 0, got inf"),
    ({"temperature": "4"}, "temperature must be a number, got '4'"),
    ({"temperature": None}, "temperature must be a number, got None"),
    ({"alpha": -0.1}, "alpha must be finite and >= 0, got -0.1"),
    ({"alpha": True}, "alpha must be a number, got True"),
    ({"hard_weight": -1}, "hard_weight must be finite and >= 0, got -1"),
    ({"label_smoothing": 1.1}, "label_smoothing must be in [0, 1], got 1.1"),
    ({"label_smoothing": -0.1}, "label_smoothing must be in [0, 1], got -0.1"),
    ({"ignore_index": 1.0}, "ignore_index must be an int, got 1.0"),
    ({"ignore_index": torch.tensor(True)}, "ignore_index must be an int (or a 0-dim tensor"),
    ({"temperature": torch.tensor(2 + 1j)}, "temperature must be a number (or a 0-dim tensor"),
    ({"alpha": 10**400}, "alpha must be a number, got 1000"),
    ({"reduction": ["mean"]}, "reduction must be one of mean, sum, none, got ['mean']"),
    ({"ignore_index": 2**63}, "ignore_index must fit into int64, got 9223372036854775808"),
    ({"temperature": 1e-40}, "must fit into float32"),
    ({"balance": 1}, "balance must be True or False, got 1"),
    ({"balance": True, "reduction": "none"}, "balance needs reduction mean or sum, got 'none'"),
    ({"balance": True, "reduction": "max"}, "reduction must be one of mean, sum, none, got 'max'"),
    ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wsl_loss(LOGITS, LOGITS, TARGET, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        WSLLoss(**options)


def test_ignored_indices_are_no_error_but_others_beside_them_are():
    target = TARGET.clone()
    target[3] = -100
    assert wsl_loss(LOGITS, LOGITS, target).isfinite()
    target[4] = 11
    with pytest.raises(IndexError, match="got 11"):
        wsl_loss(LOGITS, LOGITS, target)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        wsl_loss(LOGITS, LOGITS, TARGET, 4.0)
    with pytest.raises(TypeError):
        WSLLoss(4.0)


# --- kinds of tensors ---

SPARSE = "pass .to_dense()"
RAGGED = "pad the rows and ignore the padding"
KINDS = {
    "sparse COO": (lambda x: x.to_sparse(), SPARSE),
    "sparse CSR": (lambda x: x.to_sparse_csr(), SPARSE),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1, :3]]), RAGGED),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged),
        RAGGED,
    ),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), "mask classes by -inf logits"),
    "mkldnn": (lambda x: x.to_mkldnn(), SPARSE),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "target"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls these kinds prototypes
def test_kinds_of_tensors_that_are_not_strided_are_refused_by_name(kind, name):
    if kind == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no mkldnn")
    make, advice = KINDS[kind]
    inputs = {"student_logits": LOGITS, "teacher_logits": LOGITS, "target": TARGET}
    inputs[name] = make(torch.ones(8, 10))
    with pytest.raises(TypeError, match=f"{name} must be a plain strided tensor.*") as caught:
        wsl_loss(**inputs)
    assert advice in str(caught.value)


# --- storages, lazily negated tensors, zero tensors ---


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.usefixtures("backend")
def test_a_tensor_beyond_the_end_of_its_storage_is_refused(size, which):
    inputs = [x.clone() for x in problem((30, 10))]
    every_second = [x[::2] for x in inputs]
    inputs[which].untyped_storage().resize_(size)
    name = ("student_logits", "teacher_logits", "target")[which]
    for tensors in (inputs, every_second):
        with pytest.raises(ValueError, match=f"{name} must lie in its storage"):
            wsl_loss(*tensors)


def negated(x):
    """The same numbers, with the other signs in memory."""
    lazy = torch._neg_view(-x)
    assert lazy.is_neg()
    return lazy


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.usefixtures("backend")
def test_lazily_negated_inputs_have_their_own_signs(which, probabilities):
    inputs = list(problem((6, 10), probabilities=probabilities))
    inputs[which] = negated(inputs[which])
    assert_as_reference(*inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.usefixtures("backend")
def test_lazily_negated_upstream_gradients_have_their_own_signs(reduction, dtype):
    inputs = problem((6, 10), dtype=dtype)
    upstream = torch.arange(6.0) if reduction == "none" else torch.tensor(2.0)
    _, expected = step(wsl_loss, *inputs, reduction=reduction, upstream=upstream)
    _, gradient = step(wsl_loss, *inputs, reduction=reduction, upstream=negated(upstream))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,), (2,)])
@pytest.mark.usefixtures("backend")
def test_zero_tensors_are_zeros(which):
    inputs = list(problem((6, 10)))
    expected = list(inputs)
    for i in which:
        x = inputs[i]
        inputs[i] = torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)
        expected[i] = torch.zeros_like(x)
    torch.testing.assert_close(step(wsl_loss, *inputs), step(wsl_loss, *expected))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("backend")
def test_zero_tensor_as_upstream_gradient(reduction, dtype):
    student, teacher, target = problem((6, 10), dtype=dtype)
    shape = (6,) if reduction == "none" else ()
    student.requires_grad_()
    loss = wsl_loss(student, teacher, target, reduction=reduction)
    zero = torch._efficientzerotensor(shape, device=loss.device)
    (gradient,) = torch.autograd.grad(loss, student, grad_outputs=zero)
    assert gradient.dtype == dtype
    assert gradient.eq(0).all()


# --- numbers at the end of their range ---


@pytest.mark.parametrize("forced", ["auto", "eager"])
def test_uint64_target_beyond_int64_names_no_class(forced):
    target = TARGET.clone()
    target[3] = -100  # as uint64, this is 2^64 - 100
    target = target.view(torch.uint64)
    with use_backend(forced), pytest.raises(IndexError, match=r"class indices in \[0, 10\)"):
        wsl_loss(LOGITS, LOGITS, target)


LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "pixels": lambda x: x.t()[None].contiguous(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("classes", [10, 33])
@pytest.mark.usefixtures("backend")
def test_nan_of_any_bits_is_nan_in_its_row_alone(layout, dtype, classes):
    """Rounding the NaN 0xFFFF or 0xFFFFFFFF by adding to its bits would give 0."""
    bits = torch.tensor([-1], dtype=torch.int16 if dtype == torch.bfloat16 else torch.int32)
    logits, other, target = problem((6, classes), dtype=dtype)
    logits[2, 3] = bits.view(dtype)[0]
    logits, other = LAYOUTS[layout](logits), LAYOUTS[layout](other)
    target = target if logits.dim() == 2 else target[None]
    for student, teacher in ((logits, other), (other, logits)):
        loss, gradient = step(wsl_loss, student, teacher, target, reduction="none")
        rows = gradient if gradient.dim() == 2 else gradient[0].t()
        expected = [n == 2 for n in range(6)]
        assert loss.flatten().isnan().tolist() == expected
        assert rows.isnan().any(1).tolist() == expected
