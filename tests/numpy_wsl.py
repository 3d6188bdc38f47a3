"""The paper's loss in NumPy and long double, row by row. Shares no code with the package.

Loss and gradient are sums of terms, and a rounding error is to be compared with the size of these
terms. So this file returns the sizes, too. A probability above one half is written as 1 minus the
sum of the others, so that confident models have small terms.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Row(NamedTuple):
    loss: Array
    gradient: Array  # (C,)
    loss_size: Array
    gradient_size: Array  # (C,)


class Softmax(NamedTuple):
    z: Array  # (x - max) / T
    top: Array  # 1 at the class that has more than half, else 0
    difference: Array  # softmax - top
    log_sum: Array  # log of the sum of exp(z)


def softmax(x: Array, temperature: float) -> Softmax:
    z = (x - x.max()) / np.longdouble(temperature)
    first = np.arange(len(x)) == np.argmax(x)
    others = np.exp(z)[~first].sum()
    top = (first & (others < 1)).astype(z.dtype)
    difference = np.where(top == 1, -others, np.exp(z)) / (1 + others)
    return Softmax(z, top, difference, np.log1p(others))


def expectation(mass: Array, z: Array) -> Array:
    return (mass[mass > 0] * z[mass > 0]).sum()


def wsl_row(
    s: Array,
    t: Array,
    q: Array,
    temperature: float,
    alpha: float,
    hard_weight: float,
    label_smoothing: float,
) -> Row:
    """Loss and gradient of one row with class probabilities q, from the closed form."""
    s, t, q = s.astype(np.longdouble), t.astype(np.longdouble), q.astype(np.longdouble)
    student, teacher = softmax(s, 1), softmax(t, 1)
    soft_student, soft_teacher = softmax(s, temperature), softmax(t, temperature)
    student_ce = q.sum() * student.log_sum - expectation(q, student.z)
    teacher_ce = q.sum() * teacher.log_sum - expectation(q, teacher.z)
    weight = -np.expm1(-student_ce / (teacher_ce + np.longdouble("1e-7")))
    teacher_p = soft_teacher.difference + soft_teacher.top
    soft = soft_student.log_sum - expectation(teacher_p, soft_student.z)

    smoothing = np.longdouble(label_smoothing)
    smoothed = (1 - smoothing) * q + smoothing / len(q)
    mass = smoothed.sum()
    hard = mass * student.log_sum - expectation(smoothed, student.z)
    loss = hard_weight * hard + alpha * temperature**2 * weight * soft

    # What the differences leave: 0 where student and label, or student and teacher, agree.
    hard_other = mass * student.top - smoothed
    soft_other = soft_student.top - soft_teacher.top
    hard_gradient = mass * student.difference + hard_other
    soft_gradient = soft_student.difference - soft_teacher.difference + soft_other
    hard_size = mass * abs(student.difference)
    hard_size += (hard_other != 0) * (mass * student.top + smoothed)
    soft_size = abs(soft_student.difference) + abs(soft_teacher.difference) + abs(soft_other)

    soft_scale = alpha * temperature * weight
    return Row(
        loss,
        hard_weight * hard_gradient + soft_scale * soft_gradient,
        loss,  # a sum of terms that are all >= 0
        hard_weight * hard_size + soft_scale * soft_size,
    )


def wsl_rows(
    student: Array,
    teacher: Array,
    target: Array,
    temperature: float = 2.0,
    alpha: float = 2.5,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Row:
    """Stack the rows of (N, C) logits with a target of indices (N,) or probabilities (N, C)."""
    q = np.eye(student.shape[1])[target] if target.ndim == 1 else target
    options = (temperature, alpha, hard_weight, label_smoothing)
    rows = [wsl_row(s, t, p, *options) for s, t, p in zip(student, teacher, q)]
    return Row(*(np.stack(part) for part in zip(*rows)))
