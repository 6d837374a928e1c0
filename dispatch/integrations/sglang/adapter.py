"""SGLang's AttentionBackend, computed by layers of this library. It imports SGLang."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch import engines
from attn_dispatch.integrations.sglang import requests
from attn_dispatch.integrations.sglang.names import AttentionBackend
from attn_dispatch.integrations.sglang.plugin import PLUGIN

__all__ = ["AttnDispatchBackend"]


class AttnDispatchBackend(AttentionBackend):
    """SGLang's attention through attn-dispatch: the methods of AttentionBackend.

    The layers of the model are made, and their backends picked, when this is made. Keys and values
    are written and read in SGLang's own pool. Sequence lengths come from the host copies that
    SGLang keeps, so a step does not wait for the device.

    Args:
        runner: SGLang's ModelRunner, with its model and its caches.

    Raises:
        UnsupportedError: see `check_runner` and `attention_of`.
    """

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any) -> None:
        super().__init__()
        requests.check_runner(runner)
        self._runner = runner
        self._layers = {
            layer: requests.attention_of(name, layer, runner, sinks)
            for name, layer, sinks in requests.radix_layers(runner.model)
        }
        PLUGIN.reject({"no RadixAttention": not self._layers}, "this model")
        self._graphs: engines.DecodeSteps | None = None
        self.forward_metadata: engines.ForwardContext | None = None

    def attention_layers(self) -> dict[str, engines.Attention]:
        """The layers of this library by their names in the model; see `Attention.selections`."""
        return {each.layer.prefix: each.layer for each in self._layers.values()}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a step that runs eagerly.

        Raises:
            UnsupportedError: see `check_step`.
        """
        self.forward_metadata = None
        if not forward_batch.forward_mode.is_idle():
            batches = self._batches(forward_batch, forward_batch.batch_size)
            self.forward_metadata = engines.ForwardContext(batches)

    def _batches(self, forward_batch: Any, num_reqs: int) -> dict[str, engines.AttentionBatch]:
        """The batch of each layer; layers in the same pool share one."""
        requests.check_step(forward_batch)
        return engines.batches_by_layer(
            self._layers.values(),
            lambda group: requests.batch_of(forward_batch, num_reqs, self._runner, group),
        )

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
            raise engines.InvalidInputError(f"SGLang called layer {layer.layer_id}, and {what}.")
        has_same_sinks = attention.has_sinks(kwargs.pop("sinks", None))
        kwargs["sinks that are no attribute of its module"] = not has_same_sinks
        kwargs["mha_return_lse"] = getattr(forward_batch, "mha_return_lse", False)
        PLUGIN.reject(kwargs, f"a call of layer {attention.layer.prefix!r}")
        requests.follow_pool(attention, layer, self._runner)
        if attention.has_kv_cache and not save_kv_cache:
            k = v = None
        return attention.forward(q.flatten(1), k, v, self.forward_metadata)

    forward_decode = forward_extend

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the layers for CUDA graphs, and the buffers of decode graphs.

        Args:
            max_bs: the most requests of a graph.
            max_num_tokens: the most new tokens of a graph; as many, one for each request.

        Raises:
            UnsupportedError: no backend for one of the layers supports CUDA graphs, or a request
                of a graph has more than one new token.
        """
        asked = {f"{max_num_tokens} new tokens of {max_bs} requests": max_num_tokens != max_bs}
        PLUGIN.reject(asked, "decode graphs", "Use --disable-decode-cuda-graph.")
        self._graphs = engines.DecodeSteps(
            list(self._layers.values()),
            max_num_seqs=max_bs,
            max_seq_len=self._runner.req_to_token_pool.req_to_token.shape[1],
        )
        self._graphs.allocate()

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare the capture of a decode graph, or copy a step to where its graph reads it.

        Raises:
            UnsupportedError: the graph is not of a decode; or this call is itself captured, after
                which SGLang prepares steps without a graph; or see `check_step`.
            InvalidInputError: `init_cuda_graph_state` was not called.
        """
        mode, size = forward_batch.forward_mode, forward_batch.batch_size
        asked = {
            f"steps of the kind {mode.name}": not mode.is_decode(),
            # They would be replayed with the values of the capture.
            "steps that are prepared in a graph": engines.is_capturing(),
        }
        advice = "Set --cuda-graph-backend-prefill=breakable, SGLANG_ENABLE_METADATA_GLUE_GRAPH=0."
        PLUGIN.reject(asked, "a graph", advice)
        if self._graphs is None:
            raise engines.InvalidInputError("init_cuda_graph_state was not called before.")
        if in_capture:
            requests.check_step(forward_batch)
            self.forward_metadata = self._graphs.capture(size)
        else:
            batches = self._batches(forward_batch, size - forward_batch.num_padding)
            self.forward_metadata = self._graphs.prepare(size, batches)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """What SGLang writes as the length of requests that pad a batch."""
        return 1
