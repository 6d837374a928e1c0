"""PromptLookup: drafts of a request's next tokens, which one step of the model verifies.

A draft of k tokens makes a decode a chunk of 1 + k tokens. The model's most likely token after each
of them says how many are right; these and one more are new tokens of the answer. So an answer's
tokens do not depend on drafts, only the number of steps does (Leviathan et al., arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PromptLookup", "accepted"]

#: Numbers of newest tokens that are looked for, the longest first.
_LENGTHS = (3, 2)


class PromptLookup:
    """Drafts from a request's own tokens: what followed its newest tokens at their last occurrence.

    Prompt lookup decoding (A. Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding). It
    helps where answers repeat parts of prompts: summaries, code that is edited, lists.
    """

    def __init__(self) -> None:
        #: Some tokens -> the place after their last occurrence that has a token after it.
        self._after: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        """At most this many tokens that may follow; none if nothing is found.

        Args:
            token_ids: of the request; each call has those of the last call and more.
            most: 1 or more.
        """
        for place in range(max(self._num_indexed, 1), len(token_ids)):
            for length in _LENGTHS:
                if length <= place:
                    self._after[tuple(token_ids[place - length : place])] = place
        self._num_indexed = len(token_ids)
        for length in _LENGTHS:
            found = self._after.get(tuple(token_ids[-length:]))
            if found is not None and length <= len(token_ids):
                return list(token_ids[found : found + most])
        return []


def accepted(drafts: Sequence[int], likely: Sequence[int]) -> list[int]:
    """The new tokens after a verification.

    Args:
        drafts: k tokens.
        likely: the model's 1 + k most likely tokens, before the first draft and after each.
    """
    count = next((i for i, each in enumerate(drafts) if each != likely[i]), len(drafts))
    return [*drafts[:count], likely[count]]
