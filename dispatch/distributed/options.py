"""The options of ContextParallel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attn_dispatch.distributed.choice import ExchangeChoice
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.distributed.merge import COMBINES, check_choice

__all__ = ["SplitOptions"]

#: Which heads the queries of a call have.
QUERY_HEADS = ("sharded", "replicated")

#: How prefills are computed.
PREFILLS = ("auto", "merge", "gather")


@dataclass(frozen=True, repr=False)
class SplitOptions:
    """See ContextParallel, which adds what a layer calls."""

    group: Any = None
    combine: str = "auto"
    heads: str = "sharded"
    prefill: str = "auto"
    ranks: Ranks = field(init=False, repr=False, compare=False)
    choice: ExchangeChoice = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("combine", self.combine, COMBINES)
        check_choice("heads", self.heads, QUERY_HEADS)
        check_choice("prefill", self.prefill, PREFILLS)
        ranks = Ranks(self.group)
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "choice", ExchangeChoice(ranks.size, ranks.transport))

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitOptions:
        return self  # a copied layer has the same group

    @property
    def size(self) -> int:
        """How many ranks share the keys."""
        return self.ranks.size

    def __repr__(self) -> str:
        options = ", ".join(f"{n}={getattr(self, n)!r}" for n in ("combine", "heads", "prefill"))
        return f"{type(self).__name__}(rank {self.ranks.rank} of {self.size}, {options})"
