"""Steps over the backends of other packages, and the check of their results."""

from __future__ import annotations

import torch

from support.cases import Case, Step, layer_spec

HALF, BRAIN = torch.float16, torch.bfloat16


def spec_of(**fields):
    """A small layer in float16 unless said otherwise."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": HALF, "block_size": 4}
    return layer_spec(**(sizes | fields))


def step_of(fields, batch, device="cpu", **case):
    return Step(Case(spec=spec_of(**dict(fields)), **(batch | case)), device)


def run(backend_cls, step, **more):
    """(output, lse or None), over a copy of the cache."""
    cache = None if step.kv_cache is None else step.kv_cache.clone()
    found = step.forward(backend_cls, cache, **more)
    return found if step.spec.returns_lse else (found, None)


def check(step, found, expected=None):
    """Assert that output and lse, if it is returned, are the reference's."""
    output, lse = found
    wanted, wanted_lse = expected or step.expected()
    step.check(output, wanted)
    if lse is not None:
        assert lse.dtype == torch.float32
        found_lse = lse[: len(wanted_lse)].cpu()
        torch.testing.assert_close(found_lse, wanted_lse.float(), rtol=2e-3, atol=2e-3)
