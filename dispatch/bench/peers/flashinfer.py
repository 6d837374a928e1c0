"""FlashInfer as a peer."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.implementations import Call
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.peers.base import Peer, first_of, refusal_of, window_of
from attn_dispatch.interface.kv_view import KVCacheView, keys_and_values

__all__ = ["FlashInfer"]

#: What FlashInfer's documentation recommends for the workspace, twice.
_WORKSPACE_BYTES = 256 << 20


class FlashInfer(Peer):
    """FlashInfer's wrappers. Planning is not timed: an engine does it once per batch."""

    name = "FlashInfer"

    def load(self) -> None:
        """See Peer."""
        self._find("flashinfer:BatchPrefillWithPagedKVCacheWrapper")
        self._module = importlib.import_module("flashinfer")
        self._workspace: torch.Tensor | None = None

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        computes = ["sliding_window", "logits_soft_cap", "sinks", "no causality over a cache"]
        if case.num_heads & (case.num_heads - 1) == 0:
            computes.append("alibi")  # it has the slopes of the paper, and no others
        if case.stored_dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            computes.append("a cache of eight bits")
        if not case.causal and case.sliding_window is not None:
            return "its window has no right side"
        if case.sinks and (
            not case.has_kv_cache or case.alibi or case.logits_soft_cap or case.is_quantized
        ):
            return "its sinks need paged keys and exclude other features"
        return refusal_of(case, *computes)

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        found = ["fa2"]
        if not (case.alibi or case.is_quantized):
            found.append("fa3")
        if case.has_kv_cache and max(case.query_lens) == 1 and not case.sinks:
            found.append("decode, tensor cores")
            if case.num_heads == case.num_kv_heads:
                found.append("decode")
        return found

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        if self._workspace is None or self._workspace.device != inputs.device:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)
        case, starts, output = inputs.case, inputs.query_start_loc, inputs.empty_output()
        options: dict[str, Any] = {"out": output}
        if inputs.kv_cache is None:
            wrapper = self._wrapper("BatchPrefillWithRaggedKVCacheWrapper", backend=variant)
            self._plan(wrapper, inputs, starts, inputs.key_start_loc(), causal=case.causal)
            return lambda: first_of(wrapper.run(inputs.query, inputs.key, inputs.value, **options))
        cache = inputs.kv_cache
        arguments: tuple[Any, ...] = (
            inputs.query,
            keys_and_values(cache) if isinstance(cache, KVCacheView) else cache,
        )
        if variant.startswith("decode"):
            name, with_tensor_cores = "BatchDecodeWithPagedKVCacheWrapper", "tensor" in variant
            wrapper = self._wrapper(name, use_tensor_cores=with_tensor_cores)
            self._plan(wrapper, inputs, *self._pages(inputs))
        else:
            if inputs.sinks is None:
                wrapper = self._wrapper("BatchPrefillWithPagedKVCacheWrapper", backend=variant)
            else:
                wrapper = self._wrapper_for_sinks(case, variant)
                arguments += (inputs.sinks, case.scale)
            self._plan(wrapper, inputs, starts, *self._pages(inputs), causal=case.causal)
        if case.is_quantized:
            options["k_scale"] = inputs.layer._k_scale_float
            options["v_scale"] = inputs.layer._v_scale_float
        return lambda: first_of(wrapper.run(*arguments, **options))

    def _wrapper(self, name: str, **options: Any) -> Any:
        return getattr(self._module, name)(self._workspace, "NHD", **options)

    def _wrapper_for_sinks(self, case: Case, variant: str) -> Any:
        return self._wrapper(
            "BatchAttentionWithAttentionSinkWrapper",
            backend=variant,
            q_data_type=case.torch_dtype,
            kv_data_type=case.stored_dtype,
            head_dim_qk=case.head_size,
            head_dim_vo=case.head_size,
            window_left=window_of(case)[0],
        )

    @staticmethod
    def _plan(wrapper: Any, inputs: Inputs, *places: torch.Tensor, **options: Any) -> None:
        """Plan a batch whose queries and keys are at these places."""
        case, cache = inputs.case, inputs.kv_cache
        sizes = [case.num_heads, case.num_kv_heads, case.head_size]
        if cache is not None:
            sizes.append(case.block_size)
        wrapper.plan(
            *places,
            *sizes,
            pos_encoding_mode="ALIBI" if case.alibi else "NONE",
            sm_scale=case.scale,
            window_left=window_of(case)[0],
            logits_soft_cap=case.logits_soft_cap,
            q_data_type=case.torch_dtype,
            kv_data_type=(inputs.query if cache is None else cache).dtype,
            **options,
        )

    @staticmethod
    def _pages(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where each request's pages start, the pages, and the tokens in each last one, int32."""
        case, table = inputs.case, inputs.block_table
        counts = [-(-n // case.block_size) for n in case.seq_lens]
        pages = torch.cat([table[request, :count] for request, count in enumerate(counts)])
        last = [(n - 1) % case.block_size + 1 for n in case.seq_lens]
        starts, lengths = (
            torch.tensor(numbers, dtype=torch.int32, device=inputs.device)
            for numbers in ([0, *itertools.accumulate(counts)], last)
        )
        return starts, pages, lengths
