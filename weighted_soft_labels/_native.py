"""Hands tensors to the loop over rows in `_rows.c`, and to `_eager` what that cannot do: any row that is not finite.

Threads are torch's own (since torch 2.10 it lends them; before, there is one), so two runtimes never compete and
`torch.set_num_threads` holds. Each row is computed by itself and the losses are added up in one thread: results are
the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import weighted_soft_labels._rows as _rows
from weighted_soft_labels import _eager

if TYPE_CHECKING:
    from weighted_soft_labels.loss import Options

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3}  # as in `_rows.c`
_NOTHING = (0, (), 0)
_BLOCK = 2**20  # logits that are gathered for `_eager` at a time


def _torch_parallel_for() -> int:
    """The address of the C function that lends torch's threads, or 0."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


_PARALLEL_FOR = _torch_parallel_for()


def forward(student: Tensor, teacher: Tensor, target: Tensor, options: Options, gradient: Tensor | None) -> Tensor:
    """The reduced loss; fills `gradient` for an incoming gradient of 1."""
    if _takes(student, teacher, target):
        return _walk(student, teacher, target, None, options, gradient)
    return _eager.forward(student, teacher, target, options, gradient)


def backward(
    student: Tensor, teacher: Tensor, target: Tensor, upstream: Tensor, options: Options, gradient: Tensor
) -> None:
    """Fill `gradient` for the incoming gradient `upstream`, which is applied before rounding to the student's dtype."""
    if _takes(student, teacher, target):
        _walk(student, teacher, target, upstream, options, gradient)
    else:
        _eager.backward(student, teacher, target, upstream, options, gradient)


def terms(student: Tensor, teacher: Tensor, target: Tensor, options: Options) -> Tensor:
    """Student CE, teacher CE, weight and soft term of every row, (4, B, R); 0 where it is ignored."""
    if not _takes(student, teacher, target):
        return _eager.terms(student, teacher, target, options)
    found = torch.empty((4, student.shape[0], student.shape[2]), dtype=torch.float32, device="cpu")
    odd, _ = _run(student, teacher, target, None, options, None, found, None)
    if odd:
        for (b, r), s, t, y in _odd_rows(found[0], student, teacher, target):
            found[:, b, r] = _eager.terms(s, t, y, options)[:, 0]
    return found


scale_ = _eager.scale_


def _takes(student: Tensor, teacher: Tensor, target: Tensor) -> bool:
    """Whether `_rows.c` reads these. A lazy negation (`z.conj().imag`) has the wrong sign in memory."""
    return (
        student.dtype in _CODES
        and teacher.dtype in _CODES
        and student.shape[1] < 2**31 - 64
        and not (student.is_neg() or teacher.is_neg() or target.is_neg())
    )


def _walk(
    student: Tensor, teacher: Tensor, target: Tensor, upstream: Tensor | None, options: Options, gradient: Tensor | None
) -> Tensor:
    """The loss; `gradient` is filled for the incoming gradient `upstream` (None: 1)."""
    rows = (student.shape[0], student.shape[2])
    losses = torch.empty(rows, dtype=torch.float32, device="cpu")
    loss = torch.empty((), dtype=torch.float32, device="cpu")
    if upstream is not None:
        upstream = upstream.expand(rows).float()
    odd, count = _run(student, teacher, target, upstream, options, gradient, losses, loss)
    if odd:
        unit = torch.ones_like(losses) if upstream is None else upstream
        if options.reduction == "mean":
            unit = unit / count
        each = options._replace(reduction="none")
        for (b, r), s, t, y in _odd_rows(losses, student, teacher, target):
            if gradient is not None:
                found = torch.empty_like(s, dtype=gradient.dtype)
                _eager.backward(s, t, y, unit[b, r][None], each, found)
                gradient[b, :, r] = found[0].t()
            losses[b, r] = _eager.forward(s, t, y, each, None)[0]
        loss = losses.sum(dtype=torch.float64)
        loss = (loss / count if options.reduction == "mean" else loss).float()
    return losses if options.reduction == "none" else loss


def _run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    upstream: Tensor | None,
    options: Options,
    gradient: Tensor | None,
    out: Tensor,
    loss: Tensor | None,
) -> tuple[int, int]:
    """How many rows are left to `_eager`, marked by NaN in `out`, and how many rows count in the mean."""
    if target.dtype not in _CODES:
        target = target.float() if target.is_floating_point() else target.long()
    found: tuple[int, int] = _rows.run(
        _PARALLEL_FOR,
        *(student.data_ptr(), student.stride(), _CODES[student.dtype]),
        *(teacher.data_ptr(), teacher.stride(), _CODES[teacher.dtype]),
        *(target.data_ptr(), target.stride(), _CODES[target.dtype]),
        *(_NOTHING if upstream is None else (upstream.data_ptr(), upstream.stride(), 0)),
        *(_NOTHING if gradient is None else (gradient.data_ptr(), gradient.stride(), _CODES[gradient.dtype])),
        *student.shape,
        *(options, options.reduction == "mean", out.data_ptr(), 0 if loss is None else loss.data_ptr()),
    )
    return found


def _odd_rows(
    marked: Tensor, student: Tensor, teacher: Tensor, target: Tensor
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]]:
    """Where NaN marks rows, as (b, r), and these rows alone: (1, C, n) or (1, n)."""
    b, r = marked.isnan().nonzero(as_tuple=True)
    size = max(1, _BLOCK // student.shape[1])
    for first in range(0, len(b), size):
        i, j = b[first : first + size], r[first : first + size]
        s, t, y = (x[i, :, j].t()[None] if x.dim() == 3 else x[i, j][None] for x in (student, teacher, target))
        yield (i, j), s, t, y
