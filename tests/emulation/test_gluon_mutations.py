"""Wrong kernels for Hopper are noticed by the interpreter, at the latest by their results."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch import MLADims
from attn_dispatch.backends.cuda.hopper import (
    decode,
    epilogue,
    mla_decode,
    mla_parts,
    prefill,
    prefill_schedule,
    tma_ring,
)
from attn_dispatch.backends.cuda.hopper.mla import HopperMLABackend
from attn_dispatch.backends.triton import scratch
from attn_dispatch.emulation import EmulationError
from attn_dispatch.emulation.gluon.interpret import interpreted
from support.gluon_mutations import changed
from support.hopper_cases import interpreted_decodes, interpreted_prefills, step_of
from support.mla_cases import MLAStep

WRONG = "a wrong result"
#: Orders that are tried.
SEEDS = range(4)


def prefills(seed, **fields):
    """A chunk with a past, by two programs, of which one has a second work tile."""
    batch = {"query_lens": (200,), "seq_lens": (600,), "brings_keys": False}
    step = step_of({"head_size": 64, "num_heads": 2, "num_kv_heads": 1} | fields, batch, "cpu")
    returned = interpreted_prefills(step, seed=seed, lateness=seed % 3 / 2, programs=2)
    step.check(returned)


def decodes(seed):
    """Three decodes, in parts, by three programs."""
    batch = {"query_lens": (1,) * 3, "seq_lens": (700, 70, 300), "brings_keys": False}
    step = step_of({"head_size": 64}, batch, "cpu")
    step.check(interpreted_decodes(step, 3, "few", seed=seed, lateness=seed % 3 / 2))


def latents(seed):
    """Two decodes, one in parts."""
    dims = MLADims(kv_lora_rank=512, qk_nope_head_dim=8, qk_rope_head_dim=64, v_head_dim=8)
    fields = {"dims": dims, "heads": 16, "dtype": torch.bfloat16, "block_size": 16}
    step = MLAStep((1, 2), (1200, 50), backend=HopperMLABackend, **fields)
    builder = step.builder()
    builder.launches = dataclasses.replace(builder.launches, num_sms=3)
    metadata = builder.build(step.batch)
    with interpreted(seed=seed, lateness=seed % 3 / 2), torch.inference_mode():
        step.check(step.run(metadata=metadata), step.expected()[0])


def noticed(run, seeds=SEEDS, **fields):
    """How the first order in which a run goes wrong does so; "" if none does."""
    for seed in seeds:
        try:
            run(seed, **fields)
        except EmulationError as error:
            return str(error)
        except AssertionError:
            return WRONG
    return ""


RING, ROWS = tma_ring.TmaRing, prefill._Rows
SCHEDULE = prefill_schedule.Schedule
#: What is wrong: a function, a text in it, the text instead, and how it is noticed, or a part of
#: the message.
PREFILLS = {
    "keys are released before they are multiplied": (
        ROWS.begin_tile,
        "s = warpgroup_mma_wait(0, deps=[s])\n    k_ring.release(stage)",
        "k_ring.release(stage)\n    s = warpgroup_mma_wait(0, deps=[s])",
        WRONG,
    ),
    "values are released before they are multiplied": (
        prefill._attend,
        "acc, tail = rows.wait_output(acc, tail)\n            v_ring.release(before)",
        "v_ring.release(before)\n            acc, tail = rows.wait_output(acc, tail)",
        WRONG,
    ),
    "the pipeline does not wait for the scores": (
        prefill._attend,
        "2 if TAIL_V else 1",
        "2",
        "used before a wait",
    ),
    "a consumer waits for the wrong parity": (
        RING.wait,
        "(n // self.STAGES) & 1)",
        "((n // self.STAGES) & 1) ^ 1)",
        "",
    ),
    "the producer does not wait": (
        RING.wait_empty,
        "((n // self.STAGES) & 1) ^ 1)",
        "(n // self.STAGES) & 1)",
        "",
    ),
    "a tile's bytes are too few": (
        RING.acquire,
        "self.TILE_BYTES",
        "self.TILE_BYTES - 16",
        "More bytes landed than",
    ),
    "a tile's bytes are too many": (
        RING.acquire,
        "self.TILE_BYTES",
        "self.TILE_BYTES + 16",
        "Nothing can go on",
    ),
    "values behind the last key are not hidden": (
        ROWS._hide_boxes,
        "gl.where(is_seen[:, None], values, gl.zeros_like(values))",
        "values",
        WRONG,
    ),
    "hidden values have no fence": (ROWS.hide_values, "fence_async_shared()", "pass", "fence"),
    "a warp group does not wait for the other's hidden values": (
        ROWS.hide_values,
        "mbarrier.wait(self.hidden, turn & 1)",
        "pass",
        "",
    ),
    "the barriers are not fenced": (
        prefill.hopper_prefill_kernel,
        "    fence_async_shared()\n",
        "",
        "initialized without a fence",
    ),
    "the queries are released too early": (
        prefill._consumer,
        "work = schedule.receive(q_stage)\n    while",
        "work = schedule.receive(q_stage)\n    q_ring.release(q_stage)\n    while",
        "",
    ),
    "the ticket is not read again": (SCHEDULE.send, "range(5)", "range(4)", ""),
}


def test_copied_pages_without_a_fence_are_noticed(monkeypatch):
    monkeypatch.setattr(scratch, "MAX_SCRATCH_BYTES", 0)  # so that they are not gathered first
    with changed(RING.fill, "fence_async_shared()", "pass"):
        assert "fence" in noticed(prefills, block_size=8)


DECODES = {
    "weights have no fence": (decode._store_weights, "fence_async_shared()", "pass", "fence"),
    "values are released before they are multiplied": (
        decode._consumer,
        "acc = warpgroup_mma_wait(0, deps=[acc])\n                v_ring.release(before)",
        "v_ring.release(before)\n                acc = warpgroup_mma_wait(0, deps=[acc])",
        WRONG,
    ),
    "a part is not released": (
        epilogue.Parts.store,
        'sem="acq_rel"',
        'sem="acquire"',
        "a release or an acquire is missing",
    ),
    "the parts are not acquired": (
        epilogue.Parts.store,
        'sem="acq_rel"',
        'sem="release"',
        "a release or an acquire is missing",
    ),
    "no barrier before the release": (
        epilogue.Parts.store,
        "    barrier()\n    arrived",
        "    arrived",
        "a release or an acquire is missing",
    ),
    "no barrier after the acquire": (
        epilogue.Parts.store,
        "        barrier()\n        self._merge",
        "        self._merge",
        "a release or an acquire is missing",
    ),
    "unseen values are not zeroed": (
        decode._zero_unseen,
        "gl.where(is_seen[:, None], values, gl.zeros_like(values))",
        "values",
        WRONG,
    ),
}


LATENTS = {
    "weights have no fence": (mla_decode._send_weights, "fence_async_shared()", "pass", "fence"),
    "weights are overwritten while they are read": (
        mla_decode._send_weights,
        "mbarrier.wait(buffers.taken.index(WHICH), (n >> 1) & 1 ^ 1)",
        "pass",
        "",
    ),
    "a tile is released by one warp group twice": (
        mla_decode._Buffers.release,
        "mbarrier.arrive(self.empty.index(n % self.STAGES))",
        "mbarrier.arrive(self.empty.index(n % self.STAGES), count=2)",
        "",
    ),
    "a part is not released": (
        mla_parts.Parts.store,
        'sem="release"',
        'sem="relaxed"',
        "a release or an acquire is missing",
    ),
    "a part does not arrive": (
        mla_parts.Parts.store,
        "self._counter(work, WHICH), 1",
        "self._counter(work, WHICH), 0",
        "a change of the",
    ),
    "the sums of the other warp group are not waited for": (
        mla_decode._consumer,
        "mbarrier.wait(buffers.summed.index(1 - WHICH), unit & 1)",
        "pass",
        WRONG,
    ),
}


FAULTS = {prefills: PREFILLS, decodes: DECODES, latents: LATENTS}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param((run, *fault), id=f"{run.__name__}-{what}")
        for run, faults in FAULTS.items()
        for what, fault in faults.items()
    ],
)
def test_a_wrong_kernel_is_noticed(fault):
    run, function, before, after, how = fault
    with changed(function, before, after):
        message = noticed(run)
    assert message, "unnoticed"
    assert how in message


@pytest.mark.parametrize("run", FAULTS)
def test_the_kernels_as_they_are_go_unnoticed(run):
    assert noticed(run, seeds=(1, 2)) == ""
