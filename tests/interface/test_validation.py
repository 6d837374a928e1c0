"""Bad input gets one clear error, and a call that fails leaves cache and output as they were."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import PlaceholderRange
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.selection.registry import registry
from support.cases import INT8, Case, Step, layer_spec
from support.selection import make_backend, registered

#: A decode, a prompt and a chunk of one, interleaved; then padding.
CASE = Case(spec=layer_spec(), query_lens=(1, 5, 1, 3), seq_lens=(9, 5, 4, 7), padding=2)
RUNNERS = ("REFERENCE", "TORCH_SDPA", "prefill=REFERENCE,decode=TORCH_SDPA")
FP8 = torch.float8_e4m3fn


class Call:
    """The arguments of one forward, to be spoiled."""

    def __init__(self, runner, case=CASE):
        self.step = Step(case)
        self.runner, self.batch = runner, self.step.batch
        self.spec = case.spec
        shape = (len(self.step.query), case.spec.num_heads, case.spec.head_size_v)
        self.arguments = {
            "query": self.step.query,
            "key": self.step.key,
            "value": self.step.value,
            "kv_cache": self.step.kv_cache,
            "output": torch.full(shape, 7.0, dtype=case.spec.dtype),
        }

    def set(self, **arguments):
        self.arguments |= arguments

    def cut(self, name, *index):
        self.arguments[name] = self.arguments[name][index]

    def cast(self, name, dtype):
        self.arguments[name] = self.arguments[name].to(dtype)

    def on_meta(self, name):
        self.arguments[name] = self.arguments[name].to("meta")

    def change_batch(self, **changes):
        self.batch = dataclasses.replace(self.batch, **changes)

    def __call__(self):
        arguments = dict(self.arguments)
        if "=" in self.runner:
            layer = layer_of(self.step, self.runner)
            metadata = arguments.pop("attn_metadata", None) or layer.build_metadata(self.batch)
            return layer(**arguments, attn_metadata=metadata)
        cls = registry.candidates()[self.runner].backend_cls
        impl = cls.get_impl_cls()(**self.step.impl_arguments())
        if "attn_metadata" not in arguments:
            builder = cls.get_builder_cls()(self.spec, torch.device("cpu"))
            arguments["attn_metadata"] = builder.build(self.batch)
        return impl.forward(self.step.layer, **arguments)


def layer_of(step, backend):
    spec = step.spec
    return Attention(
        spec.num_heads,
        spec.head_size,
        step.scale,
        spec.num_kv_heads,
        sliding_window=spec.sliding_window,
        kv_cache_dtype=spec.kv_cache_dtype,
        dtype=spec.dtype,
        block_size=spec.block_size,
        backend=backend,
        device="cpu",
    )


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).clone()


def assert_rejected_untouched(call, message):
    cache, output = call.step.kv_cache, call.arguments.get("output")
    watched = [t for t in (cache, output) if t is not None and t.device.type != "meta"]
    before = [as_bytes(t) for t in watched]
    with pytest.raises(InvalidInputError, match=message) as caught:
        call()
    assert str(caught.value).endswith((".", ")."))
    for tensor, old in zip(watched, before, strict=True):
        assert torch.equal(as_bytes(tensor), old)


def batch_elsewhere(call):
    names = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
    call.change_batch(**{name: getattr(call.batch, name).to("meta") for name in names})


def metadata_for(**changes):
    """Metadata that the builder of another layer made."""

    def spoil(call):
        cls = registry.candidates()[call.runner.split("=")[-1]].backend_cls
        builder = cls.make_builder(call.spec, torch.device("cpu"))
        builder.spec = call.spec.replace(**changes)
        call.set(attn_metadata=builder.build(call.batch))

    return spoil


def metadata_of_mla(call):
    mla = MLADims(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    spec = AttentionSpec.for_mla(num_heads=4, dtype=torch.float32, mla=mla, block_size=4)
    builder = ReferenceMLABackend.make_builder(spec, torch.device("cpu"))
    call.set(attn_metadata=builder.build(call.batch))


#: What is wrong -> how it is made wrong, and what the error says.
BAD_CALLS = {
    "query with a batch dimension": (
        lambda c: c.cut("query", None),
        "query has shape .*num_tokens",
    ),
    "query with another head count": (
        lambda c: c.cut("query", ..., slice(2), slice(None)),
        "query",
    ),
    "query with another head size": (lambda c: c.cut("query", ..., slice(4)), "query has shape"),
    "query of fewer rows than tokens": (
        lambda c: c.cut("query", slice(4)),
        "4 rows, and the batch",
    ),
    "query of another dtype": (lambda c: c.cast("query", torch.float32), "query is"),
    "query of integers": (lambda c: c.cast("query", torch.int64), "query is torch.int64"),
    "query elsewhere": (lambda c: c.on_meta("query"), "meta"),
    "key without value": (lambda c: c.set(value=None), "key and value go together"),
    "value without key": (lambda c: c.set(key=None), "key and value go together"),
    "key with a batch dimension": (lambda c: c.cut("key", None), "key has shape"),
    "key with another head count": (lambda c: c.cut("key", ..., [0], slice(None)), "key has shape"),
    "key with another head size": (lambda c: c.cut("key", ..., slice(4)), "key has shape"),
    "key of fewer rows than tokens": (lambda c: c.cut("key", slice(9)), "key has 9 rows"),
    "key of another dtype": (lambda c: c.cast("key", torch.float32), "key has .* torch.float32"),
    "key elsewhere": (lambda c: c.on_meta("key"), "key has .* on meta"),
    "value with another head size": (lambda c: c.cut("value", ..., slice(4)), "value has shape"),
    "value of fewer rows": (lambda c: c.cut("value", slice(9)), "value 9, and the batch brings 10"),
    "value elsewhere": (lambda c: c.on_meta("value"), "value has .* on meta"),
    "cache of another rank": (lambda c: c.cut("kv_cache", 0), "kv_cache has shape"),
    "cache without values": (lambda c: c.cut("kv_cache", slice(None), [0]), "kv_cache has shape"),
    "cache of fewer heads": (lambda c: c.cut("kv_cache", ..., [0], slice(None)), "kv_cache has"),
    "cache of smaller heads": (lambda c: c.cut("kv_cache", ..., slice(4)), "kv_cache has shape"),
    "cache of another dtype": (lambda c: c.cast("kv_cache", torch.float32), "kv_cache has"),
    "cache elsewhere": (lambda c: c.on_meta("kv_cache"), "kv_cache has .* on meta"),
    "no cache, where there is a past": (lambda c: c.set(kv_cache=None), "Give the kv_cache"),
    "neither cache nor keys": (
        lambda c: c.set(kv_cache=None, key=None, value=None),
        "Without a kv_cache the keys must be given",
    ),
    "no block table": (lambda c: c.change_batch(block_table=None), "create the requests' block_t"),
    "block table too narrow": (
        lambda c: c.change_batch(block_table=c.batch.block_table[:, :2]),
        "block_table has 2 blocks of 4 tokens .* Give it 3 columns",
    ),
    "block table elsewhere": (
        lambda c: c.change_batch(block_table=c.batch.block_table.to("meta")),
        "block_table is on meta",
    ),
    "batch elsewhere": (batch_elsewhere, "block_table is on meta, and query on cpu"),
    "no slots": (lambda c: c.change_batch(slot_mapping=None), "no slot_mapping for 10 new keys"),
    "fewer slots than keys": (
        lambda c: c.change_batch(slot_mapping=c.batch.slot_mapping[:9]),
        r"slot_mapping has shape \(9,\) .* 10 new keys",
    ),
    "more slots than keys": (
        lambda c: c.change_batch(slot_mapping=torch.full((13,), -1)),
        r"slot_mapping has shape \(13,\) .*at most 12",
    ),
    "slots of another dtype": (
        lambda c: c.change_batch(slot_mapping=c.batch.slot_mapping.float()),
        "torch.float32 .*int64: block",
    ),
    "slots elsewhere": (
        lambda c: c.change_batch(slot_mapping=c.batch.slot_mapping.to("meta")),
        "slot_mapping is on meta",
    ),
    "output of fewer rows": (lambda c: c.cut("output", slice(10)), "output has shape"),
    "output of another head size": (lambda c: c.cut("output", ..., slice(4)), "output has shape"),
    "output of another dtype": (
        lambda c: c.cast("output", torch.float32),
        "output is torch.float3",
    ),
    "output elsewhere": (lambda c: c.on_meta("output"), "output has shape .* on meta"),
    "fp8 output without a scale": (
        lambda c: c.cast("output", FP8),
        "output is torch.float8_e4m3fn",
    ),
    "metadata of another backend": (metadata_of_mla, "layer.build_metadata"),
    "metadata for another window": (metadata_for(sliding_window=3), "attn_metadata"),
    "metadata for other heads": (metadata_for(num_heads=2), "attn_metadata"),
    "metadata for ALiBi": (metadata_for(alibi=True), "attn_metadata"),
    "metadata for sinks": (metadata_for(sinks=True), "attn_metadata"),
    "metadata for a sharing layer": (metadata_for(kv_sharing=True), "attn_metadata"),
    "metadata for another cache": (metadata_for(kv_cache_dtype="fp8"), "attn_metadata"),
}

#: The same for what a batch's tensors hold, which ATTN_DISPATCH_CHECK=1 looks at.
BAD_CONTENTS = {
    "a block beyond the cache": (
        lambda c: c.change_batch(block_table=c.batch.block_table.fill_(99)),
        "names block 99; the cache has blocks 0 to",
    ),
    "a negative block": (
        lambda c: c.change_batch(block_table=c.batch.block_table.fill_(-1)),
        "names block -1;",
    ),
    "a slot beyond the cache": (
        lambda c: c.change_batch(slot_mapping=c.batch.slot_mapping + 10_000),
        "slot_mapping names slots .* the cache has slots 0 to",
    ),
    "a slot below -1": (
        lambda c: c.change_batch(slot_mapping=c.batch.slot_mapping - 10_000),
        "slot_mapping names slots -",
    ),
    "two tokens in a slot": (
        lambda c: c.change_batch(slot_mapping=torch.arange(12) % 9),
        "two tokens to the same slot",
    ),
    "two tokens of different phases in a slot": (
        lambda c: c.change_batch(slot_mapping=torch.tensor([0, *range(1, 6), 1, *range(7, 10)])),
        "two tokens to the same slot",
    ),
    "starts that fall": (
        lambda c: c.change_batch(query_start_loc=torch.tensor([0, 6, 1, 7, 10])),
        "must ascend from 0",
    ),
    "starts that differ from their host copy": (
        lambda c: c.change_batch(query_start_loc=torch.tensor([0, 2, 6, 7, 10])),
        "differs from its host copy",
    ),
    "lengths that differ from their host copy": (
        lambda c: c.change_batch(seq_lens=c.batch.seq_lens + 1),
        "differs from its host copy",
    ),
}


#: The same for an int8 cache, whose rows have a float32 in them.
BAD_INT8_CACHES = {
    "heads without a scale": (lambda cache: cache[..., :8], r"2, 32\): 8 elements, filled up"),
    "larger heads": (lambda cache: cache.repeat(1, 1, 1, 1, 2), "kv_cache has shape"),
    "another dtype": (lambda cache: cache.view(torch.uint8), "must be torch.int8 .*int8_per_token"),
    "elements apart": (
        lambda cache: cache.repeat_interleave(2, -1)[..., ::2],
        "dense rows .* Make the cache by allocate_kv_cache",
    ),
    "rows at odd bytes": (
        lambda cache: torch.nn.functional.pad(cache, (1, 0))[..., 1:],
        "start at multiples of 4 bytes",
    ),
    "a first row at an odd byte": (
        lambda cache: torch.nn.functional.pad(cache.flatten(), (1, 0))[1:].view(cache.shape),
        "from byte 1 on. .* start at multiples of 4 bytes",
    ),
}

#: A batch remembers what passed for one layer: that must let nothing else through.
after_a_good_call = pytest.mark.parametrize(
    "is_second", [False, True], ids=["at once", "after a good call"]
)


@pytest.mark.parametrize("what", BAD_INT8_CACHES)
@pytest.mark.parametrize("runner", RUNNERS)
@after_a_good_call
def test_a_bad_int8_cache_is_rejected(runner, what, is_second):
    make, message = BAD_INT8_CACHES[what]
    call = Call(runner, CASE.replace(spec=layer_spec(kv_cache_dtype=INT8)))
    if is_second:
        call()
    call.set(kv_cache=make(call.step.kv_cache))
    assert_rejected_untouched(call, message)


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_unchanged_call_works(runner, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "1")
    call = Call(runner)
    call.step.check(call(), call.step.expected()[0])


@pytest.mark.parametrize("what", BAD_CALLS)
@pytest.mark.parametrize("runner", RUNNERS)
@after_a_good_call
def test_a_bad_argument_is_rejected(runner, what, is_second):
    spoil, message = BAD_CALLS[what]
    call = Call(runner)
    if is_second:
        call()
    spoil(call)
    assert_rejected_untouched(call, message)


@pytest.mark.parametrize("what", BAD_CONTENTS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_bad_contents_are_rejected(runner, what, monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "1")
    spoil, message = BAD_CONTENTS[what]
    call = Call(runner)
    spoil(call)
    assert_rejected_untouched(call, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_scale": torch.ones(())}, "output"),
        (
            {"output_scale": torch.ones(()), "output_block_scale": torch.ones(12, 1)},
            "not both|output",
        ),
    ],
    ids=["scale without fp8 output", "both scales"],
)
@pytest.mark.parametrize("runner", ["REFERENCE", RUNNERS[2]])
def test_scales_that_do_not_fit_the_output_are_rejected(runner, changes, message):
    call = Call(runner)
    call.set(**changes)
    assert_rejected_untouched(call, message)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"output_scale": torch.ones(4)}, r"output_scale has shape \(4,\)"),
        ({"output_scale": torch.ones(()).double()}, "torch.float64"),
        ({"output_scale": torch.ones((), device="meta")}, "on meta"),
        ({"output_block_scale": torch.ones(12, 2)}, r"must be \(12, 1\)"),
        ({"output_block_scale": torch.ones(12, 1).half()}, "torch.float16"),
    ],
    ids=["vector", "float64", "elsewhere", "block scales of another shape", "of another dtype"],
)
@after_a_good_call
def test_scales_of_a_quantized_output_are_checked(scales, message, is_second):
    call = Call("REFERENCE", CASE.replace(spec=layer_spec(head_size_v=32)))
    call.set(output=torch.zeros(12, 4, 32).to(FP8))
    if is_second:
        good = {"output_scale": torch.ones(()), "output_block_scale": torch.ones(12, 1)}
        call.set(**{name: good[name] for name in scales})
        call()
    call.set(**scales)
    assert_rejected_untouched(call, message)


def test_the_output_must_have_whole_groups():
    call = Call("REFERENCE")
    call.set(output=torch.zeros(12, 4, 8).to(FP8), output_block_scale=torch.ones(12, 0))
    assert_rejected_untouched(call, "not a multiple of 128; use output_scale")


def test_an_encoder_has_no_cache():
    spec = layer_spec(attn_type="encoder_only", block_size=None)
    call = Call("REFERENCE", Case(spec=spec, query_lens=(3,), seq_lens=(3,)))
    call.set(kv_cache=torch.zeros(2, 2, 4, 2, 8).double())
    assert_rejected_untouched(call, "encoder_only attention has no kv_cache; give None")


def test_a_sharing_layer_needs_the_cache_of_its_target():
    spec = layer_spec(kv_sharing=True)
    call = Call("REFERENCE", Case(spec=spec, query_lens=(3,), seq_lens=(3,)))
    call.set(kv_cache=None)
    assert_rejected_untouched(call, "reads the cache of 'target', and kv_cache is None")


def test_gradients_are_rejected():
    call = Call("REFERENCE")
    call.set(query=call.step.query.requires_grad_())
    assert_rejected_untouched(call, "inference_mode")


def test_metadata_of_another_route_is_rejected():
    call = Call(RUNNERS[2])
    with registered(make_backend("ELSEWHERE")):
        other = layer_of(call.step, "prefill=ELSEWHERE,decode=TORCH_SDPA")
        call.set(attn_metadata=other.build_metadata(call.batch))
        assert_rejected_untouched(call, "attn_metadata has a ReferenceMetadata for ELSEWHERE")


def test_metadata_of_the_opposite_route_uses_its_backends():
    call, opposite = Call(RUNNERS[2]), "prefill=TORCH_SDPA,decode=REFERENCE"
    call.set(attn_metadata=layer_of(call.step, opposite).build_metadata(call.batch))
    assert torch.equal(call(), Call(opposite)())


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
@pytest.mark.parametrize(
    "values", [torch.ones(()), torch.ones(3), torch.ones(4, 1)], ids=["0-d", "3", "4x1"]
)
def test_slopes_and_sinks_are_one_for_each_query_head(name, values):
    with pytest.raises(InvalidInputError, match=f"{name} has shape .* 4 query heads"):
        Attention(4, 8, device="cpu", **{name: values})


BAD_BATCHES = {
    "lengths of different requests": (
        {"seq_lens": [3]},
        "query_lens has 2 requests and seq_lens 1",
    ),
    "a negative length": ({"seq_lens": [4, -1]}, "seq_lens holds -1; lengths are 0 or more"),
    "lengths that are no integers": ({"query_lens": [1.5, 2]}, "not a list of integers"),
    "lengths in a table": ({"query_lens": torch.ones(2, 1).int()}, "must be a list of integers"),
    "another request's block table": (
        {"block_table": torch.zeros(3, 1).int()},
        r"\(num_reqs, max_blocks\) with num_reqs=2",
    ),
    "a block table of floats": ({"block_table": torch.zeros(2, 1)}, "torch.float32"),
    "a block table too narrow for the slots": (
        {"block_table": torch.zeros(2, 1).int(), "block_size": 2},
        "Give it 3 columns",
    ),
    "more new tokens than keys": (
        {"query_lens": [1, 5], "block_table": torch.zeros(2, 2).int(), "block_size": 4},
        "Request 1 has 5 new tokens and 4 keys",
    ),
    "keys of different requests": ({"key_lens": [3]}, "key_lens has 1 requests and seq_lens 2"),
}


@pytest.mark.parametrize("what", BAD_BATCHES)
def test_inconsistent_lengths_are_rejected(what):
    changes, message = BAD_BATCHES[what]
    arguments = {"query_lens": [1, 2], "seq_lens": [5, 4]} | changes
    with pytest.raises(InvalidInputError, match=message):
        AttentionBatch.create(**arguments)


BAD_BUILDS = {
    "a mask that the layer was not described with": (
        {},
        {"custom_mask": torch.ones(5 * 5).bool()},
        "Make the layer with custom_mask=True",
    ),
    "a mask of the wrong size": (
        {"custom_mask": True},
        {"custom_mask": torch.ones(24).bool()},
        r"custom_mask has shape \(24,\) .* must be \(25,\) bool",
    ),
    "a mask of the wrong dtype": (
        {"custom_mask": True},
        {"custom_mask": torch.ones(25)},
        "torch.float32",
    ),
    "a range of no request": (
        {"bidirectional_ranges": True},
        {"multi_modal_placeholder_index_maps": {"image": [PlaceholderRange(1, 0, 2)]}},
        r"'image' range \(1, 0, 2\) fits none of the 1 requests",
    ),
    "a longest query that is not": ({}, {"max_query_len": 4}, "max_query_len is 4; .* 5"),
    "most keys that are not": ({}, {"max_seq_len": 4}, "max_seq_len is 4; .* 5"),
    "starts for other requests": (
        {},
        {"query_start_loc_cpu": torch.tensor([0, 2, 5])},
        "for 1 requests it takes 2 ascending values",
    ),
    "lengths for other requests": (
        {},
        {"seq_lens_cpu": torch.tensor([5, 5])},
        "for 1 requests it takes as many",
    ),
    "a block table for other requests": (
        {},
        {"block_table": torch.zeros(2, 2).int()},
        "with num_reqs=1",
    ),
}


@pytest.mark.parametrize("what", BAD_BUILDS)
@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
def test_an_inconsistent_batch_makes_no_metadata(backend, what):
    fields, changes, message = BAD_BUILDS[what]
    batch = dataclasses.replace(AttentionBatch.create([5], [5]), **changes)
    builder_cls = registry.candidates()[backend].backend_cls.get_builder_cls()
    with pytest.raises(InvalidInputError, match=message):
        builder_cls(layer_spec(**fields), torch.device("cpu")).build(batch)


def test_the_check_variable_is_0_or_1(monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "yes")
    with pytest.raises(
        InvalidInputError, match=r"ATTN_DISPATCH_CHECK='yes' .* Set it to 0, 1 or sync"
    ):
        Call("REFERENCE")()
