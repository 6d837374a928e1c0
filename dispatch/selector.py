"""The decision: which backend computes exactly this request here, and why.

`select` is pure: everything that it depends on is an argument. `resolve`, `get_attn_backend` and
`explain` are its fronts: they read the overrides in force, the device and the registry.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attn_dispatch import environment, fallback, libraries, overrides
from attn_dispatch.capability import Reason, ReasonCode, compare
from attn_dispatch.device import DeviceProfile, detect_device, known_device, settle_device
from attn_dispatch.errors import InvalidInputError, UnsupportedError
from attn_dispatch.interface import AttentionType, Phase
from attn_dispatch.libraries import Library
from attn_dispatch.overrides import Mode, Rule, Source
from attn_dispatch.platforms import LAST_RESORT, backend_order
from attn_dispatch.registry import Candidate, registry
from attn_dispatch.report import Report, Selection, Verdict
from attn_dispatch.spec import AttentionSpec, MLADims
from attn_dispatch.tuning.choose import Evidence, Side, times_for, weigh
from attn_dispatch.tuning.stand_ins import stand_ins
from attn_dispatch.tuning.store import tables_for
from attn_dispatch.tuning.table import LayerTimes, Table

if TYPE_CHECKING:
    import torch

    from attn_dispatch.interface import AttentionBackend

__all__ = [
    "ReferenceFallbackWarning",
    "explain",
    "get_attn_backend",
    "phases_of",
    "resolve",
    "select",
]


class ReferenceFallbackWarning(UserWarning):
    """Automatic selection on a GPU found nothing faster than the reference backend."""


def select(
    spec: AttentionSpec,
    device: DeviceProfile,
    *,
    phase: Phase | None = None,
    rules: Iterable[Rule] = (),
    candidates: Mapping[str, Candidate] | None = None,
    tables: Sequence[Table] = (),
) -> Selection:
    """Pick the backend for a request. Pure: no environment, no clock, no device is read.

    Args:
        spec: the request.
        device: where, with the libraries that are there.
        phase: prefill or decode; None for one backend that serves both.
        rules: the overrides in force, most authoritative first.
        candidates: the backends to choose from; those that are registered if None.
        tables: of measured times, the most telling first; see `tuning`.

    Raises:
        UnsupportedError: the required backend, or every backend, is refused. Its report holds
            every reason.
        InvalidInputError: phase is neither prefill nor decode.
    """
    if candidates is None:
        candidates = registry.candidates()
    report = decide(spec, device, phase=phase, rules=rules, candidates=candidates, tables=tables)
    if report.picked is None:
        raise UnsupportedError(str(report), report)
    backend_cls = candidates[report.picked].backend_cls
    assert backend_cls is not None
    return Selection(backend_cls, report)


def decide(
    spec: AttentionSpec,
    device: DeviceProfile,
    *,
    phase: Phase | None,
    rules: Iterable[Rule],
    candidates: Mapping[str, Candidate],
    tables: Sequence[Table] = (),
) -> Report:
    """`select` as a report, also of a failure. Pure."""
    phase = _as_phase(phase)
    rules = [rule for rule in rules if rule.applies(phase, spec.kind)]
    order = backend_order(device, phase, tuple(candidates))
    verdicts = {name: _judge(candidates[name], spec, device) for name in order}
    for name in {rule.name for rule in rules} - set(verdicts):
        verdicts[name] = Verdict(name, (_NO_CANDIDATE,))

    def conclude(
        picked: str | None, source: Source | None, because: str, measured: Evidence | None = None
    ) -> Report:
        cls = candidates[picked].backend_cls if picked else None
        full_cls_name = cls.full_cls_name() if cls else None
        found = tuple(verdicts.values())
        return Report(spec, device, phase, picked, source, because, full_cls_name, found, measured)

    settled: set[str] = set()  # a higher rule has spoken of these; lower ones no longer count
    passed_over = []
    for rule in rules:
        if rule.name in settled:
            continue
        settled.add(rule.name)
        if rule.mode is Mode.EXCLUDE:
            code, field = ReasonCode.EXCLUDED, "override"
            if isinstance(rule, fallback.PassedOver):
                code, field = ReasonCode.FAILED, "backend"
            reason = Reason(code=code, field=field, asked=str(rule))
            verdict = verdicts[rule.name]
            verdicts[rule.name] = Verdict(rule.name, (*verdict.reasons, reason))
        elif verdicts[rule.name].supported:
            return conclude(rule.name, rule.source, f"{rule} asks for it")
        elif rule.mode is Mode.REQUIRE:
            return conclude(None, rule.source, _required_but_refused(rule, verdicts))
        else:
            passed_over.append(f"; {rule} prefers {rule.name}, which is refused")
    able = [name for name in order if verdicts[name].supported]
    if not able:
        return conclude(None, None, "No registered backend computes exactly this request here:")
    told = "".join(passed_over)
    measured = _measured(able, spec, device, phase, candidates, tables)
    if measured is not None and measured.pick != able[0]:
        return conclude(measured.pick, Source.MEASURED, measured.because + told, measured)
    if measured is not None:
        told = f"; {measured.because}{told}"
    because = f"first in this platform's order that supports it{told}"
    return conclude(able[0], Source.PLATFORM, because, measured)


def _measured(
    able: Sequence[str],
    spec: AttentionSpec,
    device: DeviceProfile,
    phase: Phase | None,
    candidates: Mapping[str, Candidate],
    tables: Sequence[Table],
) -> Evidence | None:
    """What the tables say of those who are able, in the platform's order; None if nothing."""
    times = times_for(tables, spec)
    if times is None:
        return None
    classes = {name: cls for name in able if (cls := candidates[name].backend_cls)}
    changed = _served_by_others(times, classes, spec, device)
    if able[0] in changed:
        return None
    admitted = stand_ins(
        able,
        classes,
        spec,
        lambda name, each: _judge(candidates[name], each, device).supported,
    )
    side = Side(able[0], admitted - changed)
    return weigh(times, side, phase, captured=spec.cuda_graph)


def _served_by_others(
    times: LayerTimes,
    classes: Mapping[str, type[AttentionBackend]],
    spec: AttentionSpec,
    device: DeviceProfile,
) -> set[str]:
    """The backends that would call another package's kernels here than those that were timed."""
    changed = set()
    for name in times.served_by.keys() & classes.keys():
        try:
            who = classes[name].served_by(spec, device)
        except Exception:  # a plugin's own words may raise anything at all: then nobody knows
            who = ""
        if who != times.served_by[name]:
            changed.add(name)
    return changed


_NO_CANDIDATE = Reason(code=ReasonCode.LOAD, field="backend", asked="it is not a candidate")


def _as_phase(phase: Phase | str | None) -> Phase | None:
    try:
        return None if phase is None else Phase(phase)
    except ValueError as error:
        raise InvalidInputError(f"phase={phase!r} is neither 'prefill' nor 'decode'.") from error


def _judge(candidate: Candidate, spec: AttentionSpec, device: DeviceProfile) -> Verdict:
    cls = candidate.backend_cls
    if cls is None:
        assert candidate.problem is not None
        return Verdict(candidate.name, (candidate.problem,))
    try:
        reasons = compare(spec, cls.capabilities, device)
        # Fields that are refused one by one need no word on how they combine.
        return Verdict(candidate.name, tuple(reasons or cls.check_combination(spec, device)))
    except Exception as error:  # a plugin's own checks may raise anything at all
        asked = f"its check of the request raises {type(error).__name__}: {error}"
        problem = Reason(code=ReasonCode.LOAD, field="backend", asked=asked)
        return Verdict(candidate.name, (problem,))


def _required_but_refused(rule: Rule, verdicts: Mapping[str, Verdict]) -> str:
    able = [verdict.name for verdict in verdicts.values() if verdict.supported]
    remedy = "Nothing else could either: change the request."
    if able:
        remedy = (
            f"What could: {', '.join(able)}. Drop the override, or soften it to {rule.name}? "
            "(prefer)."
        )
    return f"{rule} requires {rule.name}, which cannot compute this request. {remedy} The reasons:"


def phases_of(spec: AttentionSpec) -> tuple[Phase, ...]:
    """The phases that a layer goes through: an encoder has only a prefill."""
    if AttentionType(spec.attn_type).has_kv_cache:
        return (Phase.PREFILL, Phase.DECODE)
    return (Phase.PREFILL,)


# Decisions by everything that they depend on, overrides and environment as they stand included.
_decided: dict[tuple[Any, ...], Selection] = {}
_DECIDED_MAX = 4096


def resolve(
    spec: AttentionSpec,
    device: torch.device | str | DeviceProfile | None = None,
    *,
    phase: Phase | None = None,
    backend: str | None = None,
) -> Selection:
    """Pick the backend for a request under the overrides that are in force here and now.

    Args:
        spec: the request.
        device: a torch device of this machine, or a profile; None for the default device.
        phase: prefill or decode; None for one backend that serves both.
        backend: an override with the authority of an argument, in overrides' grammar.

    Raises:
        UnsupportedError: the required backend, or every backend, is refused.
        UnknownBackendError: an override names a backend that is not registered.
        InvalidInputError: an override or the device is malformed.
    """
    overrides.check_override(backend)
    if not isinstance(device, DeviceProfile):
        device = settle_device(device)
    generations = (registry.generation, libraries.generation(), fallback.generation())
    named = environment.tuning()
    tuning = (named, "" if named else environment.cache_folder())
    key = (spec, device, phase, backend, overrides.current_texts(), tuning, generations)
    selection = _decided.get(key)
    if selection is None:
        profile = device if isinstance(device, DeviceProfile) else detect_device(device)
        rules = overrides.current_rules(backend, registry.names())
        selection = select_and_warn(spec, profile, phase=phase, rules=rules)
        if len(_decided) >= _DECIDED_MAX:
            _decided.clear()
        _decided[key] = selection
    return selection


def select_and_warn(
    spec: AttentionSpec,
    device: DeviceProfile,
    *,
    phase: Phase | None,
    rules: tuple[Rule, ...],
    unrecorded: Sequence[fallback.Failure] = (),
) -> Selection:
    """`select` over the registry and this device's tables of times, without what failed here.

    It warns if a GPU is left with the last resort, or if a table is set aside.

    Args:
        spec: the request.
        device: where it runs.
        phase: as for `resolve`.
        rules: the overrides in force.
        unrecorded: failures of the call in progress, which are not recorded yet.

    Raises:
        UnsupportedError: the required backend, or every backend, is refused.
        InvalidInputError: phase is None, and the rules differ by phase.
    """
    rules = fallback.exclude_failed(rules, spec, device, phase, unrecorded)
    selection = _select_one(spec, device, phase, rules)
    _warn_of_last_resort(selection)
    return selection


def _select_one(
    spec: AttentionSpec, device: DeviceProfile, phase: Phase | None, rules: tuple[Rule, ...]
) -> Selection:
    if phase is not None or not any(
        rule.phase and rule.kind in (None, spec.kind) for rule in rules
    ):
        return select(spec, device, phase=phase, rules=rules, tables=tables_for(device))
    # One backend is wanted for both phases, and somebody spoke of one phase: they must agree.
    # Times differ by phase too, and are no reason to refuse: they are left out.
    picks = [select(spec, device, phase=each, rules=rules) for each in phases_of(spec)]
    if len({pick.name for pick in picks}) > 1:
        told = " and ".join(f"{pick.name} for {pick.report.phase}" for pick in picks)
        raise InvalidInputError(
            f"The overrides in force pick {told}. Pass phase= to say which one is meant."
        )
    return picks[0]


#: Each warning is given once in a process, however many layers it is about.
_warned: set[str] = set()


def _warn_of_last_resort(selection: Selection) -> None:
    report = selection.report
    if report.source is not Source.PLATFORM or report.picked not in LAST_RESORT:
        return
    # What is for other devices did not stand in the way here.
    here = [v for v in report.verdicts if all(r.code is not ReasonCode.DEVICE for r in v.reasons)]
    refused = [f"  {v.name}: {r}" for v in here for r in v.reasons if v.name not in LAST_RESORT]
    text = (
        f"{report.picked} serves this layer on {report.device.name}: right, but slow. "
        "What stood in the way of faster backends:\n" + "\n".join(refused)
    )
    if report.device.is_gpu and refused and text not in _warned:
        _warned.add(text)
        warnings.warn(text, ReferenceFallbackWarning, stacklevel=4)


@functools.lru_cache(maxsize=4096, typed=True)  # 1 is not True, and 128.0 not 128
def _make_spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**fields)


#: (num_heads, num_kv_heads) of a layer whose head counts are left open: those of many models.
_OPEN_HEADS = (32, 8)
#: The same for multi-head latent attention: those of DeepSeek-V3.
_OPEN_MLA_HEADS = 128
_OPEN_MLA = {"qk_nope_head_dim": 128, "v_head_dim": 128}


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None = "auto",
    block_size: int | None = 16,
    is_attention_free: bool = False,
    use_mla: bool = False,
    has_sink: bool = False,
    *,
    is_blocksparse: bool = False,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    device: torch.device | str | DeviceProfile | None = None,
    phase: Phase | None = None,
    backend: str | None = None,
    **fields: Any,
) -> type[AttentionBackend]:
    """The backend class for a layer: vLLM 0.10.2's front door, where every feature can be named.

    Args:
        head_size: elements per query and key head; with use_mla, kv_lora_rank + qk_rope_head_dim.
        dtype: dtype of queries, keys and values.
        kv_cache_dtype: element type of the cache; None or "auto" for that of dtype.
        block_size: tokens per block of the cache; None without one.
        is_attention_free: the model has no attention layer. The answer is a backend that computes
            nothing, whatever else is asked.
        use_mla: multi-head latent attention. Unless `mla` gives its sizes, those of DeepSeek-V3
            are taken: 64 elements of head_size (half of them, if it is less than 128) are the
            rotated part, and the rest is the latent.
        has_sink: the same as sinks=True.
        is_blocksparse: no backend computes block-sparse attention, so True is rejected.
        num_heads: query heads. None, as in vLLM, leaves the counts open: the answer is for 32 query
            heads and 8 KV heads (128 and 1 with use_mla), and for 4 query heads for each KV head
            if num_kv_heads is given. A backend may be limited to certain counts: its builder
            rejects layers that it cannot compute.
        num_kv_heads: key and value heads; None for num_heads.
        device: as for `resolve`.
        phase: as for `resolve`.
        backend: as for `resolve`.
        **fields: any other field of AttentionSpec.

    Raises:
        UnsupportedError, UnknownBackendError, InvalidInputError: as for `resolve`.

    Example:
        >>> get_attn_backend(128, torch.bfloat16, "auto", 16).get_name()
        >>> get_attn_backend(128, torch.bfloat16, num_heads=32, num_kv_heads=8, sliding_window=4096)
    """
    if any(type(flag) is not bool for flag in (is_attention_free, use_mla, has_sink)):
        raise InvalidInputError(
            "is_attention_free, use_mla and has_sink are True or False, and one is not. Name all "
            "arguments after block_size, such as num_heads=32."
        )
    if is_blocksparse:
        raise UnsupportedError(
            "is_blocksparse=True asks for block-sparse attention, which no backend computes. Give "
            "the layer a custom_mask, or leave is_blocksparse out."
        )
    if is_attention_free:
        if backend is not None:
            raise InvalidInputError(
                f"backend={backend!r} asks for a backend of a model that is_attention_free. Leave "
                "one of the two out."
            )
        from attn_dispatch.backends.no_attention import NoAttentionBackend

        return NoAttentionBackend
    if has_sink:
        fields["sinks"] = True
    if use_mla or fields.get("mla") is not None:
        fields = _mla_fields(head_size, fields)
        num_heads = _OPEN_MLA_HEADS if num_heads is None else num_heads
        num_kv_heads = 1 if num_kv_heads is None else num_kv_heads
    elif num_heads is None:
        heads, kv_heads = _OPEN_HEADS
        if num_kv_heads is None:
            num_heads, num_kv_heads = heads, kv_heads
        else:
            num_heads = heads // kv_heads * num_kv_heads
    try:
        spec = _make_spec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype or "auto",
            block_size=block_size,
            **fields,
        )
    except TypeError as error:
        raise InvalidInputError(f"This is no AttentionSpec: {error}.") from error
    return resolve(spec, device, phase=phase, backend=backend).backend_cls


def _mla_fields(head_size: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the sizes of multi-head latent attention filled in."""
    mla = fields.get("mla")
    if mla is None:
        if type(head_size) is not int or head_size < 2:
            raise InvalidInputError(
                f"head_size={head_size!r}; with use_mla it is kv_lora_rank + qk_rope_head_dim, "
                "e.g. 576."
            )
        rope = min(64, head_size // 2)
        mla = MLADims(kv_lora_rank=head_size - rope, qk_rope_head_dim=rope, **_OPEN_MLA)
    return {"head_size_v": getattr(mla, "kv_lora_rank", None), **fields, "mla": mla}


def explain(
    spec: AttentionSpec,
    device: torch.device | str | DeviceProfile | None = None,
    *,
    backend: str | None = None,
    phase: Phase | None = None,
) -> tuple[Report, ...]:
    """What would be picked for a request and why, phase by phase, refusals included.

    Never raises because of a refusal: the report of a phase that nothing can serve says so.

    Args:
        spec: the request.
        device: a torch device of this machine, a profile, or the name of a known device that may
            be elsewhere ("gfx942", "H200"): then every optional library is assumed to be there.
        backend: an override with the authority of an argument.
        phase: for this phase alone; None for all that the layer goes through.

    Raises:
        UnknownBackendError, InvalidInputError: as for `resolve`.
    """
    profile = explained_device(device)
    rules = overrides.current_rules(backend, registry.names())
    candidates = registry.candidates()
    tables = tables_for(profile)
    phases = phases_of(spec) if phase is None else (phase,)

    def report(each: Phase) -> Report:
        allowed = fallback.exclude_failed(rules, spec, profile, each)
        return decide(
            spec, profile, phase=each, rules=allowed, candidates=candidates, tables=tables
        )

    return tuple(map(report, phases))


def explained_device(
    device: torch.device | str | DeviceProfile | None, without: Iterable[str] = ()
) -> DeviceProfile:
    """The profile that `explain` speaks of; `without` names libraries to be taken as missing."""
    if isinstance(device, str) and not is_torch_device(device):
        assumed = (Library(name, "unknown") for name in registry.library_names())
        device = known_device(device).with_libraries(*assumed)
    if not isinstance(device, DeviceProfile):
        device = detect_device(device)
    return device.with_libraries(*(Library(name) for name in without))


def is_torch_device(name: str) -> bool:
    """Whether the name is that of a PyTorch device of this machine, not of a known device."""
    return name.split(":", maxsplit=1)[0] in ("cpu", "cuda", "mps", "xpu")
