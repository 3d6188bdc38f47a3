"""The loss from hidden states: the last linear layer of both models and the loss, a chunk of rows at a time.

Of a chunk, the logits of both models, the loss and its gradient by the implementation that `wsl_loss` uses, and what
that gradient adds to those of input, weight and bias are formed at once. Nothing of the size of all logits ever exists.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from weighted_soft_labels import loss, parallel
from weighted_soft_labels.loss import Options

__all__ = ["linear_wsl_loss"]

PIECE = 1024  # classes of a weight of half precision to convert to float32 at a time: they stay in the cache
_NEW = torch.version.hip is None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def linear_wsl_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 2.0,
    alpha: float = 2.5,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """:func:`weighted_soft_labels.wsl_loss` of ``F.linear`` of both inputs, whose logits are never kept.

    Args:
        student_input, teacher_input: Hidden states, ``(..., H)``, floating point; the two H may differ.
        student_weight, teacher_weight: Of the last layers, ``(C, H)``, in the dtype of the input; under autocast any.
        target: Class indices in [0, C), ``(...)``, any integer dtype.
        student_bias, teacher_bias: ``(C,)``.
        temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction: See :func:`wsl_loss`.
        chunk_size: Rows at a time. By default so many that the logits and gradients of a chunk take 9/8 of the memory
            of the weight's gradient in float32, in half precision half of that: with fewer rows, reading the weights
            takes longer than multiplying by them. But enough for two million logits, worth starting kernels for.
        group: Processes over which the vocabulary is sharded: weights and biases are of this process's classes, which
            follow those of the rank before, the rest is the same everywhere. So are the gradients.

    Returns:
        That loss, for which logits are float32 (or float64) whatever the inputs are, as is the sum in which the
        weight's gradient accumulates. The teacher gets no gradient. Hidden states of ignored rows may hold NaN.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, NotImplementedError: As :func:`wsl_loss`, and for weights that
            are not all there, with what to do about it. torch.func is not supported.
    """
    options = loss.check_options(
        Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction)
    )
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size must be an int >= 1 or None, got {chunk_size!r}")
    kind = target.device.type if isinstance(target, Tensor) else "cpu"
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    student: Any = student_input, student_weight, student_bias
    teacher: Any = teacher_input, teacher_weight, teacher_bias
    like = _check("student", product, *student), _check("teacher", product, *teacher)
    if group is None and len(student_weight) != len(teacher_weight):
        raise ValueError(
            "student_weight and teacher_weight must have the same number of classes, got "
            f"{len(student_weight)} and {len(teacher_weight)}: slice the one that is padded, weight[:classes]"
        )
    parallel.check(*like, target)
    tensors = [
        x if x is None or i % 3 else x.reshape(-1, x.shape[-1])
        for i, x in enumerate((*student, *teacher))
    ]
    tensors[3:] = (x if x is None else x.detach() for x in tensors[3:])
    tensors.append(target.reshape(-1).detach())
    settings = product, chunk_size or 0, None if group is None else group.group_name
    found: Tensor = torch.ops.weighted_soft_labels.linear_loss(
        *tensors, None, [False] * 3, *settings, *options
    )[0]
    return found.view(target.shape) if reduction == "none" else found


def _check(
    name: str, product: torch.dtype | None, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Raises, or returns what stands for the logits in further checks: their shape, dtype and device in no memory."""
    for which, tensor in {
        f"{name}_input": x,
        f"{name}_weight": weight,
        f"{name}_bias": bias,
    }.items():
        if tensor is bias and bias is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{which} must be a Tensor, got {type(tensor).__name__}")
        if type(tensor) is not Tensor and hasattr(tensor, "to_local"):
            advice = "pass .full_tensor(), or if it is sharded by classes .to_local() and group"
            raise TypeError(
                f"{which} must be a Tensor of this process, got a {type(tensor).__name__}: {advice}"
            )
        if tensor is weight and tensor.numel() == 0:
            advice = (
                "if ZeRO or FSDP shard it, gather it first (GatheredParameters, summon_full_params)"
            )
            raise ValueError(f"{which} has no elements, shape {tuple(tensor.shape)}: {advice}")
        if tensor.dtype != x.dtype and (product is None or not tensor.is_floating_point()):
            raise TypeError(
                f"{name}_input and {which} must have the same dtype, got {x.dtype} and {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{which} must be on the device of {name}_input, {x.device}, got {tensor.device}"
            )
    shapes = tuple(x.shape), tuple(weight.shape), None if bias is None else tuple(bias.shape)
    if (
        weight.dim() != 2
        or x.shape[-1:] != weight.shape[1:]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ValueError(
            f"{name}_input, _weight and _bias must be (..., H), (C, H) and (C,), got {shapes}"
        )
    return x.new_empty(()).expand(*x.shape[:-1], len(weight))


def _sums(a: Tensor) -> bool:
    """Whether products of these halves can be added up in float32: since torch 2.10 on NVIDIA's GPUs."""
    return _NEW and a.is_cuda and a.dtype in (torch.float16, torch.bfloat16)


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """out = beta * out + a @ b, in the precision of `out`."""
    if a.dtype == b.dtype and _sums(a):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss, and what is kept for backward: gradients for an incoming gradient of 1; of the reduction "none", whose
    rows have one each, copies of what may be inference tensors. With these as `upstream`, the gradients for them."""
    *tensors, label, upstream, wanted, product, size, group = arguments[:12]
    options, target = Options(*arguments[12:]), label.long()
    each, later = (
        options._replace(reduction="none"),
        options.reduction == "none" and upstream is None,
    )
    cast = [
        y
        if product is None or y is None or y.dtype == torch.float64 or y.dim() == 1
        else y.to(product)
        for y in tensors
    ]
    kept, now = target != options.ignore_index, [want and not later for want in wanted]
    losses, found = _walk(*cast, target, kept, upstream, now, size, group, each)
    if later:
        return losses, tensors[3].clone(), label.clone(), found[2]
    if options.reduction == "mean":
        for total in found:
            total.div_(kept.sum().clamp(min=1))
    found = [
        total.to(loss._kept_dtype(y)) if w else total for total, y, w in zip(found, tensors, wanted)
    ]
    if options.reduction != "none":
        losses = losses.sum() / kept.sum() if options.reduction == "mean" else losses.sum()
    return losses, *found


def _walk(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """Of every row the loss, and for these incoming gradients those of the student's input, weight and bias. A function
    of its own, so that the chunks are gone before a gradient is converted."""
    x, weight, bias, teacher_x, teacher_weight, teacher_bias = tensors = arguments[:6]
    target, kept, upstream, wanted, size, group, options = arguments[6:]
    shard = parallel.join(group, weight.t(), teacher_weight.t(), len(x)) if group else None
    classes = len(weight)
    dtype = torch.promote_types(torch.promote_types(x.dtype, teacher_x.dtype), torch.float32)
    copies = (
        3 if x.is_cuda else 2
    )  # only the kernels read logits again when they have begun the gradient
    size = size or max(
        (34 if weight.element_size() == 2 else 72) * x.shape[1] // 64 // copies, 2**21 // classes
    )
    # In one piece: of large ones, not of small ones, the memory returns to the system on a CPU.
    buffers = x.new_empty((copies, max(1, min(len(x), size)), classes), dtype=dtype)
    taught, logits, gradient = buffers[0], buffers[1], buffers[-1]
    if _sums(x) and x.dtype == torch.bfloat16:  # the range of float16 is too small
        gradient = torch.empty_like(gradient, dtype=x.dtype)
    losses, found = (
        logits.new_empty(len(x)),
        [logits.new_zeros(y.shape if w else 0) for y, w in zip(tensors, wanted)],
    )
    whole = {weight.dtype, teacher_weight.dtype} <= {dtype, gradient.dtype}
    pieces = [
        slice(c, None if whole else c + PIECE)
        for c in range(0, classes, classes if whole else PIECE)
    ]
    for part in (slice(start, start + len(logits)) for start in range(0, len(x), len(logits))):
        taken = x[part].where(kept[part, None], 0)  # 0 * NaN would be NaN
        s, t, g = (z[: len(taken)] for z in (logits, taught, gradient))
        for c in pieces:
            _add_product(s[:, c], taken, weight[c].t(), beta=0)
            _add_product(t[:, c], teacher_x[part], teacher_weight[c].t(), beta=0)
        for z, added in ((s, bias), (t, teacher_bias)):
            if added is not None:
                z += added
        forward = (
            partial(parallel.forward, shard=shard) if shard else loss.implementation(s, t).forward
        )
        filled = loss._logits(g) if any(wanted) else None
        losses[part] = forward(
            loss._logits(s), loss._logits(t), target[part][None], options, filled
        )[0]
        if upstream is not None:
            g.mul_(upstream[part, None])
        for c in pieces if wanted[0] else ():
            _add_product(found[0][part], g[:, c], weight[c])
        if wanted[1]:
            _add_product(found[1], g.t(), taken)
        if wanted[2]:
            found[2] += g.sum(0, dtype=dtype)
    if shard and wanted[0]:
        torch.distributed.all_reduce(found[0], group=shard.group)
    return losses, found


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, upstream, wanted, reduction = arguments[:7], arguments[7], arguments[8], arguments[-1]
    dtype = (
        torch.float64 if torch.float64 in (tensors[0].dtype, tensors[3].dtype) else torch.float32
    )
    losses = tensors[6].new_empty(tensors[6].shape if reduction == "none" else (), dtype=dtype)
    if reduction == "none" and upstream is None:
        return (
            losses,
            torch.empty_like(tensors[3]),
            torch.empty_like(tensors[6]),
            losses.new_empty(0),
        )
    return losses, *(
        x.new_empty(x.shape, dtype=loss._kept_dtype(x)) if want else losses.new_empty(0)
        for x, want in zip(tensors[:3], wanted)
    )


class _LinearWSL(Function):
    """As `loss._WSL`, of three inputs."""

    jvp = staticmethod(loss._refuse_transform)  # type: ignore[assignment]

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.arguments, ctx.later = arguments[8:], arguments[-1] == "none"
        ctx.plain, ctx.dtypes = (
            loss._plain(*arguments[:2]),
            [x if x is None else x.dtype for x in arguments[:3]],
        )
        with torch._C._AutoDispatchBelowAutograd():
            found, *kept = torch.ops.weighted_soft_labels.linear_loss(*arguments)
        inputs = arguments[:3] + arguments[4:6] if ctx.later else ()
        ctx.save_for_backward(
            *kept, *(x.clone() if x is not None and x.is_inference() else x for x in inputs)
        )
        return found, *kept

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, *second: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        loss._check_incoming(upstream, *second)
        if upstream is None:
            return (None,) * (8 + len(ctx.arguments))
        found = ctx.saved_tensors
        if ctx.later:
            teacher_x, target, _, *student, teacher_weight, teacher_bias = found
            tensors = *student, teacher_x, teacher_weight, teacher_bias, target
            with torch._C._AutoDispatchBelowAutograd():
                _, *found = torch.ops.weighted_soft_labels.linear_loss(
                    *tensors, upstream, *ctx.arguments
                )
            if torch.is_grad_enabled():
                found = [
                    gradient + teacher_x[:0].sum() for gradient in found
                ]  # of nothing, to tie it to the student
        else:
            found = [loss._scaled(gradient, upstream, ctx.plain) for gradient in found]
        found = (
            g.to(d) if want else None for g, d, want in zip(found, ctx.dtypes, ctx.arguments[0])
        )
        return *found, *(None,) * (5 + len(ctx.arguments))


def _autograd(*arguments: Any) -> Any:
    if torch._C._are_functorch_transforms_active():
        loss._refuse_transform()
    grad = torch.is_grad_enabled()
    wanted = [
        w or (grad and x is not None and x.requires_grad) for w, x in zip(arguments[8], arguments)
    ]
    return _LinearWSL.apply(*arguments[:8], wanted, *arguments[9:])


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor teacher_x, Tensor teacher_weight, Tensor? teacher_bias"
_SETTINGS = "Tensor target, Tensor? upstream, bool[] wanted, ScalarType? product, int chunk_size, str? group"
_SCHEMA = f"{_TENSORS}, {_SETTINGS}, {loss._OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
loss.define("linear_loss", _SCHEMA, _run, _fake, _autograd)
