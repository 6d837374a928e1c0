"""ContextParallel: the keys of a layer split over the ranks of a group.

Decode context parallelism, as in vLLM's and SGLang's DCP and in Helix (arXiv:2507.07120).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attn_dispatch.distributed.advice import NEEDS_POSITIONS, describe_split, why_not_split
from attn_dispatch.distributed.options import SplitOptions
from attn_dispatch.distributed.prefill import PrefillByGather
from attn_dispatch.distributed.split_attention import Part, SplitBuilder, SplitImpl
from attn_dispatch.errors import InvalidInputError, UnsupportedError, summary_of
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.runtime.binding import LayerBinding
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.recovery import AttemptFailed
from attn_dispatch.runtime.split import part_spec
from attn_dispatch.selection.resolve import SelectionContext

__all__ = ["ContextParallel"]

#: What `explain` says of the parts.
_EXPLAINED = {
    Part.PLAIN: "Requests with one new token",
    Part.POSITIONS: "Requests whose keys need their positions",
    Part.GATHERED: "Prefills whose earlier keys are gathered",
}


class ContextParallel(SplitOptions):
    """Position p of every request is kept on rank p mod W of a group of W ranks.

    It is given to `Attention` and `MLAAttention`; all ranks make the same layers in the same order,
    and call them with batches of the same lengths, blocks and slots. The batch is that of all
    keys, with blocks of W times the cache's block size; see `AttentionBatch.shard` and
    `plan_kv_cache(..., context_parallel=W)`. Each rank gets the new keys and values of all tokens
    and KV heads, and writes its own.

    Args:
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks.
        combine: how parts are merged, as for `merge_states_distributed`; "auto" takes what
            `attn-dispatch tune --context-parallel` measured to be faster, and without a
            measurement "a2a".
        heads: "sharded": rank r is called with the r-th of W equal ranges of the layer's query
            heads, as under tensor parallelism, and returns these. "replicated": every rank is
            called with all heads, and returns all.
        prefill: "auto", "merge" or "gather". "merge" computes prefills as decodes. "gather"
            collects the earlier keys of a prompt, and each rank attends with its own heads; "auto"
            takes, for each prompt, what moves fewer bytes.

    Raises:
        InvalidInputError: an argument is invalid, or torch.distributed is not set up.
    """

    def why_not(self, spec: AttentionSpec) -> str | None:
        """Why the keys of such a layer cannot be split, as a sentence; None if they can."""
        return why_not_split(spec, self.size, sharded_heads=self.heads == "sharded")

    def check(self, spec: AttentionSpec) -> None:
        """Check that the keys of such a layer can be split.

        Raises:
            UnsupportedError: they cannot; the message says why.
        """
        reason = self.why_not(spec)
        if reason:
            raise UnsupportedError(
                f"context_parallel cannot split the keys of this layer. {reason}"
            )

    def call_spec(self, spec: AttentionSpec) -> AttentionSpec:
        """The spec with the heads of the queries and the output of a call."""
        if self.heads == "replicated":
            return spec
        own = spec.num_heads // self.size
        return spec.replace(num_heads=own, num_kv_heads=1 if spec.mla else own)

    def bind(
        self,
        spec: AttentionSpec,
        device: torch.device,
        context: SelectionContext,
        arguments: Mapping[str, Any],
    ) -> LayerBinding:
        """The backends of this rank's part, with an impl and a builder for whole batches."""
        sinks = _checked_sinks(arguments.get("sinks"), spec)
        self.choice.load(context.device)
        arguments = dict(arguments)
        if "sinks" in arguments:
            arguments["sinks"] = None
        whole = LayerBinding.of(part_spec(spec), device, context, arguments)
        parts = {Part.POSITIONS: whole}
        if spec.causal and not any(getattr(spec, name) for name in NEEDS_POSITIONS):
            try:
                # The one new token of a decode sees every key, so that positions do not matter.
                plain = part_spec(spec, positions=False)
                parts[Part.PLAIN] = LayerBinding.of(plain, device, context, arguments)
            except (UnsupportedError, AttemptFailed):
                if spec.cuda_graph:  # only these steps are captured
                    raise
                # The backends that take positions compute such batches too.
        prefill = None
        if self.prefill != "merge":
            prefill = PrefillByGather.of(self, spec, device, context, arguments, sinks)
        if prefill is None and self.prefill == "gather":
            raise UnsupportedError(
                "prefill='gather' needs a layer with its own cache in the dtype of its keys, "
                "neither latent attention nor masks or ranges, and heads that are scattered evenly "
                f"over {self.size} ranks and their KV heads. Use prefill='auto'."
            )
        builder = SplitBuilder(self, spec, device, parts, prefill)
        impl: Any = SplitImpl(self, spec, parts, prefill, sinks)
        return dataclasses.replace(
            whole,
            names=tuple(dict.fromkeys(name for each in parts.values() for name in each.names)),
            impl=impl,
            builder=builder,
            metadata_key=(builder.route, spec, device),
        )

    def explain(self, layer: Attention) -> str:
        """How a layer's steps are computed, and by which backends on this rank, in sentences.

        Raises:
            InvalidInputError: the layer has another context_parallel, or is on no device yet.
        """
        impl = None if layer.context_parallel is not self else layer.split_impl
        if not isinstance(impl, SplitImpl):
            raise InvalidInputError(
                f"Layer {layer.prefix!r} was made with another context_parallel, or on the meta "
                "device."
            )
        lines = [
            f"Keys on {self.size} ranks, this is rank {self.ranks.rank}; query heads {self.heads}; "
            f"{self._merged_by(layer.spec)}."
        ]
        for part, what in _EXPLAINED.items():
            picks = {
                f"{phase}: {each.name}, {each.report.evidence}"
                for phase, each in impl.selections(part).items()
            }
            if picks:
                lines.append(f"{what}: {'; '.join(sorted(picks))}")
        if Part.GATHERED not in impl.parts:
            lines.append("Prefills are computed as decodes.")
        profile = layer._require_binding().profile
        advice = describe_split(layer.spec, profile, self.size, self.ranks.transport)
        return "\n".join([*lines, *advice])

    def _merged_by(self, spec: AttentionSpec) -> str:
        if self.combine != "auto":
            return f"parts merged by {self.combine}"
        if self.choice.times_of(spec) is None:
            return "parts merged by a2a: which exchange is faster is not measured"
        return "parts merged by the exchange that was measured to be faster"

    def agree(self, prefix: str, bind: Callable[[], Mapping[str, str]]) -> None:
        """Bind a new layer on all ranks, or raise on all of them.

        Raises:
            UnsupportedError: another rank rejects the layer.
            Exception: what `bind` raises on this rank.
        """
        picks: Mapping[str, str] = {}
        failure: Exception | None = None
        try:
            picks = bind()
        except Exception as error:
            failure = error
        own = (dict(picks), None if failure is None else summary_of(failure))
        gathered = self.ranks.gather_objects((*own, self.choice.digest))
        found = [(each, text) for each, text, _ in gathered]
        if failure is not None:
            raise failure
        if not self.choice.settle([digest for *_, digest in gathered]) and self.ranks.rank == 0:
            warnings.warn(
                "The ranks have different tables of measured times for context parallelism, so "
                "none is used: parts are merged by a2a. Give all ranks the same file in "
                "ATTN_DISPATCH_TUNING.",
                stacklevel=5,
            )
        rejected = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text]
        if rejected:
            raise UnsupportedError(
                f"Layer {prefix!r} cannot be made on every rank, so it is on none. "
                + "; ".join(rejected)
            )
        if any(each != found[0] for each in found) and self.ranks.rank == 0:
            texts = (f"rank {rank}: {each}" for rank, (each, _) in enumerate(found))
            warnings.warn(
                f"Layer {prefix!r} has other backends on other ranks, and the slowest decides: "
                + "; ".join(texts),
                stacklevel=5,
            )


def _checked_sinks(sinks: Any, spec: AttentionSpec) -> torch.Tensor | None:
    if sinks is None:
        return None
    is_float = isinstance(sinks, torch.Tensor) and sinks.is_floating_point()
    if not is_float or tuple(sinks.shape) != (spec.num_heads,):
        raise InvalidInputError(
            f"sinks must be a floating-point tensor with one logit for each of the "
            f"{spec.num_heads} query heads of all ranks."
        )
    found: torch.Tensor = sinks
    return found
