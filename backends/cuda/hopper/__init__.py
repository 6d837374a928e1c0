"""HOPPER_ATTN: kernels in Gluon for NVIDIA Hopper."""
