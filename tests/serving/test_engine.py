"""The engine predicts the tokens of a dense float64 forward pass, whatever its limits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.serving import FinishReason, Limits, Sampling
from attn_dispatch.serving.limits import sized
from support.addition import tokenizer
from support.addition.served import (
    MAX_NEW_TOKENS,
    SMALL,
    AdditionModel,
    answer_of,
    check_tokens,
    engine_of,
    prompts_of,
)
from support.addition.workload import make_workload

pytest.importorskip("transformers", minversion="5.24")

WORKLOAD = make_workload(20, seed=3)
PROMPTS = prompts_of(WORKLOAD)
SHORT = tokenizer.encode("48+76=")
SAMPLING = Sampling(max_new_tokens=MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def model():
    return AdditionModel()


def unused(engine):
    """Blocks that no request uses, on the device and on the host."""
    scheduler = engine._scheduler
    return scheduler.pool.num_free, scheduler.host_pool.num_free


@pytest.mark.parametrize(
    ("limits", "run_ahead"),
    [
        (SMALL, False),
        (replace(SMALL, num_blocks=28, max_requests=6, max_tokens=16), True),
        (replace(SMALL, num_blocks=28, host_bytes=0), False),
    ],
    ids=["small", "smaller", "no_host"],
)
def test_tokens_are_right_whatever_the_limits(model, limits, run_ahead):
    engine = engine_of(model, limits, run_ahead=run_ahead)
    before = unused(engine)
    requests = engine.generate(PROMPTS, SAMPLING)
    assert check_tokens(requests) == (engine.stats.new_tokens, 0)
    assert [answer_of(each) for each in requests] == [task.answer for task in WORKLOAD.tasks]
    assert unused(engine) == before
    assert not engine.has_work


def test_a_step_can_be_one_token(model):
    engine = engine_of(model, Limits(max_requests=1, max_tokens=1, num_blocks=32))
    requests = engine.generate([SHORT, SHORT], SAMPLING)
    assert [answer_of(each) for each in requests] == ["124"] * 2
    assert engine.stats.steps == engine.stats.prompt_tokens + 2 * len("124")


def test_preemption_swaps_blocks_and_without_room_on_the_host_computes_again(model):
    swapped = engine_of(model, replace(SMALL, num_blocks=28))
    swapped.generate(PROMPTS, SAMPLING)
    assert swapped.stats.preemptions > 0
    assert swapped.stats.blocks_swapped > 0
    assert swapped.stats.recomputed == 0
    again = engine_of(model, replace(SMALL, num_blocks=28, host_bytes=0))
    again.generate(PROMPTS, SAMPLING)
    assert again.stats.recomputed > 0
    assert again.stats.blocks_swapped == 0


def test_requests_share_the_blocks_of_their_common_prefix(model):
    engine = engine_of(model, replace(SMALL, num_blocks=400))
    prefix = len(tokenizer.encode(WORKLOAD.prefix)) // engine.block_size * engine.block_size
    requests = engine.generate(PROMPTS, SAMPLING)
    assert [each.num_shared >= prefix for each in requests] == [False] + [True] * 19
    assert engine.stats.prompt_tokens + engine.stats.shared_tokens == sum(map(len, PROMPTS))
    again = engine.generate(PROMPTS[:1], SAMPLING)
    assert again[0].num_shared == (len(PROMPTS[0]) - 1) // engine.block_size * engine.block_size
    assert again[0].answer_ids == requests[0].answer_ids


def test_an_answer_does_not_depend_on_other_requests(model):
    drawn = Sampling(max_new_tokens=6, temperature=3.0, top_k=8, seed=7, ignore_eos=True)
    together = engine_of(model).generate(PROMPTS, [drawn, *[SAMPLING] * 19])
    (apart,) = engine_of(model).generate(PROMPTS[:1], drawn)
    assert together[0].answer_ids == apart.answer_ids
    (other,) = engine_of(model).generate(PROMPTS[:1], replace(drawn, seed=8))
    assert other.answer_ids != apart.answer_ids


@pytest.mark.parametrize("run_ahead", [False, True])
def test_random_arrivals_and_cancellations_leave_no_block_behind(model, run_ahead):
    rng = random.Random(5)
    engine = engine_of(model, replace(SMALL, num_blocks=28), run_ahead=run_ahead)
    before = unused(engine)
    queue, requests = list(PROMPTS), []
    while queue or engine.has_work:
        for _ in range(min(rng.randint(0, 4), len(queue))):
            requests.append(engine.add(queue.pop(), SAMPLING))
        if requests and rng.random() < 0.2:
            engine.cancel(rng.choice(requests))
        engine.step()
    assert len(engine.finished) == len(PROMPTS)
    assert unused(engine) == before
    kept = [each for each in engine.finished if each.finish_reason is not FinishReason.CANCELLED]
    assert kept
    assert check_tokens(kept)[1] == 0
    assert (engine.stats.steps_ahead > 0) == run_ahead


def test_steps_of_decodes_run_ahead(model):
    sampling = Sampling(max_new_tokens=7, ignore_eos=True)
    found = []
    for run_ahead in (False, True):
        engine = engine_of(model, replace(SMALL, num_blocks=400), run_ahead=run_ahead)
        requests = engine.generate(PROMPTS[:1], sampling)
        found.append([each.answer_ids for each in requests])
        assert engine.stats.steps_ahead == (engine.stats.steps - 1) * run_ahead
    assert found[0] == found[1]


def test_a_token_too_many_is_dropped(model):
    """Requests that end at an end token are in the step that runs then."""
    engine = engine_of(model, replace(SMALL, num_blocks=400), run_ahead=True)
    before = unused(engine)
    engine.generate(PROMPTS[:4], SAMPLING)
    again = engine.generate(PROMPTS[4:8], SAMPLING)
    assert engine.stats.steps_ahead > 0
    assert check_tokens(engine.finished)[1] == 0
    assert [answer_of(each) for each in again] == [each.answer for each in WORKLOAD.tasks[4:8]]
    assert unused(engine) == before


def test_no_step_runs_ahead_of_drawn_tokens(model):
    engine = engine_of(model, run_ahead=True)
    engine.generate([SHORT], Sampling(max_new_tokens=4, temperature=1.0))
    assert engine.stats.steps_ahead == 0


def test_answers_end_at_an_end_token_or_at_their_length(model):
    engine = engine_of(model)
    whole, cut = engine.generate([PROMPTS[0]] * 2, [SAMPLING, Sampling(max_new_tokens=1)])
    assert whole.finish_reason is FinishReason.STOP
    assert whole.answer_ids[-1] == tokenizer.END_ID
    assert (cut.finish_reason, cut.num_new_tokens) == (FinishReason.LENGTH, 1)
    (more,) = engine.generate(PROMPTS[:1], replace(SAMPLING, ignore_eos=True))
    assert more.num_new_tokens == MAX_NEW_TOKENS


@pytest.mark.parametrize("backend", ["REFERENCE", "full.decode=REFERENCE", "-TORCH_SDPA"])
def test_overrides_change_the_picks_but_not_the_answers(model, backend):
    usual, other = engine_of(model), engine_of(AdditionModel(backend=backend))
    picked = lambda engine: [[x.name for x in each.selections.values()] for each in engine.layers]
    assert picked(other) != picked(usual)
    expected = [each.answer_ids for each in usual.generate(PROMPTS[:6], SAMPLING)]
    assert [each.answer_ids for each in other.generate(PROMPTS[:6], SAMPLING)] == expected


def test_a_required_backend_that_cannot_serve_a_layer_is_an_error():
    with pytest.raises(UnsupportedError, match="logits_soft_cap"):
        AdditionModel(backend="TORCH_SDPA")


def test_captured_steps_predict_the_same_tokens():
    """On a GPU graphs are replayed; in Triton's interpreter the same steps are called.

    The prompt repeats itself, so that there are drafts, whose verification is captured.
    """
    from support.graph_cases import BACKEND, DEVICE, interpreted_backend

    limits = replace(SMALL, max_requests=2, max_tokens=8)
    with interpreted_backend():
        captured = AdditionModel(DEVICE, BACKEND, cuda_graph=True)
        engine = engine_of(captured, limits, use_graphs=True, draft_tokens=2)
        requests = engine.generate([tokenizer.encode("5+6=11;5+6=")], SAMPLING)
    assert engine.stats.replayed_steps == engine.stats.steps
    assert engine.stats.accepted_tokens > 0
    assert check_tokens(requests)[1] == 0


@pytest.mark.parametrize(("draft_tokens", "num_blocks"), [(5, 28), (1, 400)])
def test_drafts_change_the_number_of_steps_and_no_token(model, draft_tokens, num_blocks):
    limits = replace(SMALL, num_blocks=num_blocks, max_requests=6)
    sampling = Sampling(max_new_tokens=24, ignore_eos=True)
    steps = []
    for count in (0, draft_tokens):
        engine = engine_of(model, limits, draft_tokens=count, run_ahead=True)
        before = unused(engine)
        requests = engine.generate(PROMPTS[:5], sampling)
        assert check_tokens(requests) == (5 * 24, 0)
        assert unused(engine) == before
        steps.append(engine.stats.steps)
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens > 0
    assert (engine.stats.preemptions > 0) == (num_blocks == 28)
    assert steps[1] < steps[0]


def test_drawn_tokens_have_no_drafts(model):
    drawn = Sampling(max_new_tokens=20, temperature=3.0, seed=7, ignore_eos=True)
    with_drafts = engine_of(model, draft_tokens=4)
    found = with_drafts.generate(PROMPTS[:2], drawn)
    assert with_drafts.stats.drafted_tokens == 0
    expected = engine_of(model).generate(PROMPTS[:2], drawn)
    assert [each.answer_ids for each in found] == [each.answer_ids for each in expected]


def test_layers_that_cannot_be_captured_run_eagerly(model):
    engine = engine_of(model, use_graphs=True)
    engine.generate(PROMPTS[:1], SAMPLING)
    assert engine.stats.replayed_steps == 0


def test_the_check_detects_a_wrong_token(model):
    requests = engine_of(model).generate(PROMPTS[:1], SAMPLING)
    assert check_tokens(requests)[1] == 0
    requests[0].token_ids[-2] = tokenizer.PLUS_ID
    assert check_tokens(requests)[1] > 0


def test_a_failed_step_ends_the_engine(model, monkeypatch):
    engine = engine_of(model)
    engine.add(PROMPTS[0], SAMPLING)
    monkeypatch.setattr(model, "logits", lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    with pytest.raises(InvalidInputError, match="Make a new one"):
        engine.step()


INVALID = {
    "too long": (lambda engine: engine.add([5] * 380), "room for requests of 288"),
    "empty": (lambda engine: engine.add([]), "no tokens"),
    "no tokenizer": (lambda engine: engine.add("1+1="), "no tokenizer"),
    "no ids": (lambda engine: engine.add([-1]), "Give text, ids or messages"),
    "one text": (lambda engine: engine.generate("1+1="), "list of prompts"),
    "second": (lambda engine: engine.generate([[5], []]), "Prompt 2 of 2"),
    "samplings": (lambda engine: engine.generate([[5]], [SAMPLING] * 2), "sampling for 2"),
    "temperature": (lambda engine: Sampling(temperature=-1), "temperature=-1"),
    "max_tokens": (lambda engine: Limits(max_requests=8, max_tokens=4), "max_tokens=4"),
    "max_seq_len": (lambda engine: engine_of(AdditionModel(), Limits(max_seq_len=999)), "288"),
    "memory": (lambda engine: engine_of(AdditionModel(), Limits(cache_bytes=9)), "cache_bytes"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_rejected(model, case):
    call, message = INVALID[case]
    engine = engine_of(model, Limits())
    with pytest.raises(InvalidInputError, match=message):
        call(engine)
    assert not engine.has_work


def test_a_stream_that_is_left_early_cancels_the_rest(model):
    engine = engine_of(model)
    engine.text.tokenizer = _Digits()
    stream = engine.stream(PROMPTS, SAMPLING)
    next(stream)
    stream.close()
    assert not engine.has_work
    assert any(each.finish_reason is FinishReason.CANCELLED for each in engine.finished)


def test_streamed_text_adds_up_to_the_answers(model):
    engine = engine_of(model)
    engine.text.tokenizer = _Digits()
    texts = dict.fromkeys(range(20), "")
    for piece in engine.stream(PROMPTS, SAMPLING):
        texts[piece.request.index] += piece.text
    assert texts == {each.index: engine.text_of(each) for each in engine.finished}


class _Digits:
    """A tokenizer that writes one character for a token."""

    def decode(self, ids, skip_special_tokens):
        return "".join("??0123456789+=;"[each] for each in ids)


def test_default_limits_fit_the_model(model):
    limits = engine_of(model, Limits(max_requests=2, max_tokens=8)).limits
    assert limits.max_seq_len == model.max_seq_len
    assert limits.num_blocks == 2 * model.max_seq_len // 8


@pytest.mark.parametrize(("device", "requests", "tokens"), [("cpu", 64, 2048), ("cuda", 64, 8192)])
def test_the_default_size_of_a_step_suits_the_device(device, requests, tokens):
    asked = Limits(max_requests=requests, num_blocks=8)
    assert sized(asked, 288, None, 16, 1024, torch.device(device))[0].max_tokens == tokens
    many = replace(asked, max_requests=2 * tokens)
    assert sized(many, 288, None, 16, 1024, torch.device(device))[0].max_tokens == 2 * tokens
