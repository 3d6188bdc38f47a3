"""The paper's loss once more, in NumPy and long double: one row at a time, no shared code with anything.

With the size of the terms that loss and gradient are sums of, which is what a rounding error is to be compared with. A
probability of more than half is counted from 1, so that sure models have small terms there.
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
    leader: Array  # 1 at the class that has more than half, 0 elsewhere
    less: Array  # softmax - leader
    log_sum: Array  # log of the sum of exp(z)


def softmax(x: Array, temperature: float) -> Softmax:
    z = (x - x.max()) / np.longdouble(temperature)
    first = np.arange(len(x)) == np.argmax(x)
    rest = np.exp(z)[~first].sum()
    leader = (first & (rest < 1)).astype(z.dtype)
    return Softmax(z, leader, np.where(leader == 1, -rest, np.exp(z)) / (1 + rest), np.log1p(rest))


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
    s, t, q = (x.astype(np.longdouble) for x in (s, t, q))
    student, teacher = softmax(s, 1), softmax(t, 1)
    soft_student, soft_teacher = softmax(s, temperature), softmax(t, temperature)
    student_ce, teacher_ce = (q.sum() * x.log_sum - expectation(q, x.z) for x in (student, teacher))
    weight = -np.expm1(-student_ce / (teacher_ce + np.longdouble("1e-7")))
    soft = soft_student.log_sum - expectation(
        soft_teacher.less + soft_teacher.leader, soft_student.z
    )
    smoothed = (1 - np.longdouble(label_smoothing)) * q + np.longdouble(label_smoothing) / len(q)
    hard = smoothed.sum() * student.log_sum - expectation(smoothed, student.z)
    left = smoothed.sum() * student.leader - smoothed
    soft_scale = alpha * temperature * weight
    loss = hard_weight * hard + temperature * soft_scale * soft
    return Row(
        loss,
        hard_weight * (smoothed.sum() * student.less + left)
        + soft_scale
        * (soft_student.less - soft_teacher.less + (soft_student.leader - soft_teacher.leader)),
        loss,  # a sum of terms that are all >= 0
        hard_weight
        * (
            smoothed.sum() * (abs(student.less) + (left != 0) * student.leader)
            + (left != 0) * smoothed
        )
        + soft_scale
        * (
            abs(soft_student.less)
            + abs(soft_teacher.less)
            + (soft_student.leader != soft_teacher.leader)
        ),
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
    """Of every row of (N, C) logits and targets of indices (N,) or probabilities (N, C), stacked."""
    q = np.eye(student.shape[1])[target] if target.ndim == 1 else target
    options = (temperature, alpha, hard_weight, label_smoothing)
    return Row(
        *(
            np.stack(part)
            for part in zip(*(wsl_row(*row, *options) for row in zip(student, teacher, q)))
        )
    )
