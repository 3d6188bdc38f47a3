"""Compile the kernels ahead of time for GPUs that need not be here, and report what each takes.

The launchers run on tensors without data; what they would launch is recorded and compiled for sm_80 and sm_90 (NVIDIA)
and gfx942 (AMD): exactly the specialisations that the same shapes get on a GPU. For each it prints registers a thread,
what it spills, bytes of shared memory a program, and how many loads and stores of which width are in the code. It
exits with 1 if a kernel spills, or if it takes the logits in pieces narrower than 16 bytes although the layout lets
them be that wide. Run `python benchmarks/compile_report.py`.
"""

from __future__ import annotations

import argparse
import os
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

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = ("_forward_kernel", "_backward_kernel", "_scale_kernel", "_count_kernel")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Case(NamedTuple):
    """What a user calls the loss with; `layout` is that of both sets of logits."""

    regime: str
    dtype: torch.dtype
    classes: int
    layout: str = "(N, C)"
    temperature: float = 2.0
    label_smoothing: float = 0.0
    probabilities: bool = False

    def logits(self) -> Tensor:
        if self.layout == "(N, C)":
            return torch.empty(4096, self.classes, dtype=self.dtype, device="meta")
        if self.layout == "(N, C), padded":
            return torch.empty(4096, self.classes + 8, dtype=self.dtype, device="meta")[:, :-8]
        height, width = (40, 65) if self.layout == "(N, C, 40, 65)" else (64, 96)
        pixels = torch.empty(8, self.classes, height, width, dtype=self.dtype, device="meta")
        return pixels.to(memory_format=torch.channels_last) if self.layout == "channels_last" else pixels


HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = [
    *(Case("few classes", dtype, 10, temperature=4.0) for dtype in (BF16, FP32)),
    *(Case("few classes", dtype, 100, temperature=t) for dtype in (BF16, FP32) for t in (1.0, 2.0, 4.0)),
    *(Case("one block", dtype, 1000, temperature=t) for dtype in (BF16, FP32) for t in (1.0, 2.0, 4.0)),
    Case("one block", HALF, 1000),
    *(Case("one block", dtype, 8192, temperature=t) for dtype in (BF16, FP32) for t in (2.0, 4.0)),
    Case("one block", BF16, 8192, temperature=4.0, label_smoothing=0.1, probabilities=True),
    *(Case("one block, any start", dtype, 4001) for dtype in (BF16, FP32)),
    *(Case("many classes", dtype, 32000, temperature=t) for dtype in (BF16, FP32) for t in (1.0, 2.0, 4.0)),
    Case("many classes", HALF, 128256, label_smoothing=0.1, probabilities=True),
    *(Case("many classes, any start", dtype, 21841) for dtype in (BF16, FP32)),
    *(Case("pixels", dtype, 19, "(N, C, H, W)", t) for dtype in (BF16, FP32) for t in (1.0, 2.0, 4.0)),
    Case("pixels", HALF, 19, "(N, C, H, W)"),
    *(Case("pixels", dtype, 19, "(N, C, 40, 65)") for dtype in (BF16, FP32)),  # 2600 = 8 * 325 of them
    Case("pixels", BF16, 150, "(N, C, H, W)", label_smoothing=0.1),
    Case("few classes", BF16, 24, "channels_last"),
    Case("one block", FP32, 1000, "(N, C), padded"),
]


class Access(NamedTuple):
    """How often and in which widths code loads and stores."""

    loads: Counter[int]
    stores: Counter[int]

    def __str__(self) -> str:
        return "  ".join(
            " ".join(f"{count}x{width}" for width, count in sorted(widths.items(), reverse=True)) for widths in self
        )


class Specialisation(NamedTuple):
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[tuple[int], Any]
    num_warps: int
    maxnreg: int | None

    def compile(self, target: GPUTarget) -> Any:
        kernel = getattr(_triton, self.kernel)
        source = ASTSource(kernel, self.signature, constexprs=self.constexprs, attrs=self.attributes)
        registers = {"maxnreg": self.maxnreg} if target.backend == "cuda" else {}
        return triton.compile(source, target=target, options={"num_warps": self.num_warps, **registers})

    def output(self) -> str:
        return next((flag.lower() for flag in ("GRADIENT", "STATE", "TERMS") if self.constexprs.get(flag)), "")

    def least_accesses(self, target: GPUTarget, itemsize: int) -> Access:
        """How many 16-byte loads and stores take a block of logits, if each takes as much as it can."""
        one = self.constexprs
        block = one["ROWS"] * one["CLASSES"] * itemsize // (16 * self.num_warps * target.warp_size)
        rereads = one.get("GRADIENT") and not one["ONE_BLOCK"]
        writes = one.get("GRADIENT") or self.kernel == "_backward_kernel"
        return Access(Counter({16: 4 * block if rereads else 2 * block}), Counter({16: block if writes else 0}))


class Recorder:
    """Stands in for a kernel and notes with what it would have been compiled."""

    def __init__(self, kernel: Any, launches: list[Specialisation]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.record

    def record(self, *args: Any, num_warps: int, maxnreg: int | None = None, **constants: Any) -> None:
        values = dict(zip(self.kernel.arg_names, args)) | constants
        signature, constexprs, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            fixed = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or fixed:
                signature[name], constexprs[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        self.launches.append(
            Specialisation(self.kernel.__name__, signature, constexprs, attributes, num_warps, maxnreg)
        )


def launches(case: Case) -> list[Specialisation]:
    """What forward, both ways to a gradient, and the terms would launch."""
    logits = case.logits()
    label = torch.empty(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device="meta")
    target = torch.empty(logits.shape, device="meta") if case.probabilities else label
    options = Options(case.temperature, label_smoothing=case.label_smoothing)
    found: list[Specialisation] = []
    kernels = {name: getattr(_triton, name) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(_triton, name, Recorder(kernel, found))
    try:
        loss, gradient, _ = _triton.forward(logits, logits, target, options, True)
        _, _, state = _triton.forward(logits, logits, target, options, False)
        assert gradient is not None
        _triton.scale_(gradient, loss)
        _triton.backward(logits, logits, target, state, loss, options)
        _triton.terms(logits, logits, target, options)
    finally:
        for name, kernel in kernels.items():
            setattr(_triton, name, kernel)
    return found


def wide(logits: Tensor) -> bool:
    """Whether the logits can be taken 16 bytes at a time.

    Either every line of neighbours in memory starts on such a boundary, or lines are so long that their ends, taken
    one by one, do not count.
    """
    axis = logits.stride().index(1)
    line = logits.shape[axis] if axis == 1 else logits.shape[2:].numel()
    steps = [line, *(step for size, step in zip(logits.shape, logits.stride()) if step > 1)]
    return all(step * logits.element_size() % 16 == 0 for step in steps) or (axis == 1 and line > 1024)


def tool(name: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def resources(compiled: Any) -> tuple[int, int, Access]:
    """Registers a thread, bytes (NVIDIA) or vector registers (AMD) spilled to memory, and accesses to memory."""
    loads, stores = Counter[int](), Counter[int]()
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        words = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
        for kind, width in re.findall(r"^\s+(?:global|buffer)_(load|store)_(\w+)", text, re.MULTILINE):
            size = words.get(width, 2 if "short" in width else 1)
            (loads if kind == "load" else stores)[size] += 1
        used = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        return int(used["vgpr_count"]), int(used["vgpr_spill_count"]), Access(loads, stores)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report, code = tool("cuobjdump", "-res-usage", file.name), tool("nvdisasm", "-c", file.name)
    for kind, modifiers in re.findall(r"\b(LDG|STG)\.(\S+)", code):
        bits = re.search(r"\b[US]?(8|16|64|128)\b", modifiers)
        (loads if kind == "LDG" else stores)[int(bits[1]) // 8 if bits else 4] += 1
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"]), Access(loads, stores)


class Job(NamedTuple):
    case: Case
    launch: Specialisation
    target: str

    def run(self) -> tuple[str, bool]:
        """A line of the report, and whether something is wrong."""
        target, logits = TARGETS[self.target], self.case.logits()
        compiled = self.launch.compile(target)
        registers, spilled, access = resources(compiled)
        wrong = "  SPILLS" if spilled else ""
        if self.launch.kernel in ("_forward_kernel", "_backward_kernel") and wide(logits):
            least = self.launch.least_accesses(target, logits.element_size())
            if access.loads[16] < least.loads[16] or access.stores[16] < least.stores[16]:
                wrong += f"  NARROW: {least} wanted"
        shape = f"{str(self.case.dtype)[6:]} {self.case.classes} {self.case.layout} T={self.case.temperature:g}"
        kernel = f"{self.launch.kernel:16s} {self.launch.output():8s} {self.target:6s} {self.launch.num_warps:5d}"
        numbers = f"{registers:9d} {spilled:7d} {compiled.metadata.shared:6d}"
        return f"{self.case.regime:24s} {shape:34s} {kernel} {numbers}  {access}{wrong}", bool(wrong)


def jobs(regimes: list[str]) -> list[Job]:
    """Every specialisation once, for every target."""
    found = {}
    for case in CASES:
        for launch in launches(case) if case.regime in regimes else ():
            found.setdefault(repr(launch), (case, launch))
    return [Job(case, launch, target) for case, launch in found.values() for target in TARGETS]


def main() -> int:
    regimes = list(dict.fromkeys(case.regime for case in CASES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", choices=regimes, default=regimes, metavar="NAME", help="only these")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print(
        f"{'regime':24s} {'logits':34s} {'kernel':16s} {'outputs':8s} {'target':6s} warps registers spilled shared  "
        "loads  stores (count x bytes)"
    )
    failures = 0
    found = jobs(args.regimes)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for line, wrong in pool.map(Job.run, found, chunksize=4):
            print(line, flush=True)
            failures += wrong
    print(f"{len(found)} kernels, {failures} with a spill or a narrow access")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
