"""examples/frameworks/wsl_trainer.py: under transformers' own Trainer, in one process and in two."""

from __future__ import annotations

import copy
import inspect
import json
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
    pytest.importorskip(_module, reason=f"{_module} is missing: pip install weighted-soft-labels[frameworks]")

FRAMEWORKS = Path(__file__).parents[1] / "examples" / "frameworks"
sys.path.insert(0, str(FRAMEWORKS))

import wsl_trainer  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
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

# One thread, as results are compared; and a download fails at once, wherever this runs.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def make_model(kind: str, seed: int, layers: int = 1, dropout: float = 0.0, **options: Any) -> PreTrainedModel:
    """In float64, and initialised far from 0, so that its logits tell the classes and the words apart."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    fixed = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "initializer_range": 0.3, "num_labels": CLASSES}
    return KINDS[kind](BertConfig(**{**fixed, **size, **drop, **options})).double()


def make_student(kind: str, **options: Any) -> PreTrainedModel:
    return make_model(kind, seed=1, **options)


def make_teacher(kind: str) -> PreTrainedModel:
    """With dropout, which must be at rest."""
    return make_model(kind, seed=2, layers=2, dropout=0.5)


def make_data(kind: str, count: int = COUNT) -> list[Example]:
    """Of lengths from 1 to 6, so that no two parts of a batch hold as many labels of tokens."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for index in range(count):
        words = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        labels = torch.randint(CLASSES, (LENGTH,), generator=generator)
        types = torch.arange(LENGTH) // 3
        real = torch.arange(LENGTH) <= index * index % LENGTH
        examples.append(
            {
                "input_ids": (words * real).tolist(),
                "token_type_ids": types.tolist(),
                "attention_mask": real.long().tolist(),
                "labels": labels.where(real, -100).tolist() if kind == "token" else int(labels[0]),
            }
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
    """Of plain gradient descent, one update a batch, with nothing but the options given on top."""
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    plain = {"optim": "sgd", "learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_train_epochs": 1}
    data = make_data(kind) if data is None else data
    return WSLTrainer(
        student or make_student(kind),
        TrainingArguments(str(out), **{**quiet, **plain, **sizes, **options}),
        teacher=teacher or make_teacher(kind),
        **WSL,
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )


def by_hand(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The loss by the reference, of the logits that the models give here."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        teacher_logits = copy.deepcopy(teacher).eval()(**inputs).logits
    student_logits = student(**inputs).logits
    return reference.wsl_loss(
        student_logits.double().reshape(-1, CLASSES),
        teacher_logits.double().reshape(-1, CLASSES),
        batch["labels"].reshape(-1),
        **WSL,
        **options,
    )


def gradients_by_hand(
    kind: str, data: list[Example], dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """In float32 under autocast to `dtype`, if there is one."""
    student, teacher = make_student(kind), make_teacher(kind)
    if dtype is not None:
        student, teacher = student.float(), teacher.float()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = by_hand(student, teacher, as_batch(data), **options)
    loss.backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


class Recorder(TrainerCallback):
    """Keeps the gradients of every update, as the optimizer gets them."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.updates.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


def train_recorded(kind: str, out: Path, **options: Any) -> dict[str, Any]:
    recorder = Recorder()
    trainer = make_trainer(kind, out, callbacks=[recorder], **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate(make_data(kind, 16))["eval_loss"]
    return {"updates": recorder.updates, "losses": losses, "evaluated": evaluated}


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor], error: float = 1e-12) -> None:
    """All to within `error` of the largest of all."""
    assert a.keys() == b.keys()
    largest = max(float(value.abs().max()) for value in b.values())
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= error * largest, name


def assert_same_training(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert len(a["updates"]) == len(b["updates"]) == 3
    for x, y in zip(a["updates"], b["updates"]):
        assert_near(x, y)
    assert a["losses"] == pytest.approx(b["losses"], rel=1e-6)
    assert a["evaluated"] == pytest.approx(b["evaluated"], rel=1e-6)


# The loss and its gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_reference(tmp_path: Path, kind: str, smoothing: float) -> None:
    data = make_data(kind)
    options = {"per_device_train_batch_size": COUNT, "label_smoothing_factor": smoothing}
    trained = train_recorded(kind, tmp_path, **options)
    (update,) = trained["updates"]
    assert_near(update, gradients_by_hand(kind, data, label_smoothing=smoothing))
    expected = by_hand(make_student(kind), make_teacher(kind), as_batch(data), label_smoothing=smoothing)
    assert trained["losses"] == pytest.approx([expected.item()], rel=1e-6)  # added up in float32


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_reports_the_loss(tmp_path: Path, kind: str) -> None:
    trainer = make_trainer(kind, tmp_path, per_device_eval_batch_size=COUNT)
    expected = by_hand(make_student(kind), make_teacher(kind), as_batch(make_data(kind)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    unlabelled = [{k: v for k, v in example.items() if k != "labels"} for example in make_data(kind)]
    assert trainer.predict(unlabelled).predictions.shape[-1] == CLASSES


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_is_that_of_the_trainer(tmp_path: Path, kind: str) -> None:
    """Student and teacher compute in bfloat16, the loss in float32."""
    student, teacher, recorder = make_student(kind).float(), make_teacher(kind).float(), Recorder()
    options = {"bf16": True, "per_device_train_batch_size": COUNT}
    trainer = make_trainer(kind, tmp_path, student=student, teacher=teacher, callbacks=[recorder], **options)
    trainer.train()
    (update,) = recorder.updates
    assert trainer.teacher_logits.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in update.values())
    data, exact = make_data(kind), gradients_by_hand(kind, make_data(kind))
    assert_near(update, gradients_by_hand(kind, data, torch.bfloat16), error=1e-3)
    assert_near(update, exact, error=0.05)
    with pytest.raises(AssertionError):
        assert_near(update, exact, error=1e-4)


# Parts of a batch ---------------------------------------------------------------------------------------------------

EVEN = {"accelerator_config": {"even_batches": False}}  # by default the last batch is filled with examples of the first
IN_PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}


def main_of_a_process(out: Path) -> None:
    """What torchrun starts twice."""
    results = {kind: train_recorded(kind, out, **IN_PARTS, **EVEN) for kind in KINDS}
    if os.environ["RANK"] == "0":
        torch.save(results, out / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # or its threads may outlive the interpreter, which aborts then


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("processes")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, str(out)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out / "results.pt", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_and_accumulation_have_the_gradients_of_one_batch(
    tmp_path: Path, two_processes: dict[str, dict[str, Any]], kind: str
) -> None:
    """Batches of 8, 8 and 7 examples, in two processes that accumulate two parts each."""
    assert_same_training(two_processes[kind], train_recorded(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_has_the_gradients_of_one_batch(tmp_path: Path, kind: str) -> None:
    """Batches of 8, 8 and 7 examples in parts of 3, 3 and 2; the last has an odd part, too."""
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same_training(train_recorded(kind, tmp_path, **parts), train_recorded(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [True, False])
def test_data_parallel_keeps_the_scale(tmp_path: Path, kind: str, average: bool) -> None:
    """Whatever nn.DataParallel gathers, the loss is counted once. Without GPUs it runs its module in one part."""
    data, recorder = make_data(kind), Recorder()
    options = {"per_device_train_batch_size": COUNT, "average_tokens_across_devices": average}
    trainer = make_trainer(kind, tmp_path, callbacks=[recorder], **options)
    trainer.args._n_gpu = 2
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.DataParallel)
    # The Trainer divides the number of labels in integers unless it averages.
    assert_near(recorder.updates[0], gradients_by_hand(kind, data), error=1e-6 if average else 0.05)


# The teacher --------------------------------------------------------------------------------------------------------


def test_teacher_stays_as_it_was_and_out_of_optimizer_and_checkpoint(tmp_path: Path) -> None:
    teacher = make_teacher("sequence").train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer("sequence", tmp_path, teacher=teacher, save_strategy="epoch")
    trainer.train()

    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not trainer.teacher_logits.requires_grad
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in trainer.model.parameters()}
    assert trainer.accelerator._models == [trainer.model]

    saved = tmp_path / "checkpoint-3"
    student = AutoModelForSequenceClassification.from_pretrained(saved)
    assert student.state_dict().keys() == make_student("sequence").state_dict().keys()
    assert student.config.num_hidden_layers == 1
    weights = sum(parameter.numel() for parameter in student.parameters())
    assert (saved / "model.safetensors").stat().st_size < 8 * weights + 10_000


def test_resumed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    """With dropout and momentum, and from a checkpoint within an epoch."""
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole, resumed = (
        make_trainer("sequence", tmp_path, student=make_student("sequence", dropout=0.2), **options) for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.state.global_step == resumed.state.global_step == 6
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name


# Refused ------------------------------------------------------------------------------------------------------------


def classifier(**options: Any) -> PreTrainedModel:
    return make_model("sequence", seed=2, **options)


def generator() -> PreTrainedModel:
    return BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=1, is_decoder=True))


NAMES = ("north", "east", "south", "west")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: classifier(num_labels=3), "must have the same num_labels, got 4 and 3"),
        (lambda: classifier(vocab_size=31), "must have the same vocab_size, got 30 and 31"),
        (lambda: classifier(num_labels=1), "teacher must choose one of several labels, got num_labels = 1"),
        (lambda: classifier(problem_type="multi_label_classification"), "problem_type = 'multi_label_classification'"),
        (generator, "teacher must be a sequence or token classifier, got the generator BertLMHeadModel"),
    ],
)
def test_refuses_a_teacher_that_does_not_fit(tmp_path: Path, teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer("sequence", tmp_path, teacher=teacher())


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="teacher must be a model of transformers, got str"):
        make_trainer("sequence", tmp_path, teacher="bert-base-uncased")  # type: ignore[arg-type]


def test_refuses_labels_in_another_order(tmp_path: Path) -> None:
    student, teacher, shouting = (
        classifier(id2label=dict(enumerate(names))) for names in (NAMES, NAMES[::-1], [name.upper() for name in NAMES])
    )
    with pytest.raises(ValueError, match=r"in the same order, got \['north', .*\] and \['west', "):
        make_trainer("sequence", tmp_path, student=student, teacher=teacher)
    make_trainer("sequence", tmp_path, student=student, teacher=shouting)
    make_trainer("sequence", tmp_path, student=student, teacher=classifier())  # LABEL_0 and so on say nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda example: example.pop("labels"), "needs class indices as labels, got labels = None beside input_ids"),
        (lambda example: example.update(labels=0.5), "got labels of torch.float32"),
    ],
)
def test_refuses_a_batch_without_class_indices(tmp_path: Path, change: Any, message: str) -> None:
    data = make_data("sequence")
    for example in data:
        change(example)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer("sequence", tmp_path, data).train()


def test_refuses_a_teacher_in_train_mode(tmp_path: Path) -> None:
    trainer = make_trainer("sequence", tmp_path)
    trainer.teacher.train()
    with pytest.raises(ValueError, match="the teacher must stay in eval mode"):
        trainer.train()


def test_refuses_a_student_that_shares_layers_with_its_teacher(tmp_path: Path) -> None:
    student, teacher = make_student("sequence"), make_teacher("sequence")
    student.bert.encoder.layer[0] = teacher.bert.encoder.layer[0]
    with pytest.raises(ValueError, match="does it share layers with the student"):
        make_trainer("sequence", tmp_path, student=student, teacher=teacher).train()


def test_teacher_reads_token_types_that_the_student_does_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = DistilBertConfig(vocab_size=VOCABULARY, n_layers=1, n_heads=2, dim=16, num_labels=CLASSES)
    student, data = DistilBertForSequenceClassification(config).double().eval(), make_data("sequence")
    with pytest.raises(ValueError, match="pass remove_unused_columns=False"):
        make_trainer("sequence", tmp_path, student=student)

    options = {"remove_unused_columns": False, "per_device_eval_batch_size": COUNT}
    loss = make_trainer("sequence", tmp_path, student=student, **options).evaluate()["eval_loss"]
    batch = as_batch(data)
    types = batch.pop("token_type_ids")
    student_logits = student(batch["input_ids"], batch["attention_mask"]).logits
    teacher = make_teacher("sequence").eval()
    for token_type_ids, same in ((types, True), (None, False)):
        teacher_logits = teacher(batch["input_ids"], batch["attention_mask"], token_type_ids).logits
        expected = reference.wsl_loss(student_logits, teacher_logits, batch["labels"], **WSL)
        assert (loss == pytest.approx(expected.item(), rel=1e-6)) is same


def test_masked_language_models_are_classifiers_of_tokens(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    student, teacher = BertForMaskedLM(config), BertForMaskedLM(config)
    trainer = make_trainer("token", tmp_path, student=student, teacher=teacher, per_device_eval_batch_size=COUNT)
    batch = as_batch(make_data("token"))
    labels = batch.pop("labels")
    logits = [model.eval()(**batch).logits.transpose(1, 2) for model in (student, teacher)]
    expected = reference.wsl_loss(*logits, labels, **WSL)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_trainer_is_at_most_30_lines() -> None:
    assert len(inspect.getsource(WSLTrainer).splitlines()) <= 30


# The script ---------------------------------------------------------------------------------------------------------


def accuracies(output: str, who: str) -> list[float]:
    (line,) = re.findall(rf"^{who}: (.*)$", output, flags=re.MULTILINE)
    return [float(value) for value in re.findall(r"(\S+) %", line)]


def test_script_trains_a_teacher_and_a_student_offline(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FRAMEWORKS / "wsl_trainer.py"), "--use_cpu", "--max_steps", "4", "--output_dir", "out"],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for who, layers, folder in (("teacher", 2, "out/teacher"), ("student", 1, "out")):
        (accuracy,) = accuracies(done.stdout, who)
        assert 0 < accuracy <= 100
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert saved.config.num_hidden_layers == layers
        assert saved.config.id2label == dict(enumerate(wsl_trainer.LABELS))


def test_generated_labels_follow_from_the_sentences() -> None:
    pairs = wsl_trainer.generate_pairs(500)
    assert len(set(pairs)) == len({pair[:2] for pair in pairs}) == 500
    assert {label for *_, label in pairs} == {0, 1, 2}
    for premise, hypothesis, label in pairs:
        first, second = re.fullmatch(r"a (\w+ \w+) is near a (\w+ \w+)", premise).groups()
        thing, colour = re.fullmatch(r"the (\w+) is (\w+)", hypothesis).groups()
        true = {name: seen for seen, name in (first.split(), second.split())}
        expected = "neutral" if thing not in true else "entailment" if true[thing] == colour else "contradiction"
        assert wsl_trainer.LABELS[label] == expected
        assert set(f"{premise} {hypothesis}".split()) <= set(wsl_trainer.WORDS)


@pytest.fixture(scope="module")
def multinli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in MultiNLI's form, with the labels that the teacher of three layers in `teacher` gives, in its order."""
    folder = tmp_path_factory.mktemp("multinli")
    torch.manual_seed(0)
    task, labels = wsl_trainer.generated_task(), ["contradiction", "entailment", "neutral"]
    config = copy.deepcopy(task.teacher.config)
    config.update({"num_hidden_layers": 3, "initializer_range": 0.3, **wsl_trainer.named(labels)})
    teacher = BertForSequenceClassification(config).double().eval()
    teacher.save_pretrained(folder / "teacher")
    task.tokenizer.save_pretrained(folder / "teacher")
    config.update(wsl_trainer.named(["LABEL_0", "LABEL_1", "LABEL_2"]))
    teacher.save_pretrained(folder / "unnamed")
    task.tokenizer.save_pretrained(folder / "unnamed")

    with torch.no_grad():
        batch = wsl_trainer.collate(task.tokenizer, task.train[:48])
        batch.pop("labels")
        predictions = [labels[index] for index in teacher(**batch).logits.argmax(1).tolist()]
    assert len(set(predictions)) > 1
    rows = [
        {"gold_label": label, "sentence1": premise, "sentence2": hypothesis, "genre": "fiction"}
        for label, (premise, hypothesis, _) in zip(predictions, task.train)
    ]
    rows[5]["gold_label"] = "-"
    for part in ("train", "dev_matched", "dev_mismatched"):
        lines = (json.dumps(row) + "\n" for row in (rows if part != "dev_mismatched" else rows[:9]))
        (folder / f"multinli_1.0_{part}.jsonl").write_text("".join(lines))
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *options: str, teacher: str = "teacher") -> None:
    """The program without the seconds that a process takes to start."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    data = ("--data", str(folder), "--teacher", str(folder / teacher))
    fixed = ("--layers", "1", "--use_cpu", "--num_train_epochs", "1", "--output_dir", str(out))
    monkeypatch.setattr(sys, "argv", ["wsl_trainer.py", *data, *fixed, *options])
    wsl_trainer.main()


def test_script_distils_a_saved_teacher_on_multinli_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], multinli: Path, tmp_path: Path
) -> None:
    """At a learning rate of 0, so that the student stays what it starts as."""
    run_main(monkeypatch, multinli, tmp_path / "out", "--learning_rate", "0")
    output = capsys.readouterr().out
    assert accuracies(output, "teacher") == [100.0, 100.0]
    assert len(accuracies(output, "student")) == 2
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    teacher = AutoModelForSequenceClassification.from_pretrained(multinli / "teacher")
    assert student.config.num_hidden_layers == 1
    assert student.config.id2label == teacher.config.id2label
    kept = {
        name: value.float()
        for name, value in teacher.state_dict().items()
        if ".layer.0." in name or ".layer." not in name
    }
    assert student.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("options", "teacher", "message"),
    [
        ((), "unnamed", "--labels must be entailment, neutral, contradiction in the order of the teacher, got label_0"),
        (("--labels", "entailment", "neutral", "contradiction"), "unnamed", "are --labels in its order?"),
        ((), "missing", "missing"),
        (("--data", "nowhere"), "teacher", "No such file or directory: 'nowhere/multinli_1.0_train.jsonl'"),
        (("--data", "."), "teacher", "multinli_1.0_train.jsonl' is not a .jsonl file of MultiNLI: KeyError"),
    ],
)
def test_script_refuses(
    monkeypatch: pytest.MonkeyPatch,
    multinli: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    teacher: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("multinli_1.0_train.jsonl").write_text('{"text": "something else"}\n')
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, multinli, tmp_path / "out", *options, teacher=teacher)
    assert str(exit.value).startswith("wsl_trainer.py: error: ")
    assert message in str(exit.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--teacher", "x"), "--teacher, --student and --labels need --data"),
        (("--data", "x"), "--data needs a --teacher"),
        (("--temperature", "0"), "temperature must be finite and > 0, got 0.0"),
    ],
)
def test_script_refuses_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["wsl_trainer.py", *options])
    with pytest.raises(SystemExit, match="2"):
        wsl_trainer.main()
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    main_of_a_process(Path(sys.argv[1]))
