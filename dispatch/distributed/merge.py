"""merge_states over the ranks of a group, each of which attended to its own keys."""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch.arguments import shown
from attn_dispatch.backends.triton.merge import merge_kernels
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch_checks import is_readable
from attn_dispatch.interface.validation import check_no_grad
from attn_dispatch.runtime.functional import check_states, merge_parts
from attn_dispatch.runtime.guard import FinalFailure

__all__ = ["COMBINES", "HEADS", "check_choice", "merge_over_ranks", "merge_states_distributed"]

#: How parts are combined; "auto" is "a2a", which takes one collective in place of two.
COMBINES = ("auto", "a2a", "ag_rs")

#: Which heads a rank gets.
HEADS = ("scatter", "replicate")

#: Parts of a message begin at multiples of this, so that any dtype can be viewed.
_ALIGNMENT_BYTES = 16


def merge_states_distributed(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Any = None,
    *,
    sinks: torch.Tensor | None = None,
    heads: str = "scatter",
    combine: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention of all ranks, over disjoint sets of keys, into that over all keys.

    Every rank of the group calls it, with the same shapes, dtypes and options; that is not
    checked. The bits of the result do not differ between runs, as parts are added in the order of
    the ranks ("a2a"), or in that of the library's reduction ("ag_rs").

    Args:
        out: (num_tokens, num_heads, head_size_v), this rank's part; the same heads on each rank.
        lse: (num_tokens, num_heads) float32 or float64, natural log. It is −inf for a row without
            a key on this rank; the row of `out` is ignored then.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks.
        sinks: one logit for each head that this rank gets, added once; the parts were computed
            without them.
        heads: "scatter": rank r of W gets the r-th of W equal ranges of heads. "replicate": every
            rank gets all heads.
        combine: "a2a": outputs and lse go in one message: by an all-to-all; or, with "replicate",
            an all-gather. "ag_rs": an all-gather of the lse, then a reduce-scatter of the weighted
            outputs in float32, or with "replicate" an all-reduce. "auto": "a2a".

    Returns:
        The merged output in the dtype of `out`, and its lse in that of `lse`, without the sinks:
        (num_tokens, num_heads / W, head_size_v) and (num_tokens, num_heads / W); all heads with
        "replicate". Rows without a key on any rank are 0 and −inf.

    Raises:
        InvalidInputError: the tensors do not fit each other, the heads cannot be scattered evenly,
            an option is unknown, or a tensor requires a gradient. Nothing has been sent then.
        BackendFailure: another rank raised, ended or timed out.

    Example:
        >>> out, lse = layer(query, key, value)  # over this rank's keys, with returns_lse
        >>> out, lse = merge_states_distributed(out, lse, mesh["cp"])
    """
    check_choice("heads", heads, HEADS)
    check_choice("combine", combine, COMBINES)
    check_states([out], [lse], None)
    if torch.is_grad_enabled():
        check_no_grad(out, lse, sinks)
    ranks = Ranks(group)
    num_heads = out.shape[1]
    if heads == "scatter" and num_heads % ranks.size:
        raise InvalidInputError(
            f"{num_heads} heads cannot be scattered evenly over {ranks.size} ranks. Use "
            "heads='replicate'."
        )
    if sinks is not None:
        own = num_heads if heads == "replicate" else num_heads // ranks.size
        check_states([out[:, :own]], [lse[:, :own]], sinks)
    return merge_over_ranks(ranks, out, lse, sinks, heads, combine)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check that an option is one of its values.

    Raises:
        InvalidInputError: it is not.
    """
    if value not in choices:
        raise InvalidInputError(f"{name}={shown(value)} is not one of: {', '.join(choices)}.")


def merge_over_ranks(
    ranks: Ranks,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    heads: str,
    combine: str,
    *,
    failed: bool = False,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """merge_states_distributed for checked arguments.

    A rank whose attention raised calls it with `failed`, before it raises: the others get NaN, and
    raise where reading a tensor takes no wait for a device, or under ATTN_DISPATCH_CHECK=1. The
    merged output is written to `into`, in its dtype, if it is given.
    """
    method = _by_reduction if combine == "ag_rs" else _in_one_message
    return method(ranks, out, lse, sinks, heads, failed, into)


def _in_one_message(
    ranks: Ranks,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    heads: str,
    failed: bool,
    into: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each message has a flag, the outputs and the lse: (flag, num_tokens, heads, ...) in bytes.

    The LSE of a rank that failed is NaN.
    """
    pieces = 1 if heads == "replicate" else ranks.size
    tokens, size = len(out), out.shape[2]
    count = out.shape[1] // pieces
    out_bytes = tokens * count * size * out.element_size()
    lse_bytes = tokens * count * lse.element_size()
    lse_at = _ALIGNMENT_BYTES + _aligned(out_bytes)
    # Typed as the LSE, and with few views: this runs in every layer.
    width, inner = lse.element_size(), out.element_size()
    row = (lse_at + _aligned(lse_bytes)) // width

    def parts_of(each: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(each), tokens, count, size)
        strides = (row * width // inner, count * size, size, 1)
        at = each.storage_offset() * width
        outs = each.view(out.dtype).as_strided(shape, strides, (at + _ALIGNMENT_BYTES) // inner)
        return outs, each.as_strided(shape[:3], (row, count, 1), (at + lse_at) // width)

    message = lse.new_empty((pieces, row))
    outs, lses = parts_of(message)
    flags = message[:, 0]
    is_packed = merge_kernels.take(out, lse) and merge_kernels.pack(
        out, lse, outs, lses, flags, failed
    )
    if not is_packed:
        message.zero_()  # padding is sent, too
        outs.copy_(out.unflatten(1, (pieces, count)).transpose(0, 1))
        lses.copy_(lse.unflatten(1, (pieces, count)).transpose(0, 1))
        if failed:
            flags.fill_(1)
            lses.fill_(float("nan"))
    received = ranks.all_gather(message[0]) if pieces == 1 else ranks.all_to_all(message)
    if not failed and is_readable(received):
        _check_flags(ranks, received[:, 0] != 0)
    outs, lses = parts_of(received)
    return merge_parts((outs[0], lses[0]), (outs[1:], lses[1:]), sinks, into)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _by_reduction(
    ranks: Ranks,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    heads: str,
    failed: bool,
    into: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale this rank's outputs by their part in the softmax, and add those of all ranks."""
    lse = lse.masked_fill(lse == float("inf"), float("-inf"))
    flag = lse.new_full((1, lse.shape[1]), float(failed))
    gathered = ranks.all_gather(torch.cat([lse, flag]))
    flags = gathered[:, -1, 0] != 0
    lses = torch.where(flags[:, None, None], float("nan"), gathered[:, :-1])
    total = torch.logsumexp(lses, dim=0)
    weight = torch.exp(lse - total.masked_fill(total == float("-inf"), 0.0))
    # A part without keys may hold anything; any other NaN must stay visible.
    empty = (lse == float("-inf"))[..., None]
    own = torch.where(empty, 0.0, weight[..., None] * out.to(lse.dtype))
    if heads == "replicate":
        merged = ranks.all_reduce(own)
    else:
        merged = ranks.reduce_scatter(own.unflatten(1, (ranks.size, -1)).transpose(0, 1))
        total = total.unflatten(1, (ranks.size, -1))[:, ranks.rank]
    if not failed and is_readable(flags):
        _check_flags(ranks, flags)
    if sinks is not None:
        seen = torch.sigmoid(total - sinks.to(total.dtype))
        merged = torch.where((total == float("-inf"))[..., None], 0.0, merged * seen[..., None])
    merged = merged.to(out.dtype) if into is None else into.copy_(merged)
    return merged, total.contiguous()


def _check_flags(ranks: Ranks, flags: torch.Tensor) -> None:
    """Raise, after the last message, if another rank failed."""
    if bool(flags.any()):
        names = ", ".join(str(int(rank)) for rank in flags.nonzero()[:, 0])
        raise FinalFailure(
            f"Attention failed on rank {names} of the group of {ranks.size}, so rank {ranks.rank} "
            "has no result either. See the output of that rank."
        )
