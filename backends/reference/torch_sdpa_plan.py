"""How TORCH_SDPA splits a batch into calls, computed on the host."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from attn_dispatch.backends.reference.semantics import visible
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.contents import with_exact_lengths
from attn_dispatch.interface.host_copies import to_device
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["Group", "SDPABuilder", "SDPAMetadata"]

#: Queries up to this length share a call with others of their length.
_SHARED_QUERY_LEN = 16
#: A shared call reads at most this many times the keys that its requests have.
_MAX_WASTE = 1.25
#: Longer queries that need a mask are computed in pieces of this many rows.
_MASKED_ROWS = 256
#: Plans are computed on the host, whatever torch's default device is.
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class _Piece:
    """Some rows of one request's query, and the keys that these rows may see.

    `position` is that of the first row among the keys; below 0, it is before them. `num_keys`
    counts from the request's first key.
    """

    request: int
    first_row: int
    num_rows: int
    position: int
    num_keys: int


@dataclass(frozen=True)
class Group:
    """One call: pieces with the same number of rows.

    Attributes:
        num_pieces: how many.
        rows: their rows of query and output.
        key_rows: the rows of key and value that hold all keys, for a single piece without a past.
        requests: (num_pieces, 1) int64, the request of each piece.
        key_starts: (num_pieces, 1) int64, where its rows of key and value start.
        positions: (num_pieces, num_keys) int64, which keys of the request each piece reads.
        mask: (num_pieces, num_rows, num_keys) bool; None if every row sees every key, or `causal`.
        distance: (num_pieces, num_rows, num_keys) float32, key minus query position, for ALiBi.
        causal: the call is square and causal, and needs no mask.
        has_empty_rows: the mask has a row that is all False.
    """

    num_pieces: int
    rows: slice | torch.Tensor
    key_rows: slice | None
    requests: torch.Tensor
    key_starts: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    distance: torch.Tensor | None
    causal: bool
    has_empty_rows: bool
    _kept: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def places(
        self, block_table: torch.Tensor, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks of its keys and the offsets there, (num_pieces, num_keys) int64 each.

        They are kept for the other layers, unless the table may have changed since.
        """
        known = None
        if not block_table.is_inference():  # such a tensor has no version
            known = (block_table.data_ptr(), block_table._version, block_size)
            if known in self._kept:
                return self._kept[known]
        blocks = block_table[self.requests, self.positions // block_size].long()
        found = (blocks, self.positions % block_size)
        if known is not None:
            self._kept[known] = found
        return found


@dataclass
class SDPAMetadata(BatchMetadata):
    """The batch, and the calls that compute it."""

    groups: list[Group]


class SDPABuilder(AttentionMetadataBuilder[SDPAMetadata]):
    """Splits a batch into calls."""

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self._reach = Reach.of(spec)

    def build(self, batch: AttentionBatch) -> SDPAMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        metadata: SDPAMetadata = SDPAMetadata.of(
            with_exact_lengths(batch, self.spec), self, groups=[]
        )
        metadata.groups += [self._group(metadata, pieces) for pieces in self._share(metadata)]
        return metadata

    def _pieces(self, metadata: SDPAMetadata) -> Iterator[_Piece]:
        batch = metadata.batch
        for request, query_len in enumerate(batch.query_lens):
            seq_len = batch.seq_lens_list[request]
            if query_len == 0 or seq_len == 0:
                continue
            start = seq_len - query_len
            if query_len <= _MASKED_ROWS or not self.spec.causal or self._is_square(batch, request):
                yield _Piece(request, 0, query_len, start, seq_len)
                continue
            ranges = metadata.ranges_of(request)
            for first in range(0, query_len, _MASKED_ROWS):
                rows = min(_MASKED_ROWS, query_len - first)
                position, end = start + first, start + first + rows
                # A range that overlaps the piece lets its rows see to the end of the range.
                reach = [e for s, e in ranges if s < end and position < e]
                num_keys = min(max(end, *reach, 0), seq_len)
                if num_keys > 0:
                    yield _Piece(request, first, rows, position, num_keys)

    def _is_square(self, batch: AttentionBatch, request: int) -> bool:
        """Whether the request is a causal square without any other mask."""
        seq_len = batch.seq_lens_list[request]
        return (
            self.spec.causal
            and batch.query_lens[request] == seq_len
            and (self.spec.sliding_window or seq_len) >= seq_len
            and (self.spec.attention_chunk or seq_len) >= seq_len
            and batch.custom_mask is None
            and not self.spec.bidirectional_ranges
            and not self.spec.alibi
        )

    def _share(self, metadata: SDPAMetadata) -> Iterator[list[_Piece]]:
        """Groups of pieces that share a call."""
        group: list[_Piece] = []
        for piece in sorted(self._pieces(metadata), key=lambda p: (p.num_rows, p.num_keys)):
            if group and not _may_join(group, piece):
                yield group
                group = []
            group.append(piece)
        if group:
            yield group

    def _group(self, metadata: SDPAMetadata, pieces: list[_Piece]) -> Group:
        batch, spec = metadata.batch, self.spec
        first, num_rows = pieces[0], pieces[0].num_rows
        num_keys = max(piece.num_keys for piece in pieces)
        if spec.causal and (self._reach.left is not None or self._reach.chunk is not None):
            # Keys before every row's window or chunk are not read: they may be freed.
            num_keys = max(p.num_keys - self._first_key(metadata, p) for p in pieces)
        # Right-aligned: the last column is each piece's last key. Columns to the left of a piece's
        # first key repeat that key, and the mask hides them.
        ends = torch.tensor([[piece.num_keys] for piece in pieces], device=_HOST)
        columns = ends + torch.arange(-num_keys, 0, device=_HOST)
        row = torch.arange(num_rows, device=_HOST)
        own = torch.tensor([[piece.position] for piece in pieces], device=_HOST) + row
        causal = num_rows > 1 and len(pieces) == 1 and self._is_square(batch, first.request)
        positions = self._copy(columns.clamp(min=0))
        mask = None if causal else self._mask(metadata, pieces, own, columns)
        has_empty_rows = mask is not None and not bool(mask.any(-1).all())
        mask = None if mask is None else self._copy(mask)
        if batch.custom_mask is not None:
            custom = self._custom_mask(batch, pieces, positions)
            mask = custom if mask is None else mask & custom
            has_empty_rows = True  # perhaps; reading the mask would wait for a GPU
        distance = None
        if spec.alibi:
            distance = self._copy((columns[:, None, :] - own[:, :, None]).float())
        starts = [batch.query_start_list[p.request] + p.first_row for p in pieces]
        rows = (torch.tensor(starts, device=_HOST)[:, None] + row).flatten()
        requests = torch.tensor([[piece.request] for piece in pieces], device=_HOST)
        is_single = len(pieces) == 1
        return Group(
            num_pieces=len(pieces),
            rows=slice(starts[0], starts[0] + num_rows) if is_single else self._copy(rows),
            key_rows=self._key_rows(batch, first, num_keys) if is_single else None,
            requests=self._copy(requests),
            key_starts=self._copy(torch.tensor(batch.key_starts, device=_HOST)[requests]),
            positions=positions,
            mask=mask,
            distance=distance,
            causal=causal,
            has_empty_rows=has_empty_rows,
        )

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self.device)

    def _custom_mask(
        self, batch: AttentionBatch, pieces: list[_Piece], positions: torch.Tensor
    ) -> torch.Tensor:
        """(num_pieces, num_rows, num_keys) bool on the device: the pieces' rows of custom_mask."""
        rows = (slice(p.first_row, p.first_row + p.num_rows) for p in pieces)
        return torch.stack(
            [
                batch.request_mask(piece.request)[own][:, keys]
                for piece, own, keys in zip(pieces, rows, positions, strict=True)
            ]
        )

    def _first_key(self, metadata: SDPAMetadata, piece: _Piece) -> int:
        """The first key that one of the piece's rows sees through window, chunk or a range."""
        end = piece.position + piece.num_rows
        ranges = metadata.ranges_of(piece.request)
        starts = [s for s, e in ranges if s < end and piece.position < e]
        return max(0, min(self._reach.first(piece.position), *starts, end))

    def _mask(
        self, metadata: SDPAMetadata, pieces: list[_Piece], own: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor | None:
        """(num_pieces, num_rows, num_keys) bool on the host, without the batch's own mask.

        None if every row sees every key.
        """
        spec = self.spec
        sees = functools.partial(
            visible,
            causal=spec.causal,
            sliding_window=spec.sliding_window,
            window_size=spec.window_size,
            attention_chunk=spec.attention_chunk,
        )
        if spec.bidirectional_ranges:
            ranges = [metadata.ranges_of(piece.request) for piece in pieces]
            each = zip(own, columns, ranges, strict=True)
            mask = torch.stack([sees(q, k, ranges=among) for q, k, among in each])
        else:
            mask = sees(own, columns)
        mask = mask & (columns >= 0)[:, None]
        return None if bool(mask.all()) else mask

    def _key_rows(self, batch: AttentionBatch, piece: _Piece, num_keys: int) -> slice | None:
        """The rows of key and value that hold all keys of the piece, if they do."""
        start, end = batch.key_starts[piece.request], batch.key_starts[piece.request + 1]
        has_past = end - start != batch.seq_lens_list[piece.request]
        # With a cache of another dtype, the stored keys must be read, not the new ones.
        if has_past or self.spec.kv_sharing or self.spec.kv_cache_dtype != "auto":
            return None
        return slice(start + piece.num_keys - num_keys, start + piece.num_keys)


def _may_join(group: list[_Piece], piece: _Piece) -> bool:
    needed = sum(p.num_keys for p in group) + piece.num_keys
    return (
        piece.num_rows == group[0].num_rows <= _SHARED_QUERY_LEN
        and piece.num_keys * (len(group) + 1) <= _MAX_WASTE * needed
    )
