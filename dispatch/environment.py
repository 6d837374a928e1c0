"""The environment variables of the library. Each is read here, at call time.

`docs/environment.md` and `attn-dispatch doctor` are generated from `VARIABLES`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from attn_dispatch.errors import InvalidInputError

__all__ = [
    "VARIABLES",
    "Variable",
    "backend_override",
    "cache_folder",
    "check_mode",
    "shadow_interval",
    "sync_mode",
    "tuning",
    "vllm_backend_override",
]


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, the form of its value, its default, its effect."""

    name: str
    form: str
    default: str
    doc: str

    @property
    def value(self) -> str | None:
        """The current value; None if it is not set."""
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
    "Works as ATTN_DISPATCH_BACKEND with vLLM's names. A vLLM backend without a counterpart here "
    "is rejected. Ignored where another override requires a backend for every layer and phase.",
)
CHECK = Variable(
    "ATTN_DISPATCH_CHECK",
    "`0`, `1`, `shadow`, `shadow:N` or `sync`",
    "0",
    "With 1, the contents of batches on a GPU are checked before anything is written, as they "
    "always are on a CPU: block ids in range, slots unique and in range, lengths monotone. "
    "Synchronizes the device. With `shadow`, the reference also computes the first call of each "
    "layer and every 100th after it, or every Nth, and errors above the limits of "
    "`attn-dispatch verify` are reported. With `sync`, a batch, its metadata or a layer's call "
    "that waits for the device raises an error that names the line.",
)
TUNING = Variable(
    "ATTN_DISPATCH_TUNING",
    "`off`, or the path of a table that `attn-dispatch tune --output` wrote",
    "unset: the tables of this machine, then those of the package",
    "Which measured times decide between backends. With `off` only the platform's order decides. "
    "A table that is corrupt, of another device or of other versions is set aside with a warning.",
)
CACHE_FOLDER = Variable(
    "ATTN_DISPATCH_CACHE_DIR",
    "a folder",
    "unset: the user's cache folder, `~/.cache/attn-dispatch` on Linux",
    "Where `attn-dispatch tune` stores its tables, and where selection finds them.",
)
VARIABLES = (BACKEND, VLLM_BACKEND, CHECK, TUNING, CACHE_FOLDER)


def backend_override() -> str:
    """ATTN_DISPATCH_BACKEND, or an empty string."""
    return BACKEND.value or ""


def vllm_backend_override() -> str:
    """VLLM_ATTENTION_BACKEND, or an empty string."""
    return VLLM_BACKEND.value or ""


def tuning() -> str:
    """ATTN_DISPATCH_TUNING: "off", a path, or an empty string."""
    return TUNING.value or ""


def cache_folder() -> str:
    """ATTN_DISPATCH_CACHE_DIR, or an empty string."""
    return CACHE_FOLDER.value or ""


# Every call of a layer reads this variable. `os.environ.get` takes 1 us, because it encodes the
# name. Reading CPython's dictionary behind it takes 0.1 us, and the two always agree.
_table: dict[Any, Any] = getattr(os.environ, "_data", {})
_encode = getattr(os.environ, "encodekey", None)
_CHECK_KEY = _encode(CHECK.name) if _encode is not None and "_data" in vars(os.environ) else None


def _check_value() -> str | None:
    if _CHECK_KEY is not None and _CHECK_KEY not in _table:
        return None
    return CHECK.value


#: The values under which no call is compared with the reference.
_WITHOUT_SHADOW = (None, "", "0", "1", "sync")


def check_mode() -> bool:
    """Whether ATTN_DISPATCH_CHECK is 1, so that the contents of batches are checked.

    Raises:
        InvalidInputError: as for `shadow_interval`.
    """
    value = _check_value()
    if value not in _WITHOUT_SHADOW:
        shadow_interval()  # raises for an invalid value
    return value == "1"


def sync_mode() -> bool:
    """Whether ATTN_DISPATCH_CHECK is sync, so that a step that waits for the device is an error."""
    return _check_value() == "sync"


#: `shadow` without a number.
_SHADOW_EVERY = 100

#: Largest number of digits of N; with more, no call would ever be compared.
_SHADOW_DIGITS = 9


def shadow_interval() -> int:
    """The reference also computes every Nth call of a layer; 0 for none.

    Raises:
        InvalidInputError: the variable has an invalid value.
    """
    value = _check_value()
    if value is None or value in _WITHOUT_SHADOW:
        return 0
    found = re.fullmatch(f"shadow(?::([1-9][0-9]{{0,{_SHADOW_DIGITS - 1}}}))?", value)
    if found is None:
        raise InvalidInputError(
            f"ATTN_DISPATCH_CHECK={value[:80]!r} is not understood. Set it to 0, 1 or sync, or to "
            f"shadow or shadow:N, with N of at most {_SHADOW_DIGITS} digits."
        )
    return int(found[1] or _SHADOW_EVERY)
