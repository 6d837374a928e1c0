"""An engine's steps as CUDA graphs: decodes by their number, and steps with prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.types import Phase
from attn_dispatch.runtime.context import forward_context
from attn_dispatch.runtime.graph_state import ModelGraphState, graph_state
from attn_dispatch.runtime.graph_step import GraphStep
from attn_dispatch.runtime.layer import Attention

__all__ = ["CapturedSteps"]

#: Computes the logits of some rows, from token ids, positions and the rows' indices.
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _Captured:
    """A captured step and its inputs. On a CPU nothing is captured, and each replay is a call."""

    def __init__(self, run: Run, state: ModelGraphState, step: GraphStep, pool: Any) -> None:
        self._run, self._state, self.step = run, state, step
        device = state.device
        limits = step.limits
        # Verifications choose tokens after each of their tokens, and others one for each request.
        self.num_rows = limits.num_tokens if limits.phase is Phase.DECODE else limits.num_reqs
        sizes = (limits.num_tokens, limits.num_tokens, self.num_rows)
        self._inputs = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._call()  # kernels are compiled on their first call
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._logits = self._call()

    def _call(self) -> torch.Tensor:
        with torch.inference_mode(), forward_context(self.step):
            return self._run(*self._inputs)

    def replay(self, batch: AttentionBatch, *inputs: torch.Tensor) -> torch.Tensor:
        """The logits of the step's rows; the next replay overwrites them."""
        self._state.prepare_graph_input_buffers(self.step, batch)
        for static, new in zip(self._inputs, inputs, strict=True):
            static[: len(new)].copy_(new)
        num_rows = len(inputs[-1])
        if self._graph is None:
            return self._call()[:num_rows]
        self._graph.replay()
        return self._logits[:num_rows]


class CapturedSteps:
    """Captures a model's steps when it is made, and replays the smallest that fits a batch.

    Args:
        run: the model.
        layers: its attention layers, with their caches.
        max_requests: requests of a step.
        max_tokens: new tokens of a step with chunks of prompts; None to capture decodes only.
        max_seq_len: keys of a request.
        smallest: decodes of the smallest step of decodes.
        draft_tokens: the most drafts of a request; with some, their verification is captured.

    Raises:
        UnsupportedError: a backend cannot capture decodes.
    """

    def __init__(
        self,
        run: Run,
        layers: Sequence[Attention],
        *,
        max_requests: int,
        max_tokens: int | None,
        max_seq_len: int,
        smallest: int = 1,
        draft_tokens: int = 0,
    ) -> None:
        state = graph_state(
            layers,
            max_num_seqs=max_requests,
            max_num_tokens=max(max_tokens or 0, max_requests * (1 + draft_tokens)),
            max_seq_len=max_seq_len,
        )
        # The graphs run one at a time, so their temporary tensors can share memory.
        pool = torch.cuda.graph_pool_handle() if state.device.type == "cuda" else None
        powers = [1 << n for n in range(max_requests.bit_length())]
        sizes = [size for size in powers if smallest <= size < max_requests]
        self._captured = []
        with state.graph_capture():
            make = state.graph_capture_get_metadata_for_batch
            steps = [make(size) for size in (*sizes, max_requests)]
            longest = 1 + draft_tokens
            if draft_tokens:
                with contextlib.suppress(UnsupportedError):  # then verifications run eagerly
                    steps += [make(size, max_query_len=longest) for size in (*sizes, max_requests)]
            if max_tokens is not None:
                with contextlib.suppress(UnsupportedError):  # then steps with prompts run eagerly
                    mixed = make(max_requests, num_tokens=max_tokens, max_decode_query_len=longest)
                    steps.append(mixed)
            self._captured = [_Captured(run, state, step, pool) for step in steps]

    def run(
        self,
        batch: AttentionBatch,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor | None:
        """The logits of a batch's rows, or None if no captured step can run it."""
        for captured in self._captured:
            if captured.step.limits.num_reqs < batch.num_reqs or captured.num_rows < len(rows):
                continue  # the common case, without checks
            if captured.step.mismatch(batch) is None:
                return captured.replay(batch, token_ids, positions, rows)
        return None
