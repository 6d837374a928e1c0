"""FLASHINFER: FlashInfer's kernels for NVIDIA GPUs."""
