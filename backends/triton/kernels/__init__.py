"""Triton kernels that every GPU backend of ours shares, and how they are launched. No policy."""
