"""examples/cifar.py: as a program, killed and resumed, given what it has to refuse; and its data path."""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

for _module in ("matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(_module, reason=f"{_module} is missing: pip install weighted-soft-labels[examples]")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import cifar
from cifar_models import MODELS

# One thread, as more gain little on networks this small; and a download that fails at once, wherever this runs.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "https_proxy": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
}
TINY = ("--fake-data", "96", "--batch-size", "32", "--model", "resnet8")


def command(*options: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / "cifar.py"), *map(str, options)]


def run(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*options), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


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
    options = (*TINY, "--teacher", "resnet8", "--teacher-checkpoint", teacher, "--epochs", 3, "--checkpoint-every", 1)
    done = run(teacher.parent, *options, "--out", "finished")
    assert done.returncode == 0, done.stderr
    return teacher.parent / "finished", options


# What a run leaves --------------------------------------------------------------------------------------------------


def test_wsl_student_learns_from_a_teacher_of_the_same_script(finished: tuple[Path, tuple[object, ...]]) -> None:
    folder, _ = finished
    rows = log(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.05, 0.05, 0.005])
    for row in rows:
        # The loss is the hard term and alpha * T^2 = 36 times the mean of weight * soft, which is about soft's.
        hard, soft, weight = (float(row[name]) for name in ("hard", "soft", "weight"))
        assert float(row["loss"]) == pytest.approx(hard + 36 * weight * soft, rel=0.05)
        assert 0 < weight < 1
        assert 0 <= float(row["regularization"]) <= 1
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
def test_mixed_precision_trains(teacher: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    teacher_options = ("--teacher", "resnet8", "--teacher-checkpoint", teacher)
    done = run(tmp_path, *TINY, *teacher_options, *options, "--epochs", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    (row,) = log(tmp_path / "out")
    assert float(row["loss"]) < 1000  # false for NaN, too


def test_ce_student_has_no_terms_of_a_teacher(tmp_path: Path) -> None:
    done = run(tmp_path, "--loss", "ce", *TINY, "--dataset", "fashion-mnist", "--epochs", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    (row,) = log(tmp_path / "out")
    assert row["soft"] == row["weight"] == row["regularization"] == ""
    assert 0 < float(row["loss"]) < 10


# Killed and resumed -------------------------------------------------------------------------------------------------


def kill_within_an_epoch(folder: Path, options: tuple[object, ...]) -> dict:
    """SIGKILL once a checkpoint from inside the second epoch is there. Returns the progress of the last checkpoint."""
    process = subprocess.Popen(command(*options), cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    last = folder / "killed" / "last.pt"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            # Between two renames there is no last.pt, for a moment.
            if last.exists() and (progress := load(last)["progress"])["epoch"] == 1 and progress["step"]:
                break
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -9, "it was over before it could be killed"
    return load(last if last.exists() else last.with_name("previous.pt"))["progress"]


def test_killed_within_an_epoch_and_resumed_ends_with_the_same_bits(teacher: Path, tmp_path: Path) -> None:
    options = (
        *("--fake-data", 640, "--batch-size", 32, "--model", "resnet8", "--epochs", 2, "--checkpoint-every", 3),
        *("--teacher", "resnet8", "--teacher-checkpoint", teacher, "--amp", "off"),
    )
    progress = kill_within_an_epoch(tmp_path, (*options, "--out", "killed"))
    assert progress["epoch"] == 1
    assert 0 < progress["step"] < 20
    assert len(log(tmp_path / "killed")) == 1

    resumed = run(tmp_path, *options, "--out", "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after 1 epochs" in resumed.stdout
    unbroken = run(tmp_path, *options, "--out", "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def copy(folder: Path, destination: Path) -> Path:
    destination.mkdir()
    for path in folder.iterdir():
        (destination / path.name).write_bytes(path.read_bytes())
    return destination


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_falls_back_to_the_previous_checkpoint(
    finished: tuple[Path, tuple[object, ...]], tmp_path: Path, damage: str
) -> None:
    folder, options = finished
    out = copy(folder, tmp_path / "out")
    last = out / "last.pt"
    if damage == "missing":  # killed between the two renames of a save
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2 if damage == "truncated" else 0])

    done = run(tmp_path, *options, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming after 2 epochs and 2 steps" in done.stdout
    if damage != "missing":
        (warning,) = (line for line in done.stderr.splitlines() if "warning" in line)
        assert "last.pt' is not a complete checkpoint" in warning
        assert "resuming from previous.pt" in warning
    assert_same_run(out, folder)


def test_resuming_a_finished_run_changes_nothing(finished: tuple[Path, tuple[object, ...]], tmp_path: Path) -> None:
    folder, options = finished
    out = copy(folder, tmp_path / "out")
    done = run(tmp_path, *options, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(folder)


# Refused, with nothing overwritten ----------------------------------------------------------------------------------


def test_refuses_to_resume_without_a_readable_checkpoint(
    finished: tuple[Path, tuple[object, ...]], tmp_path: Path
) -> None:
    folder, options = finished
    out = copy(folder, tmp_path / "out")
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes((out / name).read_bytes()[:-1000])
    before = contents(out)
    done = run(tmp_path, *options, "--out", out, "--resume")
    assert_refused(done, "previous.pt' is not a complete checkpoint")
    assert contents(out) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "holds a run: add --resume to go on with it, or choose another --out"),
        (("--resume", "--alpha", "1"), "holds a run with alpha = 2.25, not 1.0"),
    ],
)
def test_refuses_to_overwrite_a_run(
    finished: tuple[Path, tuple[object, ...]], tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    folder, options = finished
    before = contents(folder)
    assert_refused(run(tmp_path, *options, "--out", folder, *more), message)
    assert contents(folder) == before


def test_refuses_a_teacher_of_another_number_of_classes(teacher: Path, tmp_path: Path) -> None:
    options = ("--dataset", "cifar10", "--teacher", "resnet8", "--teacher-checkpoint", teacher, "--out", "out")
    done = run(tmp_path, *TINY, *options)
    assert_refused(done, "last.pt' has 100 classes, but cifar10 has 10")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "ce", "--model", "resnet9"), ["argument --model: invalid choice: 'resnet9'", "resnet8x4"]),
        (("--loss", "ce", "--data", "missing"), ["there is no folder 'missing'"]),
        (("--loss", "ce", "--data", "."), ["cannot load cifar100 from the folder '.'"]),
        (("--loss", "ce", "--data", ".", "--dataset", "fashion-mnist"), ["cannot load fashion-mnist", "downloading"]),
        (("--loss", "ce", "--device", "warp"), ["--device warp"]),
        (("--loss", "ce", "--epochs", "0"), ["argument --epochs: must be finite and > 0, got 0"]),
        (("--temperature", "nan"), ["argument --temperature: must be finite and > 0, got nan"]),
        ((), ["--loss wsl needs a --teacher-checkpoint"]),
        (("--teacher-checkpoint", "missing.pt"), ["No such file or directory: 'missing.pt'"]),
    ],
)
def test_refuses_what_cannot_be_run(tmp_path: Path, options: tuple[str, ...], message: list[str]) -> None:
    done = run(tmp_path, *options, "--out", "out")
    assert_refused(done, *message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "is not a complete checkpoint"),
        ({"state_dict": {}}, "holds no state dict under 'model'"),
        ({"model": MODELS["resnet14"](num_classes=100).state_dict()}, "is not one of resnet8: 'layer1.1.bn1.bias'"),
        ({"model": MODELS["resnet8x4"](num_classes=100).state_dict()}, "is not one of resnet8: 'conv1.weight' is"),
    ],
    ids=["garbage", "no model", "other depth", "other width"],
)
def test_refuses_a_teacher_that_does_not_fit(tmp_path: Path, content: bytes | dict, message: str) -> None:
    path = tmp_path / "teacher.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    args = cifar.argparse.Namespace(teacher_checkpoint=path, teacher="resnet8", dataset="cifar100")
    with pytest.raises(cifar.Refusal, match=re.escape(message)):
        cifar.load_teacher(args, 100)


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
    with pytest.raises(cifar.Refusal, match="cannot load cifar100 from the folder .*corrupt"):
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
    for plan, _ in zip((cifar.Plan(*parts) for parts in plans), range(9)):
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
