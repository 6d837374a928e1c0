"""Steps split over ranks, as the benchmark measures them: over gloo, and over NCCL on two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from attn_dispatch import ring_attention, zigzag_rows
from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.split_steps import SplitStep, aligned_clock, measure_on_ranks, pace_us
from attn_dispatch.conformance.oracle import attention_of_request, sees
from attn_dispatch.distributed.collectives import Ranks
from attn_dispatch.distributed.merge import merge_over_ranks
from attn_dispatch.errors import InvalidInputError
from support.paths import ROOT
from support.ranks import run_on_ranks

NCCL = pytest.param(
    "nccl",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    ],
)

SIZES = {"num_heads": 8, "num_kv_heads": 2, "head_size": 64}
LATENTS = {"num_heads": 16, "num_kv_heads": 1, "head_size": 576, "mla": (512, 128, 64, 128)}
#: Lengths, and fields of a case.
STEPS = {
    "decode": ((1,) * 5, (130, 1, 2, 77, 1000), SIZES),
    "window, cap, sinks": ((1,) * 3, (130, 1, 77), SIZES | {
        "sliding_window": 40, "logits_soft_cap": 20.0, "sinks": True}),
    "verification": ((4, 2, 3), (130, 2, 77), SIZES),
    "latents": ((1,) * 3, (130, 1, 77), LATENTS),
}  # fmt: skip


def device_of(rank):
    return torch.device("cuda", rank) if torch.distributed.get_backend() == "nccl" else "cpu"


def check_steps(rank, world, names):
    device = torch.device(device_of(rank))
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    wrong = []
    for name in names:
        queries, seqs, fields = STEPS[name]
        case = Case(name=name, query_lens=queries, seq_lens=seqs, dtype=dtype, **fields)
        try:
            step = SplitStep(case, device, Ranks())
            assert len(step.check()) == 3
            if device.type == "cuda":
                torch.cuda.synchronize()
                try:
                    torch.cuda.set_sync_debug_mode("error")  # a step never waits for the device
                    for call in step.calls.values():
                        call()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    return wrong


@pytest.mark.parametrize("backend", ["gloo", NCCL])
def test_split_steps_are_exact(backend):
    names = list(STEPS) if backend == "nccl" else ["window, cap, sinks", "latents"]
    assert run_on_ranks(2, check_steps, names, backend=backend) == [[], []]


def check_times(rank, world):
    ranks = Ranks()
    clock = aligned_clock(torch.device("cpu"), ranks)
    case = Case(name="step", query_lens=(1, 1), seq_lens=(9, 30), dtype="float32", **SIZES)
    step = SplitStep(case, torch.device("cpu"), ranks, ("AG_RS",))
    times = measure_on_ranks(step.calls, clock, ranks, rounds=3)
    assert times.keys() == {"ONE_RANK", "AG_RS"}
    assert all(each.timing.calls == 3 and each.host_us > 0 for each in times.values())
    assert pace_us(step.calls["AG_RS"], clock, ranks, 2) > 0
    fp8 = Case(name="x", query_lens=(1,), seq_lens=(9,), kv_cache_dtype="fp8_e4m3", **SIZES)
    with pytest.raises(InvalidInputError, match="own dtype"):
        SplitStep(fp8, torch.device("cpu"), ranks)
    return ranks.gather_objects({name: each.timing.median_us for name, each in times.items()})


def test_all_ranks_have_the_same_times():
    first, second = run_on_ranks(2, check_times)
    assert first == second
    assert first[0] == first[1]


def check_failure_and_ring(rank, world):
    device = device_of(rank)
    out = torch.ones(3, 4, 16, device=device, dtype=torch.bfloat16)
    lse = torch.zeros(3, 4, device=device)
    merged, _ = merge_over_ranks(Ranks(), out, lse, None, "scatter", "a2a", failed=rank == 1)
    assert merged.isnan().all()
    lengths = [300, 41]
    random = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(341, heads, 64, generator=random, device=device, dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    )
    rows = zigzag_rows(lengths, rank, world).to(device)
    found = ring_attention(query[rows], key[rows], value[rows], lengths)
    wanted = [
        attention_of_request(
            *(each[start:end] for each in (query, key, value)),
            scale=0.125,
            seen=sees(torch.arange(end - start, device=device), end - start, causal=True),
        )[0]
        for start, end in ((0, 300), (300, 341))
    ]
    return float((found.double() - torch.cat(wanted)[rows]).abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_failure_and_ring():
    assert max(run_on_ranks(2, check_failure_and_ring, backend="nccl")) < 0.03


def test_the_benchmark_runs(tmp_path):
    path = tmp_path / "results.json"
    environment = os.environ | {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "99", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0", "ATTN_DISPATCH_TUNING": "off",
    }  # fmt: skip
    script = str(ROOT / "benchmarks" / "context_parallel.py")
    done = subprocess.run(
        [sys.executable, script, "--tiny", "--rounds", "3", "--json", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())["results"]
    assert {each["part"] for each in results} == {"collectives", "decode", "ring", "cascade"}
