"""The checks of a call before it writes anything.

Shapes, dtypes, devices and shared memory are checked on every call, without waiting for the device.
Contents (block ids, slots, lengths) are checked on a CPU; on another device only under
ATTN_DISPATCH_CHECK=1, because reading them waits for the device.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from attn_dispatch import environment
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.batch_checks import check_columns
from attn_dispatch.interface.contents import OVER_STATIC_BUFFERS, check_batch_contents
from attn_dispatch.interface.kv_view import (
    KVCache,
    KVCacheView,
    check_kv_cache,
    fits_heads,
    form_of,
    kv_strides_of,
    parts_of,
)
from attn_dispatch.interface.outputs import check_output, profiling_output
from attn_dispatch.interface.overlap import check_no_inference, overlaps_itself
from attn_dispatch.interface.quantization import (
    has_token_scales,
    is_fp8,
    kv_cache_torch_dtype,
    stored_head_size,
)
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.shared_memory import check_shared_memory, may_share_memory
from attn_dispatch.interface.spec import IMPL_FIELDS, AttentionSpec
from attn_dispatch.interface.tensors import check_dense, wrong_form
from attn_dispatch.platforms.detect import detect_device

if TYPE_CHECKING:
    from attn_dispatch.interface.batch import AttentionBatch
    from attn_dispatch.interface.impl import AttentionImpl
    from attn_dispatch.interface.metadata import AttentionMetadata

__all__ = [
    "check_block_size",
    "check_block_table",
    "check_cache_tensor",
    "check_forward",
    "check_int32",
    "check_metadata",
    "check_no_grad",
    "check_no_transform",
    "check_output",
    "check_slot_mapping",
    "check_tensors",
    "profiling_output",
]


#: None outside of torch.func's transforms.
_functorch_level = torch._C._functorch.peek_interpreter_stack


def check_forward(
    impl: AttentionImpl[Any],
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: KVCache | None,
    batch: AttentionBatch,
    output: torch.Tensor | None = None,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
) -> None:
    """Check the arguments of AttentionImpl.forward against the layer and the batch.

    What passed for one layer of a batch is not checked again for other layers with the same shape.

    Raises:
        InvalidInputError: an argument does not fit.
    """
    if torch.is_grad_enabled():
        check_no_grad(query, key, value, kv_cache, output, impl.sinks, impl.alibi_slopes)
    if forward_ad._current_level >= 0 or _functorch_level() is not None:
        check_no_transform(query, key, value)
    try:
        signature = (  # no loop: this is on every layer's call
            impl.__dict__.get("_checked_as") or _checked_as(impl),
            _form(query),
            None if key is None else _form(key),
            None if value is None else _form(value),
            None if kv_cache is None else form_of(kv_cache),
            None if output is None else (_form(output), output.stride()),
            None if output_scale is None else _form(output_scale),
            None if output_block_scale is None else _form(output_block_scale),
        )
    except (AttributeError, RuntimeError):  # lists, sparse tensors
        _check_tensors_of_call(
            query, key, value, kv_cache, output, output_scale, output_block_scale
        )
        raise
    if signature not in batch.checked:
        _check_forms(
            impl, query, key, value, kv_cache, batch, output, output_scale, output_block_scale
        )
        batch.checked.add(signature)
    if not torch.is_inference_mode_enabled() and (
        (output is not None and output.is_inference())
        or (kv_cache is not None and key is not None and parts_of(kv_cache)[-1].is_inference())
    ):
        check_no_inference(
            kv_cache=None if key is None or kv_cache is None else parts_of(kv_cache)[-1],
            output=output,
        )
    if may_share_memory(query, key, value, kv_cache, output):
        check_shared_memory(query, key, value, kv_cache, output)
    if environment.check_mode() or query.device.type == "cpu":
        check_batch_contents(batch, kv_cache, Reach.of(impl))


def check_tensors(**tensors: Any) -> None:
    """Check that each argument is a strided tensor with data, or None.

    Raises:
        InvalidInputError: names the first that is not.
    """
    for name, tensor in tensors.items():
        if tensor is not None:  # the others must be on the query's device
            check_dense(name, tensor, meta=name != "query")


def _check_tensors_of_call(
    query: Any,
    key: Any,
    value: Any,
    kv_cache: Any,
    output: Any,
    output_scale: Any,
    block_scale: Any,
) -> None:
    check_tensors(query=query, key=key, value=value)
    if kv_cache is not None:
        check_kv_cache("kv_cache", kv_cache, meta=True)
    check_tensors(output=output, output_scale=output_scale, output_block_scale=block_scale)


_shape_of_layer = operator.attrgetter(
    "num_heads", "num_kv_heads", "head_size", "head_size_v", "kv_cache_dtype", "attn_type"
)


def _checked_as(impl: AttentionImpl[Any]) -> str:
    """What the checks below read of an impl; kept there as a string, which is hashed once."""
    name = repr((_shape_of_layer(impl), impl.kv_sharing_target_layer_name is None))
    impl.__dict__["_checked_as"] = name
    return name


#: What the checks below read of a tensor; of a cache also the strides.
_form = operator.attrgetter("shape", "dtype", "device")


def _check_forms(
    impl: AttentionImpl[Any],
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: KVCache | None,
    batch: AttentionBatch,
    output: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
) -> None:
    _check_tensors_of_call(query, key, value, kv_cache, output, output_scale, output_block_scale)
    _check_rows("query", query, (impl.num_heads, impl.head_size), query)
    if query.shape[0] < batch.num_tokens:
        raise InvalidInputError(
            f"query has {query.shape[0]} rows, and the batch has {batch.num_tokens} new tokens. "
            "Build the metadata from the batch that the query belongs to."
        )
    if (key is None) != (value is None):
        raise InvalidInputError("key and value go together: give both, or None for both.")
    if key is not None and value is not None:
        _check_rows("key", key, (impl.num_kv_heads, impl.head_size), query)
        _check_rows("value", value, (impl.num_kv_heads, impl.head_size_v), query)
        if len(key) != len(value) or len(key) < batch.key_starts[-1]:
            raise InvalidInputError(
                f"key has {len(key)} rows, value {len(value)}, and the batch brings "
                f"{batch.key_starts[-1]} new keys. Give a row for each."
            )
    if kv_cache is None:
        _check_without_cache(impl, key, batch)
    else:
        _check_with_cache(impl, query, key, kv_cache, batch)
    shape = (query.shape[0], impl.num_heads, impl.head_size_v)
    check_output(shape, query, output, output_scale, output_block_scale)


def check_no_grad(*values: object) -> None:
    """Check that autograd does not record these values.

    Raises:
        InvalidInputError: autograd is recording one of these tensors.
    """
    if torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in values):
        raise InvalidInputError(
            "attn-dispatch computes attention for inference, and autograd is recording this call. "
            "Call the model inside of torch.inference_mode() or torch.no_grad()."
        )


def check_no_transform(*values: object) -> None:
    """Check that no transform of torch.func is active and no value carries a forward-mode tangent.

    torch.compile cannot trace this.

    Raises:
        InvalidInputError: one is, or does.
    """
    if forward_ad._current_level >= 0 and any(
        isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in values
    ):
        raise InvalidInputError(
            "attn-dispatch computes attention for inference, and a tensor of this call carries a "
            "tangent of forward-mode differentiation. Pass its primal value."
        )
    if _functorch_level() is not None:
        raise InvalidInputError(
            "attn-dispatch does not support the transforms of torch.func (vmap, grad, jvp). Call "
            "it outside of them."
        )


def _check_rows(
    name: str, tensor: torch.Tensor, heads: tuple[int, int], query: torch.Tensor
) -> None:
    if tensor.dim() != 3 or tensor.shape[1:] != heads:
        raise wrong_form(name, tensor, f"(num_tokens, {heads[0]}, {heads[1]}) for this layer")
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise wrong_form(name, tensor, f"{query.dtype} on {query.device}, as query is")
    if not tensor.dtype.is_floating_point:
        raise InvalidInputError(f"{name} is {tensor.dtype}; attention needs floating point.")


def _check_without_cache(
    impl: AttentionImpl[Any],
    key: torch.Tensor | None,
    batch: AttentionBatch,
) -> None:
    if impl.kv_sharing_target_layer_name is not None:
        raise InvalidInputError(
            f"The layer reads the cache of {impl.kv_sharing_target_layer_name!r}, and kv_cache is "
            "None. Bind that layer's cache to it."
        )
    if key is None:
        raise InvalidInputError("Without a kv_cache the keys must be given; key is None.")
    if batch.lengths == "upper_bound":
        raise InvalidInputError(
            "The batch has only upper bounds of its key counts, and kv_cache is None, so that a "
            "request's keys are its rows of key. Make the batch with lengths='exact'."
        )
    starts = batch.key_starts
    key_lens = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    if key_lens != batch.seq_lens_list:
        raise InvalidInputError(
            f"Without a kv_cache a request's keys are its rows of key, {key_lens[:8]}; seq_lens "
            f"is {batch.seq_lens_list[:8]}. Give the kv_cache that holds the earlier ones."
        )


def _check_with_cache(
    impl: AttentionImpl[Any],
    query: torch.Tensor,
    key: torch.Tensor | None,
    kv_cache: KVCache,
    batch: AttentionBatch,
) -> None:
    if not impl.attn_type.has_kv_cache:
        raise InvalidInputError(f"{impl.attn_type} attention has no kv_cache; give None.")
    size = max(impl.head_size, impl.head_size_v)
    sizes = [stored_head_size(impl.kv_cache_dtype, n) for n in (impl.head_size, impl.head_size_v)]
    stored, found = max(sizes), tuple(kv_cache.shape)
    is_cache = len(found) == 5 and (found[1], found[3]) == (2, impl.num_kv_heads)
    if not is_cache or not fits_heads(kv_cache, *sizes):
        scaled = "" if stored == size else f": {size} elements, filled up to 16s, and their scale"
        raise InvalidInputError(
            f"kv_cache has shape {found}; the layer takes "
            f"(num_blocks, 2, block_size, {impl.num_kv_heads}, {stored}){scaled}."
        )
    check_cache_tensor(impl.kv_cache_dtype, query, kv_cache)
    _check_strides(impl, query.dtype, kv_cache)
    check_block_size(batch, found[2])
    check_block_table(batch, found[2], query.device)
    if key is not None and impl.kv_sharing_target_layer_name is None:
        check_slot_mapping(batch, len(key), query.device)


def check_cache_tensor(kv_cache_dtype: str, query: torch.Tensor, kv_cache: KVCache) -> None:
    """Check the device and element type of a cache, and that the scales in it can be read."""
    dtype = kv_cache_torch_dtype(kv_cache_dtype, query.dtype)
    either = kv_cache_dtype == "fp8" and is_fp8(kv_cache.dtype)
    if (kv_cache.dtype != dtype and not either) or kv_cache.device != query.device:
        wanted = f"{dtype} on {query.device}, as the layer's kv_cache_dtype={kv_cache_dtype!r}"
        raise wrong_form("kv_cache", kv_cache, wanted)
    if not isinstance(kv_cache, KVCacheView) and overlaps_itself(kv_cache):
        raise InvalidInputError(
            f"kv_cache overlaps itself: shape {tuple(kv_cache.shape)}, strides "
            f"{kv_cache.stride()}. Each slot needs memory of its own; make the cache by "
            "allocate_kv_cache."
        )
    for part in parts_of(kv_cache) if has_token_scales(kv_cache.dtype) else ():
        if not _is_aligned(part):
            raise InvalidInputError(
                f"kv_cache has strides {part.stride()} from byte {part.storage_offset()} on. "
                "The float32 scales in an int8 cache need dense rows that start at multiples of 4 "
                "bytes. Make the cache by allocate_kv_cache."
            )


def _check_strides(impl: AttentionImpl[Any], dtype: torch.dtype, kv_cache: KVCache) -> None:
    """Check that the backend declares a cache with these strides."""
    if impl.backend_cls is None or (strides := kv_strides_of(kv_cache)) is None:
        return
    allowed = impl.backend_cls.capabilities.fields.get("kv_strides")
    fields = {name: getattr(impl, name) for name in IMPL_FIELDS}
    spec = AttentionSpec(**fields, dtype=dtype, block_size=kv_cache.shape[2], kv_strides=strides)
    device = detect_device(kv_cache.device)
    if allowed is None or not allowed.accepts(strides, spec, device):
        takes = "the library's own layouts" if allowed is None else allowed.describe(device)
        raise UnsupportedError(
            f"{impl.backend_cls.get_name()} does not read this kv_cache, {strides}; it takes "
            f"{takes}. Bind the cache by bind_kv_caches, or make the layer with "
            "kv_strides=kv_strides_of(kv_cache), so that a backend is picked that does."
        )


def _is_aligned(int8_cache: torch.Tensor) -> bool:
    """Whether each row is one piece that float32 can be read from."""
    *steps, last = int8_cache.stride()
    return last == 1 and not any(step % 4 for step in (*steps, int8_cache.storage_offset()))


def check_block_size(batch: AttentionBatch, block_size: int) -> None:
    """Check that the batch was made for the cache's block size."""
    if batch.block_size not in (None, block_size):
        raise InvalidInputError(
            f"The batch was made for blocks of {batch.block_size} tokens, and kv_cache has blocks "
            f"of {block_size}. Make the batch with block_size={block_size}."
        )


def check_block_table(batch: AttentionBatch, block_size: int, device: torch.device) -> None:
    """Check that the batch has a block table on this device, with room for the longest request."""
    table = batch.block_table
    if table is None:
        raise InvalidInputError(
            "The batch has no block_table, and the layer has a kv_cache. Give "
            "AttentionBatch.create the requests' block_table."
        )
    if batch.lengths == "exact":
        # A graph is captured for lengths up to max_seq_len; else that may be a loose bound.
        is_static = OVER_STATIC_BUFFERS in batch.checked
        longest = batch.max_seq_len if is_static else max(batch.seq_lens_list, default=0)
        check_columns(table, longest, block_size)
    _check_device("block_table", table, device)


def check_slot_mapping(batch: AttentionBatch, num_keys: int, device: torch.device) -> None:
    """Check that there is a slot for each new key."""
    slots, least = batch.slot_mapping, batch.key_starts[-1]
    if slots is None:
        raise InvalidInputError(
            f"The batch has no slot_mapping for {least} new keys. Give AttentionBatch.create one."
        )
    if slots.dim() != 1 or slots.dtype != torch.int64 or not least <= len(slots) <= num_keys:
        wanted = f"int64, with a slot for each of {least} new keys and at most {num_keys}"
        raise wrong_form("slot_mapping", slots, wanted, "−1 is for padding.")
    _check_device("slot_mapping", slots, device)


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InvalidInputError(
            f"{name} is on {tensor.device}, and query on {device}. Make the batch with "
            f"device={str(device)!r}."
        )


#: What an impl and the spec of its metadata must have in common.
_in_common = operator.attrgetter(*IMPL_FIELDS)


def check_metadata(impl: AttentionImpl[Any], metadata: AttentionMetadata, wanted: type) -> None:
    """Check that metadata comes from the backend's own builder, made for layers like this one."""
    if not isinstance(metadata, wanted):
        raise InvalidInputError(
            f"attn_metadata is a {type(metadata).__name__}; this backend takes the "
            f"{wanted.__name__} of its own builder (layer.build_metadata makes the right one)."
        )
    spec = metadata.builder.spec  # type: ignore[attr-defined]
    # Where no visible key is later than its query, both kinds of ALiBi are the same.
    is_one_sided = impl.causal and not spec.bidirectional_ranges
    given = (
        bool(impl.alibi) if is_one_sided else impl.alibi,
        impl.sinks is not None,
        impl.kv_sharing_target_layer_name is not None,
    )
    if _in_common(spec) == _in_common(impl) and (spec.alibi, spec.sinks, spec.kv_sharing) == given:
        return
    pairs = [
        *zip(IMPL_FIELDS, _in_common(spec), _in_common(impl), strict=True),
        ("alibi", spec.alibi, given[0]),
        ("sinks", spec.sinks, given[1]),
        ("kv_sharing", spec.kv_sharing, given[2]),
    ]
    field, theirs, mine = next(pair for pair in pairs if pair[1] != pair[2])
    raise InvalidInputError(
        f"attn_metadata was built for layers with {field}={theirs}, and this layer has {mine}. "
        "Build the metadata from the layer's own spec; layer.build_metadata does."
    )


def check_int32(batch: AttentionBatch) -> None:
    """Check that kernels can read the batch's lengths and blocks.

    Raises:
        InvalidInputError: a tensor has another dtype, or gaps.
    """
    for name in ("query_start_loc", "seq_lens", "block_table"):
        tensor = getattr(batch, name)
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.stride(-1) != 1):
            raise InvalidInputError(
                f"{name} is {tensor.dtype} with strides {tensor.stride()}; it must be contiguous "
                "torch.int32. Make the batch by AttentionBatch.create."
            )
