"""Closed-form loss and gradient in ATen operators.

Runs wherever the kernels do not: on CPU, MPS, CUDA without Triton, and in float64. Two forms of one algebra:

``_loss``, ``_closed_form_gradient``
    Plain operators on whole tensors, right on every input. This is what ``torch.compile`` sees and fuses.
``_confident_tile``
    In place, on tiles that stay in the cache, for index targets on a CPU. It serves the rows that training
    is made of; a tile that holds anything else (infinities, NaN, far margins) is handed to the plain form.

With z = x - max x, e = exp z, Z = sum e, and e', Z' the same at temperature T, for student s and teacher t:

    statistics  rest = Z - 1, summed without one maximum;  CE = log1p(rest) - z_y  (both terms >= 0);  Z'
    combine     weight = -expm1(-CE_s / (CE_t + 1e-7));  soft = log Z'_s - sum(e'_t / Z'_t * z_s / T)
                loss = hard_weight * hard + alpha * T^2 * weight * soft
    gradient    hard_weight * (e_s / Z_s - q) + alpha * T * weight * (e'_s / Z'_s - e'_t / Z'_t)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from weighted_soft_labels.loss import Options

EPS = 1e-7  # of the official code: keeps the weight finite where the teacher's cross-entropy is 0

# Elements in a tile, of which there are two in scratch memory. Up to here larger tiles are faster, as starting
# operators costs more than leaving the cache; beyond it is memory that grows.
TILE = 2**20
# Classes that the norm adds up at once; see `_sum_of_squares`.
FOLD = 1024


def forward(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, with_gradient: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The reduced loss, its gradient for an incoming gradient of 1 if that is at hand, and what `backward` needs."""
    if _tiled(student):
        loss, gradient = _tiles(student, teacher, target, options, with_gradient)
        return loss, gradient, ()
    label, kept = _label(student, target, options.ignore_index)
    scale = student.new_ones((), dtype=_compute_dtype(student, teacher))
    if options.reduction == "mean":
        scale = scale / (student.numel() // student.shape[_class_dim(student)] if kept is None else kept.sum())
    rows, state = _loss(student, teacher, label, kept, scale, options)
    if options.reduction == "none":
        return rows.squeeze(_class_dim(student)), None, state
    return rows.sum() * scale, None, state


def backward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    state: tuple[Tensor, ...],
    upstream: Tensor,
    options: Options,
) -> Tensor:
    """The gradient for the incoming gradient `upstream`, which is applied before rounding to the student's dtype."""
    if _tiled(student):
        return cast("Tensor", _tiles(student, teacher, target, options, True, upstream)[1])
    if not state:
        state = forward(student, teacher, target, options, False)[2]
    dim = _class_dim(student)
    label, kept = _label(student, target, options.ignore_index)
    if options.reduction == "none":
        upstream = upstream.unsqueeze(dim)
    return _closed_form_gradient(student, teacher, label, kept, state, upstream, options)


def terms(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student CE, teacher CE, weight and soft term of every element; 0 where it is ignored."""
    if not _tiled(student) or student.dim() == 1 or student.numel() <= TILE:
        return _terms(student, teacher, target, options)
    rows = max(1, TILE // student[0].numel())
    tiles = zip(*(torch.split(operand, rows) for operand in (student, teacher, target)))
    found = [_terms(s, t, y, options) for s, t, y in tiles]
    student_ce, teacher_ce, weight, soft = (torch.cat(term) for term in zip(*found))
    return student_ce, teacher_ce, weight, soft


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply a gradient that was formed for an incoming gradient of 1, in place."""
    if upstream.dim():
        return gradient.mul_(upstream.unsqueeze(_class_dim(gradient)))
    factor = upstream.item()
    return gradient if factor == 1 else gradient.mul_(factor)


# --- plain operators: every input, every device, fused by the compiler ---


class _Row(NamedTuple):
    """What the loss needs to know of one set of logits; all but `z` and `soft` have one entry an element."""

    z: Tensor  # logits - peak, <= 0
    soft: Tensor  # exp(z / T)
    peak: Tensor
    rest: Tensor  # sum exp(z) - 1, without cancellation
    soft_sum: Tensor  # sum exp(z / T)
    label_z: Tensor  # z of the label; of a target of probabilities their expectation of z
    ce: Tensor


def _class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def _compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _label(student: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """The target with a class dimension, and which elements take part (None: all of them).

    Integer labels are widened first: compared in uint8, 156 would equal an ignore_index of -100.
    """
    if target.is_floating_point():
        return target, None
    label = target.long().unsqueeze(_class_dim(student))
    return label, label != ignore_index


def _over(z: Tensor, temperature: float) -> Tensor:
    """z / T; a division is slow, and half of a number is exact."""
    if temperature == 1:
        return z
    return z * 0.5 if temperature == 2 else z / temperature


def _exponentials(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``exp(z), exp(z / T)``; one exponential where squaring loses no digit that counts."""
    if temperature == 1:
        e = z.exp()
        return e, e
    soft = _over(z, temperature).exp()
    return soft * soft if temperature == 2 else z.exp(), soft


def _dot(mass: Tensor, value: Tensor, dim: int) -> Tensor:
    """``sum_c mass_c * value_c``, where no mass times an infinite value is 0."""
    if _tiled(value):
        total = (mass * value).sum(dim, keepdim=True)
        if not total.isnan().any():
            return total
    return torch.where(mass == 0, 0.0, mass * value).sum(dim, keepdim=True)


def _row(logits: Tensor, label: Tensor, temperature: float, dim: int, poison: Tensor | float = 0.0) -> _Row:
    # All but one of the classes at the maximum belong to the rest, which is summed without that one: by its index,
    # or, as only comparisons fuse, without all of them, each of which then counts exp(0) = 1.
    index = None
    if torch.compiler.is_compiling():
        peak = logits.amax(dim, keepdim=True)
    else:
        peak, index = logits.max(dim, keepdim=True)
        peak = torch.where(peak == math.inf, math.nan, peak)  # inf - inf at that index would be left out as well
    peak = peak + poison
    z = logits - peak
    e, soft = _exponentials(z, temperature)
    if index is None:
        at_peak = z == 0
        rest = torch.where(at_peak, 0.0, e).sum(dim, keepdim=True) + (at_peak.sum(dim, True, dtype=z.dtype) - 1)
    else:
        rest = e.scatter(dim, index, 0.0).sum(dim, keepdim=True)
    log_z = rest.log1p()
    if label.is_floating_point():
        log_z, label_z = label.sum(dim, keepdim=True) * log_z, _dot(label, z, dim)
    else:
        label_z = logits.gather(dim, label) - peak
    return _Row(z, soft, peak, rest, soft.sum(dim, keepdim=True), label_z, log_z - label_z)


def _statistics(
    student: Tensor, teacher: Tensor, label: Tensor, kept: Tensor | None, temperature: float
) -> tuple[_Row, _Row]:
    dim = _class_dim(student)
    dtype = _compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if kept is None:
        label = label.to(dtype)
        return _row(student, label, temperature, dim), _row(teacher, label, temperature, dim)
    inside = (label >= 0) & (label < student.shape[dim])
    label = torch.where(inside, label, 0)
    # An index that names no class makes its element NaN, as nothing may be raised without looking at the data.
    poison = torch.where(inside | ~kept, 0.0, math.nan)
    return _row(student, label, temperature, dim, poison), _row(teacher, label, temperature, dim)


def _combine(student: _Row, teacher: _Row, temperature: float) -> tuple[Tensor, Tensor]:
    """The weight and the soft term of every element."""
    dim = _class_dim(student.z)
    # The student that rules the label out is infinitely worse than any teacher, also one that does the same.
    weight = torch.where(student.ce == math.inf, 1.0, -torch.expm1(-student.ce / (teacher.ce + EPS)))
    soft = student.soft_sum.log() - _dot(teacher.soft, student.z, dim) / (teacher.soft_sum * temperature)
    return weight, soft


def _terms(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim = _class_dim(student)
    label, kept = _label(student, target, options.ignore_index)
    if kept is not None and _tiled(student):
        _check_label(label, student.shape[dim], options.ignore_index)
    student_row, teacher_row = _statistics(student, teacher, label, kept, options.temperature)
    weight, soft = _combine(student_row, teacher_row, options.temperature)
    student_ce, teacher_ce, weight, soft = (
        (term if kept is None else torch.where(kept, term, 0.0)).squeeze(dim)
        for term in (student_row.ce, teacher_row.ce, weight, soft)
    )
    return student_ce, teacher_ce, weight, soft


def _loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    kept: Tensor | None,
    scale: Tensor | float,
    options: Options,
) -> tuple[Tensor, tuple[Any, ...]]:
    """The loss of every element, and the numbers of each from which its gradient, times `scale`, follows."""
    dim = _class_dim(student_logits)
    smoothing, temperature = options.label_smoothing, options.temperature
    student, teacher = _statistics(student_logits, teacher_logits, label, kept, temperature)
    weight, soft = _combine(student, teacher, temperature)

    loss = torch.zeros_like(weight)
    if options.hard_weight:
        hard = student.ce
        if smoothing:
            uniform = student.rest.log1p() - student.z.mean(dim, keepdim=True)
            hard = uniform if smoothing == 1 else (1 - smoothing) * hard + smoothing * uniform
        loss = loss + options.hard_weight * hard
    if options.alpha:
        # weight 0 on an infinite soft term: the student rules out a class to which the teacher gives mass.
        weighted = torch.where((weight == 0) & (soft == math.inf), math.inf, weight * soft)
        loss = loss + (options.alpha * temperature**2) * weighted

    hard_weight = options.hard_weight * scale
    soft_scale = options.alpha * temperature * weight * scale
    total = 1 + student.rest
    hard_scale = hard_weight / total
    if kept is None:
        hard_scale = hard_scale * (label.to(total.dtype).sum(dim, keepdim=True) * (1 - smoothing) + smoothing)
        at_label = hard_weight * (1 - smoothing)
    else:
        loss = torch.where(kept, loss, 0.0)
        # p_y - 1 = -(Z - e_y) / Z, which does not cancel: the rest where the label is a maximum.
        others = torch.where(student.label_z == 0, student.rest, total - student.label_z.exp())
        at_label = hard_weight * (smoothing * (1 - 1 / student_logits.shape[dim]) - others / total)
        if options.alpha:
            student_soft = _over(student.label_z, temperature).exp() / student.soft_sum
            at_label = at_label + soft_scale * (
                student_soft - _over(teacher.label_z, temperature).exp() / teacher.soft_sum
            )
    return loss, (
        student.peak,
        teacher.peak,
        student.soft_sum.log(),
        teacher.soft_sum.log(),
        hard_scale * student.soft_sum**2 if temperature == 2 else hard_scale,
        soft_scale,
        at_label,
        hard_weight * (smoothing / student_logits.shape[dim]),
    )


def _closed_form_gradient(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    kept: Tensor | None,
    state: tuple[Any, ...],
    upstream: Tensor | float,
    options: Options,
) -> Tensor:
    """The gradient of one tile or of everything, from the logits and what `_loss` knew of each element.

    Written so that the compiler stores nothing of the size of the logits between forward and backward, and computes
    what belongs to an element once: softmax is exp(z / T - log Z'), not exp(z / T) / Z', an expression of the forward;
    `upstream` goes into the numbers of each element (in float32, before any rounding), not into their sum.
    """
    dim = _class_dim(student)
    student_peak, teacher_peak, student_log_sum, teacher_log_sum, *scales = state
    hard_scale, soft_scale, at_label, uniform = (number * upstream for number in scales)
    dtype, temperature = student_peak.dtype, options.temperature

    student_z = student.to(dtype) - student_peak
    softmax = (_over(student_z, temperature) - student_log_sum).exp()
    gradient: Tensor = hard_scale * (softmax * softmax if temperature == 2 else student_z.exp())
    if options.alpha:
        teacher_softmax = (_over(teacher.to(dtype) - teacher_peak, temperature) - teacher_log_sum).exp()
        gradient = gradient + (soft_scale * softmax - soft_scale * teacher_softmax)
    if options.label_smoothing:
        gradient = gradient - uniform
    if kept is None:
        gradient = gradient - at_label * label.to(dtype)
        return gradient.to(student.dtype)
    gradient = torch.where(kept, gradient, 0.0).to(student.dtype)
    at_label = torch.where(kept, at_label, 0.0).to(student.dtype)
    return gradient.scatter(dim, label.clamp(0, student.shape[dim] - 1), at_label)


# --- tiles in the cache: CPU only, where looking at the data costs nothing ---


def _tiled(student: Tensor) -> bool:
    return student.device.type == "cpu" and not torch.compiler.is_compiling()


def _tiles(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    with_gradient: bool,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Loss and gradient, one tile at a time; `upstream` scales the gradient in the compute dtype (default 1)."""
    dtype = _compute_dtype(student, teacher)
    # channels_last and its kin become plain rows of classes; everything else keeps its class dimension in the middle.
    class_last = student.dim() > 2 and student.stride(1) == 1
    logits, teacher = _with_classes(student, class_last), _with_classes(teacher, class_last)
    classes = logits.shape[1]
    if target.is_floating_point():
        label, kept = _with_classes(target, class_last), None
        count = student.numel() // classes
    else:
        label, kept = _check_label(_without_classes(target, class_last).long(), classes, options.ignore_index)
        count = label.numel() if kept is None else int(kept.sum())

    scale: Tensor | float = 1.0
    if options.reduction == "mean":
        scale = 1 / max(count, 1)
    if upstream is not None:
        scale = (_without_classes(upstream, class_last) if upstream.dim() else upstream) * scale
    if kept is not None:
        scale = kept.to(dtype) * scale  # of bool and float, torch would make float32

    loss = torch.empty((logits.shape[0], 1, *logits.shape[2:]), dtype=dtype)
    gradient = torch.empty(logits.shape, dtype=student.dtype) if with_gradient else None
    operands: tuple[Any, ...] = (logits, teacher, label, kept, scale, loss, gradient)
    if 0 < logits.numel() <= TILE:
        _tile(None, options, *operands)
    elif logits.numel():
        rows, across = max(1, TILE // logits[0].numel()), max(1, TILE // classes)
        scratch = None
        for tile in zip(*(_split(operand, rows, across) for operand in operands)):
            scratch = _tile(scratch, options, *tile)

    if gradient is not None:
        if class_last:
            gradient = gradient.view(student.movedim(1, -1).shape).movedim(-1, 1)
        else:
            gradient = gradient.view(student.shape)
    if options.reduction == "none":
        loss = loss.view(student.shape[:1] + student.shape[2:] if student.dim() > 1 else ())
    else:
        loss = loss.sum()
        if options.reduction == "mean":
            loss /= count
    return loss, gradient


def _with_classes(tensor: Tensor, class_last: bool) -> Tensor:
    """View logits as (n, C) or (n, C, d)."""
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    if class_last:
        return tensor.movedim(1, -1).flatten(0, -2)
    return tensor if tensor.dim() == 2 else tensor.flatten(2)


def _without_classes(tensor: Tensor, class_last: bool) -> Tensor:
    """View one entry an element as (n, 1) or (n, 1, d)."""
    if tensor.dim() < 2:
        return tensor.reshape(-1, 1)
    return tensor.flatten().unsqueeze(1) if class_last else tensor.flatten(1).unsqueeze(1)


def _split(operand: Tensor | float | None, rows: int, across: int) -> Iterable[Any]:
    """Cut (n, C) by rows and (n, C, d) by rows and across; what has no dimension goes to every tile."""
    if not isinstance(operand, Tensor) or operand.dim() == 0:
        return itertools.repeat(operand)
    blocks: tuple[Tensor, ...] = torch.split(operand, rows)
    if operand.dim() == 2:
        return blocks
    return (tile for block in blocks for tile in torch.split(block, across, 2))


def _check_label(label: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Labels that can index, and which elements take part (None: all of them). Raises IndexError."""
    if label.numel() == 0:
        return label, None
    low, high = (int(bound) for bound in label.aminmax())
    kept = None
    if low <= ignore_index <= high:
        kept = label != ignore_index
        label = label.where(kept, 0)
        low, high = (int(bound) for bound in label.aminmax())
    if low < 0 or high >= classes:
        raise IndexError(
            f"target must hold class indices in [0, {classes}) or ignore_index ({ignore_index}), "
            f"got {low if low < 0 else high}"
        )
    return label, kept


def _tile(
    scratch: Tensor | None,
    options: Options,
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    kept: Tensor | None,
    scale: Tensor | float,
    loss: Tensor,
    gradient: Tensor | None,
) -> Tensor | None:
    """Fill `loss` and `gradient` for one tile; returns scratch memory that the next tile may use."""
    dtype = loss.dtype
    student, teacher = student.to(dtype), teacher.to(dtype)
    if not label.is_floating_point():
        in_place = gradient is not None and gradient.dtype == dtype
        if scratch is None or scratch.shape[1:] != student.shape:
            scratch = torch.empty((2 if in_place else 3, *student.shape), dtype=dtype)
        pair, out = (scratch, gradient) if gradient is not None and in_place else (scratch[:2], scratch[2])
        if _confident_tile(student, teacher, label, scale, loss, out, pair, options, gradient is not None):
            if kept is not None:
                loss.mul_(kept)
            if gradient is not None and not in_place:
                gradient.copy_(out)
            return scratch
        kept = torch.ones_like(label, dtype=torch.bool) if kept is None else kept
    rows, state = _loss(student, teacher, label, kept, scale, options)
    loss.copy_(rows)
    if gradient is not None:
        gradient.copy_(_closed_form_gradient(student, teacher, label, kept, state, 1.0, options))
    return scratch


def _confident_tile(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    scale: Tensor | float,
    loss: Tensor,
    out: Tensor,
    pair: Tensor,
    options: Options,
    with_gradient: bool,
) -> bool:
    """The closed form in place, measured from the label instead of the maximum: False if that is not safe here.

    With z = x - x_y the sum over the other classes is at hand without a search for the maximum, and
    CE = log1p(sum of the others) is as exact as with the maximum. It overflows, and the soft term cancels,
    where another class is far ahead of the label; then, or where anything is not finite, nothing of what was
    written counts.

    Args:
        student: (n, C) or (n, C, d), as are `teacher` and `out`, in the dtype of the computation.
        label: (n, 1) or (n, 1, d), as is `loss`; every entry names a class.
        scale: What multiplies the gradient, a number or shaped like `label`.
        loss: Receives the loss of every element.
        out: Receives the gradient; scratch without it.
        pair: Scratch, (2, n, C) or (2, n, C, d).
    """
    temperature, hard_weight, smoothing = options.temperature, options.hard_weight, options.label_smoothing
    classes = student.shape[1]
    # Halving is exact, so at T = 2 the shift and the scaling are one pass, and exp(z) is a square.
    inverse = 0.5 if temperature == 2 else 1.0
    s, t = pair.unbind(0)
    torch.add(student.gather(1, label).mul_(-inverse), student, alpha=inverse, out=s)
    torch.add(teacher.gather(1, label).mul_(-inverse), teacher, alpha=inverse, out=t)
    e = None
    if temperature not in (1, 2):
        e = pair.exp()
        pair.div_(temperature)
    t.exp_()
    dot = torch.mul(s, t, out=out).sum(1, keepdim=True)
    mean = s.mean(1, keepdim=True) if smoothing else None
    s.exp_()

    s.scatter_(1, label, 0.0)
    t.scatter_(1, label, 0.0)
    soft_sum = pair.sum(2, keepdim=True)
    if e is not None:
        rest = e.scatter_(2, label.expand(2, *label.shape), 0.0).sum(2, keepdim=True)
    else:
        rest = soft_sum if temperature == 1 else _sum_of_squares(pair)
    ce = rest.log1p()
    hard, teacher_ce = ce.unbind(0)
    negative_weight = hard.div(torch.rsub(teacher_ce, -EPS)).expm1_()
    soft = soft_sum[0].log1p()
    soft_sum = soft_sum + 1
    soft.addcdiv_(dot, soft_sum[1], value=-1)
    if mean is not None:
        hard = hard - mean.mul_(smoothing * temperature)
    if hard_weight != 1:
        hard = hard * hard_weight
    torch.addcmul(hard, negative_weight, soft, value=-options.alpha * temperature**2, out=loss)
    # The soft term's rounding error grows with the margin, and so does the hard term that it is added to.
    margin = 16 * (1 + min(hard_weight, 1)) * temperature
    if not (ce.amax().item() < margin and math.isfinite(loss.sum().item())):
        return False
    if not with_gradient:
        return True

    student_rest = rest[0]
    hard_scale = (student_rest + 1).reciprocal_().mul_(hard_weight * scale)
    student_scale, teacher_scale = (negative_weight.mul_(-options.alpha * temperature * scale) / soft_sum).unbind(0)
    at_label = (student_scale - teacher_scale).addcmul_(student_rest, hard_scale, value=-1)
    if e is not None:
        torch.mul(e[0], hard_scale, out=out).addcmul_(s, student_scale)
    elif temperature == 1:
        torch.mul(s, hard_scale + student_scale, out=out)
    else:
        torch.addcmul(student_scale, s, hard_scale, out=out).mul_(s)
    out.addcmul_(t, teacher_scale, value=-1)
    if smoothing:
        uniform = scale * (hard_weight * smoothing / classes)
        out.sub_(uniform)
        at_label.add_(uniform * (classes - 1))
    out.scatter_(1, label, at_label)
    return True


def _sum_of_squares(pair: Tensor) -> Tensor:
    """Over dimension 2, which stays. The norm squares and sums in one pass where that dimension is the last.

    It is ten times slower elsewhere, and it adds up long rows without the care that `sum` takes (relative error
    4e-5 for 300 000 classes, 2e-7 for 1024), so long rows are folded first.
    """
    if pair.dim() > 3:
        return torch.sum(pair * pair, 2, keepdim=True)
    classes = pair.shape[2]
    folded = classes - classes % FOLD if classes > FOLD else 0
    squares: Tensor = torch.linalg.vector_norm(pair[:, :, folded:], 2, 2, keepdim=True).square_()
    if folded:
        blocks = pair[:, :, :folded].view(*pair.shape[:2], -1, FOLD)
        squares += torch.linalg.vector_norm(blocks, 2, 3).square_().sum(2, keepdim=True)
    return squares
