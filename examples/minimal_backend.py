"""A backend in one file: register it, see it picked, see it rejected, compare it.

    python examples/minimal_backend.py

A package of its own has no `main`. It names the class in its pyproject.toml instead:

    [project.entry-points."attn_dispatch.backends"]
    MINIMAL = "minimal_backend:MinimalBackend"

Selection finds the backend once such a package is installed; no import is needed.
"""

from __future__ import annotations

import torch

from attn_dispatch import attention, register_backend, resolve
from attn_dispatch.interface import (
    ANY,
    AttentionBackend,
    AttentionSpec,
    AttentionType,
    BatchMetadata,
    Capabilities,
    DeviceMatch,
    ForwardArgs,
    OneOf,
    UnquantizedImpl,
    UnsupportedError,
)

__all__ = ["MinimalBackend", "MinimalImpl"]


class MinimalImpl(UnquantizedImpl[BatchMetadata]):
    """Causal attention, one request after another, with or without a soft cap."""

    def _attend(
        self, args: ForwardArgs[BatchMetadata], output: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        batch = args.metadata.batch
        output.zero_()  # a row that sees no key is 0
        for request, seq_len in enumerate(batch.seq_lens_list):
            rows = slice(*batch.query_start_list[request : request + 2])
            if seq_len and rows.start < rows.stop:
                keys, values = args.request_kv(request, torch.float32)
                output[rows] = self._one_request(args.query[rows].float(), keys, values)

    def _one_request(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """(query_len, num_heads, head_size_v); the queries are the last of the keys' tokens."""
        group_size = self.num_heads // self.num_kv_heads
        keys, values = (t.repeat_interleave(group_size, dim=1) for t in (keys, values))
        scores = self.scale * torch.einsum("qhd,khd->hqk", query, keys)
        if self.logits_soft_cap is not None:
            scores = self.logits_soft_cap * torch.tanh(scores / self.logits_soft_cap)
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(len(keys) - len(query) + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        weights = weights.masked_fill(hidden, 0.0)  # a row that sees no key is 0, not NaN
        return torch.einsum("hqk,khd->qhd", weights, values)


class MinimalBackend(AttentionBackend):
    """The declaration. It needs no metadata or builder of its own."""

    interface_version = 2
    name = "MINIMAL"
    impl_cls = MinimalImpl
    # Everything else is rejected: sinks, windows, ALiBi, quantized outputs and the rest.
    capabilities = Capabilities(
        devices=(
            DeviceMatch(vendor="cpu"),
            DeviceMatch(vendor="nvidia"),
            DeviceMatch(vendor="amd"),
        ),
        requires=("torch>=2.10",),
        num_heads=ANY,
        num_kv_heads=ANY,
        head_size=ANY,
        head_size_v=ANY,
        dtype=OneOf(torch.float32, torch.bfloat16, torch.float16),
        block_size=ANY,
        kv_cache_layout=OneOf(None, "NHD", "HND"),
        attn_type=OneOf(AttentionType.DECODER),
        causal=OneOf(True),
        logits_soft_cap=ANY,
    )


def main() -> None:
    """Register the backend and show what changes."""
    register_backend(MinimalBackend)

    # TORCH_SDPA does not support a soft cap, and plugins come before REFERENCE.
    capped = AttentionSpec(
        num_heads=8, num_kv_heads=2, head_size=64, dtype=torch.float32, logits_soft_cap=30.0
    )
    print(f"with a soft cap: {resolve(capped, 'cpu').name}")

    # Sinks are not declared, so an override does not make the backend drop them.
    with_sinks = capped.replace(sinks=True)
    print(f"and with sinks:  {resolve(with_sinks, 'cpu').name}")
    try:
        resolve(with_sinks, "cpu", backend="MINIMAL")
    except UnsupportedError as error:
        print(f"\nMINIMAL required for sinks:\n{error}\n")

    torch.manual_seed(0)
    query, key, value = (torch.randn(7, heads, 64) for heads in (8, 2, 2))
    outputs = [
        attention(query, key, value, query_lens=[3, 4], logits_soft_cap=30.0, backend=name)
        for name in ("MINIMAL", "REFERENCE")
    ]
    assert isinstance(outputs[0], torch.Tensor)
    torch.testing.assert_close(outputs[0], outputs[1])
    print("MINIMAL and REFERENCE agree")


if __name__ == "__main__":
    main()
