"""The paged KV cache that all backends share: shape, layout, planning, writing, moving blocks.

Logically a cache is (num_blocks, 2, block_size, num_kv_heads, head_size), keys at index 0 and
values at 1 of the second dimension; multi-head latent attention's is (num_blocks, block_size,
kv_lora_rank + qk_rope_head_dim). A block is one contiguous piece of memory in either layout.
Where key and value heads differ in size, a head takes the larger of the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attn_dispatch.device import DeviceProfile, default_torch_device, detect_device
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface import AttentionType, Phase
from attn_dispatch.overrides import Rule, Source, current_rules
from attn_dispatch.quantization import dequantize, is_fp8, kv_cache_torch_dtype, quantize
from attn_dispatch.registry import registry
from attn_dispatch.report import Selection
from attn_dispatch.selector import phases_of, select
from attn_dispatch.spec import AttentionSpec

if TYPE_CHECKING:
    from attn_dispatch.batch import AttentionBatch
    from attn_dispatch.interface import AttentionImpl, AttentionLayer

__all__ = [
    "STRIDE_ORDERS",
    "KVCachePlan",
    "allocate_kv_cache",
    "copy_blocks",
    "gather_kv",
    "kv_cache_shape",
    "plan_kv_cache",
    "read_kv_cache",
    "split_kv_cache",
    "swap_blocks",
    "write_kv_cache",
    "write_mla_cache",
    "write_new_kv",
]

#: The order of the logical dimensions in memory: tokens before heads, or heads before tokens.
STRIDE_ORDERS: dict[str, tuple[int, ...]] = {"NHD": (0, 1, 2, 3, 4), "HND": (0, 1, 3, 2, 4)}

#: Block sizes that a plan considers, best first.
BLOCK_SIZES = (16, 32, 64, 128, 256, 8, 4, 2, 1)


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
) -> tuple[int, int, int, int, int]:
    """The logical shape of a cache; head_size is the larger of key's and value's."""
    return num_blocks, 2, block_size, num_kv_heads, head_size


def allocate_kv_cache(
    shape: Sequence[int],
    stride_order: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A zeroed cache of this logical shape, contiguous in the physical order.

    Args:
        shape: as a backend's get_kv_cache_shape gives it.
        stride_order: as its get_kv_cache_stride_order gives it.
        dtype: of its elements.
        device: where.
    """
    physical = [shape[dim] for dim in stride_order]
    inverse = [list(stride_order).index(dim) for dim in range(len(shape))]
    # Bytes, because not every device has an fp8 fill.
    memory = torch.zeros(
        *physical[:-1], physical[-1] * dtype.itemsize, dtype=torch.uint8, device=device
    )
    return memory.view(dtype).permute(inverse)


def split_kv_cache(
    kv_cache: torch.Tensor, head_size: int, head_size_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of keys and values, (num_blocks, block_size, num_kv_heads, their head size)."""
    keys, values = kv_cache.unbind(1)
    return keys[..., :head_size], values[..., :head_size_v]


def write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Store new keys and values in their slots; what has slot −1 is skipped.

    Args:
        key: (num_tokens, num_kv_heads, head_size).
        value: (num_tokens, num_kv_heads, head_size_v).
        kv_cache: in the logical shape, any layout, written.
        slot_mapping: (num_tokens,) int64; a slot is block * block_size + offset.
        k_scale: () or (num_kv_heads,) float32; used where the cache is fp8.
        v_scale: the same for values.
    """
    keys, values = split_kv_cache(kv_cache, key.shape[-1], value.shape[-1])
    _scatter(key, keys, slot_mapping, k_scale)
    _scatter(value, values, slot_mapping, v_scale)


def write_mla_cache(
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """Store new latents in their slots; what has slot −1 is skipped.

    Args:
        kv_c_normed: (num_tokens, kv_lora_rank).
        k_pe: (num_tokens, qk_rope_head_dim).
        kv_cache: (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim), written.
        slot_mapping: (num_tokens,) int64.
        scale: () float32; used where the cache is fp8.
    """
    latents = torch.cat([kv_c_normed, k_pe], dim=-1)
    _scatter(latents[:, None], kv_cache[:, :, None], slot_mapping, scale)


def _scatter(
    new: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor
) -> None:
    """Write (num_tokens, heads, size) rows into a (num_blocks, block_size, heads, size) view."""
    kept = (slots >= 0).nonzero().squeeze(1)
    slots, new = slots[kept], new[kept]
    stored = (
        quantize(new, _per_head(scale), cache.dtype) if is_fp8(cache.dtype) else new.to(cache.dtype)
    )
    blocks, offsets = slots // cache.shape[1], slots % cache.shape[1]
    _bytes(cache)[blocks, offsets] = _bytes(stored)


def write_new_kv(
    impl: AttentionImpl[Any],
    layer: AttentionLayer,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
) -> None:
    """Store a batch's new keys and values, unless the layer shares another's cache.

    The arguments are those of AttentionImpl.forward, checked by validation.check_forward.
    """
    if impl.kv_sharing_target_layer_name is not None:
        return
    slots = batch.slot_mapping
    assert slots is not None  # check_forward saw to it
    rows = len(slots)
    write_kv_cache(key[:rows], value[:rows], kv_cache, slots, layer._k_scale, layer._v_scale)


def read_kv_cache(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Entries of one view of `split_kv_cache`, as they are stored.

    Args:
        cache: (num_blocks, block_size, num_kv_heads, size).
        blocks: any shape, int64; the block of each entry.
        offsets: the same shape; its place in the block.

    Returns:
        (*blocks.shape, num_kv_heads, size), dtype of the cache.
    """
    stored, num_heads, size = _bytes(cache), cache.shape[2], cache.shape[3]
    by_block, by_offset, by_head, by_element = stored.stride()
    row = num_heads * size if by_head == size else size
    if by_element != 1 or by_block % row or by_offset % row or (row == size and by_head % row):
        return stored[blocks, offsets].view(cache.dtype)
    # Whole rows by one index: several times faster on a CPU than indexing by block and offset.
    index = blocks * (by_block // row) + offsets * (by_offset // row)
    if row == size:
        heads = torch.arange(num_heads, device=index.device) * (by_head // row)
        index = index[..., None] + heads
    last = sum((n - 1) * stride for n, stride in zip(stored.shape, stored.stride(), strict=True))
    rows = stored.as_strided(((last + 1) // row, row), (row, 1)).index_select(0, index.flatten())
    return rows.view(cache.dtype).view(*blocks.shape, num_heads, size)


def gather_kv(
    cache: torch.Tensor,
    block_table_row: torch.Tensor,
    seq_len: int,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One request's entries of one view of `split_kv_cache`, times their scale if it is fp8.

    Args:
        cache: (num_blocks, block_size, num_kv_heads, size).
        block_table_row: (max_blocks,) the request's blocks.
        seq_len: how many entries.
        scale: () or (num_kv_heads,) float32.
        dtype: of the result.

    Returns:
        (seq_len, num_kv_heads, size)
    """
    positions = torch.arange(seq_len, device=cache.device)
    blocks = block_table_row.long()[positions // cache.shape[1]]
    stored = read_kv_cache(cache, blocks, positions % cache.shape[1])
    if is_fp8(cache.dtype):
        return dequantize(stored, _per_head(scale), dtype)
    return stored.to(dtype)


def _per_head(scale: torch.Tensor) -> torch.Tensor:
    """A scale shaped to multiply (..., heads, size)."""
    return scale[:, None] if scale.dim() else scale


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a type that every device can index: fp8 as bytes, the rest as it is."""
    return tensor.view(torch.uint8) if is_fp8(tensor.dtype) else tensor


def copy_blocks(kv_caches: Sequence[torch.Tensor], src_to_dists: torch.Tensor) -> None:
    """Copy blocks within each cache: for a prefix that requests share, say.

    All sources are read before anything is written, so pairs may overlap.

    Args:
        kv_caches: one cache for each layer.
        src_to_dists: (num_pairs, 2) integers: source block and destination block.

    Raises:
        InvalidInputError: the pairs are not such a tensor, or name blocks that do not exist.
    """
    for kv_cache in kv_caches:
        _check_pairs(src_to_dists, kv_cache, kv_cache)
    for kv_cache in kv_caches:
        _move(kv_cache, kv_cache, src_to_dists)


def swap_blocks(
    src_kv_cache: torch.Tensor, dst_kv_cache: torch.Tensor, src_to_dst: torch.Tensor
) -> None:
    """Copy blocks from one cache to another, on the same device or not (to the host and back).

    Args:
        src_kv_cache: read.
        dst_kv_cache: written; the same shape but for num_blocks, and the same dtype.
        src_to_dst: (num_pairs, 2) integers: block of src and block of dst.

    Raises:
        InvalidInputError: caches or pairs do not fit; nothing has been written then.
    """
    if src_kv_cache.shape[1:] != dst_kv_cache.shape[1:] or src_kv_cache.dtype != dst_kv_cache.dtype:
        raise InvalidInputError(
            f"Blocks of {tuple(src_kv_cache.shape[1:])} {src_kv_cache.dtype} do not fit into a "
            f"cache with blocks of {tuple(dst_kv_cache.shape[1:])} {dst_kv_cache.dtype}. Both "
            "caches must come from the same plan."
        )
    _check_pairs(src_to_dst, src_kv_cache, dst_kv_cache)
    _move(src_kv_cache, dst_kv_cache, src_to_dst)


def _check_pairs(pairs: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise InvalidInputError(
            f"Pairs of blocks have shape {tuple(pairs.shape)} and dtype {pairs.dtype}; give "
            "(num_pairs, 2) of int32 or int64: source and destination."
        )
    if pairs.device.type != "cpu" or not len(pairs):
        return  # reading them would wait for the device
    sources, destinations = pairs[:, 0], pairs[:, 1]
    for name, blocks, limit in (
        ("source", sources, src.shape[0]),
        ("destination", destinations, dst.shape[0]),
    ):
        if int(blocks.min()) < 0 or int(blocks.max()) >= limit:
            raise InvalidInputError(
                f"A {name} block is out of range: blocks go from {int(blocks.min())} to "
                f"{int(blocks.max())}, and the cache has {limit}."
            )
    if len(destinations.unique()) != len(destinations):
        raise InvalidInputError("A destination block is named twice; its content would be chance.")


def _move(src: torch.Tensor, dst: torch.Tensor, pairs: torch.Tensor) -> None:
    sources = pairs[:, 0].to(src.device, torch.int64)
    destinations = pairs[:, 1].to(dst.device, torch.int64)
    _bytes(dst)[destinations] = _bytes(src)[sources].to(dst.device)


@dataclass(frozen=True)
class KVCachePlan:
    """One layout and block size for a model's caches, and what each layer needs of them.

    Attributes:
        layout: "NHD" or "HND".
        block_size: tokens per block.
        specs: layer name -> its spec, block size and layout filled in.
        shapes: layer name -> the logical shape of one block; layers without a cache are absent.
        stride_orders: layer name -> the order of dimensions in memory.
        dtypes: layer name -> element type.
        shared: layer name -> the layer whose cache it reads.
    """

    layout: str
    block_size: int
    specs: Mapping[str, AttentionSpec]
    shapes: Mapping[str, tuple[int, ...]]
    stride_orders: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    shared: Mapping[str, str]

    @property
    def bytes_per_block(self) -> int:
        """Memory that one block takes over all layers."""
        return sum(
            math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()
        )

    def num_blocks(self, memory_bytes: int) -> int:
        """Blocks that fit into this much memory."""
        return memory_bytes // self.bytes_per_block if self.shapes else 0

    def allocate(
        self, num_blocks: int, device: torch.device | str | None = None
    ) -> dict[str, torch.Tensor]:
        """A cache for each layer that has one; a sharing layer gets its target's tensor.

        Args:
            num_blocks: of each cache.
            device: where; None for the default device, as in `plan_kv_cache`.
        """
        device = default_torch_device() if device is None else device
        caches = {
            name: allocate_kv_cache(
                (num_blocks, *shape), self.stride_orders[name], self.dtypes[name], device
            )
            for name, shape in self.shapes.items()
        }
        return caches | {name: caches[target] for name, target in self.shared.items()}


def plan_kv_cache(
    layers: Mapping[str, AttentionSpec],
    device: torch.device | str | DeviceProfile | None = None,
    *,
    shared: Mapping[str, str] | None = None,
    backend: str | None = None,
) -> KVCachePlan:
    """One layout and block size that every layer's backends accept, in every phase.

    Of those that all accept, the one under which the layers get the backends that stand highest
    in this device's order.

    Args:
        layers: layer name -> spec. A spec that leaves block_size or kv_cache_layout None takes
            what suits all; one that sets it insists.
        device: as for `resolve`.
        shared: layer name -> the layer whose cache it reads, for layers with kv_sharing.
        backend: as for `resolve`.

    Raises:
        UnsupportedError: no layout and block size suits all; it names the smallest set of layers
            that conflict, with what each accepts. Or a layer has no backend at all.
        InvalidInputError: a sharing layer's target is missing or does not fit.
    """
    shared = dict(shared or {})
    cached = {name: spec for name, spec in layers.items() if _has_cache(spec)}
    for name in shared:
        if name not in cached:
            raise InvalidInputError(f"shared= names {name!r}, which is no layer with a cache.")
    for name, spec in cached.items():
        _check_sharing(name, spec, cached, shared)
    profile = device if isinstance(device, DeviceProfile) else detect_device(device)
    rules = current_rules(backend, registry.names())
    block_size, layout = _choose(cached, profile, rules)
    specs = {
        name: spec.replace(block_size=block_size, kv_cache_layout=layout)
        if name in cached
        else spec
        for name, spec in layers.items()
    }
    shapes, orders, dtypes = {}, {}, {}
    for name in cached:
        if name in shared:
            continue
        spec = specs[name]
        selection = select(spec, profile, phase=phases_of(spec)[0], rules=rules)
        size = max(spec.head_size, spec.head_size_v)
        shape = selection.backend_cls.get_kv_cache_shape(1, block_size, spec.num_kv_heads, size)
        shapes[name] = tuple(shape[1:])
        orders[name] = STRIDE_ORDERS[layout] if len(shape) == 5 else tuple(range(len(shape)))
        dtypes[name] = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, profile.arch)
    return KVCachePlan(layout, block_size, specs, shapes, orders, dtypes, shared)


def _has_cache(spec: AttentionSpec) -> bool:
    return spec.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)


def _check_sharing(
    name: str, spec: AttentionSpec, cached: Mapping[str, AttentionSpec], shared: Mapping[str, str]
) -> None:
    target = shared.get(name)
    if spec.kv_sharing != (target is not None):
        raise InvalidInputError(
            f"Layer {name!r} has kv_sharing={spec.kv_sharing} and "
            f"{'no target' if target is None else 'a target'} in shared=. A sharing layer needs "
            "both, another neither."
        )
    if target is None:
        return
    if target not in cached or target in shared:
        raise InvalidInputError(
            f"Layer {name!r} shares the cache of {target!r}, which is not a layer with a cache of "
            "its own. Name the layer that writes it."
        )
    for field in (
        "num_kv_heads",
        "head_size",
        "head_size_v",
        "kv_cache_dtype",
        "kv_scales",
        "dtype",
    ):
        if getattr(spec, field) != getattr(cached[target], field):
            raise InvalidInputError(
                f"Layer {name!r} shares the cache of {target!r}, but their {field} differ: "
                f"{getattr(spec, field)} and {getattr(cached[target], field)}."
            )


#: What is open: (block size, layout).
_Choice = tuple[int, str]


def _choose(
    layers: Mapping[str, AttentionSpec], device: DeviceProfile, rules: tuple[Rule, ...]
) -> _Choice:
    """The best block size and layout that every layer's backends accept, in every phase."""
    insisted = sorted({spec.block_size for spec in layers.values() if spec.block_size})
    sizes = tuple(dict.fromkeys([*BLOCK_SIZES, *insisted]))
    ranks: dict[AttentionSpec, dict[Phase, dict[_Choice, tuple[int, int]]]] = {}
    for name, spec in layers.items():
        try:
            ranks[spec] = ranks.get(spec) or _ranks(spec, device, rules, sizes)
        except UnsupportedError as error:
            raise UnsupportedError(f"Layer {name!r}: {error}", error.report) from error

    def total(choice: _Choice) -> tuple[int, ...]:
        each = (by[choice] for spec in layers.values() for by in ranks[spec].values())
        return tuple(map(sum, zip(*each, strict=True)))

    accepted = [by for phases in ranks.values() for by in phases.values()]
    common = [
        choice
        for choice in itertools.product(sizes, STRIDE_ORDERS)
        if all(choice in by for by in accepted)
    ]
    if not common:
        raise UnsupportedError(_conflict({name: ranks[spec] for name, spec in layers.items()}))
    return min(common, key=total)


def _ranks(
    spec: AttentionSpec, device: DeviceProfile, rules: tuple[Rule, ...], sizes: tuple[int, ...]
) -> dict[Phase, dict[_Choice, tuple[int, int]]]:
    """Phase -> what the layer's backends accept there, and how far from the best each choice is.

    Raises:
        UnsupportedError: in one of the phases nothing is accepted.
    """
    block_sizes = sizes if spec.block_size is None else (spec.block_size,)
    layouts = tuple(STRIDE_ORDERS) if spec.kv_cache_layout is None else (spec.kv_cache_layout,)
    ranks: dict[Phase, dict[_Choice, tuple[int, int]]] = {}
    for phase in phases_of(spec):
        refusals = []
        ranks[phase] = {}
        for block_size, layout in itertools.product(block_sizes, layouts):
            choice = spec.replace(block_size=block_size, kv_cache_layout=layout)
            try:
                selection = select(choice, device, phase=phase, rules=rules)
            except UnsupportedError as error:
                refusals.append(error)
            else:
                ranks[phase][block_size, layout] = _rank(selection, layout)
        if not ranks[phase]:
            raise refusals[0]
    return ranks


def _rank(selection: Selection, layout: str) -> tuple[int, int]:
    """Places between the pick and the first in the order, and whether it likes another layout."""
    names = [verdict.name for verdict in selection.verdicts]
    by_platform = selection.source is Source.PLATFORM
    liked = selection.backend_cls.get_kv_cache_stride_order()
    return (
        1 + names.index(selection.name) if by_platform else 0,
        int(tuple(liked) != STRIDE_ORDERS[layout]),
    )


def _conflict(accepted: Mapping[str, Mapping[Phase, Iterable[_Choice]]]) -> str:
    """The smallest set of layers that conflict, in words."""
    alike: dict[frozenset[_Choice], str] = {}
    for name, phases in accepted.items():
        differ = len(set(map(frozenset, phases.values()))) > 1
        for phase, choices in phases.items():
            alike.setdefault(frozenset(choices), f"{name} in {phase}" if differ else name)
    for size in range(2, len(alike) + 1):
        for group in itertools.combinations(alike, size):
            if not frozenset.intersection(*group):
                lines = [f"  {alike[c]}: {_choices_in_words(c)}" for c in group]
                return (
                    "No block size and layout suits these layers together:\n"
                    + "\n".join(lines)
                    + "\nExclude the backend that is choosy (an override such as kind=-NAME), or "
                    "set the block size that the others accept."
                )
    raise AssertionError("there is no conflict")


def _choices_in_words(choices: frozenset[_Choice]) -> str:
    layouts: dict[tuple[int, ...], list[str]] = {}
    for layout in STRIDE_ORDERS:
        sizes = tuple(sorted(size for size, other in choices if other == layout))
        if sizes:
            layouts.setdefault(sizes, []).append(layout)
    return "; or ".join(
        f"block_size {', '.join(map(str, sizes))} in {' or '.join(names)}"
        for sizes, names in layouts.items()
    )
