"""Triton backend: the loss and its gradient in one kernel, for NVIDIA and AMD GPUs.

The steps have the names and the order of `eager.py` and `cpu_kernel.c`:

    statistics  sums of exp(z) and exp(z / T) without the label, and the soft term's dot product
    combine     cross-entropies, weight, soft term and loss: one number per row
    gradient    one number per class

The closed form stands in eager.py. These sums leave out the label instead of the top class: a
thread knows the label before it reads a logit, but the maximum only after the last one. For a
target of probabilities, the label is the class with the largest of them.

The kernel sees logits as (batch, classes, rows) with any strides, so (N, C), (N, C, d1, ...) and
channels_last need no copy. (N, C) is one batch of N rows. A program computes ROWS rows with all
their classes, in tiles [K, ROWS, LANES, VECTOR]:

- LANES threads share a row. Each takes VECTOR neighbouring classes at a time, 16 bytes where the
  layout allows, and K times that; see `_tile_sizes`.
- Up to 8192 classes, a row stays in registers from its statistics to its gradient. For logits of b
  bytes, 3b bytes move per element.
- Beyond that, the tile passes over the classes twice. The second pass starts at the end, which the
  L2 cache still contains, so 3b to 5b bytes move per element.
- If neighbours in memory are rows, as in (N, C, H, W), the threads of a warp lie on rows, and
  LANES counts warps.

Offsets of rows are 64-bit, and arithmetic is float32. The host reads nothing back and no launch
depends on the data, so CUDA graphs can capture the loss.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from weighted_soft_labels._options import Options, index_shape, loss_shape

# Arguments that change with the batch: another value of one compiles no other kernel.
COUNTS = ["row_count", "size", "ignore_index"]


class Plan(NamedTuple):
    """What a kernel is compiled for; see `_launch` and `_tile_sizes`."""

    CLASSES: tl.constexpr
    K: tl.constexpr
    ROWS: tl.constexpr
    LANES: tl.constexpr
    VECTOR: tl.constexpr
    TILE: tl.constexpr  # K * LANES * VECTOR classes at a time
    TEMPERATURE: tl.constexpr  # 1, 2 or 0 for any other
    PROBABILITIES: tl.constexpr
    SMOOTHING: tl.constexpr
    PIXELS: tl.constexpr
    COUNT: tl.constexpr  # 0: no mean; 1: each program counts; 2: `_count_kernel` has counted


class Settings(NamedTuple):
    inverse: tl.tensor  # 1 / T
    alpha_t: tl.tensor  # alpha * T
    alpha_t2: tl.tensor  # alpha * T^2
    hard_weight: tl.tensor
    smoothing: tl.tensor
    weight_scale: tl.tensor


class Rows(NamedTuple):
    """A program's rows and their labels, [ROWS]."""

    index: tl.tensor  # in (batches, rows)
    size: tl.tensor  # how many rows all batches have
    exists: tl.tensor
    kept: tl.tensor  # not ignored; the logits of ignored rows are not read
    label: tl.tensor  # -1 for an index that names no class
    q: tl.tensor  # the label's probability


class Logits(NamedTuple):
    """Where a program's rows start, [ROWS], and the stride of the classes."""

    address: tl.tensor
    stride: tl.tensor


class Sums(NamedTuple):
    """Statistics of one set of logits, per thread, [ROWS, LANES], or per row, [ROWS]."""

    maximum: tl.tensor  # where z = 0; never -inf, because masked logits minus -inf would be NaN
    others: tl.tensor  # sum of exp(z) without the label
    soft_others: tl.tensor  # sum of exp(z / T) without the label
    qz: tl.tensor  # for probabilities: sum of q * z without the label


class Statistics(NamedTuple):
    student: Sums
    teacher: Sums
    dot: tl.tensor  # sum of the teacher's exp(z / T) times the student's z, without the label
    z_sum: tl.tensor  # for label smoothing: sum of the student's z without the label
    z_count: tl.tensor  # for label smoothing: how many classes that sum has
    others_q: tl.tensor  # for probabilities: sum of q without the label


class Row(NamedTuple):
    """What the loss needs of one set of logits, [ROWS]."""

    z: tl.tensor  # at the label
    e: tl.tensor  # exp(z) at the label
    soft: tl.tensor  # exp(z / T) at the label
    excess: tl.tensor  # Z - 1, Z the sum of exp(z) over all classes
    soft_excess: tl.tensor  # the same of exp(z / T)
    ce: tl.tensor


class Scales(NamedTuple):
    """Factors of the gradient, [ROWS]."""

    hard: tl.tensor  # of the student's exp(z)
    soft: tl.tensor  # of the student's exp(z / T)
    ratio: tl.tensor  # of the teacher's exp(z / T), relative to `soft`
    uniform: tl.tensor  # what label smoothing subtracts from every class
    q: tl.tensor  # for probabilities: of q
    at_label: tl.tensor  # the whole gradient at the label


# --- arithmetic. Constants are literals: Triton compares globals at every launch. ---


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to float32 precision; the hardware's log is imprecise near 1."""
    # n is the exponent of 1 + x = 2^n m with 3/4 <= m < 3/2, times 2^23.
    n = ((1 + x).to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000
    scale = (0x3F800000 - n).to(tl.float32, bitcast=True)  # 2^-n
    f = x * scale + (scale - 1)  # m - 1, exact for n = 0
    s = f / (2 + f)  # log(m) = 2 atanh(s), 6 terms of which are exact to 1e-9
    q = s * s
    p = 1 / 7 + q * (1 / 9 + q * (1 / 11))
    p = 1 + q * (1 / 3 + q * (1 / 5 + q * p))
    return n.to(tl.float32) * 8.262958294867817e-8 + 2 * s * p


@triton.jit
def _one_minus_exp(r):
    """1 - exp(-r) for r >= 0 to float32 precision."""
    p = 1 - r * (1 / 8) * (1 - r * (1 / 9))
    p = 1 - r * (1 / 5) * (1 - r * (1 / 6) * (1 - r * (1 / 7) * p))
    p = 1 - r * (1 / 2) * (1 - r * (1 / 3) * (1 - r * (1 / 4) * p))
    return tl.where(r < 0.5, r * p, 1 - tl.exp2(r * -1.4426950408889634))


@triton.jit
def _exponentials(z, inverse, TEMPERATURE: tl.constexpr):
    """exp(z) and exp(z / T); for T = 2 the first is the square of the second."""
    if TEMPERATURE == 2:
        soft = tl.exp2(z * 0.7213475204444817)
        return soft * soft, soft
    else:
        soft = tl.exp2(z * (inverse * 1.4426950408889634))
        return soft if TEMPERATURE == 1 else tl.exp2(z * 1.4426950408889634), soft


@triton.jit
def _sum(x):
    """Sum over a thread's classes, [K, ROWS, LANES, VECTOR] to [ROWS, LANES]."""
    return tl.sum(tl.sum(x, axis=3), axis=0)


@triton.jit
def _max(x):
    return tl.max(tl.max(x, axis=3), axis=0)


@triton.jit
def _product(mass, value):
    """mass * value, but 0 where the mass is 0 and the value infinite."""
    return mass * tl.where(mass == 0, 0.0, value)


@triton.jit
def _per_class(x):
    """Broadcast [ROWS] or [ROWS, LANES] against [K, ROWS, LANES, VECTOR]."""
    return x[None, :, None, None] if len(x.shape) == 1 else x[None, :, :, None]


# --- memory and target ---


@triton.jit
def _logits(operand, batch, row, DIVISOR: tl.constexpr):
    # `_launch` has checked that DIVISOR divides strides b and r, and this form tells the compiler,
    # which then loads and stores 16 bytes at a time.
    address, b, c, r = operand
    start = batch * (b // DIVISOR * DIVISOR) + row * (r // DIVISOR * DIVISOR)
    return Logits(address + start, c)


@triton.jit
def _columns(start, exists, plan: tl.constexpr):
    """Return lane, step and mask of a tile, whose classes are lane + step."""
    k = tl.arange(0, plan.K)[:, None, None, None] * (plan.LANES * plan.VECTOR)
    lane = start + tl.arange(0, plan.LANES)[None, None, :, None] * plan.VECTOR
    step = k + tl.arange(0, plan.VECTOR)[None, None, None, :]  # a constant: cheaper to compare
    return lane, step, _per_class(exists) & (lane + step < plan.CLASSES)


@triton.jit
def _address(logits, columns, plan: tl.constexpr):
    """Addresses of a tile. The hints decide which dimensions become the lanes of a warp: never K.

    They also override what the compiler knows of alignment, so VECTOR > 1 needs classes that are
    neighbours in memory; see `_vector`.
    """
    address = _per_class(logits.address) + columns.to(tl.int64) * logits.stride
    if plan.PIXELS:  # hides alignment: a thread takes all classes of a row, not neighbouring rows
        return tl.max_contiguous(tl.multiple_of(address, [1, 1, 1, 1]), [1, 4, 2, 1])
    else:
        return tl.max_contiguous(address, [1, 2, 4, 8])


@triton.jit
def _load(logits, columns, mask, plan: tl.constexpr):
    """Masked entries are undefined. Giving them a value would cost one instruction per class."""
    return tl.load(_address(logits, columns, plan), mask).to(tl.float32)


@triton.jit
def _rows(target, batch, row, row_count, ignore_index, plan: tl.constexpr):
    """The program's rows. For probabilities, the label is the class with the largest one."""
    exists = row < row_count
    if plan.PROBABILITIES:
        kept = exists
        label = tl.zeros([plan.ROWS], tl.int32)
        q = tl.zeros([plan.ROWS], tl.float32) - float("inf")
        for start in range(0, plan.CLASSES, plan.TILE):
            lane, step, mask = _columns(start, exists, plan)
            columns = lane + step
            tile_q = tl.where(mask, _load(target, columns, mask, plan), float("-inf"))
            largest = tl.max(_max(tile_q), axis=1)
            at_largest = tl.where(tile_q == _per_class(largest), columns, 0)
            label = tl.where(largest > q, tl.max(_max(at_largest), axis=1), label)
            q = tl.maximum(largest, q)
    else:
        index = tl.load(target.address, exists, other=0).to(tl.int64)
        kept = exists & (index != ignore_index)
        label = tl.where((index >= 0) & (index < plan.CLASSES), index, -1).to(tl.int32)
        q = tl.full([plan.ROWS], 1.0, tl.float32)
    size = tl.num_programs(0) // tl.cdiv(row_count, plan.ROWS) * row_count.to(tl.int64)
    return Rows(batch * row_count + row, size, exists, kept, label, q)


@triton.jit
def _kept(target, size, stride, ignore_index):
    """Which of 1024 labels exist and are not ignored."""
    i = tl.arange(0, 1024)
    label = tl.load(target + i.to(tl.int64) * stride, i < size, other=0).to(tl.int64)
    return ((i < size) & (label != ignore_index)).to(tl.int32)


@triton.jit
def _row_share(target, counted, size, ignore_index, share, COUNT: tl.constexpr):
    """How much a row counts in the loss: `share`, over the number of kept rows if COUNT.

    Every program counts up to 1024 labels itself. `_count_kernel` counts more, in up to 256 parts.
    """
    if COUNT == 1:
        kept = _kept(target[0], size.to(tl.int32), target[3], ignore_index)
        share /= tl.sum(kept, axis=0).to(tl.float32)
    elif COUNT == 2:
        part = tl.arange(0, 256)
        parts = tl.load(counted + part, part < tl.cdiv(size, 1024), other=0)
        share /= tl.sum(parts, axis=0).to(tl.float32)
    return share


# --- statistics ---


@triton.jit
def _sums(x, q, others, maximum, inverse, plan: tl.constexpr):
    """z, exp(z / T) and the sums of one set of logits; `others` is a mask without the label."""
    z = tl.where(others, x - _per_class(maximum), float("-inf"))
    e, soft = _exponentials(z, inverse, plan.TEMPERATURE)
    qz = _sum(_product(q, z)) if plan.PROBABILITIES else tl.zeros_like(maximum)
    return z, soft, Sums(maximum, _sum(e), _sum(soft), qz)


@triton.jit
def _tile_maximum(x, columns, previous, plan: tl.constexpr):
    maximum = tl.maximum(_max(tl.where(columns < plan.CLASSES, x, float("-inf"))), previous)
    # With several tiles, each thread keeps its own maximum, so that it waits for no other warp.
    return tl.max(maximum, 1, keep_dims=True) if plan.TILE >= plan.CLASSES else maximum


@triton.jit
def _tile_statistics(student, teacher, target, start, rows, previous, inverse, plan: tl.constexpr):
    """z of both sets of logits for one tile of classes, and the statistics of each thread.

    Fields of Statistics one by one: Triton 3.3 returns no tuple in a tuple in a tuple.
    """
    lane, step, mask = _columns(start, rows.kept, plan)
    columns = lane + step
    s = _load(student, columns, mask, plan)
    t = _load(teacher, columns, mask, plan)
    student_maximum = _tile_maximum(s, columns, previous.student.maximum, plan)
    teacher_maximum = _tile_maximum(t, columns, previous.teacher.maximum, plan)
    others = mask & (_per_class(rows.label) - lane != step)
    q = tl.where(others, _load(target, columns, mask, plan), 0.0) if plan.PROBABILITIES else s
    student_z, _, student_sums = _sums(s, q, others, student_maximum, inverse, plan)
    teacher_z, soft, teacher_sums = _sums(t, q, others, teacher_maximum, inverse, plan)
    dot = _sum(_product(soft, student_z))
    zero = tl.zeros_like(dot)
    z_sum = _sum(tl.where(others, student_z, 0.0)) if plan.SMOOTHING else zero
    z_count = _sum(tl.where(others, 1.0, 0.0)) if plan.SMOOTHING else zero
    others_q = _sum(q) if plan.PROBABILITIES else zero
    return student_z, teacher_z, student_sums, teacher_sums, dot, z_sum, z_count, others_q


@triton.jit
def _merge_sums(a, b, others_q, inverse, plan: tl.constexpr):
    """Merge a into b, whose maximum is `rise` higher. Return the sums, rise and exp(-rise / T)."""
    rise = b.maximum - a.maximum
    factor, soft_factor = _exponentials(-rise, inverse, plan.TEMPERATURE)
    others = a.others * factor + b.others
    soft_others = a.soft_others * soft_factor + b.soft_others
    return Sums(b.maximum, others, soft_others, a.qz - others_q * rise + b.qz), rise, soft_factor


@triton.jit
def _merge(a, b, inverse, plan: tl.constexpr):
    """Statistics of a's and b's classes, where b's maxima are not lower. No sum changes sign."""
    student, rise, _ = _merge_sums(a.student, b.student, a.others_q, inverse, plan)
    teacher, _, factor = _merge_sums(a.teacher, b.teacher, a.others_q, inverse, plan)
    # An infinite sum whose factor is 0 would be NaN.
    dot = tl.where(factor == 0, 0.0, (a.dot - a.teacher.soft_others * rise) * factor) + b.dot
    z_sum = a.z_sum - a.z_count * rise + b.z_sum
    z_count, others_q = a.z_count + b.z_count, a.others_q + b.others_q
    return Statistics(student, teacher, dot, z_sum, z_count, others_q)


@triton.jit
def _empty(student_maximum, teacher_maximum, plan: tl.constexpr):
    """Statistics of no class, relative to these maxima."""
    zero = tl.zeros([plan.ROWS, plan.LANES], tl.float32)
    student = Sums(student_maximum, zero, zero, zero)
    teacher = Sums(teacher_maximum, zero, zero, zero)
    return Statistics(student, teacher, zero, zero, zero, zero)


@triton.jit
def _across_lanes(x):
    """Statistics per row from those of the threads that share a row and its maxima."""
    s, t = x.student, x.teacher
    s = Sums(tl.max(s.maximum, 1), tl.sum(s.others, 1), tl.sum(s.soft_others, 1), tl.sum(s.qz, 1))
    t = Sums(tl.max(t.maximum, 1), tl.sum(t.others, 1), tl.sum(t.soft_others, 1), tl.sum(t.qz, 1))
    dot, z_sum = tl.sum(x.dot, 1), tl.sum(x.z_sum, 1)
    return Statistics(s, t, dot, z_sum, tl.sum(x.z_count, 1), tl.sum(x.others_q, 1))


@triton.jit
def _all_tiles(student, teacher, target, rows, statistics, inverse, plan: tl.constexpr):
    """Statistics of rows that do not fit into one tile, merged tile by tile in every thread."""
    for start in range(0, plan.CLASSES, plan.TILE):
        _s, _t, s, t, dot, z_sum, z_count, others_q = _tile_statistics(
            student, teacher, target, start, rows, statistics, inverse, plan
        )
        tile = Statistics(s, t, dot, z_sum, z_count, others_q)
        statistics = _merge(statistics, tile, inverse, plan)
    student_maximum = tl.max(statistics.student.maximum, 1, keep_dims=True)
    teacher_maximum = tl.max(statistics.teacher.maximum, 1, keep_dims=True)
    return _merge(statistics, _empty(student_maximum, teacher_maximum, plan), inverse, plan)


# --- combine ---


@triton.jit
def _row(sums, others_q, logits, rows, inverse, plan: tl.constexpr):
    # An index that names no class is not followed; its row becomes NaN.
    followed = rows.kept & (rows.label >= 0)
    address = logits.address + rows.label.to(tl.int64) * logits.stride
    x = tl.load(address, followed, other=float("nan")).to(tl.float32)
    z = tl.where(rows.kept, x - sums.maximum, 0.0)
    e, soft = _exponentials(z, inverse, plan.TEMPERATURE)
    z = tl.where(sums.others + e > 0, z, float("nan"))  # a row without classes, all of them -inf
    # If the label has the maximum, exp(z) - 1 is 0; if not, `others` contains the maximum's 1.
    excess, soft_excess = sums.others + (e - 1), sums.soft_others + (soft - 1)
    ce = _log1p(excess) - z
    if plan.PROBABILITIES:
        ce = (others_q + rows.q) * _log1p(excess) - (sums.qz + _product(rows.q, z))
    return Row(z, e, soft, excess, soft_excess, ce)


@triton.jit
def _combine(student, teacher, dot, z_sum, settings, plan: tl.constexpr):
    """Weight, soft term and loss of every row."""
    dot, z_sum = dot + _product(teacher.soft, student.z), z_sum + student.z
    # The official code adds 1e-7, which keeps the weight finite where the teacher's CE is 0.
    # A student with infinite CE is infinitely worse than any teacher, also than one with inf.
    ratio = student.ce / (teacher.ce + 1e-7)
    weight = tl.where(student.ce == float("inf"), 1.0, _one_minus_exp(ratio))
    soft = _log1p(student.soft_excess) - dot * settings.inverse / (1 + teacher.soft_excess)
    hard = student.ce
    if plan.SMOOTHING:
        uniform = _log1p(student.excess) - z_sum / plan.CLASSES
        hard = _product(1 - settings.smoothing, hard) + settings.smoothing * uniform
    weight *= settings.weight_scale
    # Weight 0 on an infinite soft term: the student rules out a class to which the teacher gives
    # mass. A term with scale 0 is left out, so that 0 never meets inf.
    weighted = tl.where((weight == 0) & (soft == float("inf")), float("inf"), weight * soft)
    loss = _product(settings.hard_weight, hard) + _product(settings.alpha_t2, weighted)
    return weight, soft, loss


# --- gradient ---


@triton.jit
def _scales(statistics, student, teacher, label_q, weight, share, settings, plan: tl.constexpr):
    """Factors of the gradient; `share` is how much a row counts in the loss, 0 if ignored."""
    hard_weight = settings.hard_weight * share
    smoothed = settings.hard_weight * settings.smoothing * share
    q, uniform = hard_weight - smoothed, smoothed / plan.CLASSES
    others_q = q * statistics.others_q + smoothed
    hard = (others_q + q * label_q) / (1 + student.excess)
    soft = _product(settings.alpha_t, weight) * share / (1 + student.soft_excess)
    # Exactly 1 where student and teacher agree: their parts cancel to the last digit.
    equal = student.soft_excess == teacher.soft_excess
    ratio = tl.where(equal, 1.0, (1 + student.soft_excess) / (1 + teacher.soft_excess))
    # At the label, p - 1 = -others / Z does not cancel where p is near 1; elsewhere p does not.
    others, soft_others = statistics.student.others, statistics.student.soft_others
    hard_confident = others_q - hard * others
    at_label = tl.where(others < student.e, hard_confident, hard * student.e - q * label_q)
    confident = ratio * statistics.teacher.soft_others - soft_others
    difference = student.soft - ratio * teacher.soft
    at_label += soft * tl.where(soft_others < student.soft, confident, difference) - uniform
    return Scales(hard, soft, ratio, uniform, q, at_label)


@triton.jit
def _store_gradient(
    gradient, student_z, teacher_z, target, start, rows, scales, inverse, plan: tl.constexpr
):
    """hard_weight * (p_s - q) + alpha * T * weight * (p'_s - p'_t) of one tile, all scaled."""
    lane, step, mask = _columns(start, rows.exists, plan)
    e, student_soft = _exponentials(student_z, inverse, plan.TEMPERATURE)
    _, teacher_soft = _exponentials(teacher_z, inverse, plan.TEMPERATURE)
    # The soft terms first: they nearly cancel where student and teacher agree, and the hard term
    # may be small beside each of them.
    difference = student_soft - _per_class(scales.ratio) * teacher_soft
    value = _per_class(scales.soft) * difference + _per_class(scales.hard) * e
    if plan.SMOOTHING:
        value -= _per_class(scales.uniform)
    if plan.PROBABILITIES:
        value -= _per_class(scales.q) * _load(target, lane + step, mask, plan)
    # The comparison differs from the one in `_tile_statistics`, or the compiler would share them
    # and occupy registers for all classes from there to here.
    value = tl.where(lane - _per_class(rows.label) == -step, _per_class(scales.at_label), value)
    # Streamed if the logits are read twice, so that the gradient does not evict them from the L2.
    modifier: tl.constexpr = "" if plan.TILE >= plan.CLASSES else ".cs"
    tl.store(_address(gradient, lane + step, plan), value, mask, cache_modifier=modifier)


# --- kernels ---


@triton.jit
def _program(
    operands, loss, counted, row_count, ignore_index, share, settings,
    GRADIENT: tl.constexpr, TERMS: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """See `_forward_kernel`. A function, because Triton 3.3 makes a plan only as an argument."""
    inverse = settings.inverse
    blocks = tl.cdiv(row_count, plan.ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * plan.ROWS + tl.arange(0, plan.ROWS)
    student = _logits(operands[0], batch, row, plan.VECTOR)
    teacher = _logits(operands[1], batch, row, plan.VECTOR)
    target = _logits(operands[2], batch, row, plan.VECTOR if plan.PROBABILITIES else 1)
    gradient = _logits(operands[3], batch, row, plan.VECTOR)
    rows = _rows(target, batch, row, row_count, ignore_index, plan)
    row_share = _row_share(operands[2], counted, rows.size, ignore_index, share, plan.COUNT)
    lowest = tl.full([plan.ROWS, plan.LANES], -3.4028234663852886e38, tl.float32)  # of float32
    statistics = _empty(lowest, lowest, plan)
    if plan.TILE >= plan.CLASSES:
        student_z, teacher_z, s, t, dot, z_sum, z_count, others_q = _tile_statistics(
            student, teacher, target, 0, rows, statistics, inverse, plan
        )
        statistics = Statistics(s, t, dot, z_sum, z_count, others_q)
    else:
        statistics = _all_tiles(student, teacher, target, rows, statistics, inverse, plan)
    statistics = _across_lanes(statistics)
    s = _row(statistics.student, statistics.others_q, student, rows, inverse, plan)
    t = _row(statistics.teacher, statistics.others_q, teacher, rows, inverse, plan)
    weight, soft, row_loss = _combine(s, t, statistics.dot, statistics.z_sum, settings, plan)
    if GRADIENT:
        kept_share = tl.where(rows.kept, row_share, 0.0)
        scales = _scales(statistics, s, t, rows.q, weight, kept_share, settings, plan)
        student_maximum = _per_class(statistics.student.maximum)
        teacher_maximum = _per_class(statistics.teacher.maximum)
        last: tl.constexpr = (plan.CLASSES - 1) // plan.TILE * plan.TILE
        for back in range(0, plan.CLASSES, plan.TILE):
            start = last - back
            if plan.TILE < plan.CLASSES:
                lane, step, mask = _columns(start, rows.kept, plan)
                x = _load(student, lane + step, mask, plan)
                y = _load(teacher, lane + step, mask, plan)
                student_z = tl.where(mask, x - student_maximum, float("-inf"))
                teacher_z = tl.where(mask, y - teacher_maximum, float("-inf"))
            _store_gradient(
                gradient, student_z, teacher_z, target, start, rows, scales, inverse, plan
            )
    if TERMS:
        terms = (s.ce, t.ce, weight, soft)
        for i in tl.static_range(4):
            term = tl.where(rows.kept, terms[i], 0.0)
            tl.store(loss + i * rows.size + rows.index, term, rows.exists)
    else:
        # If all rows are ignored, their share is inf and every row is 0 * inf = NaN.
        tl.store(loss + rows.index, tl.where(rows.kept, row_loss, 0.0) * row_share, rows.exists)


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    student, teacher, target, gradient, loss, weight_scale, counted, row_count, ignore_index,
    inverse, alpha_t, alpha_t2, hard_weight, smoothing, share,
    student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
    target_b, target_c, target_r, gradient_b, gradient_c, gradient_r,
    CLASSES: tl.constexpr, TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr,
    SMOOTHING: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, PIXELS: tl.constexpr, COUNT: tl.constexpr,
    GRADIENT: tl.constexpr, TERMS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Store the loss of every row times its share, or with TERMS its four terms.

    With GRADIENT, also store the gradient for an upstream gradient of 1. With SCALED, multiply the
    weights by the number at `weight_scale`.
    """
    factor = tl.load(weight_scale) if SCALED else 1.0
    operands = (
        (student, student_b, student_c, student_r),
        (teacher, teacher_b, teacher_c, teacher_r),
        (target, target_b, target_c, target_r),
        (gradient, gradient_b, gradient_c, gradient_r),
    )
    _program(
        operands, loss, counted, row_count, ignore_index, share,
        Settings(inverse, alpha_t, alpha_t2, hard_weight, smoothing, factor), GRADIENT, TERMS,
        Plan(CLASSES, K, ROWS, LANES, VECTOR, K * LANES * VECTOR,
             TEMPERATURE, PROBABILITIES, SMOOTHING, PIXELS, COUNT),
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _scale_kernel(gradient, upstream, size):
    """gradient *= upstream, in place and in float32. Few programs, so a factor of 1 is cheap."""
    BLOCK: tl.constexpr = 2048
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
            i = start + tl.arange(0, BLOCK)
            # Full blocks have no mask: the compiler cannot see that the mask allows 16 bytes.
            if start + BLOCK <= size:
                tl.store(gradient + i, tl.load(gradient + i).to(tl.float32) * factor)
            else:
                inside = i < size
                scaled = tl.load(gradient + i, inside).to(tl.float32) * factor
                tl.store(gradient + i, scaled, inside)


@triton.jit(do_not_specialize=COUNTS)
def _count_kernel(target, counted, size, ignore_index):
    """How many labels are not ignored, one part per program."""
    kept = tl.zeros([1024], tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * 1024, size, tl.num_programs(0) * 1024):
        part = tl.minimum(size - first, 1024).to(tl.int32)
        kept += _kept(target + first, part, 1, ignore_index)
    tl.store(counted + tl.program_id(0), tl.sum(kept, axis=0))


# --- launches ---

# Triton's interpreter, chosen by TRITON_INTERPRET=1 before the import, also runs CPU tensors.
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)
# Fused multiply-adds are stated, because their default depends on the version of Triton. Without
# them, kernels need more than the 128 registers that let 16 warps share a multiprocessor.
FUSION: dict[str, Any] = {"enable_fp_fusion": True}
# Launches of `_forward_kernel` by the description of their tensors: a bound kernel, and its
# arguments but the tensors. Binding arguments takes most of the host's time for a small batch.
_REPLAYS: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Return the loss; see `weighted_soft_labels.backends`."""
    shape = loss_shape(options.reduction, student.shape)
    rows = student.new_empty(shape or index_shape(student.shape), dtype=torch.float32)
    # The student's pointer, which is not followed, stands for a gradient or scale of None.
    pointer = student if gradient is None else gradient
    scale_pointer = student if weight_scale is None else weight_scale
    tensors = (student, teacher, target, pointer, rows, scale_pointer)
    with torch.cuda.device_of(student):  # Triton launches on the current device
        _forward(tensors, options, gradient is not None, weight_scale is not None)
    if shape:
        return rows
    loss = rows.sum()  # the rows of a mean are shares of it
    return loss * math.nan if options.reduction == "mean" and rows.numel() == 0 else loss


def multiply_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place, in float32. `factor` has one entry, or one per element of the loss."""
    if factor.dim():
        gradient.mul_(factor.unsqueeze(1))
        return
    if factor.is_neg() or not factor.data_ptr():  # a kernel reads the numbers at the address
        factor = factor.resolve_neg().clone()
    programs = min(-(-gradient.numel() // 2048), 1024)
    with torch.cuda.device_of(gradient):
        _scale_kernel[(programs,)](gradient, factor, gradient.numel(), num_warps=4, **FUSION)


def probe(tensor: Tensor) -> None:
    """Compile, load and bind a kernel for the tensor's device, without launching it.

    Raises:
        Exception: Triton, a compiler, its cache or the driver does not work.
    """
    if not INTERPRETED:
        if not tensor.is_cuda:
            raise RuntimeError(
                f"Triton runs on a GPU, or with TRITON_INTERPRET=1, got {tensor.device}"
            )
        with torch.cuda.device_of(tensor):
            dtypes = (torch.float32, torch.float32)
            kernel = _scale_kernel.warmup(*dtypes, 1, grid=(1,), num_warps=4, **FUSION)
            kernel[(1, 1, 1)]  # loads and binds


def _forward(tensors: tuple[Tensor, ...], options: Options, wanted: bool, scaled: bool) -> None:
    student, teacher, target, gradient, *_ = tensors
    key = (
        student.shape, student.stride(), student.dtype, teacher.stride(), teacher.dtype,
        target.stride(), target.dtype, gradient.stride(), gradient.dtype, wanted,
        scaled, student.device, options,
    )  # fmt: skip
    # Kernels are specialised for tensors that start on a multiple of 16 bytes.
    aligned = not any(tensor.data_ptr() % 16 for tensor in tensors)
    replay = _REPLAYS.get(key) if aligned else None
    if replay is not None:
        bound, arguments = replay
        bound(*tensors, student, *arguments)
        return
    count, counted, share = _count(student, target, options)
    programs, scalars, constants = _launch(tensors, options, share)
    constants |= {
        "COUNT": count,
        "GRADIENT": wanted,
        "TERMS": options.reduction == "terms",
        "SCALED": scaled,
    }
    compiled = _forward_kernel[(programs,)](*tensors, counted, *scalars, **constants, **FUSION)
    # An interpreted launch returns None. With COUNT = 2 another kernel has to count first.
    if aligned and compiled is not None and count != 2:
        if len(_REPLAYS) >= 256:
            _REPLAYS.clear()
        constexprs = (constants[name] for name in _forward_kernel.arg_names if name in constants)
        _REPLAYS[key] = compiled[(programs, 1, 1)], (*scalars, *constexprs)


def _launch(
    tensors: tuple[Tensor, ...], options: Options, share: float
) -> tuple[int, list[Any], dict[str, Any]]:
    """Return the number of programs, the scalar arguments and the constants of tiles."""
    student, teacher, target, gradient, *_ = tensors
    batches, classes, rows = 1, student.shape[1], len(student)
    if student.dim() == 3 and student.shape[2] != 1:
        batches, rows = student.shape[0], student.shape[2]
    probabilities = target.is_floating_point()
    # A label does not depend on the class: a view with a class stride of 0.
    q = target if probabilities else target[:, None].expand(student.shape)
    operands = (student, teacher, q, gradient)
    strides = [_strides(operand) for operand in operands]
    pixels = rows > 1 and strides[0][1] != 1 and strides[0][2] == 1
    per_class = operands if probabilities else (student, teacher, gradient)
    vector = 1 if pixels else _vector(classes, per_class)
    lanes, k, warps = _tile_sizes(classes, pixels, probabilities, vector)
    block = warps * 32 // lanes
    temperature = options.temperature
    alpha_t = options.alpha * temperature
    settings = (1 / temperature, alpha_t, alpha_t * temperature, options.hard_weight)
    scalars: list[Any] = [rows, options.ignore_index, *settings, options.label_smoothing, share]
    scalars.extend(stride for operand in strides for stride in operand)
    return batches * -(-rows // block), scalars, {
        "CLASSES": classes, "K": k, "ROWS": block, "LANES": lanes, "VECTOR": vector,
        "TEMPERATURE": int(temperature) if temperature in (1, 2) else 0,
        "PROBABILITIES": probabilities, "SMOOTHING": options.label_smoothing > 0,
        "PIXELS": pixels, "num_warps": warps,
    }  # fmt: skip


def _tile_sizes(classes: int, pixels: bool, probabilities: bool, vector: int) -> tuple[int, ...]:
    """Return LANES, K and the number of warps.

        number of classes           LANES             classes of a thread (K * VECTOR)
        <= 8192 (pixels: 512)       classes / 32      at most 32
        the same, of probabilities  classes / 16      at most 16
        more                        512 (pixels: 16)  16

    More than 32 do not fit into the 128 registers that let 16 warps share a multiprocessor. With
    fewer, the work per thread and row costs more than the classes. Probabilities and several tiles
    need registers, too. If 16 warps share a row, the second pass finds the row in the L2.
    """
    lanes = triton.next_power_of_2(triton.cdiv(classes, 16 if probabilities else 32))
    k = triton.next_power_of_2(triton.cdiv(classes, lanes * vector))
    if classes > (512 if pixels else 8192):
        lanes, k = 16 if pixels else 512, 16 // vector
    return lanes, k, max(4, lanes if pixels else lanes // 32)


def _vector(classes: int, operands: tuple[Tensor, ...]) -> int:
    """How many classes, at most 16 bytes, a thread loads at once from every tensor."""
    strides = [_strides(x) for x in operands]
    if any(c != 1 for _, c, _ in strides):
        return 1  # with more, `_address` claims that classes are neighbours in memory
    largest = max(x.element_size() for x in operands)
    return math.gcd(16 // largest, classes, *(s for b, _, r in strides for s in (b, r)))


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, class and row. (N, C) and (N, C, 1) are one batch of N rows."""
    if x.dim() == 2:
        row, column = x.stride()
        return 0, column, row
    b, c, r = x.stride()
    if x.shape[0] == 1:  # the stride of a single batch may be any number
        return 0, c, r
    return (0, c, b) if x.shape[2] == 1 else (b, c, r)


def _count(student: Tensor, target: Tensor, options: Options) -> tuple[int, Tensor, float]:
    """Return COUNT, `counted` and `share`; see `_row_share`."""
    counted = student  # stands for a pointer that is not followed
    if options.reduction != "mean":
        return 0, counted, 1.0
    if target.is_floating_point():
        return 0, counted, 1 / max(index_shape(student.shape).numel(), 1)
    # Reading 1024 labels is cheaper than a launch. They need one stride.
    *outer, inner = target.stride()
    one_stride = len(target) == 1 or not outer or outer[0] == target.shape[1] * inner
    if one_stride and target.numel() <= 1024:
        return 1, counted, 1.0
    labels = target.reshape(-1).contiguous()
    counted = student.new_empty(min(256, -(-labels.numel() // 1024)), dtype=torch.int32)
    arguments = (labels, counted, labels.numel(), options.ignore_index)
    _count_kernel[counted.shape](*arguments, num_warps=4, **FUSION)
    return 2, counted, 1.0
