"""Who can take the place of the first in the platform's order, whatever was planned for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from attn_dispatch.interface.spec import AttentionSpec

if TYPE_CHECKING:
    from attn_dispatch.interface.backend import AttentionBackend

__all__ = ["compatible_substitutes"]

_LAYOUTS = ("NHD", "HND")


def compatible_substitutes(
    able: Sequence[str],
    classes: Mapping[str, type[AttentionBackend]],
    spec: AttentionSpec,
    supports: Callable[[str, AttentionSpec], bool],
) -> frozenset[str]:
    """Those of `able` who can be chosen batch by batch instead of the first, and the first.

    Block size and heads are in the request, and all who are able take these. What may be open is
    the layout: a stand-in must take every layout that the first takes, since the cache was planned
    for that one. And the buffers of captured graphs are made by the first's class of state: a
    stand-in must have the same, the common one, which holds batches and nothing of a backend's.

    Args:
        able: in the platform's order.
        classes: by name.
        spec: the request.
        supports: whether one computes a request here.
    """
    from attn_dispatch.interface.graphs import CommonAttentionState

    layouts = () if spec.kv_cache_layout else _LAYOUTS
    laid = [spec.replace(kv_cache_layout=layout) for layout in layouts]
    first, *others = able
    needed = [each for each in laid if supports(first, each)]

    def fits(name: str) -> bool:
        states = {classes[each].get_state_cls() for each in (first, name)}
        return (not spec.cuda_graph or states == {CommonAttentionState}) and all(
            supports(name, each) for each in needed
        )

    return frozenset([first, *filter(fits, others)])
