"""Multi-head latent attention in a small decoder: a prompt in chunks, then decodes.

    python examples/mla_layer.py

The sizes are DeepSeek-V2-Lite's, with four heads. Prefills are expanded and go to a dense backend,
decodes go to a backend for latents, over one cache of latents. Each new row is compared with one
call over the whole sequence in float64.
"""

from __future__ import annotations

import torch
from torch import nn

from attn_dispatch import (
    AttentionBatch,
    MLAAttention,
    MLADims,
    attention,
    bind_kv_caches,
    forward_context,
    plan_kv_cache,
)

DIMS = MLADims(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
HEADS, HIDDEN, BLOCK_SIZE, LENGTH = 4, 256, 64, 700


class Block(nn.Module):
    """The attention block of DeepSeek-V2, without its norms."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        query_size = DIMS.qk_nope_head_dim + DIMS.qk_rope_head_dim
        expanded_size = DIMS.qk_nope_head_dim + DIMS.v_head_dim
        sizes = {"bias": False, "device": device}
        self.q_proj = nn.Linear(HIDDEN, HEADS * query_size, **sizes)
        self.kv_a_proj = nn.Linear(HIDDEN, DIMS.kv_lora_rank + DIMS.qk_rope_head_dim, **sizes)
        self.kv_b_proj = nn.Linear(DIMS.kv_lora_rank, HEADS * expanded_size, **sizes)
        exponents = torch.arange(0, DIMS.qk_rope_head_dim, 2, device=device) / DIMS.qk_rope_head_dim
        self.inv_freq = 10000.0**-exponents
        self.attention = MLAAttention(
            HEADS,
            DIMS,
            self.kv_b_proj,
            q_proj=self.q_proj,
            inv_freq=self.inv_freq,
            prefix="layers.0",
            prefill_workspace_bytes=4 * 2**20,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=device,
        )

    def latents(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents and the shared part of the keys, not rotated."""
        latents, k_pe = self.kv_a_proj(hidden).split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], -1)
        return latents, k_pe

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(num_tokens, HEADS * v_head_dim); called inside of forward_context."""
        return self.attention(hidden, *self.latents(hidden), positions=positions)


def expected(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    """The whole sequence at once, in float64: keys and values of each head, then attention."""
    rope, positions = DIMS.qk_rope_head_dim, torch.arange(len(hidden), device=hidden.device)
    angles = positions[:, None].double() * block.inv_freq.double()
    turns = torch.polar(torch.ones_like(angles), angles)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    query = block.q_proj(hidden).double().unflatten(1, (HEADS, -1))
    latents, k_pe = (each.double() for each in block.latents(hidden))
    product = (latents @ block.kv_b_proj.weight.double().T).unflatten(1, (HEADS, -1))
    nope, value = product.split([DIMS.qk_nope_head_dim, DIMS.v_head_dim], -1)
    query = torch.cat([query[..., :-rope], rotated(query[..., -rope:])], -1)
    key = torch.cat([nope, rotated(k_pe[:, None]).expand(-1, HEADS, -1)], -1)
    return attention(query, key, value.contiguous(), backend="REFERENCE").flatten(1)


@torch.no_grad()
def main() -> None:
    """Run a prompt, two chunks and a decode."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    block = Block(device)
    plan = plan_kv_cache(block)
    bind_kv_caches(block, plan.allocate(LENGTH // BLOCK_SIZE + 1, device))
    print(block.attention.explain())
    print(f"bytes of a cached token: {plan.bytes_per_block // BLOCK_SIZE}")
    print(f"bytes of workspace: {plan.workspace_bytes}")

    hidden = torch.randn(LENGTH, HIDDEN, device=device)
    wanted = expected(block, hidden)
    table = torch.arange(LENGTH // BLOCK_SIZE + 1, device=device)[None]
    for what, start, end in (
        ("a prompt", 0, 300),
        ("a chunk", 300, 690),
        ("a small chunk", 690, 699),
        ("a decode", 699, 700),
    ):
        batch = AttentionBatch.create(
            [end - start], [end], block_table=table, block_size=BLOCK_SIZE, device=device
        )
        positions = torch.arange(start, end, device=device)
        with forward_context(batch):
            output = block(hidden[start:end], positions)
        error = float((output.double() - wanted[start:end]).abs().max())
        form = "absorbed" if block.attention.build_metadata(batch).expanded is None else "expanded"
        print(f"{what} of {end - start}, {form}: largest difference {error:.1e}")


if __name__ == "__main__":
    main()
