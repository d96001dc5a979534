"""What a baseline without a language model is: it checks a task, fits itself to training samples and predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from personaplug.data.records import Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError


class Predictor(Protocol):
    """A fitted baseline."""

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict an answer to each sample from its texts and the history that it is shown."""
        ...


class Baseline(ABC):
    """A baseline without a language model; equal ones fit alike, so subclasses are frozen dataclasses."""

    name: str
    is_fitted_on_train: ClassVar[bool] = True

    def check(self, task: Task) -> None:
        """Check that a task has what the baseline needs: by default, a closed set of labels.

        Raises:
            ConfigError: saying what is missing.
        """
        if task.kind == "text":
            raise ConfigError(
                f"{self.name} predicts one of a task's labels, and {task.name} has none: it writes free text. For that "
                f"there are copy, copy:10 and user-words."
            )

    @abstractmethod
    def fit(self, task: Task, train: Sequence[Sample]) -> Predictor:
        """Fit to training samples; none are given if `is_fitted_on_train` is false.

        Raises:
            ConfigError, MissingData: if it cannot be fitted to these samples.
        """
