"""Backends: `triton` for NVIDIA and AMD, `cuda`, `rocm`, and `reference` for any device.

The registry lists them. `common.py` has what several of them share.
"""
