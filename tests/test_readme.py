"""The pages run as printed, and their tables are those of the data and of the code."""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from weighted_soft_labels import wsl_loss
from weighted_soft_labels.cached import compress

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "study")]

README, EXAMPLES, BENCHMARKS = "README.md", "examples/README.md", "benchmarks/README.md"
STUDY = "examples/study/STUDY.md"
RESULTS = ROOT / "benchmarks" / "results"
FENCED = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize(("name", "least"), [(README, 3), (EXAMPLES, 6), (BENCHMARKS, 0)])
def test_every_python_block_runs_and_prints_what_it_says(
    name: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)  # a block writes files
    namespace: dict[str, Any] = {}
    blocks = [block for block in FENCED.findall(page(name)) if "batch[" not in block]
    assert len(blocks) >= least
    for block in blocks:
        namespace.pop("loss", None)
        printed = StringIO()
        with redirect_stdout(printed):
            exec(block, namespace)
        numbers = re.findall(r"^ *print\(.*\)  # ([\d.]+)$", block, re.MULTILINE)
        assert [line for line in printed.getvalue().split() if line[:1].isdigit()] == numbers
        loss = namespace.get("loss")
        if loss is not None:
            assert loss.isfinite()
            if "backward()" not in block:
                loss.backward(retain_graph=True)


def test_readme_is_short() -> None:
    assert len(page(README).splitlines()) <= 150


def test_signature_in_the_readme_is_the_function() -> None:
    printed = re.search(r"^wsl_loss\((.*?)\) -> Tensor", page(README), re.MULTILINE | re.DOTALL)
    assert printed is not None
    parameters = [
        re.sub(r": '[^']*'| ", "", str(p)) for p in inspect.signature(wsl_loss).parameters.values()
    ]
    parameters.insert(3, "*")
    assert re.sub(r"\s", "", printed[1]).replace('"', "'").split(",") == parameters


def test_argument_table_names_every_argument() -> None:
    table = page(README).partition("| argument |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\w, ]+) \|", table, re.MULTILINE)
    named = [name for row in rows for name in row.split(", ")]
    arguments = [name for name in inspect.signature(wsl_loss).parameters if "logits" not in name]
    assert named == ["logits", *arguments]


def test_signatures_in_the_examples_are_the_functions() -> None:
    from weighted_soft_labels import analysis, linear, parallel

    options = inspect.signature(wsl_loss).parameters
    signatures = re.findall(r"^(\w+)\((.*?)\)$", page(EXAMPLES), re.MULTILINE | re.DOTALL)
    assert len(signatures) == 5
    for name, printed in signatures:
        module = next(x for x in (analysis, linear, parallel) if hasattr(x, name))
        parameters = inspect.signature(getattr(module, name)).parameters
        printed = printed.replace("<options of wsl_loss>", "")
        defaults = dict(re.findall(r"(\w+)=([^,]+)", printed))
        for option, value in defaults.items():
            assert value.replace('"', "'") == repr(parameters[option].default), (name, option)
        named = set(re.findall(r"\w+", re.sub(r"=[^,]+", "", printed)))
        assert parameters.keys() - options.keys() <= named <= parameters.keys(), name


KD_ROWS = re.findall(r"^\| `(.*ce .*kl)` \| `(.*?)` \|.*\|$", page(README), re.MULTILINE)


@pytest.mark.parametrize(("formula", "arguments"), KD_ROWS)
def test_arguments_for_a_kd_loss_give_its_gradient(formula: str, arguments: str) -> None:
    """A teacher that is sure of the label makes every weight exactly 1."""
    torch.manual_seed(0)
    T, classes = 4.0, 10
    student = torch.randn(8, classes, dtype=torch.float64, requires_grad=True)
    target = torch.randint(classes, (8,))
    teacher = torch.randn(8, classes).double() + 30 * F.one_hot(target, classes)
    log_p, q = F.log_softmax(student / T, 1), F.softmax(teacher / T, 1)
    kl = F.kl_div(log_p, q, reduction="batchmean")
    names = {"ce": F.cross_entropy(student, target), "kl": kl, "T": T, "h": 0.3, "a": 0.6}
    (expected,) = torch.autograd.grad(eval(formula, names), student)

    options = eval(f"dict({arguments})", names)
    loss = wsl_loss(student, teacher, target, temperature=T, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    entropy = -(q * q.log()).sum(1).mean()
    jump = options["alpha"] * T**2 * entropy  # as the README says why the value jumps
    torch.testing.assert_close(loss, eval(formula, names) + jump, rtol=1e-9, atol=1e-12)


def test_kd_losses_are_found() -> None:
    assert len(KD_ROWS) == 4


def test_speed_tables_are_the_benchmark_s_last_result() -> None:
    plot = pytest.importorskip("plot", reason="pip install weighted-soft-labels[examples]")
    published = [path for path in RESULTS.glob("*.csv") if path.stem in ("cpu", "cuda")]
    assert published
    for path in published:
        rows = plot.read(path)
        for dtype in {row["dtype"] for row in rows}:
            assert plot.table([row for row in rows if row["dtype"] == dtype]) in page(BENCHMARKS)
    for name in ("cpu", "cpu_linear", "cpu_cached", "cpu_training_step"):
        row = plot.read(RESULTS / f"{name}.csv")[0]
        hardware = f"{row['device']}, {row['threads']} threads, torch {row['torch']}"
        assert f"[{name}.csv](results/{name}.csv): {hardware}" in " ".join(page(BENCHMARKS).split())
    rows, linear = (plot.read(RESULTS / f"{name}.csv") for name in ("cpu", "cpu_linear"))
    assert plot.linear_table(linear) in page(BENCHMARKS)
    assert plot.cached_table(plot.read(RESULTS / "cpu_cached.csv")) in page(BENCHMARKS)
    assert plot.summary(rows, linear) in page(README)


def test_bytes_of_a_stored_teacher_are_those_of_its_tensors() -> None:
    logits, target = torch.randn(2, 1000), torch.tensor([0, 1])
    rows = re.findall(r"^\| cache, k = (\d+) \| (\d+) \|", page(BENCHMARKS), re.MULTILINE)
    assert [k for k, _ in rows] == ["16", "64", "128"]
    for k, size in rows:
        cached = compress(logits, target, int(k), temperature=1.0)
        assert sum(x.numel() * x.element_size() for x in cached) == 2 * int(size)


def test_intervals_in_the_readme_are_those_of_the_study() -> None:
    intervals = re.findall(r"[+-]?\d+\.\d\d \+- \d\.\d\d", page(README))
    assert len(intervals) >= 6
    assert all(interval in page(STUDY) for interval in intervals)


def test_differences_by_temperature_and_alpha_are_those_of_the_study() -> None:
    study = pytest.importorskip("study", reason="pip install weighted-soft-labels[examples]")
    lines = []
    for images, share in (("good", 0), ("20 % misaligned", 0.2)):
        lines += [
            (f"{images}, T = 1", share, 1, 2.25),
            (f"{images}, T = 2", share, 2, 2.25),
            (f"{images}, alpha = 0.5", share, 4, 0.5),
        ]
    results = ROOT / "examples" / "study" / "results"
    tables = {
        size: study.read_table(results / dataset / "teacher_mistakes.csv")
        for dataset, size in (("fashion-mnist", 10000), ("digits", 450))
    }
    for name, share, temperature, alpha in lines:
        cells = []
        for size, rows in tables.items():
            mistakes = "random" if share else "none"
            fixed = {"teacher_images": size, "mistakes": mistakes, "share": share, "noise": 0}
            for method in ("KD", "WSL"):
                changed, base = (
                    study.column(rows, "accuracy", method=method, temperature=t, alpha=a, **fixed)
                    for t, a in ((temperature, alpha), (4, 2.25))
                )
                cells.append(study.show(changed - base, sign="+"))
        assert f"| {name} | {' | '.join(cells)} |\n" in page(STUDY)


def test_links_lead_to_files_and_headings() -> None:
    for name in (README, EXAMPLES, BENCHMARKS, STUDY):
        for link in re.findall(r"\]\(([^):]+)\)", page(name)):
            target, _, heading = link.partition("#")
            path = (ROOT / name).parent / target if target else ROOT / name
            assert path.exists(), (name, link)
            if heading:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                assert heading in {
                    re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
                }
