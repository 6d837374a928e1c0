"""enable(): attention of transformers' models by attn-dispatch, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.integrations.transformers.attention import IMPLEMENTATION, attend, layers_of
from attn_dispatch.integrations.transformers.check import check_model
from attn_dispatch.integrations.transformers.masks import make_mask
from attn_dispatch.runtime.layer import Attention

__all__ = ["attention_layers", "enable"]

#: The first version whose mask functions have the arguments that `make_mask` reads.
_FIRST_VERSION = (5, 17)

M = TypeVar("M")


def enable(model: M = None) -> M:  # type: ignore[assignment]
    """Make `attn_implementation="attn_dispatch"` known to transformers, and switch a model to it.

    The name then works in `from_pretrained`, `from_config`, `set_attn_implementation` and
    `generate`. Call this once; further calls change nothing. Backends are selected as everywhere in
    attn-dispatch, for each module at its first call: overrides apply, and `attention_layers` has
    the reasons.

    Args:
        model: a model of transformers to check by `check_model` and to switch; None for none.

    Returns:
        The model.

    Raises:
        UnsupportedError: the model computes its attention itself, or transformers is too old.
        InvalidInputError: it is not a model of transformers.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> enable()
        >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attn_dispatch")
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _FIRST_VERSION:
        raise UnsupportedError(
            f"enable() needs transformers {'.'.join(map(str, _FIRST_VERSION))} or later, and "
            f"{transformers.__version__} is installed. Upgrade it."
        )
    # Both need the lengths on the host, so torch.compile leaves them as they are.
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(attend))
    AttentionMaskInterface.register(IMPLEMENTATION, torch.compiler.disable(make_mask))
    if model is not None:
        checked: Any = model
        check_model(checked)
        checked.set_attn_implementation(IMPLEMENTATION)
        if checked.config._attn_implementation != IMPLEMENTATION:
            raise UnsupportedError(
                f"transformers does not let {type(model).__name__} change its attention. Load it "
                f"with attn_implementation={IMPLEMENTATION!r}."
            )
    return model


def attention_layers(model: Any) -> Mapping[str, tuple[Attention, ...]]:
    """The layers that compute the attention of a model, by the names of its modules.

    A module has none before its first call, and one for each kind of call after that. Their
    `selections` have the backends and the reasons.

    Args:
        model: a model that was called with `attn_implementation="attn_dispatch"`.
    """
    found = {name: tuple(layers_of(module)) for name, module in model.named_modules()}
    return {name: layers for name, layers in found.items() if layers}
