"""The ImageNet example runs as its users run it: as a program, alone or under torchrun; on images small for a CPU.

Runs whose results are compared have one thread a process, so that their sums are formed in one order.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from weighted_soft_labels import reference

for _module in ("torchvision", "tensorboard", "tqdm"):
    pytest.importorskip(_module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]")
torchvision = pytest.importorskip("torchvision")
v2 = pytest.importorskip("torchvision.transforms.v2")
Image = pytest.importorskip("PIL.Image")

IMAGENET = Path(__file__).parents[1] / "examples" / "imagenet.py"
CLASSES, TRAIN, VAL = 4, 10, 3  # images of a class
SMALL = (
    *("--teacher", "squeezenet1_1", "--teacher-weights", "none", "--student", "shufflenet_v2_x0_5"),
    *("--image-size", "32", "--resize", "36", "--batch", "8", "--epochs", "2", "--lr", "0.002", "--lr-step", "1"),
    *("--device", "cpu", "--workers", "0"),
)
RANDOM = (*SMALL, "--mixup", "0.2", "--checkpoint-every", "2")  # draws random numbers in every step, too
# No batch norm, and dropout switched off: what depends on the number of processes by design.
PLAIN = ("--student", "squeezenet1_1")
WITHOUT_DROPOUT = """
import runpy, sys, torch

torch.nn.Dropout.forward = lambda self, x: x
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def imagenet() -> ModuleType:
    spec = importlib.util.spec_from_file_location("imagenet_example", IMAGENET)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of another brightness for every class, as PNG and JPEG; in `val` an odd number of images."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(40 * label, 40 * label + 100, (40, 36, 3), generator=generator)
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(folder / split / f"class{label}" / f"{index}.{('png', 'jpeg')[index % 2]}")
    shutil.copy(folder / "val" / "class0" / "0.png", folder / "val" / "class0" / "again.png")
    return folder


def command(*options: object, processes: int = 0, script: Path | None = None) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    scripts = [script, IMAGENET] if script else [IMAGENET]
    return [sys.executable, *torchrun, *map(str, scripts), *map(str, options)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*options: object, processes: int = 0, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options, processes=processes, script=script),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeed(*options: object, processes: int = 0, script: Path | None = None) -> str:
    done = run(*options, processes=processes, script=script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def log(out: Path) -> list[dict[str, float]]:
    with open(out / "log.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_run(out: Path, other: Path) -> None:
    """To the last bit: weights, statistics, momenta, and all that was logged but the speed."""
    a, b = checkpoint(out / "last.pt"), checkpoint(other / "last.pt")
    assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    for index, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][index]["momentum_buffer"]), index
    assert a["schedule"] == b["schedule"]
    for row, other_row in zip(log(out), log(other), strict=True):
        del row["images_per_s"], other_row["images_per_s"]
        assert row == other_row


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of five steps that nothing interrupted; mixup, batch norm and a falling learning rate."""
    out = tmp_path_factory.mktemp("finished") / "run"
    succeed("--data", data, "--out", out, *RANDOM)
    return out


# A run --------------------------------------------------------------------------------------------------------------


def test_one_epoch_of_fake_data_with_every_option(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--fake-data", 16, "--fake-classes", 7, "--out", out, *SMALL, "--epochs", 1, "--workers", 1)
    more = ("--amp", "bf16", "--channels-last", "--accumulate", 2, "--mixup", 0.2, "--cutmix", 1.0)
    ensemble = ("--teacher", "shufflenet_v2_x0_5", "--teacher-train-mode", "--label-smoothing", 0.1, "--log-every", 1)
    printed = succeed(*options, *more, *ensemble)

    assert "squeezenet1_1 + shufflenet_v2_x0_5 -> shufflenet_v2_x0_5, 1 epochs" in printed
    (row,) = log(out)
    assert row["epoch"] == 1
    assert row["lr"] == 0.002
    assert 0 < row["weight"] < 1
    assert 0 < row["hard"] < row["loss"] < 100
    assert 0 <= row["val_top1"] <= row["val_top5"] <= 100
    assert row["images_per_s"] > 0
    best = checkpoint(out / "best.pt")
    torchvision.models.shufflenet_v2_x0_5(num_classes=7).load_state_dict(best["model"])
    assert best["top1"] == row["val_top1"]
    (events,) = (out / "tensorboard").iterdir()
    assert {b"step/loss", b"epoch/val_top1"} <= set(re.findall(rb"\w+/\w+", events.read_bytes()))


def test_the_schedule_falls_and_every_epoch_is_logged(finished: Path) -> None:
    rows = log(finished)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["lr"] for row in rows] == [0.002, pytest.approx(0.0002)]


def test_a_step_is_that_of_the_papers_optimiser_on_the_papers_loss(imagenet: ModuleType) -> None:
    """In two micro-batches, for an ensemble of two teachers; against the reference loss and SGD written out."""
    args = imagenet.parse_args(["--fake-data", "8", "--out", "x", *SMALL, "--accumulate", "2", "--lr", "0.1"])
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 5)) for _ in range(3)]
    student, *teachers = models
    before = [parameter.detach().clone().requires_grad_() for parameter in student.parameters()]
    batches = [(torch.randn(4, 3, 3, 3), torch.randint(5, (4,))) for _ in range(2)]
    images, labels = (torch.cat(parts) for parts in zip(*batches))

    run = imagenet.Run(args, imagenet.World(), torch.device("cpu"), student, torch.nn.ModuleList(teachers))
    imagenet.train_step(run, iter(batches), imagenet.make_mixing(args, 5))

    mean = (teachers[0](images) + teachers[1](images)) / 2
    loss = reference.wsl_loss(F.linear(images.flatten(1), *before), mean, labels)
    gradients = torch.autograd.grad(loss, before)
    for parameter, old, gradient in zip(student.parameters(), before, gradients):
        decayed = gradient + 1e-4 * old
        torch.testing.assert_close(parameter, old - 0.1 * (decayed + 0.9 * decayed))  # Nesterov's first step
    run.gather_sums()
    assert run.sums[0].item() / 8 == pytest.approx(loss.item(), rel=1e-5)
    assert run.sums[-1].item() == 8


def test_compiled_networks_save_what_plain_ones_load(imagenet: ModuleType) -> None:
    """`--compile` compiles in place: a wrapper would have changed the names in the checkpoint."""
    args = imagenet.parse_args(["--fake-data", "8", "--out", "x", *SMALL, "--compile"])
    student = torchvision.models.squeezenet1_1(num_classes=4)
    names = list(student.state_dict())
    run = imagenet.Run(args, imagenet.World(), torch.device("cpu"), student, torch.nn.ModuleList())
    assert student._compiled_call_impl is not None
    assert list(run.student.state_dict()) == names


def test_every_process_augments_an_image_alike_and_epochs_differ(imagenet: ModuleType, data: Path) -> None:
    args = imagenet.parse_args(["--data", str(data), "--out", "x", *SMALL])
    images, _, _ = imagenet.load_data(args)
    torch.manual_seed(1)
    before = images[3, 5][0]
    state = torch.get_rng_state()
    assert torch.equal(images[3, 5][0], before)
    assert torch.equal(torch.get_rng_state(), state), "reading an image has used up random numbers of the training"
    assert not torch.equal(images[4, 5][0], before)


def test_processes_share_every_global_batch(imagenet: ModuleType) -> None:
    def batches(rank: int, size: int, accumulate: int, first_step: int = 0) -> list[list[tuple[int, int]]]:
        options = ["--fake-data", "50", "--out", "x", "--batch", "12", "--accumulate", str(accumulate)]
        sampler = imagenet.GlobalBatches(50, imagenet.parse_args(options), imagenet.World(rank, size))
        sampler.epoch, sampler.first_step = 7, first_step
        read = list(sampler)
        assert len(read) == len(sampler)
        return read

    alone = batches(0, 1, 1)
    assert [len(batch) for batch in alone] == [12] * 4  # and 2 images left out
    assert len({index for batch in alone for _, index in batch}) == 48
    assert {epoch for batch in alone for epoch, _ in batch} == {7}
    shares = [batches(rank, 3, 2) for rank in range(3)]
    assert {len(batch) for share in shares for batch in share} == {2}
    for step, batch in enumerate(alone):
        read = [image for share in shares for micro_batch in share[2 * step : 2 * step + 2] for image in micro_batch]
        assert sorted(read) == sorted(batch)
    assert batches(0, 1, 1, first_step=3) == alone[3:]


# Several processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_and_two(imagenet: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run on one process and on two, each of which takes its share in two micro-batches."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "without_dropout.py"
    script.write_text(WITHOUT_DROPOUT)
    one, two = folder / "one", folder / "two"
    options = ("--data", data, *SMALL, *PLAIN, "--checkpoint-every", 3)
    run_here_without_dropout(imagenet, *options, "--out", one)
    succeed(*options, "--out", two, "--accumulate", 2, "--workers", 1, script=script, processes=2)
    return one, two


def run_here_without_dropout(imagenet: ModuleType, *options: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
        imagenet.main([str(option) for option in options])


def assert_same_but_for_rounding(out: Path, other: Path) -> None:
    for row, other_row in zip(log(out), log(other), strict=True):
        for name in ("loss", "hard", "soft", "weight", "val_loss"):
            assert row[name] == pytest.approx(other_row[name], rel=1e-5), name
        for name in ("lr", "train_top1", "train_top5", "val_top1", "val_top5"):
            assert row[name] == pytest.approx(other_row[name]), name
    torch.testing.assert_close(
        checkpoint(out / "last.pt")["model"], checkpoint(other / "last.pt")["model"], rtol=1e-4, atol=1e-5
    )


def test_two_processes_train_as_one_does_on_the_same_global_batch(one_and_two: tuple[Path, Path]) -> None:
    assert_same_but_for_rounding(*one_and_two)


def test_a_run_of_two_processes_resumes_in_mid_epoch_on_one(
    imagenet: ModuleType,
    one_and_two: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = one_and_two
    shutil.copy(two / "previous.pt", tmp_path / "last.pt")
    run_here_without_dropout(imagenet, "--data", data, *SMALL, *PLAIN, "--out", tmp_path, "--resume")
    assert f"resuming from {tmp_path / 'last.pt'}, after epoch 1, step 3" in capsys.readouterr().out
    assert_same_but_for_rounding(one, tmp_path)


def test_validation_counts_every_image_once_with_the_statistics_that_are_saved(data: Path, tmp_path: Path) -> None:
    """13 images on two processes, where padding would count one of them twice; against one batch without the loop."""
    out = tmp_path / "run"
    succeed("--data", data, "--out", out, *SMALL, "--epochs", 1, processes=2)
    (row,) = log(out)

    size = (v2.Resize(36, antialias=True), v2.CenterCrop(32))
    normal = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = v2.Compose([*size, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normal])
    images, labels = zip(*torchvision.datasets.ImageFolder(str(data / "val"), transform))
    assert len(images) == CLASSES * VAL + 1
    student = torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES).eval()
    student.load_state_dict(checkpoint(out / "last.pt")["model"])
    with torch.no_grad():
        logits = student(torch.stack(images))
    assert row["val_loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-5)
    right = (logits.argmax(1) == torch.tensor(labels)).sum().item()
    assert row["val_top1"] == pytest.approx(100 * right / len(images))
    assert row["val_top5"] == 100


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_killed_in_mid_epoch_and_resumed_gives_the_same_bits(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--data", data, "--out", out, *RANDOM, "--resume")
    slow = tmp_path / "slow.py"  # stays in the third step, to be killed there
    slow.write_text(
        "import runpy, sys, time, torch\n"
        "step = torch.optim.SGD.step\n"
        "count = iter(range(9999))\n"
        "torch.optim.SGD.step = lambda *a, **k: (next(count) == 2 and time.sleep(60), step(*a, **k))[1]\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    with subprocess.Popen(command(*options, script=slow), env=environment(), stdout=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 60
        while not (out / "previous.pt").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.5)  # last.pt follows
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    stopped = checkpoint(out / "last.pt")
    assert (stopped["epoch"], stopped["step"]) == (0, 2)

    assert "after epoch 0, step 2" in succeed(*options)
    assert_same_run(out, finished)


def test_a_truncated_checkpoint_is_set_aside_for_the_previous_one(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[: len(whole) // 2])
    printed = succeed("--data", data, "--out", out, *RANDOM, "--resume")
    assert re.search(rf"^{re.escape(str(out))}/last\.pt is damaged \(.+\)$", printed, flags=re.MULTILINE)
    assert f"resuming from {out / 'previous.pt'}, after epoch 1, step 4" in printed
    assert len((out / "last.pt.damaged").read_bytes()) == len(whole) // 2
    assert_same_run(out, finished)


def test_the_scale_of_half_gradients_is_part_of_a_checkpoint(imagenet: ModuleType, tmp_path: Path) -> None:
    args = imagenet.parse_args(["--fake-data", "8", "--out", str(tmp_path), *SMALL, "--amp", "fp16"])

    def make_run() -> Any:
        models = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 5)) for _ in range(2)]
        return imagenet.Run(args, imagenet.World(), torch.device("cpu"), models[0], torch.nn.ModuleList(models[1:]))

    run, resumed = make_run(), make_run()
    before = run.student[1].weight.clone()
    batch = (torch.randn(8, 3, 3, 3), torch.randint(5, (8,)))
    imagenet.train_step(run, iter([batch]), imagenet.make_mixing(args, 5))
    assert not torch.equal(run.student[1].weight, before)
    imagenet.save_checkpoint(run, {})
    imagenet.restore(resumed, checkpoint(tmp_path / "last.pt"))
    assert resumed.scaler.state_dict()["_growth_tracker"] == 1
    assert resumed.scaler.state_dict() == run.scaler.state_dict()
    assert torch.equal(resumed.student[1].weight, run.student[1].weight)


def test_a_finished_run_has_nothing_to_do(
    imagenet: ModuleType, finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    imagenet.main([str(option) for option in ("--data", data, "--out", finished, *RANDOM, "--resume")])
    assert "nothing to do: this run has finished its 2 epochs" in capsys.readouterr().out
    assert contents(finished) == before


def test_resume_starts_a_run_where_there_is_none(imagenet: ModuleType, tmp_path: Path) -> None:
    identity = {"student": "resnet18"}
    assert imagenet.read_out(tmp_path / "new", True, identity) is None
    assert (tmp_path / "new").is_dir()


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_ones(imagenet: ModuleType, tmp_path: Path) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for content in (b"1", b"2"):
        imagenet.write_whole(last, lambda file, content=content: file.write(content), backup=previous)

    def fail(file: Any) -> None:
        file.write(b"3")
        raise OSError(28, "No space left on device")

    with pytest.raises(imagenet.Problem, match=r"cannot write .*last\.pt: .*No space left"):
        imagenet.write_whole(last, fail, backup=previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"2", b"1")


# Errors -------------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(imagenet: ModuleType, out: Path, *options: object) -> str:
    """The line with which the program ends, having written nothing."""
    before = contents(out)
    with pytest.raises(SystemExit) as ended:
        imagenet.main(["--out", str(out), *SMALL, *map(str, options)])
    line = str(ended.value.code)
    assert line.startswith("imagenet.py: error: ")
    assert len(line.splitlines()) == 1
    assert contents(out) == before
    return line


def test_an_error_is_one_line_of_the_program(tmp_path: Path) -> None:
    done = run("--data", tmp_path / "missing", "--out", tmp_path / "run", *SMALL)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr == (
        f"imagenet.py: error: no folder {tmp_path}/missing/train: --data takes a folder that holds train and val, "
        "with a folder per class\n"
    )
    assert not (tmp_path / "run").exists()


def test_unknown_models_are_refused(imagenet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ("--fake-data", 8, "--fake-classes", 4)
    monkeypatch.setitem(sys.modules, "timm", None)
    line = refuse(imagenet, tmp_path, *fake, "--student", "resnet81")
    assert "torchvision has no model 'resnet81', and timm is missing (pip install timm); did you mean resnet18?" in line
    assert "'timm:mobilenetv1_100', and timm is missing" in refuse(
        imagenet, tmp_path, *fake, "--teacher", "timm:mobilenetv1_100"
    )
    assert "'fcn_resnet50'" in refuse(imagenet, tmp_path, *fake, "--student", "fcn_resnet50")  # a segmentation model

    timm = ModuleType("timm")
    timm.is_model = lambda name: name == "known"
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert imagenet.library_of("known") == imagenet.library_of("timm:known") == "timm"
    assert "neither torchvision nor timm has a model 'unknown'" in refuse(
        imagenet, tmp_path, *fake, "--student", "timm:unknown"
    )


def test_a_teacher_of_other_classes_is_refused(
    imagenet: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "run", tmp_path / "seven.pt"
    torch.save({"state_dict": torchvision.models.squeezenet1_1(num_classes=7).state_dict()}, file)
    line = refuse(imagenet, out, "--data", data, "--teacher-checkpoint", file)
    assert f"the teacher {file} has 7 classes, the data 4" in line

    # The pretrained file of 1000 classes, where torchvision would have put it.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    url = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    pretrained = tmp_path / "home" / "hub" / "checkpoints" / url.split("/")[-1]
    pretrained.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), pretrained)
    line = refuse(imagenet, out, "--data", data, "--teacher-weights", "v1")
    assert "the teacher squeezenet1_1 has 1000 classes, the data 4" in line


def test_a_teacher_that_cannot_be_loaded_is_refused(
    imagenet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "run", tmp_path / "teacher.pt"
    fake = ("--fake-data", 8, "--fake-classes", 4)
    assert "cannot read the teacher checkpoint" in refuse(imagenet, out, *fake, "--teacher-checkpoint", file)
    file.write_bytes(b"nothing that torch has written")
    assert "cannot read the teacher checkpoint" in refuse(imagenet, out, *fake, "--teacher-checkpoint", file)
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=4).state_dict(), file)
    assert "is not one of squeezenet1_1: " in refuse(imagenet, out, *fake, "--teacher-checkpoint", file)
    assert "squeezenet1_1 has no weights 'v9', only IMAGENET1K_V1" in refuse(
        imagenet, out, *fake, "--teacher-weights", "v9"
    )
    assert "squeezenet1_1 does not take images of 8 x 8 pixels: " in refuse(imagenet, out, *fake, "--image-size", 8)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing answers
    line = refuse(imagenet, out, *fake, "--teacher-weights", "v1")
    assert "cannot make squeezenet1_1 with weights v1 (URLError: " in line


def test_another_run_is_never_overwritten(imagenet: ModuleType, finished: Path, data: Path, tmp_path: Path) -> None:
    line = refuse(imagenet, finished, "--data", data)
    assert f"{finished} holds a run already (last.pt): --resume continues it, another --out starts anew" in line
    line = refuse(imagenet, finished, "--data", data, "--resume", "--alpha", 0)
    assert f"{finished} holds another run, with alpha 2.5, not 0.0" in line
    assert "with training images 40, not 64" in refuse(
        imagenet, finished, "--fake-data", 64, "--fake-classes", 4, "--resume", "--mixup", 0.2
    )
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes()[:1000])
    assert "holds a run (last.pt) but no checkpoint that can be read" in refuse(
        imagenet, tmp_path, "--data", data, "--resume"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--batch", 9, "--accumulate", 2),
            "a batch of 9 cannot be split evenly between 1 x 2 (processes x micro-batches)",
        ),
        (("--batch", 64), "40 training images do not fill one batch of 64"),
        (("--sync-bn",), "--sync-bn needs GPUs"),
        (("--teacher-checkpoint", "x") * 2, "got 1 --teacher, but 2 --teacher-checkpoint"),
        (("--epochs", 0), "argument --epochs: must be at least 1, got 0"),
        (("--lr", "nan"), "argument --lr: must be finite and > 0, got nan"),
        (("--device", "abacus"), "--device abacus is not one of cpu"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    imagenet: ModuleType, data: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    assert message in refuse(imagenet, tmp_path / "run", "--data", data, *options)


def test_folders_that_do_not_fit_are_refused(imagenet: ModuleType, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    shutil.copytree(data, other)
    shutil.rmtree(other / "val" / "class3")
    assert "the class class3 is in only one of train and val" in refuse(imagenet, tmp_path / "run", "--data", other)
    (other / "val" / "class3").mkdir()
    assert "no valid file for the classes class3" in refuse(imagenet, tmp_path / "run", "--data", other)


def test_a_diverged_run_ends_with_its_checkpoints_intact(
    imagenet: ModuleType, finished: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"the loss of epoch 1 is (nan|inf) by step 5; no checkpoint has it"):
        imagenet.main(["--data", str(data), "--out", str(out), *SMALL, "--lr", "1e30"])
    stopped = checkpoint(out / "last.pt")
    assert (stopped["epoch"], stopped["step"]) == (0, 0)
    assert all(value.isfinite().all() for value in stopped["model"].values())


def truncate_an_image(data: Path, folder: Path, split: str) -> Path:
    shutil.copytree(data, folder)
    image = folder / split / "class2" / "1.jpeg"
    image.write_bytes(image.read_bytes()[:500])
    return image


def test_a_corrupt_image_is_named(imagenet: ModuleType, data: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "run"
    image = truncate_an_image(data, folder, "train")
    message = f"^imagenet.py: error: cannot read the image {re.escape(str(image))}: .+$"
    with pytest.raises(SystemExit, match=message):  # read by a worker process
        imagenet.main([str(option) for option in ("--data", folder, "--out", out, *SMALL, "--workers", 1)])


def test_a_corrupt_image_is_named_once_and_no_process_hangs(data: Path, tmp_path: Path) -> None:
    """One process of two meets it, in validation, while the other waits for its sums."""
    folder, out = tmp_path / "data", tmp_path / "run"
    image = truncate_an_image(data, folder, "val")
    done = run("--data", folder, "--out", out, *SMALL, "--epochs", 1, processes=2)
    assert done.returncode != 0
    (told,) = [line for line in done.stderr.splitlines() if "imagenet.py: error:" in line]
    assert re.fullmatch(rf"imagenet\.py: error: cannot read the image {re.escape(str(image))}: .+", told)
    assert f'File "{IMAGENET}"' not in done.stderr  # torchrun adds a traceback of its own
    assert checkpoint(out / "last.pt")["epoch"] == 0
