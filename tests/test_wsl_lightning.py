"""examples/frameworks/wsl_lightning.py with Lightning's Trainer, in one process and in two."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from weighted_soft_labels import reference, wsl_loss
from weighted_soft_labels.analysis import wsl_terms

for _module in ("lightning", "sklearn"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[frameworks]"
    )

FRAMEWORKS = Path(__file__).parents[1] / "examples" / "frameworks"
sys.path.insert(0, str(FRAMEWORKS))

import lightning as L  # noqa: E402
import wsl_lightning  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from wsl_lightning import Distillation  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers", "ignore:.*in eval mode at the start of training"
    ),
]

CLASSES = 5
IGNORED = -100


def make_student() -> nn.Module:
    """Without batch norm, whose statistics differ between processes."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def make_teacher(classes: int = CLASSES) -> nn.Module:
    """With batch norm and dropout, which differ in train mode, and with fitted statistics."""
    torch.manual_seed(2)
    teacher = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, classes)
    )
    teacher(torch.randn(32, 6))
    return teacher


def make_data(count: int = 24) -> TensorDataset:
    torch.manual_seed(3)
    return TensorDataset(torch.randn(count, 6), torch.randint(CLASSES, (count,)))


def make_module(**options: Any) -> Distillation:
    return Distillation(make_student(), make_teacher(), **{"learning_rate": 0.05, **options})


def make_trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        **{"accelerator": "cpu", "enable_model_summary": False, "max_epochs": 2, **quiet, **options}
    )


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def read_log(folder: Path) -> list[dict[str, float]]:
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def test_trains_the_student_as_a_loop_in_pytorch_does() -> None:
    options = {"temperature": 4.0, "alpha": 2.25, "hard_weight": 0.5, "label_smoothing": 0.1}
    data, module = make_data(), make_module(**options)
    teacher = state(module.teacher)
    make_trainer().fit(module, DataLoader(data, 4), DataLoader(data, 4))

    student = make_student()
    teacher_network = make_teacher().eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=1e-4)
    for _ in range(2):
        for inputs, target in DataLoader(data, 4):
            teacher_logits = teacher_network(inputs).detach()
            loss = reference.wsl_loss(student(inputs), teacher_logits, target, **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(state(module.student), state(student), rtol=1e-5, atol=1e-6)
    assert_same(state(module.teacher), teacher)


def test_teacher_is_frozen_and_in_eval_mode_all_along() -> None:
    module = make_module()  # the teacher comes in train mode
    seen: list[tuple[bool, bool]] = []
    module.teacher[2].register_forward_hook(
        lambda dropout, *_: seen.append((dropout.training, module.training))
    )
    trainer = make_trainer(max_epochs=3, check_val_every_n_epoch=1)
    trainer.fit(module, DataLoader(make_data(), 4), DataLoader(make_data(), 4))
    assert seen == 18 * [(False, True)]  # validation does not run the teacher
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for parameter in module.teacher.parameters()
    )
    assert {*trainer.optimizers[0].param_groups[0]["params"]} == {*module.student.parameters()}
    module.unfreeze()  # Lightning's method: train mode, and gradients for all parameters
    assert not module.teacher_logits(make_data().tensors[0]).requires_grad


def some_ignored(target: Tensor) -> Tensor:
    return target.where(torch.arange(len(target)) % 3 > 0, IGNORED)


def mixed_up(target: Tensor) -> Tensor:
    one_hot = F.one_hot(target, CLASSES).float()
    return 0.7 * one_hot + 0.3 * one_hot.flip(0)


@pytest.mark.parametrize("change", [some_ignored, mixed_up])
def test_logs_the_terms_of_every_nth_step(tmp_path: Path, change: Any) -> None:
    inputs, target = make_data().tensors
    data, module = TensorDataset(inputs, change(target)), make_module(temperature=3.0)
    outputs: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, seen in outputs.items():
        getattr(module, name).register_forward_hook(
            lambda *parts, seen=seen: seen.append(parts[-1].detach())
        )
    make_trainer(logger=CSVLogger(tmp_path), log_every_n_steps=2).fit(module, DataLoader(data, 4))

    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [*range(1, 12, 2)]
    batches = 2 * [*DataLoader(data, 4)]
    for row in rows:
        step = int(row["step"])
        logits, target = (outputs["student"][step], outputs["teacher"][step]), batches[step][1]
        terms = wsl_terms(*logits, target, temperature=3.0)
        counts = slice(None) if target.is_floating_point() else target != IGNORED
        for name, values in {
            "hard": terms.student_ce,
            "soft": terms.soft,
            "weight": terms.weight,
        }.items():
            assert row[name] == pytest.approx(values[counts].mean().item(), rel=1e-5), name
        assert row["loss"] == pytest.approx(
            wsl_loss(*logits, target, temperature=3.0).item(), rel=1e-5
        )


def test_validation_counts_every_element_once() -> None:
    inputs, target = make_data(10).tensors
    module, data = make_module(), TensorDataset(inputs, some_ignored(target))
    # In the three batches 2, 3 and 1 elements count.
    (metrics,) = make_trainer().validate(module, DataLoader(data, 4), verbose=False)
    counts = data.tensors[1] != IGNORED
    logits = module.student(inputs)[counts]
    hard = F.cross_entropy(logits, target[counts]).item()
    accuracy = 100 * (logits.argmax(1) == target[counts]).float().mean().item()
    assert metrics["val_hard"] == pytest.approx(hard, rel=1e-6)
    assert metrics["val_accuracy"] == pytest.approx(accuracy)


def test_checkpoint_holds_no_teacher_and_loads(tmp_path: Path) -> None:
    module, trainer, path = make_module(temperature=3.0), make_trainer(), tmp_path / "last.ckpt"
    trainer.fit(module, DataLoader(make_data(), 4))
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert {*content["state_dict"]} == {f"student.{name}" for name in module.student.state_dict()}

    teacher = make_teacher()
    before = state(teacher)
    fresh = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    loaded = Distillation.load_from_checkpoint(path, student=fresh, teacher=teacher)
    assert_same(state(loaded.student), state(module.student))
    assert_same(state(loaded.teacher), before)
    assert not teacher.training
    assert loaded.criterion.temperature == 3.0
    del content["state_dict"]["student.0.bias"]
    torch.save(content, path)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"student.0.bias\""):
        Distillation.load_from_checkpoint(path, student=make_student(), teacher=teacher)


def test_resumed_run_ends_with_the_same_bits_also_of_averaged_weights(tmp_path: Path) -> None:
    def fit(epochs: int, resume_from: Path | None = None) -> Distillation:
        module = make_module()
        callbacks = [EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path)]
        trainer = make_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(
            module, DataLoader(make_data(), 4), DataLoader(make_data(), 4), ckpt_path=resume_from
        )
        return module

    fit(2)
    (path,) = tmp_path.iterdir()
    assert "teacher" not in str(torch.load(path, weights_only=True))
    resumed, whole = fit(3, resume_from=path), fit(3)
    assert_same(state(resumed.student), state(whole.student))
    assert_same(state(resumed.teacher), state(make_teacher()))


def test_batch_without_target_is_refused() -> None:
    images = make_data().tensors[0]
    for data, got in (
        (images, "Tensor"),
        (TensorDataset(images), r"\['Tensor'\]"),
        ([{"image": images}], "dict"),
    ):
        message = rf"a batch must be \(inputs, target\), as WSL needs the labels, got {got}"
        with pytest.raises(ValueError, match=message):
            make_trainer().fit(make_module(), DataLoader(data, 2))


def test_validation_on_class_probabilities_and_a_teacher_of_other_classes_are_refused() -> None:
    data = TensorDataset(make_data().tensors[0], mixed_up(make_data().tensors[1]))
    with pytest.raises(
        ValueError, match=r"validation needs class indices .* as target, got torch.float32"
    ):
        make_trainer().validate(make_module(), DataLoader(data, 4))
    with pytest.raises(ValueError, match=r"must have the same shape, got \(4, 5\) and \(4, 7\)"):
        make_trainer().fit(
            Distillation(make_student(), make_teacher(7)), DataLoader(make_data(), 4)
        )


def test_teacher_in_train_mode_is_refused() -> None:
    """Also if only a part of the teacher is in train mode."""
    module = make_module()
    module.teacher[1].register_forward_hook(lambda norm, *_: norm.train() and None)
    with pytest.raises(
        ValueError,
        match="the teacher must be in eval mode, but a part of it is in train mode",
    ):
        make_trainer().fit(module, DataLoader(make_data(), 4))


def test_student_that_shares_parameters_with_its_teacher_is_refused() -> None:
    teacher = make_teacher()
    student = nn.Sequential(teacher[0], nn.Linear(8, CLASSES))
    with pytest.raises(ValueError, match="student and teacher must not share parameters"):
        Distillation(student, teacher)


def run(*options: object) -> str:
    command = [sys.executable, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class InOrder(L.LightningDataModule):
    """Training data in order. Lightning's own sampler for two processes would shuffle the data."""

    def __init__(self, data: TensorDataset, batch: int) -> None:
        super().__init__()
        self.data, self.batch = data, batch

    def train_dataloader(self) -> DataLoader:
        count, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.data, count, rank, shuffle=False)
        return DataLoader(self.data, self.batch // count, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        inputs, target = self.data.tensors
        # The processes have different numbers of elements that count.
        ignored = some_ignored(target)
        ignored[1] = IGNORED
        return DataLoader(TensorDataset(inputs, ignored), self.batch // self.trainer.world_size)


def train_on(devices: int, folder: Path) -> None:
    """Two epochs of six steps with a validation after each. Both processes of DDP run this."""
    module = make_module()
    strategy = "ddp" if devices > 1 else "auto"
    trainer = make_trainer(
        devices=devices, strategy=strategy, logger=CSVLogger(folder), log_every_n_steps=3
    )
    trainer.fit(module, InOrder(make_data(96), batch=16))
    trainer.save_checkpoint(folder / "last.ckpt")
    if trainer.is_global_zero:
        torch.save(state(module.teacher), folder / "teacher.pt")


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(__file__, two)
    train_on(1, one)

    a, b = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (one, two))
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=1e-6)
    assert a["global_step"] == b["global_step"] == 12
    assert "teacher" not in str(b)
    assert_same(torch.load(two / "teacher.pt", weights_only=True), state(make_teacher()))

    for row, other in zip(read_log(one), read_log(two), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_script_distils_on_two_processes(tmp_path: Path) -> None:
    out = run(FRAMEWORKS / "wsl_lightning.py", "--epochs", 3, "--devices", 2, "--out", tmp_path)
    (accuracies,) = re.findall(
        r"^test accuracy: teacher (\S+) %, student (\S+) %$", out, flags=re.MULTILINE
    )
    last = read_log(tmp_path)[-1]
    assert float(accuracies[1]) == pytest.approx(last["val_accuracy"], abs=0.01)
    assert float(accuracies[0]) > 90
    (path,) = (tmp_path / "lightning_logs").rglob("*.ckpt")
    assert {name.split(".")[0] for name in torch.load(path, weights_only=True)["state_dict"]} == {
        "student"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "301"), "at most 300 (images), got 301 for 1 devices"),
        (("--batch-size", "5", "--devices", "2"), "must be a multiple of --devices"),
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
    ],
)
def test_script_refuses_options_that_would_train_on_nothing(
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["wsl_lightning.py", *options])
    with pytest.raises(SystemExit):
        wsl_lightning.parse_args()
    assert message in capsys.readouterr().err


if __name__ == "__main__":  # Lightning starts this file again for the second process
    train_on(2, Path(sys.argv[1]))
