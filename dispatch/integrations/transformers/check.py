"""Whether a model calls the attention function at all."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError

__all__ = ["OwnAttentionWarning", "check_model"]

#: What a class that calls the replaceable attention function has in its source.
_CALL = "ALL_ATTENTION_FUNCTIONS"
#: Classes with "Attention" in their names that have no softmax attention.
_OTHER = re.compile(r"Linear|Lightning|Delta|Mamba|Pool|Norm|Output$|Config$")


class OwnAttentionWarning(UserWarning):
    """Some modules of a model compute attention without the function that was registered."""


def check_model(model: Any) -> None:
    """Check that a model's attention modules call the attention function.

    Some models of transformers accept every `attn_implementation` and compute attention themselves,
    without a message: BLOOM, MPT, Falcon. Others do so in some of their modules, and then a warning
    names these.

    Args:
        model: a model of transformers.

    Raises:
        UnsupportedError: no module of the model calls the attention function.
        InvalidInputError: it is not a model of transformers.

    Warns:
        OwnAttentionWarning: some do not.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InvalidInputError(
            f"model is a {type(model).__name__}; give a PreTrainedModel of transformers."
        )
    kinds = _attention_classes(model)
    own = sorted({kind.__name__ for kind in kinds if not _calls(kind)})
    if len(own) < len({kind.__name__ for kind in kinds}):
        if own:
            warnings.warn(
                f"In {type(model).__name__}, {', '.join(own)} compute attention themselves; "
                "attn-dispatch computes the rest.",
                OwnAttentionWarning,
                stacklevel=3,
            )
        return
    if not own:
        raise UnsupportedError(
            f"No module of {type(model).__name__} is known to compute softmax attention, so there "
            "is nothing to replace."
        )
    raise UnsupportedError(
        f"{type(model).__name__} computes its attention itself ({', '.join(own)}) and never calls "
        "the attention function that can be replaced, although it accepts every "
        'attn_implementation. Load it with attn_implementation="eager" or "sdpa".'
    )


def _attention_classes(model: torch.nn.Module) -> list[type]:
    """The classes of the modules that compute attention, which have no such module inside."""
    named = [module for module in model.modules() if _is_attention(module)]
    return list(
        dict.fromkeys(
            type(module)
            for module in named
            if not any(_is_attention(part) for part in module.modules() if part is not module)
        )
    )


def _is_attention(module: torch.nn.Module) -> bool:
    name = type(module).__name__
    return "Attention" in name and _OTHER.search(name) is None


def _calls(kind: type) -> bool:
    for each in kind.__mro__:
        if each is torch.nn.Module:
            return False
        try:
            if _CALL in inspect.getsource(each):
                return True
        except (OSError, TypeError):  # a class without a file: its base classes may have one
            continue
    return False
