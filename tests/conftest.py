"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# Triton reads this variable when a kernel is defined. Without a GPU, its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from weighted_soft_labels.backends import use_backend

BUILT = find_spec("weighted_soft_labels.backends.cpu_kernel") is not None
NEEDS = {
    "eager": True,
    "cpu": BUILT,
    "triton": find_spec("triton") is not None,
}


@pytest.fixture(params=NEEDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every backend that is installed.

    The C kernel takes neither float64 nor class probabilities. "auto" gives these to the eager
    backend, and everything else on a CPU to the kernel.
    """
    name: str = request.param
    if not NEEDS[name]:
        pytest.skip(f"the {name} backend is not installed")
    with use_backend("auto" if name == "cpu" else name):
        yield name


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A few small images gain little from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
