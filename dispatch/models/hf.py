"""Hugging Face's config.json: finding the file, and reading and checking its values.

The meaning of the keys is in `families`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_dispatch.errors import InvalidInputError
from attn_dispatch.files import parse_json, read_file

if TYPE_CHECKING:
    import torch

__all__ = ["ConfigReader", "load_config", "read_dtype"]

#: A config.json has some kilobytes; a larger file is something else.
_MAX_BYTES = 16 << 20

#: The largest size or window: a 64-bit integer.
_MAX_INTEGER = (1 << 63) - 1


def load_config(path: str | Path) -> dict[str, Any]:
    """The content of a config.json.

    Args:
        path: the file, or the folder of a model that contains one.

    Raises:
        InvalidInputError: there is no such file, or it does not contain one JSON object.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    advice = "Give the model's config.json, or the folder that contains it."
    try:
        if file != path and not file.exists():
            raise InvalidInputError(f"The folder {path} contains no config.json. {advice}")
        if not file.is_file():
            if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) and path.suffix != ".json":
                advice = (
                    f"That looks like a model on the Hugging Face Hub: `hf download {path} "
                    f"config.json --local-dir {path.name}`, then --config {path.name}."
                )
            raise InvalidInputError(f"There is no file {file}. {advice}")
        if file.stat().st_size > _MAX_BYTES:
            raise InvalidInputError(f"{file} is too large for a config.json. {advice}")
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}. {advice}") from error
    text = read_file(file, _MAX_BYTES, advice=advice)
    content = parse_json(text, origin=str(file), what="valid JSON", advice=advice)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InvalidInputError(f"{file} contains a JSON {kind}, not an object. {advice}")
    return content


class ConfigReader:
    """The values of a config, read key by key; it records which keys were read.

    A key is written as in the file, with a dot between the levels of nested objects
    ("attn_config.alibi") and a bar between names for the same thing ("n_head|num_heads"). A key
    that is null in the file is None; a missing one has its default, or is also None. All methods
    raise InvalidInputError if the value is not what they return, or if two names for the same
    thing have different values.

    Args:
        content: the config.
        model_type: for messages.
        defaults: the values of missing keys.
    """

    def __init__(
        self, content: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any]
    ) -> None:
        self.content = content
        self.model_type = model_type
        self.defaults = defaults
        #: Top-level keys that were read.
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        """The value, of any type."""
        found = {}
        for name in key.split("|"):
            present, value = self._look_up(name)
            if present:
                found[name] = value
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            both = " and ".join(f"{name}={value!r}" for name, value in found.items())
            raise self.problem(f"has both {both}, which mean the same. Keep the right one.")
        return values[0] if values else self.defaults.get(key)

    def _look_up(self, name: str) -> tuple[bool, Any]:
        first, *rest = name.split(".")
        self.read.add(first)
        if first not in self.content:
            return False, None
        value = self.content[first]
        for part in rest:
            if value is None:
                return False, None
            if not isinstance(value, Mapping):
                raise self.problem(f"has {first}={value!r}, which should be an object.")
            if part not in value:
                return False, None
            value = value[part]
        return True, value

    def integer(self, key: str) -> int:
        """A required size of 1 or more."""
        value = self.optional_integer(key)
        if value is None:
            raise self.problem(
                f"has no {key.replace('|', ' (or ')}{')' if '|' in key else ''}, which this model "
                "needs. Is it the whole config.json of the model itself, not of an adapter?"
            )
        return value

    def optional_integer(self, key: str, minimum: int = 1) -> int | None:
        """A size of `minimum` or more, or None if it is null or missing."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.problem(f"has {key}={value!r}, not an integer of {minimum} or more.")
        if value > _MAX_INTEGER:
            raise self.problem(f"has a {key} beyond 64 bits, and no model has that.")
        return value

    def number(self, key: str) -> float | None:
        """A number, or None if it is null or missing."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.problem(f"has {key}={value!r}, not a number.")
        if isinstance(value, int) and abs(value) > _MAX_INTEGER:
            raise self.problem(f"has a {key} beyond 64 bits, and no model has that.")
        return float(value)

    def flag(self, key: str) -> bool:
        """A flag; False if it is null or missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.problem(f"has {key}={value!r}, neither true nor false.")
        return bool(value)

    def names(self, key: str, length: int) -> list[str] | None:
        """A list of `length` strings, or None if it is null or missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.problem(f"has {key}={value!r}, not a list of strings.")
        if len(value) != length:
            raise self.problem(
                f"has {len(value)} {key} for {length} layers. Give one for each layer."
            )
        return value

    def problem(self, what: str) -> InvalidInputError:
        """An error about this config; `what` continues the sentence."""
        return InvalidInputError(f"This config (read as {self.model_type!r}) {what}")


def read_dtype(content: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of the saved weights, or None if the config has none.

    Raises:
        InvalidInputError: it is not the name of a floating-point dtype.
    """
    import torch

    name = content.get("dtype") or content.get("torch_dtype")
    if name is None or name == "auto":
        return None
    dtype = vars(torch).get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError(
            f"This config has dtype={name!r}, which is not the name of a floating-point dtype. "
            "Name the dtype that the model runs in, e.g. bfloat16."
        )
    return dtype
