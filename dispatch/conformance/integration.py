"""Checks of what an engine does with a backend: batches, layers, compilers, graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from attn_dispatch.conformance.cases import Step
from attn_dispatch.conformance.check import (
    BackendUnderTest,
    Check,
    Run,
    checks_of_cases,
    same_bits,
    skip_unless,
)
from attn_dispatch.conformance.harness import call, layer_of
from attn_dispatch.conformance.tolerance import ErrorBound, require
from attn_dispatch.interface.metadata import AttentionMetadata
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.selection.registry import registry

__all__ = ["batches", "bits", "graphs", "layers"]

#: Rows of a captured graph's block table, and requests that it is captured for.
_COLUMNS, _GRAPH_SIZE = 6, 4
#: Rows of query and output beyond the requests that a graph is captured for.
_PADDING = 3


def batches(target: BackendUnderTest) -> Iterator[Check]:
    """Requests in any order and of any kind, and each phase of a batch on its own."""
    base = target.base
    table: dict[str, Any] = {
        "decodes first": ((1, 1, 1, 24, 18), (39, 4, 17, 24, 50)),
        "prefills first": ((24, 18, 1, 1, 1), (24, 50, 39, 4, 17)),
        "mixed": ((18, 1, 24, 1, 3), (50, 39, 24, 4, 21)),
        "decodes alone": ((1, 1, 1, 1), (1, 16, 17, 61)),
        "one decode": ((1,), (33,)),
        "one prompt": ((37,), (37,)),
        "chunks": ((5, 16, 1), (50, 33, 2)),
    }
    yield from checks_of_cases(
        target,
        "batches",
        {
            name: ("Requests may stand in any order.", base, {"query_lens": q, "seq_lens": s})
            for name, (q, s) in table.items()
        },
    )
    drafts = {"query_lens": (4, 1, 3, 20), "seq_lens": (30, 9, 22, 20), "max_decode_query_len": 4}
    yield from checks_of_cases(
        target, "batches", {"drafts": ("A decode may have several tokens.", base, drafts)}
    )
    if AttentionType(base.attn_type).has_kv_cache and base.block_size is not None:
        yield Check(
            "batches",
            "each phase alone",
            "The metadata of each phase gives what that of the whole batch gives.",
            base,
            partial(_phases_apart, target),
        )


def _phases_apart(target: BackendUnderTest) -> ErrorBound:
    """The prefills by prefill_metadata, then the decodes by decode_metadata, over one cache."""
    step = target.step(target.base)
    assert step.kv_cache is not None
    assert step.key is not None
    assert step.value is not None
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
    impl, cache = step.impl_of(target.cls), step.kv_cache.clone()
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
    assert together is not None
    require(same_bits(cache, together), "the phases apart write other bytes to the cache")
    return target.judge(step, Run(output, cache))


# Layers.


def layers(target: BackendUnderTest) -> Iterator[Check]:
    """The backend behind Attention: eager, compiled, and beside another backend."""
    name = target.name
    kinds: dict[str, tuple[str, Any]] = {
        "eager": ("The layer gives what the oracle gives.", name),
    }
    if AttentionType(target.base.attn_type).has_kv_cache and target.base.block_size is not None:
        kinds["decodes beside REFERENCE"] = (
            "Prefills may go to another backend.",
            f"prefill=REFERENCE,decode={name}",
        )
        kinds["prefills beside REFERENCE"] = (
            "Decodes may go to another backend.",
            f"prefill={name},decode=REFERENCE",
        )
    for kind, (shows, override) in kinds.items():
        yield Check("layer", kind, shows, target.base, partial(_as_layer, target, override))
    if not target.quick:
        yield Check(
            "layer",
            "torch.compile",
            "The layer compiles in one graph, without a break.",
            target.base,
            partial(_compiled, target),
        )


def _require_registered(target: BackendUnderTest) -> None:
    candidate = registry.candidates().get(target.name)
    skip_unless(
        candidate is not None and candidate.backend_cls is target.cls,
        f"a layer finds its backend by name, and {target.name} is not registered as this class",
    )
    skip_unless(
        detect_device(target.device) == target.profile,
        "a layer asks the real device, and the backend is tested as on another",
    )


def _as_layer(target: BackendUnderTest, override: str) -> ErrorBound:
    _require_registered(target)
    step = target.step(target.base)
    layer = layer_of(step, backend=override)
    return target.judge(step, Run(call(layer, step), layer.kv_cache))


def _compiled(target: BackendUnderTest) -> ErrorBound:
    _require_registered(target)
    step = target.step(target.base)
    layer = layer_of(step, backend=target.name)
    torch._dynamo.reset()
    # The graph is what is checked; what a code generator makes of what is around it is not.
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    returned = call(compiled, step)
    cache = target.forward(step).cache
    if cache is not None and layer.kv_cache is not None:
        require(same_bits(cache, layer.kv_cache), "compiled, the layer writes other bytes")
    return target.judge(step, Run(returned, layer.kv_cache))


# Graphs.


def graphs(target: BackendUnderTest) -> Iterator[Check]:
    """Where cuda_graph is declared: static buffers that later steps are copied to, and replays."""
    spec = target.spec_with(cuda_graph=True)
    if spec is None or spec.block_size is None:
        return
    lse = target.spec_with("returns_lse", cuda_graph=True)
    for kind, layer in {"": spec, "lse": lse}.items():
        for padding in (0, _PADDING):
            if layer is None or (kind and not padding):
                continue
            more = ", ".join(filter(None, ("more rows than tokens" if padding else "", kind)))
            yield Check(
                "graphs",
                ", ".join(filter(None, ("static buffers", more))),
                "Metadata over static buffers computes the step that was copied there.",
                layer,
                partial(_graph, target, layer, False, padding),
            )
            yield Check(
                "graphs",
                ", ".join(filter(None, ("capture and replay", more))),
                "A captured graph, replayed for other steps, computes them.",
                layer,
                partial(_graph, target, layer, True, padding),
                needs="cuda",
            )


class _Capture:
    """A forward over static buffers: run each time, or captured once and replayed.

    Its output is given to it, and is full of NaN before each run.
    """

    def __init__(
        self, target: BackendUnderTest, first: Step, is_captured: bool, padding: int
    ) -> None:
        spec, device = first.spec, target.device
        self._builder = target.cls.make_builder(spec, device)
        assert spec.block_size is not None
        runner = SimpleNamespace(
            metadata_builder=self._builder,
            device=device,
            max_blocks_per_request=_COLUMNS,
            max_seq_len=_COLUMNS * spec.block_size,
        )
        self._state: Any = target.cls.get_state_cls()(runner)
        self._impl = first.impl_of(target.cls)
        self._layer = first.layer
        sizes = ((spec.num_heads, spec.head_size),) + (
            (spec.num_kv_heads, spec.head_size),
            (spec.num_kv_heads, spec.head_size_v),
        )
        rows = _GRAPH_SIZE + padding
        self.rows = [torch.zeros(rows, *size, dtype=spec.dtype, device=device) for size in sizes]
        self._output = self.rows[0].new_empty(rows, spec.num_heads, spec.head_size_v)
        assert first.kv_cache is not None
        blocks = _GRAPH_SIZE * _COLUMNS + 2
        self.cache = first.kv_cache[:1].repeat(blocks, 1, 1, 1, 1)
        with self._state.graph_capture(_GRAPH_SIZE):
            self._metadata = self._state.graph_capture_get_metadata_for_batch(_GRAPH_SIZE)
            self._replay = self._run
            if is_captured:
                self._capture()
        self._buffers = self._state.get_graph_input_buffers(self._metadata)

    def _run(self) -> Any:
        query, key, value = self.rows
        arguments = (query, key, value, self.cache, self._metadata, self._output)
        return self._impl.forward(self._layer, *arguments)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()  # what compiles on the first call does so outside of the graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._run()

        def replay() -> Any:
            for tensor in result if isinstance(result, tuple) else (result,):
                tensor.fill_(math.nan)
            graph.replay()
            return result

        self._replay = replay

    def step(self, step: Step) -> Any:
        """The result of a step of one-token requests, in a padded batch."""
        assert step.kv_cache is not None
        count = step.batch.num_reqs
        self.cache[: len(step.kv_cache)].view(torch.uint8).copy_(step.kv_cache.view(torch.uint8))
        for static, new in zip(self.rows, (step.query, step.key, step.value), strict=True):
            assert new is not None
            static.fill_(3.0)
            static[:count].copy_(new)
        metadata = self._builder.build(step.batch)
        self._state.begin_forward(step.batch)
        self._state.prepare_graph_input_buffers(self._buffers, metadata)
        self._output.fill_(math.nan)
        return self._replay()


def _graph(
    target: BackendUnderTest, spec: AttentionSpec, is_captured: bool, padding: int
) -> ErrorBound:
    """Steps of other lengths and fewer requests, one after another, through one capture."""
    block_size = spec.block_size
    assert block_size is not None
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
            "rows that only pad the graph's batch have a result other than 0",
        )
        require(
            not spec.returns_lse or bool((result[1][count:] == -math.inf).all()),
            "rows that only pad the graph's batch have an lse other than −inf",
        )
        cut = tuple(each[:count] for each in result)
        found = target.judge(step, Run(cut if spec.returns_lse else cut[0], capture.cache))
        worst = max(worst, found, key=lambda finding: finding.ratio)
        direct = target.forward(step).cache
        assert direct is not None
        require(
            same_bits(capture.cache[: len(direct)], direct),
            "what the step writes to the cache differs from what a direct call writes",
        )
    return worst


# Bits.


def bits(target: BackendUnderTest) -> Iterator[Check]:
    """Where batch_invariant is declared: a request's bits do not depend on its company."""
    spec = target.spec_with("batch_invariant")
    if spec is None:
        return
    for name, order in {
        "alone and in company": None,
        "in another order": (4, 2, 5, 0, 1, 3),
        "twice": (0, 1, 2, 3, 4, 5),
    }.items():
        yield Check(
            "bits",
            name,
            "A request gets the same bits whatever else is in the batch.",
            spec,
            partial(_same_bits, target, spec, order),
        )


def _same_bits(target: BackendUnderTest, spec: AttentionSpec, order: Sequence[int] | None) -> None:
    step = target.step(spec)
    whole = target.forward(step).output
    starts = step.batch.query_start_list
    groups = [(i,) for i in range(len(step.case.query_lens))] if order is None else [tuple(order)]
    for group in groups:
        part = _requests(step, group)
        output = target.forward(part).output
        done = 0
        for request in group:
            rows = slice(starts[request], starts[request + 1])
            length = rows.stop - rows.start
            require(
                same_bits(output[done : done + length], whole[rows]),
                f"request {request} of {step.case.query_lens[request]} new tokens and "
                f"{step.case.seq_lens[request]} keys gets other bits in other company",
            )
            done += length


def _requests(step: Step, chosen: Sequence[int]) -> Step:
    """The step with these of its requests, in this order, over the same cache."""
    case = step.case
    part = object.__new__(Step)
    part.__dict__.update(step.__dict__)

    def pick(values: Any) -> Any:
        return None if values is None else type(values)(values[i] for i in chosen)

    def rows(lens: Sequence[int]) -> torch.Tensor:
        starts = [0, *torch.tensor(lens).cumsum(0).tolist()]
        return torch.tensor([r for i in chosen for r in range(starts[i], starts[i + 1])]).long()

    part.case = case.replace(
        query_lens=pick(case.query_lens), seq_lens=pick(case.seq_lens), new_lens=pick(case.new_lens)
    )
    keys = rows(step.new_lens).to(step.device)
    part.query = step.query[rows(case.query_lens).to(step.device)]
    if step.key is not None and step.value is not None:
        part.key, part.value = step.key[keys], step.value[keys]
    if step._table is not None and step._slots is not None:
        part._table, part._slots = step._table[list(chosen)], step._slots[keys.cpu()]
    part.new_lens = pick(step.new_lens)
    part.batch = part._make_batch()
    return part
