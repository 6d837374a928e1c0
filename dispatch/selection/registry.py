"""The registry: backend names and their classes.

The backends of this package are listed in `priorities.BUILTIN`. Another package names its backend
in the entry-point group `attn_dispatch.backends`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import operator
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from attn_dispatch.errors import BackendFailure, InvalidInputError
from attn_dispatch.interface.backend import INTERFACE_VERSION, AttentionBackend
from attn_dispatch.interface.capability import Capabilities, Reason, ReasonCode
from attn_dispatch.interface.graphs import AttentionState
from attn_dispatch.interface.impl import AttentionImpl
from attn_dispatch.interface.metadata import AttentionMetadata, AttentionMetadataBuilder
from attn_dispatch.interface.signatures import OPTIONAL_ARGUMENTS, signature_problems
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.locks import ForkSafeLock
from attn_dispatch.log import logger
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import LIBRARIES, library_name
from attn_dispatch.selection.priorities import BUILTIN, Builtin
from attn_dispatch.selection.version import changed

__all__ = [
    "ENTRY_POINT_GROUP",
    "Candidate",
    "Registry",
    "check_backend_class",
    "is_builtin",
    "register_backend",
    "registry",
    "resolve_full_cls_name",
]

ENTRY_POINT_GROUP = "attn_dispatch.backends"

#: How long a decision waits for the import of a plug-in.
_PLUGIN_SECONDS = 30.0

_BUILTIN_CLASSES = frozenset(backend.target for backend in BUILTIN.values())
#: The backend of models without attention layers. It is never selected, so it isn't registered.
NO_ATTENTION = "attn_dispatch.backends.no_attention:NoAttentionBackend"


def is_builtin(backend_cls: type[AttentionBackend]) -> bool:
    """Whether a backend class is one of this package's, which run without a guard."""
    return f"{backend_cls.__module__}:{backend_cls.__qualname__}" in _BUILTIN_CLASSES


@dataclass(frozen=True)
class Candidate:
    """A registered backend: its class, or the reason why there is none."""

    name: str
    target: str
    backend_cls: type[AttentionBackend] | None
    problem: Reason | None = None

    @property
    def loaded_cls(self) -> type[AttentionBackend]:
        """The class of a backend that has no problem."""
        assert self.backend_cls is not None
        return self.backend_cls


def check_backend_class(cls: Any) -> list[str]:
    """The reasons why a class is not a backend, as sentences; empty if it is one."""
    if not (isinstance(cls, type) and issubclass(cls, AttentionBackend)):
        return [f"{cls!r} is not a subclass of attn_dispatch.AttentionBackend"]
    problems = _missing_members(cls)
    if problems:
        return problems
    version = getattr(cls, "interface_version", None)
    if version != INTERFACE_VERSION:
        problems.append(
            f"{cls.__name__}.interface_version is {version!r}, and this attn-dispatch has "
            f"interface version {INTERFACE_VERSION}"
        )
    if not isinstance(getattr(cls, "capabilities", None), Capabilities):
        problems.append(f"{cls.__name__}.capabilities is not a Capabilities")
    problems += signature_problems(cls)
    optional = [name for name in OPTIONAL_ARGUMENTS if _is_given(cls, *OPTIONAL_ARGUMENTS[name])]
    for getter, base in _PARTS.items():
        try:
            part = getattr(cls, getter)()
        except Exception as error:  # a plug-in's getter may raise anything
            problems.append(f"{cls.__name__}.{getter}() raises {type(error).__name__}: {error}")
            continue
        if base is str:
            if not (isinstance(part, str) and re.fullmatch("[A-Z][A-Z0-9_]*", part)):
                problems.append(
                    f"{cls.__name__}.{getter}() is {part!r}; a name has only capitals, digits and "
                    "underscores"
                )
        elif not (isinstance(part, type) and issubclass(part, base)):
            problems.append(f"{cls.__name__}.{getter}() is not a subclass of {base.__name__}")
        else:
            problems += _missing_members(part) or signature_problems(part, optional=optional)
    return problems


_PARTS: dict[str, type] = {
    "get_name": str,
    "get_impl_cls": AttentionImpl,
    "get_metadata_cls": AttentionMetadata,
    "get_builder_cls": AttentionMetadataBuilder,
    "get_state_cls": AttentionState,
}


def _is_given(cls: type[AttentionBackend], field: str, value: Any) -> bool:
    """Whether a known device exists on which the backend may get this value of a field."""
    spec = AttentionSpec(num_heads=1, head_size=64, dtype=torch.float32)
    try:
        constraint = cls.capabilities.fields[field]
        return any(constraint.accepts(value, spec, each) for each in KNOWN_DEVICES.values())
    except Exception:  # a plug-in's constraint may raise anything; selection reports it
        return False


def _missing_members(cls: type) -> list[str]:
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if issubclass(cls, AttentionBackend):
        getters = {"name": "get_name", "impl_cls": "get_impl_cls"}  # the attribute, or its getter
        missing += [
            attribute
            for attribute, getter in getters.items()
            if not hasattr(cls, attribute)
            and inspect.getattr_static(cls, getter) is vars(AttentionBackend)[getter]
        ]
    return [f"{cls.__name__} does not implement {', '.join(missing)}"] if missing else []


def resolve_full_cls_name(full_cls_name: str | tuple[str, str]) -> type[AttentionBackend]:
    """The backend class behind "package.module:Class" or behind (module, class).

    Raises:
        InvalidInputError: the name has neither form.
        BackendFailure: the module cannot be imported, or the class is not a backend.
    """
    module_name, class_name = _split(full_cls_name)
    try:
        cls = operator.attrgetter(class_name)(importlib.import_module(module_name))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plug-in's module may raise anything, SystemExit too
        raise BackendFailure(
            f"{module_name}:{class_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    problems = check_backend_class(cls)
    if problems:
        raise BackendFailure(f"{module_name}:{class_name} is not a backend: {'; '.join(problems)}.")
    backend_cls: type[AttentionBackend] = cls
    return backend_cls


def _split(full_cls_name: Any) -> tuple[str, str]:
    parts = full_cls_name if isinstance(full_cls_name, (tuple, list)) else ()
    if isinstance(full_cls_name, str):
        parts = full_cls_name.rsplit(":" if ":" in full_cls_name else ".", 1)
    if len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise InvalidInputError(f"{full_cls_name!r} is not of the form 'package.module:Class'.")
    return parts[0], parts[1]


class Registry:
    """Backends by name, in the order in which they were registered. Safe to use from threads."""

    def __init__(self, builtin: Mapping[str, Builtin]) -> None:
        self._lock = ForkSafeLock()
        self._builtin = {name: backend.target for name, backend in builtin.items()}
        self._targets: dict[str, str] | None = None
        self._loaded: dict[str, Candidate] = {}
        self._registered: dict[str, type[AttentionBackend]] = {}
        self._candidates: Mapping[str, Candidate] | None = None
        self._names: frozenset[str] | None = None

    def register(self, backend_cls: type[AttentionBackend]) -> None:
        """Add a backend class under its own name, in place of an earlier one.

        Raises:
            InvalidInputError: the class is not a backend; the message lists what is missing.
        """
        problems = check_backend_class(backend_cls)
        if problems:
            raise InvalidInputError(f"Not registered: {'; '.join(problems)}.")
        with self._lock:
            self._registered[backend_cls.get_name()] = backend_cls
            self._changed()

    def unregister(self, name: str) -> None:
        """Undo `register`.

        Raises:
            InvalidInputError: no class was registered under this name.
        """
        with self._lock:
            if self._registered.pop(name, None) is None:
                raise InvalidInputError(f"{name!r} was not registered by register_backend.")
            self._changed()

    def _changed(self) -> None:
        self._candidates = self._names = None
        changed()

    def names(self) -> frozenset[str]:
        """Every registered name."""
        names = self._names
        if names is None:
            with self._lock:
                names = self._names = frozenset([*self._all_targets(), *self._registered])
        return names

    def _all_targets(self) -> dict[str, str]:
        with self._lock:
            if self._targets is None:
                # An entry point cannot replace a built-in backend; only register() can.
                self._targets = {**_entry_points(), **self._builtin}
            return self._targets

    def candidates(self) -> Mapping[str, Candidate]:
        """Every registered backend, loaded, or with the reason why it could not be loaded."""
        candidates = self._candidates
        if candidates is None:
            # Without the lock: a module may register while another thread imports it.
            for name, target in self._all_targets().items():
                if name not in self._loaded:
                    limit = None if name in self._builtin else _PLUGIN_SECONDS
                    self._loaded[name] = _load(name, target, limit)
            with self._lock:
                found = {name: self._loaded[name] for name in self._all_targets()}
                for name, cls in self._registered.items():
                    found[name] = Candidate(name, ":".join(cls.full_cls_name()), cls)
                candidates = self._candidates = MappingProxyType(found)
        return candidates

    def library_names(self) -> tuple[str, ...]:
        """The libraries that decide on backends: LIBRARIES, and what plug-ins require."""
        classes = (candidate.backend_cls for candidate in self.candidates().values())
        required = (r for cls in classes if cls is not None for r in cls.capabilities.requires)
        return tuple(dict.fromkeys([*LIBRARIES, *map(library_name, required)]))


def _entry_points() -> dict[str, str]:
    try:
        found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    except Exception as error:  # one malformed record of any package makes the list unreadable
        warnings.warn(
            f"Plugins are not available: the installed packages' entry points cannot be read "
            f"({type(error).__name__}: {error}). Reinstall the package that was installed last.",
            stacklevel=2,
        )
        return {}
    return {point.name: point.value for point in found}


def _load(name: str, target: str, limit: float | None) -> Candidate:
    try:
        cls = resolve_full_cls_name(target) if limit is None else _resolve_within(limit, target)
        if cls.get_name() != name:
            raise BackendFailure(f"{target} calls itself {cls.get_name()!r}, not {name!r}")
    except (BackendFailure, InvalidInputError) as error:
        reason = Reason(
            code=ReasonCode.LOAD,
            field="backend",
            asked=str(error),
            hint="repair or uninstall the package that brings it",
        )
        if limit is not None:
            logger.warning("plug-in %s is not available: %s", name, error)
        return Candidate(name, target, None, reason)
    if limit is not None:
        logger.info("plug-in %s loaded from %s", name, target)
    return Candidate(name, target, cls)


def _resolve_within(seconds: float, target: str) -> type[AttentionBackend]:
    """The class behind a name, imported by a thread that is abandoned after this time."""
    outcome: list[type[AttentionBackend] | BaseException] = []

    def resolve() -> None:
        try:
            outcome.append(resolve_full_cls_name(target))
        except BaseException as error:  # raised below, in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=resolve, name=f"import of {target}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise BackendFailure(f"the import of {target} did not end within {seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


#: The registry that the library uses.
registry = Registry(BUILTIN)


def register_backend(backend_cls: type[AttentionBackend]) -> type[AttentionBackend]:
    """Register a backend class; usable as a decorator.

    Raises:
        InvalidInputError: the class lacks members, capabilities or the right interface version.
    """
    registry.register(backend_cls)
    return backend_cls
