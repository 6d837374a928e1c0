"""Checks of caches with the layouts of engines: read, written in place, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from attn_dispatch.conformance.check import BackendUnderTest, Check
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.latent_layouts import latent_layouts
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound, require, worst_of
from attn_dispatch.conformance.unchanged import memory_of
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.kv_layout_table import KV_LAYOUTS, KVLayout
from attn_dispatch.interface.kv_view import KVCache, keys_and_values, parts_of
from attn_dispatch.interface.quantization import as_indexable_bytes
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["engine_cache_of", "kv_layouts", "memories_of"]

#: Bytes around an engine's memory, and what they and all unused elements hold: NaN, in every type
#: that has one of these bits.
_MARGIN, _UNUSED = 256, 0xFF

#: Steps of prompts and chunks, of decodes, and of every kind.
_STEPS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "prefill": ((24, 18), (24, 50)),
    "decode": ((1, 1, 1), (39, 4, 17)),
    "mixed": ((1, 24, 3, 0, 18, 1), (39, 24, 21, 0, 50, 4)),
}


def kv_layouts(target: BackendUnderTest) -> Iterator[Check]:
    """Over the layouts of engines: those that are declared work, and the others are rejected."""
    base = target.base
    if base.mla is not None:
        yield from latent_layouts(target)
        return
    if base.block_size is None:
        return
    layouts = list(KV_LAYOUTS.values())
    kinds = {"": base}
    if target.quick:
        layouts = list({layout.form: layout for layout in reversed(layouts)}.values())[::-1]
    for probe in target.declared("kv_cache_dtype")[: 1 if target.quick else None]:
        if base.replace(**probe.fields).kv_cache_dtype.startswith(("fp8", "int8")):
            kinds[f", {probe.value}"] = base.replace(**probe.fields)
    for probe in target.declared("head_size_v")[:1]:
        kinds[f", {probe.name}"] = base.replace(**probe.fields)
    shows = (
        "Over this layout the results and the values that are written are as over the library's "
        "own, and no other byte changes."
    )
    for layout in layouts:
        for kind, spec in kinds.items():
            laid = _laid(layout, spec)
            if laid is None:
                continue
            if target.accepts(laid):
                test = partial(_works, target, laid, layout)
                yield Check(f"{layout.name}{kind}", shows, laid, test)
            elif not kind:
                refused = "A cache with this layout is rejected, and not written."
                rejected = partial(_is_rejected, target, layout)
                yield Check(f"refused, {layout.name}", refused, laid, rejected)


def _laid(layout: KVLayout, spec: AttentionSpec) -> AttentionSpec | None:
    """The layer over this layout; None if the engine has no such cache."""
    try:
        return spec.replace(kv_strides=layout.strides_for(spec))
    except InvalidInputError:
        return None


def engine_cache_of(
    layout: KVLayout, step: EngineStep, contents: torch.Tensor, *, min_cache_bytes: int = 0
) -> KVCache:
    """A cache with an engine's layout and these contents, in memory that is NaN otherwise.

    Args:
        layout: the layout.
        step: the step that it is for.
        contents: a cache with the library's own layout.
        min_cache_bytes: its allocations have at least this size.
    """
    found = layout.allocate(
        step.spec, len(contents), contents.device, margin_bytes=_MARGIN, arch=step.arch
    )
    for part in parts_of(found):
        if part.untyped_storage().nbytes() < min_cache_bytes:
            part.untyped_storage().resize_(min_cache_bytes)
    for memory in memories_of(found):
        memory.fill_(_UNUSED)
    for part, own in zip(keys_and_values(found), keys_and_values(contents), strict=True):
        as_indexable_bytes(part).copy_(as_indexable_bytes(own)[..., : part.shape[-1]])
    return found


def memories_of(kv_cache: KVCache) -> list[torch.Tensor]:
    """All bytes of each allocation that a cache is in."""
    found = {part.untyped_storage().data_ptr(): part for part in parts_of(kv_cache)}
    return [memory_of(part) for part in found.values()]


def _works(target: BackendUnderTest, spec: AttentionSpec, layout: KVLayout) -> ErrorBound:
    names = ("mixed",) if target.quick else tuple(_STEPS)
    return worst_of(_step_works(target, spec, layout, *_STEPS[name]) for name in names)


def _step_works(
    target: BackendUnderTest,
    spec: AttentionSpec,
    layout: KVLayout,
    query_lens: tuple[int, ...],
    seq_lens: tuple[int, ...],
) -> ErrorBound:
    step = target.step(spec, query_lens=query_lens, seq_lens=seq_lens)
    make = partial(engine_cache_of, layout, step, min_cache_bytes=target.min_cache_bytes)
    given = make(step.kv_cache)
    done = target.forward(step, given)
    finding = target.judge(step, done)
    expected = make(target.forward(step).cache)
    require(
        _is_same(memories_of(given), memories_of(expected)),
        f"over the layout {layout.name}, other bytes are written than over the library's own, or "
        "outside of the cache",
    )
    return finding


def _is_rejected(target: BackendUnderTest, layout: KVLayout) -> None:
    step = target.step(target.base)
    given = engine_cache_of(layout, step, step.kv_cache)
    before = [memory.clone() for memory in memories_of(given)]
    try:
        step.forward(target.cls, given)
    except (UnsupportedError, InvalidInputError):
        pass
    else:
        raise CheckFailed(f"a cache of the layout {layout.name} is not declared, and not rejected")
    require(
        _is_same(before, memories_of(given)),
        f"a cache of the layout {layout.name} was rejected after it was written",
    )


def _is_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))
