"""Eager backend: the closed form of loss and gradient in ATen operators, for any input and device.

With the top class k (the index of one maximum), z = x - x_k, e = exp(z) and e' = exp(z / T) of
student s and teacher t:

    statistics  others = sum of e without class k, others' = sum of e' without class k
    combine     CE = log1p(others) - z_y, both terms >= 0
                weight = -expm1(-CE_s / (CE_t + 1e-7))
                soft = log1p(others'_s) - sum(e'_t * z_s) / (T * (1 + others'_t))
                loss = hard_weight * hard + alpha * T^2 * weight * soft
    gradient    hard_weight * (p_s - q) + alpha * T * weight * (p'_s - p'_t)
                with p_k - 1 = -others / (1 + others) where others < 1

If a model is sure of its top class, the sum of e is just above 1, and `others` is that sum less 1
without cancellation. The gradient adds the small numbers p_k - 1 first. The 1s of student, teacher
and label come last: 1 - 1 is exactly 0, so no small number is rounded.

The C kernel leaves out the top class, too. The Triton backend leaves out the label's class: a
kernel knows the label before it reads the logits, the top class only afterwards.

Between `statistics` and `combine`, processes with shards of the classes `merge` their statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from weighted_soft_labels._options import Options, index_shape, loss_shape

EPS = 1e-7  # of the official code: keeps the weight finite where the teacher's cross-entropy is 0
BLOCK = 2**18  # logits at a time on a CPU, so that their copies stay in the cache
DEVICE_BLOCK = 2**24  # on other devices, where a block costs about 80 launches


class Shard(NamedTuple):
    """The classes of this process among all, and how processes share statistics."""

    rank: int
    processes: int
    first: Tensor  # global index of this process's first class
    agree: Tensor  # 0-dim bool: all processes have the same rows and options
    all_reduce: Callable[[Tensor], object]  # adds up a tensor over the processes, in place


class Statistics(NamedTuple):
    """What the loss needs of a set of classes, (b, 1, r) for b batches of r rows."""

    top: Tensor  # the student's maximum
    others: Tensor  # sum of the student's exp(z) without the top class
    soft_others: Tensor  # sum of the student's exp(z / T) without the top class
    label_z: Tensor  # sum of the label's probabilities times the student's z
    teacher_top: Tensor
    teacher_others: Tensor
    teacher_soft_others: Tensor
    teacher_label_z: Tensor
    mass: Tensor  # sum of the label's probabilities; NaN if an index names no class
    dot: Tensor  # sum of the teacher's exp(z / T) times the student's z
    z_sum: Tensor  # sum of the student's z, needed for label smoothing alone
    classes: Tensor  # how many


class Top(NamedTuple):
    """The top class of every row of a block, (b, 1, r)."""

    indices: Tensor
    logit: Tensor
    here: Tensor  # 1, or 0 if the top class belongs to another process


class Label(NamedTuple):
    """The target of a block."""

    indices: Tensor | None  # (b, 1, r); None for class probabilities
    mass: Tensor  # (b, C, r); for an index (b, 1, r): 1; 0 in another shard; NaN for no class
    ignored: Tensor | None  # (b, 1, r)


def run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    weight_scale: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """The loss of these logits; see `weighted_soft_labels.backends`.

    `gradient` may be the student's memory: a block is read before its gradient is written.
    """
    if student.dim() == 2:
        student, teacher, target = batched(student), batched(teacher), batched(target)
        gradient = None if gradient is None else batched(gradient)
        loss = run(student, teacher, target, options, gradient, weight_scale, shard)
        return loss[..., 0, :] if loss.dim() else loss
    wide = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if wide else torch.float32
    shape = loss_shape(options.reduction, student.shape)
    rows = student.new_empty(shape or index_shape(student.shape), dtype=dtype)
    counted = count(target, None if shard else student.shape[1], options.ignore_index).to(dtype)
    row_share = 1 / counted if options.reduction == "mean" else torch.ones_like(counted)
    shared = None if shard is None else _shared(student, teacher, target, options, shard, rows)
    for b, r in blocks(student):
        logits = student[b, :, r].to(dtype), teacher[b, :, r].to(dtype)
        label = _label(target[b, ..., r], logits[0], options.ignore_index, shard)
        if shared is None:
            part, tops, e = statistics(*logits, label, options)
        else:
            part = Statistics(*(x[..., r] for x in shared[0]))
            tops = [Top(*(x[..., r] for x in top)) for top in shared[1]]
        terms = combine(part, options.temperature)
        if options.reduction == "terms":
            result = torch.cat(terms, 1)
        else:
            if weight_scale is not None:
                terms = terms._replace(weight=terms.weight * weight_scale)
            uniform = None
            if options.label_smoothing:
                uniform = part.others.log1p() - part.z_sum / part.classes
            result = loss_of(terms, uniform, options)
        rows[..., b, r] = _kept(result, label).movedim(1, 0)
        if gradient is not None and gradient.shape[1]:
            if shared is not None:
                e = _exponentials(logits[0], tops[0], 1.0, options.temperature)[1:]
                e += _exponentials(logits[1], tops[1], options.temperature)[1:]
            block = _gradient(e, part, tops, label, terms.weight, row_share, options)
            gradient[b, :, r] = _kept(block, label)
    if shape:
        return rows
    return rows.sum() / counted if options.reduction == "mean" else rows.sum()


def batched(x: Tensor) -> Tensor:
    """View (N, C) as (1, C, N), and (N,) as (1, N)."""
    return x.t()[None]


def multiply_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place, in the precision of `factor`, which has one entry or one per element."""
    if factor.dim() == 0:
        if gradient.is_cpu and factor.item() == 1:
            return
        if factor.dtype == gradient.dtype:
            gradient.mul_(factor)
            return
    if gradient.numel() <= BLOCK:
        # A factor without dimensions would be rounded to the gradient's dtype first.
        gradient.mul_(
            factor.unsqueeze(min(1, gradient.dim() - 1)) if factor.dim() else factor[None]
        )
        return
    matrix = gradient[None] if gradient.dim() == 1 else gradient
    rows = batched(matrix) if matrix.dim() == 2 else matrix.flatten(2)
    factors = factor.expand(index_shape(gradient.shape)).reshape(rows.shape[0], rows.shape[2])
    for b, r in blocks(rows):  # with another dtype ATen makes a copy of the whole tensor
        rows[b, :, r].mul_(factors[b, None, r])


def blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, C, R) along B and R into blocks of at most BLOCK logits, but at least one row."""
    batches, classes, rows = logits.shape
    size = (BLOCK if logits.is_cpu else DEVICE_BLOCK) // max(1, classes)
    across = max(1, min(rows, size))
    down = max(1, size // across)
    for b in range(0, batches, down):
        for r in range(0, rows, across):
            yield slice(b, b + down), slice(r, r + across)


def count(target: Tensor, classes: int | None, ignore_index: int) -> Tensor:
    """Return how many rows count in the mean, 0-dim.

    Raises:
        IndexError: On a CPU, an index names none of `classes`; None if the caller has checked.
    """
    if target.is_floating_point():
        rows = target.shape[0] * target.shape[2:].numel()
        return torch.full((), rows, device=target.device)
    index = target.long()  # compared in uint8, 156 would equal an ignore_index of -100
    kept = index != ignore_index
    if classes is not None and target.device.type == "cpu":
        outside = kept & ((index < 0) | (index >= classes))
        if outside.any():
            wrong = int(index.flatten()[outside.flatten().int().argmax()])
            raise IndexError(
                f"target must hold class indices in [0, {classes}) or "
                f"ignore_index ({ignore_index}), got {wrong}"
            )
    return kept.sum()


def balancing_scale(weight: Tensor, counted: Tensor) -> Tensor:
    """Return 1 / mean weight of the counted elements.

    NaN weights are left out, so that they do not reach other elements. The scale is finite, so that
    weights of 0 stay 0. The sum is in float64, where the number of threads does not show.
    """
    wide = weight.dtype if weight.device.type == "mps" else torch.float64
    mean = weight.nansum(dtype=wide) / counted.clamp(min=1)
    return mean.clamp(min=10 * torch.finfo(weight.dtype).tiny).reciprocal().to(weight.dtype)


def _label(target: Tensor, logits: Tensor, ignore_index: int, shard: Shard | None) -> Label:
    if target.is_floating_point():
        return Label(None, target.to(logits.dtype), None)
    index = target.long().unsqueeze(1)
    ignored = index == ignore_index
    if shard is not None:
        index = index - shard.first
    here = (index >= 0) & (index < logits.shape[1])
    mass = torch.where(here, 1.0, math.nan if shard is None else 0.0)
    return Label(index.where(here, 0), mass.to(logits.dtype), ignored)


def _kept(x: Tensor, label: Label) -> Tensor:
    return x if label.ignored is None else x.masked_fill_(label.ignored, 0)


# --- statistics ---


def statistics(
    student: Tensor, teacher: Tensor, label: Label, options: Options
) -> tuple[Statistics, list[Top], list[Tensor]]:
    """Return the statistics, the top classes, and exp(z), exp(z / T) and exp(z' / T)."""
    top, teacher_top = _top(student), _top(teacher)
    temperatures = 1.0, options.temperature
    z, e, soft = _exponentials(student, top, *temperatures)
    teacher_z, teacher_e, teacher_soft = _exponentials(teacher, teacher_top, *temperatures)
    part = Statistics(
        top=top.logit,
        others=_sum(e),
        soft_others=_sum(soft),
        label_z=_label_sum(label, z),
        teacher_top=teacher_top.logit,
        teacher_others=_sum(teacher_e),
        teacher_soft_others=_sum(teacher_soft),
        teacher_label_z=_label_sum(label, teacher_z),
        mass=_sum(label.mass),
        dot=expectation(teacher_soft, z) + z.gather(1, teacher_top.indices),
        z_sum=_sum(z) if options.label_smoothing else torch.zeros_like(top.logit),
        classes=torch.full_like(top.logit, z.shape[1]),
    )
    return part, [top, teacher_top], [e, soft, teacher_soft]


def _top(logits: Tensor) -> Top:
    # max(1) starts threads even for one row: in a forked child it hangs.
    indices = logits.argmax(1, keepdim=True)
    logit = logits.gather(1, indices)
    return Top(indices, logit, torch.ones_like(logit))


def _exponentials(logits: Tensor, top: Top, *temperatures: float) -> list[Tensor]:
    """Return z, and exp(z / T) for every temperature, 0 at the top class."""
    # A shard may have only masked classes. -inf less -inf would be NaN.
    z = logits - top.logit.clamp(min=torch.finfo(logits.dtype).min)
    e = [z.exp() if t == 1 else (z / t).exp_() for t in temperatures]
    return [z, *(x.scatter_add_(1, top.indices, -top.here) for x in e)]


def _label_sum(label: Label, z: Tensor) -> Tensor:
    return expectation(label.mass, z if label.indices is None else z.gather(1, label.indices))


def expectation(mass: Tensor, value: Tensor) -> Tensor:
    """``sum_c mass_c * value_c``, where no mass times an infinite value is 0."""
    return _sum((mass * value).masked_fill_(mass == 0, 0))


def _sum(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


# --- statistics of several shards ---


def merge(shards: Statistics, temperature: float) -> tuple[Statistics, list[Tensor]]:
    """Merge along dimension 0; also return which shards have the top classes."""
    owner, top, shift = _highest(shards.top)
    teacher_owner, teacher_top, teacher_shift = _highest(shards.teacher_top)
    soft_shift, teacher_soft_shift = shift / temperature, teacher_shift / temperature
    scale = teacher_soft_shift.exp()
    merged = Statistics(
        top=top,
        others=_others(shards.others, shift, owner),
        soft_others=_others(shards.soft_others, soft_shift, owner),
        label_z=_shifted(shards.mass, shards.label_z, shift),
        teacher_top=teacher_top,
        teacher_others=_others(shards.teacher_others, teacher_shift, teacher_owner),
        teacher_soft_others=_others(shards.teacher_soft_others, teacher_soft_shift, teacher_owner),
        teacher_label_z=_shifted(shards.mass, shards.teacher_label_z, teacher_shift),
        mass=shards.mass.sum(0, keepdim=True),
        dot=_shifted(scale * (1 + shards.teacher_soft_others), scale * shards.dot, shift),
        z_sum=_shifted(shards.classes, shards.z_sum, shift),
        classes=shards.classes.sum(0, keepdim=True),
    )
    return merged, [owner, teacher_owner]


def _highest(tops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    owner = tops.argmax(0, keepdim=True)
    top = tops.gather(0, owner)
    top = top.masked_fill(top.isinf(), math.nan)
    return owner, top, tops - top


def _others(others: Tensor, shift: Tensor, owner: Tensor) -> Tensor:
    e = shift.exp()  # of each shard's top class; all but the owner's belong to the others
    return (others * e + e.scatter(0, owner, 0.0)).sum(0, keepdim=True)


def _shifted(mass: Tensor, value: Tensor, shift: Tensor) -> Tensor:
    """Add up the shards' sums of mass * z; z was relative to a shard's maximum."""
    return (value + mass * shift).masked_fill(mass == 0, 0).sum(0, keepdim=True)


def _shared(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, shard: Shard, like: Tensor
) -> tuple[Statistics, list[Top]]:
    """Return the statistics of all classes, and their top classes.

    An all-reduce only adds. So every process fills its own slot of an array of zeros, and all
    processes merge the same slots.
    """
    rows = student.shape[2]
    slots = like.new_zeros((shard.processes, len(Statistics._fields), 1, rows))
    own = slots[shard.rank]
    own[0] = own[4] = -math.inf  # top and teacher_top, if this process has no classes
    indices = torch.zeros((2, 1, rows), dtype=torch.int64, device=student.device)
    for _, r in blocks(student) if student.shape[1] else ():
        logits = student[:, :, r].to(like.dtype), teacher[:, :, r].to(like.dtype)
        label = _label(target[:, r], logits[0], options.ignore_index, shard)
        part, tops, _ = statistics(*logits, label, options)
        own[..., r] = torch.cat(part)
        indices[..., r] = torch.cat([top.indices for top in tops])
    shard.all_reduce(slots)
    part, owners = merge(Statistics._make(slots.unbind(1)), options.temperature)
    wrong = (part.mass != 1) | ~shard.agree  # no process, or several, have the label
    part = part._replace(mass=part.mass.masked_fill(wrong, math.nan))
    here = [(owner == shard.rank).to(like.dtype) for owner in owners]
    top = Top(indices[:1], part.top, here[0])
    return part, [top, Top(indices[1:], part.teacher_top, here[1])]


# --- combine ---


class Terms(NamedTuple):
    student_ce: Tensor
    teacher_ce: Tensor
    weight: Tensor
    soft: Tensor


def combine(part: Statistics, temperature: float) -> Terms:
    student_ce = part.mass * part.others.log1p() - part.label_z
    teacher_ce = part.mass * part.teacher_others.log1p() - part.teacher_label_z
    expected = part.dot / (temperature * (1 + part.teacher_soft_others))
    soft = part.soft_others.log1p() - expected
    return Terms(student_ce, teacher_ce, weight_of(student_ce, teacher_ce), soft)


def weight_of(student_ce: Tensor, teacher_ce: Tensor) -> Tensor:
    weight = -torch.expm1(-student_ce / (teacher_ce + EPS))
    # A student that rules the label out is infinitely worse than any teacher.
    return weight.masked_fill(student_ce == math.inf, 1)


def loss_of(terms: Terms, uniform: Tensor | None, options: Options) -> Tensor:
    """Return the loss of every row; `uniform`, for label smoothing, is CE(student, 1 / C)."""
    smoothing, loss = options.label_smoothing, torch.zeros_like(terms.soft)
    if options.hard_weight:  # a term with scale 0 is left out, so that 0 never meets inf
        hard = terms.student_ce
        if uniform is not None:
            hard = uniform if smoothing == 1 else (1 - smoothing) * hard + smoothing * uniform
        loss = loss + options.hard_weight * hard
    if options.alpha:
        _, _, weight, soft = terms
        # Weight 0, soft inf: the student rules out a class to which the teacher gives mass.
        weighted = (weight * soft).masked_fill((weight == 0) & (soft == math.inf), math.inf)
        loss = loss + options.alpha * options.temperature**2 * weighted
    return loss


# --- gradient ---


def _gradient(
    e: list[Tensor],
    part: Statistics,
    tops: list[Top],
    label: Label,
    weight: Tensor,
    row_share: Tensor,
    options: Options,
) -> Tensor:
    """Return the gradient times `row_share`, in the memory of `e`."""
    p, soft, teacher_soft = e
    top, teacher_top = tops
    if options.hard_weight:
        one = _softmax_less_1_(p, top, part.others)
        _less_label_(p, top, one, part, label, options.label_smoothing)
        # Class probabilities have entered with their mass. That of an index is 1, or NaN.
        p.mul_(row_share * options.hard_weight * (1.0 if label.indices is None else part.mass))
    if not options.alpha:
        return p if options.hard_weight else p.zero_()
    one = _softmax_less_1_(soft, top, part.soft_others)
    teacher_one = _softmax_less_1_(teacher_soft, teacher_top, part.teacher_soft_others)
    difference = soft.sub_(teacher_soft)
    _add_ones_(difference, top.indices, one, teacher_top.indices, teacher_one)
    scale = row_share * (options.alpha * options.temperature) * weight
    return p.addcmul_(difference, scale) if options.hard_weight else difference.mul_(scale)


def _softmax_less_1_(e: Tensor, top: Top, others: Tensor) -> Tensor:
    """Turn `e` into the softmax. Where the top class has most of the mass, store p - 1, return 1.

    Elsewhere p is at most 1/2, and p - 1 would lose digits.
    """
    sure = others < 1
    e.scatter_add_(1, top.indices, torch.where(sure, -others, 1.0) * top.here).div_(1 + others)
    return sure * top.here


def _less_label_(
    p: Tensor, top: Top, one: Tensor, part: Statistics, label: Label, smoothing: float
) -> None:
    """Subtract the smoothed label from a softmax less 1, and add the 1s."""
    if label.indices is None:
        less = label.mass * (smoothing - 1) - smoothing / part.classes
        mass = part.mass * (1 - smoothing) + smoothing
        p.mul_(mass).add_(less.scatter_add_(1, top.indices, one * mass))
        return
    if smoothing:
        p.sub_(smoothing / part.classes)
    _add_ones_(p, top.indices, one, label.indices, label.mass, smoothing)


def _add_ones_(
    p: Tensor, index: Tensor, one: Tensor, other: Tensor, other_one: Tensor, smoothing: float = 0.0
) -> None:
    """Add `one` at `index`, and subtract `(1 - smoothing) * other_one` at `other`."""
    same = index == other  # then 1 - 1 comes first, and one sum is added
    smoothed = smoothing * other_one
    p.scatter_add_(1, index, torch.where(same, one - other_one + smoothed, one))
    p.scatter_add_(1, other, (smoothed - other_one).masked_fill_(same, 0))
