"""The files of tables, and which of them apply here: those of this device and these versions."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import warnings
from pathlib import Path

from attn_dispatch import environment
from attn_dispatch.errors import InvalidInputError, summary_of
from attn_dispatch.files import replace_file
from attn_dispatch.log import logger
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.timings.reader import parse_text, read_table
from attn_dispatch.selection.timings.table import Machine, Table
from attn_dispatch.selection.version import changed
from attn_dispatch.version import __version__

__all__ = [
    "TuningWarning",
    "cache_folder",
    "conflict_with",
    "cpu_model",
    "driver_version",
    "forget_tables",
    "machine_of",
    "shipped_path",
    "table_path",
    "tables_for",
    "write_table",
]

_SHIPPED = Path(__file__).parent

#: Libraries that compute no attention here, so that their versions change no time.
_WITHOUT_EFFECT = {"transformers"}

#: Of the digest in a file's name.
_DIGITS = 12

#: Files with the version of the driver, by vendor.
_DRIVER_FILES = {"nvidia": "/proc/driver/nvidia/version", "amd": "/sys/module/amdgpu/version"}


class TuningWarning(UserWarning):
    """A table of times was set aside; selection goes on without it."""


def driver_version(vendor: str) -> str | None:
    """The version of the kernel's driver, or None if the system does not state it."""
    path = _DRIVER_FILES.get(vendor)
    return None if path is None else _found_in(path, r"\b(\d+(?:\.\d+)+)\b")


def _found_in(path: str, pattern: str) -> str | None:
    """The group that a pattern finds in a file of the system, or None."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else None


def machine_of(device: DeviceProfile) -> Machine:
    """Everything that times measured on this device depend on."""
    versions = {
        name: version
        for name in registry.library_names()
        if name not in _WITHOUT_EFFECT and (version := device.library(name).version) is not None
    } | {"attn_dispatch": __version__}
    if device.vendor == "cpu":  # its profile is the same for all CPUs
        versions["cpu"] = f"{cpu_model()}, {os.cpu_count()} processors"
    pairs = tuple(sorted(versions.items()))
    return Machine(device.name, device.arch, driver_version(device.vendor), pairs)


def cpu_model() -> str:
    """The name of the processor, or its architecture if the system does not state it."""
    return _found_in("/proc/cpuinfo", r"^model name\s*: *(.+)$") or platform.machine()


def cache_folder() -> Path:
    """The folder for the tables that are measured on this machine.

    Raises:
        InvalidInputError: this user has none: there is no home directory.
    """
    given = environment.cache_folder()
    if given:
        return Path(given)
    try:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("attn-dispatch", appauthor=False))
        if not folder.is_absolute():  # "~" without a home stays "~"
            raise ValueError(f"{folder} is not a full path")
    except Exception as error:  # platformdirs may raise anything
        raise InvalidInputError(
            f"This user has no cache folder ({summary_of(error)}). Set "
            f"{environment.CACHE_FOLDER.name} to a folder."
        ) from error
    return folder


def _stem(machine: Machine) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-") or "device"


def table_path(machine: Machine) -> Path:
    """The file in the cache for times that are measured on such a machine.

    Raises:
        InvalidInputError: as for `cache_folder`.
    """
    text = json.dumps(machine.asdict(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    return cache_folder() / "tuning" / f"{_stem(machine)}-{digest}.json"


def shipped_path(machine: Machine) -> Path:
    """The file in this package for a device; it may not exist."""
    return _SHIPPED / f"{_stem(machine)}.json"


def conflict_with(table: Table, machine: Machine, *, shipped: bool = False) -> str:
    """The reason why a table does not apply to a machine, or "".

    A table of this machine applies to exactly its versions and its driver. A shipped one applies
    to the same minor release of every library that is installed, and to any driver.
    """
    own = table.machine
    if (own.device, own.arch) != (machine.device, machine.arch):
        return f"it is of {own.device} ({own.arch}), and this is {machine.device} ({machine.arch})"
    then, now = dict(own.versions), dict(machine.versions)
    if shipped:
        names = sorted((then.keys() & now.keys()) - {"attn_dispatch"})
        then, now = ({name: _minor(each[name]) for name in names} for each in (then, now))
        now = {n: then[n] if version == "unknown" else version for n, version in now.items()}
    elif own.driver != machine.driver:
        return f"it was measured with driver {own.driver}, and here is {machine.driver}"
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            here = f"here is {now[name]}" if name in now else "here is none"
            return f"it was measured with {name} {then.get(name, 'missing')}, and {here}"
    return ""


def _minor(version: str) -> str:
    return ".".join(version.partition("+")[0].split(".")[:2])


def tables_for(device: DeviceProfile) -> tuple[Table, ...]:
    """The tables that apply to a device now, in the order in which they are consulted.

    ATTN_DISPATCH_TUNING names the only table, or is `off`. Otherwise: the table that was measured
    on this machine, then the one of this package. Each file is read once in a process. One that is
    corrupt, of another device or stale is set aside, with a TuningWarning.
    """
    setting = environment.tuning()
    if setting.lower() == "off":
        return ()
    return _tables_for(device, setting, environment.cache_folder())


@functools.lru_cache(maxsize=64)
def _tables_for(device: DeviceProfile, named: str, _folder: str) -> tuple[Table, ...]:
    """As above; `cache_folder` depends on `_folder`."""
    machine = machine_of(device)
    if named:
        return _usable(Path(named), machine)
    found, shipped = _measured_here(machine), shipped_path(machine)
    if os.path.isfile(shipped):
        found += _usable(shipped, machine, shipped=True)
    return found


def _measured_here(machine: Machine) -> tuple[Table, ...]:
    """The table in the cache; none if the folder is missing or cannot be read."""
    try:
        own = table_path(machine)
    except InvalidInputError:
        return ()
    found = _usable(own, machine) if os.path.isfile(own) else ()  # Path.is_file may raise
    if not found:
        _warn_of_stale(own, machine)
    return found


def _usable(path: Path, machine: Machine, *, shipped: bool = False) -> tuple[Table, ...]:
    try:
        table = read_table(path, f"shipped with attn-dispatch {__version__}" if shipped else None)
    except InvalidInputError as error:
        _warn(f"{error} It is set aside. {_REMEDY}")
        return ()
    problem = conflict_with(table, machine, shipped=shipped)
    if problem and not shipped:  # newer versions than the shipped ones are no mistake
        _warn(f"The table {path} does not apply here: {problem}. It is set aside. {_REMEDY}")
    return () if problem else (table,)


_REMEDY = "Measure again by `attn-dispatch tune`, or set ATTN_DISPATCH_TUNING=off."


def _warn_of_stale(own: Path, machine: Machine) -> None:
    """Warn if this device was measured with other versions only."""
    if dict(machine.versions).get("torch", "unknown") == "unknown":
        return  # a device that is not in this machine
    form = re.compile(f"{re.escape(_stem(machine))}-[0-9a-f]{{{_DIGITS}}}\\.json")
    try:
        names = sorted(filter(form.fullmatch, os.listdir(own.parent)))
    except OSError:
        return
    if names and own.name not in names:
        _usable(own.parent / names[0], machine)


_warned: set[str] = set()


def _warn(text: str) -> None:
    """Each warning is given once in a process."""
    if text not in _warned:
        _warned.add(text)
        logger.warning(text)
        warnings.warn(text, TuningWarning, stacklevel=2)


def forget_tables() -> None:
    """Read the files again when they are needed next: one was written."""
    _tables_for.cache_clear()
    changed()


def write_table(table: Table, path: Path) -> None:
    """Write a table so that a reader finds the old file or the new one, and never a part.

    Raises:
        InvalidInputError: the file cannot be written, or could not be read: it is too large.
    """
    text = _text_of(table)
    parse_text(text.encode(), str(path))
    replace_file(path, text)


def _text_of(table: Table) -> str:
    """JSON with one point on a line, so that people can compare files."""
    data = table.asdict()
    lists = {name: data.pop(name) for name in ("layers", "context_parallel") if name in data}
    head = json.dumps(data, indent=1, allow_nan=False).removesuffix("\n}")
    parts = []
    for name, layers in lists.items():
        texts = []
        for layer in layers:
            points = ",\n  ".join(json.dumps(point, allow_nan=False) for point in layer["points"])
            rest = {key: value for key, value in layer.items() if key != "points"}
            rest_text = json.dumps(rest, allow_nan=False).removesuffix("}")
            texts.append(f'{rest_text},\n "points": [\n  {points}]}}')
        parts.append(f',\n "{name}": [{", ".join(texts)}]')
    return f"{head}{''.join(parts)}\n}}\n"
