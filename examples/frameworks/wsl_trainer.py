"""Weighted Soft Labels with the Hugging Face Trainer; as a script, a small example on scikit-learn's digits.

    pip install "weighted-soft-labels[frameworks]"
    python wsl_trainer.py                                  # downloads nothing
    python wsl_trainer.py --alpha 0                        # the student alone: cross-entropy
    torchrun --nproc-per-node 2 wsl_trainer.py

Copy :class:`WSLTrainer` and its two checks; it takes any sequence or token classifier of transformers.

    trainer = WSLTrainer(student, args, teacher=teacher, train_dataset=...)
    trainer.train()

For tokens, label what is not to count with -100, as DataCollatorForTokenClassification does with padding. The teacher
is put into eval mode and onto the device; it is neither trained nor wrapped nor saved. The loss is the sum over the
labels that count, divided by their number in the whole batch, however many accumulated parts and processes share it;
for that, leave average_tokens_across_devices at its default.

With several processes the Trainer fills the last batch of an epoch with examples of the first unless
accelerator_config={"even_batches": False}, and it leaves NaN out of the loss that it logs unless
logging_nan_inf_filter=False.

The example shows that the code works, not what it is good for.
"""

from __future__ import annotations

import argparse
import inspect
import random
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
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
        self.loss = WSLLoss(
            **options, label_smoothing=self.args.label_smoothing_factor, reduction="sum"
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        check_batch(self.teacher, inputs)
        with torch.inference_mode(), self.accelerator.autocast():
            self.teacher_logits = self.teacher(
                **{k: v for k, v in inputs.items() if k != "labels"}
            ).logits
        return super().compute_loss(model, inputs, *args, **kwargs)

    def wsl(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        # The transposes make a view (batch, classes, length) of the logits of tokens, and leave those of sequences.
        loss = self.loss(
            outputs.logits.transpose(1, -1), self.teacher_logits.transpose(1, -1), labels
        )
        # The Trainer multiplies by n_gpu, as if DataParallel's outputs were one replica's; they are those of all.
        items = (
            (labels != -100).sum()
            if num_items_in_batch is None
            else num_items_in_batch * max(1, self.args.n_gpu)
        )
        return loss / items


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse models that cannot be distilled, or only into nonsense."""
    for name, model in (("model", student), ("teacher", teacher)):
        if not hasattr(model, "config"):
            raise TypeError(f"{name} must be a model of transformers, got {type(model).__name__}")
        if model.can_generate():
            raise ValueError(
                f"{name} must be a sequence or token classifier, got the generator {type(model).__name__}"
            )
        count, kind = model.config.num_labels, model.config.problem_type
        if count == 1 or kind in ("regression", "multi_label_classification"):
            raise ValueError(
                f"{name} must choose one of several labels, got num_labels = {count} and problem_type = {kind!r}"
            )
    for option in ("num_labels", "vocab_size"):
        sizes = [getattr(model.config, option, None) for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"model and teacher must have the same {option}, got {sizes[0]} and {sizes[1]}"
            )
    orders = [
        [str(label).lower() for _, label in sorted(m.config.id2label.items())]
        for m in (student, teacher)
    ]
    if orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]):
        raise ValueError(
            f"model and teacher must have their labels in the same order, got {orders[0]} and {orders[1]}"
        )
    reads_types = [
        "token_type_ids" in inspect.signature(model.forward).parameters
        for model in (student, teacher)
    ]
    if args.remove_unused_columns and reads_types == [False, True]:
        raise ValueError(
            f"the Trainer would drop token_type_ids, which the teacher reads and {type(student).__name__} does not: "
            "pass remove_unused_columns=False to TrainingArguments"
        )


def check_batch(teacher: PreTrainedModel, inputs: dict[str, Any]) -> None:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = f"labels of {labels.dtype}" if isinstance(labels, Tensor) else f"labels = {labels!r}"
        raise ValueError(
            f"WSLTrainer needs class indices as labels, got {kind} beside {', '.join(inputs)}"
        )
    if any(module.training for module in teacher.modules()):
        raise ValueError(
            "the teacher must stay in eval mode, in which WSLTrainer has put it, but some of it is in train mode; "
            "does it share layers with the student? Give it copies"
        )


# The example: scikit-learn's digits, an image read as a sentence of 64 grey values -----------------------------------


def load_examples() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """To train and to test on."""
    digits = load_digits()
    sentences = torch.tensor(digits.images).long().flatten(1)  # "words" from 0 to 16
    examples = [
        {"input_ids": words, "labels": int(label)} for words, label in zip(sentences, digits.target)
    ]
    random.shuffle(examples)
    return examples[800:], examples[:800]


def small_bert(layers: int) -> PreTrainedModel:
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
    }
    # BERT's initializer_range of 0.02 is meant for a width of 768.
    config = BertConfig(
        vocab_size=17, max_position_embeddings=64, num_labels=10, initializer_range=0.08, **size
    )
    return BertForSequenceClassification(config)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def train(name: str, trainer: Trainer) -> None:
    trainer.train()
    trainer.save_model(f"{trainer.args.output_dir}/{name}")
    percent = 100 * trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"{name}: {percent:.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--temperature", type=float, default=4.0, help="(4, the paper's for CIFAR-100)")
    option("--alpha", type=float, default=2.25, help="(2.25, the paper's for CIFAR-100)")
    option("--hard-weight", type=float, default=1.0, help="(1)")
    option("--epochs", type=int, default=10, help="of teacher and of student (10)")
    option("--batch-size", type=int, default=25, help="of a process (25)")
    option("--lr", type=float, default=2e-3, help="(0.002)")
    option("--seed", type=int, default=0, help="(0)")
    option("--out", default="runs/trainer", help="folder of both (runs/trainer)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more gain little on networks this small
    set_seed(args.seed)
    options = {
        "num_train_epochs": args.epochs,
        "learning_rate": args.lr,
        "warmup_steps": 0.1,
        "seed": args.seed,
    }
    options |= {
        "per_device_train_batch_size": args.batch_size,
        "use_cpu": not torch.cuda.is_available(),
    }
    arguments = TrainingArguments(args.out, save_strategy="no", report_to="none", **options)
    examples, test = load_examples()
    shared = {
        "args": arguments,
        "train_dataset": examples,
        "eval_dataset": test,
        "compute_metrics": accuracy,
    }
    wsl = {"temperature": args.temperature, "alpha": args.alpha, "hard_weight": args.hard_weight}
    teacher, student = small_bert(layers=2), small_bert(layers=1)
    train("teacher", Trainer(teacher, **shared))
    trainer = WSLTrainer(student, teacher=teacher, **wsl, **shared)
    train("student", trainer)
    trainer.accelerator.end_training()  # of a process group left open, threads may abort a process that ends


if __name__ == "__main__":
    main()
