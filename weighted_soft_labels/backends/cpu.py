"""CPU backend: calls the C kernel. Rows with inf or NaN go to the eager backend.

The kernel runs on torch's own threads, or on one thread before torch 2.10. One thread computes a
row and one adds up the losses, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weighted_soft_labels.backends.cpu_kernel as cpu_kernel
from weighted_soft_labels._options import Options, loss_shape
from weighted_soft_labels.backends import eager

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in cpu_kernel.c
NO_TENSOR = (0, (0, 0, 0), 0)
CHUNK = 2**20  # logits of non-finite rows that are gathered at a time
PARALLEL_FOR = 0  # the address of torch's C function that runs a loop on its threads
LIBRARIES = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}
with suppress(OSError, AttributeError):
    path = Path(torch.__file__).parent / "lib" / LIBRARIES.get(sys.platform, "libtorch_cpu.so")
    function = ctypes.CDLL(str(path)).torch_parallel_for
    PARALLEL_FOR = ctypes.cast(function, ctypes.c_void_p).value or 0


def run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """The loss of these logits; see `weighted_soft_labels.backends`."""
    target = target.long().contiguous()
    shape = loss_shape(options.reduction, student.shape)
    loss = torch.empty(shape, dtype=torch.float32, device="cpu")
    rows = loss if shape else loss.new_empty(target.shape)
    matrix = student.dim() == 2
    non_finite, count = cpu_kernel.run(
        PARALLEL_FOR,
        (1, *student.shape[::-1]) if matrix else student.shape,
        _described(student),
        _described(teacher),
        NO_TENSOR if gradient is None else _described(gradient),
        target.data_ptr(),
        rows.data_ptr(),
        0 if loss is rows else loss.data_ptr(),
        options[:6],  # without balance
        1.0 if weight_scale is None else weight_scale.item(),
    )
    if non_finite:
        _recompute(student, teacher, target, options, gradient, rows, count, weight_scale)
        if loss is not rows:
            loss.copy_(rows.double().sum() / (count if options.reduction == "mean" else 1))
    return loss


def _described(logits: Tensor) -> tuple[int, tuple[int, ...], int]:
    """Return the address of logits, their strides as (N, C, R), and the code of their dtype."""
    strides = logits.stride()
    if len(strides) == 2:
        strides = 0, strides[1], strides[0]
    return logits.data_ptr(), strides, CODES[logits.dtype]


def _recompute(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    rows: Tensor,
    count: int,
    weight_scale: Tensor | None,
) -> None:
    """Compute the rows that the kernel marked by NaN with the eager backend."""
    terms = options.reduction == "terms"
    row_share = 1 / count if options.reduction == "mean" else 1.0
    per_row = options if terms else options._replace(reduction="none")
    student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
    marked = (rows[0] if terms else rows).isnan().nonzero()
    size = max(1, CHUNK // student.shape[-1])
    for start in range(0, len(marked), size):
        index = marked[start : start + size].unbind(1)
        chunk = student[index]
        formed = torch.empty_like(chunk, dtype=torch.float32)
        part = eager.run(chunk, teacher[index], target[index], per_row, formed, weight_scale)
        entries: Any = (..., *index)  # `rows` is (N,) or (N, R); for terms, 4 come first
        rows[entries] = part
        if gradient is not None:
            gradient.movedim(1, -1)[index] = (formed * row_share).to(gradient.dtype)
