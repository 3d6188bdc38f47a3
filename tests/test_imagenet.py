"""The ImageNet example runs as its users run it: as a program, alone or under torchrun, on images small enough for a CPU.

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

for _module in ("torchvision", "tensorboard", "tqdm"):
    pytest.importorskip(_module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]")

import torchvision
from PIL import Image

from weighted_soft_labels import reference

IMAGENET = Path(__file__).parents[1] / "examples" / "imagenet.py"
CLASSES, TRAIN, VAL = 4, 10, 3  # images of a class
SMALL = (
    *("--teacher", "squeezenet1_1", "--teacher-weights", "none", "--student", "shufflenet_v2_x0_5"),
    *("--image-size", "32", "--resize", "36", "--batch", "8", "--epochs", "2", "--lr", "0.002", "--lr-step", "1"),
    *("--device", "cpu", "--workers", "0"),
)
STEPS = CLASSES * TRAIN // 8
# No batch norm, and dropout switched off: what depends on the number of processes by design.
PLAIN = ("--student", "squeezenet1_1")
WITHOUT_DROPOUT = """
import runpy, sys, torch

torch.nn.Dropout.forward = lambda self, x: x
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
    """Noise of another brightness for every class, as PNG and JPEG."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(40 * label, 40 * label + 100, (40, 36, 3), generator=generator)
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(folder / split / f"class{label}" / f"{index}.{('png', 'jpeg')[index % 2]}")
    return folder


def command(*options: object, processes: int = 0, script: Path | None = None) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    scripts = [script, IMAGENET] if script else [IMAGENET]
    return [sys.executable, *torchrun, *map(str, scripts), *map(str, options)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}


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
    """A run of two epochs of five steps that nothing interrupted; dropout, batch norm and a falling learning rate."""
    out = tmp_path_factory.mktemp("finished") / "run"
    succeed("--data", data, "--out", out, *SMALL, "--checkpoint-every", 2)
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
    loss = reference.wsl_loss(torch.nn.functional.linear(images.flatten(1), *before), mean, labels)
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
def one_and_two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The same run on one process and on two, each of which takes its share in two micro-batches; the script."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "without_dropout.py"
    script.write_text(WITHOUT_DROPOUT)
    one, two = folder / "one", folder / "two"
    options = ("--data", data, *SMALL, *PLAIN, "--checkpoint-every", 3)
    succeed(*options, "--out", one, script=script)
    succeed(*options, "--out", two, "--accumulate", 2, "--workers", 1, script=script, processes=2)
    return one, two, script


def assert_same_but_for_rounding(out: Path, other: Path) -> None:
    for row, other_row in zip(log(out), log(other), strict=True):
        for name in ("loss", "hard", "soft", "weight", "val_loss"):
            assert row[name] == pytest.approx(other_row[name], rel=1e-5), name
        for name in ("lr", "train_top1", "train_top5", "val_top1", "val_top5"):
            assert row[name] == pytest.approx(other_row[name]), name
    torch.testing.assert_close(
        checkpoint(out / "last.pt")["model"], checkpoint(other / "last.pt")["model"], rtol=1e-4, atol=1e-5
    )


def test_two_processes_train_as_one_does_on_the_same_global_batch(one_and_two: tuple[Path, Path, Path]) -> None:
    assert_same_but_for_rounding(*one_and_two[:2])


def test_a_run_of_two_processes_resumes_in_mid_epoch_on_one(
    one_and_two: tuple[Path, Path, Path], data: Path, tmp_path: Path
) -> None:
    one, two, script = one_and_two
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(two / "previous.pt", out / "last.pt")
    printed = succeed("--data", data, *SMALL, *PLAIN, "--out", out, "--resume", script=script)
    assert f"resuming from {out / 'last.pt'}, after epoch 1, step 3" in printed
    assert_same_but_for_rounding(one, out)


def test_validation_counts_every_image_once(one_and_two: tuple[Path, Path, Path], data: Path) -> None:
    """13 images for two processes: padding would count one of them twice."""
    one, two, script = one_and_two
    uneven = one.parent / "uneven"
    shutil.copytree(data, uneven)
    shutil.copy(data / "val" / "class0" / "0.png", uneven / "val" / "class0" / "again.png")
    rows = []
    for out, processes in ((one.parent / "uneven-one", 0), (one.parent / "uneven-two", 2)):
        out.mkdir()
        shutil.copy(one / "previous.pt", out / "last.pt")
        options = ("--data", uneven, *SMALL, *PLAIN, "--out", out, "--resume")
        succeed(*options, script=script, processes=processes)
        rows.append(log(out)[-1])
    hits = rows[0]["val_top1"] / 100 * (CLASSES * VAL + 1)
    assert hits == pytest.approx(round(hits))
    for name in ("val_loss", "val_top1", "val_top5"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5), name


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_killed_in_mid_epoch_and_resumed_gives_the_same_bits(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--data", data, "--out", out, *SMALL, "--checkpoint-every", 2, "--resume")
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
