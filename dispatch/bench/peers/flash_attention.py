"""FlashAttention 2, 3 and 4 as peers: their own packages, or vLLM's build of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.peers.base import (
    Call,
    Peer,
    PeerMissing,
    first_of,
    lengths_of,
    only_known,
    refusal_of,
    window_of,
)

__all__ = ["FlashAttention2", "FlashAttention3", "FlashAttention4"]

#: Variants of a prefill without a past: keys are read from their pages, or as they came.
_PAGES, _NEW_KEYS = "pages", "new keys"


def _rows(inputs: Inputs) -> dict[str, Any]:
    """The keys as they came, one request after another."""
    return {"k": inputs.key, "v": inputs.value, "cu_seqlens_k": inputs.key_start_loc()}


def _pages(inputs: Inputs, table: str) -> dict[str, Any]:
    """The keys in their pages; `table` is what the function calls the block table."""
    assert inputs.kv_cache is not None
    key, value = inputs.kv_cache.unbind(1)
    return {"k": key, "v": value, "seqused_k": inputs.seq_lens, table: inputs.block_table}


class _FlashAttention(Peer):
    """What the versions of FlashAttention share."""

    #: Where the version is found: its own package, and vLLM's build of it.
    own: str
    vllm_version: int
    computes: tuple[str, ...] = ("logits_soft_cap", "sliding_window", "no causality over a cache")

    def load(self) -> None:
        """See Peer."""
        self._function = self._find(self.own, "vllm.vllm_flash_attn:flash_attn_varlen_func")
        if self._is_vllm:
            reason = getattr(
                importlib.import_module(self.provider), "fa_version_unsupported_reason", None
            )
            problem = None if reason is None else reason(self.vllm_version)
            if problem:
                own = self.own.partition(":")[0]
                raise PeerMissing(f"{own} is not installed; {self.provider}: {problem}")

    @property
    def _is_vllm(self) -> bool:
        return self.provider == "vllm.vllm_flash_attn"

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        refusal = refusal_of(case, *self.computes)
        if refusal is None and case.alibi is True and not case.causal:
            return "its ALiBi falls with the distance on either side"
        if refusal is None and case.sinks and case.dtype != "bfloat16":
            return "its sinks are bfloat16"
        return refusal

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        return (_PAGES, _NEW_KEYS) if case.brings_keys and not case.has_past else ("",)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        paged = inputs.kv_cache is not None and variant != _NEW_KEYS
        return (self._prepare_vllm if self._is_vllm else self._prepare_own)(inputs, paged)

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        raise NotImplementedError

    def _prepare_vllm(self, inputs: Inputs, paged: bool) -> Call:
        case, output = inputs.case, inputs.empty_output()
        arguments = {
            "q": inputs.query,
            **lengths_of(inputs),
            "softmax_scale": case.scale,
            "causal": case.causal,
            "window_size": list(window_of(case)),
            "softcap": case.logits_soft_cap or 0.0,
            "alibi_slopes": inputs.slopes,
            "s_aux": None if inputs.sinks is None else inputs.sinks.bfloat16(),
            "out": output,
            "fa_version": self.vllm_version,
        }
        arguments |= _pages(inputs, "block_table") if paged else _rows(inputs)
        function = self._function
        return lambda: first_of(function(**arguments))


class FlashAttention2(_FlashAttention):
    """flash_attn, or vLLM's build of it; ragged where the cache's blocks are too small for it."""

    name = "FlashAttention 2"
    own = "flash_attn:flash_attn_varlen_func"
    vllm_version = 2
    computes = (*_FlashAttention.computes, "alibi", "symmetric alibi")

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        refusal = super().supports(case)
        if refusal or self._is_vllm or not self._needs_pages(case):
            return refusal
        if case.block_size % 256:
            return f"its paged cache takes blocks of 256 tokens, and these have {case.block_size}"
        return None

    @staticmethod
    def _needs_pages(case: Case) -> bool:
        """Whether contiguous keys would be another task; they are given where there is no past."""
        return case.has_kv_cache and (case.has_past or case.block_size % 256 == 0)

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        ragged = case.has_kv_cache and not self._is_vllm and not self._needs_pages(case)
        return (_NEW_KEYS,) if ragged else super().variants(case)

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        case, function = inputs.case, self._function
        paged = paged and self._needs_pages(case)
        if paged:
            assert inputs.kv_cache is not None
            key, value = inputs.kv_cache.unbind(1)
        else:
            key, value = inputs.ragged_keys_and_values()
        arguments = {
            "q": inputs.query,
            "k": key,
            "v": value,
            **lengths_of(inputs),
            "cu_seqlens_k": inputs.key_start_loc(),
            "softmax_scale": case.scale,
            "causal": case.causal,
            "window_size": window_of(case),
            "softcap": case.logits_soft_cap or 0.0,
            "alibi_slopes": inputs.slopes,
            "block_table": inputs.block_table if paged else None,
        }
        return lambda: first_of(function(**arguments))


class FlashAttention3(_FlashAttention):
    """flash_attn_interface, or vLLM's build of it, which has sinks too."""

    name = "FlashAttention 3"
    own = "flash_attn_interface:flash_attn_varlen_func"
    vllm_version = 3

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        if self._is_vllm and case.sinks and case.dtype == "bfloat16":
            return refusal_of(case, *self.computes, "sinks")
        return super().supports(case)

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        case, function = inputs.case, self._function
        arguments = {
            "q": inputs.query,
            "softmax_scale": case.scale,
            "causal": case.causal,
            "window_size": window_of(case),
            "softcap": case.logits_soft_cap or 0.0,
        }
        if not paged:
            arguments |= {**_rows(inputs), **lengths_of(inputs)}
        else:
            function = importlib.import_module(self.provider).flash_attn_with_kvcache
            assert inputs.kv_cache is not None
            key, value = inputs.kv_cache.unbind(1)
            arguments |= {
                "k_cache": key,
                "v_cache": value,
                "cache_seqlens": inputs.seq_lens,
                "page_table": inputs.block_table,
                "cu_seqlens_q": inputs.query_start_loc,
                "max_seqlen_q": max(case.query_lens),
            }
        return lambda: first_of(function(**arguments))


class FlashAttention4(_FlashAttention):
    """flash_attn.cute, or vLLM's copy of it."""

    name = "FlashAttention 4"
    own = "flash_attn.cute:flash_attn_varlen_func"
    vllm_version = 4
    computes = (*_FlashAttention.computes, "sinks")

    def load(self) -> None:
        """See Peer."""
        super().load()
        if self._is_vllm:  # which imports its kernels no sooner than they are called
            self._find("vllm.vllm_flash_attn.cute.interface:_flash_attn_fwd")
            self.provider = "vllm.vllm_flash_attn"

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        case, function = inputs.case, self._function
        left, right = window_of(case)
        arguments = {
            "q": inputs.query,
            **lengths_of(inputs),
            "softmax_scale": case.scale,
            "causal": case.causal,
            "softcap": case.logits_soft_cap or 0.0,
        }
        if case.sliding_window is not None:
            arguments["window_size"] = (left, right)
        if inputs.sinks is not None:
            arguments["learnable_sink"] = inputs.sinks.bfloat16()
        arguments |= _pages(inputs, "page_table") if paged else _rows(inputs)
        spare = {name: arguments.pop(name) for name in ("max_seqlen_q", "max_seqlen_k")}
        arguments |= only_known(function, spare)
        return lambda: first_of(function(**arguments))
