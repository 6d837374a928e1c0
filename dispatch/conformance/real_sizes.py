"""Checks at the sizes of real models: thousands of keys, drawn at random, judged row by row.

A kernel may be right for sequences of a few tiles and wrong at the edges of some tile of a long
one. FlashAttention 3 was, for sliding windows: see docs/vendors.md. So windows here are no
multiples of a tile, prompts are ragged, and every row counts by itself. The oracle is float64 on
the device, one head at a time: on a CPU it would take minutes, and the group is skipped.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from attn_dispatch.conformance.check import BackendUnderTest, Check, Skipped
from attn_dispatch.conformance.findings import CheckFailed, ErrorBound, require
from attn_dispatch.conformance.tolerance import FLOOR
from attn_dispatch.errors import BackendFailure, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, allocate_kv_cache, kv_cache_shape
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["Draw", "draws", "judge", "real_sizes"]

HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 256, 512)
#: Query and KV heads: ratios of 1, 4, 8 and 5.
HEADS = ((8, 8), (8, 2), (8, 1), (10, 2))
WINDOWS = (
    *(17, 100, 127, 129, 200, 255, 257, 300, 511, 513, 700, 900, 1000, 1023, 1025, 1500, 2000),
    *(2047, 2049, 3000),
)
_BLOCK_SIZES = (16, 64, 32, 256)
#: Most keys of a request, and of all requests together.
LONGEST, _IN_ALL = 6000, 9000
#: The standard deviation of the scores: a row is the sum of some keys, not the mean of all.
_SPREAD = 2.0
#: PyTorch's own error counts up to this: more would be a fault of PyTorch's.
_MOST_EPS = 8
#: Rows of scores that the oracle computes at once.
_ROWS = 2048
#: Draws for each head size and ratio; the kinds of batches take turns.
_DRAWS, _QUICK_DRAWS = 8, 3


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A batch at real sizes, as data; it can be made again.

    Attributes:
        spec: the layer; block_size None for attention without a cache.
        query_lens: of each request.
        seq_lens: of each request.
        seed: of the numbers.
    """

    spec: AttentionSpec
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    seed: int


def real_sizes(target: BackendUnderTest) -> Iterator[Check]:
    """Each declared head size, with as many query heads to a KV head as models have."""
    if target.device.type != "cuda":
        shows = "Long requests give what the oracle gives."
        yield Check("real_sizes", "all", shows, target.base, _skip_without_gpu)
        return
    for head_size, heads in itertools.product(HEAD_SIZES, HEADS):
        found = draws(target, head_size, heads)
        if found:
            yield Check(
                "real_sizes",
                f"head_size={head_size}, heads={heads[0]}/{heads[1]}",
                "Long requests with windows of any size give what the oracle gives, in each row.",
                found[0].spec,
                partial(_agree, target, head_size, heads),
            )


def _skip_without_gpu() -> None:
    raise Skipped("the float64 oracle of thousands of keys takes a GPU")


def draws(
    target: BackendUnderTest, head_size: int, heads: tuple[int, int], *, longest: int = LONGEST
) -> list[Draw]:
    """Batches of layers that the backend declares, the same ones each time.

    Args:
        target: the backend.
        head_size: of queries, keys and values.
        heads: query heads and KV heads.
        longest: most keys of a request.

    Returns:
        The batches; none where no layer of this head size and these heads is declared.
    """
    source = random.Random(f"{head_size} {heads}")
    windows = [*WINDOWS]
    source.shuffle(windows)
    kinds = itertools.cycle((_chunks, _ragged, _prompt, _decodes, _mixed))
    found = []
    for index in range(_QUICK_DRAWS if target.quick else _DRAWS):
        # One in four is without a window.
        tried = [None] if index % 4 == 3 else windows[index:] + windows[:index]
        lens = next(kinds)(source, longest)
        spec = _layer(target, head_size, heads, tried, source, index)
        if spec is not None:
            found.append(
                Draw(spec=spec, query_lens=lens[0], seq_lens=lens[1], seed=source.getrandbits(32))
            )
    return found


def _layer(
    target: BackendUnderTest,
    head_size: int,
    heads: tuple[int, int],
    windows: Sequence[int | None],
    source: random.Random,
    index: int,
) -> AttentionSpec | None:
    """A declared layer, with the first of the windows that is; without one if none is."""
    sizes = {
        "head_size": head_size,
        "head_size_v": head_size,
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "kv_cache_dtype": "auto",
        "causal": True,
    }
    dtypes = [torch.bfloat16, torch.float16]
    if index % 2:
        dtypes.reverse()
    dtypes.append(target.base.dtype)
    blocks: list[int | None] = [*_BLOCK_SIZES]
    source.shuffle(blocks)
    blocks.append(target.base.block_size)
    blocks.insert(0 if index % 3 == 1 else len(blocks), None)  # without a cache
    layout = source.choice(("NHD", "HND"))
    for window, dtype, block, order in itertools.product(
        [*windows, None], dtypes, blocks, (layout, None)
    ):
        spec = target.base.replace(
            **sizes,
            dtype=dtype,
            sliding_window=window,
            block_size=block,
            kv_cache_layout=order if block else None,
        )
        if target.accepts(spec):
            return spec
    return None


_Lens = tuple[tuple[int, ...], tuple[int, ...]]


def _chunks(source: random.Random, longest: int) -> _Lens:
    """Chunks of prompts over what is already in the cache."""
    seqs = _within(source, longest, 2)
    return tuple(max(2, source.randint(n // 20, n // 2)) for n in seqs), seqs


def _ragged(source: random.Random, longest: int) -> _Lens:
    """Prompts of any length."""
    lens = _within(source, longest, 5)
    return lens, lens


def _prompt(source: random.Random, longest: int) -> _Lens:
    """One long prompt."""
    length = source.randint(longest * 2 // 3, longest)
    return (length,), (length,)


def _decodes(source: random.Random, longest: int) -> _Lens:
    """One token each."""
    seqs = _within(source, longest, 6)
    return (1,) * len(seqs), seqs


def _mixed(source: random.Random, longest: int) -> _Lens:
    """Decodes, drafts to verify, a chunk and a prompt."""
    seqs = _within(source, longest, 4)
    return (1, 4, max(2, seqs[2] // 3), seqs[3]), seqs


def _within(source: random.Random, longest: int, count: int) -> tuple[int, ...]:
    """Lengths of `count` requests; the first is long."""
    lens = [source.randint(longest // 2, longest)]
    rest = max(8, (_IN_ALL * longest // LONGEST - lens[0]) // max(1, count - 1))
    return (*lens, *(source.randint(4, rest) for _ in range(count - 1)))


def _agree(target: BackendUnderTest, head_size: int, heads: tuple[int, int]) -> ErrorBound:
    chosen = draws(target, head_size, heads)
    while chosen:
        try:
            found = [judge(target, draw) for draw in chosen]
        except (BackendFailure, UnsupportedError):
            again = draws(target, head_size, heads)
            if again == chosen:
                raise
            chosen = again  # a library turned out to be broken, and other layers are accepted now
        else:
            return max(found, key=lambda finding: finding.ratio)
    raise Skipped("no layer of these heads is possible on this machine")


def judge(target: BackendUnderTest, draw: Draw) -> ErrorBound:
    """Run the backend on a draw, and hold each row against the oracle.

    Raises:
        CheckFailed: a row is further off than is allowed; it says how many are.
    """
    spec, device = draw.spec, target.device
    source = torch.Generator(device).manual_seed(draw.seed)

    def rows(count: int, heads: int) -> torch.Tensor:
        shape = (count, heads, spec.head_size)
        return torch.randn(shape, generator=source, device=device).to(spec.dtype)

    query = rows(sum(draw.query_lens), spec.num_heads)
    keys, values = (rows(sum(draw.seq_lens), spec.num_kv_heads) for _ in range(2))
    cache, batch, new = _placed(draw, keys, values)
    scale = _SPREAD * spec.head_size**-0.5
    impl = target.cls.make_impl(spec, scale=scale)
    one = torch.ones((), device=device)
    layer: Any = SimpleNamespace(_k_scale=one, _v_scale=one, _k_scale_float=1.0, _v_scale_float=1.0)
    metadata: Any = target.cls.make_builder(spec, device).build(batch)
    returned = impl.forward(layer, query, *new, cache, metadata)
    output = returned[0] if isinstance(returned, tuple) else returned
    require(
        isinstance(output, torch.Tensor) and output.shape == query.shape,
        f"forward should return an output of shape {tuple(query.shape)}",
    )
    return _compare(draw, scale, (query, keys, values), output)


def _placed(
    draw: Draw, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor | None, AttentionBatch, tuple[torch.Tensor, torch.Tensor]]:
    """The cache with what is older than the step, the batch, and the step's keys and values."""
    spec, device, block_size = draw.spec, keys.device, draw.spec.block_size
    if block_size is None:
        key_lens = None if draw.query_lens == draw.seq_lens else draw.seq_lens
        batch = AttentionBatch.create(
            draw.query_lens, draw.seq_lens, device=device, key_lens=key_lens
        )
        return None, batch, (keys, values)
    needed = [-(-n // block_size) for n in draw.seq_lens]
    source = torch.Generator().manual_seed(draw.seed)
    free = torch.randperm(sum(needed), generator=source)
    table = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    slots, is_new = [], []
    starts = [0, *itertools.accumulate(needed)]
    for request, (query_len, seq_len) in enumerate(
        zip(draw.query_lens, draw.seq_lens, strict=True)
    ):
        blocks = free[starts[request] : starts[request + 1]]
        table[request, : len(blocks)] = blocks.int()
        places = torch.arange(seq_len)
        slots.append(blocks[places // block_size] * block_size + places % block_size)
        is_new.append(places >= seq_len - query_len)
    all_slots, new = (torch.cat(each).to(device) for each in (slots, is_new))
    shape = kv_cache_shape(len(free), block_size, spec.num_kv_heads, spec.head_size)
    order = STRIDE_ORDERS[spec.kv_cache_layout or "NHD"]
    cache = allocate_kv_cache(shape, order, spec.dtype, device).fill_(math.nan)
    old = all_slots[~new]
    for index, tensor in enumerate((keys, values)):
        cache[old // block_size, index, old % block_size] = tensor[~new]
    batch = AttentionBatch.create(
        draw.query_lens,
        draw.seq_lens,
        block_table=table.to(device),
        slot_mapping=all_slots[new],
        device=device,
    )
    return cache, batch, (keys[new], values[new])


def _compare(
    draw: Draw, scale: float, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> ErrorBound:
    """Hold each row against the oracle; PyTorch's own error is that of all requests."""
    spec = draw.spec
    query, keys, values = inputs
    first, first_key, own, found = 0, 0, 0.0, []
    for query_len, seq_len in zip(draw.query_lens, draw.seq_lens, strict=True):
        rows, of_request = slice(first, first + query_len), slice(first_key, first_key + seq_len)
        first, first_key = rows.stop, of_request.stop
        seen = _seen(query_len, seq_len, spec, query.device)
        parts = (query[rows], keys[of_request], values[of_request])
        expected = _exact(*parts, scale, seen)
        found.append(_row_errors(output[rows].double(), expected))
        pytorch = _pytorch(*parts, scale, seen).double()
        own = max(own, float(_row_errors(pytorch, expected).max()))
    eps = torch.finfo(spec.dtype).eps
    allowed = max(min(2 * own, _MOST_EPS * eps) + eps, FLOOR.get(spec.dtype, 0.0))
    for request, errors in enumerate(found):
        if float(errors.max()) > allowed:
            _tell(draw, request, errors, ErrorBound(float(errors.max()), allowed))
    return ErrorBound(max(float(errors.max()) for errors in found), allowed)


def _tell(draw: Draw, request: int, errors: torch.Tensor, found: ErrorBound) -> None:
    wrong = (errors > found.allowed).any(1)
    first = int(wrong.nonzero()[0])
    raise CheckFailed(
        f"{int(wrong.sum())} of {len(wrong)} rows of request {request} are wrong, the first is "
        f"token {first}: off by {found.error:.3g} of a row's largest value; {found.allowed:.3g} "
        f"is allowed. {draw}",
        found,
    )


def _seen(query_len: int, seq_len: int, spec: AttentionSpec, device: torch.device) -> torch.Tensor:
    """(query_len, seq_len) bool: which key each query sees."""
    behind = torch.arange(seq_len - query_len, seq_len, device=device)[:, None]
    behind = behind - torch.arange(seq_len, device=device)
    seen = behind >= 0
    return seen if spec.sliding_window is None else seen & (behind < spec.sliding_window)


def _exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
) -> torch.Tensor:
    """(query_len, num_heads, head_size) float64, for these rows, one KV head at a time."""
    group = query.shape[1] // key.shape[1]
    result = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    for head in range(key.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        keys, values = key[:, head].double(), value[:, head].double()
        for start in range(0, len(query), _ROWS):
            rows = slice(start, start + _ROWS)
            queries = query[rows, heads].double().transpose(0, 1) * scale
            scores = (queries @ keys.T).masked_fill_(~seen[rows], -math.inf)
            result[rows, heads] = (scores.softmax(-1) @ values).transpose(0, 1)
    return result


def _pytorch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
) -> torch.Tensor:
    """(query_len, num_heads, head_size): PyTorch's own attention in the layer's dtype."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (
        each.transpose(0, 1)[None]
        for each in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))
    )
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return found[0].transpose(0, 1)


def _row_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(query_len, num_heads): the largest difference, as a part of the row's largest value."""
    largest = expected.abs().amax(-1).clamp_min(1e-9)
    return ((actual - expected).abs().amax(-1) / largest).nan_to_num(nan=math.inf)
