"""The public loss: checks, the operators with the one autograd boundary around them, the choice of an implementation.

Three operators, `weighted_soft_labels::forward`, `::backward` and `::terms`, are all that compiled, exported or traced
code sees. Inside, logits have one shape, (B, C, R) with any strides, and labels (B, R).
"""

from __future__ import annotations

import math
import operator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from weighted_soft_labels import _eager

__all__ = ["WSLLoss", "wsl_loss"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        IndexError: On a CPU, an index target names no class. On a GPU, where looking would mean waiting, the loss
            of that element is NaN.
        RuntimeError, NotImplementedError: The gradient is differentiated again; vmap or forward-mode AD is at
            work. ``weighted_soft_labels.reference`` supports them.

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
    options = check_options(
        Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction)
    )
    check_tensors(student_logits, teacher_logits, target)
    # Nothing of the teacher's graph, or of a learned target's, is kept alive by the loss.
    teacher_logits = teacher_logits.detach() if teacher_logits.requires_grad else teacher_logits
    target = target.detach() if target.requires_grad else target
    if _plain(student_logits, teacher_logits, target):
        wanted = student_logits.requires_grad and torch.is_grad_enabled()
        loss, _ = _WSL.apply(student_logits, teacher_logits, target, options, wanted, True)
    elif torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        loss, _ = torch.ops.weighted_soft_labels.forward(
            student_logits, teacher_logits, target, False, *options
        )
    else:
        loss, _ = _FunctionalWSL.apply(student_logits, teacher_logits, target, options, True, False)
    result: Tensor = loss
    return result


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
        options = Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction)
        for name, value in check_options(options)._asdict().items():
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Options._fields}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch; see :func:`wsl_loss`."""
        return wsl_loss(student_logits, teacher_logits, target, **self._options())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())


def check_options(options: Options) -> Options:
    """The options as plain numbers. Raises ValueError for one that is no number, or out of range."""
    temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction = options
    if not (
        type(temperature) is type(alpha) is type(hard_weight) is type(label_smoothing) is float
    ) or (type(ignore_index) is not int):
        kinds = dict.fromkeys(Options._fields[:4], float) | {"ignore_index": int}
        options = options._replace(
            **{name: _number(name, getattr(options, name), kinds[name]) for name in kinds}
        )
        temperature, alpha, hard_weight, label_smoothing, _, _ = options
    fits = (
        1e-37 < temperature < 1e38
        and alpha < 1e38
        and alpha * temperature * temperature < 1e38 > hard_weight
    )
    if (
        fits
        and alpha >= 0
        and hard_weight >= 0
        and 0 <= label_smoothing <= 1
        and reduction in ("mean", "sum", "none")
    ):
        return options
    for legal, expected, value in (
        (0 < temperature < math.inf, "temperature must be finite and > 0", temperature),
        (0 <= alpha < math.inf, "alpha must be finite and >= 0", alpha),
        (0 <= hard_weight < math.inf, "hard_weight must be finite and >= 0", hard_weight),
        (0 <= label_smoothing <= 1, "label_smoothing must be in [0, 1]", label_smoothing),
        (
            reduction in ("mean", "sum", "none"),
            "reduction must be one of mean, sum, none",
            reduction,
        ),
    ):
        if not legal:
            raise ValueError(f"{expected}, got {value!r}")
    expected = "temperature, alpha, alpha * temperature^2 and hard_weight must fit into float32"
    raise ValueError(f"{expected}, got {temperature!r}, {alpha!r} and {hard_weight!r}")


def _number(name: str, value: Any, kind: type) -> Any:
    """`value` as a float or int: of ints, Fractions, NumPy scalars and constant 0-dim tensors on the CPU."""
    expected, legal = (
        "a number" if kind is float else "an int",
        not isinstance(value, (bool, str, bytes)),
    )
    if torch.compiler.is_compiling() and hasattr(value, "dtype"):
        raise ValueError(
            f"{name} must be a Python {kind.__name__} in compiled code, got a {type(value).__name__}"
        )
    if isinstance(value, Tensor):
        expected += " (or a 0-dim tensor on the CPU that does not require grad)"
        legal = value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad
    try:
        if legal:
            return float(value) if kind is float else operator.index(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_tensors(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    for name, tensor in (
        ("student_logits", student),
        ("teacher_logits", teacher),
        ("target", target),
    ):
        if type(tensor) is not Tensor:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
            if hasattr(tensor, "to_local"):
                kind = type(tensor).__name__
                raise TypeError(
                    f"{name} must be a Tensor of this process, got a {kind}: pass .to_local()"
                )
        if tensor is not target and tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
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
        kind, expected = (
            "class probabilities (floating point) must have the shape of the logits",
            shape,
        )
    elif target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            "target must hold class indices (an integer dtype) or class probabilities "
            f"(float16, bfloat16, float32 or float64), got {target.dtype}"
        )
    else:
        kind = "class indices (an integer dtype) must have the shape of the logits without the class dimension"
        expected = _row_shape(student)
    if target.shape != expected:
        advice = (
            "; pass one-hot labels as probabilities, target.float()"
            if target.shape == shape
            else ""
        )
        raise ValueError(
            f"target of {kind}, {tuple(expected)} for logits of {tuple(shape)}, got {tuple(target.shape)}{advice}"
        )
    if not student.device == teacher.device == target.device:
        raise ValueError(
            "student_logits, teacher_logits and target must be on the same device, "
            f"got {student.device}, {teacher.device} and {target.device}"
        )


_HAS_TRITON = find_spec("triton") is not None
_HAS_ROWS = find_spec("weighted_soft_labels._rows") is not None
_load = cache(import_module)  # an import statement would cost a microsecond at every call


def implementation(student: Tensor, teacher: Tensor) -> ModuleType:
    """The implementation for these logits; ``implementation(logits, logits).__name__`` says which."""
    if student.dtype == torch.float64 or teacher.dtype == torch.float64:
        return _eager
    if _HAS_ROWS and student.is_cpu:
        return _load("weighted_soft_labels._native")
    if _HAS_TRITON and student.is_cuda:
        return _load("weighted_soft_labels._triton")
    return _eager


# --- one shape inside the package: logits (B, C, R), one entry per row (B, R) ---


def _logits(x: Tensor) -> Tensor:
    """View (C,) as (1, C, 1), (N, C) as (1, C, N), (N, C, d...) as (N, C, D). Copies only if no stride walks d...."""
    if x.dim() == 2:
        (n, classes), (row_stride, class_stride) = x.shape, x.stride()
        return x.as_strided((1, classes, n), (0, class_stride, row_stride))
    return x.flatten(2) if x.dim() > 2 else x[None, :, None]


def _rows(x: Tensor) -> Tensor:
    """View one entry per row, shaped like an index target, as (B, R)."""
    return x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)


def _row_shape(logits: Tensor) -> torch.Size:
    return logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size()


def _operands(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _logits(student),
        _logits(teacher),
        _logits(target) if target.is_floating_point() else _rows(target),
    )


def _empty_gradient(student: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In the student's order of dimensions if (B, C, R) is a view of that, else contiguous."""
    gradient = torch.empty_like(student, dtype=dtype)
    try:
        if student.dim() > 3:
            gradient.view(*student.shape[:2], math.prod(student.shape[2:]))
    except (RuntimeError, ValueError):  # the latter of fake tensors
        gradient = torch.empty_like(student, dtype=dtype, memory_format=torch.contiguous_format)
    return gradient


def _kept_gradient(student: Tensor, wanted: bool) -> Tensor:
    return _empty_gradient(student, _kept_dtype(student)) if wanted else student.new_empty(0)


def _kept_dtype(x: Tensor) -> torch.dtype:
    """Of a gradient kept from forward to backward: float32 for float16, which divided by the batch size would underflow
    before a gradient scaler could multiply it."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _empty_rows(student: Tensor, teacher: Tensor, *leading: int) -> Tensor:
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    return student.new_empty((*leading, *_row_shape(student)), dtype=dtype)


# --- the operators: what they do, and what their outputs look like ---


def _forward(
    student: Tensor, teacher: Tensor, target: Tensor, ahead: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient for an incoming gradient of 1, empty unless it is wanted `ahead` of backward."""
    gradient = _kept_gradient(student, ahead)
    found = implementation(student, teacher)
    if student.dim() == 2 and found.TAKES_MATRICES:
        loss = found.forward(
            student, teacher, target, Options(*options), gradient if ahead else None
        )
    else:
        filled = _logits(gradient) if ahead else None
        loss = found.forward(*_operands(student, teacher, target), Options(*options), filled)
    return loss.view(_row_shape(student)) if loss.dim() else loss, gradient


def _fake_forward(
    student: Tensor, teacher: Tensor, _: Tensor, ahead: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    rows = _empty_rows(student, teacher)
    return rows if "none" in options else rows.new_empty(()), _kept_gradient(student, ahead)


def _backward(
    student: Tensor, teacher: Tensor, target: Tensor, upstream: Tensor, *options: Any
) -> Tensor:
    """The gradient for the incoming gradient `upstream`, which is applied before rounding to the student's dtype."""
    gradient = _empty_gradient(student)
    upstream = _rows(upstream) if options[-1] == "none" else upstream
    operands = _operands(student, teacher, target)
    implementation(student, teacher).backward(
        *operands, upstream, Options(*options), _logits(gradient)
    )
    return gradient


def _terms(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    options = Options(temperature=temperature, ignore_index=ignore_index)
    terms: Tensor = implementation(student, teacher).terms(
        *_operands(student, teacher, target), options
    )
    return terms.view(4, *_row_shape(student))


def _refuse_transform(*args: Any) -> Any:
    raise NotImplementedError(
        "wsl_loss supports neither vmap (jacrev, hessian) nor forward-mode AD (jvp, jacfwd). "
        "Use weighted_soft_labels.reference.wsl_loss, which does."
    )


def _check_incoming(upstream: Tensor | None, *second: Tensor | None) -> None:
    """Of the loss and of the gradients that stand beside it as outputs."""
    for gradient in second:
        if gradient is not None:
            raise RuntimeError(
                "wsl_loss cannot be differentiated twice: its gradient is a closed form without a graph. "
                "Use weighted_soft_labels.reference.wsl_loss, which supports create_graph=True."
            )
    functorch = torch._C._functorch
    if upstream is not None and (
        functorch.is_batchedtensor(upstream) or functorch.is_legacy_batchedtensor(upstream)
    ):
        _refuse_transform()


def _scaled(gradient: Tensor, upstream: Tensor, plain: bool) -> Tensor:
    """A gradient that was formed for an incoming gradient of 1; in place where nobody comes by again."""
    if torch.is_grad_enabled() or not plain or _graph_is_kept():
        return gradient * (
            upstream.unsqueeze(min(1, gradient.dim() - 1)) if upstream.dim() else upstream
        )
    gradient = gradient.detach()
    implementation(gradient, gradient).scale_(gradient, upstream)
    return gradient


def _autograd(
    student: Tensor, teacher: Tensor, target: Tensor, ahead: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    if torch._C._are_functorch_transforms_active():  # eager ones come by _FunctionalWSL
        raise NotImplementedError(
            "wsl_loss in a torch.func transform: leave the transform out of the compiled code"
        )
    ahead = ahead or (torch.is_grad_enabled() and student.requires_grad)
    loss, gradient = _WSL.apply(student, teacher, target, options, ahead, False)
    return loss, gradient


_LOGITS = "Tensor student, Tensor teacher, Tensor target"
_OPTIONS = "float temperature, float alpha, float hard_weight, float label_smoothing, int ignore_index, str reduction"
_library: Any = torch.library.Library("weighted_soft_labels", "DEF")  # type: ignore[no-untyped-call]


def define(name: str, schema: str, run: Any, fake: Any, autograd: Any = None) -> None:
    _library.define(f"{name}({schema}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"weighted_soft_labels::{name}", fake, lib=_library)
    torch.library.register_vmap(f"weighted_soft_labels::{name}", _refuse_transform, lib=_library)
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")


_FORWARD = f"{_LOGITS}, bool ahead, {_OPTIONS}) -> (Tensor, Tensor)"
_TERMS = f"{_LOGITS}, float temperature, int ignore_index) -> Tensor"
define("forward", _FORWARD, _forward, _fake_forward, _autograd)
define(
    "backward",
    f"{_LOGITS}, Tensor upstream, {_OPTIONS}) -> Tensor",
    _backward,
    lambda s, *_: _empty_gradient(s),
)
define("terms", _TERMS, _terms, lambda s, t, *_: _empty_rows(s, t, 4))


# --- the autograd boundary ---


_PLAIN = frozenset((Tensor, nn.Parameter))
_included = torch._C._dispatch_tls_is_dispatch_key_included
_PYTHON, _PRE_DISPATCH = torch._C.DispatchKey.Python, torch._C.DispatchKey.PreDispatch


def _plain(*tensors: Tensor) -> bool:
    """Whether nobody watches which operators run: then to call past the dispatcher is the same, and shorter."""
    return (
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, tensors))
        and not (
            _included(_PYTHON)
            or _included(_PRE_DISPATCH)
            or torch._C._are_functorch_transforms_active()
        )
    )


class _WSL(Function):
    """(loss, its gradient for an incoming gradient of 1), formed together from one read of the logits.

    The gradient is handed out to nobody. It is an output so that, saved, it is a function of the student: whoever
    differentiates it arrives at `backward` with an incoming gradient for it, and is refused.

    Eager code forms a float16 gradient (to keep it would take float32's memory) and that of the reduction "none" (where
    scaling every row moves as much as beginning anew) in `backward`; the second output is then empty.
    """

    jvp = staticmethod(_refuse_transform)  # type: ignore[assignment]

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, target: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        options, ahead, plain = arguments
        ctx.set_materialize_grads(False)
        ctx.options, ctx.dtype, ctx.plain = options, student.dtype, plain
        if not plain:
            loss, gradient = _below_autograd(student, teacher, target, ahead, *options)
        elif student.dtype == torch.float16 or options.reduction == "none":
            loss, gradient = _forward(student, teacher, target, False, *options)
            # A tensor made under inference_mode cannot be saved, and need not be: nothing can change it any more.
            ctx.held = [x if x.is_inference() else None for x in (student, teacher, target)]
            ctx.save_for_backward(
                gradient, *(None if x.is_inference() else x for x in (student, teacher, target))
            )
            return loss, gradient
        else:
            loss, gradient = _forward(student, teacher, target, ahead, *options)
        ctx.save_for_backward(gradient)
        return loss, gradient

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, second: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _check_incoming(upstream, second)
        if upstream is None:
            return (None,) * 6
        gradient, *inputs = ctx.saved_tensors
        if inputs:
            inputs = [saved if held is None else held for saved, held in zip(inputs, ctx.held)]
            run = (
                _backward if _plain(*inputs, upstream) else torch.ops.weighted_soft_labels.backward
            )
            with torch.no_grad():
                found = run(*inputs, upstream, *ctx.options)
            if torch.is_grad_enabled():
                found = found + gradient.sum()  # of nothing, to tie it to the student
        else:
            found = _scaled(gradient, upstream, ctx.plain)
            found = found if found.dtype == ctx.dtype else found.to(ctx.dtype)
        return found, None, None, None, None, None


_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        loss, gradient = torch.ops.weighted_soft_labels.forward(*args)
    return loss, gradient


class _FunctionalWSL(_WSL):
    """The same boundary in the form that torch.func asks for, which costs more at every call."""

    vmap = staticmethod(_refuse_transform)

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, target: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return _below_autograd(student, teacher, target, True, *arguments[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.dtype, ctx.plain = inputs[3], inputs[0].dtype, False
        ctx.save_for_backward(output[1])
