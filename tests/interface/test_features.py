"""Whatever a backend declares has an effect: change the input, and the output changes.

A feature that is dropped without a word gives plausible numbers. So each one is switched on, and
each of its inputs changed, for every backend that declares it; a new backend is tested by being
registered, and a new field of the spec fails here until it has an entry.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass

import pytest
import torch

from attn_dispatch.interface.capability import compare
from attn_dispatch.interface.key_positions import KeyPositions
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType, PlaceholderRange
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.registry import registry
from support.cases import FP8, INT8, Case, Step, layer_spec

CPU = KNOWN_DEVICES["cpu"]


@dataclass(frozen=True)
class Place:
    """Where backends are tested: in this dtype, on this device of PyTorch's, declared for another.

    Triton's kernels run in its interpreter where there is no GPU, which no backend declares.
    """

    dtype: torch.dtype
    device: str
    profile: DeviceProfile


PLACES = [Place(torch.float64, "cpu", CPU)]
if importlib.util.find_spec("triton"):
    GPU = KNOWN_DEVICES["sm90"].with_libraries(Library("triton", version="3.6.0"))
    PLACES.append(Place(torch.float32, "cuda" if torch.cuda.is_available() else "cpu", GPU))

#: name -> class and the first place that it declares; on a GPU those that need nothing but Triton.
BACKENDS = {
    name: (candidate.backend_cls, place)
    for place in reversed(PLACES)
    for name, candidate in registry.candidates().items()
    if candidate.backend_cls is not None
    and (place.profile is CPU or "TRITON" in name)
    and not compare(
        layer_spec(dtype=place.dtype), candidate.backend_cls.capabilities, place.profile
    )
}

#: A decode, a prompt and a chunk; heads 0 and 1 share a KV head, 2 and 3 the other one.
BATCH = {"query_lens": (1, 5, 3), "seq_lens": (9, 5, 8)}
DECODE, PROMPT, CHUNK = slice(0, 1), slice(1, 6), slice(6, 9)
RANGES = ((1, 1, 4), (2, 3, 7))
SCALES = {"kv_cache_dtype": "fp8_e4m3"}

#: Switching a feature on, or giving it another value: the spec before and after.
SWITCHES = {
    "soft cap": ({}, {"logits_soft_cap": 1.0}),
    "larger soft cap": ({"logits_soft_cap": 1.0}, {"logits_soft_cap": 2.0}),
    "window": ({}, {"sliding_window": 3}),
    "wider window": ({"sliding_window": 3}, {"sliding_window": 4}),
    "window both ways": ({"causal": False}, {"causal": False, "sliding_window": 3}),
    "window of two sizes": ({"causal": False}, {"causal": False, "window_size": (3, 1)}),
    "sides swapped": (
        {"causal": False, "window_size": (1, 3)},
        {"causal": False, "window_size": (3, 1)},
    ),
    "chunks": ({}, {"attention_chunk": 3}),
    "larger chunks": ({"attention_chunk": 3}, {"attention_chunk": 4}),
    "chunks both ways": ({"causal": False}, {"causal": False, "attention_chunk": 3}),
    "key positions": ({}, {"key_positions": True}),
    "key positions and window": (
        {"sliding_window": 4},
        {"sliding_window": 4, "key_positions": True},
    ),
    "not causal": ({}, {"causal": False}),
    "ALiBi": ({}, {"alibi": True}),
    "sinks": ({}, {"sinks": True}),
    "mask": ({}, {"custom_mask": True}),
    "ranges": ({}, {"bidirectional_ranges": True}),
    "ranges in a window": (
        {"sliding_window": 2},
        {"sliding_window": 2, "bidirectional_ranges": True},
    ),
    **{f"{name} cache": ({}, {"kv_cache_dtype": name}) for name in (*FP8, INT8, "float16")},
    "scales per head": (SCALES, SCALES | {"kv_scales": "per_head"}),
    "wider values": ({"head_size_v": 4}, {"head_size_v": 12}),
    "encoder": (
        {"block_size": None},
        {"block_size": None, "attn_type": AttentionType.ENCODER_ONLY},
    ),
    "cross": ({}, {"attn_type": AttentionType.ENCODER_DECODER}),
}


def nudge(name, *index, by=1.5):
    """Change one place of a step's tensor."""

    def change(step):
        tensor = getattr(step, name)
        tensor[index] = tensor[index] + by

    return change


def scale_by_two(name):
    def change(step):
        setattr(step.layer, name, 2 * getattr(step.layer, name))
        setattr(step.layer, f"{name}_float", 2 * getattr(step.layer, f"{name}_float"))

    return change


def nudge_cache(index, request=0, position=2):
    """Change a key (index 0) or a value (1) that a request has in the cache, of KV head 0."""

    def change(step):
        block_size = step.spec.block_size
        block = int(step.batch.block_table[request, position // block_size])
        step.kv_cache[block, index, position % block_size, 0] += 1.5

    return change


def double_cached_scale(index, request=0, position=2):
    """Double the scale that an int8 cache has for a key (index 0) or a value, of KV head 0."""

    def change(step):
        block_size = step.spec.block_size
        block = int(step.batch.block_table[request, position // block_size])
        row = step.kv_cache[block, index, position % block_size, 0]
        row[-16:-12] = (2 * row[-16:-12].clone().view(torch.float32)).view(torch.int8)

    return change


def swap_block_table(step):
    step.batch.block_table[0, :2] = step.batch.block_table[0, [1, 0]]


def change_batch(**changes):
    def change(step):
        step.batch = dataclasses.replace(step.batch, **changes)

    return change


def flip_mask(step):
    step.masks[1][3, :3] = ~step.masks[1][3, :3]
    step.batch = step._make_batch()


def move_ranges(step):
    maps = {"image": [PlaceholderRange(1, 1, 5), PlaceholderRange(2, 3, 7)]}
    step.batch = dataclasses.replace(step.batch, multi_modal_placeholder_index_maps=maps)


def lengthen(step):
    """The chunk's request is three keys longer, and none of them is here."""
    positions = step.batch.key_positions
    lengths = [*positions.seq_lens_cpu.tolist()[:2], int(positions.seq_lens_cpu[2]) + 3]
    changed = KeyPositions.create(
        lengths, offset=positions.offset, step=positions.step, device=step.device
    )
    step.batch = dataclasses.replace(step.batch, key_positions=changed)


def change_slope(step):
    step.slopes[2] *= 3


def change_scale(step):
    step.scale *= 2


#: Changing one input: the spec, the change, and what of the output alone may and must change.
INPUTS = {
    "query": ({}, nudge("query", 7, 3), (7, 3)),
    "new key": ({"block_size": None, "causal": False}, nudge("key", 9, 1), (PROMPT, slice(2, 4))),
    "new value": ({}, nudge("value", 5, 0), (5, slice(0, 2))),
    "scale": ({}, change_scale, ()),
    "cached key": ({}, nudge_cache(0), (DECODE, slice(0, 2))),
    "cached value": ({}, nudge_cache(1), (DECODE, slice(0, 2))),
    "cached value of a chunk": ({}, nudge_cache(1, request=2), (CHUNK, slice(0, 2))),
    "order of blocks": ({"alibi": True}, swap_block_table, (DECODE,)),
    "length": ({"key_positions": True, "sliding_window": 6}, lengthen, (CHUNK,)),
    "slope": ({"alibi": True}, change_slope, (slice(None), 2)),
    "sink": ({"sinks": True}, nudge("sinks", 1), (slice(None), 1)),
    "mask": ({"custom_mask": True}, flip_mask, (4,)),
    "range": ({"bidirectional_ranges": True}, move_ranges, (PROMPT,)),
    "k_scale": (SCALES, scale_by_two("_k_scale"), ()),
    "v_scale": (SCALES, scale_by_two("_v_scale"), ()),
    "scale of a cached key": (
        {"kv_cache_dtype": INT8},
        double_cached_scale(0),
        (DECODE, slice(0, 2)),
    ),
    "scale of a cached value": (
        {"kv_cache_dtype": INT8},
        double_cached_scale(1),
        (DECODE, slice(0, 2)),
    ),
    "shared cache": ({"kv_sharing": True}, nudge_cache(1), (DECODE, slice(0, 2))),
}

#: Fields of the spec that name no numbers of their own.
WITHOUT_EFFECT = {
    "kv_strides": "where the cache is; test_cache_layouts.py has the layouts of engines",
    "num_heads": "the shape of the query",
    "num_kv_heads": "the shape of the keys",
    "head_size": "the shape of the query",
    "dtype": "how precise, not what",
    "block_size": "where keys lie",
    "kv_cache_layout": "where keys lie",
    "lengths": "what the host knows, not what is computed",
    "mla": "has backends and tests of its own",
    "returns_lse": "adds a result",
    "output_quant": "how the output is stored; tested with the layer",
    "batch_invariant": "a promise about bits",
    "cuda_graph": "how it is launched",
}


def step_of(backend, fields):
    place = BACKENDS[backend][1]
    spec = layer_spec(dtype=place.dtype, **fields)
    has_cache = spec.block_size is not None
    lens = dict(BATCH)
    case = Case(spec=spec, **lens, ranges=RANGES if spec.bidirectional_ranges else ())
    if spec.attn_type == AttentionType.ENCODER_DECODER:
        case = case.replace(new_lens=case.seq_lens)
    return Step(case if has_cache else case.replace(new_lens=case.seq_lens), place.device)


def declaring(*specs):
    """The backends that declare every one of these specs."""
    return [
        name
        for name, (cls, place) in BACKENDS.items()
        if not any(
            compare(layer_spec(dtype=place.dtype, **fields), cls.capabilities, place.profile)
            for fields in specs
        )
    ]


SWITCHED = [(b, name) for name, specs in SWITCHES.items() for b in declaring(*specs)]
CHANGED = [(b, name) for name, (fields, *_) in INPUTS.items() for b in declaring(fields)]


@pytest.mark.parametrize(
    ("backend", "switch"), [pytest.param(*p, id=": ".join(p)) for p in SWITCHED]
)
def test_a_feature_changes_the_output(backend, switch):
    before, after = (step_of(backend, fields) for fields in SWITCHES[switch])
    off, on = before.run(backend), after.run(backend)
    width = min(off.shape[-1], on.shape[-1])
    differs = off.shape != on.shape or bool(((off - on)[..., :width].abs() > 1e-4).any())
    assert differs, f"{switch} changes nothing"
    after.check(on, after.naive()[0])


@pytest.mark.parametrize(("backend", "what"), [pytest.param(*p, id=": ".join(p)) for p in CHANGED])
def test_an_input_that_changes_changes_its_part_of_the_output(backend, what):
    fields, change, where = INPUTS[what]
    step = step_of(backend, fields)
    before = step.run(backend)
    change(step)
    changed = (step.run(backend) - before).abs() > 1e-4
    assert bool(changed[where].any()), f"{what} changes nothing"
    changed[where] = False
    assert not changed.any(), f"{what} changes what it should not"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_field_that_a_backend_declares_is_tested(backend):
    """Of those that change numbers: a value beyond the neutral one is used above."""
    used = [
        layer_spec(**fields)
        for name, (_, fields) in SWITCHES.items()
        if (backend, name) in SWITCHED
    ]
    used += [layer_spec(**INPUTS[name][0]) for b, name in CHANGED if b == backend]
    declared = BACKENDS[backend][0].capabilities.fields
    for field in dataclasses.fields(AttentionSpec):
        if field.name in WITHOUT_EFFECT or field.name not in declared:
            continue
        values = {getattr(spec, field.name) for spec in used}
        assert len(values) > 1, f"{backend} declares {field.name}, and nothing here changes it"


def test_every_field_of_the_spec_is_accounted_for():
    switched = {name for pair in SWITCHES.values() for fields in pair for name in fields}
    switched |= {name for fields, *_ in INPUTS.values() for name in fields}
    fields = {field.name for field in dataclasses.fields(AttentionSpec)}
    assert fields - switched - WITHOUT_EFFECT.keys() == set()
    assert WITHOUT_EFFECT.keys() <= fields
