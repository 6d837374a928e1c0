"""The request that a model without weights is run on, by what its forward accepts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["input_sets"]

#: Lengths of the one request, different so that cross attention is recognized.
_QUERY_LEN, _ENCODER_LEN = 8, 12

#: Kinds of input that are tried where the class's own `main_input_name` does not work. Classes
#: inherit that name, and some then take another.
_OTHER_INPUTS = ("pixel_values", "input_ids", "pixel_values_videos")
_NUM_FRAMES = 16


def input_sets(model: torch.nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Requests for the model's forward, without values, the most likely one first.

    Args:
        model: of transformers, on the meta device.
        config: of that model.
    """
    main = getattr(model, "main_input_name", "input_ids")
    accepted = inspect.signature(model.forward).parameters
    yield _request(main, accepted, config)
    for name in _OTHER_INPUTS:
        if name in accepted and name != main:
            yield _request(name, accepted, config)
    if main == "pixel_values":
        yield _request("pixel_values_videos", accepted, config, argument=main)


def _request(
    main: str, accepted: Any, config: Any, *, argument: str | None = None
) -> dict[str, Any]:
    """A request with one kind of input; `argument` is what the forward calls it, if not that."""
    inputs: dict[str, Any] = {}

    def add(name: str, *shape: int, dtype: torch.dtype = torch.long) -> None:
        if name in accepted or name == main:
            key = argument if argument is not None and name == main else name
            inputs[key] = torch.ones(shape, dtype=dtype, device="meta")

    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if main in ("pixel_values", "pixel_values_videos"):
        size = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        frames: tuple[int, ...] = ()
        if main == "pixel_values_videos":
            frames = (getattr(config, "num_frames", None) or _NUM_FRAMES,)
        channels = getattr(config, "num_channels", 3)
        add(main, 1, *frames, channels, height, width, dtype=torch.bfloat16)
    elif main == "input_features":
        length = 2 * getattr(config, "max_source_positions", 1500)
        add(main, 1, getattr(config, "num_mel_bins", 80), length, dtype=torch.bfloat16)
    elif main == "input_values":
        add(main, 1, 16_000, dtype=torch.bfloat16)
    else:
        length = _ENCODER_LEN if is_encoder_decoder else _QUERY_LEN
        add("input_ids", 1, length)
        # With a mask, transformers does not look for packed sequences in the positions' values.
        add("attention_mask", 1, length)
    if is_encoder_decoder:
        add("decoder_input_ids", 1, _QUERY_LEN)
        add("decoder_attention_mask", 1, _QUERY_LEN)
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs["use_cache"] = False
    return inputs
