"""The signatures that a backend's classes must have, and what is said of others."""

from __future__ import annotations

import pytest

from attn_dispatch import (
    InvalidInputError,
    register_backend,
)
from attn_dispatch.backends.no_attention import NoAttentionBackend
from attn_dispatch.backends.reference.torch_ref import (
    ReferenceBackend,
    ReferenceImpl,
    ReferenceMetadata,
)
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import ANY, Capabilities, OneOf
from attn_dispatch.interface.graphs import AttentionState, CommonAttentionState
from attn_dispatch.interface.impl import AttentionImpl, MLAAttentionImpl
from attn_dispatch.interface.metadata import AttentionMetadata, AttentionMetadataBuilder
from attn_dispatch.interface.signatures import _METHODS, OPTIONAL_ARGUMENTS
from attn_dispatch.selection.priorities import BUILTIN
from attn_dispatch.selection.registry import (
    check_backend_class,
    resolve_full_cls_name,
)


def named(name):
    """A member without arguments, of this name."""
    member = eval("lambda: None")
    member.__name__ = name
    return member


def backend_with(base, member, function):
    """A backend whose member of the interface's class `base` is this function."""
    bases = {
        AttentionImpl: (ReferenceImpl, "get_impl_cls"),
        MLAAttentionImpl: (ReferenceMLABackend.get_impl_cls(), "get_impl_cls"),
        AttentionMetadata: (ReferenceMetadata, "get_metadata_cls"),
        AttentionMetadataBuilder: (ReferenceBackend.builder_cls, "get_builder_cls"),
        AttentionState: (CommonAttentionState, "get_state_cls"),
    }
    if base is AttentionBackend:
        return type("Broken", (ReferenceBackend,), {member: staticmethod(function)})
    good, getter = bases[base]
    part = type("Broken", (good,), {member: function})
    backend = ReferenceMLABackend if base is MLAAttentionImpl else ReferenceBackend
    return type("BrokenBackend", (backend,), {getter: staticmethod(lambda: part)})


EVERY_MEMBER = [(base, member) for base, members in _METHODS.items() for member in members]
TAKES_ARGUMENTS = [
    (base, member)
    for base, member in EVERY_MEMBER
    if member not in ("full_cls_name", "get_state_cls", "get_kv_cache_stride_order")
]


@pytest.mark.parametrize(("base", "member"), TAKES_ARGUMENTS, ids=lambda v: str(v).split(".")[-1])
def test_a_member_with_other_arguments_is_named(base, member):
    few = (lambda: None) if base is AttentionBackend else (lambda self: None)
    with pytest.raises(InvalidInputError) as error:
        register_backend(backend_with(base, member, few))
    assert f"Broken.{member}" in str(error.value)
    assert f"does not accept every call of {base.__name__}.{member}(" in str(error.value)


@pytest.mark.parametrize(("base", "member"), EVERY_MEMBER, ids=lambda v: str(v).split(".")[-1])
def test_a_member_with_more_arguments_is_named(base, member):
    def more(one, *args, another_one, **kwargs):
        return None

    if base is MLAAttentionImpl and member == "__init__":
        pytest.skip("implementations add arguments by keyword")
    if member == "get_state_cls":
        return  # it is called, and what it raises is reported
    (problem,) = check_backend_class(backend_with(base, member, more))
    assert f"Broken.{member}" in problem
    assert "another_one" in problem


@pytest.mark.parametrize(("base", "member"), EVERY_MEMBER, ids=lambda v: str(v).split(".")[-1])
def test_a_member_with_star_arguments_is_accepted(base, member):
    if member == "get_state_cls":
        return
    anything = lambda *args, **kwargs: None
    assert check_backend_class(backend_with(base, member, anything)) == []


@pytest.mark.parametrize(("base", "member"), EVERY_MEMBER, ids=lambda v: str(v).split(".")[-1])
def test_a_member_that_is_not_a_method_is_named(base, member):
    if base is AttentionBackend or member == "__init__":
        return  # static members are functions already; a class without a constructor has none
    (problem,) = check_backend_class(backend_with(base, member, 3))
    assert f"Broken.{member} is not callable" in problem


def forward_of_vllm(self, layer, query, key, value, kv_cache, attn_metadata, output=None):
    """Of a time without quantized outputs."""


def forward_without_default(
    self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, block_scale
):
    """A layer's call fits; an engine that leaves output out does not."""


def forward_with_other_names(
    self, layer, q, k, v, cache, metadata, output=None, output_scale=None, output_block_scale=None
):
    """The names of what is always given by position do not matter."""


def forward_with_the_rest_in_args(
    self, layer, query, key, value, kv_cache, attn_metadata, output=None, *scales
):
    """The scales by position only."""


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (forward_of_vllm, "too many positional arguments"),
        (forward_without_default, "missing a required argument: 'output'"),
        (forward_with_other_names, None),
        (forward_with_the_rest_in_args, None),
    ],
)
def test_forward_must_accept_every_call_of_the_interface(forward, said):
    problems = check_backend_class(backend_with(AttentionImpl, "forward", forward))
    assert (said is None and not problems) or said in problems[0]


def old_constructor(
    self,
    num_heads,
    head_size,
    scale,
    num_kv_heads=None,
    alibi_slopes=None,
    sliding_window=None,
    kv_cache_dtype="auto",
    logits_soft_cap=None,
    attn_type="decoder",
    kv_sharing_target_layer_name=None,
    sinks=None,
    *,
    head_size_v=None,
    causal=None,
    returns_lse=False,
):
    """Without alibi_symmetric."""


@pytest.mark.parametrize("alibi", [None, OneOf(True, False), OneOf(False, "symmetric"), ANY])
def test_only_a_backend_that_declares_symmetric_alibi_must_take_the_argument(alibi):
    cls = backend_with(AttentionImpl, "__init__", old_constructor)
    optional = {field for field, _ in OPTIONAL_ARGUMENTS.values()}
    fields = {k: v for k, v in cls.capabilities.fields.items() if k not in optional}
    fields |= {} if alibi is None else {"alibi": alibi}
    cls.capabilities = Capabilities(devices=cls.capabilities.devices, **fields)
    problems = check_backend_class(cls)
    if alibi is ANY or (alibi is not None and "symmetric" in alibi.describe()):
        assert "alibi_symmetric" in problems[0]
    else:
        assert problems == []


@pytest.mark.parametrize("field", ["window_size", "attention_chunk", "key_positions"])
def test_only_a_backend_that_declares_a_later_field_must_take_its_argument(field):
    cls = backend_with(AttentionImpl, "__init__", old_constructor)
    optional = {name for name, _ in OPTIONAL_ARGUMENTS.values()}
    fields = {k: v for k, v in cls.capabilities.fields.items() if k not in optional}
    cls.capabilities = Capabilities(devices=cls.capabilities.devices, **fields, **{field: ANY})
    assert field in check_backend_class(cls)[0]
    cls.capabilities = Capabilities(devices=cls.capabilities.devices, **fields)
    assert check_backend_class(cls) == []


def test_a_constructor_with_another_order_is_named():
    def constructor(self, head_size, num_heads, **kwargs):
        pass

    (problem,) = check_backend_class(backend_with(AttentionImpl, "__init__", constructor))
    assert "too many positional arguments" in problem


def test_a_static_member_needs_no_decorator():
    """A backend is never instantiated, so both are called on the class."""
    cls = type("Plain", (ReferenceBackend,), {"copy_blocks": lambda kv_caches, src_to_dists: None})
    assert check_backend_class(cls) == []
    cls = type("Plain", (ReferenceBackend,), {"copy_blocks": lambda self, a, b: None})
    assert "Plain.copy_blocks" in check_backend_class(cls)[0]


@pytest.mark.parametrize("name", ["prefill_metadata", "decode_metadata"])
def test_metadata_of_a_phase_must_be_a_property(name):
    (problem,) = check_backend_class(backend_with(AttentionMetadata, name, lambda self: None))
    assert problem == f"Broken.{name} is a method; it must be a property"


@pytest.mark.parametrize("name", BUILTIN)
def test_our_own_signatures_are_those_of_the_interface(name):
    assert check_backend_class(resolve_full_cls_name(BUILTIN[name].target)) == []


def test_the_backend_without_attention_is_a_proper_backend():
    assert check_backend_class(NoAttentionBackend) == []
