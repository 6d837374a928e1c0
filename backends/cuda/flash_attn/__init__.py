"""FLASH_ATTN: FlashAttention 2, 3 and 4, from whichever package is installed."""
