"""Cached teachers: the loss, against `wsl_loss` and a row-by-row form in float64, and its cache."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from weighted_soft_labels import cached as module
from weighted_soft_labels import reference, wsl_loss
from weighted_soft_labels.cached import (
    CachedTeacher,
    cached_linear_wsl_loss,
    cached_wsl_loss,
    compress,
    from_topk,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, CLASSES, WIDTH = 13, 50, 8
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPTIONS = [
    {},
    {"alpha": 0.5, "label_smoothing": 0.1},
    {"hard_weight": 0.0},
    {"alpha": 0.0, "label_smoothing": 1.0},
    {"reduction": "sum", "ignore_index": 7},
    {"reduction": "none"},
    {"balance": True, "label_smoothing": 0.1},
    {"balance": True, "reduction": "sum", "hard_weight": 0.0},
]


def problem(dtype=torch.float32, rows=ROWS, classes=CLASSES, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn((2, rows, classes), generator=generator) * scale
    target = torch.randint(classes, (rows,), generator=generator)
    target[3:5] = -100
    return student.to(dtype), teacher, target


def step(loss, student, *others, upstream=1.0, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, *others, **options)
    (value * upstream).sum().backward()
    return value.detach(), student.grad


def exact_rows(student, cached, target, *, temperature, ignore_index=-100, **options):
    """The loss of every row in float64, one class after another, with a graph."""
    alpha, hard_weight = options.get("alpha", 2.5), options.get("hard_weight", 1.0)
    smoothing = options.get("label_smoothing", 0.0)
    hard_terms, soft_terms, weights = [], [], []
    for s, index, log_prob, label_log_prob, log_rest, y in zip(student, *cached, target.tolist()):
        if y == ignore_index:
            for terms in (hard_terms, soft_terms, weights):
                terms.append(s.new_zeros((), dtype=torch.float64))
            continue
        s = s.double()
        masses = {y: []}
        for j, (c, value) in enumerate(zip(index.tolist(), log_prob.double())):
            if j == 0 or value > -math.inf:
                masses.setdefault(c, []).append(value / temperature)
        others = [c for c in range(len(s)) if c not in masses]
        log_q = torch.stack(
            [torch.stack(values).logsumexp(0) for values in masses.values()] + [log_rest.double()]
        ).log_softmax(0)
        log_student = (s / temperature).log_softmax(0)
        log_bucket = log_student[others].logsumexp(0)
        log_s = torch.stack([*(log_student[c] for c in masses), log_bucket])
        soft_terms.append(-torch.where(log_q == -math.inf, 0.0, log_q.exp() * log_s).sum())
        except_label = torch.cat((s[:y], s[y + 1 :]))
        ce = torch.log1p((except_label.logsumexp(0) - s[y]).exp())
        weights.append(-torch.expm1(-ce.detach() / (-label_log_prob.double() + 1e-7)))
        uniform = (s.logsumexp(0) - s).mean()
        hard_terms.append((1 - smoothing) * ce + smoothing * uniform)
    hard, soft, weight = (torch.stack(terms) for terms in (hard_terms, soft_terms, weights))
    if options.get("balance"):
        weight = weight * (target != ignore_index).sum() / weight.sum()
    return hard_weight * hard + alpha * temperature**2 * weight * soft


def exact(student, cached, target, *, reduction="mean", **options):
    rows = exact_rows(student, cached, target, **options)
    if reduction == "mean":
        return rows.sum() / (target != options.get("ignore_index", -100)).sum()
    return rows.sum() if reduction == "sum" else rows


def assert_close(found, expected, dtype=torch.float32, budget=None):
    """To the roundings of float32, and of the gradient to the student's dtype."""
    budget = budget or (1e-12 if dtype == torch.float64 else 3e-6)
    value, gradient = found
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected[0], rtol=budget, atol=budget)
    largest = expected[1].abs().max().item()
    rtol, floor = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(
        gradient.double(), expected[1].double(), rtol=rtol, atol=budget * largest + floor * rtol
    )


def assert_exact(student, cached, target, upstream=1.0, **options):
    found = step(cached_wsl_loss, student, cached, target, upstream=upstream, **options)
    expected = step(exact, student.double(), cached, target, upstream=upstream, **options)
    assert_close(found, expected, student.dtype)


# --- what the loss is ---


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
@pytest.mark.parametrize("k", [CLASSES, CLASSES - 1])
def test_equals_the_dense_loss_if_all_classes_or_all_but_one_are_kept(
    k, temperature, dtype, options
):
    student, teacher, target = problem(dtype)
    if "ignore_index" in options:
        target = target.where(target != -100, 7)
    options = options | {"temperature": temperature}
    ignored = options.get("ignore_index", -100)
    cached = compress(
        teacher, target, k, temperature=temperature, ignore_index=ignored, dtype=torch.float32
    )
    upstream = torch.rand(ROWS) if options.get("reduction") == "none" else 3.0
    found = step(cached_wsl_loss, student, cached, target, upstream=upstream, **options)
    dense = student.double(), teacher.double(), target
    expected = step(reference.wsl_loss, *dense, upstream=upstream, **options)
    budget = 2e-6 if dtype == torch.float64 else None  # the cache itself is float32
    assert_close(found, expected, dtype, budget)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_every_option_and_dtype(temperature, stored, dtype, options):
    student, teacher, target = problem(dtype)
    if "ignore_index" in options:
        target = target.where(target != -100, 7)
    ignored = options.get("ignore_index", -100)
    cached = compress(
        teacher, target, 9, temperature=temperature, ignore_index=ignored, dtype=stored
    )
    upstream = torch.rand(ROWS) if options.get("reduction") == "none" else 3.0
    assert_exact(student, cached, target, upstream, temperature=temperature, **options)


def test_gradient_is_that_of_a_dense_teacher_whose_tail_has_the_students_shape():
    student, teacher, target = problem(torch.float64)
    cached = compress(teacher, target, 6, temperature=1.0, dtype=torch.float32)
    tail = torch.ones_like(student, dtype=torch.bool).scatter(1, cached.index.long(), False)
    inside = student.where(tail, -math.inf).log_softmax(1)
    dense = (cached.log_rest.unsqueeze(1) + inside).where(tail, 0.0)
    dense.scatter_(1, cached.index.long(), cached.log_prob.double())
    kept = target != -100
    dense = dense.where(kept.unsqueeze(1), 0.0)
    _, found = step(cached_wsl_loss, student, cached, target, temperature=1.0)
    _, expected = step(wsl_loss, student, dense, target, temperature=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_term_rises_with_k_to_that_of_the_dense_loss(temperature):
    student, teacher, target = problem(torch.float64, rows=200)
    target = target.clamp(min=0)
    options = {"temperature": temperature, "hard_weight": 0.0, "reduction": "none"}
    last = torch.zeros(200, dtype=torch.float64)
    for k in (1, 2, 5, 20, 49):
        cached = compress(teacher, target, k, temperature=temperature, dtype=torch.float32)
        soft = cached_wsl_loss(student, cached, target, **options)
        assert (soft >= last * (1 - 1e-5)).all()
        last = soft
    full = wsl_loss(student, teacher, target, **options)
    torch.testing.assert_close(last, full, rtol=1e-5, atol=1e-6)
    assert (cached_wsl_loss(student, cached, target, **options) <= full * (1 + 1e-5)).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_log_rest_the_teacher_is_renormalised(temperature):
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=temperature, dtype=torch.float32)
    cached = cached._replace(log_rest=torch.full((ROWS,), -math.inf))
    dense = torch.full_like(student, -math.inf).scatter_(1, cached.index.long(), cached.log_prob)
    options = {"temperature": temperature, "reduction": "none"}
    found = step(cached_wsl_loss, student, cached, target, **options)
    # The weight is the one of the label's own log-probability, not of the renormalised one.
    ce = F.cross_entropy(student, target, reduction="none")
    weight = -torch.expm1(-ce / (1e-7 - cached.label_log_prob))
    soft = -(dense / temperature).softmax(1) * (student / temperature).log_softmax(1)
    expected = ce + 2.5 * temperature**2 * weight * soft.sum(1)
    kept = target != -100
    torch.testing.assert_close(found[0], expected.where(kept, 0.0), rtol=1e-5, atol=1e-5)
    rows = torch.arange(ROWS), target.clamp(min=0)
    tail = student.softmax(1)
    tail[rows] -= 1
    soft_gradient = (student / temperature).softmax(1) - (dense / temperature).softmax(1)
    gradient = tail + 2.5 * temperature * weight[:, None] * soft_gradient
    torch.testing.assert_close(found[1], gradient.where(kept[:, None], 0.0), rtol=1e-5, atol=1e-5)


def test_any_leading_dimensions_and_strides():
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    expected = step(cached_wsl_loss, student, cached, target, temperature=1.0)
    shaped = CachedTeacher(*(x.unsqueeze(1) for x in cached))
    found = step(
        cached_wsl_loss, student.unsqueeze(1), shaped, target.unsqueeze(1), temperature=1.0
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][:, 0], expected[1])
    again = compress(teacher.unsqueeze(1), target.unsqueeze(1), 5, temperature=1.0)
    assert all(torch.equal(a, b) for a, b in zip(again, shaped))
    one = CachedTeacher(*(x[0] for x in cached))
    row = cached_wsl_loss(student[0], one, target[0], temperature=1.0, reduction="none")
    rows = cached_wsl_loss(student, cached, target, temperature=1.0, reduction="none")
    torch.testing.assert_close(row, rows[0])
    strided = student.t().contiguous().t().requires_grad_()
    cached_wsl_loss(strided, cached, target, temperature=1.0).backward()
    torch.testing.assert_close(strided.grad, expected[1])


def test_rows_do_not_depend_on_their_chunk(monkeypatch):
    student, teacher, target = problem(rows=100)
    for temperature in (1.0, 2.0):
        cached = compress(teacher, target, 5, temperature=temperature)
        for dtype in (torch.float32, torch.float16):
            logits = student.to(dtype)
            whole = step(cached_wsl_loss, logits, cached, target, temperature=temperature)
            monkeypatch.setattr(module, "BLOCK", 7 * CLASSES)
            pieces = step(cached_wsl_loss, logits, cached, target, temperature=temperature)
            again = compress(teacher, target, 5, temperature=temperature)
            monkeypatch.undo()
            torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-7)
            assert all(torch.equal(a, b) for a, b in zip(again, cached))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, ROWS])
def test_empty_and_ignored_batches(rows, reduction):
    student, teacher, target = problem(rows=rows)
    target[:] = -100
    cached = compress(teacher, target, 4, temperature=1.0)
    value, gradient = step(
        cached_wsl_loss, student, cached, target, temperature=1.0, reduction=reduction
    )
    assert value.isnan().all() if reduction == "mean" else value.eq(0).all()
    assert gradient.eq(0).all()
    weight = torch.randn(CLASSES, WIDTH, requires_grad=True)
    x = torch.randn(rows, WIDTH)
    cached_linear_wsl_loss(x, weight, cached, target, temperature=1.0, reduction="sum").backward()
    assert weight.grad.eq(0).all()


def test_ignored_rows_are_inert_whatever_the_cache_holds():
    student, teacher, target = problem()
    cached = compress(teacher, target, 4, temperature=2.0)
    expected = step(cached_wsl_loss, student, cached, target, temperature=2.0)
    wild = CachedTeacher(*(x.clone() for x in cached))
    wild.index[3], wild.index[4] = -5, 2**31 - 1
    wild.log_prob[3], wild.log_prob[4] = math.nan, 900.0
    wild.label_log_prob[3:5], wild.log_rest[3:5] = math.nan, math.inf
    student[3:5] = math.nan
    found = step(cached_wsl_loss, student, wild, target, temperature=2.0)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# --- digits ---


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weight_is_within_1e_6_of_float64(stored):
    """Teacher cross-entropies 1e-12 to 20, with the student's at, below and above."""
    ce = torch.logspace(-12, math.log10(20), 200, dtype=torch.float64)
    teacher = torch.zeros(200, CLASSES, dtype=torch.float64)
    teacher[:, 1:] = torch.log(torch.expm1(ce) / (CLASSES - 1))[:, None]
    target = torch.zeros(200).long()
    cached = compress(teacher, target, 6, temperature=1.0, dtype=stored)
    for factor in (0.01, 1.0, 30.0):
        student = torch.zeros_like(teacher)
        student[:, 1:] = torch.log(torch.expm1(ce * factor) / (CLASSES - 1))[:, None]
        student = student.float()
        student_ce = F.cross_entropy(student.double(), target, reduction="none")
        others = student[:, 1:].double().exp().sum(1)
        student_ce = torch.where(others < 1, others.log1p(), student_ce)
        expected = -torch.expm1(-student_ce / (ce + 1e-7))
        # Twice the soft term less once: the weight times soft. soft is the oracle's.
        options = {"temperature": 1.0, "hard_weight": 0.0, "reduction": "none"}
        weighted = cached_wsl_loss(student, cached, target, alpha=1.0, **options).double()
        exact_weighted = exact_rows(student, cached, target, alpha=1.0, **options)
        soft = exact_weighted / -torch.expm1(-student_ce / (1e-7 - cached.label_log_prob.double()))
        assert ((weighted / soft - expected).abs() < 1e-6).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mass", [1e-12, 1e-20, 1e-30])
def test_tiny_masses_on_either_side_keep_their_digits(mass, temperature):
    """Classes that are not kept have `mass` at T; no clamp, no NaN, and every term is exact."""
    tail = temperature * math.log(mass / (CLASSES - 3))
    for student_tail, teacher_tail in ((tail, -1.0), (-1.0, tail), (tail, tail - 2.0)):
        student, teacher = torch.full((2, 1, CLASSES), tail).unbind(0)
        student[:, 3:], teacher[:, 3:] = student_tail, teacher_tail
        student[0, :3] = torch.tensor([0.0, -30.0, -60.0])
        teacher[0, :3] = torch.tensor([0.0, -40.0, -50.0])
        target = torch.zeros(1).long()
        cached = compress(teacher, target, 3, temperature=temperature, dtype=torch.float32)
        place = torch.tensor([[0, 1, 2]])
        log = teacher.double().log_softmax(1)
        bucket = (log[:, 3:] / temperature).logsumexp(1)
        cached = CachedTeacher(place, log[:, :3].float(), cached.label_log_prob, bucket.float())
        options = {"temperature": temperature, "reduction": "none"}
        value, gradient = step(cached_wsl_loss, student, cached, target, **options)
        expected, exact_gradient = step(exact, student.double(), cached, target, **options)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
        # The label's entry in float64 is a difference of numbers near 1, without digits.
        torch.testing.assert_close(
            gradient[:, 1:].double(), exact_gradient[:, 1:], rtol=2e-5, atol=1e-37
        )
        torch.testing.assert_close(
            gradient[:, 0].double(), -exact_gradient[:, 1:].sum(1), rtol=1e-4, atol=1e-37
        )


def test_students_tail_beyond_the_range_of_float32_is_finite():
    student, teacher, target = torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1).long()
    student[0, 2:] = -300.0
    cached = compress(teacher, target, 2, temperature=1.0)
    cached = cached._replace(index=torch.tensor([[0, 1]]))
    assert_exact(student, cached, target, temperature=1.0)


def test_masked_classes_and_infinite_losses_are_as_in_the_dense_loss():
    student, teacher, target = problem()
    student[:, 10:20] = teacher[:, 10:20] = -math.inf
    target = target.where((target < 10) | (target >= 20), 3)
    for k in (3, 40, 45, CLASSES):  # the last two keep masked classes too
        cached = compress(teacher, target, k, temperature=2.0, dtype=torch.float32)
        counts = (cached.index == cached.index[:, :1]).sum(1)
        assert (counts == 1).all()  # the label is never stored twice
        value, gradient = step(cached_wsl_loss, student, cached, target, temperature=2.0)
        assert value.isfinite()
        assert gradient.isfinite().all()
        if k >= 40:
            expected = step(wsl_loss, student, teacher, target, temperature=2.0)
            torch.testing.assert_close((value, gradient), expected, rtol=1e-5, atol=1e-6)
    only = torch.full((1, 4), -math.inf)
    only[0, :2] = 0.0  # every class that is not kept is masked
    cached = compress(only, torch.tensor([0]), 2, temperature=1.0)
    value, gradient = step(cached_wsl_loss, only, cached, torch.tensor([0]), temperature=1.0)
    expected = step(wsl_loss, only, only, torch.tensor([0]), temperature=1.0)
    torch.testing.assert_close((value, gradient), expected)
    mass = compress(torch.zeros(1, 4), torch.tensor([0]), 2, temperature=1.0)
    mass = mass._replace(index=torch.tensor([[0, 1]]))
    assert cached_wsl_loss(only, mass, torch.tensor([0]), temperature=1.0) == math.inf
    options = {"temperature": 1.0, "alpha": 0.0}  # a term with scale 0 is left out
    assert cached_wsl_loss(only, mass, torch.tensor([0]), **options).isfinite()
    ruled_out = torch.tensor([[-math.inf, 0.0, 0.0, 0.0]])
    assert cached_wsl_loss(ruled_out, mass, torch.tensor([0]), temperature=1.0) == math.inf


def test_label_that_both_models_rule_out_has_weight_1():
    logits, target = torch.tensor([[-math.inf, 0.0, 1.0, 2.0]]), torch.tensor([0])
    options = {"temperature": 1.0, "hard_weight": 0.0}
    expected = step(wsl_loss, logits, logits, target, **options)
    for k in (1, 2, 4):
        cached = compress(logits, target, k, temperature=1.0, dtype=torch.float32)
        value, gradient = step(cached_wsl_loss, logits, cached, target, **options)
        assert value.isfinite()
        torch.testing.assert_close(gradient, expected[1])
    torch.testing.assert_close(value, expected[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 1, 40])
def test_a_nan_poisons_its_own_row(column, value):
    student, teacher, target = problem()
    order = teacher.argsort(1, descending=True)
    cached = compress(teacher, target, 5, temperature=2.0)
    student[0, order[0, column]] = value
    found, gradient = step(
        cached_wsl_loss, student, cached, target, temperature=2.0, reduction="none"
    )
    assert found.isnan().tolist() == [True] + [False] * (ROWS - 1)
    assert gradient.isnan().all(1).tolist() == [True] + [False] * (ROWS - 1)


def test_half_precision_entries_whose_sum_exceeds_1():
    student, teacher, target = problem(rows=500, scale=6.0)
    target = teacher.argmax(1)
    cached = compress(teacher, target, 20, temperature=1.0)
    above = cached.log_prob.double().exp().sum(1) > 1
    assert above.sum() > 50
    value, gradient = step(
        cached_wsl_loss, student, cached, target, temperature=1.0, reduction="none"
    )
    dense, _ = step(wsl_loss, student, teacher, target, temperature=1.0, reduction="none")
    assert gradient.isfinite().all()
    assert_exact(student, cached, target, temperature=1.0)
    torch.testing.assert_close(value, dense, rtol=0.02, atol=0.02)


def test_half_precision_gradient_survives_a_gradient_scaler():
    student, teacher, target = problem(torch.float16, rows=4096)
    cached = compress(teacher, target, 4, temperature=1.0)
    _, gradient = step(cached_wsl_loss, student, cached, target, upstream=2.0**14, temperature=1.0)
    _, expected = step(
        cached_wsl_loss, student.float(), cached, target, upstream=2.0**14, temperature=1.0
    )
    torch.testing.assert_close(gradient.float(), expected, rtol=2e-3, atol=1e-6)


# --- what a cache may hold ---


def test_label_outside_the_top_k_is_column_0():
    _, teacher, target = problem()
    target = teacher.argmin(1)
    cached = compress(teacher, target, 4, temperature=1.0, dtype=torch.float32)
    assert torch.equal(cached.index[:, 0].long(), target)
    assert torch.equal(cached.index[:, 1:].long(), teacher.topk(3).indices)
    log = teacher.double().log_softmax(1)
    torch.testing.assert_close(
        cached.label_log_prob.double(), log.gather(1, target[:, None])[:, 0], rtol=1e-6, atol=0
    )
    only = compress(teacher, target, 1, temperature=1.0)
    assert torch.equal(only.index[:, 0].long(), target)


def test_compress_keeps_all_digits_of_the_label_and_of_the_others():
    teacher = torch.zeros(3, CLASSES)
    teacher[:, 0] = torch.tensor([30.0, 50.0, 60.0])
    cached = compress(teacher, torch.zeros(3).long(), 1, temperature=1.0)
    expected = torch.log1p(49 * torch.exp(-teacher[:, 0].double()))
    torch.testing.assert_close(-cached.label_log_prob.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        cached.log_rest.double(), math.log(49) - teacher[:, 0].double(), rtol=1e-6, atol=0
    )
    none = compress(teacher, torch.zeros(3).long(), CLASSES, temperature=1.0)
    assert none.log_rest.eq(-math.inf).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_order_of_the_other_columns_does_not_matter(temperature):
    student, teacher, target = problem()
    cached = compress(teacher, target, 8, temperature=temperature)
    order = torch.cat((torch.zeros(1), torch.randperm(7) + 1)).long()
    moved = cached._replace(index=cached.index[:, order], log_prob=cached.log_prob[:, order])
    expected = step(cached_wsl_loss, student, cached, target, temperature=temperature)
    found = step(cached_wsl_loss, student, moved, target, temperature=temperature)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("column", [0, 2])  # the label, another class
def test_a_class_that_stands_twice_counts_once_with_both_masses(column, temperature):
    student, teacher, target = problem()
    whole = compress(teacher, target, 5, temperature=temperature, dtype=torch.float32)
    half = whole.log_prob.clone()
    half[:, column] -= temperature * math.log(2)
    twice = whole._replace(
        index=torch.cat((whole.index, whole.index[:, column, None]), 1),
        log_prob=torch.cat((half, half[:, column, None]), 1),
    )
    # Entries of half the mass contradict label_log_prob, as sampled counts may.
    whole, twice = (x._replace(log_rest=torch.full((ROWS,), -math.inf)) for x in (whole, twice))
    expected = step(cached_wsl_loss, student, whole, target, temperature=temperature)
    found = step(cached_wsl_loss, student, twice, target, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert_exact(student, twice, target, temperature=temperature)


@pytest.mark.parametrize("index", [-1, 0, 17, CLASSES, 2**31 - 1])
def test_padding_is_inert_whatever_its_index(index):
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=2.0)
    padded = cached._replace(
        index=F.pad(cached.index, (0, 2), value=index),
        log_prob=F.pad(cached.log_prob, (0, 2), value=-math.inf),
    )
    expected = step(cached_wsl_loss, student, cached, target, temperature=2.0)
    found = step(cached_wsl_loss, student, padded, target, temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_mean_over_sampled_counts_is_the_dense_gradient():
    """log(count / N) of N draws, with the label in column 0 even if it was never drawn."""
    student, teacher, target = problem(torch.float64)
    target = target.clamp(min=0)
    draws = 30000
    samples = torch.multinomial(teacher.softmax(1), draws, replacement=True)
    counts = torch.zeros_like(student).scatter_add_(
        1, samples, torch.ones_like(samples, dtype=torch.float64)
    )
    index = torch.arange(CLASSES).expand(ROWS, -1)
    index = torch.cat((target[:, None], index[:, :-1]), 1)
    order = torch.stack(
        [torch.cat((y[None], torch.arange(CLASSES)[torch.arange(CLASSES) != y])) for y in target]
    )
    label = teacher.log_softmax(1).gather(1, target[:, None])[:, 0]
    log_prob = (counts / draws).log().gather(1, order).float()
    cached = CachedTeacher(order, log_prob, label, torch.full((ROWS,), -math.inf))
    _, found = step(cached_wsl_loss, student, cached, target, temperature=1.0)
    _, expected = step(wsl_loss, student, teacher, target, temperature=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


# --- stores ---


def test_rows_through_the_default_collate_function():
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    rows = [(student[n], CachedTeacher(*(x[n] for x in cached)), target[n]) for n in range(ROWS)]
    expected = cached_wsl_loss(student, cached, target, temperature=1.0)
    ((logits, batch, label),) = DataLoader(rows, batch_size=ROWS)
    assert isinstance(batch, CachedTeacher)
    assert torch.equal(cached_wsl_loss(logits, batch, label, temperature=1.0), expected)


def test_round_trips_through_memory_maps_and_files(tmp_path):
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    expected = cached_wsl_loss(student, cached, target, temperature=1.0)
    torch.save(cached._asdict(), tmp_path / "cache.pt")
    loaded = [CachedTeacher(**torch.load(tmp_path / "cache.pt"))]
    fields = {}
    for name, x in cached._asdict().items():
        array = np.memmap(tmp_path / name, x.numpy().dtype, "w+", shape=tuple(x.shape))
        array[:] = x.numpy()
        fields[name] = torch.from_numpy(array)
    loaded.append(CachedTeacher(**fields))
    if find_spec("safetensors"):
        from safetensors.torch import load_file, save_file

        save_file(cached._asdict(), tmp_path / "cache.safetensors")
        loaded.append(CachedTeacher(**load_file(tmp_path / "cache.safetensors")))
    for each in loaded:
        assert torch.equal(cached_wsl_loss(student, each, target, temperature=1.0), expected)


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")
def test_round_trip_through_arrow(tmp_path):
    import datasets

    _, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    columns = {name: x.numpy() for name, x in cached._asdict().items()}
    data = datasets.Dataset.from_dict(
        columns | {"student": teacher.numpy(), "target": target.numpy()}
    )
    data.save_to_disk(tmp_path / "arrow")
    data = datasets.load_from_disk(tmp_path / "arrow").with_format("torch").shuffle(seed=0)
    batch = data[:]
    # The columns of a row stay together, so a shuffled data set is still aligned.
    student, label = batch.pop("student"), batch.pop("target")
    loss = cached_wsl_loss(student, CachedTeacher(**batch), label, temperature=1.0)
    expected = cached_wsl_loss(teacher, cached, target, temperature=1.0)
    torch.testing.assert_close(loss, expected)


# --- what servers return ---


def vllm_rows(log, target, k):
    """Dictionaries of class and log-probability: k entries, and the prompt's own token's."""
    rows = []
    for n in range(len(log)):
        classes = log[n].topk(k).indices.tolist()
        label = int(target[n])
        if label >= 0 and label not in classes:
            classes.append(label)
        rows.append({c: float(log[n, c]) for c in classes})
    return rows


def test_entries_of_a_server_are_a_cache():
    student, teacher, target = problem()
    log = teacher.log_softmax(1)
    rows = vllm_rows(log, target, 5)
    widths = {len(row) for row in rows}
    assert widths == {5, 6}
    index, log_prob = torch.full((ROWS, 6), -1), torch.full((ROWS, 6), -math.inf)
    for n, row in enumerate(rows):
        index[n, : len(row)] = torch.tensor(list(row))
        log_prob[n, : len(row)] = torch.tensor(list(row.values()))
    cached = from_topk(index, log_prob, target)
    kept = target != -100
    assert torch.equal(cached.index[kept, 0], target[kept])
    assert_exact(student, cached, target, temperature=1.0)
    expected = log.scatter(1, index.clamp(min=0), -math.inf)
    expected = torch.stack(
        [log[n][[c not in row for c in range(CLASSES)]].logsumexp(0) for n, row in enumerate(rows)]
    )
    torch.testing.assert_close(cached.log_rest[kept], expected[kept], rtol=1e-4, atol=1e-4)
    again = compress(teacher, target, 6, temperature=1.0, dtype=torch.float32)
    torch.testing.assert_close(cached.label_log_prob[kept], again.label_log_prob[kept])


def test_the_prompts_own_token_in_front_is_not_counted_twice():
    """vLLM's tensors: column 0 is the token, the others the top k, which may repeat it."""
    student, teacher, target = problem()
    target = teacher.argmax(1)
    log = teacher.log_softmax(1)
    top = log.topk(4)
    index = torch.cat((target[:, None], top.indices), 1)
    log_prob = log.gather(1, index)
    cached = from_topk(index, log_prob, target)
    expected = compress(teacher, target, 4, temperature=1.0, dtype=torch.float32)
    found = step(cached_wsl_loss, student, cached, target, temperature=1.0)
    expected = step(cached_wsl_loss, student, expected, target, temperature=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_label_log_prob_of_a_server_may_be_separate():
    student, teacher, target = problem()
    log = teacher.log_softmax(1)
    top = log.topk(5)
    label = log.gather(1, target.clamp(min=0)[:, None])[:, 0]
    half = top.values.half()
    cached = from_topk(top.indices.int(), half, target, label_log_prob=label)
    kept = target != -100
    assert cached.index.shape == (ROWS, 6)
    assert cached.index.dtype == torch.int32
    assert cached.log_prob.dtype == torch.float16
    assert torch.equal(cached.label_log_prob[kept], label[kept])
    assert_exact(student, cached, target, temperature=1.0)
    whole = from_topk(*(x.flip(1) for x in (log.topk(CLASSES)[::-1])), target)
    assert whole.log_rest[kept].lt(-10).all()  # what float32 leaves of 1 - sum
    dense = step(wsl_loss, student, teacher, target, temperature=1.0)
    torch.testing.assert_close(
        step(cached_wsl_loss, student, whole, target, temperature=1.0), dense, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.tensor([9, 1])}, ValueError, "1 rows, the first at [0], have no entry"),
        ({"log_prob": torch.tensor([[2.0, 1.0]] * 2)}, ValueError, "more than 1, or NaN"),
        ({"log_prob": torch.full((2, 2), -1.0).half()}, TypeError, "log_prob must be float32"),
        ({"label_log_prob": torch.zeros(2).half()}, TypeError, "off by up to 0.07"),
        ({"label_log_prob": torch.full((2,), -3.0)}, ValueError, "of different positions"),
        ({"label_log_prob": torch.zeros(3)}, ValueError, "(..., k), target and label_log_prob"),
        ({"index": torch.zeros(2, 2)}, TypeError, "index must be int32 or int64"),
        ({"target": torch.zeros(2)}, TypeError, "target must hold class indices"),
        ({"log_prob": torch.zeros(2, 3)}, ValueError, "index and log_prob must be (..., k)"),
        ({"ignore_index": 1.5}, ValueError, "ignore_index must be an int"),
    ],
)
def test_errors_of_from_topk(changes, error, message):
    arguments = {
        "index": torch.tensor([[0, 1], [1, 2]]),
        "log_prob": torch.tensor([[-1.0, -2.0]] * 2),
        "target": torch.tensor([0, 1]),
    }
    from_topk(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        from_topk(**arguments | changes)


# --- from hidden states ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_hidden_states_are_the_same_as_logits(softcap, reduction, temperature, dtype):
    _, teacher, target = problem()
    generator = torch.Generator().manual_seed(1)
    shapes = (ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    cached = compress(teacher, target, 9, temperature=temperature)
    tensors[0][3:5] = math.nan  # the padding of a batch
    upstream = torch.rand(ROWS) if reduction == "none" else 3.0
    options = {"temperature": temperature, "reduction": reduction, "label_smoothing": 0.1}
    exact_leaves = [x.double().clone().requires_grad_() for x in tensors]
    rows = exact_leaves[0].where((target != -100)[:, None], 0.0)
    logits = 0.5 * F.linear(rows, *exact_leaves[1:])
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = exact(logits, cached, target, **options)
    (expected * upstream).sum().backward()
    for chunk_size in (1, 5, None):
        leaves = [x.clone().requires_grad_() for x in tensors]
        value = cached_linear_wsl_loss(
            *leaves[:2],
            cached,
            target,
            student_bias=leaves[2],
            student_logit_scale=0.5,
            student_softcap=softcap,
            chunk_size=chunk_size,
            **options,
        )
        (value * upstream).sum().backward()
        for leaf, other in zip(leaves, exact_leaves):
            assert_close((value.detach(), leaf.grad), (expected.detach(), other.grad), dtype, 5e-6)


def test_frozen_parameters_get_no_gradient():
    _, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH, requires_grad=True)
    cached_linear_wsl_loss(x, weight, cached, target, temperature=1.0).backward()
    assert x.grad is None
    assert weight.grad is not None
    assert not cached_linear_wsl_loss(
        x, weight.detach(), cached, target, temperature=1.0
    ).requires_grad


def test_autocast_multiplies_in_its_dtype():
    _, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH)
    rounded = [t.bfloat16().float() for t in (x, weight)]
    expected = cached_linear_wsl_loss(*rounded, cached, target, temperature=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = cached_linear_wsl_loss(x, weight, cached, target, temperature=1.0)
        logits = F.linear(x, weight)
        loss = cached_wsl_loss(logits, cached, target, temperature=1.0)
    torch.testing.assert_close(found, expected)
    assert loss.dtype == torch.float32


# --- modes ---


def linear_of(student, cached, target, **options):
    """The logits as hidden states of an identity layer."""
    return cached_linear_wsl_loss(
        student, torch.eye(CLASSES, dtype=student.dtype), cached, target, chunk_size=5, **options
    )


LOSSES = pytest.mark.parametrize("function", [cached_wsl_loss, linear_of])


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_is_the_same(function, dtype, reduction):
    torch._dynamo.reset()
    student, teacher, target = problem(dtype)
    cached = compress(teacher, target, 5, temperature=1.0)
    options = {"temperature": 1.0, "reduction": reduction}
    compiled = torch.compile(function, fullgraph=True)
    expected = step(function, student, cached, target, **options)
    torch.testing.assert_close(step(compiled, student, cached, target, **options), expected)
    shifted = CachedTeacher(*(x.roll(1, 0) for x in cached))
    with pytest.raises(IndexError, match="misaligned"):
        compiled(student, shifted, target, **options)


def test_compiled_conversion_of_logits():
    torch._dynamo.reset()
    _, teacher, target = problem()
    expected = compress(teacher, target, 5, temperature=2.0)
    compiled = torch.compile(compress)
    for a, b in zip(compiled(teacher, target, 5, temperature=2.0), expected):
        torch.testing.assert_close(a, b)


def test_operators_are_what_they_claim_to_be():
    options = (1.0, 2.5, 1.0, 0.0, -100)
    settings = (1.0, 1.0, None, None, 5, None, None)
    tests = "test_schema", "test_faketensor"
    for dtype in (torch.float16, torch.float32, torch.float64):
        student, teacher, target = problem(dtype)
        cached = list(compress(teacher, target, 5, temperature=1.0))
        weight = torch.randn(CLASSES, CLASSES).to(dtype)
        for reduction in ("mean", "none"):
            for wanted in (True, False):
                torch.library.opcheck(
                    torch.ops.weighted_soft_labels.cached_loss.default,
                    (student.requires_grad_(), cached, target, wanted, *options, reduction, False),
                    test_utils=tests,
                )
            tensors = [student, weight], cached, target, None, [True, True, False]
            torch.library.opcheck(
                torch.ops.weighted_soft_labels.cached_linear_loss.default,
                (*tensors, *options, reduction, False, *settings),
                test_utils=tests,
            )


@LOSSES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retained_graph_and_second_derivative(function, reduction):
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    _, expected = step(function, student, cached, target, temperature=1.0, reduction=reduction)
    student.requires_grad_()
    value = function(student, cached, target, temperature=1.0, reduction=reduction).sum()
    for factor in (1.0, 2.0):
        (gradient,) = torch.autograd.grad(factor * value, student, retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"weighted_soft_labels\.reference"):
        gradient.square().sum().backward()


def test_transforms():
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    _, expected = step(cached_wsl_loss, student, cached, target, temperature=1.0)

    def loss(x):
        return cached_wsl_loss(x, cached, target, temperature=1.0)

    torch.testing.assert_close(torch.func.grad(loss)(student), expected)
    with pytest.raises(NotImplementedError, match=r"weighted_soft_labels\.reference"):
        torch.func.vmap(loss)(student.expand(2, -1, -1))
    with pytest.raises(NotImplementedError, match=r"weighted_soft_labels\.reference"):
        torch.func.jvp(loss, (student,), (student,))
    with pytest.raises(NotImplementedError, match=r"weighted_soft_labels\.reference"):
        torch.func.grad(lambda x: linear_of(x, cached, target, temperature=1.0))(student)


@LOSSES
def test_inputs_are_constants_that_may_change_afterwards(function):
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0, dtype=torch.float32)
    copies = [x.clone() for x in (student, *cached, target)]
    for name in ("log_prob", "label_log_prob", "log_rest"):
        getattr(cached, name).requires_grad_()
    expected = step(function, student, cached, target, temperature=1.0)
    assert all(x.grad is None for x in cached)
    assert all(torch.equal(a, b) for a, b in zip(copies, (student, *cached, target)))
    leaf = student.clone().requires_grad_()
    options = {"temperature": 1.0, "reduction": "none"}
    value = function(leaf, cached, target, **options)
    with torch.no_grad():
        for x in (leaf.detach(), *cached, target):
            x.zero_()
    value.sum().backward()
    kept = (copies[-1] != -100).sum()
    if function is cached_wsl_loss:  # the operator for hidden states keeps copies
        torch.testing.assert_close(leaf.grad, expected[1] * kept)


# --- errors ---


def changed(**fields):
    def change(cached):
        return cached._replace(**{name: f(getattr(cached, name)) for name, f in fields.items()})

    return change


def first_row(value):
    def change(x):
        x = x.clone()
        x[0] = value
        return x

    return change


def no_change(x):
    return x


@LOSSES
@pytest.mark.parametrize(
    ("change", "changes", "error", "message"),
    [
        (changed(index=lambda x: x.roll(1, 0)), {}, IndexError, "misaligned cache: column 0 must"),
        (changed(index=lambda x: x.flip(1)), {}, IndexError, "shifted, shuffled or another rank"),
        (changed(index=lambda x: x[:, 1:], log_prob=lambda x: x[:, 1:]), {}, IndexError, "misalig"),
        (changed(index=lambda x: x + 60), {}, IndexError, "another vocabulary, or padding"),
        (changed(index=lambda x: x - 60), {}, IndexError, "must hold classes of the student"),
        (no_change, {"target": torch.full((ROWS,), 50)}, IndexError, "got 50"),
        (changed(index=lambda x: x.short()), {}, TypeError, "int32 or int64, got torch.int16"),
        (changed(log_prob=lambda x: x.long()), {}, TypeError, "cached.log_prob must be float16 or"),
        (changed(label_log_prob=lambda x: x.half()), {}, TypeError, "0.07; store float32"),
        (changed(label_log_prob=lambda x: x.bfloat16()), {}, TypeError, "got torch.bfloat16"),
        (changed(log_rest=lambda x: x.half()), {}, TypeError, "cached.log_rest must be float32"),
        (changed(log_rest=lambda x: x[1:]), {}, ValueError, "pass the cache of these rows"),
        (changed(index=lambda x: x[1:]), {}, ValueError, "cached.index must be (13, 5)"),
        (changed(log_prob=lambda x: x[:, 1:]), {}, ValueError, "cached.log_prob must be (13, 5)"),
        (changed(index=lambda x: x.to("meta")), {}, ValueError, "move the cache with its batch"),
        (changed(index=lambda x: x[:, :0], log_prob=lambda x: x[:, :0]), {}, ValueError, "1 to"),
        (changed(log_rest=lambda x: x + 1), {}, ValueError, "contradict temperature 1.0"),
        (changed(log_prob=first_row(2.0)), {}, ValueError, "contradict temperature 1.0: in row 0"),
        (no_change, {"temperature": 4.0}, ValueError, "contradict temperature 4.0"),
        (changed(label_log_prob=lambda x: x - 1), {}, ValueError, "contradicts column 0"),
        (tuple.__len__, {}, TypeError, "cached must be a CachedTeacher"),
        (no_change, {"target": torch.zeros(ROWS)}, TypeError, "class indices (an integer dtype)"),
        (no_change, {"target": torch.zeros(ROWS, 1).long()}, ValueError, "target must be (13,)"),
        (no_change, {"target": torch.zeros(ROWS, device="meta").long()}, ValueError, "on the"),
        (no_change, {"temperature": 0.0}, ValueError, "temperature must be finite and > 0"),
        (no_change, {"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(function, change, changes, error, message):
    student, teacher, target = problem(scale=1.0)
    arguments = {"target": target, "temperature": 1.0} | changes
    cached = change(compress(teacher, target, 5, temperature=1.0))
    with pytest.raises(error, match=re.escape(message)):
        function(student, cached, **arguments)


def test_a_cache_for_another_temperature_is_noticed():
    student, teacher, target = problem(scale=1.0)
    for made_for in (1.0, 2.0):
        cached = compress(teacher, target, 5, temperature=made_for)
        cached_wsl_loss(student, cached, target, temperature=made_for)
        with pytest.raises(ValueError, match="contradict temperature"):
            cached_wsl_loss(student, cached, target, temperature=3.0 - made_for)
    with pytest.raises(TypeError, match="temperature"):
        cached_wsl_loss(student, cached, target)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be an int in [1, 50] (classes), got 0"),
        ({"k": 51}, ValueError, "got 51"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float16"),
        ({"target": torch.full((ROWS,), 50)}, IndexError, "got 50"),
        ({"target": torch.zeros(3).long()}, ValueError, "target must be (13,) for teacher_logits"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and > 0"),
    ],
)
def test_errors_of_compress(changes, error, message):
    _, teacher, target = problem()
    arguments = {"target": target, "k": 5, "temperature": 1.0} | changes
    with pytest.raises(error, match=re.escape(message)):
        compress(teacher, **arguments)


@LOSSES
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_row_that_is_not_checked_is_nan(function, temperature, monkeypatch):
    """The checks are those of a CPU. A GPU, which does not wait for them, has the NaN."""
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=temperature)
    options = {"temperature": temperature, "reduction": "none"}
    expected = step(function, student, cached, target, **options)
    cached.index[0] = cached.index[0].roll(1)
    cached.index[1, 1] = 10**6
    cached.index[2, 0] = -1
    for check in ("_check_indices", "_check_numbers"):
        monkeypatch.setattr(module, check, lambda *_: None)
    value, gradient = step(function, student, cached, target, **options)
    assert value[:3].isnan().all()
    assert gradient[:3].isnan().all()
    torch.testing.assert_close(value[3:], expected[0][3:])
    torch.testing.assert_close(gradient[3:], expected[1][3:])


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_misaligned_row_is_nan_without_waiting(device):
    student, teacher, target = problem()
    cached = compress(teacher, target, 5, temperature=1.0)
    expected = step(cached_wsl_loss, student, cached, target, temperature=1.0, reduction="none")
    cached = CachedTeacher(*(x.to(device) for x in cached))
    cached.index[0] = cached.index[0].roll(1)
    cached.index[1, 1] = 10**6
    student, target = student.to(device), target.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaf = student.requires_grad_()
        value = cached_wsl_loss(leaf, cached, target, temperature=1.0, reduction="none")
        value.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value[:2].isnan().all()
    assert leaf.grad[:2].isnan().all()
    torch.testing.assert_close(value[2:].cpu(), expected[0][2:])
    torch.testing.assert_close(leaf.grad[2:].cpu(), expected[1][2:])
