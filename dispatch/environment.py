"""The environment variables that the library reads: all of them, here, at call time.

`docs/environment.md` and `attn-dispatch doctor` are written from `VARIABLES`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["VARIABLES", "Variable", "backend_override", "check_mode", "vllm_backend_override"]


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, the form of its value, its default, what it does."""

    name: str
    form: str
    default: str
    doc: str


BACKEND = Variable(
    "ATTN_DISPATCH_BACKEND",
    "an override, e.g. `REFERENCE`, `prefill=TORCH_SDPA,decode=REFERENCE`, `-TORCH_SDPA`",
    "unset: automatic selection",
    "Requires, prefers or excludes backends. Names registered backends only, never code.",
)
VLLM_BACKEND = Variable(
    "VLLM_ATTENTION_BACKEND",
    "one of vLLM's backend names",
    "unset",
    "Understood as ATTN_DISPATCH_BACKEND with vLLM's names, and outranked by it. "
    "A vLLM backend without a counterpart here is refused, never ignored.",
)
CHECK = Variable(
    "ATTN_DISPATCH_CHECK",
    "`0` or `1`",
    "0",
    "With 1, the contents of batches are checked before anything is written: block ids in range, "
    "slots unique and in range, lengths monotone. May synchronize the device.",
)
VARIABLES = (BACKEND, VLLM_BACKEND, CHECK)


def backend_override() -> str:
    """ATTN_DISPATCH_BACKEND as it stands now, or an empty string."""
    return os.environ.get("ATTN_DISPATCH_BACKEND", "")


def vllm_backend_override() -> str:
    """VLLM_ATTENTION_BACKEND as it stands now, or an empty string."""
    return os.environ.get("VLLM_ATTENTION_BACKEND", "")


def check_mode() -> bool:
    """Whether ATTN_DISPATCH_CHECK asks for the contents of batches to be checked.

    Raises:
        InvalidInputError: the variable holds neither 0 nor 1.
    """
    value = os.environ.get("ATTN_DISPATCH_CHECK", "")
    if value in ("", "0"):
        return False
    if value == "1":
        return True
    from attn_dispatch.errors import InvalidInputError

    raise InvalidInputError(f"ATTN_DISPATCH_CHECK={value!r} is not understood. Set it to 0 or 1.")
