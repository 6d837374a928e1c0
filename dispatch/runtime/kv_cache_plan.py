"""Planning a model's KV caches: one layout and block size that every layer's backends accept."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, allocate_kv_cache
from attn_dispatch.interface.quantization import kv_cache_torch_dtype, stored_head_size
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.detect import usable_device
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.runtime.kv_regions import KVRegion, regions_of
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.named_layers import layers_by_prefix, layers_of_model
from attn_dispatch.runtime.split import part_spec
from attn_dispatch.selection.overrides import Source
from attn_dispatch.selection.report import Report
from attn_dispatch.selection.resolve import SelectionContext
from attn_dispatch.selection.selector import phases_of

__all__ = ["BLOCK_SIZES", "KVCachePlan", "plan_kv_cache"]

#: Block sizes that a plan considers, best first.
BLOCK_SIZES = (16, 32, 64, 128, 256, 8, 4, 2, 1)


@dataclass(frozen=True)
class KVCachePlan:
    """One layout and block size for a model's caches, and the shape of each layer's cache.

    Attributes:
        layout: "NHD" or "HND".
        block_size: tokens per block.
        specs: layer name -> its spec, block size and layout filled in.
        shapes: layer name -> the logical shape of one block; layers without a cache are absent.
        stride_orders: layer name -> the order of dimensions in memory.
        dtypes: layer name -> element type.
        shared: layer name -> the layer whose cache it reads.
        workspace_bytes: the largest of the layers' MLAAttention.workspace_bytes; layers run one at
            a time, and share it. 0 without such layers.
        context_parallel: how many ranks share each request's keys.
    """

    layout: str
    block_size: int
    specs: Mapping[str, AttentionSpec]
    shapes: Mapping[str, tuple[int, ...]]
    stride_orders: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    shared: Mapping[str, str]
    workspace_bytes: int = 0
    context_parallel: int = 1

    @property
    def tokens_per_block(self) -> int:
        """The tokens of a request that a block of the engine's table holds, on all ranks together.

        It is the block_size of `AttentionBatch.create`; without context parallelism that of the
        plan.
        """
        return self.block_size * self.context_parallel

    @property
    def bytes_per_block(self) -> int:
        """The memory of one block over all layers, on one rank."""
        return sum(
            math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()
        )

    def num_blocks(self, memory_bytes: int) -> int:
        """The number of blocks that fit into this much memory, in addition to the workspace.

        Raises:
            InvalidInputError: memory_bytes is not an integer, or negative.
        """
        memory_bytes = as_int("memory_bytes", memory_bytes, 0)
        memory_bytes = max(0, memory_bytes - self.workspace_bytes)
        return memory_bytes // self.bytes_per_block if self.shapes else 0

    def allocate(
        self, num_blocks: int, device: torch.device | str | None = None
    ) -> dict[str, torch.Tensor]:
        """A cache for each layer that has one; a sharing layer gets its target's tensor.

        Args:
            num_blocks: of each cache.
            device: where; None for the default device, as in `plan_kv_cache`.

        Raises:
            InvalidInputError: as for `allocate_kv_cache`.
        """
        num_blocks = as_int("num_blocks", num_blocks, 0)
        device = usable_device(device)
        caches = {
            name: allocate_kv_cache(
                (num_blocks, *shape), self.stride_orders[name], self.dtypes[name], device
            )
            for name, shape in self.shapes.items()
        }
        return caches | {name: caches[target] for name, target in self.shared.items()}

    def regions(self, num_blocks: int, *, split: bool = True) -> list[KVRegion]:
        """Where the content of a block is in each cache of `allocate(num_blocks)`.

        A cache that layers share is listed once, under the layer that writes it; `shared` names
        the others. The regions of a block do not overlap, and together they are the block.

        Args:
            num_blocks: of each cache.
            split: False for one region with content "block" per cache, in place of one for each
                kind of content.

        Raises:
            InvalidInputError: num_blocks is not an integer, or negative.
        """
        num_blocks = as_int("num_blocks", num_blocks, 0)
        return [
            region
            for name, shape in self.shapes.items()
            for region in regions_of(
                name,
                self.specs[name],
                (num_blocks, *shape),
                self.stride_orders[name],
                self.dtypes[name],
                split=split,
            )
        ]


def plan_kv_cache(
    layers: nn.Module | Mapping[str, AttentionSpec | Attention] | Sequence[Attention],
    device: torch.device | str | DeviceProfile | None = None,
    *,
    shared: Mapping[str, str] | None = None,
    backend: str | None = None,
    context_parallel: int | None = None,
) -> KVCachePlan:
    """One layout and block size that every layer's backends accept, in every phase.

    If several are accepted, the one with which the layers get the backends that are highest in
    this device's order.

    Args:
        layers: layer name -> spec or layer; or a model or a list, whose Attention layers are named
            by their prefix. A block_size or kv_cache_layout of None is chosen by the plan; any
            other value is kept. What a layer took from a cache that is bound to it is open again.
        device: as for `resolve`; None for the device of each layer, if layers are given.
        shared: layer name -> the layer whose cache it reads, for specs with kv_sharing; Attention
            layers name theirs.
        backend: as for `resolve`; only for specs, as layers keep the overrides they were made
            with.
        context_parallel: how many ranks share each request's keys; None for what the layers were
            made for, or 1. The plan is that of one rank's caches, and the same on every rank.

    Raises:
        UnsupportedError: no layout and block size is accepted by all; the message names the
            smallest set of layers that conflict, with what each accepts. Or a layer has no backend.
        InvalidInputError: a sharing layer's target is missing or does not fit, an argument is
            of another type, a model has no Attention layer, or two layers have one name.
    """
    named = _by_name(layers)
    shared = {} if shared is None else shared
    _check_types(named, shared)
    modules = {name: each for name, each in named.items() if isinstance(each, Attention)}
    shared = _with_targets(shared, modules)
    if modules and backend is not None:
        raise InvalidInputError(
            f"backend={shown(backend)} is given with Attention layers, which keep the overrides "
            "they were made with. Give it to the layers, or plan over their specs."
        )
    world = _ranks_of(modules, context_parallel)
    specs = {name: _spec_of(each) for name, each in named.items()}
    cached = {
        name: spec for name, spec in specs.items() if AttentionType(spec.attn_type).has_kv_cache
    }
    for name in shared:
        if name not in cached:
            raise InvalidInputError(f"shared= names {name!r}, which is not a layer with a cache.")
    for name, spec in cached.items():
        _check_sharing(name, spec, cached, shared)
    contexts = {name: _context(modules.get(name), device, backend) for name in cached}
    is_split = world > 1 or any(each.context_parallel for each in modules.values())
    stored = {name: part_spec(each) if is_split else each for name, each in cached.items()}
    block_size, layout = _choose(stored, contexts)
    choice = {"block_size": block_size, "kv_cache_layout": layout}
    specs |= {name: spec.replace(**choice) for name, spec in cached.items()}
    shapes, orders, dtypes = {}, {}, {}
    for name, context in contexts.items():
        if name in shared:
            continue
        spec = specs[name]
        size = stored_head_size(spec.kv_cache_dtype, max(spec.head_size, spec.head_size_v))
        selected = stored[name].replace(**choice)
        backend_cls = _picked_cls(context, context.report(selected, phases_of(spec)[0]))
        shape = backend_cls.get_kv_cache_shape(1, block_size, spec.num_kv_heads, size)
        shapes[name] = tuple(shape[1:])
        orders[name] = STRIDE_ORDERS[layout] if len(shape) == 5 else tuple(range(len(shape)))
        dtypes[name] = kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, context.device.arch)
    workspace = max((getattr(each, "workspace_bytes", 0) for each in modules.values()), default=0)
    return KVCachePlan(layout, block_size, specs, shapes, orders, dtypes, shared, workspace, world)


def _ranks_of(modules: Mapping[str, Attention], given: int | None) -> int:
    """How many ranks share the keys, by the argument and by the layers with a cache."""
    sizes = {
        name: 1 if each.context_parallel is None else each.context_parallel.size
        for name, each in modules.items()
        if AttentionType(each.spec.attn_type).has_kv_cache
    }
    world = as_int("context_parallel", given, 1) if given is not None else None
    if world is None:
        world = next(iter(sizes.values()), 1)
    for name, size in sizes.items():
        if size != world:
            raise InvalidInputError(
                f"The keys of layer {name!r} are on {size} ranks, and those of the plan on "
                f"{world}. Make all layers that share a block table with one context_parallel, and "
                "plan the others separately."
            )
    return world


def _by_name(layers: Any) -> Mapping[Any, Any]:
    """Specs or layers by name, still unchecked."""
    if isinstance(layers, Mapping):
        return layers
    if isinstance(layers, nn.Module):
        named = layers_of_model(layers)
        if not named:
            raise InvalidInputError(
                f"The {type(layers).__name__} has no Attention layer. Make its attention layers "
                "by attn_dispatch.Attention, or give a mapping from names to specs."
            )
        return named
    if isinstance(layers, Sequence) and not isinstance(layers, (str, bytes)):
        return layers_by_prefix(layers)
    raise InvalidInputError(
        f"layers is a {type(layers).__name__}; it must be a mapping from the name of each layer to "
        "its AttentionSpec, a model, or a list of Attention layers."
    )


def _check_types(named: Mapping[Any, Any], shared: Any) -> None:
    for name, each in named.items():
        if not isinstance(name, str) or not isinstance(each, (AttentionSpec, Attention)):
            raise InvalidInputError(
                f"layers has a {type(each).__name__} under {shown(name)}; it must have an "
                "AttentionSpec or an Attention layer under each layer's name."
            )
    if not isinstance(shared, Mapping):
        raise InvalidInputError(
            f"shared is a {type(shared).__name__}; it must be a mapping from the name of a layer "
            "to that of the layer whose cache it reads."
        )
    for name, target in shared.items():
        if not isinstance(name, str) or not isinstance(target, str):
            raise InvalidInputError(
                f"shared has {shown(target)} under {shown(name)}; both must be names of layers."
            )


def _with_targets(shared: Mapping[str, str], modules: Mapping[str, Attention]) -> dict[str, str]:
    """`shared`, and the layers whose caches Attention layers read."""
    targets = dict(shared)
    for name, each in modules.items():
        target = each.kv_sharing_target_layer_name
        if target is not None and targets.setdefault(name, target) != target:
            raise InvalidInputError(
                f"Layer {name!r} was made to read the cache of {target!r}, and shared= names "
                f"{targets[name]!r}. Leave it out of shared=."
            )
    return targets


def _spec_of(each: AttentionSpec | Attention) -> AttentionSpec:
    """A spec; that of a layer without what it took from a cache."""
    return each._declared_spec if isinstance(each, Attention) else each


def _context(
    module: Attention | None,
    device: torch.device | str | DeviceProfile | None,
    backend: str | None,
) -> SelectionContext:
    """The context in which a layer's backends are picked."""
    rules = None
    if module is not None:
        rules = module._rules
        device = module._device if device is None else device
    context = SelectionContext.current(device, backend, rules=rules)
    # Without tables: they compare backends over one cache, and not block sizes or layouts. What
    # they pick for a batch must take the cache that is planned here.
    return dataclasses.replace(context, tables=())


#: Fields that must be equal in layers that share a cache.
_CACHE_FIELDS = ("num_kv_heads", "head_size", "head_size_v", "kv_cache_dtype", "kv_scales", "dtype")


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
    for field in _CACHE_FIELDS:
        if getattr(spec, field) != getattr(cached[target], field):
            raise InvalidInputError(
                f"Layer {name!r} shares the cache of {target!r}, but their {field} differ: "
                f"{getattr(spec, field)} and {getattr(cached[target], field)}."
            )


#: (block size, layout).
_Choice = tuple[int, str]

#: Phase -> each choice that is accepted, and its rank; the lowest is the best.
_Ranks = dict[Phase, dict[_Choice, tuple[int, int]]]


def _choose(
    layers: Mapping[str, AttentionSpec], contexts: Mapping[str, SelectionContext]
) -> _Choice:
    """The best block size and layout that every layer's backends accept, in every phase."""
    fixed = sorted({spec.block_size for spec in layers.values() if spec.block_size})
    sizes = tuple(dict.fromkeys([*BLOCK_SIZES, *fixed]))
    found: dict[tuple[object, ...], _Ranks] = {}
    ranks: dict[str, _Ranks] = {}
    for name, spec in layers.items():
        context = contexts[name]
        key = (spec, context.device, context.rules)
        try:
            ranks[name] = found[key] = found.get(key) or _ranks(spec, context, sizes)
        except UnsupportedError as error:
            raise UnsupportedError(f"Layer {name!r}: {error}", error.report) from error

    def total(choice: _Choice) -> tuple[int, ...]:
        each = (by[choice] for phases in ranks.values() for by in phases.values())
        return tuple(map(sum, zip(*each, strict=True)))

    accepted = [by for phases in found.values() for by in phases.values()]
    common = [
        choice
        for choice in itertools.product(sizes, STRIDE_ORDERS)
        if all(choice in by for by in accepted)
    ]
    if not common:
        raise UnsupportedError(_conflict(ranks))
    return min(common, key=total)


def _ranks(spec: AttentionSpec, context: SelectionContext, sizes: tuple[int, ...]) -> _Ranks:
    """The choices that the layer's backends accept."""
    block_sizes = (spec.block_size,) if spec.block_size else sizes
    layouts = (spec.kv_cache_layout,) if spec.kv_cache_layout else tuple(STRIDE_ORDERS)
    ranks: _Ranks = {}
    for phase in phases_of(spec):
        ranks[phase], rejected = {}, []
        for block_size, layout in itertools.product(block_sizes, layouts):
            choice = spec.replace(block_size=block_size, kv_cache_layout=layout)
            report = context.report(choice, phase)
            if report.picked is None:
                rejected.append(report)
            else:
                ranks[phase][block_size, layout] = _rank(context, report, layout)
        if not ranks[phase]:
            raise UnsupportedError(str(rejected[0]), rejected[0])
    return ranks


def _rank(context: SelectionContext, report: Report, layout: str) -> tuple[int, int]:
    """The pick's place in the platform's order, and whether it prefers another layout."""
    names = [verdict.name for verdict in report.verdicts]
    by_platform = report.source is Source.PLATFORM
    preferred = _picked_cls(context, report).get_kv_cache_stride_order()
    return (
        1 + names.index(str(report.picked)) if by_platform else 0,
        int(tuple(preferred) != STRIDE_ORDERS[layout]),
    )


def _picked_cls(context: SelectionContext, report: Report) -> type[AttentionBackend]:
    return context.candidates[str(report.picked)].loaded_cls


def _conflict(accepted: Mapping[str, _Ranks]) -> str:
    """A message with the smallest set of layers that conflict."""
    named: dict[frozenset[_Choice], str] = {}
    for name, phases in accepted.items():
        differ = len(set(map(frozenset, phases.values()))) > 1
        for phase, choices in phases.items():
            named.setdefault(frozenset(choices), f"{name} in {phase}" if differ else name)
    for size in range(2, len(named) + 1):
        for group in itertools.combinations(named, size):
            if not frozenset.intersection(*group):
                lines = [f"  {named[c]}: {_choices_in_words(c)}" for c in group]
                return (
                    "No block size and layout is accepted by all of these layers:\n"
                    + "\n".join(lines)
                    + "\nExclude the backend that accepts few (an override such as kind=-NAME), or "
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
