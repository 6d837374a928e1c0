"""Stand-ins for what the SGLang plug-in imports and is given, with SGLang's names and layouts.

The contract test compares the names with the released package, and runs steps with classes that
come from there.
"""

from __future__ import annotations

import enum
import sys
import types
from types import SimpleNamespace

import torch
from torch import nn

import attn_dispatch.integrations.sglang as plugin
from support.sglang_names import IMPORTED


class AttentionType(enum.Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class ForwardMode(enum.IntEnum):
    EXTEND = 1
    DECODE = 2
    MIXED = 3
    IDLE = 4
    TARGET_VERIFY = 5

    def is_decode(self):
        return self is ForwardMode.DECODE

    def is_idle(self):
        return self is ForwardMode.IDLE


class AttentionBackend:
    forward_metadata = None

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        run = self.forward_decode if forward_batch.forward_mode.is_decode() else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)


class RadixAttention(nn.Module):
    def __init__(
        self,
        num_heads,
        head_dim,
        scaling,
        num_kv_heads,
        layer_id,
        logit_cap=0.0,
        v_head_dim=-1,
        sliding_window_size=-1,
        is_cross_attention=False,
        pos_encoding_mode="NONE",
        logit_capping_method="tanh",
        quant_config=None,
        attn_type=AttentionType.DECODER,
        use_irope=False,
        prefix="",
    ):
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num = num_heads, num_kv_heads
        self.qk_head_dim = head_dim
        self.v_head_dim = head_dim if v_head_dim == -1 else v_head_dim
        self.scaling, self.layer_id, self.logit_cap = scaling, layer_id, logit_cap
        self.sliding_window_size = sliding_window_size or -1
        self.is_cross_attention, self.use_irope = is_cross_attention, use_irope
        self.k_scale_float = self.v_scale_float = None
        self.attn_type = attn_type
        self.pos_encoding_mode = pos_encoding_mode
        self.logit_capping_method = logit_capping_method
        self.xai_temperature_len = -1


class Block(nn.Module):
    """A module of a model that has a RadixAttention, and its sinks."""

    def __init__(self, attn, sinks=None):
        super().__init__()
        self.attn = attn
        self.sinks = None if sinks is None else nn.Parameter(sinks, requires_grad=False)


class MHATokenToKVPool:
    """Keys and values of each layer: halves of one allocation if their shapes are the same."""

    is_quantized_kv_cache = False

    def __init__(self, size, page_size, num_layers, heads, dim, dim_v, dtype, hnd=False):
        self.page_size, self.dtype, self.buffers = page_size, dtype, []
        rows = size + page_size
        shapes = [(rows, heads, d) for d in (dim, dim_v)]
        if hnd:
            shapes = [(rows // page_size, heads, page_size, d) for d in (dim, dim_v)]
        store = torch.uint8 if dtype.itemsize == 1 else dtype
        for _ in range(num_layers):
            if shapes[0] == shapes[1]:
                pair = tuple(torch.zeros(2, *shapes[0], dtype=store).unbind(0))
            else:
                pair = tuple(torch.zeros(shape, dtype=store) for shape in shapes)
            self.buffers.append(pair)

    def get_kv_buffer(self, layer_id):
        key, value = self.buffers[layer_id]
        return key.view(self.dtype), value.view(self.dtype)


class SWAKVPool:
    """Two pools; layers_mapping says in which one a layer is, and where there."""

    def __init__(self, full_kv_pool, swa_kv_pool, layers_mapping, full_to_swa_index_mapping):
        self.full_kv_pool, self.swa_kv_pool = full_kv_pool, swa_kv_pool
        self.layers_mapping = layers_mapping
        self.full_to_swa_index_mapping = full_to_swa_index_mapping

    def get_kv_buffer(self, layer_id):
        index, is_swa = self.layers_mapping[layer_id]
        return (self.swa_kv_pool if is_swa else self.full_kv_pool).get_kv_buffer(index)

    def translate_loc_from_full_to_swa(self, kv_indices):
        return self.full_to_swa_index_mapping[kv_indices]


def install(monkeypatch, **instead):
    """Put modules with the imported names into sys.modules; `instead` replaces stand-ins.

    The plug-in's modules that import them are imported again.
    """
    for name in ("names", "requests", "adapter"):
        monkeypatch.delitem(sys.modules, f"{plugin.__name__}.{name}", raising=False)
        monkeypatch.delattr(plugin, name, raising=False)
    registered: dict[str, object] = {}

    def register_attention_backend(name):
        return lambda make: registered.setdefault(name, make)

    parallel = SimpleNamespace(dcp_enabled=False, enable_prefill_cp=False)
    found = {
        "AttentionBackend": AttentionBackend,
        "RadixAttention": RadixAttention,
        "register_attention_backend": register_attention_backend,
        "ATTENTION_BACKEND_CHOICES": ["triton", "fa3"],
        "get_parallel": lambda: parallel,
    } | instead
    for name, module in IMPORTED.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        monkeypatch.setattr(sys.modules[module], name, found[name], raising=False)
    return SimpleNamespace(registered=registered, parallel=parallel, **found)


def make_runner(blocks, pool, page_size, *, dtype=torch.float32, kv_dtype=None, **more):
    """A ModelRunner of a model with these blocks, whose caches are in this pool."""
    model = nn.Module()
    model.layers = nn.ModuleList(blocks)
    return SimpleNamespace(
        **{
            "model": model,
            "model_config": SimpleNamespace(is_encoder_decoder=False),
            "dtype": dtype,
            "kv_cache_dtype": kv_dtype or dtype,
            "page_size": page_size,
            "token_to_kv_pool": pool,
            "req_to_token_pool": SimpleNamespace(
                req_to_token=torch.zeros(9, 96, dtype=torch.int32)
            ),
            "use_mla_backend": False,
            "spec_algorithm": SimpleNamespace(is_none=lambda: True),
            "kv_index_translator": SimpleNamespace(is_translating=False),
            "attention_chunk_size": None,
            "prefill_aware_swa": False,
        }
        | more
    )


def make_step(runner, mode, rows, seq_lens, query_lens, **more):
    """A ForwardBatch: requests in these rows of req_to_token, their last tokens new."""
    table = runner.req_to_token_pool.req_to_token
    ends = list(zip(rows, seq_lens, query_lens, strict=True))
    slots = [table[row, length - new : length] for row, length, new in ends]
    return SimpleNamespace(
        **{
            "forward_mode": mode,
            "batch_size": len(rows),
            "req_pool_indices": torch.tensor(rows, dtype=torch.int64),
            "seq_lens": torch.tensor(seq_lens, dtype=torch.int64),
            "seq_lens_cpu": torch.tensor(seq_lens, dtype=torch.int64),
            "extend_seq_lens_cpu": None if mode.name == "DECODE" else list(query_lens),
            "out_cache_loc": torch.cat(slots).long() if slots else torch.zeros(0).long(),
            "spec_info": None,
            "multi_item_delimiter_indices": None,
            "cross_attention_custom_mask": None,
            "attn_cp_metadata": None,
            "attn_dcp_metadata": None,
            "mha_return_lse": False,
        }
        | more
    )
