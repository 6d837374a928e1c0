"""TORCH_SDPA: PyTorch's scaled_dot_product_attention over the paged cache; the fast way on a CPU.

The builder takes a batch apart into groups, one call each, and lays out on the host which rows
and which cache entries each call reads; the layers only gather and call. Only entries that belong
to a request are gathered, so that what lies in the others (NaN, say) cannot reach a result.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from attn_dispatch.backends.reference.semantics import (
    compute_dtype,
    split_scale,
    visible,
    without_autocast,
)
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import ANY, ByDevice, Capabilities, OneOf
from attn_dispatch.interface.impl import (
    AttentionImpl,
    AttentionLayer,
    refuse_features,
    store_new_kv,
)
from attn_dispatch.interface.kv_access import read_kv_cache
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata
from attn_dispatch.interface.quantization import (
    dequantize_rows,
    has_token_scales,
    is_fp8,
    token_scales,
)
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC, KV_CACHE_DTYPES
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output
from attn_dispatch.platforms.device import DeviceMatch

__all__ = ["MathPathWarning", "SDPABuilder", "SDPAImpl", "SDPAMetadata", "TorchSDPABackend"]

#: Queries up to this length share a call with others of their length.
_SHARED_QUERY_LEN = 16
#: A shared call reads at most this many times the keys that its requests have.
_MAX_WASTE = 1.25
#: Longer queries that need a mask are worked off in pieces of this many rows.
_MASKED_ROWS = 256
#: Plans are laid on the host, whatever torch's default device is.
_HOST = torch.device("cpu")


class MathPathWarning(UserWarning):
    """PyTorch has no fused kernel for a call and computes it step by step."""


@dataclass(frozen=True)
class _Piece:
    """Some rows of one request's query, and its first keys, as far as these rows may see.

    The first row stands at `position` among the keys; below 0, before them.
    """

    request: int
    first_row: int
    num_rows: int
    position: int
    num_keys: int


@dataclass(frozen=True)
class _Group:
    """One call: pieces with the same number of rows.

    Attributes:
        num_pieces: how many.
        rows: which rows of the query and of the output are theirs.
        key_rows: the rows of key and value that hold all keys, for one piece without a past.
        requests: (num_pieces, 1) int64, the request of each piece.
        key_starts: (num_pieces, 1) int64, where its rows of key and value start.
        positions: (num_pieces, num_keys) int64, which keys of the request each piece reads.
        mask: (num_pieces, num_rows, num_keys) bool; None if every row sees every key, or `causal`.
        distance: (num_pieces, num_rows, num_keys) float32, key minus query position, for ALiBi.
        causal: the call is square and causal, and needs no mask.
        may_see_nothing: the mask has a row that is all False.
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
    may_see_nothing: bool


@dataclass
class SDPAMetadata(BatchMetadata):
    """The batch, and the calls that compute it."""

    groups: list[_Group]


class SDPABuilder(AttentionMetadataBuilder[SDPAMetadata]):
    """Takes a batch apart into calls."""

    def build(self, batch: AttentionBatch) -> SDPAMetadata:
        """The batch's metadata; see AttentionMetadataBuilder.build."""
        metadata: SDPAMetadata = SDPAMetadata.of(batch, self, groups=[])
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
                # A range that reaches into the piece lets its rows see as far as the range goes.
                reach = [e for s, e in ranges if s < end and position < e]
                num_keys = min(max(end, *reach, 0), seq_len)
                if num_keys > 0:
                    yield _Piece(request, first, rows, position, num_keys)

    def _is_square(self, batch: AttentionBatch, request: int) -> bool:
        """Whether plain causality on a square says it all."""
        seq_len = batch.seq_lens_list[request]
        return (
            self.spec.causal
            and batch.query_lens[request] == seq_len
            and (self.spec.sliding_window or seq_len) >= seq_len
            and batch.custom_mask is None
            and not self.spec.bidirectional_ranges
            and not self.spec.alibi
        )

    def _share(self, metadata: SDPAMetadata) -> Iterator[list[_Piece]]:
        """Pieces that go into one call together."""
        pieces = sorted(self._pieces(metadata), key=lambda p: (p.num_rows, p.num_keys))
        group: list[_Piece] = []
        for piece in pieces:
            if group and not self._may_join(group, piece):
                yield group
                group = []
            group.append(piece)
        if group:
            yield group

    def _may_join(self, group: list[_Piece], piece: _Piece) -> bool:
        needed = sum(p.num_keys for p in group) + piece.num_keys
        return (
            piece.num_rows == group[0].num_rows <= _SHARED_QUERY_LEN
            and piece.num_keys * (len(group) + 1) <= _MAX_WASTE * needed
        )

    def _group(self, metadata: SDPAMetadata, pieces: list[_Piece]) -> _Group:
        batch, spec = metadata.batch, self.spec
        first, num_rows = pieces[0], pieces[0].num_rows
        num_keys = max(piece.num_keys for piece in pieces)
        if spec.sliding_window is not None and spec.causal:
            # Keys that the window has passed, for every row, are not read: they may be freed.
            num_keys = max(p.num_keys - self._first_key(metadata, p) for p in pieces)
        # Right-aligned: the last column is each piece's last key. What stands left of a piece's
        # first key repeats that key, and the mask hides it.
        ends = torch.tensor([[piece.num_keys] for piece in pieces], device=_HOST)
        columns = ends + torch.arange(-num_keys, 0, device=_HOST)
        row = torch.arange(num_rows, device=_HOST)
        own = torch.tensor([[piece.position] for piece in pieces], device=_HOST) + row
        causal = num_rows > 1 and len(pieces) == 1 and self._is_square(batch, first.request)
        mask = None if causal else self._mask(metadata, pieces, own, columns)
        distance = None
        if spec.alibi:
            distance = (columns[:, None, :] - own[:, :, None]).float().to(self.device)
        starts = [batch.query_start_list[p.request] + p.first_row for p in pieces]
        rows = (torch.tensor(starts, device=_HOST)[:, None] + row).flatten()
        requests = torch.tensor([[piece.request] for piece in pieces], device=_HOST)
        alone = len(pieces) == 1
        return _Group(
            num_pieces=len(pieces),
            rows=slice(starts[0], starts[0] + num_rows) if alone else rows.to(self.device),
            key_rows=self._key_rows(batch, first, num_keys) if alone else None,
            requests=requests.to(self.device),
            key_starts=torch.tensor(batch.key_starts, device=_HOST)[requests].to(self.device),
            positions=columns.clamp(min=0).to(self.device),
            mask=None if mask is None else mask.to(self.device),
            distance=distance,
            causal=causal,
            may_see_nothing=mask is not None and not bool(mask.any(-1).all()),
        )

    def _first_key(self, metadata: SDPAMetadata, piece: _Piece) -> int:
        """The first key that one of the piece's rows sees through the window or a range."""
        assert self.spec.sliding_window is not None
        end = piece.position + piece.num_rows
        ranges = metadata.ranges_of(piece.request)
        starts = [s for s, e in ranges if s < end and piece.position < e]
        return max(0, min(piece.position - self.spec.sliding_window + 1, *starts, end))

    def _mask(
        self, metadata: SDPAMetadata, pieces: list[_Piece], own: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor | None:
        """(num_pieces, num_rows, num_keys) bool; None if every row sees every key."""
        batch, spec = metadata.batch, self.spec
        sees = functools.partial(visible, causal=spec.causal, sliding_window=spec.sliding_window)
        if batch.custom_mask is None and not spec.bidirectional_ranges:
            mask = sees(own, columns)
        else:
            masks = []
            for piece, queries, keys in zip(pieces, own, columns, strict=True):
                custom = None
                if batch.custom_mask is not None:
                    rows = slice(piece.first_row, piece.first_row + piece.num_rows)
                    custom = batch.request_mask(piece.request)[rows].cpu()[:, keys.clamp(min=0)]
                ranges = metadata.ranges_of(piece.request)
                masks.append(sees(queries, keys, ranges=ranges, custom_mask=custom))
            mask = torch.stack(masks)
        mask = mask & (columns >= 0)[:, None]
        return None if bool(mask.all()) else mask

    def _key_rows(self, batch: AttentionBatch, piece: _Piece, num_keys: int) -> slice | None:
        """The rows of key and value that hold all that the piece reads, if they do."""
        start, end = batch.key_starts[piece.request], batch.key_starts[piece.request + 1]
        has_past = end - start != batch.seq_lens_list[piece.request]
        # With another dtype in the cache, what is read must be what was stored.
        if has_past or self.spec.kv_sharing or self.spec.kv_cache_dtype != "auto":
            return None
        return slice(start + piece.num_keys - num_keys, start + piece.num_keys)


class SDPAImpl(AttentionImpl[SDPAMetadata]):
    """Gathers each group's keys and calls PyTorch.

    Raises:
        UnsupportedError: it is constructed with a feature that the backend does not declare.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_features(self, "TORCH_SDPA", "logits_soft_cap", "sinks", "returns_lse")
        # PyTorch's kernels take positive scales only.
        self._query_factor, self._scale = split_scale(self.scale)
        self._checked: set[tuple[object, ...]] = set()

    @without_autocast
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: SDPAMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:
            return profiling_output(self, query, output, output_scale, output_block_scale)
        check_metadata(self, attn_metadata, SDPAMetadata)
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("TORCH_SDPA does not quantize its output; REFERENCE does.")
        if math.isnan(layer._k_scale_float + layer._v_scale_float):
            raise UnsupportedError("TORCH_SDPA does not take scales per head; REFERENCE does.")
        batch = attn_metadata.batch
        check_forward(self, query, key, value, kv_cache, batch, output)
        if kv_cache is not None and key is not None and value is not None:
            store_new_kv(self, layer, key, value, kv_cache, batch)
        if output is None:
            output = query.new_empty(query.shape[0], self.num_heads, self.head_size_v)
        output.zero_()  # a row of no group sees no key
        for group in attn_metadata.groups:
            keys, values = self._gather(group, key, value, kv_cache, batch, query.dtype)
            k_scale, v_scale = 1.0, 1.0
            if kv_cache is not None and is_fp8(kv_cache.dtype):
                k_scale, v_scale = layer._k_scale_float, layer._v_scale_float
            q = query[group.rows]
            if self._query_factor != 1.0:
                q = q * self._query_factor
            result = self._call(group, q, keys, values, self._scale * k_scale)
            output[group.rows] = result if v_scale == 1.0 else result * v_scale
        return output

    def _gather(
        self,
        group: _Group,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        batch: AttentionBatch,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (num_pieces, num_keys, num_kv_heads, size), without a layer's scales."""
        if key is not None and value is not None and group.key_rows is not None:
            return key[group.key_rows][None], value[group.key_rows][None]
        if kv_cache is None:
            assert key is not None
            assert value is not None
            rows = group.key_starts + group.positions
            return key[rows], value[rows]
        assert batch.block_table is not None
        block_size = kv_cache.shape[2]
        blocks = batch.block_table[group.requests, group.positions // block_size].long()
        offsets = group.positions % block_size
        if has_token_scales(kv_cache.dtype):
            k_rows, v_rows = (read_kv_cache(rows, blocks, offsets) for rows in kv_cache.unbind(1))
            return (
                dequantize_rows(k_rows[..., : self.head_size], token_scales(k_rows), dtype),
                dequantize_rows(v_rows[..., : self.head_size_v], token_scales(v_rows), dtype),
            )
        keys, values = view_kv_cache(kv_cache, self.head_size, self.head_size_v)
        return (
            read_kv_cache(keys, blocks, offsets).to(dtype),
            read_kv_cache(values, blocks, offsets).to(dtype),
        )

    def _call(
        self,
        group: _Group,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """(num_rows of all pieces, num_heads, head_size_v): the group's attention."""
        group_size = self.num_heads // self.num_kv_heads
        q = query.unflatten(0, (group.num_pieces, -1)).transpose(1, 2)
        num_rows = q.shape[2]
        if q.device.type == "cpu" and not _scores_are_finite(q, keys, scale):
            return self._by_definition(group, q, keys, values, scale)
        if not group.causal:
            # The query heads of one KV head become rows of one head, so that no key is repeated.
            q = q.reshape(group.num_pieces, self.num_kv_heads, group_size * num_rows, -1)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        shares_heads = group.causal and group_size > 1
        if shares_heads and q.dtype == torch.float32 and q.device.type != "cpu":
            # The one fused kernel for float32 there does not know of shared heads.
            k, v = (t.repeat_interleave(group_size, dim=1) for t in (k, v))
            shares_heads = False
        result = self._sdpa(
            q,
            k,
            v,
            attn_mask=self._mask_or_bias(group, group_size, compute_dtype(q.dtype)),
            is_causal=group.causal,
            scale=scale,
            enable_gqa=shares_heads,
        )
        result = result.reshape(group.num_pieces, self.num_heads, num_rows, -1)
        if group.may_see_nothing and group.mask is not None:
            result = result.masked_fill(~group.mask.any(-1)[:, None, :, None], 0.0)
        return result.transpose(1, 2).flatten(0, 1)[..., : self.head_size_v]

    def _by_definition(
        self,
        group: _Group,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The group's attention step by step, where PyTorch's kernel would hide a NaN.

        Of a row whose scores are NaN that kernel makes 0, and it adds masks to scores, so that a
        hidden NaN is seen.
        """
        dtype = compute_dtype(q.dtype)
        group_size = self.num_heads // self.num_kv_heads
        k, v = (
            t.transpose(1, 2).repeat_interleave(group_size, dim=1).to(dtype) for t in (keys, values)
        )
        scores = scale * (q.to(dtype) @ k.transpose(2, 3))
        if self.alibi_slopes is not None and group.distance is not None:
            scores += self._slopes(dtype, q.device)[:, None, None] * self._distance(group)[:, None]
        seen = torch.ones_like(scores[:, :1], dtype=torch.bool)
        if group.causal:
            seen = seen.tril()
        elif group.mask is not None:
            seen = group.mask[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
        result = weights @ v.masked_fill(~seen.any(2)[..., None], 0.0)
        result = result.masked_fill(~seen.any(3, keepdim=True), 0.0)
        return result.transpose(1, 2).flatten(0, 1).to(q.dtype)

    def _slopes(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.as_tensor(self.alibi_slopes, dtype=dtype, device=device)

    def _distance(self, group: _Group) -> torch.Tensor:
        """What ALiBi's slopes are times of."""
        assert group.distance is not None
        return -group.distance.abs() if self.alibi_symmetric else group.distance

    def _mask_or_bias(
        self, group: _Group, group_size: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """(num_pieces, 1 or num_kv_heads, group_size * num_rows, num_keys), bool or dtype."""
        if self.alibi_slopes is None or group.distance is None:
            return None if group.mask is None else group.mask[:, None].repeat(1, 1, group_size, 1)
        slopes = self._slopes(dtype, group.distance.device)
        bias = slopes[:, None, None] * self._distance(group)[:, None]
        if group.mask is not None:
            bias = bias.masked_fill(~group.mask[:, None], float("-inf"))
        return bias.reshape(len(bias), self.num_kv_heads, -1, bias.shape[-1])

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        # The CPU's kernel wants one head size for all three, a GPU's a multiple of 8.
        size = max(self.head_size, self.head_size_v)
        if q.device.type != "cpu":
            size = -(-size // 8) * 8
        q, k, v = (_dense(t, size) for t in (q, k, v))
        mask = options["attn_mask"]
        shape = (q.device, q.dtype, None if mask is None else mask.dtype, options["is_causal"])
        if shape not in self._checked:
            self._checked.add(shape)
            self._tell_of_math_path(q, k, v, options)
        return F.scaled_dot_product_attention(q, k, v, **options)

    def _tell_of_math_path(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> None:
        if torch._fused_sdp_choice(q, k, v, **options) == SDPBackend.MATH.value:
            warnings.warn(
                f"PyTorch {torch.__version__} has no fused kernel for {tuple(q.shape)} {q.dtype} "
                f"queries on {q.device.type} and computes them step by step. REFERENCE does so "
                "too; another backend may be faster.",
                MathPathWarning,
                stacklevel=2,
            )


def _scores_are_finite(query: torch.Tensor, keys: torch.Tensor, scale: float) -> bool:
    """Whether no score can be NaN or infinite, by the largest elements. Waits for the device."""
    bound = query.shape[-1] * abs(scale)
    for tensor in (query, keys):
        smallest, largest = map(float, torch.aminmax(tensor))
        bound *= largest if math.isnan(largest) else max(largest, -smallest)
    return bound < torch.finfo(compute_dtype(query.dtype)).max / 16  # and so not NaN


def _dense(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor with heads of this size, laid out as a fused kernel wants it; itself if it is."""
    if tensor.shape[-1] < size:
        # Not F.pad: it may keep odd strides of dimensions of one, which a GPU's kernel refuses.
        padded = tensor.new_zeros(*tensor.shape[:-1], size)
        padded[..., : tensor.shape[-1]] = tensor
        return padded
    if tensor.stride(-1) == 1 and (tensor.device.type == "cpu" or _is_aligned(tensor)):
        return tensor
    # Not contiguous(): that leaves the stride of a dimension of size 1 as it is.
    return tensor.clone(memory_format=torch.contiguous_format)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, which a GPU's kernels load at a time.

    PyTorch looks at the strides and not at the address, which a slice of a fused tensor moves.
    """
    steps = (step * tensor.element_size() for step in tensor.stride()[:-1])
    return tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)


_CPU = DeviceMatch(vendor="cpu")


class TorchSDPABackend(AttentionBackend):
    """PyTorch's scaled_dot_product_attention, one call for each group of alike requests."""

    interface_version = 2
    capabilities = Capabilities(
        devices=(DeviceMatch(),),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=ANY,
        head_size_v=ANY,
        dtype=ByDevice(
            (_CPU, OneOf(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
            otherwise=OneOf(torch.float32, torch.bfloat16, torch.float16),
        ),
        kv_cache_dtype=OneOf(*KV_CACHE_DTYPES),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        attn_type=OneOf(*AttentionType),
        causal=OneOf(True, False),
        sliding_window=ANY,
        # Elsewhere the bias must have the query's dtype, and rounds distances to eight bits.
        alibi=ByDevice((_CPU, OneOf(True, False, ALIBI_SYMMETRIC)), otherwise=OneOf(False)),
        kv_sharing=OneOf(True, False),
        custom_mask=OneOf(True, False),
        bidirectional_ranges=OneOf(True, False),
    )

    @staticmethod
    def get_name() -> str:
        """TORCH_SDPA."""
        return "TORCH_SDPA"

    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        """SDPAImpl."""
        return SDPAImpl

    @staticmethod
    def get_metadata_cls() -> type[SDPAMetadata]:
        """SDPAMetadata."""
        return SDPAMetadata

    @staticmethod
    def get_builder_cls() -> type[SDPABuilder]:
        """SDPABuilder."""
        return SDPABuilder
