"""merge_states_distributed, in processes over gloo, against merge_states of all parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from attn_dispatch import (
    BackendFailure,
    ContextParallel,
    InvalidInputError,
    merge_states,
    merge_states_distributed,
)
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.distributed.merge import merge_over_ranks
from support.ranks import run_on_ranks


def parts_of_ranks(world, tokens, dtype, lse_dtype):
    generator = torch.Generator().manual_seed(3)
    out = torch.randn(world, tokens, 4, 6, generator=generator, dtype=torch.float64)
    lse = 3 * torch.randn(world, tokens, 4, generator=generator, dtype=torch.float64)
    lse[:, :1] = -math.inf  # no rank has a key for the first token, rank 0 none for the second
    lse[:1, :2] = -math.inf
    out[lse == -math.inf] = math.nan  # ignored
    sinks = torch.randn(4, generator=generator)
    return out.to(dtype), lse.to(lse_dtype), sinks


def check_results(rank, world):
    wrong = []
    for tokens, dtype, lse_dtype in (
        (5, torch.float64, torch.float64),
        (3, torch.bfloat16, torch.float32),
        (3, torch.float32, torch.float32),
        (0, torch.float16, torch.float32),
    ):
        outs, lses, sinks = parts_of_ranks(world, tokens, dtype, lse_dtype)
        for with_sinks in (False, True):
            for heads, own in (
                ("replicate", slice(None)),
                ("scatter", slice(rank * 4 // world, (rank + 1) * 4 // world)),
            ):
                own_sinks = sinks[own] if with_sinks else None
                wanted = merge_states(
                    outs[:, :, own].double().unbind(0), lses[:, :, own].unbind(0), own_sinks
                )
                for combine in ("auto", "a2a", "ag_rs"):
                    found = [
                        merge_states_distributed(
                            outs[rank],
                            lses[rank],
                            sinks=own_sinks,
                            heads=heads,
                            combine=combine,
                        )
                        for _ in range(2)
                    ]
                    what = (tokens, dtype, with_sinks, heads, combine)
                    for first, again, expected in zip(*found, wanted, strict=True):
                        atol = 1e-2 if dtype == torch.bfloat16 else 1e-5
                        same = torch.equal(first, again)
                        if not same or not torch.allclose(
                            first.double(), expected.double(), rtol=0, atol=atol
                        ):
                            wrong.append((what, same, first, expected))
                    if found[0][0].dtype != dtype or found[0][1].dtype != lse_dtype:
                        wrong.append((what, found[0][0].dtype, found[0][1].dtype))
    return wrong


def check_failures(rank, world):
    """A failed rank is reported on the others; wrong arguments are rejected before a message."""
    outs, lses, sinks = parts_of_ranks(world, 2, torch.float32, torch.float32)
    out, lse = outs[rank], lses[rank]
    for combine in ("a2a", "ag_rs"):
        for heads in ("scatter", "replicate"):
            arguments = (Ranks(), out, lse, None, heads, combine)
            if rank == 1:
                assert merge_over_ranks(*arguments, failed=True)[0].isnan().any()
            else:
                with pytest.raises(BackendFailure, match="failed on rank 1"):
                    merge_over_ranks(*arguments)
    for wrong, text in (
        ({"heads": "all"}, "heads='all'"),
        ({"combine": "ring"}, "combine='ring'"),
        ({"sinks": sinks}, "sinks"),
        ({"group": 3}, "group is a int"),
    ):
        with pytest.raises(InvalidInputError, match=text):
            merge_states_distributed(out, lse, **wrong)
    with pytest.raises(InvalidInputError, match="lse"):
        merge_states_distributed(out, lse[:1])
    with pytest.raises(InvalidInputError, match="scattered evenly"):
        merge_states_distributed(out[:, :3], lse[:, :3])
    with pytest.raises(InvalidInputError, match="autograd"):
        merge_states_distributed(out.clone().requires_grad_(), lse)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, world), mesh_dim_names=("tp", "cp"))
    with pytest.raises(InvalidInputError, match="2 dimensions"):
        ContextParallel(mesh)
    merged, _ = merge_states_distributed(out, lse, mesh["cp"])
    alone, _ = merge_states_distributed(out, lse, mesh["tp"])
    assert merged.shape == (2, 4 // world, 6)
    assert alone.shape == out.shape
    assert ContextParallel(mesh["cp"]).size == world
    return []


def check_all(rank, world):
    return check_results(rank, world) + check_failures(rank, world)


@pytest.mark.parametrize("world", [2, 4])
def test_parts_of_ranks_are_merged(world):
    assert run_on_ranks(world, check_all) == [[]] * world


def test_without_a_process_group_nothing_is_merged():
    with pytest.raises(InvalidInputError, match="init_process_group"):
        merge_states_distributed(torch.ones(1, 2, 4), torch.ones(1, 2))
