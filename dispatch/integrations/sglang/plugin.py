"""What SGLang calls when it loads its plug-ins, and when a model has been loaded."""

from __future__ import annotations

import functools
from typing import Any

from attn_dispatch.integrations.sglang.adapter import SGLangAdapter
from attn_dispatch.integrations.sglang.names import load_engine

__all__ = ["BACKEND_NAME", "make_backend", "register"]

#: The value of SGLang's `--attention-backend`.
BACKEND_NAME = "attn_dispatch"


def register() -> None:
    """Make `--attention-backend attn_dispatch` a choice in this process; more calls do nothing.

    The entry point of the group `sglang.srt.plugins`.

    Raises:
        ImportError: SGLang is not installed, or is a version with other names. SGLang logs it and
            then rejects the option.
    """
    engine = load_engine()
    if BACKEND_NAME not in engine.ATTENTION_BACKEND_CHOICES:
        engine.ATTENTION_BACKEND_CHOICES.append(BACKEND_NAME)
    engine.register_attention_backend(BACKEND_NAME)(make_backend)


def make_backend(runner: Any) -> Any:
    """The AttentionBackend of a model that has been loaded.

    Args:
        runner: SGLang's ModelRunner, with its model and its caches.

    Raises:
        UnsupportedError: the model or the server's options need what this library, or no backend
            for one of the layers, supports; with the reasons.
    """
    engine = load_engine()
    return _class_over(engine.AttentionBackend)(runner, engine)


@functools.cache
def _class_over(base: type) -> type:
    return type("AttnDispatchBackend", (SGLangAdapter, base), {"__doc__": SGLangAdapter.__doc__})
