"""Attention over several GPUs, on torch.distributed: see docs/distributed.md."""
