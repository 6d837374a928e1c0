"""The suite's checks of captured steps: what they find, and what they skip."""

from __future__ import annotations

import pytest

from attn_dispatch.backends.reference.torch_ref import ReferenceBackend
from attn_dispatch.conformance.check import run
from attn_dispatch.conformance.suite import checks_for
from attn_dispatch.interface.capability import Capabilities, OneOf
from attn_dispatch.selection.registry import registry
from support.graph_cases import BACKEND, HAS_GPU, interpreted_backend

STEPS = ("drafts", "drafts, lse", "chunks", "drafts with masks", "chunks with masks")
STEPS += ("drafts with ranges",)


def reference(**builder):
    """REFERENCE that says that it can be captured, with members of its builder replaced."""
    fields = {**ReferenceBackend.capabilities.fields, "cuda_graph": OneOf(True, False)}

    class Backend(ReferenceBackend):
        capabilities = Capabilities(devices=ReferenceBackend.capabilities.devices, **fields)
        builder_cls = type("Builder", (ReferenceBackend.builder_cls,), builder)

    return Backend


def outcomes(cls):
    checks = {c.name: c for c in checks_for(cls, "cpu", quick=True) if c.group == "graphs"}
    return {name: run(checks[f"static buffers of {name}"]) for name in STEPS}


def test_steps_that_a_backend_rejects_are_skipped():
    for name, found in outcomes(reference()).items():
        assert found.status == "skipped", name
        assert "REFERENCE captures CUDA graphs of one new token per request" in found.message


def test_backend_that_plans_by_the_lengths_of_the_capture_fails():
    """It claims every kind of step by overriding build_for_graph."""
    cls = reference(build_for_graph=lambda self, batch, limits: self.build(batch))
    for name, found in outcomes(cls).items():
        assert found.status == "failed", name


@pytest.mark.skipif(HAS_GPU, reason="a GPU captures it")
def test_several_kinds_of_layers_pass_in_the_interpreter():
    with interpreted_backend():
        cls = registry.candidates()[BACKEND].backend_cls
        checks = checks_for(cls, "cpu", quick=True)
        (check,) = (c for c in checks if c.name == "several kinds of layers")
        found = run(check)
    assert (found.status, found.message) == ("passed", "")
