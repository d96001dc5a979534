"""Heuristics on a user's past answers, copies of the query, and their requirements on a task."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from personaplug.analysis.metrics import get_metric
from personaplug.data import load_task, open_dataset
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData
from personaplug.methods import find_method, parse_methods
from personaplug.methods.no_lm import BaselineMethod

STARS = Task("S", "rating", ("text",), "score", ("mae",), labels=("1", "2", "3", "4", "5"))
TAGS = Task("T", "label", ("text",), "tag", ("accuracy",), labels=("cat", "dog", "cow"))
PAIRS = Task("P", "label", ("title",), None, ("accuracy",), labels=("[1]", "[2]"))
TEXTS = Task("W", "text", ("text",), "text", ("rouge_1",))


def _sample(target: str | None, *answers: str, query: str = "q") -> Sample:
    items = tuple(HistoryItem(str(k), (("text", "x"), ("tag", a)), "tag") for k, a in enumerate(answers))
    return Sample("1", "u", query, query, target, items)


def _predict(name: str, task: Task, train: list[Sample], samples: list[Sample]) -> list[str]:
    row = find_method(name)
    assert isinstance(row, BaselineMethod)
    return row.baseline.fit(task, train).predict(samples)


RATED = [_sample(target) for target in ("2", "2", "5", "5", "4", "?")]


def test_user_rating_predicts_median_and_mean() -> None:
    samples = [_sample(None, "1", "2", "5"), _sample(None, "3", "4"), _sample(None, "1", "1.4"), _sample(None, "bad")]
    assert _predict("user-median", STARS, RATED, samples) == ["2", "4", "1", "4"]  # 2, 3.5, 1.2; of 2 2 4 5 5: 4
    assert _predict("user-mean", STARS, RATED, samples) == ["3", "4", "1", "4"]  # 2.67, 3.5, 1.2; of them: 3.6


def test_user_majority_predicts_the_latest_of_equally_frequent_answers() -> None:
    train = [_sample(target) for target in ("dog", "dog", "cat", "bird")]
    samples = [
        _sample(None, "cat", "cow", "cat", "cow", "dog"),
        _sample(None, "cow", "cow", "cat"),
        _sample(None, "dog", "cat"),
        _sample(None),
        _sample(None, "bird"),
    ]
    assert _predict("user-majority", TAGS, train, samples) == ["cow", "cow", "cat", "dog", "dog"]
    assert _predict("user-majority", STARS, RATED, [_sample(None, "4.0", "4", "1"), _sample(None)]) == ["4", "5"]


def test_copy_returns_the_query_or_its_first_words() -> None:
    samples = [_sample(None, query="One  two\nthree four"), _sample(None, query="One")]
    assert _predict("copy", TEXTS, [], samples) == ["One  two\nthree four", "One"]
    assert _predict("copy:3", TEXTS, [], samples) == ["One two three", "One"]


def test_user_words_orders_by_frequency_then_recency() -> None:
    samples = [
        _sample(None, "Explore Rome again", "the the the end", "Explore: the Alps", "Rome, again!"),
        _sample(None),
    ]
    # Two texts each: first rome and again (latest text), then explore and the (text before); later words first.
    assert _predict("user-words:4", TEXTS, [], samples) == ["rome again explore the", ""]
    assert _predict("user-words", TEXTS, [], samples)[0].split() == ["rome", "again", "explore", "the", "alps", "end"]


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("user-median", TEXTS, "has none. For free text.*copy:10"),
        ("user-median", TAGS, "kind rating.*user-majority"),
        ("user-mean@wrong-user", TAGS, "kind rating"),
        ("user-majority", TEXTS, "free text"),
        ("user-majority", PAIRS, "answer_field"),
        ("classical", TEXTS, "free text"),
        ("copy", STARS, "with free text"),
        ("copy:10", TAGS, "with free text"),
        ("user-words", TAGS, "with free text"),
    ],
)
def test_check_of_an_unsuitable_task_names_the_requirement(name: str, task: Task, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_method(name).check(task)
    for method in parse_methods("plain,plug,bm25:4"):
        method.check(task)


def test_fit_without_training_answers_raises() -> None:
    for name, task in (("user-median", STARS), ("user-majority", TAGS)):
        with pytest.raises(MissingData, match="has an answer among"):
            _predict(name, task, [_sample("?")], [_sample(None)])


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


QUICK = ("Movie_stars", "News_category", "LaMP_7")  # each heuristic, on ratings, labels and texts


@lru_cache(maxsize=2)
def _read(folder: Path, split: str) -> list[Sample]:
    return list(open_dataset(folder, split, task=load_task(folder)))


@pytest.mark.parametrize(
    ("name", "row", "references"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=() if case[0] in QUICK else pytest.mark.slow)
        for case in REFERENCES
    ],
)
def test_heuristics_meet_reference_scores(shared_data: Path, name: str, row: str, references: dict[str, float]) -> None:
    task = load_task(shared_data / name)
    train = [] if row.startswith("copy") else _read(shared_data / name, "train")
    dev = _read(shared_data / name, "dev")
    predictions = _predict(row, task, train, dev)
    golds = [sample.target or "" for sample in dev]
    scores = {metric: get_metric(metric, labels=task.labels).score(predictions, golds) for metric in references}
    assert scores == pytest.approx(references, abs=0.0006)  # the README rounds to three places
