"""Shared by the tests of HOPPER_ATTN: where they run, steps, and what was launched."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from unittest import mock

import pytest
import torch

from attn_dispatch.backends.cuda.hopper import backend
from attn_dispatch.backends.cuda.hopper.backend import HopperAttnBackend, HopperImpl
from attn_dispatch.backends.cuda.hopper.launch import DECODES, DecodeLaunches
from attn_dispatch.backends.cuda.hopper.plan import HopperBuilder
from attn_dispatch.backends.triton.plan import MAX_DECODE_TOKENS, Launches
from attn_dispatch.emulation.gluon.interpret import interpreted
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from support.cases import Case, Step, layer_spec
from support.paths import ROOT
from support.triton_cases import counters_are_zero

pytest.importorskip("triton")

__all__ = [
    "BATCH",
    "CACHES",
    "FEW",
    "MANY",
    "PORTABLE",
    "PROMPTS",
    "check",
    "decode_launches",
    "in_layout",
    "interpreted_decodes",
    "interpreted_prefills",
    "launched",
    "lens",
    "on_an_h200",
    "on_gpu",
    "step_of",
]

_IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
_on_hopper = pytest.mark.skipif(not _IS_HOPPER, reason="needs a Hopper GPU")
on_gpu = lambda test: pytest.mark.gpu(_on_hopper(test))

#: Decodes, a short chunk, a prompt, and a chunk whose past ends inside a tile.
BATCH = {"query_lens": (1, 20, 300, 129, 3), "seq_lens": (200, 20, 300, 600, 70)}

#: Numbers of keys of few requests and of many. A request without keys pads the batch.
FEW = (300, 2, 64, 129, 0, 700)
MANY = tuple(37 * i * i % 331 for i in range(40))
#: A prompt, and a chunk with a past: (query_len, seq_len).
PROMPTS = ((300, 300), (129, 600))


def lens(seq_lens, drafts=1, prompts=()):
    """A batch of decodes of up to `drafts` tokens each, with prompts in the middle of them."""
    requests = [(min(1 + -(i + 1) % drafts, max(1, n)), n) for i, n in enumerate(seq_lens)]
    middle = len(requests) // 2
    requests[middle:middle] = prompts
    query_lens, seq_lens = zip(*requests, strict=True)
    return {"query_lens": query_lens, "seq_lens": seq_lens}


#: Layers and batches whose decodes the portable kernel runs.
PORTABLE = {
    "fp8 cache": ({"kv_cache_dtype": "fp8_e4m3"}, lens(MANY)),
    "int8 cache": ({"kv_cache_dtype": "int8_per_token_head"}, lens(MANY)),
    "another dtype": ({"kv_cache_dtype": "float16"}, lens(MANY)),
    "blocks of 8": ({"block_size": 8}, lens(MANY)),
    "blocks of 24": ({"block_size": 24}, lens(MANY)),
    "more than 32 rows": ({"num_heads": 32}, lens(FEW, 3)),
}


def step_of(fields, batch, device):
    """A step of a layer with two KV heads of 128 in blocks of 16, and of BATCH, with changes."""
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "block_size": 16}
    spec = layer_spec(**(sizes | {"dtype": torch.bfloat16} | fields))
    return Step(Case(spec=spec, **(BATCH | batch)), device)


def check(step, returned):
    """Assert that the output, and lse if it is returned, agree with the reference."""
    output, lse = returned if step.spec.returns_lse else (returned, None)
    expected, expected_lse = step.expected()
    step.check(output, expected)
    if lse is not None:
        lse = lse[: len(expected_lse)].cpu()
        # Stored elements times their scale are rounded to the layer's dtype.
        limit = 3e-3 if step.spec.kv_cache_dtype == "auto" else 6e-3
        torch.testing.assert_close(lse, expected_lse.float(), rtol=limit, atol=limit)


#: Memory layouts of (blocks, 2, tokens, heads, size): what is allocated, the view of it, and
#: whether TMA can read it as a matrix of tokens.
CACHES = {
    "blocks apart": (lambda n, b, h, d: (2 * n, 2, b, h, d), lambda t: t[::2], True),
    "values apart": (lambda n, b, h, d: (2, n, b, h, d), lambda t: t.transpose(0, 1), True),
    "tokens apart": (lambda n, b, h, d: (n, 2, b, h + 1, d), lambda t: t[:, :, :, :-1], True),
    "heads apart": (
        lambda n, b, h, d: (n, 2, b, h, 2 * d),
        lambda t: t[..., : t.shape[-1] // 2],
        True,
    ),
    "heads first": (lambda n, b, h, d: (n, 2, h, b, d), lambda t: t.transpose(2, 3), True),
    "heads before blocks": (
        lambda n, b, h, d: (h, n, 2, b, d),
        lambda t: t.permute(1, 2, 3, 0, 4),
        True,
    ),
    "values next to keys": (lambda n, b, h, d: (n, b, 2, h, d), lambda t: t.transpose(1, 2), True),
    "elements apart": (lambda n, b, h, d: (n, 2, b, h, 2 * d), lambda t: t[..., ::2], False),
}


def in_layout(cache, name):
    """The same cache in another layout, with NaN around it."""
    shape_of, view, _ = CACHES[name]
    blocks, _, *sizes = cache.shape
    memory = torch.full(shape_of(blocks, *sizes), torch.nan, dtype=cache.dtype, device=cache.device)
    return view(memory).copy_(cache)


def launched(impl):
    """The names of the kernels that an impl launched."""
    launchers = impl._launchers.values()
    return {launcher.kernel.__name__.removesuffix("_kernel") for launcher in launchers}


def on_an_h200(step, *kv_caches):
    """What an impl launches on an H200 over each cache, and the impl; nothing runs."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    cases = importlib.import_module("compile_cases")
    builder = HopperBuilder(step.spec, step.device)
    builder.launches = Launches.of(step.spec, KNOWN_DEVICES["sm90"])
    impl, metadata = step.impl_of(HopperAttnBackend), builder.build(step.batch)
    with cases.recorded() as launches:
        for kv_cache in kv_caches:
            impl.forward(step.layer, step.query, step.key, step.value, kv_cache, metadata)
    return launches, impl


def interpreted_prefills(step, **options):
    """What HOPPER_ATTN returns if its prefill kernel is interpreted; decodes are the reference's.

    `options` are those of `interpreted`.
    """
    builder = HopperBuilder(step.spec, step.device)
    builder.launches = Launches.of(step.spec, KNOWN_DEVICES["sm90"])
    impl, metadata = step.impl_of(HopperAttnBackend), builder.build(step.batch)
    metadata.prefill.shares = None  # kernels run one after another
    with interpreted(**options) as launched, mock.patch.object(HopperImpl, "_decode"):
        tensors = (step.query, step.key, step.value, step.kv_cache)
        returned = impl.forward(step.layer, *tensors, metadata)
    assert launched == ["hopper_prefill_kernel"]
    if metadata.decode is not None:
        _replace_rows(step, returned, lambda query_len: query_len <= MAX_DECODE_TOKENS)
    return returned


def interpreted_decodes(step, num_sms, row=None, **options):
    """What HOPPER_ATTN returns if its decode kernel is interpreted; prefills are the reference's.

    Args:
        num_sms: of the device: each of the kernel's rows of `DECODES` has some blocks on an SM.
        row: "many", "few" or "mixed": of `DECODES`; by default the backend decides.
        options: those of `interpreted`.
    """
    builder = HopperBuilder(step.spec, step.device)
    launches = Launches.of(step.spec, KNOWN_DEVICES["sm90"])
    builder.launches = dataclasses.replace(launches, num_sms=num_sms)
    impl, metadata = step.impl_of(HopperAttnBackend), builder.build(step.batch)
    if getattr(metadata.prefill, "shares", None):
        metadata.prefill.shares = None  # kernels run one after another
    rows = DECODES
    if row is not None:
        rows = {size: DecodeLaunches(*[getattr(each, row)] * 3) for size, each in DECODES.items()}
    with (
        interpreted(**options) as launched,
        mock.patch.object(HopperImpl, "_prefill"),
        mock.patch.object(backend, "DECODES", rows),
    ):
        tensors = (step.query, step.key, step.value, step.kv_cache)
        returned = impl.forward(step.layer, *tensors, metadata)
    assert launched == ["hopper_decode_kernel"]
    assert counters_are_zero(metadata)
    _replace_rows(step, returned, lambda query_len: query_len > MAX_DECODE_TOKENS)
    return returned


def _replace_rows(step, returned, are_replaced):
    """Write the expected rows of requests of some query lengths."""
    results = returned if step.spec.returns_lse else (returned,)
    rows = [are_replaced(n) for n in step.batch.query_lens for _ in range(n)]
    for result, expected in zip(results, step.expected(), strict=False):
        result[: len(rows)][rows] = expected[rows].to(result.dtype)


def decode_launches(impl):
    """The DecodeLaunches of the Hopper decode kernel that an impl used."""
    return [name[3] for name in impl._launchers if name[0] == "hopper decode"]
