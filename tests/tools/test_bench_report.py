"""The benchmark's run and its command: who takes part, what is wrong, and what is printed."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from attn_dispatch.backends.reference.torch_ref import ReferenceImpl
from attn_dispatch.bench import roofline as ceilings_module
from attn_dispatch.bench import runner
from attn_dispatch.bench.accuracy import AccuracyJudge
from attn_dispatch.bench.cases import SWEEPS, Case, load_cases
from attn_dispatch.bench.roofline import Ceilings
from attn_dispatch.bench.runner import Bench
from attn_dispatch.cli import app
from attn_dispatch.errors import InvalidInputError, UnknownBackendError
from attn_dispatch.interface.capability import OneOf
from attn_dispatch.selection.overrides import attention_backend
from support.bench_cases import CPU, FEATURES, case, expected_of
from support.selection import make_backend, registered

CEILINGS = Ceilings(0.02, 0.01, 0.05, "bfloat16", 1024, "float32 sum")


# --- The run --------------------------------------------------------------------------------------


def run_cases(*cases, **options):
    return list(Bench(CPU, rounds=3, **options).run(cases))


class OffImpl(ReferenceImpl):
    """A twentieth too large."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output *= 1.05
        return output


class LaterOffImpl(ReferenceImpl):
    """Right the first time only: afterwards it leaves its last row out."""

    def forward(self, *args, **kwargs):
        output = args[6]
        self.calls = getattr(self, "calls", 0) + 1
        kept = output[-1].clone()
        super().forward(*args, **kwargs)
        if self.calls > 1:
            output[-1] = kept
        return output


class BrokenImpl(ReferenceImpl):
    """Raises."""

    def forward(self, *args, **kwargs):
        raise RuntimeError("misaligned address\nand more")


def backend_with(name, impl, **fields):
    cls = make_backend(name, **fields)
    cls.get_impl_cls = staticmethod(lambda: impl)
    return cls


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_backends_are_right_on_every_kind_of_case(features):
    (result,) = run_cases(case(**features), backends=["TORCH_SDPA", "REFERENCE"])
    assert [row.name for row in result.rows] == ["TORCH_SDPA", "REFERENCE"]
    for row in result.rows:
        assert row.status in ("ok", "refused"), row
        if row.status == "ok":
            assert row.error <= result.allowed_error
            assert row.timing.calls == 3
    assert result.rows[1].status == "ok"
    assert result.failed == []
    assert result.picked_row in ("TORCH_SDPA", "REFERENCE")
    assert result.share(result.best(result.picked_row), CEILINGS) > 0


def test_references_run_only_if_named_or_picked():
    (plain,) = run_cases(case())
    assert "REFERENCE" not in plain.names
    assert "TORCH_SDPA" in plain.names
    (capped,) = run_cases(case(logits_soft_cap=2.0), backends=["TORCH_SDPA"])
    assert capped.rows[0].status == "refused"
    assert "logits_soft_cap" in capped.rows[0].detail
    assert capped.picked_row == "REFERENCE"
    assert capped.best("REFERENCE").status == "ok"
    assert capped.picked == {"prefill": "REFERENCE", "decode": "REFERENCE"}


def test_wrong_backend_has_no_time():
    wrong = [backend_with("OFF", OffImpl), backend_with("LATER_OFF", LaterOffImpl)]
    with registered(*wrong, backend_with("BROKEN", BrokenImpl)):
        names = ["OFF", "LATER_OFF", "BROKEN", "TORCH_SDPA"]
        (result,) = run_cases(case(), backends=names)
    by_name = {row.name: row for row in result.rows}
    assert by_name["OFF"].status == by_name["LATER_OFF"].status == "wrong"
    assert "is allowed" in by_name["OFF"].detail
    assert by_name["BROKEN"].status == "error"
    assert by_name["BROKEN"].detail == "RuntimeError: misaligned address"
    assert all(row.timing is None for row in result.failed)
    assert {row.name for row in result.failed} == {"OFF", "LATER_OFF", "BROKEN"}
    assert by_name["TORCH_SDPA"].timing is not None


def test_pick_is_timed_when_phases_differ():
    mixed = case(query_lens=(20, 1), seq_lens=(20, 9))
    with attention_backend("prefill=TORCH_SDPA,decode=REFERENCE"):
        (result,) = run_cases(mixed, backends=["TORCH_SDPA"])
        (decode,) = run_cases(case(), backends=["TORCH_SDPA"])
    assert result.picked_row == "TORCH_SDPA+REFERENCE"
    assert result.best(result.picked_row).status == "ok"
    assert decode.picked_row == "REFERENCE"


def test_case_that_does_not_fit_is_skipped():
    (result,) = run_cases(case(), free_bytes=lambda device: 1000)
    assert "GiB" in result.skipped
    assert result.rows == []
    (result,) = run_cases(case(), free_bytes=lambda device: None)
    assert result.skipped == ""


def test_failed_setup_does_not_stop_the_run(monkeypatch):
    class NoMemory(AccuracyJudge):
        def __init__(self, inputs):
            if inputs.case.name == "x":
                raise torch.OutOfMemoryError("Tried to allocate 80 GiB")
            super().__init__(inputs)

    monkeypatch.setattr(runner, "AccuracyJudge", NoMemory)
    first, second = run_cases(case(name="x"), case())
    assert "Tried to allocate 80 GiB" in first.skipped
    assert second.skipped == ""


def test_unregistered_backend_is_an_error():
    with pytest.raises(UnknownBackendError, match="no backend 'TORCH_SPDA'"):
        Bench(CPU, backends=["TORCH_SPDA"])


def test_run_without_implementations_is_an_error(monkeypatch):
    monkeypatch.setattr(runner, "verdicts_of", lambda case, device: runner_verdicts(case))
    with pytest.raises(InvalidInputError, match="--backends"):
        run_cases(case())


def runner_verdicts(one):
    """Every backend is for another device."""
    from attn_dispatch.interface.capability import Reason, ReasonCode
    from attn_dispatch.selection.registry import registry
    from attn_dispatch.selection.report import Verdict

    reason = Reason(code=ReasonCode.DEVICE, field="device", asked="CPU")
    return {name: Verdict(name, (reason,)) for name in registry.candidates()}


class FakePeer:
    """A peer with three variants: one is right, one is wrong, one is broken."""

    name, kind = "Fake", "peer"

    def __init__(self, right=True):
        self.right = right

    def supports(self, one):
        return "no windows" if one.sliding_window else None

    def variants(self, one):
        return ("good", "bad", "broken")

    def prepare(self, inputs, variant):
        if variant == "broken":
            raise OSError("no nvcc")
        rows = [expected_of(inputs, r) for r in range(len(inputs.case.query_lens))]
        output = torch.cat(rows).to(inputs.case.torch_dtype)
        if variant == "bad":
            output = 2 * output
        return output.clone


def test_fastest_right_variant_of_a_peer_is_shown():
    plain, window = run_cases(case(), case(name="w", sliding_window=3), peers=[FakePeer()])
    rows = [row for row in plain.rows if row.kind == "peer"]
    assert [(row.variant, row.status) for row in rows] == [
        ("good", "ok"), ("bad", "wrong"), ("broken", "error"),
    ]  # fmt: skip
    assert plain.best("Fake").variant == "good"
    assert plain.failed == []  # peers do not fail a run
    assert window.best("Fake").detail == "no windows"


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """The command without its ceilings, which take a second."""
    monkeypatch.setattr(ceilings_module, "measure_ceilings", lambda *args, **kwargs: CEILINGS)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "110")


def bench(*args, code=0):
    options = ["--device", "cpu", "--rounds", "2"]
    result = CliRunner().invoke(app, ["bench", *map(str, args), *options])
    assert result.exit_code == code, result.output
    return result


def write_cases(folder, *cases):
    path = folder / "cases.json"
    path.write_text(json.dumps([one.asdict() for one in cases]), encoding="utf-8")
    return path


@pytest.mark.usefixtures("quick")
def test_table_names_cases_implementations_and_reasons(tmp_path):
    path = write_cases(tmp_path, case(name="decode/a"), case(name="decode/b", logits_soft_cap=2.0))
    result = bench("--cases", path, "--backends", "torch_sdpa", "--peers")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["decode/a"] in lines
    assert ["picked:", "TORCH_SDPA"] in [line[:2] for line in lines]
    assert ["picked:", "REFERENCE"] in [line[:2] for line in lines]
    assert ["TORCH_SDPA", "-", "-", "-", "-", "-", "-"] in lines
    assert "TORCH_SDPA does not compute decode/b: logits_soft_cap=2.0" in result.stdout
    assert "FlashInfer is not measured: it needs a GPU" in result.stdout
    assert "read 10.0 GB/s" in result.stdout
    assert "[0/2] decode/a" in result.stderr
    assert "WRONG" not in result.stdout


@pytest.mark.usefixtures("quick")
def test_wrong_backend_gives_exit_status_1(tmp_path):
    path, out = write_cases(tmp_path, case(name="decode/a")), tmp_path / "out.json"
    with registered(backend_with("OFF", OffImpl, head_size=OneOf(16))):
        text = bench("--cases", path, "--backends", "OFF", "--json", out, code=1).stdout
    assert "WRONG" in text
    assert "OFF is WRONG on decode/a: its error is" in text
    (row, *_) = json.loads(out.read_text())["cases"][0]["rows"]
    assert (row["name"], row["status"], row["timing"]) == ("OFF", "wrong", None)
    assert "tb_s" not in row


@pytest.mark.usefixtures("quick")
def test_json_report_is_complete(tmp_path):
    window = case(name="decode/b", sliding_window=3)
    path, out = write_cases(tmp_path, case(name="decode/a"), window), tmp_path / "out.json"
    bench("--cases", path, "--json", out, "--backends", "TORCH_SDPA,REFERENCE")
    data = json.loads(out.read_text())
    assert data["complete"] is True
    assert data["ceilings"]["read_tb_s"] == CEILINGS.read_tb_s
    assert {"device", "driver", "torch", "command", "attn_dispatch"} <= set(data["machine"])
    assert [Case(**tuples(each["case"])) for each in data["cases"]] == load_cases(path)
    first = data["cases"][0]
    assert (first["bytes"], first["flops"]) == (case().bytes, case().flops)
    assert first["picked"] == {"prefill": "TORCH_SDPA", "decode": "TORCH_SDPA"}
    for row in first["rows"]:
        assert row["error"] <= first["allowed_error"]
        seconds = row["timing"]["median_us"] * 1e-6
        assert row["tb_s"] == pytest.approx(first["bytes"] / seconds / 1e12)
        assert row["tflops"] == pytest.approx(first["flops"] / seconds / 1e12)
        assert row["share"] == pytest.approx(row["share_of_read"])
        assert row["share_of_read"] == pytest.approx(row["tb_s"] / 0.01)
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / 0.05)
    assert '"seq_lens": [37,5,16]' in out.read_text()


def tuples(fields):
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


@pytest.mark.usefixtures("quick")
def test_cases_run_over_each_layout_of_a_cache(tmp_path):
    encoder = case(name="encoder", **FEATURES["encoder"])
    path, out = write_cases(tmp_path, case(name="decode/a"), encoder), tmp_path / "out.json"
    layouts = ("--kv-layout", "ours, vllm,SGLANG-hnd", "--backends", "TORCH_SDPA")
    text = bench("--cases", path, *layouts, "--json", out).stdout
    found = json.loads(out.read_text())["cases"]
    names = [None, "vllm-LBNHC", "sglang-HND"]
    assert [each["case"]["kv_layout"] for each in found] == names
    for each in found:
        assert [row["status"] for row in each["rows"]] == ["ok"]
    assert "decode/a, sglang-HND" in text
    assert "encoder" not in text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("vlm", "There is no layout 'vlm' of a KV cache"),
        (",", "--kv-layout names no layout"),
        ("vllm", "no case has a KV cache"),
    ],
)
def test_a_layout_that_cannot_be_run_is_rejected(tmp_path, layout, message):
    path = write_cases(tmp_path, case(**FEATURES["encoder"]))
    assert message in bench("--cases", path, "--kv-layout", layout, code=2).output


@pytest.mark.usefixtures("quick")
def test_filter_selects_cases_by_name(tmp_path):
    path = write_cases(tmp_path, case(name="decode/a"), case(name="decode/b"))
    text = bench("--cases", path, "--filter", "/b").stdout
    assert "decode/b" in text
    assert "decode/a" not in text
    assert "no case of" in bench("--cases", path, "--filter", "x", code=2).output


@pytest.mark.usefixtures("quick")
def test_sweep_layer_comes_from_flags_or_first_case(tmp_path, monkeypatch):
    swept = []
    monkeypatch.setattr(Bench, "run", lambda self, cases: iter(swept.extend(cases) or ()))
    with pytest.raises(StopIteration):
        CliRunner().invoke(app, ["bench", "--sweep", "batch"], catch_exceptions=False)
    assert (swept[0].num_heads, swept[0].num_kv_heads, swept[0].head_size) == (32, 8, 128)
    swept.clear()
    path = write_cases(tmp_path, case(sinks=True), case(name="b"))
    flags = ["--cases", str(path), "--sweep", "context", "--head-size", "32"]
    with pytest.raises(StopIteration):
        CliRunner().invoke(app, ["bench", *flags], catch_exceptions=False)
    assert (swept[0].num_heads, swept[0].head_size, swept[0].sinks) == (4, 32, True)
    assert len(swept) == 11


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--cases"),
        (["--sweep", "size"], "context and batch"),
        (["--sweep", "batch", "--num-heads", "7"], "the layer of the sweep"),
        (["--cases", "CASES", "--head-size", "8"], "--head-size describes the layer of a --sweep"),
        (["--cases", "CASES", "--json", "no/such/x.json"], "there is no folder"),
        (["--cases", "CASES", "--backends", "NOPE"], "There is no backend 'NOPE'"),
    ],
)
def test_contradictory_flags_are_errors(args, message, tmp_path):
    path = write_cases(tmp_path, case())
    output = bench(*[path if arg == "CASES" else arg for arg in args], code=2).output
    assert message in " ".join(output.split())


def test_help_shows_the_flags():
    assert "--time-budget" in CliRunner().invoke(app, ["bench", "--help"]).output


@pytest.mark.usefixtures("quick")
def test_plot_without_matplotlib_fails_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_cases(tmp_path, case())
    output = bench("--cases", path, "--plot", tmp_path / "x.png", code=2).output
    assert "attn-dispatch[bench]" in output


@pytest.mark.usefixtures("quick")
def test_a_plot_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "x.png"
    path = write_cases(
        tmp_path,
        *(case(name=f"decode/{i}") for i in range(11)),
        case(name="prefill/a", query_lens=(20,), seq_lens=(20,)),
    )
    bench("--cases", path, "--plot", picture, "--backends", "TORCH_SDPA,REFERENCE")
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(SWEEPS, "batch", [(1, 8), (2, 8), (4, 8)])
    lines = tmp_path / "y.png"
    bench("--cases", path, "--sweep", "batch", "--plot", lines)
    assert lines.read_bytes().startswith(b"\x89PNG")
