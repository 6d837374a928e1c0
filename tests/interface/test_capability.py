"""Capabilities: the closed world, every constraint, every refusal as data and as a sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.capability import (
    ANY,
    NOT_NONE,
    AnyOf,
    ByDevice,
    Capabilities,
    MultipleOf,
    OneOf,
    Range,
    Reason,
    ReasonCode,
    SameAs,
    compare,
)
from attn_dispatch.interface.kv_strides import KVStrides
from attn_dispatch.interface.spec import KV_CACHE_DTYPES, OUTPUT_QUANTS, AttentionSpec, plain_value
from attn_dispatch.interface.types import LENGTHS, AttentionType
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES, known_device
from attn_dispatch.selection.priorities import BUILTIN
from attn_dispatch.selection.registry import registry, resolve_full_cls_name
from attn_dispatch.selection.resolve import explained_device
from support.selection import DEEPSEEK, layer, make_backend, mla_layer

BACKENDS = {name: resolve_full_cls_name(each.target) for name, each in BUILTIN.items()}
CPU, H200, MI300X = known_device("cpu"), known_device("H200"), known_device("MI300X")
NVIDIA, HOPPER = DeviceMatch(vendor="nvidia"), DeviceMatch(archs=("sm90",))

# --- The closed world -------------------------------------------------------------------------


def with_new_field(spec: AttentionSpec, value: Any, **metadata: Any) -> AttentionSpec:
    """The request as it would be with one more field, `novelty`, that no backend declares."""
    field = dataclasses.field(default=None, metadata={"doc": "New.", **metadata})
    extended = dataclasses.make_dataclass(
        "ExtendedSpec",
        [("novelty", Any, field)],
        bases=(AttentionSpec,),
        frozen=True,
        kw_only=True,
    )
    known = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    return extended(**known, novelty=value)


def served(name: str) -> AttentionSpec:
    """A request that the backend accepts."""
    return mla_layer(block_size=64) if name.endswith("MLA") else layer()


def home(name: str) -> DeviceProfile:
    """A device that the backend runs on, with every library."""
    matches = BACKENDS[name].capabilities.devices
    runs_on = (
        a for a, profile in KNOWN_DEVICES.items() if any(m.matches(profile) for m in matches)
    )
    return explained_device(next(runs_on))


@pytest.mark.parametrize("name", BACKENDS)
def test_an_undeclared_new_field_is_rejected(name):
    spec = with_new_field(served(name), "sharp")
    (reason,) = compare(spec, BACKENDS[name].capabilities, home(name))
    assert (reason.code, reason.field, reason.asked) == (ReasonCode.UNDECLARED, "novelty", "sharp")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_new_field_without_a_neutral_value_is_always_rejected(name):
    spec = with_new_field(served(name), None)
    (reason,) = compare(spec, BACKENDS[name].capabilities, home(name))
    assert (reason.code, reason.field) == (ReasonCode.UNDECLARED, "novelty")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_new_field_is_accepted_at_its_neutral_value(name):
    spec = with_new_field(served(name), None, neutral=None)
    assert compare(spec, BACKENDS[name].capabilities, home(name)) == []


# --- Every declaration of every backend -------------------------------------------------------

#: Caches of engines: in one tensor or two, with the same strides or not, aligned or not.
STRIDES = [
    KVStrides(key=key, value=value, alignment=alignment, separate=separate)
    for key, value, alignment, separate in (
        ((32768, 2048, 128), (32768, 2048, 128), 128, True),
        ((65536, 256, 4096), (65536, 256, 4096), 128, False),
        ((32768, 2048, 128), (16384, 1024, 64), 16, True),
        ((32768, 2048, 128), (32768, 2048, 128), 8, True),
        ((1280, 80, 40), (1280, 80, 40), 128, True),
    )
]

#: Values of each field from all over its domain. Fields that a value needs next to it are added.
VALUES: dict[str, list[Any]] = {
    "num_heads": [1, 8, 71, 128],
    "num_kv_heads": [1, 2, 8],
    "head_size": [1, 7, 33, 64, 80, 96, 112, 128, 192, 256, 512, 1024],
    "head_size_v": [1, 7, 64, 128, 512],
    "dtype": [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn],
    "kv_cache_dtype": list(KV_CACHE_DTYPES),
    "kv_scales": ["per_tensor", "per_head"],
    "block_size": [None, 1, 16, 48, 64, 256],
    "kv_cache_layout": [None, "NHD", "HND"],
    "kv_strides": [None, *STRIDES],
    "lengths": list(LENGTHS),
    "attn_type": list(AttentionType),
    "sliding_window": [None, 1, 128, 4096],
    "window_size": [None, (128, 64), (-1, 8), (8, -1)],
    "attention_chunk": [None, 1, 8192],
    "logits_soft_cap": [None, 30.0],
    "alibi": [False, True],  # "symmetric" is True where the layer is causal: see below
    "mla": [None, DEEPSEEK],
    "output_quant": [None, *OUTPUT_QUANTS],
    **{f.name: [False, True] for f in dataclasses.fields(AttentionSpec) if f.type == "bool"},
}


def request_with(name: str, field: str, value: Any) -> AttentionSpec | None:
    """What the backend accepts with one field changed; None where no such request exists."""
    if field == "mla":
        return layer() if value is None else mla_layer()
    changes = {field: value}
    if field == "num_heads":
        changes["num_kv_heads"] = 1
    if field == "window_size":  # a causal layer has no right side
        changes["causal"] = False
    try:
        return served(name).replace(**changes)
    except InvalidInputError:
        return None


class Declared(NamedTuple):
    """A request with a value of one field, on a device, and whether the declaration accepts it."""

    field: str
    spec: AttentionSpec
    device: DeviceProfile
    accepts: bool


def declarations(name: str) -> Iterator[Declared]:
    """Every value of every field on every device, for one backend."""
    for field, values in VALUES.items():
        constraint = BACKENDS[name].capabilities.fields.get(field)
        neutral = AttentionSpec.__dataclass_fields__[field].metadata.get("neutral", ...)
        for value in values:
            spec = request_with(name, field, value)
            if spec is None:
                continue
            for device in (CPU, H200, MI300X):
                if constraint is None:
                    accepts = value == neutral
                else:
                    accepts = constraint.accepts(value, spec, device)
                yield Declared(field, spec, device, accepts)


def test_values_cover_every_field():
    assert set(VALUES) == {field.name for field in dataclasses.fields(AttentionSpec)}


@pytest.mark.parametrize(
    ("name", "device", "accepts"),
    [
        ("REFERENCE", CPU, True),
        ("TORCH_SDPA", CPU, True),
        ("TORCH_SDPA", H200, False),
        ("TRITON_ATTN", H200, True),
        ("HOPPER_ATTN", H200, False),
        ("FLASHINFER", H200, False),
    ],
)
def test_symmetric_alibi_is_for_backends_that_declare_it(name, device, accepts):
    spec = AttentionSpec(
        num_heads=8, head_size=64, dtype=torch.float32, causal=False, alibi="symmetric"
    )
    capabilities = registry.candidates()[name].backend_cls.capabilities
    refused = [reason.field for reason in compare(spec, capabilities, device)]
    assert ("alibi" not in refused) is accepts


def test_symmetric_alibi_of_a_causal_layer_is_signed():
    spec = AttentionSpec(num_heads=8, head_size=64, dtype=torch.float32, alibi="symmetric")
    assert spec.alibi is True
    assert spec.replace(bidirectional_ranges=True, alibi="symmetric").alibi == "symmetric"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_value_outside_of_a_declaration_is_rejected_with_its_field(name):
    capabilities = BACKENDS[name].capabilities
    rejected = [each for each in declarations(name) if not each.accepts]
    assert rejected
    for field, spec, device, _ in rejected:
        found = [r for r in compare(spec, capabilities, device) if r.field == field]
        constraint = capabilities.fields.get(field)
        asked = str(plain_value(getattr(spec, field)))
        if constraint is None:
            wanted = Reason(code=ReasonCode.UNDECLARED, field=field, asked=asked)
            sentence = f"{field}={asked} is not supported; the backend does not declare it"
        else:
            allowed = constraint.describe(device)
            wanted = Reason(code=ReasonCode.VALUE, field=field, asked=asked, allowed=allowed)
            sentence = f"{field}={asked} is not supported; supported: {allowed}"
        assert found == [wanted], device
        assert str(found[0]) == sentence


@pytest.mark.parametrize("name", BACKENDS)
def test_a_value_inside_of_a_declaration_is_not_rejected_for_its_field(name):
    admitted = [each for each in declarations(name) if each.accepts]
    assert len(admitted) > 100
    for field, spec, device, _ in admitted:
        reasons = compare(spec, BACKENDS[name].capabilities, device)
        assert field not in [reason.field for reason in reasons], (spec, device)


def test_output_rows_must_be_whole_groups():
    spec = layer(num_heads=3, num_kv_heads=1, head_size=64, output_quant="fp8_e4m3_group128")
    (reason,) = ReferenceBackend.check_combination(spec, CPU)
    assert (reason.code, reason.field) == (ReasonCode.COMBINATION, "output_quant")
    assert str(reason) == (
        "output_quant: fp8_e4m3_group128 with num_heads * head_size_v = 192 is not supported; "
        "supported: multiples of 128"
    )


# --- Constraints ------------------------------------------------------------------------------

CONSTRAINTS = [
    (ANY, [1, None, "x"], [], "any"),
    (NOT_NONE, [1, 0, False, DEEPSEEK], [None], "any but None"),
    (OneOf(64, 128), [64, 128], [96, None], "64, 128"),
    (OneOf(torch.float16), [torch.float16], [torch.bfloat16, "float16"], "float16"),
    (OneOf(None, AttentionType.DECODER), [None, "decoder"], ["encoder"], "None, decoder"),
    (MultipleOf(16), [16, 48, 4096], [8, 33, None], "multiples of 16"),
    (MultipleOf(8, 256), [8, 256], [264, 12, None], "multiples of 8 up to 256"),
    (Range(32, 256), [32, 100, 256], [31, 257, None], "32 to 256"),
    (Range(2, math.inf), [2, 10**9], [1, None], "2 or more"),
    (SameAs("head_size"), [64], [63, None], "the same as head_size"),
    (AnyOf(OneOf(None), MultipleOf(16)), [None, 32], [33], "None or multiples of 16"),
]


@pytest.mark.parametrize(
    ("constraint", "good", "bad", "words"), CONSTRAINTS, ids=[words for *_, words in CONSTRAINTS]
)
def test_constraint(constraint, good, bad, words):
    spec = layer(head_size=64)
    assert all(constraint.accepts(value, spec, CPU) for value in good)
    assert not any(constraint.accepts(value, spec, CPU) for value in bad)
    assert constraint.describe() == constraint.describe(CPU) == words


BY_DEVICE = ByDevice((HOPPER, ANY), (NVIDIA, Range(1, 256)), otherwise=OneOf(64))


@pytest.mark.parametrize(
    ("device", "value", "admitted"),
    [("sm90", 512, True), ("sm80", 512, False), ("sm80", 256, True), ("gfx942", 256, False)],
)
def test_by_device_counts_the_first_match(device, value, admitted):
    assert BY_DEVICE.accepts(value, layer(), KNOWN_DEVICES[device]) is admitted


def test_by_device_describes_itself():
    assert BY_DEVICE.describe() == "any on sm90; 1 to 256 on nvidia; otherwise 64"
    assert BY_DEVICE.describe(known_device("sm80")) == "1 to 256"


# --- Declarations that are wrong --------------------------------------------------------------

ANYWHERE = {"devices": (DeviceMatch(),)}
WRONG_DECLARATIONS = {
    "a field that does not exist": (ANYWHERE | {"logit_cap": ANY}, "logit_cap"),
    "a value instead of a constraint": (ANYWHERE | {"sinks": True}, r"OneOf\(True\)"),
    "one device instead of a tuple": ({"devices": DeviceMatch()}, "not a tuple of DeviceMatch"),
    "names of devices": ({"devices": ("sm90",)}, "not a tuple of DeviceMatch"),
    "one library instead of a tuple": (ANYWHERE | {"requires": "triton"}, "not a tuple of str"),
    "a requirement that is none": (
        ANYWHERE | {"requires": ("triton=>3",)},
        "'triton=>3', which is not a requirement",
    ),
}


@pytest.mark.parametrize(
    ("declaration", "message"), WRONG_DECLARATIONS.values(), ids=WRONG_DECLARATIONS
)
def test_a_wrong_declaration_is_an_error(declaration, message):
    with pytest.raises(InvalidInputError, match=message):
        Capabilities(**declaration)


def test_same_as_must_name_a_field():
    with pytest.raises(InvalidInputError, match="no_such_field"):
        SameAs("no_such_field")


# --- Reasons ----------------------------------------------------------------------------------

SENTENCES = {
    ReasonCode.VALUE: "head_size=7 is not supported; supported: 64, 128 (pad it)",
    ReasonCode.UNDECLARED: "head_size=7 is not supported; the backend does not declare it (pad it)",
    ReasonCode.COMBINATION: "head_size: 7 is not supported; supported: 64, 128 (pad it)",
    ReasonCode.DEVICE: "does not run on 7; runs on: 64, 128 (pad it)",
    ReasonCode.LIBRARY: "needs 64, 128: head_size is 7 (pad it)",
    ReasonCode.LOAD: "cannot be loaded: 7 (pad it)",
    ReasonCode.EXCLUDED: "excluded by 7 (pad it)",
    ReasonCode.FAILED: "passed over: 7 (pad it)",
}


@pytest.mark.parametrize("code", list(ReasonCode), ids=str)
def test_every_reason_is_a_sentence_and_data(code):
    reason = Reason(code=code, field="head_size", asked="7", allowed="64, 128", hint="pad it")
    assert str(reason) == SENTENCES[code]
    assert json.loads(json.dumps(reason.asdict())) == {
        "code": code.value,
        "field": "head_size",
        "asked": "7",
        "allowed": "64, 128",
        "hint": "pad it",
        "message": SENTENCES[code],
    }


def test_every_reason_is_listed_not_only_the_first():
    narrow = make_backend("NARROW", devices=(HOPPER,), head_size=OneOf(128), sinks=OneOf(False))
    reasons = compare(layer(head_size=64, sinks=True), narrow.capabilities, known_device("sm80"))
    assert [reason.field for reason in reasons] == ["device", "head_size", "sinks"]


def test_a_device_is_rejected_by_name():
    hopper_only = make_backend("HOPPER_ONLY", devices=(HOPPER, DeviceMatch(vendor="amd")))
    (reason,) = compare(layer(), hopper_only.capabilities, CPU)
    assert str(reason) == "does not run on CPU (cpu); runs on: sm90; amd"
