"""The suite that backends are verified by: ours pass it, and what is wrong does not."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend, ReferenceImpl
from attn_dispatch.conformance import Check, Conformance, checks_for, run, verify
from attn_dispatch.conformance.check import BackendUnderTest, Skipped
from attn_dispatch.conformance.comparison import allowed_error, suspects
from attn_dispatch.conformance.probes import (
    VALUES,
    WITHOUT_PROBES,
    base_spec,
    covering,
    probes_for,
    refusals,
)
from attn_dispatch.conformance.pytest_plugin import assert_conforms
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound, distance
from attn_dispatch.errors import BackendFailure, InvalidInputError, UnsupportedError
from attn_dispatch.interface.capability import (
    AnyOf,
    ByDevice,
    Capabilities,
    MultipleOf,
    OneOf,
    Range,
    Reason,
    ReasonCode,
    compare_availability,
)
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.interface.types import AttentionType
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.platforms.device import DeviceMatch
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.registry import registry
from support.cases import Step
from support.feature_cases import FEATURES, case_of
from support.strategies import cases
from support.wrong_backend import wrong

CPU = KNOWN_DEVICES["cpu"]


def runs_on(profile):
    """The registered backends that run there; test_verify_latents.py has those of latents."""
    return sorted(
        name
        for name, candidate in registry.candidates().items()
        if candidate.backend_cls is not None
        and not compare_availability(candidate.backend_cls.capabilities, profile)
        and not candidate.backend_cls.get_name().endswith("MLA")
    )


def backend(name):
    return registry.candidates()[name].backend_cls


def changed(*, base=ReferenceBackend, name="CHANGED", impl=None, **fields):
    """A backend with other declarations; None takes one away."""
    declared = {**base.capabilities.fields, **fields}
    members = {
        "__module__": __name__,
        "capabilities": Capabilities(
            devices=(DeviceMatch(),), **{k: v for k, v in declared.items() if v is not None}
        ),
        "get_name": staticmethod(lambda: name),
    }
    if impl is not None:
        members["get_impl_cls"] = staticmethod(lambda: impl)
    return type("ChangedBackend", (base,), members)


def outcome_of(cls, full_name):
    (check,) = (c for c in checks_for(cls, "cpu") if c.full_name == full_name)
    return run(check)


# The oracle.


@pytest.mark.parametrize("feature", ["none", *FEATURES])
def test_oracle_matches_naive(feature):
    step = Step(case_of(*([] if feature == "none" else [feature])))
    output, lse = super(Step, step).expected()
    naive, naive_lse = step.naive()
    torch.testing.assert_close(output, naive, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, naive_lse, rtol=0, atol=1e-13)


@given(case=cases("REFERENCE", dtypes=(torch.float64,), max_query=5, max_past=9))
def test_oracle_matches_naive_for_any_step(case):
    step = Step(case)
    output, lse = super(Step, step).expected()
    naive, naive_lse = step.naive()
    torch.testing.assert_close(output, naive, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, naive_lse, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sink", [-math.inf, -1e4, 1e4, 1e30])
def test_sinks_do_not_change_the_lse(sink):
    step = Step(case_of("sinks", "mask"))
    _, lse = super(Step, step).expected(sinks=None)
    output, with_sinks = super(Step, step).expected(sinks=[sink] * 4)
    assert torch.equal(lse, with_sinks)
    assert bool(output.isfinite().all())


# Ours.


def checks_on_cpu():
    return [
        pytest.param(check, id=f"{name}: {check.full_name}")
        for name in runs_on(detect_device("cpu"))
        for check in checks_for(backend(name), "cpu")
    ]


@pytest.mark.parametrize("check", checks_on_cpu())
def test_backends_of_this_machine_pass(check):
    assert_conforms(check)


def test_backends_of_this_machine():
    assert {"REFERENCE", "TORCH_SDPA"} <= set(runs_on(detect_device("cpu")))


#: In the interpreter a launch takes tenths of a second: the groups that other tests have less of.
INTERPRETED = ("declaration/", "garbage/", "rows/", "cache/s", "cache/nothing", "graphs/", "bits/")
INTERPRETED += ("scales/", "non_finite/", "calls/", "overlaps/", "kv_layouts/", "lengths/")


_PARTS = 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU does it faster")
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, _PARTS))]
)
def test_triton_attn_passes_in_the_interpreter(part):
    """A part of the checks of each group."""
    pytest.importorskip("triton", minversion="3.6")
    gpu = KNOWN_DEVICES["sm90"].with_libraries(Library("triton", version="3.6.0"))
    checks = checks_for(backend("TRITON_ATTN"), "cpu", quick=True, profile=gpu)
    checks = [c for c in checks if c.spec.dtype != torch.bfloat16]  # wrong in the interpreter
    chosen = [c for c in checks if c.full_name.startswith(INTERPRETED)]
    chosen = [c for c in chosen if c.name != "several kinds of layers"]  # layers need the GPU
    groups = {name.split("/")[0]: [] for name in INTERPRETED}
    for check in chosen:
        groups[check.group].append(check)
    assert all(groups.values())
    outcomes = [run(check) for group in groups.values() for check in group[part::_PARTS]]
    assert [(o.check.full_name, o.message) for o in outcomes if o.status != "passed"] == []


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(registry.names()))
def test_gpu_backend_passes(name):
    if name not in runs_on(detect_device("cuda")):
        pytest.skip("it does not run on this GPU")
    report = verify(backend(name), "cuda", quick=True)
    assert [(o.check.full_name, o.message) for o in report.failures] == []
    assert report.passed


# Faults.

#: Fault -> the check whose name says it, and what it says.
CAUGHT = {
    "drops the soft cap": ("numbers/logits_soft_cap=1.5", "that of no soft cap: it is dropped"),
    "ignores ALiBi": ("numbers/alibi", "that of no slopes: it is dropped"),
    "ignores sinks": ("numbers/sinks", "that of no sinks: it is dropped"),
    "window off by one": ("numbers/sliding_window=5", "that of 6: the window is off by one"),
    "lse in base 2": ("lse/natural logarithm", "the lse is in base 2"),
    "reads past a request's end": ("garbage/NaN past a request's end", "there is NaN"),
    "writes a shared cache": ("cache/shared cache is never written", "wrote its own keys"),
    "ignores k_scale": ("inputs/k_scale", "a scale of 1: it is ignored"),
    "takes symmetric ALiBi for signed": ("numbers/alibi=symmetric", "that of signed distances"),
    "takes the scale for positive": ("scales/negative", "asked for scale=-"),
    "swallows NaN": ("non_finite/NaN in queries", "sees NaN or infinity has numbers"),
    "leaves padding rows unwritten": ("calls/padding rows, mixed", "past the batch's tokens"),
    "leaves the last row unwritten": ("memory/output given", "or a row was not written"),
    "counts seq_lens up": ("numbers/plain", "modified its inputs: batch.seq_lens"),
    "scales the query in place": ("numbers/plain", "modified its inputs: query"),
    "returns nothing": ("numbers/plain", "and returned NoneType"),
    "clears the output first": ("overlaps/output over query", "the output is off by"),
    "exits": ("numbers/plain", "it raises SystemExit: no kernel for this GPU"),
}


def test_every_fault_of_the_example_has_an_expectation():
    assert CAUGHT.keys() == wrong.FAULTS.keys()


def test_without_a_fault_nothing_fails():
    report = verify(wrong.wrong_backend(), "cpu", quick=True)
    assert [(o.check.full_name, o.message) for o in report.failures] == []
    assert report.passed


@pytest.mark.parametrize("fault", CAUGHT)
def test_each_fault_is_caught_and_named(fault):
    name, sentence = CAUGHT[fault]
    outcome = outcome_of(wrong.wrong_backend(fault), name)
    assert outcome.status == "failed"
    assert sentence in outcome.message


#: Fault -> the layers that it touches. The first two are tested each time.
TOUCHES = {
    "window off by one": lambda spec: spec.sliding_window is not None,
    "writes a shared cache": lambda spec: spec.kv_sharing,
    "drops the soft cap": lambda spec: spec.logits_soft_cap is not None,
    "ignores ALiBi": lambda spec: spec.alibi,
    "ignores sinks": lambda spec: spec.sinks,
    "lse in base 2": lambda spec: spec.returns_lse,
    "ignores k_scale": lambda spec: spec.kv_cache_dtype.startswith("fp8"),
    "takes symmetric ALiBi for signed": lambda spec: spec.alibi == "symmetric",
}


@pytest.mark.parametrize(
    ("fault", "touches"),
    [
        pytest.param(fault, touches, id=fault, marks=() if i < 2 else pytest.mark.slow)
        for i, (fault, touches) in enumerate(TOUCHES.items())
    ],
)
def test_fault_fails_only_checks_of_its_feature(fault, touches):
    report = verify(wrong.wrong_backend(fault), "cpu", quick=True)
    assert report.failures
    assert [o.check.full_name for o in report.failures if not touches(o.check.spec)] == []


def test_reading_stale_keys_is_caught():
    cls = wrong.wrong_backend("reads past a request's end")
    assert outcome_of(cls, "garbage/stale keys past a request's end").status == "failed"


class _DependsOnTheBatch(ReferenceImpl):
    """Right to many digits, and other digits in other company."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, *more, **named):
        returned = super().forward(
            layer, query, key, value, kv_cache, attn_metadata, *more, **named
        )
        if attn_metadata.builder.spec.output_quant is None and not self.returns_lse:
            returned *= 1 + 1e-14 * attn_metadata.batch.num_reqs
        return returned


def test_bits_that_depend_on_the_batch_are_caught():
    report = verify(changed(impl=_DependsOnTheBatch), "cpu", quick=True)
    assert {o.check.full_name for o in report.failures} == {"bits/by itself and in a batch"}


class _KeepsTheFirstMask(ReferenceImpl):
    """Plans once, like a wrapper that does not replan for a new batch."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, *more, **named):
        self.first = getattr(self, "first", attn_metadata)
        return super().forward(layer, query, key, value, kv_cache, self.first, *more, **named)


def test_stale_plan_is_caught():
    outcome = outcome_of(changed(impl=_KeepsTheFirstMask), "inputs/mask")
    assert outcome.status == "failed"
    assert "it has no effect" in outcome.message


class _MakesItsOwnOutput(ReferenceImpl):
    def forward(self, *arguments, output=None, **named):
        return super().forward(*arguments, **named)


class _WritesFirst(ReferenceImpl):
    """Writes the cache before it checks its arguments."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None, **named):
        if kv_cache is not None and key is not None and self.kv_sharing_target_layer_name is None:
            slots = attn_metadata.batch.slot_mapping
            kv_cache.view(-1, *kv_cache.shape[3:])[:1] = 0 if len(slots) else 1
        arguments = (layer, query, key, value, kv_cache, attn_metadata, output)
        return super().forward(*arguments, **named)


@pytest.mark.parametrize(
    ("impl", "name", "sentence"),
    [
        (_MakesItsOwnOutput, "memory/output given", "forward returned another tensor"),
        (_WritesFirst, "cache/written, the layout that is open", "which no new token has"),
        (_WritesFirst, "cache/nothing new", ""),
    ],
)
def test_misplaced_writes_and_reads_are_caught(impl, name, sentence):
    outcome = outcome_of(changed(impl=impl), name)
    assert (outcome.status == "failed") == bool(sentence)
    assert sentence in outcome.message


@pytest.mark.parametrize("says_so", [True, False])
def test_check_is_skipped_if_a_library_turns_out_broken(says_so):
    broken = []

    class Impl(ReferenceImpl):
        def forward(self, *args, **options):
            if self.alibi_slopes is not None:
                broken.append("its part for ALiBi")
                raise BackendFailure("part cannot be imported here")
            return super().forward(*args, **options)

    class Backend(ReferenceBackend):
        @staticmethod
        def get_impl_cls():
            return Impl

        @classmethod
        def check_combination(cls, spec, device):
            if not (says_so and broken and spec.alibi):
                return []
            reason = {"field": "alibi", "asked": "alibi=True", "allowed": "alibi=False"}
            return [Reason(code=ReasonCode.COMBINATION, **reason)]

    outcome = outcome_of(Backend, "numbers/alibi")
    assert outcome.status == ("skipped" if says_so else "failed")
    assert ("not possible on this machine" in outcome.message) is says_so


def test_dropping_an_undeclared_feature_is_caught():
    impl = wrong.wrong_backend("drops the soft cap").get_impl_cls()
    cls = changed(impl=impl, logits_soft_cap=None)
    cls.check_declared = classmethod(lambda cls, spec, device: None)  # accepts everything
    failed = {o.check.full_name: o.message for o in verify(cls, "cpu", quick=True).failures}
    assert failed.keys() == {"refusals/logits_soft_cap=1.5"}
    assert "neither rejected nor right" in failed["refusals/logits_soft_cap=1.5"]
    assert "no soft cap: it is dropped" in failed["refusals/logits_soft_cap=1.5"]


def test_backend_that_reads_lengths_on_the_host_fails_graphs():
    """Captured, the reference would attend to the lengths of the capture for ever."""
    cls = changed(cuda_graph=OneOf(True, False))
    names = {c.full_name for c in checks_for(cls, "cpu") if c.group == "graphs"}
    assert "graphs/static buffers" in names
    assert not any("capture and replay" in name for name in names)  # to capture takes a GPU
    outcome = outcome_of(cls, "graphs/static buffers")
    assert outcome.status == "failed"


# What is tried.


def test_every_spec_field_is_probed_or_excluded():
    assert AttentionSpec.__dataclass_fields__.keys() == {*VALUES, *WITHOUT_PROBES}
    assert not VALUES.keys() & WITHOUT_PROBES.keys()


@pytest.mark.parametrize("name", ["REFERENCE", "TORCH_SDPA"])
def test_every_declared_field_has_a_check(name):
    cls = backend(name)
    base = base_spec(cls, CPU)
    specs = [check.spec for check in checks_for(cls, "cpu", quick=True)]
    for field, constraint in cls.capabilities.fields.items():
        only = getattr(constraint, "values", None)
        if field in WITHOUT_PROBES or only in ((False,), (None,)):
            continue
        values = {getattr(spec, field) for spec in specs}
        assert values - {getattr(base, field)}, f"nothing changes {field}"


@pytest.mark.parametrize("name", ["REFERENCE", "TORCH_SDPA"])
def test_every_declared_pair_is_covered(name):
    cls = backend(name)
    base = base_spec(cls, CPU)
    probes = probes_for(cls, base, CPU)
    rows = covering(cls, base, probes, CPU)
    held = {pair for row in rows for pair in itertools.permutations([p.name for p in row], 2)}
    names = {
        "sliding_window=5",
        "custom_mask",
        "bidirectional_ranges",
        "kv_sharing",
    }
    assert set(itertools.permutations(names, 2)) <= held
    assert len(rows) < 30
    for row in rows:
        fields = {key: value for probe in row for key, value in probe.fields.items()}
        assert not refusals(cls, base.replace(**fields), CPU)


@pytest.mark.parametrize("name", ["REFERENCE", "TORCH_SDPA"])
def test_every_feature_shows_in_every_set(name):
    """No feature hides another: the oracle without one of them is far from the oracle."""
    target = BackendUnderTest(backend(name), torch.device("cpu"), CPU)
    checks = [c for c in checks_for(target.cls, "cpu") if c.group in ("numbers", "pairs")]
    for check in checks:
        spans = {check.spec.sliding_window, check.spec.attention_chunk}
        if spans & {1, 10_000}:  # see one key, and all: nothing to hide
            continue
        step = target.step(check.spec)
        expected, allowed = step.expected()[0], allowed_error(step)
        for sentence, changes in suspects(step):
            effect = distance(step.expected(**changes)[0], expected)
            assert effect > 2 * allowed, f"{check.full_name}: {sentence}"


DECLARATIONS = {
    "one head size": {"head_size": OneOf(576), "head_size_v": OneOf(512)},
    "large blocks": {"block_size": MultipleOf(256)},
    "a range of sizes": {"head_size": Range(33, 44), "head_size_v": Range(33, 44)},
    "either": {"block_size": AnyOf(OneOf(48), OneOf(None))},
    "by device": {
        "dtype": ByDevice(
            (DeviceMatch(vendor="cpu"), OneOf(torch.bfloat16)), otherwise=OneOf(torch.float16)
        )
    },
    "encoders": {
        "attn_type": OneOf(AttentionType.ENCODER_ONLY),
        "block_size": OneOf(None),
        "kv_sharing": None,
    },
    "cross": {"attn_type": OneOf(AttentionType.ENCODER_DECODER)},
    "fp8 caches": {"kv_cache_dtype": OneOf("fp8_e4m3")},
    "one head": {"num_heads": OneOf(16), "num_kv_heads": OneOf(1)},
    "odd heads": {"num_heads": OneOf(21), "num_kv_heads": OneOf(7)},
    "not causal": {"causal": OneOf(False)},
}


@pytest.mark.parametrize("fields", DECLARATIONS.values(), ids=DECLARATIONS)
def test_base_spec_for_unusual_declarations(fields):
    cls = changed(**fields)
    base = base_spec(cls, CPU)
    assert not refusals(cls, base, CPU)
    report = verify(cls, "cpu", quick=True, only="numbers/")
    assert report.passed, [(o.check.full_name, o.message) for o in report.failures]


def test_values_named_by_a_declaration_are_probed():
    cls = changed(
        head_size=MultipleOf(24, largest=264),
        block_size=Range(3, 77),
        sliding_window=AnyOf(OneOf(None), Range(17, 60)),
    )
    names = {check.name for check in checks_for(cls, "cpu") if check.group == "numbers"}
    assert {"head_size=24", "head_size=264", "block_size=3", "block_size=77"} <= names
    assert {"sliding_window=17", "sliding_window=60"} <= names
    assert "sliding_window=5" not in names
    assert verify(cls, "cpu", quick=True, only="garbage/").passed


def test_error_for_backend_that_accepts_no_layer():
    cls = changed(num_kv_heads=OneOf(3))
    with pytest.raises(InvalidInputError, match="num_kv_heads=2 is not supported; supported: 3"):
        checks_for(cls, "cpu")


def test_error_for_backend_of_other_devices():
    cls = changed()
    cls.capabilities = Capabilities(devices=(DeviceMatch(vendor="amd"),))
    with pytest.raises(UnsupportedError, match="does not run on CPU"):
        checks_for(cls, "cpu")


# Running and reporting.


LAYER = AttentionSpec(num_heads=1, head_size=8, dtype=torch.float32)


def check_that(test):
    return Check("name", "It shows.", LAYER, test, group="group")


def _fail():
    raise CheckFailed("it is wrong", ErrorBound(math.inf, 0.5))


def _skip():
    raise Skipped("there is none")


def _break():
    raise OSError("no such kernel\nand more")


@pytest.mark.parametrize(
    ("test", "status", "message"),
    [
        (lambda: ErrorBound(0.25, 0.5), "passed", ""),
        (lambda: None, "passed", ""),
        (_fail, "failed", "it is wrong."),
        (_skip, "skipped", "there is none"),
        (_break, "failed", "it raises OSError: no such kernel"),
    ],
)
def test_every_check_has_an_outcome(test, status, message):
    outcome = run(check_that(test))
    assert (outcome.status, outcome.message) == (status, message)
    assert json.loads(json.dumps(outcome.asdict(), allow_nan=False))["status"] == status


def test_interrupt_is_raised():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(check_that(interrupt))


def test_report_summarizes_groups():
    report = Conformance("B", "cpu", [run(check_that(t)) for t in (_fail, _skip)])
    assert not report.passed
    (row,) = report.groups()
    assert (row["checks"], row["failed"], row["skipped"], row["largest_error"]) == (2, 1, 1, None)
    json.dumps(report.asdict(), allow_nan=False)
    assert Conformance("B", "cpu", [run(check_that(lambda: None))]).passed


@pytest.mark.parametrize("outcomes", [[], [_skip]])
def test_report_without_passes_is_not_passed(outcomes):
    assert not Conformance("B", "cpu", [run(check_that(t)) for t in outcomes]).passed


def test_checks_are_reproducible():
    checks = [checks_for(ReferenceBackend, "cpu") for _ in range(2)]
    assert checks[0] == checks[1]
    names = [check.full_name for check in checks[0]]
    assert len(set(names)) == len(names)
    numbers = [verify(ReferenceBackend, "cpu", only="pairs/") for _ in range(2)]
    found = [[o.finding for o in report.outcomes] for report in numbers]
    assert found[0] == found[1]
