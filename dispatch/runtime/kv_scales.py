"""The scales of a KV cache, shared by the layers that share the cache."""

from __future__ import annotations

import torch

from attn_dispatch.interface.quantization import (
    KVScales,
)

__all__ = []


class CacheState(KVScales):
    """What belongs to a cache, and is shared by the layers that share it.

    Attributes:
        scales_are_final: what is in the cache depends on the scales.
        token: stands for the cache in compiled graphs, see `ops.attention_op`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scales_are_final = False
        with torch.inference_mode(False):  # else it could only be used inside of that mode
            self.token = torch.zeros(1, device="cpu")

    def to(self, device: torch.device) -> None:
        super().to(device)
        with torch.inference_mode(False):
            self.token = self.token.to(device)
