"""Parse live prompts: the query, the options, and whether a prompt belongs to the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from personaplug.data import patterns
from personaplug.data.parsing import Flaw, options_of, query_of
from personaplug.data.records import Options
from personaplug.data.task import Task, TaskKind
from personaplug.data.wording import Wording, text_before

_ANY_TEXT = (
    "Hello, how are you today? I am fine."  # a pattern that matches this text does not identify the task's prompts
)


@dataclass(frozen=True, repr=False)
class TaskQuery:
    """A prompt that was parsed for a task."""

    text: str  # the text for the encoder
    options: Options | None  # the options in the prompt
    is_on_task: bool  # True if the prompt has the task's wording
    item_text: str = ""  # the query as a field of an item: without the wording that follows it


class TaskPrompts:
    """Recognizes the prompts of a task; without wordings, by its marker or pattern alone."""

    def __init__(self, task: Task, wordings: Sequence[Wording] = ()) -> None:
        self.task, self.wordings = task, tuple(wordings)

    def parse(self, prompt: str) -> TaskQuery:
        """Parse a prompt. If it does not have the task's wording, the whole prompt is the query.

        Do not call this in an event loop, because it may search for a pattern.
        """
        try:
            return self._parse(prompt)
        except Flaw:
            return TaskQuery(prompt, None, is_on_task=False)

    @property
    def is_distinct(self) -> bool:
        """True if a wording, a marker or a pattern distinguishes the task's prompts from other texts."""
        pattern, texts = self.task.query_pattern, [w.opening + w.lead + w.closing for w in self.wordings]
        is_marked = self.task.query_after.strip() or (pattern and not patterns.search(pattern, _ANY_TEXT))
        return bool(is_marked) or (bool(texts) and all(map(str.strip, texts)))

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
            "image_field": task.image_field,
            "vector_field": task.vector_field,
            "name_field": task.name_field,
        }

    def _parse(self, prompt: str) -> TaskQuery:
        wordings = [wording for wording in self.wordings if wording.opens(prompt)]
        if self.wordings and not wordings:  # checked first, because a pattern search is slower
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
    """Return the index of the task that a prompt belongs to, and the prompt parsed for this task.

    This is the first task whose wording the prompt has, else the first chat task. If there is neither, return the first
    task and an off-task query. Among several tasks, those that are not `is_distinct` are skipped.

    Args:
        can_ask: returns whether the prompt may belong to a task of a kind.
    """
    by_wording = [index for index, prompts in enumerate(tasks) if prompts.task.kind != "chat"]
    chats = [index for index, prompts in enumerate(tasks) if prompts.task.kind == "chat"]
    if len(tasks) > 1:
        by_wording = [index for index in by_wording if tasks[index].is_distinct]
    for index in [*by_wording, *chats]:
        if can_ask(tasks[index].task.kind) and (query := tasks[index].parse(prompt)).is_on_task:
            return index, query
    return (chats or [0])[0], TaskQuery(prompt, None, is_on_task=False)


def _marker_of(task: Task) -> Wording:
    return Wording("", task.query_after)
