"""The README's Python runs as printed, top to bottom."""

from __future__ import annotations

import csv
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
    parameters = [re.sub(r": '[^']*'| ", "", str(p)) for p in inspect.signature(wsl_loss).parameters.values()]
    parameters.insert(3, "*")
    assert re.sub(r"\s", "", printed[1]).replace('"', "'").split(",") == parameters


def test_speed_table_is_the_benchmark_s_last_result():
    with (ROOT / "benchmarks" / "results" / "cpu.csv").open() as file:
        rows = {(row["logits"], row["provider"]): row for row in csv.DictReader(file)}
    printed = re.findall(r"^\| (\d+x\d+) \((.*?)\) \|(.*)\|$", README, re.MULTILINE)
    assert len(printed) == len({logits for logits, _ in rows})
    for logits, use, cells in printed:
        official, cross_entropy, ours, faster, official_compiled, ours_compiled, faster_compiled = cells.split("|")
        for cell, provider in (
            (official, "official"),
            (cross_entropy, "cross_entropy"),
            (ours, "wsl_loss"),
            (official_compiled, "official, compiled"),
            (ours_compiled, "wsl_loss, compiled"),
        ):
            value, unit = cell.split()
            digits = len(value.partition(".")[2])
            measured = float(rows[logits, provider]["p50_us"]) / {"us": 1, "ms": 1000}[unit]
            assert value == f"{measured:.{digits}f}", (logits, provider)
            assert rows[logits, provider]["use"] == use
        assert faster.strip() == f"{float(rows[logits, 'wsl_loss']['speedup_over_official']):.1f}x"
        compiled = rows[logits, "wsl_loss, compiled"]["speedup_over_compiled_official"]
        assert faster_compiled.strip() == f"{float(compiled):.1f}x"
