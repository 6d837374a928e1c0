"""Loads from a buffer or global memory straight into LDS (CDNA).

AMD's CDNA ISA manuals, "memory buffer load to LDS": the values do not pass through registers. The
lanes of a wave store next to each other from the address in M0 on, those in EXEC only. A load
counts in vmcnt, and its values are in LDS only after the wait for it.
"""

from __future__ import annotations

import numpy as np

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.errors import UnknownInstruction
from attn_dispatch.emulation.instructions.address_spaces import GlobalSpace, active_lanes
from attn_dispatch.emulation.instructions.buffer import BufferSpace
from attn_dispatch.emulation.instructions.semantics import Semantics
from attn_dispatch.emulation.instructions.transfers import (
    CACHE_MODIFIERS,
    check_modifiers,
    integer_modifier,
    register_ids,
)
from attn_dispatch.emulation.registers import M0
from attn_dispatch.emulation.targets import Target
from attn_dispatch.emulation.waits import issue
from attn_dispatch.emulation.waves import WaveGroup

__all__ = ["decode"]

#: Opcode -> bytes of a lane, and targets that have it. How lanes of other sizes are placed in LDS
#: is not known.
_KNOWN: dict[str, tuple[int, tuple[str, ...]]] = {
    "buffer_load_dword": (4, ("gfx90a", "gfx942", "gfx950")),
    "buffer_load_dwordx4": (16, ("gfx950",)),
    "global_load_lds_dword": (4, ("gfx942", "gfx950")),
    "global_load_lds_dwordx4": (16, ("gfx950",)),
}


def decode(instruction: Instruction, target: Target) -> Semantics | None:
    """Decode a load into LDS; None for other instructions."""
    opcode, is_buffer = instruction.opcode, "lds" in instruction.modifiers
    if not (is_buffer or opcode.startswith("global_load_lds_")):
        return None
    size, targets = _KNOWN.get(opcode, (0, ()))
    if target.name not in targets:
        raise UnknownInstruction(f"{opcode} into LDS is not known on {target.name}")
    offset = integer_modifier(instruction, "offset")
    space: BufferSpace | GlobalSpace
    if is_buffer:
        check_modifiers(instruction, {"lds", "offset", "offen", *CACHE_MODIFIERS})
        space = BufferSpace(instruction, list(instruction.operands), target)
    else:
        check_modifiers(instruction, {"offset", *CACHE_MODIFIERS})
        vector, base = instruction.operands
        space = GlobalSpace(vector, base, offset)

    def load(group: WaveGroup) -> None:
        values = space.load(group, size)
        # The instruction's offset counts in the address in memory and in that in LDS.
        first = group.active(group.s_u32[M0, :, None].astype(np.int64)) + offset
        access = group.shared.lds.store(
            group.active_workgroups,
            first + size * active_lanes(group),
            values,
            size,
            group.active_waves,
            arriving=True,
        )
        issue(group, instruction, "load", access=access)

    return Semantics(load, sources=register_ids(instruction.operands) | {M0})
