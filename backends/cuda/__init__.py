"""Backends for NVIDIA GPUs."""
