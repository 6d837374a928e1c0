"""FlashAttention 2, 3 and 4 as peers: their own packages, or vLLM's build of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.implementations import Call
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.peers.base import (
    Peer,
    PeerMissing,
    arguments_of,
    call_of,
    only_known,
    refusal_of,
)
from attn_dispatch.interface.kv_view import keys_and_values

__all__ = ["FlashAttention2", "FlashAttention3", "FlashAttention4"]

#: Variants of a prefill without a past: the keys in their pages, or those that the call brings.
_PAGES, _NEW_KEYS = "pages", "new keys"


def _rows(inputs: Inputs) -> dict[str, Any]:
    """The keys that the call brings, one request after another."""
    return {"k": inputs.key, "v": inputs.value, "cu_seqlens_k": inputs.key_start_loc()}


def _pages(inputs: Inputs, table: str) -> dict[str, Any]:
    """The keys in their pages; `table` is the function's name of the block table."""
    key, value = keys_and_values(inputs.kv_cache)
    return {"k": key, "v": value, "seqused_k": inputs.seq_lens, table: inputs.block_table}


class _FlashAttention(Peer):
    """A version of FlashAttention."""

    #: The version's own package, and its number in vLLM's build.
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
        arguments = arguments_of(inputs)
        arguments |= _pages(inputs, "block_table") if paged else _rows(inputs)
        arguments |= {
            "window_size": list(arguments["window_size"]),
            "alibi_slopes": inputs.slopes,
            "s_aux": None if inputs.sinks is None else inputs.sinks.bfloat16(),
            "out": inputs.empty_output(),
            "fa_version": self.vllm_version,
        }
        return call_of(self._function, arguments)


class FlashAttention2(_FlashAttention):
    """flash_attn, or vLLM's build of it; ragged keys if the cache's blocks are too small for it."""

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
        """Whether keys must be read from pages. Without a past contiguous keys are no easier."""
        return case.has_kv_cache and (case.has_past or case.block_size % 256 == 0)

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        ragged = case.has_kv_cache and not self._is_vllm and not self._needs_pages(case)
        return (_NEW_KEYS,) if ragged else super().variants(case)

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        paged = paged and self._needs_pages(inputs.case)
        key, value = keys_and_values(inputs.kv_cache) if paged else inputs.ragged_keys_and_values()
        arguments = {
            **arguments_of(inputs),
            "k": key,
            "v": value,
            "cu_seqlens_k": inputs.key_start_loc(),
            "alibi_slopes": inputs.slopes,
            "block_table": inputs.block_table if paged else None,
        }
        return call_of(self._function, arguments)


class FlashAttention3(_FlashAttention):
    """flash_attn_interface, or vLLM's build of it, which also has sinks."""

    name = "FlashAttention 3"
    own = "flash_attn_interface:flash_attn_varlen_func"
    vllm_version = 3

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        if self._is_vllm and case.sinks and case.dtype == "bfloat16":
            return refusal_of(case, *self.computes, "sinks")
        return super().supports(case)

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        arguments = arguments_of(inputs)
        if not paged:
            return call_of(self._function, arguments | _rows(inputs))
        key, value = keys_and_values(inputs.kv_cache)
        del arguments["max_seqlen_k"]
        arguments |= {
            "k_cache": key,
            "v_cache": value,
            "cache_seqlens": inputs.seq_lens,
            "page_table": inputs.block_table,
        }
        return call_of(importlib.import_module(self.provider).flash_attn_with_kvcache, arguments)


class FlashAttention4(_FlashAttention):
    """flash_attn.cute, or vLLM's copy of it."""

    name = "FlashAttention 4"
    own = "flash_attn.cute:flash_attn_varlen_func"
    vllm_version = 4
    computes = (*_FlashAttention.computes, "sinks")

    def load(self) -> None:
        """See Peer."""
        super().load()
        if self._is_vllm:  # it imports its kernels when they are called
            self._find("vllm.vllm_flash_attn.cute.interface:_flash_attn_fwd")
            self.provider = "vllm.vllm_flash_attn"

    def _prepare_own(self, inputs: Inputs, paged: bool) -> Call:
        arguments = arguments_of(inputs)
        lengths = {name: arguments.pop(name) for name in ("max_seqlen_q", "max_seqlen_k")}
        if inputs.case.sliding_window is None:
            del arguments["window_size"]
        if inputs.sinks is not None:
            arguments["learnable_sink"] = inputs.sinks.bfloat16()
        arguments |= _pages(inputs, "page_table") if paged else _rows(inputs)
        return call_of(self._function, arguments | only_known(self._function, lengths))
