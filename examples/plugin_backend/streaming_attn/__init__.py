"""STREAMING_ATTN, a backend for attn-dispatch. Nothing is imported before it is asked for."""
