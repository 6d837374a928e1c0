"""TORCH_SDPA: PyTorch's scaled_dot_product_attention over the paged cache; the fast way on a CPU.

The builder splits a batch into groups, one call each, and computes on the host which rows and which
cache entries each call reads. The layers only gather and call. Only entries that belong to a
request are gathered, so a NaN in other entries cannot reach a result.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from attn_dispatch.backends.common import aligned, is_aligned, on_device
from attn_dispatch.backends.reference.semantics import (
    compute_dtype,
    split_scale,
    without_autocast,
)
from attn_dispatch.backends.reference.torch_sdpa_plan import Group, SDPABuilder, SDPAMetadata
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import ANY, ByDevice, Capabilities, OneOf, Strides
from attn_dispatch.interface.kv_access import read_rows
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.kv_view import keys_and_values
from attn_dispatch.interface.quantization import (
    dequantize_rows,
    has_token_scales,
    is_fp8,
    token_scales,
)
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC, KV_CACHE_DTYPES
from attn_dispatch.interface.types import LENGTHS, AttentionType
from attn_dispatch.interface.unquantized import ForwardArgs, UnquantizedImpl
from attn_dispatch.platforms.device import DeviceMatch

__all__ = ["MathPathWarning", "SDPABuilder", "SDPAImpl", "SDPAMetadata", "TorchSDPABackend"]


class MathPathWarning(UserWarning):
    """PyTorch has no fused kernel for a call and computes it step by step."""


class SDPAImpl(UnquantizedImpl[SDPAMetadata]):
    """Gathers each group's keys and calls PyTorch.

    Raises:
        UnsupportedError: an argument asks for a feature that the backend does not declare.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # PyTorch's kernels take positive scales only.
        self._query_factor, self._scale = split_scale(self.scale)
        self._group_size = self.num_heads // self.num_kv_heads
        self._checked: set[tuple[object, ...]] = set()

    forward = without_autocast(UnquantizedImpl.forward)

    def _check_call(self, args: ForwardArgs[SDPAMetadata]) -> None:
        if math.isnan(args.layer._k_scale_float + args.layer._v_scale_float):
            raise UnsupportedError("TORCH_SDPA does not take scales per head; REFERENCE does.")

    def _attend(
        self, args: ForwardArgs[SDPAMetadata], output: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        output.zero_()  # rows that are in no group see no key
        k_scale, v_scale = 1.0, 1.0
        if args.kv_cache is not None and is_fp8(args.kv_cache.dtype):
            k_scale, v_scale = args.layer._k_scale_float, args.layer._v_scale_float
        for group in args.metadata.groups:
            keys, values = self._gather(group, args)
            q = args.query[group.rows]
            if self._query_factor != 1.0:
                q = q * self._query_factor
            result = self._call(group, q, keys, values, self._scale * k_scale)
            output[group.rows] = result if v_scale == 1.0 else result * v_scale

    def _gather(
        self, group: Group, args: ForwardArgs[SDPAMetadata]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (num_pieces, num_keys, num_kv_heads, size), not yet scaled."""
        key, value, kv_cache, dtype = args.key, args.value, args.kv_cache, args.query.dtype
        if key is not None and value is not None and group.key_rows is not None:
            return key[group.key_rows][None], value[group.key_rows][None]
        if kv_cache is None:
            assert key is not None
            assert value is not None
            index = group.key_starts + group.positions
            return key[index], value[index]
        block_table, block_size = args.metadata.batch.block_table, kv_cache.shape[2]
        assert block_table is not None
        # `check_forward` has checked the block ids.
        blocks, offsets = group.places(block_table, block_size)
        if has_token_scales(kv_cache.dtype):
            rows = [read_rows(part, blocks, offsets) for part in keys_and_values(kv_cache)]
            keys, values = (
                dequantize_rows(each[..., :size], token_scales(each), dtype)
                for each, size in zip(rows, (self.head_size, self.head_size_v), strict=True)
            )
            return keys, values
        views = view_kv_cache(kv_cache, self.head_size, self.head_size_v)
        keys, values = (read_rows(view, blocks, offsets).to(dtype) for view in views)
        return keys, values

    def _call(
        self,
        group: Group,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """(num_rows of all pieces, num_heads, head_size_v): the group's attention."""
        group_size = self._group_size
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
            # The only fused kernel for float32 there does not support shared heads.
            k, v = (t.repeat_interleave(group_size, dim=1) for t in (k, v))
            shares_heads = False
        result = self._sdpa(
            q,
            k,
            v,
            attn_mask=self._mask_or_bias(group, compute_dtype(q.dtype)),
            is_causal=group.causal,
            scale=scale,
            enable_gqa=shares_heads,
        )
        result = result.reshape(group.num_pieces, self.num_heads, num_rows, -1)
        if group.has_empty_rows and group.mask is not None:
            result = result.masked_fill(~group.mask.any(-1)[:, None, :, None], 0.0)
        return result.transpose(1, 2).flatten(0, 1)[..., : self.head_size_v]

    def _by_definition(
        self,
        group: Group,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The group's attention step by step, where PyTorch's kernel would mistreat a NaN.

        That kernel returns 0 for a row whose scores are NaN. It adds masks to scores, so a NaN
        that is masked reaches the row.
        """
        dtype = compute_dtype(q.dtype)
        k, v = (
            t.transpose(1, 2).repeat_interleave(self._group_size, dim=1).to(dtype)
            for t in (keys, values)
        )
        scores = scale * (q.to(dtype) @ k.transpose(2, 3))
        if group.distance is not None:
            scores += self._alibi_bias(group.distance, dtype)
        seen = torch.ones_like(scores[:, :1], dtype=torch.bool)
        if group.causal:
            seen = seen.tril()
        elif group.mask is not None:
            seen = group.mask[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
        result = weights @ v.masked_fill(~seen.any(2)[..., None], 0.0)
        result = result.masked_fill(~seen.any(3, keepdim=True), 0.0)
        return result.transpose(1, 2).flatten(0, 1).to(q.dtype)

    def _alibi_bias(self, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(num_pieces, num_heads, num_rows, num_keys)."""
        assert self.alibi_slopes is not None
        slopes = on_device(self.alibi_slopes, distance.device, dtype)
        if self.alibi_symmetric:
            distance = -distance.abs()
        return slopes[:, None, None] * distance[:, None]

    def _mask_or_bias(self, group: Group, dtype: torch.dtype) -> torch.Tensor | None:
        """(num_pieces, 1 or num_kv_heads, group_size * num_rows, num_keys), bool or dtype."""
        mask = None if group.mask is None else group.mask[:, None]
        if group.distance is None:
            return None if mask is None else mask.repeat(1, 1, self._group_size, 1)
        bias = self._alibi_bias(group.distance, dtype)
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        return bias.reshape(len(bias), self.num_kv_heads, -1, bias.shape[-1])

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        # The CPU's kernel needs one head size for all three, a GPU's a multiple of 8.
        size = max(self.head_size, self.head_size_v)
        if q.device.type != "cpu":
            size = -(-size // 8) * 8
        q, k, v = (_padded(t, size) for t in (q, k, v))
        mask = options["attn_mask"]
        shape = (q.device, q.dtype, None if mask is None else mask.dtype, options["is_causal"])
        if shape not in self._checked:
            self._checked.add(shape)
            _warn_of_math_path(q, k, v, options)
        return F.scaled_dot_product_attention(q, k, v, **options)


def _warn_of_math_path(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
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


def _padded(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor with heads of this size, laid out for a fused kernel; itself if it already is."""
    if tensor.shape[-1] < size:
        # Not F.pad: it may keep odd strides of dimensions of size 1, which a GPU's kernel rejects.
        padded = tensor.new_zeros(*tensor.shape[:-1], size)
        padded[..., : tensor.shape[-1]] = tensor
        return padded
    is_on_cpu = tensor.device.type == "cpu"
    return aligned(tensor, lambda t: t.stride(-1) == 1 if is_on_cpu else is_aligned(t))


_CPU = DeviceMatch(vendor="cpu")


class TorchSDPABackend(AttentionBackend):
    """PyTorch's scaled_dot_product_attention, one call for each group of similar requests."""

    interface_version = 2
    name = "TORCH_SDPA"
    impl_cls = SDPAImpl
    builder_cls = SDPABuilder
    metadata_cls = SDPAMetadata
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
        kv_strides=Strides(),
        # Its plan needs the lengths; reading them from a GPU would wait for it.
        lengths=ByDevice((_CPU, OneOf(*LENGTHS)), otherwise=OneOf("exact")),
        attn_type=OneOf(*AttentionType),
        causal=OneOf(True, False),
        sliding_window=ANY,
        window_size=ANY,
        attention_chunk=ANY,
        # On other devices the bias has the query's dtype, which rounds distances to eight bits.
        alibi=ByDevice((_CPU, OneOf(True, False, ALIBI_SYMMETRIC)), otherwise=OneOf(False)),
        kv_sharing=OneOf(True, False),
        custom_mask=OneOf(True, False),
        bidirectional_ranges=OneOf(True, False),
    )
