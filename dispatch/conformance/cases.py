"""Cases to check backends with: a step of an engine as data, its tensors, and what they give.

A `Case` is plain data: a failure prints it in one line, and it can be made again. `CaseTensors` has
the tensors of a call and computes what the call should return. `engine_step.py` makes them up.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.conformance import oracle
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC, INT8_PER_TOKEN_HEAD, AttentionSpec

__all__ = [
    "FP8",
    "INT8",
    "SHARD",
    "Case",
    "CaseTensors",
    "layer_spec",
    "output_size",
    "query_size",
]

#: Offset and step of the keys of a layer with key positions: those of the second of three GPUs.
SHARD = (1, 3)

FP8 = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")
INT8 = INT8_PER_TOKEN_HEAD


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step as data.

    Attributes:
        spec: the layer; block_size is None for attention without a cache.
        query_lens: of each request.
        seq_lens: of each request.
        new_lens: rows of key and value of each request, where they differ from the query's.
        brings_keys: key and value are given; else the cache holds them all.
        memory: one of engine_step.MEMORY.
        padding: rows of query, key and value beyond the batch's tokens.
        ranges: (request, start, end) of tokens that see each other.
        max_decode_query_len: of the batch.
        bounds: upper bounds of each request's keys, which are then all that the host knows.
        key_positions: for a layer with key positions, (offset, step, length of each request); None
            for some that fit seq_lens.
        planted: (tensor, request, first, end, number): the value of element 0 of head 0, such as
            NaN, in rows first to end of a request's "query", "key" or "value".
        seed: of the numbers.
    """

    spec: AttentionSpec
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    new_lens: tuple[int, ...] | None = None
    brings_keys: bool = True
    memory: str = "contiguous"
    padding: int = 0
    ranges: tuple[tuple[int, int, int], ...] = ()
    max_decode_query_len: int = 1
    bounds: tuple[int, ...] | None = None
    key_positions: tuple[int, int, tuple[int, ...]] | None = None
    planted: tuple[tuple[str, int, int, int, float], ...] = ()
    seed: int = 0

    @property
    def positions(self) -> tuple[int, int, tuple[int, ...]] | None:
        """(offset, step, length of each request) of the keys, or None if key j is at j."""
        if not self.spec.key_positions or self.key_positions is not None:
            return self.key_positions if self.spec.key_positions else None
        offset, step = SHARD
        lengths = (
            offset + (step * (seq - 1) + 1 + (seq + query) % step if seq else 0)
            for query, seq in zip(self.query_lens, self.seq_lens, strict=True)
        )
        return offset, step, tuple(lengths)

    def replace(self, **changes: Any) -> Case:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        shown = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)[1:])
        rest = "".join(f", {name}={value!r}" for name, value, plain in shown if value != plain)
        return f"Case(spec=layer_spec({self.spec}){rest})"


def layer_spec(**fields: Any) -> AttentionSpec:
    """A spec, with small sizes by default."""
    sizes: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "dtype": torch.float64,
        "block_size": 4,
    }
    return AttentionSpec(**(sizes | fields))


def query_size(spec: AttentionSpec) -> int:
    """Elements of a query head, as a call gets it."""
    mla = spec.mla
    return spec.head_size if mla is None else mla.qk_nope_head_dim + mla.qk_rope_head_dim


def output_size(spec: AttentionSpec) -> int:
    """Elements of an output head, as a call returns it."""
    return spec.head_size_v if spec.mla is None else spec.mla.v_head_dim


@dataclass(eq=False, kw_only=True)
class CaseTensors:
    """The tensors of a call, and what the call should return.

    Attributes:
        case: the call as data.
        layer: has the scales of the cache.
        scale: factor on the scores.
        query: as the layer gets it, with all of its rows.
        queries, keys, values: those of each request, on the CPU. Keys and values are float64: the
            numbers that the cache holds, scales applied.
        masks: (query_len, seq_len) bool of each request, or None.
        slopes, sinks: those of the layer, or None.
    """

    case: Case
    layer: Any
    scale: float
    query: torch.Tensor
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    masks: list[torch.Tensor] | None = None
    slopes: list[float] | None = None
    sinks: torch.Tensor | None = None

    @property
    def spec(self) -> AttentionSpec:
        """The layer."""
        return self.case.spec

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(rows of the query, num_heads, elements of an output head)."""
        return len(self.query), self.spec.num_heads, output_size(self.spec)

    @property
    def default_scale(self) -> float:
        """The usual scale of such a layer."""
        return float(query_size(self.spec) ** -0.5)

    @property
    def device(self) -> torch.device:
        """Where the call runs."""
        return self.query.device

    def has_infinite_latents(self, request: int) -> bool:
        """Whether two forms of the request's attention differ; see LatentTensors."""
        return False

    def ranges_of(self, request: int) -> list[tuple[int, int]]:
        """The bidirectional ranges of a request."""
        return [(start, end) for r, start, end in self.case.ranges if r == request]

    def seen_by(self, request: int, **changes: Any) -> torch.Tensor:
        """(query_len, seq_len) bool: which key each query of a request sees; see `expected`."""
        visibility: dict[str, Any] = {
            "causal": self.spec.causal,
            "window": self.spec.sliding_window,
            "sides": self.spec.window_size,
            "chunk": self.spec.attention_chunk,
            "ranges": self.ranges_of(request),
            "mask": None if self.masks is None else self.masks[request],
        }
        visibility |= {name: changes[name] for name in visibility.keys() & changes}
        visibility |= self._positions_of(request, **changes)
        return oracle.sees(num_keys=len(self.keys[request]), **visibility)

    def _positions_of(self, request: int, **changes: Any) -> dict[str, Any]:
        """Those of a request's queries and keys, as the oracle takes them."""
        num_queries, num_keys = len(self.queries[request]), len(self.keys[request])
        offset, step, lengths = 0, 1, None
        if changes.get("positions", self.case.positions) is not None:
            assert self.case.positions is not None
            offset, step, lengths = self.case.positions
        return {
            "positions": oracle.positions_of(
                num_queries, num_keys if lengths is None else lengths[request]
            ),
            "key_positions": offset + step * torch.arange(num_keys),
        }

    def expected(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, lse) of the batch's tokens in float64, by the oracle.

        Args:
            **changes: what to compute differently: an argument of the oracle (`cap=None`,
                `window=6`, `mask=None`), `positions=None` for key j at position j, or `keys` or
                `values`, those of each request.
        """
        spec = self.spec
        numbers: dict[str, Any] = {
            "scale": self.scale,
            "cap": spec.logits_soft_cap,
            "slopes": self.slopes,
            "symmetric": spec.alibi == ALIBI_SYMMETRIC,
            "sinks": None if self.sinks is None else self.sinks.tolist(),
        }
        numbers |= {name: changes[name] for name in numbers.keys() & changes}
        found = [
            oracle.attention_of_request(
                *each,
                seen=self.seen_by(request, **changes),
                **(numbers | self._positions_of(request, **changes)),
            )
            for request, each in enumerate(
                zip(
                    self.queries,
                    changes.get("keys", self.keys),
                    changes.get("values", self.values),
                    strict=True,
                )
            )
        ]
        empty = torch.zeros(0, spec.num_heads, output_size(spec), dtype=torch.float64)
        outputs, lses = zip((empty, empty[..., 0]), *found, strict=True)
        return torch.cat(outputs), torch.cat(lses)

    def pytorch(self) -> torch.Tensor:
        """(num_tokens, num_heads, head_size_v): PyTorch's own attention in the layer's dtype.

        Without soft cap, ALiBi and sinks, which it does not have.
        """
        spec = self.spec
        outputs = [torch.zeros(0, spec.num_heads, spec.head_size_v, dtype=spec.dtype)]
        for request, each in enumerate(zip(self.queries, self.keys, self.values, strict=True)):
            tensors = (tensor.to(self.device, spec.dtype) for tensor in each)
            seen = self.seen_by(request).to(self.device)
            outputs.append(oracle.sdpa_of_request(*tensors, scale=self.scale, seen=seen).cpu())
        return torch.cat(outputs)
