"""Which code runs the loss, and how to force it.

A backend is one function, ``run(student, teacher, target, options, gradient, weight_scale)``, that
returns the loss:

- ``student``, ``teacher``: logits, (N, C) or (N, C, R), with any strides; the dtypes may differ.
- ``target``: class indices, (N,) or (N, R), or class probabilities shaped like the logits.
- ``options.reduction``: "mean", "sum", "none", or "terms": student CE, teacher CE, weight and soft
  term of every element, (4, N) or (4, N, R), 0 where ignored.
- ``gradient``: None, or a tensor shaped like ``student`` to fill for an upstream gradient of 1.
- ``weight_scale``: None, or a 0-dim tensor in the dtype of the loss that multiplies all weights.
  The caller computes it if ``options.balance``, which backends do not read.

======= ============================================= ====================================
backend code                                          "auto" takes it for
======= ============================================= ====================================
cpu     a kernel in C, an optional extension module   a CPU: class indices, no float64
triton  kernels in Triton                             a GPU: no float64
eager   ATen operators                                everything else
======= ============================================= ====================================
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from weighted_soft_labels._options import class_count
from weighted_soft_labels.backends import eager

__all__ = ["choose", "use_backend"]

NAMES = ("auto", "eager", "cpu", "triton")
REMEDIES = {
    "cpu": "Reinstall the package from a wheel, or from source with a C compiler.",
    "triton": "Triton needs a C compiler, Python's headers and a writable, executable "
    "TRITON_CACHE_DIR; TRITON_PTXAS_PATH names a newer ptxas.",
}
_forced = "auto"
# By name and device: the backend, or why it cannot run there.
_modules: dict[tuple[str, torch.device], ModuleType | str] = {}


class use_backend:
    """Force a backend in the whole process, at once; a ``with`` block restores the one before.

    Args:
        name: "auto" (the choice of the table above), "eager", "cpu" or "triton". A call whose
            tensors the forced backend cannot run raises RuntimeError and says why.

    Raises:
        ValueError: `name` is none of these.

    Example:
        >>> import torch
        >>> from weighted_soft_labels import wsl_loss
        >>> from weighted_soft_labels.backends import use_backend
        >>> with use_backend("eager"):
        ...     loss = wsl_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))
    """

    def __init__(self, name: str) -> None:
        global _forced
        if name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
        self.name, self.previous, _forced = name, _forced, name

    def __enter__(self) -> None:
        global _forced
        _forced = self.name

    def __exit__(self, *_: Any) -> None:
        global _forced
        _forced = self.previous


def forced() -> str:
    """Return the name that :class:`use_backend` set."""
    return _forced


def choose(student: Tensor, teacher: Tensor, target: Tensor, backend: str = "auto") -> ModuleType:
    """Return the backend module for these tensors; its ``__name__`` says which one it is.

    Args:
        backend: The name that was forced while code was compiled. "auto": the one forced now.

    Raises:
        RuntimeError: :class:`use_backend` forced a backend that cannot run them.
    """
    wished = backend if backend != "auto" else _forced
    name = wished
    if wished == "auto":
        name = "cpu" if student.is_cpu else "triton" if student.is_cuda else "eager"
    if name == "eager":
        return eager
    unsupported = _unsupported(name, student, teacher, target)
    module = unsupported or _module_or_failure(name, student)
    if not isinstance(module, str):
        return module
    if wished != "auto":
        raise RuntimeError(f"backend {name!r} was forced and cannot run these tensors: {module}")
    if not unsupported:
        _warn_once(name, module)
    return eager


def _unsupported(name: str, student: Tensor, teacher: Tensor, target: Tensor) -> str | None:
    """Return what the backend does not take of these tensors."""
    if student.dtype == torch.float64 or teacher.dtype == torch.float64:
        return "float64 logits"
    if name == "cpu":
        if not student.is_cpu:
            return f"tensors on {student.device}"
        if target.is_floating_point():
            return "class probabilities as target"
        if student.numel() >= 2**31 - 64 and class_count(student.shape) >= 2**31 - 64:
            return "2^31 classes and more"
    return None


def _module_or_failure(name: str, student: Tensor) -> ModuleType | str:
    """Return the backend, or why it cannot run on the student's device at all."""
    key = (name, student.device)
    if key in _modules:
        return _modules[key]
    try:
        module = import_module(f"weighted_soft_labels.backends.{name}")
        if student.is_cuda and torch.cuda.is_current_stream_capturing():
            return module  # a probe would break the capture; a later call probes
        if name == "triton":
            module.probe(student)
        _modules[key] = module
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        _modules[key] = f"{type(error).__name__}: {lines[0]}"
        logging.getLogger(__name__).debug("backend %s cannot run", name, exc_info=True)
    return _modules[key]


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"weighted_soft_labels runs on plain operators, several times slower, as its {name} "
        f"backend cannot run here: {reason}. {REMEDIES[name]} "
        f"weighted_soft_labels.backends.use_backend({name!r}) makes this an error, "
        "use_backend('eager') silences it.",
        RuntimeWarning,
        stacklevel=2,
    )
