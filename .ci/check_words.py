"""Reject words that make the project's English hard to read, and print what to write instead.

    python .ci/check_words.py

It reads every .py and .md file except itself.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

WORDS = {
    "nobody": "no backend, no caller",
    "whoever": "any caller, the backend that",
    "is told": "receives, gets",
    "are told": "receive, get",
    "told of": "given, informed of",
    "speaks of": "mentions",
    "spoken of": "mentioned",
    "anew": "again",
    "so many": "this many, that many",
    "alike": "the same, equal",
    "has the say": "decides",
    "have the say": "decide",
    "forgiven": "ignored, allowed",
    "blamed": "recorded, reported",
    "stands": "is",
    "stand": "is, are",
    "beside": "next to, as well as, in addition to",
    "word on": "statement about",
    "what is none": "what is not one",
}
_PATTERN = re.compile(rf"\b(?:{'|'.join(WORDS)})\b(?!-in)", re.IGNORECASE)
_SKIPPED = re.compile(r"\.(?!ci/)|build/|dist/|\.ci/check_words\.py$")


def findings(root: Path) -> list[str]:
    """One line for each rejected word: file, line number, word and replacement."""
    return [
        f"{name}:{number}: {match[0]!r}: write {WORDS[match[0].lower()]}"
        for path in sorted({*root.rglob("*.py"), *root.rglob("*.md")})
        if not _SKIPPED.match(name := path.relative_to(root).as_posix())
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in _PATTERN.finditer(line)
    ]


if __name__ == "__main__":
    found = findings(Path(__file__).resolve().parent.parent)
    print("\n".join(found) or "words: none to replace")
    sys.exit(bool(found))
