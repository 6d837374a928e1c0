"""AttentionSpec: what it takes, what it refuses, what it fills in, how it prints."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

import attn_dispatch
from attn_dispatch.backends.reference.semantics import visible
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.spec import LAYER_KINDS, AttentionSpec, MLADims
from attn_dispatch.interface.types import AttentionType
from support.golden.specs import SPECS
from support.selection import DEEPSEEK, layer, mla_layer

FIELDS = dataclasses.fields(AttentionSpec)
NEUTRAL_FIELDS = [field for field in FIELDS if "neutral" in field.metadata]


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_field_is_documented(field):
    assert field.metadata["doc"].endswith(".")


@pytest.mark.parametrize("field", NEUTRAL_FIELDS, ids=lambda f: f.name)
def test_a_field_is_neutral_by_default(field):
    # Else a new field would change what existing requests get.
    assert field.default == field.metadata["neutral"]


WRONG_ALONE = [
    ("num_heads", 0),
    ("num_heads", 8.0),
    ("num_heads", True),
    ("num_heads", "8"),
    ("head_size", 0),
    ("head_size", -64),
    ("head_size_v", 0),
    ("num_kv_heads", 0),
    ("dtype", torch.int8),
    ("dtype", "bfloat16"),
    ("kv_cache_dtype", "int8"),
    ("kv_cache_dtype", torch.bfloat16),
    ("kv_cache_dtype", None),
    ("kv_scales", "per_token"),
    ("kv_cache_layout", "nhd"),
    ("block_size", 0),
    ("block_size", 16.0),
    ("attn_type", "self"),
    ("attn_type", None),
    ("sliding_window", 0),
    ("sliding_window", -1),
    ("window_size", 8),
    ("window_size", (8,)),
    ("window_size", "8,8"),
    ("attention_chunk", 0),
    ("attention_chunk", 8.0),
    ("logits_soft_cap", 0),
    ("logits_soft_cap", -30.0),
    ("logits_soft_cap", float("inf")),
    ("logits_soft_cap", float("nan")),
    ("logits_soft_cap", True),
    ("output_quant", "int8"),
    ("mla", {"kv_lora_rank": 512}),
    ("causal", 1),
    *[(field.name, 1) for field in NEUTRAL_FIELDS if field.metadata["neutral"] is False],
]


@pytest.mark.parametrize(("field", "value"), WRONG_ALONE, ids=str)
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(InvalidInputError, match=re.escape(f"{field}={value!r}")):
        layer(**{field: value})


def test_kv_heads_must_divide_heads():
    with pytest.raises(InvalidInputError, match="num_heads=8 is not a multiple of num_kv_heads=3"):
        layer(num_heads=8, num_kv_heads=3)


def test_an_int8_cache_takes_no_scales():
    message = r"kv_scales='per_head' is for fp8 caches; .* Leave kv_scales out\."
    with pytest.raises(InvalidInputError, match=message):
        layer(kv_cache_dtype="int8_per_token_head", kv_scales="per_head")


def test_mla_sizes_must_be_those_of_the_latent_cache():
    with pytest.raises(InvalidInputError, match=r"head_size=kv_lora_rank\+qk_rope_head_dim=576"):
        layer(num_heads=16, num_kv_heads=16, head_size=192, mla=DEEPSEEK)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(MLADims)])
def test_mla_sizes_are_positive(field):
    with pytest.raises(InvalidInputError, match=f"{field}=0"):
        dataclasses.replace(DEEPSEEK, **{field: 0})


def test_for_mla_fills_in_the_latent_cache():
    spec = mla_layer()
    assert (spec.num_kv_heads, spec.head_size, spec.head_size_v) == (1, 512 + 64, 512)


def test_heads_and_value_size_default_to_those_of_the_query():
    spec = AttentionSpec(num_heads=8, head_size=64, dtype=torch.float32)
    assert (spec.num_kv_heads, spec.head_size_v) == (8, 64)


@pytest.mark.parametrize("attn_type", list(AttentionType), ids=str)
def test_only_a_decoder_is_causal_by_default(attn_type):
    assert layer(attn_type=attn_type).causal is (attn_type is AttentionType.DECODER)


def test_a_decoder_may_be_non_causal():
    assert layer(causal=False).causal is False


def test_attn_type_may_be_text():
    assert layer(attn_type="encoder_only") == layer(attn_type=AttentionType.ENCODER_ONLY)


def test_equal_requests_have_equal_hashes():
    assert layer(logits_soft_cap=50) == layer(logits_soft_cap=50.0)
    assert len({layer(logits_soft_cap=50), layer(logits_soft_cap=50.0), layer()}) == 2


def test_a_request_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer().head_size = 128


def test_replace_checks_like_the_constructor():
    assert layer().replace(sinks=True) == layer(sinks=True)
    with pytest.raises(InvalidInputError, match="head_size=0"):
        layer().replace(head_size=0)


KINDS = {
    "full": layer(),
    "sliding_window": layer(sliding_window=128),
    "chunked": layer(attention_chunk=8192),
    "encoder": layer(attn_type=AttentionType.ENCODER),
    "encoder_only": layer(attn_type=AttentionType.ENCODER_ONLY, sliding_window=128),
    "encoder_decoder": layer(attn_type=AttentionType.ENCODER_DECODER),
    "mla": mla_layer(),
}


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_kind(kind):
    assert KINDS[kind].kind == kind


#: causal, window_size -> causal, sliding_window, window_size of the layer.
WINDOWS = [
    (True, (-1, -1), True, None, None),
    (False, (-1, -1), False, None, None),
    (True, (7, 7), True, 8, None),
    (False, (7, 7), False, 8, None),
    (False, (7, 0), True, 8, None),
    (True, (7, 3), True, 8, None),
    (True, (7, -1), True, 8, None),
    (True, (-1, 3), True, None, None),
    (False, (-1, 0), True, None, None),
    (False, (0, 0), True, 1, None),
    (False, (7, 3), False, None, (7, 3)),
    (False, (-1, 3), False, None, (-1, 3)),
    (False, (7, -1), False, None, (7, -1)),
    (False, [0, 3], False, None, (0, 3)),
]


@pytest.mark.parametrize(("causal", "window", "c", "s", "t"), WINDOWS, ids=str)
def test_a_window_has_one_form(causal, window, c, s, t):
    spec = layer(causal=causal, window_size=window)
    assert (spec.causal, spec.sliding_window, spec.window_size) == (c, s, t)
    same = layer(causal=c, sliding_window=s, window_size=t)
    assert spec == same
    assert spec.replace() == spec
    positions = torch.arange(12)
    left, right = window
    k, q = positions, positions[:, None]
    wanted = (k >= q - left) | torch.tensor(left < 0)
    wanted &= (k <= q + right) | torch.tensor(right < 0)
    wanted &= (k <= q) | torch.tensor(not causal)
    fields = {"sliding_window": s, "window_size": t}
    assert torch.equal(visible(positions, positions, causal=c, **fields), wanted)


def test_a_layer_has_one_window():
    message = r"sliding_window=8 and window_size=\(7, 3\) are both given"
    with pytest.raises(InvalidInputError, match=message):
        layer(causal=False, sliding_window=8, window_size=(7, 3))


def test_sides_of_a_window_are_minus_one_or_more():
    with pytest.raises(InvalidInputError, match="window_size=-2 is not an integer of -1 or more"):
        layer(causal=False, window_size=(-2, 3))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_request_survives_json(spec):
    data = json.loads(json.dumps(spec.asdict()))
    mla = data.pop("mla")
    dtype = getattr(torch, data.pop("dtype"))
    assert AttentionSpec(**data, dtype=dtype, mla=mla and MLADims(**mla)) == spec


def test_text_shows_fields_that_are_not_default():
    spec = AttentionSpec(num_heads=8, head_size=64, dtype=torch.float16, sliding_window=128)
    assert str(spec) == "num_heads=8, head_size=64, dtype=float16, sliding_window=128"


@pytest.mark.parametrize(
    ("wrong", "cached_alike"),
    [
        ({"num_heads": True}, {"num_heads": 1}),
        ({"num_heads": 8.0}, {"num_heads": 8}),
        ({"num_heads": 8, "alibi": 0}, {"num_heads": 8, "alibi": False}),
    ],
    ids=str,
)
def test_a_cached_answer_does_not_accept_a_wrong_call(wrong, cached_alike):
    # 1 == True == 1.0 to a cache, not to the request.
    ask = attn_dispatch.get_attn_backend
    ask(64, torch.float32, device="cpu", **cached_alike)
    with pytest.raises(InvalidInputError):
        ask(64, torch.float32, device="cpu", **wrong)


def test_a_field_that_does_not_exist_is_named():
    with pytest.raises(InvalidInputError, match="logit_cap"):
        attn_dispatch.get_attn_backend(64, torch.float32, num_heads=8, logit_cap=30.0)


def test_replace_updates_derived_fields():
    spec = AttentionSpec(num_heads=8, head_size=64, dtype=torch.float32)
    other = spec.replace(num_heads=32, head_size=128, attn_type="encoder")
    assert (other.num_kv_heads, other.head_size_v, other.causal) == (32, 128, False)


def test_replace_keeps_given_fields():
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_size=64, dtype=torch.float32)
    assert spec.replace(num_heads=32).num_kv_heads == 2
