"""Drafts by prompt lookup, and what a verification accepts."""

from __future__ import annotations

import random

import pytest

from attn_dispatch.serving.drafts import PromptLookup, accepted


@pytest.mark.parametrize(
    ("token_ids", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 9, [4, 5, 1, 2, 3]),
        ([7, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),  # the newest two only
        ([1, 2, 3, 8, 2, 3, 9, 1, 2, 3], 1, [8]),  # three before two
        ([2, 3, 8, 2, 3, 9, 1, 2, 3], 1, [9]),  # the last occurrence
        ([5, 5, 5, 5], 3, [5]),
        ([1, 2, 3, 4], 3, []),
        ([1], 3, []),
        ([1, 2], 3, []),
    ],
)
def test_drafts_follow_the_last_occurrence(token_ids, most, expected):
    assert PromptLookup().draft(token_ids, most) == expected


def test_an_index_that_grows_is_that_of_all_tokens():
    rng = random.Random(0)
    token_ids, lookup = [1, 2], PromptLookup()
    for _ in range(300):
        token_ids += [rng.randrange(4) for _ in range(rng.randint(0, 3))]
        assert lookup.draft(token_ids, 4) == PromptLookup().draft(token_ids, 4)


@pytest.mark.parametrize(
    ("drafts", "likely", "expected"),
    [
        ((), [4], [4]),
        ((1, 2), [1, 2, 3], [1, 2, 3]),
        ((1, 2), [1, 9, 3], [1, 9]),
        ((1, 2), [8, 2, 3], [8]),  # a token after a wrong one does not count
    ],
)
def test_accepted_tokens_end_with_the_models_own(drafts, likely, expected):
    assert accepted(drafts, likely) == expected
