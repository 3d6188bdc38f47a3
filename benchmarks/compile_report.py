"""Compile the kernels ahead of time for GPUs that need not be here, and report what each takes.

What the launchers would launch for tensors without data is compiled for NVIDIA and AMD: exactly the specialisations
that the same shapes get on a GPU. Printed are registers a thread, what it spills, shared memory a program, and loads
and stores by width. Exits with 1 if a kernel spills, or takes logits in pieces below 16 bytes that can be that wide.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weighted_soft_labels import _triton
from weighted_soft_labels.loss import Options

TARGETS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
POINTERS = {FP32: "*fp32", HALF: "*fp16", BF16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}


class Case(NamedTuple):
    """What a user calls the loss with."""

    classes: int
    student: torch.dtype = FP32
    teacher: torch.dtype | None = None  # the student's
    layout: str = "rows"  # of both: classes are neighbours in memory; "pixels": (N, C, H, W); "odd": of an odd size
    temperature: float = 2.0
    probabilities: bool = False  # and label smoothing
    targets: tuple[str, ...] = ("sm_90",)
    all_kernels: bool = False

    def is_wide(self) -> bool:
        """Whether rows of logits, both of one dtype, are whole pieces of 16 bytes."""
        return (
            self.layout == "rows"
            and self.teacher is None
            and self.classes * self.student.itemsize % 16 == 0
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, C, R) and a target."""
        pixels = {"rows": 4096, "pixels": 64 * 96, "odd": 35 * 61}[self.layout]
        student = torch.empty(
            1 if self.layout == "rows" else 8,
            self.classes,
            pixels,
            dtype=self.student,
            device="meta",
        )
        student = student.mT.contiguous().mT if self.layout == "rows" else student
        label = torch.empty(student.shape[::2], dtype=torch.int64, device="meta")
        target = torch.empty_like(student, dtype=FP32) if self.probabilities else label
        return student, torch.empty_like(student, dtype=self.teacher or self.student), target


CASES = [
    # Every number of classes in a thread up to 32, with and without vectors of 16 bytes. channels_last is "rows".
    *(Case(classes) for classes in (2, 3, 5, 10, 13, 19, 21, 24, 27, 31, 32, 33, 40)),
    *(Case(classes, BF16) for classes in (3, 19, 21, 32, 40)),
    *(Case(classes, dtype, layout="pixels") for classes in (2, 19, 150) for dtype in (FP32, BF16)),
    *(Case(classes, layout="odd") for classes in (21, 32, 1025)),
    # The largest tiles, and temperatures that take more exponentials.
    *(Case(1000, dtype, targets=tuple(TARGETS)) for dtype in (FP32, BF16)),
    *(Case(classes, dtype, temperature=3.0) for classes in (1000, 1029) for dtype in (FP32, BF16)),
    Case(8192, BF16, targets=("sm_80", "sm_90")),
    Case(8191),
    Case(100, targets=tuple(TARGETS), all_kernels=True),
    Case(128, HALF, all_kernels=True),
    Case(8193, targets=tuple(TARGETS)),
    Case(32000, BF16, targets=("sm_80", "sm_90"), temperature=4.0),
    # Probabilities, and dtypes that differ.
    *(Case(classes, BF16, probabilities=True) for classes in (19, 1000, 32000)),
    *(Case(1000, student, teacher) for student, teacher in ((FP32, BF16), (HALF, FP32))),
]


class Launch(NamedTuple):
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[tuple[int], Any]
    num_warps: int

    def compile(self, target: GPUTarget, **options: int) -> Any:
        source = ASTSource(
            getattr(_triton, self.kernel), self.signature, self.constexprs, self.attributes
        )
        return triton.compile(
            source, target=target, options={"num_warps": self.num_warps, **options}
        )


class Recorder:
    """Stands in for a kernel and notes what would be launched."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.record

    def record(self, *args: Any, num_warps: int, **constants: Any) -> None:
        values = dict(zip(self.kernel.arg_names, args)) | constants
        signature, constexprs, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or (
                isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            ):
                signature[name], constexprs[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], attributes[(index,)] = (
                    POINTERS[value.dtype],
                    [["tt.divisibility", 16]],
                )
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        self.launches.append(
            Launch(self.kernel.__name__, signature, constexprs, attributes, num_warps)
        )


def launches(case: Case) -> list[Launch]:
    """The forward kernel with a gradient; with `all_kernels` the others, too."""
    student, teacher, target = case.tensors()
    gradient = torch.empty_like(student)
    options = Options(case.temperature, label_smoothing=0.1 if case.probabilities else 0.0)
    found: list[Launch] = []
    kernels = {name: getattr(_triton, name) for name in dir(_triton) if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        setattr(_triton, name, Recorder(kernel, found))
    try:
        loss = _triton.forward(student, teacher, target, options, gradient)
        if case.all_kernels:
            _triton.scale_(gradient, loss)
            _triton.backward(student, teacher, target, loss, options, gradient)
            _triton.terms(student, teacher, target, options)
            return found
        return [launch for launch in found if launch.kernel == "_forward_kernel"]
    finally:
        for name, kernel in kernels.items():
            setattr(_triton, name, kernel)


def resources(compiled: Any) -> tuple[int, int, Counter[int], Counter[int]]:
    """Registers a thread, bytes (NVIDIA) or vector registers (AMD) spilled, loads and stores by width."""
    loads, stores = Counter[int](), Counter[int]()
    if text := compiled.asm.get("amdgcn"):
        words = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
        for kind, width in re.findall(
            r"^\s+(?:global|buffer)_(load|store)_(\w+)", text, re.MULTILINE
        ):
            (loads if kind == "load" else stores)[
                words.get(width, 2 if "short" in width else 1)
            ] += 1
        used = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        return int(used["vgpr_count"]), int(used["vgpr_spill_count"]), loads, stores
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        commands = (
            [tools / "cuobjdump", "-res-usage", file.name],
            [tools / "nvdisasm", "-c", file.name],
        )
        report, code = (
            subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands
        )
    for kind, modifiers in re.findall(r"\b(LDG|STG)\.(\S+)", code):
        bits = re.search(r"\b[US]?(8|16|64|128)\b", modifiers)
        (loads if kind == "LDG" else stores)[int(bits[1]) // 8 if bits else 4] += 1
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"]), loads, stores


def run(job: tuple[Case, Launch, str]) -> tuple[str, bool]:
    """A line of the report, and whether something is wrong."""
    case, launch, target = job
    compiled = launch.compile(TARGETS[target])
    registers, spilled, *accesses = resources(compiled)
    wrong = "  SPILLS" * bool(spilled)
    wrong += "  NARROW" * (
        case.is_wide() and launch.kernel == "_forward_kernel" and not accesses[0][16]
    )
    dtypes = "/".join(str(dtype)[6:] for dtype in (case.student, case.teacher) if dtype)
    shape = f"{case.classes} {dtypes} {case.layout} T={case.temperature:g}{' probabilities' * case.probabilities}"
    numbers = f"{launch.num_warps:5d} {registers:9d} {spilled:7d} {compiled.metadata.shared:6d}"
    widths = "  ".join(
        " ".join(f"{n}x{width}" for width, n in sorted(one.items(), reverse=True))
        for one in accesses
    )
    return f"{shape:42s} {launch.kernel:16s} {target:6s} {numbers}  {widths}{wrong}", bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--classes", nargs="+", type=int, metavar="C", help="only cases of so many classes"
    )
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=tuple(TARGETS), help="only these"
    )
    args = parser.parse_args()
    names = "kernel           target warps registers spilled shared  loads  stores (count x bytes)"
    print(f"torch {torch.__version__}, triton {triton.__version__}\n{'logits':42s} {names}")
    cases = [case for case in CASES if not args.classes or case.classes in args.classes]
    pairs = [(case, target) for case in cases for target in case.targets if target in args.targets]
    jobs = [(case, launch, target) for case, target in pairs for launch in launches(case)]
    failures = 0
    with ProcessPoolExecutor() as pool:
        for line, wrong in pool.map(run, jobs):
            failures += wrong
            print(line, flush=True)
    print(f"{len(jobs)} kernels, {failures} with a spill or a narrow access")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
