"""Every private name of vLLM that the plug-in uses."""

from __future__ import annotations

import operator
from typing import Any

import torch

__all__ = ["host_lengths_of", "scales_of"]

#: (k_scale, v_scale) of a layer, as numbers on the host.
scales_of = operator.attrgetter("_k_scale_float", "_v_scale_float")


def host_lengths_of(common: Any) -> torch.Tensor | None:
    """(num_reqs,) int32, the keys of each request on the host, or bounds of them; None: neither.

    vLLM 0.24 can have exact ones, and its layers with chunks have the lengths of the chunks only
    there: the upper bounds that they hand over are those of the whole requests. Later versions have
    no such field.
    """
    exact: torch.Tensor | None = getattr(common, "_seq_lens_cpu", None)
    return common.seq_lens_cpu_upper_bound if exact is None else exact
