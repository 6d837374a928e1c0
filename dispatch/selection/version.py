"""A version of everything that decisions depend on, apart from the request and the overrides."""

from __future__ import annotations

import itertools

from attn_dispatch.platforms import libraries

__all__ = ["changed", "library_broke_since", "version"]

#: What a change adds to the version. The bits below it count the libraries that are broken.
_CHANGE = 1 << 16
_numbers = itertools.count(_CHANGE, _CHANGE)  # each is used once, whatever threads do
_latest = 0


def changed() -> None:
    """Call it after a change to the registry, the recorded failures or the timing tables."""
    global _latest
    _latest = next(_numbers)


def version() -> int:
    """It differs after a change, and after a library turned out to be broken."""
    return _latest + libraries.generation()


def library_broke_since(earlier: int) -> bool:
    """Whether a library turned out to be broken since `version()` was this."""
    return earlier % _CHANGE != libraries.generation()
