"""A causal language model of transformers with its attention over paged caches.

The model's own code runs unchanged, through public interfaces: a registered attention function, and
a `Cache` that keeps nothing. Several requests are packed into one row without padding; only the
attention layers tell them apart.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from attn_dispatch.distributed.context_parallel import ContextParallel
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.integrations.transformers.calls import NoKeysCache, register, run_as
from attn_dispatch.integrations.transformers.compiled import CompiledLayers
from attn_dispatch.integrations.transformers.describe import describe
from attn_dispatch.integrations.transformers.looking import Looking, SeenLayer
from attn_dispatch.integrations.transformers.states import RecurrentStates
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.runtime.layer import Attention
from attn_dispatch.runtime.mla_layer import MLAAttention

__all__ = ["PagedModel"]

#: Fields of AttentionSpec that a layer takes as features, because Attention has no argument for
#: them or derives them otherwise.
_FEATURES = ("head_size_v", "attention_chunk", "window_size")


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
        compile_layers: compile what surrounds the attention of each layer by torch.compile, on the
            first calls; see CompiledLayers. Not for models with states.

    Attributes:
        layers: the attention layers, by their name "layers.INDEX". Bind their caches before the
            first call of `logits`.
        device: where the model is.
        max_step_tokens: the most new tokens of a step, or None for no limit.
        states: what layers without attention keep; None for a model that has none. A step is then
            one request, or one token of each of several; see RecurrentStates.step.
        max_seq_len: the most tokens of a request that the model was made for, or None.
        notes: what `describe` noted about the model.
        smallest_step: tokens of the smallest step to capture; 2 with compiled layers, as one token
            would be another program.

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
        compile_layers: bool = False,
    ) -> None:
        _check_version()
        self.model = model.eval()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.notes, described, others = _described(model)
        self._name = register()
        model.set_attn_implementation(self._name)
        states = RecurrentStates()
        self._cache = NoKeysCache(states)
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.states: RecurrentStates | None = None
        text = model.config.get_text_config()
        self.max_seq_len, note = _longest(text)
        self.notes = (*self.notes, *note)
        sizes = {i: spec.mla for i, (spec, _) in enumerate(described) if spec.mla is not None}
        looking = Looking(self._forward, self._cache, states, sizes, self.device)
        seen = looking.layers(len(described))
        self.max_step_tokens = looking.trusted_length(self.max_seq_len)
        if self.max_step_tokens is not None:
            self.max_seq_len = self.max_step_tokens
            self.notes = (
                *self.notes,
                f"Requests and steps have at most {self.max_seq_len} tokens: beyond that, the "
                "model's code counts the tokens of a step, and not the positions of a request.",
            )
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
        self.smallest_step = 1
        self._compiled: CompiledLayers | None = None
        if compile_layers and self.states is None:
            self._name = register(in_compiled=True)
            model.set_attn_implementation(self._name)
            self.smallest_step = 2
            self._compiled = CompiledLayers(model, [each.module for each in seen], self._cache)

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
            with contextlib.nullcontext() if self._compiled is None else self._compiled.unused():
                yield self.model
        finally:
            self.model.set_attn_implementation(self._name)

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
        compiled = contextlib.nullcontext() if self._compiled is None else self._compiled.used()
        with run_as(self._step), compiled:
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
    index: int,
    seen: SeenLayer,
    spec: AttentionSpec,
    scale: float | None,
    options: Mapping[str, Any],
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
