"""Every name of SGLang that the plug-in uses, as SGLang 0.5.23 has them.

The contract test looks each of them up in the released package; `test_sglang.py` compares the lists
with what the plug-in's files read. None of the names begins with an underscore.
"""

from __future__ import annotations

__all__ = ["ATTRIBUTES", "IMPORTED", "SIGNATURES", "TEXTS"]

#: What the plug-in imports, in its module `names`: name -> module.
IMPORTED = {
    "AttentionBackend": "sglang.srt.layers.attention.base_attn_backend",
    "RadixAttention": "sglang.srt.layers.radix_attention",
    "register_attention_backend": "sglang.srt.layers.attention.attention_registry",
    "ATTENTION_BACKEND_CHOICES": "sglang.srt.arg_groups.choices",
    "get_parallel": "sglang.srt.runtime_context",
}

_CALL = ("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "**kwargs")

#: What SGLang calls on the plug-in, and the plug-in on SGLang: (module, function) -> parameters.
SIGNATURES = {
    (IMPORTED["AttentionBackend"], "AttentionBackend.forward_decode"): _CALL,
    (IMPORTED["AttentionBackend"], "AttentionBackend.forward_extend"): _CALL,
    (IMPORTED["AttentionBackend"], "AttentionBackend.init_forward_metadata"): ("forward_batch",),
    (IMPORTED["AttentionBackend"], "AttentionBackend.init_forward_metadata_out_graph"): (
        "forward_batch",
        "in_capture",
    ),
    (IMPORTED["AttentionBackend"], "AttentionBackend.init_cuda_graph_state"): (
        "max_bs",
        "max_num_tokens",
    ),
    (IMPORTED["AttentionBackend"], "AttentionBackend.get_cuda_graph_seq_len_fill_value"): (),
    (IMPORTED["register_attention_backend"], "register_attention_backend"): ("name",),
    (IMPORTED["get_parallel"], "get_parallel"): (),
    ("sglang.srt.mem_cache.memory_pool", "MHATokenToKVPool.get_kv_buffer"): ("layer_id",),
    ("sglang.srt.mem_cache.swa_memory_pool", "SWAKVPool.get_kv_buffer"): ("layer_id",),
    ("sglang.srt.mem_cache.swa_memory_pool", "SWAKVPool.translate_loc_from_full_to_swa"): (
        "kv_indices",
    ),
    ("sglang.srt.speculative.spec_info", "SpeculativeAlgorithm.is_none"): (),
    ("sglang.srt.model_executor.forward_batch_info", "ForwardMode.is_decode"): (),
    ("sglang.srt.model_executor.forward_batch_info", "ForwardMode.is_idle"): (),
}

#: What is read: (module, class) -> attributes, and members of enums.
ATTRIBUTES = {
    (IMPORTED["AttentionBackend"], "AttentionBackend"): ("forward_metadata", "needs_cpu_seq_lens"),
    ("sglang.srt.model_executor.model_runner", "ModelRunner"): (
        "attention_chunk_size",
        "dtype",
        "kv_cache_dtype",
        "kv_index_translator",
        "model",
        "model_config",
        "page_size",
        "prefill_aware_swa",
        "req_to_token_pool",
        "spec_algorithm",
        "token_to_kv_pool",
        "use_mla_backend",
    ),
    ("sglang.srt.models.gemma3_mm", "Gemma3ForConditionalGeneration"): ("prepare_attn_masks",),
    ("sglang.srt.models.gemma4_mm", "Gemma4ForConditionalGeneration"): ("prepare_attn_masks",),
    ("sglang.srt.configs.model_config", "ModelConfig"): ("is_encoder_decoder",),
    ("sglang.srt.mem_cache.kv_index_translator", "KVIndexTranslator"): ("is_translating",),
    ("sglang.srt.mem_cache.memory_pool", "ReqToTokenPool"): ("req_to_token",),
    ("sglang.srt.mem_cache.memory_pool", "MHATokenToKVPool"): (
        "get_kv_buffer",
        "is_quantized_kv_cache",
    ),
    ("sglang.srt.mem_cache.swa_memory_pool", "SWAKVPool"): (
        "full_kv_pool",
        "get_kv_buffer",
        "layers_mapping",
        "swa_kv_pool",
        "translate_loc_from_full_to_swa",
    ),
    ("sglang.srt.layers.radix_attention", "RadixAttention"): (
        "attn_type",
        "is_cross_attention",
        "k_scale_float",
        "layer_id",
        "logit_cap",
        "logit_capping_method",
        "pos_encoding_mode",
        "qk_head_dim",
        "scaling",
        "sliding_window_size",
        "tp_k_head_num",
        "tp_q_head_num",
        "use_irope",
        "v_head_dim",
        "v_scale_float",
        "xai_temperature_len",
    ),
    ("sglang.srt.layers.radix_attention", "AttentionType"): (
        "DECODER",
        "DECODER_BIDIRECTIONAL",
        "ENCODER_ONLY",
    ),
    ("sglang.srt.model_executor.forward_batch_info", "ForwardMode"): (
        "DECODE",
        "EXTEND",
        "IDLE",
        "MIXED",
    ),
    ("sglang.srt.model_executor.forward_batch_info", "ForwardBatch"): (
        "attn_cp_metadata",
        "attn_dcp_metadata",
        "batch_size",
        "cross_attention_custom_mask",
        "extend_seq_lens_cpu",
        "forward_mode",
        "multi_item_delimiter_indices",
        "out_cache_loc",
        "req_pool_indices",
        "seq_lens_cpu",
        "spec_info",
    ),
    # A base of ForwardBatch.
    (
        "sglang.srt.model_executor.forward_batch_deepseek_mha_mixin",
        "ForwardBatchDeepSeekMHAMixin",
    ): ("mha_return_lse",),
}

#: Names that are attributes of no class: name -> (a module of SGLang's that uses it, how).
TEXTS = {
    # The view that a decode graph is replayed with is no ForwardBatch.
    "num_padding": (
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
        "num_padding=bs - raw_bs",
    ),
    "dcp_enabled": ("sglang.srt.model_executor.model_runner", "get_parallel().dcp_enabled"),
    "enable_prefill_cp": (
        "sglang.srt.model_executor.model_runner_components.cuda_graph_setup",
        "get_parallel().enable_prefill_cp",
    ),
    "sglang.srt.plugins": (
        "sglang.srt.plugins",
        'GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"',
    ),
}
