"""A model's config.json: finding and loading it, its dtype, and code of its own that it names."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.files import parse_json, read_file

if TYPE_CHECKING:
    import torch

__all__ = ["load_config", "model_type_of", "own_code", "require_dtype"]

#: A config.json has some kilobytes; a larger file is something else.
_MAX_BYTES = 16 << 20

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

#: Names of classes whose attention is not causal.
_BOTH_DIRECTIONS = re.compile(r"bidirectional|bi(model|for)|noncausal", re.IGNORECASE)

#: Keys of a JSON file that is no config of a model -> what the file is.
_OTHER_FILES: dict[str, str] = {
    "peft_type": "belongs to an adapter (PEFT), whose layers are those of its base model",
    "_diffusers_version": "belongs to diffusers, whose models have no config.json of transformers",
    "tokenizer_class": "belongs to a tokenizer",
    "image_processor_type": "belongs to an image processor",
}


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
            if _HUB_ID.fullmatch(str(path)) and path.suffix != ".json":
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


def model_type_of(content: Mapping[str, Any]) -> str:
    """The type of model, such as "llama".

    Raises:
        InvalidInputError: the file has none; the message says what the file is, if that is known.
    """
    model_type = content.get("model_type")
    if isinstance(model_type, str) and model_type:
        return model_type
    for key, what in _OTHER_FILES.items():
        if key in content:
            base = content.get("base_model_name_or_path")
            where = f" That is {base}." if key == "peft_type" and isinstance(base, str) else ""
            raise InvalidInputError(
                f"This file {what}.{where} Give the config.json of the language model."
            )
    raise InvalidInputError(
        f"This config has model_type={model_type!r}, so the model is unknown. Is it the "
        "config.json of a model? A layer can be described without one, by flags such as "
        "--num-heads."
    )


def require_dtype(content: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config states.

    Raises:
        InvalidInputError: it states none, or not the name of a floating-point dtype.
    """
    import torch

    name = content.get("dtype") or content.get("torch_dtype")
    if name is None or name == "auto":
        raise InvalidInputError(
            "This config states no dtype, and none is assumed. Give the dtype that the model runs "
            "in: --dtype bfloat16, or dtype=torch.bfloat16."
        )
    dtype = vars(torch).get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError(
            f"This config has dtype={reprlib.repr(name)}, which is not the name of a "
            "floating-point dtype. Name the dtype that the model runs in, e.g. bfloat16."
        )
    return dtype


def own_code(content: Mapping[str, Any], is_known: Callable[[str], bool]) -> list[str]:
    """The names of the model classes that a config gives and that are in code of its own.

    Args:
        is_known: whether a class in the config's `architectures` is not its own.

    Raises:
        UnsupportedError: their names say that attention is not causal, which the model type is.
    """
    named = content.get("architectures")
    named = [each for each in named if isinstance(each, str)] if isinstance(named, list) else []
    auto_map = content.get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, Mapping) else []
    own = [name for name in named if not is_known(name)]
    own += [each.rpartition(".")[2] for each in values if isinstance(each, str)]
    own = [name for name in dict.fromkeys(own) if not name.endswith(("Config", "Tokenizer"))]
    for name in own:
        if _BOTH_DIRECTIONS.search(name):
            raise UnsupportedError(
                f"This config names code of its own ({name}), which attends in both directions; "
                f"transformers' {content['model_type']!r} does not. Describe the layer by flags "
                "with --attn-type encoder_only."
            )
    return own
