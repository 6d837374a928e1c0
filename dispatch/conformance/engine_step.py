"""The tensors of a case, made up as an engine would have them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from attn_dispatch.conformance.cases import Case, CaseTensors, query_size
from attn_dispatch.conformance.kv_encoding import (
    as_stored,
    dequantized,
    encoded_parts,
    layer_with,
    nan_cache,
    stored_size,
)
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.key_positions import KeyPositions
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.types import PlaceholderRange

__all__ = ["GARBAGE_BLOCKS", "MEMORY", "EngineStep"]

_View = Callable[[torch.Tensor], torch.Tensor]
#: Layouts of (tokens, heads, size) in memory: the shape of the allocation, and the view of it.
_MEMORY: dict[str, Callable[[int, int, int], tuple[tuple[int, ...], _View]]] = {
    "contiguous": lambda tokens, heads, size: ((tokens, heads, size), lambda t: t),
    "fused": lambda tokens, heads, size: (
        (tokens, 3 + heads * size),
        lambda t: t[:, 3:].unflatten(1, (heads, size)),
    ),
    "transposed": lambda tokens, heads, size: ((heads, tokens, size), lambda t: t.transpose(0, 1)),
    "strided": lambda tokens, heads, size: ((tokens, heads, 2 * size), lambda t: t[..., ::2]),
}
MEMORY = tuple(_MEMORY)

#: What an engine may leave in the entries of a block table that no request uses.
GARBAGE_BLOCKS = (-1, 2**31 - 1, 0, -(2**31), 1_000_000)


class EngineStep(CaseTensors):
    """A case with tensors that are made up for it.

    The cache's unused slots hold NaN, unused entries of the block table garbage, and rows are in
    the memory layouts of an engine.

    Args:
        case: the step as data.
        device: where its tensors go.
        arch: of the device; decides what "fp8" means.

    Attributes:
        query, key, value: the arguments of a forward; no key and value if the cache holds them all.
        kv_cache: None without a cache, as are the batch's block table and slots.
        batch: as an engine gives it.
        arch: of the device.
        exact_keys, exact_values: those of each request, before a cache rounded them.
        min_cache_bytes: the storage of a copy of the cache has at least this size.
        parts: what `key` and `value` are called.
    """

    min_cache_bytes: int = 0
    parts: tuple[str, str] = ("keys", "values")

    key: Any = None
    value: Any = None
    kv_cache: Any = None
    _table: Any = None
    _slots: Any = None

    def __init__(self, case: Case, device: torch.device | str = "cpu", arch: str = "") -> None:
        spec, device = case.spec, torch.device(device)
        self.case, self.arch = case, arch
        self._random = torch.Generator().manual_seed(case.seed)
        has_cache = spec.block_size is not None
        self.new_lens = case.new_lens or (case.query_lens if has_cache else case.seq_lens)
        per_head, scales = self._make_per_head(device), self._make_scales()

        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        queries = [self._new(n, heads, spec.head_size) for n in case.query_lens]
        keys = [self._new(n, kv_heads, spec.head_size) for n in case.seq_lens]
        values = [self._new(n, kv_heads, spec.head_size_v) for n in case.seq_lens]
        own = {"query": queries, "key": keys, "value": values}
        for name, request, first, end, number in case.planted:
            own[name][request][first:end, 0, 0] = number
        self.exact_keys, self.exact_values = keys, values
        query = self._lay(queries, heads, spec.head_size, device)
        if case.brings_keys:
            # A layer that shares another's cache must not use the keys that it is given.
            shown = [self._normal(*k.shape).to(k) for k in keys] if spec.kv_sharing else keys
            self.key = self._lay(self._last(shown), kv_heads, spec.head_size, device)
            self.value = self._lay(self._last(values), kv_heads, spec.head_size_v, device)
        if has_cache:
            dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, arch)
            self.kv_cache = self._make_cache((keys, values), scales, dtype).to(device)
            keys = [dequantized(k, scales[0], dtype) for k in keys]
            values = [dequantized(v, scales[1], dtype) for v in values]
        super().__init__(
            case=case,
            layer=layer_with(scales, device),
            scale=0.8 * query_size(spec) ** -0.5,
            query=query,
            queries=[q.double() for q in queries],
            keys=[k.double() for k in keys],
            values=[v.double() for v in values],
            masks=self._make_masks() if spec.custom_mask else None,
            **per_head,
        )
        self.batch = self._make_batch()

    def _make_per_head(self, device: torch.device) -> dict[str, Any]:
        """The slopes and sinks of the layer."""
        spec = self.spec
        return {
            "slopes": [0.7 ** (1 + h) for h in range(spec.num_heads)] if spec.alibi else None,
            "sinks": self._normal(spec.num_heads).float().to(device) if spec.sinks else None,
        }

    def _make_scales(self) -> list[torch.Tensor]:
        """Two scales, which are 1 for a cache without."""
        spec = self.spec
        shape = (spec.num_kv_heads,) if spec.kv_scales == "per_head" else ()
        scales = [0.01 + 0.03 * torch.rand(shape, generator=self._random) for _ in range(2)]
        return scales if spec.kv_cache_dtype.startswith("fp8") else [torch.ones(())] * 2

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random, dtype=torch.float64)

    def _new(self, *shape: int) -> torch.Tensor:
        return self._normal(*shape).to(self.spec.dtype)

    def _last(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The new rows of each request; zeros where it has none but pads a graph's batch."""
        return [
            F.pad(tensor, (0, 0, 0, 0, max(0, new - len(tensor)), 0))[max(0, len(tensor) - new) :]
            for tensor, new in zip(tensors, self.new_lens, strict=True)
        ]

    def _lay(
        self, parts: Sequence[torch.Tensor], heads: int, size: int, device: torch.device
    ) -> torch.Tensor:
        """The requests' rows one after another and padding after them, in the case's memory."""
        rows = torch.cat([*parts, torch.zeros(self.case.padding, heads, size).to(self.spec.dtype)])
        shape, view = _MEMORY[self.case.memory](len(rows), heads, size)
        laid = view(torch.full(shape, math.nan, dtype=rows.dtype, device=device))
        return laid.copy_(rows)

    def copy_of_cache(self) -> torch.Tensor:
        """A copy of the cache, for a call to write to."""
        copy: torch.Tensor = self.kv_cache.clone()
        storage = copy.untyped_storage()
        if storage.nbytes() < self.min_cache_bytes:
            storage.resize_(self.min_cache_bytes)
        return copy

    def fill_padding(self, number: float) -> None:
        """Overwrite the rows of query, key and value that belong to no request."""
        for tensor in (self.query, self.key, self.value):
            if tensor is not None:
                tensor[len(tensor) - self.case.padding :] = number

    def _make_cache(
        self,
        tensors: Sequence[Sequence[torch.Tensor]],
        scales: Sequence[torch.Tensor],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """A cache on the CPU with the keys and values that are older than the step."""
        spec, block_size = self.spec, self.block_size
        num_blocks, older = self._place_requests()
        size = stored_size(spec.kv_cache_dtype, max(spec.head_size, spec.head_size_v))
        shape = (num_blocks, 2, block_size, spec.num_kv_heads, size)
        cache = nan_cache(shape, spec.kv_cache_layout or "NHD", dtype)
        stored = cache.view(torch.uint8) if dtype.itemsize == 1 else cache
        for request, old in enumerate(older):
            for index, each in enumerate(tensors):
                parts = encoded_parts(each[request][: len(old)], scales[index], dtype)
                for part, content in parts:
                    stored[old // block_size, index, old % block_size, :, part] = content
        return cache

    def _place_requests(self) -> tuple[int, list[torch.Tensor]]:
        """Choose the blocks of each request: makes the block table and the slots of new tokens.

        Returns:
            The number of blocks, and the slots of each request's older tokens.
        """
        spec, case, block_size = self.spec, self.case, self.block_size
        needed = [-(-n // block_size) for n in case.seq_lens]
        num_blocks = sum(needed) + 2
        free = torch.randperm(num_blocks, generator=self._random).tolist()
        columns = max(needed, default=0) + 1
        rows, slots, older = [], [], []
        for request, (seq_len, new) in enumerate(zip(case.seq_lens, self.new_lens, strict=True)):
            blocks = [free.pop() for _ in range(needed[request])]
            garbage = [GARBAGE_BLOCKS[(request + i) % len(GARBAGE_BLOCKS)] for i in range(columns)]
            rows.append((blocks + garbage)[:columns])
            own = [blocks[p // block_size] * block_size + p % block_size for p in range(seq_len)]
            is_written = case.brings_keys and not spec.kv_sharing
            older.append(torch.tensor(own[: seq_len - new if is_written else seq_len]).long())
            slots += [-1] * (new - seq_len)  # a request without keys pads a graph's batch
            slots += own[max(0, seq_len - new) :]
        self._table = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), columns)
        self._slots = torch.tensor(slots + [-1] * case.padding, dtype=torch.int64)
        return num_blocks, older

    # The cache, for checks that read or change it. A subclass has another one.

    @property
    def block_size(self) -> int:
        """Tokens per block of the step's cache."""
        assert self.spec.block_size is not None
        return self.spec.block_size

    def part_of(self, kv_cache: torch.Tensor, index: int) -> torch.Tensor:
        """(num_blocks, block_size, ...), the keys (0) or values (1) of a cache."""
        return kv_cache[:, index]

    def bytes_by_slot(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """(number of slots, bytes of a slot) uint8, a copy."""
        by_slot = kv_cache.permute(0, 2, 1, 3, 4).contiguous().flatten(0, 1)
        return by_slot.flatten(1).view(torch.uint8)

    def wider_cache(self) -> torch.Tensor:
        """A cache for a head more."""
        num_blocks, _, block_size, heads, size = self.kv_cache.shape
        cache: torch.Tensor = self.kv_cache
        return cache.new_empty(num_blocks, 2, block_size, heads + 1, size)

    def cache_of(self, num_blocks: int) -> torch.Tensor:
        """A cache of this many blocks, with any content."""
        cache: torch.Tensor = self.kv_cache
        return cache[:1].repeat(num_blocks, *[1] * (cache.dim() - 1))

    def empty_rows(self, count: int) -> list[torch.Tensor]:
        """Zeros in place of query, key and value, of this many tokens."""
        given = (self.query, self.key, self.value)
        return [each.new_zeros(count, *each.shape[1:]) for each in given]

    def change_cached(self, index: int, position: int = 2) -> None:
        """Replace a key (0) or value (1) of the first request, which has a past."""
        tensor = (self.keys, self.values)[index][0]
        block, offset = self._table[0, position // self.block_size], position % self.block_size
        cached = self.part_of(self.kv_cache, index)
        row = as_stored(-3 * tensor[position], torch.ones(()), cached.dtype)
        cached[int(block), offset, :, : row.shape[-1]] = row.to(self.device)
        tensor[position] = row.double()

    def double_cache_scale(self, index: int) -> None:
        """Double all keys (0) or values (1) by their scale; the step brings none."""
        scales = [self.layer._k_scale, self.layer._v_scale]
        scales[index] = 2 * scales[index]
        self.layer = layer_with(scales, self.device)
        setattr(self, self.parts[index], [2 * each for each in getattr(self, self.parts[index])])

    def _make_masks(self) -> list[torch.Tensor]:
        masks = []
        for query_len, seq_len in zip(self.case.query_lens, self.case.seq_lens, strict=True):
            mask = torch.rand(query_len, seq_len, generator=self._random) < 0.6
            mask[1::3] = False  # rows that see nothing
            masks.append(mask)
        return masks

    def _make_batch(self) -> AttentionBatch:
        case = self.case
        flat = None
        if self.masks is not None:
            flat = torch.cat([torch.zeros(0).bool(), *(mask.reshape(-1) for mask in self.masks)])
            flat = flat.to(self.device)
        ranges = {"image": [PlaceholderRange(*r) for r in case.ranges]} if case.ranges else None
        true = torch.tensor(case.seq_lens, device=self.device).int()
        return AttentionBatch.create(
            case.query_lens,
            case.seq_lens if case.bounds is None else true,
            lengths="exact" if case.bounds is None else "upper_bound",
            seq_lens_upper_bound=case.bounds,
            block_table=self._table,
            slot_mapping=self._batch_slots(),
            key_lens=None if self.new_lens == case.query_lens else self.new_lens,
            custom_mask=flat,
            multi_modal_placeholder_index_maps=ranges,
            max_decode_query_len=case.max_decode_query_len,
            key_positions=self._key_positions(),
            device=self.device,
        )

    def _batch_slots(self) -> torch.Tensor | None:
        """The slots of new tokens; None for a step that writes nothing."""
        writes = self.case.brings_keys and not self.spec.kv_sharing
        return self._slots if writes else None

    def _key_positions(self) -> KeyPositions | None:
        if self.case.positions is None:
            return None
        offset, step, lengths = self.case.positions
        return KeyPositions.create(lengths, offset=offset, step=step)

    def impl_arguments(self) -> dict[str, Any]:
        """The arguments of the constructor of an impl of this step's layer."""
        return {
            **self.spec.impl_arguments(),
            "scale": self.scale,
            "alibi_slopes": self.slopes,
            "kv_sharing_target_layer_name": "target" if self.spec.kv_sharing else None,
            "sinks": self.sinks,
        }

    def impl_of(self, backend_cls: type[AttentionBackend]) -> AttentionImpl[Any]:
        """The backend's impl of this step's layer."""
        return backend_cls.get_impl_cls()(**self.impl_arguments())

    def metadata_of(self, backend_cls: type[AttentionBackend]) -> Any:
        """The backend's metadata of this step's batch."""
        return backend_cls.make_builder(self.spec, self.device).build(self.batch)

    def forward(
        self, backend_cls: type[AttentionBackend], kv_cache: KVCache | None, **more: Any
    ) -> Any:
        """What the backend's forward returns; it writes to this cache.

        Args:
            backend_cls: the backend.
            kv_cache: its cache, or None.
            **more: further arguments of the forward; or `impl`, an impl to use.
        """
        impl = more.pop("impl", None) or self.impl_of(backend_cls)
        metadata = self.metadata_of(backend_cls)
        return impl.forward(
            self.layer, self.query, self.key, self.value, kv_cache, metadata, **more
        )

    def requests(self, chosen: Sequence[int]) -> EngineStep:
        """The step with these of its requests, in this order, over the same cache."""
        case, part = self.case, copy.copy(self)

        def rows(lens: Sequence[int]) -> torch.Tensor:
            parts = torch.arange(sum(lens)).split(list(lens))
            return torch.cat([torch.zeros(0).long(), *(parts[request] for request in chosen)])

        lens: dict[str, Any] = {
            name: tuple(lengths[request] for request in chosen)
            for name in ("query_lens", "seq_lens", "new_lens", "bounds")
            if (lengths := getattr(case, name)) is not None
        }
        if case.positions is not None:
            offset, step, lengths = case.positions
            lens["key_positions"] = (offset, step, tuple(lengths[i] for i in chosen))
        part.case, part.new_lens = case.replace(**lens), tuple(self.new_lens[i] for i in chosen)
        new = rows(self.new_lens)
        part.query = self.query[rows(case.query_lens).to(self.device)]
        if self.key is not None:
            part.key, part.value = self.key[new.to(self.device)], self.value[new.to(self.device)]
        if self._table is not None:
            part._table, part._slots = self._table[list(chosen)], self._slots[new]
        part.batch = part._make_batch()
        return part
