"""Overrides: what a user demands of selection, where it came from, and how it ranks.

    override := item ("," item)*
    item     := [scope "="] (NAME | NAME "?" | "-" NAME)
    scope    := phase | kind | kind "." phase

`NAME` is required, `NAME?` preferred, `-NAME` excluded; `prefill=NAME`, `sliding_window=NAME` and
`sliding_window.decode=NAME` hold only for that phase or kind of layer.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum

from attn_dispatch import environment
from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError, UnknownBackendError
from attn_dispatch.interface.spec import LAYER_KINDS
from attn_dispatch.interface.types import Phase
from attn_dispatch.selection.registry import registry

__all__ = [
    "FailureExclusion",
    "Mode",
    "Rule",
    "Source",
    "attention_backend",
    "current_rules",
    "parse_override",
]


class Mode(Enum):
    """What an override demands of a backend."""

    REQUIRE = "require"
    PREFER = "prefer"
    EXCLUDE = "exclude"


class Source(str, Enum):
    """Where a decision comes from, most authoritative first within its scope."""

    ARGUMENT = "argument"
    CONTEXT = "context"
    ENVIRONMENT = "environment"
    VLLM_ENVIRONMENT = "vllm environment"
    MEASURED = "measured table"
    PLATFORM = "platform order"

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Rule:
    """One demand: require, prefer or exclude a backend, everywhere or in one scope."""

    mode: Mode
    name: str
    phase: Phase | None = None
    kind: str | None = None
    source: Source = Source.ARGUMENT
    text: str = field(default="", compare=False)

    def applies(self, phase: Phase | None, kind: str) -> bool:
        """Whether the rule is for this phase of this kind of layer."""
        return self.phase in (None, phase) and self.kind in (None, kind)

    @property
    def scopes(self) -> int:
        """How specific the rule is: 0 general, 1 by phase or by kind, 2 by both."""
        return (self.phase is not None) + (self.kind is not None)

    def __str__(self) -> str:
        return f"{_ORIGINS[self.source]} {self.text!r}"


@dataclass(frozen=True)
class FailureExclusion(Rule):
    """An exclusion of a backend that failed; its text is the reason."""

    def __str__(self) -> str:
        return self.text


_ORIGINS = {
    Source.ARGUMENT: "the argument",
    Source.CONTEXT: "attention_backend()",
    Source.ENVIRONMENT: environment.BACKEND.name,
    Source.VLLM_ENVIRONMENT: environment.VLLM_BACKEND.name,
}

#: vLLM's names for backends that have another name here. A vLLM backend without a counterpart has
#: no entry: ROCM_AITER_UNIFIED_ATTN is a kernel that ROCM_AITER avoids.
VLLM_NAMES: dict[str, str] = {
    "TORCH_SDPA_VLLM_V1": "TORCH_SDPA",
    "CPU_ATTN": "TORCH_SDPA",
    "FLASH_ATTN_VLLM_V1": "FLASH_ATTN",
    "TRITON_ATTN_VLLM_V1": "TRITON_ATTN",
    "FLASHINFER_VLLM_V1": "FLASHINFER",
    "ROCM_FLASH": "ROCM_FLASH_ATTN",
    "ROCM_ATTN": "TRITON_ATTN",
    "ROCM_AITER_FA": "ROCM_AITER",
}


@functools.lru_cache(maxsize=1024)
def parse_override(text: str, source: Source, names: frozenset[str]) -> tuple[Rule, ...]:
    """The rules in an override's text.

    Args:
        text: in the grammar above; empty for no rules.
        source: its origin.
        names: the backends that are registered.

    Raises:
        InvalidInputError: the text is malformed or contradicts itself.
        UnknownBackendError: it names a backend that is not registered.
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"{_ORIGINS[source]} is {text!r}. Give the name of a backend.")
    if not text.strip():
        return ()
    rules = tuple(_parse_item(item, text, source, names) for item in text.split(","))
    _check_consistent(rules, f"{_ORIGINS[source]} {text!r}")
    return rules


def _parse_item(item: str, text: str, source: Source, names: frozenset[str]) -> Rule:
    scope, separator, value = item.rpartition("=")
    phase, kind = _parse_scope(scope.strip(), text, source) if separator else (None, None)
    value = value.strip()
    if value.startswith("-"):
        mode, value = Mode.EXCLUDE, value[1:]
    elif value.endswith("?"):
        mode, value = Mode.PREFER, value[:-1]
    else:
        mode = Mode.REQUIRE
    if not value.replace("_", "").isalnum():
        raise InvalidInputError(
            f"{_ORIGINS[source]} {text!r} is malformed at {item.strip()!r}. Write NAME, NAME? "
            "(prefer) or -NAME (exclude), each after prefill=, decode= or a kind of layer if it "
            "is only for that, separated by commas."
        )
    return Rule(mode, _backend_name(value, source, names), phase, kind, source, text)


def _parse_scope(scope: str, text: str, source: Source) -> tuple[Phase | None, str | None]:
    phases = [phase.value for phase in Phase]
    kind, dot, phase = scope.rpartition(".")
    if not dot and scope in LAYER_KINDS:
        return None, scope
    if phase in phases and (not dot or kind in LAYER_KINDS):
        return Phase(phase), kind or None
    known = [*phases, *LAYER_KINDS]
    raise InvalidInputError(
        f"{_ORIGINS[source]} {text!r} has an unknown scope {scope!r}."
        f"{_did_you_mean(scope, known)} Scopes are: {', '.join(known)}, and kind.phase such as "
        "sliding_window.decode."
    )


def _backend_name(value: str, source: Source, names: frozenset[str]) -> str:
    name = value.upper()
    translated = name if name in names else VLLM_NAMES.get(name, name)
    if translated in names:
        return translated
    meant = remedy = ""
    if translated != name:
        meant = f" It is vLLM's name for {translated}, which is not registered here."
    if source is Source.VLLM_ENVIRONMENT:
        ours = environment.BACKEND.name
        remedy = f" If it is only for vLLM, set {ours}, which outranks it, or unset it."
    raise UnknownBackendError(
        f"{_ORIGINS[source]} names the backend {value!r}, which is not registered.{meant}"
        f"{_did_you_mean(name, names)} Registered are: {', '.join(sorted(names))}.{remedy}"
    )


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _check_consistent(rules: tuple[Rule, ...], override: str) -> None:
    required: dict[tuple[Phase | None, str | None], str] = {}
    for rule in rules:
        scope = (rule.phase, rule.kind)
        if rule.mode is Mode.REQUIRE and required.setdefault(scope, rule.name) != rule.name:
            raise InvalidInputError(
                f"{override} requires both {required[scope]} and {rule.name}. "
                f"Require one; or prefer them in order: {required[scope]}?,{rule.name}?"
            )
    # Phase and kind have the same rank, so rules for them must agree where both apply.
    by_phase = [(phase, name) for (phase, kind), name in required.items() if phase and not kind]
    by_kind = [(kind, name) for (phase, kind), name in required.items() if kind and not phase]
    for (phase, one), (kind, other) in itertools.product(by_phase, by_kind):
        if one != other and (phase, kind) not in required:
            raise InvalidInputError(
                f"{override} requires both {one} and {other} for the {phase} of "
                f"{kind} layers. Add {kind}.{phase}=NAME to choose one."
            )
    wanted = {(r.name, r.phase, r.kind) for r in rules if r.mode is not Mode.EXCLUDE}
    for rule in rules:
        if rule.mode is Mode.EXCLUDE and (rule.name, rule.phase, rule.kind) in wanted:
            raise InvalidInputError(
                f"{override} both selects {rule.name} and excludes it. Keep one of the two."
            )


_context: ContextVar[tuple[str, ...]] = ContextVar("attn_dispatch_overrides", default=())


@contextlib.contextmanager
def attention_backend(override: str) -> Iterator[None]:
    """Apply an override to every selection made inside the context.

    It holds only for the current thread and asyncio task. Contexts nest: the inner one outranks the
    outer.

    Args:
        override: in the grammar of this module, e.g. "REFERENCE", "decode=TORCH_SDPA" or
            "-TORCH_SDPA".

    Raises:
        InvalidInputError: the override is malformed.
        UnknownBackendError: it names a backend that is not registered.

    Example:
        >>> with attention_backend("REFERENCE"):
        ...     output = attention(query, key, value)
    """
    parse_override(override, Source.CONTEXT, registry.names())  # raises here, not later
    token = _context.set((override, *_context.get()))
    try:
        yield
    finally:
        _context.reset(token)


def current_rules(argument: str | None, names: frozenset[str]) -> tuple[Rule, ...]:
    """Every rule in force now, most authoritative first.

    The argument ranks first; then rules for a phase or kind; then general rules. Within each:
    contexts from the innermost out, then ATTN_DISPATCH_BACKEND, then vLLM's variable.

    Raises:
        InvalidInputError: an override is malformed, or the argument is not a string.
        UnknownBackendError: an override names a backend that is not registered.
    """
    if argument is not None and not isinstance(argument, str):
        raise InvalidInputError(
            f"backend={shown(argument)} is not a string. Give the name of a backend, or an "
            "override such as 'prefill=FLASH_ATTN'."
        )
    env, vllm_env = environment.backend_override(), environment.vllm_backend_override()
    return _ranked(argument or "", _context.get(), env, vllm_env, names)


@functools.lru_cache(maxsize=1024)
def _ranked(
    argument: str, contexts: tuple[str, ...], env: str, vllm_env: str, names: frozenset[str]
) -> tuple[Rule, ...]:
    rules = [
        *parse_override(argument, Source.ARGUMENT, names),
        *(rule for text in contexts for rule in parse_override(text, Source.CONTEXT, names)),
        *parse_override(env, Source.ENVIRONMENT, names),
    ]
    # vLLM's variable may name what is not registered here, so a general requirement outranks it
    # before it is parsed.
    if not any(rule.mode is Mode.REQUIRE and rule.scopes == 0 for rule in rules):
        rules += parse_override(vllm_env, Source.VLLM_ENVIRONMENT, names)
    return tuple(sorted(rules, key=lambda rule: (rule.source is not Source.ARGUMENT, -rule.scopes)))
