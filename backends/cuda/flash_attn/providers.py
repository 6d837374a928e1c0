"""The packages that contain FlashAttention: what each supports, and how each is called.

FlashAttention 2, 3 and 4 come under several names, each with its own functions and limits. Each is
a `Provider` here: its limits as capabilities, so that a message can name them, and the function of
`adapters.py` that calls it. Selection and the builder both ask `pick_provider`, so they always
agree; it imports nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.cuda.flash_attn.adapters import (
    Binder,
    Functions,
    bind_flash_attn_2,
    bind_flash_attn_3,
    bind_flash_attn_4,
    bind_vllm,
)
from attn_dispatch.backends.cuda.flash_attn.windows import computes_window
from attn_dispatch.backends.packages import load_functions
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.capability import (
    ANY,
    AnyOf,
    Capabilities,
    Constraint,
    MultipleOf,
    OneOf,
    Range,
    Reason,
    ReasonCode,
    SameAs,
    Strides,
    compare,
)
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC, AttentionSpec
from attn_dispatch.interface.types import LENGTHS, AttentionType
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import error_of

__all__ = [
    "PROVIDERS",
    "Provider",
    "declared_fields",
    "pick_provider",
    "rejections",
    "require_provider",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Provider:
    """A package that contains FlashAttention.

    Attributes:
        name: its name in messages.
        generation: 2, 3 or 4.
        imports: the modules that must be importable; the functions come from the first one.
        functions: which functions.
        optional: functions that not every release has.
        bind: translates calls into the package's arguments.
        capabilities: what it accepts, field by field, and where.
        reads_past_rows: TMA loads rows (not pages) in whole tiles, including what follows a
            request's last row. A NaN there times a weight of zero is NaN. So requests with the same
            number of keys get one more dimension, beyond whose end TMA reads zeros. A provider
            without this property pads the last tile of each request with zeros itself.
        takes_pages_of_one: rows can be passed as pages of one row each, for requests of any
            lengths. Those are loaded one by one, up to a request's last.
        gathers: rows were measured to be faster than pages, copying included.
    """

    name: str
    generation: int
    imports: tuple[str, ...]
    functions: tuple[str, ...]
    optional: tuple[str, ...] = ()
    bind: Binder
    capabilities: Capabilities
    reads_past_rows: bool = True
    takes_pages_of_one: bool = False
    gathers: bool = False

    def runs_on(self, device: DeviceProfile) -> bool:
        """Whether it supports the device."""
        return any(match.matches(device) for match in self.capabilities.devices)

    def load(self) -> Functions:
        """Import its functions.

        Raises:
            BackendFailure: it cannot be imported, or lacks a function.
        """
        names = (self.imports, self.functions, self.optional)
        return load_functions(self.name, "FLASH_ATTN", *names)


_BOTH = OneOf(True, False)


def _block_sizes(constraint: Constraint) -> dict[str, Constraint]:
    return {"block_size": AnyOf(OneOf(None), constraint)}  # without a cache, None


def _nvidia(first: tuple[int, int], last: tuple[int, int] | None = None) -> DeviceMatch:
    return DeviceMatch(vendor="nvidia", min_capability=first, max_capability=last)


_AMPERE_ON, _HOPPER = (_nvidia((8, 0)),), (_nvidia((9, 0), (9, 0)),)
_FOR_4 = (*_HOPPER, _nvidia((10, 0), (11, 9)))


#: What all of them accept.
_COMMON: dict[str, Constraint] = {
    "num_heads": ANY,
    "num_kv_heads": ANY,
    "dtype": OneOf(torch.bfloat16, torch.float16),
    "kv_cache_dtype": OneOf("auto", "bfloat16", "float16"),
    "kv_cache_layout": OneOf(None, "NHD", "HND"),
    "kv_strides": Strides(aligned=True),
    "lengths": OneOf(*LENGTHS),
    "attn_type": OneOf(*AttentionType),
    "causal": _BOTH,
    "sliding_window": ANY,
    "window_size": ANY,
    "logits_soft_cap": ANY,
    "kv_sharing": _BOTH,
    "returns_lse": _BOTH,
}
# Pages whose size is a multiple of a tile of 64 keys or more are loaded by TMA, whole, with what
# follows a request's last key. So those of FlashAttention 3 and 4 must be smaller.
_SMALL_PAGES = _block_sizes(Range(1, 63))
_SMALL_PAGES_OF_16 = _block_sizes(MultipleOf(16, largest=48))

_FIELDS_2 = _COMMON | {
    "head_size": MultipleOf(8, largest=256),
    "head_size_v": SameAs("head_size"),
    "alibi": OneOf(True, False, ALIBI_SYMMETRIC),
    "cuda_graph": _BOTH,
}
_FIELDS_3 = _COMMON | {
    "head_size": MultipleOf(8, largest=256),
    "head_size_v": MultipleOf(8, largest=512),
    "cuda_graph": _BOTH,
}
_FIELDS_4 = _COMMON | {
    "head_size": AnyOf(MultipleOf(16, largest=128), OneOf(192)),
    "head_size_v": MultipleOf(16, largest=128),
    "sinks": _BOTH,
}


#: In the order in which they are tried.
PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="vLLM's FlashAttention 3",
        generation=3,
        imports=("vllm.vllm_flash_attn", "vllm.vllm_flash_attn._vllm_fa3_C"),
        functions=("flash_attn_varlen_func",),
        optional=("get_scheduler_metadata",),
        bind=bind_vllm(3),
        capabilities=Capabilities(
            devices=_HOPPER,
            requires=("vllm>=0.11",),
            **_FIELDS_3 | _SMALL_PAGES_OF_16 | {"sinks": _BOTH},
        ),
        takes_pages_of_one=True,
        gathers=True,
    ),
    Provider(
        name="FlashAttention 3",
        generation=3,
        imports=("flash_attn_interface",),
        functions=("flash_attn_with_kvcache",),
        optional=("get_scheduler_metadata",),
        bind=bind_flash_attn_3,
        capabilities=Capabilities(
            devices=_HOPPER, requires=("flash_attn_interface",), **_FIELDS_3 | _SMALL_PAGES
        ),
        takes_pages_of_one=True,
        gathers=True,
    ),
    Provider(
        name="SGLang's FlashAttention 3",
        generation=3,
        imports=("sgl_kernel.flash_attn",),
        functions=("flash_attn_with_kvcache",),
        bind=bind_flash_attn_3,
        capabilities=Capabilities(
            devices=_HOPPER,
            requires=("sgl_kernel>=0.1",),
            **_FIELDS_3 | _SMALL_PAGES | {"head_size_v": SameAs("head_size")},
        ),
        takes_pages_of_one=True,
        gathers=True,
    ),
    Provider(
        name="FlashAttention 4",
        generation=4,
        imports=("flash_attn.cute",),
        functions=("flash_attn_varlen_func",),
        bind=bind_flash_attn_4,
        capabilities=Capabilities(
            devices=_FOR_4, requires=("flash_attn", "cutlass", "quack"), **_FIELDS_4 | _SMALL_PAGES
        ),
    ),
    Provider(
        name="vLLM's FlashAttention 4",
        generation=4,
        imports=("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.cute.interface"),
        functions=("flash_attn_varlen_func",),
        bind=bind_vllm(4),
        capabilities=Capabilities(
            devices=_FOR_4,
            requires=("vllm>=0.23", "cutlass", "quack"),
            **_FIELDS_4 | _SMALL_PAGES_OF_16,
        ),
    ),
    Provider(
        name="FlashAttention 2",
        generation=2,
        imports=("flash_attn",),
        functions=("flash_attn_varlen_func", "flash_attn_with_kvcache"),
        bind=bind_flash_attn_2,
        capabilities=Capabilities(
            devices=_AMPERE_ON,
            requires=("flash_attn>=2.6.3,<3",),
            **_FIELDS_2 | _block_sizes(MultipleOf(256)),
        ),
        reads_past_rows=False,
    ),
    Provider(
        name="vLLM's FlashAttention 2",
        generation=2,
        imports=("vllm.vllm_flash_attn", "vllm.vllm_flash_attn._vllm_fa2_C"),
        functions=("flash_attn_varlen_func",),
        bind=bind_vllm(2),
        capabilities=Capabilities(
            devices=_AMPERE_ON, requires=("vllm>=0.11",), **_FIELDS_2 | _block_sizes(MultipleOf(16))
        ),
        reads_past_rows=False,
    ),
)


@dataclass(frozen=True)
class _Limit:
    """A combination of fields that some providers reject."""

    rejects: Callable[[AttentionSpec], bool]
    field: str
    asked: str
    allowed: str
    generations: tuple[int, ...] = (2, 3, 4)

    def reason(self, spec: AttentionSpec) -> Reason:
        return Reason(
            code=ReasonCode.COMBINATION,
            field=self.field,
            asked=self.asked.format(s=spec),
            allowed=self.allowed,
        )


def _has_unsupported_sizes_3(spec: AttentionSpec) -> bool:
    size, size_v = spec.head_size, spec.head_size_v
    # If both are padded to 64, it drops the elements of values beyond the size of keys.
    is_cut = size < size_v <= 64
    is_known = (size <= 64 and not is_cut) or (128 < size <= 192 and 96 < size_v <= 128)
    return size != size_v and not is_known


def _has_unsupported_sizes_4(spec: AttentionSpec) -> bool:
    size, size_v = spec.head_size, spec.head_size_v
    return size != size_v and (size, size_v) != (192, 128)


def _has_large_tiles_4(spec: AttentionSpec) -> bool:
    is_full = not spec.causal and spec.sliding_window is None and spec.window_size is None
    return spec.block_size is not None and is_full and 64 < spec.head_size <= 96


_SIZES_3 = (
    "equal sizes; head_size up to 64, with head_size_v smaller or over 64; or 136 to 192 with 104 "
    "to 128"
)
_SIZES = "head_size={s.head_size} with head_size_v={s.head_size_v}"

_LIMITS: tuple[_Limit, ...] = (
    _Limit(
        lambda s: kv_cache_torch_dtype(s.kv_cache_dtype, s.dtype) != s.dtype,
        "kv_cache_dtype",
        "{s.kv_cache_dtype} with dtype={s.dtype}",
        "a cache of the layer's dtype",
    ),
    # Its bias falls with the distance on either side.
    _Limit(
        lambda s: s.alibi is True and not s.causal,
        "alibi",
        "causal=False",
        f"causal=True, or alibi={ALIBI_SYMMETRIC!r}",
        (2,),
    ),
    # If causal, it adds slope * key position: the same weights, but another log-sum-exp.
    _Limit(
        lambda s: s.alibi is True and s.returns_lse,
        "alibi",
        "alibi with returns_lse",
        "either",
        (2,),
    ),
    # Measured for vLLM's builds. The others have not run, and reject the same windows.
    _Limit(
        lambda s: not computes_window(s),
        "sliding_window",
        "sliding_window={s.sliding_window} or window_size={s.window_size}, causal={s.causal}, "
        "head_size={s.head_size} and {s.num_heads} query heads over {s.num_kv_heads}",
        "head_size up to 64, or a window that its tiles do not cut (docs/vendors.md)",
        (3,),
    ),
    _Limit(_has_unsupported_sizes_3, "head_size_v", _SIZES, _SIZES_3, (3,)),
    _Limit(_has_unsupported_sizes_4, "head_size_v", _SIZES, "equal sizes, or 192 with 128", (4,)),
    # On sm90 the tiles then have 144 keys, and releases before 2026-08 look up the pages of 128.
    _Limit(
        _has_large_tiles_4,
        "head_size",
        "head_size={s.head_size} with causal=False over pages",
        "up to 64, or above 96",
        (4,),
    ),
    # Their log-sum-exp includes the sinks; ours does not.
    _Limit(lambda s: s.sinks and s.returns_lse, "sinks", "sinks with returns_lse", "either"),
    # They take sinks as bfloat16, which rounds more than a float16 layer does.
    _Limit(
        lambda s: s.sinks and s.dtype != torch.bfloat16,
        "sinks",
        "sinks with dtype={s.dtype}",
        "bfloat16",
    ),
    _Limit(
        lambda s: s.sinks and (s.num_heads > 64 or s.head_size != s.head_size_v),
        "sinks",
        "sinks with num_heads={s.num_heads}, " + _SIZES,
        "up to 64 query heads, with head_size_v the same as head_size",
        (3,),
    ),
    _Limit(
        lambda s: 128 % (s.num_heads // s.num_kv_heads) != 0,
        "num_kv_heads",
        "{s.num_heads} query heads over {s.num_kv_heads}",
        "a number of query heads per KV head that divides 128",
        (4,),
    ),
)


def rejections(provider: Provider, spec: AttentionSpec, device: DeviceProfile) -> list[Reason]:
    """Why a provider cannot serve a request on a device; empty if it can."""
    reasons = compare(spec, provider.capabilities, device)
    error = error_of(provider.name)
    if error is not None:
        kernels = provider.imports[-1]
        asked = f"broken: {error}"
        reasons.append(Reason(code=ReasonCode.LIBRARY, field=kernels, asked=asked, allowed=kernels))
    for limit in _LIMITS:
        if provider.generation in limit.generations and limit.rejects(spec):
            reasons.append(limit.reason(spec))
    return [_with_provider(provider, reason) for reason in reasons]


def _with_provider(provider: Provider, reason: Reason) -> Reason:
    if reason.code is ReasonCode.LIBRARY:
        return dataclasses.replace(reason, allowed=f"{reason.allowed} for {provider.name}")
    return dataclasses.replace(reason, asked=f"{reason.asked} with {provider.name}")


def pick_provider(spec: AttentionSpec, device: DeviceProfile) -> Provider | list[Reason]:
    """The first provider that can serve the request here, or why none can.

    The reasons are those of the installed providers, and of those that only need an installation.
    If there are none of either, the reasons of all.
    """
    relevant: list[Reason] = []
    every: list[Reason] = []
    for provider in PROVIDERS:
        if not provider.runs_on(device):
            continue
        reasons = rejections(provider, spec, device)
        if not reasons:
            return provider
        every += reasons
        if len({reason.code is ReasonCode.LIBRARY for reason in reasons}) == 1:
            relevant += reasons
    return list(dict.fromkeys(relevant or every))


def require_provider(spec: AttentionSpec, device: DeviceProfile) -> Provider:
    """The provider that serves the request here.

    Raises:
        UnsupportedError: there is none; the message lists the reasons.
    """
    picked = pick_provider(spec, device)
    if isinstance(picked, Provider):
        return picked
    reasons = "; ".join(map(str, picked)) or f"it does not run on {device.name} ({device.arch})"
    raise UnsupportedError(
        f"FLASH_ATTN cannot compute this layer here: {reasons}. "
        "get_attn_backend finds one that does."
    )


@dataclass(frozen=True)
class _SomeProvider(Constraint):
    """What at least one provider for the device accepts; for other devices, at least one of all."""

    field: str

    def _options(self, device: DeviceProfile | None) -> list[Constraint]:
        here = [p for p in PROVIDERS if device is None or p.runs_on(device)] or PROVIDERS
        neutral = AttentionSpec.__dataclass_fields__[self.field].metadata.get("neutral")
        return [p.capabilities.fields.get(self.field, OneOf(neutral)) for p in here]

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        return any(option.accepts(value, spec, device) for option in self._options(device))

    def describe(self, device: DeviceProfile | None = None) -> str:
        every = [part for o in self._options(device) for part in getattr(o, "options", (o,))]
        listed = OneOf(*dict.fromkeys(v for o in every if isinstance(o, OneOf) for v in o.values))
        others = (part.describe(device) for part in every if not isinstance(part, OneOf))
        words = dict.fromkeys([listed.describe(device), *others])
        return " or ".join(each for each in words if each)


def declared_fields() -> dict[str, Constraint]:
    """For each field that some provider declares, what at least one provider accepts."""
    names = dict.fromkeys(name for p in PROVIDERS for name in p.capabilities.fields)
    return {name: _SomeProvider(name) for name in names}
