"""The flags that describe a layer, made from the fields of AttentionSpec.

A new field of AttentionSpec gets its flag without further code: its name, type and doc are enough.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

import attn_dispatch.interface.spec as spec_module
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC, AttentionSpec
from attn_dispatch.interface.types import AttentionType

if TYPE_CHECKING:
    from attn_dispatch.models.layers import LayerGroup

__all__ = [
    "RequestedModel",
    "fields_from_flags",
    "flag_name",
    "requested_layers",
    "requested_model",
    "spec_from_fields",
    "with_spec_flags",
]

_PANEL = "The layer, by the fields of AttentionSpec"

#: The first release of transformers that `describe` works with.
_TRANSFORMERS = "5.17"

#: The largest integer that a flag accepts; no layer has more of anything.
_MAX_INTEGER = (1 << 31) - 1

#: Additional flags: name -> (the field that it sets, the value, help).
_SWITCHES: dict[str, tuple[str, Any, str]] = {
    "alibi_symmetric": ("alibi", ALIBI_SYMMETRIC, "ALiBi, by slopes times -abs(distance)."),
}


#: Fields whose flag has another name, and its value: a layout whose strides the field gets.
_LAYOUT_FIELD, _LAYOUT_FLAG = "kv_strides", "--kv-layout"


def flag_name(field: str) -> str:
    """`num_heads` -> `--num-heads`."""
    return _LAYOUT_FLAG if field == _LAYOUT_FIELD else "--" + field.replace("_", "-")


def with_spec_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**flags` by one flag for each field of AttentionSpec.

    The flags' values are strings or booleans, and None if a flag is not given;
    `fields_from_flags` converts them. A field that has the name of one of the command's own
    parameters gets no flag.
    """
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = dataclasses.fields(AttentionSpec)
    parameters += [_field_parameter(field) for field in fields if field.name not in own]
    parameters += [
        _parameter(name, bool, flag_name(name), h) for name, (*_, h) in _SWITCHES.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _field_parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    kind, flag, doc = _base_type(field), flag_name(field.name), str(field.metadata.get("doc", ""))
    if field.name == _LAYOUT_FIELD:
        doc = "The cache of an engine, such as vllm, sglang or vllm-LBHNC; the default is ours."
        return _parameter(field.name, str, flag, doc, "NAME")
    if kind == "bool" or kind.startswith("bool |"):
        if field.default is not False:  # otherwise there is nothing to switch off
            flag += f"/{flag_name('no_' + field.name)}"
        return _parameter(field.name, bool, flag, doc)
    metavar = _METAVARS.get(kind, "TEXT")
    if (record := _record(kind)) is not None:
        metavar = "N,N,..."
        doc += f" As numbers: {', '.join(f.name for f in dataclasses.fields(record))}."
    return _parameter(field.name, str, flag, doc, metavar)


def _parameter(
    name: str, kind: type, flag: str, doc: str, metavar: str | None = None
) -> inspect.Parameter:
    option = typer.Option(
        flag, help=doc, metavar=metavar, rich_help_panel=_PANEL, show_default=False
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], option],  # noqa: UP045  (built at run time)
    )


def _base_type(field: dataclasses.Field[Any]) -> str:
    """The field's declared type, a string because annotations are postponed, without `| None`."""
    return str(field.type).removesuffix(" | None")


def _record(kind: str) -> type | None:
    """The dataclass of that name that a field contains, such as MLADims."""
    found = getattr(spec_module, kind, None)
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


# Text that does not parse is passed on unchanged, and AttentionSpec rejects it.
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


def _integers(text: str) -> Any:
    parts = [_number(int)(part.strip()) for part in text.split(",")]
    return tuple(parts) if all(isinstance(part, int) for part in parts) else text


_PARSERS: dict[str, Callable[[str], Any]] = {
    "tuple[int, int]": _integers,
    "int": _number(int),
    "float": _number(float),
    "torch.dtype": _dtype,
}
_METAVARS = {
    "tuple[int, int]": "N,N",
    "int": "N",
    "float": "X",
    "torch.dtype": "DTYPE",
    "str": "NAME",
}


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
    """The given flags as fields of AttentionSpec; the word none means None.

    Raises:
        InvalidInputError: a value is wrong, and AttentionSpec would not detect it.
    """
    kinds = {field.name: _base_type(field) for field in dataclasses.fields(AttentionSpec)}
    fields: dict[str, Any] = {}
    for name, value in flags.items():
        if value is None or name in _SWITCHES:
            continue
        record = None if name == _LAYOUT_FIELD else _record(kinds[name])
        if not isinstance(value, str):
            fields[name] = value
        elif value.lower() == "none":
            fields[name] = None
        elif record is not None:
            fields[name] = _parse_record(name, record, value)
        elif name == _LAYOUT_FIELD:
            fields[name] = value  # its strides depend on the other fields
        else:
            fields[name] = _PARSERS.get(kinds[name], str)(value)
            _check_size(name, fields[name])
    fields |= {field: value for name, (field, value, _) in _SWITCHES.items() if flags.get(name)}
    return fields


def _check_size(field: str, value: Any) -> None:
    if isinstance(value, tuple):
        for each in value:
            _check_size(field, each)
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise InvalidInputError(
            f"{flag_name(field)} {value} is beyond {_MAX_INTEGER}, and no layer has as much."
        )


def spec_from_fields(fields: Mapping[str, Any]) -> AttentionSpec:
    """The layer; with `mla`, the sizes of its cache are derived unless they are given.

    Args:
        fields: of AttentionSpec; but `kv_strides` is the name of a layout.

    Raises:
        InvalidInputError: a required field is missing, or a value is wrong.
    """
    layout = fields.get(_LAYOUT_FIELD)
    fields = {name: value for name, value in fields.items() if name != _LAYOUT_FIELD}
    is_mla = fields.get("mla") is not None
    missing = [
        flag_name(field.name)
        for field in dataclasses.fields(AttentionSpec)
        if field.default is dataclasses.MISSING
        and field.name not in fields
        and not (is_mla and field.name == "head_size")
    ]
    if missing:
        raise InvalidInputError(
            f"A layer needs {', '.join(missing)}. For example: attn-dispatch explain --num-heads "
            "32 --num-kv-heads 8 --head-size 128 --dtype bfloat16. Or give a whole model by "
            "--config PATH."
        )
    if not is_mla:
        return _with_layout(AttentionSpec(**fields), layout)
    basic = {name: fields[name] for name in ("num_heads", "dtype", "mla")}
    return _with_layout(AttentionSpec.for_mla(**basic).replace(**fields), layout)


def _with_layout(spec: AttentionSpec, layout: str | None) -> AttentionSpec:
    from attn_dispatch.interface.kv_layout_table import with_kv_layout

    return spec if layout is None else with_kv_layout(spec, layout)


@dataclasses.dataclass(frozen=True)
class RequestedModel:
    """What a command is asked about.

    Attributes:
        groups: the layers, by the name of their kind.
        others: layers without softmax attention, by what they have.
        rejected: layers that AttentionSpec cannot describe, by the reason.
        notes: sentences about what was left out or assumed.
    """

    groups: Mapping[str, LayerGroup]
    others: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    rejected: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def requested_model(config: Path | None, fields: Mapping[str, Any]) -> RequestedModel:
    """The layers of a model, by their kind; without a config, the one that the fields describe.

    A layout of the cache is that of all layers with keys and values in blocks.

    Raises:
        InvalidInputError, UnsupportedError: as for `describe`, `layers_from_config` or
            `spec_from_fields`.
    """
    from attn_dispatch.models.layers import LayerGroup

    if config is None:
        spec = spec_from_fields(fields)
        return RequestedModel({spec.kind: LayerGroup(spec, ())})
    layout = fields.get(_LAYOUT_FIELD)
    own = {name: value for name, value in fields.items() if name != _LAYOUT_FIELD}
    model = _model(config, own)
    groups = {
        name: dataclasses.replace(group, spec=_with_layout(group.spec, layout))
        if AttentionType(group.spec.attn_type).has_kv_cache and group.spec.mla is None
        else group
        for name, group in model.groups.items()
    }
    return dataclasses.replace(model, groups=groups)


def _model(config: Path, fields: Mapping[str, Any]) -> RequestedModel:
    """The model as transformers runs it, if that is installed; otherwise as a table has it."""
    from attn_dispatch.models.config_file import load_config
    from attn_dispatch.models.short_table import layers_from_config

    content = load_config(config)
    if not _has_transformers():
        return RequestedModel(
            layers_from_config(content, **fields),
            notes=(f"By a short table, without transformers {_TRANSFORMERS} or newer.",),
        )
    from attn_dispatch.integrations.transformers import describe

    found = describe(content, **fields)
    return RequestedModel(found.groups, found.others, found.rejected, found.notes)


def _has_transformers() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.version import Version

    try:
        return Version(version("transformers")) >= Version(_TRANSFORMERS)
    except PackageNotFoundError:
        return False


def requested_layers(config: Path | None, fields: Mapping[str, Any]) -> Mapping[str, LayerGroup]:
    """The layers of `requested_model` that can be dispatched."""
    return requested_model(config, fields).groups
