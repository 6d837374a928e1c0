"""Cascade attention: a prefix that all requests share is read once, and the result is the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    AttentionSpec,
    InvalidInputError,
    UnsupportedError,
)
from attn_dispatch.backends.reference.torch_ref import ReferenceImpl
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.runtime import cascade
from attn_dispatch.selection.failure_record import BackendFallbackWarning

PREFIX, BLOCK = 12, 4
LENS = {
    "decode": ((1, 13), (1, 20), (1, 17)),
    "verification": ((3, 15), (1, 20), (2, 30)),
    "chunks": ((1, 13), (6, 18), (0, 14)),
}
LAYERS = {
    "plain": {},
    "cap": {"logits_soft_cap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "lse": {"returns_lse": True},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
}


def layer_of(**more):
    return Attention(
        **({"num_heads": 4, "head_size": 8, "num_kv_heads": 2, "dtype": torch.float64,
            "device": "cpu", "block_size": BLOCK, "shared_prefix": True} | more)
    )  # fmt: skip


def step_of(lens, dtype=torch.float64, **more):
    """A batch, its cache with NaN in every slot that is not an earlier key, and its new tensors."""
    generator = torch.Generator().manual_seed(len(lens) + sum(seq for _, seq in lens))
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    shared = PREFIX // BLOCK
    own = 6
    table = torch.cat(
        [torch.arange(shared).expand(len(lens), -1),
         shared + torch.arange(len(lens) * own).view(len(lens), own).flip(1)], 1
    )  # fmt: skip
    cache = torch.full((shared + len(lens) * own, 2, BLOCK, 2, 8), float("nan"))
    cache = cache.double()
    for row, (query, seq) in zip(table, lens, strict=True):
        for position in range(seq - query):
            block = row[position // BLOCK]
            if cache[block, 0, position % BLOCK].isnan().any():
                cache[block, :, position % BLOCK] = random(2, 2, 8)
    queries, seqs = zip(*lens, strict=True)
    batch = AttentionBatch.create(
        queries, seqs, block_table=table, block_size=BLOCK,
        **({"shared_prefix_len": PREFIX} | more),
    )  # fmt: skip
    tokens = sum(queries) + 1  # one row of padding
    return batch, cache.to(dtype), [random(tokens, heads, 8) for heads in (4, 2, 2)]


def run(layer, batch, cache, new):
    return layer(*new, kv_cache=cache.clone(), attn_metadata=layer.build_metadata(batch))


@pytest.fixture
def calls(monkeypatch):
    """The seq_lens of each call of the reference."""
    found, original = [], ReferenceImpl.forward

    def forward(self, layer, query, key, value, kv_cache, metadata, *args):
        found.append(metadata.batch.seq_lens_list)
        return original(self, layer, query, key, value, kv_cache, metadata, *args)

    monkeypatch.setattr(ReferenceImpl, "forward", forward)
    return found


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("features", LAYERS)
def test_the_prefix_is_read_once_and_the_result_is_the_same(lens, features, calls):
    fields = LAYERS[features] | {"backend": "REFERENCE"}
    dtype = torch.float8_e4m3fn if features == "fp8" else torch.float64
    step = step_of(LENS[lens], dtype)
    found = run(layer_of(**fields), *step)
    seqs = step[0].seq_lens_list
    rest = [seq - PREFIX for seq in seqs]
    assert calls == ([[PREFIX, *rest]] if lens == "decode" else [rest, [PREFIX]])
    wanted = run(layer_of(**fields, shared_prefix=False), *step)
    assert calls[-1] == seqs
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)  # the LSE is float32
    assert not found[0].isnan().any()


@pytest.mark.parametrize(("pieces", "lens"), [(2, [8, 4]), (3, [4, 4, 4]), (9, [4, 4, 4])])
def test_a_prefix_in_pieces(pieces, lens, calls, monkeypatch):
    monkeypatch.setattr(cascade, "pieces_of", lambda *arguments: pieces)
    for kind, features in (
        ("verification", {}),
        ("decode", {"sinks": LAYERS["sinks"]["sinks"], "returns_lse": True}),
        ("decode", {}),
    ):
        step = step_of(LENS[kind])
        found = run(layer_of(**features, backend="REFERENCE"), *step)
        assert calls.pop()[: len(lens)] == lens
        wanted = run(layer_of(**features, backend="REFERENCE", shared_prefix=False), *step)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def decodes_of(requests, prefix):
    """A batch of decodes with a shared prefix and 100 keys more, and its layer."""
    table = torch.zeros(requests, 2048, dtype=torch.int32)
    batch = AttentionBatch.create(
        [1] * requests,
        [prefix + 100] * requests,
        block_table=table,
        block_size=16,
        shared_prefix_len=prefix,
    )
    spec = AttentionSpec(
        num_heads=32, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, block_size=16
    )
    return batch, spec


@pytest.mark.parametrize(
    ("requests", "prefix", "pieces"), [(64, 16384, 8), (64, 2048, 1), (512, 16384, 3), (64, 512, 1)]
)
def test_pieces_keep_all_processors_busy(requests, prefix, pieces):
    batch, spec = decodes_of(requests, prefix)
    assert cascade.pieces_of(batch, spec, num_sms=132) == pieces


@pytest.mark.parametrize(
    ("requests", "prefix", "name", "wanted"),
    [
        (256, 16384, "sm90", True),
        (2, 16384, "sm90", False),  # the second request reads the L2 cache
        (64, 1024, "sm90", False),  # shorter than the host's time for parts
        (256, 208, "sm90", False),  # more queries than keys
        (2, 1024, "cpu", True),  # of unknown bandwidth
    ],
)
def test_a_prefix_is_read_once_where_that_saves_more_than_two_parts_take(
    requests, prefix, name, wanted
):
    batch, spec = decodes_of(requests, prefix)
    assert cascade.pays_off(batch, spec, known_device(name)) is wanted


@pytest.mark.parametrize(
    ("requests", "prefix", "keys", "device_wins"),
    [
        (64, 16384, 18432, True),
        (64, 2048, 4096, False),
        (64, 256, 1280, False),
        (8, 16384, 18432, False),
        (8, 1024, 3072, False),
        (2, 16384, 18432, False),
    ],
)
def test_the_rule_agrees_with_what_an_h100_measured(
    requests, prefix, keys, device_wins, monkeypatch
):
    """Its device was faster in parts by 3 % or more for the first only, and its host for none."""
    batch = AttentionBatch.create(
        [1] * requests,
        [keys] * requests,
        block_table=torch.zeros(requests, 2048, dtype=torch.int32),
        block_size=16,
        shared_prefix_len=prefix,
    )
    spec = AttentionSpec(
        num_heads=32, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, block_size=16
    )
    h100 = dataclasses.replace(known_device("sm90"), memory_bandwidth=3.35e12)
    assert not cascade.pays_off(batch, spec, h100)
    monkeypatch.setattr(cascade, "HOST_US", 0.0)
    assert cascade.pays_off(batch, spec, h100) is device_wins


@pytest.mark.parametrize(
    ("lens", "more"),
    [
        (LENS["decode"][:1], {}),
        (((5, 20), (9, 30)), {}),  # more queries than keys in the prefix
        (LENS["decode"], {"shared_prefix_len": 0}),
    ],
    ids=["one request", "a prompt", "nothing is shared"],
)
def test_other_batches_are_computed_as_a_whole(lens, more, calls):
    step = step_of(lens, **more)
    found = run(layer_of(backend="REFERENCE"), *step)
    assert calls == [step[0].seq_lens_list]
    torch.testing.assert_close(found, run(layer_of(shared_prefix=False), *step), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["forward", "build"])
def test_a_part_that_fails_is_not_used_again(method, monkeypatch):
    layer, step = layer_of(), step_of(LENS["decode"])
    wanted = run(layer_of(shared_prefix=False), *step)
    prefix = layer._binding.builder._parts[0]
    owner = layer._binding.impl._prefix if method == "forward" else prefix.builder
    failed = []

    def broken(*args, **kw):
        failed.append(method)
        raise RuntimeError("the kernel is broken")

    monkeypatch.setattr(owner, method, broken)
    with pytest.warns(BackendFallbackWarning, match="the kernel is broken"):
        found = run(layer, *step)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    run(layer, *step)
    assert len(failed) == 1


@pytest.mark.parametrize(
    ("features", "text"),
    [
        ({"sliding_window": 4}, "sliding_window"),
        ({"attention_chunk": 4}, "attention_chunk"),
        ({"alibi_slopes": [1.0] * 4}, "alibi"),
        ({"custom_mask": True}, "custom_mask"),
        ({"causal": False}, "decoder"),
    ],
)
def test_layers_whose_queries_see_part_of_the_prefix_are_rejected(features, text):
    with pytest.raises(UnsupportedError, match=text):
        layer_of(**features)


def test_what_is_not_a_flag_is_rejected():
    with pytest.raises(InvalidInputError, match="shared_prefix=3"):
        layer_of(shared_prefix=3)


TABLE = torch.tensor([[0, 1, 2], [0, 1, 3]])
WRONG = {
    "part of a block": ({"shared_prefix_len": 3}, "whole blocks"),
    "longer than a request": ({"shared_prefix_len": 8}, "request 0 has 7 keys before"),
    "other blocks": ({"block_table": TABLE + torch.tensor([[0], [4]])}, "first 1 columns"),
    "no table": ({"block_table": None}, "whole blocks"),
    "no number": ({"shared_prefix_len": None}, "shared_prefix_len=None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_prefixes_are_rejected(case):
    more = {"block_table": TABLE, "block_size": 4, "shared_prefix_len": 4} | WRONG[case][0]
    with pytest.raises(InvalidInputError, match=WRONG[case][1]):
        AttentionBatch.create([1, 1], [8, 10], **more)


def test_parts_of_a_batch_keep_their_prefix_and_shards_have_none():
    batch, *_ = step_of(LENS["chunks"])
    assert all(part.batch.shared_prefix_len in (0, PREFIX) for part in batch.parts.values())
    assert batch.shard(0, 2).shared_prefix_len == 0
