"""Checks of a batch, and the lengths and slots that follow from its arguments."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attn_dispatch import environment
from attn_dispatch.arguments import INT32_MAX, as_int, shown
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch_lengths import check_bounds, check_lengths
from attn_dispatch.interface.host_copies import to_device
from attn_dispatch.interface.tensors import INTEGERS, check_dense, wrong_form
from attn_dispatch.interface.types import PlaceholderRange

__all__ = ["slots_of"]


def slots_of(
    query_lens: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """(num_tokens,) int64, the slots of each request's last query_len positions, row by row.

    A row before the first position has slot −1.

    Args:
        query_lens: (num_reqs,) integers on the host.
        seq_lens: (num_reqs,) integers on the host.
        block_table: (num_reqs, max_blocks) int32 or int64, with room for the longest request.
        block_size: tokens per block.

    Raises:
        InvalidInputError: an argument has another type or is out of range, or they contradict each
            other. A table on a device is read only under ATTN_DISPATCH_CHECK=1.
    """
    queries, _ = checked_lengths("query_lens", query_lens)
    seqs, max_seq_len = checked_lengths("seq_lens", seq_lens)
    check_same_requests("query_lens", queries, seqs)
    block_size = as_int("block_size", block_size, 1, INT32_MAX)
    check_table(block_table, len(seqs))
    check_block_ids(block_table, seqs, block_size)
    check_columns(block_table, max_seq_len, block_size)
    return compute_slots(queries, seqs, block_table, block_size)


def compute_slots(
    query_lens: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """The same for checked arguments; the blocks of the new tokens are checked here.

    `seq_lens` may be on the host, or on the table's device.
    """
    requests = torch.arange(len(query_lens), device="cpu").repeat_interleave(query_lens.long())
    ends = torch.cumsum(query_lens, 0).long()
    before_end = torch.arange(len(requests), device="cpu") - ends[requests]
    device = block_table.device
    requests, before_end = to_device(torch.stack([requests, before_end]), device)
    positions = to_device(seq_lens, device, torch.int64)[requests] + before_end
    if not block_table.numel():
        return torch.full_like(positions, -1)
    blocks = block_table[requests, positions.clamp(min=0) // block_size].long()
    if is_readable(blocks) and (missing := (blocks < 0) & (positions >= 0)).any():
        row = int(missing.nonzero()[0])
        raise InvalidInputError(
            f"block_table of request {int(requests[row])} names block {int(blocks[row])} for a new "
            f"token; ids of blocks are 0 to {INT32_MAX}."
        )
    return torch.where(positions < 0, -1, blocks * block_size + positions % block_size)


def checked_lengths(name: str, values: Any) -> tuple[torch.Tensor, int]:
    """(num_reqs,) int32 on the host, and the largest; 0 without requests."""
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        values = list(values)
        if set(map(type, values)) - {int}:
            values = [_length(name, value) for value in values]
        most = max(values, default=0)
        _check_length(name, min(values, default=0), most)
        return torch.tensor(values, dtype=torch.int32, device="cpu"), most
    lengths, most = _lengths_of_array(name, values), 0
    if len(lengths):
        least, most = (int(end) for end in lengths.aminmax())
        _check_length(name, least, most)
    return lengths.to(torch.int32), most


def known_lengths(
    lengths: Any, seq_lens: Any, bounds: Any, device: torch.device
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """What AttentionBatch.create knows of the key counts, by its arguments.

    Returns:
        (num_reqs,) int32 on the host, the key counts or their bounds; the largest; and the true
        counts, with bounds on the device and else the same.
    """
    check_lengths(lengths)
    if (lengths == "upper_bound") != (bounds is not None):
        raise InvalidInputError(
            "lengths='upper_bound' and seq_lens_upper_bound go together: give both, or neither. "
            "seq_lens are the true key counts in either case."
        )
    if bounds is None:
        seqs, longest = checked_lengths("seq_lens", seq_lens)
        return seqs, longest, seqs
    seqs, longest = checked_lengths("seq_lens_upper_bound", bounds)
    wanted = f"a tensor of the true key counts on the device, ({len(seqs)},) int32"
    check_dense("seq_lens", seq_lens, wanted, meta=True)
    if seq_lens.shape != seqs.shape or seq_lens.dtype not in INTEGERS:
        raise wrong_form("seq_lens", seq_lens, wanted)
    return seqs, longest, to_device(seq_lens, device, torch.int32)


def _check_length(name: str, least: int, most: int) -> None:
    if least < 0:
        raise InvalidInputError(f"{name} holds {shown(least)}; lengths are 0 or more.")
    if most > INT32_MAX:
        raise InvalidInputError(f"{name} holds {shown(most)}; a length is at most {INT32_MAX}.")


def _length(name: str, value: Any) -> int:
    """A length that is not a plain int, e.g. a NumPy integer."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor of two integers, too
        raise InvalidInputError(
            f"{name} is not a list of integers, one for each request: it holds {shown(value)}."
        ) from error


def _lengths_of_array(name: str, values: Any) -> torch.Tensor:
    """An array or a tensor as int64 on the host."""
    wanted = "a list of integers, one for each request"
    try:
        lengths = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInputError(f"{name} is a {type(values).__name__}, not {wanted}.") from error
    check_dense(name, lengths, wanted)
    is_other = lengths.is_floating_point() or lengths.is_complex() or lengths.is_quantized
    is_integer = not is_other and lengths.dtype != torch.bool
    if lengths.dim() != 1 or not (is_integer or not len(lengths)):
        raise wrong_form(name, lengths, wanted)
    if lengths.dtype in INTEGERS:
        return lengths.cpu()
    return lengths.to("cpu", torch.int64)  # uint64 beyond int64 becomes negative, and is rejected


def check_same_requests(name: str, lengths: torch.Tensor, seqs: torch.Tensor) -> None:
    if lengths.shape != seqs.shape:
        raise InvalidInputError(
            f"{name} has {len(lengths)} requests and seq_lens {len(seqs)}; give both for the same "
            "requests."
        )


def start_locs(name: str, lengths: torch.Tensor) -> torch.Tensor:
    """(num_reqs + 1,) int32, where each request begins, and where the last one ends."""
    starts = torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0))  # int64
    if int(starts[-1]) > INT32_MAX:
        raise InvalidInputError(
            f"{name} adds up to {int(starts[-1])}; a batch has at most {INT32_MAX} tokens. Split "
            "it into several batches."
        )
    return starts.to(torch.int32)


def check_table(block_table: torch.Tensor, num_reqs: int) -> None:
    """Check the table's shape and dtype."""
    wanted = f"(num_reqs, max_blocks) with num_reqs={num_reqs}, int32 or int64"
    check_dense("block_table", block_table, wanted, meta=True)
    is_integer = block_table.dtype in INTEGERS
    if block_table.dim() != 2 or block_table.shape[0] != num_reqs or not is_integer:
        raise wrong_form("block_table", block_table, wanted)


def check_block_ids(
    block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int | None
) -> None:
    """Check that the ids of blocks that requests use fit int32.

    A table on a device is read only under ATTN_DISPATCH_CHECK=1, because that waits for the device.
    Without a block size all entries count. An id below 0 may be a block that was freed because the
    layers' window has passed it.
    """
    if block_table.dtype == torch.int32 or not block_table.numel() or not is_readable(block_table):
        return
    least, most = (int(end) for end in block_table.aminmax())
    if least >= 0 and most <= INT32_MAX:
        return
    if block_size is not None:
        table, seq_lens = block_table.cpu(), seq_lens.cpu().long()
        first_positions = torch.arange(table.shape[1], device="cpu") * block_size
        used = table[first_positions < seq_lens[:, None]]
        if not len(used):
            return
        least, most = (int(end) for end in used.aminmax())
    if least < -INT32_MAX - 1 or most > INT32_MAX:
        raise InvalidInputError(
            f"block_table names blocks {least} to {most}; ids of blocks are 0 to {INT32_MAX}. Give "
            "the blocks of the layers' caches."
        )


def check_slot_tensor(slots: torch.Tensor) -> None:
    """Check shape and dtype, and the slots where `is_readable`."""
    wanted = "(num_key_tokens,) int64: block * block_size + offset for each new key, or −1"
    check_dense("slot_mapping", slots, wanted, meta=True)
    if slots.dim() != 1 or slots.dtype not in INTEGERS:
        raise wrong_form("slot_mapping", slots, wanted)
    if is_readable(slots) and slots.numel() and int(slots.min()) < -1:
        raise InvalidInputError(
            f"slot_mapping names slots {int(slots.min())} to {int(slots.max())}; slots are 0 or "
            "more, and −1 is padding."
        )


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor's contents may be read: on a GPU that waits for the device."""
    kind = tensor.device.type
    return kind == "cpu" or (kind != "meta" and environment.check_mode())


def check_room(
    block_table: torch.Tensor,
    new: torch.Tensor,
    seqs: torch.Tensor,
    block_size: int,
    *,
    is_query: bool = True,
) -> None:
    """Check that the last positions of each request, those of its new keys, exist and have blocks.

    Args:
        block_table: (num_reqs, max_blocks).
        new: (num_reqs,) how many new keys each request has.
        seqs: (num_reqs,) how many keys, the new ones included.
        block_size: tokens per block.
        is_query: the new keys are those of the new tokens.
    """
    wrong = (seqs < new) & (seqs > 0)
    if wrong.any():
        request, what = int(wrong.nonzero()[0]), "tokens" if is_query else "rows of key"
        raise InvalidInputError(
            f"Request {request} has {int(new[request])} new {what} and {int(seqs[request])} "
            "keys. seq_lens counts the new ones too."
        )
    check_columns(block_table, int(seqs.max()) if len(seqs) else 0, block_size)


def check_columns(block_table: torch.Tensor, longest: int, block_size: int) -> None:
    """Check that the block table has room for the longest request."""
    if longest > block_table.shape[1] * block_size:
        raise InvalidInputError(
            f"block_table has {block_table.shape[1]} blocks of {block_size} tokens for a request, "
            f"and the longest has {longest} keys. Give it {-(-longest // block_size)} columns."
        )


def rows_of(
    requests: list[int], starts: list[int], device: torch.device
) -> tuple[torch.Tensor, list[int]]:
    """The rows of these requests, and the number of each one's rows."""
    lens = [starts[i + 1] - starts[i] for i in requests]
    before = itertools.accumulate(lens, initial=0)
    pairs = zip(requests, before, strict=False)  # the last of `before` is the number of rows
    shifts = torch.tensor([starts[i] - row for i, row in pairs], device="cpu")
    shifts = shifts.repeat_interleave(torch.tensor(lens, device="cpu"))
    return to_device(torch.arange(len(shifts), device="cpu") + shifts, device), lens


def check_placeholders(maps: object, num_reqs: int) -> None:
    """Check that placeholder maps name ranges of positions in the batch's requests."""
    if not isinstance(maps, Mapping):
        raise InvalidInputError(
            f"multi_modal_placeholder_index_maps is a {type(maps).__name__}; give a mapping from "
            "modality to a sequence of PlaceholderRange(request, start, end)."
        )
    for modality, ranges in maps.items():
        is_sequence = isinstance(ranges, Sequence) and not hasattr(ranges, "src")
        if not is_sequence or not all(isinstance(each, PlaceholderRange) for each in ranges):
            raise InvalidInputError(
                f"multi_modal_placeholder_index_maps has a {type(ranges).__name__} for "
                f"{modality!r}; give a sequence of PlaceholderRange(request, start, end), with "
                "positions [start, end) of one request. vLLM's IndexMap does not name the request "
                "of an item, so it cannot be converted."
            )
        for each in ranges:
            if not all(type(number) is int for number in each):
                raise InvalidInputError(
                    f"The {modality!r} range {tuple(each)} has a member that is not an int; give "
                    "PlaceholderRange(request, start, end) as Python integers."
                )
            if not (0 <= each.request < num_reqs and 0 <= each.start <= each.end):
                raise InvalidInputError(
                    f"The {modality!r} range {tuple(each)} fits none of the {num_reqs} "
                    "requests; give (request, start, end) with start <= end."
                )


#: The attributes that are lengths or sums of lengths.
_LENGTHS = (
    "query_start_loc",
    "seq_lens",
    "query_start_loc_cpu",
    "seq_lens_cpu",
    "key_start_loc_cpu",
)
#: The attributes that are integers, and their smallest values.
_COUNTS = {"max_query_len": 0, "max_seq_len": 0, "max_decode_query_len": 1, "block_size": 1,
           "shared_prefix_len": 0}  # fmt: skip


def check_batch(batch: Any) -> None:
    """Check that the attributes of an AttentionBatch agree, without waiting for a device."""
    check_types(batch)
    num_reqs = batch.num_reqs
    starts = {
        "query_start_loc_cpu": batch.query_start_list,
        "key_start_loc_cpu": batch.key_starts,
    }
    for name, values in starts.items():
        if len(values) != num_reqs + 1 or values[0] != 0 or values != sorted(values):
            raise InvalidInputError(
                f"{name} is {values[:8]}; for {num_reqs} requests it takes {num_reqs + 1} "
                "ascending values from 0."
            )
        if values[-1] > INT32_MAX:
            raise InvalidInputError(f"{name} ends at {values[-1]}, which int32 cannot hold.")
    if len(batch.query_start_loc) != num_reqs + 1:
        raise InvalidInputError(
            f"query_start_loc has {len(batch.query_start_loc)} values; for {num_reqs} requests "
            f"it takes {num_reqs + 1}."
        )
    seqs = batch.seq_lens_list
    if len(seqs) != num_reqs or min(seqs, default=0) < 0 or max(seqs, default=0) > INT32_MAX:
        raise InvalidInputError(
            f"seq_lens_cpu is {seqs[:8]}; for {num_reqs} requests it takes as many lengths "
            f"from 0 to {INT32_MAX}."
        )
    for name, lengths in (("max_query_len", batch.query_lens), ("max_seq_len", seqs)):
        if getattr(batch, name) < max(lengths, default=0):
            raise InvalidInputError(
                f"{name} is {getattr(batch, name)}; it must be at least that of the longest "
                f"request, {max(lengths)}."
            )
    for name in ("query_start_loc", "block_table", "slot_mapping", "custom_mask"):
        tensor = getattr(batch, name)
        if tensor is not None and tensor.device != batch.seq_lens.device:
            raise InvalidInputError(
                f"{name} is on {tensor.device}, and seq_lens on {batch.seq_lens.device}. Make "
                "the batch by AttentionBatch.create, with device=."
            )
    if batch.lengths == "upper_bound":
        check_bounds(batch.new_lens, seqs)
        _check_needs_no_lengths(batch)
    mask = batch.custom_mask
    size = 0 if mask is None else batch.mask_starts[-1]
    if mask is not None and (mask.shape != (size,) or mask.dtype != torch.bool):
        wanted = f"({size},) bool: query_len * seq_len values for each request"
        raise wrong_form("custom_mask", mask, wanted)
    slots, num_keys = batch.slot_mapping, batch.key_starts[-1]
    if slots is not None and (slots.dim() != 1 or len(slots) < num_keys):
        wanted = f"int64 of one dimension, a slot for each of {num_keys} new keys"
        raise wrong_form("slot_mapping", slots, wanted, "−1 is for padding.")
    if batch.shared_prefix_len:
        _check_shared_prefix(batch)
    if batch.multi_modal_placeholder_index_maps is not None:
        check_placeholders(batch.multi_modal_placeholder_index_maps, num_reqs)


def _check_shared_prefix(batch: Any) -> None:
    """Check that the prefix is whole blocks, before all new keys, and the same where readable."""
    length, table, size = batch.shared_prefix_len, batch.block_table, batch.block_size
    if table is None or size is None or length % size or batch.key_positions is not None:
        raise InvalidInputError(
            f"shared_prefix_len={length} needs a block_table and its block_size, of which it is a "
            "multiple, and no key_positions. Round it down to whole blocks."
        )
    lens = zip(batch.seq_lens_list, batch.query_lens, strict=True)
    for request, (seq, query) in enumerate(lens):
        if seq - query < length:
            raise InvalidInputError(
                f"shared_prefix_len is {length}, and request {request} has {seq - query} keys "
                "before its new ones. It is the least that all requests share."
            )
    shared = table[:, : length // size]
    if is_readable(shared) and len(shared) and bool((shared != shared[:1]).any()):
        raise InvalidInputError(
            f"shared_prefix_len is {length}, and the first {shared.shape[1]} columns of "
            "block_table differ between requests."
        )


def _check_needs_no_lengths(batch: Any) -> None:
    """Check that a batch with bounds has nothing whose size follows from the true key counts."""
    if batch.custom_mask is not None:
        raise InvalidInputError(
            "The batch has a custom_mask, whose size is that of the true key counts, and "
            "lengths='upper_bound'. Give exact seq_lens to steps with a mask."
        )
    if batch.key_positions is not None:
        raise InvalidInputError(
            "The batch has key_positions, which follow from the true key counts, and "
            "lengths='upper_bound'. Give exact seq_lens to steps with key_positions."
        )
    if batch.block_table is None:
        raise InvalidInputError(
            "Without a block_table the keys are the rows of key, so their counts are known. Make "
            "the batch with lengths='exact', or give it the requests' block_table."
        )


def check_types(batch: Any) -> None:
    """Check the attributes of an AttentionBatch one by one."""
    for name in _LENGTHS:
        tensor = getattr(batch, name)
        if tensor is None and name == "key_start_loc_cpu":
            continue
        check_dense(name, tensor, "an int32 tensor with a value for each request", meta=True)
        if tensor.dim() != 1 or tensor.dtype not in INTEGERS:
            raise wrong_form(name, tensor, "int32 of one dimension")
        if name.endswith("_cpu") and tensor.device.type != "cpu":
            raise InvalidInputError(f"{name} is on {tensor.device}; it must be on the host.")
    if batch.custom_mask is not None:
        check_dense("custom_mask", batch.custom_mask, "a bool tensor of one dimension", meta=True)
    for name, least in _COUNTS.items():
        value = getattr(batch, name)
        if type(value) is not int or not least <= value <= INT32_MAX:
            if value is None and name == "block_size":
                continue
            raise InvalidInputError(
                f"{name}={shown(value)} is not a Python integer from {least} to {INT32_MAX}."
            )
    check_lengths(batch.lengths)
    if type(batch.enable_kv_scales_calculation) is not bool:
        raise InvalidInputError(
            f"enable_kv_scales_calculation={shown(batch.enable_kv_scales_calculation)} is not "
            "True or False."
        )
