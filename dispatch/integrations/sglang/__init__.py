"""SGLang's plug-in: `--attention-backend attn_dispatch` runs its attention through this library.

SGLang finds `register` by the entry point group `sglang.srt.plugins`. Importing this package does
not import SGLang.
"""

from attn_dispatch.integrations.sglang.plugin import BACKEND_NAME, make_backend, register

__all__ = ["BACKEND_NAME", "make_backend", "register"]
