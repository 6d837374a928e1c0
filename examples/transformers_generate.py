"""A model of transformers with attention by attn-dispatch: `generate`, and the picks.

    python examples/transformers_generate.py [DIRECTORY]

DIRECTORY holds a decoder and its tokenizer, as `save_pretrained` writes them. Without one, a small
Gemma 2 with random weights generates token ids. Prompts of different lengths are padded on the
left. The tokens are compared with those of eager attention.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from attn_dispatch.integrations.transformers import attention_layers, enable

PROMPTS = ["The capital of France is", "Attention is", "One, two, three, four,"]


def load() -> tuple[Any, dict[str, torch.Tensor], Any]:
    """The model, its inputs, and its tokenizer if it has one."""
    if len(sys.argv) > 1:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model.eval(), dict(tokenizer(PROMPTS, return_tensors="pt", padding=True)), tokenizer
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=8,
        attn_logit_softcapping=2.0, pad_token_id=0, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    mask = torch.tensor([[0] * (12 - n) + [1] * n for n in (12, 5, 9)])
    return model.eval(), {"input_ids": torch.randint(3, 100, (3, 12)), "attention_mask": mask}, None


def main() -> None:
    """Generate with eager attention and with attn-dispatch, and print the picks."""
    model, inputs, tokenizer = load()
    settings = {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(**inputs, **settings)

    enable(model)
    tokens = model.generate(**inputs, **settings)
    for row in tokens:
        new = row[inputs["input_ids"].shape[1] :]
        print(new.tolist() if tokenizer is None else tokenizer.decode(new))
    print("same tokens as eager:", torch.equal(tokens, expected))

    picks: dict[str, list[str]] = {}
    for name, layers in attention_layers(model).items():
        for layer in layers:
            for phase, selection in layer.selections.items():
                picks.setdefault(f"{layer.spec.kind}, {phase}: {selection.name}", []).append(name)
    for pick, names in picks.items():
        print(f"{pick}, {len(names)} layers")


if __name__ == "__main__":
    main()
