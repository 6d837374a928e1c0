"""Write selection.md again: `python tests/support/golden/regenerate.py`; then read its diff."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import LIBRARIES, Library
from attn_dispatch.selection.priorities import BUILTIN
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.report import Report
from attn_dispatch.selection.selector import decide, phases_of

PATH = Path(__file__).with_name("selection.md")

SHORT = {
    "HOPPER_ATTN": "hopper",
    "FLASH_ATTN": "flash",
    "FLASHINFER": "flashinfer",
    "ROCM_AITER": "aiter",
    "ROCM_FLASH_ATTN": "rocm_flash",
    "TRITON_ATTN": "triton",
    "TORCH_VARLEN": "varlen",
    "TORCH_SDPA": "sdpa",
    "FLASHMLA": "flashmla",
    "FLASHINFER_MLA": "fi_mla",
    "FLASH_ATTN_MLA": "fa_mla",
    "ROCM_AITER_MLA": "aiter_mla",
    "TRITON_MLA": "tri_mla",
    "REFERENCE": "ref",
    "REFERENCE_MLA": "ref_mla",
}

_HEAD = """\
# What is picked, for every known device

Written by `python tests/support/golden/regenerate.py`; a test compares it with what selection does.
Every optional library is taken to be installed, Triton among them: PyTorch's builds for NVIDIA and
AMD GPUs bring it on Linux. A cell is the pick, prefill/decode where they differ, and `-` where
every backend refuses.

{legend}
"""
_REFUSED = """\
# What refuses, on {device}

The fields for which each backend refuses. Left out: those that are for other devices, and those
that compute the other kind of attention, multi-head latent or not, and so refuse for `mla`.
"""


def render(specs: Mapping[str, AttentionSpec]) -> str:
    """The table for these layers, as Markdown."""
    devices = [_with_every_library(device) for device in KNOWN_DEVICES.values()]
    picks = [
        [name, *(_picks(decisions(spec, device)) for device in devices)]
        for name, spec in specs.items()
    ]
    h200 = _with_every_library(KNOWN_DEVICES["sm90"])
    refusals = [[name, _refusals(decisions(spec, h200))] for name, spec in specs.items()]
    legend = ", ".join(f"`{short}` {name}" for name, short in SHORT.items())
    return "\n".join(
        [
            _HEAD.format(legend=f"{legend}."),
            *_table(["layer", *(device.arch for device in devices)], picks),
            "",
            _REFUSED.format(device=h200.name),
            *_table(["layer", "refused"], [row for row in refusals if row[1]]),
            "",
        ]
    )


def decisions(spec: AttentionSpec, device: DeviceProfile) -> list[Report]:
    """What this library's own backends get, phase by phase, without any override."""
    own = {name: candidate for name, candidate in registry.candidates().items() if name in BUILTIN}
    return [
        decide(spec, device, phase=phase, rules=(), candidates=own) for phase in phases_of(spec)
    ]


def _with_every_library(device: DeviceProfile) -> DeviceProfile:
    return device.with_libraries(*(Library(name, "unknown") for name in LIBRARIES))


def _short(name: str | None) -> str:
    return "-" if name is None else SHORT.get(name, name.lower())


def _picks(reports: list[Report]) -> str:
    return "/".join(dict.fromkeys(_short(report.picked) for report in reports))


def _refusals(reports: list[Report]) -> str:
    refused = {
        _short(verdict.name): ", ".join(dict.fromkeys(r.field for r in verdict.reasons))
        for report in reports
        for verdict in report.verdicts
        if not verdict.supported and not {"mla", "device"} & {r.field for r in verdict.reasons}
    }
    return "; ".join(f"{name}: {fields}" for name, fields in sorted(refused.items()))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]


if __name__ == "__main__":
    from specs import SPECS

    PATH.write_text(render(SPECS), encoding="utf-8")
    print(f"{PATH.name}: {len(SPECS)} layers on {len(KNOWN_DEVICES)} devices")
