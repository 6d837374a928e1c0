"""Compile every Triton kernel for every known GPU, and check the result.

    python benchmarks/compile_matrix.py [--quick | --full] [--check | --write] [--arch amd]

No GPU is needed. What the library would launch for a layer on a device is recorded, not run, and
compiled for that device. A kernel that does not compile, does not fit into shared memory, spills
more than is allowed or multiplies without matrix instructions is a problem, and the exit status 1;
so is a Hopper decode kernel of which fewer programs fit on an SM than are launched for it, and an
AMD kernel with an instruction that attn_dispatch.emulation does not know, and an NVIDIA kernel with
wgmma or tcgen05 that reads a register which it did not write (machine_code.py). With --check, so is
a table in docs/kernels.md that differs from the compiler's figures; --write updates it. A covering
set is compiled, which is what the table has; --quick compiles a part of it, and --full every case
for every device, on AMD with tensors of every size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compile_cases import (
    AMD,
    MERGES,
    NVIDIA,
    SIZES,
    Case,
    Compilation,
    Launch,
    covering_set,
    full_set,
    launches_of,
    quick_set,
)
from machine_code import disassembled, find_nvdisasm, unset_reads
from occupancy import UNITS

from attn_dispatch.emulation.instructions.decode import unknown_instructions
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
_TABLES = re.compile(
    r"(?<=<!-- compile-matrix -->\n).*?(?=^<!-- compile-matrix end -->$)", re.M | re.S
)

#: Bytes per thread that a kernel may spill.
SPILL_ALLOWANCE = 64
#: Where it may be more, because nothing was found that spills less: how the device's name begins,
#: what is in kernel and case, and bytes. The first that fits counts. Only sm90's 256 was timed.
MORE_SPILLS = (
    ("gfx1", r"float32", 2304),  # no matrix instructions: products take many registers
    ("gfx1100", r"256|512", 2304),  # the queries alone fill the registers
    ("gfx1100", r"int8", 640),
    ("gfx1201", r"512", 128),
    ("sm90", r"prefill.*, (256|512)$", 256),
    # Outside of the loop over keys, of whose registers the outputs' sums take half.
    ("sm", r"MLA", 1024),
    ("gfx1", r"MLA", 2304),
    ("gfx942", r"MLA", 160),  # with 64-bit addresses
    ("sm90", r"hopper_prefill.*256, fp8", 320),  # next to the registers of the warps that copy
    ("sm90", r"hopper_decode.*all features", 256),  # the most rows of scores in registers
    ("sm", r"float32", 512),
    ("sm", r"mask|ranges", 384),
)


# Compiling ----------------------------------------------------------------------------------------

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.int8: "i8",
}

#: Of the instructions that multiply, those that read descriptors in uniform registers. Kernels with
#: one are searched for unset registers; nvdisasm takes too long for all.
_DESCRIBED = ("wgmma.mma_async", "tcgen05.mma")
_MATRIX = (*_DESCRIBED, "mma.sync", "v_mfma", "v_wmma")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made of a launch.

    Attributes:
        addressing: one of ADDRESSINGS of compile_cases.py, or "".
        registers: per thread; on AMD all vector registers.
        shared_bytes: of one program.
        spilled_bytes: of one thread: what it stores to local memory, or its scratch on AMD.
        programs: that an SM or CU holds at a time, by shared memory, registers and warps.
        matrix: the instruction that multiplies, or "".
        problems: what is wrong, as sentences.
    """

    case: str
    arch: str
    kernel: str
    addressing: str = ""
    registers: int = 0
    shared_bytes: int = 0
    spilled_bytes: int = 0
    programs: int = 0
    matrix: str = ""
    problems: tuple[str, ...] = ()

    @property
    def cell(self) -> str:
        """The figures as the table has them."""
        spilled = f"+{self.spilled_bytes}s" if self.spilled_bytes else ""
        return f"{self.registers}{spilled} · {self.shared_bytes / 1024:.0f} · {self.programs}"

    def __str__(self) -> str:
        name = ", ".join(filter(None, [self.kernel, self.case, self.addressing]))
        words = f"{self.arch} {name}: {self.cell} {self.matrix}"
        return "\n    ".join([words.rstrip(), *self.problems])


def compiled(launch: Launch, arch: str, addressing: str) -> tuple[Any, str]:
    """The kernel that Triton compiles for a launch, and the log of ptxas, "" on AMD."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    if arch.startswith("sm"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm")), 32)
    else:
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    types: dict[str, str] = dict.fromkeys(launch.constants, "constexpr")
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        types[name], attributes[(i,)] = _argument(launch, name, value, addressing)
        if types[name] == "constexpr":
            constants[name] = value
    types = {name: types[name] for name in launch.kernel.arg_names}
    is_gluon = isinstance(launch.kernel, GluonJITFunction)
    source_cls = GluonASTSource if is_gluon else ASTSource
    source = source_cls(launch.kernel, types, constants, attributes)
    said = io.StringIO()
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = arch in NVIDIA  # a kernel from Triton's cache has no log
        return triton.compile(source, target=target, options=dict(launch.options)), said.getvalue()


def _argument(
    launch: Launch, name: str, value: Any, addressing: str
) -> tuple[str, list[list[Any]]]:
    """The type that Triton gives an argument, and what it assumes about its value."""
    aligned: list[list[Any]] = [["tt.divisibility", 16]]
    small: list[list[Any]] = [["tt.pointer_range", 32]]
    kernel = launch.kernel
    if hasattr(value, "block_shape"):  # a tensor descriptor
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>", []
    if isinstance(value, torch.Tensor):
        is_open = name in (kernel.do_not_specialize_on_alignment or ())
        known = [] if is_open or value.data_ptr() % 16 else aligned
        known = known + (small if launch.is_small(name, addressing) else [])
        return f"*{_TYPES[value.dtype]}", known
    if isinstance(value, float):
        return "fp32", []
    if name in (kernel.do_not_specialize or ()):
        return "i32", []
    return ("constexpr", []) if value == 1 else ("i32", aligned if value % 16 == 0 else [])


def report_on(case: Case, launch: Launch, arch: str, addressing: str) -> Report:
    """Compile a launch and look at the result."""
    features = launch.constants.get("F")
    kernel = f"{launch.name} from {features.SOURCE}" if launch.name == "prefill" else launch.name
    report = Report(case=case.name, arch=arch, kernel=kernel, addressing=addressing)
    try:
        kernel_of, log = compiled(launch, arch, addressing)
    except Exception as error:  # any error must be in the table
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        said = f"does not compile: {type(error).__name__}: {lines[-1].strip()}"
        return dataclasses.replace(report, problems=(said,))
    assembly = kernel_of.asm.get("ptx") or kernel_of.asm["amdgcn"]
    registers, spilled = figures_of(assembly, log)
    shared, num_warps = kernel_of.metadata.shared, kernel_of.metadata.num_warps
    report = dataclasses.replace(
        report,
        registers=registers,
        shared_bytes=shared,
        spilled_bytes=spilled,
        programs=UNITS[arch].holds(shared, registers, num_warps),
        matrix=next((name for name in _MATRIX if name in assembly), ""),
    )
    is_persistent = launch.name == "hopper_decode"
    multiplies = launch.name.startswith("hopper") or features is not None
    is_half = getattr(launch.args[0], "dtype", None) != torch.float32
    return judged(
        report,
        has_matrix=multiplies and (is_half or arch.startswith("gfx9")),
        at_once=launch.programs // (KNOWN_DEVICES[arch].num_sms or 1) if is_persistent else 0,
        unknown=unknown_instructions(assembly, arch) if arch in AMD else (),
        unset=unset_in(kernel_of.asm["cubin"]) if report.matrix in _DESCRIBED else (),
    )


def unset_in(cubin: bytes) -> list[str]:
    """Reads of registers that were not written in a kernel, as sentences; none without nvdisasm."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        return []
    try:
        return [str(read) for read in unset_reads(disassembled(cubin, nvdisasm))]
    except ValueError as error:
        return [f"machine code is not understood: {error}"]


def figures_of(assembly: str, log: str) -> tuple[int, int]:
    """Registers, and bytes that are spilled, by ptxas' log or else AMD's assembly."""
    patterns = (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    if not log:
        patterns = (r"\.vgpr_count: +(\d+)", r"\.private_segment_fixed_size: +(\d+)")
    registers, spilled = (re.findall(p, log or assembly)[-1] for p in patterns)
    return int(registers), int(spilled)


def judged(
    report: Report,
    has_matrix: bool,
    at_once: int = 0,
    unknown: Iterable[str] = (),
    unset: Iterable[str] = (),
) -> Report:
    """The report with its problems.

    Args:
        report: of a kernel that compiles.
        has_matrix: it multiplies, and the device has instructions for that in its dtype.
        at_once: programs that are launched for each SM, as many as it should hold.
        unknown: what the emulator reports of instructions that it does not know.
        unset: reads of registers that were not written.
    """
    problems = []
    limit = KNOWN_DEVICES[report.arch].shared_memory_bytes or 0
    if report.shared_bytes > limit:
        problems.append(f"takes {report.shared_bytes} bytes of shared memory of {limit}")
    name = f"{report.kernel}, {report.case}"
    more = (
        n for arch, part, n in MORE_SPILLS if report.arch.startswith(arch) and re.search(part, name)
    )
    allowed = next(more, SPILL_ALLOWANCE)
    if report.spilled_bytes > allowed:
        problems.append(f"spills {report.spilled_bytes} bytes; {allowed} are allowed")
    if has_matrix and not report.matrix:
        problems.append("multiplies without matrix instructions")
    if report.programs < at_once:
        problems.append(f"an SM holds {report.programs} programs of {at_once}")
    problems += [f"cannot be emulated: {each}" for each in unknown]
    problems += [f"compiled wrongly: {each}" for each in unset]
    return dataclasses.replace(report, problems=tuple(problems))


# Running ------------------------------------------------------------------------------------------


def reports_for(compilation: Compilation) -> list[Report]:
    """Reports on all that a case launches on a device."""
    case, arch, addressing = compilation
    torch.set_num_threads(1)
    launches = launches_of(case, KNOWN_DEVICES[arch])
    return [report_on(case, each, arch, addressing) for each in launches]


def run(compilations: Sequence[Compilation], jobs: int) -> list[Report]:
    """Reports on all of them, in their order; progress goes to stderr."""
    start, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # Triton's default, which 3.10 will change
        os.environ.pop("TRITON_INTERPRET", None)
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            results = pool.imap(reports_for, compilations)
            for (case, arch, addressing), reports in zip(compilations, results, strict=True):
                found += reports
                words = f"{arch} {case.name} {addressing}".rstrip()
                print(f"{time.monotonic() - start:5.0f} s  {words}", file=sys.stderr)
                for report in reports:
                    if report.problems:
                        print(report, file=sys.stderr, flush=True)
    return found


# The tables ---------------------------------------------------------------------------------------

#: A cell's place: kernel, case, device.
Place = tuple[str, str, str]

_IN_SIZES = ("decode", "prefill")
_IN_FEATURES = ("decode", "prefill", "gather_kv", "write_kv")
_IN_MERGES = ("merge", "pack")


def cells_of(reports: Iterable[Report]) -> dict[Place, str]:
    """The cells that reports fill: on AMD, those of tensors as they usually are."""
    usual = (report for report in reports if report.addressing in ("", "mixed"))
    places = {(_column(r.kernel), r.case, r.arch): r for r in usual}
    return {place: report.cell for place, report in places.items()}


def _column(kernel: str) -> str:
    return kernel.split(maxsplit=1)[0].removeprefix("hopper_")


def tables(cells: Mapping[Place, str], triton: str) -> str:
    """The text between the markers of docs/kernels.md."""
    parts = [f"\nTriton {triton}.\n"]
    for archs in (NVIDIA, AMD):
        rows = [
            [kernel, case.name, *(cells.get((kernel, case.name, arch), "") for arch in archs)]
            for kernel, case in itertools.product(_IN_SIZES, SIZES)
        ]
        parts.append(_table(["Kernel", "Head size", *archs], rows))
    merges = {case.name for case in MERGES}
    pairs = dict.fromkeys((c.name, arch) for c, arch, _ in covering_set() if c not in SIZES)
    for kernels, are_merges in ((_IN_FEATURES, False), (_IN_MERGES, True)):
        rows = [
            [case, arch, *(cells.get((kernel, case, arch), "") for kernel in kernels)]
            for case, arch in pairs
            if (case in merges) is are_merges
        ]
        parts.append(_table(["Case", "On", *kernels], rows))
    return "\n".join([*parts, ""])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_tables(text: str) -> tuple[dict[Place, str], str]:
    """The cells of such a text, and its Triton."""
    found, header = {}, [""]
    for line in text.splitlines():
        names = [cell.strip() for cell in line.strip("|").split("|")]
        if "---" in names:
            continue
        if names[0] in ("Kernel", "Case"):
            header = names
        for column, cell in zip(header[2:], names[2:], strict=False):
            if cell and names is not header:
                first, second = names[:2]
                is_size = header[0] == "Kernel"
                found[(first, second, column) if is_size else (column, first, second)] = cell
    version = re.search(r"^Triton (.*)\.$", text, re.M)
    return found, version[1] if version else ""


def settle(reports: Iterable[Report], triton: str, is_whole: bool, write: bool) -> bool:
    """Write the page's tables, or compare and print what differs.

    Args:
        reports: what was found.
        triton: the version that compiled.
        is_whole: these are all cells; else the page's other cells stay.
        write: write, and do not compare.

    Returns:
        Whether the page is out of date.
    """
    page = PAGE.read_text(encoding="utf-8")
    (old,) = _TABLES.findall(page)
    kept, version = read_tables(old)
    if triton != version and not (write and is_whole):
        print(f"{PAGE.name} is of Triton {version or '(none)'}, this is {triton}: not compared.")
        return False
    new = tables({**({} if is_whole else kept), **cells_of(reports)}, triton)
    if write:
        PAGE.write_text(_TABLES.sub(lambda _: new, page), encoding="utf-8")
        return False
    before, after = (text.splitlines(keepends=True) for text in (old, new))
    sys.stdout.writelines(difflib.unified_diff(before, after, PAGE.name, "now", n=0))
    if old != new:
        print(f"{PAGE.name} is out of date: run benchmarks/compile_matrix.py --write.")
    return bool(old != new)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, compare or write."""
    parser = argparse.ArgumentParser(description="Compile every kernel for every known GPU.")
    vendors = {"nvidia": NVIDIA, "amd": AMD}
    names = (*vendors, *NVIDIA, *AMD)
    parser.add_argument("--arch", choices=names, help="only this device, or this vendor's")
    parser.add_argument("--filter", default="", help="cases that have this in their name")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true", help="each case on one device or two")
    chosen.add_argument("--full", action="store_true", help="every case on every device")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    page = parser.add_mutually_exclusive_group()
    page.add_argument("--check", action="store_true", help="compare with docs/kernels.md")
    page.add_argument("--write", action="store_true", help="write into docs/kernels.md")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed here: pip install 'triton>=3.6'")
    whole = quick_set() if args.quick else full_set() if args.full else covering_set()
    archs = names if args.arch is None else vendors.get(args.arch, (args.arch,))
    compilations = [each for each in whole if each.arch in archs and args.filter in each.case.name]
    if any(each.arch in NVIDIA for each in compilations) and find_nvdisasm() is None:
        print("Triton has no nvdisasm here: the machine code for NVIDIA is not checked.")
    reports = run(compilations, args.jobs)
    bad = [report for report in reports if report.problems]
    for report in bad if args.check or args.write else reports:
        print(report)
    print(f"{len(reports)} kernels, {len(bad)} with problems")
    is_stale = False
    if args.check or args.write:
        is_whole = not (args.arch or args.filter or args.quick)
        version = importlib.metadata.version("triton")
        is_stale = settle(reports, version, is_whole, args.write)
    return 1 if bad or is_stale else 0


if __name__ == "__main__":
    sys.exit(main())
