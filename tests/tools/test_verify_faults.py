"""Faults that `verify` must catch: modified inputs, invalid results, lost NaN, unwritten rows,
memory that overlaps, and faults that show only at real sizes."""

from __future__ import annotations

import math

import pytest
import torch
from typer.testing import CliRunner

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend, ReferenceImpl
from attn_dispatch.cli import app
from attn_dispatch.conformance import Check, checks_for, run, verify
from attn_dispatch.conformance import real_sizes as sizes
from attn_dispatch.conformance.cases import Case
from attn_dispatch.conformance.check import BackendUnderTest
from attn_dispatch.conformance.tolerance import CheckFailed, ErrorBound
from attn_dispatch.errors import BackendFailure, InvalidInputError, summary_of
from attn_dispatch.interface.batch import AttentionBatch
from attn_dispatch.interface.capability import OneOf
from attn_dispatch.interface.spec import AttentionSpec
from attn_dispatch.platforms.known_devices import KNOWN_DEVICES
from support.faulty_backends import backend, failures
from support.selection import make_backend, registered

CPU = KNOWN_DEVICES["cpu"]
LAYER = AttentionSpec(num_heads=1, head_size=8, dtype=torch.float32)


def outcome(cls, full_name):
    (check,) = (c for c in checks_for(cls, "cpu") if c.full_name == full_name)
    return run(check)


# --- Errors of any kind ------------------------------------------------------------------------


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("not even a message")


class NotText(Exception):
    def __str__(self):
        return 7  # noqa: PLE0307


class Leaves(Exception):
    def __str__(self):
        raise SystemExit(3)


def nested():
    """As Triton nests a compiler's errors: each says where, and the innermost one why."""
    where, why = ValueError("at 9:1:\n    f(x)\n    ^"), ValueError("at 2:4:\n    y\n^\nno y")
    where.__cause__ = why
    return where


SUMMARIES = {
    "nested": (nested(), "ValueError: at 9:1: no y"),
    "one line": (ValueError("no such key"), "ValueError: no such key"),
    "lines": (ValueError("\n first \nsecond"), "ValueError: first"),
    "nothing": (ValueError(), "ValueError"),
    "only space": (ValueError(" \n "), "ValueError"),
    "exit": (SystemExit(3), "SystemExit: 3"),
    "speechless": (Speechless(), "Speechless (its message cannot be read: RuntimeError)"),
    "no text": (NotText(), "NotText (its message cannot be read: TypeError)"),
    "leaves": (Leaves(), "Leaves (its message cannot be read: SystemExit)"),
    "surrogate": (ValueError("a\ud800b"), "ValueError: a?b"),
    "long": (ValueError("x" * 999), "ValueError: " + "x" * 297 + "..."),
}


@pytest.mark.parametrize(("error", "text"), SUMMARIES.values(), ids=SUMMARIES)
def test_any_error_has_a_summary_of_one_line(error, text):
    assert summary_of(error) == text


@pytest.mark.parametrize(
    "error", [SystemExit(0), GeneratorExit(), Speechless(), NotText(), Leaves(), MemoryError()]
)
def test_any_exception_fails_only_its_check(error):
    def forward(impl, compute, arguments, named):
        raise error

    report = verify(backend(forward), "cpu", quick=True, only="numbers/")
    assert len(report.failures) == len(report.outcomes) > 5
    assert report.failures[0].message == f"it raises {summary_of(error)}"


def test_interrupt_ends_the_suite():
    def forward(impl, compute, arguments, named):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(backend(forward), "cpu", quick=True, only="numbers/plain")


@pytest.mark.parametrize(
    "error", [SystemExit(0), GeneratorExit(), Speechless(), ZeroDivisionError()]
)
def test_broken_declaration_is_a_backend_failure(error):
    class Backend(ReferenceBackend):
        @staticmethod
        def get_name():
            return "FAULTY"

        @classmethod
        def check_combination(cls, spec, device):
            raise error

    with pytest.raises(BackendFailure, match=type(error).__name__):
        checks_for(Backend, "cpu")


def test_command_survives_a_backend_that_exits():
    def forward(impl, compute, arguments, named):
        raise SystemExit(0)

    with registered(backend(forward)):
        command = ["verify", "FAULTY", "--device", "cpu", "--quick", "--only", "numbers/"]
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "it raises SystemExit" in " ".join(done.stdout.split())


# --- Inputs are left as they are ---------------------------------------------------------------


def _first(tensor):
    tensor.view(-1)[:1] += 1


def _in_gap(query):
    """What lies before the first row, in the memory of fused rows."""
    query.as_strided((1,), (1,), query.storage_offset() - 1).fill_(7.0)


#: Input -> the check that has it, and how it is modified.
MODIFIED = {
    "query": ("numbers/plain", lambda impl, a: a[1].mul_(2)),
    "key": ("numbers/plain", lambda impl, a: a[2].zero_()),
    "value": ("numbers/plain", lambda impl, a: a[3][-1].zero_()),
    "batch.seq_lens": ("numbers/plain", lambda impl, a: a[5].batch.seq_lens.add_(1)),
    "batch.query_start_loc": ("numbers/plain", lambda impl, a: _first(a[5].batch.query_start_loc)),
    "batch.block_table": ("numbers/plain", lambda impl, a: a[5].batch.block_table.zero_()),
    "batch.slot_mapping": ("numbers/plain", lambda impl, a: a[5].batch.slot_mapping.fill_(-1)),
    "batch.custom_mask": ("numbers/custom_mask", lambda impl, a: a[5].batch.custom_mask.zero_()),
    "slopes": ("numbers/alibi", lambda impl, a: impl.alibi_slopes.reverse()),
    "sinks": ("numbers/sinks", lambda impl, a: impl.sinks.zero_()),
    "layer._k_scale": ("inputs/k_scale", lambda impl, a: a[0]._k_scale.mul_(2)),
    "query, memory": ("memory/fused rows", lambda impl, a: _in_gap(a[1])),
}


@pytest.mark.parametrize("name", MODIFIED)
def test_modified_input_is_named(name):
    check, modify = MODIFIED[name]

    def forward(impl, compute, arguments, named):
        returned = compute(*arguments, **named)
        modify(impl, arguments)
        return returned

    found = outcome(backend(forward), check)
    assert found.status == "failed"
    assert f"modified its inputs: {name.partition(',')[0]}" in found.message


RETURNED = {
    "None": (lambda out: None, "returned NoneType"),
    "a list": (lambda out: [out], "returned list"),
    "an array": (lambda out: out.numpy(), "returned ndarray"),
    "a pair": (lambda out: (out, out[..., 0]), "returned (Tensor, Tensor)"),
    "a pair of one": (lambda out: (out,), ""),
    "flat rows": (lambda out: out.flatten(1), "the output has shape (47, 128)"),
    "a row less": (lambda out: out[1:], "the output has shape (46, 4, 32)"),
    "half": (lambda out: out.half(), "the output is torch.float16"),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_invalid_result_is_reported(kind):
    change, sentence = RETURNED[kind]
    cls = backend(lambda impl, compute, arguments, named: change(compute(*arguments, **named)))
    found = outcome(cls, "numbers/plain")
    assert (found.status == "failed") == bool(sentence)
    assert sentence in found.message
    assert "AttributeError" not in found.message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda pair: pair[0], "should return the pair (output, lse)"),
        (lambda pair: (pair[0], pair[1].double()), "torch.float64; it should be"),
        (lambda pair: (pair[0], pair[1].T), "the lse is (4, 47)"),
        (lambda pair: (pair[0], None), "returned (Tensor, NoneType)"),
    ],
)
def test_invalid_lse_is_reported(change, sentence):
    def forward(impl, compute, arguments, named):
        returned = compute(*arguments, **named)
        return change(returned) if impl.returns_lse else returned

    found = outcome(backend(forward), "lse/natural logarithm")
    assert found.status == "failed"
    assert sentence in found.message


# --- Rows that are not written -----------------------------------------------------------------


def _rows_left(which):
    """Rows of what is returned are left as the output was, or as torch.empty made it."""

    def forward(impl, compute, arguments, named):
        query, tokens = arguments[1], arguments[5].batch.num_tokens
        given = named.get("output")
        shape = (*query.shape[:2], impl.head_size_v)
        before = query.new_empty(shape) if given is None else given.clone()
        returned = compute(*arguments, **named)
        output = returned[0] if impl.returns_lse else returned
        rows = which(tokens, len(query))
        if output.dtype == before.dtype:
            output[rows] = before[rows]
        return returned

    return forward


UNWRITTEN = {
    "padding": (slice, "calls/padding rows, mixed"),
    "the last row of padding": (
        lambda tokens, rows: slice(max(tokens, rows - 1), rows),
        "calls/padding rows, decodes",
    ),
    "a token": (lambda tokens, rows: slice(0, 1), "calls/memory as it was allocated"),
}


@pytest.mark.parametrize("kind", UNWRITTEN)
def test_unwritten_rows_are_caught(kind):
    which, check = UNWRITTEN[kind]
    assert outcome(backend(_rows_left(which)), check).status == "failed"


def test_unwritten_lse_of_padding_is_caught():
    def forward(impl, compute, arguments, named):
        returned = compute(*arguments, **named)
        if impl.returns_lse:
            returned[1][arguments[5].batch.num_tokens :] = 0.0
        return returned

    found = outcome(backend(forward), "calls/padding rows, mixed")
    assert "the lse of a row past the batch's tokens is not" in found.message


def test_assuming_zeroed_scratch_memory_is_caught():
    def forward(impl, compute, arguments, named):
        returned = compute(*arguments, **named)
        if not impl.returns_lse:
            return returned
        return returned[0] + 0 * torch.empty_like(returned[0]), returned[1]

    assert outcome(backend(forward), "calls/memory as it was allocated").status == "failed"


# --- NaN and infinity --------------------------------------------------------------------------


def _numbers_for_nan(part):
    """A guard turns NaN into what a row without keys has; in the output, the lse, or both."""

    def forward(impl, compute, arguments, named):
        returned = compute(*arguments, **named)
        output, lse = returned if impl.returns_lse else (returned, None)
        if part != "lse" and output.dtype.itemsize > 1:
            output.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        if part != "output" and lse is not None:
            lse.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        return returned

    return forward


@pytest.mark.parametrize("part", ["output", "lse", "both"])
@pytest.mark.parametrize("name", ["NaN in queries", "NaN in keys", "all keys infinite"])
def test_nan_that_becomes_a_number_is_caught(part, name):
    found = outcome(backend(_numbers_for_nan(part)), f"non_finite/{name}")
    assert found.status == "failed"
    assert "declares propagates_nan = False" in found.message


def test_nan_in_values_that_becomes_a_number_is_caught():
    found = outcome(backend(_numbers_for_nan("output")), "non_finite/NaN in values")
    assert found.status == "failed"


def _spread(rows):
    """Where there is any NaN, rows that `rows(batch)` names get it too."""

    def forward(impl, compute, arguments, named):
        returned = compute(*arguments, **named)
        output = returned[0] if impl.returns_lse else returned
        batch = arguments[5].batch
        if output.dtype.itemsize > 1 and bool(output[: batch.num_tokens].isnan().any()):
            output[rows(batch)] = math.nan
        return returned

    return forward


@pytest.mark.parametrize("propagates_nan", [True, False])
@pytest.mark.parametrize("name", ["NaN in queries", "NaN in values"])
def test_nan_in_another_request_is_caught_for_any_declaration(name, propagates_nan):
    cls = backend(_spread(lambda batch: batch.query_start_list[-2]), propagates_nan=propagates_nan)
    assert outcome(cls, f"non_finite/{name}").status == "failed"


def test_nan_in_a_row_that_does_not_see_it_is_caught():
    cls = backend(_spread(lambda batch: batch.query_start_list[1]))  # the first row of the prompt
    found = outcome(cls, "non_finite/NaN in keys")
    assert "there is NaN in a row that sees none" in found.message


def test_nan_in_values_may_spread_within_its_request():
    def forward(impl, compute, arguments, named):
        returned = compute(*arguments, **named)
        output = returned[0] if impl.returns_lse else returned
        starts = arguments[5].batch.query_start_list
        for start, end in zip(starts, starts[1:], strict=False):
            own = output[start:end, :2]  # the query heads of KV head 0
            if output.dtype.itemsize > 1 and end - start > 1 and bool(own.isnan().any()):
                own[..., 0] = math.nan
        return returned

    assert outcome(backend(forward), "non_finite/NaN in values").status == "passed"


@pytest.mark.parametrize("forward", [None, _numbers_for_nan("both")], ids=["propagates", "loses"])
def test_declared_nan_propagation_is_checked(forward):
    report = verify(backend(forward, propagates_nan=False), "cpu", quick=True, only="non_finite/")
    assert [(o.check.full_name, o.message) for o in report.failures] == []
    (message,) = (o.message for o in report.outcomes if o.status == "skipped")
    assert "FAULTY declares propagates_nan = False" in message


@pytest.mark.parametrize("propagates_nan", [True, False])
def test_rows_without_keys_are_0_for_any_declaration(propagates_nan):
    def forward(impl, compute, arguments, named):
        returned = compute(*arguments, **named)
        output = returned[0] if impl.returns_lse else returned
        strange = arguments[1].isnan().any(-1)
        if output.dtype.itemsize > 1:
            output[strange] = math.nan
        return returned

    found = failures(backend(forward, propagates_nan=propagates_nan), "non_finite/NaN in queries t")
    assert len(found) == 3
    assert all("sees no key is not 0" in message or "NaN" in message for message in found.values())


# --- Scales ------------------------------------------------------------------------------------


def test_non_finite_scale_must_be_rejected():
    def init(arguments, named):
        scale = named["scale"]
        return arguments, {**named, "scale": scale if math.isfinite(scale) else 1.0}

    found = failures(backend(init=init), "is rejected")
    assert found.keys() == {f"scales/{name} is rejected" for name in ("NaN", "inf", "-inf")}


@pytest.mark.parametrize("name", ["0", "negative", "tiny", "large", "large and negative"])
def test_each_kind_of_scale_is_checked(name):
    def init(arguments, named):
        return arguments, {**named, "scale": 0.5}

    assert outcome(backend(init=init), f"scales/{name}").status == "failed"


# --- Memory that overlaps ----------------------------------------------------------------------


def _clears_first(impl, compute, arguments, named):
    """Writes its output before it reads its inputs, and checks nothing."""
    output = named.pop("output", None)
    if output is None or named or impl.returns_lse:
        return compute(*arguments, output=output, **named)
    output.zero_()
    return output.copy_(compute(*arguments))


@pytest.mark.parametrize("name", ["query", "key", "value", "query, a row later"])
def test_wrong_output_over_an_input_is_caught(name):
    assert outcome(backend(_clears_first), f"overlaps/output over {name}").status == "failed"


def test_rejection_after_a_write_is_caught():
    def forward(impl, compute, arguments, named):
        output = named.get("output")
        if output is not None and output.dtype == arguments[1].dtype:
            output[0] = 7.0
            raise InvalidInputError("output overlaps")
        return compute(*arguments, **named)

    found = failures(backend(forward), "overlaps/output over")
    assert len(found) == 6
    assert all("after the output had been written" in message for message in found.values())


# --- Graphs ------------------------------------------------------------------------------------


def _by_device_lengths(rows):
    """Reads its lengths where a graph would, so static buffers work; then leaves rows unwritten."""

    def forward(impl, compute, arguments, named):
        if len(arguments) < 7:  # not over static buffers
            return compute(*arguments, **named)
        batch = arguments[5].batch
        now = AttentionBatch.create(
            [1] * batch.num_reqs,
            batch.seq_lens.tolist(),
            block_table=batch.block_table,
            slot_mapping=batch.slot_mapping,
        )
        arguments[5] = arguments[5].builder.build(now)
        output = arguments[6]
        before = output.clone()
        returned = compute(*arguments, **named)
        output[rows] = before[rows]
        return returned

    return forward


@pytest.mark.parametrize("rows", [slice(0, 0), slice(4, None), slice(6, None)], ids=str)
def test_padding_rows_of_a_graph_are_checked(rows):
    cls = backend(_by_device_lengths(rows), cuda_graph=OneOf(True, False))
    names = {c.full_name for c in checks_for(cls, "cpu") if "graphs/static buffers" in c.full_name}
    names = {name for name in names if "buffers of" not in name}
    assert names == {
        "graphs/static buffers",
        "graphs/static buffers, more rows than tokens",
        "graphs/static buffers, more rows than tokens, lse",
    }
    is_wrong = rows.start != 0
    for name in names:
        found = outcome(cls, name)
        expected = "failed" if is_wrong and "more rows" in name else "passed"
        assert (found.status, name) == (expected, name), found.message
        if expected == "failed":
            assert "padding rows of the graph's batch have a result other than 0" in found.message


# --- Real sizes --------------------------------------------------------------------------------


def target_of(cls):
    return BackendUnderTest(cls, torch.device("cpu"), CPU)


def test_real_sizes_are_skipped_without_a_gpu():
    (found,) = verify(ReferenceBackend, "cpu", quick=True, only="real_sizes/").outcomes
    assert (found.status, found.message) == (
        "skipped",
        "the float64 oracle of thousands of keys takes a GPU",
    )


@pytest.mark.parametrize("head_size", sizes.HEAD_SIZES)
@pytest.mark.parametrize("heads", sizes.HEADS, ids=str)
def test_draws_cover_windows_and_kinds_of_batches(head_size, heads):
    target = target_of(ReferenceBackend)
    found = sizes.draws(target, head_size, heads)
    assert found == sizes.draws(target, head_size, heads)
    for draw in found:
        assert (draw.spec.num_heads, draw.spec.num_kv_heads) == heads
        assert draw.spec.head_size == draw.spec.head_size_v == head_size
        assert max(draw.seq_lens) <= sizes.LONGEST
    windows = [draw.spec.sliding_window for draw in found]
    assert len(set(windows)) >= 6
    assert None in windows
    assert {draw.spec.dtype for draw in found} == {torch.bfloat16, torch.float16}
    assert {draw.spec.block_size is None for draw in found} == {True, False}
    is_prompt = {draw.query_lens == draw.seq_lens for draw in found}
    assert is_prompt == {True, False}
    assert any(set(draw.query_lens) == {1} for draw in found)
    assert max(max(draw.seq_lens) for draw in found) > sizes.LONGEST / 2


def test_windows_are_not_multiples_of_a_tile():
    assert [window for window in sizes.WINDOWS if not window % 32] == []


def test_undeclared_layers_are_not_drawn():
    target = target_of(backend(head_size=OneOf(64, 32), sliding_window=OneOf(None, 300)))
    assert sizes.draws(target, 96, (8, 2)) == []
    windows = {draw.spec.sliding_window for draw in sizes.draws(target, 64, (8, 2))}
    assert windows == {None, 300}


def _skips_a_tile(impl, compute, arguments, named):
    """Of one row of each 128 the window begins a tile of 64 keys too late."""
    returned = compute(*arguments, **named)
    if impl.sliding_window is None or impl.sliding_window <= 64:
        return returned
    narrow = type(impl).__mro__[1].__new__(ReferenceImpl)
    narrow.__dict__.update(impl.__dict__, sliding_window=impl.sliding_window - 64)
    metadata = arguments[5]
    builder = type(metadata.builder)(
        metadata.builder.spec.replace(sliding_window=narrow.sliding_window),
        metadata.builder.device,
    )
    arguments[5] = builder.build(metadata.batch)
    other = ReferenceImpl.forward(narrow, *arguments)
    batch = metadata.batch
    for start, query_len in zip(batch.query_start_list, batch.query_lens, strict=False):
        rows = torch.arange(start, start + query_len)[127::128]
        returned[rows] = other[rows]
    return returned


def test_wrong_window_in_one_row_of_a_tile_is_caught():
    target = target_of(backend(_skips_a_tile))
    spec = target.base.replace(
        num_heads=4, num_kv_heads=1, head_size=96, head_size_v=96, dtype=torch.bfloat16,
        block_size=16, sliding_window=300,
    )  # fmt: skip
    draw = Case(spec=spec, query_lens=(140, 500), seq_lens=(700, 500), seed=5)
    with pytest.raises(
        CheckFailed, match=r"rows of request \d are wrong, the first is token 127"
    ) as error:
        sizes.judge(target, draw)
    assert error.value.finding.ratio > 1
    assert "sliding_window=300" in str(error.value)


@pytest.mark.parametrize("name", ["REFERENCE", "TORCH_SDPA"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1)], ids=str)
def test_right_backends_pass_beyond_one_tile(name, heads):
    from attn_dispatch.selection.registry import registry

    target = target_of(registry.candidates()[name].backend_cls)
    for draw in sizes.draws(target, 64, heads, longest=400):
        finding = sizes.judge(target, draw)
        assert 0 < finding.error <= finding.allowed < 0.03


def test_row_of_nan_is_caught():
    def forward(impl, compute, arguments, named):
        output = compute(*arguments, **named)
        output[-1, 0, 0] = math.nan
        return output

    target = target_of(backend(forward))
    (draw, *_) = sizes.draws(target, 64, (8, 2), longest=200)
    with pytest.raises(CheckFailed, match=r"1 of \d+ rows"):
        sizes.judge(target, draw)


def test_outcome_keeps_the_finding():
    check = Check("name", "It shows.", LAYER, lambda: ErrorBound(0.25, 0.5))
    assert run(check).finding == ErrorBound(0.25, 0.5)
    assert make_backend("X").propagates_nan
