"""Checks of NaN and infinity among the inputs: they make the rows that see them NaN, and no other.

The rule is in docs/numerics.md, and `propagation.free_elements` has the exceptions. For a backend
that declares `propagates_nan = False` there are two checks left: other requests are right, and a
row that sees no key is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from attn_dispatch.conformance.check import BackendUnderTest, Check, skip
from attn_dispatch.conformance.tolerance import ErrorBound, require
from attn_dispatch.interface.spec import INT8_PER_TOKEN_HEAD, AttentionSpec

__all__ = ["non_finite"]

_INF, _NAN = math.inf, math.nan
#: A decode, a prompt, drafts to verify, a chunk over a prefix, and two that stay finite.
_LENS = {"query_lens": (1, 24, 3, 18, 1, 5), "seq_lens": (39, 24, 21, 50, 4, 5)}

_Planted = tuple[tuple[str, int, int, int, float], ...]


def _each(tensor: str, places: tuple[tuple[int, int, int], ...], number: float) -> _Planted:
    return tuple((tensor, *place, number) for place in places)


#: (request, first row, end) of queries: one of each kind of request.
_QUERIES = ((0, 0, 1), (1, 5, 6), (2, 1, 2), (3, 9, 10))
#: Of keys: for the decode one far back, for prompt and chunk one that only later rows see.
_KEYS = ((0, 7, 8), (1, 11, 12), (2, 4, 5), (3, 40, 41))
#: Keys of the prefix, which are in the cache before the step.
_PREFIX = ((2, 0, 1), (3, 3, 4))
#: All keys, and the first ones.
_ALL = ((0, 0, 39), (1, 0, 24), (3, 0, 50))
_FIRST = ((0, 0, 20), (1, 0, 10), (3, 0, 33))

#: Check -> the numbers that it puts among the inputs.
_PLANTED: dict[str, _Planted] = {
    "NaN in queries": _each("query", _QUERIES, _NAN),
    "infinite queries": _each("query", _QUERIES, _INF),
    "NaN in keys": _each("key", _KEYS, _NAN),
    "infinite keys": _each("key", _KEYS, _INF),
    "NaN in keys of the prefix": _each("key", _PREFIX, _NAN),
    "NaN in values": _each("value", _KEYS, _NAN),
    "infinite values": _each("value", _KEYS, -_INF),
    "NaN in values of the prefix": _each("value", _PREFIX, _NAN),
    "all keys infinite": _each("key", _ALL, -_INF),
    "the first keys infinite": _each("key", _FIRST, _INF),
}
#: The checks of layers other than the plain one.
_ELSEWHERE = ("NaN in queries", "NaN in keys", "infinite keys", "NaN in values")
_QUICK = ("NaN in queries", "all keys infinite", "NaN in values")


def non_finite(target: BackendUnderTest) -> Iterator[Check]:
    """NaN and infinity in queries, keys and values of every phase."""
    shows = "A row is NaN if NaN or infinity that it sees makes it so, and no other row is."
    if not target.cls.propagates_nan:
        shows = "NaN and infinity stay in their request."
        reason = (
            f"{target.name} declares propagates_nan = False: only whether NaN and infinity stay in "
            "their request is checked"
        )
        yield Check("declared", "The declaration.", target.base, partial(skip, reason))
    plain = target.spec_with("returns_lse") or target.base
    for name in _QUICK if target.quick else _PLANTED:
        yield _check(target, name, shows, plain, name)
    for kind, spec in _layers(target):
        for name in _QUICK[:1] + _QUICK[2:] if target.quick else _ELSEWHERE:
            yield _check(target, f"{name}, {kind}", shows, spec, name)
    yield from _sees_nothing(target)


def _check(
    target: BackendUnderTest, name: str, shows: str, spec: AttentionSpec, planted: str
) -> Check:
    case: dict[str, Any] = {**_LENS, "planted": _PLANTED[planted]}
    if spec.block_size is None and spec.causal:
        case["new_lens"] = _LENS["seq_lens"]  # without a cache the step brings all keys
    return Check(name, shows, spec, partial(target.agrees, spec, **case))


def _layers(target: BackendUnderTest) -> Iterator[tuple[str, AttentionSpec]]:
    """Declared layers whose kernels may mask or read keys in another way."""
    yield from target.layers("window", "mask", "soft cap", "ALiBi", "no cache", "not causal")
    fields: dict[str, Mapping[str, Any]] = {}
    for probe in target.declared("kv_cache_dtype"):
        if probe.value == INT8_PER_TOKEN_HEAD:
            fields["int8 cache"] = probe.fields
        elif probe.value.startswith("fp8"):
            fields.setdefault("fp8 cache", probe.fields)
    dtypes = {probe.value.itemsize: probe.fields for probe in target.declared("dtype")}
    if target.base.dtype.itemsize > 2 and 2 in dtypes:
        fields["16 bits"] = dtypes[2]
    for kind, changes in fields.items():
        spec = target.base.replace(**changes)
        if spec != target.base:
            yield kind, spec


def _sees_nothing(target: BackendUnderTest) -> Iterator[Check]:
    """Rows that see no key, with NaN in their query: 0, and an lse of −inf."""
    nan_queries: dict[str, tuple[AttentionSpec | None, dict[str, Any]]] = {
        "masked out": (
            target.spec_with("custom_mask", "returns_lse") or target.spec_with("custom_mask"),
            {**_LENS, "planted": (("query", 1, 0, 24, _NAN), ("query", 3, 0, 18, _INF))},
        ),
    }
    lens = {"query_lens": (5, 3), "seq_lens": (2, 0)}
    everywhere = {"planted": (("query", 0, 0, 5, _NAN), ("query", 1, 0, 3, _NAN))}
    no_cache = {"block_size": None}
    nan_queries["more queries than keys"] = (
        target.spec_with("returns_lse", **no_cache) or target.spec_with(**no_cache),
        {**lens, **everywhere},
    )
    if target.base.block_size is not None:
        nan_queries["no keys"] = (
            target.spec_with("returns_lse") or target.base,
            {
                "query_lens": (1, 1, 1),
                "seq_lens": (7, 0, 18),
                "planted": (("query", 1, 0, 1, _NAN),),
            },
        )
    shows = "A row that sees no key is 0, whatever its query holds."
    for name, (spec, case) in nan_queries.items():
        if spec is not None:
            test = partial(_rows_without_keys, target, spec, case)
            yield Check(f"NaN in queries that see no key, {name}", shows, spec, test)


def _rows_without_keys(
    target: BackendUnderTest, spec: AttentionSpec, case: dict[str, Any]
) -> ErrorBound:
    step = target.step(spec, **case)
    sees_nothing = step.expected()[1] == -_INF
    require(bool(sees_nothing.any()), "the step has no row that sees no key")
    return target.run_and_judge(step)
