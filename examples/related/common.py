"""What prokt.py, dfa.py and infodrop.py share: noisy digits, training, seeds and intervals."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

TEST_IMAGES = 800
NOISE = 0.3  # standard deviation; pixels lie in [0, 1]
BATCH = 100
LR = 3e-3

Names = tuple[str, ...]  # of a measurement, such as ("KD", "accuracy")
Measured = dict[Names, float | list[float]]  # in one seed
Results = dict[Names, Tensor]  # in all seeds, (seeds,) or (seeds, n)


# Data


class Examples(NamedTuple):
    images: Tensor  # (N, 1, 8, 8)
    labels: Tensor  # (N,)


def load_examples() -> Examples:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return Examples(images, torch.tensor(digits.target))


def draw_split(test_versions: int) -> tuple[Examples, Examples]:
    """Training and test examples, not yet distorted.

    Each test image is repeated `test_versions` times. Each copy gets its own noise, so that
    accuracy depends less on the draw.
    """
    images, labels = load_examples()
    test, train = torch.randperm(len(images)).split([TEST_IMAGES, len(images) - TEST_IMAGES])
    test = test.repeat(test_versions)
    return Examples(images[train], labels[train]), Examples(images[test], labels[test])


def distort(images: Tensor) -> Tensor:
    """Shifts each image (N, 1, 8, 8) by up to one pixel in each direction, and adds noise."""
    n = len(images)
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    shifted = windows[torch.arange(n), :, torch.randint(3, (n,)), torch.randint(3, (n,))]
    return shifted + NOISE * torch.randn_like(shifted)


# Networks and training


def convolution(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def adam(model: nn.Module) -> Adam:
    return Adam(model.parameters(), lr=LR, fused=True)


def update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def learn_labels(
    model: nn.Module,
    train: Examples,
    epochs: int,
    augment: Callable[[Tensor], Tensor] = lambda images: images,
) -> None:
    """Trains by cross-entropy. `augment` changes the images of each batch."""
    optimizer = adam(model)
    for _ in range(epochs):
        for batch in torch.randperm(len(train.images)).split(BATCH):
            logits = model(augment(train.images[batch]))
            update(optimizer, F.cross_entropy(logits, train.labels[batch]))


def kl_divergence(
    fixed: Tensor, logits: Tensor, temperature: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """T^2 KL(softmax(fixed / T) || softmax(logits / T)) of logits (B, C). `fixed` is detached."""
    log_p = F.log_softmax(fixed.detach() / temperature, dim=1)
    log_q = F.log_softmax(logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode. The model is in train mode afterwards."""
    logits: Tensor = model.eval()(images)
    model.train()
    return logits


def accuracy(model: nn.Module, test: Examples) -> float:
    """In percent."""
    hits = predict(model, test.images).argmax(1) == test.labels
    return 100 * hits.float().mean().item()


# Seeds and intervals


def run_seeds(run_seed: Callable[[int], Measured], seeds: int) -> Results:
    # One thread per process: the networks are tiny, and the two seeds share the cores.
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        runs = list(tqdm(pool.map(run_seed, range(seeds)), total=seeds, unit="seed"))
    return {names: torch.tensor([run[names] for run in runs]) for names in runs[0]}


def interval(values: Tensor, form: str = ".1f") -> str:
    """Mean of the seeds and half the width of its 95 % interval, by Student's t."""
    half = student_t.ppf(0.975, len(values) - 1) * values.std().item() / math.sqrt(len(values))
    return f"{values.mean().item():{form}} +- {half:{form.lstrip('+')}}".rjust(14)


def difference(values: Tensor, baseline: Tensor) -> str:
    """Interval of the differences within a seed."""
    return interval(values - baseline, "+.1f")


def print_title(seeds: int) -> None:
    what = f"mean and 95 % interval over {seeds} seeds; differences within a seed"
    print(f"\nTest accuracy in %, {what}")


# Command line


def make_parser(doc: str, *, seeds: int, epochs: int, figure: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=seeds, help=f"at least 2 ({seeds})")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"per training run ({epochs})")
    parser.add_argument(
        "--figure", type=Path, default=Path(figure), help=f"where to save the figure ({figure})"
    )
    return parser
