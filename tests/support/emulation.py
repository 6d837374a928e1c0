"""Waves with given registers, and instructions executed on them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_dispatch.emulation.assembly import parse_instruction
from attn_dispatch.emulation.instructions.decode import decode
from attn_dispatch.emulation.memory.global_memory import GlobalMemory
from attn_dispatch.emulation.memory.lds import Lds
from attn_dispatch.emulation.memory.scratch import Scratch
from attn_dispatch.emulation.registers import EXEC, M0, VCC
from attn_dispatch.emulation.shared import Shared
from attn_dispatch.emulation.targets import Target, target_named
from attn_dispatch.emulation.waves import WaveGroup, new_registers

#: Named scalar registers: the first one, and whether a wave of 64 lanes has two of it.
_NAMED = {"vcc": (VCC, True), "exec": (EXEC, True), "m0": (M0, False)}


def shared_by(
    target: Target,
    waves: int,
    *,
    memory: GlobalMemory | None = None,
    lds: Lds | None = None,
    scratch: Scratch | None = None,
) -> Shared:
    """What the waves of one workgroup share; what is not given is empty."""
    return Shared(
        target,
        (1, 1, 1),
        np.zeros(1, np.int64),
        waves,
        memory or GlobalMemory(),
        lds or Lds(1, 0),
        scratch or Scratch(waves, target.wave_size, 0),
    )


def group_of(
    target: str | Target,
    waves: int = 2,
    vgprs: int = 32,
    agprs: int = 32,
    *,
    shared: Shared | None = None,
    **registers: Any,
) -> WaveGroup:
    """A group of waves with all lanes in EXEC.

    Args:
        target: the GPU or its name.
        waves: how many.
        vgprs: vector registers.
        agprs: accumulation registers.
        shared: what the waves share.
        registers: values by name: `v3`, `a3`, `s3`, `vcc`, `exec`, `m0`, `scc`. A value broadcasts
            to (waves, lanes), or (waves,) for scalar registers. Its bits are written: arrays of 64
            bits an element fill two registers, those of 16 bits one with a 0 above; an int is a
            uint32, a float a float32, and an int for `vcc` or `exec` has a bit for each lane.
    """
    target = target_named(target) if isinstance(target, str) else target
    shared = shared or shared_by(target, waves)
    files = new_registers(waves, target.wave_size, vgprs, agprs)
    group = WaveGroup(shared, np.arange(waves), files, np.zeros(waves, bool))
    for name, value in registers.items():
        put_register(group, name, value)
    return group


def put_register(group: WaveGroup, name: str, value: Any) -> None:
    """Write registers as `group_of` does."""
    if name == "scc":
        group.scc[:] = value
        return
    if name in _NAMED:
        first, is_mask = _NAMED[name]
        if is_mask and group.lanes == 64 and isinstance(value, int):
            value = np.uint64(value)
        file = "s"
    else:
        found = re.fullmatch(r"([vas])(\d+)", name)
        assert found, name
        file, first = found[1], int(found[2])
    array = getattr(group, f"{file}_u32")
    for i, words in enumerate(_words(value)):
        array[first + i] = words
    group.exec_changed()


def _words(value: Any) -> list[NDArray[np.uint32]]:
    """The bits of a value as one or two arrays of 32 bits."""
    if isinstance(value, float):
        value = np.float32(value)
    if isinstance(value, int):
        value = np.uint32(value & 0xFFFFFFFF)
    value = np.asarray(value)
    if value.dtype.kind == "i" and value.dtype.itemsize < 4:
        value = value.view(f"u{value.dtype.itemsize}")
    if value.dtype.itemsize == 2:
        value = value.view(np.uint16).astype(np.uint32)
    if value.dtype.itemsize == 8:
        bits = value.view(np.uint64)
        return [bits.astype(np.uint32), (bits >> np.uint64(32)).astype(np.uint32)]
    return [value.view(np.uint32)]


def register(group: WaveGroup, name: str, dtype: Any = np.uint32) -> NDArray[Any]:
    """The value of registers as (waves, lanes) or (waves,) of a dtype, as `group_of` takes them.

    A dtype of 16 bits takes the lower half. `vcc` and `exec` give (waves, lanes) bool.
    """
    if name in ("vcc", "exec"):
        return group.lane_mask(_NAMED[name][0])
    file, first = name[0], int(name[1:])
    array = getattr(group, f"{file}_u32")
    dtype = np.dtype(dtype)
    if dtype.itemsize == 8:
        low, high = array[first].astype(np.uint64), array[first + 1].astype(np.uint64)
        return (low | high << np.uint64(32)).view(dtype)
    if dtype.itemsize == 2:
        return array[first].astype(np.uint16).view(dtype)
    return array[first].copy().view(dtype)


def execute(group: WaveGroup, *texts: str) -> WaveGroup:
    """Decode and execute instructions one after another; returns the group."""
    for text in texts:
        decoded = decode(parse_instruction(text, 1), group.shared.target)
        with np.errstate(all="ignore"):
            decoded.execute(group)
    return group


# Tables of instructions ---------------------------------------------------------------------------
class Row(NamedTuple):
    """An instruction with what it reads and what it must write.

    Attributes:
        target: the GPU.
        text: the instruction. Its result is v0 and its sources are v2, v4 and v6.
        sources: for v2, v4 and v6, as `group_of` takes them. An array of one dimension has the
            values of the first lanes, which repeat.
        result: the expected value of v0, or a dict of registers. A float's NaN equals any NaN; bool
            is a lane mask.
        registers: others that the instruction reads.
    """

    target: str
    text: str
    sources: tuple[Any, ...]
    result: Any
    registers: dict[str, Any] = {}  # noqa: RUF012


def check_row(row: Row) -> None:
    """Execute the instruction of a row, and compare what it wrote."""
    lanes = target_named(row.target).wave_size
    registers = dict(zip(("v2", "v4", "v6"), row.sources, strict=False)) | row.registers
    given = {name: _repeated(value, lanes) for name, value in registers.items()}
    group = execute(group_of(row.target, **given), row.text)
    expected = row.result if isinstance(row.result, dict) else {"v0": row.result}
    for name, value in expected.items():
        check_register(group, name, _repeated(value, lanes))


def _repeated(value: Any, lanes: int) -> Any:
    is_list = isinstance(value, np.ndarray) and value.ndim == 1
    return np.resize(value, lanes) if is_list else value


def check_register(group: WaveGroup, name: str, value: Any) -> None:
    """Compare the value of a register in all lanes; the value's dtype says what its bits are."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = np.uint32(value & 0xFFFFFFFF)
    want = np.asarray(value)
    if want.dtype == np.bool_:
        first = _NAMED[name][0] if name in _NAMED else int(name[1:])
        got = group.lane_mask(first)
    else:
        got = register(group, name, want.dtype)
    want = np.broadcast_to(want, got.shape)
    np.testing.assert_array_equal(got, want, err_msg=name)
    if want.dtype.kind == "f":
        number = ~np.isnan(want)
        signs = np.signbit(got)[number], np.signbit(want)[number]
        np.testing.assert_array_equal(*signs, err_msg=f"signs of {name}")


def u16(*values: int) -> NDArray[np.uint16]:
    return np.array(values, np.uint16)


def i16(*values: int) -> NDArray[np.int16]:
    return np.array(values, np.int16)


def f16(*values: float) -> NDArray[np.float16]:
    return np.array(values, np.float16)


def u32(*values: int) -> NDArray[np.uint32]:
    return np.array(values, np.uint32)


def i32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def u64(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def i64(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def mask(*values: int) -> NDArray[np.bool_]:
    """Bits of the first lanes."""
    return np.array(values, bool)


def halves(dtype: Any, low: float, high: float) -> NDArray[np.uint32]:
    """One register with two values, which one of the functions above makes."""
    return dtype(low, high).view(np.uint32)


def pair(low: float, high: float) -> NDArray[np.uint64]:
    """Two registers with a float32 each, as uint64."""
    return f32(low, high).view(np.uint64)
