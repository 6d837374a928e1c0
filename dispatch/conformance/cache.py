"""Checks of what is written to the KV cache, and what is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from attn_dispatch.conformance.cases import Step
from attn_dispatch.conformance.check import (
    BackendUnderTest,
    Check,
    same_bits,
)
from attn_dispatch.conformance.kv_encoding import int8_rows
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound, require
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, allocate_kv_cache
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["cache"]

#: What a kernel may store an fp8 value as: the nearest, or its neighbour, where it divides by a
#: scale in another way.
_FP8_STEPS = 2.0**-3


def cache(target: BackendUnderTest) -> Iterator[Check]:
    """New keys and values go to their slots, as they are; nothing else is touched."""
    if target.base.block_size is None:
        return

    def check(
        name: str,
        shows: str,
        spec: AttentionSpec | None,
        test: Callable[[BackendUnderTest, AttentionSpec], ErrorBound | None],
    ) -> Iterator[Check]:
        if spec is not None:
            yield Check("cache", name, shows, spec, partial(test, target, spec))

    layouts = {"the layout that is open": target.base}
    for probe in target.declared("kv_cache_layout"):
        layouts[probe.value] = target.base.replace(**probe.fields)
    for name, spec in layouts.items():
        yield from check(
            f"written, {name}",
            "New keys and values are stored in their slots, and nothing else is touched.",
            spec,
            _writes,
        )
    probes = target.declared("kv_cache_dtype")
    for probe in probes[:2] if target.quick else probes:
        yield from check(
            f"written, {probe.value}",
            "They are stored as the cache's type has them.",
            target.base.replace(**probe.fields),
            _writes,
        )
    yield from check("slot -1", "What has slot −1 is not written.", target.base, _skips_padding)
    yield from check(
        "shared cache is never written",
        "A layer that shares another's cache never writes to it.",
        target.spec_with("kv_sharing"),
        _never_writes,
    )
    yield from check(
        "nothing new", "A step without keys reads the cache and leaves it as it is.",
        target.base, _only_reads,
    )  # fmt: skip
    yield from check(
        "written apart",
        "write_kv alone stores what forward stores.",
        target.base,
        _writes_apart,
    )
    yield from check(
        "nothing after a refusal",
        "After an InvalidInputError nothing has been written.",
        target.base,
        _writes_nothing_if_refused,
    )


def _slots(step: Step) -> torch.Tensor:
    assert step.batch.slot_mapping is not None
    return step.batch.slot_mapping.cpu()


def _changed_slots(step: Step, after: torch.Tensor) -> set[int]:
    """The slots at which any byte of the cache differs from the step's own."""
    before = step.kv_cache
    assert before is not None
    rows = []
    for tensor in (before, after):
        by_slot = tensor.permute(0, 2, 1, 3, 4).contiguous().flatten(0, 1)
        rows.append(by_slot.flatten(1).view(torch.uint8))
    changed = (rows[0] != rows[1]).any(1).nonzero().flatten()
    return set(changed.tolist())


def _writes(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    step = target.step(spec)
    done = target.forward(step)
    assert done.cache is not None
    slots = _slots(step)
    expected = {slot for slot in slots.tolist() if slot >= 0}
    changed = _changed_slots(step, done.cache)
    require(
        changed <= expected,
        f"slots {sorted(changed - expected)[:5]} were written, which no new token has",
    )
    missing = sorted(expected - changed)
    require(not missing, f"slots {missing[:5]} of new tokens were not written")
    _require_stored(step, done.cache, slots)
    return target.judge(step, done)


def _require_stored(step: Step, after: torch.Tensor, slots: torch.Tensor) -> None:
    """Check that the new tokens' slots hold what the cache's type has of their values."""
    block_size = after.shape[2]
    rows = (slots >= 0).nonzero().flatten()
    blocks, offsets = slots[rows] // block_size, slots[rows] % block_size
    host = after.cpu()
    scales = (step.layer._k_scale.cpu(), step.layer._v_scale.cpu())
    for index, new in enumerate((step.key, step.value)):
        assert new is not None
        wanted = new.cpu()[rows]
        if host.dtype == torch.int8:
            stored = host[:, index][blocks, offsets]
            integers, token_scales = int8_rows(wanted)
            same = torch.equal(stored[..., : wanted.shape[-1]], integers) and torch.equal(
                stored[..., -16:-12].contiguous().view(torch.float32), token_scales
            )
        elif host.dtype.itemsize == 1:
            bytes_ = host[:, index].view(torch.uint8)[blocks, offsets][..., : wanted.shape[-1]]
            scale = scales[index][:, None] if scales[index].dim() else scales[index]
            meant = bytes_.contiguous().view(host.dtype).double() * scale.double()
            limit = torch.finfo(host.dtype).max * scale.double()
            clamped = torch.minimum(torch.maximum(wanted.double(), -limit), limit)
            small = torch.finfo(host.dtype).smallest_normal * scale.double()
            off = (meant - clamped).abs()
            same = bool((off <= _FP8_STEPS * clamped.abs() + small).all())
        else:
            stored = host[:, index][blocks, offsets][..., : wanted.shape[-1]]
            same = torch.equal(stored, wanted.to(host.dtype))
        require(
            same, f"the new {('keys', 'values')[index]} are not what their slots hold afterwards"
        )


def _skips_padding(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    """Two tokens of a prompt are padding: their slots stay as they are."""
    step = target.step(spec, padding=3)
    done = target.forward(step)
    assert done.cache is not None
    assert step.batch.slot_mapping is not None
    expected = {slot for slot in _slots(step).tolist() if slot >= 0}
    require(
        _changed_slots(step, done.cache) == expected,
        "a row with slot −1 was written to the cache",
    )
    finding = target.judge(step, done)
    step.batch.slot_mapping.fill_(-1)
    again = target.forward(step)
    assert again.cache is not None
    require(
        not _changed_slots(step, again.cache),
        "every slot is −1, and something was written to the cache",
    )
    return finding


def _never_writes(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    step = target.step(spec)
    # The slots are there, as a batch for all layers has them, and are not this layer's to write.
    assert step._slots is not None
    step.batch = dataclasses.replace(step.batch, slot_mapping=step._slots.to(step.device))
    done = target.forward(step)
    assert done.cache is not None
    written = _changed_slots(step, done.cache)
    require(
        not written, "the layer shares another's cache, and wrote its own keys and values to it"
    )
    return target.judge(step, done)


def _only_reads(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    step = target.step(spec, brings_keys=False)
    done = target.forward(step)
    assert done.cache is not None
    require(not _changed_slots(step, done.cache), "no keys were given, and the cache was written")
    return target.judge(step, done)


def _writes_apart(target: BackendUnderTest, spec: AttentionSpec) -> None:
    step = target.step(spec)
    assert step.kv_cache is not None
    assert step.key is not None
    assert step.value is not None
    done = target.forward(step)
    assert done.cache is not None
    apart = step.kv_cache.clone()
    step.impl_of(target.cls).write_kv(step.layer, step.key, step.value, apart, step.batch)
    require(same_bits(apart, done.cache), "write_kv stores other bytes than forward does")


def _writes_nothing_if_refused(target: BackendUnderTest, spec: AttentionSpec) -> None:
    step = target.step(spec)
    assert step.kv_cache is not None
    shape = (len(step.query), spec.num_heads, spec.head_size_v)
    outputs = {
        "an output of another shape": torch.empty(1, 1, 1, dtype=spec.dtype, device=target.device),
        "an output of another dtype": torch.empty(shape, dtype=torch.int32, device=target.device),
    }
    for what, output in outputs.items():
        after = step.kv_cache.clone()
        _require_refused(target, step, after, what, output=output)
        require(not _changed_slots(step, after), f"{what} was refused after the cache was written")
    sizes = (3, 2, 16, spec.num_kv_heads + 1, step.kv_cache.shape[-1])
    other = allocate_kv_cache(sizes, STRIDE_ORDERS["NHD"], step.kv_cache.dtype, target.device)
    _require_refused(target, step, other, "a cache of another shape")


def _require_refused(
    target: BackendUnderTest, step: Step, cache: torch.Tensor, what: str, **arguments: torch.Tensor
) -> None:
    try:
        step.forward(target.cls, cache, **arguments)
    except InvalidInputError:
        return
    raise CheckFailed(f"{what} was given, and no InvalidInputError was raised")
