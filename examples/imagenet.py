"""Distil an ImageNet classifier with Weighted Soft Labels: the paper's recipe as one loop, on one process or many.

    pip install "weighted-soft-labels[examples]"
    python imagenet.py --data imagenet --out runs/r18                                # one process
    torchrun --nproc-per-node 8 imagenet.py --data imagenet --out runs/r18 --resume  # or eight, from its last epoch on
    python imagenet.py --fake-data --batch-size 32 --epochs 1 --out runs/smoke       # no data, no download: a first try

`imagenet` holds the folders `train` and `val`, each with one folder of images per class. The defaults are those of the
official script, ResNet-34 -> ResNet-18: torchvision's pretrained teacher, T = 2, alpha = 2.5, SGD with Nesterov
momentum 0.9, 100 epochs, batches of 256, learning rate 0.1, divided by 10 every 30 epochs, weight decay 1e-4. The other
pair is `--teacher resnet50 --model mobilenetv1`. The paper's repository reports 72.04 % for ResNet-18 and 71.52 % for
MobileNetV1; results of full runs of this script: not measured. The student is trained with

    ce   CE(labels), without a teacher
    kd   hard_weight * CE(labels) + alpha * T^2 * KL(teacher || student), Hinton et al. 2015
    wsl  hard_weight * CE(labels) + alpha * T^2 * weight * CE(teacher, student), `weighted_soft_labels.wsl_loss`

A model is one of torchvision's, else of timm's (`pip install timm`), by name. Of several teachers the logits are
averaged. The teacher is in eval mode; the official script leaves it in train mode, as `--teacher-train-mode` does. For
EMA, warmup, AdamW, RandAugment or clipping take timm's own train.py, with frameworks/wsl_timm.py.

`--batch-size` is that of a step over all processes: N of them with `--accumulate A` take B / (N * A) images at a time.
Which images, in which order and how they are cropped follows from the seed, the epoch and the image alone, so that a
run can resume on another number of processes; only batch statistics, dropout and mixup are a process's own. The last
batch of an epoch is left out if it is incomplete. In validation every image counts once.

After every epoch `--out` receives last.pt (`torch.load(path)["model"]` is the student's state dict, of use as a
`--teacher-checkpoint`), log.csv and TensorBoard's files. If the same command is given with `--resume`, a run that was
killed goes on after its last complete epoch; on a CPU, with as many processes, to the same bits.
"""

import argparse
import csv
import math
import os
import time
from pathlib import Path

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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option(
        "--data",
        type=Path,
        default="imagenet",
        help="holds train and val, each with a folder per class",
    )
    option(
        "--fake-data",
        type=int,
        nargs="?",
        const=512,
        metavar="N",
        help="N images of noise and random teachers",
    )

    option("--model", default="resnet18", metavar="NAME", help="to train; of torchvision or timm")
    option(
        "--teacher", nargs="+", default=["resnet34"], metavar="NAME", help="one or more, as --model"
    )
    option(
        "--teacher-checkpoint",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="one a teacher; else pretrained weights",
    )
    option(
        "--teacher-weights",
        default="IMAGENET1K_V1",
        metavar="NAME",
        help="torchvision's, if pretrained",
    )
    option(
        "--teacher-train-mode",
        action="store_true",
        help="batch statistics in the teacher, as in the official script",
    )
    option("--loss", choices=("ce", "kd", "wsl"), default="wsl", help="ce needs no teacher")
    option("--temperature", type=float, default=2.0, help="of the soft term")
    option("--alpha", type=float, default=2.5, help="scale of the soft term")
    option(
        "--hard-weight", type=float, default=1.0, help="scale of the cross-entropy in kd and wsl"
    )
    option("--label-smoothing", type=float, default=0.0, help="of the cross-entropy")
    option(
        "--mixup",
        type=float,
        default=0.0,
        metavar="A",
        help="parameter of its Beta distribution; 0: none",
    )
    option(
        "--cutmix",
        type=float,
        default=0.0,
        metavar="A",
        help="the same; with both, one of the two a batch",
    )

    option("--epochs", type=int, default=100, help="in all")
    option("--batch-size", type=int, default=256, help="images a step, over all processes")
    option("--accumulate", type=int, default=1, help="micro-batches a step, in each process")
    option("--lr", type=float, default=0.1, help="at the start")
    option("--lr-step", type=int, default=30, help="epochs after which it is divided by 10")
    option("--weight-decay", type=float, default=1e-4, help="of all parameters")
    option("--image-size", type=int, default=224, help="pixels, after cropping")
    option(
        "--seed", type=int, default=0, help="of initialisation, order, augmentation, dropout, mixup"
    )

    option("--amp", choices=AMP, help="mixed precision")
    option("--channels-last", action="store_true", help="memory format of images and networks")
    option("--compile", action="store_true", help="the networks, by torch.compile")
    option("--workers", type=int, default=4, help="reading processes, for each training process")
    option("--log-every", type=int, default=50, help="steps between two looks at loss and weight")
    option("--out", type=Path, required=True, help="folder of this run")
    option(
        "--resume", action="store_true", help="continue the run in --out; start it if there is none"
    )
    return parser.parse_args()


# Models and data ------------------------------------------------------------------------------------------------------


def make_model(name: str, classes: int, weights: str | None = None) -> nn.Module:
    """With random weights for so many classes, or as its library has pretrained it, for as many as that has."""
    if name in torchvision.models.list_models(module=torchvision.models):
        options = {"weights": weights} if weights else {"num_classes": classes}
        return torchvision.models.get_model(name, **options)
    import timm

    if (
        name == "mobilenetv1"
    ):  # the paper's, which has ReLU for ReLU6 and PyTorch's default initialisation
        model = timm.create_model("mobilenetv1_100", act_layer=nn.ReLU, num_classes=classes)
        for module in model.modules():
            getattr(module, "reset_parameters", lambda: None)()
        return model
    return timm.create_model(
        name, pretrained=bool(weights), **({} if weights else {"num_classes": classes})
    )


def load(path: Path, model: nn.Module) -> dict:
    """Fill `model` from a state dict, plain or under "model" or "state_dict". Returns all that the file holds."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
        model.load_state_dict(
            {name.removeprefix("module."): value for name, value in state.items()}
        )
    except Exception as error:
        raise RuntimeError(f"cannot load {path} into {type(model).__name__}: {error}") from error
    return checkpoint


def make_teachers(args: argparse.Namespace, classes: int) -> nn.ModuleList:
    teachers = nn.ModuleList()
    weights = None if args.teacher_checkpoint or args.fake_data else args.teacher_weights
    for name, path in zip(
        args.teacher, args.teacher_checkpoint or [None] * len(args.teacher), strict=True
    ):
        teacher = make_model(name, classes, weights).eval()
        if path:
            load(path, teacher)
        found = teacher(torch.zeros(1, 3, args.image_size, args.image_size)).shape[1]
        if found != classes:
            raise ValueError(f"the teacher {name} has {found} classes, the data {classes}")
        teachers.append(teacher)
    return teachers.requires_grad_(False).train(args.teacher_train_mode)


def read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        raise OSError(f"cannot read the image {path}: {error}") from error


def make_data(args: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """Training images, validation images, number of classes. Images are uint8: they are normalised on the device."""
    size = args.image_size
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    center = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), v2.PILToTensor()])
    if args.fake_data:
        shape, classes = (3, size, size), 1000
        train = FakeData(args.fake_data, shape, classes, transform=crop)
        return (
            train,
            FakeData(max(1, args.fake_data // 4), shape, classes, transform=center),
            classes,
        )
    train = ImageFolder(args.data / "train", crop, loader=read_image)
    val = ImageFolder(args.data / "val", center, loader=read_image)
    if train.classes != val.classes:
        raise ValueError(
            f"{args.data}: only one of train and val has {set(train.classes) ^ set(val.classes)}"
        )
    return train, val, len(train.classes)


class Augmented(Dataset):
    """Images by (epoch, index), which with the seed decide on the crop: not the process or worker that reads."""

    def __init__(self, images: Dataset, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        with torch.random.fork_rng(
            devices=[]
        ):  # Python salts the hashes of strings, not those of integers
            torch.default_generator.manual_seed(hash((self.seed, epoch, index)))
            return self.images[index]


def micro_batches(images, epoch, args, rank, world):
    """Those of one process in an epoch, lists of (epoch, index): together the processes take whole global batches."""
    size = args.batch_size // (world * args.accumulate)
    order = torch.randperm(
        images, generator=torch.Generator().manual_seed(hash((args.seed, epoch)))
    ).tolist()
    starts = range(rank * size, images - images % args.batch_size, world * size)
    return [[(epoch, index) for index in order[start : start + size]] for start in starts]


def load_batches(images, indices, args, device):
    """Batches on the device, normalised there: as uint8 they are a quarter of the bytes to move."""
    mean, std = (255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    pinned = device.type == "cuda"
    for pixels, labels in DataLoader(
        images, batch_sampler=indices, num_workers=args.workers, pin_memory=pinned
    ):
        pixels = pixels.to(device, non_blocking=True).contiguous(memory_format=memory_format)
        yield (pixels - mean) / std, labels.to(device, non_blocking=True)


# Training and validation ----------------------------------------------------------------------------------------------


def kd_term(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T."""
    log_student, log_teacher = (
        F.log_softmax(it.float() / temperature, 1) for it in (student_logits, teacher_logits)
    )
    return temperature**2 * F.kl_div(
        log_student, log_teacher, reduction="batchmean", log_target=True
    )


@torch.inference_mode()
def evaluate(student, images, args, device, rank, world):
    """Loss, top-1 and top-5 (percent) over all images, each of them read by one process and counted once."""
    student.eval()
    if world > 1:
        for buffer in (
            student.buffers()
        ):  # since the last forward pass, batch statistics are those of one process
            dist.broadcast(buffer, 0)
    mine, size = range(rank, len(images), world), args.batch_size // world
    indices = [mine[start : start + size] for start in range(0, len(mine), size)]
    sums = torch.zeros(3, device=device)
    for inputs, labels in load_batches(images, indices, args, device):
        with torch.autocast(device.type, AMP.get(args.amp), enabled=args.amp is not None):
            logits = student(inputs).float()
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack((loss, 100 * right[:, 0].sum(), 100 * right.sum()))
    if world > 1:
        dist.all_reduce(sums)
    return dict(zip(("val_loss", "val_top1", "val_top5"), (sums / len(images)).tolist()))


def main() -> None:
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:  # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    train_images, val_images, classes = make_data(args)
    steps = len(train_images) // args.batch_size
    if steps == 0 or args.batch_size % (world * args.accumulate):
        need = f"at most {len(train_images)} (images), a multiple of {world * args.accumulate} (processes x --accumulate)"
        raise ValueError(f"--batch-size must be {need}, got {args.batch_size}")
    last = args.out / "last.pt"
    if last.exists() and not args.resume:
        raise FileExistsError(
            f"{last} exists: --resume goes on with that run, another --out starts anew"
        )

    torch.manual_seed(args.seed)  # every process starts from the same weights
    student = make_model(args.model, classes)
    teachers = nn.ModuleList() if args.loss == "ce" else make_teachers(args, classes)
    for network in (student, *teachers):
        network.to(
            device,
            memory_format=torch.channels_last if args.channels_last else torch.preserve_format,
        )
        if args.compile:
            network.compile()
    parameters, decay = student.parameters(), args.weight_decay
    optimizer = torch.optim.SGD(
        parameters, args.lr, momentum=0.9, weight_decay=decay, nesterov=True, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    options = {
        "alpha": args.alpha,
        "hard_weight": args.hard_weight,
        "label_smoothing": args.label_smoothing,
    }
    wsl = WSLLoss(temperature=args.temperature, **options)
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    mixings = [v2.MixUp(alpha=args.mixup, num_classes=classes)] if args.mixup else []
    mixings += [v2.CutMix(alpha=args.cutmix, num_classes=classes)] if args.cutmix else []
    mixing = v2.RandomChoice(mixings or [v2.Identity()])  # turns labels into class probabilities

    first_epoch, log = 0, []
    if last.exists():
        checkpoint = load(last, student)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        first_epoch, log = checkpoint["epoch"], checkpoint["log"]
    model = DistributedDataParallel(student, gradient_as_bucket_view=True) if world > 1 else student
    if rank == 0:
        board = SummaryWriter(args.out / "tensorboard", purge_step=first_epoch * steps + 1)

    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(
            hash((args.seed, epoch, rank))
        )  # so that no state of a generator need be saved
        lr = args.lr * 0.1 ** (epoch // args.lr_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        student.train()
        indices = micro_batches(len(train_images), epoch, args, rank, world)
        batches = load_batches(Augmented(train_images, args.seed), indices, args, device)
        progress = tqdm(batches, f"epoch {epoch + 1}", len(indices), disable=rank > 0 or None)
        logged, waited = [], 0.0
        start = ready = time.perf_counter()
        for index, (images, labels) in enumerate(progress, 1):
            waited += time.perf_counter() - ready
            images, target = mixing(images, labels)
            step, rest = divmod(index, args.accumulate)
            model.require_backward_grad_sync = (
                rest == 0
            )  # as DDP's no_sync() does for all micro-batches but the last
            with torch.autocast(device.type, AMP.get(args.amp), enabled=args.amp is not None):
                if teachers:
                    with torch.inference_mode():
                        teacher_logits = sum(teacher(images).float() for teacher in teachers) / len(
                            teachers
                        )
                student_logits = model(images)

            if args.loss == "wsl":
                loss = wsl(student_logits, teacher_logits, target)
            else:
                loss = cross_entropy(student_logits.float(), target)
            if args.loss == "kd":
                soft = kd_term(student_logits, teacher_logits, args.temperature)
                loss = args.hard_weight * loss + args.alpha * soft

            scaler.scale(loss / args.accumulate).backward()
            if rest == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

            if rank == 0 and rest == 0 and (step % args.log_every == 0 or step == steps):
                likeliest = target.argmax(1) if target.is_floating_point() else target
                stats = {
                    "loss": loss,
                    "top1": 100 * (student_logits.argmax(1) == likeliest).float().mean(),
                }
                if teachers:
                    terms = wsl_terms(
                        student_logits, teacher_logits, target, temperature=args.temperature
                    )
                    stats |= {
                        "hard": terms.student_ce.mean(),
                        "soft": terms.soft.mean(),
                        "weight": terms.weight.mean(),
                    }
                stats = dict(
                    zip(stats, torch.stack(list(stats.values())).tolist())
                )  # the only wait for the device
                logged.append(stats)
                seconds = time.perf_counter() - start
                speed = {
                    "images_per_s": step * args.batch_size / seconds,
                    "waiting_for_data": waited / seconds,
                }
                progress.set_postfix(
                    {name: f"{value:.3g}" for name, value in (stats | speed).items()}
                )
                for name, value in (stats | speed).items():
                    board.add_scalar(f"step/{name}", value, epoch * steps + step)
            ready = time.perf_counter()

        scores = evaluate(student, val_images, args, device, rank, world)
        if not math.isfinite(scores["val_loss"]):
            raise FloatingPointError(
                f"the loss after epoch {epoch + 1} is {scores['val_loss']}; {last} is as it was"
            )
        if rank == 0:
            means = {name: sum(stats[name] for stats in logged) / len(logged) for name in stats}
            row = {"epoch": epoch + 1, "lr": lr, **means, **scores, **speed}
            log.append(row)
            print(", ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
            for name, value in row.items():
                board.add_scalar(f"epoch/{name}", value, (epoch + 1) * steps)
            board.flush()
            with open(args.out / "log.csv", "w", newline="") as file:
                csv.writer(file).writerows(
                    [list(row), *(list(epoch_row.values()) for epoch_row in log)]
                )
            state = {
                "model": student.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
            }
            torch.save(state | {"epoch": epoch + 1, "log": log}, args.out / "last.tmp")
            os.replace(args.out / "last.tmp", last)  # whole or not at all
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
