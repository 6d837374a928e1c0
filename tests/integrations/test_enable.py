"""enable(): what is rejected and why, what the masks keep, and how backends are selected."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

import transformers
from transformers import masking_utils

from attn_dispatch import attention_backend
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.integrations.transformers import (
    OwnAttentionWarning,
    attention,
    attention_layers,
    check_model,
    enable,
)
from attn_dispatch.integrations.transformers.masks import make_mask, meaning_of
from attn_dispatch.integrations.transformers.ragged import ragged_form
from support.parity_models import WINDOW, build, left_padded_prompts

enable()

CAUSAL = masking_utils.causal_mask_function
BOTH_WAYS = masking_utils.bidirectional_mask_function


@pytest.fixture
def llama():
    model = enable(build("llama"))
    with torch.no_grad():
        yield model


def on_meta(name: str, model_type: str) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = getattr(transformers, name)(
            transformers.CONFIG_MAPPING[model_type]()
        )
    return model


# --- check_model


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("BloomModel", "bloom"), ("MptModel", "mpt"), ("FalconModel", "falcon")],
)
def test_models_that_ignore_the_implementation_are_rejected(name, model_type):
    model = on_meta(name, model_type)
    with pytest.raises(UnsupportedError, match=f"{name} computes its attention itself"):
        check_model(model)
    with pytest.raises(UnsupportedError, match=f"{name} computes its attention itself"):
        enable(model)
    assert model.config._attn_implementation != "attn_dispatch"


def test_a_model_without_attention_is_rejected():
    with pytest.raises(UnsupportedError, match="nothing to replace"):
        check_model(on_meta("MambaModel", "mamba"))


def test_modules_with_attention_of_their_own_are_named_in_a_warning():
    with pytest.warns(OwnAttentionWarning, match=r"MultiheadAttention.* themselves"):
        check_model(on_meta("SiglipVisionModel", "siglip_vision_model"))


def test_what_is_no_model_is_rejected():
    with pytest.raises(InvalidInputError, match="give a PreTrainedModel"):
        check_model(torch.nn.Linear(2, 2))


# --- calls that cannot be computed exactly


def call(module=None, query_len=4, key_len=4, mask=None, **keywords):
    query, key = torch.randn(1, 4, query_len, 16), torch.randn(1, 2, key_len, 16)
    if module is None:
        module = torch.nn.Module()
        module.layer_idx = 7
    return attention.attend(module, query, key, key, mask, **keywords)[0]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"position_bias": torch.zeros(1, 4, 4, 4)}, "bias learned for relative positions"),
        ({"indices": torch.zeros(1)}, "indexer picks the keys"),
        ({"temperature_of_next_year": 2.0}, "passes temperature_of_next_year"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "passes cu_seq_lens_q"),
        ({"dropout": 0.1}, "dropout"),
        ({"output_attentions": True}, "attention weights"),
        ({"scaling": torch.ones(4)}, "its scale is a Tensor"),
        ({"sliding_window": 3}, "sliding window and no mask"),
        ({"key_len": 6}, "which of the 6 keys its 4 queries see"),
        ({"mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "made or changed the attention mask"),
        ({"mask": make_mask(1, 4, 6)}, r"mask is for .*\(1, 4, 6\), and the call has \(1, 4, 4\)"),
        ({"mask": make_mask(2, 4, 4)}, r"mask is for .*\(2, 4, 4\)"),
    ],
)
def test_a_call_that_would_lose_something_is_rejected_and_names_the_layer(keywords, message):
    with pytest.raises(UnsupportedError, match=rf"^Module of layer 7: .*{message}"):
        call(**keywords)


def test_t5_is_rejected_for_its_position_bias():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 1}
    config = transformers.T5Config(vocab_size=97, **sizes)
    model = transformers.T5EncoderModel._from_config(config, attn_implementation="attn_dispatch")
    tokens = torch.ones(1, 5, dtype=torch.long)
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=r"T5Attention.* relative positions"),
    ):
        model.eval()(tokens)


def test_autograd_is_rejected():
    model = enable(build("llama"))
    with pytest.raises(InvalidInputError, match=r"LlamaAttention of layer 0: .*no_grad"):
        model(left_padded_prompts()[0])


def test_a_mask_of_the_caller_is_rejected(llama):
    tokens = left_padded_prompts()[0]
    mask = torch.ones(3, 1, 13, 13, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match=r"LlamaAttention of layer 0: .*attention mask"):
        llama(tokens, attention_mask=mask)


def test_holes_between_the_tokens_of_a_window_are_rejected():
    model = enable(build("mistral"))
    tokens, mask = left_padded_prompts()
    mask[0, 5] = 0
    with torch.no_grad(), pytest.raises(UnsupportedError, match="padding between the tokens"):
        model(tokens, attention_mask=mask)


def test_holes_between_tokens_of_full_attention(llama):
    tokens, mask = left_padded_prompts()
    mask[0, 5] = 0
    inputs = {"attention_mask": mask, "position_ids": torch.arange(13)[None].expand(3, -1)}
    actual = llama(tokens, **inputs).logits[mask.bool()]
    llama.set_attn_implementation("eager")
    expected = llama(tokens, **inputs).logits[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- masks


def prefix_of_four(batch, head, query, key):
    return (key <= query) | (key < 4)


def near_or_first(batch, head, query, key):
    return (key <= query) & ((key > query - 3) | (key == 0))


def every_third(batch, head, query, key):
    return (query - key) % 3 == 0


def groups(ids):
    return masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(ids))


@pytest.mark.parametrize(
    ("mask_function", "problem"),
    [
        (prefix_of_four, "depends on the position of the query"),
        (near_or_first, "not consecutive"),
        (every_third, "not consecutive"),
        (groups(torch.tensor([[0, 0, 1, 1, -1, -1]])), "see each other"),
        (
            masking_utils.and_masks(CAUSAL, masking_utils.padding_mask_function(torch.ones(1, 6))),
            "values of the batch",
        ),
    ],
)
def test_masks_that_cannot_be_described_are_rejected_by_the_layer(mask_function, problem):
    mask = make_mask(1, 6, 6, mask_function=mask_function)
    with pytest.raises(UnsupportedError, match=problem):
        call(query_len=6, key_len=6, mask=mask)


def local(sides):
    return masking_utils.sliding_window_bidirectional_mask_function(sides)


def chunked(size, batch_size=1):
    return masking_utils.chunked_causal_mask_function(size, torch.zeros(batch_size, dtype=int))


@pytest.mark.parametrize(
    ("mask_function", "expected"),
    [
        (CAUSAL, (True, None, 0, None)),
        (BOTH_WAYS, (False, None, None, None)),
        (masking_utils.sliding_window_causal_mask_function(5), (True, 4, 0, None)),
        (local(5), (False, 5, 5, None)),
        (chunked(5), (True, None, 0, 5)),
    ],
)
def test_what_a_mask_means(mask_function, expected):
    seen = meaning_of(make_mask(1, 8, 8, mask_function=mask_function)).visibility
    assert (seen.causal, seen.left, seen.right, seen.chunk) == expected
    assert seen.problem is None


def test_a_custom_mask_function_that_shows_a_window_is_understood():
    def three(batch, head, query, key):
        return (key <= query) & (key > query - 3)

    assert meaning_of(make_mask(1, 8, 8, mask_function=three)).visibility.left == 2


def test_a_mask_takes_no_memory_and_its_values_cannot_be_read():
    mask = make_mask(4, 1 << 20, 1 << 20)
    assert mask.shape == (4, 1, 1 << 20, 1 << 20)
    assert mask.dtype is torch.bool
    with pytest.raises(RuntimeError, match="meta"):
        bool(mask[0, 0, 0, 0])


@pytest.mark.parametrize("inference", [False, True])
def test_a_view_of_a_whole_mask_keeps_the_meaning_and_other_tensors_do_not(inference):
    def changed_in_place(mask):
        mask[:, :, :, 0] = False
        return mask

    with torch.inference_mode(inference):
        whole = [lambda m: m, lambda m: m[:, :, :, :6], lambda m: m[:], lambda m: m.bool()]
        others = [
            lambda m: m[:, :, :, :5],
            lambda m: m.transpose(2, 3),
            lambda m: m.flip(3),
            lambda m: ~m,
            lambda m: m.float(),
            lambda m: m & m,
            changed_in_place,
        ]
        assert all(meaning_of(view(make_mask(2, 6, 6))) is not None for view in whole)
        assert [meaning_of(other(make_mask(2, 6, 6))) for other in others] == [None] * len(others)


def shown(mask_function, query_offset, query_len, key_offset, key_len, valid):
    """(batch, query, key): what the definition of a mask shows, on tokens that are no padding."""
    rows, head = torch.arange(len(valid))[:, None, None], torch.tensor(0)
    queries = torch.arange(query_offset, query_offset + query_len)[:, None]
    keys = torch.arange(key_offset, key_offset + key_len)[None]
    seen = mask_function(rows, head, queries, keys).expand(len(valid), query_len, key_len)
    seen = seen & valid[:, None, key_offset : key_offset + key_len]
    return seen & valid[:, query_offset : query_offset + query_len, None]


#: Left padding, length, query offset, key offset: prefills, decoding, and caches of a window.
STEPS = [
    ((0, 0), 11, 0, 0),
    ((3, 0), 11, 0, 0),
    ((3, 8), 11, 6, 0),
    ((0, 9), 11, 10, 0),
    ((2, 0), 13, 12, 7),
    ((0, 0), 13, 10, 5),
]


@pytest.mark.parametrize("make", [None, 4, "chunks"])
@pytest.mark.parametrize(("padding", "length", "query_offset", "key_offset"), STEPS)
def test_the_ragged_form_is_the_mask(make, padding, length, query_offset, key_offset):
    """The requests, expanded again by the layers' rule, show what the mask function shows."""
    valid = torch.ones(2, length, dtype=torch.bool)
    for row, count in enumerate(padding):
        valid[row, :count] = False
    if make is None:
        mask_function = CAUSAL
    elif make == "chunks":
        mask_function = masking_utils.chunked_causal_mask_function(6, torch.tensor(padding))
    else:
        mask_function = masking_utils.sliding_window_causal_mask_function(make)
    query_len, key_len = length - query_offset, length - key_offset
    for attention_mask in [valid, *([None] if valid.all() else [])]:
        mask = make_mask(
            2,
            query_len,
            key_len,
            query_offset,
            key_offset,
            mask_function,
            attention_mask,
        )
        meaning = meaning_of(mask)
        form = ragged_form(meaning, torch.device("cpu"))
        assert ragged_form(meaning, torch.device("cpu")) is form
        expected = shown(mask_function, query_offset, query_len, key_offset, key_len, valid)
        assert torch.equal(expanded(form, meaning), expected)


def expanded(form, meaning):
    """(batch, query, key) of a ragged form: request by request, queries are the last keys."""
    seen = meaning.visibility
    result = torch.zeros(meaning.batch_size * meaning.query_len, meaning.key_len, dtype=torch.bool)
    rows = torch.arange(len(result)) if form.queries is None else form.queries
    keys = form.keys
    if isinstance(keys, slice):
        columns = torch.arange(meaning.key_len)[keys]
        starts = torch.arange(meaning.batch_size)[:, None] * meaning.key_len
        keys = (starts + columns).flatten()
    batch = form.context.batch_for("")
    key_starts = batch.key_starts
    for request, (query_len, seq_len) in enumerate(
        zip(batch.query_lens, batch.seq_lens_list, strict=True)
    ):
        own = keys[key_starts[request] : key_starts[request + 1]]
        for index in range(query_len):
            position = seq_len - query_len + index
            first = 0 if seen.left is None else max(0, position - seen.left)
            if seen.chunk is not None:
                first = position // seen.chunk * seen.chunk
            row = rows[batch.query_start_list[request] + index]
            result[row, own[first : position + 1] % meaning.key_len] = True
    return result.view(meaning.batch_size, meaning.query_len, meaning.key_len)


def test_a_row_of_padding_gives_zeros():
    valid = torch.tensor([[False] * 4])
    assert torch.equal(
        call(mask=make_mask(1, 4, 4, attention_mask=valid)), torch.zeros(1, 4, 4, 16)
    )


def test_the_ragged_form_and_the_metadata_are_made_once_for_all_layers(llama, monkeypatch):
    tokens, mask = left_padded_prompts()
    forms = []
    made = attention.ragged_form

    def recorded(*args):
        forms.append(made(*args))
        return forms[-1]

    monkeypatch.setattr(attention, "ragged_form", recorded)
    llama(tokens, attention_mask=mask, use_cache=False)
    assert len(forms) == 2  # one use in each layer
    assert forms[0] is forms[1]
    assert len(forms[0].context._metadata) == 1


# --- selection


def picks(model):
    return {
        selection.name
        for layers in attention_layers(model).values()
        for layer in layers
        for selection in layer.selections.values()
    }


def test_overrides_apply_and_are_explained(llama, monkeypatch):
    monkeypatch.setattr(attention, "_layers", type(attention._layers)())
    tokens, mask = left_padded_prompts()
    default = llama(tokens, attention_mask=mask).logits
    assert picks(llama) == {"TORCH_SDPA"}
    with attention_backend("REFERENCE"):
        llama(tokens, attention_mask=mask)
    assert picks(llama) == {"TORCH_SDPA", "REFERENCE"}
    monkeypatch.setattr(attention, "_layers", type(attention._layers)())
    monkeypatch.setenv("ATTN_DISPATCH_BACKEND", "REFERENCE")
    forced = llama(tokens, attention_mask=mask).logits
    assert picks(llama) == {"REFERENCE"}
    torch.testing.assert_close(forced, default, rtol=1e-4, atol=1e-4)
    layers = attention_layers(llama)
    assert list(layers) == [f"model.layers.{index}.self_attn" for index in range(2)]
    selection = next(iter(layers["model.layers.0.self_attn"][0].selections.values()))
    assert "ATTN_DISPATCH_BACKEND" in str(selection.report)


def test_a_backend_that_cannot_compute_the_layer_is_rejected_by_name():
    model = enable(build("gemma2"))
    tokens, mask = left_padded_prompts()
    with (
        torch.no_grad(),
        attention_backend("TORCH_SDPA"),
        pytest.raises(UnsupportedError, match="Gemma2Attention of layer 0: ") as caught,
    ):
        model(tokens, attention_mask=mask)
    assert "logits_soft_cap" in str(caught.value.report)


def test_layers_are_made_once(llama):
    tokens, mask = left_padded_prompts()
    llama(tokens, attention_mask=mask)
    before = attention_layers(llama)
    llama(tokens, attention_mask=mask)
    assert attention_layers(llama) == before


def test_loading_with_the_name(tmp_path):
    build("mistral").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="attn_dispatch"
    )
    with torch.no_grad():
        model(left_padded_prompts()[0])
    specs = [layer.spec for layers in attention_layers(model).values() for layer in layers]
    assert [spec.sliding_window for spec in specs] == [WINDOW] * 2


def test_torch_compile_leaves_the_functions_as_they_are():
    """The mask passes through a compiled graph with its meaning."""
    implementation = transformers.AttentionInterface()["attn_dispatch"]
    make = transformers.AttentionMaskInterface()["attn_dispatch"]
    query, key = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)

    def forward(module, scale):
        window = masking_utils.sliding_window_causal_mask_function(3)
        mask = make(1, 6, 6, mask_function=window)
        return implementation(module, query * scale, key, key, mask)[0] * 2

    module = torch.nn.Module()
    expected = forward(module, 3)
    actual = torch.compile(forward, backend="eager")(module, 3)
    torch.testing.assert_close(actual, expected)
    assert attention.layers_of(module)[0].spec.sliding_window == 3


def test_an_old_transformers_is_rejected(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.16.2")
    with pytest.raises(UnsupportedError, match=r"needs transformers 5\.17"):
        enable()


def test_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"attn-dispatch\[transformers\]"):
        importlib.reload(sys.modules["attn_dispatch.integrations.transformers"])
