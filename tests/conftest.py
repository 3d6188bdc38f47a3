"""What the tests share."""

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU the kernels run through Triton's interpreter, which has to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """More gain little on a few small images, and lose a lot on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
