"""Compile the kernels for GPUs that need not be here, and report what each takes.

The kernels are specialised as the backend would launch them for tensors without data. The report
has registers per thread, spills, shared memory per program, and loads and stores by width. Exits
with 1 if a kernel spills, exceeds its budget of registers, or loads logits in pieces below 16 bytes
that can be that wide.
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
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weighted_soft_labels._options import Options
from weighted_soft_labels.backends import triton as kernels

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (75, 80, 86, 89, 90, 100, 120)}
TARGETS |= {name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942")}
TARGETS |= {name: GPUTarget("hip", name, 32) for name in ("gfx1100", "gfx1201")}
MAIN_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
POINTERS = {FP32: "*fp32", HALF: "*fp16", BF16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}


class Case(NamedTuple):
    """What a user calls the loss with."""

    classes: int
    student: torch.dtype = FP32
    teacher: torch.dtype | None = None  # the student's
    layout: str = "rows"  # (N, C); "pixels": (N, C, H, W); "uneven": H * W is no multiple of 2
    temperature: float = 2.0
    probabilities: bool = False  # and label smoothing
    targets: tuple[str, ...] = ("sm_90",)
    all_kernels: bool = False

    def is_wide(self) -> bool:
        """Whether rows of logits, both of one dtype, are whole pieces of 16 bytes."""
        whole = self.classes * self.student.itemsize % 16 == 0
        return whole and self.layout == "rows" and self.teacher is None

    def register_budget(self, target: GPUTarget) -> int:
        """Registers per thread that let 16 warps share a multiprocessor of 65536 registers.

        Other temperatures than 1 and 2 take one more exponential, and Blackwell's compiler takes
        more registers for the same code: 12 warps. AMD has twice the registers per thread.
        """
        if target.backend == "hip":
            return 256
        return 128 if self.temperature in (1, 2) and target.arch < 100 else 168

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher and target without data."""
        shapes = {"rows": (4096, self.classes), "pixels": (8, self.classes, 64 * 96)}
        shape = shapes.get(self.layout, (8, self.classes, 35 * 61))
        student = torch.empty(shape, dtype=self.student, device="meta")
        teacher = torch.empty_like(student, dtype=self.teacher or self.student)
        if self.probabilities:
            return student, teacher, torch.empty_like(student, dtype=FP32)
        label_shape = shape[:1] + shape[2:]
        return student, teacher, torch.empty(label_shape, dtype=torch.int64, device="meta")

    def describe(self) -> str:
        dtypes = "/".join(str(dtype)[6:] for dtype in (self.student, self.teacher) if dtype)
        probabilities = " probabilities" if self.probabilities else ""
        return f"{self.classes} {dtypes} {self.layout} T={self.temperature:g}{probabilities}"


CASES = [
    # Every number of classes in a thread up to 32, with and without vectors of 16 bytes.
    # channels_last is "rows".
    *(Case(classes) for classes in (2, 3, 5, 10, 13, 19, 21, 24, 27, 31, 32, 33, 40)),
    *(Case(classes, BF16) for classes in (3, 19, 21, 32, 40)),
    *(Case(classes, dtype, layout="pixels") for classes in (2, 19, 150) for dtype in (FP32, BF16)),
    *(Case(classes, layout="uneven") for classes in (21, 32, 1025)),
    # The largest tiles, and temperatures that take more exponentials.
    Case(1000, targets=MAIN_TARGETS),
    Case(1000, BF16, targets=tuple(TARGETS)),
    *(Case(classes, dtype, temperature=3.0) for classes in (1000, 1029) for dtype in (FP32, BF16)),
    Case(8192, BF16, targets=("sm_80", "sm_90")),
    Case(8191),
    Case(100, targets=MAIN_TARGETS, all_kernels=True),
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
    options: dict[str, Any]

    def compile(self, target: GPUTarget) -> Any:
        kernel = getattr(kernels, self.kernel)
        source = ASTSource(kernel, self.signature, self.constexprs, self.attributes)
        return triton.compile(source, target=target, options=self.options)


class Recorder:
    """Stands in for a kernel and records what would be launched."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.record

    def record(self, *args: Any, **constants: Any) -> None:
        values = dict(zip(self.arg_names, args)) | constants
        options = {name: values.pop(name) for name in constants if name not in self.arg_names}
        launch = Launch(self.kernel.__name__, {}, {}, {}, options)
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            specialized = isinstance(value, int) and not parameter.do_not_specialize
            aligned = False
            if parameter.is_constexpr or (specialized and value == 1):
                launch.signature[name], launch.constexprs[name] = "constexpr", value
            elif isinstance(value, Tensor):
                launch.signature[name], aligned = POINTERS[value.dtype], True
            elif isinstance(value, float):
                launch.signature[name] = "fp32"
            else:
                launch.signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = specialized and value % 16 == 0
            if aligned:
                launch.attributes[(index,)] = [["tt.divisibility", 16]]
        self.launches.append(launch)


def launches(case: Case) -> list[Launch]:
    """The forward kernel with a gradient; with `all_kernels` the others, too."""
    student, teacher, target = case.tensors()
    gradient = torch.empty_like(student)
    options = Options(case.temperature, label_smoothing=0.1 if case.probabilities else 0.0)
    recorded: list[Launch] = []
    originals = {name: getattr(kernels, name) for name in dir(kernels) if name.endswith("_kernel")}
    for name, kernel in originals.items():
        setattr(kernels, name, Recorder(kernel, recorded))
    try:
        loss = kernels.run(student, teacher, target, options, gradient)
        if case.all_kernels:
            kernels.multiply_(gradient, loss)
            terms = options._replace(reduction="terms")
            kernels.run(student, teacher, target, terms, None)
            kernels.run(student, teacher, target, options, gradient, loss)  # balanced
            return recorded
        return [launch for launch in recorded if launch.kernel == "_forward_kernel"]
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)


class Resources(NamedTuple):
    registers: int  # per thread
    spilled: int  # bytes (NVIDIA) or vector registers (AMD)
    loads: Counter[int]  # by width in bytes
    stores: Counter[int]


def resources(compiled: Any) -> Resources:
    if text := compiled.asm.get("amdgcn"):
        return amd_resources(text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        report = output(tools / "cuobjdump", "-res-usage", file.name)
        code = output(tools / "nvdisasm", "-c", file.name)
    loads, stores = Counter[int](), Counter[int]()
    for kind, modifiers in re.findall(r"\b(LDG|STG)\.(\S+)", code):
        bits = re.search(r"\b[US]?(8|16|64|128)\b", modifiers)
        (loads if kind == "LDG" else stores)[int(bits[1]) // 8 if bits else 4] += 1
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return Resources(int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"]), loads, stores)


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def amd_resources(text: str) -> Resources:
    loads, stores = Counter[int](), Counter[int]()
    pattern = r"^\s+(?:global|buffer)_(load|store)_(\w+)"
    for kind, name in re.findall(pattern, text, re.MULTILINE):
        (loads if kind == "load" else stores)[amd_width(name)] += 1
    used = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
    return Resources(int(used["vgpr_count"]), int(used["vgpr_spill_count"]), loads, stores)


def amd_width(name: str) -> int:
    """Bytes of an access by what follows its load_ or store_: CDNA says dwordx4, RDNA b128."""
    if "dword" in name:
        return 4 * int(name.removeprefix("dword").removeprefix("x") or 1)
    if "byte" in name or (name.endswith("8") and not name.endswith("128")):
        return 1
    return int(name[1:]) // 8 if name[0] == "b" else 2  # short, short_d16_hi, u16, d16_b16


def cannot_compile(target: GPUTarget) -> str:
    """Return why the installed Triton cannot compile for a target, or an empty string."""
    find_linker = getattr(HIPBackend, "path_to_rocm_lld", None)
    if target.backend == "hip" and find_linker is not None:
        try:
            find_linker()
        except Exception as error:
            return str(error)
    return ""


def run(job: tuple[Case, Launch, str]) -> tuple[str, bool]:
    """A line of the report, and whether something is wrong."""
    case, launch, name = job
    target = TARGETS[name]
    compiled = launch.compile(target)
    used = resources(compiled)
    wide = case.is_wide() and launch.kernel == "_forward_kernel"
    faults = {
        "SPILLS": used.spilled > 0,
        "REGISTERS": used.registers > case.register_budget(target),
        "NARROW": wide and not used.loads[16],
    }
    wrong = [fault for fault, present in faults.items() if present]
    warps = launch.options["num_warps"]
    numbers = f"{warps:5d} {used.registers:9d} {used.spilled:7d} {compiled.metadata.shared:6d}"
    widths = f"{show(used.loads)}  {show(used.stores)}"
    line = f"{case.describe():42s} {launch.kernel:16s} {name:7s} {numbers}  {widths}"
    return "  ".join([line, *wrong]), bool(wrong)


def show(accesses: Counter[int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(accesses.items(), reverse=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    help = "only cases of so many classes"
    parser.add_argument("--classes", nargs="+", type=int, metavar="C", help=help)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=tuple(TARGETS))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    names = "kernel           target  warps registers spilled shared  loads  stores (count x bytes)"
    print(f"{'logits':42s} {names}")
    targets = []
    for name in args.targets:
        reason = cannot_compile(TARGETS[name])
        if reason:
            print(f"{name} is skipped: {reason}")
        else:
            targets.append(name)
    cases = [case for case in CASES if not args.classes or case.classes in args.classes]
    pairs = [(case, target) for case in cases for target in case.targets if target in targets]
    jobs = [(case, launch, target) for case, target in pairs for launch in launches(case)]
    failures = 0
    with ProcessPoolExecutor() as pool:
        for line, wrong in pool.map(run, jobs):
            failures += wrong
            print(line, flush=True)
    print(f"{len(jobs)} kernels, {failures} with a spill, a narrow access or too many registers")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
