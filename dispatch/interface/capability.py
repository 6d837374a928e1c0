"""What a backend can do, as data, and the one function that compares a request with it.

The world is closed: a request is rejected if it sets a field of the spec that the backend does not
declare to anything but the field's neutral value.
"""
# ruff: noqa: D102 (accepts and describe are documented in Constraint)

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.kv_strides import KVStrides
from attn_dispatch.interface.spec import AttentionSpec, plain_value
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import library_name, requirement_problem

__all__ = [
    "ANY",
    "NOT_NONE",
    "ByDevice",
    "Capabilities",
    "Constraint",
    "MultipleOf",
    "OneOf",
    "Range",
    "Reason",
    "ReasonCode",
    "SameAs",
    "Strides",
    "AnyOf",
    "compare",
    "compare_availability",
]


class ReasonCode(str, Enum):
    """Why a candidate is rejected."""

    VALUE = "value"
    """The backend declares the field, but not this value."""
    UNDECLARED = "undeclared"
    """The backend does not declare the field, and the request sets it."""
    COMBINATION = "combination"
    """Each value is fine; together they are not."""
    DEVICE = "device"
    """The backend does not run on this device."""
    LIBRARY = "library"
    """A library that the backend needs is missing, too old or broken."""
    LOAD = "load"
    """The backend itself cannot be imported, or breaks the interface."""
    EXCLUDED = "excluded"
    """An override excludes it."""
    FAILED = "failed"
    """It failed on layers like this one, or cannot take the place of one that did."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One reason for a rejection, as data.

    Attributes:
        code: the kind of reason.
        field: the spec's field, the library, or another subject.
        asked: the value of the request, the device or the machine.
        allowed: the accepted values.
        hint: what a user can do about it.
    """

    code: ReasonCode
    field: str
    asked: str
    allowed: str = ""
    hint: str = ""

    def __str__(self) -> str:
        text = _SENTENCES[self.code].format(r=self)
        return f"{text} ({self.hint})" if self.hint else text

    def asdict(self) -> dict[str, str]:
        """The reason as JSON-ready data."""
        return {**dataclasses.asdict(self), "code": str(self.code), "message": str(self)}


_SENTENCES = {
    ReasonCode.VALUE: "{r.field}={r.asked} is not supported; supported: {r.allowed}",
    ReasonCode.UNDECLARED: "{r.field}={r.asked} is not supported; the backend does not declare it",
    ReasonCode.COMBINATION: "{r.field}: {r.asked} is not supported; supported: {r.allowed}",
    ReasonCode.DEVICE: "does not run on {r.asked}; runs on: {r.allowed}",
    ReasonCode.LIBRARY: "needs {r.allowed}: {r.field} is {r.asked}",
    ReasonCode.LOAD: "cannot be loaded: {r.asked}",
    ReasonCode.EXCLUDED: "excluded by {r.asked}",
    ReasonCode.FAILED: "passed over: {r.asked}",
}


class Constraint(ABC):
    """A set of values that a backend accepts for one field of the spec."""

    @abstractmethod
    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        """Whether the value is in the set."""

    @abstractmethod
    def describe(self, device: DeviceProfile | None = None) -> str:
        """The set in words, for messages and tables; for one device, or for all."""


@dataclass(frozen=True)
class _Any(Constraint):
    description: str
    has_none: bool

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        return self.has_none or value is not None

    def describe(self, device: DeviceProfile | None = None) -> str:
        return self.description


#: Every value.
ANY = _Any("any", has_none=True)
#: Every value but None.
NOT_NONE = _Any("any but None", has_none=False)


class OneOf(Constraint):
    """These values."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        return value in self.values

    def describe(self, device: DeviceProfile | None = None) -> str:
        return ", ".join(str(plain_value(value)) for value in self.values)


@dataclass(frozen=True)
class MultipleOf(Constraint):
    """Multiples of a number, optionally up to a largest one."""

    factor: int
    largest: int | None = None

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        if value is None:
            return False
        return value % self.factor == 0 and (self.largest is None or value <= self.largest)

    def describe(self, device: DeviceProfile | None = None) -> str:
        upto = "" if self.largest is None else f" up to {self.largest}"
        return f"multiples of {self.factor}{upto}"


@dataclass(frozen=True)
class Range(Constraint):
    """Numbers from smallest to largest, both included."""

    smallest: float
    largest: float

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        return value is not None and self.smallest <= value <= self.largest

    def describe(self, device: DeviceProfile | None = None) -> str:
        if self.largest == math.inf:
            return f"{self.smallest} or more"
        return f"{self.smallest} to {self.largest}"


@dataclass(frozen=True)
class SameAs(Constraint):
    """The same value as another field of the request.

    Raises:
        InvalidInputError: the other field is not one of AttentionSpec's.
    """

    other: str

    def __post_init__(self) -> None:
        _check_known([self.other])

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        return bool(value == getattr(spec, self.other))

    def describe(self, device: DeviceProfile | None = None) -> str:
        return f"the same as {self.other}"


@dataclass(frozen=True)
class Strides(Constraint):
    """What kernels need of the memory of a cache whose layout is not ours; ours always suits.

    Attributes:
        aligned: heads begin at multiples of 16 bytes.
        equal: keys and values have the same strides.
    """

    aligned: bool = False
    equal: bool = False

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        return value is None or self.suits(value)

    def suits(self, strides: KVStrides) -> bool:
        """Whether kernels can read a cache with these strides."""
        return (strides.is_aligned or not self.aligned) and (strides.is_equal or not self.equal)

    def describe(self, device: DeviceProfile | None = None) -> str:
        needs = ["heads at multiples of 16 bytes"] * self.aligned
        needs += ["the same strides for keys and values"] * self.equal
        return " and ".join(needs) or "any strides, in one tensor or two"


class AnyOf(Constraint):
    """Any of several constraints: `AnyOf(OneOf(None), MultipleOf(16))`."""

    def __init__(self, *options: Constraint) -> None:
        self.options = options

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        return any(option.accepts(value, spec, device) for option in self.options)

    def describe(self, device: DeviceProfile | None = None) -> str:
        return " or ".join(option.describe(device) for option in self.options)


class ByDevice(Constraint):
    """A constraint for each set of devices, of which the first match counts; one for the rest."""

    def __init__(self, *cases: tuple[DeviceMatch, Constraint], otherwise: Constraint) -> None:
        self.cases = cases
        self.otherwise = otherwise

    def _pick(self, device: DeviceProfile) -> Constraint:
        return next((c for match, c in self.cases if match.matches(device)), self.otherwise)

    def accepts(self, value: Any, spec: AttentionSpec, device: DeviceProfile) -> bool:
        return self._pick(device).accepts(value, spec, device)

    def describe(self, device: DeviceProfile | None = None) -> str:
        if device is not None:
            return self._pick(device).describe(device)
        cases = [
            f"{constraint.describe()} on {match.describe()}" for match, constraint in self.cases
        ]
        return "; ".join([*cases, f"otherwise {self.otherwise.describe()}"])


def _check_known(fields: Iterable[str]) -> None:
    known = {field.name for field in dataclasses.fields(AttentionSpec)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise InvalidInputError(
            f"Capabilities declare {', '.join(unknown)}, which AttentionSpec does not have. "
            f"Its fields are: {', '.join(sorted(known))}."
        )


class Capabilities:
    """A backend's declaration: where it runs, what it needs, what it accepts field by field.

    Args:
        devices: the sets of devices that it runs on.
        requires: requirements in packaging's form ("triton>=3.6"), with the module's name.
        **fields: a constraint for each field of the spec that the backend supports.

    Raises:
        InvalidInputError: a field is not one of AttentionSpec's, or an argument has another type.
    """

    def __init__(
        self,
        *,
        devices: tuple[DeviceMatch, ...],
        requires: tuple[str, ...] = (),
        **fields: Constraint,
    ) -> None:
        _check_known(fields)
        _check_all("devices", devices, DeviceMatch)
        _check_all("requires", requires, str)
        for requirement in requires:
            try:
                Requirement(requirement)
            except InvalidRequirement as error:
                raise InvalidInputError(
                    f"requires has {requirement!r}, which is not a requirement such as "
                    f"'triton>=3.6': {str(error).splitlines()[0]}"
                ) from error
        for name, constraint in fields.items():
            if not isinstance(constraint, Constraint):
                raise InvalidInputError(
                    f"{name}={constraint!r} is not a constraint. "
                    f"Write e.g. {name}=OneOf({constraint!r})."
                )
        self.devices = devices
        self.requires = requires
        self.fields: Mapping[str, Constraint] = dict(fields)

    def accepts_somewhere(self, field: str, value: Any, spec: AttentionSpec) -> bool:
        """Whether a known device accepts this value of a field; spec holds the other fields."""
        constraint = self.fields.get(field)
        if constraint is None:
            return _is_neutral(type(spec).__dataclass_fields__[field], value)
        return any(constraint.accepts(value, spec, device) for device in KNOWN_DEVICES.values())


def _is_neutral(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether the field of the spec changes nothing at this value."""
    return "neutral" in field.metadata and bool(value == field.metadata["neutral"])


def _check_all(name: str, values: Any, kind: type) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        raise InvalidInputError(f"{name}={values!r} is not a tuple of {kind.__name__}.")


def compare(spec: AttentionSpec, capabilities: Capabilities, device: DeviceProfile) -> list[Reason]:
    """Every reason why a backend with these capabilities cannot compute the request here."""
    return [
        *compare_availability(capabilities, device),
        *_compare_fields(spec, capabilities, device),
    ]


def compare_availability(capabilities: Capabilities, device: DeviceProfile) -> list[Reason]:
    """Every reason why a backend cannot run here, for any request."""
    return [*_compare_device(capabilities, device), *_compare_libraries(capabilities, device)]


def _compare_device(capabilities: Capabilities, device: DeviceProfile) -> list[Reason]:
    if any(match.matches(device) for match in capabilities.devices):
        return []
    allowed = "; ".join(match.describe() for match in capabilities.devices)
    asked = f"{device.name} ({device.arch})"
    return [Reason(code=ReasonCode.DEVICE, field="device", asked=asked, allowed=allowed)]


def _compare_libraries(capabilities: Capabilities, device: DeviceProfile) -> list[Reason]:
    reasons = []
    for requirement in capabilities.requires:
        name = library_name(requirement)
        problem = requirement_problem(requirement, device.library(name))
        if problem:
            fact, hint = problem
            code = ReasonCode.LIBRARY
            reasons.append(
                Reason(code=code, field=name, asked=fact, allowed=requirement, hint=hint)
            )
    return reasons


def _compare_fields(
    spec: AttentionSpec, capabilities: Capabilities, device: DeviceProfile
) -> list[Reason]:
    reasons = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        constraint = capabilities.fields.get(field.name)
        if constraint is None:
            if _is_neutral(field, value):
                continue
            code, allowed = ReasonCode.UNDECLARED, ""
        elif constraint.accepts(value, spec, device):
            continue
        else:
            code, allowed = ReasonCode.VALUE, constraint.describe(device)
        asked = str(plain_value(value))
        reasons.append(Reason(code=code, field=field.name, asked=asked, allowed=allowed))
    return reasons
