"""The paper's loss once more, in NumPy and float64: one row at a time, plain sums, no shared code with anything."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def wsl_row(
    s: Array, t: Array, q: Array, temperature: float, alpha: float, hard_weight: float, label_smoothing: float
) -> tuple[float, Array]:
    """Loss and gradient of one row with class probabilities q, from the closed form on the contract's page."""
    student_ce = -(q * log_softmax(s)).sum()
    teacher_ce = -(q * log_softmax(t)).sum()
    weight = 1 - np.exp(-student_ce / (teacher_ce + 1e-7))
    p_student, p_teacher = np.exp(log_softmax(s / temperature)), np.exp(log_softmax(t / temperature))
    soft = -(p_teacher * log_softmax(s / temperature)).sum()
    smoothed = (1 - label_smoothing) * q + label_smoothing / len(q)
    hard = -(smoothed * log_softmax(s)).sum()
    loss = hard_weight * hard + alpha * temperature**2 * weight * soft
    gradient = hard_weight * (smoothed.sum() * np.exp(log_softmax(s)) - smoothed)
    return loss, gradient + alpha * temperature * weight * (p_student - p_teacher)


def wsl(
    student: Array,
    teacher: Array,
    target: Array,
    temperature: float = 2.0,
    alpha: float = 2.5,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[float, Array]:
    """Mean loss and its gradient for (N, C) logits and targets of indices (N,) or probabilities (N, C)."""
    q = np.eye(student.shape[1])[target] if target.ndim == 1 else target
    rows = [
        wsl_row(s, t, p, temperature, alpha, hard_weight, label_smoothing)
        for s, t, p in zip(student.astype(np.float64), teacher.astype(np.float64), q.astype(np.float64), strict=True)
    ]
    return float(np.mean([loss for loss, _ in rows])), np.stack([gradient for _, gradient in rows]) / len(rows)
