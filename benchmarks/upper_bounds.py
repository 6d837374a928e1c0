"""What upper bounds of the key counts cost, next to exact lengths, and whether they change a bit.

    python benchmarks/upper_bounds.py [--device cuda] [--backend NAME] [--json]

Each step is computed with exact lengths and with bounds that are twice the lengths, by the same
backend, in turns. Exits with 1 if bounds change a bit of a layer's result, or if they take over 3 %
more time on the device than a layer for exact lengths. Of FLASH_ATTN this is only reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from attn_dispatch import (
    STRIDE_ORDERS,
    Attention,
    AttentionBatch,
    allocate_kv_cache,
    kv_cache_shape,
)
from attn_dispatch.bench.timing import Timing, clock_for, host_time_us, measure
from attn_dispatch.errors import AttnDispatchError

LIMIT = 1.03
BLOCK_SIZE = 16
#: Llama 3 8B.
LAYER: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128}
BACKENDS = ("HOPPER_ATTN", "TRITON_ATTN", "FLASH_ATTN")
OURS = ("HOPPER_ATTN", "TRITON_ATTN")


#: A layer for exact lengths; and one for both, with a batch of either kind.
WAYS = {"exact": "exact", "exact batch": "upper_bound", "bounds": "upper_bound"}


class Step(NamedTuple):
    """New tokens and keys of each request."""

    query_lens: list[int]
    seq_lens: list[int]


STEPS = {
    "decode, 64 of 1k to 8k": Step([1] * 64, [1024 + 7168 * i // 63 for i in range(64)]),
    "verify 4, 64 of 1k to 8k": Step([4] * 64, [1024 + 7168 * i // 63 for i in range(64)]),
    "prompts, 8 of 2k": Step([2048] * 8, [2048] * 8),
    "prompts, 8 of about 2k": Step([2000 + i for i in range(8)], [2000 + i for i in range(8)]),
    "short prompts, 32 of 128": Step([128] * 32, [128] * 32),
    "chunks, 8 of 512 after 4k": Step([512] * 8, [4608] * 8),
    "mixed, 32 decodes and a chunk": Step([1] * 32 + [2048], [4096] * 32 + [8192]),
}


class Run:
    """A step of a layer, with exact lengths and with bounds."""

    def __init__(self, backend: str, step: Step, device: torch.device, dtype: torch.dtype) -> None:
        self._step, self._device = step, device
        sizes = {**LAYER, "dtype": dtype, "device": device, "block_size": BLOCK_SIZE}
        self._layers = {
            name: Attention(**sizes, backend=backend, lengths=lengths)
            for name, lengths in WAYS.items()
        }
        columns = -(-2 * max(step.seq_lens) // BLOCK_SIZE)
        needed = [-(-n // BLOCK_SIZE) for n in step.seq_lens]
        random = torch.Generator().manual_seed(0)
        free = torch.randperm(sum(needed), generator=random).split(needed)
        table = torch.zeros(len(needed), columns, dtype=torch.int32)
        for row, blocks in zip(table, free, strict=True):
            row[: len(blocks)] = blocks
        self._table = table.to(device)
        self._true = torch.tensor(step.seq_lens, dtype=torch.int32, device=device)
        heads, kv_heads, size = LAYER["num_heads"], LAYER["num_kv_heads"], LAYER["head_size"]
        tokens = sum(step.query_lens)
        torch.manual_seed(0)
        make = partial(torch.randn, dtype=dtype, device=device)
        self._rows = [make(tokens, n, size) for n in (heads, kv_heads, kv_heads)]
        shape = kv_cache_shape(sum(needed), BLOCK_SIZE, kv_heads, size)
        self._cache = allocate_kv_cache(shape, STRIDE_ORDERS["NHD"], dtype, device)
        self._cache.normal_()
        self._slots = self.batch("exact").slot_mapping
        self._metadata = {
            name: layer.build_metadata(self.batch(name)) for name, layer in self._layers.items()
        }

    def batch(self, name: str) -> AttentionBatch:
        """The step's batch, as an engine makes it in each step."""
        query_lens, seq_lens = self._step
        more: dict[str, Any] = {"block_table": self._table, "block_size": BLOCK_SIZE}
        more |= {"slot_mapping": getattr(self, "_slots", None), "device": self._device}
        if name != "bounds":
            return AttentionBatch.create(query_lens, seq_lens, **more)
        bounds = [2 * seq_len for seq_len in seq_lens]
        more |= {"lengths": "upper_bound", "seq_lens_upper_bound": bounds}
        return AttentionBatch.create(query_lens, self._true, **more)

    def plan(self, name: str) -> None:
        """A batch, and its metadata."""
        self._layers[name].build_metadata(self.batch(name))

    def call(self, name: str) -> Any:
        """The layer's call."""
        return self._layers[name](*self._rows, self._cache, self._metadata[name])


def compared(run: Run, device: torch.device) -> dict[str, Any]:
    """The times of both ways, and whether their results are the same bits."""
    exact, bounds = (run.call(name).clone() for name in ("exact batch", "bounds"))
    clock = clock_for(device)
    calls = {name: partial(run.call, name) for name in ("exact", "bounds")}
    host = {name: host_time_us(call, clock) for name, call in calls.items()}
    found = measure(calls, clock, budget_s=0.8, host_us=host)
    times = {name: each.median_us for name, each in found.items() if isinstance(each, Timing)}
    return {
        **{f"{name}_us": times[name] for name in calls},
        "ratio": times["bounds"] / times["exact"],
        **{f"plan_{name}_us": host_time_us(partial(run.plan, name), clock) for name in calls},
        "same_bits": torch.equal(exact.view(torch.int16), bounds.view(torch.int16)),
        "difference": float((exact.float() - bounds.float()).abs().max()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    rows = []
    for backend in given.backend or BACKENDS:
        for name, step in STEPS.items():
            try:
                run = Run(backend, step, given.device, torch.bfloat16)
                rows.append({"backend": backend, "step": name, **compared(run, given.device)})
            except AttnDispatchError as error:  # it does not run here
                print(f"{backend}: {error}", file=sys.stderr)
                break
    if given.json:
        print(json.dumps(rows, indent=1))
    for row in () if given.json else rows:
        print(
            f"{row['backend']:12} {row['step']:30} {row['exact_us']:9.1f} {row['bounds_us']:9.1f} "
            f"us, {row['ratio'] - 1:+7.1%}; planned in {row['plan_exact_us']:.0f} and "
            f"{row['plan_bounds_us']:.0f} us; "
            + ("same bits" if row["same_bits"] else f"differs by {row['difference']:.2g}")
        )
    ours = [row for row in rows if row["backend"] in OURS]
    return int(any(not row["same_bits"] for row in ours) or any(r["ratio"] > LIMIT for r in ours))


if __name__ == "__main__":
    sys.exit(main())
