"""HOPPER_MLA on any machine: what its kernel computes, interpreted, and its room for parts.

On a GPU its numbers are checked in test_mla_packages_gpu.py.
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
from attn_dispatch.emulation.gluon.interpret import interpreted

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


#: Lengths of queries and of keys, and changes to a layer of 16 heads. Programs are four.
INTERPRETED = {
    "a chunk and decodes": ((1, 4, 20), (70, 33, 20), {"heads": 3}),
    "one in parts": ((1,), (900,), {}),
    "two in parts": ((1, 1), (2500, 40), {"returns_lse": True}),
    "two row tiles": ((1, 2), (300, 77), {"heads": 64}),
    "teams": ((1, 1), (200, 333), {"heads": 128}),
    "window, soft cap, lse": (
        (1, 4, 20),
        (170, 133, 90),
        {"sliding_window": 50, "logits_soft_cap": 5.0, "returns_lse": True},
    ),
    "float16, pages of 64": ((1, 3), (170, 133), {"dtype": torch.float16, "block_size": 64}),
    "pages of 32, no keys": ((1, 0, 2), (170, 0, 33), {"block_size": 32, "padding": 3}),
    "not causal": ((3, 4), (100, 44), {"causal": False, "returns_lse": True}),
    "window both ways": ((3, 4), (100, 44), {"causal": False, "sliding_window": 9}),
}


@pytest.mark.parametrize("which", INTERPRETED)
def test_interpreted_attention_agrees_with_float64(which):
    query_lens, seq_lens, fields = INTERPRETED[which]
    fields = {"dims": DIMS, "heads": 16, "dtype": torch.bfloat16, "block_size": 16} | fields
    step = MLAStep(query_lens, seq_lens, backend=HopperMLABackend, **fields)
    builder, seed = step.builder(), list(INTERPRETED).index(which)
    builder.launches = dataclasses.replace(builder.launches, num_sms=4)
    metadata = builder.build(step.batch)
    with interpreted(seed=seed, lateness=seed % 3 / 2) as launched, torch.inference_mode():
        returned = step.run(metadata=metadata)
    assert launched == ["hopper_mla_kernel"]
    assert not metadata.room.counters.any()
    output, lse = returned if step.spec.returns_lse else (returned, None)
    expected, expected_lse = step.expected()
    step.check(output, expected)
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-3, atol=1e-3)


def test_a_batch_without_tokens():
    step = MLAStep(
        (), (), backend=HopperMLABackend, dims=DIMS, heads=16, dtype=torch.bfloat16, block_size=16,
        returns_lse=True,
    )  # fmt: skip
    with interpreted() as launched, torch.inference_mode():
        output, lse = step.run(metadata=step.builder().build(step.batch))
    assert launched == []
    assert output.shape == (0, 16, 8)
    assert lse.shape == (0, 16)


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
