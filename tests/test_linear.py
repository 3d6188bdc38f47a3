"""Hidden states to loss: gradients against those of the reference in float64."""

from __future__ import annotations

import re
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity

from weighted_soft_labels import backends, linear, reference
from weighted_soft_labels.linear import linear_wsl_loss

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, WIDTH, TEACHER_WIDTH, CLASSES = 13, 8, 6, 50
NAMES = ("student_input", "student_weight", "student_bias")


def problem(dtype=torch.float32, bias=True, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "student_input": (rows, WIDTH),
        "student_weight": (CLASSES, WIDTH),
        "teacher_input": (rows, TEACHER_WIDTH),
        "teacher_weight": (CLASSES, TEACHER_WIDTH),
    } | ({"student_bias": (CLASSES,), "teacher_bias": (CLASSES,)} if bias else {})
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    target = torch.randint(CLASSES, (rows,), generator=generator)
    target[3:5] = -100
    return tensors | {"target": target}


def capped(logits, scale, cap):
    return logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)


def exact(tensors, upstream=1.0, **options):
    """Loss and gradients of linear layers and the reference in float64, on the same numbers."""
    scales, caps = (
        [options.pop(f"{model}_{name}", default) for model in ("student", "teacher")]
        for name, default in (("logit_scale", 1.0), ("softcap", None))
    )
    leaf = {
        name: x.detach().double().requires_grad_() for name, x in tensors.items() if name in NAMES
    }
    every = SimpleNamespace(
        **{name: x if name == "target" else x.double() for name, x in tensors.items()} | leaf
    )
    student = F.linear(
        every.student_input, every.student_weight, getattr(every, "student_bias", None)
    )
    teacher = F.linear(
        every.teacher_input, every.teacher_weight, getattr(every, "teacher_bias", None)
    )
    student, teacher = capped(student, scales[0], caps[0]), capped(teacher, scales[1], caps[1])
    value = reference.wsl_loss(student, teacher, every.target, **options)
    (value * upstream).sum().backward()
    return value.detach(), {name: x.grad for name, x in leaf.items()}


def computed(tensors, upstream=1.0, function=linear_wsl_loss, **options):
    leaf = {
        name: x.detach().clone().requires_grad_() for name, x in tensors.items() if name in NAMES
    }
    value = function(**tensors | leaf, **options)
    (value * upstream).sum().backward()
    return value.detach(), {name: x.grad for name, x in leaf.items()}


def assert_close(result, expected, dtype=torch.float32):
    """Within what float32 costs, by the largest entry, and rounding to the result's dtype."""
    budget = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(
        result[0].double(), expected[0], rtol=budget, atol=budget, equal_nan=True
    )
    assert result[1].keys() == expected[1].keys()
    for name, gradient in result[1].items():
        assert gradient.dtype == dtype
        largest = expected[1][name].abs().max().item()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            gradient.double(), expected[1][name], rtol=eps, atol=budget * largest
        )


OPTIONS = [
    {},
    {"temperature": 4.0, "alpha": 0.5},
    {"hard_weight": 0.0},
    {"alpha": 0.0, "label_smoothing": 0.1},
    {"reduction": "sum", "ignore_index": 7},
    {"reduction": "none", "label_smoothing": 1.0},
    {"student_logit_scale": 0.5, "teacher_logit_scale": 3.0, "reduction": "sum"},
    {"student_softcap": 3.0, "student_logit_scale": 2.0},
    {"student_softcap": 2.0, "teacher_softcap": 4.0, "teacher_logit_scale": 0.3, "alpha": 0.5},
    {"student_softcap": 30, "teacher_softcap": 1.5, "reduction": "none"},
    {"balance": True, "student_softcap": 30},
    {"balance": True, "reduction": "sum", "hard_weight": 0.0},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_option_and_dtype(dtype, options, bias, monkeypatch):
    monkeypatch.setattr(linear, "PIECE", 16)  # weights of half precision are converted in pieces
    tensors = problem(dtype, bias)
    if "ignore_index" in options:
        tensors["target"][3:5] = 7
    upstream = torch.rand(ROWS) if options.get("reduction") == "none" else 3.0
    expected = exact(tensors, upstream, **options)
    for chunk_size in (1, 5, 100, None):
        result = computed(tensors, upstream, **options, chunk_size=chunk_size)
        assert_close(result, expected, dtype)
        assert result[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_inputs_of_any_shape():
    tensors = problem()
    expected = exact(tensors, reduction="none")
    many = tensors | {
        name: tensors[name].unsqueeze(1) for name in ("student_input", "teacher_input", "target")
    }
    value, gradients = computed(many, reduction="none")
    assert value.shape == (ROWS, 1)
    assert gradients["student_input"].shape == (ROWS, 1, WIDTH)
    assert_close(
        (value[:, 0], gradients | {"student_input": gradients["student_input"][:, 0]}), expected
    )
    one = {name: tensors[name][0] for name in ("student_input", "teacher_input", "target")}
    assert computed(tensors | one)[1]["student_input"].shape == (WIDTH,)


@pytest.mark.parametrize("frozen", NAMES)
def test_frozen_parameters_get_no_gradient_and_cost_none(frozen, monkeypatch):
    tensors, products = problem(), []
    _, expected = exact(tensors)
    multiply = linear._add_product

    def recorded(out, *arguments, **options):
        products.append(out.shape)
        multiply(out, *arguments, **options)

    monkeypatch.setattr(linear, "_add_product", recorded)
    leaf = {name: tensors[name].clone().requires_grad_(name != frozen) for name in NAMES}
    linear_wsl_loss(**tensors | leaf).backward()
    for name, x in leaf.items():
        if name == frozen:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad.double(), expected[name], rtol=1e-4, atol=1e-6)
    assert (tensors["student_weight"].shape in products) == (frozen != "student_weight")
    with torch.no_grad():
        assert not linear_wsl_loss(**tensors | leaf).requires_grad


def test_teacher_gets_neither_graph_nor_gradient():
    tensors = problem()
    teacher = {
        name: x.requires_grad_() for name, x in tensors.items() if name.startswith("teacher")
    }
    assert not linear_wsl_loss(**tensors).requires_grad
    computed(tensors)
    assert all(x.grad is None for x in teacher.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, ROWS])
def test_nothing_to_learn_from_is_still_connected(reduction, rows):
    tensors = problem(rows=rows)
    tensors["target"][:] = -100
    tensors["student_input"][:] = torch.nan  # as padding may be
    value, gradients = computed(tensors, reduction=reduction)
    assert value.isnan().all() if reduction == "mean" else value.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def test_ignored_rows_may_hold_nan():
    tensors = problem()
    expected = exact(tensors)
    for name in ("student_input", "teacher_input"):
        tensors[name][3:5] = torch.nan
    assert_close(computed(tensors), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_done_again_finds_its_logits_where_gradients_are_written(reduction):
    tensors = problem()
    tensors["teacher_bias"][7] = -torch.inf  # a masked class
    tensors["student_weight"][7, 0] = -1e38  # whose logit is -inf in some rows of the student's
    tensors["student_input"][:, 0] = torch.tensor([1.0, 10.0, 1.0]).repeat(ROWS)[:ROWS]
    tensors["target"][tensors["target"] == 7] = 8
    assert_close(computed(tensors, reduction=reduction), exact(tensors, reduction=reduction))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retained_graph_and_second_derivative(dtype, reduction):
    tensors = problem(dtype)
    leaf = {name: tensors[name].clone().requires_grad_() for name in NAMES}
    value = linear_wsl_loss(**tensors | leaf, reduction=reduction).sum()
    for factor in (1.0, 2.0, 1.0):
        gradients = torch.autograd.grad(factor * value, list(leaf.values()), retain_graph=True)
        _, expected = exact(tensors, factor, reduction=reduction)
        assert_close(
            (value.detach(), dict(zip(leaf, gradients))), (value.double(), expected), dtype
        )
    (gradient,) = torch.autograd.grad(value, leaf["student_weight"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"weighted_soft_labels\.reference"):
        gradient.float().square().sum().backward()


def test_half_precision_survives_a_gradient_scaler():
    tensors = problem(torch.float16, rows=4096)
    tensors["student_input"] *= 1e-3
    tensors["teacher_input"] *= 1e-3
    _, expected = exact(tensors)
    _, gradients = computed(tensors, 65536.0)
    error = (gradients["student_input"].double() / 65536 - expected["student_input"]).abs()
    exact_gradient = expected["student_input"].abs()
    assert (
        error <= 2 * torch.finfo(torch.float16).eps * exact_gradient + 1e-6 * exact_gradient.max()
    ).all()


@pytest.mark.parametrize(
    "function", [linear_wsl_loss, torch.compile(linear_wsl_loss, fullgraph=True)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_and_eager_with_a_teacher_of_inference_mode(function, reduction):
    torch._dynamo.reset()
    tensors = problem()
    upstream = torch.rand(ROWS) if reduction == "none" else 2.0
    expected = exact(tensors, upstream, reduction=reduction)
    with torch.inference_mode():
        tensors |= {name: tensors[name] * 1 for name in ("teacher_input", "target")}
    assert_close(computed(tensors, upstream, function, reduction=reduction), expected)


def test_autocast_is_the_same_eager_and_compiled():
    torch._dynamo.reset()
    tensors = problem()
    rounded = {name: x.bfloat16().float() if x.dim() == 2 else x for name, x in tensors.items()}
    value, expected = exact(rounded)
    for function in (linear_wsl_loss, torch.compile(linear_wsl_loss, fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16):
            result = computed(tensors, function=function)
        assert_close(result, (value, expected))
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert_close(computed(tensors, function=function), exact(tensors))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_meta_and_fake_tensors_have_shapes_and_gradients(reduction):
    tensors = problem()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in tensors.items()}
    for inputs in ({name: x.to("meta") for name, x in tensors.items()}, fake):
        value, gradients = computed(inputs, reduction=reduction, student_softcap=3.0)
        assert value.shape == (() if reduction == "mean" else (ROWS,))
        assert {name: x.shape for name, x in gradients.items()} == {
            name: tensors[name].shape for name in NAMES
        }


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_that_change_before_backward_change_nothing(compiled):
    torch._dynamo.reset()
    function = torch.compile(linear_wsl_loss, fullgraph=True) if compiled else linear_wsl_loss
    tensors = problem()
    for reduction in ("mean", "none"):
        _, expected = exact(tensors, reduction=reduction)
        leaf = {name: tensors[name].clone().requires_grad_() for name in NAMES}
        inputs = {name: x.clone() for name, x in tensors.items()} | leaf
        value = function(**inputs, reduction=reduction).sum()
        with torch.no_grad():
            for x in inputs.values():
                x.zero_()
        value.backward()
        gradients = {name: x.grad for name, x in leaf.items()}
        assert_close((value.detach(), gradients), (value.double(), expected))


def test_peak_memory_is_the_gradients_and_one_chunk():
    x, weight = torch.randn(512, 64), torch.randn(8000, 64)
    target = torch.zeros(512, dtype=torch.long)
    leaf = x.requires_grad_(), weight.requires_grad_()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        linear_wsl_loss(*leaf, x.detach(), weight.detach(), target, chunk_size=32).backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in events))
    gradients, chunk = 4 * (x.numel() + weight.numel()), 4 * 2 * 32 * 8000
    assert gradients + chunk <= peak < gradients + 1.05 * chunk


def test_mixed_dtypes_of_student_and_teacher():
    tensors = problem(torch.bfloat16)
    tensors |= {name: x.double() for name, x in tensors.items() if name.startswith("teacher")}
    value, gradients = computed(tensors)
    assert value.dtype == torch.float64
    assert_close((value, gradients), exact(tensors), torch.bfloat16)


def test_operator_is_what_it_claims_to_be():
    tensors = problem()
    student = [tensors[f"student_{name}"].requires_grad_() for name in linear.Head._fields]
    teacher = [tensors[f"teacher_{name}"] for name in linear.Head._fields]
    options = (2.0, 2.5, 1.0, 0.0, -100)
    for reduction, upstream in (("mean", None), ("none", None), ("none", torch.ones(ROWS))):
        settings = (0.5, 1.0, None, 2.0, 5, None, None)
        constants = teacher, tensors["target"], upstream, [True, True, False]
        arguments = (student, *constants, *options, reduction, False, *settings)
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.weighted_soft_labels.linear_loss.default, arguments, test_utils=utilities
        )


# --- recipes ---


def test_padded_vocabulary_is_sliced():
    tensors = problem()
    expected = exact(tensors)
    padded = F.pad(tensors["student_weight"], (0, 0, 0, 14), value=9.0).requires_grad_()
    bias = F.pad(tensors["student_bias"], (0, 14), value=9.0)
    sliced = {"student_weight": padded[:CLASSES], "student_bias": bias[:CLASSES]}
    linear_wsl_loss(**tensors | sliced).backward()
    torch.testing.assert_close(
        padded.grad[:CLASSES].double(), expected[1]["student_weight"], rtol=1e-4, atol=1e-6
    )
    assert padded.grad[CLASSES:].eq(0).all()


def test_accumulation_over_a_global_token_count():
    tensors = problem()
    _, expected = exact(tensors)
    weight = tensors["student_weight"].clone().requires_grad_()
    tokens = (tensors["target"] != -100).sum()
    for part in (slice(0, 5), slice(5, ROWS)):  # with 3 and 8 tokens that are not ignored
        rows = {name: tensors[name][part] for name in ("student_input", "teacher_input", "target")}
        (
            linear_wsl_loss(**tensors | rows | {"student_weight": weight}, reduction="sum") / tokens
        ).backward()
    torch.testing.assert_close(
        weight.grad.double(), expected["student_weight"], rtol=1e-4, atol=1e-6
    )


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"student_input": torch.zeros(ROWS, 9)},
            ValueError,
            "(..., H), (C, H) and (C,), got ((13, 9), (50, 8)",
        ),
        ({"student_bias": torch.zeros(9)}, ValueError, "student_input, _weight and _bias must be"),
        (
            {"teacher_weight": torch.zeros(64, 6), "teacher_bias": None},
            ValueError,
            "50 and 64: slice the one",
        ),
        (
            {"student_weight": torch.zeros(0)},
            ValueError,
            "student_weight has no elements, shape (0,): if ZeRO or FSDP",
        ),
        (
            {"student_input": torch.zeros(ROWS, 8).bfloat16()},
            TypeError,
            "same dtype, got torch.bfloat16 and",
        ),
        ({"student_input": None}, TypeError, "student_input must be a Tensor, got NoneType"),
        (
            {"teacher_weight": torch.zeros(50, 6).long()},
            TypeError,
            "teacher_input and teacher_weight must have the same",
        ),
        (
            {"teacher_weight": torch.zeros(50, 6, device="meta")},
            ValueError,
            "of teacher_input, cpu, got meta",
        ),
        ({"teacher_input": torch.zeros(12, 6)}, ValueError, "must have the same shape"),
        ({"target": torch.zeros(12).long()}, ValueError, "got (12,)"),
        ({"target": torch.zeros(ROWS, CLASSES)}, TypeError, "target must hold class indices"),
        ({"target": torch.full((ROWS,), 50)}, IndexError, "got 50"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an int >= 1 or None, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0"),
        (
            {"student_logit_scale": 0.0},
            ValueError,
            "student_logit_scale must be finite and > 0, from 1e-15 to 1e15, got 0.0",
        ),
        (
            {"teacher_logit_scale": None},
            ValueError,
            "teacher_logit_scale must be a number, got None",
        ),
        (
            {"student_softcap": -1},
            ValueError,
            "student_softcap must be finite and > 0, from 1e-15",
        ),
        ({"teacher_softcap": float("inf")}, ValueError, "teacher_softcap must be finite and > 0"),
    ],
)
def test_errors_say_what_to_do(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        linear_wsl_loss(**problem() | changes)


def test_transforms_are_refused():
    tensors = problem()
    weight = tensors.pop("student_weight")
    with pytest.raises(NotImplementedError, match=r"weighted_soft_labels\.reference"):
        torch.func.grad(lambda w: linear_wsl_loss(student_weight=w, **tensors))(weight)


def test_same_backend_as_the_loss(monkeypatch):
    chosen = []
    original = backends.choose

    def choose(student, *others):
        chosen.append((student.shape, student.dtype))
        return original(student, *others)

    monkeypatch.setattr(backends, "choose", choose)
    with torch.no_grad():
        linear_wsl_loss(**problem(torch.bfloat16), chunk_size=8)
    assert chosen == [((8, CLASSES), torch.float32), ((5, CLASSES), torch.float32)]


def test_nan_from_a_sequence_that_is_all_ignored_does_not_reach_the_weight():
    """A mean per sequence is NaN for a sequence without labels, and nanmean leaves the NaN out."""
    states, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    target = torch.tensor([[1, 2, 3], [-100] * 3])
    loss = linear_wsl_loss(states, weight, states, weight, target, reduction="none")
    (loss.sum(1) / (target != -100).sum(1)).nanmean().backward()
    assert weight.grad.isfinite().all()


def test_as_the_last_layer_of_a_module():
    student, teacher = nn.Linear(WIDTH, CLASSES), nn.Linear(TEACHER_WIDTH, CLASSES)
    tensors = problem()
    layers = {"student_weight": student.weight, "student_bias": student.bias}
    layers |= {"teacher_weight": teacher.weight, "teacher_bias": teacher.bias}
    linear_wsl_loss(**tensors | layers).backward()
    _, expected = exact({name: x.detach() for name, x in (tensors | layers).items()})
    torch.testing.assert_close(
        student.weight.grad.double(), expected["student_weight"], rtol=1e-4, atol=1e-6
    )
    assert teacher.weight.grad is None
