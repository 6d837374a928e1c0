"""Checks that a changed input changes the output; and that nothing else reaches it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from attn_dispatch.conformance.cases import MEMORY, Step
from attn_dispatch.conformance.check import (
    BackendUnderTest,
    Check,
    checks_of_cases,
    replaced,
    skip_unless,
)
from attn_dispatch.conformance.kv_encoding import as_stored
from attn_dispatch.conformance.tolerance import ErrorBound, allowed_error, distance, require
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["garbage", "inputs", "memory", "rows"]


def _drop(**fields: Any) -> Callable[[Step], None]:
    """Take a feature of the layer away, its tensors too."""

    def change(step: Step) -> None:
        replaced(step, **fields)
        if "alibi" in fields:
            step.slopes = None
        if "sinks" in fields:
            step.sinks = None
        if "custom_mask" in fields:
            step.masks = None
        if "bidirectional_ranges" in fields:
            step.case = step.case.replace(ranges=())
        step.batch = step._make_batch()

    return change


def _double_slopes(step: Step) -> None:
    assert step.slopes is not None
    step.slopes = [2 * slope for slope in step.slopes]


def _raise_sinks(step: Step) -> None:
    assert step.sinks is not None
    step.sinks.add_(1.5)


def _double_scale(step: Step) -> None:
    step.scale *= 2


def _flip_masks(step: Step) -> None:
    assert step.masks is not None
    step.masks = [~mask for mask in step.masks]
    step.batch = step._make_batch()


def _move_ranges(step: Step) -> None:
    moved = tuple((request, start + 2, end) for request, start, end in step.case.ranges)
    step.case = step.case.replace(ranges=moved)
    step.batch = step._make_batch()


def _double_cache_scale(index: int) -> Callable[[Step], None]:
    """What is stored means twice as much; the step brings nothing new, so all of it is stored."""

    def change(step: Step) -> None:
        scales = [step.layer._k_scale, step.layer._v_scale]
        scales[index] = 2 * scales[index]
        step.set_scales(*scales)
        if index == 0:
            step.keys = [2 * key for key in step.keys]
        else:
            step.values = [2 * value for value in step.values]

    return change


def _change_cached(index: int) -> Callable[[Step], None]:
    """Another key (0) or value (1) at position 2 of the first request, which has a past."""

    def change(step: Step) -> None:
        assert step.kv_cache is not None
        assert step._table is not None
        assert step.spec.block_size is not None
        meant = (step.keys, step.values)[index][0]
        meant[2] = -3 * meant[2]
        block, offset = int(step._table[0, 2 // step.spec.block_size]), 2 % step.spec.block_size
        row = as_stored(meant[2], torch.ones(()), step.kv_cache.dtype)
        step.kv_cache[block, index, offset, :, : row.shape[-1]] = row.to(step.device)
        meant[2] = row.double()

    return change


#: Input -> the fields that it needs, how it is changed, and whether the impl is made anew for it.
#: One that is not is kept: nothing of an earlier call may stick to it.
_INPUTS: dict[str, tuple[tuple[str, ...], Callable[[Step], None], bool]] = {
    "logits_soft_cap on and off": (("logits_soft_cap",), _drop(logits_soft_cap=None), True),
    "sliding_window on and off": (("sliding_window",), _drop(sliding_window=None), True),
    "alibi on and off": (("alibi",), _drop(alibi=False), True),
    "sinks on and off": (("sinks",), _drop(sinks=False), True),
    "custom_mask on and off": (("custom_mask",), _drop(custom_mask=False), True),
    "bidirectional_ranges on and off": (
        ("bidirectional_ranges",),
        _drop(bidirectional_ranges=False),
        True,
    ),
    "slopes": (("alibi",), _double_slopes, True),
    "sinks, in place": (("sinks",), _raise_sinks, False),
    "scale": ((), _double_scale, True),
    "mask": (("custom_mask",), _flip_masks, False),
    "ranges": (("bidirectional_ranges",), _move_ranges, False),
}
#: The same for steps that bring no keys, over what the cache holds.
_CACHED: dict[str, tuple[tuple[str, ...], Callable[[Step], None], bool]] = {
    "cached key": ((), _change_cached(0), False),
    "cached value": ((), _change_cached(1), False),
    "k_scale": (("kv_cache_dtype",), _double_cache_scale(0), False),
    "v_scale": (("kv_cache_dtype",), _double_cache_scale(1), False),
    "k_scale of each head": (("kv_scales",), _double_cache_scale(0), False),
    "v_scale of each head": (("kv_scales",), _double_cache_scale(1), False),
}


def inputs(target: BackendUnderTest) -> Iterator[Check]:
    """Each input that has an effect, changed: the output changes, and is right both times."""
    for table, brings_keys in ((_INPUTS, True), (_CACHED, False)):
        for name, (fields, change, is_anew) in table.items():
            spec = _layer_with(target, fields)
            if spec is None or (not brings_keys and spec.block_size is None):
                continue
            if name.startswith("cached") and spec.kv_cache_dtype != "auto":
                continue  # another value would have to be stored by a scale
            make = partial(target.step, spec, brings_keys=brings_keys)
            yield Check(
                "inputs",
                name,
                f"The output depends on it: {name}.",
                spec,
                partial(_has_effect, target, make, change, is_anew),
            )


def _layer_with(target: BackendUnderTest, fields: tuple[str, ...]) -> AttentionSpec | None:
    """The plain layer with these fields; of the types of a cache, one that has scales."""
    if fields != ("kv_cache_dtype",):
        return target.spec_with(*fields)
    probes = (p for p in target.declared(*fields) if p.value.startswith("fp8"))
    return next((target.base.replace(**probe.fields) for probe in probes), None)


def _has_effect(
    target: BackendUnderTest,
    make: Callable[[], Step],
    change: Callable[[Step], None],
    is_anew: bool,
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
    second = target.forward(step, impl=None if is_anew else impl)
    after = second.output.double().cpu()
    require(
        distance(after[: len(wanted_before)], before[: len(wanted_before)]) > effect / 4,
        "the input was changed, and the output did not change: it has no effect",
    )
    again = target.judge(step, second)
    return max(finding, again, key=lambda found: found.ratio)


# Garbage: what belongs to no request.


def _stale(step: Step) -> None:
    """In place of NaN, what an earlier request may have left: numbers like any other."""
    assert step.kv_cache is not None
    random = torch.Generator().manual_seed(1)
    left = 4 * torch.randn(step.kv_cache.shape, generator=random)
    left = left.to(step.device, step.kv_cache.dtype)
    step.kv_cache = torch.where(step.kv_cache.isnan(), left, step.kv_cache)


def _free_what_the_window_passed(step: Step) -> None:
    spec, cache, table = step.spec, step.kv_cache, step._table
    assert spec.sliding_window is not None
    assert spec.block_size is not None
    assert cache is not None
    assert table is not None
    for request, (query, seq) in enumerate(
        zip(step.case.query_lens, step.case.seq_lens, strict=True)
    ):
        first_seen = max(0, seq - query - spec.sliding_window + 1)
        cache[table[request, : first_seen // spec.block_size].long().to(cache.device)] = math.nan


def _nan_in_padding(step: Step) -> None:
    for tensor in (step.query, step.key, step.value):
        if tensor is not None:
            tensor[len(tensor) - step.case.padding :] = math.nan


def _nan_of_another(step: Step) -> None:
    """The last request's cached values are NaN; what it gives itself is its own affair."""
    assert step.kv_cache is not None
    assert step._table is not None
    assert step.spec.block_size is not None
    used = -(-step.case.seq_lens[-1] // step.spec.block_size)
    step.kv_cache[step._table[-1, :used].long().to(step.device), 1] = math.nan


def garbage(target: BackendUnderTest) -> Iterator[Check]:
    """What belongs to no request of the step, or not to this one, does not reach its result."""
    base = target.base
    padded = partial(target.step, base, padding=3)

    def after(make: Callable[[], Step], change: Callable[[Step], None]) -> ErrorBound:
        step = make()
        change(step)
        return target.judge(step, target.forward(step))

    def check(
        name: str, shows: str, test: Callable[[], ErrorBound | None], spec: AttentionSpec = base
    ) -> Check:
        return Check("garbage", name, shows, spec, test)

    yield check(
        "rows past the batch",
        "Rows of query, key and value beyond the batch's tokens may be NaN.",
        partial(after, padded, _nan_in_padding),
    )
    if base.block_size is None:
        return
    yield check(
        "NaN past a request's end",
        "The cache may hold NaN past a request's last key and in free blocks, and the block table "
        "nonsense past its last block.",
        partial(target.agrees, base),
    )
    plain = target.spec_with(kv_cache_dtype="auto")
    if plain is not None:
        yield check(
            "stale keys past a request's end",
            "Keys that an earlier request left past a request's end are not read.",
            partial(after, partial(target.step, plain), _stale),
            plain,
        )
        yield check(
            "NaN of another request",
            "NaN among the values of one request stays with it.",
            partial(_keeps_apart, target, plain),
            plain,
        )
        window = target.spec_with("sliding_window", kv_cache_dtype="auto")
        if window is not None and window.causal:
            yield check(
                "freed by the window",
                "Blocks that a sliding window has passed may hold NaN.",
                partial(
                    after,
                    partial(
                        target.step, window, query_lens=(1, 9, 3), seq_lens=_past_window(window)
                    ),
                    _free_what_the_window_passed,
                ),
                window,
            )


def _past_window(spec: AttentionSpec) -> tuple[int, ...]:
    assert spec.sliding_window is not None
    assert spec.block_size is not None
    beyond = spec.sliding_window + 2 * spec.block_size
    return (beyond + 5, beyond + 9, beyond + 14)


def _keeps_apart(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    lens = {"query_lens": (1, 9, 2), "seq_lens": (21, 9, 18)}
    step = target.step(spec, **lens)
    _nan_of_another(step)
    done = target.forward(step)
    others = step.batch.query_start_list[-2]
    expected = step.expected()[0][:others]
    found = distance(done.output[:others].double().cpu(), expected)
    require(math.isfinite(found), "NaN of one request reached the result of another")
    finding = ErrorBound(found, allowed_error(step))
    require(finding.ratio <= 1, "one request's NaN changed the numbers of another")
    return finding


def rows(target: BackendUnderTest) -> Iterator[Check]:
    """Rows without keys, requests without tokens, batches without requests."""
    base, masked = target.base, target.spec_with("custom_mask")
    table: dict[str, Any] = {
        "no new tokens": (
            "A request may bring no tokens.",
            base,
            {"query_lens": (0, 5, 0), "seq_lens": (9, 7, 0)},
        ),
        "no requests": ("A batch may be empty.", base, {"query_lens": (), "seq_lens": ()}),
        "masked out": ("A row that the mask hides everything from is 0.", masked, {}),
    }
    if base.block_size is None:
        table["more queries than keys"] = (
            "The first queries see nothing, and are 0.",
            base,
            {"query_lens": (5, 3), "seq_lens": (2, 0)},
        )
    else:
        # A request that pads a graph's batch: one token and no keys.
        table["no keys"] = (
            "A request without keys gives 0, and an lse of −inf.",
            target.spec_with("returns_lse") or base,
            {"query_lens": (1, 1, 1), "seq_lens": (7, 0, 18)},
        )
        no_cache = target.spec_with(block_size=None)
        table["more queries than keys"] = (
            "The first queries see nothing, and are 0.",
            no_cache,
            {"query_lens": (5, 3), "seq_lens": (2, 0)},
        )
    yield from checks_of_cases(target, "rows", table)


def memory(target: BackendUnderTest) -> Iterator[Check]:
    """Queries, keys and values may lie in memory as an engine's do; the output goes where asked."""
    base = target.base
    yield from checks_of_cases(
        target,
        "memory",
        {
            f"{how} rows": (
                f"Query, key and value may be {how} views.", base, {"memory": how, "padding": 2}
            )
            for how in MEMORY
            if how != "contiguous"
        },
    )  # fmt: skip

    def given(in_part: bool) -> ErrorBound:
        step = target.step(base)
        tokens = len(step.query)
        shape = (tokens + 4 * in_part, base.num_heads, base.head_size_v)
        whole = torch.full(shape, math.nan, dtype=base.dtype, device=target.device)
        output = whole[2 : 2 + tokens] if in_part else whole
        done = target.forward(step, output=output)
        require(
            done.output.data_ptr() == output.data_ptr(),
            "an output was given, and forward returned another tensor",
        )
        if in_part:
            around = torch.cat([whole[:2], whole[2 + tokens :]])
            require(bool(around.isnan().all()), "what lies around the output was written")
        return target.judge(step, dataclasses.replace(done, returned=output))

    if not base.returns_lse and base.output_quant is None:
        for name, in_part in (("output", False), ("part of an output", True)):
            yield Check(
                "memory",
                f"{name} given",
                "The result is written to the output that is given, and nowhere else.",
                base,
                partial(given, in_part),
            )
