"""The arguments of a Triton launch as the machine takes them, and the report of a launch."""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.memory.global_memory import GlobalMemory

if TYPE_CHECKING:
    from attn_dispatch.emulation.machine import LaunchCounts

__all__ = ["KernelArgument", "LaunchReport", "kernel_arguments", "memory_of"]

#: Triton's types of floating-point arguments -> how `struct` writes them. bfloat16 is cut from a
#: float32, as Triton's own launchers do.
_FLOATS = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d", "bf16": "<f"}


@dataclass(frozen=True)
class LaunchReport:
    """A launch that was emulated.

    Attributes:
        kernel: its name.
        target: the GPU that it was compiled for.
        grid: programs in each dimension.
        num_warps: waves of a program.
        vgprs: vector registers of a lane.
        agprs: accumulation registers of a lane, in addition; only CDNA has them.
        lds_bytes: LDS of a program.
        scratch_bytes: private memory of a lane, which is mostly spilled registers.
        counts: what was executed.
        seconds: that the emulation took, without the compilation.
    """

    kernel: str
    target: str
    grid: tuple[int, int, int]
    num_warps: int
    vgprs: int
    agprs: int
    lds_bytes: int
    scratch_bytes: int
    counts: LaunchCounts
    seconds: float

    @property
    def instructions(self) -> int:
        """Instructions that were executed, by all waves."""
        return self.counts.total

    def __str__(self) -> str:
        registers = f"{self.vgprs} VGPRs" + (f" and {self.agprs} AGPRs" if self.agprs else "")
        return (
            f"{self.kernel} on {self.target} (emulated): grid {self.grid}, {self.num_warps} waves "
            f"per program, {registers}, {self.lds_bytes} bytes of LDS, {self.scratch_bytes} bytes "
            f"of scratch, {self.instructions} wave instructions in {self.seconds:.3f} s"
        )


@dataclass(frozen=True)
class KernelArgument:
    """An argument that the compiled kernel has: neither a constant nor a tuple.

    Attributes:
        name: in the kernel's Python signature; of a tuple's element, `name[0]` or `name.field`.
        type: Triton's: "*fp16", "i32", "fp32".
        value: what the caller passed.
    """

    name: str
    type: str
    value: Any

    @property
    def is_pointer(self) -> bool:
        """Whether it is the address of a tensor."""
        return self.type.startswith("*")

    @property
    def tensor(self) -> Any:
        """The tensor of a pointer; None if there is none.

        Raises:
            EmulationError: it is no CPU tensor, so the memory behind the address is not known.
        """
        if self.value is None:
            return None
        tensor = self.value
        while not hasattr(tensor, "untyped_storage") and hasattr(tensor, "base"):
            tensor = tensor.base  # triton.reinterpret
        if not hasattr(tensor, "untyped_storage"):
            raise EmulationError(
                f"Argument {self.name} is a {type(self.value).__name__}: the memory that it points "
                "to is not known. Give a PyTorch tensor on the CPU."
            )
        if tensor.device.type != "cpu":
            raise EmulationError(
                f"Argument {self.name} is a tensor on {tensor.device}. Emulated kernels take "
                "tensors on the CPU."
            )
        return tensor

    def encoded(self) -> int:
        """The value as the unsigned integer with the same bits; an address for a tensor.

        Raises:
            EmulationError: the type cannot represent the value.
        """
        if self.is_pointer:
            tensor = self.tensor
            return 0 if tensor is None else int(tensor.data_ptr())
        try:
            if self.type in _FLOATS:
                bits = int.from_bytes(struct.pack(_FLOATS[self.type], float(self.value)), "little")
                return bits >> 16 if self.type == "bf16" else bits
            width, number = int(self.type[1:]), operator.index(self.value)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._does_not_fit() from error
        if not -(1 << (width - 1)) <= number < 1 << width:
            raise self._does_not_fit()
        return number % (1 << max(width, 8))

    def _does_not_fit(self) -> EmulationError:
        return EmulationError(f"Argument {self.name} = {self.value!r} is no value of {self.type}.")


def kernel_arguments(signature: Mapping[Any, Any], values: Sequence[Any]) -> list[KernelArgument]:
    """The arguments of the compiled kernel, in its order.

    Args:
        signature: parameter -> Triton's type: a text, or a tuple of types for a tuple. What is
            "constexpr" is part of the code and no argument: constants, None, and integers of 1.
        values: of all parameters, with those of the constants.

    Raises:
        EmulationError: there are more or fewer values than parameters.
    """
    if len(values) != len(signature):
        raise EmulationError(
            f"The kernel has {len(signature)} parameters, constants included; it was called with "
            f"{len(values)}."
        )
    pairs = zip(signature.items(), values, strict=True)
    return [each for (name, kind), value in pairs for each in _flat(str(name), kind, value)]


def _flat(name: str, kind: Any, value: Any) -> Iterator[KernelArgument]:
    if isinstance(kind, tuple):
        fields = getattr(value, "_fields", None)
        for index, (inner, element) in enumerate(zip(kind, value, strict=True)):
            yield from _flat(
                f"{name}.{fields[index]}" if fields else f"{name}[{index}]", inner, element
            )
    elif kind.startswith("tensordesc"):
        yield from _descriptor(name, value)
    elif kind != "constexpr":
        yield KernelArgument(name, kind, value)


def _descriptor(name: str, value: Any) -> Iterator[KernelArgument]:
    """The parts of a TensorDescriptor; no emulated GPU has tensor descriptors in hardware."""
    yield KernelArgument(f"{name}.base", "*", value.base)
    sizes = [*value.shape, *value.strides]
    yield from (KernelArgument(f"{name}.sizes", "i64", size) for size in sizes)
    yield KernelArgument(f"{name}.padding", "i1", value.padding == "nan")
    if hasattr(value, "round_f32_to_tf32"):  # since Triton 3.7
        yield KernelArgument(f"{name}.round_f32_to_tf32", "i1", value.round_f32_to_tf32)
    yield from (KernelArgument(f"{name}.shape", "i32", size) for size in value.shape)
    yield from (KernelArgument(f"{name}.strides", "i64", stride) for stride in value.strides)


def memory_of(arguments: Iterable[KernelArgument], unwritten: Collection[str] = ()) -> GlobalMemory:
    """The memory that a kernel may access: the storages of its tensors, in place.

    Args:
        arguments: of the kernel.
        unwritten: names of arguments whose memory counts as never written when the kernel starts.

    Raises:
        EmulationError: an argument is no CPU tensor; or one in `unwritten` shares its memory with
            one that is not.
    """
    memory = GlobalMemory()
    for start, end, names in _regions(arguments):
        new = [name for name in names if name in unwritten]
        if new and len(new) != len(names):
            others = ", ".join(name for name in names if name not in new)
            raise EmulationError(
                f"{', '.join(new)} cannot count as unwritten: its storage is also that of "
                f"{others}. Name all of them or none."
            )
        array = memoryview((ctypes.c_uint8 * (end - start)).from_address(start))
        memory.add(start, np.frombuffer(array, np.uint8), ", ".join(names), written=not new)
    return memory


def _regions(arguments: Iterable[KernelArgument]) -> list[tuple[int, int, list[str]]]:
    """(start, end, names of arguments) of each storage.

    Storages that overlap, as those of views that NumPy made do, are one region.
    """
    found = []
    for argument in arguments:
        tensor = argument.tensor if argument.is_pointer else None
        if tensor is not None and tensor.untyped_storage().nbytes():
            start = int(tensor.untyped_storage().data_ptr())
            found.append((start, start + int(tensor.untyped_storage().nbytes()), argument.name))
    regions: list[tuple[int, int, list[str]]] = []
    for first, last, name in sorted(found, key=lambda each: each[:2]):
        if regions and first < regions[-1][1]:
            start, end, names = regions.pop()
            regions.append((start, max(end, last), [*names, name]))
        else:
            regions.append((first, last, [name]))
    return regions
