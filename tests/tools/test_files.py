"""Files that are anything: reading never blocks, JSON has limits, writers keep each other out."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from attn_dispatch import files
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import check_writable, locked, parse_json, read_file, replace_file

needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")


def make(kind, folder):
    """A path at which there is something of a kind."""
    path = folder / "it"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "loop of links":
        path.symlink_to("it")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "huge file":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "NUL in the name":
        path = folder / "a\0b"
    elif kind == "name that is too long":
        path = folder / ("x" * 5000)
    return path


KINDS = {
    "missing": "No such file",
    "folder": "it is a folder",
    "FIFO": "it is not a regular file",
    "socket": "it is not a regular file",
    "dangling link": "No such file",
    "loop of links": "symbolic links",
    "link to a device": "it is not a regular file",
    "huge file": "more than 100 bytes",
    "NUL in the name": "null",
    "name that is too long": "too long",
}


@needs_fifo
@pytest.mark.parametrize("kind", KINDS)
def test_only_small_regular_files_are_read(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = make(kind, tmp_path.relative_to(tmp_path))
    start = time.monotonic()
    with pytest.raises(InvalidInputError, match=KINDS[kind]) as caught:
        read_file(path, 100, advice="Do this.")
    assert time.monotonic() - start < 5
    assert str(caught.value).endswith(". Do this.")
    assert "\n" not in str(caught.value)


BAD_JSON = {
    "empty": b"",
    "cut off": b'{"a": ',
    "not text": b"\x80\x02\xff",
    "deeper than the parser goes": b"[" * 1_000_000,
    "deeper than data should be": b"[" * 100 + b"]" * 100,
    "deep in objects": b'{"a":' * 100 + b"1" + b"}" * 100,
    "an integer of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a negative one": b"[-" + b"9" * 5000 + b"]",
    "a key twice": b'{"a": 1, "a": 2}',
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_deep_or_long_json_is_rejected(content):
    with pytest.raises(InvalidInputError, match=r"^it is not ") as caught:
        parse_json(content, origin="it", unique_keys=True)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf[1]", "[1]".encode("utf-16"), b"[1]"])
def test_json_is_read_in_its_encodings(content):
    assert parse_json(content, origin="it") == [1]
    assert parse_json(b'{"a": 1, "a": 2}', origin="it") == {"a": 2}


# --- Writing ------------------------------------------------------------------------------------

UNWRITABLE = {
    "folder": "it is a folder",
    "FIFO": "not a regular file",
    "socket": "not a regular file",
    "loop of links": "symbolic links",
    "link to a device": "not a regular file",
    "NUL in the name": "null",
    "name that is too long": "too long",
}


@needs_fifo
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_unwritable_file_is_rejected_before_the_work(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make(kind, tmp_path.relative_to(tmp_path))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InvalidInputError, match=f"cannot be written: .*{UNWRITABLE[kind]}"):
        check_writable(path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_as_a_folder_is_rejected(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "y" / "x"):
        with pytest.raises(InvalidInputError, match="cannot be written: Not a directory"):
            check_writable(path)
        with pytest.raises(InvalidInputError, match="cannot be written"):
            replace_file(path, "text")
        with pytest.raises(InvalidInputError, match="cannot be written"), locked(path):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_check_writable_leaves_no_file_and_follows_links(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "file")
    assert list(tmp_path.iterdir()) == []
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "target"
    link.symlink_to(target)
    check_writable(link)
    replace_file(link, "text")
    assert link.is_symlink()
    assert target.read_text() == "text"


ADD_ONE = """
import pathlib, sys, time
from attn_dispatch.files import locked, replace_file
path = pathlib.Path(sys.argv[1])
for _ in range(20):
    with locked(path):
        number = int(path.read_text()) if path.exists() else 0
        time.sleep(0.001)
        replace_file(path, str(number + 1))
"""


def test_processes_share_a_file_without_losses(tmp_path):
    path = tmp_path / "number"
    command = [sys.executable, "-c", ADD_ONE, str(path)]
    workers = [subprocess.Popen(command) for _ in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    assert path.read_text() == "80"
    assert os.listdir(tmp_path) == ["number"]  # no lock is left


def test_threads_share_a_file_without_losses(tmp_path):
    path = tmp_path / "number"
    path.write_text("0")

    def work():
        for _ in range(10):
            with locked(path):
                replace_file(path, str(int(path.read_text()) + 1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "40"


def test_lock_of_another_process_times_out(tmp_path):
    with (
        locked(tmp_path / "file"),
        pytest.raises(InvalidInputError, match="another process"),
        locked(tmp_path / "file", seconds=0.1),
    ):
        pass


def test_lock_file_of_a_dead_process_is_ignored(tmp_path):
    (tmp_path / ".file.lock").write_text("")
    with locked(tmp_path / "file", seconds=1):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="is about flock")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to(code, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(tmp_path / "file"):
        replace_file(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_read_only_file_system_error_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    path = tmp_path / "new" / "file"
    with pytest.raises(InvalidInputError, match=r"cannot be written: Read-only file system\.$"):
        replace_file(path, "text")
    with pytest.raises(InvalidInputError, match="Read-only"), locked(path):
        pass
