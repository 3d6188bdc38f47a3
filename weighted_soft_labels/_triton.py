"""The loss in Triton, for NVIDIA and AMD GPUs. Same functions, same algebra and same order of steps as `_eager`.

Logits are seen as (batch, classes, rows) with any strides, so (N, C), (N, C, d1, ...) and channels_last need no copy:
(N, C) is one batch of N rows. A program takes ROWS rows and all classes of them:

    statistics  sums of exp(z) and exp(z / T) without the label, and the soft term's dot product
    combine     cross-entropies, weight, loss: one number a row
    gradient    one number a class

Without the label, what is left of Z - 1 keeps all its digits where a model is sure of it. A target of probabilities has
no label; there the classes at the maximum are left out and counted.

Classes lie in a tile [K, ROWS, LANES, VECTOR]: LANES threads share a row; each takes VECTOR neighbours at a time, 16
bytes where the layout allows, and K times that, 32 classes at most. So few threads compute what is computed once a row.
Up to 8192 classes a row stays in registers from its statistics to its gradient: 3b bytes an element for logits of b
bytes. Beyond, the tile walks over the classes twice, the second time from the end, which the L2 cache still holds: 5b.
Where neighbours in memory are rows, as in (N, C, H, W), the threads of a warp lie on those and LANES are warps.

Offsets of rows are 64-bit; arithmetic is float32; nothing is read back to the host and no launch depends on the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from weighted_soft_labels.loss import Options

PARTS = 256  # in which many labels are counted

# Arguments that change with the batch: no kernel is compiled anew for one of them.
COUNTS = ["rows", "size", "ignore_index"]


# --- what belongs together in a kernel ---


class Plan(NamedTuple):
    """What a kernel is compiled for; see `_launch`."""

    CLASSES: tl.constexpr
    K: tl.constexpr
    LANES: tl.constexpr
    VECTOR: tl.constexpr
    TEMPERATURE: tl.constexpr
    PROBABILITIES: tl.constexpr
    SMOOTHING: tl.constexpr


class Place(NamedTuple):
    """Which rows are a program's, [ROWS]."""

    batch: tl.tensor
    row: tl.tensor
    index: tl.tensor  # in (B, R)
    exists: tl.tensor
    size: tl.tensor  # B * R


class Logits(NamedTuple):
    """Where the rows of a program start, [ROWS], and how far it is from class to class."""

    address: tl.tensor
    stride: tl.tensor


class Label(NamedTuple):
    """What the target says of a program's rows, [ROWS]."""

    index: tl.tensor
    inside: tl.tensor  # whether that is a class
    kept: tl.tensor  # not ignored: of other rows no logits are read


class Row(NamedTuple):
    """What is known of one set of logits: of rows, [ROWS], or of what one thread has seen of them, [ROWS, LANES]."""

    peak: tl.tensor  # maximum, where z is 0
    others: tl.tensor  # sum of exp(z) without the label; for probabilities, without classes at the maximum
    soft_others: tl.tensor  # the same of exp(z / T)
    ties: tl.tensor  # for probabilities: how many classes are at the maximum
    qz: tl.tensor  # for probabilities: sum of q * z


class Statistics(NamedTuple):
    """The same of both sets of logits together."""

    student: Row
    teacher: Row
    dot: tl.tensor  # sum of the teacher's exp(z / T) times the student's z, as far as it is in `soft_others` or a tie
    z_sum: tl.tensor  # for label smoothing: sum of the student's z without the label
    taken: tl.tensor  # of how many classes
    mass: tl.tensor  # for probabilities: sum of q


class Total(NamedTuple):
    """What the loss needs to know of one set of logits, [ROWS]. The label of probabilities is a class at the maximum."""

    label_z: tl.tensor
    label_e: tl.tensor  # exp(z) and exp(z / T) there
    label_soft: tl.tensor
    rest: tl.tensor  # Z - 1
    soft_rest: tl.tensor  # Z' - 1
    ce: tl.tensor


class Settings(NamedTuple):
    """Options of the loss."""

    inverse: tl.tensor  # 1 / T
    alpha_t: tl.tensor  # alpha * T
    alpha_t2: tl.tensor
    hard_weight: tl.tensor
    smoothing: tl.tensor


class Scales(NamedTuple):
    """Factors of the gradient, [ROWS]."""

    hard: tl.tensor  # of the student's exp(z)
    soft: tl.tensor  # of the student's exp(z / T)
    ratio: tl.tensor  # of the teacher's to that
    uniform: tl.tensor  # what label smoothing takes off every class
    at_label: tl.tensor  # all of the gradient there
    q: tl.tensor  # for probabilities: of q
    hard_peak: tl.tensor  # for probabilities: the hard and the soft term at a maximum
    soft_peak: tl.tensor


# --- arithmetic. Numbers stand where they are used: globals would be compared with what they were at every launch ---


@triton.jit
def _exp(x):
    """exp(x) by the hardware's exp2."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to float32 precision; the hardware logarithm has no relative precision near 1."""
    s = x / (2 + x)  # log(1 + x) = 2 atanh(x / (2 + x)), 8 terms of which are exact to 1e-9 for x < 1
    q = s * s
    p = 1 / 13 + q * (1 / 15)
    p = 1 / 9 + q * (1 / 11 + q * p)
    p = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * p)))
    return tl.where(x < 1, 2 * s * p, tl.log(1 + x))


@triton.jit
def _one_minus_exp(r):
    """1 - exp(-r) for r >= 0 to float32 precision."""
    p = 1 - r * (1 / 8) * (1 - r * (1 / 9))
    p = 1 - r * (1 / 5) * (1 - r * (1 / 6) * (1 - r * (1 / 7) * p))
    p = 1 - r * (1 / 2) * (1 - r * (1 / 3) * (1 - r * (1 / 4) * p))
    return tl.where(r < 0.5, r * p, 1 - _exp(-r))


@triton.jit
def _exponentials(z, inverse, TEMPERATURE: tl.constexpr):
    """exp(z), exp(z / T); one exponential where squaring loses no digit that counts."""
    if TEMPERATURE == 1:
        soft = _exp(z)
        e = soft
    elif TEMPERATURE == 2:
        soft = tl.exp2(z * 0.7213475204444817)
        e = soft * soft
    else:
        soft = tl.exp2(z * (inverse * 1.4426950408889634))
        e = _exp(z)
    return e, soft


@triton.jit
def _finite(peak):
    """A maximum that can be subtracted: a block may hold nothing but masked classes."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _sum(x):
    """Of a thread's classes, [K, ROWS, LANES, VECTOR] to [ROWS, LANES]."""
    return tl.sum(tl.sum(x, axis=3), axis=0)


@triton.jit
def _most(x):
    return tl.max(tl.max(x, axis=3), axis=0)


@triton.jit
def _product(mass, value):
    """mass * value, where no mass times an infinite value is 0."""
    return mass * tl.where(mass == 0, 0.0, value)


@triton.jit
def _tile(x):
    """[ROWS] or [ROWS, LANES] against [K, ROWS, LANES, VECTOR]."""
    return x[None, :, None, None] if len(x.shape) == 1 else x[None, :, :, None]


# --- memory ---


@triton.jit
def _aligned(x, UNIT: tl.constexpr):
    """x, in a form that shows the compiler what the launcher has checked: a multiple of UNIT. It takes that to load
    and store 16 bytes at a time; by itself it would see nothing between a multiple of 16 and any number."""
    return x // UNIT * UNIT


@triton.jit
def _place(rows, ROWS: tl.constexpr):
    blocks = tl.cdiv(rows, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    size = tl.num_programs(0) // blocks * rows.to(tl.int64)
    return Place(batch, row, batch * rows + row, row < rows, size)


@triton.jit
def _logits(pointer, place, strides, VECTOR: tl.constexpr):
    address = pointer + (place.batch * _aligned(strides[0], VECTOR) + place.row * _aligned(strides[2], VECTOR))
    if VECTOR == 1:
        # Hides alignment: one thread is to take all classes of a row, not one class of neighbouring rows.
        address = tl.multiple_of(address, 1)
    return Logits(address, strides[1])


@triton.jit
def _label(target, place, ignore_index, plan: tl.constexpr):
    if plan.PROBABILITIES:
        index = place.row * 0
        kept = place.exists
    else:
        index = tl.load(target.address, place.exists, other=0).to(tl.int64)
        kept = place.exists & (index != ignore_index)
    inside = (index >= 0) & (index < plan.CLASSES)
    return Label(tl.where(inside, index, 0).to(tl.int32), inside, kept)


@triton.jit
def _columns(plan: tl.constexpr):
    """The classes of a tile: those of lanes, [1, 1, LANES, 1], and how far from these a thread's are, [K, 1, 1, VECTOR]."""
    # Hidden that its entries follow each other, as this is no place for lanes.
    k = tl.max_contiguous(tl.arange(0, plan.K), 1)[:, None, None, None] * (plan.LANES * plan.VECTOR)
    lane = tl.arange(0, plan.LANES)[None, None, :, None] * plan.VECTOR
    return lane, k + tl.arange(0, plan.VECTOR)[None, None, None, :]


@triton.jit
def _load(logits, columns, mask):
    """Anything at all where `mask` is false: to say what would take an instruction a class."""
    address = _tile(logits.address) + columns.to(tl.int64) * logits.stride
    return tl.load(address, mask).to(tl.float32)


# --- statistics ---


@triton.jit
def _row(x, q, others, peak, inverse, plan: tl.constexpr):
    """z, exp(z / T) and sums of one set of logits; `others` says which classes are in the tile and not the label."""
    z = tl.where(others, x - _tile(_finite(peak)), float("-inf"))
    if plan.PROBABILITIES:
        e, soft = _exponentials(z, inverse, plan.TEMPERATURE)
        at_peak = z == 0
        ties = _sum(tl.where(at_peak, 1.0, 0.0))
        row = Row(peak, _sum(tl.where(at_peak, 0.0, e)), _sum(tl.where(at_peak, 0.0, soft)), ties, _sum(_product(q, z)))
    else:
        e, soft = _exponentials(z, inverse, plan.TEMPERATURE)
        soft_others = _sum(soft)
        nothing = tl.zeros_like(soft_others)
        row = Row(peak, _sum(e), soft_others, nothing, nothing)
    return z, soft, row


@triton.jit
def _block(student, teacher, target, start, label, peaks, inverse, plan: tl.constexpr):
    """z of both sets of logits for one tile of classes, and the statistics of each thread.

    Maxima are over the whole row where it fits, else of what a thread has seen so far, of which `peaks` were the last.
    """
    lane, step = _columns(plan)
    columns = start + lane + step
    mask = _tile(label.kept) & (columns < plan.CLASSES)
    # In a form that is one comparison with a constant for every class.
    others = mask if plan.PROBABILITIES else mask & (_tile(label.index) - start - lane != step)
    s, t = _load(student, columns, mask), _load(teacher, columns, mask)
    q = tl.where(mask, _load(target, columns, mask), 0.0) if plan.PROBABILITIES else s
    student_peak = _most(tl.where(columns < plan.CLASSES, s, float("-inf")))
    teacher_peak = _most(tl.where(columns < plan.CLASSES, t, float("-inf")))
    if plan.K * plan.LANES * plan.VECTOR >= plan.CLASSES:
        student_peak = tl.max(student_peak, axis=1, keep_dims=True)
        teacher_peak = tl.max(teacher_peak, axis=1, keep_dims=True)
    else:
        student_peak, teacher_peak = tl.maximum(student_peak, peaks[0]), tl.maximum(teacher_peak, peaks[1])
    student_z, _, student_row = _row(s, q, others, student_peak, inverse, plan)
    teacher_z, soft, teacher_row = _row(t, q, others, teacher_peak, inverse, plan)
    dot = _sum(_product(soft, student_z))
    z_sum, taken, mass = tl.zeros_like(dot), tl.zeros_like(dot), tl.zeros_like(dot)
    if plan.SMOOTHING:
        z_sum, taken = _sum(tl.where(others, student_z, 0.0)), _sum(tl.where(others, 1.0, 0.0))
    if plan.PROBABILITIES:
        mass = _sum(q)
    return student_z, teacher_z, Statistics(student_row, teacher_row, dot, z_sum, taken, mass)


@triton.jit
def _move_row(row, peak, mass, inverse, plan: tl.constexpr):
    """A row's sums seen from a higher maximum, how much higher it is, and what that makes of exp(z / T)."""
    move = _finite(peak) - _finite(row.peak)
    factor, soft_factor = _exponentials(row.peak - _finite(peak), inverse, plan.TEMPERATURE)
    # A class at the old maximum is one like any other.
    ties = tl.where(row.peak < peak, row.ties, 0.0)
    others, soft_others = (row.others + ties) * factor, (row.soft_others + ties) * soft_factor
    return Row(peak, others, soft_others, row.ties - ties, row.qz - mass * move), move, soft_factor


@triton.jit
def _move(known, student_peak, teacher_peak, inverse, plan: tl.constexpr):
    """The same statistics seen from other maxima. Every sum keeps its sign, so nothing cancels."""
    student, move, _ = _move_row(known.student, student_peak, known.mass, inverse, plan)
    teacher, _, factor = _move_row(known.teacher, teacher_peak, known.mass, inverse, plan)
    dot = known.dot - (known.teacher.soft_others + known.teacher.ties) * move
    # Nothing is left of an infinite sum that has no weight any more.
    dot = tl.where(factor == 0, 0.0, dot * factor)
    return Statistics(student, teacher, dot, known.z_sum - known.taken * move, known.taken, known.mass)


@triton.jit
def _add_row(a, b):
    return Row(b.peak, a.others + b.others, a.soft_others + b.soft_others, a.ties + b.ties, a.qz + b.qz)


@triton.jit
def _add(a, b):
    """Statistics of different classes, seen from the same maxima."""
    student, teacher = _add_row(a.student, b.student), _add_row(a.teacher, b.teacher)
    return Statistics(student, teacher, a.dot + b.dot, a.z_sum + b.z_sum, a.taken + b.taken, a.mass + b.mass)


@triton.jit
def _across_row(row):
    peak, others, soft_others = tl.max(row.peak, axis=1), tl.sum(row.others, axis=1), tl.sum(row.soft_others, axis=1)
    return Row(peak, others, soft_others, tl.sum(row.ties, axis=1), tl.sum(row.qz, axis=1))


@triton.jit
def _across(known):
    """The sum over the threads that share a row."""
    sums = tl.sum(known.dot, axis=1), tl.sum(known.z_sum, axis=1), tl.sum(known.taken, axis=1), tl.sum(known.mass, axis=1)
    return Statistics(_across_row(known.student), _across_row(known.teacher), sums[0], sums[1], sums[2], sums[3])


@triton.jit
def _walk(student, teacher, target, label, inverse, ROWS: tl.constexpr, plan: tl.constexpr):
    """The statistics of rows that do not fit: each thread has its own, up to the end."""
    nothing = tl.zeros([ROWS, plan.LANES], tl.float32)
    row = Row(nothing - float("inf"), nothing, nothing, nothing, nothing)
    known = Statistics(row, row, nothing, nothing, nothing, nothing)
    for start in range(0, plan.CLASSES, plan.K * plan.LANES * plan.VECTOR):
        peaks = known.student.peak, known.teacher.peak
        _s, _t, block = _block(
            student, teacher, target, start, label, peaks, inverse, plan
        )  # fmt: skip
        known = _add(_move(known, block.student.peak, block.teacher.peak, inverse, plan), block)
    student_peak = tl.max(known.student.peak, axis=1, keep_dims=True)
    teacher_peak = tl.max(known.teacher.peak, axis=1, keep_dims=True)
    return _across(_move(known, student_peak, teacher_peak, inverse, plan))


# --- combine ---


@triton.jit
def _total(row, mass, logits, label, inverse, plan: tl.constexpr):
    if plan.PROBABILITIES:
        label_z = tl.zeros_like(row.peak)
        label_e, label_soft = label_z + 1, label_z + 1
        rest, soft_rest = row.others + (row.ties - 1), row.soft_others + (row.ties - 1)
        ce = mass * _log1p(rest) - row.qz
    else:
        x = tl.load(logits.address + label.index.to(tl.int64) * logits.stride, label.kept, other=0.0).to(tl.float32)
        # An index that names no class may not be followed: its element is NaN.
        label_z = tl.where(label.kept, tl.where(label.inside, x - _finite(row.peak), float("nan")), 0.0)
        label_e, label_soft = _exponentials(label_z, inverse, plan.TEMPERATURE)
        # The label is a maximum and exp(z) - 1 is 0, or another class is and counts 1 in `others`.
        rest, soft_rest = row.others + (label_e - 1), row.soft_others + (label_soft - 1)
        ce = _log1p(rest) - label_z
    return Total(label_z, label_e, label_soft, rest, soft_rest, ce)


@triton.jit
def _combine(student, teacher, dot, inverse):
    """The weight and the soft term of every row."""
    # 1e-7, of the official code, keeps the weight finite where the teacher's cross-entropy is 0.
    # The student that rules the label out is infinitely worse than any teacher, also one that does the same.
    weight = tl.where(student.ce == float("inf"), 1.0, _one_minus_exp(student.ce / (teacher.ce + 1e-7)))
    return weight, _log1p(student.soft_rest) - dot * inverse / (1 + teacher.soft_rest)


@triton.jit
def _loss(student, weight, soft, z_sum, settings, plan: tl.constexpr):
    hard = student.ce
    if plan.SMOOTHING:
        uniform = _log1p(student.rest) - z_sum / plan.CLASSES
        hard = tl.where(settings.smoothing == 1, uniform, (1 - settings.smoothing) * hard + settings.smoothing * uniform)
    # A term with scale 0 is left out, so 0 never meets inf; weight 0 on an infinite soft term: the student rules out a
    # class to which the teacher gives mass.
    soft = tl.where((weight == 0) & (soft == float("inf")), float("inf"), weight * soft)
    hard = tl.where(settings.hard_weight == 0, 0.0, settings.hard_weight * hard)
    return hard + tl.where(settings.alpha_t2 == 0, 0.0, settings.alpha_t2 * soft)


# --- gradient ---


@triton.jit
def _scales(student, teacher, student_row, teacher_row, mass, weight, unit, settings, plan: tl.constexpr):
    """`unit` is the incoming gradient of every row, 0 where it is ignored."""
    hard_weight, smoothed = settings.hard_weight * unit, settings.hard_weight * settings.smoothing * unit
    hard_peak = (hard_weight - smoothed) * mass + smoothed if plan.PROBABILITIES else hard_weight
    hard = hard_peak / (1 + student.rest)
    soft_peak = tl.where(settings.alpha_t == 0, 0.0, settings.alpha_t * weight) * unit
    soft = soft_peak / (1 + student.soft_rest)
    # A ratio of exactly 1 where student and teacher agree: their parts of the gradient cancel to the last digit.
    student_z, teacher_z = 1 + student.soft_rest, 1 + teacher.soft_rest
    ratio = tl.where(student_z == teacher_z, 1.0, student_z / teacher_z)
    uniform = smoothed / plan.CLASSES
    # At the label p - 1 = -others / Z does not cancel where p is near 1, elsewhere p itself does not.
    sure, soft_sure = student_row.others < student.label_e, student_row.soft_others < student.label_soft
    at_label = tl.where(sure, smoothed - hard * student_row.others, hard * student.label_e - (hard_weight - smoothed))
    differ = tl.where(
        soft_sure, ratio * teacher_row.soft_others - student_row.soft_others, student.label_soft - ratio * teacher.label_soft
    )  # fmt: skip
    at_label += soft * differ - uniform
    return Scales(
        hard, soft, ratio, uniform, at_label, hard_weight - smoothed, hard_peak, soft_peak
    )  # fmt: skip


@triton.jit
def _write(
    gradient, student_z, teacher_z, target, start, place, label, student, teacher, scales, inverse, plan: tl.constexpr
):  # fmt: skip
    """hard_weight * (p_s - q) + alpha * T * weight * (p'_s - p'_t) for one tile of classes, all scales included."""
    lane, step = _columns(plan)
    columns = start + lane + step
    mask = _tile(place.exists) & (columns < plan.CLASSES)
    e, student_soft = _exponentials(student_z, inverse, plan.TEMPERATURE)
    _, teacher_soft = _exponentials(teacher_z, inverse, plan.TEMPERATURE)
    if plan.PROBABILITIES:
        # From softmaxes less 1 at their maxima, which are small where their models are sure; and the 1s.
        at_peak, at_teacher_peak = student_z == 0, teacher_z == 0
        e = tl.where(at_peak, -_tile(student.rest), e)
        student_soft = tl.where(at_peak, -_tile(student.soft_rest), student_soft)
        teacher_soft = tl.where(at_teacher_peak, -_tile(teacher.soft_rest), teacher_soft)
    # The soft terms first: they all but cancel where student and teacher agree, and hard may be small beside each.
    out = _tile(scales.soft) * (student_soft - _tile(scales.ratio) * teacher_soft) + _tile(scales.hard) * e
    if plan.SMOOTHING:
        out -= _tile(scales.uniform)
    if plan.PROBABILITIES:
        q = _load(target, columns, mask)
        out += tl.where(at_peak, _tile(scales.hard_peak), 0.0) - _tile(scales.q) * q
        out += tl.where(at_peak, _tile(scales.soft_peak), 0.0) - tl.where(at_teacher_peak, _tile(scales.soft_peak), 0.0)
    else:
        # Not the form of `_block`, or registers would hold the answers of all classes until here.
        out = tl.where(start + lane - _tile(label.index) == -step, _tile(scales.at_label), out)
    # Where logits are read twice, the gradient is not to drive them out of the cache.
    MODIFIER: tl.constexpr = "" if plan.K * plan.LANES * plan.VECTOR >= plan.CLASSES else ".cs"
    tl.store(_tile(gradient.address) + columns.to(tl.int64) * gradient.stride, out, mask, cache_modifier=MODIFIER)


@triton.jit
def _run(student, teacher, target, gradient, place, label, unit, settings, GRADIENT: tl.constexpr, plan: tl.constexpr):
    """Terms and loss of a program's rows; with GRADIENT, that for an incoming gradient of `unit` is written."""
    inverse = settings.inverse
    BLOCK: tl.constexpr = plan.K * plan.LANES * plan.VECTOR
    if BLOCK >= plan.CLASSES:
        nothing = (0, 0)
        student_z, teacher_z, known = _block(
            student, teacher, target, 0, label, nothing, inverse, plan
        )  # fmt: skip
        known = _across(known)
    else:
        known = _walk(student, teacher, target, label, inverse, place.row.shape[0], plan)

    student_total = _total(known.student, known.mass, student, label, inverse, plan)
    teacher_total = _total(known.teacher, known.mass, teacher, label, inverse, plan)
    dot, z_sum = known.dot, known.z_sum
    if not plan.PROBABILITIES:
        dot += _product(teacher_total.label_soft, student_total.label_z)
        z_sum += student_total.label_z
    weight, soft = _combine(student_total, teacher_total, dot, inverse)
    loss = _loss(student_total, weight, soft, z_sum, settings, plan)

    if GRADIENT:
        scales = _scales(
            student_total, teacher_total, known.student, known.teacher, known.mass, weight,
            tl.where(label.kept, unit, 0.0), settings, plan,
        )  # fmt: skip
        if BLOCK >= plan.CLASSES:
            _write(
                gradient, student_z, teacher_z, target, 0, place, label, student_total, teacher_total, scales, inverse, plan
            )  # fmt: skip
        else:
            last: tl.constexpr = (plan.CLASSES - 1) // BLOCK * BLOCK
            lane, step = _columns(plan)
            for back in range(0, plan.CLASSES, BLOCK):
                columns = last - back + lane + step
                mask = _tile(label.kept) & (columns < plan.CLASSES)
                s = tl.where(mask, _load(student, columns, mask) - _tile(_finite(known.student.peak)), float("-inf"))
                t = tl.where(mask, _load(teacher, columns, mask) - _tile(_finite(known.teacher.peak)), float("-inf"))
                _write(gradient, s, t, target, last - back, place, label, student_total, teacher_total, scales, inverse, plan)
    return student_total.ce, teacher_total.ce, weight, soft, loss


# --- kernels ---


@triton.jit
def _kept(target, first, size, stride, ignore_index, BLOCK: tl.constexpr):
    """Which labels of a block are there and not ignored."""
    i = first + tl.arange(0, BLOCK)
    label = tl.load(target + i.to(tl.int64) * stride, i < size, other=0).to(tl.int64)
    return ((i < size) & (label != ignore_index)).to(tl.int32)


@triton.jit
def _unit(target, counted, size, stride, ignore_index, share, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """What every row counts in the loss: `share`, for a mean over labels divided by how many are not ignored.

    1024 labels are counted here, by every program; of more, `_count_kernel` has counted PARTS.
    """
    if COUNT == 1:
        count = tl.sum(_kept(target, 0, size, stride, ignore_index, 1024), axis=0)
        return share / count.to(tl.float32)
    elif COUNT == 2:
        part = tl.arange(0, PARTS)
        return share / tl.sum(tl.load(counted + part, part < tl.cdiv(size, 1024), other=0), axis=0).to(tl.float32)
    else:
        return share


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    student, teacher, target, gradient, loss, counted, rows,
    student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
    target_b, target_c, target_r, gradient_b, gradient_c, gradient_r,
    ignore_index, share, inverse, alpha_t, alpha_t2, hard_weight, smoothing,
    CLASSES: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    COUNT: tl.constexpr, PARTS: tl.constexpr, GRADIENT: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Loss of every row, its share of the mean included; with GRADIENT its gradient for an incoming gradient of 1.

    With TERMS the four terms of every row instead. Moves 2b bytes an element, 3b with the gradient (5b beyond 8192
    classes), for logits of b bytes; the logits of ignored rows are not read.
    """
    settings = Settings(inverse, alpha_t, alpha_t2, hard_weight, smoothing)
    place = _place(rows, ROWS)
    s = _logits(student, place, (student_b, student_c, student_r), VECTOR)
    t = _logits(teacher, place, (teacher_b, teacher_c, teacher_r), VECTOR)
    q = _logits(target, place, (target_b, target_c, target_r), VECTOR if PROBABILITIES else 1)
    g = _logits(gradient, place, (gradient_b, gradient_c, gradient_r), VECTOR)
    label = _label(q, place, ignore_index, Plan(CLASSES, K, LANES, VECTOR, TEMPERATURE, PROBABILITIES, SMOOTHING))
    unit = _unit(target, counted, place.size, target_r, ignore_index, share, COUNT, PARTS)
    student_ce, teacher_ce, weight, soft, total = _run(
        s, t, q, g, place, label, unit, settings, GRADIENT, Plan(CLASSES, K, LANES, VECTOR, TEMPERATURE, PROBABILITIES, SMOOTHING)
    )
    if TERMS:
        size = place.size
        tl.store(loss + place.index, tl.where(label.kept, student_ce, 0.0), place.exists)
        tl.store(loss + size + place.index, tl.where(label.kept, teacher_ce, 0.0), place.exists)
        tl.store(loss + 2 * size + place.index, tl.where(label.kept, weight, 0.0), place.exists)
        tl.store(loss + 3 * size + place.index, tl.where(label.kept, soft, 0.0), place.exists)
    else:
        # Nothing to average: 0 / 0.
        tl.store(loss + place.index, tl.where(label.kept, total, 0.0) * unit, place.exists)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    student, teacher, target, gradient, upstream, counted, rows,
    student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
    target_b, target_c, target_r, gradient_b, gradient_c, gradient_r, upstream_b, upstream_r,
    ignore_index, share, inverse, alpha_t, alpha_t2, hard_weight, smoothing,
    CLASSES: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    COUNT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradient for any incoming gradient, from nothing but the logits: as many bytes as the forward kernel's."""
    settings = Settings(inverse, alpha_t, alpha_t2, hard_weight, smoothing)
    place = _place(rows, ROWS)
    s = _logits(student, place, (student_b, student_c, student_r), VECTOR)
    t = _logits(teacher, place, (teacher_b, teacher_c, teacher_r), VECTOR)
    q = _logits(target, place, (target_b, target_c, target_r), VECTOR if PROBABILITIES else 1)
    g = _logits(gradient, place, (gradient_b, gradient_c, gradient_r), VECTOR)
    label = _label(q, place, ignore_index, Plan(CLASSES, K, LANES, VECTOR, TEMPERATURE, PROBABILITIES, SMOOTHING))
    unit = _unit(target, counted, place.size, target_r, ignore_index, share, COUNT, PARTS)
    factor = tl.load(_logits(upstream, place, (upstream_b, 0, upstream_r), 1).address, label.kept, other=0.0)
    _run(s, t, q, g, place, label, unit * factor.to(tl.float32), settings, True, Plan(CLASSES, K, LANES, VECTOR, TEMPERATURE, PROBABILITIES, SMOOTHING))


@triton.jit(do_not_specialize=COUNTS)
def _scale_kernel(gradient, upstream, size, BLOCK: tl.constexpr):
    """gradient *= upstream, in place and in float32, unless the factor is 1, as it is as a rule.

    So few programs that to find that out takes no time; if it is not so, each of them does its share.
    """
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1:
        whole = size // 16 * 16
        i = tl.arange(0, BLOCK)
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, whole, tl.num_programs(0) * BLOCK):
            value = tl.load(gradient + start + i, start + i < whole, other=0.0).to(tl.float32)
            tl.store(gradient + start + i, value * factor, start + i < whole)
        if tl.program_id(0) == 0:
            rest = whole + tl.arange(0, 16)
            value = tl.load(gradient + rest, rest < size, other=0.0).to(tl.float32)
            tl.store(gradient + rest, value * factor, rest < size)


@triton.jit(do_not_specialize=COUNTS)
def _count_kernel(target, counted, size, ignore_index):
    """How many labels are not ignored, one part a program."""
    BLOCK: tl.constexpr = 1024
    kept = tl.zeros([BLOCK], tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
        kept += _kept(target, first, size, 1, ignore_index, BLOCK)
    tl.store(counted + tl.program_id(0), tl.sum(kept, axis=0))


# --- the functions that every implementation has ---


def forward(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, gradient: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The reduced loss; `gradient` is filled for an incoming gradient of 1. The state is the count of many labels."""
    loss = student.new_empty(_rows(student), dtype=torch.float32)
    counted = _launch_forward(student, teacher, target, options, loss, gradient)
    if options.reduction == "none":
        return loss, counted
    total = loss.sum()  # of shares in the mean, where it is one
    return total * math.nan if options.reduction == "mean" and loss.numel() == 0 else total, counted


def backward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    state: Tensor | None,
    upstream: Tensor,
    options: Options,
    gradient: Tensor,
) -> None:
    """Fill `gradient` for the incoming gradient `upstream`, which is applied before rounding to the student's dtype."""
    launch = _launch(student, teacher, target, gradient, options)
    if launch.programs == 0:
        return
    with _device(student):
        mode, counted, share = _count(student, target, options, state)
        upstream_strides = _strides(upstream[:, None], student) if upstream.dim() else (0, 0, 0)
        _backward_kernel[(launch.programs,)](
            student, teacher, target, gradient, upstream, counted, launch.rows, *launch.strides, upstream_strides[0],
            upstream_strides[2], options.ignore_index, share, *launch.settings, **launch.constants, COUNT=mode,
        )  # fmt: skip


def terms(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:
    """Student CE, teacher CE, weight and soft term of every row, (4, B, R); 0 where it is ignored."""
    found = student.new_empty((4, *_rows(student)), dtype=torch.float32)
    _launch_forward(student, teacher, target, options._replace(reduction="none"), found, None, TERMS=True)
    return found


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply a gradient that was formed for an incoming gradient of 1, in place; it is dense, whatever its order."""
    size = gradient.numel()
    if size:
        with _device(gradient):
            _scale_kernel[(min(-(-size // 2048), 1024),)](gradient, upstream, size, BLOCK=2048, num_warps=4)


# --- launching ---


class _Replay(NamedTuple):
    """A launch of the forward kernel as it was, for tensors of the same description.

    Triton binds and specialises all arguments anew for every launch, which is much of what a small batch costs the
    host. An interpreted kernel is not compiled and has none.
    """

    run: Callable[..., None]
    arguments: tuple[Any, ...]  # after the tensors


REPLAYS = 256  # at most; a training loop has two
_REPLAYS: dict[Any, _Replay] = {}


def _launch_forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    loss: Tensor,
    gradient: Tensor | None,
    TERMS: bool = False,
) -> Tensor | None:
    """Run the forward kernel; returns the count of many labels."""
    key = None
    tensors = (student, teacher, target, student if gradient is None else gradient, loss)
    # Kernels are specialised for tensors that start on a multiple of 16 bytes.
    if student.shape[0] == 1 and not any(tensor.data_ptr() % 16 for tensor in tensors):
        key = (
            student.shape, student.stride(), student.dtype, teacher.stride(), teacher.dtype, target.stride(),
            target.dtype, student.device, options, TERMS, gradient is not None and (gradient.stride(), gradient.dtype),
        )  # fmt: skip
        replay = _REPLAYS.get(key)
        if replay is not None:
            with _device(student):
                replay.run(*tensors, student, *replay.arguments)
            return None
    launch = _launch(student, teacher, target, gradient, options)
    if launch.programs == 0:
        return None
    with _device(student):
        mode, counted, share = _count(student, target, options)
        scalars = (launch.rows, *launch.strides, options.ignore_index, share, *launch.settings)
        constants = {**launch.constants, "COUNT": mode, "GRADIENT": gradient is not None, "TERMS": TERMS}
        compiled = _forward_kernel[(launch.programs,)](*tensors, counted, *scalars, **constants)
    if mode == 2:
        return counted
    if key is not None and compiled is not None:
        if len(_REPLAYS) == REPLAYS:
            _REPLAYS.clear()
        constexprs = (constants[name] for name in _forward_kernel.arg_names if name in constants)
        _REPLAYS[key] = _Replay(compiled[(launch.programs, 1, 1)], (*scalars, *constexprs))
    return None


def _count(
    student: Tensor, target: Tensor, options: Options, counted: Tensor | None = None
) -> tuple[int, Tensor, float]:
    """How the kernel gets at the denominator of the mean, see `_unit`; what depends on sizes alone is in a factor."""
    unused = student  # any address will do where a pointer is not followed
    if options.reduction != "mean":
        return 0, unused, 1.0
    if target.is_floating_point():
        return 0, unused, 1 / _rows(student).numel()
    batches, rows = target.shape
    # 1024 labels are read in no time, and counting them on the spot saves a launch.
    if target.numel() <= 1024 and (batches == 1 or rows == 1 or target.stride(0) == rows * target.stride(1)):
        return 1, unused, 1.0
    if counted is None:
        labels = target.reshape(-1).contiguous()
        counted = student.new_empty(min(PARTS, -(-labels.numel() // 1024)), dtype=torch.int32)
        _count_kernel[counted.shape](labels, counted, labels.numel(), options.ignore_index, num_warps=4)
    return 2, counted, 1.0


class _Launch(NamedTuple):
    """What the kernels that walk over logits have in common."""

    programs: int
    rows: int  # of a batch
    strides: tuple[int, ...]  # of student, teacher, target and gradient, along batch, class and row
    settings: tuple[float, ...]
    constants: dict[str, Any]


def _launch(
    student: Tensor, teacher: Tensor, target: Tensor, gradient: Tensor | None, options: Options
) -> _Launch:
    """Which program takes what. The numbers of rows and batches are ordinary arguments: another one compiles nothing.

    A thread holds 32 classes of both sets of logits at most. With more they do not fit into the 128 registers that let
    16 warps share a multiprocessor; with fewer, what is computed once a thread and row costs more than the classes. So
    a warp holds 1024 elements, and a row of 1000 classes needs no exchange between warps. Beyond 8192 classes registers
    also carry statistics from tile to tile, and 16 warps walk over one row: with few rows on their way, the second pass
    finds its row in the L2 cache.
    """
    batches, classes, rows = student.shape
    if rows == 1:
        batches, rows = 1, batches
    probabilities = target.is_floating_point()
    tensors = (student, teacher, target if probabilities else target[:, None], student if gradient is None else gradient)
    strides = [_strides(tensor, student) for tensor in tensors]
    pixels = rows > 1 and strides[0][1] != 1 and strides[0][2] == 1
    walked = [i for i in range(4) if i != 2 or probabilities]
    vector = 1
    if not pixels:
        unit = 16 // max(tensors[i].element_size() for i in walked)
        vector = math.gcd(unit, classes, *(strides[i][axis] for i in walked for axis in (0, 2)))
    largest = 1024 if pixels else 8192
    lanes = _power_of_2(-(-classes // 32))
    warps = max(4, lanes if pixels else lanes // 32)
    k = _power_of_2(-(-classes // (lanes * vector)))
    if classes > largest:
        warps = 16
        lanes = 16 if pixels else 512
        k = 16 // vector
    block = warps * 32 // lanes
    smoothing = options.label_smoothing
    alpha_t = options.alpha * options.temperature
    return _Launch(
        batches * -(-rows // block),
        rows,
        tuple(stride for operand in strides for stride in operand),
        (1 / options.temperature, alpha_t, alpha_t * options.temperature, options.hard_weight, smoothing),
        {
            "CLASSES": classes, "K": k, "ROWS": block, "LANES": lanes, "VECTOR": vector,
            "TEMPERATURE": int(options.temperature) if options.temperature in (1, 2) else 0,
            "PROBABILITIES": probabilities, "SMOOTHING": smoothing > 0, "PARTS": PARTS, "num_warps": warps,
        },
    )  # fmt: skip


def _rows(logits: Tensor) -> torch.Size:
    return logits.shape[:1] + logits.shape[2:]


def _strides(tensor: Tensor, student: Tensor) -> tuple[int, int, int]:
    """Of batch, class and row; (B, C, 1) is read as one batch of B rows."""
    b, c, r = tensor.stride()
    return (0, c, b) if student.shape[2] == 1 else (b, c, r)


def _power_of_2(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << (size - 1).bit_length()


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
