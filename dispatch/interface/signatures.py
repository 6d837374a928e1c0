"""Whether a backend's members accept every call that the interface's signatures allow.

The calls are: positional in the interface's order, without its optional arguments, or by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

from attn_dispatch.interface.backend import AttentionBackend
from attn_dispatch.interface.graphs import AttentionState
from attn_dispatch.interface.impl import AttentionImpl, MLAAttentionImpl
from attn_dispatch.interface.metadata import AttentionMetadata, AttentionMetadataBuilder
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC

__all__ = ["OPTIONAL_ARGUMENTS", "signature_problems"]

#: The methods of each base that are called.
_METHODS: dict[type, tuple[str, ...]] = {
    AttentionBackend: (
        "full_cls_name",
        "get_state_cls",
        "get_kv_cache_shape",
        "get_kv_cache_stride_order",
        "swap_blocks",
        "copy_blocks",
        "check_combination",
        "kernel_notes",
        "kernel_provider",
    ),
    MLAAttentionImpl: ("__init__", "forward", "fused_output_quant_supported"),
    AttentionImpl: ("__init__", "forward", "write_kv", "fused_output_quant_supported"),
    AttentionMetadata: ("asdict_zerocopy",),
    AttentionMetadataBuilder: ("__init__", "build"),
    AttentionState: (
        "__init__",
        "begin_forward",
        "graph_capture",
        "graph_clone",
        "graph_capture_get_metadata_for_batch",
        "get_graph_input_buffers",
        "prepare_graph_input_buffers",
    ),
}
#: Read without being called.
_PROPERTIES: dict[type, tuple[str, ...]] = {
    AttentionMetadata: ("prefill_metadata", "decode_metadata")
}
#: Arguments that only the impl of a backend is given that declares them: name -> the field of the
#: spec, and a value for which the argument is given.
OPTIONAL_ARGUMENTS: dict[str, tuple[str, Any]] = {
    "alibi_symmetric": ("alibi", ALIBI_SYMMETRIC),
    "window_size": ("window_size", (1, 2)),
    "attention_chunk": ("attention_chunk", 8192),
    "key_positions": ("key_positions", True),
}

_Call = tuple[list[str], list[str]]


def signature_problems(cls: type, *, optional: Collection[str] = ()) -> list[str]:
    """Why members of a backend class, or of one of its parts, cannot be called.

    Args:
        cls: a subclass of one of the interface's classes.
        optional: those of OPTIONAL_ARGUMENTS that an impl must take.
    """
    base = next(base for base in _METHODS if issubclass(cls, base))
    problems = []
    for name in _METHODS[base]:
        if inspect.getattr_static(cls, name) is inspect.getattr_static(base, name):
            continue
        expected = _expected(base, name)
        if name == "__init__" and issubclass(base, AttentionImpl):
            left_out = OPTIONAL_ARGUMENTS.keys() - set(optional)
            kept = [p for p in expected.parameters.values() if p.name not in left_out]
            expected = expected.replace(parameters=kept)
        problems += _problems_of(cls, base, name, expected)
    for name in _PROPERTIES.get(base, ()):
        if inspect.isroutine(inspect.getattr_static(cls, name, None)):
            problems.append(f"{cls.__name__}.{name} is a method; it must be a property")
    return problems


@functools.cache
def _expected(base: type, name: str) -> inspect.Signature:
    """The signature of the interface's own member, without self."""
    signature = _bound(base, name)
    assert signature is not None
    return signature


def _problems_of(cls: type, base: type, name: str, expected: inspect.Signature) -> list[str]:
    """One sentence if a call of the base's member is not accepted."""
    if not callable(getattr(cls, name)):
        return [f"{cls.__name__}.{name} is not callable; it must be a method"]
    found = _bound(cls, name)
    if found is None:
        return []
    # A subclass of MLAAttentionImpl may need more arguments, by name.
    is_open = name == "__init__" and issubclass(base, MLAAttentionImpl)
    bind: Callable[..., object] = found.bind_partial if is_open else found.bind
    kinds = {p.kind for p in found.parameters.values()}
    # A member with *args has no names for the optional arguments.
    has_names = name == "__init__" or inspect.Parameter.VAR_POSITIONAL not in kinds
    for positional, named in _calls(expected, by_name=name == "__init__"):
        if positional and named and not has_names:
            continue
        try:
            bind(*positional, **dict.fromkeys(named))
        except TypeError as error:
            return [
                f"{cls.__name__}.{name}{_shown(found)} does not accept every call of "
                f"{base.__name__}.{name}{_shown(expected)}: {error}"
            ]
    return []


def _calls(expected: inspect.Signature, *, by_name: bool) -> Iterator[_Call]:
    """Calls that a signature allows: positional names, and keyword names."""
    by_position = [
        p for p in expected.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    keywords = [
        p.name for p in expected.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    required = [p.name for p in by_position if p.default is inspect.Parameter.empty]
    everything = [p.name for p in by_position]
    yield everything, keywords
    yield required, []
    yield required, [*everything[len(required) :], *keywords]
    if by_name:  # as a layer constructs its impl
        yield [], [*everything, *keywords]


def _bound(cls: type, name: str) -> inspect.Signature | None:
    """The signature of a member without self; None if Python cannot tell."""
    # A backend is never instantiated; its members are called on the class.
    has_self = not issubclass(cls, AttentionBackend) and not isinstance(
        inspect.getattr_static(cls, name), (staticmethod, classmethod)
    )
    member: Any = getattr(cls, name)
    try:
        signature = inspect.signature(member)
    except (TypeError, ValueError):  # a built-in or compiled function need not have one
        return None
    parameters = list(signature.parameters.values())
    if has_self and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    return signature.replace(parameters=parameters)


def _shown(signature: inspect.Signature) -> str:
    """The signature without annotations."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
