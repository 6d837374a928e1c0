"""Character-level tokenizer of the demo model: texts that are sums, such as ``48+76=124;``.

A text is any number of sums one after another, each ended by ``;``, the last one possibly cut
after its ``=`` (a question). The vocabulary has 15 tokens: padding, begin-of-text (BOS), the ten
digits, ``+``, ``=`` and ``;``; one character is one token.

Every maximal run of digits is one number, and the ids hold a number least-significant digit
first: ``48+76=124;`` becomes the tokens ``8 4 + 6 7 = 4 2 1 ;``. A decoder then writes an answer
in the order in which carries travel, which a small model can learn exactly. ``encode`` and
``decode`` turn the digits around, so whoever calls them only ever sees ordinary numbers.

Two consequences follow from reversing whole runs:

* Generation ends at ``;`` (``END_ID``). The ids of an answer that is still being generated hold
  only its low digits, and ``decode`` shows those: the first two ids of the answer ``124`` decode
  to ``24``.
* Encode a text whose last number is complete (cut it after ``+``, ``=`` or ``;``, not between two
  digits), so that ids of a longer text begin with the ids of each of its prefixes. A prompt made
  of shared worked examples and a question fulfils that, which is what lets requests share the
  cached keys and values of the examples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PAD_ID = 0
"""Id that fills the unused end of a row in a batch; never part of a text."""

BOS_ID = 1
"""Id that every text begins with."""

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
    """Reverse every maximal run of digits; applying it twice gives the text back."""
    return _NUMBER.sub(lambda match: match.group()[::-1], text)


def encode(text: str, *, bos: bool = True) -> list[int]:
    """Turn a text such as ``"5+7=12;48+76="`` into token ids.

    Args:
        text: characters out of ``CHARACTERS``, numbers written the ordinary way.
        bos: put ``BOS_ID`` in front. The model was trained with it; leave it out only to encode
            the continuation of a text that has been encoded already.

    Returns:
        ``len(text) + bos`` ids, the digits of each number least-significant first.

    Raises:
        ValueError: the text holds a character that is not in the vocabulary.
    """
    ids = [BOS_ID] if bos else []
    for character in _flip_numbers(text):
        token_id = _ID_OF.get(character)
        if token_id is None:
            raise ValueError(
                f"character {character!r} is not in the vocabulary; a text consists of the "
                f"characters {CHARACTERS!r}, for example '48+76='"
            )
        ids.append(token_id)
    return ids


def decode(ids: Iterable[int]) -> str:
    """Turn token ids back into text, with numbers written the ordinary way.

    Args:
        ids: token ids in ``range(VOCAB_SIZE)``; padding and BOS are left out of the text.

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
