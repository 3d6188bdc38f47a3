"""The public loss: one function and one module. `_operator` computes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weighted_soft_labels._operator import distill
from weighted_soft_labels._options import Options, check_options, check_tensors

__all__ = ["WSLLoss", "wsl_loss"]


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
    r"""Weighted Soft Labels distillation loss: hard cross-entropy plus a weighted soft term.

    For every element, a row of class scores s and t with a label y::

        student_ce = CE(s, y)                teacher_ce = CE(t, y)         at temperature 1
        weight     = 1 - exp(-student_ce / (teacher_ce + 1e-7))            a constant
        soft       = -sum_c softmax(t / T)_c * log_softmax(s / T)_c
        loss       = hard_weight * student_ce + alpha * T^2 * weight * soft

    The gradient goes to `student_logits` alone: weight, teacher and target are constants. The
    forward pass computes the gradient, so the inputs may be changed before the backward pass. An
    element has one label or one distribution: multi-label targets (BCE) are not supported.

    Args:
        student_logits: Unnormalised scores, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)`` with
            any strides; float16, bfloat16, float32 or float64. ``-inf`` masks a class.
        teacher_logits: Same shape and device; the dtype may differ.
        target: Class indices in [0, C), any integer dtype, shaped like the logits without the class
            dimension; or class probabilities (mixup, cutmix), floating point, shaped like the
            logits, with ``CE(x, q) = -sum_c q_c * log_softmax(x)_c``.
        temperature: T > 0; above 1000 the gradient loses digits in proportion to T. Default 2, from
            the official ImageNet script; the paper's CIFAR-100 runs use 4.
        alpha: Scale >= 0 of the soft term. Default 2.5, from the same script; CIFAR-100: 2.25.
        hard_weight: Scale >= 0 of the hard term. Default 1; 0 leaves the soft term alone.
        label_smoothing: In [0, 1], default 0; for the hard term alone, never in the weight.
        ignore_index: Elements with this index target have loss 0 and gradient 0, whatever their
            logits are, and do not count in the mean. Default -100. Not used for probabilities.
        reduction: ``"mean"`` over the elements that are not ignored (default), ``"sum"`` or
            ``"none"``.
        balance: Divide the weights by their mean over the elements of this call that are not
            ignored. The soft term of ``"mean"`` is then ``sum(weight * soft) / sum(weight)``, so
            alpha has the strength that it has in distillation without weights. Each process and
            each micro-batch has its own mean. Costs a second forward pass, and for float16 a
            float32 gradient. If all weights are 0, so is the soft term. Not for ``"none"``.
            Default False, as in the paper.

    Returns:
        A scalar, or for ``"none"`` a tensor shaped like an index target. The loss is computed in
        float32, or in float64 if either set of logits is float64, and has that dtype. The mean over
        no element is NaN.

    Raises:
        TypeError: An argument is not a tensor, or its dtype is not one of the above.
        ValueError: Shapes or devices do not fit together, or an option is out of range.
        IndexError: On a CPU, an index target names no class. On a GPU an index that names no class
            gives NaN for its element, because a check would wait for the GPU.
        RuntimeError: A second derivative is taken; ``weighted_soft_labels.reference`` has them.
        NotImplementedError: vmap or forward-mode AD is used; the reference supports them.

    Source:
        Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
        Perspective", ICLR 2021, arXiv 2102.00650, and its official code. Differences from that
        code: the weight is exact for confident teachers, where that code in float32 is off by 0.1
        and more; a term with scale 0 is omitted; any shape, dtype, class count and target;
        `balance`.

    Example:
        >>> import torch
        >>> from weighted_soft_labels import wsl_loss
        >>> student_logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[3.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
        >>> target = torch.tensor([0, 1])
        >>> loss = wsl_loss(student_logits, teacher_logits, target, temperature=4.0, alpha=2.25)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        24.7993
    """
    options = check_options(
        Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance)
    )
    check_tensors(student_logits, teacher_logits, target)
    return distill(student_logits, teacher_logits, target, options)


class WSLLoss(nn.Module):
    """:func:`wsl_loss` as a module, which checks the options when it is made.

    Arguments, shapes, errors and source: see :func:`wsl_loss`. The module has no parameters and no
    buffers.

    Example:
        >>> import torch
        >>> from weighted_soft_labels import WSLLoss
        >>> criterion = WSLLoss(temperature=4.0, alpha=2.25)
        >>> criterion  # doctest: +NORMALIZE_WHITESPACE
        WSLLoss(temperature=4.0, alpha=2.25, hard_weight=1.0, label_smoothing=0.0,
                ignore_index=-100, reduction='mean', balance=False)
        >>> target = torch.zeros(8, dtype=torch.long)
        >>> loss = criterion(torch.zeros(8, 10), torch.zeros(8, 10), target)
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        alpha: float = 2.5,
        hard_weight: float = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        balance: bool = False,
    ) -> None:
        super().__init__()
        options = Options(
            temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance
        )
        for name, value in check_options(options)._asdict().items():
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Options._fields}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; see :func:`wsl_loss`."""
        return wsl_loss(student_logits, teacher_logits, target, **self._options())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())
