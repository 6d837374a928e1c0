"""The engine on a GPU: with CUDA graphs, without, and compiled, the tokens of eager attention."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from attn_dispatch.integrations.transformers.paged import PagedModel
from attn_dispatch.serving import Engine, Limits, Sampling
from attn_dispatch.serving.eager import check_answers
from support.parity_models import VOCABULARY, build

#: For a look at these tests on a CPU, without graphs.
DEVICE = os.environ.get("ENGINE_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU"),
]

NEW_TOKENS = 10
#: Latents and rotated parts of a size that TRITON_MLA takes, and no experts, whose code of
#: transformers waits for the device.
LATENT = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "first_k_dense_replace": 2}
#: Model type -> the changes of its config.
MODELS = {"llama": {}, "gemma2": {}, "gemma3_text": {}, "gpt_oss": {}, "deepseek_v3": LATENT}
#: transformers' experts of these wait for the device.
NOT_CAPTURED = {"gpt_oss"}


def prompts(longest: int) -> list[list[int]]:
    """Prompts of several lengths, the last of which begins like the first."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda count: torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
    first = draw(longest)
    return [first, draw(longest // 3), draw(3), [*first[: longest // 2], *draw(4)], draw(longest)]


def serve(model, *, graphs: bool, compile_layers: bool = False, longest: int = 23) -> Engine:
    """An engine with so few blocks that requests are preempted, and steps that cut prompts."""
    paged = PagedModel(model, block_size=16, cuda_graph=ON_GPU, compile_layers=compile_layers)
    blocks = -(-(longest + NEW_TOKENS) // 16) + 3
    limits = Limits(
        max_requests=4, max_tokens=12, num_blocks=blocks, max_seq_len=longest + NEW_TOKENS
    )
    engine = Engine(paged, limits=limits, use_graphs=graphs and ON_GPU)
    engine.generate(prompts(longest), Sampling(max_new_tokens=NEW_TOKENS))
    return engine


def answers(engine: Engine) -> dict[int, list[int]]:
    return {request.index: request.answer_ids for request in engine.finished}


def on_gpu(model_type: str, **changes) -> torch.nn.Module:
    return copy.deepcopy(build(model_type, **changes)).to(DEVICE)


def test_compiled_layers_choose_the_same_tokens():
    model = on_gpu("llama")
    expected = answers(serve(model, graphs=True))
    compiled = serve(copy.deepcopy(model), graphs=True, compile_layers=True)
    assert answers(compiled) == expected
    assert check_answers(compiled.model, compiled.finished).different == 0


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_with_graphs_and_without_are_those_of_eager_attention(model_type):
    assert not torch.backends.cuda.matmul.allow_tf32
    model = on_gpu(model_type, **MODELS[model_type])
    with warnings.catch_warnings():
        if model_type not in NOT_CAPTURED:
            warnings.filterwarnings("error", message="Steps are not captured")
        captured = serve(model, graphs=True, longest=70)
    assert captured.stats.preemptions > 0
    assert captured.stats.shared_tokens > 0
    if ON_GPU and model_type not in NOT_CAPTURED:
        assert captured.stats.replayed_steps > 0
    result = check_answers(captured.model, captured.finished)
    assert (result.tokens, result.different) == (5 * NEW_TOKENS, 0)
    assert answers(serve(model, graphs=False, longest=70)) == answers(captured)


@pytest.mark.parametrize("heads", [(8, 2, 64), (8, 1, 128)], ids=["64", "128"])
def test_the_kernels_of_bfloat16(heads):
    """Heads of usual sizes, so that the device's own kernels are picked."""
    num_heads, num_kv_heads, head_size = heads
    changes = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_size,
    }
    model = on_gpu("llama", **changes).to(torch.bfloat16)
    for graphs in (True, False):
        engine = serve(model, graphs=graphs, longest=100)
        assert (engine.stats.replayed_steps > 0) == (graphs and ON_GPU)
        assert check_answers(engine.model, engine.finished).different == 0


def test_a_step_waits_only_for_its_tokens(monkeypatch):
    model = on_gpu("llama")
    engine = serve(model, graphs=True)
    run = engine._forward.run

    def without_waits(*arguments):
        if not ON_GPU:
            return run(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    expected = answers(engine)
    monkeypatch.setattr(engine._forward, "run", without_waits)
    again = engine.generate(prompts(23), Sampling(max_new_tokens=NEW_TOKENS))
    assert [request.answer_ids for request in again] == [expected[i] for i in range(5)]
    if ON_GPU:
        graphs, engine._forward.graphs = engine._forward.graphs, None
        again = engine.generate(prompts(23), Sampling(max_new_tokens=NEW_TOKENS))
        engine._forward.graphs = graphs
        assert [request.answer_ids for request in again] == [expected[i] for i in range(5)]


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_captured_verifications_choose_the_same_tokens(model_type):
    model = on_gpu(model_type, **MODELS[model_type])
    given = [[*each, *each] for each in prompts(23)]
    sampling = Sampling(max_new_tokens=40)
    found, stats = [], []
    for draft_tokens in (0, 3):
        paged = PagedModel(model, block_size=16, cuda_graph=ON_GPU)
        limits = Limits(max_requests=4)
        engine = Engine(paged, limits=limits, use_graphs=ON_GPU, draft_tokens=draft_tokens)
        found.append([each.answer_ids for each in engine.generate(given, sampling)])
        stats.append(engine.stats)
    assert found[0] == found[1]
    assert stats[1].accepted_tokens > 0
    assert stats[1].steps < stats[0].steps
    if ON_GPU:
        # With latents, captured steps may take only one new token of each request.
        least = 1 if "kv_lora_rank" in MODELS[model_type] else stats[1].steps
        assert stats[1].replayed_steps >= least


def test_drawn_tokens_are_those_of_the_seed():
    model = on_gpu("llama")
    drawn = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=0.9, seed=3)
    found = []
    for graphs in (True, False):
        paged = PagedModel(model, block_size=16, cuda_graph=ON_GPU)
        engine = Engine(paged, limits=Limits(max_requests=4), use_graphs=graphs and ON_GPU)
        found.append([each.answer_ids for each in engine.generate(prompts(23), drawn)])
    assert found[0] == found[1]
