"""What a check is, what came out of it, and the backend that all checks are about."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attn_dispatch.conformance.cases import Step
from attn_dispatch.conformance.findings import CheckFailed, ErrorBound
from attn_dispatch.conformance.probes import Probe, base_spec, case_for, probes_for, refusals
from attn_dispatch.conformance.tolerance import compare_with_oracle, require_returned
from attn_dispatch.conformance.unchanged import Inputs
from attn_dispatch.errors import BackendFailure, UnsupportedError, summary_of
from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.quantization import GROUP_SIZE, kv_cache_torch_dtype
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.device import DeviceProfile

__all__ = [
    "Check",
    "Outcome",
    "Run",
    "Skipped",
    "BackendUnderTest",
    "checks_of_cases",
    "replaced",
    "run",
    "same_bits",
    "skip_unless",
]

#: The scale of a statically quantized output: no value of a step is clamped by it.
_OUTPUT_SCALE = 0.02
#: A soft cap shows where scores come near it: they are made this part of it.
_NEAR_CAP = 0.2


class Skipped(Exception):
    """A check does not apply here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One thing to hold a backend to.

    Attributes:
        group: the checks that it is listed with.
        name: what it is, within its group.
        shows: what a pass shows, as a sentence.
        spec: the layer.
        test: does it; returns a ErrorBound where something is measured, raises CheckFailed or Skipped.
        needs: the type of PyTorch device that it needs, or "" for any.
    """

    group: str
    name: str
    shows: str
    spec: AttentionSpec
    test: Callable[[], ErrorBound | None] = field(repr=False, compare=False)
    needs: str = ""

    @property
    def full_name(self) -> str:
        """`group/name`."""
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class Outcome:
    """What came out of a check.

    Attributes:
        check: which.
        status: "passed", "failed" or "skipped".
        message: why it failed or was skipped, as a sentence.
        finding: the error that was found and the one that is allowed, where one is measured.
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
    """Do a check. Whatever the backend raises makes the check fail, and nothing else.

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
        return outcome("failed", f"it breaks off with {summary_of(error)}")


@dataclass(frozen=True)
class Run:
    """A forward that was run.

    Attributes:
        returned: what forward returned.
        cache: the cache afterwards; the step's own is as it was.
        scale: the output's, if it is quantized as a whole.
        block_scale: the output's, if it is quantized by groups.
    """

    returned: Any
    cache: torch.Tensor | None
    scale: float = 1.0
    block_scale: torch.Tensor | None = None

    @property
    def output(self) -> torch.Tensor:
        """The output without its LSE."""
        found: torch.Tensor = (
            self.returned[0] if isinstance(self.returned, tuple) else self.returned
        )
        return found


@dataclass(frozen=True)
class BackendUnderTest:
    """A backend on a device, and what of it is to be tried.

    Attributes:
        cls: the backend.
        device: where its tensors are.
        profile: the device as capabilities see it.
        base: the plain layer that everything is tried on.
        probes: every value that is tried, declared or refused.
        quick: less of everything.
    """

    cls: type[AttentionBackend]
    device: torch.device
    profile: DeviceProfile
    base: AttentionSpec
    probes: tuple[Probe, ...]
    quick: bool = False

    @classmethod
    def of(
        cls,
        backend_cls: type[AttentionBackend],
        device: torch.device,
        profile: DeviceProfile,
        quick: bool,
    ) -> BackendUnderTest:
        """The target of a backend.

        Raises:
            InvalidInputError: it accepts no layer here.
        """
        base = base_spec(backend_cls, profile)
        probes = tuple(probes_for(backend_cls, base, profile))
        return cls(backend_cls, device, profile, base, probes, quick)

    @property
    def name(self) -> str:
        """The backend's."""
        return self.cls.get_name()

    def declared(self, name: str) -> list[Probe]:
        """The probes of a field that the backend accepts."""
        return [probe for probe in self.probes if probe.field == name and not probe.reasons]

    def accepts(self, spec: AttentionSpec) -> bool:
        """Whether the backend accepts such a layer here."""
        return not refusals(self.cls, spec, self.profile)

    def spec_with(self, *names: str, **fields: Any) -> AttentionSpec | None:
        """The plain layer with the first declared value of these fields; None if refused.

        Args:
            *names: fields of which any value will do.
            **fields: others, with the value that is wanted.
        """
        changes: dict[str, Any] = {}
        for name in names:
            probes = self.declared(name)
            if not probes:
                return None
            changes |= probes[0].fields
        spec = self.base.replace(**(changes | fields))
        return spec if self.accepts(spec) else None

    def step(self, spec: AttentionSpec, **case: Any) -> Step:
        """A step of this layer; `case` as for `case_for`."""
        step = Step(case_for(spec, **case), self.device, self.profile.arch)
        if spec.logits_soft_cap:
            step.scale *= max(1.0, _NEAR_CAP * spec.logits_soft_cap)
        return step

    def forward(
        self,
        step: Step,
        cache: torch.Tensor | None = None,
        *,
        may_change: tuple[str, ...] = (),
        **more: Any,
    ) -> Run:
        """Run the backend on a step.

        Args:
            step: the step.
            cache: to write; None for a copy of the step's.
            may_change: inputs that are views of the memory that is written: see `Inputs`.
            **more: as for `Step.forward`.

        Raises:
            Skipped: it could not be run, and selection refuses it by now.
            CheckFailed: it modified its inputs, or returned what is no result.
        """
        if cache is None and step.kv_cache is not None:
            cache = step.kv_cache.clone()
        scaling, scale, block_scale = {}, 1.0, None
        if step.spec.output_quant is not None:
            tokens, row = len(step.query), step.spec.num_heads * step.spec.head_size_v
            dtype = kv_cache_torch_dtype("fp8", step.spec.dtype, self.profile.arch)
            shape = (tokens, step.spec.num_heads, step.spec.head_size_v)
            scaling["output"] = torch.empty(shape, dtype=dtype, device=self.device)
            if step.spec.output_quant == "fp8_e4m3":
                scale = _OUTPUT_SCALE
                scaling["output_scale"] = torch.tensor(scale, device=self.device)
            else:
                block_scale = torch.zeros(tokens, row // GROUP_SIZE, device=self.device)
                scaling["output_block_scale"] = block_scale
        inputs = Inputs(step, may_change)
        try:
            returned = step.forward(self.cls, cache, **scaling, **more)
        except (BackendFailure, UnsupportedError) as error:
            reasons = refusals(self.cls, step.spec, self.profile)
            if not reasons:
                raise
            # It was declared: meanwhile a library that it needs turned out to be broken.
            raise Skipped(f"not possible on this machine: {reasons[0]}") from error
        inputs.require_unchanged()
        require_returned(step, returned)
        return Run(returned, cache, scale, block_scale)

    def judge(self, step: Step, done: Run) -> ErrorBound:
        """Hold what was run against the oracle."""
        return compare_with_oracle(
            step,
            done.returned,
            scale=done.scale,
            block_scale=done.block_scale,
            propagates_nan=self.cls.propagates_nan,
        )

    def agrees(self, spec: AttentionSpec, **case: Any) -> ErrorBound:
        """Run a step of this layer, and hold it against the oracle."""
        step = self.step(spec, **case)
        return self.judge(step, self.forward(step))


def skip_unless(holds: bool, reason: str) -> None:
    """Skip the check unless it applies."""
    if not holds:
        raise Skipped(reason)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def checks_of_cases(
    target: BackendUnderTest,
    group: str,
    table: Mapping[str, tuple[str, AttentionSpec | None, dict[str, Any]]],
) -> list[Check]:
    """A check for each line of a table: name -> (what it shows, layer, case).

    Lines without a layer are left out: the backend declares none of the kind.
    """

    return [
        Check(group, name, shows, spec, partial(target.agrees, spec, **case))
        for name, (shows, spec, case) in table.items()
        if spec is not None
    ]


def replaced(step: Step, **fields: Any) -> None:
    """Change what a step's layer is; its tensors stay."""
    step.spec = step.spec.replace(**fields)
    step.case = dataclasses.replace(step.case, spec=step.spec)
