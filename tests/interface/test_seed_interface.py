"""The members that the interface has from vLLM: each does what its name says."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import attn_dispatch
from attn_dispatch import (
    Attention,
    InvalidInputError,
    UnsupportedError,
    forward_context,
    get_attn_backend,
    register_backend,
)
from attn_dispatch.backends.no_attention import NoAttentionBackend
from attn_dispatch.backends.reference.torch_ref import (
    ReferenceBackend,
    ReferenceMetadata,
)
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend
from attn_dispatch.interface.capability import OneOf
from attn_dispatch.interface.graphs import AttentionState, CommonAttentionState
from attn_dispatch.interface.impl import AttentionImpl, AttentionLayer
from attn_dispatch.interface.quantization import KVScales
from attn_dispatch.interface.spec import OUTPUT_QUANTS
from attn_dispatch.interface.types import PlaceholderRange
from attn_dispatch.selection.priorities import BUILTIN
from attn_dispatch.selection.registry import (
    registry,
)
from support.cases import Case, Step, layer_of, layer_spec
from support.triton_cases import HAS_GPU

#: Backends that compute on a CPU; Triton's kernels in its interpreter.
BACKENDS = ["REFERENCE", "TORCH_SDPA", *([] if HAS_GPU else ["TRITON_ATTN"])]
E4M3 = torch.float8_e4m3fn
MIXED = {"query_lens": (1, 5, 1, 3), "seq_lens": (9, 5, 4, 8)}
ONE_PHASE = {"query_lens": (5, 3), "seq_lens": (5, 8)}


def class_of(backend):
    return registry.candidates()[backend].backend_cls


def step_of(lens=MIXED, **fields):
    fields = {"dtype": torch.float32} | fields
    return Step(Case(spec=layer_spec(**fields), **lens))


@pytest.fixture
def twin():
    """A second backend that can do all that REFERENCE can, to route between the two."""

    @register_backend
    class Twin(ReferenceBackend):
        get_name = staticmethod(lambda: "TWIN")

    yield "prefill=REFERENCE,decode=TWIN"
    registry.unregister("TWIN")


# --- The fields of metadata -------------------------------------------------------------------


def written(step, metadata, impl, cache=None):
    """The cache after a call with this metadata, NaN as 7."""
    cache = step.kv_cache.clone() if cache is None else cache
    output = torch.empty(len(step.query), 4, step.spec.head_size_v, dtype=step.spec.dtype)
    impl.forward(step.layer, step.query, step.key, step.value, cache, metadata, output)
    return cache.nan_to_num(7)


def backend_of(step, backend):
    """The builder and impl of a backend, or of a layer that routes between two."""
    if "=" in backend:
        layer = layer_of(step, backend=backend)
        return layer._binding.builder, layer._binding.impl
    cls = class_of(backend)
    return cls.get_builder_cls()(step.spec, step.device), step.impl_of(cls)


ROUTED = [*BACKENDS, "prefill=REFERENCE,decode=TWIN", "prefill=TORCH_SDPA,decode=REFERENCE"]


@pytest.mark.parametrize("backend", ROUTED)
@pytest.mark.parametrize("lens", [MIXED, ONE_PHASE], ids=["mixed", "prefills"])
@pytest.mark.parametrize("way", ["assigned", "dataclasses.replace"])
@pytest.mark.parametrize("slots", ["padding", "reversed"])
def test_an_assigned_slot_mapping_is_used(twin, backend, lens, way, slots):
    step = step_of(lens)
    builder, impl = backend_of(step, backend)
    old = step.batch.slot_mapping
    new = torch.full_like(old, -1) if slots == "padding" else old.flip(0)
    wanted = written(step, builder.build(dataclasses.replace(step.batch, slot_mapping=new)), impl)
    metadata = builder.build(step.batch)
    assert metadata.prefill_metadata is not None  # what was derived from the old ones must go
    if way == "assigned":
        metadata.slot_mapping = new
    else:
        metadata = dataclasses.replace(metadata, slot_mapping=new)
    assert metadata.slot_mapping is new
    assert metadata.batch.slot_mapping is new
    assert torch.equal(written(step, metadata, impl), wanted)
    assert not torch.equal(wanted, written(step, builder.build(step.batch), impl))
    if slots == "padding":
        assert torch.equal(wanted, step.kv_cache.nan_to_num(7))


@pytest.mark.parametrize("backend", ROUTED)
def test_the_slots_of_one_phase_may_be_replaced_too(twin, backend):
    step = step_of({"query_lens": (5, 3, 1, 1), "seq_lens": (5, 8, 9, 4)})
    builder, impl = backend_of(step, backend)
    metadata = builder.build(step.batch)
    part = metadata.decode_metadata
    part.slot_mapping = torch.full_like(part.slot_mapping, -1)
    assert (part.slot_mapping == -1).all()
    assert (part.batch.slot_mapping == -1).all()
    if "=" in backend:  # the parts are what is computed
        slots = step.batch.slot_mapping.clone()
        slots[8:] = -1
        wanted = builder.build(dataclasses.replace(step.batch, slot_mapping=slots))
        assert torch.equal(written(step, metadata, impl), written(step, wanted, impl))


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
def test_a_layer_uses_the_slots_that_were_assigned_to_its_metadata(backend):
    step = step_of()
    layer = layer_of(step, backend=backend)
    metadata = layer.build_metadata(step.batch)
    metadata.slot_mapping = torch.full_like(metadata.slot_mapping, -1)
    layer(step.query, step.key, step.value, attn_metadata=metadata)
    assert torch.equal(layer.kv_cache.nan_to_num(7), step.kv_cache.nan_to_num(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_without_slots_writes_nothing_and_is_rejected(backend):
    step = step_of()
    builder, impl = backend_of(step, backend)
    metadata = builder.build(step.batch)
    metadata.slot_mapping = None
    cache = step.kv_cache.clone()
    with pytest.raises(InvalidInputError, match="slot_mapping"):
        written(step, metadata, impl, cache)
    assert torch.equal(cache.nan_to_num(7), step.kv_cache.nan_to_num(7))


WRONG_SLOTS = {
    "a list": [0, 1],
    "a number": 3,
    "too few": torch.zeros(2, dtype=torch.int64),
    "two dimensions": torch.zeros(10, 1, dtype=torch.int64),
    "on another device": torch.zeros(10, dtype=torch.int64, device="meta"),
}


@pytest.mark.parametrize("slots", WRONG_SLOTS.values(), ids=WRONG_SLOTS)
def test_rejected_slots_change_nothing(slots):
    step = step_of()
    metadata = step.metadata_of(ReferenceBackend)
    before = dict(vars(metadata))
    with pytest.raises(InvalidInputError, match="slot_mapping"):
        metadata.slot_mapping = slots
    assert vars(metadata) == before


@pytest.mark.parametrize("name", ["num_prefills", "num_prefill_tokens", "num_decode_tokens"])
def test_a_count_of_metadata_cannot_be_replaced(name):
    metadata = step_of().metadata_of(ReferenceBackend)
    before = getattr(metadata, name)
    with pytest.raises(AttributeError, match=f"{name} is counted in the batch"):
        setattr(metadata, name, 99)
    assert getattr(metadata, name) == before
    with pytest.raises(InvalidInputError, match=name):
        dataclasses.replace(metadata, **{name: 99})
    with pytest.raises(InvalidInputError, match=name):
        ReferenceBackend.make_metadata(**metadata.asdict_zerocopy() | {name: 99})


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_assigned_to_metadata_are_used(backend):
    step = step_of(ONE_PHASE, bidirectional_ranges=True)
    builder, impl = backend_of(step, backend)
    maps = {"image": [PlaceholderRange(0, 1, 4)]}
    output = torch.empty_like(step.query)

    def computed(metadata):
        cache = step.kv_cache.clone()
        new = (step.query, step.key, step.value)
        return impl.forward(step.layer, *new, cache, metadata, output.clone())

    with_ranges = dataclasses.replace(step.batch, multi_modal_placeholder_index_maps=maps)
    metadata = builder.build(step.batch)
    before, wanted = computed(metadata), computed(builder.build(with_ranges))
    metadata.multi_modal_placeholder_index_maps = maps
    assert torch.equal(computed(metadata), wanted)
    assert not torch.equal(before, wanted)
    with pytest.raises(InvalidInputError, match="multi_modal_placeholder_index_maps"):
        dataclasses.replace(metadata, multi_modal_placeholder_index_maps={})


@pytest.mark.parametrize("way", ["assigned", "dataclasses.replace"])
def test_scales_are_derived_if_metadata_asks_for_it(way):
    step = step_of(ONE_PHASE, kv_cache_dtype="fp8")
    fields = {"num_kv_heads": 2, "dtype": torch.float32, "kv_cache_dtype": "fp8", "block_size": 4}
    layer = Attention(4, 8, **fields, device="cpu")
    cache = torch.zeros_like(step.kv_cache)
    metadata = layer.build_metadata(step.batch)
    if way == "assigned":
        metadata.enable_kv_scales_calculation = True
    else:
        metadata = dataclasses.replace(metadata, enable_kv_scales_calculation=True)
    assert metadata.batch.enable_kv_scales_calculation
    layer(step.query, step.key, step.value, kv_cache=cache, attn_metadata=metadata)
    assert layer._k_scale_float != 1.0


def test_a_subclass_may_have_defaults_and_its_own_post_init():
    @dataclasses.dataclass
    class Mine(ReferenceMetadata):
        extra: list = dataclasses.field(default_factory=list)
        number: int = 3

        def __post_init__(self):
            super().__post_init__()
            self.extra.append(self.number)

    step = step_of()
    builder = ReferenceBackend.builder_cls(step.spec, step.device)
    one, other = Mine.of(step.batch, builder), Mine.of(step.batch, builder, number=4)
    assert (one.extra, other.extra) == ([3], [4])


# --- Ranges of another form -------------------------------------------------------------------


class IndexMap(NamedTuple):
    """As vLLM's MultiModalPlaceholderMap.IndexMap."""

    src: list[int]
    dest: list[int]


OTHER_RANGES = {
    "vLLM's IndexMap": {"image": IndexMap([0, 1, 2], [1, 2, 3])},
    "vLLM's IndexMap of ranges": {"image": IndexMap(range(3), range(1, 4))},
    "a list of IndexMaps": {"image": [IndexMap([0], [1])]},
    "an object with src and dest": {"image": SimpleNamespace(src=range(3), dest=range(3))},
    "vLLM's PlaceholderRange": {"image": [SimpleNamespace(offset=1, length=3)]},
    "plain tuples": {"image": [(0, 1, 4)]},
    "numbers": {"image": [0, 1, 4]},
    "a string": {"image": "014"},
    "nothing": {"image": None},
    "no mapping": [PlaceholderRange(0, 1, 4)],
    "floats": {"image": [PlaceholderRange(0, 1.0, 4)]},
    "texts": {"image": [PlaceholderRange(0, "1", "4")]},
    "a request that is not there": {"image": [PlaceholderRange(2, 1, 4)]},
    "backwards": {"image": [PlaceholderRange(0, 4, 1)]},
}


@pytest.mark.parametrize("maps", OTHER_RANGES.values(), ids=OTHER_RANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_of_another_form_are_rejected(backend, maps):
    step = step_of(ONE_PHASE, bidirectional_ranges=True)
    builder, _ = backend_of(step, backend)
    with pytest.raises(InvalidInputError, match=r"\(request, start, end\)"):
        builder.build(dataclasses.replace(step.batch, multi_modal_placeholder_index_maps=maps))


# --- A profiling run, which has no metadata ---------------------------------------------------


def bare_impl(cls, **arguments):
    """An impl as its base class makes it, without the kernels of its package."""
    impl = object.__new__(cls)
    AttentionImpl.__init__(impl, 4, 32, 1.0, 2, **arguments)
    return impl


NON_MLA = [name for name in BUILTIN if not name.endswith("MLA")]


@pytest.mark.parametrize("name", [*NON_MLA, "NO_ATTENTION"])
@pytest.mark.parametrize("returns_lse", [False, True])
@pytest.mark.parametrize("given", ["no output", "output", "fp8 output", "fp8 output by groups"])
def test_forward_without_metadata_gives_zeros(name, returns_lse, given):
    cls = NoAttentionBackend if name == "NO_ATTENTION" else class_of(name)
    impl = bare_impl(cls.get_impl_cls(), head_size_v=64)
    impl.returns_lse = returns_lse
    query, key = torch.full((3, 4, 32), torch.nan), torch.randn(3, 2, 32)
    value, cache = torch.randn(3, 2, 64), torch.full((2, 2, 4, 2, 64), 5.0)
    more = {}
    if given != "no output":
        more["output"] = torch.full((3, 4, 64), torch.nan).to(E4M3 if "fp8" in given else None)
    if given == "fp8 output":
        more["output_scale"] = torch.tensor(2.0)
    elif given == "fp8 output by groups":
        more["output_block_scale"] = torch.full((3, 2), torch.nan)
    result = impl.forward(KVScales(), query, key, value, cache, None, **more)
    output = result
    if returns_lse:
        output, lse = result
        assert lse.shape == (3, 4)
        assert (lse == -torch.inf).all()
    assert output.shape == (3, 4, 64)
    assert not output.float().any()
    if "output" in more:
        assert output is more["output"]
    if "output_block_scale" in more:
        assert (more["output_block_scale"] == 1).all()
    assert (cache == 5).all()


def test_mla_without_metadata_gives_zeros_of_its_value_heads():
    from support.selection import mla_layer

    mla = mla_layer().mla
    impl = bare_impl(ReferenceMLABackend.get_impl_cls())
    impl.mla, query = mla, torch.randn(3, 4 * (mla.qk_nope_head_dim + mla.qk_rope_head_dim))
    output = impl.forward(KVScales(), query, torch.randn(3, 512), torch.randn(3, 64), None, None)
    assert output.shape == (3, 4, mla.v_head_dim)
    assert not output.any()


@pytest.mark.parametrize("name", NON_MLA)
def test_an_output_that_does_not_fit_is_rejected_in_a_profiling_run_too(name):
    impl = bare_impl(class_of(name).get_impl_cls())
    query, output = torch.randn(3, 4, 32), torch.full((2, 4, 32), 5.0)
    with pytest.raises(InvalidInputError, match="output has shape"):
        impl.forward(KVScales(), query, None, None, None, None, output)
    assert (output == 5).all()


PROFILED = {
    "plain": {},
    "flat query": {"flat": True},
    "lse": {"returns_lse": True},
    "routed": {"backend": "prefill=REFERENCE,decode=TORCH_SDPA"},
    "fp8 output": {"output_quant": "fp8_e4m3"},
    "no cache": {"block_size": None},
    "shared cache": {"kv_sharing_target_layer_name": "other"},
}


@pytest.mark.parametrize("fields", PROFILED.values(), ids=PROFILED)
@pytest.mark.parametrize("check", ["", "1", "shadow"])
def test_a_layer_gives_zeros_in_a_profiling_run(fields, check, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", check)
    fields = dict(fields)
    is_flat = fields.pop("flat", False)
    layer = Attention(4, 16, num_kv_heads=2, dtype=torch.float32, device="cpu", **fields)
    new = [torch.full((5, heads, 16), torch.nan) for heads in (4, 2, 2)]
    more = {"output_scale": torch.ones(())} if layer.spec.output_quant else {}
    with forward_context(None):
        result = layer(*(each.flatten(1) if is_flat else each for each in new), **more)
    output, lse = result if layer.spec.returns_lse else (result, None)
    assert output.shape == ((5, 64) if is_flat else (5, 4, 16))
    assert not output.float().any()
    assert lse is None or (lse == -torch.inf).all()


def test_a_profiling_run_of_one_layer_by_name():
    step = step_of()
    layers = [layer_of(step, prefix=name) for name in ("a", "b")]
    with forward_context({"a": step.batch, "b": None}):
        real, profiled = (layer(step.query, step.key, step.value) for layer in layers)
    step.check(real)
    assert not profiled.any()


def test_a_profiling_run_touches_no_cache_and_the_next_step_is_right():
    step = step_of()
    layer = layer_of(step)
    before = layer.kv_cache.nan_to_num(7)
    with forward_context(None):
        layer(step.query, step.key, step.value)
    assert torch.equal(layer.kv_cache.nan_to_num(7), before)
    with forward_context(step.batch):
        step.check(layer(step.query, step.key, step.value))


def test_a_compiled_layer_gives_zeros_in_a_profiling_run():
    step = step_of()
    layer = layer_of(step)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with forward_context(None):
        assert not compiled(step.query, step.key, step.value).any()
    with forward_context(step.batch):
        step.check(compiled(step.query, step.key, step.value))


def test_a_call_outside_of_a_context_is_an_error():
    """A forgotten context must not look like a profiling run."""
    step = step_of()
    with pytest.raises(InvalidInputError, match="outside of forward_context"):
        layer_of(step)(step.query, step.key, step.value, attn_metadata=None)


# --- AttentionLayer ---------------------------------------------------------------------------

MEMBERS = [name for name in vars(AttentionLayer) if name.endswith(("_scale", "_float", "forward"))]


def test_the_layer_has_vllms_members():
    scales = {"_q_scale", "_k_scale", "_v_scale", "_prob_scale", "_k_scale_float", "_v_scale_float"}
    assert set(MEMBERS) == scales | {"forward"}


@pytest.mark.parametrize("make", [lambda: layer_of(step_of()), KVScales], ids=["layer", "scales"])
@pytest.mark.parametrize("name", ["_q_scale", "_prob_scale"])
def test_queries_and_probabilities_have_a_scale_of_1_that_stays(make, name):
    layer = make()
    scale = getattr(layer, name)
    assert (scale.shape, scale.dtype, float(scale)) == ((), torch.float32, 1.0)
    with pytest.raises(AttributeError, match=name):
        setattr(layer, name, torch.tensor(2.0))
    getattr(layer, name).fill_(2.0)
    assert float(getattr(layer, name)) == 1.0


def test_a_layers_forward_takes_vllms_arguments_in_their_order():
    step = step_of()
    layer = layer_of(step)
    metadata, cache = layer.build_metadata(step.batch), step.kv_cache.clone()
    step.check(layer.forward(step.query, step.key, step.value, cache, metadata))
    names = list(inspect.signature(AttentionLayer.forward).parameters)
    assert names == list(inspect.signature(Attention.forward).parameters)[: len(names)]


def test_kv_scales_cannot_forward():
    with pytest.raises(InvalidInputError, match="Attention layer"):
        KVScales().forward(None, None, None, None, None)


# --- AttentionState ---------------------------------------------------------------------------


def test_a_state_is_made_for_a_runner():
    assert "__init__" in AttentionState.__abstractmethods__
    assert list(inspect.signature(AttentionState.__init__).parameters) == ["self", "runner"]
    runner = SimpleNamespace()
    assert CommonAttentionState(runner).runner is runner


# --- get_attn_backend -------------------------------------------------------------------------

CALLS = {
    "vLLM's order": ((64, torch.float32, "auto", 16), {}, "TORCH_SDPA"),
    "with all flags": ((64, torch.float32, "auto", 16, False, False, False), {}, "TORCH_SDPA"),
    "no cache dtype": ((64, torch.float32, None, 16), {}, "TORCH_SDPA"),
    "fp8": ((64, torch.bfloat16, "fp8", 16), {}, "TORCH_SDPA"),
    "no block size": ((64, torch.float32, "auto", None), {}, "TORCH_SDPA"),
    "sinks": ((64, torch.float32, "auto", 16), {"has_sink": True}, "REFERENCE"),
    "sinks by position": ((64, torch.float32, "auto", 16, False, False, True), {}, "REFERENCE"),
    "mla": ((576, torch.bfloat16, "auto", 16), {"use_mla": True}, "REFERENCE_MLA"),
    "mla by position": ((576, torch.bfloat16, "auto", 64, False, True), {}, "REFERENCE_MLA"),
    "small mla": ((64, torch.float32, "auto", 16), {"use_mla": True}, "REFERENCE_MLA"),
    "mla with heads": (
        (576, torch.bfloat16, "auto", 16),
        {"use_mla": True, "num_heads": 16},
        "REFERENCE_MLA",
    ),
    "no attention": ((0, torch.float32, None, 16, True), {}, "NO_ATTENTION"),
    "no attention by name": (
        (64, torch.float32, "auto", 16),
        {"is_attention_free": True},
        "NO_ATTENTION",
    ),
    "not block-sparse": ((64, torch.float32), {"is_blocksparse": False}, "TORCH_SDPA"),
    "KV heads": ((64, torch.float32), {"num_kv_heads": 3}, "TORCH_SDPA"),
    "a feature": ((64, torch.float32), {"logits_soft_cap": 30.0}, "REFERENCE"),
    "a backend": ((64, torch.float32), {"backend": "REFERENCE"}, "REFERENCE"),
}


@pytest.mark.parametrize(("args", "more", "name"), CALLS.values(), ids=CALLS)
def test_get_attn_backend_takes_calls_as_vllm_makes_them(args, more, name):
    assert get_attn_backend(*args, **more, device="cpu").get_name() == name


WRONG_CALLS = {
    "block-sparse": ({"is_blocksparse": True}, UnsupportedError, "no backend computes"),
    "number for a flag": ({"is_attention_free": 32}, InvalidInputError, "True or False"),
    "None for a flag": ({"use_mla": None}, InvalidInputError, "True or False"),
    "text for a flag": ({"has_sink": "yes"}, InvalidInputError, "True or False"),
    "mla of nothing": ({"use_mla": True, "head_size": 1}, InvalidInputError, "kv_lora_rank"),
    "mla of a text": ({"use_mla": True, "head_size": "576"}, InvalidInputError, "kv_lora_rank"),
    "mla of another size": (
        {"mla": attn_dispatch.MLADims(
            kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        )},
        InvalidInputError,
        "head_size",
    ),
    "mla with sinks": ({"use_mla": True, "has_sink": True}, UnsupportedError, "sinks"),
    "no attention on a backend": (
        {"is_attention_free": True, "backend": "REFERENCE"},
        InvalidInputError,
        "Leave one of the two out",
    ),
    "another word": ({"use_sparse": True}, InvalidInputError, "use_sparse"),
    "heads of text": ({"num_kv_heads": "2"}, InvalidInputError, "num_heads"),
    "a list of heads": ({"num_kv_heads": [2]}, InvalidInputError, "list"),
    "no heads": ({"num_heads": 0}, InvalidInputError, "num_heads=0"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "error", "said"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_get_attn_backend_rejects_bad_arguments(more, error, said):
    arguments = {"head_size": 64, "dtype": torch.float32, "device": "cpu"} | more
    with pytest.raises(error, match=said):
        get_attn_backend(**arguments)


def test_the_backend_without_attention_makes_metadata_and_computes_nothing():
    cls = get_attn_backend(0, torch.float32, None, 16, True)
    step = step_of()
    metadata = step.metadata_of(cls)
    assert (metadata.num_prefills, metadata.num_decode_tokens) == (2, 2)
    with pytest.raises(UnsupportedError, match="is_attention_free"):
        step.forward(cls, step.kv_cache)
    assert "NO_ATTENTION" not in registry.names()


# --- Quantized outputs ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_size_v", [8, 32, 48, 128, 256])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("quant_key", OUTPUT_QUANTS)
def test_fused_output_quant_supported_matches_forward(backend, head_size_v, num_heads, quant_key):
    spec = layer_spec(
        dtype=torch.float32, num_heads=num_heads, num_kv_heads=1, head_size_v=head_size_v
    )
    step = Step(Case(spec=spec, query_lens=(2,), seq_lens=(5,)))
    cls = class_of(backend)
    impl = step.impl_of(cls)
    output = torch.zeros(2, num_heads, head_size_v).to(E4M3)
    more = {"output_scale": torch.ones(())}
    if quant_key == "fp8_e4m3_group128":
        groups = max(1, num_heads * head_size_v // 128)
        more = {"output_block_scale": torch.full((2, groups), torch.nan)}
    before = step.kv_cache.nan_to_num(7)
    if impl.fused_output_quant_supported(quant_key):
        step.forward(cls, step.kv_cache, output=output, **more)
        assert output.float().any()
        assert not any(scale.isnan().any() for scale in more.values())
    else:
        with pytest.raises((InvalidInputError, UnsupportedError)):
            step.forward(cls, step.kv_cache, output=output, **more)
        assert torch.equal(step.kv_cache.nan_to_num(7), before)


@pytest.mark.parametrize("name", NON_MLA)
@pytest.mark.parametrize("head_size_v", [8, 32, 128, 256])
@pytest.mark.parametrize("quant_key", OUTPUT_QUANTS)
def test_an_impl_supports_only_declared_quantization(name, head_size_v, quant_key):
    cls = class_of(name)
    impl = bare_impl(cls.get_impl_cls(), head_size_v=head_size_v)
    declared = cls.capabilities.fields.get("output_quant", OneOf(None)).describe()
    assert impl.fused_output_quant_supported(quant_key) <= (quant_key in declared)


@pytest.mark.parametrize("name", NON_MLA)
@pytest.mark.parametrize("key", ["int8", "", None, torch.float8_e4m3fn, object(), ("fp8", True)])
def test_an_unknown_quantization_is_not_supported(name, key):
    assert not bare_impl(class_of(name).get_impl_cls()).fused_output_quant_supported(key)


# --- On a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", ["HOPPER_ATTN", "TRITON_ATTN", "FLASH_ATTN", "TORCH_VARLEN"])
def test_on_a_gpu_slots_may_be_assigned_and_a_profiling_run_gives_zeros(name):
    spec = layer_spec(dtype=torch.bfloat16, head_size=64, block_size=16)
    step = Step(Case(spec=spec, query_lens=(1, 40), seq_lens=(33, 40)), "cuda")
    try:
        layer = layer_of(step, backend=name)
    except (UnsupportedError, attn_dispatch.BackendFailure) as error:
        pytest.skip(str(error).splitlines()[0])
    before = layer.kv_cache.nan_to_num(7)
    metadata = layer.build_metadata(step.batch)
    metadata.slot_mapping = torch.full_like(metadata.slot_mapping, -1)
    layer(step.query, step.key, step.value, attn_metadata=metadata)
    with forward_context(None):
        assert not layer(step.query, step.key, step.value).any()
    assert torch.equal(layer.kv_cache.nan_to_num(7), before)
    with forward_context(step.batch):
        step.check(layer(step.query, step.key, step.value))
