"""examples/frameworks/wsl_torchdistill: the loss and its configuration, in torchdistill's own DistillationBox."""
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
    pytest.importorskip(_module, reason=f"{_module} is missing: pip install weighted-soft-labels[frameworks]")

from torchdistill.common.main_util import import_dependencies, load_ckpt
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.models.registry import get_model
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.transforms.functional import to_pil_image

from weighted_soft_labels import wsl_loss

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "frameworks")]

from cifar_models import MODELS
from wsl_torchdistill import WSL

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IMAGES = 8  # one batch, so that the loss falls within a few steps


class GeneratedCIFAR100(torch.utils.data.Dataset):
    """What the configuration asks of CIFAR-100, with images that are noise."""

    def __init__(self, root: str, train: bool, download: bool, transform: Any) -> None:
        generator = torch.Generator().manual_seed(int(train))
        self.images = torch.randint(256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(100, (IMAGES,), generator=generator).tolist()
        self.transform = transform

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.images[index])), self.labels[index]


def load_configuration() -> dict[str, Any]:
    """The committed file, and what it depends on; its path is relative, as is that of the teacher's checkpoint."""
    text = (EXAMPLES / "frameworks" / "wsl_torchdistill.yaml").read_text()
    path = Path("generated.yaml")
    path.write_text(text.replace("torchvision.datasets.CIFAR100", f"{__name__}.GeneratedCIFAR100"))
    configuration = load_yaml_file(str(path))
    import_dependencies(configuration["dependencies"])
    return configuration


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In a folder where examples/cifar.py has left a teacher."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = MODELS["resnet56"](num_classes=100)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # statistics that fit the weights, or the logits of random weights explode
        teacher(torch.randn(16, 3, 32, 32))
    Path("runs/resnet56").mkdir(parents=True)
    torch.save({"model": teacher.state_dict()}, "runs/resnet56/last.pt")
    return load_configuration()


def load_model(model: dict[str, Any]) -> nn.Module:
    """As torchdistill's image_classification.py does."""
    loaded = get_model(model["key"], **model["kwargs"])
    load_ckpt(model["src_ckpt"], model=loaded)
    return loaded


def make_box(configuration: dict[str, Any]) -> DistillationBox:
    """Of the networks and data loaders of the configuration, with small batches and no workers."""
    train = configuration["train"]
    for loader in (train["train_data_loader"], train["val_data_loader"]):
        loader["kwargs"].update(batch_size=IMAGES, num_workers=0, pin_memory=False)
    teacher, student = (load_model(configuration["models"][f"{name}_model"]) for name in ("teacher", "student"))
    return get_distillation_box(teacher, student, configuration["datasets"], train, CPU, None, False, 1)


def make_small_box(teacher: nn.Module, student: nn.Module, hook: str | None = None, **options: Any) -> DistillationBox:
    """Of these networks, without data; with the output of the module `hook` recorded."""
    hooks = {"forward_hook": {"input": [], "output": [hook]}} if hook else {}
    wsl = {"criterion": {"key": "WSL", "kwargs": options}, "weight": 1.0}
    train = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_in_eval_mode", "requires_grad": False, **hooks},
        "student": {"forward_proc": "forward_batch_only", **hooks},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"wsl": wsl}}},
    }
    return get_distillation_box(teacher, student, {}, train, CPU, None, False, 1)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    b_state = b.state_dict()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b_state[name]), name


# The configuration --------------------------------------------------------------------------------------------------


def test_every_step_has_the_loss_of_wsl_loss_and_the_teacher_stays_as_it_is(configuration: dict[str, Any]) -> None:
    configuration["train"]["num_epochs"] = 10
    box = make_box(configuration)
    teacher, student = copy.deepcopy(box.teacher_model).eval(), copy.deepcopy(box.student_model)
    seen: list[Tensor] = []
    box.student_model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))

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

    assert len(losses) == len(seen) == 10
    assert losses[-1] < 0.8 * losses[0]
    assert not box.teacher_model.training
    assert_same_state(box.teacher_model, teacher)
    assert not torch.equal(box.student_model.fc.weight, student.fc.weight)


def test_torchdistill_by_itself_lets_the_teacher_change(configuration: dict[str, Any]) -> None:
    """Why the configuration has `forward_in_eval_mode`."""
    configuration["train"]["teacher"]["forward_proc"] = "forward_batch_only"
    box = make_box(configuration)
    before = copy.deepcopy(box.teacher_model)
    box.pre_epoch_process(epoch=0)
    box.forward_process(*next(iter(box.train_data_loader)))
    assert box.teacher_model.training
    assert not torch.equal(box.teacher_model.bn1.running_mean, before.bn1.running_mean)


def test_settings_are_those_of_the_paper(configuration: dict[str, Any]) -> None:
    assert configuration["train"]["train_data_loader"]["kwargs"]["batch_size"] == 64
    train_set, test_set = configuration["datasets"].values()
    crop, flip, *rest = train_set.transform.transforms
    assert (crop.size, crop.padding, crop.fill, flip.p) == ((32, 32), 4, 0, 0.5)
    assert rest == test_set.transform.transforms

    box = make_box(configuration)
    assert box.train_data_loader.dataset.org_dataset is train_set
    assert isinstance(box.train_data_loader.sampler, torch.utils.data.RandomSampler)
    ((criterion, weight),) = box.criterion.term_dict.values()
    assert weight == 1
    assert repr(criterion) == (
        "WSL(temperature=4.0, alpha=2.25, hard_weight=1.0, label_smoothing=0.0, ignore_index=-100, reduction='mean')"
    )
    (group,) = box.optimizer.param_groups
    assert type(box.optimizer) is torch.optim.SGD
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
    assert [id(parameter) for parameter in group["params"]] == [id(p) for p in box.student_model.parameters()]

    rates = []
    for _ in range(box.num_epochs):
        rates.append(group["lr"])
        box.optimizer.step()
        box.post_epoch_process()
    assert rates == pytest.approx([0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30)


@pytest.mark.parametrize("name", ["resnet56", "resnet20", "resnet110", "resnet32"])
def test_networks_are_those_of_cifar_models(name: str, tmp_path: Path) -> None:
    """So a teacher may come from examples/cifar.py or from RepDistiller."""
    ours = MODELS[name](num_classes=100).eval()
    torch.save({"model": ours.state_dict()}, tmp_path / "last.pt")
    theirs = load_model({"key": name, "kwargs": {"num_classes": 100}, "src_ckpt": str(tmp_path / "last.pt")}).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))


def test_refuses_a_teacher_checkpoint_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file '\./runs/resnet56/last\.pt'"):
        load_configuration()


# Where the logits are -----------------------------------------------------------------------------------------------


def test_logits_of_a_module_within_the_model() -> None:
    teacher, student = (nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)) for _ in range(2))
    options = {"student_module_path": "0", "teacher_module_path": "0", "temperature": 3.0}
    batch, targets = torch.randn(8, 4), torch.randint(6, (8,))
    loss = make_small_box(teacher, student, hook="0", **options).forward_process(batch, targets)
    assert torch.equal(loss, wsl_loss(student[0](batch), teacher[0](batch), targets, temperature=3.0))


def make_segmentation() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A teacher and a student that return {'out': logits}, images, and labels with 255 where there is none."""
    teacher, student = (lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5) for _ in range(2))
    targets = torch.randint(5, (2, 48, 48))
    targets[:, :9] = 255
    return teacher, student, torch.randn(2, 3, 48, 48), targets


def test_segmentation_with_unlabelled_pixels() -> None:
    teacher, student, images, targets = make_segmentation()
    keys = {"student_output_key": "out", "teacher_output_key": "out"}
    box = make_small_box(teacher, student, **keys, ignore_index=255)
    seen: list[Tensor] = []
    student.register_forward_hook(lambda module, inputs, output: seen.append(output["out"]))
    box.pre_epoch_process(epoch=0)
    loss = box.forward_process(images, targets)
    assert torch.equal(loss, wsl_loss(seen[0], teacher(images)["out"], targets, ignore_index=255))
    box.post_forward_process(loss=loss)


@pytest.mark.parametrize(
    ("keys", "model", "got"),
    [
        ({}, "student", "None"),
        ({"student_output_key": "aux"}, "student", "'aux'"),
        ({"student_output_key": "out"}, "teacher", "None"),
    ],
)
def test_refuses_a_dict_without_its_key(keys: dict[str, str], model: str, got: str) -> None:
    teacher, student, images, targets = make_segmentation()
    message = f"the {model}'s output is a dict: {model}_output_key must be one of 'out', got {got}"
    with pytest.raises(ValueError, match=message):
        make_small_box(teacher, student, **keys).forward_process(images, targets)


# Mixed precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    teacher, student = nn.Linear(4, 10), nn.Linear(4, 10)
    box = make_small_box(teacher, student)
    batch, targets = torch.randn(8, 4), torch.randint(10, (8,))
    with torch.autocast("cpu", dtype):
        loss = box.forward_process(batch, targets)
        expected = wsl_loss(student(batch), teacher(batch), targets)
        assert student(batch).dtype == dtype
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    box.post_forward_process(loss=loss)
    assert student.weight.isfinite().all()


# What is refused ----------------------------------------------------------------------------------------------------


def test_refuses_missing_targets() -> None:
    box = make_small_box(nn.Linear(4, 10), nn.Linear(4, 10))
    with pytest.raises(ValueError, match=r"WSL needs targets, .* got None"):
        box.forward_process(torch.randn(8, 4))


def test_refuses_class_counts_that_differ() -> None:
    box = make_small_box(nn.Linear(4, 10), nn.Linear(4, 100))
    with pytest.raises(ValueError, match=r"must have the same shape, got \(8, 100\) and \(8, 10\)"):
        box.forward_process(torch.randn(8, 4), torch.randint(10, (8,)))


def test_refuses_a_module_that_is_not_recorded() -> None:
    box = make_small_box(nn.Linear(4, 10), nn.Linear(4, 10), teacher_module_path="fc")
    with pytest.raises(
        ValueError, match=r"no output of the teacher's module 'fc': .* under teacher: forward_hook: output"
    ):
        box.forward_process(torch.randn(8, 4), torch.randint(10, (8,)))


def test_refuses_a_key_where_there_is_no_dict() -> None:
    box = make_small_box(nn.Linear(4, 10), nn.Linear(4, 10), teacher_output_key="out")
    with pytest.raises(ValueError, match="the teacher's output is no dict: teacher_output_key must be None, got 'out'"):
        box.forward_process(torch.randn(8, 4), torch.randint(10, (8,)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"student_module_io": "out"}, ValueError, "student_module_io must be 'input' or 'output', got 'out'"),
        ({"alpha": "225e-2"}, ValueError, "alpha must be a number, got '225e-2'"),  # PyYAML reads this as a string
        ({"beta": 0.5}, TypeError, "beta"),
    ],
)
def test_refuses_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WSL(**options)
