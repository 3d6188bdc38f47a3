"""The loss from stored teacher outputs: the k likeliest classes of every row instead of all logits.

The classes that are not kept, R, count as one class. Its logit is the logsumexp over R. So the loss
of a row is the loss of k + 1 classes, and the gradient of the last one is shared by R in the
proportions of the student's softmax over R:

    statistics  r = softmax(s / T) over R, and the logsumexp over R, from which S_R follows
    combine     CE_s and soft from the log-probabilities of k + 1 classes
                weight = -expm1(-CE_s / (-label_log_prob + 1e-7))
                loss = hard_weight * CE_s + alpha * T^2 * weight * soft
    gradient    on K: hard_weight * (p_j - 1 at the label) + alpha * T * weight * (S_j - q_j)
                on R: hard_weight * p_j + alpha * T * weight * r_j * (S_R - q_R)

A chunk of rows is copied to where its gradient will be, and every later pass reads the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weighted_soft_labels import _operator, linear
from weighted_soft_labels._options import (
    DTYPES,
    Options,
    check_kind,
    check_options,
    in_memory,
    signed,
)
from weighted_soft_labels.backends import eager

__all__ = [
    "CachedTeacher",
    "cached_linear_wsl_loss",
    "cached_wsl_loss",
    "compress",
    "from_topk",
]

STORED = (torch.float16, torch.bfloat16, torch.float32)
# Rounding to bfloat16 moves a log-probability of -16 by 0.03. A wrong temperature moves more.
SLACK = 0.1
BLOCK = 2**21  # logits at a time on a CPU, so that the six passes over them read the cache


class CachedTeacher(NamedTuple):
    """What a student needs of the teacher. Any store and any collate function keep it together.

    Fields:
        index: ``(..., k)``, int32 or int64. Column 0 is the label, whether or not the label is
            among the k likeliest classes.
        log_prob: ``(..., k)``, floating point: log-probabilities over all classes, at temperature
            1. Entries of -inf after column 0 are padding; their index may be anything. The masses
            of a class that stands twice are added.
        label_log_prob: ``(...)``, float32, at temperature 1. Half precision would change the
            weight by up to 0.07.
        log_rest: ``(...)``, float32: logsumexp of log_prob / T over the classes that are not kept.
            -inf stands for none. Then the loss renormalises the teacher over the kept classes.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name
    log_prob: Tensor
    label_log_prob: Tensor
    log_rest: Tensor


def cached_wsl_loss(
    student_logits: Tensor,
    cached: CachedTeacher,
    target: Tensor,
    *,
    temperature: float,
    alpha: float = 2.5,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    balance: bool = False,
) -> Tensor:
    r""":func:`weighted_soft_labels.wsl_loss` with a stored teacher.

    With q the softmax of ``(log_prob / T, log_rest)``, S the student's softmax at T, K the kept
    classes and R the others::

        soft   = -sum_K q_j log S_j - q_R log S_R            S_R is the sum of S over R
        weight = 1 - exp(-CE_s / (-label_log_prob + 1e-7))

    The loss equals ``wsl_loss`` where all classes, or all but one, are kept. Otherwise ``soft`` is
    at most that of ``wsl_loss``, and the gradient is the one of a teacher whose probabilities on R
    have the student's proportions.

    Args:
        student_logits: ``(..., C)``, classes last; float16, bfloat16, float32 or float64.
        cached: :class:`CachedTeacher` with the rows of the student.
        target: Class indices in [0, C), ``(...)``, any integer dtype.
        temperature: T > 0, for which ``log_rest`` was computed. There is no default, because a
            cache fits one temperature.
        alpha, hard_weight, label_smoothing, ignore_index, reduction, balance: See :func:`wsl_loss`.
            An ignored row of the cache may hold anything.

    Returns:
        A scalar, or for ``"none"`` a tensor shaped like the target. float32, or float64 if the
        student's logits are float64.

    Raises:
        TypeError, RuntimeError, NotImplementedError: As :func:`wsl_loss`.
        ValueError: As :func:`wsl_loss`. Also for a cache of other rows or on another device, and
            on a CPU for log-probabilities that contradict the temperature or the label's.
        IndexError: On a CPU, an index names no class, or a row's column 0 is not its target: the
            cache is misaligned. On a GPU, where looking would mean waiting, the loss and the
            gradient of that row are NaN.

    Example:
        >>> import torch
        >>> from weighted_soft_labels.cached import cached_wsl_loss, compress
        >>> teacher_logits = torch.tensor([[3.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
        >>> target = torch.tensor([0, 1])
        >>> cached = compress(teacher_logits, target, k=2, temperature=1.0)
        >>> student_logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
        >>> loss = cached_wsl_loss(student_logits, cached, target, temperature=1.0)
        >>> loss.backward()
        >>> print(f"{loss.item():.3f}")
        1.388
    """
    options = check_options(
        Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance)
    )
    _check_logits("student_logits", student_logits, target)
    cached = _check_cached(student_logits, cached)
    rows, shape = target.numel(), target.shape
    student = student_logits.reshape(rows, student_logits.shape[-1])
    target, cached = target.detach().reshape(rows), _flat(cached)
    if _operator.unobserved(student, *cached, target):
        teacher = _prepare([*cached], target, student.shape[1], student.dtype, options)
        run = partial(_run, teacher)
        backend: Any = SimpleNamespace(run=run)
        loss = _operator.run_eagerly(student, student.detach(), target, options, backend)
    else:
        operator = torch.ops.weighted_soft_labels.cached_loss.default
        loss = _operator.dispatch(operator, student, [*cached], target, *options)
    return loss.view(shape) if reduction == "none" else loss


def cached_linear_wsl_loss(
    student_input: Tensor,
    student_weight: Tensor,
    cached: CachedTeacher,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    temperature: float,
    chunk_size: int | None = None,
    alpha: float = 2.5,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    balance: bool = False,
) -> Tensor:
    """:func:`cached_wsl_loss` of the student's last linear layer, without all of its logits.

    Args:
        student_input: Hidden states, ``(..., H)``, floating point.
        student_weight: ``(C, H)``, in the dtype of the input; under autocast any.
        cached, target, temperature: See :func:`cached_wsl_loss`.
        student_bias, student_logit_scale, student_softcap, chunk_size: See
            :func:`weighted_soft_labels.linear.linear_wsl_loss`.
        alpha, hard_weight, label_smoothing, ignore_index, reduction, balance: See :func:`wsl_loss`.

    Returns:
        That loss. Logits, loss and the sums of gradients are float32, or float64 if the inputs are.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, NotImplementedError: As
            :func:`cached_wsl_loss`. torch.func is not supported.
    """
    options = check_options(
        Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance)
    )
    scales = student_logit_scale, 1.0, student_softcap, None
    settings = linear.check_settings(linear.Settings(*scales, chunk_size, None), target)
    student = linear.Head(student_input, student_weight, student_bias)
    logits = linear.check_head("student", student, settings.product, False)
    _check_logits("student_logits", logits, target)
    cached = _flat(_check_cached(logits, cached))
    shape, rows = target.shape, target.numel()
    operator = torch.ops.weighted_soft_labels.cached_linear_loss.default
    target = target.detach().reshape(rows)
    tensors = student.tensors(rows), [*cached], target
    loss: Tensor = operator(*tensors, None, [False] * 3, *options, *settings)[0]
    return loss.view(shape) if reduction == "none" else loss


def compress(
    teacher_logits: Tensor,
    target: Tensor,
    k: int,
    *,
    temperature: float,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float16,
) -> CachedTeacher:
    """Keep the label and the likeliest other classes of every row, k classes in all.

    Args:
        teacher_logits: ``(..., C)``, classes last, floating point.
        target: Class indices in [0, C), ``(...)``.
        k: In [1, C]. The stored rows take ``k * (4 + bytes of dtype) + 8`` bytes each.
        temperature: T > 0 of the loss that will use the cache.
        ignore_index: Rows with this target are padding; their numbers have no meaning.
        dtype: Of ``log_prob``. Default float16.

    Returns:
        :class:`CachedTeacher` with int32 ``index``.

    Raises:
        TypeError, ValueError, IndexError: As :func:`cached_wsl_loss`.
    """
    settings = check_options(Options(temperature, ignore_index=ignore_index))
    _check_logits("teacher_logits", teacher_logits, target)
    rows, classes = target.numel(), teacher_logits.shape[-1]
    if type(k) is not int or not 1 <= k <= classes:
        raise ValueError(f"k must be an int in [1, {classes}] (classes), got {k!r}")
    if dtype not in STORED:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    logits = teacher_logits.detach().reshape(rows, classes)
    label = signed(target.detach()).reshape(rows).long()
    eager.count(label, classes, settings.ignore_index)
    wrong = (label != settings.ignore_index) & ((label < 0) | (label >= classes))
    label = label.clamp(0, classes - 1).unsqueeze(1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    index = logits.new_empty((rows, k), dtype=torch.int32)
    log_prob = logits.new_empty((rows, k), dtype=dtype)
    label_log_prob, log_rest = logits.new_empty((2, rows), dtype=torch.float32)
    for part in _blocks(rows, classes, logits):
        places, values, bucket = _compressed(
            logits[part].to(wide), label[part], k, settings.temperature
        )
        index[part], log_prob[part], log_rest[part] = places, values, bucket
        label_log_prob[part] = values[:, 0]
    label_log_prob.masked_fill_(wrong, math.nan)
    shape = target.shape
    return CachedTeacher(
        index.view(*shape, k),
        log_prob.view(*shape, k),
        label_log_prob.view(shape),
        log_rest.view(shape),
    )


def from_topk(
    index: Tensor,
    log_prob: Tensor,
    target: Tensor,
    *,
    label_log_prob: Tensor | None = None,
    ignore_index: int = -100,
) -> CachedTeacher:
    """Convert the log-probabilities that inference servers return, for T = 1.

    The label is moved to column 0. A second entry of the label, as in vLLM's tensors of the
    prompt's own token followed by the top k, becomes padding. ``log_rest`` is the logarithm of
    1 - sum, for lack of other numbers, so it has few digits where the sum is close to 1.

    Args:
        index: ``(..., k)``, int32 or int64; any index where ``log_prob`` is -inf.
        log_prob: ``(..., k)``: log-probabilities over all classes at temperature 1.
        target: Class indices, ``(...)``.
        label_log_prob: ``(...)``: the label's, if the label need not be among the entries. Then
            the result has one column more.
        ignore_index: Rows with this target may hold anything.

    Returns:
        :class:`CachedTeacher` with the dtypes of ``index`` and ``log_prob``.

    Raises:
        TypeError: ``log_prob`` is in half precision and there is no ``label_log_prob``.
        ValueError: A row has no entry for its label, on any device, or numbers that are no
            log-probabilities.
    """
    _check_topk(index, log_prob, target, label_log_prob)
    target, log_prob = signed(target.detach()).long(), log_prob.detach()
    kept = target != _ignored(ignore_index)
    label = target.where(kept, index[..., 0]).to(index.dtype).unsqueeze(-1)
    of_label = (index == label) & (log_prob != -math.inf)
    if label_log_prob is None:
        at = of_label.to(torch.uint8).argmax(-1, keepdim=True)
        label_log_prob = log_prob.gather(-1, at)[..., 0].where(kept, 0.0)
        _refuse_rows(
            kept & ~of_label.any(-1),
            "have no entry for their label: ask the server for the target's own log-probability "
            "(vLLM: prompt_logprobs), pass label_log_prob, or set their target to ignore_index",
        )
        index = index.scatter(-1, at, index[..., :1])[..., 1:]
        log_prob = log_prob.scatter(-1, at, log_prob[..., :1])[..., 1:]
    label_log_prob = label_log_prob.detach()
    again = (index == label) & (log_prob != -math.inf)
    _refuse_rows(
        kept & (again & _contradict(log_prob, label_log_prob.unsqueeze(-1))).any(-1),
        "have entries of the label that contradict its log-probability: the two are of different "
        "positions or temperatures",
    )
    log_prob = log_prob.masked_fill(index == label, -math.inf)
    index = torch.cat((label, index), -1)
    log_prob = torch.cat((label_log_prob.unsqueeze(-1).to(log_prob.dtype), log_prob), -1)
    exact = log_prob.double()
    exact[..., 0] = label_log_prob
    total = exact.exp().sum(-1)
    _refuse_rows(
        kept & ((total > 1 + SLACK) | total.isnan()),
        "have entries whose probabilities add up to more than 1, or NaN: log_prob must hold "
        "log-probabilities over all classes at temperature 1, not logits",
    )
    log_rest = torch.log1p(-total.clamp(max=1)).where(kept, 0.0)
    return CachedTeacher(index, log_prob, label_log_prob.float(), log_rest.float())


# --- compression ---


def _compressed(
    logits: Tensor, label: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return classes and log-probabilities (b, k), the label's first, and the bucket's (b,)."""
    log = _softmax(logits).log
    # The label is below all others, so that topk does not return the label even among -inf.
    lowest = torch.finfo(log.dtype).min
    others = log.clamp(min=lowest).scatter_(1, label, -math.inf)
    place = torch.cat((label, others.topk(k - 1, 1).indices), 1)
    values = log.gather(1, place)
    bucket = (log / temperature).scatter_(1, place, -math.inf).logsumexp(1)
    return place, values, bucket


def _check_topk(
    index: Tensor, log_prob: Tensor, target: Tensor, label_log_prob: Tensor | None
) -> None:
    tensors = {"index": index, "log_prob": log_prob, "target": target}
    if label_log_prob is not None:
        tensors["label_log_prob"] = label_log_prob
    for name, x in tensors.items():
        check_kind(name, x)
        if x.device != index.device:
            raise ValueError(
                f"{name} must be on the device of index, {index.device}, got {x.device}"
            )
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold class indices (an integer dtype), got {target.dtype}")
    precise = "log_prob" if label_log_prob is None else "label_log_prob"
    if log_prob.dtype not in DTYPES or tensors[precise].dtype not in DTYPES[2:]:
        raise TypeError(
            f"{precise} must be float32 or float64, as in half precision the weight would be off "
            f"by up to 0.07, got {tensors[precise].dtype} (log_prob {log_prob.dtype})"
        )
    rows = index.shape[:-1]
    fits = index.dim() and index.shape[-1] and log_prob.shape == index.shape
    if not fits or any(x.shape != rows for x in list(tensors.values())[2:]):
        raise ValueError(
            "index and log_prob must be (..., k), target and label_log_prob (...), got "
            f"{[tuple(x.shape) for x in tensors.values()]}"
        )


def _ignored(ignore_index: int) -> int:
    return check_options(Options(ignore_index=ignore_index)).ignore_index


def _refuse_rows(wrong: Tensor, message: str) -> None:
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise ValueError(f"{int(wrong.sum())} rows, the first at {first}, {message}")


# --- checks of the loss ---


def _check_logits(name: str, logits: Tensor, target: Tensor) -> None:
    check_kind(name, logits)
    check_kind("target", target)
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    kind = target.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise TypeError(f"target must hold class indices (an integer dtype), got {kind}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} must be (..., C) with at least one class, got shape {tuple(logits.shape)}"
        )
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must be {tuple(logits.shape[:-1])} for {name} of {tuple(logits.shape)}, "
            f"classes last, got {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(
            f"target must be on the device of {name}, {logits.device}, got {target.device}"
        )


def _check_cached(logits: Tensor, cached: CachedTeacher) -> CachedTeacher:
    """Check kinds, dtypes, shapes and devices; return the cache without its graph."""
    if not isinstance(cached, tuple) or len(cached) != len(CachedTeacher._fields):
        raise TypeError(
            "cached must be a CachedTeacher (index, log_prob, label_log_prob, log_rest), "
            f"got {type(cached).__name__}"
        )
    index, log_prob, label_log_prob, log_rest = cached
    wide = torch.float32, torch.float64
    integers = torch.int32, torch.int64
    advice = ": in half precision the weight would be off by up to 0.07; store float32"
    _check_field("index", index, integers, logits, "")
    _check_field("log_prob", log_prob, DTYPES, logits, "")
    _check_field("label_log_prob", label_log_prob, wide, logits, advice)
    _check_field("log_rest", log_rest, wide, logits, ": store float32")
    rows, classes = logits.shape[:-1], logits.shape[-1]
    k = index.shape[-1] if index.dim() else 0
    shapes = (*rows, k), (*rows, k), tuple(rows), tuple(rows)
    for name, x, shape in zip(CachedTeacher._fields, cached, shapes):
        if x.shape != shape:
            raise ValueError(
                f"cached.{name} must be {shape} for student logits of {tuple(logits.shape)}, got "
                f"{tuple(x.shape)}: pass the cache of these rows"
            )
    if not 1 <= k <= classes:
        raise ValueError(f"cached.index must have 1 to {classes} columns (classes), got {k}")
    return CachedTeacher(*(x.detach() for x in cached))


def _check_field(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], logits: Tensor, advice: str
) -> None:
    check_kind(f"cached.{name}", x)
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"cached.{name} must be {names}, got {x.dtype}{advice}")
    if x.device != logits.device:
        raise ValueError(
            f"cached.{name} must be on the student's device, {logits.device}, got {x.device}: "
            "move the cache with its batch"
        )


def _flat(cached: CachedTeacher) -> CachedTeacher:
    rows, k = cached.label_log_prob.numel(), cached.index.shape[-1]
    index, log_prob = cached.index.reshape(rows, k), cached.log_prob.reshape(rows, k)
    return CachedTeacher(
        index, log_prob, cached.label_log_prob.reshape(rows), cached.log_rest.reshape(rows)
    )


# --- the teacher ---


class Softmax(NamedTuple):
    """The softmax of rows (N, k + 1). Its probabilities are ``less + ones``."""

    top: Tensor  # the maximum, (N, 1)
    others: Tensor  # sum of exp(z) without the top class, (N, 1)
    log: Tensor
    less: Tensor  # the probabilities, less 1 at the top class of rows that are sure
    ones: Tensor  # 1 there, else 0


class Teacher(NamedTuple):
    """What the loss needs of the cache, one entry per row."""

    place: Tensor  # (N, k): class of every column; padding points to the label
    column: Tensor  # (N, k): the one column that stands for this class
    unique: Tensor  # (N, k): whether a column is that one
    prob: Tensor  # (N, k + 1): q
    less: Tensor  # (N, k + 1): as those of Softmax
    ones: Tensor
    ce: Tensor  # (N, 1)
    valid: Tensor  # (N, 1): 1; 0 for an ignored row; NaN for a misaligned one

    def rows(self, part: slice) -> Teacher:
        return Teacher(*(x[part] for x in self))


def _softmax(x: Tensor) -> Softmax:
    """Leave the top class out of the sum: where a row is sure, 1 - p keeps all its digits."""
    at = x.argmax(1, keepdim=True)
    top = x.gather(1, at)
    # +inf makes a row NaN. The sum would leave out its inf - inf.
    top = top.where(top != math.inf, math.nan)
    z = x - top
    e = z.exp().scatter_(1, at, 0.0)
    others = e.sum(1, keepdim=True)
    sure = others < 1
    # In other rows the top class has at most half of the mass: less 1 it would lose digits.
    less = e.scatter_(1, at, torch.where(sure, -others, 1.0)).div_(1 + others)
    ones = torch.zeros_like(e).scatter_(1, at, sure.to(e.dtype))
    return Softmax(top, others, z - others.log1p(), less, ones)


def _prepare(
    stored: list[Tensor], target: Tensor, classes: int, student: torch.dtype, options: Options
) -> Teacher:
    """Return what the loss needs of a cache of rows (N, k), for a student of this dtype.

    Raises:
        IndexError, ValueError: On a CPU; see :func:`cached_wsl_loss`.
    """
    named = zip(CachedTeacher._fields, stored)
    cached = CachedTeacher(*(in_memory(f"cached.{name}", x) for name, x in named))
    target = signed(in_memory("target", target)).long()
    dtype = torch.promote_types(student, torch.float32)
    index = cached.index.long()
    label = target.unsqueeze(1)
    kept = label != options.ignore_index
    used = cached.log_prob != -math.inf
    used[:, 0] = True  # the label, even if the teacher rules the label out
    outside = used & ((index < 0) | (index >= classes))
    wrong = kept & (outside.any(1, keepdim=True) | (index[:, :1] != label))
    wrong |= kept & ((label < 0) | (label >= classes))
    cached = CachedTeacher(*(x.to(dtype) for x in cached))
    if index.is_cpu:
        eager.count(target, classes, options.ignore_index)
        _check_indices(index, label, kept, outside)
        _check_numbers(cached, kept[:, 0], classes, options.temperature)
    usable = used & kept & ~outside
    place = index.where(usable, label.clamp(0, classes - 1))
    place[:, :1].copy_(label.clamp(0, classes - 1))
    column = _columns(place, classes)
    log_prob = cached.log_prob.where(usable, -math.inf)
    log_prob[:, :1] = cached.log_prob[:, :1].where(kept, 0.0)
    unique = column == torch.arange(column.shape[1], device=column.device)
    log_rest = cached.log_rest.unsqueeze(1).where(kept, 0.0)
    # No classes remain: what a producer wrote for them is rounding.
    log_rest = log_rest.where(unique.sum(1, keepdim=True) < classes, -math.inf)
    # The label's half-precision entry stays. The float32 number in its place would lower the error
    # of q by 4 to 7 % only, as the other entries have the same error, and bias sampled counts.
    merged = _merged(log_prob / options.temperature, column, unique)
    q = _softmax(torch.cat((merged, log_rest), 1))
    ce = -cached.label_log_prob.clamp(max=0).unsqueeze(1).where(kept, 0.0)
    valid = torch.where(wrong, math.nan, kept.to(dtype))
    return Teacher(place, column, unique, q.less + q.ones, q.less, q.ones, ce, valid)


def _columns(place: Tensor, classes: int) -> Tensor:
    """Return for every column the column that stands for its class: for the label's, column 0."""
    rows, k = place.shape
    column = torch.arange(k, dtype=torch.int32, device=place.device).expand(rows, k)
    result = torch.empty_like(place)
    scratch = None
    for part in _blocks(rows, 4 * classes, place):  # four times less memory than a block of logits
        here = place[part]
        if scratch is None:
            scratch = column.new_empty((len(here), classes))
        last = scratch[: len(here)].scatter_(1, here, column[part])
        result[part] = last.scatter_(1, here[:, :1], 0).gather(1, here)
    return result


def _merged(log_prob: Tensor, column: Tensor, unique: Tensor) -> Tensor:
    """Add up the masses of equal classes, in the column that stands for the class."""
    top = log_prob.amax(1, keepdim=True).clamp(min=torch.finfo(log_prob.dtype).min)
    mass = torch.zeros_like(log_prob).scatter_add_(1, column, (log_prob - top).exp())
    return (mass.log() + top).where(unique, -math.inf)


def _check_indices(index: Tensor, label: Tensor, kept: Tensor, outside: Tensor) -> None:
    outside = kept & outside
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise IndexError(
            f"cached.index must hold classes of the student, got {int(index[row, column])} in row "
            f"{row}, column {column}: another vocabulary, or padding whose log_prob is not -inf"
        )
    wrong = kept[:, 0] & (index[:, 0] != label[:, 0])
    if wrong.any():
        row = int(wrong.int().argmax())
        raise IndexError(
            f"misaligned cache: column 0 must be the label, but row {row} has class "
            f"{int(index[row, 0])} there and target {int(label[row])} ({int(wrong.sum())} rows of "
            f"{len(wrong)} differ). The cache is shifted, shuffled or another rank's: store and "
            "load its rows together with their examples"
        )


def _check_numbers(cached: CachedTeacher, kept: Tensor, classes: int, temperature: float) -> None:
    """Raise ValueError for rows whose numbers cannot belong together."""
    _, log_prob, label_log_prob, log_rest = cached
    total = log_prob.exp().sum(1)
    # m is the mass that is not kept. A sum of n numbers p^(1/T) that add up to m lies between
    # m^(1/T) and n^(1 - 1/T) * m^(1/T).
    spread = (1 - 1 / temperature) * math.log(classes)
    least = (1 - total - SLACK).clamp(min=0).log() / temperature + min(spread, 0)
    most = (1 - total + SLACK).clamp(min=0).log() / temperature + max(spread, 0)
    some = log_rest != -math.inf
    wrong = kept & ((total > 1 + SLACK) | some & ((log_rest < least) | (log_rest > most)))
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(
            f"cached numbers contradict temperature {temperature}: in row {row} the kept classes "
            f"have mass {float(total[row]):.3f} at temperature 1 and log_rest is "
            f"{float(log_rest[row]):.3f}. log_prob must be log-probabilities at temperature 1 and "
            "log_rest must be made for the temperature of the loss: compress again"
        )
    # Sampled counts (without log_rest) differ from the label's probability by chance.
    entry = log_prob[:, 0]
    wrong = kept & some & _contradict(entry, label_log_prob)
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(
            f"cached.label_log_prob contradicts column 0 of cached.log_prob: row {row} has "
            f"{float(label_log_prob[row]):.4f} and {float(entry[row]):.4f}. Both must be the "
            "label's log-probability at temperature 1"
        )


def _contradict(entry: Tensor, label_log_prob: Tensor) -> Tensor:
    """Return whether an entry differs from the label's by more than half precision explains."""
    return (entry - label_log_prob).abs() > SLACK + 0.01 * label_log_prob.abs()


# --- a chunk of rows ---


def _blocks(rows: int, classes: int, like: Tensor) -> Iterator[slice]:
    size = BLOCK if like.is_cpu else eager.DEVICE_BLOCK
    step = max(1, size // classes)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _run(
    teacher: Teacher,
    student: Tensor,
    _: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """The loss of logits (N, C), as a backend's `run`; `teacher` is a prepared cache."""
    count = eager.count(target, None, options.ignore_index).to(teacher.valid.dtype)
    averaged = options.reduction == "mean"
    scale = teacher.valid / count.clamp(min=1) if averaged else teacher.valid
    losses = _form_rows(student, gradient, teacher, scale, options, weight_scale)
    if options.reduction in ("none", "terms"):
        return losses
    return losses.sum() / count if averaged else losses.sum()


def _form_rows(
    student: Tensor,
    gradient: Tensor | None,
    teacher: Teacher,
    scale: Tensor,
    options: Options,
    weight_scale: Tensor | None,
) -> Tensor:
    """Return the loss of every row, or its terms; `gradient` may be the student's memory."""
    rows, classes = student.shape
    dtype = teacher.prob.dtype
    shape = (4, rows) if options.reduction == "terms" else (rows,)
    losses = student.new_empty(shape, dtype=dtype)
    memory = gradient if gradient is not None and gradient.dtype == dtype else None
    scratch = None
    for part in _blocks(rows, classes, student):
        x = student[part]
        if memory is not None:
            chunk = memory[part]
        elif scratch is None:
            chunk = scratch = x.new_empty(x.shape, dtype=dtype)
        else:
            chunk = scratch[: len(x)]
        chunk.copy_(x)
        losses[..., part] = _form(
            chunk, teacher.rows(part), scale[part], options, gradient is not None, weight_scale
        )
        if gradient is not None and memory is None:
            gradient[part] = chunk
    return losses


def _form(
    logits: Tensor,
    teacher: Teacher,
    scale: Tensor,
    options: Options,
    wanted: bool,
    weight_scale: Tensor | None,
) -> Tensor:
    """Return the loss of every row, or its terms (4, b).

    If `wanted`, the gradient times `scale` replaces the logits.
    """
    classes = logits.shape[1]
    # The gradient of an ignored row is 0, but 0 * NaN would be NaN.
    _zero_rows_(logits, teacher.valid == 0)
    mean = None
    if options.label_smoothing:
        mean = logits.sub_(logits.amax(1, keepdim=True)).mean(1, keepdim=True)
    student, soft_student, tempered = _statistics_(logits, teacher, options.temperature)
    terms = _combine(student, soft_student, teacher)
    if options.reduction == "terms":
        return (torch.cat(terms, 1) * teacher.valid).t()
    if weight_scale is not None:
        terms = terms._replace(weight=terms.weight * weight_scale)
    uniform = None if mean is None else student.others.log1p() + student.top - mean
    loss = eager.loss_of(terms, uniform, options)
    if wanted:
        hard, soft = _gradients(student, soft_student, teacher, terms.weight, options)
        _spread_(logits, tempered, hard * scale, soft * scale, teacher)
        if options.label_smoothing:
            logits.sub_(scale * (options.hard_weight * options.label_smoothing / classes))
    # An ignored row has logits of 0, so its loss is finite.
    return (loss * teacher.valid)[:, 0]


def _statistics_(
    logits: Tensor, teacher: Teacher, temperature: float
) -> tuple[Softmax, Softmax, Tensor | None]:
    """Return the student's softmax at 1 and at T, each over k + 1 classes.

    The logits become their softmax over R, where R are the classes that are not kept. Also return
    that softmax at T, None for T = 1.
    """
    own = logits.gather(1, teacher.place).where(teacher.unique, -math.inf)
    logits.scatter_(1, teacher.place, -math.inf)
    top = logits.amax(1, keepdim=True)
    tempered = None if temperature == 1 else logits / temperature
    student = _softmax(torch.cat((own, _logsumexp_(logits, top)), 1))
    if tempered is None:
        return student, student, None
    bucket = _logsumexp_(tempered, top / temperature)
    return student, _softmax(torch.cat((own / temperature, bucket), 1)), tempered


def _logsumexp_(x: Tensor, top: Tensor) -> Tensor:
    """Return the logsumexp of rows with maximum `top`, and turn the rows into their softmax."""
    torch.softmax(x, 1, out=x)
    empty = top == -math.inf
    _zero_rows_(x, empty)
    return torch.where(empty, -math.inf, top - x.amax(1, keepdim=True).log())


def _zero_rows_(x: Tensor, rows: Tensor) -> None:
    if x.is_cpu:
        x.index_fill_(0, rows[:, 0].nonzero()[:, 0], 0)
    else:  # to look for the rows would be to wait for the GPU
        x.masked_fill_(rows, 0)


def _combine(student: Softmax, soft_student: Softmax, teacher: Teacher) -> eager.Terms:
    """Return the four terms of every row, (N, 1)."""
    student_ce = -student.log[:, :1]
    soft = -eager.expectation(teacher.prob, soft_student.log)
    return eager.Terms(student_ce, teacher.ce, eager.weight_of(student_ce, teacher.ce), soft)


# --- gradient ---


def _gradients(
    student: Softmax, soft_student: Softmax, teacher: Teacher, weight: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the hard and the soft term at k + 1 classes, without smoothing's.

    The 1s are added last: they cancel exactly where student, teacher and label agree.
    """
    hard = soft = torch.zeros_like(student.less)
    if options.hard_weight:
        ones = student.ones.clone()
        ones[:, :1] -= 1 - options.label_smoothing
        hard = (student.less + ones) * options.hard_weight
    if options.alpha:
        soft = (soft_student.less - teacher.less) + (soft_student.ones - teacher.ones)
        soft = soft * (options.alpha * options.temperature * weight)
    return hard, soft


def _spread_(
    logits: Tensor,
    tempered: Tensor | None,
    hard: Tensor,
    soft: Tensor,
    teacher: Teacher,
) -> None:
    """Turn softmaxes over R into the gradient: those of k + 1 classes, the last one spread."""
    total = hard + soft
    if tempered is None:
        logits.mul_(total[:, -1:])
    else:
        logits.mul_(hard[:, -1:]).addcmul_(tempered, soft[:, -1:])
    kept = total[:, :-1].gather(1, teacher.column)
    logits.scatter_(1, teacher.place, kept)


# --- the operators ---


def _forward(
    student: Tensor, cached: list[Tensor], target: Tensor, wanted: bool, *options: Any
) -> tuple[Tensor, ...]:
    teacher = _prepare(cached, target, student.shape[1], student.dtype, Options(*options))
    run = partial(_run, teacher)
    outputs = _operator.loss_and_gradient(student, student, target, wanted, Options(*options), run)
    return _operator.tensors_only(*outputs)


def _fake(
    student: Tensor, _: list[Tensor], target: Tensor, wanted: bool, *options: Any
) -> tuple[Tensor, ...]:
    return _operator.fake_forward(student, student, target, wanted, "auto", *options)


_operator.define(
    "cached_loss",
    f"Tensor student, Tensor[] cached, Tensor target, bool wanted, {_operator.OPTIONS}"
    ") -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _operator.autograd_kernel,
)


def _linear_forward(
    student: list[Tensor],
    cached: list[Tensor],
    target: Tensor,
    upstream: Tensor | None,
    wanted: list[bool],
    *others: Any,
) -> tuple[Tensor, ...]:
    """Return loss, scale (none) and gradients, as the operator of `linear_wsl_loss`."""
    options, settings = linear.split(others)
    head = linear.cast(linear.head_in_memory("student", student), settings.product)
    target = signed(in_memory("target", target)).long()
    classes = len(head.weight)
    teacher = _prepare(cached, target, classes, student[0].dtype, options)

    def loss_of(
        part: slice,
        chunk: linear.Buffers,
        of_rows: Options,
        filled: bool,
        weight_scale: Tensor | None,
    ) -> Tensor:
        rows, gradient = teacher.rows(part), chunk.gradient if filled else None
        return _form_rows(chunk.student, gradient, rows, rows.valid, of_rows, weight_scale)

    kept = target != options.ignore_index
    buffers = linear.buffers_of(head, settings, classes, teacher.valid.dtype, of_teacher=False)
    losses, totals = linear.accumulate(
        head, kept, upstream, wanted, options, settings, buffers, loss_of
    )
    del buffers  # before a gradient is converted
    return linear.finished(losses, totals, student, target, wanted, options, settings)


linear.define("cached_linear_loss", _linear_forward)
