"""Fakes of the packages with kernels for latents, for machines without them or a GPU.

Each function has the signature of its release, checks every argument as the release does, or as it
relies on, and computes in float32 by the release's conventions. Rows that see no key are NaN, and
so is what no release defines. A hidden key is multiplied by zero, not left out.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import torch

__all__ = ["install_aiter", "install_flash_mla", "install_flashinfer", "install_vllm_flash_mla"]

RANK, SIZE = 512, 576


def require(condition, what):
    """Raise on arguments that the kernel cannot compute, even if it would not check them."""
    if not condition:
        raise RuntimeError(f"fake: {what}")


def _modules(monkeypatch, modules):
    for name, members in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def _check_loads(name, tensor):
    """16 bytes are loaded at a time, at multiples of 16."""
    require(tensor.stride(-1) == 1, f"{name} must have contiguous last dimension")
    steps = [tensor.data_ptr(), *(s * tensor.element_size() for s in tensor.stride()[:-1])]
    require(all(step % 16 == 0 for step in steps), f"{name} is not aligned: {tensor.stride()}")


def _check_int32(name, tensor, shape):
    require(tensor.dtype == torch.int32, f"{name} must have dtype int32, not {tensor.dtype}")
    require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    require(tensor.stride(-1) == 1, f"{name} must have contiguous last dimension")


def attend(query, rows, scale, causal):
    """One request, (tokens, heads, 576) over (keys, 576): output, and lse (tokens, heads)."""
    require(isinstance(scale, float) and scale > 0, "the largest score would be the smallest")
    query, rows = query.float(), rows.float()
    scores = torch.einsum("qhd,kd->qhk", query, rows) * scale
    if causal:
        ahead = torch.arange(len(rows)) - torch.arange(len(query))[:, None]
        scores = scores.masked_fill((ahead > len(rows) - len(query))[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    output = torch.einsum("qhk,kd->qhd", weights, rows[:, :RANK])
    nothing = (lse == -math.inf)[..., None] | torch.tensor(len(rows) == 0)
    return output.masked_fill(nothing, math.nan), lse.masked_fill(nothing[..., 0], math.nan)


# --- FlashMLA ---------------------------------------------------------------------------------


@dataclasses.dataclass
class FlashMLASchedMeta:
    """What the releases since 2025-12 fill in the first call."""

    made_for: tuple | None = None


def _state(q, seq_lens):
    return (*q.shape[:3], tuple(seq_lens.tolist()))


def _dense_decode(calls, q, k_cache, table, seq_lens, size_v, scale, causal):
    calls.append({"shape": tuple(q.shape), "causal": causal})
    batch, query_len, heads, size = q.shape
    require(batch > 0 and query_len > 0, "batch size must be positive")
    require(size == SIZE and size_v == RANK, "Unsupported head size")
    require(q.dtype in (torch.bfloat16, torch.float16) and k_cache.dtype == q.dtype, "dtypes")
    require(k_cache.shape[1:] == (64, 1, SIZE), "Currently page_block_size must be 64")
    require(scale * math.log2(math.e) * 1e33 > 2e30, "hidden scores would not be the lowest")
    _check_loads("q", q)
    _check_loads("k_cache", k_cache)
    _check_int32("block_table", table, (batch, table.shape[1]))
    _check_int32("cache_seqlens", seq_lens, (batch,))
    out = torch.empty(batch, query_len, heads, RANK, dtype=q.dtype)
    lse = torch.empty(batch, heads, query_len)
    for i, keys in enumerate(seq_lens.tolist()):
        used = table[i, : -(-keys // 64)].long()
        require(len(used) * 64 >= keys, "block_table has too few columns")
        rows = k_cache[used].flatten(0, 2)[:keys]
        values, found = attend(q[i], rows, scale, causal)
        out[i], lse[i] = values.to(q.dtype), found.T
    return out, lse


def _self_planning(calls, **options):
    """The functions of a release that plans in the first call; `options` are further arguments."""

    def get_mla_metadata(*args, **kwargs):
        require(not args and not kwargs, "nothing is needed")
        return FlashMLASchedMeta(), None

    def compute(q, k_cache, table, seq_lens, size_v, meta, num_splits, scale, causal):
        require(isinstance(meta, FlashMLASchedMeta), "must be of type FlashMLASchedMeta")
        require(num_splits is None, "num_splits must be None")
        if meta.made_for is None:
            meta.made_for = _state(q, seq_lens)
            calls.append("schedule")
        require(meta.made_for == _state(q, seq_lens), "the schedule is of other lengths")
        return _dense_decode(calls, q, k_cache, table, seq_lens, size_v, scale, causal)

    def current(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
        num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None,
        attn_sink=None, extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None,
        extra_topk_length=None, out=None,
    ):  # fmt: skip
        return compute(
            q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
            num_splits, softmax_scale, causal,
        )  # fmt: skip

    def sglang(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
        num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=None, indices=None,
        attn_sink=None, extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None,
        extra_topk_length=None, enable_batch_invariant=False, use_legacy=False, kv_format=None,
        descale_q=None, descale_k=None,
    ):  # fmt: skip
        require(use_legacy, "Sparse attention is required: `indices` must be provided.")
        return current(
            q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
            num_splits, softmax_scale, causal,
        )  # fmt: skip

    def sparse_only(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
        num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=True, indices=None,
        attn_sink=None, enable_batch_invariant=False,
    ):  # fmt: skip
        raise AssertionError("Sparse attention is required: `indices` must be provided.")

    function = {"current": current, "sglang": sglang, "sparse": sparse_only}[options["release"]]
    made = {"get_mla_metadata": get_mla_metadata, "flash_mla_with_kvcache": function}
    if options["release"] == "sglang":
        made["has_legacy"] = lambda: options.get("has_legacy", True)
    return made


def _caller_planned(calls):
    """The functions of the releases of 2025, whose callers plan."""

    def get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k):
        calls.append("schedule")
        require(num_heads_k == 1 and isinstance(num_heads_per_head_k, int), "rows per request")
        made_for = (num_heads_per_head_k, tuple(cache_seqlens.tolist()))
        return SimpleNamespace(made_for=made_for), torch.zeros(len(cache_seqlens) + 1)

    def flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        shape = _state(q, cache_seqlens)
        require(
            tile_scheduler_metadata.made_for == (shape[1] * shape[2], shape[3]),
            "the schedule is of other lengths",
        )
        require(len(num_splits) == len(q) + 1, "num_splits must have shape (batch_size + 1)")
        return _dense_decode(
            calls, q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal
        )

    return {"get_mla_metadata": get_mla_metadata, "flash_mla_with_kvcache": flash_mla_with_kvcache}


def install_flash_mla(monkeypatch, release="sglang", **options):
    """Install the fake `flash_mla`; returns its calls.

    Args:
        monkeypatch: the fixture.
        release: "sglang" (1.0.0), "2025" (caller plans), "current" or "sparse" (2026-09-30).
        **options: has_legacy, of SGLang's.
    """
    calls = []
    made = _caller_planned(calls) if release == "2025" else None
    made = made or _self_planning(calls, release=release, **options)
    _modules(monkeypatch, {"flash_mla": made})
    return calls


def install_vllm_flash_mla(monkeypatch):
    """Install the fake FlashMLA of vLLM 0.24; returns its calls."""
    calls = []
    modules = {name: {} for name in ("vllm", "vllm.third_party", "vllm.third_party.flashmla")}
    modules["vllm._flashmla_C"] = {}
    functions = _self_planning(calls, release="current")
    modules["vllm.third_party.flashmla.flash_mla_interface"] = functions
    _modules(monkeypatch, modules)
    return calls


# --- FlashInfer -------------------------------------------------------------------------------


@dataclasses.dataclass
class MLAPlanMetadata:
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_len_arr: torch.Tensor

    @classmethod
    def csr(cls, qo_indptr, kv_indptr, kv_indices, kv_len_arr):
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)


def _lens(starts):
    values = starts.tolist()
    require(values[0] == 0 and values == sorted(values), f"starts are {values}")
    return [b - a for a, b in zip(values, values[1:], strict=False)]


class BatchMLAPagedAttentionWrapper:
    """As in 0.7.2. `plans` lists what every wrapper planned."""

    plans: ClassVar[list[dict]] = []

    def __init__(
        self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None,
        kv_indices=None, kv_len_arr=None, backend="auto",
    ):  # fmt: skip
        require(float_workspace_buffer.numel() >= 128 << 20, "the workspace has 128 MB or more")
        require(backend in ("fa2", "fa3") and not use_cuda_graph, "unused here")
        self.backend, self.planned = backend, None

    def plan(
        self, *, metadata, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale,
        q_data_type, kv_data_type, use_profiler=False, query_layout="packed",
        kv_cache_layout="packed", lse_mode="none", output_dtype=None, output_scale="none",
        scale_mode="default", skip_softmax=False, enable_pdl=None, use_sinks=False,
    ):  # fmt: skip
        on_host = (metadata.qo_indptr, metadata.kv_indptr, metadata.kv_len_arr)
        for tensor in (*on_host, metadata.kv_indices):
            require(tensor.dtype == torch.int32 and tensor.is_contiguous(), "metadata is int32")
        require(all(t.device.type == "cpu" for t in on_host), "else plan waits for it")
        query_lens, pages = _lens(metadata.qo_indptr), _lens(metadata.kv_indptr)
        key_lens = metadata.kv_len_arr.tolist()
        require(len(query_lens) == len(pages) == len(key_lens) > 0, "one for each request")
        require(pages == [-(-n // page_size) for n in key_lens], "page counts")
        require(len(metadata.kv_indices) == sum(pages), "there is each page")
        is_fp8 = kv_data_type == torch.float8_e4m3fn
        require(
            scale_mode == ("kv-per-tensor" if is_fp8 else "default"), f"scale_mode={scale_mode}"
        )
        require(is_fp8 or kv_data_type == q_data_type, "keys are as queries, or fp8")
        require(not is_fp8 or q_data_type == torch.bfloat16, "fp8 goes with bfloat16")
        require((head_dim_ckv, head_dim_kpe) == (RANK, SIZE - RANK), "sizes")
        tile = 64 * (2 if sum(query_lens) * num_heads // len(query_lens) > 64 else 1)
        tiles = sum(-(-n * num_heads // tile) for n in query_lens)
        require(2 * tiles + 132 <= 16384, f"{tiles} tiles may need more than 16384 work items")
        require(not causal or tile % num_heads == 0, "a tile boundary would omit a visible key")
        self.planned = SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})
        self.plans.append({"query_lens": query_lens, "key_lens": key_lens, "causal": causal})

    def run(
        self, *, query, kv_cache, out=None, lse=None, return_lse=False, profiler_buffer=None,
        kv_len=None, page_table=None, return_lse_base_on_e=False, o_scale=None, ckv_scale=None,
        ckv_scale_arr=None, kpe_scale=None, sinks=None, skip_softmax_threshold_scale_factor=None,
        bmm1_scale=None, bmm2_scale=None,
    ):  # fmt: skip
        plan = self.planned
        mode = ("basee" if return_lse_base_on_e else "base2") if return_lse else "none"
        require(mode == plan.lse_mode, f"LSE mode {plan.lse_mode} was planned")
        is_fp8 = kv_cache.dtype == torch.float8_e4m3fn
        require((query.dtype, kv_cache.dtype) == (plan.q_data_type, plan.kv_data_type), "dtypes")
        require((ckv_scale is not None) == (kpe_scale is not None) == is_fp8, "scales go with fp8")
        require(query.shape == (sum(plan.query_lens), plan.num_heads, SIZE), "query's shape")
        require(kv_cache.shape[1:] == (plan.page_size, SIZE), "kv_cache's shape")
        require(out.shape == (*query.shape[:2], RANK) and out.is_contiguous(), "out fits")
        for name, tensor in (("query", query), ("kv_cache", kv_cache), ("out", out)):
            _check_loads(name, tensor)
        starts = plan.metadata.qo_indptr.tolist()
        pages = plan.metadata.kv_indices.long().split(plan.pages)
        for i, keys in enumerate(plan.key_lens):
            rows = kv_cache[pages[i]].float().flatten(0, 1)[:keys]
            if is_fp8:
                scales = torch.tensor([ckv_scale] * RANK + [kpe_scale] * (SIZE - RANK))
                rows = rows * scales
            place = slice(starts[i], starts[i + 1])
            values, found = attend(query[place], rows, plan.sm_scale, plan.causal)
            out[place] = values.to(out.dtype)
            if return_lse:
                lse[place] = found
        return (out, lse) if return_lse else out


def install_flashinfer(monkeypatch):
    """Install the fake `flashinfer`; returns the plans that are made."""
    BatchMLAPagedAttentionWrapper.plans = plans = []
    members = {
        "BatchMLAPagedAttentionWrapper": BatchMLAPagedAttentionWrapper,
        "MLAPlanMetadata": MLAPlanMetadata,
    }
    _modules(monkeypatch, {"flashinfer": {}, "flashinfer.mla": members})
    return plans


# --- AITER ------------------------------------------------------------------------------------


def install_aiter(monkeypatch):
    """Install the fake `aiter`; returns its calls."""
    calls = []

    def mla_decode_fwd(
        q, kv_buffer, o, qo_indptr, kv_indptr, kv_indices, kv_last_page_lens, max_seqlen_q,
        page_size=1, nhead_kv=1, sm_scale=None, logit_cap=0.0, num_kv_splits=None,
        num_kv_splits_indptr=None, work_meta_data=None, work_indptr=None, work_info_set=None,
        reduce_indptr=None, reduce_final_map=None, reduce_partial_map=None, q_scale=None,
        kv_scale=None, intra_batch_mode=False, return_logits=False, return_lse=False,
        g_kv_indptr=None, cp_world_size=1, cp_rank=0, causal=True,
    ):  # fmt: skip
        calls.append(len(q))
        require((page_size, nhead_kv, logit_cap, max_seqlen_q) == (1, 1, 0.0, 1), "unused here")
        require(q.shape[1] in (16, 128), f"nhead={q.shape[1]} not supported")
        require(q.dtype == kv_buffer.dtype == torch.bfloat16, "dtypes")
        require(kv_buffer.shape[1:] == (1, 1, SIZE) and kv_buffer.is_contiguous(), "kv_buffer")
        require(q.is_contiguous() and o.is_contiguous(), "q and o are contiguous")
        require(o.shape == (*q.shape[:2], RANK), "o fits")
        _check_int32("qo_indptr", qo_indptr, (len(q) + 1,))
        _check_int32("kv_indptr", kv_indptr, (len(q) + 1,))
        _check_int32("kv_last_page_lens", kv_last_page_lens, (len(q),))
        require(bool((kv_last_page_lens == 1).all()), "a page has one token")
        require(_lens(qo_indptr) == [1] * len(q), "one token for each request")
        lens = _lens(kv_indptr)
        _check_int32("kv_indices", kv_indices, (sum(lens),))
        require(min(lens) > 0, "a request without keys")
        for i, slots in enumerate(kv_indices.long().split(lens)):
            o[i : i + 1] = attend(q[i : i + 1], kv_buffer[slots, 0, 0], sm_scale, False)[0]
        return o, None

    _modules(monkeypatch, {"aiter": {}, "aiter.mla": {"mla_decode_fwd": mla_decode_fwd}})
    return calls
