"""Weighted Soft Labels with the Hugging Face Trainer; as a script, a small example on generated sentence pairs.

    pip install "weighted-soft-labels[frameworks]"
    python wsl_trainer.py                                               # downloads nothing
    python wsl_trainer.py --alpha 0                                     # the student alone: cross-entropy
    torchrun --nproc-per-node 2 wsl_trainer.py --use_cpu                # any option of TrainingArguments goes

Copy :class:`WSLTrainer` and its two checks; it takes any sequence or token classifier of transformers.

    trainer = WSLTrainer(student, args, teacher=teacher, train_dataset=...)
    trainer.train()

For tokens, label what is not to count with -100, as DataCollatorForTokenClassification does with padding. The teacher
is put into eval mode and onto the device; it is neither trained nor wrapped nor saved. The loss is the sum over the
labels that count, divided by their number in the whole batch, however many accumulated parts and processes share it;
for that, leave average_tokens_across_devices at its default.

Three habits of the Trainer to know of. With several processes it fills the last batch of an epoch with examples of the
first (accelerator_config={"even_batches": False} switches that off, where all processes get the same number of
batches). It leaves NaN out of the loss that it logs (logging_nan_inf_filter=False shows it). And its own loss of
BertForSequenceClassification in N accumulated parts or processes has a gradient N times too large (transformers
5.24.0), so that a learning rate found that way does not carry over.

The sentence pairs are generated, in the manner of MultiNLI but far from its difficulty: "a red ball is near a blue box"
entails "the ball is red", contradicts "the ball is blue" and leaves "the cup is red" open. A BERT of two layers is
trained as the teacher, then one of a single layer learns from it. Measured with --seed 0 to 4 (n = 5) on 2 cores of an
AMD EPYC, torch 2.14.1, transformers 5.24.0; accuracy on the 1000 test pairs in %, mean +- standard deviation:

    teacher   82.9 +- 9.2
    alone     62.3 +- 4.1        --alpha 0
    WSL       62.4 +- 4.0        WSL - alone, seed by seed: +0.1 +- 1.2

So here WSL is not measurably better than cross-entropy. The pairs show that the code works, not what it is good for.

The paper's setting on MultiNLI, a 12-layer BERT to a 3-layer one, takes the folder of the data set (MultiNLI 1.0 as
its authors publish it, .jsonl) and a fine-tuned teacher, by its folder or its name on the hub:

    torchrun --nproc-per-node 4 wsl_trainer.py --data multinli_1.0 --teacher bert-base-mnli --output_dir runs/mnli \\
        --num_train_epochs 3 --per_device_train_batch_size 8 --learning_rate 5e-5 --bf16

It has been run with small models and generated pairs in such files, never with BERT and MultiNLI. Of the paper's
setting we know the numbers of layers. The rest is our choice: the student starts as the first layers of the teacher
(of another model with --student bert-base-uncased, say), T and alpha are those of ImageNet, and the options of the
command are usual ones. A teacher whose configuration does not name its labels needs them in its order, as in --labels
contradiction entailment neutral; one that is below 50 % in that order is refused.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from weighted_soft_labels import WSLLoss

# Distillation: what to lift into a project of your own --------------------------------------------------------------


class WSLTrainer(Trainer):
    """A Trainer whose loss is WSL with `teacher`. `label_smoothing_factor` smooths the hard term."""

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        temperature: float = 2.0,
        alpha: float = 2.5,
        hard_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_loss_func=self.wsl, **kwargs)
        check_pair(self.model, teacher, self.args)
        self.teacher = teacher.eval().to(self.args.device)
        options = {"temperature": temperature, "alpha": alpha, "hard_weight": hard_weight}
        self.loss = WSLLoss(**options, label_smoothing=self.args.label_smoothing_factor, reduction="sum")

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        check_batch(self.teacher, inputs)
        with torch.no_grad(), self.accelerator.autocast():
            self.teacher_logits = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        return super().compute_loss(model, inputs, *args, **kwargs)

    def wsl(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        # The transposes make a view (batch, classes, length) of the logits of tokens, and leave those of sequences.
        loss = self.loss(outputs.logits.transpose(1, -1), self.teacher_logits.transpose(1, -1), labels)
        # The Trainer multiplies by n_gpu, as if DataParallel's outputs were one replica's; they are those of all.
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch * max(1, self.args.n_gpu)
        return loss / items


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse models that cannot be distilled, or only into nonsense."""
    for name, model in (("model", student), ("teacher", teacher)):
        if not hasattr(model, "config"):
            raise TypeError(f"{name} must be a model of transformers, got {type(model).__name__}")
        if model.can_generate():
            raise ValueError(f"{name} must be a sequence or token classifier, got the generator {type(model).__name__}")
        count, kind = model.config.num_labels, model.config.problem_type
        if count == 1 or kind in ("regression", "multi_label_classification"):
            raise ValueError(
                f"{name} must choose one of several labels, got num_labels = {count} and problem_type = {kind!r}"
            )
    for option in ("num_labels", "vocab_size"):
        sizes = [getattr(model.config, option, None) for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"model and teacher must have the same {option}, got {sizes[0]} and {sizes[1]}")
    orders = [[str(label).lower() for _, label in sorted(m.config.id2label.items())] for m in (student, teacher)]
    if orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]):
        raise ValueError(f"model and teacher must have their labels in the same order, got {orders[0]} and {orders[1]}")
    reads_types = ["token_type_ids" in inspect.signature(model.forward).parameters for model in (student, teacher)]
    if args.remove_unused_columns and reads_types == [False, True]:
        raise ValueError(
            f"the Trainer would drop token_type_ids, which the teacher reads and {type(student).__name__} does not: "
            "pass remove_unused_columns=False to TrainingArguments"
        )


def check_batch(teacher: PreTrainedModel, inputs: dict[str, Any]) -> None:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = f"labels of {labels.dtype}" if isinstance(labels, Tensor) else f"labels = {labels!r}"
        raise ValueError(f"WSLTrainer needs class indices as labels, got {kind} beside {', '.join(inputs)}")
    if any(module.training for module in teacher.modules()):
        raise ValueError(
            "the teacher must stay in eval mode, in which WSLTrainer has put it, but some of it is in train mode; "
            "does it share layers with the student? Give it copies"
        )


# The data -----------------------------------------------------------------------------------------------------------

Pair = tuple[str, str, int]  # premise, hypothesis, label

LABELS = ("entailment", "neutral", "contradiction")
THINGS = ("ball", "box", "cup", "hat", "chair", "lamp")
COLOURS = ("red", "blue", "green", "black")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "is", "near", *THINGS, *COLOURS)
TEST_PAIRS, TRAIN_PAIRS = 1000, 5000


class Refusal(Exception):
    """Something that the user has to change."""


def generate_pairs(count: int) -> list[Pair]:
    """Different from one another: two coloured things in the premise, the colour of one or of a third to judge."""
    rng = random.Random(0)
    pairs: dict[Pair, None] = {}
    while len(pairs) < count:
        label, (first, second, third) = rng.choice(LABELS), rng.sample(THINGS, 3)
        colours = rng.choices(COLOURS, k=2)
        thing, colour = rng.choice(list(zip((first, second), colours)))
        if label == "neutral":
            thing = third
        if label == "contradiction":
            colour = rng.choice([other for other in COLOURS if other != colour])
        premise = f"a {colours[0]} {first} is near a {colours[1]} {second}"
        pairs[premise, f"the {thing} is {colour}", LABELS.index(label)] = None
    return list(pairs)


def read_pairs(path: Path, labels: list[str]) -> list[Pair]:
    """Of a .jsonl file of MultiNLI, without the pairs on whose label its annotators did not agree."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [(r["sentence1"], r["sentence2"], labels.index(r["gold_label"])) for r in rows if r["gold_label"] != "-"]
    except (KeyError, ValueError) as error:
        raise Refusal(f"{str(path)!r} is not a .jsonl file of MultiNLI: {error!r}") from None


def collate(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> dict[str, Tensor]:
    premises, hypotheses, labels = (list(column) for column in zip(*pairs))
    batch = tokenizer(premises, hypotheses, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return {**batch, "labels": torch.tensor(labels)}


# The tasks ----------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    student: PreTrainedModel
    train: list[Pair]
    tests: dict[str, list[Pair]]


def generated_task() -> Task:
    """With a teacher that has learnt nothing yet."""
    torch.set_num_threads(1)  # more gain little on networks this small, and lose a lot on a busy machine
    pairs = generate_pairs(TEST_PAIRS + TRAIN_PAIRS)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    tests = {"generated": pairs[:TEST_PAIRS]}
    return Task(tokenizer, small_bert(layers=2, width=96), small_bert(layers=1, width=64), pairs[TEST_PAIRS:], tests)


def small_bert(layers: int, width: int) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=len(WORDS),
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 16,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,  # BERT's 0.02 is meant for a width of 768
        **named(LABELS),
    )
    return BertForSequenceClassification(config)


def multinli_task(options: Options) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher)
    labels = options.labels or [str(label).lower() for _, label in sorted(teacher.config.id2label.items())]
    if sorted(labels) != sorted(LABELS):
        raise Refusal(f"--labels must be {', '.join(LABELS)} in the order of the teacher, got {', '.join(labels)}")
    teacher.config.update(named(labels))
    student = AutoModelForSequenceClassification.from_pretrained(
        options.student or options.teacher,
        num_hidden_layers=options.layers,
        dtype=torch.float32,  # it is trained; by default it would have the dtype of the file
        **named(labels),
    )
    folder = Path(options.data)
    train = read_pairs(folder / "multinli_1.0_train.jsonl", labels)
    tests = {part: read_pairs(folder / f"multinli_1.0_dev_{part}.jsonl", labels) for part in ("matched", "mismatched")}
    return Task(tokenizer, teacher, student, train, tests)


def named(labels: list[str] | tuple[str, ...]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


# The command line ---------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """Beside those of TrainingArguments."""

    temperature: float = field(default=2.0, metadata={"help": "of WSL"})
    alpha: float = field(default=2.5, metadata={"help": "of WSL"})
    data: str | None = field(default=None, metadata={"help": "folder of MultiNLI 1.0 (the generated pairs)"})
    teacher: str | None = field(default=None, metadata={"help": "folder or name of a classifier fine-tuned for it"})
    student: str | None = field(
        default=None, metadata={"help": "folder or name of what the student starts as (teacher)"}
    )
    layers: int = field(default=3, metadata={"help": "of the student: the first so many of --student"})
    labels: list[str] | None = field(default=None, metadata={"help": "in the teacher's order (as it names them)"})


def parse_args() -> tuple[Options, TrainingArguments]:
    parser = HfArgumentParser(
        (Options, TrainingArguments),
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # What the generated pairs need, within a minute on two cores.
    parser.set_defaults(per_device_train_batch_size=64, per_device_eval_batch_size=256, num_train_epochs=8)
    parser.set_defaults(learning_rate=1e-3, warmup_steps=0.1, remove_unused_columns=False)
    options, args = parser.parse_args_into_dataclasses()
    if options.data and not options.teacher:
        parser.error("--data needs a --teacher")
    if not options.data and (options.teacher or options.student or options.labels):
        parser.error("--teacher, --student and --labels need --data")
    try:
        WSLLoss(temperature=options.temperature, alpha=options.alpha)
    except ValueError as error:
        parser.error(str(error))
    return options, args


def count_hits(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def report(name: str, trainer: Trainer) -> list[float]:
    """Print and return the accuracies in percent."""
    metrics = trainer.evaluate()
    accuracies = {part: 100 * metrics[f"eval_{part}_accuracy"] for part in trainer.eval_dataset}
    if trainer.is_world_process_zero():
        print(f"{name}: " + ", ".join(f"{accuracy:.2f} % ({part})" for part, accuracy in accuracies.items()))
    return list(accuracies.values())


def distil(options: Options, args: TrainingArguments) -> None:
    set_seed(args.seed)
    task = multinli_task(options) if options.data else generated_task()
    shared = {
        "train_dataset": task.train,
        "eval_dataset": task.tests,
        "data_collator": partial(collate, task.tokenizer),
        "processing_class": task.tokenizer,
        "compute_metrics": count_hits,
    }

    teaching = replace(args, save_strategy="no", load_best_model_at_end=False)
    teacher_trainer = Trainer(task.teacher, teaching, **shared)
    if not options.data:
        teacher_trainer.train()
        teacher_trainer.save_model(f"{args.output_dir}/teacher")
    accuracies = report("teacher", teacher_trainer)
    if options.data and max(accuracies) < 50:
        raise Refusal("the teacher is little better than chance: are --labels in its order?")

    trainer = WSLTrainer(
        task.student, args, teacher=task.teacher, temperature=options.temperature, alpha=options.alpha, **shared
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    report("student", trainer)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # of a process group left open, threads may abort a process that ends


def main() -> None:
    options, args = parse_args()
    try:
        distil(options, args)
    except (Refusal, OSError) as error:
        sys.exit(f"wsl_trainer.py: error: {error}")


if __name__ == "__main__":
    main()
