"""Kernels that come in other packages: which one is installed, and its functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from attn_dispatch.errors import BackendFailure, UnsupportedError
from attn_dispatch.interface.capability import (
    Capabilities,
    Reason,
    ReasonCode,
    compare_availability,
)
from attn_dispatch.platforms.device import DeviceMatch, DeviceProfile
from attn_dispatch.platforms.libraries import error_of, import_library

__all__ = ["Functions", "Package", "load_functions", "pick_package", "require_package"]

#: The functions of an imported package by name; None for one that the release does not have.
Functions = Mapping[str, Any]
B = TypeVar("B")


def load_functions(
    name: str,
    backend: str,
    imports: Sequence[str],
    functions: Sequence[str],
    optional: Sequence[str] = (),
) -> Functions:
    """Import modules, and take functions from the first of them.

    Args:
        name: the package's, for messages, and to record that it is broken.
        backend: the name of the backend that needs it, for messages.
        imports: modules; the ones after the first must be importable, and no more.
        functions: names of functions.
        optional: names of functions that not every release has.

    Raises:
        BackendFailure: a module cannot be imported, or the first lacks one of `functions`.
    """
    module = import_library(imports[0])
    for each in imports[1:]:  # a package may have been built without this part
        import_library(each, part=name)
    found = {each: getattr(module, each, None) for each in (*functions, *optional)}
    missing = [each for each in functions if found[each] is None]
    if missing:
        raise BackendFailure(
            f"{imports[0]} has no {' and no '.join(missing)}. Install another version of it, or "
            f"exclude the backend by the override -{backend}."
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Package(Generic[B]):
    """A package that contains a backend's kernels, under one of several names.

    Attributes:
        name: its name in messages.
        requires: as in Capabilities.
        imports: the modules that must be importable; the functions come from the first one.
        functions: which functions.
        optional: functions that not every release has.
        bind: what the backend makes of the functions.
    """

    name: str
    requires: tuple[str, ...]
    imports: tuple[str, ...]
    functions: tuple[str, ...]
    optional: tuple[str, ...] = ()
    bind: Callable[[Functions], B]

    def load(self, backend: str) -> B:
        """Import the functions, and bind them.

        Raises:
            BackendFailure: the package cannot be imported, or lacks a function.
        """
        names = (self.imports, self.functions, self.optional)
        return self.bind(load_functions(self.name, backend, *names))

    def reasons(self, device: DeviceProfile) -> list[Reason]:
        """Why it is not usable on this machine; empty if it is, as far as is known."""
        needs = Capabilities(devices=(DeviceMatch(),), requires=self.requires)
        reasons = compare_availability(needs, device)
        error = error_of(self.name)
        if error is not None:
            part = self.imports[-1]
            reasons.append(
                Reason(code=ReasonCode.LIBRARY, field=part, asked=f"broken: {error}", allowed=part)
            )
        return reasons


def pick_package(
    packages: Sequence[Package[B]], device: DeviceProfile
) -> Package[B] | list[Reason]:
    """The first package that is installed, or why none is usable. Nothing is imported."""
    every: list[Reason] = []
    for package in packages:
        reasons = package.reasons(device)
        if not reasons:
            return package
        every += reasons
    return list(dict.fromkeys(every))


def require_package(
    backend: str, packages: Sequence[Package[B]], device: DeviceProfile
) -> Package[B]:
    """The first package that is installed.

    Raises:
        UnsupportedError: there is none.
    """
    picked = pick_package(packages, device)
    if isinstance(picked, Package):
        return picked
    raise UnsupportedError(
        f"{backend} has no kernels here: {'; '.join(map(str, picked))}. get_attn_backend finds a "
        "backend that does."
    )
