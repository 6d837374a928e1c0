"""Any finite scale and any positive finite soft cap gives the numbers of float64."""

from __future__ import annotations

import math

import pytest
import torch

from attn_dispatch import InvalidInputError, attention
from support.triton_cases import DEVICE, needs_gpu

CAPS = [5e-324, 1e-300, 1e-40, 1e-6, 0.5, 30.0, 300.0, 1e4, 1e7, 1e20, 1e38, 1e60, 1e300]
SCALES = [0.0, -0.0, -0.3, -1.0, 1e-300, -1e-30, 1e-12, 3.0]


def tensors(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(9, h, 32, generator=generator).to(device, dtype) for h in (4, 2, 2)]


def oracle(given, **options):
    exact = [t.cpu().double() for t in given]
    return attention(*exact, backend="REFERENCE", return_lse=True, **options)


def triton(given, **options):
    """TRITON_ATTN, on a CPU in the interpreter, where it is never selected."""
    from attn_dispatch.backends.triton.backend import TritonAttnBackend
    from attn_dispatch.interface.batch import AttentionBatch
    from attn_dispatch.interface.quantization import KVScales
    from attn_dispatch.interface.spec import AttentionSpec

    query, key, value = given
    cap = options.get("logits_soft_cap")
    spec = AttentionSpec(
        num_heads=4, num_kv_heads=2, head_size=32, dtype=query.dtype, returns_lse=True,
        logits_soft_cap=cap,
    )  # fmt: skip
    impl = TritonAttnBackend.get_impl_cls()(
        4, 32, options.get("scale", 32**-0.5), 2, logits_soft_cap=cap, returns_lse=True
    )
    builder = TritonAttnBackend.get_builder_cls()(spec, query.device)
    batch = AttentionBatch.create([9], [9], device=query.device)
    return impl.forward(KVScales(), query, key, value, None, builder.build(batch))


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_reference_with_any_cap(cap, factor):
    given = tensors(torch.float32)
    options = {"logits_soft_cap": cap, "scale": factor * 32**-0.5}
    found = attention(*given, backend="REFERENCE", return_lse=True, **options)
    for one, other in zip(found, oracle(given, **options), strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_triton_attn_with_any_cap(cap, factor, dtype):
    given = tensors(dtype, DEVICE)
    options = {"logits_soft_cap": cap, "scale": factor * 32**-0.5}
    rounding = 2e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(triton(given, **options), oracle(given, **options), strict=True):
        torch.testing.assert_close(one.cpu().double(), other.double(), atol=rounding, rtol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_triton_attn_with_any_scale(scale, dtype):
    given = tensors(dtype, DEVICE)
    rounding = 2e-5 if dtype == torch.float32 else 4e-3
    found, expected = triton(given, scale=scale), oracle(given, scale=scale)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other.double(), atol=rounding, rtol=rounding)


@pytest.mark.parametrize("backend", ["REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("slopes", [None, [0.5, 0.1, 0.3, 0.2]], ids=["plain", "alibi"])
@pytest.mark.parametrize("causal", [True, False])
def test_any_scale(backend, scale, slopes, causal):
    given = tensors(torch.float32)
    options = {"scale": scale, "alibi_slopes": slopes, "causal": causal}
    found = attention(*given, backend=backend, **options)
    torch.testing.assert_close(found.double(), oracle(given, **options)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, "1", "", None, True])
def test_nonfinite_scale_is_rejected(scale):
    from attn_dispatch.backends.reference.torch_ref import ReferenceImpl

    with pytest.raises(InvalidInputError, match="scale"):
        ReferenceImpl(2, 8, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [1e-40, 1e-6, 0.5, 30.0, 1e7, 1e38, 1e300])
@pytest.mark.parametrize("backend", ["TRITON_ATTN", "HOPPER_ATTN"])
@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-30, 0.125])
def test_on_a_gpu(backend, cap, scale, dtype):
    from attn_dispatch import UnsupportedError

    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(300, h, 64, generator=generator).to("cuda", dtype) for h in (4, 2, 2)]
    options = {"scale": scale, "logits_soft_cap": cap}
    try:
        found = attention(*given, backend=backend, **options)
    except UnsupportedError as error:
        pytest.skip(str(error))
    expected = oracle(given, **options)[0]
    torch.testing.assert_close(found.cpu().double(), expected, atol=3e-2, rtol=3e-2)


test_on_a_gpu = needs_gpu[0](needs_gpu[1](test_on_a_gpu))
