"""Renderer: a user's text becomes token ids, with the place where soft tokens go.

The chat template is applied around the text, not over it: head and tail are tokenized once, the text by itself with
special tokens switched off, so that a text that spells `<|im_end|>` stays text.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from personaplug.errors import ConfigError, ShapeMismatch

Ids = tuple[int, ...]

_REMEMBERED = 4_096  # prompts, and answers, whose tokens are kept; 3 KB for 80 of them
_PLACE = "personaplugplaceofthetext"


@dataclass(frozen=True, repr=False)
class TokenizedPrompt:
    """One prompt in tokens.

    Attributes:
        ids: head + text + tail.
        at: how many tokens stand before the soft tokens: the head, and what of the text was asked to precede them.
        truncated: whether the end of the text was cut to fit.
    """

    ids: tuple[int, ...]
    at: int
    truncated: bool


class PromptTokenizer:
    """Turns texts into tokens for one model.

    Args:
        tokenizer: a transformers tokenizer.
        max_tokens: longest prompt, head and tail included.
        encoder_decoder: whether prompt and answer are read by different halves of the model.

    Attributes:
        room: how many tokens of text fit a prompt, head and tail apart.
    Raises:
        ConfigError: if `max_tokens` leaves no room for text within the chat template.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, encoder_decoder: bool) -> None:
        self.tokenizer = tokenizer
        # Of users' texts, in which special tokens are text. One of its own: whether they are is a state of a tokenizer,
        # and several threads would change it under each other.
        self._of_texts = copy.deepcopy(tokenizer)
        self.max_tokens = max_tokens
        self.chat = not encoder_decoder and bool(getattr(tokenizer, "chat_template", None))
        head, tail = self._chat_frame() if self.chat else self._plain_frame(new_line=not encoder_decoder)
        self.head, self.tail = tuple(head), tuple(tail)
        if max_tokens <= len(self.head) + len(self.tail):
            raise ConfigError(
                f"max_prompt_tokens must exceed the {len(self.head) + len(self.tail)} tokens of the model's "
                f"template; found {max_tokens}."
            )
        self.room = max_tokens - len(self.head) - len(self.tail)
        # Behind a prompt that is read once, tokenizing it again for each view would be a good part of a step.
        self._prompt = lru_cache(_REMEMBERED)(self._tokenized_prompt)
        self._answer = lru_cache(_REMEMBERED)(self.unremembered)

    def prompt(self, text: str, soft_at: int = 0) -> TokenizedPrompt:
        """Tokenize one prompt; the end of the text is cut where it is too long.

        Args:
            text: what the model is asked.
            soft_at: characters of the text that stand before the soft tokens; what stands behind them is tokenized
                apart. 0 also where there are no soft tokens, so that a bare model reads the text in one piece.
        Raises:
            ShapeMismatch: if the text has no such place.
        """
        if not 0 <= soft_at <= len(text):
            raise ShapeMismatch(
                f"soft_at is a place in the prompt, 0 to its {len(text)} characters; found {soft_at}. "
                f"Give the place that was found when this prompt was written."
            )
        return self._prompt(text, soft_at)

    def _tokenized_prompt(self, text: str, soft_at: int) -> TokenizedPrompt:
        before = self._text_ids(text[:soft_at]) if soft_at else []
        ids = before + self._text_ids(text[soft_at:])
        kept = (*self.head, *ids[: self.room], *self.tail)
        return TokenizedPrompt(kept, at=len(self.head) + min(len(before), self.room), truncated=len(ids) > self.room)

    def prompts(self, texts: Sequence[str], soft_at: Sequence[int] | None = None) -> list[TokenizedPrompt]:
        """Tokenize several prompts; without `soft_at` the soft tokens stand before each text.

        Raises:
            ShapeMismatch: if there is not one place a text, or a text has no such place.
        """
        places = [0] * len(texts) if soft_at is None else soft_at
        if len(places) != len(texts):
            raise ShapeMismatch(f"soft_at needs one place for each of {len(texts)} prompts; found {len(places)}.")
        return [self.prompt(text, place) for text, place in zip(texts, places, strict=True)]

    def turns(self, turns: Sequence[tuple[str, str]]) -> TokenizedPrompt:
        """Tokenize the turns of a chat, whole; soft tokens of the placement `prefix` stand before the last user's text.

        A single turn of a user gives what `prompt` gives. Whatever a turn says is only ever text.

        Args:
            turns: (role, text) each.
        Raises:
            ConfigError: if the model's chat template does not show them one by one in order.
        """
        frame = self._frame_of([role for role, _ in turns])
        asked = max((number for number, (role, _) in enumerate(turns) if role == "user"), default=len(turns) - 1)
        ids, at = list(frame[0]), 0
        for number, ((_, text), behind) in enumerate(zip(turns, frame[1:], strict=True)):
            at = len(ids) if number == asked else at
            ids += [*self._text_ids(text), *behind]
        return TokenizedPrompt(tuple(ids), at=at, truncated=False)

    def bare(self, text: str) -> TokenizedPrompt:
        """Tokenize a text without the chat template, whole; soft tokens of the placement `prefix` stand before it."""
        head, tail = self._plain_frame(new_line=False)
        return TokenizedPrompt((*head, *self._text_ids(text), *tail), at=len(head), truncated=False)

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is by itself."""
        return [len(ids) for ids in self._encoded(list(texts))["input_ids"]] if texts else []

    def cut(self, text: str, tokens: int) -> str:
        """The longest beginning of a text that is at most so many tokens, without white space at its end.

        It ends between two tokens of the text and never within a character. What is returned is itself tokenized
        again: a beginning may fall into more tokens than it had within the whole.
        """
        kept = text.rstrip() if tokens > 0 else ""
        while kept and (end := self._end_of(kept, tokens)) < len(kept):
            kept = kept[:end].rstrip()
        return kept

    def answer(self, text: str, *, end: bool = True) -> Ids:
        """Tokenize an answer, closed by the end-of-text token unless `end` is False."""
        return self._answer(text, end)

    def unremembered(self, text: str, end: bool = True) -> Ids:
        """The same, without keeping text or tokens for the next time."""
        return (*self._text_ids(text), *([self.tokenizer.eos_token_id] if end else []))

    def answers(self, labels: Sequence[str]) -> list[Ids]:
        """Tokenize a closed set of answers for scoring.

        Where no label's tokens begin another label's, the end-of-text token adds nothing and is left out (a one-token
        label then costs no extra pass); else all labels carry it, so that "war" and "war film" are told apart.
        """
        bare = [self.answer(label, end=False) for label in labels]
        # In order, what begins with a label's tokens stands right behind it.
        clash = any(one == other[: len(one)] for one, other in pairwise(sorted(bare)))
        return [self.answer(label) for label in labels] if clash else bare

    def targets(self, texts: Sequence[str], *, labels: Sequence[str] = ()) -> list[Ids]:
        """Tokenize answers to be trained on; those of a closed set as `answers` does, so that they are also scored so.

        Args:
            labels: the closed set that the texts are from; what is none of them is open text.
        """
        closed = dict(zip(labels, self.answers(labels), strict=True)) if labels else {}
        return [closed[text] if text in closed else self.answer(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """New tokens as text, without special tokens and outer white space."""
        return self.raw(ids).strip()

    def raw(self, ids: Sequence[int]) -> str:
        """New tokens as text, without special tokens; white space stays."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def forget(self) -> None:
        """Let go of the texts whose tokens are remembered."""
        self._prompt.cache_clear()
        self._answer.cache_clear()

    def _end_of(self, text: str, tokens: int) -> int:
        """How many characters the first tokens of a text cover; all of them if it has no more tokens."""
        if self.tokenizer.is_fast:
            places = self._encoded(text, return_offsets_mapping=True)["offset_mapping"]
            # Where the next token begins: tokens that are parts of one character all begin with it.
            return min(int(places[tokens][0]), len(text) - 1) if tokens < len(places) else len(text)
        if self.count([text])[0] <= tokens:
            return len(text)
        # These do not say which characters a token stands for. As a word grows its tokens may become fewer, so that a
        # longer beginning than the one found may fit too; the one found always does.
        return bisect_right(range(len(text)), tokens, key=lambda size: self.count([text[:size]])[0]) - 1

    def _text_ids(self, text: str) -> list[int]:
        return list(self._encoded(text)["input_ids"])

    def _encoded(self, text: str | list[str], **options: Any) -> Any:
        return self._of_texts(text, add_special_tokens=False, split_special_tokens=True, **options)

    def _chat_frame(self) -> tuple[list[int], list[int]]:
        parts = self._framed([{"role": "user", "content": _PLACE}]).split(_PLACE)
        if len(parts) != 2:
            raise ConfigError("The model's chat template does not show the user's message exactly once.")
        head, tail = (self._frame_ids(part) for part in parts)
        return head, tail

    def _frame_of(self, roles: Sequence[str]) -> list[list[int]]:
        """What stands before the first turn of a chat, and behind each of them; without a template they are lines."""
        if not self.chat:
            line = self._frame_ids("\n")
            return [list(self.head), *([line] * (len(roles) - 1)), list(self.tail)]
        written = self._framed(
            [{"role": role, "content": f"{_PLACE}{number:05d}"} for number, role in enumerate(roles)]
        )
        parts = re.split(f"{_PLACE}(\\d{{5}})", written)
        if [int(number) for number in parts[1::2]] != list(range(len(roles))):
            raise ConfigError("The model's chat template does not show these turns one by one in their order.")
        return [self._frame_ids(part) for part in parts[::2]]

    def _framed(self, turns: Sequence[Mapping[str, str]]) -> str:
        """Turns as the chat template writes them, with what opens the answer."""
        return str(
            self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )

    def _frame_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain_frame(self, *, new_line: bool) -> tuple[list[int], list[int]]:
        head, tail = frame_of(self.tokenizer)
        # Without a template nothing but the end of its line tells a decoder-only model that the prompt is over.
        return head, tail + (self._frame_ids("\n") if new_line else [])


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts in front of a text and behind it.

    Raises:
        ConfigError: if it does not leave a text in one piece.
    """
    bare = tokenizer(_PLACE, add_special_tokens=False)["input_ids"]
    framed = tokenizer(_PLACE)["input_ids"]
    for start in range(len(framed)):
        if framed[start : start + len(bare)] == bare:
            return list(framed[:start]), list(framed[start + len(bare) :])
    raise ConfigError("The model's tokenizer does not leave a text in one piece between its special tokens.")
