"""The loss from hidden states: the last linear layers and the loss, by chunks of rows.

For each chunk of rows we compute the logits of both models, the loss and its gradient, and add the
chunk's share to the gradients of input, weight and bias. The full logits never exist. The loss of
a chunk is computed by the backend that `wsl_loss` would use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from weighted_soft_labels import _operator, backends, parallel
from weighted_soft_labels._options import (
    Options,
    balances,
    check_kind,
    check_options,
    in_memory,
    signed,
    to_float,
    to_int,
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
    balance: bool = False,
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
        temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance: See
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
    options = Options(
        temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance
    )
    scales = student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap
    settings = Settings(*scales, chunk_size, name)
    checks = student, teacher, target, options, settings
    options, settings = parallel.checked(name, _check, *checks)
    shape, rows = target.shape, target.numel()
    operator = torch.ops.weighted_soft_labels.linear_loss.default
    tensors = student.tensors(rows), [x.detach() for x in teacher.tensors(rows)]
    target = target.detach().reshape(rows)
    loss: Tensor = operator(*tensors, target, None, [False] * 3, *options, *settings)[0]
    return loss.view(shape) if reduction == "none" else loss


class Head(NamedTuple):
    """The last layer of a model and what goes into it."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def tensors(self, rows: int) -> list[Tensor]:
        """Return the tensors that are there, with inputs of (rows, H)."""
        flat = self.input.reshape(rows, self.weight.shape[1])
        return [x for x in (flat, self.weight, self.bias) if x is not None]


class Settings(NamedTuple):
    """What `linear_wsl_loss` takes beside tensors and the options of the loss."""

    student_scale: float
    teacher_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    chunk_size: int | None
    group: str | None
    product: torch.dtype | None = None  # of the matrix products under autocast
    backend: str = "auto"  # what `use_backend` forced when code was compiled


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
    if chunk_size is not None:
        chunk_size = to_int("chunk_size", chunk_size)
        if not 1 <= chunk_size < 2**63:
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
    student_scale, teacher_scale, *caps = scales
    forced = backends.forced()
    return Settings(
        student_scale, teacher_scale, caps[0], caps[1], chunk_size, group, product, forced
    )


def _positive(name: str, value: Any) -> float:
    number = to_float(name, value)
    if not 1e-15 <= number <= 1e15:  # their squares fit into float32
        raise ValueError(f"{name} must be finite and > 0, from 1e-15 to 1e15, got {value!r}")
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
    """Memory for one chunk, (rows, C). The gradient may have the memory of the student's logits."""

    student: Tensor
    gradient: Tensor
    teacher: Tensor

    def part(self, rows: slice) -> Buffers:
        return Buffers(*(x[rows] for x in self))


def buffers_of(
    student: Head, settings: Settings, largest: int, dtype: torch.dtype, of_teacher: bool = True
) -> Buffers:
    """Return memory for the student's logits, their gradient and, if asked, the teacher's logits.

    `largest` is the largest number of classes of a process.
    """
    rows, width = student.input.shape
    # Kernels on a GPU read logits again after they have begun the gradient. A softcap needs them
    # after the gradient. Otherwise the gradient takes the place of the student's logits.
    separate = student.input.is_cuda or settings.student_softcap is not None
    # The range of float16 is too small for a gradient.
    half = _sums(student.input) and student.input.dtype == torch.bfloat16
    size = settings.chunk_size
    if size is None:
        numerator = 34 if student.weight.element_size() == 2 else 72
        copies = 3 if separate else 2
        size = max(numerator * width // 64 // copies, 2**21 // max(1, largest))
    number = 1 + of_teacher + (separate and not half)
    shape = number, max(1, min(rows, size)), len(student.weight)
    # In one piece: of large ones, not of small ones, the memory returns to the system on a CPU.
    buffers = student.input.new_empty(shape, dtype=dtype)
    if half:
        gradient = torch.empty_like(buffers[0], dtype=torch.bfloat16)
    else:
        gradient = buffers[1 if separate else 0]
    return Buffers(buffers[0], gradient, buffers[-1])


def accumulate(
    student: Head,
    kept: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    options: Options,
    settings: Settings,
    buffers: Buffers,
    loss_of: Callable[[slice, Buffers, Options, bool, Tensor | None], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of every row, and the gradients of their sum weighted by `upstream`.

    Args:
        kept: Rows that are not ignored, (N,).
        loss_of: Takes a slice of rows, the buffers with the student's logits of these rows, the
            options, whether to fill the buffers' gradient, and the scale of the weights. Returns
            what a backend returns for reduction "none" or "terms".
    """
    losses = buffers.student.new_empty(len(kept))
    totals = [
        losses.new_empty(x.shape if x is not None and want else 0)
        for x, want in zip(student, wanted)
    ]
    weight_scale = None
    if balances(options):
        weights, terms = torch.empty_like(losses), options._replace(reduction="terms")
        for part, chunk, _ in _chunks(student, kept, settings, buffers):
            weights[part] = loss_of(part, chunk, terms, False, None)[2]
        weight_scale = eager.balancing_scale(weights, kept.sum())
    cap, of_rows = settings.student_softcap, options._replace(reduction="none")
    for part, chunk, head in _chunks(student, kept, settings, buffers):
        losses[part] = loss_of(part, chunk, of_rows, any(wanted), weight_scale)
        if not any(wanted):
            continue
        gradient = chunk.gradient
        if upstream is not None:
            gradient.mul_(upstream[part, None].where(kept[part, None], 0))
        if cap is not None:  # the derivative of cap * tanh(x / cap)
            gradient.mul_(chunk.student.square_().mul_(-1 / cap**2).add_(1))
        _add_gradients(totals, wanted, head, gradient, part)
    if len(kept) == 0:
        totals = [total.zero_() for total in totals]
    return losses, totals


def _chunks(
    student: Head, kept: Tensor, settings: Settings, buffers: Buffers
) -> Iterator[tuple[slice, Buffers, Head]]:
    """Yield a slice of rows, buffers with the student's logits of these rows, and their inputs."""
    size, rows = len(buffers.student), len(kept)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        chunk = buffers.part(slice(rows - start))
        # The gradient of an ignored row is 0, but 0 * NaN would be NaN.
        head = student._replace(input=student.input[part].where(kept[part, None], 0))
        _form_logits(chunk.student, head, settings.student_scale, settings.student_softcap)
        yield part, chunk, head


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
    student: list[Tensor],
    teacher: list[Tensor],
    target: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    *others: Any,
) -> tuple[Tensor, ...]:
    """Return loss, scale (none) and gradients. Reduction "none" has them for `upstream` alone."""
    options, settings = split(others)
    heads = parallel.checked(settings.group, _in_memory, student, teacher, target)
    target = signed(heads.pop()).long()
    own, other = (cast(head, settings.product) for head in heads)
    classes = len(own.weight), len(other.weight)
    shard, largest = None, classes[0]
    if settings.group is not None:
        dtypes = [x.dtype for x in student + teacher]
        width, unlike = student[0].shape[1], settings._replace(group=None)
        agreed = options, unlike, dtypes, width, wanted[0], upstream is None
        shard, largest = parallel.join(
            settings.group, target, classes, options.ignore_index, agreed
        )
    dtype = torch.promote_types(student[0].dtype, teacher[0].dtype)
    dtype = torch.promote_types(dtype, torch.float32)

    def loss_of(
        part: slice, chunk: Buffers, of_rows: Options, filled: bool, weight_scale: Tensor | None
    ) -> Tensor:
        s, g, t = chunk
        teacher_rows = other._replace(input=other.input[part])
        _form_logits(t, teacher_rows, settings.teacher_scale, settings.teacher_softcap)
        run = partial(eager.run, shard=shard)
        if shard is None:
            run = backends.choose(s, t, target[part], settings.backend).run
        return run(s, t, target[part], of_rows, g if filled else None, weight_scale)

    kept = target != options.ignore_index
    buffers = buffers_of(own, settings, largest, dtype)
    losses, totals = accumulate(own, kept, upstream, wanted, options, settings, buffers, loss_of)
    del buffers  # before a gradient is converted
    if shard is not None and wanted[0]:
        shard.all_reduce(totals[0])
    return finished(losses, totals, student, target, wanted, options, settings)


def split(others: tuple[Any, ...]) -> tuple[Options, Settings]:
    last = len(Options._fields)
    return Options(*others[:last]), Settings(*others[last:])


def _in_memory(student: list[Tensor], teacher: list[Tensor], target: Tensor) -> list[Any]:
    heads = head_in_memory("student", student), head_in_memory("teacher", teacher)
    return [*heads, in_memory("target", target)]


def head_in_memory(name: str, tensors: list[Tensor]) -> Head:
    return Head(*(in_memory(f"{name}_{field}", x) for field, x in zip(Head._fields, tensors)))


def cast(head: Head, product: torch.dtype | None) -> Head:
    """Return input and weight in the dtype in which autocast multiplies matrices."""
    if product is None or head.input.dtype == torch.float64:
        return head
    return head._replace(input=head.input.to(product), weight=head.weight.to(product))


def finished(
    losses: Tensor,
    totals: list[Tensor],
    student: list[Tensor],
    target: Tensor,
    wanted: list[bool],
    options: Options,
    settings: Settings,
) -> tuple[Tensor, ...]:
    """Return what the operator returns, of the losses of rows and the gradients of their sum."""
    mean = options.reduction == "mean"
    count = (target != options.ignore_index).sum().to(losses.dtype)
    if mean or settings.student_scale != 1:
        divisor = (count.clamp(min=1) if mean else 1) / settings.student_scale
        totals = [total.div_(divisor) for total in totals]
    for i, x in enumerate(student):
        if wanted[i]:
            totals[i] = totals[i].to(_saved_dtype(x))
    if options.reduction != "none":
        losses = losses.sum() / count if mean else losses.sum()
    return losses, losses.new_empty(0), *totals


def _saved_dtype(x: Tensor) -> torch.dtype:
    """float16 would underflow before a gradient scaler multiplies the gradient."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _fake(
    student: list[Tensor],
    teacher: list[Tensor],
    target: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    *others: Any,
) -> tuple[Tensor, ...]:
    options, _ = split(others)
    shape = target.shape if options.reduction == "none" else ()
    wide = torch.float64 in (student[0].dtype, teacher[0].dtype)
    loss = target.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    gradients = [loss.new_empty(0) for _ in range(3)]
    for i, x in enumerate(student):
        if wanted[i]:
            gradients[i] = loss.new_empty(x.shape, dtype=_saved_dtype(x))
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
        teacher: list[Tensor],
        target: Tensor,
        wanted: list[bool],
        others: Any,
        *student: Tensor,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss: Tensor = operator(list(student), teacher, target, None, [False] * 3, *others)[0]
            copies = torch.ops.weighted_soft_labels.copies([*student, *teacher, target])
        ctx.operator, ctx.parameters = operator, len(student)
        ctx.wanted, ctx.others = wanted, others
        ctx.save_for_backward(loss, *copies)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _operator.refuse_batched(upstream)
        loss, *tensors, target = ctx.saved_tensors
        student, teacher = tensors[: ctx.parameters], tensors[ctx.parameters :]
        with torch._C._AutoDispatchBelowAutograd():
            outputs = ctx.operator(student, teacher, target, upstream, ctx.wanted, *ctx.others)
        results: list[Tensor | None] = [None] * len(student)
        for i, x in enumerate(student):
            if ctx.wanted[i]:
                results[i] = outputs[2 + i].to(x.dtype)
                if torch.is_grad_enabled():
                    refuse = _operator.RefuseSecondDerivative.apply
                    results[i] = refuse(results[i], loss, upstream)
        return None, None, None, None, None, *results


def _autograd(
    operator: Any,
    student: list[Tensor],
    teacher: list[Tensor],
    target: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    *others: Any,
) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():
        _operator.refuse_transforms()
    grad = torch.is_grad_enabled()
    requires = [grad and x.requires_grad for x in student] + [False]
    wanted = [want or required for want, required in zip(wanted, requires)]
    options, _ = split(others)
    if options.reduction == "none" and upstream is None and any(wanted):
        loss = Recomputed.apply(operator, teacher, target, wanted, others, *student)
        return loss, *(loss.new_empty(0) for _ in range(4))

    def of_parameters(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        return operator([x, weight] if bias is None else [x, weight, bias], *rest)

    bias = student[2] if len(student) > 2 else None
    outputs: tuple[Tensor, ...] = _operator.SavedGradients.apply(
        of_parameters, student[0], student[1], bias, teacher, target, upstream, wanted, *others
    )
    return outputs


def define(name: str, forward: Any) -> None:
    """Register an operator of the student's last layer and `teacher`, a head or something else."""
    schema = (
        "Tensor[] student, Tensor[] teacher, Tensor target, Tensor? upstream, bool[] wanted, "
        f"{_operator.OPTIONS}, float student_scale, float teacher_scale, float? student_softcap, "
        "float? teacher_softcap, int? chunk_size, str? group, ScalarType? product, "
        'str backend="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
    )
    _operator.define(name, schema, forward, _fake, _autograd)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def _no_autograd(operator: Any, tensors: list[Tensor]) -> list[Tensor]:
    return _copies(tensors)


define("linear_loss", _forward)
# An operator, so that a compiler cannot replace the copies by the tensors that they are copies of.
_operator.define("copies", "Tensor[] x) -> Tensor[]", _copies, _copies, _no_autograd)
