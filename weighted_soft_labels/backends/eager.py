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

A model that is sure of its top class has a sum of exponentials just above 1. `others` is that sum
less 1 without cancellation, and p_k - 1 is small. The gradient adds such differences first and the
1s last. The 1s cancel exactly where student, teacher and label agree.

This backend and the C kernel leave the top class out of the sums, so that both terms of CE are
>= 0 whatever the label is. The Triton backend leaves out the label's class: a kernel knows the
label before it reads the logits, the top class only afterwards.

`merge` combines the statistics of disjoint sets of classes. A process with a shard of the classes
merges its statistics with those of the other processes, between `statistics` and `combine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weighted_soft_labels._options import Options, index_shape

EPS = 1e-7  # of the official code: keeps the weight finite where the teacher's cross-entropy is 0
BLOCK = 2**18  # logits at a time on a CPU, so that their copies stay in the cache
DEVICE_BLOCK = 2**24  # on other devices, where a block costs about 80 launches


class Shard(NamedTuple):
    """The classes of this process among all, and how processes share statistics."""

    rank: int
    classes: Tensor  # of every process, (processes, 1)
    first: Tensor  # global index of this process's first class
    agree: Tensor  # 0-dim bool: all processes have the same rows and options
    all_reduce: Callable[[Tensor], object]  # adds up a tensor over the processes, in place


class Statistics(NamedTuple):
    """What the loss needs of a set of classes, one entry per row."""

    top: Tensor  # the student's maximum
    others: Tensor  # sum of the student's exp(z) without the top class
    soft_others: Tensor  # sum of the student's exp(z / T) without the top class
    label: Tensor  # sum of the label's probabilities times the student's z
    teacher_top: Tensor
    teacher_others: Tensor
    teacher_soft_others: Tensor
    teacher_label: Tensor
    mass: Tensor  # sum of the label's probabilities; NaN if an index names no class
    dot: Tensor  # sum of the teacher's exp(z / T) times the student's z
    z_sum: Tensor  # sum of the student's z, needed for label smoothing alone
    classes: Any  # how many: an int, or a tensor if the classes are sharded


class Exponentials(NamedTuple):
    """What the gradient of a block is made of, (b, C, r): 0 at the top class."""

    student: Tensor  # exp(z)
    student_soft: Tensor  # exp(z / T)
    teacher_soft: Tensor


class Label(NamedTuple):
    """The target of a block. One of the first two is None."""

    indices: Tensor | None  # (b, 1, r); -1 for a class that these logits do not have
    probabilities: Any  # None or (b, C, r)
    ignored: Tensor | None  # (b, 1, r)


Tops = tuple[Tensor, Tensor]  # top class of student and teacher, (b, 1, r); -1 in another shard


def run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    shard: Shard | None = None,
) -> Tensor:
    """The loss of these logits; see `weighted_soft_labels.backends`.

    `gradient` may be the student's memory: a block is read before its gradient is written.
    """
    if student.dim() == 2:
        student, teacher, target = batched(student), batched(teacher), batched(target)
        gradient = None if gradient is None else batched(gradient)
        loss = run(student, teacher, target, options, gradient, shard)
        return loss[..., 0, :] if loss.dim() else loss
    total = count(target, None if shard else student.shape[1], options.ignore_index)
    wide = torch.float64 in (student.dtype, teacher.dtype)
    terms = options.reduction == "terms"
    shape = (4 if terms else 1, student.shape[0], student.shape[2])
    rows = student.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    total = total.to(rows.dtype)
    unit = 1 / total if options.reduction == "mean" else torch.ones_like(total)
    shared = None if shard is None else _shared(student, teacher, target, options, shard, rows)
    for b, r in blocks(student):
        logits = student[b, :, r].to(rows.dtype), teacher[b, :, r].to(rows.dtype)
        label = _label(target[b, ..., r], student.shape[1], options.ignore_index, shard)
        if shared is None:
            part, tops, e = statistics(*logits, label, options)
        else:
            part, tops = _part(shared, r)
            e = _exponentials(*logits, part, tops, options)
        combined = combine(part, options.temperature)
        result = torch.cat(combined, 1) if terms else _loss(part, combined, options)
        rows[:, b, r] = _kept(result, label).movedim(1, 0)
        if gradient is not None:
            formed = _gradient(e, part, tops, label, combined.weight, unit, options)
            gradient[b, :, r] = _kept(formed, label)
    if terms or options.reduction == "none":
        return rows if terms else rows[0]
    return rows.sum() / total if options.reduction == "mean" else rows.sum()


def batched(x: Tensor) -> Tensor:
    """View (N, C) as (1, C, N), and (N,) as (1, N)."""
    return x.t()[None]


def multiply_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place, in the precision of `factor`, which has one entry or one per element."""
    if gradient.is_cpu and factor.dim() == 0 and factor.item() == 1:
        return
    rows = (
        gradient.flatten(2)
        if gradient.dim() > 2
        else batched(gradient if gradient.dim() > 1 else gradient[None])
    )
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
    label = target.long()  # compared in uint8, 156 would equal an ignore_index of -100
    kept = label != ignore_index
    if classes is not None and target.device.type == "cpu":
        outside = kept & ((label < 0) | (label >= classes))
        if outside.any():
            wrong = int(label.flatten()[outside.flatten().int().argmax()])
            raise IndexError(
                f"target must hold class indices in [0, {classes}) or "
                f"ignore_index ({ignore_index}), got {wrong}"
            )
    return kept.sum()


def _label(target: Tensor, classes: int, ignore_index: int, shard: Shard | None) -> Label:
    if target.is_floating_point():
        return Label(None, target, None)
    index = target.long().unsqueeze(1)
    ignored = index == ignore_index
    if shard is not None:
        index = index - shard.first
    return Label(index.where((index >= 0) & (index < classes), -1), None, ignored)


def _kept(x: Tensor, label: Label) -> Tensor:
    return x if label.ignored is None else x.masked_fill_(label.ignored, 0)


# --- statistics ---


def statistics(
    student: Tensor, teacher: Tensor, label: Label, options: Options, shard: bool = False
) -> tuple[Statistics, Tops, Exponentials]:
    temperature = options.temperature
    top_class, top, z = _below_top(student, shard)
    teacher_class, teacher_top, teacher_z = _below_top(teacher, shard)
    if label.indices is not None:
        mass = torch.where(label.indices >= 0, 1.0, 0.0 if shard else math.nan).to(z.dtype)
        of_label = [_at(x, label.indices) for x in (z, teacher_z)]
    else:
        q = label.probabilities.to(z.dtype)
        mass = _sum(q)
        of_label = [_expectation(q, x) for x in (z, teacher_z)]
    teacher_others = _sum(_exp(teacher_z, 1.0, teacher_class))
    e = Exponentials(
        _exp(z, 1.0, top_class),
        _exp(z, temperature, top_class),
        _exp(teacher_z, temperature, teacher_class),
    )
    others, soft_others, teacher_soft_others = map(_sum, e)
    dot = _expectation(e.teacher_soft, z) + z.gather(1, teacher_class)
    z_sum = _sum(z) if options.label_smoothing else torch.zeros_like(top)
    of_student = top, others, soft_others, of_label[0]
    of_teacher = teacher_top, teacher_others, teacher_soft_others, of_label[1]
    part = Statistics(*of_student, *of_teacher, mass, dot, z_sum, student.shape[1])
    return part, (top_class, teacher_class), e


def _below_top(logits: Tensor, shard: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top class, its logit and all logits less that."""
    # max(1) starts threads even for one row: in a forked child it hangs.
    top_class = logits.argmax(1, keepdim=True)
    top = logits.gather(1, top_class)
    # +inf makes a row NaN. The sums would leave out its inf - inf.
    top = torch.where(top == math.inf, math.nan, top)
    # -inf is a row without classes, hence NaN. In a shard, other processes may have its classes.
    return top_class, top, logits - (top.clamp(min=torch.finfo(top.dtype).min) if shard else top)


def _exponentials(
    student: Tensor, teacher: Tensor, part: Statistics, tops: Tops, options: Options
) -> Exponentials:
    z, teacher_z = student - part.top, teacher - part.teacher_top
    return Exponentials(
        _exp(z, 1.0, tops[0]),
        _exp(z, options.temperature, tops[0]),
        _exp(teacher_z, options.temperature, tops[1]),
    )


def _exp(z: Tensor, temperature: float, top_class: Tensor) -> Tensor:
    """exp(z / T), but 0 at the top class, where it would be 1."""
    e = z.exp() if temperature == 1 else (z / temperature).exp_()
    return _add_(e, top_class, -torch.ones_like(e[:, :1]))


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.clamp(min=0)).where(index >= 0, 0.0)


def _add_(x: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Add one value per row at `index`, unless that is -1."""
    if x.shape[1] == 0:
        return x
    return x.scatter_add_(1, index.clamp(min=0), value.where(index >= 0, 0.0))


def _sum(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


def _expectation(mass: Tensor, value: Tensor) -> Tensor:
    """``sum_c mass_c * value_c``, where no mass times an infinite value is 0."""
    return _sum(torch.where(mass == 0, 0.0, mass * value))


# --- statistics of several shards ---


def merge(shards: Statistics, temperature: float) -> tuple[Statistics, Tops]:
    """Merge statistics (shards, rows); also return which shards have the top classes, (1, rows)."""
    owner, top, shift = _highest(shards.top)
    teacher_owner, teacher_top, teacher_shift = _highest(shards.teacher_top)
    soft_shift, teacher_soft_shift = shift / temperature, teacher_shift / temperature
    scale = teacher_soft_shift.exp()
    merged = Statistics(
        top,
        _others(shards.others, shift, owner),
        _others(shards.soft_others, soft_shift, owner),
        _shifted(shards.mass, shards.label, shift),
        teacher_top,
        _others(shards.teacher_others, teacher_shift, teacher_owner),
        _others(shards.teacher_soft_others, teacher_soft_shift, teacher_owner),
        _shifted(shards.mass, shards.teacher_label, teacher_shift),
        shards.mass.sum(0, keepdim=True),
        _shifted(scale * (1 + shards.teacher_soft_others), scale * shards.dot, shift),
        _shifted(shards.classes, shards.z_sum, shift),
        shards.classes.sum(0, keepdim=True).to(top.dtype),
    )
    return merged, (owner, teacher_owner)


def _highest(tops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    owner = tops.argmax(0, keepdim=True)
    top = tops.gather(0, owner)
    top = torch.where(top.isinf(), math.nan, top)
    return owner, top, tops - top


def _others(others: Tensor, shift: Tensor, owner: Tensor) -> Tensor:
    e = shift.exp()  # the top classes of shards: all but one are among the others
    return (others * e + e.scatter(0, owner, 0.0)).sum(0, keepdim=True)


def _shifted(mass: Tensor, value: Tensor, shift: Tensor) -> Tensor:
    """Sum of mass times z, given that sum for a z that is higher by `-shift`."""
    return torch.where(mass == 0, 0.0, value + mass * shift).sum(0, keepdim=True)


def _shared(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, shard: Shard, like: Tensor
) -> tuple[Statistics, Tops]:
    """Return the statistics of all classes, and the top classes that this process has.

    An all-reduce only adds. So every process fills its own slot of an array of zeros, and all
    processes merge the same slots.
    """
    slots = like.new_zeros((len(shard.classes), 11, student.shape[2]))
    own = slots[shard.rank]
    tops = torch.zeros_like(target.long().expand(2, -1))
    if student.shape[1] == 0:
        own[:8:4].fill_(-math.inf)  # the tops
    for _, r in blocks(student) if student.shape[1] else ():
        logits = student[:, :, r].to(like.dtype), teacher[:, :, r].to(like.dtype)
        label = _label(target[:, r], student.shape[1], options.ignore_index, shard)
        part, classes, _ = statistics(*logits, label, options, shard=True)
        own[:, r] = torch.cat(part[:11], 1)[0]
        tops[:, r] = torch.cat(classes, 1)[0]
    shard.all_reduce(slots)
    merged, owners = merge(Statistics._make((*slots.unbind(1), shard.classes)), options.temperature)
    mass = merged.mass.where((merged.mass != 0) & shard.agree, math.nan)
    mine = [top.where(owner == shard.rank, -1) for top, owner in zip(tops, owners)]
    return merged._replace(mass=mass), (mine[0], mine[1])


def _part(shared: tuple[Statistics, Tops], r: slice) -> tuple[Statistics, Tops]:
    """Return the rows `r`, shaped (1, 1, r) as those of a block."""
    (*merged, classes), tops = shared
    part = Statistics._make((*(x[None, :, r] for x in merged), classes))
    return part, (tops[0][None, :, r], tops[1][None, :, r])


# --- combine ---


class Terms(NamedTuple):
    student_ce: Tensor
    teacher_ce: Tensor
    weight: Tensor
    soft: Tensor


def combine(part: Statistics, temperature: float) -> Terms:
    student_ce = part.mass * part.others.log1p() - part.label
    teacher_ce = part.mass * part.teacher_others.log1p() - part.teacher_label
    # A student that rules the label out is infinitely worse than any teacher.
    weight = -torch.expm1(-student_ce / (teacher_ce + EPS))
    weight = torch.where(student_ce == math.inf, 1.0, weight)
    expected = part.dot / (temperature * (1 + part.teacher_soft_others))
    return Terms(student_ce, teacher_ce, weight, part.soft_others.log1p() - expected)


def _loss(part: Statistics, terms: Terms, options: Options) -> Tensor:
    smoothing, loss = options.label_smoothing, torch.zeros_like(terms.soft)
    if options.hard_weight:  # a term with scale 0 is left out, so that 0 never meets inf
        hard = terms.student_ce
        if smoothing:
            uniform = part.others.log1p() - part.z_sum / part.classes
            hard = uniform if smoothing == 1 else (1 - smoothing) * hard + smoothing * uniform
        loss = loss + options.hard_weight * hard
    if options.alpha:
        _, _, weight, soft = terms
        # Weight 0, soft inf: the student rules out a class to which the teacher gives mass.
        weighted = torch.where((weight == 0) & (soft == math.inf), math.inf, weight * soft)
        loss = loss + options.alpha * options.temperature**2 * weighted
    return loss


# --- gradient ---


def _gradient(
    e: Exponentials,
    part: Statistics,
    tops: Tops,
    label: Label,
    weight: Tensor,
    unit: Tensor,
    options: Options,
) -> Tensor:
    """Return the gradient times `unit`, in the memory of `e`."""
    gradient = None
    if options.hard_weight:
        sure = _softmax_less_1_(e.student, tops[0], part.others)
        gradient = _less_label_(e.student, tops[0], sure, part, label, options)
        # Class probabilities have entered with their mass. That of an index is 1, or NaN.
        gradient.mul_(unit * options.hard_weight * (1.0 if label.indices is None else part.mass))
    if options.alpha:
        sure = _softmax_less_1_(e.student_soft, tops[0], part.soft_others)
        teacher_sure = _softmax_less_1_(e.teacher_soft, tops[1], part.teacher_soft_others)
        difference = e.student_soft.sub_(e.teacher_soft)
        _add_ones_(difference, tops[0], sure, tops[1], teacher_sure)
        scale = unit * (options.alpha * options.temperature) * weight
        if gradient is None:
            return difference.mul_(scale)
        gradient.addcmul_(difference, scale)
    return torch.zeros_like(e.student) if gradient is None else gradient


def _softmax_less_1_(e: Tensor, top_class: Tensor, others: Tensor) -> Tensor:
    """Turn `e` into the softmax, less 1 at the top class of rows that are sure; return those 1s.

    In other rows the top class has at most half of the mass: less 1 it would lose digits.
    """
    sure = others < 1
    _add_(e, top_class, torch.where(sure, -others, 1.0)).div_(1 + others)
    return sure.to(e.dtype)


def _less_label_(
    p: Tensor,
    top_class: Tensor,
    sure: Tensor,
    part: Statistics,
    label: Label,
    options: Options,
) -> Tensor:
    """Subtract the smoothed label from a softmax less 1, and add the 1s."""
    smoothing = options.label_smoothing
    if label.indices is not None:
        if smoothing:
            p.sub_(smoothing / part.classes)
        _add_ones_(p, top_class, sure, label.indices, torch.ones_like(sure), smoothing)
        return p
    mass = part.mass * (1 - smoothing) + smoothing
    less = label.probabilities.to(p.dtype) * (smoothing - 1) - smoothing / part.classes
    return p.mul_(mass).add_(_add_(less, top_class, sure * mass))


def _add_ones_(
    p: Tensor, index: Tensor, one: Tensor, other: Tensor, other_one: Tensor, smoothing: float = 0.0
) -> None:
    """Add `one` at `index`, subtract `other_one` at `other`: where both meet, as one number."""
    same = index == other
    _add_(p, index, torch.where(same, one - other_one + smoothing, one))
    _add_(p, other, torch.where(same, 0.0, smoothing - other_one))
