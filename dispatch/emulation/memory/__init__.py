"""Global memory, LDS and private memory, and what is watched in them."""
