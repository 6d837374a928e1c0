"""Checks that a changed input changes the output, and that nothing else does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from attn_dispatch.conformance.check import (
    BackendUnderTest,
    Check,
    checks_of_cases,
    skip_unless,
)
from attn_dispatch.conformance.comparison import allowed_error
from attn_dispatch.conformance.engine_step import MEMORY, EngineStep
from attn_dispatch.conformance.latents import LatentStep
from attn_dispatch.conformance.tolerance import ErrorBound, distance, require, worst_of
from attn_dispatch.interface.contents import first_seen_keys
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["garbage", "inputs", "memory", "rows"]

_Change = Callable[[EngineStep], None]


def _drop(**fields: Any) -> _Change:
    """Remove a feature of the layer, and its tensors."""

    def change(step: EngineStep) -> None:
        step.case = step.case.replace(spec=step.spec.replace(**fields))
        for field, tensor in (("alibi", "slopes"), ("sinks", "sinks"), ("custom_mask", "masks")):
            if field in fields:
                setattr(step, tensor, None)
        if "bidirectional_ranges" in fields:
            step.case = step.case.replace(ranges=())
        step.batch = step._make_batch()

    return change


def _double_slopes(step: EngineStep) -> None:
    step.slopes = [2 * slope for slope in step.slopes or ()]


def _raise_sinks(step: EngineStep) -> None:
    assert step.sinks is not None
    step.sinks.add_(1.5)


def _double_scale(step: EngineStep) -> None:
    step.scale *= 2


def _flip_masks(step: EngineStep) -> None:
    step.masks = [~mask for mask in step.masks or ()]
    step.batch = step._make_batch()


def _move_ranges(step: EngineStep) -> None:
    moved = tuple((request, start + 2, end) for request, start, end in step.case.ranges)
    step.case = step.case.replace(ranges=moved)
    step.batch = step._make_batch()


def _double_cache_scale(index: int) -> _Change:
    """Double all keys (0) or values (1) by their scale; the step brings none, so all are cached."""
    return lambda step: step.double_cache_scale(index)


def _change_cached(index: int) -> _Change:
    """Another key (0) or value (1) at position 2 of the first request, which has a past."""
    return lambda step: step.change_cached(index)


def _change_weight(change: Callable[[torch.Tensor, torch.Tensor], Any]) -> _Change:
    """Change a part of kv_b_proj in place."""

    def changed(step: EngineStep) -> None:
        assert isinstance(step, LatentStep)
        step.change_weight(change)

    return changed


#: Feature -> its value in a layer without it.
_OFF = {
    "logits_soft_cap": None,
    "sliding_window": None,
    "window_size": None,
    "attention_chunk": None,
    "key_positions": False,
    "alibi": False,
    "sinks": False,
    "custom_mask": False,
    "bidirectional_ranges": False,
}
#: Input -> the fields that it needs, the change, and whether the impl is made again for it. If not,
#: the same impl must keep nothing of the earlier call.
_INPUTS: dict[str, tuple[tuple[str, ...], _Change, bool]] = {
    **{f"{name} on and off": ((name,), _drop(**{name: off}), True) for name, off in _OFF.items()},
    "slopes": (("alibi",), _double_slopes, True),
    "sinks, in place": (("sinks",), _raise_sinks, False),
    "scale": ((), _double_scale, True),
    "mask": (("custom_mask",), _flip_masks, False),
    "ranges": (("bidirectional_ranges",), _move_ranges, False),
}
#: The same for latent attention: the projections. A model may load its weights later, so the same
#: impl must see them.
_OF_LATENTS: dict[str, tuple[tuple[str, ...], _Change, bool]] = {
    "W_UK": ((), _change_weight(lambda up_k, up_v: up_k.mul_(-2)), False),
    "W_UV": ((), _change_weight(lambda up_k, up_v: up_v.mul_(-2)), False),
}
#: The same for steps that bring no keys, over what the cache holds.
_CACHED: dict[str, tuple[tuple[str, ...], _Change, bool]] = {
    "cached key": ((), _change_cached(0), False),
    "cached value": ((), _change_cached(1), False),
    "k_scale": (("kv_cache_dtype",), _double_cache_scale(0), False),
    "v_scale": (("kv_cache_dtype",), _double_cache_scale(1), False),
    "k_scale of each head": (("kv_scales",), _double_cache_scale(0), False),
    "v_scale of each head": (("kv_scales",), _double_cache_scale(1), False),
}


def inputs(target: BackendUnderTest) -> Iterator[Check]:
    """Each input is changed: the output changes, and is right both times."""
    is_latent = target.base.mla is not None
    new = {**_INPUTS, **_OF_LATENTS} if is_latent else _INPUTS
    for table, brings_keys in ((new, True), (_CACHED, False)):
        for name, (fields, change, makes_impl) in table.items():
            spec = _layer_with(target, fields)
            if spec is None or (not brings_keys and spec.block_size is None):
                continue
            if is_latent and name == "v_scale":
                continue  # an entry has one scale
            if name.startswith("cached") and spec.kv_cache_dtype != "auto":
                continue  # another value would have to be stored by a scale
            step = partial(target.step, spec, brings_keys=brings_keys)
            test = partial(_has_effect, target, step, change, makes_impl)
            yield Check(name, f"The output depends on it: {name}.", spec, test)


def _layer_with(target: BackendUnderTest, fields: tuple[str, ...]) -> AttentionSpec | None:
    """The plain layer with these fields; for the cache's type, one that has scales."""
    if fields != ("kv_cache_dtype",):
        return target.spec_with(*fields)
    probes = (p for p in target.declared(*fields) if p.value.startswith("fp8"))
    return next((target.base.replace(**probe.fields) for probe in probes), None)


def _has_effect(
    target: BackendUnderTest,
    make: Callable[[], EngineStep],
    change: _Change,
    makes_impl: bool,
) -> ErrorBound:
    step = make()
    impl = step.impl_of(target.cls)
    first = target.forward(step, impl=impl)
    finding = target.judge(step, first)
    before, wanted_before = first.output.double().cpu(), step.expected()[0]
    change(step)
    effect = distance(step.expected()[0], wanted_before)
    skip_unless(
        effect > 4 * allowed_error(step),
        f"with the values that are declared the change is too small to be seen ({effect:.3g})",
    )
    second = target.forward(step, impl=None if makes_impl else impl)
    after = second.output.double().cpu()
    require(
        distance(after[: len(wanted_before)], before[: len(wanted_before)]) > effect / 4,
        "the input was changed, and the output did not change: it has no effect",
    )
    return worst_of((finding, target.judge(step, second)))


# Garbage: numbers that belong to no request.


def _stale(step: EngineStep) -> None:
    """In place of NaN, ordinary numbers, as an earlier request may leave them."""
    random = torch.Generator().manual_seed(1)
    left = 4 * torch.randn(step.kv_cache.shape, generator=random)
    left = left.to(step.device, step.kv_cache.dtype)
    step.kv_cache = torch.where(step.kv_cache.isnan(), left, step.kv_cache)


def _free_what_no_query_sees(step: EngineStep) -> None:
    """Fill the blocks before window and chunk of each request's first query with NaN."""
    cache, block_size = step.kv_cache, step.block_size
    for request, first_seen in enumerate(first_seen_keys(step.batch, Reach.of(step.spec))):
        cache[step._table[request, : first_seen // block_size].long().to(cache.device)] = math.nan


#: Fields that let an engine free blocks: what they are called, and which blocks.
_FREEING = {
    "sliding_window": ("window", "that a sliding window has passed"),
    "attention_chunk": ("chunk", "before the chunk of a request's first query"),
}


def garbage(target: BackendUnderTest) -> Iterator[Check]:
    """Numbers of no request, or of another one, do not affect a request's result."""
    base = target.base

    def after(change: _Change, spec: AttentionSpec, **case: Any) -> ErrorBound:
        step = target.step(spec, **case)
        change(step)
        return target.run_and_judge(step)

    shows = "Rows of query, key and value beyond the batch's tokens may be NaN."
    test = partial(after, lambda step: step.fill_padding(math.nan), base, padding=3)
    yield Check("rows past the batch", shows, base, test)
    if base.block_size is None:
        return
    shows = (
        "The cache may hold NaN past a request's last key and in free blocks, and the block table "
        "any number past its last block."
    )
    yield Check("NaN past a request's end", shows, base, partial(target.agrees, base))
    plain = target.spec_with(kv_cache_dtype="auto")
    if plain is None:
        return
    shows = "Keys that an earlier request left past a request's end are not read."
    yield Check("stale keys past a request's end", shows, plain, partial(after, _stale, plain))
    shows = "NaN that is cached of one request stays in its rows."
    test = partial(_nan_stays_in_its_request, target, plain)
    yield Check("NaN of another request", shows, plain, test)
    for field, names in _FREEING.items():
        spec = target.spec_with(field, kv_cache_dtype="auto")
        if spec is None or not spec.causal:
            continue
        beyond = (getattr(spec, field) or 0) + 2 * (spec.block_size or 0)
        case = {"query_lens": (1, 9, 3), "seq_lens": (beyond + 5, beyond + 9, beyond + 14)}
        test = partial(after, _free_what_no_query_sees, spec, **case)
        yield Check(f"freed by the {names[0]}", f"Blocks {names[1]} may hold NaN.", spec, test)


def _nan_stays_in_its_request(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    """All that is cached of the last request is NaN, and the other requests are right."""
    step = target.step(spec, query_lens=(1, 9, 2), seq_lens=(21, 9, 18))
    used = step._table[-1, : -(-step.case.seq_lens[-1] // step.block_size)].long()
    for index in range(2):
        part = step.part_of(step.kv_cache, index)
        part[used.to(step.device)] = math.nan
    done = target.forward(step)
    others = step.batch.query_start_list[-2]
    found = distance(done.output[:others].double().cpu(), step.expected()[0][:others])
    require(math.isfinite(found), "NaN of one request reached the result of another")
    finding = ErrorBound(found, allowed_error(step))
    require(finding.ratio <= 1, "one request's NaN changed the numbers of another")
    return finding


def rows(target: BackendUnderTest) -> list[Check]:
    """Rows without keys, requests without tokens, batches without requests."""
    base = target.base
    table: dict[str, Any] = {
        "no new tokens": (
            "A request may bring no tokens.",
            base,
            {"query_lens": (0, 5, 0), "seq_lens": (9, 7, 0)},
        ),
        "no requests": ("A batch may be empty.", base, {"query_lens": (), "seq_lens": ()}),
        "masked out": (
            "A row is 0 if the mask hides every key from it.", target.spec_with("custom_mask"), {}
        ),
    }  # fmt: skip
    if base.block_size is not None:
        # A request that pads a graph's batch: one token and no keys.
        table["no keys"] = (
            "A request without keys gives 0, and an lse of −inf.",
            target.spec_with("returns_lse") or base,
            {"query_lens": (1, 1, 1), "seq_lens": (7, 0, 18)},
        )
    table["more queries than keys"] = (
        "The first queries see nothing, and are 0.",
        target.spec_with(block_size=None),
        {"query_lens": (5, 3), "seq_lens": (2, 0)},
    )
    return checks_of_cases(target, table)


def memory(target: BackendUnderTest) -> Iterator[Check]:
    """Queries, keys and values may be views; the caller may give the output."""
    base = target.base
    table: dict[str, Any] = {
        f"{how} rows": (
            f"Query, key and value may be {how} views.", base, {"memory": how, "padding": 2}
        )
        for how in MEMORY
        if how != "contiguous"
    }  # fmt: skip
    yield from checks_of_cases(target, table)
    if base.returns_lse or base.output_quant is not None:
        return
    shows = "The result is written to the output that is given, and nowhere else."
    for name, is_part in (("output", False), ("part of an output", True)):
        yield Check(f"{name} given", shows, base, partial(_writes_given, target, is_part))


def _writes_given(target: BackendUnderTest, is_part: bool) -> ErrorBound:
    step = target.step(target.base)
    tokens, *row_shape = step.output_shape
    whole = step.query.new_full((tokens + 4 * is_part, *row_shape), math.nan)
    output = whole[2 : 2 + tokens] if is_part else whole
    done = target.forward(step, output=output)
    require(
        done.output.data_ptr() == output.data_ptr(),
        "an output was given, and forward returned another tensor",
    )
    if is_part:
        around = torch.cat([whole[:2], whole[2 + tokens :]])
        require(bool(around.isnan().all()), "memory around the output was written")
    return target.judge(step, dataclasses.replace(done, returned=output))
