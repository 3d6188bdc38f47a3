"""Classes sharded over real processes, judged by the reference in float64 in one process."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from processes import in_processes, joined
from test_linear import NAMES, ROWS, problem
from test_linear import exact as exact_linear
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from weighted_soft_labels import reference
from weighted_soft_labels.backends import eager
from weighted_soft_labels.linear import linear_wsl_loss
from weighted_soft_labels.parallel import vocab_parallel_wsl_loss

SHARDS = {2: (13, 37), 3: (1, 30, 19), 4: (0, 20, 0, 30)}  # of 50 classes
OPTIONS = [
    {},
    {"temperature": 4.0, "label_smoothing": 0.1},
    {"hard_weight": 0.0, "reduction": "sum"},
    {"alpha": 0.0, "reduction": "none", "label_smoothing": 1.0},
    {"reduction": "none", "temperature": 0.7},
    {"balance": True},
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
            computed = step(
                vocab_parallel_wsl_loss,
                student[:, shard],
                teacher[:, shard],
                target,
                group=group,
                **options,
            )
            torch.testing.assert_close(computed[0].double(), value, rtol=budget, atol=budget)
            assert computed[1].dtype == dtype
            largest = gradient[gradient.isfinite()].abs().max().item()
            rounding = torch.finfo(dtype).eps
            assert_close = torch.testing.assert_close
            assert_close(
                computed[1].double(),
                gradient[:, shard],
                rtol=rounding,
                atol=budget * largest + 6e-8 * (rounding > 6e-8),
            )
            every = [torch.empty_like(computed[0]) for _ in range(world)]
            dist.all_gather(every, computed[0], group=group)
            assert all(torch.equal(other, computed[0]) for other in every)  # replicated, to the bit


def weight_is_exact(group, shard):
    """Teacher cross-entropies from 1e-2 to 1e-9, the top class in any shard."""
    margin = torch.linspace(4, 22, 40)
    for label in (0, 20, 49):
        student, teacher = torch.zeros(2, 40, 50).unbind(0)
        teacher[:, label], student[:, label] = margin, margin - 0.5
        target = torch.full((40,), label)
        options = {"hard_weight": 0.0, "alpha": 1.0, "temperature": 1.0, "reduction": "none"}
        value, gradient = step(
            reference.wsl_loss, student.double(), teacher.double(), target, **options
        )
        computed = step(
            vocab_parallel_wsl_loss,
            student[:, shard],
            teacher[:, shard],
            target,
            group=group,
            **options,
        )
        torch.testing.assert_close(computed[0].double(), value, rtol=2e-6, atol=0)
        torch.testing.assert_close(computed[1].double(), gradient[:, shard], rtol=1e-5, atol=1e-17)


def own_classes(tensors, shard):
    return {
        name: x[shard] if name.endswith(("weight", "bias")) else x for name, x in tensors.items()
    }


def sharded_layers(group, shard):
    for dtype in FLOATS:
        for options in (*OPTIONS, {"student_softcap": 3.0, "teacher_logit_scale": 2.0}):
            tensors = problem(dtype)
            upstream = torch.linspace(1, 2, ROWS) if options.get("reduction") == "none" else 3.0
            value, expected = exact_linear(tensors, upstream, **options)
            own = own_classes(tensors, shard)
            leaf = {name: own[name].detach().clone().requires_grad_() for name in NAMES}
            computed = linear_wsl_loss(**own | leaf, **options, chunk_size=5, group=group)
            (computed * upstream).sum().backward()
            budget, rounding = 1e-12 if dtype == torch.float64 else 5e-6, torch.finfo(dtype).eps
            torch.testing.assert_close(computed.double(), value, rtol=budget, atol=budget)
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


def expect(error, message, function, *arguments, **options):
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments, **options)


def refusals(rank, world, group, shard):
    """Every process raises, so that none waits for another."""
    student, teacher, target = logits_of(torch.float32)
    student, teacher = student[:, shard], teacher[:, shard]

    def refused(error, message, *arguments, **options):
        expect(error, message, vocab_parallel_wsl_loss, *arguments, group=group, **options)

    message = "each the same classes of student and teacher"
    refused(ValueError, message, student[:, rank:], teacher, target)
    refused(ValueError, message, student[:, :0], teacher[:, :0], target)
    rows = slice(5 + rank)
    refused(ValueError, "must hold the same rows", student[rows], teacher[rows], target[rows])
    message = "[0, 50) or ignore_index (-100), got 50"
    refused(IndexError, message, student, teacher, target.where(target > 0, 50))
    refused(TypeError, "class indices", student, teacher, teacher.softmax(1))
    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(student, mesh, [Shard(1)])
    refused(TypeError, "got a DTensor: pass .to_local()", sharded, teacher, target)
    student = student.clone().requires_grad_()
    value = vocab_parallel_wsl_loss(student, teacher, target, group=group)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"weighted_soft_labels\.reference"):
        gradient.sum().backward()
    tensors = problem()
    weight = distribute_tensor(tensors["student_weight"], mesh, [Shard(0)])
    message = "got a DTensor: pass .full_tensor(), or"
    expect(TypeError, message, linear_wsl_loss, **tensors | {"student_weight": weight})


def errors_of_one_process(rank, world, group, shard):
    """The last process errs. It raises its own error, the others raise one that names it."""
    last = world - 1
    student, teacher, target = logits_of(torch.float32)
    inputs = {"student_logits": student[:, shard], "teacher_logits": teacher[:, shard]}
    inputs["target"] = target
    same = "all processes must pass the same options and dtypes"
    named = f"process [{last}] of the group"
    label = target.where(target > 0, 50)
    released = student[:, shard].clone()
    released.untyped_storage().resize_(0)
    for changes, error, message, others, elsewhere in (
        ({"temperature": -1.0}, ValueError, "temperature must be", RuntimeError, named),
        ({"student_logits": None}, TypeError, "must be a Tensor", RuntimeError, named),
        ({"target": target[:5]}, ValueError, "got (5,)", RuntimeError, named),
        ({"target": label}, IndexError, "got 50", RuntimeError, named),
        ({"student_logits": released}, ValueError, "must lie in its storage", RuntimeError, named),
        ({"temperature": 4.0}, ValueError, same, ValueError, same),
        ({"reduction": "sum"}, ValueError, same, ValueError, same),
        ({"ignore_index": -1}, ValueError, same, ValueError, same),
        ({"student_logits": student[:, shard].double()}, ValueError, same, ValueError, same),
    ):
        if rank == last:
            arguments = inputs | changes
            expect(error, message, vocab_parallel_wsl_loss, **arguments, group=group)
        else:
            expect(others, elsewhere, vocab_parallel_wsl_loss, **inputs, group=group)
    assert vocab_parallel_wsl_loss(**inputs, group=group, reduction="sum").dim() == 0


def errors_of_one_process_with_layers(rank, world, group, shard):
    last = world - 1
    tensors = problem()
    own = own_classes(tensors, shard)
    same = "all processes must pass the same options and dtypes"
    named = f"process [{last}] of the group"
    wants = tensors["student_input"].clone().requires_grad_()
    for changes, error, message, others, elsewhere in (
        ({"chunk_size": 0}, ValueError, "chunk_size must be", RuntimeError, named),
        ({"student_bias": torch.zeros(9)}, ValueError, "must be (..., H)", RuntimeError, named),
        ({"student_softcap": -1.0}, ValueError, "student_softcap must", RuntimeError, named),
        ({"chunk_size": 3}, ValueError, same, ValueError, same),
        ({"teacher_logit_scale": 3.0}, ValueError, same, ValueError, same),
        ({"student_input": wants}, ValueError, same, ValueError, same),
    ):
        if rank == last:
            expect(error, message, linear_wsl_loss, **own | changes, group=group)
        else:
            expect(others, elsewhere, linear_wsl_loss, **own, group=group)


def groups_without_this_process(rank):
    student, teacher, target = logits_of(torch.float32)
    other = dist.new_group([0])
    for group in (None, dist.GroupMember.NON_GROUP_MEMBER, *([other] if rank else [])):
        message = "of which this process is a member, for example torch.distributed.group.WORLD"
        inputs = student, teacher, target
        expect(ValueError, message, vocab_parallel_wsl_loss, *inputs, group=group)
        if group is not None:
            expect(ValueError, message, linear_wsl_loss, **problem(), group=group)
    if rank == 0:
        assert vocab_parallel_wsl_loss(*inputs, group=other, reduction="none").shape == (ROWS,)


def chunks_do_not_depend_on_the_classes_of_one_process(rank, world, group):
    """With 1000 and 1001 classes the default number of rows per chunk would differ."""
    generator = torch.Generator().manual_seed(0)
    classes = [1000, 1001, 0, 7][:world]
    begin = sum(classes[:rank])
    x, teacher_x = torch.randn(2, 3000, 8, generator=generator).unbind()
    weight, teacher_weight = torch.randn(2, sum(classes), 8, generator=generator).unbind()
    target = torch.randint(sum(classes), (3000,), generator=generator)
    whole = x, weight, teacher_x, teacher_weight, target
    expected = linear_wsl_loss(*whole)
    shard = slice(begin, begin + classes[rank])
    result = linear_wsl_loss(
        x, weight[shard], teacher_x, teacher_weight[shard], target, group=group
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, tensors, **options):
        return linear_wsl_loss(**tensors | {"student_weight": self.weight}, **options)


def data_parallel_with_a_rank_that_has_nothing_to_learn_from(rank, world):
    """DDP averages over ranks, so the sum is divided by the global count times the ranks."""
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
    computed = parallel.module.weight.grad.double()
    torch.testing.assert_close(computed, expected["student_weight"], rtol=1e-4, atol=1e-6)


def everything(rank, world, folder):
    joined(rank, world, folder)
    group, begin = dist.new_group(list(range(world))), sum(SHARDS[world][:rank])
    shard = slice(begin, begin + SHARDS[world][rank])
    sharded_logits(rank, world, group, shard)
    sharded_layers(group, shard)
    weight_is_exact(group, shard)
    chunks_do_not_depend_on_the_classes_of_one_process(rank, world, group)
    errors_of_one_process(rank, world, group, shard)
    errors_of_one_process_with_layers(rank, world, group, shard)
    if world < 4:
        data_parallel_with_a_rank_that_has_nothing_to_learn_from(rank, world)
    if world == 2:
        refusals(rank, world, group, shard)
        groups_without_this_process(rank)
        compiled(group, shard)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 4])
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
    """However the classes are divided, and where top classes tie."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 4, 20, generator=generator).double()).round().unbind()
    label = torch.tensor([0, 5, 12, 19])
    options = eager.Options(label_smoothing=0.1)

    def statistics(begin, end):
        index = label[None, None] - begin
        here = (index >= 0) & (index < end - begin)
        own = eager.Label(index.where(here, 0), here.double(), None)
        logits = (x.t()[None, begin:end] for x in (student, teacher))
        return eager.statistics(*logits, own, options)[0]

    whole = statistics(0, 20)
    for cut in (1, 7, 19):
        parts = statistics(0, cut), statistics(cut, 20)
        shards = eager.Statistics(*(torch.cat(pair) for pair in zip(*parts)))
        merged, _ = eager.merge(shards, options.temperature)
        torch.testing.assert_close(tuple(merged), tuple(whole))
    assert whole.classes.eq(20).all()
    z = (student - student.amax(1, keepdim=True)).t()
    torch.testing.assert_close(whole.others[0, 0], z.exp().sum(0) - 1)
    soft = (teacher - teacher.amax(1, keepdim=True)).t().div(2).exp()
    torch.testing.assert_close(whole.dot[0, 0], (soft * z).sum(0))
