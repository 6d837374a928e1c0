"""Each backend at the sizes of real models: thousands of keys, odd windows, every head size.

It is verify's group `real_sizes`, by the packages that are installed. Needs a GPU.
"""

from __future__ import annotations

import pytest
import torch

from attn_dispatch.conformance import backend_named, verify
from attn_dispatch.errors import BackendFailure, UnsupportedError

BACKENDS = ("TRITON_ATTN", "HOPPER_ATTN", "FLASH_ATTN", "FLASHINFER", "TORCH_VARLEN")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_long_requests_agree_with_the_oracle_in_every_row(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    try:
        report = verify(backend_named(name), "cuda", only="real_sizes/")
    except (UnsupportedError, BackendFailure) as error:
        pytest.skip(str(error))
    failed = [
        f"{each.check.name}: {each.message}" for each in report.outcomes if each.status == "failed"
    ]
    assert not failed, "\n".join(failed)
    assert any(each.status == "passed" for each in report.outcomes)
