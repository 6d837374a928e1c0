"""`attn-dispatch doctor`: what this machine has, what works on it, and what would help."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_dispatch import __version__
from attn_dispatch.cli.output import (
    facts_table,
    make_console,
    noise_to_stderr,
    print_json,
    text_table,
)
from attn_dispatch.errors import AttnDispatchError, BackendFailure

if TYPE_CHECKING:
    from rich.console import Console

    from attn_dispatch.capability import Reason
    from attn_dispatch.device import DeviceProfile

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
        _print(make_console(), found)


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
    from attn_dispatch.libraries import import_library, installed_libraries
    from attn_dispatch.registry import registry

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
    from attn_dispatch.device import detect_device, known_device

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
    return {name: value for name, value in profile.asdict().items() if name != "libraries"}


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
    from attn_dispatch.overrides import Source, parse_override
    from attn_dispatch.registry import registry

    parse_override(backend_override(), Source.ENVIRONMENT, registry.names())


def _read_vllm_backend() -> None:
    from attn_dispatch.environment import vllm_backend_override
    from attn_dispatch.overrides import Source, parse_override
    from attn_dispatch.registry import registry

    parse_override(vllm_backend_override(), Source.VLLM_ENVIRONMENT, registry.names())


def _read_check() -> None:
    from attn_dispatch.environment import check_mode

    check_mode()


#: How the library reads each of environment.VARIABLES; raises where it would not understand it.
READERS: dict[str, Callable[[], None]] = {
    "ATTN_DISPATCH_BACKEND": _read_backend,
    "VLLM_ATTENTION_BACKEND": _read_vllm_backend,
    "ATTN_DISPATCH_CHECK": _read_check,
}


def _backends(profiles: dict[str, DeviceProfile]) -> list[dict[str, Any]]:
    """Every registered backend, and for each device why it cannot run there, if it cannot."""
    from attn_dispatch.capability import compare_availability
    from attn_dispatch.libraries import library_name
    from attn_dispatch.registry import Candidate, registry

    def refusals(candidate: Candidate, profile: DeviceProfile) -> list[Reason]:
        if candidate.backend_cls is None:
            return [] if candidate.problem is None else [candidate.problem]
        return compare_availability(candidate.backend_cls.capabilities, profile)

    found = []
    for name, candidate in registry.candidates().items():
        cls = candidate.backend_cls
        needs = [] if cls is None else [library_name(r) for r in cls.capabilities.requires]
        reasons = {device: refusals(candidate, profile) for device, profile in profiles.items()}
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


def _gains(backends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to do to gain which backend where: the hints of refusals that a hint can lift."""
    gains: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for backend in backends:
        for device, verdict in backend["devices"].items():
            hints = [reason["hint"] for reason in verdict["reasons"]]
            if hints and all(hints):
                todo = tuple(dict.fromkeys(hints))
                gains.setdefault(todo, {}).setdefault(backend["name"], []).append(device)
    return [{"do": list(todo), "gains": gained} for todo, gained in gains.items()]


def _print(console: Console, found: dict[str, Any]) -> None:
    versions = found["versions"]
    gpu_runtime = " ".join(f"{name} {versions[name]}" for name in ("cuda", "hip") if versions[name])
    facts = facts_table()
    facts.add_row("attn-dispatch", versions["attn_dispatch"])
    facts.add_row("Python", f"{versions['python']} on {versions['platform']}")
    facts.add_row("PyTorch", f"{versions['torch'] or 'cannot be imported'} {gpu_runtime}".strip())
    console.print(facts)
    _print_devices(console, found["devices"])
    _print_libraries(console, found["libraries"])
    _print_environment(console, found["environment"])
    _print_backends(console, found["backends"])
    _print_gains(console, found["gains"])


def _print_devices(console: Console, devices: list[dict[str, Any]]) -> None:
    _title(console, "Devices")
    table = text_table("Device", "Arch", "Name and memory", narrow=2)
    for device in devices:
        if "error" in device:
            table.add_row(device["device"], "", device["error"], style="red")
        else:
            table.add_row(device["device"], device["arch"], ", ".join(_device_facts(device)))
    console.print(table)


def _device_facts(device: dict[str, Any]) -> list[str]:
    facts = [device["name"]]
    if device["num_sms"]:
        facts.append(f"{device['num_sms']} {'CUs' if device['vendor'] == 'amd' else 'SMs'}")
    if device["memory_bandwidth"]:
        facts.append(f"{device['memory_bandwidth'] / 1e12:.3g} TB/s")
    if device["l2_bytes"]:
        facts.append(f"{device['l2_bytes'] >> 20} MiB L2")
    if device["shared_memory_bytes"]:
        facts.append(f"{device['shared_memory_bytes'] >> 10} KiB shared memory")
    return facts


def _print_libraries(console: Console, libraries: list[dict[str, Any]]) -> None:
    _title(console, "Libraries")
    styles = {"ok": "green", "broken": "red", "missing": "dim"}
    table = text_table("Library", "State", "Version", "Needed by", narrow=2)
    for library in libraries:
        state = library["state"]
        table.add_row(
            library["name"],
            state,
            library["version"] or "",
            ", ".join(library["needed_by"]),
            style=styles[state],
        )
    console.print(table)
    _print_points(console, [(lib["name"], lib["error"]) for lib in libraries if lib["error"]])


def _print_environment(console: Console, variables: list[dict[str, Any]]) -> None:
    _title(console, "Environment variables")
    table = text_table("Variable", "State", "Value", narrow=2)
    for variable in variables:
        if variable["error"]:
            table.add_row(variable["name"], "wrong", variable["value"], style="red")
        elif variable["value"]:
            table.add_row(variable["name"], "ok", variable["value"], style="green")
        else:
            default = variable["default"].removeprefix("unset").removeprefix(": ")
            table.add_row(variable["name"], "not set", default, style="dim")
    console.print(table)
    _print_points(console, [(v["error"], "") for v in variables if v["error"]])


def _print_backends(console: Console, backends: list[dict[str, Any]]) -> None:
    _title(console, "Backends")
    groups = _alike(backends)
    table = text_table("Backend", *map(_range, groups))
    for backend in backends:
        verdicts = [backend["devices"][group[0]]["usable"] for group in groups]
        style = "" if any(verdicts) else "dim"
        table.add_row(backend["name"], *("usable" if v else "no" for v in verdicts), style=style)
    console.print(table)
    points: dict[tuple[str, str], list[str]] = {}
    for backend in backends:
        for group in groups:
            for message in _main_reasons(backend["devices"][group[0]]["reasons"]):
                points.setdefault((backend["name"], message), []).append(_range(group))
    _print_points(
        console,
        [
            (name if len(where) == len(groups) else f"{name} on {', '.join(where)}", message)
            for (name, message), where in points.items()
        ],
    )


def _alike(backends: list[dict[str, Any]]) -> list[list[str]]:
    """The devices, those together that are the same to every backend."""
    groups: dict[str, list[str]] = {}
    for device in backends[0]["devices"]:
        verdicts = repr([backend["devices"][device] for backend in backends])
        groups.setdefault(verdicts, []).append(device)
    return list(groups.values())


def _range(devices: list[str]) -> str:
    """["cuda:0", "cuda:1"] -> "cuda:0-1"; whatever is no such row is listed."""
    kind, _, first = devices[0].partition(":")
    row = [f"{kind}:{index}" for index in range(int(first or 0), int(first or 0) + len(devices))]
    if len(devices) > 1 and row == devices:
        return f"{devices[0]}-{devices[-1].partition(':')[2]}"
    return ", ".join(devices)


def _main_reasons(reasons: list[dict[str, str]]) -> list[str]:
    """What to tell people: where the device is wrong, libraries are beside the point."""
    wrong_device = [reason for reason in reasons if reason["code"] == "device"]
    return [reason["message"] for reason in wrong_device or reasons]


def _print_gains(console: Console, gains: list[dict[str, Any]]) -> None:
    _title(console, "What would help")
    if not gains:
        console.print("Nothing: no backend that runs on these devices lacks a library.")
        return
    table = text_table("Do this", "To gain", narrow=0)
    for gain in gains:
        gained = [f"{name} on {_range(devices)}" for name, devices in gain["gains"].items()]
        table.add_row("\n".join(gain["do"]), "\n".join(gained))
    console.print(table)


def _title(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold underline")


def _print_points(console: Console, points: list[tuple[str, str]]) -> None:
    """A list of `- subject: text`, each of which goes on under its own beginning."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(overflow="fold")
    for subject, text in points:
        table.add_row("-", Text.assemble((subject, "bold"), ": ", text) if text else subject)
    if points:
        console.print(table)
