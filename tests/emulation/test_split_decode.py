"""The parts of a split decode are stored before another program merges them."""

from __future__ import annotations

from unittest import mock

import pytest

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.backends.triton.plan import Launches
from attn_dispatch.conformance.check import BackendUnderTest
from attn_dispatch.conformance.emulated import EmulatedDevice
from attn_dispatch.emulation import WaitFault
from support.compiling import needs_compiler

pytestmark = [pytest.mark.emulated, needs_compiler]


def run_split_decode(arch: str) -> None:
    device = EmulatedDevice.named(arch)
    with device.running() as emulation:
        target = BackendUnderTest(TritonAttnBackend, device.torch_device, device.profile)
        spec = target.base.replace(head_size=128)  # a program of smaller heads has one wave
        step = target.step(spec, query_lens=(1,), seq_lens=(700,))
        target.run_and_judge(step)
        assert "atomic_add" in " ".join(emulation.launches[-1].counts.instructions)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_one_threads_release_after_a_barrier_is_too_little_on_cdna(arch):
    """What the kernel did until 2026-11-27: other waves' stores may arrive after the atomic."""
    run_split_decode(arch)
    with (
        mock.patch.object(Launches, "releasing_threads", return_value=0),
        pytest.raises(WaitFault, match=r"part_out_ptr.* still in flight"),
    ):
        run_split_decode(arch)
