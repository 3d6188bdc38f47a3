"""Fixtures and settings that several test files share."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads this variable when a kernel is defined. Without a GPU, its interpreter runs the
# kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from weighted_soft_labels.backends import use_backend

# More examples: `pytest --hypothesis-profile=thorough`. A backend stays forced for all examples
# of a test, so a fixture per test is right.
for name, examples in (("default", 10), ("thorough", 60)):
    settings.register_profile(
        name,
        deadline=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
settings.load_profile("default")

BUILT = find_spec("weighted_soft_labels.backends.cpu_kernel") is not None
TRITON = find_spec("triton") is not None
# The interpreter of Triton 3.3 converts arrays of one number to int, which NumPy 2.4 refuses.
BROKEN_INTERPRETER = (
    TRITON
    and not torch.cuda.is_available()
    and version("triton").startswith("3.3.")
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)
BACKENDS = [
    "eager",
    pytest.param("cpu", marks=pytest.mark.skipif(not BUILT, reason="the C kernel is not built")),
    pytest.param(
        "triton",
        marks=[
            pytest.mark.skipif(not TRITON, reason="Triton is not installed"),
            pytest.mark.skipif(BROKEN_INTERPRETER, reason="Triton 3.3 interprets on NumPy < 2.4"),
            # The interpreter computes in NumPy, which warns of every infinity.
            pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
        ],
    ),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every backend that is installed.

    The C kernel takes neither float64 nor class probabilities. "auto" gives these to the eager
    backend, and everything else on a CPU to the kernel.

    On a machine with a GPU, new tensors of the triton parameter are on that GPU.
    """
    name: str = request.param
    on_gpu = name == "triton" and torch.cuda.is_available()
    device = torch.device("cuda") if on_gpu else nullcontext()
    with use_backend("auto" if name == "cpu" else name), device:
        yield name


@pytest.fixture
def float64_backend(backend: str) -> str:
    """The backends that compute in float64."""
    if backend == "triton":
        pytest.skip("the Triton kernels compute in float32")
    return backend


@pytest.fixture
def most_classes(backend: str) -> int:
    """Triton's interpreter would take minutes for more."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    return 10_000 if interpreted else 300_000


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A few small images gain little from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
