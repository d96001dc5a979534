"""Renderer: a user's text becomes token ids, with the place where soft tokens go.

The chat template is applied around the text, not over it: head and tail are tokenized once, the text by itself with
special tokens switched off, so that a text that spells `<|im_end|>` stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from personaplug.errors import BadConfig

_PLACE = "personaplugplaceofthetext"


@dataclass(frozen=True, repr=False)
class Rendered:
    """One prompt in tokens.

    Attributes:
        ids: head + text + tail.
        at: how many tokens stand before the user's text; soft tokens go there.
        truncated: whether the end of the text was cut to fit.
    """

    ids: tuple[int, ...]
    at: int
    truncated: bool


class Renderer:
    """Turns texts into tokens for one model.

    Args:
        tokenizer: a transformers tokenizer.
        max_tokens: longest prompt, head and tail included.
        encoder_decoder: whether prompt and answer are read by different halves of the model.
    Raises:
        BadConfig: if `max_tokens` leaves no room for text within the chat template.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, encoder_decoder: bool) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.chat = not encoder_decoder and bool(getattr(tokenizer, "chat_template", None))
        head, tail = self._chat_frame() if self.chat else self._plain_frame(new_line=not encoder_decoder)
        self.head, self.tail = tuple(head), tuple(tail)
        if max_tokens <= len(self.head) + len(self.tail):
            raise BadConfig(
                f"max_prompt_tokens must exceed the {len(self.head) + len(self.tail)} tokens of the model's "
                f"template; found {max_tokens}."
            )

    def prompt(self, text: str) -> Rendered:
        """Tokenize one prompt; the end of the text is cut where it is too long."""
        ids = self._text_ids(text)
        room = self.max_tokens - len(self.head) - len(self.tail)
        return Rendered((*self.head, *ids[:room], *self.tail), at=len(self.head), truncated=len(ids) > room)

    def prompts(self, texts: Sequence[str]) -> list[Rendered]:
        """Tokenize several prompts."""
        return [self.prompt(text) for text in texts]

    def answer(self, text: str, *, end: bool = True) -> list[int]:
        """Tokenize an answer, closed by the end-of-text token unless `end` is False."""
        return self._text_ids(text) + ([self.tokenizer.eos_token_id] if end else [])

    def answers(self, labels: Sequence[str]) -> list[list[int]]:
        """Tokenize a closed set of answers for scoring.

        Where no label's tokens begin another label's, the end-of-text token adds nothing and is left out (a one-token
        label then costs no extra pass); else all labels carry it, so that "war" and "war film" are told apart.
        """
        bare = [self.answer(label, end=False) for label in labels]
        clash = any(a == b[: len(a)] for i, a in enumerate(bare) for j, b in enumerate(bare) if i != j)
        return [self.answer(label) for label in labels] if clash else bare

    def decode(self, ids: Sequence[int]) -> str:
        """New tokens as text, without special tokens and outer white space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _text_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _chat_frame(self) -> tuple[list[int], list[int]]:
        written = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        parts = written.split(_PLACE)
        if len(parts) != 2:
            raise BadConfig("The model's chat template does not show the user's message exactly once.")
        head, tail = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        return list(head), list(tail)

    def _plain_frame(self, *, new_line: bool) -> tuple[list[int], list[int]]:
        bare = self.tokenizer(_PLACE, add_special_tokens=False)["input_ids"]
        framed = self.tokenizer(_PLACE)["input_ids"]
        start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        tail = list(framed[start + len(bare) :])
        # Without a template nothing but the end of its line tells a decoder-only model that the prompt is over.
        tail += self.tokenizer("\n", add_special_tokens=False)["input_ids"] if new_line else []
        return list(framed[:start]), tail
