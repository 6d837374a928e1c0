"""Checks around the impls of other packages: their results and their effects on the inputs.

The tests check the same of this package's backends, which are called without a guard.
"""

from __future__ import annotations

from typing import Any

import torch

from attn_dispatch import environment
from attn_dispatch.errors import BackendFailure
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.quantization import as_indexable_bytes
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.device_errors import is_capturing
from attn_dispatch.selection.registry import is_builtin

__all__ = ["FinalFailure", "GuardedImpl", "InputsModified", "make_impl"]

#: Element size -> an integer whose bits are a NaN that no computation produces.
_UNWRITTEN = {2: 0x7FD3, 4: 0x7FD3A5C1, 8: 0x7FFDA5C17FD3A5C1}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class FinalFailure(BackendFailure):
    """A failure after which no other backend can serve the call."""


class InputsModified(FinalFailure):
    """A backend modified its inputs and raised, so no other backend can serve the call."""


def make_impl(backend_cls: type[AttentionBackend], spec: AttentionSpec, **arguments: Any) -> Any:
    """The impl of a backend, with a guard if the backend is from another package."""
    impl = backend_cls.make_impl(spec, **arguments)
    return impl if is_builtin(backend_cls) else GuardedImpl(backend_cls.get_name(), impl)


class GuardedImpl:
    """The impl of a backend from another package, which has all other attributes.

    Until the first call that succeeds, and always on a CPU, the inputs are copied before a call and
    restored if it raises. On other devices later calls rely on the tensors' version counters.
    """

    def __init__(self, name: str, impl: AttentionImpl[Any]) -> None:
        self._name, self._impl, self._has_worked = name, impl, False

    def __getattr__(self, name: str) -> Any:
        if name in ("_impl", "_name", "_has_worked"):  # during unpickling
            raise AttributeError(name)
        return getattr(self._impl, name)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: Any,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward.

        Raises:
            BackendFailure: forward did not return an output, or did not write it.
            InputsModified: it raised, and had modified its inputs.
        """
        if output is None:
            shape = (len(query), self._impl.num_heads, self._impl.head_size_v)
            output = torch.empty(shape, dtype=query.dtype, device=query.device)
        batch: AttentionBatch | None = getattr(attn_metadata, "batch", None)
        scales = (output_scale, output_block_scale)
        arguments = (layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        if torch.compiler.is_compiling() or (query.is_cuda and is_capturing()):
            return self._checked(self._impl.forward(*arguments), output, batch)
        on_cpu = query.device.type == "cpu"
        reads_contents = on_cpu or environment.check_mode()
        inputs = _Inputs((query, key, value), batch, copies=on_cpu or not self._has_worked)
        if reads_contents:
            _mark_unwritten(output)
        try:
            result = self._checked(self._impl.forward(*arguments), output, batch)
            if reads_contents and _is_unwritten(output):
                raise BackendFailure(
                    f"{self._name} did not write all rows of the output. That is a bug of the "
                    f"backend; exclude it by the override -{self._name}."
                )
        except Exception as error:
            inputs.restore(self._name, error)
            raise
        self._has_worked = True
        return result

    def _checked(
        self, returned: Any, output: torch.Tensor, batch: AttentionBatch | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The result, in `output`, with padding rows set to 0."""
        found, lse = returned, None
        if self._impl.returns_lse:
            if not isinstance(returned, (tuple, list)) or len(returned) != 2:
                raise self._wrong(f"returned {_kind(returned)}", "(output, lse)")
            found, lse = returned
            self._check_tensor("an lse", lse, output.shape[:2], torch.float32, output.device)
        self._check_tensor("an output", found, output.shape, output.dtype, output.device)
        if found.data_ptr() != output.data_ptr():
            as_indexable_bytes(output).copy_(as_indexable_bytes(found))
        if batch is not None and len(output) > batch.num_tokens:
            as_indexable_bytes(output)[batch.num_tokens :] = 0
            if lse is not None:
                lse[batch.num_tokens :] = float("-inf")
        return output if lse is None else (output, lse)

    def _check_tensor(
        self, what: str, found: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        wanted = f"{what} of shape {tuple(shape)} {dtype} on {device}"
        if not isinstance(found, torch.Tensor):
            raise self._wrong(f"returned {_kind(found)}", wanted)
        if found.shape != shape or found.dtype != dtype or found.device != device:
            raise self._wrong(
                f"returned {tuple(found.shape)} {found.dtype} on {found.device}", wanted
            )

    def _wrong(self, found: str, wanted: str) -> BackendFailure:
        return BackendFailure(
            f"{self._name} {found}; its forward must return {wanted}. That is a bug of the "
            f"backend; exclude it by the override -{self._name}."
        )


class _Inputs:
    """The tensors of a call and of its batch, kept as copies or only by version counters."""

    def __init__(
        self, tensors: tuple[torch.Tensor | None, ...], batch: AttentionBatch | None, copies: bool
    ) -> None:
        own = [] if batch is None else [getattr(batch, name) for name in _OF_BATCH]
        if batch is not None and batch.key_positions is not None:
            own += [batch.key_positions.seq_lens, batch.key_positions.seq_lens_cpu]
        given = [tensor for tensor in (*tensors, *own) if tensor is not None]
        self._copies = [(tensor, tensor.clone()) for tensor in given] if copies else None
        # Inference tensors have no counter.
        counted = [] if copies else [tensor for tensor in given if not tensor.is_inference()]
        self._versions = [(tensor, tensor._version) for tensor in counted]

    def restore(self, backend: str, error: Exception) -> None:
        """Restore the inputs from the copies.

        Raises:
            InputsModified: there are no copies, and an input was modified.
        """
        if self._copies is not None:
            with torch.inference_mode():  # where both kinds of tensors may be written
                for tensor, copy in self._copies:
                    tensor.copy_(copy)
        elif any(tensor._version != version for tensor, version in self._versions):
            raise InputsModified(
                f"{backend} modified its inputs and raised, so no other backend can serve the "
                f"call. Exclude it by the override -{backend}."
            ) from error


_OF_BATCH = (
    "query_start_loc",
    "seq_lens",
    "query_start_loc_cpu",
    "seq_lens_cpu",
    "block_table",
    "slot_mapping",
    "custom_mask",
)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _mark_unwritten(output: torch.Tensor) -> None:
    size = output.element_size()
    if size in _INTEGERS:
        output.view(_INTEGERS[size]).fill_(_UNWRITTEN[size])


def _is_unwritten(output: torch.Tensor) -> bool:
    """Whether an element still has the mark. Bytes have none: each of their values is valid."""
    size = output.element_size()
    return size in _INTEGERS and bool((output.view(_INTEGERS[size]) == _UNWRITTEN[size]).any())
