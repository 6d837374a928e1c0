"""Reading a table of times: a file of unknown origin, so every value is checked.

`docs/tuning.md` has the schema. A file that differs from it is rejected as a whole. Names are only
compared with those of registered backends; they never import or run anything.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import parse_json, read_file
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC
from attn_dispatch.selection.timings.table import (
    LAYER_FIELDS,
    MLA_FIELDS,
    VERSION,
    BatchKind,
    LayerKey,
    LayerTimes,
    Machine,
    Point,
    SplitKey,
    Table,
)

__all__ = ["parse_table", "parse_text", "read_table"]

#: Limits of a file: a table of a few models takes some hundred kilobytes.
_MAX_BYTES = 4 << 20
_MAX_LAYERS, _MAX_POINTS, _MAX_NAMES = 256, 1024, 64
_MAX_COUNT, _MAX_US, _MAX_TEXT, _MAX_RANKS = 1 << 40, 1e10, 256, 1 << 16

#: The keys of a layer that every file has; only layers of latent attention have `mla`.
_LAYER_KEYS = tuple(name for name in LAYER_FIELDS if name != "mla")


def read_table(path: Path, origin: str | None = None) -> Table:
    """The table in a file.

    Args:
        path: of the file.
        origin: its name in messages; the path if None.

    Raises:
        InvalidInputError: it cannot be read, is too large, or is not a table.
    """
    origin = str(path) if origin is None else origin
    return parse_text(read_file(path, _MAX_BYTES, origin=origin), origin)


def parse_text(text: bytes, origin: str) -> Table:
    """The table in a file's content.

    Raises:
        InvalidInputError: it is too large, or not a table.
    """
    if len(text) > _MAX_BYTES:
        raise InvalidInputError(f"{origin} has more than {_MAX_BYTES >> 20} MiB.")
    return parse_table(parse_json(text, origin=origin, unique_keys=True), origin)


def parse_table(data: Any, origin: str) -> Table:
    """The table in parsed JSON; every value is checked.

    Raises:
        InvalidInputError: a value differs from the schema; the message states which and how.
    """
    try:
        return _parse(data, origin)
    except _Flaw as flaw:
        raise InvalidInputError(f"{origin} is not a table of times: {flaw}.") from flaw


class _Flaw(Exception):
    """A value that differs from the schema."""


def _parse(data: Any, origin: str) -> Table:
    if isinstance(data, dict) and data.get("version") != VERSION:
        found = repr(data.get("version"))[:40]
        raise _Flaw(f"its version is {found}, and this attn-dispatch reads version {VERSION}")
    needed = ("version", "measured", "device", "versions", "layers")
    fields = _object(data, "it", needed, ("context_parallel",))
    device = _object(fields["device"], "device", ("name", "arch", "driver"))
    driver = None if device["driver"] is None else _text(device["driver"], "driver")
    versions = _mapping(fields["versions"], "versions", _text, _text)
    name, arch = (_text(device[key], key) for key in ("name", "arch"))
    machine = Machine(name, arch, driver, tuple(sorted(versions.items())))
    measured = _time(fields["measured"])
    layers: dict[LayerKey, LayerTimes] = {}
    for index, each in enumerate(_list(fields["layers"], "layers", _MAX_LAYERS)):
        where = f"layers[{index}]"
        layer = _object(each, where, ("layer", "points"), ("kernel_provider",))
        key = _layer(layer["layer"], f"{where}.layer")
        if key in layers:
            raise _Flaw(f"{where} repeats a layer")
        given = layer.get("kernel_provider", {})
        providers = _mapping(given, f"{where}.kernel_provider", _name, _text)
        points = _points(layer["points"], where)
        layers[key] = LayerTimes(points, origin, machine.device, measured, providers)
    splits: dict[SplitKey, LayerTimes] = {}
    given = _list(fields.get("context_parallel", []), "context_parallel", _MAX_LAYERS)
    for index, each in enumerate(given):
        where = f"context_parallel[{index}]"
        layer = _object(each, where, ("ranks", "transport", "layer", "points"))
        if _count(layer["ranks"], f"{where}.ranks", 1) > _MAX_RANKS:
            raise _Flaw(f"{where}.ranks is more than {_MAX_RANKS}")
        transport = _text(layer["transport"], f"{where}.transport")
        split = SplitKey(_layer(layer["layer"], f"{where}.layer"), layer["ranks"], transport)
        if split in splits:
            raise _Flaw(f"{where} repeats a layer")
        points = _points(layer["points"], where)
        splits[split] = LayerTimes(points, origin, machine.device, measured)
    return Table(machine, measured, layers, origin, splits)


def _points(data: Any, where: str) -> tuple[Point, ...]:
    given = _list(data, f"{where}.points", _MAX_POINTS)
    return tuple(_point(each, f"{where}.points[{i}]") for i, each in enumerate(given))


def _layer(data: Any, where: str) -> LayerKey:
    fields = {"mla": None, **_object(data, where, _LAYER_KEYS, ("mla",))}
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
    if fields["mla"] is not None:
        sizes = _list(fields["mla"], f"{where}.mla", len(MLA_FIELDS))
        if len(sizes) != len(MLA_FIELDS):
            raise _Flaw(f"{where}.mla is not a list of {', '.join(MLA_FIELDS)}")
        fields["mla"] = tuple(_count(each, f"{where}.mla", 1) for each in sizes)
    return tuple(fields[name] for name in LAYER_FIELDS)


def _point(data: Any, where: str) -> Point:
    needed = ("step", "requests", "tokens", "keys", "times_us")
    fields = _object(data, where, needed, ("host_us", "failed"))
    steps = {step.value: step for step in BatchKind}
    if not isinstance(fields["step"], str) or fields["step"] not in steps:
        raise _Flaw(f"{where}.step is not one of {', '.join(steps)}")
    step = steps[fields["step"]]
    name = _route if step is BatchKind.MIXED else _name
    failed = _list(fields.get("failed", []), f"{where}.failed", _MAX_NAMES)
    return Point(
        step,
        _count(fields["requests"], f"{where}.requests", 1),
        _count(fields["tokens"], f"{where}.tokens", 0),
        _count(fields["keys"], f"{where}.keys", 0),
        _mapping(fields["times_us"], f"{where}.times_us", name, _number),
        _mapping(fields.get("host_us", {}), f"{where}.host_us", name, _number),
        tuple(name(each, f"{where}.failed") for each in failed),
    )


def _mapping(
    data: Any, where: str, key: Callable[[Any, str], str], check: Callable[[Any, str], Any]
) -> dict[str, Any]:
    if not isinstance(data, dict) or len(data) > _MAX_NAMES:
        raise _Flaw(f"{where} is not an object of at most {_MAX_NAMES} values")
    return {key(name, where): check(value, f"{where}.{name}") for name, value in data.items()}


_NAME = "[A-Z][A-Z0-9_]*"


def _name(value: Any, where: str, form: str = _NAME) -> str:
    if not re.fullmatch(form, _text(value, where)):
        raise _Flaw(f"{where} has {value!r}, which is not the name of a backend")
    return str(value)


def _route(value: Any, where: str) -> str:
    return _name(value, where, rf"{_NAME}(\+{_NAME})?")


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
    if not 0 < value <= _MAX_US:  # also rejects NaN
        raise _Flaw(f"{where[:80]} is not above 0 and at most {_MAX_US:g}")
    return float(value)
