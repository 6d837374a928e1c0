"""How far from the oracle a result may be; and if it is further, what it looks like instead.

The error of a row and head is the largest difference from the oracle, relative to the oracle's
largest magnitude there, or to a part of that in all rows where a row's values cancel. It may be
twice that of PyTorch's own attention in the same dtype, plus one unit in the last place: see
docs/verify.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attn_dispatch.conformance.cases import Step
from attn_dispatch.conformance.findings import CheckFailed, ErrorBound, require
from attn_dispatch.conformance.propagation import FreeElements, free_elements
from attn_dispatch.interface.quantization import GROUP_SIZE, is_fp8
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC

__all__ = [
    "FLOOR",
    "ErrorBound",
    "CheckFailed",
    "allowed_error",
    "compare_with_oracle",
    "distance",
    "require",
    "require_returned",
]

#: What is always allowed: sums in another order, in dtypes that PyTorch computes in too.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5}
#: A row that is smaller than this part of the largest is one whose values cancel.
_CANCELLED = 1 / 16
#: The relative error of a GPU's instruction for tanh, which a soft cap in 16 bits may use.
_TANH_ERROR = 2.0**-11
#: Half a step of e4m3, relative, and below its smallest normal number: 3 bits after the point.
_E4M3_STEP, _E4M3_SMALL = 2.0**-4, 2.0**-10
#: Of LSE, absolute: what a score may be wrong by.
_LSE_ALLOWED = {torch.float64: 1e-5, torch.float32: 2e-5}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The error of rows (..., head_size_v) of an output; infinite with a NaN in one of them."""
    if not expected.numel():
        return 0.0
    largest = expected.abs().amax(-1)
    largest = largest.clamp_min(_CANCELLED * float(largest.max()) or 1.0)
    found = ((actual - expected).abs().amax(-1) / largest).max()
    return float(found) if bool(found.isfinite()) else math.inf


def allowed_error(step: Step) -> float:
    """The error that an output of this step may have.

    One more unit in the last place is allowed where PyTorch's own attention does not compute all
    of it (soft cap, ALiBi, sinks, a cache of another type), and what a GPU's tanh costs.
    """
    spec = step.spec
    plain, exact = step.pytorch().double(), step.expected(cap=None, slopes=None, sinks=None)[0]
    finite = (plain.isfinite() & exact.isfinite()).all(-1)
    own = distance(plain[finite], exact[finite])
    beyond = spec.alibi or spec.sinks or spec.logits_soft_cap or spec.kv_cache_dtype != "auto"
    allowed = 2 * own + torch.finfo(spec.dtype).eps * (2 if beyond else 1)
    if spec.logits_soft_cap and spec.dtype.itemsize == 2:
        allowed += _TANH_ERROR * spec.logits_soft_cap
    return max(allowed, FLOOR.get(spec.dtype, 0.0))


def require_returned(step: Step, returned: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take apart what a forward returned: output and lse, of the right shapes and dtypes.

    Raises:
        CheckFailed: it is something else; it says what.
    """
    spec, rows = step.spec, len(step.query)
    wanted = "the pair (output, lse)" if spec.returns_lse else "the output"
    parts = returned if isinstance(returned, tuple) else (returned,)
    are_tensors = all(isinstance(part, torch.Tensor) for part in parts)
    if not are_tensors or len(parts) != 1 + spec.returns_lse:
        names = ", ".join(type(part).__name__ for part in parts)
        found = f"({names})" if isinstance(returned, tuple) else names
        raise CheckFailed(f"forward should return {wanted}, and returned {found}")
    output: torch.Tensor = parts[0]
    lse: torch.Tensor | None = parts[1] if spec.returns_lse else None
    shape = (rows, spec.num_heads, spec.head_size_v)
    require(
        tuple(output.shape) == shape,
        f"the output has shape {tuple(output.shape)}, and should have {shape}",
    )
    if spec.output_quant is None:
        require(
            output.dtype == spec.dtype, f"the output is {output.dtype}, and the query {spec.dtype}"
        )
    else:
        require(is_fp8(output.dtype), f"the output is {output.dtype}, and should be quantized")
    if lse is not None:
        require(
            lse.dtype == torch.float32 and tuple(lse.shape) == shape[:2],
            f"the lse is {tuple(lse.shape)} {lse.dtype}; it should be {shape[:2]} torch.float32",
        )
    return output, lse


def compare_with_oracle(
    step: Step,
    returned: Any,
    *,
    block_scale: torch.Tensor | None = None,
    scale: float = 1.0,
    propagates_nan: bool = True,
) -> ErrorBound:
    """Hold what a forward returned against the oracle.

    For NaN and infinity among the inputs see `propagation.free_elements`.

    Args:
        step: the step that it is of.
        returned: output, or (output, lse) where the layer returns that.
        block_scale: of an output that is quantized by groups.
        scale: of one that is quantized as a whole.
        propagates_nan: as the backend declares it.

    Raises:
        CheckFailed: it is not what the layer should give; it says what it looks like instead.
    """
    output, lse = require_returned(step, returned)
    expected, expected_lse = step.expected()
    tokens = len(expected)
    actual = output[:tokens].double().cpu()
    free = free_elements(step, actual, lse, expected, expected_lse, propagates_nan)
    actual, expected = (each.masked_fill(free.output, 0.0) for each in (actual, expected))
    if step.spec.output_quant is None:
        finding = _compare_output(step, actual, expected, free)
    else:
        finding = _compare_quantized(step, actual, expected, block_scale, scale)
    blind = expected_lse == -math.inf
    require(not bool(actual[blind].any()), "a row that sees no key is not 0")
    require(
        not bool(output[tokens:].float().any()),
        "a row past the batch's tokens is not 0 in the output: it may have been left as it was",
    )
    if lse is not None:
        _compare_lse(step, lse, expected_lse, free.lse)
        require(
            bool((lse[tokens:] == -math.inf).all()),
            "the lse of a row past the batch's tokens is not −inf",
        )
    return finding


def _compare_output(
    step: Step, actual: torch.Tensor, expected: torch.Tensor, free: FreeElements
) -> ErrorBound:
    found = ErrorBound(distance(actual, expected), allowed_error(step))
    if found.error <= found.allowed:
        return found
    if bool(actual.isnan().any()):
        if free.is_needed:
            token, head = actual.isnan().nonzero()[0, :2].tolist()
            raise CheckFailed(
                f"there is NaN in a row that sees none, that of token {token}, head {head}", found
            )
        raise CheckFailed(
            "there is NaN in the output: something that no request of the step owns was read (the "
            "cache holds NaN wherever nothing was written), or a row was not written",
            found,
        )
    numbers = f"off by {found.error:.3g} of a row's largest value; {found.allowed:.3g} is allowed"
    for suspect in _suspects(step):
        if (
            distance(actual, suspect.output(step).masked_fill(free.output, 0.0))
            <= 2 * found.allowed
        ):
            raise CheckFailed(f"{suspect.sentence} ({numbers})", found)
    raise CheckFailed(f"the output is {numbers}", found)


def _compare_quantized(
    step: Step,
    actual: torch.Tensor,
    expected: torch.Tensor,
    block_scale: torch.Tensor | None,
    scale: float,
) -> ErrorBound:
    """The error in units of what is allowed: half a step of the fp8 type, and the output's own."""
    scales = torch.full_like(expected, scale)
    if block_scale is not None:
        groups = block_scale[: len(expected)].double().cpu()
        require(bool((groups > 0).all()), "a group of the quantized output has no scale above 0")
        scales = groups.repeat_interleave(GROUP_SIZE, 1).view(expected.shape)
    actual = actual * scales
    step_sizes = expected.abs() * _E4M3_STEP + scales * _E4M3_SMALL
    rows = expected.abs().amax(-1, keepdim=True) * allowed_error(step) * (1 + _E4M3_STEP)
    error = ((actual - expected).abs() / (step_sizes + rows)).nan_to_num(nan=math.inf)
    found = ErrorBound(float(error.max()) if error.numel() else 0.0, 1.0)
    if found.error > 1.0:
        raise CheckFailed(
            f"asked for output_quant={step.spec.output_quant}, and the output times its scale is "
            f"off by {found.error:.3g} times what the fp8 type allows",
            found,
        )
    return found


def _compare_lse(step: Step, lse: torch.Tensor, expected: torch.Tensor, free: torch.Tensor) -> None:
    actual = lse[: len(expected)].double().cpu()
    blind = expected == -math.inf
    require(
        bool((actual[blind] == -math.inf).all()), "the lse of a row that sees no key is not −inf"
    )
    finite = ~(blind | free)
    actual, wanted = actual[finite], expected[finite]
    if not wanted.numel():
        return
    dtype, cap = step.spec.dtype, step.spec.logits_soft_cap
    allowed = _LSE_ALLOWED.get(dtype, 4 * torch.finfo(dtype).eps + _TANH_ERROR * (cap or 0.0))
    allowed *= max(1.0, float(wanted.abs().max()))

    def off(value: torch.Tensor) -> float:
        return float((actual - value).abs().max().nan_to_num(nan=math.inf))

    found = ErrorBound(off(wanted), allowed)
    if found.error <= allowed:
        return
    looks = {
        "the lse is in base 2; it should be the natural logarithm": wanted / math.log(2),
        "the lse is in base 10; it should be the natural logarithm": wanted / math.log(10),
        "the lse has the wrong sign": -wanted,
    }
    if step.sinks is not None:
        sinks = step.sinks.double().cpu().expand(expected.shape)[finite]
        looks["the lse has the sinks in it; it should leave them out"] = wanted.logaddexp(sinks)
    for sentence, value in looks.items():
        if off(value) <= 2 * allowed:
            raise CheckFailed(sentence, found)
    raise CheckFailed(f"the lse is off by {found.error:.3g}; {allowed:.3g} is allowed", found)


@dataclass(frozen=True)
class _Suspect:
    """A mistake that a backend may have made: what it is, and what of the oracle it changes."""

    sentence: str
    changes: dict[str, Any]

    def output(self, step: Step) -> torch.Tensor:
        return step.expected(**self.changes)[0]


def _suspects(step: Step) -> Iterator[_Suspect]:
    """The mistakes that would show in this step, the likeliest first."""
    spec = step.spec

    def dropped(asked: str, what: str, **changes: Any) -> _Suspect:
        return _Suspect(
            f"asked for {asked}, and the output is that of no {what}: it is dropped", changes
        )

    if spec.logits_soft_cap:
        yield dropped(f"logits_soft_cap={spec.logits_soft_cap:g}", "soft cap", cap=None)
    if spec.alibi:
        yield dropped("alibi", "slopes", slopes=None)
        if not spec.causal:
            symmetric = spec.alibi == ALIBI_SYMMETRIC
            kinds = ("signed", "symmetric")
            yield _Suspect(
                f"asked for {kinds[symmetric]} ALiBi, and the output is that of "
                f"{kinds[not symmetric]} distances",
                {"symmetric": not symmetric},
            )
    if spec.sinks:
        yield dropped("sinks", "sinks", sinks=None)
    if spec.sliding_window:
        yield dropped(f"sliding_window={spec.sliding_window}", "window", window=None)
        for other in (spec.sliding_window + 1, spec.sliding_window - 1):
            yield _Suspect(
                f"asked for sliding_window={spec.sliding_window}, and the output is that of "
                f"{other}: the window is off by one",
                {"window": other},
            )
    if step.masks is not None:
        yield dropped("custom_mask", "mask", mask=None)
    if step.case.ranges:
        yield dropped("bidirectional_ranges", "ranges", ranges=())
    yield _Suspect(
        f"asked for causal={spec.causal}, and the output is that of causal={not spec.causal}",
        {"causal": not spec.causal},
    )
    for index, (name, scale) in enumerate(
        (("k_scale", step.layer._k_scale), ("v_scale", step.layer._v_scale))
    ):
        scales = scale[:, None].double().cpu() if scale.dim() else scale.double().cpu()
        if bool((scales != 1).any()):
            kind = ("keys", "values")[index]
            unscaled = [each / scales for each in getattr(step, kind)]
            yield _Suspect(
                f"the cache's {kind} have a {name}, and the output is that of a scale of 1: it is "
                "ignored",
                {kind: unscaled},
            )
    if step.scale < 0:
        yield _Suspect(
            f"asked for scale={step.scale:.3g}, and the output is that of {-step.scale:.3g}",
            {"scale": -step.scale},
        )
    default = spec.head_size**-0.5
    if step.scale != default:
        yield _Suspect(
            f"asked for scale={step.scale:.3g}, and the output is that of head_size ** -0.5",
            {"scale": default},
        )
