"""Character-level tokenizer of the demo model, for sums such as ``48+76=124;``.

A text is a sequence of sums, each ended by ``;``; the last may end after its ``=`` (a question).
One character is one token; padding and begin-of-text (BOS) are two more.

In the ids every run of digits is reversed: ``48+76=124;`` becomes ``8 4 + 6 7 = 4 2 1 ;``. So an
answer is written in the order in which carries propagate, which a small model can learn exactly.
The ids of an unfinished answer are its low digits; it ends at ``;`` (``END_ID``).

Only encode a text that ends after ``+``, ``=`` or ``;``, not between two digits. Then the ids of a
longer text begin with the ids of its prefixes, and requests can share cached keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PAD_ID = 0
"""Fills the unused end of a row in a batch; not part of a text."""

BOS_ID = 1
"""Every text begins with it."""

CHARACTERS = "0123456789+=;"
"""The characters of a text; the id of ``CHARACTERS[i]`` is ``i + 2``."""

NUM_SPECIAL = 2
VOCAB_SIZE = NUM_SPECIAL + len(CHARACTERS)

PLUS_ID = NUM_SPECIAL + CHARACTERS.index("+")
EQUALS_ID = NUM_SPECIAL + CHARACTERS.index("=")
END_ID = NUM_SPECIAL + CHARACTERS.index(";")
"""Id of ``;``: generation stops once this token has been produced."""

_ID_OF = {character: NUM_SPECIAL + i for i, character in enumerate(CHARACTERS)}
_NUMBER = re.compile(r"[0-9]+")


def _flip_numbers(text: str) -> str:
    """Reverse every maximal run of digits; this is its own inverse."""
    return _NUMBER.sub(lambda match: match.group()[::-1], text)


def encode(text: str, *, bos: bool = True) -> list[int]:
    """Turn a text such as ``"5+7=12;48+76="`` into token ids.

    Args:
        text: made of ``CHARACTERS``, with ordinary numbers.
        bos: start with ``BOS_ID``, as in training. Leave it out only to encode the continuation of
            a text.

    Returns:
        ``len(text) + bos`` ids, the digits of each number least-significant first.

    Raises:
        ValueError: a character is not in the vocabulary.
    """
    ids = [BOS_ID] if bos else []
    for character in _flip_numbers(text):
        token_id = _ID_OF.get(character)
        if token_id is None:
            raise ValueError(
                f"character {character!r} is not in the vocabulary; a text is made of the "
                f"characters {CHARACTERS!r}, for example '48+76='"
            )
        ids.append(token_id)
    return ids


def decode(ids: Iterable[int]) -> str:
    """Turn token ids back into text with ordinary numbers.

    Args:
        ids: token ids in ``range(VOCAB_SIZE)``; padding and BOS are skipped.

    Returns:
        The text; ``decode(encode(text)) == text`` for every text that can be encoded.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    characters: list[str] = []
    for token_id in ids:
        if not 0 <= token_id < VOCAB_SIZE:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {VOCAB_SIZE} ids")
        if token_id >= NUM_SPECIAL:
            characters.append(CHARACTERS[token_id - NUM_SPECIAL])
    return _flip_numbers("".join(characters))
