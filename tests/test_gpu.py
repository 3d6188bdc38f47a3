"""What only a GPU can show: its exponentials, streams, graphs, launches, memory and kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import test_linear
import torch
import torch.nn.functional as F
from budget import assert_as_reference, step
from test_kernels import LAYOUTS, inside
from test_loss import float64_weight, memorised, problem

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms
from weighted_soft_labels.backends import choose, use_backend

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_loss
import bench_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(*tensors, index=0):
    return [tensor.to(f"cuda:{index}") for tensor in tensors]


def test_the_kernels_run_without_being_asked_for():
    """Else every test below would test the eager backend."""
    for dtype, expected in ((torch.float32, "triton"), (torch.float64, "eager")):
        tensors = on_gpu(*problem((8, 10), dtype=dtype))
        assert choose(*tensors).__name__ == f"weighted_soft_labels.backends.{expected}"


@pytest.mark.parametrize("classes", [10, 1000, 20001])
def test_weight_is_exact_with_the_hardware_s_exponential(classes):
    margins = torch.linspace(0, 28, 200) + torch.tensor(classes).log()
    generator = torch.Generator().manual_seed(classes)
    teacher = memorised(classes, margins, 7.3) + 0.3 * torch.randn(
        len(margins), classes, generator=generator
    )
    student = teacher - torch.linspace(-1, 2, len(margins))[:, None] * F.one_hot(
        torch.tensor(1), classes
    )
    target = torch.ones(len(margins), dtype=torch.long)
    expected = float64_weight(student, teacher, 1)
    for temperature in (1.0, 2.0, 4.0):
        weight = wsl_terms(*on_gpu(student, teacher, target), temperature=temperature).weight.cpu()
        assert (weight - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096, 1000), (512, 21841), (64, 128256), (2, 19, 128, 200)])
def test_large_shapes(shape, dtype):
    for options in ({}, {"temperature": 4.0, "label_smoothing": 0.1}):
        assert_as_reference(*on_gpu(*problem(shape, ignored=True, dtype=dtype)), **options)


@pytest.mark.parametrize("shape", [(64, 100), (300, 1000), (2, 19, 24, 32)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float64_runs_on_the_eager_backend(shape, reduction):
    tensors = on_gpu(*problem(shape, ignored=True, dtype=torch.float64))
    assert_as_reference(*tensors, reduction=reduction)
    student, teacher, q = on_gpu(*problem(shape, probabilities=True, dtype=torch.float64))
    assert_as_reference(student, teacher, q, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_whose_classes_are_no_neighbours(layout, dtype):
    """Class strides of 16 and 0 look like multiples of 16 bytes to the compiler."""
    change = LAYOUTS[layout]
    student, teacher, target = on_gpu(*problem((64, 1000), ignored=True, dtype=dtype))
    assert_as_reference(change(student), teacher, target)
    assert_as_reference(student, change(teacher), target)
    (q,) = on_gpu(problem((64, 1000), probabilities=True)[2].to(dtype))
    assert_as_reference(student, teacher, change(q))


def test_one_step_of_a_sequence_of_maps():
    """(N, C, H, W) of (N, C, H, W, 16): classes and rows are multiples of 16 apart."""
    student, teacher, target = on_gpu(*problem((2, 32, 4, 8), ignored=True))
    change = inside((4, 8, 16), (slice(None), slice(None), 0))
    assert_as_reference(change(student), teacher, target)
    assert_as_reference(student, change(teacher), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_to_the_loss(dtype):
    """bfloat16 has its own path: products are summed in float32, the logits' gradient is half."""
    tensors = test_linear.problem(dtype)
    expected_loss, expected = test_linear.exact(tensors)
    loss, gradients = test_linear.found(dict(zip(tensors, on_gpu(*tensors.values()))), chunk_size=5)
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=1e-5, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, gradient in gradients.items():
        atol = tolerance * expected[name].abs().max().item()
        torch.testing.assert_close(
            gradient.cpu().double(), expected[name], rtol=tolerance, atol=atol
        )


def test_more_elements_than_32_bits_count():
    rows, classes = 2**16 + 8, 2**15
    if torch.cuda.mem_get_info()[0] < 8 * rows * classes * 2:
        pytest.skip("needs 35 GB of free GPU memory")
    student = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(classes, (rows,), device="cuda")
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="sum")
    terms = wsl_loss(student, teacher, target, reduction="none")
    torch.testing.assert_close(loss, terms.sum())
    last = slice(rows - 16, rows)
    _, expected = step(wsl_loss, student[last], teacher[last], target[last], reduction="sum")
    torch.testing.assert_close(gradient[last], expected)
    transposed = step(
        wsl_loss, student.T.contiguous().T, teacher.T.contiguous().T, target, reduction="sum"
    )[1]
    torch.testing.assert_close(transposed[last], expected)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_gpu(backend, probabilities, dtype, reduction):
    tensors = problem((64, 100), ignored=not probabilities, probabilities=probabilities)
    student, teacher, target = on_gpu(*tensors)
    student = student.to(dtype)
    with use_backend(backend):
        expected = step(wsl_loss, student, teacher, target, reduction=reduction)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = step(wsl_loss, student, teacher, target, reduction=reduction)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("shape", [(64, 100), (2000, 1000), (8, 21841), (2, 19, 64, 64)])
def test_graph_is_captured_and_replayed_with_changing_inputs(shape):
    student, teacher, target = on_gpu(*problem(shape, ignored=True))
    step(wsl_loss, student, teacher, target)  # compiles
    student.requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = wsl_loss(student, teacher, target)
        (gradient,) = torch.autograd.grad(loss, student)
    for seed in range(3):
        for tensor, new in zip(
            (student, teacher, target), problem(shape, ignored=True, seed=seed), strict=True
        ):
            with torch.no_grad():
                tensor.copy_(new)
        graph.replay()
        torch.testing.assert_close(
            (loss.detach(), gradient), step(wsl_loss, student, teacher, target)
        )


def test_backward_graph_may_be_replayed_twice():
    """A backward pass that is captured by itself must not multiply the saved gradient in place."""
    student, teacher, target = on_gpu(*problem((64, 100), ignored=True))
    _, expected = step(wsl_loss, student, teacher, target)
    student.requires_grad_()
    graphed = torch.cuda.make_graphed_callables(
        lambda *inputs: wsl_loss(*inputs), (student, teacher, target)
    )
    loss = graphed(student, teacher, target)
    upstream = torch.tensor(3.0, device="cuda")
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
        torch.testing.assert_close(gradient, 3 * expected)


def test_two_streams_at_a_time():
    problems = [on_gpu(*problem((512, 1000), seed=seed)) for seed in range(2)]
    expected = [step(wsl_loss, *tensors) for tensors in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, tensors in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(wsl_loss, *tensors))
        torch.cuda.synchronize()
        torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one():
    for _ in range(2):  # compiled, then replayed
        ours = step(wsl_loss, *on_gpu(*problem((8, 10)), index=1))
        expected = step(wsl_loss, *on_gpu(*problem((8, 10))))
        assert ours[0].device.index == 1
        for there, here in zip(ours, expected, strict=True):
            torch.testing.assert_close(there.cpu(), here.cpu())


def test_small_batches_take_three_launches():
    one = torch.ones((), device="cuda")
    for shape in [(128, 100), (256, 1000)]:
        tensors = on_gpu(*problem(shape))
        student = tensors[0].requires_grad_()

        def once(student=student, others=tensors[1:]):
            torch.autograd.grad(wsl_loss(student, *others), student, one)

        once()
        assert bench_loss.kernels(once) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8192, 1000), (512, 21841), (4, 19, 256, 256)])
def test_peak_memory_is_one_gradient_and_the_losses(shape, dtype):
    tensors = on_gpu(*problem(shape, dtype=dtype))
    step(wsl_loss, *tensors)
    peak = bench_loss.peak_bytes(lambda: step(wsl_loss, *tensors), tensors[0], "cuda")
    gradient = tensors[0].numel() * tensors[0].element_size()
    losses = 4 * tensors[2].numel()
    assert peak <= 1.01 * (gradient + losses)


def test_another_batch_size_compiles_nothing():
    from weighted_soft_labels.backends import triton as kernels

    step(wsl_loss, *on_gpu(*problem((64, 100))))

    def compiled():
        return sum(len(caches[0]) for caches in kernels._forward_kernel.device_caches.values())

    before = compiled()
    for rows in (1, 2, 16, 63, 127, 1000):
        step(wsl_loss, *on_gpu(*problem((rows, 100))))
    assert compiled() == before


def test_replayed_launch_is_the_launch():
    """From the second launch on, Triton's binding of arguments is skipped. Tensors may move."""
    for shape in [(8, 10), (300, 1000), (5, 1029), (3, 20001)]:
        for dtype in (torch.float32, torch.bfloat16):
            for options in (
                {},
                {"reduction": "none"},
                {"temperature": 4.0, "label_smoothing": 0.1},
            ):
                for seed in range(3):
                    assert_as_reference(
                        *on_gpu(*problem(shape, ignored=True, dtype=dtype, seed=seed)), **options
                    )
    student, teacher, target = on_gpu(*problem((9, 16)))
    assert_as_reference(student, teacher, target)
    unaligned = torch.empty(9 * 16 + 1, device="cuda")[1:].view(9, 16)
    assert_as_reference(unaligned.copy_(student), teacher, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_is_eager(dtype):
    compiled = torch.compile(wsl_loss, fullgraph=True)
    for shape in [(64, 100), (300, 1000), (2, 19, 24, 32)]:
        tensors = on_gpu(*problem(shape, ignored=True, dtype=dtype))
        torch.testing.assert_close(step(compiled, *tensors), step(wsl_loss, *tensors))


def test_first_call_of_a_process():
    """Seconds include imports, Triton's alone 0.3 s. With a cold cache, two kernels compile."""
    rows = bench_step.first_call_rows()
    fastest = {
        state: min(row["first_step_s"] for row in rows if row["cache"] == state)
        for state in ("cold", "warm")
    }
    assert fastest["cold"] <= 10.0
    assert fastest["warm"] <= 1.0
