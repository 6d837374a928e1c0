"""MLAAttention: the layer of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.arguments import as_int, shown
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.metadata import AttentionMetadata
from attn_dispatch.interface.quantization import is_fp8, scale_for
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import Phase
from attn_dispatch.interface.validation import check_no_grad, check_tensors
from attn_dispatch.runtime.binding import LayerBinding
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.layer_checks import check_features, check_query, unflatten
from attn_dispatch.runtime.mla_dense import dense_rules, describe_expanded
from attn_dispatch.runtime.mla_impl import ExpandedPrefill, MLABuilder, MLAImpl
from attn_dispatch.runtime.mla_plan import (
    PREFILL_WORKSPACE_BYTES,
    bytes_per_key,
    chunk_size,
    dense_spec,
    why_absorbed,
)
from attn_dispatch.runtime.mla_weights import KVProjection, apply_rope
from attn_dispatch.runtime.split import part_spec
from attn_dispatch.selection import overrides
from attn_dispatch.selection.failure_record import BackendFallbackWarning
from attn_dispatch.selection.registry import registry
from attn_dispatch.selection.report import Selection
from attn_dispatch.selection.resolve import SelectionContext

__all__ = ["MLAAttention"]

_PREFILLS = ("auto", "expanded", "absorbed")
#: Fields of a spec that the sizes fill in.
_DERIVED = frozenset(("num_kv_heads", "head_size", "head_size_v", "mla", "kv_sharing"))

Projection = Callable[[torch.Tensor], torch.Tensor]


class MLAAttention(Attention):
    """One layer of multi-head latent attention, over a paged cache of latents.

    Everything that `Attention` has works in the same way: `forward_context`, torch.compile,
    `plan_kv_cache`, `bind_kv_caches`, `graph_state`, fallback. Decodes and verification go to a
    backend for latents, in absorbed form; prefills are expanded, and go to a dense backend, see
    `prefill_selection` and docs/mla.md.

    Args:
        num_heads: query heads.
        mla: the sizes.
        kv_b_proj: its weight, (num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank), or a
            module that has it; each head has its key rows first, then its value rows. In fp8 with
            scales for blocks of 128 x 128 it is dequantized once. Kept as it is, like the other
            projections: they belong to the model, and are not registered here.
        scale: factor on the scores; None for (qk_nope_head_dim + qk_rope_head_dim) ** -0.5.
        kv_b_proj_scale_inv: the scales of an fp8 weight, if kv_b_proj is a tensor.
        q_proj: maps hidden states to queries.
        q_a_proj: the first of two projections in place of q_proj; then q_a_layernorm and
            q_b_proj.
        q_a_layernorm: applied between them; None for nothing.
        q_b_proj: the second.
        inv_freq: (qk_rope_head_dim // 2,), the frequencies of RoPE: queries and keys are rotated by
            the layer. None if the caller has rotated them.
        rope_factor: of the rotated elements, YaRN's attention factor.
        rope_interleaved: see `apply_rope`; True for DeepSeek's checkpoints.
        prefill: "expanded", "absorbed", or "auto": expanded where it takes fewer multiplications.
        prefill_backend: an override for the dense backend of prefills. Overrides that name a
            backend for latents do not apply to it.
        prefill_workspace_bytes: bound of what the expansion of earlier keys takes, see
            `workspace_bytes`.
        index_topk: of a layer with an indexer (DeepSeek V3.2), which is rejected; None.
        prefix, dtype, device, block_size, kv_cache_dtype, kv_sharing_target_layer_name, backend:
            as for Attention.
        context_parallel: as for Attention; kv_b_proj has all ranks' heads. Prefills are absorbed.
        **features: any other field of AttentionSpec.

    Raises:
        UnsupportedError: no backend computes the layer, or it is sparse.
        UnknownBackendError, InvalidInputError: as for Attention; or the projections do not fit.

    Example:
        >>> dims = MLADims(
        ...     kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ... )
        >>> layer = MLAAttention(16, dims, model.kv_b_proj, prefix="layers.0")
        >>> with forward_context(batch):
        ...     output = layer(query, kv_c_normed, k_pe)  # (num_tokens, 16, 128)
    """

    def __init__(
        self,
        num_heads: int,
        mla: MLADims,
        kv_b_proj: Any,
        scale: float | None = None,
        *,
        kv_b_proj_scale_inv: torch.Tensor | None = None,
        q_proj: Projection | None = None,
        q_a_proj: Projection | None = None,
        q_a_layernorm: Projection | None = None,
        q_b_proj: Projection | None = None,
        inv_freq: torch.Tensor | None = None,
        rope_factor: float = 1.0,
        rope_interleaved: bool = True,
        prefill: str = "auto",
        prefill_backend: str | None = None,
        prefill_workspace_bytes: int = PREFILL_WORKSPACE_BYTES,
        index_topk: int | None = None,
        kv_cache_dtype: str = "auto",
        kv_sharing_target_layer_name: str | None = None,
        prefix: str = "",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block_size: int | None = 16,
        backend: str | None = None,
        context_parallel: Any = None,
        **features: Any,
    ) -> None:
        super(Attention, self).__init__()
        check_features("MLAAttention", features, _DERIVED)
        if index_topk is not None:
            raise UnsupportedError(
                f"index_topk={shown(index_topk)}: the layer attends only to the keys that an "
                "indexer picks (DeepSeek V3.2), and no backend computes sparse latent attention. "
                "Without it the results would be others."
            )
        if not isinstance(mla, MLADims):
            raise InvalidInputError(f"mla={shown(mla)} is not an MLADims.")
        if prefill not in _PREFILLS:
            raise InvalidInputError(
                f"prefill={shown(prefill)} is not one of: {', '.join(_PREFILLS)}."
            )
        spec = AttentionSpec.for_mla(
            num_heads=num_heads,
            dtype=torch.get_default_dtype() if dtype is None else dtype,
            mla=mla,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
            kv_sharing=kv_sharing_target_layer_name is not None,
            **features,
        )
        self.mla = mla
        self._query_size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        # In a dict, so that the model's modules are not registered in this one too.
        self._per_head = {"alibi_slopes": None, "sinks": None}
        self._projections = _checked_projections(q_proj, q_a_proj, q_a_layernorm, q_b_proj)
        self._kv_b_proj = KVProjection(kv_b_proj, kv_b_proj_scale_inv, num_heads, mla, spec.dtype)
        self._rope = None
        if inv_freq is not None:
            self._rope = (_checked_inv_freq(inv_freq, mla), float(rope_factor), rope_interleaved)
        self._prefill = prefill
        self._why_absorbed = why_absorbed(spec if context_parallel is None else part_spec(spec))
        if prefill == "absorbed":
            self._why_absorbed = "Prefills are absorbed: the layer has prefill='absorbed'."
        if prefill == "expanded" and self._why_absorbed:
            raise UnsupportedError(f"prefill='expanded': {self._why_absorbed}")
        workspace = as_int("prefill_workspace_bytes", prefill_workspace_bytes, 1)
        self._chunk = 0 if self._why_absorbed else chunk_size(spec, workspace)
        names = registry.names()
        rules = overrides.current_rules(prefill_backend, names)
        self._dense_rules = dense_rules(rules, dense_spec(spec))
        self._dense: tuple[Attention, Attention] | None = None
        self._requires_dense = prefill == "expanded" or prefill_backend is not None
        scale = self._query_size**-0.5 if scale is None else scale
        rules = overrides.current_rules(backend, names)
        self._set_up(spec, prefix, scale, kv_sharing_target_layer_name, rules, context_parallel)
        self._bind_first(device)

    @property
    def workspace_bytes(self) -> int:
        """The most that the expansion of earlier keys takes, once for all layers of a model.

        In addition there are the expanded new keys, a query of each of their tokens, and its
        output, as in any model; and what the dense backend allocates.
        """
        return self._chunk * bytes_per_key(self.spec)

    @property
    def prefill_selection(self) -> Selection | None:
        """The dense backend of prefills in expanded form, and why; None if there are none."""
        return None if self._dense is None else self._dense[0].selections[Phase.PREFILL]

    def explain(self) -> str:
        """The backend of each phase, and how prefills are computed, in sentences."""
        each = self.selections.items()
        lines = [f"{phase}: {pick.name}, {pick.report.evidence}" for phase, pick in each]
        dense = self.prefill_selection
        if dense is None:
            lines.append(self._why_absorbed)
        else:
            lines.append(describe_expanded(self.spec, dense.report, self._chunk))
        return "\n".join(line for line in lines if line)

    def set_kv_scales(
        self, k_scale: float | torch.Tensor, v_scale: float | torch.Tensor | None = None
    ) -> None:
        """Set the scale of an fp8 cache: one, because keys and values are the same entries.

        Raises:
            InvalidInputError: it is not a positive finite number, or v_scale is another.
        """
        if v_scale is not None and float(v_scale) != float(k_scale):
            raise InvalidInputError(
                f"k_scale is {float(k_scale)} and v_scale {float(v_scale)}; a cache of latents has "
                "one scale. Give k_scale only."
            )
        super().set_kv_scales(k_scale, k_scale)

    def _derive_scales(
        self,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: KVCache | None,
        slots: torch.Tensor | None,
    ) -> bool:
        if key is None or value is None or kv_cache is None or not is_fp8(kv_cache.dtype):
            return False
        if self.spec.kv_sharing or slots is None or min(len(key), len(value)) < len(slots):
            return bool(super()._derive_scales(key, value, kv_cache, slots))
        new = torch.cat([key.flatten(1), value.flatten(1)], -1)[: len(slots)][slots >= 0]
        if not len(new):
            return False
        scale = scale_for(new, kv_cache.dtype, (0, 1))
        self._set_scales(scale, scale)
        return True

    def _impl_arguments(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "mla": self.mla,
            "kv_b_proj": self._kv_b_proj,
            "kv_sharing_target_layer_name": self.kv_sharing_target_layer_name,
        }

    def _binding_of(self, device: torch.device, context: SelectionContext) -> LayerBinding:
        binding = super()._binding_of(device, context)
        if self._chunk and (self._dense is None or self._dense[0]._device != device):
            try:
                self._dense = self._dense_layers(device)
            except UnsupportedError as error:
                if self._requires_dense:
                    raise
                self._chunk, self._dense = 0, None
                self._why_absorbed = (
                    f"Prefills are absorbed: no dense backend computes them. {error}"
                )
        always, expanded = self._prefill == "expanded", None
        if self._dense is not None and self._chunk:
            expanded = ExpandedPrefill(self.spec, self._kv_b_proj, *self._dense)
        chunk = self._chunk if expanded else 0
        impl: Any = MLAImpl(binding.impl, expanded, not self._requires_dense, self._dense_failed)
        return dataclasses.replace(
            binding,
            impl=impl,
            builder=MLABuilder(binding.builder, chunk, always),
            metadata_key=(*binding.metadata_key, chunk, always),
        )

    def _dense_layers(self, device: torch.device) -> tuple[Attention, Attention]:
        new, earlier = (
            _DenseLayer(
                dense_spec(self.spec, earlier=is_earlier),
                f"{self.prefix} ({what} keys, expanded)",
                self.scale,
                self._dense_rules,
                device,
            )
            for is_earlier, what in ((False, "new"), (True, "earlier"))
        )
        return new, earlier

    def _dense_failed(self, error: BackendFailure) -> None:
        """The dense backends have failed: prefills are absorbed from now on."""
        self._why_absorbed = f"Prefills are absorbed: {error}"
        self._chunk, self._dense = 0, None
        warnings.warn(
            f"Layer {self.prefix!r}: prefills are absorbed from now on, because {error}",
            BackendFallbackWarning,
            stacklevel=4,
        )
        assert self._device is not None
        self._bind(self._device)  # later batches are not planned for the expanded form

    def forward(  # type: ignore[override]
        self,
        hidden_states_or_query: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor | None = None,
        attn_metadata: AttentionMetadata | None = None,
        *,
        positions: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Project and rotate, write the new latents to the cache, then attend.

        Args:
            hidden_states_or_query: what the layer's q projections take; without them the queries,
                (num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim) or with the last two
                flattened into one.
            kv_c_normed: (num_tokens, kv_lora_rank), the normalized latents.
            k_pe: (num_tokens, qk_rope_head_dim) or (num_tokens, 1, qk_rope_head_dim), the part of
                the keys that all heads share.
            kv_cache: as for Attention.forward.
            attn_metadata: as for Attention.forward.
            positions: (num_tokens,) integers, of the new tokens; with inv_freq, and only then.
            output: (num_tokens, num_heads, v_head_dim), written; made if None.
            output_scale: as for AttentionImpl.forward.
            output_block_scale: as for AttentionImpl.forward.

        Returns:
            The output, flattened if the queries are; with returns_lse also lse, as for Attention.

        Raises:
            InvalidInputError: an argument does not fit; nothing has been written then.
        """
        check_query(hidden_states_or_query, output)
        check_tensors(kv_c_normed=kv_c_normed, k_pe=k_pe)
        query = hidden_states_or_query
        for projection in self._projections:
            query = projection(query)
        # What a projection returns is checked too: its width is that of the queries.
        query_3d = unflatten(self, "query", query, self._call_spec.num_heads, self._query_size)
        k_pe = k_pe.flatten(1) if k_pe.dim() == 3 else k_pe
        self._check_widths(query_3d, kv_c_normed, k_pe)
        if torch.is_grad_enabled():
            check_no_grad(query, kv_c_normed, k_pe, output, self._kv_b_proj.stored)
        query_3d, k_pe = self._rotated(query_3d, k_pe, positions)
        scales = (output_scale, output_block_scale)
        given = (query_3d, kv_c_normed, k_pe, kv_cache, attn_metadata, output)
        return self._call(*given, scales, is_flat=query.dim() == 2)

    def _check_widths(
        self, query: torch.Tensor, kv_c_normed: torch.Tensor, k_pe: torch.Tensor
    ) -> None:
        wanted = (self._call_spec.num_heads, self._query_size)
        if query.shape[1:] != wanted:
            raise InvalidInputError(
                f"query has shape {tuple(query.shape)}; layer {self.prefix!r} takes "
                f"(num_tokens, {wanted[0]}, {wanted[1]}): qk_nope_head_dim + qk_rope_head_dim."
            )
        for name, tensor, width in (
            ("kv_c_normed", kv_c_normed, self.mla.kv_lora_rank),
            ("k_pe", k_pe, self.mla.qk_rope_head_dim),
        ):
            if tensor is None or tensor.dim() != 2 or tensor.shape[1] != width:
                found = "None" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise InvalidInputError(
                    f"{name} is {found}; layer {self.prefix!r} takes (num_tokens, {width})."
                )

    def _rotated(
        self, query: torch.Tensor, k_pe: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (self._rope is None) != (positions is None):
            raise InvalidInputError(
                "positions= go with inv_freq= of the layer, by which it rotates queries and keys. "
                "Give both, or neither if they are rotated already."
            )
        if self._rope is None or positions is None:
            return query, k_pe
        inv_freq, factor, interleaved = self._rope
        if positions.shape != (len(query),):
            raise InvalidInputError(
                f"positions has shape {tuple(positions.shape)}; the call has {len(query)} tokens."
            )
        if inv_freq.device != query.device:
            inv_freq = inv_freq.to(query.device)
            self._rope = (inv_freq, factor, interleaved)
        angles = positions[:, None].to(inv_freq.dtype) * inv_freq
        cos, sin = angles.cos() * factor, angles.sin() * factor
        nope, rotated = query.split([self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim], -1)
        turned = apply_rope(rotated, cos, sin, interleaved=interleaved)
        key = apply_rope(k_pe, cos[: len(k_pe)], sin[: len(k_pe)], interleaved=interleaved)
        return torch.cat([nope, turned], -1), key


class _DenseLayer(Attention):
    """A dense layer of a spec, under rules that were filtered for it."""

    def __init__(
        self,
        spec: AttentionSpec,
        prefix: str,
        scale: float,
        rules: tuple[overrides.Rule, ...],
        device: torch.device,
    ) -> None:
        super(Attention, self).__init__()
        self._per_head = {"alibi_slopes": None, "sinks": None}
        self._set_up(spec, prefix, scale, None, rules)
        self._bind_first(device)


def _checked_projections(
    q_proj: Projection | None,
    q_a_proj: Projection | None,
    q_a_layernorm: Projection | None,
    q_b_proj: Projection | None,
) -> tuple[Projection, ...]:
    low_rank = (q_a_proj, q_b_proj)
    if (q_a_proj is None) != (q_b_proj is None) or (q_a_layernorm and q_a_proj is None):
        raise InvalidInputError(
            "q_a_proj, q_a_layernorm and q_b_proj go together; only q_a_layernorm may be left out."
        )
    if q_proj is not None and q_a_proj is not None:
        raise InvalidInputError("Give q_proj, or q_a_proj and q_b_proj, and not both.")
    chain = (q_proj,) if q_proj is not None else (low_rank[0], q_a_layernorm, low_rank[1])
    return tuple(each for each in chain if each is not None)


def _checked_inv_freq(inv_freq: Any, mla: MLADims) -> torch.Tensor:
    check_tensors(inv_freq=inv_freq)
    if tuple(inv_freq.shape) != (mla.qk_rope_head_dim // 2,) or mla.qk_rope_head_dim % 2:
        raise InvalidInputError(
            f"inv_freq has shape {tuple(inv_freq.shape)}; it has one frequency for each pair of "
            f"qk_rope_head_dim={mla.qk_rope_head_dim} elements."
        )
    checked: torch.Tensor = inv_freq.detach()
    return checked
