"""How `attn-dispatch doctor` shows what it found to people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_dispatch.cli.output import facts_table, text_table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_diagnosis"]


def print_diagnosis(console: Console, found: dict[str, Any]) -> None:
    """Print what `doctor.diagnose` found.

    Args:
        console: where.
        found: its answer.
    """
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
    _print_tables(console, found["tables"])
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


def _print_tables(console: Console, tables: list[dict[str, Any]]) -> None:
    _title(console, "Measured times")
    if not tables:
        console.print(
            "None count here: the platform's order decides. `attn-dispatch tune` measures."
        )
        return
    rows = text_table("Device", "Layers", "Measured", "From", narrow=3)
    for table in tables:
        where = _range(table["devices"])
        rows.add_row(where, str(table["layers"]), table["measured"], table["from"])
    console.print(rows)


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
