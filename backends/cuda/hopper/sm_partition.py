"""How a prefill and the decodes of the same batch share the SMs of a Hopper GPU.

One after the other, the tensor cores wait while the decodes read, and memory waits while the
prefill computes. At the same time, both are busy. POD-Attention (arXiv:2410.18038) runs both on
each SM; here each has its own SMs. How many follows from the throughput of an SM. The figures are
an H200's, and only their ratios matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["SMShares", "share_sms", "side_stream"]

#: Head size -> floating-point operations of the prefill kernel, per second and SM.
_FLOPS = {64: 3.4e12, 128: 5.4e12, 256: 5.4e12}
#: Head size -> bytes that decodes read on one SM next to a prefill, per second.
_BYTES = {64: 60e9, 128: 80e9, 256: 80e9}
#: And on all SMs together.
_ALL_BYTES = 4.1e12
#: The least saving that is worth it, as a part of the time one after the other; and the least such
#: time in seconds, since two streams take the host longer.
_MIN_SAVING, _MIN_SECONDS = 0.05, 150e-6


@dataclass(frozen=True)
class SMShares:
    """How many SMs the prefill and the decodes have."""

    prefill: int
    decode: int


def share_sms(
    spec: AttentionSpec,
    batch: AttentionBatch,
    is_decode: list[bool],
    num_tiles: int,
    num_sms: int,
) -> SMShares | None:
    """How to share the SMs; None if one after the other is about as fast.

    Args:
        spec: the layers.
        batch: the requests.
        is_decode: for each of them, whether the decode kernel takes it.
        num_tiles: work tiles of the prefills, of all heads.
        num_sms: of the device.
    """
    if kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype) != spec.dtype:
        return None  # the portable kernel does the decodes; its blocks share SMs
    window = spec.sliding_window or batch.max_seq_len
    read = 0  # keys of the decodes
    seen = 0.0  # pairs of query and key of the prefills
    lens = zip(is_decode, batch.query_lens, batch.seq_lens_list, strict=True)
    for only_reads, queries, keys in lens:
        if only_reads:
            read += min(keys, window + queries)
        else:
            seen += queries * max(0.0, min(keys - spec.causal * queries / 2, window))
    num_bytes = read * spec.num_kv_heads * 2 * spec.head_size * spec.dtype.itemsize
    if not (seen and num_bytes):
        return None
    work = 4 * seen * spec.head_size * spec.num_heads / _FLOPS[spec.head_size]
    tile_time, speed = work / num_tiles, _BYTES[spec.head_size]

    # All work tiles take about the same time, so the prefill takes a whole number of waves.
    in_turn = -(-num_tiles // num_sms) * tile_time + num_bytes / _ALL_BYTES
    if in_turn < _MIN_SECONDS:
        return None
    balanced = num_sms * work / (work + num_bytes / speed)  # SMs of the prefill
    best, best_time = None, (1 - _MIN_SAVING) * in_turn
    waves = int(num_tiles / balanced)
    for count in (waves, waves + 1):
        prefill = -(-num_tiles // count) if count else num_sms
        if prefill >= num_sms:
            continue
        decode = num_sms - prefill
        time = max(count * tile_time, num_bytes / min(speed * decode, _ALL_BYTES))
        if time < best_time:
            best, best_time = SMShares(prefill, decode), time
    return best


@functools.cache
def side_stream(device: torch.device) -> Any:
    """A stream of higher priority, for the prefill, whose programs have an SM each."""
    return torch.cuda.Stream(device, priority=-1)
