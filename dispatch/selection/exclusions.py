"""The exclusions that recorded failures demand of selection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.device import DeviceProfile
from attn_dispatch.selection.failure_record import Failure, failures_for
from attn_dispatch.selection.overrides import FailureExclusion, Mode, Rule

__all__ = ["exclude_failed"]


def exclude_failed(
    rules: Sequence[Rule],
    spec: AttentionSpec,
    device: DeviceProfile,
    phase: Phase | None,
    unrecorded: Sequence[Failure] = (),
) -> tuple[Rule, ...]:
    """The rules in force, and an exclusion for each backend that failed and is not required.

    Backends that cannot take the place of the one that would be picked if it had not failed are
    excluded too: the cache may have been planned for that one, see `tuning.compatible_substitutes`.

    Args:
        rules: the overrides in force.
        spec, device, phase, unrecorded: as for `failures_for`.
    """
    failed = {f.backend: f for f in failures_for(spec, device, phase, unrecorded)}
    if not failed:
        return tuple(rules)
    found = {
        name: f"it failed {each.doing}: {each.cause} ({_REMEDY})" for name, each in failed.items()
    }
    for unfit, first in _incompatible_substitutes(rules, spec, device, phase, failed):
        text = f"{first}, which failed, has another layout of the cache or other buffers of graphs"
        found.setdefault(unfit, text)
    kept = [rule for rule in rules if rule.mode is not Mode.PREFER or rule.name not in failed]
    return (
        *kept,
        *(FailureExclusion(Mode.EXCLUDE, name, text=text) for name, text in found.items()),
    )


_REMEDY = "attn_dispatch.forget_failures() lets it be tried again"


def _incompatible_substitutes(
    rules: Sequence[Rule],
    spec: AttentionSpec,
    device: DeviceProfile,
    phase: Phase | None,
    failed: dict[str, Failure],
) -> Iterator[tuple[str, str]]:
    """Each backend that cannot take the place of the first one, which failed, with that one."""
    from attn_dispatch.selection.registry import registry
    from attn_dispatch.selection.selector import decide
    from attn_dispatch.selection.substitutes import compatible_substitutes

    candidates = registry.candidates()
    report = decide(spec, device, phase=phase, rules=rules, candidates=candidates)
    first = report.picked
    if first is None or first not in failed:
        return

    def supports(name: str, each: AttentionSpec) -> bool:
        told = decide(each, device, phase=phase, rules=(), candidates=candidates).verdicts
        return any(verdict.name == name and verdict.supported for verdict in told)

    able = (first, *report.others)
    classes = {name: cls for name in able if (cls := candidates[name].backend_cls)}
    fitting = compatible_substitutes(able, classes, spec, supports)
    yield from ((name, first) for name in able if name not in fitting)
