"""Items of histories from what callers send: records, and what a user made of the answer to an earlier request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from personaplug.data.parsing import Flaw, as_text, item_of, target_of
from personaplug.data.records import PREFERENCE, REJECTED, HistoryItem
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT
from personaplug.errors import RequestError
from personaplug.serving.openai_protocol import check_name
from personaplug.serving.recent_requests import RecentRequest

_NO_ID = "no id"

Rating = Literal["up", "down"]


@dataclass(frozen=True, repr=False)
class Feedback:
    """What a user made of an answer: kept `answer`, did not want `rejected`, both (an edit), or rated the model's."""

    answer: object = None
    rejected: object = None
    rating: Rating | None = None


def items_of_records(
    tasks: Sequence[Task], records: Sequence[Mapping[str, Any]], *, content_id: Callable[[HistoryItem], str]
) -> list[HistoryItem]:
    """Convert records with the fields of one of the tasks to items.

    Of several tasks, a record's fields tell its own; if they are those of more than one, the record names it as `task`.

    Raises:
        RequestError: if a record is invalid or of no task, or two share an id.
    """
    items = [
        _item_of_record(_task_of_record(tasks, record, number), record, number, content_id)
        for number, record in enumerate(records, 1)
    ]
    first: dict[str, tuple[int, HistoryItem]] = {}
    for number, item in enumerate(items, 1):
        earlier, same_id = first.setdefault(item.id, (number, item))
        if same_id != item:
            message = f"item {number} has the id of item {earlier} and other contents. Give each item an id of its own."
            raise RequestError(message, code="item")
    return items


def preference_items(sentences: Sequence[str], *, content_id: Callable[[HistoryItem], str]) -> list[HistoryItem]:
    """Convert stated preferences to items; the same sentence always gets the same id."""
    items = []
    for number, sentence in enumerate(sentences, 1):
        try:
            _, item = item_of(CHAT, {PREFERENCE: sentence}, default_id=_NO_ID)
        except Flaw as flaw:
            raise RequestError(f"preference {number}: {flaw}.", code="item") from None
        items.append(replace(item, id=content_id(item)))
    return items


def feedback_ids(request_id: str) -> tuple[str, str]:
    """Return the ids of the items that feedback on a request may become: the answer, the rejected answer."""
    return request_id, f"{request_id}-rejected"


def feedback_items(task: Task, request_id: str, *, request: RecentRequest, feedback: Feedback) -> list[HistoryItem]:
    """Make items of a request's query, in the wording of the task, and of what its user kept and rejected."""
    if not request.query:
        message = f"That request did not ask what {task.name} asks (GET /v1/task), so it is no item of its history."
        raise RequestError(message, code="not_the_task")
    feedback = _with_own_answer(feedback, request.answer)
    answer_id, rejected_id = feedback_ids(request_id)
    items = []
    if feedback.answer is not None:
        items.append(_feedback_item(task, answer_id, request.query, feedback.answer))
    if feedback.rejected is not None:
        items.append(_rejection(_feedback_item(task, rejected_id, request.query, feedback.rejected), task))
    if len({(item.answer_text or "").strip() for item in items}) < len(items):
        raise RequestError("`answer` and `rejected` are the same; send one of them.", code="feedback")
    return items


def _with_own_answer(feedback: Feedback, answer: str | None) -> Feedback:
    """Return feedback with the model's own answer in place of a rating."""
    if feedback.rating is None:
        return feedback
    if answer is None:
        name = "answer" if feedback.rating == "up" else "rejected"
        raise RequestError(
            f"The text of that answer is not known here: it was broken off, very long, or one of several. Send it as "
            f"`{name}` in place of `rating`.",
            code="unknown_answer",
        )
    return Feedback(answer=answer) if feedback.rating == "up" else Feedback(rejected=answer)


def _feedback_item(task: Task, item_id: str, query: str, answer: object) -> HistoryItem:
    query_fields = [name for name in task.field_names if name != task.answer_field]
    is_answer_alone = task.kind == "text" and not query_fields[1:] and task.answer_field is None
    if not is_answer_alone and (task.answer_field is None or len(query_fields) > 1):
        lacks = "hold no answer" if task.answer_field is None else f"have the fields {', '.join(query_fields)}"
        message = f"Items of {task.name} {lacks}, which a request does not tell. Send the item with its fields."
        raise RequestError(message, code="feedback")
    try:
        text = target_of(task, as_text(answer, "the answer"))
    except Flaw as flaw:
        raise RequestError(f"{flaw}. {_expected(task)}", code="answer") from None
    if not text.strip():
        raise RequestError("An answer without text tells nothing; send the text.", code="answer")
    fields = dict.fromkeys(query_fields, text if is_answer_alone else query)
    if task.answer_field is not None:
        fields[task.answer_field] = text
    named = tuple((name, fields[name]) for name in task.field_names)
    return HistoryItem(item_id, named, task.answer_field, answer_labels=task.labels)


def _rejection(item: HistoryItem, task: Task) -> HistoryItem:
    if task.answer_field is None:
        message = f"Items of {task.name} hold no answer beside the text, so none can be rejected."
        raise RequestError(message, code="feedback")
    return replace(item, kind="rejection")


def _task_of_record(tasks: Sequence[Task], record: Mapping[str, Any], number: int) -> Task:
    """Return the task whose item a record is."""
    if len(tasks) == 1:
        return tasks[0]
    if PREFERENCE in record:  # which has no task; with the fields of one, it is refused as an item of this task
        return next((task for task in tasks if not record.keys().isdisjoint(task.field_names)), tasks[0])
    fitting = [task for task in tasks if _fields_of(task, record) <= record.keys()]
    # Of tasks whose items begin alike, the one that reads most of the record.
    largest = [
        task for task in fitting if not any(_fields_of(task, record) < _fields_of(other, record) for other in fitting)
    ]
    named = record.get("task")
    if isinstance(named, str) and not any("task" in task.field_names for task in tasks):
        largest = [task for task in fitting if task.name == named]
    forms = {(task.field_names, task.answer_field, task.labels) for task in largest}
    if len(forms) == 1:
        return largest[0]
    listed = "; ".join(f"{task.name}: {', '.join(task.field_names)}" for task in tasks)
    flaw = "it has the fields of several tasks; name one as `task`" if largest else "it has the fields of no task"
    raise RequestError(f"item {number}: {flaw}. The tasks and the fields of their items are {listed}.", code="item")


def _fields_of(task: Task, record: Mapping[str, Any]) -> set[str]:
    """Return the fields that a record has if it is an item of a task."""
    names = set(task.field_names)
    return names - {task.answer_field or ""} | {REJECTED} if REJECTED in record and task.answer_field else names


def _item_of_record(
    task: Task, record: Mapping[str, Any], number: int, content_id: Callable[[HistoryItem], str]
) -> HistoryItem:
    try:
        _, item = item_of(task, record, default_id=_NO_ID)
        if record.get("id") is None:
            item = replace(item, id=content_id(item))
        check_name(item.id)
        if task.has_labelled_items:
            answered = {name: target_of(task, text) for name, text in item.fields if name == task.answer_field}
            item = replace(item, fields=tuple((name, answered.get(name, text)) for name, text in item.fields))
    except ValueError as flaw:
        raise RequestError(f"item {number}: {flaw}. {_expected(task)}", code="item") from None
    return item


def _expected(task: Task) -> str:
    labels = f" Its {task.answer_field} is one of {_listed(task.labels)}." if task.has_labelled_items else ""
    return f"An item has {', '.join(task.field_names)} and, if they are known, an id and a date.{labels}"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 20 else f"{', '.join(labels[:20])}, … ({len(labels)} labels)"
