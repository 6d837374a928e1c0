"""How `attn-dispatch doctor` prints what it found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_dispatch.cli.output import facts_table, text_table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_diagnosis"]


def print_diagnosis(console: Console, found: dict[str, Any]) -> None:
    """Print the data of `doctor.diagnose`."""
    versions = found["versions"]
    gpu_runtime = " ".join(f"{name} {versions[name]}" for name in ("cuda", "hip") if versions[name])
    facts = facts_table()
    facts.add_row("attn-dispatch", versions["attn_dispatch"])
    facts.add_row("Python", f"{versions['python']} on {versions['platform']}")
    facts.add_row("PyTorch", f"{versions['torch'] or 'cannot be imported'} {gpu_runtime}".strip())
    console.print(facts)
    for title, print_section in (
        ("Devices", _print_devices),
        ("Libraries", _print_libraries),
        ("Environment variables", _print_environment),
        ("Measured times", _print_tables),
        ("Context parallelism", _print_context_parallel),
        ("Backends", _print_backends),
        ("Engines", _print_engines),
        ("What would help", _print_gains),
    ):
        console.print()
        console.print(title, style="bold underline")
        print_section(console, found)
    for each in found["slow"]:
        console.print()
        console.print(
            f"Warning: on {each['device']}, {each['layers']} goes to {each['backend']}, which is "
            "for correctness and slow. Install what would help, or see why: attn-dispatch explain "
            "--verbose.",
            style="yellow",
        )
    console.print()
    console.print("Next: attn-dispatch explain --config config.json, for a model's picks here.")


def _print_devices(console: Console, found: dict[str, Any]) -> None:
    table = text_table("Device", "Arch", "Name and memory", narrow=2)
    for device in found["devices"]:
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


def _print_libraries(console: Console, found: dict[str, Any]) -> None:
    libraries = found["libraries"]
    styles = {"ok": "green", "broken": "red", "missing": "dim"}
    table = text_table("Library", "State", "Version", "Needed by", narrow=2)
    for lib in libraries:
        users, state = ", ".join(lib["needed_by"]), lib["state"]
        table.add_row(lib["name"], state, lib["version"] or "", users, style=styles[state])
    console.print(table)
    _print_points(console, [(lib["name"], lib["error"]) for lib in libraries if lib["error"]])


def _print_environment(console: Console, found: dict[str, Any]) -> None:
    variables = found["environment"]
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


def _print_tables(console: Console, found: dict[str, Any]) -> None:
    if not found["tables"]:
        console.print(
            "None for these devices: the platform's order decides. `attn-dispatch tune` measures."
        )
        return
    rows = text_table("Device", "Layers", "Measured", "From", narrow=3)
    for table in found["tables"]:
        devices = _range(table["devices"])
        rows.add_row(devices, str(table["layers"]), table["measured"], table["from"])
    console.print(rows)


def _print_context_parallel(console: Console, found: dict[str, Any]) -> None:
    split = found["context_parallel"]
    if split["launch"]:
        variables = ", ".join(f"{name}={value}" for name, value in split["launch"].items())
        console.print(f"This process was started as a rank: {variables}.")
    for each in split["measured"]:
        text = f"{each['ranks']} ranks over {each['transport']}: measured, {each['from']}"
        console.print(text)
    sizes = {each["ranks"] for each in split["measured"] if each["transport"] == "nccl"}
    if len(split["gpus"]) < 2:
        if not split["measured"]:
            console.print("It needs two GPUs to be faster, and there are fewer.")
    elif len(split["gpus"]) not in sizes:
        console.print(
            f"{len(split['gpus'])} GPUs: whether keys that are split over them are faster is not "
            f"measured. Run: {split['measure']}"
        )


def _print_backends(console: Console, found: dict[str, Any]) -> None:
    backends = found["backends"]
    groups = _equal_devices(backends)
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


def _equal_devices(backends: list[dict[str, Any]]) -> list[list[str]]:
    """The devices, in groups that have the same verdict from every backend."""
    groups: dict[str, list[str]] = {}
    for device in backends[0]["devices"]:
        verdicts = repr([backend["devices"][device] for backend in backends])
        groups.setdefault(verdicts, []).append(device)
    return list(groups.values())


def _range(devices: list[str]) -> str:
    """["cuda:0", "cuda:1"] -> "cuda:0-1"; devices that are not consecutive are listed."""
    kind, _, first = devices[0].partition(":")
    row = [f"{kind}:{index}" for index in range(int(first or 0), int(first or 0) + len(devices))]
    if len(devices) > 1 and row == devices:
        return f"{devices[0]}-{devices[-1].partition(':')[2]}"
    return ", ".join(devices)


def _main_reasons(reasons: list[dict[str, str]]) -> list[str]:
    """The messages to show: missing libraries are irrelevant if the device is unsupported."""
    wrong_device = [reason for reason in reasons if reason["code"] == "device"]
    return [reason["message"] for reason in wrong_device or reasons]


def _print_engines(console: Console, found: dict[str, Any]) -> None:
    table = text_table("Engine", "Version", "Plug-in", narrow=2)
    points = []
    for each in found["engines"]:
        visible = "visible" if each["visible"] else "not visible: install attn-dispatch again"
        style = "dim" if each["version"] is None else "green" if each["visible"] else "red"
        table.add_row(each["engine"], each["version"] or "not installed", visible, style=style)
        tested = f"tested with {', '.join(each['tested'])}"
        if each["version"] is not None:
            tested = each["tested_here"] or f"this version was never tested; {tested}"
        points.append((each["engine"], f"{each['flag']}; {tested}"))
    console.print(table)
    _print_points(console, points)


def _print_gains(console: Console, found: dict[str, Any]) -> None:
    if not found["gains"]:
        console.print("Nothing: no backend that runs on these devices lacks a library.")
        return
    table = text_table("Do this", "To gain", narrow=0)
    for gain in found["gains"]:
        gained = [f"{name} on {_range(devices)}" for name, devices in gain["gains"].items()]
        table.add_row("\n".join(gain["do"]), "\n".join(gained))
    console.print(table)


def _print_points(console: Console, points: list[tuple[str, str]]) -> None:
    """Print a list of `- subject: text` with hanging indent."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(overflow="fold")
    for subject, text in points:
        table.add_row("-", Text.assemble((subject, "bold"), ": ", text) if text else subject)
    if points:
        console.print(table)
