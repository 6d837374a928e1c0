"""MLAAttention against the attention of DeepSeek V2 and V3 in transformers, in float32.

transformers is an optional dependency: `pip install 'attn-dispatch[transformers]'`.
"""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import AttentionBatch, MLAAttention, MLADims, bind_kv_caches, forward_context

transformers = pytest.importorskip("transformers", minversion="5", reason="no transformers")

DIMS = MLADims(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
HEADS, HIDDEN, BLOCK = 4, 48, 4


class Model:
    """transformers' module with random weights, and ours over the same ones."""

    def __init__(self, version, q_lora_rank, prefill):
        sizes = {name: getattr(DIMS, name) for name in DIMS.__dataclass_fields__}
        self.version = version
        if version == 2:
            from transformers.models.deepseek_v2 import modeling_deepseek_v2 as module

            config_cls, attention_cls = module.DeepseekV2Config, module.DeepseekV2Attention
            rotary_cls = module.DeepseekV2RotaryEmbedding
        else:
            from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

            config_cls, attention_cls = module.DeepseekV3Config, module.DeepseekV3Attention
            rotary_cls = module.DeepseekV3RotaryEmbedding
        config = config_cls(
            hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=HEADS,
            q_lora_rank=q_lora_rank, head_dim=DIMS.qk_rope_head_dim, max_position_embeddings=256,
            num_hidden_layers=1, attn_implementation="eager", **sizes,
        )  # fmt: skip
        torch.manual_seed(version)
        self.theirs = attention_cls(config, 0).float().eval()
        for parameter in self.theirs.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.15)
        self.rotary = rotary_cls(config)
        low_rank = {name: getattr(self.theirs, name) for name in
                    ("q_a_proj", "q_a_layernorm", "q_b_proj")}  # fmt: skip
        self.ours = MLAAttention(
            HEADS, DIMS, self.theirs.kv_b_proj, self.theirs.scaling,
            q_proj=self.theirs.q_proj, **low_rank, inv_freq=self.rotary.inv_freq,
            prefix="attn", prefill=prefill, prefill_workspace_bytes=120_000, block_size=BLOCK,
            dtype=torch.float32, device="cpu",
        )  # fmt: skip

    def expected(self, hidden):
        """Theirs on one whole request, (tokens, HIDDEN)."""
        tokens = len(hidden)
        positions = torch.arange(tokens)[None]
        embeddings = self.rotary(hidden[None], positions)
        mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
        named = {"position_embeddings": embeddings, "attention_mask": mask}
        return self.theirs(hidden[None], **named)[0][0]

    def run(self, hidden, positions, batch):
        """Ours on the new tokens of a batch."""
        theirs = self.theirs
        latents, k_pe = theirs.kv_a_proj_with_mqa(hidden).split(
            [DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], -1
        )
        with forward_context(batch):
            output = self.ours(hidden, theirs.kv_a_layernorm(latents), k_pe, positions=positions)
        return theirs.o_proj(output)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefill", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("version", [2, 3])
@torch.no_grad()
def test_prefill_chunks_and_decodes_of_ragged_batches(version, q_lora_rank, prefill):
    """Each request is computed in other pieces; every step mixes prompts, chunks and decodes."""
    model = Model(version, q_lora_rank, prefill)
    lens = [23, 9, 31, 14]
    pieces = [[23], [5, 1, 1, 1, 1], [10, 12, 1, 8], [1, 6, 7]]
    hidden = [torch.randn(n, HIDDEN) for n in lens]
    expected = [model.expected(each) for each in hidden]
    blocks = -(-max(lens) // BLOCK)
    table = torch.randperm(len(lens) * blocks).view(len(lens), blocks)
    cache = torch.full((table.numel(), BLOCK, DIMS.kv_lora_rank + DIMS.qk_rope_head_dim), torch.nan)
    bind_kv_caches([model.ours], {"attn": cache})
    done = [0] * len(lens)
    largest = 0.0
    for step in range(5):
        running = [i for i, each in enumerate(pieces) if step < len(each)]
        query_lens = [pieces[i][step] for i in running]
        spans = [slice(done[i], done[i] + n) for i, n in zip(running, query_lens, strict=True)]
        batch = AttentionBatch.create(
            query_lens, [span.stop for span in spans], block_table=table[running], block_size=BLOCK
        )
        pairs = list(zip(running, spans, strict=True))
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        found = model.run(torch.cat([hidden[i][span] for i, span in pairs]), positions, batch)
        wanted = torch.cat([expected[i][span] for i, span in pairs])
        close(found, wanted)
        largest = max(largest, float(wanted.abs().max()))
        for i, span in pairs:
            done[i] = span.stop
    assert done == lens
    assert 0.1 < largest < 10  # 1e-6 says something
