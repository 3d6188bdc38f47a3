r"""Language models from a stored teacher: the teacher runs once, students train from the disk.

    pip install "weighted-soft-labels[frameworks]"
    python language_model.py                    # downloads no data and no models

The text is the source of Python's standard library, split by file into training and held-out text.
A small Llama learns the training text. Its k likeliest classes of every token go to the disk. Then
smaller Llamas train from the stored rows, without the teacher, and each loss is one of

    CE   the tokens alone
    KD   hard_weight * CE + alpha * (cross-entropy with the teacher's probabilities)
    WSL  `cached_wsl_loss`, a weight for each token

at temperature 1. The students of a seed have the same first weights and batches. The result is the
number of bits per byte of the held-out files, as a table and a figure. The defaults (3 seeds) take
about three minutes of one core. Mean +- standard deviation; the teacher has 2.352. AMD EPYC,
torch 2.14.1, transformers 5.24.0.

                             CE                KD               WSL
    teacher as it is   2.902 +- 0.020    2.721 +- 0.032    2.740 +- 0.030
    --misalign 0.2                       2.819 +- 0.042    2.804 +- 0.037

Your models, any causal models of the hub that share a tokenizer:

    accelerate launch --mixed_precision bf16 language_model.py \
        --teacher Qwen/Qwen2.5-7B --student Qwen/Qwen2.5-0.5B --data part-*.jsonl --length 1024 \
        --methods wsl --seeds 1 --batch-size 8 --accumulate 4 --steps 3000 --lr 2e-5 \
        --cache-tokens 100_000_000 --save-every 200 --out runs/qwen

Every file of --data is a document; in .jsonl files, the "text" of every line is one. --resume
continues in the middle of the cache or of a student. Every process needs memory for both models
in turn and for a batch of full logits; `cached_linear_wsl_loss` avoids the student's. The teacher
is needed once: its --teacher and --cache serve later runs, which have another --out.

The cache is an Arrow table of `datasets`. The teacher's columns are beside the `input_ids`, so
`shuffle`, `filter` and `select` keep a row together. A memmap would need an index that follows
every such step. A token takes 6 k + 8 bytes.

What a wrong cache does: a cache that is misaligned after it was made is found, because column 0 of
`index` must be the label. On a CPU the loss raises

    IndexError: misaligned cache: column 0 must be the label, but row 0 has class 57 there and
    target 12 (...)

and on a GPU it is NaN. A teacher that ran on other inputs cannot be found. --misalign 0.2 makes
this fault: before compression, a fifth of the sequences receive the teacher's logits of others.

    python language_model.py --misalign 0.2 --teacher runs/language_model/teacher --out runs/wrong
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from weighted_soft_labels.cached import CachedTeacher, cached_wsl_loss, compress

IGNORED = -100
COLORS = {"ce": "#6b6b6b", "kd": "#0072b2", "wsl": "#d55e00"}
# Options that may change when a run continues. The text stands for the data.
FREE = ("cache", "data", "methods", "out", "resume", "save_every", "seeds", "workers")
SHARD = 1000  # rows in a file of the cache; --resume skips complete files
COLUMNS = Features(
    input_ids=List(Value("int32")),  # n tokens
    index=List(Value("int32")),  # (n - 1) * k
    log_prob=List(Value("float16")),  # (n - 1) * k
    label_log_prob=List(Value("float32")),  # n - 1
    log_rest=List(Value("float32")),  # n - 1
)


# Distillation: the part to copy into your project -------------------------------------------------


def train(
    name: str,
    model: PreTrainedModel,
    rows: Dataset,
    method: str,
    steps: int,
    seed: int,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> PreTrainedModel:
    """Train a model; continue with the last checkpoint in args.out / name, if there is one."""
    optimizer = make_optimizer(model)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    first = load_checkpoint(args.out / name, accelerator)
    batches = plan(len(rows), steps, seed, accelerator, args)[first * args.accumulate :]
    loader = iter(
        DataLoader(rows, batch_sampler=batches, collate_fn=collate, num_workers=args.workers)
    )
    silent = not accelerator.is_main_process
    progress = tqdm(range(first, steps), name, steps, initial=first, unit="step", disable=silent)
    for step in progress:
        parts = [send_to_device(next(loader), accelerator.device) for _ in range(args.accumulate)]
        # The mean is over the tokens of all parts and processes.
        tokens = accelerator.reduce(sum((part["target"] != IGNORED).sum() for part in parts))
        for i, part in enumerate(parts):
            target, cached = part["target"], part["cached"]
            last = i + 1 == len(parts)
            with nullcontext() if last else accelerator.no_sync(model):
                logits = predict(model, part, args.classes)
                if method == "wsl":
                    scales = {"alpha": args.alpha, "hard_weight": args.hard_weight}
                    loss = cached_wsl_loss(
                        logits, cached, target, temperature=1.0, reduction="sum", **scales
                    )
                elif method == "kd":
                    loss = kd_loss(logits, cached, target, args.alpha, args.hard_weight)
                else:
                    loss = ce_loss(logits, target)
                # Processes average their gradients, so the sum needs their number as a factor.
                accelerator.backward(loss * accelerator.num_processes / tokens)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule((step + 1) / steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            progress.set_postfix(loss=f"{loss.item() / (target != IGNORED).sum().item():.3f}")
        if (step + 1) % args.save_every == 0:
            save_checkpoint(args.out / name, step + 1, accelerator)
    accelerator.free_memory()
    return accelerator.unwrap_model(model).eval()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)


def predict(model: nn.Module, batch: dict[str, Any], classes: int) -> Tensor:
    """Return logits (batch, n - 1, classes) for rows of n tokens: position i predicts token i + 1.

    The last token of a row is a label, never an input.
    """
    inputs, mask = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1]
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
    return logits[..., :classes]  # some models have a padded vocabulary


def ce_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")


def kd_loss(
    logits: Tensor, cached: CachedTeacher, target: Tensor, alpha: float, hard_weight: float
) -> Tensor:
    """KD at T = 1. WSL with all weights 1."""
    soft = soft_loss(logits, cached)[target != IGNORED].sum()
    return hard_weight * ce_loss(logits, target) + alpha * soft


def soft_loss(logits: Tensor, cached: CachedTeacher) -> Tensor:
    """Return the cross-entropy with the teacher at T = 1, one number per token.

    The classes that are not kept count as one class.
    """
    logits, kept, teacher = logits.float(), cached.index.long(), cached.log_prob.float()
    student = logits.gather(-1, kept)
    if kept.shape[-1] < logits.shape[-1]:
        rest = logits.scatter(-1, kept, -math.inf).logsumexp(-1, keepdim=True)
        student = torch.cat((student, rest), -1)
        teacher = torch.cat((teacher, cached.log_rest.unsqueeze(-1)), -1)
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad rows on the right: mask 0 and target -100. The cache's padding may hold anything."""
    input_ids = pad_sequence([torch.tensor(row["input_ids"]).long() for row in rows], True)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long()
    target = input_ids.masked_fill(attention_mask == 0, IGNORED)[:, 1:]
    cached = None
    if "index" in rows[0]:
        columns = {}
        for name in CachedTeacher._fields:
            # n - 1 positions, of k classes or of one number
            parts = [torch.tensor(row[name]).view(len(row["log_rest"]), -1) for row in rows]
            columns[name] = pad_sequence(parts, True)
        for name in ("label_log_prob", "log_rest"):
            columns[name] = columns[name].squeeze(-1)
        cached = CachedTeacher(**columns)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "target": target,
        "cached": cached,
    }


def plan(
    rows: int, steps: int, seed: int, accelerator: Accelerator, args: argparse.Namespace
) -> list[list[int]]:
    """Return the batches of this process.

    They follow from the seed, so a run that continues needs the number of its step alone. If the
    rows of a step stay as many, more processes change nothing.
    """
    of_process = args.batch_size * args.accumulate
    order = draw_order(rows, steps, of_process * accelerator.num_processes, seed)
    order = order.view(steps, accelerator.num_processes, of_process)
    return order[:, accelerator.process_index].reshape(-1, args.batch_size).tolist()


def draw_order(rows: int, steps: int, of_step: int, seed: int) -> Tensor:
    """Return the rows of every step, (steps, of_step), in epochs of random order."""
    if rows < of_step:
        raise ValueError(f"a step takes {of_step} rows, and there are {rows} rows of training text")
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps / (rows // of_step))
    whole = rows // of_step * of_step  # without the incomplete step of an epoch
    orders = [torch.randperm(rows, generator=generator)[:whole] for _ in range(epochs)]
    return torch.cat(orders).view(-1, of_step)[:steps]


def schedule(done: float) -> float:
    """Factor of the learning rate: linear warmup for a tenth of the steps, then a cosine."""
    return min(10 * done, 0.5 + 0.5 * math.cos(math.pi * done))


def save_checkpoint(folder: Path, step: int, accelerator: Accelerator) -> None:
    old = sorted(folder.glob("step-*"))
    accelerator.save_state(str(folder / "unfinished"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "unfinished").rename(folder / f"step-{step:07d}")
        for path in old:
            shutil.rmtree(path)


def load_checkpoint(folder: Path, accelerator: Accelerator) -> int:
    """Return the number of steps that are done."""
    accelerator.wait_for_everyone()
    complete = sorted(folder.glob("step-*"))
    if not complete:
        return 0
    accelerator.load_state(str(complete[-1]))
    step = int(complete[-1].name.removeprefix("step-"))
    accelerator.print(f"{folder.name} continues after step {step}")
    return step


# The cache ----------------------------------------------------------------------------------------


def make_cache(rows: Dataset, accelerator: Accelerator, args: argparse.Namespace) -> Dataset:
    """Return the rows with the teacher's columns. Files that are complete are not made again."""
    if accelerator.is_main_process:
        args.cache.mkdir(parents=True, exist_ok=True)
        names = ("teacher", "text", "length", "cache_tokens", "k", "misalign")
        check_settings(args.cache, {name: getattr(args, name) for name in names})
    accelerator.wait_for_everyone()
    teacher = None
    starts = range(0, len(rows), SHARD)
    for start in starts[accelerator.process_index :: accelerator.num_processes]:
        path = args.cache / f"{start:09d}.arrow"
        if not path.exists():
            if teacher is None:
                teacher = load(args.teacher, accelerator)
            shard = rows.select(range(start, min(start + SHARD, len(rows))))
            write_shard(teacher, shard, path, args)
    accelerator.wait_for_everyone()
    files = [Dataset.from_file(str(args.cache / f"{start:09d}.arrow")) for start in starts]
    sample = torch.cat([torch.tensor(x) for x in files[0]["log_rest"]])
    accelerator.print(f"{sample.exp().mean():.1%} of the teacher's mass is outside the k classes")
    return concatenate_datasets(files).with_format("numpy")


@torch.inference_mode()
def write_shard(
    teacher: PreTrainedModel, rows: Dataset, path: Path, args: argparse.Namespace
) -> None:
    unfinished = path.with_suffix(".unfinished")
    with ArrowWriter(features=COLUMNS, path=str(unfinished)) as writer:
        for start in tqdm(range(0, len(rows), args.batch_size), path.name, unit="batch"):
            ids = rows[start : start + args.batch_size]["input_ids"]
            batch = collate([{"input_ids": x} for x in ids])
            batch = send_to_device(batch, teacher.device)
            logits = predict(teacher, batch, args.classes)
            wrong = torch.arange(round(args.misalign * len(logits)))
            logits[wrong] = logits[wrong - 1]  # --misalign: another sequence's logits
            cached = compress(
                logits, batch["target"], args.k, temperature=1.0, ignore_index=IGNORED
            )
            columns = {"input_ids": ids}
            for name, x in zip(cached._fields, cached):
                x = x.cpu().numpy()
                columns[name] = [x[i, : len(row) - 1].ravel() for i, row in enumerate(ids)]
            writer.write_batch(columns)
        writer.finalize()
    unfinished.rename(path)


# Text and models ----------------------------------------------------------------------------------


def read(files: list[Path]) -> list[str]:
    """Return the documents. A text that stands twice would be in both splits: it counts once."""
    documents = {}
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".jsonl":
            texts = [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
        else:
            texts = [text]
        documents |= {digest(text): text for text in texts}
    return [documents[key] for key in sorted(documents)]  # the order of the digests is random


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def windows(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None = None,
) -> Dataset:
    """Cut documents into rows of up to length + 1 tokens. Every token is a label exactly once.

    A row begins with the last token of the row before it, or with the token between documents.
    With a limit, return that many rows at most.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows = []
    for text in documents:
        ids = [begin, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        ids = np.array(ids, dtype=np.int32)
        rows += [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
        if limit is not None and len(rows) >= limit:
            break
    return Dataset.from_dict({"input_ids": rows[:limit]}, Features(input_ids=COLUMNS["input_ids"]))


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel, documents: list[str], accelerator: Accelerator, args: argparse.Namespace
) -> float:
    rows = windows(documents, AutoTokenizer.from_pretrained(args.teacher), args.length)
    rows = rows.shard(accelerator.num_processes, accelerator.process_index)
    nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for batch in DataLoader(rows, args.batch_size, collate_fn=collate):
        batch = send_to_device(batch, accelerator.device)
        with accelerator.autocast():
            logits = predict(model, batch, args.classes)
        nats += ce_loss(logits, batch["target"])
    size = sum(len(text.encode()) for text in documents)
    return accelerator.reduce(nats).item() / math.log(2) / size


def load(name: str, accelerator: Accelerator) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.to(accelerator.device).eval()


def small_llama(classes: int, width: int, layers: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=classes,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,  # the default of 0.02 is meant for wider models
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train_tokenizer(documents: list[str], classes: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE, as GPT-2's: every text has tokens, and no byte is lost."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    between = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=classes,
        special_tokens=[between],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=between)


def make_teacher(documents: list[str], accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Train a small Llama on all of the training text, and save it in args.teacher."""
    rows = windows(documents, AutoTokenizer.from_pretrained(args.teacher), args.length)
    model = small_llama(args.classes, width=160, layers=3)
    model = train("teacher", model, rows, "ce", args.teacher_steps, 0, accelerator, args)
    if accelerator.is_main_process:
        model.save_pretrained(args.teacher)
    accelerator.wait_for_everyone()


def evaluate_teacher(
    held_out: list[str], accelerator: Accelerator, args: argparse.Namespace
) -> float:
    """Return bits per byte, which the cache keeps: later runs need no teacher."""
    result = args.cache / "teacher.json"
    if not result.exists():
        bits = bits_per_byte(load(args.teacher, accelerator), held_out, accelerator, args)
        if accelerator.is_main_process:
            result.write_text(json.dumps({"bits_per_byte": bits}))
        accelerator.wait_for_everyone()
    return json.loads(result.read_text())["bits_per_byte"]


def make_student(
    name: str,
    rows: Dataset,
    held_out: list[str],
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> float:
    """Train and save a student, unless it is there; return its bits per byte."""
    result = args.out / name / "result.json"
    if not result.exists():
        method, seed = name.split("-")
        set_seed(int(seed))
        if args.student is None:
            model = small_llama(args.classes, width=64, layers=2)
        else:
            model = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
        model = train(name, model, rows, method, args.steps, int(seed), accelerator, args)
        bits = bits_per_byte(model, held_out, accelerator, args)
        if accelerator.is_main_process:
            model.save_pretrained(result.parent)
            AutoTokenizer.from_pretrained(args.teacher).save_pretrained(result.parent)
            result.write_text(json.dumps({"bits_per_byte": bits}))
        accelerator.wait_for_everyone()
    return json.loads(result.read_text())["bits_per_byte"]


# The report ---------------------------------------------------------------------------------------


def report(teacher: float, bits: dict[str, list[float]], args: argparse.Namespace) -> None:
    print(f"\nBits per byte of the held-out documents; teacher {teacher:.3f}\n")
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (method, values) in enumerate(bits.items()):
        mean = statistics.mean(values)
        spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        seeds = " ".join(f"{value:.3f}" for value in values)
        print(f"{method.upper():4} {mean:.3f}{spread}    by seed: {seeds}")
        axes.plot([i] * len(values), values, "o", color=COLORS[method], alpha=0.6)
        axes.plot([i - 0.2, i + 0.2], [mean, mean], color=COLORS[method])
    axes.axhline(teacher, color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set_xticks(range(len(bits)), [method.upper() for method in bits])
    axes.set(xlim=(-0.6, len(bits) - 0.4), ylabel="bits per byte of held-out text")
    share = f"{args.misalign:.0%} of its sequences misaligned" if args.misalign else "as it is"
    axes.set_title(f"Students of a teacher {share}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(args.out / "language_model.png", dpi=110)
    print(f"\nFigure: {args.out / 'language_model.png'}")


def parse_args(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", help="name or folder; default: a small Llama is trained")
    add("--student", help="name or folder with the teacher's tokenizer; default: a small Llama")
    add("--data", type=Path, nargs="+", help="text or .jsonl; default: Python's standard library")
    add("--out", type=Path, default=Path("runs/language_model"), help="(runs/language_model)")
    add("--cache", type=Path, help="folder of the teacher's numbers; default: cache in --out")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--methods", nargs="+", choices=COLORS, default=list(COLORS), help="(ce kd wsl)")
    add("--seeds", type=int, default=3, help="students of each method (3)")
    add("--alpha", type=float, default=1.0, help="scale of the soft term (1)")
    add("--hard-weight", type=float, default=0.5, help="scale of CE in KD and WSL (0.5)")
    add("--k", type=int, default=64, help="classes that are kept of a token (64)")
    add("--misalign", type=float, default=0.0, help="share of wrong sequences in the cache (0)")
    add("--length", type=int, default=128, help="tokens that a row predicts (128)")
    add("--cache-tokens", type=int, default=200_000, help="tokens in the cache (200 000)")
    add("--batch-size", type=int, default=10, help="rows of a process and part (10)")
    add("--accumulate", type=int, default=1, help="parts of a step (1)")
    add("--steps", type=int, default=160, help="of a student (160)")
    add("--teacher-steps", type=int, default=300, help="of the small teacher (300)")
    add("--vocabulary", type=int, default=1024, help="of the small teacher (1024)")
    add("--lr", type=float, default=4e-3, help="largest learning rate (0.004)")
    add("--workers", type=int, default=0, help="processes that read the cache (0)")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (1000)")
    args = parser.parse_args(words)
    if args.out.exists() and any(args.out.iterdir()) and not args.resume:
        parser.error(f"{args.out} has a run: pass --resume, or another --out")
    if args.misalign and round(args.misalign * args.batch_size) == 0:
        parser.error("--misalign is a share of a batch: pass a larger --batch-size")
    args.cache = args.cache or args.out / "cache"
    return args


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue with other options or another text."""
    settings = {name: str(value) for name, value in settings.items()}
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1))
    saved = json.loads(path.read_text())
    differ = [name for name in settings if settings[name] != saved.get(name)]
    if differ:
        raise ValueError(f"{folder} was made with another {', '.join(differ)}")


def main(words: list[str] | None = None) -> None:
    args = parse_args(words)
    accelerator = Accelerator()
    accelerator.wait_for_everyone()  # before another process writes into --out
    if args.student is None and accelerator.device.type == "cpu":
        # More threads gain little on models this small, and lose a lot on a busy machine.
        torch.set_num_threads(1)
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = read(args.data or sorted(library.glob("*.py")))
    args.text = digest("".join(documents))
    if accelerator.is_main_process:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(args).items() if name not in FREE}
        check_settings(args.out, settings)
    accelerator.wait_for_everyone()
    count = min(math.ceil(len(documents) / 20), 200)
    held_out, documents = documents[:count], documents[count:]
    if not documents:
        raise ValueError("--data needs two different documents: one is held out")
    trained_here = args.teacher is None
    if trained_here:
        args.teacher = str(args.out / "teacher")
        trained = Path(args.teacher, "tokenizer.json").exists()
        if accelerator.is_main_process and not trained:
            train_tokenizer(documents, args.vocabulary).save_pretrained(args.teacher)
        accelerator.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    args.classes = len(tokenizer)
    if args.student:
        vocabulary = AutoTokenizer.from_pretrained(args.student).get_vocab()
        if vocabulary != tokenizer.get_vocab():
            raise ValueError("student and teacher must have the same tokenizer")
    if trained_here and not Path(args.teacher, "model.safetensors").exists():
        set_seed(0)
        make_teacher(documents, accelerator, args)

    limit = math.ceil(args.cache_tokens / args.length)
    rows = windows(documents, tokenizer, args.length, limit).shuffle(seed=0)
    rows = make_cache(rows, accelerator, args)
    teacher = evaluate_teacher(held_out, accelerator, args)
    bits = {
        method: [
            make_student(f"{method}-{seed}", rows, held_out, accelerator, args)
            for seed in range(args.seeds)
        ]
        for method in args.methods
    }
    if accelerator.is_main_process:
        report(teacher, bits, args)
    accelerator.end_training()


if __name__ == "__main__":
    main()
