"""The demo's workload: sums to compute, with prompts of mixed length that arrive over time."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from attn_dispatch.errors import InvalidInputError

__all__ = ["Task", "Workload", "make_workload", "prompt_task"]

#: Longest operand that the model was trained on.
MAX_DIGITS = 6
#: Worked examples that all requests share, and the maximum that a request adds.
SHARED_EXAMPLES = 4
MAX_OWN_EXAMPLES = 8

_PROMPT = re.compile(r"([0-9]+)\+([0-9]+)=?")


@dataclass(frozen=True)
class Task:
    """A request: the text after the shared prefix, the answer, and the arrival.

    Attributes:
        text: its own worked examples, then the question: "5+7=12;48+76=".
        question: only the last sum.
        answer: the right answer, without the closing ";".
        arrival: the engine's step in which it arrives.
    """

    text: str
    question: str
    answer: str
    arrival: int


@dataclass(frozen=True)
class Workload:
    """Tasks in order of arrival, and the text before all of them."""

    prefix: str
    tasks: tuple[Task, ...]


def make_workload(num_requests: int, seed: int) -> Workload:
    """A workload of this many requests, determined by the seed."""
    rng = random.Random(seed)
    prefix = "".join(_example(rng) for _ in range(SHARED_EXAMPLES))
    tasks, arrival = [], 0
    for _ in range(num_requests):
        own = "".join(_example(rng) for _ in range(rng.randint(0, MAX_OWN_EXAMPLES)))
        a, b = _operand(rng), _operand(rng)
        tasks.append(Task(f"{own}{a}+{b}=", f"{a}+{b}=", str(a + b), arrival))
        arrival += rng.choice((0, 0, 1, 1, 2))
    return Workload(prefix, tuple(tasks))


def prompt_task(prompt: str) -> Task:
    """The task of a prompt such as "48+76".

    Raises:
        InvalidInputError: it is not a sum, or the model was not trained on sums of this length.
    """
    match = _PROMPT.fullmatch(prompt.replace(" ", ""))
    if match is None or max(map(len, match.groups())) > MAX_DIGITS:
        raise InvalidInputError(
            f"The demo model adds two numbers of 1 to {MAX_DIGITS} digits; {prompt[:80]!r} is "
            "not such a sum. Try for example: --prompt 48+76"
        )
    a, b = (int(number) for number in match.groups())
    question = f"{match[1]}+{match[2]}="
    return Task(question, question, str(a + b), 0)


def _operand(rng: random.Random) -> int:
    digits = rng.randint(1, MAX_DIGITS)
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _example(rng: random.Random) -> str:
    a, b = _operand(rng), _operand(rng)
    return f"{a}+{b}={a + b};"
