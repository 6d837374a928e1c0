"""vLLM's metadata of a step as an AttentionBatch, without a copy and without waiting."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.integrations.vllm.private import exact_lengths_of
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType

__all__ = ["batch_of"]

#: What a step can bring that no layer here was made for -> what it is.
_REJECTED = {
    "mm_req_doc_ranges": "bidirectional ranges of images",
    "rswa_prefix_lens": "a sliding window with a visible prefix",
}


def batch_of(
    common: Any,
    spec: AttentionSpec,
    *,
    block_size: int,
    max_decode_query_len: int = 1,
    shared_prefix_len: int = 0,
) -> AttentionBatch:
    """The batch of a step.

    Requests without new tokens at the end pad the batch for CUDA graphs, and are left out.

    Args:
        common: a CommonAttentionMetadata.
        spec: of the layers.
        block_size: tokens per block of its block table.
        max_decode_query_len: as for AttentionBatch.
        shared_prefix_len: as for AttentionBatch.

    Raises:
        UnsupportedError: the step needs what these layers were not made for.
    """
    _check(common, spec)
    num_reqs = int(common.num_reqs)
    starts = common.query_start_loc_cpu[: num_reqs + 1].tolist()
    while num_reqs and starts[num_reqs] == starts[num_reqs - 1]:
        num_reqs -= 1
    num_tokens = starts[num_reqs]
    query_start_loc_cpu = common.query_start_loc_cpu[: num_reqs + 1].clone()
    more: dict[str, Any] = {}
    if AttentionType(spec.attn_type).has_kv_cache:
        seq_lens = common.seq_lens[:num_reqs]
        seq_lens_cpu = _host_lengths(common, spec, num_reqs)
        more = {
            "block_table": common.block_table_tensor[:num_reqs],
            "slot_mapping": common.slot_mapping[:num_tokens],
            "block_size": block_size,
            "lengths": spec.lengths,
            "max_decode_query_len": max_decode_query_len,
            "shared_prefix_len": shared_prefix_len,
        }
    else:  # the keys are those of the queries
        seq_lens = common.query_start_loc[: num_reqs + 1].diff()
        seq_lens_cpu = query_start_loc_cpu.diff()
    return AttentionBatch(
        query_start_loc=common.query_start_loc[: num_reqs + 1],
        query_start_loc_cpu=query_start_loc_cpu,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens_cpu,
        max_query_len=int(common.max_query_len),
        max_seq_len=max(int(common.max_seq_len), int(common.max_query_len)),
        **more,
    )


def _host_lengths(common: Any, spec: AttentionSpec, num_reqs: int) -> torch.Tensor:
    """(num_reqs,) int32, the keys of each request, or bounds of them."""
    bounds = exact_lengths_of(common)
    if bounds is None:
        bounds = common.seq_lens_cpu_upper_bound
    if bounds is not None:
        return bounds[:num_reqs].clone()
    if spec.lengths == "exact":
        raise UnsupportedError(
            "vLLM gives no seq_lens_cpu_upper_bound for this step, without speculative decoding. "
            "Use another --attention-backend, and report the case."
        )
    return torch.full((num_reqs,), int(common.max_seq_len), dtype=torch.int32)


def _check(common: Any, spec: AttentionSpec) -> None:
    found = [what for name, what in _REJECTED.items() if getattr(common, name, None) is not None]
    if common.causal is not spec.causal:
        found.append(f"causal={common.causal} in layers with causal={spec.causal}")
    if found:
        raise UnsupportedError(
            f"vLLM asks for {' and '.join(found)}, which attn-dispatch's plug-in does not have. "
            "Use another --attention-backend."
        )
