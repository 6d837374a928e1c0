"""The positions of a batch's keys where these are only some of each request's.

Decode context parallelism shards a cache over GPUs by tokens: of W GPUs, number r holds the keys at
positions r, r + W, r + 2 W and so on. Each computes attention over its own keys, with the
log-sum-exp, and `merge_states` merges the parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.arguments import INT32_MAX, as_int
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch_checks import check_same_requests, checked_lengths
from attn_dispatch.interface.tensors import INTEGERS

__all__ = ["KeyPositions"]


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyPositions:
    """Key j of each request is at position offset + step * j of the request.

    Causal masks, windows, chunks and ALiBi use positions, and queries align to the end of the
    request, whatever keys are here: query i of query_len has position seq_len - query_len + i, with
    the seq_len of this record. The batch's own seq_lens count the keys that are here.

    Attributes:
        offset: of the first key, 0 or more.
        step: from one key to the next, 1 or more.
        seq_lens: (num_reqs,) int32 on the batch's device, keys of each request on all GPUs, the new
            ones included.
        seq_lens_cpu: host copy.
    """

    offset: int
    step: int
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor

    @classmethod
    def create(
        cls,
        seq_lens: Sequence[int] | torch.Tensor,
        *,
        offset: int,
        step: int,
        device: torch.device | str = "cpu",
    ) -> KeyPositions:
        """The record for requests of these lengths on all GPUs.

        Raises:
            InvalidInputError: an argument has another type or is out of range.
        """
        lengths, _ = checked_lengths("seq_lens of key_positions", seq_lens)
        return cls(
            offset=as_int("offset", offset, 0, INT32_MAX),
            step=as_int("step", step, 1, INT32_MAX),
            seq_lens=lengths.to(device),
            seq_lens_cpu=lengths,
        )

    def keys_before(self, position: int) -> int:
        """How many keys have a smaller position than this one."""
        return max(0, -(-(position - self.offset) // self.step))

    def local_seq_lens(self) -> list[int]:
        """The batch's seq_lens if every key at these positions is here."""
        return [self.keys_before(length) for length in self.seq_lens_cpu.tolist()]

    def to(self, device: torch.device) -> KeyPositions:
        """The same with seq_lens on this device."""
        if self.seq_lens.device == device:
            return self
        return dataclasses.replace(self, seq_lens=self.seq_lens_cpu.to(device))

    def select(self, requests: list[int]) -> KeyPositions:
        """Those of these requests."""
        index = torch.tensor(requests, dtype=torch.int64, device="cpu")
        lengths = self.seq_lens_cpu[index]
        return dataclasses.replace(
            self, seq_lens=lengths.to(self.seq_lens.device), seq_lens_cpu=lengths
        )

    def between(self, first: int, end: int) -> KeyPositions:
        """Those of the requests [first, end); nothing is copied from the host."""
        return dataclasses.replace(
            self,
            seq_lens=self.seq_lens[first:end].clone(),  # aligned, as kernels expect
            seq_lens_cpu=self.seq_lens_cpu[first:end],
        )


def check_key_positions(positions: Any, batch: Any) -> None:
    """Check that a batch's key positions fit its keys, without waiting for a device.

    Raises:
        InvalidInputError: they do not, or are no KeyPositions.
    """
    if not isinstance(positions, KeyPositions):
        raise InvalidInputError(
            f"key_positions is a {type(positions).__name__}. Make it by KeyPositions.create."
        )
    if positions.seq_lens_cpu.device.type != "cpu":
        raise InvalidInputError(
            f"seq_lens_cpu of key_positions is on {positions.seq_lens_cpu.device}; it must be on "
            "the host."
        )
    as_int("offset of key_positions", positions.offset, 0, INT32_MAX)
    as_int("step of key_positions", positions.step, 1, INT32_MAX)
    lengths = positions.seq_lens_cpu
    check_same_requests("seq_lens of key_positions", lengths, batch.seq_lens_cpu)
    device = batch.seq_lens.device
    tensor = positions.seq_lens
    if (tensor.shape, tensor.device) != (batch.seq_lens.shape, device) or (
        tensor.dtype not in INTEGERS
    ):
        raise InvalidInputError(
            f"seq_lens of key_positions is {tuple(tensor.shape)} {tensor.dtype} on "
            f"{tensor.device}; it must be {tuple(batch.seq_lens.shape)} int32 on {device}. Make "
            "key_positions by KeyPositions.create, with the batch's device."
        )
    for request, (keys, length) in enumerate(
        zip(batch.seq_lens_list, lengths.tolist(), strict=True)
    ):
        if keys > positions.keys_before(length):
            raise InvalidInputError(
                f"Request {request} has {keys} keys, the last at position "
                f"{positions.offset + positions.step * (keys - 1)}, and {length} keys on all "
                "GPUs. seq_lens counts the keys that are here, seq_lens of key_positions all."
            )
