"""vLLM's classes that the plug-in meets, in a few lines each, for two versions of vLLM.

`make contracts` compares their names and signatures with those of the released versions, and runs
the same cases (`vllm_cases`) on vLLM's own files.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

VERSIONS = ("0.24.0", "0.33.0")
FP8_STATIC, FP8_BLOCKS = "kFp8StaticTensorSym", "kFp8Dynamic128Sym"


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


@dataclass(frozen=True)
class MultipleOf:
    base: int


class AttentionBackend:
    forward_includes_kv_cache_update = True

    @classmethod
    def is_mla(cls):
        return False


class AttentionMetadata:
    pass


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool | torch.Tensor = True
    seq_lens_cpu_upper_bound: torch.Tensor | None = None
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None = None


class AttentionMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec = kv_cache_spec
        self.layer_names = layer_names
        self.vllm_config = vllm_config
        self.device = device


class CascadeBuilder(AttentionMetadataBuilder):
    def use_cascade_attention(
        self, common_prefix_len, query_lens, num_query_heads, num_kv_heads, use_alibi,
        use_sliding_window, use_local_attention, num_sms, dcp_world_size,
    ):  # fmt: skip
        return False


class AttentionImpl:
    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.total_cp_world_size = 1
        return self


class MLAAttentionImpl(AttentionImpl):
    pass


class MLAAttention(torch.nn.Module):
    """The layer of latent attention: all that it does if no token is one of a decode."""

    def __init__(
        self, num_heads, scale, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank,
        kv_lora_rank, kv_b_proj, prefix="", attn_backend=None, kv_cache_dtype="auto",
        **extra_impl_args,
    ):  # fmt: skip
        super().__init__()
        assert attn_backend.is_mla()
        self.impl = attn_backend.get_impl_cls()(
            num_heads=num_heads, head_size=kv_lora_rank + qk_rope_head_dim, scale=scale,
            num_kv_heads=1, alibi_slopes=None, sliding_window=None, kv_cache_dtype=kv_cache_dtype,
            logits_soft_cap=None, attn_type=AttentionType.DECODER,
            kv_sharing_target_layer_name=None, q_lora_rank=q_lora_rank, kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim, qk_rope_head_dim=qk_rope_head_dim,
            qk_head_dim=qk_nope_head_dim + qk_rope_head_dim, v_head_dim=v_head_dim,
            kv_b_proj=kv_b_proj, **({"indexer": None} | extra_impl_args),
        )  # fmt: skip
        self.layer_name = prefix
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_cache = torch.tensor([])
        self._k_scale, self._k_scale_float, self._v_scale_float = torch.tensor(1.0), 1.0, 1.0

    def run(self, query, kv_c_normed, k_pe, metadata, output):
        cache = self.kv_cache
        if metadata is None:
            output.fill_(0)
            return
        rows = metadata.num_actual_tokens
        self.impl.do_kv_cache_update(
            kv_c_normed, k_pe, cache, None, self.kv_cache_dtype, self._k_scale
        )
        assert metadata.num_decode_tokens == metadata.num_decodes == 0 < metadata.num_prefills
        if self.kv_cache_dtype != "auto":
            cache = cache.view(torch.float8_e4m3fn)
        self.impl.forward_mha(
            query[:rows], kv_c_normed[:rows], k_pe[:rows], cache, metadata, self._k_scale,
            output=output[:rows], output_scale=None,
        )  # fmt: skip


class Attention(torch.nn.Module):
    """The layer: it hands its arguments to the impl as vLLM's does."""

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None,
        logits_soft_cap=None, per_layer_sliding_window=None, prefix="",
        attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, attn_backend=None,
        kv_cache_dtype="auto", **extra_impl_args,
    ):  # fmt: skip
        super().__init__()
        self.impl = attn_backend.get_impl_cls()(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, per_layer_sliding_window,
            kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name,
            **extra_impl_args,
        )  # fmt: skip
        self.layer_name = prefix
        self.kv_cache = torch.tensor([])
        self._k_scale_float = self._v_scale_float = 1.0

    def run(self, query, key, value, metadata, output, output_scale=None):
        self.impl.forward(
            self, query, key, value, self.kv_cache, metadata, output=output,
            output_scale=output_scale, output_block_scale=None,
        )  # fmt: skip


def _registry(version: str) -> dict[str, Any]:
    """The enum of backends: only newer versions take new members."""

    class AttentionBackendEnum(Enum):
        TRITON_ATTN = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
        CUSTOM = None

    registered = {}

    def add(cls, name, value):
        if name in cls._member_map_:
            raise ValueError(f"Backend {name} already exists")
        member = object.__new__(cls)
        member._name_, member._value_ = name, value
        cls._member_map_[name] = member

    if version != "0.24.0":
        AttentionBackendEnum.register = classmethod(add)

    def register_backend(backend, class_path=None, is_mamba=False):
        if isinstance(backend, str):
            AttentionBackendEnum.register(backend, class_path)
        registered[getattr(backend, "name", backend)] = class_path

    return {
        "AttentionBackendEnum": AttentionBackendEnum,
        "register_backend": register_backend,
        "registered": registered,
    }


def modules(version: str) -> dict[str, ModuleType]:
    """The modules of this version, by name."""
    older = version == "0.24.0"
    config = SimpleNamespace(
        speculative_config=None,
        model_config=SimpleNamespace(use_mla=False, max_model_len=48),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    attention = {
        each.__name__: each
        for each in (
            *(AttentionType, MultipleOf, AttentionBackend, AttentionMetadata, AttentionCGSupport),
            *(CommonAttentionMetadata, AttentionImpl, MLAAttentionImpl),
        )
    }
    attention["AttentionMetadataBuilder"] = CascadeBuilder if older else AttentionMetadataBuilder
    utils = {"get_kv_cache_layout": lambda: "NHD"} if older else {}
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.config": dict.fromkeys(
            ("get_current_vllm_config", "get_current_vllm_config_or_none"), lambda: config
        ),
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.quantization": {},
        "vllm.model_executor.layers.quantization.utils": {},
        "vllm.model_executor.layers.quantization.utils.quant_utils": {
            "kFp8StaticTensorSym": FP8_STATIC,
            "kFp8Dynamic128Sym": FP8_BLOCKS,
            "get_and_maybe_dequant_weights": lambda layer, out_dtype: layer.weight.to(out_dtype),
        },
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": attention,
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": _registry(version),
        "vllm.v1.attention.backends.utils": utils,
    }
    found = {}
    for name, attributes in contents.items():
        module = found[name] = ModuleType(name)
        vars(module).update(attributes, __path__=[])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, module)
    return found


OURS = "attn_dispatch.integrations.vllm.backend"
OUR_MLA = "attn_dispatch.integrations.vllm.mla"


def forget_ours(monkeypatch) -> None:
    """Have the plug-in's modules imported again, over another vLLM."""
    import attn_dispatch.integrations.vllm as package

    for name in (OURS, OUR_MLA):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(package, name.rpartition(".")[2], raising=False)


def install(monkeypatch, version: str) -> dict[str, ModuleType]:
    """Put the modules of this version in sys.modules, and forget the plug-in's own."""
    found = modules(version)
    for name in [each for each in sys.modules if each.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    forget_ours(monkeypatch)
    return found
