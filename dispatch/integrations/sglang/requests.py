"""SGLang's words for a server, a layer and a step as ours: each field is mapped or rejected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attn_dispatch import engines
from attn_dispatch.integrations.sglang.names import RadixAttention, get_parallel
from attn_dispatch.integrations.sglang.plugin import PLUGIN

__all__ = ["attention_of", "batch_of", "check_runner", "check_step", "follow_pool", "radix_layers"]

#: The pool of keys and values whose slots this plug-in reads, and the one that has two of them.
PLAIN_POOL, POOL_OF_TWO = "MHATokenToKVPool", "SWAKVPool"

#: Where models keep the sinks of their layers: an attribute of the module that has the layer.
SINKS = ("sinks", "attention_sink_bias")

#: Kinds of layer that are computed, and kinds of step that are served, by the names of ForwardMode.
KINDS, MODES = ("decoder", "encoder_only"), ("DECODE", "EXTEND", "MIXED")

#: What a step can have that no layer here is given: it would be ignored, so it is rejected.
NOT_READ = (
    *("spec_info", "multi_item_delimiter_indices", "cross_attention_custom_mask"),
    *("attn_cp_metadata", "attn_dcp_metadata"),
)


def check_runner(runner: Any) -> None:
    """Reject models and options of the server that this plug-in does not serve.

    Raises:
        UnsupportedError: with every reason.
    """
    parallel, pool = get_parallel(), runner.token_to_kv_pool
    is_pair = type(pool).__name__ == POOL_OF_TWO
    pools = (pool.full_kv_pool, pool.swa_kv_pool) if is_pair else (pool,)
    others = [kind for each in pools if (kind := type(each).__name__) != PLAIN_POOL]
    is_copied = not others and any(each.is_quantized_kv_cache for each in pools)
    cache_dtype = engines.kv_cache_dtype_name(runner.kv_cache_dtype, runner.dtype)
    asked = {
        "latent attention (MLA)": runner.use_mla_backend,
        "cross-attention, which begins inside of pages": runner.model_config.is_encoder_decoder,
        "speculative decoding, with tree masks": not runner.spec_algorithm.is_none(),
        "a unified memory pool, whose slots are virtual": runner.kv_index_translator.is_translating,
        # The model gives its masks to some backends of SGLang only.
        "images that see each other both ways": hasattr(runner.model, "prepare_attn_masks"),
        "windows that depend on the length of the prompt": runner.prefill_aware_swa,
        "decode context parallelism": parallel.dcp_enabled,
        "prefill context parallelism": parallel.enable_prefill_cp,
        f"a KV cache that is a {', '.join(others)}, not a {PLAIN_POOL}": bool(others),
        "a KV cache that is quantized in blocks": is_copied,
        f"a KV cache of {runner.kv_cache_dtype}": cache_dtype is None,
    }
    PLUGIN.reject(asked, "this server")


def radix_layers(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(name, RadixAttention, its sinks or None) of each attention layer of a model."""
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if isinstance(layer, RadixAttention):
            parent = modules[name.rpartition(".")[0]]
            found = (getattr(parent, each, None) for each in SINKS)
            yield name, layer, next((s for s in found if isinstance(s, torch.Tensor)), None)


def attention_of(name: str, layer: Any, runner: Any, sinks: Any) -> engines.EngineAttention:
    """The layer of this library that computes what a RadixAttention does, over its pool.

    Args:
        name: of the layer in the model.
        layer: the RadixAttention.
        runner: SGLang's ModelRunner.
        sinks: (num_heads,), or None.

    Raises:
        UnsupportedError: the layer has what this library, or every backend, lacks.
    """
    kind, window, has_cap = layer.attn_type.value, layer.sliding_window_size, layer.logit_cap > 0
    method, positions = layer.logit_capping_method, layer.pos_encoding_mode
    asked = {
        "cross-attention": layer.is_cross_attention,
        f"attn_type={kind!r}": kind not in KINDS,
        f"pos_encoding_mode={positions!r}": positions != "NONE",
        f"logit_capping_method={method!r}": has_cap and method != "tanh",
        f"xai_temperature_len={layer.xai_temperature_len}": layer.xai_temperature_len > 0,
    }
    PLUGIN.reject(asked, f"layer {name!r}")
    cache_dtype = engines.kv_cache_dtype_name(runner.kv_cache_dtype, runner.dtype)
    pools = getattr(runner.token_to_kv_pool, "layers_mapping", {})
    attention = engines.EngineAttention(
        group=pools.get(layer.layer_id, (0, False))[1],  # whether it is in the pool for windows
        num_heads=layer.tp_q_head_num,
        num_kv_heads=layer.tp_k_head_num,
        head_size=layer.qk_head_dim,
        head_size_v=layer.v_head_dim,
        scale=layer.scaling,
        dtype=runner.dtype,
        kv_cache_dtype=cache_dtype if kind == "decoder" else "auto",
        block_size=runner.page_size,
        attn_type=kind,
        # SGLang counts the tokens before the query's own.
        sliding_window=window + 1 if window is not None and window > -1 else None,
        attention_chunk=runner.attention_chunk_size if layer.use_irope else None,
        logits_soft_cap=layer.logit_cap if has_cap else None,
        sinks=sinks,
        prefix=name,
        device=runner.req_to_token_pool.req_to_token.device,
    )
    follow_pool(attention, layer, runner)
    return attention


def follow_pool(attention: engines.EngineAttention, layer: Any, runner: Any) -> None:
    """Use the keys and values that the layer has now in SGLang's pool, and its scales.

    Where the server restores caches layer by layer, this waits for the layer's.
    """
    pair, size = runner.token_to_kv_pool.get_kv_buffer(layer.layer_id), runner.page_size
    scales = (layer.k_scale_float, layer.v_scale_float)
    attention.follow(pair, lambda p: engines.kv_cache_from_sglang(p[0], p[1], size), scales)


def check_step(forward_batch: Any) -> None:
    """Reject a step that has what the plug-in does not read.

    Raises:
        UnsupportedError: it names the field, or the kind of step.
    """
    mode = forward_batch.forward_mode.name
    asked = {name: getattr(forward_batch, name, None) for name in NOT_READ}
    kind = f"a step of the kind {mode}, which is none of {', '.join(MODES)}"
    PLUGIN.reject({kind: mode not in MODES, **asked})


def batch_of(
    forward_batch: Any, num_reqs: int, runner: Any, is_in_window_pool: Any
) -> engines.AttentionBatch:
    """The first requests of a step, over the pool of one group of layers.

    Args:
        forward_batch: the step.
        num_reqs: requests; the others only pad a graph's batch.
        runner: SGLang's ModelRunner.
        is_in_window_pool: of the layers, if windows have a pool of their own.
    """
    is_decode, pool = forward_batch.forward_mode.is_decode(), runner.token_to_kv_pool
    return engines.slot_table_batch(
        [1] * num_reqs if is_decode else list(forward_batch.extend_seq_lens_cpu),
        forward_batch.seq_lens_cpu[:num_reqs].tolist(),
        slot_table=runner.req_to_token_pool.req_to_token,
        rows=forward_batch.req_pool_indices[:num_reqs],
        new_slots=forward_batch.out_cache_loc,
        page_size=runner.page_size,
        first_slot=runner.page_size,  # page 0 takes what padding writes
        translate=pool.translate_loc_from_full_to_swa if is_in_window_pool else None,
    )
