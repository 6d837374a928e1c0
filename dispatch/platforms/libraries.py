"""The optional libraries: which are installed, in which version, and which turned out broken.

Presence is read from the installed packages' records, so nothing is imported. That a library is
there but broken shows only on import: whoever imports one does it by `import_library`, which
remembers a failure, so that selection refuses what needs it from then on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from attn_dispatch.errors import BackendFailure

__all__ = [
    "LIBRARIES",
    "BrokenLibraryWarning",
    "Library",
    "LibraryInfo",
    "error_of",
    "generation",
    "import_library",
    "installed_libraries",
    "installed_library",
    "library_name",
    "requirement_problem",
]


@dataclass(frozen=True)
class LibraryInfo:
    """An optional library: its module, the packages that bring it, how to get it."""

    module: str
    distributions: tuple[str, ...]
    install: str


LIBRARIES: dict[str, LibraryInfo] = {
    info.module: info
    for info in (
        LibraryInfo("torch", ("torch",), "pip install torch"),
        LibraryInfo(
            "triton",
            ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton"),
            "it comes with torch's CUDA and ROCm builds; on a CPU build: pip install triton",
        ),
        LibraryInfo(
            "flash_attn",
            # FlashAttention 4 is a part of the same module, and may be the only one there.
            ("flash-attn", "flash-attn-4"),
            "pip install flash-attn --no-build-isolation",
        ),
        LibraryInfo(
            "flash_attn_2_cuda",  # the compiled part of flash_attn, on ROCm too
            ("flash-attn",),
            "build flash-attn from source without FLASH_ATTENTION_TRITON_AMD_ENABLE",
        ),
        LibraryInfo(
            "flash_attn_interface", ("flash-attn-3", "flash_attn_3"), "build it from source"
        ),
        LibraryInfo("vllm", ("vllm",), "pip install vllm"),
        LibraryInfo("sgl_kernel", ("sgl-kernel",), "pip install sgl-kernel"),
        LibraryInfo(
            "cutlass", ("nvidia-cutlass-dsl",), "it comes with pip install --pre flash-attn-4"
        ),
        LibraryInfo("quack", ("quack-kernels",), "it comes with pip install --pre flash-attn-4"),
        LibraryInfo("flashinfer", ("flashinfer-python",), "pip install flashinfer-python"),
        LibraryInfo("aiter", ("aiter", "amd-aiter"), "build it from source, for ROCm"),
        LibraryInfo("transformers", ("transformers",), "pip install attn-dispatch[transformers]"),
    )
}


@dataclass(frozen=True)
class Library:
    """What is known of a library here: a version if installed, an error if it is broken."""

    name: str
    version: str | None = None
    error: str | None = None

    @property
    def usable(self) -> bool:
        """Installed, and not known to be broken."""
        return self.version is not None and self.error is None


_broken: dict[str, str] = {}


def generation() -> int:
    """Changes whenever a library turned out broken."""
    return len(_broken)


def library_name(requirement: str) -> str:
    """The module that a requirement such as "flash-attn>=2.8" speaks of.

    A requirement may name one of LIBRARIES by its module or by a package that brings it; any other
    library goes by the name of its module.
    """
    name = Requirement(requirement).name
    for info in LIBRARIES.values():
        if canonicalize_name(name) in map(canonicalize_name, (info.module, *info.distributions)):
            return info.module
    return name.replace("-", "_").replace(".", "_")


def installed_libraries(names: Iterable[str] = LIBRARIES) -> tuple[Library, ...]:
    """These libraries as they are on this machine; nothing is imported."""
    return tuple(map(installed_library, names))


def installed_library(name: str) -> Library:
    """A library as it is on this machine; nothing is imported."""
    return Library(name, _installed_version(name), _broken.get(name))


@functools.cache
def _installed_version(name: str) -> str | None:
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except (ImportError, ValueError):  # a half-loaded module without a spec counts as absent
        return None
    info = LIBRARIES.get(name)
    for distribution in (name,) if info is None else info.distributions:
        try:
            return importlib.metadata.version(distribution) or "unknown"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def import_library(module: str, part: str | None = None) -> ModuleType:
    """Import a library, or a submodule of one, for use.

    Args:
        module: which.
        part: what is broken if this fails; None for the whole library.

    Raises:
        BackendFailure: it is missing, or its import raised anything at all; the error is
            remembered and shown by `doctor` and by every later selection.
    """
    name = part or module.split(".", maxsplit=1)[0]
    try:
        return importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken library raises OSError, SystemExit, anything
        summary = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        _broken[name] = summary
        raise BackendFailure(f"{module} cannot be imported here: {summary}") from error


def error_of(name: str) -> str | None:
    """What the import of a library, or of a part of one, raised here; None if nothing has yet."""
    return _broken.get(name)


class BrokenLibraryWarning(UserWarning):
    """A backend was picked, and building it showed that a library that it needs is broken."""


def requirement_problem(requirement: str, library: Library) -> tuple[str, str] | None:
    """What stands between a library and a requirement such as "triton>=3.6": (fact, remedy)."""
    info = LIBRARIES.get(library_name(requirement))
    remedy = f"{info.module}: {info.install}" if info else f"install {requirement}"
    if library.version is None:
        return "not installed", remedy
    if library.error is not None:
        return f"installed but broken: {library.error}", f"repair it ({remedy})"
    try:
        version = Version(library.version)
    except InvalidVersion:  # "unknown", or a build's own invention: nothing speaks against it
        return None
    if Requirement(requirement).specifier.contains(version, prereleases=True):
        return None
    return f"version {library.version}", f"install {requirement}"
