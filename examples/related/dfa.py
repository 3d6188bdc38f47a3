"""DFA with Weighted Soft Labels: which mix of a teacher's layers a student should learn, found by search.

    pip install "weighted-soft-labels[examples]"
    python dfa.py

From Guan et al., ECCV 2020 (arXiv 2008.00506; no public code): of each group of layers of one size the student learns
sum_j softmax(beta)_j T_j. beta is searched group by group, bi-level as in DARTS (here first order), by a bridge loss:
L2 of the student's map to the mix, and cross-entropy of the mix through the rest of the student. Then beta stays, and
the logit loss, here CE, KD or WSL, joins the L2. In the last row WSL's weight scales the L2, too, image by image.
Smaller here: 8 x 8 digits, two groups of three layers, each layer's maps divided by their standard deviation.

Defaults (5 seeds), AMD EPYC, torch 2.14.1; README.md has the table. Alphas of layers 1, 2, 3: 0.24, 0.27, 0.50 and
0.29, 0.27, 0.44; without the second loss 0.38, 0.32, 0.31 and 0.40, 0.32, 0.28: it keeps the search from the shallow
layers. But which mix is learnt does not show: by KD and WSL all rows, that without features included, are at 62.1 to
62.6 %.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from multiprocessing import Pool
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

TEST_IMAGES, TEST_VERSIONS, NOISE, BATCH = (
    800,
    5,
    0.3,
    100,
)  # a test image comes in five draws of shift and noise
LR, SEARCH_LR, TEMPERATURE, ALPHA, FEATURE_SCALE = 3e-3, 3e-2, 4.0, 2.25, 1.0
TEACHER, STUDENT, LAYERS = (
    (16, 32),
    (8, 16),
    3,
)  # channels of the two groups; layers in a group of the teacher
SEARCHES, METHODS = ("with both losses", "without the second"), ("CE", "KD", "WSL")
ROWS = ("logits only", "last layer", "average", "searched", REUSED := "searched, weighted")


class Network(nn.Module):
    """Groups of convolutions, the second at half the size, and a linear head. The student has one layer a group."""

    def __init__(self, channels: tuple[int, int], layers: int) -> None:
        super().__init__()
        self.groups, before = nn.ModuleList(), 1
        for stride, width in enumerate(channels, start=1):
            sizes = [(before, stride)] + [(width, 1)] * (layers - 1)
            convolutions = [
                nn.Conv2d(n, width, 3, step, padding=1, bias=False) for n, step in sizes
            ]
            self.groups.append(
                nn.ModuleList(
                    nn.Sequential(c, nn.BatchNorm2d(width), nn.ReLU()) for c in convolutions
                )
            )
            before = width
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(before * 4 * 4, 10))

    def forward(self, x: Tensor, start: int = 0) -> tuple[Tensor, list[Tensor]]:
        """From group `start` on: logits (B, 10), and of each group its layers' maps (B, layers, channels, H, W)."""
        maps = [
            torch.stack([x := layer(x) for layer in group], dim=1) for group in self.groups[start:]
        ]
        return self.head(x), maps


def aggregate(maps: Tensor, beta: Tensor) -> Tensor:
    """Maps (B, layers, channels, H, W) mixed by softmax(beta), beta (layers,)."""
    return torch.einsum("l,blchw->bchw", beta.softmax(0), maps)


def search(
    group: int, data: tuple[Tensor, ...], maps: Tensor, epochs: int, second_loss: bool = True
) -> Tensor:
    """Beta (layers,) of one group by the teacher's maps of it, (N, layers, channels, H, W), images and labels."""
    student = Network(STUDENT, 1)
    to_teacher, to_student = (
        nn.Conv2d(STUDENT[group], TEACHER[group], 1),
        nn.Conv2d(TEACHER[group], STUDENT[group], 1),
    )
    beta = torch.zeros(maps.shape[1], requires_grad=True)
    trained = nn.ModuleList([student, to_teacher, to_student]).parameters()
    optimizer, beta_optimizer = Adam(trained, lr=LR, fused=True), Adam([beta], lr=SEARCH_LR)

    def bridge_loss(batch: Tensor) -> Tensor:
        images, labels = (of[batch] for of in data)
        aggregated = aggregate(maps[batch], beta)
        loss = F.mse_loss(to_teacher(student(images)[1][group][:, -1]), aggregated)
        if second_loss:
            loss = loss + F.cross_entropy(student(to_student(aggregated), group + 1)[0], labels)
        return loss

    halves = torch.randperm(len(maps)).chunk(
        2
    )  # bi-level: the weights learn from one, beta from the other
    for _ in range(epochs):
        for batch, held_out in zip(
            *(half[torch.randperm(len(half))].split(BATCH) for half in halves)
        ):
            update(beta_optimizer, bridge_loss(held_out))
            update(optimizer, bridge_loss(batch))
    return beta.detach()


def distil(
    data: tuple[Tensor, ...], targets: list[Tensor], method: str, weighted: bool, epochs: int
) -> Network:
    """A student of the images, labels and teacher logits in `data`, and of one aggregated map a group in `targets`."""
    student = Network(STUDENT, 1)
    connectors = nn.ModuleList(nn.Conv2d(ours, theirs, 1) for ours, theirs in zip(STUDENT, TEACHER))
    optimizer = Adam(nn.ModuleList([student, connectors]).parameters(), lr=LR, fused=True)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[0])).split(BATCH):
            images, labels, teacher_logits = (of[batch] for of in data)
            logits, maps = student(images)
            if method == "WSL":
                loss = wsl_loss(
                    logits, teacher_logits, labels, temperature=TEMPERATURE, alpha=ALPHA
                )
            else:
                ours, theirs = (
                    F.log_softmax(x / TEMPERATURE, dim=1) for x in (logits, teacher_logits)
                )
                soft = TEMPERATURE**2 * F.kl_div(
                    ours, theirs, reduction="batchmean", log_target=True
                )
                loss = F.cross_entropy(logits, labels) + (ALPHA * soft if method == "KD" else 0)
            weight = (
                wsl_terms(logits, teacher_logits, labels).weight
                if weighted
                else torch.ones(len(batch))
            )
            for connector, of, target in zip(connectors, maps, targets):
                error = F.mse_loss(connector(of[:, -1]), target[batch], reduction="none").mean(
                    (1, 2, 3)
                )
                loss = loss + FEATURE_SCALE * (weight * error).mean()
            update(optimizer, loss)
    return student.eval()


def update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def distort(images: Tensor) -> Tensor:
    """Every image (N, 1, 8, 8) shifted by up to one pixel in each direction, plus noise."""
    windows, n = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1), len(images)
    shifted = windows[torch.arange(n), :, torch.randint(3, (n,)), torch.randint(3, (n,))]
    return shifted + NOISE * torch.randn_like(shifted)


def run_seed(seed: int, epochs: int, misaligned: float) -> tuple[Tensor, Tensor]:
    """Accuracies (rows, methods) in percent; softmax(beta) (with and without the second loss, groups, layers)."""
    torch.set_num_threads(1)  # the seeds share the cores
    torch.manual_seed(seed)
    digits = load_digits()
    clean, labels = (
        torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16,
        torch.tensor(digits.target),
    )
    test, train = torch.randperm(len(clean)).split([TEST_IMAGES, len(clean) - TEST_IMAGES])
    test = test.repeat(TEST_VERSIONS)
    test_images, images, test_labels, labels = (
        distort(clean[test]),
        distort(clean[train]),
        labels[test],
        labels[train],
    )
    teacher = Network(TEACHER, LAYERS)
    optimizer = Adam(teacher.parameters(), lr=LR, fused=True)
    for _ in range(
        epochs
    ):  # on images distorted anew, so that it does not know the student's by heart
        for batch in torch.randperm(len(train)).split(BATCH):
            update(
                optimizer, F.cross_entropy(teacher(distort(clean[train[batch]]))[0], labels[batch])
            )
    with torch.no_grad():
        logits, maps = teacher.eval()(images)
    drawn = torch.randperm(len(images))[: int(misaligned * len(images))]
    maps = [
        of / of.std((0, 2, 3, 4), keepdim=True) for of in maps
    ]  # or the search would like small values best
    for cached in (logits, *maps):
        cached[drawn] = cached[drawn.roll(1)]
    data = images, labels, logits
    betas = torch.stack(
        [search(g, data[:2], maps[g], epochs, second) for second in (True, False) for g in (0, 1)]
    )
    last_layer = torch.tensor([-math.inf] * (LAYERS - 1) + [0.0]).expand(2, -1)
    accuracies = torch.zeros(len(ROWS), len(METHODS))
    for row, mixes in enumerate(([], last_layer, torch.zeros(2, LAYERS), betas[:2], betas[:2])):
        targets = [aggregate(of, beta) for of, beta in zip(maps, mixes)]
        for column, method in enumerate(METHODS):
            torch.manual_seed(seed)  # the same first weights and batches
            student = distil(data, targets, method, ROWS[row] == REUSED, epochs)
            with torch.inference_mode():
                accuracies[row, column] = (
                    100 * (student(test_images)[0].argmax(1) == test_labels).float().mean()
                )
    return accuracies, betas.softmax(-1).view(2, 2, LAYERS)


def cells(values: Tensor, form: str) -> str:
    """Of values (seeds, n), n means over the seeds and half the widths of their 95 % intervals, by Student's t."""
    halves = student_t.ppf(0.975, len(values) - 1) * values.std(0) / math.sqrt(len(values))
    return "".join(
        f"{mean:{form}} +- {half:{form[-3:]}}".rjust(14)
        for mean, half in zip(values.mean(0), halves)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="at least 2, for the intervals (5)")
    parser.add_argument(
        "--epochs", type=int, default=20, help="of every network and of the search (20)"
    )
    parser.add_argument(
        "--misaligned",
        type=float,
        default=0.0,
        help="share of the images with another one's teacher outputs (0)",
    )
    parser.add_argument(
        "--figure", type=Path, default=Path("dfa.png"), help="where to save the alphas (dfa.png)"
    )
    args = parser.parse_args()
    with Pool(2) as pool:  # one seed a core
        runs = pool.imap(
            partial(run_seed, epochs=args.epochs, misaligned=args.misaligned), range(args.seeds)
        )
        accuracies, alphas = map(torch.stack, zip(*tqdm(runs, total=args.seeds, unit="seed")))
    print(
        f"\nTest accuracy in %, mean and 95 % interval over {args.seeds} seeds; differences within a seed\n"
    )
    print(f"{'features':31}" + "".join(f"{name:>14}" for name in (*METHODS, "WSL - KD")))
    for name, of in zip(ROWS, accuracies.unbind(1)):
        print(f"{name:31}" + cells(of, ".1f") + cells(of[:, 2:] - of[:, 1:2], "+.1f"))
    for new, old in ((3, 0), (3, 1), (3, 2), (4, 3)):
        print(
            f"{ROWS[new] + ' - ' + ROWS[old]:31}"
            + cells(accuracies[:, new] - accuracies[:, old], "+.1f")
        )
    print("\nalpha of layers 1, 2, 3")
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for group, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        for name, of in zip(SEARCHES, alphas[:, :, group].unbind(1)):
            print(f"group {group + 1}, {name:22}" + cells(of, ".2f"))
            axes.plot(range(1, LAYERS + 1), of.mean(0), "o-", label=name)
        axes.set(
            title=f"group {group + 1}",
            xlabel="layer of the teacher",
            ylabel="alpha, mean of the seeds",
        )
        axes.legend(fontsize=8)
    figure.savefig(args.figure, dpi=110)
    print(f"\nFigure: {args.figure}")


if __name__ == "__main__":
    main()
