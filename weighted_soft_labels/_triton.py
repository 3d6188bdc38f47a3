"""The loss in Triton, for NVIDIA and AMD GPUs. Same functions, same algebra and same order of steps as `_eager`.

Logits are seen as (batch, classes, rows) with any strides, so (N, C), (N, C, d1, ...) and channels_last need no copy:
(N, C) is one batch of N rows. A program takes ROWS rows and walks over the classes in blocks of CLASSES:

    statistics  one pass, online: the maximum, the sums of `_eager` and the soft term's dot product, all rescaled
                when the maximum moves. Every quantity keeps its sign under the rescaling, so nothing cancels.
    combine     cross-entropies, weight, loss; one number a row
    gradient    a second pass, which writes it

One algebra, four regimes; `_launch` says where one ends and the next begins:

    few classes      several rows share a program
    one block        all classes of a row stay in registers between the passes: 2b read + b written an element
    many classes     the second pass reads again, from its end, from the L2 cache as far as that holds the row
    pixels           neighbours in memory are rows: lanes lie on them, and a thread walks through the classes

for logits of b bytes. Offsets of rows are 64-bit; arithmetic is float32; nothing is read back to the host and no
launch depends on the data.
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


# Numbers stand where they are used, not in globals, which every launch would compare with what they were.


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
def _soft_exp(z, inverse):
    """exp(z / T), where inverse = 1 / T."""
    return tl.exp2(z * (inverse * 1.4426950408889634))


@triton.jit
def _exponentials(z, inverse, TEMPERATURE: tl.constexpr):
    """exp(z), exp(z / T); one exponential where squaring loses no digit that counts."""
    soft = _soft_exp(z, inverse)
    if TEMPERATURE == 1:
        e = soft
    elif TEMPERATURE == 2:
        e = soft * soft
    else:
        e = _exp(z)
    return e, soft


@triton.jit
def _finite(peak):
    """A maximum that can be subtracted: a block may hold nothing but masked classes."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _dot(mass, value):
    """sum_c mass_c * value_c, where no mass times an infinite value is 0."""
    return tl.sum(mass * tl.where(mass == 0, 0.0, value), axis=1)


@triton.jit
def _rescale(total, factor):
    """total * factor, where nothing is left of an infinite total that has no weight any more."""
    return tl.where(factor == 0, 0.0, total * factor)


@triton.jit
def _aligned(x, ALIGN: tl.constexpr):
    """x, in a form that shows the compiler what the launcher has checked: a multiple of ALIGN. It takes that to load
    and store 16 bytes at a time; by itself it would see nothing between a multiple of 16 and any number."""
    return x // ALIGN * ALIGN


@triton.jit
def _load(pointer, offset, columns, stride, mask, other, POLICY: tl.constexpr):
    address = pointer + offset[:, None] + columns.to(tl.int64) * stride
    return tl.load(address, mask, other=other, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _row(x, is_label, peak, others, soft_sum, inverse, TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr):
    """Take a block of classes into the statistics of a row.

    `others` is the sum of exp(z) over every class but one, the label: from it the cross-entropy follows without
    cancellation. A target of probabilities has no label; there one class at the maximum is left out.

    Also returns z and exp(z / T) of the block, by how much the maximum moved, and what that makes of old exp(z / T).
    """
    new_peak = tl.maximum(peak, tl.max(x, axis=1))
    shift = _finite(new_peak)
    z = x - shift[:, None]
    e, soft = _exponentials(z, inverse, TEMPERATURE)
    factor = _exp(peak - shift)
    if PROBABILITIES:
        # The class left out counts exp(0) = 1 as soon as the maximum leaves it behind.
        at_peak = z == 0
        below = tl.sum(tl.where(at_peak, 0.0, e), axis=1)
        count = tl.sum(tl.where(at_peak, 1.0, 0.0), axis=1)
        moved = peak < new_peak
        others = tl.where(moved, (1 + others) * factor + below + (count - 1), others + below + count)
    else:
        others = others * factor + tl.sum(tl.where(is_label, 0.0, e), axis=1)
    factor = _soft_exp(peak - shift, inverse)
    soft_sum = soft_sum * factor + tl.sum(soft, axis=1)
    return z, soft, new_peak, others, soft_sum, shift - _finite(peak), factor


@triton.jit
def _statistics(
    student, teacher, target, student_offset, teacher_offset, target_offset, student_c, teacher_c, target_c,
    columns, mask, label, taken, inverse,
    student_peak, student_others, student_sum, teacher_peak, teacher_others, teacher_sum,
    dot, z_sum, mass, student_qz, teacher_qz,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Take one block of classes of both sets of logits (and of a target of probabilities) into the statistics.

    `taken` classes came before.
    """
    s = _load(student, student_offset, columns, student_c, mask, float("-inf"), POLICY)
    t = _load(teacher, teacher_offset, columns, teacher_c, mask, float("-inf"), POLICY)
    is_label = columns == label[:, None]
    earlier = teacher_sum
    student_z, _, student_peak, student_others, student_sum, student_move, _ = _row(
        s, is_label, student_peak, student_others, student_sum, inverse, TEMPERATURE, PROBABILITIES
    )
    teacher_z, soft, teacher_peak, teacher_others, teacher_sum, teacher_move, factor = _row(
        t, is_label, teacher_peak, teacher_others, teacher_sum, inverse, TEMPERATURE, PROBABILITIES
    )
    dot = _rescale(dot - earlier * student_move, factor) + _dot(soft, student_z)
    if SMOOTHING:
        z_sum += tl.sum(tl.where(mask, student_z, 0.0), axis=1) - taken * student_move
    if PROBABILITIES:
        q = _load(target, target_offset, columns, target_c, mask, 0.0, POLICY)
        student_qz += _dot(q, student_z) - mass * student_move
        teacher_qz += _dot(q, teacher_z) - mass * teacher_move
        # Masked once more, as Triton 3.6 fails to compile a running sum of what comes straight from memory.
        mass += tl.sum(tl.where(mask, q, 0.0), axis=1)
    return (
        student_z, teacher_z, student_peak, student_others, student_sum, teacher_peak, teacher_others, teacher_sum,
        dot, z_sum, mass, student_qz, teacher_qz,
    )  # fmt: skip


@triton.jit
def _edges(classes, before, inner, EDGES: tl.constexpr):
    """Columns of the classes around the inner ones, and which of them exist; see `_place`."""
    i = tl.arange(0, 2 * EDGES)[None, :]
    columns = tl.where(i < EDGES, i - EDGES, inner[:, None] + i - EDGES)
    return columns, (columns >= -before[:, None]) & (columns < classes - before[:, None])


@triton.jit
def _place(
    target, classes, rows,
    student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
    target_b, target_c, target_r, gradient_b, gradient_c, gradient_r, ignore_index,
    PROBABILITIES: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr, PIXELS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Where this program's rows are, how far it is from class to class, and what the labels say.

    Rows that start anywhere (an odd number of classes) are seen from their first 16-byte boundary on: offsets and
    labels count from there, `before` classes lie before it, `inner` ones fill whole 16-byte units after it, and
    `_edges` are the rest.
    """
    blocks = tl.cdiv(rows, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = batch * rows + row
    if PIXELS:
        in_rows = row < _aligned(rows, ALIGN)
        student_c, teacher_c, gradient_c = (
            _aligned(student_c, ALIGN), _aligned(teacher_c, ALIGN), _aligned(gradient_c, ALIGN)
        )  # fmt: skip
    else:
        in_rows = row < rows
        classes = _aligned(classes, ALIGN)
        student_r, teacher_r = _aligned(student_r, ALIGN), _aligned(teacher_r, ALIGN)
        target_r, gradient_r = _aligned(target_r, ALIGN if PROBABILITIES else 1), _aligned(gradient_r, ALIGN)
    student_offset = batch * _aligned(student_b, ALIGN) + row * student_r
    teacher_offset = batch * _aligned(teacher_b, ALIGN) + row * teacher_r
    target_offset = batch * _aligned(target_b, ALIGN if PROBABILITIES else 1) + row * target_r
    gradient_offset = batch * _aligned(gradient_b, ALIGN) + row * gradient_r

    kept = in_rows
    label = row * 0
    if not PROBABILITIES:
        label = tl.load(target + target_offset, in_rows, other=0).to(tl.int64)
        kept = in_rows & (label != ignore_index)
    # An index that names no class may not be followed: its element is NaN.
    inside = (label >= 0) & (label < classes)
    label = tl.where(inside, label, 0).to(tl.int32)

    before = label * 0
    inner = before + classes
    if EDGES:
        before = ((EDGES - student_offset % EDGES) % EDGES).to(tl.int32)
        inner = _aligned(classes - before, EDGES)
        label -= before
        student_offset = _aligned(student_offset + before, EDGES)
        teacher_offset = _aligned(teacher_offset + before, EDGES)
        gradient_offset = _aligned(gradient_offset + before, EDGES)
        if PROBABILITIES:
            target_offset = _aligned(target_offset + before, EDGES)
    return (
        index, in_rows, kept, inside, label, before, inner,
        student_offset, teacher_offset, target_offset, gradient_offset, student_c, teacher_c, gradient_c,
    )  # fmt: skip


@triton.jit
def _count_labels(target, first, step, size, target_r, ignore_index, BLOCK: tl.constexpr):
    """How many labels are not ignored, of those of one block in every `step`, from `first` on."""
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(first, size, step):
        i = start + tl.arange(0, BLOCK)
        label = tl.load(target + i.to(tl.int64) * target_r, i < size, other=0).to(tl.int64)
        total += ((i < size) & (label != ignore_index)).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def _unit(target, counted, rows, target_r, ignore_index, scale, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """What every element counts in the loss: `scale`, for a mean over labels divided by how many are not ignored.

    Few labels are counted here, by every program; of many, `_count_kernel` has counted PARTS.
    """
    unit = scale
    if COUNT == 1:
        unit = scale / _count_labels(target, 0, 256, rows, target_r, ignore_index, 256).to(tl.float32)
    if COUNT == 2:
        unit = scale / tl.sum(tl.load(counted + tl.arange(0, PARTS)), axis=0).to(tl.float32)
    return unit


@triton.jit
def _write_gradient(
    student_z, teacher_z, target, gradient, target_offset, gradient_offset, target_c, gradient_c,
    columns, mask, label, kept, hard_scale, at_label, student_scale, teacher_scale, uniform, q_scale, inverse,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, PIXELS: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """hard_weight * (p_s - q) + alpha * T * weight * (p'_s - p'_t) for one block of classes, all scales included."""
    e, student_soft = _exponentials(student_z, inverse, TEMPERATURE)
    teacher_soft = _soft_exp(teacher_z, inverse)
    hard = hard_scale[:, None] * e
    if SMOOTHING:
        hard -= uniform[:, None]
    if PROBABILITIES:
        hard -= q_scale[:, None] * _load(target, target_offset, columns, target_c, mask, 0.0, POLICY)
    else:
        hard = tl.where(columns == label[:, None], at_label[:, None], hard)
    # The soft terms first: they all but cancel where student and teacher agree, and hard may be small beside each.
    out = hard + (student_scale[:, None] * student_soft - teacher_scale[:, None] * teacher_soft)
    if PIXELS:  # elsewhere the logits of an ignored row were not read, and its scales are 0
        out = tl.where(kept[:, None], out, 0.0)
    address = gradient + gradient_offset[:, None] + columns.to(tl.int64) * gradient_c
    tl.store(address, out, mask, eviction_policy=POLICY)


@triton.jit
def _reread_block(
    student, teacher, target, gradient, student_offset, teacher_offset, target_offset, gradient_offset,
    student_c, teacher_c, target_c, gradient_c, columns, inside, in_rows, read, label, kept, student_peak, teacher_peak,
    hard_scale, at_label, student_scale, teacher_scale, uniform, q_scale, inverse,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """`_write_gradient` of logits that are read for it, and not needed afterwards."""
    mask = read[:, None] & inside
    s = _load(student, student_offset, columns, student_c, mask, float("-inf"), "evict_first")
    t = _load(teacher, teacher_offset, columns, teacher_c, mask, float("-inf"), "evict_first")
    _write_gradient(
        s - student_peak[:, None], t - teacher_peak[:, None],
        target, gradient, target_offset, gradient_offset, target_c, gradient_c,
        columns, in_rows[:, None] & inside, label, kept,
        hard_scale, at_label, student_scale, teacher_scale, uniform, q_scale, inverse,
        TEMPERATURE, PROBABILITIES, SMOOTHING, PIXELS, "evict_first",
    )  # fmt: skip


@triton.jit
def _reread_gradient(
    student, teacher, target, gradient, student_offset, teacher_offset, target_offset, gradient_offset,
    student_c, teacher_c, target_c, gradient_c, classes, before, inner, in_rows, read, label, kept,
    student_peak, teacher_peak, hard_scale, at_label, student_scale, teacher_scale, unit,
    uniform, q_scale, inverse,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr, EDGES_ONLY: tl.constexpr, PIXELS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The gradient of all blocks of classes, from the last, which the cache still holds, to the first; of the edges."""
    hard_scale, at_label, student_scale, teacher_scale = (
        hard_scale * unit, at_label * unit, student_scale * unit, teacher_scale * unit
    )  # fmt: skip
    uniform, q_scale = uniform * unit, q_scale * unit
    if not EDGES_ONLY:
        last = (classes - 1) // CLASSES * CLASSES
        for start in range(0, classes, CLASSES):
            columns = last - start + tl.arange(0, CLASSES)[None, :]
            _reread_block(
                student, teacher, target, gradient, student_offset, teacher_offset, target_offset, gradient_offset,
                student_c, teacher_c, target_c, gradient_c, columns, columns < inner[:, None], in_rows, read, label,
                kept, student_peak, teacher_peak, hard_scale, at_label, student_scale, teacher_scale, uniform, q_scale,
                inverse, TEMPERATURE, PROBABILITIES, SMOOTHING, PIXELS,
            )  # fmt: skip
    if EDGES:
        edges, inside_row = _edges(classes, before, inner, EDGES)
        _reread_block(
            student, teacher, target, gradient, student_offset, teacher_offset, target_offset, gradient_offset,
            student_c, teacher_c, target_c, gradient_c, edges, inside_row, in_rows, read, label,
            kept, student_peak, teacher_peak, hard_scale, at_label, student_scale, teacher_scale, uniform, q_scale,
            inverse, TEMPERATURE, PROBABILITIES, SMOOTHING, PIXELS,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    student, teacher, target, gradient, loss, numbers, counted,
    classes, rows,
    student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
    target_b, target_c, target_r, gradient_b, gradient_c, gradient_r,
    ignore_index, inverse, uniform, q_scale, hard_weight, alpha_t2, alpha_t, smoothing, scale,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, COUNT: tl.constexpr,
    PARTS: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, TERMS: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ONE_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Loss of every row, its share of the mean included; with GRADIENT its gradient for an incoming gradient of 1.

    One program a block of ROWS rows of one batch. Moves 2b bytes an element without the gradient, 3b with it if
    ONE_BLOCK, else 5b (2b of which are the second read of the same logits), for logits of b bytes; the logits of
    ignored rows are not read, unless lanes lie on PIXELS.
    """
    (
        index, in_rows, kept, inside, label, before, inner,
        student_offset, teacher_offset, target_offset, gradient_offset, student_c, teacher_c, gradient_c,
    ) = _place(
        target, classes, rows, student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
        target_b, target_c, target_r, gradient_b, gradient_c, gradient_r, ignore_index,
        PROBABILITIES, ROWS, ALIGN, PIXELS, EDGES,
    )  # fmt: skip
    column = tl.arange(0, CLASSES)[None, :]
    read = in_rows if PIXELS else kept

    # statistics
    nothing = tl.zeros([ROWS], tl.float32)
    least = -1.0 if PROBABILITIES else 0.0  # of no class at all, less the one that is left out
    student_peak, student_others, student_sum = nothing - float("inf"), nothing + least, nothing
    teacher_peak, teacher_others, teacher_sum = nothing - float("inf"), nothing + least, nothing
    dot, z_sum, mass, student_qz, teacher_qz = nothing, nothing, nothing, nothing, nothing
    taken = before * 0
    if EDGES:
        edges, inside_row = _edges(classes, before, inner, EDGES)
        (
            _edge_s, _edge_t, student_peak, student_others, student_sum, teacher_peak, teacher_others, teacher_sum,
            dot, z_sum, mass, student_qz, teacher_qz,
        ) = _statistics(
            student, teacher, target, student_offset, teacher_offset, target_offset, student_c, teacher_c, target_c,
            edges, read[:, None] & inside_row, label, taken, inverse,
            student_peak, student_others, student_sum, teacher_peak, teacher_others, teacher_sum,
            dot, z_sum, mass, student_qz, teacher_qz, TEMPERATURE, PROBABILITIES, SMOOTHING, "evict_first",
        )  # fmt: skip
        taken = classes - inner
    if ONE_BLOCK:
        (
            student_z, teacher_z, student_peak, student_others, student_sum, teacher_peak, teacher_others, teacher_sum,
            dot, z_sum, mass, student_qz, teacher_qz,
        ) = _statistics(
            student, teacher, target, student_offset, teacher_offset, target_offset, student_c, teacher_c, target_c,
            column, read[:, None] & (column < inner[:, None]), label, taken, inverse,
            student_peak, student_others, student_sum, teacher_peak, teacher_others, teacher_sum,
            dot, z_sum, mass, student_qz, teacher_qz, TEMPERATURE, PROBABILITIES, SMOOTHING, "evict_first",
        )  # fmt: skip
    else:
        for start in range(0, classes, CLASSES):
            columns = start + column
            (
                _s, _t, student_peak, student_others, student_sum, teacher_peak, teacher_others, teacher_sum,
                dot, z_sum, mass, student_qz, teacher_qz,
            ) = _statistics(
                student, teacher, target, student_offset, teacher_offset, target_offset,
                student_c, teacher_c, target_c,
                columns, read[:, None] & (columns < inner[:, None]), label, taken + start, inverse,
                student_peak, student_others, student_sum, teacher_peak, teacher_others, teacher_sum,
                dot, z_sum, mass, student_qz, teacher_qz, TEMPERATURE, PROBABILITIES, SMOOTHING, "evict_last",
            )  # fmt: skip

    # combine
    student_label_z, teacher_label_z = nothing, nothing
    if not PROBABILITIES:
        student_label_z = tl.load(student + student_offset + label.to(tl.int64) * student_c, kept, other=0.0)
        student_label_z = student_label_z.to(tl.float32) - _finite(student_peak)
        teacher_label_z = tl.load(teacher + teacher_offset + label.to(tl.int64) * teacher_c, kept, other=0.0)
        teacher_label_z = teacher_label_z.to(tl.float32) - _finite(teacher_peak)
        student_others = tl.where(inside, student_others, float("nan"))
        mass, student_qz, teacher_qz = nothing + 1, student_label_z, teacher_label_z
    # log Z = log1p(Z - 1): the label is a maximum and exp(z) - 1 is 0, or another class is and counts 1 in `others`.
    label_e = _exp(student_label_z)
    student_log_z = _log1p(student_others + (label_e - 1))
    student_ce = mass * student_log_z - student_qz
    teacher_ce = mass * _log1p(teacher_others + (_exp(teacher_label_z) - 1)) - teacher_qz
    # 1e-7, of the official code, keeps the weight finite where the teacher's cross-entropy is 0.
    # The student that rules the label out is infinitely worse than any teacher, also one that does the same.
    weight = tl.where(student_ce == float("inf"), 1.0, _one_minus_exp(student_ce / (teacher_ce + 1e-7)))
    soft = tl.log(student_sum) - dot / teacher_sum * inverse
    size = tl.num_programs(0) // tl.cdiv(rows, ROWS) * rows.to(tl.int64)
    if TERMS:
        tl.store(numbers + index, tl.where(kept, student_ce, 0.0), in_rows)
        tl.store(numbers + size + index, tl.where(kept, teacher_ce, 0.0), in_rows)
        tl.store(numbers + 2 * size + index, tl.where(kept, weight, 0.0), in_rows)
        tl.store(numbers + 3 * size + index, tl.where(kept, soft, 0.0), in_rows)
    else:
        unit = nothing + _unit(target, counted, rows, target_r, ignore_index, scale, COUNT, PARTS)
        hard = student_ce
        if SMOOTHING:
            flat = student_log_z - z_sum / classes
            hard = tl.where(smoothing == 1, flat, (1 - smoothing) * hard + smoothing * flat)
        # A term with scale 0 is left out, so 0 never meets inf; weight 0 on an infinite soft term: the student rules
        # out a class to which the teacher gives mass.
        weighted = tl.where((weight == 0) & (soft == float("inf")), float("inf"), weight * soft)
        total = tl.where(hard_weight == 0, 0.0, hard_weight * hard) + tl.where(alpha_t2 == 0, 0.0, alpha_t2 * weighted)
        # Nothing to average: 0 / 0.
        tl.store(loss + index, tl.where(kept, total, 0.0) * unit, in_rows)

        # gradient, of which an ignored row has none, whatever it holds
        unit = tl.where(kept, unit, 0.0)
        hard_scale = tl.where(kept, (hard_weight - q_scale + q_scale * mass) / (student_others + label_e), 0.0)
        # p_y - 1 = -others / Z, which does not cancel.
        at_label = tl.where(kept, hard_weight - q_scale - uniform - hard_scale * student_others, 0.0)
        soft_scale = tl.where(kept & (alpha_t != 0), alpha_t * weight, 0.0)
        # Formed alike: where student and teacher agree, their parts of the gradient cancel to the last digit.
        student_scale = tl.where(kept, soft_scale / student_sum, 0.0)
        teacher_scale = tl.where(kept, soft_scale / teacher_sum, 0.0)
        student_peak, teacher_peak = _finite(student_peak), _finite(teacher_peak)
    if STATE:
        tl.store(numbers + index, student_peak, in_rows)
        tl.store(numbers + size + index, teacher_peak, in_rows)
        tl.store(numbers + 2 * size + index, hard_scale, in_rows)
        tl.store(numbers + 3 * size + index, at_label, in_rows)
        tl.store(numbers + 4 * size + index, student_scale, in_rows)
        tl.store(numbers + 5 * size + index, teacher_scale, in_rows)
        tl.store(numbers + 6 * size + index, unit, in_rows)
    if GRADIENT:
        if ONE_BLOCK:
            _write_gradient(
                student_z, teacher_z, target, gradient, target_offset, gradient_offset, target_c, gradient_c,
                column, in_rows[:, None] & (column < inner[:, None]), label, kept,
                hard_scale * unit, at_label * unit, student_scale * unit, teacher_scale * unit,
                uniform * unit, q_scale * unit, inverse,
                TEMPERATURE, PROBABILITIES, SMOOTHING, PIXELS, "",
            )  # fmt: skip
        _reread_gradient(
            student, teacher, target, gradient, student_offset, teacher_offset, target_offset, gradient_offset,
            student_c, teacher_c, target_c, gradient_c, classes, before, inner, in_rows, read, label, kept,
            student_peak, teacher_peak, hard_scale, at_label, student_scale, teacher_scale, unit,
            uniform, q_scale, inverse,
            TEMPERATURE, PROBABILITIES, SMOOTHING, CLASSES, ONE_BLOCK, PIXELS, EDGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    student, teacher, target, gradient, numbers, upstream,
    classes, rows,
    student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
    target_b, target_c, target_r, gradient_b, gradient_c, gradient_r, upstream_b, upstream_r,
    ignore_index, inverse, uniform, q_scale,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ALIGN: tl.constexpr, PIXELS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The gradient for any incoming gradient, from the logits and the state of each row. Moves 3b bytes an element.

    One program a block of ROWS rows of one batch, as in the forward kernel.
    """
    (
        index, in_rows, kept, _inside, label, before, inner,
        student_offset, teacher_offset, target_offset, gradient_offset, student_c, teacher_c, gradient_c,
    ) = _place(
        target, classes, rows, student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
        target_b, target_c, target_r, gradient_b, gradient_c, gradient_r, ignore_index,
        PROBABILITIES, ROWS, ALIGN, PIXELS, EDGES,
    )  # fmt: skip
    size = tl.num_programs(0) // tl.cdiv(rows, ROWS) * rows.to(tl.int64)
    batch = index // rows
    factor = tl.load(upstream + batch * upstream_b + (index - batch * rows) * upstream_r, kept, other=0.0)
    unit = tl.load(numbers + 6 * size + index, kept, other=0.0) * factor.to(tl.float32)
    _reread_gradient(
        student, teacher, target, gradient, student_offset, teacher_offset, target_offset, gradient_offset,
        student_c, teacher_c, target_c, gradient_c, classes, before, inner, in_rows, in_rows if PIXELS else kept,
        label, kept,
        tl.load(numbers + index, kept, other=0.0),
        tl.load(numbers + size + index, kept, other=0.0),
        tl.load(numbers + 2 * size + index, kept, other=0.0),
        tl.load(numbers + 3 * size + index, kept, other=0.0),
        tl.load(numbers + 4 * size + index, kept, other=0.0),
        tl.load(numbers + 5 * size + index, kept, other=0.0),
        unit, uniform, q_scale, inverse,
        TEMPERATURE, PROBABILITIES, SMOOTHING, CLASSES, False, PIXELS, EDGES,
    )  # fmt: skip


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
def _count_kernel(target, counted, size, ignore_index, PARTS: tl.constexpr):
    """How many labels are not ignored, in PARTS parts, one a program."""
    BLOCK: tl.constexpr = 1024
    found = _count_labels(
        target, tl.program_id(0).to(tl.int64) * BLOCK, PARTS * BLOCK, size, 1, ignore_index, BLOCK
    )  # fmt: skip
    tl.store(counted + tl.program_id(0), found)


def forward(student: Tensor, teacher: Tensor, target: Tensor, options: Options, gradient: Tensor | None) -> Tensor:
    """The reduced loss; fills `gradient` for an incoming gradient of 1."""
    loss = student.new_empty(_rows(student), dtype=torch.float32)
    _launch_forward(student, teacher, target, options, loss, gradient)
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
    state = student.new_empty((7, *_rows(student)), dtype=torch.float32)
    _launch_forward(student, teacher, target, options, torch.empty_like(state[0]), None, state)
    launch = _launch(student, teacher, target, gradient)
    if launch.programs:
        upstream_strides = _strides(upstream[:, None], student) if upstream.dim() else (0, 0, 0)
        with _device(student):
            _backward_kernel[(launch.programs,)](
                *launch.tensors, state, upstream, launch.classes, launch.rows, *launch.strides,
                upstream_strides[0], upstream_strides[2], options.ignore_index, *_scalars(student, options),
                TEMPERATURE=_special(options.temperature), PROBABILITIES=target.is_floating_point(),
                SMOOTHING=options.label_smoothing > 0, **launch.constants,
            )  # fmt: skip


def terms(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:
    """Student CE, teacher CE, weight and soft term of every row, (4, B, R); 0 where it is ignored."""
    found = student.new_empty((4, *_rows(student)), dtype=torch.float32)
    _launch_forward(student, teacher, target, options, numbers=found)
    return found


def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply a gradient that was formed for an incoming gradient of 1, in place; it is dense, whatever its order."""
    size = gradient.numel()
    if size:
        with _device(gradient):
            _scale_kernel[(min(-(-size // 2048), 1024),)](gradient, upstream, size, BLOCK=2048, num_warps=4)


def _launch_forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    loss: Tensor | None = None,
    gradient: Tensor | None = None,
    numbers: Tensor | None = None,
) -> None:
    """Run the forward kernel for the outputs that are given; `numbers` are a row's state or, alone, its terms."""
    unused = student  # any address will do where a pointer is not followed
    outputs = (
        unused if gradient is None else gradient,
        unused if loss is None else loss,
        unused if numbers is None else numbers,
    )
    key = None
    if student.shape[0] == 1 and not _misaligned(student, teacher, target):
        key = (
            student.shape, student.stride(), student.dtype, teacher.stride(), teacher.dtype,
            target.stride(), target.dtype, student.device, options, gradient is None, loss is None, numbers is None,
        )  # fmt: skip
        replay = _REPLAYS.get(key)
        if replay is not None:
            with _device(student):
                replay.run(student, teacher, target, *outputs, unused, *replay.arguments)
            return
    launch = _launch(student, teacher, target, gradient)
    if launch.programs == 0:
        return
    with _device(student):
        mode, counted, scale = (0, None, 1.0) if loss is None else _count(student, target, options)
        scalars = (
            launch.classes, launch.rows, *launch.strides, options.ignore_index, *_scalars(student, options),
            options.hard_weight, options.alpha * options.temperature**2, options.alpha * options.temperature,
            options.label_smoothing, scale,
        )  # fmt: skip
        constants = {
            "TEMPERATURE": _special(options.temperature), "PROBABILITIES": target.is_floating_point(),
            "SMOOTHING": options.label_smoothing > 0, "COUNT": mode, "PARTS": PARTS,
            "GRADIENT": gradient is not None, "STATE": numbers is not None and loss is not None,
            "TERMS": loss is None, "ONE_BLOCK": launch.one_block, **launch.constants,
        }  # fmt: skip
        compiled = _forward_kernel[(launch.programs,)](
            *launch.tensors, *outputs[1:], unused if counted is None else counted, *scalars, **constants
        )
    if key is not None and compiled is not None and counted is None:
        if len(_REPLAYS) == REPLAYS:
            _REPLAYS.clear()
        constexprs = (constants[name] for name in _forward_kernel.arg_names if name in constants)
        _REPLAYS[key] = _Replay(compiled[(launch.programs, 1, 1)], (*scalars, *constexprs))


class _Replay(NamedTuple):
    """A launch of the forward kernel as it was, for tensors of the same description.

    Triton binds and specialises all arguments anew for every launch, which is much of what a small batch costs the
    host. An interpreted kernel is not compiled and has none.
    """

    run: Callable[..., None]
    arguments: tuple[Any, ...]  # after the tensors


REPLAYS = 256  # at most; a training loop has two
_REPLAYS: dict[Any, _Replay] = {}


def _misaligned(*tensors: Tensor) -> bool:
    """Whether some tensor does not start on a multiple of 16 bytes, for which kernels are specialised."""
    return any(tensor.data_ptr() % 16 for tensor in tensors)


def _count(student: Tensor, target: Tensor, options: Options) -> tuple[int, Tensor | None, float]:
    """How the kernel gets at the denominator of the mean, see `_unit`; what depends on sizes alone is in a factor."""
    if options.reduction != "mean":
        return 0, None, 1.0
    if target.is_floating_point():
        return 0, None, 1 / _rows(student).numel()
    # 1024 labels are read in no time, and counting them on the spot saves a launch.
    if student.shape[0] == 1 and student.shape[2] <= 1024:
        return 1, None, 1.0
    counted = student.new_empty(PARTS, dtype=torch.int32)
    labels = target.reshape(-1).contiguous()
    _count_kernel[(PARTS,)](labels, counted, labels.numel(), options.ignore_index, PARTS=PARTS, num_warps=4)
    return 2, counted, 1.0


class _Launch(NamedTuple):
    """What the kernels that walk over logits have in common."""

    programs: int
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # student, teacher, target, gradient
    classes: int
    rows: int  # of a batch
    strides: tuple[int, ...]  # of the tensors, along batch, class and row
    one_block: bool
    constants: dict[str, Any]


def _launch(student: Tensor, teacher: Tensor, target: Tensor, gradient: Tensor | None) -> _Launch:
    """Which program takes what. The numbers of rows and batches are ordinary arguments: another one compiles nothing.

    Where a row stays in registers, 32 elements of both sets of logits a thread: fewer, and what is computed once a
    thread and row costs more than the elements; more, and they no longer fit. So a warp holds 1024 elements, a row of
    1000 classes needs no exchange between warps, and 8 warps hold 8192 without spilling to memory. Where registers
    also carry statistics from block to block, 16, and 8 with a target of probabilities beside them; then 16 warps fill
    a multiprocessor, so that few rows are on their way and the second pass finds its row in the L2 cache.
    """
    gradient = student if gradient is None else gradient
    probabilities = target.is_floating_point()
    batches, classes, rows = student.shape
    if rows == 1:
        batches, rows = 1, batches
    operands = [_strides(logits, student) for logits in (student, teacher, gradient)]
    target_strides = _strides(target if probabilities else target[:, None], student)
    if probabilities:
        operands.append(target_strides)
    unit = 16 // min(student.element_size(), teacher.element_size())  # elements in 16 bytes

    pixels = rows > 1 and operands[0][1] != 1 and operands[0][2] == 1
    edges = 0
    if pixels:
        # Each lane takes 16 bytes of neighbours and walks through the classes by itself: sums over them need no
        # exchange between threads, and any number of classes fits without padding.
        rows_block = _power_of_2(rows, 128 * unit)
        classes_block = _power_of_2(classes, 2048 // rows_block)
        warps = rows_block * classes_block // 512
        align = _alignment(rows, *(stride for b, c, _ in operands for stride in (b, c)))
    else:
        classes_block = _power_of_2(classes, 8192)
        if classes > classes_block and probabilities:
            classes_block = 4096
        rows_block = 1 if classes_block > 512 else 512 // classes_block
        warps = rows_block * classes_block // 1024 if classes <= classes_block else 16
        align = _alignment(classes, *(stride for b, _, r in operands for stride in (b, r)))
        # Rows that start anywhere, but both sets of logits alike: all but their edges is 16 bytes wide.
        if align < unit and classes > 1024 and _alike(operands, unit):
            align, edges = 1, unit
    constants = {
        "ROWS": rows_block, "CLASSES": classes_block, "ALIGN": align, "PIXELS": pixels, "EDGES": edges,
        "num_warps": 1 if warps < 1 else warps,
    }  # fmt: skip
    if pixels and torch.version.hip is None:
        # Left to itself the assembler may spill a register to fit one program more.
        constants["maxnreg"] = 255
    return _Launch(
        batches * -(-rows // rows_block),
        (student, teacher, target, gradient),
        classes,
        rows,
        (*operands[0], *operands[1], *target_strides, *operands[2]),
        classes <= classes_block,
        constants,
    )


def _rows(logits: Tensor) -> torch.Size:
    return logits.shape[:1] + logits.shape[2:]


def _strides(tensor: Tensor, student: Tensor) -> tuple[int, int, int]:
    """Of batch, class and row; (B, C, 1) is read as one batch of B rows."""
    b, c, r = tensor.stride()
    return (0, c, b) if student.shape[2] == 1 else (b, c, r)


def _scalars(student: Tensor, options: Options) -> tuple[float, float, float]:
    """`inverse`, `uniform`, `q_scale`: 1 / T, and of the hard gradient, hard_weight * (p - q_smoothed)."""
    smoothed = options.hard_weight * options.label_smoothing
    return 1 / options.temperature, smoothed / student.shape[1], options.hard_weight - smoothed


def _special(temperature: float) -> int:
    """The temperatures for which one exponential gives the other; 0 for the rest."""
    if temperature == 1:
        return 1
    return 2 if temperature == 2 else 0


def _power_of_2(size: int, largest: int) -> int:
    """The smallest power of two that holds `size`, `largest` at most."""
    power = 1
    while power < largest and power < size:
        power *= 2
    return power


def _alignment(*numbers: int) -> int:
    """The largest power of two, 16 at most, of which all of these are multiples."""
    align = 16
    for number in numbers:
        while number % align:
            align //= 2
    return align


def _alike(operands: list[tuple[int, int, int]], unit: int) -> bool:
    """Whether contiguous rows of all operands start at the same distance from a multiple of `unit`."""
    b, _, r = operands[0]
    return all(c == 1 and (b - other_b) % unit == 0 and (r - other_r) % unit == 0 for other_b, c, other_r in operands)


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
