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

    @property
    def value(self) -> str | None:
        """The variable as it stands now; None if it is not set."""
        return os.environ.get(self.name)


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
    "Understood as ATTN_DISPATCH_BACKEND with vLLM's names. A vLLM backend without a counterpart "
    "here is refused. Not looked at where something else requires a backend for everything.",
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
    return BACKEND.value or ""


def vllm_backend_override() -> str:
    """VLLM_ATTENTION_BACKEND as it stands now, or an empty string."""
    return VLLM_BACKEND.value or ""


def check_mode() -> bool:
    """Whether ATTN_DISPATCH_CHECK asks for the contents of batches to be checked.

    Raises:
        InvalidInputError: the variable holds neither 0 nor 1.
    """
    value = CHECK.value
    if value in (None, "", "0"):
        return False
    if value == "1":
        return True
    from attn_dispatch.errors import InvalidInputError

    raise InvalidInputError(f"ATTN_DISPATCH_CHECK={value!r} is not understood. Set it to 0 or 1.")
