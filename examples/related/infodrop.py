"""InfoDrop with Weighted Soft Labels: dropout where an image repeats itself, so that edges decide.

pip install "weighted-soft-labels[examples]"
python infodrop.py
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms

TEST_IMAGES, TEST_VERSIONS = 800, 5  # a test image comes in five draws of shift and noise
NOISE, BATCH, LR = 0.3, 100, 3e-3
TEMPERATURE, ALPHA = 4.0, 2.25  # of KD and WSL
CLEAN = "WSL, clean"  # the weight comes from the student without InfoDrop
METHODS, DROPS = ("CE", "KD", "WSL", CLEAN), ("none", "InfoDrop", "uniform")
WORKERS = 2  # seeds at once, each on one core


# The method: what to lift into a project of your own ----------------------------------------------------------------


class InfoDrop(nn.Module):
    """Sets positions of a convolution's output to 0, most likely where its input repeats itself. Off in evaluation.

    Args:
        kernel_size, padding: the convolution's, of stride 1; they make the patches.
        rate: draws per position; as they are with replacement, it can exceed 1.
        temperature: the lower, the more the draws go to the most repetitive positions; inf: anywhere alike.
    """

    PATCHES, RADIUS, BANDWIDTH = 9, 3, 1.0

    def __init__(self, kernel_size: int, padding: int, rate: float, temperature: float) -> None:
        super().__init__()
        self.kernel_size, self.padding, self.rate, self.temperature = kernel_size, padding, rate, temperature

    def probability(self, x: Tensor) -> Tensor:
        """Of input (B, C, H, W), the chance of every output position to be drawn: (B, H', W'), each image sums to 1."""
        margin, (height, width) = self.RADIUS + self.padding, x.shape[-2:]
        padded = F.pad(x, (margin,) * 4)
        rows, columns = height + 2 * self.padding, width + 2 * self.padding

        def window(down: int, right: int) -> Tensor:
            top, left = self.RADIUS + down, self.RADIUS + right
            return padded[:, :, top : top + rows, left : left + columns]

        offsets = torch.randint(-self.RADIUS, self.RADIUS + 1, (self.PATCHES, 2)).tolist()
        squares = torch.stack([(window(0, 0) - window(*offset)).square().sum(1) for offset in offsets], dim=1)
        distances = F.avg_pool2d(squares, self.kernel_size, stride=1)  # of patches; the mean below takes out the scale
        similarity = torch.exp(-distances / distances.mean() / (2 * self.BANDWIDTH**2)).mean(1)
        chance = similarity ** (1 / self.temperature)
        return chance / chance.sum((-2, -1), keepdim=True)

    @torch.no_grad()
    def mask(self, x: Tensor, channels: int) -> Tensor:
        """Zeros at the drawn positions, (B, channels, H', W'), every channel with draws of its own."""
        chance = self.probability(x)
        rows = chance.flatten(1).repeat_interleave(channels, dim=0) + 1e-8
        drawn = torch.multinomial(rows, int(self.rate * rows.shape[1]), replacement=True)
        return torch.ones_like(rows).scatter_(1, drawn, 0.0).view(len(x), channels, *chance.shape[1:])

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Output (B, channels, H', W') of the convolution of x (B, C, H, W), or what was made from it since."""
        return output * self.mask(x, output.shape[1]) if self.training else output


class Student(nn.Module):
    """A first convolution, over which InfoDrop lies, a second one and a head."""

    def __init__(self, rate: float, temperature: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = InfoDrop(3, 1, rate, temperature)
        self.rest = nn.Sequential(
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16 * 4 * 4, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.rest(self.drop(images, self.stem(images)))
        return logits


def distil(student: Student, data: tuple[Tensor, ...], method: str, drop_epochs: int, epochs: int) -> Tensor:
    """Trains with InfoDrop, then without. Returns the mean weight (that WSL would give) of the first drop_epochs."""
    optimizer, weights = Adam(student.parameters(), lr=LR, fused=True), []
    for epoch in range(epochs):
        for batch in torch.randperm(len(data[0])).split(BATCH):
            images, labels, teacher_logits = (of[batch] for of in data)
            with torch.no_grad():
                clean_logits = student.eval()(images) if method == CLEAN else None
            student.train()
            student.drop.train(epoch < drop_epochs)
            logits = student(images)
            terms = wsl_terms(logits if clean_logits is None else clean_logits, teacher_logits, labels)
            weights.append(terms.weight.mean())
            if method == "WSL":
                loss = wsl_loss(logits, teacher_logits, labels, temperature=TEMPERATURE, alpha=ALPHA)
            else:
                weight = {"CE": 0.0, "KD": 1.0, CLEAN: terms.weight}[method]
                loss = F.cross_entropy(logits, labels) + (weight * soft_loss(logits, teacher_logits)).mean()
            update(optimizer, loss)
    student.eval()
    return torch.stack(weights[: drop_epochs * len(weights) // epochs or None]).mean()


def soft_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """alpha * T^2 * KL(teacher || student) of every row of logits (B, 10): (B,)."""
    student, teacher = (F.log_softmax(x / TEMPERATURE, dim=1) for x in (student_logits, teacher_logits))
    return ALPHA * TEMPERATURE**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# One seed -----------------------------------------------------------------------------------------------------------


def distort(images: Tensor) -> Tensor:
    """Every image (N, 1, 8, 8) shifted by up to one pixel in each direction, plus noise."""
    n = len(images)
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    shifted = windows[torch.arange(n), :, torch.randint(3, (n,)), torch.randint(3, (n,))]
    return shifted + NOISE * torch.randn_like(shifted)


def shuffle_patches(images: Tensor) -> Tensor:
    """The four quarters of every image (N, 1, 8, 8) in another order, each image with its own."""
    quarters = images.view(-1, 2, 4, 2, 4).transpose(2, 3).reshape(-1, 4, 4, 4)
    orders = torch.tensor(list(permutations(range(4)))[1:])[torch.randint(23, (len(images),))]
    shuffled = quarters.gather(1, orders.view(-1, 4, 1, 1).expand_as(quarters))
    return shuffled.view(-1, 2, 2, 4, 4).transpose(2, 3).reshape(images.shape)


def run_seed(seed: int, epochs: int, rate: float, temperature: float) -> Tensor:
    """By drop and method: accuracy on intact and on shuffled images in percent, mean weight. (3, 4, 3)."""
    torch.set_num_threads(1)  # the seeds share the cores
    torch.manual_seed(seed)
    digits = load_digits()
    clean, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    test, train = torch.randperm(len(clean)).split([TEST_IMAGES, len(clean) - TEST_IMAGES])
    test = test.repeat(TEST_VERSIONS)
    test_images, images, test_labels, labels = distort(clean[test]), distort(clean[train]), labels[test], labels[train]
    shuffled = shuffle_patches(test_images)
    teacher = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )
    optimizer = Adam(teacher.parameters(), lr=LR, fused=True)
    for _ in range(epochs):  # on images distorted anew, so that it does not know the student's by heart
        for batch in torch.randperm(len(train)).split(BATCH):
            update(optimizer, F.cross_entropy(teacher(distort(clean[train[batch]])), labels[batch]))
    with torch.inference_mode():
        data = images, labels, teacher.eval()(images)

    results = torch.zeros(len(DROPS), len(METHODS), 3)
    for row, drop in enumerate(DROPS):
        for column, method in enumerate(METHODS):
            torch.manual_seed(seed)  # the same first weights
            student = Student(rate, math.inf if drop == "uniform" else temperature)
            weight = distil(student, data, method, 0 if drop == "none" else epochs * 2 // 3, epochs)
            with torch.inference_mode():
                intact, mixed = (
                    100 * (student(x).argmax(1) == test_labels).float().mean() for x in (test_images, shuffled)
                )
            results[row, column] = torch.stack([intact, mixed, weight])
    return results


# The report ---------------------------------------------------------------------------------------------------------


def cell(values: Tensor, sign: str = "") -> str:
    """Mean over the seeds and half the width of its 95 % confidence interval, by Student's t."""
    half = student_t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values))
    return f"{values.mean():{sign}.1f} +- {half:.1f}".rjust(14)


def print_table(results: Tensor) -> None:
    print(f"\nTest accuracy in %, mean and 95 % interval over {len(results)} seeds; differences within a seed\n")
    print("drop      method                  intact - without drop          - KD      shuffled - without drop  weight")
    for row, drop in enumerate(DROPS):
        for column, method in enumerate(METHODS):
            (intact, shuffled, weight), (plain, plain_shuffled, _) = results[:, row, column].T, results[:, 0, column].T
            cells = cell(intact) + cell(intact - plain, "+") + cell(intact - results[:, row, 1, 0], "+")
            cells += cell(shuffled) + cell(shuffled - plain_shuffled, "+")
            print(f"{drop:10}{method:16}{cells}{weight.mean():8.2f}")


def plot_chance(rate: float, temperature: float) -> Figure:
    """Three digits, and the mean of many draws of the chance that InfoDrop gives to each of their positions."""
    torch.manual_seed(0)
    images = distort(torch.tensor(load_digits().images[:3], dtype=torch.float32).unsqueeze(1) / 16)
    drop = InfoDrop(3, 1, rate, temperature)
    chances = torch.stack([drop.probability(images) for _ in range(200)]).mean(0)
    figure = Figure(figsize=(6, 4), layout="constrained")
    for axes, image, chance in zip(figure.subplots(2, 3).T, images.squeeze(1), chances):
        axes[0].imshow(image, cmap="gray")
        axes[1].imshow(chance, cmap="magma")
    for axes in figure.axes:
        axes.set_axis_off()
    figure.suptitle(f"Chance to be dropped, temperature {temperature:g}; bright: high", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--seeds", type=int, default=6, help="at least 2, for the intervals (6)")
    option("--epochs", type=int, default=24, help="of every network; the last third is without InfoDrop (24)")
    option("--drop-rate", type=float, default=1.5, help="draws per position (1.5)")
    option("--drop-temperature", type=float, default=0.03, help="low: where texture is; inf: anywhere alike (0.03)")
    option("--figure", type=Path, default=Path("infodrop.png"), help="where to save it (infodrop.png)")
    args = parser.parse_args()
    run = partial(run_seed, epochs=args.epochs, rate=args.drop_rate, temperature=args.drop_temperature)
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        results = torch.stack(list(tqdm(pool.map(run, range(args.seeds)), total=args.seeds, unit="seed")))
    print_table(results)
    plot_chance(args.drop_rate, args.drop_temperature).savefig(args.figure, dpi=110)
    print(f"\nFigure: {args.figure}")


if __name__ == "__main__":
    main()
