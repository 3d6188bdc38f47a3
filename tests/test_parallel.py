"""Classes sharded over real processes: every shard's gradient against that of one process, in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.distributed as dist
from test_linear import NAMES, ROWS, problem
from test_linear import exact as exact_linear
from test_modes import in_processes, joined
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from weighted_soft_labels import reference
from weighted_soft_labels.linear import linear_wsl_loss
from weighted_soft_labels.parallel import Row, Statistics, _merge, vocab_parallel_wsl_loss

SHARDS = {2: (13, 37), 3: (1, 30, 19)}  # of 50 classes
OPTIONS = [
    {},
    {"temperature": 4.0, "label_smoothing": 0.1},
    {"hard_weight": 0.0, "reduction": "sum"},
    {"alpha": 0.0, "reduction": "none", "label_smoothing": 1.0},
    {"reduction": "none", "temperature": 0.7},
]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def logits_of(dtype):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (4 * torch.randn(2, ROWS, 50, generator=generator)).to(dtype)
    target = torch.randint(50, (ROWS,), generator=generator)
    target[3:5] = -100
    student[3], teacher[4] = torch.nan, torch.inf
    student[5, :13] = teacher[
        5, :13
    ] = -torch.inf  # a whole shard is masked, in three processes the first two
    student[5, 13:31] = teacher[5, 13:31] = -torch.inf
    target[5] = 40
    for row in (6, 7, 8):  # sure of the label, both of another class, and both where nobody else is
        student[row, target[row] if row != 7 else 20] += 25
        teacher[row, target[row] if row == 6 else 20] += 26
    return student, teacher, target


def step(function, student, *others, **options):
    student = student.clone().requires_grad_()
    value = function(student, *others, **options)
    (value * torch.linspace(1, 2, value.numel()).view(value.shape).to(value)).sum().backward()
    return value.detach(), student.grad


def sharded_logits(rank, world, group, shard):
    for dtype in FLOATS:
        student, teacher, target = logits_of(dtype)
        budget = (
            1e-10 if dtype == torch.float64 else 4e-6
        )  # the reference itself loses digits where models are sure
        for options in OPTIONS:
            if options.get("label_smoothing"):
                student[5] = teacher[5] = 0.0  # a masked class makes the smoothed loss infinite
            value, gradient = step(
                reference.wsl_loss, student.double(), teacher.double(), target, **options
            )
            found = step(
                vocab_parallel_wsl_loss,
                student[:, shard],
                teacher[:, shard],
                target,
                group=group,
                **options,
            )
            torch.testing.assert_close(found[0].double(), value, rtol=budget, atol=budget)
            assert found[1].dtype == dtype
            largest = gradient[gradient.isfinite()].abs().max().item()
            rounding = torch.finfo(dtype).eps
            assert_close = torch.testing.assert_close
            assert_close(
                found[1].double(),
                gradient[:, shard],
                rtol=rounding,
                atol=budget * largest + 6e-8 * (rounding > 6e-8),
            )
            every = [torch.empty_like(found[0]) for _ in range(world)]
            dist.all_gather(every, found[0], group=group)
            assert all(torch.equal(other, found[0]) for other in every)  # replicated, to the bit


def weight_is_exact(group, shard):
    """At teacher cross-entropies from 1e-2 to 1e-9, of a leader in any shard."""
    margin = torch.linspace(4, 22, 40)
    for label in (0, 20, 49):
        student, teacher = torch.zeros(2, 40, 50).unbind(0)
        teacher[:, label], student[:, label] = margin, margin - 0.5
        target = torch.full((40,), label)
        options = {"hard_weight": 0.0, "alpha": 1.0, "temperature": 1.0, "reduction": "none"}
        value, gradient = step(
            reference.wsl_loss, student.double(), teacher.double(), target, **options
        )
        found = step(
            vocab_parallel_wsl_loss,
            student[:, shard],
            teacher[:, shard],
            target,
            group=group,
            **options,
        )
        torch.testing.assert_close(found[0].double(), value, rtol=2e-6, atol=0)
        torch.testing.assert_close(found[1].double(), gradient[:, shard], rtol=1e-5, atol=1e-17)


def sharded_layers(group, shard):
    for dtype in FLOATS:
        for options in OPTIONS:
            tensors = problem(dtype)
            upstream = torch.linspace(1, 2, ROWS) if options.get("reduction") == "none" else 3.0
            value, expected = exact_linear(tensors, upstream, **options)
            own = {
                name: x[shard] if name.endswith(("weight", "bias")) else x
                for name, x in tensors.items()
            }
            leaf = {name: own[name].detach().clone().requires_grad_() for name in NAMES}
            found = linear_wsl_loss(**own | leaf, **options, chunk_size=5, group=group)
            (found * upstream).sum().backward()
            budget, rounding = 1e-12 if dtype == torch.float64 else 5e-6, torch.finfo(dtype).eps
            torch.testing.assert_close(found.double(), value, rtol=budget, atol=budget)
            for name, x in leaf.items():
                part = expected[name] if name == "student_input" else expected[name][shard]
                largest = expected[name].abs().max().item()
                torch.testing.assert_close(
                    x.grad.double(), part, rtol=rounding, atol=budget * largest
                )


def compiled(group, shard):
    student, teacher, target = logits_of(torch.float32)
    inputs = (student[:, shard], teacher[:, shard], target)
    expected = step(vocab_parallel_wsl_loss, *inputs, group=group)
    function = torch.compile(
        lambda *inputs: vocab_parallel_wsl_loss(*inputs, group=group), fullgraph=True
    )
    torch.testing.assert_close(step(function, *inputs), expected, equal_nan=True)


def refusals(rank, group, shard):
    """On every process, so that none waits for another."""
    student, teacher, target = logits_of(torch.float32)
    student, teacher = student[:, shard], teacher[:, shard]
    with pytest.raises(ValueError, match="each the same classes of student and teacher"):
        vocab_parallel_wsl_loss(student[:, rank:], teacher, target, group=group)
    with pytest.raises(ValueError, match="all processes must hold the same rows"):
        vocab_parallel_wsl_loss(*(x[: 5 + rank] for x in (student, teacher, target)), group=group)
    with pytest.raises(IndexError, match=re.escape("[0, 50) or ignore_index (-100), got 50")):
        vocab_parallel_wsl_loss(student, teacher, target.where(target > 0, 50), group=group)
    with pytest.raises(TypeError, match="class indices"):
        vocab_parallel_wsl_loss(student, teacher, teacher.softmax(1), group=group)
    mesh, tensors = init_device_mesh("cpu", (dist.get_world_size(group),)), problem()
    with pytest.raises(TypeError, match=re.escape("got a DTensor: pass .full_tensor(), or")):
        linear_wsl_loss(
            **tensors
            | {"student_weight": distribute_tensor(tensors["student_weight"], mesh, [Shard(0)])}
        )
    with pytest.raises(TypeError, match=re.escape("got a DTensor: pass .to_local()")):
        vocab_parallel_wsl_loss(
            distribute_tensor(student, mesh, [Shard(1)]), teacher, target, group=group
        )
    student = student.clone().requires_grad_()
    value = vocab_parallel_wsl_loss(student, teacher, target, group=group)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"weighted_soft_labels\.reference"):
        gradient.sum().backward()


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, tensors, **options):
        return linear_wsl_loss(**tensors | {"student_weight": self.weight}, **options)


def data_parallel_with_a_rank_that_has_nothing_to_learn_from(rank, world):
    """The sum over the rank's rows divided by the global count; DDP averages, hence times the number of ranks."""
    tensors = problem()
    tensors["target"][10:] = -100  # all rows of the last rank
    _, expected = exact_linear(tensors)
    bounds = [0, 5, 10, ROWS] if world == 3 else [0, 10, ROWS]
    part = slice(bounds[rank], bounds[rank + 1])
    rows = {name: tensors[name][part] for name in ("student_input", "teacher_input", "target")}
    parallel = nn.parallel.DistributedDataParallel(Head(tensors["student_weight"]))
    tokens = (rows["target"] != -100).sum()
    dist.all_reduce(tokens)
    (parallel(tensors | rows, reduction="sum") * world / tokens).backward()
    found = parallel.module.weight.grad.double()
    torch.testing.assert_close(found, expected["student_weight"], rtol=1e-4, atol=1e-6)


def everything(rank, world, folder):
    joined(rank, world, folder)
    group, begin = dist.new_group(list(range(world))), sum(SHARDS[world][:rank])
    shard = slice(begin, begin + SHARDS[world][rank])
    sharded_logits(rank, world, group, shard)
    sharded_layers(group, shard)
    weight_is_exact(group, shard)
    data_parallel_with_a_rank_that_has_nothing_to_learn_from(rank, world)
    if world == 2:
        refusals(rank, group, shard)
        compiled(group, shard)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_shards_of_real_processes_are_one_process(world, tmp_path):
    in_processes(everything, world, tmp_path)


def test_a_group_of_one_is_one_process(tmp_path):
    """Within the process of the tests, so that what measures coverage sees it."""
    joined(0, 1, tmp_path)
    try:
        sharded_logits(0, 1, dist.group.WORLD, slice(None))
        sharded_layers(dist.group.WORLD, slice(None))
    finally:
        dist.destroy_process_group()


def test_merged_statistics_are_those_of_all_classes_together():
    """However they are divided, and where leaders tie."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 20, 4, generator=generator).double()).round().unbind()
    zero, one = student.new_zeros(()), student.new_ones(())

    def merged(rows):
        return _merge(
            Statistics(
                *(Row(x[rows], zero, zero, zero * x[rows]) for x in (student, teacher)),
                zero,
                zero,
                one,
            ),
            2.0,
        )[0]

    whole = merged(slice(None))
    for cut in (1, 7, 19):
        a, b = merged(slice(cut)), merged(slice(cut, None))
        rows = (
            Row(*map(torch.stack, zip(*pair)))
            for pair in ((a.student, b.student), (a.teacher, b.teacher))
        )
        others = (torch.stack(pair) for pair in zip(a[2:], b[2:]))
        found, _ = _merge(Statistics(*rows, *others), 2.0)
        torch.testing.assert_close(found, whole)
    z = student - student.amax(0)
    torch.testing.assert_close(whole.student.rest, z.exp().sum(0) - 1)
    torch.testing.assert_close(whole.dot, ((teacher - teacher.amax(0)).div(2).exp() * z).sum(0))
    assert math.isclose(whole.classes[0], 20)
