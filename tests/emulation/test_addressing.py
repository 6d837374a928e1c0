"""TRITON_ATTN with buffer instructions for all tensors, for all but the cache, and for none."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.triton.backend import TritonAttnBackend
from attn_dispatch.conformance.check import BackendUnderTest
from attn_dispatch.conformance.emulated import EmulatedDevice
from attn_dispatch.errors import InvalidInputError
from support.compiling import needs_compiler


def loads_and_stores(arch: str, addressing: str) -> dict[str, Counter[str]]:
    """Kernel -> how often it executed buffer and global loads and stores, in a step."""
    device = EmulatedDevice.named(arch, addressing)
    with device.running() as emulation:
        target = BackendUnderTest(
            TritonAttnBackend,
            device.torch_device,
            device.profile,
            min_cache_bytes=device.min_cache_bytes,
        )
        spec = target.base.replace(dtype=torch.bfloat16)
        target.run_and_judge(target.step(spec, query_lens=(1, 20), seq_lens=(40, 50)))
    found = {}
    for launch in emulation.launches:
        kinds = Counter[str]()
        for opcode, times in launch.counts.instructions.items():
            kind, _, rest = opcode.partition("_")
            if rest.startswith(("load", "store")):
                kinds[kind] += times
        found[launch.kernel] = kinds
    return found


@pytest.mark.emulated
@needs_compiler
def test_each_addressing_uses_its_instructions():
    found = {kind: loads_and_stores("gfx942", kind) for kind in ("buffer", "mixed", "global")}
    kernels = {"write_kv_kernel", "decode_kernel", "prefill_kernel"}
    assert all(set(each) == kernels for each in found.values())
    for kernel in kernels:
        assert found["global"][kernel]["buffer"] == 0
        assert found["global"][kernel]["global"] > 0
        # Keys are read from the cache, and written to it, by other instructions than the rest.
        assert found["mixed"][kernel]["buffer"] > 0
        assert found["mixed"][kernel]["global"] > found["buffer"][kernel]["global"]


@needs_compiler
def test_other_names_are_rejected():
    with pytest.raises(InvalidInputError, match="'large' is no addressing"):
        EmulatedDevice.named("gfx942", "large")
