"""The loss of logits whose classes are sharded over processes: one all-reduce of row statistics, none in backward.

The algebra is that of `_eager`. A shard's sums have z relative to its own maximum; `_merge` moves them to the largest,
and the leaders that lose join the rest. So what is left of Z - 1 keeps all its digits whoever holds the leader, and the
weight is as exact as in one process. A class is a shard of one: the same function makes a process's own statistics.

An all-reduce only adds, so every process fills its own slot of an array of zeros, and all merge the slots alike.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from weighted_soft_labels import _eager, loss
from weighted_soft_labels.loss import Options

__all__ = ["vocab_parallel_wsl_loss"]


def vocab_parallel_wsl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup,
    temperature: float = 2.0,
    alpha: float = 2.5,
    hard_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """:func:`weighted_soft_labels.wsl_loss` of logits whose classes are sharded over the processes of a group.

    Each calls it with the same rows and options, and holds the classes after those of the rank before, of any number.

    Args:
        student_logits: ``(..., C_local)``, the class dimension last; float16, bfloat16, float32 or float64.
        teacher_logits: Same shape, the same classes; the dtype may differ.
        target: Global class indices in [0, sum of all C_local), ``(...)``, any integer dtype.
        temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction: See :func:`wsl_loss`.

    Returns:
        That loss, the same on every process. The gradient of each is that of its own shard, neither summed over the
        group nor multiplied by its size.

    Raises:
        ValueError: Also where the shards of student and teacher, or the rows of the processes, do not fit together: on
            CPUs on every process, on GPUs, where looking would mean waiting, on the process whose shards do not.
        TypeError, IndexError, RuntimeError, NotImplementedError: As :func:`wsl_loss`.
    """
    options = loss.check_options(
        Options(temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction)
    )
    check(student_logits, teacher_logits, target)
    student, teacher = (
        x.reshape(-1, x.shape[-1]) for x in (student_logits, teacher_logits.detach())
    )
    arguments = (student, teacher, target.reshape(-1))
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        found: Tensor = torch.ops.weighted_soft_labels.forward(
            *arguments, False, *options, group.group_name
        )[0]
    else:
        found = loss._FunctionalWSL.apply(*arguments, (*options, group.group_name), True, False)[0]
    return found.view(target.shape) if reduction == "none" else found


def check(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """`check_tensors` for logits (..., C). Whether classes fit is for all processes to find out together, in `join`."""
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(f"target must hold class indices (an integer dtype), got {target.dtype}")
    if (
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and 0 < student.dim() == teacher.dim()
    ):
        teacher = (
            teacher[..., :1].expand(*teacher.shape[:-1], student.shape[-1])
            if teacher.shape[-1]
            else teacher
        )
        student, teacher = (x.movedim(-1, 1) if x.dim() > 1 else x for x in (student, teacher))
    loss.check_tensors(student, teacher, target)


# --- a process's shard, and what all know of a row together ---


class Shard(NamedTuple):
    """The place of this process's classes among all. On a GPU the numbers stay there: to read them would be to wait."""

    group: dist.ProcessGroup
    rank: int
    size: int
    first: Tensor  # the global index of its first class
    classes: Tensor  # of all processes


def join(name: str, student: Tensor, teacher: Tensor, rows: int) -> Shard:
    """Exchanges sizes. They are not remembered: that the shard of another process has changed, this one could not know.

    `student` and `teacher` have the classes of this process in dimension 1."""
    group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type,attr-defined,unused-ignore]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sizes = torch.zeros((size, 3), dtype=torch.int64, device=student.device)
    sizes[rank] = torch.tensor((rows, student.shape[1], teacher.shape[1]))
    dist.all_reduce(sizes, group=group)
    if student.is_cpu or student.shape[1] != teacher.shape[1]:
        all_rows, of_student, of_teacher = sizes.t().tolist()
        if of_student != of_teacher or len(set(all_rows)) > 1:
            raise ValueError(
                "all processes must hold the same rows, and each the same classes of student and teacher (pad, slice "
                f"and shard both vocabularies alike), got {all_rows} rows, {of_student} and {of_teacher} classes"
            )
    return Shard(group, rank, size, sizes[:rank, 1].sum(), sizes[:, 1].sum())


class Row(NamedTuple):
    """What is known of one set of logits, one entry a row."""

    peak: Tensor
    rest: Tensor  # sum of exp(z) without one maximum
    soft_rest: Tensor  # the same of exp(z / T)
    label: Tensor  # the label's logit, or 0 where another shard has it


class Statistics(NamedTuple):
    student: Row
    teacher: Row
    dot: Tensor  # sum of the teacher's exp(z / T) times the student's z
    z_sum: Tensor  # of the student's z
    classes: Tensor  # how many


def _merge(shards: Statistics, temperature: float) -> tuple[Statistics, Tensor]:
    """From entries (shards, rows), those of all shards together, and which shards hold the leaders, (2, rows)."""
    rows, shifts, leaders = [], [], []
    for peak, rest, soft_rest, label in (shards.student, shards.teacher):
        leader = peak.argmax(0, keepdim=True)
        top = peak.gather(0, leader)
        top = torch.where(top == math.inf, math.nan, top)
        shift = peak - top.clamp(
            min=torch.finfo(top.dtype).min
        )  # of a shard without a chance -inf, also if all are
        e, soft = shift.exp(), (shift / temperature).exp()
        rest, soft_rest = (
            (sums * scale + scale.scatter(0, leader, 0.0)).sum(0)
            for sums, scale in ((rest, e), (soft_rest, soft))
        )
        rows.append(Row(top[0], rest, soft_rest, label.sum(0)))
        shifts.append(shift)
        leaders.append(leader)
    dot = torch.where(
        soft == 0, 0.0, soft * (shards.dot + shifts[0] * (1 + shards.teacher.soft_rest))
    ).sum(0)
    z_sum, classes = (
        (shards.z_sum + shards.classes * shifts[0]).sum(0),
        shards.classes.expand_as(shift).sum(0),
    )
    return Statistics(rows[0], rows[1], dot, z_sum, classes), torch.cat(leaders)


def _exchange(
    student: Tensor, teacher: Tensor, label: Tensor, temperature: float, shard: Shard
) -> tuple[Any, Tensor]:
    """The statistics of all classes, and which of this shard are the leaders, (2, R): -1 where another has it."""
    slots = student.new_zeros(
        (shard.size, 11, student.shape[2]), dtype=_eager._dtype(student, teacher)
    )
    leaders, index = (
        label.new_empty((2, student.shape[2])),
        torch.arange(student.shape[1], device=label.device),
    )
    zero, one = slots.new_zeros(()), slots.new_ones(())
    for _, r in _eager._blocks(student):
        s, t = (logits[0, :, r].to(slots.dtype) for logits in (student, teacher))
        own, other = (
            Row(x, zero, zero, torch.where(index[:, None] == label[r], x, 0.0)) for x in (s, t)
        )
        known, leaders[:, r] = _merge(Statistics(own, other, zero, zero, one), temperature)
        slots[shard.rank, :, r] = torch.stack((*known.student, *known.teacher, *known[2:]))
    dist.all_reduce(slots, group=shard.group)
    x = slots.unbind(1)
    known, owners = _merge(Statistics(Row(*x[:4]), Row(*x[4:8]), *x[8:]), temperature)
    return known, leaders.where(owners == shard.rank, -1)


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    shard: Shard,
) -> Tensor:
    """As that of every implementation, of logits (1, C_local, R)."""
    temperature, smoothing, target = options.temperature, options.label_smoothing, target[0].long()
    count = _eager._count(target, int(shard.classes) if target.is_cpu else 0, options.ignore_index)
    label, kept = target - shard.first, target != options.ignore_index
    known, leaders = _exchange(student, teacher, label, temperature, shard)
    # `_eager` combines what is known of every row: its z is the sum, or the mean, that it would arrive at.
    dot, inside = known.dot[:, None], (target >= 0) & (target < shard.classes)
    odd = torch.where(inside, 0.0, math.nan).to(dot.dtype)
    s, t = (
        _eager.Row(
            dot,
            dot,
            torch.ones_like(dot),
            dot,
            row.rest[:, None],
            row.soft_rest[:, None],
            ce[:, None],
        )
        for row in known[:2]
        for ce in [row.rest.log1p() - (row.label - row.peak) + odd]
    )
    weight, soft = _eager._combine(s, t, temperature)
    losses = _eager._loss(
        s._replace(z=(known.z_sum / known.classes)[:, None]), weight, soft, options
    )
    losses = torch.where(kept, losses[:, 0], 0.0)[None]
    unit = odd + (1 / count.to(losses.dtype) if options.reduction == "mean" else 1)
    at = torch.arange(student.shape[1], device=label.device)[:, None]
    for _, r in _eager._blocks(student) if gradient is not None else ():
        z, teacher_z = (
            x[0, :, r].to(losses.dtype) - row.peak[r] for x, row in zip((student, teacher), known)
        )
        found, leader, teacher_leader = (
            torch.zeros_like(z),
            at == leaders[0, r],
            at == leaders[1, r],
        )
        if options.hard_weight:
            less, sure = _softmax_less_1(z, known.student.rest[r], leader)
            q = (1 - smoothing) * (at == label[r]).to(z.dtype) + smoothing / known.classes[r]
            found = options.hard_weight * (less + (sure - q))
        if options.alpha:
            less, sure = _softmax_less_1(z / temperature, known.student.soft_rest[r], leader)
            other = _softmax_less_1(
                teacher_z / temperature, known.teacher.soft_rest[r], teacher_leader
            )
            found = found + options.alpha * temperature * weight[r, 0] * (
                less - other[0] + (sure - other[1])
            )
        gradient[0, :, r] = torch.where(kept[r], unit[r] * found, 0.0)  # type: ignore[index]
    if options.reduction == "none":
        return losses
    return losses.sum() / count if options.reduction == "mean" else losses.sum()


def _softmax_less_1(z: Tensor, rest: Tensor, leader: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax, less 1 at the leader, if it is here, of rows that are sure of it; and these 1s."""
    sure = leader & (rest < 1)
    return torch.where(sure, -rest, z.exp()) / (1 + rest), sure.to(z.dtype)


def _forward(
    student: Tensor, teacher: Tensor, target: Tensor, ahead: bool, *others: Any
) -> tuple[Tensor, Tensor]:
    gradient, (*options, group) = loss._kept_gradient(student, ahead), others
    operands = loss._operands(student, teacher, target)
    filled = loss._logits(gradient) if ahead else None
    found = forward(*operands, Options(*options), filled, join(group, *operands[:2], len(target)))
    return found.view(target.shape) if found.dim() else found, gradient


_SCHEMA = loss._FORWARD.replace(")", ", str group)", 1)
loss.define("forward.sharded", _SCHEMA, _forward, loss._fake_forward, loss._autograd)
