"""CompiledLayers: torch.compile for what surrounds the attention of a PagedModel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from attn_dispatch.integrations.transformers.calls import NoKeysCache

__all__ = ["CompiledLayers"]


class CompiledLayers:
    """The modules that hold a model's attention modules, usually its decoder layers, compiled.

    transformers writes norms, rotary embeddings and gated MLPs as many small operations, each of
    which reads and writes all of a step's hidden states. Compiled, they become a few kernels. One
    compilation serves all layers of a kind, and one all lengths of steps but 1: neither a layer's
    number nor a length is a constant in it. Sums may be rounded otherwise than without.

    The cache and the attention function are called as they are, and not compiled.

    Args:
        model: changed in place; compiled when it is called.
        attention: its attention modules.
        cache: what the model gets as its cache.
    """

    def __init__(
        self, model: torch.nn.Module, attention: Iterable[torch.nn.Module], cache: NoKeysCache
    ) -> None:
        inner = {id(module) for module in attention}
        cache.update = torch.compiler.disable(cache.update)  # type: ignore[method-assign]
        for module in model.modules():
            if any(id(child) in inner for child in module.children()):
                module.compile(dynamic=True)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The context of the model's calls."""
        import torch._dynamo

        # Each layer passes its number to the cache. As a constant, it would make each layer another
        # program.
        patched: Any = torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
        with patched:
            yield

    def unused(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the modules run their own code."""
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
