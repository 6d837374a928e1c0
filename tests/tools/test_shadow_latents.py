"""ATTN_DISPATCH_CHECK=shadow for layers of latent attention: faults are caught, in either form."""

from __future__ import annotations

import warnings

import pytest
import torch

from attn_dispatch import AttentionSpec, MLADims
from attn_dispatch.backends.reference.torch_ref import ReferenceImpl
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend, ReferenceMLAImpl
from attn_dispatch.conformance.cases import Case
from attn_dispatch.conformance.harness import call, layer_of
from attn_dispatch.conformance.latents import LatentStep
from attn_dispatch.conformance.shadow import ShadowDriftWarning, report, reset
from attn_dispatch.selection import failure_record
from support.selection import make_backend, registered

DIMS = MLADims(kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=40)
#: A decode, a prompt and a chunk over a prefix.
LENS = {"query_lens": (1, 40, 20), "seq_lens": (30, 40, 45)}


@pytest.fixture(autouse=True)
def _shadow(monkeypatch):
    monkeypatch.setenv("ATTN_DISPATCH_CHECK", "shadow:1")
    reset()
    yield
    reset()
    failure_record.forget_failures()


def step_of(heads=12, lens=LENS, planted=(), **fields):
    fields = {"dtype": torch.float32, "block_size": 16} | fields
    spec = AttentionSpec.for_mla(num_heads=heads, mla=DIMS, **fields)
    return LatentStep(Case(spec=spec, **lens, planted=planted))


def run(step, **more):
    """A call of a new layer, and what was found of it."""
    layer = layer_of(step, prefix="latent", **more)
    with torch.no_grad():
        call(layer, step)
    return next(each for each in report() if each.layer.startswith("latent#"))


def changed(change):
    """A backend like REFERENCE_MLA whose output goes through `change(output, batch)`."""

    class Impl(ReferenceMLAImpl):
        def forward(self, *arguments, **named):
            result = super().forward(*arguments, **named)
            change(result[0] if self.returns_lse else result, arguments[5].batch)
            return result

    return like_reference(Impl)


def like_reference(impl):
    members = {"name": "WRONG_MLA", "impl_cls": impl}
    return type("WrongMLA", (ReferenceMLABackend,), members)


def test_right_results_are_not_reported():
    """Absorbed and expanded, quantized caches, and float64, whose parts are merged in float32."""
    for prefill in ("absorbed", "expanded"):
        for fields in (
            {"returns_lse": True},
            {"dtype": torch.float64, "returns_lse": True},
            {"dtype": torch.bfloat16, "kv_cache_dtype": "fp8_e4m3"},
            {"lengths": "upper_bound"},
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("error", ShadowDriftWarning)
                found = run(step_of(**fields), prefill=prefill)
            assert (found.calls, found.compared, found.drifted) == (1, 1, 0), (prefill, fields)
            reset()


def test_a_wrong_value_is_found_in_its_place():
    """In head 10 of 12, of which eight are judged at a time."""

    def change(output, batch):
        output[batch.query_start_list[2] + 4, 10, 5] += 1.0

    text = "WRONG_MLA: .*worst in request 2, token 4, head 10"
    with registered(changed(change)), pytest.warns(ShadowDriftWarning, match=text):
        found = run(step_of(), backend="WRONG_MLA")
    assert found.error > found.allowed > 0


def test_scores_without_their_rotated_part_are_named():
    class Impl(ReferenceMLAImpl):
        def _latents_of(self, *arguments):
            latents, rotated = super()._latents_of(*arguments)
            return latents, torch.zeros_like(rotated)

    text = "that of scores without the rotated part"
    with registered(like_reference(Impl)), pytest.warns(ShadowDriftWarning, match=text):
        run(step_of(), backend="WRONG_MLA")


def test_a_wrong_dense_backend_of_prefills_is_blamed():
    class Impl(ReferenceImpl):
        def forward(self, *arguments, **named):
            output, lse = super().forward(*arguments, **named)
            output[..., 0] += 1.0
            return output, lse

    dense = make_backend("WRONG_DENSE")
    dense.get_impl_cls = staticmethod(lambda: Impl)
    backends = {"backend": "REFERENCE_MLA", "prefill_backend": "WRONG_DENSE"}
    with registered(dense), pytest.warns(ShadowDriftWarning) as caught:
        found = run(step_of(), prefill="expanded", **backends)
    assert found.drifted == 1
    assert "WRONG_DENSE: " in found.message
    # The dense layers inside are compared too.
    assert any("expanded)#" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("prefill", ["absorbed", "expanded"])
def test_nan_where_it_belongs_is_not_reported(prefill):
    planted = (("value", 0, 3, 4, torch.nan), ("value", 2, 5, 6, torch.inf))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShadowDriftWarning)
        found = run(step_of(planted=planted, returns_lse=True), prefill=prefill)
    assert (found.compared, found.drifted) == (1, 0)


def test_lost_nan_is_reported():
    def change(output, batch):
        output.nan_to_num_(0.0)

    planted = (("value", 0, 3, 4, torch.nan),)
    text = "sees NaN or infinity has numbers"
    with registered(changed(change)), pytest.warns(ShadowDriftWarning, match=text):
        run(step_of(planted=planted), backend="WRONG_MLA")
