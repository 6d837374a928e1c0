"""The values of each field of a request to try, and which of them a backend declares.

Only the tables here decide what is tried. Both are tested: values that the backend's capabilities
accept, and values that they reject.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_dispatch.conformance.cases import FP8, INT8, SHARD, Case
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import (
    AnyOf,
    ByDevice,
    Capabilities,
    Constraint,
    MultipleOf,
    OneOf,
    Range,
    Reason,
    compare,
)
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.spec import (
    ALIBI_SYMMETRIC,
    OUTPUT_QUANTS,
    AttentionSpec,
    MLADims,
    plain_value,
)
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms.device import DeviceProfile

__all__ = [
    "VALUES",
    "WITHOUT_PROBES",
    "Probe",
    "base_spec",
    "case_for",
    "covering",
    "is_request",
    "probes_for",
    "refusals",
]

#: Sizes of latent attention: small ones, and those of MiniCPM3, DeepSeek-V3 and GLM-4.7-Flash.
_DIMS = tuple(
    MLADims(kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=size_v)
    for rank, nope, rope, size_v in (
        *((32, 24, 16, 40), (64, 24, 16, 40), (128, 40, 32, 24)),
        *((256, 64, 32, 64), (512, 128, 64, 128), (512, 192, 64, 256)),
    )
)
#: With each rank that a backend declares, these sizes of the rotated part are tried.
_ROPE_HEAD_DIMS = (16, 32, 64, 128)

#: Field -> values to try, in addition to those that a backend's declaration names. Pairs use the
#: first that it accepts.
VALUES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "num_heads": (12,),
    "num_kv_heads": (1, 4),
    "head_size": (64, 8, 16, 40, 80, 96, 128, 192, 256),
    "head_size_v": (8, 64, 128),
    "kv_cache_dtype": ("fp8_e4m3", INT8, "fp8", *FP8[1:], "float32", "float16", "bfloat16"),
    "kv_scales": ("per_head",),
    "block_size": (None, 1, 4, 16, 32, 64, 256),
    "kv_cache_layout": ("HND", "NHD"),
    "lengths": ("upper_bound",),
    "attn_type": tuple(AttentionType),
    "causal": (False, True),
    "sliding_window": (5, 1, 10_000),
    "window_size": ((6, 2), (0, 9), (-1, 3), (5, -1)),
    "attention_chunk": (11, 16, 1, 10_000),
    "key_positions": (True,),
    "logits_soft_cap": (1.5, 50.0),
    "alibi": (True, ALIBI_SYMMETRIC),
    "sinks": (True,),
    "kv_sharing": (True,),
    "mla": _DIMS,
    "custom_mask": (True,),
    "bidirectional_ranges": (True,),
    "returns_lse": (True,),
    "output_quant": OUTPUT_QUANTS,
    "batch_invariant": (True,),
    "cuda_graph": (True,),
}

#: Fields without values to try, and why.
WITHOUT_PROBES = {
    "kv_strides": "the group kv_layouts uses the layouts of engines",
}

#: The number of values of a field in pairs, if it is not one; the dtypes take turns instead.
_IN_PAIRS = {"dtype": 0, "kv_cache_dtype": 2, "attn_type": 4, "head_size_v": 1, "alibi": 2}
#: The most features that are tried together: of more, one would hide the effect of another.
_TOGETHER = 7

#: Larger sizes, even if declared, cost memory and show nothing more.
_LARGEST = {"num_heads": 128, "num_kv_heads": 64, "head_size": 576, "head_size_v": 576}
_LARGEST |= {"block_size": 1024, "sliding_window": 1 << 20, "attention_chunk": 1 << 20}

#: The plain layer, which everything is tried on, is the first of these that the backend accepts.
#: The most precise dtypes are first: they show a small error.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "dtype": VALUES["dtype"],
    "attn_type": tuple(AttentionType),
    "causal": (True, False),
    "kv_cache_dtype": ("auto", "float32", "bfloat16", "float16", "fp8", *FP8, INT8),
    "block_size": (16, 32, 64, 128, 256, 1, None),
    "head_size": (32, 64, 128, 16, 96, 256, 80, 48),
}
_HEADS = ((4, 2), (4, 1), (4, 4), (8, 1), (16, 1), (32, 8), (32, 1))
#: The number of plain layers to try: heads and sizes change first, then the fields above them.
_PLAIN_TRIED = 20_000

#: The same for a backend that computes only latent attention, whose sizes come from `mla`.
_PLAIN_LATENT: dict[str, tuple[Any, ...]] = {
    **{name: values for name, values in _PLAIN.items() if name != "head_size"},
    "block_size": (16, 32, 64, 128, 256, 1),
    "num_heads": (4, 16, 8, 32, 64, 128, 1),
}

#: Changes of the plain layer for a value that the backend rejects with it.
_ELSEWHERE: tuple[dict[str, Any], ...] = (
    {"head_size": 128},
    {"block_size": 256},
    {"block_size": None},
    {"dtype": torch.bfloat16},
    {"causal": False},
    {"block_size": 64},
)

_NO_CACHE = {
    "block_size": None,
    "kv_cache_layout": None,
    "kv_cache_dtype": "auto",
    "lengths": "exact",
}
_ANY_LAYER = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_size=64, dtype=torch.float16, block_size=16
)
_ANY_LATENT_LAYER = AttentionSpec.for_mla(
    num_heads=16, dtype=torch.bfloat16, block_size=64, mla=_DIMS[4]
)

#: A decode, a prompt, drafts to verify, no tokens, a chunk, a decode: in no order of phases.
_QUERY_LENS, _SEQ_LENS = (1, 24, 3, 0, 18, 1), (39, 24, 21, 0, 50, 4)
#: By how much the bounds of the requests' keys exceed them, in turn.
_SLACK = (0, 1, 40, 3)
_RANGES = ((1, 3, 17), (1, 19, 24), (4, 30, 47), (2, 15, 21), (0, 2, 39))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A value of a field, with the other fields that it needs.

    Attributes:
        field: the field.
        fields: the changes of the plain layer.
        reasons: why the backend rejects it; empty if it is declared.
    """

    field: str
    fields: Mapping[str, Any]
    reasons: tuple[Reason, ...] = ()

    @property
    def value(self) -> Any:
        """The value of the field."""
        return self.fields[self.field]

    @property
    def name(self) -> str:
        """`sliding_window=5`, or only the field if it is a switch."""
        return self.field if self.value is True else f"{self.field}={plain_value(self.value)}"


def refusals(
    cls: type[AttentionBackend], spec: AttentionSpec, profile: DeviceProfile
) -> list[Reason]:
    """Every reason for which the backend rejects a request, field by field or as a whole."""
    reasons = compare(spec, cls.capabilities, profile)
    return reasons or list(cls.check_combination(spec, profile))


def is_request(spec: AttentionSpec) -> bool:
    """Whether the fields are possible together: no scales without an fp8 cache, for instance."""
    has_cache = spec.block_size is not None
    is_cross = spec.attn_type is AttentionType.ENCODER_DECODER
    has_bounds = spec.lengths == "upper_bound"
    of_cache = (spec.kv_cache_dtype != "auto", spec.kv_cache_layout, spec.kv_sharing, has_bounds)
    return (
        (has_cache or not any((*of_cache, spec.cuda_graph)))
        and (has_cache or not (is_cross or spec.mla is not None))
        and (not has_cache or AttentionType(spec.attn_type).has_kv_cache)
        and (spec.kv_scales == "per_tensor" or spec.kv_cache_dtype.startswith("fp8"))
        and not (is_cross and (spec.kv_sharing or spec.bidirectional_ranges))
        # Without causality or a window, ranges have nothing to widen.
        and not (spec.bidirectional_ranges and not spec.causal and Reach.of(spec) == Reach())
    )


def _changed(spec: AttentionSpec, fields: Mapping[str, Any]) -> AttentionSpec | None:
    """The request with these changes, or None if they are not possible."""
    try:
        changed = spec.replace(**fields)
    except InvalidInputError:
        return None
    return changed if is_request(changed) else None


def _named(constraint: Constraint | None, profile: DeviceProfile) -> Iterator[Any]:
    """The values that a declaration names: those of a set, the ends of a range."""
    if isinstance(constraint, ByDevice):
        chosen = (c for match, c in constraint.cases if match.matches(profile))
        yield from _named(next(chosen, constraint.otherwise), profile)
    elif isinstance(constraint, AnyOf):
        for option in constraint.options:
            yield from _named(option, profile)
    elif isinstance(constraint, OneOf):
        yield from constraint.values
    elif isinstance(constraint, MultipleOf):
        yield from (constraint.factor, constraint.largest or 2 * constraint.factor)
    elif isinstance(constraint, Range):
        yield from (constraint.smallest, constraint.largest)


def _values(field: str, capabilities: Capabilities, profile: DeviceProfile) -> list[Any]:
    if field == "mla":
        return _dims(capabilities, profile)
    limit = _LARGEST.get(field)
    named = _named(capabilities.fields.get(field), profile)
    values = [*VALUES[field], *named]
    return list(dict.fromkeys(v for v in values if limit is None or v is None or v <= limit))


def _dims(capabilities: Capabilities, profile: DeviceProfile) -> list[MLADims]:
    """Sizes of latent attention: those of the table, and others with each rank that is declared."""
    known = _DIMS[1]
    ranks = [r for r in _named(capabilities.fields.get("head_size_v"), profile) if r is not None]
    named = [
        replace(known, kv_lora_rank=rank, qk_rope_head_dim=rope)
        for rank, rope in itertools.product(ranks, _ROPE_HEAD_DIMS)
        if rank <= _LARGEST["head_size_v"] and "mla" in capabilities.fields
    ]
    return list(dict.fromkeys([*_DIMS, *named]))


def _sizes_of(mla: MLADims) -> dict[str, Any]:
    """The fields of a request that follow from these sizes."""
    size = mla.kv_lora_rank + mla.qk_rope_head_dim
    return {"mla": mla, "num_kv_heads": 1, "head_size": size, "head_size_v": mla.kv_lora_rank}


def base_spec(cls: type[AttentionBackend], profile: DeviceProfile) -> AttentionSpec:
    """A plain layer that the backend accepts on this device; of latents if it takes no others.

    It is one that the backend's own kernels compute, if there is one: see `kernel_notes`.

    Raises:
        InvalidInputError: it accepts none that is tried; the message has the reasons.
    """
    fields = cls.capabilities.fields
    is_latent = "mla" in fields and not fields["mla"].accepts(None, _ANY_LAYER, profile)
    like = _ANY_LATENT_LAYER if is_latent else _ANY_LAYER
    options: dict[str, list[Any]] = {}
    for name, values in (_PLAIN_LATENT if is_latent else _PLAIN).items():
        constraint = fields.get(name)
        admitted = [
            value
            for value in (*values, *_named(constraint, profile))
            if constraint is None or constraint.accepts(value, like, profile)
        ]
        options[name] = list(dict.fromkeys(admitted or values))[: 1 if constraint is None else 8]
    if is_latent:
        options["sizes"] = [_sizes_of(mla) for mla in _dims(cls.capabilities, profile)]
    else:
        named = (_named(fields.get(n), profile) for n in ("num_heads", "num_kv_heads"))
        options["sizes"] = [
            {"num_heads": heads, "num_kv_heads": kv_heads, "head_size_v": size_v}
            for heads, kv_heads in (*_HEADS, *itertools.product(*named))
            for size_v in [None, *_named(fields.get("head_size_v"), profile)][:4]
        ]
    accepted = _accepted(cls, profile, like, options)
    if (found := next(accepted, None)) is not None:
        choice, spec = found
        if cls.kernel_notes(spec, profile, None):  # other kernels compute it
            own = {name: [choice[name]] for name in options}
            own |= {name: options[name] for name in ("dtype", "sizes")}
            for _, other in _accepted(cls, profile, like, own):
                if not cls.kernel_notes(other, profile, None):
                    return other
        return spec
    reasons = "; ".join(map(str, refusals(cls, like, profile)))
    raise InvalidInputError(
        f"{cls.get_name()} accepts no plain layer on {profile.name} ({profile.arch}) that could be "
        f"tried. It rejects {like}: {reasons}."
    )


def _accepted(
    cls: type[AttentionBackend],
    profile: DeviceProfile,
    like: AttentionSpec,
    options: dict[str, list[Any]],
) -> Iterator[tuple[dict[str, Any], AttentionSpec]]:
    """Choices of one value of each option, with the layer, that the backend accepts."""
    for values in itertools.islice(itertools.product(*options.values()), _PLAIN_TRIED):
        choice = dict(zip(options, values, strict=True))
        fields = {name: value for name, value in choice.items() if name != "sizes"}
        spec = _changed(like, {**choice["sizes"], **fields})
        if spec is not None and not refusals(cls, spec, profile):
            yield choice, spec


def _companions(field: str, value: Any) -> list[dict[str, Any]]:
    """Other fields that a value may need; the first that the backend accepts with it is used."""
    if field == "mla":
        return [_sizes_of(value)]
    if field == "kv_scales":
        return [{"kv_cache_dtype": name} for name in ("fp8_e4m3", "fp8", *FP8[1:])]
    if field == "attn_type":
        has_cache = AttentionType(value).has_kv_cache
        return [{"causal": None, **({} if has_cache else _NO_CACHE)}]
    # With causality the slopes are signed in any case, and the right side of a window is 0.
    if value == ALIBI_SYMMETRIC or field == "window_size":
        encoder = {"attn_type": AttentionType.ENCODER_ONLY, "causal": None, **_NO_CACHE}
        return [{"causal": False}, {"causal": False, **_NO_CACHE}, encoder]
    if value == "fp8_e4m3_group128":
        return [{}, {"head_size_v": 128}, {"head_size": 128, "head_size_v": None}]
    return [{}]


def probes_for(
    cls: type[AttentionBackend], base: AttentionSpec, profile: DeviceProfile
) -> list[Probe]:
    """Every value of every field that gives a request other than the plain one."""

    def probe(field: str, fields: dict[str, Any]) -> Probe | None:
        spec = _changed(base, fields)
        if spec is None or getattr(spec, field) == getattr(base, field):
            return None
        return Probe(field=field, fields=fields, reasons=tuple(refusals(cls, spec, profile)))

    found = []
    for field in VALUES:
        for value in _values(field, cls.capabilities, profile):
            forms = [{field: value, **companions} for companions in _companions(field, value)]
            forms += [{**other, **forms[0]} for other in _ELSEWHERE if field not in other]
            tried = [one for one in (probe(field, fields) for fields in forms) if one is not None]
            accepted = [one for one in tried if not one.reasons]
            found += (accepted or tried)[:1]
    return found


def covering(
    cls: type[AttentionBackend],
    base: AttentionSpec,
    probes: list[Probe],
    profile: DeviceProfile,
) -> list[tuple[Probe, ...]]:
    """Sets of probes that the backend accepts, which together contain every accepted pair.

    Greedy: each set begins with a pair that is still missing, and adds the probe that gives the
    most missing pairs.
    """
    chosen: list[Probe] = []
    for field in VALUES:
        of_field = [p for p in probes if p.field == field and not p.reasons]
        chosen += of_field[: _IN_PAIRS.get(field, 1)]

    def together(row: tuple[Probe, ...]) -> bool:
        keys = [key for probe in row for key in probe.fields]
        spec = _changed(base, {k: v for probe in row for k, v in probe.fields.items()})
        return len(set(keys)) == len(keys) and spec is not None and not refusals(cls, spec, profile)

    pairs = itertools.combinations(range(len(chosen)), 2)
    left = dict.fromkeys(pair for pair in pairs if together((chosen[pair[0]], chosen[pair[1]])))
    allowed, rows = set(left), []
    while left:
        row = list(next(iter(left)))
        while len(row) < _TOGETHER:
            gains = {
                new: sum(tuple(sorted((new, old))) in left for old in row)
                for new in range(len(chosen))
                if new not in row
                and all(tuple(sorted((new, old))) in allowed for old in row)
                and together(tuple(chosen[i] for i in (*row, new)))
            }
            best = max(gains, key=lambda new: gains[new], default=None)
            if best is None or not gains[best]:
                break
            row.append(best)
        for pair in itertools.combinations(sorted(row), 2):
            left.pop(pair, None)
        rows.append(tuple(chosen[i] for i in sorted(row)))
    return rows


def case_for(spec: AttentionSpec, **changes: Any) -> Case:
    """A step for a layer: requests of every kind, with these fields of Case changed.

    If the requests are too short for the layer's window or for a second block, longer ones are
    added.
    """
    query_lens: tuple[int, ...] = changes.pop("query_lens", _QUERY_LENS)
    seq_lens: tuple[int, ...] = changes.pop("seq_lens", _SEQ_LENS)
    is_mixed = query_lens == _QUERY_LENS
    spans = (spec.sliding_window, *(spec.window_size or ()), spec.attention_chunk)
    window = max((span for span in spans if span is not None and span < 4096), default=0)
    longest = max(window, spec.block_size or 0)
    if is_mixed and longest >= 24:
        query_lens, seq_lens = (*query_lens, 1, 7), (*seq_lens, longest + 9, longest + 20)
    ranges: tuple[tuple[int, int, int], ...] = ()
    if spec.bidirectional_ranges and is_mixed:
        ranges = _RANGES
    if spec.key_positions:  # ranges are of positions
        ranges = tuple((r, SHARD[1] * start, SHARD[1] * end) for r, start, end in ranges)
    new_lens = changes.pop("new_lens", None)
    if new_lens is None and spec.block_size is None:
        new_lens = seq_lens
    elif new_lens is None and spec.attn_type is AttentionType.ENCODER_DECODER:
        # Some bring the encoder's keys; of the others the cache has them.
        new_lens = tuple(n if i % 3 else 0 for i, n in enumerate(seq_lens))
    bounds = None
    # The size of a mask and the positions of keys follow from the lengths, which are exact then.
    needs_exact = spec.custom_mask or spec.key_positions
    if spec.lengths == "upper_bound" and spec.block_size is not None and not needs_exact:
        bounds = tuple(map(operator.add, seq_lens, itertools.cycle(_SLACK)))
    return Case(
        spec=spec,
        query_lens=query_lens,
        seq_lens=seq_lens,
        new_lens=new_lens,
        **{"ranges": ranges, "bounds": bounds, **changes},
    )
