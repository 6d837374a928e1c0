"""The state of waves that are at the same instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import Instruction
from attn_dispatch.emulation.memory.global_memory import StoresInFlight
from attn_dispatch.emulation.memory.lds import LdsAccess
from attn_dispatch.emulation.pending import Pending
from attn_dispatch.emulation.registers import EXEC, NUM_SGPRS
from attn_dispatch.emulation.shared import Shared

__all__ = ["WaveGroup", "new_registers"]

#: What registers hold before they are written: NaN as float32, and as two bfloat16 or float16.
_UNWRITTEN = 0xFFFFFFFF
_DTYPES: dict[str, Any] = {
    "u32": np.uint32, "i32": np.int32, "f32": np.float32,
    "u16": np.uint16, "i16": np.int16, "f16": np.float16,
}  # fmt: skip


class WaveGroup:
    """Waves at the same instruction, whose registers are columns of the same arrays.

    Register files are arrays of uint32, and views of their memory by other types:
    `v_u32`, `v_i32`, `v_f32` and `a_...`: (registers, waves, lanes); `v_u16`, `v_i16`, `v_f16`:
    (registers, waves, lanes, 2), the lower half first; `s_...`: (128, waves), or (128, waves, 2);
    `column_...`: the same as `s_...` with an axis of 1 for the lanes.

    Attributes:
        shared: what all waves of the launch share.
        ids: (waves,) their numbers in the launch.
        scc: (waves,) bool, the scalar condition code.
        exec: (waves, lanes) bool, the lanes that execute; a copy of EXEC's bits.
        full: whether all lanes of all waves execute.
        block: the basic block that comes next.
        saturates: whether the FP16_OVFL bit of the MODE register is set, as in kernels that Triton
            lets cast to fp8: conversions to fp8 and float16 give the largest number where a finite
            one overflows. Arithmetic of float16 overflows to infinity here, unlike on a GPU.
        waits_at_barrier: it goes on when all waves of the workgroup wait, too.
        rank: groups of the lowest rank run first, until they wait or end; waves of different ranks
            never become one group.
        pending: memory operations that nothing has waited for yet, the oldest first.
        unpublished: stores that have arrived, but which nothing orders with other waves yet.
        after_signal: accesses of LDS that may happen after the signal of a barrier that the waves
            have signalled but not passed (RDNA4); None if there is no such barrier.
    """

    s_u32: NDArray[np.uint32]
    v_u32: NDArray[np.uint32]
    a_u32: NDArray[np.uint32]

    def __init__(
        self,
        shared: Shared,
        ids: NDArray[np.int64],
        registers: Sequence[NDArray[np.uint32]],
        scc: NDArray[np.bool_],
    ) -> None:
        self.shared, self.ids, self.scc = shared, ids, scc
        self.num_waves, self.lanes = len(ids), shared.target.wave_size
        self._registers = registers
        for file, array in zip("sva", registers, strict=True):
            for kind, dtype in _DTYPES.items():
                view = array.view(dtype)
                if view.itemsize == 2:
                    view = view.reshape(*array.shape, 2)
                setattr(self, f"{file}_{kind}", view)
                if file == "s":
                    setattr(self, f"column_{kind}", view[:, :, None])
        self.block, self.waits_at_barrier, self.rank = 0, False, 0
        self.saturates = False
        self.pending: tuple[Pending, ...] = ()
        self.pending_registers: frozenset[int] = frozenset()
        self.unpublished = StoresInFlight()
        self.after_signal: tuple[LdsAccess, ...] | None = None
        self.exec_changed()

    @property
    def workgroups(self) -> NDArray[np.int64]:
        """(waves,) the workgroup of each wave, by its number in this part of the launch."""
        return self.ids // self.shared.waves_per_workgroup

    # EXEC and lane masks --------------------------------------------------------------------------

    def exec_changed(self) -> None:
        """Read EXEC again, after a write to its register."""
        self.exec = self.lane_mask(EXEC)
        self.full = bool(self.exec.all())
        self._active_waves: NDArray[np.int64] | None = None
        self._active_workgroups: NDArray[np.int64] | None = None

    def lane_mask(self, first: int) -> NDArray[np.bool_]:
        """(waves, lanes) bool: the bits of a scalar register, or of a pair if waves have 64."""
        words = self.s_u32[first : first + self.lanes // 32].T
        octets = np.ascontiguousarray(words).view(np.uint8)
        return np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)

    def put_lane_mask(self, first: int, value: Any) -> None:
        """Write bits of lanes; those that EXEC leaves out become 0."""
        bits = np.ascontiguousarray(value & self.exec)
        words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
        self.s_u32[first : first + words.shape[1]] = words.T
        if first == EXEC:
            self.exec_changed()

    def put(self, target: NDArray[Any], value: Any) -> None:
        """Write to (waves, lanes) of a register where EXEC is set."""
        if self.full:
            target[...] = value
        else:
            np.copyto(target, value, where=self.exec)

    # Lanes of memory accesses ---------------------------------------------------------------------

    def active(self, value: Any) -> NDArray[Any]:
        """What broadcasts to (waves, lanes), as the values (k,) of the lanes that execute."""
        if np.shape(value) != self.exec.shape:
            value = np.broadcast_to(value, self.exec.shape)
        active: NDArray[Any] = value.reshape(-1) if self.full else value[self.exec]
        return active

    @property
    def active_waves(self) -> NDArray[np.int64]:
        """(k,) the number of the wave of each lane that executes."""
        if self._active_waves is None:
            self._active_waves = self.active(self.ids[:, None])
        return self._active_waves

    @property
    def active_workgroups(self) -> NDArray[np.int64]:
        """(k,) the workgroup of each lane that executes."""
        if self._active_workgroups is None:
            self._active_workgroups = self.active(self.workgroups[:, None])
        return self._active_workgroups

    # Splitting and joining ------------------------------------------------------------------------

    def only(self, chosen: NDArray[np.bool_]) -> WaveGroup:
        """A group of some of the waves."""
        # Not array[:, chosen]: its axes would have another order in memory, and no 16-bit views.
        registers = [np.compress(chosen, array, axis=1) for array in self._registers]
        part = self._at_same_place(self.ids[chosen], registers, self.scc[chosen])
        part.set_pending(tuple([each.only(part.ids) for each in self.pending]))
        part.unpublished = self.unpublished.only(part.ids)
        if self.after_signal is not None:
            part.after_signal = tuple([each.only(part.ids) for each in self.after_signal])
        return part

    def joins(self, other: WaveGroup) -> bool:
        """Whether the two can be one group: same place and mode, same operations pending."""
        return (
            (self.block, self.waits_at_barrier, self.rank, self.saturates)
            == (other.block, other.waits_at_barrier, other.rank, other.saturates)
            and (self.after_signal is None) == (other.after_signal is None)
            and self.pending_operations == other.pending_operations
        )

    def joined(self, other: WaveGroup) -> WaveGroup:
        """One group of the waves of both."""
        pairs = zip(self._registers, other._registers, strict=True)
        both = self._at_same_place(
            np.concatenate([self.ids, other.ids]),
            [np.concatenate(pair, axis=1) for pair in pairs],
            np.concatenate([self.scc, other.scc]),
        )
        operations = zip(self.pending, other.pending, strict=True)
        both.set_pending(tuple([one.joined(another) for one, another in operations]))
        both.unpublished = self.unpublished.joined(other.unpublished)
        if self.after_signal is not None and other.after_signal is not None:
            both.after_signal = self.after_signal + other.after_signal
        return both

    def _at_same_place(
        self, ids: NDArray[np.int64], registers: Sequence[NDArray[Any]], scc: NDArray[np.bool_]
    ) -> WaveGroup:
        """A new group at the place of this one."""
        group = WaveGroup(self.shared, ids, registers, scc)
        group.block, group.waits_at_barrier = self.block, self.waits_at_barrier
        group.rank, group.saturates = self.rank, self.saturates
        return group

    @property
    def pending_operations(self) -> list[tuple[Instruction, str]]:
        """The instruction that issued each pending operation, and the counter that counts it."""
        return [(each.instruction, each.counter) for each in self.pending]

    def set_pending(self, pending: tuple[Pending, ...]) -> None:
        """Replace the operations that are pending."""
        self.pending = pending
        self.pending_registers = frozenset().union(*[each.registers for each in pending])


def new_registers(waves: int, lanes: int, vgprs: int, agprs: int) -> list[NDArray[np.uint32]]:
    """Register files that were never written, with all lanes in EXEC."""
    shapes = ((NUM_SGPRS, waves), (vgprs, waves, lanes), (agprs, waves, lanes))
    files = [np.full(shape, _UNWRITTEN, np.uint32) for shape in shapes]
    files[0][EXEC + lanes // 32 :] = 0
    return files
