"""The kernels that merge parts of attention, interpreted on a CPU, against PyTorch's operators."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from attn_dispatch import merge_states, merge_states_distributed
from attn_dispatch.backends.triton.merge import MergeKernels, merge_kernels
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.distributed.merge import merge_over_ranks
from attn_dispatch.runtime.functional import merge_into, merge_parts
from support.ranks import run_on_ranks

pytest.importorskip("triton")
# Of empty rows, in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 6


@pytest.fixture
def kernels(monkeypatch):
    """Launches of the kernels, which run on any device."""
    launched = []

    def counted(method):
        def run(self, *arguments):
            launched.append(method.__name__)
            return method(self, *arguments)

        return run

    monkeypatch.setattr(MergeKernels, "_runs_on", staticmethod(lambda tensor: True))
    monkeypatch.setattr(MergeKernels, "_merge", counted(MergeKernels._merge))
    monkeypatch.setattr(MergeKernels, "_pack", counted(MergeKernels._pack))
    yield launched
    assert not merge_kernels._is_broken


def parts_of(number, tokens, size, dtype=torch.float32, seed=0):
    """Parts with rows that are empty, and hold NaN then, in some of them or in all."""
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn(number, tokens, HEADS, size, generator=generator)
    lses = 3 * torch.randn(number, tokens, HEADS, generator=generator)
    if tokens:
        lses[:, 0] = -math.inf
        lses[0, -1, :2] = -math.inf
        lses[-1, -1, 2] = math.inf  # FlashAttention 2's mark of an empty row
        lses[:, -1, 3] += 400  # exp() of it is not finite
    outs[lses.isinf()] = math.nan
    return outs.to(DEVICE, dtype), lses.to(DEVICE)


def expected_of(outs, lses, sinks=None):
    return merge_states(
        outs.double().unbind(0), lses.double().unbind(0), None if sinks is None else sinks.double()
    )


def check(found, expected, atol=5e-6):
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each.double(), wanted.double(), rtol=1e-6, atol=atol)


@pytest.mark.parametrize(("number", "size"), [(1, 16), (2, 24), (3, 128), (4, 8), (2, 512)])
def test_any_number_of_parts(number, size, kernels):
    outs, lses = parts_of(number, 5, size)
    sinks = torch.randn(HEADS, device=DEVICE)
    for given in (None, sinks):
        expected = expected_of(outs, lses, given)
        check(merge_states(outs.unbind(0), lses.unbind(0), given), expected)
        rest = (outs[1:], lses[1:])
        check(merge_parts((outs[0], lses[0]), rest, given), expected)
    assert kernels == ["_merge"] * 4


def test_dtypes_strides_and_no_tokens(kernels):
    wide = torch.full((3, HEADS, 40), 7.0, dtype=torch.float16, device=DEVICE)
    into = wide[:, :, 8:24]
    outs, lses = parts_of(3, 3, 16, torch.float16)
    strided = torch.empty(3, HEADS, 3, 16, dtype=torch.float16, device=DEVICE).transpose(1, 2)
    strided.copy_(outs)
    rest = (strided[1:], lses[1:])
    merged, lse = merge_parts((strided[0], lses[0]), rest, None, into)
    assert merged is into
    check((merged, lse), expected_of(outs, lses), atol=2e-3)
    assert (wide[:, :, :8] == 7).all()
    assert (wide[:, :, 24:] == 7).all()
    outs, lses = parts_of(2, 0, 16)
    merged, lse = merge_states(outs.unbind(0), lses.unbind(0))
    assert (merged.shape, lse.shape) == ((0, HEADS, 16), (0, HEADS))
    assert kernels == ["_merge"] * 2


@pytest.mark.parametrize("by_kernel", [True, False])
def test_heads_of_groups_elsewhere(by_kernel, kernels):
    """Parts as (tokens, group, KV heads, size), read as (tokens, KV heads, group, size)."""
    outs, lses = parts_of(3, 5, 16)
    sinks = torch.randn(HEADS, device=DEVICE)
    packed = outs.unflatten(2, (2, 3)).transpose(2, 3).contiguous().transpose(2, 3)
    packed_lses = lses.unflatten(2, (2, 3)).transpose(2, 3).contiguous().transpose(2, 3)
    if not by_kernel:
        packed = packed.double()
    first, rest = (packed[0], packed_lses[0]), (packed[1:], packed_lses[1:])
    found = merge_parts(first, rest, sinks)
    assert found[0].shape == outs[0].shape
    check(found, expected_of(outs, lses, sinks))
    assert kernels == ["_merge"] * by_kernel


def test_a_nan_stays_in_its_row(kernels):
    outs, lses = parts_of(2, 4, 16)
    outs[0, 1, 0, 3] = math.nan
    lses[1, 2, 4] = math.nan
    merged, lse = merge_states(outs.unbind(0), lses.unbind(0))
    is_nan = torch.zeros_like(merged, dtype=torch.bool)
    is_nan[1, 0, 3] = True
    is_nan[2, 4] = True
    assert torch.equal(merged.isnan(), is_nan)
    assert lse.isnan().nonzero().tolist() == [[2, 4]]


def test_a_part_is_merged_in_place(kernels):
    outs, lses = parts_of(2, 7, 32)
    merged, lse = outs[0].clone(), lses[0].clone()
    merge_into(merged[1:6], lse[1:6], outs[1, 1:6].half(), lses[1, 1:6])
    wanted = expected_of(torch.stack([outs[0], outs[1].half().float()]), lses)
    check((merged[1:6], lse[1:6]), (wanted[0][1:6], wanted[1][1:6]))
    for row in (0, 6):  # the others are as before
        assert torch.equal(merged[row].nan_to_num(), outs[0, row].nan_to_num())
        assert torch.equal(lse[row], lses[0, row])
    assert kernels == ["_merge"]


def test_what_the_kernels_do_not_take_is_merged_by_operators(kernels):
    outs, lses = parts_of(2, 3, 8)
    check(merge_states(outs.double().unbind(0), lses.unbind(0)), expected_of(outs, lses))
    outs.requires_grad_()
    merge_states(outs.unbind(0), lses.unbind(0))[0].nansum().backward()
    assert outs.grad is not None
    assert kernels == []


def test_a_kernel_that_fails_is_replaced(monkeypatch, caplog):
    broken = MergeKernels()
    monkeypatch.setattr(broken, "_runs_on", lambda tensor: True)
    monkeypatch.setattr(broken, "_kernels", lambda: 1 // 0)
    monkeypatch.setattr("attn_dispatch.runtime.functional.merge_kernels", broken)
    outs, lses = parts_of(2, 3, 8)
    for _ in range(2):
        check(merge_states(outs.unbind(0), lses.unbind(0)), expected_of(outs, lses))
    assert [each.levelname for each in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_messages(pieces, kernels):
    (out,), (lse,) = parts_of(1, 5, 24)
    message = torch.full((pieces, 4 + 5 * HEADS // pieces * 25), 9.0, device=DEVICE)
    outs, lses = message[:, 4:].split([5 * HEADS // pieces * 24, 5 * HEADS // pieces], dim=1)
    shape = (pieces, 5, HEADS // pieces)
    flags = message[:, 0]
    for failed in (False, True):
        assert merge_kernels.pack(out, lse, outs.view(*shape, 24), lses.view(shape), flags, failed)
        assert flags.tolist() == [failed] * pieces
        for piece, heads in enumerate(torch.arange(HEADS).chunk(pieces)):
            packed = outs.view(*shape, 24)[piece]
            assert torch.equal(packed.nan_to_num(), out[:, heads].nan_to_num())
            wanted = torch.full((5, len(heads)), math.nan) if failed else lse[:, heads].cpu()
            torch.testing.assert_close(
                lses.view(shape)[piece].cpu(), wanted, rtol=0, atol=0, equal_nan=True
            )


def check_ranks(rank, world):
    """Messages that the kernels pack and merge, between processes."""
    MergeKernels._runs_on = staticmethod(lambda tensor: True)
    outs, lses = parts_of(world, 3, 8, seed=5)
    sinks = torch.randn(HEADS, generator=torch.Generator().manual_seed(1))
    wrong = []
    for heads, given in itertools.product(("scatter", "replicate"), (None, sinks)):
        own = slice(None)
        if heads == "scatter":
            own = slice(rank * HEADS // world, (rank + 1) * HEADS // world)
        own_sinks = None if given is None else given[own]
        wanted = expected_of(outs[:, :, own], lses[:, :, own], own_sinks)
        into = torch.empty_like(wanted[0], dtype=torch.float32)
        arguments = (Ranks(), outs[rank], lses[rank], own_sinks, heads, "a2a")
        merged, lse = merge_over_ranks(*arguments, into=into)
        assert merged is into
        found = merge_states_distributed(*arguments[1:3], sinks=own_sinks, heads=heads)
        try:
            check((merged, lse), wanted)
            check(found, wanted)
        except AssertionError as error:
            wrong.append((heads, str(error)))
    if merge_kernels._is_broken:
        wrong.append("the kernels failed")
    return wrong


@pytest.mark.skipif(DEVICE == "cuda", reason="test_split_steps runs them over NCCL")
def test_ranks_exchange_what_the_kernels_pack():
    assert run_on_ranks(2, check_ranks) == [[], []]
