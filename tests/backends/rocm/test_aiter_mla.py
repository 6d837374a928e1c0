"""ROCM_AITER_MLA: the arguments of AITER, and the results, with a fake of it.

Triton's interpreter has no bfloat16, and AITER has nothing else. So its decodes are tested on
layers that write no cache, and the split of batches between the two on the plan.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_dispatch import AttentionBatch, InvalidInputError, MLADims, UnsupportedError, resolve
from attn_dispatch.errors import BackendFailure
from attn_dispatch.interface import backend as interface_backend
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.resolve import explained_device
from support.fake_mla import install_aiter
from support.mla_cases import MLAStep
from support.selection import DEEPSEEK, mla_layer

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.rocm.aiter_mla import RocmAiterMLABackend
from attn_dispatch.backends.triton import mla_plan

DIMS = MLADims(kv_lora_rank=512, qk_nope_head_dim=8, qk_rope_head_dim=64, v_head_dim=8)
MI300X = KNOWN_DEVICES["gfx942"].with_libraries(
    Library("triton", "3.6.0"), Library("aiter", "0.1.20")
)


@pytest.fixture(autouse=True)
def _on_amd(monkeypatch):
    """The builder finds an MI300X with AITER, which is not broken."""
    monkeypatch.setattr(libraries, "_broken", {})
    for module in (mla_plan, interface_backend):
        monkeypatch.setattr(module, "detect_device", lambda device: MI300X)


@pytest.fixture
def calls(monkeypatch):
    """Installs the fake. The value is its calls."""
    return install_aiter(monkeypatch)


def step_of(seq_lens, query_lens=None, **more):
    """A step whose cache holds all keys: requests of one query token, unless said otherwise."""
    fields = {"dtype": torch.bfloat16, "block_size": 16, "heads": 16, "kv_sharing": True}
    fields |= {"backend": RocmAiterMLABackend, "dims": DIMS} | more
    step = MLAStep((0,) * len(seq_lens), seq_lens, 0, 0, **fields)
    step.query_lens = query_lens or (1,) * len(seq_lens)
    shape = (sum(step.query_lens), step.heads, DIMS.qk_nope_head_dim + DIMS.qk_rope_head_dim)
    step.query = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    step.latents = step.query.new_zeros(len(step.query), DIMS.kv_lora_rank)
    step.rotated = step.query.new_zeros(len(step.query), DIMS.qk_rope_head_dim)
    step.batch = AttentionBatch.create(
        step.query_lens, seq_lens, block_table=step.batch.block_table
    )
    return step


@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
@pytest.mark.parametrize("heads", [16, 128])
def test_decodes_agree_with_float64(calls, block_size, heads):
    step = step_of((70, 1, 33), block_size=block_size, heads=heads)
    step.check(step.run(), step.expected()[0])
    assert calls == [3]


@pytest.mark.parametrize("scale", [-1e-3, 1e-42])
def test_a_scale_that_aiter_does_not_take(calls, scale):
    step = step_of((70, 33))
    step.scale = scale
    step.check(step.run(), step.expected()[0])


def test_a_decode_between_requests_without_queries(calls):
    step = step_of((70, 9, 33, 5), (1, 0, 1, 1))
    step.check(step.run(), step.expected()[0])
    assert calls == [3]


def test_the_output_may_be_quantized(calls):
    step = step_of((70, 33))
    wanted = step.run()
    quantized = torch.empty(wanted.shape, dtype=torch.float8_e4m3fn)
    scale = torch.tensor(2.0)
    step.run(output=quantized, output_scale=scale)
    expected = (wanted.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))


def test_only_requests_of_one_token_go_to_aiter(calls):
    """The others have a plan for TRITON_MLA's kernel, with the rows of their requests."""
    step = step_of((70, 33, 0, 20, 1, 9), (1, 3, 1, 20, 1, 0))
    metadata = step.builder().build(step.batch)
    assert metadata.decodes.key_starts.tolist() == [0, 70, 71]
    assert metadata.decodes.tokens.tolist() == [0, 25]
    assert metadata.decode.requests.tolist() == [1, 2, 3]
    table = step.batch.block_table[4]
    assert metadata.decodes.slots[70].item() == int(table[0]) * 16


def test_a_batch_of_prompts_makes_no_call(calls):
    step = step_of((70, 33), (5, 33))
    metadata = step.builder().build(step.batch)
    assert metadata.decodes is None
    assert metadata.decode.num_reqs == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 32}, "num_heads=32"),
        ({"dtype": torch.float16}, "dtype=float16"),
        ({"returns_lse": True}, "returns_lse=True"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype=fp8_e4m3"),
        ({"cuda_graph": True}, "cuda_graph=True"),
        ({"lengths": "upper_bound"}, "lengths=upper_bound"),
        ({"batch_invariant": True}, "batch_invariant=True"),
        ({"sliding_window": 9}, "sliding_window=9"),
        ({"block_size": None}, "block_size=None"),
        ({"mla": dataclasses.replace(DEEPSEEK, kv_lora_rank=256)}, "head_size=320"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_limits(fields, message):
    """Selection and the builder reject the same."""
    spec = mla_layer(**fields)
    with pytest.raises(UnsupportedError, match=message):
        resolve(spec, explained_device("MI300X"), backend="ROCM_AITER_MLA")
    with pytest.raises(UnsupportedError, match=message):
        RocmAiterMLABackend.get_builder_cls()(spec, torch.device("cpu"))


def test_it_comes_after_the_backend_that_was_tested():
    assert resolve(mla_layer(), explained_device("MI300X")).name == "TRITON_MLA"


def test_a_cache_with_gaps_is_rejected(calls):
    step = step_of((70, 33))
    step.cache = torch.cat([step.cache, step.cache], 1)[:, :16]
    with pytest.raises(InvalidInputError, match="contiguous blocks of 16"):
        step.run()


def test_a_missing_aiter_is_a_failure():
    with pytest.raises(BackendFailure, match="aiter"):
        step_of((70,)).impl()
