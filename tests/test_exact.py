"""Digits of loss and gradient, judged in long double by the size of the terms that they sum up.

The rows here are those where digits are lost easily: both models confident, in agreement, or tied.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import assert_exact, randn, step

from weighted_soft_labels import wsl_loss

pytestmark = pytest.mark.usefixtures("backend")


def extreme_rows(rng, label_is_top, rows=16):
    """Logits with margins from 1e-3 to 1e4, cross-entropies down to 1e-12, ties and masks.

    With `label_is_top`, both models are confident in the label, else in any class.
    """
    classes = int(rng.choice([1, 2, 3, 10, 37, 1000]))
    scale = rng.choice([0.0, 0.1, 3.0], (2, rows, 1))
    student, teacher = rng.normal(size=(2, rows, classes)) * scale
    target, student_top = rng.integers(0, classes, (2, rows))
    every = np.arange(rows)
    # In more than half of the rows, both models are confident in the label.
    student_top = np.where((rng.random(rows) < 0.6) | label_is_top, target, student_top)
    student[every, student_top] += 10 ** rng.uniform(-3, rng.choice([1, 1.7, 4]), rows)
    teacher_top = np.where(rng.random(rows) < 0.8, student_top, rng.integers(0, classes, rows))
    teacher_top = np.where(label_is_top, target, teacher_top)
    teacher[every, teacher_top] += 10 ** rng.uniform(-3, rng.choice([1, 1.7, 4]), rows)
    if rng.random() < 0.3:
        student, teacher = student.round(), teacher.round()  # ties
    if rng.random() < 0.3:
        masked = rng.random((rows, classes)) < 0.3
        masked[every, target] = False
        teacher[masked] = student[masked] = -np.inf
    if rng.random() < 0.2:
        student = teacher.copy()
    return torch.from_numpy(student).float(), torch.from_numpy(teacher).float(), target


def extreme_options(rng):
    any_temperature = 10 ** rng.uniform(np.log10(0.05), np.log10(50))
    return {
        "temperature": float(rng.choice([1.0, 2.0, 4.0, any_temperature])),
        "alpha": float(rng.choice([0.0, 2.5, 10 ** rng.uniform(-2, 3)])),
        "hard_weight": float(rng.choice([0.0, 1.0, 0.1])),
        "label_smoothing": float(rng.choice([0.0, 0.0, 0.1])),
    }


@pytest.mark.parametrize("block", range(10))
def test_random_rows_of_every_margin(block, backend):
    """The Triton kernels promise all digits where both models are confident in the label."""
    device = torch.empty(0).device
    for seed in range(block, 20 if backend == "triton" else 150, 10):
        rng = np.random.default_rng(seed)
        student, teacher, target = extreme_rows(rng, label_is_top=backend == "triton")
        options = extreme_options(rng)
        finite = student.isfinite().all()
        if not finite:
            options["label_smoothing"] = 0.0
        target = torch.from_numpy(target)
        one_hot = F.one_hot(target, student.shape[1]).float()
        targets = [target, one_hot]
        if finite:
            targets.append(0.9 * one_hot + 0.1 / one_hot.shape[1])
        for each in targets:
            assert_exact(*(x.to(device) for x in (student, teacher, each)), **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_term_of_a_confident_student(temperature):
    """At margin 20 and T = 1: 8.03e-8, where log(1 + 2e-9 * 9) in float32 is 0."""
    student, teacher = torch.zeros(2, 1, 10).unbind(0)
    student[:, 0], teacher[:, 0] = 20.0, 21.0
    assert_exact(student, teacher, torch.tensor([0]), temperature=temperature, hard_weight=0.0)


@pytest.mark.parametrize("margin", [20.0, 25.0, 60.0])
@pytest.mark.parametrize("top", [0, 3])
def test_confident_models_agree_on_the_label_or_on_another_class(margin, top, backend):
    if backend == "triton" and top:
        pytest.skip("the Triton kernels promise all digits for confidence in the label alone")
    student, teacher = randn(2, 8, 10).unbind(0)
    student[:, top] += margin
    teacher[:, top] += margin + 1
    for options in (
        {"hard_weight": 0.0},
        {"alpha": 49.0},
        {"hard_weight": 0.0, "alpha": 1000.0, "temperature": 1.0},
    ):
        assert_exact(student, teacher, torch.zeros(8, dtype=torch.long), **options)


def test_student_that_equals_its_teacher_has_no_soft_gradient():
    student = 5 * randn(64, 33)
    target = torch.arange(64) % 33
    for temperature in (1.0, 2.0, 3.3):
        options = {"hard_weight": 0.0, "temperature": temperature}
        _, gradient = step(wsl_loss, student, student, target, **options)
        assert gradient.eq(0).all()


def test_maximum_of_plus_infinity_is_nan_in_its_row_alone():
    student, teacher, target = torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 1, 2])
    student[1, 2] = teacher[2, 2] = torch.inf
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
    assert gradient.isnan().any(1).tolist() == [False, True, True]


def test_one_row_of_huge_logits_changes_no_bit_of_its_neighbours():
    student, teacher = randn(2, 6, 50).unbind(0)
    target = torch.arange(6)
    expected, expected_gradient = step(wsl_loss, student, teacher, target, reduction="none")
    student[2, 40] += 1e4
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="none")
    neighbours = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(loss[neighbours], expected[neighbours])
    assert torch.equal(gradient[neighbours], expected_gradient[neighbours])
