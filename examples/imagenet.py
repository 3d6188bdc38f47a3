"""Distil an ImageNet classifier with Weighted Soft Labels: the paper's recipe as one loop, on one process or many.

    pip install "weighted-soft-labels[examples]"
    python imagenet.py --data imagenet --out r34-r18                                # one process
    torchrun --nproc-per-node 8 imagenet.py --data imagenet --out r34-r18 --resume  # or eight, from where that stopped
    python imagenet.py --fake-data 512 --batch 32 --epochs 1 --out smoke            # no data: does it run here?

`imagenet` holds the folders `train` and `val`, each with one folder of images per class. The defaults are the paper's
ResNet-34 -> ResNet-18: torchvision's pretrained teacher (IMAGENET1K_V1), T = 2, alpha = 2.5, SGD with Nesterov momentum
0.9, 100 epochs, batches of 256, learning rate 0.1, a tenth of it every 30 epochs, weight decay 1e-4. Its other pair:

    torchrun --nproc-per-node 8 imagenet.py --data imagenet --out r50-mbv1 --teacher resnet50 --student mobilenetv1_100

(MobileNetV1 is timm's: `pip install timm`.) `--alpha 0` trains the student alone. Several `--teacher` form an ensemble,
whose logits are the mean. Results of full runs: not measured yet; the paper's repository reports 72.04 % for
ResNet-34 -> ResNet-18 and 71.52 % for ResNet-50 -> MobileNetV1.

What a run depends on. `--batch` is global: N processes of A micro-batches each (`--accumulate A`) take B / (N * A)
images at a time. The images of an epoch, their order and their augmentation follow from the seed, the epoch and the
image, not from the process or worker that reads them; all other random numbers follow from the seed, the step and the
process, and so are part of no state. Two processes therefore do what one does, except for what is their own: batch
statistics (unless `--sync-bn`), dropout, mixup and cutmix. The last, incomplete batch of an epoch is left out, as the
mean over processes would not be the mean over its images. In validation every image counts once.

`--out` receives `last.pt` and `previous.pt` (checkpoints, every `--checkpoint-every` steps and after every epoch),
`best.pt` (the best student, of use as a `--teacher-checkpoint`), `log.csv` (a row an epoch) and `tensorboard`. Files
appear whole or not at all. `--resume` continues after the last checkpoint's step, on a CPU to the same bits; if it is
damaged, after that of the one before.

Different from the official loop, on purpose: the teacher is in eval mode (`--teacher-train-mode` for batch statistics,
as there; gradients of the teacher, which nothing uses, are not computed either way), 100 epochs and not 101, label
smoothing is applied when asked for, no path is fixed, and a run resumes on any machine.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.analysis import wsl_terms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOMENTUM = 0.9
AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUMS = ("loss", "hard", "soft", "weight", "top1", "top5", "images")  # of a step, over images; top-k: those right
COLUMNS = (
    *("epoch", "lr", "loss", "hard", "soft", "weight", "train_top1", "train_top5"),
    *("val_loss", "val_top1", "val_top5", "images_per_s"),
)
# The options that make a run what it is, and cannot change when it resumes.
IDENTITY = (
    *("student", "teacher", "teacher_weights", "teacher_train_mode", "temperature", "alpha", "label_smoothing"),
    *("mixup", "cutmix", "batch", "lr", "lr_step", "lr_gamma", "weight_decay", "sync_bn", "amp", "seed"),
    *("image_size", "resize"),
)


class Problem(Exception):
    """What its user can put right: told in one line, without a traceback."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def seed_of(*parts: int | str) -> int:
    """A seed for the random numbers of one image or one step, unrelated to that of any other."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


# The processes ------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """The processes that `torchrun` started, or this one alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: dist.Store | None = None

    def sum(self, values: Tensor) -> Tensor:
        if self.store is not None:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.store is not None:
            dist.barrier()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def stop(self, problem: Problem) -> NoReturn:
        """Name the problem once, by whichever process has it first, and end."""
        line = f"imagenet.py: error: {problem}"
        if self.store is None:
            sys.exit(line)
        if self.store.add("problems", 1) == 1:
            print(line, file=sys.stderr, flush=True)
            self.store.set("told", "yes")
        else:
            self.store.wait(["told"], timedelta(seconds=10))
        os._exit(1)  # not sys.exit, which waits for the other processes; torchrun ends them

    def stopped_elsewhere(self) -> bool:
        """Whether an error here is but the echo of a process that stopped."""
        try:
            return self.store is not None and self.store.check(["problems"])
        except RuntimeError:
            return True


def find_world() -> World:
    if "LOCAL_RANK" not in os.environ:
        return World()
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return World(rank, size, local_rank, dist.PrefixStore(f"imagenet.py/{attempt}", store))


def start_device(name: str | None, world: World) -> torch.device:
    """The device of this process, ready to talk to those of the others."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name):
        raise Problem(f"--device {name} is not one of {', '.join(key for key in available if available[key])}")
    if name == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise Problem(f"process {world.local_rank} of this machine has no GPU, of {torch.cuda.device_count()}")
        torch.cuda.set_device(world.local_rank)
    if world.store is not None:
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return torch.device("cuda", world.local_rank) if name == "cuda" else torch.device(name)


# The data -----------------------------------------------------------------------------------------------------------


class Images(Dataset):
    """Images of a folder, by (epoch, index): the augmentation depends on nothing else.

    An image that cannot be read is returned as a :class:`Problem`, not raised: the exceptions of a worker process reach
    the main one wrapped in its traceback.
    """

    def __init__(self, source: ImageFolder | FakeData, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Problem:
        epoch, index = key
        try:
            image, label = self.source[index]
        except Exception as error:  # Pillow has many ways to refuse a file
            return Problem(f"cannot read the image {self.source.samples[index][0]}: {first_line(error)}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return self.transform(image), label


def collate(samples: list[Any]) -> Any:
    problems = [sample for sample in samples if isinstance(sample, Problem)]
    return problems[0] if problems else default_collate(samples)


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """What one process reads: its share of every global batch of an epoch, from a step on, in micro-batches."""

    def __init__(self, images: int, args: argparse.Namespace, world: World) -> None:
        self.images, self.batch, self.micro_batches = images, args.batch, args.accumulate
        self.rank, self.processes, self.seed = world.rank, world.size, args.seed
        self.steps = images // args.batch
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        for step in range(self.first_step, self.steps):
            mine = order[step * self.batch : (step + 1) * self.batch][self.rank :: self.processes]
            size = len(mine) // self.micro_batches
            for start in range(0, len(mine), size):
                yield [(self.epoch, index) for index in mine[start : start + size]]


def read_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def open_folder(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise Problem(f"no folder {folder}: --data takes a folder that holds train and val, with a folder per class")
    try:
        return ImageFolder(str(folder), loader=read_image)
    except FileNotFoundError as error:
        raise Problem(first_line(error)) from None


def load_data(args: argparse.Namespace) -> tuple[Images, Images, int]:
    """Training images, validation images, number of classes."""
    if args.data is None:
        shape, classes = (3, args.image_size, args.image_size), args.fake_classes
        counts = (args.fake_data, args.fake_data // 4)
        sources = tuple(FakeData(count, shape, classes, random_offset=count) for count in counts)
    else:
        sources = (open_folder(args.data / "train"), open_folder(args.data / "val"))
        classes = len(sources[0].classes)
        different = sorted(set(sources[0].classes) ^ set(sources[1].classes))
        if different:
            raise Problem(f"{args.data}: the class {different[0]} is in only one of train and val")
    if len(sources[0]) < args.batch:
        raise Problem(f"{len(sources[0])} training images do not fill one batch of {args.batch}")

    tail = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    train = v2.Compose([v2.RandomResizedCrop(args.image_size, antialias=True), v2.RandomHorizontalFlip(), *tail])
    resize = v2.Resize(args.resize, InterpolationMode.BILINEAR, antialias=True)
    val = v2.Compose([resize, v2.CenterCrop(args.image_size), *tail])
    return Images(sources[0], train, args.seed), Images(sources[1], val, args.seed), classes


def make_loader(images: Images, args: argparse.Namespace, device: torch.device, **how: Any) -> DataLoader:
    return DataLoader(
        images,
        collate_fn=collate,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
        **how,
    )


def to_device(batch: Any, run: Run) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Problem):
        raise batch
    images, labels = (tensor.to(run.device, non_blocking=True) for tensor in batch)
    return images.contiguous(memory_format=run.memory_format), labels


# The networks -------------------------------------------------------------------------------------------------------


def library_of(name: str) -> str:
    """ "torchvision" or "timm". Refuse now what neither knows."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name in known:
        return "torchvision"
    short = name.removeprefix("timm:")
    close = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]}?" if close and short == name else ""
    try:
        import timm
    except ImportError:
        raise Problem(f"torchvision has no model {name!r}, and timm is missing (pip install timm){hint}") from None
    if not timm.is_model(short):
        raise Problem(f"neither torchvision nor timm has a model {short!r}{hint}")
    return "timm"


def make_model(name: str, weights: str, classes: int) -> nn.Module:
    """With random parameters for `classes` (weights: none), or as its library pretrained it, for as many as it has."""
    try:
        if library_of(name) == "timm":
            import timm

            options = {"num_classes": classes} if weights == "none" else {"pretrained": True}
            return timm.create_model(name.removeprefix("timm:"), **options)
        if weights == "none":
            return torchvision.models.get_model(name, num_classes=classes)
        known = torchvision.models.get_model_weights(name).__members__
        chosen = {"v1": "IMAGENET1K_V1", "v2": "IMAGENET1K_V2", "default": "DEFAULT"}.get(weights, weights)
        if chosen not in known:
            raise Problem(f"{name} has no weights {weights!r}, only {', '.join(known)}")
        return torchvision.models.get_model(name, weights=known[chosen])
    except Problem:
        raise
    except Exception as error:  # of the library, of its download, of the disk
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise Problem(
            f"cannot make {name} with weights {weights} ({reason}); --teacher-checkpoint takes a file"
        ) from None


@torch.no_grad()
def count_classes(model: nn.Module, name: str, size: int) -> int:
    try:
        logits = model.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:
        raise Problem(f"{name} does not take images of {size} x {size} pixels: {first_line(error)}") from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or getattr(model, "aux_logits", False):
        raise Problem(f"{name} does not return one row of class scores per image, so this example cannot train it")
    return logits.shape[1]


def read_state(path: Path) -> dict[str, Tensor]:
    """The parameters in a file: as such, or under the name that this and other programs give them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Problem(f"cannot read the teacher checkpoint {path}: {first_line(error)}") from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise Problem(f"the teacher checkpoint {path} holds no parameters")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_teacher(teacher: nn.Module, name: str, path: Path, classes: int) -> None:
    saved, expected = read_state(path), teacher.state_dict()
    odd = sorted(key for key in saved.keys() ^ expected.keys() if not key.endswith("num_batches_tracked"))
    if odd:
        raise Problem(f"the teacher checkpoint {path} is not one of {name}: {odd[0]} is in only one of them")
    saved = {key: value for key, value in saved.items() if key in expected}
    odd = [key for key in saved if saved[key].shape != expected[key].shape]
    for key in odd:
        found, needed = saved[key].shape, expected[key].shape
        if found[1:] != needed[1:] or needed[:1] != (classes,):
            shapes = f"{tuple(found)}, not {tuple(needed)}"
            raise Problem(f"the teacher checkpoint {path} is not one of {name}: {key} has shape {shapes}")
    if odd:
        raise Problem(f"the teacher {path} has {saved[odd[0]].shape[0]} classes, the data {classes}")
    teacher.load_state_dict(saved)


def make_teachers(args: argparse.Namespace, classes: int) -> nn.ModuleList:
    teachers = nn.ModuleList()
    for name, path in zip(args.teacher, args.teacher_checkpoint or [None] * len(args.teacher)):
        teacher = make_model(name, "none" if path else args.teacher_weights, classes)
        if path:
            load_teacher(teacher, name, path, classes)
        found = count_classes(teacher, name, args.image_size)
        if found != classes:
            raise Problem(f"the teacher {name} has {found} classes, the data {classes}")
        teachers.append(teacher)
    return teachers.requires_grad_(False).train(args.teacher_train_mode)


def make_student(args: argparse.Namespace, classes: int) -> nn.Module:
    student = make_model(args.student, "none", classes)
    count_classes(student, args.student, args.image_size)
    return nn.SyncBatchNorm.convert_sync_batchnorm(student) if args.sync_bn else student


# Distillation: what to lift into a project of your own --------------------------------------------------------------


class Run:
    """A training under way: the student, what trains it, and how far it is."""

    def __init__(
        self, args: argparse.Namespace, world: World, device: torch.device, student: nn.Module, teachers: nn.ModuleList
    ) -> None:
        self.args, self.world, self.device = args, world, device
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        for model in (student, *teachers):
            model.to(device, memory_format=self.memory_format)
            if args.compile:
                model.compile()
        self.student, self.teachers = student, teachers
        # Every call of `replica` runs the student; its gradients are averaged over the processes.
        on_gpu = [device] if device.type == "cuda" else None
        self.replica = DistributedDataParallel(student, on_gpu) if world.store is not None else student
        self.optimizer = torch.optim.SGD(
            student.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, args.lr_step, args.lr_gamma)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.epoch = 0  # epochs finished
        self.step = 0  # steps finished of the epoch after them
        self.sums = self.no_sums()  # over these steps: of all processes, up to the last checkpoint,
        self.own_sums = self.no_sums()  # and of this process, from there on
        self.rows: list[list[float]] = []  # COLUMNS of the finished epochs

    def no_sums(self) -> Tensor:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(len(SUMS), dtype=dtype, device=self.device)

    def gather_sums(self) -> None:
        """Bring `sums` up to date. Waits for the device and for the other processes."""
        self.sums += self.world.sum(self.own_sums)
        self.own_sums = self.no_sums()
        loss = self.sums[0].item()
        if not math.isfinite(loss):
            raise Problem(f"the loss of epoch {self.epoch + 1} is {loss} by step {self.step}; no checkpoint has it")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, AMP[self.args.amp], enabled=self.args.amp != "none")


def make_mixing(args: argparse.Namespace, classes: int) -> v2.Transform:
    """Mixup, cutmix, or for every batch one of the two; they turn labels into class probabilities."""
    mixings: list[v2.Transform] = []
    if args.mixup > 0:
        mixings.append(v2.MixUp(alpha=args.mixup, num_classes=classes))
    if args.cutmix > 0:
        mixings.append(v2.CutMix(alpha=args.cutmix, num_classes=classes))
    return v2.RandomChoice(mixings) if mixings else v2.Identity()


def train_step(run: Run, batches: Iterator[Any], mixing: v2.Transform) -> None:
    """One global batch: the gradient of its mean loss, from the micro-batches of every process."""
    args = run.args
    torch.manual_seed(seed_of(args.seed, "step", run.epoch, run.step, run.world.rank))
    run.optimizer.zero_grad()
    for micro_batch in range(args.accumulate):
        images, target = mixing(*to_device(next(batches), run))
        with gradients_stay_here(run) if micro_batch < args.accumulate - 1 else nullcontext():
            with run.autocast():
                with torch.no_grad():
                    teacher_logits = torch.stack([teacher(images).float() for teacher in run.teachers]).mean(0)
                student_logits = run.replica(images)
            loss = wsl_loss(
                student_logits,
                teacher_logits,
                target,
                temperature=args.temperature,
                alpha=args.alpha,
                label_smoothing=args.label_smoothing,
            )
            run.scaler.scale(loss / args.accumulate).backward()
        run.own_sums += sums_of(loss, student_logits, teacher_logits, target, args.temperature)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.step += 1


def gradients_stay_here(run: Run) -> AbstractContextManager[None]:
    return run.replica.no_sync() if isinstance(run.replica, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def sums_of(loss: Tensor, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """SUMS of one batch, on its device. `hard` is without label smoothing; mixed images have their larger label."""
    terms = wsl_terms(student_logits, teacher_logits, target, temperature=temperature)
    labels = target.argmax(1) if target.is_floating_point() else target
    images = len(labels) * torch.ones_like(loss)
    means = (loss * images, terms.student_ce.sum(), terms.soft.sum(), terms.weight.sum())
    return torch.stack((*means, *hits(student_logits, labels), images))


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many labels are the likeliest class, and among the five likeliest."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return right[:, 0].sum(), right.sum()


@torch.no_grad()
def evaluate(run: Run, loader: DataLoader) -> tuple[float, float, float]:
    """Cross-entropy, top-1 and top-5 (percent) of the student over all images, each counted once."""
    if run.world.store is not None:
        for buffer in run.student.buffers():  # every process has seen other batches since the last broadcast
            dist.broadcast(buffer, 0)
    run.student.eval()
    sums = run.no_sums()[:4]
    for batch in loader:
        images, labels = to_device(batch, run)
        with run.autocast():
            logits = run.student(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        sums += torch.stack((loss, *hits(logits, labels), len(labels) * torch.ones_like(loss)))
    run.student.train()
    loss, top1, top5, images = run.world.sum(sums).tolist()
    return loss / images, 100 * top1 / images, 100 * top5 / images


# Checkpoints --------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Any], None], mode: str = "wb", backup: Path | None = None) -> None:
    """Replace a file by a new one that is complete and on the disk, and keep the old one as `backup`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode, newline="" if mode == "w" else None) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either
        raise Problem(f"cannot write {path}: {first_line(error)}") from None


def save_checkpoint(run: Run, identity: dict[str, Any]) -> None:
    run.gather_sums()
    if run.world.rank == 0:
        checkpoint = {
            "identity": identity,
            "model": run.student.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "scaler": run.scaler.state_dict(),
            "epoch": run.epoch,
            "step": run.step,
            "sums": run.sums,
            "rows": run.rows,
        }
        out = run.args.out
        write_whole(out / "last.pt", lambda file: torch.save(checkpoint, file), backup=out / "previous.pt")
    run.world.barrier()


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    run.student.load_state_dict(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.schedule.load_state_dict(checkpoint["schedule"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.epoch, run.step, run.rows = checkpoint["epoch"], checkpoint["step"], checkpoint["rows"]
    run.sums = checkpoint["sums"].to(run.sums)


def find_checkpoint(args: argparse.Namespace, identity: dict[str, Any], world: World) -> dict[str, Any] | None:
    """The checkpoint to go on from; none for a new run. Process 0 alone looks at the disk, and tells the others."""
    found: list[dict[str, Any] | None] = [None]
    if world.rank == 0:
        found = [read_out(args.out, args.resume, identity)]
    if world.store is not None:
        dist.broadcast_object_list(found, 0)
    return found[0]


def read_out(out: Path, resume: bool, identity: dict[str, Any]) -> dict[str, Any] | None:
    present = [name for name in ("last.pt", "previous.pt", "best.pt", "log.csv") if (out / name).exists()]
    if present and not resume:
        raise Problem(f"{out} holds a run already ({present[0]}): --resume continues it, another --out starts anew")
    if not present:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Problem(f"cannot make the folder {out}: {first_line(error)}") from None
        return None

    damaged = []
    for path in (out / "last.pt", out / "previous.pt"):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Problem(f"cannot read {path}: {first_line(error)}") from None
        except Exception as error:  # of the archive, or of the pickle in it
            damaged.append(path)
            print(f"{path} is damaged ({first_line(error)})", flush=True)
            continue
        check_identity(out, checkpoint, identity)
        for other in damaged:  # out of the way of the next checkpoint's backup, which is to be this one
            os.replace(other, other.with_name(other.name + ".damaged"))
        print(f"resuming from {path}, after epoch {checkpoint['epoch']}, step {checkpoint['step']}", flush=True)
        return checkpoint
    raise Problem(f"{out} holds a run ({present[0]}) but no checkpoint that can be read; nothing was changed")


def check_identity(out: Path, checkpoint: Any, identity: dict[str, Any]) -> None:
    if not isinstance(checkpoint, dict) or "identity" not in checkpoint:
        raise Problem(f"{out} holds checkpoints of another program")
    for name, value in identity.items():
        before = checkpoint["identity"].get(name)
        if before != value:
            raise Problem(f"{out} holds another run, with {name.replace('_', '-')} {before}, not {value}")


def identify(args: argparse.Namespace, images: int, classes: int) -> dict[str, Any]:
    """What has to be equal when a run resumes; teachers may have moved to another folder."""
    files = [path.name for path in args.teacher_checkpoint or []]
    options = {name: getattr(args, name) for name in IDENTITY}
    return {**options, "teacher_checkpoint": files, "training images": images, "classes": classes}


# The training -------------------------------------------------------------------------------------------------------


def train_epoch(run: Run, loader: DataLoader, mixing: v2.Transform, identity: dict[str, Any], board: Board) -> float:
    """The rest of an epoch. Returns images/s, of all processes."""
    args, sampler = run.args, loader.batch_sampler
    sampler.epoch, sampler.first_step = run.epoch, run.step
    batches, steps = iter(loader), sampler.steps
    first, start, logged = run.step, time.perf_counter(), run.no_sums()
    hidden = None if run.world.rank == 0 else True  # None: only if nobody watches
    with tqdm(desc=f"epoch {run.epoch + 1}", total=steps, initial=first, unit="step", disable=hidden) as progress:
        while run.step < steps:
            train_step(run, batches, mixing)
            progress.update()
            if run.step % args.log_every == 0 and run.world.rank == 0:
                recent, logged = run.own_sums - logged, run.own_sums.clone()
                means = (recent / recent[-1]).tolist()
                progress.set_postfix(loss=f"{means[0]:.3f}", top1=f"{100 * means[4]:.1f}")
                board.add("step", dict(zip(SUMS[:4], means)), run.epoch * steps + run.step)
            if args.checkpoint_every and run.step % args.checkpoint_every == 0 and run.step < steps:
                save_checkpoint(run, identity)
                logged = run.no_sums()
    run.gather_sums()
    return (steps - first) * args.batch / (time.perf_counter() - start)


class Board:
    """TensorBoard's log, of process 0 alone. What a resumed run does again replaces what there was."""

    def __init__(self, out: Path, world: World, step: int) -> None:
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) if world.rank == 0 else None

    def add(self, group: str, values: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)
            self.writer.flush()


def finish_epoch(run: Run, validation: DataLoader, images_per_s: float, identity: dict[str, Any]) -> None:
    *means, top1, top5, _ = (run.sums / run.sums[-1]).tolist()
    scores = evaluate(run, validation)
    row = [run.epoch + 1, run.schedule.get_last_lr()[0], *means, 100 * top1, 100 * top5, *scores, images_per_s]
    best = max((before[COLUMNS.index("val_top1")] for before in run.rows), default=-1)
    run.rows.append(row)
    run.schedule.step()
    run.epoch, run.step, run.sums = run.epoch + 1, 0, run.no_sums()

    out = run.args.out
    if run.world.rank == 0:
        if scores[1] > best:
            content = {"model": run.student.state_dict(), "epoch": run.epoch, "top1": scores[1], "identity": identity}
            write_whole(out / "best.pt", lambda file: torch.save(content, file))
        write_whole(out / "log.csv", lambda file: csv.writer(file).writerows([COLUMNS, *run.rows]), "w")
    save_checkpoint(run, identity)


def train(run: Run, data: Images, validation_data: Images, classes: int, identity: dict[str, Any]) -> None:
    args, world = run.args, run.world
    sampler = GlobalBatches(len(data), args, world)
    loader = make_loader(data, args, run.device, batch_sampler=sampler)
    mine = [(0, index) for index in range(world.rank, len(validation_data), world.size)]
    size = max(1, args.batch // world.size)
    validation = make_loader(validation_data, args, run.device, sampler=mine, batch_size=size)
    mixing = make_mixing(args, classes)
    board = Board(args.out, world, run.epoch * sampler.steps + run.step)

    run.student.train()
    while run.epoch < args.epochs:
        images_per_s = train_epoch(run, loader, mixing, identity, board)
        finish_epoch(run, validation, images_per_s, identity)
        row = dict(zip(COLUMNS, run.rows[-1]))
        board.add("epoch", row, run.epoch * sampler.steps)
        world.say(
            f"epoch {run.epoch}/{args.epochs}: loss {row['loss']:.4f}, weight {row['weight']:.3f}, validation top-1 "
            f"{row['val_top1']:.2f} %, top-5 {row['val_top5']:.2f} %, {images_per_s:.0f} images/s"
        )


def summarise(args: argparse.Namespace, rows: list[list[float]]) -> str:
    top1, top5, speed = (COLUMNS.index(name) for name in ("val_top1", "val_top5", "images_per_s"))
    best = max(rows, key=lambda row: row[top1])
    return (
        f"{' + '.join(args.teacher)} -> {args.student}, {len(rows)} epochs: top-1 {rows[-1][top1]:.2f} %, top-5 "
        f"{rows[-1][top5]:.2f} %; best top-1 {best[top1]:.2f} % after epoch {best[0]:.0f}; "
        f"{sum(row[speed] for row in rows) / len(rows):.0f} images/s in training\n"
        f"{args.out}: last.pt, best.pt, log.csv, tensorboard"
    )


# The command line ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Problem(message)


def integer_from(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return parse


def number(lowest: float, highest: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """From `lowest`, or above it, to `highest`; finite."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not lowest <= value <= highest or math.isinf(value) or (above and value == lowest):
            bounds = f"{'>' if above else '>='} {lowest:g}" + (f" and <= {highest:g}" if highest < math.inf else "")
            raise argparse.ArgumentTypeError(f"must be finite and {bounds}, got {text}")
        return value

    return parse


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        usage="%(prog)s (--data DIR | --fake-data N) --out DIR [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count, rate = integer_from(1), number(0)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, metavar="DIR", help="with train and val, each with a folder per class")
    data.add_argument("--fake-data", type=integer_from(4), metavar="N", help="N images of noise, N/4 in val")
    option = parser.add_argument
    option("--fake-classes", type=integer_from(2), default=1000, metavar="C", help="classes of --fake-data (1000)")
    option("--out", type=Path, required=True, metavar="DIR", help="where the run is kept")
    option("--resume", action="store_true", help="continue the run in --out; start it if there is none")

    option("--student", default="resnet18", metavar="NAME", help="a model of torchvision or timm (resnet18)")
    option("--teacher", action="append", metavar="NAME", help="as --student; again for an ensemble (resnet34)")
    option("--teacher-checkpoint", action="append", type=Path, metavar="FILE", help="a file for each teacher")
    option("--teacher-weights", default="v1", metavar="W", help="without a file: v1, v2, default or none (v1)")
    option("--teacher-train-mode", action="store_true", help="batch statistics in the teacher, as the official loop")

    option("--temperature", type=number(0, above=True), default=2.0, metavar="T", help="of the soft term (2.0)")
    option("--alpha", type=rate, default=2.5, metavar="A", help="scale of the soft term (2.5)")
    option("--label-smoothing", type=number(0, 1), default=0.0, metavar="E", help="of the hard term (0)")
    option("--mixup", type=rate, default=0.0, metavar="A", help="parameter of mixup's Beta distribution (0: none)")
    option("--cutmix", type=rate, default=0.0, metavar="A", help="of cutmix's; with both, one of the two a batch (0)")

    option("--epochs", type=count, default=100, metavar="N", help="in all (100)")
    option("--batch", type=count, default=256, metavar="B", help="images a step, over all processes (256)")
    option("--accumulate", type=count, default=1, metavar="A", help="micro-batches a step in a process (1)")
    option("--lr", type=number(0, above=True), default=0.1, metavar="LR", help="learning rate (0.1)")
    option("--lr-step", type=count, default=30, metavar="N", help="epochs to each fall of the learning rate (30)")
    option("--lr-gamma", type=number(0, 1, above=True), default=0.1, metavar="G", help="factor of a fall (0.1)")
    option("--weight-decay", type=rate, default=1e-4, metavar="W", help="(1e-4)")
    option("--image-size", type=count, default=224, metavar="PX", help="of the crops (224)")
    option("--resize", type=count, default=256, metavar="PX", help="shorter side of a validation image (256)")
    option("--seed", type=integer_from(0), default=0, metavar="S", help="of every random number (0)")

    option("--device", metavar="D", help="cpu, cuda or mps (cuda if there is one)")
    option("--amp", choices=AMP, default="none", help="precision of the networks (none: float32)")
    option("--channels-last", action="store_true", help="memory format of images and networks")
    option("--compile", action="store_true", help="the networks, by torch.compile")
    option("--sync-bn", action="store_true", help="batch statistics over all processes; on GPUs")
    option("--workers", type=integer_from(0), default=4, metavar="N", help="reading processes, for each process (4)")
    option("--log-every", type=count, default=50, metavar="N", help="steps (50)")
    option("--checkpoint-every", type=integer_from(0), default=1000, metavar="N", help="steps (1000); 0: epochs only")
    args = parser.parse_args(argv)
    args.teacher = args.teacher or ["resnet34"]
    files = len(args.teacher_checkpoint or args.teacher)
    if files != len(args.teacher):
        parser.error(f"got {len(args.teacher)} --teacher, but {files} --teacher-checkpoint")
    return args


def distil(args: argparse.Namespace, world: World) -> None:
    device = start_device(args.device, world)
    if args.batch % (world.size * args.accumulate):
        split = f"between {world.size} x {args.accumulate} (processes x micro-batches)"
        raise Problem(f"a batch of {args.batch} cannot be split evenly {split}")
    if args.sync_bn and device.type != "cuda":
        raise Problem("--sync-bn needs GPUs")
    for name in (*args.teacher, args.student):
        library_of(name)
    data, validation_data, classes = load_data(args)
    identity = identify(args, len(data), classes)
    checkpoint = find_checkpoint(args, identity, world)
    if checkpoint is not None and checkpoint["epoch"] >= args.epochs:
        world.say(f"nothing to do: this run has finished its {checkpoint['epoch']} epochs")
        return

    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)  # every process starts from the same parameters
    if world.local_rank > 0:
        world.barrier()  # the first process of a machine downloads for all of them
    teachers = make_teachers(args, classes)
    if world.local_rank == 0:
        world.barrier()
    run = Run(args, world, device, make_student(args, classes), teachers)
    if checkpoint is None:
        save_checkpoint(run, identity)  # from here on the folder is this run's
    else:
        restore(run, checkpoint)
    train(run, data, validation_data, classes, identity)
    world.say(summarise(args, run.rows))


def main(argv: list[str] | None = None) -> None:
    world = find_world()
    try:
        distil(parse_args(argv), world)
    except Problem as problem:
        world.stop(problem)
    except Exception:
        if world.stopped_elsewhere():
            os._exit(1)
        raise
    if world.store is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
