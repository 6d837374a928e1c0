"""The run: each case's contestants are made, judged by the oracle, and timed by turns."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from attn_dispatch.bench.accuracy import AccuracyJudge
from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.roofline import Ceilings
from attn_dispatch.bench.timing import Clock, Timing, clock_for, host_time_us, measure
from attn_dispatch.errors import InvalidInputError, UnknownBackendError, UnsupportedError
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.capability import ReasonCode
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.runtime.routing import RoutedBuilder, RoutedImpl, Router
from attn_dispatch.selection.priorities import LAST_RESORT
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.report import Report, Verdict
from attn_dispatch.selection.resolve import ReferenceFallbackWarning, resolve
from attn_dispatch.selection.selector import phases_of, select

__all__ = ["Bench", "CaseResult", "Implementation", "Row", "Split", "class_of", "verdicts_of"]

Call = Callable[[], torch.Tensor]

#: Share of the free memory that a case may need, and outputs that are alive together.
_MEMORY_SHARE, _OUTPUTS = 0.9, 8

#: Memory for the oracle and for what contestants hold for themselves.
_SPARE_BYTES = 3 << 30


class Implementation(Protocol):
    """Who takes part: a backend, or a peer."""

    name: str
    kind: str

    def supports(self, case: Case) -> str | None:
        """Why it takes no part in a case, or None."""

    def variants(self, case: Case) -> Sequence[str]:
        """Ways to compute the case; the fastest that is right is shown."""

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """All that is done once per batch; the call returns (num_tokens, heads, head_size)."""


@dataclass
class Row:
    """What came of one contestant in one case, in one variant.

    Attributes:
        name: of the contestant.
        kind: "backend" or "peer".
        variant: "" where there is one.
        status: "ok", "refused", "wrong" or "error"; only "ok" has times.
        detail: why it is not ok.
        error: see oracle.AccuracyJudge; None if nothing was computed.
        timing: on the device.
        host_us: for which a call keeps the host; None on a CPU, where that is the same.
    """

    name: str
    kind: str
    variant: str = ""
    status: str = "ok"
    detail: str = ""
    error: float | None = None
    timing: Timing | None = None
    host_us: float | None = None

    def asdict(self) -> dict[str, Any]:
        """As JSON-ready data: an error that is not finite is a text."""
        data = dataclasses.asdict(self)
        if self.error is not None and not torch.tensor(self.error).isfinite():
            data["error"] = str(self.error)
        return data


@dataclass
class CaseResult:
    """What came of one case.

    Attributes:
        case: which.
        skipped: why nothing was run, or "".
        rows: one for each contestant and variant, in their order.
        picked: phase -> the backend that automatic selection gives the layer there.
        picked_row: the name of the row that has the time of what is picked for this very batch.
        allowed, sdpa_error, sampled_requests, sampled_rows: of the judge.
        seconds: that the case took.
    """

    case: Case
    skipped: str = ""
    rows: list[Row] = field(default_factory=list)
    picked: dict[str, str] = field(default_factory=dict)
    picked_row: str = ""
    allowed: float | None = None
    sdpa_error: float | None = None
    sampled_requests: int = 0
    sampled_rows: int = 0
    seconds: float = 0.0

    def best(self, name: str) -> Row | None:
        """The fastest of a contestant's rows; without one, the first that says what is wrong."""
        own = [row for row in self.rows if row.name == name]
        timed = [row for row in own if row.timing is not None]
        if timed:
            return min(timed, key=lambda row: row.timing.median_us if row.timing else 0.0)
        return own[0] if own else None

    @property
    def names(self) -> list[str]:
        """The contestants, each once."""
        return list(dict.fromkeys(row.name for row in self.rows))

    @property
    def failed(self) -> list[Row]:
        """The rows of backends that said they compute the case, and did not."""
        return [r for r in self.rows if r.kind == "backend" and r.status in ("wrong", "error")]

    def share(self, row: Row, ceilings: Ceilings) -> float | None:
        """What the ceilings alone would take, over the time: 1 is as fast as can be."""
        if row.timing is None:
            return None
        read_us = self.case.bytes / ceilings.read_tb_s / 1e6
        product_us = self.case.flops / ceilings.matmul_tflops / 1e6
        least = {"decode": read_us, "prefill": product_us}
        return least.get(self.case.kind, max(read_us, product_us)) / row.timing.median_us

    def asdict(self, ceilings: Ceilings) -> dict[str, Any]:
        """As JSON-ready data, with rates and shares of the ceilings."""
        rows = []
        for row in self.rows:
            data = row.asdict()
            if row.timing is not None:
                moved = self.case.bytes / row.timing.median_us / 1e6
                done = self.case.flops / row.timing.median_us / 1e6
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
            "case": self.case.asdict(),
            "kind": self.case.kind,
            "bytes": self.case.bytes,
            "flops": self.case.flops,
            "skipped": self.skipped,
            "picked": self.picked,
            "picked_row": self.picked_row,
            "allowed_error": self.allowed,
            "sdpa_error": self.sdpa_error,
            "sampled_requests": self.sampled_requests,
            "sampled_rows": self.sampled_rows,
            "seconds": self.seconds,
            "rows": rows,
        }


class _BackendContestant:
    """A registered backend, called as an engine's second layer calls it: metadata is there."""

    kind = "backend"

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self._device = name, device

    def supports(self, case: Case) -> str | None:
        """The reasons of the library's own selection."""
        verdict = verdicts_of(case, self._device)[self.name]
        return "; ".join(map(str, verdict.reasons)) or None

    def variants(self, case: Case) -> Sequence[str]:
        """One."""
        return ("",)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """The impl's forward over metadata that is built once."""
        cls = class_of(self.name)
        impl = cls.get_impl_cls()(**inputs.impl_arguments())  # type: ignore[arg-type]
        metadata = cls.get_builder_cls()(inputs.spec, inputs.device).build(inputs.batch)
        return _forward(impl, inputs, metadata)


class Split:
    """Two backends that each take their phase of a mixed batch.

    Args:
        prefill, decode: their names.
    """

    kind = "backend"

    def __init__(self, prefill: str, decode: str) -> None:
        self.name = f"{prefill}+{decode}"
        self._names = {Phase.PREFILL: prefill, Phase.DECODE: decode}

    def supports(self, case: Case) -> str | None:
        """Who named them has asked."""
        return None

    def variants(self, case: Case) -> Sequence[str]:
        """One."""
        return ("",)

    def prepare(self, inputs: Inputs, variant: str = "") -> Call:
        """The forward of a layer whose phases have different backends."""
        classes = {phase: class_of(name) for phase, name in self._names.items()}
        impls = {
            phase: cls.get_impl_cls()(**inputs.impl_arguments())  # type: ignore[arg-type]
            for phase, cls in classes.items()
        }
        builders = {
            phase: cls.get_builder_cls()(inputs.spec, inputs.device)
            for phase, cls in classes.items()
        }
        metadata = RoutedBuilder(builders).build(inputs.batch)
        return _forward(RoutedImpl(impls, classes), inputs, metadata)


def class_of(name: str) -> type[AttentionBackend]:
    """The class of a backend that takes part."""
    cls = registry.candidates()[name].backend_cls
    assert cls is not None
    return cls


def _forward(impl: AttentionImpl[Any] | RoutedImpl, inputs: Inputs, metadata: Any) -> Call:
    output = inputs.empty_output()
    arguments = (inputs.query, inputs.key, inputs.value, inputs.kv_cache, metadata, output)

    def call() -> torch.Tensor:
        impl.forward(inputs.layer, *arguments)
        return output

    return call


def verdicts_of(case: Case, device: torch.device) -> dict[str, Verdict]:
    """What selection says of each registered backend, no override being in force."""
    try:
        report: Report | None = select(case.spec(), detect_device(device)).report
    except UnsupportedError as error:
        report = error.report
    return {} if report is None else {verdict.name: verdict for verdict in report.verdicts}


class Bench:
    """Contestants, a device and its clock; `run` yields what came of each case.

    Args:
        device: where.
        backends: names of backends; None for all that run on the device, but for the references.
        peers: loaded peers.
        clock: of the device; made if None.
        budget_s: about how long to time each contestant in each case.
        rounds: so many calls of each instead.
        free_bytes: tells the device's free memory, or None; asked before each case.

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
    ) -> None:
        unknown = [name for name in backends or () if name not in registry.names()]
        if unknown:
            raise UnknownBackendError(
                f"There is no backend {unknown[0]!r}. Registered are: "
                f"{', '.join(sorted(registry.names()))}."
            )
        self._device = device
        self._backends, self._peers = backends, peers
        self.clock = clock_for(device) if clock is None else clock
        self._budget_s, self._rounds = budget_s, rounds
        self._free_bytes = free_bytes or _free_bytes

    def run(self, cases: Sequence[Case]) -> Iterator[CaseResult]:
        """Run the cases, one after another.

        Raises:
            InvalidInputError: there is no contestant.
        """
        names = self._backend_names(cases)
        if not names and not self._peers:
            raise InvalidInputError(
                "No backend but the references runs on this device. Name some by --backends, "
                "e.g. --backends REFERENCE."
            )
        for case in cases:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", ReferenceFallbackWarning)
                start = self.clock.now()
                result = CaseResult(case)
                try:
                    self._run_case(result, names)
                except Exception as error:  # no memory for the inputs, or a device that is gone
                    result.skipped = f"it could not be set up: {_told(error)}"
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
        result.allowed, result.sdpa_error = judge.allowed, judge.sdpa_error
        result.sampled_requests = judge.sampled_requests
        result.sampled_rows = judge.sampled_rows
        contestants: list[Implementation] = [_BackendContestant(n, self._device) for n in names]
        contestants += self._pick(inputs, result, names)
        contestants += self._peers
        calls: dict[str, Call] = {}
        rows: dict[str, Row] = {}
        for contestant in contestants:
            for row, call in self._enter(contestant, inputs, judge):
                result.rows.append(row)
                if call is not None:
                    key = f"{row.name} / {row.variant}"
                    calls[key], rows[key] = call, row
        self._time(calls, rows, judge)

    def _too_large(self, case: Case) -> str:
        free = self._free_bytes(self._device)
        outputs = _OUTPUTS * case.num_tokens * case.num_heads * case.head_size
        needed = case.bytes_held + outputs * case.torch_dtype.itemsize
        spare = _SPARE_BYTES if self._device.type == "cuda" else 0
        if free is None or needed + spare <= _MEMORY_SHARE * free:
            return ""
        return (
            f"it needs {(needed + spare) / 2**30:.1f} GiB of memory, and of the "
            f"{free / 2**30:.1f} GiB that are free {_MEMORY_SHARE:.0%} may be used"
        )

    def _pick(
        self, inputs: Inputs, result: CaseResult, names: Sequence[str]
    ) -> list[Implementation]:
        """Note what automatic selection gives this batch; who of that is not there yet."""
        try:
            selections = {
                phase: resolve(inputs.spec, self._device, phase=phase)
                for phase in phases_of(inputs.spec)
            }
        except UnsupportedError as error:
            result.picked = {"none": str(error.report.because if error.report else error)}
            return []
        result.picked = {str(phase): selection.name for phase, selection in selections.items()}
        route = [name for name, _ in Router.of(inputs.spec, selections)(inputs.batch)]
        result.picked_row = "+".join(route)
        if result.picked_row in names:
            return []
        if len(route) > 1:
            return [Split(*route)]
        return [_BackendContestant(result.picked_row, self._device)]

    def _enter(
        self, contestant: Implementation, inputs: Inputs, judge: AccuracyJudge
    ) -> Iterator[tuple[Row, Call | None]]:
        """A row for each variant of a contestant, and its call if the first one was right."""
        try:
            refusal = contestant.supports(inputs.case)
            variants = contestant.variants(inputs.case) if refusal is None else ("",)
        except Exception as error:  # a peer's own checks may raise anything
            refusal, variants = _told(error), ("",)
        for variant in variants:
            row = Row(contestant.name, contestant.kind, variant)
            if refusal is not None:
                row.status, row.detail = "refused", refusal
                yield row, None
                continue
            call = None
            try:
                call = contestant.prepare(inputs, variant)
                self._judge(row, call, judge)
            except Exception as error:  # a kernel may raise anything at all
                row.status, row.detail = "error", _told(error)
            yield row, call if row.status == "ok" else None

    def _judge(self, row: Row, call: Call, judge: AccuracyJudge) -> None:
        output = call()
        self.clock.wait()
        row.error = judge.error_of(output)
        if row.error > judge.allowed:
            row.status = "wrong"
            row.detail = f"its error is {row.error:.2g}, and {judge.allowed:.2g} is allowed"
            row.timing = row.host_us = None

    def _time(self, calls: dict[str, Call], rows: dict[str, Row], judge: AccuracyJudge) -> None:
        on_cpu = self._device.type == "cpu"
        host: dict[str, float] = {}
        for key in list(calls):
            try:
                calls[key]()  # compiled by the first call; tuned, maybe, by this one
                if not on_cpu:
                    host[key] = host_time_us(calls[key], self.clock)
            except Exception as error:
                rows[key].status, rows[key].detail = "error", _told(error)
                del calls[key]
        timings = measure(
            calls, self.clock, budget_s=self._budget_s, rounds=self._rounds, host_us=host
        )
        for key, timing in timings.items():
            row = rows[key]
            if isinstance(timing, Exception):
                row.status, row.detail = "error", _told(timing)
                continue
            row.timing, row.host_us = timing, host.get(key)
            try:
                # Some are right the first time only; what they leave out now must show.
                calls[key]().fill_(float("nan"))
                self._judge(row, calls[key], judge)
            except Exception as error:
                row.timing = row.host_us = None
                row.status, row.detail = "error", _told(error)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, or of the host where it tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
