"""The loss from hidden states: the last linear layers and the loss, by chunks of rows.

For each chunk of rows we compute the logits of both models, the loss and its gradient, and add the
chunk's share to the gradients of input, weight and bias. The full logits never exist. The loss of
a chunk is computed by the backend that `wsl_loss` would use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from weighted_soft_labels import _operator, backends, parallel
from weighted_soft_labels._options import (
    Options,
    check_kind,
    check_options,
    in_memory,
    signed,
    to_float,
)
from weighted_soft_labels.backends import eager

__all__ = ["linear_wsl_loss"]

# Classes of a weight in half precision that are converted to float32 at a time, for the cache.
PIECE = 1024
NEW = torch.version.hip is None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def linear_wsl_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 2.0,
    alpha: float = 2.5,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """:func:`weighted_soft_labels.wsl_loss` of ``F.linear`` of both inputs, in little memory.

    The logits of each model are ``softcap * tanh(scale * (input @ weight.T + bias) / softcap)``,
    or without a softcap ``scale * (input @ weight.T + bias)``.

    Args:
        student_input, teacher_input: Hidden states, ``(..., H)``, floating point; the two H may
            differ.
        student_weight, teacher_weight: Weights of the last layers, ``(C, H)``, in the dtype of the
            input; under autocast any.
        target: Class indices in [0, C), ``(...)``, any integer dtype.
        student_bias, teacher_bias: ``(C,)``.
        student_logit_scale, teacher_logit_scale: Finite and > 0, default 1: 1 / ``logits_scaling``
            of Granite, ``logit_scale`` of Cohere.
        student_softcap, teacher_softcap: > 0 or None: ``final_logit_softcapping`` of Gemma.
        temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction: See
            :func:`wsl_loss`.
        chunk_size: Rows per chunk. Smaller chunks use less memory and are slower. By default the
            buffers of a chunk take about as much memory as the weight's gradient, but hold at
            least two million logits.
        group: Processes over which the vocabulary is sharded. Weights and biases are those of this
            process's classes, which follow those of the rank before. Everything else is the same
            on every process, the input's gradient too.

    Returns:
        That loss. Logits and loss are float32 (or float64) whatever the inputs are, and so is the
        sum that becomes the weight's gradient. The teacher gets no gradient. The hidden states of
        ignored rows may hold NaN.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, NotImplementedError: As :func:`wsl_loss`,
            with a group as :func:`vocab_parallel_wsl_loss`. ValueError also for weights that are
            not gathered. torch.func is not supported.
    """
    student = Head(student_input, student_weight, student_bias)
    teacher = Head(teacher_input, teacher_weight, teacher_bias)
    name = None if group is None else parallel.group_name(group)
    options = Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction)
    scales = student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap
    settings = Settings(*scales, chunk_size, name, None)
    checks = student, teacher, target, options, settings
    options, settings = parallel.checked(name, _check, *checks)
    rows = target.numel()
    tensors = [
        student_input.reshape(rows, student_weight.shape[1]),
        student_weight,
        student_bias,
        teacher_input.reshape(rows, teacher_weight.shape[1]).detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        target.reshape(rows).detach(),
    ]
    operator = torch.ops.weighted_soft_labels.linear_loss
    loss: Tensor = operator(*tensors, None, [False] * 3, *options, *settings)[0]
    return loss.view(target.shape) if reduction == "none" else loss


class Head(NamedTuple):
    """The last layer of a model and what goes into it."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None


class Settings(NamedTuple):
    """What `linear_wsl_loss` takes beside tensors and the options of the loss."""

    student_scale: float
    teacher_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    chunk_size: int | None
    group: str | None
    product: torch.dtype | None  # of the matrix products under autocast


# --- checks ---


def _check(
    student: Head, teacher: Head, target: Tensor, options: Options, settings: Settings
) -> tuple[Options, Settings]:
    options = check_options(options)
    settings = check_settings(settings, target)
    sharded = settings.group is not None
    student_logits = check_head("student", student, settings.product, sharded)
    teacher_logits = check_head("teacher", teacher, settings.product, sharded)
    if not sharded and len(student.weight) != len(teacher.weight):
        raise ValueError(
            "student_weight and teacher_weight must have the same number of classes, got "
            f"{len(student.weight)} and {len(teacher.weight)}: slice the one that is padded, "
            "weight[:classes]"
        )
    parallel.check_sharded(student_logits, teacher_logits, target)
    return options, settings


def check_settings(settings: Settings, target: Tensor) -> Settings:
    chunk_size, group = settings.chunk_size, settings.group
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size must be an int >= 1 or None, got {chunk_size!r}")
    kind = target.device.type if isinstance(target, Tensor) else "cpu"
    product = None
    if kind != "meta" and torch.is_autocast_enabled(kind):  # raises for meta
        product = torch.get_autocast_dtype(kind)
    names = "student_logit_scale", "teacher_logit_scale", "student_softcap", "teacher_softcap"
    scales: list[Any] = [
        None if value is None and name.endswith("softcap") else _positive(name, value)
        for name, value in zip(names, settings)
    ]
    student_scale, teacher_scale, *softcaps = scales
    return Settings(
        student_scale, teacher_scale, softcaps[0], softcaps[1], chunk_size, group, product
    )


def _positive(name: str, value: Any) -> float:
    number = to_float(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")
    return number


def check_head(name: str, head: Head, product: torch.dtype | None, sharded: bool) -> Tensor:
    """Return what stands for the logits: their shape, dtype and device without their memory."""
    x, weight, bias = head
    for field, tensor in zip(Head._fields, head):
        if tensor is not None or field != "bias":
            advice = "pass .full_tensor(), or if it is sharded by classes .to_local() and group"
            check_kind(f"{name}_{field}", tensor, advice)
    if weight.numel() == 0 and not (sharded and weight.dim() == 2):
        raise ValueError(
            f"{name}_weight has no elements, shape {tuple(weight.shape)}: if ZeRO or FSDP shard "
            "it, gather it first (GatheredParameters, summon_full_params)"
        )
    for field, tensor in zip(Head._fields[1:], (weight, x if bias is None else bias)):
        which = f"{name}_{field}"
        if tensor.dtype != x.dtype and (product is None or not tensor.is_floating_point()):
            raise TypeError(
                f"{name}_input and {which} must have the same dtype, "
                f"got {x.dtype} and {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{which} must be on the device of {name}_input, {x.device}, got {tensor.device}"
            )
    classes, shape = weight.shape[:1], None if bias is None else tuple(bias.shape)
    fits = weight.dim() == 2 and x.shape[-1:] == weight.shape[1:]
    if not fits or shape not in (None, tuple(classes)):
        raise ValueError(
            f"{name}_input, _weight and _bias must be (..., H), (C, H) and (C,), "
            f"got {(tuple(x.shape), tuple(weight.shape), shape)}"
        )
    return x.new_empty(()).expand(x.shape[:-1] + classes)


# --- products ---


@cache
def _multiplies_bfloat16(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _sums(a: Tensor) -> bool:
    """Return whether products of these halves can be added up in float32."""
    if not (NEW and a.is_cuda):
        return False
    if a.dtype == torch.bfloat16:
        return _multiplies_bfloat16(a.get_device())
    return a.dtype == torch.float16


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1, alpha: float = 1.0) -> None:
    """out = beta * out + alpha * a @ b, in the precision of `out`."""
    scales = {"beta": beta, "alpha": alpha}
    if a.dtype == b.dtype and _sums(a):
        torch.addmm(out, a, b, out_dtype=out.dtype, **scales, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), **scales, out=out)


def _pieces(a: Tensor, weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Return slices of classes: a weight that has to be converted to `dtype` is cut in pieces."""
    whole = weight.dtype == dtype or (a.dtype == weight.dtype and _sums(a))
    step = max(1, len(weight)) if whole else PIECE
    return [slice(c, c + step) for c in range(0, len(weight), step)]


def _form_logits(out: Tensor, head: Head, scale: float, cap: float | None) -> None:
    factor = scale if cap is None else scale / cap
    for c in _pieces(head.input, head.weight, out.dtype):
        _add_product(out[:, c], head.input, head.weight[c].t(), 0, factor)
    if head.bias is not None:
        out.add_(head.bias, alpha=factor)
    if cap is not None:
        out.tanh_().mul_(cap)


# --- chunks ---


class Buffers(NamedTuple):
    """Memory for one chunk, (rows, C)."""

    student: Tensor
    teacher: Tensor
    gradient: Tensor


def buffers_of(student: Head, settings: Settings, largest: int, dtype: torch.dtype) -> Buffers:
    rows, width = student.input.shape
    # Kernels on a GPU read logits again after they have begun the gradient. A softcap needs them
    # after the gradient. Otherwise the gradient takes the place of the student's logits.
    separate = student.input.is_cuda or settings.student_softcap is not None
    copies = 3 if separate else 2
    size = settings.chunk_size
    if size is None:
        numerator = 34 if student.weight.element_size() == 2 else 72
        size = max(numerator * width // 64 // copies, 2**21 // max(1, largest))
    # The range of float16 is too small for a gradient.
    half = _sums(student.input) and student.input.dtype == torch.bfloat16
    shape = 2 if half else copies, max(1, min(rows, size)), len(student.weight)
    # In one piece: of large ones, not of small ones, the memory returns to the system on a CPU.
    buffers = student.input.new_empty(shape, dtype=dtype)
    gradient = torch.empty_like(buffers[0], dtype=torch.bfloat16) if half else buffers[-1]
    return Buffers(buffers[1], buffers[0], gradient)


def _chunks(
    student: Head,
    teacher: Head,
    target: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    options: Options,
    settings: Settings,
    joined: tuple[eager.Shard | None, int],
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of every row, and the gradients of their sum weighted by `upstream`.

    A function of its own, so that the buffers are gone before a gradient is converted.
    """
    shard, largest = joined
    dtype = torch.promote_types(student.input.dtype, teacher.input.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    buffers = buffers_of(student, settings, largest, dtype)
    each = options._replace(reduction="none")

    def loss_of(part: slice, s: Tensor, g: Tensor | None) -> Tensor:
        t = buffers.teacher[: len(s)]
        teacher_chunk = teacher._replace(input=teacher.input[part])
        _form_logits(t, teacher_chunk, settings.teacher_scale, settings.teacher_softcap)
        run = partial(eager.run, shard=shard)
        if shard is None:
            run = backends.choose(s, t, target).run
        return run(s, t, target[part], each, g)

    kept = target != options.ignore_index
    losses, totals = accumulate(student, kept, upstream, wanted, settings, buffers, loss_of)
    if shard is not None and wanted[0]:
        shard.all_reduce(totals[0])
    return losses, totals


def accumulate(
    student: Head,
    kept: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    settings: Settings,
    buffers: Buffers,
    loss_of: Callable[[slice, Tensor, Tensor | None], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of every row, and the gradients of their sum weighted by `upstream`.

    Args:
        kept: Rows that are not ignored, (N,).
        loss_of: Takes a slice of rows, the student's logits of these rows, and memory for their
            gradient or None, which may be the memory of the logits. Returns the losses.
    """
    size, rows = len(buffers.student), len(kept)
    losses = buffers.student.new_empty(rows)
    totals = [
        losses.new_empty(x.shape if x is not None and want else 0)
        for x, want in zip(student, wanted)
    ]
    cap = settings.student_softcap
    for start in range(0, rows, size):
        part = slice(start, start + size)
        s, g = (x[: rows - start] for x in (buffers.student, buffers.gradient))
        # The gradient of an ignored row is 0, but 0 * NaN would be NaN.
        chunk = student._replace(input=student.input[part].where(kept[part, None], 0))
        _form_logits(s, chunk, settings.student_scale, cap)
        losses[part] = loss_of(part, s, g if any(wanted) else None)
        if upstream is not None:
            g.mul_(upstream[part, None])
        if cap is not None and any(wanted):
            g.mul_(s.square_().mul_(-1 / cap**2).add_(1))  # the derivative of cap * tanh(x / cap)
        _add_gradients(totals, wanted, chunk, g, part)
    if rows == 0:
        totals = [total.zero_() for total in totals]
    return losses, totals


def _add_gradients(
    totals: list[Tensor], wanted: list[bool], chunk: Head, gradient: Tensor, part: slice
) -> None:
    """Add the chunk's share; the first chunk overwrites what was in memory."""
    beta = 1 if part.start else 0
    if wanted[0]:
        own = totals[0][part]
        if len(chunk.weight) == 0:
            own.zero_()
        for c in _pieces(gradient, chunk.weight, own.dtype):
            _add_product(own, gradient[:, c], chunk.weight[c], 1 if c.start else 0)
    if wanted[1]:
        _add_product(totals[1], gradient.t(), chunk.input, beta)
    if wanted[2]:
        share = gradient.sum(0, dtype=totals[2].dtype)
        torch.add(totals[2], share, out=totals[2]) if beta else totals[2].copy_(share)


# --- the operator ---


def _forward(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    *others: Any,
) -> tuple[Tensor, ...]:
    """Return loss, scale (none) and gradients. Reduction "none" has them for `upstream` alone."""
    options, settings = split(others)
    parameters: Any = student_input, student_weight, student_bias
    tensors = (*parameters, teacher_input, teacher_weight, teacher_bias, target)
    tensors = parallel.checked(settings.group, _in_memory, *tensors)
    target = signed(tensors.pop()).long()
    student, teacher = (cast(Head(*head), settings.product) for head in (tensors[:3], tensors[3:]))
    classes = len(student_weight), len(teacher_weight)
    joined: tuple[eager.Shard | None, int] = None, classes[0]
    if settings.group is not None:
        dtypes = [None if x is None else x.dtype for x in tensors]
        unlike = settings._replace(group=None)
        agreed = options, unlike, dtypes, student_input.shape[1], wanted[0], upstream is None
        joined = parallel.join(settings.group, target, classes, options.ignore_index, agreed)
    losses, totals = _chunks(student, teacher, target, upstream, wanted, options, settings, joined)
    return finished(losses, totals, parameters, target, wanted, options, settings)


def cast(head: Head, product: torch.dtype | None) -> Head:
    """Return input and weight in the dtype in which autocast multiplies matrices."""
    if product is None or head.input.dtype == torch.float64:
        return head
    return head._replace(input=head.input.to(product), weight=head.weight.to(product))


def finished(
    losses: Tensor,
    totals: list[Tensor],
    parameters: Any,
    target: Tensor,
    wanted: list[bool],
    options: Options,
    settings: Settings,
) -> tuple[Tensor, ...]:
    """Return what the operator returns, of the losses of rows and the gradients of their sum."""
    mean = options.reduction == "mean"
    kept = (target != options.ignore_index).sum().to(losses.dtype)
    if mean or settings.student_scale != 1:
        divisor = (kept.clamp(min=1) if mean else 1) / settings.student_scale
        totals = [total.div_(divisor) for total in totals]
    gradients = [
        total.to(_saved_dtype(x)) if want else total
        for x, want, total in zip(parameters, wanted, totals)
    ]
    if options.reduction != "none":
        losses = losses.sum() / kept if mean else losses.sum()
    return losses, losses.new_empty(0), *gradients


def split(others: tuple[Any, ...]) -> tuple[Options, Settings]:
    last = len(Options._fields)
    return Options(*others[:last]), Settings(*others[last:])


def _in_memory(*tensors: Tensor | None) -> list[Tensor | None]:
    names = [f"{model}_{field}" for model in ("student", "teacher") for field in Head._fields]
    return [x if x is None else in_memory(name, x) for name, x in zip((*names, "target"), tensors)]


def _saved_dtype(x: Tensor) -> torch.dtype:
    """float16 would underflow before a gradient scaler multiplies the gradient."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _fake(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    *others: Any,
) -> tuple[Tensor, ...]:
    wide = torch.float64 in (student_input.dtype, teacher_input.dtype)
    parameters = student_input, student_weight, student_bias
    return fake_outputs(parameters, target, wanted, wide, others)


def fake_outputs(
    parameters: Any,
    target: Tensor,
    wanted: list[bool],
    wide: bool,
    others: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    options, _ = split(others)
    shape = target.shape if options.reduction == "none" else ()
    loss = target.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    gradients = [
        loss.new_empty(x.shape, dtype=_saved_dtype(x)) if want else loss.new_empty(0)
        for x, want in zip(parameters, wanted)
    ]
    return loss, loss.new_empty(0), *gradients


class Recomputed(Function):
    """The boundary for reduction "none": the gradients of all rows would be all logits.

    The backward pass computes the chunks again, from copies of the operator's tensors.
    """

    jvp = staticmethod(_operator.refuse_transforms)  # type: ignore[assignment]

    @staticmethod
    def forward(
        ctx: Any,
        operator: Any,
        tensors: tuple[Any, ...],
        wanted: list[bool],
        others: Any,
        *student: Any,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss: Tensor = operator(*tensors, None, [False] * 3, *others)[0]
            flat, ctx.spec = tree_flatten(tensors)
            copies = torch.ops.weighted_soft_labels.copies([x for x in flat if x is not None])
        ctx.operator = operator
        ctx.absent = [x is None for x in flat]
        ctx.wanted, ctx.others = wanted, others
        ctx.save_for_backward(loss, *copies)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _operator.refuse_batched(upstream)
        loss, *copies = ctx.saved_tensors
        present = iter(copies)
        flat = [None if absent else next(present) for absent in ctx.absent]
        tensors = tree_unflatten(flat, ctx.spec)
        with torch._C._AutoDispatchBelowAutograd():
            gradients = ctx.operator(*tensors, upstream, ctx.wanted, *ctx.others)[2:]
        results: list[Tensor | None] = [None] * 3
        for i, gradient in enumerate(gradients):
            if ctx.wanted[i]:
                results[i] = gradient.to(tensors[i].dtype)
                if torch.is_grad_enabled():
                    refuse = _operator.RefuseSecondDerivative.apply
                    results[i] = refuse(results[i], loss, upstream)
        return None, None, None, None, *results


def _autograd(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    *others: Any,
) -> tuple[Tensor, ...]:
    student = student_input, student_weight, student_bias
    tensors = *student, teacher_input, teacher_weight, teacher_bias, target
    operator = torch.ops.weighted_soft_labels.linear_loss.default
    return differentiable(operator, tensors, upstream, wanted, others)


def differentiable(
    operator: Any,
    tensors: tuple[Any, ...],
    upstream: Tensor | None,
    wanted: list[bool],
    others: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """Wrap an operator whose first three tensors are the student's parameters."""
    if torch._C._are_functorch_transforms_active():
        _operator.refuse_transforms()
    grad, student = torch.is_grad_enabled(), tensors[:3]
    wanted = [
        want or (grad and x is not None and x.requires_grad) for want, x in zip(wanted, student)
    ]
    options, _ = split(others)
    if options.reduction == "none" and upstream is None and any(wanted):
        loss = Recomputed.apply(operator, tensors, wanted, others, *student)
        return loss, *(loss.new_empty(0) for _ in range(4))
    outputs: tuple[Tensor, ...] = _operator.SavedGradients.apply(
        operator, *tensors, upstream, wanted, *others
    )
    return outputs


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def _fake_copies(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


STUDENT = "Tensor student_input, Tensor student_weight, Tensor? student_bias"
OTHERS = (
    f"Tensor target, Tensor? upstream, bool[] wanted, {_operator.OPTIONS}, float student_scale, "
    "float teacher_scale, float? student_softcap, float? teacher_softcap, int? chunk_size, "
    "str? group, ScalarType? product) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_operator.define(
    "linear_loss",
    f"{STUDENT}, Tensor teacher_input, Tensor teacher_weight, Tensor? teacher_bias, {OTHERS}",
    _forward,
    _fake,
    _autograd,
)
# An operator, so that a compiler cannot replace the copies by the tensors that they are copies of.
_operator.define("copies", "Tensor[] x) -> Tensor[]", _copies, _fake_copies, _copies)
