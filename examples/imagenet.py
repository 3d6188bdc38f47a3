"""Distil an ImageNet classifier with Weighted Soft Labels: the paper's recipe, on any GPUs.

    pip install "weighted-soft-labels[examples]"
    # a first try, without data or downloads
    python imagenet.py --fake-data --batch-size 32 --epochs 1 --out runs/smoke
    # one process, or eight that continue after its last whole epoch
    python imagenet.py --data imagenet --out runs/r18
    torchrun --nproc-per-node 8 imagenet.py --data imagenet --out runs/r18 --resume

`imagenet` holds the folders `train` and `val`, each with one folder of images per class. The
defaults are those of the official script for ResNet-34 -> ResNet-18: torchvision's pretrained
teacher, T = 2, alpha = 2.5, SGD with Nesterov momentum 0.9, 100 epochs, batches of 256, weight
decay 1e-4, and a learning rate of 0.1, divided by 10 every 30 epochs. The paper's other pair is
`--teacher resnet50 --model mobilenetv1`. The official repository reports 72.04 % for ResNet-18 and
71.52 % for MobileNetV1. Results of full runs of this script: not measured.

The losses, with T = --temperature:

    ce   CE(labels), without a teacher
    kd   hard_weight * CE(labels) + alpha * T^2 * KL(teacher || student), Hinton et al. 2015
    wsl  hard_weight * CE(labels) + alpha * T^2 * weight * CE(teacher, student),
         `weighted_soft_labels.wsl_loss`

Models are named as in torchvision, or as in timm. If there are several teachers, their logits are
averaged. The teacher is in eval mode; `--teacher-train-mode` keeps it in train mode, as the
official script does. For EMA, warmup, AdamW, RandAugment or clipping use timm's own train.py with
frameworks/wsl_timm.py.

`--batch-size` counts the images of a step over all processes: with N processes and `--accumulate A`
a network sees B / (N * A) images at a time. The order of the images and their crops follow from the
seed, the epoch and the image, so a run can resume on another number of processes. Batch statistics,
dropout and mixup differ between processes. An incomplete last batch of an epoch is skipped. In
validation every image counts once.

After every epoch `--out` receives last.pt, log.csv and TensorBoard's files. The entry "model" of
last.pt is the student's state dict, which can be a `--teacher-checkpoint`. If a run was killed, the
same command with `--resume` continues after the last whole epoch. On a CPU with as many processes,
the resumed run ends with the same bits as an uninterrupted run.
"""

import argparse
import csv
import hashlib
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from weighted_soft_labels import WSLLoss
from weighted_soft_labels.analysis import wsl_terms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, from 0 to 1
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Options that may differ when a run is resumed.
MAY_CHANGE = {"data", "out", "resume", "epochs", "accumulate", "workers", "log_every"}
MAY_CHANGE |= {"amp", "channels_last", "compile"}
# Options without effect on --loss ce.
DISTILLATION = {"teacher", "teacher_checkpoint", "teacher_weights", "teacher_train_mode"}
DISTILLATION |= {"temperature", "alpha", "hard_weight"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default="imagenet",
        help="holds train and val, each with a folder per class",
    )
    parser.add_argument(
        "--fake-data",
        type=int,
        nargs="?",
        const=512,
        metavar="N",
        help="N images of noise and random teachers",
    )

    parser.add_argument(
        "--model", default="resnet18", metavar="NAME", help="to train; of torchvision or timm"
    )
    parser.add_argument(
        "--teacher", nargs="+", default=["resnet34"], metavar="NAME", help="one or more, as --model"
    )
    parser.add_argument(
        "--teacher-checkpoint",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="one a teacher; default: pretrained weights",
    )
    parser.add_argument(
        "--teacher-weights",
        default="IMAGENET1K_V1",
        metavar="NAME",
        help="torchvision's, if pretrained",
    )
    parser.add_argument(
        "--teacher-train-mode",
        action="store_true",
        help="batch statistics in the teacher, as in the official script",
    )
    parser.add_argument(
        "--loss", choices=("ce", "kd", "wsl"), default="wsl", help="ce needs no teacher"
    )
    parser.add_argument("--temperature", type=float, default=2.0, help="of the soft term")
    parser.add_argument("--alpha", type=float, default=2.5, help="scale of the soft term")
    parser.add_argument(
        "--hard-weight", type=float, default=1.0, help="scale of the cross-entropy in kd and wsl"
    )
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="of the cross-entropy")
    parser.add_argument(
        "--mixup",
        type=float,
        default=0.0,
        metavar="A",
        help="parameter of its Beta distribution; 0: none",
    )
    parser.add_argument(
        "--cutmix",
        type=float,
        default=0.0,
        metavar="A",
        help="the same; with both, one of the two a batch",
    )

    parser.add_argument("--epochs", type=int, default=100, help="total number")
    parser.add_argument(
        "--batch-size", type=int, default=256, help="images a step, over all processes"
    )
    parser.add_argument(
        "--accumulate", type=int, default=1, help="micro-batches a step, in each process"
    )
    parser.add_argument("--lr", type=float, default=0.1, help="at the start")
    parser.add_argument(
        "--lr-step", type=int, default=30, help="epochs after which it is divided by 10"
    )
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="of all parameters")
    parser.add_argument("--image-size", type=int, default=224, help="pixels, after cropping")
    parser.add_argument(
        "--seed", type=int, default=0, help="of initialisation, order, augmentation, dropout, mixup"
    )

    parser.add_argument("--amp", choices=AMP, help="mixed precision")
    parser.add_argument(
        "--channels-last", action="store_true", help="memory format of images and networks"
    )
    parser.add_argument("--compile", action="store_true", help="the networks, by torch.compile")
    parser.add_argument(
        "--workers", type=int, default=4, help="reading processes, for each training process"
    )
    parser.add_argument(
        "--log-every", type=int, default=50, help="steps between two lines of the log"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out; start it if there is none"
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    files = args.teacher_checkpoint
    if files and args.loss == "ce":
        parser.error("--loss ce has no teacher: omit --teacher-checkpoint")
    if files and len(files) != len(args.teacher):
        parser.error(f"{len(files)} --teacher-checkpoint for {len(args.teacher)} --teacher")
    return args


# Models and data ----------------------------------------------------------------------------------


def make_model(name: str, classes: int, weights: str | None = None) -> nn.Module:
    """Pretrained if `weights` is given, with the library's number of classes; otherwise random."""
    options = {"weights": weights} if weights else {"num_classes": classes}
    if name in torchvision.models.list_models(module=torchvision.models):
        return torchvision.models.get_model(name, **options)
    import timm

    if name == "mobilenetv1":
        if weights:
            raise ValueError("mobilenetv1 has no pretrained weights: pass a --teacher-checkpoint")
        return make_mobilenetv1(classes)
    if weights:
        return timm.create_model(name, pretrained=True)
    return timm.create_model(name, num_classes=classes)


def make_mobilenetv1(classes: int) -> nn.Module:
    """The paper's, with ReLU instead of ReLU6 and with PyTorch's default initialisation."""
    import timm

    model = timm.create_model("mobilenetv1_100", act_layer=nn.ReLU, num_classes=classes)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type depends on where a truncated file ends
        raise ValueError(
            f"cannot read checkpoint {path}: it is truncated or of another format. "
            "Copy it again, or delete it and train again"
        ) from error


def load_weights(model: nn.Module, content: dict[str, Any], path: Path, name: str) -> None:
    """Load a state dict, which may be the entry "model" or "state_dict" of the file."""
    state = content.get("model", content.get("state_dict", content))
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # The message of load_state_dict names every key, so show its beginning alone.
        keys = textwrap.shorten(str(error).partition("\n")[2], 200)
        raise ValueError(f"{path} does not fit {name} for these data: {keys}") from None


def make_teachers(args: argparse.Namespace, classes: int) -> nn.ModuleList:
    """The teachers of kd and wsl; an empty list for ce."""
    teachers = nn.ModuleList()
    if args.loss == "ce":
        return teachers
    paths = args.teacher_checkpoint or [None] * len(args.teacher)
    weights = None if args.teacher_checkpoint or args.fake_data else args.teacher_weights
    for name, path in zip(args.teacher, paths, strict=True):
        teacher = make_model(name, classes, weights).eval()
        if path:
            load_weights(teacher, load(path), path, name)
        outputs = teacher(torch.zeros(1, 3, args.image_size, args.image_size)).shape[1]
        if outputs != classes:
            raise ValueError(f"the teacher {name} has {outputs} classes, the data {classes}")
        teachers.append(teacher)
    return teachers.requires_grad_(False).train(args.teacher_train_mode)


def read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        raise OSError(f"cannot read the image {path}: {error}") from error


def make_data(args: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """Images to train and to validate on, as uint8, and the number of classes."""
    size = args.image_size
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    center = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), v2.PILToTensor()])
    if args.fake_data:
        shape, classes = (3, size, size), 1000
        train = FakeData(args.fake_data, shape, classes, transform=crop)
        val = FakeData(max(1, args.fake_data // 4), shape, classes, transform=center)
        return train, val, classes
    train = ImageFolder(args.data / "train", crop, loader=read_image)
    val = ImageFolder(args.data / "val", center, loader=read_image)
    if train.classes != val.classes:
        difference = set(train.classes) ^ set(val.classes)
        raise ValueError(f"{args.data}: only one of train and val has {difference}")
    return train, val, len(train.classes)


def mix(*numbers: int) -> int:
    """One seed from several numbers. A sum would give some images of two epochs the same crop."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Augmented(Dataset):
    """Images by (epoch, index). With the seed these decide on the crop, whichever process reads."""

    def __init__(self, images: Dataset, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, epoch, index))
            return self.images[index]


def micro_batches(
    images: int, epoch: int, args: argparse.Namespace, rank: int, world: int
) -> list[list[tuple[int, int]]]:
    """Lists of (epoch, index) for one process. Together the processes read whole global batches."""
    size = args.batch_size // (world * args.accumulate)
    generator = torch.Generator().manual_seed(mix(args.seed, epoch))
    order = torch.randperm(images, generator=generator).tolist()
    starts = range(rank * size, images - images % args.batch_size, world * size)
    return [[(epoch, index) for index in order[start : start + size]] for start in starts]


class Batches:
    """Normalised images (B, 3, size, size) and labels (B,), on the device.

    Images are moved as uint8, a quarter of the bytes, and normalised on the device.
    `seconds_waited` is the time spent on waiting for images.
    """

    def __init__(
        self, images: Dataset, indices: list, args: argparse.Namespace, device: torch.device
    ) -> None:
        self.loader = DataLoader(
            images,
            batch_sampler=indices,
            num_workers=args.workers,
            pin_memory=device.type == "cuda",
        )
        self.device = device
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.seconds_waited = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean = 255 * torch.tensor(MEAN, device=self.device).view(3, 1, 1)
        std = 255 * torch.tensor(STD, device=self.device).view(3, 1, 1)
        ready = time.perf_counter()
        for pixels, labels in self.loader:
            self.seconds_waited += time.perf_counter() - ready
            pixels = pixels.to(self.device, non_blocking=True)
            pixels = pixels.contiguous(memory_format=self.memory_format)
            yield (pixels - mean) / std, labels.to(self.device, non_blocking=True)
            ready = time.perf_counter()


# Loss ---------------------------------------------------------------------------------------------


def kd_term(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def make_loss(args: argparse.Namespace) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """The loss of student logits, teacher logits (None for ce) and target."""
    if args.loss == "wsl":
        return WSLLoss(
            temperature=args.temperature,
            alpha=args.alpha,
            hard_weight=args.hard_weight,
            label_smoothing=args.label_smoothing,
        )
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)

    def ce(student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> Tensor:
        return cross_entropy(student_logits.float(), target)

    def kd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        hard = cross_entropy(student_logits.float(), target)
        soft = kd_term(student_logits, teacher_logits, args.temperature)
        return args.hard_weight * hard + args.alpha * soft

    return ce if args.loss == "ce" else kd


def make_mixing(args: argparse.Namespace, classes: int) -> nn.Module:
    """Mixup, CutMix, one of the two at random, or neither. Both give class probabilities."""
    choices: list[nn.Module] = []
    if args.mixup:
        choices.append(v2.MixUp(alpha=args.mixup, num_classes=classes))
    if args.cutmix:
        choices.append(v2.CutMix(alpha=args.cutmix, num_classes=classes))
    return v2.RandomChoice(choices or [v2.Identity()])


# Checkpoints --------------------------------------------------------------------------------------


def save(path: Path, content: dict[str, Any]) -> None:
    """Write beside the file and rename, so that a killed process leaves a whole checkpoint."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def options_of_run(args: argparse.Namespace) -> dict[str, Any]:
    """The options that --resume must not change. The loss comes first, as others depend on it."""
    unused = MAY_CHANGE | DISTILLATION if args.loss == "ce" else MAY_CHANGE
    options = {name: value for name, value in vars(args).items() if name not in unused}
    if args.teacher_checkpoint:  # the teachers' contents, as the files may move
        contents = [path.read_bytes() for path in args.teacher_checkpoint]
        options["teacher_checkpoint"] = [hashlib.sha256(it).hexdigest() for it in contents]
    return {"loss": args.loss, **options}


def resume(
    path: Path,
    options: dict[str, Any],
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> list[dict[str, float]]:
    """Restore a run after its last whole epoch. Returns the rows of its log."""
    checkpoint = load(path)
    saved = checkpoint.get("options", {})
    for name, value in options.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} was trained with --{name.replace('_', '-')} {saved.get(name)}, "
                f"not {value}: repeat the options of that run, or choose another --out"
            )
    load_weights(student, checkpoint, path, options["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:  # empty unless the run had --amp fp16
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["log"]


# Log ----------------------------------------------------------------------------------------------


def step_statistics(
    loss: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    temperature: float,
) -> dict[str, float]:
    """Means over a micro-batch. `soft` is the soft term without alpha * T^2 * weight."""
    labels = target.argmax(1) if target.is_floating_point() else target  # mixup's probabilities
    means = {"loss": loss, "top1": 100 * (student_logits.argmax(1) == labels).float().mean()}
    if teacher_logits is not None:
        terms = wsl_terms(student_logits, teacher_logits, target, temperature=temperature)
        means["hard"] = terms.student_ce.mean()
        means["soft"] = terms.soft.mean()
        means["weight"] = terms.weight.mean()
    # One copy to the CPU, as each copy waits for the device.
    values = torch.stack(list(means.values())).tolist()
    return dict(zip(means, values))


def log_step(
    progress: tqdm,
    board: SummaryWriter,
    epoch: int,
    step: int,
    steps: int,
    row: dict[str, float],
) -> None:
    """Write to TensorBoard and to the bar. Without a terminal, print a line."""
    for name, value in row.items():
        board.add_scalar(f"step/{name}", value, epoch * steps + step)
    values = {name: f"{value:.3g}" for name, value in row.items()}
    progress.set_postfix(values)
    if progress.disable:
        numbers = ", ".join(f"{name} {value}" for name, value in values.items())
        print(f"epoch {epoch + 1}, step {step} of {steps}: {numbers}", flush=True)


def log_epoch(folder: Path, board: SummaryWriter, steps: int, rows: list[dict[str, float]]) -> None:
    """Write to TensorBoard, to log.csv and to the screen."""
    row = rows[-1]
    for name, value in row.items():
        board.add_scalar(f"epoch/{name}", value, len(rows) * steps)
    board.flush()
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(rows)
    print(", ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)


# Training and validation --------------------------------------------------------------------------


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, AMP.get(args.amp), enabled=args.amp is not None)


def mean_logits(teachers: nn.ModuleList, images: Tensor) -> Tensor | None:
    if not teachers:
        return None
    with torch.inference_mode():
        return sum(teacher(images).float() for teacher in teachers) / len(teachers)


def train_one_epoch(
    model: nn.Module,
    teachers: nn.ModuleList,
    batches: Batches,
    mixing: nn.Module,
    loss_function: Callable[[Tensor, Tensor | None, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    epoch: int,
    args: argparse.Namespace,
    board: SummaryWriter | None,
) -> dict[str, float]:
    """Train on the micro-batches of an epoch. Only the first process has a `board`, and logs."""
    model.train()
    rows: list[dict[str, float]] = []
    steps = len(batches) // args.accumulate
    progress = tqdm(batches, f"epoch {epoch + 1}", disable=True if board is None else None)
    start = time.perf_counter()
    for index, (images, labels) in enumerate(progress, 1):
        images, target = mixing(images, labels)
        step_ends = index % args.accumulate == 0
        # As DDP's no_sync: gradients are averaged over processes once a step.
        model.require_backward_grad_sync = step_ends
        with autocast(args, batches.device):
            teacher_logits = mean_logits(teachers, images)
            student_logits = model(images)
        loss = loss_function(student_logits, teacher_logits, target)
        scaler.scale(loss / args.accumulate).backward()
        if not step_ends:
            continue
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        step = index // args.accumulate
        if board is not None and (step % args.log_every == 0 or step == steps):
            row = step_statistics(loss, student_logits, teacher_logits, target, args.temperature)
            seconds = time.perf_counter() - start
            row["images_per_s"] = step * args.batch_size / seconds
            row["waiting_for_data"] = batches.seconds_waited / seconds
            log_step(progress, board, epoch, step, steps, row)
            rows.append(row)
    return epoch_statistics(rows)


def epoch_statistics(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the logged steps. The speed of the last step is that of the whole epoch."""
    if not rows:
        return {}
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1]}
    return means | {name: rows[-1][name] for name in ("images_per_s", "waiting_for_data")}


@torch.inference_mode()
def evaluate(
    student: nn.Module,
    images: Dataset,
    args: argparse.Namespace,
    device: torch.device,
    rank: int,
    world: int,
) -> dict[str, float]:
    """Loss, top-1 and top-5 (percent). One process reads each image, so each counts once."""
    student.eval()
    if world > 1:
        for buffer in student.buffers():  # batch statistics differ between the processes
            dist.broadcast(buffer, 0)
    shard = range(rank, len(images), world)
    size = args.batch_size // world
    indices = [shard[start : start + size] for start in range(0, len(shard), size)]
    sums = torch.zeros(3, device=device)
    batches = Batches(images, indices, args, device)
    for inputs, labels in tqdm(batches, "validation", leave=False, disable=rank > 0 or None):
        with autocast(args, device):
            logits = student(inputs).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack((loss, 100 * hits[:, 0].sum(), 100 * hits.sum()))
    if world > 1:
        dist.all_reduce(sums)
    return dict(zip(("val_loss", "val_top1", "val_top5"), (sums / len(images)).tolist()))


def start_process() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device: of one process, or of several under torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def check_batch_size(args: argparse.Namespace, images: int, world: int) -> None:
    parts = world * args.accumulate
    if args.batch_size > images or args.batch_size % parts:
        raise ValueError(
            f"--batch-size must be at most {images} (images), "
            f"a multiple of {parts} (processes x --accumulate), got {args.batch_size}"
        )


def main() -> None:
    args = parse_args()
    rank, world, device = start_process()
    last = args.out / "last.pt"
    if last.exists() and not args.resume:
        raise FileExistsError(
            f"{last} exists: continue its run by --resume, or choose another --out"
        )
    train_images, val_images, classes = make_data(args)
    check_batch_size(args, len(train_images), world)

    torch.manual_seed(args.seed)  # every process starts from the same weights
    student = make_model(args.model, classes)
    teachers = make_teachers(args, classes)
    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    for network in (student, *teachers):
        network.to(device, memory_format=memory_format)
        if args.compile:
            network.compile()
    optimizer = torch.optim.SGD(
        student.parameters(),
        args.lr,
        momentum=0.9,
        weight_decay=args.weight_decay,
        nesterov=True,
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    loss_function, mixing = make_loss(args), make_mixing(args, classes)

    options = options_of_run(args)
    rows: list[dict[str, float]] = []  # of log.csv, one an epoch
    if last.exists():
        rows = resume(last, options, student, optimizer, scaler)
        if rank == 0:
            print(f"resumed {last} after epoch {len(rows)}", flush=True)
    steps = len(train_images) // args.batch_size
    model = DistributedDataParallel(student, gradient_as_bucket_view=True) if world > 1 else student
    board = None
    if rank == 0 and len(rows) < args.epochs:
        board = SummaryWriter(args.out / "tensorboard", purge_step=len(rows) * steps + 1)

    for epoch in range(len(rows), args.epochs):
        torch.manual_seed(mix(args.seed, epoch, rank))  # of dropout and mixup
        lr = args.lr * 0.1 ** (epoch // args.lr_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        indices = micro_batches(len(train_images), epoch, args, rank, world)
        batches = Batches(Augmented(train_images, args.seed), indices, args, device)
        row = {"epoch": epoch + 1, "lr": lr}
        row |= train_one_epoch(
            model,
            teachers,
            batches,
            mixing,
            loss_function,
            optimizer,
            scaler,
            epoch,
            args,
            board,
        )
        row |= evaluate(student, val_images, args, device, rank, world)
        if not math.isfinite(row["val_loss"]):
            raise FloatingPointError(
                f"the loss after epoch {epoch + 1} is {row['val_loss']}: this epoch is not saved"
            )
        rows.append(row)
        if board is not None:
            log_epoch(args.out, board, steps, rows)
            content = {
                "model": student.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "options": options,
                "epoch": epoch + 1,
                "log": rows,
            }
            save(last, content)

    if rank == 0:
        print(f"finished {len(rows)} epochs: log.csv, last.pt and tensorboard are in {args.out}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
