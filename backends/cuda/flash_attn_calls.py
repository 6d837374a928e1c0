"""Calls of FlashAttention: what the builder plans of one, and how each package is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.backends.triton_arguments import suits_tma
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.spec import AttentionSpec

__all__ = [
    "Caller",
    "FlashCall",
    "Functions",
    "Pages",
    "Work",
    "aligned",
    "call_flash_attn_2",
    "call_flash_attn_3",
    "call_flash_attn_4",
    "call_vllm",
    "check_cache",
    "gather",
    "schedule_of",
    "sides",
    "sums",
]

#: A larger window is as good as this one, and positions plus this are still an int32.
_WINDOW_LIMIT = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Pages:
    """Where the pages of some requests are, as Work says it."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    key_starts: torch.Tensor | None


@dataclass(kw_only=True, eq=False)
class FlashCall:
    """Requests that stand together in the batch and are called for together.

    Attributes:
        tokens: their rows of query and output.
        keys: their rows of key and value, if these are all their keys and may be read as rows.
        gathered: the blocks of a request that is called for alone, to be copied into rows, and the
            number of keys in them; None where pages are read as they are.
        query_starts: (num_reqs + 1,) int32, where each request's rows begin, from 0 on.
        seq_lens: (num_reqs,) int32.
        block_table: (num_reqs, max_blocks) int32, or None.
        columns: (max_blocks,) int64, their numbers, if there is a block table.
        row_starts: (num_reqs + 1,) int32, where each request's rows of keys begin, from 0 on, if
            `keys` are given.
        pages: the block table without the blocks that the window has passed; None where that must
            be found out in the call, since a graph replays it for other requests.
        max_query_len, max_seq_len, is_uniform: see Work.
        is_blind: there are no keys at all.
        schedule: see Work.
    """

    tokens: slice
    keys: slice | None
    gathered: tuple[torch.Tensor, int] | None
    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor | None
    columns: torch.Tensor | None
    row_starts: torch.Tensor | None
    max_query_len: int
    max_seq_len: int
    is_uniform: bool
    is_blind: bool
    pages: Pages | None = None
    schedule: torch.Tensor | None = None

    def live_pages(self, spec: AttentionSpec) -> Pages:
        """The pages without those blocks that the window has passed for every query.

        They may be another's by now, or hold NaN. All positions are counted from the end of the
        keys, so nothing else changes. Nothing waits for the device.
        """
        assert self.block_table is not None
        assert spec.block_size is not None
        table, seq_lens = self.block_table, self.seq_lens
        if spec.sliding_window is not None and self.columns is not None:
            query_lens = 1 if self.is_uniform else self.query_starts.diff()
            before = seq_lens - (query_lens - 1 + _window(spec.sliding_window))
            passed = before.clamp(min=0) // spec.block_size
            columns = (self.columns + passed[:, None]).clamp(max=table.shape[1] - 1)
            table = table.gather(1, columns)
            seq_lens = torch.sub(seq_lens, passed, alpha=spec.block_size)
        starts = None if self.is_uniform else sums(seq_lens)
        return Pages(block_table=table, seq_lens=seq_lens, key_starts=starts)


def _window(sliding_window: int) -> int:
    return min(sliding_window, _WINDOW_LIMIT)


def sums(lengths: torch.Tensor) -> torch.Tensor:
    """(number + 1,) int32: where each of these lengths begins, and where the last one ends."""
    return torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def sides(causal: bool, sliding_window: int | None) -> tuple[int, int]:
    """Keys seen to the left and to the right of a query's own; −1 for all."""
    if sliding_window is None:
        return -1, -1
    left = _window(sliding_window) - 1
    return left, 0 if causal else left


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, size) with every head in one piece at a multiple of 16 bytes."""
    return rows if suits_tma(rows) else rows.clone(memory_format=torch.contiguous_format)


def gather(cache: torch.Tensor, blocks: torch.Tensor, num_keys: int) -> torch.Tensor:
    """(num_keys, num_kv_heads, size), out of the blocks of one view of `split_kv_cache`."""
    return cache.index_select(0, blocks).flatten(0, 1)[:num_keys]


def check_cache(kv_cache: torch.Tensor, spec: AttentionSpec) -> None:
    """Check that a cache has the blocks that a provider was picked for, where kernels can read.

    Raises:
        InvalidInputError: it has not.
    """
    if kv_cache.shape[2] != spec.block_size:
        raise InvalidInputError(
            f"kv_cache has blocks of {kv_cache.shape[2]} tokens, and attn_metadata was built for "
            f"layers with block_size={spec.block_size}. Describe the layer by its own cache."
        )
    if kv_cache.numel() and not suits_tma(kv_cache):
        raise InvalidInputError(
            f"kv_cache has strides {kv_cache.stride()} from address {kv_cache.data_ptr()} on; "
            "FlashAttention needs heads without gaps that start at multiples of 16 bytes. Make the "
            "cache by allocate_kv_cache."
        )


def schedule_of(
    function: Callable[..., torch.Tensor], spec: AttentionSpec, call: FlashCall, pages: Pages
) -> torch.Tensor:
    """How FlashAttention 3 shares out the work of a call over pages, the same for all layers.

    Its kernel counts on what get_scheduler_metadata was told, so it is told of the same shapes.
    """
    block_size = spec.block_size
    assert block_size is not None
    return function(
        len(pages.seq_lens),
        call.max_query_len,
        pages.block_table.shape[1] * block_size,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_size,
        pages.seq_lens,
        qkv_dtype=spec.dtype,
        headdim_v=spec.head_size_v,
        cu_seqlens_q=call.query_starts,
        page_size=block_size,
        causal=spec.causal,
        window_size=sides(spec.causal, spec.sliding_window),
        has_softcap=spec.logits_soft_cap is not None,
    )


#: A provider's functions by name, once it is imported; None for one that it does not have.
Functions = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One call: attention of some requests, in words that all the packages can be told.

    Attributes:
        query: (num_tokens, num_heads, head_size), rows at multiples of 16 bytes.
        keys: pages, (num_blocks, block_size, num_kv_heads, head_size), if there is a block_table;
            else rows, (num_keys, num_kv_heads, head_size).
        values: the same with head_size_v.
        out: (num_tokens, num_heads, head_size_v), which a package may write to.
        query_starts: (num_reqs + 1,) int32, where each request's rows of query begin.
        seq_lens: (num_reqs,) int32, keys of each request.
        key_starts: (num_reqs + 1,) int32, the sums of seq_lens: where each request's rows of keys
            begin, if they are rows. None for pages of requests of one token.
        max_query_len, max_seq_len: at least the longest.
        is_uniform: every request has one query token.
        scale: of the scores, positive.
        causal: masks align to the end of the keys.
        window: keys seen to the left and to the right of a query's own; −1 for all.
        soft_cap: 0 for none.
        slopes: (num_heads,) float32, or None.
        sinks: (num_heads,) bfloat16, or None.
        returns_lse: the log-sum-exp is wanted.
        block_table: (num_reqs, max_blocks) int32, or None.
        schedule: what the package's get_scheduler_metadata made for this batch, or None.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    out: torch.Tensor
    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    key_starts: torch.Tensor | None
    max_query_len: int
    max_seq_len: int
    is_uniform: bool
    scale: float
    causal: bool
    window: tuple[int, int]
    soft_cap: float
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    returns_lse: bool
    block_table: torch.Tensor | None = None
    schedule: torch.Tensor | None = None


#: Does the work: (output, lse (num_heads, num_tokens) or None).
Caller = Callable[[Functions, Work], tuple[torch.Tensor, torch.Tensor | None]]


def call_flash_attn_2(functions: Functions, work: Work) -> tuple[torch.Tensor, torch.Tensor | None]:
    """flash_attn: one token a request goes to the function that splits long requests."""
    common = {
        "softmax_scale": work.scale,
        "causal": work.causal,
        "window_size": work.window,
        "softcap": work.soft_cap,
        "alibi_slopes": work.slopes,
        "block_table": work.block_table,
    }
    if work.is_uniform and work.block_table is not None:
        output, lse = functions["flash_attn_with_kvcache"](
            work.query[:, None],
            work.keys,
            work.values,
            cache_seqlens=work.seq_lens,
            return_softmax_lse=True,
            **common,
        )
        return output[:, 0], lse[..., 0].T
    output, lse, _ = functions["flash_attn_varlen_func"](
        work.query,
        work.keys,
        work.values,
        work.query_starts,
        work.key_starts,
        _max_query_len(work),
        work.max_seq_len,
        return_attn_probs=True,
        **common,
    )
    return output, lse


def _max_query_len(work: Work) -> int:
    """What FlashAttention 2 is told: 1 makes it count on a token of every request."""
    return work.max_query_len if work.is_uniform else max(2, work.max_query_len)


def call_flash_attn_3(functions: Functions, work: Work) -> tuple[torch.Tensor, torch.Tensor | None]:
    """flash_attn_interface and sgl_kernel: rows are a cache of one request without pages."""
    keys, values = work.keys, work.values
    if work.block_table is None:
        keys, values = keys[None], values[None]
    options = {} if work.schedule is None else {"scheduler_metadata": work.schedule}
    output, lse, *_ = functions["flash_attn_with_kvcache"](
        work.query,
        keys,
        values,
        cache_seqlens=work.seq_lens,
        page_table=work.block_table,
        cu_seqlens_q=work.query_starts,
        max_seqlen_q=work.max_query_len,
        softmax_scale=work.scale,
        causal=work.causal,
        window_size=work.window,
        softcap=work.soft_cap,
        return_softmax_lse=True,
        **options,
    )
    return output, lse


def call_flash_attn_4(functions: Functions, work: Work) -> tuple[torch.Tensor, torch.Tensor | None]:
    """flash_attn.cute: a side of the window that has no end is None; 0 splits as it sees fit."""
    left, right = (None if side < 0 else side for side in work.window)
    paged = work.block_table is not None
    output, lse, *_ = functions["flash_attn_varlen_func"](
        work.query,
        work.keys,
        work.values,
        cu_seqlens_q=work.query_starts,
        cu_seqlens_k=None if paged else work.key_starts,
        seqused_k=work.seq_lens if paged else None,
        max_seqlen_q=work.max_query_len,
        max_seqlen_k=work.max_seq_len,
        page_table=work.block_table,
        softmax_scale=work.scale,
        causal=work.causal,
        window_size=(left, right),
        learnable_sink=work.sinks,
        softcap=work.soft_cap,
        num_splits=0,
        return_lse=work.returns_lse,
    )
    return output, lse


def call_vllm(version: int) -> Caller:
    """vLLM's build, which has them all behind one function."""

    def call(functions: Functions, work: Work) -> tuple[torch.Tensor, torch.Tensor | None]:
        paged = work.block_table is not None
        max_seq_len = work.max_seq_len
        if work.schedule is not None and work.block_table is not None:  # as `schedule_of` says it
            max_seq_len = work.block_table.shape[1] * work.keys.shape[1]
        result = functions["flash_attn_varlen_func"](
            work.query,
            work.keys,
            work.values,
            _max_query_len(work) if version == 2 else work.max_query_len,
            work.query_starts,
            max_seq_len,
            cu_seqlens_k=None if paged else work.key_starts,
            seqused_k=work.seq_lens if paged else None,
            softmax_scale=work.scale,
            causal=work.causal,
            window_size=list(work.window),
            softcap=work.soft_cap,
            alibi_slopes=work.slopes,
            block_table=work.block_table,
            return_softmax_lse=work.returns_lse,
            out=work.out,
            scheduler_metadata=work.schedule,
            fa_version=version,
            s_aux=work.sinks,
        )
        return result if work.returns_lse else (result, None)

    return call
