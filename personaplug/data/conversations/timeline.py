"""The entries of one user in time order, and the rules for the history of a reply.

The history has no entry from the conversation of the reply. Lines belong to one conversation if they have the same
conversation id or the same id. A log of requests repeats the conversation in every line. So lines without a
conversation id also belong together if they have the same first question and reply. The history also leaves out the
same question, asked at most an hour apart or without times, because the user then asked for another answer.

An entry of the history is strictly earlier than the question. Without times, it is in an earlier line.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import islice

from personaplug.data.conversations.turns import Exchange
from personaplug.data.event_copies import MAX_DISTANCE, Event, event_of, find_copies
from personaplug.data.record_reader import TimedItem
from personaplug.data.records import PREFERENCE, HistoryItem, ItemKind


@dataclass(frozen=True, repr=False)
class Entry:
    """An exchange, or a stated preference.

    Attributes:
        moment: the time of the reply or of the stated preference.
        conversation: a key that all entries of a conversation share.
    """

    id: str
    moment: datetime | None
    exchange: Exchange | None = None
    preference: str = ""
    conversation: Hashable = None

    @cached_property
    def event(self) -> Event:
        return self.exchange.event if self.exchange else event_of([], self.preference, self.moment)

    @cached_property
    def items(self) -> list[TimedItem]:
        """The history items: a preference, or the answers that the user saw, with the kept answer last."""
        day = self.moment.date() if self.moment else None
        if self.exchange is None:
            item = HistoryItem(self.id, ((PREFERENCE, self.preference),), None, day, "preference")
            return [(self.moment, item)]
        return [
            (self.moment, HistoryItem(
                self.id if kind == "answer" else f"{self.id}/rejected-{number}",
                (("question", self.exchange.question), ("answer", text)), "answer", day, kind, (),
            ))
            for number, (kind, text) in enumerate(_answers(self.exchange), 1)
        ]  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Line:
    """A record of a user.

    Attributes:
        keys: lines of the same conversation share at least one key.
        is_alone: True for a conversation without a user.
    """

    file: str
    position: str
    user: str
    keys: tuple[Hashable, ...]
    entries: tuple[Entry, ...]
    is_alone: bool = False


@dataclass(frozen=True)
class Timeline:
    """The entries of a user without copies.

    Attributes:
        copies: the number of copies that were left out.
        unclear: indices of entries that must not become samples; see `personaplug.data.event_copies`.
        is_alone: True for a conversation without a user; earlier turns are then the history.
    """

    entries: tuple[Entry, ...]
    copies: int
    unclear: frozenset[int]
    is_alone: bool

    def history(self, index: int) -> Iterator[Entry]:
        """Yield the entries for the history of an exchange, oldest first."""
        if self.is_alone:
            yield from self.entries[:index]
            return
        entry = self.entries[index]
        if not self._may_have_history(index):
            return
        for other in self.entries[:index]:
            if _is_earlier(other, entry) and other.conversation != entry.conversation and not _is_retry(other, entry):
                yield other

    def _may_have_history(self, index: int) -> bool:
        """Check only the first entry of another conversation, because a conversation may have thousands of turns."""
        entry = self.entries[index]
        others = (self.entries[first] for first in self._firsts if first < index)
        return any(other.conversation != entry.conversation and _is_earlier(other, entry) for other in others)

    @cached_property
    def _firsts(self) -> tuple[int, ...]:
        """The indices of the first entry, and of the first entry of another conversation."""
        first = self.entries[0].conversation
        others = (index for index, other in enumerate(self.entries) if other.conversation != first)
        return (0, *islice(others, 1))


def timeline_of(lines: Sequence[Line]) -> Timeline:
    """Sort a user's entries by time and leave out copies. Without times, keep the order of the lines."""
    entries = _once_each(_joined(lines))
    copies = find_copies([entry.event for entry in entries])
    originals = [index for index in range(len(entries)) if index not in copies.copies]
    total = sum(len(line.entries) for line in lines)
    return Timeline(
        tuple(entries[index] for index in originals),
        copies=total - len(originals),
        unclear=frozenset(place for place, index in enumerate(originals) if index in copies.unclear),
        is_alone=lines[0].is_alone,
    )


def _answers(exchange: Exchange) -> Iterator[tuple[ItemKind, str]]:
    """Yield the answers that the user saw: rejected answers, then the kept answer."""
    for text in exchange.rejected:
        if exchange.is_all_shown or text == exchange.shown:
            yield "rejection", text
    if exchange.is_all_shown or exchange.kept == exchange.shown:
        yield "answer", exchange.kept


def _joined(lines: Sequence[Line]) -> list[Entry]:
    """Set the conversation of each entry, and sort the entries by time."""
    parents: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = parents[parent]  # path halving: thousands of lines may have the same start
            key = parent
        return key

    for line in lines:
        for key in line.keys[1:]:
            parents[root(key)] = root(line.keys[0])
    entries = [replace(entry, conversation=root(line.keys[0])) for line in lines for entry in line.entries]
    return sorted(entries, key=lambda entry: entry.moment or datetime.min)


def _once_each(entries: Sequence[Entry]) -> list[Entry]:
    """Leave out turns that later lines of the conversation repeat, except first turns, which may be new ones."""
    firsts: dict[Hashable, Entry] = {}
    for entry in entries:
        has_context = entry.exchange is not None and entry.exchange.place > 0
        key = (entry.conversation, entry.exchange.path) if entry.exchange and has_context else (entry.id,)
        firsts.setdefault(key, entry)
    return list(firsts.values())


def _is_earlier(other: Entry, entry: Entry) -> bool:
    asked_at = entry.exchange.asked_at if entry.exchange else entry.moment
    return other.moment is None or asked_at is None or other.moment < asked_at


def _is_retry(other: Entry, entry: Entry) -> bool:
    one, two = other.event, entry.event
    is_near = not (one.moment and two.moment) or two.moment - one.moment <= MAX_DISTANCE
    return bool(one.content) and one.content == two.content and is_near
