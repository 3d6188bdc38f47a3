"""Judging by the reference in float64, with what float32 arithmetic and rounding to the student's dtype may cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weighted_soft_labels import reference, wsl_loss

# Relative error of a float32 result: a handful of roundings of numbers of the size of the result itself.
BUDGET = {torch.float16: 2e-6, torch.bfloat16: 2e-6, torch.float32: 2e-6, torch.float64: 1e-12}


def step(
    loss: Any, student: Tensor, *others: Tensor, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient for an incoming gradient of `upstream` (default 1)."""
    student = student.detach().requires_grad_()
    value = loss(student, *others, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value))
    assert student.grad is not None
    return value.detach(), student.grad


def assert_as_reference(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> None:
    """Loss and gradient of `wsl_loss` against the reference in float64 on the same numbers."""
    value, gradient = step(wsl_loss, student, teacher, target, **options)
    exact = target.double() if target.is_floating_point() else target
    expected, expected_gradient = step(reference.wsl_loss, student.double(), teacher.double(), exact, **options)
    budget = BUDGET[student.dtype] if teacher.dtype != torch.float64 else BUDGET[torch.float64]
    torch.testing.assert_close(value.double(), expected, rtol=budget, atol=budget, equal_nan=True)
    assert value.dtype == (torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    # A gradient is a difference of probabilities: its error is relative to the largest of its tensor, and rounding to
    # the student's dtype comes on top.
    finite = expected_gradient[expected_gradient.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    rounding = torch.finfo(student.dtype)
    torch.testing.assert_close(
        gradient.double(),
        expected_gradient,
        rtol=rounding.eps,
        atol=budget * largest + (rounding.smallest_normal * rounding.eps),
        equal_nan=True,
    )
