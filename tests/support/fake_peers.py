"""Fakes of the peers of the benchmark, with the parameters of the real functions.

They check shapes and dtypes, and compute.
"""

from __future__ import annotations

import sys
import types

import torch

from attn_dispatch.backends.reference.semantics import attend
from attn_dispatch.bench.inputs import alibi_slopes


def stand_in_attention(
    q, k, v, *, cu_q, cu_k=None, used_k=None, table=None, causal, window=(-1, -1), cap=0.0,
    slopes=None, sinks=None, scale,
):  # fmt: skip
    """(total_q, heads, size) by the library's semantics, arguments checked as a kernel would."""
    assert q.dim() == 3
    assert cu_q.dtype == torch.int32
    assert int(cu_q[-1]) == len(q)
    count = len(cu_q) - 1
    if table is not None:
        assert k.dim() == 4
        assert k.stride(-1) == 1
        assert table.dtype == torch.int32
        assert table.shape[0] == count
        assert used_k is not None
    else:
        assert k.dim() == 3
        assert cu_k.dtype == torch.int32
        assert int(cu_k[-1]) == len(k)
    lengths = used_k if used_k is not None else cu_k.diff()
    assert lengths.shape == (count,)
    outputs = []
    for request in range(count):
        length = int(lengths[request])
        if table is not None:
            size = k.shape[1]
            blocks = table[request, : -(-length // size)].long()
            keys, values = (t[blocks].flatten(0, 1)[:length].double() for t in (k, v))
        else:
            keys, values = (t[int(cu_k[request]) :][:length].double() for t in (k, v))
        left, right = window
        assert right == (left if left < 0 or not causal else 0) or (causal and right in (-1, 0))
        outputs.append(
            attend(
                q[int(cu_q[request]) : int(cu_q[request + 1])].double(),
                keys,
                values,
                scale=scale,
                causal=causal,
                sliding_window=None if left < 0 else left + 1,
                logits_soft_cap=cap or None,
                alibi_slopes=None if slopes is None else slopes.double(),
                sinks=None if sinks is None else sinks.double(),
            )[0]
        )
    return torch.cat(outputs).to(q.dtype)


def module(monkeypatch, name, **members):
    """A fake module, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        above = ".".join(parts[:depth])
        if above not in sys.modules:
            package = types.ModuleType(above)
            package.__path__ = []
            monkeypatch.setitem(sys.modules, above, package)
    made = types.ModuleType(name)
    made.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, made)


def into(out, result):
    if out is None:
        return result
    assert out.shape == result.shape
    assert out.dtype == result.dtype
    return out.copy_(result)


def vllm_flash_attention(version):
    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
        q_v=None, dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
        return_softmax_lse=False, out=None, scheduler_metadata=None, q_descale=None,
        k_descale=None, v_descale=None, num_splits=0, fa_version=2, s_aux=None,
    ):  # fmt: skip
        assert fa_version == version
        assert alibi_slopes is None or (version == 2 and alibi_slopes.dtype == torch.float32)
        assert s_aux is None or (version > 2 and s_aux.dtype == torch.bfloat16)
        assert (cu_seqlens_k is None) != (seqused_k is None)
        assert isinstance(window_size, list)
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        lengths = seqused_k if seqused_k is not None else cu_seqlens_k.diff()
        assert max_seqlen_k == int(lengths.max())
        result = stand_in_attention(
            q, k, v, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, used_k=seqused_k, table=block_table,
            causal=causal, window=tuple(window_size), cap=softcap, slopes=alibi_slopes,
            sinks=s_aux, scale=softmax_scale,
        )  # fmt: skip
        return into(out, result)

    return flash_attn_varlen_func


def install_vllm(monkeypatch, version):
    module(
        monkeypatch,
        "vllm.vllm_flash_attn",
        flash_attn_varlen_func=vllm_flash_attention(version),
        fa_version_unsupported_reason=lambda v: None if v == version else f"no FA{v} here",
        __path__=[],
    )
    if version == 4:
        module(monkeypatch, "vllm.vllm_flash_attn.cute.interface", _flash_attn_fwd=print)


def install_flash_attn_2(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert block_table is None or k.shape[1] % 256 == 0
        return stand_in_attention(
            q, k, v, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k,
            used_k=None if block_table is None else cu_seqlens_k.diff(), table=block_table,
            causal=causal, window=window_size, cap=softcap, slopes=alibi_slopes,
            scale=softmax_scale,
        )  # fmt: skip

    module(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)


def install_flash_attn_3(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return stand_in_attention(
            q, k, v, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, causal=causal, window=window_size,
            cap=softcap, scale=softmax_scale,
        )  # fmt: skip

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
        cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
        q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        return stand_in_attention(
            q, k_cache, v_cache, cu_q=cu_seqlens_q, used_k=cache_seqlens, table=page_table,
            causal=causal, window=window_size, cap=softcap, scale=softmax_scale,
        )  # fmt: skip

    module(
        monkeypatch,
        "flash_attn_interface",
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    )


def install_flash_attn_4(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
        gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        return_lse=False, out=None,
    ):  # fmt: skip
        assert page_table is None or cu_seqlens_k is None
        assert learnable_sink is None or learnable_sink.dtype == torch.bfloat16
        window = tuple(-1 if side is None else side for side in window_size)
        result = stand_in_attention(
            q, k, v, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, used_k=seqused_k, table=page_table,
            causal=causal, window=window, cap=softcap, sinks=learnable_sink, scale=softmax_scale,
        )  # fmt: skip
        return result, None

    module(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=flash_attn_varlen_func)


def install_flashinfer(monkeypatch):
    class Wrapper:
        backends = ("fa2", "fa3")

        def __init__(self, float_workspace_buffer, kv_layout="NHD", *, backend="auto"):
            assert float_workspace_buffer.dtype == torch.uint8
            assert kv_layout == "NHD"
            assert backend in self.backends

        def features(
            self, *, pos_encoding_mode, sm_scale, window_left, logits_soft_cap, q_data_type,
            kv_data_type,
        ):  # fmt: skip
            self.alibi = {"ALIBI": True, "NONE": False}[pos_encoding_mode]
            self.options = {"scale": sm_scale, "window": (window_left, -1)}
            self.options["cap"] = logits_soft_cap
            self.dtypes = (q_data_type, kv_data_type)

        def pages(self, indptr, indices, last, heads, kv_heads, size, page_size):
            assert indptr.dtype == indices.dtype == last.dtype == torch.int32
            assert int(indptr[-1]) == len(indices)
            assert bool(((last >= 1) & (last <= page_size)).all())
            counts = indptr.diff().tolist()
            self.used = torch.tensor(counts) * page_size - page_size + last
            self.table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
            for row, some in zip(self.table, indices.split(counts), strict=True):
                row[: len(some)] = some
            self.heads = (heads, kv_heads, size)

        def attend(self, q, kv, *, sinks=None, k_scale=1.0, v_scale=1.0):
            parts = kv if isinstance(kv, tuple) else kv.unbind(1)
            assert all(part.dim() == 4 for part in parts)
            assert (q.dtype, parts[0].dtype) == self.dtypes
            keys, values = (t.float() if t.dtype.itemsize == 1 else t for t in parts)
            assert (q.shape[1], keys.shape[2], q.shape[2]) == self.heads
            left = self.options["window"][0]
            return stand_in_attention(
                q, keys * k_scale, values * v_scale, cu_q=self.cu_q, used_k=self.used,
                table=self.table, causal=self.causal, sinks=sinks,
                slopes=alibi_slopes(q.shape[1]) if self.alibi else None,
                **{**self.options, "window": (left, 0 if self.causal and left >= 0 else left)},
            )  # fmt: skip

        def run(self, q, paged_kv_cache, *, k_scale=1.0, v_scale=1.0, out=None):
            return into(out, self.attend(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale))

    class Prefill(Wrapper):
        def plan(
            self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
            num_qo_heads, num_kv_heads, head_dim_qk, page_size, *, causal, **features,
        ):  # fmt: skip
            self.pages(
                paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
                num_kv_heads, head_dim_qk, page_size,
            )  # fmt: skip
            self.cu_q, self.causal = qo_indptr, causal
            self.features(**features)

    class Sinks(Prefill):
        def __init__(
            self, float_workspace_buffer, kv_layout="NHD", *, backend="auto", q_data_type,
            kv_data_type, head_dim_qk, head_dim_vo, window_left,
        ):  # fmt: skip
            super().__init__(float_workspace_buffer, kv_layout, backend=backend)
            self.made = window_left

        def run(self, q, paged_kv_cache, sink, sm_scale, *, out=None):
            assert sink.dtype == torch.float32
            assert sm_scale == self.options["scale"]
            assert self.made == self.options["window"][0]
            return into(out, self.attend(q, paged_kv_cache, sinks=sink))

    class Decode(Wrapper):
        backends = ("auto",)

        def __init__(self, float_workspace_buffer, kv_layout="NHD", *, use_tensor_cores=False):
            super().__init__(float_workspace_buffer, kv_layout)

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            **features,
        ):  # fmt: skip
            self.pages(
                indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size
            )
            self.cu_q, self.causal = torch.arange(len(indptr), dtype=torch.int32), True
            self.features(**features)

    class Ragged(Wrapper):
        def plan(
            self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, causal,
            **features,
        ):  # fmt: skip
            self.starts, self.causal = (qo_indptr, kv_indptr), causal
            self.features(**features)

        def run(self, q, k, v, *, out=None):
            assert (q.dtype, k.dtype) == self.dtypes
            return into(
                out,
                stand_in_attention(
                    q,
                    k,
                    v,
                    cu_q=self.starts[0],
                    cu_k=self.starts[1],
                    causal=self.causal,
                    **self.options,
                ),
            )

    module(
        monkeypatch,
        "flashinfer",
        BatchPrefillWithPagedKVCacheWrapper=Prefill,
        BatchPrefillWithRaggedKVCacheWrapper=Ragged,
        BatchDecodeWithPagedKVCacheWrapper=Decode,
        BatchAttentionWithAttentionSinkWrapper=Sinks,
    )


def install_vllm_triton(monkeypatch):
    class KVQuantMode:
        NONE, FP8_PER_TENSOR = 0, 1

    def unified_attention(
        q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
        window_size, block_table, softcap, q_descale, k_descale, v_descale, seq_threshold_3D=None,
        num_par_softmax_segments=None, softmax_segm_output=None, softmax_segm_max=None,
        softmax_segm_expsum=None, alibi_slopes=None, output_scale=None, qq_bias=None, sinks=None,
        mm_prefix_range=None, use_alibi_sqrt=False, kv_quant_mode=KVQuantMode.NONE,
        k_scale_cache=None, v_scale_cache=None, chunk_lookback=-1, use_td=False,
    ):  # fmt: skip
        assert causal
        if max_seqlen_q == 1:
            shape = (*q.shape[:2], num_par_softmax_segments)
            assert softmax_segm_max.shape == softmax_segm_expsum.shape == shape
            assert softmax_segm_output.shape[:3] == shape
            assert softmax_segm_output.shape[3] >= q.shape[2]
            assert softmax_segm_output.dtype == softmax_segm_max.dtype == torch.float32
        assert (k.dtype.itemsize == 1) == (kv_quant_mode == KVQuantMode.FP8_PER_TENSOR)
        if k.dtype.itemsize == 1:
            assert k_descale.numel() == v_descale.numel() == 1
            k, v = k.float() * k_descale, v.float() * v_descale
        into(
            out,
            stand_in_attention(
                q,
                k,
                v,
                cu_q=cu_seqlens_q,
                used_k=seqused_k,
                table=block_table,
                causal=True,
                window=window_size,
                cap=softcap,
                slopes=alibi_slopes,
                sinks=sinks,
                scale=softmax_scale,
            ),
        )

    name = "vllm.v1.attention.ops.triton_unified_attention"
    module(monkeypatch, name, unified_attention=unified_attention)
    module(monkeypatch, "vllm.v1.kv_cache_interface", KVQuantMode=KVQuantMode)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    assert query.shape[1] == key.shape[1]
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    left, right = window_size
    return stand_in_attention(
        query, key, value, cu_q=cu_seq_q, cu_k=cu_seq_k, causal=right == 0,
        window=(left, right), scale=scale,
    )  # fmt: skip


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    heads = key.shape[-2]
    assert enable_gqa == (query.shape[1] != heads)
    assert (block_table is None) == (cu_seq_k is not None)
    left, right = window_size
    return stand_in_attention(
        query, key, value, cu_q=cu_seq_q, cu_k=cu_seq_k, used_k=seqused_k, table=block_table,
        causal=right == 0, window=(left, right), scale=scale,
    )  # fmt: skip


def install_varlen(function):
    return lambda monkeypatch: module(
        monkeypatch, "torch.nn.attention.varlen", varlen_attn=function
    )
