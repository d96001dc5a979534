"""Regressions: compared with numpy on tiny data, and with the reference scores of the data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score

from personaplug.analysis.metrics import get_metric
from personaplug.baselines.regression import (
    LabelModel,
    OptionModel,
    Part,
    RatingModel,
    Regression,
    Words,
    best_strength,
    content,
)
from personaplug.data import load_task, open_dataset
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData
from personaplug.methods.context import assign_histories

STARS = Task("S", "rating", ("text",), "score", ("mae",), labels=("1", "2", "3", "4", "5"))
TAGS = Task("T", "label", ("text",), "tag", ("accuracy",), labels=("cat", "dog", "cow"))
PAIRS = Task("P", "label", ("title",), None, ("accuracy",), labels=("[1]", "[2]"))
NAMES = "abcdefghijkl"


def _sample(user: str, query: str, target: str | None, *answers: str, prompt: str = "") -> Sample:
    items = tuple(HistoryItem(str(k), (("text", "x"), ("score", a)), "score") for k, a in enumerate(answers))
    return Sample(f"{user}{query}", user, prompt or query, query, target, items)


def _pair(user: str, title: str, right: int, *titles: str) -> Sample:
    """Return a question whose option `right` is the title; `titles` are those of the user's items."""
    options = ["other thing", "other thing"]
    options[right] = title
    prompt = f"Which fits {title}? [1]: {options[0]} [2]: {options[1]}"
    items = tuple(HistoryItem(str(k), (("title", text),), None) for k, text in enumerate(titles))
    return Sample(f"{user}{title}", user, prompt, title, f"[{right + 1}]", items)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_rating_model_on_histories_equals_the_closed_form() -> None:
    rng = _rng()
    train = [
        _sample(user, "words", str(rng.integers(1, 6)), *(str(n) for n in rng.integers(1, 6, size=4)))
        for user in NAMES
        for _ in range(3)
    ]
    model = Regression("history").fit(STARS, train)
    assert isinstance(model, RatingModel)
    answers = np.array([[float(item.answer or "") for item in sample.history] for sample in train])
    shares = np.stack([(answers == label).mean(axis=1) for label in range(1, 6)], axis=1)
    rest = [answers.mean(axis=1), np.median(answers, axis=1), answers.std(axis=1), answers.mean(axis=1)]
    rows = np.column_stack([shares, *rest])
    targets = np.array([float(sample.target or "") for sample in train])
    centred = rows - rows.mean(axis=0)
    weights = np.linalg.solve(
        centred.T @ centred + model.strength * np.eye(rows.shape[1]), centred.T @ (targets - targets.mean())
    )
    expected = targets.mean() + centred @ weights
    assert model.ridge.predict(model.features(train)) == pytest.approx(expected, abs=1e-3)
    # half up, within the scale
    assert model.predict(train) == [str(int(np.clip(np.floor(value + 0.5), 1, 5))) for value in expected]


def test_best_strength_is_chosen_on_held_out_users() -> None:
    rng = np.random.default_rng(1)
    own, targets = (np.repeat(drawn, 10, axis=0) for drawn in (rng.normal(size=(12, 30)), rng.normal(size=12)))
    rows = sparse.csr_matrix(own)
    # These rows identify users: they predict other samples of the same user, but not those of other users.
    assert best_strength(rows, targets, owners=[user for user in NAMES for _ in range(10)]) == 300.0
    assert best_strength(rows, targets, owners=[str(k) for k in range(120)]) == 0.1
    with pytest.raises(ConfigError, match=r"2 or more users.*found 1"):
        best_strength(rows, targets, owners=["a"] * 120)


def test_words_weighs_ngrams_that_two_texts_share() -> None:
    texts = ["red cat", "red cat sat", "blue dog", "blue hen"]
    rows = Words(texts)(["red cat", "hen", ""]).toarray()
    plain = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, vocabulary=["blue", "cat", "red", "red cat"])
    assert rows == pytest.approx(plain.fit(texts).transform(["red cat", "hen", ""]).toarray())
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 0, 0])
    assert Words(["only this", "and that"])(["this"]).nnz == 1  # no word in two texts
    assert Words(["", "!"])(["this", "that"]).toarray().tolist() == [[0], [0]]  # no words
    assert Words(texts)([]).shape == (0, 4)


def _predict_with_preferences(part: Part, samples: Sequence[Sample]) -> list[str]:
    """Predict after training on users whose answer follows both from the query and from their past answers."""
    rng = _rng()
    train = []
    for user in NAMES * 4:
        own = str(rng.choice(["cat", "dog"]))
        train.append(_sample(user, f"a plain question {own}ish", own, own, own, own))
    return Regression(part).fit(TAGS, train).predict(samples)


def test_regression_uses_only_the_named_part() -> None:
    conflicting = [_sample("z", "catish", None, "dog", "dog"), _sample("z", "dogish", None, "cat", "cat")]
    assert _predict_with_preferences("text", conflicting) == ["cat", "dog"]
    assert _predict_with_preferences("history", conflicting) == ["dog", "cat"]
    agreeing = [_sample("z", "catish", None, "cat"), _sample("z", "dogish", None, "dog")]
    assert _predict_with_preferences("both", agreeing) == ["cat", "dog"]


def test_regression_treats_a_user_without_answers_as_average() -> None:
    train = [_sample(user, "q", str(score), *[str(score)] * 3) for user, score in zip(NAMES, [4, 5] * 6, strict=True)]
    model = Regression("both").fit(STARS, train)
    assert isinstance(model, RatingModel)
    nobody = _sample("z", "q", None)
    assert model.ridge.predict(model.features([nobody])) == pytest.approx([4.5])
    assert model.predict([nobody]) == ["5"]
    # also if a training user has no answers
    assert Regression("history").fit(STARS, [*train, _sample("n", "q", "5")]).predict([nobody]) == ["5"]


def test_regression_uses_ratings_between_labels_as_numbers() -> None:
    train = [_sample(user, "q", str(s), f"{s}.0", f"{s - 0.5}") for user, s in zip(NAMES, [2, 3, 4] * 4, strict=True)]
    model = Regression("history").fit(STARS, train)
    assert model.predict([_sample("z", "q", None, "2.0", "1.5"), _sample("z", "q", None, "4", "3.5")]) == ["2", "4"]


def test_label_model_with_one_label_predicts_it() -> None:
    train = [_sample(user, "q", "cow", "cat") for user in "ab"]
    model = Regression("both").fit(TAGS, train)
    assert isinstance(model, LabelModel)
    assert model.predict(train) == ["cow", "cow"]


def test_option_model_compares_options_with_question_and_items() -> None:
    titles = [
        f"{word} {other}" for word in ("zebra", "tiger", "heron") for other in ("nests", "herds", "paths", "tails")
    ]
    train = [
        _pair(user, title, k % 2, title, "else") for k, (user, title) in enumerate(zip(NAMES, titles, strict=True))
    ]
    for part in get_args(Part):
        model = Regression(part).fit(PAIRS, train)
        assert isinstance(model, OptionModel)
        assert model.predict(train) == [sample.target for sample in train]
    model = Regression("both").fit(PAIRS, train)
    assert isinstance(model, OptionModel)
    advantages = model.advantages(train[:1])
    words = model._words
    options = words([titles[0], "other thing"]).toarray()
    question, items = words([titles[0]]).toarray()[0], words([titles[0], "else"]).toarray()
    cosines = np.column_stack([options @ question, (options @ items.T).mean(1), (options @ items.T).max(1)])
    assert advantages[0] == pytest.approx(cosines - cosines[::-1])
    bare = [Sample("n", "n", "no options here", "q", None), _pair("m", "zebra nests", 1)]
    assert model.advantages(bare)[0].tolist() == [[0.0] * 3] * 2
    assert model.advantages(bare)[1, :, 1:].tolist() == [[0.0] * 2] * 2  # zeros without items
    assert model.predict(bare)[1] == "[2]"


def test_content_leaves_out_the_answer() -> None:
    assert content(HistoryItem("1", (("text", "a film"), ("score", "5")), "score")) == "a film"
    assert content(HistoryItem("1", (("text", "a tweet"),), "text")) == "a tweet"


def test_regression_rejects_unsuitable_samples() -> None:
    with pytest.raises(MissingData, match="has an answer among"):
        Regression("text").fit(TAGS, [_sample("a", "q", "bird"), _sample("b", "q", None)])
    bare = Task("B", "label", ("text",), None, ("accuracy",), labels=("cat", "dog"))
    with pytest.raises(ConfigError, match=r"answer_field.*classical:text"):
        Regression("both").fit(bare, [_sample("a", "q", "cat")])
    train = [_sample("a", "red", "cat"), _sample("b", "blue", "dog")]
    assert Regression("text").fit(bare, train).predict(train) == ["cat", "dog"]


# The README of the data sets has these scores, from the same models.
REFERENCES: list[tuple[str, Part, dict[str, float]]] = [
    ("Critic_rating", "text", {"accuracy": 0.445, "mae": 0.655, "rmse": 0.928}),
    ("Critic_rating", "history", {"accuracy": 0.337, "mae": 0.798, "rmse": 1.039}),
    ("Critic_rating", "both", {"accuracy": 0.463, "mae": 0.626, "rmse": 0.899}),
    ("Movie_stars", "text", {"accuracy": 0.276, "mae": 0.901, "rmse": 1.176}),
    ("Movie_stars", "history", {"accuracy": 0.445, "mae": 0.709, "rmse": 1.037}),
    ("Movie_stars", "both", {"accuracy": 0.454, "mae": 0.697, "rmse": 1.026}),
    ("News_category", "text", {"accuracy": 0.639, "f1": 0.265}),
    ("News_category", "history", {"accuracy": 0.601, "f1": 0.326}),
    ("News_category", "both", {"accuracy": 0.672, "f1": 0.403}),
    ("Citation", "text", {"accuracy": 0.651}),
    ("Citation", "history", {"accuracy": 0.599}),
    ("Citation", "both", {"accuracy": 0.683}),
]


QUICK = {("Movie_stars", "both"), ("News_category", "history"), ("Citation", "both")}  # one of each kind of task


@lru_cache(maxsize=2)
def _read(folder: Path, split: str) -> list[Sample]:
    return list(open_dataset(folder, split, task=load_task(folder)))


@pytest.mark.parametrize(
    ("name", "part", "references"),
    [
        pytest.param(*row, id=f"{row[0]}-{row[1]}", marks=() if row[:2] in QUICK else pytest.mark.slow)
        for row in REFERENCES
    ],
)
def test_regression_meets_reference_scores(
    shared_data: Path, name: str, part: Part, references: dict[str, float]
) -> None:
    task = load_task(shared_data / name)
    model = Regression(part).fit(task, _read(shared_data / name, "train"))
    dev = _read(shared_data / name, "dev")
    predictions, golds = model.predict(dev), [sample.target or "" for sample in dev]
    for metric, reference in references.items():
        # The README's macro-F1 is over the labels that occur.
        score = (
            f1_score(golds, predictions, average="macro")
            if metric == "f1"
            else get_metric(metric, labels=task.labels).score(predictions, golds)
        )
        assert score == pytest.approx(reference, abs=0.015), metric
    if part == "history":
        owners, items = [sample.owner for sample in dev], [np.arange(len(sample.history)) for sample in dev]
        sources = [assignment.source for assignment in assign_histories("wrong-user", owners, items, seed=0)]
        with_other_histories = [
            replace(sample, history=dev[source].history)
            for sample, source in zip(dev, sources, strict=True)
            if source is not None
        ]
        accuracy = get_metric("accuracy", labels=task.labels)
        assert accuracy.score(model.predict(with_other_histories), golds) < references["accuracy"] - 0.015
