"""What a service answers: tasks with the personas of their plug, and plugs by the name of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from personaplug.data.task import Task
from personaplug.data.task_prompts import TaskPrompts
from personaplug.data.wording import Wording
from personaplug.serving.persona_cache import PersonaCache


@dataclass(frozen=True, eq=False)
class ServedTask:
    """A task's prompts and its personas."""

    prompts: TaskPrompts
    personas: PersonaCache

    @classmethod
    def of(cls, task: Task, personas: PersonaCache, *, wordings: Sequence[Wording] = ()) -> ServedTask:
        return cls(TaskPrompts(task, wordings), personas)

    @property
    def task(self) -> Task:
        return self.prompts.task

    def describe(self) -> dict[str, Any]:
        """Return the task, its wordings and the kinds of items that its plug reads, as JSON."""
        return self.prompts.describe() | {"item_kinds": self.personas.plug.known_kinds}


@dataclass(frozen=True, eq=False)
class ServedPlug:
    """A plug that requests choose by the name of a model. All plugs of a service share one model and one store.

    Attributes:
        tasks: the tasks of the plug, in the order in which a prompt is matched against them. Each has its own personas.
        name: the name of the model in requests; empty = the names of the engine's model.
    """

    tasks: tuple[ServedTask, ...]
    name: str = ""

    @property
    def personas(self) -> PersonaCache:
        """The personas of the first task."""
        return self.tasks[0].personas

    @property
    def concept_task(self) -> Task | None:
        """The first task whose items are concepts; None if there is none."""
        return next((served.task for served in self.tasks if served.task.name_field is not None), None)

    def forget(self, tenant: str, user: str) -> None:
        """Drop the cached personas of an erased user."""
        for served in self.tasks:
            served.personas.forget(tenant, user)
