"""Prompts to token ids, and token ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attn_dispatch.arguments import shown
from attn_dispatch.errors import InvalidInputError

__all__ = ["Text", "TextStream"]

#: Tokens before the new ones that are decoded with them, since some tokenizers drop the space in
#: front of the first.
_CONTEXT = 6
#: What tokenizers write for a character whose bytes are incomplete.
_INCOMPLETE = "\ufffd"


class Text:
    """A tokenizer of transformers, or none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be made a text of."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def encode(self, prompt: str | Sequence[int] | Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a prompt, see `Engine.add`.

        Raises:
            InvalidInputError: it is of another type, or there is no tokenizer or chat template.
        """
        if isinstance(prompt, str):
            return list(self._require()(prompt)["input_ids"])
        if not isinstance(prompt, Sequence):
            raise InvalidInputError(f"A prompt is {shown(prompt)}. Give text, ids or messages.")
        if all(isinstance(each, Mapping) for each in prompt) and prompt:
            return self._chat(prompt)
        ids = [each for each in prompt if isinstance(each, int) and each >= 0]
        if len(ids) != len(prompt):
            raise InvalidInputError(f"A prompt is {shown(prompt)}. Give text, ids or messages.")
        return ids

    def _chat(self, messages: Sequence[Any]) -> list[int]:
        tokenizer = self._require()
        if not self.has_chat_template:
            raise InvalidInputError("This model's tokenizer has no chat template. Give text.")
        try:
            ids = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=True
            )["input_ids"]
        except Exception as error:  # any: a template is code of the checkpoint's author
            raise InvalidInputError(f"The chat template rejects the messages: {error}") from error
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._require().decode(list(ids), skip_special_tokens=True))

    def _require(self) -> Any:
        if self.tokenizer is None:
            raise InvalidInputError("The engine has no tokenizer. Give and take token ids.")
        return self.tokenizer


class TextStream:
    """The text of an answer as its tokens arrive.

    A token's text is held back while its last character is incomplete.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._done = 0

    def new_text(self, ids: Sequence[int], *, is_last: bool) -> str:
        """What the answer's tokens add to the text that was returned before."""
        start = max(0, self._done - _CONTEXT)
        before = self._text.decode(ids[start : self._done])
        now = self._text.decode(ids[start:])
        if now.endswith(_INCOMPLETE) and not is_last:
            return ""
        self._done = len(ids)
        return now[len(before) :]
