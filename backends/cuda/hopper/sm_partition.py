"""How a prefill and the decodes of the same batch share a Hopper GPU's SMs.

One after the other, the tensor cores wait while the decodes read, and memory waits while the
prefill computes; beside each other both are busy. POD-Attention (arXiv:2410.18038) has both in each
SM; here each has SMs of its own. How many follows from what an SM does in a second; the figures are
an H200's, and only their ratios count.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["Shares", "share_sms", "side_stream"]

#: Head size -> multiplications and additions of the prefill kernel, a second and SM.
_FLOPS = {64: 3.4e12, 128: 5.4e12, 256: 5.4e12}
#: Head size -> bytes that decodes read on one SM beside a prefill, a second.
_BYTES = {64: 60e9, 128: 80e9, 256: 80e9}
#: And on all SMs alone.
_ALL_BYTES = 4.1e12
#: What must be saved at least, as a share of the time one after the other; and that time in
#: seconds, since two streams take the host longer.
_SAVED, _WORTH = 0.05, 150e-6


@dataclass(frozen=True)
class Shares:
    """SMs for the prefill and for the decodes beside it."""

    prefill: int
    decode: int


def share_sms(
    spec: AttentionSpec,
    batch: AttentionBatch,
    is_decode: list[bool],
    num_pieces: int,
    num_sms: int,
) -> Shares | None:
    """How to share the SMs; None if one after the other is about as fast.

    Args:
        spec: the layers.
        batch: the requests.
        is_decode: for each of them, whether it is the decode kernel's.
        num_pieces: of work, of all heads, into which the prefills are cut.
        num_sms: of the device.
    """
    if kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype) != spec.dtype:
        return None  # decodes are the portable kernel's, whose blocks do not have an SM each
    window = spec.sliding_window or batch.max_seq_len
    read = 0  # keys, by the decodes
    seen = 0.0  # pairs of query and key, by the prefills
    for few, queries, keys in zip(is_decode, batch.query_lens, batch.seq_lens_list, strict=True):
        if few:
            read += min(keys, window + queries)
        else:
            seen += queries * max(0.0, min(keys - spec.causal * queries / 2, window))
    num_bytes = read * spec.num_kv_heads * 2 * spec.head_size * spec.dtype.itemsize
    if not (seen and num_bytes):
        return None
    work = 4 * seen * spec.head_size * spec.num_heads / _FLOPS[spec.head_size]
    piece, speed = work / num_pieces, _BYTES[spec.head_size]

    # All pieces take about the same, so that SMs pay in whole rounds of them.
    alone = -(-num_pieces // num_sms) * piece + num_bytes / _ALL_BYTES
    if alone < _WORTH:
        return None
    even = num_sms * work / (work + num_bytes / speed)
    best, best_time = None, (1 - _SAVED) * alone
    rounds = int(num_pieces / even)
    for count in (rounds, rounds + 1):
        prefill = -(-num_pieces // count) if count else num_sms
        if prefill >= num_sms:
            continue
        decode = num_sms - prefill
        time = max(count * piece, num_bytes / min(speed * decode, _ALL_BYTES))
        if time < best_time:
            best, best_time = Shares(prefill, decode), time
    return best


@functools.cache
def side_stream(device: torch.device) -> Any:
    """A stream whose kernels are placed first: the prefill's, which have an SM each."""
    return torch.cuda.Stream(device, priority=-1)
