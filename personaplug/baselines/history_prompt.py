"""Formatters write texts of a history into prompts, within a token budget: items, stated preferences, a profile.

One formatter uses the wording of a task (LaMP's wording for LaMP's tasks), the other the turns of a conversation
(`conversation_prompt.py`). Users' texts are inserted as values and never parsed as templates. The prompt's own messages
are never cut: if no text fits beside them, the prompt is unchanged.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from personaplug.data.records import (
    SYSTEM_ROLES,
    Chat,
    HistoryItem,
    Prompt,
    Turn,
    last_message,
    turns_of,
    with_last_message,
)
from personaplug.data.task import Task, template_parts
from personaplug.llm.base import LanguageModel

_MIN_CONTENT_TOKENS = 8  # an item with less content is not informative
_CACHED_ITEMS = 1 << 13
_NOTE_TEMPLATE = template_parts("About this user: {history}. {input}")
_STATED = "The user has said: "
_BREAK = "\n\n"

_Part = tuple[str, str | None]
"""A text and the name of the field after it; None after the last text."""

Draft = tuple[Prompt, int]
"""A prompt and its `soft_at`."""


@dataclass(frozen=True, repr=False)
class HistoryPrompt:
    """A prompt with history texts in it; soft tokens go after the first `soft_at` characters of its last message.

    Attributes:
        offered, included, shortened: numbers of texts that were offered, are in the prompt, and were shortened.
    """

    prompt: Prompt
    soft_at: int
    offered: int
    included: int
    shortened: int

    def counting(self, earlier: HistoryPrompt) -> HistoryPrompt:
        """Return the prompt with the numbers of an earlier one added to its own."""
        return replace(
            self,
            offered=self.offered + earlier.offered,
            included=self.included + earlier.included,
            shortened=self.shortened + earlier.shortened,
        )


@dataclass(frozen=True, repr=False)
class _MeasuredItem:
    parts: tuple[_Part, ...]
    values: dict[str, str]
    contents: dict[str, int]  # tokens of each field that may be cut
    tokens: int
    frame_tokens: int  # without the contents

    @property
    def min_tokens(self) -> int:
        return self.frame_tokens + min(self.tokens - self.frame_tokens, _MIN_CONTENT_TOKENS)


class HistoryFormatter(ABC):
    """Writes history texts into prompts so that the language model's limit never cuts the prompts' own texts.

    Args:
        history_tokens: maximum tokens of history in a prompt; 0 = all tokens that the prompt leaves free.
    """

    def __init__(self, task: Task, llm: LanguageModel, *, history_tokens: int = 0) -> None:
        self.task, self.llm, self.history_tokens = task, llm, history_tokens

    @abstractmethod
    def format(self, prompt: Prompt, items: Sequence[HistoryItem], *, soft_at: int = 0) -> HistoryPrompt:
        """Insert a user's answers into a prompt.

        Args:
            items: best first.
            soft_at: number of characters of the last message before its soft tokens.
        """

    @abstractmethod
    def with_note(self, prompt: Prompt, note: str, *, soft_at: int) -> Draft:
        """Return a prompt with a note about the user."""

    def add_note(self, prompt: Prompt, note: str, *, soft_at: int = 0) -> HistoryPrompt:
        """Insert a note about the user into a prompt; a long note is cut, and a blank note changes nothing.

        Args:
            soft_at: number of characters of the last message before its soft tokens.
        """
        note = _without_period(note)
        note_tokens = self.llm.count_tokens([note])[0]
        budget = min(note_tokens, self._budget(self.with_note(prompt, "", soft_at=soft_at)))
        while note and budget >= min(note_tokens, _MIN_CONTENT_TOKENS):
            text = note if budget >= note_tokens else _without_period(self.llm.cut_text(note, budget))
            draft = self.with_note(prompt, text, soft_at=soft_at)
            excess = self._excess(draft, text)
            if excess <= 0:
                return HistoryPrompt(*draft, offered=1, included=1, shortened=int(text != note))
            budget -= excess
        return HistoryPrompt(prompt, soft_at, offered=int(note != ""), included=0, shortened=0)

    def add_preferences(self, prompt: Prompt, preferences: Sequence[HistoryItem]) -> HistoryPrompt:
        """Insert stated preferences into the system message; if room is short, the earliest ones are dropped.

        Args:
            preferences: in the order in which they were stated.
        """
        draft, included = (prompt, 0), list[HistoryItem]()
        for item in reversed(preferences):
            text = _STATED + " ".join(map(_sentence, (item, *included)))
            longer = self.with_system_text(prompt, text, soft_at=0)
            if self._excess(longer, text) <= 0:
                draft, included = longer, [item, *included]
        return HistoryPrompt(*draft, offered=len(preferences), included=len(included), shortened=0)

    def with_system_text(self, prompt: Prompt, text: str, *, soft_at: int) -> Draft:
        """Return a prompt with a text at the end of its system message.

        If there is no system message, the text becomes one. If the chat template refuses system messages, the text
        stands before the first user message.
        """
        turns = turns_of(prompt)
        if systems := count_system_turns(turns):
            content = turns[systems - 1][1] + _BREAK + text
            return Chat((*turns[: systems - 1], (turns[systems - 1][0], content), *turns[systems:])), soft_at
        if self.llm.takes_system_messages:
            return Chat((("system", text), *turns)), soft_at
        return _before_first_user(prompt, text + _BREAK, soft_at=soft_at)

    def _budget(self, bare: Draft) -> int:
        room = self.llm.max_text_tokens - self._count_tokens(bare)
        return min(room, self.history_tokens) if self.history_tokens else room

    def _excess(self, draft: Draft, history: str) -> int:
        """Return the number of tokens by which the prompt or its history is too long."""
        excess = self._count_tokens(draft) - self.llm.max_text_tokens
        if not self.history_tokens:
            return excess
        return max(excess, self.llm.count_tokens([history])[0] - self.history_tokens)

    def _count_tokens(self, draft: Draft) -> int:
        """Return the number of tokens of a prompt, in one piece or split at the soft tokens, whichever is larger."""
        return max(self.llm.count_prompt_tokens(draft[0], soft_at) for soft_at in {0, draft[1]})


class HistoryPromptFormatter(HistoryFormatter):
    """Writes items in the wording of a task around or into the last message, and notes before it."""

    def __init__(self, task: Task, llm: LanguageModel, *, history_tokens: int = 0) -> None:
        super().__init__(task, llm, history_tokens=history_tokens)
        self._template = template_parts(task.history_template)
        self._measured = lru_cache(maxsize=_CACHED_ITEMS)(self._measure)
        self._joint_tokens = llm.count_tokens([task.item_joint])[0]

    def format(self, prompt: Prompt, items: Sequence[HistoryItem], *, soft_at: int = 0) -> HistoryPrompt:
        """Insert items into the last message.

        Items share the room equally; long items also use the room that short items leave. Contents are cut at their
        end; answers and the words around them stay whole. If shares become too small, the last items are dropped. An
        item that never fits is skipped.
        """
        budget = self._budget(self._insert(prompt, "", soft_at=soft_at)) if items else 0
        while budget > 0:
            texts, shortened = self._fit(items, budget)
            if not texts:
                break
            history = self.task.item_joint.join(texts)
            draft = self._insert(prompt, history, soft_at=soft_at)
            excess = self._excess(draft, history)
            if excess <= 0:
                return HistoryPrompt(*draft, offered=len(items), included=len(texts), shortened=shortened)
            budget -= excess  # separate texts may have fewer tokens than the joined prompt
        return HistoryPrompt(prompt, soft_at, offered=len(items), included=0, shortened=0)

    def with_note(self, prompt: Prompt, note: str, *, soft_at: int) -> Draft:
        return _fill(_NOTE_TEMPLATE, history=note, prompt=prompt, soft_at=soft_at)

    def _insert(self, prompt: Prompt, history: str, *, soft_at: int) -> Draft:
        """Return a prompt with items: after the word `history_after` if it is in the input, else around the input."""
        text, word = last_message(prompt), self.task.history_after
        start = text.find(word, soft_at) if word else -1
        if start < 0:
            return _fill(self._template, history=history, prompt=prompt, soft_at=soft_at)
        position = start + len(word)
        return with_last_message(prompt, text[:position] + self.task.item_joint + history + text[position:]), soft_at

    def _fit(self, items: Sequence[HistoryItem], budget: int) -> tuple[list[str], int]:
        """Return the texts of the items that fit with their joints, and the number of shortened texts."""
        chosen: list[_MeasuredItem] = []
        needed = 0
        for item in map(self._measured, items):
            if item.min_tokens > budget:
                continue
            needed += item.min_tokens + (self._joint_tokens if chosen else 0)
            if needed > budget:
                break
            chosen.append(item)
        shares = _allocate(
            [item.tokens for item in chosen],
            minimum=[item.min_tokens for item in chosen],
            total=budget - self._joint_tokens * (len(chosen) - 1),
        )
        texts = [self._shorten(item, share) for item, share in zip(chosen, shares, strict=True)]
        return [text for text, _ in texts], sum(is_shortened for _, is_shortened in texts)

    def _shorten(self, item: _MeasuredItem, share: int) -> tuple[str, bool]:
        """Return an item's text in at most `share` tokens, and whether it was shortened."""
        if share >= item.tokens:
            return _join(item.parts, item.values), False
        sizes = list(item.contents.values())
        limits = _allocate(sizes, minimum=[0] * len(sizes), total=share - item.frame_tokens)
        contents = {
            name: item.values[name] if size <= limit else self.llm.cut_text(item.values[name], limit)
            for (name, size), limit in zip(item.contents.items(), limits, strict=True)
        }
        is_shortened = any(content != item.values[name] for name, content in contents.items())
        return _join(item.parts, item.values | contents), is_shortened

    def _measure(self, item: HistoryItem) -> _MeasuredItem:
        fields = dict(item.fields)
        is_worded = self.task.item_template and item.kind == "answer"
        parts = _parse(self.task.item_template) if is_worded else _parts_of_text(item)
        names = list(dict.fromkeys(name for _, name in parts if name is not None))
        values = {name: fields.get(name, "") for name in names}
        contents = [name for name in names if name != self.task.answer_field] or names
        frame = _join(parts, values | dict.fromkeys(contents, ""))
        tokens, frame_tokens, *sizes = self.llm.count_tokens(
            [_join(parts, values), frame, *(values[name] for name in contents)]
        )
        return _MeasuredItem(parts, values, dict(zip(contents, sizes, strict=True)), tokens, frame_tokens)


def _allocate(wanted: Sequence[int], *, minimum: Sequence[int], total: int) -> list[int]:
    """Divide a total into equal shares, each between its minimum and its wanted size."""

    def capped(level: int) -> list[int]:
        return [min(upper, max(level, lower)) for upper, lower in zip(wanted, minimum, strict=True)]

    low, high = 0, max(total, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(capped(middle)) <= total else (low, middle - 1)
    shares = capped(low)
    rest = max(total - sum(shares), 0)  # fewer than the shares below their wanted size; the first of these get one each
    for index, upper in enumerate(wanted):
        extra = min(rest, 1, upper - shares[index])
        shares[index], rest = shares[index] + extra, rest - extra
    return shares


def _parse(template: str) -> tuple[_Part, ...]:
    *pieces, end = template_parts(template)
    return (*zip(pieces[::2], pieces[1::2], strict=True), (end, None))


def _parts_of_text(item: HistoryItem) -> tuple[_Part, ...]:
    """Return the parts of `HistoryItem.text`."""
    return tuple((f"{' ' if index else ''}{name}: ", name) for index, (name, _) in enumerate(item.fields))


def _join(parts: Sequence[_Part], values: dict[str, str]) -> str:
    return "".join(before + (values[name] if name is not None else "") for before, name in parts)


def _fill(template: Sequence[str], *, history: str, prompt: Prompt, soft_at: int) -> Draft:
    """Fill a template of `{history}` and `{input}` with a history and the last message."""
    values = {"history": history, "input": last_message(prompt)}
    pieces = [values[piece] if index % 2 else piece for index, piece in enumerate(template)]
    input_index = 1 + 2 * template[1::2].index("input")
    return with_last_message(prompt, "".join(pieces)), len("".join(pieces[:input_index])) + soft_at


def count_system_turns(turns: Sequence[Turn]) -> int:
    """Return the number of system messages that a conversation begins with."""
    return next((index for index, (role, _) in enumerate(turns) if role not in SYSTEM_ROLES), len(turns))


def _before_first_user(prompt: Prompt, text: str, *, soft_at: int) -> Draft:
    turns = turns_of(prompt)
    index = next(index for index, (role, _) in enumerate(turns) if role == "user")
    extended = ("user", text + turns[index][1])
    if index == len(turns) - 1:
        return with_last_message(prompt, extended[1]), soft_at + len(text)
    return Chat((*turns[:index], extended, *turns[index + 1 :])), soft_at


def _sentence(preference: HistoryItem) -> str:
    """Return a stated preference with a mark at its end, so that it does not run into the next one."""
    text = preference.fields[0][1].strip()
    return text if unicodedata.category(text[-1]).startswith("P") else f"{text}."


def _without_period(note: str) -> str:
    """Return a note without its final period, which the template adds."""
    return note.strip().rstrip(".").rstrip()
