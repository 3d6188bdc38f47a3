"""What is particular to the Triton kernels: tiles, vectors, counting, replayed launches, the probe.

The kernels run on a GPU if there is one, else in Triton's interpreter. `test_loss.py` tests the
contract of every backend, these included. Sizes here are chosen by what a thread takes: a row of 5
classes; a part of one of 40, 1000 or 1029, with and without vectors of 16 bytes; a part of one of
8201, which takes two tiles, so that statistics are merged and the last tile is cut; the classes of
a pixel, alone or with other warps.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from budget import assert_as_reference, step
from test_loss import INF, NAN, problem

from weighted_soft_labels import backends, reference, wsl_loss
from weighted_soft_labels._options import Options
from weighted_soft_labels.analysis import wsl_terms
from weighted_soft_labels.backends import use_backend

kernels = pytest.importorskip(
    "weighted_soft_labels.backends.triton",
    reason="Triton is not installed beside this build of torch",
    exc_type=ImportError,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REGIMES = [(3, 5), (3, 40), (5, 1000), (3, 1029), (2, 8201), (2, 19, 3, 5), (1, 40, 70)]

# The interpreter computes in NumPy, which warns of every infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


# --- tiles ---


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
    inputs = problem(shape, ignored=kind == "ignored", probabilities=kind == "probabilities")
    options = {"temperature": temperature, "label_smoothing": label_smoothing}
    assert_as_reference(*on_device(*inputs), **options)


def test_one_row_and_whole_tiles():
    for shape in [(1, 2), (1, 32), (1, 1024), (128, 4), (1, 8192), (1, 16384)]:
        assert_as_reference(*on_device(*problem(shape)))


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


def test_a_whole_tile_of_masked_classes():
    """The first or last tile is masked in one or both sets of logits; the maximum comes late."""
    student, teacher, target = problem((4, 20000))
    target[:] = 10000
    student[0, :8192] = teacher[0, :8192] = -INF
    teacher[1, :8192] = -INF
    student[2, 16384:] = teacher[2, 16384:] = -INF
    student[3, 19999], teacher[3, 19998] = 90, 120
    for label in (target, F.one_hot(target, 20000).float()):
        assert_as_reference(*on_device(student, teacher, label), reduction="none")


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("column", [3, 8200])
def test_nan_and_inf_in_one_tile_poison_their_row_only(poison, column):
    student, teacher, target = on_device(*problem((4, 8201)))
    expected = wsl_loss(student, teacher, target, reduction="none")
    student[2, column] = teacher[1, column] = poison
    loss = wsl_loss(student, teacher, target, reduction="none")
    assert loss[1:3].isnan().all()
    torch.testing.assert_close(loss[[0, 3]], expected[[0, 3]])


def margins(rows, classes):
    """Student and teacher whose margin at the label grows with the row, up to 60."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, rows, classes, generator=generator).unbind(0)
    target = torch.randint(classes, (rows,), generator=generator)
    student[range(rows), target] += torch.linspace(0, 60, rows)
    teacher[range(rows), target] += torch.linspace(31, 40, rows)
    return student, teacher, target


@pytest.mark.parametrize(
    ("rows", "classes", "temperature"), [(13, 7, 1.0), (13, 7, 2.0), (13, 40, 3.3), (3, 8201, 2.0)]
)
def test_confident_rows_are_exact_by_the_size_of_their_own_terms(rows, classes, temperature):
    """Terms of 1e-20 have as many digits as terms of 1."""
    student, teacher, target = margins(rows, classes)
    exact = student.double(), teacher.double()
    terms = wsl_terms(*on_device(student, teacher, target), temperature=temperature)
    with use_backend("eager"):
        exact_terms = wsl_terms(*exact, target, temperature=temperature)
    for ours, expected in zip(terms, exact_terms, strict=True):
        torch.testing.assert_close(ours.cpu().double(), expected.double(), rtol=1e-5, atol=0)
    label = F.one_hot(target, classes)
    for kind in (target, label.float()):
        for hard_weight in (0.0, 1.0):
            options = {"temperature": temperature, "hard_weight": hard_weight, "reduction": "sum"}
            _, ours = step(wsl_loss, *on_device(student, teacher, kind), **options)
            exact_kind = kind.double() if kind.is_floating_point() else kind
            with use_backend("eager"):
                _, expected = step(wsl_loss, *exact, exact_kind, **options)
            # The gradient is a difference of probabilities, or of 1 - p at the label.
            size = hard_weight * smaller_side(exact[0], label)
            for logits in exact:
                size = size + 2.5 * temperature * smaller_side(logits / temperature, label)
            assert ((ours.cpu().double() - expected).abs() <= 1e-5 * size + 1e-37).all()


def smaller_side(logits, label):
    p = logits.softmax(1)
    return torch.where(label == 1, (p * (1 - label)).sum(1, keepdim=True), p)


@pytest.mark.parametrize("shape", [(5, 19), (1, 8201), (1, 19, 40)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_soft_gradient_of_a_student_that_is_its_teacher_is_zero(shape, probabilities):
    logits, _, target = on_device(*problem(shape, probabilities=probabilities))
    for temperature in (2.0, 3.3):
        options = {"hard_weight": 0.0, "temperature": temperature}
        _, gradient = step(wsl_loss, logits, logits, target, **options)
        assert gradient.eq(0).all()


@pytest.mark.parametrize("index", [10, 2**31, -1])
def test_index_that_names_no_class_is_nan_and_follows_no_pointer(index):
    student, teacher, target = on_device(*problem((3, 10)))
    target[1] = index
    loss, gradient = step(wsl_loss, student, teacher, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_gradient_may_have_another_dtype_than_the_student():
    student, teacher, target = on_device(*problem((6, 33), dtype=torch.float16))
    gradient = torch.full((6, 33), NAN, device=DEVICE)
    kernels.run(student, teacher, target, Options(), gradient)
    _, expected = step(reference.wsl_loss, student.double(), teacher.double(), target)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


# --- vectors ---


def inside(shape, index):
    """Return a function that puts a tensor into a larger one of NaN, at `index`."""

    def place(x):
        larger = torch.full((*x.shape[:2], *shape), NAN, dtype=x.dtype, device=x.device)
        view = larger[(..., *index)]
        return view.copy_(x)

    return place


def every_second_class(x):
    larger = torch.full((len(x), 2 * x.shape[1]), NAN, dtype=x.dtype, device=x.device)
    return larger[:, ::2].copy_(x)


# Layouts of (N, C) whose classes are no neighbours. Triton knows strides of 16 and 0 as multiples
# of 16, so that a wrong vector would be one load of 16 bytes.
LAYOUTS = {
    "one of 16": inside((16,), (0,)),
    "a place of a map": inside((4, 4), (0, 0)),
    "every second class": every_second_class,
    "a constant": lambda x: x[:1, :1].expand(x.shape),
    "the same row": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.t().contiguous().t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [40, 1000])
def test_layouts_whose_classes_are_no_neighbours(layout, classes):
    change = LAYOUTS[layout]
    student, teacher, target = on_device(*problem((4, classes)))
    assert_as_reference(change(student), teacher, target)
    assert_as_reference(student, change(teacher), target)
    assert_as_reference(change(student), change(teacher), target)
    q = change(on_device(problem((4, classes), probabilities=True)[2])[0])
    assert_as_reference(student, teacher, q)


def test_uniform_probabilities():
    student, teacher, _ = on_device(*problem((4, 64)))
    uniform = torch.full((), 1 / 64, device=DEVICE).expand(4, 64)
    assert_as_reference(student, teacher, uniform)


class Recorder:
    """Stands for a kernel, and records the names and arguments of its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid):
        def launch(*args, **constants):
            arguments = dict(zip(self.arg_names, args, strict=False)) | constants
            self.launches.append((self.kernel.__name__, grid, arguments))

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Launches that are recorded instead of run."""
    recorded = []
    for name in ("_forward_kernel", "_count_kernel", "_scale_kernel"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), recorded))
    monkeypatch.setattr(kernels, "_REPLAYS", {})
    return recorded


def vector(launches, *inputs):
    launches.clear()
    wsl_loss(*inputs)
    return launches[-1][2]["VECTOR"]


@pytest.mark.parametrize("operand", ["student", "teacher", "probabilities"])
def test_vectors_need_classes_that_are_neighbours(operand, launches):
    """The interpreter ignores what the kernel claims of addresses, so the claim is tested here."""
    student, teacher, probabilities = problem((4, 64), probabilities=True)
    operands = {"student": student, "teacher": teacher, "probabilities": probabilities}
    assert vector(launches, *operands.values()) == 4
    for layout in set(LAYOUTS) - {"the same row"}:
        changed = operands | {operand: LAYOUTS[layout](operands[operand])}
        assert vector(launches, *changed.values()) == 1, layout


def test_vectors_fit_into_rows_and_16_bytes(launches):
    student, teacher, target = problem((4, 64))
    half = student.bfloat16()
    assert vector(launches, half, half, target) == 8
    assert vector(launches, half, teacher, target) == 4
    for padding, expected in ((1, 1), (2, 2), (4, 4)):
        padded = F.pad(teacher, (0, padding))[:, :64]
        assert vector(launches, student, padded, target) == expected
        assert vector(launches, padded, student, target) == expected


def test_rows_that_start_differently():
    """The teacher's rows are 1031 apart, and the student's 1000."""
    student, _, target = on_device(*problem((5, 1000)))
    teacher = on_device(problem((5, 1031))[0])[0][:, 1:1001]
    assert_as_reference(student, teacher, target)
    assert_as_reference(teacher, student, target)


# --- counting ---


@pytest.mark.parametrize("shape", [(1,), (1024,), (1025,), (2, 512), (3, 342)])
def test_mean_over_labels_that_are_not_ignored(shape):
    """Every program counts up to 1024 labels itself; more are counted beforehand, in parts."""
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
    (target,) = on_device(torch.arange(size) % 3 * 50 - 100)
    student = torch.empty(size, 2, device=DEVICE)
    count, counted, share = kernels._count(student, target, Options())
    assert (count, share) == (2, 1.0)
    assert counted.sum() == (target != -100).sum()


@pytest.mark.parametrize("shape", [(600,), (130, 8), (3, 300)])
def test_labels_that_are_not_contiguous(shape):
    student, teacher, _ = on_device(*problem((shape[0], 5, *shape[1:])))
    target = torch.arange(2 * math.prod(shape), device=DEVICE).view(*shape[:-1], -1) % 5
    target[0] = -100
    assert_as_reference(student, teacher, target[..., ::2])


# --- backward ---


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 500), (2, 3, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_scaled_to_its_last_element(shape, dtype):
    (gradient,) = on_device(problem(shape, dtype=dtype)[0])
    negated = torch.zeros(2, device=DEVICE).add(3j).conj().imag[1]  # -3, lazily negated
    for factor in (torch.tensor(1.0), torch.tensor(-2.5), torch.tensor(1.5).bfloat16(), negated):
        (factor,) = on_device(factor)
        scaled = gradient.clone()
        kernels.multiply_(scaled, factor)
        expected = (gradient.float() * factor.float()).to(dtype)
        # The interpreter rounds towards zero.
        torch.testing.assert_close(scaled, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert negated.is_neg()


def test_gradient_times_a_zero_tensor_is_zero():
    (gradient,) = on_device(problem((3, 5))[0])
    kernels.multiply_(gradient, torch._efficientzerotensor((), device=DEVICE))
    assert gradient.eq(0).all()


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_multiplied_by_one_factor_per_element(shape, dtype):
    gradient, other = on_device(*problem(shape, dtype=dtype)[:2])
    factor = other.float()[:, 0]
    expected = (gradient.float() * factor[:, None]).to(dtype)
    kernels.multiply_(gradient, factor)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


# --- launches ---


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", [(8, 10), (2, 5, 6), (1025, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_host_reads_no_data_and_launches_as_few_kernels_as_it_can(
    probabilities, shape, reduction, launches
):
    """Tensors without data have nothing to read: an attempt is an error."""
    student, *others = (x.to("meta") for x in problem(shape, probabilities=probabilities))
    loss = wsl_loss(student.detach().requires_grad_(), *others, reduction=reduction)
    loss.backward(torch.empty_like(loss))
    many = shape == (1025, 2) and reduction == "mean" and not probabilities
    expected = ["_count_kernel"] if many else []
    expected.append("_forward_kernel")
    if reduction != "none":
        expected.append("_scale_kernel")
    assert [name for name, _, _ in launches] == expected
    assert all(arguments["enable_fp_fusion"] is True for _, _, arguments in launches)
    wsl_terms(student, *others)
    if reduction != "none":  # balanced weights: one launch more, which computes them
        launches.clear()
        wsl_loss(student, *others, reduction=reduction, balance=True)
        expected = ["_forward_kernel", *expected[:-1]]
        assert [name for name, _, _ in launches] == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"temperature": 4.0, "label_smoothing": 0.1},
        {"balance": True, "reduction": "sum"},
    ],
)
def test_second_launch_of_a_description_repeats_the_first(options, monkeypatch):
    """A replay skips Triton's binder, so each argument must be at its place."""
    names = list(inspect.signature(kernels._forward_kernel.fn).parameters)
    bound, replayed = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: replayed.append((grid[0], dict(zip(names, args, strict=True))))

    class Kernel(Recorder):
        def __getitem__(self, grid):
            launch = super().__getitem__(grid)
            return lambda *args, **constants: launch(*args, **constants) or Compiled()

    monkeypatch.setattr(kernels, "_forward_kernel", Kernel(kernels._forward_kernel, bound))
    monkeypatch.setattr(kernels, "_REPLAYS", {})
    for shape in [(8, 10), (5, 40), (2, 5, 6)]:
        for probabilities in (False, True):
            first, second = (
                [x.clone() for x in problem(shape, seed=seed, probabilities=probabilities)]
                for seed in range(2)
            )
            wsl_loss(*first, **options)
            assert not replayed
            wsl_loss(*second, **options)
            assert len(bound) == len(replayed) == (2 if "balance" in options else 1)
            while bound:
                _, grid, expected = bound.pop()
                programs, ours = replayed.pop()
                assert (programs,) == grid
                assert ours.keys() == expected.keys() - {"num_warps", "enable_fp_fusion"}
                for tensor, name in zip(second, ("student", "teacher", "target"), strict=True):
                    assert ours[name].data_ptr() == tensor.data_ptr()
                assert (ours["weight_scale"] is ours["student"]) is not ours["SCALED"]
                for name, value in ours.items():
                    if not isinstance(value, torch.Tensor):
                        assert expected[name] == value, name
    unaligned = torch.empty(8 * 10 + 1)[1:].view(8, 10)  # not on a multiple of 16 bytes
    wsl_loss(unaligned.copy_(problem((8, 10))[0]), *problem((8, 10))[1:], **options)
    assert bound
    assert not replayed


def test_descriptions_are_forgotten_when_there_are_many(launches, monkeypatch):
    class Compiled:
        def __getitem__(self, grid):
            return None

    monkeypatch.setattr(Recorder, "__getitem__", lambda *_: lambda *a, **k: Compiled())
    kernels._REPLAYS.update(dict.fromkeys(range(257), (None, ())))
    wsl_loss(*(tensor.clone() for tensor in problem((3, 5))))
    assert len(kernels._REPLAYS) == 1


# --- the probe ---


def test_tensors_that_triton_cannot_run_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(backends, "_modules", {})
    with pytest.raises(RuntimeError, match=r"'triton' was forced .* TRITON_INTERPRET=1, got cpu"):
        wsl_loss(*problem((3, 5)))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles no kernel")
def test_probe_launches_no_kernel():
    (tensor,) = on_device(torch.ones(3))
    kernels.probe(tensor)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        kernels.probe(tensor)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    assert not [event for event in profile.events() if event.device_type == cuda]
