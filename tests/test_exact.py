"""Digits, judged in long double by the size of the terms: where student, teacher and label are sure, agree, or tie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import assert_exact, step

from weighted_soft_labels import _eager, loss, wsl_loss

NATIVE = loss.implementation(torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.fixture(
    autouse=True,
    params=dict.fromkeys([_eager, NATIVE]),
    ids=lambda module: module.__name__.split(".")[-1],
)
def implementation(request, monkeypatch):
    monkeypatch.setattr(loss, "implementation", lambda student, teacher: request.param)


def extreme_rows(rng, rows=16):
    """Margins from 1e-3 to 1e4 for classes that are the label's or not, cross-entropies down to 1e-12, ties, masks."""
    classes = int(rng.choice([1, 2, 3, 10, 37, 1000]))
    student, teacher = rng.normal(size=(2, rows, classes)) * rng.choice(
        [0.0, 0.1, 3.0], (2, rows, 1)
    )
    target, ahead = rng.integers(0, classes, (2, rows))
    every = np.arange(rows)
    ahead = np.where(
        rng.random(rows) < 0.6, target, ahead
    )  # as often as not both models are sure of the label
    student[every, ahead] += 10 ** rng.uniform(-3, rng.choice([1, 1.7, 4]), rows)
    behind = np.where(rng.random(rows) < 0.8, ahead, rng.integers(0, classes, rows))
    teacher[every, behind] += 10 ** rng.uniform(-3, rng.choice([1, 1.7, 4]), rows)
    if rng.random() < 0.3:
        student, teacher = student.round(), teacher.round()  # ties
    if rng.random() < 0.3:
        masked = rng.random((rows, classes)) < 0.3
        masked[every, target] = False
        teacher[masked] = student[masked] = -np.inf
    if rng.random() < 0.2:
        student = teacher.copy()
    options = {
        "temperature": float(
            rng.choice([1.0, 2.0, 4.0, 10 ** rng.uniform(np.log10(0.05), np.log10(50))])
        ),
        "alpha": float(rng.choice([0.0, 2.5, 10 ** rng.uniform(-2, 3)])),
        "hard_weight": float(rng.choice([0.0, 1.0, 0.1])),
        "label_smoothing": float(rng.choice([0.0, 0.0, 0.1]))
        if np.isfinite(student).all()
        else 0.0,
    }
    return (
        [torch.from_numpy(x).float() for x in (student, teacher)],
        torch.from_numpy(target),
        options,
    )


@pytest.mark.parametrize("seed", range(150))
def test_random_rows_of_every_margin(seed):
    rng = np.random.default_rng(seed)
    logits, target, options = extreme_rows(rng)
    assert_exact(*logits, target, **options)
    one_hot = F.one_hot(target, logits[0].shape[1]).float()
    assert_exact(*logits, one_hot, **options)
    if logits[0].isfinite().all():
        assert_exact(*logits, 0.9 * one_hot + 0.1 / one_hot.shape[1], **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_term_of_a_sure_student(temperature):
    """At margin 20 and T = 1: 8.03e-8, where log(1 + 2e-9 * 9) in float32 is 0."""
    student, teacher = torch.zeros(2, 1, 10).unbind(0)
    student[:, 0], teacher[:, 0] = 20.0, 21.0
    assert_exact(student, teacher, torch.tensor([0]), temperature=temperature, hard_weight=0.0)


@pytest.mark.parametrize("margin", [20.0, 25.0, 60.0])
@pytest.mark.parametrize("leader", [0, 3])
def test_agreement_of_sure_models_on_the_label_or_on_another_class(margin, leader):
    student, teacher = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0)).unbind(0)
    student[:, leader] += margin
    teacher[:, leader] += margin + 1
    for options in (
        {"hard_weight": 0.0},
        {"alpha": 49.0},
        {"hard_weight": 0.0, "alpha": 1000.0, "temperature": 1.0},
    ):
        assert_exact(student, teacher, torch.zeros(8, dtype=torch.long), **options)


def test_student_that_equals_its_teacher_has_no_soft_gradient():
    student = 5 * torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 2.0, 3.3):
        options = {"hard_weight": 0.0, "temperature": temperature}
        assert step(wsl_loss, student, student, torch.arange(64) % 33, **options)[1].eq(0).all()


def test_maximum_of_plus_infinity_is_nan_in_its_row_alone():
    student, teacher, target = torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 1, 2])
    student[1, 2] = teacher[2, 2] = torch.inf
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="none")
    assert loss.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, True, True]


def test_one_row_far_behind_costs_itself_only():
    """Neither the digits of its neighbours nor their time: every row takes the same path."""
    student, teacher = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0)).unbind(0)
    target = torch.arange(6)
    expected = step(wsl_loss, student, teacher, target, reduction="none")
    student[2, 40] += 1e4
    found = step(wsl_loss, student, teacher, target, reduction="none")
    others = torch.tensor([0, 1, 3, 4, 5])
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours[others], theirs[others])
