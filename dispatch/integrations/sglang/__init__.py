"""SGLang's plug-in: `--attention-backend attn_dispatch` runs its attention through this library.

SGLang finds `register` by the entry point group `sglang.srt.plugins`. Importing this package does
not import SGLang; its functions do.
"""

from __future__ import annotations

from typing import Any

from attn_dispatch.integrations.sglang.plugin import BACKEND_NAME, PLUGIN, VERSION

__all__ = ["BACKEND_NAME", "PLUGIN", "VERSION", "make_backend", "register"]


def register() -> None:
    """Make `--attention-backend attn_dispatch` a choice in this process; more calls do nothing.

    The entry point of the group `sglang.srt.plugins`.

    Raises:
        ImportError: SGLang is not installed, or is a version with other names. SGLang logs it and
            then rejects the option.
    """
    try:
        from attn_dispatch.integrations.sglang import names
    except ImportError as error:
        raise ImportError(f"{error}. The plug-in is for SGLang {VERSION}: install it.") from error
    if BACKEND_NAME not in names.ATTENTION_BACKEND_CHOICES:
        names.ATTENTION_BACKEND_CHOICES.append(BACKEND_NAME)
    names.register_attention_backend(BACKEND_NAME)(make_backend)


def make_backend(runner: Any) -> Any:
    """The AttentionBackend of a model that has been loaded.

    Args:
        runner: SGLang's ModelRunner, with its model and its caches.

    Raises:
        UnsupportedError: the model or the server's options need what this library, or no backend
            for one of the layers, supports; with the reasons.
    """
    from attn_dispatch.integrations.sglang.adapter import AttnDispatchBackend

    return AttnDispatchBackend(runner)
