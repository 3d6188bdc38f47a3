"""The Triton kernels, on a GPU where there is one and through Triton's interpreter where there is none.

Sizes are chosen by what a thread holds: a row of 5 classes; a part of one of 40, 1000 and 1029, with and without
neighbours that fill 16 bytes; a part of one of 8201, which takes two tiles, so that statistics are joined and the last
tile is cut; the classes of a pixel, alone or with other warps.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from budget import assert_as_reference, step
from test_loss import INF, NAN, STRIDED, far_apart, float64_weight, memorised, problem

from weighted_soft_labels import loss as loss_module
from weighted_soft_labels import reference, wsl_loss
from weighted_soft_labels.analysis import wsl_terms

_triton = pytest.importorskip(
    "weighted_soft_labels._triton",
    reason="Triton is not installed beside this build of torch",
    exc_type=ImportError,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REGIMES = [(3, 5), (3, 40), (5, 1000), (3, 1029), (2, 8201), (2, 19, 3, 5), (1, 40, 70)]

# What the interpreter computes it computes in NumPy, which mentions every infinity that it meets.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Everything but float64 goes to the kernels, on the CPU too."""
    original = loss_module.implementation

    def implementation(student, teacher):
        if torch.float64 in (student.dtype, teacher.dtype):
            return original(student, teacher)
        return _triton

    monkeypatch.setattr(loss_module, "implementation", implementation)


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("shape", REGIMES)
@pytest.mark.parametrize(
    ("temperature", "label_smoothing", "kind"),
    [
        (1.0, 0.1, "ignored"),
        (2.0, 0.0, "ignored"),
        (3.3, 1.0, "ignored"),
        (2.0, 0.1, "probabilities"),
    ],
)
def test_every_regime(shape, temperature, label_smoothing, kind):
    inputs = on_device(
        *problem(shape, ignored=kind == "ignored", probabilities=kind == "probabilities")
    )
    assert_as_reference(*inputs, temperature=temperature, label_smoothing=label_smoothing)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_and_mixture(dtype, teacher_dtype):
    for shape in [(3, 40), (2, 3, 9)]:
        student, teacher, target = on_device(*problem(shape, ignored=True))
        assert_as_reference(student.to(dtype), teacher.to(teacher_dtype), target)


@pytest.mark.parametrize("shape", [(4, 1029), (4, 8201)])
def test_label_and_maximum_at_either_end_of_a_row(shape):
    """And at the end of a tile, in one row each."""
    student, teacher, target = on_device(*problem(shape))
    target[:] = torch.tensor([0, 1023, min(8191, shape[1] - 2), shape[1] - 1])
    student[range(0, 4, 2), target[::2]] += 30
    teacher[range(4), target] += 20
    student[1, -1] = -INF
    for label in (target, F.one_hot(target, shape[1]).float()):
        assert_as_reference(student, teacher, label, label_smoothing=0.1, reduction="none")


def test_rows_that_start_differently():
    """The teacher's rows are 1031 apart, the student's 1000: 16 bytes at a time would suit one of them."""
    student, _, target = on_device(*problem((5, 1000)))
    teacher = on_device(problem((5, 1031))[0])[0][:, 1:1001]
    assert_as_reference(student, teacher, target)
    assert_as_reference(teacher, student, target)


def margins(rows, classes):
    """Student and teacher that are the surer of their labels the further down the row is, up to 60."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, rows, classes, generator=generator).unbind(0)
    target = torch.randint(classes, (rows,), generator=generator)
    student[range(rows), target] += torch.linspace(0, 60, rows)
    teacher[range(rows), target] += torch.linspace(31, 40, rows)
    return student, teacher, target


@pytest.mark.parametrize(
    ("rows", "classes", "temperature"), [(13, 7, 1.0), (13, 7, 2.0), (13, 40, 3.3), (3, 8201, 2.0)]
)
def test_sure_rows_are_exact_by_the_size_of_their_own_terms(rows, classes, temperature):
    """Not by that of the largest in the tensor: terms of 1e-20 have as many digits as terms of 1."""
    inputs = margins(rows, classes)
    exact = [logits.double() for logits in inputs[:2]]
    for found, expected in zip(
        wsl_terms(*on_device(*inputs), temperature=temperature),
        wsl_terms(*exact, inputs[2], temperature=temperature),
        strict=True,
    ):
        torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=1e-5, atol=0)
    label = F.one_hot(inputs[2], classes)
    for target in (inputs[2], label.float()):
        for hard_weight in (0.0, 1.0):
            options = {"temperature": temperature, "hard_weight": hard_weight, "reduction": "sum"}
            _, found = step(wsl_loss, *on_device(*inputs[:2], target), **options)
            _, expected = step(
                wsl_loss,
                *exact,
                target.double() if target.is_floating_point() else target,
                **options,
            )
            # What a gradient is a difference of: p, or 1 - p at the label, of student and teacher.
            size = 0
            for scale, logits in (
                (hard_weight, exact[0]),
                *((2.5 * temperature, x / temperature) for x in exact),
            ):
                p = logits.softmax(1)
                size = size + scale * torch.where(
                    label == 1, (p * (1 - label)).sum(1, keepdim=True), p
                )
            assert ((found.cpu().double() - expected).abs() <= 1e-5 * size + 1e-37).all()


@pytest.mark.parametrize("shape", [(5, 19), (1, 8201), (1, 19, 40)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_soft_gradient_of_a_student_that_is_its_teacher_is_zero(shape, probabilities):
    logits, _, target = on_device(*problem(shape, probabilities=probabilities))
    for temperature in (2.0, 3.3):
        _, gradient = step(
            wsl_loss, logits, logits, target, hard_weight=0.0, temperature=temperature
        )
        assert gradient.eq(0).all()


def test_gradient_of_float16_logits_may_be_float32():
    student, teacher, target = on_device(*problem((6, 33), dtype=torch.float16))
    gradient = torch.full((1, 33, 6), NAN, device=DEVICE)
    _triton.forward(student.T[None], teacher.T[None], target[None], loss_module.Options(), gradient)
    _, expected = step(reference.wsl_loss, student.double(), teacher.double(), target)
    torch.testing.assert_close(gradient[0].T.double(), expected, rtol=1e-5, atol=1e-7)


def test_forward_may_form_the_gradient_of_every_row_s_own_loss():
    student, teacher, target = on_device(*problem((6, 33), ignored=True))
    gradient = torch.full((1, 33, 6), NAN, device=DEVICE)
    options = loss_module.Options(reduction="none")
    loss = _triton.forward(student.T[None], teacher.T[None], target[None], options, gradient)
    expected, expected_gradient = step(wsl_loss, student, teacher, target, reduction="none")
    torch.testing.assert_close(loss[0], expected)
    torch.testing.assert_close(gradient[0].T, expected_gradient)


@pytest.mark.parametrize("shape", [(1,), (1024,), (1025,), (2, 512), (3, 342)])
def test_mean_over_labels_that_are_not_ignored(shape):
    """Up to 1024 are counted by every program, more beforehand in parts."""
    generator = torch.Generator().manual_seed(len(shape))
    target = torch.randint(2, shape, generator=generator) * 100 - 100
    target.view(-1)[0] = 0
    logits, target = on_device(torch.zeros(shape[0], 2, *shape[1:]), target)
    loss, gradient = step(wsl_loss, logits, logits, target, alpha=0.0)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    expected = torch.where(target == 0, -0.5 / (target == 0).sum(), 0.0)
    torch.testing.assert_close(gradient.select(1, 0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1025, 300_000])
def test_many_labels_are_counted_in_parts(size):
    (target,) = on_device(torch.arange(size)[None] % 3 * 50 - 100)
    mode, counted, share = _triton._count(
        torch.empty(1, 2, size, device=DEVICE), target, loss_module.Options()
    )
    assert (mode, share) == (2, 1.0)
    assert counted.sum() == (target != -100).sum()


def test_gradient_is_scaled_to_its_last_element():
    for shape in [(1, 1), (3, 5), (5, 500), (2, 3, 11)]:
        student, teacher, target = on_device(*problem(shape))
        _, expected = step(wsl_loss, student, teacher, target)
        factor = torch.tensor(-2.0, device=DEVICE)
        torch.testing.assert_close(
            step(wsl_loss, student, teacher, target, upstream=factor)[1], -2 * expected
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "ignored", "probabilities"])
@pytest.mark.parametrize(("hard_weight", "alpha"), [(0.0, 1.0), (0.5, 0.0)])
def test_every_option(reduction, kind, hard_weight, alpha):
    for shape in [(5,), (3, 6), (2, 6, 5)]:
        if shape == (5,) and kind == "ignored":
            continue
        inputs = on_device(
            *problem(shape, probabilities=kind == "probabilities", ignored=kind == "ignored")
        )
        assert_as_reference(*inputs, reduction=reduction, hard_weight=hard_weight, alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_every_integer_target(dtype):
    student, teacher, target = on_device(*problem((3, 10)))
    torch.testing.assert_close(
        wsl_loss(student, teacher, target.to(dtype)), wsl_loss(student, teacher, target)
    )


@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides_and_the_teacher_has_its_own(layout):
    for shape in [(4, 7), (2, 5, 4, 6)]:
        student, teacher, target = on_device(*problem(shape))
        for other in ("sliced", "channels last"):
            assert_as_reference(
                STRIDED[layout](student), STRIDED[other](teacher), target, reduction="none"
            )
        assert_as_reference(
            teacher,
            STRIDED[layout](student),
            STRIDED[layout](problem(shape, probabilities=True)[2]).to(DEVICE),
        )


def test_one_row_and_whole_tiles():
    for shape in [(1, 2), (1, 32), (1, 1024), (128, 4), (1, 8192), (1, 16384)]:
        assert_as_reference(*on_device(*problem(shape)))


@pytest.mark.parametrize("classes", [10, 8201])
def test_weight_is_exact_for_memorising_teachers(classes):
    margins = torch.linspace(0, 28, 29 if classes == 10 else 5) + math.log(classes)
    teacher = memorised(classes, margins, 7.3) + 0.3 * torch.randn(
        len(margins), classes, generator=torch.Generator().manual_seed(0)
    )
    student = teacher - torch.linspace(-1, 2, len(margins))[:, None] * F.one_hot(
        torch.tensor(1), classes
    )
    target = torch.ones(len(margins), dtype=torch.long)
    expected = float64_weight(student, teacher, 1).to(DEVICE)
    student, teacher, target = on_device(student, teacher, target)
    for temperature in (2.0, 3.3):
        assert (
            wsl_terms(student, teacher, target, temperature=temperature).weight - expected
        ).abs().max() < 1e-6
    probabilities = F.one_hot(target, classes).float()
    assert (wsl_terms(student, teacher, probabilities).weight - expected).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [2.0, 3.0])
@pytest.mark.parametrize("probabilities", [False, True])
def test_masked_classes(temperature, probabilities):
    student = torch.tensor([[0, -INF, 1.0], [0, -INF, 1], [0, -INF, 1], [0, 0, -INF], [2, 1, 0]])
    teacher = torch.tensor([[1.0, -INF, 0], [1, 0.5, 0], [1, -INF, 0], [0, 0, 1], [-INF, 1, 0]])
    target = torch.tensor([0, 0, 1, 1, 1])
    label = F.one_hot(target, 3).float() if probabilities else target
    assert_as_reference(
        *on_device(student, teacher, label), temperature=temperature, reduction="none"
    )


def test_a_whole_tile_of_masked_classes():
    """The first tile and the last hold nothing for one or both sets of logits, and the maximum comes late."""
    student, teacher, target = problem((4, 20000))
    target[:] = 10000
    student[0, :8192] = teacher[0, :8192] = -INF
    teacher[1, :8192] = -INF
    student[2, 16384:] = teacher[2, 16384:] = -INF
    student[3, 19999], teacher[3, 19998] = 90, 120
    for label in (target, F.one_hot(target, 20000).float()):
        assert_as_reference(*on_device(student, teacher, label), reduction="none")


@pytest.mark.parametrize("poison", [NAN, INF])
def test_nan_and_inf_poison_their_row_only(poison):
    for shape in [(4, 6), (4, 8201)]:
        student, teacher, target = on_device(*problem(shape))
        expected = wsl_loss(student, teacher, target, reduction="none")
        student[2, 3] = teacher[1, 4] = poison
        loss = wsl_loss(student, teacher, target, reduction="none")
        assert loss[1:3].isnan().all()
        torch.testing.assert_close(loss[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("garbage", [NAN, -INF])
def test_ignored_elements_are_inert_and_their_gradient_is_written(garbage, monkeypatch):
    student, teacher, target = on_device(*problem((5, 7)))
    kept = torch.tensor([0, 2, 3], device=DEVICE)
    expected, expected_gradient = step(wsl_loss, student[kept], teacher[kept], target[kept])
    for ignored in (1, 4):
        student[ignored], teacher[ignored], target[ignored] = garbage, garbage, -100
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(NAN))
    loss, gradient = step(wsl_loss, student, teacher, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[kept], expected_gradient)
    assert gradient[[1, 4]].eq(0).all()


@pytest.mark.parametrize("index", [10, 2**31, -1])
def test_index_that_names_no_class_is_nan_and_follows_no_pointer(index):
    student, teacher, target = on_device(*problem((3, 10)))
    target[1] = index
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_nothing_to_average():
    for shape in [(0, 5), (2, 5, 0)]:
        for probabilities in (False, True):
            student, teacher, target = on_device(*problem(shape, probabilities=probabilities))
            assert wsl_loss(student, teacher, target).isnan()
            loss, gradient = step(wsl_loss, student, teacher, target, reduction="sum")
            assert loss == 0
            assert gradient.shape == shape
    student, teacher, target = on_device(*problem((3, 5)))
    target[:] = -100
    loss, gradient = step(wsl_loss, student, teacher, target)
    assert loss.isnan()
    assert gradient.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 10), (2, 5, 6)])
def test_any_incoming_gradient_and_a_retained_graph(dtype, shape):
    student, teacher, target = on_device(*problem(shape, ignored=True, dtype=dtype))
    upstream = torch.rand(target.shape, device=DEVICE)
    options = {"reduction": "none", "label_smoothing": 0.1}
    _, expected = step(
        reference.wsl_loss,
        student.double(),
        teacher.double(),
        target,
        upstream=upstream.double(),
        **options,
    )
    student.requires_grad_()
    loss = wsl_loss(student, teacher, target, **options)
    rtol = 4 * torch.finfo(dtype).eps + 2e-6
    for factor in (1.0, 3.0):
        (gradient,) = torch.autograd.grad(loss, student, upstream * factor, retain_graph=True)
        torch.testing.assert_close(
            gradient.double(), expected * factor, rtol=rtol, atol=rtol * expected.abs().max().item()
        )
        gradient.fill_(NAN)
    (ones,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(
        ones, step(wsl_loss, student, teacher, target, **{**options, "reduction": "sum"})[1]
    )


def test_float16_gradient_survives_a_gradient_scaler():
    student, _, target = problem((128, 4), dtype=torch.float16, scale=0.01)
    student, target = on_device(student / 100, target)
    student[:, 0] += 12  # most gradients are 1e-8, far below float16 when divided by N
    _, exact = step(reference.wsl_loss, student.double(), student.double(), target)
    _, gradient = step(
        wsl_loss, student, student, target, upstream=torch.tensor(65536.0, device=DEVICE)
    )
    assert ((gradient.double() / 65536 - exact).abs() <= 1e-3 * exact.abs() + 1e-12).all()


def test_create_graph_and_func_grad():
    student, teacher, target = on_device(*problem((4, 5)))
    _, expected = step(wsl_loss, student, teacher, target)
    torch.testing.assert_close(
        torch.func.grad(lambda s: wsl_loss(s, teacher, target))(student), expected
    )
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(
        wsl_loss(student, teacher, target), student, create_graph=True
    )
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(RuntimeError, match=r"weighted_soft_labels\.reference"):
        gradient.sum().backward()


def test_inputs_are_never_written():
    for shape in [(4, 10), (2, 5, 6)]:
        tensors = on_device(*problem(shape, ignored=True))
        copies = [tensor.clone() for tensor in tensors]
        step(wsl_loss, *tensors, upstream=torch.tensor(3.0, device=DEVICE))
        wsl_terms(*tensors)
        for tensor, copied in zip(tensors, copies, strict=True):
            torch.testing.assert_close(tensor, copied, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_p_minus_1_is_not_rounded_to_half_precision_first(dtype):
    student = torch.zeros(1, 10, dtype=dtype, device=DEVICE)
    student[0, 3] = 9.0
    target = torch.tensor([3], device=DEVICE)
    _, exact = step(F.cross_entropy, student.double(), target)
    _, ours = step(wsl_loss, student, student, target, alpha=0.0)
    torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU such memory is not free of charge")
@pytest.mark.parametrize("shape", [(2, 10), (2, 3, 4)])
def test_offsets_beyond_32_bits(shape):
    student, teacher, target = problem(shape, dtype=torch.float16)
    assert_as_reference(far_apart(shape).copy_(student), far_apart(shape).copy_(teacher), target)


@pytest.mark.parametrize("probabilities", [False, True])
def test_nothing_is_read_back_to_the_host(probabilities, monkeypatch):
    """Tensors without data have nothing to read; whoever tries gets an error."""
    launched = []

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(self.name)

    for name in ("_forward_kernel", "_backward_kernel", "_scale_kernel", "_count_kernel"):
        monkeypatch.setattr(_triton, name, Launch(name))
    for shape in [(8, 10), (2, 5, 6), (1025, 2)]:
        inputs = [tensor.to("meta") for tensor in problem(shape, probabilities=probabilities)]
        for dtype in (torch.float32, torch.float16):
            for reduction in ("mean", "sum", "none"):
                launched.clear()
                student = inputs[0].detach().to(dtype).requires_grad_()
                wsl_loss(student, *inputs[1:], reduction=reduction).sum().backward()
                ahead = dtype == torch.float32 and reduction != "none"
                many = shape == (1025, 2) and reduction == "mean" and not probabilities
                assert launched == [
                    *(["_count_kernel"] if many else []),
                    "_forward_kernel",
                    *(["_count_kernel"] if many and not ahead else []),
                    "_scale_kernel" if ahead else "_backward_kernel",
                ]
        wsl_terms(*inputs)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"temperature": 4.0, "label_smoothing": 0.1}]
)
def test_second_launch_of_a_description_repeats_the_first(options, monkeypatch):
    """With new tensors, and without Triton's binding of names to places, so the places have to be right."""
    names = list(inspect.signature(_triton._forward_kernel.fn).parameters)
    bound, replayed = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: replayed.append((grid[0], dict(zip(names, args, strict=True))))

    class Kernel:
        arg_names = names

        def __getitem__(self, grid):
            def launch(*args, num_warps, **constants):
                bound.append((grid[0], dict(zip(names, args, strict=False)) | constants))
                return Compiled()

            return launch

    monkeypatch.setattr(_triton, "_forward_kernel", Kernel())
    monkeypatch.setattr(_triton, "_REPLAYS", {})
    for shape in [(8, 10), (5, 40)]:
        for probabilities in (False, True):
            first, second = (
                [
                    tensor.clone()
                    for tensor in problem(shape, seed=seed, probabilities=probabilities)
                ]
                for seed in range(2)
            )
            wsl_loss(*first, **options)
            assert not replayed
            wsl_loss(*second, **options)
            (programs, ours), (expected_programs, expected) = replayed.pop(), bound.pop()
            assert not bound
            assert programs == expected_programs
            assert ours.keys() == expected.keys()
            for tensor, name in zip(second, ("student", "teacher", "target"), strict=True):
                assert ours[name].data_ptr() == tensor.data_ptr()
            for name, value in expected.items():
                if not isinstance(value, torch.Tensor):
                    assert ours[name] == value, name
    moved = torch.empty(8 * 10 + 1)[1:].view(8, 10)  # starts between multiples of 16 bytes
    wsl_loss(moved.copy_(problem((8, 10))[0]), *problem((8, 10))[1:], **options)
    assert bound
    assert not replayed
