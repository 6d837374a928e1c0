"""What a check is, its outcome, and the backend under test."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NoReturn

import torch

from attn_dispatch.conformance.comparison import compare_with_oracle, require_returned
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.latents import step_for
from attn_dispatch.conformance.probes import (
    Probe,
    base_spec,
    case_for,
    is_request,
    probes_for,
    refusals,
)
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound
from attn_dispatch.conformance.unchanged import inputs_unchanged
from attn_dispatch.errors import BackendFailure, UnsupportedError, summary_of
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.quantization import GROUP_SIZE, kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.device import DeviceProfile

__all__ = [
    "BackendUnderTest",
    "Check",
    "Outcome",
    "Run",
    "Skipped",
    "checks_of_cases",
    "run",
    "same_bits",
    "skip",
    "skip_unless",
]

#: The scale of an output that is quantized as a whole: it clamps no value of a step.
_OUTPUT_SCALE = 0.02
#: A soft cap shows where scores are near it: they are scaled to this part of it.
_NEAR_CAP = 0.2


#: Layers that differ from the plain one: name -> fields of any value, and fields by their value.
_LAYERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "window": (("sliding_window",), {}),
    "two-sided window": (("window_size",), {}),
    "chunks": (("attention_chunk",), {}),
    "key positions": (("key_positions",), {}),
    "soft cap": (("logits_soft_cap",), {}),
    "ALiBi": (("alibi",), {}),
    "sinks": (("sinks",), {}),
    "mask": (("custom_mask",), {}),
    "lse": (("returns_lse",), {}),
    "no cache": ((), {"block_size": None, "kv_cache_layout": None}),
    "not causal": ((), {"causal": False}),
}


class Skipped(Exception):
    """A check does not apply here; the message has the reason."""


@dataclass(frozen=True)
class Check:
    """One check of a backend.

    Attributes:
        name: its name within its group.
        shows: what a pass shows, as a sentence.
        spec: the layer.
        test: runs it; returns an ErrorBound if it measures an error, raises CheckFailed or Skipped.
        needs: the type of PyTorch device that it needs, or "" for any.
        group: the group that it is listed in.
    """

    name: str
    shows: str
    spec: AttentionSpec
    test: Callable[[], ErrorBound | None] = field(repr=False, compare=False)
    needs: str = ""
    group: str = ""

    @property
    def full_name(self) -> str:
        """`group/name`."""
        return f"{self.group}/{self.name}"

    def is_among(self, only: str) -> bool:
        """Whether `group/name` contains one of these texts, which are separated by commas."""
        return any(text.strip() in self.full_name for text in only.split(","))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check.

    Attributes:
        check: the check.
        status: "passed", "failed" or "skipped".
        message: why it failed or was skipped, as a sentence.
        finding: the error that was found and the one that is allowed, if it measures one.
        seconds: how long it took.
    """

    check: Check
    status: str
    message: str = ""
    finding: ErrorBound | None = None
    seconds: float = 0.0

    def asdict(self) -> dict[str, Any]:
        """The outcome as JSON-ready data."""
        found = self.finding
        error = None if found is None or found.error == float("inf") else found.error
        return {
            "group": self.check.group,
            "name": self.check.name,
            "shows": self.check.shows,
            "spec": self.check.spec.asdict(),
            "status": self.status,
            "message": self.message,
            "error": error,
            "allowed": None if found is None else found.allowed,
            "seconds": round(self.seconds, 4),
        }


def run(check: Check) -> Outcome:
    """Run a check. An exception of the backend, of any type, makes the check fail.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    start = time.perf_counter()

    def outcome(status: str, message: str = "", finding: ErrorBound | None = None) -> Outcome:
        return Outcome(check, status, message, finding, time.perf_counter() - start)

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return outcome("passed", finding=check.test())
    except Skipped as reason:
        return outcome("skipped", str(reason))
    except CheckFailed as wrong:
        return outcome("failed", f"{wrong}.", wrong.finding)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a backend may raise anything at all, SystemExit too
        return outcome("failed", f"it raises {summary_of(error)}")


@dataclass(frozen=True)
class Run:
    """A forward that was run.

    Attributes:
        returned: what forward returned.
        cache: the cache afterwards, or None; the step's own is unchanged.
        scales: of a quantized output: `scale` or `block_scale`, as for `compare_with_oracle`.
    """

    returned: Any
    cache: Any
    scales: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> torch.Tensor:
        """The output without its LSE."""
        found: Any = self.returned[0] if isinstance(self.returned, tuple) else self.returned
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BackendUnderTest:
    """A backend on a device, and what is tried of it.

    Attributes:
        cls: the backend.
        device: of its tensors.
        profile: the device as capabilities describe it.
        quick: run fewer checks.
        min_cache_bytes: `EngineStep.min_cache_bytes` of all steps.
    """

    cls: type[AttentionBackend]
    device: torch.device
    profile: DeviceProfile
    quick: bool = False
    min_cache_bytes: int = 0

    @cached_property
    def base(self) -> AttentionSpec:
        """The plain layer that everything is tried on.

        Raises:
            InvalidInputError: the backend accepts no layer here.
        """
        return base_spec(self.cls, self.profile)

    @cached_property
    def probes(self) -> tuple[Probe, ...]:
        """Every value that is tried, declared or not."""
        return tuple(probes_for(self.cls, self.base, self.profile))

    @property
    def name(self) -> str:
        """The backend's."""
        return self.cls.get_name()

    def declared(self, name: str) -> list[Probe]:
        """The probes of a field that the backend accepts."""
        return [probe for probe in self.probes if probe.field == name and not probe.reasons]

    def accepts(self, spec: AttentionSpec) -> bool:
        """Whether there is such a layer, and the backend accepts it here."""
        return is_request(spec) and not refusals(self.cls, spec, self.profile)

    def spec_with(self, *names: str, **fields: Any) -> AttentionSpec | None:
        """The plain layer with the first declared value of these fields; None if rejected.

        Args:
            *names: fields of which any value will do.
            **fields: fields with a given value.
        """
        changes: dict[str, Any] = {}
        for name in names:
            probes = self.declared(name)
            if not probes:
                return None
            changes |= probes[0].fields
        spec = self.base.replace(**(changes | fields))
        return spec if self.accepts(spec) else None

    def layers(self, *names: str) -> Iterator[tuple[str, AttentionSpec]]:
        """(name, layer) for those of these `_LAYERS` that the backend accepts."""
        for name in names:
            fields, values = _LAYERS[name]
            spec = self.spec_with(*fields, **values)
            if spec is not None and spec != self.base:
                yield name, spec

    def step(self, spec: AttentionSpec, **case: Any) -> EngineStep:
        """A step of this layer; `case` as for `case_for`."""
        step = step_for(case_for(spec, **case), self.device, self.profile.arch)
        step.min_cache_bytes = self.min_cache_bytes
        if spec.logits_soft_cap:
            step.scale *= max(1.0, _NEAR_CAP * spec.logits_soft_cap)
        return step

    def forward(
        self,
        step: EngineStep,
        cache: KVCache | None = None,
        *,
        may_change: tuple[str, ...] = (),
        **more: Any,
    ) -> Run:
        """Run the backend on a step.

        Args:
            step: the step.
            cache: to write to; None for a copy of the step's.
            may_change: inputs that are views of the memory that is written.
            **more: as for `EngineStep.forward`.

        Raises:
            Skipped: it cannot run, and by now the backend rejects the layer.
            CheckFailed: it modified its inputs, or returned what is no result.
        """
        if cache is None and step.kv_cache is not None:
            cache = step.copy_of_cache()
        scaling: dict[str, torch.Tensor] = {}
        scales: dict[str, Any] = {}
        spec = step.spec
        if spec.output_quant is not None:
            dtype = kv_cache_torch_dtype("fp8", spec.dtype, self.profile.arch)
            shape = step.output_shape
            scaling["output"] = torch.empty(shape, dtype=dtype, device=self.device)
            if spec.output_quant == "fp8_e4m3":
                scales["scale"] = _OUTPUT_SCALE
                scaling["output_scale"] = torch.tensor(_OUTPUT_SCALE, device=self.device)
            else:
                groups = shape[1] * shape[2] // GROUP_SIZE
                scales["block_scale"] = torch.zeros(shape[0], groups, device=self.device)
                scaling["output_block_scale"] = scales["block_scale"]
        try:
            with inputs_unchanged(step, may_change):
                returned = step.forward(self.cls, cache, **scaling, **more)
        except (BackendFailure, UnsupportedError) as error:
            reasons = refusals(self.cls, spec, self.profile)
            if not reasons:
                raise
            # It was declared; since then a library that it needs turned out to be broken.
            raise Skipped(f"not possible on this machine: {reasons[0]}") from error
        require_returned(step, returned)
        return Run(returned, cache, scales)

    def judge(self, step: EngineStep, done: Run) -> ErrorBound:
        """Compare what was run with the oracle."""
        propagates_nan = self.cls.propagates_nan
        return compare_with_oracle(
            step, done.returned, propagates_nan=propagates_nan, **done.scales
        )

    def run_and_judge(self, step: EngineStep) -> ErrorBound:
        """Run a step and compare it with the oracle."""
        return self.judge(step, self.forward(step))

    def agrees(self, spec: AttentionSpec, **case: Any) -> ErrorBound:
        """Run a step of this layer and compare it with the oracle."""
        return self.run_and_judge(self.step(spec, **case))


def skip_unless(holds: bool, reason: str) -> None:
    """Skip the check unless it applies."""
    if not holds:
        skip(reason)


def skip(reason: str) -> NoReturn:
    """Skip the check; also a test of its own, where no check applies."""
    raise Skipped(reason)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    first, second = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return one.shape == other.shape and torch.equal(first, second)


def checks_of_cases(
    target: BackendUnderTest,
    table: Mapping[str, tuple[str, AttentionSpec | None, dict[str, Any]]],
) -> list[Check]:
    """A check for each entry of a table: name -> (what it shows, layer, case).

    An entry without a layer is left out: the backend declares no such layer.
    """
    return [
        Check(name, shows, spec, partial(target.agrees, spec, **case))
        for name, (shows, spec, case) in table.items()
        if spec is not None
    ]
