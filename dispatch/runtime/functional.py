"""attention(): the layer as a function; and merge_states()."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_dispatch.arguments import checked_scale
from attn_dispatch.backends.triton.merge import merge_kernels
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.key_positions import KeyPositions
from attn_dispatch.interface.kv_view import (
    KVCache,
    KVCacheView,
    as_kv_cache,
    check_kv_cache,
    kv_strides_of,
)
from attn_dispatch.interface.quantization import (
    KVScales,
    has_token_scales,
    is_fp8,
    kv_cache_torch_dtype,
)
from attn_dispatch.interface.spec import KV_CACHE_DTYPES, AttentionSpec, alibi_of
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.interface.validation import check_tensors
from attn_dispatch.runtime.guard import make_impl
from attn_dispatch.runtime.recovery import raise_attempt_failed, with_fallback
from attn_dispatch.selection.resolve import SelectionContext

__all__ = ["attention", "check_states", "merge_into", "merge_parts", "merge_states"]


def attention(
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    *,
    query_lens: Sequence[int] | torch.Tensor | None = None,
    seq_lens: Sequence[int] | torch.Tensor | None = None,
    kv_cache: KVCache | tuple[torch.Tensor, torch.Tensor] | None = None,
    block_table: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    window_size: tuple[int, int] | None = None,
    attention_chunk: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Sequence[float] | torch.Tensor | None = None,
    alibi: bool | str | None = None,
    sinks: torch.Tensor | None = None,
    custom_mask: torch.Tensor | None = None,
    key_positions: KeyPositions | None = None,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a ragged batch, with the keys given or in a paged cache.

    Args:
        query: (num_tokens, num_heads, head_size), all requests one after another.
        key: (num_key_tokens, num_kv_heads, head_size). Ragged: all keys. Paged: the new ones,
            which are written to the cache first, or None if the cache holds them.
        value: (num_key_tokens, num_kv_heads, head_size_v).
        query_lens: query tokens of each request; None for one request.
        seq_lens: keys of each request; None for the same as query_lens, or with one request for
            all rows of key. Paged: the new ones included.
        kv_cache: (num_blocks, 2, block_size, num_kv_heads, max(head_size, head_size_v)), paged;
            an int8 one has heads of quantization.stored_head_size, with their scales in them. Or
            a KVCacheView, or its pair (key, value).
        block_table: (num_requests, max_blocks), paged: each request's blocks in order.
        slot_mapping: (num_key_tokens,), paged: where new keys go; None for the last query_len
            positions of each request.
        scale: factor on the scores; None for head_size ** -0.5.
        causal: a query sees no later key; queries align to the end of the keys.
        sliding_window: tokens a query sees, itself included, or None.
        window_size: (left, right), keys a query sees before and after its own, −1 for all; or None.
        attention_chunk: a query sees only keys of its own chunk of this many positions; or None.
        logits_soft_cap: cap of the scores, or None.
        alibi_slopes: (num_heads,), or None.
        alibi: "symmetric" for slopes times −abs(distance) where attention is not causal; None for
            slopes times the signed distance, if there are slopes.
        sinks: (num_heads,) one more logit per head, or None.
        custom_mask: (sum of query_len * seq_len,) bool, see AttentionBatch, or None.
        key_positions: of keys that are only some of each request's, see KeyPositions; or None.
            seq_lens then counts these, and must be given.
        k_scale: of an fp8 cache: a number, or (num_kv_heads,).
        v_scale: the same for values.
        out: (num_tokens, num_heads, head_size_v), written and returned; made if None.
        return_lse: return (output, lse), lse (num_tokens, num_heads) float32, natural log.
        backend: an override with the authority of an argument.

    Raises:
        UnsupportedError: no backend, or not the required one, computes exactly this here.
        InvalidInputError: an argument does not fit; nothing is written then.

    Example:
        >>> query = torch.randn(5, 8, 64)
        >>> key, value = torch.randn(5, 2, 64), torch.randn(5, 2, 64)
        >>> attention(query, key, value, query_lens=[2, 3]).shape
        torch.Size([5, 8, 64])
    """
    cache: KVCache | None = as_kv_cache(kv_cache)
    _check_arguments(
        query=query, key=key, value=value, kv_cache=cache, block_table=block_table, out=out
    )
    _check_scales(cache, k_scale, v_scale)
    if query_lens is None:
        query_lens = [len(query)]
    if seq_lens is None:
        whole = key is not None and cache is None and _is_one_request(query_lens)
        seq_lens = [len(key)] if whole and key is not None else query_lens
    keys = cache if key is None else key
    assert isinstance(keys, (torch.Tensor, KVCacheView))
    per_head = any(isinstance(s, torch.Tensor) and s.dim() for s in (k_scale, v_scale))
    spec = AttentionSpec(
        num_heads=query.shape[1],
        num_kv_heads=keys.shape[-2],
        head_size=query.shape[2],
        head_size_v=query.shape[2] if value is None else value.shape[2],
        dtype=query.dtype,
        kv_cache_dtype="auto" if cache is None else _name_of(cache.dtype, query.dtype),
        kv_scales="per_head" if per_head else "per_tensor",
        block_size=None if cache is None else cache.shape[2],
        kv_strides=None if cache is None else kv_strides_of(cache),
        attn_type=AttentionType.DECODER,
        causal=causal,
        sliding_window=sliding_window,
        window_size=window_size,
        attention_chunk=attention_chunk,
        key_positions=key_positions is not None,
        logits_soft_cap=logits_soft_cap,
        alibi=alibi_of(alibi, alibi_slopes),
        sinks=sinks is not None,
        custom_mask=custom_mask is not None,
        returns_lse=return_lse,
    )
    factor = spec.head_size**-0.5 if scale is None else checked_scale(scale)
    batch = AttentionBatch.create(
        query_lens,
        seq_lens,
        block_table=block_table,
        block_size=None if cache is None or key is None else cache.shape[2],
        slot_mapping=slot_mapping,
        key_lens=seq_lens if cache is None else None,
        custom_mask=custom_mask,
        key_positions=key_positions,
        device=query.device,
    )
    if batch.num_tokens != len(query):
        raise InvalidInputError(
            f"query has {len(query)} rows, and query_lens adds up to {batch.num_tokens}. Give each "
            "request's rows of query."
        )
    if key is not None and batch.key_starts[-1] != len(key):
        lens = "seq_lens" if cache is None else "query_lens"
        raise InvalidInputError(
            f"key has {len(key)} rows, and {lens} adds up to {batch.key_starts[-1]}. Give each "
            "request's rows of key and value."
        )
    phase = Phase.PREFILL if Phase.PREFILL in batch.phases else Phase.DECODE

    scales = KVScales()
    if cache is not None and is_fp8(cache.dtype):
        scales.set(k_scale, v_scale, ((), (spec.num_kv_heads,)), query.device)

    if out is None:
        shape = (len(query), spec.num_heads, spec.head_size_v)
        out = torch.empty(shape, dtype=query.dtype, device=query.device)
    output = out

    def attempt(context: SelectionContext) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        selection = context.select(spec, phase)
        backend_cls, doing = selection.backend_cls, "when it was built"
        try:
            impl = make_impl(
                backend_cls, spec, scale=factor, alibi_slopes=alibi_slopes, sinks=sinks
            )
            builder = backend_cls.make_builder(spec, query.device)
            doing = "when it was called"
            metadata = builder.build(batch)
            result: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
            result = impl.forward(scales, query, key, value, cache, metadata, output)
            return result
        except Exception as error:
            raise_attempt_failed(error, selection.name, phase, doing, context.version)

    context = SelectionContext.current(query.device, backend)
    return with_fallback(spec, context, attempt, phase=phase)


def _is_one_request(query_lens: Any) -> bool:
    try:
        return len(query_lens) == 1
    except TypeError:  # AttentionBatch.create rejects it
        return False


#: Argument -> its number of dimensions.
_RANKS = {"query": 3, "key": 3, "value": 3, "kv_cache": 5, "block_table": 2, "out": 3}


def _check_arguments(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if tensor is None and name != "query":
            continue
        if name == "kv_cache":
            check_kv_cache(name, tensor, meta=True)
        else:
            check_tensors(**{name: tensor})
        if tensor is None or len(tensor.shape) != _RANKS[name]:
            found = "None" if tensor is None else tuple(tensor.shape)
            raise InvalidInputError(
                f"{name} must be a tensor of {_RANKS[name]} dimensions, not {found}. Queries, keys "
                "and values are (num_tokens, num_heads, head_size) without a batch dimension; "
                "query_lens separates the requests."
            )
    has_key, has_value, has_cache, has_table = (
        tensors[name] is not None for name in ("key", "value", "kv_cache", "block_table")
    )
    if has_cache != has_table:
        raise InvalidInputError("kv_cache and block_table go together: give both, or neither.")
    if not has_key and not has_cache:
        raise InvalidInputError("Give key and value, or kv_cache and block_table, or all of them.")
    if has_key != has_value:
        raise InvalidInputError("key and value go together: give both, or None for both.")


def _check_scales(
    kv_cache: KVCache | None, k_scale: float | torch.Tensor, v_scale: float | torch.Tensor
) -> None:
    """Check that scales are given only with a cache that takes them."""
    if kv_cache is not None and is_fp8(kv_cache.dtype):
        return
    if any(isinstance(scale, torch.Tensor) or scale != 1.0 for scale in (k_scale, v_scale)):
        found = "there is none"
        if kv_cache is not None and has_token_scales(kv_cache.dtype):
            found = "this int8 one has its own for each token and head"
        raise InvalidInputError(
            f"k_scale and v_scale are for an fp8 kv_cache, and {found}; leave them out."
        )


def _name_of(cache_dtype: torch.dtype, dtype: torch.dtype) -> str:
    """The kv_cache_dtype of a cache tensor."""
    if cache_dtype == dtype:
        return "auto"
    for name in KV_CACHE_DTYPES:
        if name != "auto" and kv_cache_torch_dtype(name, dtype) == cache_dtype:
            return name
    raise InvalidInputError(
        f"kv_cache is {cache_dtype}; it must be a floating-point type, or torch.int8 with a scale "
        "for each token and head. Allocate it as plan_kv_cache does."
    )


def merge_states(
    outputs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over parts of the keys into attention over all of them.

    Split softmax, as in FlashAttention (arXiv:2205.14135) and Flash-Decoding. On a GPU with Triton
    it is one kernel, which computes in float32; tensors that require a gradient, and other dtypes,
    are merged by PyTorch's operators.

    Args:
        outputs: (num_tokens, num_heads, head_size_v) each, over disjoint sets of keys.
        lses: (num_tokens, num_heads) each, natural log, float32 or float64. It is −inf for a row
            without a key in its part, or +inf, as in FlashAttention 2; the row's output is ignored.
        sinks: (num_heads,) logits that are added here; the parts were computed without them.

    Returns:
        The merged output, in the dtype of the first, and its lse in float32 (float64 if the
        lses are), without the sinks. Rows without a key in any part are 0 and −inf.

    Raises:
        InvalidInputError: there is no part, or the parts or the sinks are not tensors that fit each
            other in shape, dtype and device.
    """
    check_states(outputs, lses, sinks)
    rest = _stacked(outputs[1:], outputs[0]), _stacked(lses[1:], lses[0])
    return merge_parts((outputs[0], lses[0]), rest, sinks)


def _stacked(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """(parts, ...); of one part, without a copy."""
    if len(parts) == 1:
        return parts[0][None]
    return torch.stack(list(parts)) if parts else like[None][:0]


def merge_parts(
    first: tuple[torch.Tensor, torch.Tensor],
    rest: tuple[torch.Tensor, torch.Tensor],
    sinks: torch.Tensor | None,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """merge_states of parts that are checked, all but the first of them in one tensor.

    Args:
        first: an output and its lse. The heads may be two dimensions, the KV head and the head of
            its group, in all parts.
        rest: (parts, num_tokens, num_heads, head_size_v), and (parts, num_tokens, num_heads).
        sinks: as for merge_states.
        into: where the merged output is written, in its dtype; made like the first if None.
    """
    target = into
    if target is None:
        target = torch.empty_like(first[0], memory_format=torch.contiguous_format)
    if target.dim() == 4:
        target = target.flatten(1, 2)
    needs_grad = torch.is_grad_enabled() and sinks is not None and sinks.requires_grad
    if not needs_grad and all(
        merge_kernels.take(*each) for each in (first, rest, (target, first[1]))
    ):
        found = merge_kernels.merge(first, rest, sinks, target)
        if found is not None:
            return target, found
    parts = zip(first, rest, strict=True)
    outputs, lses = ([one, *others.unbind(0)] for one, others in parts)
    if outputs[0].dim() == 4:
        outputs, lses = ([each.flatten(1, 2) for each in some] for some in (outputs, lses))
    merged, lse = _merge_by_operators(outputs, lses, sinks)
    return merged if into is None else into.copy_(merged), lse


def _merge_by_operators(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = lses[0].dtype
    stacked = torch.stack(list(lses))
    stacked = stacked.masked_fill(stacked == float("inf"), float("-inf"))
    logits = stacked
    if sinks is not None:
        logits = torch.cat([stacked, sinks.to(dtype).expand(1, *stacked.shape[1:])])
    largest = logits.amax(dim=0)
    weights = torch.exp(logits - largest.masked_fill(largest == float("-inf"), 0.0))
    weights = weights / weights.sum(dim=0)  # normalized first: the lses may be large
    merged = torch.zeros_like(outputs[0], dtype=dtype)
    for output, weight, part in zip(outputs, weights, stacked, strict=False):
        # A part without keys may hold anything; any other NaN must stay visible.
        empty = (part == float("-inf"))[..., None]
        merged += torch.where(empty, 0.0, weight[..., None] * output.to(dtype))
    return merged.to(outputs[0].dtype), torch.logsumexp(stacked, dim=0)


def merge_into(
    merged: torch.Tensor, lse: torch.Tensor, output: torch.Tensor, output_lse: torch.Tensor
) -> None:
    """Merge one more part into what earlier parts gave; both tensors of these are written.

    Args:
        merged: (num_tokens, num_heads, head_size_v), at least as wide a dtype as `output`.
        lse: (num_tokens, num_heads).
        output: of the part, like `merged`.
        output_lse: of the part, like `lse`.
    """
    if merge_kernels.take(merged, lse) and merge_kernels.take(output, output_lse):
        rest = (output[None], output_lse[None])
        found = merge_kernels.merge((merged, lse), rest, None, merged)
        if found is not None:
            lse.copy_(found)
            return
    both = [merged, output.to(merged.dtype)], [lse, output_lse]
    for target, source in zip((merged, lse), _merge_by_operators(*both, None), strict=True):
        target.copy_(source)


def check_states(outputs: Any, lses: Any, sinks: Any) -> None:
    """Check the arguments of merge_states, but not their values."""
    for name, parts in (("outputs", outputs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise InvalidInputError(
                f"{name} is a {type(parts).__name__}; give a list with a tensor for each part. "
                "Split stacked parts by .unbind(0)."
            )
        for index, part in enumerate(parts):
            check_tensors(**{f"{name}[{index}]": part})
            if part is None:
                raise InvalidInputError(f"{name}[{index}] is None; give a tensor for each part.")
    if not outputs or len(outputs) != len(lses):
        raise InvalidInputError(
            f"Give one lse for each output: there are {len(outputs)} outputs and {len(lses)} lses."
        )
    output, lse = outputs[0], lses[0]
    if output.dim() != 3 or not _is_float(output):
        raise InvalidInputError(
            f"outputs[0] is {tuple(output.shape)} {output.dtype}; it must be "
            "(num_tokens, num_heads, head_size_v), floating point of 16 bits or more."
        )
    if lse.dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(
            f"lses[0] is {lse.dtype}; attention returns its lse in float32 or float64."
        )
    for name, parts, shape in (
        ("outputs", outputs, output.shape),
        ("lses", lses, output.shape[:2]),
    ):
        for index, part in enumerate(parts):
            dtype = parts[0].dtype
            if (part.shape, part.dtype, part.device) != (shape, dtype, output.device):
                raise InvalidInputError(
                    f"The parts differ: {name}[{index}] is {tuple(part.shape)} {part.dtype} on "
                    f"{part.device}; with outputs[0] of {tuple(output.shape)} on {output.device} "
                    f"it must be {tuple(shape)} {dtype}."
                )
    if sinks is None:
        return
    check_tensors(sinks=sinks)
    fits = sinks.shape == output.shape[1:2] and sinks.device == output.device
    if not fits or not _is_float(sinks):
        raise InvalidInputError(
            f"sinks is {tuple(sinks.shape)} {sinks.dtype} on {sinks.device}; it must have one "
            f"floating-point logit for each of the {output.shape[1]} heads, on {output.device}."
        )


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
