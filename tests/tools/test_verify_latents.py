"""`verify` for backends of latent attention: ours pass it, and what is wrong is named."""

from __future__ import annotations

import math

import pytest
import torch
from typer.testing import CliRunner

from attn_dispatch import AttentionSpec, DeviceMatch, MLADims
from attn_dispatch.backends.reference.torch_ref_mla import ReferenceMLABackend, ReferenceMLAImpl
from attn_dispatch.cli import app
from attn_dispatch.conformance import backend_named, checks_for, run, verify
from attn_dispatch.conformance.cases import Case
from attn_dispatch.conformance.check import BackendUnderTest
from attn_dispatch.conformance.latents import LatentStep
from attn_dispatch.conformance.probes import base_spec
from attn_dispatch.conformance.pytest_plugin import conformance_checks
from attn_dispatch.conformance.real_latents import draws_of_latents, judge_latents
from attn_dispatch.conformance.suite import GROUPS
from attn_dispatch.conformance.tolerance import CheckFailed
from attn_dispatch.interface.capability import Capabilities, OneOf
from attn_dispatch.interface.kv_access import write_mla_cache
from attn_dispatch.platforms.detect import detect_device
from attn_dispatch.selection.resolve import explained_device
from support import scalar_oracle
from support.selection import registered


def like_reference(name="OTHER_MLA", impl=ReferenceMLAImpl, fields=None, **members):
    """A third-party backend that computes as REFERENCE_MLA does, except for `impl`."""
    declared = {**ReferenceMLABackend.capabilities.fields, **(fields or {})}
    capabilities = Capabilities(devices=(DeviceMatch(),), **declared)
    members |= {"name": name, "impl_cls": impl, "capabilities": capabilities}
    return type("OtherMLA", (ReferenceMLABackend,), members)


def failed(report):
    return [(outcome.check.full_name, outcome.message) for outcome in report.failures]


def test_reference_mla_passes_in_every_group():
    report = verify(ReferenceMLABackend, "cpu", quick=True)
    assert failed(report) == []
    # It declares no batch_invariant and no cuda_graph.
    assert {row["group"] for row in report.groups()} == GROUPS.keys() - {"bits", "graphs"}
    assert [o.check.group for o in report.outcomes if o.status == "skipped"] == ["real_sizes"]
    assert all(outcome.check.spec.mla is not None for outcome in report.outcomes)


def test_the_oracle_is_the_scalar_one():
    mla = MLADims(kv_lora_rank=6, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3)
    spec = AttentionSpec.for_mla(num_heads=3, mla=mla, dtype=torch.float64, block_size=4)
    step = LatentStep(Case(spec=spec, query_lens=(1, 3, 0), seq_lens=(5, 3, 2)))
    output, lse = step.expected()
    first = 0
    for query, entries in zip(step.queries, step.entries, strict=True):
        rows = slice(first, first + len(query))
        keys, values = scalar_oracle.expanded_latents(
            entries[:, :6], entries[:, 6:], step.kv_b_proj, num_heads=3, nope=5, size_v=3
        )
        wanted, wanted_lse = scalar_oracle.attention_of_request(
            query, keys, values, scale=step.scale, causal=True
        )
        torch.testing.assert_close(output[rows], wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse[rows], wanted_lse, rtol=0, atol=1e-12)
        first = rows.stop
    assert first == len(output) == 4


# Faults.


class _DropsSoftCap(ReferenceMLAImpl):
    def _attend(self, *arguments):
        declared, self.logits_soft_cap = self.logits_soft_cap, None
        try:
            return super()._attend(*arguments)
        finally:
            self.logits_soft_cap = declared


class _IgnoresRotatedPart(ReferenceMLAImpl):
    def _latents_of(self, *arguments):
        latents, rotated = super()._latents_of(*arguments)
        return latents, torch.zeros_like(rotated)


class _IgnoresScale(ReferenceMLAImpl):
    def _latents_of(self, request, layer, *arguments):
        latents, rotated = super()._latents_of(request, layer, *arguments)
        scale = layer._k_scale if self.kv_cache_dtype.startswith("fp8") else 1.0
        return latents / scale, rotated / scale


class _KeepsWeights(ReferenceMLAImpl):
    """Absorbs the projections when it is made, before the model has loaded them."""

    def __init__(self, *args, kv_b_proj, **kwargs):
        super().__init__(*args, kv_b_proj=kv_b_proj.clone(), **kwargs)


class _LogarithmBase2(ReferenceMLAImpl):
    def forward(self, *arguments, **named):
        returned = super().forward(*arguments, **named)
        return (returned[0], returned[1] / math.log(2)) if self.returns_lse else returned


class _WritesSharedCache(ReferenceMLAImpl):
    def forward(self, layer, query, kv_c, k_pe, kv_cache, metadata, *more, **named):
        returned = super().forward(layer, query, kv_c, k_pe, kv_cache, metadata, *more, **named)
        slots = metadata.batch.slot_mapping
        if slots is not None:
            write_mla_cache(kv_c, k_pe, kv_cache, slots, layer._k_scale)
        return returned


class _SwallowsNaN(ReferenceMLAImpl):
    def forward(self, *arguments, **named):
        returned = super().forward(*arguments, **named)
        output = returned[0] if self.returns_lse else returned
        output.nan_to_num_(0.0)
        return returned


class _WritesBesideTheSlot(ReferenceMLAImpl):
    """Writes whole blocks' memory: right over a cache of its own, wrong over a view."""

    def forward(self, layer, query, kv_c, k_pe, kv_cache, *more, **named):
        returned = super().forward(layer, query, kv_c, k_pe, kv_cache, *more, **named)
        if not kv_cache.is_contiguous():
            end = kv_cache.storage_offset() + kv_cache.stride(0)
            whole = torch.empty(0, dtype=kv_cache.dtype).set_(kv_cache.untyped_storage())
            whole[end - 1] = 0.0
        return returned


class _ReadsPastTheEnd(ReferenceMLAImpl):
    """Takes the slot after a request's last one too, with a weight of nearly zero."""

    def _latents_of(self, request, layer, kv_cache, batch, dtype):
        latents, rotated = super()._latents_of(request, layer, kv_cache, batch, dtype)
        block, offset = divmod(batch.seq_lens_list[request], kv_cache.shape[1])
        if offset:
            past = kv_cache[int(batch.block_table[request, block]), offset].to(dtype)
            latents = latents + 0.0 * past[: self.mla.kv_lora_rank]
        return latents, rotated


#: Fault -> the check that finds it, and what it says.
CAUGHT = {
    _DropsSoftCap: ("numbers/logits_soft_cap=1.5", "that of no soft cap: it is dropped"),
    _IgnoresRotatedPart: ("numbers/plain", "scores without the rotated part"),
    _IgnoresScale: ("inputs/k_scale", "keys and values have a k_scale"),
    _KeepsWeights: ("inputs/W_UK", "it has no effect"),
    _LogarithmBase2: ("lse/natural logarithm", "the lse is in base 2"),
    _WritesSharedCache: ("cache/shared cache is never written", "wrote its own keys"),
    _SwallowsNaN: ("non_finite/NaN in keys", "sees NaN or infinity has numbers"),
    _WritesBesideTheSlot: ("kv_layouts/a gap after each entry", "outside of the cache"),
    _ReadsPastTheEnd: ("garbage/NaN past a request's end", "there is NaN"),
}


@pytest.mark.parametrize("impl", CAUGHT, ids=lambda impl: impl.__name__.strip("_"))
def test_each_fault_is_caught_and_named(impl):
    name, sentence = CAUGHT[impl]
    (check,) = (c for c in checks_for(like_reference(impl=impl), "cpu") if c.full_name == name)
    outcome = run(check)
    assert outcome.status == "failed"
    assert sentence in outcome.message


def test_a_cache_of_another_shape_is_named():
    shape = staticmethod(lambda blocks, size, heads, width: (blocks, heads, size, width))
    other = like_reference(get_kv_cache_shape=shape)
    report = verify(other, "cpu", quick=True, only="declaration/the common cache")
    ((_, message),) = failed(report)
    assert "all backends share one cache of (3, 16, 64)" in message


def test_every_declared_field_has_checks():
    """A declared value of each field is in some check, of numbers or of a group of its own."""
    checks = checks_for(ReferenceMLABackend, "cpu")
    base = checks[0].spec
    for field, constraint in ReferenceMLABackend.capabilities.fields.items():
        if field in ("num_kv_heads", "attn_type"):  # one value is declared
            assert isinstance(constraint, OneOf)
            assert len(constraint.values) == 1
            continue
        values = {getattr(check.spec, field) for check in checks if check.group == "numbers"}
        assert values - {getattr(base, field)}, field


# The sizes of real models, in short requests: the group itself needs a GPU.


def real_draws(backend_cls, longest=90):
    target = BackendUnderTest(backend_cls, torch.device("cpu"), detect_device("cpu"))
    dims = MLADims(kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
    return target, draws_of_latents(target, dims, 20, longest=longest)


def test_drawn_batches_agree_with_the_oracle():
    target, draws = real_draws(ReferenceMLABackend)
    assert draws == real_draws(ReferenceMLABackend)[1]
    assert len(draws) == 4
    assert {draw.spec.dtype for draw in draws} == {torch.bfloat16, torch.float16}
    assert any(draw.spec.sliding_window for draw in draws)
    for draw in draws:
        bound = judge_latents(target, draw)
        assert 0 < bound.error <= bound.allowed


def test_one_wrong_row_of_a_drawn_batch_is_found():
    class Impl(ReferenceMLAImpl):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output[-1, -1] *= 1.5
            return output

    target, draws = real_draws(like_reference(impl=Impl))
    with pytest.raises(CheckFailed, match=r"1 of .* rows of request"):
        judge_latents(target, draws[0])


# Third parties, and packages.


def test_a_third_party_backend_by_the_command_and_the_plugin():
    arguments = ["--device", "cpu", "--quick", "--only", "numbers/logits,layer/"]
    with registered(like_reference("WRONG_MLA", _DropsSoftCap)):
        done = CliRunner().invoke(app, ["verify", "WRONG_MLA", *arguments])
        ids = {each.id for each in conformance_checks("WRONG_MLA", "cpu", quick=True)}
    assert done.exit_code == 1
    printed = " ".join(done.stdout.split())
    assert "asked for logits_soft_cap=1.5, and the output is that of no soft cap" in printed
    assert "layer 4 4 0 0" in printed  # they have no soft cap
    assert {"numbers/plain", "layer/decodes next to REFERENCE_MLA"} <= ids


def test_every_backend_of_latents_has_a_plain_layer():
    """For each device that it is declared for, whether its packages are here or not."""
    archs = {"HOPPER_MLA": "sm90", "FLASHMLA": "sm90", "FLASH_ATTN_MLA": "sm90"}
    archs |= {"FLASHINFER_MLA": "sm90", "TRITON_MLA": "gfx942", "ROCM_AITER_MLA": "gfx942"}
    for name, arch in archs.items():
        try:
            cls = backend_named(name)
        except Exception:
            continue
        assert base_spec(cls, explained_device(arch, [])).mla is not None, name
