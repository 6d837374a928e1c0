"""Why a class of transformers could not be run without weights, in a short sentence."""

from __future__ import annotations

import re
import sys

import torch

from attn_dispatch.integrations.transformers.recording import RECORDER

__all__ = ["first_line", "own_attention", "why_not_run"]

_ADVICE = "Describe its layers by flags such as --num-heads."

#: What the message of a foreign error says -> the reason, with the groups of the pattern.
_REASONS: tuple[tuple[str, str], ...] = (
    (r"requires the (\w+) library", "needs the library {0}"),
    (r"missing \d+ required positional arguments?: (.+)", "needs the input {0}"),
    (r"[Yy]ou have to specify (?:either )?(\w+)", "needs the input {0}"),
    (r"(\w+) is required", "needs the input {0}"),
    (r"'\w+Config' object has no attribute '(\w+)'", "reads {0}, which this config does not have"),
    (r"needs? to be specified|is not set", "needs a value that this config does not have"),
    (r"got NoneType|'NoneType'|of type NoneType", "needs a value or input that is not there"),
    (
        r"split_with_sizes|reduction dim|for input of size|broadcast a dimension|out of range|"
        r"channel dimensions|not enough values|normalized_shape|[Ii]mage size|tensor of shape|"
        r"a multiple of|must be mono|not in range|to have shape",
        "has sizes that do not fit this request",
    ),
    (r"meta tensor|register_meta|on meta|expected meta device", "depends on values of tensors"),
)


def why_not_run(cls: type, model: torch.nn.Module | None, problem: Exception) -> str:
    """The message about a class that could not be built (then model is None) or run."""
    unknown_name = isinstance(problem, KeyError) and problem.args == (RECORDER,)
    if unknown_name or (model is not None and not _uses_attention_functions(model)):
        return own_attention(cls)
    return (
        f"transformers' {cls.__name__} cannot be run without weights, so its attention is not "
        f"known: it {_reason(problem)}. {_ADVICE}"
    )


def own_attention(cls: type) -> str:
    """The message about a class whose attention cannot be replaced, so that it is not seen."""
    return (
        f"transformers' {cls.__name__} computes its attention itself and never calls the attention "
        f"function that can be replaced, so its layers are not known. {_ADVICE}"
    )


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _uses_attention_functions(model: torch.nn.Module) -> bool:
    """Whether any code of the model looks up attention functions, which transformers imports."""
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(name), "ALL_ATTENTION_FUNCTIONS") for name in files)


def _reason(problem: Exception) -> str:
    text = str(problem)
    for pattern, reason in _REASONS:
        found = re.search(pattern, text)
        if found:
            return reason.format(*(each.replace("'", "") for each in found.groups()))
    return f"does not accept this request ({type(problem).__name__}: {first_line(problem)[:90]})"
