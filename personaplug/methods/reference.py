"""The row `reference`: the right answers themselves. As `reference@wrong-user`: those of another user.

The two rows are the ceiling and the floor of the measures of texts, such as the attribution to users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData
from personaplug.methods.base import Method, ModelInputs
from personaplug.methods.context import Assignment, EvalContext
from personaplug.methods.predictions import Predictions


@dataclass(frozen=True)
class ReferenceMethod(Method):
    """The right answer of the sample whose history a sample gets."""

    def check(self, task: Task) -> None:
        super().check(task)
        if task.labels:
            raise ConfigError(f"{self.name} needs a task with free text; {task.name} has labels. Leave out the row.")

    def build_inputs(self, context: EvalContext, assignments: Sequence[Assignment], *, seed: int) -> ModelInputs:
        return ModelInputs(context.samples, assignments, items_used=[len(a.items) for a in assignments])

    def predict(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> Predictions:
        answers = [None if a.source is None else context.samples[a.source].target for a in inputs.assignments]
        texts = [answer for answer in answers if answer is not None]
        if len(texts) < len(answers):
            raise MissingData(f"{self.name} needs right answers, which this split lacks. Leave out the row.")
        return Predictions(texts, [False] * len(texts), seconds=0.0, peak_memory_bytes=0)

    @property
    def can_be_shuffled(self) -> bool:
        return False
