"""Reading and writing untrusted files: no call blocks, and no file is left partly written.

A path may name a FIFO, a device, a folder or an endless file, and JSON may be nested too deeply or
have huge numbers. Each of these raises InvalidInputError with one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attn_dispatch.errors import InvalidInputError

__all__ = ["check_writable", "locked", "parse_json", "read_file", "replace_file"]

#: Limits of JSON: levels of nesting, and digits of an integer. A table of times has 6 and 13.
_MAX_DEPTH, _MAX_DIGITS = 64, 40

#: Seconds to wait for another process that writes the same file, and between two attempts.
_LOCK_SECONDS, _LOCK_STEP = 60.0, 0.02

#: The errors of `flock` if another process has the lock, and if the file system has no locks.
_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def _why(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


# --- Reading ------------------------------------------------------------------------------------


def read_file(path: Path, max_bytes: int, *, origin: str = "", advice: str = "") -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        max_bytes: its largest size.
        origin: its name in messages; its path by default.
        advice: a sentence at the end of messages.

    Raises:
        InvalidInputError: there is no such file, it is not a regular file, or it is too large.
    """
    origin, advice = origin or str(path), advice and f" {advice}"
    try:
        _require_regular(os.stat(path))  # before opening, which may have effects on a device
        with open(path, "rb", opener=_open_without_blocking) as file:
            _require_regular(os.fstat(file.fileno()))
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{origin} cannot be read: {_why(error)}.{advice}") from error
    if len(content) > max_bytes:
        limit = f"{max_bytes >> 20} MiB" if max_bytes >> 20 else f"{max_bytes} bytes"
        raise InvalidInputError(f"{origin} has more than {limit}.{advice}")
    return content


def _open_without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # else a FIFO waits for a writer


def _require_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def parse_json(
    content: bytes, *, origin: str, what: str = "JSON", advice: str = "", unique_keys: bool = False
) -> Any:
    """The data in JSON text.

    Args:
        content: UTF-8, or another encoding of JSON.
        origin: its name in messages.
        what: what it should be, in messages.
        advice: a sentence at the end of messages.
        unique_keys: reject an object with a key twice, instead of taking the last.

    Raises:
        InvalidInputError: it is not JSON, is nested too deeply, or has a huge integer.
    """
    cause: Exception
    try:
        hook = _unique if unique_keys else None
        data = json.loads(content, parse_int=_parse_int, object_pairs_hook=hook)
        if _is_deep(data):
            raise RecursionError
        return data
    except UnicodeDecodeError as error:
        problem, cause = f"is not text, so it is not {what}", error
    except RecursionError as error:
        problem, cause = f"is not {what}: it is nested deeper than {_MAX_DEPTH} levels", error
    except ValueError as error:
        problem, cause = f"is not {what}: {error}", error
    raise InvalidInputError(f"{origin} {problem}.{advice and ' '}{advice}") from cause


def _parse_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, other in itertools.pairwise(names) if name == other)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return data


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True


# --- Writing ------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Check before long work that its result can be written to a file. Writes nothing.

    Raises:
        InvalidInputError: the path is not a regular file, or its folder is not writable.
    """
    try:
        real = _real(path)
        with contextlib.suppress(FileNotFoundError):
            _require_regular(real.stat())
        folder = real.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be written: {_why(error)}.") from error


def _real(path: Path) -> Path:
    """The file behind links, which is replaced."""
    return Path(os.path.realpath(path))


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically: a reader finds the old one or the new one.

    Raises:
        InvalidInputError: it cannot be written.
    """
    try:
        real = _real(path)
        part = real.with_name(f".{uuid.uuid4().hex}.part")
        real.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, real)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be written: {_why(error)}.") from error


@contextlib.contextmanager
def locked(path: Path, seconds: float = _LOCK_SECONDS) -> Iterator[None]:
    """Exclude other processes that use this function while a file is read, changed and replaced.

    This is a lock of the operating system on a file next to it, `.NAME.lock`, which exists only
    while the lock is held; the end of a process releases it. On a file system without locks no
    process is excluded.

    Args:
        path: the file to change; it need not exist, and its folder is made.
        seconds: to wait for another process.

    Raises:
        InvalidInputError: the lock file cannot be made, or another process keeps the lock.
    """
    try:
        real = _real(path)
        real.parent.mkdir(parents=True, exist_ok=True)
        lock = real.with_name(f".{real.name}.lock")
        handle = _acquire(lock, time.monotonic() + seconds)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be written: {_why(error)}.") from error
    if handle is None:
        raise InvalidInputError(
            f"{path} cannot be written: another process has locked it for {seconds:g} s. Wait for "
            f"that process, or end it."
        )
    try:
        yield
    finally:
        _release(handle, lock)


def _acquire(lock: Path, deadline: float) -> int | None:
    """The open lock file, or None if another process has it until the deadline."""
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOINHERIT"):
        flags |= getattr(os, name, 0)
    while True:
        handle = os.open(lock, flags, 0o666)
        try:
            if _try_lock(handle) and _is_there(handle, lock):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if time.monotonic() >= deadline:
            return None
        time.sleep(_LOCK_STEP)


def _is_there(handle: int, lock: Path) -> bool:
    """Whether the opened lock file still has its name; its holder removes it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(lock))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _release(handle: int, lock: Path) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        os.close(handle)
        with contextlib.suppress(OSError):  # another process has it open, and removes it
            lock.unlink()

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _release(handle: int, lock: Path) -> None:
        lock.unlink(missing_ok=True)  # while it is held, so that a waiting process sees that
        os.close(handle)
