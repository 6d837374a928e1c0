"""Launch tables cover every known GPU, and the compile matrix reports problems."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import pickle
import sys
import types

import pytest
import torch

from support.paths import ROOT

pytest.importorskip("triton")

from attn_dispatch.backends.triton.plan import launch_table
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES

GPUS = [d for d in KNOWN_DEVICES.values() if d.vendor in ("nvidia", "amd")]

sys.path.insert(0, str(ROOT / "benchmarks"))
matrix = importlib.import_module("compile_matrix")
cases = importlib.import_module("compile_cases")

CASES = {case.name: case for case in (*cases.SIZES, *cases.FEATURES, *cases.LATENTS)}
HOPPER = {case.name: case for case in cases.HOPPER}


def is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("device", GPUS, ids=lambda d: d.arch)
def test_table_rows_are_ascending_powers_of_two(device):
    table = launch_table(device)
    for rows in (table.decode, table.prefill):
        assert list(rows) == sorted(rows)
        assert max(rows) == 1024  # float32 heads of 512
        assert all(map(is_power_of_two, rows))
    for row in table.decode.values():
        assert all(map(is_power_of_two, (row.block_n, row.num_warps, row.max_rows)))
        assert min(row.block_n, row.max_rows) >= 16
        assert min(row.num_stages, row.programs_per_sm, row.min_tiles) >= 1
    for row in table.prefill.values():
        assert all(map(is_power_of_two, (row.block_m, row.block_n, row.num_warps)))
        assert min(row.block_m, row.block_n) >= 16
        assert row.num_stages >= 1


@pytest.mark.parametrize("device", GPUS, ids=lambda d: d.arch)
def test_table_rows_for_latents_are_ascending_powers_of_two(device):
    table = launch_table(device)
    assert list(table.latents) == [256, 512, 1024]  # float32 latents of 512 come last
    for by_rows in table.latents.values():
        assert list(by_rows) == sorted(by_rows)
        for rows, launch in by_rows.items():
            assert all(map(is_power_of_two, (rows, launch.block_n, launch.num_warps)))
            assert min(rows, launch.block_n) >= 16


@pytest.mark.parametrize(
    ("rank", "element_bytes", "wanted", "rows"),
    [(512, 2, 16, 16), (512, 2, 17, 32), (512, 2, 4096, 64), (256, 4, 128, 64), (512, 4, 128, 16)],
)
def test_a_tile_of_latents_has_the_rows_that_it_needs_or_the_most(
    rank, element_bytes, wanted, rows
):
    table = launch_table(KNOWN_DEVICES["sm90"])
    row = 1024 if rank * element_bytes > 1024 else 512
    found = table.latents_for(rank, element_bytes, wanted)
    assert found == (rows, table.latents[row][rows])


def test_larger_heads_have_no_larger_tiles():
    for device in GPUS:
        table = launch_table(device)
        tiles = [row.block_m * row.block_n for row in table.prefill.values()]
        assert tiles == sorted(tiles, reverse=True), device.arch


def test_matrix_covers_every_known_gpu():
    assert {device.arch for device in GPUS} == set(matrix.UNITS) == {*cases.NVIDIA, *cases.AMD}
    for case in cases.FEATURES:
        vendors = {
            KNOWN_DEVICES[arch].vendor for each, arch, _ in cases.covering_set() if each is case
        }
        assert vendors == {"nvidia", "amd"} or case.archs is not None


def test_the_quick_part_has_every_case_device_and_kernel():
    quick, whole = (
        [(case.name, arch, addressing) for case, arch, addressing in each]
        for each in (cases.quick_set(), cases.covering_set())
    )
    assert set(quick) < set(whole)
    assert len(set(quick)) == len(quick) < 0.6 * len(whole)
    assert {name for name, *_ in quick} == {name for name, *_ in whole}
    assert {arch for _, arch, _ in quick} == {*cases.NVIDIA, *cases.AMD}
    for device, vendor in (("sm90", cases.NVIDIA), ("gfx942", cases.AMD)):
        names = {name for name, arch, _ in quick if arch in vendor} & CASES.keys()
        # Steps of other layers over latents launch nothing more, and are made slowly.
        names = {name for name in names if "MLA" not in name or "invariant" in name}
        kernels = {kernel for name in names for kernel in recorded(name, device)}
        assert kernels >= {"write_kv", "decode", "gather_kv", "prefill", "project"}


def recorded(name, arch="sm90"):
    return {
        each.name: each for each in cases.launches_of((CASES | HOPPER)[name], KNOWN_DEVICES[arch])
    }


def test_recorder_covers_each_kernel():
    assert set(recorded("fp8_e4m3 gathered")) == {"write_kv", "decode", "gather_kv", "prefill"}
    assert set(recorded("batch invariant")) >= {"decode", "prefill"}
    assert set(recorded("MLA")) == {"write_kv", "decode"}
    assert set(recorded("MLA, batch invariant")) == {"write_kv", "project", "decode"}


@pytest.mark.parametrize(
    "name",
    ["128", "fp8_e4m3 gathered", "Hopper, 128", "Hopper, MLA, all features", "MLA, fp8_e4m3"],
)
def test_constants_can_be_written_as_json(name):
    """Triton does that where a hook receives compilations: vLLM's engine has one."""
    for launch in recorded(name).values():
        for key, constant in launch.constants.items():
            written = str(constant) if type(constant).__name__ == "dtype" else constant
            assert json.loads(json.dumps(written)) is not None or constant is None, key


def test_a_config_is_the_text_of_its_fields_and_is_copied_as_a_whole():
    (config,) = {each.constants["CONFIG"] for each in recorded("Hopper, 128").values()
                 if each.name == "hopper_prefill"}  # fmt: skip
    other = dataclasses.replace(config, BLOCK_N=2 * config.BLOCK_N)
    assert f"'BLOCK_N': {other.BLOCK_N}" in json.dumps(other)
    assert other != config
    assert str(other) != str(config)
    same = dataclasses.replace(other, BLOCK_N=config.BLOCK_N)
    for copied in (same, pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert copied == config
        assert hash(copied) == hash(config)
        assert repr(copied) == repr(config)


@pytest.mark.parametrize(
    ("case", "arch", "source"),
    [
        ("128", "sm90", "descriptors"),
        ("128", "gfx942", "rows"),
        ("no descriptors", "sm90", "rows"),
        ("pages", "sm90", "pages"),
    ],
)
def test_cases_cover_each_source_of_keys(case, arch, source):
    found = recorded(case, arch)["prefill"].constants["F"].SOURCE
    assert found == source


def test_amd_kernels_are_compiled_for_tensors_of_each_size():
    """Each case as it usually runs; each kernel of each instruction set in all three ways."""
    found = {}
    for case, arch, addressing in cases.covering_set():
        if arch in cases.NVIDIA:
            assert addressing == ""
            continue
        found.setdefault((case.name, arch), []).append(addressing)
    assert all("mixed" in each for each in found.values())
    kernels = set()
    for case in (case for case in cases.FEATURES if case.addressings == cases.ADDRESSINGS):
        for arch in cases.AMD:
            is_chosen = arch in ("gfx942", "gfx1100", "gfx1201")
            assert found[case.name, arch] == (list(cases.ADDRESSINGS) if is_chosen else ["mixed"])
        kernels |= set(recorded(case.name, "gfx942"))
    assert kernels == {"write_kv", "decode", "gather_kv", "prefill"}


@pytest.mark.parametrize(
    ("case", "kernel", "cache"),
    [
        ("pages", "write_kv", "k_ptr v_ptr"),
        ("pages", "decode", "k_ptr v_ptr"),
        ("pages", "prefill", "k_src v_src"),
        ("gathered", "gather_kv", "k_ptr v_ptr"),
        ("128", "prefill", ""),  # the call's own keys
        ("int8_per_token_head", "decode", "k_ptr v_ptr k_row_scales_ptr v_row_scales_ptr"),
    ],
)
def test_only_the_cache_is_large(case, kernel, cache):
    launch = recorded(case, "gfx942")[kernel]
    # A kernel that reads no scales is given any tensor in their place.
    ignored = {"k_scale_ptr", "v_scale_ptr"}
    if "int8" not in case:
        ignored |= {"k_row_scales_ptr", "v_row_scales_ptr"}
    args = zip(launch.kernel.arg_names, launch.args, strict=False)
    tensors = {name for name, value in args if isinstance(value, torch.Tensor)} - ignored
    assert {name for name in tensors if not launch.is_small(name, "mixed")} == set(cache.split())
    assert all(launch.is_small(name, "buffer") for name in tensors)
    assert not any(launch.is_small(name, "global") for name in tensors)


def test_sizes_are_those_that_triton_finds():
    from triton.backends.amd.compiler import HIPBackend

    args = {"k_ptr": torch.zeros(64), "q_ptr": torch.zeros(64), "slots_ptr": torch.zeros(64)}
    kernel = types.SimpleNamespace(
        arg_names=list(args), do_not_specialize=[], do_not_specialize_on_alignment=["slots_ptr"]
    )
    launch = cases.Launch(kernel, {}, {}, tuple(args.values()), 1, frozenset(["k_ptr"]))
    large = torch.empty(1 << 31, dtype=torch.uint8, device="meta")
    for name, small in args.items():
        by_triton = {
            addressing: HIPBackend.parse_attr(
                HIPBackend.get_tensor_specialization(tensor, align=name != "slots_ptr")
            )
            for addressing, tensor in (
                ("buffer", small),
                ("mixed", large if name == "k_ptr" else small),
                ("global", large),
            )
        }
        for addressing, attributes in by_triton.items():
            assert matrix._argument(launch, name, small, addressing)[1] == attributes


def test_recording_restores_launchers():
    before = cases.Launcher.__call__
    recorded("128")
    assert cases.Launcher.__call__ is before


def report(**figures):
    figures = {"registers": 128, "matrix": "wgmma.mma_async"} | figures
    return matrix.Report(case="128", arch="sm90", kernel="prefill from rows", **figures)


def test_kernel_within_limits_has_no_problem():
    most = {"shared_bytes": 227 * 1024, "spilled_bytes": matrix.SPILL_ALLOWANCE}
    assert matrix.judged(report(**most), has_matrix=True).problems == ()


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory"),
        ({"spilled_bytes": matrix.SPILL_ALLOWANCE + 1}, "spills"),
        ({"matrix": ""}, "without matrix instructions"),
    ],
)
def test_problem_is_reported(figures, words):
    (problem,) = matrix.judged(report(**figures), has_matrix=True).problems
    assert words in problem


def test_unknown_instruction_is_reported():
    unknown = ["line 7: v_new_b32 v0, v1: v_new_b32 is not known on gfx942."]
    (problem,) = matrix.judged(report(), has_matrix=True, unknown=unknown).problems
    assert problem == f"cannot be emulated: {unknown[0]}"


def test_figures_of_ptxas_and_amd_assembly():
    log = "    0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
    log += "ptxas info    : Used 168 registers, used 1 barriers"
    assert matrix.figures_of("", log) == (168, 12)
    assembly = "  - .agpr_count:     22\n    .private_segment_fixed_size: 508\n"
    assembly += "    .vgpr_count:     278\n    .vgpr_spill_count: 250\n"
    assert matrix.figures_of(assembly, "") == (278, 508)


@pytest.mark.parametrize(
    ("arch", "used", "programs"),
    [
        ("sm90", (0, 128, 4), 4),  # registers: 65,536 / (128 * 32) warps
        ("sm90", (100 * 1024, 64, 4), 2),  # memory
        ("sm86", (0, 32, 1), 16),  # programs
        ("gfx942", (0, 256, 4), 2),  # registers: 512 / 256 waves on each of four SIMDs
        ("gfx942", (65 * 1024, 64, 4), 0),
        ("gfx1100", (0, 256, 4), 5),
    ],
)
def test_programs_at_a_time(arch, used, programs):
    assert matrix.UNITS[arch].holds(*used) == programs


REPORTS = [
    report(registers=77, shared_bytes=2048, spilled_bytes=16),
    matrix.Report(case="fp8_e4m3fnuz", arch="sm80", kernel="decode", registers=55),
]


def test_tables_round_trip():
    written = matrix.tables(matrix.cells_of(REPORTS), "3.7.1")
    assert "77+16s · 2 · 0" in written
    assert matrix.read_tables(written) == (matrix.cells_of(REPORTS), "3.7.1")


def test_tables_have_the_usual_size_of_tensors():
    reports = [
        matrix.Report(case="pages", arch="gfx942", kernel="decode", registers=n, addressing=each)
        for n, each in enumerate(cases.ADDRESSINGS)
    ]
    assert matrix.cells_of(reports) == {("decode", "pages", "gfx942"): reports[1].cell}
    assert str(reports[1]).startswith("gfx942 decode, pages, mixed: 1 ")
    assert str(REPORTS[1]).startswith("sm80 decode, fp8_e4m3fnuz: 55 ")


def test_outdated_page_is_reported(tmp_path, monkeypatch, capsys):
    page = tmp_path / "kernels.md"
    page.write_text("<!-- compile-matrix -->\n<!-- compile-matrix end -->\n")
    monkeypatch.setattr(matrix, "PAGE", page)

    def is_stale(reports, triton="3.7.1", is_whole=True, write=False):
        return matrix.settle(reports, triton, is_whole, write)

    assert not is_stale(REPORTS, write=True)
    assert not is_stale(REPORTS)
    assert is_stale([report(registers=78)])
    assert "--write" in capsys.readouterr().out
    # Another Triton has other figures: they are not held against the page.
    assert not is_stale([report(registers=78)], triton="3.6.0")
    # A part is held against its part of the page, and written into it.
    assert not is_stale(REPORTS[1:], is_whole=False)
    is_stale([report(registers=78)], is_whole=False, write=True)
    assert is_stale(REPORTS[:1], is_whole=False)
    assert not is_stale(REPORTS[1:], is_whole=False)


def test_exit_status_for_problems_and_outdated_pages(tmp_path, monkeypatch, capsys):
    page = tmp_path / "kernels.md"
    page.write_text("<!-- compile-matrix -->\n<!-- compile-matrix end -->\n")
    monkeypatch.setattr(matrix, "PAGE", page)
    asked = []

    def main(*arguments, found=REPORTS[0]):
        monkeypatch.setattr(matrix, "run", lambda pairs, jobs: asked.append(pairs) or [found])
        return matrix.main(arguments)

    assert main("--write") == main("--check") == 0
    assert main("--check", "--arch", "sm80", "--filter", "128", found=report(registers=9)) == 1
    assert [(case.name, arch) for case, arch, _ in asked[-1]] == [("128", "sm80")]
    assert main("--arch", "sm90", found=matrix.judged(report(matrix=""), has_matrix=True)) == 1
    assert "without matrix instructions" in capsys.readouterr().out
    assert main("--quick", "--check") == 0
    assert asked[-1] == cases.quick_set()
    assert main("--full") == 0
    on_amd = len(cases.AMD) * len(cases.ADDRESSINGS)
    in_all = len(CASES) + len(cases.MERGES)
    assert len(asked[-1]) == in_all * (len(cases.NVIDIA) + on_amd) + len(cases.HOPPER)
