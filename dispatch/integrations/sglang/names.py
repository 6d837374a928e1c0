"""Everything that the plug-in imports from SGLang, as SGLang 0.5.23 has it.

SGLang promises none of these names, and none of the attributes that the plug-in reads, so a new
version can rename them; `make contracts` looks them all up. None of them begins with an underscore.
"""

# ruff: noqa: PLC0414 - a name that is imported as itself is exported, for type checkers

from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES as ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import (
    register_attention_backend as register_attention_backend,
)
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend as AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention as RadixAttention
from sglang.srt.runtime_context import get_parallel as get_parallel
