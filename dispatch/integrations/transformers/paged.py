"""A causal language model of transformers with its attention over paged caches.

The model's own code runs unchanged, through public interfaces: a registered attention function, and
a `Cache` that keeps nothing. Several requests are packed into one row without padding; only the
attention layers tell them apart.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.distributed.context_parallel import ContextParallel
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.integrations.transformers.calls import NAME, NoKeysCache, register, run_as
from attn_dispatch.integrations.transformers.describe import describe
from attn_dispatch.integrations.transformers.states import RecurrentStates
from attn_dispatch.interface.spec import AttentionSpec, MLADims
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.mla_layer import MLAAttention

__all__ = ["PagedModel"]

#: Fields of AttentionSpec that a layer takes as features, because Attention has no argument for
#: them or derives them otherwise.
_FEATURES = ("head_size_v", "attention_chunk", "window_size")

#: Tokens of the run that looks at the model's layers.
_PROBE_LEN = 4
#: Differences, relative to the largest logit, between a prompt at once and in parts.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class _Seen:
    """A layer, as the run that looks at the layers sees it.

    Attributes:
        module: its attention module.
        num_heads, num_kv_heads, head_size, head_size_v, dtype: of the tensors on this rank.
        sinks: its tensor, or None.
        source: the index of the layer whose keys it reads; None for its own.
        latent_idx: its index in the cache, if it stores latents.
    """

    module: torch.nn.Module
    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    dtype: torch.dtype
    sinks: torch.Tensor | None
    source: int | None
    latent_idx: int | None


class _Look:
    """A run that only looks at the layers; its outputs are zeros."""

    def __init__(self, latent_sizes: Mapping[int, MLADims]) -> None:
        self.seen: list[_Seen] = []
        self._latent_sizes = latent_sizes
        self._latent: int | None = None
        self._keys: list[torch.Tensor] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> Any:
        dims = self._latent_sizes.get(len(self.seen))
        if dims is not None:
            sizes = (key.shape[1], key.shape[-1], value.shape[-1])
            if sizes == (1, dims.kv_lora_rank, dims.qk_rope_head_dim):
                self._latent = layer_idx
        return key, value

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> torch.Tensor:
        # A layer that shares another's keys gets the same tensor.
        source = next((i for i, known in enumerate(self._keys) if known is key), None)
        self._keys.append(key)
        self.seen.append(
            _Seen(
                module=module,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_size=query.shape[-1],
                head_size_v=value.shape[-1],
                dtype=query.dtype,
                sinks=arguments.get("s_aux"),
                source=source,
                latent_idx=self._latent,
            )
        )
        self._latent = None
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


class _Paged:
    """Runs over the caches that are bound to the layers, in a forward_context."""

    def __init__(self, layers: Mapping[torch.nn.Module, Attention], latent: set[int]) -> None:
        self._layers = layers
        self._latent = latent
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> Any:
        if layer_idx not in self._latent:
            return key, value
        # The model expands what it gets here into keys of every head, which are not needed.
        self._new = (key[:, 0].flatten(0, 1), value[:, 0].flatten(0, 1))
        return key[:, :, :1], value[:, :, :1]

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: Mapping[str, Any],
    ) -> torch.Tensor:
        layer = self._layers[module]
        rows, keys, values = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
        if isinstance(layer, MLAAttention):
            assert self._new is not None
            latents, self._new = self._new, None
            output = layer(rows, *latents)
        elif layer.spec.kv_sharing:
            output = layer(rows)
        else:
            output = layer(rows, keys, values)
        assert isinstance(output, torch.Tensor)
        return output.view(query.shape[0], query.shape[2], *output.shape[1:])


class PagedModel:
    """A causal language model of transformers over paged caches, which an Engine can run.

    Its attention function is replaced; `model.set_attn_implementation` changes it back.

    Args:
        model: on its device, e.g. of `AutoModelForCausalLM.from_pretrained`.
        block_size: tokens per block; None for what `plan_kv_cache` finds best.
        kv_cache_dtype: see spec.KV_CACHE_DTYPES.
        backend: an override of the selected backends.
        cuda_graph: whether the layers will be captured.
        context_parallel: splits the keys over ranks, each of which runs the whole model; made with
            heads="replicated".

    Attributes:
        layers: the attention layers, by their name "layers.INDEX". Bind their caches before the
            first call of `logits`.
        device: where the model is.
        states: what layers without attention keep; None for a model that has none. A step is then
            one request, or one token of each of several; see RecurrentStates.step.
        max_seq_len: the most tokens of a request that the model was made for, or None.
        notes: what `describe` noted about the model.

    Raises:
        UnsupportedError: the model has layers that keep a state other than keys and values, or
            attention that no spec describes; or no backend supports one of the layers.
    """

    def __init__(
        self,
        model: Any,
        *,
        block_size: int | None = None,
        kv_cache_dtype: str = "auto",
        backend: str | None = None,
        cuda_graph: bool = False,
        context_parallel: ContextParallel | None = None,
    ) -> None:
        _check_version()
        self.model = model.eval()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.notes, described, others = _described(model)
        register()
        model.set_attn_implementation(NAME)
        states = RecurrentStates()
        self._cache = NoKeysCache(states)
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.states: RecurrentStates | None = None
        text = model.config.get_text_config()
        self.max_seq_len, note = _longest(text)
        self.notes = (*self.notes, *note)
        seen = self._look(described, states)
        missing = sorted({*others} - states.layers)
        if missing:
            raise UnsupportedError(
                f"The engine does not run a model of type {model.config.model_type!r}: layer "
                f"{missing[0]} has {others[missing[0]]}, and does not keep its state in "
                "transformers' cache."
            )
        self.states = states if states.layers else None
        options = {
            "device": self.device,
            "block_size": block_size,
            "kv_cache_dtype": kv_cache_dtype,
            "backend": backend,
            "cuda_graph": cuda_graph,
            "context_parallel": context_parallel,
        }
        layers = [
            _layer(index, each, *described[index], options) for index, each in enumerate(seen)
        ]
        self.layers: dict[str, Attention] = {layer.prefix: layer for layer in layers}
        self._step = _Paged(
            {each.module: layer for each, layer in zip(seen, layers, strict=True)},
            {each.latent_idx for each in seen if each.latent_idx is not None},
        )

    def _look(
        self, described: list[tuple[AttentionSpec, float | None]], states: RecurrentStates
    ) -> list[_Seen]:
        """The layers in the order of their calls, which are those that were described."""
        sizes = {i: spec.mla for i, (spec, _) in enumerate(described) if spec.mla is not None}
        look = _Look(sizes)
        tokens = torch.arange(_PROBE_LEN, device=self.device)
        whole = self._run_looking(look, states, tokens)
        if states.layers:
            states.forget(-1)
            pieces = tokens.split([2, 1, 1])
            parts = [self._run_looking(_Look(sizes), states, each) for each in pieces]
            difference = (parts[-1] - whole).abs().max()
            if not difference <= _ROUNDING[whole.dtype] * whole.abs().max():
                raise UnsupportedError(
                    f"A model of type {self.model.config.model_type!r} gives other results if a "
                    "prompt is computed in parts, so it keeps a state that the engine does not see."
                )
        states.forget(-1)
        if len(look.seen) != len(described):
            raise UnsupportedError(
                f"This model's forward pass has {len(look.seen)} calls of attention, and "
                f"{len(described)} layers are known. The engine does not run it."
            )
        return look.seen

    def _run_looking(
        self, look: _Look, states: RecurrentStates, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The logits after the last token."""
        with run_as(look), states.step([-1]), torch.no_grad():
            return self._forward(tokens, tokens, torch.zeros_like(tokens[:1]) + len(tokens) - 1)

    def _forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        # Layers with states tell requests apart by their rows, and then each has one token.
        apart = self.states is not None and self.states.num_requests > 1
        shape = (-1, 1) if apart else (1, -1)
        keep = {"logits_to_keep": rows} if self._keeps_rows and not apart else {}
        logits: torch.Tensor = self.model(
            input_ids=token_ids.view(shape),
            position_ids=positions.view(shape),
            cache=self._cache,
            use_cache=True,
            **keep,
        ).logits.flatten(0, 1)
        return logits if keep else logits[rows]

    @contextlib.contextmanager
    def attention_of(self, implementation: str) -> Iterator[Any]:
        """The model of transformers with another attention implementation, e.g. "eager"."""
        self.model.set_attn_implementation(implementation)
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(NAME)

    def logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """The logits after some of a step's tokens; call it in the step's forward_context.

        Args:
            token_ids: (num_tokens,) int64, the new tokens of all requests.
            positions: (num_tokens,) int64, each token's position in its request.
            rows: (n,) int64, indices into the tokens.

        Returns:
            (n, vocab_size), dtype of the model.
        """
        with run_as(self._step):
            return self._forward(token_ids, positions, rows)


#: Kinds of RoPE whose frequencies depend on the largest position of a step.
_MOVING_ROPE = ("dynamic", "longrope")


def _longest(config: Any) -> tuple[int | None, tuple[str, ...]]:
    """The most tokens of a request, and a note if it is less than the model was made for.

    transformers changes the frequencies of some kinds of RoPE for all tokens of a step once one of
    them is beyond the original context. Then an answer would depend on the other requests.
    """
    stated = getattr(config, "max_position_embeddings", None)
    limit = stated if isinstance(stated, int) and stated > 0 else None
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [each for each in (rope, *rope.values()) if isinstance(each, dict)]
    kinds = [each.get("rope_type") for each in parts]
    moving = [kind for kind in kinds if kind in _MOVING_ROPE]
    if not moving:
        return limit, ()
    keys = "original_max_position_embeddings"
    originals = [each.get(keys) or getattr(config, keys, None) for each in parts]
    lengths = [each for each in (limit, *originals) if isinstance(each, int)]
    if not lengths:
        return limit, ()
    shortest = min(lengths)
    if shortest == limit:
        return limit, ()
    return shortest, (
        f"Requests have at most {shortest} tokens: beyond that, RoPE of type {moving[0]!r} changes "
        "with the longest request of a step.",
    )


def _check_version() -> None:
    from packaging.version import Version
    from transformers import __version__

    if Version(__version__) < Version("5.24"):
        raise UnsupportedError(
            f"This is transformers {__version__}; models run over paged caches since 5.24, where a "
            "model updates its cache itself. pip install 'transformers>=5.24'."
        )


def _described(
    model: Any,
) -> tuple[tuple[str, ...], list[tuple[AttentionSpec, float | None]], dict[int, str]]:
    """The notes about a model, each layer's spec and scale, and what other layers have.

    Raises:
        UnsupportedError: the engine cannot run all of its layers.
    """
    found = describe(model)
    for reason, layers in found.rejected.items():
        raise UnsupportedError(
            f"The engine does not run a model of type {found.model_type!r}: {len(layers)} of its "
            f"layers, e.g. {layers[0]}: {reason}."
        )
    by_layer = {
        layer: (group.spec, group.scale)
        for group in found.groups.values()
        for layer in group.layers
    }
    other = [spec.attn_type for spec, _ in by_layer.values() if spec.attn_type != "decoder"]
    if other or found.groups.keys() & {"encoder", "encoder_decoder"}:
        kind = AttentionType(other[0]) if other else "encoder"
        raise UnsupportedError(
            f"The engine runs causal language models; a model of type {found.model_type!r} has "
            f"attention of type {kind}."
        )
    others = {layer: name for name, layers in found.others.items() for layer in layers}
    return found.notes, [by_layer[layer] for layer in sorted(by_layer)], others


def _layer(
    index: int, seen: _Seen, spec: AttentionSpec, scale: float | None, options: Mapping[str, Any]
) -> Attention:
    """The layer of a spec with this rank's sizes and the model's tensors."""
    own = {**options, "prefix": f"layers.{index}", "dtype": seen.dtype}
    if spec.mla is not None and seen.latent_idx is not None:
        if options["block_size"] is None:
            own["block_size"] = None
        return MLAAttention(seen.num_heads, spec.mla, seen.module.kv_b_proj, scale, **own)
    features = {name: getattr(spec, name) for name in _FEATURES}
    features["head_size_v"] = seen.head_size_v
    return Attention(
        seen.num_heads,
        seen.head_size,
        scale,
        seen.num_kv_heads,
        sliding_window=spec.sliding_window,
        logits_soft_cap=spec.logits_soft_cap,
        sinks=seen.sinks,
        kv_sharing_target_layer_name=None if seen.source is None else f"layers.{seen.source}",
        **own,
        **{name: value for name, value in features.items() if value is not None},
    )
