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
import threading
from dataclasses import dataclass
from types import ModuleType

from packaging.requirements import Requirement

from attn_dispatch.errors import BackendFailure

__all__ = [
    "LIBRARIES",
    "Library",
    "LibraryInfo",
    "generation",
    "import_library",
    "installed_libraries",
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
        LibraryInfo("flash_attn", ("flash-attn",), "pip install flash-attn --no-build-isolation"),
        LibraryInfo(
            "flash_attn_interface", ("flash-attn-3", "flash_attn_3"), "build it from source"
        ),
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
_lock = threading.Lock()


def generation() -> int:
    """Changes whenever a library turned out broken."""
    return len(_broken)


@functools.cache
def installed_libraries() -> tuple[Library, ...]:
    """Every library of LIBRARIES as it stands on this machine; nothing is imported."""
    return tuple(
        Library(info.module, _installed_version(info), _broken.get(info.module))
        for info in LIBRARIES.values()
    )


def _installed_version(info: LibraryInfo) -> str | None:
    try:
        if importlib.util.find_spec(info.module) is None:
            return None
    except (ImportError, ValueError):  # a half-loaded module without a spec counts as absent
        return None
    for distribution in info.distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def import_library(module: str) -> ModuleType:
    """Import a library, or a submodule of one, for use.

    Raises:
        BackendFailure: it is missing, or its import raised anything at all; the error is
            remembered and shown by `doctor` and by every later selection.
    """
    name = module.split(".", maxsplit=1)[0]
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken native library raises OSError, RuntimeError, anything
        summary = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        with _lock:
            _broken[name] = summary
            installed_libraries.cache_clear()
        raise BackendFailure(f"{module} cannot be imported here: {summary}") from error


def requirement_problem(requirement: str, library: Library) -> tuple[str, str] | None:
    """What stands between a library and a requirement such as "triton>=3.6": (fact, remedy)."""
    wanted = Requirement(requirement)
    info = LIBRARIES.get(wanted.name)
    remedy = f"{wanted.name}: {info.install}" if info else f"install {requirement}"
    if library.version is None:
        return "not installed", remedy
    if library.error is not None:
        return f"installed but broken: {library.error}", f"repair it ({remedy})"
    if library.version == "unknown" or wanted.specifier.contains(library.version, prereleases=True):
        return None
    return f"version {library.version}", f"install {requirement}"
