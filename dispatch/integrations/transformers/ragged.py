"""The ragged form of a padded batch: the lengths of its requests, and which rows hold tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.integrations.transformers.masks import MaskMeaning
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.runtime.context import ForwardContext

__all__ = ["RaggedForm", "ragged_form"]


@dataclass(frozen=True)
class RaggedForm:
    """A padded batch as requests of different lengths.

    Attributes:
        context: the requests as an AttentionBatch, and the metadata that layers built for it; None
            if there is no request.
        queries: the rows of `(batch_size * query_len)` that are queries; None for all.
        keys: the positions that every row has keys at, or the rows of `(batch_size * key_len)` that
            are keys.
    """

    context: ForwardContext | None
    queries: torch.Tensor | None
    keys: slice | torch.Tensor

    def pack_queries(self, query: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_heads, query_len, size)` -> `(num_tokens, num_heads, size)`."""
        rows = query.transpose(1, 2).flatten(0, 1)
        return (rows if self.queries is None else rows[self.queries]).contiguous()

    def pack_keys(self, key: torch.Tensor) -> torch.Tensor:
        """The same of keys or values, `(batch_size, num_kv_heads, key_len, size)`."""
        rows = key.transpose(1, 2)
        if isinstance(self.keys, slice):
            return rows[:, self.keys].flatten(0, 1).contiguous()
        key_len = rows.shape[1]
        return rows[self.keys // key_len, self.keys % key_len]

    def unpack(self, output: torch.Tensor, batch_size: int, query_len: int) -> torch.Tensor:
        """`(num_tokens, num_heads, size)` -> `(batch_size, query_len, num_heads, size)`.

        Rows of padding are 0.
        """
        if self.queries is not None:
            padded = output.new_zeros(batch_size * query_len, *output.shape[1:])
            padded[self.queries] = output
            output = padded
        return output.view(batch_size, query_len, *output.shape[1:])


def ragged_form(meaning: MaskMeaning, device: torch.device) -> RaggedForm:
    """The ragged form of a mask, made once for each device.

    A request is a row of the batch without its padding, or a sequence in it. Its queries are the
    last of its keys, as in AttentionBatch; keys that none of them sees are left out.

    Raises:
        UnsupportedError: the mask cannot be expressed so.
    """
    key = (device, meaning.batch_size)
    form = meaning.forms.get(key)
    if form is None:
        is_plain = meaning.valid is None and meaning.segments is None
        form = _of_full_rows(meaning, device) if is_plain else _of_padded_rows(meaning, device)
        meaning.forms[key] = form
    return form


def _is_local(meaning: MaskMeaning) -> bool:
    seen = meaning.visibility
    has_right = seen.right is not None and not seen.causal
    return seen.left is not None or seen.chunk is not None or has_right


def _check_positions(meaning: MaskMeaning) -> None:
    """Check that queries are the last keys, where their positions matter."""
    seen, end = meaning.visibility, meaning.query_offset + meaning.query_len
    key_end = meaning.key_offset + meaning.key_len
    if seen.causal:
        if key_end < end:
            raise UnsupportedError(
                f"its last query is at position {end - 1}, and its last key at {key_end - 1}"
            )
    elif _is_local(meaning) and (
        (meaning.query_offset, meaning.query_len) != (meaning.key_offset, meaning.key_len)
    ):
        raise UnsupportedError("it has a window in both directions, and queries that are not keys")


def _of_full_rows(meaning: MaskMeaning, device: torch.device) -> RaggedForm:
    """Every row is one request without padding."""
    _check_positions(meaning)
    seen = meaning.visibility
    start, stop = 0, meaning.key_len
    if seen.causal:
        stop = meaning.query_offset + meaning.query_len - meaning.key_offset
        if seen.left is not None:
            start = max(0, meaning.query_offset - seen.left - meaning.key_offset)
        if seen.chunk is not None:
            first = meaning.query_offset // seen.chunk * seen.chunk - meaning.key_offset
            if first < 0:
                raise UnsupportedError(_MISSING)
            start = first
    requests = meaning.batch_size
    context = _context([meaning.query_len] * requests, [stop - start] * requests, device)
    return RaggedForm(context, None, slice(start, stop))


_MISSING = "its cache lacks keys of the chunk that its first query is in"


def _of_padded_rows(meaning: MaskMeaning, device: torch.device) -> RaggedForm:
    """Rows have padding, or hold several sequences. This waits for the device once."""
    _check_positions(meaning)
    seen, key_offset, query_offset = meaning.visibility, meaning.key_offset, meaning.query_offset
    query_end, key_end = query_offset + meaning.query_len, key_offset + meaning.key_len
    shape = (meaning.batch_size, key_end)
    if meaning.valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device="cpu")
    else:
        valid = meaning.valid.to(device="cpu", dtype=torch.bool).expand(meaning.batch_size, -1)
    is_self_attention = seen.causal or _is_local(meaning)
    if is_self_attention and valid.shape[1] < query_end:
        raise UnsupportedError(
            f"its padding mask has {valid.shape[1]} positions, and its last query is at "
            f"{query_end - 1}"
        )
    if valid.shape[1] < key_end:
        valid = torch.nn.functional.pad(valid, (0, key_end - valid.shape[1]))
    positions = torch.arange(key_offset, key_end, device="cpu")
    keys = valid[:, key_offset:key_end]
    if seen.causal:
        keys = keys & (positions < query_end)
    # Queries of attention without positions may be anything, such as a decoder's: all are kept.
    queries = torch.ones(meaning.batch_size, meaning.query_len, dtype=torch.bool, device="cpu")
    if is_self_attention:
        queries = valid[:, query_offset:query_end]
    if _is_local(meaning):
        keys = keys & (positions >= _first_keys(meaning, valid, queries)[:, None])
    keys = keys & queries.any(1, keepdim=True)
    if meaning.segments is None:
        owner = torch.arange(meaning.batch_size, device="cpu")[:, None]
    else:
        segments = meaning.segments.cpu()
        # Sequences of a row are counted from 0, so the rows' ranges of numbers do not overlap.
        owner = segments + (int(segments.max()) + 1) * torch.arange(
            meaning.batch_size, device="cpu"
        ).unsqueeze(1)
    return _of_rows(queries, keys, owner, device)


def _first_keys(meaning: MaskMeaning, valid: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """`(batch_size,)`: the first position that any query of a row sees."""
    seen = meaning.visibility
    end = meaning.query_offset + meaning.query_len
    tokens = valid[:, :end].int()
    first = tokens.argmax(1)
    last = end - 1 - tokens.flip(1).argmax(1)
    if bool((tokens.sum(1) != torch.where(tokens.any(1), last - first + 1, 0)).any()):
        raise UnsupportedError(
            "it has a window or chunks, and there is padding between the tokens of a request"
        )
    start = first.clone()
    first_query = meaning.query_offset + queries.int().argmax(1)
    if seen.causal and seen.left is not None:
        start = start.maximum(first_query - seen.left)
    if seen.chunk is not None:
        start = first + (first_query - first) // seen.chunk * seen.chunk
        if bool(((start < meaning.key_offset) & queries.any(1)).any()):
            raise UnsupportedError(_MISSING)
    return start


def _of_rows(
    queries: torch.Tensor, keys: torch.Tensor, owner: torch.Tensor, device: torch.device
) -> RaggedForm:
    """The form of these rows, whose requests have these numbers."""
    count = int(owner.max()) + 1 if owner.numel() else 0
    lens = [
        torch.bincount(owner.expand(rows.shape)[rows], minlength=count) for rows in (queries, keys)
    ]
    used = lens[0] > 0
    context = None
    if bool(used.any()):
        context = _context(lens[0][used].tolist(), lens[1][used].tolist(), device)
    query_rows = None
    if not bool(queries.all()):
        query_rows = queries.flatten().nonzero().flatten().to(device)
    if bool(keys.all()):
        return RaggedForm(context, query_rows, slice(0, keys.shape[1]))
    return RaggedForm(context, query_rows, keys.flatten().nonzero().flatten().to(device))


def _context(query_lens: list[int], key_lens: list[int], device: torch.device) -> ForwardContext:
    batch = AttentionBatch.create(query_lens, key_lens, key_lens=key_lens, device=device)
    return ForwardContext(batch)
