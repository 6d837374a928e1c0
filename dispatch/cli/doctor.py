"""`attn-dispatch doctor`: what this machine has, what works on it, and what would help."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_dispatch import environment
from attn_dispatch.cli.doctor_report import print_diagnosis
from attn_dispatch.cli.options import AsJson
from attn_dispatch.cli.output import make_console, noise_to_stderr, print_json
from attn_dispatch.errors import AttnDispatchError, BackendFailure, InvalidInputError
from attn_dispatch.version import __version__

if TYPE_CHECKING:
    from attn_dispatch.interface.capability import Reason
    from attn_dispatch.platforms.device import DeviceProfile
    from attn_dispatch.selection.registry import Candidate

__all__ = ["diagnose", "doctor"]

#: Integrations with a PLUGIN for an engine.
ENGINES = ("vllm", "sglang")


def doctor(as_json: AsJson = False) -> None:
    """Show this machine's devices, libraries and backends, what does not work, and why.

    Imports every installed optional library, to find out whether it works.
    """
    with noise_to_stderr():
        found = diagnose()
    if as_json:
        print_json(found)
    else:
        print_diagnosis(make_console(), found)


def diagnose() -> dict[str, Any]:
    """Everything that `doctor` shows, as JSON-ready data."""
    libraries = _libraries()  # first, because broken libraries affect everything below
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
        "context_parallel": _context_parallel(profiles),
        "backends": backends,
        "gains": _gains(backends),
        "slow": _slow(profiles),
        "engines": _engines(),
    }


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {
        "attn_dispatch": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    } | dict.fromkeys(("torch", "cuda", "hip"))
    with contextlib.suppress(Exception):  # the error is shown with the libraries
        import torch

        found |= {
            "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip
        }  # fmt: skip
    return found


def _libraries() -> list[dict[str, Any]]:
    from attn_dispatch.platforms.libraries import import_library, installed_libraries
    from attn_dispatch.selection.registry import registry

    names = registry.library_names()
    for library in installed_libraries(names):
        if library.version is not None:
            with contextlib.suppress(BackendFailure):  # recorded, and read below
                import_library(library.name)
    found = []
    for library in installed_libraries(names):
        state = "missing" if library.version is None else "broken" if library.error else "ok"
        error = library.error if state == "broken" else None
        found.append(
            {"name": library.name, "state": state, "version": library.version, "error": error}
        )
    return found


def _devices() -> tuple[list[dict[str, Any]], dict[str, DeviceProfile]]:
    """The devices of this machine, the default one first, and the profiles of those that work."""
    from attn_dispatch.platforms.detect import detect_device
    from attn_dispatch.platforms.known_devices import known_device

    try:
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        count = 0 if accelerator is None else torch.accelerator.device_count()
        names = [f"{accelerator}:{index}" for index in range(count)]
    except Exception as error:  # a broken driver or torch; the rest can still be diagnosed
        entry = {"device": "accelerator", "error": f"{type(error).__name__}: {error}"}
        cpu = known_device("cpu")
        return [entry, {"device": "cpu", **_hardware(cpu)}], {"cpu": cpu}
    devices, profiles = [], {}
    for name in (*names, "cpu"):
        try:
            profiles[name] = detect_device(name)
        except AttnDispatchError as error:
            devices.append({"device": name, "error": str(error)})
        else:
            devices.append({"device": name, **_hardware(profiles[name])})
    return devices, profiles


def _hardware(profile: DeviceProfile) -> dict[str, Any]:
    data = profile.asdict()
    del data["libraries"], data["other_libraries"]
    return data


def _environment() -> list[dict[str, Any]]:
    found = []
    for variable in environment.VARIABLES:
        error = None
        try:
            READERS[variable.name]()
        except AttnDispatchError as problem:
            error = str(problem)
        facts = {key: getattr(variable, key) for key in ("name", "value", "default", "form")}
        found.append({**facts, "error": error})
    return found


def _read_override(text: str, source: str) -> None:
    from attn_dispatch.selection.overrides import Source, parse_override
    from attn_dispatch.selection.registry import registry

    parse_override(text, Source[source], registry.names())


def _read_tuning() -> None:
    from attn_dispatch.selection.timings.reader import read_table

    if (path := environment.tuning()).lower() not in ("", "off"):
        read_table(Path(path))


def _read_cache_folder() -> None:
    name, folder = environment.CACHE_FOLDER.name, environment.cache_folder()
    if not folder or not os.path.lexists(folder):
        return
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise InvalidInputError(f"{name} is {folder!r}, a file. Give a folder.")
        os.listdir(folder)
    except OSError as error:
        raise InvalidInputError(
            f"{name} is {folder!r}, which cannot be read: {error.strerror}. Give a readable folder."
        ) from error


#: How each of environment.VARIABLES is read; a function raises if the value is invalid.
READERS: dict[str, Callable[[], object]] = {
    "ATTN_DISPATCH_BACKEND": lambda: _read_override(environment.backend_override(), "ENVIRONMENT"),
    "VLLM_ATTENTION_BACKEND": lambda: _read_override(
        environment.vllm_backend_override(), "VLLM_ENVIRONMENT"
    ),
    "ATTN_DISPATCH_CHECK": environment.check_mode,
    "ATTN_DISPATCH_TUNING": _read_tuning,
    "ATTN_DISPATCH_CACHE_DIR": _read_cache_folder,
}


def _tables(profiles: dict[str, DeviceProfile]) -> list[dict[str, Any]]:
    """The timing tables in use, each with its devices; a rejected table gives a warning."""
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


def _context_parallel(profiles: dict[str, DeviceProfile]) -> dict[str, Any]:
    """GPUs that ranks could share keys over, torchrun's ranks, and what is measured of groups."""
    from attn_dispatch.distributed.advice import tune_command
    from attn_dispatch.selection.timings.store import tables_for

    gpus = [name for name, profile in profiles.items() if profile.is_gpu]
    measured = {
        (key.ranks, key.transport): table.origin
        for profile in profiles.values()
        for table in reversed(tables_for(profile))
        for key in table.splits
    }
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {
        "gpus": gpus,
        "launch": {name: os.environ[name] for name in variables if name in os.environ},
        "measured": [
            {"ranks": ranks, "transport": transport, "from": origin}
            for (ranks, transport), origin in sorted(measured.items())
        ],
        "measure": tune_command(len(gpus)) if len(gpus) > 1 else None,
    }


def _backends(profiles: dict[str, DeviceProfile]) -> list[dict[str, Any]]:
    """Every registered backend, and for each device the reasons why it cannot run there."""
    from attn_dispatch.platforms.libraries import library_name
    from attn_dispatch.selection.registry import registry

    found = []
    for name, candidate in registry.candidates().items():
        cls = candidate.backend_cls
        needs = [] if cls is None else [library_name(r) for r in cls.capabilities.requires]
        reasons = {device: _obstacles(candidate, profile) for device, profile in profiles.items()}
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


def _obstacles(candidate: Candidate, profile: DeviceProfile) -> list[Reason]:
    """Why a backend cannot run any layer on a device; empty if it can run some."""
    import torch

    from attn_dispatch.interface.capability import ReasonCode, compare_availability
    from attn_dispatch.interface.spec import AttentionSpec
    from attn_dispatch.selection.selector import decide

    cls = candidate.backend_cls
    missing = [] if cls is None else compare_availability(cls.capabilities, profile)
    if missing:
        return missing
    # A backend that needs any of several libraries only checks them for a layer.
    plain = AttentionSpec(num_heads=8, head_size=128, dtype=torch.bfloat16)
    own = {candidate.name: candidate}
    (verdict,) = decide(plain, profile, phase=None, rules=(), candidates=own).verdicts
    is_absent = {r.code for r in verdict.reasons} <= {ReasonCode.LIBRARY, ReasonCode.LOAD}
    return list(verdict.reasons) if is_absent else []


def _gains(backends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to install to gain which backend where: the hints of the reasons, if all have one."""
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


def _engines() -> list[dict[str, Any]]:
    """Whether an engine is installed, whether it sees our plug-in, and what was tested with it."""
    modules = (importlib.import_module(f"attn_dispatch.integrations.{each}") for each in ENGINES)
    return [module.PLUGIN.status() for module in modules]


def _slow(profiles: dict[str, DeviceProfile]) -> list[dict[str, str]]:
    """The GPUs and kinds of layer that a reference backend, which is slow, would serve."""
    import torch

    from attn_dispatch.interface.spec import AttentionSpec, MLADims
    from attn_dispatch.selection.priorities import LAST_RESORT
    from attn_dispatch.selection.resolve import explain

    dims = MLADims(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    dtype = torch.bfloat16
    kinds = {
        "attention": AttentionSpec(
            num_heads=32, num_kv_heads=8, head_size=128, dtype=dtype, block_size=16
        ),
        "latent attention (MLA)": AttentionSpec.for_mla(
            num_heads=128, dtype=dtype, mla=dims, block_size=64
        ),
    }
    return [
        {"device": device, "layers": kind, "backend": report.picked}
        for device, profile in profiles.items()
        if profile.vendor != "cpu"
        for kind, spec in kinds.items()
        for report in explain(spec, profile)[:1]
        if report.picked in LAST_RESORT
    ]
