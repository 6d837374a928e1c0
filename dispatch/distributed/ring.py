"""Attention of long prompts whose tokens are split over the ranks of a group.

The rows of each prompt are cut into 2 W chunks, and rank r has the chunks r and 2 W - 1 - r, so
that causal attention takes every rank the same time (the zigzag order of the package
ring-flash-attn, and of Llama 3, arXiv:2407.21783). Keys and values go around in a ring (Ring
Attention, arXiv:2310.01889): while a rank attends to one part of them, it receives the next. The
results of the parts are merged by their LSE.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from attn_dispatch.arguments import INT32_MAX, as_int
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.distributed.merge import check_choice
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.batch_checks import check_slot_tensor, checked_lengths
from attn_dispatch.interface.host_copies import to_device
from attn_dispatch.interface.kv_access import write_kv_cache
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.validation import check_tensors
from attn_dispatch.runtime.functional import attention, merge_into, merge_states

__all__ = ["ring_attention", "zigzag_rows"]

METHODS = ("auto", "ring", "all_gather")

#: Arguments under which a part of the keys is not attended to as a whole: these need all keys.
_NEEDS_ALL_KEYS = ("sliding_window", "window_size", "attention_chunk", "alibi_slopes")


class _Chunk(NamedTuple):
    """Rows [start, end) of a prompt."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def _chunk(length: int, index: int, world: int) -> _Chunk:
    """One of the 2 * world chunks of a prompt; they differ by one row at most."""
    pieces = 2 * world
    return _Chunk(index * length // pieces, (index + 1) * length // pieces)


def _chunks_of(length: int, rank: int, world: int) -> tuple[_Chunk, _Chunk]:
    return _chunk(length, rank, world), _chunk(length, 2 * world - 1 - rank, world)


def zigzag_rows(seq_lens: Sequence[int] | torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Which rows of a ragged batch of whole prompts a rank has, in its order.

    Args:
        seq_lens: the tokens of each prompt.
        rank: 0 to world - 1.
        world: how many ranks share the prompts.

    Returns:
        (num_local_tokens,) int64 on the host, indices of the rows of all prompts one after another:
        for each prompt its chunks rank and 2 * world - 1 - rank.

    Raises:
        InvalidInputError: an argument has another type or is out of range.

    Example:
        >>> rows = zigzag_rows([8], rank=1, world=2)  # tensor([2, 3, 4, 5])
        >>> out = ring_attention(query[rows], key[rows], value[rows], [8], mesh["cp"])
    """
    world = as_int("world", world, 1, INT32_MAX)
    rank = as_int("rank", rank, 0, world - 1)
    lengths, _ = checked_lengths("seq_lens", seq_lens)
    return _rows(lengths.tolist(), rank, world)


def _rows(lengths: list[int], rank: int, world: int) -> torch.Tensor:
    starts = itertools.accumulate(lengths, initial=0)
    found = [
        torch.arange(first + chunk.start, first + chunk.end, device="cpu")
        for first, length in zip(starts, lengths, strict=False)
        for chunk in _chunks_of(length, rank, world)
    ]
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *found])


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seq_lens: Sequence[int] | torch.Tensor,
    group: Any = None,
    *,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
    kv_cache: KVCache | None = None,
    slot_mapping: torch.Tensor | None = None,
    return_lse: bool = False,
    method: str = "auto",
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over whole prompts, of which each rank has the rows of `zigzag_rows`.

    Every rank of the group calls it with the same seq_lens and options. All heads are computed;
    under tensor parallelism these are the heads of the calling ranks.

    Args:
        query: (num_local_tokens, num_heads, head_size).
        key: (num_local_tokens, num_kv_heads, head_size).
        value: (num_local_tokens, num_kv_heads, head_size_v).
        seq_lens: the tokens of each prompt, on all ranks together.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks.
        causal: a query sees no later key.
        sinks: (num_heads,) one more logit per head, or None.
        kv_cache: this rank's cache of a layer with `context_parallel` over the same group: the
            keys at position p are written on rank p mod W, as they come by; or None. An fp8 cache
            is not taken.
        slot_mapping: (sum of seq_lens,), with kv_cache: the slots of all rows, in blocks of all
            ranks, as `AttentionBatch.create` derives them.
        return_lse: return (output, lse), lse (num_local_tokens, num_heads) float32.
        method: "ring"; or "all_gather": each rank gets all keys and values at once, which takes W
            times the memory, and is the only way with a window, chunks or ALiBi. "auto": "ring"
            where it is possible.
        **options: scale, logits_soft_cap, sliding_window, window_size, attention_chunk,
            alibi_slopes, alibi or backend: as for `attention`.

    Returns:
        (num_local_tokens, num_heads, head_size_v) in the dtype of the query; the LSE leaves the
        sinks out.

    Raises:
        InvalidInputError: an argument does not fit. Nothing has been sent then.
        UnsupportedError: no backend computes it, or not as a ring.
        BackendFailure: another rank raised, ended or timed out.
    """
    check_choice("method", method, METHODS)
    ranks = Ranks(group)
    lengths = checked_lengths("seq_lens", seq_lens)[0].tolist()
    _check(ranks, query, key, value, lengths, kv_cache, slot_mapping)
    blocking = [name for name in _NEEDS_ALL_KEYS if options.get(name) is not None]
    if method == "ring" and blocking:
        raise UnsupportedError(
            f"method='ring' does not compute {', '.join(blocking)}: a query sees some keys of a "
            "part only. Use method='all_gather'."
        )
    if method == "auto":
        method = "all_gather" if blocking else "ring"
    write = _Writer(ranks, lengths, kv_cache, slot_mapping)
    arguments = (ranks, query, key, value, lengths, causal, sinks, write, options)
    output, lse = (_ring if method == "ring" else _all_gather)(*arguments)
    return (output, lse) if return_lse else output


def _check(
    ranks: Ranks,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    kv_cache: KVCache | None,
    slot_mapping: torch.Tensor | None,
) -> None:
    check_tensors(query=query, key=key, value=value)
    rows = len(_rows(lengths, ranks.rank, ranks.size))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3 or len(tensor) != rows:
            raise InvalidInputError(
                f"{name} has shape {tuple(tensor.shape)}; rank {ranks.rank} of {ranks.size} has "
                f"{rows} rows of prompts of {lengths[:8]} tokens, (num_local_tokens, heads, size). "
                "Take them by zigzag_rows."
            )
    if (kv_cache is None) != (slot_mapping is None):
        raise InvalidInputError("kv_cache and slot_mapping go together: give both, or neither.")
    if slot_mapping is not None:
        check_slot_tensor(slot_mapping)
        if len(slot_mapping) != sum(lengths):
            raise InvalidInputError(
                f"slot_mapping has {len(slot_mapping)} slots; all ranks together have "
                f"{sum(lengths)} tokens."
            )
    if kv_cache is not None and kv_cache.dtype.itemsize == 1:
        raise UnsupportedError(
            f"kv_cache is {kv_cache.dtype}: a prompt would be computed with other keys than the "
            "cache holds. Write it by a layer with context_parallel."
        )


class _Writer:
    """Writes to this rank's cache what belongs there, from the keys of any rank."""

    def __init__(
        self,
        ranks: Ranks,
        lengths: list[int],
        kv_cache: KVCache | None,
        slot_mapping: torch.Tensor | None,
    ) -> None:
        self._ranks, self._lengths = ranks, lengths
        self._kv_cache, self._slots = kv_cache, slot_mapping

    def __call__(self, source: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if self._kv_cache is None or self._slots is None or not len(key):
            return
        size = self._ranks.size
        rows = to_device(_rows(self._lengths, source, size), self._slots.device)
        slots = self._slots[rows].long()
        is_own = (slots >= 0) & (slots % size == self._ranks.rank)
        write_kv_cache(key, value, self._kv_cache, torch.where(is_own, slots // size, -1))


def _ring(
    ranks: Ranks,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    causal: bool,
    sinks: torch.Tensor | None,
    write: _Writer,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One part of the keys after another: this rank's, then that of the rank before it, and so on.

    NCCL sends on a stream of its own, which starts when the keys are there and runs while this
    rank attends; `wait` makes the current stream wait for it, and not the host.
    """
    rank, size = ranks.rank, ranks.size
    halves = {each: _halves(lengths, each, size) for each in range(size)}
    # The first step, over this rank's own keys, writes all rows. Two ranks merge once, which needs
    # no more precision than the parts have.
    dtype = query.dtype if size <= 2 else torch.promote_types(query.dtype, torch.float32)
    merged = query.new_empty((*query.shape[:2], value.shape[2]), dtype=dtype)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    own = halves[rank]
    held, failure = (key.contiguous(), value.contiguous()), None
    for step in range(size):
        source = (rank - step) % size
        received, wait = None, None
        if step + 1 < size:
            rows = sum(first.size + second.size for first, second in halves[(source - 1) % size])
            received, wait = ranks.exchange(held, (rank + 1) % size, (rank - 1) % size, rows)
        try:
            if failure is None:
                write(source, *held)
                queries, keys = _visible(own, halves[source], rank, source, causal)
                is_own = source == rank
                _attend(query, *held, queries, keys, is_own, causal, merged, lse, options)
        except Exception as error:  # the other ranks wait for this one's messages
            failure = error
        if received is not None and wait is not None:
            wait()
            held = (received[0], received[1])
    if failure is not None:
        raise failure
    if sinks is not None:
        merged, _ = merge_states([merged], [lse], sinks)
    return merged.to(query.dtype), lse


class _Rows(NamedTuple):
    """Rows [start, end) of the rows of a rank, for a request."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def _halves(lengths: list[int], rank: int, world: int) -> list[tuple[_Rows, _Rows]]:
    """The rows of both chunks of each prompt, among those of the rank."""
    found, first = [], 0
    for length in lengths:
        sizes = [chunk.size for chunk in _chunks_of(length, rank, world)]
        middle, end = first + sizes[0], first + sum(sizes)
        found.append((_Rows(first, middle), _Rows(middle, end)))
        first = end
    return found


def _visible(
    own: list[tuple[_Rows, _Rows]],
    other: list[tuple[_Rows, _Rows]],
    rank: int,
    source: int,
    causal: bool,
) -> tuple[list[_Rows], list[_Rows]]:
    """Which query rows attend to which rows of another rank's keys, for each prompt.

    In causal attention, the keys of a rank before this one are visible in their first chunk, to
    all queries; those of a rank after it in both chunks, to the queries of the second chunk.
    """
    queries = [_Rows(first.start, second.end) for first, second in own]
    keys = [_Rows(first.start, second.end) for first, second in other]
    if causal and source < rank:
        keys = [first for first, _ in other]
    elif causal and source > rank:
        queries = [second for _, second in own]
    return queries, keys


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: list[_Rows],
    keys: list[_Rows],
    is_own: bool,
    causal: bool,
    merged: torch.Tensor,
    lse: torch.Tensor,
    options: dict[str, Any],
) -> None:
    """Attend with these rows to these keys, and merge the result into that of the earlier parts.

    The rank's own keys are the first part, for all rows.
    """
    rows, key_rows = (_index(each, query.device) for each in (queries, keys))
    query_lens, key_lens = ([each.size for each in ranges] for ranges in (queries, keys))
    if not sum(query_lens) or not sum(key_lens):
        return
    writes = is_own and isinstance(rows, slice) and merged.dtype == query.dtype
    result = attention(
        query[rows],
        key[key_rows],
        value[key_rows],
        query_lens=query_lens,
        seq_lens=key_lens,
        causal=causal and is_own,
        out=merged[rows] if writes else None,
        return_lse=True,
        **options,
    )
    part, part_lse = result
    if is_own:
        if not writes:
            merged[rows] = part
        lse[rows] = part_lse
        return
    before, before_lse = merged[rows], lse[rows]
    merge_into(before, before_lse, part, part_lse)
    if not isinstance(rows, slice):  # indexing made copies: put them back
        merged[rows], lse[rows] = before, before_lse


def _index(ranges: list[_Rows], device: torch.device) -> slice | torch.Tensor:
    """The rows of all ranges: a slice if they follow one another."""
    ranges = [each for each in ranges if each.size]
    if all(first.end == second.start for first, second in itertools.pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].end) if ranges else slice(0, 0)
    rows = [torch.arange(each.start, each.end, device="cpu") for each in ranges]
    return to_device(torch.cat(rows), device)


def _all_gather(
    ranks: Ranks,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    causal: bool,
    sinks: torch.Tensor | None,
    write: _Writer,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys in order, then each chunk of queries over the keys up to its end."""
    size = ranks.size
    rows = [_rows(lengths, rank, size) for rank in range(size)]
    most = max(len(each) for each in rows)
    place = torch.empty(sum(lengths), dtype=torch.int64, device="cpu")
    for rank, each in enumerate(rows):
        place[each] = rank * most + torch.arange(len(each), device="cpu")
    place = to_device(place, query.device)
    whole = []
    for tensor in (key, value):
        padded = tensor.new_zeros((most, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        gathered = ranks.all_gather(padded)
        whole.append(gathered.flatten(0, 1)[place])
    for rank, each in enumerate(rows):
        write(rank, *(tensor[to_device(each, query.device)] for tensor in whole))
    starts = list(itertools.accumulate(lengths, initial=0))
    chunks, visible = list[int](), list[_Rows]()
    for first, length in zip(starts, lengths, strict=False):
        for chunk in _chunks_of(length, ranks.rank, size):
            chunks.append(chunk.size)
            end = chunk.end if causal else length
            visible.append(_Rows(first, first + end if chunk.size else first))
    index = torch.cat(
        [torch.arange(each.start, each.end, device="cpu") for each in visible]
        or [torch.empty(0, dtype=torch.int64, device="cpu")]
    )
    index = to_device(index, query.device)
    result = attention(
        query,
        whole[0][index],
        whole[1][index],
        query_lens=chunks,
        seq_lens=[each.size for each in visible],
        causal=causal,
        sinks=sinks,
        return_lse=True,
        **options,
    )
    output, lse = result
    return output, lse
