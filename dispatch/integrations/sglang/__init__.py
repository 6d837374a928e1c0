"""SGLang's plug-in: `--attention-backend attn_dispatch` runs its attention through this library.

SGLang finds `register` by the entry point group `sglang.srt.plugins`. Importing this package does
not import SGLang.
"""

from attn_dispatch.integrations.engines import EnginePlugin
from attn_dispatch.integrations.sglang.plugin import BACKEND_NAME, make_backend, register

__all__ = ["BACKEND_NAME", "PLUGIN", "make_backend", "register"]

PLUGIN = EnginePlugin(
    engine="sglang",
    group="sglang.srt.plugins",
    flag=f"--attention-backend {BACKEND_NAME}",
    tested={
        "0.5.23": "names and signatures in the released wheel; some of its classes on a CPU. Never "
        "executed as an engine, nor on a GPU"
    },
)
