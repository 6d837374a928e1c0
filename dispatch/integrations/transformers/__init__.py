"""transformers' models: what attention their layers have, and attn-dispatch as their attention.

Needs the extra: `pip install attn-dispatch[transformers]`.
"""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "attn_dispatch.integrations.transformers needs transformers, which is not installed: "
        "pip install 'attn-dispatch[transformers]'",
        name="transformers",
    )

from attn_dispatch.integrations.transformers.check import OwnAttentionWarning, check_model
from attn_dispatch.integrations.transformers.describe import describe
from attn_dispatch.integrations.transformers.description import ModelDescription
from attn_dispatch.integrations.transformers.enable import attention_layers, enable

__all__ = [
    "ModelDescription",
    "OwnAttentionWarning",
    "attention_layers",
    "check_model",
    "describe",
    "enable",
]
