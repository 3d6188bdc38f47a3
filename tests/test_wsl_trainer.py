"""examples/frameworks/wsl_trainer.py with transformers' Trainer, in one process and in two."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weighted_soft_labels import reference

for _module in ("transformers", "accelerate"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[frameworks]"
    )

FRAMEWORKS = Path(__file__).parents[1] / "examples" / "frameworks"
sys.path.insert(0, str(FRAMEWORKS))

from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from wsl_trainer import WSLTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification}
VOCABULARY, CLASSES, LENGTH, COUNT = 30, 4, 6, 23
WSL = {"temperature": 3.0, "alpha": 1.5, "hard_weight": 0.75}

Example = dict[str, list[int] | int]

# One thread, so that results can be compared. The proxy makes any download fail at once.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}


def make_model(
    kind: str, seed: int, layers: int = 1, dropout: float = 0.0, **options: Any
) -> PreTrainedModel:
    """In float64. Large initial weights, so that logits depend on the words."""
    torch.manual_seed(seed)
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
    }
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    fixed = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "initializer_range": 0.3,
        "num_labels": CLASSES,
    }
    return KINDS[kind](BertConfig(**{**fixed, **size, **drop, **options})).double()


def make_student(kind: str) -> PreTrainedModel:
    return make_model(kind, seed=1)


def make_teacher(kind: str) -> PreTrainedModel:
    """With dropout, which eval mode must switch off."""
    return make_model(kind, seed=2, layers=2, dropout=0.5)


def make_data(kind: str, count: int = COUNT) -> list[Example]:
    """Lengths from 1 to 6, so that the parts of a batch have different numbers of labels."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for index in range(count):
        words = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        labels = torch.randint(CLASSES, (LENGTH,), generator=generator)
        real = torch.arange(LENGTH) <= index * index % LENGTH
        inputs = {
            "input_ids": words * real,
            "token_type_ids": torch.arange(LENGTH) // 3,
            "attention_mask": real.long(),
        }
        target = labels.where(real, -100) if kind == "token" else labels[0]
        examples.append(
            {name: value.tolist() for name, value in {**inputs, "labels": target}.items()}
        )
    return examples


def as_batch(examples: list[Example]) -> dict[str, Tensor]:
    return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}


def make_trainer(
    kind: str,
    out: Path,
    data: list[Example] | None = None,
    student: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> WSLTrainer:
    """A Trainer with SGD, an update a batch, and the given options."""
    quiet = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    descent = {
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    sizes = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 1,
    }
    data = make_data(kind) if data is None else data
    return WSLTrainer(
        student or make_student(kind),
        TrainingArguments(str(out), **{**quiet, **descent, **sizes, **options}),
        teacher=teacher or make_teacher(kind),
        **WSL,
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )


def by_hand(kind: str, data: list[Example], **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the reference, for the logits of the models."""
    student, teacher, inputs = make_student(kind), make_teacher(kind).eval(), as_batch(data)
    labels = inputs.pop("labels").reshape(-1)
    logits = [model(**inputs).logits.reshape(-1, CLASSES) for model in (student, teacher)]
    loss = reference.wsl_loss(logits[0], logits[1].detach(), labels, **WSL, **options)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


class Recorder(TrainerCallback):
    """Copies the gradients of every update, just before the optimizer uses them."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.updates.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        )


def train_recorded(kind: str, out: Path, **options: Any) -> dict[str, Any]:
    recorder = Recorder()
    trainer = make_trainer(kind, out, callbacks=[recorder], **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate(make_data(kind, 16))["eval_loss"]
    return {"updates": recorder.updates, "losses": losses, "evaluated": evaluated}


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor], error: float = 1e-12) -> None:
    """Equal to within `error` times the largest entry."""
    assert a.keys() == b.keys()
    largest = max(float(value.abs().max()) for value in b.values())
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= error * largest, name


# The loss and its gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_reference(
    tmp_path: Path, kind: str, smoothing: float
) -> None:
    options = {"per_device_train_batch_size": COUNT, "label_smoothing_factor": smoothing}
    trained = train_recorded(kind, tmp_path, **options)
    loss, gradients = by_hand(kind, make_data(kind), label_smoothing=smoothing)
    assert trained["losses"] == pytest.approx([loss], rel=1e-6)  # added up in float32
    (update,) = trained["updates"]
    assert_near(update, gradients)


def test_mixed_precision_is_that_of_the_trainer(tmp_path: Path) -> None:
    """Student and teacher compute in bfloat16, the loss in float32."""
    student, teacher = make_student("token").float(), make_teacher("token").float()
    recorder = Recorder()
    options = {"bf16": True, "per_device_train_batch_size": COUNT}
    trainer = make_trainer(
        "token", tmp_path, student=student, teacher=teacher, callbacks=[recorder], **options
    )
    trainer.train()
    assert trainer.teacher_logits.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in recorder.updates[0].values())
    assert_near(recorder.updates[0], by_hand("token", make_data("token"))[1], error=0.05)


# Parts of a batch ---------------------------------------------------------------------------------

# By default the Trainer fills the last batch with examples of the first one.
EVEN = {"accelerator_config": {"even_batches": False}}
IN_PARTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4,
}


def main_of_a_process(out: Path) -> None:
    """torchrun starts two of these."""
    results = {kind: train_recorded(kind, out, **IN_PARTS, **EVEN) for kind in KINDS}
    if os.environ["RANK"] == "0":
        torch.save(results, out / "results.pt")
    torch.distributed.barrier()
    # If its threads outlive the interpreter, the process aborts.
    torch.distributed.destroy_process_group()


def test_processes_and_accumulation_have_the_gradients_of_one_batch(tmp_path: Path) -> None:
    """Batches of 8, 8 and 7 examples. Two processes accumulate two parts each."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *torchrun, __file__, str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for kind, parts in torch.load(tmp_path / "results.pt", weights_only=True).items():
        whole = train_recorded(kind, tmp_path)
        assert len(parts["updates"]) == len(whole["updates"]) == 3
        for update, expected in zip(parts["updates"], whole["updates"]):
            assert_near(update, expected)
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert parts["evaluated"] == pytest.approx(whole["evaluated"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [True, False])
def test_data_parallel_keeps_the_scale(tmp_path: Path, kind: str, average: bool) -> None:
    """The loss counts once under nn.DataParallel, which without GPUs runs a single replica."""
    recorder = Recorder()
    options = {"per_device_train_batch_size": COUNT, "average_tokens_across_devices": average}
    trainer = make_trainer(kind, tmp_path, callbacks=[recorder], **options)
    trainer.args._n_gpu = 2
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.DataParallel)
    # The Trainer divides the number of labels in integers unless it averages.
    assert_near(
        recorder.updates[0], by_hand(kind, make_data(kind))[1], error=1e-6 if average else 0.05
    )


# The teacher --------------------------------------------------------------------------------------


def test_teacher_stays_as_it_was_and_out_of_optimizer_and_checkpoint(tmp_path: Path) -> None:
    teacher = make_teacher("sequence").train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer("sequence", tmp_path, teacher=teacher, save_strategy="epoch")
    trainer.train()

    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not trainer.teacher_logits.requires_grad
    optimized = {
        id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    assert optimized == {id(parameter) for parameter in trainer.model.parameters()}
    assert trainer.accelerator._models == [trainer.model]

    saved = tmp_path / "checkpoint-3"
    student = AutoModelForSequenceClassification.from_pretrained(saved)
    assert student.state_dict().keys() == make_student("sequence").state_dict().keys()
    weights = sum(parameter.numel() for parameter in student.parameters())
    assert (saved / "model.safetensors").stat().st_size < 8 * weights + 10_000


# Refused ------------------------------------------------------------------------------------------


def classifier(**options: Any) -> PreTrainedModel:
    return make_model("sequence", seed=2, **options)


def generator() -> PreTrainedModel:
    return BertLMHeadModel(
        BertConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=1, is_decoder=True)
    )


NAMES = ("north", "east", "south", "west")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: "bert-base-uncased", "teacher must be a model of transformers, got str"),
        (lambda: classifier(num_labels=3), "must have the same num_labels, got 4 and 3"),
        (lambda: classifier(vocab_size=31), "must have the same vocab_size, got 30 and 31"),
        (
            lambda: classifier(num_labels=1),
            "teacher must choose one of several labels, got num_labels = 1",
        ),
        (
            lambda: classifier(problem_type="multi_label_classification"),
            "problem_type = 'multi_label_classification'",
        ),
        (
            generator,
            "teacher must be a sequence or token classifier, got the generator BertLMHeadModel",
        ),
    ],
)
def test_refuses_a_teacher_that_does_not_fit(tmp_path: Path, teacher: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make_trainer("sequence", tmp_path, teacher=teacher())


def test_refuses_labels_in_another_order(tmp_path: Path) -> None:
    student, teacher, shouting = (
        classifier(id2label=dict(enumerate(names)))
        for names in (NAMES, NAMES[::-1], [name.upper() for name in NAMES])
    )
    with pytest.raises(ValueError, match=r"in the same order, got \['north', .*\] and \['west', "):
        make_trainer("sequence", tmp_path, student=student, teacher=teacher)
    make_trainer("sequence", tmp_path, student=student, teacher=shouting)
    # The default names, LABEL_0 and so on, tell no order.
    make_trainer("sequence", tmp_path, student=student, teacher=classifier())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda example: example.pop("labels"),
            "needs class indices as labels, got labels = None beside input_ids",
        ),
        (lambda example: example.update(labels=0.5), "got labels of torch.float32"),
    ],
)
def test_refuses_a_batch_without_class_indices(tmp_path: Path, change: Any, message: str) -> None:
    data = make_data("sequence")
    for example in data:
        change(example)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer("sequence", tmp_path, data).train()


def test_refuses_a_student_that_shares_layers_with_its_teacher(tmp_path: Path) -> None:
    student, teacher = make_student("sequence"), make_teacher("sequence")
    student.bert.encoder.layer[0] = teacher.bert.encoder.layer[0]
    with pytest.raises(ValueError, match="does it share layers with the student"):
        make_trainer("sequence", tmp_path, student=student, teacher=teacher).train()


def test_teacher_reads_token_types_that_the_student_does_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = DistilBertConfig(
        vocab_size=VOCABULARY, n_layers=1, n_heads=2, dim=16, num_labels=CLASSES
    )
    student = DistilBertForSequenceClassification(config).double()
    with pytest.raises(ValueError, match="pass remove_unused_columns=False"):
        make_trainer("sequence", tmp_path, student=student)

    options = {"remove_unused_columns": False, "per_device_eval_batch_size": COUNT}
    trainer = make_trainer("sequence", tmp_path, student=student, **options)
    seen: list[dict[str, Any]] = []
    trainer.teacher.register_forward_pre_hook(
        lambda *parts: seen.append(parts[-1]), with_kwargs=True
    )
    trainer.evaluate()
    assert seen[0]["token_type_ids"].equal(as_batch(make_data("sequence"))["token_type_ids"])


# The script ---------------------------------------------------------------------------------------


def test_script_trains_a_teacher_and_a_student(tmp_path: Path) -> None:
    options = ("--epochs", "1", "--batch-size", "200", "--out", "out")
    done = subprocess.run(
        [sys.executable, str(FRAMEWORKS / "wsl_trainer.py"), *options],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = re.findall(r"^(\w+): \d+\.\d\d %, saved in (\S+)$", done.stdout, flags=re.MULTILINE)
    assert results == [("teacher", "out/teacher"), ("student", "out/student")]
    for name, layers in (("teacher", 2), ("student", 1)):
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name)
        assert saved.config.num_hidden_layers == layers


if __name__ == "__main__":
    main_of_a_process(Path(sys.argv[1]))
