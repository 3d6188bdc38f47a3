"""examples/language_model.py, from text to figure, and the recipes for stored teachers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from weighted_soft_labels.cached import CachedTeacher, cached_wsl_loss, compress

for _module in ("accelerate", "datasets", "matplotlib", "tokenizers", "tqdm", "transformers"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[frameworks]"
    )

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import language_model as lm  # noqa: E402
import transformers  # noqa: E402

SMALL = """--length 16 --batch-size 10 --cache-tokens 1200 --k 20 --vocabulary 300
--steps 5 --teacher-steps 5 --save-every 3 --seeds 1"""
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(EXAMPLES.parent),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run, with the text beside."""
    folder = tmp_path_factory.mktemp("language_model")
    for i in range(40):  # documents of 1 to 40 lines, so that many end with a short row
        lines = [f"def add_{i}(x):\n    return {i * j} + x  # \u00e9\n" for j in range(i + 1)]
        (folder / f"{i:02d}.py").write_text("".join(lines), encoding="utf-8")
    shutil.copy(folder / "07.py", folder / "copy_of_07.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "SHARD", 30)
        lm.main(options(folder, "run"))
        yield folder


def options(folder: Path, out: str, *more: str) -> list[str]:
    files = map(str, sorted(folder.glob("*.py")))
    return [*SMALL.split(), "--data", *files, "--out", str(folder / out), *more]


def read_cache(folder: Path) -> Any:
    paths = sorted((folder / "cache").glob("[0-9]*.arrow"))
    tables = [lm.Dataset.from_file(str(path)) for path in paths]
    return lm.concatenate_datasets(tables).with_format("numpy")


def test_a_run_leaves_models_results_and_a_figure(folder: Path) -> None:
    run = folder / "run"
    for name in ("ce-0", "kd-0", "wsl-0"):
        bits = json.loads((run / name / "result.json").read_text())["bits_per_byte"]
        assert 1 < bits < 8  # a byte has 8
        model = lm.AutoModelForCausalLM.from_pretrained(run / name)
        assert model.config.vocab_size == len(lm.AutoTokenizer.from_pretrained(run / name))
    assert (run / "language_model.png").read_bytes().startswith(b"\x89PNG")


def test_the_teacher_s_columns_stay_with_their_tokens(folder: Path) -> None:
    """After shuffle and filter: the numbers are those that the teacher gives for the row."""
    teacher = lm.AutoModelForCausalLM.from_pretrained(folder / "run" / "teacher").eval()
    rows = read_cache(folder / "run").shuffle(seed=3).filter(lambda row: len(row["input_ids"]) > 5)
    lengths = {len(row["input_ids"]) for row in rows}
    assert 17 in lengths
    assert len(lengths) > 1  # the last row of a document is shorter
    for row in rows.select(range(12)):
        ids = torch.tensor(row["input_ids"]).long()
        # The shift: position i predicts token i + 1, and the last token predicts none.
        with torch.no_grad():
            logits = teacher(ids[:-1].unsqueeze(0)).logits[0]
        log_p = logits.log_softmax(-1).gather(1, ids[1:].unsqueeze(1))[:, 0]
        np.testing.assert_allclose(row["label_log_prob"], log_p, atol=1e-5)
        index = row["index"].reshape(len(ids) - 1, 20)
        np.testing.assert_array_equal(index[:, 0], ids[1:])
        expected = compress(logits, ids[1:], 20, temperature=1.0)
        np.testing.assert_allclose(row["log_rest"], expected.log_rest, atol=1e-4)
        log_prob = row["log_prob"].reshape(index.shape)
        np.testing.assert_allclose(log_prob, expected.log_prob.float(), atol=0.02)
    assert rows.features["log_prob"].feature.dtype == "float16"  # on the disk


def test_every_token_is_a_label_once_and_documents_count_once(folder: Path) -> None:
    documents = lm.read(sorted(folder.glob("*.py")))
    assert len(documents) == len(list(folder.glob("*.py"))) - 1
    tokenizer = lm.AutoTokenizer.from_pretrained(folder / "run" / "teacher")
    rows = lm.windows(documents, tokenizer, 16)["input_ids"]
    labels = [token for row in rows for token in row[1:]]
    assert tokenizer.decode(labels) == "".join(documents)
    assert max(map(len, rows)) == 17
    (folder / "two.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": "one"}\n')
    assert sorted(lm.read([folder / "two.jsonl"])) == ["one", "two"]


def losses(logits: torch.Tensor, batch: dict[str, Any]) -> list[torch.Tensor]:
    cached, target = batch["cached"], batch["target"]
    return [
        lm.ce_loss(logits, target),
        lm.kd_loss(logits, cached, target, 1.0, 0.5),
        cached_wsl_loss(logits, cached, target, temperature=1.0, reduction="sum"),
    ]


def test_padding_adds_no_loss_and_no_gradient(folder: Path) -> None:
    rows = read_cache(folder / "run")
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    short, long = int(lengths.argmin()), int(lengths.argmax())
    rows = [rows[short], rows[long]]
    model = lm.AutoModelForCausalLM.from_pretrained(folder / "run" / "wsl-0").eval()
    both = lm.collate(rows)
    assert both["target"].shape == (2, 16)
    ignored = both["target"] == -100
    assert ignored.sum() == 17 - lengths[short]
    logits = lm.predict(model, both, 300)
    logits.retain_grad()
    together = losses(logits, both)
    for row in rows:
        alone = lm.collate([row])
        parts = losses(lm.predict(model, alone, 300), alone)
        together = [total - part for total, part in zip(together, parts)]
    for difference in together:
        assert abs(difference.item()) < 1e-3
    sum(losses(logits, both)).backward()
    assert not logits.grad[ignored].any()
    assert logits.grad[~ignored].any(-1).all()


def test_kd_is_wsl_with_all_weights_1() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 30, requires_grad=True)
    target = torch.randint(30, (2, 5))
    cached = compress(torch.randn(2, 5, 30), target, 7, temperature=1.0)
    target[1, 3:] = -100
    kd = lm.kd_loss(logits, cached, target, 0.7, 0.5)

    ce = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    weight = -torch.expm1(-ce.detach() / (1e-7 - cached.label_log_prob))
    weight[1, 3:] = 1
    soft = cached_wsl_loss(
        logits, cached, target, temperature=1.0, alpha=0.7, hard_weight=0.0, reduction="none"
    )
    expected = (0.5 * ce + soft / weight).sum()
    torch.testing.assert_close(kd, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(kd, logits, retain_graph=True)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-5
    )


def test_a_cache_that_is_misaligned_afterwards_raises(folder: Path) -> None:
    batch = lm.collate(read_cache(folder / "run").__getitems__([0, 1, 2]))
    shifted = CachedTeacher(*(x.roll(1, 0) for x in batch["cached"]))
    with pytest.raises(IndexError, match="misaligned cache: column 0 must be the label"):
        losses(torch.randn(*batch["target"].shape, 300), {**batch, "cached": shifted})


def test_misalign_changes_the_teacher_only(folder: Path) -> None:
    teacher = str(folder / "run" / "teacher")
    more = ["--teacher", teacher, "--misalign", "0.2", "--methods", "ce"]
    lm.main(options(folder, "wrong", *more))
    right, wrong = read_cache(folder / "run"), read_cache(folder / "wrong")
    changed = []
    for before, after in zip(right, wrong):
        np.testing.assert_array_equal(before["input_ids"], after["input_ids"])
        np.testing.assert_array_equal(before["index"][::20], after["index"][::20])  # the labels
        changed.append(abs(before["label_log_prob"] - after["label_log_prob"]).max() > 1e-4)
    assert len(changed) == 75
    assert sum(changed) == 15
    ce = [folder / name / "ce-0" / "result.json" for name in ("run", "wrong")]
    assert ce[0].read_text() == ce[1].read_text()


def test_a_run_continues_where_it_was_killed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the cache and of a student are done: the results are those of one run."""
    run = folder / "run"
    files = sorted((run / "cache").glob("[0-9]*.arrow"))
    assert len(files) == 3
    expected = files[1].read_bytes()
    files[1].rename(files[1].with_suffix(".unfinished"))
    done = files[0].stat().st_mtime_ns
    result = json.loads((run / "wsl-0" / "result.json").read_text())
    (run / "wsl-0" / "result.json").unlink()
    (run / "wsl-0" / "model.safetensors").unlink()

    with pytest.raises(SystemExit):
        lm.main(options(folder, "run"))
    with pytest.raises(ValueError, match="run was made with another alpha, k"):
        lm.main(options(folder, "run", "--resume", "--k", "9", "--alpha", "3"))
    lm.main(options(folder, "run", "--resume"))
    assert "wsl-0 continues after step 3" in capsys.readouterr().out
    assert files[1].read_bytes() == expected
    assert files[0].stat().st_mtime_ns == done
    again = json.loads((run / "wsl-0" / "result.json").read_text())
    assert again == pytest.approx(result, abs=1e-6)


def test_students_share_a_cache_and_parts_of_a_step_count_by_their_tokens(folder: Path) -> None:
    shared = [
        "--teacher",
        str(folder / "run" / "teacher"),
        "--cache",
        str(folder / "run" / "cache"),
    ]
    steps = ["--batch-size", "2", "--accumulate", "5", "--methods", "wsl"]
    lm.main(options(folder, "parts", *shared, *steps))
    assert not (folder / "parts" / "cache").exists()
    whole, parts = (
        json.loads((folder / name / "wsl-0" / "result.json").read_text())["bits_per_byte"]
        for name in ("run", "parts")
    )
    assert parts == pytest.approx(whole, abs=1e-4)
    with pytest.raises(ValueError, match="cache was made with another k"):
        lm.main(options(folder, "another", *shared, "--k", "9"))


def test_a_student_of_another_family_with_a_padded_vocabulary(folder: Path) -> None:
    teacher, student = folder / "run" / "teacher", folder / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=320, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(student)
    tokenizer = lm.AutoTokenizer.from_pretrained(teacher)
    tokenizer.save_pretrained(student)
    cache = folder / "run" / "cache"
    more = ["--teacher", str(teacher), "--cache", str(cache), "--student", str(student)]
    lm.main(options(folder, "padded", *more, "--methods", "kd", "wsl"))
    model = lm.AutoModelForCausalLM.from_pretrained(folder / "padded" / "wsl-0")
    assert model.config.vocab_size == 320

    lm.train_tokenizer(["another text"], 300).save_pretrained(student)
    with pytest.raises(ValueError, match="must have the same tokenizer"):
        lm.main(options(folder, "foreign", *more))


@pytest.mark.slow
def test_two_processes_train_as_one(folder: Path) -> None:
    more = ["--teacher", str(folder / "run" / "teacher"), "--batch-size", "5", "--methods", "wsl"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(EXAMPLES / "language_model.py"), *options(folder, "two", *more)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    whole, two = (
        json.loads((folder / name / "wsl-0" / "result.json").read_text())["bits_per_byte"]
        for name in ("run", "two")
    )
    assert two == pytest.approx(whole, abs=1e-4)


def test_views_of_images_as_the_readme_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (EXAMPLES / "README.md").read_text()
    (block,) = re.findall(r"```python\n(import numpy as np\n.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec("import torch\nfrom weighted_soft_labels import wsl_loss\n" + block, names)
    stored = np.load("teacher.npy", mmap_mode="r")
    assert stored.dtype == np.float16
    assert stored.shape == (32, 4, 10)
    numbers = torch.tensor([5, 3])
    image = names["look"](numbers, 2)
    assert torch.equal(image, names["look"](numbers, 2))
    assert not torch.equal(image, names["look"](numbers, 1))
    with torch.no_grad():
        fresh = names["teacher"](image).log_softmax(1)
    np.testing.assert_allclose(stored[numbers, 2], fresh, atol=5e-3)
    # The assertion of the recipe fails for a file of other views.
    wrong = block.replace("from_numpy(file[numbers, view])", "from_numpy(file[numbers, view - 1])")
    assert wrong != block
    with pytest.raises(AssertionError, match="a cache of other views"):
        exec("import torch\nfrom weighted_soft_labels import wsl_loss\n" + wrong, {})
