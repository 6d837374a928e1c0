"""A process that forks while another thread holds a lock of the library: the child can go on."""

from __future__ import annotations

import functools
import gc
import os
import select
import signal
import sys
import threading

import pytest
import torch

from attn_dispatch import AttentionBatch, attention
from attn_dispatch.backends.cuda.flashinfer.wrappers import WrapperPool
from attn_dispatch.conformance import shadow
from attn_dispatch.locks import ForkSafeLock, _cached_properties
from attn_dispatch.selection import registry
from support.selection import make_backend

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

_POOL = WrapperPool()
#: Place -> its lock, and a function that needs it.
USES = {
    "registry": (
        lambda: registry.registry._lock,
        lambda: registry.registry.register(make_backend("FORKED")),
    ),
    "shadow check": (lambda: shadow._lock, shadow.report),
    "FlashInfer's wrappers": (lambda: _POOL._lock, lambda: _POOL.take(object)),
}


def child_ends(work, seconds=10.0):
    """Whether a forked child comes back from `work` in time and without an error."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(write, b"done")
        finally:
            os._exit(0)
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], seconds)
        return bool(ready) and os.read(read, 4) == b"done"
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Holder(threading.Thread):
    """A thread that holds a lock for as long as the context lasts."""

    def __init__(self, lock):
        super().__init__(daemon=True)
        self._held, self._enough, self._to_hold = threading.Event(), threading.Event(), lock

    def run(self):
        with self._to_hold:
            self._held.set()
            self._enough.wait(60)

    def __enter__(self):
        self.start()
        assert self._held.wait(10)

    def __exit__(self, *_):
        self._enough.set()
        self.join()


def use_the_library():
    query = torch.zeros(2, 1, 8)
    assert attention(query, query, query).shape == query.shape
    shadow.report()
    registry.registry.names()


@pytest.mark.parametrize("where", USES)
def test_a_child_can_use_what_another_thread_holds(where):
    lock, use = USES[where]
    with Holder(lock()):
        assert child_ends(use)
    assert child_ends(use)  # and once it is free


@pytest.mark.parametrize("where", USES)
def test_a_child_can_use_the_library_while_another_thread_holds_a_lock(where, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "shadow")
    use_the_library()
    with Holder(USES[where][0]()):
        assert child_ends(use_the_library)


def test_the_thread_that_forks_keeps_its_lock():
    lock = ForkSafeLock()

    def leave():
        lock.__exit__()
        lock.__exit__()
        with lock:
            pass

    with lock, lock:
        assert child_ends(leave)


def test_a_lock_keeps_other_threads_out():
    lock, inside, most = ForkSafeLock(), [], []

    def enter():
        for _ in range(200):
            with lock, lock:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="cached properties have no lock")
def test_a_child_can_use_a_batch_while_another_thread_does():
    found = {id(each) for each in _cached_properties()}
    ours = [
        each
        for each in gc.get_objects()
        if type(each) is functools.cached_property  # isinstance wakes lazy attributes
        and each.func.__module__.startswith("attn_dispatch")
    ]
    assert found >= {id(each) for each in ours}
    batch = AttentionBatch.create([1], [1])
    with Holder(vars(AttentionBatch)["totals"].lock):
        assert child_ends(lambda: batch.totals_by_phase)
