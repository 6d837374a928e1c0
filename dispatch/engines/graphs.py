"""DecodeSteps: the captured decodes of an engine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from attn_dispatch.engines.attention import EngineAttention
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.platforms.device_errors import is_capturing
from attn_dispatch.runtime.graph_state import ModelGraphState, graph_state
from attn_dispatch.runtime.graph_step import GraphStep, StepBatch
from attn_dispatch.runtime.layer import Attention

__all__ = ["DecodeSteps"]


class DecodeSteps:
    """The captured decodes of an engine: a step for each number of requests, over one state.

    Args:
        layers: see `graph_state`; their caches are bound when the first graph is captured. An
            EngineAttention that was not made for CUDA graphs is made again for them; one without a
            cache, as of an encoder, is left out.
        max_num_seqs: the most requests of a graph.
        max_seq_len: the most keys of a request.
        batches: as for `graph_state`. None for one batch for each `group` of EngineAttentions.

    """

    def __init__(
        self,
        layers: Sequence[Attention | EngineAttention],
        *,
        max_num_seqs: int,
        max_seq_len: int,
        batches: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self._layers, self._batches = layers, batches
        self._limits = {"max_num_seqs": max_num_seqs, "max_seq_len": max_seq_len}
        self._attentions: list[EngineAttention] = []
        self._steps: dict[int, GraphStep] = {}
        self._state: ModelGraphState | None = None

    def allocate(self, num_reqs: int = 0) -> ModelGraphState:
        """The state, made when it is first asked for: caches must be bound then.

        Args:
            num_reqs: the most requests of a graph, if that is more than max_num_seqs.

        Raises:
            InvalidInputError: as for `graph_state`.
            UnsupportedError: as for `graph_state`, or no backend computes a layer in CUDA graphs,
                with the reasons.
        """
        if self._state is not None:
            return self._state
        found = [each for each in self._layers if isinstance(each, EngineAttention)]
        self._attentions = [each for each in found if each.has_kv_cache]
        plain = [each for each in self._layers if isinstance(each, Attention)]
        groups: dict[Hashable, list[str]] = {}
        for attention in self._attentions:
            if not attention.has_graphs:
                attention.require_cuda_graph()
            groups.setdefault(attention.group, []).extend(each.prefix for each in attention.layers)
        batches = self._batches
        if batches is None and len(groups) > 1:
            batches = list(groups.values())
        limits = {**self._limits, "max_num_seqs": max(self._limits["max_num_seqs"], num_reqs)}
        layers = [*plain, *(layer for each in self._attentions for layer in each.layers)]
        state = graph_state(layers, **limits, batches=batches)
        with state.graph_capture():  # allocates
            self._state = state
        return state

    def __contains__(self, num_reqs: int) -> bool:
        return num_reqs in self._steps

    def capture(self, num_reqs: int, *, warm_up: bool = False) -> GraphStep:
        """The step to capture with this number of requests; each time the same one.

        Args:
            num_reqs: capture the largest number first.
            warm_up: run each EngineAttention on the step, so that its kernels are compiled. No slot
                of a cache is written. For engines that do not run the model before its capture.

        Raises:
            UnsupportedError: as for `allocate`, or the call is itself captured: call it before the
                capture begins.
            InvalidInputError: as for `allocate`.
        """
        _check_not_captured()
        state = self.allocate(num_reqs)
        if num_reqs not in self._steps:
            self._steps[num_reqs] = state.graph_capture_get_metadata_for_batch(num_reqs)
        if warm_up:
            for each in self._attentions:
                each.warm_up(self._steps[num_reqs])
        return self._steps[num_reqs]

    def prepare(self, num_reqs: int, batch: StepBatch) -> GraphStep:
        """Copy a step, of this number of requests or fewer, to where its graph reads it.

        Raises:
            UnsupportedError: the call is itself captured.
            InvalidInputError: the batch does not fit, or nothing was captured with this number of
                requests; nothing has been copied then.
        """
        _check_not_captured()
        if num_reqs not in self._steps:
            raise InvalidInputError(
                f"There is no step of {num_reqs} requests; there are those of: "
                f"{', '.join(map(str, self._steps)) or 'no number'}. Call capture first."
            )
        self.allocate().prepare_graph_input_buffers(self._steps[num_reqs], batch)
        return self._steps[num_reqs]


def _check_not_captured() -> None:
    """A step is prepared of values on the host, which a graph would replay as they were."""
    if is_capturing():
        raise UnsupportedError(
            "A decode step was prepared while a graph is captured, which would replay this step's "
            "values. Prepare it before the capture, or run the step eagerly."
        )
