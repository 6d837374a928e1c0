"""Steps of an engine: what one is as data, how its tensors are made, what they should give.

A `Case` is plain data, so that a failure prints it in one line and can be made again. A `Step` is
a case with tensors: a cache whose unused slots hold NaN, a block table whose unused entries hold
garbage, tensors that lie in memory as an engine's do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from attn_dispatch.conformance import oracle
from attn_dispatch.conformance.kv_encoding import (
    as_stored,
    meant,
    nan_cache,
    store_int8,
    stored_size,
)
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC, INT8_PER_TOKEN_HEAD, AttentionSpec
from attn_dispatch.interface.types import PlaceholderRange

__all__ = ["FP8", "GARBAGE_BLOCKS", "INT8", "MEMORY", "Case", "Step", "layer_spec"]

_View = Callable[[torch.Tensor], torch.Tensor]
#: How (tokens, heads, size) may lie in memory: the shape of what is allocated, and the view of it.
_LYING: dict[str, Callable[[int, int, int], tuple[tuple[int, ...], _View]]] = {
    "contiguous": lambda tokens, heads, size: ((tokens, heads, size), lambda t: t),
    "fused": lambda tokens, heads, size: (
        (tokens, 3 + heads * size),
        lambda t: t[:, 3:].unflatten(1, (heads, size)),
    ),
    "transposed": lambda tokens, heads, size: ((heads, tokens, size), lambda t: t.transpose(0, 1)),
    "strided": lambda tokens, heads, size: ((tokens, heads, 2 * size), lambda t: t[..., ::2]),
}
MEMORY = tuple(_LYING)

#: What an engine may leave in the entries of a block table that no request uses.
GARBAGE_BLOCKS = (-1, 2**31 - 1, 0, -(2**31), 1_000_000)

FP8 = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")
INT8 = INT8_PER_TOKEN_HEAD


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step as data.

    Attributes:
        spec: the layer; block_size None for attention without a cache.
        query_lens: of each request.
        seq_lens: of each request.
        new_lens: rows of key and value of each request, where they are not the query's.
        brings_keys: key and value are given; else the cache holds them all.
        memory: one of MEMORY.
        padding: rows of query, key and value beyond the batch's tokens.
        ranges: (request, start, end) of tokens that see each other.
        max_decode_query_len: of the batch.
        planted: (tensor, request, first, end, number): what element 0 of head 0 is in rows first
            to end of a request's "query", "key" or "value": NaN or infinity, say.
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
    planted: tuple[tuple[str, int, int, int, float], ...] = ()
    seed: int = 0

    def replace(self, **changes: Any) -> Case:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        shown = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)[1:])
        rest = "".join(f", {name}={value!r}" for name, value, plain in shown if value != plain)
        return f"Case(spec=layer_spec({self.spec}){rest})"


def layer_spec(**fields: Any) -> AttentionSpec:
    """A spec with small sizes where none are given."""
    sizes: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "dtype": torch.float64,
        "block_size": 4,
    }
    return AttentionSpec(**(sizes | fields))


class Step:
    """A case with tensors.

    Args:
        case: the step as data.
        device: where its tensors go.
        arch: of the device; decides what "fp8" stands for.

    Attributes:
        query, key, value: the arguments of a forward.
        kv_cache, batch, slopes, sinks, scale: the layer's and the step's.
        layer: carries the scales.
        queries, keys, values: each request's, float64 on the CPU, as they are meant: what a cache
            of less precision holds is rounded, and scales are applied.
        masks: each request's (query_len, seq_len) bool, or None.
    """

    def __init__(self, case: Case, device: torch.device | str = "cpu", arch: str = "") -> None:
        self.case, self.spec, self.device = case, case.spec, torch.device(device)
        self._random = torch.Generator().manual_seed(case.seed)
        spec = self.spec
        has_cache = spec.block_size is not None
        self.new_lens = case.new_lens or (case.query_lens if has_cache else case.seq_lens)
        self.scale = 0.8 * spec.head_size**-0.5
        self.slopes = [0.7 ** (1 + h) for h in range(spec.num_heads)] if spec.alibi else None
        self.sinks: torch.Tensor | None = None
        if spec.sinks:
            self.sinks = self._normal(spec.num_heads).float().to(device)
        self._make_scales()

        queries = [self._new(n, spec.num_heads, spec.head_size) for n in case.query_lens]
        keys = [self._new(n, spec.num_kv_heads, spec.head_size) for n in case.seq_lens]
        values = [self._new(n, spec.num_kv_heads, spec.head_size_v) for n in case.seq_lens]
        own = {"query": queries, "key": keys, "value": values}
        for name, request, first, end, number in case.planted:
            own[name][request][first:end, 0, 0] = number
        self.query = self._lay(queries, spec.num_heads, spec.head_size)
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        if case.brings_keys:
            # A layer that shares another's cache must not use what it is given.
            shown = [self._normal(*k.shape).to(k) for k in keys] if spec.kv_sharing else keys
            self.key = self._lay(self._last(shown), spec.num_kv_heads, spec.head_size)
            self.value = self._lay(self._last(values), spec.num_kv_heads, spec.head_size_v)
        self.kv_cache: torch.Tensor | None = None
        self._table: torch.Tensor | None = None
        self._slots: torch.Tensor | None = None
        #: The keys and values before a cache rounded them.
        self.exact_keys, self.exact_values = keys, values
        if has_cache:
            dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, arch)
            self.kv_cache = self._make_cache(keys, values, dtype)
            keys = [meant(k, self.layer._k_scale, dtype) for k in keys]
            values = [meant(v, self.layer._v_scale, dtype) for v in values]
        self.queries = [q.double() for q in queries]
        self.keys, self.values = [k.double() for k in keys], [v.double() for v in values]
        self.masks = self._make_masks() if spec.custom_mask else None
        self.batch = self._make_batch()

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random, dtype=torch.float64)

    def _new(self, *shape: int) -> torch.Tensor:
        return self._normal(*shape).to(self.spec.dtype)

    def _last(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each request's new rows; zeros where it has none of its own, but pads a graph's batch."""
        return [
            F.pad(tensor, (0, 0, 0, 0, max(0, new - len(tensor)), 0))[max(0, len(tensor) - new) :]
            for tensor, new in zip(tensors, self.new_lens, strict=True)
        ]

    def _lay(self, parts: Sequence[torch.Tensor], heads: int, size: int) -> torch.Tensor:
        """The requests' rows one after another, padding behind them, in the case's memory."""
        rows = torch.cat([*parts, torch.zeros(self.case.padding, heads, size).to(self.spec.dtype)])
        tokens = len(rows)
        shape, view = _LYING[self.case.memory](tokens, heads, size)
        laid = view(torch.full(shape, math.nan, dtype=rows.dtype, device=self.device))
        return laid.copy_(rows)

    def _make_scales(self) -> None:
        spec = self.spec
        shape = (spec.num_kv_heads,) if spec.kv_scales == "per_head" else ()
        k, v = (0.01 + 0.03 * torch.rand(shape, generator=self._random) for _ in range(2))
        if not spec.kv_cache_dtype.startswith("fp8"):
            k, v = torch.ones(()), torch.ones(())
        self.set_scales(k, v)

    def set_scales(self, k_scale: torch.Tensor, v_scale: torch.Tensor) -> None:
        """Give the layer other scales; keys and values stay what they are, see `rescale`."""
        self.layer: Any = SimpleNamespace(
            _k_scale=k_scale.to(self.device),
            _v_scale=v_scale.to(self.device),
            _k_scale_float=math.nan if k_scale.dim() else float(k_scale),
            _v_scale_float=math.nan if v_scale.dim() else float(v_scale),
        )

    def _make_cache(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        spec, case, block_size = self.spec, self.case, self.spec.block_size
        assert block_size is not None
        needed = [-(-n // block_size) for n in case.seq_lens]
        num_blocks = sum(needed) + 2
        size = stored_size(spec.kv_cache_dtype, max(spec.head_size, spec.head_size_v))
        shape = (num_blocks, 2, block_size, spec.num_kv_heads, size)
        cache = nan_cache(shape, spec.kv_cache_layout or "NHD", dtype)
        free = torch.randperm(num_blocks, generator=self._random).tolist()
        columns = max(needed, default=0) + 1
        rows, slots = [], []
        for request, (seq_len, new) in enumerate(zip(case.seq_lens, self.new_lens, strict=True)):
            blocks = [free.pop() for _ in range(needed[request])]
            garbage = [GARBAGE_BLOCKS[(request + i) % len(GARBAGE_BLOCKS)] for i in range(columns)]
            rows.append((blocks + garbage)[:columns])
            places = [(blocks[p // block_size], p % block_size) for p in range(seq_len)]
            written_before = seq_len - new if case.brings_keys and not spec.kv_sharing else seq_len
            for position in range(written_before):
                self._store(cache, 0, places[position], keys[request][position])
                self._store(cache, 1, places[position], values[request][position])
            slots += [-1] * (new - seq_len)  # a request without keys pads a graph's batch
            slots += [b * block_size + offset for b, offset in places[max(0, seq_len - new) :]]
        self._table = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), columns)
        self._slots = torch.tensor(slots + [-1] * case.padding, dtype=torch.int64)
        return cache.to(self.device)

    def _store(
        self, cache: torch.Tensor, index: int, place: tuple[int, int], row: torch.Tensor
    ) -> None:
        scale = (self.layer._k_scale, self.layer._v_scale)[index].cpu()
        block, offset = place
        if cache.dtype == torch.int8:
            store_int8(cache[block, index, offset], row)
            return
        stored = as_stored(row, scale, cache.dtype)
        target = cache[block, index, offset, :, : row.shape[-1]]
        if stored.dtype.itemsize == 1:
            target, stored = target.view(torch.uint8), stored.view(torch.uint8)
        target.copy_(stored)

    def _make_masks(self) -> list[torch.Tensor]:
        masks = []
        for query_len, seq_len in zip(self.case.query_lens, self.case.seq_lens, strict=True):
            mask = torch.rand(query_len, seq_len, generator=self._random) < 0.6
            mask[1::3] = False  # rows that see nothing
            masks.append(mask)
        return masks

    def _make_batch(self) -> AttentionBatch:
        case, spec = self.case, self.spec
        masks = self.masks
        flat = None
        if masks is not None:
            flat = torch.cat([torch.zeros(0).bool(), *(mask.reshape(-1) for mask in masks)])
        writes = case.brings_keys and not spec.kv_sharing
        ranges = {"image": [PlaceholderRange(*r) for r in case.ranges]} if case.ranges else None
        return AttentionBatch.create(
            case.query_lens,
            case.seq_lens,
            block_table=self._table,
            slot_mapping=self._slots if writes else None,
            key_lens=None if self.new_lens == case.query_lens else self.new_lens,
            custom_mask=None if flat is None else flat.to(self.device),
            multi_modal_placeholder_index_maps=ranges,
            max_decode_query_len=case.max_decode_query_len,
            device=self.device,
        )

    def impl_arguments(self) -> dict[str, Any]:
        """What the impl of this step's layer is constructed with."""
        spec = self.spec
        return {
            **spec.impl_arguments(),
            "scale": self.scale,
            "alibi_slopes": self.slopes,
            "kv_sharing_target_layer_name": "target" if spec.kv_sharing else None,
            "sinks": self.sinks,
        }

    def impl_of(self, backend_cls: type[AttentionBackend]) -> AttentionImpl[Any]:
        """The backend's impl of this step's layer."""
        return backend_cls.get_impl_cls()(**self.impl_arguments())

    def metadata_of(self, backend_cls: type[AttentionBackend]) -> Any:
        """The backend's metadata of this step's batch."""
        return backend_cls.make_builder(self.spec, self.device).build(self.batch)

    def forward(
        self, backend_cls: type[AttentionBackend], kv_cache: torch.Tensor | None, **more: Any
    ) -> Any:
        """What the backend's forward returns over this cache, which it writes.

        Args:
            backend_cls: the backend.
            kv_cache: its cache, or None.
            **more: further arguments of the forward; or `impl`, to take that one.
        """
        impl = more.pop("impl", None) or self.impl_of(backend_cls)
        metadata = self.metadata_of(backend_cls)
        return impl.forward(
            self.layer, self.query, self.key, self.value, kv_cache, metadata, **more
        )

    def ranges_of(self, request: int) -> list[tuple[int, int]]:
        """The ranges of a request."""
        return [(start, end) for r, start, end in self.case.ranges if r == request]

    def seen_by(self, request: int, **changes: Any) -> torch.Tensor:
        """(query_len, seq_len) bool: which key each query of a request sees; see `expected`."""
        visibility: dict[str, Any] = {
            "causal": self.spec.causal,
            "window": self.spec.sliding_window,
            "ranges": self.ranges_of(request),
            "mask": None if self.masks is None else self.masks[request],
        }
        given = {name: value for name, value in changes.items() if name in visibility}
        sizes = (len(self.queries[request]), len(self.keys[request]))
        return oracle.sees(*sizes, **(visibility | given))

    def expected(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, lse) of the batch's tokens in float64, by the oracle.

        Args:
            **changes: what to compute differently: an argument of the oracle (`cap=None`,
                `window=6`, `mask=None`), or `keys` or `values`, each request's.
        """
        spec, outputs, lses = self.spec, [], []
        keys, values = changes.get("keys", self.keys), changes.get("values", self.values)
        numbers: dict[str, Any] = {
            "scale": self.scale,
            "cap": spec.logits_soft_cap,
            "slopes": self.slopes,
            "symmetric": spec.alibi == ALIBI_SYMMETRIC,
            "sinks": None if self.sinks is None else self.sinks.tolist(),
        }
        numbers |= {name: value for name, value in changes.items() if name in numbers}
        for request, query in enumerate(self.queries):
            output, lse = oracle.attention_of_request(
                query,
                keys[request],
                values[request],
                seen=self.seen_by(request, **changes),
                **numbers,
            )
            outputs.append(output)
            lses.append(lse)
        empty = torch.zeros(0, spec.num_heads, spec.head_size_v, dtype=torch.float64)
        return torch.cat([empty, *outputs]), torch.cat([empty[..., 0], *lses])

    def pytorch(self) -> torch.Tensor:
        """(num_tokens, num_heads, head_size_v): PyTorch's own attention in the layer's dtype.

        Without soft cap, ALiBi and sinks, which it does not have.
        """
        spec = self.spec
        outputs = [torch.zeros(0, spec.num_heads, spec.head_size_v, dtype=spec.dtype)]
        group = spec.num_heads // spec.num_kv_heads
        for request, query in enumerate(self.queries):
            keys, values = self.keys[request], self.values[request]
            if not len(query) or not len(keys):
                zeros = torch.zeros(len(query), spec.num_heads, spec.head_size_v)
                outputs.append(zeros.to(spec.dtype))
                continue
            seen = self.seen_by(request)
            scale = abs(self.scale) or 1.0  # PyTorch gives NaN for one that is not above 0
            sign = math.copysign(1.0, self.scale) if self.scale else 0.0
            q, k, v = (
                t.transpose(0, 1)[None].to(self.device, spec.dtype)
                for t in (sign * query, *(t.repeat_interleave(group, 1) for t in (keys, values)))
            )
            result = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen.to(self.device), scale=scale
            )[0].cpu()
            outputs.append(result.masked_fill(~seen.any(-1)[:, None], 0.0).transpose(0, 1))
        return torch.cat(outputs)
