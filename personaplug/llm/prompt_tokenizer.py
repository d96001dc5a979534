"""Tokenization of prompts and answers for one model, with the position of the soft tokens.

The parts of the chat template before and after the text are tokenized once. The text is tokenized alone by
`TextTokenizer`, so a text that spells `<|im_end|>` stays text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any

from personaplug.data.records import SYSTEM_ROLES, Prompt, Turn, last_message, turns_of
from personaplug.errors import ConfigError, ShapeMismatch
from personaplug.llm.chat_template import PLACEHOLDER, ChatTemplate, Frame, find_sequence
from personaplug.llm.text_tokenizer import TextTokenizer
from personaplug.llm.tokenizer_check import check_round_trip

Ids = tuple[int, ...]

_CACHED_TEXTS = 4_096  # prompts, and as many answers; a prompt of 80 tokens takes 3 KB
_CACHED_FRAMES = 256  # sequences of roles


@dataclass(frozen=True, repr=False)
class TokenizedPrompt:
    ids: Ids  # template head + text + template tail
    soft_position: int  # tokens before soft tokens of the placement `prefix`
    truncated: bool  # the oldest messages are left out, or the end of the text was cut


@dataclass(frozen=True, repr=False)
class _FramedPrompt:
    """Messages as tokens, before anything is cut."""

    ids: Ids
    soft_position: int
    spans: Sequence[tuple[int, int]]  # of the messages' texts


class PromptTokenizer:
    """Tokenizes prompts of at most `max_tokens`, template included, and answers with a tokenizer of transformers.

    Args:
        end_id: the token that ends an answer, for a tokenizer that names none.
        chat_date: the day (ISO) that a chat template writes instead of today; None = today.
    Attributes:
        chat_date: that day, or None if the template writes no date.
    Raises:
        ConfigError: if the tokenizer or its template would not keep users' texts as they are.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_tokens: int,
        is_encoder_decoder: bool,
        end_id: int | None = None,
        chat_date: str | None = None,
    ) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.texts = TextTokenizer.of(tokenizer)
        self.end_id: int = _end_id(tokenizer, end_id)
        check_round_trip(self.texts, self.decode)
        day = chat_date or today()
        self._template = None if is_encoder_decoder else ChatTemplate.of(tokenizer, self.texts, day=day)
        self.has_chat_template = self._template is not None
        self.chat_date = day if self._template and self._template.writes_date else None
        self._line_end = [] if is_encoder_decoder else self.texts.encode("\n", inside=True)
        frame = self._frame(("user",))
        self.head, self.tail = map(tuple, frame.parts)
        frame_tokens = len(self.head) + len(self.tail) + bool(frame.leads[0])
        if max_tokens <= frame_tokens:
            raise ConfigError(
                f"max_prompt_tokens must exceed the {frame_tokens} tokens of the model's template; found {max_tokens}."
            )
        self.max_text_tokens = max_tokens - frame_tokens
        # With cached prompt states, tokenizing the same prompts in every epoch would be a good part of a step.
        self._cached_frame = lru_cache(_CACHED_FRAMES)(self._frame)
        self._cached_prompt = lru_cache(_CACHED_TEXTS)(self._encode_prompt)
        self._cached_target = lru_cache(_CACHED_TEXTS)(self.encode_target_uncached)

    def encode_prompt(self, prompt: Prompt, soft_at: int = 0) -> TokenizedPrompt:
        """Tokenize one prompt, the first `soft_at` characters of its last message separately.

        If it is too long, the oldest messages that are no system messages go, then the end of the last message down to
        a quarter of what a message may have, then the ends of the system messages.

        Raises:
            ConfigError: if the chat template does not show the messages one by one in order.
        """
        text = last_message(prompt)
        if not 0 <= soft_at <= len(text):
            raise ShapeMismatch(f"soft_at must be 0 to {len(text)}, the characters of its prompt; found {soft_at}.")
        return self._cached_prompt(prompt, soft_at)

    def _encode_prompt(self, prompt: Prompt, soft_at: int) -> TokenizedPrompt:
        turns = turns_of(prompt)
        whole = self._encode_turns(turns, soft_at=soft_at)
        starts = starts_of_exchanges(turns) if len(whole.ids) > self.max_tokens else []
        if not starts:
            return self._cut(whole, is_short=True)
        encode = partial(self._encode_turns, soft_at=soft_at)
        # A conversation may have thousands of messages, so it is not read anew without each of them.
        place = bisect_left(starts, True, key=lambda start: len(encode(from_turn(turns, start)).ids) <= self.max_tokens)
        return self._cut(encode(from_turn(turns, starts[min(place, len(starts) - 1)])), is_short=False)

    def _cut(self, prompt: _FramedPrompt, *, is_short: bool) -> TokenizedPrompt:
        """Cut the ends of messages, the last one's first, if the prompt is too long."""
        ids, position, excess = list(prompt.ids), prompt.soft_position, len(prompt.ids) - self.max_tokens
        is_whole, least = is_short and excess <= 0, self.max_text_tokens // 4
        for start, end in reversed(prompt.spans):
            count = min(max(excess, 0), max(end - start - least, 0))
            del ids[end - count : end]
            position = max(position - count, min(position, end - count))
            excess, least = excess - count, 0
        return TokenizedPrompt(tuple(ids), position, truncated=not is_whole)

    def _encode_parts(self, text: str, soft_at: int, *, lead: str, is_inside: bool) -> tuple[list[int], list[int]]:
        """Return the tokens of a message before and after its soft tokens, without the template."""
        shown = self._as_shown(text)
        soft_at = min(max(0, soft_at - text.find(shown)), len(shown))
        before = self.texts.encode(lead + shown[:soft_at], inside=is_inside) if soft_at else []
        rest = shown[soft_at:] if soft_at else lead + shown
        return before, self.texts.encode(rest, inside=is_inside or soft_at > 0)

    def encode_prompts(self, prompts: Sequence[Prompt], soft_at: Sequence[int] | None = None) -> list[TokenizedPrompt]:
        positions = [0] * len(prompts) if soft_at is None else soft_at
        if len(positions) != len(prompts):
            raise ShapeMismatch(f"soft_at needs one position per prompt ({len(prompts)}); found {len(positions)}.")
        return [self.encode_prompt(prompt, position) for prompt, position in zip(prompts, positions, strict=True)]

    def encode_chat(self, turns: Sequence[Turn]) -> TokenizedPrompt:
        """Tokenize messages without cutting; `prefix` soft tokens come before the last user message.

        Raises:
            ConfigError: if the chat template does not show the messages one by one in order.
        """
        prompt = self._encode_turns(turns)
        return TokenizedPrompt(prompt.ids, prompt.soft_position, truncated=False)

    def _encode_turns(self, turns: Sequence[Turn], *, soft_at: int = 0) -> _FramedPrompt:
        """Tokenize messages; `soft_at` counts characters of the last user message."""
        frame = self._cached_frame(tuple(role for role, _ in turns))
        last_user = max((index for index, (role, _) in enumerate(turns) if role == "user"), default=len(turns) - 1)
        ids, soft_position, spans = list(frame.parts[0]), 0, []
        for index, ((_, text), lead, tail) in enumerate(zip(turns, frame.leads, frame.parts[1:], strict=True)):
            position = soft_at if index == last_user else 0
            is_inside = self.has_chat_template or index > 0
            before, rest = self._encode_parts(text, position, lead=lead, is_inside=is_inside)
            spans.append((len(ids), len(ids) + len(before) + len(rest)))
            soft_position = len(ids) + len(before) if index == last_user else soft_position
            ids += [*before, *rest, *tail]
        return _FramedPrompt(tuple(ids), soft_position, spans)

    def encode_plain(self, text: str) -> TokenizedPrompt:
        """Tokenize a text without chat template and without cutting; `prefix` soft tokens come before it."""
        head, tail = frame_of(self.tokenizer)
        return TokenizedPrompt((*head, *self.texts.encode(text), *tail), len(head), truncated=False)

    def encode_target(self, text: str, *, end: bool = True) -> Ids:
        """Tokenize an answer; `end` appends the end-of-text token."""
        return self._cached_target(text, end)

    def encode_target_uncached(self, text: str, end: bool = True) -> Ids:
        """Tokenize an answer and keep neither text nor tokens."""
        return (*self.texts.encode(text), *([self.end_id] if end else []))

    def encode_labels(self, labels: Sequence[str]) -> list[Ids]:
        """Tokenize a closed set of answers.

        All get the end-of-text token if one's tokens begin another's, as "war" begins "war film". If not, the token
        adds nothing, and a one-token label needs no further pass without it.
        """
        bare = [self.encode_target(label, end=False) for label in labels]
        first_with: dict[Ids, str] = {}
        for label, ids in zip(labels, bare, strict=True):
            if (other := first_with.setdefault(ids, label)) != label:
                raise ConfigError(
                    f"The labels {other!r} and {label!r} are the same tokens for the model, so it cannot tell them "
                    f"apart. Rename one of them, or use a model whose tokenizer writes both."
                )
        # In sorted order, labels that begin with another's tokens follow it directly.
        clash = any(first == second[: len(first)] for first, second in pairwise(sorted(bare)))
        return [self.encode_target(label) for label in labels] if clash else bare

    def encode_targets(self, texts: Sequence[str], *, labels: Sequence[str] = ()) -> list[Ids]:
        """Tokenize answers; those that are one of `labels` as in `encode_labels`, others as open text."""
        label_ids = dict(zip(labels, self.encode_labels(labels), strict=True)) if labels else {}
        return [label_ids[text] if text in label_ids else self.encode_target(text) for text in texts]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.texts.encode_many(texts)]

    def count_prompt_tokens(self, prompt: Prompt, soft_at: int = 0) -> int:
        """Return the tokens of a prompt beyond the template of a single message; up to `max_text_tokens` fit."""
        whole = self._encode_turns(turns_of(prompt), soft_at=soft_at)
        return len(whole.ids) - (self.max_tokens - self.max_text_tokens)

    @cached_property
    def takes_system_messages(self) -> bool:
        """Whether the chat template shows a system message; without a template, any message is a line."""
        try:
            self._cached_frame(("system", "user"))
        except ConfigError:
            return False
        return True

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
        """Return generated tokens as text, without special tokens.

        Some tokenizers ask for a "clean-up" that joins what a user writes apart, and turns "don't" into "do n't".
        """
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))

    def clear_cache(self) -> None:
        self._cached_prompt.cache_clear()
        self._cached_target.cache_clear()

    def _as_shown(self, text: str) -> str:
        return self._template.form(text) if self._template else text

    def _end_of(self, text: str, tokens: int) -> int:
        offsets = self.texts.offsets(text)
        if offsets is not None:
            # The start of the next token: all tokens that are parts of one character start with it.
            return min(int(offsets[tokens][0]), len(text) - 1) if tokens < len(offsets) else len(text)
        if self.count_tokens([text])[0] <= tokens:
            return len(text)
        # Without offsets: a longer beginning can have fewer tokens, so this may cut too much.
        return bisect_right(range(len(text)), tokens, key=lambda size: self.count_tokens([text[:size]])[0]) - 1

    def _frame(self, roles: Sequence[str]) -> Frame:
        """Return the tokens around messages; without a template, messages are lines."""
        if self._template is not None:
            return self._template.frame(roles)
        head, tail = frame_of(self.tokenizer)
        # Only the end of the last line tells the model that the prompt is over.
        between = [self._line_end] * (len(roles) - 1)
        lead = "" if self._line_end else " "  # encoder-decoders read all messages as one line
        return Frame([head, *between, tail + self._line_end], ["", *[lead] * (len(roles) - 1)])


def starts_of_exchanges(turns: Sequence[Turn]) -> list[int]:
    """Return the messages with which a conversation may begin when its oldest exchanges go, oldest first."""
    first = next((index for index, (role, _) in enumerate(turns) if role not in SYSTEM_ROLES), len(turns))
    last = len(turns) - 1
    users = [index for index in range(first + 1, last) if turns[index][0] == "user"]
    return [*users, last] if first < last else []


def from_turn(turns: Sequence[Turn], start: int) -> Sequence[Turn]:
    """Return the messages from one on; the system messages before it stay."""
    return (*(turn for turn in turns[:start] if turn[0] in SYSTEM_ROLES), *turns[start:])


def today() -> str:
    """Return the day, in UTC, that prompts hold if their run names none."""
    return datetime.now(UTC).date().isoformat()


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text."""
    bare = list(tokenizer(PLACEHOLDER, add_special_tokens=False)["input_ids"])
    framed = list(tokenizer(PLACEHOLDER)["input_ids"])
    start = find_sequence(framed, bare)
    if start is None:
        raise ConfigError("The model's tokenizer does not leave a text in one piece between its special tokens.")
    return framed[:start], framed[start + len(bare) :]


def _end_id(tokenizer: Any, of_model: int | None) -> int:
    end_id = of_model if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end_id is None:
        raise ConfigError(
            "Neither the model's tokenizer nor its generation_config.json names a token that ends a text, so answers "
            "would never end. Name one as eos_token in tokenizer_config.json."
        )
    return int(end_id)
