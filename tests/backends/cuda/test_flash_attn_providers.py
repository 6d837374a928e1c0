"""FLASH_ATTN's providers: which one serves what, what each rejects, and broken packages."""

from __future__ import annotations

import dataclasses
import sys
from unittest import mock

import pytest
import torch

from attn_dispatch.backends.cuda.flash_attn.backend import FlashAttnBackend, FlashAttnImpl
from attn_dispatch.backends.cuda.flash_attn.providers import PROVIDERS, Provider, pick_provider
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import ReasonCode
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.resolve import explain, explained_device
from support.fake_flash_attn import installed
from support.flash_attn_cases import (
    BY_NAME,
    MIXED,
    OWN_2,
    OWN_3,
    OWN_4,
    VLLM_2,
    VLLM_3,
    calls_of,
    each_kind,
    forward,
    on_device,
    only,
    profile_for,
    provided,
    spec_of,
    step_of,
)

# --- Which serves what ------------------------------------------------------------------------


def all_on(arch):
    return explained_device(arch)


@pytest.mark.parametrize(
    ("arch", "fields", "picked"),
    [
        ("sm90", {}, VLLM_3),
        ("sm90", {"block_size": 8}, OWN_3),
        ("sm90", {"block_size": 256}, OWN_2),
        ("sm90", {"block_size": 64}, VLLM_2),
        ("sm90", {"alibi": True}, VLLM_2),
        ("sm90", {"sinks": True}, VLLM_3),
        ("sm90", {"sinks": True, "num_heads": 128, "num_kv_heads": 8}, OWN_4),
        ("sm90", {"head_size": 256}, VLLM_3),
        ("sm90", {"head_size": 192, "head_size_v": 128}, VLLM_3),
        ("sm100", {}, OWN_4),
        ("sm100", {"head_size": 256}, VLLM_2),
        ("sm100", {"cuda_graph": True}, VLLM_2),
        ("sm80", {}, VLLM_2),
        ("sm120", {"block_size": 512}, OWN_2),
        ("sm80", {"block_size": None}, OWN_2),
    ],
)
def test_the_first_supporting_provider_is_picked(arch, fields, picked):
    provider = pick_provider(spec_of(VLLM_3, **fields), all_on(arch))
    assert isinstance(provider, Provider)
    assert provider.name == picked


#: (provider, what it rejects, the message)
LIMITS = [
    (OWN_2, {"block_size": 16}, "block_size=16 .* multiples of 256"),
    (VLLM_2, {"block_size": 8}, "block_size=8 .* multiples of 16"),
    (VLLM_3, {"block_size": 64}, "block_size=64 .* up to 48"),
    (OWN_3, {"block_size": 128}, "block_size=128 .* 1 to 63"),
    (VLLM_2, {"head_size": 264}, "head_size=264 .* up to 256"),
    (VLLM_2, {"head_size": 36}, "head_size=36 .* multiples of 8"),
    (VLLM_2, {"head_size_v": 32}, "head_size_v=32 .* the same as head_size"),
    (VLLM_3, {"head_size": 128, "head_size_v": 64}, "head_size_v: head_size=128 with"),
    (VLLM_3, {"head_size": 32, "head_size_v": 64}, "head_size_v: head_size=32 with"),
    (VLLM_3, {"head_size": 40, "head_size_v": 48}, "head_size_v: head_size=40 with"),
    (OWN_4, {"head_size": 128, "head_size_v": 64}, "head_size_v: .* 192 with 128"),
    (OWN_4, {"head_size": 256}, "head_size=256"),
    (OWN_4, {"head_size": 80, "causal": False}, "head_size=80 with causal=False over pages"),
    (OWN_4, {"num_heads": 6}, "num_kv_heads: 6 query heads over 2 .* divides 128"),
    (VLLM_2, {"dtype": torch.float32}, "dtype=float32"),
    (VLLM_2, {"kv_cache_dtype": "float16"}, "float16 with dtype=torch.bfloat16 .* layer's dtype"),
    (VLLM_3, {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype=fp8_e4m3"),
    (VLLM_2, {"alibi": True, "causal": False}, "alibi: causal=False"),
    (VLLM_2, {"alibi": True, "returns_lse": True}, "alibi with returns_lse"),
    (VLLM_3, {"alibi": True}, "alibi=True"),
    (OWN_4, {"alibi": True}, "alibi=True"),
    (VLLM_2, {"sinks": True}, "sinks=True"),
    (OWN_3, {"sinks": True}, "sinks=True"),
    (VLLM_3, {"sinks": True, "returns_lse": True}, "sinks with returns_lse"),
    (VLLM_3, {"sinks": True, "dtype": torch.float16}, "sinks with dtype=torch.float16"),
    (VLLM_3, {"sinks": True, "num_heads": 66}, "num_heads=66.*up to 64 query heads"),
    (OWN_4, {"cuda_graph": True}, "cuda_graph=True"),
    (VLLM_3, {"custom_mask": True}, "custom_mask=True"),
    (VLLM_3, {"bidirectional_ranges": True}, "bidirectional_ranges=True"),
    (VLLM_3, {"output_quant": "fp8_e4m3"}, "output_quant=fp8_e4m3"),
    (VLLM_3, {"batch_invariant": True}, "batch_invariant=True"),
]


@pytest.mark.parametrize(("name", "fields", "sentence"), LIMITS)
def test_limits(name, fields, sentence):
    """Selection and the builder reject the same."""
    spec = spec_of(name, **fields)
    with provided(name), pytest.raises(UnsupportedError, match=sentence):
        FlashAttnBackend.get_builder_cls()(spec, torch.device("cpu"))
    with only(name):
        device = profile_for(BY_NAME[name]).with_libraries(Library("triton", "3.6"))
        verdicts = explain(spec, device)[0].verdicts
    assert next(verdict for verdict in verdicts if verdict.name == "FLASH_ATTN").reasons


def test_a_missing_package_that_would_help_is_named():
    device = known_device("H200")
    reasons = pick_provider(spec_of(VLLM_3), device)
    assert {reason.code for reason in reasons} == {ReasonCode.LIBRARY}
    assert "needs vllm>=0.11 for vLLM's FlashAttention 3: vllm is not installed" in str(reasons[0])
    missing = pick_provider(spec_of(VLLM_3, alibi=True), device)
    assert {reason.field for reason in missing} == {"vllm"}  # flash_attn needs larger pages


def test_reasons_name_the_installed_provider():
    device = known_device("H200").with_libraries(Library("flash_attn", "2.8.3"))
    reasons = pick_provider(spec_of(VLLM_3), device)
    assert "block_size=16 with FlashAttention 2 is not supported" in " ".join(map(str, reasons))


@pytest.mark.parametrize(("version", "picked"), [("2.8.3", OWN_2), ("2.5", None), ("4.0", None)])
def test_only_supported_versions_are_picked(version, picked):
    device = known_device("A100").with_libraries(Library("flash_attn", version))
    found = pick_provider(spec_of(OWN_2), device)
    assert (found.name if isinstance(found, Provider) else None) == picked


def test_selection_imports_nothing():
    spec = spec_of(VLLM_3)
    names = {name for provider in PROVIDERS for name in provider.imports}
    with mock.patch.dict(sys.modules):
        for name in names:
            sys.modules.pop(name, None)
        assert isinstance(pick_provider(spec, all_on("sm90")), Provider)
        verdicts = explain(spec, "H200")[0].verdicts
        assert next(v for v in verdicts if v.name == "FLASH_ATTN").reasons == ()
        assert names.isdisjoint(sys.modules)


def test_a_broken_package_is_reported():
    spec, device = spec_of(VLLM_3), torch.device("cpu")
    profile = profile_for(BY_NAME[OWN_3])
    with (
        mock.patch.object(libraries, "_broken", {}),
        mock.patch.dict(sys.modules, {"flash_attn_interface": None}),
        on_device(profile),
    ):
        with pytest.raises(BackendFailure, match="cannot be imported here"):
            FlashAttnBackend.get_builder_cls()(spec, device)
        assert list(libraries._broken) == ["flash_attn_interface"]


def test_a_missing_generation_leaves_the_others():
    """vLLM's package has three generations, each with its own kernels."""
    kernels = "vllm.vllm_flash_attn._vllm_fa2_C"
    device = torch.device("cpu")
    with (
        installed(VLLM_2),
        mock.patch.object(libraries, "_broken", {}),
        mock.patch.dict(sys.modules, {kernels: None}),
        on_device(explained_device("sm90").with_libraries(Library("flash_attn"))),
    ):
        build = FlashAttnBackend.get_builder_cls()
        with pytest.raises(BackendFailure, match="_vllm_fa2_C cannot be imported here"):
            build(spec_of(VLLM_2, alibi=True), device)
        assert list(libraries._broken) == [VLLM_2]
        with pytest.raises(UnsupportedError, match=f"needs {kernels} .* is broken: "):
            build(spec_of(VLLM_2, alibi=True), device)
        build(spec_of(VLLM_3), device)


def test_vllms_max_seqlen_k_matches_its_schedule():
    with provided(VLLM_3) as recorder:
        step = step_of(VLLM_3, {"sliding_window": 5}, {"query_lens": (1, 1), "seq_lens": (5, 60)})
        forward(step)
    (call,) = calls_of(recorder)
    assert call["scheduler_metadata"] is not None
    assert call["max_seqlen_k"] == 16 * call["block_table"].shape[1]


def test_a_package_without_its_function_is_reported():
    with provided(OWN_3):
        del sys.modules["flash_attn_interface"].flash_attn_with_kvcache
        with pytest.raises(BackendFailure, match="has no flash_attn_with_kvcache"):
            FlashAttnBackend.get_builder_cls()(spec_of(OWN_3), torch.device("cpu"))


# --- Arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_known", [False, True])
def test_a_cache_of_another_block_size_is_rejected(is_known):
    """Also a cache that the layer has used before."""
    with provided(VLLM_3):
        step = step_of(VLLM_3, {}, MIXED)
        build = FlashAttnBackend.get_builder_cls()
        table = step.batch.block_table.repeat(1, 2)
        batch = dataclasses.replace(step.batch, block_table=table)
        metadata = build(step.spec.replace(block_size=32), step.device).build(batch)
        impl = FlashAttnImpl(**step.impl_arguments())
        arguments = (step.layer, step.query, step.key, step.value, step.kv_cache)
        if is_known:
            impl.forward(*arguments, build(step.spec, step.device).build(step.batch))
        with pytest.raises(InvalidInputError, match=r"blocks of 16 tokens, .* block_size=32"):
            impl.forward(*arguments, metadata)


def test_an_unaligned_cache_is_rejected():
    with provided(VLLM_3):
        step = step_of(VLLM_3, {}, MIXED)
        memory = torch.zeros(step.kv_cache.numel() + 1, dtype=step.spec.dtype)
        cache = memory[1:].view(step.kv_cache.shape)
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
        impl = FlashAttnImpl(**step.impl_arguments())
        with pytest.raises(InvalidInputError, match="multiples of 16 bytes"):
            impl.forward(step.layer, step.query, step.key, step.value, cache, metadata)


def test_quantized_output_is_rejected():
    with provided(VLLM_3):
        step = step_of(VLLM_3, {}, MIXED)
        output = torch.empty(step.query.shape, dtype=torch.float8_e4m3fn)
        with pytest.raises(UnsupportedError, match="does not quantize its output"):
            forward(step, output=output, output_scale=torch.ones(()))


def test_int64_block_tables_are_rejected():
    with provided(VLLM_3):
        step = step_of(VLLM_3, {}, MIXED)
        batch = dataclasses.replace(step.batch, block_table=step.batch.block_table.long())
        builder = FlashAttnBackend.get_builder_cls()(step.spec, step.device)
        with pytest.raises(InvalidInputError, match=r"block_table is torch\.int64"):
            builder.build(batch)


@each_kind
def test_an_empty_batch_makes_no_call(name):
    with provided(name) as recorder:
        step = step_of(name, {"returns_lse": True}, {"query_lens": (), "seq_lens": ()})
        output, lse = forward(step)
        assert output.shape == (0, 4, 64)
        assert lse.shape == (0, 4)
    assert recorder.calls == []


def test_new_keys_are_written_except_to_a_shared_cache():
    for fields in ({}, {"kv_sharing": True}):
        with provided(VLLM_3):
            step = step_of(VLLM_3, fields, MIXED)
            metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
            before, cache = step.kv_cache.clone(), step.kv_cache
            impl = FlashAttnImpl(**step.impl_arguments())
            impl.forward(step.layer, step.query, step.key, step.value, cache, metadata)
            changed = (before.nan_to_num(9.0) != cache.nan_to_num(9.0)).any((1, 3, 4)).sum()
            written = 0 if step.spec.kv_sharing else sum(step.case.query_lens)
            assert int(changed) == written
