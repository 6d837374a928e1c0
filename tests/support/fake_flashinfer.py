"""FlashInfer's wrappers in PyTorch, with the signatures and conventions of 0.7.2.

They raise where FlashInfer would read out of bounds or drop an argument. They have its weaknesses:
rows that see no key are NaN, and a masked value is multiplied by zero, not left out.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LOG2E = math.log2(math.e)


def require(condition, what):
    """Raise on arguments that FlashInfer cannot compute, even if it would not check them."""
    if not condition:
        raise ValueError(f"fake FlashInfer: {what}")


#: The wrappers made in a test.
MADE = []
#: The kernels for sinks that the process has compiled, by FlashInfer's name for them.
COMPILED = {}


class BatchPrefillWithPagedKVCacheWrapper:
    has_sinks = False

    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
        custom_mask_buf=None, mask_indptr_buf=None, backend="auto", jit_args=None,
        jit_kwargs=None, variant_owns_mask=False,
    ):  # fmt: skip
        require(float_workspace_buffer.dtype == torch.uint8, "the workspace has bytes")
        require(float_workspace_buffer.numel() >= 128 << 20, "the workspace has 128 MB or more")
        require(kv_layout in ("NHD", "HND"), f"there is no layout {kv_layout!r}")
        require(backend in ("fa2", "fa3"), f"backend={backend!r} is not supported here")
        require((jit_args, custom_mask_buf, mask_indptr_buf) == (None,) * 3, "unused here")
        self.kv_layout, self.backend = kv_layout, backend
        self.device = float_workspace_buffer.device
        self.use_cuda_graph = use_cuda_graph
        self.buffers = None
        self.planned = None
        if use_cuda_graph:
            self.buffers = (
                qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf,
                paged_kv_last_page_len_buf,
            )  # fmt: skip
            for buffer in self.buffers:
                require(buffer.dtype == torch.int32, "buffers are int32")
                require(buffer.device == self.device, "buffers are on the device")
            size = len(qo_indptr_buf) - 1
            require(len(paged_kv_indptr_buf) == size + 1, "paged_kv_indptr_buf fits")
            require(len(paged_kv_last_page_len_buf) == size, "paged_kv_last_page_len_buf fits")
        MADE.append(self)

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None,
        packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
        o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
        token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None,
        block_tables=None, max_token_per_sequence=None, max_sequence_kv=None,
        fixed_split_size=None, disable_split_kv=False, uniform_q_len=None,
    ):  # fmt: skip
        size = len(qo_indptr) - 1
        on_host = {
            "qo_indptr": qo_indptr,
            "paged_kv_indptr": paged_kv_indptr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        for name, tensor in on_host.items():
            require(tensor.device.type == "cpu", f"{name} is on the host, else plan waits for it")
            require(tensor.dtype == torch.int32 and tensor.is_contiguous(), f"{name} is int32")
        for name, starts in list(on_host.items())[:2]:
            require(len(starts) == size + 1 and int(starts[0]) == 0, f"{name} has a start for each")
            require(bool((starts[1:] >= starts[:-1]).all()), f"{name} never falls")
        require(len(paged_kv_last_page_len) == size, "paged_kv_last_page_len has one for each")
        last = paged_kv_last_page_len
        require(bool(((last >= 1) & (last <= page_size)).all()), "a last page has 1 token or more")
        require(bool((paged_kv_indptr[1:] > paged_kv_indptr[:-1]).all()), "each has a page")
        require(paged_kv_indices.dtype == torch.int32, "paged_kv_indices are int32")
        require(paged_kv_indices.device == self.device, "paged_kv_indices are on the device")
        require(len(paged_kv_indices) == int(paged_kv_indptr[-1]), "there is each page")
        require(head_dim_qk in (64, 128, 256) and head_dim_vo in (None, head_dim_qk), "head_dim")
        require(num_qo_heads % num_kv_heads == 0, "heads are shared evenly")
        require(isinstance(causal, bool), "causal is a bool")
        require(-1 <= window_left < 2**31 - 2**20, "window_left is an int32 that can be added to")
        require(q_data_type in (torch.float16, torch.bfloat16), "queries have 16 bits")
        require(kv_data_type in (q_data_type, *FP8), "keys are as queries, or fp8")
        require(not (self.backend == "fa3" and kv_data_type in FP8), "fa3 has no such kernel")
        require(not (kv_data_type in FP8 and head_dim_qk == 64), "fp8 pages of 64 are not loaded")
        require((custom_mask, packed_custom_mask) == (None, None), "masks are not in use")
        require(pos_encoding_mode == "NONE" and not use_fp16_qk_reduction, "neither are these")
        require(logits_soft_cap is None or not self.has_sinks, "sinks would drop the cap")
        if self.use_cuda_graph:
            require(size == len(self.buffers[0]) - 1, "a graph's batch has one size")
            require(len(paged_kv_indices) <= len(self.buffers[2]), "the pages fit into the buffer")
            given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
            for buffer, values in zip(self.buffers, given, strict=True):
                buffer[: len(values)].copy_(values)
        else:
            self.buffers = tuple(
                tensor.to(self.device, copy=True)
                for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices, last)
            )
        self.planned = SimpleNamespace(
            heads=(num_qo_heads, num_kv_heads, head_dim_qk),
            page_size=page_size,
            causal=causal,
            sm_scale=head_dim_qk**-0.5 if sm_scale is None else sm_scale,
            window_left=window_left,
            cap=logits_soft_cap or 0.0,
            dtypes=(q_data_type, kv_data_type, o_data_type or q_data_type),
            num_rows=int(qo_indptr[-1]),
        )

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
        lse=None, return_lse=False, lse_base="log2", lse_layout="NH", enable_pdl=None,
        window_left=None, sinks=None, kv_cache_sf=None, skip_softmax_threshold_scale_factor=None,
        use_fp16_softmax=None, uses_spcompress=None,
    ):  # fmt: skip
        plan = self.planned
        require(plan is not None, "plan comes first")
        require(sinks is None, "this kernel would drop sinks")
        require((lse, lse_base, lse_layout) == (None, "log2", "NH"), "defaults are used")
        heads, kv_heads, size = plan.heads
        require(q.shape == (plan.num_rows, heads, size), f"q has shape {tuple(q.shape)}")
        check_loads(q)
        parts = paged_kv_cache
        if not isinstance(parts, tuple):
            require(parts.dim() == 5 and parts.shape[1] == 2, f"the cache is {tuple(parts.shape)}")
            parts = parts.unbind(1)
        require(parts[0].stride() == parts[1].stride(), "keys and values have the same strides")
        parts = [part if self.kv_layout == "NHD" else part.transpose(1, 2) for part in parts]
        for part in parts:
            require(
                part.shape[1:] == (plan.page_size, kv_heads, size),
                f"the cache has parts of shape {tuple(part.shape)}",
            )
            check_loads(part)
            require((q.dtype, part.dtype) == plan.dtypes[:2], "dtypes are those planned for")
        for scale in (q_scale, k_scale, v_scale):
            require(scale is None or type(scale) is float, "scales are floats")
        scale = plan.sm_scale * (1.0 if q_scale is None else q_scale)
        scale *= 1.0 if k_scale is None else k_scale
        sinks, scale = self._additional(args, scale, heads)
        require(scale > 0, "scores keep their order")
        if out is None:
            out = torch.zeros_like(q)
        require(out.shape == q.shape and out.dtype == plan.dtypes[2], "out fits")
        require(out.is_contiguous(), "out is taken for contiguous")
        check_loads(out)
        found = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        q_starts, kv_starts, pages, last = (buffer.tolist() for buffer in self.buffers)
        for i, last_len in enumerate(last):
            rows, blocks = (
                slice(q_starts[i], q_starts[i + 1]),
                pages[kv_starts[i] : kv_starts[i + 1]],
            )
            require(0 <= min(blocks) <= max(blocks) < len(parts[0]), f"page {blocks} is not there")
            num_keys = (len(blocks) - 1) * plan.page_size + last_len
            chosen = torch.tensor(blocks, device=q.device)
            keys, values = (part[chosen].float().flatten(0, 1)[:num_keys] for part in parts)
            result, found[rows] = self._attend(q[rows].float(), keys, values, scale, sinks)
            out[rows] = result.to(out.dtype)
        if v_scale is not None:
            out *= v_scale
        return (out, found) if return_lse else out

    def _additional(self, args, scale, heads):
        require(args == (), "there are no more arguments")
        return None, scale

    def _attend(self, q, keys, values, scale, sinks):
        """(rows, heads, size) and (rows, heads): the output, and the log-sum-exp in base 2."""
        plan, group = self.planned, q.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
        if plan.cap:
            scores = plan.cap * torch.tanh(scores / plan.cap)
        num_rows, num_keys = q.shape[0], keys.shape[0]
        row = torch.arange(num_rows, device=q.device)[:, None]
        column = torch.arange(num_keys, device=q.device)
        seen = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device)
        if plan.causal:
            seen &= column <= row + num_keys - num_rows
        if plan.window_left >= 0:
            seen &= column + num_rows + plan.window_left >= num_keys + row
        scores = scores.masked_fill(~seen, -math.inf)
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp2((scores - largest) * LOG2E)  # NaN where nothing is seen
        total = weights.sum(-1, keepdim=True)
        lse = largest * LOG2E + torch.log2(total)
        if sinks is not None:
            total = total + torch.exp2((sinks[:, None, None] - largest) * LOG2E)
        result = torch.einsum("hqk,khd->qhd", weights / total, values)
        return result, lse[..., 0].t()


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """As in FlashInfer, a compiled kernel for sinks is looked up by three of its properties."""

    has_sinks = True

    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
        custom_mask_buf=None, mask_indptr_buf=None, backend="auto", pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        head_dim_qk=128, head_dim_vo=128, window_left=-1,
    ):  # fmt: skip
        sizes = (head_dim_qk, head_dim_vo, kv_data_type)
        name = (q_data_type, window_left >= 0, backend)
        require(COMPILED.setdefault(name, sizes) == sizes, "another kernel has this name")
        self.settled = (q_data_type, kv_data_type, head_dim_qk, window_left >= 0)
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf,
            paged_kv_indices_buf, paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf,
            backend,
        )  # fmt: skip

    def _additional(self, args, scale, heads):
        plan = self.planned
        asked = (*plan.dtypes[:2], plan.heads[2], plan.window_left >= 0)
        require(self.settled == asked, "the kernel is the one that was compiled")
        require(scale == plan.sm_scale, "this kernel has no scale but its argument")
        sinks, scale = args
        require(sinks.shape == (heads,) and sinks.dtype == torch.float32, "sinks are float32")
        require(sinks.is_contiguous(), "sinks are contiguous")
        return sinks, scale


def check_loads(tensor):
    """Check that 16 bytes can be loaded at a time, at multiples of 16."""
    steps = [step * tensor.element_size() for step in tensor.stride()[:-1]]
    require(tensor.stride(-1) == 1, "a head's elements are next to each other")
    require(not any(step % 16 for step in (tensor.data_ptr(), *steps)), "loads are aligned")


#: The module for `import flashinfer`.
MODULE = SimpleNamespace(
    BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    BatchAttentionWithAttentionSinkWrapper=BatchAttentionWithAttentionSinkWrapper,
)
