"""EngineAttention: a layer over a cache that an engine owns, see docs/engine_plugins.md."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch

from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface.kv_view import KVCache
from attn_dispatch.interface.quantization import is_fp8, kv_cache_torch_dtype
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.runtime.context import ForwardContext, forward_context
from attn_dispatch.runtime.graph_step import GraphStep
from attn_dispatch.runtime.kv_binding import bind_kv_caches
from attn_dispatch.runtime.layer import Attention

__all__ = ["EngineAttention"]

#: From how many keys on, and for how many requests, a shared prefix is read once.
MIN_PREFIX, MIN_REQUESTS = 256, 8


class EngineAttention:
    """One attention layer of an engine. The engine allocates its cache, and hands it over.

    A second layer, with fp8 output, is made when the engine asks for one.

    Args:
        layer_class: Attention, or MLAAttention.
        group: layers with equal groups share a batch, e.g. those whose caches are in one pool.
        try_shared_prefix: read a shared prefix once, if the layer's features and backends allow it.
        try_cuda_graph: make the layer for CUDA graphs, if backends allow it.
        **arguments: of `Attention`. The block size is left open: it is that of the cache.

    Raises:
        UnsupportedError, UnknownBackendError, InvalidInputError: as for `Attention`.

    Attributes:
        layer: the layer.
        shares_prefix: it reads a shared prefix once.
        has_graphs: it was made for CUDA graphs.
        group: as the argument.
    """

    def __init__(
        self,
        *,
        layer_class: type[Attention] = Attention,
        group: Hashable = None,
        try_shared_prefix: bool = False,
        try_cuda_graph: bool = False,
        **arguments: Any,
    ) -> None:
        self._arguments, self._layer_class = {"block_size": None, **arguments}, layer_class
        self.group = group
        self.layer = self._make()
        for name, is_tried in (
            ("shared_prefix", try_shared_prefix),
            ("cuda_graph", try_cuda_graph),
        ):
            with contextlib.suppress(UnsupportedError):
                if is_tried:
                    self.layer = self._make(**{name: True})
                    self._arguments[name] = True
        self.shares_prefix = "shared_prefix" in self._arguments
        self.has_graphs = "cuda_graph" in self._arguments
        self._quantized: Attention | None = None
        self._given: object = None
        self._scales = (1.0, 1.0)

    def _make(self, **more: Any) -> Attention:
        """The layer; an error names it, if the engine has given its name as `prefix`."""
        arguments = {**self._arguments, **more}
        try:
            return self._layer_class(**arguments)
        except UnsupportedError as error:
            if not (name := arguments.get("prefix")):
                raise
            raise UnsupportedError(
                f"No backend computes layer {name!r}: {error}", error.report
            ) from error

    @property
    def has_kv_cache(self) -> bool:
        """Whether it has a cache; layers of encoders have none."""
        return AttentionType(self.layer.spec.attn_type).has_kv_cache

    def require_cuda_graph(self) -> None:
        """Make the layer again, for CUDA graphs, over the cache that it has.

        For engines that decide about graphs after they have made their layers.

        Raises:
            UnsupportedError: no backend computes the layer in CUDA graphs, with the reasons; it is
                as before then.
        """
        before = self.layer, self._quantized, self._arguments
        cache, name = self.layer.kv_cache, self.layer.prefix
        self._arguments = {**self._arguments, "cuda_graph": True}
        try:
            self.layer = self._make(prefix=name)
            if self._quantized is not None:
                self._quantized = None
                self.quantizes_output()
            if cache is not None:
                self.bind(cache, self._given, name)
        except UnsupportedError:
            self.layer, self._quantized, self._arguments = before
            raise
        self.has_graphs = True

    def uses_shared_prefix(self, prefix_len: int, num_reqs: int) -> bool:
        """Whether a prefix of this many keys of all requests is worth reading once.

        The answer is a rule of thumb: fewer keys or requests cost more in the merge of the parts
        than they save.
        """
        return self.shares_prefix and prefix_len >= MIN_PREFIX and num_reqs >= MIN_REQUESTS

    def has_sinks(self, sinks: torch.Tensor | None) -> bool:
        """Whether these are the sinks that the layer was made with, for engines that give them.

        Args:
            sinks: (num_heads,), or None; compared by where they are, not by their values.
        """
        known = self._arguments.get("sinks")
        if sinks is None or known is None:
            return sinks is known
        return bool(sinks.data_ptr() == known.data_ptr())

    def quantizes_output(self) -> bool:
        """Whether a backend writes the output as fp8 by a static scale, for `output_scale`."""
        if self._quantized is None:
            arguments = {**self._arguments, "prefix": f"{self.layer.prefix}, fp8 output"}
            try:
                self._quantized = self._layer_class(**arguments, output_quant="fp8_e4m3")
            except UnsupportedError:
                return False
        return True

    def is_bound_to(self, given: object) -> bool:
        """Whether the cache was made of this object of the engine's, or of the same memory.

        Args:
            given: a tensor, several ones, or another object.
        """
        bound = self._given
        if given is bound or bound is None:
            return given is bound
        if (
            isinstance(given, tuple)
            and isinstance(bound, tuple)
            and len(given) == len(bound)
            and all(map(operator.is_, given, bound))
        ):
            return True  # a pair that is made at each call, of the same tensors
        return _memory_of(given) == _memory_of(bound)

    def follow(
        self,
        given: Any,
        view: Callable[[Any], KVCache],
        scales: tuple[float | None, float | None] = (None, None),
        name: str | None = None,
    ) -> None:
        """Use the cache and the scales that the engine's layer has now; called before each step.

        Little is done if they are those of the last call, and nothing for a layer without a cache.

        Args:
            given: the engine's tensor or tensors.
            view: makes the cache of them, e.g. by `kv_cache_from_vllm`, without a copy.
            scales: of keys and of values, see `set_scales`.
            name: the layer's name in the engine; None for its `prefix`.

        Raises:
            InvalidInputError, UnsupportedError: as for `bind` and `set_scales`.
        """
        if not self.has_kv_cache:
            return
        self.set_scales(*scales)
        if not self.is_bound_to(given):
            self.bind(view(given), given, self.layer.prefix if name is None else name)

    def dtype_of_bytes(self, kv_cache: torch.Tensor) -> torch.dtype | None:
        """The element type of a cache that the engine allocates as uint8; None for any other."""
        if kv_cache.dtype != torch.uint8:
            return None
        spec, arch = self.layer.spec, detect_device(kv_cache.device).arch
        return kv_cache_torch_dtype(spec.kv_cache_dtype, spec.dtype, arch)

    def bind(self, kv_cache: KVCache, given: object, name: str) -> None:
        """Use a cache from now on. Backends are picked again, for its strides and block size.

        Args:
            kv_cache: the cache, a view of the engine's memory.
            given: the engine's own object for it, see `is_bound_to`.
            name: the layer's name in the engine.

        Raises:
            InvalidInputError, UnsupportedError: as for `bind_kv_caches`.
        """
        for layer in self.layers:
            layer.prefix = name if layer is self.layer else f"{name}, fp8 output"
            source = layer.kv_sharing_target_layer_name or layer.prefix
            bind_kv_caches([layer], {source: kv_cache})
            if is_fp8(kv_cache.dtype):
                layer.set_kv_scales(*self._scales)
        self._given = given

    @property
    def layers(self) -> list[Attention]:
        """The layer, and the second one with fp8 output if there is one."""
        return [self.layer, *([] if self._quantized is None else [self._quantized])]

    def set_scales(self, k_scale: float | None, v_scale: float | None) -> None:
        """Set the scales of an fp8 cache; nothing is done if they are the same as before.

        Args:
            k_scale: of keys; None for 1, if v_scale is None too.
            v_scale: of values. With latent attention it is not read: an entry of the cache is key
                and value, with the scale of keys.

        Raises:
            InvalidInputError: only one of them is None.
        """
        if k_scale is None and v_scale is None:
            k_scale = v_scale = 1.0
        if k_scale is None or v_scale is None:
            raise InvalidInputError(
                f"Layer {self.layer.prefix!r} has only one of k_scale and v_scale. Give both."
            )
        if self.layer.spec.mla is not None:
            v_scale = k_scale
        if (k_scale, v_scale) == self._scales:
            return
        self._scales = (k_scale, v_scale)
        for layer in self.layers:
            if layer.kv_cache is not None and is_fp8(layer.kv_cache.dtype):
                layer.set_kv_scales(k_scale, v_scale)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        context: ForwardContext,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values, and attend: see `Attention.forward`.

        Args:
            query: (num_tokens, num_heads, head_size), or with the last two flattened into one.
            key: (num_tokens, num_kv_heads, head_size) or flattened; None if the cache has all.
            value: the same of values.
            context: of the step. Layers with equal specs share what is planned in it.
            output: (num_tokens, num_heads, head_size_v), written; made if None.
            output_scale: () float32, for an output of fp8.

        Returns:
            The output, flattened if the query is.

        Raises:
            InvalidInputError: an argument does not fit; nothing has been written then.
        """
        layer = self.layer
        if output_scale is not None:
            if not self.quantizes_output() or self._quantized is None:
                raise InvalidInputError(
                    f"output_scale was given to layer {layer.prefix!r}, and no backend quantizes "
                    "its output. Ask quantizes_output first."
                )
            if self._quantized.kv_cache is None and layer.kv_cache is not None:
                self.bind(layer.kv_cache, self._given, layer.prefix)
            layer = self._quantized
        with forward_context(context):
            result: torch.Tensor = layer(
                query, key, value, output=output, output_scale=output_scale
            )
        return result

    def warm_up(self, step: GraphStep) -> None:
        """Run a step before its capture, so that its kernels are compiled. No slot is written."""
        spec, rows = self.layer.spec, step.limits.num_tokens
        device = step.batch_for(self.layer.prefix).seq_lens.device  # type: ignore[union-attr]
        make = functools.partial(torch.zeros, dtype=spec.dtype, device=device)
        if spec.mla is None:
            query = make(rows, spec.num_heads, spec.head_size)
            key = make(rows, spec.num_kv_heads, spec.head_size)
            value = make(rows, spec.num_kv_heads, spec.head_size_v)
        else:
            mla = spec.mla
            query = make(rows, spec.num_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim)
            key, value = make(rows, mla.kv_lora_rank), make(rows, mla.qk_rope_head_dim)
        for layer in self.layers:
            scale = torch.ones((), device=device) if layer is self._quantized else None
            with forward_context(step):
                layer(query, key, value, output_scale=scale)


def _memory_of(given: Any) -> object:
    """What is equal for tensors over the same memory in the same way; other objects as they are."""
    if isinstance(given, (tuple, list)):
        return [_memory_of(each) for each in given]
    if isinstance(given, torch.Tensor):
        return given.data_ptr(), given.shape, given.stride(), given.dtype, given.device
    return given
