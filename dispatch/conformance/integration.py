"""Checks of a backend in an engine: batches, layers, compilers, graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from attn_dispatch.conformance.check import (
    BackendUnderTest,
    Check,
    Run,
    checks_of_cases,
    same_bits,
    skip,
    skip_unless,
)
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.conformance.graph_steps import captured_call, graph_steps
from attn_dispatch.conformance.harness import call, layer_of
from attn_dispatch.conformance.tolerance import ErrorBound, require, worst_of
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.metadata import AttentionMetadata
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.selection.registry import registry

__all__ = ["batches", "bits", "graphs", "layers"]

#: Columns of a captured graph's block table, and requests that it is captured for.
_COLUMNS, _GRAPH_SIZE = 6, 4
#: Rows of query and output beyond the requests that a graph is captured for.
_PADDING = 3


def batches(target: BackendUnderTest) -> Iterator[Check]:
    """Requests in any order and of any kind, and each phase of a batch by its own metadata."""
    base = target.base
    table: dict[str, Any] = {
        "decodes first": ((1, 1, 1, 24, 18), (39, 4, 17, 24, 50)),
        "prefills first": ((24, 18, 1, 1, 1), (24, 50, 39, 4, 17)),
        "mixed": ((18, 1, 24, 1, 3), (50, 39, 24, 4, 21)),
        "only decodes": ((1, 1, 1, 1), (1, 16, 17, 61)),
        "one decode": ((1,), (33,)),
        "one prompt": ((37,), (37,)),
        "chunks": ((5, 16, 1), (50, 33, 2)),
    }
    cases = {
        name: ("Requests may be in any order.", base, {"query_lens": q, "seq_lens": s})
        for name, (q, s) in table.items()
    }
    drafts = {"query_lens": (4, 1, 3, 20), "seq_lens": (30, 9, 22, 20), "max_decode_query_len": 4}
    cases["drafts"] = ("A decode may have several tokens.", base, drafts)
    yield from checks_of_cases(target, cases)
    if AttentionType(base.attn_type).has_kv_cache and base.block_size is not None:
        shows = "The metadata of each phase gives the same as that of the whole batch."
        yield Check("each phase by itself", shows, base, partial(_phase_by_phase, target))


def _phase_by_phase(target: BackendUnderTest) -> ErrorBound:
    """The prefills by prefill_metadata, then the decodes by decode_metadata, over one cache."""
    step = target.step(target.base)
    metadata: AttentionMetadata = step.metadata_of(target.cls)
    batch = step.batch
    lens = zip(batch.query_lens, batch.phases, strict=True)
    prefills = [query for query, phase in lens if phase is Phase.PREFILL]
    counts = (len(prefills), sum(prefills), batch.num_tokens - sum(prefills))
    found = (metadata.num_prefills, metadata.num_prefill_tokens, metadata.num_decode_tokens)
    require(
        found == counts,
        "the metadata counts (num_prefills, num_prefill_tokens, num_decode_tokens) as "
        f"{found}, and the batch has {counts}",
    )
    impl, cache = step.impl_of(target.cls), step.copy_of_cache()
    expected = step.expected()[0]
    output = torch.full_like(expected, torch.nan).to(target.device, target.base.dtype)
    parts = {Phase.PREFILL: metadata.prefill_metadata, Phase.DECODE: metadata.decode_metadata}
    for phase, rows in batch.parts.items():
        part = parts[phase]
        require(part is not None, f"the batch has requests of {phase}, and no {phase}_metadata")
        arguments = (step.query[rows.tokens], step.key[rows.keys], step.value[rows.keys])
        result: Any = impl.forward(step.layer, *arguments, cache, part)
        output[rows.tokens] = result
    together = target.forward(step).cache
    require(same_bits(cache, together), "phase by phase, other bytes are written to the cache")
    return target.judge(step, Run(output, cache))


# Layers.


def layers(target: BackendUnderTest) -> Iterator[Check]:
    """The backend behind Attention: eager, compiled, and next to another backend."""
    name, base = target.name, target.base
    kinds = {"eager": ("The layer gives the oracle's result.", name)}
    if AttentionType(base.attn_type).has_kv_cache and base.block_size is not None:
        other = "REFERENCE" if base.mla is None else "REFERENCE_MLA"
        kinds[f"decodes next to {other}"] = (
            "Prefills may go to another backend.",
            f"prefill={other},decode={name}",
        )
        kinds[f"prefills next to {other}"] = (
            "Decodes may go to another backend.",
            f"prefill={name},decode={other}",
        )
    for kind, (shows, override) in kinds.items():
        yield Check(kind, shows, base, partial(_as_layer, target, override))
    if base.mla is not None:
        shows = "Prefills in expanded form, by a dense backend, agree with the oracle."
        # Their parts are merged by an LSE in float32, which is too inaccurate for float64.
        spec = target.spec_with(dtype=torch.float32) or base
        yield Check("expanded prefills", shows, spec, partial(_expanded_prefills, target, spec))
    if not target.quick:
        shows = "The layer compiles in one graph, without a break."
        yield Check("torch.compile", shows, base, partial(_compiled, target))


def _require_registered(target: BackendUnderTest) -> None:
    candidate = registry.candidates().get(target.name)
    skip_unless(
        candidate is not None and candidate.backend_cls is target.cls,
        f"a layer finds its backend by name, and {target.name} is not registered as this class",
    )
    skip_unless(
        detect_device(target.device) == target.profile,
        "a layer runs on the real device, and the backend is tested as on another",
    )


def _as_layer(target: BackendUnderTest, override: str) -> ErrorBound:
    _require_registered(target)
    step = target.step(target.base)
    layer = layer_of(step, backend=override)
    return target.judge(step, Run(call(layer, step), layer.kv_cache))


def _expanded_prefills(target: BackendUnderTest, spec: AttentionSpec) -> ErrorBound:
    _require_registered(target)
    step = target.step(spec)
    try:
        layer = layer_of(step, backend=target.name, prefill="expanded")
    except UnsupportedError as error:  # by MLAAttention: no dense backend has such heads
        skip(str(error))
    return target.judge(step, Run(call(layer, step), layer.kv_cache))


def _compiled(target: BackendUnderTest) -> ErrorBound:
    _require_registered(target)
    step = target.step(target.base)
    layer = layer_of(step, backend=target.name)
    torch._dynamo.reset()
    # The check is about the graph, not about the code that a compiler generates around it.
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    returned = call(compiled, step)
    cache = target.forward(step).cache
    if cache is not None and isinstance(layer.kv_cache, torch.Tensor):
        require(same_bits(cache, layer.kv_cache), "compiled, the layer writes other bytes")
    return target.judge(step, Run(returned, layer.kv_cache))


# Graphs.


def graphs(target: BackendUnderTest) -> Iterator[Check]:
    """Where cuda_graph is declared: static buffers that later steps are copied to, and replays."""
    spec = target.spec_with(cuda_graph=True)
    if spec is None or spec.block_size is None:
        return
    lse = target.spec_with("returns_lse", cuda_graph=True)
    kinds = {
        "": (spec, 0),
        ", more rows than tokens": (spec, _PADDING),
        ", more rows than tokens, lse": (lse, _PADDING),
    }
    for kind, (layer, padding) in kinds.items():
        if layer is None:
            continue
        test = partial(_graph, target, layer, padding=padding)
        shows = "Metadata over static buffers computes the step that was copied there."
        yield Check(f"static buffers{kind}", shows, layer, partial(test, is_captured=False))
        shows = "A captured graph, replayed for other steps, computes them."
        test = partial(test, is_captured=True)
        yield Check(f"capture and replay{kind}", shows, layer, test, needs="cuda")
    yield from graph_steps(target)


class _Capture:
    """A forward over static buffers: run each time, or captured once and replayed.

    The output is a static buffer too, and is full of NaN before each run.
    """

    def __init__(
        self, target: BackendUnderTest, first: EngineStep, is_captured: bool, padding: int
    ) -> None:
        spec, device = first.spec, target.device
        self._builder = target.cls.make_builder(spec, device)
        runner = SimpleNamespace(
            metadata_builder=self._builder,
            device=device,
            max_blocks_per_request=_COLUMNS,
            max_seq_len=_COLUMNS * first.block_size,
        )
        self._state: Any = target.cls.get_state_cls()(runner)
        self._impl = first.impl_of(target.cls)
        self._layer = first.layer
        rows = _GRAPH_SIZE + padding
        self._rows = first.empty_rows(rows)
        self._output = self._rows[0].new_empty(rows, *first.output_shape[1:])
        self.cache = first.cache_of(_GRAPH_SIZE * _COLUMNS + 2)
        with self._state.graph_capture(_GRAPH_SIZE):
            self._metadata = self._state.graph_capture_get_metadata_for_batch(_GRAPH_SIZE)
            self._replay = self._run
            if is_captured:
                self._replay = captured_call(self._run)
        self._buffers = self._state.get_graph_input_buffers(self._metadata)

    def _run(self) -> Any:
        arguments = (*self._rows, self.cache, self._metadata, self._output)
        return self._impl.forward(self._layer, *arguments)

    def step(self, step: EngineStep) -> Any:
        """The result of a step of one-token requests, in a padded batch."""
        count = step.batch.num_reqs
        self.cache[: len(step.kv_cache)].view(torch.uint8).copy_(step.kv_cache.view(torch.uint8))
        for static, new in zip(self._rows, (step.query, step.key, step.value), strict=True):
            static.fill_(3.0)
            static[:count].copy_(new)
        metadata = self._builder.build(step.batch)
        self._state.begin_forward(step.batch)
        self._state.prepare_graph_input_buffers(self._buffers, metadata)
        self._output.fill_(math.nan)
        return self._replay()


def _graph(
    target: BackendUnderTest, spec: AttentionSpec, *, is_captured: bool, padding: int
) -> ErrorBound:
    """Steps of other lengths and fewer requests, one after another, through one capture."""
    block_size = spec.block_size or 0
    longest = (_COLUMNS - 1) * block_size
    lens = [(longest, 3, block_size, block_size + 1), (9, 2 * block_size, 1), (longest,)]
    steps = [
        target.step(spec, query_lens=(1,) * len(seqs), seq_lens=seqs, seed=index)
        for index, seqs in enumerate(lens)
    ]
    capture, worst = _Capture(target, steps[0], is_captured, padding), ErrorBound()
    for step in steps:
        result = capture.step(step)
        result = result if isinstance(result, tuple) else (result,)
        count = step.batch.num_reqs
        require(
            not bool(result[0][count:].any()),
            "padding rows of the graph's batch have a result other than 0",
        )
        require(
            not spec.returns_lse or bool((result[1][count:] == -math.inf).all()),
            "padding rows of the graph's batch have an lse other than −inf",
        )
        cut = tuple(each[:count] for each in result)
        found = target.judge(step, Run(cut if spec.returns_lse else cut[0], capture.cache))
        worst = worst_of((worst, found))
        direct = target.forward(step).cache
        require(
            same_bits(capture.cache[: len(direct)], direct),
            "the step writes other bytes to the cache than a direct call does",
        )
    return worst


# Bits.


def bits(target: BackendUnderTest) -> Iterator[Check]:
    """Where batch_invariant is declared: the bits of a request do not depend on the others."""
    spec = target.spec_with("batch_invariant")
    if spec is None:
        return
    orders = {
        "by itself and in a batch": None,
        "in another order": (4, 2, 5, 0, 1, 3),
        "twice": (0, 1, 2, 3, 4, 5),
    }
    shows = "A request gets the same bits whatever else is in the batch."
    for name, order in orders.items():
        yield Check(name, shows, spec, partial(_same_bits, target, spec, order))


def _same_bits(target: BackendUnderTest, spec: AttentionSpec, order: Sequence[int] | None) -> None:
    """In a batch of these requests, or each in a batch of its own."""
    step = target.step(spec)
    rows = target.forward(step).output.split(list(step.case.query_lens))
    for group in [(i,) for i in range(len(rows))] if order is None else [order]:
        part = step.requests(group)
        found = target.forward(part).output.split(list(part.case.query_lens))
        for request, output in zip(group, found, strict=True):
            require(
                same_bits(output, rows[request]),
                f"request {request} of {step.case.query_lens[request]} new tokens and "
                f"{step.case.seq_lens[request]} keys gets other bits in another batch",
            )
