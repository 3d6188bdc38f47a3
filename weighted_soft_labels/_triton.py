"""The loss in Triton, for NVIDIA and AMD GPUs. Same functions, same algebra and same order of steps as `_eager`.

Logits are seen as (batch, classes, rows) with any strides, so (N, C), (N, C, d1, ...) and channels_last need no copy:
(N, C) is one batch of N rows. A program takes ROWS rows and walks over the classes in blocks of CLASSES:

    statistics  one pass, online: the maximum, the sums of `_eager` and the soft term's dot product, all rescaled
                when the maximum moves. Every quantity keeps its sign under the rescaling, so nothing cancels.
    combine     cross-entropies, weight, loss; one number a row
    gradient    a second pass, which writes it

Where all classes fit in one block (ONE_BLOCK) the logits stay in registers between the passes. Bytes moved then, for
logits of b bytes: 2b read + b written an element with the gradient, 2b without. Offsets are 64-bit; arithmetic is
float32; nothing is read back to the host and no launch depends on the data.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from weighted_soft_labels.loss import Options

EPS = tl.constexpr(1e-7)  # of the official code: keeps the weight finite where the teacher's cross-entropy is 0

# Arguments that change with the batch: no kernel is compiled anew for one of them.
COUNTS = ["rows", "blocks", "size", "ignore_index"]


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
    return tl.where(r < 0.5, r * p, 1 - tl.exp(-r))


@triton.jit
def _exponentials(z, inverse, TEMPERATURE: tl.constexpr):
    """exp(z), exp(z / T); one exponential where squaring loses no digit that counts."""
    soft = tl.exp(z * inverse)
    if TEMPERATURE == 1:
        e = soft
    elif TEMPERATURE == 2:
        e = soft * soft
    else:
        e = tl.exp(z)
    return e, soft


@triton.jit
def _finite(peak):
    """A maximum that can be subtracted: a block may hold nothing but masked classes."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _dot(mass, value):
    """sum_c mass_c * value_c, where no mass times an infinite value is 0."""
    return tl.sum(tl.where(mass == 0, 0.0, mass * value), axis=1)


@triton.jit
def _rescale(total, factor):
    """total * factor, where nothing is left of an infinite total that has no weight any more."""
    return tl.where(factor == 0, 0.0, total * factor)


@triton.jit
def _row(x, peak, rest, soft_sum, inverse, TEMPERATURE: tl.constexpr):
    """Take a block of classes into the statistics of a row; `rest` is the sum of exp(z) less 1, so -1 at the start.

    Also returns z and exp(z / T) of the block, by how much the maximum moved, and what that makes of old exp(z / T).
    """
    new_peak = tl.maximum(peak, tl.max(x, axis=1))
    shift = _finite(new_peak)
    z = x - shift[:, None]
    e, soft = _exponentials(z, inverse, TEMPERATURE)
    # All but one of the classes at the maximum belong to the rest; each of them counts exp(0) = 1.
    at_peak = z == 0
    below = tl.sum(tl.where(at_peak, 0.0, e), axis=1)
    count = tl.sum(tl.where(at_peak, 1.0, 0.0), axis=1)
    moved = peak < new_peak
    rest = tl.where(moved, (1 + rest) * tl.exp(peak - shift) + below + (count - 1), rest + below + count)
    factor = tl.where(moved, tl.exp((peak - shift) * inverse), 1.0)
    soft_sum = soft_sum * factor + tl.sum(soft, axis=1)
    return z, soft, new_peak, rest, soft_sum, shift - _finite(peak), factor


@triton.jit
def _load(pointer, offset, columns, stride, mask, other):
    return tl.load(pointer + offset[:, None] + columns[None, :] * stride, mask, other=other).to(tl.float32)


@triton.jit
def _statistics(
    student, teacher, target, student_offset, teacher_offset, target_offset, student_c, teacher_c, target_c,
    start, column, classes, in_rows, inverse,
    student_peak, student_rest, student_sum, teacher_peak, teacher_rest, teacher_sum,
    dot, z_sum, mass, student_qz, teacher_qz,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Take one block of classes of both sets of logits (and of a target of probabilities) into the statistics."""
    columns = start + column
    mask = in_rows[:, None] & (columns < classes)[None, :]
    s = _load(student, student_offset, columns, student_c, mask, float("-inf"))
    t = _load(teacher, teacher_offset, columns, teacher_c, mask, float("-inf"))
    earlier = teacher_sum
    z, _, student_peak, student_rest, student_sum, student_move, _ = _row(
        s, student_peak, student_rest, student_sum, inverse, TEMPERATURE
    )
    teacher_z, soft, teacher_peak, teacher_rest, teacher_sum, teacher_move, factor = _row(
        t, teacher_peak, teacher_rest, teacher_sum, inverse, TEMPERATURE
    )
    dot = _rescale(dot - earlier * student_move, factor) + _dot(soft, z)
    if SMOOTHING:
        z_sum += tl.sum(tl.where(mask, z, 0.0), axis=1) - start * student_move
    if PROBABILITIES:
        q = _load(target, target_offset, columns, target_c, mask, 0.0)
        student_qz += _dot(q, z) - mass * student_move
        teacher_qz += _dot(q, teacher_z) - mass * teacher_move
        # Masked once more, as Triton 3.6 fails to compile a running sum of what comes straight from memory.
        mass += tl.sum(tl.where(mask, q, 0.0), axis=1)
    return (
        s, t, student_peak, student_rest, student_sum, teacher_peak, teacher_rest, teacher_sum,
        dot, z_sum, mass, student_qz, teacher_qz,
    )  # fmt: skip


@triton.jit
def _write_gradient(
    s, t, target, gradient, target_offset, gradient_offset, target_c, gradient_c, columns, mask, label, kept,
    student_peak, teacher_peak, hard_scale, at_label, student_scale, teacher_scale, uniform, q_scale, inverse,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr,
):  # fmt: skip
    """hard_weight * (p_s - q) + alpha * T * weight * (p'_s - p'_t) for one block of classes, all scales included."""
    e, student_soft = _exponentials(s - student_peak[:, None], inverse, TEMPERATURE)
    teacher_soft = tl.exp((t - teacher_peak[:, None]) * inverse)
    hard = hard_scale[:, None] * e - uniform[:, None]
    if PROBABILITIES:
        hard -= q_scale[:, None] * _load(target, target_offset, columns, target_c, mask, 0.0)
    else:
        hard = tl.where(columns[None, :] == label[:, None], at_label[:, None], hard)
    # The soft terms first: they all but cancel where student and teacher agree, and hard may be small beside each.
    out = hard + (student_scale[:, None] * student_soft - teacher_scale[:, None] * teacher_soft)
    out = tl.where(kept[:, None], out, 0.0)
    tl.store(gradient + gradient_offset[:, None] + columns[None, :] * gradient_c, out, mask)


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    student, teacher, target, gradient, loss, state, terms, count,
    classes, rows, blocks, size,
    student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
    target_b, target_c, target_r, gradient_b, gradient_c, gradient_r,
    ignore_index, inverse, hard_weight, alpha_t2, alpha_t, smoothing, scale,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, COUNT: tl.constexpr,
    GRADIENT: tl.constexpr, STATE: tl.constexpr, TERMS: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of every row; with GRADIENT its gradient for an incoming gradient of 1, times `scale` / count.

    One program a block of ROWS rows of one batch. Moves 2b bytes an element without the gradient, 3b with it if
    ONE_BLOCK, else 5b (2b of which mostly come from the L2 cache), for logits of b bytes.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    column = tl.arange(0, CLASSES).to(tl.int64)
    student_offset = batch * student_b + row * student_r
    teacher_offset = batch * teacher_b + row * teacher_r
    target_offset = batch * target_b + row * target_r
    index = batch * rows + row

    # statistics
    nothing = tl.zeros([ROWS], tl.float32)
    student_peak, student_rest, student_sum = nothing - float("inf"), nothing - 1, nothing
    teacher_peak, teacher_rest, teacher_sum = nothing - float("inf"), nothing - 1, nothing
    dot, z_sum, mass, student_qz, teacher_qz = nothing, nothing, nothing, nothing, nothing
    if ONE_BLOCK:
        (
            s, t, student_peak, student_rest, student_sum, teacher_peak, teacher_rest, teacher_sum,
            dot, z_sum, mass, student_qz, teacher_qz,
        ) = _statistics(
            student, teacher, target, student_offset, teacher_offset, target_offset, student_c, teacher_c, target_c,
            0, column, classes, in_rows, inverse,
            student_peak, student_rest, student_sum, teacher_peak, teacher_rest, teacher_sum,
            dot, z_sum, mass, student_qz, teacher_qz, TEMPERATURE, PROBABILITIES, SMOOTHING,
        )  # fmt: skip
    else:
        for start in range(0, classes, CLASSES):
            (
                _s, _t, student_peak, student_rest, student_sum, teacher_peak, teacher_rest, teacher_sum,
                dot, z_sum, mass, student_qz, teacher_qz,
            ) = _statistics(
                student, teacher, target, student_offset, teacher_offset, target_offset,
                student_c, teacher_c, target_c, start, column, classes, in_rows, inverse,
                student_peak, student_rest, student_sum, teacher_peak, teacher_rest, teacher_sum,
                dot, z_sum, mass, student_qz, teacher_qz, TEMPERATURE, PROBABILITIES, SMOOTHING,
            )  # fmt: skip

    # combine
    kept = in_rows
    label = row * 0
    label_z = nothing
    if PROBABILITIES:
        student_ce = mass * _log1p(student_rest) - student_qz
        teacher_ce = mass * _log1p(teacher_rest) - teacher_qz
        mass = mass * (1 - smoothing) + smoothing
    else:
        label = tl.load(target + target_offset, in_rows, other=0).to(tl.int64)
        kept = in_rows & (label != ignore_index)
        # An index that names no class may not be followed: its element is NaN.
        inside = (label >= 0) & (label < classes)
        student_rest = tl.where(inside, student_rest, float("nan"))
        label = tl.where(inside, label, 0)
        label_z = tl.load(student + student_offset + label * student_c, in_rows, other=0.0).to(tl.float32)
        label_z -= student_peak
        teacher_z = tl.load(teacher + teacher_offset + label * teacher_c, in_rows, other=0.0).to(tl.float32)
        student_ce = _log1p(student_rest) - label_z
        teacher_ce = _log1p(teacher_rest) - (teacher_z - teacher_peak)
        mass += 1
    # The student that rules the label out is infinitely worse than any teacher, also one that does the same.
    weight = tl.where(student_ce == float("inf"), 1.0, _one_minus_exp(student_ce / (teacher_ce + EPS)))
    soft = tl.log(student_sum) - dot / teacher_sum * inverse
    if TERMS:
        tl.store(terms + index, tl.where(kept, student_ce, 0.0), in_rows)
        tl.store(terms + size + index, tl.where(kept, teacher_ce, 0.0), in_rows)
        tl.store(terms + 2 * size + index, tl.where(kept, weight, 0.0), in_rows)
        tl.store(terms + 3 * size + index, tl.where(kept, soft, 0.0), in_rows)
    else:
        hard = student_ce
        if SMOOTHING:
            flat = _log1p(student_rest) - z_sum / classes
            hard = tl.where(smoothing == 1, flat, (1 - smoothing) * hard + smoothing * flat)
        # A term with scale 0 is left out, so 0 never meets inf; weight 0 on an infinite soft term: the student rules
        # out a class to which the teacher gives mass.
        weighted = tl.where((weight == 0) & (soft == float("inf")), float("inf"), weight * soft)
        total = tl.where(hard_weight == 0, 0.0, hard_weight * hard) + tl.where(alpha_t2 == 0, 0.0, alpha_t2 * weighted)
        tl.store(loss + index, tl.where(kept, total, 0.0), in_rows)

    # gradient
    hard_scale = hard_weight * mass / (1 + student_rest)
    others = tl.where(label_z == 0, student_rest, 1 + student_rest - tl.exp(label_z))
    at_label = hard_weight * (smoothing * (1 - 1 / classes) - others / (1 + student_rest))
    soft_scale = tl.where(alpha_t == 0, 0.0, alpha_t * weight)
    student_scale = soft_scale / student_sum
    teacher_scale = soft_scale / teacher_sum
    if STATE:
        tl.store(state + index, student_peak, in_rows)
        tl.store(state + size + index, teacher_peak, in_rows)
        tl.store(state + 2 * size + index, hard_scale, in_rows)
        tl.store(state + 3 * size + index, at_label, in_rows)
        tl.store(state + 4 * size + index, student_scale, in_rows)
        tl.store(state + 5 * size + index, teacher_scale, in_rows)
    if GRADIENT:
        unit = nothing + scale
        if COUNT:
            unit /= tl.load(count).to(tl.float32)
        gradient_offset = batch * gradient_b + row * gradient_r
        uniform = unit * (hard_weight * smoothing / classes)
        q_scale = unit * (hard_weight * (1 - smoothing))
        if ONE_BLOCK:
            _write_gradient(
                s, t, target, gradient, target_offset, gradient_offset, target_c, gradient_c,
                column, in_rows[:, None] & (column < classes)[None, :], label, kept, student_peak, teacher_peak,
                hard_scale * unit, at_label * unit, student_scale * unit, teacher_scale * unit, uniform, q_scale,
                inverse, TEMPERATURE, PROBABILITIES,
            )  # fmt: skip
        else:
            for start in range(0, classes, CLASSES):
                columns = start + column
                mask = in_rows[:, None] & (columns < classes)[None, :]
                _write_gradient(
                    _load(student, student_offset, columns, student_c, mask, float("-inf")),
                    _load(teacher, teacher_offset, columns, teacher_c, mask, float("-inf")),
                    target, gradient, target_offset, gradient_offset, target_c, gradient_c,
                    columns, mask, label, kept, student_peak, teacher_peak,
                    hard_scale * unit, at_label * unit, student_scale * unit, teacher_scale * unit, uniform, q_scale,
                    inverse, TEMPERATURE, PROBABILITIES,
                )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    student, teacher, target, gradient, state, upstream, count,
    classes, rows, blocks, size,
    student_b, student_c, student_r, teacher_b, teacher_c, teacher_r,
    target_b, target_c, target_r, gradient_b, gradient_c, gradient_r, upstream_b, upstream_r,
    ignore_index, inverse, hard_weight, smoothing, scale,
    TEMPERATURE: tl.constexpr, PROBABILITIES: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The gradient for any incoming gradient, from the logits and the state of each row. Moves 3b bytes an element.

    One program a block of ROWS rows and CLASSES classes of one batch.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    columns = tl.program_id(1).to(tl.int64) * CLASSES + tl.arange(0, CLASSES)
    mask = in_rows[:, None] & (columns < classes)[None, :]
    index = batch * rows + row
    target_offset = batch * target_b + row * target_r

    kept = in_rows
    label = row * 0
    if not PROBABILITIES:
        label = tl.load(target + target_offset, in_rows, other=0).to(tl.int64)
        kept = in_rows & (label != ignore_index)
    unit = tl.load(upstream + batch * upstream_b + row * upstream_r, in_rows, other=0.0).to(tl.float32) * scale
    if COUNT:
        unit /= tl.load(count).to(tl.float32)
    _write_gradient(
        _load(student, batch * student_b + row * student_r, columns, student_c, mask, float("-inf")),
        _load(teacher, batch * teacher_b + row * teacher_r, columns, teacher_c, mask, float("-inf")),
        target, gradient, target_offset, batch * gradient_b + row * gradient_r, target_c, gradient_c,
        columns, mask, label, kept,
        tl.load(state + index, in_rows, other=0.0),
        tl.load(state + size + index, in_rows, other=0.0),
        tl.load(state + 2 * size + index, in_rows, other=0.0) * unit,
        tl.load(state + 3 * size + index, in_rows, other=0.0) * unit,
        tl.load(state + 4 * size + index, in_rows, other=0.0) * unit,
        tl.load(state + 5 * size + index, in_rows, other=0.0) * unit,
        unit * (hard_weight * smoothing / classes), unit * (hard_weight * (1 - smoothing)),
        inverse, TEMPERATURE, PROBABILITIES,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _scale_kernel(
    gradient, upstream, classes, rows, blocks, gradient_b, gradient_c, gradient_r, upstream_b, upstream_r,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """gradient *= upstream, in place and in float32; rows whose factor is 1, which is all of them as a rule, rest."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    factor = tl.load(upstream + batch * upstream_b + row * upstream_r, in_rows, other=1.0).to(tl.float32)
    if tl.sum((factor != 1).to(tl.int32)) > 0:
        columns = tl.program_id(1).to(tl.int64) * CLASSES + tl.arange(0, CLASSES)
        mask = in_rows[:, None] & (columns < classes)[None, :]
        offset = batch * gradient_b + row * gradient_r
        value = _load(gradient, offset, columns, gradient_c, mask, 0.0) * factor[:, None]
        tl.store(gradient + offset[:, None] + columns[None, :] * gradient_c, value, mask)


def forward(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, with_gradient: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The reduced loss, its gradient for an incoming gradient of 1 if asked for, else what `backward` needs."""
    count, scale = _count(student, target, options)
    loss = student.new_empty(_row_shape(student), dtype=torch.float32)
    gradient = torch.empty_like(_flat(student)) if with_gradient else None
    state = None if with_gradient else student.new_empty((6, *loss.shape), dtype=torch.float32)
    _launch_forward(
        student, teacher, target, options.temperature, options.ignore_index,
        options.alpha, options.hard_weight, options.label_smoothing, count, scale, loss, gradient, state,
    )  # fmt: skip
    if options.reduction != "none":
        loss = loss.sum()
        if options.reduction == "mean":
            loss = loss * scale if count is None else loss / count
    return loss, None if gradient is None else gradient.view(student.shape), () if state is None else (state,)


def backward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    state: tuple[Tensor, ...],
    upstream: Tensor,
    options: Options,
) -> Tensor:
    """The gradient for the incoming gradient `upstream`, which is applied before rounding to the student's dtype."""
    if not state:
        state = forward(student, teacher, target, options, False)[2]
    count, scale = _count(student, target, options)
    flat_student, flat_teacher, flat_target = _flat(student), _flat(teacher), _flat_target(target, student)
    flat_upstream = _flat_rows(upstream, student)
    gradient = torch.empty_like(flat_student)
    classes, batches, rows = _extent(flat_student)
    if rows * batches:
        rows_block, classes_block = _elementwise_block(flat_student)
        blocks = triton.cdiv(rows, rows_block)
        with _device(student):
            _backward_kernel[(batches * blocks, triton.cdiv(classes, classes_block))](
                flat_student, flat_teacher, flat_target, gradient, state[0], flat_upstream,
                target if count is None else count, classes, rows, blocks, batches * rows,
                *_strides(flat_student), *_strides(flat_teacher), *_strides(flat_target), *_strides(gradient),
                *_strides(flat_upstream)[::2],
                options.ignore_index, 1 / options.temperature,
                float(options.hard_weight), float(options.label_smoothing), scale,
                TEMPERATURE=_special(options.temperature), PROBABILITIES=target.is_floating_point(),
                COUNT=count is not None, ROWS=rows_block, CLASSES=classes_block, num_warps=4,
            )  # fmt: skip
    return gradient.view(student.shape)


def terms(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student CE, teacher CE, weight and soft term of every element; 0 where it is ignored."""
    found = student.new_empty((4, *_row_shape(student)), dtype=torch.float32)
    _launch_forward(student, teacher, target, temperature, ignore_index, terms=found)
    student_ce, teacher_ce, weight, soft = found.unbind(0)
    return student_ce, teacher_ce, weight, soft


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply a gradient that was formed for an incoming gradient of 1, in place."""
    flat, flat_upstream = _flat(gradient), _flat_rows(upstream, gradient)
    classes, batches, rows = _extent(flat)
    if rows * batches:
        rows_block, classes_block = _elementwise_block(flat)
        blocks = triton.cdiv(rows, rows_block)
        with _device(gradient):
            _scale_kernel[(batches * blocks, triton.cdiv(classes, classes_block))](
                flat, flat_upstream, classes, rows, blocks, *_strides(flat), *_strides(flat_upstream)[::2],
                ROWS=rows_block, CLASSES=classes_block, num_warps=4,
            )  # fmt: skip
    return gradient


def _launch_forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    ignore_index: int,
    alpha: float = 0.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    count: Tensor | None = None,
    scale: float = 1.0,
    loss: Tensor | None = None,
    gradient: Tensor | None = None,
    state: Tensor | None = None,
    terms: Tensor | None = None,
) -> None:
    """Run the forward kernel for those of its outputs that are given."""
    student, teacher, target = _flat(student), _flat(teacher), _flat_target(target, student)
    classes, batches, rows = _extent(student)
    if rows * batches == 0:
        return
    rows_block, classes_block, warps = _reduction_block(student)
    blocks = triton.cdiv(rows, rows_block)
    smoothing = True if label_smoothing > 0 else False  # noqa: SIM210
    one_block = True if classes <= classes_block else False  # noqa: SIM210
    unused = student  # any address will do where a pointer is not followed
    with _device(student):
        _forward_kernel[(batches * blocks,)](
            student, teacher, target,
            unused if gradient is None else gradient, unused if loss is None else loss,
            unused if state is None else state, unused if terms is None else terms,
            unused if count is None else count,
            classes, rows, blocks, batches * rows,
            *_strides(student), *_strides(teacher), *_strides(target),
            *_strides(student if gradient is None else gradient),
            ignore_index, 1 / temperature, float(hard_weight),
            float(alpha * temperature**2), float(alpha * temperature), float(label_smoothing), scale,
            TEMPERATURE=_special(temperature), PROBABILITIES=target.is_floating_point(),
            SMOOTHING=smoothing, COUNT=count is not None,
            GRADIENT=gradient is not None, STATE=state is not None, TERMS=terms is not None,
            ROWS=rows_block, CLASSES=classes_block, ONE_BLOCK=one_block, num_warps=warps,
        )  # fmt: skip


def _flat(logits: Tensor) -> Tensor:
    """View logits as (N, C, D). Only trailing dimensions that no single stride can walk are copied, in their order."""
    if logits.dim() == 1:
        return logits.view(1, -1, 1)
    return logits.unsqueeze(-1) if logits.dim() == 2 else logits.flatten(2)


def _row_shape(logits: Tensor) -> torch.Size:
    return logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size()


def _extent(flat: Tensor) -> tuple[int, int, int]:
    """Classes, batches and rows of a batch: (N, C) is one batch of N rows, (N, C, D) is N batches of D rows."""
    n, classes, across = flat.shape
    return (classes, 1, n) if across == 1 else (classes, n, across)


def _strides(flat: Tensor) -> tuple[int, int, int]:
    """Of batch, class and row, for the same reading of (N, C, D) as in `_extent`."""
    n, classes, across = flat.stride()
    return (0, classes, n) if flat.shape[2] == 1 else (n, classes, across)


def _flat_rows(rows: Tensor, logits: Tensor) -> Tensor:
    """View one entry an element as (N, 1, D); a scalar stands for all of them."""
    rows = rows.expand(_row_shape(logits))
    if rows.dim() < 2:
        return rows.reshape(-1, 1, 1)
    return rows.flatten(1).unsqueeze(1)


def _flat_target(target: Tensor, logits: Tensor) -> Tensor:
    return _flat(target) if target.is_floating_point() else _flat_rows(target, logits)


def _count(student: Tensor, target: Tensor, options: Options) -> tuple[Tensor | None, float]:
    """The denominator of the mean: where it depends on the data a tensor on the device, else within a factor."""
    if options.reduction != "mean":
        return None, 1.0
    if target.is_floating_point():
        elements = _row_shape(student).numel()
        return None, 1 / elements if elements else math.nan
    return (target.long() != options.ignore_index).sum(), 1.0


# The compiler may hand over sizes and options as symbols. What a kernel is compiled for must be a number: only the
# outcome of an `if` is one.


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


def _lanes_on_rows(flat: Tensor) -> bool:
    """Whether neighbours in memory are rows (pixels), not classes."""
    _, class_stride, row_stride = _strides(flat)
    return class_stride != 1 and row_stride == 1


def _reduction_block(flat: Tensor) -> tuple[int, int, int]:
    """ROWS, CLASSES and warps of a program that reduces over the classes."""
    classes = flat.shape[1]
    if _lanes_on_rows(flat):
        # As many classes as leave 32 pixels, which fill a memory line; 8 elements of both sets of logits a thread.
        classes_block = _power_of_2(classes, 64)
        return 2048 // classes_block, classes_block, 8
    # 16 elements of both sets of logits a thread leave registers for the arithmetic: 16 warps hold 8192 classes without
    # spilling, 16384 spill. Few classes: several rows share a program, whose numbers take registers as well.
    classes_block = _power_of_2(classes, 8192)
    if classes > classes_block:
        classes_block = 4096
    if classes_block < 1024:
        return 1024 // classes_block, classes_block, 4
    return 1, classes_block, min(classes_block // 512, 16)


def _elementwise_block(flat: Tensor) -> tuple[int, int]:
    """ROWS and CLASSES of a program that treats every element alone: 2048 of them, along whatever is contiguous."""
    classes_block = _power_of_2(flat.shape[1], 16 if _lanes_on_rows(flat) else 2048)
    return 2048 // classes_block, classes_block


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if tensor.is_cuda and not torch.compiler.is_compiling():
        return torch.cuda.device(tensor.device)
    return nullcontext()
