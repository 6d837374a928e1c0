"""What benchmarks/amd_counts.py counts, and the estimate that it makes of it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections import Counter

import pytest

pytest.importorskip("triton", minversion="3.6")
pytest.importorskip("numpy")

from attn_dispatch.backends.triton.configs import amd
from attn_dispatch.backends.triton.launch_config import DecodeLaunch, PrefillLaunch
from attn_dispatch.emulation.launch import LaunchReport
from attn_dispatch.emulation.machine import LaunchCounts
from support.compiling import needs_compiler, only_where_interpreted, passed_where_compiled
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
counts = importlib.import_module("amd_counts")

PREFILL = PrefillLaunch(64, 32, 4, 1)
DECODE = DecodeLaunch(32, 2, 2, 4, min_tiles=8)


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("v_mfma_f32_32x32x8_bf16", "matrix"),
        ("v_wmma_f32_16x16x16_f16", "matrix"),
        ("v_exp_f32", "slow"),
        ("v_s_exp_f32", "slow"),
        ("v_mul_lo_u32", "slow"),
        ("v_mad_co_u64_u32", "slow"),
        ("v_mul_f32", "vector"),
        ("v_dual_mul_f32", "vector"),
        ("ds_read_b128", "lds"),
        ("buffer_load_dwordx4", "memory"),
        ("scratch_store_b32", "memory"),
        ("s_waitcnt", "wait"),
        ("s_and_b64", "scalar"),
    ],
)
def test_class_of_an_instruction(opcode, kind):
    assert counts.class_of(opcode) == kind


@pytest.mark.parametrize(
    ("opcode", "flops", "factors"),
    [
        ("v_mfma_f32_32x32x8bf16_1k", 16384, "16"),
        ("v_mfma_f32_16x16x16_f16", 8192, "16"),
        ("v_mfma_f32_16x16x4_f32", 2048, "f32"),
        ("v_mfma_f32_4x4x4_16b_f16", 2048, "16"),
        ("v_wmma_f32_16x16x16_bf16", 8192, "16"),
        ("v_wmma_f32_16x16x16_fp8_bf8", 8192, "8"),
    ],
)
def test_flops_of_a_matrix_instruction(opcode, flops, factors):
    assert counts.flops_of(opcode) == (flops, factors)


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("global_load_dwordx4", 16),
        ("buffer_store_b64", 8),
        ("scratch_load_b32", 4),
        ("buffer_load_ushort", 2),
        ("global_load_u8", 1),
        ("buffer_wbl2", 0),
    ],
)
def test_bytes_of_a_lane(opcode, size):
    assert counts.bytes_of(opcode) == size


def measurement(arch, executed, waves, **bytes_moved):
    launched = LaunchCounts(instructions=Counter(executed), **bytes_moved)
    report = LaunchReport("prefill_kernel", arch, (1, 1, 1), 4, 128, 0, 0, 0, launched, 1.0)
    return counts.Measurement(PREFILL, report, 1000, 10_000, waves)


def test_cycles_of_cdna():
    executed = {
        "v_add_f32": 100,
        "v_exp_f32": 10,
        "v_mfma_f32_32x32x8_bf16": 8,
        "s_add_i32": 30,
        "global_load_dwordx4": 2,
        "global_load_dword": 1,
    }
    found = measurement("gfx942", executed, 2.0, lds_bytes_read=1280, lds_bytes_written=128)
    # 8 * 16384 FLOPs at 512 a cycle; 64 lanes of 16 bytes at 64 a cycle; 64 addresses at 16.
    assert found.cycles() == {
        "vector": (100 * 4 + 10 * 16) / 4, "matrix": 256 / 4, "scalar": 30, "LDS": 11,
        "memory": 2 * 16 + 4,
    }  # fmt: skip
    assert found.estimate == 140 + (64 + 30 + 11 + 36) / 2
    # One wave hides nothing; with half a wave for each SIMD, two of four are idle.
    assert dataclasses.replace(found, waves=1.0).estimate == 140 + 64 + 30 + 11 + 36
    assert dataclasses.replace(found, waves=0.5).cycles()["vector"] == 280
    assert found.matrix_flops == 8 * 16384


def test_cycles_of_rdna():
    executed = {"v_dual_add_f32": 40, "v_wmma_f32_16x16x16_bf16": 2, "v_exp_f32": 5, "s_nop": 8}
    found = measurement("gfx1100", executed, 4.0, scratch_bytes_read=64)
    # Matrix instructions take the place of vector ones.
    assert found.cycles()["vector"] == (20 + 2 * 32 + 5 * 4) / 4
    assert "matrix" not in found.cycles()
    assert found.cycles()["scalar"] == 2
    assert found.scratch_bytes == 64


def test_rows_are_read_as_they_are_shown():
    usual = dataclasses.replace(PREFILL, options={"waves_per_eu": 4})
    row = counts.parsed_row("16,32,8,1,waves_per_eu=2", PrefillLaunch, usual)
    assert row == PrefillLaunch(16, 32, 8, 1, options={"waves_per_eu": 2})
    assert counts.shown_row(row) == "16,32,8,1,waves_per_eu=2"
    assert counts.parsed_row("16,32,8,1", PrefillLaunch, usual).options == {}
    decode = counts.parsed_row("16,1,2,8,max_rows=16", DecodeLaunch, DECODE)
    assert decode == DecodeLaunch(16, 1, 2, 8, min_tiles=8, max_rows=16)
    assert counts.parsed_row(counts.shown_row(decode), DecodeLaunch, DECODE) == decode
    with pytest.raises(SystemExit, match="waves_per_eu"):
        counts.parsed_row("16,1,2,8,waves_per_eu=2", DecodeLaunch, DECODE)


def test_programs_limit_waves():
    def waves(registers, programs_per_sm, arch="gfx942"):
        report = LaunchReport("", arch, (1, 1, 1), 2, registers, 0, 8192, 0, LaunchCounts(), 1.0)
        return counts.waves_on_a_simd(report, DecodeLaunch(32, 2, 2, programs_per_sm))

    assert waves(128, 8) == 4  # as many as registers allow
    assert waves(128, 1) == 0.5  # half of the SIMDs have none
    assert waves(128, 1, "gfx1100") == 1  # a pair of CUs has two programs


@only_where_interpreted
def test_in_a_process_that_compiles():
    assert passed_where_compiled(__file__) >= 1


@needs_compiler
def test_a_step_is_counted(capsys):
    lens = ("--query-lens", "20", "--seq-lens", "20", "--head-size", "64")
    assert counts.main(["gfx942", *lens, "--rows", "128,64,4,1", "128,32,4,1"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    table, large, small = (dict(zip(lines[0], line, strict=True)) for line in lines[2:5])
    assert table["row"] == counts.shown_row(amd.CDNA3.prefill[64])
    assert (large["row"], small["row"]) == ("128,64,4,1", "128,32,4,1")
    assert table["of the first"] == "1.00"
    # For 20 keys, a tile of 64 multiplies twice as many as a tile of 32.
    flops = [float(row["matrix FLOPs/useful"]) for row in (large, small)]
    assert flops[0] == pytest.approx(2 * flops[1], rel=0.01)
    assert flops[1] > 1
    assert "no time" in lines[-1][0]
