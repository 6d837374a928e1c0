"""The flags that describe a layer: one for each field of AttentionSpec, made from the fields.

A field that is added to AttentionSpec has its flag at once: its name, its type and its doc say all
that a flag needs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Optional

import typer

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface import spec as spec_module
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC, AttentionSpec

__all__ = ["fields_from_flags", "flag_name", "spec_from_fields", "with_spec_flags"]

_PANEL = "The layer, by the fields of AttentionSpec"

#: The largest integer that a flag takes: no layer has more.
_MAX_INTEGER = (1 << 31) - 1

#: Further flags: the field that one sets, its value, and what it says.
_SWITCHES: dict[str, tuple[str, Any, str]] = {
    "alibi_symmetric": ("alibi", ALIBI_SYMMETRIC, "ALiBi, by slopes times -abs(distance)."),
}


def flag_name(field: str) -> str:
    """`num_heads` -> `--num-heads`."""
    return "--" + field.replace("_", "-")


def with_spec_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of its `**flags`, one flag for each field of AttentionSpec.

    The flags' values are texts, or booleans, or None for those that are not given:
    `fields_from_flags` makes values of them.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    flags = [_parameter(field) for field in dataclasses.fields(AttentionSpec)]
    flags += [_switch(flag, doc) for flag, (_, _, doc) in _SWITCHES.items()]
    parameters = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD] + flags
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    kind, flag = _base_type(field), flag_name(field.name)
    record = _record(kind)
    doc = str(field.metadata.get("doc", ""))
    if record is not None:
        doc += f" As numbers: {', '.join(f.name for f in dataclasses.fields(record))}."
    if kind == "bool" or kind.startswith("bool |"):
        # What is off by default needs no flag to switch it off.
        pair = flag if field.default is False else f"{flag}/{flag_name('no_' + field.name)}"
        option = typer.Option(
            pair,
            help=doc,
            rich_help_panel=_PANEL,
            show_default=False,
        )
        value_type: Any = bool
    else:
        metavar = "N,N,..." if record else _METAVARS.get(kind, "TEXT")
        option = typer.Option(
            flag, help=doc, metavar=metavar, rich_help_panel=_PANEL, show_default=False
        )
        value_type = str
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[value_type], option],  # noqa: UP045  (built at run time)
    )


def _switch(name: str, doc: str) -> inspect.Parameter:
    option = typer.Option(flag_name(name), help=doc, rich_help_panel=_PANEL, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[bool], option],  # noqa: UP045  (built at run time)
    )


def _base_type(field: dataclasses.Field[Any]) -> str:
    """The field's declared type, a text under postponed annotations, without `| None`."""
    return str(field.type).removesuffix(" | None")


def _record(kind: str) -> type | None:
    """The dataclass of that name that a field holds, such as MLADims."""
    found = getattr(spec_module, kind, None)
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


# A text that is not of the type is passed on as it is: the spec refuses it in its own words.
def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return parse


def _dtype(text: str) -> Any:
    import torch

    found = vars(torch).get(text.removeprefix("torch."))  # getattr would import modules
    return found if isinstance(found, torch.dtype) else text


_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": _number(int),
    "float": _number(float),
    "torch.dtype": _dtype,
}
_METAVARS = {"int": "N", "float": "X", "torch.dtype": "DTYPE", "str": "NAME"}


def _parse_record(field: str, record: type, text: str) -> Any:
    names = [f.name for f in dataclasses.fields(record)]
    parts = [_number(int)(part.strip()) for part in text.split(",")]
    for part in parts:
        _check_size(field, part)
    if len(parts) != len(names):
        raise InvalidInputError(
            f"{flag_name(field)} {text} has {len(parts)} of {len(names)} numbers. "
            f"Give {','.join(names)}, e.g. --mla 512,128,64,128 for DeepSeek-V3."
        )
    return record(**dict(zip(names, parts, strict=True)))


def fields_from_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were given, as values for AttentionSpec; the word none stands for None.

    Raises:
        InvalidInputError: a value is wrong in a way that AttentionSpec would not see.
    """
    kinds = {field.name: _base_type(field) for field in dataclasses.fields(AttentionSpec)}
    fields: dict[str, Any] = {}
    for name, value in flags.items():
        if value is None or name in _SWITCHES:
            continue
        record = _record(kinds[name])
        if not isinstance(value, str):
            fields[name] = value
        elif value.lower() == "none":
            fields[name] = None
        elif record is not None:
            fields[name] = _parse_record(name, record, value)
        else:
            fields[name] = _PARSERS.get(kinds[name], str)(value)
            _check_size(name, fields[name])
    fields |= {field: value for name, (field, value, _) in _SWITCHES.items() if flags.get(name)}
    return fields


def _check_size(field: str, value: Any) -> None:
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise InvalidInputError(
            f"{flag_name(field)} {value} is beyond {_MAX_INTEGER}, and no layer has as much."
        )


def spec_from_fields(fields: Mapping[str, Any]) -> AttentionSpec:
    """The request; with `mla`, the sizes of its cache are filled in where they are not given.

    Raises:
        InvalidInputError: a field that every layer needs is not given, or a value is wrong.
    """
    filled = ("head_size",) if fields.get("mla") is not None else ()
    missing = [
        flag_name(field.name)
        for field in dataclasses.fields(AttentionSpec)
        if field.default is dataclasses.MISSING and field.name not in {*fields, *filled}
    ]
    if missing:
        raise InvalidInputError(
            f"A layer needs {', '.join(missing)}. For example: attn-dispatch explain --num-heads "
            "32 --num-kv-heads 8 --head-size 128 --dtype bfloat16. Or give a whole model by "
            "--config PATH."
        )
    if not filled:
        return AttentionSpec(**fields)
    basic = {name: fields[name] for name in ("num_heads", "dtype", "mla")}
    return AttentionSpec.for_mla(**basic).replace(**fields)
