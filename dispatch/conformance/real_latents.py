"""Checks of latent attention at the sizes of real models, drawn at random, row by row.

As real_sizes.py, for backends that attend over a cache of latents: decodes, drafts of up to 16
tokens and chunks of prompts over thousands of keys, 1 to 128 heads, windows of any size.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from attn_dispatch.conformance import oracle
from attn_dispatch.conformance.cases import Case, query_size
from attn_dispatch.conformance.check import BackendUnderTest, Check, skip
from attn_dispatch.conformance.kv_encoding import layer_with, nan_cache
from attn_dispatch.conformance.latents import absorbed_by_pytorch, expanded
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
from attn_dispatch.interface.spec import MLADims

__all__ = ["draws_of_latents", "judge_latents", "real_latents"]

#: DeepSeek-V3's sizes and GLM-4.7-Flash's, and MiniCPM3's.
_DIMS = tuple(
    MLADims(kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=size_v)
    for rank, nope, rope, size_v in ((512, 128, 64, 128), (512, 192, 64, 256), (256, 64, 32, 64))
)
_HEADS = (1, 16, 20, 32, 64, 128)
_WINDOWS = (17, 127, 257, 1000, 2049)
_BLOCK_SIZES = (64, 16, 32, 1)
#: Most keys of a request, and the heads that are compared with the oracle: some of many.
LONGEST, _COMPARED = 6000, 8
#: The standard deviation of the scores, and PyTorch's own error that counts; see real_sizes.py.
_SPREAD, _MOST_EPS = 2.0, 4
#: Kinds of batches: the number of requests, and the new tokens of one with this many keys.
_KINDS: tuple[tuple[int, Callable[[random.Random, int], int]], ...] = (
    (6, lambda _, seq: 1),
    (5, lambda source, seq: min(seq, source.randint(1, 16))),
    (3, lambda source, seq: source.choice((1, 4, max(1, seq // 20)))),
    (6, lambda _, seq: 1),
)


def real_latents(target: BackendUnderTest) -> Iterator[Check]:
    """Each of the sizes that is declared, with each number of heads."""
    shows = "Long requests give the oracle's result, in each row."
    for mla, heads in itertools.product(_DIMS, _HEADS):
        found = draws_of_latents(target, mla, heads)
        if found:
            sizes = f"{mla.kv_lora_rank}+{mla.qk_rope_head_dim}, {mla.v_head_dim}"
            test = partial(_agree, target, mla, heads)
            yield Check(f"{sizes}, heads={heads}", shows, found[0].spec, test)


def draws_of_latents(
    target: BackendUnderTest, mla: MLADims, heads: int, *, longest: int = LONGEST
) -> list[Case]:
    """Batches of layers that the backend declares, the same ones each time.

    Args:
        target: the backend.
        mla: the sizes.
        heads: query heads.
        longest: most keys of a request.

    Returns:
        One for each kind of batch; none if no layer of these sizes is declared.
    """
    source = random.Random(f"{mla} {heads}")
    found = []
    for index, (count, new_tokens) in enumerate(_KINDS[: 2 if target.quick else None]):
        lens = [source.randint(longest // 2, longest)]
        lens += [source.randint(4, longest) for _ in range(count - 1)]
        new = tuple(new_tokens(source, seq) for seq in lens)
        windows = [{"sliding_window": source.choice(_WINDOWS)}, {}] if index % 2 else [{}]
        blocks = [*_BLOCK_SIZES]
        source.shuffle(blocks)
        dtypes = [torch.bfloat16, torch.float16][:: 1 if index % 2 else -1]
        for own, dtype, block in itertools.product(
            windows, (*dtypes, target.base.dtype), (*blocks, target.base.block_size)
        ):
            size = mla.kv_lora_rank + mla.qk_rope_head_dim
            fields = {"mla": mla, "head_size": size, "head_size_v": mla.kv_lora_rank, **own}
            spec = target.base.replace(
                num_heads=heads, dtype=dtype, block_size=block, kv_cache_dtype="auto", **fields
            )
            if target.accepts(spec):
                seed = source.getrandbits(32)
                found.append(Case(spec=spec, query_lens=new, seq_lens=tuple(lens), seed=seed))
                break
    return found


def _agree(target: BackendUnderTest, mla: MLADims, heads: int) -> ErrorBound:
    chosen = draws_of_latents(target, mla, heads)
    try:
        return worst_of(judge_latents(target, draw) for draw in chosen)
    except (BackendFailure, UnsupportedError) as error:
        if draws_of_latents(target, mla, heads) == chosen:
            raise
        skip(f"not possible on this machine: {error}")  # a library turned out to be broken


def judge_latents(target: BackendUnderTest, draw: Case) -> ErrorBound:
    """Run the backend on a draw, and compare each row of some heads with the oracle.

    Raises:
        CheckFailed: a row is further off than is allowed; the message counts such rows.
    """
    spec, device = draw.spec, target.device
    mla, block_size = spec.mla, spec.block_size
    assert mla is not None
    assert block_size is not None
    source = torch.Generator(device).manual_seed(draw.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, device=device)

    query = normal(sum(draw.query_lens), spec.num_heads, query_size(spec)).to(spec.dtype)
    entries = normal(sum(draw.seq_lens), spec.head_size).to(spec.dtype)
    rows = spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    weight = (normal(rows, mla.kv_lora_rank) * mla.kv_lora_rank**-0.5).to(spec.dtype)

    needed = [-(-seq // block_size) for seq in draw.seq_lens]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(draw.seed))
    table = torch.nn.utils.rnn.pad_sequence([*order.int().split(needed)], batch_first=True)
    query_lens, seq_lens = (
        torch.tensor(lens, dtype=torch.int32) for lens in (draw.query_lens, draw.seq_lens)
    )
    slots = slots_of(seq_lens, seq_lens, table, block_size).to(device)
    new_slots = slots_of(query_lens, seq_lens, table, block_size).to(device)
    is_new = torch.isin(slots, new_slots)
    cache = nan_cache((sum(needed), block_size, spec.head_size), None, spec.dtype, device)
    cache.flatten(0, 1)[slots[~is_new]] = entries[~is_new]
    batch = AttentionBatch.create(
        draw.query_lens,
        draw.seq_lens,
        block_table=table.to(device),
        slot_mapping=new_slots,
        max_decode_query_len=max(draw.query_lens) if max(draw.query_lens) <= 16 else 1,
        device=device,
    )
    scale = _SPREAD * query_size(spec) ** -0.5
    impl = target.cls.make_impl(spec, scale=scale, mla=mla, kv_b_proj=weight)
    layer = layer_with((torch.ones(()), torch.ones(())), device)
    metadata: Any = target.cls.make_builder(spec, device).build(batch)
    latents, rotated = entries[is_new].split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
    returned: Any = impl.forward(layer, query, latents, rotated, cache, metadata)
    output: Any = returned[0] if isinstance(returned, tuple) else returned
    shape = (len(query), spec.num_heads, mla.v_head_dim)
    require(
        isinstance(output, torch.Tensor) and output.shape == shape,
        f"forward should return an output of shape {shape}",
    )
    return _compare(draw, scale, (query, entries, weight), output)


def _compare(
    draw: Case, scale: float, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> ErrorBound:
    """Compare each row with the oracle; PyTorch's own error is that of all requests."""
    spec, mla = draw.spec, draw.spec.mla
    assert mla is not None
    query, entries, weight = inputs
    # The first and the last heads: those at the edges of tiles.
    count = min(spec.num_heads, _COMPARED)
    heads = [*range(count // 2), *range(spec.num_heads - (count - count // 2), spec.num_heads)]
    own_weight = weight.unflatten(0, (spec.num_heads, -1))[heads].flatten(0, 1)
    query, output = query[:, heads], output[:, heads]
    lens = [*draw.query_lens]
    parts = zip(query.split(lens), output.split(lens), entries.split([*draw.seq_lens]), strict=True)
    largest, found = 0.0, []
    for queries, actual, own in parts:
        positions = oracle.positions_of(len(queries), len(own), query.device)
        window = spec.sliding_window
        seen = oracle.sees(positions, len(own), causal=spec.causal, window=window)
        call: dict[str, Any] = {"scale": scale, "seen": seen}
        keys, values = expanded(own.double(), own_weight, mla)
        expected, _ = oracle.attention_of_request(queries.double(), keys, values, **call)
        pytorch = absorbed_by_pytorch(queries, own, own_weight, mla, **call)
        found.append(row_errors(actual.double(), expected, cancelled=0.0))
        largest = max(largest, float(row_errors(pytorch.double(), expected, cancelled=0.0).max()))
    allowed = allowance(spec.dtype, min(largest, _MOST_EPS * torch.finfo(spec.dtype).eps))
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
