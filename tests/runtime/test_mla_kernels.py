"""MLAAttention over the absorbed kernels, which run in Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import DeviceMatch, MLAAttention, MLADims, bind_kv_caches, forward_context
from support.mla_cases import MLAStep
from support.selection import registered

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.triton.mla import TritonMLABackend
from attn_dispatch.interface.capability import Capabilities

DIMS = MLADims(kv_lora_rank=64, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8)


class Interpreted(TritonMLABackend):
    name = "INTERPRETED_MLA"
    capabilities = Capabilities(
        devices=(DeviceMatch(vendor="cpu"),), **TritonMLABackend.capabilities.fields
    )


@pytest.mark.parametrize("prefill", ["absorbed", "expanded"])
def test_a_mixed_batch_agrees_with_float64(prefill):
    """Decodes, drafts, a prompt and a chunk; the latents are written once, by the backend."""
    lens = (1, 4, 20, 0, 3), (70, 33, 20, 9, 40)
    step = MLAStep(*lens, padding=2, dims=DIMS, dtype=torch.float32, block_size=16)
    with registered(Interpreted), torch.inference_mode():
        layer = MLAAttention(
            step.heads, DIMS, step.weight, step.scale, prefix="layer", dtype=torch.float32,
            device="cpu", prefill=prefill, backend="INTERPRETED_MLA", returns_lse=True,
        )  # fmt: skip
        bind_kv_caches([layer], {"layer": step.cache})
        with forward_context(step.batch):
            output, lse = layer(step.query, step.latents, step.rotated)
        expected, expected_lse = step.expected()
    step.check(output, expected)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert (layer.prefill_selection is not None) is (prefill == "expanded")
