"""The reference agrees with an independent transcription and with published implementations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_wsl import wsl_rows

from weighted_soft_labels import reference
from weighted_soft_labels.analysis import wsl_terms

VECTORS = np.load(Path(__file__).parent / "data" / "official_vectors.npz")
CASES = sorted({key.split("/")[0] for key in VECTORS.files})


def loss_and_gradient(student, teacher, target, **options):
    student = torch.from_numpy(student).double().requires_grad_()
    loss = reference.wsl_loss(
        student, torch.from_numpy(teacher).double(), torch.from_numpy(target), **options
    )
    loss.backward()
    return loss.item(), student.grad.numpy()


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_published_implementations(case):
    fields = {
        key.split("/")[1]: VECTORS[key] for key in VECTORS.files if key.startswith(case + "/")
    }
    options = {
        name: float(fields[name])
        for name in ("temperature", "alpha", "hard_weight", "label_smoothing")
    }
    loss, gradient = loss_and_gradient(
        fields["student_logits"], fields["teacher_logits"], fields["target"], **options
    )
    np.testing.assert_allclose(loss, fields["loss"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(gradient, fields["grad"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
@pytest.mark.parametrize(
    ("hard_weight", "alpha", "label_smoothing"),
    [(1.0, 2.5, 0.0), (0.0, 1.0, 0.0), (0.7, 0.0, 0.1), (1.0, 2.25, 1.0)],
)
def test_agrees_with_numpy(probabilities, temperature, hard_weight, alpha, label_smoothing):
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.standard_normal((2, 9, 7))
    target = rng.dirichlet(np.ones(7), 9) if probabilities else rng.integers(0, 7, 9)
    options = {
        "temperature": temperature,
        "alpha": alpha,
        "hard_weight": hard_weight,
        "label_smoothing": label_smoothing,
    }
    loss, gradient = loss_and_gradient(student, teacher, target, **options)
    rows = wsl_rows(student, teacher, target, **options)
    np.testing.assert_allclose(loss, rows.loss.mean().astype(float), rtol=1e-12)
    np.testing.assert_allclose(gradient, rows.gradient.astype(float) / 9, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_supports_double_backward(temperature):
    """The second derivative of the loss with its weight as a constant."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).unbind(0)
    target = torch.tensor([0, 4, 2])
    weight = wsl_terms(student, teacher, target).weight.double()

    def gradient(student):
        student = student.detach().requires_grad_()
        loss = reference.wsl_loss(student, teacher, target, temperature=temperature)
        return student, torch.autograd.grad(loss, student, create_graph=True)[0]

    leaf, first = gradient(student)
    direction = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)

    def frozen(student):  # the same formula with the weight as a number
        soft = F.cross_entropy(
            student / temperature, (teacher / temperature).softmax(1), reduction="none"
        )
        return (
            F.cross_entropy(student, target, reduction="none")
            + 2.5 * temperature**2 * weight * soft
        ).mean()

    expected = torch.autograd.functional.hvp(frozen, student, direction)[1]
    # `wsl_terms` returned the weight in float32.
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-8)


def test_supports_vmap_for_gradients_of_single_samples():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    target = torch.tensor([0, 4, 2, -100])
    single = torch.func.vmap(
        torch.func.grad(lambda *args: reference.wsl_loss(*args, reduction="sum"))
    )
    together = torch.func.grad(lambda s: reference.wsl_loss(s, teacher, target, reduction="sum"))
    torch.testing.assert_close(single(student, teacher, target), together(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [20.0, 45.0])
def test_weights_of_confident_students_keep_their_digits(margin, dtype):
    """The balanced loss shows the digits of tiny weights, in proportion to exp(-margin)."""
    student = torch.zeros(3, 10, dtype=dtype)
    student[:, 0] = torch.tensor([margin, margin + 1, margin + 2])
    teacher = torch.zeros(3, 10, dtype=dtype)
    options = {"temperature": 1.0, "alpha": 1.0, "hard_weight": 0.0, "balance": True}
    loss = reference.wsl_loss(student, teacher, torch.zeros(3, dtype=torch.long), **options)
    weights = [math.exp(-i) for i in range(3)]
    expected = sum(w * 0.9 * (margin + i) for i, w in enumerate(weights)) / sum(weights)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
