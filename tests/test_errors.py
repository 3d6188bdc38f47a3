"""Every error of the contract: its type, and a message that says what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch

from weighted_soft_labels import WSLLoss, wsl_loss
from weighted_soft_labels.analysis import wsl_terms

LOGITS, TARGET = torch.zeros(8, 10), torch.zeros(8, dtype=torch.long)
PIXELS = torch.zeros(2, 3, 4)

INPUTS = [
    ((LOGITS, torch.zeros(8, 100), TARGET), ValueError, "must have the same shape, got (8, 10) and (8, 100)"),
    ((LOGITS, LOGITS, TARGET[:4]), ValueError, "(8,) for logits of (8, 10), got (4,)"),
    ((LOGITS, LOGITS, TARGET[:, None]), ValueError, "(8,) for logits of (8, 10), got (8, 1)"),
    ((LOGITS, LOGITS, torch.zeros(8)), ValueError, "(8, 10) for logits of (8, 10), got (8,)"),
    ((PIXELS, PIXELS, torch.zeros(2, 3).long()), ValueError, "(2, 4) for logits of (2, 3, 4), got (2, 3)"),
    ((torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0)), ValueError, "got a scalar"),
    ((torch.zeros(8, 0), torch.zeros(8, 0), TARGET), ValueError, "at least one class, got shape (8, 0)"),
    ((LOGITS, LOGITS.to("meta"), TARGET), ValueError, "same device, got cpu, meta and cpu"),
    ((LOGITS, LOGITS, TARGET.to("meta")), ValueError, "same device, got cpu, cpu and meta"),
    ((LOGITS.long(), LOGITS, TARGET), TypeError, "student_logits must be float16, bfloat16, float32 or float64, got"),
    ((LOGITS, LOGITS.to(torch.complex64), TARGET), TypeError, "teacher_logits must be float16"),
    ((LOGITS, LOGITS, TARGET.bool()), TypeError, "got torch.bool"),
    ((LOGITS, LOGITS, TARGET.to(torch.complex64)), TypeError, "got torch.complex64"),
    (([[0.0]], LOGITS, TARGET), TypeError, "student_logits must be a Tensor, got list"),
    ((LOGITS, None, TARGET), TypeError, "teacher_logits must be a Tensor, got NoneType"),
    ((LOGITS, LOGITS, 3), TypeError, "target must be a Tensor, got int"),
    ((LOGITS, LOGITS, TARGET + 10), IndexError, "class indices in [0, 10) or ignore_index (-100), got 10"),
    ((LOGITS, LOGITS, TARGET - 1), IndexError, "class indices in [0, 10) or ignore_index (-100), got -1"),
    ((LOGITS[0], LOGITS[0], torch.tensor(10)), IndexError, "got 10"),
]  # fmt: skip


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
