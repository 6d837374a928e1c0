"""The interpreter of Gluon: small kernels, what is asynchronous in them, and `verify` on sm90."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton", minversion="3.6")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_dispatch.backends.cuda.hopper.paged_tma import tma_descriptor
from attn_dispatch.backends.cuda.hopper.tma_ring import barrier, load_tile, mma_layout, row_layout
from attn_dispatch.cli import app
from attn_dispatch.conformance.emulated import EmulatedDevice
from attn_dispatch.emulation import EmulationError
from attn_dispatch.emulation.gluon.interpret import interpret, interpreted
from attn_dispatch.errors import InvalidInputError

_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def _product(a_desc, b_ptr, out_ptr, BYTES: gl.constexpr, FENCE: gl.constexpr, WAIT: gl.constexpr):
    """out = a @ b.T: a is loaded by TMA, b by threads; 64 by 64 each."""
    a = gl.allocate_shared_memory(gl.float16, [64, 64], _TILE)
    b = gl.allocate_shared_memory(gl.float16, [64, 64], _TILE)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    mbarrier.expect(full, BYTES)
    load_tile(a_desc, [0, 0], full, a)
    LAYOUT: gl.constexpr = row_layout(64)
    r = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    at = r[:, None] * 64 + c[None, :]
    b.store(gl.load(b_ptr + at))
    if FENCE:
        fence_async_shared()
    mbarrier.wait(full, 0)
    zero = gl.zeros([64, 64], gl.float32, mma_layout(64))
    out = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    if WAIT:
        out = warpgroup_mma_wait(0, deps=[out])
    gl.store(out_ptr + at, gl.convert_layout(out, LAYOUT))


def product(seed=0, num_bytes=8192, fence=True, wait=True):
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=random).half() for _ in range(2))
    out = torch.empty(64, 64)
    constants = {"BYTES": num_bytes, "FENCE": fence, "WAIT": wait}
    desc = tma_descriptor(a, a.shape, 64, (64, 64))
    interpret(_product, (1,), (desc, b, out), constants, seed=seed, lateness=seed / 3)
    torch.testing.assert_close(out, a.float() @ b.float().T)


@pytest.mark.parametrize("seed", range(4))
def test_a_product(seed):
    product(seed)


def test_what_is_asynchronous_is_checked():
    for changes, message in (
        ({"num_bytes": 8200}, r"program \(0, 0, 0\) waits for phase 0 of allocation 3 of program"),
        ({"num_bytes": 8184}, "More bytes landed than allocation 3"),
        ({"fence": False}, "stored without a fence_async_shared"),
        ({"wait": False}, "used before a wait"),
    ):
        with pytest.raises(EmulationError, match=message):
            product(**changes)


@gluon.jit
def _sum_of_programs(x_ptr, out_ptr, counter_ptr, SEM: gl.constexpr, BARRIERS: gl.constexpr):
    """Each program stores a number; the last one adds all of them."""
    program = gl.program_id(0)
    gl.store(x_ptr + program, program * program)
    if BARRIERS:
        barrier()
    before = gl.atomic_add(counter_ptr, 1, sem=SEM, scope="gpu")
    if before == gl.num_programs(0) - 1:
        if BARRIERS:
            barrier()
        total = gl.to_tensor(0)
        for i in range(gl.num_programs(0)):
            total += gl.load(x_ptr + i)
        gl.store(out_ptr, total)


def sum_of_programs(seed=0, sem="acq_rel", barriers=True):
    x, out, counter = (torch.zeros(n, dtype=torch.int32) for n in (5, 1, 1))
    constants = {"SEM": sem, "BARRIERS": barriers}
    interpret(_sum_of_programs, (5,), (x, out, counter), constants, seed=seed)
    assert out.item() == 0 + 1 + 4 + 9 + 16


@pytest.mark.parametrize("seed", range(4))
def test_programs_see_what_was_released(seed):
    sum_of_programs(seed)


@pytest.mark.parametrize("sem", ["acquire", "release", "relaxed"])
def test_programs_need_not_see_what_was_not_released_or_acquired(sem):
    with pytest.raises(EmulationError, match=r"program .* loads what program .* stored"):
        sum_of_programs(sem=sem)


def test_the_threads_of_a_program_need_barriers_around_an_atomic():
    with pytest.raises(EmulationError, match="need not see it"):
        sum_of_programs(barriers=False)


@gluon.jit
def _wait_for_each_other(counter_ptr):
    while gl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") == 0:
        pass


@gluon.jit
def _unknown(x_ptr):
    gl.store(x_ptr, gl.erf(gl.load(x_ptr)))


@gluon.jit
def _scan(x_ptr, out_ptr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, 32, LAYOUT)
    gl.store(out_ptr + i, gl.associative_scan(gl.load(x_ptr + i), 0, _last))


@gluon.jit
def _last(a, b):
    return gl.where(b != 0, b, a)


def test_a_scan_combines_in_order():
    x = torch.randint(0, 2, (32,), generator=torch.Generator().manual_seed(0)).int()
    x *= torch.arange(1, 33, dtype=torch.int32)
    out = torch.empty_like(x)
    interpret(_scan, (1,), (x, out), {})
    last, expected = 0, []
    for number in x.tolist():
        last = number or last
        expected.append(last)
    assert out.tolist() == expected


def test_programs_that_wait_forever_are_reported():
    with pytest.raises(EmulationError, match=r"Nothing can go on: program .* a change of the 0"):
        interpret(_wait_for_each_other, (2,), (torch.zeros(1, dtype=torch.int32),), {})


def test_what_is_not_interpreted_is_named():
    with pytest.raises(EmulationError, match=r"does not have gl\.erf"):
        interpret(_unknown, (1,), (torch.zeros(1),), {})


def test_launches_are_interpreted_within_a_context_only():
    out = torch.zeros(1, dtype=torch.int32)
    arguments = torch.zeros(3, dtype=torch.int32), out, torch.zeros(1, dtype=torch.int32)
    with interpreted(programs=3) as launched:
        _sum_of_programs[(99,)](*arguments, SEM="acq_rel", BARRIERS=True, num_warps=4)
    assert launched == ["_sum_of_programs"]
    assert out.item() == 5


@pytest.mark.parametrize(
    ("backend", "kernels"),
    [
        ("HOPPER_ATTN", ["hopper_decode_kernel", "hopper_prefill_kernel"]),
        ("HOPPER_MLA", ["hopper_mla_kernel"]),
    ],
)
def test_verify_on_sm90(backend, kernels):
    arguments = ["verify", backend, "--emulate", "sm90", "--quick", "--only", "layer/eager"]
    done = CliRunner().invoke(app, arguments)
    text = " ".join(done.output.split())
    assert done.exit_code == 0, text
    assert f"{backend} on sm90 (interpreted): 1 checks, none failed" in text
    assert all(f"{kernel} " in text.partition("sm90: launches of")[2] for kernel in kernels)
    assert text.endswith("no compiler and no hardware.")


_WITHOUT_THE_VARIABLE = """
import torch, triton.language as tl
from attn_dispatch.backends.triton.operands import is_interpreted
from attn_dispatch.emulation.gluon.interpret import interpreted
from triton.runtime.jit import JITFunction
from typer.testing import CliRunner
from attn_dispatch.cli import app

owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, JITFunction)
before = [dict(vars(owner)) for owner in owners]
assert isinstance(tl.sum, JITFunction) and not is_interpreted()
arguments = "verify HOPPER_ATTN --emulate sm90 --quick --only layer/eager"
done = CliRunner().invoke(app, arguments.split())
assert done.exit_code == 0, done.output
assert "1 checks, none failed" in " ".join(done.output.split()), done.output
assert [dict(vars(owner)) for owner in owners] == before and not is_interpreted()
"""


def test_a_process_in_which_triton_compiles_interprets_too():
    """As on a machine with a GPU. Triton's language is unchanged afterwards: it must compile."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THE_VARIABLE],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_sm90_has_no_addressing():
    with pytest.raises(InvalidInputError, match="sm90 has no addressing"):
        EmulatedDevice.named("sm90", "mixed")
