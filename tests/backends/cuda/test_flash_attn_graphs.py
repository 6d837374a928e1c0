"""Captured steps of FLASH_ATTN over fakes: drafts, whose number of tokens changes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from attn_dispatch.backends.cuda.flash_attn.backend import FlashAttnBackend
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface import unquantized
from attn_dispatch.interface.captured import GraphLimits, StaticBatch
from attn_dispatch.interface.types import Phase
from support.flash_attn_cases import (
    OWN_2,
    OWN_3,
    VLLM_2,
    VLLM_3,
    check,
    forward,
    provided,
    spec_of,
    step_of,
)

LIMITS = GraphLimits(num_reqs=4, num_tokens=12, max_query_len=3, max_seq_len=320)
STEPS = [((3, 1, 2), (300, 5, 90)), ((1, 2, 3, 3), (17, 30, 3, 60)), ((2,), (9,))]


def captured(name, fields):
    spec = spec_of(name, cuda_graph=True, **fields)
    builder = FlashAttnBackend.get_builder_cls()(spec, torch.device("cpu"))
    columns = -(-LIMITS.max_seq_len // spec.block_size)
    table = torch.zeros(5, columns, dtype=torch.int32)
    static = StaticBatch.make(LIMITS, torch.device("cpu"), block_table=table)
    return builder, static, builder.build_for_graph(static.batch, LIMITS)


@pytest.mark.parametrize("name", [VLLM_3, OWN_3, OWN_2, VLLM_2])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 20}], ids=["plain", "window"])
def test_one_call_serves_drafts_of_any_length(name, fields):
    with provided(name) as recorder:
        builder, static, metadata = captured(name, fields)
        for query_lens, seq_lens in STEPS:
            lens = {"query_lens": query_lens, "seq_lens": seq_lens}
            number = sum(query_lens)
            step = step_of(name, {"cuda_graph": True, **fields}, lens, padding=14 - number)
            step.fill_padding(3.0)
            assert LIMITS.mismatch(step.batch) is None
            static.fill(step.batch)
            builder.update_for_graph(metadata, step.batch)
            before = len(recorder.calls)
            with mock.patch.object(unquantized, "check_forward"):  # a replay checks nothing
                output = forward(step, metadata)
            assert len(recorder.calls) == before + 1
            check(step, output[:number])
            assert not output[number:].any()


def test_prompts_are_rejected():
    limits = GraphLimits(
        num_reqs=2, num_tokens=12, max_query_len=12, max_seq_len=64, phase=Phase.PREFILL
    )
    with provided(VLLM_3):
        builder, static, _ = captured(VLLM_3, {})
        with pytest.raises(UnsupportedError, match=r"FLASH_ATTN captures .* chunks of up to"):
            builder.build_for_graph(static.batch, limits)
