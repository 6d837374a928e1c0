"""One FlashAttention call: how a run of requests is described, independent of the package.

`adapters.py` translates it into each package's arguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attn_dispatch.backends.common import MAX_WINDOW, window_sides
from attn_dispatch.backends.triton.operands import suits_tma
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache, keys_and_values
from attn_dispatch.interface.spec import AttentionSpec

__all__ = [
    "PAGES_OF_ONE",
    "Attend",
    "FlashCall",
    "Operands",
    "Result",
    "VarlenArgs",
    "check_block_size",
    "check_strides",
    "gather",
    "has_aligned_heads",
    "select_rows",
]

#: The view that makes each row a page.
PAGES_OF_ONE = (-1, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class VarlenArgs:
    """What the layers of a batch share in one call.

    The keys of the requests are

    - pages, (num_blocks, block_size, num_kv_heads, head_size), if there is a block_table;
    - else rows of each request, (num_reqs, max_seq_len, num_kv_heads, head_size), for a provider
      that reads past rows: TMA finds zeros after each request;
    - else rows, (num_keys, num_kv_heads, head_size).

    Attributes:
        query_start_loc: (num_reqs + 1,) int32, where each request's query rows start, from 0.
        seq_lens: (num_reqs,) int32, keys of each request.
        max_query_len: at least the longest query.
        max_seq_len: at least the most keys; for pages, as many as the block table has room for.
        is_decode: every request has one query token.
        causal: masks align to the end of the keys.
        window: keys visible to the left and to the right of a query's own; −1 for all.
        soft_cap: 0 for none.
        returns_lse: the log-sum-exp is returned.
        block_table: (num_reqs, max_blocks) int32, or None.
        schedule: the result of the package's get_scheduler_metadata for this batch, or None.
    """

    query_start_loc: torch.Tensor
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
    def key_start_loc(self) -> torch.Tensor:
        """(num_reqs + 1,) int32, where each request's key rows start."""
        return _cumulative(self.seq_lens)


class Operands(NamedTuple):
    """One layer's tensors.

    Attributes:
        query: (num_tokens, num_heads, head_size), rows at multiples of 16 bytes.
        keys: see VarlenArgs.
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


#: Output, and log-sum-exp (num_heads, num_tokens) float32, −inf for a row without keys; None if it
#: is not returned.
Result = tuple[torch.Tensor, torch.Tensor | None]
#: Computes one layer.
Attend = Callable[[Operands], Result]


@dataclass(kw_only=True, eq=False)
class FlashCall:
    """Neighbouring requests of the batch that share a call.

    Attributes:
        spec: the layers.
        bind: makes the function that computes a layer.
        get_schedule: FlashAttention 3's get_scheduler_metadata, if the package has it.
        tokens: their rows of query and output.
        keys: their rows of key and value, if these are all their keys and can be read as rows.
        row_shape: the leading dimensions that the package needs for rows of keys; None for rows
            as they are.
        gathered: the blocks of a single request that are copied into rows, and the number of keys
            in them; None if pages are read in place.
        query_start_loc, block_table, max_query_len, is_decode: see VarlenArgs.
        seq_lens: (num_reqs,) int32.
        max_row_len: the most keys of a request now; a graph may serve longer ones later.
        has_no_keys: no request has a key.
    """

    spec: AttentionSpec
    bind: Callable[[VarlenArgs], Attend]
    get_schedule: Callable[..., torch.Tensor] | None
    tokens: slice
    keys: slice | None
    row_shape: tuple[int, int] | None
    gathered: tuple[torch.Tensor, int] | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor | None
    max_query_len: int
    max_row_len: int
    is_decode: bool
    has_no_keys: bool
    _over_pages: Attend | None = field(default=None, init=False)

    def prepare(self) -> None:
        """Make now what the layers will need, as far as it is known."""
        if self.has_no_keys:
            return
        if self.keys is not None:
            _ = self.over_rows
        elif not self.spec.cuda_graph:
            _ = self.over_pages

    @functools.cached_property
    def over_rows(self) -> Attend:
        """Computes a layer over the rows of key and value."""
        return self.bind(self._args(self.seq_lens, self.max_row_len, self._row_table()))

    def _row_table(self) -> torch.Tensor | None:
        """(num_reqs, max_row_len) int32: the rows of each request, if each row is a page."""
        if self.row_shape != PAGES_OF_ONE:
            return None
        offsets = torch.arange(self.max_row_len, dtype=torch.int32, device=self.seq_lens.device)
        return _cumulative(self.seq_lens)[:-1, None] + offsets

    @property
    def over_pages(self) -> Attend:
        """Computes a layer over the pages, or over the rows gathered from them.

        A graph replays what is derived from the batch's lengths and blocks, so for a graph it is
        derived in every call.
        """
        if self._over_pages is None or self.spec.cuda_graph:
            self._over_pages = self.bind(self._page_args())
        return self._over_pages

    def _page_args(self) -> VarlenArgs:
        block_table, seq_lens = self._visible_pages()
        if self.gathered is not None:
            return self._args(seq_lens, self.gathered[1], None)
        args = self._args(seq_lens, block_table.shape[1] * (self.spec.block_size or 1), block_table)
        if self.get_schedule is None or self.spec.cuda_graph:
            return args
        return dataclasses.replace(args, schedule=_schedule(self.get_schedule, self.spec, args))

    def _args(
        self, seq_lens: torch.Tensor, max_seq_len: int, block_table: torch.Tensor | None
    ) -> VarlenArgs:
        spec = self.spec
        return VarlenArgs(
            query_start_loc=self.query_start_loc,
            seq_lens=seq_lens,
            max_query_len=self.max_query_len,
            max_seq_len=max_seq_len,
            is_decode=self.is_decode,
            causal=spec.causal,
            window=_window_of(spec),
            soft_cap=spec.logits_soft_cap or 0.0,
            returns_lse=spec.returns_lse,
            block_table=block_table,
        )

    def as_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(num_keys, num_kv_heads, size) in the shape that the package reads: see VarlenArgs."""
        return rows if self.row_shape is None else rows.view(self.row_shape + rows.shape[1:])

    def _visible_pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(block table, lengths) without the blocks that no query's window reaches any more.

        Those may be in use by another request, or hold NaN. All positions count from the end of the
        keys, so nothing else changes. This does not wait for the device.
        """
        table, seq_lens, block_size = self.block_table, self.seq_lens, self.spec.block_size
        assert table is not None
        assert block_size is not None
        left = _window_of(self.spec)[0]
        if left < 0:
            return table, seq_lens
        query_lens = 1 if self.is_decode else self.query_start_loc.diff()
        before = seq_lens - (query_lens + min(left, MAX_WINDOW - 1))
        skipped = before.clamp(min=0) // block_size
        columns = torch.arange(table.shape[1], device=table.device) + skipped[:, None]
        table = table.gather(1, columns.clamp(max=table.shape[1] - 1))
        return table, torch.sub(seq_lens, skipped, alpha=block_size)


def _window_of(spec: AttentionSpec) -> tuple[int, int]:
    """Keys visible to the left and to the right of a query's own; −1 for all."""
    if spec.window_size is None:
        return window_sides(spec.causal, spec.sliding_window)
    left, right = (min(side, MAX_WINDOW) for side in spec.window_size)
    return left, right


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    """(number + 1,) int32: where each of these runs starts, and where the last one ends."""
    return torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def has_aligned_heads(rows: torch.Tensor) -> bool:
    """Whether heads of (tokens, heads, size), 16 bits, are contiguous at multiples of 16 bytes.

    The same as `suits_tma`, but cheaper: this runs in every call.
    """
    of_token, of_head, of_element = rows.stride()
    return (
        of_element == 1
        and of_token > 0
        and of_head > 0
        and not (of_token % 8 or of_head % 8 or rows.data_ptr() % 16)
    )


def select_rows(rows: torch.Tensor, chosen: slice) -> torch.Tensor:
    """These rows. Making a view of all rows takes longer than this check."""
    if chosen.start == 0 and chosen.stop == rows.shape[0]:
        return rows
    return rows[chosen]


def gather(cache: torch.Tensor, blocks: torch.Tensor, num_keys: int) -> torch.Tensor:
    """(num_keys, num_kv_heads, size), out of the blocks of one view of `view_kv_cache`."""
    return cache.index_select(0, blocks).flatten(0, 1)[:num_keys]


def check_block_size(kv_cache: KVCache, spec: AttentionSpec) -> None:
    """Check that a cache has the block size that the provider was picked for.

    Raises:
        InvalidInputError: it has another one.
    """
    if kv_cache.shape[2] != spec.block_size:
        raise InvalidInputError(
            f"kv_cache has blocks of {kv_cache.shape[2]} tokens, and attn_metadata was built for "
            f"layers with block_size={spec.block_size}. Describe the layer with the block_size of "
            "its cache."
        )


def check_strides(kv_cache: KVCache) -> None:
    """Check that kernels can read a cache.

    Raises:
        InvalidInputError: its heads are not contiguous at multiples of 16 bytes.
    """
    for part in keys_and_values(kv_cache):
        if part.numel() and not suits_tma(part):
            raise InvalidInputError(
                f"kv_cache has strides {part.stride()} from address {part.data_ptr()} on; "
                "FlashAttention needs contiguous heads that start at multiples of 16 bytes. Make "
                "the cache by allocate_kv_cache."
            )


def _schedule(
    function: Callable[..., torch.Tensor], spec: AttentionSpec, args: VarlenArgs
) -> torch.Tensor:
    """FlashAttention 3's schedule of a call over pages, the same for all layers.

    The kernel relies on the arguments of get_scheduler_metadata, so both get the same ones.
    """
    return function(
        len(args.seq_lens),
        args.max_query_len,
        args.max_seq_len,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_size,
        args.seq_lens,
        qkv_dtype=spec.dtype,
        headdim_v=spec.head_size_v,
        cu_seqlens_q=args.query_start_loc,
        page_size=spec.block_size,
        causal=args.causal,
        window_size=args.window,
        has_softcap=args.soft_cap > 0,
    )
