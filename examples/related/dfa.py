"""DFA with Weighted Soft Labels: a search for the mix of teacher layers that the student learns.

    pip install "weighted-soft-labels[examples]"
    python dfa.py

DFA is from Guan et al., ECCV 2020 (arXiv 2008.00506; no public code). The teacher's layers form
groups of one size. For each group the student learns the mix sum_j softmax(beta)_j T_j.

1. Search: beta is searched group by group. The search is bi-level as in DARTS, but first order. The
   bridge loss has two parts: L2 from the student's map to the mix, and cross-entropy of the mix
   through the student's next groups.
2. Distillation: beta is fixed. The student minimises the logit loss (CE, KD or WSL) plus the L2.

In the row "searched, weighted" WSL's weight of an image also scales the L2 of this image.
Differences to the paper: 8 x 8 digits, two groups of three layers, and the maps of each layer are
divided by their standard deviation.

Defaults (5 seeds), AMD EPYC, torch 2.14.1; README.md has the table. The alphas, softmax(beta), of
layers 1, 2, 3 are:

    bridge loss               group 1              group 2
    both parts          0.24  0.27  0.50     0.29  0.27  0.44
    L2 alone            0.38  0.32  0.31     0.40  0.32  0.28

So the second part keeps the search from the shallow layers. But the mix makes no measurable
difference: all rows of KD and WSL reach 62.1 to 62.6 %, and so do students without features.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    BATCH,
    Examples,
    Measured,
    Results,
    accuracy,
    adam,
    convolution,
    difference,
    distort,
    draw_split,
    interval,
    kl_divergence,
    learn_labels,
    make_parser,
    print_title,
    run_seeds,
    update,
)
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms

TEST_VERSIONS = 5
SEARCH_LR = 3e-2
TEMPERATURE = 4.0
ALPHA = 2.25
TEACHER = (16, 32)  # channels of the two groups
STUDENT = (8, 16)
LAYERS = 3  # per group of the teacher; the student has one
METHODS = ("CE", "KD", "WSL")
SEARCHES = {"with both losses": True, "without the second": False}
ROWS = ("logits only", "last layer", "average", "searched", "searched, weighted")
DIFFERENCES = (
    ("searched", "logits only"),
    ("searched", "last layer"),
    ("searched", "average"),
    ("searched, weighted", "searched"),
)


class Network(nn.Module):
    """Groups of convolutions and a linear head. The second group has half the height and width."""

    def __init__(self, channels: tuple[int, int], layers: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        inputs = 1
        for stride, width in enumerate(channels, start=1):
            group = nn.ModuleList([convolution(inputs, width, stride, bias=False)])
            for _ in range(layers - 1):
                group.append(convolution(width, width, bias=False))
            self.groups.append(group)
            inputs = width
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(inputs * 4 * 4, 10))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Logits (B, 10) of an input to group `start`."""
        return self.logits_and_maps(x, start)[0]

    def logits_and_maps(self, x: Tensor, start: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Logits, and for each group the maps of its layers, (B, layers, channels, H, W)."""
        maps = []
        for group in self.groups[start:]:
            layers = []
            for layer in group:
                x = layer(x)
                layers.append(x)
            maps.append(torch.stack(layers, dim=1))
        return self.head(x), maps


def aggregate(maps: Tensor, beta: Tensor) -> Tensor:
    """Mixes maps (B, layers, channels, H, W) by softmax(beta), with beta of shape (layers,)."""
    return torch.einsum("l,blchw->bchw", beta.softmax(0), maps)


def search(
    group: int, train: Examples, maps: Tensor, epochs: int, second_loss: bool = True
) -> Tensor:
    """Searches beta (layers,) of one group. `maps` are the teacher's, for all training images."""
    student = Network(STUDENT, 1)
    to_teacher = nn.Conv2d(STUDENT[group], TEACHER[group], 1)
    to_student = nn.Conv2d(TEACHER[group], STUDENT[group], 1)
    beta = torch.zeros(maps.shape[1], requires_grad=True)
    optimizer = adam(nn.ModuleList([student, to_teacher, to_student]))
    beta_optimizer = Adam([beta], lr=SEARCH_LR)

    def bridge_loss(batch: Tensor) -> Tensor:
        mix = aggregate(maps[batch], beta)
        _, student_maps = student.logits_and_maps(train.images[batch])
        loss = F.mse_loss(to_teacher(student_maps[group][:, -1]), mix)
        if second_loss:
            logits = student(to_student(mix), start=group + 1)
            loss = loss + F.cross_entropy(logits, train.labels[batch])
        return loss

    # Bi-level: the student's weights learn from one half of the images, beta from the other.
    weights_half, beta_half = torch.randperm(len(maps)).chunk(2)
    for _ in range(epochs):
        weights_batches = shuffle(weights_half).split(BATCH)
        beta_batches = shuffle(beta_half).split(BATCH)
        for weights_batch, beta_batch in zip(weights_batches, beta_batches):
            update(beta_optimizer, bridge_loss(beta_batch))
            update(optimizer, bridge_loss(weights_batch))
    return beta.detach()


def shuffle(indices: Tensor) -> Tensor:
    return indices[torch.randperm(len(indices))]


def logit_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, method: str) -> Tensor:
    if method == "WSL":
        return wsl_loss(logits, teacher_logits, labels, temperature=TEMPERATURE, alpha=ALPHA)
    hard = F.cross_entropy(logits, labels)
    if method == "CE":
        return hard
    return hard + ALPHA * kl_divergence(teacher_logits, logits, TEMPERATURE)


def distil(
    train: Examples,
    teacher_logits: Tensor,
    mixes: list[Tensor],
    method: str,
    weighted: bool,
    epochs: int,
) -> Network:
    """Trains a student. `mixes` has one aggregated map per group, or is empty."""
    student = Network(STUDENT, 1)
    connectors = nn.ModuleList(nn.Conv2d(ours, theirs, 1) for ours, theirs in zip(STUDENT, TEACHER))
    optimizer = adam(nn.ModuleList([student, connectors]))
    for _ in range(epochs):
        for batch in torch.randperm(len(train.images)).split(BATCH):
            labels = train.labels[batch]
            logits, maps = student.logits_and_maps(train.images[batch])
            loss = logit_loss(logits, teacher_logits[batch], labels, method)
            weight = torch.ones(len(batch))
            if weighted:
                weight = wsl_terms(logits, teacher_logits[batch], labels).weight
            for connector, group, mix in zip(connectors, maps, mixes):
                error = F.mse_loss(connector(group[:, -1]), mix[batch], reduction="none")
                loss = loss + (weight * error.mean((1, 2, 3))).mean()
            update(optimizer, loss)
    return student


def run_seed(seed: int, epochs: int, misaligned: float) -> Measured:
    torch.manual_seed(seed)
    clean, test = draw_split(TEST_VERSIONS)
    test = test._replace(images=distort(test.images))
    # Distorted only once for the students, so that they overfit and soft labels help.
    train = clean._replace(images=distort(clean.images))
    # Distorted in each epoch for the teacher, so that it does not memorise the students' images.
    teacher = Network(TEACHER, LAYERS)
    learn_labels(teacher, clean, epochs, distort)
    with torch.no_grad():
        teacher_logits, maps = teacher.eval().logits_and_maps(train.images)
    # Without the division the search would prefer the layer with the smallest values.
    maps = [group / group.std((0, 2, 3, 4), keepdim=True) for group in maps]
    misalign([teacher_logits, *maps], misaligned)

    betas = {}
    results: Measured = {}
    for name, second_loss in SEARCHES.items():
        betas[name] = [search(g, train, maps[g], epochs, second_loss) for g in (0, 1)]
        for group, beta in enumerate(betas[name]):
            results["alpha", name, f"group {group + 1}"] = beta.softmax(0).tolist()

    last_layer = torch.tensor([-math.inf] * (LAYERS - 1) + [0.0])
    beta_of = {
        "logits only": [],
        "last layer": [last_layer, last_layer],
        "average": [torch.zeros(LAYERS), torch.zeros(LAYERS)],
        "searched": betas["with both losses"],
        "searched, weighted": betas["with both losses"],
    }
    for row in ROWS:
        mixes = [aggregate(group, beta) for group, beta in zip(maps, beta_of[row])]
        for method in METHODS:
            torch.manual_seed(seed)  # the same first weights and batches for each student
            weighted = row == "searched, weighted"
            student = distil(train, teacher_logits, mixes, method, weighted, epochs)
            results[row, method] = accuracy(student, test)
    return results


def misalign(outputs: list[Tensor], share: float) -> None:
    """In place: a share of the images gets the teacher outputs of another image."""
    n = len(outputs[0])
    drawn = torch.randperm(n)[: int(share * n)]
    for output in outputs:
        output[drawn] = output[drawn.roll(1)]


def print_accuracies(results: Results) -> None:
    print_title(len(results["logits only", "CE"]))
    print()
    print(f"{'features':31}" + "".join(f"{name:>14}" for name in (*METHODS, "WSL - KD")))
    for row in ROWS:
        cells = "".join(interval(results[row, method]) for method in METHODS)
        print(f"{row:31}" + cells + difference(results[row, "WSL"], results[row, "KD"]))
    for new, old in DIFFERENCES:
        cells = "".join(
            difference(results[new, method], results[old, method]) for method in METHODS
        )
        print(f"{new + ' - ' + old:31}" + cells)


def print_alphas(results: Results) -> None:
    print("\nalpha of layers 1, 2, 3")
    for group in ("group 1", "group 2"):
        for name in SEARCHES:
            layers = results["alpha", name, group].T
            print(f"{group}, {name:22}" + "".join(interval(layer, ".2f") for layer in layers))


def save_figure(results: Results, path: Path) -> None:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for group, axes in zip(("group 1", "group 2"), figure.subplots(1, 2, sharey=True)):
        for name in SEARCHES:
            alphas = results["alpha", name, group].mean(0)
            axes.plot(range(1, LAYERS + 1), alphas, "o-", label=name)
        axes.set(title=group, xlabel="layer of the teacher", ylabel="alpha, mean of the seeds")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"\nFigure: {path}")


def main() -> None:
    parser = make_parser(__doc__, seeds=5, epochs=20, figure="dfa.png")
    parser.add_argument(
        "--misaligned",
        type=float,
        default=0.0,
        help="share of the images with another image's teacher outputs (0)",
    )
    args = parser.parse_args()
    run = partial(run_seed, epochs=args.epochs, misaligned=args.misaligned)
    results = run_seeds(run, args.seeds)
    print_accuracies(results)
    print_alphas(results)
    save_figure(results, args.figure)


if __name__ == "__main__":
    main()
