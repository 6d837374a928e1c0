"""A captured step of a model: what its layers read, and how the next batch gets there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch import environment
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.captured import GraphLimits, StaticBatch
from attn_dispatch.interface.contents import check_batch_contents
from attn_dispatch.interface.graphs import BATCH_TENSORS
from attn_dispatch.interface.metadata import AttentionMetadataBuilder
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.interface.validation import (
    check_block_size,
    check_block_table,
    check_slot_mapping,
)
from attn_dispatch.runtime.context import ForwardContext
from attn_dispatch.runtime.layer import Attention

__all__ = [
    "GraphBuffers",
    "GraphStep",
    "GroupStep",
    "LayerGroup",
    "PlannedLayers",
    "StepBatch",
    "batch_of",
]

#: What a step is given: one batch for all layers, or one for each layer by name.
StepBatch = AttentionBatch | Mapping[str, AttentionBatch]


class LayerGroup:
    """Layers that share a batch.

    Attributes:
        layers: by their names.
        name: of the first, for messages.
        is_cross: they are cross-attention, whose keys come from an encoder before any graph runs.
        writes_keys: some of them write the step's keys to their cache.
        takes_mask: they have custom masks.
        has_ranges: some of them have bidirectional ranges.
        takes_bounds: all of them take batches with upper bounds of their key counts.
        block_sizes: of the batch, for their caches: with context_parallel, W times the caches'.
    """

    def __init__(self, layers: Mapping[str, Attention]) -> None:
        self.layers = layers
        self.name = next(iter(layers))
        specs = [layer.spec for layer in layers.values()]
        self.is_cross = any(s.attn_type == AttentionType.ENCODER_DECODER for s in specs)
        self.writes_keys = not self.is_cross and not all(s.kv_sharing for s in specs)
        self.takes_mask = any(s.custom_mask for s in specs)
        self.has_ranges = any(s.bidirectional_ranges for s in specs)
        self.takes_bounds = all(s.lengths == "upper_bound" for s in specs)
        self.block_sizes = {
            layer.spec.block_size * (layer.context_parallel.size if layer.context_parallel else 1)
            for layer in layers.values()
            if layer.spec.block_size is not None
        }


@dataclass(frozen=True)
class PlannedLayers:
    """The captured metadata of layers of one kind that share a batch."""

    layer: Attention
    builder: AttentionMetadataBuilder[Any]
    metadata: Any


@dataclass(frozen=True)
class GroupStep:
    """A group's part of a captured step; `planned` by the kind of layer."""

    group: LayerGroup
    static: StaticBatch
    planned: Mapping[Hashable, PlannedLayers]


class GraphBuffers(dict[str, torch.Tensor]):
    """The tensors of a captured step that change from step to step, by name."""

    def __init__(self, step: GraphStep) -> None:
        super().__init__()
        self.step = step
        names = (*BATCH_TENSORS, "custom_mask")
        for index, part in enumerate(step._parts):
            prefix = "" if len(step._parts) == 1 else f"{index}."
            tensors = {name: getattr(part.static.batch, name) for name in names}
            self.update((prefix + name, each) for name, each in tensors.items() if each is not None)


class GraphStep(ForwardContext):
    """The metadata of a captured step for every layer: `forward_context(step)`.

    In that context, layers read the batch that was last copied into the step. A capture and the
    replays of it do, and a call of the model without a graph too.

    Attributes:
        limits: the largest step that it takes.
    """

    def __init__(self, limits: GraphLimits, parts: Sequence[GroupStep]) -> None:
        super().__init__({name: part.static.batch for part in parts for name in part.group.layers})
        self.limits = limits
        self._parts = parts
        self._part_of = {name: part for part in parts for name in part.group.layers}

    def metadata(
        self, layer_name: str, key: Hashable, build: Callable[[AttentionBatch], Any]
    ) -> Any:
        """See ForwardContext.metadata. Nothing is built here."""
        self.batch_for(layer_name)  # raises for a layer that is not in the step
        found = self._part_of[layer_name].planned.get(key)
        if found is None:
            raise InvalidInputError(
                f"Layer {layer_name!r} has other backends than when this step was made. Run the "
                "model once eagerly, then make a new graph_state and capture again."
            )
        return found.metadata

    def mismatch(self, batch: StepBatch) -> str | None:
        """Why the step cannot take a batch; None if it can. An engine then runs it eagerly."""
        try:
            self._batches(batch)
        except InvalidInputError as error:
            return str(error)
        return None

    def _batches(self, given: StepBatch) -> list[AttentionBatch]:
        """The batch of each part, checked."""
        return [
            self._checked(part, batch_of(part.group, given, len(self._parts)))
            for part in self._parts
        ]

    def _checked(self, part: GroupStep, batch: AttentionBatch) -> AttentionBatch:
        batch.check()
        group, why = part.group, part.static.limits.mismatch(batch)
        if why is None and batch.key_start_loc_cpu is not None:
            brings = batch.key_starts[-1]
            if group.is_cross and brings:
                why = f"it brings {brings} keys of an encoder, and a graph writes none"
            elif not group.is_cross and batch.key_starts != batch.query_start_list:
                why = "its rows of key are not those of its queries"
        if why is None and batch.lengths != "exact" and not group.takes_bounds:
            why = "it has upper bounds of its key counts, and the layers were made for exact ones"
        if why is not None:
            raise InvalidInputError(
                f"A graph of {part.static.limits.kind} cannot run this batch: {why}. Replay a "
                "graph that was captured for it, or run the step eagerly."
            )
        device = part.static.batch.seq_lens.device
        for block_size in group.block_sizes:
            check_block_size(batch, block_size)
            check_block_table(batch, block_size, device)
        if group.writes_keys:
            slots = batch.slot_mapping
            check_slot_mapping(batch, 0 if slots is None else len(slots), device)
        if environment.check_mode() or device.type == "cpu":  # as in an eager call
            for each in group.layers.values():
                if each.context_parallel is None:  # else its cache has one rank's slots
                    check_batch_contents(batch, each.kv_cache, Reach.of(each.spec))
        return batch

    def fill(self, given: StepBatch) -> None:
        """Copy a batch into the step; see ModelGraphState.prepare_graph_input_buffers."""
        batches = self._batches(given)  # all are checked before anything is copied
        for part, batch in zip(self._parts, batches, strict=True):
            part.static.fill(batch)
            for each in part.planned.values():
                each.builder.update_for_graph(each.metadata, batch)


def batch_of(group: LayerGroup, given: object, number: int) -> AttentionBatch:
    """The batch of a group of layers, of this number of groups."""
    if isinstance(given, AttentionBatch):
        if number == 1:
            return given
        raise InvalidInputError(
            f"The step has one batch, and the layers need {number}, e.g. one for "
            f"{group.name!r}. Give a mapping from layer names to batches."
        )
    if not isinstance(given, Mapping):
        raise InvalidInputError(
            f"The step is a {type(given).__name__}; give an AttentionBatch, or a mapping from "
            "layer names to them."
        )
    missing = [name for name in group.layers if not isinstance(given.get(name), AttentionBatch)]
    if missing:
        raise InvalidInputError(f"The step has no AttentionBatch for layer {missing[0]!r}.")
    batch: AttentionBatch = given[group.name]
    for name in group.layers:
        if given[name] is not batch:
            raise InvalidInputError(
                f"Layers {group.name!r} and {name!r} have different batches, and this state was "
                "made for one. Name the layers of each batch by graph_state(batches=...)."
            )
    return batch
