"""The loss of logits whose classes are sharded over processes.

A call exchanges sizes by one all-reduce and statistics of rows by another. The backward pass
exchanges nothing. The algebra is that of `backends.eager`, whose `merge` combines the statistics.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weighted_soft_labels import _operator
from weighted_soft_labels._options import (
    Options,
    check_kind,
    check_options,
    check_tensors,
    in_memory,
    signed,
)
from weighted_soft_labels.backends import eager

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
    balance: bool = False,
) -> Tensor:
    """:func:`weighted_soft_labels.wsl_loss` of logits whose classes are sharded over processes.

    Every process of the group calls this function with the same rows, target, dtypes and options.
    Its classes, any number, follow those of the rank before.

    Args:
        student_logits: ``(..., C_local)``, the class dimension last; float16, bfloat16, float32 or
            float64.
        teacher_logits: Same shape, the same classes; the dtype may differ.
        target: Global class indices in [0, sum of all C_local), ``(...)``, any integer dtype.
        group: The processes, for example ``torch.distributed.group.WORLD``.
        temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance: See
            :func:`wsl_loss`.

    Returns:
        That loss, the same on every process. The gradient of a process is that of its own shard,
        neither summed over the group nor multiplied by its size.

    Raises:
        ValueError: Also for a group without this process, and where the shards of student and
            teacher, or the rows, options or dtypes of the processes, differ.
        TypeError, IndexError, RuntimeError, NotImplementedError: As :func:`wsl_loss`. On CPUs an
            error on one process is one on all: the others raise a RuntimeError that names the
            process. On GPUs a check would have to wait for the GPU: the process alone raises, the
            others wait until the group's time-out, and rows or options that differ make the loss
            NaN. In compiled code the process alone raises, too.
    """
    name = group_name(group)
    options = Options(
        temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance
    )
    options = checked(name, _check, student_logits, teacher_logits, target, options)
    rows = target.numel()
    student, teacher = (x.reshape(rows, x.shape[-1]) for x in (student_logits, teacher_logits))
    loss = _operator.distill(student, teacher, target.reshape(rows), options, name)
    return loss.view(target.shape) if reduction == "none" else loss


def group_name(group: Any) -> str:
    """Return the group's name. Raises ValueError unless this process is a member."""
    if isinstance(group, dist.ProcessGroup):
        name: str = group.group_name
        return name
    kind = "one without this process" if group == -100 else repr(group)
    raise ValueError(
        "group must be a torch.distributed.ProcessGroup of which this process is a member, for "
        f"example torch.distributed.group.WORLD or mesh.get_group(), got {kind}"
    )


def _check(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Options:
    check_sharded(student, teacher, target)
    return check_options(options)


def check_sharded(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """Check logits (..., C_local). Class counts may differ or be 0 until `join` compares them."""
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(f"target must hold class indices (an integer dtype), got {target.dtype}")
    check_kind("student_logits", student)
    check_kind("teacher_logits", teacher)
    classes = student.shape[-1:].numel() or 1
    tensors = [student, teacher]
    for i, x in enumerate(tensors):
        if x.dim():
            like = x.new_empty(()).expand(*x.shape[:-1], classes)
            tensors[i] = like.movedim(-1, 1) if x.dim() > 1 else like
    check_tensors(tensors[0], tensors[1], target)


# --- what processes tell one another ---


def checked(name: str | None, check: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``check(*arguments)``. On CPUs, tell the processes of group `name` of an error."""
    try:
        return check(*arguments)
    except Exception:
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in arguments)
        if name is not None and not on_gpu and not torch.compiler.is_compiling():
            with suppress(RuntimeError):  # the group has no backend for CPUs, or lost a process
                _exchange(name, torch.empty(0, device="cpu"), [True])
        raise


def _exchange(name: str, like: Tensor, facts: Any) -> tuple[dist.ProcessGroup, Tensor]:
    """Return the group, and the facts of all its processes, (processes, 7)."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    group = resolve(name)
    table = torch.zeros((dist.get_world_size(group), 7), dtype=torch.int64, device=like.device)
    for place, fact in zip(table[dist.get_rank(group)], facts):
        place.fill_(fact)  # does not wait for the GPU; a copy of a CPU tensor would
    dist.all_reduce(table, group=group)
    return group, table


def join(
    name: str, target: Tensor, classes: tuple[int, int], ignore_index: int, agreed: object
) -> tuple[eager.Shard, int]:
    """Exchange sizes; return this process's shard and the largest number of classes of a process.

    Args:
        classes: Of student and teacher on this process.
        agreed: What has to be the same everywhere: options, dtypes and so on. Its ``repr`` counts.

    The sizes are not cached: a process cannot tell that another process's shard has changed.
    """
    on_cpu = target.is_cpu
    if not on_cpu and classes[0] != classes[1]:
        raise ValueError(f"student and teacher must have the same classes, got {classes}")
    kept = target[target != ignore_index] if on_cpu else target[:0]
    bounds = (int(kept.min()), int(kept.max())) if len(kept) else (0, 0)
    code = zlib.crc32(repr(agreed).encode())
    facts = False, len(target), *classes, code, *bounds
    group, table = _exchange(name, target, facts)
    _, rows, of_student, of_teacher, codes, _, _ = table.unbind(1)
    rank = dist.get_rank(group)
    largest = 2**13  # a guess, because reading the sizes would wait for the GPU
    if on_cpu:
        _check_table(table.tolist(), rank, agreed)
        eager.count(target, int(of_student.sum()), ignore_index)
        largest = int(of_student.max())
    same = (rows == rows[0]) & (codes == codes[0]) & (of_student == of_teacher)
    all_reduce = partial(dist.all_reduce, group=group)
    shard = eager.Shard(rank, len(table), of_student[:rank].sum(), same.all(), all_reduce)
    return shard, largest


def _check_table(table: list[list[int]], rank: int, agreed: object) -> None:
    """Raise where the facts of the processes do not fit together, on all of them alike."""
    failed, rows, of_student, of_teacher, codes, least, most = zip(*table)
    where = [i for i, error in enumerate(failed) if error]
    if where:
        raise RuntimeError(f"process {where} of the group raised an error, which stands there")
    if of_student != of_teacher or len(set(rows)) > 1 or not any(of_student):
        raise ValueError(
            "all processes must hold the same rows, and each the same classes of student and "
            "teacher, at least one together (pad, slice and shard both vocabularies alike), "
            f"got {[*rows]} rows, {[*of_student]} and {[*of_teacher]} classes"
        )
    where = [i for i, code in enumerate(codes) if code != codes[0]]
    if where:
        raise ValueError(
            "all processes must pass the same options and dtypes; process "
            f"{where} differs from process 0, and this one, {rank}, has {agreed}"
        )
    total = sum(of_student)
    where = [i for i, label in enumerate(least) if label < 0 or most[i] >= total]
    if where and rank not in where:
        raise RuntimeError(f"process {where} of the group has a label outside of [0, {total})")


# --- the operator ---


def _forward(
    student: Tensor, teacher: Tensor, target: Tensor, wanted: bool, group: str, *numbers: Any
) -> tuple[Tensor, ...]:
    options = Options(*numbers)
    tensors = {"student_logits": student, "teacher_logits": teacher, "target": target}
    student, teacher, target = [checked(group, in_memory, *item) for item in tensors.items()]
    classes = student.shape[1], teacher.shape[1]
    agreed = options, student.dtype, teacher.dtype
    shard, _ = join(group, signed(target), classes, options.ignore_index, agreed)
    run = partial(eager.run, shard=shard)
    outputs = _operator.loss_and_gradient(student, teacher, target, wanted, options, run)
    return _operator.tensors_only(*outputs)


_operator.define(
    "forward.sharded",
    "Tensor student, Tensor teacher, Tensor target, bool wanted, str group, "
    f"{_operator.OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _operator.fake_forward,
    _operator.autograd_kernel,
)
