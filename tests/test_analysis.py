"""Regularization samples, bias and variance: by definition, however confident the models are.

NumPy in float64 is the judge. Where float64 has no digits left, decimal arithmetic is.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from test_errors import INPUTS
from test_loss import INF, NAN, SHAPES, STRIDED, problem, rows

from weighted_soft_labels import analysis
from weighted_soft_labels.analysis import bias_variance, regularization_samples, wsl_terms

TEMPERATURES = [0.5, 1.0, 2.0, 4.0]
# Rules of regularization samples, for derivatives a and b = g - a of NumPy, torch or decimal.
RULES = {
    "magnitude": lambda a, b: abs(b) > abs(a),
    "opposing": lambda a, b: a + b > 0,
    "signed": lambda a, b: b > a,
}


def models(shape, *, count=4, seed=0, scale=3.0, dtype=torch.float32, probabilities=False):
    """Logits of `count` models on the elements of `problem`, and the target."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(count, *shape, generator=generator)).to(dtype)
    return logits, problem(shape, seed=seed, probabilities=probabilities)[2]


def flat(logits, target, first=0):
    """Rows of classes from any layout, in float64; `first` dimensions stand before the layout."""

    def as_rows(x, first):
        dim = min(first + 1, x.dim() - 1)
        return x.double().movedim(dim, -1).reshape(*x.shape[:first], -1, x.shape[dim]).numpy()

    classes = logits.shape[min(first + 1, logits.dim() - 1)]
    if target.is_floating_point():
        return as_rows(logits, first), as_rows(target, 0)
    return as_rows(logits, first), np.eye(classes)[target.reshape(-1).numpy()]


# --- regularization samples: the definition ---


def slopes(s, t, q, temperature):
    """The derivatives a and b along q, by definition; float64 needs rows that are not certain."""
    p, p_student, p_teacher = (
        np.exp(log_softmax(x)) for x in (s, s / temperature, t / temperature)
    )
    a = (q * (p - q)).sum()
    return a, temperature * (q * (p_student - p_teacher)).sum() - a


def assert_by_definition(result, student, teacher, target, temperature, rule="magnitude"):
    """On all elements but those where |b| = |a|, or a + b = 0, to nine digits."""
    s, q = flat(student, target)
    t, _ = flat(teacher, target)
    a, b = (
        np.array([slopes(*row, temperature) for row in zip(s, t, q, strict=True)]).reshape(-1, 2).T
    )
    size = 1e-9 * (np.abs(a) + np.abs(b))
    clear = (np.abs(np.abs(b) - np.abs(a)) > size) & (np.abs(a + b) > size)
    assert clear.all() or clear.mean() > 0.9
    assert result.dtype == torch.bool
    assert (result.reshape(-1).numpy() == RULES[rule](a, b))[clear].all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_regularization_samples_by_definition(shape, probabilities, rule):
    for temperature in TEMPERATURES:
        inputs = problem(shape, probabilities=probabilities, scale=1.5)
        result = regularization_samples(*inputs, temperature=temperature, rule=rule)
        assert result.shape == shape[:1] * (len(shape) > 1) + shape[2:]
        assert_by_definition(result, *inputs, temperature, rule)
        if rule == "magnitude":
            assert regularization_samples(*inputs, temperature=temperature).equal(result)


@pytest.mark.parametrize("probabilities", [False, True])
def test_regularization_samples_are_found_and_missed_in_both_ways(probabilities):
    student, teacher, target = problem((2000, 3), probabilities=probabilities, scale=2.0)
    student = student * torch.linspace(0.1, 3, 2000)[:, None]
    result = regularization_samples(student, teacher, target, temperature=4.0)
    assert_by_definition(result, student, teacher, target, 4.0)
    (s, q), (t, _) = flat(student, target), flat(teacher, target)
    x = np.array([sum(slopes(*row, 4.0)) for row in zip(s, t, q, strict=True)])
    for sign in (
        1,
        -1,
    ):  # the student's probability of the label is above the teacher's, or far below it
        assert result.numpy()[sign * x > 0].mean() > 0.02
    assert result.float().mean() < 0.9


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_and_b_are_derivatives_of_the_losses_along_the_target(probabilities):
    for temperature in TEMPERATURES:
        student, teacher, target = problem(
            (40, 6), probabilities=probabilities, dtype=torch.float64
        )
        if probabilities:  # of any sum
            target = target.double() * torch.linspace(0.5, 2, 40)[:, None]
        label = target if probabilities else F.one_hot(target, 6).double()

        def losses(eps, student=student, teacher=teacher, label=label, temperature=temperature):
            s = student + eps * label
            ce = F.cross_entropy(s, label, reduction="none")
            soft = (teacher / temperature).softmax(1)
            return ce, temperature**2 * F.cross_entropy(
                s / temperature, soft, reduction="none"
            ) - ce

        at = torch.zeros(40, 1, dtype=torch.float64)
        a, b = (
            torch.func.grad(lambda eps, i=i: losses(eps)[i].sum())(at).squeeze(1) for i in range(2)
        )
        for rule, holds in RULES.items():
            result = regularization_samples(
                student, teacher, target, temperature=temperature, rule=rule
            )
            assert (result == holds(a, b)).all()


@functools.cache
def exact(student, teacher, label, temperature):
    """a and b in decimal arithmetic with 500 digits, in which 1 - exp(-1000) is not 1."""
    with localcontext() as context:
        context.prec = 500

        def probability(x, temperature):
            e = [(Decimal(value) / Decimal(temperature)).exp() for value in x]
            return e[label] / sum(e)

        a = probability(student, 1) - 1
        return a, Decimal(temperature) * (
            probability(student, temperature) - probability(teacher, temperature)
        ) - a


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def arithmetic(request, monkeypatch):
    """Both precisions in which the module computes: float32 is for MPS, which has no other."""
    rows = analysis._rows
    monkeypatch.setattr(analysis, "_rows", lambda *args: rows(*args).to(request.param))
    return request.param


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_regularization_samples_are_exact_for_confident_rows(dtype, rule):
    cases = []
    for margin in (10.0, 40.0, 300.0, 1000.0):
        for gain in (-3.5, -0.5, 0.5, 3.5):
            for temperature in (1.0, 2.0, 4.0):
                cases += [((margin, 0.5, -1.0), (margin + gain, 0.0, 0.0), 0, temperature)]
                # The student knows better, or worse, than a teacher who is sure of another class.
                cases += [
                    ((0.0, margin, -1.0), (-1.0, margin + gain, 0.0), label, temperature)
                    for label in (0, 1)
                ]
    with localcontext() as context:
        context.prec = 500
        expected = torch.tensor([RULES[rule](*exact(*case)) for case in cases])
    assert 0.2 < expected.float().mean() < 0.95
    result = [
        regularization_samples(
            *torch.tensor([s, t], dtype=dtype), torch.tensor(y), temperature=temperature, rule=rule
        )
        for s, t, y, temperature in cases
    ]
    assert torch.stack(result).tolist() == expected.tolist()

    # What the definition makes of these rows as it stands, in float64.
    a, b = np.array([slopes(np.array(s), np.array(t), np.eye(3)[y], T) for s, t, y, T in cases]).T
    assert RULES[rule](a, b).tolist() != expected.tolist()


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("margin", [20.0, 80.0])
@pytest.mark.parametrize("rule", RULES)
def test_class_probabilities_do_not_cancel_for_confident_rows(margin, rule):
    """One-hot probabilities take another path to the same result, as far as exp(-80)."""
    for temperature in (1.0, 2.0):
        student = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        student[:, 2] += margin
        teacher = student.roll(1, 0)
        for label in (0, 2):
            target = torch.full((200,), label)
            result, one_hot = (
                regularization_samples(student, teacher, labels, temperature=temperature, rule=rule)
                for labels in (target, F.one_hot(target, 5).float())
            )
            assert one_hot.equal(result)


@pytest.mark.parametrize("shape", [(20000, 10), (40, 7, 30)])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_at_temperature_1_they_are_the_weights_below_1_minus_1_over_e(shape, scale):
    student, teacher, target = problem(shape, scale=scale, ignored=True)
    teacher = student + 0.3 * teacher
    terms = wsl_terms(student, teacher, target)
    # Here the 1e-7 changes the weight less than rounding, and the weight is not close to 1 - 1/e.
    clear = (
        (target != -100)
        & (terms.teacher_ce > 1e-3)
        & ((terms.weight - (1 - 1 / math.e)).abs() > 1e-4)
    )
    assert clear.float().mean() > 0.5
    result = regularization_samples(student, teacher, target, temperature=1.0)
    assert result[clear].equal(terms.weight[clear] < 1 - 1 / math.e)
    assert 0.3 < result[clear].float().mean() < 0.7


@settings(max_examples=60, deadline=None)
@given(rows(), st.booleans())
def test_how_the_rules_contain_one_another(case, probabilities):
    """The soft term pulls down samples of all rules; two rules share the other samples."""
    student, teacher, target, temperature = case
    target = F.one_hot(target, student.shape[1]).to(student.dtype) if probabilities else target
    for T in (1.0, temperature):
        magnitude, opposing, signed = (
            regularization_samples(student, teacher, target, temperature=T, rule=rule)
            for rule in RULES
        )
        assert (magnitude & signed).equal(opposing)
        if T == 1:
            assert magnitude.equal(opposing)
            assert (
                probabilities or signed.all()
            )  # as probabilities, the student may be certain: then a = b = 0


# --- regularization samples: ties, masks, garbage ---


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("shape", [(400, 13), (1, 40_000), (3, 6, 5, 4)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_a_student_that_equals_its_teacher_has_none(temperature, shape, probabilities):
    for scale in (0.1, 3.0, 100.0):
        student, _, target = problem(
            shape, scale=scale, probabilities=probabilities, dtype=torch.float16
        )
        for teacher in (
            student,
            student.float(),
            student.clone(memory_format=torch.contiguous_format),
        ):
            assert not regularization_samples(
                student, teacher, target, temperature=temperature
            ).any()
            assert not regularization_samples(
                student, teacher, target, temperature=temperature, rule="opposing"
            ).any()
    masked = student.masked_fill(student < 0, -INF)
    assert not regularization_samples(masked, masked, target, temperature=temperature).any()


def test_one_class_leaves_nothing_to_regularize():
    for rule in RULES:
        assert not regularization_samples(
            torch.randn(3, 1), torch.randn(3, 1), torch.zeros(3).long(), rule=rule
        ).any()
        assert not regularization_samples(
            torch.randn(1), torch.randn(1), torch.ones(1), rule=rule
        ).any()


MASKED = [
    # student, teacher, label, which rules hold; p'_s - p'_t and 1 - p_s at T = 4
    ([-INF, 1.0, 0.0], [-INF, 0.0, 1.0], 0, "signed"),  # 0 - 0 against 1
    ([-INF, 1.0, 0.0], [9.0, 0.0, 0.0], 0, "magnitude"),  # -4 * 0.83 against -2 * 1
    ([-INF, 1.0, 0.0], [0.0, 0.0, 0.0], 0, "signed"),  # -4 / 3 against -2 * 1
    ([0.0, 1.0, 0.0], [-INF, 0.0, 0.0], 0, "magnitude opposing signed"),
    (
        [0.0, -INF, -INF],
        [0.0, 0.0, -INF],
        0,
        "magnitude opposing signed",
    ),  # 4 * (1 - 1/2) against 0
    ([0.0, 0.0, -INF], [0.0, -INF, -INF], 0, "magnitude"),  # -4 * 1/2 against -2 * 1/2
    ([0.0, -INF, -INF], [5.0, -INF, -INF], 0, ""),  # both certain
    ([0.0, -INF, 1.0], [0.0, -INF, 1.0], 0, "signed"),
    ([1.0, -INF, 0.0], [0.0, 5.0, -INF], 0, "magnitude opposing signed"),
]


@pytest.mark.parametrize(("student", "teacher", "label", "expected"), MASKED)
@pytest.mark.parametrize("probabilities", [False, True])
def test_masked_classes(student, teacher, label, expected, probabilities):
    target = F.one_hot(torch.tensor(label), 3).float() if probabilities else torch.tensor(label)
    for rule in RULES:
        logits = torch.tensor([student, teacher])
        result = regularization_samples(*logits, target, temperature=4.0, rule=rule)
        assert result.item() == (rule in expected.split())


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_nan_and_inf_make_their_element_none_and_no_other(poison, which, probabilities, rule):
    student, teacher, target = problem((40, 6), probabilities=probabilities)
    expected = regularization_samples(student, teacher, target, rule=rule)
    (student, teacher)[which][::2, 3] = poison
    (student, teacher)[which][0] = -INF
    expected[::2] = False
    assert regularization_samples(student, teacher, target, rule=rule).equal(expected)
    assert expected.any()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("ignore_index", [-100, 255, 0])
@pytest.mark.parametrize("rule", RULES)
def test_ignored_elements_are_none(garbage, ignore_index, rule):
    student, teacher, target = problem((30, 7))
    target = target.clamp(min=1)
    expected = regularization_samples(student, teacher, target, rule=rule)
    student[::3, 1:], target[::3] = garbage, ignore_index
    expected[::3] = False
    assert regularization_samples(
        student, teacher, target, ignore_index=ignore_index, rule=rule
    ).equal(expected)
    assert expected.any()


def test_huge_logits_do_not_overflow():
    for magnitude, dtype in ((1e4, torch.float16), (1e30, torch.float32), (1e300, torch.float64)):
        student = torch.tensor([[magnitude, -magnitude, 0], [0, magnitude, 0]], dtype=dtype)
        teacher = torch.tensor([[magnitude, 0, 0], [magnitude, 0, 0]], dtype=dtype)
        target = torch.tensor([0, 0])
        result = regularization_samples(student, teacher, target, temperature=4.0)
        assert result.tolist() == [magnitude == 1e4, True]  # 1e30 - log(2) is a tie
        assert regularization_samples(teacher, student, target, temperature=4.0).tolist() == [
            magnitude == 1e4,
            True,
        ]


# --- bias and variance: the definition ---


def decomposition(logits, q):
    """One element, (M, C) logits: two definitions of the variance, and the mean cross-entropy."""
    log_yhat = np.stack([log_softmax(x) for x in logits])
    ybar = np.exp(log_yhat.mean(0))
    ybar /= ybar.sum()
    bias = -(q * np.log(ybar)).sum()
    divergence = (ybar * (np.log(ybar) - log_yhat)).sum(1).mean()
    return bias, divergence, -np.log(np.exp(log_yhat.mean(0)).sum()), -(q * log_yhat).sum(1).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bias_and_variance_by_definition(shape, probabilities, dtype):
    logits, target = models(shape, dtype=dtype, probabilities=probabilities)
    result = bias_variance(logits, target)
    x, q = flat(logits, target, first=1)
    expected = np.array([decomposition(x[:, n], q[n]) for n in range(x.shape[1])])
    for value, column in ((result.bias, 0), (result.variance, 1), (result.variance, 2)):
        assert value.shape == shape[:1] * (len(shape) > 1) + shape[2:]
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        budget = 1e-12 if dtype == torch.float64 else 2e-6
        np.testing.assert_allclose(
            value.reshape(-1).numpy(), expected[:, column], rtol=budget, atol=budget
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("scale", [0.01, 3.0, 100.0])
def test_mean_cross_entropy_is_bias_plus_variance(shape, probabilities, scale):
    logits, target = models(
        shape, count=3, scale=scale, dtype=torch.float64, probabilities=probabilities
    )
    if probabilities:
        dim = 0 if len(shape) == 1 else 1
        target = target.double() / target.double().sum(dim, keepdim=True)
    bias, variance = bias_variance(logits, target)
    expected = torch.stack([F.cross_entropy(x, target, reduction="none") for x in logits]).mean(0)
    torch.testing.assert_close(bias + variance, expected, rtol=1e-10, atol=1e-10)


def test_bias_contains_the_noise_of_the_labels():
    logits, target = models((6, 5), dtype=torch.float64, probabilities=True)
    ybar = logits.mean(0).softmax(1)
    target = target.double()
    noise = torch.special.entr(target).sum(1)
    divergence = (target * (target / ybar).log()).sum(1)
    torch.testing.assert_close(
        bias_variance(logits, target).bias, divergence + noise, rtol=1e-7, atol=1e-7
    )


def exact_decomposition(logits, label):
    """Bias and variance of one element as decimals with 300 digits."""
    with localcontext() as context:
        context.prec = 300
        rows = [[Decimal(value) for value in row] for row in logits]
        log_yhat = [[x - sum(y.exp() for y in row).ln() for x in row] for row in rows]
        mean = [sum(column) / len(rows) for column in zip(*log_yhat, strict=True)]
        variance = -sum(x.exp() for x in mean).ln()
        return -mean[label] - variance, variance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.0, 10.0, 20.0, 60.0])
@pytest.mark.parametrize("spread", [3.0, 1e-2, 1e-5])
def test_confident_models_that_nearly_agree_keep_their_digits(dtype, margin, spread, arithmetic):
    """The true values go down to 1e-36, so any sum with a term of 1 loses their digits."""
    # Subtracting the maximum rounds; the models differ by `spread`.
    budget = 8 * torch.finfo(arithmetic).eps * (1 + (1 + margin) / spread)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4, dtype=torch.float64, generator=generator) + margin * torch.tensor(
        [0, 0, 1.0, 0]
    )
    logits = (common + spread * torch.randn(3, 4, dtype=torch.float64, generator=generator)).to(
        dtype
    )
    result = bias_variance(logits, torch.tensor(2))
    for value, true in zip(result, exact_decomposition(logits.tolist(), 2), strict=True):
        assert abs(Decimal(value.item()) - true) <= Decimal(budget + torch.finfo(dtype).eps) * true


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_models_that_disagree(dtype):
    logits = torch.tensor([[[0.0, 1000.0, 3.0]], [[1000.0, 0.0, -3.0]]], dtype=dtype)
    result = bias_variance(logits, torch.tensor([0]))
    expected = [float(value) for value in exact_decomposition(logits[:, 0].tolist(), 0)]
    torch.testing.assert_close(
        torch.cat(result), torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (200, 13), (1, 40_000), (2, 7, 5, 4)])
def test_models_that_agree_have_no_variance(dtype, shape):
    for count in (1, 3, 7):
        logits, target = models(shape, count=1, scale=8.0, dtype=dtype)
        logits = logits / 3  # all the digits that the dtype has
        bias, variance = bias_variance(logits.expand(count, *shape), target)
        assert variance.eq(0).all()
        budget = 1e-12 if dtype == torch.float64 else 2e-6
        expected = F.cross_entropy(logits[0].double(), target, reduction="none")
        torch.testing.assert_close(bias.double(), expected, rtol=budget, atol=budget)


def test_masked_class_has_mean_prediction_zero():
    logits, target = models((6, 5), dtype=torch.float64)
    masked = logits.clone()
    masked[:, :, 4] = -INF
    target = target.clamp(max=3)
    everywhere = bias_variance(masked, target)
    torch.testing.assert_close(everywhere, bias_variance(logits[:, :, :4], target))
    # If one model masks a class, the others normalise over it, which adds to the variance.
    masked = logits.clone()
    masked[1, :, 4] = -INF
    for label in (target, F.one_hot(target, 5).double()):
        bias, variance = bias_variance(masked, label)
        torch.testing.assert_close(bias, everywhere.bias)
        log_yhat = masked.log_softmax(2).mean(0)
        torch.testing.assert_close(variance, -log_yhat.exp().sum(1).log(), rtol=1e-10, atol=1e-10)
        cross_entropy = torch.stack(
            [F.cross_entropy(x, target, reduction="none") for x in masked]
        ).mean(0)
        torch.testing.assert_close(bias + variance, cross_entropy)
    bias, variance = bias_variance(masked, torch.full((6,), 4))
    assert bias.eq(INF).all()
    assert variance.isfinite().all()


def test_models_without_a_common_class_have_no_mean_prediction():
    logits = torch.tensor([[[0.0, -INF], [0.0, 0.0]], [[-INF, 0.0], [0.0, 0.0]]])
    bias, variance = bias_variance(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(bias, torch.tensor([INF, math.log(2)]))
    torch.testing.assert_close(variance, torch.tensor([INF, 0.0]))


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("probabilities", [False, True])
def test_nan_and_inf_poison_their_element_only(poison, probabilities):
    logits, target = models((5, 6), probabilities=probabilities)
    expected = bias_variance(logits, target)
    logits[1, 2, 3] = poison
    logits[0, 2, 3] = -INF  # does not hide it
    logits[2, 4] = -INF  # a model without any class
    kept = torch.tensor([0, 1, 3])
    for value, whole in zip(bias_variance(logits, target), expected, strict=True):
        assert value.isnan().tolist() == [False, False, True, False, True]
        torch.testing.assert_close(value[kept], whole[kept], rtol=1e-6, atol=0)


def test_huge_logits_of_models_do_not_overflow():
    for magnitude, dtype in ((1e4, torch.float16), (1e30, torch.float32), (1e300, torch.float64)):
        logits = torch.tensor([[magnitude, 0, 0], [0, magnitude, -magnitude]], dtype=dtype)
        bias, variance = bias_variance(logits, torch.tensor(0))
        budget = 1e-12 if dtype == torch.float64 else 2e-6
        assert bias.item() == pytest.approx(math.log(2), rel=budget)
        assert variance.item() == pytest.approx(magnitude / 2 - math.log(2), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_prediction_that_nearly_vanishes(dtype, arithmetic):
    """Where ybar is the smallest number there is, yhat / ybar overflows."""
    margin = 190.0 if arithmetic == torch.float32 else 1480.0
    bias, variance = bias_variance(
        torch.tensor([[0.0, -margin], [0.0, 0.0]], dtype=dtype), torch.tensor(1)
    )
    torch.testing.assert_close(variance.item(), math.log(2) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(bias.item(), margin / 2, rtol=1e-6, atol=0)


def test_divergence_of_the_smallest_numbers_is_not_negative():
    """Below 1e-38 float32 goes in steps, by which yhat - ybar * (1 + d) may fall short of 0."""
    log_ybar = torch.linspace(-103.9, -80, 500_000)
    distance = 1 + torch.rand(500_000, generator=torch.Generator().manual_seed(0))
    assert (analysis._divergence(log_ybar.exp(), (log_ybar + distance).exp(), distance) >= 0).all()


# --- both: properties ---

SHIFTS = st.sampled_from([-1e3, -1.0, 0.5, 100.0])


def clear(student, teacher, target, temperature):
    """Where |b| and |a| differ in four digits, from sums over the other classes."""

    def probabilities(x):
        e = (x.double() - x.double().amax(1, keepdim=True)).exp()
        label = e.gather(1, target[:, None])
        return (label / e.sum(1, True)).squeeze(1), (
            e.scatter(1, target[:, None], 0).sum(1) / e.sum(1)
        )

    (_, a), (s, not_s), (t, not_t) = (
        probabilities(x) for x in (student, student / temperature, teacher / temperature)
    )
    x = temperature * torch.where(s + t > 1, not_t - not_s, s - t)
    return (
        (x.abs() > 1e-4 * a)
        & ((x + 2 * a).abs() > 1e-4 * a)
        & (x.abs() > 1e-4 * temperature * torch.minimum(s, t))
    )


@settings(max_examples=60, deadline=None)
@given(rows(), SHIFTS, SHIFTS)
def test_adding_a_constant_to_a_row_changes_no_regularization_sample(case, constant, other):
    student, teacher, target, temperature = case
    student, teacher = (
        (student * 8).round() / 8,
        (teacher * 8).round() / 8,
    )  # halves survive without rounding
    expected = regularization_samples(student, teacher, target, temperature=temperature)
    shifted = regularization_samples(
        student + constant, teacher + other, target, temperature=temperature
    )
    assert shifted.equal(expected)


@settings(max_examples=60, deadline=None)
@given(rows(), st.randoms(use_true_random=False))
def test_renaming_the_classes_changes_no_regularization_sample(case, random):
    student, teacher, target, temperature = case
    order = list(range(student.shape[1]))
    random.shuffle(order)
    order = torch.tensor(order)
    certain = clear(student, teacher, target, temperature)
    expected = regularization_samples(student, teacher, target, temperature=temperature)
    renamed = regularization_samples(
        student[:, order], teacher[:, order], order.argsort()[target], temperature=temperature
    )
    assert renamed[certain].equal(expected[certain])
    one_hot = F.one_hot(target, student.shape[1]).to(student.dtype)
    certain &= student.sub(teacher).abs().amax(1) < 40  # where float32 probabilities do not vanish
    certain &= student.amax(1) - student.amin(1) < 80
    assert regularization_samples(student, teacher, one_hot, temperature=temperature)[
        certain
    ].equal(expected[certain])


@st.composite
def ensembles(draw):
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    return models(
        shape,
        count=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from([1e-4, 0.01, 1, 5, 30, 1000])),
        dtype=draw(st.sampled_from([torch.float16, torch.float32, torch.float64])),
        probabilities=draw(st.booleans()),
    )


@settings(max_examples=80, deadline=None)
@given(ensembles())
def test_bias_and_variance_are_not_negative(case):
    for value in bias_variance(*case):
        assert (value >= 0).all()
        assert value.isfinite().all()


@settings(max_examples=80, deadline=None)
@given(ensembles(), st.randoms(use_true_random=False), st.lists(SHIFTS, min_size=6, max_size=6))
def test_order_of_models_and_classes_and_constants_change_nothing(case, random, constants):
    logits, target = case
    logits = (logits.double() * 8).round() / 8
    expected = bias_variance(logits, target)
    by_model, by_class = list(range(logits.shape[0])), list(range(logits.shape[2]))
    random.shuffle(by_model)
    random.shuffle(by_class)
    shuffled = logits[by_model] + torch.tensor(constants[: len(by_model)])[:, None, None]
    torch.testing.assert_close(bias_variance(shuffled, target), expected, rtol=1e-10, atol=1e-10)
    order = torch.tensor(by_class)
    renamed = target[:, order] if target.is_floating_point() else order.argsort()[target]
    torch.testing.assert_close(
        bias_variance(logits[:, :, order], renamed), expected, rtol=1e-10, atol=1e-10
    )


# --- both: layouts, chunks, memory, autograd ---


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("probabilities", [False, True])
def test_any_strides(layout, probabilities):
    for shape in [(6, 7), (3, 5, 4, 6)]:
        student, teacher, target = problem(shape, probabilities=probabilities, dtype=torch.float64)
        strided = STRIDED[layout](student)
        label = STRIDED[layout](target) if probabilities else target
        contiguous = (
            strided.clone(memory_format=torch.contiguous_format),
            label.clone(memory_format=torch.contiguous_format),
        )
        result = regularization_samples(strided, teacher, label)
        assert result.equal(regularization_samples(contiguous[0], teacher, contiguous[1]))
        result = bias_variance(torch.stack((strided, teacher)), label)
        torch.testing.assert_close(
            result,
            bias_variance(torch.stack((contiguous[0], teacher)), contiguous[1]),
            rtol=0,
            atol=0,
        )
        for models in (
            strided.expand(3, *shape),
            torch.stack((strided, teacher), -1).movedim(-1, 0),
        ):
            torch.testing.assert_close(
                bias_variance(models, label), bias_variance(models.contiguous(), label)
            )


@pytest.mark.parametrize("probabilities", [False, True])
def test_trailing_dimensions_are_more_rows_whatever_the_chunk(probabilities, monkeypatch):
    logits, target = models((2, 6, 3, 2), probabilities=probabilities)
    as_rows = logits.movedim(2, -1).reshape(4, -1, 6)
    label = target.movedim(1, -1).reshape(-1, 6) if probabilities else target.reshape(-1)
    decomposed, result = bias_variance(as_rows, label), regularization_samples(*as_rows[:2], label)
    for chunk in (1, 30, 100, 200, 1000):
        monkeypatch.setattr(analysis, "CHUNK", chunk)
        whole = bias_variance(logits, target)
        torch.testing.assert_close([x.reshape(-1) for x in whole], list(decomposed), rtol=0, atol=0)
        assert regularization_samples(*logits[:2], target).reshape(-1).equal(result)
        for n in range(2):
            assert regularization_samples(
                logits[0, :, :, n, 1], logits[1, :, :, n, 1], target[..., n, 1]
            ).equal(result.view(2, 3, 2)[:, n, 1])


def test_boxes_cover_every_element_once_and_keep_to_their_size():
    for shape in [(), (1,), (7,), (0,), (3, 0), (0, 3), (5, 4), (2, 3, 5), (2, 1, 3, 7)]:
        for size in (0, 1, 2, 4, 7, 20, 1000):
            seen = torch.zeros(shape)
            for box in analysis._boxes(shape, size):
                assert seen[box].numel() <= max(size, 1)
                seen[box] += 1
            assert seen.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.float32, torch.float64])
def test_every_dtype_and_mixture(dtype, teacher_dtype):
    for probabilities in (False, True):
        student, teacher, target = problem((60, 33), probabilities=probabilities, scale=1.0)
        student, teacher = student.to(dtype), teacher.to(teacher_dtype)
        result = regularization_samples(student, teacher, target)
        assert_by_definition(result, student, teacher, target, 2.0)
        assert result.equal(regularization_samples(student.double(), teacher.double(), target))
        assert result.equal(
            regularization_samples(student, teacher, target.to(target.dtype, copy=True))
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_every_integer_target(dtype):
    student, teacher, target = problem((60, 10))
    result = regularization_samples(student, teacher, target.to(dtype))
    assert result.equal(regularization_samples(student, teacher, target))
    logits = torch.stack((student, teacher))
    torch.testing.assert_close(
        bias_variance(logits, target.to(dtype)), bias_variance(logits, target)
    )


def test_uint8_target_is_not_taken_for_the_default_ignore_index():
    student = F.one_hot(torch.tensor([156]), 200).float()
    target = torch.tensor([156], dtype=torch.uint8)  # -100 in 8 bits
    assert regularization_samples(student, torch.zeros(1, 200), target).all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_nothing_in_nothing_out(shape, probabilities):
    student, teacher, target = problem(shape, probabilities=probabilities)
    result = regularization_samples(student, teacher, target)
    assert result.shape == shape[:1] + shape[2:]
    assert result.dtype == torch.bool
    for value in bias_variance(torch.stack((student, teacher)), target):
        assert value.shape == shape[:1] + shape[2:]


@pytest.mark.parametrize("probabilities", [False, True])
def test_no_graph_and_no_input_written(probabilities):
    student, teacher, target = problem((6, 5), probabilities=probabilities)
    logits = torch.stack((student, teacher))
    inputs = student, teacher, logits, target
    copies = [x.clone() for x in inputs]
    for x in inputs[: 4 if probabilities else 3]:
        x.requires_grad_()
    assert not regularization_samples(student, teacher, target).requires_grad
    assert not any(value.requires_grad for value in bias_variance(logits, target))
    for x, copied in zip(inputs, copies, strict=True):
        torch.testing.assert_close(x.detach(), copied, rtol=0, atol=0)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)
def test_memory_stays_below_twice_the_inputs():
    code = """
import torch
from weighted_soft_labels.analysis import bias_variance, regularization_samples

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

torch.set_num_threads(1)
rows = torch.empty(2, 1024, 4096).normal_()
# No view of these pixels is flat.
pixels = torch.empty(2, 2, 256, 256, 32).normal_().permute(0, 1, 4, 3, 2)

def both(logits):
    target = torch.randint(logits.shape[2], logits.shape[1:2] + logits.shape[3:])
    bias_variance(logits, target)
    regularization_samples(logits[0], logits[1], target)
    return target

both(torch.zeros(2, 3, 4))
for logits in (rows, pixels):
    before = peak()
    target = both(logits)
    inputs = 4 * logits.numel() + 8 * target.numel()
    assert peak() - before < inputs, (peak() - before, inputs)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


# --- both: errors ---


@pytest.mark.parametrize(("inputs", "error", "message"), INPUTS)
def test_inputs_of_regularization_samples(inputs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        regularization_samples(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be finite and > 0, got 0"),
        ({"temperature": "4"}, "temperature must be a number, got '4'"),
        ({"ignore_index": None}, "ignore_index must be an int, got None"),
        ({"rule": "both"}, "rule must be one of magnitude, opposing, signed, got 'both'"),
    ],
)
def test_options_of_regularization_samples(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        regularization_samples(*problem((4, 5)), **options)


MODELS, TARGET = torch.zeros(3, 8, 10), torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((MODELS[:0], TARGET), ValueError, "at least one model, got shape (0, 8, 10)"),
        (
            (MODELS[0, 0], TARGET[0]),
            ValueError,
            "(M, C), (M, N, C) or (M, N, C, d1, ..., dk), got shape (10,)",
        ),
        ((torch.tensor(1.0), TARGET), ValueError, "(M, N, C, d1, ..., dk), got shape ()"),
        (
            (MODELS[..., :0], TARGET),
            ValueError,
            "logits must have at least one class, got shape (3, 8, 0)",
        ),
        ((MODELS, TARGET[:4]), ValueError, "(8,) for logits of (8, 10), got (4,)"),
        ((MODELS, TARGET.expand(3, 8)), ValueError, "(8,) for logits of (8, 10), got (3, 8)"),
        ((MODELS, MODELS), ValueError, "(8, 10) for logits of (8, 10), got (3, 8, 10)"),
        ((MODELS[:, 0], TARGET), ValueError, "() for logits of (10,), got (8,)"),
        (
            (MODELS, TARGET.to("meta")),
            ValueError,
            "logits and target must be on the same device, got cpu and meta",
        ),
        (
            (MODELS.long(), TARGET),
            TypeError,
            "logits must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (([MODELS[0]], TARGET), TypeError, "logits must be a Tensor, got list"),
        ((MODELS, 3), TypeError, "target must be a Tensor, got int"),
        ((MODELS, TARGET.bool()), TypeError, "got torch.bool"),
        ((MODELS, TARGET + 10), IndexError, "target must hold class indices in [0, 10), got 10"),
        ((MODELS, TARGET - 100), IndexError, "target must hold class indices in [0, 10), got -100"),
    ],
)
def test_inputs_of_bias_variance(inputs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        bias_variance(*inputs)


def test_compiled_code_cannot_raise_for_an_index_that_names_no_class():
    student, teacher, target = problem((6, 10))
    logits = torch.stack((student, teacher))
    result, decomposed = (
        regularization_samples(student, teacher, target),
        bias_variance(logits, target),
    )
    wrong = target.clone()
    wrong[2], wrong[3] = 10, -1
    kept = torch.tensor([0, 1, 4, 5])
    torch._dynamo.reset()
    compiled = torch.compile(regularization_samples, fullgraph=True, backend="eager")(
        student, teacher, wrong
    )
    assert compiled.equal(result & torch.tensor([True, True, False, False, True, True]))
    for value, expected in zip(
        torch.compile(bias_variance, fullgraph=True, backend="eager")(logits, wrong),
        decomposed,
        strict=True,
    ):
        assert value.isnan().tolist() == [False, False, True, True, False, False]
        torch.testing.assert_close(value[kept], expected[kept])
    torch._dynamo.reset()
