"""Convert raw values of data files: records, texts, ids, dates, queries and targets.

These functions raise `Flaw`, which says what is wrong. Readers add the position and raise `RecordError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from typing import Any

from personaplug.data.records import HistoryItem, Options
from personaplug.data.task import Task


class Flaw(ValueError):
    """A defect of a record, without its position and without the user's text."""


_TYPE_NAMES: dict[type, str] = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
_DATE = re.compile(r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ](.+))?)?)?", re.ASCII)


def as_record(value: object) -> Mapping[str, Any]:
    """Return a value that should be a JSON object; raise a Flaw that stands for a broken record."""
    if isinstance(value, Flaw):
        raise value
    if not isinstance(value, dict):
        raise Flaw("it is not a JSON object")
    return value


def value_of(record: Mapping[str, object], key: str) -> object:
    """Return the value of a required key."""
    if key not in record:
        raise Flaw(f"its {key!r} is missing")
    return record[key]


def as_text(value: object, what: str) -> str:
    """Convert a string or a finite number to text. Whole numbers lose their decimals: 4.0 becomes "4"."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate would stop the tokenizer in the middle of a run
            raise Flaw(f"{what} is not valid Unicode") from None
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Flaw(f"{what} is {_TYPE_NAMES.get(type(value), 'something else')}, expected a text or a number")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        is_finite = False
    if not is_finite:
        raise Flaw(f"{what} is not a finite number")
    return str(int(value)) if value == int(value) else str(value)


def as_name(value: object, what: str) -> str:
    """Convert an id or another value that must not be blank to text."""
    text = as_text(value, what)
    if not text.strip():
        raise Flaw(f"{what} is empty")
    return text


def text_of(record: Mapping[str, object], key: str) -> str:
    """Return the value of a required key as text."""
    return as_text(value_of(record, key), f"its {key!r}")


def name_of(record: Mapping[str, object], key: str) -> str:
    """Return the value of a required key as text that is not blank."""
    return as_name(value_of(record, key), f"its {key!r}")


def short_id(name: str) -> str:
    """Shorten an id for a message, so that a text in the place of an id does not reach logs."""
    line = " ".join(name.split())
    return line if len(line) <= 40 else f"{line[:12]}… of {len(name)} characters"


def as_datetime(value: object) -> datetime:
    """Convert `YYYY[-MM[-DD[ time]]]` or a date object to UTC without a time zone; missing parts mean the first."""
    try:
        parsed = _parse_date(value)
        return parsed.astimezone(UTC).replace(tzinfo=None) if parsed.tzinfo else parsed
    except (ValueError, OverflowError):
        raise Flaw("its 'date' is not one of YYYY, YYYY-MM, YYYY-MM-DD, YYYY-MM-DD hh:mm:ss") from None


def query_of(task: Task, prompt: str) -> str:
    """Return the part of a prompt that the encoder and the retrievers read."""
    if task.query_pattern:
        match = re.search(task.query_pattern, prompt, re.DOTALL)
        if not match:
            raise Flaw("its input does not match the task's 'query_pattern', so the query cannot be found")
        query = " ".join(group or "" for group in match.groups())
    elif task.query_after not in prompt:
        raise Flaw(f"its input does not hold the marker {task.query_after!r} of task {task.name}")
    else:
        query = prompt.split(task.query_after, 1)[1] if task.query_after else prompt
    if not query.strip():
        raise Flaw("its input holds no query: there are only blanks after the marker or in the groups of the pattern")
    return query


def options_of(task: Task, prompt: str) -> Options | None:
    """Return the options in a prompt, if the task's pattern has a group for the option of each label."""
    match = re.search(task.query_pattern, prompt, re.DOTALL) if task.has_options else None
    if match is None or not all(match.groups()):
        return None
    return Options(prompt[: match.start(1)], match.groups())


def target_of(task: Task, answer: str) -> str:
    """Return an answer as it is scored: a label without outer blanks, or an unchanged text."""
    if task.kind == "text":
        return answer
    label = answer.strip()
    if label not in task.labels:
        raise Flaw(f"its answer is none of the {len(task.labels)} labels of task {task.name}")
    return label


def item_of(
    task: Task, record: object, *, default_id: str | None = None, id_key: str = "id", date_key: str = "date"
) -> tuple[datetime | None, HistoryItem]:
    """Convert a JSON object to a history item and its date, if any. Without `default_id`, it needs an id."""
    values = as_record(record)
    stamp = values.get(date_key)
    moment = None if stamp is None else as_datetime(stamp)
    fields = tuple((name, text_of(values, name)) for name in task.field_names)
    item_id = default_id if default_id and values.get(id_key) is None else name_of(values, id_key)
    return moment, HistoryItem(item_id, fields, task.answer_field, moment.date() if moment else None)


def _parse_date(value: object) -> datetime:
    if isinstance(value, date):
        return value if isinstance(value, datetime) else datetime.combine(value, time.min)
    match = _DATE.fullmatch(as_text(value, "its 'date'").strip())
    if not match:
        raise ValueError("not a date")
    year, month, day, clock = match.groups()
    return datetime.fromisoformat(f"{date(int(year), int(month or 1), int(day or 1))}T{(clock or '00:00').strip()}")
