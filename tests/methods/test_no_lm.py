"""Evaluation of rows without a language model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from personaplug.baselines.regression import Regression
from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.data.splits import drawn
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData, RunConflict
from personaplug.evaluation.evaluator import evaluate, predict
from personaplug.methods import find_method, parse_methods
from personaplug.methods.context import EvalContext
from personaplug.run import Models, Run, open_models
from personaplug.training.trainings import Trainings

TINY = ["llm=toy", "encoder=hash:32", "dtype=float32", "resamples=100", "seeds=0,1", "train_limit=10"]


class Stage:
    """Data, and a run that has recorded its training data as a training does."""

    def __init__(self, place: Path, *, kind: Any = "rating") -> None:
        self.data = place / "data"
        shape = SimulationConfig(
            task=kind, users=8, queries_per_user=2, dev_users=5, dev_queries_per_user=2, min_items=2, max_items=6
        )
        write_simulation(shape, self.data)
        self.config = load_config(overrides=TINY)
        self.run = Run.create(place / "run", config=self.config, task=load_task(self.data))
        self.models: Models = open_models(self.config)
        Trainings(self.run, self.reader("train"), models=self.models)

    def reader(self, split: str) -> Any:
        return open_dataset(self.data, split, task=self.run.task)

    def evaluate(self, names: str, *, settings: tuple[str, ...] = (), train: bool = True) -> dict[str, Any]:
        return evaluate(
            self.run,
            self.reader("dev"),
            split="dev",
            config=load_config(overrides=settings, base=self.config).evaluation,
            methods=parse_methods(names),
            models=self.models,
            train=self.reader("train") if train else None,
        ).to_json()

    def predicted(self, name: str) -> list[str]:
        path = self.run.folder / "evaluations" / "dev" / f"{name.replace(':', '-')}.seed-0.json"
        return [gold["output"] for gold in json.loads(path.read_text())["golds"]]


@pytest.fixture(scope="module")
def rating(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("rating"))


def test_rows_without_a_language_model_never_call_it(rating: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rating.models.llm, "score", lambda *_, **__: pytest.fail("the model was called"))
    results = rating.evaluate("classical,classical@wrong-user,classical:text,user-median,user-mean,user-majority")
    rows = {row["method"]: row for row in results["rows"]}
    for row in rows.values():
        assert (row["decoding"], row["seeds"], row["invalid_rate"]) == ("computed", [0], 0)
        assert (row["prompt_tokens_mean"], row["costs"]["bytes_per_user"]) == (None, None)
        assert row["fit_seconds"] >= 0
    assert {"versions", "rows"} <= results.keys()
    assert results["versions"]["scikit-learn"]
    for sample, prediction in zip(rating.reader("dev"), rating.predicted("user-median"), strict=True):
        middle = np.median([float(item.answer or "") for item in sample.history])
        assert prediction == str(int(np.floor(middle + 0.5)))


def test_baseline_is_fitted_once_on_the_samples_of_the_plug(rating: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[list[str]] = []

    fit = Regression.fit

    def recorded(self: Regression, task: Task, train: Any) -> Any:
        fitted.append([sample.id for sample in train])
        return fit(self, task, train)

    monkeypatch.setattr(Regression, "fit", recorded)
    rating.evaluate("classical,classical@wrong-user,classical@shuffled")
    of_the_plug = [sample.id for sample in Trainings(rating.run, rating.reader("train"), models=rating.models).samples]
    assert fitted == [of_the_plug]
    assert len(of_the_plug) == 10 < len(list(rating.reader("train")))
    assert of_the_plug == [sample.id for sample in drawn(rating.reader("train"), limit=10, seed=0)]


def test_wrong_user_is_the_same_for_all_rows(rating: Stage) -> None:
    rating.evaluate("user-mean@wrong-user")
    context = EvalContext(rating.run, rating.reader("dev"), models=rating.models, config=rating.config.evaluation)
    inputs = find_method("bm25:1@wrong-user").build_inputs(context, context.assign("wrong-user", seed=0), seed=0)
    predictions = rating.predicted("user-mean@wrong-user")
    for sample, assignment, prediction in zip(context.texts, inputs.assignments, predictions, strict=True):
        assert assignment.source is not None
        stranger = context.texts[assignment.source]
        assert stranger.owner != sample.owner
        mean = np.mean([float(item.answer or "") for item in stranger.history])
        assert prediction == str(int(np.floor(mean + 0.5)))


def test_max_eval_history_limits_rows_to_the_latest_items(rating: Stage) -> None:
    rating.evaluate("user-median", settings=("max_eval_history=1",))
    assert rating.predicted("user-median") == [sample.history[-1].answer for sample in rating.reader("dev")]
    row = rating.evaluate("user-median,classical", settings=("max_eval_history=0",))["rows"][0]
    targets = [float(sample.target or "") for sample in drawn(rating.reader("train"), limit=10, seed=0)]
    assert set(rating.predicted("user-median")) == {str(int(np.floor(np.median(targets) + 0.5)))}
    assert row["lost_history_rate"] == 1


def test_rejects_a_missing_or_different_training_split(rating: Stage, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="training split"):
        rating.evaluate("classical", train=False)
    other = Stage(tmp_path / "other")
    with pytest.raises(RunConflict, match="other training data"):
        evaluate(
            replace(rating.run),
            rating.reader("dev"),
            split="dev",
            config=rating.config.evaluation,
            methods=parse_methods("user-mean"),
            models=rating.models,
            train=open_dataset(other.data, "dev", task=rating.run.task),
        )


def test_copies_of_free_text_need_no_training_split(tmp_path: Path) -> None:
    stage = Stage(tmp_path, kind="style")
    row = stage.evaluate("copy:2,copy", train=False)["rows"][0]
    assert row["metrics"]["rouge_1"] >= 0
    assert stage.predicted("copy") == [sample.query for sample in stage.reader("dev")]
    (path,) = predict(
        stage.run,
        stage.reader("dev"),
        split="dev",
        methods=parse_methods("copy:2"),
        config=stage.config.evaluation,
        models=stage.models,
    )
    golds = json.loads(path.read_text())["golds"]
    assert [gold["output"] for gold in golds] == [" ".join(s.query.split()[:2]) for s in stage.reader("dev")]
    with pytest.raises(ConfigError, match="free text"):
        stage.evaluate("copy,user-median")


def test_commands_fit_rows_on_the_train_split_of_the_data(rating: Stage) -> None:
    words = ["--run", str(rating.run.folder), "--data", str(rating.data), "--methods", "classical,user-median"]
    done = CliRunner().invoke(main, ["evaluate", *words])
    assert done.exit_code == 0, done.output
    assert "user-median" in done.output
    done = CliRunner().invoke(main, ["predict", *words, "--split", "dev"])
    assert done.exit_code == 0, done.output
    assert len(rating.predicted("classical")) == 10
