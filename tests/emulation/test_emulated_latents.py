"""TRITON_MLA on emulated AMD GPUs, with requests that are split over programs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch import MLADims
from attn_dispatch.backends.triton.mla import TritonMLABackend
from attn_dispatch.backends.triton.plan import Launches
from attn_dispatch.conformance import checks_for, run
from attn_dispatch.conformance.emulated import EmulatedDevice
from support.compiling import needs_compiler
from support.mla_cases import MLAStep

pytestmark = [pytest.mark.emulated, needs_compiler]


WIDE = (512, 64, {"heads": 40, "dtype": torch.bfloat16, "returns_lse": True})
NARROW = (256, 32, {"heads": 16, "dtype": torch.float16, "kv_cache_dtype": "fp8"})


@pytest.mark.parametrize(
    ("arch", "rank", "rope", "fields"),
    [
        *((arch, *WIDE) for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")),
        # On gfx950 fp8 is transposed by an instruction that the emulator does not know.
        *((arch, *NARROW) for arch in ("gfx942", "gfx1100")),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_latents_on_an_emulated_gpu(arch, rank, rope, fields):
    dims = MLADims(kv_lora_rank=rank, qk_nope_head_dim=16, qk_rope_head_dim=rope, v_head_dim=16)
    step = MLAStep(
        (1, 2, 0), (200, 20, 0), padding=1, dims=dims, backend=TritonMLABackend, block_size=16,
        **fields,
    )  # fmt: skip
    device = EmulatedDevice.named(arch)
    builder = step.builder()
    launches = Launches.of(step.spec, device.profile)
    # Tiles so few that the longest request is split into more parts than a group has.
    latents = {
        size: {rows: dataclasses.replace(row, min_tiles=1) for rows, row in by_rows.items()}
        for size, by_rows in launches.table.latents.items()
    }
    table = dataclasses.replace(launches.table, latents=latents)
    builder.launches = dataclasses.replace(launches, table=table, num_sms=24)
    with torch.inference_mode(), device.running() as emulation:
        returned = step.run(metadata=builder.build(step.batch))
    output = returned[0] if step.spec.returns_lse else returned
    step.check(output, step.expected()[0])
    assert emulation.launches[-1].kernel == "decode_kernel"
    assert "atomic_add" in " ".join(emulation.launches[-1].counts.instructions)


def test_verify_on_an_emulated_gpu():
    device = EmulatedDevice.named("gfx942")
    checks = checks_for(TritonMLABackend, quick=True, emulate=device)
    (plain,) = (check for check in checks if check.full_name == "numbers/plain")
    outcome = run(plain)
    assert (outcome.status, outcome.message) == ("passed", "")
    assert device.launches >= 2  # the cache is written, and attention computed
    captured = {run(check).status for check in checks if "capture" in check.name}
    assert captured == {"skipped"}  # and reported
