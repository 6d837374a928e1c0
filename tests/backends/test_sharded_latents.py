"""Attention over the parts of a sharded latent cache, merged, equals attention over the whole.

Each part is one of several GPUs' latents: every `step`-th one of a request. The whole is computed
without key positions, in float64.
"""

from __future__ import annotations

import math

import pytest
import torch

from attn_dispatch import MLADims, merge_states
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.key_positions import KeyPositions
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from support.cases import as_stored
from support.mla_cases import MLAStep
from support.triton_cases import DEVICE

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend
from attn_dispatch.backends.triton.mla import TritonMLABackend

DIMS = MLADims(kv_lora_rank=64, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8)
#: A decode, drafts to verify, a prompt, a chunk, and a request so short that some parts are empty.
QUERY_LENS, SEQ_LENS = (1, 4, 13, 8, 1), (39, 21, 13, 16, 1)
FIELDS = {
    "plain": {},
    "window": {"sliding_window": 6},
    "window of one": {"sliding_window": 1},
    "not causal": {"causal": False},
    "soft cap": {"logits_soft_cap": 1.5},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "window, not causal": {"causal": False, "sliding_window": 5},
}


class Part(MLAStep):
    """The latents at positions index, index + parts and so on, of a step of the same seed."""

    def __init__(self, index, parts, **fields):
        super().__init__(QUERY_LENS, SEQ_LENS, **fields)
        self.spec = self.spec.replace(key_positions=True, returns_lse=True)
        positions = KeyPositions.create(SEQ_LENS, offset=index, step=parts)
        local, size = positions.local_seq_lens(), self.spec.block_size
        blocks = [-(-n // size) for n in local]
        table = torch.full((len(local), max(1, *blocks)), -1, dtype=torch.int32)
        dtype = kv_cache_torch_dtype(self.spec.kv_cache_dtype, self.spec.dtype)
        cache = torch.full((sum(blocks) + 1, size, self.width), math.nan).to(dtype)
        slots, used = [], 0
        for request, (query_len, seq_len) in enumerate(zip(QUERY_LENS, SEQ_LENS, strict=True)):
            table[request, : blocks[request]] = torch.arange(used, used + blocks[request])
            used += blocks[request]
            for position in range(seq_len):
                key = position // parts
                is_here = position % parts == index
                slot = int(table[request, key // size]) * size + key % size if is_here else -1
                if position >= seq_len - query_len:
                    slots.append(slot)
                elif is_here:
                    stored = as_stored(self.meant[request][position], torch.tensor(0.02), dtype)
                    cache.view(torch.uint8).view(-1, self.width * dtype.itemsize)[slot] = (
                        stored.view(torch.uint8)
                    )
        self.cache = cache.to(self.device)
        self.batch = AttentionBatch.create(
            QUERY_LENS,
            local,
            block_table=table,
            block_size=size,
            slot_mapping=torch.tensor(slots),
            key_positions=positions,
            device=self.device,
        )

    def impl(self):
        return super().impl(key_positions=True)


def fields_of(backend, **fields):
    """A small layer for the backend, in the most precise dtype that it has."""
    if backend is TritonMLABackend:
        fields |= {"dtype": torch.float32, "block_size": 16, "device": DEVICE, "dims": DIMS}
    return {"backend": backend, **fields}


def check_merged(backend, parts, **fields):
    fields = fields_of(backend, **fields)
    steps = [Part(index, parts, **fields) for index in range(parts)]
    merged, lse = merge_states(*zip(*(step.run() for step in steps), strict=True))
    wanted, wanted_lse = steps[0].expected()
    largest = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(merged.double() / largest, wanted / largest, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 3, 17])
@pytest.mark.parametrize("name", FIELDS)
def test_parts_of_reference_merge_to_the_whole(name, parts):
    check_merged(ReferenceMLABackend, parts, **FIELDS[name])


@pytest.mark.parametrize("name", FIELDS)
def test_parts_of_triton_merge_to_the_whole(name):
    check_merged(TritonMLABackend, 2 + list(FIELDS).index(name) % 2, **FIELDS[name])


def test_parts_of_a_batch_invariant_layer_merge_to_the_whole():
    check_merged(TritonMLABackend, 3, batch_invariant=True)


@pytest.mark.parametrize("backend", [ReferenceMLABackend, TritonMLABackend])
def test_a_row_without_a_key_here_is_0(backend):
    step = Part(1, 3, **fields_of(backend, sliding_window=1))  # a query sees its own key only
    output, lse = step.run()
    positions = torch.cat(
        [torch.arange(n - q, n) for q, n in zip(QUERY_LENS, SEQ_LENS, strict=True)]
    )
    is_elsewhere = positions % 3 != 1
    assert not output.cpu()[is_elsewhere].any()
    assert bool((lse.cpu()[is_elsewhere] == -torch.inf).all())
    assert bool(lse.cpu()[~is_elsewhere].isfinite().all())


@pytest.mark.parametrize("backend", [ReferenceMLABackend, TritonMLABackend])
def test_positions_that_are_dropped_would_change_the_result(backend):
    """The check of the other tests: the same keys at other positions give another result."""
    here = Part(1, 3, **fields_of(backend, sliding_window=6)).run()[0]
    step = Part(1, 3, **fields_of(backend, sliding_window=6))
    moved = KeyPositions.create(SEQ_LENS, offset=0, step=3, device=step.device)
    step.batch.__dict__["key_positions"] = moved
    assert not torch.allclose(step.run()[0].nan_to_num(), here.nan_to_num())
