"""Loading a config.json, and messages about files that are none."""

from __future__ import annotations

import json

import pytest
import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.models.config_file import load_config, model_type_of, own_code, require_dtype
from support.model_cases import load

FILES = {
    "empty": (b"", "not valid JSON"),
    "cut off": (b'{"model_type": "llama"', "not valid JSON"),
    "a list": (b"[1, 2]", "contains a JSON list"),
    "binary": (b"\x80\x02\xff\x00", "is not text"),
    "deep": (b"[" * 200_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_without_a_config_are_rejected(case, tmp_path):
    content, message = FILES[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=rf"{message}.*Give the model's config.json"):
        load_config(path)


def test_paths_without_a_config_are_rejected(tmp_path):
    with pytest.raises(InvalidInputError, match=r"folder .* contains no config.json"):
        load_config(tmp_path)
    with pytest.raises(InvalidInputError, match="There is no file"):
        load_config(tmp_path / "config.json")
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidInputError, match="too large"):
        load_config(weights)


@pytest.mark.parametrize("hub_id", ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B"])
def test_a_hub_id_gets_the_command_that_downloads_the_file(hub_id):
    command = f"hf download {hub_id} config.json --local-dir {hub_id.split('/')[1]}"
    with pytest.raises(InvalidInputError, match=command):
        load_config(hub_id)


@pytest.mark.parametrize("path", ["configs/llama.json", "/models/llama", "a/b/c"])
def test_other_missing_paths_do_not(path):
    with pytest.raises(InvalidInputError) as error:
        load_config(path)
    assert "hf download" not in str(error.value)


def test_config_in_a_folder_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(load("llama")).encode())
    assert load_config(tmp_path) == load("llama")


#: A JSON file that is no model's config -> a part of the message.
NO_MODEL = {
    "adapter": (
        {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-8B"},
        r"adapter \(PEFT\).*That is Qwen/Qwen3-8B.*config.json of the language model",
    ),
    "adapter without a base": ({"peft_type": "LORA"}, r"adapter \(PEFT\).*base model\. Give"),
    "diffusers": ({"_class_name": "UNet2D", "_diffusers_version": "0.30"}, "belongs to diffusers"),
    "tokenizer": ({"tokenizer_class": "LlamaTokenizer"}, "belongs to a tokenizer"),
    "nothing": ({}, "model_type=None.*--num-heads"),
    "list": ({"model_type": ["llama"]}, r"model_type=\['llama'\]"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_a_file_that_is_no_config_is_named(case):
    content, message = NO_MODEL[case]
    with pytest.raises(InvalidInputError, match=message):
        model_type_of(content)


def test_the_dtype_is_the_stated_one():
    assert require_dtype({"torch_dtype": "bfloat16"}) is torch.bfloat16
    assert require_dtype({"dtype": "torch.float16"}) is torch.float16


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_no_dtype_is_assumed(dtype):
    with pytest.raises(InvalidInputError, match=r"states no dtype.*--dtype"):
        require_dtype({"dtype": dtype})


@pytest.mark.parametrize("dtype", ["int8", "nn", 16, ["float16"], "x" * 10_000])
def test_what_is_no_floating_point_dtype_is_rejected(dtype):
    with pytest.raises(InvalidInputError, match="not the name of a floating-point dtype") as error:
        require_dtype({"dtype": dtype})
    assert len(str(error.value)) < 300


def test_code_of_its_own_is_found_and_rejected_if_it_is_bidirectional():
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM", 5],
        "auto_map": {"AutoModel": "modeling.QwenOwn", "AutoConfig": "own.OwnConfig", "x": None},
    }
    known = {"Qwen3ForCausalLM"}.__contains__
    assert own_code(config, known) == ["QwenOwn"]
    assert own_code({**config, "architectures": "x", "auto_map": 7}, known) == []
    config["architectures"] = ["Qwen3BiModel"]
    with pytest.raises(UnsupportedError, match=r"Qwen3BiModel.*both directions"):
        own_code(config, known)
