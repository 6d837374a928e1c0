"""The shadow check: the reference also computes a sample of calls, and differences are reported.

`ATTN_DISPATCH_CHECK=shadow` compares the first call of each layer and then every 100th,
`shadow:N` every Nth. The reference works on a copy of the blocks that the batch uses, taken before
the call, so it writes nothing of the layer's. What differs is judged by the rules of
`attn-dispatch verify`, which also describe what it looks like instead. A compared call waits for
the device and takes many times as long as another.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch import environment
from attn_dispatch.conformance.cases import Case, CaseTensors
from attn_dispatch.conformance.comparison import compare_with_oracle, with_output_scales
from attn_dispatch.conformance.latents import LatentTensors
from attn_dispatch.conformance.shadow_reads import (
    backend_of,
    by_reference,
    cached_of,
    copy_of_blocks,
)
from attn_dispatch.conformance.tolerance import (
    LSE_FLOOR,
    CheckFailed,
    ErrorBound,
    allowance,
    row_errors,
)
from attn_dispatch.errors import InvalidInputError, summary_of
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.locks import ForkSafeLock
from attn_dispatch.platforms.device_errors import is_capturing, is_device_lost
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.mla_layer import MLAAttention
from attn_dispatch.selection.registry import registry

__all__ = ["LayerDrift", "ShadowCall", "ShadowDriftWarning", "begin_shadow", "report", "reset"]

#: Rows of a causal request that are judged.
_ROWS = 16
#: Heads of latent attention that are judged.
_HEADS = 8
#: The error of latent attention in float64: its prefills may be merged by an LSE in float32.
_MERGED = 2e-6
#: Tokens of requests with NaN or infinity that are judged.
_JUDGED = 4


class ShadowDriftWarning(UserWarning):
    """A layer's output differs from the reference's."""


@dataclass
class LayerDrift:
    """The comparisons of one layer.

    Attributes:
        layer: its prefix, and a number that is different for layers of one prefix.
        calls: calls while the check was on, except those that a graph captured.
        compared: those that the reference computed too.
        drifted: those of them that were off by more than is allowed.
        error: the largest error of those that drifted, or of all if none did, as a part of a row's
            largest value.
        allowed: the error that was allowed there.
        message: of the first that drifted: the backend, what is wrong, and where; "" if none did.
        failed: why the last call that could not be compared failed; "" if there was none.
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
_found: dict[str, LayerDrift] = {}


def report() -> tuple[LayerDrift, ...]:
    """The comparisons of every layer that was called while the check was on."""
    with _lock:
        return tuple(dataclasses.replace(each) for each in _found.values())


def reset() -> None:
    """Forget all comparisons; each layer's next call counts as its first."""
    with _lock:
        _found.clear()


def begin_shadow(
    layer: Attention,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: KVCache | None,
    batch: AttentionBatch | None,
) -> ShadowCall | None:
    """Copy what the reference needs, before a call; None for a call that is not compared."""
    if is_capturing():
        return None  # the work of the reference would become a part of the graph
    with _lock:
        found = _found.setdefault(layer._op_key, LayerDrift(layer._op_key))
        is_compared = found.calls % environment.shadow_interval() == 0
        found.calls += 1
    if not is_compared:
        return None
    try:
        if batch is None:
            raise InvalidInputError("the metadata keeps no batch; make it a BatchMetadata")
        return ShadowCall(found, layer, query, key, value, kv_cache, batch)
    except Exception as error:
        _note_failure(found, error)
        return None


def _note(found: LayerDrift, bound: ErrorBound, wrong: str) -> None:
    with _lock:
        first = bool(wrong) and not found.drifted
        if (bool(wrong), bound.error) >= (bool(found.drifted), found.error):
            found.error, found.allowed = bound.error, bound.allowed
        found.compared += 1
        found.drifted += bool(wrong)
        found.message = wrong if first else found.message
    if first:
        _warn(
            f"Layer {found.layer} drifts from the reference. {wrong}. Exclude the backend by an "
            "override (-NAME), and report it."
        )


def _note_failure(found: LayerDrift, error: Exception) -> None:
    """Report that a call cannot be compared. The call itself goes on."""
    if is_device_lost(error):
        raise error
    why = summary_of(error)
    with _lock:
        first, found.failed = not found.failed, why
    if first:
        _warn(
            f"Layer {found.layer} cannot be compared with the reference: {why}. Set "
            f"{environment.CHECK.name} to 0 to turn the check off."
        )


def _warn(message: str) -> None:
    warnings.warn(message, ShadowDriftWarning, stacklevel=6)


@dataclass
class ShadowCall:
    """One call that is compared: its inputs, with the cache as it was before.

    Attributes:
        found: the layer's comparisons, which this one is added to.
        layer, query, key, value, kv_cache, batch: of the call.
    """

    found: LayerDrift
    layer: Attention
    query: torch.Tensor
    key: Any
    value: Any
    kv_cache: KVCache | None
    batch: AttentionBatch

    def __post_init__(self) -> None:
        self._spec = self.layer.spec
        if self.kv_cache is not None:
            self.kv_cache, self.batch = copy_of_blocks(self.kv_cache, self.batch)

    def compare(
        self,
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        metadata: Any,
        output_scale: torch.Tensor | None,
        block_scale: torch.Tensor | None,
    ) -> None:
        """Compute the call by the reference, and compare the layer's result with it.

        Args:
            result: what the layer's impl returned.
            metadata: of the call.
            output_scale, block_scale: of a quantized output.
        """
        self._metadata, self._scales = metadata, (output_scale, block_scale)
        output, lse = result if isinstance(result, tuple) else (result, None)
        self._output: torch.Tensor = output
        self._lse: torch.Tensor | None = lse
        try:
            outcome = self._outcome()
        except Exception as error:
            _note_failure(self.found, error)
        else:
            _note(self.found, *outcome)

    def _outcome(self) -> tuple[ErrorBound, str]:
        """The error, and what is wrong or ""."""
        rows = slice(self.batch.num_tokens)
        call = (self.query, self.key, self.value, self.kv_cache, self.batch)
        by_torch = by_reference(self.layer, *call)
        expected, expected_lse = (_to_float64(each[rows]) for each in by_torch)
        scale, block_scale = self._scales
        groups = None if block_scale is None else block_scale[rows]
        actual = with_output_scales(_to_float64(self._output[rows]), scale, groups)
        actual_lse = expected_lse if self._lse is None else _to_float64(self._lse[rows])

        # Results that are not finite have no error; the oracle judges a few of their rows.
        other = self._not_finite(actual, expected, actual_lse, expected_lse)
        # A backend that declares to lose NaN is judged only by its rows without keys.
        free = self._may_lose_nan(other)[:, None] & (expected_lse != -math.inf)
        differ = (actual.isfinite() != expected.isfinite()).any(-1)
        differ |= actual_lse.isfinite() != expected_lse.isfinite()
        differ |= (actual_lse == -math.inf) != (expected_lse == -math.inf)
        for token in _some(other & (differ & ~free).any(1)):
            head = int((differ & ~free)[token].int().argmax())
            bound, wrong = self._judge(token, head)
            if wrong:
                return bound, f"{wrong}; in {self._place(token)}"
        left_out = other[:, None, None] & ~(actual.isfinite() & expected.isfinite())
        left_out |= free[..., None]
        errors = row_errors(*(each.masked_fill(left_out, 0.0) for each in (actual, expected)))
        allowed = allowance(self._spec.dtype)
        found = errors / allowed
        if self._lse is not None:
            off = (actual_lse - expected_lse).abs() / expected_lse.abs().clamp_min(1.0)
            off = off.nan_to_num(math.inf, math.inf)
            off = off.masked_fill(actual_lse == expected_lse, 0.0)  # −inf equals itself
            off = off.masked_fill(free | (other[:, None] & ~actual_lse.isfinite()), 0.0)
            found = found.maximum(off / max(allowed, LSE_FLOOR))
        bound = ErrorBound(float(errors.max()) if errors.numel() else 0.0, allowed)
        if not found.numel() or float(found.max()) <= 1.0:
            return bound, ""
        # Larger than is allowed in any case; what is allowed in this case is not known yet.
        token, head = divmod(int(found.argmax()), found.shape[1])
        judged, wrong = self._judge(token, head)
        if not wrong:
            return judged, ""
        # Without an allowance no error was measured: a row that should be 0 is not, for instance.
        judged = judged if judged.allowed else bound
        return judged, f"{wrong}; worst in {self._place(token)}, head {head}"

    def _rows_of(self, request: int) -> slice:
        return slice(*self.batch.query_start_list[request : request + 2])

    def _request_of(self, token: int) -> int:
        return bisect.bisect_right(self.batch.query_start_list, token) - 1

    def _place(self, token: int) -> str:
        request = self._request_of(token)
        return f"request {request}, token {token - self.batch.query_start_list[request]}"

    def _backend_of(self, request: int) -> tuple[str, bool]:
        """The backend that computed a request, and whether it declares to propagate NaN."""
        name = backend_of(self.layer, self._metadata, self.batch, request)
        candidate = registry.candidates().get(name)
        cls = None if candidate is None else candidate.backend_cls
        return name, cls is None or cls.propagates_nan

    def _may_lose_nan(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of the rows whose backend declares that it does not propagate NaN."""
        if not bool(rows.any()):
            return rows
        found = torch.zeros_like(rows)
        for request in range(self.batch.num_reqs):
            found[self._rows_of(request)] = not self._backend_of(request)[1]
        return rows & found

    def _not_finite(self, *results: torch.Tensor) -> torch.Tensor:
        """(num_tokens,) bool: the rows of requests with NaN or infinity among their inputs.

        Only requests with a result that is not finite are searched.
        """
        rows = torch.zeros(self.batch.num_tokens, dtype=torch.bool, device=results[0].device)
        strange = torch.stack([(~each.isfinite()).flatten(1).any(1) for each in results]).any(0)
        for request in {self._request_of(token) for token in strange.nonzero().flatten().tolist()}:
            own = self._rows_of(request)
            inputs = (self.query[own], *self._content_of(request))
            rows[own] = not all(bool(each.isfinite().all()) for each in inputs)
        return rows

    def _judge(self, token: int, head: int) -> tuple[ErrorBound, str]:
        """The error of the rows around a token, and what is wrong with them or "".

        By the rules of `verify`: the oracle in float64, and PyTorch's own attention.
        """
        backend, propagates_nan = self._backend_of(self._request_of(token))
        step, rows, heads = self._case_around(token, head)
        scale, block_scale = self._scales
        output = self._output[rows, heads]
        lse = None if self._lse is None else self._lse[rows, heads]
        try:
            bound = compare_with_oracle(
                step,
                output if lse is None else (output, lse),
                block_scale=None if block_scale is None else block_scale[rows],
                scale=1.0 if scale is None else float(scale),
                propagates_nan=propagates_nan,
            )
        except CheckFailed as wrong:
            merged = step.spec.mla is not None and step.spec.dtype == torch.float64
            if merged and 0.0 < wrong.finding.error <= _MERGED:
                return ErrorBound(wrong.finding.error, _MERGED), ""
            return wrong.finding, f"{backend}: {wrong}"
        return bound, ""

    def _case_around(self, token: int, head: int) -> tuple[CaseTensors, slice, slice]:
        """The token's request as a case, its rows and its heads.

        If no row sees a later one, the rows before the token do not depend on those after it: then
        a few rows are enough, however long the request is. Of latent attention a few heads are
        enough, whose keys and values are expanded.
        """
        layer, batch, spec = self.layer, self.batch, self._spec
        request = self._request_of(token)
        first, end = batch.query_start_list[request : request + 2]
        content = self._content_of(request)
        maps = (batch.multi_modal_placeholder_index_maps or {}) if spec.bidirectional_ranges else {}
        ranges = tuple(
            (0, r.start, r.end) for each in maps.values() for r in each if r.request == request
        )
        positions = batch.key_positions
        is_cut = spec.causal and not ranges and not spec.custom_mask
        if is_cut and positions is None:
            num_keys = max(0, len(content[0]) - (end - 1 - token))
            content = tuple(each[:num_keys] for each in content)
            first, end = max(first, token + 1 - _ROWS), token + 1
        rows = slice(first, end)
        heads = slice(0, spec.num_heads)
        if spec.mla is not None:
            heads = slice(head - head % _HEADS, min(spec.num_heads, head - head % _HEADS + _HEADS))
            spec = spec.replace(num_heads=heads.stop - heads.start)
        per_head: dict[str, Any] = layer._per_head
        slopes = per_head["alibi_slopes"]
        given: dict[str, Any] = {
            "case": Case(
                spec=spec,
                query_lens=(end - first,),
                seq_lens=(len(content[0]),),
                ranges=ranges,
                key_positions=None
                if positions is None
                else (positions.offset, positions.step, (batch.global_lens[request],)),
            ),
            "layer": layer,
            "scale": layer.scale,
            "query": self.query[rows, heads],
            "queries": [self.query[rows, heads].cpu().double()],
            "masks": [batch.request_mask(request).cpu()] if spec.custom_mask else None,
            "slopes": None if slopes is None else torch.as_tensor(slopes).tolist(),
            "sinks": per_head["sinks"],
        }
        if isinstance(layer, MLAAttention):
            weight = layer._kv_b_proj.weight.unflatten(0, (self._spec.num_heads, -1))
            return (
                LatentTensors.of_entries(content, weight[heads].flatten(0, 1), **given),
                rows,
                heads,
            )
        keys, values = content
        return CaseTensors(keys=[keys], values=[values], **given), rows, heads

    def _content_of(self, request: int) -> tuple[torch.Tensor, ...]:
        """A request's keys and values, or its entries; see `cached_of`."""
        if self.kv_cache is not None:
            return cached_of(self.layer, self.kv_cache, self.batch, request)
        rows = slice(*self.batch.key_starts[request : request + 2])
        return self.key[rows].cpu().double(), self.value[rows].cpu().double()


def _to_float64(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # mps has none


def _some(rows: torch.Tensor) -> list[int]:
    """A few of the rows that are True, including the first and the last."""
    found = rows.nonzero().flatten().tolist()
    if len(found) <= _JUDGED:
        return found
    return [found[i * (len(found) - 1) // (_JUDGED - 1)] for i in range(_JUDGED)]
