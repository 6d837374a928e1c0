"""How each package that brings FlashAttention is told of work: its functions, in its own words.

Each `bind_*` is told of the work that all layers of a batch have in common, and makes what does it
for one layer. So a layer's call is the package's function and what the layer brings, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attn_dispatch.backends.cuda.flash_attn.calls import Attend, Operands, Result, VarlenArgs

__all__ = [
    "Binder",
    "Functions",
    "bind_flash_attn_2",
    "bind_flash_attn_3",
    "bind_flash_attn_4",
    "bind_vllm",
]

#: A provider's functions by name, once it is imported; None for one that it does not have.
Functions = Mapping[str, Any]
#: Puts what the layers of a batch have in common into a package's words, once for all of them.
Binder = Callable[[Functions, VarlenArgs], Attend]


def bind_flash_attn_2(functions: Functions, work: VarlenArgs) -> Attend:
    """flash_attn: one token a request goes to the function that splits long requests."""
    common = {
        "causal": work.causal,
        "window_size": work.window,
        "softcap": work.soft_cap,
        "block_table": work.block_table,
    }
    if work.is_decode and work.block_table is not None:
        decode = functions["flash_attn_with_kvcache"]
        arguments = {"cache_seqlens": work.seq_lens, "return_softmax_lse": True, **common}

        def attend(given: Operands) -> Result:
            output, lse = decode(
                given.query[:, None],
                given.keys,
                given.values,
                softmax_scale=given.scale,
                alibi_slopes=given.slopes,
                **arguments,
            )
            return output[:, 0], _without_inf(lse[..., 0].T) if work.returns_lse else None

        return attend

    varlen = functions["flash_attn_varlen_func"]
    lengths = (work.query_start_list, work.key_starts, *_longest_2(work))

    def attend_ragged(given: Operands) -> Result:
        output, lse, _ = varlen(
            given.query,
            given.keys,
            given.values,
            *lengths,
            softmax_scale=given.scale,
            alibi_slopes=given.slopes,
            return_attn_probs=True,
            **common,
        )
        return output, _without_inf(lse) if work.returns_lse else None

    return attend_ragged


def _longest_2(work: VarlenArgs) -> tuple[int, int]:
    """The most queries and keys of a request, as FlashAttention 2 is told of them.

    Told of one query, it counts on a token of every request. A window that is longer than the keys
    it takes for one without an end, which it is not for a query that stands before the first key.
    """
    queries = work.max_query_len if work.is_decode else max(2, work.max_query_len)
    return queries, max(work.max_seq_len, work.max_query_len)


def _without_inf(lse: torch.Tensor) -> torch.Tensor:
    """FlashAttention 2 gives a row without keys +inf."""
    return lse.masked_fill(lse.isposinf(), float("-inf"))


def bind_flash_attn_3(functions: Functions, work: VarlenArgs) -> Attend:
    """flash_attn_interface and sgl_kernel: rows are a cache without pages."""
    function = functions["flash_attn_with_kvcache"]
    arguments: dict[str, Any] = {
        "cache_seqlens": work.seq_lens,
        "page_table": work.block_table,
        "cu_seqlens_q": work.query_start_list,
        "max_seqlen_q": work.max_query_len,
        "causal": work.causal,
        "window_size": work.window,
        "softcap": work.soft_cap,
        "return_softmax_lse": True,
    }
    if work.schedule is not None:
        arguments["scheduler_metadata"] = work.schedule

    def attend(given: Operands) -> Result:
        output, lse, *_ = function(
            given.query, given.keys, given.values, softmax_scale=given.scale, **arguments
        )
        return output, lse

    return attend


def _on_its_device(attend: Attend) -> Attend:
    """FlashAttention 4 launches on the current device; the others look where their tensors are."""

    def run(given: Operands) -> Result:
        with torch.cuda.device_of(given.query):
            return attend(given)

    return run


def bind_flash_attn_4(functions: Functions, work: VarlenArgs) -> Attend:
    """flash_attn.cute: a side of the window that has no end is None; 0 splits as it sees fit."""
    function = functions["flash_attn_varlen_func"]
    left, right = (None if side < 0 else side for side in work.window)
    arguments: dict[str, Any] = {
        "cu_seqlens_q": work.query_start_list,
        "seqused_k": work.seq_lens,
        "max_seqlen_q": work.max_query_len,
        "max_seqlen_k": work.max_seq_len,
        "page_table": work.block_table,
        "causal": work.causal,
        "window_size": (left, right),
        "softcap": work.soft_cap,
        "num_splits": 0,
        "return_lse": work.returns_lse,
    }

    def attend(given: Operands) -> Result:
        output, lse, *_ = function(
            given.query,
            given.keys,
            given.values,
            softmax_scale=given.scale,
            learnable_sink=given.sinks,
            **arguments,
        )
        return output, lse

    return _on_its_device(attend)


def bind_vllm(version: int) -> Binder:
    """vLLM's build, which has them all behind one function."""

    def bind(functions: Functions, work: VarlenArgs) -> Attend:
        function = functions["flash_attn_varlen_func"]
        longest = (work.max_query_len, work.max_seq_len) if version > 2 else _longest_2(work)
        has_starts = version == 2 and work.block_table is None
        arguments: dict[str, Any] = {
            "max_seqlen_q": longest[0],
            "cu_seqlens_q": work.query_start_list,
            "max_seqlen_k": longest[1],
            "cu_seqlens_k": work.key_starts if has_starts else None,
            "seqused_k": None if has_starts else work.seq_lens,
            "causal": work.causal,
            "window_size": list(work.window),
            "softcap": work.soft_cap,
            "block_table": work.block_table,
            "return_softmax_lse": work.returns_lse,
            "scheduler_metadata": work.schedule,
            "fa_version": version,
        }

        def attend(given: Operands) -> Result:
            result = function(
                given.query,
                given.keys,
                given.values,
                out=given.out,
                softmax_scale=given.scale,
                alibi_slopes=given.slopes,
                s_aux=given.sinks,
                **arguments,
            )
            if not work.returns_lse:
                return result, None
            output, lse = result
            return output, _without_inf(lse) if version == 2 else lse

        return _on_its_device(attend) if version == 4 else attend

    return bind
