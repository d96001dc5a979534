"""A task that a service answers: its prompts and the personas of its plug."""

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
