"""Interface of baselines without a language model: check a task, fit to training samples, predict."""

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
        """Predict an answer to each sample from its texts and its history."""
        ...


class Baseline(ABC):
    """A baseline without a language model; subclasses are frozen dataclasses, so that equal ones share one fit."""

    name: str
    is_fitted_on_train: ClassVar[bool] = True

    def check(self, task: Task) -> None:
        """Raise `ConfigError` if the task lacks what the baseline needs: by default, labels."""
        if not task.labels:
            raise ConfigError(
                f"{self.name} needs a task with labels; task {task.name} has none. For free text, use copy, copy:10 or "
                f"user-words."
            )

    @abstractmethod
    def fit(self, task: Task, train: Sequence[Sample]) -> Predictor:
        """Fit to training samples; `train` is empty if `is_fitted_on_train` is false."""
