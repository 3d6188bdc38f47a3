"""examples/cifar.py: as a program, killed and resumed, given what it has to refuse; and its data path."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

for _module in ("matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(_module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import cifar  # noqa: E402
from cifar_models import MODELS  # noqa: E402

TINY = ("--fake-data", 160, "--batch-size", 8, "--model", "resnet8")
# One thread, as more gain little on a network this small; and a download fails at once, wherever this runs.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}

Here = Callable[..., subprocess.CompletedProcess[str]]


def command(*options: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / "cifar.py"), *map(str, options)]


def run(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command(*options), cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The program without the seconds that a process takes to start, in `tmp_path`."""

    def run_main(*options: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", command(*options)[1:])
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        code: object = 0
        try:
            cifar.main()
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # as the interpreter does
            code, err = 1, f"{err}{code}\n"
        return subprocess.CompletedProcess(sys.argv, int(code or 0), out, err)

    return run_main


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_speed(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same(a: object, b: object) -> None:
    """Tensors bit for bit, wherever they are in dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    assert without_speed(log(a)) == without_speed(log(b))
    for key in ("model", "optimizer", "scaler", "rng"):
        assert_same(load(a / "last.pt")[key], load(b / "last.pt")[key])
    assert_same(load(a / "best.pt"), load(b / "best.pt"))


def assert_refused(done: subprocess.CompletedProcess[str], *message: str) -> None:
    """With the message in the one line of error."""
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "images/s" not in done.stderr, "the progress bar has started"
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert errors == [done.stderr.splitlines()[-1]]
    for part in message:
        assert part in errors[0]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a teacher for 100 classes, trained by the program."""
    folder = tmp_path_factory.mktemp("teacher")
    done = run(folder, "--train-teacher", *TINY, "--epochs", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert set(contents(folder / "out")) == {"last.pt", "previous.pt", "best.pt", "log.csv", "curves.png"}
    return folder / "out" / "last.pt"


@pytest.fixture(scope="module")
def finished(teacher: Path) -> tuple[Path, tuple[object, ...]]:
    """A student's run that nothing interrupted, and its options."""
    options = (*TINY, "--teacher", "resnet8", "--teacher-checkpoint", teacher, "--epochs", 2, "--checkpoint-every", 3)
    done = run(teacher.parent, *options, "--out", "finished")
    assert done.returncode == 0, done.stderr
    return teacher.parent / "finished", options


# What a run leaves --------------------------------------------------------------------------------------------------


def test_wsl_student_learns_from_a_teacher_of_the_same_script(finished: tuple[Path, tuple[object, ...]]) -> None:
    folder, _ = finished
    rows = log(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.05, 0.05])
    for row in rows:
        # The loss is the hard term and alpha * T^2 = 36 times the mean of weight * soft, which is about soft's.
        hard, soft, weight = (float(row[name]) for name in ("hard", "soft", "weight"))
        assert float(row["loss"]) == pytest.approx(hard + 36 * weight * soft, rel=0.05)
        assert 0 < weight < 1
        assert 0 <= float(row["regularization_share"]) <= 1
        assert float(row["images_per_second"]) > 0
    best = load(folder / "best.pt")
    assert best["test_accuracy"] == pytest.approx(max(float(row["test_accuracy"]) for row in rows), rel=1e-5)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    MODELS["resnet8"](num_classes=100).load_state_dict(load(folder / "last.pt")["model"])


@pytest.mark.parametrize(
    "options",
    [
        ("--loss", "kd", "--amp", "fp16", "--schedule", "cosine"),
        ("--loss", "wsl", "--amp", "bf16", "--channels-last"),
    ],
)
def test_mixed_precision_trains(run_here: Here, teacher: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    small = ("--fake-data", 16, "--batch-size", 8, "--model", "resnet8", "--epochs", 1, "--out", "out")
    done = run_here(*small, "--teacher", "resnet8", "--teacher-checkpoint", teacher, *options)
    assert done.returncode == 0, done.stderr
    (row,) = log(tmp_path / "out")
    assert float(row["loss"]) < 1000  # false for NaN, too


def test_ce_student_has_no_terms_of_a_teacher(run_here: Here, tmp_path: Path) -> None:
    done = run_here(*TINY, "--loss", "ce", "--dataset", "fashion-mnist", "--epochs", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    (row,) = log(tmp_path / "out")
    assert row["soft"] == row["weight"] == row["regularization_share"] == ""
    assert 0 < float(row["loss"]) < 10


# Killed and resumed -------------------------------------------------------------------------------------------------


def kill_within_an_epoch(folder: Path, options: tuple[object, ...]) -> dict:
    """SIGKILL once a checkpoint from inside the second epoch is there. Returns the progress of the last checkpoint."""
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(
        command(*options, "--out", "killed"),
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    out, progress = folder / "killed", {"epoch": 0, "step": 0}
    deadline = time.monotonic() + 100
    try:
        while time.monotonic() < deadline and process.poll() is None and not (progress["epoch"] and progress["step"]):
            time.sleep(0.005)
            with contextlib.suppress(FileNotFoundError):  # not yet, or between the two renames of a save
                progress = load(out / "last.pt")["progress"]
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    return load(out / "last.pt" if (out / "last.pt").exists() else out / "previous.pt")["progress"]


def test_killed_within_an_epoch_and_resumed_ends_with_the_same_bits(
    finished: tuple[Path, tuple[object, ...]], tmp_path: Path
) -> None:
    folder, options = finished
    progress = kill_within_an_epoch(tmp_path, options)
    assert progress["epoch"] == 1
    assert 0 < progress["step"] < 20
    assert len(log(tmp_path / "killed")) == 1

    resumed = run(tmp_path, *options, "--out", "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after 1 epochs and {progress['step']} steps" in resumed.stdout
    assert_same_run(tmp_path / "killed", folder)


def copy(folder: Path, destination: Path) -> Path:
    destination.mkdir()
    for path in folder.iterdir():
        (destination / path.name).write_bytes(path.read_bytes())
    return destination


def test_truncated_checkpoint_gives_way_to_the_previous_one(
    finished: tuple[Path, tuple[object, ...]], tmp_path: Path
) -> None:
    folder, options = finished
    out = copy(folder, tmp_path / "out")
    last = out / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])

    done = run(tmp_path, *options, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming after 1 epochs and 18 steps" in done.stdout
    (warning,) = (line for line in done.stderr.splitlines() if "warning" in line)
    assert "last.pt' is not a complete checkpoint" in warning
    assert "resuming from previous.pt" in warning
    assert_same_run(out, folder)
    assert load(out / "previous.pt")["progress"]["step"] == 18, "the truncated one has taken its place"


@pytest.mark.parametrize("damage", ["empty", "one byte short", "missing"])  # missing: killed between two renames
def test_resumes_from_the_previous_checkpoint(
    finished: tuple[Path, tuple[object, ...]], tmp_path: Path, damage: str
) -> None:
    folder, _ = finished
    out = copy(folder, tmp_path / "out")
    content = (out / "last.pt").read_bytes()
    (out / "last.pt").unlink()
    if damage != "missing":
        (out / "last.pt").write_bytes(b"" if damage == "empty" else content[:-1])
    before = contents(out)
    args = argparse.Namespace(out=out, resume=True)
    checkpoint = cifar.find_checkpoint(args, load(folder / "last.pt")["configuration"])
    assert checkpoint is not None
    assert checkpoint["progress"]["step"] == 18
    assert contents(out) == before


def test_resuming_a_finished_run_changes_nothing(
    run_here: Here, finished: tuple[Path, tuple[object, ...]], tmp_path: Path
) -> None:
    folder, options = finished
    out = copy(folder, tmp_path / "out")
    done = run_here(*options, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(folder)


# Refused, with nothing overwritten ----------------------------------------------------------------------------------


def test_refuses_to_resume_without_a_complete_checkpoint(
    run_here: Here, finished: tuple[Path, tuple[object, ...]], tmp_path: Path
) -> None:
    folder, options = finished
    out = copy(folder, tmp_path / "out")
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes((out / name).read_bytes()[:-1000])
    before = contents(out)
    done = run_here(*options, "--out", out, "--resume")
    assert_refused(done, "last.pt' is not a complete checkpoint", "previous.pt' is not a complete checkpoint")
    assert contents(out) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "holds a run: add --resume to go on with it, or choose another --out"),
        (("--resume", "--alpha", "1"), "holds a run with alpha = 2.25, not 1.0"),
    ],
)
def test_refuses_to_overwrite_a_run(
    run_here: Here, finished: tuple[Path, tuple[object, ...]], more: tuple[str, ...], message: str
) -> None:
    folder, options = finished
    before = contents(folder)
    assert_refused(run_here(*options, "--out", folder, *more), message)
    assert contents(folder) == before


def refused_options(teacher: Path) -> dict[str, tuple[tuple[object, ...], tuple[str, ...]]]:
    ce = ("--loss", "ce")
    ten = (*TINY, "--dataset", "cifar10", "--teacher", "resnet8", "--teacher-checkpoint", teacher)
    return {
        "class count": (ten, ("last.pt' has 100 classes, but cifar10 has 10",)),
        "no data folder": ((*ce, "--data", "missing"), ("there is no folder 'missing'",)),
        "no model": ((*ce, "--model", "resnet9"), ("argument --model: invalid choice: 'resnet9'", "resnet8x4")),
        "no cifar": ((*ce, "--data", "."), ("cannot load cifar100 from the folder '.'",)),
        "no fashion": (
            (*ce, "--data", ".", "--dataset", "fashion-mnist"),
            ("cannot load fashion-mnist", "downloading"),
        ),
        "no device": ((*ce, "--device", "warp"), ("--device warp",)),
        "no epochs": ((*ce, "--epochs", "0"), ("argument --epochs: must be finite and > 0, got 0",)),
        "temperature": (("--temperature", "nan"), ("argument --temperature: must be finite and > 0, got nan",)),
        "no teacher": ((), ("--loss wsl needs a --teacher-checkpoint",)),
        "no teacher file": (("--teacher-checkpoint", "missing.pt"), ("there is no file 'missing.pt'",)),
        "useless teacher": ((*ce, "--teacher-checkpoint", teacher), ("--teacher-checkpoint is of no use",)),
    }


@pytest.mark.parametrize("case", refused_options(Path()))
def test_refuses_what_cannot_be_run(run_here: Here, teacher: Path, tmp_path: Path, case: str) -> None:
    options, message = refused_options(teacher)[case]
    assert_refused(run_here(*options, "--out", "out"), *message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["class count", "no data folder", "no model"])
def test_refuses_as_a_program(teacher: Path, tmp_path: Path, case: str) -> None:
    options, message = refused_options(teacher)[case]
    assert_refused(run(tmp_path, *options, "--out", "out"), *message)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "is not a complete checkpoint"),
        ({"state_dict": {}}, "holds no 'model'"),
        (
            {"model": MODELS["resnet14"](num_classes=100).state_dict()},
            "--teacher resnet8: layer1.1.conv1.weight is [16, 16, 3, 3], not absent",
        ),
        (
            {"model": MODELS["resnet8x4"](num_classes=100).state_dict()},
            "--teacher resnet8: conv1.weight is [32, 3, 3, 3], not [16, 3, 3, 3]",
        ),
    ],
    ids=["garbage", "no model", "other depth", "other width"],
)
def test_refuses_a_teacher_that_does_not_fit(tmp_path: Path, content: bytes | dict, message: str) -> None:
    path = tmp_path / "teacher.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    args = argparse.Namespace(teacher_checkpoint=path, teacher="resnet8", dataset="cifar100")
    with pytest.raises(cifar.Refusal, match=re.escape(message)):
        cifar.load_teacher(args, 100)


@pytest.mark.parametrize("zipped", [False, True])  # before torch 1.6, and since
def test_loads_a_teacher_in_the_form_of_repdistiller(tmp_path: Path, zipped: bool) -> None:
    model = MODELS["resnet8"](num_classes=100)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    content = {
        "opt": argparse.Namespace(lr_decay_epochs=[150, 180, 210], model="resnet8"),
        "model": model.state_dict(),
        "accuracy": torch.tensor([70.0]),
        "optimizer": optimizer.state_dict(),
    }
    path = tmp_path / "resnet8_last.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    teacher = cifar.load_teacher(
        argparse.Namespace(teacher_checkpoint=path, teacher="resnet8", dataset="cifar100"), 100
    )
    assert teacher is not None
    assert_same(teacher.state_dict(), model.state_dict())
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# The data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_augments_as_torchvision_does(channels: int) -> None:
    """Every crop, flipped or not: pad the raw image with 0, crop, flip, to [0, 1], normalise."""
    from torchvision.transforms import functional as tv

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    images = torch.randint(256, (5, 32, 32, channels), dtype=torch.uint8)
    split = cifar.Split(F.pad(images, (0, 0, 4, 4, 4, 4)), torch.zeros(5))
    data = cifar.Data(split, split, 255 * torch.tensor(mean), 255 * torch.tensor(std))
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    plan = cifar.Plan(torch.arange(len(grid)) % 5, grid[:, 0], grid[:, 1], grid[:, 2] == 1)
    batch = cifar.normalise(cifar.crop_and_flip(split.images, plan), data, torch.float32, torch.contiguous_format)

    for result, index, top, left, flip in zip(batch, *plan):
        image = tv.crop(tv.pad(images[index].permute(2, 0, 1), 4), int(top), int(left), 32, 32)
        image = (tv.hflip(image) if flip else image) / 255
        expected = tv.normalize(image.expand(3, 32, 32), mean, std)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_every_epoch_sees_every_image_once_in_every_crop_and_flip() -> None:
    plans = [cifar.plan_epoch(0, epoch, 1000, torch.device("cpu")) for epoch in (0, 1)]
    for plan in plans:
        assert torch.equal(plan.order.sort().values, torch.arange(1000))
        for offsets in (plan.top, plan.left):
            assert torch.equal(offsets.unique(), torch.arange(9))
        assert 400 < plan.flip.sum() < 600
    assert not torch.equal(plans[0].order, plans[1].order)
    assert_same(list(plans[0]), list(cifar.plan_epoch(0, 0, 1000, torch.device("cpu"))))


def write_fashion_mnist(folder: Path, packed: bool) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for prefix, count in (("train", 6), ("t10k", 4)):
        files[f"{prefix}-images-idx3-ubyte"] = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        files[f"{prefix}-labels-idx1-ubyte"] = torch.randint(10, (count,), dtype=torch.uint8)
    for name, values in files.items():
        shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
        content = bytes([0, 0, 8, values.ndim]) + shape + values.numpy().tobytes()
        path = folder / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)
    return files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_reads_fashion_mnist_as_it_lies_there(tmp_path: Path, below: str, packed: bool) -> None:
    files = write_fashion_mnist(tmp_path / below, packed)
    before = contents(tmp_path)
    for train, prefix in ((True, "train"), (False, "t10k")):
        images, labels = cifar.load_split("fashion-mnist", tmp_path, train)
        assert images.shape == (len(labels), 32, 32, 1)
        assert torch.equal(images[:, 2:-2, 2:-2, 0], files[f"{prefix}-images-idx3-ubyte"])
        assert images.sum() == files[f"{prefix}-images-idx3-ubyte"].sum(), "the border is 0"
        assert torch.equal(labels, files[f"{prefix}-labels-idx1-ubyte"].long())
    assert contents(tmp_path) == before


def test_refuses_a_truncated_dataset(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(cifar.Refusal, match="train-images-idx3-ubyte is incomplete"):
        cifar.load_split("fashion-mnist", tmp_path, train=True)


def test_never_downloads_over_files_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(b"not what torchvision expects")
    before = contents(tmp_path)
    with pytest.raises(cifar.Refusal, match=r"cannot load cifar100 from the folder .*corrupt"):
        cifar.load_split("cifar100", tmp_path, train=True)
    assert contents(tmp_path) == before


def test_data_path_costs_less_than_a_tenth_of_a_step() -> None:
    """Of resnet8x4 with batches of 64. Taken in turns, so that a busy machine slows both; the median of the ratios."""
    train = cifar.fake_split("cifar100", 5000, seed=0)
    train = cifar.Split(F.pad(train.images, (0, 0, 4, 4, 4, 4)), train.labels)
    data = cifar.Data(train, train, torch.full((3,), 128.0), torch.full((3,), 64.0))
    model = MODELS["resnet8x4"](num_classes=100)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)

    ratios = []
    plans = zip(*(x.split(64) for x in cifar.plan_epoch(0, 0, 5000, torch.device("cpu"))))
    for plan, _ in zip((cifar.Plan(*parts) for parts in plans), range(5)):
        start = time.perf_counter()
        batch = cifar.normalise(cifar.crop_and_flip(train.images, plan), data, torch.float32, torch.contiguous_format)
        labels = train.labels[plan.order]
        middle = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    print(f"data path: {100 * statistics.median(ratios):.2f} % of a step")
    assert statistics.median(ratios) < 0.1
