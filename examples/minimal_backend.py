"""A backend in one file: register it, see it picked, see it refused, compare it.

    python examples/minimal_backend.py

A package of its own would leave `main` out and name the class in its pyproject.toml instead:

    [project.entry-points."attn_dispatch.backends"]
    MINIMAL = "minimal_backend:MinimalBackend"

Once such a package is installed, selection finds the backend; nobody has to import it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_dispatch import (
    ANY,
    AttentionBackend,
    AttentionBatch,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionSpec,
    AttentionType,
    Capabilities,
    DeviceMatch,
    OneOf,
    UnsupportedError,
    attention,
    detect_device,
    register_backend,
    resolve,
)
from attn_dispatch.interface.backend import refuse_spec
from attn_dispatch.interface.impl import store_new_kv
from attn_dispatch.interface.kv_access import gather_kv
from attn_dispatch.interface.kv_cache import view_kv_cache
from attn_dispatch.interface.metadata import BatchMetadata
from attn_dispatch.interface.validation import check_forward, check_metadata, profiling_output

__all__ = ["MinimalBackend", "MinimalBuilder", "MinimalImpl", "MinimalMetadata"]


@dataclass
class MinimalMetadata(BatchMetadata):
    """The batch as it is; a faster backend would keep its launch plan here."""


class MinimalBuilder(AttentionMetadataBuilder[MinimalMetadata]):
    """Turns an engine's batch into metadata, once per step for all layers that are alike.

    Raises:
        UnsupportedError: it is made by hand for layers that the backend does not declare.
    """

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        refuse_spec(MinimalBackend, spec, detect_device(device))

    def build(self, batch: AttentionBatch) -> MinimalMetadata:
        """The batch's metadata."""
        metadata: MinimalMetadata = MinimalMetadata.of(batch, self)
        return metadata


class MinimalImpl(AttentionImpl[MinimalMetadata]):
    """Causal attention, one request after another, with or without a soft cap."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor | None,
        attn_metadata: MinimalMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See AttentionImpl.forward."""
        if attn_metadata is None:  # an engine's profiling run
            return profiling_output(self, query, output)
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("MINIMAL does not quantize its output; REFERENCE does.")
        # Everything is checked before anything is written.
        check_metadata(self, attn_metadata, MinimalMetadata)
        batch = attn_metadata.batch
        check_forward(self, query, key, value, kv_cache, batch, output)
        if kv_cache is not None and key is not None and value is not None:
            store_new_kv(self, layer, key, value, kv_cache, batch)
        if output is None:
            output = query.new_empty(query.shape[0], self.num_heads, self.head_size_v)
        output.zero_()  # a row that sees no key is 0
        for request, (query_len, seq_len) in enumerate(
            zip(batch.query_lens, batch.seq_lens_list, strict=True)
        ):
            if query_len == 0 or seq_len == 0:
                continue
            rows = slice(batch.query_start_list[request], batch.query_start_list[request + 1])
            if kv_cache is None:
                assert key is not None
                assert value is not None
                own = slice(batch.key_starts[request], batch.key_starts[request + 1])
                keys, values = key[own].float(), value[own].float()
            else:
                assert batch.block_table is not None
                blocks = batch.block_table[request]
                in_cache = view_kv_cache(kv_cache, self.head_size, self.head_size_v)
                # Only this request's entries: what lies in the others cannot reach the result.
                keys = gather_kv(in_cache[0], blocks, seq_len, layer._k_scale, torch.float32)
                values = gather_kv(in_cache[1], blocks, seq_len, layer._v_scale, torch.float32)
            output[rows] = self._attend(query[rows].float(), keys, values).to(output.dtype)
        return output

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """(query_len, num_heads, head_size_v): one request, its queries at the end of its keys."""
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
    """The namespace that holds it together, and the declaration."""

    interface_version = 2
    # What is not named here is refused: sinks, windows, ALiBi, quantized outputs, all the rest.
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

    @staticmethod
    def get_name() -> str:
        """MINIMAL: the name in overrides and reports, and that of the entry point."""
        return "MINIMAL"

    @staticmethod
    def get_impl_cls() -> type[MinimalImpl]:
        """MinimalImpl."""
        return MinimalImpl

    @staticmethod
    def get_metadata_cls() -> type[MinimalMetadata]:
        """MinimalMetadata."""
        return MinimalMetadata

    @staticmethod
    def get_builder_cls() -> type[MinimalBuilder]:
        """MinimalBuilder."""
        return MinimalBuilder


def main() -> None:
    """Register the backend and show what changes."""
    register_backend(MinimalBackend)

    # A soft cap is more than TORCH_SDPA can do, and a plugin is tried before the last resort.
    capped = AttentionSpec(
        num_heads=8, num_kv_heads=2, head_size=64, dtype=torch.float32, logits_soft_cap=30.0
    )
    print(f"with a soft cap: {resolve(capped, 'cpu').name}")

    # Sinks were not declared, so no override can bring the backend to drop them.
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
