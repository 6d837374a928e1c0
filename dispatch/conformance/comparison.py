"""Compares a result with the oracle; if it is too far off, finds what it looks like instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from attn_dispatch.conformance.cases import CaseTensors
from attn_dispatch.conformance.kv_encoding import per_head
from attn_dispatch.conformance.propagation import FreeElements, free_elements
from attn_dispatch.conformance.tolerance import (
    LSE_FLOOR,
    TANH_ERROR,
    CheckFailed,
    ErrorBound,
    allowance,
    distance,
    require,
)
from attn_dispatch.interface.quantization import GROUP_SIZE, is_fp8
from attn_dispatch.interface.reach import Reach
from attn_dispatch.interface.spec import ALIBI_SYMMETRIC

__all__ = [
    "allowed_error",
    "compare_with_oracle",
    "require_returned",
    "suspects",
    "with_output_scales",
]

#: Half a step of e4m3, relative, and below its smallest normal number: 3 bits after the point.
_E4M3_STEP, _E4M3_SMALL = 2.0**-4, 2.0**-10
#: The error that an LSE may have; of the 16-bit types some units in the last place.
_LSE_ALLOWED = {torch.float64: LSE_FLOOR, torch.float32: 2 * LSE_FLOOR}


def allowed_error(step: CaseTensors) -> float:
    """The error that an output of this step may have.

    One more unit in the last place is allowed where PyTorch's own attention does not compute all
    of it (soft cap, ALiBi, sinks, a cache of another type), and the error of a GPU's tanh.
    """
    spec = step.spec
    plain, exact = step.pytorch().double(), step.expected(cap=None, slopes=None, sinks=None)[0]
    finite = (plain.isfinite() & exact.isfinite()).all(-1)
    own = distance(plain[finite], exact[finite])
    beyond = spec.alibi or spec.sinks or spec.logits_soft_cap or spec.kv_cache_dtype != "auto"
    allowed = allowance(spec.dtype, own, units=2 if beyond else 1)
    if spec.logits_soft_cap and spec.dtype.itemsize == 2:
        allowed += TANH_ERROR * spec.logits_soft_cap
    return allowed


def require_returned(step: CaseTensors, returned: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and LSE of what a forward returned, checked for their shapes and dtypes.

    Raises:
        CheckFailed: it is something else, which the message names.
    """
    spec, shape = step.spec, step.output_shape
    parts = returned if isinstance(returned, tuple) else (returned,)
    are_tensors = all(isinstance(part, torch.Tensor) for part in parts)
    if not are_tensors or len(parts) != 1 + spec.returns_lse:
        wanted = "the pair (output, lse)" if spec.returns_lse else "the output"
        names = ", ".join(type(part).__name__ for part in parts)
        found = f"({names})" if isinstance(returned, tuple) else names
        raise CheckFailed(f"forward should return {wanted}, and returned {found}")
    output: torch.Tensor = parts[0]
    lse: torch.Tensor | None = parts[1] if spec.returns_lse else None
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


def with_output_scales(
    output: torch.Tensor,
    scale: float | torch.Tensor | None,
    block_scale: torch.Tensor | None,
) -> torch.Tensor:
    """A float64 output, multiplied by the scales that it was quantized with."""
    if block_scale is not None:
        groups = block_scale.to(output)
        return output * groups.repeat_interleave(GROUP_SIZE, 1).view(output.shape)
    return output if scale is None else output * float(scale)


def compare_with_oracle(
    step: CaseTensors,
    returned: Any,
    *,
    block_scale: torch.Tensor | None = None,
    scale: float = 1.0,
    propagates_nan: bool = True,
) -> ErrorBound:
    """Compare what a forward returned with the oracle.

    For NaN and infinity among the inputs see `propagation.free_elements`.

    Args:
        step: the step that was computed.
        returned: output, or (output, lse) where the layer returns that.
        block_scale: of an output that is quantized by groups.
        scale: of one that is quantized as a whole.
        propagates_nan: as the backend declares it.

    Raises:
        CheckFailed: it is wrong; the message has what it looks like instead.
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
        groups = None if block_scale is None else block_scale[:tokens].double().cpu()
        finding = _compare_quantized(step, actual, expected, groups, scale)
    sees_nothing = expected_lse == -math.inf
    require(not bool(actual[sees_nothing].any()), "a row that sees no key is not 0")
    require(
        not bool(output[tokens:].float().any()),
        "a row past the batch's tokens is not 0 in the output: it may not have been written",
    )
    if lse is not None:
        _compare_lse(step, lse, expected_lse, free.lse)
        require(
            bool((lse[tokens:] == -math.inf).all()),
            "the lse of a row past the batch's tokens is not −inf",
        )
    return finding


def _compare_output(
    step: CaseTensors, actual: torch.Tensor, expected: torch.Tensor, free: FreeElements
) -> ErrorBound:
    found = ErrorBound(distance(actual, expected), allowed_error(step))
    if found.error <= found.allowed:
        return found
    nan = actual.isnan().nonzero()
    if len(nan) and free.is_needed:
        token, head = nan[0, :2].tolist()
        raise CheckFailed(
            f"there is NaN in a row that sees none, that of token {token}, head {head}", found
        )
    if len(nan):
        raise CheckFailed(
            "there is NaN in the output: either memory was read that no request of the step owns "
            "(the cache holds NaN where nothing was written), or a row was not written",
            found,
        )
    numbers = f"off by {found.error:.3g} of a row's largest value; {found.allowed:.3g} is allowed"
    for sentence, changes in suspects(step):
        other = step.expected(**changes)[0].masked_fill(free.output, 0.0)
        if distance(actual, other) <= 2 * found.allowed:
            raise CheckFailed(f"{sentence} ({numbers})", found)
    raise CheckFailed(f"the output is {numbers}", found)


def _compare_quantized(
    step: CaseTensors,
    actual: torch.Tensor,
    expected: torch.Tensor,
    groups: torch.Tensor | None,
    scale: float,
) -> ErrorBound:
    """The error in units of what is allowed: half a step of the fp8 type, and the output's own."""
    require(
        groups is None or bool((groups > 0).all()),
        "a group of the quantized output has no scale above 0",
    )
    scales = with_output_scales(torch.ones_like(expected), scale, groups)
    step_sizes = expected.abs() * _E4M3_STEP + scales * _E4M3_SMALL
    rows = expected.abs().amax(-1, keepdim=True) * allowed_error(step) * (1 + _E4M3_STEP)
    error = (actual * scales - expected).abs() / (step_sizes + rows)
    error = error.nan_to_num(math.inf, math.inf)
    found = ErrorBound(float(error.max()) if error.numel() else 0.0, 1.0)
    if found.error > 1.0:
        raise CheckFailed(
            f"asked for output_quant={step.spec.output_quant}, and the output times its scale is "
            f"off by {found.error:.3g} times what the fp8 type allows",
            found,
        )
    return found


def _compare_lse(
    step: CaseTensors, lse: torch.Tensor, expected: torch.Tensor, free: torch.Tensor
) -> None:
    actual = lse[: len(expected)].double().cpu()
    sees_nothing = expected == -math.inf
    require(
        bool((actual[sees_nothing] == -math.inf).all()),
        "the lse of a row that sees no key is not −inf",
    )
    finite = ~(sees_nothing | free)
    actual, wanted = actual[finite], expected[finite]
    if not wanted.numel():
        return
    dtype, cap = step.spec.dtype, step.spec.logits_soft_cap
    allowed = _LSE_ALLOWED.get(dtype, 4 * torch.finfo(dtype).eps + TANH_ERROR * (cap or 0.0))
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
        looks["the lse includes the sinks; it should not"] = wanted.logaddexp(sinks)
    for sentence, value in looks.items():
        if off(value) <= 2 * allowed:
            raise CheckFailed(sentence, found)
    raise CheckFailed(f"the lse is off by {found.error:.3g}; {allowed:.3g} is allowed", found)


def suspects(step: CaseTensors) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mistakes that would show in this step, the most likely first.

    Yields:
        A sentence, and the arguments of `step.expected` that make the same mistake.
    """
    spec, window = step.spec, step.spec.sliding_window
    symmetric = spec.alibi == ALIBI_SYMMETRIC
    kinds = ("signed", "symmetric")

    def looks(asked: str, what: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        return f"asked for {asked}, and the output is that of {what}", changes

    if spec.logits_soft_cap:
        cap = f"logits_soft_cap={spec.logits_soft_cap:g}"
        yield looks(cap, "no soft cap: it is dropped", cap=None)
    if spec.alibi:
        yield looks("alibi", "no slopes: it is dropped", slopes=None)
    if spec.alibi and not spec.causal:
        asked, other = f"{kinds[symmetric]} ALiBi", f"{kinds[not symmetric]} distances"
        yield looks(asked, other, symmetric=not symmetric)
    if spec.sinks:
        yield looks("sinks", "no sinks: it is dropped", sinks=None)
    if window:
        asked = f"sliding_window={window}"
        yield looks(asked, "no window: it is dropped", window=None)
        for near in (window + 1, window - 1):
            yield looks(asked, f"{near}: the window is off by one", window=near)
    if spec.window_size is not None:
        left, right = spec.window_size
        asked = f"window_size={spec.window_size}"
        yield looks(asked, "no window: it is dropped", sides=None)
        yield looks(asked, f"{(right, left)}: the sides are swapped", sides=(right, left))
        for sides in ((left + 1, right), (left - 1, right), (left, right + 1), (left, right - 1)):
            if min(sides) >= 0:
                yield looks(asked, f"{sides}: the window is off by one", sides=sides)
    if spec.attention_chunk is not None:
        asked = f"attention_chunk={spec.attention_chunk}"
        yield looks(asked, "no chunks: it is dropped", chunk=None)
    uses_positions = spec.causal or spec.alibi or step.case.ranges or Reach.of(spec) != Reach()
    if step.case.positions is not None and uses_positions:
        yield looks("key_positions", "key j at position j: they are dropped", positions=None)
    if step.masks is not None:
        yield looks("custom_mask", "no mask: it is dropped", mask=None)
    if step.case.ranges:
        yield looks("bidirectional_ranges", "no ranges: it is dropped", ranges=())
    yield looks(f"causal={spec.causal}", f"causal={not spec.causal}", causal=not spec.causal)
    yield from _suspects_of_cache(step)
    default = step.default_scale
    if step.scale < 0:
        yield looks(f"scale={step.scale:.3g}", f"{-step.scale:.3g}", scale=-step.scale)
    if step.scale != default:
        yield looks(f"scale={step.scale:.3g}", "the default one", scale=default)


def _suspects_of_cache(step: CaseTensors) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mistakes about what the cache holds, as from `suspects`."""
    mla = step.spec.mla
    scaled: dict[str, tuple[str, ...]] = {"k_scale": ("keys",), "v_scale": ("values",)}
    if mla is not None:  # one scale for an entry, of which keys and values are made
        scaled = {"k_scale": ("keys", "values")}
        rope = mla.qk_rope_head_dim
        for what, part in (("rotated part", slice(-rope, None)), ("latent part", slice(-rope))):
            yield (
                f"the output is that of scores without the {what} of queries and keys",
                {"keys": [_without(keys, part) for keys in step.keys]},
            )
    for name, kinds in scaled.items():
        scale = per_head(getattr(step.layer, f"_{name}").double().cpu())
        if bool((scale != 1).any()):
            what = " and ".join(kinds)
            yield (
                f"the cache's {what} have a {name}, and the output is that of a scale of 1: it is "
                "ignored",
                {kind: [each / scale for each in getattr(step, kind)] for kind in kinds},
            )


def _without(keys: torch.Tensor, part: slice) -> torch.Tensor:
    """Keys of which some elements are 0."""
    changed = keys.clone()
    changed[..., part] = 0.0
    return changed
