"""Serving language models of transformers over the paged caches of attn_dispatch.

Needs the extra: `pip install attn-dispatch[transformers]`. `load_engine` makes an Engine; its
methods are `add`, `step`, `generate`, `stream` and `cancel`.
"""

from attn_dispatch.serving.engine import Engine, LanguageModel, Piece
from attn_dispatch.serving.limits import Limits
from attn_dispatch.serving.loading import load_engine
from attn_dispatch.serving.requests import FinishReason, Request, Sampling

__all__ = [
    "Engine",
    "FinishReason",
    "LanguageModel",
    "Limits",
    "Piece",
    "Request",
    "Sampling",
    "load_engine",
]
