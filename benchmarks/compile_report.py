"""Compile the kernels ahead of time for GPUs that need not be here, and report what each takes.

The launchers run on tensors without data; what they would launch is recorded and compiled for sm_80 and sm_90 (NVIDIA)
and gfx942 (AMD): exactly the specialisations that the same shapes get on a GPU. Prints registers and bytes spilled, and
exits with 1 if a kernel spills. Run `python benchmarks/compile_report.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weighted_soft_labels import _triton
from weighted_soft_labels.loss import Options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = ("_forward_kernel", "_backward_kernel", "_scale_kernel")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
# name, shape, dtype, temperature, label smoothing, class probabilities
CASES = [
    ("several rows a program", (128, 100), torch.float32, 2.0, 0.0, False),
    ("one block", (256, 1000), torch.bfloat16, 4.0, 0.1, False),
    ("largest one block", (64, 8192), torch.float32, 2.0, 0.0, False),
    ("loop over classes", (64, 32000), torch.float16, 1.0, 0.1, True),
    ("class dimension strided", (8, 19, 64, 64), torch.bfloat16, 2.0, 0.0, False),
]


class Launch(NamedTuple):
    kernel: Any
    source: ASTSource
    constants: dict[str, Any]
    num_warps: int


class Recorder:
    """Stands in for a kernel and notes with what it would have been compiled."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.record

    def record(self, *args: Any, num_warps: int, **constants: Any) -> None:
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
        source = ASTSource(self.kernel, signature, constexprs=constexprs, attrs=attributes)
        self.launches.append(Launch(self.kernel, source, constants, num_warps))


def launches(
    shape: tuple[int, ...], dtype: torch.dtype, temperature: float, label_smoothing: float, probabilities: bool
) -> list[Launch]:
    """What forward, both ways to a gradient, and the terms would launch for logits of this shape."""
    logits = torch.empty(shape, dtype=dtype, device="meta")
    label = torch.empty(shape[:1] + shape[2:], dtype=torch.int64, device="meta")
    target = torch.empty(shape, device="meta") if probabilities else label
    options = Options(temperature, label_smoothing=label_smoothing)
    found: list[Launch] = []
    kernels = {name: getattr(_triton, name) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(_triton, name, Recorder(kernel, found))
    try:
        loss, gradient, _ = _triton.forward(logits, logits, target, options, True)
        _, _, state = _triton.forward(logits, logits, target, options, False)
        assert gradient is not None
        _triton.scale_(gradient, loss)
        _triton.backward(logits, logits, target, state, loss, options)
        _triton.terms(logits, logits, target, temperature, -100)
    finally:
        for name, kernel in kernels.items():
            setattr(_triton, name, kernel)
    return found


def resources(compiled: Any) -> tuple[int, int]:
    """Registers a thread, and bytes (NVIDIA) or vector registers (AMD) spilled to memory."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        used = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        return int(used["vgpr_count"]), int(used["vgpr_spill_count"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def main() -> int:
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'case':24s} {'kernel':17s} {'outputs':8s} {'target':7s} {'warps':>5s} {'registers':>9s} {'spilled':>7s}")
    failed = False
    for name, *case in CASES:
        for kernel, source, constants, num_warps in launches(*case):
            output = next((flag.lower() for flag in ("GRADIENT", "STATE", "TERMS") if constants.get(flag)), "")
            for target_name, target in TARGETS.items():
                compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
                registers, spilled = resources(compiled)
                failed |= spilled > 0
                print(
                    f"{name:24s} {kernel.__name__:17s} {output:8s} {target_name:7s} "
                    f"{num_warps:5d} {registers:9d} {spilled:7d}{'  SPILLS' if spilled else ''}"
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
