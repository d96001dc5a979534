"""Rows without a language model: regressions on words and history, heuristics on the user's past answers, copies.

They show which scores are possible without a language model. They are fitted on the training samples of the run's plug.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from personaplug.baselines.no_lm import Baseline, Predictor
from personaplug.data.task import Task
from personaplug.methods.base import Method, ModelInputs
from personaplug.methods.context import Assignment, EvalContext
from personaplug.methods.predictions import Predictions


@dataclass(frozen=True)
class BaselineMethod(Method):
    """A baseline that predicts labels or texts without a language model."""

    baseline: Baseline

    @property
    def needs_train_split(self) -> bool:
        return self.baseline.is_fitted_on_train

    def check(self, task: Task) -> None:
        self.baseline.check(task)

    def build_inputs(self, context: EvalContext, assignments: Sequence[Assignment], *, seed: int) -> ModelInputs:
        items = context.assigned_items(assignments)
        texts = [replace(text, history=history) for text, history in zip(context.texts, items, strict=True)]
        return ModelInputs(context.samples, assignments, items_used=[len(history) for history in items], texts=texts)

    def predict(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> Predictions:
        train = context.training_texts if self.needs_train_split else []

        def fit() -> tuple[Predictor, float]:
            started = time.monotonic()
            return self.baseline.fit(context.task, train), time.monotonic() - started

        predictor, fit_seconds = context.once(("baseline", self.baseline), fit)
        started = time.monotonic()
        texts = predictor.predict(inputs.texts)
        return Predictions(
            texts, [False] * len(texts), time.monotonic() - started, peak_memory_bytes=0, fit_seconds=fit_seconds
        )
