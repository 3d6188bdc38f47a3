"""What the paper measures, for logging, plotting and reuse. Nothing here carries a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weighted_soft_labels._operator import distill
from weighted_soft_labels._options import DTYPES, Options, check_options, check_tensors

__all__ = ["BiasVariance", "WSLTerms", "bias_variance", "regularization_samples", "wsl_terms"]

# Logits at a time, of which there are about ten copies in scratch memory: as many as stay in the cache.
CHUNK = 2**16
RULES = ("magnitude", "opposing", "signed")  # of regularization samples


class WSLTerms(NamedTuple):
    """The parts of the loss of every element; see :func:`wsl_terms`."""

    student_ce: Tensor
    teacher_ce: Tensor
    weight: Tensor
    soft: Tensor


class BiasVariance(NamedTuple):
    """The two parts of the expected cross-entropy of every element; see :func:`bias_variance`."""

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
    r"""The parts of the WSL loss of every element, as :func:`weighted_soft_labels.wsl_loss` computes them.

    ``weight = 1 - exp(-student_ce / (teacher_ce + 1e-7))`` and
    ``soft = -sum_c softmax(t / T)_c * log_softmax(s / T)_c``, so that the loss without label smoothing is
    ``hard_weight * student_ce + alpha * T^2 * weight * soft``.

    Args:
        student_logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float16, bfloat16, float32 or float64.
        teacher_logits: Same shape and device; the dtype may differ.
        target: Class indices shaped like the logits without the class dimension, or class probabilities shaped like
            the logits.
        temperature: T > 0 of `soft`; the cross-entropies and the weight are at temperature 1 whatever it is.
        ignore_index: Elements with this index target are 0 in all four.

    Returns:
        ``WSLTerms(student_ce, teacher_ce, weight, soft)``, each float32 and shaped like an index target:
        cross-entropies in nats, >= 0; the weight in [0, 1]; the soft term in nats, >= 0.

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
    options = check_options(Options(temperature=temperature, ignore_index=ignore_index))
    check_tensors(student_logits, teacher_logits, target)
    terms = distill(student_logits, teacher_logits, target, options._replace(reduction="terms"))
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
    r"""Which elements are regularization samples: distillation pulls more on the variance than on the bias.

    On the student's logit of the true class y, ``a = d CE / d s_y`` stands for the bias and
    ``b = d (L_kd - CE) / d s_y`` for the variance, where ``L_kd = T^2 * CE(s / T, softmax(t / T))``. With p the
    probability of y, at temperature 1 and (primed) at T::

        a = p_s - 1 <= 0        b = g - a        g = d L_kd / d s_y = T * (p'_s - p'_t)
        "magnitude"  |b| > |a|   <=>   g > 0   or   -g > 2 * (1 - p_s)
        "opposing"   g > 0       <=>   the soft term lowers the label's logit, which the hard term never does
        "signed"     b > a       <=>   -g < 2 * (1 - p_s)

    Every element with g > 0 is one by all three rules. At T = 1, ``-g <= 1 - p_s``: the first two are one rule, the
    third holds for every element, and g > 0 says that the student is better than the teacher on this label already,
    ``student_ce < teacher_ce``, or ``weight < 1 - 1/e`` (see :func:`wsl_terms`; up to the 1e-7 that the weight adds to
    the teacher's cross-entropy). A student that equals its teacher has g = 0, at any temperature.

    Of a probability near 1 there is nothing left of ``1 - p``, but all of it in the log-odds,
    ``l = log(p / (1 - p)) = s_y - logsumexp of the other logits``, by which both sides can be told apart however
    confident the models are: ``g > 0 <=> l'_s > l'_t``, and the logarithm of 2 * (1 - p_s) is compared with that of
    ``-g = T * p'_t * (1 - p'_s) * (1 - exp(l'_s - l'_t))``.

    Args:
        student_logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)`` with any strides; float16, bfloat16, float32 or
            float64. ``-inf`` masks a class.
        teacher_logits: Same shape and device; the dtype may differ.
        target: Class indices shaped like the logits without the class dimension, or class probabilities q shaped like
            the logits. For those, a and b are the derivatives along q, as the logits go from s to s + eps * q:
            ``a = sum_c q_c * (p_c - q_c)`` and ``g = T * sum_c q_c * (p'_s,c - p'_t,c)``. For one-hot q that is the
            case of an index; for other q, a may be > 0, and the rules are as they stand on the left.
        temperature: T > 0 of `L_kd`, any float. Default 2, the loss's. Numbers of samples compare at one T only.
        ignore_index: Elements with this index target are none, whatever their logits hold.
        rule: ``"magnitude"`` (default), ``"opposing"`` or ``"signed"``. Which one the paper prints is not known to us.

    Returns:
        A bool tensor, shaped like an index target, computed in float64 (on MPS: float32). False where a logit is NaN.

    Raises:
        TypeError, ValueError: As :func:`weighted_soft_labels.wsl_loss`; ValueError for another rule.
        IndexError: On a CPU, an index target names no class. On a GPU and in compiled code that element is False.

    Source:
        Zhou et al., ICLR 2021: the samples that let the bias grow ("opposing") and the variance shrink, of which
        label-smoothed teachers have more.

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
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    student, teacher = _classes_last(student_logits), _classes_last(teacher_logits)
    classes = student.shape[-1]

    found = torch.empty(student.shape[:-1], dtype=torch.bool, device=student.device)
    for box in _boxes(found.shape, CHUNK // classes):
        s, t = (_rows(logits, box) for logits in (student, teacher))
        s, t = s - s.amax(-1, keepdim=True), t - t.amax(-1, keepdim=True)
        if target.is_floating_point():
            rows = _regularize_along(
                _rows(_classes_last(target), box), s, t, options.temperature, rule
            )
        else:
            label, kept = _label(target[box], classes, options.ignore_index)
            rows = _regularize(label, s, t, options.temperature, rule) & kept.squeeze(-1)
        found[box] = rows.view(found[box].shape)
    return found


@torch.no_grad()
def bias_variance(logits: Tensor, target: Tensor) -> BiasVariance:
    r"""Bias and variance of the cross-entropy of M models, for every element.

    With ``yhat_m = softmax(logits_m)`` and their mean prediction ``ybar``, the normalised geometric mean, which is the
    softmax of the mean logits::

        bias     = CE(ybar, y) = -log ybar_y              = -sum_c q_c log ybar_c  for class probabilities q
        variance = mean_m KL(ybar || yhat_m)              = -log sum_c exp(mean_m log yhat_m,c)
        mean_m CE(yhat_m, y) = bias + variance

    The bias contains the noise of the labels: for class probabilities it is KL(q || ybar) plus the entropy of q.
    The two forms of the variance are equal as mean_m log yhat_m and log ybar differ by a constant of the element.
    Neither is computed as it stands, as both cancel for confident models: the bias is ``log1p`` of a sum over the
    classes but one maximum, and the variance a sum of terms that are >= 0, with ``e = log yhat_m,c - log ybar_c``::

        KL(ybar || yhat_m) = sum_c ybar_c * (exp(e) - 1 - e)        as both sets of probabilities sum to 1

    Args:
        logits: ``(M, C)``, ``(M, N, C)`` or ``(M, N, C, d1, ..., dk)``, M >= 1: the models, then what the loss takes,
            with any strides; float16, bfloat16, float32 or float64. To estimate the expectation that the theory is
            about, train the models on disjoint parts of the training set.
        target: Class indices shaped like the logits of one model without the class dimension, or class probabilities
            shaped like the logits of one model, of sum 1.

    Returns:
        ``BiasVariance(bias, variance)``, each shaped like an index target, in nats, >= 0; float32, or float64 if the
        logits are; computed in float64 (on MPS: float32). One model, or several that agree, have variance 0 exactly.
        ``-inf`` logits are legal: a class that any model masks has ``ybar`` 0, so that the bias is inf if it is the
        label; if the models leave no class to agree on, both are inf. NaN where a logit is NaN.

    Raises:
        TypeError: `logits` or `target` is not a tensor, or its dtype is not one of the above.
        ValueError: There is no model, or shapes or devices do not fit together.
        IndexError: On a CPU, an index target names no class; there is no index to ignore. On a GPU and in compiled
            code that element is NaN.

    Source:
        Heskes, "Bias/Variance Decompositions for Likelihood-Based Estimators", Neural Computation 1998; Yang et al.,
        "Rethinking Bias-Variance Trade-off for Generalization of Neural Networks", ICML 2020; Zhou et al., ICLR 2021.

    Example:
        >>> import torch
        >>> from weighted_soft_labels.analysis import bias_variance
        >>> logits = torch.tensor([[[2.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [3.0, 0.0]]])  # two models, two elements
        >>> bias_variance(logits, torch.tensor([0, 0]))
        BiasVariance(bias=tensor([0.6931, 0.0486]), variance=tensor([0.4338, 0.0000]))
    """
    _check_models(logits, target)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    models = _classes_last(logits, first=1)
    count, classes = models.shape[0], models.shape[-1]

    bias = torch.empty(models.shape[1:-1], dtype=dtype, device=logits.device)
    variance = torch.empty_like(bias)
    for box in _boxes(bias.shape, CHUNK // (count * classes)):
        rows = _rows(models, box)
        if target.is_floating_point():
            found = _decompose(_rows(_classes_last(target), box), rows)
        else:
            label, kept = _label(target[box], classes)
            found = _decompose(label, rows).masked_fill(~kept.squeeze(-1), math.nan)
        bias[box], variance[box] = found.view(2, *bias[box].shape)
    return BiasVariance(bias, variance)


def _check_models(logits: Tensor, target: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a Tensor, got {type(logits).__name__}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    shape = tuple(logits.shape)
    if len(shape) < 2:
        raise ValueError(
            f"logits must be (M, C), (M, N, C) or (M, N, C, d1, ..., dk), got shape {shape}"
        )
    if shape[0] == 0:
        raise ValueError(f"logits must be those of at least one model, got shape {shape}")
    if shape[min(2, len(shape) - 1)] == 0:
        raise ValueError(f"logits must have at least one class, got shape {shape}")
    if isinstance(target, Tensor) and target.device != logits.device:
        raise ValueError(
            f"logits and target must be on the same device, got {logits.device} and {target.device}"
        )
    check_tensors(logits[0], logits[0], target)


# --- elements in chunks: rows of classes, wherever the classes were ---


def _classes_last(logits: Tensor, first: int = 0) -> Tensor:
    """Logits with their class dimension at the end; `first` dimensions come before the layout of the loss."""
    return logits.movedim(min(first + 1, logits.dim() - 1), -1)


def _boxes(shape: tuple[int, ...], size: int) -> Iterator[tuple[slice, ...]]:
    """Cut a tensor of this shape into boxes of at most `size` entries, but at least one."""
    if not shape:
        yield ()
        return
    step = max(1, size // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        for rest in _boxes(shape[1:], size):
            yield (slice(start, start + step), *rest)


def _rows(logits: Tensor, box: tuple[slice, ...]) -> Tensor:
    """The elements of a box as (n, C), or as (M, n, C) for the logits of M models.

    In float64, which leaves of float32 logits every digit that counts, except on MPS, which has none.
    """
    models = logits.dim() - 1 - len(box)
    part = logits[(slice(None),) * models + box]
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    return part.reshape(*part.shape[:models], -1, part.shape[-1]).to(dtype).contiguous()


def _label(target: Tensor, classes: int, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Labels (n, 1) that can index, and which of them the target had. Raises IndexError on a CPU."""
    label = target.reshape(-1, 1).long()
    inside = (label >= 0) & (label < classes)
    ignored = torch.zeros_like(inside) if ignore_index is None else label == ignore_index
    if (
        label.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (inside | ignored).all()
    ):
        legal = (
            f"[0, {classes})"
            if ignore_index is None
            else f"[0, {classes}) or ignore_index ({ignore_index})"
        )
        wrong = int(label[~(inside | ignored)][0])
        raise IndexError(f"target must hold class indices in {legal}, got {wrong}")
    kept = inside & ~ignored
    return label.where(kept, 0), kept


# --- the rules of regularization samples; logits are (n, C) with maximum 0, results (n,) ---


def _regularize(
    label: Tensor, student: Tensor, teacher: Tensor, temperature: float, rule: str
) -> Tensor:
    s, t = _log_odds(student, label, temperature), _log_odds(teacher, label, temperature)
    log_lag = (
        math.log(temperature) + F.logsigmoid(t) + F.logsigmoid(-s) + (-torch.expm1(s - t)).log()
    )
    log_lag = torch.where(s == t, -math.inf, log_lag)  # also where both are infinite
    limit = math.log(2) + F.logsigmoid(-_log_odds(student, label, 1.0))
    return (s > t) | {"magnitude": log_lag > limit, "opposing": s > t, "signed": log_lag < limit}[
        rule
    ]


def _log_odds(z: Tensor, label: Tensor, temperature: float) -> Tensor:
    """``log(p / (1 - p))`` of the label; no difference that cancels, as it or one of the others is the maximum, 0."""
    others = z.scatter(-1, label, -math.inf)
    return z.gather(-1, label).squeeze(-1) / temperature - (others / temperature).logsumexp(-1)


def _regularize_along(
    q: Tensor, student: Tensor, teacher: Tensor, temperature: float, rule: str
) -> Tensor:
    """For class probabilities; where the probabilities of all but one class underflow, g and a are 0."""
    p = student.softmax(-1)
    p_student, p_teacher = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    a = _derivative(q, q.sum(-1, keepdim=True) * p - q, p)
    g = temperature * _derivative(q, p_student - p_teacher, p_student + p_teacher)
    # b = g - a, and |g - a| > |a| without the difference.
    magnitude = ((g > 0) & (g > 2 * a)) | ((g < 0) & (g < 2 * a))
    return {"magnitude": magnitude, "opposing": g > 0, "signed": g > 2 * a}[rule]


def _derivative(q: Tensor, gradient: Tensor, p: Tensor) -> Tensor:
    """``sum_c q_c * gradient_c``, where the gradient sums to 0: without the likeliest class, whose entry cancels."""
    return ((q - q.gather(-1, p.argmax(-1, keepdim=True))) * gradient).sum(-1)


# --- bias and variance; logits are (M, n, C) ---


def _decompose(target: Tensor, logits: Tensor) -> Tensor:
    """Bias and variance, stacked, for labels (n, 1) or probabilities (n, C)."""
    z = logits - logits.amax(-1, keepdim=True)
    lowest = z.amin(0)
    # Counted from the first model, the mean of models that agree is each of them to the last digit.
    mean = torch.where(lowest == -math.inf, lowest, z[0] + (z - z[0]).mean(0))
    z = torch.cat((z, mean[None]))
    peak, index = z.max(-1, keepdim=True)
    z = z - peak
    e = z.exp()
    rest = e.scatter(-1, index, 0.0).sum(-1, keepdim=True)
    p, log_sum = e / (rest + 1), rest.log1p()

    if target.is_floating_point():
        label_z = torch.where(target == 0, 0.0, target * z[-1]).sum(-1)
        bias = target.sum(-1) * log_sum[-1].squeeze(-1) - label_z
    else:
        bias = (log_sum[-1] - z[-1].gather(-1, target)).squeeze(-1)
    distance = (z[:-1] - z[-1]) - (log_sum[:-1] - log_sum[-1])
    variance = _divergence(p[-1], p[:-1], distance).sum(-1).mean(0)
    nothing_in_common = (peak[-1] == -math.inf).squeeze(-1)
    return torch.stack((bias, variance)).masked_fill(nothing_in_common, math.inf)


def _divergence(ybar: Tensor, yhat: Tensor, distance: Tensor) -> Tensor:
    """``ybar * (exp(d) - 1 - d) >= 0`` for ``d = log yhat - log ybar``, also where exp(d) or d itself is infinite."""
    near = ybar * (torch.expm1(distance) - distance)
    far = torch.where(ybar == 0, yhat, yhat - ybar * (1 + distance))
    return torch.where((ybar == 0) | (distance > 1), far, near).clamp(min=0)
