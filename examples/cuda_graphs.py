"""A model with two kinds of attention layers in CUDA graphs, for three kinds of steps.

    python examples/cuda_graphs.py

One graph_state holds the static buffers of all layers and graphs. Without a GPU the steps run
eagerly, as an engine runs those that fit none of its graphs. Each step is compared with one of
REFERENCE's.
"""

from __future__ import annotations

import random

import torch
from torch import nn

from attn_dispatch import (
    Attention,
    AttentionBatch,
    GraphStep,
    ModelGraphState,
    bind_kv_caches,
    forward_context,
    graph_state,
    plan_kv_cache,
)

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 2, 64, 16
HIDDEN = HEADS * HEAD_SIZE
MAX_SEQS, MAX_SEQ_LEN, BUDGET, DRAFTS = 8, 512, 96, 4
COLUMNS = MAX_SEQ_LEN // BLOCK_SIZE


class Model(nn.Module):
    """Four attention layers, every other one with a sliding window, on one residual stream."""

    def __init__(self, device: torch.device, backend: str | None = None) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(
            nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_SIZE, device=device) for _ in range(4)
        )
        self.attention = nn.ModuleList(
            Attention(
                HEADS,
                HEAD_SIZE,
                num_kv_heads=KV_HEADS,
                sliding_window=64 if index % 2 else None,
                prefix=f"layers.{index}",
                dtype=torch.float32,
                device=device,
                block_size=BLOCK_SIZE,
                cuda_graph=device.type == "cuda" and backend is None,
                backend=backend,
            )
            for index in range(4)
        )
        specs = {layer.prefix: layer.spec for layer in self.attention}
        plan = plan_kv_cache(specs, device, backend=backend)
        bind_kv_caches(self, plan.allocate(MAX_SEQS * COLUMNS, device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, HIDDEN) to the same."""
        sizes = [HIDDEN, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE]
        for linear, attention in zip(self.qkv, self.attention, strict=True):
            x = x + attention(*linear(x).split(sizes, dim=-1))
        return x


class Captured:
    """A captured step: static input and output, and the graph between them."""

    def __init__(self, model: Model, state: ModelGraphState, step: GraphStep) -> None:
        self.state, self.step = state, step
        self.x = torch.zeros(step.limits.num_tokens, HIDDEN, device=state.device)
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with forward_context(step):
            with torch.cuda.stream(side):
                model(self.x)  # kernels are compiled on their first call
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.output = model(self.x)

    def replay(self, batch: AttentionBatch, x: torch.Tensor) -> torch.Tensor:
        """The output for a batch, whose input is x; the next replay overwrites it."""
        self.state.prepare_graph_input_buffers(self.step, batch)
        self.x[: len(x)].copy_(x)
        self.graph.replay()
        return self.output[: len(x)]


def capture(model: Model) -> dict[str, Captured]:
    """A graph for each kind of step."""
    state = graph_state(
        model, max_num_seqs=MAX_SEQS, max_num_tokens=BUDGET, max_seq_len=MAX_SEQ_LEN
    )
    with state.graph_capture():
        make = state.graph_capture_get_metadata_for_batch
        steps = {
            "decode": make(MAX_SEQS),
            "drafts": make(MAX_SEQS, max_query_len=DRAFTS),
            "chunks": make(MAX_SEQS, num_tokens=BUDGET),
        }
        return {name: Captured(model, state, step) for name, step in steps.items()}


def random_batch(kind: str, device: torch.device) -> AttentionBatch:
    """A step of this kind, of any number of requests."""
    number = random.randint(1, MAX_SEQS)
    longest = {"decode": 1, "drafts": DRAFTS, "chunks": BUDGET // number}[kind]
    query_lens = [random.randint(1, longest) for _ in range(number)]
    seq_lens = [new + random.randint(0, MAX_SEQ_LEN - new) for new in query_lens]
    return AttentionBatch.create(
        query_lens,
        seq_lens,
        block_table=torch.randperm(MAX_SEQS * COLUMNS).view(MAX_SEQS, COLUMNS)[:number],
        block_size=BLOCK_SIZE,
        device=device,
    )


@torch.no_grad()
def main() -> None:
    """Run steps of every kind next to REFERENCE."""
    torch.manual_seed(0)
    random.seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, reference = Model(device), Model(device, backend="REFERENCE")
    reference.load_state_dict(model.state_dict())
    caches = [
        (layer.kv_cache, other.kv_cache)
        for layer, other in zip(model.attention, reference.attention, strict=True)
    ]
    for cache, _ in caches:
        cache.normal_()
    graphs = capture(model) if device.type == "cuda" else {}
    for kind in ("decode", "drafts", "chunks"):
        for _ in range(3):
            batch = random_batch(kind, device)
            x = torch.randn(batch.num_tokens, HIDDEN, device=device)
            for cache, other in caches:
                other.copy_(cache)
            captured = graphs.get(kind)
            if captured is not None and captured.step.mismatch(batch) is None:
                how, found = "replayed", captured.replay(batch, x)
            else:
                with forward_context(batch):
                    how, found = "eager", model(x)
            with forward_context(batch):
                expected = reference(x)
            error = float((found - expected).abs().max())
            print(
                f"{kind}: {how}, {batch.num_reqs} requests, {batch.num_tokens} tokens, the largest "
                f"difference from REFERENCE's is {error:.5f}"
            )


if __name__ == "__main__":
    main()
