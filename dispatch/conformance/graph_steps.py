"""Checks of captured steps of every kind: drafts to verify, chunks of prompts, masks, ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attn_dispatch.conformance.check import (
    BackendUnderTest,
    Check,
    Run,
    same_bits,
    skip,
    skip_unless,
)
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.harness import layer_of
from attn_dispatch.conformance.probes import refusals
from attn_dispatch.conformance.tolerance import ErrorBound, require, worst_of
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.captured import GraphLimits, StaticBatch
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.runtime.context import forward_context
from attn_dispatch.runtime.graph_state import graph_state
from attn_dispatch.selection.registry import registry

__all__ = ["captured_call", "graph_steps"]

#: Requests that a graph is captured for, keys of a request, the budget of new tokens of a step with
#: prompts, and rows of query and output beyond the step's.
_REQUESTS, _KEYS, _BUDGET, _PADDING = 4, 96, 44, 3
#: Layers of `BackendUnderTest.layers` that a model has in addition to the plain one.
_PLAIN, _MODEL = "plain", ("window", "soft cap", "ALiBi", "sinks")


@dataclass(frozen=True)
class _Kind:
    """A kind of step.

    Attributes:
        shows: what a pass shows.
        limits: of the graph.
        fields: how the layer differs from the plain one.
        steps: the query_lens, past keys and ranges of steps that one capture serves.
    """

    shows: str
    limits: Mapping[str, Any]
    steps: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int, int], ...]], ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


_DRAFTS = {"max_query_len": 3, "num_tokens": 3 * _REQUESTS}
_CHUNKS = {"max_query_len": _BUDGET, "num_tokens": _BUDGET, "phase": Phase.PREFILL}
_DRAFT_STEPS = (
    ((3, 1, 2, 3), (50, 0, 14, 29), ()),
    ((2, 3), (17, 40), ()),
    ((1,), (60,), ()),
)
_CHUNK_STEPS = (
    ((1, 40, 1), (33, 0, 59), ()),
    ((19, 25), (31, 3), ()),
    ((1, 1, 1, 1), (9, 0, 31, 16), ()),
)
_MASKED = {"has_custom_mask": True, "max_mask_elements": _BUDGET * 90}
_RANGED = {"has_ranges": True, "max_ranges": 5}
_RANGED_STEPS = (
    ((3, 2), (20, 9), ((0, 4, 12), (0, 19, 23), (1, 8, 11))),
    ((1,), (30,), ()),
    ((2, 3, 1), (5, 0, 8), ((1, 0, 3),)),
)
_KINDS = {
    "drafts": _Kind("A graph serves drafts of any length up to its own.", _DRAFTS, _DRAFT_STEPS),
    "chunks": _Kind("A graph serves any mix of chunks and decodes.", _CHUNKS, _CHUNK_STEPS),
    "drafts with masks": _Kind(
        "A graph takes each step's custom mask.", {**_DRAFTS, **_MASKED}, _DRAFT_STEPS,
        {"custom_mask": True},
    ),
    "chunks with masks": _Kind(
        "A graph takes each step's custom mask.", {**_CHUNKS, **_MASKED}, _CHUNK_STEPS,
        {"custom_mask": True},
    ),
    "drafts with ranges": _Kind(
        "A graph takes each step's ranges.", {**_DRAFTS, **_RANGED}, _RANGED_STEPS,
        {"bidirectional_ranges": True},
    ),
}  # fmt: skip


def graph_steps(target: BackendUnderTest) -> Iterator[Check]:
    """Where cuda_graph is declared: the steps that `build_for_graph` does not reject."""
    if target.base.attn_type is not AttentionType.DECODER or target.base.block_size is None:
        return
    for name, kind in _KINDS.items():
        layers = {name: target.spec_with(cuda_graph=True, **kind.fields)}
        if name == "drafts":
            layers["drafts, lse"] = target.spec_with("returns_lse", cuda_graph=True)
        for label, spec in layers.items():
            if spec is None:
                continue
            test = partial(_check, target, spec, kind)
            eager = partial(test, is_captured=False)
            yield Check(f"static buffers of {label}", kind.shows, spec, eager)
            test = partial(test, is_captured=True)
            yield Check(f"capture of {label}", kind.shows, spec, test, needs="cuda")
    spec = target.spec_with(cuda_graph=True)
    if spec is not None:
        shows = "One graph_state serves layers of several kinds, each by its own batch."
        yield Check("several kinds of layers", shows, spec, partial(_check_model, target, spec))


def captured_call(call: Callable[[], Any]) -> Callable[[], Any]:
    """Replays a graph of a call, whose results are NaN before each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # kernels that compile on the first call do so outside of the graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        for tensor in result if isinstance(result, tuple) else (result,):
            tensor.fill_(math.nan)
        graph.replay()
        return result

    return replay


class _Captured:
    """A forward over static buffers: called for each step, or captured once and replayed."""

    def __init__(
        self, target: BackendUnderTest, spec: AttentionSpec, kind: _Kind, first: EngineStep
    ) -> None:
        device, columns = target.device, -(-_KEYS // (spec.block_size or 1))
        limits = GraphLimits(num_reqs=_REQUESTS, max_seq_len=_KEYS, **kind.limits)
        table = torch.zeros(_REQUESTS + 1, columns, dtype=torch.int32, device=device)
        mask = None
        if limits.has_custom_mask:
            mask = torch.zeros(limits.max_mask_elements, dtype=torch.bool, device=device)
        self._static = StaticBatch.make(limits, device, block_table=table, custom_mask=mask)
        self._builder = target.cls.make_builder(spec, device)
        try:
            self._metadata = self._builder.build_for_graph(self._static.batch, limits)
        except UnsupportedError as error:
            skip(str(error))
        self._impl, self._layer = first.impl_of(target.cls), first.layer
        rows = limits.num_tokens + _PADDING
        self._rows = first.empty_rows(rows)
        self._output = self._rows[0].new_empty(rows, *first.output_shape[1:])
        self.cache = first.cache_of(_REQUESTS * columns + 3)
        self.replay = self.call

    def call(self) -> Any:
        self._output.fill_(math.nan)
        arguments = (*self._rows, self.cache, self._metadata, self._output)
        return self._impl.forward(self._layer, *arguments)

    def step(self, step: EngineStep) -> tuple[torch.Tensor, ...]:
        """The results of a step, padding rows included."""
        self.cache[: len(step.kv_cache)].view(torch.uint8).copy_(step.kv_cache.view(torch.uint8))
        for static, new in zip(self._rows, (step.query, step.key, step.value), strict=True):
            static.fill_(3.0)
            static[: len(new)].copy_(new)
        why = self._static.limits.mismatch(step.batch)
        require(why is None, f"the suite's step does not fit its own graph: {why}")
        self._static.fill(step.batch)
        self._builder.update_for_graph(self._metadata, step.batch)
        result = self.replay()
        return result if isinstance(result, tuple) else (result,)


def _check(
    target: BackendUnderTest, spec: AttentionSpec, kind: _Kind, *, is_captured: bool
) -> ErrorBound:
    """Steps of other lengths and fewer requests, one after another, through one capture."""
    steps = [
        target.step(
            spec,
            query_lens=query_lens,
            seq_lens=tuple(q + p for q, p in zip(query_lens, past, strict=True)),
            ranges=ranges,
            seed=seed,
        )
        for seed, (query_lens, past, ranges) in enumerate(kind.steps)
    ]
    captured, worst = _Captured(target, spec, kind, steps[0]), ErrorBound()
    if is_captured:
        captured.replay = captured_call(captured.call)
    for step in steps:
        result, number = captured.step(step), step.batch.num_tokens
        require(
            not bool(result[0][number:].any()),
            "output rows after the step's tokens are not 0",
        )
        require(
            not spec.returns_lse or bool((result[1][number:] == -math.inf).all()),
            "lse rows after the step's tokens are not −inf",
        )
        cut = tuple(each[:number] for each in result)
        found = target.judge(step, Run(cut if spec.returns_lse else cut[0], captured.cache))
        worst = worst_of((worst, found))
        direct = target.forward(step).cache
        assert direct is not None  # the layers have a cache
        require(
            same_bits(captured.cache[: len(direct)], direct),
            "the step writes other bytes to the cache than a direct call does",
        )
    return worst


def _check_model(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    """Layers of several kinds in one capture, by graph_state; called again without a GPU."""
    candidate = registry.candidates().get(target.name)
    is_itself = candidate is not None and candidate.backend_cls is target.cls
    skip_unless(
        is_itself and detect_device(target.device) == target.profile,
        "layers find their backend by name and on the real device",
    )
    kinds = {_PLAIN: spec} | {
        name: other.replace(cuda_graph=True) for name, other in target.layers(*_MODEL)
    }
    kinds = {name: other for name, other in kinds.items() if target.accepts(other)}
    lens = {"query_lens": (1,) * 3, "seq_lens": (50, 9, 33)}
    steps = {name: target.step(other, **lens) for name, other in kinds.items()}
    layers = {}
    for name, step in steps.items():
        try:
            layers[name] = layer_of(step, prefix=name, backend=target.name)
        except UnsupportedError as error:  # a library turned out to lack what was declared
            if not refusals(target.cls, step.spec, target.profile):
                raise
            if name == _PLAIN:
                skip(str(error))
    steps = {name: steps[name] for name in layers}
    state = graph_state(
        layers, max_num_seqs=_REQUESTS, max_seq_len=_KEYS, batches=[[name] for name in layers]
    )
    rows = {
        name: [torch.cat([each, each])[:_REQUESTS] for each in (step.query, step.key, step.value)]
        for name, step in steps.items()
    }
    with state.graph_capture():
        captured = state.graph_capture_get_metadata_for_batch(_REQUESTS)

    def call() -> tuple[torch.Tensor, ...]:
        with forward_context(captured):
            return tuple(layer(*rows[name]) for name, layer in layers.items())

    replay = captured_call(call) if target.device.type == "cuda" else call
    batches = {name: step.batch for name, step in steps.items()}
    state.prepare_graph_input_buffers(captured, batches)
    results, worst = replay(), ErrorBound()
    for (name, step), result in zip(steps.items(), results, strict=True):
        found = target.judge(step, Run(result[: step.batch.num_tokens], layers[name].kv_cache))
        worst = worst_of((worst, found))
    return worst
