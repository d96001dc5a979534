"""Convert raw values of records: texts, numbers, ids, dates, queries and targets.

These functions raise `Flaw`, which names the defect. Readers add the position and raise `RecordError`. Files, HTTP and
the store use the same functions, so a value has the same meaning everywhere.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from personaplug.data import patterns
from personaplug.data.dates import as_datetime
from personaplug.data.ids import as_id, short_id
from personaplug.data.numbers import as_number, number_or_none
from personaplug.data.pictures import Picture, picture_of
from personaplug.data.records import (
    ITEM_KINDS,
    PREFERENCE,
    REJECTED,
    SYSTEM_ROLES,
    HistoryItem,
    ItemKind,
    Options,
    Turn,
)
from personaplug.data.task import Task
from personaplug.data.values import Flaw, as_text, plain_value

__all__ = [
    "Flaw", "as_datetime", "as_id", "as_name", "as_number", "as_record", "as_text", "context_of", "field_of", "id_of",
    "item_of", "name_of", "numbers_of", "options_of", "picture_in", "query_of", "record_of", "short_id",
    "target_of", "text_of", "value_of", "vector_in", "vector_of",
]  # fmt: skip

_ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")


def as_record(value: object) -> Mapping[str, Any]:
    """Check that a value is an object; if it is a Flaw, raise it."""
    if isinstance(value, Flaw):
        raise value
    if not isinstance(value, Mapping):
        raise Flaw("it is not a JSON object")
    return value


def value_of(record: Mapping[str, object], key: str) -> object:
    """Return the value of a required key; raise a Flaw if the key is missing or its value is a Flaw."""
    if key not in record:
        raise Flaw(f"its {key!r} is missing")
    value = record[key]
    if isinstance(value, Flaw):
        raise Flaw(f"its {key!r} {value}")
    return value


def as_name(value: object, what: str) -> str:
    """Convert a value that must not be blank to text."""
    text = as_text(value, what)
    if not text.strip():
        raise Flaw(f"{what} is empty")
    return text


def text_of(record: Mapping[str, object], key: str) -> str:
    """Return the value of a required key as text."""
    return as_text(value_of(record, key), f"its {key!r}")


def field_of(task: Task, record: Mapping[str, object], name: str, *, key: str = "") -> str:
    """Convert an item's field to text. As in CSV, null becomes an empty text, except for labels.

    An answer that equals a label as a number ("4.0") becomes this label.

    Args:
        key: the record's key, if it is not the field's name.
    """
    key = key or name
    if name == task.answer_field and task.labels:
        answer = text_of(record, key)
        return _label(task, answer) or answer
    return "" if value_of(record, key) is None else text_of(record, key)


def name_of(record: Mapping[str, object], key: str) -> str:
    """Return the value of a required key as text that is not blank."""
    return as_name(value_of(record, key), f"its {key!r}")


def id_of(record: Mapping[str, object], key: str) -> str:
    """Return the value of a required key as an id."""
    return as_id(value_of(record, key), f"its {key!r}")


def query_of(task: Task, prompt: str) -> str:
    """Return the part of a prompt that the encoder and the retrievers read."""
    if task.query_pattern:
        match = patterns.search(task.query_pattern, prompt)
        if not match:
            raise Flaw("its input does not match the task's 'query_pattern', so the query cannot be found")
        query = " ".join(group or "" for group in match.groups())
    elif task.query_after not in prompt:
        raise Flaw(f"its input does not contain the marker {task.query_after!r} of task {task.name}")
    else:
        query = prompt.split(task.query_after, 1)[1] if task.query_after else prompt
    if not query.strip():
        raise Flaw("its input holds no query: only blanks follow the marker or match the groups of the pattern")
    return query


def options_of(task: Task, prompt: str) -> Options | None:
    """Return the options in a prompt; None unless the task's pattern finds an option for each label."""
    match = patterns.search(task.query_pattern, prompt) if task.has_options else None
    if match is None or not all(match.groups()):
        return None
    return Options(prompt[: match.start(1)], match.groups())


def target_of(task: Task, answer: str) -> str:
    """Return the answer to score: the label that equals it as text or as a number, or a free text unchanged."""
    if not task.labels:
        return answer
    label = _label(task, answer)
    if label is None:
        defect = (
            "is empty" if not answer.strip() else f"is not one of the {len(task.labels)} labels of task {task.name}"
        )
        raise Flaw(f"its answer {defect}")
    return label


def item_of(
    task: Task,
    record: object,
    *,
    default_id: str | None = None,
    id_key: str = "id",
    date_key: str = "date",
    folder: Path | None = None,
) -> tuple[datetime | None, HistoryItem]:
    """Convert a JSON object to a history item and its date, if any. Without `default_id`, the object needs an id.

    An object with the key `preference` is a stated preference, and one with `rejected` a rejection. Other objects have
    the task's fields. If an item has a picture or a vector, fields without its answer may be missing.

    Args:
        folder: see `pictures.picture_of`.
    """
    values = as_record(record)
    stamp = value_of(values, date_key) if date_key in values else None
    moment = None if stamp is None else as_datetime(stamp, f"its {date_key!r}")
    picture, vector = picture_in(values, task.image_field, folder=folder), vector_in(values, task.vector_field)
    kind, fields = _fields_of(task, values, has_more=picture is not None or vector is not None)
    declared_kind = None if "kind" in task.field_names else values.get("kind")
    if declared_kind in ITEM_KINDS and declared_kind != kind:
        raise Flaw(f"its 'kind' is {declared_kind!r}, but its fields belong to the kind {kind!r}")
    item_id = default_id if default_id and values.get(id_key) is None else id_of(values, id_key)
    answer_name = None if kind == "preference" else task.answer_field
    day = moment.date() if moment else None
    item = HistoryItem(
        item_id, fields, answer_name, day, kind, answer_labels=task.labels, picture=picture, vector=vector
    )
    return moment, item


def record_of(item: HistoryItem) -> dict[str, str]:
    """Return the fields of an item as the record that `item_of` reads."""
    answer = REJECTED if item.kind == "rejection" else item.answer_name
    return {answer if name == item.answer_name and answer else name: value for name, value in item.fields}


def context_of(value: object) -> tuple[Turn, ...]:
    """Convert the messages before a prompt: a list of objects with `role` and `content`."""
    if not isinstance(value, list):
        raise Flaw("its 'context' is not a list of messages")
    turns: list[Turn] = []
    for number, message in enumerate(value, 1):
        try:
            record = as_record(message)
            if (role := name_of(record, "role")) not in _ROLES:
                raise Flaw(f"its 'role' is not one of {', '.join(_ROLES)}")
            turns.append((role, text_of(record, "content")))
        except Flaw as flaw:
            raise Flaw(f"message {number} of its context: {flaw}") from None
    return tuple(turns)


def picture_in(record: Mapping[str, object], key: str | None, *, folder: Path | None) -> Picture | None:
    """Return the picture at a key; None without a key, or if the record has none. `folder`: see `picture_of`."""
    return picture_of(value_of(record, key), f"its {key!r}", folder=folder) if key and key in record else None


def vector_in(record: Mapping[str, object], key: str | None) -> bytes | None:
    """Return the vector at a key as little-endian float32; None without a key, or if the record has none."""
    value = value_of(record, key) if key and key in record else None
    return None if value is None else vector_of(value, f"its {key!r}")


def vector_of(value: object, what: str) -> bytes:
    """Convert a list of finite numbers to little-endian float32."""
    numbers = plain_value(value)
    if not isinstance(numbers, list | tuple) or not numbers:
        raise Flaw(f"{what} is no vector: expected a list of numbers")
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise Flaw(f"{what} is no vector: a value of the list is no number")
    try:
        packed = struct.pack(f"<{len(numbers)}f", *numbers)
    except (OverflowError, struct.error):
        packed = b""
    singles = struct.unpack(f"<{len(packed) // 4}f", packed)
    if not singles or not all(map(math.isfinite, singles)):
        raise Flaw(f"{what} is no vector: a value of the list is not finite")
    if not any(singles):
        raise Flaw(f"{what} has only zeros, so it has no direction")
    return packed


def numbers_of(vector: bytes) -> list[float]:
    """Return the numbers of a vector that `vector_of` has converted, with the digits of single precision."""
    return [float(f"{number:.9g}") for number in struct.unpack(f"<{len(vector) // 4}f", vector)]


def _fields_of(
    task: Task, values: Mapping[str, Any], *, has_more: bool = False
) -> tuple[ItemKind, tuple[tuple[str, str], ...]]:
    """Return the kind of a record's item, and the item's fields.

    Args:
        has_more: whether the item has a picture or a vector, so that texts may be missing.
    """
    if PREFERENCE in values:
        if has_more:
            raise Flaw(f"it has both a {PREFERENCE!r} and a picture or a vector; split it into two items")
        if REJECTED in values or any(name in values for name in task.field_names):
            raise Flaw(f"it has both a {PREFERENCE!r} and fields of an answer; split it into two items")
        return "preference", ((PREFERENCE, name_of(values, PREFERENCE).strip()),)
    if has_more:
        values = {name: None for name in task.field_names if name != task.answer_field} | dict(values)
    if REJECTED not in values:
        return "answer", tuple((name, field_of(task, values, name)) for name in task.field_names)
    if task.answer_field is None:
        raise Flaw(f"it has a {REJECTED!r} answer, but items of task {task.name} have no answers")
    if task.answer_field in values:
        raise Flaw(f"it has both a {task.answer_field!r} and a {REJECTED!r}; split it into two items")
    keys = {task.answer_field: REJECTED}
    fields = ((name, field_of(task, values, name, key=keys.get(name, name))) for name in task.field_names)
    return "rejection", tuple(fields)


def _label(task: Task, answer: str) -> str | None:
    """Return the label that equals an answer as text or as a number."""
    answer = answer.strip()
    if answer in task.labels:
        return answer
    number = number_or_none(answer)
    if number is None:
        return None
    return next((label for label in task.labels if _is_equal(number_or_none(label), number)), None)


def _is_equal(label: float | None, number: float) -> bool:
    return label is not None and math.isclose(label, number, rel_tol=1e-6)  # single precision has seven digits
