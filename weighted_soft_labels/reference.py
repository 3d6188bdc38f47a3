"""The paper in plain differentiable PyTorch: one line an equation, for proof rather than speed.

Shares no code with the optimized loss that it judges. Differentiable any number of times, works in the
dtype that it is given (use float64 to judge others), and needs about ten times the memory of ``wsl_loss``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wsl_loss"]


def _expectation(probability: Tensor, value: Tensor, dim: int) -> Tensor:
    """``sum_c probability_c * value_c``, where a class without probability counts 0 even if its value is infinite."""
    return torch.where(probability == 0, 0.0, probability * value).sum(dim)


def wsl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 2.5,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The Weighted Soft Labels loss, transcribed equation by equation.

    Same meaning, arguments and shapes as :func:`weighted_soft_labels.wsl_loss`, without its input checks.
    Unlike it, this function supports double backward (``create_graph=True``) and ``torch.func.vmap``.

    Args:
        student_logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating point.
        teacher_logits: Same shape; converted to the dtype of the student.
        target: Class indices (the logits' shape without the class dimension) or class probabilities
            (the logits' shape).
        temperature: Softmax temperature of the soft term, > 0.
        alpha: Scale of the soft term, >= 0.
        hard_weight: Scale of the hard term, >= 0.
        label_smoothing: Of the hard term alone, in [0, 1].
        ignore_index: Index targets with this value take no part.
        reduction: ``"mean"`` (over the elements that are not ignored), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor shaped like an index target, in the student's dtype.

    Source:
        Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
        Perspective", ICLR 2021, and its official code. Differences from that code: any shape and target
        kind; a term whose scale is 0 is left out (so 0 never meets inf); an element on which the student
        gives no chance to a class that has teacher mass costs +inf whatever its weight.
    """
    dim = 0 if student_logits.dim() == 1 else 1
    classes = student_logits.shape[dim]
    teacher_logits = teacher_logits.detach().to(student_logits.dtype)

    if target.is_floating_point():
        kept = torch.ones_like(student_logits.select(dim, 0), dtype=torch.bool)
        label = target.detach().to(student_logits.dtype)
    else:
        kept = target.long() != ignore_index
        index = torch.arange(classes, device=target.device).view(
            -1, *[1] * (student_logits.dim() - dim - 1)
        )
        label = (target.long().where(kept, 0).unsqueeze(dim) == index).to(student_logits.dtype)
    student_logits = student_logits.where(kept.unsqueeze(dim), 0)
    teacher_logits = teacher_logits.where(kept.unsqueeze(dim), 0)

    log_p_student = student_logits.log_softmax(dim)
    log_p_teacher = teacher_logits.log_softmax(dim)
    log_soft_student = (student_logits / temperature).log_softmax(dim)
    soft_teacher = (teacher_logits / temperature).softmax(dim)
    smoothed = label * (1 - label_smoothing) + label_smoothing / classes

    student_ce = -_expectation(label, log_p_student, dim).detach()
    teacher_ce = -_expectation(label, log_p_teacher, dim)
    weight = torch.where(
        student_ce.isposinf(), 1.0, -torch.expm1(-student_ce / (teacher_ce + 1e-7))
    )
    soft = -_expectation(soft_teacher, log_soft_student, dim)
    hard = -_expectation(smoothed, log_p_student, dim)

    loss = torch.zeros_like(hard)
    if hard_weight:
        loss = loss + hard_weight * hard
    if alpha:
        loss = loss + alpha * temperature**2 * torch.where(
            (weight == 0) & soft.isposinf(), torch.inf, weight * soft
        )
    loss = loss.where(kept, 0)
    if reduction == "mean":
        return loss.sum() / kept.sum()
    return loss.sum() if reduction == "sum" else loss
