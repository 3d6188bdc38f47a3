"""The options of the loss, and every check of its arguments with its message.

This is the ground floor: every other module may import this one, and this one imports no other.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = frozenset((*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64))
INT64_MAX = 2**63 - 1


class Options(NamedTuple):
    """The options of the loss, in the order in which they are documented."""

    temperature: float = 2.0
    alpha: float = 2.5
    hard_weight: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"  # backends also take "terms": the four terms of every element
    balance: bool = False  # backends ignore it, and take `weight_scale`


def balances(options: Options) -> bool:
    """Return whether `balance` changes anything: without a soft term it does not."""
    return options.balance and options.alpha > 0


def check_options(options: Options) -> Options:
    """Return the options as plain numbers. Raises ValueError for one that is out of range."""
    temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance = options
    floats = type(temperature) is type(alpha) is type(hard_weight) is type(label_smoothing) is float
    if not floats or type(ignore_index) is not int:
        temperature = to_float("temperature", temperature)
        alpha = to_float("alpha", alpha)
        hard_weight = to_float("hard_weight", hard_weight)
        label_smoothing = to_float("label_smoothing", label_smoothing)
        ignore_index = to_int("ignore_index", ignore_index)
        numbers = temperature, alpha, hard_weight, label_smoothing, ignore_index
        options = Options(*numbers, reduction, balance)
    in_float32 = (
        1e-37 < temperature < 1e38
        and 0 <= alpha < 1e38
        and 0 <= hard_weight < 1e38
        and alpha * temperature * temperature < 1e38
    )
    others = 0 <= label_smoothing <= 1 and -INT64_MAX <= ignore_index <= INT64_MAX
    legal_balance = type(balance) is bool and not (balance and reduction == "none")
    if in_float32 and others and _is_reduction(reduction) and legal_balance:
        return options
    raise ValueError(_out_of_range(options))


def _is_reduction(value: Any) -> bool:
    return isinstance(value, str) and value in ("mean", "sum", "none")


def _out_of_range(options: Options) -> str:
    temperature, alpha, hard_weight, label_smoothing, ignore_index, reduction, balance = options
    for legal, expected, value in (
        (0 < temperature < math.inf, "temperature must be finite and > 0", temperature),
        (0 <= alpha < math.inf, "alpha must be finite and >= 0", alpha),
        (0 <= hard_weight < math.inf, "hard_weight must be finite and >= 0", hard_weight),
        (0 <= label_smoothing <= 1, "label_smoothing must be in [0, 1]", label_smoothing),
        (abs(ignore_index) <= INT64_MAX, "ignore_index must fit into int64", ignore_index),
        (_is_reduction(reduction), "reduction must be one of mean, sum, none", reduction),
        (type(balance) is bool, "balance must be True or False", balance),
        (not balance or reduction != "none", "balance needs reduction mean or sum", reduction),
    ):
        if not legal:
            return f"{expected}, got {value!r}"
    expected = "temperature, alpha, alpha * temperature^2 and hard_weight must fit into float32"
    return f"{expected}, got {temperature!r}, {alpha!r} and {hard_weight!r}"


def to_float(name: str, value: Any) -> float:
    """Return `value` as a float: of an int, a Fraction, a NumPy scalar or a 0-dim CPU tensor."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    number: float = _convert(name, value, "a number", float)
    return number


def to_int(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number: int = _convert(name, value, "an int", operator.index)
    return number


def _convert(name: str, value: Any, kind: str, convert: Any) -> Any:
    if torch.compiler.is_compiling() and hasattr(value, "dtype"):
        came = type(value).__name__
        raise ValueError(f"{name} must be {kind} of Python in compiled code, got a {came}")
    dtype = str(getattr(value, "dtype", None))
    legal = "bool" not in dtype and not isinstance(value, (bool, str, bytes))
    if isinstance(value, Tensor):
        kind += " (or a 0-dim tensor on the CPU that does not require grad)"
        constant = value.dim() == 0 and not value.requires_grad
        legal = legal and constant and value.device.type == "cpu"
    try:
        if legal:
            return convert(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: complex tensors
        pass
    raise ValueError(f"{name} must be {kind}, got {value!r}")


def check_tensors(student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """Check kinds, dtypes, shapes and devices of what :func:`wsl_loss` takes."""
    for name, tensor in (("student_logits", student), ("teacher_logits", teacher)):
        check_kind(name, tensor)
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
    check_kind("target", target)
    shape = student.shape
    if teacher.shape != shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, "
            f"got {tuple(shape)} and {tuple(teacher.shape)}"
        )
    if not shape:
        raise ValueError("student_logits must be (C,), (N, C) or (N, C, d1, ..., dk), got a scalar")
    if class_count(shape) == 0:
        raise ValueError(f"student_logits must have at least one class, got shape {tuple(shape)}")
    _check_target(target, shape)
    if not student.device == teacher.device == target.device:
        raise ValueError(
            "student_logits, teacher_logits and target must be on the same device, "
            f"got {student.device}, {teacher.device} and {target.device}"
        )


def check_kind(name: str, tensor: Any, advice: str = "pass .to_local()") -> None:
    """Raise TypeError unless `tensor` is one strided tensor of this process."""
    if type(tensor) is not Tensor:
        kind = type(tensor).__name__
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {kind}")
        if hasattr(tensor, "to_local"):  # DTensor
            raise TypeError(f"{name} must be a Tensor of this process, got a {kind}: {advice}")
        if hasattr(tensor, "get_mask"):  # MaskedTensor
            raise TypeError(
                f"{name} must be a plain strided tensor, got a {kind}: "
                "mask classes by -inf logits and elements by ignore_index"
            )
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested tensor" if tensor.is_nested else f"tensor of layout {tensor.layout}"
        advice = "pad the rows and ignore the padding" if tensor.is_nested else "pass .to_dense()"
        raise TypeError(f"{name} must be a plain strided tensor, got a {kind}: {advice}")


def _check_target(target: Tensor, shape: torch.Size) -> None:
    if target.is_floating_point() and target.dtype in DTYPES:
        kind = "class probabilities (floating point) must have the shape of the logits"
        expected = shape
    elif target.dtype not in INTEGERS:
        raise TypeError(
            "target must hold class indices (an integer dtype) or class probabilities "
            f"(float16, bfloat16, float32 or float64), got {target.dtype}"
        )
    else:
        kind = "class indices (an integer dtype) must have the logits' shape without the classes"
        expected = index_shape(shape)
    if target.shape != expected:
        one_hot = target.shape == shape
        advice = "; pass one-hot labels as probabilities, target.float()" if one_hot else ""
        raise ValueError(
            f"target of {kind}, {tuple(expected)} for logits of {tuple(shape)}, "
            f"got {tuple(target.shape)}{advice}"
        )


def index_shape(shape: torch.Size) -> torch.Size:
    """Return the shape of an index target for logits of `shape`: no class dimension."""
    return shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]


def loss_shape(reduction: str, shape: torch.Size) -> tuple[int, ...]:
    if reduction == "terms":
        return (4, *index_shape(shape))
    return index_shape(shape) if reduction == "none" else ()


def class_count(shape: torch.Size) -> int:
    return shape[min(1, len(shape) - 1)]


def in_memory(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that a kernel can read at its ``data_ptr()``.

    A lazily negated tensor has other signs there, a zero tensor has no memory, and a storage that
    was resized (as FSDP does) may end too early.

    Raises:
        ValueError: The storage is smaller than the tensor.
    """
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    end: Any = tensor.nbytes
    if not tensor.is_contiguous():
        last = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
        end = last * tensor.itemsize
    if offset := tensor.storage_offset():
        end += offset * tensor.itemsize
    if tensor.untyped_storage().nbytes() < end and tensor.numel():
        raise ValueError(
            f"{name} must lie in its storage, got a tensor of {end} bytes in a storage of "
            f"{tensor.untyped_storage().nbytes()}: gather or restore the tensor first"
        )
    return tensor if tensor.data_ptr() or not tensor.numel() else tensor.clone()


def signed(target: Tensor) -> Tensor:
    """Convert uint64 labels. Those beyond int64 become its minimum: no class, no ignore_index."""
    if target.dtype != torch.uint64:
        return target
    label = target.long()
    return label.where(label >= 0, -INT64_MAX - 1)
