"""One AttentionState for a whole model: the static buffers of its CUDA graphs, for all its layers.

A step is captured on a `GraphStep`, which gives every layer its metadata in forward_context, and
replayed after the next batch was copied into it. Layers of one kind that share a batch share
metadata; layers of all kinds that share a batch share its tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attn_dispatch.arguments import INT32_MAX, as_int
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.captured import GraphLimits, StaticBatch
from attn_dispatch.interface.graphs import AttentionState
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.waits import never_waits
from attn_dispatch.runtime.graph_step import (
    GraphBuffers,
    GraphStep,
    GroupStep,
    LayerGroup,
    PlannedLayers,
    StepBatch,
    batch_of,
)
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.named_layers import layers_by_prefix, layers_of_model

__all__ = ["ModelGraphState", "graph_state"]


class ModelGraphState(AttentionState[Any]):
    """The AttentionState of a model, made by `graph_state`.

    Graphs that share a state run one at a time, on the stream on which their steps are prepared.

    Attributes:
        device: of the layers and the buffers.
    """

    def __init__(
        self, groups: Sequence[LayerGroup], limits: GraphLimits, device: torch.device
    ) -> None:
        self._groups = groups
        self._limits = limits
        self.device = device
        self._tables: list[torch.Tensor] = []
        self._masks: list[torch.Tensor | None] = []

    def begin_forward(self, model_input: StepBatch) -> None:
        """Check that a step is not larger than the model's steps were said to be.

        Raises:
            InvalidInputError: it is larger.
        """
        for group in self._groups:
            batch = batch_of(group, model_input, len(self._groups))
            most, limits = max(batch.seq_lens_list, default=0), self._limits
            found = (batch.num_reqs, batch.num_tokens, most)
            allowed = (limits.num_reqs, limits.num_tokens, limits.max_seq_len)
            if any(each > most for each, most in zip(found, allowed, strict=True)):
                raise InvalidInputError(
                    f"The batch has {found[0]} requests, {found[1]} new tokens and up to "
                    f"{found[2]} keys; this state was made for {allowed[0]}, {allowed[1]} and "
                    f"{allowed[2]}."
                )

    @contextlib.contextmanager
    def graph_capture(self, max_batch_size: int | None = None) -> Iterator[None]:
        """The context in which graphs are captured: allocate what they share, which stays.

        Args:
            max_batch_size: at most max_num_seqs, for which there is always room.

        Raises:
            InvalidInputError: max_batch_size is larger.
        """
        if max_batch_size is not None:
            self._check_size("max_batch_size", max_batch_size, self._limits.num_reqs)
        if not self._tables:
            with torch.inference_mode(False):  # tensors that can be filled in any mode
                for group in self._groups:
                    self._allocate(group)
        yield

    def _allocate(self, group: LayerGroup) -> None:
        rows, columns = (
            self._limits.num_reqs + 1,
            -(-self._limits.max_seq_len // min(group.block_sizes)),
        )
        self._tables.append(torch.zeros(rows, columns, dtype=torch.int32, device=self.device))
        mask = None
        if group.takes_mask:
            size = self._limits.max_mask_elements
            mask = torch.zeros(size, dtype=torch.bool, device=self.device)
        self._masks.append(mask)

    def graph_clone(self, batch_size: int) -> ModelGraphState:
        """A state for graphs of up to batch_size requests, which shares the buffers of this one.

        Raises:
            InvalidInputError: this state is for fewer requests, or has no buffers yet.
        """
        self._check_size("batch_size", batch_size, self._limits.num_reqs)
        self._require_buffers()
        limits = dataclasses.replace(self._limits, num_reqs=batch_size)
        clone = ModelGraphState(self._groups, limits, self.device)
        clone._tables, clone._masks = self._tables, self._masks
        return clone

    def graph_capture_get_metadata_for_batch(
        self,
        batch_size: int,
        is_encoder_decoder_model: bool = False,
        *,
        max_query_len: int | None = None,
        num_tokens: int | None = None,
        max_decode_query_len: int = 1,
        custom_mask: bool = False,
    ) -> GraphStep:
        """A step to capture. Without further arguments: batch_size requests of one new token.

        Args:
            batch_size: the most requests.
            is_encoder_decoder_model: the model has cross-attention. Its layers are found by their
                attn_type; this is checked against them.
            max_query_len: new tokens of a request, at most: verification of drafts. Lengths may
                differ.
            num_tokens: new tokens of all requests, at most: the rows of the step's tensors. Without
                max_query_len, the step is any mix of prompts, chunks of prompts and decodes with
                this budget. By default batch_size times max_query_len.
            max_decode_query_len: in such a mix, requests of up to this many new tokens are computed
                by kernels for decodes, and others by kernels for prefills.
            custom_mask: the steps bring a custom mask, for the layers that were made with it.

        Raises:
            InvalidInputError: a size is larger than the state's, or there are no buffers yet: enter
                `graph_capture` first.
            UnsupportedError: a backend cannot capture such steps.
        """
        self._require_buffers()
        state = self._limits
        size = self._check_size("batch_size", batch_size, state.num_reqs)
        has_cross = any(group.is_cross for group in self._groups)
        if is_encoder_decoder_model and not has_cross:
            raise InvalidInputError(
                "is_encoder_decoder_model=True, and no layer has attn_type='encoder_decoder'."
            )
        is_mixed = max_query_len is None and num_tokens is not None
        longest = 1 if max_query_len is None else max_query_len
        longest = self._check_size("max_query_len", longest, state.max_seq_len)
        rows = size * longest if num_tokens is None else num_tokens
        rows = self._check_size("num_tokens", rows, state.num_tokens)
        if is_mixed:
            longest = min(rows, state.max_seq_len)
        elif rows < longest or (longest == 1 and rows != size):
            raise InvalidInputError(
                f"num_tokens={rows} does not fit {size} requests of up to {longest} new tokens. "
                "Leave it out, or give the most new tokens of a step."
            )
        decode_len = as_int("max_decode_query_len", max_decode_query_len, 1, INT32_MAX)
        limits = dataclasses.replace(
            state,
            num_reqs=size,
            num_tokens=rows,
            max_query_len=longest,
            phase=Phase.PREFILL if is_mixed else Phase.DECODE,
            max_decode_query_len=decode_len,
        )
        if custom_mask and not any(group.takes_mask for group in self._groups):
            raise InvalidInputError(
                "custom_mask=True, and no layer was made with custom_mask=True."
            )
        tensors = zip(self._groups, self._tables, self._masks, strict=True)
        with torch.inference_mode(False):  # tensors that can be filled in any mode
            parts = [
                self._part(group, limits, table, mask if custom_mask else None)
                for group, table, mask in tensors
            ]
        return GraphStep(limits, parts)

    def _part(
        self,
        group: LayerGroup,
        limits: GraphLimits,
        table: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> GroupStep:
        """A group's part of a step: its static batch, and the metadata of each kind of layer."""
        limits = dataclasses.replace(
            limits,
            has_custom_mask=mask is not None,
            has_ranges=group.has_ranges,
        )
        static = StaticBatch.make(
            limits,
            self.device,
            block_table=table,
            custom_mask=mask,
            writes_keys=not group.is_cross,
        )
        planned: dict[Hashable, PlannedLayers] = {}
        for layer in group.layers.values():
            binding = layer._require_binding()
            if binding.metadata_key not in planned:
                metadata = binding.builder.build_for_graph(static.batch, limits)
                planned[binding.metadata_key] = PlannedLayers(layer, binding.builder, metadata)
        return GroupStep(group, static, planned)

    def get_graph_input_buffers(
        self, attn_metadata: GraphStep, is_encoder_decoder_model: bool = False
    ) -> GraphBuffers:
        """See AttentionState.get_graph_input_buffers.

        With several batches in a step, the names begin with the number of the batch and a dot.
        """
        return GraphBuffers(attn_metadata)

    @never_waits
    def prepare_graph_input_buffers(
        self,
        input_buffers: dict[str, torch.Tensor] | GraphStep,
        attn_metadata: StepBatch | BatchMetadata,
        is_encoder_decoder_model: bool = False,
    ) -> None:
        """Copy a step into the buffers that a captured graph reads, without waiting for the device.

        The copies are queued on the current stream. Replay the graph on the same one.

        Args:
            input_buffers: the captured step, or what `get_graph_input_buffers` returned for it.
            attn_metadata: the batch, layer name -> batch, or metadata that keeps its batch.
            is_encoder_decoder_model: not needed; see graph_capture_get_metadata_for_batch.

        Raises:
            InvalidInputError: the batch is larger than what was captured, or has what was not
                captured; nothing has been copied then.
            DeviceWaitError: under ATTN_DISPATCH_CHECK=sync, a backend waited; FLASHINFER does.
        """
        step = input_buffers.step if isinstance(input_buffers, GraphBuffers) else input_buffers
        if not isinstance(step, GraphStep):
            raise InvalidInputError(
                f"input_buffers is a {type(input_buffers).__name__}. Give the GraphStep of "
                "graph_capture_get_metadata_for_batch, or its get_graph_input_buffers."
            )
        batch = attn_metadata.batch if isinstance(attn_metadata, BatchMetadata) else attn_metadata
        step.fill(batch)

    def _require_buffers(self) -> None:
        if not self._tables:
            raise InvalidInputError(
                "There are no buffers yet. Enter `with state.graph_capture():` first."
            )

    def _check_size(self, name: str, value: Any, most: int) -> int:
        size = as_int(name, value, 1, INT32_MAX)
        if size > most:
            raise InvalidInputError(
                f"{name} is {size}, and this state was made for up to {most}. Raise the limit of "
                "graph_state."
            )
        return size


def graph_state(
    layers: nn.Module | Mapping[str, Attention] | Sequence[Attention],
    *,
    max_num_seqs: int,
    max_seq_len: int,
    max_num_tokens: int | None = None,
    max_mask_elements: int | None = None,
    max_ranges: int = 0,
    batches: Sequence[Sequence[str]] | None = None,
) -> ModelGraphState:
    """The static buffers of a model's CUDA graphs, for all kinds of its layers.

    Bind the caches first, and run the model once eagerly, so that kernels are compiled and the
    layers have their final backends.

    Args:
        layers: a model or its Attention layers, made with cuda_graph=True. Layers of encoders take
            no part.
        max_num_seqs: requests of a step.
        max_seq_len: keys of a request, the new ones included.
        max_num_tokens: new tokens of a step; None for max_num_seqs, enough for plain decodes.
        max_mask_elements: elements (bytes) of a step's custom mask, over all requests; None for
            max_num_tokens * max_seq_len.
        max_ranges: bidirectional ranges of a step, over all requests.
        batches: the names of the layers that share a batch, for each batch of a step. None: all
            layers share one, and cross-attention layers another.

    Returns:
        The state. It allocates its buffers when `graph_capture` is entered.

    Raises:
        InvalidInputError: a layer was not made with cuda_graph=True, has no cache yet or is on
            another device than the others, or an argument is out of range.

    Example:
        >>> state = graph_state(model, max_num_seqs=64, max_num_tokens=512, max_seq_len=8192)
        >>> with state.graph_capture():
        ...     step = state.graph_capture_get_metadata_for_batch(64)
        ...     with forward_context(step):
        ...         model(token_ids)  # compiles what is not compiled yet
        ...         with torch.cuda.graph(graph):
        ...             logits = model(token_ids)
        >>> state.prepare_graph_input_buffers(step, batch)
        >>> graph.replay()
    """
    if isinstance(layers, nn.Module):
        named = layers_of_model(layers)
    else:
        named = layers_by_prefix(layers.values() if isinstance(layers, Mapping) else layers)
    named = {
        name: layer
        for name, layer in named.items()
        if AttentionType(layer.spec.attn_type).has_kv_cache
    }
    if not named:
        raise InvalidInputError("There is no Attention layer with a cache among the layers.")
    for name, layer in named.items():
        _check_layer(name, layer)
    devices = {layer._device for layer in named.values()}
    if len(devices) > 1 or None in devices:
        raise InvalidInputError(
            f"The layers are on {', '.join(sorted(map(str, devices)))}; a state is for the layers "
            "of one device. Make one for each."
        )
    num_seqs = as_int("max_num_seqs", max_num_seqs, 1, INT32_MAX)
    num_tokens = num_seqs if max_num_tokens is None else max_num_tokens
    num_tokens = as_int("max_num_tokens", num_tokens, 1, INT32_MAX)
    seq_len = as_int("max_seq_len", max_seq_len, 1, INT32_MAX)
    elements = num_tokens * seq_len if max_mask_elements is None else max_mask_elements
    limits = GraphLimits(
        num_reqs=num_seqs,
        num_tokens=num_tokens,
        max_query_len=num_tokens,
        max_seq_len=seq_len,
        max_mask_elements=as_int("max_mask_elements", elements, 0, 2**63 - 1),
        max_ranges=as_int("max_ranges", max_ranges, 0, INT32_MAX),
    )
    (device,) = devices
    assert device is not None
    return ModelGraphState(_groups(named, batches), limits, device)


def _check_layer(name: str, layer: Attention) -> None:
    if not layer.spec.cuda_graph:
        raise InvalidInputError(
            f"Layer {name!r} was not made for CUDA graphs, so its backend may not support them. "
            "Make it with cuda_graph=True."
        )
    if layer.spec.key_positions:
        raise UnsupportedError(
            f"Layer {name!r} has key_positions, which no graph_state keeps in its buffers. Run "
            "such layers eagerly."
        )
    if layer.kv_cache is None or layer.spec.block_size is None:
        raise InvalidInputError(
            f"Layer {name!r} has no cache yet. Call bind_kv_caches before graph_state."
        )


def _groups(
    named: Mapping[str, Attention], batches: Sequence[Sequence[str]] | None
) -> list[LayerGroup]:
    """The layers by the batch that they share."""
    if batches is None:
        by_kind: dict[bool, dict[str, Attention]] = {}
        for name, layer in named.items():
            is_cross = layer.spec.attn_type == AttentionType.ENCODER_DECODER
            by_kind.setdefault(is_cross, {})[name] = layer
        groups = list(map(LayerGroup, by_kind.values()))
    else:
        listed = [name for each in batches for name in each]
        if sorted(listed) != sorted(named):
            wrong = sorted(set(listed) ^ set(named)) or sorted(listed)
            raise InvalidInputError(
                f"batches must name each layer once; see layer {wrong[0]!r}. The layers are: "
                f"{', '.join(named)}."
            )
        groups = [LayerGroup({name: named[name] for name in each}) for each in batches if each]
    for group in groups:
        specs = {name: layer.spec for name, layer in group.layers.items()}
        if len({spec.custom_mask for spec in specs.values()}) > 1:
            raise InvalidInputError(
                f"Of the layers of a batch, e.g. {group.name!r}, some take a custom mask and some "
                "would ignore it. Give them batches of their own by batches=."
            )
        if len({spec.attn_type for spec in specs.values()}) > 1:
            raise InvalidInputError(
                f"Layers of self-attention and of cross-attention cannot share a batch, e.g. that "
                f"of {group.name!r}. Give them batches of their own by batches=."
            )
    return groups
