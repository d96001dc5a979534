"""Tokenization of prompts and answers for one model, with the position of the soft tokens.

The parts of the chat template before and after the text are tokenized once. `TextTokenizer` tokenizes the text
separately, so a text that spells `<|im_end|>` stays text.
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

_CACHED_TEXTS = 4_096  # prompts, and the same number of answers; a prompt of 80 tokens takes 3 KB
_CACHED_FRAMES = 256  # sequences of roles


@dataclass(frozen=True, repr=False)
class TokenizedPrompt:
    ids: Ids  # template head + text + template tail
    soft_position: int  # tokens before the `prefix` soft tokens
    truncated: bool  # True if messages were dropped or text was cut


@dataclass(frozen=True, repr=False)
class _FramedPrompt:
    """Messages as tokens, before truncation."""

    ids: Ids
    soft_position: int
    spans: Sequence[tuple[int, int]]  # token range of each message's text


class PromptTokenizer:
    """Tokenizes prompts and answers with a transformers tokenizer.

    Args:
        max_tokens: largest number of tokens of a prompt, template included.
        end_id: end-of-text token, for a tokenizer that defines none.
        chat_date: ISO date that the chat template prints; None = today.
    Attributes:
        chat_date: the printed date; None if the template prints none.
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
        # Without this cache, tokenization would take a large part of a training step that uses cached prompt states.
        self._cached_frame = lru_cache(_CACHED_FRAMES)(self._frame)
        self._cached_prompt = lru_cache(_CACHED_TEXTS)(self._encode_prompt)
        self._cached_target = lru_cache(_CACHED_TEXTS)(self.encode_target_uncached)

    def encode_prompt(self, prompt: Prompt, soft_at: int = 0) -> TokenizedPrompt:
        """Tokenize one prompt. The first `soft_at` characters of its last message are tokenized separately.

        A prompt that is too long first loses its oldest exchanges, but no system messages. Then the end of the last
        message is cut, down to a quarter of `max_text_tokens`. Then the ends of the system messages are cut.

        Raises:
            ConfigError: if the chat template does not print the messages one by one in order.
        """
        text = last_message(prompt)
        if not 0 <= soft_at <= len(text):
            raise ShapeMismatch(f"soft_at must be 0 to {len(text)}, the length of the last message; found {soft_at}.")
        return self._cached_prompt(prompt, soft_at)

    def _encode_prompt(self, prompt: Prompt, soft_at: int) -> TokenizedPrompt:
        turns = turns_of(prompt)
        whole = self._encode_turns(turns, soft_at=soft_at)
        starts = starts_of_exchanges(turns) if len(whole.ids) > self.max_tokens else []
        if not starts:
            return self._cut(whole, is_short=True)
        encode = partial(self._encode_turns, soft_at=soft_at)
        # Bisect, because a conversation may have thousands of messages.
        index = bisect_left(starts, True, key=lambda start: len(encode(from_turn(turns, start)).ids) <= self.max_tokens)
        return self._cut(encode(from_turn(turns, starts[min(index, len(starts) - 1)])), is_short=False)

    def _cut(self, prompt: _FramedPrompt, *, is_short: bool) -> TokenizedPrompt:
        """Cut the ends of messages, starting with the last message, if the prompt is too long."""
        ids, position, excess = list(prompt.ids), prompt.soft_position, len(prompt.ids) - self.max_tokens
        is_whole, minimum = is_short and excess <= 0, self.max_text_tokens // 4
        for start, end in reversed(prompt.spans):
            count = min(max(excess, 0), max(end - start - minimum, 0))
            del ids[end - count : end]
            position = max(position - count, min(position, end - count))
            excess, minimum = excess - count, 0
        return TokenizedPrompt(tuple(ids), position, truncated=not is_whole)

    def _encode_parts(self, text: str, soft_at: int, *, lead: str, is_inside: bool) -> tuple[list[int], list[int]]:
        """Return the tokens of a message before and after its soft tokens, without the template."""
        printed = self._as_printed(text)
        soft_at = min(max(0, soft_at - text.find(printed)), len(printed))
        before = self.texts.encode(lead + printed[:soft_at], inside=is_inside) if soft_at else []
        rest = printed[soft_at:] if soft_at else lead + printed
        return before, self.texts.encode(rest, inside=is_inside or soft_at > 0)

    def encode_prompts(self, prompts: Sequence[Prompt], soft_at: Sequence[int] | None = None) -> list[TokenizedPrompt]:
        positions = [0] * len(prompts) if soft_at is None else soft_at
        if len(positions) != len(prompts):
            raise ShapeMismatch(f"soft_at needs one position per prompt ({len(prompts)}); found {len(positions)}.")
        return [self.encode_prompt(prompt, position) for prompt, position in zip(prompts, positions, strict=True)]

    def encode_chat(self, turns: Sequence[Turn]) -> TokenizedPrompt:
        """Tokenize messages without truncation; `prefix` soft tokens come before the last user message.

        Raises:
            ConfigError: if the chat template does not print the messages one by one in order.
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
        """Tokenize a text without chat template and truncation; `prefix` soft tokens come before the text."""
        head, tail = frame_of(self.tokenizer)
        return TokenizedPrompt((*head, *self.texts.encode(text), *tail), len(head), truncated=False)

    def encode_target(self, text: str, *, end: bool = True) -> Ids:
        """Tokenize an answer; `end` appends the end-of-text token."""
        return self._cached_target(text, end)

    def encode_target_uncached(self, text: str, end: bool = True) -> Ids:
        """Tokenize an answer without the cache."""
        return (*self.texts.encode(text), *([self.end_id] if end else []))

    def encode_labels(self, labels: Sequence[str]) -> list[Ids]:
        """Tokenize a closed set of answers.

        All labels get the end-of-text token if one is a prefix of another, as "war" is of "war film". Otherwise no
        label gets it, so that one-token labels need no second pass.
        """
        bare = [self.encode_target(label, end=False) for label in labels]
        label_by_ids: dict[Ids, str] = {}
        for label, ids in zip(labels, bare, strict=True):
            if (other := label_by_ids.setdefault(ids, label)) != label:
                raise ConfigError(
                    f"The labels {other!r} and {label!r} have the same tokens, so the model cannot tell them apart. "
                    f"Rename one of them, or use a model whose tokenizer distinguishes them."
                )
        # In sorted order, a label directly follows another label that is its prefix.
        has_prefix = any(first == second[: len(first)] for first, second in pairwise(sorted(bare)))
        return [self.encode_target(label) for label in labels] if has_prefix else bare

    def encode_targets(self, texts: Sequence[str], *, labels: Sequence[str] = ()) -> list[Ids]:
        """Tokenize answers: members of `labels` as in `encode_labels`, others as free text."""
        label_ids = dict(zip(labels, self.encode_labels(labels), strict=True)) if labels else {}
        return [label_ids[text] if text in label_ids else self.encode_target(text) for text in texts]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.texts.encode_many(texts)]

    def count_prompt_tokens(self, prompt: Prompt, soft_at: int = 0) -> int:
        """Count the tokens of a prompt without the template of a single message; up to `max_text_tokens` fit."""
        whole = self._encode_turns(turns_of(prompt), soft_at=soft_at)
        return len(whole.ids) - (self.max_tokens - self.max_text_tokens)

    @cached_property
    def takes_system_messages(self) -> bool:
        """True if the chat template prints system messages. Without a template, each message is a line."""
        try:
            self._cached_frame(("system", "user"))
        except ConfigError:
            return False
        return True

    def cut_text(self, text: str, tokens: int) -> str:
        """Return the longest prefix with at most `tokens` tokens, without split characters and trailing white space."""
        # A prefix may have more tokens alone than within the text, so count again.
        prefix = text.rstrip() if tokens > 0 else ""
        while prefix and (end := self._end_of(prefix, tokens)) < len(prefix):
            prefix = prefix[:end].rstrip()
        return prefix

    def decode(self, ids: Sequence[int]) -> str:
        """Return generated tokens as text, without special tokens and outer white space."""
        return self.decode_raw(ids).strip()

    def decode_raw(self, ids: Sequence[int]) -> str:
        """Return generated tokens as text, without special tokens.

        Some tokenizers ask for a "clean-up" that changes spaces around punctuation, so it is switched off.
        """
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))

    def clear_cache(self) -> None:
        self._cached_prompt.cache_clear()
        self._cached_target.cache_clear()

    def _as_printed(self, text: str) -> str:
        return self._template.form(text) if self._template else text

    def _end_of(self, text: str, tokens: int) -> int:
        offsets = self.texts.offsets(text)
        if offsets is not None:
            # Cut at the start of the next token; all tokens of one character have the same start.
            return min(int(offsets[tokens][0]), len(text) - 1) if tokens < len(offsets) else len(text)
        if self.count_tokens([text])[0] <= tokens:
            return len(text)
        # Without offsets, bisection may cut too much, because a longer prefix can have fewer tokens.
        return bisect_right(range(len(text)), tokens, key=lambda size: self.count_tokens([text[:size]])[0]) - 1

    def _frame(self, roles: Sequence[str]) -> Frame:
        """Return the tokens around messages; without a template, messages are lines."""
        if self._template is not None:
            return self._template.frame(roles)
        head, tail = frame_of(self.tokenizer)
        # The line end after the last message shows the model that the prompt is complete.
        between = [self._line_end] * (len(roles) - 1)
        lead = "" if self._line_end else " "  # encoder-decoders read all messages as one line
        return Frame([head, *between, tail + self._line_end], ["", *[lead] * (len(roles) - 1)])


def starts_of_exchanges(turns: Sequence[Turn]) -> list[int]:
    """Return the indices of the messages at which a shortened conversation may begin, in order."""
    first = next((index for index, (role, _) in enumerate(turns) if role not in SYSTEM_ROLES), len(turns))
    last = len(turns) - 1
    users = [index for index in range(first + 1, last) if turns[index][0] == "user"]
    return [*users, last] if first < last else []


def from_turn(turns: Sequence[Turn], start: int) -> Sequence[Turn]:
    """Return the messages from index `start` on, with all system messages before it."""
    return (*(turn for turn in turns[:start] if turn[0] in SYSTEM_ROLES), *turns[start:])


def today() -> str:
    """Return today's ISO date in UTC, the default date in prompts."""
    return datetime.now(UTC).date().isoformat()


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text."""
    bare = list(tokenizer(PLACEHOLDER, add_special_tokens=False)["input_ids"])
    framed = list(tokenizer(PLACEHOLDER)["input_ids"])
    start = find_sequence(framed, bare)
    if start is None:
        raise ConfigError(
            "The model's tokenizer must put special tokens before and after a text, but it changes the tokens of the "
            "text. Use another model."
        )
    return framed[:start], framed[start + len(bare) :]


def _end_id(tokenizer: Any, model_end_id: int | None) -> int:
    end_id = model_end_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end_id is None:
        raise ConfigError(
            "Neither the model's tokenizer nor its generation_config.json defines an end-of-text token, so answers "
            "would never end. Set eos_token in tokenizer_config.json."
        )
    return int(end_id)
