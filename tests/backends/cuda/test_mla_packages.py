"""FLASH_ATTN_MLA, FLASHMLA and FLASHINFER_MLA: their packages' arguments, and the results.

Without the packages and a GPU, fakes with their signatures and conventions compute in PyTorch, and
reject what the packages would read out of bounds or drop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dispatch import AttentionBatch, InvalidInputError, MLADims, UnsupportedError, resolve
from attn_dispatch.errors import BackendFailure
from attn_dispatch.interface import backend as interface_backend
from attn_dispatch.interface.capability import compare
from attn_dispatch.interface.captured import GraphLimits, StaticBatch
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.resolve import explained_device
from support import fake_flash_attn, fake_mla
from support.mla_cases import MLAStep
from support.selection import DEEPSEEK, mla_layer

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends import mla_packages, packages
from attn_dispatch.backends.cuda.flash_attn import mla as flash_attn_mla
from attn_dispatch.backends.cuda.flash_attn.mla import FlashAttnMLABackend
from attn_dispatch.backends.cuda.flashinfer import mla as flashinfer_mla
from attn_dispatch.backends.cuda.flashinfer.mla import FlashInferMLABackend
from attn_dispatch.backends.cuda.flashmla.backend import FlashMLABackend
from attn_dispatch.backends.mla_calls import PerPass

BACKENDS = {
    backend.name: backend
    for backend in (FlashAttnMLABackend, FlashMLABackend, FlashInferMLABackend)
}
DIMS = MLADims(kv_lora_rank=512, qk_nope_head_dim=8, qk_rope_head_dim=64, v_head_dim=8)
#: Decodes, drafts to verify, a prompt, nothing, no keys.
QUERY_LENS, SEQ_LENS = (1, 3, 20, 0, 3, 1, 0), (70, 33, 20, 9, 130, 1, 0)
EACH = ("triton", "vllm", "flash_mla", "flashinfer")
HOPPER = KNOWN_DEVICES["sm90"].with_libraries(*(Library(name, "unknown") for name in EACH))


@pytest.fixture(params=BACKENDS)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch):
    """The builders find an H100 with every package, none of them broken."""
    monkeypatch.setattr(libraries, "_broken", {})
    for cached in (flashinfer_mla._pool, flashinfer_mla.workspace):
        cached.cache_clear()
    for module in (mla_packages, flashinfer_mla, interface_backend):
        monkeypatch.setattr(module, "detect_device", lambda device: HOPPER)


@pytest.fixture
def calls(name, monkeypatch):
    """Installs the backend's fake. The value is its calls."""
    if name == "FLASH_ATTN_MLA":
        with fake_flash_attn.installed("vLLM's FlashAttention 3") as recorder:
            yield recorder.calls
    elif name == "FLASHMLA":
        yield fake_mla.install_flash_mla(monkeypatch)
    else:
        yield fake_mla.install_flashinfer(monkeypatch)


def step_of(name, query_lens=QUERY_LENS, seq_lens=SEQ_LENS, seed=0, padding=2, **more):
    more = {"dims": DIMS, "dtype": torch.float16, "block_size": 64, "heads": 2} | more
    return MLAStep(query_lens, seq_lens, seed, padding, backend=BACKENDS[name], **more)


def check(step, returned):
    output, lse = returned if step.spec.returns_lse else (returned, None)
    expected, expected_lse = step.expected()
    step.check(output, expected)
    if lse is not None:
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-3, atol=2e-3)


# --- Results ----------------------------------------------------------------------------------

FEATURES = {
    "plain": {},
    "lse": {"returns_lse": True},
    "not causal": {"causal": False, "returns_lse": True},
    "captured": {"cuda_graph": True, "returns_lse": True},
    "cache with a named dtype": {"kv_cache_dtype": "float16"},
    "no padding": {"padding": 0},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_agrees_with_float64(name, calls, feature):
    step = step_of(name, **FEATURES[feature])
    if compare(step.spec, BACKENDS[name].capabilities, HOPPER):
        pytest.skip("it is not declared")
    check(step, step.run())
    assert calls


@pytest.mark.parametrize("block_size", [16, 48, 80, 128])
@pytest.mark.parametrize("name", ["FLASH_ATTN_MLA", "FLASHINFER_MLA"], indirect=True)
def test_block_sizes(name, calls, block_size):
    """FlashAttention 3 gets pages of up to 48 tokens."""
    step = step_of(name, (1, 3, 20), (300, 33, 20), block_size=block_size)
    check(step, step.run())


@given(
    lens=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 80)), min_size=0, max_size=5),
    seed=st.integers(0, 50),
    padding=st.integers(0, 2),
    causal=st.booleans(),
)
@settings(max_examples=6)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_step_agrees_with_float64(backend, lens, seed, padding, causal):
    query_lens = tuple(query for query, _ in lens)
    seq_lens = tuple(query + past for query, past in lens)
    with contextlib.ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(fake_flash_attn.installed("vLLM's FlashAttention 3"))
        fake_mla.install_flash_mla(monkeypatch)
        fake_mla.install_flashinfer(monkeypatch)
        step = step_of(
            backend, query_lens, seq_lens, seed, padding, returns_lse=True, causal=causal
        )
        check(step, step.run())


def test_more_queries_than_keys(name, calls):
    """The first rows of the second request see no key."""
    step = step_of(name, (1, 4), (70, 4), returns_lse=True, padding=0, kv_sharing=True)
    batch, step.cache = step.batch, step.cache.nan_to_num(0.5)
    step.batch = AttentionBatch.create(
        (1, 4), (70, 2), block_table=batch.block_table, slot_mapping=batch.slot_mapping
    )
    output, lse = step.run()
    assert not output[1:3].any()
    assert bool((lse[1:3] == -math.inf).all())
    assert bool(lse[3:].isfinite().all())


@pytest.mark.parametrize("scale", [-1e-3, 0.0, 1e-42])
def test_a_scale_that_kernels_do_not_take(name, calls, scale):
    step = step_of(name, (1, 3), (70, 33))
    step.scale = scale
    check(step, step.run())


def test_bounds_of_lengths_change_nothing(name, calls):
    step = step_of(name, returns_lse=True, lengths="upper_bound")
    if compare(step.spec, BACKENDS[name].capabilities, HOPPER):
        pytest.skip("it is not declared")
    step.batch = AttentionBatch.create(
        QUERY_LENS,
        step.batch.seq_lens,
        seq_lens_upper_bound=[length + 9 for length in SEQ_LENS],
        lengths="upper_bound",
        block_table=step.batch.block_table,
        slot_mapping=step.batch.slot_mapping,
    )
    check(step, step.run())


def test_output_quantization_and_a_given_output(name, calls):
    step = step_of(name)
    wanted = step.run()
    given = torch.full_like(wanted, math.nan)
    assert step.run(output=given) is given
    check(step, given)
    quantized = torch.empty(wanted.shape, dtype=torch.float8_e4m3fn)
    scale = torch.tensor(0.05)
    step.run(output=quantized, output_scale=scale)
    expected = (wanted.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))


# --- What the packages are given ----------------------------------------------------------------


@pytest.mark.parametrize("release", ["sglang", "2025", "current", "vllm"])
def test_every_release_of_flashmla_agrees_with_float64(release, monkeypatch):
    device = HOPPER
    if release == "vllm":
        device = KNOWN_DEVICES["sm90"].with_libraries(Library("vllm", "0.24.0"))
        made = fake_mla.install_vllm_flash_mla(monkeypatch)
    else:
        made = fake_mla.install_flash_mla(monkeypatch, release)
    monkeypatch.setattr(mla_packages, "detect_device", lambda device_: device)
    step = step_of("FLASHMLA", returns_lse=True)
    impl, metadata = step.impl(), step.builder().build(step.batch)
    check(step, step.run(impl, metadata=metadata))
    check(step, step.run(step.impl(), metadata=metadata))
    lengths = len(set(QUERY_LENS) - {0})
    assert made.count("schedule") == lengths, "layers share a schedule for each query length"
    assert len(made) == 3 * lengths


def test_flashmla_gets_one_call_for_requests_of_one_length(monkeypatch):
    made = fake_mla.install_flash_mla(monkeypatch)
    step = step_of("FLASHMLA", (3, 3, 3), (70, 33, 3))
    check(step, step.run())
    assert made == ["schedule", {"shape": (3, 3, 2, 576), "causal": True}]


@pytest.mark.parametrize("release", ["sglang without its kernels for Hopper", "sparse"])
def test_a_flashmla_without_the_kernel_is_a_failure(release, monkeypatch):
    fake_mla.install_flash_mla(monkeypatch, release.split()[0], has_legacy=False)
    with pytest.raises(BackendFailure, match=r"for Hopper|no dense decode"):
        step_of("FLASHMLA").builder()


@pytest.mark.parametrize(
    "package", ["vLLM's FlashAttention 3", "FlashAttention 3", "SGLang's FlashAttention 3"]
)
def test_every_package_of_flash_attention_3_agrees_with_float64(package, monkeypatch):
    chosen = tuple(each for each in flash_attn_mla.PACKAGES if each.name == package)
    libraries_ = [Library(name, "unknown") for name in ("triton", "vllm", "sgl_kernel")]
    libraries_.append(Library("flash_attn_interface", "unknown"))
    device = HOPPER.with_libraries(*libraries_)
    monkeypatch.setattr(FlashAttnMLABackend, "packages", chosen)
    monkeypatch.setattr(mla_packages, "detect_device", lambda device_: device)
    with (
        mock.patch.object(FlashAttnMLABackend, "check_combination", return_value=[]),
        fake_flash_attn.installed(package) as recorder,
    ):
        step = step_of("FLASH_ATTN_MLA", returns_lse=True)
        metadata = step.builder().build(step.batch)
        check(step, step.run(metadata=metadata))
        check(step, step.run(metadata=metadata))
    schedules = 0 if package.startswith("SGLang") else 2  # a call for each phase
    assert recorder.names().count("get_scheduler_metadata") == schedules
    assert len(recorder.calls) == 4 + schedules


def test_flashinfer_shares_a_plan_between_layers_of_a_scale(monkeypatch):
    plans = fake_mla.install_flashinfer(monkeypatch)
    step = step_of("FLASHINFER_MLA", (1, 1, 5), (70, 3, 33))
    metadata = step.builder().build(step.batch)
    for _ in range(2):
        check(step, step.run(metadata=metadata))
    assert [plan["causal"] for plan in plans] == [False, True]
    step.scale *= 2
    check(step, step.run(metadata=metadata))
    assert len(plans) == 4


def test_flashinfer_plans_prompts_in_pieces_that_it_has_room_for(monkeypatch):
    plans = fake_mla.install_flashinfer(monkeypatch)
    monkeypatch.setattr(flashinfer_mla, "_MAX_TILES", 2)
    step = step_of("FLASHINFER_MLA", (70, 9, 3), (200, 9, 140), heads=8, returns_lse=True)
    check(step, step.run())
    assert [plan["query_lens"] for plan in plans] == [[16]] * 4 + [[6], [9], [3]]
    assert plans[0]["key_lens"] == [146]


def test_flashinfer_reads_fp8_latents(monkeypatch):
    """The Triton interpreter has no bfloat16, so the cache is not written here."""
    fake_mla.install_flashinfer(monkeypatch)
    fields = {"kv_cache_dtype": "fp8_e4m3", "dtype": torch.bfloat16, "kv_sharing": True}
    step = step_of("FLASHINFER_MLA", (1, 0), (70, 3), **fields)
    step.query_lens, batch = (0, 0), step.batch  # the whole cache holds stored latents
    step._make_cache(step.meant, torch.float8_e4m3fn, torch.Generator().manual_seed(0))
    step.query_lens = (1, 0)
    step.batch = AttentionBatch.create((1, 0), (70, 3), block_table=step.batch.block_table)
    del batch
    output, expected = step.run(), step.expected()[0]
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.02 * expected.abs().max())


#: The largest captured step, and steps that it serves: query lengths, and keys before them.
CAPTURED = {
    "decodes": (
        {"num_reqs": 3, "num_tokens": 3, "max_query_len": 1},
        [((1, 1, 1), (70, 3, 127)), ((1,), (9,))],
    ),
    "drafts": (
        {"num_reqs": 3, "num_tokens": 12, "max_query_len": 4},
        [((4, 4, 4), (70, 3, 120)), ((3, 1), (9, 64)), ((2, 0, 4), (5, 6, 7))],
    ),
    "chunks": (
        {"num_reqs": 3, "num_tokens": 30, "max_query_len": 30, "phase": Phase.PREFILL},
        [((20, 1, 3), (0, 3, 64)), ((30,), (0,)), ((1, 1, 1), (100, 0, 9))],
    ),
}


@pytest.mark.parametrize("name", ["FLASH_ATTN_MLA", "FLASHMLA"], indirect=True)
@pytest.mark.parametrize("kind", CAPTURED)
def test_captured_metadata_serves_steps_of_other_lengths(name, calls, kind):
    """Whatever a graph would replay comes from static tensors here, too."""
    limits, steps = CAPTURED[kind]
    limits = GraphLimits(**limits, max_seq_len=128)
    table = torch.zeros(limits.num_slots, 2, dtype=torch.int32)
    static = StaticBatch.make(limits, torch.device("cpu"), block_table=table)
    first = step_of(name, (1,), (5,), cuda_graph=True, returns_lse=True, padding=0)
    builder = first.builder()
    if name == "FLASHMLA" and kind != "decodes":
        with pytest.raises(UnsupportedError, match="one new token per request"):
            builder.build_for_graph(static.batch, limits)
        return
    metadata, impls = builder.build_for_graph(static.batch, limits), [first.impl(), first.impl()]
    for seed, (query_lens, pasts) in enumerate(steps):
        seq_lens = tuple(query + past for query, past in zip(query_lens, pasts, strict=True))
        fields = {"cuda_graph": True, "returns_lse": True}
        step = step_of(name, query_lens, seq_lens, seed, padding=0, **fields)
        step.weight = first.weight
        static.fill(step.batch)
        tokens = sum(query_lens)
        rest = limits.num_tokens - tokens
        for each in ("query", "latents", "rotated"):
            padding = torch.full((rest, *getattr(step, each).shape[1:]), math.nan).half()
            setattr(step, each, torch.cat([getattr(step, each), padding]))
        for impl in impls:
            output, lse = step.run(impl, metadata=metadata)
            expected, expected_lse = step.expected()
            step.check(output, expected)
            torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-3, atol=2e-3)


def test_a_value_of_a_step_is_made_once_in_each_pass():
    made = []
    layers = [type("Layer", (), {})() for _ in range(3)]
    value = PerPass(lambda: made.append(None) or len(made), is_captured=True)
    assert [value.get(layer) for layer in (*layers, *layers)] == [1, 1, 1, 2, 2, 2]
    eager = PerPass(lambda: made.append(None) or len(made), is_captured=False)
    assert {eager.get(layer) for layer in (*layers, *layers)} == {3}


def test_a_value_is_made_again_when_a_capture_begins():
    layers = [type("Layer", (), {})() for _ in range(2)]
    made = []
    value = PerPass(lambda: made.append(None) or len(made), is_captured=True)
    assert [value.get(layer) for layer in layers] == [1, 1]
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        assert value.get(layers[1]) == 2


# --- What is rejected ---------------------------------------------------------------------------

#: (backend, what it rejects, the message)
LIMITS = [
    ("FLASHMLA", {"block_size": 32}, "block_size=32 .* 64"),
    ("FLASHMLA", {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype=fp8_e4m3"),
    ("FLASHMLA", {"kv_cache_dtype": "float16"}, "float16 with dtype=torch.bfloat16"),
    ("FLASHMLA", {"dtype": torch.float32}, "dtype=float32"),
    ("FLASHMLA", {"mla": dataclasses.replace(DEEPSEEK, kv_lora_rank=256)}, "head_size=320"),
    ("FLASHMLA", {"mla": dataclasses.replace(DEEPSEEK, qk_rope_head_dim=32)}, "head_size=544"),
    ("FLASHMLA", {"sliding_window": 100}, "sliding_window=100"),
    ("FLASHMLA", {"logits_soft_cap": 5.0}, "logits_soft_cap=5.0"),
    ("FLASHMLA", {"batch_invariant": True}, "batch_invariant=True"),
    ("FLASH_ATTN_MLA", {"block_size": 24}, "block_size=24 .* multiples of 16"),
    ("FLASH_ATTN_MLA", {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype=fp8_e4m3"),
    ("FLASH_ATTN_MLA", {"kv_cache_dtype": "float16"}, "float16 with dtype=torch.bfloat16"),
    ("FLASH_ATTN_MLA", {"sliding_window": 100}, "sliding_window=100"),
    ("FLASH_ATTN_MLA", {"logits_soft_cap": 5.0}, "logits_soft_cap=5.0"),
    ("FLASHINFER_MLA", {"num_heads": 20}, "num_heads=20"),
    ("FLASHINFER_MLA", {"cuda_graph": True}, "cuda_graph=True"),
    ("FLASHINFER_MLA", {"lengths": "upper_bound"}, "lengths=upper_bound"),
    ("FLASHINFER_MLA", {"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype=fp8_e5m2"),
    (
        "FLASHINFER_MLA",
        {"kv_cache_dtype": "fp8", "dtype": torch.float16},
        "with bfloat16 on sm90",
    ),
    ("FLASHINFER_MLA", {"block_size": None}, "block_size=None"),
]


@pytest.mark.parametrize(("backend", "fields", "message"), LIMITS)
def test_limits(backend, fields, message):
    """Selection and the builder reject the same."""
    spec = mla_layer(**({"block_size": 64} | fields))
    with pytest.raises(UnsupportedError, match=message):
        resolve(spec, explained_device("H200"), backend=backend)
    with pytest.raises(UnsupportedError, match=message):
        BACKENDS[backend].get_builder_cls()(spec, torch.device("cpu"))


@pytest.mark.parametrize(
    ("backend", "arch"),
    [("FLASHMLA", "sm100"), ("FLASH_ATTN_MLA", "sm80"), ("FLASHINFER_MLA", "gfx942")],
)
def test_other_devices_are_rejected(backend, arch):
    with pytest.raises(UnsupportedError, match="does not run on"):
        resolve(mla_layer(block_size=64), explained_device(arch), backend=backend)


def test_fp8_latents_need_hopper():
    spec = mla_layer(block_size=64, kv_cache_dtype="fp8_e4m3")
    assert resolve(spec, explained_device("H200"), backend="FLASHINFER_MLA")
    with pytest.raises(UnsupportedError, match="on sm80"):
        resolve(spec, explained_device("A100"), backend="FLASHINFER_MLA")


@pytest.mark.parametrize("backend", ["FLASHMLA", "FLASH_ATTN_MLA"])
def test_a_missing_package_is_a_reason(backend):
    device = KNOWN_DEVICES["sm90"].with_libraries(Library("triton", "3.6"))
    with pytest.raises(UnsupportedError, match="not installed"):
        resolve(mla_layer(block_size=64), device, backend=backend)


def test_a_broken_package_is_passed_over():
    both = flash_attn_mla.PACKAGES[:2]
    device = HOPPER.with_libraries(
        Library("vllm", "0.24"), Library("flash_attn_interface", "unknown")
    )
    assert packages.pick_package(both, device) is both[0]
    libraries._broken[both[0].name] = "OSError: undefined symbol"
    assert packages.pick_package(both, device) is both[1]
    reasons = packages.pick_package(both[:1], device)
    assert "undefined symbol" in str(reasons[0])


def test_the_package_must_have_the_functions(monkeypatch):
    fake_mla._modules(monkeypatch, {"flash_mla": {"get_mla_metadata": print}})
    with pytest.raises(BackendFailure, match="has no flash_mla_with_kvcache"):
        step_of("FLASHMLA").builder()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "cache", s.cache.repeat(1, 2, 1)), "block_size is 128"),
        (lambda s: setattr(s, "cache", s.cache.bfloat16()), "dtype"),
        (lambda s: setattr(s, "cache", _shifted(s.cache)), "multiples of 16"),
    ],
    ids=["block size", "dtype", "alignment"],
)
def test_invalid_caches_are_rejected_before_anything_is_written(name, calls, change, message):
    step = step_of(name)
    impl = step.impl()
    metadata = step.builder().build(step.batch)
    change(step)
    before = step.cache.clone()
    with pytest.raises(InvalidInputError, match=message):
        step.run(impl, metadata=metadata)
    assert torch.equal(step.cache.nan_to_num(7), before.nan_to_num(7))


def _shifted(cache):
    """The cache at an address that is no multiple of 16."""
    memory = torch.empty(cache.numel() + 1, dtype=cache.dtype)
    return memory[1:].view(cache.shape).copy_(cache)


def test_a_gap_between_large_blocks_is_rejected_by_flash_attention(monkeypatch):
    with fake_flash_attn.installed("vLLM's FlashAttention 3"):
        step = step_of("FLASH_ATTN_MLA")
        step.cache = torch.cat([step.cache, step.cache], 1)[:, :64]
        with pytest.raises(InvalidInputError, match="gap between blocks"):
            step.run()


def test_a_batch_without_pages_is_rejected(name, calls):
    step = step_of(name)
    with pytest.raises(InvalidInputError, match="needs a block_table"):
        step.builder().build(dataclasses.replace(step.batch, block_table=None))
