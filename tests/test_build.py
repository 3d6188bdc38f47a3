"""A build with fast math in CFLAGS stays exact, and spares the subnormals of the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "none").split()[0]

# Calls the library itself, because Python would recompute the rows that the library must notice.
CHECK = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

import numpy as np
import torch

from weighted_soft_labels import reference

loader = ExtensionFileLoader("cpu_kernel", sys.argv[1])
kernel = module_from_spec(spec_from_loader("cpu_kernel", loader))
assert np.float32(1e-40) * np.float32(1) != 0
assert (torch.full((64,), 1e-40) * 1 != 0).all()

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OPTIONS = {"temperature": 2.0, "alpha": 2.5, "hard_weight": 1.0, "label_smoothing": 0.0,
           "ignore_index": -100, "reduction": "none"}
IGNORED, MASKED = 3, 4


def run(*tensors, target):
    losses = torch.zeros(target.shape)
    logits = [(x.data_ptr(), x.stride(), CODES[x.dtype]) for x in tensors]
    pointers = target.data_ptr(), losses.data_ptr(), 0
    options = tuple(OPTIONS.values()), 1.0
    counts = kernel.run(0, tuple(tensors[0].shape), *logits, *pointers, *options)
    return counts, losses


def check(layout, dtype, bits, poisoned):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 20, 40)
    logits = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    target = torch.arange(40)[None] % 20
    target[:, IGNORED] = -100
    logits[1][0, (MASKED + 1) % 20, MASKED] = -torch.inf
    exact = [x.double() for x in logits]
    expected = reference.wsl_loss(*exact, target, **OPTIONS).float()

    nan = torch.tensor(bits, dtype=torch.int64)
    nan = nan.to(torch.uint32 if dtype == torch.float32 else torch.uint16).view(dtype)
    assert nan.isnan()
    logits[poisoned][0, :, IGNORED] = nan
    logits[poisoned][0, 7, 9] = nan
    logits[0][0, 8, 11] = -torch.inf
    gradient = torch.full(shape, 7.0, dtype=dtype if dtype != torch.float32 else torch.bfloat16)
    if layout == "rows":
        logits = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in logits]
        gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    counts, losses = run(*logits, gradient, target=target)

    assert counts == (2, 39), counts
    assert losses.isnan().nonzero().tolist() == [[0, 9], [0, 11]], losses
    finite = ~losses.isnan()
    torch.testing.assert_close(losses[finite], expected[finite], rtol=2e-6, atol=0)
    assert (gradient[:, :, IGNORED] == 0).all()
    assert gradient.transpose(1, 2)[finite].isfinite().all()
    if layout == "pixels":  # with rows, the gradient of a non-finite row is not stored
        assert gradient[0, 7, 9].isnan()


NAN_BITS = {
    torch.float32: [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFBFFFFF],
    torch.bfloat16: [0x7FC0, 0x7FFF, 0xFFFF, 0x7F81, 0xFFBF],
    torch.float16: [0x7E00, 0x7FFF, 0xFFFF, 0x7C01, 0xFDFF],
}
for layout in ("rows", "pixels"):
    for dtype, patterns in NAN_BITS.items():
        for bits in patterns:
            for poisoned in (0, 1):
                check(layout, dtype, bits, poisoned)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform == "win32" or bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="MSVC does not read CFLAGS, and free-threaded Python gets no extension",
)
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no C compiler")
@pytest.mark.parametrize("flags", ["-Ofast", "-ffast-math"])
def test_fast_math_does_not_reach_the_kernel(flags, tmp_path):
    build = ["build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path)]
    subprocess.run(
        [sys.executable, "setup.py", "-q", *build],
        cwd=ROOT,
        env=os.environ | {"CFLAGS": flags},
        check=True,
        timeout=300,
    )
    (library,) = tmp_path.glob("lib/weighted_soft_labels/backends/cpu_kernel*.so")
    check = subprocess.run(
        [sys.executable, "-c", CHECK, str(library)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert check.returncode == 0, check.stderr
