"""SGLang's ForwardBatch as an AttentionBatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch

__all__ = ["batch_of_step", "check_step"]

#: Kinds of step that are served, by the names of ForwardMode.
MODES = ("DECODE", "EXTEND", "MIXED")

#: What a step can have that no layer here is given: it would be ignored, so it is rejected.
NOT_READ = (
    "spec_info",
    "multi_item_delimiter_indices",
    "cross_attention_custom_mask",
    "attn_cp_metadata",
    "attn_dcp_metadata",
)


def check_step(forward_batch: Any) -> None:
    """Reject a step that has what the plug-in does not read.

    Raises:
        UnsupportedError: it names the field, or the kind of step.
    """
    mode = forward_batch.forward_mode.name
    given = [name for name in NOT_READ if getattr(forward_batch, name, None) is not None]
    if mode not in MODES or given:
        what = f"a step of the kind {mode}" if mode not in MODES else f"a step with {given[0]}"
        raise UnsupportedError(
            f"attn-dispatch does not run {what} of SGLang; it runs {', '.join(MODES)}. Turn that "
            "feature of the server off, or use another --attention-backend."
        )


def batch_of_step(
    forward_batch: Any,
    num_reqs: int,
    req_to_token: torch.Tensor,
    page_size: int,
    translate: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> AttentionBatch:
    """The first requests of a step, over the pool of one group of layers.

    Args:
        forward_batch: the step.
        num_reqs: requests; the others only pad a graph's batch.
        req_to_token: (max_num_reqs, max_context_len) int32, the slot of each token of each request.
        page_size: of the pool; page 0 takes what padding writes.
        translate: slots to those of another pool, or None.
    """
    seq_lens = forward_batch.seq_lens_cpu[:num_reqs].tolist()
    if forward_batch.forward_mode.is_decode():
        query_lens = [1] * num_reqs
    else:
        query_lens = list(forward_batch.extend_seq_lens_cpu)
    longest = max(seq_lens, default=1)
    # A request's tokens fill its pages in order, so the first slot of a page gives the page.
    first_slots = req_to_token[:, : max(longest, 1) : page_size]
    first_slots = first_slots.index_select(0, forward_batch.req_pool_indices[:num_reqs].long())
    slots = forward_batch.out_cache_loc[: sum(query_lens)]
    if translate is not None:
        first_slots, slots = translate(first_slots.long()), translate(slots.long())
    return AttentionBatch.create(
        query_lens,
        seq_lens,
        block_table=(first_slots // page_size).to(torch.int32),
        block_size=page_size,
        slot_mapping=torch.where(slots < page_size, -1, slots),
        device=req_to_token.device,
    )
