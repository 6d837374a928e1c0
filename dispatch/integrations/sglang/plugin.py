"""What SGLang, and `attn-dispatch doctor`, are given of the plug-in."""

from __future__ import annotations

from attn_dispatch import engines

__all__ = ["BACKEND_NAME", "PLUGIN", "VERSION"]

#: The value of SGLang's `--attention-backend`.
BACKEND_NAME = "attn_dispatch"

#: The version whose names `names` imports.
VERSION = "0.5.23"

PLUGIN = engines.EnginePlugin(
    engine="sglang",
    group="sglang.srt.plugins",
    flag=f"--attention-backend {BACKEND_NAME}",
    tested={
        VERSION: "names and signatures in the released wheel; some of its classes on a CPU. Never "
        "executed as an engine, nor on a GPU"
    },
)
