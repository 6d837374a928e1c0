"""What the Triton kernels are given: where keys are found, and where results go."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from attn_dispatch.backends.triton.launch_config import LaunchTable
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
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

#: How the kernels call what a cache or an output keeps; any other dtype is "plain".
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
    """For a method of an impl: run it with the device of its first tensor as the current one.

    PyTorch's operators look where their tensors are. Triton launches on the current device.
    """

    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> T:
        for given in args:  # a loop and nothing made: every layer's call waits for this
            if isinstance(given, torch.Tensor):
                break
        else:
            given = next(each for each in options.values() if isinstance(each, torch.Tensor))
        index = given.device.index
        if index is None or index == torch.cuda.current_device():
            return method(*args, **options)
        with torch.cuda.device(index):
            return method(*args, **options)

    return run


@dataclass(frozen=True)
class KVSource:
    """Keys and values as the kernels take them; see kernels/attend.py for `kind` and `format`.

    Attributes:
        k, v: as bytes where the format is fp8.
        k_row_scales, v_row_scales: float32 views that begin at the first rows' scales, for "int8".
        k_strides, v_strides: of blocks, tokens and heads, in elements.
        block_size: tokens per block.
        starts: (num_reqs,) int32, for "rows", where each request's begin.
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
        """The scales of keys and values, and how far those of the heads lie apart.

        Anything on the device where the format takes none: the layer's may be on the host then.
        """
        if self.format in ("plain", "int8"):
            return self.k, self.k, 0
        return layer._k_scale, layer._v_scale, layer._k_scale.dim()

    @classmethod
    def of_pages(cls, kv_cache: torch.Tensor) -> KVSource:
        """The paged cache."""
        form = FORMATS.get(kv_cache.dtype, "plain")
        if form not in ("plain", "int8"):
            kv_cache = kv_cache.view(torch.uint8)
        scales = token_scales(kv_cache) if form == "int8" else kv_cache
        k, v = kv_cache.unbind(1)
        strides = k.stride()[:3]
        return cls(
            "pages", form, k, v, scales[:, 0], scales[:, 1], strides, strides, kv_cache.shape[2]
        )

    @functools.cached_property
    def pairs(self) -> KVSource:
        """A paged cache of bytes as pairs of them, strides in 16 bytes; itself where that fails."""
        if self.format == "plain" or self.k.dtype.itemsize != 1:
            return self
        # Each row at a multiple of 16 bytes: the kernel counts on it.
        if any(step % 16 for step in (*self.k_strides, self.k.data_ptr(), self.v.data_ptr())):
            return self
        k, v = self.k.view(torch.uint16), self.v.view(torch.uint16)
        strides = tuple(step // 16 for step in self.k_strides)
        return dataclasses.replace(
            self, kind="pairs", k=k, v=v, k_strides=strides, v_strides=strides
        )

    @classmethod
    def of_rows(cls, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> KVSource:
        """Contiguous keys and values, (tokens, num_kv_heads, size)."""
        k_strides, v_strides = ((0, *t.stride()[:2]) for t in (key, value))
        return cls("rows", "plain", key, value, key, value, k_strides, v_strides, starts=starts)


@dataclass(frozen=True)
class OutputBuffers:
    """Where results go, as the kernels take it.

    Attributes:
        values: as bytes where they are quantized.
        lse: (num_tokens, num_heads) float32, or anything where none is asked for.
        scale: of a quantized output, read, or with `group` written; anything where there is none.
        format: "plain" or one of kernels/elements.py's.
        group: values that share a scale, or 0.
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
        """Make the rows from this one on those of no request: 0, with an lse of −inf."""
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
        """What forward returns, put where the caller wanted it."""
        returned = self.returned
        if output is not None and output is not returned:
            (output if self.format == "plain" else output.view(torch.uint8)).copy_(self.values)
            returned = output
        if output_block_scale is not None and output_block_scale is not self.scale:
            output_block_scale.copy_(self.scale)
        return (returned, self.lse) if self.returns_lse else returned


def suits_tma(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe it: addresses and steps in multiples of 16 bytes."""
    *steps, last = tensor.stride()
    size = tensor.element_size()
    return (
        tensor.numel() > 0
        and last == 1
        and tensor.data_ptr() % 16 == 0
        and all(step > 0 and step * size % 16 == 0 for step in steps)
    )


def fills_tiles(tensor: torch.Tensor, block: int) -> bool:
    """Whether (tokens, heads, size) can be described with one head a tile."""
    return tensor.shape[2] == block and tensor.stride(1) == block and suits_tma(tensor)


@functools.cache
def tensor_descriptor() -> Any:
    """Makes a descriptor of a tensor with blocks of a shape."""
    module = import_library("triton.tools.tensor_descriptor")
    return module.TensorDescriptor.from_tensor


@functools.cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which knows no hardware instruction."""
    return bool(import_library("triton").knobs.runtime.interpret)


def has_native_fp8(table: LaunchTable, form: str) -> bool:
    """Whether the compiler converts a format in hardware."""
    return form in table.native_fp8 and not is_interpreted()


def with_contiguous_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the elements of a head next to each other, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
