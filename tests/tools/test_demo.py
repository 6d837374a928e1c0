"""The demo: its engine predicts the tokens of a dense float64 forward pass."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.serving import tokenizer
from attn_dispatch.serving.engine import Engine, EngineLimits
from attn_dispatch.serving.model import load_demo_model
from attn_dispatch.serving.serve import check_tokens, serve
from attn_dispatch.serving.workload import Workload, make_workload, prompt_task

WORKLOAD = make_workload(20, seed=3)
PREFIX = tokenizer.encode(WORKLOAD.prefix)


def test_tokens_are_right_while_blocks_are_shared_copied_and_swapped():
    result = serve(WORKLOAD, limits=EngineLimits(num_blocks=48, max_tokens=48))
    assert result.tokens_different == 0
    assert result.tokens_checked == result.stats.new_tokens
    assert result.score == 1.0
    assert result.stats.preemptions > 0
    assert result.stats.blocks_copied > 0
    assert result.stats.mixed_steps > 0


@functools.cache
def usual():
    return serve(WORKLOAD)


@pytest.mark.parametrize("backend", ["REFERENCE", "full.decode=REFERENCE", "-TORCH_SDPA"])
def test_overrides_change_the_picks_but_not_the_answers(backend):
    other = serve(WORKLOAD, backend=backend)
    picked = lambda result: [[report.picked for report in layer] for layer in result.picks]
    assert picked(other) != picked(usual())
    assert other.answers == usual().answers


def test_a_required_backend_that_cannot_serve_a_layer_is_an_error():
    with pytest.raises(UnsupportedError, match="logits_soft_cap"):
        serve(WORKLOAD, backend="TORCH_SDPA")


@pytest.mark.parametrize("tasks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_captured_steps_predict_the_same_tokens(tasks):
    """On a GPU graphs are replayed; in Triton's interpreter the same steps are called."""
    from support.graph_cases import BACKEND, DEVICE, interpreted_backend

    limits = EngineLimits(max_requests=2, max_tokens=24)
    with interpreted_backend():
        model = load_demo_model(device=DEVICE)
        engine = Engine(model, PREFIX, limits=limits, backend=BACKEND, use_graphs=True)
        for index, task in enumerate(WORKLOAD.tasks[:tasks]):
            engine.add(index, tokenizer.encode(WORKLOAD.prefix + task.text))
        while engine.has_work:
            engine.step()
    assert engine.stats.replayed_steps == engine.stats.steps
    assert check_tokens(load_demo_model(torch.float64), engine.finished)[1] == 0


def test_layers_that_cannot_be_captured_run_eagerly():
    engine = Engine(load_demo_model(), PREFIX, backend="REFERENCE", use_graphs=True)
    assert engine._graphs is None
    assert not any(layer.spec.cuda_graph for layer in engine.layers)


def test_all_blocks_are_freed():
    engine = Engine(load_demo_model(), PREFIX, limits=EngineLimits(num_blocks=48))
    free = len(engine._free)
    for index, task in enumerate(WORKLOAD.tasks):
        engine.add(index, tokenizer.encode(WORKLOAD.prefix + task.text))
    while engine.has_work:
        engine.step()
    assert sorted(engine._free) == sorted(set(engine._free))
    assert len(engine._free) == free
    assert len(engine._free_host) == engine.limits.num_host_blocks


def test_the_check_detects_a_wrong_token():
    engine = Engine(load_demo_model(), PREFIX)
    engine.add(0, tokenizer.encode(WORKLOAD.prefix + "48+76="))
    while engine.has_work:
        engine.step()
    oracle = load_demo_model(torch.float64)
    assert check_tokens(oracle, engine.finished)[1] == 0
    engine.finished[0].token_ids[-2] = tokenizer.PLUS_ID
    assert check_tokens(oracle, engine.finished)[1] > 0


def test_a_request_that_cannot_fit_is_rejected():
    engine = Engine(load_demo_model(), PREFIX, limits=EngineLimits(num_blocks=16))
    with pytest.raises(InvalidInputError, match="num_blocks"):
        engine.add(0, tokenizer.encode(WORKLOAD.prefix + "1+1=2;" * 20 + "48+76="))


def test_a_prompt_must_continue_the_prefix():
    engine = Engine(load_demo_model(), PREFIX)
    with pytest.raises(InvalidInputError, match="prefix"):
        engine.add(0, tokenizer.encode("48+76="))


@pytest.mark.parametrize("prompt", ["48+76", "48 + 76 =", "0+0", "999999+1"])
def test_prompts_are_sums(prompt):
    task = prompt_task(prompt)
    a, b = task.question.rstrip("=").split("+")
    assert task.answer == str(int(a) + int(b))


@pytest.mark.parametrize("prompt", ["", "hello", "48-76", "1+2+3", "1234567+1", "48+76;", "+"])
def test_other_prompts_are_rejected(prompt):
    with pytest.raises(InvalidInputError, match="48\\+76"):
        prompt_task(prompt)


def test_the_result_is_json():
    workload = Workload(WORKLOAD.prefix, (prompt_task("48+76"),))
    data = json.loads(json.dumps(serve(workload).asdict()))
    assert data["requests"] == [{"question": "48+76=", "answer": "124", "expected": "124"}]
    assert data["layers"][0][0]["picked"] == "TORCH_SDPA"
    assert data["tokens_different"] == 0
