"""Peers for multi-head latent attention: attention of absorbed queries over the cached latents.

None of them has the projections, so their times compare with the variant "latents" of a backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.implementations import Call
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.peers.base import Peer, call_of, first_of, only_known

__all__ = ["MLA_PEERS"]

#: The latent and rotated sizes that the kernels below are built for.
_SIZES = (512, 64)

#: Workspace for FlashInfer's plans, as its documentation recommends, twice.
_WORKSPACE_BYTES = 256 << 20

#: Parts into which vLLM's kernel splits the keys of a request, by the number of requests; and the
#: number from which a GPU is full without splitting further.
_FEW_SPLITS, _MANY_SPLITS, _MANY_REQUESTS = 8, 64, 32


class _LatentPeer(Peer):
    """A kernel over paged latents in 16 bits.

    Attributes:
        functions: "module:attribute" of the kernel, in the order of the search.
        same_query_lens: the requests of a call have the same number of new tokens.
        page_sizes: those that the kernel takes; empty for any.
    """

    functions: tuple[str, ...]
    same_query_lens = False
    page_sizes: tuple[int, ...] = ()

    def load(self) -> None:
        """See Peer."""
        self._function = self._find(*self.functions)

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        dims = case.mla_dims
        if dims is None:
            return "it is for multi-head latent attention"
        if (dims.kv_lora_rank, dims.qk_rope_head_dim) != _SIZES:
            return f"its latents have {_SIZES[0]} elements, and its rotated parts {_SIZES[1]}"
        if case.torch_dtype.itemsize != 2 or case.stored_dtype != case.torch_dtype:
            return "it takes queries and latents of one dtype in 16 bits"
        if case.sliding_window is not None or case.logits_soft_cap is not None:
            return "it does not compute sliding_window or logits_soft_cap"
        if self.same_query_lens and len(set(case.query_lens)) > 1:
            return "its requests have the same number of new tokens"
        if self.page_sizes and case.block_size not in self.page_sizes:
            return f"its pages have {', '.join(map(str, self.page_sizes))} tokens"
        return None


def _split(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and the rotated parts of queries or of cache entries, as views."""
    return entries[..., : _SIZES[0]], entries[..., _SIZES[0] :]


class FlashAttention3MLA(_LatentPeer):
    """FlashAttention 3, whose queries have a second part that is compared with the values."""

    name = "FlashAttention 3 q_v"
    functions = ("vllm.vllm_flash_attn:flash_attn_varlen_func",)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        case = inputs.case
        q_v, query = (part.contiguous() for part in _split(inputs.query))
        values, keys = _split(inputs.kv_cache[:, :, None])
        arguments: dict[str, Any] = {
            "q": query,
            "k": keys,
            "v": values,
            "q_v": q_v,
            "cu_seqlens_q": inputs.query_start_loc,
            "max_seqlen_q": max(case.query_lens),
            "max_seqlen_k": max(case.seq_lens),
            "seqused_k": inputs.seq_lens,
            "block_table": inputs.block_table,
            "softmax_scale": case.scale,
            "causal": True,
            "fa_version": 3,
        }
        return call_of(self._function, arguments)


class _FlashMLA(_LatentPeer):
    """FlashMLA's dense decode kernel. The first call makes the schedule, which later ones use."""

    same_query_lens = True
    page_sizes = (64,)

    def load(self) -> None:
        """See Peer."""
        super().load()
        self._plan: Callable[..., Any] = self._find(
            *(name.replace("flash_mla_with_kvcache", "get_mla_metadata") for name in self.functions)
        )

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        case = inputs.case
        (query_len,) = set(case.query_lens)
        query = inputs.query.unflatten(0, (-1, query_len))
        schedule = self._plan()[0]
        places = (inputs.block_table, inputs.seq_lens, _SIZES[0], schedule)
        options = {"softmax_scale": case.scale, "causal": query_len > 1, "use_legacy": True}
        options = only_known(self._function, options)
        cache = inputs.kv_cache[:, :, None]

        def call() -> torch.Tensor:
            return first_of(self._function(query, cache, *places, **options)).flatten(0, 1)

        return call


class FlashMLAOfVllm(_FlashMLA):
    """vLLM's build."""

    name = "FlashMLA (vLLM)"
    functions = ("vllm.third_party.flashmla.flash_mla_interface:flash_mla_with_kvcache",)


class FlashMLAOfSGLang(_FlashMLA):
    """SGLang's build, sgl-flash-mla; it has upstream's module name."""

    name = "FlashMLA (SGLang)"
    functions = ("flash_mla:flash_mla_with_kvcache",)


class FlashInferMLA(_LatentPeer):
    """FlashInfer's wrapper. Planning is not timed: an engine does it once per batch."""

    name = "FlashInfer MLA"
    functions = ("flashinfer.mla:BatchMLAPagedAttentionWrapper",)
    _workspace: torch.Tensor | None = None

    def variants(self, case: Case) -> Sequence[str]:
        """See Peer."""
        return ("fa3", "fa2")

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        if self._workspace is None or self._workspace.device != inputs.device:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)
        case, table = inputs.case, inputs.block_table
        counts = [-(-n // case.block_size) for n in case.seq_lens]
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        wrapper = self._function(self._workspace, backend=variant)
        wrapper.plan(
            inputs.query_start_loc,
            starts.to(inputs.device),
            torch.cat([table[request, :count] for request, count in enumerate(counts)]),
            inputs.seq_lens,
            case.num_heads,
            *_SIZES,
            case.block_size,
            max(case.query_lens) > 1,  # causal
            case.scale,
            case.torch_dtype,
            inputs.kv_cache.dtype,
        )
        queries = tuple(part.contiguous() for part in _split(inputs.query))
        cache = _split(inputs.kv_cache)
        return lambda: first_of(wrapper.run(*queries, *cache))


class VllmTritonMLA(_LatentPeer):
    """vLLM's Triton decode kernel, with buffers as its engine gives it."""

    name = "vLLM Triton MLA"
    functions = (
        "vllm.v1.attention.ops.triton_decode_attention:decode_attention_fwd",
        "vllm.attention.ops.triton_decode_attention:decode_attention_fwd",
    )

    def supports(self, case: Case) -> str | None:
        """See Peer."""
        if case.mla is not None and max(case.query_lens) > 1:
            return "its requests have one new token"
        return super().supports(case)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """See Peer."""
        case = inputs.case
        output = inputs.empty_output()
        requests = len(case.seq_lens)
        splits = _FEW_SPLITS if requests >= _MANY_REQUESTS else _MANY_SPLITS
        buffers: dict[str, Any] = {"dtype": torch.float32, "device": inputs.device}
        lse = torch.empty(requests, case.num_heads, **buffers)
        parts = torch.empty(requests, case.num_heads, splits, _SIZES[0] + 1, **buffers)
        keys = inputs.kv_cache[:, :, None]
        places = (inputs.block_table, inputs.seq_lens, parts, splits)

        def call() -> torch.Tensor:
            values = keys[..., : _SIZES[0]]
            self._function(
                inputs.query, keys, values, output, lse, *places, case.scale, case.block_size
            )
            return output

        return call


#: In the order of the list.
MLA_PEERS: tuple[type[Peer], ...] = (
    FlashAttention3MLA,
    FlashMLAOfVllm,
    FlashMLAOfSGLang,
    FlashInferMLA,
    VllmTritonMLA,
)
