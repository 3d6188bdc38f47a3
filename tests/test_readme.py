"""The README's Python runs as printed, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_python_block_runs():
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        namespace.pop("loss", None)
        exec(block, namespace)
        if "loss" in namespace:
            loss = namespace["loss"]
            assert isinstance(loss, torch.Tensor)
            assert loss.isfinite()
            if "loss.backward()" not in block:
                loss.backward()


def test_signature_in_the_readme_is_the_function():
    import inspect

    from weighted_soft_labels import wsl_loss

    printed = re.search(r"^wsl_loss\((.*?)\) -> Tensor", README, re.MULTILINE | re.DOTALL)
    assert printed is not None
    parameters = [
        re.sub(r": '[^']*'| ", "", str(p)) for p in inspect.signature(wsl_loss).parameters.values()
    ]
    parameters.insert(3, "*")
    assert re.sub(r"\s", "", printed[1]).replace('"', "'").split(",") == parameters


def test_speed_tables_are_the_benchmark_s_last_result(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import plot

    published = [
        path
        for path in (ROOT / "benchmarks" / "results").glob("*.csv")
        if path.stem in ("cpu", "cuda")
    ]
    assert published
    for path in published:
        rows = plot.read(path)
        for dtype in {row["dtype"] for row in rows}:
            assert plot.table([row for row in rows if row["dtype"] == dtype]) in README


def test_memory_of_large_vocabularies_is_the_benchmark_s_last_result(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import plot

    *rows, half = plot.read(ROOT / "benchmarks" / "results" / "cpu_linear.csv")
    cells = [
        f"| {float(row['peak_float32_logits']):.2f} | {float(row['p20_ms']) / 1000:.1f} s |"
        for row in rows
    ]
    section = README.partition("## Large vocabularies")[2].partition("```")[0]
    assert (
        f"({rows[0]['device']}, {rows[0]['threads']} threads;\ntorch {rows[0]['torch']};" in section
    )
    assert (
        f"In bfloat16 `linear_wsl_loss` needs as many bytes as {float(half['peak_float32_logits']):.2f} "
        in section
    )
    assert half["dtype"] == "bfloat16"
    assert cells == re.findall(r"\| [\d.]+ \| [\d.]+ s \|$", section, re.MULTILINE)
