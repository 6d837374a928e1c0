"""TORCH_VARLEN: the arguments of PyTorch's varlen_attn, and the results.

Without a GPU, fakes compute: with the signature of PyTorch 2.13, and with that of 2.11, which has
neither pages nor shared heads. On a GPU the same steps run with the installed PyTorch.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from torch.nn.attention import varlen

from attn_dispatch.backends.common import index_runs
from attn_dispatch.backends.cuda import torch_varlen
from attn_dispatch.backends.cuda.torch_varlen import TorchVarlenBackend, TorchVarlenImpl
from attn_dispatch.conformance import verify
from attn_dispatch.errors import BackendFailure, UnsupportedError
from attn_dispatch.interface.capability import compare
from attn_dispatch.interface.kv_layout_table import with_kv_layout
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from support import vendor_cases
from support.cases import MEMORY, Case, Step, layer_spec
from support.vendor_cases import BRAIN, HALF, spec_of

GPU = KNOWN_DEVICES["sm90"].with_libraries(Library("torch", version="2.13.0"))
#: Requests with a past, without one, and one that pads the batch.
MIXED = {"query_lens": (1, 5, 1, 7, 3), "seq_lens": (19, 5, 0, 23, 9)}
PROMPTS = {"query_lens": (4, 1, 9), "seq_lens": (4, 1, 9)}
DECODES = {"query_lens": (1, 1), "seq_lens": (30, 2)}
BATCHES = {"mixed": MIXED, "prompts": PROMPTS, "decodes": DECODES}

CALLS = []


class AuxRequest(NamedTuple):
    lse: bool = False


def require(condition, what):
    """Raise on arguments that PyTorch cannot compute, even if it would not check them."""
    if not condition:
        raise ValueError(f"fake varlen_attn: {what}")


def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size,
           seqused_k=None, block_table=None):  # fmt: skip
    """FlashAttention 2: masked values are multiplied by zero; rows without keys have lse +inf."""
    CALLS.append("pages" if block_table is not None else "rows")
    for rows in (query, key, value):
        require(rows.dtype in (HALF, BRAIN) and rows.dtype == query.dtype, "16 bits, all the same")
        steps = (step * rows.element_size() for step in rows.stride()[:-1])
        require(rows.stride(-1) == 1, "a head's elements are next to each other")
        require(not any(s % 16 for s in (rows.data_ptr(), *steps)), "loads are aligned")
    size = query.shape[-1]
    require(size % 8 == 0 and size <= 256 and key.shape == value.shape, "sizes")
    require(isinstance(window_size, tuple) and len(window_size) == 2, "window_size is a pair")
    require(all(-1 <= side < 2**31 for side in window_size), "window_size is of int32")
    require(scale > 0, "scores keep their order")
    require(max_q > 0 and max_k > 0, "there is something to compute")
    starts = check_starts("cu_seq_q", cu_seq_q, len(query), max_q)
    num_reqs = len(starts) - 1
    if block_table is None:
        require(seqused_k is None, "rows have no gaps")
        key_starts = check_starts("cu_seq_k", cu_seq_k, len(key), max_k)
        require(len(key_starts) == num_reqs + 1, "as many requests")
        rows_of = [slice(*pair) for pair in itertools.pairwise(key_starts)]
        keys, values = [key[rows] for rows in rows_of], [value[rows] for rows in rows_of]
    else:
        require(cu_seq_k is None, "pages have no starts")
        require(key.dim() == 4 and key.shape[1] % 256 == 0, "pages have multiples of 256 tokens")
        require(block_table.dtype == seqused_k.dtype == torch.int32, "int32")
        require(block_table.shape[0] == len(seqused_k) == num_reqs, "as many requests")
        require(max(seqused_k.tolist()) <= max_k, "max_k is the most")
        lengths, queries = seqused_k.tolist(), lens_of(starts)
        left = window_size[0]
        first = [
            max(0, length - num_rows - left) if left >= 0 else 0
            for length, num_rows in zip(lengths, queries, strict=True)
        ]
        keys, values = (
            [pages_of(pages, *each) for each in zip(block_table, lengths, first, strict=True)]
            for pages in (key, value)
        )
    output = torch.full_like(query, torch.nan)
    lse = torch.full(query.shape[1::-1], torch.nan, dtype=torch.float32)
    for i in range(num_reqs):
        rows = slice(starts[i], starts[i + 1])
        q, k, v = query[rows].float(), keys[i].float(), values[i].float()
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        distance = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
        left, right = window_size
        seen = ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))
        weights = scores.masked_fill(~seen, -math.inf)
        found = weights.logsumexp(-1)
        has_no_keys = ~seen.any(-1) if len(k) else torch.ones(len(q), dtype=torch.bool)
        weights = weights.softmax(-1).masked_fill(has_no_keys[:, None], 0)
        output[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(output.dtype)
        lse[:, rows] = found.masked_fill(has_no_keys, math.inf)
    return (output, lse) if return_aux is not None and return_aux.lse else output


def lens_of(starts):
    return [end - start for start, end in itertools.pairwise(starts)]


def check_starts(name, starts, total, longest):
    require(starts.dtype == torch.int32 and starts.is_contiguous(), f"{name} is int32")
    values = starts.tolist()
    lens = lens_of(values)
    require(values[0] == 0 and values[-1] == total and min(lens) >= 0, f"{name} covers the rows")
    require(longest == max(lens), f"the longest of {name} is {max(lens)}, not {longest}")
    return values


def pages_of(pages, table, length, first):
    """A request's keys, with zeros for the tiles of 256 before its window."""
    first = first // 256 * 256
    blocks = table[first // pages.shape[1] : -(-length // pages.shape[1])].long()
    require(not len(blocks) or 0 <= int(blocks.min()) <= int(blocks.max()) < len(pages), "blocks")
    offset = first - first // pages.shape[1] * pages.shape[1]
    rows = pages[blocks].flatten(0, 1)[offset:]
    return torch.cat([rows.new_zeros(first, *rows.shape[1:]), rows])[:length]


def varlen_attn_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    heads = key.shape[-2]
    require(enable_gqa or query.shape[1] == heads, "heads are shared without enable_gqa")
    require(query.shape[1] % heads == 0 and num_splits is None, "heads")
    return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale,
                  window_size, seqused_k, block_table)  # fmt: skip


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    require(query.shape[1] == key.shape[1], "heads are not shared")
    return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale,
                  window_size)  # fmt: skip


VERSIONS = {"2.11": varlen_attn_2_11, "2.13": varlen_attn_2_13}


@pytest.fixture(params=VERSIONS)
def version(request, monkeypatch):
    """Installs the varlen_attn of a PyTorch version."""
    install(monkeypatch, request.param)
    return request.param


def install(monkeypatch, version):
    CALLS.clear()
    module = SimpleNamespace(varlen_attn=VERSIONS[version], AuxRequest=AuxRequest)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)


def step_of(fields=(), batch=MIXED, device="cpu", **case):
    return vendor_cases.step_of(fields, batch, device, **case)


def run(step, **more):
    return vendor_cases.run(TorchVarlenBackend, step, **more)


def check(step, found=None, expected=None):
    vendor_cases.check(step, found or run(step), expected)


FEATURES = {
    "plain": {},
    "bfloat16": {"dtype": BRAIN},
    "lse": {"returns_lse": True},
    "not causal": {"causal": False, "returns_lse": True},
    "window": {"sliding_window": 6, "returns_lse": True},
    "window of one": {"sliding_window": 1},
    "window beyond all": {"sliding_window": 2**40},
    "window both ways": {"sliding_window": 4, "causal": False},
    "one KV head": {"num_heads": 7, "num_kv_heads": 1, "returns_lse": True},
    "no shared heads": {"num_kv_heads": 4, "returns_lse": True},
    "heads of 40": {"head_size": 40},
    "heads of 256": {"head_size": 256, "num_kv_heads": 1},
    "HND": {"kv_cache_layout": "HND"},
    "blocks of 1": {"block_size": 1},
    "blocks of 256": {"block_size": 256, "sliding_window": 6, "returns_lse": True},
    "blocks of 512, HND": {"block_size": 512, "kv_cache_layout": "HND"},
    "blocks of 384": {"block_size": 384},
    "sharing": {"kv_sharing": True},
    "cache with a named dtype": {"kv_cache_dtype": "float16"},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_agrees_with_the_oracle(version, feature, batch):
    step = step_of(FEATURES[feature], BATCHES[batch])
    assert not compare(step.spec, TorchVarlenBackend.capabilities, GPU)
    assert TorchVarlenBackend.check_combination(step.spec, GPU) == []
    check(step, expected=step.naive())


@st.composite
def any_cases(draw):
    """A step that the backend declares."""
    attn_type = draw(st.sampled_from([AttentionType.DECODER] * 3 + list(AttentionType)))
    has_cache = attn_type.has_kv_cache and draw(st.integers(0, 3)) > 0
    has_cache |= attn_type is AttentionType.ENCODER_DECODER
    spec = spec_of(
        num_heads=draw(st.sampled_from([2, 4, 6])),
        num_kv_heads=draw(st.sampled_from([1, 2])),
        head_size=draw(st.sampled_from([8, 64, 72, 128])),
        dtype=draw(st.sampled_from([HALF, BRAIN])),
        block_size=draw(st.sampled_from([1, 3, 16, 256])) if has_cache else None,
        kv_cache_layout=draw(st.sampled_from(["NHD", "HND"])) if has_cache else None,
        attn_type=attn_type,
        causal=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, None, 1, 3, 17])),
        kv_sharing=has_cache and attn_type == AttentionType.DECODER and draw(st.booleans()),
        returns_lse=draw(st.booleans()),
    )
    query_len, past = st.sampled_from([0, 1, 1, 2, 9]), st.sampled_from([0, 0, 1, 7, 30])
    lens = draw(st.lists(st.tuples(query_len, past), max_size=5))
    is_cross = attn_type is AttentionType.ENCODER_DECODER
    seq_lens = tuple(past if is_cross or not has_cache else query + past for query, past in lens)
    return Case(
        spec=spec,
        query_lens=tuple(query for query, _ in lens),
        seq_lens=seq_lens,
        new_lens=tuple(n if draw(st.booleans()) else 0 for n in seq_lens) if is_cross else None,
        brings_keys=not has_cache or draw(st.booleans()),
        memory=draw(st.sampled_from(MEMORY)),
        padding=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("name", VERSIONS)
@given(case=any_cases())
def test_any_step_agrees_with_the_reference(name, case):
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, name)
        check(Step(case))


@pytest.mark.parametrize("attn_type", [AttentionType.ENCODER, AttentionType.ENCODER_ONLY])
def test_attention_without_a_cache(version, attn_type):
    check(step_of({"block_size": None, "attn_type": attn_type, "returns_lse": True}, PROMPTS))


@pytest.mark.parametrize("new_lens", [(7, 5), (0, 5), (0, 0)], ids=str)
def test_cross_attention(version, new_lens):
    fields = {"attn_type": AttentionType.ENCODER_DECODER, "returns_lse": True}
    check(step_of(fields, {"query_lens": (3, 1), "seq_lens": (7, 5), "new_lens": new_lens}))


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_a_scale_need_not_be_positive(version, scale):
    step, expected = step_of({"returns_lse": True}), step_of({"returns_lse": True})
    step.scale = expected.scale = scale
    check(step, expected=expected.expected())


def test_prompts_read_the_given_rows(version, monkeypatch):
    def never(*_):
        raise AssertionError("the cache is read")

    monkeypatch.setattr(torch_varlen, "read_kv_cache", never)
    check(step_of({}, PROMPTS))
    check(step_of({"block_size": 256}, PROMPTS))
    assert CALLS == ["rows", "rows"]
    with pytest.raises(AssertionError, match="is read"):
        run(step_of({"kv_sharing": True}, PROMPTS))


def test_pages_are_read_in_place_where_pytorch_can(version, monkeypatch):
    for block_size in (256, 512, 128):
        run(step_of({"block_size": block_size}))
    can = version == "2.13"
    assert CALLS == ["pages", "pages", "rows"] if can else ["rows"] * 3


def test_an_unaligned_cache_is_gathered(monkeypatch):
    install(monkeypatch, "2.13")
    step = step_of({"block_size": 256})
    flat = torch.full((step.kv_cache.numel() + 1,), torch.nan, dtype=HALF)
    expected = step.expected()
    crooked = flat[1:].view(step.kv_cache.shape)
    crooked.copy_(step.kv_cache)
    check(step, (step.forward(TorchVarlenBackend, crooked), None), expected)
    assert CALLS == ["rows"]


@pytest.mark.parametrize("garbage", [-1, 2**31 - 1, 0])
@pytest.mark.parametrize("fields", [{}, {"causal": False}], ids=str)
def test_blocks_that_the_window_has_passed_are_not_read(version, fields, garbage):
    batch = {"query_lens": (2, 1), "seq_lens": (12, 13)}
    step = step_of({"sliding_window": 3, **fields}, batch)
    expected = step.expected()
    for request in (0, 1):
        step.kv_cache[step.batch.block_table[request, :2].long()] = torch.nan
        step.batch.block_table[request, :2] = garbage
    check(step, expected=expected)


def test_rows_without_keys_are_zero_and_minus_infinity(version):
    batch = {"query_lens": (2, 6, 1), "seq_lens": (0, 3, 9), "brings_keys": False}
    step = step_of({"returns_lse": True, "kv_sharing": True}, batch)
    output, lse = run(step)
    check(step, (output, lse))
    assert not output[:5].any()
    assert bool((lse[:5] == -torch.inf).all())
    assert bool(lse[5:].isfinite().all())


@pytest.mark.parametrize(
    ("query_lens", "seq_lens"), [((1, 2), (0, 0)), ((), ()), ((0, 0), (5, 0))], ids=str
)
def test_pytorch_is_not_called_without_keys(version, query_lens, seq_lens):
    batch = {"query_lens": query_lens, "seq_lens": seq_lens}
    output, lse = run(step_of({"returns_lse": True}, batch, brings_keys=False, padding=2))
    assert not output.any()
    assert bool((lse == -torch.inf).all())
    assert not CALLS


def test_padding_rows_are_zero(version):
    step = step_of({"returns_lse": True}, padding=4)
    step.key[-4:], step.value[-4:] = torch.nan, torch.nan
    output, lse = run(step, output=torch.full(step.query.shape, torch.nan, dtype=HALF))
    check(step, (output, lse))
    assert not output[-4:].any()
    assert bool((lse[-4:] == -torch.inf).all())


def test_a_layer_that_shares_a_cache_does_not_write_it(version):
    step = step_of({"kv_sharing": True})
    before = step.kv_cache.clone()
    step.forward(TorchVarlenBackend, step.kv_cache)
    assert torch.equal(before.view(torch.int16), step.kv_cache.view(torch.int16))


def test_new_keys_are_written_to_the_cache(version):
    """The cache then equals that of a step whose keys were already stored."""
    step = step_of()
    complete = Step(step.case.replace(brings_keys=False)).kv_cache
    step.forward(TorchVarlenBackend, step.kv_cache)
    assert torch.equal(complete.nan_to_num(7), step.kv_cache.nan_to_num(7))


def test_index_runs():
    requests, integers = index_runs([3, 0, 5, 9], [2, 0, 3, 1], torch.device("cpu"))
    assert requests.tolist() == [0, 0, 2, 2, 2, 3]
    assert integers.tolist() == [3, 4, 5, 6, 7, 9]
    assert [len(found) for found in index_runs([], [], torch.device("cpu"))] == [0, 0]


# Rejections.

UNDECLARED = {
    "head_size": {"head_size": 20},
    "head_size_v": {"head_size_v": 128},
    "dtype": {"dtype": torch.float32},
    "kv_cache_dtype": {"kv_cache_dtype": "fp8"},
    "logits_soft_cap": {"logits_soft_cap": 2.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "custom_mask": {"custom_mask": True},
    "bidirectional_ranges": {"bidirectional_ranges": True},
    "output_quant": {"output_quant": "fp8_e4m3"},
    "batch_invariant": {"batch_invariant": True},
    "cuda_graph": {"cuda_graph": True},
}


@pytest.mark.parametrize("field", UNDECLARED)
def test_undeclared_fields_are_rejected(field):
    reasons = compare(spec_of(**UNDECLARED[field]), TorchVarlenBackend.capabilities, GPU)
    assert [reason.field for reason in reasons] == [field]
    with pytest.raises(UnsupportedError, match=f"does not compute this layer: {field}="):
        TorchVarlenBackend.get_builder_cls()(spec_of(**UNDECLARED[field]), torch.device("cpu"))


def test_a_cache_of_another_dtype_is_rejected(version):
    spec = spec_of(kv_cache_dtype="bfloat16")
    assert not compare(spec, TorchVarlenBackend.capabilities, GPU)
    [reason] = TorchVarlenBackend.check_combination(spec, GPU)
    assert reason.field == "kv_cache_dtype"
    with pytest.raises(UnsupportedError, match="bfloat16 with dtype=float16 is not supported"):
        TorchVarlenBackend.get_builder_cls()(spec, torch.device("cpu"))


def test_queries_of_another_dtype_than_the_cache_are_rejected(version):
    step = step_of({"kv_cache_dtype": "float16"})
    step.query, step.key, step.value = (t.bfloat16() for t in (step.query, step.key, step.value))
    before = step.kv_cache.clone()
    with pytest.raises(UnsupportedError, match="TRITON_ATTN reads it"):
        step.forward(TorchVarlenBackend, step.kv_cache)
    assert torch.equal(before.view(torch.int16), step.kv_cache.view(torch.int16))


@pytest.mark.parametrize(
    "feature",
    [{"logits_soft_cap": 3.0}, {"sinks": torch.zeros(4)}, {"alibi_slopes": [1.0] * 4}],
    ids=lambda feature: next(iter(feature)),
)
def test_impl_rejects_undeclared_features(feature):
    name = next(iter(feature))
    with pytest.raises(UnsupportedError, match=f"TORCH_VARLEN does not support {name}"):
        TorchVarlenImpl(4, 64, 1.0, **feature)


def test_quantized_output_is_rejected(version):
    output = torch.empty(17, 4, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="does not quantize its output"):
        run(step_of(), output=output, output_scale=torch.ones(()))


def test_a_pytorch_without_varlen_attn_is_reported(monkeypatch):
    monkeypatch.setattr(libraries, "_broken", {})
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(BackendFailure, match="cannot be imported here"):
        TorchVarlenImpl(4, 64, 1.0)


def test_verify_passes(version):
    report = verify(TorchVarlenBackend, "cpu", quick=True, profile=GPU)
    assert report.passed, report.failures


# PyTorch itself.


@pytest.mark.skipif(Version(torch.__version__).release[:2] != (2, 13), reason="is not 2.13")
def test_the_fake_has_the_signature_of_pytorch():
    ours, theirs = (
        inspect.signature(function).parameters
        for function in (varlen_attn_2_13, varlen.varlen_attn)
    )
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert varlen.AuxRequest._fields == AuxRequest._fields


LONG = {"query_lens": (1, 300, 1, 129, 3), "seq_lens": (700, 300, 0, 600, 70)}
LONG_PROMPTS = {"query_lens": (300, 1, 129), "seq_lens": (300, 1, 129)}
ON_GPU = {
    "plain": ({"returns_lse": True}, LONG),
    "prompts": ({"returns_lse": True}, LONG_PROMPTS),
    "no shared heads": ({"num_kv_heads": 8, "returns_lse": True}, LONG),
    "window": ({"sliding_window": 70, "returns_lse": True}, LONG),
    "window both ways": ({"causal": False, "sliding_window": 70}, LONG),
    "not causal": ({"causal": False, "returns_lse": True}, LONG),
    "HND": ({"kv_cache_layout": "HND"}, LONG),
    "pages of 256": ({"block_size": 256, "returns_lse": True}, LONG),
    "sharing": ({"kv_sharing": True}, LONG),
    "heads of 256": ({"head_size": 256, "dtype": HALF}, LONG),
    "encoder": (
        {"block_size": None, "attn_type": AttentionType.ENCODER_ONLY, "returns_lse": True},
        LONG_PROMPTS,
    ),
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def long_step(fields, batch=LONG, **case):
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": BRAIN, "block_size": 16}
    return step_of(sizes | fields, batch, "cuda", **case)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("feature", ON_GPU)
def test_pytorch_agrees_with_the_reference(feature):
    check(long_step(*ON_GPU[feature]))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("batch", [LONG, LONG_PROMPTS], ids=["mixed", "prompts"])
def test_pytorch_reads_rows_of_any_strides(memory, batch):
    step = long_step({"returns_lse": True}, batch, memory=memory, padding=5)
    step.key[-5:], step.value[-5:] = torch.nan, torch.nan
    check(step)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("block_size", [16, 256])
def test_pytorch_does_not_read_before_the_window(block_size):
    step = long_step({"sliding_window": 70, "returns_lse": True, "block_size": block_size})
    expected = step.expected()
    for request, (query, seq) in enumerate(zip(*LONG.values(), strict=True)):
        passed = max(0, seq - query - 69) // block_size
        step.kv_cache[step.batch.block_table[request, :passed].long()] = torch.nan
        step.batch.block_table[request, :passed] = -1
    check(step, expected=expected)


# Notes for reports.

NEW, OLD = (
    KNOWN_DEVICES["sm90"].with_libraries(Library("torch", version=version))
    for version in ("2.13.0", "2.12.1+cu130")
)
#: Fields of a layer over vLLM's cache, and the device -> a part of the note.
NOTES = {
    "pages that are read": ({"block_size": 256}, NEW, ""),
    "small pages": ({"block_size": 16}, NEW, "a multiple of 256 tokens, and these have 16"),
    "heads of 4": (
        {"block_size": 256, "head_size": 4}, NEW, "whose heads begin at multiples of 16 bytes"
    ),
    "an old PyTorch": ({"block_size": 256}, OLD, "PyTorch reads pages from 2.13 on"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOTES)
def test_a_note_says_why_keys_are_copied(what):
    fields, device, reason = NOTES[what]
    spec = layer_spec(**{"head_size": 64, "dtype": torch.bfloat16, **fields})
    notes = TorchVarlenBackend.kernel_notes(with_kv_layout(spec, "vllm"), device, None)
    assert len(notes) == bool(reason)
    for note in notes:
        assert note.startswith("keys of requests with a past are copied from their pages first: ")
        assert reason in note


def test_a_layer_without_a_cache_has_no_note():
    spec = layer_spec(block_size=None, dtype=torch.bfloat16)
    assert TorchVarlenBackend.kernel_notes(spec, OLD, None) == ()
