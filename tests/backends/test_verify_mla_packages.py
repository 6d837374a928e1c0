"""The conformance suite over the backends of latent attention whose kernels are other packages'.

They run over fakes of their packages, which check what the packages rely on.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends import mla_packages
from attn_dispatch.backends.cuda.flashinfer import mla as flashinfer_mla
from attn_dispatch.conformance import backend_named, checks_for, run
from attn_dispatch.interface import backend as interface_backend
from attn_dispatch.platforms import libraries
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from support import fake_flash_attn, fake_mla

EACH = ("triton", "vllm", "flash_mla", "flashinfer")
HOPPER = KNOWN_DEVICES["sm90"].with_libraries(*(Library(name, "unknown") for name in EACH))

#: In the interpreter a launch takes tenths of a second: a few checks of each kind.
CHOSEN = (
    *("declaration/", "numbers/plain", "numbers/causal=False", "lse/natural", "inputs/cached"),
    *("inputs/W_U", "scales/negative", "garbage/NaN past", "rows/no keys", "overlaps/output in"),
    *("cache/written apart", "cache/nothing after", "kv_layouts/blocks", "kv_layouts/at an odd"),
)


@pytest.fixture(params=["FLASH_ATTN_MLA", "FLASHMLA", "FLASHINFER_MLA"])
def name(request, monkeypatch):
    """Names the backend, over a fake of its package on what the builders take for an H200."""
    monkeypatch.setattr(libraries, "_broken", {})
    for cached in (flashinfer_mla._pool, flashinfer_mla.workspace):
        cached.cache_clear()
    for module in (mla_packages, flashinfer_mla, interface_backend):
        monkeypatch.setattr(module, "detect_device", lambda device: HOPPER)
    if request.param == "FLASH_ATTN_MLA":
        with fake_flash_attn.installed("vLLM's FlashAttention 3"):
            yield request.param
        return
    if request.param == "FLASHMLA":
        fake_mla.install_flash_mla(monkeypatch)
    else:
        fake_mla.install_flashinfer(monkeypatch)
    yield request.param


def test_chosen_checks_pass_over_a_fake(name):
    checks = checks_for(backend_named(name), "cpu", quick=True, profile=HOPPER)
    chosen = [check for check in checks if check.full_name.startswith(CHOSEN)]
    assert {check.spec.dtype for check in chosen} == {torch.float16}
    assert len(chosen) >= len(CHOSEN)
    outcomes = [run(check) for check in chosen]
    assert [(o.check.full_name, o.message) for o in outcomes if o.status != "passed"] == []
