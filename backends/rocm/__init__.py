"""Backends for AMD GPUs."""
