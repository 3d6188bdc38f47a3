"""The paper's equations in differentiable PyTorch, one per line: for proof, not for speed.

The optimized loss shares no code with this module. The computation is in the dtype of the student's
logits: pass float64 to judge other code. It takes about ten times the memory of `wsl_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wsl_loss"]


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
    balance: bool = False,
) -> Tensor:
    """Weighted Soft Labels loss, transcribed equation by equation.

    The same loss as :func:`weighted_soft_labels.wsl_loss`, without its checks. This form supports
    second derivatives (``create_graph=True``), ``torch.func.vmap`` and forward-mode AD.

    Args:
        As :func:`weighted_soft_labels.wsl_loss`. The teacher's logits and class probabilities are
        converted to the dtype of the student's logits.

    Returns:
        A scalar, or for reduction "none" a tensor shaped like an index target, in that dtype.

    Source:
        Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
        Perspective", ICLR 2021, and its official code. Differences from that code: any shape and
        kind of target; a term with scale 0 is omitted, so that 0 never meets inf; the loss is inf
        if the student rules out a class that the teacher does not, even if the weight is 0.

    Example:
        >>> import torch
        >>> from weighted_soft_labels import reference
        >>> student_logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
        >>> teacher_logits = torch.tensor([[3.0, 0.0, -1.0]], dtype=torch.float64)
        >>> print(f"{reference.wsl_loss(student_logits, teacher_logits, torch.tensor([0])):.4f}")
        9.0101
    """
    dim = min(1, student_logits.dim() - 1)
    dtype, classes = student_logits.dtype, student_logits.shape[dim]
    teacher_logits = teacher_logits.detach().to(dtype)

    if target.is_floating_point():
        counted = torch.ones_like(student_logits.select(dim, 0), dtype=torch.bool)
        q = target.detach().to(dtype)
    else:
        counted = target.long() != ignore_index
        label = target.long().where(counted, 0)
        one_hot = label.unsqueeze(-1) == torch.arange(classes, device=target.device)
        q = one_hot.movedim(-1, dim).to(dtype)
    student_logits = student_logits.where(counted.unsqueeze(dim), 0)
    teacher_logits = teacher_logits.where(counted.unsqueeze(dim), 0)

    log_p_student = _log_softmax(student_logits, dim)
    log_p_teacher = _log_softmax(teacher_logits, dim)
    log_soft_student = _log_softmax(student_logits / temperature, dim)
    soft_teacher = (teacher_logits / temperature).softmax(dim)
    smoothed_q = q * (1 - label_smoothing) + label_smoothing / classes

    student_ce = -_expectation(q, log_p_student, dim).detach()
    teacher_ce = -_expectation(q, log_p_teacher, dim)
    weight = -torch.expm1(-student_ce / (teacher_ce + 1e-7))
    weight = weight.masked_fill(student_ce.isposinf(), 1)  # inf / inf is NaN
    if balance:
        mean = weight.where(counted, 0).nansum() / counted.sum().clamp(min=1)
        weight = weight / mean.clamp(min=10 * torch.finfo(dtype).tiny)  # weights of 0 stay 0
    soft = -_expectation(soft_teacher, log_soft_student, dim)
    weighted = (weight * soft).masked_fill((weight == 0) & soft.isposinf(), torch.inf)  # 0 * inf
    hard = -_expectation(smoothed_q, log_p_student, dim)

    loss = torch.zeros_like(hard)
    if hard_weight:
        loss = loss + hard_weight * hard
    if alpha:
        loss = loss + alpha * temperature**2 * weighted
    loss = loss.where(counted, 0)
    if reduction == "mean":
        return loss.sum() / counted.sum()
    return loss.sum() if reduction == "sum" else loss


def _log_softmax(x: Tensor, dim: int) -> Tensor:
    """Return the logarithm of the softmax, with all digits of a probability near 1.

    The top class is left out of the sum of exponentials: its logarithm is -log1p(sum).
    """
    top = x.argmax(dim, keepdim=True)
    z = x - x.gather(dim, top)
    return z - z.exp().scatter(dim, top, 0.0).sum(dim, keepdim=True).log1p()


def _expectation(probability: Tensor, value: Tensor, dim: int) -> Tensor:
    """Return ``sum_c probability_c * value_c``, in which 0 * inf is 0."""
    return torch.where(probability == 0, 0.0, probability * value).sum(dim)
