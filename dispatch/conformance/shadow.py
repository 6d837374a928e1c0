"""The shadow check: on a sample of calls the reference computes the same, and drift is reported.

`ATTN_DISPATCH_CHECK=shadow` compares the first call of each layer and then every 100th,
`shadow:N` every Nth. The reference works on a copy of the blocks that the batch uses, taken before
the call, so it writes nothing of the layer's. What looks wrong is judged by the rules of
`attn-dispatch verify`, which also say what it looks like instead. A compared call waits for the
device and takes many times as long as another.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attn_dispatch import environment
from attn_dispatch.conformance.drift import (
    FLOOR,
    LSE_FLOOR,
    differ_in_kind,
    exact,
    lse_errors,
    plain_output,
    row_errors,
)
from attn_dispatch.errors import InvalidInputError, summary_of
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.impl import get_kv_scales
from attn_dispatch.interface.kv_access import gather_kv
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.types import Phase
from attn_dispatch.locks import ForkSafeLock
from attn_dispatch.platforms.device_errors import is_capturing, is_device_lost
from attn_dispatch.runtime.routing import RoutedMetadata

if TYPE_CHECKING:
    from attn_dispatch.conformance.cases import Step
    from attn_dispatch.runtime.layer import Attention

__all__ = ["Compared", "ShadowDriftWarning", "Watch", "report", "reset", "watch"]


class ShadowDriftWarning(UserWarning):
    """A layer's output is not what the reference computes."""


@dataclass
class Compared:
    """What was found of one layer.

    Attributes:
        layer: its prefix, and a number that tells layers of one prefix apart.
        calls: calls while the check was on, but for those in graphs that were being captured.
        compared: those that the reference computed too.
        drifted: those of them that were off by more than is allowed.
        error: the largest error of those that drifted, or of all if none did, as a part of a row's
            largest value.
        allowed: what was allowed there.
        message: of the first that drifted: the backend, what is wrong, and where; "" if none did.
        failed: why a call could not be compared, of the last such call; "" if there was none.
    """

    layer: str
    calls: int = 0
    compared: int = 0
    drifted: int = 0
    error: float = 0.0
    allowed: float = 0.0
    message: str = ""
    failed: str = ""


_lock = ForkSafeLock()
_found: dict[str, Compared] = {}


def report() -> tuple[Compared, ...]:
    """What was found of every layer that was called while the check was on."""
    with _lock:
        return tuple(dataclasses.replace(each) for each in _found.values())


def reset() -> None:
    """Forget what was found; each layer's next call counts as its first."""
    with _lock:
        _found.clear()


def watch(
    layer: Attention,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: torch.Tensor | None,
    batch: AttentionBatch | None,
) -> Watch | None:
    """Before a call: what the reference needs to compute it too, or None if it is not its turn."""
    if is_capturing():
        return None  # a graph would get the work of the reference, and nobody to look at it
    with _lock:
        found = _found.setdefault(layer._op_key, Compared(layer._op_key))
        turn = found.calls % environment.shadow_interval() == 0
        found.calls += 1
    if not turn:
        return None
    try:
        if batch is None:
            raise InvalidInputError("the metadata keeps no batch; make it a BatchMetadata")
        return Watch(found, layer, query, key, value, kv_cache, batch)
    except Exception as error:
        _tell_failure(found, error)
        return None


def _note(found: Compared, error: float, allowed: float, wrong: str) -> None:
    with _lock:
        first = bool(wrong) and not found.drifted
        if (bool(wrong), error) >= (bool(found.drifted), found.error):
            found.error, found.allowed = error, allowed
        found.compared += 1
        found.drifted += bool(wrong)
        if first:
            found.message = wrong
    if first:
        warnings.warn(
            f"Layer {found.layer} drifts from the reference. {wrong}. Exclude the backend by an "
            "override (-NAME), and report it.",
            ShadowDriftWarning,
            stacklevel=5,
        )


def _tell_failure(found: Compared, error: Exception) -> None:
    """Say that a call cannot be compared: the check must not break what it checks."""
    if is_device_lost(error):
        raise error
    why = summary_of(error)
    with _lock:
        first, found.failed = not found.failed, why
    if first:
        warnings.warn(
            f"Layer {found.layer} cannot be compared with the reference: {why}. Set "
            f"{environment.CHECK.name} to 0 to do without.",
            ShadowDriftWarning,
            stacklevel=5,
        )


class Watch:
    """One call that is compared: its inputs, with the cache as it was before.

    Args:
        found: the layer's, added to.
        layer, query, key, value, kv_cache, batch: of the call.
    """

    def __init__(
        self,
        found: Compared,
        layer: Attention,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        batch: AttentionBatch,
    ) -> None:
        self._found, self._layer = found, layer
        self._query, self._key, self._value = query, key, value
        self._kv_cache, self._batch = kv_cache, batch
        if kv_cache is not None:
            self._kv_cache, self._batch = _copy_of_blocks(kv_cache, batch)

    def compare(
        self,
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        metadata: Any,
        output_scale: torch.Tensor | None,
        block_scale: torch.Tensor | None,
    ) -> None:
        """Compute the call by the reference and hold the layer's result against it.

        Args:
            result: what the layer's impl returned.
            metadata: of the call.
            output_scale, block_scale: of a quantized output.
        """
        try:
            outcome = self._outcome(result, metadata, output_scale, block_scale)
        except Exception as error:
            _tell_failure(self._found, error)
        else:
            _note(self._found, *outcome)

    def _outcome(
        self,
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        metadata: Any,
        output_scale: torch.Tensor | None,
        block_scale: torch.Tensor | None,
    ) -> tuple[float, float, str]:
        """The error, what is allowed, and what is wrong or ""."""
        rows = slice(self._batch.num_tokens)
        output, lse = result if isinstance(result, tuple) else (result, None)
        expected, expected_lse = (exact(each[rows]) for each in self._by_reference())
        groups = None if block_scale is None else block_scale[rows]
        actual = plain_output(output[rows], output_scale, groups)
        actual_lse = expected_lse if lse is None else exact(lse[rows])

        def judge(token: int) -> tuple[float, float, str]:
            backend = self._server_of(token, metadata)
            scales = (output_scale, block_scale)
            error, allowed, wrong = self._judge(token, output, lse, *scales, backend)
            return error, allowed, f"{backend}: {wrong}" if wrong else ""

        # What is not finite is no matter of error: a few of the rows are judged by the oracle.
        other = self._not_finite(actual, expected, actual_lse, expected_lse)
        # Of a backend that declares to lose NaN, rows without keys are all that is held to a rule.
        free = self._lost(other, metadata)[:, None] & (expected_lse != -math.inf)
        differ = differ_in_kind(actual, expected, actual_lse, expected_lse) & ~free
        for token in _some(other & differ.any(1)):
            error, allowed, wrong = judge(token)
            if wrong:
                return error, allowed, f"{wrong}; in {self._place(token)}"
        unlike = other[:, None, None] & ~(actual.isfinite() & expected.isfinite())
        unlike |= free[..., None]
        actual, expected = (each.masked_fill(unlike, 0.0) for each in (actual, expected))
        dtype = self._layer.spec.dtype
        bound = max(torch.finfo(dtype).eps, FLOOR.get(dtype, 0.0))
        errors = row_errors(actual, expected)
        found = errors / bound
        if lse is not None:
            off = lse_errors(actual_lse, expected_lse)
            off = off.masked_fill(free | (other[:, None] & ~actual_lse.isfinite()), 0.0)
            found = found.maximum(off / max(bound, LSE_FLOOR))
        if not found.numel() or float(found.max()) <= 1.0:
            return float(errors.max()) if errors.numel() else 0.0, bound, ""
        # Too far to be right in any case, so what is allowed in this one must be known.
        token, head = divmod(int(found.argmax()), found.shape[1])
        error, allowed, wrong = judge(token)
        if wrong:
            if not allowed:  # no error was measured: what should be 0 is not, say
                error, allowed = float(errors.max()), bound
            wrong = f"{wrong}; worst in {self._place(token)}, head {head}"
        return error, allowed, wrong

    def _place(self, token: int) -> str:
        request = _request_of(self._batch, token)
        return f"request {request}, token {token - self._batch.query_start_list[request]}"

    def _server_of(self, token: int, metadata: Any) -> str:
        phase = self._batch.phases[_request_of(self._batch, token)]
        return _server(metadata, self._layer, phase)

    def _lost(self, rows: torch.Tensor, metadata: Any) -> torch.Tensor:
        """Those of the rows whose backend declares that it does not propagate NaN."""
        if not bool(rows.any()):
            return rows
        batch, lost = self._batch, torch.zeros_like(rows)
        for request, phase in enumerate(batch.phases):
            if not _propagates_nan(_server(metadata, self._layer, phase)):
                lost[slice(*batch.query_start_list[request : request + 2])] = True
        return rows & lost

    def _not_finite(self, *results: torch.Tensor) -> torch.Tensor:
        """(num_tokens,) bool: the rows of requests with NaN or infinity among their inputs.

        Only requests are looked at in which one of the results is not finite.
        """
        batch = self._batch
        rows = torch.zeros(batch.num_tokens, dtype=torch.bool, device=results[0].device)
        strange = torch.stack([(~each.isfinite()).flatten(1).any(1) for each in results]).any(0)
        for request in {
            _request_of(batch, token) for token in strange.nonzero().flatten().tolist()
        }:
            own = slice(*batch.query_start_list[request : request + 2])
            inputs = (self._query[own], *self._keys_of(request))
            rows[own] = not all(bool(each.isfinite().all()) for each in inputs)
        return rows

    def _by_reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, lse) by REFERENCE, which writes to only the copy of the cache."""
        from attn_dispatch.backends.reference.torch_ref import ReferenceBackend

        layer, query = self._layer, self._query
        spec = layer.spec.replace(output_quant=None, returns_lse=True, cuda_graph=False)
        impl = ReferenceBackend.make_impl(spec, **layer._impl_arguments())
        metadata = ReferenceBackend.make_builder(spec, query.device).build(self._batch)
        found = impl.forward(layer, query, self._key, self._value, self._kv_cache, metadata)
        assert isinstance(found, tuple)
        return found

    def _judge(
        self,
        token: int,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        output_scale: torch.Tensor | None,
        block_scale: torch.Tensor | None,
        backend: str,
    ) -> tuple[float, float, str]:
        """Error, what is allowed, and what is wrong or "", of the rows around a token.

        By the rules of `verify`: the oracle in float64, and PyTorch's own attention beside it.
        """
        from attn_dispatch.conformance.tolerance import CheckFailed, compare_with_oracle

        step, rows = self._step_around(token)
        try:
            finding = compare_with_oracle(
                step,
                output[rows] if lse is None else (output[rows], lse[rows]),
                block_scale=None if block_scale is None else block_scale[rows],
                scale=1.0 if output_scale is None else float(output_scale),
                propagates_nan=_propagates_nan(backend),
            )
        except CheckFailed as wrong:
            return wrong.finding.error, wrong.finding.allowed, str(wrong)
        return finding.error, finding.allowed, ""

    def _step_around(self, token: int) -> tuple[Step, slice]:
        """The token's request as a step for the judge, and its rows.

        Where a row sees nothing after itself, so do the rows before it without what follows them:
        then these few are enough, however long the request is.
        """
        from attn_dispatch.conformance.cases import Case, Step

        layer, batch = self._layer, self._batch
        spec, request = layer.spec, _request_of(batch, token)
        first, end = batch.query_start_list[request : request + 2]
        keys, values = self._keys_of(request)
        ranges = _ranges_of(batch, request) if spec.bidirectional_ranges else ()
        if spec.causal and not ranges and not spec.custom_mask:
            keys, values = (
                each[: max(0, len(each) - (end - 1 - token))] for each in (keys, values)
            )
            first, end = max(first, token + 1 - _ROWS), token + 1
        rows = slice(first, end)
        case = Case(spec=spec, query_lens=(end - first,), seq_lens=(len(keys),), ranges=ranges)
        slopes, sinks = layer._per_head["alibi_slopes"], layer._per_head["sinks"]
        step = Step.__new__(Step)  # one that took place, where Step makes one up
        vars(step).update(
            case=case,
            spec=spec,
            device=self._query.device,
            query=self._query[rows],
            queries=[self._query[rows].cpu().double()],
            keys=[keys],
            values=[values],
            masks=[batch.request_mask(request).cpu()] if spec.custom_mask else None,
            layer=layer,
            scale=layer.scale,
            slopes=None if slopes is None else torch.as_tensor(slopes).tolist(),
            sinks=sinks,
        )
        return step, rows

    def _keys_of(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's keys and values as they are meant, (seq_len, num_kv_heads, size) float64."""
        spec, batch, cache = self._layer.spec, self._batch, self._kv_cache
        if cache is None:
            assert self._key is not None
            assert self._value is not None
            rows = slice(*batch.key_starts[request : request + 2])
            return self._key[rows].cpu().double(), self._value[rows].cpu().double()
        assert batch.block_table is not None
        blocks, seq_len = batch.block_table[request], batch.seq_lens_list[request]
        dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
        views = view_kv_cache(cache, spec.head_size, spec.head_size_v)
        keys, values = (
            gather_kv(view, blocks, seq_len, scale, dtype).cpu().double()
            for view, scale in zip(views, get_kv_scales(self._layer, cache), strict=True)
        )
        return keys, values


#: Rows that are judged of a request that is causal.
_ROWS = 16
#: Tokens of requests with NaN or infinity that are judged.
_JUDGED = 4


def _propagates_nan(backend: str) -> bool:
    """What a backend declares; True of one that is no longer registered."""
    from attn_dispatch.selection.registry import registry

    candidate = registry.candidates().get(backend)
    cls = None if candidate is None else candidate.backend_cls
    return cls is None or cls.propagates_nan


def _some(rows: torch.Tensor) -> list[int]:
    """A few of the rows that are True, the first and the last among them."""
    found = rows.nonzero().flatten().tolist()
    if len(found) <= _JUDGED:
        return found
    return [found[i * (len(found) - 1) // (_JUDGED - 1)] for i in range(_JUDGED)]


def _copy_of_blocks(
    kv_cache: torch.Tensor, batch: AttentionBatch
) -> tuple[torch.Tensor, AttentionBatch]:
    """A cache of just the blocks that the batch uses, and the batch as it finds them there."""
    table, slots = batch.block_table, batch.slot_mapping
    if table is None:
        raise InvalidInputError("The batch has no block_table. Give it one to use a cache.")
    block_size = kv_cache.shape[2]
    lens = batch.seq_lens_cpu.to(table.device)
    columns = torch.arange(table.shape[1], device=table.device)
    used = columns * block_size < lens[:, None]
    stored = used.new_zeros(0) if slots is None else slots >= 0
    own = table[used].long()
    new = own[:0] if slots is None else slots[stored]
    blocks, places = torch.cat([own, new // block_size]).unique(return_inverse=True)
    table = torch.zeros_like(table).masked_scatter(used, places[: len(own)].to(table.dtype))
    if slots is not None:
        moved = places[len(own) :] * block_size + new % block_size
        slots = slots.masked_scatter(stored, moved)
    stored_bytes = kv_cache.view(torch.uint8) if kv_cache.dtype.itemsize == 1 else kv_cache
    copy = stored_bytes[blocks].view(kv_cache.dtype)
    return copy, dataclasses.replace(batch, block_table=table, slot_mapping=slots)


def _request_of(batch: AttentionBatch, token: int) -> int:
    return bisect.bisect_right(batch.query_start_list, token) - 1


def _ranges_of(batch: AttentionBatch, request: int) -> tuple[tuple[int, int, int], ...]:
    """The ranges of a request, as those of a batch of it alone."""
    maps = (batch.multi_modal_placeholder_index_maps or {}).values()
    return tuple((0, r.start, r.end) for each in maps for r in each if r.request == request)


def _server(metadata: Any, layer: Attention, phase: Phase) -> str:
    """Who served the requests of a phase."""
    if isinstance(metadata, RoutedMetadata):
        return next(part.backend for part in metadata.parts if part.phase in (None, phase))
    return next(iter(layer.selections.values())).name
