"""A backend that fails, for the tests of fallback."""

from __future__ import annotations

import itertools

import torch

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend, ReferenceImpl
from support.selection import make_backend


def faulty(where, error=None, *, name="TORCH_SDPA", after=0, phase=None, **fields):
    """A backend like REFERENCE that fails; the first in a CPU's order by its name.

    Args:
        where: "impl", "builder", "plan" or "launch".
        error: what it raises.
        name: of the backend.
        after: the number of times that it does not fail.
        phase: it fails only on batches with requests in this phase.
        **fields: what it declares.
    """
    error = error or RuntimeError("no kernel image is available")
    tries = itertools.count()

    def reach(place, batch=None):
        if place != where or (phase is not None and phase not in batch.phases):
            return
        if next(tries) >= after:
            raise error

    class Impl(ReferenceImpl):
        def __init__(self, *args, **named):
            reach("impl")
            super().__init__(*args, **named)

        def forward(self, layer, query, key, value, kv_cache, attn_metadata, *more, **named):
            arguments = (layer, query, key, value, kv_cache, attn_metadata)
            result = super().forward(*arguments, *more, **named)
            output = result[0] if self.returns_lse else result
            try:
                reach("launch", attn_metadata.batch)
            except BaseException:
                output.fill_(torch.nan)  # must not reach the caller
                raise
            return result

    class Builder(ReferenceBackend.builder_cls):
        def __init__(self, spec, device):
            reach("builder")
            super().__init__(spec, device)

        def build(self, batch):
            reach("plan", batch)
            return super().build(batch)

    backend = make_backend(name, **fields)
    backend.get_impl_cls = staticmethod(lambda: Impl)
    backend.get_builder_cls = staticmethod(lambda: Builder)
    backend.tries = tries
    return backend
