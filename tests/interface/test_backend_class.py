"""AttentionBackend: class attributes, their defaults, and the rejection of undeclared features."""

from __future__ import annotations

import pickle

import pytest
import torch

from attn_dispatch import interface
from attn_dispatch.backends.reference.torch_ref import ReferenceBackend, ReferenceImpl
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface import (
    ANY,
    AttentionBackend,
    AttentionSpec,
    BatchMetadata,
    BatchMetadataBuilder,
    Capabilities,
    CommonAttentionState,
    DeviceMatch,
    OneOf,
)

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=4, head_size=16, dtype=torch.float32)


class OwnImpl(ReferenceImpl):
    pass


class Plain(AttentionBackend):
    """Declares no optional feature."""

    interface_version = 2
    name = "PLAIN"
    impl_cls = OwnImpl
    capabilities = Capabilities(
        devices=(DeviceMatch(),),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=ANY,
        head_size_v=ANY,
        dtype=ANY,
        block_size=ANY,
        attn_type=OneOf("decoder"),
        causal=OneOf(True),
    )


class WithSinks(Plain):
    name = "WITH_SINKS"
    capabilities = Capabilities(
        devices=(DeviceMatch(),), **(Plain.capabilities.fields | {"sinks": OneOf(True, False)})
    )


UNDECLARED = {
    "alibi_slopes": [0.5] * 4,
    "sinks": torch.zeros(4),
    "sliding_window": 3,
    "logits_soft_cap": 5.0,
    "kv_cache_dtype": "fp8",
    "attn_type": "encoder",
    "kv_sharing_target_layer_name": "other",
    "returns_lse": True,
}


def test_getters_return_the_class_attributes():
    assert Plain.get_name() == "PLAIN"
    assert Plain.get_impl_cls() is OwnImpl
    assert Plain.get_metadata_cls() is BatchMetadata
    assert Plain.get_state_cls() is CommonAttentionState
    assert issubclass(Plain.get_builder_cls(), BatchMetadataBuilder)


def test_each_backend_has_its_own_builder_class():
    assert Plain.builder_cls is not WithSinks.builder_cls
    assert Plain.builder_cls is not ReferenceBackend.builder_cls
    assert Plain.builder_cls.backend_cls is Plain
    assert pickle.loads(pickle.dumps(Plain.builder_cls)) is Plain.builder_cls


@pytest.mark.parametrize("argument", UNDECLARED)
def test_an_impl_rejects_an_undeclared_argument(argument):
    with pytest.raises(UnsupportedError, match=f"PLAIN does not support {argument}"):
        Plain.impl_cls(4, 16, 0.25, **{argument: UNDECLARED[argument]})


def test_an_impl_accepts_declared_arguments():
    assert Plain.make_impl(SPEC, scale=0.25).num_heads == 4
    assert WithSinks.make_impl(SPEC, scale=0.25, sinks=torch.zeros(4)).sinks is not None


@pytest.mark.parametrize("fields", [{"sinks": True}, {"custom_mask": True}, {"causal": False}])
def test_a_builder_rejects_an_undeclared_layer(fields):
    spec = SPEC.replace(**fields)
    for make in (Plain.make_builder, Plain.builder_cls):
        for _ in range(2):  # an error is not cached
            with pytest.raises(UnsupportedError, match="PLAIN does not compute this layer"):
                make(spec, CPU)
    assert isinstance(Plain.make_builder(SPEC, CPU), BatchMetadataBuilder)


def test_a_subclass_checks_its_own_capabilities():
    assert WithSinks.make_builder(SPEC.replace(sinks=True), CPU).backend_cls is WithSinks


def test_the_kit_has_what_a_backend_needs():
    for name in ("AttentionImpl", "UnquantizedImpl", "ByDevice", "import_library", "gather_kv"):
        assert hasattr(interface, name)
    assert not hasattr(interface, "no_such_name")


def test_a_pickled_spec_computes_its_hash_again():
    assert "_hash" in vars(SPEC) or hash(SPEC)
    copy = pickle.loads(pickle.dumps(SPEC))
    assert "_hash" not in vars(copy)
    assert (copy, hash(copy)) == (SPEC, hash(SPEC))
