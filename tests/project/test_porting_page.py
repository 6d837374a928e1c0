"""docs/porting.md: the engine before and the engine after compute the same."""

from __future__ import annotations

import re

import torch

from support import fake_flash_attn
from support.paths import ROOT

PAGE = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(py|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def engine(language: str) -> dict[str, object]:
    """The names that the page's code in this language defines, after the shared code."""
    shared, *rest = BLOCKS
    namespace: dict[str, object] = {"__name__": "page"}
    for _, code in (shared, *(each for each in rest if each[0] == language)):
        exec(compile(code, "docs/porting.md", "exec"), namespace)
    return namespace


def test_the_page_has_shared_code_and_the_two_engines():
    assert [language for language, _ in BLOCKS] == ["python", "py", "python"]


def test_both_engines_give_the_same_outputs():
    torch.manual_seed(0)
    with fake_flash_attn.installed("FlashAttention 2") as recorder:
        before, after = engine("py"), engine("python")
        old, new = (each["make_layers"](2, 8) for each in (before, after))
        request = before["Request"]
        steps = [
            [request(20, 20, [3, 1]), request(5, 5, [0])],  # prefills
            [request(1, 21, [3, 1]), request(1, 6, [0])],  # decodes
            [request(4, 25, [3, 1]), request(1, 7, [0])],  # a chunk, and a decode
        ]
        for requests in steps:
            num_tokens = sum(each.num_new for each in requests)
            query = torch.randn(num_tokens, 8, 64).half()
            key, value = torch.randn(2, num_tokens, 2, 64).half()
            outputs = before["run"](old, requests, query, key, value)
            for found, expected in zip(
                after["run"](new, requests, query, key, value), outputs, strict=True
            ):
                torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    assert {"flash_attn_varlen_func", "flash_attn_with_kvcache"} == set(recorder.names())
