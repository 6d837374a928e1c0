"""What the processes of support.ranks need, imported before they are forked."""

from attn_dispatch import (
    Attention,
    AttentionBatch,
    ContextParallel,
    MLAAttention,
    merge_states_distributed,
)
from attn_dispatch.backends.reference import torch_ref, torch_ref_mla, torch_sdpa

__all__ = [
    "Attention",
    "AttentionBatch",
    "ContextParallel",
    "MLAAttention",
    "merge_states_distributed",
    "torch_ref",
    "torch_ref_mla",
    "torch_sdpa",
]
