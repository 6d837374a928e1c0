"""Locks that a forked child process can use, even if another thread of its parent held them."""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref

__all__ = ["ForkSafeLock"]


class ForkSafeLock:
    """A reentrant lock for `with`. In a forked child it is free, unless the forking thread held it.

    `os.fork` copies only the thread that calls it. A plain lock that another thread held would stay
    locked in the child for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    def _renew(self) -> None:
        """In a child: a new lock, held only if the forking thread held the old one."""
        self._lock = threading.RLock()
        if self._owner != threading.get_ident():
            self._owner, self._depth = None, 0
        for _ in range(self._depth):
            self._lock.acquire()


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_locks() -> None:
    for lock in list(_locks):
        lock._renew()
    if sys.version_info < (3, 12):  # there a cached property has one lock for all instances
        for cached in _cached_properties():
            vars(cached)["lock"] = threading.RLock()


def _cached_properties() -> list[functools.cached_property[object]]:
    """The cached properties of the library's classes."""
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "attn_dispatch"]
    classes = {c for m in modules for c in vars(m).values() if isinstance(c, type)}
    members = [member for cls in classes for member in vars(cls).values()]
    return [member for member in members if isinstance(member, functools.cached_property)]


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_renew_locks)
