"""The collectives of a process group that attention uses.

If another rank raises, exits or is killed, a collective raises after the group's timeout at the
latest, which is an argument of `init_process_group`. With gloo it raises when the other process
ends. BackendFailure is raised then, so that no rank goes on with another backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.runtime.guard import FinalFailure

__all__ = ["Ranks"]

T = TypeVar("T")

# PyTorch 2.13 renamed these two.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)


class Ranks:
    """The ranks of a process group, and this one's number among them.

    Args:
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks.

    Raises:
        InvalidInputError: it is none of these, torch.distributed is not set up, or this process is
            not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidInputError(
                "There is no process group. Call torch.distributed.init_process_group first, and "
                "start the script by torchrun."
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise InvalidInputError(
                    f"The mesh has {group.ndim} dimensions; give one of them, as in mesh['cp']."
                )
            group = group.get_group()
        if group is None:
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise InvalidInputError(
                f"group is a {type(group).__name__}. Give a ProcessGroup, one dimension of a "
                "DeviceMesh, or None for all ranks."
            )
        rank = dist.get_rank(group)
        if rank < 0:
            raise InvalidInputError("This process is not in the group.")
        self.group: dist.ProcessGroup = group
        self.rank, self.size = rank, dist.get_world_size(group)
        #: "nccl" or "gloo", for example.
        self.transport = str(dist.get_backend(group)).lower()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # the copy of a layer has the same group

    def __getstate__(self) -> Any:
        raise InvalidInputError(
            "A layer with context_parallel cannot be pickled, because its process group is that of "
            "this process. Make it on each rank."
        )

    def _run(self, what: str, collective: Callable[..., T], *args: Any) -> T:
        return self._guarded(what, collective, *args, group=self.group)

    def _guarded(self, what: str, function: Callable[..., T], *args: Any, **kw: Any) -> T:
        try:
            return function(*args, **kw)
        except (RuntimeError, dist.DistError) as error:
            raise FinalFailure(
                f"The {what} of rank {self.rank} failed, so another of the {self.size} ranks of "
                "its group raised, ended or timed out. See the output of the other ranks."
            ) from error

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """(size, ...): row r goes to rank r; row r of the result is from rank r."""
        tensor = tensor.contiguous()
        if self.size == 1:
            return tensor
        received = torch.empty_like(tensor)
        self._run("all-to-all", dist.all_to_all_single, received, tensor)
        return received

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(size, ...): the tensors of all ranks, which have one shape."""
        tensor = tensor.contiguous()
        if self.size == 1:
            return tensor[None]
        received = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        self._run("all-gather", _all_gather, received, tensor)
        rows: torch.Tensor = received.unflatten(0, (self.size, len(tensor)))
        return rows

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """(num_tokens, size * heads, ...) of each rank's (num_tokens, heads, ...)."""
        if self.size == 1:
            return tensor
        return self.all_gather(tensor).transpose(0, 1).flatten(1, 2)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """(...): row `rank` of the sum over ranks of (size, ...)."""
        tensor = tensor.contiguous()
        if self.size == 1:
            return tensor[0]
        received = torch.empty_like(tensor[0])
        self._run("reduce-scatter", _reduce_scatter, received, tensor.flatten(0, 1))
        return received

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; the tensor is overwritten."""
        if self.size > 1:
            self._run("all-reduce", dist.all_reduce, tensor)
        return tensor

    def exchange(
        self, tensors: Sequence[torch.Tensor], to: int, source: int, rows: int
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Begin to send tensors to one rank and receive such ones of this many rows from another.

        Returns:
            What is received, and a function that waits for it: it is called before the received
            tensors are read, and before those sent are written.
        """
        received = [tensor.new_empty((rows, *tensor.shape[1:])) for tensor in tensors]
        messages: list[tuple[Any, torch.Tensor, int]]
        messages = [(dist.isend, each, to) for each in tensors]
        messages += [(dist.irecv, each, source) for each in received]
        operations = [
            dist.P2POp(operation, each, group=self.group, group_peer=peer)
            for operation, each, peer in messages
            if each.numel()
        ]
        begun: list[Any] = []
        if operations:
            begun = self._guarded("exchange", dist.batch_isend_irecv, operations)

        def wait() -> None:
            for each in begun:
                self._guarded("exchange", each.wait)

        return received, wait

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, pickled: for set-up, not for steps."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            self._run("all-gather of objects", dist.all_gather_object, values, value)
        return values
