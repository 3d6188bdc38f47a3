"""Hands tensors to the loop over rows in `_rows.c`; to `_eager` class probabilities, and any row that is not finite.

Threads are torch's own (since torch 2.10 it lends them; before, there is one), so two runtimes never compete and
`torch.set_num_threads` holds. Each row is computed by itself and the losses are added up in one thread: results are
the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import weighted_soft_labels._rows as _rows
from weighted_soft_labels import _eager

if TYPE_CHECKING:
    from weighted_soft_labels.loss import Options

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in `_rows.c`
_NOTHING = (0, (0, 0, 0), 0)
_BLOCK = 2**20  # logits that are gathered for `_eager` at a time
_PARALLEL_FOR = 0  # the address of the C function that lends torch's threads
_LIBRARY = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(
    sys.platform, "libtorch_cpu.so"
)
with suppress(OSError, AttributeError):
    _lend = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY)).torch_parallel_for
    _PARALLEL_FOR = ctypes.cast(_lend, ctypes.c_void_p).value or 0


def forward(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, gradient: Tensor | None
) -> Tensor:
    """The reduced loss; fills `gradient` for an incoming gradient of 1. Takes (R, C) logits and (R,) labels, too."""
    if _takes(student, teacher, target):
        return _walk(student, teacher, target, options, gradient, None)
    if student.dim() == 2:
        student, teacher, target, gradient = _viewed(student, teacher, target, gradient)
    return _eager.forward(student, teacher, target, options, gradient)


def backward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    upstream: Tensor,
    options: Options,
    gradient: Tensor,
) -> None:
    """Fill `gradient` for the incoming gradient `upstream`, which is applied before rounding to the student's dtype."""
    if _takes(student, teacher, target):
        _walk(student, teacher, target, options, gradient, upstream)
    else:
        _eager.backward(student, teacher, target, upstream, options, gradient)


def terms(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:
    """Student CE, teacher CE, weight and soft term of every row, (4, B, R); 0 where it is ignored."""
    if not _takes(student, teacher, target):
        return _eager.terms(student, teacher, target, options)
    found = torch.empty((4, *target.shape), dtype=torch.float32, device="cpu")
    odd, _ = _run(
        student, teacher, target.long().contiguous(), options._replace(reduction="terms"), found
    )
    for b, r, s, t, y in _odd_rows(found[0], student, teacher, target) if odd else ():
        found[:, b, r] = _eager.terms(s, t, y, options)[:, 0]
    return found


scale_ = _eager.scale_
TAKES_MATRICES = True  # four views would cost as much as the loss of a small batch


def _takes(student: Tensor, teacher: Tensor, target: Tensor) -> bool:
    """Whether `_rows.c` reads these. A lazy negation (`z.conj().imag`) has the wrong sign in memory."""
    read = (
        student.dtype in _CODES
        and teacher.dtype in _CODES
        and not (student.is_neg() or teacher.is_neg())
    )
    return read and not target.is_floating_point() and student.shape[1] < 2**31 - 64


def _walk(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    gradient: Tensor | None,
    upstream: Tensor | None,
) -> Tensor:
    """The loss; `gradient` is filled for the incoming gradient `upstream` (None: 1)."""
    target = target.long().contiguous()
    losses = torch.empty_like(target, dtype=torch.float32)
    loss = losses if options.reduction == "none" else losses.new_empty(())
    if upstream is not None:
        upstream = upstream.expand(target.shape).float().contiguous()
    odd, count = _run(student, teacher, target, options, losses, loss, gradient, upstream)
    if not odd:
        return loss
    each, count = options._replace(reduction="none"), count if options.reduction == "mean" else 1
    if student.dim() == 2:
        student, teacher, target, gradient, losses = _viewed(
            student, teacher, target, gradient, losses
        )
    for b, r, s, t, y in _odd_rows(losses, student, teacher, target):
        found = torch.empty_like(s, dtype=torch.float32)
        losses[b, r] = _eager.forward(s, t, y, each, found)[0]
        if gradient is not None:
            unit = (1.0 if upstream is None else upstream[b, r, None]) / count
            gradient[b, :, r] = (found[0].t() * unit).to(gradient.dtype)
    return losses if options.reduction == "none" else (losses.double().sum() / count).float()


def _viewed(*tensors: Any) -> list[Any]:
    """(R, C) as (1, C, R), (R,) as (1, R)."""
    return [tensor if tensor is None else tensor.t()[None] for tensor in tensors]


def _strides(logits: Tensor) -> tuple[int, ...]:
    return logits.stride() if logits.dim() == 3 else (0, *logits.stride()[::-1])


def _run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: Options,
    out: Tensor,
    loss: Tensor | None = None,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[int, int]:
    """How many rows are left to `_eager`, and how many count in the mean. `out`: (B, R) losses, where NaN marks what is
    left, or (4, B, R) terms; `loss`: reduced."""
    found: tuple[int, int] = _rows.run(
        _PARALLEL_FOR,
        student.shape if student.dim() == 3 else (1, *student.shape[::-1]),
        (student.data_ptr(), _strides(student), _CODES[student.dtype]),
        (teacher.data_ptr(), _strides(teacher), _CODES[teacher.dtype]),
        _NOTHING
        if gradient is None
        else (gradient.data_ptr(), _strides(gradient), _CODES[gradient.dtype]),
        target.data_ptr(),
        out.data_ptr(),
        0 if loss is None else loss.data_ptr(),
        0 if upstream is None else upstream.data_ptr(),
        options,
    )
    return found


def _odd_rows(
    marked: Tensor, student: Tensor, teacher: Tensor, target: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Where NaN marks rows, b and r, and these rows alone: (1, C, n) logits and (1, n) labels."""
    b, r = marked.isnan().nonzero(as_tuple=True)
    size = max(1, _BLOCK // student.shape[1])
    for i, j in ((b[k : k + size], r[k : k + size]) for k in range(0, len(b), size)):
        yield i, j, student[i, :, j].t()[None], teacher[i, :, j].t()[None], target[i, j][None]
