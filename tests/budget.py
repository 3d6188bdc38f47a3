"""Compare the loss with the reference in float64, within an error budget.

The budget allows for float32 arithmetic and for rounding to the student's dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy_wsl import wsl_rows
from torch import Tensor

from weighted_soft_labels import reference, wsl_loss
from weighted_soft_labels.analysis import WSLTerms, wsl_terms
from weighted_soft_labels.backends import use_backend

# Relative error of a float32 result: a few roundings of numbers as large as the result itself.
BUDGET = {torch.float16: 2e-6, torch.bfloat16: 2e-6, torch.float32: 2e-6, torch.float64: 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, device="cpu")
    return numbers.to(torch.empty(0).device)


def step(
    loss: Any, student: Tensor, *others: Tensor, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient for an upstream gradient, which is 1 by default."""
    student = student.detach().requires_grad_()
    value = loss(student, *others, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value))
    assert student.grad is not None
    return value.detach(), student.grad


def exact_step(
    student: Tensor, teacher: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of the reference in float64."""
    target = target.double() if target.is_floating_point() else target.long()
    return step(reference.wsl_loss, student.double(), teacher.double(), target, **options)


def exact_terms(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> WSLTerms:
    """Return the terms of the loss, computed in float64 and rounded to float32."""
    with use_backend("eager"):
        return wsl_terms(student.double(), teacher.double(), target, **options)


def assert_as_reference(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> None:
    """Compare loss and gradient with those of the reference in float64 on the same numbers."""
    value, gradient = step(wsl_loss, student, teacher, target, **options)
    expected, expected_gradient = exact_step(student, teacher, target, **options)
    wide = torch.float64 in (student.dtype, teacher.dtype)
    budget = BUDGET[torch.float64 if wide else student.dtype]
    torch.testing.assert_close(value.double(), expected, rtol=budget, atol=budget, equal_nan=True)
    assert value.dtype == (torch.float64 if wide else torch.float32)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    # A gradient is a difference of probabilities. So its error is relative to the largest entry of
    # its tensor, and rounding to the student's dtype comes on top.
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
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 2.0,
    **options: Any,
) -> None:
    """Compare each row's loss and gradient with NumPy's, by the size of the terms they sum up.

    NumPy computes in long double, because float64 has no digits left where both models are
    confident. exp(z) of a rounded z is off by |z| roundings, unless exp(z) is 0. Numbers below the
    range of float32 may be 0.
    """
    options["temperature"] = temperature
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="none", **options)
    student, teacher, target = student.cpu(), teacher.cpu(), target.cpu()
    row = wsl_rows(student.numpy(), teacher.numpy(), target.numpy(), **options)
    rounding = _rounding(student, teacher, temperature)
    floor = 1e-35 * (
        1
        + options.get("hard_weight", 1.0)
        + options.get("alpha", 2.5) * (temperature + temperature**2)
    )
    loss_error = abs(loss.cpu().numpy() - row.loss)
    gradient_error = abs(gradient.cpu().numpy() - row.gradient)
    for name, error, size in (
        ("loss", loss_error[:, None], row.loss_size[:, None]),
        ("gradient", gradient_error, row.gradient_size),
    ):
        excess = error - (rounding[:, None] * size + floor)
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        n = worst[0]
        assert excess[worst] <= 0, (
            f"{name} of row {n}, class {worst[1]} is off by {error[worst]}, of terms of size "
            f"{size[worst]}; {options}, student={student[n]}, teacher={teacher[n]}, "
            f"target={target[n]}"
        )


def _rounding(student: Tensor, teacher: Tensor, temperature: float) -> np.ndarray:
    """Return the relative error that each row may have."""
    z = torch.cat([x - x.amax(1, keepdim=True) for x in (student, teacher)], 1).abs()
    widest = torch.zeros(len(z))
    for distance in (z, z / temperature):
        widest += distance.where(distance < 104, 0.0).amax(1)
    return (12 + 4 * widest.numpy()) * 2.0**-24
