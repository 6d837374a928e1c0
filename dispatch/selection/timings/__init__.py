"""Measured times: their tables, where they are kept, and what they decide."""
