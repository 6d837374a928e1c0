"""The state across steps, and CommonAttentionState: static buffers for CUDA graphs."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.contents import OVER_STATIC_BUFFERS
from attn_dispatch.interface.metadata import AttentionMetadataBuilder, BatchMetadata, T

__all__ = ["BATCH_TENSORS", "AttentionState", "CommonAttentionState", "GraphRunner"]


class GraphRunner(Protocol):
    """What an AttentionState reads from the engine that owns it."""

    metadata_builder: AttentionMetadataBuilder[Any]
    device: torch.device
    max_blocks_per_request: int
    max_seq_len: int


class AttentionState(ABC, Generic[T]):
    """A backend's state across steps: the static buffers that captured CUDA graphs read.

    An engine captures one graph per batch size in `graph_capture`, on the metadata of
    `graph_capture_get_metadata_for_batch`, keeps what `get_graph_input_buffers` names, and before
    each replay copies the real batch's metadata there by `prepare_graph_input_buffers`.

    Args:
        runner: the engine that owns the state.
    """

    @abstractmethod
    def __init__(self, runner: GraphRunner) -> None:
        self.runner = runner

    @abstractmethod
    def begin_forward(self, model_input: AttentionBatch) -> None:
        """Prepare for a step over this batch, outside of a captured graph."""

    @abstractmethod
    def graph_capture(self, max_batch_size: int) -> AbstractContextManager[None]:
        """The context in which graphs of up to max_batch_size requests are captured."""

    @abstractmethod
    def graph_clone(self, batch_size: int) -> AttentionState[T]:
        """A state for the graph of this batch size, sharing the buffers of this one."""

    @abstractmethod
    def graph_capture_get_metadata_for_batch(
        self, batch_size: int, is_encoder_decoder_model: bool = False
    ) -> T:
        """Metadata of batch_size one-token requests over the static buffers.

        With is_encoder_decoder_model, for cross-attention: the step brings no new keys.
        """

    @abstractmethod
    def get_graph_input_buffers(
        self, attn_metadata: T, is_encoder_decoder_model: bool = False
    ) -> dict[str, torch.Tensor]:
        """The tensors of captured metadata that change from step to step, by name."""

    @abstractmethod
    def prepare_graph_input_buffers(
        self,
        input_buffers: dict[str, torch.Tensor],
        attn_metadata: T,
        is_encoder_decoder_model: bool = False,
    ) -> None:
        """Copy a step's metadata into the buffers that the captured graph reads."""


#: The tensors of a batch that change from step to step.
BATCH_TENSORS = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")


class CommonAttentionState(AttentionState[BatchMetadata]):
    """Keeps one set of static buffers, and makes metadata whose tensors are views of them.

    A captured graph holds one-token requests. A smaller step fills the rest with requests without
    keys and with slot −1, which compute nothing and write nothing. `attn_dispatch.graph_state`
    makes a state for other steps and for all layers of a model.

    Args:
        runner: the engine that owns the state.
    """

    def __init__(self, runner: GraphRunner) -> None:
        super().__init__(runner)
        self._buffers: dict[str, torch.Tensor] = {}

    def begin_forward(self, model_input: AttentionBatch) -> None:
        """Check that the batch fits into the buffers.

        Raises:
            InvalidInputError: the batch has more blocks or keys per request than the runner.
        """
        table = model_input.block_table
        blocks = 0 if table is None else table.shape[1]
        runner = self.runner
        if blocks > runner.max_blocks_per_request or model_input.max_seq_len > runner.max_seq_len:
            raise InvalidInputError(
                f"The batch has {blocks} blocks per request and up to {model_input.max_seq_len} "
                f"keys; this state was made for {runner.max_blocks_per_request} and "
                f"{runner.max_seq_len}."
            )

    @contextlib.contextmanager
    def graph_capture(self, max_batch_size: int) -> Iterator[None]:
        """Allocate the buffers, which stay for the replays."""
        device, columns = self.runner.device, self.runner.max_blocks_per_request
        self._buffers = {
            "query_start_loc": torch.arange(max_batch_size + 1, dtype=torch.int32, device=device),
            # A key before the new one makes each request a decode.
            "seq_lens": torch.full(
                (max_batch_size,), min(2, self.runner.max_seq_len), dtype=torch.int32, device=device
            ),
            "block_table": torch.zeros(max_batch_size, columns, dtype=torch.int32, device=device),
            "slot_mapping": torch.full((max_batch_size,), -1, dtype=torch.int64, device=device),
        }
        yield

    def graph_clone(self, batch_size: int) -> CommonAttentionState:
        """See AttentionState.graph_clone.

        Raises:
            InvalidInputError: there are no buffers of that size yet.
        """
        self._check(batch_size)
        clone = type(self)(self.runner)
        clone._buffers = self._buffers
        return clone

    def graph_capture_get_metadata_for_batch(
        self, batch_size: int, is_encoder_decoder_model: bool = False
    ) -> BatchMetadata:
        """See AttentionState.graph_capture_get_metadata_for_batch.

        Raises:
            InvalidInputError: there are no buffers of that size yet.
        """
        self._check(batch_size)
        tensors: dict[str, Any] = {
            name: tensor[:batch_size] for name, tensor in self._buffers.items()
        }
        tensors["query_start_loc"] = starts = self._buffers["query_start_loc"][: batch_size + 1]
        if is_encoder_decoder_model:
            del tensors["slot_mapping"]
        batch = AttentionBatch(
            **tensors,
            query_start_loc_cpu=starts.cpu(),
            seq_lens_cpu=tensors["seq_lens"].cpu(),
            max_query_len=1,
            max_seq_len=self.runner.max_seq_len,
        )
        batch.checked.add(OVER_STATIC_BUFFERS)
        metadata: BatchMetadata = self.runner.metadata_builder.build(batch)
        return metadata

    def _check(self, batch_size: int) -> None:
        largest = len(self._buffers["seq_lens"]) if self._buffers else 0
        if batch_size > largest:
            raise InvalidInputError(
                f"There are buffers for batches of up to {largest} requests, not {batch_size}. "
                "Enter graph_capture(max_batch_size) first."
            )

    def get_graph_input_buffers(
        self, attn_metadata: BatchMetadata, is_encoder_decoder_model: bool = False
    ) -> dict[str, torch.Tensor]:
        """See AttentionState.get_graph_input_buffers."""
        tensors = {name: getattr(attn_metadata.batch, name) for name in BATCH_TENSORS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def prepare_graph_input_buffers(
        self,
        input_buffers: dict[str, torch.Tensor],
        attn_metadata: BatchMetadata,
        is_encoder_decoder_model: bool = False,
    ) -> None:
        """See AttentionState.prepare_graph_input_buffers.

        Raises:
            InvalidInputError: the step has more requests than the graph, queries of more or less
                than one token, or a feature that a graph does not support.
        """
        batch = attn_metadata.batch
        size, num_reqs = len(input_buffers["seq_lens"]), batch.num_reqs
        if num_reqs > size or batch.query_lens != [1] * num_reqs:
            raise InvalidInputError(
                f"The graph was captured for {size} requests of one token, and the step has "
                f"{num_reqs} with {batch.query_lens[:8]}. Replay a larger graph, or run eagerly."
            )
        has_ranges = attn_metadata.builder.spec.bidirectional_ranges and any(
            (batch.multi_modal_placeholder_index_maps or {}).values()
        )
        has_more = batch.custom_mask is not None or batch.key_positions is not None
        if has_more or has_ranges or batch.enable_kv_scales_calculation:
            raise InvalidInputError(
                "The step has a custom_mask, bidirectional ranges or key_positions, or derives "
                "scales, and this state supports none of them. Run it eagerly; graph_state "
                "supports masks and ranges."
            )
        self.begin_forward(batch)
        input_buffers["seq_lens"].zero_()[:num_reqs].copy_(batch.seq_lens)
        if batch.block_table is not None:
            columns = batch.block_table.shape[1]
            input_buffers["block_table"][:num_reqs, :columns].copy_(batch.block_table)
        if "slot_mapping" in input_buffers:
            slots = input_buffers["slot_mapping"].fill_(-1)
            if batch.slot_mapping is not None:
                slots[:num_reqs].copy_(batch.slot_mapping[:num_reqs])
