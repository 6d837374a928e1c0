"""The layouts that engines give their caches, as a table: checks, docs and the CLI read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface import kv_layouts as constructors
from attn_dispatch.interface.kv_strides import KVStrides
from attn_dispatch.interface.kv_view import KVCache, kv_strides_of
from attn_dispatch.interface.quantization import is_fp8, kv_cache_torch_dtype, stored_head_size
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["KV_LAYOUTS", "LAYERS", "KVForm", "KVLayout", "kv_layout_named", "with_kv_layout"]

#: Layers in the memory that `allocate` makes; the cache is that of the second.
LAYERS = 3
_LAYER = 1

#: Blocks of the example that a layer's strides are taken from.
_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The sizes of a cache; `size` and `size_v` are elements of a stored key and value."""

    blocks: int
    tokens: int
    heads: int
    size: int
    size_v: int

    @property
    def slots(self) -> int:
        return self.blocks * self.tokens


_Tensors: TypeAlias = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class KVForm:
    """What an engine hands to its attention as a layer's cache, whatever its order in memory.

    Attributes:
        name: the engine's, such as "vllm".
        engine: the engine and its versions, in words.
        handed_over: the shapes, in words.
        constructor: the function of kv_layouts that takes it.
        shapes: the sizes -> the shape of each tensor of a layer.
        adopt: (tensors of all layers, sizes, dtype of bytes or None) -> the cache of one layer.
        two_sizes: keys and values may have heads of different sizes.
        keeps_bytes: fp8 is kept as torch.uint8.
    """

    name: str
    engine: str
    handed_over: str
    constructor: str
    shapes: Callable[[_Sizes], tuple[tuple[int, ...], ...]]
    adopt: Callable[[_Tensors, _Sizes, torch.dtype | None], KVCache]
    two_sizes: bool = False
    keeps_bytes: bool = False


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """A layout that an engine gives its cache.

    Attributes:
        name: of the layout, such as "vllm-LBNHC".
        form: what the engine hands over.
        order: the dimensions of (layers, *shape) in their order in memory; None for this one.
    """

    name: str
    form: KVForm
    order: tuple[int, ...] | None

    def allocate(
        self,
        spec: AttentionSpec,
        num_blocks: int,
        device: torch.device | str = "cpu",
        *,
        arch: str = "",
        margin_bytes: int = 0,
    ) -> KVCache:
        """A zeroed cache, adopted from memory that is laid out as the engine does for some layers.

        Args:
            spec: the layer; its block_size is set.
            num_blocks: blocks.
            device: where, such as "meta".
            arch: of the device; decides what "fp8" means.
            margin_bytes: memory before and after the engine's, a multiple of 128.

        Raises:
            InvalidInputError: the engine has no such cache: latents, no blocks, two head sizes.
        """
        sizes = self._sizes_of(spec, num_blocks)
        dtype = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, arch)
        as_bytes = self.form.keeps_bytes and is_fp8(dtype)
        tensors = tuple(
            _zeros((LAYERS, *shape), self.order, dtype, device, margin_bytes)
            for shape in self.form.shapes(sizes)
        )
        if as_bytes:
            tensors = tuple(each.view(torch.uint8) for each in tensors)
        return self.form.adopt(tensors, sizes, dtype if as_bytes else None)

    def strides_for(self, spec: AttentionSpec) -> KVStrides | None:
        """The `kv_strides` of a layer over such a cache; None if it is as this library's own.

        Raises:
            InvalidInputError: as for `allocate`.
        """
        return kv_strides_of(self.allocate(spec, _BLOCKS, "meta"))

    def _sizes_of(self, spec: AttentionSpec, num_blocks: int) -> _Sizes:
        if spec.block_size is None or spec.mla is not None:
            problem = "has no block_size: give one" if spec.mla is None else "caches latents"
            raise InvalidInputError(
                f"The layout {self.name} holds keys and values in blocks, and the layer {problem}."
            )
        if spec.head_size != spec.head_size_v and not self.form.two_sizes:
            others = [layout.name for layout in KV_LAYOUTS.values() if layout.form.two_sizes]
            raise InvalidInputError(
                f"The layout {self.name} has one head size, and the layer has head_size="
                f"{spec.head_size} and head_size_v={spec.head_size_v}. These have two: "
                f"{', '.join(others)}."
            )
        size, size_v = (
            stored_head_size(spec.kv_cache_dtype, n) for n in (spec.head_size, spec.head_size_v)
        )
        return _Sizes(
            blocks=num_blocks,
            tokens=spec.block_size,
            heads=spec.num_kv_heads,
            size=size,
            size_v=size_v,
        )


def _zeros(
    shape: tuple[int, ...],
    order: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: torch.device | str,
    margin_bytes: int,
) -> torch.Tensor:
    """Zeros in a logical shape, its dimensions in this order in memory, between margins."""
    order = order or tuple(range(len(shape)))
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.zeros(2 * margin_bytes + num_bytes, dtype=torch.uint8, device=device)
    own = memory[margin_bytes : margin_bytes + num_bytes].view(dtype)
    inverse = [order.index(dim) for dim in range(len(shape))]
    return own.view([shape[dim] for dim in order]).permute(inverse)


def kv_layout_named(name: str) -> KVLayout:
    """The layout of this name, in upper or lower case; for an engine's name, its first layout.

    Raises:
        InvalidInputError: there is none.
    """
    known: dict[str, KVLayout] = {}
    for layout in KV_LAYOUTS.values():
        known.setdefault(layout.form.name.lower(), layout)
        known[layout.name.lower()] = layout
    if not isinstance(name, str) or name.lower() not in known:
        raise InvalidInputError(
            f"There is no layout {shown(name)} of a KV cache. The layouts are: "
            f"{', '.join(KV_LAYOUTS)}."
        )
    return known[name.lower()]


def with_kv_layout(spec: AttentionSpec, name: str) -> AttentionSpec:
    """The layer over a cache of this layout.

    Raises:
        InvalidInputError: there is no such layout, or the engine has no such cache for the layer.
    """
    return spec.replace(kv_strides=kv_layout_named(name).strides_for(spec))


def _of_vllm(constructor: Callable[..., KVCache]) -> Callable[..., KVCache]:
    """Adopts the layer's tensor by a constructor that takes both head sizes."""
    return lambda tensors, sizes, dtype: constructor(
        tensors[0][_LAYER], sizes.size, sizes.size_v, dtype=dtype
    )


def _of_vllm_0_10(tensors: _Tensors, sizes: _Sizes, dtype: torch.dtype | None) -> KVCache:
    return constructors.kv_cache_from_vllm_0_10(tensors[0][_LAYER], sizes.size, dtype=dtype)


def _fused_if_equal(*shapes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Keys and values as halves of one allocation if their shapes are equal, as in SGLang."""
    return ((2, *shapes[0]),) if shapes[0] == shapes[1] else shapes


def _of_sglang(tensors: _Tensors, sizes: _Sizes, dtype: torch.dtype | None) -> KVCache:
    parts = tuple(each[_LAYER] for each in tensors)
    key, value = parts if len(parts) == 2 else parts[0].unbind(0)
    return constructors.kv_cache_from_sglang(key, value, sizes.tokens, dtype=dtype)


def _of_transformers(tensors: _Tensors, sizes: _Sizes, dtype: torch.dtype | None) -> KVCache:
    tokens = tensors[0].transpose(0, 1).view(-1, 2, sizes.heads, sizes.size)
    return constructors.kv_cache_from_transformers(tokens, sizes.tokens, _LAYER, LAYERS)


def _of_transformers_5_12(tensors: _Tensors, sizes: _Sizes, dtype: torch.dtype | None) -> KVCache:
    key, value = (each[_LAYER] for each in tensors)
    return constructors.kv_cache_from_transformers_5_12(key, value, sizes.tokens)


def _of_flashinfer(kv_layout: str) -> Callable[..., KVCache]:
    def adopt(tensors: _Tensors, sizes: _Sizes, dtype: torch.dtype | None) -> KVCache:
        parts = [each[_LAYER] for each in tensors]
        given = parts[0] if len(parts) == 1 else (parts[0], parts[1])
        return constructors.kv_cache_from_flashinfer(given, kv_layout)

    return adopt


_VLLM = KVForm(
    name="vllm",
    engine="vLLM 0.33 and later",
    handed_over="(num_blocks, num_kv_heads, block_size, head_size + head_size_v)",
    constructor="kv_cache_from_vllm",
    shapes=lambda s: ((s.blocks, s.heads, s.tokens, s.size + s.size_v),),
    adopt=_of_vllm(constructors.kv_cache_from_vllm),
    two_sizes=True,
    keeps_bytes=True,
)
_VLLM_0_24 = KVForm(
    name="vllm-0.24",
    engine="vLLM 0.24; -layers: with all layers in one allocation",
    handed_over="(num_blocks, 2, block_size, num_kv_heads, head_size)",
    constructor="kv_cache_from_vllm_0_24",
    shapes=lambda s: ((s.blocks, 2, s.tokens, s.heads, s.size),),
    adopt=_of_vllm(constructors.kv_cache_from_vllm_0_24),
    keeps_bytes=True,
)
_VLLM_0_24_DIFFKV = KVForm(
    name="vllm-0.24-diffkv",
    engine="vLLM 0.24, its backends for two head sizes",
    handed_over="(num_blocks, block_size, num_kv_heads, head_size + head_size_v)",
    constructor="kv_cache_from_vllm_0_24",
    shapes=lambda s: ((s.blocks, s.tokens, s.heads, s.size + s.size_v),),
    adopt=_of_vllm(constructors.kv_cache_from_vllm_0_24),
    two_sizes=True,
    keeps_bytes=True,
)
_VLLM_0_10 = KVForm(
    name="vllm-0.10",
    engine="vLLM 0.10",
    handed_over="(2, num_blocks, block_size, num_kv_heads, head_size)",
    constructor="kv_cache_from_vllm_0_10",
    shapes=lambda s: ((2, s.blocks, s.tokens, s.heads, s.size),),
    adopt=_of_vllm_0_10,
    keeps_bytes=True,
)
_SGLANG = KVForm(
    name="sglang",
    engine="SGLang 0.5",
    handed_over="two tensors (slots + page_size, num_kv_heads, head_size)",
    constructor="kv_cache_from_sglang",
    shapes=lambda s: _fused_if_equal((s.slots, s.heads, s.size), (s.slots, s.heads, s.size_v)),
    adopt=_of_sglang,
    two_sizes=True,
    keeps_bytes=True,
)
_SGLANG_HND = KVForm(
    name="sglang-HND",
    engine="SGLang 0.5, SGLANG_USE_HND_KVCACHE=1",
    handed_over="two tensors (num_pages, num_kv_heads, page_size, head_size)",
    constructor="kv_cache_from_sglang",
    shapes=lambda s: _fused_if_equal(
        (s.blocks, s.heads, s.tokens, s.size), (s.blocks, s.heads, s.tokens, s.size_v)
    ),
    adopt=_of_sglang,
    two_sizes=True,
    keeps_bytes=True,
)
_TRANSFORMERS = KVForm(
    name="transformers",
    engine="transformers 5.18 and later",
    handed_over="(num_tokens, 2, num_kv_heads, head_size), the pages of a group of layers",
    constructor="kv_cache_from_transformers",
    shapes=lambda s: ((s.blocks, 2, s.tokens, s.heads, s.size),),
    adopt=_of_transformers,
)
_TRANSFORMERS_5_12 = KVForm(
    name="transformers-5.12",
    engine="transformers 4.57 to 5.12",
    handed_over="two tensors (num_tokens, num_kv_heads, head_size)",
    constructor="kv_cache_from_transformers_5_12",
    shapes=lambda s: ((s.slots, s.heads, s.size),) * 2,
    adopt=_of_transformers_5_12,
)
_FLASHINFER = KVForm(
    name="flashinfer",
    engine="FlashInfer 0.7, one tensor",
    handed_over="(num_pages, 2, page_size, num_kv_heads, head_size)",
    constructor="kv_cache_from_flashinfer",
    shapes=lambda s: ((s.blocks, 2, s.tokens, s.heads, s.size),),
    adopt=_of_flashinfer("NHD"),
)
_FLASHINFER_HND = KVForm(
    name="flashinfer-HND",
    engine='FlashInfer 0.7, one tensor, kv_layout="HND"',
    handed_over="(num_pages, 2, num_kv_heads, page_size, head_size)",
    constructor="kv_cache_from_flashinfer",
    shapes=lambda s: ((s.blocks, 2, s.heads, s.tokens, s.size),),
    adopt=_of_flashinfer("HND"),
)
_FLASHINFER_TUPLE = KVForm(
    name="flashinfer-tuple",
    engine="FlashInfer 0.7, a tuple",
    handed_over="two tensors (num_pages, page_size, num_kv_heads, head_size)",
    constructor="kv_cache_from_flashinfer",
    shapes=lambda s: tuple((s.blocks, s.tokens, s.heads, size) for size in (s.size, s.size_v)),
    adopt=_of_flashinfer("NHD"),
    two_sizes=True,
)
_FLASHINFER_TUPLE_HND = KVForm(
    name="flashinfer-tuple-HND",
    engine='FlashInfer 0.7, a tuple, kv_layout="HND"',
    handed_over="two tensors (num_pages, num_kv_heads, page_size, head_size)",
    constructor="kv_cache_from_flashinfer",
    shapes=lambda s: tuple((s.blocks, s.heads, s.tokens, size) for size in (s.size, s.size_v)),
    adopt=_of_flashinfer("HND"),
    two_sizes=True,
)

#: Form -> the end of a layout's name -> the order of (layers, *shape) in memory. The names of
#: vLLM 0.33 are those of its KVCacheLayout: L layers, B blocks, H heads, N tokens, C elements.
_ORDERS: tuple[tuple[KVForm, Mapping[str, tuple[int, ...] | None]], ...] = (
    (
        _VLLM,
        {
            "-LBNHC": (0, 1, 3, 2, 4),
            "-LBHNC": (0, 1, 2, 3, 4),
            "-LHBNC": (0, 2, 1, 3, 4),
            "-BLNHC": (1, 0, 3, 2, 4),
            "-BLHNC": (1, 0, 2, 3, 4),
            "-BHLNC": (1, 2, 0, 3, 4),
        },
    ),
    (
        _VLLM_0_24,
        {
            "-NHD": (0, 1, 2, 3, 4, 5),
            "-HND": (0, 1, 2, 4, 3, 5),
            "-NHD-layers": (1, 0, 2, 3, 4, 5),
            "-HND-layers": (1, 4, 0, 2, 3, 5),
        },
    ),
    (_VLLM_0_24_DIFFKV, {"-NHD": (0, 1, 2, 3, 4), "-HND": (0, 1, 3, 2, 4)}),
    (_VLLM_0_10, {"-NHD": (0, 1, 2, 3, 4, 5), "-HND": (0, 1, 2, 4, 3, 5)}),
    (_SGLANG, {"": None}),
    (_SGLANG_HND, {"": None}),
    (_TRANSFORMERS, {"": (1, 0, 2, 3, 4, 5)}),
    (_TRANSFORMERS_5_12, {"": None}),
    (_FLASHINFER, {"": None}),
    (_FLASHINFER_HND, {"": None}),
    (_FLASHINFER_TUPLE, {"": None}),
    (_FLASHINFER_TUPLE_HND, {"": None}),
)

#: Name -> layout.
KV_LAYOUTS: dict[str, KVLayout] = {
    form.name + end: KVLayout(name=form.name + end, form=form, order=order)
    for form, orders in _ORDERS
    for end, order in orders.items()
}
