"""Checks of numbers: every declared value by itself and in pairs, and any finite scale.

Undeclared values, and scales that are not finite, are rejected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from attn_dispatch.conformance.check import BackendUnderTest, Check, Skipped, checks_of_cases
from attn_dispatch.conformance.probes import Probe, covering
from attn_dispatch.conformance.tolerance import (
    CheckFailed,
    ErrorBound,
    require,
    require_rejected,
)
from attn_dispatch.errors import AttnDispatchError
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, kv_cache_shape
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.selection.registry import check_backend_class

__all__ = ["declaration", "lse", "numbers", "pairs", "refused", "scales"]

#: The number of sets of features under `quick`.
_QUICK_SETS = 5

#: Fields that an impl, a builder or a call can be given by hand, declared or not. Sizes and dtypes
#: are left out: a kernel that was not made for them may read anywhere.
_BY_HAND = (
    "causal",
    "attn_type",
    "sliding_window",
    "window_size",
    "attention_chunk",
    "key_positions",
    "logits_soft_cap",
    "alibi",
    "sinks",
    "kv_sharing",
    "custom_mask",
    "bidirectional_ranges",
    "returns_lse",
    "kv_scales",
    "kv_cache_layout",
    "lengths",
    "output_quant",
)


#: Multiples of head_size ** -0.5. With the large ones a row is nearly the value of one key.
_FACTORS = {
    "0": 0.0,
    "negative": -0.8,
    "large and negative": -12.0,
    "tiny": 1e-30,
    "large": 12.0,
}
_QUICK_FACTORS = ("0", "negative")
_REJECTED_SCALES = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}


def declaration(target: BackendUnderTest) -> Iterator[Check]:
    """The class of the backend."""
    base = target.base
    yield Check("is a backend", "The class has all its parts.", base, partial(_is_backend, target))
    if base.block_size is not None:
        shows = "Its cache is the one that all backends share."
        yield Check("the common cache", shows, base, partial(_has_common_cache, target))
    if target.declared("output_quant"):
        shows = "The impl supports the quantized outputs that are declared."
        yield Check("quantized outputs", shows, base, partial(_supports_quants, target))


def _is_backend(target: BackendUnderTest) -> None:
    problems = check_backend_class(target.cls)
    require(not problems, "; ".join(problems))


def _has_common_cache(target: BackendUnderTest) -> None:
    is_latent = target.base.mla is not None
    wanted = (3, 16, 64) if is_latent else kv_cache_shape(3, 16, 2, 64)
    found = tuple(target.cls.get_kv_cache_shape(3, 16, 1 if is_latent else 2, 64))
    require(
        found == wanted,
        f"get_kv_cache_shape gives {found}, and all backends share one cache of {wanted}",
    )
    order = tuple(target.cls.get_kv_cache_stride_order())
    orders = [(0, 1, 2)] if is_latent else [*STRIDE_ORDERS.values()]
    require(
        order in orders,
        f"get_kv_cache_stride_order gives {order}, which is none of {orders}",
    )


def _supports_quants(target: BackendUnderTest) -> None:
    for probe in target.declared("output_quant"):
        impl = target.step(target.base.replace(**probe.fields)).impl_of(target.cls)
        require(
            impl.fused_output_quant_supported(probe.value),
            f"output_quant={probe.value} is declared, but fused_output_quant_supported is False",
        )


def numbers(target: BackendUnderTest) -> Iterator[Check]:
    """The plain layer, and every declared value by itself."""
    base = target.base

    def check(name: str, spec: AttentionSpec, **case: Any) -> Check:
        test = partial(target.agrees, spec, **case)
        return Check(name, f"{name} gives the oracle's result.", spec, test)

    yield check("plain", base)
    seen: set[str] = set()
    for probe in target.probes:
        # The two kinds of ALiBi are features of their own.
        kind = probe.name if probe.field == "alibi" else probe.field
        if not probe.reasons and not (target.quick and kind in seen):
            seen.add(kind)
            yield check(probe.name, base.replace(**probe.fields))
    if not target.quick:
        yield check("long requests", base, query_lens=(1, 70, 3, 1), seq_lens=(700, 300, 513, 1025))


def pairs(target: BackendUnderTest) -> Iterator[Check]:
    """Sets of features that together contain every declared pair; the dtypes take turns."""
    dtypes = [target.base.dtype, *(probe.value for probe in target.declared("dtype"))]
    rows = covering(target.cls, target.base, list(target.probes), target.profile)
    shows = "These features together give the oracle's result."
    for index, row in enumerate(rows[:_QUICK_SETS] if target.quick else rows):
        fields = {name: value for probe in row for name, value in probe.fields.items()}
        spec = target.base.replace(**fields)
        other = spec.replace(dtype=dtypes[index % len(dtypes)])
        spec = other if target.accepts(other) else spec
        names = [*(probe.name for probe in row), str(spec.dtype).removeprefix("torch.")]
        yield Check("+".join(names), shows, spec, partial(target.agrees, spec))


def lse(target: BackendUnderTest) -> list[Check]:
    """The log-sum-exp, where it is declared."""
    spec = partial(target.spec_with, "returns_lse")
    of_scores = "The lse is that of the scores after soft cap and ALiBi."
    table: dict[str, tuple[str, AttentionSpec | None, dict[str, Any]]] = {
        "natural logarithm": ("The lse is the natural logarithm.", spec(), {}),
        "sinks left out": ("The lse leaves sinks out.", spec("sinks"), {}),
        "after cap and bias": (of_scores, spec("logits_soft_cap", "alibi"), {}),
        "blind rows": ("The lse of a row that sees no key is −inf.", spec("custom_mask"), {}),
    }
    return checks_of_cases(target, table)


def scales(target: BackendUnderTest) -> Iterator[Check]:
    """0, negative, tiny and large scales, with the features that change how scores are computed."""
    others = target.layers("soft cap", "window", "ALiBi", "sinks", "mask", "no cache", "lse")
    shows = "Any finite scale gives the oracle's result."
    for kind, spec in [("", target.base), *others]:
        for name in _QUICK_FACTORS if target.quick or kind else _FACTORS:
            test = partial(_agrees_with_scale, target, spec, _FACTORS[name])
            yield Check(f"{name}, {kind}" if kind else name, shows, spec, test)
    shows = "The impl's constructor rejects a scale that is not finite."
    for name, scale in _REJECTED_SCALES.items():
        rejects = partial(_rejects_scale, target, scale)
        yield Check(f"{name} is rejected", shows, target.base, rejects)


def _agrees_with_scale(target: BackendUnderTest, spec: AttentionSpec, factor: float) -> ErrorBound:
    step = target.step(spec)
    step.scale = factor * step.default_scale
    return target.run_and_judge(step)


def _rejects_scale(target: BackendUnderTest, scale: float) -> None:
    step = target.step(target.base)
    step.scale = scale
    require_rejected(
        partial(step.impl_of, target.cls),
        f"scale={scale} was accepted: every score would be NaN or infinite. AttentionImpl.__init__ "
        "rejects it with an InvalidInputError; call it",
    )


def refused(target: BackendUnderTest) -> Iterator[Check]:
    """Undeclared values, asked for by hand: they are rejected or right, and never dropped."""
    seen: set[str] = set()
    for probe in target.probes:
        if not probe.reasons or probe.field not in _BY_HAND:
            continue
        if target.quick and probe.field in seen:
            continue
        seen.add(probe.field)
        yield Check(
            probe.name,
            f"{probe.name}, which is not declared, is rejected also by hand, or right.",
            target.base.replace(**probe.fields),
            partial(_rejects, target, probe),
        )


def _rejects(target: BackendUnderTest, probe: Probe) -> ErrorBound | None:
    try:
        return target.agrees(target.base.replace(**probe.fields))
    except (AttnDispatchError, Skipped):
        return None
    except CheckFailed as wrong:
        raise CheckFailed(
            f"{probe.name} is not declared, and by hand it is neither rejected nor right: {wrong}. "
            "Reject it in the constructor of the impl or of the builder",
            wrong.finding,
        ) from wrong
