"""Convert what callers send to history items: records, preferences, and feedback on earlier replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from personaplug.data.parsing import Flaw, as_text, item_of, target_of
from personaplug.data.pictures import is_picture_url
from personaplug.data.records import PREFERENCE, REJECTED, HistoryItem
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT
from personaplug.errors import RequestError
from personaplug.serving.openai_protocol import check_name
from personaplug.serving.recent_requests import RecentRequest

MAX_TEXT = 100_000
"""Maximum characters of one field of an item. Encoders read only a few thousand."""

_NO_ID = "no id"

Rating = Literal["up", "down"]


@dataclass(frozen=True, repr=False)
class Feedback:
    """A user's feedback: the accepted `answer`, the `rejected` one, both (an edit), or a `rating` of the reply."""

    answer: object = None
    rejected: object = None
    rating: Rating | None = None


def items_of_records(
    tasks: Sequence[Task], records: Sequence[Mapping[str, Any]], *, content_id: Callable[[HistoryItem], str]
) -> list[HistoryItem]:
    """Convert records to items; RequestError if a record is invalid or fits no task, or if two records share an id.

    If there are several tasks, a record's fields decide its task. If they fit several tasks, its `task` decides.
    """
    items = [
        _item_of_record(_task_of_record(tasks, record, number), record, number, content_id)
        for number, record in enumerate(records, 1)
    ]
    first_by_id: dict[str, tuple[int, HistoryItem]] = {}
    for number, item in enumerate(items, 1):
        first_number, first_item = first_by_id.setdefault(item.id, (number, item))
        if first_item != item:
            message = f"item {number} has the id of item {first_number}, but other contents. Give each item its own id."
            raise RequestError(message, code="item")
    return items


def preference_items(sentences: Sequence[str], *, content_id: Callable[[HistoryItem], str]) -> list[HistoryItem]:
    """Convert stated preferences to items. The same sentence always gets the same id."""
    items = []
    for number, sentence in enumerate(sentences, 1):
        try:
            _, item = item_of(CHAT, {PREFERENCE: sentence}, default_id=_NO_ID)
        except Flaw as flaw:
            raise RequestError(f"preference {number}: {flaw}.", code="item") from None
        items.append(replace(item, id=content_id(item)))
    return items


def feedback_ids(request_id: str) -> tuple[str, str]:
    """Return the ids of the items for feedback on a request: the accepted and the rejected answer."""
    return request_id, f"{request_id}-rejected"


def feedback_items(task: Task, request_id: str, *, request: RecentRequest, feedback: Feedback) -> list[HistoryItem]:
    """Build items from a request's query and from the answers that its user accepted or rejected."""
    if not request.query:
        message = f"The request did not match the task {task.name} (GET /v1/task), so its feedback cannot be an item."
        raise RequestError(message, code="not_the_task")
    feedback = _with_own_answer(feedback, request.answer)
    answer_id, rejected_id = feedback_ids(request_id)
    items = []
    if feedback.answer is not None:
        items.append(_feedback_item(task, answer_id, request.query, feedback.answer))
    if feedback.rejected is not None:
        items.append(_rejection(_feedback_item(task, rejected_id, request.query, feedback.rejected), task))
    if len({(item.answer_text or "").strip() for item in items}) < len(items):
        raise RequestError("`answer` and `rejected` are the same. Send only one of them.", code="feedback")
    return items


def _with_own_answer(feedback: Feedback, answer: str | None) -> Feedback:
    """Return feedback in which the model's reply replaces a rating."""
    if feedback.rating is None:
        return feedback
    if answer is None:
        name = "answer" if feedback.rating == "up" else "rejected"
        raise RequestError(
            f"The reply's text was not stored, because it was cut off, too long, or one of several. Send it as "
            f"`{name}` instead of `rating`.",
            code="unknown_answer",
        )
    return Feedback(answer=answer) if feedback.rating == "up" else Feedback(rejected=answer)


def _feedback_item(task: Task, item_id: str, query: str, answer: object) -> HistoryItem:
    query_fields = [name for name in task.field_names if name != task.answer_field]
    is_answer_alone = task.kind == "text" and not query_fields[1:] and task.answer_field is None
    if not is_answer_alone and (task.answer_field is None or len(query_fields) > 1):
        form = "have no answer field" if task.answer_field is None else f"need the fields {', '.join(query_fields)}"
        message = f"Items of {task.name} {form}, so a request cannot become an item. Send the item in `items`."
        raise RequestError(message, code="feedback")
    try:
        _check_is_reply(task, answer, "the answer")
        text = target_of(task, as_text(answer, "the answer"))
    except Flaw as flaw:
        raise RequestError(f"{flaw}. {_expected(task)}", code="answer") from None
    if not text.strip():
        raise RequestError("The answer has no text. Send its text.", code="answer")
    fields = dict.fromkeys(query_fields, text if is_answer_alone else query)
    if task.answer_field is not None:
        fields[task.answer_field] = text
    ordered_fields = tuple((name, fields[name]) for name in task.field_names)
    return HistoryItem(item_id, ordered_fields, task.answer_field, answer_labels=task.labels)


def _rejection(item: HistoryItem, task: Task) -> HistoryItem:
    if task.answer_field is None:
        message = f"Items of {task.name} have no answer field, so no answer can be rejected."
        raise RequestError(message, code="feedback")
    return replace(item, kind="rejection")


def _task_of_record(tasks: Sequence[Task], record: Mapping[str, Any], number: int) -> Task:
    """Return the task that a record is an item of."""
    if len(tasks) == 1:
        return tasks[0]
    if PREFERENCE in record:  # a preference has no task; if it has a task's fields, this task's parser refuses it
        return next((task for task in tasks if not record.keys().isdisjoint(task.field_names)), tasks[0])
    candidates = [task for task in tasks if _required_fields(task, record) <= record.keys()]
    # If one task's fields include another's, prefer the task that reads more of the record.
    read = [_read_fields(task, record) for task in candidates]
    best = [task for task, names in zip(candidates, read, strict=True) if not any(names < other for other in read)]
    task_name = record.get("task")
    if isinstance(task_name, str) and not any("task" in task.field_names for task in tasks):
        best = [task for task in candidates if task.name == task_name]
    forms = {(task.field_names, task.answer_field, task.labels, _more_fields(task)) for task in best}
    if len(forms) == 1:
        return best[0]
    fields_of_tasks = "; ".join(f"{task.name}: {', '.join((*task.field_names, *_more_fields(task)))}" for task in tasks)
    flaw = "its fields fit several tasks; name one as `task`" if best else "its fields fit no task"
    raise RequestError(f"item {number}: {flaw}. The tasks and their fields are {fields_of_tasks}.", code="item")


def _required_fields(task: Task, record: Mapping[str, Any]) -> set[str]:
    """Return the fields that a record must have to be an item of a task."""
    has_more = any(record.get(name) is not None for name in _more_fields(task))
    names = {task.answer_field or ""} - {""} if has_more else set(task.field_names)
    return names - {task.answer_field or ""} | {REJECTED} if REJECTED in record and task.answer_field else names


def _read_fields(task: Task, record: Mapping[str, Any]) -> set[str]:
    """Return the fields of a record that a task reads."""
    return {*task.field_names, *_more_fields(task), REJECTED} & record.keys()


def _more_fields(task: Task) -> tuple[str, ...]:
    """Return the fields of a task's pictures and vectors."""
    return tuple(name for name in (task.image_field, task.vector_field) if name is not None)


def _item_of_record(
    task: Task, record: Mapping[str, Any], number: int, content_id: Callable[[HistoryItem], str]
) -> HistoryItem:
    for name, value in record.items():
        if name not in _more_fields(task):
            _check_value(task, name, value, number=number)
    try:
        for name in (task.answer_field or "", REJECTED):
            _check_is_reply(task, record.get(name), f"its {name!r}")
        _, item = item_of(task, record, default_id=_NO_ID)
        if record.get("id") is None:
            item = replace(item, id=content_id(item))
        check_name(item.id)
        if task.has_labelled_items:
            labels = {name: target_of(task, text) for name, text in item.fields if name == task.answer_field}
            item = replace(item, fields=tuple((name, labels.get(name, text)) for name, text in item.fields))
    except ValueError as flaw:
        raise RequestError(f"item {number}: {flaw}. {_expected(task)}", code="item") from None
    return item


def _check_value(task: Task, name: str, value: object, *, number: int) -> None:
    """Refuse a long text, and a picture in a field that the task does not read, because it would be lost."""
    if name not in (*task.field_names, PREFERENCE, REJECTED) and _holds_picture(value):
        place = f"Send it as {task.image_field!r}." if task.image_field else "Leave it out."
        message = f"item {number}: it has a picture in a field that is no field for pictures of {task.name}. {place}"
        raise RequestError(message, code="item")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        message = f"item {number}: a field may have at most {MAX_TEXT:,} characters. Shorten its text."
        raise RequestError(message, http_status=422, code="invalid_value")


def _holds_picture(value: object) -> bool:
    """Return whether a value is a data URL of a picture, or holds one, as in `image_url` of a chat."""
    if isinstance(value, str):
        return is_picture_url(value)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_holds_picture, values))


def _check_is_reply(task: Task, answer: object, what: str) -> None:
    """Refuse a number as a reply of a chat, because it is a rating."""
    if task.kind == "chat" and isinstance(answer, int | float):
        raise Flaw(f"{what} is a number, but the answers of {task.name} are replies in text; send the text of a reply")


def _expected(task: Task) -> str:
    labels = f" Its {task.answer_field} must be one of {_join_labels(task.labels)}." if task.has_labelled_items else ""
    picture = f" {task.image_field} may be a picture, as a data URL." if task.image_field else ""
    vector = f" {task.vector_field} may be a vector, as a list of numbers." if task.vector_field else ""
    names = ", ".join(task.field_names)
    return f"An item must have {names}, and may have an id and a date.{labels}{picture}{vector}"


def _join_labels(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 20 else f"{', '.join(labels[:20])}, … ({len(labels)} labels)"
