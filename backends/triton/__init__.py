"""The portable kernels, for NVIDIA and AMD GPUs from one source, and TRITON_ATTN."""
