"""What the plug-in imports from SGLang, as SGLang 0.5.23 has it.

SGLang promises none of these names, and none of the attributes that the plug-in reads, so a new
version can rename them; `make contracts` looks them all up. None of them begins with an underscore.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

__all__ = ["IMPORTED", "VERSION", "load_engine"]

#: The version whose names these are.
VERSION = "0.5.23"

#: What is imported: name -> module.
IMPORTED = {
    "AttentionBackend": "sglang.srt.layers.attention.base_attn_backend",
    "RadixAttention": "sglang.srt.layers.radix_attention",
    "register_attention_backend": "sglang.srt.layers.attention.attention_registry",
    "ATTENTION_BACKEND_CHOICES": "sglang.srt.arg_groups.choices",
    "get_parallel": "sglang.srt.runtime_context",
}


def load_engine() -> SimpleNamespace:
    """What is imported from SGLang, under SGLang's names.

    Raises:
        ImportError: SGLang is not installed, or is a version with other names.
    """
    found = {}
    for name, module in IMPORTED.items():
        try:
            found[name] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"{module}.{name} was not found. The plug-in was written for SGLang {VERSION}; "
                "install that version, or run SGLang with another --attention-backend."
            ) from error
    return SimpleNamespace(**found)
