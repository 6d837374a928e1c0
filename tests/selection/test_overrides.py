"""Overrides: their grammar, and what they do to a decision."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from attn_dispatch import explain, resolve, select
from attn_dispatch.errors import InvalidInputError, UnknownBackendError, UnsupportedError
from attn_dispatch.interface.capability import ReasonCode
from attn_dispatch.interface.spec import LAYER_KINDS
from attn_dispatch.interface.types import AttentionType, Phase
from attn_dispatch.platforms.known_devices import known_device
from attn_dispatch.selection.overrides import Mode, Rule, Source, parse_override
from attn_dispatch.selection.priorities import BUILTIN
from attn_dispatch.selection.registry import registry
from support.selection import layer, make_backend, mla_layer, registered, rules

CPU = known_device("cpu")
NAMES = frozenset({"TORCH_SDPA", "REFERENCE", "FLASH_ATTN", "FA3"})


def parse(text: str) -> tuple[Rule, ...]:
    return parse_override(text, Source.ENVIRONMENT, NAMES)


def pick(spec=None, *, phase=None, backend=None) -> str:
    """The name of what an ordinary layer gets on the CPU now."""
    return resolve(spec or layer(), CPU, phase=phase, backend=backend).name


# --- The grammar ------------------------------------------------------------------------------

ITEMS = [
    ("FLASH_ATTN", Rule(Mode.REQUIRE, "FLASH_ATTN")),
    ("FLASH_ATTN?", Rule(Mode.PREFER, "FLASH_ATTN")),
    ("-FLASH_ATTN", Rule(Mode.EXCLUDE, "FLASH_ATTN")),
    ("prefill=FA3", Rule(Mode.REQUIRE, "FA3", phase=Phase.PREFILL)),
    ("decode=-FA3", Rule(Mode.EXCLUDE, "FA3", phase=Phase.DECODE)),
    ("mla=FA3?", Rule(Mode.PREFER, "FA3", kind="mla")),
    (
        "sliding_window.decode=FA3",
        Rule(Mode.REQUIRE, "FA3", phase=Phase.DECODE, kind="sliding_window"),
    ),
    ("  prefill = flash_attn ", Rule(Mode.REQUIRE, "FLASH_ATTN", phase=Phase.PREFILL)),
]


@pytest.mark.parametrize(("text", "rule"), ITEMS, ids=[text for text, _ in ITEMS])
def test_an_item_of_an_override(text, rule):
    (parsed,) = parse(text)
    assert (parsed.mode, parsed.name, parsed.phase, parsed.kind) == (
        rule.mode,
        rule.name,
        rule.phase,
        rule.kind,
    )


@pytest.mark.parametrize("name", ["TRITON_ATTN", "TRITON_ATTN_VLLM_V1", "ROCM_ATTN", "rocm_attn"])
@pytest.mark.parametrize("item", ["{}", "-{}", "{}?", "decode={}"])
def test_vllms_names_for_its_triton_kernels_mean_ours(item, name):
    (rule,) = rules(item.format(name))
    assert rule.name == "TRITON_ATTN"


SCOPES = ["", *(f"{p}=" for p in Phase), *(f"{k}=" for k in LAYER_KINDS)]
SCOPES += [f"{kind}.{phase}=" for kind, phase in itertools.product(LAYER_KINDS, Phase)]
AFFIXES = {Mode.REQUIRE: ("", ""), Mode.PREFER: ("", "?"), Mode.EXCLUDE: ("-", "")}


@given(
    st.lists(st.tuples(st.sampled_from(SCOPES), st.sampled_from(Mode)), unique_by=lambda i: i[0])
)
def test_written_rules_are_parsed_back(items):
    # One backend in every item, so that nothing contradicts.
    text = ",".join(f"{scope}{AFFIXES[mode][0]}FA3{AFFIXES[mode][1]}" for scope, mode in items)
    read = [
        (".".join(part for part in (rule.kind, rule.phase) if part), rule.mode)
        for rule in parse(text)
    ]
    assert read == [(scope.rstrip("="), mode) for scope, mode in items]


@given(st.one_of(st.text(), st.text(alphabet="FA3_?=-,. \tprefildcomw")))
@example("prefill=decode=FA3")
@example("FA3,,FA3")
@example("²")
def test_no_text_breaks_the_parser(text):
    with contextlib.suppress(InvalidInputError, UnknownBackendError):
        parse(text)


@pytest.mark.parametrize(
    "text",
    ["FA3,", ",", "-", "?", "--FA3", "-FA3?", "FA3??", "- FA3", "os:system", "a.b:C", "prefill="],
)
def test_malformed_text_is_quoted_with_the_right_form(text):
    with pytest.raises(InvalidInputError, match=r"is malformed at '.*'\. Write NAME, NAME\? "):
        parse(text)


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_override_has_no_rules(text):
    assert parse(text) == ()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("prefil=FA3", "Did you mean prefill?"),
        ("sliding-window=FA3", "Did you mean sliding_window?"),
        ("=FA3", "Scopes are: prefill, decode, full"),
        ("prefill.mla=FA3", "kind.phase such as sliding_window.decode"),
        ("prefill=decode=FA3", "unknown scope 'prefill=decode'"),
    ],
)
def test_an_unknown_scope_is_rejected_with_the_known_ones(text, meant):
    with pytest.raises(InvalidInputError) as error:
        parse(text)
    assert meant in str(error.value)


def test_an_unknown_backend_gets_a_suggestion_and_the_list():
    with pytest.raises(UnknownBackendError) as error:
        parse("FLASHATTN")
    assert str(error.value) == (
        "ATTN_DISPATCH_BACKEND names the backend 'FLASHATTN', which is not registered. "
        "Did you mean FLASH_ATTN? Registered are: FA3, FLASH_ATTN, REFERENCE, TORCH_SDPA."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FA3,REFERENCE", "requires both FA3 and REFERENCE. Require one"),
        ("prefill=FA3,prefill=REFERENCE", "requires both FA3 and REFERENCE"),
        ("FA3,-FA3", "both selects FA3 and excludes it"),
        ("mla=-FA3,mla=FA3?", "both selects FA3 and excludes it"),
        ("mla=FA3,decode=REFERENCE", "for the decode of mla layers. Add mla.decode=NAME"),
    ],
)
def test_a_contradiction_is_rejected(text, message):
    with pytest.raises(InvalidInputError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "FA3,prefill=-FA3",
        "FA3?,REFERENCE",
        "FA3,mla=REFERENCE",
        "FA3,FA3",
        "mla=FA3,decode=REFERENCE,mla.decode=FA3",
        "mla=FA3,decode=FA3",
    ],
)
def test_an_exception_to_a_rule_is_accepted(text):
    assert len(parse(text)) == text.count(",") + 1


def test_an_override_that_is_not_a_string_is_rejected():
    with pytest.raises(InvalidInputError, match="Give the name of a backend"):
        resolve(layer(), CPU, backend=make_backend("MINE"))


# --- What overrides do ------------------------------------------------------------------------


def test_a_required_backend_is_picked_and_reported():
    selection = resolve(layer(), CPU, backend="REFERENCE")
    assert (selection.name, selection.source) == ("REFERENCE", Source.ARGUMENT)
    assert selection.report.because == "selected by the argument 'REFERENCE'"


def test_a_rejected_required_backend_is_an_error_with_reasons_and_a_remedy():
    with pytest.raises(UnsupportedError) as error:
        resolve(layer(sinks=True), CPU, backend="TORCH_SDPA")
    text = str(error.value)
    assert "the argument 'TORCH_SDPA' requires TORCH_SDPA, which cannot compute this" in text
    assert (
        "Others can: REFERENCE. Remove the override, or make it a preference with TORCH_SDPA?"
        in text
    )
    assert "TORCH_SDPA: sinks=True is not supported; the backend does not declare it" in text
    assert error.value.report.source is Source.ARGUMENT


def test_a_required_backend_and_a_request_that_no_backend_supports():
    with pytest.raises(UnsupportedError, match="No other backend can either: change the request"):
        resolve(layer(cuda_graph=True), CPU, backend="REFERENCE")


def test_a_preferred_backend_is_picked_if_supported():
    assert pick(backend="REFERENCE?") == "REFERENCE"


def test_a_rejected_preferred_backend_is_reported():
    report = resolve(layer(sinks=True), CPU, backend="TORCH_SDPA?").report
    assert (report.picked, report.source) == ("REFERENCE", Source.PLATFORM)
    assert "the argument 'TORCH_SDPA?' prefers TORCH_SDPA, which is rejected" in report.because


def test_several_preferences_count_in_order():
    assert pick(layer(sinks=True), backend="TORCH_SDPA?,REFERENCE?") == "REFERENCE"
    assert pick(backend="REFERENCE?,TORCH_SDPA?") == "REFERENCE"


def test_an_excluded_backend_is_rejected_with_the_override():
    selection = resolve(layer(), CPU, backend="-TORCH_SDPA")
    assert selection.name == "REFERENCE"
    (reason,) = selection.verdicts[0].reasons
    assert reason.code is ReasonCode.EXCLUDED
    assert str(reason) == "excluded by the argument '-TORCH_SDPA'"


def test_excluding_all_is_an_error_with_every_reason():
    everything = ",".join(f"-{name}" for name in BUILTIN)
    with pytest.raises(UnsupportedError) as error:
        resolve(layer(sinks=True), CPU, backend=everything)
    verdicts = {verdict.name: verdict for verdict in error.value.report.verdicts}
    assert set(verdicts) >= set(BUILTIN)
    assert all(verdicts[n].reasons[-1].code is ReasonCode.EXCLUDED for n in BUILTIN)
    assert [str(reason.code) for reason in verdicts["TORCH_SDPA"].reasons] == [
        "undeclared",
        "excluded",
    ]
    for reason in verdicts["TORCH_SDPA"].reasons:
        assert str(reason) in str(error.value)


def test_a_requirement_for_a_missing_candidate_is_not_ignored():
    few = {"REFERENCE": registry.candidates()["REFERENCE"]}
    with pytest.raises(UnsupportedError, match="requires TORCH_SDPA, which cannot"):
        select(layer(), CPU, rules=rules("TORCH_SDPA"), candidates=few)


def test_an_override_by_phase_holds_for_that_phase():
    override = "prefill=REFERENCE,decode=TORCH_SDPA"
    assert [r.picked for r in explain(layer(), CPU, backend=override)] == [
        "REFERENCE",
        "TORCH_SDPA",
    ]


def test_an_override_by_kind_holds_for_that_kind():
    assert pick(layer(), backend="sliding_window=REFERENCE") == "TORCH_SDPA"
    assert pick(layer(sliding_window=8), backend="sliding_window=REFERENCE") == "REFERENCE"
    assert pick(mla_layer(), backend="full=TORCH_SDPA") == "REFERENCE_MLA"


def test_an_override_by_kind_and_phase_holds_for_both():
    override = "sliding_window.decode=REFERENCE"
    window = layer(sliding_window=8)
    assert [r.picked for r in explain(window, CPU, backend=override)] == [
        "TORCH_SDPA",
        "REFERENCE",
    ]
    assert [r.picked for r in explain(layer(), CPU, backend=override)] == ["TORCH_SDPA"] * 2


def test_overrides_that_differ_by_phase_need_a_phase():
    with pytest.raises(InvalidInputError) as error:
        pick(backend="decode=REFERENCE")
    assert "pick TORCH_SDPA for prefill and REFERENCE for decode. Pass phase=" in str(error.value)


def test_overrides_that_agree_need_no_phase():
    assert pick(backend="prefill=REFERENCE,decode=REFERENCE") == "REFERENCE"
    assert pick(layer(sinks=True), backend="decode=REFERENCE") == "REFERENCE"


def test_an_encoder_has_no_decode_to_disagree_with():
    encoder = layer(attn_type=AttentionType.ENCODER_ONLY, block_size=None)
    assert pick(encoder, backend="decode=REFERENCE") == "TORCH_SDPA"


def test_a_phase_may_be_given_as_text():
    assert pick(phase="decode", backend="decode=REFERENCE") == "REFERENCE"
    with registered(make_backend("DECODER")):
        assert resolve(layer(), CPU, phase="decode").report.phase is Phase.DECODE


@pytest.mark.parametrize("function", [resolve, select, explain], ids=lambda f: f.__name__)
def test_an_unknown_phase_is_rejected(function):
    with pytest.raises(InvalidInputError, match="phase='chunked' is neither"):
        function(layer(), CPU, phase="chunked")
