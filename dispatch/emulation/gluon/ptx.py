"""The instructions of PTX that kernels use inline, on arrays: one element is one thread's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gl

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.gluon.values import Array, Tensor, from_bits, to_bits

__all__ = ["elementwise"]

_FP8 = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}
_HALVES = {"bf16x2": gl.bfloat16, "f16x2": gl.float16}
_HALF = {"bf16": gl.bfloat16, "f16": gl.float16}


def _float(bits: Array) -> Array:
    return bits.astype(np.uint32).view(np.float32)


def _bits(numbers: Array) -> Array:
    return np.ascontiguousarray(numbers, np.float32).view(np.uint32)


def _half_bits(numbers: Array, dtype: Any) -> Array:
    stored = to_bits(numbers, dtype)
    return stored.view(np.uint16).astype(np.uint32)


def _pair(high: Array, low: Array, dtype: Any) -> Array:
    return _half_bits(_float(high), dtype) << 16 | _half_bits(_float(low), dtype)


def _widen(bits: Array, dtype: Any) -> Array:
    stored = bits.astype(np.uint16)
    return _bits(from_bits(stored if dtype == gl.bfloat16 else stored.view(np.float16), dtype))


def _two_fp8(bits: Array, dtype: torch.dtype) -> Array:
    """Two fp8 numbers of 16 bits as two of float16."""
    bytes_ = bits.astype(np.uint16)
    low, high = (
        torch.from_numpy(np.ascontiguousarray(part.astype(np.uint8))).view(dtype).half().numpy()
        for part in (bytes_ & 0xFF, bytes_ >> 8)
    )
    return high.view(np.uint16).astype(np.uint32) << 16 | low.view(np.uint16).astype(np.uint32)


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt without signs: bytes of {b, a} by the selector's digits."""
    both = b.astype(np.uint64) << 32 | a.astype(np.uint64)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape), np.uint32)
    for i in range(4):
        digit = selector >> (4 * i) & 0xF
        if np.any(digit & 8):
            raise EmulationError("prmt with signs is not interpreted.")
        byte = both >> (8 * digit.astype(np.uint64)) & np.uint64(0xFF)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _select(a: Array, b: Array, predicate: Array) -> Array:
    """selp: the first where the predicate holds, else the second."""
    return np.where(predicate, a, b)


def _operation(name: str) -> Callable[..., Array]:
    """What an instruction computes of 32-bit registers."""
    plain: dict[str, Callable[..., Array]] = {
        "mov.b32": lambda a: a,
        "tanh.approx.f32": lambda a: _bits(np.tanh(_float(a))),
        "ex2.approx.ftz.f32": lambda a: _bits(np.exp2(_float(a))),
        "mul.f32": lambda a, b: _bits(_float(a) * _float(b)),
        "add.f32": lambda a, b: _bits(_float(a) + _float(b)),
        "sub.f32": lambda a, b: _bits(_float(a) - _float(b)),
        "xor.b32": lambda a, b: a ^ b,
        "setp.lt.u32": lambda a, b: a < b,
        "selp.f32": _select,
        "prmt.b32": _permute_bytes,
    }
    if name in plain:
        return plain[name]
    kind, *parts = name.split(".")
    if kind == "cvt" and len(parts) == 3 and parts[1] in _HALVES and parts[2] == "f32":
        dtype = _HALVES[parts[1]]
        return lambda high, low: _pair(high, low, dtype)
    if kind == "cvt" and len(parts) == 3 and parts[1] == "f16x2" and parts[2] in _FP8:
        fp8 = _FP8[parts[2]]
        return lambda a: _two_fp8(a, fp8)
    if kind == "cvt" and len(parts) == 2 and parts[0] == "f32" and parts[1] in _HALF:
        half = _HALF[parts[1]]
        return lambda a: _widen(a, half)
    raise EmulationError(f"The PTX instruction {name} is not interpreted.")


_IMMEDIATE = re.compile(r"0f[0-9A-Fa-f]{8}|0x[0-9A-Fa-f]+|-?\d+")


def _immediate(text: str) -> Array:
    number = int(text[2:], 16) if text.startswith(("0f", "0x")) else int(text)
    return np.asarray(number & 0xFFFFFFFF, np.uint32)


def elementwise(asm: str, constraints: str, args: Sequence[Tensor], dtype: Any) -> Any:
    """gl.inline_asm_elementwise with one element of each argument in a thread's registers."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    shape = np.broadcast_shapes(*[each.data.shape for each in args])
    registers: dict[str, Array] = {}
    for i, each in enumerate(args):
        stored = to_bits(each.data, each.dtype)
        if stored.dtype.itemsize != 4:
            raise EmulationError("Registers of inline PTX have 32 bits here.")
        bits = np.broadcast_to(stored, shape)
        registers[f"${len(dtypes) + i}"] = np.ascontiguousarray(bits).view(np.uint32)
    text = asm.strip()
    text = text[1:-1] if text.startswith("{") else text
    for statement in filter(None, (line.strip() for line in text.split(";"))):
        _execute(statement, registers)
    layout = next((each.layout for each in args if each.data.shape == shape), None)
    results = []
    for i, each in enumerate(dtypes):
        bits = np.ascontiguousarray(np.broadcast_to(registers[f"${i}"], shape))
        kept = bits.view(np.float32) if each == gl.float32 else bits.view(np.int32)
        results.append(Tensor(kept, each, layout))
    return tuple(results) if isinstance(dtype, tuple) else results[0]


def _execute(statement: str, registers: dict[str, Array]) -> None:
    name, _, rest = statement.partition(" ")
    if name == ".reg":
        return
    operands = [each.strip() for each in re.findall(r"\{[^}]*\}|[^,]+", rest)]
    target, sources = operands[0], operands[1:]
    if target.startswith("{"):  # mov of a register to its halves
        (source,) = sources
        low, high = (each.strip() for each in target[1:-1].split(","))
        registers[low], registers[high] = registers[source] & 0xFFFF, registers[source] >> 16
        return
    values = [
        _immediate(each) if _IMMEDIATE.fullmatch(each) else registers[each] for each in sources
    ]
    registers[target] = _operation(name)(*values)
