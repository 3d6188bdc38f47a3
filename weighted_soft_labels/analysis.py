"""What the paper measures: terms of the loss, regularization samples, bias and variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weighted_soft_labels import _options
from weighted_soft_labels._operator import distill
from weighted_soft_labels._options import Options, check_options, check_tensors, index_shape

__all__ = ["BiasVariance", "WSLTerms", "bias_variance", "regularization_samples", "wsl_terms"]

CHUNK = 2**16  # logits per block; about ten buffers of this size then fit into the cache


class WSLTerms(NamedTuple):
    """The terms of the loss of every element; see :func:`wsl_terms`."""

    student_ce: Tensor
    teacher_ce: Tensor
    weight: Tensor
    soft: Tensor


class BiasVariance(NamedTuple):
    """The two parts of the mean cross-entropy of every element; see :func:`bias_variance`."""

    bias: Tensor
    variance: Tensor


@torch.no_grad()
def wsl_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 2.0,
    ignore_index: int = -100,
) -> WSLTerms:
    r"""Return the terms of :func:`weighted_soft_labels.wsl_loss` for every element.

    For student logits s and teacher logits t::

        weight = 1 - exp(-student_ce / (teacher_ce + 1e-7))
        soft   = -sum_c softmax(t / T)_c * log_softmax(s / T)_c
        loss   = hard_weight * student_ce + alpha * T^2 * weight * soft    without label smoothing

    Args:
        student_logits, teacher_logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float16,
            bfloat16, float32 or float64.
        target: Class indices, shaped like the logits without the class dimension, or class
            probabilities, shaped like the logits.
        temperature: T > 0 of `soft`. The cross-entropies and the weight are at temperature 1.
        ignore_index: Elements with this index target are 0 in all four terms.

    Returns:
        ``WSLTerms(student_ce, teacher_ce, weight, soft)``, float32, each shaped like an index
        target. Cross-entropies and soft term are in nats, >= 0; the weight is in [0, 1].

    Raises:
        TypeError, ValueError, IndexError: As :func:`weighted_soft_labels.wsl_loss`.

    Source:
        Zhou et al., ICLR 2021, and its official code, which computes the weight at temperature 1.

    Example:
        >>> import torch
        >>> from weighted_soft_labels.analysis import wsl_terms
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> terms = wsl_terms(logits, logits, torch.tensor([0, 0]))
        >>> terms.weight  # a student that equals its teacher: 1 - 1/e
        tensor([0.6321, 0.6321])
    """
    checked = check_options(Options(temperature=temperature, ignore_index=ignore_index))
    check_tensors(student_logits, teacher_logits, target)
    options = Options(checked.temperature, ignore_index=checked.ignore_index, reduction="terms")
    terms = distill(student_logits, teacher_logits, target, options)
    return WSLTerms(*terms.float().unbind(0))


@torch.no_grad()
def regularization_samples(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 2.0,
    ignore_index: int = -100,
    rule: str = "magnitude",
) -> Tensor:
    r"""Return which elements are regularization samples.

    On such an element, distillation acts more on the variance than on the bias. With the
    distillation loss ``L_kd = T^2 * CE(s / T, softmax(t / T))`` and the student's logit ``s_y`` of
    the label, ``a = d CE / d s_y`` stands for the bias and ``b = d (L_kd - CE) / d s_y`` for the
    variance. Let p be the label's probability at temperature 1, and p' at T::

        a = p_s - 1 <= 0        b = g - a        g = d L_kd / d s_y = T * (p'_s - p'_t)
        "magnitude"  |b| > |a|   <=>   g > 0   or   g < 2 * a
        "opposing"   g > 0       <=>   the soft term lowers the label's logit; the hard never does
        "signed"     b > a       <=>   g > 2 * a

    A student that equals its teacher has g = 0. At T = 1, "magnitude" equals "opposing", "signed"
    holds wherever a < 0, and g > 0 means ``student_ce < teacher_ce``: the weight of the loss is
    below 1 - 1/e, up to the 1e-7 in the weight.

    Args:
        student_logits, teacher_logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float16,
            bfloat16, float32 or float64. ``-inf`` masks a class.
        target: Class indices, shaped like the logits without the class dimension, or class
            probabilities q, shaped like the logits. For probabilities, a and b are derivatives
            along q: ``a = sum_c q_c * (p_c - q_c)``, ``g = T * sum_c q_c * (p'_s,c - p'_t,c)``.
            Then a may be > 0, and only the left-hand sides above apply.
        temperature: T > 0 of `L_kd`. Default 2, as in the loss.
        ignore_index: Elements with this index target are False, whatever their logits are.
        rule: ``"magnitude"`` (default), ``"opposing"`` or ``"signed"``. We could not verify which
            one the paper uses.

    Returns:
        A bool tensor, shaped like an index target. Computed in float64 (on MPS: float32), without
        cancellation for confident models. False where a logit is NaN.

    Raises:
        TypeError, ValueError: As :func:`weighted_soft_labels.wsl_loss`; ValueError for `rule`.
        IndexError: On a CPU, an index target names no class. On a GPU, and in compiled code, such
            an element is False.

    Source:
        Zhou et al., ICLR 2021, on samples for which the bias grows ("opposing") and the variance
        shrinks. Teachers trained with label smoothing have more of them.

    Example:
        >>> import torch
        >>> from weighted_soft_labels.analysis import regularization_samples
        >>> student_logits = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
        >>> teacher_logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> regularization_samples(student_logits, teacher_logits, torch.tensor([0, 0]))
        tensor([ True, False])
    """
    options = check_options(Options(temperature=temperature, ignore_index=ignore_index))
    check_tensors(student_logits, teacher_logits, target)
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    slopes = _slopes_along_target if target.is_floating_point() else _slopes_at_label
    result = target.new_empty(index_shape(student_logits.shape), dtype=torch.bool)
    models = student_logits, teacher_logits
    for box, block_target, logits in _blocks(models, target, options.ignore_index):
        student, teacher = logits - logits.amax(-1, keepdim=True)
        g, excess = slopes(block_target, student, teacher, options.temperature)
        result[box] = RULES[rule](g, excess).view(result[box].shape)
    return result


@torch.no_grad()
def bias_variance(logits: Tensor, target: Tensor) -> BiasVariance:
    r"""Return bias and variance of the cross-entropy of M models, for every element.

    With ``yhat_m = softmax(logits_m)``, the mean prediction ``ybar`` is the normalised geometric
    mean of all ``yhat_m``, which is the softmax of the mean logits::

        bias     = CE(ybar, y)              = -log ybar_y, or -sum_c q_c log ybar_c
        variance = mean_m KL(ybar || yhat_m)
        mean_m CE(yhat_m, y) = bias + variance

    The bias contains the noise of the labels: for class probabilities q, the bias is KL(q || ybar)
    plus the entropy of q. The theory is about random training sets, so train the models on disjoint
    parts of the data.

    Args:
        logits: ``(M, C)``, ``(M, N, C)`` or ``(M, N, C, d1, ..., dk)``, M >= 1, with any strides;
            float16, bfloat16, float32 or float64. The first dimension is the models.
        target: Class indices, shaped like the logits of one model without the class dimension, or
            class probabilities, shaped like the logits of one model, with sum 1.

    Returns:
        ``BiasVariance(bias, variance)``, each shaped like an index target, in nats, >= 0. float32,
        or float64 for float64 logits; computed in float64 (on MPS: float32). Models that agree have
        variance 0 exactly. ``-inf`` logits are legal: a class that any model masks has ``ybar`` 0,
        and the bias is inf if that class is the label. Both are inf if the models have no class in
        common. NaN where a logit is NaN.

    Raises:
        TypeError: `logits` or `target` is not a tensor, or its dtype is not one of the above.
        ValueError: There is no model or no class, or shapes or devices do not fit together.
        IndexError: On a CPU, an index target names no class; there is no index to ignore. On a GPU,
            and in compiled code, such an element is NaN.

    Source:
        Heskes, "Bias/Variance Decompositions for Likelihood-Based Estimators", Neural Computation
        1998; Yang et al., "Rethinking Bias-Variance Trade-off for Generalization of Neural
        Networks", ICML 2020; Zhou et al., ICLR 2021.

    Example:
        >>> import torch
        >>> from weighted_soft_labels.analysis import bias_variance
        >>> logits = torch.tensor([[[2.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [3.0, 0.0]]])  # M = N = 2
        >>> bias_variance(logits, torch.tensor([0, 0]))
        BiasVariance(bias=tensor([0.6931, 0.0486]), variance=tensor([0.4338, 0.0000]))
    """
    _check_models(logits, target)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    bias = logits.new_empty(index_shape(logits.shape[1:]), dtype=dtype)
    variance = torch.empty_like(bias)
    for box, block_target, rows in _blocks(logits.unbind(0), target):
        bias[box], variance[box] = _decompose(block_target, rows).view(2, *bias[box].shape)
    return BiasVariance(bias, variance)


def _check_models(logits: Tensor, target: Tensor) -> None:
    _options.check_kind("logits", logits)
    _options.check_kind("target", target)
    shape = logits.shape
    if logits.dtype not in _options.DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    expected = None
    if len(shape) < 2:
        expected = "be (M, C), (M, N, C) or (M, N, C, d1, ..., dk)"
    elif shape[0] == 0:
        expected = "have at least one model"
    elif _options.class_count(shape[1:]) == 0:
        expected = "have at least one class"
    if expected:
        raise ValueError(f"logits must {expected}, got shape {tuple(shape)}")
    if target.device != logits.device:
        raise ValueError(
            f"logits and target must be on the same device, got {logits.device} and {target.device}"
        )
    check_tensors(logits[0], logits[0], target)


# --- blocks of elements, as rows of classes ---


def _blocks(
    models: Sequence[Tensor], target: Tensor, ignore_index: int | None = None
) -> Iterator[tuple[tuple[slice, ...], Tensor, Tensor]]:
    """Yield blocks of n elements: box, target and the logits of all models (M, n, C).

    The target is class probabilities (n, C) or labels (n, 1). The logits of elements whose label is
    ignored or names no class are NaN.
    """
    if not torch.compiler.is_compiling():
        models = [_options.in_memory("logits", x) for x in models]
        target = _options.in_memory("target", target)
    classes = _options.class_count(models[0].shape)
    for box in _boxes(index_shape(models[0].shape), CHUNK // (len(models) * classes)):
        logits = torch.stack([_rows(each, box) for each in models])
        if target.is_floating_point():
            yield box, _rows(target, box), logits
        else:
            label, valid = _labels(target[box], classes, ignore_index)
            yield box, label, logits.where(valid, math.nan)


def _boxes(shape: tuple[int, ...], size: int) -> Iterator[tuple[slice, ...]]:
    """Cut a tensor of this shape into boxes of at most `size` entries, but at least one."""
    if not shape:
        yield ()
        return
    step = max(1, size // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        for box in _boxes(shape[1:], size):
            yield (slice(start, start + step), *box)


def _rows(logits: Tensor, box: tuple[slice, ...]) -> Tensor:
    """Return the elements of a box as (n, C), in float64 (on MPS, which lacks it, float32).

    Contiguous, so that equal rows are summed in the same order whatever their strides are.
    """
    part = logits.movedim(min(1, logits.dim() - 1), -1)[box]
    dtype = torch.float32 if part.device.type == "mps" else torch.float64
    return part.reshape(-1, part.shape[-1]).to(dtype).contiguous()


def _labels(target: Tensor, classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return labels, 0 where invalid, and validity, both (n, 1). Raises IndexError on a CPU."""
    label = _options.signed(target).long().reshape(-1, 1)
    valid = (label >= 0) & (label < classes)
    wrong, legal = ~valid, f"[0, {classes})"
    if ignore_index is not None:
        counted = label != ignore_index
        wrong, valid = wrong & counted, valid & counted
        legal += f" or ignore_index ({ignore_index})"
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and wrong.any():
        raise IndexError(f"target must hold class indices in {legal}, got {int(label[wrong][0])}")
    return label.where(valid, 0), valid


# --- regularization samples: the signs of g and excess = g - 2 * a, from rows with maximum 0 ---

RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda g, excess: g.sign() * excess.sign() > 0,  # |g - a| > |a|
    "opposing": lambda g, excess: g > 0,
    "signed": lambda g, excess: excess > 0,
}


def _slopes_at_label(label: Tensor, student: Tensor, teacher: Tensor, T: float) -> Tensor:
    """Return two numbers with the signs of g and of g - 2 a.

    They are l'_s - l'_t and log(-2 a) - log(-g). The log-odds l = log(p / (1 - p)) are exact for p
    near 1. With l' at T, ``-g = T * p'_t * (1 - p'_s) * (1 - exp(l'_s - l'_t))``.
    """
    s, t = _log_odds(student, label, T), _log_odds(teacher, label, T)
    difference = (-torch.expm1(s - t)).log().masked_fill(s == t, -math.inf)  # inf - inf is NaN
    log_minus_g = math.log(T) + F.logsigmoid(t) + F.logsigmoid(-s) + difference
    log_minus_2a = math.log(2) + F.logsigmoid(-_log_odds(student, label, 1.0))
    excess = torch.where(s > t, math.inf, log_minus_2a - log_minus_g)  # g > 0 >= a
    return torch.stack((s - t, excess))


def _log_odds(z: Tensor, label: Tensor, T: float) -> Tensor:
    """Return the label's log-odds, without cancellation: z_y is 0, or z_y < 0 <= logsumexp."""
    others = z.scatter(-1, label, -math.inf)
    return z.gather(-1, label).squeeze(-1) / T - (others / T).logsumexp(-1)


def _slopes_along_target(q: Tensor, student: Tensor, teacher: Tensor, T: float) -> Tensor:
    """Return g and g - 2 a by definition; both are 0 if all probabilities but one underflow."""
    p, p_student, p_teacher = (x.softmax(-1) for x in (student, student / T, teacher / T))
    a = _derivative(q, q.sum(-1, keepdim=True) * p - q, p)
    g = T * _derivative(q, p_student - p_teacher, p_student + p_teacher)
    return torch.stack((g, g - 2 * a))


def _derivative(q: Tensor, gradient: Tensor, p: Tensor) -> Tensor:
    """Return ``sum_c q_c * gradient_c`` without the likeliest class, whose entry cancels.

    The gradient sums to 0, so q may be shifted, here by q of the likeliest class.
    """
    return ((q - q.gather(-1, p.argmax(-1, keepdim=True))) * gradient).sum(-1)


# --- bias and variance ---


def _decompose(target: Tensor, logits: Tensor) -> Tensor:
    """Return bias and variance (2, n) for labels (n, 1) or probabilities (n, C).

    Confident models lose no digits: log Z is log1p of the sum without the top class, and
    ``KL(ybar || yhat) = sum_c ybar_c * (exp(d_c) - 1 - d_c)`` with ``d = log yhat - log ybar`` has
    terms >= 0 only. Both forms of KL agree because ybar and yhat sum to 1.
    """
    z = logits - logits.amax(-1, keepdim=True)
    lowest = z.amin(0)
    # A masked class stays masked. Differences from the first model are 0 where the models agree.
    mean = torch.where(lowest == -math.inf, lowest, z[0] + (z - z[0]).mean(0))
    z = torch.cat((z, mean[None]))
    top, index = z.max(-1, keepdim=True)
    z = z - top
    e = z.exp()
    others = e.scatter(-1, index, 0.0).sum(-1, keepdim=True)
    p, log_sum = e / (1 + others), others.log1p()

    q = target
    if not q.is_floating_point():
        q = torch.zeros_like(mean).scatter(-1, target, 1.0)
    label_z = torch.where(q == 0, 0.0, q * z[-1]).sum(-1)
    bias = q.sum(-1) * log_sum[-1].squeeze(-1) - label_z
    log_ratio = (z[:-1] - z[-1]) - (log_sum[:-1] - log_sum[-1])
    variance = _divergence(p[-1], p[:-1], log_ratio).sum(-1).mean(0)
    no_common_class = (top[-1] == -math.inf).squeeze(-1)
    return torch.stack((bias, variance)).masked_fill(no_common_class, math.inf)


def _divergence(ybar: Tensor, yhat: Tensor, log_ratio: Tensor) -> Tensor:
    """Return ``ybar * (exp(d) - 1 - d)`` for ``d = log yhat - log ybar``.

    For large d, exp(d) may overflow, but ``ybar * exp(d)`` is yhat.
    """
    near = ybar * (torch.expm1(log_ratio) - log_ratio)
    far = torch.where(ybar == 0, yhat, yhat - ybar * (1 + log_ratio))
    return torch.where((ybar == 0) | (log_ratio > 1), far, near).clamp(min=0)
