"""FLASH_ATTN on a GPU, with the installed packages: results, NaN, and graphs."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from hypothesis import given

from attn_dispatch.backends.cuda.flash_attn.backend import FlashAttnBackend, FlashAttnImpl
from attn_dispatch.backends.cuda.flash_attn.windows import computes_window
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.libraries import Library, library_name
from support.cases import Step
from support.flash_attn_cases import (
    BY_NAME,
    DTYPES,
    FEATURES,
    VLLM_3,
    check,
    check_all_but,
    each_provider,
    fitted,
    forward,
    nan_step,
    on_device,
    only,
    spec_of,
    step_of,
    supported,
)
from support.strategies import cases


@contextlib.contextmanager
def real(name):
    """A context with the installed provider on this GPU; skips the test if there is none."""
    provider = BY_NAME[name]
    profile = detect_device("cuda")
    if not provider.runs_on(profile):
        pytest.skip(f"{name} is not for {profile.arch}")
    for module in provider.imports:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            pytest.skip(f"{module}: {error}")
    needed = (library_name(each) for each in provider.capabilities.requires)
    here = profile.with_libraries(*(Library(each, "unknown") for each in needed))
    with only(name), on_device(here):
        yield


@pytest.fixture(scope="module")  # hypothesis rejects one that is made for each test
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


GPU_MIXED = {
    "query_lens": (1, 1, 3, 700, 300, 0, 129, 5),
    "seq_lens": (1000, 1, 70, 700, 1300, 0, 600, 3),
}
#: Prompts that get their own calls where that is faster, one with a past to be gathered.
GPU_LONG = {"query_lens": (2100, 1, 2060), "seq_lens": (2100, 900, 2500)}
GPU_DECODES = {"query_lens": (1,) * 6, "seq_lens": (3000, 1, 300, 17, 4097, 128)}
GPU_FEATURES = {
    **FEATURES,
    "window": {"sliding_window": 70},
    "window both ways": {"causal": False, "sliding_window": 70},
    "soft cap": {"logits_soft_cap": 5.0},
    "alibi, soft cap, window": {"alibi": True, "logits_soft_cap": 5.0, "sliding_window": 200},
    "sinks": {"sinks": True, "sliding_window": 130},
    "heads of 128": {"head_size": 128, "returns_lse": True},
    "heads of 256": {"head_size": 256, "returns_lse": True},
    "heads of 80": {"head_size": 80},
}


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [GPU_MIXED, GPU_DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("feature", GPU_FEATURES)
def test_the_installed_package_agrees(cuda, name, feature, lengths, dtype):
    with real(name):
        fields = GPU_FEATURES[feature] | {"dtype": dtype}
        spec = spec_of(name, **fields)
        supported(name, spec)
        step = step_of(name, fields, lengths, cuda)
        check(step, forward(step))


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("feature", ["plain", "not causal", "window", "soft cap", "lse"])
def test_long_prompts_of_the_installed_package_agree(cuda, name, feature):
    with real(name):
        step = step_of(name, GPU_FEATURES[feature], GPU_LONG, cuda)
        check(step, forward(step))


@pytest.mark.gpu
@each_provider
@given(case=cases("FLASH_ATTN", dtypes=DTYPES, max_query=200, max_past=300))
def test_any_step_of_the_installed_package_agrees(cuda, name, case):
    with real(name):
        step = Step(case.replace(spec=fitted(case.spec, BY_NAME[name])), cuda)
        check(step, forward(step))


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("block_size", [None, 16])
def test_nan_stays_in_its_request_with_the_installed_package(cuda, name, block_size):
    with real(name):
        fields = {"block_size": None} if block_size is None else {}
        lengths = {"query_lens": (2100, 1, 300, 7), "seq_lens": (2100, 40, 300, 7)}
        step = step_of(name, fields, lengths, cuda, padding=50)
        expected = step.expected()[0]
        step.key[2401:], step.value[2401:] = torch.nan, torch.nan
        step.key[2100], step.value[2100] = torch.nan, torch.nan
        output = forward(step).double().cpu()
        kept = torch.tensor([*range(2100), *range(2101, 2401)])
        torch.testing.assert_close(output[kept], expected[kept], rtol=0, atol=0.02)


#: Lengths of an encoder's requests, for tiles of 64 to 192 keys.
GPU_APART = {
    "even": (500,) * 5,
    "even tiles": (384,) * 4,
    "ragged": (500, 3, 700, 1, 129, 384, 20),
    "long": (2100, 300, 2060, 9, 31),
}


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("lengths", GPU_APART)
@pytest.mark.parametrize("feature", ["plain", "not causal", "window both ways", "lse"])
def test_an_encoder_of_the_installed_package_agrees(cuda, name, feature, lengths):
    with real(name):
        fields = GPU_FEATURES[feature] | {"block_size": None, "head_size": 128}
        lengths = GPU_APART[lengths]
        step = step_of(name, fields, {"query_lens": lengths, "seq_lens": lengths}, cuda)
        check(step, forward(step))


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("lengths", GPU_APART)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_stays_in_its_request_without_a_cache_with_the_installed_package(
    cuda, name, causal, head_size, lengths
):
    with real(name):
        fields = {"block_size": None, "causal": causal, "head_size": head_size}
        supported(name, spec_of(name, **fields))
        for victim in range(len(GPU_APART[lengths])):
            step = nan_step(name, fields, GPU_APART[lengths], victim, cuda)
            check_all_but(step, forward(step), victim)


@pytest.mark.gpu
@each_provider
@pytest.mark.parametrize("window", [None, 70])
def test_a_graph_of_the_installed_package_serves_later_steps(cuda, name, window):
    with real(name):
        fields = {"cuda_graph": True, "sliding_window": window}
        supported(name, spec_of(name, **fields))
        lengths = {"query_lens": (1,) * 4, "seq_lens": (2000, 0, 90, 17)}
        step = step_of(name, fields, lengths, cuda)
        table = step.batch.block_table.clone()
        batch = AttentionBatch(
            query_start_loc=step.batch.query_start_loc.clone(),
            seq_lens=torch.full_like(step.batch.seq_lens, 2),
            query_start_loc_cpu=step.batch.query_start_loc_cpu,
            seq_lens_cpu=torch.full_like(step.batch.seq_lens_cpu, 2),
            max_query_len=1,
            max_seq_len=table.shape[1] * step.spec.block_size,
            block_table=torch.zeros_like(table),
            slot_mapping=torch.full_like(step.batch.slot_mapping, -1),
        )
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, cuda).build(batch)
        impl, cache = FlashAttnImpl(**step.impl_arguments()), step.kv_cache
        arguments = (step.layer, step.query, step.key, step.value, cache, metadata)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            impl.forward(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = impl.forward(*arguments)
        batch.seq_lens.copy_(step.batch.seq_lens)
        batch.block_table.copy_(table)
        batch.slot_mapping.copy_(step.batch.slot_mapping)
        graph.replay()
        step.check(output)


def keys_counted(attend, spec, query_len, seq_len, paged):
    """(query_len, num_heads): how many keys each row saw, which is exp(lse) for equal weights."""
    new = {"dtype": spec.dtype, "device": "cuda"}
    query = torch.zeros(query_len, spec.num_heads, spec.head_size, **new)
    keys = torch.zeros(seq_len, spec.num_kv_heads, spec.head_size, **new)
    starts, lengths = (
        torch.tensor(each, dtype=torch.int32, device="cuda") for each in ([0, query_len], [seq_len])
    )
    where = {"cu_seqlens_k": torch.nn.functional.pad(lengths, (1, 0))}
    if paged:
        pages = -(-seq_len // 16)
        keys = torch.zeros(pages, 16, spec.num_kv_heads, spec.head_size, **new)
        table = torch.arange(pages, dtype=torch.int32, device="cuda")[None]
        where = {"seqused_k": lengths, "block_table": table}
    left = spec.sliding_window - 1
    _, lse = attend(
        query,
        keys,
        keys,
        query_len,
        starts,
        seq_len,
        causal=spec.causal,
        window_size=[left, 0 if spec.causal else left],
        fa_version=3,
        return_softmax_lse=True,
        **where,
    )
    return lse.double().exp().round().T.long().cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 4, 5, 8])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 160, 192, 224, 256])
def test_vllms_kernel_sees_the_right_keys_of_accepted_windows(head_size, group, causal, cuda):
    """Prompts, chunks over a prefix and drafts, around the edges of the kernel's tiles."""
    with real(VLLM_3):
        attend = BY_NAME[VLLM_3].load()["flash_attn_varlen_func"]
        keys = 64 if head_size > 192 else 96 if head_size > 128 else 128
        windows = {keys * n // 2 + d for n in range(1, 20) for d in (-1, 0, 1)} | {1500, 2047, 2048}
        sizes = {"head_size": head_size, "num_heads": 2 * group, "num_kv_heads": 2}
        for window in sorted(windows):
            spec = spec_of(VLLM_3, sliding_window=window, causal=causal, **sizes)
            if not computes_window(spec):
                continue
            chunks = [(300, 2 * window + 310), (9, window + 200)] if causal else []
            for query_len, seq_len in [(2600, 2600), *chunks]:
                place = torch.arange(seq_len - query_len, seq_len)
                last = place if causal else (place + window - 1).clamp(max=seq_len - 1)
                wanted = (last - (place - window + 1).clamp(min=0) + 1)[:, None]
                found = keys_counted(attend, spec, query_len, seq_len, query_len != seq_len)
                assert (found == wanted).all(), (window, query_len, seq_len)
