"""Sliding windows of FlashAttention 3: which ones are computed correctly, the others rejected."""

from __future__ import annotations

import pytest
import torch

from attn_dispatch.backends.cuda.flash_attn.backend import FlashAttnBackend
from attn_dispatch.backends.cuda.flash_attn.providers import rejections
from attn_dispatch.backends.cuda.flash_attn.windows import computes_window, tile_of
from attn_dispatch.errors import UnsupportedError
from attn_dispatch.interface.types import Phase
from attn_dispatch.platforms.libraries import Library
from attn_dispatch.selection.selector import select
from support.flash_attn_cases import (
    BY_NAME,
    OWN_2,
    OWN_3,
    SGLANG_3,
    VLLM_2,
    VLLM_3,
    only,
    profile_for,
    provided,
    spec_of,
)

GENERATION_3 = (VLLM_3, OWN_3, SGLANG_3)


def window_spec(head_size, window, group, **fields):
    sizes = {"head_size": head_size, "num_heads": 2 * group, "num_kv_heads": 2}
    return spec_of(VLLM_3, sliding_window=window, **sizes | fields)


#: Measured with vLLM 0.23.0's kernel on an H200, by the keys that each row saw:
#: (head_size, query heads per KV head, wrong windows, right windows).
SEEN = [
    (64, 1, (), (17, 129, 300, 511, 512, 1023, 2047, 4095)),
    (64, 8, (), (129, 300, 511, 1023, 2047)),
    (96, 1, (321, 385, 511, 512, 513, 700, 1000, 1024, 2047, 4096), (17, 129, 256, 300, 320)),
    (96, 4, (500, 511, 600, 1000, 1023, 2047, 4095), (300, 385, 512, 768, 1024, 2048, 4096)),
    (96, 5, (500, 511, 1000, 1023), (300, 384, 512, 600, 1024, 1025)),
    (96, 8, (240, 255, 383, 511, 1023, 2047), (256, 300, 512, 700, 1000, 1024, 1500, 4096)),
    (128, 1, (272, 300, 511, 700, 1000, 1023, 2047), (64, 256, 257, 384, 512, 513, 1024, 2048)),
    (128, 4, (500, 511, 1000, 1023, 2047), (300, 384, 512, 600, 1024, 1500, 2048, 4096)),
    (128, 8, (255, 383, 511, 1023, 4095), (256, 300, 512, 700, 1000, 1024, 4096)),
    (192, 1, (272, 300, 511, 512, 700, 1024, 2048), (17, 129, 200, 224)),
    (192, 4, (), (300, 511, 512, 1000, 1024, 2047, 2048, 4096)),
    (192, 8, (191, 383, 767), (192, 300, 511, 512, 1000, 1023, 2047)),
    (256, 1, (193, 200, 257, 300, 512, 1000, 1024, 4096), (17, 129, 191, 192)),
    (256, 4, (100, 300, 511, 1000, 2047, 4095), (129, 257, 512, 600, 1024, 2048, 4096)),
    (256, 5, (300, 500, 511, 1000, 1023), (100, 129, 512, 600, 1024)),
    (256, 8, (127, 255, 511, 700, 1023, 3000), (128, 300, 512, 1000, 1024, 4096)),
]
CASES = [
    (head_size, group, window, is_right)
    for head_size, group, wrong, right in SEEN
    for is_right, windows in ((False, wrong), (True, right))
    for window in windows
]


@pytest.mark.parametrize(("head_size", "group", "window", "is_right"), CASES)
def test_windows_that_were_wrong_are_rejected(head_size, group, window, is_right):
    spec = window_spec(head_size, window, group)
    assert computes_window(spec) is is_right
    for name in GENERATION_3:
        fields = {
            reason.field for reason in rejections(BY_NAME[name], spec, profile_for(BY_NAME[name]))
        }
        assert ("sliding_window" in fields) is not is_right
    for name in (OWN_2, VLLM_2):
        assert not any(
            reason.field == "sliding_window"
            for reason in rejections(BY_NAME[name], spec, profile_for(BY_NAME[name]))
        )


def rows_that_are_right(spec, query_len, seq_len):
    """For each row of a KV head: whether the kernel uses only keys that the row should see.

    A model of the loops in FlashAttention 3's kernel. The first key tile is masked, and so are the
    tiles that cross the diagonal or the window's edge according to the loops' limits, which are
    computed from the whole length. Keys are counted from the first one that the query tile sees.
    """
    rows, keys = tile_of(spec.head_size)
    group = spec.num_heads // spec.num_kv_heads
    left = spec.sliding_window - 1
    right = 0 if spec.causal else min(left, query_len - 1)
    past = seq_len - query_len
    for start in range(0, query_len * group, rows):
        first, end = start // group, (start + rows - 1) // group + 1
        shift = max(0, first + past - left)
        tiles = min(-(-(seq_len - shift) // keys), -(-(end + past - shift + right) // keys))
        masked_from = max(0, (first + past + right) // keys)
        unmasked_from = max(0, -(-(end + past - left) // keys))
        unmasked = range(unmasked_from, min(tiles - 1, masked_from))
        taken = (shift + unmasked.start * keys, shift + unmasked.stop * keys)
        for row in range(first, min(query_len, end)):
            seen = (max(0, row + past - left), min(seq_len, row + past + right + 1))
            yield not unmasked or (seen[0] <= taken[0] and taken[1] <= seen[1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_size", [72, 96, 128, 160, 192, 256])
def test_accepted_windows_are_right_in_a_model_of_the_kernel(head_size, group, causal):
    """Windows around the edges of tiles. Some are right, else the test would be empty."""
    keys = tile_of(head_size).keys
    windows = {keys * n // 2 + d for n in range(1, 9) for d in (-1, 0, 1)}
    lengths = [(30, past) for past in range(0, 1200, 173)] + [(450, 0), (270, 333)]
    outcomes = set()
    for window in sorted(windows):
        spec = window_spec(head_size, window, group, causal=causal)
        wrong = not all(
            all(rows_that_are_right(spec, query_len, past + query_len))
            for query_len, past in lengths
        )
        assert not (wrong and computes_window(spec)), window
        outcomes.add((wrong, computes_window(spec)))
    assert (False, True) in outcomes


@pytest.mark.parametrize("head_size", [72, 96, 112, 128, 160, 192, 224, 256])
def test_decodes_are_right_in_the_model_for_any_window(head_size):
    for window in (100, 257, 511, 512):
        spec = window_spec(head_size, window, 4)
        for past in range(0, 1300, 77):
            assert all(rows_that_are_right(spec, 1, past + 1))


def test_the_model_reproduces_the_wrong_rows_of_phi_3_mini():
    spec = spec_of(VLLM_3, head_size=96, num_heads=32, num_kv_heads=32, sliding_window=2047)
    right = list(rows_that_are_right(spec, 4000, 4000))
    assert right.count(False) == 1162
    assert right.index(False) == 2112


def test_another_backend_serves_a_rejected_window():
    """Phi-3-mini's layers, with vLLM's FlashAttention 3 installed."""
    spec = spec_of(VLLM_3, head_size=96, num_heads=32, num_kv_heads=32, sliding_window=2047)
    device = profile_for(BY_NAME[VLLM_3]).with_libraries(
        Library("triton", "3.6"), Library("vllm", "0.24.0")
    )
    with only(VLLM_3):
        for phase in Phase:
            selection = select(spec, device, phase=phase)
            verdict = next(each for each in selection.verdicts if each.name == "FLASH_ATTN")
            (reason,) = verdict.reasons
            assert reason.field == "sliding_window"
            assert "sliding_window=2047" in str(reason)
            assert "head_size=96" in str(reason)
            assert selection.name == "HOPPER_ATTN"
        whole = select(spec.replace(sliding_window=None), device, phase=Phase.PREFILL)
        assert "FLASH_ATTN" in [each.name for each in whole.verdicts if each.supported]


def test_the_builder_rejects_a_wrong_window():
    with provided(VLLM_3), pytest.raises(UnsupportedError, match="sliding_window=2047"):
        FlashAttnBackend.get_builder_cls()(window_spec(96, 2047, 1), torch.device("cpu"))


@pytest.mark.parametrize("head_size", [264, 512])
def test_heads_without_a_kernel_are_rejected_by_size(head_size):
    spec = window_spec(head_size, 300, 1)
    device = profile_for(BY_NAME[VLLM_3])
    fields = {reason.field for reason in rejections(BY_NAME[VLLM_3], spec, device)}
    assert "head_size" in fields
    assert "sliding_window" not in fields
