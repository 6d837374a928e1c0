"""torch.compile: one opaque op per layer, in one graph, that computes what eager computes."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch
from torch import nn

from attn_dispatch import (
    Attention,
    AttentionBatch,
    AttentionType,
    InvalidInputError,
    bind_kv_caches,
    forward_context,
)
from attn_dispatch.runtime.ops import attention_op, layers_by_key
from support.cases import Case, Step, layer_of, layer_spec

BLOCK_SIZE, NUM_BLOCKS = 4, 12

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


class Model(nn.Module):
    """Layers of attention: full, one that reads the first one's cache, and windowed."""

    def __init__(self, num_layers=3, **features):
        super().__init__()
        torch.manual_seed(0)
        kinds = [{}, {"kv_sharing_target_layer_name": "layers.0"}, {"sliding_window": 3}]
        kinds = kinds[:num_layers]
        self.projections = nn.ModuleList(nn.Linear(16, 64) for _ in kinds)
        self.layers = nn.ModuleList(
            Attention(
                4, 8, num_kv_heads=2, block_size=BLOCK_SIZE, prefix=f"layers.{i}",
                dtype=torch.float32, device="cpu", **kind, **features,
            )
            for i, kind in enumerate(kinds)
        )  # fmt: skip
        self.out = nn.Linear(32, 16)
        caches = {f"layers.{i}": torch.zeros(NUM_BLOCKS, 2, BLOCK_SIZE, 2, 8) for i in (0, 2)}
        bind_kv_caches(self, caches)

    def forward(self, hidden):
        for project, attend in zip(self.projections, self.layers, strict=True):
            query, key, value = project(hidden).split([32, 16, 16], dim=-1)
            hidden = hidden + self.out(attend(query, key, value))
        return hidden


def steps_of_two_requests():
    """(batch, hidden) of steps with ever other numbers of tokens: prompts, decodes, chunks."""
    table = torch.randperm(NUM_BLOCKS, generator=torch.manual_seed(1)).view(2, -1)
    seen = [0, 0]
    for query_lens in ([3, 7], [1, 1], [5, 1], [0, 2], [1, 1], [1, 4]):
        seen = [past + new for past, new in zip(seen, query_lens, strict=True)]
        batch = AttentionBatch.create(query_lens, seen, block_table=table, block_size=BLOCK_SIZE)
        yield batch, torch.randn(sum(query_lens), 16, generator=torch.manual_seed(seen[1]))


def run_steps(model, forward):
    results = []
    for batch, hidden in steps_of_two_requests():
        with forward_context(batch):
            results.append(forward(hidden))
    return results, [layer.kv_cache.clone() for layer in model.layers]


@pytest.mark.parametrize("backend", ["TORCH_SDPA", "prefill=REFERENCE,decode=TORCH_SDPA"])
def test_compiled_and_eager_models_agree(backend):
    model = Model(backend=backend)
    eager, eager_caches = run_steps(model, model)
    for layer in model.layers:
        layer.kv_cache.zero_()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results, caches = run_steps(model, compiled)
    for result, wanted in zip(results + caches, eager + eager_caches, strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
def test_inductor_keeps_every_layer_in_order():
    model = Model(num_layers=2)
    eager, eager_caches = run_steps(model, model)
    model.layers[0].kv_cache.zero_()
    results, caches = run_steps(model, torch.compile(model, fullgraph=True, dynamic=True))
    for result, wanted in zip(results + caches, eager + eager_caches, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_one_graph_serves_any_number_of_tokens():
    model, graphs = Model(), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    run_steps(model, torch.compile(model, backend=count, fullgraph=True, dynamic=True))
    assert len(graphs) <= 2  # one token is a special case to the compiler
    ops = [node for node in graphs[0].graph.nodes if "attn_dispatch" in str(node.target)]
    assert len(ops) == len(model.layers)


def test_cache_is_written_if_output_is_unused():
    model = Model()
    layer = model.layers[0]

    def fill(hidden):
        query, key, value = model.projections[0](hidden).split([32, 16, 16], dim=-1)
        layer(query, key, value)
        return key

    batch, hidden = next(steps_of_two_requests())
    with forward_context(batch):
        torch.compile(fill, backend="aot_eager", fullgraph=True)(hidden)
    assert int((layer.kv_cache != 0).any(-1).sum()) == 10 * 2 * 2


def test_tensor_features_work_compiled():
    """lse, a given output, quantized output with scales."""
    spec = layer_spec(dtype=torch.float32, returns_lse=True, sinks=True)
    step = Step(Case(spec=spec, query_lens=(1, 5), seq_lens=(9, 5)))
    layer, given = layer_of(step), torch.zeros(6, 4, 8)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(query, key, value, output):
        result, lse = layer(query, key, value, output=output)
        return result * 1.0, lse + 0.0

    with forward_context(step.batch):
        output, lse = run(step.query, step.key, step.value, given)
    expected, expected_lse = step.expected()
    step.check(output, expected)
    step.check(given, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("quant", ["fp8_e4m3", "fp8_e4m3_group128"])
def test_quantized_output_works_compiled(quant):
    spec = layer_spec(dtype=torch.float32, head_size_v=32, output_quant=quant)
    step = Step(Case(spec=spec, query_lens=(1, 5), seq_lens=(9, 5)))
    layer, results = layer_of(step), []

    def run(query, key, value, scale):
        name = "output_scale" if quant == "fp8_e4m3" else "output_block_scale"
        return layer(query, key, value, **{name: scale}), scale * 1.0

    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        scale = torch.tensor(0.01) if quant == "fp8_e4m3" else torch.zeros(6, 1)
        with forward_context(step.batch):
            output, scales = function(step.query, step.key, step.value, scale)
        results.append((output.view(torch.uint8), scales))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_attention_types_compile_as_strings():
    @torch.compile(backend="eager", fullgraph=True)
    def scale(tensor, attn_type):
        return tensor * (2 if attn_type == "decoder" else 3)

    one = torch.ones(1)
    assert scale(one, AttentionType.DECODER).item() == 2
    assert scale(one, AttentionType.ENCODER).item() == 3
    assert f"{AttentionType.DECODER}" == "decoder"


def test_missing_batch_is_rejected_at_run_time():
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(InvalidInputError, match="outside of forward_context"):
        compiled(torch.randn(3, 16))


def test_graph_rejects_unsupported_inputs():
    model = Model()
    layer = model.layers[0]

    def run(query):
        return layer(query, kv_cache=query)

    with pytest.raises(Exception, match="metadata comes from forward_context; do not pass them"):
        torch.compile(run, backend="eager", fullgraph=True)(torch.randn(3, 32))


def test_graph_of_a_deleted_layer_is_rejected():
    layer = Attention(4, 8, device="cpu")
    key, query = layer._op_key, torch.randn(3, 4, 8)
    del layer
    gc.collect()
    with pytest.raises(InvalidInputError, match=r"layer '.*' that this graph .* is gone"):
        attention_op(
            query, query, query, torch.empty_like(query), None, None, None, torch.zeros(1), key
        )


@pytest.mark.parametrize("with_lse", [False, True])
def test_op_passes_torch_opcheck(with_lse):
    """PyTorch's own checks: the schema's mutations, the fake implementation, dynamic shapes."""
    spec = layer_spec(dtype=torch.float32, returns_lse=with_lse)
    step = Step(Case(spec=spec, query_lens=(1, 5), seq_lens=(9, 5)))
    layer = layer_of(step)
    lse = torch.zeros(6, 4) if with_lse else None
    arguments = (step.query, step.key, step.value, torch.zeros(6, 4, 8), lse, None, None)
    with torch.inference_mode(False), torch.no_grad(), forward_context(step.batch):
        arguments = tuple(None if a is None else a.clone() for a in arguments)
        layer.kv_cache = layer.kv_cache.clone()
        torch.library.opcheck(attention_op, (*arguments, torch.zeros(1), layer._op_key))


def test_deleted_layers_are_freed():
    key = Attention(4, 8, device="cpu")._op_key
    gc.collect()
    assert key not in layers_by_key
