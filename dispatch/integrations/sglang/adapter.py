"""SGLangAdapter: SGLang's AttentionBackend, computed by layers of this library."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.integrations.sglang.layers import (
    attention_of,
    cache_of,
    check_runner,
    radix_layers,
)
from attn_dispatch.integrations.sglang.steps import batch_of_step, check_step
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.kv_view import KVCacheView
from attn_dispatch.platforms.device_errors import is_capturing
from attn_dispatch.runtime.context import ForwardContext, forward_context
from attn_dispatch.runtime.engine_attention import DecodeSteps
from attn_dispatch.runtime.kv_binding import bind_kv_caches
from attn_dispatch.runtime.layer import Attention

__all__ = ["SGLangAdapter"]


class SGLangAdapter:
    """SGLang's attention through attn-dispatch: the methods of AttentionBackend.

    The layers of the model are made, and their backends picked, when this is made. Keys and values
    are written and read in SGLang's own pool. Sequence lengths come from the host copies that
    SGLang keeps, so a step does not wait for the device.

    Args:
        runner: SGLang's ModelRunner, with its model and its caches.
        engine: what is imported from SGLang.

    Raises:
        UnsupportedError: see `check_runner` and `attention_of`.
    """

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any, engine: Any) -> None:
        super().__init__()
        check_runner(runner, engine)
        self._runner = runner
        self._found = list(radix_layers(runner.model, engine))
        if not self._found:
            raise UnsupportedError("attn-dispatch found no RadixAttention in SGLang's model.")
        # Layers in a pool of their own have slots of their own.
        mapping = getattr(runner.token_to_kv_pool, "layers_mapping", {})
        self._in_window_pool = {
            name for name, layer, _ in self._found if mapping.get(layer.layer_id, (0, False))[1]
        }
        self._graphs: DecodeSteps | None = None
        self.forward_metadata: ForwardContext | None = None
        self._make_layers(cuda_graph=False)

    def _make_layers(self, *, cuda_graph: bool) -> None:
        self._layers: dict[Any, Attention] = {}
        self._sinks = {layer: sinks for _, layer, sinks in self._found}
        self._scales = {
            layer: (layer.k_scale_float, layer.v_scale_float) for _, layer, _ in self._found
        }
        for name, layer, sinks in self._found:
            attention = attention_of(name, layer, self._runner, sinks=sinks, cuda_graph=cuda_graph)
            if attention.spec.block_size is not None:
                bind_kv_caches([attention], {name: cache_of(layer, self._runner)})
            self._layers[layer] = attention

    def attention_layers(self) -> dict[str, Attention]:
        """The layers of this library by their names in the model; see `Attention.selections`."""
        return {layer.prefix: layer for layer in self._layers.values()}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a step that runs eagerly.

        Raises:
            UnsupportedError: see `check_step`.
        """
        if forward_batch.forward_mode.is_idle():
            self.forward_metadata = None
            return
        check_step(forward_batch)
        with forward_context(self._batches(forward_batch, forward_batch.batch_size)) as context:
            self.forward_metadata = context

    def _batches(
        self, forward_batch: Any, num_reqs: int
    ) -> AttentionBatch | dict[str, AttentionBatch]:
        """The step's batch, or one for each layer where layers have two pools."""
        runner = self._runner
        step = (forward_batch, num_reqs, runner.req_to_token_pool.req_to_token, runner.page_size)
        batch = batch_of_step(*step)
        if not self._in_window_pool:
            return batch
        other = batch_of_step(*step, runner.token_to_kv_pool.translate_loc_from_full_to_swa)
        names = self.attention_layers()
        return {name: other if name in self._in_window_pool else batch for name in names}

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write the new keys and values to the pool, then attend.

        Args:
            q: (num_tokens, num_heads * head_size), or with the last dimension in two.
            k: (num_tokens, num_kv_heads, head_size); None if the pool has all keys.
            v: (num_tokens, num_kv_heads, head_size_v); None with k.
            layer: the RadixAttention.
            forward_batch: the step that `init_forward_metadata` planned.
            save_kv_cache: False if the pool has k and v already.
            **kwargs: sinks; any other argument that is not None or False is rejected.

        Returns:
            (num_tokens, num_heads * head_size_v).

        Raises:
            UnsupportedError: an argument is not supported.
            InvalidInputError: the layer is none of the model's, or no step was planned.
        """
        attention = self._layers.get(layer)
        if attention is None or self.forward_metadata is None:
            what = "no step was planned for it" if attention else "it is none of the model's"
            raise InvalidInputError(
                f"SGLang called the layer with layer_id={layer.layer_id}, and {what}."
            )
        self._check_arguments(layer, attention, kwargs, forward_batch)
        if attention.spec.block_size is not None:
            self._follow_pool(layer, attention)
            if not save_kv_cache:
                k = v = None
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if k is not None and v is not None:
            k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
            v = v.view(-1, layer.tp_k_head_num, layer.v_head_dim)
        with forward_context(self.forward_metadata):
            output: torch.Tensor = attention(q, k, v)
        return output.flatten(1)

    forward_decode = forward_extend

    def _check_arguments(
        self, layer: Any, attention: Attention, given: dict[str, Any], forward_batch: Any
    ) -> None:
        """Reject what would be ignored: other arguments, and sinks and scales that changed."""
        sinks, known = given.pop("sinks", None), self._sinks[layer]
        names = [name for name, value in given.items() if value is not None and value is not False]
        names += ["mha_return_lse"] * bool(getattr(forward_batch, "mha_return_lse", False))
        has_same_sinks = (sinks is None) == (known is None)
        if sinks is not None and known is not None:
            has_same_sinks = sinks.data_ptr() == known.data_ptr()
        if not has_same_sinks:
            names.append("sinks that are no attribute of its module")
        if self._scales[layer] != (layer.k_scale_float, layer.v_scale_float):
            names.append("scales of the KV cache that change while the server runs")
        if names:
            raise UnsupportedError(
                f"SGLang called its layer {attention.prefix!r} with what attn-dispatch does not "
                f"support: {', '.join(names)}. Use another --attention-backend."
            )

    def _follow_pool(self, layer: Any, attention: Attention) -> None:
        """Bind the layer again if the pool has other tensors; graphs are made after that."""
        key, value = self._runner.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        bound = attention.kv_cache
        assert isinstance(bound, KVCacheView)
        if (key.data_ptr(), value.data_ptr()) != (bound.key.data_ptr(), bound.value.data_ptr()):
            bind_kv_caches([attention], {attention.prefix: cache_of(layer, self._runner)})

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the layers for CUDA graphs, and the buffers of decode graphs.

        Args:
            max_bs: the most requests of a graph.
            max_num_tokens: the most new tokens of a graph; as many, one for each request.

        Raises:
            UnsupportedError: no backend for one of the layers supports CUDA graphs, or a request
                of a graph has more than one new token.
        """
        if max_num_tokens != max_bs:
            raise UnsupportedError(
                f"SGLang asks for graphs of {max_bs} requests and {max_num_tokens} new tokens; "
                "attn-dispatch captures decodes of one new token. Use --disable-decode-cuda-graph."
            )
        self._make_layers(cuda_graph=True)
        named = {n: each for n, each in self.attention_layers().items() if each.spec.block_size}
        window = [name for name in named if name in self._in_window_pool]
        groups = [[name for name in named if name not in window], window]
        self._graphs = DecodeSteps(
            list(named.values()),
            max_num_seqs=max_bs,
            max_seq_len=self._runner.req_to_token_pool.req_to_token.shape[1],
            batches=[each for each in groups if each],
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare the capture of a decode graph, or copy a step to where its graph reads it.

        Raises:
            UnsupportedError: the graph is not of a decode, or this call is itself captured; or see
                `check_step`.
        """
        if not forward_batch.forward_mode.is_decode():
            raise UnsupportedError(
                "attn-dispatch captures decodes, and this graph is for steps of the kind "
                f"{forward_batch.forward_mode.name}. Use --cuda-graph-backend-prefill=breakable or "
                "disabled."
            )
        if is_capturing():  # SGLang then prepares steps without a graph
            raise UnsupportedError(
                "attn-dispatch prepares steps on the host, which a graph would replay with the "
                "values of its capture. Set SGLANG_ENABLE_METADATA_GLUE_GRAPH=0."
            )
        if self._graphs is None:
            raise InvalidInputError("init_cuda_graph_state was not called before a capture.")
        check_step(forward_batch)
        size = forward_batch.batch_size
        if in_capture:
            self.forward_metadata = self._graphs.capture(size)
        else:
            step = self._batches(forward_batch, size - forward_batch.num_padding)
            self.forward_metadata = self._graphs.prepare(size, step)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """What SGLang writes as the length of requests that pad a batch."""
        return 1
