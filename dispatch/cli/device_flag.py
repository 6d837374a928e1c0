"""The --device of commands that run something: a device that is here and takes tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_dispatch.errors import InvalidInputError, summary_of

if TYPE_CHECKING:
    import torch

__all__ = ["device_to_run_on"]


def device_to_run_on(name: str | None) -> torch.device:
    """The device of a name, or the default one; something has been computed on it.

    Raises:
        InvalidInputError: PyTorch does not know the device, cannot reach it, or was built without
            it.
    """
    import torch

    from attn_dispatch.platforms.detect import detect_device, resolve_device

    device = resolve_device(name)
    detect_device(device)
    try:
        torch.ones(1, device=device).add(1)
    except Exception as error:  # each kind of device fails in its own way
        raise InvalidInputError(
            f"Device {name!r} cannot be used here: {summary_of(error)}. `attn-dispatch doctor` "
            "shows what this machine has."
        ) from error
    return device
