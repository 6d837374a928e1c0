"""The vLLM plug-in on the files of vLLM's released wheels: `make contracts`."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from attn_dispatch import UnsupportedError
from attn_dispatch.integrations.vllm import PLUGIN
from support import fake_vllm, vllm_cases, vllm_graph_cases, vllm_mla_cases
from support.engine_files import FOLDER, unpacked
from support.vllm_files import VERSIONS, vllm_engine

pytestmark = [
    pytest.mark.contracts,
    pytest.mark.skipif(FOLDER is None, reason="downloads wheels: run `make contracts`"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="vLLM 0.33 imports typing.Self"),
]


@pytest.fixture(params=VERSIONS)
def engine(request, monkeypatch):
    with vllm_engine(request.param, monkeypatch) as found:
        yield found


def test_the_versions_that_doctor_names_are_those():
    assert tuple(PLUGIN.tested) == VERSIONS == fake_vllm.VERSIONS


@pytest.mark.parametrize("index", range(6))
def test_a_step_uses_the_memory_of_the_engine(engine, index):
    layouts = vllm_cases.LAYOUTS[engine.version]
    if index < len(layouts):
        vllm_cases.check_layout(engine, layouts[index])


@pytest.mark.parametrize("name", vllm_cases.FEATURES)
def test_features_change_the_output_as_they_should(engine, name):
    vllm_cases.check_feature(engine, name)


@pytest.mark.parametrize("name", vllm_cases.LACKING)
def test_a_feature_that_no_backend_has_is_an_error_at_the_start(engine, name):
    vllm_cases.check_lacking(engine, name)


@pytest.mark.parametrize("window", [None, 4])
def test_an_encoder_sees_both_ways(engine, window):
    vllm_cases.check_encoder_only(engine, window)


@pytest.mark.parametrize("check", vllm_cases.CHECKS)
def test_the_plugin(engine, check):
    check(engine)


@pytest.mark.parametrize("check", vllm_cases.ENVIRONMENT_CHECKS)
def test_the_plugin_in_an_environment(engine, check, monkeypatch):
    check(engine, monkeypatch)


@pytest.mark.parametrize("layout", vllm_mla_cases.LAYOUTS)
def test_latents_are_in_the_memory_of_the_engine(engine, layout):
    vllm_mla_cases.check_layout(engine, layout)


@pytest.mark.parametrize("check", vllm_mla_cases.CHECKS)
def test_layers_with_latents(engine, check):
    check(engine)


@pytest.mark.parametrize("fp8_output", [False, True])
def test_a_decode_graph_reads_the_steps_that_are_copied_to_it(engine, fp8_output):
    vllm_graph_cases.check_dense(engine, fp8_output)


@pytest.mark.parametrize("check", vllm_graph_cases.CHECKS)
def test_graphs(engine, check):
    check(engine)


def test_the_builder_that_vllm_derives_for_encoders(engine):
    """It states causal=False, which the metadata of a runner does not."""
    wrapped = engine.encoders.create_encoder_only_attention_backend(engine.ours.AttnDispatchBackend)
    assert wrapped.get_impl_cls() is engine.ours.AttnDispatchImpl
    layer = engine.layer("l0", attn_type="encoder_only")
    plain = vllm_cases.builder_of(engine, [layer])
    with pytest.raises(UnsupportedError, match="causal=True"):
        plain.build(0, vllm_cases.common_of(engine))
    made = wrapped.get_builder_cls()(
        plain.kv_cache_spec, ["l0"], engine.config, torch.device("cpu")
    )
    common = vllm_cases.common_of(engine)
    assert made.build(0, common).num_actual_tokens == vllm_cases.ROWS
    assert common.causal is True


@pytest.mark.parametrize("chunk", [16, 32])
def test_the_builder_that_vllm_derives_for_chunks(engine, chunk):
    """It makes a request of each chunk, with a block table of its own."""
    wrapped = engine.chunked.create_chunked_local_attention_backend(
        engine.ours.AttnDispatchBackend, chunk
    )
    layer = engine.layer("l0")
    plain = vllm_cases.builder_of(engine, [layer])
    made = wrapped.get_builder_cls()(
        plain.kv_cache_spec, ["l0"], engine.config, torch.device("cpu")
    )
    assert made.get_cudagraph_support(engine.config, plain.kv_cache_spec).name == "NEVER"
    cache, _ = vllm_cases.cache_of(engine.version, vllm_cases.LAYOUTS[engine.version][0])
    metadata = made.build(0, vllm_cases.common_of(engine))
    query, *_, output = vllm_cases.one_step(engine, layer, cache, metadata=metadata)
    vllm_cases.assert_close(output, vllm_cases.reference(query, cache, chunk=chunk))


#: Functions and methods of vLLM that our classes override or call: (module, qualified name) -> the
#: names of their parameters, of which ours must take those that vLLM gives.
OVERRIDDEN = [
    ("AttentionBackend", "get_name"),
    ("AttentionBackend", "get_impl_cls"),
    ("AttentionBackend", "get_builder_cls"),
    ("AttentionBackend", "supports_head_size"),
    ("AttentionBackend", "supports_dtype"),
    ("AttentionBackend", "supports_kv_cache_dtype"),
    ("AttentionBackend", "supports_block_size"),
    ("AttentionBackend", "supports_attn_type"),
    ("AttentionBackend", "supports_sink"),
    ("AttentionBackend", "supports_batch_invariance"),
    ("AttentionBackend", "get_supported_kernel_block_sizes"),
    ("AttentionMetadataBuilder", "__init__"),
    ("AttentionMetadataBuilder", "get_cudagraph_support"),
    ("AttentionMetadataBuilder", "build"),
    ("AttentionMetadataBuilder", "build_for_cudagraph_capture"),
    ("AttentionImpl", "__init__"),
    ("AttentionImpl", "forward"),
    ("AttentionImpl", "fused_output_quant_supported"),
]
#: Those that only one of the versions has.
OF_ONE_VERSION = {
    "0.24.0": [
        ("AttentionBackend", "get_kv_cache_shape"),
        ("AttentionBackend", "get_kv_cache_stride_order"),
        ("AttentionMetadataBuilder", "use_cascade_attention"),
    ],
    "0.33.0": [
        ("AttentionBackend", "supports_sliding_window"),
        ("AttentionBackend", "supports_device_cpu_query_lens_mismatch"),
    ],
}


def test_our_methods_take_what_theirs_take(engine):
    """By position in the same order, and by the same names."""
    for cls, name in OVERRIDDEN + OF_ONE_VERSION[engine.version]:
        theirs = getattr(getattr(engine.theirs, cls), name)
        ours = getattr(
            getattr(
                engine.ours,
                cls.replace("Attention", "AttnDispatch", 1).replace("MetadataBuilder", "Builder"),
            ),
            name,
        )
        wanted, found = inspect.signature(theirs), inspect.signature(ours)
        assert getattr(ours, "__module__", None) == engine.ours.__name__, name
        assert_takes_what_is_given(wanted, found, (cls, name))


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *(("MLAAttentionImpl", name) for name in ("__init__", "forward_mha", "forward_mqa")),
        ("MLAAttentionImpl", "do_kv_cache_update"),
        ("AttentionImplBase", "process_weights_after_loading"),
    ],
)
def test_our_impl_of_latents_takes_what_theirs_takes(engine, cls, name):
    wanted = inspect.signature(getattr(getattr(engine.theirs, cls), name))
    ours = getattr(engine.mla.AttnDispatchMLAImpl, name)
    assert ours.__module__ == engine.mla.__name__
    assert_takes_what_is_given(wanted, inspect.signature(ours), name)


def test_their_layer_reads_what_our_metadata_has(engine):
    """The other names are read for sparse layers, and for ranks that share keys."""
    source = inspect.getsource(engine.latents.MLAAttention.forward_impl)
    read = set(re.findall(r"attn_metadata\.(\w+)", source))
    others = {"prefill_max_seq_len", "topk_tokens", "seq_lens", "query_start_loc"}
    metadata = engine.mla.AttnDispatchMLAMetadata(None, 0, 0)
    assert all(hasattr(metadata, name) for name in read - others)
    assert "num_decode_tokens" in read


def test_the_class_that_vllm_gets_for_the_name(engine):
    """By its own lookup, and again by the path that its platform makes of the class."""
    registry = importlib.import_module("vllm.v1.attention.backends.registry")
    importlib.import_module("attn_dispatch.integrations.vllm").register()
    member = registry.AttentionBackendEnum[engine.ours.AttnDispatchBackend.get_name()]
    resolve = importlib.import_module("vllm.utils.import_utils").resolve_obj_by_qualname
    for use_mla in (False, True):
        engine.config.model_config = SimpleNamespace(use_mla=use_mla)
        found = member.get_class()
        assert found.is_mla() == use_mla
        assert resolve(".".join(found.full_cls_name())) is found


@pytest.mark.parametrize("cls", ["AttentionImpl", "MLAAttentionImpl"])
def test_the_arguments_of_impls_are_in_the_order_of_theirs(engine, cls):
    """The impls take them by position and by name."""
    wanted = [*inspect.signature(getattr(engine.theirs, cls).__init__).parameters]
    ours = engine.ours.ARGUMENTS
    assert tuple(wanted[1 : 1 + len(ours)]) == ours


def assert_takes_what_is_given(wanted, found, where):
    """By position in the same order, and by the same names."""
    ours = found.parameters.values()
    takes_names = any(p.kind is p.VAR_KEYWORD for p in ours)
    positions = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    for index, parameter in enumerate(wanted.parameters):
        if index < len(positions):
            assert positions[index] == parameter, where
        else:
            assert takes_names, (where, parameter)
    required = [p for p in ours if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(required) <= len(wanted.parameters)


def test_no_flag_of_this_version_is_unknown(engine):
    """Each keyword of validate_configuration is taken, or rejected with a reason of its own."""
    wanted = inspect.signature(engine.theirs.AttentionBackend.validate_configuration).parameters
    values = {
        "head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": 16,
        "attn_type": "decoder", "device_capability": (9, 0),
    }  # fmt: skip
    for name in wanted:
        reasons = engine.ours.AttnDispatchBackend.validate_configuration(
            **values | {name: values.get(name, True)}
        )
        assert not any("not known" in each for each in reasons), name
        assert len(reasons) <= 1


def test_other_names_that_are_used(engine):
    """Attributes, members of enums, defaults and promises that the adapters build on."""
    theirs = engine.theirs
    assert theirs.AttentionBackend.forward_includes_kv_cache_update is True
    assert theirs.AttentionBackend.supports_alibi_sqrt() is False
    assert theirs.AttentionBackend.supports_mm_prefix() is False
    assert theirs.AttentionBackend.supports_non_causal() is False
    assert theirs.AttentionBackend.is_mla() is False
    assert theirs.AttentionImpl.supports_quant_query_input is False
    assert theirs.AttentionCGSupport.NEVER.value == 0
    assert {each.value for each in theirs.AttentionType} == {
        *("decoder", "encoder", "encoder_only", "encoder_decoder")
    }
    fields = theirs.CommonAttentionMetadata.__dataclass_fields__
    stand_in = fake_vllm.CommonAttentionMetadata.__dataclass_fields__
    assert stand_in.keys() <= fields.keys()
    assert ("_seq_lens_cpu" in fields) == (engine.version == "0.24.0")
    assert {"_k_scale_float", "_v_scale_float"} <= theirs.AttentionLayer.__annotations__.keys()
    assert engine.layer("l0").layer_name == "l0"
    # With exact lengths we build on the promise that the bounds are exact without drafts.
    source = inspect.getsource(theirs.CommonAttentionMetadata)
    assert "and for all rows outside async spec decode" in source
    shared = hasattr(theirs.AttentionMetadataBuilder, "use_cascade_attention")
    assert shared == (engine.version == "0.24.0")


def test_the_registry_adds_names_or_has_custom(engine):
    registry = importlib.import_module("vllm.v1.attention.backends.registry")
    assert hasattr(registry.AttentionBackendEnum, "register") == (engine.version != "0.24.0")
    assert "CUSTOM" in registry.AttentionBackendEnum.__members__


def test_vllm_loads_plugins_of_our_group(engine):
    source = (unpacked("vllm", engine.version) / "vllm/plugins/__init__.py").read_text("utf-8")
    assert f'DEFAULT_PLUGINS_GROUP = "{PLUGIN.group}"' in source
    entry = {each.name for each in importlib.metadata.entry_points(group=PLUGIN.group)}
    assert "attn_dispatch" in entry


def test_vllm_validates_by_names(engine):
    """The platform gives validate_configuration its selector's fields, and raises its reasons."""
    folder = unpacked("vllm", engine.version) / "vllm"
    source = (folder / "platforms/cuda.py").read_text("utf-8")
    assert "attn_selector_config._asdict()" in source
    assert "Selected backend {selected_backend} is not valid" in source
    selector = importlib.import_module("vllm.v1.attention.selector")
    wanted = inspect.signature(engine.theirs.AttentionBackend.validate_configuration).parameters
    assert {*selector.AttentionSelectorConfig._fields, "device_capability"} == {*wanted}
