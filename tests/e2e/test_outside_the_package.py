"""A row, a reader and an encoder from outside the package, without editing any file of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from personaplug.analysis.method_info import MethodInfo
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.evaluation.evaluator import evaluate
from personaplug.methods import Method, ModelInputs, parse_methods, register_method
from personaplug.methods.context import Assignment, EvalContext
from personaplug.methods.predictions import Predictions
from personaplug.run import Run, open_models


@dataclass(frozen=True)
class LatestAnswer(Method):
    """Predict the user's latest answer."""

    def build_inputs(self, context: EvalContext, assignments: Sequence[Assignment], *, seed: int) -> ModelInputs:
        items = context.assigned_items(assignments)
        return ModelInputs(context.samples, assignments, items_used=[len(history) for history in items])

    def predict(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> Predictions:
        histories = context.assigned_items(inputs.assignments)
        texts = [history[-1].answer or "" if history else "3" for history in histories]
        return Predictions(texts, [False] * len(texts), 0.0, 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_simulation(SimulationConfig(users=6, queries_per_user=2, dev_users=8, min_items=3), tmp_path / "data")
    return tmp_path / "data"


def test_row_from_outside_stands_in_a_table_with_its_control(data: Path, tmp_path: Path) -> None:
    register_method("latest-answer", lambda _: LatestAnswer(info=MethodInfo("latest-answer", "no-lm", "own")))
    config = load_config(overrides=["llm=toy", "encoder=hash:32", "dtype=float32", "resamples=100"])
    run = Run.create(tmp_path / "run", config=config, task=load_task(data))
    results = evaluate(
        run,
        open_dataset(data, "dev", task=run.task),
        split="dev",
        methods=parse_methods("plain,latest-answer,latest-answer@wrong-user"),
        config=config.evaluation,
        models=open_models(config),
    )
    assert [row.name for row in results.rows] == ["plain", "latest-answer", "latest-answer@wrong-user"]
    samples = list(open_dataset(data, "dev", task=run.task))
    errors = [abs(float(s.target or "") - float(s.history[-1].answer or "")) for s in samples]
    assert results.by_name["latest-answer"].metrics["mae"] == pytest.approx(np.mean(errors))
    assert "latest-answer" in results.personal_gains("mae")
