"""The public loss: checks, the choice of an implementation, and the one autograd boundary."""

from __future__ import annotations

import math
from importlib.util import find_spec
from numbers import Real
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from weighted_soft_labels import _eager

__all__ = ["WSLLoss", "wsl_loss"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """The options of the loss, in the order in which they are documented."""

    temperature: float = 2.0
    alpha: float = 2.5
    hard_weight: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"


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
    r"""Weighted Soft Labels distillation loss: hard cross-entropy plus a soft term weighted sample by sample.

    For every element (a row of class scores ``s``, ``t`` and a label ``y``)::

        ce_s   = CE(s, y)                ce_t = CE(t, y)           at temperature 1
        weight = 1 - exp(-ce_s / (ce_t + 1e-7))                    a constant for differentiation
        soft   = -sum_c softmax(t / T)_c * log_softmax(s / T)_c
        loss   = hard_weight * CE(s, y) + alpha * T^2 * weight * soft

    The gradient goes to ``student_logits`` alone; teacher and target are constants.

    Args:
        student_logits: Unnormalised scores, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)`` with any strides;
            float16, bfloat16, float32 or float64. ``-inf`` masks a class.
        teacher_logits: Same shape and device; the dtype may differ.
        target: Class indices in [0, C) of any integer dtype, shaped like the logits without the class dimension,
            or class probabilities, floating point and shaped like the logits (mixup, cutmix), for which
            ``CE(x, q) = -sum_c q_c log_softmax(x)_c``.
        temperature: T > 0, any float. Default 2, the official ImageNet script's; the paper's CIFAR-100 runs use 4.
        alpha: Scale >= 0 of the soft term. Default 2.5, the official ImageNet script's; CIFAR-100: 2.25.
        hard_weight: Scale >= 0 of the hard term. Default 1; 0 leaves the soft term alone.
        label_smoothing: In [0, 1], default 0; enters the hard term alone, never the weight.
        ignore_index: An element with this index target has loss 0 and gradient 0, whatever its logits hold, and
            does not count in the mean. Default -100. No meaning for probabilities.
        reduction: ``"mean"`` over the elements that are not ignored (default), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` a tensor shaped like an index target. float32, or float64 if either set of
        logits is float64; that is also the precision of the computation. The mean of nothing is NaN.

    Raises:
        TypeError: An argument is not a tensor, or its dtype is not one of the above.
        ValueError: Shapes or devices do not fit together, or an option is out of range.
        IndexError: On a CPU, an index target names no class. On a GPU, where looking would mean waiting, and
            in compiled code the loss of that element is NaN.
        RuntimeError: The gradient is differentiated again; ``weighted_soft_labels.reference`` supports that.

    Source:
        Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective",
        ICLR 2021, arXiv 2102.00650, and its official code. Differences from that code: the cross-entropies in the
        weight keep their digits however confident the teacher is (the official float32 code is off by 0.1 and more);
        a term with scale 0 is left out; any shape, dtype, class count and target kind.

    Example:
        >>> import torch
        >>> from weighted_soft_labels import wsl_loss
        >>> student_logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
        >>> teacher_logits = torch.tensor([[3.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
        >>> loss = wsl_loss(student_logits, teacher_logits, torch.tensor([0, 1]), temperature=4.0, alpha=2.25)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        24.7993
    """
    options = Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction)
    check_options(options)
    check_tensors(student_logits, teacher_logits, target)
    function = _TransformableWSL if not torch.compiler.is_compiling() and _under_transform() else _WSL
    # Nothing of the teacher's graph, or of a learned target's, is kept alive by the loss.
    teacher_logits = teacher_logits.detach() if teacher_logits.requires_grad else teacher_logits
    target = target.detach() if target.requires_grad else target
    loss: Tensor = function.apply(student_logits, teacher_logits, target, options)
    return loss


class WSLLoss(nn.Module):
    """:func:`wsl_loss` as a module: the options are checked here, once and early.

    Args, shapes, errors and source: see :func:`wsl_loss`. It has no parameters, no buffers and an empty state dict.

    Example:
        >>> import torch
        >>> from weighted_soft_labels import WSLLoss
        >>> criterion = WSLLoss(temperature=4.0, alpha=2.25)
        >>> criterion
        WSLLoss(temperature=4.0, alpha=2.25, hard_weight=1.0, label_smoothing=0.0, ignore_index=-100, reduction='mean')
        >>> loss = criterion(torch.zeros(8, 10), torch.zeros(8, 10), torch.zeros(8, dtype=torch.long))
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
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha
        self.hard_weight = hard_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        check_options(self._options())

    def _options(self) -> Options:
        return Options(*(getattr(self, name) for name in Options._fields))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch; see :func:`wsl_loss`."""
        return wsl_loss(student_logits, teacher_logits, target, **self._options()._asdict())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options()._asdict().items())


def check_options(options: Options) -> None:
    """Raise ValueError for an option out of range. Plain comparisons, which the compiler can trace for any number."""
    for name, value in zip(("temperature", "alpha", "hard_weight", "label_smoothing"), options):
        # Real is an abstract class, which takes longer to ask.
        if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 < options.temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {options.temperature!r}")
    if not 0 <= options.alpha < math.inf:
        raise ValueError(f"alpha must be finite and >= 0, got {options.alpha!r}")
    if not 0 <= options.hard_weight < math.inf:
        raise ValueError(f"hard_weight must be finite and >= 0, got {options.hard_weight!r}")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {options.label_smoothing!r}")
    if not isinstance(options.ignore_index, int) or isinstance(options.ignore_index, bool):
        raise ValueError(f"ignore_index must be an int, got {options.ignore_index!r}")
    if options.reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {options.reduction!r}")


def check_tensors(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(logits).__name__}")
        if logits.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")

    shape = student.shape
    if teacher.shape != shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape, got {tuple(shape)} and {tuple(teacher.shape)}"
        )
    if not shape:
        raise ValueError("student_logits must be (C,), (N, C) or (N, C, d1, ..., dk), got a scalar")
    if shape[min(1, len(shape) - 1)] == 0:
        raise ValueError(f"student_logits must have at least one class, got shape {tuple(shape)}")

    if target.dtype in DTYPES:
        kind, expected = "class probabilities (floating point) must have the shape of the logits", shape
    elif target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            "target must hold class indices (an integer dtype) or class probabilities "
            f"(float16, bfloat16, float32 or float64), got {target.dtype}"
        )
    else:
        kind = "class indices (an integer dtype) must have the shape of the logits without the class dimension"
        expected = shape[:1] + shape[2:] if len(shape) > 1 else torch.Size()
    if target.shape != expected:
        raise ValueError(f"target of {kind}, {tuple(expected)} for logits of {tuple(shape)}, got {tuple(target.shape)}")
    if not student.device == teacher.device == target.device:
        raise ValueError(
            "student_logits, teacher_logits and target must be on the same device, "
            f"got {student.device}, {teacher.device} and {target.device}"
        )


_HAS_TRITON = find_spec("triton") is not None


def implementation(student: Tensor, teacher: Tensor) -> ModuleType:
    """The implementation for these logits."""
    if _HAS_TRITON and student.is_cuda and torch.float64 not in (student.dtype, teacher.dtype):
        from weighted_soft_labels import _triton

        return _triton
    return _eager


def _under_transform() -> bool:
    """Whether torch.func is at work; while a graph is traced, on the code that is traced."""
    return torch._C._are_functorch_transforms_active()


# What torch.compiler.assume_constant_result does; calling that would import the compiler, which takes seconds.
_under_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _WSL(Function):
    """The autograd boundary. d loss / d teacher and d loss / d target do not exist.

    The gradient for an incoming gradient of 1 is formed with the loss, from the same read of the logits, and given
    away to the first backward, which may therefore scale it in place. Whoever keeps the graph and comes again gets a
    gradient computed anew, so no two owners ever share it. A float16 gradient is always computed in backward:
    divided by the batch size it would underflow before a gradient scaler could multiply it.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:
        compiled = torch.compiler.is_compiling()  # decides by itself what to compute ahead and what to keep
        if compiled and not ctx.needs_input_grad[0] and _under_transform():
            # torch 2.11 to 2.13 forget about `backward` here and would differentiate the weight too, without a word.
            raise NotImplementedError(
                "torch.compile of a torch.func transform of wsl_loss needs a newer torch (2.15 is tested), "
                f"got {torch.__version__}; leave the transform out of the compiled code"
            )
        ahead = ctx.needs_input_grad[0] and student.dtype != torch.float16 and not compiled
        loss: Tensor
        loss, ctx.gradient, state = implementation(student, teacher).forward(student, teacher, target, options, ahead)
        ctx.options = options
        ctx.save_for_backward(student, teacher, target, *state)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Gradient.apply(upstream, *ctx.saved_tensors[:3], ctx.options), None, None, None
        gradient = ctx.gradient
        if gradient is not None:
            ctx.gradient = None
            return implementation(gradient, gradient).scale_(gradient, upstream), None, None, None
        student, teacher, target, *state = ctx.saved_tensors
        gradient = implementation(student, teacher).backward(
            student, teacher, target, tuple(state), upstream, ctx.options
        )
        return gradient, None, None, None


class _TransformableWSL(_WSL):
    """The same boundary in the form that torch.func asks for, which costs more at every call."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:  # type: ignore[override]
        loss: Tensor = implementation(student, teacher).forward(student, teacher, target, options, False)[0]
        return loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[3]
        ctx.save_for_backward(*inputs[:3])


class _Gradient(Function):
    """The gradient where a graph of it is asked for: it can be had, but not differentiated."""

    @staticmethod
    def forward(upstream: Tensor, student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:
        gradient: Tensor = implementation(student, teacher).backward(student, teacher, target, (), upstream, options)
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        raise RuntimeError(
            "wsl_loss cannot be differentiated twice: its gradient is a closed form without a graph. "
            "Use weighted_soft_labels.reference.wsl_loss, which supports create_graph=True."
        )
