"""What a data set is: a declared Task, and a Reader that yields Samples one at a time.

A task is declared, never guessed from a path. Readers stream, so that memory does not grow with the file.
Below them stands what all readers share: how a value of a file becomes text, a moment, a query or a target.
These functions raise `Flaw`, which says what is wrong; the reader adds where and raises `BadRecord`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Literal, Protocol

from personaplug.errors import BadConfig, BadRecord
from personaplug.records import HistoryItem, Sample, in_time_order

TaskKind = Literal["label", "rating", "text"]


@dataclass(frozen=True)
class Task:
    """What is asked, what an item of history looks like, and how an answer is scored.

    Attributes:
        name: what results files call it.
        kind: "label" (one of `labels`), "rating" (labels that are numbers, in order) or "text".
        item_fields: the fields of an item that make its text, in order (PPlug's Table 7).
        answer_field: the field that is the user's answer; added to the item's text if not among
            `item_fields`.
        metrics: names of `personaplug.metrics`, the first one leads.
        labels: the closed set of answers; empty for "text".
        query_after: the query is what follows the first occurrence of this marker in the input.
        max_new_tokens: how long an answer may be.
        query_pattern: for inputs that no single marker cuts: a regular expression, searched in the input with
            DOTALL, whose groups joined by a space are the query. Without marker and pattern the query is the
            input.
    """

    name: str
    kind: TaskKind
    item_fields: tuple[str, ...]
    answer_field: str | None
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    query_after: str = ""
    max_new_tokens: int = 128
    query_pattern: str = ""

    @property
    def field_names(self) -> tuple[str, ...]:
        """The fields that an item of this task holds: its text's, then the answer's if it is not among
        them."""
        extra = (
            (self.answer_field,) if self.answer_field and self.answer_field not in self.item_fields else ()
        )
        return self.item_fields + extra


@dataclass
class ReadReport:
    """What a reader met on the way; filled as it is read.

    Attributes:
        samples: how many samples were yielded.
        items: how many items of history they held.
        skipped: records passed over (never more than the `skip_bad` asked for).
        cut_items: items left out because a history was longer than the cap.
        problems: what was wrong with each skipped record, and where.
    """

    samples: int = 0
    items: int = 0
    skipped: int = 0
    cut_items: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, sample: Sample) -> Sample:
        """Count a sample that is about to be yielded, and return it."""
        self.samples += 1
        self.items += len(sample.history)
        return sample

    def skip(self, error: BadRecord, *, allowed: int) -> None:
        """Count a broken record, or raise it when no more may be passed over.

        Raises:
            BadRecord: the error itself, once `allowed` records have been skipped.
        """
        if self.skipped >= allowed:
            raise error
        self.skipped += 1
        self.problems.append(str(error))


class Reader(Protocol):
    """A data set split that can be read as often as needed."""

    task: Task
    report: ReadReport

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in file order; `report` is fresh at the start and complete at the end.

        Raises:
            BadRecord: for the first broken record beyond the allowed number.
        """
        ...


def check_skip_bad(skip_bad: int) -> int:
    """Return `skip_bad` if it can bound something.

    Raises:
        BadConfig: if it is negative.
    """
    if skip_bad < 0:
        raise BadConfig(
            f"skip_bad bounds how many broken records may be passed over: 0 or more, found {skip_bad}."
        )
    return skip_bad


def check_max_history(max_history: int) -> int:
    """Return `max_history` if it can bound a history.

    Raises:
        BadConfig: if it is negative.
    """
    if max_history < 0:
        raise BadConfig(f"max_history bounds the items of a history: 0 or more, found {max_history}.")
    return max_history


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant, or list them all: the end of a sentence about an unknown
    one."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}."


class Flaw(ValueError):
    """What is wrong with a record, before it is said where it stands; never carries a user's text."""


def as_text(value: object, what: str) -> str:
    """Return a value of a file as text: strings as they are, numbers as a person writes them (4.0 is "4").

    Raises:
        Flaw: if it is neither, not finite, or no Unicode text (half of a surrogate pair).
    """
    if isinstance(value, str):
        return _encodable(value, what)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Flaw(f"{what} is {_TYPE_NAMES.get(type(value), 'something else')}, expected a text or a number")
    if not math.isfinite(value):
        raise Flaw(f"{what} is not a finite number")
    return str(int(value)) if value == int(value) else str(value)


def as_name(value: object, what: str) -> str:
    """Return an id of a file as text.

    Raises:
        Flaw: if it is no text or number, or blank.
    """
    text = as_text(value, what)
    if not text.strip():
        raise Flaw(f"{what} is empty")
    return text


def as_moment(value: object) -> datetime:
    """Return a date of a file as a moment without time zone (UTC where the file names a zone).

    A year stands for its 1 January, a month for its first day, a day for its midnight.

    Raises:
        Flaw: if it is not an ISO date, "YYYY", "YYYY-MM" or an ISO date with a time.
    """
    try:
        return _without_zone(_moment(value))
    except (ValueError, OverflowError):
        raise Flaw("its 'date' is not one of YYYY, YYYY-MM, YYYY-MM-DD, YYYY-MM-DD hh:mm:ss") from None


def query_of(task: Task, prompt: str) -> str:
    """Return the part of an input that the encoder and a retriever read.

    Raises:
        Flaw: if the task's marker or wording is not in the input, or leaves nothing.
    """
    if task.query_pattern:
        query = _matched(task.query_pattern, prompt)
    else:
        _, marker, query = prompt.partition(task.query_after) if task.query_after else ("", "whole", prompt)
        if not marker:
            raise Flaw(f"its input does not hold the marker {task.query_after!r} of task {task.name}")
    if not query.strip():
        raise Flaw("its input holds no query: nothing stands where the task looks for it")
    return query


def target_of(task: Task, answer: str) -> str:
    """Return a right answer as it is scored: without outer blanks where the answers are a closed set.

    Raises:
        Flaw: if the task has labels and this is none of them.
    """
    if task.kind == "text":
        return answer
    label = answer.strip()
    if label not in task.labels:
        raise Flaw(f"its answer is none of the {len(task.labels)} labels of task {task.name}")
    return label


def latest_items(
    items: Sequence[tuple[datetime | None, HistoryItem]], *, max_history: int, report: ReadReport
) -> tuple[HistoryItem, ...]:
    """Put items in time order, keep the latest `max_history`, and count the others in the report.

    The moments order items of one day, which the date of a HistoryItem cannot.
    """
    timed = [(moment, item) for moment, item in items if moment is not None]
    if len(timed) == len(items):
        ordered = [item for _, item in sorted(timed, key=lambda pair: pair[0])]
    else:
        ordered = [item for _, item in items]
    cut = max(len(ordered) - max_history, 0)
    report.cut_items += cut
    return in_time_order(ordered)[cut:]


_TYPE_NAMES: dict[type, str] = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
_DATE = re.compile(r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ]+(.+))?)?)?", re.ASCII)


def _encodable(text: str, what: str) -> str:
    # A tokenizer dies of a lone surrogate in the middle of a run, so it is found here.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Flaw(f"{what} is not valid Unicode") from None
    return text


def _moment(value: object) -> datetime:
    if isinstance(value, datetime):
        return value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    found = _DATE.fullmatch(as_text(value, "its 'date'").strip())
    if not found:
        raise Flaw("not a date")
    year, month, day, clock = found.groups()
    midnight = datetime(int(year), int(month or 1), int(day or 1))
    return datetime.fromisoformat(f"{midnight.date()}T{clock.strip()}") if clock else midnight


def _without_zone(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def _matched(pattern: str, prompt: str) -> str:
    found = re.search(pattern, prompt, re.DOTALL)
    if not found:
        raise Flaw("its input does not have the task's fixed wording, so the query cannot be found")
    return " ".join(part or "" for part in found.groups())
