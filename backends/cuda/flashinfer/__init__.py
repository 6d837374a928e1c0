"""FLASHINFER: FlashInfer's kernels for NVIDIA GPUs (arXiv:2501.01005)."""
