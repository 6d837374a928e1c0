"""Whether a call would write memory that it still has to read."""

from __future__ import annotations

import torch

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_view import KVCache, parts_of, storages_of
from attn_dispatch.interface.overlap import overlap

__all__ = ["check_shared_memory", "may_share_memory"]


def may_share_memory(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: KVCache | None,
    output: torch.Tensor | None,
) -> bool:
    """Whether `check_shared_memory` is needed; this is on the hot path.

    On a GPU only the storages of the output and the other tensors are compared: two storages over
    the same memory come only from foreign code. On a CPU they come from NumPy too.
    """
    if not query.is_cuda:
        return _storages_meet(query, key, value, kv_cache, output)
    if output is None:
        return False
    storage = output.untyped_storage().data_ptr()
    return (
        query.untyped_storage().data_ptr() == storage
        or (key is not None and key.untyped_storage().data_ptr() == storage)
        or (value is not None and value.untyped_storage().data_ptr() == storage)
        or (kv_cache is not None and storage in storages_of(kv_cache))
    )


def _storages_meet(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: KVCache | None,
    output: torch.Tensor | None,
) -> bool:
    """Whether any storage that is written reaches into another one of the call."""
    reads = [_extent(each) for each in (query, key, value) if each is not None]
    cache = [] if kv_cache is None else [_extent(part) for part in parts_of(kv_cache)]
    writes = [] if key is None else cache
    if output is not None:
        out = _extent(output)
        if any(out[0] < end and start < out[1] for start, end in (*reads, *cache)):
            return True
    return any(start < end and begin < stop for start, stop in writes for begin, end in reads)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor's storage, and the one after the last."""
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return start, start + storage.nbytes()


def check_shared_memory(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: KVCache | None,
    output: torch.Tensor | None,
) -> None:
    """Check that nothing is written to memory that is still to be read.

    Raises:
        InvalidInputError: it names the two tensors that share memory.
    """
    reads = [("query", query), ("key", key), ("value", value)]
    cache = () if kv_cache is None else parts_of(kv_cache)
    writes = [("output", output)]
    if key is not None:
        writes += [("kv_cache", part) for part in cache]
    if output is not None and any(overlap(output, part) for part in cache):
        raise InvalidInputError("output shares memory with kv_cache. Give it memory of its own.")
    for name, written in writes:
        for read_name, read in reads:
            if written is not None and read is not None and overlap(written, read):
                raise InvalidInputError(
                    f"{name} shares memory with {read_name}, which is read while {name} is "
                    f"written. Give {name} memory of its own."
                )
