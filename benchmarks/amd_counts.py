"""What an AMD kernel executes, by row of the launch table: counts from a run on an emulated GPU.

    python benchmarks/amd_counts.py gfx942 --kind prefill
    python benchmarks/amd_counts.py gfx1100 --head-size 256 --rows 32,32,8,1 16,16,4,1
    python benchmarks/amd_counts.py gfx942 --kind decode --rows 32,4,2,2,min_tiles=8 64,4,1,2

A step of TRITON_ATTN runs with each row, is compared with the float64 oracle, and what its waves
executed is counted. The first row is that of the table, and the last column compares with it. Rows
are block_m,block_n,num_warps,num_stages for prefill and block_n,num_warps,num_stages,
programs_per_sm for decode, then name=value for their other fields and for options of the compiler.

The last figures are an estimate of issue cycles, not a time. No AMD GPU measured it. For each
resource of a compute unit, the model adds up the cycles for which instructions occupy it:

    vector    of each SIMD: a wave's instruction takes 4 cycles on CDNA and 1 on RDNA; 4 times that
              for transcendentals and integer multiplications of 32 bits; half of it for each half
              of a dual-issued one
    matrix    of each SIMD: FLOPs by the peak rate; RDNA executes them in place of vector ones
    scalar    1 cycle, of a CU on CDNA and of each SIMD on RDNA; waits and branches count
    LDS       bytes by the peak rate, without conflicts of banks
    memory    64 bytes a cycle and CU from the first cache, and 16 addresses; scratch too; all lanes
              count

If all of it overlapped, the busiest resource would decide; with one wave on a SIMD, the sum would.
The estimate is the busiest and, of the rest, the part that W waves on a SIMD leave: 1 / W. It
contains no latency, no misses of caches, no clocks and no idle units at the end of a launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from occupancy import UNITS, Unit

from attn_dispatch.backends.triton import plan
from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.backends.triton.launch_config import DecodeLaunch, LaunchTable, PrefillLaunch
from attn_dispatch.conformance.check import BackendUnderTest
from attn_dispatch.conformance.emulated import EmulatedDevice
from attn_dispatch.conformance.engine_step import EngineStep
from attn_dispatch.emulation import TARGETS, Emulation
from attn_dispatch.emulation.launch import LaunchReport
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES

Row = DecodeLaunch | PrefillLaunch

#: The fields that a row on the command line gives by their order.
_ORDER = {
    PrefillLaunch: ("block_m", "block_n", "num_warps", "num_stages"),
    DecodeLaunch: ("block_n", "num_warps", "num_stages", "programs_per_sm"),
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a compute unit does in a cycle.

    Attributes:
        matrix: type of the factors -> FLOPs of a SIMD (peak of the datasheet / units / clock).
        lds_read, lds_written: bytes of the CU; on RDNA of the pair of CUs, as in UNITS.
        vector: cycles of a wave's vector instruction.
        cus: compute units in one of UNITS.
        ghz: the highest clock of the datasheet.
    """

    matrix: dict[str, int]
    ghz: float
    lds_read: int = 128
    lds_written: int = 128
    vector: int = 4
    cus: int = 1


_PAIR: dict[str, Any] = {"lds_read": 256, "lds_written": 256, "vector": 1, "cus": 2}
#: AMD's datasheets of the MI250X, MI300X, MI355X, RX 7900 XTX and RX 9070 XT; the LDS by the
#: whitepapers of CDNA and RDNA.
RATES = {
    "gfx90a": Rates(matrix={"16": 256, "f32": 64, "8": 256}, ghz=1.7),
    "gfx942": Rates(matrix={"16": 512, "f32": 64, "8": 1024}, ghz=2.1),
    "gfx950": Rates(matrix={"16": 1024, "f32": 64, "8": 2048}, ghz=2.4, lds_read=256),
    "gfx1100": Rates(matrix={"16": 256, "8": 256}, ghz=2.5, **_PAIR),
    "gfx1201": Rates(matrix={"16": 512, "8": 1024}, ghz=2.97, **_PAIR),
}

_MATRIX = re.compile(r"v_(?:mfma|wmma)_[a-z]+\d+_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?([a-z]+\d+)")
_SLOW = re.compile(
    r"v_(s_)?(exp|log|rcp|rsq|sqrt|sin|cos)_|v_mul_(lo|hi)_[iu]32|v_mad(_co)?_[iu]64"
)
_MEMORY = ("global_", "buffer_", "scratch_", "flat_")
_WAITS = ("s_wait", "s_barrier", "s_nop", "s_delay", "s_clause", "s_sleep")
#: End of an opcode that moves data -> bytes of a lane.
_WIDTHS = (
    (r"dwordx4|b128", 16),
    (r"dwordx3|b96", 12),
    (r"dwordx2|b64", 8),
    (r"short|[biu]16", 2),
    (r"byte|[iu]8|b8", 1),
)


CLASSES = ("matrix", "vector", "slow", "lds", "memory", "scalar", "wait")


def class_of(opcode: str) -> str:
    """One of CLASSES; "slow" are vector instructions that take four times as long."""
    if _MATRIX.match(opcode):
        return "matrix"
    if opcode.startswith("v_"):
        return "slow" if _SLOW.match(opcode) else "vector"
    if opcode.startswith("ds_"):
        return "lds"
    if opcode.startswith(_MEMORY):
        return "memory"
    return "wait" if opcode.startswith(_WAITS) else "scalar"


def flops_of(opcode: str) -> tuple[int, str]:
    """FLOPs of a matrix instruction of a wave, and the type of its factors in Rates.matrix."""
    match = _MATRIX.match(opcode)
    if match is None:
        raise ValueError(f"{opcode} is no matrix instruction.")
    m, n, k = (int(match[i]) for i in (1, 2, 3))
    factors = match[5]
    kind = "f32" if factors == "f32" else "16" if factors.endswith("16") else "8"
    return 2 * m * n * k * int(match[4] or 1), kind


def bytes_of(opcode: str) -> int:
    """Bytes of a lane that a memory instruction moves; 0 for one that only orders others."""
    if not re.search(r"_load|_store|_atomic", opcode):
        return 0
    return next((size for pattern, size in _WIDTHS if re.search(pattern, opcode)), 4)


@dataclass(frozen=True)
class Measurement:
    """What one row executed.

    Attributes:
        row: the row.
        launch: the kernel's launch.
        pairs: of queries and keys that see each other, over all query heads.
        useful_flops: of the two products over these pairs.
        waves: on a SIMD at a time, by registers, LDS and the number of programs.
    """

    row: Row
    launch: LaunchReport
    pairs: int
    useful_flops: int
    waves: float

    @property
    def classes(self) -> Counter[str]:
        """Class -> instructions of all waves."""
        found: Counter[str] = Counter()
        for opcode, count in self.launch.counts.instructions.items():
            found[class_of(opcode)] += count
        return found

    @property
    def matrix_flops(self) -> int:
        """FLOPs of the matrix instructions."""
        counts = self.launch.counts.instructions.items()
        return sum(flops_of(name)[0] * n for name, n in counts if class_of(name) == "matrix")

    @property
    def lds_bytes(self) -> int:
        """Bytes read from and written to LDS."""
        return self.launch.counts.lds_bytes_read + self.launch.counts.lds_bytes_written

    @property
    def scratch_bytes(self) -> int:
        """Bytes read from and written to scratch: spills that were executed."""
        return self.launch.counts.scratch_bytes_read + self.launch.counts.scratch_bytes_written

    def cycles(self) -> dict[str, float]:
        """Resource of a compute unit -> cycles for which it is busy, if it ran the whole launch."""
        rates, counts = RATES[self.launch.target], self.launch.counts
        lanes = TARGETS[self.launch.target].wave_size
        simds = min(4.0, 4 * self.waves)  # with few waves some have none
        busy = dict.fromkeys(("vector", "matrix", "scalar", "LDS", "memory"), 0.0)
        for opcode, count in counts.instructions.items():
            kind = class_of(opcode)
            if kind == "matrix":
                flops, factors = flops_of(opcode)
                busy["matrix"] += count * flops / rates.matrix[factors] / simds
            elif kind in ("vector", "slow"):
                each = rates.vector * (4 if kind == "slow" else 1)
                each /= 2 if opcode.startswith("v_dual_") else 1
                busy["vector"] += count * each / simds
            elif kind in ("scalar", "wait"):
                busy["scalar"] += count / (1 if rates.vector == 4 else simds)
            elif kind == "memory":
                each = lanes * max(bytes_of(opcode) / 64, 1 / 16)
                busy["memory"] += count * each / rates.cus
        read, written = counts.lds_bytes_read, counts.lds_bytes_written
        busy["LDS"] = read / rates.lds_read + written / rates.lds_written
        if rates.vector == 1:
            busy["vector"] += busy.pop("matrix")
        return busy

    @property
    def estimate(self) -> float:
        """Issue cycles of a compute unit for 1000 useful pairs; see the module's docstring."""
        busy = self.cycles().values()
        longest = max(busy)
        return 1000 / self.pairs * (longest + (sum(busy) - longest) / max(1.0, self.waves))


# Running ------------------------------------------------------------------------------------------


def parsed_row(text: str, kind: type[Row], usual: Row) -> Row:
    """The row of a command-line argument.

    Args:
        text: numbers in the order of _ORDER, then name=value.
        kind: the type of row.
        usual: the table's row, for the fields that are left out.
    """
    words = text.split(",")
    numbers = [word for word in words if "=" not in word]
    fields: dict[str, Any] = dict(zip(_ORDER[kind], map(int, numbers), strict=True))
    options: dict[str, Any] = {}
    known = {field.name for field in dataclasses.fields(kind)}
    for name, value in (word.split("=") for word in words if "=" in word):
        (fields if name in known else options)[name] = int(value)
    if kind is PrefillLaunch:
        fields["options"] = options
    elif options:
        raise SystemExit(f"{', '.join(options)}: a decode row has no such field.")
    return dataclasses.replace(usual, **fields)


def shown_row(row: Row) -> str:
    """A row as the command line takes it."""
    names = _ORDER[type(row)]
    words = [str(getattr(row, name)) for name in names]
    if isinstance(row, PrefillLaunch):
        return ",".join(words + [f"{name}={value}" for name, value in row.options.items()])
    words += [f"{name}={getattr(row, name)}" for name in ("min_tiles", "max_rows")]
    return ",".join(words)


@contextmanager
def launched_with(row: Row, table: LaunchTable) -> Iterator[None]:
    """Within it, every head size has this row."""
    field = "prefill" if isinstance(row, PrefillLaunch) else "decode"
    changed = dataclasses.replace(table, **{field: dict.fromkeys(getattr(table, field), row)})
    with mock.patch.object(plan, "launch_table", return_value=changed):
        plan.Launches.of.cache_clear()
        try:
            yield
        finally:
            plan.Launches.of.cache_clear()


def useful_pairs(step: EngineStep) -> int:
    """Pairs of a query and a key that it sees, over all query heads; causal, without a window."""
    case = step.case
    lens = zip(case.query_lens, case.seq_lens, strict=True)
    return case.spec.num_heads * sum(q * (2 * s - q + 1) // 2 for q, s in lens)


def waves_on_a_simd(launch: LaunchReport, row: Row) -> float:
    """Waves on a SIMD at a time; fewer than 1 if some SIMDs have none."""
    unit: Unit = UNITS[launch.target]
    programs = unit.holds(launch.lds_bytes, launch.vgprs + launch.agprs, launch.num_warps)
    if isinstance(row, DecodeLaunch):
        programs = min(programs, row.programs_per_sm * RATES[launch.target].cus)
    return programs * launch.num_warps / unit.partitions


def measured(
    row: Row, table: LaunchTable, emulation: Emulation, prepare: Callable[[], Any]
) -> Measurement:
    """Run a step with a row and compare it with the oracle.

    Args:
        row: of the launch table.
        table: for everything else.
        emulation: the device.
        prepare: gives the backend under test and the step.

    Raises:
        CheckFailed: the result is wrong.
    """
    with launched_with(row, table):
        target, step = prepare()
        before = len(emulation.launches)
        target.run_and_judge(step)
    kernel = "prefill_kernel" if isinstance(row, PrefillLaunch) else "decode_kernel"
    (launch,) = (each for each in emulation.launches[before:] if each.kernel == kernel)
    pairs, spec = useful_pairs(step), step.spec
    flops = 2 * pairs * (spec.head_size + spec.head_size_v)
    return Measurement(row, launch, pairs, flops, waves_on_a_simd(launch, row))


def cycles_of_reading(step: EngineStep, arch: str) -> float:
    """Cycles in which a unit's part of memory bandwidth delivers all keys and values once.

    For 1000 useful pairs, as the estimate; by the datasheet's bandwidth and clock.
    """
    spec, device, rates = step.spec, KNOWN_DEVICES[arch], RATES[arch]
    row_bytes = spec.num_kv_heads * (spec.head_size + spec.head_size_v) * spec.dtype.itemsize
    units = (device.num_sms or 1) / rates.cus
    each = (device.memory_bandwidth or 1.0) / units / (rates.ghz * 1e9)
    return 1000 / useful_pairs(step) * sum(step.case.seq_lens) * row_bytes / each


def cells_of(found: Measurement, first: Measurement) -> dict[str, str]:
    """Column of the printed table -> cell."""
    launch, classes, pairs = found.launch, found.classes, found.pairs
    busy = found.cycles()
    busiest = max(busy, key=lambda name: busy[name])
    names = {"lds": "LDS", "wait": "waits"}
    return {
        "row": shown_row(found.row),
        "VGPRs": str(launch.vgprs + launch.agprs),
        "LDS KiB": f"{launch.lds_bytes / 1024:.0f}",
        "scratch B": str(launch.scratch_bytes),
        "waves/SIMD": f"{found.waves:g}",
        **{names.get(name, name): f"{classes[name] / 1000:.1f}k" for name in CLASSES},
        "matrix FLOPs/useful": f"{found.matrix_flops / found.useful_flops:.2f}",
        "vector/1000 pairs": f"{1000 * (classes['vector'] + classes['slow']) / pairs:.0f}",
        "LDS B/pair": f"{found.lds_bytes / pairs:.1f}",
        "spill B/pair": f"{found.scratch_bytes / pairs:.2f}",
        "busiest": f"{busiest} {1000 * busy[busiest] / pairs:.0f}",
        "estimate": f"{found.estimate:.0f}",
        "of the first": f"{found.estimate / first.estimate:.2f}",
    }


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What AMD kernels execute, by launch row.")
    parser.add_argument("arch", choices=tuple(RATES))
    parser.add_argument("--kind", choices=("prefill", "decode"), default="prefill")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", help="of PyTorch; default: bfloat16")
    parser.add_argument("--heads", type=int, nargs=2, default=(4, 1), help="of queries and of keys")
    parser.add_argument("--query-lens", type=int, nargs="+", help="of each request")
    parser.add_argument("--seq-lens", type=int, nargs="+", help="keys of each request")
    parser.add_argument("--rows", nargs="+", default=(), help="in addition to the table's row")
    args = parser.parse_args(arguments)
    is_prefill = args.kind == "prefill"
    args.seq_lens = args.seq_lens or ([256] if is_prefill else [1000, 700, 1100, 900])
    args.query_lens = args.query_lens or (args.seq_lens if is_prefill else [1] * len(args.seq_lens))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run each row and print the table."""
    args = parsed(arguments)
    torch.set_num_threads(1)
    device = EmulatedDevice.named(args.arch)
    kind = PrefillLaunch if args.kind == "prefill" else DecodeLaunch
    table, dtype = plan.launch_table(device.profile), getattr(torch, args.dtype)
    find = table.prefill_for if kind is PrefillLaunch else table.decode_for
    usual = find(plan.block_of(args.head_size), dtype.itemsize)
    rows = [usual, *(parsed_row(text, kind, usual) for text in args.rows)]
    first: Measurement | None = None
    with device.running() as emulation:

        def prepare() -> tuple[BackendUnderTest, EngineStep]:
            target = BackendUnderTest(TritonAttnBackend, torch.device("cpu"), device.profile)
            num_heads, num_kv_heads = args.heads
            spec = target.base.replace(
                head_size=args.head_size, num_heads=num_heads, num_kv_heads=num_kv_heads,
                dtype=dtype, block_size=16,
            )  # fmt: skip
            lens = {"query_lens": tuple(args.query_lens), "seq_lens": tuple(args.seq_lens)}
            return target, target.step(spec, **lens)

        for row in rows:
            found = measured(row, table, emulation, prepare)
            cells = cells_of(found, first or found)
            if first is None:
                first = found
                print(f"| {' | '.join(cells)} |\n|{' --- |' * len(cells)}")
            print(f"| {' | '.join(cells.values())} |", flush=True)
        if args.kind == "decode":
            cycles = cycles_of_reading(prepare()[1], args.arch)
            print(f"Memory needs {cycles:.0f} cycles for the keys and values, by its bandwidth.")
    print("The estimate is of issue cycles, by a simple model. It is no time.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
