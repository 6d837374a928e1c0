"""STREAMING_ATTN, a backend for attn-dispatch. Importing this package imports no module of it."""
