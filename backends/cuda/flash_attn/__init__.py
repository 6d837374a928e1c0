"""FLASH_ATTN: every package that brings FlashAttention for NVIDIA GPUs."""
