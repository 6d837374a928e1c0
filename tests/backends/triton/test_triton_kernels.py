"""How TRITON_ATTN's kernels split the work, read keys and store bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attn_dispatch.backends.triton import impl as triton_impl
from attn_dispatch.backends.triton import launcher, operands, scratch
from attn_dispatch.backends.triton.impl import TritonImpl
from attn_dispatch.backends.triton.kernels.fp8 import decode_fp8, encode_fp8
from attn_dispatch.interface.kv_access import write_kv_cache
from attn_dispatch.interface.quantization import kv_cache_torch_dtype
from support.cases import FP8, INT8, Case, Step, layer_spec, nan_cache, stored_size
from support.triton_cases import (
    DEVICE,
    DTYPES,
    HAS_GPU,
    SMALL,
    builder_of,
    check,
    counters_are_zero,
    forward,
    in_words,
    poison,
    reordered,
    rows_of,
    same_bits,
    some,
    triton_plan,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

FORMATS = {name: dtype for dtype, name in operands.FORMATS.items() if name != "int8"}


# Decode: work units are split anywhere.

#: Query lengths and key lengths.
LENGTHS = {
    "one long request": ((1,), (250,)),
    "ends of tiles": ((1,) * 4, (64, 16, 96, 32)),
    "around the ends of tiles": ((1,) * 6, (15, 17, 63, 65, 31, 1)),
    "very different": ((1,) * 6, (100, 0, 3, 1, 213, 64)),
    "nothing between": ((1, 0, 1, 0, 1, 1), (90, 40, 0, 0, 0, 70)),
    "drafts to verify": ((2, 5, 16, 1, 9, 3), (40, 81, 16, 0, 117, 3)),
}
FEATURES = {
    "plain": {},
    "window": {"sliding_window": 37},
    "everything": {
        "sliding_window": 50,
        "logits_soft_cap": 2.0,
        "alibi": True,
        "sinks": True,
        "custom_mask": True,
        "kv_cache_dtype": "fp8_e4m3",
        "kv_scales": "per_head",
    },
    "ranges": {"sliding_window": 8, "bidirectional_ranges": True},
}


def decode_step(lens, dtype=torch.float32, **fields):
    sizes = {"num_heads": 3, "num_kv_heads": 1}
    spec = layer_spec(dtype=dtype, returns_lse=True, **sizes | fields)
    ranges = ()
    if spec.bidirectional_ranges:
        ranges = tuple((i, n // 3, n) for i, n in enumerate(lens[1]) if n)
    return Step(Case(spec=spec, query_lens=lens[0], seq_lens=lens[1], ranges=ranges), DEVICE)


def launched(programs, **decode):
    plain = {"block_n": 16, "min_tiles": 1, "programs_per_sm": 1}
    return {"decode": plain | decode, "num_sms": programs}


def check_decode(step, expected=None, again=HAS_GPU, **launch):
    """Check a step on poisoned memory, its counters, and its bits again; return the parts used."""
    metadata = builder_of(step.spec, **launch).build(step.batch)
    assert metadata.prefill is None
    poison(metadata)
    returned = forward(step, metadata)
    check(step, returned, expected)
    assert counters_are_zero(metadata)
    if again:
        assert same_bits(forward(step, metadata), returned)
        assert counters_are_zero(metadata)
    return int((~metadata.decode.part_lse.isnan()).sum())


@pytest.mark.parametrize(("lengths", "feature"), some(7, LENGTHS, FEATURES))
def test_keys_split_among_any_number_of_programs(lengths, feature, monkeypatch):
    monkeypatch.setattr(triton_impl, "_MERGE_TILE_MAX_PARTS", 2)
    step = decode_step(LENGTHS[lengths], **FEATURES[feature])
    expected = step.expected()
    for programs in (3, 16):
        again = HAS_GPU or programs == 3
        check_decode(step, expected, again, **launched(programs, max_rows=16))


@pytest.mark.skipif(HAS_GPU, reason="a GPU has an order of its own")
@pytest.mark.parametrize("is_invariant", [False, True])
def test_order_of_programs(is_invariant, monkeypatch):
    """Parts do not overlap: last program first, then alternating."""
    from triton.runtime.interpreter import interpreter_builder

    set_grid_idx = interpreter_builder.set_grid_idx
    step = decode_step(LENGTHS["very different"], batch_invariant=is_invariant)
    expected = step.expected()
    for place in (lambda i, n: n - 1 - i, lambda i, n: i // 2 if i % 2 == 0 else n - 1 - i // 2):

        def elsewhere(x, y, z, place=place):
            set_grid_idx(place(x, interpreter_builder.grid_dim[0]), y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", elsewhere)
        check_decode(step, expected, **launched(7))


def test_one_program_splits_nothing():
    assert check_decode(decode_step(LENGTHS["very different"]), **launched(1)) == 0


@pytest.mark.parametrize(
    ("few", "head_size_v", "feature"), some(6, [0, 1, 1000], [8, 512], ["plain", "everything"])
)
def test_both_merges_agree(few, head_size_v, feature, monkeypatch):
    """As whole tiles, or row by row; fewer wide rows at a time."""
    monkeypatch.setattr(triton_impl, "_MERGE_TILE_MAX_PARTS", few)
    step = decode_step(((1, 3), (200, 90)), head_size_v=head_size_v, **FEATURES[feature])
    assert check_decode(step, **launched(16)) > 16


@pytest.mark.parametrize("min_tiles", [2, 5, 1000])
@pytest.mark.parametrize("programs", [3, 16])
def test_programs_have_min_tiles(min_tiles, programs):
    step = decode_step(LENGTHS["very different"])
    parts = check_decode(step, **launched(programs, min_tiles=min_tiles))
    assert (parts > 0) == (min_tiles < 1000)


def test_equal_requests_are_not_split():
    """8 requests of 16 tiles."""
    step = decode_step(((1,) * 8, (256,) * 8), num_heads=1, num_kv_heads=1)
    assert check_decode(step, **launched(8)) == 0


@pytest.mark.parametrize(
    ("programs", "is_invariant", "listed"), some(4, [1, 7], [False, True], [False, True])
)
def test_more_requests_than_lengths_are_read_at_a_time(programs, is_invariant, listed):
    seq_lens = (0, 0, 0, 0, 20, 0, 40, 1, 0, 0, 0, 0, 33, 0, 0, 0, 0, 0, 17, 0)
    query_lens = [1] * len(seq_lens)
    spec = layer_spec(dtype=torch.float32, num_kv_heads=1, batch_invariant=is_invariant)
    if listed:
        query_lens[9], seq_lens = 30, (*seq_lens[:9], 30, *seq_lens[10:])
    step = Step(Case(spec=spec, query_lens=tuple(query_lens), seq_lens=seq_lens), DEVICE)
    launch = SMALL | launched(programs, lengths_per_load=4)
    metadata = builder_of(spec, **launch).build(step.batch)
    assert (metadata.decode.requests is not None) == listed
    check(step, forward(step, metadata))
    assert counters_are_zero(metadata)


@pytest.mark.parametrize(
    ("window", "lens"),
    [
        *some(4, [1, 16, 17, 40], [((1, 1, 1), (200, 39, 41)), ((7, 16, 2), (100, 16, 57))]),
        (9, ((1,) * 4, (23, 24, 25, 40))),  # begins before, at and after a tile's last key
    ],
    ids=in_words,
)
def test_splits_skip_keys_before_the_window(window, lens):
    step = decode_step(lens, sliding_window=window)
    for request, (query_len, seq_len) in enumerate(zip(*lens, strict=True)):
        passed = max(0, seq_len - query_len - window + 1) // step.spec.block_size
        step.kv_cache[step.batch.block_table[request, :passed].long()] = torch.nan
    for programs in (1, 5) if HAS_GPU else (5,):
        check_decode(step, **launched(programs))


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", INT8])
def test_nan_before_the_window_in_8bit_caches(kv_cache_dtype):
    """Bytes are read in pairs if heads are multiples of 16 bytes."""
    lens = ((1, 3), (100, 39))
    step = decode_step(
        lens, torch.float16, head_size=16, sliding_window=17, kv_cache_dtype=kv_cache_dtype
    )
    for request, (query_len, seq_len) in enumerate(zip(*lens, strict=True)):
        passed = (seq_len - query_len - 16) // step.spec.block_size
        blocks = step.batch.block_table[request, :passed].long()
        step.kv_cache.view(torch.uint8)[blocks] = 0xFF if kv_cache_dtype == INT8 else 0x7F
    check_decode(step, **launched(5))


def test_few_requests_have_their_own_launch():
    """Fewer KV heads, over all requests, than programs."""
    spec = layer_spec(num_heads=4, num_kv_heads=1, head_size=128, dtype=torch.float16)
    builder = builder_of(spec, num_sms=5)
    launches = builder.launches
    assert launches.decode_few is not launches.decode
    programs = 5 * launches.decode_few.programs_per_sm
    for requests, is_few in ((programs - 1, True), (programs, False)):
        case = Case(spec=spec, query_lens=(1,) * requests, seq_lens=(9,) * requests)
        plan = builder.build(Step(case, DEVICE).batch).decode
        assert plan.launch is (launches.decode_few if is_few else launches.decode)


@pytest.mark.parametrize(
    ("feature", "lengths", "few"),
    some(6, FEATURES, ["ends of tiles", "very different", "nothing between"], [0, 8]),
)
def test_fixed_splits_agree(feature, lengths, few, monkeypatch):
    """The schedule of batch_invariant."""
    monkeypatch.setattr(triton_impl, "_MERGE_TILE_MAX_PARTS", few)
    step = decode_step(LENGTHS[lengths], batch_invariant=True, **FEATURES[feature])
    expected = step.expected()
    for programs in (5, 50) if HAS_GPU else (5,):
        check_decode(step, expected, **launched(programs))


@pytest.mark.parametrize("seq_len", [1, 16, 17, 127, 128, 129, 144, 213])
def test_fixed_splits_of_every_length(seq_len):
    check_decode(decode_step(((1, 1), (seq_len, 5)), batch_invariant=True), **launched(5))


# Prefill: keys are found in pages, in gathered rows, in the rows that came, by descriptors.

NEVER, ALWAYS = 10**9, 0
SOURCES = {
    "pages": ("pages", {"gather_from": NEVER}),
    "gathered": ("rows", {"gather_from": ALWAYS, "descriptors": False}),
    "gathered, descriptors": ("descriptors", {"gather_from": ALWAYS, "descriptors": True}),
}
CHUNKS = {"query_lens": (20, 24, 18), "seq_lens": (37, 24, 70)}
PROMPTS = {"query_lens": (20, 24, 18), "seq_lens": (20, 24, 18)}


@pytest.fixture
def any_size(monkeypatch):
    """Descriptors for heads of any size that fills a tile, so that shapes can be small here."""
    monkeypatch.setattr(
        TritonImpl,
        "_has_descriptors",
        lambda self, query, metadata: metadata.ranges is None and metadata.mask_starts is None,
    )


@pytest.fixture
def found_in(monkeypatch, any_size):
    """The sources of the prefill kernels launched from here on."""
    seen = []

    class Recording(launcher.Launcher):
        def __init__(self, kernel, constants, options):
            super().__init__(kernel, constants, options)
            seen.extend([constants["F"].SOURCE] if "BLOCK_M" in constants else [])

    monkeypatch.setattr(launcher, "Launcher", Recording)
    return seen


def prefill_step(lens, **fields):
    sizes = {"num_kv_heads": 1, "head_size": 16}
    spec = layer_spec(**{"dtype": torch.float32, "returns_lse": True} | sizes | fields)
    ranges = ((0, 2, 30), (2, 50, 66)) if spec.bidirectional_ranges else ()
    return Step(Case(spec=spec, **lens, ranges=ranges), DEVICE)


def run_prefill(step, table=None):
    metadata = builder_of(step.spec, **SMALL, table=table).build(step.batch)
    poison(metadata)
    return forward(step, metadata)


CHUNK_FEATURES = [
    *FEATURES.values(),
    {"kv_cache_dtype": INT8},
    {"kv_cache_dtype": "fp8_e5m2", "kv_cache_layout": "HND"},
    {"causal": False, "sliding_window": 20},
    {"kv_sharing": True, "num_heads": 6},
]


@pytest.mark.parametrize(("source", "fields"), some(12, SOURCES, CHUNK_FEATURES), ids=in_words)
def test_chunks_agree_for_each_source(source, fields, found_in):
    kind, table = SOURCES[source]
    step = prefill_step(CHUNKS, **fields)
    if kind == "descriptors" and (step.spec.bidirectional_ranges or step.spec.custom_mask):
        kind = "rows"
    check(step, run_prefill(step, table))
    assert found_in == [kind]


@pytest.mark.parametrize(("source", "block_size"), some(4, SOURCES, [None, 4]))
def test_prompts_are_read_directly(source, block_size, found_in):
    step = prefill_step(PROMPTS, block_size=block_size, sliding_window=17)
    check(step, run_prefill(step, SOURCES[source][1]))
    assert found_in == ["descriptors" if "descriptors" in source else "rows"] or source == "pages"


@pytest.mark.parametrize("fields", [{"kv_cache_dtype": "fp8_e4m3"}, {"kv_cache_dtype": "float16"}])
def test_prompts_with_rounding_caches_are_read_from_the_cache(fields, found_in):
    step = prefill_step(PROMPTS, **fields)
    check(step, run_prefill(step, SOURCES["pages"][1]))
    assert found_in == ["pages"]


@pytest.mark.parametrize(
    ("memory", "sizes", "kind"),
    [
        ("contiguous", (16, 16), "descriptors"),
        ("contiguous", (64, 32), "rows"),
        ("transposed", (16, 16), "rows"),
        ("fused", (16, 16), "rows"),  # begins at an address that TMA cannot take
        ("contiguous", (16, 12), "rows"),  # a head does not fill a tile
        ("contiguous", (7, 16), "rows"),
    ],
)
def test_descriptors_need_aligned_rows(memory, sizes, kind, found_in):
    step = prefill_step(PROMPTS, head_size=sizes[0], head_size_v=sizes[1], block_size=None)
    step = Step(step.case.replace(memory=memory), DEVICE)
    check(step, run_prefill(step, {"descriptors": True}))
    assert found_in == [kind]


@pytest.mark.parametrize(
    ("sizes", "dtype", "has"),
    [
        ((64, 64), torch.float16, True),
        ((128, 128), torch.bfloat16, True),
        ((120, 100), torch.bfloat16, True),  # once gathered they fill tiles of 128
        ((256, 16), torch.bfloat16, False),
        ((16, 16), torch.float16, False),
        ((128, 128), torch.float32, False),
    ],
)
def test_descriptors_are_used_for_tested_sizes(sizes, dtype, has):
    impl = TritonImpl(2, sizes[0], 1.0, head_size_v=sizes[1])
    query = torch.empty(1, 2, sizes[0], dtype=dtype)
    plain, masked = (SimpleNamespace(ranges=None, mask_starts=m) for m in (None, query))
    assert impl._has_descriptors(query, plain) is has
    assert not impl._has_descriptors(query, masked)


def test_large_keys_are_not_gathered(monkeypatch, found_in):
    monkeypatch.setattr(scratch, "MAX_SCRATCH_BYTES", 0)
    step = prefill_step(CHUNKS)
    check(step, run_prefill(step, SOURCES["gathered"][1]))
    assert found_in == ["pages"]


LENS = {"chunks": CHUNKS, "prompts": PROMPTS}
HIDING = [{}, {"sliding_window": 9}, {"custom_mask": True}]


@pytest.mark.parametrize(("source", "fields", "kind"), some(9, SOURCES, HIDING, LENS), ids=in_words)
def test_nan_stays_in_its_request(source, fields, kind, any_size):
    """The keys of the next request follow directly."""
    table, lens = SOURCES[source][1], LENS[kind]
    step = prefill_step(lens, **fields)
    expected = run_prefill(step, table)
    for neighbour in (0, 2):
        rows = rows_of(step, neighbour)
        step.key[rows] = step.value[rows] = torch.nan
        blocks = step.batch.block_table[neighbour, : lens["seq_lens"][neighbour] // 4]
        step.kv_cache[blocks.long()] = torch.nan
    its = rows_of(step, 1)
    for after, before in zip(run_prefill(step, table), expected, strict=True):
        assert torch.equal(after[its], before[its])


@pytest.mark.parametrize(
    ("source", "kv_cache_dtype", "window"), some(6, SOURCES, ["auto", INT8], [1, 9, 30])
)
def test_keys_before_the_window_are_ignored(source, kv_cache_dtype, window):
    nan = -1 if kv_cache_dtype == INT8 else torch.nan
    step = prefill_step(CHUNKS, sliding_window=window, kv_cache_dtype=kv_cache_dtype)
    expected = step.expected()
    for request, (query_len, seq_len) in enumerate(zip(*CHUNKS.values(), strict=True)):
        passed = max(0, seq_len - query_len - window + 1) // step.spec.block_size
        step.kv_cache[step.batch.block_table[request, :passed].long()] = nan
    check(step, run_prefill(step, SOURCES[source][1]), expected)


@pytest.mark.parametrize("past", [1, 13, 14, 15, 16, 17, 30, 31])
@pytest.mark.parametrize("causal", [True, False])
def test_past_ends_anywhere_in_a_tile(past, causal):
    """The last key that all rows see may be the last one of its tile, or not."""
    spec = layer_spec(dtype=torch.float32, num_heads=2, num_kv_heads=1, causal=causal)
    step = Step(Case(spec=spec, query_lens=(35,), seq_lens=(35 + past,)), DEVICE)
    check(step, run_prefill(step))


@pytest.mark.parametrize("lens", [((1, 3), (70, 39)), ((18, 20), (70, 39))], ids=str)
@pytest.mark.parametrize("hides", ["mask", "window"])
def test_unseen_keys_are_ignored(lens, hides):
    """By a mask, or by a window beyond which some ranges reach."""
    fields = {"custom_mask": True}
    if hides == "window":
        fields = {"sliding_window": 3, "bidirectional_ranges": True}
    ranges = ((0, 10, 70),) if hides == "window" else ()
    spec = layer_spec(dtype=torch.float32, num_kv_heads=1, **fields)
    case = Case(spec=spec, query_lens=lens[0], seq_lens=lens[1], ranges=ranges)
    step = Step(case, DEVICE)
    if hides == "mask":
        for mask in step.masks:
            mask[:, :8] = False
        step.batch = step._make_batch()
    expected = step.expected()
    step.kv_cache[step.batch.block_table[:, :2].long()] = torch.nan  # the first 8 keys
    check(step, run_prefill(step, SOURCES["pages"][1]), expected)


def test_prompt_next_to_a_chunk_agrees():
    """By itself it is read directly; in a batch with a chunk everything is gathered."""
    step = prefill_step(CHUNKS, batch_invariant=True)
    together = run_prefill(step)
    alone = run_prefill(reordered(step, [1]))
    assert same_bits(alone, tuple(each[rows_of(step, 1)] for each in together))


@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize("block_m", [16, 64])
def test_tiles_cover_every_row_once_long_requests_and_late_rows_first(group, block_m):
    spec = layer_spec(dtype=torch.float32, num_heads=2 * group, num_kv_heads=2)
    lens = {"query_lens": (1, 17, 300, 0, 64, 33, 16), "seq_lens": (50, 17, 300, 9, 400, 0, 80)}
    step = Step(Case(spec=spec, **lens), DEVICE)
    plan = builder_of(spec, prefill={"block_m": block_m}).build(step.batch).prefill
    tiles = plan.tiles.tolist()
    wanted = [
        [request, row]
        for request in (1, 2, 4, 5)
        for row in range(0, lens["query_lens"][request] * group, block_m)
    ]
    assert sorted(tiles) == wanted
    assert plan.requests.tolist() == [1, 2, 4, 5]
    order = [(lens["seq_lens"][request], row) for request, row in tiles]
    assert order == sorted(order, reverse=True)


def test_requests_of_few_tokens_go_to_decode():
    step = Step(Case(spec=layer_spec(), query_lens=(16, 17, 1, 0), seq_lens=(16, 20, 9, 3)))
    metadata = builder_of(layer_spec(dtype=torch.float32), device="cpu").build(step.batch)
    assert metadata.decode.requests.tolist() == [0, 2, 3]
    assert metadata.prefill.requests.tolist() == [1]


# The cache is written as kv_cache.write_kv_cache writes it.


def special_rows(tokens, heads, size, dtype, seed):
    """Ordinary numbers, and rows of edge cases."""
    rows = torch.randn(tokens, heads, size, generator=torch.Generator().manual_seed(seed))
    flat = rows.view(-1, size)
    steps = torch.arange(size) % 13 - 6
    for row, values in enumerate((
        0.0 * flat[0], 1e-41 * flat[0], 1e-36 * flat[0], 1e30 * flat[0], -0.0 * flat[0].abs(),
        steps + 0.5, steps * 127 / 6, steps * 0.25, flat[0].sign() * 65520, flat[0].sign() * 672,
        steps * 2.0**-10, steps * 2.0**-17,
    )):  # fmt: skip
        flat[row + 1] = values
    flat[20, 0], flat[21, -1], flat[22, 0] = torch.nan, torch.inf, -torch.inf
    flat[23, 0], flat[23, -1] = torch.inf, torch.nan
    return rows.to(dtype)


WRITTEN = ["auto", "float32", "float16", *FP8, INT8]


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "layout", "sizes"),
    some(48, DTYPES, WRITTEN, ["NHD", "HND"], [(8, 8), (7, 40), (128, 16)]),
    ids=in_words,
)
def test_cache_has_the_same_bytes_as_reference(dtype, kv_cache_dtype, layout, sizes):
    heads, tokens, block_size = 3, 17, 5
    spec = layer_spec(
        dtype=dtype, num_heads=3, num_kv_heads=3, head_size=sizes[0], head_size_v=sizes[1],
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    step = Step(Case(spec=spec, query_lens=(), seq_lens=()), DEVICE)
    shape = (6, 2, block_size, heads, stored_size(kv_cache_dtype, max(sizes)))
    cache = nan_cache(shape, layout, kv_cache_torch_dtype(kv_cache_dtype, dtype), DEVICE)
    key, value = (
        special_rows(tokens, heads, 2 * size, dtype, size)[..., ::2].to(DEVICE) for size in sizes
    )
    slots = torch.randperm(30, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[::5] = -1
    slots = slots.to(DEVICE)
    for values in (0.37, [0.013, 1.0, 3.0]):
        scale = torch.tensor(values, device=DEVICE)
        layer = SimpleNamespace(_k_scale=scale, _v_scale=scale / 3)
        written, expected = cache.clone(), cache.clone()
        impl = triton_impl.TritonImpl(**step.impl_arguments())
        batch = SimpleNamespace(slot_mapping=slots)
        impl.write_kv(layer, key, value, written, batch)
        write_kv_cache(key, value, expected, slots, scale, scale / 3)
        found, wanted = (_bytes_but_nan(each) for each in (written, expected))
        assert torch.equal(found, wanted), (found != wanted).nonzero()[:5]


def _bytes_but_nan(cache):
    """The cache's bytes, with every NaN replaced by the same one."""
    if cache.dtype == torch.int8:  # the scales are the only floats in it
        scales = cache.view(torch.float32)[..., -4]
        scales.copy_(scales.masked_fill(scales.isnan(), 1.25))
        return cache
    values = cache.float()
    return values.masked_fill(values.isnan(), 1e30).view(torch.int32)  # −0 is not 0


@pytest.mark.parametrize("memory", ["fused", "transposed", "strided"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", INT8])
def test_memory_layouts_of_new_keys(memory, kv_cache_dtype):
    spec = layer_spec(dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)
    case = Case(spec=spec, query_lens=(3, 1), seq_lens=(3, 9), memory=memory, padding=2)
    step = Step(case, DEVICE)
    written, expected = step.kv_cache.clone(), step.kv_cache.clone()
    impl = triton_impl.TritonImpl(**step.impl_arguments())
    metadata = builder_of(spec).build(step.batch)
    impl.forward(step.layer, step.query, step.key, step.value, written, metadata)
    slots, scales = step.batch.slot_mapping, (step.layer._k_scale, step.layer._v_scale)
    write_kv_cache(step.key[: len(slots)], step.value[: len(slots)], expected, slots, *scales)
    assert torch.equal(_bytes_but_nan(written), _bytes_but_nan(expected))


# Eight bits.


@triton.jit
def _encode(x, out, n, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, encode_fp8(tl.load(x + i, mask=i < n), FORMAT), mask=i < n)


@triton.jit
def _decode(x, out, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out + i, decode_fp8(tl.load(x + i), out.dtype.element_ty, FORMAT, NATIVE))


CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("native", [False, True])
def test_fp8_decoding_agrees_with_torch(form, dtype, native):
    if native and not (HAS_GPU and form in triton_plan.launch_table(_device()).native_fp8):
        pytest.skip("not in hardware here")
    out = torch.empty(256, dtype=dtype, device=DEVICE)
    _decode[(1,)](CODES.to(DEVICE), out, form, native)
    expected = CODES.view(FORMATS[form]).to(dtype)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMATS)
def test_fp8_encoding_agrees_with_torch(form):
    """At every value, every midpoint, next to it, far away, and at NaN."""
    dtype = FORMATS[form]
    values = CODES.view(dtype).float()
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    x = torch.cat([
        values, middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity),
        torch.randn(4000) * torch.logspace(-8, 5, 4000),
        torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, 1e-45, 3e38]),
    ])  # fmt: skip
    out = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    _encode[(triton.cdiv(len(x), 1024),)](x.to(DEVICE), out, len(x), form, 1024)
    limit = torch.finfo(dtype).max
    expected = x.clamp(-limit, limit).to(dtype)
    found = out.cpu().view(dtype)
    assert torch.equal(found.float().isnan(), expected.float().isnan())
    numbers = ~x.isnan()
    assert torch.equal(out.cpu()[numbers], expected.view(torch.uint8)[numbers])


def _device():
    from attn_dispatch.platforms.detect import detect_device

    return detect_device(DEVICE)
