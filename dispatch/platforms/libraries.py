"""The optional libraries: which are installed, in which version, and which are broken.

Presence is read from the records of installed packages; nothing is imported. A broken library shows
only on import, so `import_library` records the failure, and selection rejects what needs it.
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

from attn_dispatch.errors import BackendFailure, summary_of

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
        LibraryInfo(
            "flash_mla", ("sgl-flash-mla", "flash-mla", "flash_mla"), "pip install sgl-flash-mla"
        ),
        LibraryInfo("flashinfer", ("flashinfer-python",), "pip install flashinfer-python"),
        LibraryInfo("aiter", ("aiter", "amd-aiter"), "build it from source, for ROCm"),
        LibraryInfo("transformers", ("transformers",), "pip install attn-dispatch[transformers]"),
    )
}


@dataclass(frozen=True)
class Library:
    """A library: a version if it is installed, an error if it is broken."""

    name: str
    version: str | None = None
    error: str | None = None

    @property
    def usable(self) -> bool:
        """Installed, and not known to be broken."""
        return self.version is not None and self.error is None


_broken: dict[str, str] = {}


def generation() -> int:
    """Changes whenever a library is found to be broken."""
    return len(_broken)


def library_name(requirement: str) -> str:
    """The module of a requirement such as "flash-attn>=2.8".

    A requirement names one of LIBRARIES by its module or package; any other library by its module.
    """
    name = Requirement(requirement).name
    for info in LIBRARIES.values():
        if canonicalize_name(name) in map(canonicalize_name, (info.module, *info.distributions)):
            return info.module
    return name.replace("-", "_").replace(".", "_")


def installed_libraries(names: Iterable[str] = LIBRARIES) -> tuple[Library, ...]:
    """These libraries on this machine; nothing is imported."""
    return tuple(map(installed_library, names))


def installed_library(name: str) -> Library:
    """A library on this machine; nothing is imported."""
    return Library(name, _installed_version(name), _broken.get(name))


@functools.cache
def _installed_version(name: str) -> str | None:
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except (ImportError, ValueError):  # a partly loaded module without a spec is missing
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
        module: its name.
        part: what is broken if the import fails; None for the whole library.

    Raises:
        BackendFailure: it is missing, or its import raised; `doctor` and every later selection
            show the error.
    """
    name = part or module.split(".", maxsplit=1)[0]
    try:
        return importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken library may raise OSError, SystemExit, ...
        _broken[name] = summary = summary_of(error)
        raise BackendFailure(f"{module} cannot be imported here: {summary}") from error


def error_of(name: str) -> str | None:
    """The error of importing a library, or a part of one; None if there was none so far."""
    return _broken.get(name)


class BrokenLibraryWarning(UserWarning):
    """A selected backend could not be built, because a library that it needs is broken."""


def requirement_problem(requirement: str, library: Library) -> tuple[str, str] | None:
    """Why a library does not meet a requirement such as "triton>=3.6": (fact, remedy), or None."""
    info = LIBRARIES.get(library_name(requirement))
    remedy = f"{info.module}: {info.install}" if info else f"install {requirement}"
    if library.version is None:
        return "not installed", remedy
    if library.error is not None:
        return f"installed but broken: {library.error}", f"repair it ({remedy})"
    try:
        version = Version(library.version)
    except InvalidVersion:  # "unknown", or a build's own scheme: accept it
        return None
    if Requirement(requirement).specifier.contains(version, prereleases=True):
        return None
    return f"version {library.version}", f"install {requirement}"
