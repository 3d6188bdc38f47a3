"""The loss in Triton, for NVIDIA and AMD GPUs. Same functions, same algebra and same order of steps as `_eager`.

Logits are seen as (batch, classes, rows) with any strides, so (N, C), (N, C, d1, ...) and channels_last need no copy:
(N, C) is one batch of N rows. A program takes ROWS rows and all classes of them:

    statistics  sums of exp(z) and exp(z / T) without the label, and the soft term's dot product
    combine     cross-entropies, weight, loss: one number a row
    gradient    one number a class

Without the label, what is left of Z - 1 keeps all its digits where a model is sure of it. Of a target of probabilities,
the class with the most mass is the label.

Classes lie in a tile [K, ROWS, LANES, VECTOR]: LANES threads share a row; each takes VECTOR neighbours at a time, 16
bytes where the layout allows, and K times that, 32 classes at most. So few threads compute what is computed once a row.
Up to 8192 classes a row stays in registers from its statistics to its gradient: 3b bytes an element for logits of b
bytes. Beyond, the tile walks over the classes twice, the second time from the end, which the L2 cache still holds: 5b.
Where neighbours in memory are rows, as in (N, C, H, W), the threads of a warp lie on those and LANES are warps.

Offsets of rows are 64-bit; arithmetic is float32; nothing is read back to the host and no launch depends on the data.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from weighted_soft_labels.loss import Options

# Arguments that change with the batch: no kernel is compiled anew for one of them.
COUNTS = ["rows", "size", "ignore_index"]


class Plan(NamedTuple):
    """What a kernel is compiled for; see `_launch`."""

    CLASSES: tl.constexpr
    K: tl.constexpr
    ROWS: tl.constexpr
    LANES: tl.constexpr
    VECTOR: tl.constexpr
    TILE: tl.constexpr  # K * LANES * VECTOR classes at a time
    TEMPERATURE: tl.constexpr
    PROBABILITIES: tl.constexpr
    SMOOTHING: tl.constexpr
    PIXELS: tl.constexpr
    COUNT: tl.constexpr


class Settings(NamedTuple):
    inverse: tl.tensor  # 1 / T
    alpha_t: tl.tensor  # alpha * T
    alpha_t2: tl.tensor
    hard_weight: tl.tensor
    smoothing: tl.tensor


class Place(NamedTuple):
    """A program's rows and what the target says of them, [ROWS]."""

    index: tl.tensor  # in (B, R)
    size: tl.tensor  # B * R
    exists: tl.tensor
    kept: tl.tensor  # not ignored: of other rows no logits are read
    label: tl.tensor  # -1 for an index that names no class
    q: tl.tensor  # its mass


class Logits(NamedTuple):
    """Where a program's rows start, [ROWS], and how far it is from class to class."""

    address: tl.tensor
    stride: tl.tensor


class Row(NamedTuple):
    """What is known of one set of logits: of rows, [ROWS], or of what one thread has seen of them, [ROWS, LANES]."""

    peak: (
        tl.tensor
    )  # maximum, where z is 0; never -inf, as it is subtracted from logits that may be
    others: tl.tensor  # sum of exp(z) without the label
    soft_others: tl.tensor  # the same of exp(z / T)
    qz: tl.tensor  # for probabilities: sum of q * z without the label


class Statistics(NamedTuple):
    student: Row
    teacher: Row
    dot: tl.tensor  # sum of the teacher's exp(z / T) times the student's z, without the label
    z_sum: tl.tensor  # for label smoothing: sum of the student's z without the label
    taken: tl.tensor  # for label smoothing: of how many classes
    mass: tl.tensor  # for probabilities: sum of q without the label


class Total(NamedTuple):
    """What the loss needs to know of one set of logits, [ROWS]."""

    z: tl.tensor  # at the label
    e: tl.tensor  # exp(z) and exp(z / T) there
    soft: tl.tensor
    rest: tl.tensor  # Z - 1
    soft_rest: tl.tensor  # Z' - 1
    ce: tl.tensor


class Scales(NamedTuple):
    """Factors of the gradient, [ROWS]."""

    hard: tl.tensor  # of the student's exp(z)
    soft: tl.tensor  # of the student's exp(z / T)
    ratio: tl.tensor  # of the teacher's, relative to that
    uniform: tl.tensor  # what label smoothing takes off every class
    q: tl.tensor  # for probabilities: of q
    at_label: tl.tensor  # the whole gradient there


# --- arithmetic. Numbers stand where they are used: globals would be compared with what they were at every launch ---


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to float32 precision; the hardware logarithm has no relative precision near 1."""
    n = (
        (1 + x).to(tl.int32, bitcast=True) - 0x3F400000
    ) & -0x800000  # of 1 + x = 2^n m, 3/4 <= m < 3/2, times 2^23
    scale = (0x3F800000 - n).to(tl.float32, bitcast=True)  # 2^-n
    f = x * scale + (scale - 1)  # m - 1, exact for n = 0
    s = f / (2 + f)  # log(m) = 2 atanh(s), 6 terms of which are exact to 1e-9
    q = s * s
    p = 1 / 7 + q * (1 / 9 + q * (1 / 11))
    return n.to(tl.float32) * 8.262958294867817e-8 + 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * p)))


@triton.jit
def _one_minus_exp(r):
    """1 - exp(-r) for r >= 0 to float32 precision."""
    p = 1 - r * (1 / 8) * (1 - r * (1 / 9))
    p = 1 - r * (1 / 5) * (1 - r * (1 / 6) * (1 - r * (1 / 7) * p))
    p = 1 - r * (1 / 2) * (1 - r * (1 / 3) * (1 - r * (1 / 4) * p))
    return tl.where(r < 0.5, r * p, 1 - tl.exp2(r * -1.4426950408889634))


@triton.jit
def _exponentials(z, inverse, TEMPERATURE: tl.constexpr):
    """exp(z), exp(z / T); one exponential where squaring loses no digit that counts."""
    if TEMPERATURE == 2:
        soft = tl.exp2(z * 0.7213475204444817)
        return soft * soft, soft
    else:
        soft = tl.exp2(z * (inverse * 1.4426950408889634))
        return soft if TEMPERATURE == 1 else tl.exp2(z * 1.4426950408889634), soft


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


# --- memory and target ---


@triton.jit
def _logits(x, batch, row, UNIT: tl.constexpr):
    # In a form that shows the compiler what the launcher has checked: multiples of UNIT. It takes that to load and
    # store 16 bytes at a time; by itself it would see nothing between a multiple of 16 and any number.
    return Logits(x[0] + (batch * (x[1] // UNIT * UNIT) + row * (x[3] // UNIT * UNIT)), x[2])


@triton.jit
def _columns(start, rows, plan: tl.constexpr):
    """The classes of a tile: the first of every lane, [1, 1, LANES, 1], how far from it the rest is, which exist."""
    k = tl.arange(0, plan.K)[:, None, None, None] * (plan.LANES * plan.VECTOR)
    lane = start + tl.arange(0, plan.LANES)[None, None, :, None] * plan.VECTOR
    step = k + tl.arange(0, plan.VECTOR)[None, None, None, :]
    return lane, step, _tile(rows) & (lane + step < plan.CLASSES)


@triton.jit
def _address(logits, columns, plan: tl.constexpr):
    """Addresses of a tile. Hints at what is contiguous decide which dimensions are a warp's lanes; never is it K."""
    address = _tile(logits.address) + columns.to(tl.int64) * logits.stride
    if plan.PIXELS:  # hides alignment: a thread is to take all classes of a row, not one class of neighbouring rows
        return tl.max_contiguous(tl.multiple_of(address, [1, 1, 1, 1]), [1, 4, 2, 1])
    else:
        return tl.max_contiguous(address, [1, 2, 4, 8])


@triton.jit
def _load(logits, columns, mask, plan: tl.constexpr):
    """Anything at all where `mask` is false: to say what would take an instruction a class."""
    return tl.load(_address(logits, columns, plan), mask).to(tl.float32)


@triton.jit
def _place(target, batch, row, rows, ignore_index, plan: tl.constexpr):
    """The label is the class with the most mass, which of an index has all of it."""
    exists = row < rows
    if plan.PROBABILITIES:
        kept, label, q = (
            exists,
            tl.zeros([plan.ROWS], tl.int32),
            tl.zeros([plan.ROWS], tl.float32) - float("inf"),
        )
        for start in range(0, plan.CLASSES, plan.TILE):
            lane, step, mask = _columns(start, exists, plan)
            mass = tl.where(mask, _load(target, lane + step, mask, plan), float("-inf"))
            most = tl.max(_most(mass), axis=1)
            leader = tl.max(_most(tl.where(mass == _tile(most), lane + step, 0)), axis=1)
            label, q = tl.where(most > q, leader, label), tl.maximum(most, q)
    else:
        index = tl.load(target.address, exists, other=0).to(tl.int64)
        kept, q = exists & (index != ignore_index), tl.full([plan.ROWS], 1.0, tl.float32)
        label = tl.where((index >= 0) & (index < plan.CLASSES), index, -1).to(tl.int32)
    size = tl.num_programs(0) // tl.cdiv(rows, plan.ROWS) * rows.to(tl.int64)
    return Place(batch * rows + row, size, exists, kept, label, q)


@triton.jit
def _kept(target, size, stride, ignore_index):
    """Which of 1024 labels are there and not ignored."""
    i = tl.arange(0, 1024)
    label = tl.load(target + i.to(tl.int64) * stride, i < size, other=0).to(tl.int64)
    return ((i < size) & (label != ignore_index)).to(tl.int32)


@triton.jit
def _unit(target, counted, size, stride, ignore_index, share, COUNT: tl.constexpr):
    """What every row counts in the loss: `share`, for a mean over labels divided by how many are not ignored.

    1024 labels are counted here, by every program; of more, `_count_kernel` has counted up to 256 parts.
    """
    if COUNT == 1:
        share /= tl.sum(_kept(target, size.to(tl.int32), stride, ignore_index), axis=0).to(
            tl.float32
        )
    elif COUNT == 2:
        part = tl.arange(0, 256)
        share /= tl.sum(tl.load(counted + part, part < tl.cdiv(size, 1024), other=0), axis=0).to(
            tl.float32
        )
    return share


# --- statistics ---


@triton.jit
def _row(x, q, others, peak, inverse, plan: tl.constexpr):
    """z, exp(z / T) and sums of one set of logits; `others` says which classes are in the tile and not the label."""
    z = tl.where(others, x - _tile(peak), float("-inf"))
    e, soft = _exponentials(z, inverse, plan.TEMPERATURE)
    qz = _sum(_product(q, z)) if plan.PROBABILITIES else tl.zeros_like(peak)
    return z, soft, Row(peak, _sum(e), _sum(soft), qz)


@triton.jit
def _block(student, teacher, target, start, place, known, inverse, plan: tl.constexpr):
    """z of both sets of logits for one tile of classes, and the statistics of each thread."""
    lane, step, mask = _columns(start, place.kept, plan)
    columns = lane + step
    s, t = _load(student, columns, mask, plan), _load(teacher, columns, mask, plan)
    student_peak = tl.maximum(
        _most(tl.where(columns < plan.CLASSES, s, float("-inf"))), known.student.peak
    )
    teacher_peak = tl.maximum(
        _most(tl.where(columns < plan.CLASSES, t, float("-inf"))), known.teacher.peak
    )
    if (
        plan.TILE >= plan.CLASSES
    ):  # else a thread's own are as good, and nothing waits for other warps
        student_peak, teacher_peak = (
            tl.max(student_peak, 1, keep_dims=True),
            tl.max(teacher_peak, 1, keep_dims=True),
        )
    others = mask & (_tile(place.label) - lane != step)  # in one comparison with a constant
    q = tl.where(others, _load(target, columns, mask, plan), 0.0) if plan.PROBABILITIES else s
    student_z, _, student_row = _row(s, q, others, student_peak, inverse, plan)
    teacher_z, soft, teacher_row = _row(t, q, others, teacher_peak, inverse, plan)
    dot = _sum(_product(soft, student_z))
    zero = tl.zeros_like(dot)
    z_sum = _sum(tl.where(others, student_z, 0.0)) if plan.SMOOTHING else zero
    taken = _sum(tl.where(others, 1.0, 0.0)) if plan.SMOOTHING else zero
    mass = _sum(q) if plan.PROBABILITIES else zero
    # Not as Statistics: Triton 3.3 returns tuples of tuples, but no deeper ones.
    return student_z, teacher_z, student_row, teacher_row, dot, z_sum, taken, mass


@triton.jit
def _join_row(a, b, mass, inverse, plan: tl.constexpr):
    """b and, seen from b's maximum, a; how much higher that is, and what it makes of exp(z / T)."""
    move = b.peak - a.peak
    factor, soft_factor = _exponentials(-move, inverse, plan.TEMPERATURE)
    others, soft_others = a.others * factor + b.others, a.soft_others * soft_factor + b.soft_others
    return Row(b.peak, others, soft_others, a.qz - mass * move + b.qz), move, soft_factor


@triton.jit
def _join(a, b, inverse, plan: tl.constexpr):
    """Statistics of a's and b's classes; b's maxima are no lower. Every sum keeps its sign, so nothing cancels."""
    student, move, _ = _join_row(a.student, b.student, a.mass, inverse, plan)
    teacher, _, factor = _join_row(a.teacher, b.teacher, a.mass, inverse, plan)
    # Nothing is left of an infinite sum that has no weight any more.
    dot = tl.where(factor == 0, 0.0, (a.dot - a.teacher.soft_others * move) * factor) + b.dot
    z_sum, taken, mass = a.z_sum - a.taken * move + b.z_sum, a.taken + b.taken, a.mass + b.mass
    return Statistics(student, teacher, dot, z_sum, taken, mass)


@triton.jit
def _nothing(student_peak, teacher_peak, plan: tl.constexpr):
    """Statistics of no class, seen from these maxima."""
    zero = tl.zeros([plan.ROWS, plan.LANES], tl.float32)
    return Statistics(
        Row(student_peak, zero, zero, zero),
        Row(teacher_peak, zero, zero, zero),
        zero,
        zero,
        zero,
        zero,
    )


@triton.jit
def _across(known):
    """Statistics of rows from those of the threads that share them and their maxima."""
    s, t = known.student, known.teacher
    s = Row(tl.max(s.peak, 1), tl.sum(s.others, 1), tl.sum(s.soft_others, 1), tl.sum(s.qz, 1))
    t = Row(tl.max(t.peak, 1), tl.sum(t.others, 1), tl.sum(t.soft_others, 1), tl.sum(t.qz, 1))
    return Statistics(
        s,
        t,
        tl.sum(known.dot, 1),
        tl.sum(known.z_sum, 1),
        tl.sum(known.taken, 1),
        tl.sum(known.mass, 1),
    )


@triton.jit
def _walk(student, teacher, target, place, known, inverse, plan: tl.constexpr):
    """Statistics of rows that do not fit into a tile: every thread has its own until the end."""
    for start in range(0, plan.CLASSES, plan.TILE):
        _s, _t, s, t, dot, z_sum, taken, mass = _block(
            student, teacher, target, start, place, known, inverse, plan
        )
        known = _join(known, Statistics(s, t, dot, z_sum, taken, mass), inverse, plan)
    s_peak, t_peak = (
        tl.max(known.student.peak, 1, keep_dims=True),
        tl.max(known.teacher.peak, 1, keep_dims=True),
    )
    return _join(known, _nothing(s_peak, t_peak, plan), inverse, plan)


# --- combine ---


@triton.jit
def _total(row, mass, logits, place, inverse, plan: tl.constexpr):
    # An index that names no class may not be followed: its element is NaN.
    followed = place.kept & (place.label >= 0)
    x = tl.load(
        logits.address + place.label.to(tl.int64) * logits.stride, followed, other=float("nan")
    ).to(tl.float32)
    z = tl.where(place.kept, x - row.peak, 0.0)
    e, soft = _exponentials(z, inverse, plan.TEMPERATURE)
    # The label is a maximum and exp(z) - 1 is 0, or another class is and counts 1 in `others`.
    rest, soft_rest = row.others + (e - 1), row.soft_others + (soft - 1)
    ce = _log1p(rest) - z
    if plan.PROBABILITIES:
        ce = (mass + place.q) * _log1p(rest) - (row.qz + _product(place.q, z))
    return Total(z, e, soft, rest, soft_rest, ce)


@triton.jit
def _combine(student, teacher, dot, z_sum, settings, plan: tl.constexpr):
    """Weight, soft term and loss of every row."""
    dot, z_sum = dot + _product(teacher.soft, student.z), z_sum + student.z
    # 1e-7, of the official code, keeps the weight finite where the teacher's cross-entropy is 0.
    # The student that rules the label out is infinitely worse than any teacher, also one that does the same.
    weight = tl.where(
        student.ce == float("inf"), 1.0, _one_minus_exp(student.ce / (teacher.ce + 1e-7))
    )
    soft = _log1p(student.soft_rest) - dot * settings.inverse / (1 + teacher.soft_rest)
    hard = student.ce
    if plan.SMOOTHING:
        uniform = _log1p(student.rest) - z_sum / plan.CLASSES
        hard = _product(1 - settings.smoothing, hard) + settings.smoothing * uniform
    # A term with scale 0 is left out, so 0 never meets inf; weight 0 on an infinite soft term: the student rules out a
    # class to which the teacher gives mass.
    weighted = tl.where((weight == 0) & (soft == float("inf")), float("inf"), weight * soft)
    return (
        weight,
        soft,
        _product(settings.hard_weight, hard) + _product(settings.alpha_t2, weighted),
    )


# --- gradient ---


@triton.jit
def _scales(known, student, teacher, q, weight, unit, settings, plan: tl.constexpr):
    """`unit` is the incoming gradient of every row, 0 where it is ignored; q is the label's mass."""
    hard_weight, smoothed = (
        settings.hard_weight * unit,
        settings.hard_weight * settings.smoothing * unit,
    )
    of_q, uniform = hard_weight - smoothed, smoothed / plan.CLASSES
    others_q = of_q * known.mass + smoothed
    hard = (others_q + of_q * q) / (1 + student.rest)
    soft = _product(settings.alpha_t, weight) * unit / (1 + student.soft_rest)
    # Exactly 1 where student and teacher agree: their parts of the gradient cancel to the last digit.
    ratio = tl.where(
        student.soft_rest == teacher.soft_rest,
        1.0,
        (1 + student.soft_rest) / (1 + teacher.soft_rest),
    )
    # At the label p - 1 = -others / Z does not cancel where p is near 1, elsewhere p itself does not.
    others, soft_others = known.student.others, known.student.soft_others
    at_label = tl.where(others < student.e, others_q - hard * others, hard * student.e - of_q * q)
    sure, unsure = (
        ratio * known.teacher.soft_others - soft_others,
        student.soft - ratio * teacher.soft,
    )
    at_label += soft * tl.where(soft_others < student.soft, sure, unsure) - uniform
    return Scales(hard, soft, ratio, uniform, of_q, at_label)


@triton.jit
def _write(
    gradient, student_z, teacher_z, target, start, place, scales, inverse, plan: tl.constexpr
):
    """hard_weight * (p_s - q) + alpha * T * weight * (p'_s - p'_t) for one tile of classes, all scales included."""
    lane, step, mask = _columns(start, place.exists, plan)
    e, student_soft = _exponentials(student_z, inverse, plan.TEMPERATURE)
    _, teacher_soft = _exponentials(teacher_z, inverse, plan.TEMPERATURE)
    # The soft terms first: they all but cancel where student and teacher agree, and hard may be small beside each.
    out = (
        _tile(scales.soft) * (student_soft - _tile(scales.ratio) * teacher_soft)
        + _tile(scales.hard) * e
    )
    if plan.SMOOTHING:
        out -= _tile(scales.uniform)
    if plan.PROBABILITIES:
        out -= _tile(scales.q) * _load(target, lane + step, mask, plan)
    # Not the form of `_block`, or registers would hold the answers for all classes from there to here.
    out = tl.where(lane - _tile(place.label) == -step, _tile(scales.at_label), out)
    # Where logits are read twice, the gradient is not to drive them out of the cache.
    modifier: tl.constexpr = "" if plan.TILE >= plan.CLASSES else ".cs"
    tl.store(_address(gradient, lane + step, plan), out, mask, cache_modifier=modifier)


@triton.jit
def _run(
    operands,
    counted,
    rows,
    ignore_index,
    upstream,
    share,
    settings,
    GRADIENT: tl.constexpr,
    plan: tl.constexpr,
):
    """A program's rows, their terms, loss and unit, what a row counts; with GRADIENT its gradient is written."""
    inverse = settings.inverse
    blocks = tl.cdiv(rows, plan.ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * plan.ROWS + tl.arange(0, plan.ROWS)
    student = _logits(operands[0], batch, row, plan.VECTOR)
    teacher = _logits(operands[1], batch, row, plan.VECTOR)
    target = _logits(operands[2], batch, row, plan.VECTOR if plan.PROBABILITIES else 1)
    gradient = _logits(operands[3], batch, row, plan.VECTOR)
    place = _place(target, batch, row, rows, ignore_index, plan)
    unit = _unit(
        operands[2][0], counted, place.size, operands[2][3], ignore_index, share, plan.COUNT
    )
    if upstream is not None:
        unit *= tl.load(_logits(upstream, batch, row, 1).address, place.kept, other=0.0).to(
            tl.float32
        )
    lowest = tl.full(
        [plan.ROWS, plan.LANES], -3.4028234663852886e38, tl.float32
    )  # of finite numbers
    known = _nothing(lowest, lowest, plan)
    if plan.TILE >= plan.CLASSES:
        student_z, teacher_z, s, t, dot, zs, n, mass = _block(
            student, teacher, target, 0, place, known, inverse, plan
        )
        known = Statistics(s, t, dot, zs, n, mass)
    else:
        known = _walk(student, teacher, target, place, known, inverse, plan)
    known = _across(known)
    s = _total(known.student, known.mass, student, place, inverse, plan)
    t = _total(known.teacher, known.mass, teacher, place, inverse, plan)
    weight, soft, loss = _combine(s, t, known.dot, known.z_sum, settings, plan)
    if GRADIENT:
        scales = _scales(
            known, s, t, place.q, weight, tl.where(place.kept, unit, 0.0), settings, plan
        )
        last: tl.constexpr = (plan.CLASSES - 1) // plan.TILE * plan.TILE
        for back in range(0, plan.CLASSES, plan.TILE):
            if plan.TILE < plan.CLASSES:
                lane, step, mask = _columns(last - back, place.kept, plan)
                x, y = (
                    _load(student, lane + step, mask, plan),
                    _load(teacher, lane + step, mask, plan),
                )
                student_z = tl.where(mask, x - _tile(known.student.peak), float("-inf"))
                teacher_z = tl.where(mask, y - _tile(known.teacher.peak), float("-inf"))
            _write(
                gradient, student_z, teacher_z, target, last - back, place, scales, inverse, plan
            )
    return place, (s.ce, t.ce, weight, soft), loss, unit


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    student, teacher, target, gradient, loss, counted, rows, ignore_index, inverse, alpha_t, alpha_t2, hard_weight,
    smoothing, share, student_b, student_c, student_r, teacher_b, teacher_c, teacher_r, target_b, target_c, target_r,
    gradient_b, gradient_c, gradient_r,
    CLASSES: tl.constexpr, TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr,
    COUNT: tl.constexpr, GRADIENT: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Loss of every row, its share of the mean included, or with TERMS its four terms; with GRADIENT its gradient."""
    place, terms, total, unit = _run(
        ((student, student_b, student_c, student_r), (teacher, teacher_b, teacher_c, teacher_r),
         (target, target_b, target_c, target_r), (gradient, gradient_b, gradient_c, gradient_r)),
        counted, rows, ignore_index, None, share,
        Settings(inverse, alpha_t, alpha_t2, hard_weight, smoothing), GRADIENT,
        Plan(CLASSES, K, ROWS, LANES, VECTOR, K * LANES * VECTOR, TEMPERATURE, PROBABILITIES, SMOOTHING, PIXELS, COUNT),
    )  # fmt: skip
    if TERMS:
        for i in tl.static_range(4):
            tl.store(
                loss + i * place.size + place.index,
                tl.where(place.kept, terms[i], 0.0),
                place.exists,
            )
    else:
        # Nothing to average: 0 / 0.
        tl.store(loss + place.index, tl.where(place.kept, total, 0.0) * unit, place.exists)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    student, teacher, target, gradient, upstream, counted, rows, ignore_index, inverse, alpha_t, alpha_t2, hard_weight,
    smoothing, share, student_b, student_c, student_r, teacher_b, teacher_c, teacher_r, target_b, target_c, target_r,
    gradient_b, gradient_c, gradient_r, upstream_b, upstream_r,
    CLASSES: tl.constexpr, TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The gradient for any incoming gradient, from nothing but the logits: as many bytes as the forward kernel's."""
    _run(
        ((student, student_b, student_c, student_r), (teacher, teacher_b, teacher_c, teacher_r),
         (target, target_b, target_c, target_r), (gradient, gradient_b, gradient_c, gradient_r)),
        counted, rows, ignore_index, (upstream, upstream_b, 0, upstream_r), share,
        Settings(inverse, alpha_t, alpha_t2, hard_weight, smoothing), True,
        Plan(CLASSES, K, ROWS, LANES, VECTOR, K * LANES * VECTOR, TEMPERATURE, PROBABILITIES, SMOOTHING, PIXELS, COUNT),
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _scale_kernel(gradient, upstream, size):
    """gradient *= upstream, in place and in float32; few programs, so that to find a factor of 1 takes no time."""
    BLOCK: tl.constexpr = 2048
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
            i = start + tl.arange(0, BLOCK)
            if (
                start + BLOCK <= size
            ):  # without a mask, of which the compiler does not know that it allows 16 bytes
                tl.store(gradient + i, tl.load(gradient + i).to(tl.float32) * factor)
            else:
                tl.store(
                    gradient + i, tl.load(gradient + i, i < size).to(tl.float32) * factor, i < size
                )


@triton.jit(do_not_specialize=COUNTS)
def _count_kernel(target, counted, size, ignore_index):
    """How many labels are not ignored, one part a program."""
    kept = tl.zeros([1024], tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * 1024, size, tl.num_programs(0) * 1024):
        kept += _kept(target + first, tl.minimum(size - first, 1024).to(tl.int32), 1, ignore_index)
    tl.store(counted + tl.program_id(0), tl.sum(kept, axis=0))


# --- the functions that every implementation has ---

TAKES_MATRICES = False


def forward(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, gradient: Tensor | None
) -> Tensor:
    """The reduced loss; fills `gradient` for an incoming gradient of 1."""
    loss = _launch_forward(student, teacher, target, options, gradient, False)
    if options.reduction == "none":
        return loss
    total = loss.sum()  # of shares in the mean, where it is one
    return total * math.nan if options.reduction == "mean" and loss.numel() == 0 else total


def backward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    upstream: Tensor,
    options: Options,
    gradient: Tensor,
) -> None:
    """Fill `gradient` for the incoming gradient `upstream`, which is applied before rounding to the student's dtype."""
    with torch.cuda.device_of(student):
        programs, counted, scalars, constants = _launch(student, teacher, target, gradient, options)
        b, _, r = _strides(upstream[:, None], student) if upstream.dim() else (0, 0, 0)
        tensors = student, teacher, target, gradient, upstream, counted
        _backward_kernel[(programs,)](*tensors, *scalars, b, r, **constants)


def terms(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:
    """Student CE, teacher CE, weight and soft term of every row, (4, B, R); 0 where it is ignored."""
    return _launch_forward(student, teacher, target, options._replace(reduction="none"), None, True)


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply a gradient that was formed for an incoming gradient of 1, in place; it is dense, whatever its order."""
    programs = min(-(-gradient.numel() // 2048), 1024)
    with torch.cuda.device_of(gradient):
        _scale_kernel[(programs,)](gradient, upstream, gradient.numel(), num_warps=4)


# Launches of the forward kernel by the description of their tensors: what runs it, and all arguments but these. To bind
# and specialise them anew for every launch is much of what a small batch costs the host. Not of interpreted kernels.
_REPLAYS: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def _launch_forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    terms: bool,
) -> Tensor:
    loss = student.new_empty((4,) * terms + student.shape[::2], dtype=torch.float32)
    tensors = (student, teacher, target, student if gradient is None else gradient, loss)
    key = (
        student.shape, student.stride(), student.dtype, teacher.stride(), teacher.dtype, target.stride(),
        target.dtype, student.device, options, terms, gradient is not None and (gradient.stride(), gradient.dtype),
    )  # fmt: skip
    # Kernels are specialised for tensors that start on a multiple of 16 bytes.
    repeats = student.shape[0] == 1 and not any(tensor.data_ptr() % 16 for tensor in tensors)
    with torch.cuda.device_of(student):  # Triton launches on the current device
        if repeats and key in _REPLAYS:
            run, arguments = _REPLAYS[key]
            run(*tensors, student, *arguments)
            return loss
        programs, counted, scalars, constants = _launch(student, teacher, target, gradient, options)
        constants |= {"GRADIENT": gradient is not None, "TERMS": terms}
        compiled = _forward_kernel[(programs,)](*tensors, counted, *scalars, **constants)
    if repeats and compiled is not None and constants["COUNT"] != 2:
        if len(_REPLAYS) == 256:
            _REPLAYS.clear()
        constexprs = (constants[name] for name in _forward_kernel.arg_names if name in constants)
        _REPLAYS[key] = compiled[(programs, 1, 1)], (*scalars, *constexprs)
    return loss


def _count(student: Tensor, target: Tensor, options: Options) -> tuple[int, Tensor, float]:
    """How the kernel gets at the denominator of the mean, see `_unit`; what depends on sizes alone is in a factor."""
    counted = student  # any address will do where a pointer is not followed
    if options.reduction != "mean" or target.is_floating_point():
        return (
            0,
            counted,
            1 / max(student.shape[0] * student.shape[2], 1) if options.reduction == "mean" else 1.0,
        )
    # To read 1024 labels takes no time, and saves a launch.
    if target.numel() <= 1024 and (
        len(target) == 1 or target.stride(0) == target.shape[1] * target.stride(1)
    ):
        return 1, counted, 1.0
    labels = target.reshape(-1).contiguous()
    counted = student.new_empty(min(256, -(-labels.numel() // 1024)), dtype=torch.int32)
    _count_kernel[counted.shape](labels, counted, labels.numel(), options.ignore_index, num_warps=4)
    return 2, counted, 1.0


def _launch(
    student: Tensor, teacher: Tensor, target: Tensor, gradient: Tensor | None, options: Options
) -> tuple[int, Tensor, tuple[Any, ...], dict[str, Any]]:
    """How many programs, their arguments and what they are compiled for. Another number of rows compiles nothing.

    A thread holds 32 classes of both sets of logits at most. With more they do not fit into the 128 registers that let
    16 warps share a multiprocessor; with fewer, what is computed once a thread and row costs more than the classes. So
    a warp holds 1024 elements, and a row of 1000 classes needs no exchange between warps. With probabilities, or where
    registers carry statistics from tile to tile, it is 16; then 16 warps walk over one row, and with few rows on their
    way the second pass finds its row in the L2 cache.
    """
    batches, classes, rows = student.shape
    if rows == 1:
        batches, rows = 1, batches
    probabilities = target.is_floating_point()
    # A label is where its row is, whatever the class.
    q = target if probabilities else target[:, None].expand(student.shape)
    tensors = (student, teacher, q, student if gradient is None else gradient)
    strides = [_strides(tensor, student) for tensor in tensors]
    pixels = rows > 1 and strides[0][1] != 1 and strides[0][2] == 1
    walked = (0, 1, 2, 3) if probabilities else (0, 1, 3)
    largest = max(tensors[i].element_size() for i in walked)
    vector = (
        1
        if pixels
        else math.gcd(16 // largest, classes, *(strides[i][j] for i in walked for j in (0, 2)))
    )
    lanes = triton.next_power_of_2(triton.cdiv(classes, 16 if probabilities else 32))
    k = triton.next_power_of_2(triton.cdiv(classes, lanes * vector))
    if classes > (512 if pixels else 8192):
        lanes, k = 16 if pixels else 512, 16 // vector
    warps = max(4, lanes if pixels else lanes // 32)
    block = warps * 32 // lanes
    mode, counted, share = _count(student, target, options)
    alpha_t = options.alpha * options.temperature
    inverse, alpha_t2 = 1 / options.temperature, alpha_t * options.temperature
    settings = (inverse, alpha_t, alpha_t2, options.hard_weight, options.label_smoothing)
    scalars = (
        rows,
        options.ignore_index,
        *settings,
        share,
        *(stride for operand in strides for stride in operand),
    )
    return batches * -(-rows // block), counted, scalars, {
        "CLASSES": classes, "K": k, "ROWS": block, "LANES": lanes, "VECTOR": vector,
        "TEMPERATURE": int(options.temperature) if options.temperature in (1, 2) else 0, "num_warps": warps,
        "PROBABILITIES": probabilities, "SMOOTHING": options.label_smoothing > 0, "PIXELS": pixels, "COUNT": mode,
    }  # fmt: skip


def _strides(tensor: Tensor, student: Tensor) -> tuple[int, int, int]:
    """Of batch, class and row; (B, C, 1) is read as one batch of B rows. That of a single batch depends on its size."""
    b, c, r = tensor.stride()
    if student.shape[0] == 1:
        return 0, c, r
    return (0, c, b) if student.shape[2] == 1 else (b, c, r)
