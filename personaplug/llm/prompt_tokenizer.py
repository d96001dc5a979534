"""Tokenization of prompts and answers for one model, with the position of the soft tokens.

The parts of the chat template before and after the text are tokenized once. The text is tokenized alone, with special
tokens switched off, so a text that spells `<|im_end|>` stays text.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from personaplug.errors import ConfigError, ShapeMismatch

Ids = tuple[int, ...]

_CACHED_TEXTS = 4_096  # prompts, and as many answers; a prompt of 80 tokens takes 3 KB
_PLACEHOLDER = "personaplugplaceofthetext"


@dataclass(frozen=True, repr=False)
class TokenizedPrompt:
    ids: Ids  # template head + text + template tail
    soft_position: int  # tokens before soft tokens of the placement `prefix`
    truncated: bool  # the end of the text was cut


class PromptTokenizer:
    """Tokenizes prompts of at most `max_tokens`, template included, and answers with a tokenizer of transformers."""

    def __init__(self, tokenizer: Any, *, max_tokens: int, is_encoder_decoder: bool) -> None:
        self.tokenizer = tokenizer
        # User texts need special tokens switched off. That is a state of a tokenizer and threads would race for it, so
        # texts have a tokenizer to themselves.
        self._text_tokenizer = copy.deepcopy(tokenizer)
        self.max_tokens = max_tokens
        self.has_chat_template = not is_encoder_decoder and bool(getattr(tokenizer, "chat_template", None))
        head, tail = self._chat_frame(["user"]) if self.has_chat_template else frame_of(tokenizer)
        if not self.has_chat_template and not is_encoder_decoder:
            tail += self._frame_ids("\n")  # only the end of the line tells the model that the prompt is over
        self.head, self.tail = tuple(head), tuple(tail)
        frame_tokens = len(head) + len(tail)
        if max_tokens <= frame_tokens:
            raise ConfigError(
                f"max_prompt_tokens must exceed the {frame_tokens} tokens of the model's template; found {max_tokens}."
            )
        self.max_text_tokens = max_tokens - frame_tokens
        # With cached prompt states, tokenizing the same prompts in every epoch would be a good part of a step.
        self._cached_prompt = lru_cache(_CACHED_TEXTS)(self._encode_prompt)
        self._cached_target = lru_cache(_CACHED_TEXTS)(self.encode_target_uncached)

    def encode_prompt(self, text: str, soft_at: int = 0) -> TokenizedPrompt:
        """Tokenize one prompt, its first `soft_at` characters separately; cut the end of a text that is too long."""
        if not 0 <= soft_at <= len(text):
            raise ShapeMismatch(f"soft_at must be 0 to {len(text)}, the characters of its prompt; found {soft_at}.")
        return self._cached_prompt(text, soft_at)

    def _encode_prompt(self, text: str, soft_at: int) -> TokenizedPrompt:
        before = self._text_ids(text[:soft_at]) if soft_at else []
        ids = before + self._text_ids(text[soft_at:])
        room = self.max_text_tokens
        framed = (*self.head, *ids[:room], *self.tail)
        return TokenizedPrompt(framed, len(self.head) + min(len(before), room), truncated=len(ids) > room)

    def encode_prompts(self, texts: Sequence[str], soft_at: Sequence[int] | None = None) -> list[TokenizedPrompt]:
        positions = [0] * len(texts) if soft_at is None else soft_at
        if len(positions) != len(texts):
            raise ShapeMismatch(f"soft_at needs one position per prompt ({len(texts)}); found {len(positions)}.")
        return [self.encode_prompt(text, position) for text, position in zip(texts, positions, strict=True)]

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> TokenizedPrompt:
        """Tokenize (role, text) messages without cutting; `prefix` soft tokens come before the last user message.

        Raises:
            ConfigError: if the chat template does not show the messages one by one in order.
        """
        frame = self._chat_frame([role for role, _ in turns])
        last_user = max((index for index, (role, _) in enumerate(turns) if role == "user"), default=len(turns) - 1)
        ids, soft_position = list(frame[0]), 0
        for index, ((_, text), tail) in enumerate(zip(turns, frame[1:], strict=True)):
            soft_position = len(ids) if index == last_user else soft_position
            ids += [*self._text_ids(text), *tail]
        return TokenizedPrompt(tuple(ids), soft_position, truncated=False)

    def encode_plain(self, text: str) -> TokenizedPrompt:
        """Tokenize a text without chat template and without cutting; `prefix` soft tokens come before it."""
        head, tail = frame_of(self.tokenizer)
        return TokenizedPrompt((*head, *self._text_ids(text), *tail), len(head), truncated=False)

    def encode_target(self, text: str, *, end: bool = True) -> Ids:
        """Tokenize an answer; `end` appends the end-of-text token."""
        return self._cached_target(text, end)

    def encode_target_uncached(self, text: str, end: bool = True) -> Ids:
        """Tokenize an answer and keep neither text nor tokens."""
        return (*self._text_ids(text), *([self.tokenizer.eos_token_id] if end else []))

    def encode_labels(self, labels: Sequence[str]) -> list[Ids]:
        """Tokenize a closed set of answers.

        All get the end-of-text token if one's tokens begin another's, as "war" begins "war film". If not, the token
        adds nothing, and a one-token label needs no further pass without it.
        """
        bare = [self.encode_target(label, end=False) for label in labels]
        # In sorted order, labels that begin with another's tokens follow it directly.
        clash = any(first == second[: len(first)] for first, second in pairwise(sorted(bare)))
        return [self.encode_target(label) for label in labels] if clash else bare

    def encode_targets(self, texts: Sequence[str], *, labels: Sequence[str] = ()) -> list[Ids]:
        """Tokenize answers; those that are one of `labels` as in `encode_labels`, others as open text."""
        label_ids = dict(zip(labels, self.encode_labels(labels), strict=True)) if labels else {}
        return [label_ids[text] if text in label_ids else self.encode_target(text) for text in texts]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._encode(list(texts))["input_ids"]] if texts else []

    def cut_text(self, text: str, tokens: int) -> str:
        """Return the longest beginning of at most `tokens` whole tokens and characters, without trailing blanks."""
        # A beginning may have more tokens alone than within the text, so it is counted again.
        beginning = text.rstrip() if tokens > 0 else ""
        while beginning and (end := self._end_of(beginning, tokens)) < len(beginning):
            beginning = beginning[:end].rstrip()
        return beginning

    def decode(self, ids: Sequence[int]) -> str:
        """Return generated tokens as text, without special tokens and outer white space."""
        return self.decode_raw(ids).strip()

    def decode_raw(self, ids: Sequence[int]) -> str:
        """Return generated tokens as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def clear_cache(self) -> None:
        self._cached_prompt.cache_clear()
        self._cached_target.cache_clear()

    def _end_of(self, text: str, tokens: int) -> int:
        if self.tokenizer.is_fast:
            offsets = self._encode(text, return_offsets_mapping=True)["offset_mapping"]
            # The start of the next token: all tokens that are parts of one character start with it.
            return min(int(offsets[tokens][0]), len(text) - 1) if tokens < len(offsets) else len(text)
        if self.count_tokens([text])[0] <= tokens:
            return len(text)
        # Slow tokenizers have no offsets. A longer beginning can have fewer tokens, so this may cut too much.
        return bisect_right(range(len(text)), tokens, key=lambda size: self.count_tokens([text[:size]])[0]) - 1

    def _text_ids(self, text: str) -> list[int]:
        return list(self._encode(text)["input_ids"])

    def _encode(self, text: str | list[str], **options: Any) -> Any:
        return self._text_tokenizer(text, add_special_tokens=False, split_special_tokens=True, **options)

    def _frame_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _chat_frame(self, roles: Sequence[str]) -> list[list[int]]:
        """Return the tokens before the first message and after each; without a template, messages are lines."""
        if not self.has_chat_template:
            return [list(self.head), *[self._frame_ids("\n")] * (len(roles) - 1), list(self.tail)]
        messages = [{"role": role, "content": f"{_PLACEHOLDER}{index:05d}"} for index, role in enumerate(roles)]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        parts = re.split(f"{_PLACEHOLDER}(\\d{{5}})", text)
        if [int(index) for index in parts[1::2]] != list(range(len(roles))):
            raise ConfigError("The model's chat template does not show these messages one by one in order.")
        return [self._frame_ids(part) for part in parts[::2]]


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer(_PLACEHOLDER, add_special_tokens=False)["input_ids"]
    framed = tokenizer(_PLACEHOLDER)["input_ids"]
    for start in range(len(framed)):
        if framed[start : start + len(bare)] == bare:
            return list(framed[:start]), list(framed[start + len(bare) :])
    raise ConfigError("The model's tokenizer does not leave a text in one piece between its special tokens.")
