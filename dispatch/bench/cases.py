"""Benchmark cases: batches of requests over one layer, read from JSON or made for a sweep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import parse_json, read_file
from attn_dispatch.interface.quantization import (
    has_token_scales,
    kv_cache_torch_dtype,
    stored_head_size,
)
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC, KV_CACHE_DTYPES, AttentionSpec
from attn_dispatch.interface.types import AttentionType

__all__ = [
    "DECODE_QUERY_LEN",
    "SWEEPS",
    "Case",
    "load_cases",
    "parse_cases",
    "short_number",
    "sweep_cases",
]

#: A batch whose requests all bring this many new tokens or fewer is read-bound: decode, and the
#: verification of draft tokens.
DECODE_QUERY_LEN = 16

#: What a file of cases may have at most: bytes, cases, requests of one, and a length of a request
#: or a size of the layer. More is a mistake, and would fill the memory before anything is checked.
_MAX_BYTES, _MAX_CASES, _MAX_REQUESTS, _MAX_INTEGER = 16 << 20, 4096, 1 << 16, 1 << 27
#: New tokens, and keys, of all requests of a case.
_MAX_TOKENS, _MAX_KEYS = 1 << 24, 1 << 31


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch over one layer, as data.

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
        alibi: as AttentionSpec has it: False, True or "symmetric".
        sinks: whether the layer has them.
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

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of queries, new keys and values, and the output."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def has_kv_cache(self) -> bool:
        """Whether the keys lie in a cache; else they are given with the call."""
        return AttentionType(self.attn_type).has_kv_cache

    @property
    def causal(self) -> bool:
        """A query sees no later key."""
        return self.attn_type == AttentionType.DECODER

    @property
    def has_past(self) -> bool:
        """Whether some request has keys that it does not bring with it."""
        return self.query_lens != self.seq_lens

    @property
    def brings_keys(self) -> bool:
        """Whether the call brings the new keys beside the cache, as an engine's prefill does.

        It does where some request has no past, and the cache keeps keys as they are: such a
        request's keys need not be read from their pages.
        """
        fresh = any(q == s for q, s in zip(self.query_lens, self.seq_lens, strict=True))
        as_they_are = self.stored_dtype == self.torch_dtype
        return self.has_kv_cache and self.causal and self.kind != "decode" and fresh and as_they_are

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of keys and values as they are stored; with "fp8", of its usual form."""
        if not self.has_kv_cache:
            return self.torch_dtype
        return kv_cache_torch_dtype(self.kv_cache_dtype, self.torch_dtype)

    @property
    def is_quantized(self) -> bool:
        """Whether the cache holds values in eight bits, with scales."""
        return self.stored_dtype.itemsize == 1

    @property
    def kind(self) -> str:
        """What bounds it: memory ("decode"), arithmetic ("prefill"), or both ("mixed")."""
        if max(self.query_lens) <= DECODE_QUERY_LEN:
            return "decode"
        return "prefill" if min(self.query_lens) > DECODE_QUERY_LEN else "mixed"

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.head_size**-0.5)

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests."""
        return sum(self.query_lens)

    def spec(self) -> AttentionSpec:
        """The request that selection judges."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.torch_dtype,
            kv_cache_dtype=self.kv_cache_dtype if self.has_kv_cache else "auto",
            block_size=self.block_size if self.has_kv_cache else None,
            attn_type=self.attn_type,
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            alibi=self.alibi,
            sinks=self.sinks,
        )

    def key_ranges(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(query_len,) int64 each: the first key that a query sees, and the one after the last."""
        query_len, seq_len = self.query_lens[request], self.seq_lens[request]
        positions = torch.arange(seq_len - query_len, seq_len, device="cpu")
        first, end = torch.zeros_like(positions), torch.full_like(positions, seq_len)
        if self.causal:
            end = positions + 1
        if self.sliding_window is not None:
            first = positions - self.sliding_window + 1
            if not self.causal:
                end = positions + self.sliding_window
        return first.clamp(0, seq_len), end.clamp(0, seq_len)

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, for the pairs that are visible alone."""
        pairs = 0
        for request in range(len(self.query_lens)):
            first, end = self.key_ranges(request)
            pairs += int((end - first).clamp(min=0).sum())
        return 4 * self.head_size * self.num_heads * pairs

    @property
    def bytes(self) -> int:
        """What must be moved at least: keys and values that are seen, queries and output, once."""
        seen = 0
        for request in range(len(self.query_lens)):
            first, end = self.key_ranges(request)
            seen += max(0, int(end.max()) - int(first.min()))
        queries = 2 * self.num_tokens * self.num_heads * self.head_size
        row_bytes = self.head_size * self.stored_dtype.itemsize
        if has_token_scales(self.stored_dtype):
            row_bytes += torch.float32.itemsize
        keys = 2 * seen * self.num_kv_heads * row_bytes
        return queries * self.torch_dtype.itemsize + keys

    @property
    def bytes_held(self) -> int:
        """Memory for the inputs and one output."""
        keys = sum(self.seq_lens)
        if self.has_kv_cache:
            keys = sum(-(-n // self.block_size) for n in self.seq_lens) * self.block_size
        row = stored_head_size(self.kv_cache_dtype, self.head_size) * self.stored_dtype.itemsize
        queries = 2 * self.num_tokens * self.num_heads * self.head_size
        return 2 * keys * self.num_kv_heads * row + queries * self.torch_dtype.itemsize

    def asdict(self) -> dict[str, Any]:
        """The case in the form of the file."""
        data = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


def load_cases(path: Path) -> list[Case]:
    """The cases of a file.

    Raises:
        InvalidInputError: the file cannot be read, or a case is wrong; it says which key of which.
    """
    content = read_file(path, _MAX_BYTES)
    return parse_cases(parse_json(content, origin=str(path), unique_keys=True), str(path))


def parse_cases(data: Any, source: str = "the list of cases") -> list[Case]:
    """Cases out of a parsed JSON list; `source` is what messages call it.

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
        raise InvalidInputError(f"{_shown(fields)} is not an object with the keys of a case.")
    known = {field.name: field for field in dataclasses.fields(Case)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InvalidInputError(f"unknown key {_shown(unknown[0])}. Known are: {', '.join(known)}.")
    for name, field in known.items():
        if name in fields:
            _CHECKS[name](name, fields[name])
        elif field.default is dataclasses.MISSING:
            raise InvalidInputError(f"the key {name!r} is missing.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    case = Case(**values)
    case.spec()  # says what of the layer contradicts what
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


def _shown(value: Any) -> str:
    """A value in a message: its first characters are enough."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _check_name(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidInputError(f"{key}={_shown(value)} is not a name.")


def _check_int(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"{key}={_shown(value)} is not an integer of 1 or more.")
    if value > _MAX_INTEGER:
        raise InvalidInputError(
            f"{key}={value} is more than {_MAX_INTEGER}, the most there may be."
        )


def _check_lens(key: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise InvalidInputError(f"{key} is not a list with one length for each request.")
    if len(value) > _MAX_REQUESTS:
        raise InvalidInputError(f"{key} has {len(value)} requests; at most {_MAX_REQUESTS} may be.")
    for each in value:
        _check_int(f"a length in {key}", each)


def _check_bool(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidInputError(f"{key}={_shown(value)} is not true or false.")


def _check_alibi(key: str, value: Any) -> None:
    if not isinstance(value, bool) and value != ALIBI_SYMMETRIC:
        raise InvalidInputError(f"{key}={_shown(value)} is not true, false or {ALIBI_SYMMETRIC!r}.")


def _check_number(key: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise InvalidInputError(f"{key}={_shown(value)} is not a number above 0, or null.")


def _one_of(*allowed: str) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if value not in allowed:
            raise InvalidInputError(f"{key}={_shown(value)} is not one of: {', '.join(allowed)}.")

    return check


def _or_null(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda key, value: None if value is None else check(key, value)


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
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
    "alibi": _check_alibi,
    "sinks": _check_bool,
}

#: Context of a sweep over batch sizes.
_SWEEP_CONTEXT = 4096


def _context(exponent: int) -> tuple[int, int]:
    return 1, 1 << exponent


def _batch(exponent: int) -> tuple[int, int]:
    return 1 << exponent, _SWEEP_CONTEXT


#: Sweep -> (requests, keys of each) of its points: 1k to 1M keys, and 1 to 1024 requests.
SWEEPS: dict[str, list[tuple[int, int]]] = {
    "context": [_context(exponent) for exponent in range(10, 21)],
    "batch": [_batch(exponent) for exponent in range(11)],
}


def sweep_cases(sweep: str, layer: Case) -> list[Case]:
    """Decode steps of alike requests, the context or the batch growing in powers of two.

    Args:
        sweep: a key of SWEEPS.
        layer: the case whose layer is used; its requests and its name are not.

    Raises:
        InvalidInputError: there is no such sweep, or the layer is no decoder's.
    """
    if sweep not in SWEEPS:
        raise InvalidInputError(f"--sweep {sweep}: there are {' and '.join(SWEEPS)}.")
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
