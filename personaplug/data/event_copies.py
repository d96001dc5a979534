"""Find copies of events, so that no history contains its question with the answer.

An event may be sent again after a time-out, and a log may be imported twice. A row is a copy of an earlier row of its
user if fields, picture, vector and answer are equal and one of these conditions is true:

- One of the rows has no date.
- The rows are at most an hour apart, or a chain of such rows connects them.
- Fields and answer together have 40 characters or more, because nobody writes that much twice.

The comparison ignores blanks, invisible characters, case and Unicode forms of a letter. A short event at another time
("check-in", "good") is a new event.

Rows are unclear if copies of them were found without their times and the user also gave other answers to the same
fields. The history of such a row would contain every answer except its own. Unclear rows never become samples, but they
stay in histories.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

MAX_DISTANCE = timedelta(hours=1)
MIN_LENGTH = 40

Texts = tuple[str, ...]
_Subject = tuple[Texts, tuple[bytes, ...]]

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]")


@dataclass(frozen=True, slots=True)
class Event:
    """The normalized parts of a row that are compared to find copies."""

    content: Texts
    answer: str
    moment: datetime | None
    parts: tuple[bytes, ...] = ()

    @property
    def subject(self) -> _Subject:
        """All parts without the answer and the time."""
        return self.content, self.parts

    @property
    def length(self) -> int:
        return sum(map(len, self.content)) + len(self.answer)


def event_of(content: Sequence[str], answer: str, moment: datetime | None, *, parts: tuple[bytes, ...] = ()) -> Event:
    """Return the event of a row's fields without the answer, the answer and the time.

    Args:
        parts: the digest of the row's picture, and its vector.
    """
    return Event(tuple(map(comparable, content)), comparable(answer), moment, parts)


@dataclass(frozen=True)
class Copies:
    """Indices of one user's rows: copies of earlier rows, and rows whose history would reveal their answer."""

    copies: frozenset[int]
    unclear: frozenset[int]


def find_copies(events: Sequence[Event]) -> Copies:
    """Find the copies among one user's events in time order."""
    latest: dict[tuple[_Subject, str], datetime | None] = {}
    answers: defaultdict[_Subject, set[str]] = defaultdict(set)
    copies, timeless = set[int](), set[_Subject]()
    for index, event in enumerate(events):
        key = (event.subject, event.answer)
        answers[event.subject].add(event.answer)
        if key in latest:
            earlier = latest[key]
            is_near = event.moment and earlier and event.moment - earlier <= MAX_DISTANCE
            if is_near or not (event.moment and earlier) or event.length >= MIN_LENGTH:
                copies.add(index)
                if not is_near:
                    timeless.add(event.subject)
        latest[key] = event.moment
    is_unclear = {subject for subject in timeless if len(answers[subject]) > 1}
    unclear = {index for index, event in enumerate(events) if event.subject in is_unclear and index not in copies}
    return Copies(frozenset(copies), frozenset(unclear))


def comparable(text: str) -> str:
    """Normalize case, blanks, Unicode forms and invisible characters, which differ between exports of an event."""
    if not text.isascii():
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(text.casefold().split())
