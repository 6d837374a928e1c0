"""AttentionBatch: what it remembers, and values that would not fit int32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    attention,
    bind_kv_caches,
    merge_states,
    plan_kv_cache,
    write_kv_cache,
)
from attn_dispatch.errors import AttnDispatchError, InvalidInputError
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, allocate_kv_cache, kv_cache_shape
from attn_dispatch.interface.types import Phase

LARGEST = 2**31 - 1
SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}


def cache(block_size=4, blocks=6, layout="NHD", dtype=torch.float32, heads=2, size=16):
    shape = kv_cache_shape(blocks, block_size, heads, size)
    return allocate_kv_cache(shape, STRIDE_ORDERS[layout], dtype)


# The block size.


@pytest.mark.parametrize(
    "lens", [([1, 3], [5, 3]), ([3, 1, 3], [3, 5, 3]), ([1, 1], [5, 6])], ids=str
)
@pytest.mark.parametrize("slots", [True, False])
def test_parts_of_a_batch_have_its_block_size_and_no_slots_of_their_own(lens, slots):
    batch = AttentionBatch.create(
        *lens, block_table=torch.arange(2 * len(lens[0])).view(-1, 2), block_size=8
    )
    if not slots:
        batch = dataclasses.replace(batch, slot_mapping=None)
    for part in batch.parts.values():
        assert part.batch.block_size == 8
        assert (part.batch.slot_mapping is not None) == slots
        part.batch.check()


def test_gathered_parts_equal_sliced_parts():
    table = torch.arange(6).view(3, 2)
    mixed = AttentionBatch.create([3, 1, 2], [3, 5, 2], block_table=table, block_size=4)
    order = torch.tensor([0, 2, 1])
    sorted_ = AttentionBatch.create([3, 2, 1], [3, 2, 5], block_table=table[order], block_size=4)
    one, other = (batch.parts[Phase.PREFILL].batch for batch in (mixed, sorted_))
    for field in dataclasses.fields(AttentionBatch):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs), field.name
            assert mine.dtype == theirs.dtype
        else:
            assert mine == theirs, field.name


# Values that would wrap around.


@pytest.mark.parametrize("name", ["query_lens", "seq_lens", "key_lens"])
@pytest.mark.parametrize(
    "lens",
    [
        [2**31, 1],
        [2**32 + 1, 1],
        [2**64, 1],
        [-(2**70), 1],
        torch.tensor([2**32 + 1, 1]),
        torch.tensor([2**63 + 5, 1], dtype=torch.uint64),
        torch.tensor([1.0, 1.0]),
        torch.tensor([True, True]),
        torch.tensor([1j, 1]),
        [1, 1.0],
        [True, 1],
        [1, None],
    ],
    ids=str,
)
def test_lengths_are_integers_of_32_bits(name, lens):
    with pytest.raises(InvalidInputError, match=name):
        AttentionBatch.create(**({"query_lens": [1, 1], "seq_lens": [1, 1]} | {name: lens}))


@pytest.mark.parametrize("name", ["query_lens", "key_lens"])
def test_sums_of_lengths_fit_32_bits(name):
    arguments = {"query_lens": [1, 1], "seq_lens": [LARGEST, LARGEST]}
    AttentionBatch.create(**(arguments | {name: [LARGEST, 0]}))
    with pytest.raises(InvalidInputError, match=f"{name} adds up to"):
        AttentionBatch.create(**(arguments | {name: [LARGEST, 1]}))


@pytest.mark.parametrize("block", [2**31, 2**32, 2**32 + 1, 2**62, -(2**40)])
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("slots", [None, torch.tensor([0])])
def test_blocks_on_the_host_fit_32_bits(block, block_size, slots):
    with pytest.raises(InvalidInputError, match="block_table names blocks"):
        AttentionBatch.create(
            [1],
            [5],
            block_table=torch.tensor([[0, block]]),
            block_size=block_size,
            slot_mapping=slots,
        )


@pytest.mark.parametrize("garbage", [2**40, -1, -(2**40)])
def test_blocks_past_the_end_of_a_request_are_not_read(garbage):
    table = torch.tensor([[3, 1, garbage], [2, garbage, garbage]])
    batch = AttentionBatch.create([1, 1], [8, 4], block_table=table, block_size=4)
    assert batch.slot_mapping.tolist() == [7, 11]


def test_a_new_token_needs_a_block_and_one_that_a_window_has_passed_may_be_freed():
    lens = {"query_lens": [2], "seq_lens": [10], "block_size": 4}
    batch = AttentionBatch.create(**lens, block_table=torch.tensor([[-1, 3, 1]]))
    assert batch.slot_mapping.tolist() == [4, 5]
    with pytest.raises(InvalidInputError, match="names block -1 for a new token"):
        AttentionBatch.create(**lens, block_table=torch.tensor([[0, 3, -1]]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_and_blocks_are_taken_in_both_widths(dtype):
    batch = AttentionBatch.create(
        [2],
        [2],
        block_table=torch.tensor([[1]], dtype=dtype),
        slot_mapping=torch.tensor([4, -1]).to(dtype),
    )
    assert (batch.block_table.dtype, batch.slot_mapping.dtype) == (torch.int32, torch.int64)


WRONG_FIELDS = {
    "slots of floats": {"slot_mapping": torch.tensor([0.9, 1.0])},
    "slots of bools": {"slot_mapping": torch.tensor([True, False])},
    "slots below -1": {"slot_mapping": torch.tensor([0, -2])},
    "slots in a list": {"slot_mapping": [0, 1]},
    "slots in a table": {"slot_mapping": torch.tensor([[0, 1]])},
    "fewer slots": {"slot_mapping": torch.tensor([0])},
    "a mask in a list": {"custom_mask": [True] * 4},
    "a mask of integers": {"custom_mask": torch.ones(4).int()},
    "a mask of another size": {"custom_mask": torch.ones(3).bool()},
    "a table in a list": {"block_table": [[0]]},
    "a table of floats": {"block_table": torch.zeros(1, 1)},
    "a table of bytes": {"block_table": torch.zeros(1, 1).to(torch.uint8)},
    "blocks of no tokens": {"block_size": 0},
    "blocks of half a token": {"block_size": 0.5},
    "blocks of True tokens": {"block_size": True},
    "blocks of 2**40 tokens": {"block_size": 2**40},
    "no decode length": {"max_decode_query_len": 0},
    "a decode length of floats": {"max_decode_query_len": 1.0},
    "a wish that is no bool": {"enable_kv_scales_calculation": "yes"},
    "ranges in a list": {"multi_modal_placeholder_index_maps": [(0, 0, 1)]},
    "ranges of tuples": {"multi_modal_placeholder_index_maps": {"image": [(0, 0, 1)]}},
}


@pytest.mark.parametrize("what", WRONG_FIELDS)
def test_create_and_check_reject_the_same(what):
    fields = WRONG_FIELDS[what]
    with pytest.raises(InvalidInputError):
        AttentionBatch.create([2], [2], **fields)
    batch = dataclasses.replace(AttentionBatch.create([2], [2]), **fields)
    with pytest.raises(InvalidInputError):
        batch.check()


WRONG_LENGTHS = {
    "starts in a list": {"query_start_loc": [0, 2]},
    "starts of floats": {"query_start_loc": torch.tensor([0.0, 2.0])},
    "starts of other requests": {"query_start_loc": torch.tensor([0, 1, 2])},
    "host starts beyond int32": {
        "query_start_loc_cpu": torch.tensor([0, 2**32 + 2]),
        "max_query_len": LARGEST,
    },
    "host lengths beyond int32": {"seq_lens_cpu": torch.tensor([2**32 + 2])},
    "lengths in a table": {"seq_lens": torch.ones(1, 1).int()},
    "key starts of floats": {"key_start_loc_cpu": torch.tensor([0.0, 2.0])},
    "host lengths elsewhere": {"seq_lens_cpu": torch.ones(1, device="meta").int()},
    "a longest query of floats": {"max_query_len": 2.0},
    "a longest query beyond int32": {"max_query_len": 2**31},
    "a longest query of numpy": {"max_seq_len": torch.tensor(2)},
}


@pytest.mark.parametrize("what", WRONG_LENGTHS)
def test_a_constructed_batch_is_checked(what):
    batch = dataclasses.replace(AttentionBatch.create([2], [2]), **WRONG_LENGTHS[what])
    with pytest.raises(InvalidInputError):
        batch.check()


def test_an_unknown_argument_is_named():
    with pytest.raises(InvalidInputError, match="takes no blocktable"):
        AttentionBatch.create([1], [1], blocktable=None)


# A layer that left its block size open.


@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
@pytest.mark.parametrize("layout", STRIDE_ORDERS)
def test_a_layer_takes_the_block_size_and_layout_of_the_cache_that_is_bound(block_size, layout):
    layer = Attention(**SHAPE, device="cpu", block_size=None, prefix="a")
    kv_cache = cache(block_size, layout=layout)
    bind_kv_caches({"a": layer}, {"a": kv_cache})
    assert layer.kv_cache is kv_cache
    assert layer.spec.block_size == block_size
    assert layer.spec.kv_cache_layout == (None if block_size == 1 else layout)
    reports = [selection.report.spec for selection in layer.selections.values()]
    assert {spec.block_size for spec in reports} == {block_size}
    bind_kv_caches({"a": layer}, {"a": cache(8)})
    assert layer.spec.block_size == 8


def test_a_plan_with_open_layers_computes_what_one_without_does():
    query = torch.randn(7, 4, 16)
    key, value = torch.randn(2, 7, 2, 16)
    layers = {
        "a": Attention(**SHAPE, device="cpu", block_size=None),
        "b": Attention(**SHAPE, device="cpu", block_size=None, kv_sharing_target_layer_name="a"),
        "c": Attention(**SHAPE, device="cpu", block_size=8),
        "d": Attention(**SHAPE, device="cpu", attn_type="encoder_only"),
    }
    specs = {name: layer.spec for name, layer in layers.items()}
    plan = plan_kv_cache(specs, "cpu", shared={"b": "a"})
    assert plan.block_size == 8
    bind_kv_caches(layers, plan.allocate(2, "cpu"))
    assert layers["a"].kv_cache is layers["b"].kv_cache
    assert layers["d"].kv_cache is None
    assert layers["d"].spec.block_size is None
    batch = AttentionBatch.create([7], [7], block_table=torch.tensor([[1]]), block_size=8)
    for name in "abc":
        out = layers[name](query, key, value, attn_metadata=layers[name].build_metadata(batch))
        torch.testing.assert_close(out, attention(query, key, value))


WRONG_CACHES = {
    "another block size": lambda: cache(16),
    "other heads": lambda: cache(heads=4),
    "another head size": lambda: cache(size=8),
    "another dtype": lambda: cache(dtype=torch.float16),
    "4 dimensions": lambda: cache()[0],
    "blocks of no tokens": lambda: torch.zeros(6, 2, 0, 2, 16),
    "None": lambda: None,
    "a list": lambda: [cache()],
    "an expanded tensor": lambda: cache(blocks=1).expand(6, -1, -1, -1, -1),
}


@pytest.mark.parametrize("what", WRONG_CACHES)
@pytest.mark.parametrize("block_size", [None, 4])
def test_a_cache_that_does_not_fit_is_not_bound(what, block_size):
    if what == "another block size" and block_size is None:
        return
    layers = {
        name: Attention(**SHAPE, device="cpu", block_size=block_size, prefix=name) for name in "ab"
    }
    with pytest.raises(InvalidInputError, match=r"'b'|kv_cache"):
        bind_kv_caches(layers, {"a": cache(), "b": WRONG_CACHES[what]()})
    assert layers["a"].kv_cache is layers["b"].kv_cache is None
    assert layers["a"].spec.block_size == block_size


def test_binding_an_unsupported_block_size_changes_nothing():
    layer = Attention(**SHAPE, device="cpu", block_size=None, prefix="a")
    before, selections = layer.spec, layer.selections
    with pytest.raises(InvalidInputError, match="no cache for layer 'a'"):
        bind_kv_caches({"a": layer}, {})
    assert layer.spec is before
    assert layer.selections is selections


# Writing: all or nothing.


def slots_cases():
    return {
        "a slot past the end": torch.tensor([0, 1, 24]),
        "a slot below -1": torch.tensor([0, 1, -2]),
        "a slot beyond int32": torch.tensor([0, 1, 2**32 + 2]),
        "a slot twice": torch.tensor([0, 5, 5]),
        "slots of floats": torch.tensor([0.0, 1.0, 2.0]),
        "fewer slots": torch.tensor([0, 1]),
        "more slots": torch.tensor([0, 1, 2, 3]),
        "slots in a table": torch.tensor([[0, 1, 2]]),
    }


ROWS = {
    "fewer values": lambda k, v: (k, v[:2]),
    "a head for all": lambda k, v: (k[:, :1], v[:, :1]),
    "larger heads": lambda k, v: (torch.zeros(3, 2, 32), v),
    "heads of no elements": lambda k, v: (k[..., :0], v[..., :0]),
    "flat rows": lambda k, v: (k.flatten(1), v.flatten(1)),
    "another dtype": lambda k, v: (k, v.double()),
    "integers": lambda k, v: (k.long(), v.long()),
    "fp8": lambda k, v: (k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)),
    "rows elsewhere": lambda k, v: (k.to("meta"), v.to("meta")),
    "rows with gradients": lambda k, v: (k, v.clone().requires_grad_()),
}


@pytest.mark.parametrize("what", [*slots_cases(), *ROWS])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int8], ids=str
)
def test_rows_are_written_all_or_not_at_all(what, dtype):
    kv_cache = cache(dtype=dtype, size=32 if dtype == torch.int8 else 16)
    key, value = torch.ones(3, 2, 16), torch.ones(3, 2, 16)
    slots = slots_cases().get(what, torch.arange(3))
    if what in ROWS:
        key, value = ROWS[what](key, value)
    with pytest.raises(InvalidInputError):
        write_kv_cache(key, value, kv_cache, slots, 1.0, 1.0)
    assert not kv_cache.view(torch.uint8).any()


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, float("nan"), "1", torch.ones(3), torch.ones(2).half()]
)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_of_a_cache_are_positive_and_of_its_heads(name, scale):
    kv_cache = cache(dtype=torch.float8_e4m3fn)
    with pytest.raises(InvalidInputError, match=name):
        write_kv_cache(*torch.ones(2, 3, 2, 16), kv_cache, torch.arange(3), **{name: scale})
    assert not kv_cache.view(torch.uint8).any()


def test_an_inference_mode_cache_is_written_only_inside():
    with torch.inference_mode():
        kv_cache = cache()
    with pytest.raises(InvalidInputError, match="inference_mode"):
        write_kv_cache(*torch.ones(2, 3, 2, 16), kv_cache, torch.arange(3))
    with torch.inference_mode():
        write_kv_cache(*torch.ones(2, 3, 2, 16), kv_cache, torch.arange(3))
        assert kv_cache.sum() == 2 * 3 * 2 * 16


# Merging.


@pytest.mark.parametrize("empty", [float("inf"), float("-inf")])
@pytest.mark.parametrize("content", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "sinks", [None, torch.tensor([0.5, -1.0, float("-inf"), 2.0])], ids=["no sinks", "sinks"]
)
@pytest.mark.parametrize("first", [True, False])
def test_either_infinity_marks_a_part_without_keys(empty, content, sinks, first):
    output, lse = torch.randn(3, 4, 16), torch.randn(3, 4)
    lse[1] = empty  # no part has keys for this row
    nothing = torch.full_like(output, content), torch.full_like(lse, empty)
    parts = [(output, lse), nothing]
    merged, merged_lse = merge_states(*zip(*(parts if first else parts[::-1]), strict=True), sinks)
    known = [0, 2]
    weight = 1.0 if sinks is None else torch.sigmoid(lse - sinks)[known][..., None]
    torch.testing.assert_close(merged[known], output[known] * weight)
    torch.testing.assert_close(merged_lse[known], lse[known])
    assert not merged[1].any()
    assert (merged_lse[1] == float("-inf")).all()


def test_a_nan_in_the_lse_of_a_part_stays():
    output, lse = torch.randn(3, 4, 16), torch.randn(3, 4)
    lse[1, 2] = float("nan")
    merged, merged_lse = merge_states([output, output], [lse, lse.nan_to_num()])
    assert merged.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert merged_lse.isnan().nonzero().tolist() == [[1, 2]]


OUT, LSE = torch.zeros(3, 4, 16), torch.zeros(3, 4)
WRONG_STATES = {
    "stacked": (torch.stack([OUT, OUT]), torch.stack([LSE, LSE]), None),
    "stacked outputs": (torch.stack([OUT, OUT]), [LSE, LSE], None),
    "a generator": ((o for o in (OUT, OUT)), [LSE, LSE], None),
    "no tensor": ([OUT, None], [LSE, LSE], None),
    "integers": ([OUT, OUT], [LSE.long(), LSE.long()], None),
    "half lses": ([OUT, OUT], [LSE.half(), LSE.half()], None),
    "mixed lses": ([OUT, OUT], [LSE, LSE.double()], None),
    "mixed outputs": ([OUT, OUT.double()], [LSE, LSE], None),
    "fp8 outputs": ([OUT.to(torch.float8_e4m3fn)] * 2, [LSE, LSE], None),
    "one elsewhere": ([OUT, OUT.to("meta")], [LSE, LSE], None),
    "lses of heads first": ([OUT, OUT], [LSE.T, LSE.T], None),
    "lses that broadcast": ([OUT, OUT], [LSE[:1], LSE[:1]], None),
    "rows of different parts": ([OUT, OUT[:2]], [LSE, LSE[:2]], None),
    "flat outputs": ([OUT.flatten(1)] * 2, [LSE, LSE], None),
    "sinks of other heads": ([OUT, OUT], [LSE, LSE], torch.zeros(9)),
    "one sink for all": ([OUT, OUT], [LSE, LSE], torch.zeros(1)),
    "sinks of integers": ([OUT, OUT], [LSE, LSE], torch.zeros(4).long()),
    "sinks in a list": ([OUT, OUT], [LSE, LSE], [0.0] * 4),
    "sinks elsewhere": ([OUT, OUT], [LSE, LSE], torch.zeros(4, device="meta")),
}


@pytest.mark.parametrize("what", WRONG_STATES)
def test_states_that_cannot_be_merged_are_rejected(what):
    with pytest.raises(AttnDispatchError):
        merge_states(*WRONG_STATES[what])
