"""What a value of a file means: a record, a text, an id, a moment, a query or a right answer.

These functions raise `Flaw`, which says what is wrong; a reader adds where and raises `RecordError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

from personaplug.data.records import HistoryItem, Options
from personaplug.data.task import Task


class Flaw(ValueError):
    """What is wrong with a record, before it is said where it stands; never carries a user's text."""


def as_record(value: object) -> Mapping[str, Any]:
    """Return a value of a file as a record, that is a JSON object.

    Raises:
        Flaw: if it is anything else.
    """
    if not isinstance(value, dict):
        raise Flaw("it is not a JSON object")
    return value


def value_of(record: Mapping[str, object], key: str) -> object:
    """Return what a record holds under a key.

    Raises:
        Flaw: if it has no such key.
    """
    if key not in record:
        raise Flaw(f"its {key!r} is missing")
    return record[key]


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


def short_id(name: str) -> str:
    """Return an id for a message, on one line and not long: a text that landed in the id's place stays out of it."""
    line = " ".join(name.split())
    return line if len(line) <= 40 else f"{line[:12]}… of {len(name)} characters"


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


def options_of(task: Task, prompt: str) -> Options | None:
    """Return what an input lets choose from, if the groups of the task's pattern are the options of its labels."""
    if not task.has_options:
        return None
    found = re.search(task.query_pattern, prompt, re.DOTALL)
    texts = found.groups() if found else ()
    return Options(prompt[: found.start(1)], texts) if found and all(texts) else None


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


def item_of(task: Task, record: object, *, default_id: str | None = None) -> tuple[datetime | None, HistoryItem]:
    """Return an item of a history out of a record with the task's fields, and when it happened, if that is said.

    Args:
        default_id: for a record that has none.
    Raises:
        Flaw: if a field is missing or no text, or there is no id.
    """
    values = as_record(record)
    stamp = values.get("date")
    moment = None if stamp is None else as_moment(stamp)
    fields = tuple((name, as_text(value_of(values, name), f"its {name!r}")) for name in task.field_names)
    if default_id is not None and values.get("id") is None:
        item_id = default_id
    else:
        item_id = as_name(value_of(values, "id"), "its 'id'")
    return moment, HistoryItem(item_id, fields, task.answer_field, moment.date() if moment else None)


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
