"""examples/frameworks/wsl_timm.py with timm's models, mixup, losses and optimizers."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from weighted_soft_labels import wsl_loss

timm = pytest.importorskip(
    "timm", reason="timm is missing: pip install weighted-soft-labels[frameworks]"
)
from timm.data import Mixup  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "examples" / "frameworks" / "wsl_timm.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def wsl_timm() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_in_timm_is_a_step_on_the_wsl_loss(wsl_timm: SimpleNamespace, mixed: bool) -> None:
    torch.manual_seed(0)
    student = timm.create_model("test_vit", num_classes=5)
    teacher = timm.create_model("test_resnet", num_classes=5)
    student.pretrained_cfg |= {"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}
    teacher.pretrained_cfg |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    alone = copy.deepcopy(student)
    images, target = torch.randn(8, 3, 160, 160), torch.randint(5, (8,))
    if mixed:
        images, target = Mixup(mixup_alpha=0.2, label_smoothing=0.0, num_classes=5)(images, target)
    criterion = SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(smoothing=0.1)

    options = {"distill_loss_weight": 2.5, "task_loss_weight": 0.5, "temperature": 3.0}
    task = wsl_timm.WSLTask(student, teacher, criterion, **options).train()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1)
    result = task(images, target)
    result["loss"].backward()
    optimizer.step()

    with torch.no_grad():
        teacher_logits = teacher.eval()((images * 0.2 + 0.4 - 0.5) / 0.5)
    smoothing = 0.0 if mixed else 0.1
    kwargs = {"temperature": 3.0, "alpha": 2.5, "hard_weight": 0.5, "label_smoothing": smoothing}
    loss = wsl_loss(alone.train()(images), teacher_logits, target, **kwargs)
    loss.backward()
    create_optimizer_v2(alone, opt="sgd", lr=0.1).step()
    torch.testing.assert_close(result["loss"], loss)
    assert result["output"].shape == (8, 5)
    torch.testing.assert_close(student.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_train_script_imports_the_task_instead_of_timms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The script replaces the class; monkeypatch restores it after the test.
    monkeypatch.setattr(timm.task, "LogitDistillationTask", timm.task.LogitDistillationTask)
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom timm.task import LogitDistillationTask\n"
        "print(LogitDistillationTask.__name__, sys.argv[1:])\n"
    )
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(script), "--kd-model-name", "resnet34"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out == "WSLTask ['--kd-model-name', 'resnet34']\n"


def test_without_a_train_script_prints_the_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit, match=r"usage: wsl_timm\.py pytorch-image-models/train\.py"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
