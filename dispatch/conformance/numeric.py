"""Checks of numbers: every declared value alone, in pairs; and what is not declared is refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from attn_dispatch.conformance.check import BackendUnderTest, Check, Skipped
from attn_dispatch.conformance.probes import Probe, covering, refusals
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound, require
from attn_dispatch.errors import AttnDispatchError
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, kv_cache_shape
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.selection.registry import check_backend_class

__all__ = ["declaration", "lse", "numbers", "pairs", "refused"]

#: So many sets of features under `quick`.
_QUICK_SETS = 5

#: Fields that an impl, a builder or a call can be given by hand, past what is declared. Sizes and
#: dtypes are left out: a kernel that was not made for them may read anywhere.
_BY_HAND = (
    "causal",
    "attn_type",
    "sliding_window",
    "logits_soft_cap",
    "alibi",
    "sinks",
    "kv_sharing",
    "custom_mask",
    "bidirectional_ranges",
    "returns_lse",
    "kv_scales",
    "kv_cache_layout",
    "output_quant",
)


def declaration(target: BackendUnderTest) -> Iterator[Check]:
    """What a backend says of itself."""
    cls, base = target.cls, target.base

    def is_backend() -> None:
        problems = check_backend_class(cls)
        require(not problems, "; ".join(problems))

    def has_common_cache() -> None:
        found = cls.get_kv_cache_shape(3, 16, 2, 64)
        require(
            tuple(found) == kv_cache_shape(3, 16, 2, 64),
            f"get_kv_cache_shape gives {found}, and all backends share one cache of "
            f"{kv_cache_shape(3, 16, 2, 64)}",
        )
        order = tuple(cls.get_kv_cache_stride_order())
        require(
            order in STRIDE_ORDERS.values(),
            f"get_kv_cache_stride_order gives {order}, which is neither NHD nor HND",
        )

    def says_yes_to_quants() -> None:
        for probe in target.declared("output_quant"):
            spec = base.replace(**probe.fields)
            impl = target.step(spec).impl_of(cls)
            require(
                impl.fused_output_quant_supported(probe.value),
                f"output_quant={probe.value} is declared, and fused_output_quant_supported says no",
            )

    yield Check("declaration", "is a backend", "The class has all its parts.", base, is_backend)
    if base.block_size is not None:
        yield Check(
            "declaration",
            "the common cache",
            "Its cache is the one that all backends share.",
            base,
            has_common_cache,
        )
    if target.declared("output_quant"):
        yield Check(
            "declaration",
            "quantized outputs",
            "The impl says yes to the quantized outputs that are declared.",
            base,
            says_yes_to_quants,
        )


def numbers(target: BackendUnderTest) -> Iterator[Check]:
    """The plain layer, and every declared value alone."""
    base = target.base
    shows = "{} gives what the oracle gives."

    def check(name: str, spec: AttentionSpec, **case: Any) -> Check:
        return Check(
            "numbers", name, shows.format(name), spec, partial(target.agrees, spec, **case)
        )

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
    """Sets of features that among them hold every declared pair; the dtypes take turns."""
    dtypes = [target.base.dtype, *(probe.value for probe in target.declared("dtype"))]
    rows = covering(target.cls, target.base, list(target.probes), target.profile)
    for index, row in enumerate(rows[:_QUICK_SETS] if target.quick else rows):
        fields = {name: value for probe in row for name, value in probe.fields.items()}
        spec = target.base.replace(**fields)
        other = spec.replace(dtype=dtypes[index % len(dtypes)])
        if not refusals(target.cls, other, target.profile):
            spec = other
        names = [probe.name for probe in row]
        yield Check(
            "pairs",
            "+".join([*names, str(spec.dtype).removeprefix("torch.")]),
            "These features together give what the oracle gives.",
            spec,
            partial(target.agrees, spec),
        )


def lse(target: BackendUnderTest) -> Iterator[Check]:
    """The log-sum-exp, where it is declared."""
    table = {
        "natural logarithm": ("The lse is the natural logarithm.", ("returns_lse",)),
        "sinks left out": ("The lse leaves sinks out.", ("returns_lse", "sinks")),
        "after cap and bias": (
            "The lse is of the scores after soft cap and ALiBi.",
            ("returns_lse", "logits_soft_cap", "alibi"),
        ),
        "blind rows": (
            "The lse of a row that sees no key is −inf.",
            ("returns_lse", "custom_mask"),
        ),
    }
    for name, (shows, fields) in table.items():
        spec = target.spec_with(*fields)
        if spec is not None:
            yield Check("lse", name, shows, spec, partial(target.agrees, spec))


def refused(target: BackendUnderTest) -> Iterator[Check]:
    """What is not declared, asked for by hand: it is refused, or computed; never dropped."""
    seen: set[str] = set()
    for probe in target.probes:
        if not probe.reasons or probe.field not in _BY_HAND:
            continue
        if target.quick and probe.field in seen:
            continue
        seen.add(probe.field)
        yield Check(
            "refusals",
            probe.name,
            f"{probe.name}, which is not declared, is refused also by hand, or computed right.",
            target.base.replace(**probe.fields),
            partial(_refuses, target, probe),
        )


def _refuses(target: BackendUnderTest, probe: Probe) -> ErrorBound | None:
    step = target.step(target.base.replace(**probe.fields))
    try:
        done = target.forward(step)
        return target.judge(step, done)
    except (AttnDispatchError, Skipped):
        return None
    except CheckFailed as wrong:
        raise CheckFailed(
            f"{probe.name} is not declared, and by hand it is neither refused nor right: {wrong}. "
            "Refuse it where the impl is made (refuse_features), or where the builder is",
            wrong.finding,
        ) from wrong
