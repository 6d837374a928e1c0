"""Every private name of vLLM that the plug-in uses."""

from __future__ import annotations

import operator
from typing import Any

import torch

__all__ = ["exact_lengths_of", "scales_of"]

#: (k_scale, v_scale) of a layer, as numbers on the host.
scales_of = operator.attrgetter("_k_scale_float", "_v_scale_float")


def exact_lengths_of(common: Any) -> torch.Tensor | None:
    """(num_reqs,) int32, the keys of each request, if vLLM 0.24 knows them on the host.

    Its layers with chunks have the lengths of the chunks only here: the upper bounds that they hand
    over are those of the whole requests. Later versions have no such field.
    """
    return getattr(common, "_seq_lens_cpu", None)
