"""plan_kv_cache: one block size and layout for a whole model, or the layers that conflict."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from attn_dispatch import Attention, attention_backend, bind_kv_caches, plan_kv_cache
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import AnyOf, MultipleOf, OneOf
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.runtime.kv_cache_plan import BLOCK_SIZES
from attn_dispatch.selection.failure_record import Failure, forget_failures, record
from support.cases import INT8
from support.selection import layer, make_backend, mla_layer, registered

CPU = known_device("cpu")


def open_layer(**fields):
    """A layer that leaves block size and layout to the plan."""
    return layer(**{"block_size": None, **fields})


def blocks(*sizes: int) -> OneOf:
    return OneOf(None, *sizes)


# --- One plan for a model ---------------------------------------------------------------------


def test_a_mixed_model_gets_one_block_size_and_layout():
    layers = {
        "local": open_layer(sliding_window=128),
        "global": open_layer(logits_soft_cap=50.0),
        "wide": open_layer(head_size=128, num_kv_heads=1),
    }
    plan = plan_kv_cache(layers, CPU)
    assert (plan.block_size, plan.layout) == (16, "NHD")
    assert {(spec.block_size, spec.kv_cache_layout) for spec in plan.specs.values()} == {
        (16, "NHD")
    }
    assert plan.shapes == {
        "local": (2, 16, 2, 64),
        "global": (2, 16, 2, 64),
        "wide": (2, 16, 1, 128),
    }


def test_a_plan_changes_only_block_size_and_layout():
    spec = open_layer(logits_soft_cap=50.0, kv_cache_dtype="fp8")
    planned = plan_kv_cache({"a": spec}, CPU).specs["a"]
    assert planned.replace(block_size=None, kv_cache_layout=None) == spec


def test_mla_and_dense_layers_in_one_plan():
    plan = plan_kv_cache({"mla": mla_layer(block_size=None), "dense": open_layer()}, CPU)
    assert plan.shapes == {"mla": (16, 576), "dense": (2, 16, 2, 64)}
    caches = plan.allocate(4)
    assert caches["mla"].shape == (4, 16, 576)
    assert caches["dense"].shape == (4, 2, 16, 2, 64)


def test_layers_without_a_cache_need_none():
    encoder = layer(attn_type=AttentionType.ENCODER_ONLY, block_size=None)
    plan = plan_kv_cache({"encoder": encoder, "decoder": open_layer()}, CPU)
    assert plan.specs["encoder"] == encoder
    assert set(plan.shapes) == set(plan.allocate(1)) == {"decoder"}


def test_a_model_of_encoders_has_no_blocks():
    plan = plan_kv_cache({"e": layer(attn_type=AttentionType.ENCODER, block_size=None)}, CPU)
    assert (plan.bytes_per_block, plan.num_blocks(1 << 30), plan.allocate(8)) == (0, 0, {})


def test_an_empty_model_has_an_empty_plan():
    assert plan_kv_cache({}, CPU).specs == {}


def test_values_wider_than_keys_fit():
    plan = plan_kv_cache({"a": open_layer(head_size=64, head_size_v=128)}, CPU)
    assert plan.shapes["a"] == (2, 16, 2, 128)


def test_a_plan_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_kv_cache({"a": open_layer(sinks=True)}, known_device("H200"))


# --- Memory -----------------------------------------------------------------------------------

ELEMENT_TYPES = [
    ("auto", "cpu", torch.bfloat16),
    ("float32", "cpu", torch.float32),
    ("fp8", "sm90", torch.float8_e4m3fn),
    ("fp8", "gfx942", torch.float8_e4m3fnuz),
    ("fp8_e5m2", "cpu", torch.float8_e5m2),
    (INT8, "cpu", torch.int8),
]


@pytest.mark.parametrize(("name", "device", "dtype"), ELEMENT_TYPES)
def test_the_element_type_is_that_of_the_cache(name, device, dtype):
    plan = plan_kv_cache({"a": open_layer(kv_cache_dtype=name)}, known_device(device))
    assert plan.dtypes["a"] == plan.allocate(1)["a"].dtype == dtype


def test_num_blocks_for_memory():
    plan = plan_kv_cache(
        {"bf16": open_layer(), "fp8": open_layer(kv_cache_dtype="fp8"), "mla": mla_layer()}, CPU
    )
    dense, latent = 2 * 16 * 2 * 64, 16 * 576
    assert plan.bytes_per_block == dense * 2 + dense * 1 + latent * 2
    assert plan.num_blocks(10 * plan.bytes_per_block) == 10
    assert plan.num_blocks(10 * plan.bytes_per_block - 1) == 9


@pytest.mark.parametrize(
    ("sizes", "stored"), [((64, 64), 80), ((64, 128), 144), ((65, 1), 96), ((7, 16), 32)], ids=str
)
def test_an_int8_head_includes_its_scale(sizes, stored):
    head_size, head_size_v = sizes
    spec = open_layer(head_size=head_size, head_size_v=head_size_v, kv_cache_dtype=INT8)
    plan = plan_kv_cache({"a": spec}, CPU)
    assert plan.shapes["a"] == (2, 16, 2, stored)
    assert plan.bytes_per_block == 2 * 16 * 2 * stored
    assert plan.allocate(3)["a"].shape == (3, 2, 16, 2, stored)


def test_latents_have_no_int8_cache():
    with pytest.raises(UnsupportedError, match=f"kv_cache_dtype={INT8} is not supported"):
        plan_kv_cache({"mla": mla_layer(kv_cache_dtype=INT8)}, CPU)


def test_allocated_bytes_equal_the_plan():
    layers = {"a": open_layer(), "mla": mla_layer(), "int8": open_layer(kv_cache_dtype=INT8)}
    plan = plan_kv_cache(layers, CPU)
    caches = plan.allocate(5).values()
    assert sum(c.numel() * c.element_size() for c in caches) == 5 * plan.bytes_per_block


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_block_is_contiguous_in_either_layout(layout):
    cache = plan_kv_cache({"a": open_layer(kv_cache_layout=layout)}, CPU).allocate(3)["a"]
    per_block = math.prod(cache.shape[1:])
    assert cache.stride(0) == per_block
    heads_first = cache.stride(3) > cache.stride(2)
    assert heads_first == (layout == "HND")


# --- Sharing ----------------------------------------------------------------------------------


def test_a_sharing_layer_gets_its_targets_cache():
    layers = {"a": open_layer(), "b": open_layer(kv_sharing=True)}
    plan = plan_kv_cache(layers, CPU, shared={"b": "a"})
    caches = plan.allocate(2)
    assert caches["b"] is caches["a"]
    assert set(plan.shapes) == {"a"}  # counted once


SHARING_MISTAKES = {
    "no target": ({"b": open_layer(kv_sharing=True)}, {}, "kv_sharing=True and no target"),
    "target without sharing": ({"b": open_layer()}, {"b": "a"}, "kv_sharing=False and a target"),
    "target that is missing": (
        {"b": open_layer(kv_sharing=True)},
        {"b": "z"},
        "'z', which is not a layer with a cache of its own",
    ),
    "target that shares": (
        {"b": open_layer(kv_sharing=True), "c": open_layer(kv_sharing=True)},
        {"b": "a", "c": "b"},
        "'b', which is not a layer with a cache of its own",
    ),
    "itself": ({"b": open_layer(kv_sharing=True)}, {"b": "b"}, "cache of its own"),
    "another head size": (
        {"b": open_layer(kv_sharing=True, head_size=32)},
        {"b": "a"},
        "head_size differ: 32 and 64",
    ),
    "other scales": (
        {"b": open_layer(kv_sharing=True, kv_scales="per_head")},
        {"b": "a"},
        "kv_scales differ: per_head and per_tensor",
    ),
    "a layer that is not there": ({}, {"z": "a"}, "names 'z', which is not a layer with a cache"),
}


@pytest.mark.parametrize(
    ("layers", "shared", "message"), SHARING_MISTAKES.values(), ids=SHARING_MISTAKES
)
def test_a_mistake_in_sharing_is_rejected(layers, shared, message):
    with pytest.raises(InvalidInputError, match=message):
        plan_kv_cache({"a": open_layer(), **layers}, CPU, shared=shared)


# --- Choosing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 48, 256])
def test_a_fixed_block_size_is_kept(size):
    plan = plan_kv_cache({"open": open_layer(), "insists": layer(block_size=size)}, CPU)
    assert plan.block_size == plan.specs["open"].block_size == size


def test_a_fixed_layout_is_kept():
    layers = {"open": open_layer(), "insists": open_layer(kv_cache_layout="HND")}
    assert plan_kv_cache(layers, CPU).layout == "HND"


def test_the_plan_gives_layers_the_best_backends():
    with registered(make_backend("TORCH_SDPA", block_size=MultipleOf(64))):
        plan = plan_kv_cache({"a": open_layer(), "b": open_layer(num_heads=4)}, CPU)
        assert plan.block_size == 64


def test_the_plan_has_the_layout_that_backends_prefer():
    likes_hnd = make_backend("TORCH_SDPA")
    likes_hnd.get_kv_cache_stride_order = staticmethod(lambda: (0, 1, 3, 2, 4))
    with registered(likes_hnd):
        assert plan_kv_cache({"a": open_layer()}, CPU).layout == "HND"


def test_the_plan_follows_the_majority_of_layers():
    only_64 = make_backend("MAJORITY", block_size=blocks(64), sinks=OneOf(True))
    only_32 = make_backend("MINORITY", block_size=blocks(32), returns_lse=OneOf(True))
    layers = {f"sinks {n}": open_layer(sinks=True) for n in range(3)}
    layers["lse"] = open_layer(returns_lse=True)
    with registered(only_64, only_32):
        assert plan_kv_cache(layers, CPU).block_size == 64


def test_an_override_for_one_phase_counts():
    with registered(make_backend("ONLY_128", block_size=blocks(128))):
        plan = plan_kv_cache({"a": open_layer()}, CPU, backend="decode=ONLY_128")
    assert plan.block_size == 128


def test_a_failed_backend_is_not_planned_for():
    """The first in the order takes only HND caches."""
    failed = make_backend("TORCH_SDPA", kv_cache_layout=OneOf("HND"), block_size=OneOf(16))
    spec = open_layer()
    with registered(failed):
        assert plan_kv_cache({"a": spec}, CPU).layout == "HND"
        failed_for = spec.replace(block_size=16)
        record(Failure("TORCH_SDPA", failed_for, "cpu", None, "at its launch", "RuntimeError"))
        try:
            plan = plan_kv_cache({"a": spec}, CPU)
        finally:
            forget_failures()
    assert plan.layout == "NHD"


# --- Conflicts --------------------------------------------------------------------------------


def conflict(layers, **kwargs) -> str:
    with pytest.raises(UnsupportedError) as error:
        plan_kv_cache(layers, CPU, **kwargs)
    return str(error.value)


def test_a_conflict_names_only_the_layers_in_it():
    layers = {
        "a": layer(block_size=16),
        "bystander": open_layer(),
        "b": layer(block_size=32, num_heads=4),
    }
    assert conflict(layers) == (
        "No block size and layout is accepted by all of these layers:\n"
        "  a: block_size 16 in NHD or HND\n"
        "  b: block_size 32 in NHD or HND\n"
        "Exclude the backend that accepts few (an override such as kind=-NAME), or set the block "
        "size that the others accept."
    )


def test_a_conflict_of_three_layers():
    # 16 and 32, 32 and 64, 64 and 16: every pair has one in common, all three have none.
    kinds = {"sliding_window": (16, 32), "full": (32, 64), "encoder_decoder": (64, 16)}
    choosy = [make_backend(f"FOR_{k}".upper(), block_size=blocks(*s)) for k, s in kinds.items()]
    override = ",".join(f"{kind}=FOR_{kind}" for kind in kinds)
    layers = {
        "window": open_layer(sliding_window=8),
        "full": open_layer(),
        "cross": open_layer(attn_type=AttentionType.ENCODER_DECODER),
    }
    with registered(*choosy):
        message = conflict(layers, backend=override)
        sizes = {
            name: plan_kv_cache(
                {n: spec for n, spec in layers.items() if n != name}, CPU, backend=override
            ).block_size
            for name in ("window", "full", "cross")
        }
        assert sizes == {"window": 64, "cross": 32, "full": 16}
    named = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert named == [
        "window: block_size 16, 32 in NHD or HND",
        "full: block_size 32, 64 in NHD or HND",
        "cross: block_size 16, 64 in NHD or HND",
    ]


def test_a_conflict_about_the_layout():
    nhd = make_backend("ONLY_NHD", kv_cache_layout=OneOf(None, "NHD"), block_size=blocks(16))
    layers = {"a": open_layer(), "b": open_layer(kv_cache_layout="HND", sliding_window=8)}
    with registered(nhd):
        message = conflict(layers, backend="full=ONLY_NHD")
    assert "  a: block_size 16 in NHD\n" in message
    assert f"  b: block_size {', '.join(map(str, sorted(BLOCK_SIZES)))} in HND\n" in message


def test_a_conflict_between_phases_of_one_layer():
    with registered(
        make_backend("ONLY_16", block_size=AnyOf(OneOf(None), OneOf(16))),
        make_backend("ONLY_32", block_size=AnyOf(OneOf(None), OneOf(32))),
    ):
        message = conflict({"a": open_layer()}, backend="prefill=ONLY_16,decode=ONLY_32")
    assert "  a in prefill: block_size 16 in NHD or HND\n" in message
    assert "  a in decode: block_size 32 in NHD or HND\n" in message


def test_a_layer_without_a_backend_is_named_with_the_reasons():
    layers = {"fine": open_layer(), "hopeless": open_layer(sinks=True)}
    message = conflict(layers, backend="TORCH_SDPA")
    assert message.startswith("Layer 'hopeless': ")
    assert "TORCH_SDPA: sinks=True is not supported" in message
    assert "TORCH_SDPA: block_size" not in message


# --- Layers in place of specs -----------------------------------------------------------------

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}


def attention_layer(prefix: str = "", **fields) -> Attention:
    return Attention(**{**SHAPE, "device": "cpu", "block_size": None, "prefix": prefix, **fields})


class Model(torch.nn.Module):
    """Three layers under names that are not their prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = attention_layer("layers.0")
        self.rest = torch.nn.ModuleList(
            [
                attention_layer("layers.1", sliding_window=8),
                attention_layer("layers.2", kv_sharing_target_layer_name="layers.0"),
            ]
        )
        self.norm = torch.nn.LayerNorm(4)


def layers_of(model: Model) -> list[Attention]:
    return [model.first, *model.rest]


FORMS = {
    "a model": lambda model: model,
    "a list": layers_of,
    "a tuple": lambda model: tuple(layers_of(model)),
    "a module list": lambda model: torch.nn.ModuleList(layers_of(model)),
    "layers by name": lambda model: {each.prefix: each for each in layers_of(model)},
    "layers and a spec by name": lambda model: {
        "layers.0": model.first.spec,
        "layers.1": model.rest[0],
        "layers.2": model.rest[1],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_layers_gives_the_plan_of_their_specs(form):
    model = Model()
    specs = {each.prefix: each.spec for each in layers_of(model)}
    expected = plan_kv_cache(specs, "cpu", shared={"layers.2": "layers.0"})
    assert plan_kv_cache(FORMS[form](model)) == expected


@pytest.mark.parametrize("form", ["a model", "a list", "layers by name"])
def test_the_caches_of_a_models_plan_fit_the_model(form):
    model = Model()
    plan = plan_kv_cache(FORMS[form](model))
    caches = plan.allocate(3, "cpu")
    bind_kv_caches(FORMS[form](model), caches)
    assert model.first.kv_cache is caches["layers.0"]
    assert model.rest[1].kv_cache is caches["layers.0"]
    assert {each.spec for each in layers_of(model)} == set(plan.specs.values())


def test_what_a_layer_took_from_a_cache_is_planned_again():
    model = Model()
    bind_kv_caches(
        model,
        plan_kv_cache({**FORMS["layers by name"](model), "z": layer(block_size=32)}).allocate(
            1, "cpu"
        ),
    )
    assert model.first.spec.block_size == 32
    assert plan_kv_cache(model).block_size == 16


def test_layers_keep_the_overrides_that_they_were_made_with():
    with registered(make_backend("ONLY_128", block_size=blocks(128))):
        required = attention_layer("a", backend="decode=ONLY_128")
        with attention_backend("decode=ONLY_128"):
            inside = attention_layer("b")
        assert plan_kv_cache([required, attention_layer("c")]).block_size == 128
        assert plan_kv_cache([inside]).block_size == 128
        with attention_backend("decode=ONLY_128"):
            assert plan_kv_cache([attention_layer("d", backend="REFERENCE")]).block_size == 16


def test_equal_specs_with_different_overrides_conflict():
    with registered(
        make_backend("ONLY_16", block_size=blocks(16)),
        make_backend("ONLY_32", block_size=blocks(32)),
    ):
        layers = [attention_layer("a", backend="ONLY_16"), attention_layer("b", backend="ONLY_32")]
        with pytest.raises(UnsupportedError) as error:
            plan_kv_cache(layers)
    assert "  a: block_size 16 in NHD or HND\n  b: block_size 32 in NHD or HND\n" in str(
        error.value
    )


def test_a_layer_on_the_meta_device_is_planned_for_the_given_device():
    model = [attention_layer("a", device="meta")]
    assert plan_kv_cache(model, "cpu").shapes == {"a": (2, 16, 2, 16)}


WRONG_LAYERS = {
    "equal prefixes": (lambda: [attention_layer(), attention_layer()], "have the prefix ''"),
    "a list of specs": (lambda: [open_layer()], r"layers\[0\] is .*, which has no name"),
    "a model without layers": (lambda: torch.nn.Linear(1, 1), "The Linear has no Attention layer"),
    "a spec": (open_layer, "layers is a AttentionSpec; it must be a mapping"),
    "a string": (lambda: "layers", "layers is a str; it must be a mapping"),
    "another module by name": (lambda: {"a": torch.nn.Linear(1, 1)}, "layers has a Linear under"),
    "a target that is missing": (
        lambda: [attention_layer("b", kv_sharing_target_layer_name="a")],
        "Layer 'b' shares the cache of 'a', which is not a layer with a cache of its own",
    ),
}


@pytest.mark.parametrize(("layers", "message"), WRONG_LAYERS.values(), ids=WRONG_LAYERS)
def test_wrong_layers_are_rejected(layers, message):
    with pytest.raises(InvalidInputError, match=message):
        plan_kv_cache(layers())


def test_an_override_for_layers_that_have_their_own_is_rejected():
    with pytest.raises(InvalidInputError, match="backend='REFERENCE' is given with Attention"):
        plan_kv_cache([attention_layer()], backend="REFERENCE")


def test_another_target_than_the_layers_own_is_rejected():
    with pytest.raises(
        InvalidInputError, match=r"made to read the cache of 'layers\.0', and shared="
    ):
        plan_kv_cache(Model(), shared={"layers.2": "layers.1"})
    plan = plan_kv_cache(Model(), shared={"layers.2": "layers.0"})
    assert plan.shared == {"layers.2": "layers.0"}
