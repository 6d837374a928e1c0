"""Reads of unset registers are found in listings of machine code, and only those."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
machine_code = importlib.import_module("machine_code")
matrix = importlib.import_module("compile_matrix") if importlib.util.find_spec("triton") else None


def listing(code, name="kernel"):
    """A listing as nvdisasm prints it; a line of code is an instruction or a label."""
    lines = [f'        .other  {name},@"STO_CUDA_ENTRY STV_DEFAULT"', f"{name}:", f".text.{name}:"]
    for each in filter(None, map(str.strip, code.splitlines())):
        is_label = each.endswith(":")
        address = 16 * sum("/*" in line for line in lines)
        lines.append(each if is_label else f"        /*{address:04x}*/             {each} ;")
    return "\n".join(lines)


def unset(code):
    """What is found: for each instruction its name and the registers."""
    found = machine_code.unset_reads(listing(code))
    return [(read.instruction.name, *read.registers) for read in found]


# A descriptor of wgmma that is computed before a loop, and used in and after the loop.
LOOP = """
    ULDC UR4, c[0x0][0x210]
    ISETP.GE.AND P0, PT, R2, 0x1, PT
    UMOV UR34, 0x0
    UMOV UR35, 0x40000040
    {before_branch}
    @!P0 BRA `(.L_x_2)
    {after_branch}
.L_x_1:
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], R24, gsb0
    ISETP.NE.AND P1, PT, R3, RZ, PT
    @P1 BRA `(.L_x_1)
.L_x_2:
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], R24, gsb0
    EXIT
"""
DESCRIPTOR = "USHF.R.U32.HI UR32, URZ, 0x4, UR4\nUMOV UR33, 0x40000040"


def test_right_code_has_no_findings():
    assert unset(LOOP.format(before_branch=DESCRIPTOR, after_branch="NOP")) == []


def test_registers_written_before_a_loop_that_can_be_skipped():
    code = LOOP.format(before_branch="NOP", after_branch=DESCRIPTOR)
    (read,) = machine_code.unset_reads(listing(code))
    assert read.registers == ("UR32", "UR33")
    text = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], R24, gsb0"
    assert read.instruction.text == text
    assert str(read) == f"0x00b0 reads UR32, UR33, which a path to it does not write: {text}"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        # A copy of an unset register is dead if its result is written before it is read.
        ("UMOV UR9, UR51\nUMOV UR9, 0x1\nSTS [UR9], R0", []),
        ("UMOV UR9, UR51\nUIADD3 UR8, UR9, 0x1, URZ\nSTS [UR8+0x10], R0", [("STS", "UR8")]),
        ("UMOV UR9, 0x1\nUMOV UR9, UR51\nIMAD.U32 R1, RZ, RZ, UR9", [("IMAD", "UR9")]),
        # Predicates.
        ("UISETP.GE.AND UP0, UPT, UR4, 0x1, UPT\nBRA.U !UP0, `(.L_end)", [("BRA", "UP0")]),
        ("@P2 STG.E desc[UR4][R2.64], R1", [("STG", "P2", "UR4", "UR5")]),
        ("IADD3 R4, P0, P1, R2, R3, R5\nIADD3.X R5, R2, R3, RZ, P0, P1", []),
        ("VOTEU.ANY UP1, P3\nPLOP3.LUT P3, PT, PT, PT, UP1, 0x80, 0x0", [("VOTEU", "P3")]),
        ("R2P PR, R0, 0x7f\nSEL R1, R2, R3, !P6", []),
        # A write under a predicate counts.
        ("ISETP.NE.AND P0, PT, R1, RZ, PT\n@P0 R2UR UR4, R2\n@P0 STS [UR4], R0", []),
        # A copy of an unset register under a predicate leaves the result as it was.
        ("UMOV UR5, 0x1\nULDC.64 UR6, c[0x0][0x210]\nUISETP.LT.AND UP0, UPT, UR6, UR7, UPT\n"
         "@UP0 UMOV UR5, UR9\nSTS [UR5], R0", []),
        # Results and sources of more than one register.
        ("ULDC.64 UR4, c[0x0][0x208]\nLDG.E R0, desc[UR4][R2.64]", []),
        ("ULDC UR4, c[0x0][0x208]\nLDG.E R0, desc[UR4][R2.64]", [("LDG", "UR5")]),
        ("UMOV UR6, 0x1\nUMOV UR4, 0x0\nSYNCS.EXCH.64 URZ, [UR4+0x8], UR6",
         [("SYNCS", "UR7")]),
        ("UMOV UR6, 0x1\nUMOV UR7, 0x1\nUSHF.R.U64 UR4, UR6, 0x4, UR7\nSTS [UR4], R0", []),
        ("ULDC UR4, c[0x0][0x0]\nUIMAD.WIDE.U32 UR6, UR4, UR4, URZ\n"
         "ISETP.LE.S64.AND P0, PT, R2, UR6, PT", []),
        ("LDCU.128 UR8, c[0x0][0x380]\nUMOV.64 UR18, URZ\nUTMALDG.2D [UR8], [UR18]", []),
        ("LDCU.128 UR8, c[0x0][0x380]\nUMOV.64 UR18, URZ\nUTMALDG.3D [UR8], [UR18]",
         [("UTMALDG", "UR12")]),
        ("LDCU.128 UR8, c[0x0][0x380]\nUTMALDG.2D [UR8], [UR18]", [("UTMALDG", "UR18", "UR19")]),
        ("LDCU.64 UR10, c[0x0][0x380]\nHGMMA.64x64x16.F32 R24, R4, gdesc[UR8].tnspB, R24", []),
        ("LDCU.64 UR10, c[0x0][0x380]\nHGMMA.64x64x16.F32 R24, gdesc[UR8], RZ, !UPT",
         [("HGMMA", "UR8", "UR9")]),
        ("ELECT P0, UR4, PT\nSTS [UR4], R0", []),
        ("UIMNMX.S64 UPT, UPT, UR4, URZ, URZ, URZ, UPT\nISETP.LE.S64.AND P0, PT, R2, UR4, PT", []),
    ],
)  # fmt: skip
def test_what_an_instruction_reads_and_writes(lines, found):
    assert unset(f"{lines}\n.L_end:\nEXIT") == found


def test_a_barrier_returns_to_where_it_was_set():
    code = """
        BSSY B0, `(.L_x_2)
        ISETP.NE.AND P0, PT, R1, RZ, PT
        @P0 BRA `(.L_x_1)
        UMOV UR4, 0x1
        BSYNC B0
        STS [UR9], R0
    .L_x_1:
        {write}
        BSYNC B0
    .L_x_2:
        STS [UR4], R0
        EXIT
    """
    assert unset(code.format(write="UMOV UR4, 0x2")) == []  # what follows the first BSYNC is dead
    assert unset(code.format(write="NOP")) == [("STS", "UR4")]


def test_an_indirect_branch_goes_to_each_of_its_targets():
    code = """
        LDC R6, c[0x2][R8]
        BRX R6 -0x230                     (*"BRANCH_TARGETS .L_x_1,.L_x_2,.L_x_3"*)
    .L_x_1:
        UMOV UR4, 0x1
        BRA `(.L_x_3)
    .L_x_2:
        {second}
    .L_x_3:
        STS [UR4], R0
        EXIT
    """
    write = "UMOV UR4, 0x2"
    assert unset(code.format(second=write)) == [("STS", "UR4")]  # from BRX
    directly = code.replace(",.L_x_3", "")
    assert unset(directly.format(second=write)) == []
    assert unset(directly.format(second="NOP")) == [("STS", "UR4")]


def test_a_call_returns_behind_itself_and_a_call_of_a_label_is_a_jump():
    code = """
        {first}
        CALL.REL.NOINC `($__internal_0_$__divide)
        STS [UR4], R0
        UMOV UR5, 0x0
        CALL.REL.NOINC `($__internal_0_$__divide)
        STS [UR5], R0
        @P0 CALL.REL.NOINC `(.L_x_1)
        BRA `(.L_x_1)
    .L_x_1:
        EXIT
    $__internal_0_$__divide:
        UIADD3 UR6, UR4, 0x1, URZ
        STS [UR6], R0
        RET.REL.NODEC R2 `(kernel)
    """
    is_set = "ISETP.NE.AND P0, PT, R1, RZ, PT\n"
    assert unset(code.format(first=f"{is_set}UMOV UR4, 0x1")) == []
    assert unset(code.format(first=is_set)) == [("STS", "UR4"), ("STS", "UR6")]


def test_loops_that_leave_a_barrier_end():
    code = """
    .L_x_1:
        BSSY B0, `(.L_x_2)
        ISETP.NE.AND P0, PT, R1, RZ, PT
        @P0 BREAK B0
        @P0 BRA `(.L_x_1)
    .L_x_2:
        STS [UR4], R0
        EXIT
    """
    assert unset(code) == [("STS", "UR4")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no kernel"),
        (listing("BRX R6 -0x230"), "0x0000 goes to an unknown place: BRX R6 -0x230"),
        (listing("NOP\nRET.REL.NODEC R2 `(kernel)"), "0x0010 goes to an unknown place"),
    ],
)
def test_listings_that_cannot_be_followed_are_errors(text, words):
    with pytest.raises(ValueError, match=words):
        machine_code.unset_reads(text)


PTX = """
.version 8.4
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 p, .param .u32 n)
{
    .reg .b64 %p; .reg .b32 %n, %i; .reg .pred %more;
    ld.param.u64 %p, [p]; ld.param.u32 %n, [n]; cvta.to.global.u64 %p, %p; mov.u32 %i, 0;
again:
    st.global.u32 [%p], %i; add.u32 %i, %i, 1; setp.lt.u32 %more, %i, %n; @%more bra again;
    ret;
}
"""


@pytest.fixture(scope="module")
def cubin(tmp_path_factory):
    """A kernel compiled by Triton's ptxas."""
    pytest.importorskip("triton")
    from triton import knobs

    if machine_code.find_nvdisasm() is None:
        pytest.skip("this Triton has no nvdisasm")
    folder = tmp_path_factory.mktemp("cubin")
    (folder / "kernel.ptx").write_text(PTX)
    command = [knobs.nvidia.ptxas.path, "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "kernel.cubin").read_bytes()


def test_a_listing_by_nvdisasm(cubin):
    text = machine_code.disassembled(cubin, machine_code.find_nvdisasm())
    assert machine_code.unset_reads(text) == []
    lines = text.splitlines(keepends=True)
    (write,) = (i for i, line in enumerate(lines) if "ULDC.64" in line and "0x208" in line)
    (read, *_) = machine_code.unset_reads("".join(lines[:write] + lines[write + 1 :]))
    assert read.instruction.name == "STG"
    assert len(read.registers) == 2


@pytest.mark.skipif(matrix is None, reason="Triton is not installed")
def test_the_matrix_fails_for_a_finding_and_goes_on_without_nvdisasm(monkeypatch, capsys):
    code = LOOP.format(before_branch="NOP", after_branch=DESCRIPTOR)
    monkeypatch.setattr(matrix, "disassembled", lambda cubin, nvdisasm: cubin.decode())
    monkeypatch.setattr(matrix, "find_nvdisasm", lambda: "nvdisasm")
    report = matrix.Report(case="128", arch="sm90", kernel="hopper_prefill")
    found = matrix.judged(report, has_matrix=False, unset=matrix.unset_in(listing(code).encode()))
    (problem,) = found.problems
    assert problem.startswith("compiled wrongly: 0x00b0 reads UR32, UR33, which")
    assert "hopper_prefill, 128" in str(found)
    assert matrix.unset_in(b"")[0] == "machine code is not understood: the listing has no kernel."
    monkeypatch.setattr(matrix, "run", lambda compilations, jobs: [found])
    assert matrix.main(["--arch", "sm90"]) == 1
    assert "not checked" not in capsys.readouterr().out
    monkeypatch.setattr(matrix, "find_nvdisasm", lambda: None)
    assert matrix.unset_in(b"") == []
    monkeypatch.setattr(matrix, "run", lambda compilations, jobs: [report])
    assert matrix.main(["--arch", "sm90"]) == 0
    assert capsys.readouterr().out.count("Triton has no nvdisasm here") == 1
