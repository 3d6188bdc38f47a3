"""Closed-form loss and gradient in ATen operators: right on every input, wherever nothing faster runs, and in float64.

One algebra in three files, this one, `_rows.c` and `_triton.py`. With z = x - max x, e = exp z and e', the same of
z / T, for student s and teacher t, and k the index of one maximum of each:

    statistics  rest = sum of e without class k, rest' = sum of e' without it: what is left of Z - 1, with all digits
    combine     CE = log1p(rest) - z_y, both terms >= 0;  weight = -expm1(-CE_s / (CE_t + 1e-7))
                soft = log1p(rest'_s) - sum(e'_t * z_s) / (T * (1 + rest'_t)), both terms >= 0
                loss = hard_weight * hard + alpha * T^2 * weight * soft
    gradient    hard_weight * (p_s - q) + alpha * T * weight * (p'_s - p'_t), with p - [c = k] = (-rest for e_k) / Z

Where a model is sure, its softmax less 1 at the maximum is small. From two such differences the gradient follows
without cancellation where student, teacher and label agree; where they do not, the 1s left over are added in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from weighted_soft_labels._options import Options, index_shape

EPS = 1e-7  # of the official code: keeps the weight finite where the teacher's cross-entropy is 0
BLOCK = 2**18  # logits at a time, of which there are about ten copies in scratch memory


def run(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, gradient: Tensor | None
) -> Tensor:
    """The loss of these logits; see `weighted_soft_labels.backends`."""
    if student.dim() == 2:
        student, teacher, target = batched(student), batched(teacher), batched(target)
        gradient = None if gradient is None else batched(gradient)
        loss = run(student, teacher, target, options, gradient)
        return loss[..., 0, :] if loss.dim() else loss
    total = count(target, student.shape[1], options.ignore_index)
    if options.reduction == "terms":
        return _terms(student, teacher, target, options)
    loss = student.new_empty((student.shape[0], student.shape[2]), dtype=_dtype(student, teacher))
    total = total.to(loss.dtype)
    unit = 1 / total if options.reduction == "mean" else torch.ones_like(total)
    _walk(student, teacher, target, options, unit, loss, gradient)
    if options.reduction == "none":
        return loss
    return loss.sum() / total if options.reduction == "mean" else loss.sum()


def batched(x: Tensor) -> Tensor:
    """View (N, C) as (1, C, N), and (N,) as (1, N)."""
    return x.t()[None]


def multiply_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place, in the precision of `factor`, which has one entry or one per element."""
    if gradient.is_cpu and factor.dim() == 0 and factor.item() == 1:
        return
    rows = gradient.flatten(2) if gradient.dim() > 2 else batched(torch.atleast_2d(gradient))
    factors = factor.expand(index_shape(gradient.shape)).reshape(rows.shape[0], rows.shape[2])
    for b, r in blocks(rows):  # with another dtype ATen makes a copy of the whole tensor
        rows[b, :, r].mul_(factors[b, None, r])


def _terms(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:
    shape = 4, student.shape[0], student.shape[2]
    result = student.new_empty(shape, dtype=_dtype(student, teacher))
    for b, r, _, kept, s, t in _statistics(student, teacher, target, options):
        block = torch.cat((s.ce, t.ce, *_combine(s, t, options.temperature)), 1)
        result[:, b, r] = torch.where(kept, block, 0.0).movedim(1, 0)
    return result


class Row(NamedTuple):
    """What the loss needs to know of one set of logits, (b, C, r); all but the first three have one entry per row."""

    z: Tensor  # logits - max, <= 0
    e: Tensor  # exp(z)
    soft: Tensor  # exp(z / T)
    leader: Tensor  # the index of one maximum
    rest: Tensor  # sum of e without that one
    soft_rest: Tensor  # sum of soft without that one
    ce: Tensor


def _statistics(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Row, Row]]:
    """Block by block: its place in B and R, class probabilities, which rows take part, and both sets of logits."""
    dtype = _dtype(student, teacher)
    for b, r in blocks(student):
        q, kept = _label(target[b, ..., r], student.shape[1], options.ignore_index, dtype)
        s, t = (
            _row(logits[b, :, r].to(dtype), q, options.temperature) for logits in (student, teacher)
        )
        yield b, r, q, kept, s, t


def _row(logits: Tensor, q: Tensor, temperature: float) -> Row:
    leader = logits.argmax(
        1, keepdim=True
    )  # max(1) starts threads even for one row: in a forked child it hangs
    peak = logits.gather(1, leader)
    z = logits - torch.where(
        peak == math.inf, math.nan, peak
    )  # inf - inf at `leader` would be left out as well
    e, soft = z.exp(), (z / temperature).exp()
    rest, soft_rest = (mass.scatter(1, leader, 0.0).sum(1, keepdim=True) for mass in (e, soft))
    ce = q.sum(1, keepdim=True) * rest.log1p() - _expectation(q, z)
    return Row(z, e, soft, leader, rest, soft_rest, ce)


def _expectation(mass: Tensor, value: Tensor) -> Tensor:
    """``sum_c mass_c * value_c``, where no mass times an infinite value is 0."""
    return torch.where(mass == 0, 0.0, mass * value).sum(1, keepdim=True)


def _combine(student: Row, teacher: Row, temperature: float) -> tuple[Tensor, Tensor]:
    """The weight and the soft term of every row."""
    # The student that rules the label out is infinitely worse than any teacher, also one that does the same.
    weight = torch.where(
        student.ce == math.inf, 1.0, -torch.expm1(-student.ce / (teacher.ce + EPS))
    )
    dot = _expectation(teacher.soft, student.z)
    return weight, student.soft_rest.log1p() - dot / (temperature * (1 + teacher.soft_rest))


def _walk(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    unit: Tensor,
    loss: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """Fill `loss` with that of every row, and `gradient` with its gradient times `unit`, block by block."""
    unit = unit.to(_dtype(student, teacher)).expand(student.shape[0], student.shape[2])
    for b, r, q, kept, s, t in _statistics(student, teacher, target, options):
        weight, soft = _combine(s, t, options.temperature)
        if loss is not None:
            loss[b, r] = torch.where(kept, _loss(s, weight, soft, options), 0.0).squeeze(1)
        if gradient is not None:
            found = _gradient(s, t, q, weight, unit[b, None, r], options)
            gradient[b, :, r] = torch.where(kept, found, 0.0)


def _loss(student: Row, weight: Tensor, soft: Tensor, options: Options) -> Tensor:
    smoothing, loss = options.label_smoothing, torch.zeros_like(soft)
    if options.hard_weight:  # a term with scale 0 is left out, so that 0 never meets inf
        hard = student.ce
        if smoothing:
            uniform = student.rest.log1p() - student.z.mean(1, keepdim=True)
            hard = uniform if smoothing == 1 else (1 - smoothing) * hard + smoothing * uniform
        loss = loss + options.hard_weight * hard
    if options.alpha:
        # weight 0 on an infinite soft term: the student rules out a class to which the teacher gives mass.
        weighted = torch.where((weight == 0) & (soft == math.inf), math.inf, weight * soft)
        loss = loss + options.alpha * options.temperature**2 * weighted
    return loss


def _gradient(
    student: Row, teacher: Row, q: Tensor, weight: Tensor, unit: Tensor, options: Options
) -> Tensor:
    smoothing, classes = options.label_smoothing, q.shape[1]
    gradient = torch.zeros_like(q)
    if options.hard_weight:
        smoothed = (1 - smoothing) * q + smoothing / classes if smoothing else q
        mass = q.sum(1, keepdim=True) * (1 - smoothing) + smoothing
        less, sure = _softmax_less_1(student.e, student.leader, student.rest)
        left = torch.scatter_add(-smoothed, 1, student.leader, mass * sure)
        gradient = options.hard_weight * (mass * less + left)
    if options.alpha:
        less, sure = _softmax_less_1(student.soft, student.leader, student.soft_rest)
        teacher_less, teacher_sure = _softmax_less_1(
            teacher.soft, teacher.leader, teacher.soft_rest
        )
        agree = (student.leader == teacher.leader) & sure & teacher_sure
        left = torch.zeros_like(q).scatter_add(1, student.leader, (sure & ~agree).to(q.dtype))
        left = left.scatter_add(1, teacher.leader, -(teacher_sure & ~agree).to(q.dtype))
        gradient = gradient + options.alpha * options.temperature * weight * (
            less - teacher_less + left
        )
    return unit * gradient


def _softmax_less_1(e: Tensor, leader: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax, less 1 at `leader` in rows that are sure of it; in others that would lose digits, not keep them."""
    sure = rest < 1
    return e.scatter(1, leader, torch.where(sure, -rest, 1.0)) / (1 + rest), sure


def _dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, C, R) along B and R into blocks of at most BLOCK logits, but at least one row."""
    batches, classes, rows = logits.shape
    across = max(1, min(rows, BLOCK // classes))
    down = max(1, BLOCK // (classes * across))
    for b in range(0, batches, down):
        for r in range(0, rows, across):
            yield slice(b, b + down), slice(r, r + across)


def count(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """How many rows count in the mean, 0-dim. On a CPU, raises IndexError for an index that names no class."""
    if target.is_floating_point():
        rows = target.shape[0] * target.shape[2:].numel()
        return torch.full((), rows, device=target.device)
    label = target.long()  # compared in uint8, 156 would equal an ignore_index of -100
    kept = label != ignore_index
    if target.device.type == "cpu":
        outside = kept & ((label < 0) | (label >= classes))
        if outside.any():
            wrong = int(label.flatten()[outside.flatten().int().argmax()])
            raise IndexError(
                f"target must hold class indices in [0, {classes}) or ignore_index ({ignore_index}), got {wrong}"
            )
    return kept.sum()


def _label(
    target: Tensor, classes: int, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Class probabilities (b, C, r), and which rows take part (b, 1, r)."""
    if target.is_floating_point():
        return target.to(dtype), torch.ones_like(target[:, :1], dtype=torch.bool)
    label = target.long().unsqueeze(1)
    inside = (label >= 0) & (label < classes)
    q = torch.zeros((label.shape[0], classes, label.shape[2]), dtype=dtype, device=target.device)
    # An index that names no class makes its row NaN, as nothing may be raised without looking at the data.
    q.scatter_(1, label.where(inside, 0), torch.where(inside, 1.0, math.nan).to(dtype))
    return q, label != ignore_index
