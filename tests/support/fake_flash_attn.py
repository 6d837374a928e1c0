"""Fakes of the packages that contain FlashAttention, for machines without them or a GPU.

Each function has the signature of the release, checks every argument as the release does, and
computes in float32 by the release's conventions: bottom-right masks, windows as (left, right),
ALiBi by distance, sinks that count in the log-sum-exp, +inf for a row without keys in
FlashAttention 2. What a kernel loads and multiplies by zero is multiplied by zero here too, so a
NaN there shows.
"""

from __future__ import annotations

import contextlib
import math
import sys
import types

import torch

__all__ = ["MODULES", "Recorder", "installed"]

#: Keys in a tile, which TMA loads whole: this many rows after a request's last may be loaded.
TILE = 192


class Recorder:
    """The calls made: (function, arguments) in order."""

    def __init__(self):
        self.calls = []
        self.schedules = {}

    def names(self):
        return [name for name, _ in self.calls]


def _check(condition, message):
    if not condition:
        raise RuntimeError(message)


def _check_int32(name, tensor, shape):
    _check(tensor.dtype == torch.int32, f"{name} must have dtype int32")
    _check(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}")


def _check_vectors(name, tensor):
    """Heads must be contiguous at multiples of 16 bytes: else a kernel faults or reads garbage."""
    _check(tensor.stride(-1) == 1, f"{name} must have contiguous last dimension")
    steps = [tensor.data_ptr(), *(s * tensor.element_size() for s in tensor.stride()[:-1])]
    _check(all(step % 16 == 0 for step in steps), f"{name} is not aligned: {tensor.stride()}")


def _attend(q, k, v, *, scale, causal, window, softcap, slopes, sinks, behind, empty, by_column):
    """One request: output (tokens, heads, size_v) float32 and lse (heads, tokens).

    `behind` are the rows of v after the last key that are loaded with it. With `by_column`, ALiBi's
    bias is the slope times the key's position.
    """
    tokens, heads, _ = q.shape
    keys, kv_heads, _ = v.shape
    q, k, v = q.float(), k.float(), v.float()
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(tokens)[:, None] + keys - tokens
    columns = torch.arange(keys)
    if slopes is not None:
        bias = columns.expand(tokens, keys) if by_column else -(positions - columns).abs()
        scores = scores + slopes[:, None, None] * bias
    left, right = window
    right = 0 if causal else right
    hidden = torch.zeros(tokens, keys, dtype=torch.bool)
    if left >= 0:
        hidden |= columns < positions - left
    if right >= 0:
        hidden |= columns > positions + right
    scores = scores.masked_fill(hidden, -math.inf)
    largest = scores.amax(-1) if keys else torch.full((heads, tokens), -math.inf)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(scores - largest[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks.float()[:, None] - largest)
    output = torch.einsum("hqk,khd->qhd", weights, v) + (0 * behind.float()).sum()
    output = output / total.masked_fill(total == 0, 1.0).T[..., None]
    lse = torch.log(total) + largest
    return output, lse.masked_fill(total == 0, empty)


def _starts(name, starts, rows, longest):
    """Check a cumulative tensor, and return its values and lengths."""
    _check(starts.is_contiguous(), f"{name} must be contiguous")
    _check(starts.dtype == torch.int32, f"{name} must have dtype int32")
    values = starts.tolist()
    _check(values[0] == 0 and values == sorted(values), f"{name} is {values}")
    _check(values[-1] <= rows, f"{name} ends at {values[-1]}, and there are {rows} rows")
    lengths = [b - a for a, b in zip(values, values[1:], strict=False)]
    _check(max(lengths) <= longest, f"a request of {name} is longer than {longest}")
    return values, lengths


def _check_tensors(q, k, v, out, slopes, sinks, head_pairs):
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check(tensor.dtype == q.dtype, f"{name} has another dtype than q")
        _check_vectors(name, tensor)
    _check(q.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16 are supported")
    tokens, heads, size = q.shape
    kv_heads, size_v = v.shape[-2:]
    _check(head_pairs(size, size_v), f"heads of {size} and {size_v} are not supported")
    _check(heads % kv_heads == 0 and k.shape[-2] == kv_heads, "heads do not divide")
    _check(k.shape[:-1] == v.shape[:-1] and k.shape[-1] == size, "k or v has another shape")
    if slopes is not None:
        _check(slopes.dtype == torch.float32, "ALiBi slopes must have dtype fp32")
        _check(slopes.shape == (heads,) and slopes.stride(-1) == 1, "ALiBi slopes' shape")
    if sinks is not None:
        _check(sinks.dtype == torch.bfloat16, "We only support bf16 dtype for S aux.")
        _check(sinks.shape == (heads,) and sinks.is_contiguous(), "s_aux' shape")
    _check(out.shape == (tokens, heads, size_v) and out.dtype == q.dtype, "out has another form")
    _check_vectors("out", out)


def _joined(q, k, v, q_v, are):
    """q and k with their second parts, for latents: q_v is compared with the values.

    Pages of 64 would be loaded by TMA, whole.
    """
    if q_v is None:
        return q, k, are
    _check((q.shape[-1], v.shape[-1]) == (64, 512), "q_v needs heads of 64 and 512")
    _check(q_v.shape == (*q.shape[:2], 512) and q_v.dtype == q.dtype, "q_v has another form")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("q_v", q_v)):
        _check_vectors(name, tensor)
    sizes = {"head_pairs": lambda size, size_v: (size, size_v) == (576, 512)}
    return torch.cat([q, q_v], -1), torch.cat([k, v], -1), are | sizes


def _varlen(
    q, k, v, *, starts, max_q, seq_lens=None, key_starts=None, max_k=None, table=None, out=None,
    scale, causal, window, softcap, slopes=None, sinks=None, page_multiple=1, largest_page=None,
    head_pairs, past_rows, empty,
):  # fmt: skip
    """All requests: (output, lse (heads, tokens)). Shared by all packages."""
    _check(isinstance(causal, bool) and isinstance(scale, float), "causal or scale has no value")
    _check(scale > 0, "the largest score would be the smallest")
    _check(softcap >= 0.0 and all(-1 <= side < 2**31 for side in window), "softcap or window")
    tokens, heads = q.shape[:2]
    if out is None:
        out = torch.full((tokens, heads, v.shape[-1]), math.nan, dtype=q.dtype)
    _check_tensors(q, k, v, out, slopes, sinks, head_pairs)
    first_rows, query_lens = _starts("cu_seqlens_q", starts, tokens, max_q)
    num_reqs = len(query_lens)
    _check(num_reqs > 0, "batch size must be positive")
    by_request = table is None and k.dim() == 4
    if table is not None:
        _check_int32("block_table", table, (num_reqs, table.shape[1]))
        _check(table.stride(-1) == 1, "block_table must have contiguous last dimension")
        page = k.shape[1]
        _check(page % page_multiple == 0, f"pages must be multiples of {page_multiple}")
        _check(largest_page is None or page <= largest_page, "pages this large go by TMA")
        if seq_lens is None:
            lengths = _starts("cu_seqlens_k", key_starts, 10**9, max_k)[1]
        else:
            _check_int32("seqused_k", seq_lens, (num_reqs,))
            _check(seq_lens.is_contiguous(), "seqused_k must be contiguous")
            lengths = seq_lens.tolist()
    elif by_request:
        _check(len(k) == num_reqs, "batch_size must be equal to batch_size_k")
        _check(max_k in (None, k.shape[1]), "k does not have max_seqlen_k rows")
        _check_int32("seqused_k", seq_lens, (num_reqs,))
        lengths = seq_lens.tolist()
        _check(max(lengths) <= k.shape[1], f"seqused_k is {lengths}, and k has {k.shape[1]} rows")
    else:
        _check(
            key_starts is not None and seq_lens is None, "rows need cu_seqlens_k and no seqused_k"
        )
        first_keys, lengths = _starts("cu_seqlens_k", key_starts, len(k), max_k)
    if max_k is not None and empty == math.inf:  # FlashAttention 2 clamps windows like this
        window = tuple(-1 if side >= max_k else side for side in window)
    lse = torch.full((heads, tokens), math.nan)
    for request, (query_len, keys) in enumerate(zip(query_lens, lengths, strict=True)):
        if by_request:  # after a request's part of the tensor TMA finds zeros
            rows, behind = [tensor[request, :keys] for tensor in (k, v)], v[request, keys:]
        elif table is None:
            first = first_keys[request]
            rows = [tensor[first : first + keys] for tensor in (k, v)]
            behind = v[first + keys : first + keys + TILE] if past_rows else v[:0]
        else:
            used = table[request, : -(-keys // page)].long()
            _check(len(used) * page >= keys, "block_table has too few columns")
            _check(all(0 <= int(b) < len(k) for b in used), f"block_table names {used.tolist()}")
            rows, behind = [tensor[used].flatten(0, 1)[:keys] for tensor in (k, v)], v[:0, 0]
        place = slice(first_rows[request], first_rows[request] + query_len)
        output, found = _attend(
            q[place],
            *rows,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            slopes=slopes,
            sinks=sinks,
            behind=behind,
            empty=empty,
            by_column=causal and window[0] < 0,
        )
        out[place], lse[:, place] = output.to(q.dtype), found
    return out, lse


def _same(size, size_v):
    return size == size_v and size % 8 == 0 and size <= 256


def _pairs_3(size, size_v):
    odd = (128 < size <= 192 and 96 < size_v <= 128) or (size <= 64 and size_v <= 512)
    return size % 8 == size_v % 8 == 0 and size <= 256 and (size == size_v or odd)


def _pairs_4(size, size_v):
    """Head sizes of FlashAttention 4. With pages, a head must fill the tile."""
    is_usual = 8 <= size <= 128 and 8 <= size_v <= 128 and size % 16 == size_v % 16 == 0
    return is_usual or (size, size_v) == (192, 128)


_ARE_2 = {"head_pairs": _same, "past_rows": False, "empty": math.inf}
_ARE_3 = {"head_pairs": _pairs_3, "past_rows": True, "empty": -math.inf, "largest_page": 63}
_ARE_4 = {"head_pairs": _pairs_4, "past_rows": True, "empty": -math.inf, "largest_page": 63}


def _scheduler(recorder):
    def get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
        qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1),
        has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        _check_int32("cache_seqlens", cache_seqlens, (batch_size,))
        _check_int32("cu_seqlens_q", cu_seqlens_q, (batch_size + 1,))
        made = torch.zeros(batch_size, dtype=torch.int32)
        recorder.calls.append(("get_scheduler_metadata", {}))
        recorder.schedules[made.data_ptr()] = (
            made,
            (max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v, qkv_dtype,
             page_size, causal, tuple(window_size), has_softcap),
            (cache_seqlens.tolist(), cu_seqlens_q.tolist()),
        )  # fmt: skip
        return made

    return get_scheduler_metadata


def _check_schedule(recorder, schedule, q, k, v, table, seq_lens, starts, max_q, rest):
    """The kernel relies on the arguments of get_scheduler_metadata."""
    if schedule is None:
        return
    _check(table is not None, "scheduler_metadata was made for pages")
    _, shapes, lengths = recorder.schedules[schedule.data_ptr()]
    _check(lengths == (seq_lens.tolist(), starts.tolist()), "scheduler_metadata of other lengths")
    longest = table.shape[1] * k.shape[1]
    now = (max_q, longest, q.shape[1], k.shape[2], q.shape[2], v.shape[3], q.dtype, k.shape[1])
    _check(shapes == (*now, *rest), f"scheduler_metadata was made for {shapes}, not {now} {rest}")


def _flash_attn(recorder):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        recorder.calls.append(("flash_attn_varlen_func", locals()))
        swaps = q.shape[1] > v.shape[-2] and max(window_size) < 0 and alibi_slopes is None
        if max_seqlen_q == 1 and swaps:
            _check(len(q) == len(cu_seqlens_q) - 1, "shape is invalid for input of that size")
        output, lse = _varlen(
            q, k, v, starts=cu_seqlens_q, max_q=max_seqlen_q, key_starts=cu_seqlens_k,
            max_k=max_seqlen_k, table=block_table, scale=softmax_scale, causal=causal,
            window=window_size, softcap=softcap, slopes=alibi_slopes, page_multiple=256, **_ARE_2,
        )  # fmt: skip
        return (output, lse, None) if return_attn_probs else output

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        recorder.calls.append(("flash_attn_with_kvcache", locals()))
        _check(q.dim() == 4 and q.shape[1] == 1, "this fake takes one token per request")
        output, lse = _varlen(
            q[:, 0], k_cache, v_cache, starts=torch.arange(len(q) + 1, dtype=torch.int32), max_q=1,
            seq_lens=cache_seqlens, max_k=block_table.shape[1] * k_cache.shape[1],
            table=block_table, scale=softmax_scale, causal=causal, window=window_size,
            softcap=softcap, slopes=alibi_slopes, page_multiple=256, **_ARE_2,
        )  # fmt: skip
        return (output[:, None], lse.T[..., None]) if return_softmax_lse else output[:, None]

    return {
        "flash_attn": {
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "flash_attn_with_kvcache": flash_attn_with_kvcache,
        }
    }


def _with_kvcache_3(recorder, schedules):
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
        cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
        q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        recorder.calls.append(("flash_attn_with_kvcache", locals()))
        _check(schedules or scheduler_metadata is None, "there is no scheduler_metadata here")
        rest = (causal, tuple(window_size), softcap > 0)
        _check_schedule(
            recorder, scheduler_metadata, q, k_cache, v_cache, page_table, cache_seqlens,
            cu_seqlens_q, max_seqlen_q, rest,
        )  # fmt: skip
        q, k_cache, are = _joined(q, k_cache, v_cache, qv, _ARE_3)
        features = {
            "starts": cu_seqlens_q, "max_q": max_seqlen_q, "scale": softmax_scale,
            "causal": causal, "window": window_size, "softcap": softcap, **are,
        }  # fmt: skip
        output, lse = _varlen(
            q, k_cache, v_cache, seq_lens=cache_seqlens, table=page_table, **features
        )
        return (output, lse, None, None) if return_softmax_lse else output

    return flash_attn_with_kvcache


def _flash_attn_interface(recorder):
    return {
        "flash_attn_interface": {
            "flash_attn_with_kvcache": _with_kvcache_3(recorder, True),
            "get_scheduler_metadata": _scheduler(recorder),
        }
    }


def _sgl_kernel(recorder):
    functions = {"flash_attn_with_kvcache": _with_kvcache_3(recorder, False)}
    return {"sgl_kernel": {}, "sgl_kernel.flash_attn": functions}


def _flash_attn_4(recorder):
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
        gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, return_lse=False,
    ):  # fmt: skip
        recorder.calls.append(("flash_attn_varlen_func", locals()))
        _check(page_table is None or cu_seqlens_k is None, "cu_seqlens_k goes with rows")
        output, lse = _varlen(
            q, k, v, starts=cu_seqlens_q, max_q=max_seqlen_q, seq_lens=seqused_k,
            key_starts=cu_seqlens_k, max_k=max_seqlen_k, table=page_table, scale=softmax_scale,
            causal=causal, window=tuple(-1 if side is None else side for side in window_size),
            softcap=softcap, sinks=learnable_sink, **_ARE_4,
        )  # fmt: skip
        return output, lse if return_lse else None

    return {"flash_attn": {}, "flash_attn.cute": {"flash_attn_varlen_func": flash_attn_varlen_func}}


def _vllm(recorder):
    versions = {2: _ARE_2, 3: _ARE_3, 4: _ARE_4}

    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
        q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
        return_softmax_lse=False, out=None, scheduler_metadata=None, q_descale=None,
        k_descale=None, v_descale=None, num_splits=0, fa_version=2, s_aux=None, cp_world_size=1,
        cp_rank=0, cp_tot_seqused_k=None,
    ):  # fmt: skip
        recorder.calls.append(("flash_attn_varlen_func", locals()))
        assert cu_seqlens_k is not None or seqused_k is not None
        assert cu_seqlens_k is None or seqused_k is None
        assert block_table is None or seqused_k is not None
        assert fa_version == 2 or alibi_slopes is None
        window_size = (-1, -1) if window_size is None else window_size
        assert len(window_size) == 2
        _check(fa_version == 3 or scheduler_metadata is None, "scheduler_metadata is FA3's")
        _check(fa_version != 2 or s_aux is None, "FA2 does not support s_aux")
        if fa_version == 3 and s_aux is not None:
            _check(q.shape[1] <= 64 and q.shape[-1] == v.shape[-1], "S aux")
        swaps = q.shape[1] > v.shape[-2] and max(window_size) < 0 and alibi_slopes is None
        if fa_version == 2 and max_seqlen_q == 1 and swaps:
            _check(len(q) == len(cu_seqlens_q) - 1, "shape is invalid for input of that size")
        rest = (causal, tuple(window_size), softcap > 0)
        _check_schedule(
            recorder, scheduler_metadata, q, k, v, block_table, seqused_k, cu_seqlens_q,
            max_seqlen_q, rest,
        )  # fmt: skip
        _check(fa_version == 3 or q_v is None, "q_v is FA3's")
        q, k, are = _joined(q, k, v, q_v, versions[fa_version])
        output, lse = _varlen(
            q, k, v, starts=cu_seqlens_q, max_q=max_seqlen_q, seq_lens=seqused_k,
            key_starts=cu_seqlens_k, max_k=max_seqlen_k, table=block_table, out=out,
            scale=softmax_scale, causal=causal, window=tuple(window_size), softcap=softcap,
            slopes=alibi_slopes, sinks=s_aux, page_multiple=16 if fa_version == 2 else 1,
            **are,
        )  # fmt: skip
        return (output, lse) if return_softmax_lse else output

    functions = {
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "get_scheduler_metadata": _scheduler(recorder),
    }
    whole = ("_vllm_fa2_C", "_vllm_fa3_C", "cute", "cute.interface")
    names = ("vllm", *(f"vllm.vllm_flash_attn.{part}" for part in whole))
    return {key: {} for key in names} | {"vllm.vllm_flash_attn": functions}


#: The fake modules of each provider, by the provider's name.
MODULES = {
    "vLLM's FlashAttention 3": _vllm,
    "FlashAttention 3": _flash_attn_interface,
    "SGLang's FlashAttention 3": _sgl_kernel,
    "FlashAttention 4": _flash_attn_4,
    "vLLM's FlashAttention 4": _vllm,
    "FlashAttention 2": _flash_attn,
    "vLLM's FlashAttention 2": _vllm,
}


@contextlib.contextmanager
def installed(provider):
    """A context in which imports find a provider's fake modules. Yields a Recorder."""
    recorder = Recorder()
    modules = {}
    for name, functions in MODULES[provider](recorder).items():
        modules[name] = types.ModuleType(name)
        modules[name].__path__ = []
        vars(modules[name]).update(functions)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield recorder
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
