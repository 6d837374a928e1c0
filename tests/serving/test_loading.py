"""load_engine, prompts and text, over a small model in a folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.serving import Limits, Sampling, load_engine
from attn_dispatch.serving.eager import check_answers
from attn_dispatch.serving.text import Text, TextStream
from support.tiny_model import make_tokenizer, save_tiny_model

LIMITS = Limits(max_requests=4, max_tokens=64, cache_bytes=1 << 20)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Häagen 日本?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder):
    return load_engine(folder, device="cpu", limits=LIMITS)


def test_answers_are_those_of_eager_attention(engine):
    requests = engine.generate(["Hello", CHAT, [5, 6, 7]], Sampling(max_new_tokens=12))
    result = check_answers(engine.model, requests)
    assert (result.answers, result.different) == (3, 0)
    assert result.tokens == sum(each.num_new_tokens for each in requests)


def test_the_check_detects_a_token_that_eager_attention_does_not_choose(engine):
    (request,) = engine.generate(["Hello"], Sampling(max_new_tokens=4, ignore_eos=True))
    request.token_ids[-1] = (request.token_ids[-1] + 1) % 257
    assert check_answers(engine.model, [request]).different == 1


def test_the_check_leaves_the_engine_as_it_was(engine):
    first = engine.generate(["Again"], Sampling(max_new_tokens=6))[0].answer_ids
    check_answers(engine.model, engine.finished)
    assert engine.generate(["Again"], Sampling(max_new_tokens=6))[0].answer_ids == first


def test_the_model_needs_its_engine(engine):
    with pytest.raises(InvalidInputError, match=r"set_attn_implementation\('sdpa'\)"):
        engine.model.model(input_ids=torch.tensor([[1, 2]]))


def test_chats_become_the_text_of_the_template():
    text = Text(make_tokenizer())
    assert text.decode(text.encode(CHAT)) == "<system>Be brief.\n<user>Häagen 日本?\n<assistant>"


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), ("{{ raise_exception('no system') }}", "rejects the messages")],
)
def test_chats_that_the_tokenizer_rejects(template, message):
    with pytest.raises(InvalidInputError, match=message):
        Text(make_tokenizer(template)).encode(CHAT)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stream_never_shows_part_of_a_character(step):
    text = Text(make_tokenizer())
    ids = text.encode("aé日🙂 b\n c")
    stream, pieces = TextStream(text), []
    for end in (*range(step, len(ids), step), len(ids)):
        pieces.append(stream.new_text(ids[:end], is_last=end == len(ids)))
    assert "".join(pieces) == "aé日🙂 b\n c"
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_is_incomplete_at_the_end_is_shown():
    text = Text(make_tokenizer())
    ids = text.encode("a🙂")[:-1]
    stream = TextStream(text)
    assert stream.new_text(ids, is_last=False) == ""
    assert stream.new_text(ids, is_last=True).startswith("a")


def test_random_weights_need_no_weights_and_no_tokenizer(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    engine = load_engine(tmp_path, device="cpu", limits=LIMITS, random_weights=True)
    assert engine.text.tokenizer is None
    (request,) = engine.generate([[1, 2, 3]], Sampling(max_new_tokens=2, ignore_eos=True))
    assert request.num_new_tokens == 2


def broken(folder, tmp_path, **config):
    """A copy of the model with other fields in its config."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


def damaged(folder, tmp_path):
    copy = broken(folder, tmp_path)
    (copy / "model.safetensors").write_bytes(b"no tensors")
    return copy


def without(folder, tmp_path, name):
    copy = broken(folder, tmp_path)
    (copy / name).unlink()
    return copy


INVALID = {
    "missing": (lambda folder, tmp: tmp / "none", "There is no folder"),
    "hub id": (lambda folder, tmp: "Qwen/Qwen3-8B", "hf download Qwen/Qwen3-8B"),
    "no model": (lambda folder, tmp: tmp, "no config.json"),
    "no gguf": (lambda folder, tmp: tmp / "a.gguf", "There is no file"),
    "no weights": (lambda f, tmp: without(f, tmp, "model.safetensors"), "no weights"),
    "no tokenizer": (lambda f, tmp: without(f, tmp, "tokenizer.json"), "cannot be loaded"),
    "damaged": (damaged, "cannot be loaded"),
    "unknown type": (lambda f, tmp: broken(f, tmp, model_type="none"), "cannot be loaded"),
}


@pytest.mark.parametrize("case", INVALID)
def test_what_is_no_model_is_rejected_in_one_sentence(case, folder, tmp_path):
    make, message = INVALID[case]
    with pytest.raises(InvalidInputError, match=message) as raised:
        load_engine(make(folder, tmp_path), device="cpu", limits=LIMITS)
    assert len(str(raised.value)) < 600


def test_models_that_keep_another_state_are_rejected(tmp_path):
    from transformers import MambaConfig

    MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="no softmax attention"):
        load_engine(tmp_path, device="cpu", random_weights=True)


def test_a_missing_extra_is_named(monkeypatch, folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'attn-dispatch\[transformers\]'"):
        load_engine(folder)
