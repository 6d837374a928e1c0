"""Padding rows of the output are 0, with an LSE of −inf, whatever was there before."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from attn_dispatch.backends.triton.backend import TritonAttnBackend
from support.cases import Case, Step, layer_spec
from support.triton_cases import DEVICE, SMALL, builder_of, needs_gpu

BATCHES = {
    "decodes": ((1, 1, 1), (5, 9, 33)),
    "decodes and a request without keys": ((1, 0, 1), (5, 0, 0)),
    "a prompt": ((24,), (24,)),
    "a prompt and decodes": ((1, 24, 1), (39, 24, 4)),
    "nothing new": ((0, 0), (5, 0)),
    "no requests": ((), ()),
}
FIELDS = {
    "plain": {},
    "batch_invariant": {"batch_invariant": True},
    "mask": {"custom_mask": True},
    "fp8": {"output_quant": "fp8_e4m3"},
    "fp8 groups": {"output_quant": "fp8_e4m3_group128", "head_size": 128},
}
PADDING = 5


def padded(step, rows=PADDING):
    other = copy.copy(step)
    nan = torch.full((rows, *step.query.shape[1:]), math.nan, dtype=step.query.dtype)
    other.query = torch.cat([step.query, nan.to(step.query.device)])
    return other


@pytest.mark.parametrize("lens", BATCHES)
@pytest.mark.parametrize("fields", FIELDS)
def test_triton_attn(fields, lens):
    query_lens, seq_lens = BATCHES[lens]
    spec = layer_spec(dtype=torch.float32, returns_lse=True, **FIELDS[fields])
    step = padded(Step(Case(spec=spec, query_lens=query_lens, seq_lens=seq_lens), DEVICE))
    rows, tokens = len(step.query), sum(query_lens)
    dtype = torch.float8_e4m3fn if spec.output_quant else spec.dtype
    output = torch.full((rows, spec.num_heads, spec.head_size_v), 7.0, device=DEVICE).to(dtype)
    more = {}
    if spec.output_quant == "fp8_e4m3":
        more["output_scale"] = torch.tensor(0.5, device=DEVICE)
    elif spec.output_quant:
        more["output_block_scale"] = torch.full((rows, spec.num_heads), 7.0, device=DEVICE)
    impl = TritonAttnBackend.get_impl_cls()(**step.impl_arguments())
    metadata = builder_of(spec, device=step.device, **SMALL).build(step.batch)
    _, lse = impl.forward(
        step.layer, step.query, step.key, step.value, step.kv_cache, metadata, output, **more
    )
    assert not output[tokens:].float().any()
    assert not output[:tokens].float().eq(7.0).all() or not tokens
    assert (lse[tokens:] == -math.inf).all()
    if "output_block_scale" in more:
        assert (more["output_block_scale"][tokens:] == 1).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 6])
def test_padding_follows_device_lengths(num_tokens, monkeypatch):
    """As in a graph replay: the plan has six requests, and fewer of them have a token."""
    spec = layer_spec(dtype=torch.float32, returns_lse=True)
    step = Step(Case(spec=spec, query_lens=(1,) * 6, seq_lens=(7, 3, 12, 5, 9, 20)), DEVICE)
    wanted, wanted_lse = step.run("REFERENCE")
    metadata = builder_of(spec, device=step.device, **SMALL).build(step.batch)
    # On a CPU the batch's contents are looked at, and differ from the host's as on no engine.
    monkeypatch.setattr("attn_dispatch.interface.validation.check_batch_contents", lambda *_: None)
    batch = metadata.batch
    batch.query_start_loc[num_tokens + 1 :] = num_tokens
    batch.seq_lens[num_tokens:] = 0
    output = torch.full_like(step.query, 7.0)
    impl = TritonAttnBackend.get_impl_cls()(**step.impl_arguments())
    cache = _filled(step)
    _, lse = impl.forward(step.layer, step.query, None, None, cache, metadata, output)
    torch.testing.assert_close(output[:num_tokens], wanted[:num_tokens])
    assert not output[num_tokens:].any()
    assert (lse[num_tokens:] == -math.inf).all()
    torch.testing.assert_close(lse[:num_tokens], wanted_lse[:num_tokens])


def _filled(step):
    """The cache with the step's new keys in it."""
    from attn_dispatch import write_kv_cache

    cache = step.kv_cache.clone()
    write_kv_cache(step.key, step.value, cache, step.batch.slot_mapping)
    return cache


@pytest.mark.parametrize("lens", BATCHES)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_hopper_attn(head_size, lens):
    from attn_dispatch.backends.cuda.hopper.backend import HopperAttnBackend

    query_lens, seq_lens = BATCHES[lens]
    spec = layer_spec(dtype=torch.bfloat16, returns_lse=True, head_size=head_size, block_size=16)
    step = padded(Step(Case(spec=spec, query_lens=query_lens, seq_lens=seq_lens), "cuda"))
    output = torch.full_like(step.query, 7.0)
    tokens = sum(query_lens)
    impl = HopperAttnBackend.get_impl_cls()(**step.impl_arguments())
    metadata = HopperAttnBackend.get_builder_cls()(spec, step.device).build(step.batch)
    _, lse = impl.forward(
        step.layer, step.query, step.key, step.value, step.kv_cache, metadata, output
    )
    assert not output[tokens:].any()
    assert (lse[tokens:] == -math.inf).all()


for mark in (
    *needs_gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
):
    test_hopper_attn = mark(test_hopper_attn)
