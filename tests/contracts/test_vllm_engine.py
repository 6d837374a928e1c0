"""Whole engines of vLLM with the plug-in, on a CPU: `make contracts`.

Tiny models with random weights, in float32. vLLM's tokens are compared with the greedy ones of
transformers' eager attention, one by one after the tokens that vLLM chose before.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from support.vllm_files import VERSIONS
from support.vllm_process import INSTALLED, PYTHON, largest_gap, serve

pytestmark = [
    pytest.mark.contracts,
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM for CPUs: run `make contracts`"),
]

NEW_TOKENS = 24
VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = {
    **_COMMON,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
LLAMA = ("LlamaConfig", _GROUPED)

#: Steps of at most 64 tokens, so that longer prompts come in chunks; requests join and leave.
STEPS = {
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "block_size": 16,
    "enable_prefix_caching": True,
}

#: name -> (class of config, its arguments), arguments of vLLM.
CASES = {
    "llama": (LLAMA, {}),
    "qwen3": (("Qwen3Config", {**_GROUPED, "tie_word_embeddings": True}), {"block_size": 32}),
    "mistral": (("MistralConfig", {**_GROUPED, "sliding_window": 24}), {}),
    "gemma2": (
        (
            "Gemma2Config",
            {
                **_GROUPED,
                "sliding_window": 24,
                "attn_logit_softcapping": 2.0,
                "query_pre_attn_scalar": 20,
            },
        ),
        {},
    ),
    "bloom": (("BloomConfig", {**_COMMON, "n_head": 4, "n_layer": 2}), {}),
    # With vLLM's own operators for CPUs the tokens are others, with and without its MLA.
    "deepseek_v2": (
        (
            "DeepseekV2Config",
            {
                **_COMMON,
                "intermediate_size": 96,
                "max_position_embeddings": 512,
                "kv_lora_rank": 256,
                "q_lora_rank": None,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 64,
                "v_head_dim": 16,
                "head_dim": 64,
                "first_k_dense_replace": 2,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
            },
        ),
        {"compilation_config": {"custom_ops": ["none"]}},
    ),
    "preempted": (LLAMA, {"num_gpu_blocks_override": 20, "enable_prefix_caching": False}),
    "fp8_cache": (LLAMA, {"kv_cache_dtype": "fp8"}),
    "bert": (
        (
            "BertConfig",
            {**_COMMON, "intermediate_size": 96, "max_position_embeddings": 256, "pad_token_id": 0},
        ),
        {"runner": "pooling", "block_size": 16, "max_model_len": 256},
    ),
    "rejected": (LLAMA, {"kv_cache_dtype": "int8_per_token_head"}),
    "drafts": (
        LLAMA,
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
        },
    ),
}


def make_prompts() -> list[list[int]]:
    """Of different lengths; the last has the first blocks of the one before."""
    numbers = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, VOCABULARY, (size,), generator=numbers).tolist()
        for size in (5, 40, 77, 130)
    ]
    return [*prompts, prompts[-1][:96] + prompts[0]]


PROMPTS = make_prompts()

#: Cases that a release cannot serve on a CPU: its sampler for drafts there lacks an argument, and
#: for latent attention it makes a backend for prefills that needs FlashAttention.
UNSERVED = {"0.24.0": ["drafts", "deepseek_v2"]}

#: Cases with the tokens of a decoder.
DECODERS = [name for name in CASES if name not in ("bert", "rejected")]


def with_fp8_keys(module, query, key, value, *arguments, **more):
    """Eager attention on keys and values as a cache of fp8 with scale 1 gives them back."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    key, value = (each.to(torch.float8_e4m3fn).to(each.dtype) for each in (key, value))
    return eager_attention_forward(module, query, key, value, *arguments, **more)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (the model with eager attention, its folder)."""
    found = {}
    for name, ((config, arguments), _) in CASES.items():
        torch.manual_seed(0)
        made = getattr(transformers, config)(**arguments, attn_implementation="eager")
        is_encoder = CASES[name][1].get("runner") == "pooling"
        auto = transformers.AutoModel if is_encoder else transformers.AutoModelForCausalLM
        model = auto.from_config(made).eval()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = (model, folder)
    return found


@pytest.fixture(scope="module", params=sorted({*VERSIONS, INSTALLED}))
def served(request, models, tmp_path_factory):
    """The results of all cases by one release of vLLM."""
    version = request.param
    cases = {
        name: {
            "folder": str(models[name][1]),
            "backend": "CUSTOM" if version == "0.24.0" else "ATTN_DISPATCH",
            "arguments": arguments if "runner" in arguments else {**STEPS, **arguments},
            "prompts": PROMPTS,
            "new_tokens": NEW_TOKENS,
            "turns": 2 if name == "llama" else 1,
        }
        for name, (_, arguments) in CASES.items()
        if name not in UNSERVED.get(version, ())
    }
    return serve(version, cases, tmp_path_factory.mktemp("vllm"))


def result_of(served, name):
    """The result of a case, which is skipped where this release cannot serve it on a CPU."""
    if name in UNSERVED.get(served["version"].partition("+")[0], ()):
        pytest.skip(f"vLLM {served['version']} has no {name} on a CPU")
    return served[name]


@pytest.mark.parametrize("name", DECODERS)
def test_the_plug_in_ran_on_vllms_memory(served, name):
    found = result_of(served, name)
    assert "error" not in found, found["error"]
    module = "mla" if name == "deepseek_v2" else "backend"
    assert found["impls"] == [f"attn_dispatch.integrations.vllm.{module}"]
    assert found["num_layers"] == 2
    assert found["zero_copy"]


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "fp8_cache"])
def test_tokens_are_those_of_eager_attention(served, models, name):
    for tokens in result_of(served, name)["tokens"]:
        assert [len(each) for each in tokens] == [NEW_TOKENS] * len(PROMPTS)
        assert largest_gap(models[name][0], PROMPTS, tokens) < 1e-4


def test_tokens_of_an_fp8_cache(served, models):
    """Rounding can differ in a last bit, and then one element by a sixteenth.

    With the exact keys and values, other tokens are the greedy ones.
    """
    assert served["fp8_cache"]["caches"] == ["torch.uint8"]
    model, tokens = models["fp8_cache"][0], served["fp8_cache"]["tokens"][0]
    model.set_attn_implementation("eager")
    transformers.AttentionInterface.register("fp8_keys", with_fp8_keys)
    transformers.AttentionMaskInterface.register("fp8_keys", transformers.masking_utils.eager_mask)
    unquantized = largest_gap(model, PROMPTS, tokens)
    model.set_attn_implementation("fp8_keys")
    assert largest_gap(model, PROMPTS, tokens) < 0.02 < unquantized


def test_prefixes_were_cached(served):
    """The last prompt has 96 tokens of the one before; then all prompts come again."""
    assert served["llama"]["cached"] == [[0, 0, 0, 0, 96], [0, 32, 64, 128, 96]]


def test_a_request_was_preempted(served):
    assert served["preempted"]["num_preemptions"] > 0


def test_drafts_were_accepted(served):
    assert result_of(served, "drafts")["spec_decode_num_accepted_tokens"] > 0


def test_an_encoder(served, models):
    """The vector of a text is that of its first token, of length 1."""
    found = served["bert"]
    assert "error" not in found, found["error"]
    assert found["impls"] == ["attn_dispatch.integrations.vllm.backend"]
    for prompt, vector in zip(PROMPTS, found["vectors"], strict=True):
        with torch.no_grad():
            states = models["bert"][0](torch.tensor([prompt])).last_hidden_state[0, 0]
        wanted = torch.nn.functional.normalize(states, dim=0)
        torch.testing.assert_close(torch.tensor(vector), wanted, atol=1e-4, rtol=0)


def test_what_no_backend_has_is_an_error_at_start_up(served):
    assert "a cache of int8_per_token_head has another form" in served["rejected"]["error"]
