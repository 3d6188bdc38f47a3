"""The loop over rows in C: right in every layout, within its tensors, and the same bits for any number of threads."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch

from weighted_soft_labels import reference
from weighted_soft_labels._options import Options
from weighted_soft_labels.backends import eager

if find_spec("weighted_soft_labels.backends.cpu_kernel") is None:
    pytest.skip("the extension module is not built, and _eager does all", allow_module_level=True)

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


def problem(seed, shape, dtype=torch.float32):
    """Logits of any size, sure and unsure, with ties, infinities, NaN and ignored elements here and there."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    logits = []
    for _ in range(2):
        x = torch.randn(shape, generator=generator) * 10 ** choose.uniform(-3, 2)
        if choose.random() < 0.5:
            x[:, choose.randrange(shape[1])] += 10 ** choose.uniform(-3, 3)
        x = x.round() if choose.random() < 0.2 else x
        if choose.random() < 0.2 and x.numel():
            x.view(-1)[torch.randint(x.numel(), (3,), generator=generator)] = choose.choice(
                [-INF, INF, NAN]
            )
        logits.append(x.to(dtype))
    if choose.random() < 0.2:
        logits[1] = logits[0].clone()
    ignore_index = choose.choice([-100, 0, 255])
    target = torch.randint(shape[1], (shape[0], shape[2]), generator=generator)
    target[:, choose.randrange(4) :: 4] = ignore_index
    if choose.random() < 0.25:
        target = torch.randn(shape, generator=generator).softmax(1)
    options = Options(
        temperature=choose.choice([1.0, 2.0, 0.05, 4.0, 50.0]),
        alpha=choose.choice([0.0, 2.5, 1e3]),
        hard_weight=choose.choice([0.1, 1.0, 100.0]),
        label_smoothing=choose.choice([0.0, 0.0, 0.1, 1.0]),
        ignore_index=ignore_index,
        reduction=choose.choice(["mean", "sum", "none"]),
    )
    return *logits, target, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "pixels", "neither"])
def test_any_problem_in_any_layout_is_as_the_reference(layout, dtype):
    for seed in range(60):
        shape = SHAPES[seed % len(SHAPES)]
        student, teacher, target, options = problem(seed, shape, dtype)
        upstream = torch.tensor(0.7)
        if options.reduction == "none":
            upstream = torch.linspace(-2, 2, shape[0] * shape[2]).view(shape[0], shape[2])
        exact = student.double().requires_grad_()
        double = target.double() if target.is_floating_point() else target
        expected = reference.wsl_loss(exact, teacher.double(), double, **options._asdict())
        (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
        each = options._replace(reduction="none")
        rows = reference.wsl_loss(exact, teacher.double(), double, **each._asdict()).detach()

        others = {"rows": "pixels", "pixels": "rows", "neither": "rows"}
        student, _ = laid_out(student, layout)
        teacher, _ = laid_out(teacher, layout if seed % 3 else others[layout])
        gradient, memory = laid_out(
            torch.full(shape, NAN, dtype=dtype), layout if seed % 5 else others[layout]
        )
        loss = cpu.run(student, teacher, target, options, None)
        _native.backward(student, teacher, target, upstream, options, gradient)

        context = (seed, shape, options)
        tolerance = (
            4e-6 * (rows.abs() if options.reduction == "none" else rows.abs().sum()).nan_to_num()
            + 1e-6
        )
        assert loss.dtype == torch.float32
        # float32 calls 0 what float64 does not: a class that the student rules out has no mass then.
        same = (loss.double() - expected).abs() <= tolerance
        assert (
            same | (loss == expected) | (loss.isnan() & expected.isnan()) | expected.isinf()
        ).all(), context
        found, error = gradient.double(), (gradient.double() - expected_gradient).abs()
        scale = upstream.abs() * (
            1.0 if options.reduction != "mean" else 1 / max(1, (rows != 0).sum().item())
        )
        terms = options.hard_weight + 2 * options.alpha * options.temperature
        tolerance = (
            ROUNDING[dtype] * expected_gradient.abs()
            + 2e-6 * (scale * terms).expand(rows.shape)[:, None]
            + 1e-7
        )
        finite = rows.isfinite()[:, None] & expected_gradient.isfinite()
        assert ((error <= tolerance) | ~finite | (found.abs() >= 6e4)).all(), context
        gradient.fill_(GUARD)
        assert (memory == GUARD).all(), context


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
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(step(student, teacher, target, Options()))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_threads_are_lent_by_torch():
    assert bool(cpu.PARALLEL_FOR) == (torch.__version__ >= (2, 10))


def test_one_odd_row_costs_its_neighbours_nothing():
    student, teacher, target, options = (
        torch.randn(1, 30, 40),
        torch.randn(1, 30, 40),
        torch.arange(40)[None] % 30,
        Options(),
    )
    student, teacher = rows_of(student), rows_of(teacher)
    each = options._replace(reduction="none")
    loss, gradient = step(student, teacher, target, each)
    for odd in (NAN, INF, -INF):
        changed = student.clone()
        changed[0, 3, 17] = odd
        odd_loss, odd_gradient = step(changed, teacher, target, each)
        others = torch.arange(40) != 17
        assert torch.equal(odd_loss[:, others], loss[:, others])
        assert torch.equal(odd_gradient[..., others], gradient[..., others])
        expected = eager.run(changed, teacher, target, each, None)
        assert torch.equal(odd_loss[0, 17], expected[0, 17]) or expected[0, 17].isnan()
        assert math.isnan(step(changed, teacher, target, options)[0]) == bool(
            expected.isnan().any()
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_many_classes_lose_no_digits(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (rows_of(torch.randn(1, 300_000, 2, generator=generator)) for _ in range(2))
    target, options = torch.tensor([[1, 299_999]]), Options(temperature=temperature)
    loss, gradient = step(student, teacher, target, options)
    terms = _native.terms(student, teacher, target, options).double()
    exact = torch.empty_like(student, dtype=torch.float64)
    exact_loss = eager.run(student.double(), teacher.double(), target, options, exact)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=3e-7, atol=0)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=5e-11)
    exact_terms = _eager.terms(student.double(), teacher.double(), target, options)
    torch.testing.assert_close(terms, exact_terms, rtol=3e-7, atol=0)


def test_misaligned_and_expanded_inputs():
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(6, 21, generator=generator) for _ in range(2)]
    target = torch.randint(21, (6,), generator=generator)
    expected = step(*(x.t()[None] for x in plain), target[None], Options())

    def misaligned(x):
        memory = bytearray(b"\7" + x.numpy().tobytes() + b"\7")
        return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)

    found = step(*(misaligned(x).t()[None] for x in plain), misaligned(target)[None], Options())
    assert all(torch.equal(*pair) for pair in zip(found, expected))
    for expanded in (
        plain[0][:1].expand(6, 21),
        plain[0][:, :1].expand(6, 21),
        plain[0][:1, :1].expand(6, 21),
    ):
        copied = [x.contiguous().t()[None] for x in (expanded, plain[1])]
        gradient = torch.empty(1, 21, 6)
        loss = cpu.run(
            expanded.t()[None], copied[1], target[:1].expand(1, 6), Options(), gradient
        )
        other = torch.empty(1, 21, 6)
        torch.testing.assert_close(
            loss, cpu.run(*copied, target[:1].expand(1, 6), Options(), other)
        )
        torch.testing.assert_close(gradient, other)


def test_an_index_that_names_no_class_is_an_error_before_anything_is_written():
    student, gradient = rows_of(torch.zeros(1, 5, 3)), torch.full((1, 5, 3), GUARD)
    for wrong in (5, -1, 2**40):
        with pytest.raises(
            IndexError, match=rf"class indices in \[0, 5\) or ignore_index \(-100\), got {wrong}"
        ):
            cpu.run(student, student, torch.tensor([[1, wrong, -100]]), Options(), gradient)
    assert (gradient == GUARD).all()


def test_python_threads_do_not_meet():
    problems = [problem(seed, (1, 100, 300)) for seed in range(8)]
    expected = [step(*each) for each in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, same in zip(pool.map(lambda each: step(*each), problems), expected):
                torch.testing.assert_close(found, same, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    ("before", "threads", "rows"), [(False, 2, 4096), (True, 1, 4096), (True, 2, 16)]
)
def test_forked_children_go_on(before, threads, rows):
    """As after torch.softmax: a child may use threads if its parent had not yet, and one thread in any case."""
    code = f"""
import os, torch
from weighted_soft_labels.backends import cpu
from weighted_soft_labels.loss import Options
torch.set_num_threads(1)
student, teacher = (torch.randn(1, {rows}, 100).transpose(1, 2) for _ in range(2))
target = torch.arange({rows})[None] % 100
gradient = torch.empty_like(student)
def run():
    return cpu.run(student, teacher, target, Options(), gradient), gradient.clone()
expected = run()
torch.set_num_threads({threads})
if {before}:
    torch.randn(4096, 100).softmax(1), run()
child = os.fork()
same = all(map(torch.equal, run(), expected))
if not child:
    os._exit(not same)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
