"""Items of histories from what callers send: records, and the answer that a user kept for an earlier request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from personaplug.data.parsing import Flaw, as_text, item_of, target_of
from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.errors import RequestError
from personaplug.serving.openai_protocol import check_name

_NO_ID = "no id"


def items_of_records(task: Task, records: Sequence[Mapping[str, Any]]) -> list[HistoryItem]:
    """Convert records with the task's fields to items; RequestError if one is invalid, or two share an id."""
    items = [_item_of_record(task, record, number) for number, record in enumerate(records, 1)]
    first: dict[str, tuple[int, HistoryItem]] = {}
    for number, item in enumerate(items, 1):
        earlier, same_id = first.setdefault(item.id, (number, item))
        if same_id != item:
            message = f"item {number} has the id of item {earlier} and other contents. Give each item an id of its own."
            raise RequestError(message, code="item")
    return items


def feedback_item(task: Task, request_id: str, *, query: str, answer: object) -> HistoryItem:
    """Make an item of a request's query, in the wording of the task, and the answer that its user kept."""
    query_fields = [name for name in task.field_names if name != task.answer_field]
    is_answer_alone = task.kind == "text" and not query_fields[1:] and task.answer_field is None
    if not is_answer_alone and (task.answer_field is None or len(query_fields) > 1):
        lacks = "hold no answer" if task.answer_field is None else f"have the fields {', '.join(query_fields)}"
        message = f"Items of {task.name} {lacks}, which a request does not tell. Send the item with its fields."
        raise RequestError(message, code="feedback")
    if not query:
        message = f"That request was not in the wording of {task.name} (GET /v1/task), so it is no item of its history."
        raise RequestError(message, code="not_the_task")
    try:
        text = target_of(task, as_text(answer, "the answer"))
    except Flaw as flaw:
        raise RequestError(f"{flaw}. {_expected(task)}", code="answer") from None
    fields = dict.fromkeys(query_fields, text if is_answer_alone else query)
    if task.answer_field is not None:
        fields[task.answer_field] = text
    return HistoryItem(request_id, tuple((name, fields[name]) for name in task.field_names), task.answer_field)


def _item_of_record(task: Task, record: Mapping[str, Any], number: int) -> HistoryItem:
    try:
        _, item = item_of(task, record, default_id=_NO_ID)
        if record.get("id") is None:
            item = replace(item, id=_content_id(item))
        check_name(item.id)
        if task.has_labelled_items:
            answered = {name: target_of(task, text) for name, text in item.fields if name == task.answer_field}
            item = replace(item, fields=tuple((name, answered.get(name, text)) for name, text in item.fields))
    except ValueError as flaw:
        raise RequestError(f"item {number}: {flaw}. {_expected(task)}", code="item") from None
    return item


def _content_id(item: HistoryItem) -> str:
    """An id for an item without one: the same item, sent again, gets the same id and is stored once."""
    content = json.dumps([item.fields, str(item.date)]).encode()
    return f"item-{hashlib.blake2b(content, digest_size=12).hexdigest()}"


def _expected(task: Task) -> str:
    labels = f" Its {task.answer_field} is one of {_listed(task.labels)}." if task.has_labelled_items else ""
    return f"An item has {', '.join(task.field_names)} and, if they are known, an id and a date.{labels}"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 20 else f"{', '.join(labels[:20])}, … ({len(labels)} labels)"
