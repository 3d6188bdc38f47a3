"""examples/imagenet.py as its users run it, alone or under torchrun, on small images.

Each process has one thread, so that runs to be compared add in the same order.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighted_soft_labels import reference

torchvision, v2, Image, *_ = (
    pytest.importorskip(
        module, reason=f"{module} is missing: pip install weighted-soft-labels[examples]"
    )
    for module in ("torchvision", "torchvision.transforms.v2", "PIL.Image", "tensorboard", "tqdm")
)

IMAGENET = Path(__file__).parents[1] / "examples" / "imagenet.py"
CLASSES, TRAIN, VAL = 4, 10, 3  # images of a class
SMALL = (
    *("--teacher", "squeezenet1_1", "--model", "shufflenet_v2_x0_5", "--image-size", 32),
    *("--batch-size", 8, "--epochs", 2, "--lr", 0.002, "--lr-step", 1, "--workers", 0),
)
# Without batch norm and dropout, which depend on the number of processes by design.
NO_BATCH_NORM = (*SMALL, "--model", "squeezenet1_1")
WITHOUT_DROPOUT = "torch.nn.Dropout.forward = lambda self, x: x"
SLEEPS_IN_THE_SECOND_EPOCH = """
step, count = torch.optim.SGD.step, iter(range(9999))
torch.optim.SGD.step = lambda *a, **k: (next(count) == 7 and time.sleep(60), step(*a, **k))[1]
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def imagenet() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(IMAGENET)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise whose brightness tells the class, as PNG and JPEG; a teacher. `val` has 13 images."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(
                    40 * label, 40 * label + 100, (40, 36, 3), generator=generator
                )
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(
                    folder / split / f"class{label}" / f"{index}.{('png', 'jpeg')[index % 2]}"
                )
    shutil.copy(folder / "val" / "class0" / "0.png", folder / "val" / "class0" / "again.png")
    state = torchvision.models.squeezenet1_1(num_classes=CLASSES).state_dict()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        folder / "teacher.pt",
    )
    return folder


def start(
    folder: Path, *options: object, processes: int = 0, first: str = ""
) -> subprocess.Popen[str]:
    """Start a copy of the script in `folder`. The code `first` runs before it."""
    script, wrapper = shutil.copy(IMAGENET, folder), folder / "wrapper.py"
    wrapper.write_text(
        f"import runpy, time, torch\n{first}\nrunpy.run_path({str(script)!r}, run_name='__main__')"
    )
    torchrun = (
        f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
        if processes
        else []
    )
    command = [sys.executable, *torchrun, *map(str, (wrapper if first else script, *options))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def succeed(*arguments: Any, **how: Any) -> None:
    process = start(*arguments, **how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The script in this process, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*options: object) -> None:
        monkeypatch.setattr(sys, "argv", ["imagenet.py", *map(str, options)])
        runpy.run_path(str(IMAGENET), run_name="__main__")

    return run


def on(data: Path) -> tuple[object, ...]:
    return "--data", data, "--teacher-checkpoint", data / "teacher.pt"


def log(out: Path) -> list[dict[str, float]]:
    with open(out / "log.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.pt", weights_only=True)


def assert_validated(row: dict[str, float], student: nn.Module, data: Path) -> None:
    """Compare with one batch of all images, read by torchvision alone."""
    tail = (
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )
    transform = v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.PILToTensor(), *tail])
    images, labels = zip(*torchvision.datasets.ImageFolder(str(data / "val"), transform))
    assert len(images) == CLASSES * VAL + 1
    with torch.no_grad():
        logits = student.eval()(torch.stack(images))
    assert row["val_loss"] == pytest.approx(
        F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-4
    )
    right = (logits.argmax(1) == torch.tensor(labels)).sum().item()
    assert row["val_top1"] == pytest.approx(100 * right / len(images))
    assert row["val_top5"] == 100


# A run --------------------------------------------------------------------------------------------


def test_every_option_at_once_on_fake_data(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager")
    )
    options = (
        "--fake-data 16 --epochs 1 --accumulate 2 --amp bf16 --channels-last --compile "
        "--teacher-train-mode --teacher squeezenet1_1 squeezenet1_0 --label-smoothing 0.1 "
        "--mixup 0.2 --cutmix 1 --out"
    )
    run(*NO_BATCH_NORM, *options.split(), tmp_path)
    (row,) = log(tmp_path)
    assert (row["epoch"], row["lr"]) == (1, 0.002)
    assert 0 < row["weight"] < 1 < row["images_per_s"]
    assert 0 < row["hard"] < row["loss"] < 100
    assert 0 <= row["val_top1"] <= row["val_top5"] <= 100
    assert 0 < row["waiting_for_data"] < 1
    torchvision.models.squeezenet1_1().load_state_dict(
        checkpoint(tmp_path)["model"]
    )  # torch.compile's would not fit
    events = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    assert {b"step/loss", b"step/weight", b"epoch/val_top1"} <= set(re.findall(rb"\w+/\w+", events))


def ce(
    student: Tensor, teacher: Tensor, target: Tensor, *, label_smoothing: float, **_: float
) -> Tensor:
    return F.cross_entropy(student, target, label_smoothing=label_smoothing)


def kd(student: Tensor, teacher: Tensor, target: Tensor, **options: float) -> Tensor:
    T = options["temperature"]
    soft = F.kl_div((student / T).log_softmax(1), (teacher / T).softmax(1), reduction="batchmean")
    return (
        options["hard_weight"] * ce(student, teacher, target, **options)
        + options["alpha"] * T**2 * soft
    )


@pytest.mark.parametrize("mixing", [[], ["--mixup", 0.2]])
@pytest.mark.parametrize("loss", [ce, kd, reference.wsl_loss])
def test_a_step_is_that_of_the_papers_optimiser_on_the_loss_asked_for(
    run: Any,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loss: Any,
    mixing: list[object],
) -> None:
    """Two micro-batches and two teachers, compared with the reference loss and SGD by hand."""
    batches: list[tuple[Tensor, Tensor]] = []
    mix = v2.RandomChoice.forward
    monkeypatch.setattr(
        v2.RandomChoice, "forward", lambda *batch: batches.append(mix(*batch)) or batches[-1]
    )
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    torch.manual_seed(5)
    teachers = [torchvision.models.squeezenet1_1(num_classes=CLASSES).eval() for _ in range(2)]
    files = [tmp_path / "0.pt", tmp_path / "1.pt"]
    for teacher, file in zip(teachers, files):
        torch.save(teacher.state_dict(), file)
    options = {"temperature": 3.0, "alpha": 1.5, "hard_weight": 0.5, "label_smoothing": 0.1}
    given = [
        text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)
    ]
    given += ["--loss", loss.__name__.removesuffix("_loss"), *mixing]
    if loss is not ce:
        given += ["--teacher", *["squeezenet1_1"] * 2, "--teacher-checkpoint", *files]
    step = f"--epochs 1 --batch-size {CLASSES * TRAIN} --accumulate 2 --lr 0.1".split()
    run("--data", data, *NO_BATCH_NORM, *step, *given, "--out", tmp_path)

    torch.manual_seed(0)
    student = torchvision.models.squeezenet1_1(num_classes=CLASSES)
    assert [len(images) for images, _ in batches] == [CLASSES * TRAIN / 2] * 2
    for images, target in batches:
        assert target.is_floating_point() == bool(mixing)
        with torch.no_grad():
            mean = (teachers[0](images) + teachers[1](images)) / 2
        (loss(student(images), mean, target, **options) / 2).backward()
    for parameter in student.parameters():
        decayed = parameter.grad + 1e-4 * parameter.detach()
        parameter.data -= 0.1 * (decayed + 0.9 * decayed)  # Nesterov's first step
    torch.testing.assert_close(
        checkpoint(tmp_path)["model"], student.state_dict(), rtol=1e-4, atol=1e-5
    )
    assert_validated(log(tmp_path)[0], student, data)


def test_every_process_crops_an_image_alike_and_epochs_differ(
    imagenet: SimpleNamespace, data: Path
) -> None:
    args = argparse.Namespace(data=data, fake_data=None, image_size=32)
    images = imagenet.Augmented(imagenet.make_data(args)[0], seed=0)
    state, before = torch.get_rng_state(), images[3, 5][0]
    assert torch.equal(torch.get_rng_state(), state)  # the training's random numbers
    torch.rand(1)
    assert torch.equal(images[3, 5][0], before)
    assert not torch.equal(images[4, 5][0], before)


def test_seeds_differ_between_epochs_images_and_processes(imagenet: SimpleNamespace) -> None:
    numbers = [(0, epoch, index) for epoch in range(30) for index in range(1000)]
    seeds = {imagenet.mix(*each) for each in numbers}
    assert len(seeds) > 0.999 * len(numbers)
    assert max(seeds) < 2**32  # the part of a seed that torch's generator reads


def test_processes_share_every_global_batch(imagenet: SimpleNamespace) -> None:
    def batches(rank: int, world: int, accumulate: int) -> list[list[tuple[int, int]]]:
        args = argparse.Namespace(batch_size=12, accumulate=accumulate, seed=0)
        return imagenet.micro_batches(50, 7, args, rank, world)

    alone = batches(0, 1, 1)
    assert [len(batch) for batch in alone] == [12] * 4  # of the 50 images 2 are skipped
    assert {epoch for batch in alone for epoch, _ in batch} == {7}
    assert len({index for batch in alone for _, index in batch}) == 48
    shares = [batches(rank, 3, 2) for rank in range(3)]
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(
            image for share in shares for half in share[2 * step :][:2] for image in half
        )


def test_the_papers_mobilenet_has_relu_and_the_default_initialisation(
    imagenet: SimpleNamespace,
) -> None:
    pytest.importorskip(
        "timm", reason="timm is missing: pip install weighted-soft-labels[examples]"
    )
    model = imagenet.make_model("mobilenetv1", 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_231_976
    assert {
        type(module).__name__ for module in model.modules() if "ReLU" in type(module).__name__
    } == {"ReLU"}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())  # uniform up to it
            assert 0.9 * bound < module.weight.abs().max().item() <= bound


# Several processes, and runs that were stopped ----------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_either_resumes_them(
    data: Path, tmp_path: Path
) -> None:
    """On the same global batches. Each of the two processes has two micro-batches a step."""
    one, two, mixed = tmp_path / "one", tmp_path / "two", tmp_path / "mixed"
    options = (tmp_path, *on(data), *NO_BATCH_NORM)
    halves = ("--epochs", 1, "--out", two, "--accumulate", 2, "--workers", 1)
    succeed(*options, "--out", one, first=WITHOUT_DROPOUT)
    succeed(*options, *halves, first=WITHOUT_DROPOUT, processes=2)
    shutil.copytree(two, mixed)
    succeed(*options, *halves, "--epochs", 2, "--resume", first=WITHOUT_DROPOUT, processes=2)
    succeed(*options, "--out", mixed, "--resume", first=WITHOUT_DROPOUT)

    assert [row["lr"] for row in log(one)] == [0.002, pytest.approx(0.0002)]
    for other in (two, mixed):
        torch.testing.assert_close(
            checkpoint(one)["model"], checkpoint(other)["model"], rtol=1e-4, atol=1e-5
        )
        for row, other_row in zip(log(one), log(other), strict=True):
            for name in ("epoch", "lr", "val_loss", "val_top1", "val_top5"):
                assert row[name] == pytest.approx(other_row[name], rel=1e-5), name


@pytest.mark.slow
def test_two_processes_validate_every_image_once_as_saved(data: Path, tmp_path: Path) -> None:
    """With 13 images, padding would count one twice. Batch statistics differ between processes."""
    options = (*on(data), *SMALL, "--epochs", 1, "--out", tmp_path)
    succeed(tmp_path, *options, processes=2)
    student = torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES)
    student.load_state_dict(checkpoint(tmp_path)["model"])
    assert_validated(log(tmp_path)[0], student, data)


@pytest.mark.slow
def test_killed_in_mid_epoch_and_resumed_gives_the_same_bits(data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = (tmp_path, *on(data), *SMALL, "--mixup", 0.2, "--resume", "--out")
    succeed(*options, whole)
    with start(*options, out, "--workers", 1, first=SLEEPS_IN_THE_SECOND_EPOCH) as process:
        limit = time.monotonic() + 60
        while (
            not (out / "last.pt").exists() and process.poll() is None and time.monotonic() < limit
        ):
            time.sleep(0.02)
        time.sleep(1)  # to be in the second epoch
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert checkpoint(out)["epoch"] == 1
    succeed(*options, out)

    a, b = checkpoint(whole), checkpoint(out)
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    for index, state in a["optimizer"]["state"].items():
        assert torch.equal(
            state["momentum_buffer"], b["optimizer"]["state"][index]["momentum_buffer"]
        ), index
    for row, other in zip(log(whole), log(out), strict=True):
        assert {name for name in row if row[name] != other[name]} <= {
            "images_per_s",
            "waiting_for_data",
        }


# Resuming a run -----------------------------------------------------------------------------------


def test_prints_the_log_and_where_the_results_are(
    run: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", data, *SMALL, "--loss", "ce", "--log-every", 2, "--out", tmp_path)
    run(*options, "--epochs", 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        f"epoch 1, step {step} of 5" for step in (2, 4, 5)
    ]
    assert lines[-1] == f"finished 1 epochs: log.csv, last.pt and tensorboard are in {tmp_path}"

    before = contents(tmp_path)
    run(*options, "--epochs", 1, "--resume")
    resumed, finished = capsys.readouterr().out.splitlines()
    assert resumed == f"resumed {tmp_path}/last.pt after epoch 1"
    assert finished == lines[-1]
    assert contents(tmp_path) == before


def test_resuming_refuses_another_loss_but_not_another_precision(
    run: Any, data: Path, tmp_path: Path
) -> None:
    options = (*on(data), *SMALL, "--resume", "--out", tmp_path)
    run(*options, "--epochs", 1)
    other = tmp_path / "other.pt"
    torch.save(torchvision.models.squeezenet1_1(num_classes=CLASSES).state_dict(), other)
    before = contents(tmp_path)
    for changed, message in {
        ("--loss", "kd"): "--loss wsl, not kd",
        ("--alpha", 1): "--alpha 2.5, not 1.0",
        ("--temperature", 4): "--temperature 2.0, not 4.0",
        ("--teacher-checkpoint", other): "--teacher-checkpoint ",
    }.items():
        with pytest.raises(ValueError, match=f"{tmp_path}/last.pt was trained with {message}"):
            run(*options, *changed)
    assert contents(tmp_path) == before

    run(*options, "--epochs", 2, "--amp", "fp16", "--log-every", 1)
    assert checkpoint(tmp_path)["scaler"]
    run(*options, "--epochs", 3)
    assert [row["epoch"] for row in log(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "ce", "--teacher-checkpoint", "x"), "--loss ce has no teacher"),
        (("--teacher-checkpoint", "x", "y"), "2 --teacher-checkpoint for 1 --teacher"),
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    run: Any, tmp_path: Path, options: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--out", tmp_path, *options)
    assert message in capsys.readouterr().err


# Bad input ----------------------------------------------------------------------------------------


def test_bad_data_is_named(run: Any, data: Path, tmp_path: Path) -> None:
    options = (*SMALL, "--loss", "ce", "--out", tmp_path / "out", "--data")
    folder = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=f"{folder}/train"):
        run(*options, folder)
    shutil.copytree(data, folder)
    image = folder / "val" / "class2" / "1.jpeg"
    image.write_bytes(image.read_bytes()[:500])
    with pytest.raises(OSError, match=f"cannot read the image {image}: "):
        run(*options, folder)
    shutil.rmtree(folder / "val" / "class3")
    with pytest.raises(
        ValueError, match=rf"{folder}: only one of train and val has \{{'class3'\}}"
    ):
        run(*options, folder)
    for size in (9, 48):
        with pytest.raises(
            ValueError, match=rf"must be at most 40 \(images\), a multiple of 2 .*, got {size}"
        ):
            run(*options, data, "--accumulate", 2, "--batch-size", size)


def test_a_bad_teacher_is_named(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", data, *SMALL, "--out", tmp_path / "out")
    file = tmp_path / "teacher.pt"
    with pytest.raises(FileNotFoundError, match=f"checkpoint {file} does not exist"):
        run(*options, "--teacher-checkpoint", file)
    torch.save(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), file)
    with pytest.raises(ValueError, match=r"does not fit squeezenet1_1 .*\[7, .*\[4, "):
        run(*options, "--teacher-checkpoint", file)
    with pytest.raises(ValueError, match=r"does not fit resnet18 .*conv1.weight") as caught:
        run(*options, "--teacher", "resnet18", "--teacher-checkpoint", file)
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="mobilenetv1 has no pretrained weights"):
        run(*options, "--teacher", "mobilenetv1")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"cannot read checkpoint {file}: it is truncated"):
        run(*options, "--teacher-checkpoint", file)

    # A pretrained file with 1000 classes, where torchvision looks for it.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    torch.save(
        torchvision.models.squeezenet1_1().state_dict(),
        tmp_path / "hub" / "checkpoints" / Path(url).name,
    )
    with pytest.raises(ValueError, match="the teacher squeezenet1_1 has 1000 classes, the data 4"):
        run(*options)


def test_a_run_is_neither_overwritten_nor_spoilt(run: Any, data: Path, tmp_path: Path) -> None:
    options = ("--data", data, *SMALL, "--loss", "ce", "--out", tmp_path)
    run(*options, "--epochs", 1)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match=rf"{tmp_path}/last\.pt exists: continue its run by"):
        run(*options)
    broken = checkpoint(tmp_path)
    broken["model"]["fc.bias"].fill_(math.inf)
    torch.save(broken, tmp_path / "last.pt")
    broken_bytes = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FloatingPointError, match=r"the loss after epoch 2 is (nan|inf)"):
        run(*options, "--resume")
    assert (tmp_path / "last.pt").read_bytes() == broken_bytes
    (tmp_path / "last.pt").write_bytes(before)
    run(*options, "--resume")
    assert [row["epoch"] for row in log(tmp_path)] == [1, 2]
