"""Checks at the sizes of real models: thousands of keys, drawn at random, compared row by row.

A kernel may be right for sequences of a few tiles and wrong at the edges of some tile of a long
one. FlashAttention 3 was, for sliding windows: see docs/vendors.md. So windows here are no
multiples of a tile, prompts are ragged, and every row counts by itself. The oracle runs on the
device: on a CPU it would take minutes, and the group is skipped.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from attn_dispatch.conformance import oracle
from attn_dispatch.conformance.cases import Case
from attn_dispatch.conformance.check import BackendUnderTest, Check, skip
from attn_dispatch.conformance.kv_encoding import layer_with
from attn_dispatch.conformance.real_latents import real_latents
from attn_dispatch.conformance.tolerance import (
    CheckFailed,
    ErrorBound,
    allowance,
    require,
    row_errors,
    worst_of,
)
from attn_dispatch.errors import BackendFailure, UnsupportedError
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.batch_checks import slots_of
from attn_dispatch.interface.key_positions import KeyPositions
from attn_dispatch.interface.kv_cache import STRIDE_ORDERS, allocate_kv_cache, kv_cache_shape
from attn_dispatch.interface.spec import AttentionSpec

__all__ = ["FIELDS", "draws", "judge", "real_sizes"]

HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 256, 512)
#: Query and KV heads: ratios of 1, 4, 8 and 5.
HEADS = ((8, 8), (8, 2), (8, 1), (10, 2))
WINDOWS = (
    *(17, 100, 127, 129, 200, 255, 257, 300, 511, 513, 700, 900, 1000, 1023, 1025, 1500, 2000),
    *(2047, 2049, 3000),
)
#: Other fields of layers to draw, of two of WINDOWS; for a few head sizes.
FIELDS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "window_size": lambda one, other: {"causal": False, "window_size": (one, other)},
    "attention_chunk": lambda one, _: {"attention_chunk": one},
    "attention_chunk, window": lambda one, other: {"attention_chunk": one, "sliding_window": other},
    "key_positions": lambda *_: {"key_positions": True},
    "key_positions, window": lambda one, _: {"key_positions": True, "sliding_window": one},
    "key_positions, chunk": lambda one, _: {"key_positions": True, "attention_chunk": one},
}
_FIELDS_HEAD_SIZES = (64, 128, 256)
_BLOCK_SIZES = (16, 64, 32, 256)
#: Most keys of a request, and of all requests together.
LONGEST, _IN_ALL = 6000, 9000
#: The standard deviation of the scores: a row is the sum of some keys, not the mean of all.
_SPREAD = 2.0
#: PyTorch's own error counts up to this many units in the last place: more would be its fault.
_MOST_EPS = 4
_Lens = tuple[int, ...]
#: Kinds of batches: the number of requests, and their new tokens.
_KINDS: tuple[tuple[int, Callable[[random.Random, _Lens], _Lens]], ...] = (
    # Chunks of prompts whose beginning is in the cache.
    (2, lambda source, seqs: tuple(max(2, source.randint(n // 20, n // 2)) for n in seqs)),
    # Prompts of any length, and one long prompt.
    (5, lambda _, seqs: seqs),
    (1, lambda _, seqs: seqs),
    # Decodes.
    (6, lambda _, seqs: (1,) * len(seqs)),
    # A decode, drafts to verify, a chunk and a prompt.
    (4, lambda _, seqs: (1, 4, max(2, seqs[2] // 3), seqs[3])),
)
#: Draws for each head size and ratio; the kinds of batches take turns.
_DRAWS, _QUICK_DRAWS = 8, 3


def real_sizes(target: BackendUnderTest) -> Iterator[Check]:
    """Each declared head size, with the ratios of query heads to KV heads that models have."""
    if target.device.type != "cuda":
        shows = "Long requests give the oracle's result."
        reason = "the float64 oracle of thousands of keys takes a GPU"
        yield Check("all", shows, target.base, partial(skip, reason))
        return
    if target.base.mla is not None:
        yield from real_latents(target)
        return
    shows = "Long requests with windows of any size give the oracle's result, in each row."
    for head_size, heads in itertools.product(HEAD_SIZES, HEADS):
        found = draws(target, head_size, heads)
        if found:
            yield Check(
                f"head_size={head_size}, heads={heads[0]}/{heads[1]}",
                shows,
                found[0].spec,
                partial(_agree, target, head_size, heads),
            )
    for kind, head_size, heads in itertools.product(FIELDS, _FIELDS_HEAD_SIZES, HEADS):
        found = draws(target, head_size, heads, kind=kind)
        if found:
            yield Check(
                f"{kind}, head_size={head_size}, heads={heads[0]}/{heads[1]}",
                "Long requests with values of any size give the oracle's result, in each row.",
                found[0].spec,
                partial(_agree, target, head_size, heads, kind),
            )


def draws(
    target: BackendUnderTest,
    head_size: int,
    heads: tuple[int, int],
    *,
    longest: int = LONGEST,
    kind: str = "",
) -> list[Case]:
    """Batches of layers that the backend declares, the same ones each time.

    Args:
        target: the backend.
        head_size: of queries, keys and values.
        heads: query heads and KV heads.
        longest: most keys of a request.
        kind: one of FIELDS, for layers with these; "" for causal ones with or without a window.

    Returns:
        The batches; none if no layer of this head size and these heads is declared.
    """
    source = random.Random(f"{head_size} {heads}{kind}")
    windows = [*WINDOWS]
    source.shuffle(windows)
    found = []
    for index, (count, new_tokens) in zip(
        range(_QUICK_DRAWS if target.quick or kind else _DRAWS),
        itertools.cycle(_KINDS),
        strict=False,
    ):
        sizes = windows[index:] + windows[:index]
        tried: list[dict[str, Any]]
        if kind:
            tried = [FIELDS[kind](one, sizes[-1]) for one in sizes]
        elif index % 4 == 3:  # one in four is without a window
            tried = [{}]
        else:
            tried = [*({"sliding_window": size} for size in sizes), {}]
        seq_lens = _seq_lens(source, longest, count)
        query_lens = new_tokens(source, seq_lens)
        spec = _layer(target, head_size, heads, tried, source, index)
        if spec is not None:
            seed = source.getrandbits(32)
            found.append(Case(spec=spec, query_lens=query_lens, seq_lens=seq_lens, seed=seed))
    return found


def _layer(
    target: BackendUnderTest,
    head_size: int,
    heads: tuple[int, int],
    fields: Sequence[Mapping[str, Any]],
    source: random.Random,
    index: int,
) -> AttentionSpec | None:
    """A declared layer with the first of these fields that the backend accepts."""
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
    for own, dtype, block, order in itertools.product(fields, dtypes, blocks, (layout, None)):
        changes = {
            **sizes,
            "dtype": dtype,
            "block_size": block,
            "kv_cache_layout": order if block else None,
            **own,
        }
        spec = target.base.replace(**changes)
        if target.accepts(spec):
            return spec
    return None


def _seq_lens(source: random.Random, longest: int, count: int) -> _Lens:
    """Lengths of `count` requests; the first is long."""
    least = longest // 2 if count > 1 else longest * 2 // 3
    lens = [source.randint(least, longest)]
    rest = max(8, (_IN_ALL * longest // LONGEST - lens[0]) // max(1, count - 1))
    return (*lens, *(source.randint(4, rest) for _ in range(count - 1)))


def _agree(
    target: BackendUnderTest, head_size: int, heads: tuple[int, int], kind: str = ""
) -> ErrorBound:
    chosen = draws(target, head_size, heads, kind=kind)
    while chosen:
        try:
            return worst_of([judge(target, draw) for draw in chosen])
        except (BackendFailure, UnsupportedError):
            again = draws(target, head_size, heads, kind=kind)
            if again == chosen:
                raise
            chosen = again  # a library turned out to be broken, and other layers are accepted now
    skip("no layer of these heads is possible on this machine")


def judge(target: BackendUnderTest, draw: Case) -> ErrorBound:
    """Run the backend on a draw, and compare each row with the oracle.

    Raises:
        CheckFailed: a row is further off than is allowed; the message counts such rows.
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
    layer = layer_with((torch.ones(()), torch.ones(())), device)
    metadata: Any = target.cls.make_builder(spec, device).build(batch)
    returned = impl.forward(layer, query, *new, cache, metadata)
    output = returned[0] if isinstance(returned, tuple) else returned
    require(
        isinstance(output, torch.Tensor) and output.shape == query.shape,
        f"forward should return an output of shape {tuple(query.shape)}",
    )
    return _compare(draw, scale, (query, keys, values), output)


def _placed(
    draw: Case, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor | None, AttentionBatch, tuple[torch.Tensor, torch.Tensor]]:
    """A cache with the keys from before the step, the batch, and the new keys and values."""
    spec, device, block_size = draw.spec, keys.device, draw.spec.block_size
    lens, positions = (draw.query_lens, draw.seq_lens), None
    if draw.positions is not None:
        offset, step, lengths = draw.positions
        positions = KeyPositions.create(lengths, offset=offset, step=step)
    if block_size is None:
        key_lens = None if draw.query_lens == draw.seq_lens else draw.seq_lens
        batch = AttentionBatch.create(
            *lens, device=device, key_lens=key_lens, key_positions=positions
        )
        return None, batch, (keys, values)
    needed = [-(-n // block_size) for n in draw.seq_lens]
    source = torch.Generator().manual_seed(draw.seed)
    blocks = torch.randperm(sum(needed), generator=source).int().split(needed)
    table = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
    query_lens, seq_lens = (torch.tensor(each, dtype=torch.int32) for each in lens)
    slots = slots_of(seq_lens, seq_lens, table, block_size).to(device)
    new_slots = slots_of(query_lens, seq_lens, table, block_size).to(device)
    new = torch.isin(slots, new_slots)
    shape = kv_cache_shape(sum(needed), block_size, spec.num_kv_heads, spec.head_size)
    order = STRIDE_ORDERS[spec.kv_cache_layout or "NHD"]
    cache = allocate_kv_cache(shape, order, spec.dtype, device).fill_(math.nan)
    old = slots[~new]
    for index, tensor in enumerate((keys, values)):
        cache[old // block_size, index, old % block_size] = tensor[~new]
    batch = AttentionBatch.create(
        *lens,
        block_table=table.to(device),
        slot_mapping=new_slots,
        key_positions=positions,
        device=device,
    )
    return cache, batch, (keys[new], values[new])


def _compare(
    draw: Case, scale: float, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> ErrorBound:
    """Compare each row with the oracle; PyTorch's own error is that of all requests."""
    spec = draw.spec
    query, keys, values = inputs
    outputs = zip(
        query.split(list(draw.query_lens)), output.split(list(draw.query_lens)), strict=True
    )
    tensors = zip(keys.split(list(draw.seq_lens)), values.split(list(draw.seq_lens)), strict=True)
    own, found = 0.0, []
    offset, step, lengths = draw.positions or (0, 1, draw.seq_lens)
    for length, (queries, actual), (key, value) in zip(lengths, outputs, tensors, strict=True):
        seen = oracle.sees(
            oracle.positions_of(len(queries), length, query.device),
            len(key),
            causal=spec.causal,
            window=spec.sliding_window,
            sides=spec.window_size,
            chunk=spec.attention_chunk,
            key_positions=offset + step * torch.arange(len(key), device=query.device),
        )
        call: dict[str, Any] = {"scale": scale, "seen": seen}
        expected, _ = oracle.attention_of_request(queries, key, value, **call)
        pytorch = oracle.sdpa_of_request(queries, key, value, **call)
        found.append(row_errors(actual.double(), expected, cancelled=0.0))
        own = max(own, float(row_errors(pytorch.double(), expected, cancelled=0.0).max()))
    allowed = allowance(spec.dtype, min(own, _MOST_EPS * torch.finfo(spec.dtype).eps))
    for request, errors in enumerate(found):
        wrong = (errors > allowed).any(1)
        if bool(wrong.any()):
            bound = ErrorBound(float(errors.max()), allowed)
            raise CheckFailed(
                f"{int(wrong.sum())} of {len(wrong)} rows of request {request} are wrong, the "
                f"first is token {int(wrong.nonzero()[0])}: off by {bound.error:.3g} of a row's "
                f"largest value; {allowed:.3g} is allowed. {draw}",
                bound,
            )
    return ErrorBound(max(float(errors.max()) for errors in found), allowed)
