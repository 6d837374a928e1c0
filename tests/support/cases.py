"""Engine steps for tests, and how close to the oracle a result must be.

attn_dispatch.conformance defines the steps and makes their tensors, and tests any backend with
them. This module adds what only this repository's tests need.
"""

from __future__ import annotations

import contextlib
import math
import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_dispatch.backends.reference.torch_sdpa import MathPathWarning
from attn_dispatch.conformance.cases import FP8, INT8, Case, layer_spec
from attn_dispatch.conformance.engine_step import GARBAGE_BLOCKS, MEMORY, EngineStep
from attn_dispatch.conformance.harness import call, layer_of
from attn_dispatch.conformance.kv_encoding import (
    as_stored,
    dequantized,
    encoded_parts,
    int8_rows,
    nan_cache,
    stored_size,
)
from attn_dispatch.selection.registry import registry
from support import scalar_oracle

__all__ = [
    "FP8",
    "GARBAGE_BLOCKS",
    "INT8",
    "MEMORY",
    "Case",
    "Step",
    "as_stored",
    "call",
    "dequantized",
    "encoded_parts",
    "fused_on_cpu",
    "int8_rows",
    "layer_of",
    "layer_spec",
    "nan_cache",
    "stored_size",
]


class Step(EngineStep):
    """A step that runs backends by name, with further oracles."""

    def run(self, backend, **forward):
        """The result of the backend's forward, over a copy of the cache."""
        cls = registry.candidates()[backend].backend_cls
        cache = None if self.kv_cache is None else self.kv_cache.clone()
        return self.forward(cls, cache, **forward)

    def expected(self, **changes):
        """(output, lse) by the suite's oracle, lse in the float32 that backends return."""
        output, lse = super().expected(**changes)
        return output, lse.float()

    def naive(self):
        """(output, lse) of the batch's tokens in float64, one score at a time."""
        spec, outputs, lses = self.spec, [], []
        for request, query in enumerate(self.queries):
            output, lse = scalar_oracle.attention_of_request(
                query,
                self.keys[request],
                self.values[request],
                scale=self.scale,
                causal=spec.causal,
                window=spec.sliding_window,
                sides=spec.window_size,
                chunk=spec.attention_chunk,
                shard=self._shard(request),
                cap=spec.logits_soft_cap,
                slopes=self.slopes,
                symmetric=spec.alibi == "symmetric",
                sinks=None if self.sinks is None else self.sinks.tolist(),
                ranges=self.ranges_of(request),
                mask=None if self.masks is None else self.masks[request],
            )
            outputs.append(output)
            lses.append(lse)
        return _joined(outputs, spec, torch.float64), torch.cat(
            [torch.zeros(0, spec.num_heads).double(), *lses]
        )

    def _shard(self, request):
        """(offset, step, length) of a request's keys, as the scalar oracle takes them."""
        if self.case.positions is None:
            return None
        offset, step, lengths = self.case.positions
        return offset, step, lengths[request]

    def pytorch(self):
        """The output by PyTorch's own attention in the layer's dtype, ALiBi as its bias."""
        spec, outputs = self.spec, []
        group = spec.num_heads // spec.num_kv_heads
        for request, query in enumerate(self.queries):
            if not len(query) or not len(self.keys[request]):
                outputs.append(torch.zeros(len(query), spec.num_heads, spec.head_size_v))
                continue
            bias = self._bias(request)
            q, k, v = (
                t.transpose(0, 1)[None].to(self.device, spec.dtype)
                for t in (
                    query,
                    self.keys[request].repeat_interleave(group, 1),
                    self.values[request].repeat_interleave(group, 1),
                )
            )
            result = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias[None].to(self.device, spec.dtype), scale=self.scale
            )
            without_keys = (bias == -math.inf).all(-1)[..., None]
            outputs.append(result[0].cpu().masked_fill(without_keys, 0.0).transpose(0, 1))
        return _joined(outputs, spec, spec.dtype)

    def _bias(self, request):
        """(num_heads, query_len, seq_len) float64: the mask and ALiBi bias for PyTorch."""
        num_queries, num_keys = len(self.queries[request]), len(self.keys[request])
        offset, step, length = self._shard(request) or (0, 1, num_keys)
        positions = torch.arange(length - num_queries, length)[:, None]
        distance = offset + step * torch.arange(num_keys) - positions
        if self.spec.alibi == "symmetric":
            distance = -distance.abs()
        slopes = torch.tensor(self.slopes or [0.0] * self.spec.num_heads).double()
        return (slopes[:, None, None] * distance).masked_fill(~self.seen_by(request), -math.inf)

    def check(self, output, expected=None):
        """Assert that an output is as close to `expected` as the layer's dtype allows.

        float64 and float32: to a few roundings. The 16-bit types: at most twice the error that
        PyTorch's own attention has in that dtype, plus one unit in the last place.
        """
        expected = self.expected()[0] if expected is None else expected
        actual = output[: len(expected)].double().cpu()
        assert actual.shape == expected.shape
        largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        dtype = self.spec.dtype
        allowed = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype)
        if allowed is None:
            own = 0.0
            if self.spec.logits_soft_cap is None and not self.spec.sinks:
                own = _distance(self.pytorch().double(), expected)
            allowed = 2 * own + torch.finfo(dtype).eps
        found = _distance(actual, expected)
        assert found <= allowed * largest, f"off by {found:.3g}; {allowed * largest:.3g} is allowed"


@contextlib.contextmanager
def fused_on_cpu(device):
    """On a CPU, allow only PyTorch's fused kernel; on other devices a shape may need another."""
    if device.type != "cpu":
        yield
        return
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        warnings.simplefilter("error", MathPathWarning)
        yield


def _distance(actual, expected):
    assert not actual.isnan().any(), "there is NaN in the output"
    return (actual - expected).abs().max().item() if expected.numel() else 0.0


def _joined(outputs, spec, dtype):
    return torch.cat([torch.zeros(0, spec.num_heads, spec.head_size_v, dtype=dtype), *outputs])
