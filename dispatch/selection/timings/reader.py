"""Reading a table of times: a file that anyone may have written, so every value is checked.

`docs/tuning.md` has the schema. Whatever is not exactly of that form is refused as a whole. Names
are compared with those of registered backends, and nothing is ever imported or run by them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import parse_json, read_file
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC
from attn_dispatch.selection.timings.table import (
    LAYER_FIELDS,
    VERSION,
    BatchKind,
    LayerKey,
    LayerTimes,
    Machine,
    Point,
    Table,
)

__all__ = ["parse_table", "parse_text", "read_table"]

#: What a file may take at most: a table of a few models takes some hundred kilobytes.
_MAX_BYTES = 4 << 20
_MAX_LAYERS, _MAX_POINTS, _MAX_NAMES = 256, 1024, 64
_MAX_COUNT, _MAX_US, _MAX_TEXT = 1 << 40, 1e10, 256


def read_table(path: Path, origin: str | None = None) -> Table:
    """The table in a file.

    Args:
        path: of the file.
        origin: what messages call it; its path if None.

    Raises:
        InvalidInputError: it cannot be read, is too large, or is no such table.
    """
    origin = str(path) if origin is None else origin
    return parse_text(read_file(path, _MAX_BYTES, origin=origin), origin)


def parse_text(text: bytes, origin: str) -> Table:
    """A table out of a file's content.

    Raises:
        InvalidInputError: it is too large, or no such table.
    """
    if len(text) > _MAX_BYTES:
        raise InvalidInputError(f"{origin} has more than {_MAX_BYTES >> 20} MiB.")
    return parse_table(parse_json(text, origin=origin, unique_keys=True), origin)


def parse_table(data: Any, origin: str) -> Table:
    """A table out of parsed JSON; every value is checked.

    Raises:
        InvalidInputError: something is not as it should be; it says what and where.
    """
    try:
        return _parse(data, origin)
    except _Flaw as flaw:
        raise InvalidInputError(f"{origin} is no table of times: {flaw}.") from flaw


class _Flaw(Exception):
    """What is wrong in a table."""


def _parse(data: Any, origin: str) -> Table:
    if isinstance(data, dict) and data.get("version") != VERSION:
        found = repr(data.get("version"))[:40]
        raise _Flaw(f"its version is {found}, and this attn-dispatch reads version {VERSION}")
    fields = _object(data, "it", ("version", "measured", "device", "versions", "layers"))
    device = _object(fields["device"], "device", ("name", "arch", "driver"))
    driver = None if device["driver"] is None else _text(device["driver"], "driver")
    versions = fields["versions"]
    if not isinstance(versions, dict) or len(versions) > _MAX_NAMES:
        raise _Flaw("versions is not an object of a few texts")
    pairs = sorted((_text(k, "a library"), _text(v, k)) for k, v in versions.items())
    machine = Machine(
        _text(device["name"], "name"), _text(device["arch"], "arch"), driver, tuple(pairs)
    )
    measured = _time(fields["measured"])
    layers: dict[LayerKey, LayerTimes] = {}
    for index, each in enumerate(_list(fields["layers"], "layers", _MAX_LAYERS)):
        where = f"layers[{index}]"
        layer = _object(each, where, ("layer", "points"), ("kernel_provider",))
        key = _layer(layer["layer"], f"{where}.layer")
        if key in layers:
            raise _Flaw(f"{where} is there twice")
        given = _list(layer["points"], f"{where}.points", _MAX_POINTS)
        points = tuple(_point(p, f"{where}.points[{i}]") for i, p in enumerate(given))
        kernel_provider = _served_by(layer.get("kernel_provider", {}), f"{where}.kernel_provider")
        layers[key] = LayerTimes(points, origin, machine.device, measured, kernel_provider)
    return Table(machine, measured, layers, origin)


def _layer(data: Any, where: str) -> LayerKey:
    fields = _object(data, where, LAYER_FIELDS)
    for name in ("num_heads", "num_kv_heads", "head_size"):
        _count(fields[name], f"{where}.{name}", 1)
    for name in ("block_size", "sliding_window"):
        if fields[name] is not None:
            _count(fields[name], f"{where}.{name}", 1)
    for name in ("dtype", "kv_cache_dtype", "attn_type"):
        _text(fields[name], f"{where}.{name}")
    if fields["logits_soft_cap"] is not None:
        fields["logits_soft_cap"] = _number(fields["logits_soft_cap"], f"{where}.logits_soft_cap")
    if not isinstance(fields["sinks"], bool):
        raise _Flaw(f"{where}.sinks is not true or false")
    if not isinstance(fields["alibi"], bool) and fields["alibi"] != ALIBI_SYMMETRIC:
        raise _Flaw(f"{where}.alibi is not true, false or {ALIBI_SYMMETRIC!r}")
    return tuple(fields[name] for name in LAYER_FIELDS)


def _point(data: Any, where: str) -> Point:
    needed = ("step", "requests", "tokens", "keys", "times_us")
    fields = _object(data, where, needed, ("host_us", "failed"))
    steps = {step.value: step for step in BatchKind}
    if not isinstance(fields["step"], str) or fields["step"] not in steps:
        raise _Flaw(f"{where}.step is not one of {', '.join(steps)}")
    step = steps[fields["step"]]
    failed = _list(fields.get("failed", []), f"{where}.failed", _MAX_NAMES)
    return Point(
        step,
        _count(fields["requests"], f"{where}.requests", 1),
        _count(fields["tokens"], f"{where}.tokens", 0),
        _count(fields["keys"], f"{where}.keys", 0),
        _times(fields["times_us"], step, f"{where}.times_us"),
        _times(fields.get("host_us", {}), step, f"{where}.host_us"),
        tuple(_name(name, step, f"{where}.failed") for name in failed),
    )


def _times(data: Any, step: BatchKind, where: str) -> dict[str, float]:
    if not isinstance(data, dict) or len(data) > _MAX_NAMES:
        raise _Flaw(f"{where} is not an object of a few times")
    return {_name(name, step, where): _number(us, f"{where}.{name}") for name, us in data.items()}


def _served_by(data: Any, where: str) -> dict[str, str]:
    if not isinstance(data, dict) or len(data) > _MAX_NAMES:
        raise _Flaw(f"{where} is not an object of a few texts")
    return {_name(k, BatchKind.DECODE, where): _text(v, f"{where}.{k}") for k, v in data.items()}


def _name(value: Any, step: BatchKind, where: str) -> str:
    form = "[A-Z][A-Z0-9_]*"
    form = f"{form}(\\+{form})?" if step is BatchKind.MIXED else form
    if not re.fullmatch(form, _text(value, where)):
        raise _Flaw(f"{where} has {value!r}, which is not the name of a backend")
    return str(value)


def _object(
    data: Any, where: str, needed: Iterable[str], more: Iterable[str] = ()
) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _Flaw(f"{where} is not an object")
    for name in needed:
        if name not in data:
            raise _Flaw(f"{where} has no {name!r}")
    for name in data:
        if name not in {*needed, *more}:
            raise _Flaw(f"{where} has an unknown key {name[:40]!r}")
    return dict(data)


def _list(data: Any, where: str, most: int) -> list[Any]:
    if not isinstance(data, list) or len(data) > most:
        raise _Flaw(f"{where} is not a list of at most {most}")
    return data


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise _Flaw(f"{where[:80]} is not a short text")
    return value


def _time(value: Any) -> str:
    try:
        datetime.datetime.fromisoformat(_text(value, "measured"))
    except ValueError as error:
        raise _Flaw("measured is not a time by ISO 8601") from error
    return str(value)


def _count(value: Any, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_COUNT:
        raise _Flaw(f"{where} is not an integer of {least} or more")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Flaw(f"{where[:80]} is not a number")
    if not 0 < value <= _MAX_US:  # no NaN is
        raise _Flaw(f"{where[:80]} is not above 0 and at most {_MAX_US:g}")
    return float(value)
