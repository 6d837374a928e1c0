"""The interface of a peer, and the arguments that the functions of several peers share."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from attn_dispatch.bench.cases import Case
from attn_dispatch.bench.implementations import Call, Implementation
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.errors import summary_of
from attn_dispatch.interface.capability import Strides

__all__ = [
    "Peer",
    "PeerMissing",
    "arguments_of",
    "call_of",
    "first_of",
    "only_known",
    "refusal_of",
    "window_of",
]


#: What all peers need of a cache's memory.
_READS = Strides(aligned=True)


class PeerMissing(Exception):
    """The peer cannot be imported here; the message names what is missing."""


class Peer(Implementation):
    """Another package's attention.

    Attributes:
        provider: the module that it was found in, once loaded.
        version: of its package, once loaded.
    """

    kind = "peer"
    provider = version = ""

    @abstractmethod
    def load(self) -> None:
        """Import it.

        Raises:
            PeerMissing: it is not installed, or broken.
        """

    def _find(self, *names: str) -> Any:
        """The first of some "module:attribute" that can be imported; sets provider and version."""
        problems = []
        for name in names:
            module_name, _, attribute = name.partition(":")
            try:
                found = getattr(importlib.import_module(module_name), attribute)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a broken package raises anything at all
                problems.append(f"{module_name}: {summary_of(error)}")
                continue
            self.provider = module_name
            self.version = _version_of(module_name)
            return found
        raise PeerMissing("; ".join(problems))


def _version_of(module_name: str) -> str:
    top = module_name.split(".", maxsplit=1)[0]
    try:
        distributions = importlib.metadata.packages_distributions().get(top, [top])
        return importlib.metadata.version(distributions[0])
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(top), "__version__", "unknown"))


def refusal_of(case: Case, *computes: str) -> str | None:
    """The reason why a peer that computes only these features does not compute the case."""
    asked = {
        "multi-head latent attention": case.mla is not None,
        "alibi": bool(case.alibi),
        "symmetric alibi": case.alibi == "symmetric" and not case.causal,
        "sinks": case.sinks,
        "logits_soft_cap": case.logits_soft_cap is not None,
        "sliding_window": case.sliding_window is not None,
        "a cache of eight bits": case.is_quantized,
        "no causality over a cache": case.has_kv_cache and not case.causal,
        "float32": case.dtype == "float32",
    }
    missing = [name for name, is_asked in asked.items() if is_asked and name not in computes]
    if missing:
        return f"it does not compute {missing[0]}"
    strides = None if case.kv_layout is None else case.spec().kv_strides
    if strides is not None and not _READS.suits(strides):
        return f"it reads caches with {_READS.describe()}, and this one is {strides}"
    return None


def window_of(case: Case) -> tuple[int, int]:
    """(left, right): the number of keys that a query sees on either side of its own; −1 for all."""
    left = -1 if case.sliding_window is None else case.sliding_window - 1
    return left, 0 if case.causal and left >= 0 else left


def only_known(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function has; releases differ in some that do not change the result."""
    known = inspect.signature(function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in known}


def first_of(result: Any) -> torch.Tensor:
    """The output of a function that may also return its log-sum-exp."""
    output: torch.Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return output


def call_of(function: Callable[..., Any], arguments: dict[str, Any]) -> Call:
    """A call of a function that returns its output, or only writes it to `out`."""

    def call() -> torch.Tensor:
        result = function(**arguments)
        return first_of(arguments["out"] if result is None else result)

    return call


def arguments_of(inputs: Inputs) -> dict[str, Any]:
    """The queries, the features of the layer and the lengths, under FlashAttention's names."""
    case = inputs.case
    return {
        "q": inputs.query,
        "softmax_scale": case.scale,
        "causal": case.causal,
        "window_size": window_of(case),
        "softcap": case.logits_soft_cap or 0.0,
        "cu_seqlens_q": inputs.query_start_loc,
        "max_seqlen_q": max(case.query_lens),
        "max_seqlen_k": max(case.seq_lens),
    }
