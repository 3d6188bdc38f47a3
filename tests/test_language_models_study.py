"""examples/study/language_models.py: losses, mistakes, kinds of tokens, a run that continues."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

for _module in ("accelerate", "datasets", "matplotlib", "scipy", "tokenizers", "transformers"):
    pytest.importorskip(
        _module, reason=f"{_module} is missing: pip install weighted-soft-labels[frameworks]"
    )

STUDY = Path(__file__).parents[1] / "examples" / "study"
sys.path.insert(0, str(STUDY))

import language_models as script  # noqa: E402
import study  # noqa: E402

from weighted_soft_labels.cached import CachedTeacher, compress  # noqa: E402

TINY = """--seeds 2 --steps 1 --teacher-steps 1 --weak-steps 1 --rows 24 --length 64 --batch-size 24
--vocabulary 300 --characters 50"""

pytestmark = pytest.mark.usefixtures("one_thread")


def terms(logits: torch.Tensor, cached: CachedTeacher, label: int) -> list[torch.Tensor]:
    """Return hard, soft and weight of one token, in float64, with the bucket's sum in the open."""
    prob = logits.double().softmax(0)
    kept = cached.index.long()
    teacher = torch.cat((cached.log_prob, cached.log_rest[None])).double().exp()
    teacher = teacher / teacher.sum()
    others = torch.ones(len(prob), dtype=torch.bool).index_fill(0, kept, False)
    soft = -(teacher[:-1] * prob[kept].log()).sum()
    if others.any():
        soft = soft - teacher[-1] * prob[others].sum().log()
    hard = -prob[label].log()
    weight = 1 - (-hard.detach() / (1e-7 - cached.label_log_prob.double())).exp()
    return [hard, soft, weight]


@pytest.mark.parametrize("k", [7, 30])
@pytest.mark.parametrize("method", script.METHODS)
def test_losses_are_what_the_docstring_says(method: str, k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 30, requires_grad=True)
    target = torch.randint(30, (3, 5))
    # The teacher is right in about half of the tokens.
    teacher_logits = torch.randn(3, 5, 30) + 2 * F.one_hot(target, 30)
    cached = compress(teacher_logits, target, k, temperature=1.0)
    right = (teacher_logits.argmax(-1) == target).flatten().double()
    assert 3 < right.sum() < 12
    tokens = [
        terms(logits[i, j], CachedTeacher(*(x[i, j] for x in cached)), int(target[i, j]))
        for i in range(3)
        for j in range(5)
    ]
    hard, soft, weight = (torch.stack(column) for column in zip(*tokens))
    soft_term = {
        "KD": soft.mean(),
        "WSL": (weight * soft).mean(),
        "uniform": weight.mean() * soft.mean(),
        "masked": (right * soft).mean(),
        "balanced": (weight * soft).sum() / weight.sum(),
    }
    expected = hard.mean() if method == "CE" else 0.25 * hard.mean() + 0.75 * soft_term[method]
    loss = script.make_loss(method, alpha=0.75, hard_weight=0.25)(logits, cached, target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-7)


def test_mistakes_are_in_the_share_of_rows_alone() -> None:
    logits = torch.arange(20.0)[:, None, None] * 100 + torch.arange(6.0)[:, None] + torch.rand(8)
    assert torch.equal(script.make_mistakes(logits, "none", 0.0), logits)
    for mistakes in ("exchanged", "shifted"):
        wrong = script.make_mistakes(logits, mistakes, 0.2)
        assert torch.equal(wrong[4:], logits[4:])
        assert (wrong[:4] != logits[:4]).all()
        if mistakes == "exchanged":
            source = (wrong[:4, 0, 0] // 100).long()
            assert sorted(source.tolist()) == [0, 1, 2, 3]
            assert torch.equal(wrong[:4], logits[source])
        else:
            assert torch.equal(wrong[:4, 1:], logits[:4, :-1])


def test_batches_mix_wrong_rows_with_others() -> None:
    """The order of the batches must not follow the rows that are wrong, the first ones."""
    for seed in range(6):
        order = script.lm.draw_order(1024, 256, 8, seed)
        wrong = (order < 205).float().mean(1)
        assert wrong.mean().item() == pytest.approx(0.2, abs=0.001)
        assert wrong.std().item() < 0.2
        assert wrong[:26].mean().item() < 0.35


def test_kinds_share_out_the_tokens() -> None:
    document = "".join(f"def f_{i}(x):\n    return x + {i}  # (x + {i})\n" for i in range(60))
    tokenizer = script.lm.train_tokenizer([document], 290)
    rows = script.full_rows([document], tokenizer, 16)
    kinds = script.kinds_of(rows, tokenizer)
    assert torch.equal(sum(mask.int() for mask in kinds.values()), torch.ones_like(rows[:, 1:]))
    assert all(mask.any() for mask in kinds.values())
    assert 0 < kinds["rare"].float().mean() <= script.RARE
    for row in range(len(rows)):
        for i in range(16):
            before, text = (tokenizer.decode([rows[row, j]]) for j in (i, i + 1))
            assert kinds["space"][row, i] == text.isspace()
            if kinds["first"][row, i]:
                assert text.strip()[0] in "_" or text.strip()[0].isalnum()
                assert text[0] == " " or not before[-1].isalnum()
    texts = {tokenizer.decode([token]) for token in rows[:, 1:][kinds["first"]]}
    assert {"def", " return"} <= texts


def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    words = ["language_models.py", *TINY.split(), "--out", str(folder / "out"), *more]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(study, "run_seeds", in_this_process)
    script.main()


def use_little_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for file in sorted(files, key=lambda file: file.stat().st_size)[20:60]:
        shutil.copy(file, folder)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    monkeypatch.setattr(script, "topics", dict(list(script.topics.items())[:20]))


def in_this_process(
    replicate: Any, args: argparse.Namespace, seeds: Iterable[int]
) -> Iterator[tuple[int, Any]]:
    for seed in seeds:
        yield seed, replicate(args, seed)


def few_settings(args: argparse.Namespace) -> dict[script.Setting, tuple[str, ...]]:
    """Every teacher and kind of mistake, and every list of losses, at least once."""
    good = script.Setting("good", "none", 0.0, 0.5, 64)
    return {
        good: script.METHODS[1:],
        good._replace(k=args.vocabulary): ("KD", "WSL"),
        good._replace(mistakes="exchanged", share=0.2): ("KD", "WSL"),
        good._replace(mistakes="exchanged", share=0.2, hard_weight=1.0): ("KD", "WSL", "balanced"),
        good._replace(teacher="weak", mistakes="shifted", share=0.2): ("WSL",),
        good._replace(teacher="other text"): script.METHODS[1:],
    }


def test_a_seed_trains_54_students() -> None:
    chosen = script.settings(argparse.Namespace(vocabulary=512))
    assert Counter(method for methods in chosen.values() for method in methods) == {
        "KD": 14,
        "WSL": 14,
        "uniform": 7,
        "masked": 7,
        "balanced": 11,
    }
    teachers = [setting.teacher for setting in chosen]
    assert teachers == sorted(teachers, key=["good", "weak", "other text"].index)


def test_a_run_continues_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_little_text(tmp_path / "library", monkeypatch)
    monkeypatch.setattr(script, "settings", few_settings)
    # The figure has lines for settings that are not trained here.
    monkeypatch.setattr(script, "save_figure", lambda path, summary, classes: None)
    tiny(tmp_path, monkeypatch)
    table = tmp_path / "out" / "language_models.csv"
    rows = list(csv.DictReader(table.open(newline="")))
    assert Counter(row["seed"] for row in rows) == {"0": 19, "1": 19}
    assert all(4 < float(row["bits"]) < 9 for row in rows)
    for row in rows:
        assert (row["weight"] == "") == (row["method"] == "CE")
        assert (row["weight_misaligned"] == "") == (row["share"] in ("", "0"))
        assert row["method"] == "CE" or 0 < float(row["weight"]) < 1
    printed = capsys.readouterr().out
    assert "| good, 20 % exchanged, hard_weight 1 |" in printed
    assert "| good, all classes |" in printed

    # Seed 1 is missing after a kill. Seed 0 stays as it is.
    text = table.read_text()
    lines = [line for line in text.splitlines(True) if not line.startswith("1,")]
    table.write_text("".join(lines).replace(f"CE,{rows[0]['bits']},", "CE,12.34,", 1))
    tiny(tmp_path, monkeypatch)
    assert list(csv.DictReader(table.open(newline=""))) == [{**rows[0], "bits": "12.34"}, *rows[1:]]
    with pytest.raises(ValueError, match="choose another --out"):
        tiny(tmp_path, monkeypatch, "--alpha", "2")
    with pytest.raises(ValueError, match="--rows must be in"):
        tiny(tmp_path / "more", monkeypatch, "--rows", "10000000")


def test_the_report_computes_differences_within_a_seed(tmp_path: Path) -> None:
    """WSL is 0.1 or 0.3 bits below KD in two seeds, and its weights are 0.7."""
    rows = []
    args = argparse.Namespace(vocabulary=512)
    measured = dict.fromkeys(script.MEASURED, 0.7) | {"weight_misaligned": None}
    for seed, gain in ((0, 0.1), (1, 0.3)):
        bits = dict.fromkeys(script.METHODS, 3.0 + seed) | {"WSL": 3.0 + seed - gain}
        ce = {"seed": seed, **script.Setting()._asdict(), "method": "CE", "bits": 4.0 + seed}
        rows.append(ce | dict.fromkeys(script.MEASURED))
        for setting, methods in script.settings(args).items():
            extra = 0.5 if setting.k == 8 else 0.0
            for method in methods:
                key = {"seed": seed, **setting._asdict(), "method": method}
                rows.append(key | {"bits": bits[method] + extra} | measured)
    study.write_table(tmp_path / "language_models.csv", rows)
    script.report(tmp_path, {"vocabulary": 512})
    assert (tmp_path / "language_models.png").read_bytes().startswith(b"\x89PNG")
    summary = study.read_table(tmp_path / "language_models_summary.csv")
    assert len(summary) == len(script.settings(args))
    for row in summary:
        assert row["WSL - KD"] == pytest.approx(-0.2)
        assert row["WSL - KD half"] == pytest.approx(12.706 * 0.1, rel=1e-3)
        assert row["KD - CE"] == pytest.approx(-0.5 if row["k"] == 8 else -1.0)
        assert row["weight"] == pytest.approx(0.7)
        assert row["weight_misaligned"] is None
        assert (row["masked - KD"] is None) == (row["masked"] is None)
    (eight,) = (row for row in summary if row["k"] == 8)
    assert eight["WSL - all"] == pytest.approx(0.5)


def test_the_page_prints_what_the_tables_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = (STUDY / "STUDY.md").read_text(), STUDY / "results" / "language-models"
    shutil.copy(results / "language_models.csv", tmp_path)
    described = json.loads((results / "language_models.json").read_text())
    script.report(tmp_path, described)
    summary = (results / "language_models_summary.csv").read_text()
    assert (tmp_path / "language_models_summary.csv").read_text() == summary
    printed = capsys.readouterr().out
    header = r"^\| (?:teacher \| (?:teacher's bits|KD - CE|all tokens)|k) \|"
    tables = re.findall(rf"{header}.*?^\n", page, re.MULTILINE | re.DOTALL)
    assert len(tables) == 4
    assert all(table in printed for table in tables)
    section = page.partition("## Language models")[2].partition("\n## ")[0]
    intervals = re.findall(r"[+-]?\d\.\d{3} \+- \d\.\d{3}", section)
    assert all(interval.lstrip("+-") in printed for interval in intervals)
    assert f"{described['seeds']} seeds" in section
    assert described["device"] in section
