"""Parsing of live prompts: the query, the options, and whether a prompt asks what the task asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from personaplug.data import patterns
from personaplug.data.parsing import Flaw, options_of, query_of
from personaplug.data.records import Options
from personaplug.data.task import Task, TaskKind
from personaplug.data.wording import Wording, text_before

_ANY_TEXT = "Hello, how are you today? I am fine."  # a pattern that matches it tells no prompt from others


@dataclass(frozen=True, repr=False)
class TaskQuery:
    """A prompt as a task parses it."""

    text: str  # what the encoder reads
    options: Options | None  # what the prompt offers to choose from
    is_on_task: bool  # whether the prompt has the task's wording
    item_text: str = ""  # the query as a field of an item: without the wording that follows it


class TaskPrompts:
    """Recognizes the prompts of a task; without wordings, by its marker or pattern alone."""

    def __init__(self, task: Task, wordings: Sequence[Wording] = ()) -> None:
        self.task, self.wordings = task, tuple(wordings)

    def parse(self, prompt: str) -> TaskQuery:
        """Parse a prompt; one without the task's wording is the query as a whole.

        A pattern of a task is searched here, so call it outside an event loop.
        """
        try:
            return self._parse(prompt)
        except Flaw:
            return TaskQuery(prompt, None, is_on_task=False)

    @property
    def is_distinct(self) -> bool:
        """Whether something tells a prompt of the task from any other text: a wording, a marker, a pattern."""
        pattern, own = self.task.query_pattern, [w.opening + w.lead + w.closing for w in self.wordings]
        is_marked = self.task.query_after.strip() or (pattern and not patterns.search(pattern, _ANY_TEXT))
        return bool(is_marked) or (bool(own) and all(map(str.strip, own)))

    def describe(self) -> dict[str, Any]:
        """The task and its wordings as JSON."""
        task = self.task
        return {
            "name": task.name,
            "kind": task.kind,
            "labels": list(task.labels),
            "wordings": [wording.template for wording in self.wordings or (_marker_of(task),)],
            "query_pattern": task.query_pattern or None,
            "item_fields": list(task.field_names),
            "answer_field": task.answer_field,
        }

    def _parse(self, prompt: str) -> TaskQuery:
        wordings = [wording for wording in self.wordings if wording.opens(prompt)]
        if self.wordings and not wordings:  # seen before a pattern is searched
            raise Flaw("it does not begin like the task's prompts")
        query, options = query_of(self.task, prompt), options_of(self.task, prompt)
        before = text_before(prompt, query=query, options=options)
        matching = next((wording for wording in wordings if wording.matches(prompt, before=before)), None)
        if self.wordings and matching is None:
            raise Flaw("it does not have the wording of the task's prompts")
        item_text = query if matching is None else matching.without_closing(query)
        if not item_text.strip():
            raise Flaw("it holds no query")
        return TaskQuery(query, options, is_on_task=True, item_text=item_text)


def find_task(
    tasks: Sequence[TaskPrompts], prompt: str, *, can_ask: Callable[[TaskKind], bool] = lambda kind: True
) -> tuple[int, TaskQuery]:
    """Return the index of the task that a prompt is of, and the prompt as this task parses it.

    It is the first task whose whole wording the prompt has, else the first one of conversations. If there is none, the
    query is off the first task. With several tasks, one whose prompts nothing tells from other texts gets none.

    Args:
        can_ask: whether the prompt can be of a task of some kind.
    """
    by_wording = [index for index, own in enumerate(tasks) if own.task.kind != "chat"]
    chats = [index for index, own in enumerate(tasks) if own.task.kind == "chat"]
    if len(tasks) > 1:
        by_wording = [index for index in by_wording if tasks[index].is_distinct]
    for index in [*by_wording, *chats]:
        if can_ask(tasks[index].task.kind) and (query := tasks[index].parse(prompt)).is_on_task:
            return index, query
    return (chats or [0])[0], TaskQuery(prompt, None, is_on_task=False)


def _marker_of(task: Task) -> Wording:
    return Wording("", task.query_after)
