"""The text of kernels is understood as LLVM prints it."""

from __future__ import annotations

import numpy as np
import pytest

from attn_dispatch.emulation.assembly import Assembly, parse_instruction
from attn_dispatch.emulation.errors import EmulationError
from support.assembly import kernel_text, launch

INSTRUCTIONS = {
    "v_add_f32_e32 v1, s0, v2": ("v_add_f32", "e32", ("v1", "s0", "v2"), {}),
    "v_mov_b32_dpp v1, v2 quad_perm:[1,0,3,2] row_mask:0xf bound_ctrl:1": (
        "v_mov_b32",
        "dpp",
        ("v1", "v2"),
        {"quad_perm": "[1,0,3,2]", "row_mask": "0xf", "bound_ctrl": "1"},
    ),
    "v_add_f32_e64_dpp v1, |v2|, -v3 row_shr:8": (
        "v_add_f32",
        "e64_dpp",
        ("v1", "|v2|", "-v3"),
        {"row_shr": "8"},
    ),
    "ds_swizzle_b32 v1, v2 offset:swizzle(SWAP,16)": (
        "ds_swizzle_b32",
        "",
        ("v1", "v2"),
        {"offset": "swizzle(SWAP,16)"},
    ),
    "global_load_dwordx4 v[0:3], v[4:5], off offset:-16 sc0 nt": (
        "global_load_dwordx4",
        "",
        ("v[0:3]", "v[4:5]", "off"),
        {"offset": "-16", "sc0": "", "nt": ""},
    ),
    "buffer_load_dword v1, v2, s[4:7], 0 offen offset:12": (
        "buffer_load_dword",
        "",
        ("v1", "v2", "s[4:7]", "0"),
        {"offen": "", "offset": "12"},
    ),
    "s_endpgm": ("s_endpgm", "", (), {}),
}


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_an_instruction_is_split_into_its_parts(text):
    found = parse_instruction(text)
    parts = (found.opcode, found.encoding, found.operands, dict(found.modifiers))
    assert parts == INSTRUCTIONS[text]
    assert found.second is None


def test_a_dual_issued_instruction_has_two_halves():
    found = parse_instruction("v_dual_mov_b32 v0, v1 :: v_dual_add_f32 v2, v3, v4")
    assert (found.opcode, found.operands) == ("v_mov_b32", ("v0", "v1"))
    assert (found.second.opcode, found.second.operands) == ("v_add_f32", ("v2", "v3", "v4"))


def test_a_dual_issued_instruction_counts_as_two():
    dual = "v_dual_mov_b32 v0, 1 :: v_dual_add_f32 v3, v3, v5"
    found = launch("gfx1100", f"{dual}\nv_mov_b32_e32 v1, 2", np.zeros(1)).instructions
    assert found == {"v_dual_mov_b32": 1, "v_dual_add_f32": 1, "v_mov_b32": 1, "s_endpgm": 1}


BODY = """
; %bb.0:
	.loc	1 12 3                  ; attention.py:12:3 @[ other.py:4:1 ]
	s_mov_b32 s4, 0                 ; a comment, with a colon:
.LBB0_1:
	s_add_i32 s4, s4, 1
	s_cmp_lt_i32 s4, 4
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	s_barrier
	s_nop 0"""


def test_blocks_begin_at_labels_and_end_at_branches_and_barriers():
    assembly = Assembly(kernel_text("gfx942", BODY))
    opcodes = [[each.opcode for each in block] for block in assembly.blocks]
    assert opcodes == [
        ["s_mov_b32"],
        ["s_add_i32", "s_cmp_lt_i32", "s_cbranch_scc1"],
        ["s_barrier"],
        ["s_nop", "s_endpgm"],
    ]
    assert assembly.block_of_label == {".LBB0_1": 1, ".LBB0_2": 2}


def test_an_instruction_knows_its_line_and_its_source():
    text = kernel_text("gfx942", BODY)
    first = Assembly(text).instructions[0]
    assert text.splitlines()[first.line - 1].split(";")[0].strip() == first.text
    assert str(first) == f"line {first.line}: s_mov_b32 s4, 0 (attention.py:12:3)"


def test_descriptor_and_arguments():
    assembly = Assembly(kernel_text("gfx90a", BODY, arguments="pin", scratch=20))
    assert (assembly.name, assembly.target_name) == ("tiny", "gfx90a")
    assert assembly.descriptor("private_segment_fixed_size") == 20
    assert assembly.descriptor("no_such_field") == 0
    assert [(each.offset, each.size) for each in assembly.arguments] == [(0, 8), (8, 4)]
    assert [(each.offset, each.size) for each in assembly.hidden_arguments] == [(12, 4)]


def test_other_text_is_rejected():
    with pytest.raises(EmulationError, match=r"no \.amdhsa_kernel"):
        Assembly(".version 8.0\n.target sm_90")
