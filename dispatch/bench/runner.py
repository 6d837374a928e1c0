"""The run: the implementations of each case are compared with the oracle and timed in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_dispatch.bench.accuracy import AccuracyJudge
from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.implementations import (
    BackendImplementation,
    Call,
    Implementation,
    check_registered,
    verdicts_of,
)
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.roofline import Ceilings
from attn_dispatch.bench.timing import Clock, Timing, clock_for, host_time_us, measure
from attn_dispatch.errors import InvalidInputError, UnsupportedError, summary_of
from attn_dispatch.interface.capability import ReasonCode
from attn_dispatch.runtime.routing import Router
from attn_dispatch.selection.priorities import LAST_RESORT
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.resolve import ReferenceFallbackWarning, SelectionContext
from attn_dispatch.selection.selector import phases_of

__all__ = ["Bench", "CaseResult", "Row"]

#: Share of the free memory that a case may need, and outputs that exist at the same time.
_MEMORY_SHARE, _OUTPUTS = 0.9, 8

#: Memory for the oracle and for the buffers of implementations.
_SPARE_BYTES = 3 << 30


@dataclass
class Row:
    """The result of one implementation in one case, in one variant.

    Attributes:
        name: of the implementation.
        kind: "backend" or "peer".
        variant: "" if there is one.
        status: "ok", "refused", "wrong" or "error"; only "ok" has times.
        detail: why it is not ok.
        error: see AccuracyJudge; None if nothing was computed.
        timing: on the device.
        host_us: how long a call keeps the host; None on a CPU, where it is the same time.
    """

    name: str
    kind: str
    variant: str = ""
    status: str = "ok"
    detail: str = ""
    error: float | None = None
    timing: Timing | None = None
    host_us: float | None = None

    @property
    def median_us(self) -> float:
        """The time; infinite without one."""
        return math.inf if self.timing is None else self.timing.median_us

    def asdict(self) -> dict[str, Any]:
        """As JSON-ready data: an error that is not finite is a text."""
        data = dataclasses.asdict(self)
        if self.error is not None and not math.isfinite(self.error):
            data["error"] = str(self.error)
        return data


@dataclass
class CaseResult:
    """The result of one case.

    Attributes:
        case: the case.
        skipped: why nothing was run, or "".
        rows: one for each implementation and variant, in their order.
        picked: phase -> the backend that automatic selection gives the layer.
        picked_row: the name of the row of what is picked for exactly this batch.
        allowed_error, sdpa_error, sampled_requests, sampled_rows: see AccuracyJudge.
        seconds: how long the case took.
    """

    case: Case
    skipped: str = ""
    rows: list[Row] = field(default_factory=list)
    picked: dict[str, str] = field(default_factory=dict)
    picked_row: str = ""
    allowed_error: float | None = None
    sdpa_error: float | None = None
    sampled_requests: int = 0
    sampled_rows: int = 0
    seconds: float = 0.0

    def best(self, name: str) -> Row | None:
        """The fastest row of an implementation; if none is timed, the first, which has a reason."""
        own = (row for row in self.rows if row.name == name)
        return min(own, key=lambda row: row.median_us, default=None)

    @property
    def fastest_us(self) -> float:
        """The shortest time of all rows."""
        return min(row.median_us for row in self.rows)

    @property
    def names(self) -> list[str]:
        """The implementations, each once."""
        return list(dict.fromkeys(row.name for row in self.rows))

    @property
    def failed(self) -> list[Row]:
        """The rows of backends that declare the case, and do not compute it right."""
        return [r for r in self.rows if r.kind == "backend" and r.status in ("wrong", "error")]

    def share(self, row: Row, ceilings: Ceilings) -> float | None:
        """The least time by the ceilings, over the measured one: 1 is as fast as possible."""
        if row.timing is None:
            return None
        read_us = self.case.bytes / ceilings.read_tb_s / 1e6
        product_us = self.case.flops / ceilings.matmul_tflops / 1e6
        least = {"decode": read_us, "prefill": product_us}
        if self.case.mla is not None:
            least = {}  # many heads share what is read: decodes may be bound by either
        return least.get(self.case.kind, max(read_us, product_us)) / row.median_us

    def asdict(self, ceilings: Ceilings) -> dict[str, Any]:
        """As JSON-ready data, with rates and shares of the ceilings."""
        rows = []
        for row in self.rows:
            data = row.asdict()
            if row.timing is not None:
                moved = self.case.bytes / row.median_us / 1e6
                done = self.case.flops / row.median_us / 1e6
                data |= {
                    "tb_s": moved,
                    "tflops": done,
                    "share_of_read": moved / ceilings.read_tb_s,
                    "share_of_copy": moved / ceilings.copy_tb_s,
                    "share_of_matmul": done / ceilings.matmul_tflops,
                    "share": self.share(row, ceilings),
                }
            rows.append(data)
        return {
            **vars(self),
            "case": self.case.asdict(),
            "kind": self.case.kind,
            "bytes": self.case.bytes,
            "flops": self.case.flops,
            "rows": rows,
        }


class Bench:
    """Times implementations on a device; `run` yields the result of each case.

    Args:
        device: to run on.
        backends: names of backends; None for all that run on the device, except the references.
        peers: loaded peers.
        clock: of the device; by default, a new one.
        budget_s: about how long to time each implementation in each case.
        rounds: this many calls of each instead.
        free_bytes: returns the device's free memory, or None; called before each case.
        whole_layers: of latent attention, only time whole layers, as an engine calls them.

    Raises:
        UnknownBackendError: a backend is not registered.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        backends: Sequence[str] | None = None,
        peers: Sequence[Implementation] = (),
        clock: Clock | None = None,
        budget_s: float = 0.25,
        rounds: int | None = None,
        free_bytes: Callable[[torch.device], int | None] | None = None,
        whole_layers: bool = False,
    ) -> None:
        check_registered(backends or ())
        self._device = device
        self._backends, self._peers = backends, peers
        self.clock = clock_for(device) if clock is None else clock
        self._budget_s, self._rounds = budget_s, rounds
        self._free_bytes = free_bytes or _free_bytes
        self._whole_layers = whole_layers

    def run(self, cases: Sequence[Case]) -> Iterator[CaseResult]:
        """Run the cases, one after another.

        Raises:
            InvalidInputError: there is no implementation to run.
        """
        names = self._backend_names(cases)
        if not names and not self._peers:
            raise InvalidInputError(
                "No backend except the references runs on this device. Name some with --backends, "
                "e.g. --backends REFERENCE."
            )
        for case in cases:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", ReferenceFallbackWarning)
                start = self.clock.now()
                result = CaseResult(case)
                try:
                    self._run_case(result, names)
                except Exception as error:  # no memory for the inputs, or a lost device
                    result.skipped = f"it could not be set up: {summary_of(error)}"
                result.seconds = self.clock.now() - start
            gc.collect()
            if self._device.type == "cuda":
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()
            yield result

    def _backend_names(self, cases: Sequence[Case]) -> list[str]:
        if self._backends is not None:
            return list(dict.fromkeys(self._backends))
        elsewhere = {ReasonCode.DEVICE, ReasonCode.LIBRARY, ReasonCode.LOAD}
        verdicts = [verdicts_of(case, self._device) for case in cases]
        return [
            name
            for name in registry.candidates()
            if name not in LAST_RESORT
            and any(elsewhere.isdisjoint(r.code for r in v[name].reasons) for v in verdicts)
        ]

    def _run_case(self, result: CaseResult, names: Sequence[str]) -> None:
        case = result.case
        result.skipped = self._too_large(case)
        if result.skipped:
            return
        inputs = Inputs(case, self._device)
        judge = AccuracyJudge(inputs)
        result.allowed_error, result.sdpa_error = judge.allowed, judge.sdpa_error
        result.sampled_requests = judge.sampled_requests
        result.sampled_rows = judge.sampled_rows
        self._note_picks(inputs, result)
        backends = dict.fromkeys(filter(None, (*names, result.picked_row)))
        implementations = {
            **{name: self._implementation(name) for name in backends},
            **{peer.name: peer for peer in self._peers},
        }
        calls: list[tuple[Row, Call]] = []
        for implementation in implementations.values():
            for row, call in self._enter(implementation, inputs, judge):
                result.rows.append(row)
                if call is not None:
                    calls.append((row, call))
        self._time(calls, judge)

    def _implementation(self, name: str) -> Implementation:
        return BackendImplementation(name, self._device, whole_layers=self._whole_layers)

    def _too_large(self, case: Case) -> str:
        free = self._free_bytes(self._device)
        outputs = _OUTPUTS * case.num_tokens * case.num_heads * case.head_size
        needed = case.bytes_held + outputs * case.torch_dtype.itemsize
        needed += _SPARE_BYTES if self._device.type == "cuda" else 0
        if free is None or needed <= _MEMORY_SHARE * free:
            return ""
        return (
            f"it needs {needed / 2**30:.1f} GiB of memory, and may use {_MEMORY_SHARE:.0%} of the "
            f"{free / 2**30:.1f} GiB that are free"
        )

    def _note_picks(self, inputs: Inputs, result: CaseResult) -> None:
        """Note what automatic selection gives this batch."""
        context = SelectionContext.current(self._device)
        try:
            selections = {
                phase: context.select(inputs.spec, phase) for phase in phases_of(inputs.spec)
            }
        except UnsupportedError as error:
            result.picked = {"none": str(error.report.because if error.report else error)}
            return
        result.picked = {str(phase): selection.name for phase, selection in selections.items()}
        route = Router.of(inputs.spec, selections)(inputs.batch)
        result.picked_row = "+".join(name for name, _ in route)

    def _enter(
        self, implementation: Implementation, inputs: Inputs, judge: AccuracyJudge
    ) -> Iterator[tuple[Row, Call | None]]:
        """A row for each variant of an implementation, and its call if the first one was right."""
        try:
            refusal = implementation.supports(inputs.case)
            variants = implementation.variants(inputs.case) if refusal is None else ("",)
        except Exception as error:  # a peer's own checks may raise anything
            refusal, variants = summary_of(error), ("",)
        for variant in variants:
            row, call = Row(implementation.name, implementation.kind, variant), None
            if refusal is not None:
                row.status, row.detail = "refused", refusal
            else:
                with _failures_noted(row):  # a kernel may raise anything at all
                    call = implementation.prepare(inputs, variant)
                    self._judge(row, call, judge)
            yield row, call if row.status == "ok" else None

    def _judge(self, row: Row, call: Call, judge: AccuracyJudge) -> None:
        output = call()
        self.clock.wait()
        row.error = judge.error_of(output, row.variant)
        allowed = judge.allowed_for(row.variant)
        if row.error > allowed:
            row.status = "wrong"
            row.detail = f"its error is {row.error:.2g}, and {allowed:.2g} is allowed"
            row.timing = row.host_us = None

    def _time(self, entries: list[tuple[Row, Call]], judge: AccuracyJudge) -> None:
        for row, call in entries:
            with _failures_noted(row):
                call()  # compiled by the first call; possibly tuned by this one
                if self._device.type != "cpu":
                    row.host_us = host_time_us(call, self.clock)
        left = {f"{r.name} / {r.variant}": (r, call) for r, call in entries if r.status == "ok"}
        timings = measure(
            {name: call for name, (_, call) in left.items()},
            self.clock,
            budget_s=self._budget_s,
            rounds=self._rounds,
            host_us={name: row.host_us or 0.0 for name, (row, _) in left.items()},
        )
        for name, (row, call) in left.items():
            timing = timings[name]
            with _failures_noted(row):
                if isinstance(timing, Exception):
                    raise timing
                row.timing = timing
                # Some are right the first time only: elements that are not written now must show.
                call().fill_(float("nan"))
                self._judge(row, call, judge)


@contextlib.contextmanager
def _failures_noted(row: Row) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        row.timing = row.host_us = None
        row.status, row.detail = "error", summary_of(error)


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, or of the host if it is known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
