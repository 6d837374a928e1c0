"""Checks of what is written to the KV cache, and what is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from attn_dispatch.conformance.check import BackendUnderTest, Check, same_bits
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.kv_encoding import int8_rows, per_head
from attn_dispatch.conformance.tolerance import ErrorBound, require, require_rejected
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["cache"]

#: A kernel may store the nearest fp8 value or its neighbour, if it divides by a scale in another
#: way.
_FP8_STEPS = 2.0**-3

_Test = Callable[[BackendUnderTest, AttentionSpec], ErrorBound | None]


def cache(target: BackendUnderTest) -> Iterator[Check]:
    """New keys and values go to their slots, and nothing else is written."""
    base = target.base
    if base.block_size is None:
        return
    shows = "New keys and values are stored in their slots, and nothing else is written."
    checks: dict[str, tuple[str, AttentionSpec | None, _Test]] = {
        "written, the layout that is open": (shows, base, _writes)
    }
    for probe in target.declared("kv_cache_layout"):
        checks[f"written, {probe.value}"] = (shows, base.replace(**probe.fields), _writes)
    for probe in target.declared("kv_cache_dtype")[: 2 if target.quick else None]:
        shows = "They are stored in the cache's type."
        checks[f"written, {probe.value}"] = (shows, base.replace(**probe.fields), _writes)
    checks |= {
        "slot -1": ("A row with slot −1 is not written.", base, _skips_padding),
        "shared cache is never written": (
            "A layer that shares another's cache never writes to it.",
            target.spec_with("kv_sharing"),
            _never_writes,
        ),
        "nothing new": (
            "A step without keys reads the cache and does not change it.", base, _only_reads
        ),
        "written apart": (
            "write_kv by itself stores what forward stores.", base, _writes_by_itself
        ),
        "nothing after a refusal": (
            "After an InvalidInputError nothing has been written.", base, _rejects_before_writing
        ),
    }  # fmt: skip
    for name, (shows, spec, test) in checks.items():
        if spec is not None:
            yield Check(name, shows, spec, partial(test, target, spec))


def _slots(step: EngineStep) -> torch.Tensor:
    assert step.batch.slot_mapping is not None
    return step.batch.slot_mapping.cpu()


def _changed_slots(step: EngineStep, after: torch.Tensor) -> set[int]:
    """The slots at which any byte of the cache differs from the step's own."""
    rows = [step.bytes_by_slot(each) for each in (step.kv_cache, after)]
    changed = (rows[0] != rows[1]).any(1).nonzero().flatten()
    return set(changed.tolist())


def _writes(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    step = target.step(spec)
    done = target.forward(step)
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


def _require_stored(step: EngineStep, after: torch.Tensor, slots: torch.Tensor) -> None:
    """Check that the new tokens' slots hold their values in the cache's type."""
    block_size, dtype = step.block_size, after.dtype
    rows = (slots >= 0).nonzero().flatten()
    blocks, offsets = slots[rows] // block_size, slots[rows] % block_size
    host = after.cpu()
    host = host.view(torch.uint8) if dtype.itemsize == 1 else host
    scales = (step.layer._k_scale, step.layer._v_scale)
    for index, new in enumerate((step.key, step.value)):
        wanted = new.cpu()[rows]
        stored = step.part_of(host, index)[blocks, offsets]
        values = stored[..., : wanted.shape[-1]].contiguous().view(dtype)
        if dtype == torch.int8:
            integers, token_scales = int8_rows(wanted)
            found = stored[..., -16:-12].contiguous().view(torch.float32)
            same = torch.equal(values, integers) and torch.equal(found, token_scales)
        elif dtype.itemsize == 1:
            scale = per_head(scales[index].double().cpu())
            limit = torch.finfo(dtype).max * scale
            clamped = torch.minimum(torch.maximum(wanted.double(), -limit), limit)
            small = torch.finfo(dtype).smallest_normal * scale
            off = (values.double() * scale - clamped).abs()
            same = bool((off <= _FP8_STEPS * clamped.abs() + small).all())
        else:
            same = torch.equal(values, wanted.to(dtype))
        require(same, f"the new {step.parts[index]} are not what their slots hold afterwards")


def _skips_padding(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    """Two tokens of a prompt are padding, and their slots do not change."""
    step = target.step(spec, padding=3)
    done = target.forward(step)
    expected = {slot for slot in _slots(step).tolist() if slot >= 0}
    require(
        _changed_slots(step, done.cache) == expected,
        "a row with slot −1 was written to the cache",
    )
    finding = target.judge(step, done)
    assert step.batch.slot_mapping is not None
    step.batch.slot_mapping.fill_(-1)
    require(
        not _changed_slots(step, target.forward(step).cache),
        "every slot is −1, and something was written to the cache",
    )
    return finding


def _never_writes(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    step = target.step(spec)
    # A batch for all layers has the slots, and this layer must not write to them.
    step.batch = dataclasses.replace(step.batch, slot_mapping=step._slots.to(step.device))
    done = target.forward(step)
    require(
        not _changed_slots(step, done.cache),
        "the layer shares another's cache, and wrote its own keys and values to it",
    )
    return target.judge(step, done)


def _only_reads(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    step = target.step(spec, brings_keys=False)
    done = target.forward(step)
    require(not _changed_slots(step, done.cache), "no keys were given, and the cache was written")
    return target.judge(step, done)


def _writes_by_itself(target: BackendUnderTest, spec: AttentionSpec) -> None:
    step = target.step(spec)
    done = target.forward(step)
    written = step.kv_cache.clone()
    step.impl_of(target.cls).write_kv(step.layer, step.key, step.value, written, step.batch)
    require(same_bits(written, done.cache), "write_kv stores other bytes than forward does")


def _rejects_before_writing(target: BackendUnderTest, spec: AttentionSpec) -> None:
    step = target.step(spec)
    new = partial(torch.empty, device=target.device)
    outputs = {
        "an output of another shape": new(1, 1, 1, dtype=spec.dtype),
        "an output of another dtype": new(step.output_shape, dtype=torch.int32),
    }
    for what, output in outputs.items():
        after = step.kv_cache.clone()
        call = partial(step.forward, target.cls, after, output=output)
        require_rejected(call, f"{what} was given, and no InvalidInputError was raised")
        require(not _changed_slots(step, after), f"{what} was rejected after the cache was written")
    require_rejected(
        partial(step.forward, target.cls, step.wider_cache()),
        "a cache of another shape was given, and no InvalidInputError was raised",
    )
