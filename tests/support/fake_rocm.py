"""Fakes of flash_attn (its CK build) and aiter: their signatures, limits and quirks.

Each function has the signature of its release (flash-attn 2.8.3, AITER 0.1.20), asserts what the
release checks or relies on, and computes in PyTorch as the release does, including its errors.
Where CK's result is wrong or undefined, the result is NaN here, or the test fails.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType

import torch

#: Rows that see no key. CK leaves them at 0 and minus infinity, without keys at plus infinity, and
#: the assembly kernels promise nothing. So no caller may rely on their values.
JUNK = math.nan


class Calls:
    """The calls made, in order: their arguments by name."""

    def __init__(self):
        self.made = []

    def note(self, **arguments):
        self.made.append(arguments)

    def __len__(self):
        return len(self.made)


def install_flash_attn(monkeypatch, *, runs_triton=False):
    """Install the fake `flash_attn`; returns its calls."""
    calls = Calls()

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.note(q=q, k=k, v=v, max_seqlen_k=max_seqlen_k, window_size=window_size)
        assert dropout_p == 0.0
        assert not deterministic
        assert block_table is None
        assert q.shape[2] == v.shape[2]
        # The soft cap is accepted and ignored.
        output, lse = _ck(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            window_size, alibi_slopes,
        )  # fmt: skip
        no_probs = torch.empty(0, dtype=q.dtype)
        return (output, lse, no_probs) if return_attn_probs else output

    _module(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    _module(
        monkeypatch,
        "flash_attn.flash_attn_interface",
        USE_TRITON_ROCM=runs_triton,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )
    return calls


def install_aiter(monkeypatch, *, has_ck=True):
    """Install the fake `aiter`; returns its calls."""
    calls = Calls()

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, min_seqlen_q=0,
        dropout_p=0.0, softmax_scale=None, logits_soft_cap=0.0, causal=False,
        window_size=(-1, -1, 0), bias=None, alibi_slopes=None, deterministic=False,
        return_lse=False, return_attn_probs=False, how_v3_bf16_cvt=1, block_table=None, out=None,
        cu_seqlens_q_padded=None, cu_seqlens_k_padded=None, sink_ptr=None,
    ):  # fmt: skip
        calls.note(q=q, k=k, v=v, max_seqlen_k=max_seqlen_k, window_size=window_size)
        assert min_seqlen_q == 0, "shorter queries would be skipped"
        assert dropout_p == 0.0
        assert not deterministic
        assert not return_attn_probs
        assert how_v3_bf16_cvt == 1
        unused = (bias, block_table, out, cu_seqlens_q_padded, cu_seqlens_k_padded, sink_ptr)
        assert all(each is None for each in unused)
        assert isinstance(logits_soft_cap, float)
        assert logits_soft_cap >= 0
        left, right = (-1 if side >= max_seqlen_k else side for side in window_size[:2])
        sizes = (q.shape[2], v.shape[2])
        is_assembly = (
            sizes in ((128, 128), (192, 128))
            and q.dtype == torch.bfloat16
            and alibi_slopes is None
            and logits_soft_cap == 0.0
            and not (left > 0 or right > 0)
        )
        if is_assembly:
            assert left == -1, "no kernel, or a dropped window"
            assert right == -1 or causal
        cap = logits_soft_cap if has_ck else 0.0
        output, lse = _ck(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            window_size, alibi_slopes, cap,
        )  # fmt: skip
        if not return_lse:
            return output
        assert not logits_soft_cap, "its log-sum-exp is wrong with a soft cap"
        return output, lse

    _module(monkeypatch, "aiter", flash_attn_varlen_func=flash_attn_varlen_func)
    _module(monkeypatch, "aiter.ops")
    _module(
        monkeypatch,
        "aiter.ops.mha",
        ENABLE_CK=has_ck,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )
    return calls


def _module(monkeypatch, name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def _ck(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window, slopes,
    cap=0.0,
):  # fmt: skip
    """Output (total_q, num_heads, size_v) and lse (num_heads, total_q), as CK computes them."""
    _check_rows(q, k, v)
    query_starts = _check_starts(cu_seqlens_q, len(q), max_seqlen_q)
    key_starts = _check_starts(cu_seqlens_k, len(k), max_seqlen_k)
    assert len(query_starts) == len(key_starts) > 1
    assert isinstance(scale, float)
    assert scale >= 0
    assert isinstance(causal, bool)
    num_heads = q.shape[1]
    if slopes is not None:
        assert slopes.dtype == torch.float32
        assert slopes.shape == (num_heads,)
        assert slopes.is_contiguous()
    left, right = window
    assert all(type(side) is int and -1 <= side < 2**31 for side in (left, right))
    if max_seqlen_q == 1 and slopes is None:
        causal = False
    left, right = (-1 if side >= max_seqlen_k else side for side in (left, right))
    if causal:
        right = 0
    assert slopes is None or (causal and left == -1), "what CK adds here depends on the release"

    output = torch.full((len(q), num_heads, v.shape[2]), JUNK, dtype=torch.float64)
    lse = torch.full((num_heads, len(q)), JUNK, dtype=torch.float64)
    group = num_heads // k.shape[1]
    for first, last, begin, end in zip(
        query_starts, query_starts[1:], key_starts, key_starts[1:], strict=False
    ):
        keys = k[begin:end].double().repeat_interleave(group, 1)
        values = v[begin:end].double().repeat_interleave(group, 1)
        scores = scale * torch.einsum("qhd,khd->hqk", q[first:last].double(), keys)
        if cap:
            scores = cap * torch.tanh(scores / cap)
        columns = torch.arange(end - begin)
        rows = torch.arange(last - first)[:, None] + (end - begin) - (last - first)
        if slopes is not None:  # by the key's position only
            scores = scores + slopes.double()[:, None, None] * columns
        seen = torch.ones(last - first, end - begin, dtype=torch.bool)
        if left >= 0:
            seen &= columns >= rows - left
        if right >= 0:
            seen &= columns <= rows + right
        scores = scores.masked_fill(~seen, -math.inf)
        has_keys = seen.any(1)
        weights = torch.softmax(scores, -1)
        result = torch.einsum("hqk,khd->qhd", weights, values)
        output[first:last][has_keys] = result[has_keys]
        lse[:, first:last][:, has_keys] = torch.logsumexp(scores, -1)[:, has_keys]
    return output.to(q.dtype), lse.float()


def _check_rows(q, k, v):
    for rows in (q, k, v):
        assert rows.dim() == 3
        assert rows.dtype == q.dtype
        assert rows.dtype in (torch.float16, torch.bfloat16)
        assert rows.stride(2) == 1
        assert rows.shape[2] % 8 == 0
        assert 0 < rows.shape[2] <= 256
        # CK loads eight elements at a time and does not check their alignment.
        assert rows.data_ptr() % 16 == 0
        assert all(step > 0 and step % 8 == 0 for step in rows.stride()[:2])
    assert k.shape[:2] == v.shape[:2]
    assert q.shape[2] == k.shape[2]
    assert q.shape[1] % k.shape[1] == 0


def _check_starts(starts, rows, longest):
    assert starts.dtype == torch.int32
    assert starts.is_contiguous()
    assert type(longest) is int
    values = starts.tolist()
    assert values[0] == 0
    assert values[-1] == rows
    lengths = [end - start for start, end in zip(values, values[1:], strict=False)]
    assert all(0 < length <= longest for length in lengths), "a request without queries or keys"
    return values


__all__ = ["Calls", "install_aiter", "install_flash_attn"]
