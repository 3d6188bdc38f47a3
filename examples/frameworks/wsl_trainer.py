"""Weighted Soft Labels with the Hugging Face Trainer; as a script, an example on digits.

    pip install "weighted-soft-labels[frameworks]"
    python wsl_trainer.py                                  # downloads no data and no models
    python wsl_trainer.py --alpha 0                        # the student alone: cross-entropy
    torchrun --nproc-per-node 2 wsl_trainer.py

Copy :class:`WSLTrainer` and its two checks. It takes any sequence or token classifier of
transformers.

    trainer = WSLTrainer(student, args, teacher=teacher, train_dataset=...)
    trainer.train()

Label tokens that must not count with -100, as DataCollatorForTokenClassification does with padding.
The teacher moves to the device, in eval mode. It is neither trained nor wrapped nor saved.

The loss is the sum over the labels that count, divided by their number in the whole batch, however
many accumulated parts and processes share the batch. This needs average_tokens_across_devices at
its default.

With several processes the Trainer fills the last batch of an epoch with examples of the first one,
unless accelerator_config={"even_batches": False}. The Trainer omits NaN from the loss that it logs,
unless logging_nan_inf_filter=False.

The example shows that the code works. Its accuracies say little about WSL.
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

# Distillation: the part to copy into your project -------------------------------------------------


class WSLTrainer(Trainer):
    """A Trainer with the WSL loss. `label_smoothing_factor` smooths the labels of the hard term."""

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
        self.loss = WSLLoss(
            temperature=temperature,
            alpha=alpha,
            hard_weight=hard_weight,
            label_smoothing=self.args.label_smoothing_factor,
            reduction="sum",
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        check_batch(self.teacher, inputs)
        teacher_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.inference_mode(), self.accelerator.autocast():
            self.teacher_logits = self.teacher(**teacher_inputs).logits
        return super().compute_loss(model, inputs, *args, **kwargs)

    def wsl(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        # (batch, length, classes) of tokens becomes (batch, classes, length). The logits of
        # sequences, (batch, classes), stay the same.
        student_logits = outputs.logits.transpose(1, -1)
        teacher_logits = self.teacher_logits.transpose(1, -1)
        loss = self.loss(student_logits, teacher_logits, labels)
        if num_items_in_batch is None:
            return loss / (labels != -100).sum()
        # The Trainer multiplies the loss by n_gpu. The outputs here are those of all replicas.
        return loss / (num_items_in_batch * max(1, self.args.n_gpu))


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse models that cannot be distilled, or whose labels do not mean the same."""
    check_classifier("model", student)
    check_classifier("teacher", teacher)
    for option in ("num_labels", "vocab_size"):
        ours, theirs = getattr(student.config, option, None), getattr(teacher.config, option, None)
        if ours != theirs:
            raise ValueError(
                f"model and teacher must have the same {option}, got {ours} and {theirs}"
            )
    ours, theirs = label_names(student), label_names(teacher)
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ValueError(
            f"model and teacher must have their labels in the same order, got {ours} and {theirs}"
        )
    if args.remove_unused_columns and reads_types(teacher) and not reads_types(student):
        raise ValueError(
            f"the Trainer would drop token_type_ids, which the teacher reads and "
            f"{type(student).__name__} does not: "
            "pass remove_unused_columns=False to TrainingArguments"
        )


def check_classifier(name: str, model: PreTrainedModel) -> None:
    kind = type(model).__name__
    if not hasattr(model, "config"):
        raise TypeError(f"{name} must be a model of transformers, got {kind}")
    if model.can_generate():
        raise ValueError(f"{name} must be a sequence or token classifier, got the generator {kind}")
    count, problem = model.config.num_labels, model.config.problem_type
    if count == 1 or problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"{name} must choose one of several labels, "
            f"got num_labels = {count} and problem_type = {problem!r}"
        )


def label_names(model: PreTrainedModel) -> list[str]:
    return [str(label).lower() for _, label in sorted(model.config.id2label.items())]


def reads_types(model: PreTrainedModel) -> bool:
    return "token_type_ids" in inspect.signature(model.forward).parameters


def check_batch(teacher: PreTrainedModel, inputs: dict[str, Any]) -> None:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = f"labels of {labels.dtype}" if isinstance(labels, Tensor) else f"labels = {labels!r}"
        raise ValueError(
            f"WSLTrainer needs class indices as labels, got {kind} beside {', '.join(inputs)}"
        )
    if any(module.training for module in teacher.modules()):
        raise ValueError(
            "the teacher must stay in eval mode, but a part of it is in train mode: "
            "does it share layers with the student? Pass a deepcopy"
        )


# The example: scikit-learn's digits, an image as a sentence of 64 grey values ---------------------


def load_examples() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Examples to train on, and to test on."""
    digits = load_digits()
    sentences = torch.tensor(digits.images).long().flatten(1)  # "words" from 0 to 16
    examples = [
        {"input_ids": words, "labels": int(label)} for words, label in zip(sentences, digits.target)
    ]
    random.shuffle(examples)
    return examples[800:], examples[:800]


def small_bert(layers: int) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=17,
        max_position_embeddings=64,
        num_labels=10,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=layers,
        initializer_range=0.08,  # the default of 0.02 is meant for a width of 768
    )
    return BertForSequenceClassification(config)


def accuracy(evaluation: EvalPrediction) -> dict[str, float]:
    predicted = evaluation.predictions.argmax(-1)
    return {"accuracy": float((predicted == evaluation.label_ids).mean())}


def train(name: str, trainer: Trainer) -> None:
    folder = f"{trainer.args.output_dir}/{name}"
    trainer.train()
    trainer.save_model(folder)
    percent = 100 * trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"{name}: {percent:.2f} %, saved in {folder}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--temperature", type=float, default=4.0, help="(4, the paper's for CIFAR-100)"
    )
    parser.add_argument(
        "--alpha", type=float, default=2.25, help="(2.25, the paper's for CIFAR-100)"
    )
    parser.add_argument("--hard-weight", type=float, default=1.0, help="(1)")
    parser.add_argument("--epochs", type=int, default=10, help="of teacher and of student (10)")
    parser.add_argument("--batch-size", type=int, default=25, help="of a process (25)")
    parser.add_argument("--lr", type=float, default=2e-3, help="(0.002)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--out", default="runs/trainer", help="folder of both (runs/trainer)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # more threads do not help networks this small
    set_seed(args.seed)
    arguments = TrainingArguments(
        args.out,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        warmup_steps=0.1,
        seed=args.seed,
        per_device_train_batch_size=args.batch_size,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    )
    examples, test = load_examples()
    shared = {
        "args": arguments,
        "train_dataset": examples,
        "eval_dataset": test,
        "compute_metrics": accuracy,
    }
    teacher, student = small_bert(layers=2), small_bert(layers=1)
    train("teacher", Trainer(teacher, **shared))
    trainer = WSLTrainer(
        student,
        teacher=teacher,
        temperature=args.temperature,
        alpha=args.alpha,
        hard_weight=args.hard_weight,
        **shared,
    )
    train("student", trainer)
    # Closes the process group, whose threads may otherwise abort a process that ends.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
