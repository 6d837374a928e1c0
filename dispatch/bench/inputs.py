"""The tensors of a case: queries, keys and values, and a cache with its blocks in random order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.batch_checks import slots_of
from attn_dispatch.interface.impl import get_kv_scales
from attn_dispatch.interface.kv_access import gather_kv, write_kv_cache
from attn_dispatch.interface.kv_cache import (
    STRIDE_ORDERS,
    allocate_kv_cache,
    kv_cache_shape,
    view_kv_cache,
)
from attn_dispatch.interface.kv_layout_table import kv_layout_named
from attn_dispatch.interface.kv_view import KVCache, kv_strides_of
from attn_dispatch.interface.quantization import (
    KVScales,
    has_token_scales,
    is_fp8,
    kv_cache_torch_dtype,
    stored_head_size,
)
from attn_dispatch.platforms.detect import detect_device

__all__ = ["Inputs", "alibi_slopes"]

#: Tokens whose keys are made and written at a time.
_CHUNK_TOKENS = 1 << 16

#: The largest value that an fp8 cache can hold, in standard deviations of keys and of values, as
#: calibration on such numbers would find. They differ, so that exchanged scales show.
_K_RANGE, _V_RANGE = 6.0, 5.0


class Inputs:
    """A case with tensors, made from a seed; the same on every run on the same device.

    Attributes:
        case, spec, device: of the tensors.
        query: (num_tokens, num_heads, head_size).
        key, value: (num_tokens, num_kv_heads, head_size), the new ones; None if only the cache has
            them. A cache always has them: their slots are −1.
        kv_cache: (num_blocks, 2, block_size, num_kv_heads, stored head size), NHD; or a cache with
            the case's layout; or None.
        block_table: (num_reqs, max_blocks) int32, or None.
        query_start_loc: (num_reqs + 1,) int32.
        seq_lens: (num_reqs,) int32.
        batch: as an engine would give it.
        layer: has the scales of the cache.
        slopes: (num_heads,) float32, or None.
        sinks: (num_heads,) float32, or None; of bfloat16's precision, which some kernels need.
    """

    key: Any = None
    value: Any = None
    kv_cache: Any = None
    block_table: Any = None
    sinks: torch.Tensor | None = None

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.spec, self.device = case, case.spec(), device
        self._host = torch.Generator("cpu").manual_seed(seed)
        self._random = torch.Generator(device).manual_seed(seed)
        self.query = self._normal(case.num_tokens, case.num_heads)
        self.layer = KVScales()
        self.layer.to(device)
        self.slopes = alibi_slopes(case.num_heads).to(device) if case.alibi else None
        if case.sinks:
            sinks = torch.randn(case.num_heads, generator=self._host, device="cpu")
            self.sinks = sinks.bfloat16().float().to(device)
        if case.has_kv_cache:
            self._make_cache()
        else:
            self.key = self._normal(case.num_tokens, case.num_kv_heads)
            self.value = self._normal(case.num_tokens, case.num_kv_heads)
        self.batch = AttentionBatch.create(
            case.query_lens,
            case.seq_lens,
            block_table=self.block_table,
            block_size=case.block_size if case.causal else None,
            slot_mapping=torch.full((case.num_tokens,), -1, device="cpu")
            if case.brings_keys
            else None,
            max_decode_query_len=max(case.query_lens) if case.kind == "decode" else 1,
            device=device,
        )
        self.query_start_loc, self.seq_lens = self.batch.query_start_loc, self.batch.seq_lens

    def _normal(self, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(
            tokens,
            heads,
            self.case.head_size,
            generator=self._random,
            dtype=self.case.torch_dtype,
            device=self.device,
        )

    def _make_cache(self) -> None:
        case = self.case
        needed = [-(-n // case.block_size) for n in case.seq_lens]
        order = torch.randperm(sum(needed), generator=self._host, device="cpu").int()
        table = torch.nn.utils.rnn.pad_sequence(list(order.split(needed)), batch_first=True)
        dtype = kv_cache_torch_dtype(
            case.kv_cache_dtype, case.torch_dtype, detect_device(self.device).arch
        )
        if is_fp8(dtype):
            largest = torch.finfo(dtype).max
            self.layer.set(_K_RANGE / largest, _V_RANGE / largest, ((),), self.device)
        self.kv_cache = self._allocate(sum(needed), dtype)
        seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32, device="cpu")
        slots = slots_of(seq_lens, seq_lens, table, case.block_size)
        for some in slots.split(_CHUNK_TOKENS):
            key = self._normal(len(some), case.num_kv_heads)
            value = self._normal(len(some), case.num_kv_heads)
            scales = (self.layer._k_scale, self.layer._v_scale)
            write_kv_cache(key, value, self.kv_cache, some.to(self.device), *scales)
        self.block_table = table.to(self.device)
        if case.brings_keys:
            self.key, self.value = self._rows(case.query_lens)

    def _allocate(self, num_blocks: int, dtype: torch.dtype) -> KVCache:
        case = self.case
        if case.kv_layout is not None:
            arch = detect_device(self.device).arch
            layout = kv_layout_named(case.kv_layout)
            found = layout.allocate(self.spec, num_blocks, self.device, arch=arch)
            self.spec = self.spec.replace(kv_strides=kv_strides_of(found))
            return found
        size = stored_head_size(case.kv_cache_dtype, case.head_size)
        shape = kv_cache_shape(num_blocks, case.block_size, case.num_kv_heads, size)
        return allocate_kv_cache(shape, STRIDE_ORDERS["NHD"], dtype, self.device)

    def keys_and_values(
        self, request: int, keys: slice, heads: slice, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some of a request's keys and values as the cache holds them, scales applied.

        Args:
            request: its number.
            keys: from a multiple of block_size, to any end.
            heads: of the KV heads.
            dtype: of the result.

        Returns:
            Two of (num_keys, num_heads, head_size).
        """
        case = self.case
        if self.kv_cache is None:
            start = self.batch.query_start_list[request]
            rows = slice(start + keys.start, start + keys.stop)
            return self.key[rows, heads].to(dtype), self.value[rows, heads].to(dtype)
        blocks = self.block_table[request, keys.start // case.block_size :]
        stored = view_kv_cache(self.kv_cache, case.head_size, case.head_size)
        found = []
        for part, scale in zip(stored, get_kv_scales(self.layer, self.kv_cache), strict=True):
            own = scale[:, :, heads] if has_token_scales(part.dtype) else scale
            num_keys = keys.stop - keys.start
            found.append(gather_kv(part[:, :, heads], blocks, num_keys, own, dtype))
        return found[0], found[1]

    def ragged_keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values without a cache, (sum of seq_lens, num_kv_heads, head_size) each."""
        if self.kv_cache is None:
            return self.key, self.value
        return self._rows(self.case.seq_lens)

    def _rows(self, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The last keys and values of each request, this many, one request after another."""
        keys, values = [], []
        for request, (count, num_keys) in enumerate(zip(lengths, self.case.seq_lens, strict=True)):
            whole = (slice(0, num_keys), slice(None), self.case.torch_dtype)
            key, value = self.keys_and_values(request, *whole)
            keys.append(key[num_keys - count :])
            values.append(value[num_keys - count :])
        return torch.cat(keys), torch.cat(values)

    def key_start_loc(self) -> torch.Tensor:
        """(num_reqs + 1,) int32: where each request starts in `ragged_keys_and_values`."""
        starts = [0, *itertools.accumulate(self.case.seq_lens)]
        return torch.tensor(starts, dtype=torch.int32, device=self.device)

    def empty_output(self) -> torch.Tensor:
        """An output full of NaN, so that elements that are not written show."""
        return torch.full_like(self.query, float("nan"))


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """(num_heads,) float32 on the host: the slopes of the ALiBi paper, arXiv:2108.12409.

    2^(-8/n), its square, and so on, for n heads, n a power of two; further heads have every second
    slope of 2n heads.
    """
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (num_heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")
