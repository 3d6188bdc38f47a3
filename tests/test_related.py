"""examples/related: the defining parts of each method, and each script run as a program."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

for _module in ("sklearn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]"
    )

RELATED = Path(__file__).parents[1] / "examples" / "related"
sys.path.insert(0, str(RELATED))

import common  # noqa: E402
import dfa  # noqa: E402
import infodrop  # noqa: E402
import prokt  # noqa: E402

from weighted_soft_labels.analysis import wsl_terms  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBER = r"[+-]?\d+\.\d+"
OPTIONS = {
    "prokt": ("--epochs", "1"),
    "dfa": ("--epochs", "1", "--misaligned", "0.2"),
    "infodrop": ("--epochs", "2"),
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The output of each script for two seeds, run in a copy of the folder."""
    folder = tmp_path_factory.mktemp("related") / "copy"
    shutil.copytree(RELATED, folder, ignore=shutil.ignore_patterns("__pycache__"))
    output = {}
    for name, options in OPTIONS.items():
        command = [sys.executable, f"{name}.py", "--seeds", "2", *options]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        output[name] = done.stdout
    return output


def numbers(text: str, start: str) -> list[float]:
    """The numbers in the one line that begins with `start`."""
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return [float(number) for number in re.findall(NUMBER, line.removeprefix(start))]


# ProKT


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """An untrained teacher and student, 50 images and their labels."""
    torch.manual_seed(0)
    train, _ = common.draw_split(test_versions=1)
    teacher, student = prokt.networks()
    return teacher, student, common.distort(train.images[:50]), train.labels[:50]


@pytest.mark.parametrize("method", prokt.METHODS)
def test_the_student_s_step_gives_the_teacher_no_gradient(pair, method):
    teacher, student, images, labels = pair
    prokt.student_loss(student(images), teacher(images), labels, method).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.any() for parameter in student.parameters())


def test_the_teacher_s_step_gives_the_student_no_gradient(pair):
    teacher, student, images, labels = pair
    prokt.teacher_loss(teacher(images), student(images), labels, pull=0.5).backward()
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(parameter.grad is not None for parameter in teacher.parameters())


def test_the_progressive_teacher_moves_towards_the_student(pair):
    _, student, images, labels = pair
    student_logits = common.predict(student, images)

    def distance_after(pull: float, steps: int = 20) -> float:
        torch.manual_seed(1)
        teacher, _ = prokt.networks()
        optimizer = common.adam(teacher)
        for _ in range(steps):
            loss = prokt.teacher_loss(teacher(images), student_logits, labels, pull)
            common.update(optimizer, loss)
        return common.kl_divergence(student_logits, teacher(images)).item()

    assert distance_after(1.0) < distance_after(1.0, steps=0) / 4
    assert distance_after(1.0) < distance_after(0.7) < distance_after(0.35) < distance_after(0.0)


def test_wsl_gives_the_student_the_weighted_soft_gradient_alone(pair):
    teacher, student, images, labels = pair
    student_logits, teacher_logits = (model(images).detach() for model in (student, teacher))
    student_logits.requires_grad_()
    prokt.student_loss(student_logits, teacher_logits, labels, "WSL").backward()
    weight = wsl_terms(student_logits, teacher_logits, labels).weight.unsqueeze(1)
    expected = weight * (student_logits.softmax(1) - teacher_logits.softmax(1)) / len(labels)
    torch.testing.assert_close(student_logits.grad, expected)


@pytest.mark.slow
def test_prokt_prints_differences_within_a_seed(printed):
    rows = (*prokt.TEACHERS, "difference")
    converged, progressive, differences = (numbers(printed["prokt"], row)[::2] for row in rows)
    for kd, wsl, gain, *_ in (converged, progressive):
        assert gain == pytest.approx(wsl - kd, abs=0.11)
    expected = [new - old for new, old in zip(progressive[:2], converged[:2])]
    assert differences == pytest.approx(expected, abs=0.11)


# DFA


@pytest.fixture(scope="module")
def teaching() -> tuple[common.Examples, list[Tensor]]:
    """400 examples, and the maps of a trained teacher."""
    torch.manual_seed(0)
    images, labels = common.load_examples()
    clean = common.Examples(images[:400], labels[:400])
    teacher = dfa.Network(dfa.TEACHER, dfa.LAYERS)
    common.learn_labels(teacher, clean, 12, common.distort)
    train = clean._replace(images=common.distort(clean.images))
    with torch.no_grad():
        _, maps = teacher.eval().logits_and_maps(train.images)
    return train, [group / group.std((0, 2, 3, 4), keepdim=True) for group in maps]


def test_aggregation_weights_sum_to_one():
    maps, beta = torch.randn(4, 3, 5, 2, 2), torch.randn(3)
    same = maps[:, :1].expand_as(maps)
    torch.testing.assert_close(dfa.aggregate(same, beta), same[:, 0])
    only_second = torch.tensor([-torch.inf, 0.0, -torch.inf])
    torch.testing.assert_close(dfa.aggregate(maps, only_second), maps[:, 1])
    torch.testing.assert_close(dfa.aggregate(maps, torch.zeros(3)), maps.mean(1))


@pytest.mark.parametrize("group", [0, 1])
def test_without_its_second_loss_the_search_goes_to_the_shallow_layer(teaching, group):
    train, maps = teaching
    alphas = {}
    for second_loss in (True, False):
        torch.manual_seed(0)
        beta = dfa.search(group, train, maps[group], epochs=30, second_loss=second_loss)
        alphas[second_loss] = beta.softmax(0)
    assert alphas[False].argmax() == 0
    assert alphas[True].argmax() == dfa.LAYERS - 1
    assert alphas[True][0] < 1 / dfa.LAYERS < alphas[False][0]


def test_misaligning_moves_all_outputs_of_an_image_together():
    torch.manual_seed(0)
    logits = torch.arange(10.0).unsqueeze(1)
    maps = 100 * torch.arange(10.0).view(10, 1, 1, 1, 1)
    dfa.misalign([logits, maps], 0.4)
    source = logits.flatten()
    assert (source != torch.arange(10)).sum() == 4
    assert source.sort().values.equal(torch.arange(10.0))
    assert maps.flatten().equal(100 * source)


@pytest.mark.slow
def test_dfa_prints_differences_within_a_seed(printed):
    table = {name: numbers(printed["dfa"], f"{name}  ")[::2] for name in dfa.ROWS}
    for _, kd, wsl, gain in table.values():
        assert gain == pytest.approx(wsl - kd, abs=0.11)
    for new, old in dfa.DIFFERENCES:
        differences = numbers(printed["dfa"], f"{new} - {old}")[::2]
        expected = [after - before for after, before in zip(table[new], table[old])][:3]
        assert differences == pytest.approx(expected, abs=0.11)
    for group in (1, 2):
        for name in dfa.SEARCHES:
            alphas = numbers(printed["dfa"], f"group {group}, {name}")[::2]
            assert sum(alphas) == pytest.approx(1, abs=0.02)


# InfoDrop


def dropping(rate: float = 1.5, temperature: float = 0.5) -> infodrop.InfoDrop:
    return infodrop.InfoDrop(nn.Conv2d(2, 6, 3, padding=1), 3, 1, rate, temperature)


def test_the_chance_is_the_formula():
    drop, images = dropping(temperature=0.3), torch.randn(2, 2, 8, 8)
    torch.manual_seed(0)
    chance = drop.chance(images)
    torch.manual_seed(0)
    offsets = torch.randint(7, (2, 9)) - 3
    padded = F.pad(images, (4, 4, 4, 4))
    distances = torch.zeros(2, 9, 8, 8)
    for row, column in torch.cartesian_prod(torch.arange(8), torch.arange(8)).tolist():
        here = padded[:, :, row + 3 : row + 6, column + 3 : column + 6]
        for n, (down, right) in enumerate(offsets.T.tolist()):
            there = padded[
                :, :, row + 3 + down : row + 6 + down, column + 3 + right : column + 6 + right
            ]
            distances[:, n, row, column] = (here - there).square().sum((1, 2, 3))
    score = (-distances / distances.mean() / 2).exp().mean(1) ** (1 / 0.3)
    torch.testing.assert_close(chance, score / score.sum((1, 2), keepdim=True))


def test_flat_texture_is_dropped_rather_than_an_edge():
    torch.manual_seed(0)
    drop = infodrop.InfoDrop(nn.Conv2d(1, 6, 3, padding=1), 3, 1, 0.5, 0.1)
    image = 0.05 * torch.randn(1, 1, 24, 24)
    image[..., 12:] += 1
    chance = torch.stack([drop.chance(image)[0] for _ in range(20)]).mean(0)
    inside = chance[8:16]  # the padding makes edges at the border
    assert inside[:, [6, 17]].mean() > 3 * inside[:, 11:13].mean()
    uniform = infodrop.InfoDrop(nn.Identity(), 3, 1, 0.5, float("inf")).chance(image)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 24**2))


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.5])
def test_draws_follow_the_rate_with_replacement(rate):
    torch.manual_seed(0)
    mask = dropping(rate, float("inf")).mask(torch.randn(100, 2, 8, 8), channels=6)
    draws = int(rate * 64)
    dropped = (mask == 0).sum((2, 3)).float()
    assert mask.shape == (100, 6, 8, 8)
    assert dropped.max() <= draws
    assert dropped.mean() == pytest.approx(64 * (1 - (63 / 64) ** draws), rel=0.03)
    assert not torch.equal(mask[:, 0], mask[:, 1])  # each channel has its own draws


def test_evaluation_drops_no_position_and_training_does_not_rescale():
    torch.manual_seed(0)
    drop, images = dropping(), torch.randn(20, 2, 8, 8)
    whole = drop.layer(images)
    output = drop(images)
    kept = output != 0
    assert 0.2 < kept.float().mean() < 0.8
    assert torch.equal(output[kept], whole[kept])
    assert torch.equal(drop.eval()(images), whole)
    drop.train().active = False
    assert torch.equal(drop(images), whole)


def test_shuffling_keeps_the_quarters_and_moves_them():
    torch.manual_seed(0)
    images = torch.randn(240, 1, 8, 8)
    shuffled = infodrop.shuffle_patches(images)
    assert 0 < sum(torch.equal(new, old) for new, old in zip(shuffled, images)) < 25

    def quarters(image: Tensor) -> set[bytes]:
        return {
            image[0, i : i + 4, j : j + 4].contiguous().numpy().tobytes()
            for i in (0, 4)
            for j in (0, 4)
        }

    assert all(quarters(new) == quarters(old) for new, old in zip(shuffled, images))


@pytest.mark.slow
def test_infodrop_prints_differences_within_a_seed(printed):
    table = {
        (drop, method): numbers(printed["infodrop"], f"{drop:10}{method:10}")
        for drop in infodrop.DROPS
        for method in infodrop.METHODS
    }
    for (drop, method), row in table.items():
        intact, gain, on_kd, shuffled, shuffled_gain = row[:-1:2]
        assert gain == pytest.approx(intact - table["none", method][0], abs=0.11)
        assert on_kd == pytest.approx(intact - table[drop, "KD"][0], abs=0.11)
        assert shuffled_gain == pytest.approx(shuffled - table["none", method][6], abs=0.11)
        assert 0 < row[-1] < 1
