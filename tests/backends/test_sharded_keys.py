"""Attention over the parts of a sharded cache, merged, equals attention over the whole.

Each part is one of several GPUs' keys: every `step`-th one of a request. The whole is computed
without key positions by the float64 oracle.
"""

from __future__ import annotations

import pytest
import torch

from attn_dispatch import merge_states
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.key_positions import KeyPositions
from attn_dispatch.interface.types import Phase
from attn_dispatch.selection.registry import registry
from support.cases import Case, Step, layer_spec
from support.triton_cases import DEVICE, SMALL, builder_of

#: A decode, drafts to verify, a prompt, a chunk as long as a part of its keys, and a request so
#: short that some parts are empty; in no order of phases.
LENS = {"query_lens": (1, 4, 13, 8, 1), "seq_lens": (39, 21, 13, 16, 1)}
FIELDS = {
    "plain": {},
    "window": {"sliding_window": 6},
    "window of one": {"sliding_window": 1},
    "chunks": {"attention_chunk": 7},
    "chunks and window": {"attention_chunk": 7, "sliding_window": 5},
    "two sides": {"causal": False, "window_size": (5, 2)},
    "not causal": {"causal": False},
    "chunks both ways": {"causal": False, "attention_chunk": 5},
    "ALiBi": {"alibi": True},
    "symmetric ALiBi": {"alibi": "symmetric", "causal": False},
    "soft cap": {"logits_soft_cap": 1.5},
    "sinks": {"sinks": True},
    "MQA": {"num_kv_heads": 1},
    "MHA": {"num_kv_heads": 4},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "int8": {"kv_cache_dtype": "int8_per_token_head"},
}


def part_of(step, index, parts):
    """(spec, batch, cache, kv) of the keys at positions index, index + parts and so on."""
    spec = step.spec.replace(key_positions=True, returns_lse=True, sinks=False)
    positions = KeyPositions.create(step.case.seq_lens, offset=index, step=parts)
    local, block_size = positions.local_seq_lens(), spec.block_size
    needed = [-(-n // block_size) for n in local]
    columns = max(1, *needed)
    table = torch.full((len(local), columns), -1, dtype=torch.int32)
    whole = step.kv_cache
    shape = (sum(needed) + 1, *whole.shape[1:])
    cache = torch.full(shape, float("nan")) if whole.is_floating_point() else torch.zeros(shape)
    cache = cache.to(whole.dtype)
    slots, used = [], 0
    for request, (query_len, seq_len) in enumerate(
        zip(step.case.query_lens, step.case.seq_lens, strict=True)
    ):
        table[request, : needed[request]] = torch.arange(used, used + needed[request])
        used += needed[request]
        for position in range(seq_len):
            is_here = position % parts == index
            key = position // parts
            slot = int(table[request, key // block_size]) * block_size + key % block_size
            if position >= seq_len - query_len:
                slots.append(slot if is_here else -1)
            elif is_here:
                block = int(step._table[request, position // block_size])
                source = whole[block, :, position % block_size].cpu()
                cache[slot // block_size, :, slot % block_size] = source
    batch = AttentionBatch.create(
        step.case.query_lens,
        local,
        block_table=table,
        block_size=block_size,
        slot_mapping=torch.tensor(slots),
        key_positions=positions,
        device=step.device,
    )
    return spec, batch, cache.to(step.device)


def attend_part(backend, step, index, parts, *, by_phase=False):
    """(output, lse) of one part."""
    spec, batch, cache = part_of(step, index, parts)
    if backend == "TRITON_ATTN":
        builder = builder_of(spec, device=step.device, **SMALL)
        cls = builder.backend_cls
    else:
        cls = registry.candidates()[backend].backend_cls
        builder = cls.make_builder(spec, step.device)
    arguments = {**step.impl_arguments(), **spec.impl_arguments(), "sinks": None}
    impl = cls.get_impl_cls()(**arguments)
    if not by_phase:
        metadata = builder.build(batch)
        return impl.forward(step.layer, step.query, step.key, step.value, cache, metadata)
    output = torch.full(step.output_shape, torch.nan, dtype=spec.dtype, device=step.device)
    lse = torch.full(step.output_shape[:2], torch.nan, device=step.device)
    for part in batch.parts.values():
        tensors = (tensor[part.tokens] for tensor in (step.query, step.key, step.value))
        returned = impl.forward(step.layer, *tensors, cache, builder.build(part.batch))
        output[part.tokens], lse[part.tokens] = returned
    return output, lse


def check_merged(backend, step, parts, **options):
    """The merged parts are the whole, by the oracle."""
    results = [attend_part(backend, step, i, parts, **options) for i in range(parts)]
    outputs, lses = zip(*results, strict=True)
    sinks = None if step.sinks is None else step.sinks.to(step.device)
    merged, lse = merge_states(outputs, lses, sinks=sinks)
    wanted, wanted_lse = step.expected()
    atol = 2e-5
    torch.testing.assert_close(merged.cpu().double(), wanted, atol=atol, rtol=1e-5)
    torch.testing.assert_close(lse.cpu().float(), wanted_lse, atol=atol, rtol=1e-5)


def step_for(dtype, device, **fields):
    spec = layer_spec(dtype=dtype, **({"head_size": 16} | fields))
    return Step(Case(spec=spec, **LENS), device)


@pytest.mark.parametrize("parts", [1, 2, 3, 17])
@pytest.mark.parametrize("name", FIELDS)
def test_parts_of_reference_merge_to_the_whole(name, parts):
    check_merged("REFERENCE", step_for(torch.float64, "cpu", **FIELDS[name]), parts)


@pytest.mark.parametrize("name", FIELDS)
def test_parts_of_triton_merge_to_the_whole(name):
    parts = 2 + list(FIELDS).index(name) % 2
    check_merged("TRITON_ATTN", step_for(torch.float32, DEVICE, **FIELDS[name]), parts)


@pytest.mark.parametrize("backend", ["REFERENCE", "TRITON_ATTN"])
def test_the_phases_of_a_part_have_their_positions(backend):
    device = DEVICE if backend == "TRITON_ATTN" else "cpu"
    step = step_for(torch.float32, device, sliding_window=6)
    assert set(part_of(step, 1, 3)[1].parts) == set(Phase)
    check_merged(backend, step, 3, by_phase=True)


@pytest.mark.parametrize("backend", ["REFERENCE", "TRITON_ATTN"])
def test_a_row_without_a_key_here_is_0(backend):
    device = DEVICE if backend == "TRITON_ATTN" else "cpu"
    step = step_for(torch.float32, device, sliding_window=1)  # a query sees its own key only
    output, lse = attend_part(backend, step, 1, 3)
    starts = torch.tensor(step.case.seq_lens) - torch.tensor(step.case.query_lens)
    positions = torch.cat(
        [torch.arange(s, n) for s, n in zip(starts, step.case.seq_lens, strict=True)]
    )
    is_elsewhere = positions % 3 != 1
    assert bool((output.cpu()[is_elsewhere] == 0).all())
    assert bool((lse.cpu()[is_elsewhere] == -torch.inf).all())
    assert bool(lse.cpu()[~is_elsewhere].isfinite().all())


def test_keys_of_a_call_without_a_cache_are_those_of_the_part():
    step = step_for(torch.float64, "cpu", block_size=None)
    spec = step.spec.replace(key_positions=True, returns_lse=True)
    cls = registry.candidates()["REFERENCE"].backend_cls
    results = []
    for index in range(2):
        positions = KeyPositions.create(step.case.seq_lens, offset=index, step=2)
        local = positions.local_seq_lens()
        batch = AttentionBatch.create(
            step.case.query_lens, local, key_lens=local, key_positions=positions
        )
        key, value = (torch.cat([each[index::2] for each in kv]) for kv in (step.keys, step.values))
        impl = cls.get_impl_cls()(**{**step.impl_arguments(), **spec.impl_arguments()})
        metadata = cls.make_builder(spec, step.device).build(batch)
        results.append(impl.forward(step.layer, step.query, key, value, None, metadata))
    merged, _ = merge_states(*zip(*results, strict=True))
    torch.testing.assert_close(merged, step.expected()[0], atol=1e-6, rtol=1e-6)
