"""Public helpers that get values of any kind: one clear error, and nothing is written.

A call may also succeed, if the value happens to be one. What must not happen is another exception,
or a cache that has changed although the call raised.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.errors import AttnDispatchError, InvalidInputError
from attn_dispatch.interface.batch_checks import slots_of
from attn_dispatch.interface.kv_access import gather_kv, read_kv_cache, write_mla_cache
from attn_dispatch.interface.kv_cache import (
    STRIDE_ORDERS,
    kv_cache_shape,
    split_token_scales,
    view_kv_cache,
)
from attn_dispatch.interface.quantization import kv_cache_torch_dtype, stored_head_size
from attn_dispatch.platforms.detect import resolve_device, usable_device
from attn_dispatch.runtime.context import ForwardContext


class NoRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


#: Values of every kind, by a short name. Made again for each call.
VALUES = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "2**31": lambda: 2**31,
    "2**70": lambda: 2**70,
    "an int of 6,000 digits": lambda: 10**6000,
    "0.5": lambda: 0.5,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "complex": lambda: 1j,
    "str": lambda: "nope",
    "empty str": lambda: "",
    "bytes": lambda: b"x",
    "list": lambda: [1],
    "empty list": list,
    "nested list": lambda: [[1], [2, 3]],
    "list of None": lambda: [None],
    "list of str": lambda: ["a"],
    "list of floats": lambda: [1.0],
    "list of bools": lambda: [True],
    "list of huge": lambda: [2**70],
    "list of tensors": lambda: [torch.ones(3)],
    "dict": lambda: {"a": 1},
    "dict of int": lambda: {1: 2},
    "set": lambda: {1},
    "object": object,
    "no repr": NoRepr,
    "type": lambda: int,
    "function": lambda: len,
    "generator": lambda: (i for i in (1, 2)),
    "range": lambda: range(2),
    "ndarray": lambda: np.ones(2),
    "ndarray of objects": lambda: np.array([None, "a"], dtype=object),
    "numpy bool": lambda: np.bool_(True),
    "numpy int": lambda: np.int64(3),
    "dtype": lambda: torch.float32,
    "float tensor": lambda: torch.ones(2),
    "int tensor": lambda: torch.ones(2, dtype=torch.int64),
    "0-d tensor": lambda: torch.tensor(1),
    "empty tensor": lambda: torch.empty(0, dtype=torch.int64),
    "bool tensor": lambda: torch.ones(2).bool(),
    "complex tensor": lambda: torch.ones(2, dtype=torch.complex64),
    "fp8 tensor": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "uint64 tensor": lambda: torch.ones(2).to(torch.uint64),
    "quantized tensor": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "2-d tensor": lambda: torch.ones(2, 2, dtype=torch.int32),
    "3-d tensor": lambda: torch.ones(2, 2, 8),
    "4-d tensor": lambda: torch.ones(2, 4, 2, 8),
    "5-d tensor": lambda: torch.ones(2, 2, 4, 2, 8),
    "6-d tensor": lambda: torch.ones(2, 2, 4, 2, 8, 1),
    "meta tensor": lambda: torch.ones(2, device="meta"),
    "5-d meta tensor": lambda: torch.ones(6, 2, 4, 2, 8, device="meta"),
    "sparse tensor": lambda: torch.eye(2).to_sparse(),
    "expanded cache": lambda: torch.zeros(1, 2, 4, 2, 8).expand(6, 2, 4, 2, 8),
    "leaf": lambda: torch.ones(2, requires_grad=True),
    "leaf cache": lambda: torch.zeros(6, 2, 4, 2, 8, requires_grad=True),
}

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}


def cache(dtype=torch.float32):
    size = stored_head_size("int8_per_token_head", 8) if dtype == torch.int8 else 8
    return ad.allocate_kv_cache(kv_cache_shape(6, 4, 2, size), STRIDE_ORDERS["NHD"], dtype)


def new():
    return {
        "key": torch.ones(3, 2, 8),
        "value": torch.ones(3, 2, 8),
        "slot_mapping": torch.tensor([5, -1, 7]),
        "k_scale": torch.ones(()),
        "v_scale": 1.0,
    }


def batch_arguments():
    return {
        "query_lens": [1, 2],
        "seq_lens": [5, 2],
        "block_table": torch.tensor([[0, 1], [2, 9]]),
        "block_size": 4,
        "slot_mapping": torch.tensor([4, 8, 9]),
        "key_lens": [1, 2],
        "device": "cpu",
        "custom_mask": torch.ones(9).bool(),
        "multi_modal_placeholder_index_maps": {},
        "enable_kv_scales_calculation": False,
        "max_decode_query_len": 1,
    }


@functools.cache
def plan():
    return ad.plan_kv_cache({"a": ad.AttentionSpec(**SHAPE)}, "cpu")


def open_context(batch):
    with ad.forward_context(batch):
        return


def the_batch():
    return ad.AttentionBatch.create([1, 2], [5, 2], block_table=torch.zeros(2, 2).int())


#: Helper -> the helper and arguments under which it works.
HELPERS = {
    "AttentionBatch.create": (ad.AttentionBatch.create, batch_arguments),
    "AttentionBatch": (
        lambda **changed: ad.AttentionBatch(**changed).check(),
        lambda: {
            name: getattr(the_batch(), name) for name in ad.AttentionBatch.__dataclass_fields__
        },
    ),
    "slots_of": (
        slots_of,
        lambda: {
            "query_lens": torch.tensor([1, 2]),
            "seq_lens": torch.tensor([5, 2]),
            "block_table": torch.tensor([[0, 1], [2, 9]]),
            "block_size": 4,
        },
    ),
    "kv_cache_shape": (
        kv_cache_shape,
        lambda: {"num_blocks": 6, "block_size": 4, "num_kv_heads": 2, "head_size": 8},
    ),
    "allocate_kv_cache": (
        ad.allocate_kv_cache,
        lambda: {
            "shape": (1, 2, 4, 2, 8),
            "stride_order": (0, 1, 3, 2, 4),
            "dtype": torch.float16,
            "device": "cpu",
        },
    ),
    "write_kv_cache": (ad.write_kv_cache, lambda: {**new(), "kv_cache": cache()}),
    "write_kv_cache to fp8": (
        ad.write_kv_cache,
        lambda: {**new(), "kv_cache": cache(torch.float8_e4m3fn)},
    ),
    "write_kv_cache to int8": (ad.write_kv_cache, lambda: {**new(), "kv_cache": cache(torch.int8)}),
    "write_mla_cache": (
        write_mla_cache,
        lambda: {
            "kv_c_normed": torch.ones(3, 6),
            "k_pe": torch.ones(3, 2),
            "kv_cache": torch.zeros(6, 4, 8),
            "slot_mapping": torch.tensor([5, -1, 7]),
            "scale": 1.0,
        },
    ),
    "view_kv_cache": (
        view_kv_cache,
        lambda: {"kv_cache": cache(), "head_size": 8, "head_size_v": 4},
    ),
    "split_token_scales": (split_token_scales, lambda: {"kv_cache": cache(torch.int8)}),
    "read_kv_cache": (
        read_kv_cache,
        lambda: {
            "cache": cache()[:, 0],
            "blocks": torch.tensor([1, 2]),
            "offsets": torch.tensor([3, 0]),
        },
    ),
    "gather_kv": (
        gather_kv,
        lambda: {
            "cache": cache(torch.float8_e4m3fn)[:, 0],
            "block_table_row": torch.tensor([1, 2]),
            "seq_len": 6,
            "scale": torch.ones(()),
            "dtype": torch.float32,
        },
    ),
    "copy_blocks": (
        ad.copy_blocks,
        lambda: {"kv_caches": [cache(), cache()], "src_to_dists": torch.tensor([[0, 1]])},
    ),
    "copy_blocks of one": (
        lambda kv_cache: ad.copy_blocks([cache(), kv_cache], torch.tensor([[0, 1]])),
        lambda: {"kv_cache": cache()},
    ),
    "swap_blocks": (
        ad.swap_blocks,
        lambda: {
            "src_kv_cache": cache(),
            "dst_kv_cache": cache(),
            "src_to_dst": torch.tensor([[0, 1]]),
        },
    ),
    "AttentionBackend.copy_blocks": (
        ad.AttentionBackend.copy_blocks,
        lambda: {"kv_caches": [cache()], "src_to_dists": torch.tensor([[0, 1]])},
    ),
    "merge_states": (
        ad.merge_states,
        lambda: {
            "outputs": [torch.ones(3, 4, 8)] * 2,
            "lses": [torch.ones(3, 4)] * 2,
            "sinks": torch.ones(4),
        },
    ),
    "merge_states of one": (
        lambda output, lse: ad.merge_states([torch.ones(3, 4, 8), output], [torch.ones(3, 4), lse]),
        lambda: {"output": torch.ones(3, 4, 8), "lse": torch.ones(3, 4)},
    ),
    "plan_kv_cache": (
        ad.plan_kv_cache,
        lambda: {
            "layers": {"a": ad.AttentionSpec(**SHAPE)},
            "device": "cpu",
            "shared": {},
            "backend": "REFERENCE",
        },
    ),
    "plan_kv_cache of one": (
        lambda spec: ad.plan_kv_cache({"a": spec}, "cpu"),
        lambda: {"spec": ad.AttentionSpec(**SHAPE)},
    ),
    "KVCachePlan.allocate": (
        lambda **changed: plan().allocate(**changed),
        lambda: {"num_blocks": 3, "device": "cpu"},
    ),
    "KVCachePlan.num_blocks": (
        lambda memory_bytes: plan().num_blocks(memory_bytes),
        lambda: {"memory_bytes": 1 << 20},
    ),
    "bind_kv_caches": (
        ad.bind_kv_caches,
        lambda: {
            "layers": {"a": ad.Attention(4, 8, num_kv_heads=2, device="cpu", block_size=None)},
            "caches": {"a": cache()},
        },
    ),
    "bind_kv_caches of one": (
        lambda kv_cache: ad.bind_kv_caches(
            {"a": ad.Attention(4, 8, num_kv_heads=2, device="cpu", block_size=4)}, {"a": kv_cache}
        ),
        lambda: {"kv_cache": cache()},
    ),
    "forward_context": (open_context, lambda: {"batch": the_batch()}),
    "forward_context by name": (
        lambda batch: open_context({"a": batch}),
        lambda: {"batch": the_batch()},
    ),
    "ForwardContext": (ForwardContext, lambda: {"batch": the_batch()}),
    "stored_head_size": (
        stored_head_size,
        lambda: {"kv_cache_dtype": "int8_per_token_head", "size": 8},
    ),
    "kv_cache_torch_dtype": (
        kv_cache_torch_dtype,
        lambda: {"kv_cache_dtype": "fp8", "dtype": torch.float16},
    ),
    "detect_device": (ad.detect_device, lambda: {"device": "cpu"}),
    "known_device": (ad.known_device, lambda: {"name": "h200"}),
    "resolve_device": (resolve_device, lambda: {"device": "cpu"}),
    "usable_device": (usable_device, lambda: {"device": "cpu"}),
    "AttentionSpec": (
        ad.AttentionSpec,
        lambda: {
            **SHAPE,
            "head_size_v": 8,
            "kv_cache_dtype": "auto",
            "kv_scales": "per_tensor",
            "block_size": 4,
            "kv_cache_layout": "NHD",
            "attn_type": "decoder",
            "causal": True,
            "sliding_window": 3,
            "logits_soft_cap": 30.0,
            "alibi": False,
            "sinks": False,
            "kv_sharing": False,
            "custom_mask": False,
            "bidirectional_ranges": False,
            "mla": None,
            "returns_lse": False,
            "output_quant": None,
            "batch_invariant": False,
            "cuda_graph": False,
        },
    ),
    "MLADims": (
        ad.MLADims,
        lambda: {
            "kv_lora_rank": 6,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 2,
            "v_head_dim": 8,
        },
    ),
}
PARAMETERS = [(helper, name) for helper, (_, make) in HELPERS.items() for name in make()]


def as_bytes(tensor):
    return tensor.detach().contiguous().view(torch.uint8).clone()


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        ok = value.layout is torch.strided and not value.is_meta and not value.is_quantized
        return [value] if ok and value.dim() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in tensors_in(each)] if isinstance(value, list) else []


@pytest.mark.parametrize("helper", HELPERS)
def test_the_valid_arguments_work(helper):
    call, make = HELPERS[helper]
    call(**make())


@pytest.mark.parametrize(("helper", "name"), PARAMETERS, ids=lambda value: value)
def test_any_value_is_accepted_or_rejected_with_one_clear_error(helper, name):
    call, make = HELPERS[helper]
    for kind, value in VALUES.items():
        arguments = {**make(), name: value()}
        watched = [t for each in arguments.values() for t in tensors_in(each)]
        before = [as_bytes(t) for t in watched]
        try:
            call(**arguments)
        except AttnDispatchError as error:
            message = str(error)
            assert len(message) > 20, (kind, message)
            assert len(message) < 2000, (kind, message)
            for tensor, old in zip(watched, before, strict=True):
                assert torch.equal(as_bytes(tensor), old), f"{kind} was rejected after a write"
        except Exception as error:
            pytest.fail(f"{helper}({name}={kind}) raised {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", ["nope", "cuda:999", "gfx942", 3.5, [], "cpu:x", 10**30, ""])
@pytest.mark.parametrize(
    "helper",
    [
        lambda device: ad.AttentionBatch.create([1], [1], device=device),
        lambda device: ad.allocate_kv_cache((1, 2, 4, 2, 8), range(5), torch.half, device),
        lambda device: plan().allocate(1, device),
        lambda device: ad.plan_kv_cache({"a": ad.AttentionSpec(**SHAPE)}, device),
        lambda device: ad.Attention(4, 8, device=device),
        ad.detect_device,
        usable_device,
    ],
    ids=["batch", "allocate", "plan.allocate", "plan", "layer", "detect", "usable"],
)
def test_a_device_that_does_not_exist_is_an_invalid_input(helper, name):
    with pytest.raises(InvalidInputError):
        helper(name)


@pytest.mark.parametrize("field", ["sliding_window", "block_size", "num_heads", "head_size"])
@pytest.mark.parametrize(
    "value", [2**63, 2**70, pytest.param(10**6000, id="6,000 digits"), 0, -1, 2.0, True]
)
def test_integers_of_a_spec_fit_64_bits(field, value):
    with pytest.raises(InvalidInputError, match=f"{field}="):
        ad.AttentionSpec(**(SHAPE | {field: value}))


def test_numpy_integers_become_plain_ones():
    numbers = {"num_heads": np.int32(4), "sliding_window": np.int64(7), "block_size": np.uint8(16)}
    spec = ad.AttentionSpec(**(SHAPE | numbers))
    assert spec == ad.AttentionSpec(**SHAPE, sliding_window=7, block_size=16)
    assert {type(getattr(spec, name)) for name in numbers} == {int}
    batch = ad.AttentionBatch.create(
        np.array([1, 2]),
        [np.int64(1), 2],
        block_table=torch.zeros(2, 1).int(),
        block_size=np.int8(4),
    )
    assert batch.seq_lens.tolist() == [1, 2]
    assert type(batch.block_size) is int


def test_a_window_of_63_bits_covers_all_keys():
    query = torch.randn(5, 4, 8)
    wide = ad.attention(query, query, query, sliding_window=2**63 - 1)
    torch.testing.assert_close(wide, ad.attention(query, query, query))
