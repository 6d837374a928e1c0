"""EngineAttention and DecodeSteps: layers over a cache that an engine owns, and its decode graphs.

For engines that keep their own KV cache, see docs/engine_caches.md. The plug-ins of vLLM and SGLang
are made of these.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.quantization import is_fp8
from attn_dispatch.runtime.context import ForwardContext, forward_context
from attn_dispatch.runtime.graph_state import graph_state
from attn_dispatch.runtime.graph_step import GraphStep, StepBatch
from attn_dispatch.runtime.kv_binding import bind_kv_caches
from attn_dispatch.runtime.layer import Attention

__all__ = ["DecodeSteps", "EngineAttention"]


class EngineAttention:
    """One attention layer of an engine. The engine allocates its cache, and hands it over.

    A second layer, with fp8 output, is made when the engine asks for one.

    Args:
        layer_class: Attention, or MLAAttention.
        try_shared_prefix: read a shared prefix once, if the layer's features and backends allow it.
        try_cuda_graph: make the layer for CUDA graphs, if backends allow it.
        **arguments: of `Attention`. The block size is left open: it is that of the cache.

    Raises:
        UnsupportedError, UnknownBackendError, InvalidInputError: as for `Attention`.

    Attributes:
        layer: the layer.
        shares_prefix: it reads a shared prefix once.
        has_graphs: it was made for CUDA graphs.
    """

    def __init__(
        self,
        *,
        layer_class: type[Attention] = Attention,
        try_shared_prefix: bool = False,
        try_cuda_graph: bool = False,
        **arguments: Any,
    ) -> None:
        self._arguments, self._layer_class = {"block_size": None, **arguments}, layer_class
        self.layer = layer_class(**self._arguments)
        for name, is_tried in (
            ("shared_prefix", try_shared_prefix),
            ("cuda_graph", try_cuda_graph),
        ):
            with contextlib.suppress(UnsupportedError):
                if is_tried:
                    self.layer = layer_class(**{**self._arguments, name: True})
                    self._arguments[name] = True
        self.shares_prefix = "shared_prefix" in self._arguments
        self.has_graphs = "cuda_graph" in self._arguments
        self._quantized: Attention | None = None
        self._given: object = None
        self._scales = (1.0, 1.0)

    def quantizes_output(self) -> bool:
        """Whether a backend writes the output as fp8 by a static scale, for `output_scale`."""
        if self._quantized is None:
            arguments = {**self._arguments, "prefix": f"{self.layer.prefix}, fp8 output"}
            try:
                self._quantized = self._layer_class(**arguments, output_quant="fp8_e4m3")
            except UnsupportedError:
                return False
        return True

    def is_bound_to(self, given: object) -> bool:
        """Whether the cache was made of this object of the engine's."""
        return self._given is given

    def bind(self, kv_cache: KVCache, given: object, name: str) -> None:
        """Use a cache from now on. Backends are picked again, for its strides and block size.

        Args:
            kv_cache: the cache, a view of the engine's memory.
            given: the engine's own object for it, see `is_bound_to`.
            name: the layer's name in the engine.

        Raises:
            InvalidInputError, UnsupportedError: as for `bind_kv_caches`.
        """
        for layer in self.layers:
            layer.prefix = name if layer is self.layer else f"{name}, fp8 output"
            source = layer.kv_sharing_target_layer_name or layer.prefix
            bind_kv_caches([layer], {source: kv_cache})
            if is_fp8(kv_cache.dtype):
                layer.set_kv_scales(*self._scales)
        self._given = given

    @property
    def layers(self) -> list[Attention]:
        """The layer, and the second one with fp8 output if there is one."""
        return [self.layer, *([] if self._quantized is None else [self._quantized])]

    def set_scales(self, k_scale: float, v_scale: float) -> None:
        """Set the scales of an fp8 cache; nothing is done if they are the same as before."""
        if (k_scale, v_scale) == self._scales:
            return
        self._scales = (k_scale, v_scale)
        for layer in self.layers:
            if layer.kv_cache is not None and is_fp8(layer.kv_cache.dtype):
                layer.set_kv_scales(k_scale, v_scale)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        context: ForwardContext,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Write the new keys and values, and attend: see `Attention.forward`.

        Args:
            query: (num_tokens, num_heads, head_size).
            key: (num_tokens, num_kv_heads, head_size); None if the cache has all.
            value: the same of values.
            context: of the step. Layers with equal specs share what is planned in it.
            output: (num_tokens, num_heads, head_size), written.
            output_scale: () float32, for an output of fp8.

        Raises:
            InvalidInputError: an argument does not fit; nothing has been written then.
        """
        layer = self.layer
        if output_scale is not None:
            if not self.quantizes_output() or self._quantized is None:
                raise InvalidInputError(
                    f"output_scale was given to layer {layer.prefix!r}, and no backend quantizes "
                    "its output. Ask quantizes_output first."
                )
            if self._quantized.kv_cache is None and layer.kv_cache is not None:
                self.bind(layer.kv_cache, self._given, layer.prefix)
            layer = self._quantized
        with forward_context(context):
            layer(query, key, value, output=output, output_scale=output_scale)

    def warm_up(self, step: GraphStep) -> None:
        """Run a step before its capture, so that its kernels are compiled. No slot is written."""
        spec, rows = self.layer.spec, step.limits.num_tokens
        device = step.batch_for(self.layer.prefix).seq_lens.device  # type: ignore[union-attr]
        make = functools.partial(torch.zeros, dtype=spec.dtype, device=device)
        if spec.mla is None:
            query = make(rows, spec.num_heads, spec.head_size)
            key = make(rows, spec.num_kv_heads, spec.head_size)
            value = make(rows, spec.num_kv_heads, spec.head_size_v)
        else:
            mla = spec.mla
            query = make(rows, spec.num_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim)
            key, value = make(rows, mla.kv_lora_rank), make(rows, mla.qk_rope_head_dim)
        for layer in self.layers:
            scale = torch.ones((), device=device) if layer is self._quantized else None
            with forward_context(step):
                layer(query, key, value, output_scale=scale)


class DecodeSteps:
    """The captured decodes of an engine: a step for each number of requests, over one state.

    Args:
        layers: made for CUDA graphs, with their caches; see `graph_state`.
        max_num_seqs: the most requests of a graph.
        max_seq_len: the most keys of a request.
        batches: as for `graph_state`.

    Raises:
        InvalidInputError, UnsupportedError: as for `graph_state`.
    """

    def __init__(
        self,
        layers: Sequence[Attention],
        *,
        max_num_seqs: int,
        max_seq_len: int,
        batches: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self._state = graph_state(
            layers, max_num_seqs=max_num_seqs, max_seq_len=max_seq_len, batches=batches
        )
        with self._state.graph_capture():  # allocates
            self._steps: dict[int, GraphStep] = {}

    def __contains__(self, num_reqs: int) -> bool:
        return num_reqs in self._steps

    def capture(self, num_reqs: int) -> GraphStep:
        """The step to capture with this number of requests; each time the same one.

        Raises:
            UnsupportedError, InvalidInputError: as for graph_capture_get_metadata_for_batch.
        """
        if num_reqs not in self._steps:
            step = self._state.graph_capture_get_metadata_for_batch(num_reqs)
            self._steps[num_reqs] = step
        return self._steps[num_reqs]

    def prepare(self, num_reqs: int, batch: StepBatch) -> GraphStep:
        """Copy a step, of this number of requests or fewer, to where its graph reads it.

        Raises:
            InvalidInputError: the batch does not fit; nothing has been copied then.
        """
        self._state.prepare_graph_input_buffers(self._steps[num_reqs], batch)
        return self._steps[num_reqs]
