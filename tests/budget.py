"""Judging by the reference in float64, with what float32 arithmetic and rounding to the student's dtype may cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy_wsl import wsl_rows
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
    expected, expected_gradient = step(
        reference.wsl_loss, student.double(), teacher.double(), exact, **options
    )
    budget = BUDGET[student.dtype] if teacher.dtype != torch.float64 else BUDGET[torch.float64]
    torch.testing.assert_close(value.double(), expected, rtol=budget, atol=budget, equal_nan=True)
    assert value.dtype == (
        torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    )
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


def assert_exact(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 2.0, **options: Any
) -> None:
    """Every row's loss and every entry of its gradient is within a few roundings of the terms that it is the sum of.

    Judged in long double, as float64 has no digits left where both models are sure. exp(z) of a rounded z is off by |z|
    roundings, as far as it is not 0; what is below the range of float32 may be 0.
    """
    value, gradient = step(
        wsl_loss, student, teacher, target, reduction="none", temperature=temperature, **options
    )
    row = wsl_rows(
        *(x.numpy() for x in (student, teacher, target)), temperature=temperature, **options
    )
    distance = torch.cat([x - x.amax(1, keepdim=True) for x in (student, teacher)], 1).abs()
    widest = sum(z.where(z < 104, 0.0).amax(1).numpy() for z in (distance, distance / temperature))
    rounding = (12 + 4 * widest) * 2.0**-24
    floor = 1e-35 * (
        1
        + options.get("hard_weight", 1.0)
        + options.get("alpha", 2.5) * (temperature + temperature**2)
    )
    for name, found, exact, size in (
        ("loss", value.numpy()[:, None], row.loss[:, None], row.loss_size[:, None]),
        ("gradient", gradient.numpy(), row.gradient, row.gradient_size),
    ):
        excess = abs(found - exact) - (rounding[:, None] * size + floor)
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        assert excess[worst] <= 0, (
            f"{name} of row {worst[0]}, class {worst[1]}: {found[worst]} for {exact[worst]}, of terms of size "
            f"{size[worst]}; {temperature=}, {options}, student={student[worst[0]]}, teacher={teacher[worst[0]]}, "
            f"target={target[worst[0]]}"
        )
