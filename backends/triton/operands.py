"""The operands of the Triton kernels: keys and values, output buffers, head sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from attn_dispatch.backends.common import is_aligned
from attn_dispatch.backends.triton.launch_config import LaunchTable
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.kv_view import KVCache, keys_and_values
from attn_dispatch.interface.quantization import GROUP_SIZE, token_scales
from attn_dispatch.platforms.libraries import import_library

__all__ = [
    "FORMATS",
    "OutputBuffers",
    "KVSource",
    "block_of",
    "blocks_of",
    "fills_tiles",
    "has_native_fp8",
    "head_constants",
    "is_interpreted",
    "on_tensor_device",
    "suits_tma",
    "tensor_descriptor",
    "with_contiguous_heads",
]

#: Names of the formats of a cache or an output in the kernels; any other dtype is "plain".
FORMATS = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2fnuz: "e5m2fnuz",
    torch.int8: "int8",
}


#: The narrowest tile of values where tiles of keys are wider. With one of 16 or 32, Triton 3.6 gave
#: wrong numbers or read beyond shared memory on an H100, with and without pipelined loads.
NARROWEST_VALUES = 64

T = TypeVar("T")


def block_of(size: int) -> int:
    """Elements of a tile that holds a head of this size: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def blocks_of(head_size: int, head_size_v: int) -> tuple[int, int]:
    """Elements of a tile's rows of keys, and of values; see NARROWEST_VALUES."""
    block = block_of(head_size)
    return block, max(block_of(head_size_v), min(block, NARROWEST_VALUES))


def head_constants(head_size: int, head_size_v: int) -> dict[str, int]:
    """The head sizes and tile widths that every kernel is compiled for."""
    block, block_v = blocks_of(head_size, head_size_v)
    return {
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_V": head_size_v,
        "BLOCK_D": block,
        "BLOCK_DV": block_v,
    }


def on_tensor_device(method: Callable[..., T]) -> Callable[..., T]:
    """Run a method of an impl with the device of its first tensor as the current device.

    PyTorch's operators use the device of their tensors. Triton launches on the current device.
    """

    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> T:
        for arg in args:  # a plain loop: this runs in every call of every layer
            if isinstance(arg, torch.Tensor):
                break
        else:
            arg = next(each for each in options.values() if isinstance(each, torch.Tensor))
        index = arg.device.index
        if index is None or index == torch.cuda.current_device():
            return method(*args, **options)
        with torch.cuda.device(index):
            return method(*args, **options)

    return run


@dataclass(frozen=True)
class KVSource:
    """Keys and values as the kernels take them.

    Attributes:
        kind, format: see kernels/online_softmax.py.
        k, v: bytes where the format is fp8.
        k_row_scales, v_row_scales: for "int8", float32 views that begin at the first rows' scales.
        k_strides, v_strides: of blocks, tokens and heads, in elements; in 16 bytes for "packed8".
        block_size: tokens per block.
        starts: for "rows", (num_reqs,) int32, where each request's rows begin.
    """

    kind: str
    format: str
    k: torch.Tensor
    v: torch.Tensor
    k_row_scales: torch.Tensor
    v_row_scales: torch.Tensor
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    block_size: int = 1
    starts: torch.Tensor | None = None

    def scales(self, layer: AttentionLayer) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The scales of keys and values, and the stride from one head's scale to the next.

        Where the format has none, any tensor on the device: the layer's may be on the host.
        """
        if self.format in ("plain", "int8"):
            return self.k, self.k, 0
        if self.kind == "latents":
            return layer._k_scale, layer._k_scale, 0
        return layer._k_scale, layer._v_scale, layer._k_scale.dim()

    @classmethod
    def of_pages(cls, kv_cache: KVCache) -> KVSource:
        """The keys and values of a paged cache."""
        form = FORMATS.get(kv_cache.dtype, "plain")
        k, v = keys_and_values(kv_cache)
        if form not in ("plain", "int8"):
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        k_scales, v_scales = (token_scales(k), token_scales(v)) if form == "int8" else (k, v)
        return cls(
            "pages", form, k, v, k_scales, v_scales, k.stride()[:3], v.stride()[:3], k.shape[1]
        )

    @classmethod
    def of_latents(cls, kv_cache: torch.Tensor, kv_lora_rank: int) -> KVSource:
        """A cache of latents: `k` are latents, which are values too, `v` rotated key parts."""
        form = FORMATS.get(kv_cache.dtype, "plain")
        cache = kv_cache if form == "plain" else kv_cache.view(torch.uint8)
        latents, rotated = cache[..., :kv_lora_rank], cache[..., kv_lora_rank:]
        strides = (*cache.stride()[:2], 0)
        return cls(
            "latents", form, latents, rotated, latents, rotated, strides, strides, cache.shape[1]
        )

    @property
    def same_strides(self) -> bool:
        """Whether keys and values have the same strides, so that a kernel computes them once."""
        return self.k_strides == self.v_strides

    @functools.cached_property
    def packed8(self) -> KVSource:
        """A paged cache of bytes as pairs of bytes; itself if it cannot be read that way."""
        if self.kind == "latents" or self.format == "plain" or self.k.dtype.itemsize != 1:
            return self
        # The kernel relies on rows that begin at multiples of 16 bytes.
        addresses = (self.k.data_ptr(), self.v.data_ptr())
        if any(step % 16 for step in (*self.k_strides, *self.v_strides, *addresses)):
            return self
        if (self.k.shape[3] | self.v.shape[3]) % 2:
            return self
        return dataclasses.replace(
            self,
            kind="packed8",
            k=self.k.view(torch.uint16),
            v=self.v.view(torch.uint16),
            k_strides=tuple(step // 16 for step in self.k_strides),
            v_strides=tuple(step // 16 for step in self.v_strides),
        )

    @classmethod
    def of_rows(cls, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> KVSource:
        """Contiguous keys and values, (tokens, num_kv_heads, size)."""
        k_strides, v_strides = ((0, *t.stride()[:2]) for t in (key, value))
        return cls("rows", "plain", key, value, key, value, k_strides, v_strides, starts=starts)


@dataclass(frozen=True)
class OutputBuffers:
    """The outputs of a call as the kernels take them.

    Attributes:
        values: bytes if they are quantized.
        lse: (num_tokens, num_heads) float32; any tensor if it is not returned.
        scale: of a quantized output, read, or with `group` written; else any tensor.
        format: "plain" or a format of kernels/fp8.py.
        group: values that share a scale, or 0.
        returned: `values` in its own dtype.
    """

    values: torch.Tensor
    lse: torch.Tensor
    scale: torch.Tensor
    format: str
    group: int
    returned: torch.Tensor
    returns_lse: bool

    @classmethod
    def of(
        cls,
        impl: AttentionImpl[Any],
        query: torch.Tensor,
        output: torch.Tensor | None,
        output_scale: torch.Tensor | None,
        output_block_scale: torch.Tensor | None,
    ) -> OutputBuffers:
        """For a call with these arguments."""
        shape = (query.shape[0], impl.num_heads, impl.head_size_v)
        values = output
        if values is None or values.stride(-1) != 1:
            dtype = query.dtype if output is None else output.dtype
            values = torch.empty(shape, dtype=dtype, device=query.device)
        scale = query
        if output_scale is not None:
            scale = output_scale
        elif output_block_scale is not None:
            scale = output_block_scale.contiguous()
        form = FORMATS.get(values.dtype, "plain")
        lse = query
        if impl.returns_lse:
            lse = torch.empty(shape[:2], dtype=torch.float32, device=query.device)
        return cls(
            values=values if form == "plain" else values.view(torch.uint8),
            lse=lse,
            scale=scale,
            format=form,
            group=0 if output_block_scale is None else GROUP_SIZE,
            returned=values,
            returns_lse=impl.returns_lse,
        )

    def clear_from(self, row: int) -> None:
        """Fill the padding rows, from this one on: 0, with an LSE of −inf."""
        if row >= len(self.values):
            return
        self.values[row:].zero_()
        if self.returns_lse:
            self.lse[row:] = float("-inf")
        if self.group:
            self.scale[row:] = 1.0

    def result(
        self, output: torch.Tensor | None, output_block_scale: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The result of forward, copied to the caller's tensors where those were not used."""
        returned = self.returned
        if output is not None and output is not returned:
            (output if self.format == "plain" else output.view(torch.uint8)).copy_(self.values)
            returned = output
        if output_block_scale is not None and output_block_scale is not self.scale:
            output_block_scale.copy_(self.scale)
        return (returned, self.lse) if self.returns_lse else returned


def suits_tma(tensor: torch.Tensor) -> bool:
    """Whether TMA can read it: address and strides are multiples of 16 bytes."""
    return tensor.numel() > 0 and min(tensor.stride()) > 0 and is_aligned(tensor)


def fills_tiles(tensor: torch.Tensor, block: int) -> bool:
    """Whether a descriptor of (tokens, heads, size) can have one head per tile."""
    return tensor.shape[2] == block and tensor.stride(1) == block and suits_tma(tensor)


@functools.cache
def tensor_descriptor() -> Any:
    """The function that makes a descriptor of a tensor, for blocks of a shape."""
    module = import_library("triton.tools.tensor_descriptor")
    return module.TensorDescriptor.from_tensor


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which has no hardware instructions."""
    return bool(import_library("triton").knobs.runtime.interpret)


def has_native_fp8(table: LaunchTable, form: str) -> bool:
    """Whether the compiler converts this format in hardware."""
    return form in table.native_fp8 and not is_interpreted()


def with_contiguous_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it whose heads are contiguous, as the kernels need."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
