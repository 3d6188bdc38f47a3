"""The code of examples/README.md for Hugging Face causal models, and the loss that it equals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from weighted_soft_labels import reference

transformers = pytest.importorskip(
    "transformers", reason="pip install weighted-soft-labels[frameworks]"
)

PAGE = (Path(__file__).parents[1] / "examples" / "README.md").read_text()
README = PAGE.partition("## Causal language models")[2]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_causal_models_as_the_readme_has_it() -> None:
    torch.manual_seed(0)
    common = {
        "vocab_size": 50,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    student, teacher = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **common, hidden_size=width, intermediate_size=width, tie_word_embeddings=tied
            )
        )
        for width, tied in ((16, True), (32, False))
    )
    input_ids = torch.randint(50, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100  # the prompt
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    with torch.no_grad():
        taught = teacher(**inputs).logits[:, :-1]
    logits = student(**inputs).logits[:, :-1]
    expected = reference.wsl_loss(logits.transpose(1, 2), taught.transpose(1, 2), labels[:, 1:])
    expected.backward()
    gradients = {name: x.grad.clone() for name, x in student.named_parameters()}
    student.zero_grad()

    (block,) = re.findall(r"```python\n(.*?linear_wsl_loss.*?)```", README, re.DOTALL)
    code = [
        line for line in block.splitlines() if line and not line.startswith(("from ", "import "))
    ]
    assert len(code) <= 10
    namespace = {"student": student, "teacher": teacher, "batch": batch}
    exec(block, namespace)
    torch.testing.assert_close(namespace["loss"], expected)
    for name, x in student.named_parameters():
        torch.testing.assert_close(x.grad, gradients[name], rtol=1e-4, atol=1e-6)
    assert all(x.grad is None for x in teacher.parameters())
