"""REFERENCE with a fault, and what `verify` says of it."""

from __future__ import annotations

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend, ReferenceImpl
from attn_dispatch.conformance import verify
from attn_dispatch.interface.capability import Capabilities

__all__ = ["backend", "failures"]


def backend(forward=None, *, init=None, propagates_nan=True, **fields):
    """REFERENCE whose forward is `forward(impl, compute, arguments, named)`."""

    class Impl(ReferenceImpl):
        def __init__(self, *arguments, **named):
            if init is not None:
                arguments, named = init(arguments, named)
            super().__init__(*arguments, **named)

        def forward(self, *arguments, **named):
            compute = super().forward
            if forward is None:
                return compute(*arguments, **named)
            return forward(self, compute, list(arguments), named)

    members = {
        "__module__": __name__,
        "get_name": staticmethod(lambda: "FAULTY"),
        "get_impl_cls": staticmethod(lambda: Impl),
        "propagates_nan": propagates_nan,
    }
    if fields:
        declared = {**ReferenceBackend.capabilities.fields, **fields}
        members["capabilities"] = Capabilities(
            devices=ReferenceBackend.capabilities.devices, **declared
        )
    return type("FaultyBackend", (ReferenceBackend,), members)


def failures(cls, only, **more):
    report = verify(cls, "cpu", only=only, **more)
    assert report.outcomes
    return {o.check.full_name: o.message for o in report.failures}
