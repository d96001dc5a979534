"""Plugins: a row, a reader, an encoder and a metric that are registered from outside the package."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from personaplug import encoders
from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metrics import METRICS, Array, Metric, register_metric
from personaplug.analysis.results_file import Results
from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.benchmarks import BENCHMARKS, register_reader
from personaplug.data.record_reader import RecordReader
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.data.task import Task
from personaplug.encoders import EncoderIdentity, QueryEncoder, register_encoder
from personaplug.encoders.base import Vectors
from personaplug.errors import ConfigError
from personaplug.evaluation.evaluator import evaluate
from personaplug.methods import Method, ModelInputs, parse_methods, register_method
from personaplug.methods.context import Assignment, EvalContext
from personaplug.methods.predictions import Predictions
from personaplug.methods.registry import _METHODS
from personaplug.run import Run, open_models
from personaplug.training.parts import train


# ---- a row
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


# ---- a reader
class ReviewTable(RecordReader):
    """Read a table of reviews; the last review of each user becomes the question."""

    def __init__(self, path: str | Path, split: str, **limits: Any) -> None:
        task = Task("Reviews", "rating", ("text",), "score", ("mae",), labels=("1", "2", "3", "4", "5"))
        super().__init__(task, **limits)
        self.path = Path(path)

    def _samples(self) -> Iterator[Sample]:
        by_user: dict[str, list[HistoryItem]] = {}
        with self.path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                item = HistoryItem(str(number), (("text", row["text"]), ("score", row["score"])), "score")
                by_user.setdefault(row["user"], []).append(item)
        for user, (*history, last) in by_user.items():
            items = [(None, item) for item in history]
            yield self._sample_of(last.id, user, dict(last.fields)["text"], target=last.answer, items=items)


# ---- an encoder
class LengthQueries(QueryEncoder):
    """Encode queries like LengthEncoder encodes items."""

    width = 2

    def features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"angle": torch.tensor([len(text) / 100 for text in texts])}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return torch.stack([features["angle"].cos(), features["angle"].sin()], dim=1)


class LengthEncoder:
    """Encode the length of a text as an angle."""

    width, truncated = 2, 0
    identity = EncoderIdentity("length", None, "none", True, "", "", None, 2, "0")

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Vectors:
        angles = np.array([len(text) / 100 for text in texts], dtype=np.float32)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def query_encoder(self) -> QueryEncoder:
        return LengthQueries()


# ---- a metric
class TooHigh(Metric):
    """The share of predicted ratings above the reference."""

    name = "too_high"
    greater_is_better = False

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        pairs = zip(predictions, golds, strict=True)
        return np.array([[float(predicted) > float(gold)] for predicted, gold in pairs], dtype=np.float64)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Register the parts for one test."""
    registries: list[dict[str, Any]] = [_METHODS, BENCHMARKS, encoders._factories, METRICS]
    before = [dict(registry) for registry in registries]
    register_method("latest-answer", lambda _: LatestAnswer(info=MethodInfo("latest-answer", "no-lm", "own")))
    register_reader("review-table", ReviewTable)
    register_encoder("length", lambda argument, device: LengthEncoder())
    register_metric(TooHigh)
    yield
    for registry, parts in zip(registries, before, strict=True):
        registry.clear()
        registry.update(parts)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_simulation(SimulationConfig(users=6, queries_per_user=2, dev_users=8, min_items=3), tmp_path / "data")
    return tmp_path / "data"


def _results(data: Path, folder: Path, rows: str, *, encoder: str = "hash:32", trained: bool = False) -> Results:
    config = load_config(
        overrides=["llm=toy", f"encoder={encoder}", "dtype=float32", "resamples=100", "epochs=1", "controls=false"]
    )
    run, models = Run.create(folder, config=config, task=load_task(data)), open_models(config)
    if trained:
        train(run, open_dataset(data, "train", task=run.task), models=models)
    dev = open_dataset(data, "dev", task=run.task)
    return evaluate(run, dev, split="dev", methods=parse_methods(rows), config=config.evaluation, models=models)


def test_plugin_row_and_its_control_are_in_the_table(data: Path, tmp_path: Path) -> None:
    results = _results(data, tmp_path / "run", "plain,latest-answer,latest-answer@wrong-user")
    assert [row.name for row in results.rows] == ["plain", "latest-answer", "latest-answer@wrong-user"]
    samples = list(open_dataset(data, "dev", task=load_task(data)))
    errors = [abs(float(s.target or "") - float(s.history[-1].answer or "")) for s in samples]
    assert results.by_name["latest-answer"].metrics["mae"] == pytest.approx(np.mean(errors))
    assert "latest-answer" in results.personal_gains("mae")


def test_convert_uses_a_plugin_reader(tmp_path: Path) -> None:
    table = tmp_path / "reviews.csv"
    table.write_text("user,text,score\nann,good,5\nbob,bad,1\nann,fine,4\nann,what now,3\n", encoding="utf-8")
    done = CliRunner().invoke(
        main, ["convert", "review-table", str(table), "--split", "dev", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    ann, bob = open_dataset(tmp_path / "out", "dev", task=load_task(tmp_path / "out"))
    assert ([item.answer for item in ann.history], ann.target, ann.query) == (["5", "4"], "3", "what now")
    assert (bob.history, bob.target) == ((), "1")


def test_plug_works_with_a_plugin_encoder(data: Path, tmp_path: Path) -> None:
    results = _results(data, tmp_path / "run", "plug", encoder="length", trained=True)
    assert np.isfinite(results.by_name["plug"].metrics["mae"])
    assert "length" in results.about.encoder


def test_plugin_metric_is_a_column(data: Path, tmp_path: Path) -> None:
    task = data / "task.json"
    task.write_text(task.read_text(encoding="utf-8").replace('"mae"', '"too_high"'), encoding="utf-8")
    results = _results(data, tmp_path / "run", "latest-answer")
    samples = list(open_dataset(data, "dev", task=load_task(data)))
    too_high = [float(s.history[-1].answer or "") > float(s.target or "") for s in samples]
    assert results.by_name["latest-answer"].metrics["too_high"] == pytest.approx(np.mean(too_high))


def test_duplicate_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="The row 'plug' already exists"):
        register_method("plug", lambda _: LatestAnswer(info=MethodInfo("plug")))
    with pytest.raises(ConfigError, match="The metric 'too_high' already exists"):
        register_metric(type("TooHigh", (TooHigh,), {}))
