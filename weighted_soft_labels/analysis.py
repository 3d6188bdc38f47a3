"""What the paper measures, for logging, plotting and reuse. Nothing here carries a graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weighted_soft_labels.loss import Options, check_options, check_tensors, implementation

__all__ = ["WSLTerms", "wsl_terms"]


class WSLTerms(NamedTuple):
    """The parts of the loss of every element; see :func:`wsl_terms`."""

    student_ce: Tensor
    teacher_ce: Tensor
    weight: Tensor
    soft: Tensor


@torch.no_grad()
def wsl_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 2.0,
    ignore_index: int = -100,
) -> WSLTerms:
    r"""The parts of the WSL loss of every element, as :func:`weighted_soft_labels.wsl_loss` computes them.

    ``weight = 1 - exp(-student_ce / (teacher_ce + 1e-7))`` and
    ``soft = -sum_c softmax(t / T)_c * log_softmax(s / T)_c``, so that the loss without label smoothing is
    ``hard_weight * student_ce + alpha * T^2 * weight * soft``.

    Args:
        student_logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float16, bfloat16, float32 or float64.
        teacher_logits: Same shape and device; the dtype may differ.
        target: Class indices shaped like the logits without the class dimension, or class probabilities shaped like
            the logits.
        temperature: T > 0 of `soft`; the cross-entropies and the weight are at temperature 1 whatever it is.
        ignore_index: Elements with this index target are 0 in all four.

    Returns:
        ``WSLTerms(student_ce, teacher_ce, weight, soft)``, each float32 and shaped like an index target:
        cross-entropies in nats, >= 0; the weight in [0, 1]; the soft term in nats, >= 0.

    Raises:
        TypeError, ValueError, IndexError: As :func:`weighted_soft_labels.wsl_loss`.

    Source:
        Zhou et al., ICLR 2021, and its official code, which computes the weight at temperature 1.

    Example:
        >>> import torch
        >>> from weighted_soft_labels.analysis import wsl_terms
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> terms = wsl_terms(logits, logits, torch.tensor([0, 0]))
        >>> terms.weight  # a student that equals its teacher: 1 - 1/e
        tensor([0.6321, 0.6321])
    """
    options = Options(temperature=temperature, ignore_index=ignore_index)
    check_options(options)
    check_tensors(student_logits, teacher_logits, target)
    terms = implementation(student_logits, teacher_logits).terms(student_logits, teacher_logits, target, options)
    return WSLTerms(*(term.float() for term in terms))
