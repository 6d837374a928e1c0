"""Triton's launches on the emulator: what is compiled, which arguments arrive, what is reported.

Most tests need Triton to compile. Where it interprets kernels, because the machine has no GPU, they
run in a process of their own. In most of them the machine only records what it receives.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")

import triton.language as tl  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from attn_dispatch.emulation import (  # noqa: E402
    TARGETS,
    EmulationError,
    MemoryFault,
    UnwrittenRead,
    emulate_launch,
    emulated,
    triton_driver,
)
from attn_dispatch.emulation.launch import KernelArgument, memory_of  # noqa: E402
from attn_dispatch.emulation.machine import Kernel, LaunchCounts  # noqa: E402
from support.compiling import (  # noqa: E402
    needs_compiler,
    only_where_interpreted,
    passed_where_compiled,
)


@only_where_interpreted
def test_in_a_process_that_compiles():
    assert passed_where_compiled(__file__) > 40


# The arguments of a launch.


@pytest.fixture
def launches(monkeypatch):
    """What the machine received of each launch. It runs none."""
    received = []

    def launch(kernel, grid, num_waves, lds_bytes, arguments, memory, *, wave_order):
        received.append(
            SimpleNamespace(
                assembly=kernel.assembly,
                grid=grid,
                num_waves=num_waves,
                lds_bytes=lds_bytes,
                arguments=arguments,
                memory=memory,
                wave_order=wave_order,
            )
        )
        return LaunchCounts(Counter(v_mov_b32=7, s_endpgm=1), waves=1)

    monkeypatch.setattr(Kernel, "launch", launch)
    return received


def regions_of(launch):
    """Name -> whether it counts as written, in the order of addresses."""
    return {region.name: region._written is None for region in launch.memory.regions}


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, i < n), tl.load(y_ptr + i, i < n)
    tl.store(out_ptr + i, x + y, i < n)


class Pair(NamedTuple):
    data: torch.Tensor
    offset: int
    inner: tuple


@triton.jit
def tuple_kernel(x_ptr, pair, factor, none, one, half: tl.bfloat16, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + i) * factor + tl.load(pair.data + i) + pair.offset + pair.inner[1]
    tl.store(out_ptr + i, value + one + half)


@triton.jit
def descriptor_kernel(block, out_ptr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i[:, None] * 16 + i[None, :], block.load([0, 0]))


@triton.jit
def large_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    place = x_ptr + i[:, None] * BLOCK + i[None, :]
    x = tl.load(place)
    tl.store(place, tl.dot(x, tl.trans(x)))


X, Y, OUT = torch.randn(1000), torch.randn(1000), torch.zeros(1000)


def run_add(arch="gfx942", x=X, y=Y, out=OUT, n=1000, **more):
    return emulate_launch(add_kernel, (4,), [x, y, out, n], arch=arch, BLOCK=256, **more)


@needs_compiler
@pytest.mark.parametrize("arch", TARGETS)
def test_launch_on_each_target(launches, arch):
    report = run_add(arch, num_warps=2)
    (launch,) = launches
    assert launch.assembly.target_name == arch
    assert (launch.grid, launch.num_waves, launch.lds_bytes) == ((4, 1, 1), 2, 0)
    assert launch.arguments == [X.data_ptr(), Y.data_ptr(), OUT.data_ptr(), 1000]
    assert set(regions_of(launch)) == {"x_ptr", "y_ptr", "out_ptr"}
    assert all(regions_of(launch).values())
    assert (report.kernel, report.target, report.num_warps) == ("add_kernel", arch, 2)
    registers = launch.assembly.descriptor("next_free_vgpr")
    assert registers <= report.vgprs < registers + 4  # on CDNA in multiples of 4
    assert (report.agprs, report.scratch_bytes) == (0, 0)
    assert report.instructions == 8
    assert f"add_kernel on {arch} (emulated)" in str(report)


@needs_compiler
def test_tuples_constants_and_floats(launches):
    pair = Pair(torch.randn(300)[3:], -7, (None, 5))
    arguments = [X, pair, 1.5, None, 1, -2.0, OUT]
    emulate_launch(tuple_kernel, (1,), arguments, arch="gfx1100", BLOCK=256)
    (launch,) = launches
    data = pair.data.data_ptr()
    assert launch.arguments == [
        X.data_ptr(), data, 2**32 - 7, 5, 0x3FC00000, 0xC000, OUT.data_ptr()
    ]  # fmt: skip
    assert "pair.data" in regions_of(launch)


@needs_compiler
def test_tensor_descriptors_are_passed_as_their_parts(launches):
    block = TensorDescriptor(torch.randn(64, 32), [64, 32], [32, 1], [16, 16])
    emulate_launch(descriptor_kernel, (1,), [block, OUT], arch="gfx942")
    (launch,) = launches
    assert launch.arguments[:5] == [block.base.data_ptr(), 64, 32, 32, 1]
    assert launch.arguments[-5:] == [64, 32, 32, 1, OUT.data_ptr()]


@needs_compiler
def test_code_is_specialized_as_for_a_gpu(launches):
    run_add(n=960, num_warps=1)
    run_add(x=torch.randn(1001)[1:], n=1, num_warps=1)
    aligned, other = (launch.assembly for launch in launches)
    assert "buffer_load_dwordx4" in aligned.text  # of aligned tensors under 2 GiB
    assert "buffer_load_dwordx4" not in other.text
    assert len(launches[1].arguments) == 3  # an integer of 1 is a constant


@needs_compiler
def test_unwritten_memory_by_name(launches):
    run_add(unwritten=("out_ptr",))
    assert regions_of(launches[0]) == {"x_ptr": True, "y_ptr": True, "out_ptr": False}
    with pytest.raises(EmulationError, match=r"unwritten=o_ptr: no launch .* n, out_ptr, x_ptr"):
        run_add(unwritten=("o_ptr",))
    both = torch.zeros(2000)
    with pytest.raises(EmulationError, match=r"out_ptr cannot count as unwritten: .* of y_ptr"):
        run_add(y=both[1000:], out=both[:1000], unwritten=("out_ptr",))
    run_add(y=both[1000:], out=both[:1000], unwritten=("out_ptr", "y_ptr"))
    assert regions_of(launches[-1])["y_ptr, out_ptr"] is False


@needs_compiler
@pytest.mark.parametrize("order", ["lockstep", "forward", "backward"])
def test_wave_order(launches, order):
    run_add(wave_order=order)
    assert launches[0].wave_order == order


@needs_compiler
def test_views_of_one_memory_are_one_region(launches):
    array = torch.zeros(3000)
    inner = torch.from_numpy(array.numpy()[100:1100])  # a storage of its own, in the other's memory
    run_add(x=array[:1000], y=array[1000:2000], out=inner)
    (launch,) = launches
    assert [len(region.data) for region in launch.memory.regions] == [12000]
    assert launch.arguments[2] == array.data_ptr() + 400


@pytest.mark.parametrize(
    ("kind", "value", "bits"),
    [
        ("i32", -1, 0xFFFFFFFF),
        ("i64", -(2**63), 2**63),
        ("u64", 2**64 - 1, 2**64 - 1),
        ("u1", True, 1),
        ("i8", -128, 0x80),
        ("fp32", 1, 0x3F800000),
        ("fp64", -0.0, 1 << 63),
        ("fp16", 1.5, 0x3E00),
        ("bf16", 1.0078, 0x3F80),  # cut, not rounded, as Triton does
        ("*fp32", None, 0),
    ],
)
def test_values_are_encoded(kind, value, bits):
    assert KernelArgument("n", kind, value).encoded() == bits


@pytest.mark.parametrize(
    ("kind", "value"), [("i32", 2**32), ("i32", 1.5), ("i8", -129), ("fp16", 1e6), ("fp32", "x")]
)
def test_values_that_do_not_fit_are_rejected(kind, value):
    with pytest.raises(EmulationError, match=rf"Argument n = {value!r} is no value of {kind}"):
        KernelArgument("n", kind, value).encoded()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.empty(3, device="meta"), "Argument x is a tensor on meta. .* tensors on the CPU"),
        (0x1000, "Argument x is a int: the memory that it points to is not known"),
    ],
)
def test_unknown_memory_is_rejected(value, message):
    argument = KernelArgument("x", "*fp32", value)
    with pytest.raises(EmulationError, match=message):
        argument.encoded()
    with pytest.raises(EmulationError, match=message):
        memory_of([argument])


def test_empty_tensors_have_no_memory():
    assert memory_of([KernelArgument("x", "*fp32", torch.empty(0))]).regions == ()


@needs_compiler
@pytest.mark.parametrize("arch", TARGETS)
def test_results_are_written_in_place(arch):
    out = torch.full((1010,), 7.0)
    report = run_add(arch, out=out[5:1005], n=990)
    assert torch.equal(out[5:995], (X + Y)[:990])
    assert bool((out[:5] == 7).all())
    assert bool((out[995:] == 7).all())
    assert report.counts.waves == 16
    assert report.instructions >= 16 * 10  # loads, an addition and a store take that many


@needs_compiler
def test_faults_are_raised_by_the_launch():
    with pytest.raises(MemoryFault, match="x_ptr"):
        run_add(x=torch.randn(900))
    with pytest.raises(UnwrittenRead, match="y_ptr"):
        run_add(unwritten=("y_ptr",))


# The driver.


@needs_compiler
def test_every_launch_in_the_context_is_emulated(launches):
    names = []

    def hook(metadata):
        names.append(metadata.get()["name"])

    before = triton_driver.installed()
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        with emulated("gfx1201") as emulation:
            compiled = add_kernel[(4,)](X, Y, OUT, 1000, BLOCK=256)
            compiled[(2, 1, 1)](X, Y, OUT, 1000, 256)
            add_kernel[lambda meta: (meta["BLOCK"], 3)](X, Y, OUT, 1000, BLOCK=64)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert [report.grid for report in emulation.launches] == [(4, 1, 1), (2, 1, 1), (64, 3, 1)]
    assert names == ["add_kernel"] * 3
    assert f".vgpr_count:     {compiled.n_regs}" in compiled.asm["amdgcn"]
    assert triton_driver.installed() is before
    with pytest.raises(EmulationError, match=r'Launch it within `emulated\("gfx1201"\)`'):
        compiled.run(2, 1, 1, 0, None, None, None, None, None, X, Y, OUT, 1000, 256)


@needs_compiler
def test_autotuned_kernels_run_every_configuration_that_fits(launches):
    tuned = triton.autotune(
        [triton.Config({"BLOCK": 64}, num_warps=w) for w in (32, 4, 2)], key=["n"]
    )(triton.heuristics({"HALF": lambda values: values["BLOCK"] // 2})(_halves_kernel))
    with emulated("gfx942") as emulation:
        tuned[(4,)](X, OUT, 1000)
    assert [report.num_warps for report in emulation.launches] == [4, 2, 4]  # 32 waves do not fit
    assert tuned.best_config.num_warps == 4


@triton.jit
def _halves_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, HALF: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n) + HALF, i < n)


@needs_compiler
def test_kernels_of_targets_are_not_mixed(launches):
    for arch in ("gfx942", "gfx90a", "gfx942"):
        run_add(arch)
    assert [launch.assembly.target_name for launch in launches] == ["gfx942", "gfx90a", "gfx942"]


@needs_compiler
def test_contexts_nest_in_a_thread_and_exclude_other_threads(launches):
    errors = []

    def other_thread():
        try:
            run_add("gfx90a")
        except EmulationError as error:
            errors.append(str(error))

    with emulated("gfx942") as outer:
        run_add("gfx1100")
        add_kernel[(4,)](X, Y, OUT, 1000, BLOCK=256)
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert [launch.assembly.target_name for launch in launches] == ["gfx1100", "gfx942"]
    assert len(outer.launches) == 1
    assert len(errors) == 1
    assert errors[0].startswith("Another thread emulates gfx942")


@needs_compiler
def test_the_driver_is_restored_after_an_error(launches):
    before = triton_driver.installed()
    with pytest.raises(EmulationError, match="Argument y_ptr is a tensor on meta"):
        run_add(y=torch.empty(1000, device="meta"))
    assert triton_driver.installed() is before
    assert launches == []


@needs_compiler
def test_too_much_lds_is_rejected_as_on_a_gpu(launches):
    x = torch.zeros(256, 256)
    with pytest.raises(OutOfResources, match=r"shared memory, Required: 262144.*limit: 65536"):
        emulate_launch(large_kernel, (1,), [x], arch="gfx942", BLOCK=256, num_warps=8)
    assert launches == []


@needs_compiler
def test_nothing_is_taken_for_a_gpu_in_tritons_caches():
    with emulated("gfx942"):
        target = triton.runtime.driver.active.get_current_target()
    assert (target.backend, target.arch, target.warp_size) == ("hip", "gfx942", 64)
    assert repr(target) != repr(triton.backends.compiler.GPUTarget("hip", "gfx942", 64))


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "gfx900"}, "'gfx900' is not emulated. The targets are: gfx90a, gfx942"),
        ({"wave_order": "random"}, "wave_order='random' is not one of: lockstep, forward"),
    ],
)
def test_invalid_requests(arguments, message):
    with pytest.raises(EmulationError, match=message):
        run_add(**arguments)


@needs_compiler
def test_functions_that_launch_nothing_are_rejected():
    class Interpreted:
        def __getitem__(self, grid):
            return lambda *args, **more: None

    with pytest.raises(EmulationError, match=r"Interpreted .* launched nothing. If it was defined"):
        emulate_launch(Interpreted(), (1,), [], arch="gfx942")


@only_where_interpreted
def test_interpreted_kernels_are_rejected():
    with pytest.raises(EmulationError, match=r"TRITON_INTERPRET=1 .* start a new process"):
        run_add()


@pytest.mark.parametrize("missing", ["numpy", "triton"])
def test_missing_packages_name_the_extra(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from attn_dispatch.emulation import EmulationError  # needs neither
try:
    from attn_dispatch.emulation import emulated
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == f"Emulation needs {missing}: pip install 'attn-dispatch[emulate]'.\n"
