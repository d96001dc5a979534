"""The instruments of texts in a table: known bounds, the same own words for all rows, and no labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaplug.analysis.own_words import words_of
from personaplug.analysis.results_file import Results
from personaplug.analysis.tables import metric_title, results_table, tables
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import turns_of
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.encoders.encoded_sample import past_answers
from personaplug.errors import ConfigError, MissingData
from personaplug.evaluation import instruments
from personaplug.evaluation.evaluator import Evaluator, evaluate, predict
from personaplug.evaluation.instruments import TEXT_INSTRUMENTS
from personaplug.evaluation.measurements import Measurements
from personaplug.methods import find_method, identification, parse_methods
from personaplug.run import Models, Run, open_models

SETTINGS = [
    *("llm=toy", "encoder=hash:32", "dtype=float32", "resamples=200", "num_beams=1", "max_new_tokens=3", "seeds=0,1"),
    "evaluation_batch_size=4",
]


class Stage:
    """A run without trained parts, on simulated users."""

    def __init__(self, place: Path, *, kind: Any) -> None:
        self.data = place / "data"
        simulation = SimulationConfig(
            task=kind, users=4, dev_users=6, queries_per_user=1, dev_queries_per_user=2, min_items=4, max_items=8
        )
        write_simulation(simulation, self.data)
        self.config = load_config(overrides=SETTINGS)
        self.run = Run.create(place / "run", config=self.config, task=load_task(self.data))
        self.models: Models = open_models(self.config)

    def arguments(self, *settings: str) -> dict[str, Any]:
        config = load_config(overrides=[*SETTINGS, *settings]).evaluation
        return {"split": "dev", "config": config, "models": self.models}

    def evaluate(self, names: str, *settings: str) -> Results:
        reader = open_dataset(self.data, "dev", task=self.run.task)
        return evaluate(self.run, reader, methods=parse_methods(names), **self.arguments(*settings))

    def evaluator(self, *settings: str) -> Evaluator:
        return Evaluator(self.run, open_dataset(self.data, "dev", task=self.run.task), **self.arguments(*settings))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("texts"), kind="style")


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("ratings"), kind="rating")


def test_right_answers_are_the_ceiling_and_a_strangers_answers_the_floor(texts: Stage) -> None:
    results = texts.evaluate("plain,user-words,user-words@wrong-user,reference,reference@wrong-user")
    rows = {row.name: row.metrics for row in results.rows}
    assert rows["reference"]["rouge_1"] == 1
    for metric in ("own_words_recall", "own_words_precision", "attribution"):
        assert rows["reference"][metric] > rows["reference@wrong-user"][metric]
    assert rows["reference"]["own_words_recall"] == 1
    assert rows["reference"]["form_distance"] == 0 < rows["reference@wrong-user"]["form_distance"]
    assert rows["reference"]["attribution"] > 0.8 > rows["reference@wrong-user"]["attribution"]
    assert rows["user-words"]["own_words_recall"] > 0
    gains = results.personal_gains("attribution")
    assert gains["reference"].difference > 0
    assert gains["user-words"].p is not None


def test_own_words_are_those_of_the_user_and_of_the_stranger_with_the_same_seed(texts: Stage) -> None:
    measured = texts.evaluator().instruments
    assert measured is not None
    context = measured.context
    draws = [[a.source for a in context.assign("wrong-user", seed=seed)] for seed in (0, 1)]
    assert draws[0] != draws[1]
    for seed, sources in enumerate(draws):
        own = measured.own(seed)
        assert own is not None
        assert any(own)
        for words, sample, source in zip(own, context.texts, sources, strict=True):
            assert source is not None
            past, stranger = (words_of(past_answers(text.history)) for text in (sample, context.texts[source]))
            inputs = words_of(text for _, text in turns_of(sample.full_prompt))
            assert words == (words_of([sample.target or ""]) & (past ^ stranger)) - inputs


def test_words_of_a_text_are_computed_once(texts: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counted(some: list[str]) -> Any:
        seen.extend(some)
        return words_of(some)

    monkeypatch.setattr(instruments, "words_of", counted)
    evaluator = texts.evaluator()
    assert evaluator.instruments is not None
    for seed in (0, 1):
        evaluator.instruments.own(seed)
    assert len(seen) == len({*seen}) > 0


def test_instruments_do_not_depend_on_the_items_that_rows_see(texts: Stage) -> None:
    whole, few = texts.evaluate("reference"), texts.evaluate("reference", "max_eval_history=1")
    assert whole.rows[0].metrics == few.rows[0].metrics


def test_instruments_have_a_table_of_their_own(texts: Stage) -> None:
    results = texts.evaluate("plain,user-words,user-words@wrong-user")
    by_title = dict(tables(results))
    title = next(title for title in by_title if title.startswith("Instruments"))
    assert by_title[title].titles[0] == "method"
    assert {*map(metric_title, filter(TEXT_INSTRUMENTS.__contains__, results.metric_names))} <= {
        *by_title[title].titles
    }
    assert not [column for column in by_title[""].titles if "attribution" in column]
    assert not [column for column in by_title["Comparisons"].titles if "attribution" in column]
    assert "reciprocal rank of the right user" in results_table(results)


def test_closed_sets_of_answers_have_no_instruments(ratings: Stage) -> None:
    results = ratings.evaluate("plain")
    assert not {*results.metric_names} & {*TEXT_INSTRUMENTS}
    assert "Instruments" not in results_table(results)
    with pytest.raises(ConfigError, match="reference needs a task with free text"):
        ratings.evaluate("reference")


def test_right_answers_cannot_be_predicted_if_they_are_hidden(texts: Stage) -> None:
    reader = open_dataset(texts.data, "dev", task=texts.run.task)
    hidden = [replace(sample, target=None) for sample in reader]

    class Hidden:
        task, report = reader.task, reader.report

        def __iter__(self) -> Any:
            return iter(hidden)

    with pytest.raises(MissingData, match="reference needs right answers"):
        predict(texts.run, Hidden(), methods=[find_method("reference")], **texts.arguments())


def test_one_user_has_no_strangers(texts: Stage) -> None:
    evaluator = texts.evaluator("limit=1")
    statistics = evaluator.trial(find_method("plain"), seed=0).statistics
    assert not {*statistics} & {*TEXT_INSTRUMENTS}
    assert np.isfinite(statistics["rouge_1"]).all()


SAMPLED = ("identification_samples=7", "sampled_answers=2")


def test_rows_with_texts_identify_users_and_rows_with_a_model_have_sampled_answers(texts: Stage) -> None:
    results = texts.evaluate("plain,bm25:2,bm25:2@wrong-user,copy", *SAMPLED)
    rows = {row.name: row.metrics for row in results.rows}
    identified, sampled = {"identified_persona"}, {"rouge_1@expected", "rouge_1@best"}
    assert identified | sampled <= rows["bm25:2"].keys()
    assert identified <= rows["bm25:2@wrong-user"].keys()
    assert not identified & rows["plain"].keys()
    assert sampled <= rows["plain"].keys()
    assert not (identified | sampled) & rows["copy"].keys()
    for metrics in rows.values():
        assert metrics.get("rouge_1@best", 1) >= metrics.get("rouge_1@expected", 0)
    assert {"identified_persona", "rouge_1@expected"} <= {pair.metric for pair in results.pairs}
    assert not [note for note in results.about.notes if "missing for" in note]
    text = results_table(results)
    assert "identified_persona ↑" in text
    assert "mean score of the sampled answers" in text


def test_measurements_are_cached_beside_the_predictions(texts: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = texts.evaluate("bm25:2", *SAMPLED).rows[0].metrics

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model is asked again")

    with monkeypatch.context() as patched:
        for name in ("loss", "generate"):
            patched.setattr(texts.models.llm, name, refuse)
        assert texts.evaluate("bm25:2", *SAMPLED).rows[0].metrics == first
        with pytest.raises(AssertionError, match="asked again"):
            texts.evaluate("bm25:2", *SAMPLED, "identification_samples=6")
        with pytest.raises(AssertionError, match="asked again"):
            texts.evaluate("bm25:2", *SAMPLED, "sample_temperature=0.5")


def test_cached_ranks_depend_on_the_items_that_strangers_show(texts: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The own prompt of `recency:1` is the same with one item or with all, but a stranger's may differ."""
    keys = []
    for setting in ("max_eval_history=1", "max_eval_history=2", "item_kinds=answers"):
        evaluator = texts.evaluator("identification_samples=2", setting)
        method = find_method("recency:1")
        inputs = method.build_inputs(evaluator.context, evaluator.context.assign("own", seed=0), seed=0)
        measurements = Measurements(evaluator.context, method, inputs, stem=Path("unused."), seed=0)
        monkeypatch.setattr(measurements, "_cached", lambda *_, depends_on: keys.append(depends_on))
        assert measurements.ranks() is None
    assert len({*map(str, keys)}) == len(keys) == 3


def test_measurements_are_off_by_default_and_fail_alone(
    texts: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not [name for name in texts.evaluate("bm25:1").metric_names if "identified" in name or "@" in name]

    def too_long(*_: Any, **__: Any) -> Any:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(identification, "expected_reciprocal_rank", too_long)
    metrics = texts.evaluate("bm25:1", "identification_samples=3").rows[0].metrics
    assert "rouge_1" in metrics
    assert "identified_persona" not in metrics
    assert "bm25:1: no identification (IndexError)" in caplog.text
