"""Runs a Triton kernel of one's own on emulated AMD GPUs, and shows a fault that is found.

    python examples/emulate_kernel.py

No GPU is needed; Triton and NumPy are (pip install 'attn-dispatch[emulate]').
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is defined: it must be compiled

import torch
import triton
import triton.language as tl

from attn_dispatch.emulation import MemoryFault, emulate_launch


@triton.jit
def softmax(x, out, stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_MASKED: tl.constexpr):
    """The softmax of each row."""
    columns = tl.arange(0, BLOCK)
    mask = columns < (COLUMNS if IS_MASKED else BLOCK)
    row = tl.program_id(0) * stride + columns
    scores = tl.load(x + row, mask=mask, other=float("-inf"))
    weights = tl.exp(scores - tl.max(scores))
    tl.store(out + row, weights / tl.sum(weights), mask=mask)


def main() -> None:
    """Run it on each target, then without its mask."""
    x = torch.randn(4, 200)
    out = torch.empty_like(x)
    constants = {"COLUMNS": 200, "BLOCK": 256}
    for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"):
        report = emulate_launch(
            softmax, (4,), [x, out, 200], arch=arch, **constants, IS_MASKED=True, unwritten=["out"]
        )
        error = (out.double() - x.double().softmax(-1)).abs().max().item()
        print(f"{report}: largest error {error:.1e}")
    try:
        emulate_launch(
            softmax, (4,), [x, out, 200], arch="gfx942", **constants, IS_MASKED=False,
            buffer_ops=False,
        )  # fmt: skip
    except MemoryFault as fault:
        print(fault, *fault.__notes__, sep="\n")


if __name__ == "__main__":
    main()
