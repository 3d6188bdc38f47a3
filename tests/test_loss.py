"""The contract of the loss, on every backend: right on every input, and well-behaved in autograd.

Tests with float64 logits leave out the Triton kernels, which compute in float32.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from budget import assert_as_reference, exact_step, exact_terms, randn, step
from hypothesis import given
from hypothesis import strategies as st

from weighted_soft_labels import WSLLoss, reference, wsl_loss
from weighted_soft_labels.analysis import wsl_terms

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = math.inf, math.nan
SHAPES = [(5,), (1, 2), (7, 10), (4, 1000), (3, 1500), (2, 5, 3), (3, 19, 4, 5), (2, 3, 2, 3, 2)]


def problem(shape, *, seed=0, scale=3.0, dtype=torch.float32, probabilities=False, ignored=False):
    """Student, teacher and target, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, *shape, generator=generator, device="cpu")
    dim = 0 if len(shape) == 1 else 1
    if probabilities:
        target = torch.randn(shape, generator=generator, device="cpu").softmax(dim)
    else:
        labels = shape[:dim] + shape[dim + 1 :]
        target = torch.randint(shape[dim], labels, generator=generator, device="cpu")
    if ignored:
        target.view(-1)[::3] = -100
    device = torch.empty(0).device
    student, teacher = logits.to(device, dtype).unbind(0)
    return student, teacher, target.to(device)


# --- right on every input ---


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.usefixtures("float64_backend")
def test_float64_gradient_beside_ignored_elements_keeps_its_digits(reduction):
    """A scale of bools times a Python float would be float32."""
    inputs = problem((30, 7), dtype=torch.float64, ignored=True)
    upstream = torch.tensor(0.7, dtype=torch.float64)
    if reduction == "none":
        upstream = torch.linspace(0.1, 1.7, 30, dtype=torch.float64)
    options = {"upstream": upstream, "reduction": reduction}
    _, gradient = step(wsl_loss, *inputs, **options)
    _, expected = exact_step(*inputs, **options)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1, 2, 3.3])
@pytest.mark.parametrize("probabilities", [False, True])
def test_every_shape_and_temperature(shape, temperature, probabilities):
    assert_as_reference(*problem(shape, probabilities=probabilities), temperature=temperature)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "ignored", "probabilities"])
@pytest.mark.parametrize("shape", [(8, 10), (3, 6, 5)])
@pytest.mark.parametrize(
    ("hard_weight", "alpha", "label_smoothing", "temperature"),
    [(1, 2.5, 0.1, 2.0), (0.0, 1.0, 0.0, 1.0), (0.5, 0, 0.0, 2.0), (2.0, 2.25, 1.0, 4.0)],
)
def test_every_option(reduction, kind, shape, hard_weight, alpha, label_smoothing, temperature):
    inputs = problem(shape, probabilities=kind == "probabilities", ignored=kind == "ignored")
    assert_as_reference(
        *inputs,
        reduction=reduction,
        hard_weight=hard_weight,
        alpha=alpha,
        label_smoothing=label_smoothing,
        temperature=temperature,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "teacher_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("probabilities", [False, True])
def test_every_dtype_and_mixture(dtype, teacher_dtype, probabilities, backend):
    if backend == "triton" and torch.float64 in (dtype, teacher_dtype):
        pytest.skip("the Triton kernels compute in float32")
    student, teacher, target = problem((6, 33), probabilities=probabilities)
    assert_as_reference(student.to(dtype), teacher.to(teacher_dtype), target)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_target(dtype):
    student, teacher, target = problem((6, 10))
    expected = wsl_loss(student, teacher, target)
    assert wsl_loss(student, teacher, target.to(dtype)) == expected


def test_uint8_target_is_not_mistaken_for_the_default_ignore_index():
    student, teacher, _ = problem((2, 200))
    target = torch.tensor([156, 3], dtype=torch.uint8)  # 156 is -100 in 8 bits
    assert_as_reference(student, teacher, target.long())
    torch.testing.assert_close(
        wsl_loss(student, teacher, target), wsl_loss(student, teacher, target.long())
    )


STRIDED = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: F.pad(x, (2, 3))[..., 2:-3],
    "every other": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "channels last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.clone()
    ),
    "permuted pixels": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("student_layout", STRIDED)
@pytest.mark.parametrize("teacher_layout", ["sliced", "channels last", "permuted pixels"])
def test_any_strides_of_either_set_of_logits(student_layout, teacher_layout):
    for shape in [(6, 7), (3, 5, 4, 6)]:
        student, teacher, target = problem(shape)
        _, _, probabilities = problem(shape, probabilities=True)
        student, teacher = STRIDED[student_layout](student), STRIDED[teacher_layout](teacher)
        assert_as_reference(student, teacher, target, reduction="none")
        assert_as_reference(student, teacher, STRIDED[student_layout](probabilities))


@pytest.mark.parametrize("classes", [2, 3, 128, 1025, 300_000])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_any_number_of_classes(classes, temperature, most_classes):
    assert_as_reference(*problem((3, min(classes, most_classes))), temperature=temperature)


# --- exact where the official code is not ---


def memorised(classes, margins, others=0.0):
    """Logits of teachers that prefer class 1 by `margins`."""
    logits = torch.full((len(margins), classes), others)
    logits[:, 1] = margins + others
    return logits


def float64_weight(student, teacher, label):
    """The formula is exact for any cross-entropy; float64 `F.cross_entropy` is off by 1e-12."""

    def ce(logits):
        margins = logits.double() - logits.double()[:, label, None]
        margins[:, label] = -INF
        return margins.exp().sum(1).log1p()

    return -torch.expm1(-ce(student) / (ce(teacher) + 1e-7))


@pytest.mark.parametrize("classes", [2, 10, 1000, 300_000])
@pytest.mark.parametrize("offset", [0.0, 7.3])
def test_weight_is_exact_for_memorising_teachers(classes, offset, most_classes):
    classes = min(classes, most_classes)
    margins = torch.linspace(0, 30, 121 if classes < 1000 else 9) + math.log(classes)
    teacher = memorised(classes, margins, offset) + 0.3 * randn(len(margins), classes)
    # The students are as good as the teacher, or nearly, so that weights cover 0 to 1.
    student = teacher.clone()
    student[:, 1] -= torch.linspace(-1, 2, len(margins))
    target = torch.ones(len(margins), dtype=torch.long)
    expected = float64_weight(student, teacher, 1)
    for label in (target, F.one_hot(target, classes).float()):
        weight = wsl_terms(student, teacher, label).weight
        assert (weight - expected).abs().max() < 1e-6
    # The loss has the same weight: with hard_weight=0 it is weight * soft * alpha * T^2.
    for temperature in (1.0, 2.0, 4.0):
        options = {"hard_weight": 0, "alpha": 1, "temperature": temperature, "reduction": "none"}
        soft = exact_terms(student, teacher, target, temperature=temperature).soft
        loss = wsl_loss(student, teacher, target, **options)
        exact = temperature**2 * expected * soft
        assert ((loss - exact).abs() <= temperature**2 * (1e-6 * soft + 2e-7) + 3e-6 * exact).all()


def test_official_float32_weight_is_off_where_ours_is_not():
    margins = torch.linspace(8, 21, 201)
    teacher, target = memorised(100, margins), torch.ones(201, dtype=torch.long)
    student = teacher.clone()
    student[:, 1] -= 0.5
    student_ce = F.cross_entropy(student, target, reduction="none")
    teacher_ce = F.cross_entropy(teacher, target, reduction="none")
    official = 1 - torch.exp(-torch.clamp(student_ce / (teacher_ce + 1e-7), min=0))
    expected = float64_weight(student, teacher, 1)
    assert (official - expected).abs().max() > 0.1  # as the README says
    assert (wsl_terms(student, teacher, target).weight - expected).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_error_is_within_that_of_the_formula_in_float32(temperature):
    student, teacher, target = problem((64, 200), scale=6.0)
    exact, exact_gradient = exact_step(student, teacher, target, temperature=temperature)
    formula, formula_gradient = step(
        reference.wsl_loss, student, teacher, target, temperature=temperature
    )
    loss, gradient = step(wsl_loss, student, teacher, target, temperature=temperature)
    assert (loss - exact).abs() <= (formula - exact).abs() + 2e-7 * exact
    allowed = (formula_gradient - exact_gradient).abs().max() + 2e-7 * exact_gradient.abs().max()
    assert (gradient - exact_gradient).abs().max() <= allowed


def test_gradient_at_a_confident_label_does_not_cancel():
    student = torch.zeros(1, 10)
    student[0, 3] = 17.0
    target = torch.tensor([3])
    _, exact = step(F.cross_entropy, student.double(), target)
    _, ours = step(wsl_loss, student, student, target, alpha=0.0)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_p_minus_1_is_not_rounded_to_half_precision_first(dtype):
    student = torch.zeros(1, 10, dtype=dtype)
    student[0, 3] = 9.0  # 1 - p = 1.1e-3, where bfloat16 goes in steps of 4e-3
    _, exact = step(F.cross_entropy, student.double(), torch.tensor([3]))
    _, ours = step(wsl_loss, student, student, torch.tensor([3]), alpha=0.0)
    torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


def far_apart(shape, dtype=torch.float16):
    """Rows more than 2^31 elements apart; only pages that are touched take memory."""
    memory = torch.empty(2**31 + 64, dtype=dtype)
    return memory.as_strided(shape, (2**31 + 8, *torch.empty(shape).stride()[1:]))


@pytest.mark.parametrize("shape", [(2, 10), (2, 3, 4)])
def test_offsets_beyond_32_bits(shape):
    student, teacher, target = problem(shape, dtype=torch.float16)
    assert_as_reference(far_apart(shape).copy_(student), far_apart(shape).copy_(teacher), target)


# --- extreme logits ---


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_large_logits_do_not_overflow(temperature):
    for magnitude, dtype in (
        (1e4, torch.float16),
        (1e30, torch.float32),
        (1e30, torch.bfloat16),
        (300.0, torch.float32),
    ):
        student = torch.tensor(
            [[magnitude, -magnitude, 0], [0, magnitude, 0], [0, 0, -magnitude]], dtype=dtype
        )
        teacher = torch.tensor(
            [[magnitude, 0, 0], [magnitude / 2, magnitude, 0], [-magnitude, 0, 0]], dtype=dtype
        )
        assert_as_reference(
            student, teacher, torch.tensor([0, 1, 1]), temperature=temperature, reduction="none"
        )


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_masked_classes(probabilities, temperature):
    """-inf logits: no NaN where nothing is lost, +inf where the student rules out what has mass."""
    student = torch.tensor([[0, -INF, 1.0], [0, -INF, 1], [0, -INF, 1], [0, 0, -INF], [2, 1, 0]])
    teacher = torch.tensor([[1.0, -INF, 0], [1, 0.5, 0], [1, -INF, 0], [0, 0, 1], [-INF, 1, 0]])
    target = torch.tensor([0, 0, 1, 1, 1])
    label = F.one_hot(target, 3).float() if probabilities else target
    loss, gradient = step(
        wsl_loss, student, teacher, label, temperature=temperature, reduction="none"
    )
    assert loss.isinf().tolist() == [False, True, True, True, False]
    assert not loss.isnan().any()
    assert gradient[0, 1] == 0
    assert gradient.isfinite().all()
    assert_as_reference(student, teacher, label, temperature=temperature, reduction="none")


def test_infinite_soft_term_of_weight_zero_is_infinite():
    loss, gradient = step(
        wsl_loss, torch.tensor([[0.0, -INF]]), torch.zeros(1, 2), torch.tensor([0])
    )
    assert loss == INF
    assert gradient.eq(0).all()


def test_label_free_terms_are_left_out_not_multiplied_by_zero():
    student, target = torch.tensor([[0.0, -INF]]), torch.tensor([1])
    assert wsl_loss(student, student, target, hard_weight=0.0, alpha=1.0).isfinite()
    assert (
        wsl_loss(torch.tensor([[0.0, -INF]]), torch.zeros(1, 2), torch.tensor([0]), alpha=0.0) == 0
    )


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_nan_and_inf_poison_their_row_only(poison, which):
    student, teacher, target = problem((4, 6))
    expected, expected_gradient = step(wsl_loss, student, teacher, target, reduction="none")
    (student if which == "student" else teacher)[2, 3] = poison
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="none")
    assert loss[2].isnan()
    assert gradient[2].isnan().any()
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(loss[others], expected[others], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[others], expected_gradient[others], rtol=1e-5, atol=1e-7)


def test_nan_is_not_swallowed_next_to_a_masked_class():
    student, teacher = torch.tensor([[NAN, -INF, 0.0]]), torch.tensor([[-INF, -INF, 0.0]])
    assert wsl_loss(student, teacher, torch.tensor([2])).isnan()
    assert wsl_loss(teacher, student, torch.tensor([2])).isnan()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("ignore_index", [-100, 255, 0])
def test_ignored_elements_are_inert_whatever_they_hold(garbage, ignore_index):
    student, teacher, target = problem((5, 7))
    target = target.clamp(min=1)
    kept = torch.tensor([0, 2, 3])
    expected, expected_gradient = step(wsl_loss, student[kept], teacher[kept], target[kept])
    student[[1, 4]] = teacher[[1, 4]] = garbage
    target[[1, 4]] = ignore_index
    loss, gradient = step(wsl_loss, student, teacher, target, ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[kept], expected_gradient)
    assert gradient[[1, 4]].eq(0).all()
    rows = wsl_loss(student, teacher, target, ignore_index=ignore_index, reduction="none")
    assert rows[[1, 4]].eq(0).all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_nothing_to_average_is_what_cross_entropy_makes_of_it(shape, probabilities):
    student, teacher, target = problem(shape, probabilities=probabilities)
    assert wsl_loss(student, teacher, target).isnan()
    assert wsl_loss(student, teacher, target, reduction="sum") == 0
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="none")
    assert loss.shape == shape[:1] + shape[2:]
    assert gradient.shape == shape


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("upstream", [NAN, INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_upstream_gradient_that_is_not_finite_stays_out_of_ignored_elements(dtype, upstream):
    student, teacher, target = problem((4, 6), dtype=dtype)
    target[1] = -100
    incoming = torch.ones(4)
    incoming[1] = upstream
    _, gradient = step(wsl_loss, student, teacher, target, reduction="none", upstream=incoming)
    assert gradient[1].eq(0).all()
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("backend")
def test_float16_gradient_of_probabilities_of_any_sum_does_not_overflow():
    student = torch.zeros(2, 8, dtype=torch.float16)
    student[:, 7] = 12
    target = torch.zeros(2, 8)
    target[:, :3] = 1
    assert_as_reference(student, torch.zeros(2, 8), target, alpha=0.0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("classes", [5, 9000])
def test_a_row_without_classes_is_nan(classes):
    student, teacher, target = problem((3, classes))
    student[1] = -INF
    loss = wsl_loss(student, teacher, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


# --- balanced weights ---


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["index", "ignored", "probabilities"])
@pytest.mark.parametrize("shape", [(5,), (3, 6, 5)])
@pytest.mark.parametrize(
    ("hard_weight", "alpha", "label_smoothing"), [(1, 2.5, 0.1), (0, 1, 0), (0.5, 0, 0)]
)
def test_balanced_weights(reduction, kind, shape, hard_weight, alpha, label_smoothing):
    assert_as_reference(
        *problem(shape, probabilities=kind == "probabilities", ignored=kind == "ignored"),
        reduction=reduction,
        hard_weight=hard_weight,
        alpha=alpha,
        label_smoothing=label_smoothing,
        balance=True,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("probabilities", [False, True])
def test_balanced_weights_in_every_dtype(dtype, probabilities):
    student, teacher, target = problem((6, 33), dtype=dtype, probabilities=probabilities)
    assert_as_reference(student, teacher, target, balance=True)


def test_balanced_soft_term_is_the_weighted_mean_of_soft_terms():
    student, teacher, target = problem((40, 10), ignored=True)
    terms = wsl_terms(student, teacher, target, temperature=4.0)
    weighted = (terms.weight * terms.soft).sum() / terms.weight.sum()
    expected = F.cross_entropy(student, target) + 2.5 * 4.0**2 * weighted
    found = wsl_loss(student, teacher, target, temperature=4.0, balance=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    total = wsl_loss(student, teacher, target, temperature=4.0, balance=True, reduction="sum")
    torch.testing.assert_close(total, expected * (target != -100).sum(), rtol=1e-5, atol=0)


def test_one_element_has_balanced_weight_1():
    student, teacher, target = problem((1, 10))
    _, found = step(wsl_loss, student, teacher, target, hard_weight=0.0, alpha=1.0, balance=True)
    expected = 2.0 * ((student / 2).softmax(1) - (teacher / 2).softmax(1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1e30])
def test_balanced_soft_term_is_0_where_all_weights_are_0(alpha):
    student, teacher, target = problem((4, 10))
    student.scatter_(1, target[:, None], 300.0)
    options = {"alpha": alpha, "hard_weight": 0.0, "balance": True}
    loss, gradient = step(wsl_loss, student, teacher, target, **options)
    assert loss == 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("margin", [20.0, 50.0, 72.0])
def test_one_confident_element_has_balanced_weight_1(margin):
    """Its soft term at T = 1 is 9/10 of the margin: the teacher is uniform."""
    student, teacher, target = torch.zeros(1, 10), torch.zeros(1, 10), torch.tensor([3])
    student[0, 3] = margin
    options = {"temperature": 1.0, "alpha": 1e6, "hard_weight": 0.0, "balance": True}
    loss = wsl_loss(student, teacher, target, **options)
    torch.testing.assert_close(loss, torch.tensor(0.9e6 * margin), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_balanced_weights_of_a_confident_student_keep_their_strength(dtype):
    """Weights of 1e-7 become 1, and one element among hundreds gets nearly all the weight."""
    student, teacher, target = problem((300, 10), dtype=dtype)
    student.zero_().scatter_(1, target[:, None], 18.0)
    assert_as_reference(student, teacher, target, hard_weight=0.0, balance=True)
    student[7, target[7]] = 0.0
    assert_as_reference(student, teacher, target, balance=True)


def test_nan_does_not_reach_other_elements_through_balanced_weights():
    student, teacher, target = problem((5, 6))
    others = torch.tensor([0, 1, 3, 4])
    student[2, 3] = NAN
    loss, gradient = step(
        wsl_loss, student, teacher, target, reduction="sum", hard_weight=0.0, balance=True
    )
    assert loss.isnan()
    assert gradient[2].isnan().any()
    _, expected = step(
        wsl_loss, student[others], teacher[others], target[others], hard_weight=0.0, balance=True
    )
    torch.testing.assert_close(gradient[others], 5 * expected, rtol=1e-5, atol=1e-6)


def test_nothing_to_balance():
    student, teacher, target = problem((4, 5))
    target[:] = -100
    loss, gradient = step(wsl_loss, student, teacher, target, balance=True)
    assert loss.isnan()
    assert gradient.eq(0).all()
    assert wsl_loss(student, teacher, target, reduction="sum", balance=True) == 0
    empty = problem((0, 5))
    assert wsl_loss(*empty, balance=True).isnan()
    assert wsl_loss(*empty, reduction="sum", balance=True) == 0


def test_everything_ignored():
    student, teacher, target = problem((4, 5))
    target[:] = -100
    loss, gradient = step(wsl_loss, student, teacher, target)
    assert loss.isnan()
    assert gradient.eq(0).all()
    assert wsl_loss(student, teacher, target, reduction="sum") == 0


# --- autograd ---


@pytest.mark.usefixtures("float64_backend")
def test_gradcheck_fails_because_the_weight_is_a_constant_for_differentiation():
    student, teacher, target = problem((4, 5), dtype=torch.float64)
    student.requires_grad_()
    assert not torch.autograd.gradcheck(wsl_loss, (student, teacher, target), raise_exception=False)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.usefixtures("float64_backend")
def test_gradient_is_that_of_the_loss_with_frozen_weight(temperature, probabilities):
    student, teacher, target = problem((4, 5), dtype=torch.float64, probabilities=probabilities)
    weight = wsl_terms(student, teacher, target).weight.double()
    if probabilities:
        target = target.double()

    def frozen(student):
        hard = F.cross_entropy(student, target, label_smoothing=0.1, reduction="none")
        soft = F.cross_entropy(
            student / temperature, (teacher / temperature).softmax(1), reduction="none"
        )
        return (hard + 2.5 * temperature**2 * weight * soft).mean()

    student.requires_grad_()
    assert torch.autograd.gradcheck(frozen, (student,))
    (expected,) = torch.autograd.grad(frozen(student), student)
    loss = wsl_loss(student, teacher, target, temperature=temperature, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, student)
    # `wsl_terms` returned the weight in float32.
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_retained_graph_gives_the_right_gradient_every_time(dtype):
    student, teacher, target = problem((6, 10), dtype=dtype)
    student.requires_grad_()
    _, expected = step(wsl_loss, student, teacher, target)
    loss = wsl_loss(student, teacher, target)
    for factor in (1.0, 3.0, 1.0):
        (gradient,) = torch.autograd.grad(loss * factor, student, retain_graph=True)
        torch.testing.assert_close(
            gradient, expected * factor, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-7
        )
        gradient.fill_(NAN)  # the caller owns the gradient and may overwrite it


def test_accumulation_and_two_uses_of_one_loss():
    student, teacher, target = problem((6, 10))
    student.requires_grad_()
    loss = wsl_loss(student, teacher, target)
    (loss + 2 * loss).backward(retain_graph=True)
    loss.backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, 4 * step(wsl_loss, student, teacher, target)[1])


@pytest.mark.parametrize("kind", ["index", "ignored", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_upstream_gradient_of_every_element(kind, dtype):
    inputs = problem(
        (4, 5, 6), probabilities=kind == "probabilities", ignored=kind == "ignored", dtype=dtype
    )
    options = {"reduction": "none", "upstream": randn(4, 6).abs()}
    _, gradient = step(wsl_loss, *inputs, **options)
    _, expected = exact_step(*inputs, **options)
    rtol = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=rtol * 1e-2)


def test_expanded_upstream_gradient():
    """The gradient of sum() has stride 0."""
    student, teacher, target = problem((4, 5, 6))
    _, expected = step(wsl_loss, student, teacher, target, reduction="sum")
    student.requires_grad_()
    wsl_loss(student, teacher, target, reduction="none").sum().backward()
    torch.testing.assert_close(student.grad, expected)


def test_float16_gradient_survives_a_gradient_scaler():
    """Student and teacher are nearly indifferent: a row's gradient is at most 1e-5."""
    student, _, target = problem((2048, 10), dtype=torch.float16, scale=1e-4)
    _, exact = exact_step(student, student, target)
    _, gradient = step(wsl_loss, student, student, target, upstream=torch.tensor(65536.0))
    assert ((gradient.double() / 65536 - exact).abs() <= 1e-3 * exact.abs()).all()


def test_create_graph_gives_the_gradient_and_refuses_the_second_derivative():
    student, teacher, target = problem((4, 5))
    _, expected = step(wsl_loss, student, teacher, target)
    student.requires_grad_()
    loss = wsl_loss(student, teacher, target)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(RuntimeError, match=r"weighted_soft_labels\.reference"):
        gradient.square().sum().backward()


def test_func_grad_and_func_vjp():
    student, teacher, target = problem((4, 5))
    _, expected = step(wsl_loss, student, teacher, target)
    torch.testing.assert_close(
        torch.func.grad(lambda s: wsl_loss(s, teacher, target))(student), expected
    )
    _, pullback = torch.func.vjp(lambda s: wsl_loss(s, teacher, target), student)
    torch.testing.assert_close(pullback(torch.tensor(2.0))[0], 2 * expected)
    with pytest.raises(RuntimeError, match=r"weighted_soft_labels\.reference"):
        torch.func.grad(lambda s: torch.func.grad(lambda s: wsl_loss(s, teacher, target))(s).sum())(
            student
        )


def test_graphs_of_teacher_and_target_are_not_kept_alive():
    student, teacher, target = problem((4, 5), probabilities=True)
    teacher_input = teacher.requires_grad_()
    teacher = teacher_input * 1.0
    alive = weakref.ref(teacher)
    target.requires_grad_()
    loss = wsl_loss(student.requires_grad_(), teacher, target)
    del teacher
    gc.collect()
    assert alive() is None
    assert sum(edge is not None for edge, _ in loss.grad_fn.next_functions) == 1  # the student's
    loss.backward()
    assert teacher_input.grad is None
    assert target.grad is None
    assert student.grad is not None


def test_inputs_are_never_written():
    for shape in [(6, 10), (2, 5, 6)]:
        student, teacher, target = problem(shape, ignored=True)
        copies = student.clone(), teacher.clone(), target.clone()
        step(wsl_loss, student, teacher, target, upstream=torch.tensor(3.0))
        wsl_terms(student, teacher, target)
        assert all(map(torch.equal, (student, teacher, target), copies))


def test_logits_changed_in_place_after_the_loss_do_no_harm():
    student, teacher, target = problem((6, 10))
    _, expected = step(wsl_loss, student, teacher, target)
    leaf = student.requires_grad_()
    logits = leaf * 1.0
    loss = wsl_loss(logits, teacher, target)
    logits.detach().zero_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_autocast_changes_nothing():
    student, teacher, target = problem((6, 10), dtype=torch.bfloat16)
    expected = step(wsl_loss, student, teacher, target)
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        loss, gradient = step(wsl_loss, student, teacher, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close((loss, gradient), expected)


def test_no_graph_without_a_student_that_requires_grad():
    student, teacher, target = problem((6, 10))
    with torch.no_grad():
        assert not wsl_loss(student.requires_grad_(), teacher, target).requires_grad
    assert not wsl_loss(student.detach(), teacher.requires_grad_(), target).requires_grad


# --- properties ---


@st.composite
def rows(draw):
    n, classes = draw(st.integers(1, 5)), draw(st.sampled_from([2, 3, 5, 16, 40]))
    # Students and teachers from indifferent to confident beyond float32.
    student, teacher, target = problem(
        (n, classes),
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from([0.01, 1, 5, 30])),
    )
    temperature = draw(st.sampled_from([1.0, 2.0, 4.0]) | st.floats(0.5, 20))
    return student, teacher, target, temperature


@given(rows(), st.sampled_from([-1e3, -1.0, 0.5, 100.0]))
def test_adding_a_constant_to_a_row_changes_nothing(case, constant):
    student, teacher, target, temperature = case
    # Halves survive the addition without rounding, so the shifted problem is the same one.
    student, teacher = (student * 8).round() / 8, (teacher * 8).round() / 8
    expected = step(wsl_loss, student, teacher, target, temperature=temperature)
    torch.testing.assert_close(
        step(wsl_loss, student + constant, teacher, target, temperature=temperature), expected
    )
    torch.testing.assert_close(
        step(wsl_loss, student, teacher + constant, target, temperature=temperature), expected
    )


@given(rows(), st.randoms(use_true_random=False))
def test_renaming_the_classes_renames_the_gradient(case, random):
    student, teacher, target, temperature = case
    order = list(range(student.shape[1]))
    random.shuffle(order)
    order = torch.tensor(order)
    renamed_target = order.argsort()[target]
    loss, gradient = step(wsl_loss, student, teacher, target, temperature=temperature)
    renamed, renamed_gradient = step(
        wsl_loss,
        student[:, order],
        teacher[:, order],
        renamed_target,
        temperature=temperature,
    )
    torch.testing.assert_close(renamed, loss)
    torch.testing.assert_close(renamed_gradient, gradient[:, order], rtol=1e-4, atol=1e-5)


@given(rows(), st.sampled_from([0.0, 0.1]))
def test_gradient_rows_sum_to_zero(case, label_smoothing):
    student, teacher, target, temperature = case
    _, gradient = step(
        wsl_loss,
        student,
        teacher,
        target,
        temperature=temperature,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    scale = gradient.abs().sum(1).clamp(min=1)
    assert (gradient.double().sum(1).abs() <= 1e-5 * scale).all()


@given(rows())
def test_a_student_that_equals_its_teacher_has_weight_1_minus_1_over_e(case):
    student, _, target, temperature = case
    terms = wsl_terms(student, student, target, temperature=temperature)
    ce = terms.teacher_ce.double()
    torch.testing.assert_close(
        terms.weight.double(), -torch.expm1(-ce / (ce + 1e-7)), rtol=0, atol=1e-6
    )
    assert (terms.weight[terms.teacher_ce > 1] - (1 - 1 / math.e)).abs().le(1e-6).all()


@given(rows(), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from(["mean", "sum", "none"]))
def test_alpha_zero_is_cross_entropy(case, label_smoothing, reduction):
    student, teacher, target, temperature = case
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    ours = step(wsl_loss, student, teacher, target, alpha=0.0, temperature=temperature, **options)
    expected = step(F.cross_entropy, student.double(), target, **options)
    for value, exact in zip(ours, expected):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-6)


@given(rows())
def test_terms_are_what_the_loss_is_made_of(case):
    student, teacher, target, temperature = case
    terms = wsl_terms(student, teacher, target, temperature=temperature)
    for term in terms:
        assert term.shape == target.shape
        assert term.dtype == torch.float32
        assert (term >= 0).all()
        assert not term.requires_grad
    assert (terms.weight <= 1).all()
    loss = wsl_loss(student, teacher, target, temperature=temperature, reduction="none")
    expected = terms.student_ce + 2.5 * temperature**2 * terms.weight * terms.soft
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


@given(rows())
def test_sum_is_n_times_mean_and_none_adds_up_to_it(case):
    student, teacher, target, temperature = case
    mean, total, each = (
        wsl_loss(student, teacher, target, temperature=temperature, reduction=r)
        for r in ("mean", "sum", "none")
    )
    torch.testing.assert_close(total, mean * len(target), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, each.sum(), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**31), st.booleans())
def test_trailing_dimensions_are_more_rows(seed, probabilities):
    student, teacher, target = problem((2, 6, 3, 2), seed=seed, probabilities=probabilities)
    flat = [
        x.movedim(1, -1).reshape(-1, 6) if x.dim() == 4 else x.reshape(-1)
        for x in (student, teacher, target)
    ]
    loss, gradient = step(wsl_loss, student, teacher, target)
    flat_loss, flat_gradient = step(wsl_loss, *flat)
    torch.testing.assert_close(loss, flat_loss)
    torch.testing.assert_close(gradient.movedim(1, -1).reshape(-1, 6), flat_gradient)


# --- the module ---


def test_module_is_the_function():
    student, teacher, target = problem((6, 10), ignored=True)
    options = {
        "temperature": 4.0,
        "alpha": 2.25,
        "hard_weight": 0.5,
        "label_smoothing": 0.1,
        "reduction": "sum",
        "balance": True,
    }
    criterion = WSLLoss(**options)
    assert criterion(student, teacher, target) == wsl_loss(student, teacher, target, **options)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert twin(student, teacher, target) == criterion(student, teacher, target)
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []
    assert repr(criterion) == (
        "WSLLoss(temperature=4.0, alpha=2.25, hard_weight=0.5, label_smoothing=0.1, "
        "ignore_index=-100, reduction='sum', balance=True)"
    )
