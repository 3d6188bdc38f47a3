"""The C kernel: right in every layout, within its tensors, same bits for any number of threads."""

from __future__ import annotations

import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from budget import exact_step
from processes import run_python

from weighted_soft_labels import wsl_loss
from weighted_soft_labels._options import Options
from weighted_soft_labels.backends import eager

if find_spec("weighted_soft_labels.backends.cpu_kernel") is None:
    pytest.skip("the C kernel is not built", allow_module_level=True)

from weighted_soft_labels.backends import cpu

INF, NAN = math.inf, math.nan
GUARD = 7.0
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [
    (1, 1, 1),
    (1, 1, 9),
    (1, 10, 0),
    (2, 2, 5),
    (1, 10, 64),
    (3, 19, 150),
    (1, 100, 33),
    (2, 257, 17),
    (1, 2500, 3),
]


def laid_out(logits, layout):
    """The same numbers with other strides, between guards, and a view of all that memory."""
    batch, classes, rows = logits.shape
    if layout == "rows":
        memory = torch.full((batch, rows + 1, classes + 3), GUARD, dtype=logits.dtype)
        view = memory[:, :rows, 1 : classes + 1].transpose(1, 2)
    elif layout == "pixels":
        memory = torch.full((batch, classes + 1, rows + 3), GUARD, dtype=logits.dtype)
        view = memory[:, 1:, 2 : rows + 2]
    else:
        memory = torch.full((rows + 1, classes + 1, batch * 2 + 1), GUARD, dtype=logits.dtype)
        view = memory[1:, :classes, 1 : batch * 2 : 2].permute(2, 1, 0)
    view.copy_(logits)
    return view, memory


def random_logits(choose, generator, shape):
    """Logits of any scale, with a confident class, ties, inf or NaN in some of them."""
    x = torch.randn(shape, generator=generator) * 10 ** choose.uniform(-3, 2)
    if choose.random() < 0.5:
        x[:, choose.randrange(shape[1])] += 10 ** choose.uniform(-3, 3)
    x = x.round() if choose.random() < 0.2 else x
    if choose.random() < 0.2 and x.numel():
        where = torch.randint(x.numel(), (3,), generator=generator)
        x.view(-1)[where] = choose.choice([-INF, INF, NAN])
    return x


def problem(seed, shape, dtype=torch.float32):
    """Random logits, a target with ignored elements or of probabilities, and random options."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    student = random_logits(choose, generator, shape).to(dtype)
    teacher = random_logits(choose, generator, shape).to(dtype)
    if choose.random() < 0.2:
        teacher = student.clone()
    ignore_index = choose.choice([-100, 0, 255])
    target = torch.randint(shape[1], (shape[0], shape[2]), generator=generator)
    target[:, choose.randrange(4) :: 4] = ignore_index
    options = Options(
        temperature=choose.choice([1.0, 2.0, 0.05, 4.0, 50.0]),
        alpha=choose.choice([0.0, 2.5, 1e3]),
        hard_weight=choose.choice([0.1, 1.0, 100.0]),
        label_smoothing=choose.choice([0.0, 0.0, 0.1, 1.0]),
        ignore_index=ignore_index,
        reduction=choose.choice(["mean", "sum", "none"]),
    )
    return student, teacher, target, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "pixels", "neither"])
def test_any_problem_in_any_layout_is_as_the_reference(layout, dtype):
    others = {"rows": "pixels", "pixels": "rows", "neither": "rows"}
    for seed in range(60):
        shape = SHAPES[seed % len(SHAPES)]
        student, teacher, target, options = problem(seed, shape, dtype)
        named = options._asdict()
        expected, expected_gradient = exact_step(student, teacher, target, **named)
        rows, _ = exact_step(student, teacher, target, **named | {"reduction": "none"})

        student, _ = laid_out(student, layout)
        teacher, _ = laid_out(teacher, layout if seed % 3 else others[layout])
        empty = torch.full(shape, NAN, dtype=dtype)
        gradient, memory = laid_out(empty, layout if seed % 5 else others[layout])
        loss = cpu.run(student, teacher, target, options, gradient)

        context = (seed, shape, options)
        assert loss.dtype == torch.float32
        assert_loss(loss, expected, rows, context)
        assert_gradient(gradient, expected_gradient, rows, options, context)
        gradient.fill_(GUARD)
        assert (memory == GUARD).all(), context


def assert_loss(loss, expected, rows, context):
    size = rows.abs() if loss.dim() else rows.abs().sum()
    close = (loss.double() - expected).abs() <= 4e-6 * size.nan_to_num() + 1e-6
    same = (loss == expected) | (loss.isnan() & expected.isnan())
    # float32 calls 0 what float64 does not: a class that the student rules out has no mass then.
    assert (close | same | expected.isinf()).all(), context


def assert_gradient(gradient, expected, rows, options, context):
    unit = 1.0
    if options.reduction == "mean":
        unit = 1 / max(1, (rows != 0).sum().item())
    terms = options.hard_weight + 2 * options.alpha * options.temperature
    tolerance = ROUNDING[gradient.dtype] * expected.abs() + 2e-6 * unit * terms + 1e-7
    close = (gradient.double() - expected).abs() <= tolerance
    finite = rows.isfinite()[:, None] & expected.isfinite()
    too_large = (gradient.dtype == torch.float16) & (expected.abs() >= 6e4)
    assert (close | ~finite | too_large).all(), context


def rows_of(logits):
    return laid_out(logits, "rows")[0]


def step(student, teacher, target, options):
    gradient = torch.empty_like(student)
    return cpu.run(student, teacher, target, options, gradient), gradient


@pytest.mark.parametrize("layout", ["rows", "pixels"])
def test_same_bits_for_any_number_of_threads(layout):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        laid_out(torch.randn(2, 50, 3001, generator=generator), layout)[0] for _ in range(2)
    )
    target = torch.randint(50, (2, 3001), generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(step(student, teacher, target, Options()))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_same_balanced_loss_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 60_000, 8, generator=generator)
    target = torch.randint(8, (60_000,), generator=generator)
    threads = torch.get_num_threads()
    losses = set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            losses.add(wsl_loss(student, teacher, target, balance=True).item())
    finally:
        torch.set_num_threads(threads)
    assert len(losses) == 1


def test_threads_are_lent_by_torch():
    assert bool(cpu.PARALLEL_FOR) == (torch.__version__ >= (2, 10))


def test_one_non_finite_row_changes_no_bit_of_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (rows_of(torch.randn(1, 30, 40, generator=generator)) for _ in range(2))
    target, options = torch.arange(40)[None] % 30, Options()
    each = options._replace(reduction="none")
    loss, gradient = step(student, teacher, target, each)
    neighbours = torch.arange(40) != 17
    for value in (NAN, INF, -INF):
        changed = student.clone()
        changed[0, 3, 17] = value
        new_loss, new_gradient = step(changed, teacher, target, each)
        assert torch.equal(new_loss[:, neighbours], loss[:, neighbours])
        assert torch.equal(new_gradient[..., neighbours], gradient[..., neighbours])
        expected = eager.run(changed, teacher, target, each, None)
        assert torch.equal(new_loss[0, 17], expected[0, 17]) or expected[0, 17].isnan()
        mean, _ = step(changed, teacher, target, options)
        assert mean.isnan() == expected.isnan().any()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_many_classes_lose_no_digits(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (rows_of(torch.randn(1, 300_000, 2, generator=generator)) for _ in range(2))
    target, options = torch.tensor([[1, 299_999]]), Options(temperature=temperature)
    loss, gradient = step(student, teacher, target, options)
    exact = torch.empty_like(student, dtype=torch.float64)
    exact_loss = eager.run(student.double(), teacher.double(), target, options, exact)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=3e-7, atol=0)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=5e-11)
    options = options._replace(reduction="terms")
    terms = cpu.run(student, teacher, target, options, None)
    exact_terms = eager.run(student.double(), teacher.double(), target, options, None)
    torch.testing.assert_close(terms.double(), exact_terms, rtol=3e-7, atol=0)


def misaligned(x):
    """The same numbers, at an address that is no multiple of their size."""
    memory = bytearray(b"\7" + x.numpy().tobytes() + b"\7")
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)


def test_misaligned_inputs():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 21, generator=generator).unbind(0)
    target = torch.randint(21, (6,), generator=generator)
    expected = step(student, teacher, target, Options())
    result = step(misaligned(student), misaligned(teacher), misaligned(target), Options())
    assert all(map(torch.equal, result, expected))


def test_expanded_inputs():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 21, generator=generator).unbind(0)
    target = torch.randint(21, (1,), generator=generator).expand(6)
    for narrow in (student[:1], student[:, :1], student[:1, :1]):
        expanded = narrow.expand(6, 21)
        gradient, expected_gradient = torch.empty(2, 6, 21).unbind(0)
        loss = cpu.run(expanded, teacher, target, Options(), gradient)
        expected = cpu.run(expanded.contiguous(), teacher, target, Options(), expected_gradient)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)


def test_an_index_that_names_no_class_is_an_error_before_anything_is_written():
    student, gradient = rows_of(torch.zeros(1, 5, 3)), torch.full((1, 5, 3), GUARD)
    for wrong in (5, -1, 2**40):
        with pytest.raises(
            IndexError, match=rf"class indices in \[0, 5\) or ignore_index \(-100\), got {wrong}"
        ):
            cpu.run(student, student, torch.tensor([[1, wrong, -100]]), Options(), gradient)
    assert (gradient == GUARD).all()


def test_python_threads_share_no_scratch_memory():
    problems = [problem(seed, (1, 100, 300)) for seed in range(8)]
    expected = [step(*each) for each in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            results = list(pool.map(lambda each: step(*each), problems))
            torch.testing.assert_close(results, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    ("before", "threads", "rows"), [(False, 2, 4096), (True, 1, 4096), (True, 2, 16)]
)
def test_forked_children_go_on(before, threads, rows):
    """As with torch.softmax: a child may use threads if its parent did not, else one thread."""
    run_python(f"""
import os, torch
from weighted_soft_labels._options import Options
from weighted_soft_labels.backends import cpu
torch.set_num_threads(1)
student, teacher = torch.randn(2, {rows}, 100).unbind(0)
target = torch.arange({rows}) % 100
gradient = torch.empty_like(student)

def run():
    return cpu.run(student, teacher, target, Options(), gradient), gradient.clone()

expected = run()
torch.set_num_threads({threads})
if {before}:
    torch.randn(4096, 100).softmax(1)
    run()
child = os.fork()
same = all(map(torch.equal, run(), expected))
if not child:
    os._exit(not same)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")
