"""Which exchange merges the parts of a batch if `combine` is "auto": the one measured as faster."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from attn_dispatch.distributed.advice import EXCHANGES, split_times_for
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.timings.policy import PhaseCandidates, routes_of
from attn_dispatch.selection.timings.table import (
    Bucket,
    LayerTimes,
    SplitKey,
    bucket_of,
    split_layer_key,
    totals_of,
)

__all__ = ["DEFAULT_EXCHANGE", "ExchangeChoice"]

#: Without a measurement: it takes one collective in place of two.
DEFAULT_EXCHANGE = "A2A"

_CANDIDATES = {Phase.DECODE: PhaseCandidates(DEFAULT_EXCHANGE, frozenset(EXCHANGES))}


class ExchangeChoice:
    """The choice of one group, by times that are the same on all of its ranks.

    Ranks must choose the same exchange, and their tables may differ. So times are loaded when a
    layer is made, and used once the ranks have compared what they loaded.

    Args:
        ranks: how many.
        transport: of the process group, as in SplitKey.
    """

    def __init__(self, ranks: int, transport: str) -> None:
        self.ranks, self.transport = ranks, transport
        self._loaded: Mapping[SplitKey, LayerTimes] = {}
        self._agreed: Mapping[SplitKey, LayerTimes] = {}
        self._routes: dict[tuple[AttentionSpec, bool], Mapping[Bucket, str]] = {}

    def load(self, profile: DeviceProfile) -> None:
        """Read this rank's tables for its device."""
        self._loaded = split_times_for(profile, self.ranks, self.transport)

    @property
    def digest(self) -> str:
        """Of what is loaded: equal on ranks that would choose the same."""
        content = sorted((key, times.points) for key, times in self._loaded.items())
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def settle(self, digests: Sequence[str]) -> bool:
        """Use what is loaded if it is the same on all ranks, and else nothing; return which."""
        is_same = len(set(digests)) == 1
        self._agreed = self._loaded if is_same else {}
        self._routes.clear()
        return is_same

    def times_of(self, spec: AttentionSpec) -> LayerTimes | None:
        """The times of a layer that are used."""
        key = split_layer_key(spec) if self._agreed else None
        return None if key is None else self._agreed.get(SplitKey(key, self.ranks, self.transport))

    def combine_for(
        self, spec: AttentionSpec, batch: AttentionBatch, *, captured: bool = False
    ) -> str:
        """One of ContextParallel's `combine`, by a look-up on the host.

        For a captured step it is the one that is faster with any number of keys.
        """
        if not self._agreed:
            return EXCHANGES[DEFAULT_EXCHANGE]
        routes = self._routes.get((spec, captured))
        if routes is None:
            times = self.times_of(spec)
            routes = {} if times is None else routes_of(times, _CANDIDATES, captured=captured)
            self._routes[spec, captured] = routes
        totals: Any = totals_of(batch)
        if totals is None:
            return EXCHANGES[DEFAULT_EXCHANGE]
        name = routes.get(bucket_of(*totals, captured=captured), DEFAULT_EXCHANGE)
        return EXCHANGES[name]
