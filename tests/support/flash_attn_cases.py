"""What the tests of FLASH_ATTN share: single providers, steps, and their expected results."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from support.cases import Case, Step, layer_spec
from support.fake_flash_attn import installed

pytest.importorskip("triton", minversion="3.6")

from attn_dispatch.backends.cuda.flash_attn import backend as flash_attn
from attn_dispatch.backends.cuda.flash_attn import providers as flash_attn_providers
from attn_dispatch.backends.cuda.flash_attn.backend import FlashAttnBackend, FlashAttnImpl
from attn_dispatch.backends.cuda.flash_attn.providers import PROVIDERS, rejections
from attn_dispatch.interface import backend as interface_backend
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library, library_name

BY_NAME = {provider.name: provider for provider in PROVIDERS}
VLLM_3, OWN_3, SGLANG_3, OWN_4, VLLM_4, OWN_2, VLLM_2 = BY_NAME
DTYPES = (torch.bfloat16, torch.float16)
each_provider = pytest.mark.parametrize("name", BY_NAME)
#: One provider for each form of a call.
each_kind = pytest.mark.parametrize("name", [VLLM_3, OWN_3, OWN_4, OWN_2, VLLM_2])


def profile_for(provider):
    """A device that a provider supports, with the libraries that it needs and no others."""
    device = next(device for device in KNOWN_DEVICES.values() if provider.runs_on(device))
    names = map(library_name, provider.capabilities.requires)
    return device.with_libraries(*(Library(name, "unknown") for name in names))


def on_device(profile):
    """A context in which the builder detects this device."""
    stack = contextlib.ExitStack()
    for module in (flash_attn, interface_backend):
        stack.enter_context(mock.patch.object(module, "detect_device", return_value=profile))
    return stack


def only(name):
    """A context without other providers: vLLM has three."""
    return mock.patch.object(flash_attn_providers, "PROVIDERS", (BY_NAME[name],))


@contextlib.contextmanager
def provided(name):
    """A context in which only this provider's fake is installed. Yields its Recorder."""
    with only(name), installed(name) as recorder, on_device(profile_for(BY_NAME[name])):
        yield recorder


#: A supported value for each field that a provider may reject.
FITTING = {
    "head_size": 64,
    "head_size_v": None,
    "block_size": 16,
    "num_kv_heads": None,
    "alibi": False,
    "sinks": False,
    "kv_cache_dtype": "auto",
    "cuda_graph": False,
    "sliding_window": None,
}


def fitted(spec, provider):
    """The spec with only those fields changed that the provider rejects."""
    device = profile_for(provider)
    for _ in range(10):
        reasons = rejections(provider, spec, device)
        if not reasons:
            return spec
        changes = {reason.field: FITTING[reason.field] for reason in reasons}
        if "block_size" in changes and spec.block_size == 16:
            changes["block_size"] = 256
        if "num_kv_heads" in changes:
            changes["num_kv_heads"] = spec.num_heads
        if "sliding_window" in changes:  # the reason is one for both kinds of window
            changes["window_size"] = None
        spec = spec.replace(**changes)
    raise AssertionError(f"{spec} does not fit: {reasons}")


def check(step, returned, expected=None):
    """Assert that output and lse, if it is returned, are as expected: by default, REFERENCE's."""
    output, lse = returned if step.spec.returns_lse else (returned, None)
    wanted, wanted_lse = step.expected() if expected is None else expected
    step.check(output, wanted)
    if lse is not None:
        assert lse.dtype == torch.float32
        found = lse[: len(wanted_lse)].cpu()
        torch.testing.assert_close(found, wanted_lse.float(), rtol=3e-3, atol=3e-3)


def forward(step, metadata=None, **more):
    """The backend's result, over a copy of the cache."""
    impl = FlashAttnImpl(**step.impl_arguments())
    if metadata is None:
        metadata = FlashAttnBackend.get_builder_cls()(step.spec, step.device).build(step.batch)
    cache = None if step.kv_cache is None else step.kv_cache.clone()
    return impl.forward(step.layer, step.query, step.key, step.value, cache, metadata, **more)


#: Two decodes, drafts to verify, a prompt, a chunk of one, nothing, more queries than fit a page.
MIXED = {"query_lens": (1, 1, 3, 24, 18, 0, 40), "seq_lens": (39, 4, 21, 24, 50, 0, 40)}
DECODES = {"query_lens": (1, 1, 1, 1), "seq_lens": (39, 1, 300, 17)}
FEATURES = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"sliding_window": 7},
    "window of one": {"sliding_window": 1},
    "window both ways": {"causal": False, "sliding_window": 7},
    "endless window": {"sliding_window": 2**40},
    "soft cap": {"logits_soft_cap": 1.5},
    "alibi": {"alibi": True},
    "alibi, soft cap, window": {"alibi": True, "logits_soft_cap": 1.5, "sliding_window": 20},
    "symmetric alibi": {"alibi": "symmetric", "causal": False, "returns_lse": True},
    "symmetric alibi, soft cap, window": {
        "alibi": "symmetric",
        "causal": False,
        "logits_soft_cap": 1.5,
        "sliding_window": 20,
    },
    "sinks": {"sinks": True, "sliding_window": 9},
    "lse": {"returns_lse": True},
    "no shared heads": {"num_kv_heads": 4},
    "one KV head": {"num_kv_heads": 1},
    "HND": {"kv_cache_layout": "HND"},
    "sharing": {"kv_sharing": True},
    "192 and 128": {"head_size": 192, "head_size_v": 128},
    "64 and 256": {"head_size": 64, "head_size_v": 256},
    "no cache": {"block_size": None, "returns_lse": True},
    "captured": {"cuda_graph": True, "sliding_window": 20},
}


def spec_of(name, dtype=torch.bfloat16, **fields):
    """A layer's spec with a block size that the provider supports."""
    block_size = 256 if name == OWN_2 else 16
    sizes = {"head_size": 64, "block_size": block_size, "dtype": dtype}
    return layer_spec(**(sizes | fields))


def step_of(name, fields, lengths, device="cpu", **more):
    spec = spec_of(name, **fields)
    case = Case(spec=spec, **lengths, **more)
    if spec.block_size is None:
        case = case.replace(seq_lens=case.query_lens, new_lens=None)
    return Step(case, device)


def supported(name, spec):
    """Skip what the provider rejects; test_limits covers that."""
    reasons = rejections(BY_NAME[name], spec, profile_for(BY_NAME[name]))
    if reasons:
        pytest.skip(str(reasons[0]))


def nan_step(name, fields, lengths, victim, device="cpu"):
    """A step with one request of NaN; `wanted` is the result without the NaN."""
    step = step_of(name, fields, {"query_lens": lengths, "seq_lens": lengths}, device, padding=5)
    step.wanted = step.expected()[0]
    rows = rows_of(step, victim)
    for tensor in (step.query, step.key, step.value):
        tensor[rows] = torch.nan
        tensor[sum(lengths) :] = torch.nan  # padding
    return step


def rows_of(step, request):
    starts = step.batch.query_start_list
    return slice(starts[request], starts[request + 1])


def check_all_but(step, output, victim):
    """Assert that the other requests have the expected results."""
    kept = torch.ones(len(step.wanted), dtype=torch.bool)
    kept[rows_of(step, victim)] = False
    found = output[: len(kept)].double().cpu()[kept]
    torch.testing.assert_close(found, step.wanted[kept], rtol=0, atol=0.02)


def calls_of(recorder):
    return [call for name, call in recorder.calls if name != "get_scheduler_metadata"]
