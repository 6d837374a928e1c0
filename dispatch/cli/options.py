"""Options and arguments that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from attn_dispatch.errors import InvalidInputError, summary_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "AsJson",
    "Addressing",
    "Backends",
    "Config",
    "Device",
    "Emulate",
    "JsonFile",
    "check_seconds",
    "device_to_run_on",
    "rounds_option",
    "split_list",
]

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print only JSON.")]

JsonFile: TypeAlias = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all results to this file.")
]

Config: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="A Hugging Face config.json, or a folder that contains one: all layers."),
]

Backends: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", help="Measure these. Default: all except the references."),
]

Device: TypeAlias = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1. Default: the accelerator if there is one, else cpu."),
]

Emulate: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="ARCH",
        help="A GPU to emulate on the CPU, instead of a device: gfx90a, gfx942, gfx950, gfx1100, "
        "gfx1201; or sm90, whose kernels are interpreted.",
    ),
]

Addressing: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="With --emulate: buffer (all tensors are under 2 GiB), mixed (caches are not) or "
        "global (no buffer instructions).",
    ),
]


def rounds_option(text: str) -> typer.models.OptionInfo:
    """The option --rounds; it is limited because more calls would run for days."""
    option: typer.models.OptionInfo = typer.Option(min=1, max=100_000, help=text)
    return option


def split_list(text: str) -> list[str]:
    """`"a, b"` -> `["a", "b"]`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_seconds(seconds: float | None) -> float | None:
    """The callback of --time-budget, which rejects NaN and infinity.

    Raises:
        InvalidInputError: the number is not finite.
    """
    if seconds is not None and not math.isfinite(seconds):
        raise InvalidInputError(f"--time-budget {seconds} is not a number of seconds.")
    return seconds


def device_to_run_on(name: str | None) -> torch.device:
    """The named or the default device, after a first computation on it.

    Raises:
        InvalidInputError: PyTorch does not know the device, cannot reach it, or was built without
            support for it.
    """
    import torch

    from attn_dispatch.platforms.detect import detect_device, resolve_device

    device = resolve_device(name)
    detect_device(device)
    try:
        torch.ones(1, device=device).add(1)
    except Exception as error:  # each kind of device fails in its own way
        raise InvalidInputError(
            f"Device {name!r} cannot be used here: {summary_of(error)}. `attn-dispatch doctor` "
            "shows the devices of this machine."
        ) from error
    return device
