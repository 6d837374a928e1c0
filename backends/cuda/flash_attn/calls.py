"""Calls of FlashAttention: what the builder plans of one, in words that all packages can be told.

How each package is told is in `flash_attn_packages.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attn_dispatch.backends.triton.operands import suits_tma
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.spec import AttentionSpec

__all__ = [
    "PAGES_OF_ONE",
    "Attend",
    "FlashCall",
    "Operands",
    "Result",
    "VarlenArgs",
    "aligned",
    "check_block_size",
    "check_strides",
    "gather",
    "is_aligned",
    "part",
]

#: A larger window is as good as this one, and positions plus this are still an int32.
_WINDOW_LIMIT = 1 << 30
#: How rows become pages of one row each.
PAGES_OF_ONE = (-1, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class VarlenArgs:
    """What a package is told of some requests, in words that all packages can be told.

    Their keys are

    - pages, (num_blocks, block_size, num_kv_heads, head_size), if there is a block_table;
    - else rows of each request, (num_reqs, max_seq_len, num_kv_heads, head_size), for a provider
      that reads past rows: behind each TMA finds zeros;
    - else rows, (num_keys, num_kv_heads, head_size).

    It is the same for all layers of a batch.

    Attributes:
        query_start_list: (num_reqs + 1,) int32, where each request's rows of query begin, from 0 on.
        seq_lens: (num_reqs,) int32, keys of each request.
        max_query_len: at least the longest.
        max_seq_len: at least the most keys; of pages, as many as the block table has room for.
        is_decode: every request has one query token.
        causal: masks align to the end of the keys.
        window: keys seen to the left and to the right of a query's own; −1 for all.
        soft_cap: 0 for none.
        returns_lse: the log-sum-exp is wanted.
        block_table: (num_reqs, max_blocks) int32, or None.
        schedule: what the package's get_scheduler_metadata made for this batch, or None.
    """

    query_start_list: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
    is_decode: bool
    causal: bool
    window: tuple[int, int]
    soft_cap: float
    returns_lse: bool
    block_table: torch.Tensor | None = None
    schedule: torch.Tensor | None = None

    @functools.cached_property
    def key_starts(self) -> torch.Tensor:
        """(num_reqs + 1,) int32, the sums of seq_lens: where each request's rows of keys begin."""
        return _sums(self.seq_lens)


class Operands(NamedTuple):
    """What a layer brings to some work.

    Attributes:
        query: (num_tokens, num_heads, head_size), rows at multiples of 16 bytes.
        keys: as VarlenArgs says.
        values: the same with head_size_v.
        out: (num_tokens, num_heads, head_size_v), which a package may write to.
        scale: of the scores, positive.
        slopes: (num_heads,) float32, or None.
        sinks: (num_heads,) bfloat16, or None.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    out: torch.Tensor
    scale: float
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None


#: Output and log-sum-exp, (num_heads, num_tokens) float32, −inf for a row without keys; None for
#: one that is not wanted.
Result = tuple[torch.Tensor, torch.Tensor | None]
#: Does some work for one layer.
Attend = Callable[[Operands], Result]


@dataclass(kw_only=True, eq=False)
class FlashCall:
    """Requests that stand together in the batch and are called for together.

    Attributes:
        spec: the layers.
        bind: makes what does the work.
        get_schedule: FlashAttention 3's get_scheduler_metadata, if the package has it.
        tokens: their rows of query and output.
        keys: their rows of key and value, if these are all their keys and may be read as rows.
        row_shape: what the first dimension of rows of keys becomes for the package; None for rows
            as they are.
        gathered: the blocks of a request that is called for alone, to be copied into rows, and the
            number of keys in them; None where pages are read as they are.
        query_start_list: (num_reqs + 1,) int32, where each request's rows begin, from 0 on.
        seq_lens: (num_reqs,) int32.
        block_table: (num_reqs, max_blocks) int32, or None.
        max_query_len, is_decode: see VarlenArgs.
        max_row_len: the most keys of a request; not of those that a graph may serve later.
        has_no_keys: there are no keys at all.
    """

    spec: AttentionSpec
    bind: Callable[[VarlenArgs], Attend]
    get_schedule: Callable[..., torch.Tensor] | None
    tokens: slice
    keys: slice | None
    row_shape: tuple[int, int] | None
    gathered: tuple[torch.Tensor, int] | None
    query_start_list: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor | None
    max_query_len: int
    max_row_len: int
    is_decode: bool
    has_no_keys: bool
    _over_pages: Attend | None = field(default=None, init=False)

    def prepare(self) -> None:
        """Make at once what the layers will ask for, as far as it can be known."""
        if self.has_no_keys:
            return
        if self.keys is not None:
            _ = self.over_rows
        elif not self.spec.cuda_graph:
            _ = self.over_pages

    @functools.cached_property
    def over_rows(self) -> Attend:
        """Over the rows of key and value that are these requests'."""
        return self.bind(self._work(self.seq_lens, self.max_row_len, self._row_table()))

    def _row_table(self) -> torch.Tensor | None:
        """(num_reqs, max_row_len) int32: the rows of each request, if each is a page."""
        if self.row_shape != PAGES_OF_ONE:
            return None
        places = torch.arange(self.max_row_len, dtype=torch.int32, device=self.seq_lens.device)
        return _sums(self.seq_lens)[:-1, None] + places

    @property
    def over_pages(self) -> Attend:
        """Over the pages, or what is gathered of them.

        A graph replays what is made of the batch's lengths and blocks, so there it is made in
        every call.
        """
        if self._over_pages is None or self.spec.cuda_graph:
            self._over_pages = self.bind(self._work_over_pages())
        return self._over_pages

    def _work_over_pages(self) -> VarlenArgs:
        block_table, seq_lens = self._live_pages()
        if self.gathered is not None:
            return self._work(seq_lens, self.gathered[1], None)
        work = self._work(seq_lens, block_table.shape[1] * (self.spec.block_size or 1), block_table)
        if self.get_schedule is None or self.spec.cuda_graph:
            return work
        return dataclasses.replace(work, schedule=_schedule(self.get_schedule, self.spec, work))

    def _work(
        self, seq_lens: torch.Tensor, max_seq_len: int, block_table: torch.Tensor | None
    ) -> VarlenArgs:
        spec = self.spec
        return VarlenArgs(
            query_start_list=self.query_start_list,
            seq_lens=seq_lens,
            max_query_len=self.max_query_len,
            max_seq_len=max_seq_len,
            is_decode=self.is_decode,
            causal=spec.causal,
            window=_sides(spec.causal, spec.sliding_window),
            soft_cap=spec.logits_soft_cap or 0.0,
            returns_lse=spec.returns_lse,
            block_table=block_table,
        )

    def as_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(num_keys, num_kv_heads, size), as the package takes rows: see VarlenArgs."""
        return rows if self.row_shape is None else rows.view(self.row_shape + rows.shape[1:])

    def _live_pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(block table, lengths) without those blocks that the window has passed for every query.

        They may be another's by now, or hold NaN. All positions are counted from the end of the
        keys, so nothing else changes. Nothing waits for the device.
        """
        table, seq_lens, block_size = self.block_table, self.seq_lens, self.spec.block_size
        assert table is not None
        assert block_size is not None
        if self.spec.sliding_window is None:
            return table, seq_lens
        query_lens = 1 if self.is_decode else self.query_start_list.diff()
        before = seq_lens - (query_lens - 1 + _window(self.spec.sliding_window))
        passed = before.clamp(min=0) // block_size
        columns = torch.arange(table.shape[1], device=table.device) + passed[:, None]
        table = table.gather(1, columns.clamp(max=table.shape[1] - 1))
        return table, torch.sub(seq_lens, passed, alpha=block_size)


def _window(sliding_window: int) -> int:
    return min(sliding_window, _WINDOW_LIMIT)


def _sums(lengths: torch.Tensor) -> torch.Tensor:
    """(number + 1,) int32: where each of these lengths begins, and where the last one ends."""
    return torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def _sides(causal: bool, sliding_window: int | None) -> tuple[int, int]:
    """Keys seen to the left and to the right of a query's own; −1 for all."""
    if sliding_window is None:
        return -1, -1
    left = _window(sliding_window) - 1
    return left, 0 if causal else left


def is_aligned(rows: torch.Tensor) -> bool:
    """Whether heads of (tokens, heads, size), 16 bits, are in one piece at multiples of 16 bytes.

    That is what suits TMA; asked for every call, so it is asked in few words.
    """
    of_token, of_head, of_element = rows.stride()
    return (
        of_element == 1
        and of_token > 0
        and of_head > 0
        and not (of_token % 8 or of_head % 8 or rows.data_ptr() % 16)
    )


def part(rows: torch.Tensor, chosen: slice) -> torch.Tensor:
    """These rows; it takes longer to make a view than to see that it would be of all."""
    if chosen.start == 0 and chosen.stop == rows.shape[0]:
        return rows
    return rows[chosen]


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """These rows, copied if they are not aligned."""
    return rows if is_aligned(rows) else rows.clone(memory_format=torch.contiguous_format)


def gather(cache: torch.Tensor, blocks: torch.Tensor, num_keys: int) -> torch.Tensor:
    """(num_keys, num_kv_heads, size), out of the blocks of one view of `view_kv_cache`."""
    return cache.index_select(0, blocks).flatten(0, 1)[:num_keys]


def check_block_size(kv_cache: torch.Tensor, spec: AttentionSpec) -> None:
    """Check that a cache has the blocks that a provider was picked for.

    Raises:
        InvalidInputError: it has not.
    """
    if kv_cache.shape[2] != spec.block_size:
        raise InvalidInputError(
            f"kv_cache has blocks of {kv_cache.shape[2]} tokens, and attn_metadata was built for "
            f"layers with block_size={spec.block_size}. Describe the layer by its own cache."
        )


def check_strides(kv_cache: torch.Tensor) -> None:
    """Check that a cache lies where kernels can read.

    Raises:
        InvalidInputError: it does not.
    """
    if kv_cache.numel() and not suits_tma(kv_cache):
        raise InvalidInputError(
            f"kv_cache has strides {kv_cache.stride()} from address {kv_cache.data_ptr()} on; "
            "FlashAttention needs heads without gaps that start at multiples of 16 bytes. Make the "
            "cache by allocate_kv_cache."
        )


def _schedule(
    function: Callable[..., torch.Tensor], spec: AttentionSpec, work: VarlenArgs
) -> torch.Tensor:
    """How FlashAttention 3 shares out the work of a call over pages, the same for all layers.

    Its kernel counts on what get_scheduler_metadata was told, so it is told of the same shapes.
    """
    return function(
        len(work.seq_lens),
        work.max_query_len,
        work.max_seq_len,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_size,
        work.seq_lens,
        qkv_dtype=spec.dtype,
        headdim_v=spec.head_size_v,
        cu_seqlens_q=work.query_start_list,
        page_size=spec.block_size,
        causal=work.causal,
        window_size=work.window,
        has_softcap=work.soft_cap > 0,
    )
