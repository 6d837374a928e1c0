"""`attn-dispatch doctor`: what this machine has, what works on it, and what would help."""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch.cli.doctor_report import print_diagnosis
from attn_dispatch.cli.output import make_console, noise_to_stderr, print_json
from attn_dispatch.errors import AttnDispatchError, BackendFailure, InvalidInputError
from attn_dispatch.version import __version__

if TYPE_CHECKING:
    from attn_dispatch.interface.capability import Reason
    from attn_dispatch.platforms.device import DeviceProfile
    from attn_dispatch.selection.registry import Candidate

__all__ = ["diagnose", "register"]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="doctor")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Show this machine's devices, libraries and backends, what does not work, and why.

    Imports every optional library that is installed, to see whether it is whole.
    """
    with noise_to_stderr():
        found = diagnose()
    if as_json:
        print_json(found)
    else:
        print_diagnosis(make_console(), found)


def diagnose() -> dict[str, Any]:
    """Everything that `doctor` shows, as JSON-ready data."""
    libraries = _libraries()  # first: what turns out broken counts for all that follows
    devices, profiles = _devices()
    backends = _backends(profiles)
    needed: dict[str, list[str]] = {}
    for backend in backends:
        for name in backend["needs"]:
            needed.setdefault(name, []).append(backend["name"])
    return {
        "versions": _versions(),
        "devices": devices,
        "libraries": [{**lib, "needed_by": needed.get(lib["name"], [])} for lib in libraries],
        "environment": _environment(),
        "tables": _tables(profiles),
        "backends": backends,
        "gains": _gains(backends),
    }


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {
        "attn_dispatch": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": None,
        "cuda": None,
        "hip": None,
    }
    try:
        import torch
    except Exception:  # it is among the libraries, with its error
        return versions
    return {
        **versions,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _libraries() -> list[dict[str, Any]]:
    from attn_dispatch.platforms.libraries import import_library, installed_libraries
    from attn_dispatch.selection.registry import registry

    names = registry.library_names()
    for library in installed_libraries(names):
        if library.version is None:
            continue
        try:
            import_library(library.name)
        except BackendFailure:
            continue  # import_library has noted the error, which is read below
    states = []
    for library in installed_libraries(names):
        state = "missing" if library.version is None else "broken" if library.error else "ok"
        error = library.error if state == "broken" else None
        states.append(
            {"name": library.name, "state": state, "version": library.version, "error": error}
        )
    return states


def _devices() -> tuple[list[dict[str, Any]], dict[str, DeviceProfile]]:
    """The devices of this machine, the default one first, and the profiles of those that work."""
    from attn_dispatch.platforms.detect import detect_device
    from attn_dispatch.platforms.known_devices import known_device

    try:
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        count = 0 if accelerator is None else torch.accelerator.device_count()
        names = [f"{accelerator}:{index}" for index in range(count)]
    except Exception as error:  # a broken driver or torch; everything else is still worth a look
        entry = {"device": "accelerator", "error": f"{type(error).__name__}: {error}"}
        cpu = known_device("cpu")
        return [entry, {"device": "cpu", **_facts(cpu)}], {"cpu": cpu}
    devices, profiles = [], {}
    for name in (*names, "cpu"):
        try:
            profiles[name] = detect_device(name)
        except AttnDispatchError as error:
            devices.append({"device": name, "error": str(error)})
        else:
            devices.append({"device": name, **_facts(profiles[name])})
    return devices, profiles


def _facts(profile: DeviceProfile) -> dict[str, Any]:
    hardware = profile.asdict()
    del hardware["libraries"], hardware["other_libraries"]
    return hardware


def _environment() -> list[dict[str, Any]]:
    from attn_dispatch.environment import VARIABLES

    found = []
    for variable in VARIABLES:
        value, error = variable.value, None
        try:
            READERS[variable.name]()
        except AttnDispatchError as problem:
            error = str(problem)
        found.append(
            {
                "name": variable.name,
                "value": value,
                "default": variable.default,
                "form": variable.form,
                "error": error,
            }
        )
    return found


def _read_backend() -> None:
    from attn_dispatch.environment import backend_override
    from attn_dispatch.selection.overrides import Source, parse_override
    from attn_dispatch.selection.registry import registry

    parse_override(backend_override(), Source.ENVIRONMENT, registry.names())


def _read_vllm_backend() -> None:
    from attn_dispatch.environment import vllm_backend_override
    from attn_dispatch.selection.overrides import Source, parse_override
    from attn_dispatch.selection.registry import registry

    parse_override(vllm_backend_override(), Source.VLLM_ENVIRONMENT, registry.names())


def _read_check() -> None:
    from attn_dispatch.environment import check_mode

    check_mode()


def _read_tuning() -> None:
    from attn_dispatch.environment import tuning
    from attn_dispatch.selection.timings.reader import read_table

    if tuning().lower() not in ("", "off"):
        read_table(Path(tuning()))


def _read_cache_folder() -> None:
    from attn_dispatch.environment import CACHE_FOLDER, cache_folder

    given = cache_folder()
    if not given or not os.path.lexists(given):
        return
    try:
        if not stat.S_ISDIR(os.stat(given).st_mode):
            raise InvalidInputError(f"{CACHE_FOLDER.name} is {given!r}, a file. Give a folder.")
        os.listdir(given)
    except OSError as error:
        raise InvalidInputError(
            f"{CACHE_FOLDER.name} is {given!r}, which cannot be looked into: {error.strerror}. "
            "Give a folder that can be."
        ) from error


#: How the library reads each of environment.VARIABLES; raises where it would not understand it.
READERS: dict[str, Callable[[], None]] = {
    "ATTN_DISPATCH_BACKEND": _read_backend,
    "VLLM_ATTENTION_BACKEND": _read_vllm_backend,
    "ATTN_DISPATCH_CHECK": _read_check,
    "ATTN_DISPATCH_TUNING": _read_tuning,
    "ATTN_DISPATCH_CACHE_DIR": _read_cache_folder,
}


def _tables(profiles: dict[str, DeviceProfile]) -> list[dict[str, Any]]:
    """The tables of measured times that count, each with the devices for which it does.

    One that is set aside is told by a warning.
    """
    from attn_dispatch.selection.timings.store import tables_for

    tables: dict[str, dict[str, Any]] = {}
    for device, profile in profiles.items():
        for table in tables_for(profile):
            facts = {
                "from": table.origin,
                "measured": table.measured,
                "layers": len(table.layers),
                "devices": [],
            }
            tables.setdefault(table.origin, facts)["devices"].append(device)
    return list(tables.values())


def _backends(profiles: dict[str, DeviceProfile]) -> list[dict[str, Any]]:
    """Every registered backend, and for each device why it cannot run there, if it cannot."""
    from attn_dispatch.platforms.libraries import library_name
    from attn_dispatch.selection.registry import registry

    found = []
    for name, candidate in registry.candidates().items():
        cls = candidate.backend_cls
        needs = [] if cls is None else [library_name(r) for r in cls.capabilities.requires]
        reasons = {device: _refusals(candidate, profile) for device, profile in profiles.items()}
        found.append(
            {
                "name": name,
                "target": candidate.target,
                "needs": needs,
                "devices": {
                    device: {"usable": not why, "reasons": [reason.asdict() for reason in why]}
                    for device, why in reasons.items()
                },
            }
        )
    return found


def _refusals(candidate: Candidate, profile: DeviceProfile) -> list[Reason]:
    """Why a backend cannot run on a device at all, whatever the layer; nothing if it can."""
    import torch

    from attn_dispatch.interface.capability import ReasonCode, compare_availability
    from attn_dispatch.interface.spec import AttentionSpec
    from attn_dispatch.selection.selector import decide

    cls = candidate.backend_cls
    missing = [] if cls is None else compare_availability(cls.capabilities, profile)
    if missing:
        return missing
    # One that needs any of several libraries tells only when it is asked for a layer.
    plain = AttentionSpec(num_heads=8, head_size=128, dtype=torch.bfloat16)
    own = {candidate.name: candidate}
    (verdict,) = decide(plain, profile, phase=None, rules=(), candidates=own).verdicts
    is_absent = {r.code for r in verdict.reasons} <= {ReasonCode.LIBRARY, ReasonCode.LOAD}
    return list(verdict.reasons) if is_absent else []


def _gains(backends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to do to gain which backend where: the hints of refusals that a hint can lift."""
    gains: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for backend in backends:
        for device, verdict in backend["devices"].items():
            hints = [reason["hint"] for reason in verdict["reasons"]]
            if hints and all(hints):
                todo = tuple(dict.fromkeys(hints))
                if not {reason["field"] for reason in verdict["reasons"]} & set(backend["needs"]):
                    todo = (f"what one of these needs: {'; '.join(todo)}",)
                gains.setdefault(todo, {}).setdefault(backend["name"], []).append(device)
    return [{"do": list(todo), "gains": gained} for todo, gained in gains.items()]
