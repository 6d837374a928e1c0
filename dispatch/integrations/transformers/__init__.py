"""transformers' models: what attention their layers have.

Needs the extra: `pip install attn-dispatch[transformers]`.
"""

from attn_dispatch.integrations.transformers.describe import describe
from attn_dispatch.integrations.transformers.description import ModelDescription

__all__ = ["ModelDescription", "describe"]
