"""The peers: other packages' attention over the same tensors, each in a small class.

A peer is imported only when it is used. It gives a reason for a case that it does not compute, and
its exceptions are shown in its row. Its numbers are compared with the oracle like any other.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.implementations import Call
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.peers.base import (
    Peer,
    PeerMissing,
    arguments_of,
    call_of,
    first_of,
    refusal_of,
    window_of,
)
from attn_dispatch.bench.peers.flash_attention import (
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
)
from attn_dispatch.bench.peers.flashinfer import FlashInfer
from attn_dispatch.bench.peers.mla import MLA_PEERS
from attn_dispatch.interface.kv_view import keys_and_values

__all__ = ["PEERS", "Peer", "PeerMissing", "TorchVarlen", "VllmTriton"]

#: The arguments of vLLM's engine for splitting long requests: segments, and the number of programs
#: that are not split.
_VLLM_SEGMENTS, _VLLM_PROGRAMS = 16, 128


class VllmTriton(Peer):
    """vLLM's unified Triton kernel, with the buffers that its engine gives it."""

    name = "vLLM Triton"

    def load(self) -> None:
        """See Peer."""
        self._function = self._find(
            "vllm.v1.attention.ops.triton_unified_attention:unified_attention",
            "vllm.attention.ops.triton_unified_attention:unified_attention",
        )

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        if not case.has_kv_cache or not case.causal:
            return "it is for causal attention over a paged cache"
        computes = ["alibi", "sinks", "logits_soft_cap", "sliding_window"]
        if case.stored_dtype == torch.float8_e4m3fn:
            computes.append("a cache of eight bits")
        return refusal_of(case, *computes)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        case = inputs.case
        key, value = keys_and_values(inputs.kv_cache)
        padded = 1 << (case.head_size - 1).bit_length()
        segments = (case.num_tokens, case.num_heads, _VLLM_SEGMENTS)
        buffer: dict[str, Any] = {"dtype": torch.float32, "device": inputs.device}
        arguments: dict[str, Any] = {
            **arguments_of(inputs),
            "k": key,
            "v": value,
            "out": inputs.empty_output(),
            "seqused_k": inputs.seq_lens,
            "block_table": inputs.block_table,
            "q_descale": None,
            "k_descale": None,
            "v_descale": None,
            "alibi_slopes": inputs.slopes,
            "sinks": inputs.sinks,
        }
        if max(case.query_lens) == 1:
            arguments |= {
                "seq_threshold_3D": _VLLM_PROGRAMS // case.num_kv_heads,
                "num_par_softmax_segments": _VLLM_SEGMENTS,
                "softmax_segm_output": torch.empty(*segments, padded, **buffer),
                "softmax_segm_max": torch.empty(*segments, **buffer),
                "softmax_segm_expsum": torch.empty(*segments, **buffer),
            }
        if case.is_quantized:
            arguments["k_descale"] = inputs.layer._k_scale.reshape(1)
            arguments["v_descale"] = inputs.layer._v_scale.reshape(1)
            if "kv_quant_mode" in inspect.signature(self._function).parameters:
                modes = importlib.import_module("vllm.v1.kv_cache_interface").KVQuantMode
                arguments["kv_quant_mode"] = modes.FP8_PER_TENSOR
        return call_of(self._function, arguments)


class TorchVarlen(Peer):
    """torch.nn.attention.varlen; before torch 2.13 it has no paged cache and no shared heads."""

    name = "PyTorch varlen"

    def load(self) -> None:
        """See Peer."""
        self._function = self._find("torch.nn.attention.varlen:varlen_attn")
        self._known = inspect.signature(self._function).parameters

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        computes = ["no causality over a cache"]
        if "window_size" in self._known:
            computes.append("sliding_window")
        if case.num_heads != case.num_kv_heads and "enable_gqa" not in self._known:
            return f"that of torch {self.version} has no shared KV heads"
        if case.has_kv_cache and case.has_past and "block_table" not in self._known:
            return f"that of torch {self.version} has no paged cache"
        return refusal_of(case, *computes)

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        ragged = case.has_kv_cache and "block_table" not in self._known
        return ("contiguous keys",) if ragged else ("",)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        case, function = inputs.case, self._function
        options: dict[str, Any] = {"scale": case.scale}
        if "window_size" in self._known:
            left, right = window_of(case)
            options["window_size"] = (left, 0 if case.causal else right)
        else:
            options["is_causal"] = case.causal
        if case.num_heads != case.num_kv_heads:
            options["enable_gqa"] = True
        key_starts: torch.Tensor | None = None
        if inputs.kv_cache is not None and "block_table" in self._known:
            key, value = keys_and_values(inputs.kv_cache)
            options |= {"seqused_k": inputs.seq_lens, "block_table": inputs.block_table}
        else:
            key, value = inputs.ragged_keys_and_values()
            key_starts = inputs.key_start_loc()
        longest = (max(case.query_lens), max(case.seq_lens))
        starts = (inputs.query_start_loc, key_starts)
        return lambda: first_of(function(inputs.query, key, value, *starts, *longest, **options))


#: In the order of the list.
PEERS: tuple[type[Peer], ...] = (
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
    FlashInfer,
    VllmTriton,
    TorchVarlen,
    *MLA_PEERS,
)
