"""AttentionSpec: the frozen, complete description of an attention layer."""

from __future__ import annotations

import dataclasses
import numbers
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_strides import KVStrides
from attn_dispatch.interface.reach import folded_window
from attn_dispatch.interface.types import LENGTHS, AttentionType

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALIBI_SYMMETRIC",
    "IMPL_FIELDS",
    "INT8_PER_TOKEN_HEAD",
    "KV_CACHE_DTYPES",
    "LAYER_KINDS",
    "OUTPUT_QUANTS",
    "SPEC_FIELDS",
    "AttentionSpec",
    "MLADims",
    "alibi_of",
]

#: Signed 8-bit integers with a scale for each token and KV head, stored after them in the cache.
INT8_PER_TOKEN_HEAD = "int8_per_token_head"

#: Names accepted for `kv_cache_dtype`. "fp8" is the device's own e4m3 (fnuz on gfx942).
KV_CACHE_DTYPES = (
    "auto",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3fnuz",
    "fp8_e5m2fnuz",
    INT8_PER_TOKEN_HEAD,
)

#: Names accepted for `output_quant`: static per-tensor fp8 by `output_scale`, and fp8 with one
#: scale per token and group of 128 values, written to `output_block_scale`.
OUTPUT_QUANTS = ("fp8_e4m3", "fp8_e4m3_group128")

#: The value of `alibi` for slopes times -abs(distance), as FlashAttention has it.
ALIBI_SYMMETRIC = "symmetric"

#: The kinds of layer that an override can name, see `AttentionSpec.kind`.
LAYER_KINDS = (
    *("full", "sliding_window", "chunked", "encoder", "encoder_only", "encoder_decoder", "mla"),
)

#: The value of a field that was left None.
_DERIVED: dict[str, Callable[[AttentionSpec], Any]] = {
    "num_kv_heads": lambda spec: spec.num_heads,
    "head_size_v": lambda spec: spec.head_size,
    "causal": lambda spec: spec.attn_type == AttentionType.DECODER,
}

#: The fields that are arguments and attributes of an AttentionImpl too.
IMPL_FIELDS = (
    "num_heads",
    "head_size",
    "num_kv_heads",
    "sliding_window",
    "kv_cache_dtype",
    "logits_soft_cap",
    "attn_type",
    "head_size_v",
    "causal",
    "returns_lse",
    "window_size",
    "attention_chunk",
    "key_positions",
)

#: Those of them that an impl is only given where they change something, so that an impl with a
#: constructor of its own needs none that its backend does not declare.
_OPTIONAL_IMPL_FIELDS = ("window_size", "attention_chunk", "key_positions")

_REQUIRED: Any = dataclasses.MISSING


def _field(doc: str, default: Any = _REQUIRED, **neutral: Any) -> Any:
    """A field of the request.

    `neutral` (optional) is the value under which the field changes nothing, e.g. no soft cap. A
    backend that does not declare the field is rejected at every other value; without a neutral
    value it is always rejected.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, **neutral})


@dataclass(frozen=True, kw_only=True)
class MLADims:
    """The sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), in elements."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = as_int(field.name, getattr(self, field.name), 1)
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Everything about an attention layer that changes its results or its possible backends.

    Slopes, sinks, scales and masks are tensors that are given to the layer or the call; the spec
    states that they exist. Frozen and hashable; equal specs get equal decisions.

    Raises:
        InvalidInputError: a field's value is invalid, or contradicts another.
    """

    num_heads: int = _field("Query heads.")
    head_size: int = _field("Elements per query and key head.")
    dtype: torch.dtype = _field("dtype of queries, of new keys and values, and of the output.")
    num_kv_heads: int = _field("Key and value heads; divides num_heads. Default: num_heads.", None)
    head_size_v: int = _field("Elements per value head. Default: head_size.", None)
    kv_cache_dtype: str = _field(
        "Element type of the KV cache, 'auto' for that of dtype.", "auto", neutral="auto"
    )
    kv_scales: str = _field(
        "Granularity of the scales of an fp8 cache: 'per_tensor' or 'per_head'.",
        "per_tensor",
        neutral="per_tensor",
    )
    block_size: int | None = _field("Tokens per block of the KV cache; None without one.", None)
    kv_cache_layout: str | None = _field(
        "Physical order of the cache, 'NHD' or 'HND'; None while it is still open.",
        None,
        neutral=None,
    )
    kv_strides: KVStrides | None = _field(
        "Where keys and values are, for a cache with an engine's own layout; None for ours.",
        None,
        neutral=None,
    )
    lengths: str = _field(
        "What the host knows of the key counts of a batch: 'exact' ones; or 'upper_bound', where "
        "it may know only bounds of them and the device has the true ones.",
        "exact",
        neutral="exact",
    )
    attn_type: str = _field("One of AttentionType.", AttentionType.DECODER)
    causal: bool = _field(
        "A query sees no later key; masks align to the end of the keys. "
        "Default: True for decoder attention, else False.",
        None,
    )
    sliding_window: int | None = _field(
        "Tokens a query sees, itself included; None for all.", None, neutral=None
    )
    window_size: tuple[int, int] | None = _field(
        "(left, right): keys a query sees before and after its own, -1 for all. What causal and "
        "sliding_window can state becomes these, so it remains only where the sides differ.",
        None,
        neutral=None,
    )
    attention_chunk: int | None = _field(
        "A query sees only keys of its own chunk of this many positions (Llama 4); None for all.",
        None,
        neutral=None,
    )
    key_positions: bool = _field(
        "The batch states the positions of the keys, which are some of a request's: those of one "
        "GPU of several that share its cache.",
        False,
        neutral=False,
    )
    logits_soft_cap: float | None = _field(
        "Scores become cap * tanh(score / cap) before bias and mask.", None, neutral=None
    )
    alibi: bool | str = _field(
        "Slopes times distance are added to the scores. True: the distance is key minus query "
        "position. 'symmetric': it is -abs of that, which is the same where attention is causal.",
        False,
        neutral=False,
    )
    sinks: bool = _field("One more logit per head joins the softmax.", False, neutral=False)
    kv_sharing: bool = _field(
        "The layer reads another layer's cache and never writes.", False, neutral=False
    )
    custom_mask: bool = _field(
        "The batch has its own mask, e.g. for a tree of draft tokens.", False, neutral=False
    )
    bidirectional_ranges: bool = _field(
        "Tokens of one range see each other both ways: prefix-LM, the images of Gemma 3.",
        False,
        neutral=False,
    )
    mla: MLADims | None = _field("Sizes of multi-head latent attention.", None, neutral=None)
    returns_lse: bool = _field(
        "The log-sum-exp of the scores is returned too.", False, neutral=False
    )
    output_quant: str | None = _field(
        "The output is quantized on the way out; one of OUTPUT_QUANTS.", None, neutral=None
    )
    batch_invariant: bool = _field(
        "A request gets the same bits whatever else is in the batch.", False, neutral=False
    )
    cuda_graph: bool = _field("Calls are captured into CUDA graphs.", False, neutral=False)

    def __post_init__(self) -> None:
        import torch  # not at the top: `--help` stays quick

        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("num_heads", "head_size"):
            fill(name, as_int(name, getattr(self, name), 1))
        for name, derive in _DERIVED.items():
            if getattr(self, name) is None:
                fill(name, derive(self))
        for name in ("num_kv_heads", "head_size_v"):
            fill(name, as_int(name, getattr(self, name), 1))
        if self.num_heads % self.num_kv_heads:
            raise InvalidInputError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}. Each KV head serves the same number of "
                "query heads; check the model's config."
            )
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise InvalidInputError(
                f"dtype={shown(self.dtype)} is not a floating-point torch.dtype. "
                "Give e.g. torch.bfloat16."
            )
        _require_one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _require_one_of("kv_scales", self.kv_scales, ("per_tensor", "per_head"))
        if self.kv_cache_dtype == INT8_PER_TOKEN_HEAD and self.kv_scales != "per_tensor":
            raise InvalidInputError(
                f"kv_scales={self.kv_scales!r} is for fp8 caches; one of {INT8_PER_TOKEN_HEAD} "
                "has its own scale for each token and head. Leave kv_scales out."
            )
        if self.kv_cache_layout is not None:
            _require_one_of("kv_cache_layout", self.kv_cache_layout, ("NHD", "HND"))
        if self.kv_strides is not None and not isinstance(self.kv_strides, KVStrides):
            raise InvalidInputError(
                f"kv_strides={shown(self.kv_strides)} is not a KVStrides. Give kv_strides_of(cache)"
                " of the cache."
            )
        _require_one_of("lengths", self.lengths, LENGTHS)
        if self.output_quant is not None:
            _require_one_of("output_quant", self.output_quant, OUTPUT_QUANTS)
        _require_one_of("attn_type", self.attn_type, tuple(t.value for t in AttentionType))
        fill("attn_type", AttentionType(self.attn_type))
        for name in ("block_size", "sliding_window", "attention_chunk"):
            if getattr(self, name) is not None:
                fill(name, as_int(name, getattr(self, name), 1))
        if self.logits_soft_cap is not None:
            _check_soft_cap(self.logits_soft_cap)
            fill("logits_soft_cap", float(self.logits_soft_cap))
        if self.mla is not None:
            self._check_mla(self.mla)
        is_named = isinstance(self.alibi, str) and self.alibi == ALIBI_SYMMETRIC
        if not isinstance(self.alibi, bool) and not is_named:
            raise InvalidInputError(
                f"alibi={shown(self.alibi)} is not True, False or {ALIBI_SYMMETRIC!r}."
            )
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise InvalidInputError(
                    f"{field.name}={shown(getattr(self, field.name))} is not True or False."
                )
        window = folded_window(self.causal, self.sliding_window, self.window_size)
        for name, value in zip(("causal", "sliding_window", "window_size"), window, strict=True):
            fill(name, value)
        if self.alibi == ALIBI_SYMMETRIC and self.causal and not self.bidirectional_ranges:
            fill("alibi", True)  # no visible key is later than its query

    def _check_mla(self, mla: MLADims) -> None:
        if not isinstance(mla, MLADims):
            raise InvalidInputError(f"mla={shown(mla)} is not an MLADims.")
        latent = mla.kv_lora_rank + mla.qk_rope_head_dim
        if (self.num_kv_heads, self.head_size, self.head_size_v) != (1, latent, mla.kv_lora_rank):
            raise InvalidInputError(
                "A spec with mla describes the latent cache: it needs num_kv_heads=1, "
                f"head_size=kv_lora_rank+qk_rope_head_dim={latent} and "
                f"head_size_v=kv_lora_rank={mla.kv_lora_rank}, not {self.num_kv_heads}, "
                f"{self.head_size} and {self.head_size_v}. AttentionSpec.for_mla fills them in."
            )

    @classmethod
    def for_mla(
        cls, *, num_heads: int, dtype: torch.dtype, mla: MLADims, **kw: Any
    ) -> AttentionSpec:
        """The spec of a multi-head latent attention layer, its cache sizes filled in."""
        return cls(
            num_heads=num_heads,
            num_kv_heads=1,
            head_size=mla.kv_lora_rank + mla.qk_rope_head_dim,
            head_size_v=mla.kv_lora_rank,
            dtype=dtype,
            mla=mla,
            **kw,
        )

    @property
    def kind(self) -> str:
        """The kind of layer, one of LAYER_KINDS: what an override such as `mla=X` refers to."""
        if self.mla is not None:
            return "mla"
        if self.attn_type != AttentionType.DECODER:
            return str(self.attn_type)
        if self.attention_chunk is not None:
            return "chunked"
        is_full = self.sliding_window is None and self.window_size is None
        return "full" if is_full else "sliding_window"

    def __hash__(self) -> int:
        found: int | None = self.__dict__.get("_hash")  # kept: every decision looks the spec up
        if found is None:
            found = hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))
            object.__setattr__(self, "_hash", found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash, which differs between processes."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def replace(self, **changes: Any) -> AttentionSpec:
        """A copy with some fields changed; what was derived from them is derived again."""
        derived = {name: None for name in _DERIVED if _is_filled_in(self, name)}
        return dataclasses.replace(self, **{**derived, **changes})

    def impl_arguments(self) -> dict[str, Any]:
        """What the spec states of the arguments of an AttentionImpl's constructor."""
        arguments = {name: getattr(self, name) for name in IMPL_FIELDS}
        for name in _OPTIONAL_IMPL_FIELDS:
            if not arguments[name]:  # None and False are neutral
                del arguments[name]
        if self.alibi == ALIBI_SYMMETRIC:  # given only to impls of backends that declare it
            arguments["alibi_symmetric"] = True
        return arguments

    def asdict(self) -> dict[str, Any]:
        """The request as JSON-ready data: dtypes by name, nested records as dicts."""
        return {f.name: plain_value(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        """The fields that differ from their defaults, as one readable line."""
        shown = [
            f"{f.name}={plain_value(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default and not _is_filled_in(self, f.name)
        ]
        return ", ".join(shown)


#: The names of the fields of AttentionSpec.
SPEC_FIELDS = frozenset(field.name for field in dataclasses.fields(AttentionSpec))


def alibi_of(alibi: bool | str | None, slopes: object) -> bool | str:
    """The field `alibi` of a layer with these slopes; None is signed distances if there are slopes.

    Raises:
        InvalidInputError: one is given without the other.
    """
    if alibi is None:
        return slopes is not None
    if (alibi is not False) != (slopes is not None):
        raise InvalidInputError(
            f"alibi={shown(alibi)} and alibi_slopes go together: give both, or neither."
        )
    return alibi


def plain_value(value: Any) -> Any:
    """A field's value as JSON-ready data."""
    import torch

    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, AttentionType):
        return value.value
    if isinstance(value, KVStrides):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _is_filled_in(spec: AttentionSpec, name: str) -> bool:
    """Whether the field holds what __post_init__ would have put there."""
    return name in _DERIVED and bool(getattr(spec, name) == _DERIVED[name](spec))


def _require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidInputError(f"{name}={shown(value)} is not one of: {', '.join(allowed)}.")


def _check_soft_cap(cap: Any) -> None:
    is_number = isinstance(cap, numbers.Real) and not isinstance(cap, bool)
    if not is_number or not 0 < cap <= sys.float_info.max:
        raise InvalidInputError(
            f"logits_soft_cap={shown(cap)} is not a positive finite number. "
            "Give None for no soft cap (vLLM's 0 means that too)."
        )
