"""examples/cifar.py: a run, killed and resumed; bad input; its data, crops and losses."""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import itertools
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weighted_soft_labels.reference import wsl_loss

pytest.importorskip(
    "torchvision", reason="torchvision is missing: pip install weighted-soft-labels[examples]"
)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import cifar  # noqa: E402
from cifar_models import MODELS  # noqa: E402
from torchvision import datasets  # noqa: E402
from torchvision.transforms import functional as tv  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ("--fake-data", 192, "--batch-size", 16, "--model", "resnet8")
STUDENT = (*TINY, "--teacher", "resnet8", "--teacher-checkpoint", "teacher/last.pt")


def start(folder: Path, *options: object, **how: Any) -> subprocess.Popen[bytes]:
    """On one thread, which is fast enough for networks this small."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "cifar.py", *map(str, options)]
    return subprocess.Popen(command, cwd=folder, env=environment, **how)


def run(folder: Path, *options: object) -> str:
    """Returns what the script prints."""
    process = start(folder, *options, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return output.decode()


def main(*options: object) -> None:
    cifar.main([str(option) for option in options])


def log(folder: Path) -> list[dict[str, float]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of the script and its networks, a trained teacher and a student."""
    folder = tmp_path_factory.mktemp("copied")
    for name in ("cifar.py", "cifar_models.py"):
        shutil.copy(EXAMPLES / name, folder)
    main(*TINY, "--loss", "ce", "--epochs", 1, "--out", folder / "teacher")
    (folder / "printed").write_text(run(folder, *STUDENT, "--epochs", 2, "--out", "finished"))
    return folder


@pytest.fixture
def finished(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The student's run. `copied` is the current folder."""
    monkeypatch.chdir(copied)
    return Path("finished")


# A run, killed and resumed ------------------------------------------------------------------------


def test_leaves_log_curves_and_checkpoint(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"log.csv", "curves.png", "last.pt"}
    rows = log(finished)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        # alpha * T^2 = 36, and the mean of weight * soft is about the product of the means.
        assert row["loss"] == pytest.approx(
            row["hard"] + 36 * row["weight"] * row["soft"], rel=0.05
        )
        assert 0 < row["weight"] < 1
    assert rows[1]["loss"] < rows[0]["loss"]


def test_last_checkpoint_holds_the_model_of_the_last_row(finished: Path) -> None:
    model = MODELS["resnet8"](num_classes=100)
    model.load_state_dict(torch.load(finished / "last.pt")["model"])
    batches = cifar.Batches(arguments(*TINY), train=False)
    result = cifar.evaluate(model, batches, torch.autocast("cpu", enabled=False))
    assert result["test_loss"] == pytest.approx(log(finished)[1]["test_loss"], rel=1e-4)


def test_prints_some_lines_an_epoch_and_where_the_results_are(finished: Path) -> None:
    lines = Path("printed").read_text().splitlines()
    steps = [f"epoch 2/2: {step} of 12 steps" for step in (3, 6, 9, 12)]
    assert [line for line in lines if line.startswith("epoch 2/2: ")] == steps
    assert lines[-1] == "finished 2 epochs: log.csv, curves.png and last.pt are in finished"


def test_killed_within_an_epoch_and_resumed_ends_with_the_same_bits(finished: Path) -> None:
    """Also with another number of epochs than before."""
    last = Path("killed/last.pt")
    process = start(Path(), *STUDENT, "--epochs", 3, "--out", "killed")
    while not last.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.05)
    process.kill()
    assert process.wait() == -9
    assert len(torch.load(last)["rows"]) == 1, "it was not within the second epoch"

    run(Path(), *STUDENT, "--epochs", 2, "--out", "killed", "--resume")
    expected, resumed = torch.load(finished / "last.pt"), torch.load(last)
    for row in expected["rows"] + resumed["rows"]:
        del row["images_per_second"]
    for key in ("rows", "model", "optimizer"):
        torch.testing.assert_close(resumed[key], expected[key], rtol=0, atol=0)


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    main(*STUDENT, "--epochs", 2, "--out", finished, "--resume", "--channels-last")
    assert contents(finished) == before
    resumed, results = capsys.readouterr().out.splitlines()
    assert resumed == "resumed finished/last.pt after epoch 2"
    assert results.startswith("finished 2 epochs: log.csv, ")


@pytest.mark.filterwarnings("error")
def test_learning_rate_follows_from_the_epoch_also_after_resuming_for_longer(
    tmp_path: Path,
) -> None:
    options = ("--fake-data", 8, "--model", "resnet8", "--loss", "ce", "--out", tmp_path)
    main(*options, "--epochs", 4)
    assert [row["lr"] for row in log(tmp_path)] == pytest.approx([0.05, 0.05, 0.05, 5e-4])
    main(*options, "--epochs", 8, "--resume")
    assert [row["lr"] for row in log(tmp_path)[4:]] == pytest.approx([0.05, 0.005, 5e-4, 5e-5])


@pytest.mark.parametrize(
    "more", [("--loss", "kd", "--amp", "fp16"), ("--loss", "wsl", "--channels-last")]
)
def test_trains_in_other_precisions_and_layouts(
    finished: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "last.tmp").touch()  # of a run that was killed in its first epoch
    options = (*STUDENT, "--fake-data", 8, "--out", tmp_path, "--resume", *more)
    main(*options, "--epochs", 1)
    assert log(tmp_path)[0]["loss"] < 1000  # false for NaN


def test_fp32_run_goes_on_in_fp16(tmp_path: Path) -> None:
    options = ("--fake-data", 8, "--model", "resnet8", "--loss", "ce", "--out", tmp_path)
    main(*options, "--epochs", 1)
    main(*options, "--epochs", 2, "--resume", "--amp", "fp16")
    assert torch.load(tmp_path / "last.pt")["scaler"]


# Bad input: the exception names the fault, and no file changes ------------------------------------

BAD_INPUT = {  # options: message
    ("--out", "finished"): "--out finished is not empty",
    ("--out", "finished", "--resume", "--alpha", "1"): (
        "finished/last.pt was trained with --alpha 2.25, not 1.0"
    ),
    ("--out", "finished", "--resume", "--teacher-checkpoint", "other.pt"): (
        "finished/last.pt was trained with --teacher-checkpoint "
    ),
    ("--out", "half", "--resume"): "cannot read checkpoint half/last.pt: it is truncated",
    ("--dataset", "cifar10"): (
        "teacher/last.pt does not fit resnet8 with 10 classes (--teacher, --dataset): size mismatch"
    ),
    ("--teacher", "resnet14"): "teacher/last.pt does not fit resnet14 with 100 classes",
    ("--teacher-checkpoint", "missing.pt"): "checkpoint missing.pt does not exist",
    ("--teacher-checkpoint", "half/last.pt"): "cannot read checkpoint half/last.pt",
    ("--fake-data", "0", "--data", "missing"): "--data missing does not exist: --download",
    ("--fake-data", "0", "--data", "teacher"): "cifar100 is missing or damaged in teacher",
}


@pytest.mark.parametrize("more", BAD_INPUT)
def test_bad_input_is_named(finished: Path, more: tuple[str, ...]) -> None:
    content = Path("teacher/last.pt").read_bytes()
    Path("half").mkdir(exist_ok=True)
    Path("half/last.pt").write_bytes(content[: len(content) // 2])
    torch.save({"model": torch.load(finished / "last.pt")["model"]}, "other.pt")
    before = contents(Path())
    with pytest.raises((OSError, RuntimeError, ValueError)) as caught:
        main(*STUDENT, "--out", "new", *more)
    assert BAD_INPUT[more] in str(caught.value)
    assert len(str(caught.value)) < 350
    assert contents(Path()) == before


def test_resuming_with_another_loss_names_both(finished: Path) -> None:
    with pytest.raises(ValueError, match="was trained with --loss wsl, not ce"):
        main(*TINY, "--loss", "ce", "--out", finished, "--resume")


def test_resuming_without_a_teacher_ignores_the_options_of_distillation(tmp_path: Path) -> None:
    options = ("--fake-data", 8, "--model", "resnet8", "--loss", "ce", "--out", tmp_path)
    main(*options, "--epochs", 1, "--teacher", "resnet56", "--alpha", 1)
    main(*options, "--epochs", 2, "--resume")
    assert len(log(tmp_path)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "ce", "--teacher-checkpoint", "x"), "--loss ce has no teacher"),
        (("--loss", "kd"), "--loss kd needs a --teacher-checkpoint"),
        (("--loss", "ce", "--epochs", "0"), "--epochs must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main("--out", "new", *options)
    assert message in capsys.readouterr().err


# Teachers, losses ---------------------------------------------------------------------------------


def arguments(*options: object, loss: str = "ce") -> argparse.Namespace:
    teacher = () if loss == "ce" else ("--teacher-checkpoint", "teacher.pt")
    return cifar.parse_args(
        [str(option) for option in ("--out", "out", "--loss", loss, *teacher, *options)]
    )


@pytest.mark.parametrize("zipped", [False, True])  # torch 1.6 changed the format
def test_loads_a_teacher_in_the_form_of_repdistiller(tmp_path: Path, zipped: bool) -> None:
    model = MODELS["resnet8"](num_classes=100)
    content = {
        "opt": argparse.Namespace(lr_decay_epochs=[150, 180, 210], model="resnet8"),
        "model": model.state_dict(),
        "accuracy": torch.tensor([70.0]),
        "optimizer": torch.optim.SGD(model.parameters(), 0.05, momentum=0.9).state_dict(),
    }
    path = tmp_path / "resnet8_last.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    teacher = cifar.make_model(arguments(), "resnet8", path)
    torch.testing.assert_close(teacher.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_losses_are_what_the_header_says() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 64, 100, generator=generator)
    labels = torch.randint(100, (64,), generator=generator)

    def computed(loss: str, alpha: float = 2.25, hard_weight: float = 1.0) -> float:
        options = {"temperature": 4.0, "alpha": alpha, "hard_weight": hard_weight}
        return cifar.loss_function(loss, student, teacher, labels, **options).item()

    ce = F.cross_entropy(student, labels).item()
    p, q = (F.softmax(logits / 4, dim=1) for logits in (teacher, student))
    kl = (p * (p / q).log()).sum().item() / 64
    assert computed("ce") == pytest.approx(ce)
    assert computed("kd") == pytest.approx(ce + 36 * kl)
    assert computed("kd", alpha=0.9, hard_weight=0.1) == pytest.approx(0.1 * ce + 0.9 * 16 * kl)
    paper = wsl_loss(student, teacher, labels, temperature=4.0, alpha=2.25, hard_weight=0.5)
    assert computed("wsl", hard_weight=0.5) == pytest.approx(paper.item())


# Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_epoch_holds_every_image_once_in_a_crop_of_torchvision(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is one of torchvision's 162: padded, cropped, flipped or not, and normalised."""
    images = torch.randint(256, (200, channels, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(cifar, "load_split", lambda args, train: (images, torch.arange(200)))
    mean, std = cifar.DATASETS["cifar100"][2:]

    def expected(row: int, column: int, flip: bool) -> Tensor:
        crop = tv.crop(tv.pad(images, 4), row, column, 32, 32)
        return tv.normalize(
            (tv.hflip(crop) if flip else crop).expand(-1, 3, -1, -1) / 255, mean, std
        )

    batches = cifar.Batches(arguments(), train=True)
    torch.manual_seed(0)
    first, second = list(batches), list(batches)
    got, index = (torch.cat(parts) for parts in zip(*first))
    assert torch.equal(index.sort().values, torch.arange(200))
    assert not torch.equal(index, torch.cat([index for _, index in second]))
    draws = list(itertools.product(range(9), range(9), (False, True)))
    matches = torch.stack(
        [(expected(*draw)[index] - got).abs().amax((1, 2, 3)) < 1e-5 for draw in draws]
    )
    assert torch.equal(matches.sum(0), torch.ones(200))
    rows, columns, flips = (torch.tensor(values)[matches.int().argmax(0)] for values in zip(*draws))
    assert rows.unique().tolist() == columns.unique().tolist() == list(range(9))
    assert 70 < flips.sum() < 130

    got, index = (torch.cat(parts) for parts in zip(*cifar.Batches(arguments(), train=False)))
    torch.testing.assert_close((got, index), (expected(4, 4, False), torch.arange(200)))


@pytest.mark.parametrize(
    ("below", "packed"),
    [
        pytest.param(".", True, id="debian"),
        pytest.param("FashionMNIST/raw", False, id="torchvision"),
    ],
)
def test_reads_fashion_mnist(tmp_path: Path, below: str, packed: bool) -> None:
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    written = {}
    for prefix, count in (("train", 6), ("t10k", 4)):
        written[f"{prefix}-images-idx3-ubyte"] = torch.randint(
            256, (count, 28, 28), dtype=torch.uint8
        )
        written[f"{prefix}-labels-idx1-ubyte"] = torch.randint(10, (count,), dtype=torch.uint8)
    for name, values in written.items():
        shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
        content = bytes([0, 0, 8, values.ndim]) + shape + values.numpy().tobytes()
        path = tmp_path / below / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)
    args = arguments("--dataset", "fashion-mnist", "--data", tmp_path)
    for prefix in ("train", "t10k"):
        images, labels = cifar.load_split(args, train=prefix == "train")
        assert torch.equal(
            images, F.pad(written[f"{prefix}-images-idx3-ubyte"], (2, 2, 2, 2)).unsqueeze(1)
        )
        assert torch.equal(labels, written[f"{prefix}-labels-idx1-ubyte"].long())
    if packed:
        path.write_bytes(path.read_bytes()[:-1])
        message = f"fashion-mnist is missing or damaged in {tmp_path}"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            cifar.load_split(args, train=False)


def test_reads_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision reads files of CIFAR-100's format, but with other checksums."""
    images, labels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8), [3, 99, 0, 41, 7]
    content = pickle.dumps(
        {"data": images.flatten(1).numpy(), "fine_labels": labels, "fine_label_names": []}
    )
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(content)
    checksum = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", checksum]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [])
    monkeypatch.setattr(
        datasets.CIFAR100, "meta", {"filename": "train", "key": "fine_label_names", "md5": checksum}
    )
    read = cifar.load_split(arguments("--data", tmp_path), train=True)
    torch.testing.assert_close(read, (images, torch.tensor(labels)))


# End to end ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_teacher_and_student_learn_fashion_mnist(copied: Path) -> None:
    """Three epochs on the first 5000 images."""
    source = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if not source.is_dir():
        pytest.skip(
            f"no folder {source}: apt-get install dataset-fashion-mnist, or set FASHION_MNIST"
        )
    (copied / "data").mkdir()
    for split, count in (("train", 5000), ("t10k", 1000)):
        for kind, size in (("images-idx3", 16 + 28 * 28 * count), ("labels-idx1", 8 + count)):
            name = f"{split}-{kind}-ubyte.gz"
            (copied / "data" / name).write_bytes(
                gzip.compress(gzip.decompress((source / name).read_bytes())[:size])
            )
    common = ("--dataset", "fashion-mnist", "--model", "resnet8", "--epochs", 3)
    run(copied, *common, "--loss", "ce", "--out", "fashion/teacher")
    teacher = ("--teacher", "resnet8", "--teacher-checkpoint", "fashion/teacher/last.pt")
    run(copied, *common, *teacher, "--out", "fashion/student")
    assert all(
        log(copied / "fashion" / name)[-1]["test_accuracy"] > 65 for name in ("teacher", "student")
    )


@pytest.mark.slow
def test_compiled_run_goes_on_uncompiled(finished: Path, copied: Path) -> None:
    run(copied, *STUDENT, "--epochs", 1, "--out", "compiled", "--compile")
    run(copied, *STUDENT, "--epochs", 2, "--out", "compiled", "--resume")
    for row, expected in zip(log(copied / "compiled"), log(finished)):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-2)
