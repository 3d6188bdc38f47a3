"""The networks are RepDistiller's, so that its checkpoints mean the same here.

Two files in `data` hold the expected values. `repdistiller_layouts.json` has the names and shapes,
in order, of the state dicts of eight models for 100 classes. `repdistiller_logits.json` has, for
every model, the number of parameters and some logits. The logits come from `logits_by_mode` below
with `model_dict[name](num_classes=100)` of RepDistiller's own code (commit b84f547 of
https://github.com/HobbitLong/RepDistiller). The file holds nine digits of the first three logits of
each image.

The numbers are float64 and come from NumPy's `RandomState`, whose sequence never changes. So they
depend neither on the version of torch nor on the processor.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_models import MODELS

DATA = Path(__file__).parent / "data"
LAYOUTS = json.loads((DATA / "repdistiller_layouts.json").read_text())
LOGITS = json.loads((DATA / "repdistiller_logits.json").read_text())

pytestmark = pytest.mark.usefixtures("one_thread")


def fill(model: nn.Module) -> None:
    """Give networks of the same layout the same state. Logits stay moderate at any depth."""
    source = np.random.RandomState(0)
    for name, tensor in model.double().state_dict().items():
        uniform = torch.as_tensor(source.uniform(-1, 1, tuple(tensor.shape)))
        if tensor.ndim > 1:
            tensor.copy_(uniform * (3 / tensor[0].numel()) ** 0.5)  # variance 1 / fan-in
        elif name.endswith(("weight", "running_var")):
            tensor.copy_(1 + uniform / 2)
        elif name.endswith(("bias", "running_mean")):
            tensor.copy_(uniform / 2)


def logits_by_mode(model: nn.Module) -> dict[str, Tensor]:
    """Fill the model. Return the logits of two images, with running and with batch statistics."""
    fill(model)
    images = torch.from_numpy(np.random.RandomState(1).uniform(-1, 1, (2, 3, 32, 32)))
    with torch.no_grad():
        return {"eval": model.eval()(images), "train": model.train()(images)}


def test_has_the_models_of_repdistiller() -> None:
    assert list(MODELS) == list(LOGITS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dict_has_the_published_layout(name: str) -> None:
    with torch.device("meta"):
        layout = {
            key: list(tensor.shape)
            for key, tensor in MODELS[name](num_classes=100).state_dict().items()
        }
    assert layout == LAYOUTS[name]
    assert list(layout) == list(LAYOUTS[name])


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_original_computes(name: str) -> None:
    model = MODELS[name](num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == LOGITS[name]["parameters"]
    for mode, logits in logits_by_mode(model).items():
        assert logits.shape == (2, 100)
        expected = torch.tensor(LOGITS[name][mode], dtype=torch.float64)
        error = (logits[:, :3] - expected).abs().max() / expected.abs().max()
        assert error < 1e-6, mode


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_ten_logits_reaches_every_parameter(name: str) -> None:
    """In eval mode. In train mode a bias before a batch norm has no gradient."""
    torch.manual_seed(0)
    model = MODELS[name](num_classes=10).eval()
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize(
    ("name", "key", "variance"),
    [
        ("resnet8x4", "layer3.0.conv1.weight", 2 / (9 * 256)),
        ("resnet8x4", "layer3.0.downsample.0.weight", 2 / 256),
        # PyTorch's default: uniform within 1 / sqrt(fan-in)
        ("resnet8x4", "fc.weight", 1 / (3 * 256)),
        ("wrn_16_2", "block3.layer.1.conv2.weight", 2 / (9 * 128)),
        ("wrn_16_2", "fc.bias", 0),
        ("vgg8", "block4.0.weight", 2 / (9 * 512)),
        ("vgg8", "block4.0.bias", 0),
        ("vgg8", "classifier.weight", 0.01**2),
        ("vgg8", "classifier.bias", 0),
        ("MobileNetV2", "blocks.6.0.conv.3.weight", 2 / (9 * 480)),  # depthwise
        ("MobileNetV2", "classifier.0.weight", 0.01**2),
        ("MobileNetV2", "classifier.0.bias", 0),
        ("ShuffleV1", "layer3.1.conv1.weight", 1 / (3 * 320)),
        ("ShuffleV2", "conv2.weight", 1 / (3 * 464)),
    ],
)
def test_starts_training_from_the_same_distribution(name: str, key: str, variance: float) -> None:
    """The variances are those of RepDistiller's code."""
    torch.manual_seed(0)
    values = MODELS[name](num_classes=100).state_dict()[key]
    assert values.square().mean().item() == pytest.approx(variance, rel=0.1)
