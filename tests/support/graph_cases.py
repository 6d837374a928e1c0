"""Random steps of a small model whose CUDA graphs share one graph_state.

Without a GPU the kernels run in Triton's interpreter, and a replay is another call on the captured
metadata: whatever a graph would replay comes from static tensors then, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field

import torch

from attn_dispatch import (
    Attention,
    AttentionBatch,
    DeviceMatch,
    Phase,
    PlaceholderRange,
    bind_kv_caches,
    forward_context,
    graph_state,
    plan_kv_cache,
    register_backend,
)
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.interface.capability import Capabilities
from attn_dispatch.selection.registry import registry
from support.triton_cases import DEVICE, HAS_GPU, SMALL, builder_of

#: A backend for this machine: TRITON_ATTN, which is not selected on a CPU.
BACKEND = "TRITON_ATTN" if HAS_GPU else "INTERPRETED"
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
BLOCK_SIZE = 16
#: (num_heads, num_kv_heads, head_size)
HEADS = (8, 2, 64) if HAS_GPU else (4, 2, 16)
MAX_SEQS, MAX_SEQ_LEN = (16, 1024) if HAS_GPU else (3, 80)
STEPS = 500 if HAS_GPU else 6


@contextlib.contextmanager
def interpreted_backend():
    """TRITON_ATTN for a CPU, under the name of BACKEND."""
    if HAS_GPU:
        yield
        return

    @register_backend
    class Interpreted(TritonAttnBackend):
        name = BACKEND
        capabilities = Capabilities(
            devices=(DeviceMatch(vendor="cpu"),), **TritonAttnBackend.capabilities.fields
        )

    yield
    registry.unregister(BACKEND)


@dataclass(frozen=True)
class Kind:
    """A kind of step: how it is captured, its lengths, and what else its batches have."""

    capture: dict
    longest: int = 1
    budget: int | None = None
    mask: bool = False
    ranges: bool = False

    def query_lens(self, rng, number):
        """Lengths of a random step of this many requests."""
        if self.budget is None:
            return [rng.randint(1, self.longest) for _ in range(number)]
        left, lens = self.budget, []
        for request in range(number):
            most = left - (number - request - 1)
            lens.append(min(most, rng.choice([1, 1, 2, self.budget // 3, self.budget // 2])))
            left -= lens[-1]
        return lens


CHUNK = 160 if HAS_GPU else 40
KINDS = {
    "decode": Kind({}),
    "verification": Kind({"max_query_len": 4}, 4),
    "long verification": Kind({"max_query_len": 20}, 20),
    "chunks": Kind({"num_tokens": CHUNK}, CHUNK, CHUNK),
    "chunks with drafts": Kind({"num_tokens": CHUNK, "max_decode_query_len": 2}, CHUNK, CHUNK),
    "tree": Kind({"max_query_len": 5, "custom_mask": True}, 5, mask=True),
    "tree of one": Kind({"custom_mask": True}, mask=True),
    "masked chunks": Kind({"num_tokens": CHUNK, "custom_mask": True}, CHUNK, CHUNK, mask=True),
    "ranges": Kind({"max_query_len": 4}, 4, ranges=True),
    "chunks with ranges": Kind({"num_tokens": CHUNK}, CHUNK, CHUNK, ranges=True),
}


@dataclass
class Model:
    """Attention layers with caches, and their graph state; `fields` are those of each layer."""

    fields: list
    backend: str = BACKEND
    small_tiles: bool = not HAS_GPU
    layers: list = field(init=False)

    def __post_init__(self):
        heads, kv_heads, size = HEADS
        self.layers = [
            Attention(
                heads, size, num_kv_heads=kv_heads, prefix=f"layers.{i}", dtype=DTYPE,
                device=DEVICE, block_size=BLOCK_SIZE, cuda_graph=True,
                **{"backend": self.backend} | fields,
            )
            for i, fields in enumerate(self.fields)
        ]  # fmt: skip
        specs = {layer.prefix: layer.spec for layer in self.layers}
        plan = plan_kv_cache(specs, DEVICE, backend=self.backend)
        self.num_blocks = MAX_SEQS * -(-MAX_SEQ_LEN // BLOCK_SIZE) + 1
        self.caches = plan.allocate(self.num_blocks, DEVICE)
        for cache in self.caches.values():
            cache.copy_(torch.randn(cache.shape).to(cache.dtype))
        bind_kv_caches(self.layers, self.caches)
        if self.small_tiles:
            for layer in self.layers:
                builder = layer._binding.builder
                for each in getattr(builder, "_builders", {"": builder}).values():
                    if hasattr(each, "launches"):
                        each.launches = builder_of(each.spec, **SMALL).launches

    def state(self, **more):
        sizes = {"max_num_seqs": MAX_SEQS, "max_seq_len": MAX_SEQ_LEN, "max_num_tokens": 400}
        return graph_state(self.layers, **sizes | {"max_ranges": 40} | more)

    def __call__(self, context, rows):
        """The outputs of all layers."""
        with torch.no_grad(), forward_context(context):
            results = [layer(*rows) for layer in self.layers]
        return [t for each in results for t in (each if isinstance(each, tuple) else (each,))]


def random_batch(rng, kind, number=None, *, padded_to=None):
    """A batch of a random step; and the same padded with idle requests to a graph's limits."""
    number = number or rng.randint(1, MAX_SEQS)
    query_lens = kind.query_lens(rng, number)
    seq_lens = [q + rng.choice([0, rng.randint(0, MAX_SEQ_LEN - q)]) for q in query_lens]
    columns = -(-MAX_SEQ_LEN // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    table = (
        torch.randperm(MAX_SEQS * columns, generator=generator).view(MAX_SEQS, columns).int() + 1
    )
    more = {}
    if kind.mask:
        size = sum(q * s for q, s in zip(query_lens, seq_lens, strict=True))
        more["custom_mask"] = torch.rand(size, generator=generator) < 0.7
    if kind.ranges:
        pairs = [(rng.randrange(s), rng.randint(1, s)) for s in seq_lens for _ in range(2)]
        more["multi_modal_placeholder_index_maps"] = {
            "image": [
                PlaceholderRange(i // 2, *pair) for i, pair in enumerate(pairs) if pair[0] < pair[1]
            ]
        }

    def make(idle, tokens_of_idle):
        batch = AttentionBatch.create(
            query_lens + [tokens_of_idle] * idle,
            seq_lens + [0] * idle,
            block_table=table[: number + idle],
            block_size=BLOCK_SIZE,
            device=DEVICE,
            **more,
        )
        return batch

    batch = make(0, 0)
    if padded_to is None:
        return batch
    limits = padded_to
    padded = make(limits.num_reqs - number, int(limits.has_one_token_requests))
    longest = limits.max_query_len
    is_decode = limits.phase is Phase.DECODE
    own = {"max_query_len": longest, "max_decode_query_len": longest if is_decode else 1}
    return batch, dataclasses.replace(padded, **own)


class Captured:
    """A captured step: its rows of query, key and value, and a replay of the model."""

    def __init__(self, model, state, kind, size=MAX_SEQS, *, waits=False):
        self.model, self.state, self.waits = model, state, waits
        with state.graph_capture():
            self.step = state.graph_capture_get_metadata_for_batch(size, **kind.capture)
            heads, kv_heads, head_size = HEADS
            rows = self.step.limits.num_tokens
            self.rows = [
                torch.zeros(rows, n, head_size, dtype=DTYPE, device=DEVICE)
                for n in (heads, kv_heads, kv_heads)
            ]
            self.graph = None
            if HAS_GPU:
                self._capture()

    def _capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.model(self.step, self.rows)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self.model(self.step, self.rows)

    def fill(self, rng):
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        for tensor in self.rows:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def replay(self, batch):
        """The results of a step, without a wait for the device unless `waits` was given."""
        if self.graph is None:
            self.state.prepare_graph_input_buffers(self.step, batch)
            return self.model(self.step, self.rows)
        for each in self.results:
            each.fill_(torch.nan)
        torch.cuda.set_sync_debug_mode("default" if self.waits else "error")
        try:
            self.state.prepare_graph_input_buffers(self.step, batch)
            self.graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return self.results


def same_tensors(one, other):
    """Whether two lists of tensors have the same bits, NaN like NaN."""
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
