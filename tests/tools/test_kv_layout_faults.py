"""Faults over the layouts of engines that `verify` must find."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
from attn_dispatch.conformance import verify
from attn_dispatch.interface.capability import Capabilities
from attn_dispatch.interface.kv_view import KVCacheView
from support.faulty_backends import backend, failures


def over_pools(change):
    """A forward that computes over what `change` makes of a cache in two tensors."""

    def forward(impl, compute, arguments, named):
        given = arguments[4]
        if isinstance(given, KVCacheView):
            arguments[4] = change(given)
        result = compute(*arguments, **named)
        if isinstance(given, KVCacheView) and change is write_around:
            given.key.untyped_storage()[3] = 1
        return result

    return forward


def write_around(view):
    return view


POOLS = {
    "a copy is written": (
        lambda view: KVCacheView(view.key.clone(), view.value.clone()),
        "over the layout sglang, other bytes are written than over the library's own, or outside",
    ),
    "a byte before the cache is written": (write_around, "other bytes are written"),
    "keys are taken for values": (lambda view: KVCacheView(view.value, view.key), "is off by"),
}


@pytest.mark.parametrize("fault", POOLS)
def test_faults_over_the_layout_of_an_engine_are_caught(fault):
    change, sentence = POOLS[fault]
    failed = failures(backend(over_pools(change)), "kv_layouts/", quick=True)
    assert set(failed) >= {"kv_layouts/sglang", "kv_layouts/flashinfer-tuple"}
    assert sentence in failed["kv_layouts/sglang"]
    assert not any("vllm-0.24-NHD" in name for name in failed)  # one tensor


def without_strides(cls):
    """A backend with this one's impl that declares no strides."""
    declared = {**cls.capabilities.fields}
    del declared["kv_strides"]
    members = {
        "__module__": __name__,
        "name": "OWN_LAYOUTS",
        "impl_cls": cls.get_impl_cls(),
        "capabilities": Capabilities(devices=cls.capabilities.devices, **declared),
    }
    return type("OwnLayouts", (ReferenceBackend,), members)


def test_layouts_that_are_not_declared_must_be_rejected():
    cls = without_strides(backend())
    names = {o.check.full_name for o in verify(cls, "cpu", quick=True, only="kv_layouts/").outcomes}
    assert {"kv_layouts/refused, sglang", "kv_layouts/vllm-0.24-NHD"} <= names
    assert "kv_layouts/sglang" not in names
    assert failures(cls, "kv_layouts/", quick=True) == {}


def test_a_backend_that_copies_an_undeclared_layout_is_caught():
    def gathered(view):
        return torch.stack([view.key, view.value], 1)

    cls = without_strides(backend(over_pools(gathered)))
    failed = failures(cls, "kv_layouts/refused, sglang", quick=True)
    assert failed["kv_layouts/refused, sglang"] == (
        "a cache of the layout sglang is not declared, and not rejected."
    )
