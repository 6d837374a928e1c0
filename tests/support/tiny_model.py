"""A folder with a small random Llama and a tokenizer of bytes, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["TEMPLATE", "make_tokenizer", "save_tiny_model"]

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A token for each byte, and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: index + 1 for index, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.chat_template = template
    return made


def save_tiny_model(folder: Path, **changes: Any) -> Path:
    """Save a Llama of two layers, and the tokenizer, into the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(fields | changes)))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
