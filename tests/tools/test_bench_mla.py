"""The benchmark and tuning of multi-head latent attention."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend, ReferenceMLAImpl
from attn_dispatch.bench.accuracy import AccuracyJudge, exact_rows
from attn_dispatch.bench.cases import load_cases, parse_cases
from attn_dispatch.bench.implementations import LATENTS, LAYER, BackendImplementation
from attn_dispatch.bench.inputs import Inputs
from attn_dispatch.bench.peers import mla as peers
from attn_dispatch.bench.runner import Bench
from attn_dispatch.bench.timing import Clock
from attn_dispatch.errors import InvalidInputError
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.selection.selector import select
from attn_dispatch.selection.timings.reader import read_table
from attn_dispatch.selection.timings.table import BatchKind, layer_key
from attn_dispatch.tuning.measure import Grid, Tuner, cases_of
from support import fake_flash_attn, fake_mla
from support.bench_cases import CPU, case
from support.paths import ROOT
from support.selection import mla_layer, registered

#: kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim.
SMALL = {"mla": (64, 24, 16, 20), "num_kv_heads": 1, "head_size": 80}
DEEPSEEK = {"mla": (512, 16, 64, 24), "num_kv_heads": 1, "head_size": 576, "num_heads": 2}
#: What FlashAttention's and FlashMLA's kernels take.
PAGED = {**DEEPSEEK, "block_size": 64, "dtype": "bfloat16"}
FEATURES = {
    "decode": {},
    "drafts": {"query_lens": (3, 2, 1)},
    "chunk": {"query_lens": (20, 1, 16), "seq_lens": (37, 5, 16)},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"kv_cache_dtype": "fp8_e4m3", "dtype": "float16"},
}


def mla_case(**fields):
    return case(**{**SMALL, **fields})


# --- Cases ------------------------------------------------------------------------------------


def test_project_cases_are_those_of_the_peers_table():
    cases = load_cases(ROOT / "benchmarks" / "mla_cases.json")
    assert len(cases) == 13
    assert {(c.num_kv_heads, c.head_size, c.block_size) for c in cases} == {(1, 576, 64)}
    assert {c.kind for c in cases} == {"decode"}
    by_name = {c.name.removeprefix("mla/"): c for c in cases}
    heads = [by_name[f"B64-L4k-h{h}"] for h in (16, 32, 64, 128)]
    # 1152 bytes and, for each head, 2 * (576 + 512) operations for each key of 64 * 4096.
    keys, rows = 64 * 4096, [64 * c.num_heads for c in heads]
    assert [c.bytes for c in heads] == [1152 * keys + 2 * 1088 * n for n in rows]
    assert [c.flops for c in heads] == [2 * 1088 * n * 4096 for n in rows]
    assert by_name["B64-L4k-h16-fp8"].bytes == 576 * keys + 2 * 1088 * 64 * 16
    assert by_name["B64-L4k-h128-q2"].flops == 2 * 1088 * 128 * 64 * (4096 + 4095)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mla": [64, 24, 16]}, "not a list of kv_lora_rank, qk_nope_head_dim"),
        ({"mla": [64, 24, 16, 0]}, "v_head_dim"),
        ({"mla": "DeepSeek"}, "not a list"),
        ({"head_size": 64}, "describes the latent cache"),
        ({"num_kv_heads": 2}, "describes the latent cache"),
    ],
    ids=str,
)
def test_wrong_sizes_are_rejected(change, message):
    with pytest.raises(InvalidInputError, match=message):
        parse_cases([{**mla_case().asdict(), **change}])


def test_case_json_round_trip():
    one = mla_case(kv_cache_dtype="fp8_e4m3")
    assert parse_cases(json.loads(json.dumps([one.asdict()]))) == [one]
    assert one.spec().mla.v_head_dim == 20
    assert one.scale == 40**-0.5


# --- Numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_backends_are_right_on_every_kind_of_case(features):
    bench = Bench(CPU, rounds=2, backends=["REFERENCE_MLA", "REFERENCE"])
    (result,) = bench.run([mla_case(**features)])
    assert not result.skipped
    own, dense = result.rows
    assert (own.name, own.variant, own.status) == ("REFERENCE_MLA", LAYER, "ok"), own
    assert (dense.status, "mla" in dense.detail) == ("refused", True)
    assert result.picked_row == "REFERENCE_MLA"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("variant", [LATENTS, LAYER])
def test_absorbed_backend_is_timed_with_and_without_its_projections(variant):
    backend = BackendImplementation("TRITON_MLA", CPU)
    one = mla_case(query_lens=(3, 1, 2), seq_lens=(37, 5, 16))
    assert backend.variants(one) == (LATENTS, LAYER)
    assert BackendImplementation("TRITON_MLA", CPU, whole_layers=True).variants(one) == (LAYER,)
    inputs = Inputs(one, CPU)
    judge = AccuracyJudge(inputs)
    output = backend.prepare(inputs, variant)()
    assert output.shape == (6, 4, 64 if variant == LATENTS else 20)
    assert judge.error_of(output, variant) <= judge.allowed_for(variant)


def test_both_forms_agree_in_float64():
    """The absorbed oracle, expanded by W_UV, is what a layer's output is compared with."""
    inputs = Inputs(mla_case(query_lens=(20, 1, 2), seq_lens=(37, 5, 16)), CPU)
    up_v = inputs.latent.kv_b_proj.double().view(4, 44, 64)[:, 24:]
    whole = torch.cat([exact_rows(inputs, i, torch.arange(n)) for i, n in enumerate((20, 1, 2))])
    output = torch.einsum("thr,hvr->thv", whole, up_v)
    judge = AccuracyJudge(inputs)
    # Only the absorbed queries are rounded, to float32.
    assert judge.error_of(output, LAYER) < 1e-6
    for row, add in ((0, 1e-3), (19, 1e-3), (22, 1e-3), (5, float("nan"))):
        wrong = output.clone()
        wrong[row, 3, 7] += add
        assert judge.error_of(wrong, LAYER) > judge.allowed_for(LAYER), row
    assert judge.error_of(output) == float("inf")  # it has the size of the other variant


class OffMLAImpl(ReferenceMLAImpl):
    """A hundredth too large."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).mul_(1.01)


class OffMLABackend(ReferenceMLABackend):
    name = "OFF_MLA"
    impl_cls = OffMLAImpl


def test_wrong_backend_is_found():
    with registered(OffMLABackend):
        (result,) = Bench(CPU, rounds=2, backends=["OFF_MLA"]).run([mla_case()])
    assert [row.status for row in result.rows if row.name == "OFF_MLA"] == ["wrong"]
    assert result.failed


# --- Peers ------------------------------------------------------------------------------------


def install_fa3(monkeypatch):
    for name, functions in fake_flash_attn.MODULES["vLLM's FlashAttention 3"](
        fake_flash_attn.Recorder()
    ).items():
        fake_mla._modules(monkeypatch, {name: functions})


def install_flashinfer(monkeypatch):
    """The positional form of `plan` and `run`, which releases since 0.2 have."""

    class Wrapper(fake_mla.BatchMLAPagedAttentionWrapper):
        def plan(
            self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv,
            head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type,
        ):  # fmt: skip
            metadata = fake_mla.MLAPlanMetadata(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
            super().plan(
                metadata=metadata, num_heads=num_heads, head_dim_ckv=head_dim_ckv,
                head_dim_kpe=head_dim_kpe, page_size=page_size, causal=causal, sm_scale=sm_scale,
                q_data_type=q_data_type, kv_data_type=kv_data_type,
            )  # fmt: skip

        def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
            query = torch.cat([q_nope, q_pe], -1)
            cache = torch.cat([ckv_cache, kpe_cache], -1)
            out = torch.empty_like(q_nope)
            return super().run(query=query, kv_cache=cache, out=out)

    members = {"BatchMLAPagedAttentionWrapper": Wrapper}
    fake_mla._modules(monkeypatch, {"flashinfer": {}, "flashinfer.mla": members})


def install_triton(monkeypatch):
    """As in vLLM 0.24, one query for each request."""

    def decode_attention_fwd(
        q, k, v, o, lse, table, seq_lens, parts, num_splits, scale, page_size=1, logit_cap=0.0
    ):  # fmt: skip
        fake_mla.require(parts.shape == (*q.shape[:2], num_splits, 513), "parts")
        fake_mla.require(k.shape[1:] == (page_size, 1, 576) and v.shape[-1] == 512, "k and v")
        for i, keys in enumerate(seq_lens.tolist()):
            rows = k[table[i].long()].flatten(0, 2)[:keys].float()
            o[i : i + 1] = fake_mla.attend(q[i : i + 1], rows, scale, False)[0].to(o.dtype)

    path = ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.ops")
    modules = {name: {} for name in path}
    modules["vllm.v1.attention.ops.triton_decode_attention"] = {
        "decode_attention_fwd": decode_attention_fwd
    }
    fake_mla._modules(monkeypatch, modules)


PEER_CASES = {
    "plain": {},
    "drafts": {"query_lens": (2, 2, 2)},
    "ragged drafts": {"query_lens": (3, 2, 1)},
    "small pages": {"block_size": 16},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "float32": {"dtype": "float32"},
    "other sizes": {**SMALL, "dtype": "bfloat16"},
    "soft cap": {"logits_soft_cap": 3.0},
}
PEERS = {
    peers.FlashAttention3MLA: (install_fa3, {"plain", "drafts", "ragged drafts", "small pages"}),
    peers.FlashMLAOfVllm: (fake_mla.install_vllm_flash_mla, {"plain", "drafts"}),
    peers.FlashMLAOfSGLang: (fake_mla.install_flash_mla, {"plain", "drafts"}),
    peers.FlashInferMLA: (install_flashinfer, {"plain", "drafts", "ragged drafts", "small pages"}),
    peers.VllmTritonMLA: (install_triton, {"plain", "small pages"}),
}


@pytest.mark.parametrize("cls", PEERS, ids=lambda cls: cls.name)
def test_peer_passes_the_arguments_of_its_function(cls, monkeypatch):
    install, computed = PEERS[cls]
    install(monkeypatch)
    peer = cls()
    peer.load()
    found = set()
    for label, features in PEER_CASES.items():
        fields = {**PAGED, **features}
        if cls is peers.FlashAttention3MLA:  # the fake has the kernel without TMA
            fields["block_size"] = 16
        one = case(name=label, seq_lens=(137, 5, 64), **fields)
        if peer.supports(one) is not None:
            continue
        found.add(label)
        inputs = Inputs(one, CPU)
        judge = AccuracyJudge(inputs)
        for variant in peer.variants(one):
            output = peer.prepare(inputs, variant)()
            assert judge.error_of(output, variant) <= judge.allowed, (label, variant)
    assert found == computed
    assert "latent attention" in peer.supports(case(dtype="bfloat16"))


# --- Tuning -----------------------------------------------------------------------------------


def timed_backend(name, state, seconds):
    class Impl(ReferenceMLAImpl):
        def forward(self, *arguments, **more):
            state["now"] += seconds(arguments[5].batch)
            return super().forward(*arguments, **more)

    return type(name, (ReferenceMLABackend,), {"name": name, "impl_cls": Impl})


def test_measured_times_decide_for_latent_attention(tmp_path):
    state = {"now": 0.0}
    backends = [
        timed_backend("STEADY_MLA", state, lambda batch: 4.0),
        timed_backend("BY_SIZE_MLA", state, lambda batch: float(batch.num_reqs)),
    ]
    spec = mla_case(block_size=4).spec()
    path = tmp_path / "table.json"
    names = [cls.name for cls in backends]
    with registered(*backends):
        tuner = Tuner(CPU, path, names, clock=Clock(lambda: state["now"]), rounds=1)
        cases = cases_of("mla", spec, Grid(requests=(1, 8), lengths=(32,)))
        tasks, notes = tuner.tasks(cases)
        done = list(tuner.run(tasks))
        assert not notes
        assert not [each.problems for each in done if each.problems]
        table = read_table(path)
        points = table.layers[layer_key(spec)].points
        assert {each.step for each in points} == set(BatchKind)
        times = {(p.step, p.requests): p.times_us for p in points}
        assert times[BatchKind.DECODE, 8] == {"STEADY_MLA": 4e6, "BY_SIZE_MLA": 8e6}
        assert set(times[BatchKind.MIXED, 8]) == {"STEADY_MLA", "BY_SIZE_MLA"}
        chosen = select(spec, detect_device(CPU), phase=Phase.DECODE, tables=(table,))
        routes = chosen.report.measured
        assert routes is not None
        picks = {(c.point.step, c.point.requests): c.picked for c in routes.comparisons}
        assert picks[BatchKind.DECODE, 1] == "BY_SIZE_MLA"
        assert picks[BatchKind.DECODE, 8] == "STEADY_MLA"
        other = select(mla_layer(), detect_device(CPU), phase=Phase.DECODE, tables=(table,))
        assert other.report.measured is None
