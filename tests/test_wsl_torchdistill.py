"""examples/frameworks/wsl_torchdistill: loss and configuration in torchdistill's own classes."""
# ruff: noqa: E402, as imports follow the check that they can succeed

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for _module in ("torchdistill", "torchvision"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[frameworks]"
    )

from torchdistill.common.main_util import import_dependencies, load_ckpt
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.models.registry import get_model
from torchvision.datasets import FakeData

from weighted_soft_labels import wsl_loss

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "frameworks")]

from cifar_models import MODELS
from wsl_torchdistill import WSL

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 8  # a single batch, so the loss falls within a few steps


class GeneratedCIFAR100(FakeData):
    """Images of noise, for the options that the configuration passes to CIFAR100."""

    def __init__(self, root: str, train: bool, download: bool, transform: Any) -> None:
        super().__init__(IMAGES, (3, 32, 32), 100, transform)


def load_configuration() -> dict[str, Any]:
    """The committed file, with noise for CIFAR-100, and its dependencies."""
    text = (EXAMPLES / "frameworks" / "wsl_torchdistill.yaml").read_text()
    Path("generated.yaml").write_text(
        text.replace("torchvision.datasets.CIFAR100", f"{__name__}.GeneratedCIFAR100")
    )
    configuration = load_yaml_file("generated.yaml")
    import_dependencies(configuration["dependencies"])
    return configuration


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration, in a folder with a teacher of examples/cifar.py."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = MODELS["resnet56"](num_classes=100)
    for _ in range(20):  # without fitting batch statistics, the logits explode
        teacher(torch.randn(16, 3, 32, 32))
    Path("runs/resnet56").mkdir(parents=True)
    torch.save({"model": teacher.state_dict()}, "runs/resnet56/last.pt")
    return load_configuration()


def make_box(configuration: dict[str, Any]) -> DistillationBox:
    """As in torchdistill's image_classification.py, but with small batches and no workers."""
    train = configuration["train"]
    networks = []
    for loader in (train["train_data_loader"], train["val_data_loader"]):
        loader["kwargs"].update(batch_size=IMAGES, num_workers=0, pin_memory=False)
    for model in (configuration["models"][name] for name in ("teacher_model", "student_model")):
        networks.append(get_model(model["key"], **model["kwargs"]))
        load_ckpt(model["src_ckpt"], model=networks[-1])
    return get_distillation_box(
        *networks, configuration["datasets"], train, torch.device("cpu"), None, False, 1
    )


def make_small_box(
    teacher: nn.Module, student: nn.Module, hook: str | None = None, **options: Any
) -> DistillationBox:
    """A box without data. It records the output of the teacher's module `hook`."""
    wsl = {"criterion": {"key": "WSL", "kwargs": options}, "weight": 1.0}
    train = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_in_eval_mode", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"wsl": wsl}}},
    }
    train["teacher"]["forward_hook"] = {"input": [], "output": [hook] if hook else []}
    return get_distillation_box(teacher, student, {}, train, torch.device("cpu"), None, False, 1)


def test_every_step_has_the_loss_of_wsl_loss_and_the_teacher_stays_as_it_is(
    configuration: dict[str, Any],
) -> None:
    configuration["train"]["num_epochs"] = 10
    box = make_box(configuration)
    teacher = copy.deepcopy(box.teacher_model).eval()
    seen: list[Tensor] = []
    box.student_model.register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach())
    )

    losses = []
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, targets, supplements in box.train_data_loader:
            loss = box.forward_process(images, targets, supplements)
            with torch.no_grad():
                expected = wsl_loss(seen[-1], teacher(images), targets, temperature=4.0, alpha=2.25)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
            losses.append(loss.item())
            box.post_forward_process(loss=loss)
        box.post_epoch_process()

    assert losses[-1] < 0.8 * losses[0]
    assert not box.teacher_model.training
    for name, value in teacher.state_dict().items():
        assert box.teacher_model.state_dict()[name].equal(value), name


def test_settings_are_those_of_the_paper(configuration: dict[str, Any]) -> None:
    assert configuration["train"]["train_data_loader"]["kwargs"]["batch_size"] == 64
    crop, flip, *_ = configuration["datasets"]["cifar100/train"].transform.transforms
    assert (crop.size, crop.padding, crop.fill, flip.p) == ((32, 32), 4, 0, 0.5)
    box = make_box(configuration)
    ((criterion, weight),) = box.criterion.term_dict.values()
    options = (weight, criterion.temperature, criterion.alpha, criterion.hard_weight)
    assert options == (1, 4.0, 2.25, 1.0)
    (group,) = box.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
    rates = []
    for _ in range(box.num_epochs):
        rates.append(group["lr"])
        box.optimizer.step()
        box.post_epoch_process()
    assert rates == pytest.approx([0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30)


def test_refuses_a_teacher_checkpoint_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file '\./runs/resnet56/last\.pt'"):
        load_configuration()


class Segmenter(nn.Conv2d):
    """Returns a dict, as torchvision's segmentation models do."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(images)}


def test_segmentation_in_mixed_precision_with_unlabelled_pixels() -> None:
    teacher, student = Segmenter(3, 5, 3), Segmenter(3, 5, 3)
    images, targets = torch.randn(2, 3, 8, 8), torch.randint(5, (2, 6, 6))
    targets[:, :2] = 255
    options = {"student_output_key": "out", "teacher_output_key": "out", "teacher_module_path": "0"}
    box = make_small_box(nn.Sequential(teacher), student, "0", **options, ignore_index=255)
    with torch.autocast("cpu", torch.bfloat16):
        loss = box.forward_process(images, targets)
        expected = wsl_loss(
            student(images)["out"], teacher(images)["out"], targets, ignore_index=255
        )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (
            Segmenter,
            {},
            "the student's output is a dict: student_output_key must be one of 'out', got None",
        ),
        (
            nn.Conv2d,
            {"teacher_output_key": "x"},
            "the teacher's output is not a dict: .* must be None, got 'x'",
        ),
        (
            nn.Conv2d,
            {"teacher_module_path": "fc"},
            "no output of the teacher's module 'fc': .* forward_hook: output",
        ),
        (
            lambda *size: nn.Conv2d(3, 6, 1),
            {},
            r"must have the same shape, got \(2, 6, 4, 4\) and \(2, 5, 4, 4\)",
        ),
        (nn.Conv2d, {}, "WSL needs targets, .* got None"),
    ],
)
def test_refuses_outputs_without_logits(
    student: Any, options: dict[str, Any], message: str
) -> None:
    targets = torch.zeros(2, 4, 4, dtype=torch.long) if "WSL needs" not in message else None
    box = make_small_box(nn.Conv2d(3, 5, 1), student(3, 5, 1), **options)
    with pytest.raises(ValueError, match=message):
        box.forward_process(torch.randn(2, 3, 4, 4), targets)


def test_refuses_options() -> None:
    with pytest.raises(
        ValueError, match="student_module_io must be 'input' or 'output', got 'out'"
    ):
        WSL(student_module_io="out")
    # PyYAML reads 225e-2 as a string.
    with pytest.raises(ValueError, match="alpha must be a number, got '225e-2'"):
        WSL(alpha="225e-2")
    with pytest.raises(TypeError, match="beta"):
        WSL(beta=0.5)
