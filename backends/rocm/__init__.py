"""AMD GPUs: adapters to AITER and to flash-attn's CK build.

The project's own kernels for ROCm are in `backends/triton`: one source for NVIDIA and AMD.
"""
