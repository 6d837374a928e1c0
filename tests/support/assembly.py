"""Small kernels in assembly text, as LLVM would print them."""

from __future__ import annotations

import numpy as np

from attn_dispatch.emulation.machine import Kernel, LaunchCounts, WaveOrder
from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.targets import target_named

__all__ = ["in_names_of", "kernel_text", "launch"]

#: RDNA3's names -> CDNA's.
_CDNA_NAMES = {
    "s_load_b64": "s_load_dwordx2",
    "global_load_b32": "global_load_dword",
    "global_store_b32": "global_store_dword",
    "global_atomic_add_u32": "global_atomic_add",
    "scratch_load_b32": "scratch_load_dword",
    "scratch_store_b32": "scratch_store_dword",
    "ds_load_b32": "ds_read_b32",
    "ds_store_b32": "ds_write_b32",
    "_nc_u32": "_u32",
    "s_waitcnt_vscnt null, 0x0": "s_waitcnt vmcnt(0)",
}

_DESCRIPTOR = """
	.amdhsa_kernel {name}
		.amdhsa_group_segment_fixed_size 0
		.amdhsa_private_segment_fixed_size {scratch}
		.amdhsa_kernarg_size {size}
		.amdhsa_user_sgpr_count {user_sgprs}
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_user_sgpr_kernarg_preload_length {preload}
		.amdhsa_system_sgpr_workgroup_id_x 1
		.amdhsa_system_sgpr_workgroup_id_y 1
		.amdhsa_system_sgpr_workgroup_id_z 1
		.amdhsa_next_free_vgpr 40
		.amdhsa_accum_offset {accum_offset}
	.end_amdhsa_kernel
"""


def in_names_of(arch: str, *lines: str) -> str:
    """Lines in RDNA3's names, in those of a target."""
    body = "\n".join(lines)
    for name, on_cdna in _CDNA_NAMES.items() if arch.startswith("gfx9") else ():
        body = body.replace(name, on_cdna)
    return body


def kernel_text(
    arch: str, body: str, *, arguments: str = "", scratch: int = 0, preload: int = 0
) -> str:
    """The text of a kernel.

    Args:
        arch: the target.
        body: its instructions, one a line.
        arguments: one character an argument: "p" for a pointer, "i" for 32 bits, "n" for the
            hidden number of workgroups.
        scratch: bytes of private memory of a lane.
        preload: registers of arguments that hardware loads, after s[0:1].
    """
    at, shown = 0, []
    for each in arguments:
        size = 8 if each == "p" else 4
        at = -(-at // size) * size
        kind = {"p": "global_buffer", "i": "by_value", "n": "hidden_block_count_x"}[each]
        shown.append(f"      - .offset: {at}\n        .size: {size}\n        .value_kind: {kind}\n")
        at += size
    descriptor = _DESCRIPTOR.format(
        name="tiny",
        scratch=scratch,
        size=at,
        user_sgprs=2 + preload,
        preload=preload,
        accum_offset=32 if arch.startswith("gfx9") else 0,
    )
    return (
        f'\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\ntiny:\n{body}\n\ts_endpgm\n'
        f"\t.section .rodata\n{descriptor}\n.args:\n{''.join(shown)}"
    )


def launch(
    arch: str,
    body: str,
    *arrays: np.ndarray,
    grid: tuple[int, int, int] = (1, 1, 1),
    num_waves: int = 1,
    lds_bytes: int = 0,
    scratch: int = 0,
    preload: int = 0,
    wave_order: WaveOrder = "lockstep",
    unwritten: tuple[int, ...] = (),
) -> LaunchCounts:
    """Run a kernel whose arguments are arrays; it reads and writes them in place.

    Args:
        arch: the target.
        body: its instructions; s[0:1] has the address of the arguments.
        *arrays: their memory.
        grid, num_waves, lds_bytes, wave_order: as for `Kernel.launch`.
        scratch, preload: as for `kernel_text`.
        unwritten: indices of arrays that count as never written.
    """
    memory = GlobalMemory()
    for i, array in enumerate(arrays):
        data = array.reshape(-1).view(np.uint8)
        memory.add(array.ctypes.data, data, f"argument {i}", written=i not in unwritten)
    text = kernel_text(arch, body, arguments="p" * len(arrays), scratch=scratch, preload=preload)
    kernel = Kernel(text, target_named(arch))
    addresses = [array.ctypes.data for array in arrays]
    return kernel.launch(grid, num_waves, lds_bytes, addresses, memory, wave_order=wave_order)
