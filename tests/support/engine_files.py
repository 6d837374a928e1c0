"""The Python files of an engine's released wheel, unpacked, and imported one by one.

Importing a whole engine needs its kernels and its requirements. Here only modules that are named
are its own files; every other module is a stub, whose attributes accept any use.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

#: Where wheels and their files are kept, as `make contracts` states it; None elsewhere.
FOLDER = Path(os.environ["ENGINE_WHEELS"]) if os.environ.get("ENGINE_WHEELS") else None


def unpacked(package: str, version: str) -> Path:
    """The folder with the Python files of a release, which is downloaded once."""
    assert FOLDER is not None
    folder = FOLDER / f"{package}-{version}"
    if not (folder / package).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        wheels = list(folder.parent.glob(f"{package}-{version}-*.whl"))
        if not wheels:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d"]
            # Wheels for Linux: only their Python files are read.
            platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
            subprocess.run(
                [*command, str(folder.parent), *platform, f"{package}=={version}"], check=True
            )
            wheels = list(folder.parent.glob(f"{package}-{version}-*.whl"))
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(folder, [n for n in wheel.namelist() if n.endswith(".py")])
        wheels[0].unlink()  # hundreds of megabytes of kernels
    return folder


class _StubType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __call__(cls, *given: Any, **_: Any) -> Any:
        """A function is returned as it is, as by a decorator that does nothing."""
        if len(given) == 1 and callable(given[0]) and not isinstance(given[0], _StubType):
            return given[0]
        return cls


class Stub(metaclass=_StubType):
    """Anything of a module that is not executed."""


class _StubModule(ModuleType):
    def __init__(self, name: str, own: frozenset[str]) -> None:
        super().__init__(name)
        self.__dict__["own modules"] = own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        inner = f"{self.__name__}.{name}"
        if any(f"{each}.".startswith(f"{inner}.") for each in self.__dict__["own modules"]):
            return importlib.import_module(inner)
        return Stub


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of one package: its own files if they are named, else stubs."""

    def __init__(self, folder: Path, package: str, own: frozenset[str], values: dict[str, Any]):
        self.folder, self.package, self.own, self.values = folder, package, own, values

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != self.package:
            return None
        if name in self.own:
            base = self.folder.joinpath(*name.split("."))
            file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            search = [str(base)] if base.is_dir() else None
            return importlib.util.spec_from_file_location(
                name, file, submodule_search_locations=search
            )
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _StubModule(spec.name, self.own)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.values.get(module.__name__, {}))


@contextmanager
def imported(
    folder: Path, package: str, own: tuple[str, ...], values: dict[str, Any]
) -> Iterator[None]:
    """In this context, the package is importable from the folder.

    Args:
        folder: as `unpacked` returns it.
        package: the top package.
        own: its modules that are its own files.
        values: module -> what a stub has, by name.
    """

    def drop() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == package]
        return {name: sys.modules.pop(name) for name in names}

    before, finder = drop(), _Finder(folder, package, frozenset(own), values)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        drop()
        sys.modules.update(before)
