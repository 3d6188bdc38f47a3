"""The operator of the loss, and the autograd boundary around it.

    wsl_loss -> distill
                  |
                  |- eager code: EagerLoss ---------------------------.
                  |                                                   v
                  '- compiled, exported or traced code,             loss_and_gradient -> backend.run
                     torch.func, tensor subclasses:                   ^
                     SavedGradients -> weighted_soft_labels::forward -'

EagerLoss and SavedGradients are autograd Functions that do the same. EagerLoss is for plain eager
code, where it makes a small step much faster.

The forward pass computes the gradient for an upstream gradient of 1. Autograd saves that gradient,
and nothing else of the size of the logits. The backward pass multiplies it by the upstream
gradient.

float16: a gradient divided by the number of elements would underflow before a gradient scaler
multiplies it. So we save it undivided and times a power of two. `scale`, in float32, is the factor
that undoes both. Other dtypes have no scale.
"""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from weighted_soft_labels import backends
from weighted_soft_labels._options import Options, balances, in_memory, loss_shape, signed
from weighted_soft_labels.backends import eager


def distill(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, group: str | None = None
) -> Tensor:
    """Return the loss; `group` names the processes over which the classes are sharded."""
    # Detached, so that the loss does not keep the graphs of teacher and target alive.
    teacher = teacher.detach() if teacher.requires_grad else teacher
    target = target.detach() if target.requires_grad else target
    if group is None and unobserved(student, teacher, target):
        backend = backends.choose(student, teacher, target)
        return run_eagerly(student, teacher, target, options, backend)
    operators = torch.ops.weighted_soft_labels.forward
    if group is not None:
        return dispatch(operators.sharded, student, teacher, target, group, *options)
    # `use_backend` sets a global of the process that compiles. The compiled code gets its value.
    return dispatch(operators.default, student, teacher, target, backends.forced(), *options)


def run_eagerly(
    student: Tensor, teacher: Tensor, target: Tensor, options: Options, backend: ModuleType
) -> Tensor:
    """Return the loss in plain eager code, past the dispatcher."""
    if student.requires_grad and torch.is_grad_enabled():
        loss: Tensor = EagerLoss.apply(student, teacher, target, options, backend)
        return loss
    return loss_and_gradient(student, teacher, target, False, options, backend.run)[0]


def dispatch(operator: Any, student: Tensor, teacher: Any, target: Tensor, *others: Any) -> Tensor:
    """Return the loss by way of the dispatcher."""
    outputs: tuple[Tensor, ...]
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        wanted = False  # the Autograd kernel decides
        outputs = operator(student, teacher, target, wanted, *others)
    else:
        wanted = True  # transforms of torch.func see a Function, but not the Autograd kernel
        outputs = SavedGradients.apply(operator, student, teacher, target, wanted, *others)
    return outputs[0]


_PLAIN = frozenset((Tensor, nn.Parameter))
_included = torch._C._dispatch_tls_is_dispatch_key_included
_PYTHON, _PRE_DISPATCH = torch._C.DispatchKey.Python, torch._C.DispatchKey.PreDispatch


def unobserved(*tensors: Tensor) -> bool:
    """Return whether no compiler, transform or tensor subclass intercepts operators.

    Then `distill` skips the dispatcher, which takes a large part of a small step.
    """
    return (
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, tensors))
        and not _included(_PYTHON)
        and not _included(_PRE_DISPATCH)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


# --- what the operator does ---


def loss_and_gradient(
    student: Tensor, teacher: Tensor, target: Tensor, wanted: bool, options: Options, run: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss, the scale of the gradient and, if `wanted`, the gradient."""
    student = in_memory("student_logits", student)
    teacher = in_memory("teacher_logits", teacher)
    target = signed(in_memory("target", target))
    gradient = empty_gradient(student, target, options) if wanted else None
    power = 0.0
    if gradient is not None and gradient.dtype == torch.float16:
        power = _power_of_two(options)
    operands: Any = student, teacher, target, gradient
    if student.dim() not in (2, 3):
        operands = [_as_matrices(x, student.dim()) for x in operands]
    weight_scale = _weight_scale(operands[:3], options, run) if balances(options) else None
    scaled = _scaled(options, power) if power else options
    loss: Tensor = run(*operands[:3], scaled, operands[3], weight_scale)
    if options.reduction in ("none", "terms"):
        loss = loss.view(loss_shape(options.reduction, student.shape))
    if not power:
        return loss, None, gradient
    scale = student.new_full((), 1 / power, dtype=torch.float32)
    loss = loss * scale
    if options.reduction == "mean":
        count = eager.count(target, None, options.ignore_index)
        loss, scale = loss / count, scale / count.clamp(min=1)
    return loss, scale, gradient


def _weight_scale(operands: Any, options: Options, run: Any) -> Tensor:
    """Return the scale that balances the weights, which takes a pass over the logits."""
    weight = run(*operands, options._replace(reduction="terms"), None)[2]
    return eager.balancing_scale(weight, eager.count(operands[2], None, options.ignore_index))


def _as_matrices(x: Tensor | None, dims: int) -> Tensor | None:
    """View logits of `dims` dimensions, or their target, as (N, C), (N, C, R), (N,) or (N, R)."""
    if x is None:
        return None
    if dims == 1:
        return x[None]
    return x.flatten(2 if x.dim() == dims else 1)  # an index target has no class dimension


def empty_gradient(student: Tensor, target: Tensor, options: Options) -> Tensor:
    """Return an empty gradient with the student's order of dimensions.

    It is contiguous if that order allows no view (N, C, R).
    """
    # Probabilities that add up to much more than 1 would overflow float16 times a power of two.
    # So would the balanced weight of one element in a large batch.
    unbounded = target.is_floating_point() or balances(options)
    wide = student.dtype == torch.float16 and unbounded
    gradient = torch.empty_like(student, dtype=torch.float32 if wide else student.dtype)
    try:
        if student.dim() > 3:
            gradient.view(*student.shape[:2], math.prod(student.shape[2:]))
    except (RuntimeError, ValueError):  # ValueError: fake tensors
        gradient = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    return gradient


def _power_of_two(options: Options) -> float:
    """Return the largest power of two by which no entry of the gradient exceeds 2^15."""
    bound = options.hard_weight + options.alpha * options.temperature
    return 2.0 ** min(100, math.floor(math.log2(2**15 / bound))) if bound else 1.0


def _scaled(options: Options, power: float) -> Options:
    """Scale loss and gradient, exactly, and leave out the division by the number of elements."""
    return options._replace(
        alpha=options.alpha * power,
        hard_weight=options.hard_weight * power,
        reduction="sum" if options.reduction == "mean" else options.reduction,
    )


# --- the autograd boundary ---


def refuse_transforms(*args: Any) -> Any:
    raise NotImplementedError(
        "wsl_loss supports neither vmap (jacrev, hessian) nor forward-mode AD (jvp, jacfwd). "
        "Use weighted_soft_labels.reference.wsl_loss, which does."
    )


def refuse_batched(upstream: Tensor) -> None:
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(upstream) or functorch.is_legacy_batchedtensor(upstream):
        refuse_transforms()


class EagerLoss(Function):
    """The boundary for plain eager code: fewer levels and one output, so less time per step."""

    jvp = vmap = staticmethod(refuse_transforms)  # type: ignore[assignment]

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        options: Options,
        backend: ModuleType,
    ) -> Tensor:
        loss, scale, gradient = loss_and_gradient(
            student, teacher, target, True, options, backend.run
        )
        ctx.multiply_ = getattr(backend, "multiply_", eager.multiply_)
        ctx.dtype = student.dtype
        ctx.save_for_backward(loss, scale, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        loss, scale, gradient = ctx.saved_tensors
        refuse_batched(upstream)
        if torch.is_grad_enabled() or _shared(gradient):
            gradient = multiplied(gradient, upstream, scale, loss)
        else:
            ctx.multiply_(gradient, factor_of(upstream, scale, loss))
        if gradient.dtype != ctx.dtype:  # saved in float32
            gradient = gradient.to(ctx.dtype)
        return gradient, None, None, None, None


# In backward, a saved tensor has two references: autograd's and Python's. A saved-tensor hook that
# keeps the tensor is a third. A hook that replaces the tensor takes autograd's away.
ONE_OWNER = 2
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _shared(gradient: Any) -> bool:
    """Return whether a saved gradient will be used again, so that it must not be written to."""
    capturing = gradient.is_cuda and torch.cuda.is_current_stream_capturing()
    return _graph_is_kept() or gradient._use_count() != ONE_OWNER or capturing


class SavedGradients(Function):
    """The boundary for every other mode: an operator that returns (loss, scale, *gradients).

    ``gradients[i]`` is the gradient of the operator's argument i. Empty tensors stand for None.
    """

    jvp = vmap = staticmethod(refuse_transforms)  # type: ignore[assignment]

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = operator(*arguments)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros of the size of every saved gradient
        ctx.save_for_backward(*output)
        ctx.dtypes = [x.dtype for x in inputs[1 : len(output) - 1] if isinstance(x, Tensor)]
        ctx.arguments = len(inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        loss, scale, *gradients = ctx.saved_tensors
        results = [None] * ctx.arguments
        if upstream is None:
            return tuple(results)
        refuse_batched(upstream)
        for i, gradient in enumerate(gradients, 1):
            if not ctx.needs_input_grad[i]:
                continue
            observed = torch.is_grad_enabled() or not unobserved(gradient, upstream)
            if observed or _shared(gradient):
                gradient = multiplied(gradient, upstream, scale, loss)
            else:
                eager.multiply_(gradient, factor_of(upstream, scale, loss))
            results[i] = gradient.to(ctx.dtypes[i - 1])  # a gradient may be saved in float32
        return tuple(results)


def factor_of(upstream: Tensor, scale: Tensor | None, loss: Tensor) -> Tensor:
    """Return what multiplies the saved gradient: one number, or one for every element."""
    if upstream.dim():
        # The gradient of an ignored element is 0 whatever comes in, but 0 * NaN would be NaN.
        upstream = upstream.masked_fill(loss == 0, 0)
    if scale is None or scale.dim():  # an operator returns an empty tensor for no scale
        return upstream
    return upstream * scale


def multiplied(gradient: Tensor, upstream: Tensor, scale: Tensor | None, loss: Tensor) -> Tensor:
    """Return gradient * upstream * scale, rounded once; refuses to be differentiated."""
    with torch.no_grad():
        factor = factor_of(upstream, scale, loss)
        # A factor without dimensions would be rounded to the gradient's dtype first.
        factor = factor.unsqueeze(min(1, gradient.dim() - 1)) if factor.dim() else factor[None]
        result = (gradient * factor).to(gradient.dtype)
    if torch.is_grad_enabled():
        result = RefuseSecondDerivative.apply(result, loss, upstream)
    return result


class RefuseSecondDerivative(Function):
    """A gradient as a function of the loss and the upstream gradient, which has no derivative."""

    jvp = vmap = staticmethod(refuse_transforms)  # type: ignore[assignment]

    @staticmethod
    def forward(gradient: Tensor, loss: Tensor, upstream: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(
            "wsl_loss cannot be differentiated twice: its gradient is a closed form without a "
            "graph. Use weighted_soft_labels.reference.wsl_loss, which supports create_graph=True."
        )


# --- the operator ---

OPTIONS = (
    "float temperature, float alpha, float hard_weight, float label_smoothing, "
    "int ignore_index, str reduction, bool balance"
)


def _new_library() -> Any:
    try:
        return torch.library.Library("weighted_soft_labels", "DEF")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ImportError(
            "another copy of weighted_soft_labels was imported in this process and owns its "
            "operators: start a new process, and look for a second copy on sys.path"
        ) from error


# importlib.reload executes this file in the same namespace, where the operators live on.
_library: Any = globals().get("_library") or _new_library()
_defined: set[str] = globals().get("_defined", set())


def define(name: str, schema: str, run: Any, fake: Any, autograd: Any) -> None:
    """Register an operator for all devices at once, with its fake form and Autograd kernel.

    The Autograd kernel, and no other, takes the operator as its first argument.
    """
    if name in _defined:
        return
    _defined.add(name)
    _library.define(f"{name}({schema}")
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.weighted_soft_labels, packet), overload or "default")
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, partial(autograd, operator), "Autograd")
    torch.library.register_fake(f"weighted_soft_labels::{name}", fake, lib=_library)
    torch.library.register_vmap(f"weighted_soft_labels::{name}", refuse_transforms, lib=_library)


def operator_forward(
    student: Tensor, teacher: Tensor, target: Tensor, wanted: bool, backend: str, *options: Any
) -> tuple[Tensor, ...]:
    run = backends.choose(student, teacher, target, backend).run
    outputs = loss_and_gradient(student, teacher, target, wanted, Options(*options), run)
    return tensors_only(*outputs)


def tensors_only(loss: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one stands for None."""
    return loss, *(loss.new_empty(0) if x is None else x for x in others)


def fake_forward(
    student: Tensor, teacher: Tensor, target: Tensor, wanted: bool, _: str, *options: Any
) -> tuple[Tensor, ...]:
    wide = torch.float64 in (student.dtype, teacher.dtype)
    checked = Options(*options)
    shape = loss_shape(checked.reduction, student.shape)
    loss = student.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    gradient = empty_gradient(student, target, checked) if wanted else None
    scale = None
    if gradient is not None and gradient.dtype == torch.float16:
        scale = loss.new_empty((), dtype=torch.float32)
    return tensors_only(loss, scale, gradient)


def autograd_kernel(
    operator: Any, student: Tensor, teacher: Any, target: Tensor, wanted: bool, *others: Any
) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():  # `distill` handles those of eager code
        raise NotImplementedError(
            "wsl_loss in a torch.func transform: leave the transform out of the compiled code"
        )
    differentiated = torch.is_grad_enabled() and student.requires_grad
    outputs: tuple[Tensor, ...]
    if differentiated or forward_ad._current_level >= 0:  # forward-mode AD is refused
        wanted = wanted or differentiated
        outputs = SavedGradients.apply(operator, student, teacher, target, wanted, *others)
    else:  # for example, compiled code when it runs
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator(student, teacher, target, wanted, *others)
    return outputs


define(
    "forward",
    f"Tensor student, Tensor teacher, Tensor target, bool wanted, str backend, {OPTIONS}"
    ") -> (Tensor, Tensor, Tensor)",
    operator_forward,
    fake_forward,
    autograd_kernel,
)
