"""attn-dispatch as an attention backend of vLLM: `vllm serve MODEL --attention-backend ...`.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. Only
that function and the modules that vLLM loads by name import vLLM.
"""

from __future__ import annotations

from typing import Any

from attn_dispatch.integrations.vllm.requests import NAME, PLUGIN

__all__ = ["BACKEND_CLASS", "NAME", "PLUGIN", "register"]

#: What vLLM imports when it has chosen the backend, see `__getattr__`.
BACKEND_CLASS = "attn_dispatch.integrations.vllm.Backend"


def register() -> None:
    """Add the backend to vLLM: under its own name, or as CUSTOM in versions without added names.

    It can be called any number of times.

    Raises:
        ImportError: vLLM is not installed, or has no registry of backends.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not hasattr(AttentionBackendEnum, "register"):
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_CLASS)
    elif NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, BACKEND_CLASS)


def __getattr__(name: str) -> Any:
    """`Backend`: the class of backend for the model that vLLM is making.

    vLLM has one class for each name, and another kind of class for latent attention (MLA).
    """
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none

    from attn_dispatch.integrations.vllm import backend, mla

    model = getattr(get_current_vllm_config_or_none(), "model_config", None)
    is_mla = model is not None and model.use_mla
    return mla.AttnDispatchMLABackend if is_mla else backend.AttnDispatchBackend
