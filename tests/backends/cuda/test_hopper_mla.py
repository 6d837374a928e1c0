"""HOPPER_MLA: what its kernel computes, and its room for parts, on any machine.

Its numbers are checked on a GPU, in test_mla_packages_gpu.py.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from attn_dispatch import AttentionBatch, InvalidInputError, MLADims, resolve
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from support.mla_cases import MLAStep
from support.selection import mla_layer

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.cuda.hopper import mla
from attn_dispatch.backends.cuda.hopper.mla import HopperMLABackend, HopperMLAMetadata

DIMS = MLADims(kv_lora_rank=512, qk_nope_head_dim=8, qk_rope_head_dim=64, v_head_dim=8)
OTHER = MLADims(kv_lora_rank=256, qk_nope_head_dim=8, qk_rope_head_dim=32, v_head_dim=8)
HOPPER = KNOWN_DEVICES["sm90"].with_libraries(Library("triton", "3.6.0"))


def step_of(**fields):
    fields = {"dims": DIMS, "dtype": torch.bfloat16, "block_size": 16} | fields
    return MLAStep((1, 4, 20), (70, 33, 20), backend=HopperMLABackend, **fields)


#: Changes to a layer, and why the portable kernel computes it; "" if the one for Hopper does.
LAYERS = {
    "plain": ({}, ""),
    "pages of 64": ({"block_size": 64}, ""),
    "float16": ({"dtype": torch.float16}, ""),
    "window, soft cap, lse": (
        {"sliding_window": 9, "logits_soft_cap": 5.0, "returns_lse": True},
        "",
    ),
    "other latents": ({"dims": OTHER}, "latents have 512 + 64 elements, and these have 256 + 32"),
    "float32": ({"dtype": torch.float32}, "the layer is float32 and the cache float32"),
    "fp8": ({"kv_cache_dtype": "fp8_e4m3"}, "the layer is bfloat16 and the cache float8_e4m3fn"),
    "batch invariant": ({"batch_invariant": True}, "it has no batch_invariant"),
    "key positions": ({"key_positions": True}, "it has no key_positions"),
    "pages of 8": ({"block_size": 8}, "blocks of a multiple of 16 tokens, and these have 8"),
}


@pytest.mark.parametrize("which", LAYERS)
def test_a_note_says_why_the_portable_kernel_computes_a_layer(which):
    fields, why = LAYERS[which]
    spec = step_of(**{k: v for k, v in fields.items() if k != "key_positions"}).spec
    spec = spec.replace(key_positions="key_positions" in fields)
    notes = HopperMLABackend.kernel_notes(spec, HOPPER, None)
    assert len(notes) == bool(why)
    assert all(why in note for note in notes)


@pytest.mark.parametrize("which", [name for name in LAYERS if name != "key positions"])
def test_the_plan_is_for_the_kernel_that_computes_the_layer(which):
    fields, why = LAYERS[which]
    step = step_of(**fields)
    metadata = step.builder().build(step.batch)
    assert isinstance(metadata, HopperMLAMetadata) is not bool(why)
    assert (metadata.decode is None) is not bool(why)


def test_a_plan_has_room_for_two_parts_of_each_program():
    step = step_of()
    builder = step.builder()
    builder.launches = dataclasses.replace(builder.launches, num_sms=132)
    room = builder.build(step.batch).room
    assert room.out.numel() == 2 * 132 * 64 * 512
    assert room.lse.numel() == 2 * 132 * 2 * 64
    assert room.counters.numel() == 4 * 132
    assert not room.counters.any()


@pytest.mark.parametrize(
    ("heads", "query_len", "requests", "is_portable"),
    [
        (16, 1, 32, True),
        (16, 1, 31, False),
        (17, 1, 32, False),
        (16, 2, 32, False),
        (4, 4, 40, True),
    ],
)
def test_few_rows_of_many_requests_run_on_the_portable_kernel(
    heads, query_len, requests, is_portable
):
    lens = (query_len,) * requests, (20,) * requests
    step = MLAStep(
        *lens, backend=HopperMLABackend, dims=DIMS, heads=heads, dtype=torch.bfloat16, block_size=16
    )
    with mock.patch.object(mla, "detect_device", return_value=HOPPER):
        builder = HopperMLABackend.make_builder(step.spec, torch.device("cpu"))
    metadata = builder.build(step.batch)
    assert (getattr(metadata, "room", None) is None) == is_portable


@pytest.mark.parametrize(
    ("heads", "query_lens", "team"),
    [(16, (1,) * 8, 1), (64, (1,) * 8, 1), (65, (1,) * 8, 2), (128, (2,) * 8, 4), (128, (1, 2), 2),
     (128, (16,) * 99, 32), (128, (100,), 132)],
)  # fmt: skip
def test_a_team_has_as_many_programs_as_requests_have_row_tiles(heads, query_lens, team):
    batch = AttentionBatch.create(query_lens, query_lens)
    assert mla._team(batch, heads, 132) == team


def test_a_misaligned_cache_is_rejected_before_anything_is_written():
    step = step_of()
    memory = torch.zeros(step.cache.numel() + 1, dtype=torch.bfloat16)
    step.cache = memory[1:].view(step.cache.shape)
    with torch.inference_mode(), pytest.raises(InvalidInputError, match="multiple of 16 bytes"):
        step.run()
    assert not memory.any()


def test_it_is_picked_on_hopper_without_other_packages():
    spec = mla_layer(dtype=torch.bfloat16, block_size=64)
    assert resolve(spec, HOPPER).name == "HOPPER_MLA"
    ampere = KNOWN_DEVICES["sm80"].with_libraries(Library("triton", "3.6.0"))
    assert resolve(spec, ampere).name == "TRITON_MLA"
