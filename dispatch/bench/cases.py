"""Benchmark cases: batches of requests for one layer, read from JSON or made for a sweep."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import parse_json, read_file
from attn_dispatch.interface.kv_layout_table import LAYERS, kv_layout_named, with_kv_layout
from attn_dispatch.interface.quantization import (
    has_token_scales,
    kv_cache_torch_dtype,
    stored_head_size,
)
from attn_dispatch.interface.spec import (
    ALIBI_SYMMETRIC,
    KV_CACHE_DTYPES,
    AttentionSpec,
    MLADims,
)
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.selection.timings.table import (
    LAYER_FIELDS,
    MLA_FIELDS,
    mla_of,
    spec_of,
)

__all__ = [
    "DECODE_QUERY_LEN",
    "SWEEPS",
    "Case",
    "load_cases",
    "parse_cases",
    "short_number",
    "sweep_cases",
]

#: A batch whose requests all bring this many new tokens or fewer is bound by reading: decode, and
#: the verification of draft tokens.
DECODE_QUERY_LEN = 16

#: Limits of a file of cases: bytes, cases, requests of one, and a length of a request or a size of
#: the layer. More is a mistake, and would fill the memory before anything is checked.
_MAX_BYTES, _MAX_CASES, _MAX_REQUESTS, _MAX_INTEGER = 16 << 20, 4096, 1 << 16, 1 << 27
#: The same: new tokens, and keys, of all requests of a case.
_MAX_TOKENS, _MAX_KEYS = 1 << 24, 1 << 31


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch for one layer, as data.

    Attributes:
        name: family/detail.
        query_lens: new tokens of each request.
        seq_lens: keys of each request, the new ones included.
        num_heads, num_kv_heads, head_size, block_size: the layer and its cache.
        dtype: name of a torch dtype.
        kv_cache_dtype: as in AttentionSpec.
        attn_type: one of AttentionType.
        sliding_window: tokens a query sees, itself included, or None.
        logits_soft_cap: cap of the scores, or None.
        alibi: False, True or "symmetric", as in AttentionSpec.
        sinks: whether the layer has them.
        mla: of multi-head latent attention, MLADims in the order of its fields: kv_lora_rank,
            qk_nope_head_dim, qk_rope_head_dim, v_head_dim; else None. The layer's other sizes are
            those of the latent cache: one KV head, and kv_lora_rank + qk_rope_head_dim elements.
        kv_layout: one of KV_LAYOUTS, the layout of an engine's cache; None for ours.
    """

    name: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int = 16
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    attn_type: str = "decoder"
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    alibi: bool | str = False
    sinks: bool = False
    mla: tuple[int, ...] | None = None
    kv_layout: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of queries, new keys and values, and the output."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def has_kv_cache(self) -> bool:
        """Whether the keys are in a cache; else they are given with the call."""
        return AttentionType(self.attn_type).has_kv_cache

    @property
    def causal(self) -> bool:
        """A query sees no later key."""
        return self.attn_type == AttentionType.DECODER

    @property
    def has_past(self) -> bool:
        """Whether some request has keys from before the step."""
        return self.query_lens != self.seq_lens

    @property
    def brings_keys(self) -> bool:
        """Whether the call brings the new keys in addition to the cache, as an engine's prefill.

        It does if some request has no past, and the cache does not change keys: that request's
        keys need not be read from their pages.
        """
        fresh = any(q == s for q, s in zip(self.query_lens, self.seq_lens, strict=True))
        is_exact = self.stored_dtype == self.torch_dtype
        is_paged = self.has_kv_cache and self.causal and self.mla is None
        return is_paged and self.kind != "decode" and fresh and is_exact

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of stored keys and values; for "fp8", its usual form."""
        if not self.has_kv_cache:
            return self.torch_dtype
        return kv_cache_torch_dtype(self.kv_cache_dtype, self.torch_dtype)

    @property
    def is_quantized(self) -> bool:
        """Whether the cache holds values in eight bits, with scales."""
        return self.stored_dtype.itemsize == 1

    @property
    def kind(self) -> str:
        """The bound on its time: memory ("decode"), arithmetic ("prefill"), or both ("mixed")."""
        if max(self.query_lens) <= DECODE_QUERY_LEN:
            return "decode"
        return "prefill" if min(self.query_lens) > DECODE_QUERY_LEN else "mixed"

    @property
    def mla_dims(self) -> MLADims | None:
        """The sizes of multi-head latent attention, or None."""
        return None if self.mla is None else mla_of(self.mla)

    @property
    def head_size_v(self) -> int:
        """Elements of a value as attention over the cache sees it, and of its output."""
        return self.head_size if self.mla is None else self.mla[0]

    @property
    def scale(self) -> float:
        """Factor on the scores: of latent attention, by the size of the expanded keys."""
        dims = self.mla_dims
        size = self.head_size if dims is None else dims.qk_nope_head_dim + dims.qk_rope_head_dim
        return float(size**-0.5)

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests."""
        return sum(self.query_lens)

    def spec(self) -> AttentionSpec:
        """The layer."""
        fields = {name: getattr(self, name) for name in LAYER_FIELDS} | {"dtype": self.torch_dtype}
        if not self.has_kv_cache:
            fields |= {"kv_cache_dtype": "auto", "block_size": None}
        spec = spec_of(fields)
        return spec if self.kv_layout is None else with_kv_layout(spec, self.kv_layout)

    def key_ranges(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each request the first key that a query sees, and the one after the last.

        (query_len,) int64 each.
        """
        for query_len, seq_len in zip(self.query_lens, self.seq_lens, strict=True):
            positions = torch.arange(seq_len - query_len, seq_len, device="cpu")
            first, end = torch.zeros_like(positions), torch.full_like(positions, seq_len)
            if self.causal:
                end = positions + 1
            if self.sliding_window is not None:
                first = positions - self.sliding_window + 1
                if not self.causal:
                    end = positions + self.sliding_window
            yield first.clamp(0, seq_len), end.clamp(0, seq_len)

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, for only the visible pairs.

        Of latent attention, in absorbed form and without the projections.
        """
        pairs = sum(int((end - first).clamp(min=0).sum()) for first, end in self.key_ranges())
        return 2 * (self.head_size + self.head_size_v) * self.num_heads * pairs

    @property
    def bytes(self) -> int:
        """The least traffic: keys and values that some query sees, queries and output, once.

        A latent is key and value in one.
        """
        seen = sum(max(0, int(end.max()) - int(first.min())) for first, end in self.key_ranges())
        row_bytes = self.head_size * self.stored_dtype.itemsize
        if has_token_scales(self.stored_dtype):
            row_bytes += torch.float32.itemsize
        keys = self._tensors * seen * self.num_kv_heads * row_bytes
        return self._query_bytes + keys

    @property
    def _tensors(self) -> int:
        """Rows of the cache for each token and KV head: a key and a value, or a latent."""
        return 2 if self.mla is None else 1

    @property
    def _query_bytes(self) -> int:
        """Of the queries and the output."""
        sizes = self.head_size + self.head_size_v
        return self.num_tokens * self.num_heads * sizes * self.torch_dtype.itemsize

    @property
    def bytes_held(self) -> int:
        """Memory for the inputs and one output; an engine's layout is that of several layers."""
        keys = sum(self.seq_lens)
        if self.has_kv_cache:
            keys = sum(-(-n // self.block_size) for n in self.seq_lens) * self.block_size
            keys *= 1 if self.kv_layout is None else LAYERS
        row = stored_head_size(self.kv_cache_dtype, self.head_size) * self.stored_dtype.itemsize
        return self._tensors * keys * self.num_kv_heads * row + self._query_bytes

    def asdict(self) -> dict[str, Any]:
        """The case in the form of the file."""
        data = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


def load_cases(path: Path) -> list[Case]:
    """The cases of a file.

    Raises:
        InvalidInputError: the file cannot be read, or a case is wrong; the message names the key.
    """
    content = read_file(path, _MAX_BYTES)
    return parse_cases(parse_json(content, origin=str(path), unique_keys=True), str(path))


def parse_cases(data: Any, source: str = "the list of cases") -> list[Case]:
    """Cases from a parsed JSON list; `source` is its name in messages.

    Raises:
        InvalidInputError: as for `load_cases`.
    """
    if not isinstance(data, list) or not data:
        raise InvalidInputError(f"{source} must hold a list of cases, and at least one.")
    if len(data) > _MAX_CASES:
        raise InvalidInputError(f"{source} has {len(data)} cases; at most {_MAX_CASES} are read.")
    cases: dict[str, Case] = {}
    for index, fields in enumerate(data):
        name = fields.get("name") if isinstance(fields, dict) else None
        where = f"Case {index}" + (f" ({name[:80]!r})" if isinstance(name, str) else "")
        try:
            case = _parse(fields)
        except InvalidInputError as error:
            raise InvalidInputError(f"{where} of {source}: {error}") from error
        if case.name in cases:
            raise InvalidInputError(f"{where} of {source}: another case has this name; rename one.")
        cases[case.name] = case
    return list(cases.values())


def _parse(fields: Any) -> Case:
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{shown(fields)} is not an object with the keys of a case.")
    known = {field.name: field for field in dataclasses.fields(Case)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InvalidInputError(f"unknown key {shown(unknown[0])}. Known are: {', '.join(known)}.")
    for name, field in known.items():
        if name in fields:
            _CHECKS[name](name, fields[name])
        elif field.default is dataclasses.MISSING:
            raise InvalidInputError(f"the key {name!r} is missing.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    case = Case(**values)
    case.spec()  # rejects contradictions of the layer
    _check_lengths(case)
    return case


def _check_lengths(case: Case) -> None:
    if len(case.query_lens) != len(case.seq_lens):
        raise InvalidInputError(
            f"query_lens has {len(case.query_lens)} requests and seq_lens {len(case.seq_lens)}; "
            "give both for the same requests."
        )
    tokens, keys = case.num_tokens, sum(case.seq_lens)
    if tokens > _MAX_TOKENS or keys > _MAX_KEYS:
        raise InvalidInputError(
            f"it has {tokens} new tokens and {keys} keys in all; at most {_MAX_TOKENS} and "
            f"{_MAX_KEYS} are measured."
        )
    for request, (query, seq) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        if case.causal and query > seq:
            raise InvalidInputError(
                f"request {request} has {query} new tokens in query_lens and {seq} keys in "
                "seq_lens, which counts the new ones too."
            )
        if not case.has_kv_cache and query != seq:
            raise InvalidInputError(
                f"request {request} has {query} in query_lens and {seq} in seq_lens; without a "
                f"cache, as with attn_type={case.attn_type!r}, the two are the same."
            )


def _check_name(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidInputError(f"{key}={shown(value)} is not a name.")


_check_int = functools.partial(as_int, minimum=1, maximum=_MAX_INTEGER)


def _check_lens(key: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise InvalidInputError(f"{key} is not a list with one length for each request.")
    if len(value) > _MAX_REQUESTS:
        raise InvalidInputError(f"{key} has {len(value)} requests; at most {_MAX_REQUESTS} may be.")
    for each in value:
        _check_int(f"a length in {key}", each)


def _check_mla(key: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != len(MLA_FIELDS):
        raise InvalidInputError(f"{key}={shown(value)} is not a list of {', '.join(MLA_FIELDS)}.")
    for name, each in zip(MLA_FIELDS, value, strict=True):
        _check_int(f"{key}: {name}", each)


def _check_number(key: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise InvalidInputError(f"{key}={shown(value)} is not a number above 0, or null.")


def _one_of(*allowed: bool | str) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if (type(value), value) not in [(type(each), each) for each in allowed]:  # 1 is not True
            texts = (each if isinstance(each, str) else str(each).lower() for each in allowed)
            raise InvalidInputError(f"{key}={shown(value)} is not one of: {', '.join(texts)}.")

    return check


def _or_null(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda key, value: None if value is None else check(key, value)


#: Key -> the check of its value in JSON.
_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "name": _check_name,
    "query_lens": _check_lens,
    "seq_lens": _check_lens,
    "num_heads": _check_int,
    "num_kv_heads": _check_int,
    "head_size": _check_int,
    "block_size": _check_int,
    "dtype": _one_of("bfloat16", "float16", "float32"),
    "kv_cache_dtype": _one_of(*KV_CACHE_DTYPES),
    "attn_type": _one_of(*(str(each) for each in AttentionType)),
    "sliding_window": _or_null(_check_int),
    "logits_soft_cap": _or_null(_check_number),
    "alibi": _one_of(True, False, ALIBI_SYMMETRIC),
    "sinks": _one_of(True, False),
    "mla": _or_null(_check_mla),
    "kv_layout": _or_null(lambda key, value: kv_layout_named(value)),
}

#: Sweep -> (requests, keys of each) of its points: 1k to 1M keys, and 1 to 1024 requests.
SWEEPS: dict[str, list[tuple[int, int]]] = {
    "context": [(1, 1 << exponent) for exponent in range(10, 21)],
    "batch": [(1 << exponent, 4096) for exponent in range(11)],
}


def sweep_cases(sweep: str, layer: Case) -> list[Case]:
    """Decode steps of equal requests, whose context or number grows in powers of two.

    Args:
        sweep: a key of SWEEPS.
        layer: the case whose layer is used, without its requests and its name.

    Raises:
        InvalidInputError: there is no such sweep, or the layer is no decoder's.
    """
    if sweep not in SWEEPS:
        raise InvalidInputError(f"--sweep {sweep}: the sweeps are {' and '.join(SWEEPS)}.")
    if not layer.causal:
        raise InvalidInputError(
            f"A sweep decodes, and {layer.name!r} has attn_type={layer.attn_type!r}. Pick a "
            "decoder's case by --filter, or leave --cases out."
        )
    return [
        dataclasses.replace(
            layer,
            name=f"sweep-{sweep}/B{requests}-L{short_number(keys)}",
            query_lens=(1,) * requests,
            seq_lens=(keys,) * requests,
        )
        for requests, keys in SWEEPS[sweep]
    ]


def short_number(number: int) -> str:
    """1024 -> "1k", 1048576 -> "1M"."""
    if number % (1 << 20) == 0:
        return f"{number >> 20}M"
    return f"{number >> 10}k" if number % (1 << 10) == 0 else str(number)
