"""Write the tables of docs/*.md from the declarations in the code.

A page has markers, and this program writes the text between them:

    <!-- generated: NAME -->
    <!-- end -->

`python docs/generate.py` fills them in; with `--check` it only shows what would change, and exits
with status 1 if anything would. NAME is a key of `PARTS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from attn_dispatch.backends.cuda.flash_attn.providers import PROVIDERS
from attn_dispatch.environment import VARIABLES
from attn_dispatch.interface.capability import Constraint
from attn_dispatch.interface.kv_layout_table import KV_LAYOUTS
from attn_dispatch.interface.spec import KV_CACHE_DTYPES, LAYER_KINDS, AttentionSpec, plain_value
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import ALIASES, KNOWN_DEVICES
from attn_dispatch.selection import overrides
from attn_dispatch.selection.overrides import VLLM_NAMES
from attn_dispatch.selection.priorities import BUILTIN, LAST_RESORT, PLATFORMS, Platform
from attn_dispatch.selection.registry import resolve_full_cls_name

ROOT = Path(__file__).resolve().parent.parent

_PART = re.compile(
    r"^(?P<begin><!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end>^<!-- end -->$)",
    re.MULTILINE | re.DOTALL,
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(value: object) -> str:
    """A value as inline code."""
    return f"`{value}`"


# Backends -----------------------------------------------------------------------------------------


def backends() -> str:
    """What each built-in backend accepts, field by field of the request."""
    classes = [resolve_full_cls_name(backend.target) for backend in BUILTIN.values()]
    rows = [
        ["runs on", *("; ".join(m.describe() for m in c.capabilities.devices) for c in classes)],
        ["needs", *(", ".join(c.capabilities.requires) or "only torch" for c in classes)],
    ]
    for name, field in _FIELDS.items():
        accepted = (_accepted(each.capabilities.fields.get(name), field) for each in classes)
        rows.append([code(name), *accepted])
    return table(["", *(code(name) for name in BUILTIN)], rows)


_FIELDS = {field.name: field for field in dataclasses.fields(AttentionSpec)}


def _accepted(constraint: Constraint | None, field: dataclasses.Field[Any]) -> str:
    """The accepted values of a field; constraint is None for an undeclared field."""
    if constraint is None:
        if field.metadata.get("neutral") not in (None, False):
            return str(plain_value(field.metadata["neutral"]))
        return "no"
    words = constraint.describe()
    for everything in (KV_CACHE_DTYPES, tuple(map(str, AttentionType))):
        words = words.replace(", ".join(everything), "all")
        named = words.split(", ")
        if set(named) < set(everything) and len(named) > len(everything) // 2:
            words = f"all but {', '.join(v for v in everything if v not in named)}"
    if field.metadata.get("neutral", ...) is False:
        yes_or_no = words.replace("False, True", "True, False")
        return yes_or_no.replace("True, False", "yes").replace("False", "no")
    if field.metadata.get("neutral", ...) is None:  # None leaves the field out
        words = re.sub(r"\bNone(, | or )", "", words)
    return re.sub(r"^None$", "no", words)


def registered() -> str:
    """The built-in backends, with the first line of their docstrings."""
    rows = []
    for name, backend in BUILTIN.items():
        doc = (resolve_full_cls_name(backend.target).__doc__ or "").splitlines()[0]
        module = backend.target.split(":")[0].removeprefix("attn_dispatch.").replace(".", "/")
        rows.append([code(name), doc, code(f"{module}.py")])
    return table(["Backend", "What it is", "File"], rows)


def flash_attention() -> str:
    """The packages that FLASH_ATTN can call, with what each accepts."""
    header = ["Package", "Devices", "Needs", "head_size", "block_size", "alibi", "sinks", "graphs"]
    fields = ("head_size", "block_size", "alibi", "sinks", "cuda_graph")
    rows = []
    for provider in PROVIDERS:
        accepts = provider.capabilities
        devices = "; ".join(match.describe() for match in accepts.devices)
        values = (_accepted(accepts.fields.get(name), _FIELDS[name]) for name in fields)
        rows.append([provider.name, devices, ", ".join(accepts.requires), *values])
    return table(header, rows)


def platforms() -> str:
    """The order of backends on each platform."""
    rest = ["any others", *(code(name) for name in LAST_RESORT)]

    def order(platform: Platform, phase: Phase) -> str:
        return ", ".join([*map(code, platform.order(phase)), *rest])

    rows = [[p.name, p.match.describe(), *(order(p, phase) for phase in Phase)] for p in PLATFORMS]
    return table(["Platform", "Devices", "Prefill, best first", "Decode, best first"], rows)


# The request, the devices, the environment --------------------------------------------------------


def request() -> str:
    """The fields of AttentionSpec."""
    rows = []
    for field in dataclasses.fields(AttentionSpec):
        required = field.default is dataclasses.MISSING
        default = "required" if required else code(plain_value(field.default))
        neutral = code(plain_value(field.metadata["neutral"])) if _has_neutral(field) else "none"
        rows.append(
            [code(field.name), code(field.type), default, neutral, str(field.metadata["doc"])]
        )
    return table(["Field", "Type", "Default", "Neutral value", "Meaning"], rows)


def must_declare() -> str:
    """The fields that have no neutral value."""
    names = [f.name for f in dataclasses.fields(AttentionSpec) if not _has_neutral(f)]
    return ", ".join(code(name) for name in names) + ".\n"


def _has_neutral(field: dataclasses.Field[Any]) -> bool:
    return "neutral" in field.metadata


def devices() -> str:
    """The devices with a known profile."""
    header = ["Name", "Other names", "Profile of", "SMs or CUs", "Shared memory", "L2", "Bandwidth"]
    return table(header, [_device_row(profile) for profile in KNOWN_DEVICES.values()])


def _device_row(profile: DeviceProfile) -> list[str]:
    def amount(value: float | None, unit: float, name: str) -> str:
        return "" if value is None else f"{value / unit:g} {name}"

    aliases = ", ".join(code(alias) for alias, arch in ALIASES.items() if arch == profile.arch)
    return [
        code(profile.arch),
        aliases,
        profile.name,
        "" if profile.num_sms is None else str(profile.num_sms),
        amount(profile.shared_memory_bytes, 1 << 10, "KiB"),
        amount(profile.l2_bytes, 1 << 20, "MiB"),
        amount(profile.memory_bandwidth, 1e12, "TB/s"),
    ]


def variables() -> str:
    """The environment variables."""
    rows = [[code(v.name), v.form, v.default, v.doc] for v in VARIABLES]
    return table(["Variable", "Value", "Default", "Effect"], rows)


def kv_layouts() -> str:
    """The layouts of engines' caches, and the functions that take them."""
    names: dict[str, list[str]] = {}
    for layout in KV_LAYOUTS.values():
        names.setdefault(layout.form.name, []).append(layout.name)
    rows = [
        [
            form.engine,
            form.handed_over,
            code(form.constructor),
            ", ".join(map(code, names[form.name])),
            "yes" if form.two_sizes else "no",
        ]
        for form in dict.fromkeys(layout.form for layout in KV_LAYOUTS.values())
    ]
    header = ["Engine", "What it hands over", "Function", "Layouts", "Two head sizes"]
    return table(header, rows)


# Overrides ----------------------------------------------------------------------------------------


def override_grammar() -> str:
    """The grammar of overrides, from the docstring of the module that parses them."""
    paragraphs = (overrides.__doc__ or "").split("\n\n")
    grammar = next(p for p in paragraphs if p.lstrip("\n").startswith("    override :="))
    return f"```text\n{textwrap.dedent(grammar).strip()}\n```\n"


def override_scopes() -> str:
    """The scopes that an override can name."""
    rows = [
        ["phase", ", ".join(code(phase) for phase in Phase)],
        ["kind of layer", ", ".join(code(kind) for kind in LAYER_KINDS)],
    ]
    return table(["Scope", "Names"], rows)


def vllm_names() -> str:
    """vLLM's names for backends that have another name here."""
    rows = [
        [code(name), code(ours), "yes" if ours in BUILTIN else "no, rejected"]
        for name, ours in VLLM_NAMES.items()
    ]
    return table(["vLLM's name", "Name here", "Exists today"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "backends": backends,
    "registered": registered,
    "flash-attention": flash_attention,
    "platforms": platforms,
    "request": request,
    "must-declare": must_declare,
    "devices": devices,
    "variables": variables,
    "kv-layouts": kv_layouts,
    "override-grammar": override_grammar,
    "override-scopes": override_scopes,
    "vllm-names": vllm_names,
}


# Pages --------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    """The files that may have generated parts."""
    return sorted((ROOT / "docs").glob("*.md"))


def fill_in(text: str, name: str) -> str:
    """A page's text with its generated parts filled in.

    Raises:
        ValueError: a marker names an unknown part, or has no other half.
    """

    def part(match: re.Match[str]) -> str:
        if match["name"] not in PARTS:
            raise ValueError(
                f"{name} names the part {match['name']!r}; the parts are {', '.join(PARTS)}."
            )
        return f"{match['begin']}\n{PARTS[match['name']]()}\n{match['end']}"

    opened, closed = (len(re.findall(p, text)) for p in ("<!-- generated:", "<!-- end -->"))
    filled, replaced = _PART.subn(part, text)
    if not opened == closed == replaced:
        raise ValueError(
            f"{name} has {opened} '<!-- generated: NAME -->' and {closed} '<!-- end -->'."
        )
    return filled


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill in every page, or check that nothing would change."""
    parser = argparse.ArgumentParser(description="Write the generated parts of docs/*.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it would")
    check = parser.parse_args(arguments).check
    stale = 0
    for page in pages():
        name = str(page.relative_to(ROOT))
        before = page.read_text(encoding="utf-8")
        after = fill_in(before, name)
        if after == before:
            continue
        stale += 1
        if check:
            lines = (before.splitlines(keepends=True), after.splitlines(keepends=True))
            sys.stdout.writelines(difflib.unified_diff(*lines, name, f"{name} (generated)", n=1))
        else:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {name}")
    if check and stale:
        print(f"{stale} page(s) are out of date: run `make docs`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
