"""enable() on a GPU: the tokens of transformers' eager attention."""

from __future__ import annotations

import copy
import os

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from attn_dispatch.integrations.transformers import enable
from support.parity_models import build, left_padded_prompts

#: For a look at these tests on a CPU.
DEVICE = os.environ.get("ENGINE_TEST_DEVICE", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]

#: Relative to the largest logit; sums are ordered differently.
TOLERANCE = 2e-5


def run(model):
    """Logits of padded prompts, and greedy tokens with a cache."""
    tokens, mask = (each.to(DEVICE) for each in left_padded_prompts())
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits[mask.bool()]
        ids = model.generate(
            tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=1
        )
    return logits, ids


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
def test_logits_and_tokens_are_those_of_eager_attention(model_type):
    model = copy.deepcopy(build(model_type)).to(DEVICE)
    model.set_attn_implementation("eager")
    expected, expected_ids = run(model)
    enable(model)
    logits, ids = run(model)
    assert torch.equal(ids, expected_ids)
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_bfloat16_is_close():
    model = copy.deepcopy(build("llama", num_attention_heads=8, head_dim=64))
    model = model.to(DEVICE, torch.bfloat16)
    model.set_attn_implementation("eager")
    expected, _ = run(model)
    enable(model)
    logits, _ = run(model)
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
