"""Rules on a user's own answers, copies, what they ask of a task; rows without a language model in a whole table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from personaplug.analysis.metrics import get_metric
from personaplug.baselines.heuristics import check_rules, fit_rule
from personaplug.cli.main import main
from personaplug.config_parsing import load_config
from personaplug.data import load_task, open_dataset
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.simulation import SimulationConfig, write_simulation
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData, RunConflict
from personaplug.evaluation.evaluator import Evaluation, evaluate, predict
from personaplug.methods import condition_of, parse_conditions
from personaplug.run import Models, Run, drawn, open_models
from personaplug.training.recipes import Trainings

STARS = Task("S", "rating", ("text",), "score", ("mae",), labels=("1", "2", "3", "4", "5"))
TAGS = Task("T", "label", ("text",), "tag", ("accuracy",), labels=("cat", "dog", "cow"))
PAIRS = Task("P", "label", ("title",), None, ("accuracy",), labels=("[1]", "[2]"))
TEXTS = Task("W", "text", ("text",), "text", ("rouge_1",))
TINY = ["llm=toy", "encoder=hash:32", "dtype=float32", "resamples=100", "seeds=0,1", "train_limit=10"]


def _sample(target: str | None, *answers: str, query: str = "q") -> Sample:
    items = tuple(HistoryItem(str(k), (("text", "x"), ("tag", a)), "tag") for k, a in enumerate(answers))
    return Sample("1", "u", query, query, target, items)


def _said(name: str, task: Task, train: list[Sample], asked: list[Sample]) -> list[str]:
    rule = condition_of(name).rule
    assert rule is not None
    return fit_rule(rule, task, train).answers(asked)


RATED = [_sample(target) for target in ("2", "2", "5", "5", "4", "?")]


def test_median_and_mean_of_the_users_own_ratings() -> None:
    asked = [_sample(None, "1", "2", "5"), _sample(None, "3", "4"), _sample(None, "1", "1.4"), _sample(None, "bad")]
    assert _said("user-median", STARS, RATED, asked) == ["2", "4", "1", "4"]  # 2, 3.5, 1.2; of 2 2 4 5 5: 4
    assert _said("user-mean", STARS, RATED, asked) == ["3", "4", "1", "4"]  # 2.67, 3.5, 1.2; of them: 3.6


def test_the_users_majority_is_the_one_given_last_of_several() -> None:
    train = [_sample(target) for target in ("dog", "dog", "cat", "bird")]
    asked = [
        _sample(None, "cat", "cow", "cat", "cow", "dog"),
        _sample(None, "cow", "cow", "cat"),
        _sample(None, "dog", "cat"),
        _sample(None),
        _sample(None, "bird"),
    ]
    assert _said("user-majority", TAGS, train, asked) == ["cow", "cow", "cat", "dog", "dog"]
    assert _said("user-majority", STARS, RATED, [_sample(None, "4.0", "4", "1"), _sample(None)]) == ["4", "5"]


def test_copies_of_the_query() -> None:
    asked = [_sample(None, query="One  two\nthree four"), _sample(None, query="One")]
    assert _said("copy", TEXTS, [], asked) == ["One  two\nthree four", "One"]
    assert _said("copy:3", TEXTS, [], asked) == ["One two three", "One"]


def test_the_words_that_most_of_a_users_texts_hold() -> None:
    asked = [_sample(None, "Explore Rome again", "the the the end", "Explore: the Alps", "Rome, again!"), _sample(None)]
    # In two texts each: rome, again (the last), explore, the (the one before), and so on by how late they come.
    assert _said("user-words:4", TEXTS, [], asked) == ["rome again explore the", ""]
    assert _said("user-words", TEXTS, [], asked)[0].split() == ["rome", "again", "explore", "the", "alps", "end"]


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [
        ("user-median", TEXTS, "has none: it writes free text.*copy:10"),
        ("user-median", TAGS, "kind rating.*user-majority"),
        ("user-mean@wrong-user", TAGS, "kind rating"),
        ("user-majority", TEXTS, "free text"),
        ("user-majority", PAIRS, "answer_field"),
        ("classical", TEXTS, "free text"),
        ("copy", STARS, "is for free text"),
        ("copy:10", TAGS, "is for free text"),
        ("user-words", TAGS, "is for free text"),
    ],
)
def test_a_rule_that_does_not_fit_the_task_says_what_it_needs(name: str, task: Task, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_rules(parse_conditions(f"plain,{name}"), task)
    check_rules(parse_conditions("plain,plug,bm25:4"), task)


def test_nothing_is_known_without_training_answers() -> None:
    for name, task in (("user-median", STARS), ("user-majority", TAGS)):
        with pytest.raises(MissingData, match="has an answer among"):
            _said(name, task, [_sample("?")], [_sample(None)])


REFERENCES = [
    ("Critic_rating", "user-median", {"accuracy": 0.403, "mae": 0.751, "rmse": 1.049}),
    ("Critic_rating", "user-mean", {"accuracy": 0.384, "mae": 0.753, "rmse": 1.025}),
    ("Critic_rating", "user-majority", {"accuracy": 0.402, "mae": 0.787, "rmse": 1.115}),
    ("Movie_stars", "user-median", {"accuracy": 0.541, "mae": 0.644, "rmse": 1.062}),
    ("Movie_stars", "user-mean", {"accuracy": 0.475, "mae": 0.682, "rmse": 1.024}),
    ("Movie_stars", "user-majority", {"accuracy": 0.558, "mae": 0.685, "rmse": 1.181}),
    # the README's macro-F1, .334, is over the 14 of 15 labels that occur
    ("News_category", "user-majority", {"accuracy": 0.596, "f1": 0.334 * 14 / 15}),
    ("LaMP_7", "copy", {"rouge_1": 0.483, "rouge_l": 0.423}),
    ("LaMP_7", "copy:10", {"rouge_1": 0.375, "rouge_l": 0.330}),
    ("LaMP_4", "copy", {"rouge_1": 0.117, "rouge_l": 0.098}),
    ("LaMP_4", "copy:10", {"rouge_1": 0.106, "rouge_l": 0.094}),
    ("News_headline", "copy", {"rouge_1": 0.113, "rouge_l": 0.094}),
    ("News_headline", "copy:10", {"rouge_1": 0.091, "rouge_l": 0.081}),
    ("Scholarly_title", "copy", {"rouge_1": 0.112, "rouge_l": 0.086}),
    ("Scholarly_title", "copy:10", {"rouge_1": 0.225, "rouge_l": 0.196}),
]


@pytest.mark.parametrize(("name", "row", "wanted"), REFERENCES, ids=[f"{n}-{r}" for n, r, _ in REFERENCES])
def test_the_reference_scores_are_met(shared_data: Path, name: str, row: str, wanted: dict[str, float]) -> None:
    task = load_task(shared_data / name)
    train = [] if row.startswith("copy") else list(open_dataset(shared_data / name, "train", task=task))
    dev = list(open_dataset(shared_data / name, "dev", task=task))
    said = _said(row, task, train, dev)
    golds = [sample.target or "" for sample in dev]
    found = {metric: get_metric(metric, labels=task.labels).score(said, golds) for metric in wanted}
    assert found == pytest.approx(wanted, abs=0.0006)  # the README rounds to three places


# ---- in a whole table


class Stage:
    """A run whose data is noted, as training notes it, and its data."""

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

    def evaluate(self, names: str, *, settings: tuple[str, ...] = (), train: bool = True) -> Any:
        return evaluate(
            self.run,
            self.reader("dev"),
            split="dev",
            config=load_config(overrides=settings, base=self.config).evaluation,
            conditions=parse_conditions(names),
            models=self.models,
            train=self.reader("train") if train else None,
        ).to_json()

    def told(self, name: str) -> list[str]:
        path = self.run.folder / "evaluations" / "dev" / f"{name.replace(':', '-')}.seed-0.json"
        return [gold["output"] for gold in json.loads(path.read_text())["golds"]]


@pytest.fixture(scope="module")
def rating(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("rating"))


def test_rows_of_a_table_ask_no_model(rating: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rating.models.llm, "score", lambda *_, **__: pytest.fail("a rule asked the model"))
    results = rating.evaluate("classical,classical@wrong-user,classical:text,user-median,user-mean,user-majority")
    rows = {row["condition"]: row for row in results["rows"]}
    for row in rows.values():
        assert (row["decoding"], row["seeds"], row["invalid_rate"]) == ("computed", [0], 0)
        assert (row["prompt_tokens_mean"], row["costs"]["bytes_per_user"]) == (None, None)
        assert row["fit_seconds"] >= 0
    assert {"versions", "rows"} <= results.keys()
    assert results["versions"]["scikit-learn"]
    for sample, said in zip(rating.reader("dev"), rating.told("user-median"), strict=True):
        middle = np.median([float(item.answer or "") for item in sample.history])
        assert said == str(int(np.floor(middle + 0.5)))


def test_a_rule_is_fitted_once_on_the_samples_that_the_plug_has(rating: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[list[str]] = []

    def noted(rule: Any, task: Task, train: Any) -> Any:
        fitted.append([sample.id for sample in train])
        return fit_rule(rule, task, train)

    monkeypatch.setattr("personaplug.baselines.heuristics.fit_rule", noted)
    rating.evaluate("classical,classical@wrong-user,classical@shuffled")
    of_the_plug = [sample.id for sample in Trainings(rating.run, rating.reader("train"), models=rating.models).plain]
    assert fitted == [of_the_plug]
    assert len(of_the_plug) == 10 < len(list(rating.reader("train")))
    assert of_the_plug == [sample.id for sample in drawn(rating.reader("train"), limit=10, seed=0)]


def test_a_rules_stranger_is_that_of_all_other_rows(rating: Stage) -> None:
    rating.evaluate("user-mean@wrong-user")
    evaluation = Evaluation(
        rating.run, rating.reader("dev"), split="dev", config=rating.config.evaluation, models=rating.models
    )
    lenders = evaluation.showing.show(condition_of("bm25:1@wrong-user"), seed=0).lenders
    texts = evaluation.showing.texts()
    for sample, lender, said in zip(texts, lenders, rating.told("user-mean@wrong-user"), strict=True):
        assert lender is not None
        assert texts[lender].owner != sample.owner
        mean = np.mean([float(item.answer or "") for item in texts[lender].history])
        assert said == str(int(np.floor(mean + 0.5)))


def test_only_the_latest_items_are_shown_where_so_many_are_asked_for(rating: Stage) -> None:
    rating.evaluate("user-median", settings=("max_eval_history=1",))
    assert rating.told("user-median") == [sample.history[-1].answer for sample in rating.reader("dev")]
    row = rating.evaluate("user-median,classical", settings=("max_eval_history=0",))["rows"][0]
    targets = [float(sample.target or "") for sample in drawn(rating.reader("train"), limit=10, seed=0)]
    assert set(rating.told("user-median")) == {str(int(np.floor(np.median(targets) + 0.5)))}
    assert row["lost_history_rate"] == 1


def test_the_training_split_is_needed_and_must_be_the_runs(rating: Stage, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="training split"):
        rating.evaluate("classical", train=False)
    other = Stage(tmp_path / "other")
    with pytest.raises(RunConflict, match="other training data"):
        evaluate(
            replace(rating.run),
            rating.reader("dev"),
            split="dev",
            config=rating.config.evaluation,
            conditions=parse_conditions("user-mean"),
            models=rating.models,
            train=open_dataset(other.data, "dev", task=rating.run.task),
        )


def test_free_text_is_copied_and_predicted_without_a_training_split(tmp_path: Path) -> None:
    stage = Stage(tmp_path, kind="style")
    row = stage.evaluate("copy:2,copy", train=False)["rows"][0]
    assert row["metrics"]["rouge_1"] >= 0
    assert stage.told("copy") == [sample.query for sample in stage.reader("dev")]
    (path,) = predict(
        stage.run,
        stage.reader("dev"),
        split="dev",
        conditions=parse_conditions("copy:2"),
        config=stage.config.evaluation,
        models=stage.models,
    )
    golds = json.loads(path.read_text())["golds"]
    assert [gold["output"] for gold in golds] == [" ".join(s.query.split()[:2]) for s in stage.reader("dev")]
    with pytest.raises(ConfigError, match="free text"):
        stage.evaluate("copy,user-median")


def test_the_command_line_fits_them_on_the_datas_train_split(rating: Stage) -> None:
    words = ["--run", str(rating.run.folder), "--data", str(rating.data), "--conditions", "classical,user-median"]
    done = CliRunner().invoke(main, ["evaluate", *words])
    assert done.exit_code == 0, done.output
    assert "user-median" in done.output
    assert "computed" in done.output
    done = CliRunner().invoke(main, ["predict", *words, "--split", "dev"])
    assert done.exit_code == 0, done.output
    assert len(rating.told("classical")) == 10
