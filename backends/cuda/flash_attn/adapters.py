"""Adapters from our call description to each FlashAttention package's API.

Each `bind_*` takes what all layers of a batch share and returns the function that computes one
layer. A layer's call is then the package's function with the layer's tensors and nothing more.
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

#: The functions of an imported provider by name; None for one that the release does not have.
Functions = Mapping[str, Any]
#: Translates what the layers of a batch share into a package's arguments, once for all of them.
Binder = Callable[[Functions, VarlenArgs], Attend]


def bind_flash_attn_2(functions: Functions, args: VarlenArgs) -> Attend:
    """flash_attn: decodes of one token use the function that splits long requests."""
    common = {
        "causal": args.causal,
        "window_size": args.window,
        "softcap": args.soft_cap,
        "block_table": args.block_table,
    }
    if args.is_decode and args.block_table is not None:
        decode = functions["flash_attn_with_kvcache"]
        arguments = {"cache_seqlens": args.seq_lens, "return_softmax_lse": True, **common}

        def attend(given: Operands) -> Result:
            output, lse = decode(
                given.query[:, None],
                given.keys,
                given.values,
                softmax_scale=given.scale,
                alibi_slopes=given.slopes,
                **arguments,
            )
            return output[:, 0], _without_inf(lse[..., 0].T) if args.returns_lse else None

        return attend

    varlen = functions["flash_attn_varlen_func"]
    lengths = (args.query_start_loc, args.key_start_loc, *_max_lens_2(args))

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
        return output, _without_inf(lse) if args.returns_lse else None

    return attend_ragged


def _max_lens_2(args: VarlenArgs) -> tuple[int, int]:
    """The largest query and key lengths for FlashAttention 2.

    With a maximum of one query it assumes that every request has a token. It treats a window longer
    than the maximum of keys as none, which is wrong for a query before the first key.
    """
    queries = args.max_query_len if args.is_decode else max(2, args.max_query_len)
    return queries, max(args.max_seq_len, args.max_query_len)


def _without_inf(lse: torch.Tensor) -> torch.Tensor:
    """FlashAttention 2 returns +inf for a row without keys."""
    return lse.masked_fill(lse.isposinf(), float("-inf"))


def bind_flash_attn_3(functions: Functions, args: VarlenArgs) -> Attend:
    """flash_attn_interface and sgl_kernel: rows are a cache without pages."""
    function = functions["flash_attn_with_kvcache"]
    arguments: dict[str, Any] = {
        "cache_seqlens": args.seq_lens,
        "page_table": args.block_table,
        "cu_seqlens_q": args.query_start_loc,
        "max_seqlen_q": args.max_query_len,
        "causal": args.causal,
        "window_size": args.window,
        "softcap": args.soft_cap,
        "return_softmax_lse": True,
    }
    if args.schedule is not None:
        arguments["scheduler_metadata"] = args.schedule

    def attend(given: Operands) -> Result:
        output, lse, *_ = function(
            given.query, given.keys, given.values, softmax_scale=given.scale, **arguments
        )
        return output, lse

    return attend


def _on_tensor_device(attend: Attend) -> Attend:
    """FlashAttention 4 launches on the current device; the others use their tensors' device."""

    def run(given: Operands) -> Result:
        with torch.cuda.device_of(given.query):
            return attend(given)

    return run


def bind_flash_attn_4(functions: Functions, args: VarlenArgs) -> Attend:
    """flash_attn.cute: None is an unlimited side of the window; num_splits=0 lets it choose."""
    function = functions["flash_attn_varlen_func"]
    left, right = (None if side < 0 else side for side in args.window)
    arguments: dict[str, Any] = {
        "cu_seqlens_q": args.query_start_loc,
        "seqused_k": args.seq_lens,
        "max_seqlen_q": args.max_query_len,
        "max_seqlen_k": args.max_seq_len,
        "page_table": args.block_table,
        "causal": args.causal,
        "window_size": (left, right),
        "softcap": args.soft_cap,
        "num_splits": 0,
        "return_lse": args.returns_lse,
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

    return _on_tensor_device(attend)


def bind_vllm(version: int) -> Binder:
    """vLLM's build, which has all generations behind one function."""

    def bind(functions: Functions, args: VarlenArgs) -> Attend:
        function = functions["flash_attn_varlen_func"]
        max_lens = (args.max_query_len, args.max_seq_len) if version > 2 else _max_lens_2(args)
        has_starts = version == 2 and args.block_table is None
        arguments: dict[str, Any] = {
            "max_seqlen_q": max_lens[0],
            "cu_seqlens_q": args.query_start_loc,
            "max_seqlen_k": max_lens[1],
            "cu_seqlens_k": args.key_start_loc if has_starts else None,
            "seqused_k": None if has_starts else args.seq_lens,
            "causal": args.causal,
            "window_size": list(args.window),
            "softcap": args.soft_cap,
            "block_table": args.block_table,
            "return_softmax_lse": args.returns_lse,
            "scheduler_metadata": args.schedule,
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
            if not args.returns_lse:
                return result, None
            output, lse = result
            return output, _without_inf(lse) if version == 2 else lse

        return _on_tensor_device(attend) if version == 4 else attend

    return bind
