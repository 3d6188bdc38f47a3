"""The code of examples/README.md for Hugging Face causal models, and the loss that it equals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weighted_soft_labels import wsl_loss

transformers = pytest.importorskip(
    "transformers", reason="pip install weighted-soft-labels[frameworks]"
)

PAGE = (Path(__file__).parents[1] / "examples" / "README.md").read_text()
README = PAGE.partition("## Causal language models")[2]
(BLOCK,) = re.findall(r"```python\n(.*?linear_wsl_loss.*?)```", README, re.DOTALL)
# The options that change the logits have values that show in the loss.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "GPT2": {},
    "Gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8},
    "Granite": {"logits_scaling": 0.25},
    "Cohere": {"logit_scale": 3.0},
    "OPT": {"word_embed_proj_dim": 8},
}
pytestmark = pytest.mark.usefixtures("one_thread")


def build(family: str, width: int, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **({"ffn_dim": width} if family == "OPT" else {}),
        **({} if family in ("GPT2", "OPT") else {"intermediate_size": width}),
        **({} if family in ("GPT2", "OPT") else {"num_key_value_heads": 2}),
        **options,
    )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"):  # to compare two passes
        setattr(config, name, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    return model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    input_ids = torch.randint(1, 50, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100  # the prompt
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_models_as_the_readme_has_it(family: str, batch: dict[str, Tensor]) -> None:
    student, teacher = (build(family, width, **FAMILIES[family]) for width in (16, 32))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        taught = teacher.eval()(**inputs).logits[:, :-1]
    logits = student(**inputs).logits[:, :-1]
    target = batch["labels"][:, 1:]
    expected = wsl_loss(logits.transpose(1, 2), taught.transpose(1, 2), target)
    expected.backward()
    gradients = {
        name: x.grad.clone() for name, x in student.named_parameters() if x.grad is not None
    }
    assert len(gradients) > 5
    student.zero_grad()

    namespace = {"student": student, "teacher": teacher, "batch": batch}
    exec(BLOCK, namespace)
    torch.testing.assert_close(namespace["loss"], expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)
    assert all(x.grad is None for x in teacher.parameters())


@pytest.mark.parametrize(
    ("family", "option", "other"),
    [
        ("Gemma2", "final_logit_softcapping", None),
        ("Granite", "logits_scaling", 1.0),
        ("Cohere", "logit_scale", 1.0),
    ],
)
def test_the_options_of_a_family_change_its_logits(
    family: str, option: str, other: float | None, batch: dict[str, Tensor]
) -> None:
    """Otherwise a recipe that ignores them would pass."""
    model = build(family, 16, **FAMILIES[family])
    assert hasattr(model.config, option)
    same = build(family, 16, **{**FAMILIES[family], option: other})
    same.load_state_dict(model.state_dict())
    changed = model(batch["input_ids"]).logits - same(batch["input_ids"]).logits
    assert changed.abs().max() > 0.5


def test_the_check_finds_a_family_that_multiplies_by_the_divisor(
    batch: dict[str, Tensor],
) -> None:
    teacher = build("Llama", 16)
    student = build("HyperCLOVAX", 16, logits_scaling=2.0)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        exec(BLOCK, {"student": student, "teacher": teacher, "batch": batch})
