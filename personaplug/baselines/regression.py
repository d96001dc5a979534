"""Regressions on TF-IDF of texts and features of histories, which predict labels without a language model.

- ratings: ridge regression on the number; cross-validation over users chooses its strength;
- options after markers ([1], [2]) in the prompt: logistic regression on the similarities of an option to the question
  and to the user's items, minus those of the other options;
- other labels: logistic regression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import numpy as np
from scipy import sparse
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold

from personaplug.baselines.no_lm import Baseline, Predictor
from personaplug.data.label_set import Array, LabelIds, LabelSet, ratings
from personaplug.data.records import HistoryItem, Options, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData

_RIDGE_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_FOLDS = 5
_LOGISTIC = {"C": 10.0, "max_iter": 2000}

Part = Literal["both", "text", "history"]


@dataclass(frozen=True)
class Regression(Baseline):
    """The regression that fits a task, on the samples' texts, histories or both."""

    part: Part = "both"

    @property
    def name(self) -> str:  # type: ignore[override]  # derived from the part
        return "classical" if self.part == "both" else f"classical:{self.part}"

    def fit(self, task: Task, train: Sequence[Sample]) -> Predictor:
        label_set = LabelSet(task.labels)
        train = [sample for sample in train if label_set.index(sample.target) >= 0]
        if not train:
            raise MissingData("No training sample has an answer among the task's labels, so there is nothing to fit.")
        if task.kind == "label":
            finder = OptionFinder([sample.prompt for sample in train], task.labels)
            if finder.everywhere:
                return OptionModel(label_set, finder, train, part=self.part)
        if self.part != "text" and task.answer_field is None:
            raise ConfigError(
                f"{self.name} needs history items with answers; task {task.name} declares no answer_field. Use "
                f"classical:text."
            )
        return (RatingModel if task.kind == "rating" else LabelModel)(label_set, train, part=self.part)


class Words:
    """TF-IDF of the 1- and 2-grams that two or more texts share, or of all if no two texts share any."""

    def __init__(self, texts: Iterable[str]) -> None:
        texts = list(texts)
        self._vectorizer: TfidfVectorizer | None = None
        for min_texts in (2, 1):
            try:
                vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=min_texts)
                self._vectorizer = vectorizer.fit(texts)
                return
            except ValueError:  # the vocabulary is empty
                continue

    def __call__(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Return unit rows, (n, words); zeros for a text without a known word."""
        if self._vectorizer is None:
            return sparse.csr_matrix((len(texts), 1))  # one column, because models refuse rows without columns
        if not texts:
            return sparse.csr_matrix((0, len(self._vectorizer.vocabulary_)))
        return self._vectorizer.transform(texts)


class _Features:
    """Features of samples: words of the query, answers in the history, or both.

    A user without answers counts as the average of the training users who have some.
    """

    def __init__(self, label_set: LabelSet, train: Sequence[Sample], *, part: Part) -> None:
        self.label_set, self.part = label_set, part
        self._words = Words(sample.query for sample in train) if part != "history" else None
        rows = self._of_histories(train)
        rows = rows[~np.isnan(rows[:, 0])]
        self._average = rows.mean(axis=0) if len(rows) else np.zeros(label_set.width)

    def __call__(self, samples: Sequence[Sample]) -> sparse.csr_matrix:
        """Return (n, features)."""
        parts = []
        if self._words:
            parts.append(self._words([sample.query for sample in samples]))
        if self.part != "text":
            rows = self._of_histories(samples)
            parts.append(sparse.csr_matrix(np.where(np.isnan(rows), self._average, rows)))
        return sparse.hstack(parts, format="csr")

    def _of_histories(self, samples: Sequence[Sample]) -> Array:
        return np.array([self.label_set.features(sample.history) for sample in samples])


class RatingModel:
    """Ridge regression; predicts the label nearest to its number."""

    def __init__(self, label_set: LabelSet, train: Sequence[Sample], *, part: Part) -> None:
        self.label_set = label_set
        self.features = _Features(label_set, train, part=part)
        rows, targets = self.features(train), ratings(sample.target for sample in train)
        self.strength = best_strength(rows, targets, owners=[sample.owner for sample in train])
        self.ridge = Ridge(alpha=self.strength).fit(rows, targets)

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        return [self.label_set.nearest(value) for value in self.ridge.predict(self.features(samples))]


class LabelModel:
    """Logistic regression over the labels that occur in training."""

    def __init__(self, label_set: LabelSet, train: Sequence[Sample], *, part: Part) -> None:
        self.label_set = label_set
        self.features = _Features(label_set, train, part=part)
        targets = _targets(label_set, train)
        classifier = LogisticRegression(**_LOGISTIC) if len(set(targets)) > 1 else DummyClassifier()
        self._classifier = classifier.fit(self.features(train), targets)

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        return [self.label_set.labels[label_id] for label_id in self._classifier.predict(self.features(samples))]


class OptionModel:
    """Logistic regression on each option's similarities minus those of the others; predicts the likeliest option.

    All positions share the same weights, for any number of options.
    """

    def __init__(self, label_set: LabelSet, finder: OptionFinder, train: Sequence[Sample], *, part: Part) -> None:
        self.label_set, self.finder, self.part = label_set, finder, part
        self._words = Words(dict.fromkeys(text for sample in train for text in self._texts(sample)))
        is_target = np.arange(len(label_set.labels)) == _targets(label_set, train)[:, None]
        rows = self.advantages(train)
        self._classifier = LogisticRegression(**_LOGISTIC).fit(rows.reshape(-1, rows.shape[2]), is_target.reshape(-1))

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        rows = self.advantages(samples)
        scores = self._classifier.decision_function(rows.reshape(-1, rows.shape[2])).reshape(len(samples), -1)
        return [self.label_set.labels[label_id] for label_id in scores.argmax(axis=1)]

    def advantages(self, samples: Sequence[Sample]) -> Array:
        """Return the similarities of each option, minus the mean of the other options, (n, labels, 1 to 3).

        `part` selects the cosine with the question, the mean and the largest cosine with the items, or all three.
        Without options in a prompt, values are zero.
        """
        no_options = Options("", ("",) * len(self.label_set.labels))
        options_of_samples = [self.finder.find(sample.prompt) or no_options for sample in samples]
        option_rows = self._words([text for options in options_of_samples for text in options.texts])
        parts = []
        if self.part != "history":
            questions = self._words([options.question for options in options_of_samples for _ in options.texts])
            cosines = np.asarray(option_rows.multiply(questions).sum(axis=1))
            parts.append(cosines.reshape(-1, len(self.label_set.labels), 1))
        if self.part != "text":
            parts.append(self._item_cosines(option_rows, samples))
        cosines = np.concatenate(parts, axis=2)
        others = (cosines.sum(axis=1, keepdims=True) - cosines) / (cosines.shape[1] - 1)
        return np.asarray(cosines - others)

    def _item_cosines(self, option_rows: sparse.csr_matrix, samples: Sequence[Sample]) -> Array:
        """Return the mean and largest cosine of each option with the items, (n, labels, 2); zeros without items."""
        width = len(self.label_set.labels)
        items = self._words([content(item) for sample in samples for item in sample.history])
        result = np.zeros((len(samples), width, 2))
        start = 0
        for index, sample in enumerate(samples):
            end = start + len(sample.history)
            if end > start:
                cosines = (option_rows[index * width : (index + 1) * width] @ items[start:end].T).toarray()
                result[index] = np.stack([cosines.mean(axis=1), cosines.max(axis=1)], axis=1)
            start = end
        return result

    def _texts(self, sample: Sample) -> list[str]:
        options = self.finder.find(sample.prompt)
        texts = [] if options is None else [options.question, *options.texts]
        return texts if self.part == "text" else [*texts, *map(content, sample.history)]


def best_strength(rows: sparse.csr_matrix, targets: Array, *, owners: Sequence[str]) -> float:
    """Return the ridge strength with the lowest squared error on held-out users; rows are (n, F)."""
    users = len(set(owners))
    if users < 2:
        raise ConfigError(
            f"classical needs training samples of 2 or more users, because it cross-validates its ridge regression "
            f"over users; found {users}."
        )
    folds = list(GroupKFold(n_splits=min(_FOLDS, users)).split(rows, targets, groups=list(owners)))

    def error(strength: float) -> float:
        ridge = Ridge(alpha=strength)
        errors = (ridge.fit(rows[fit], targets[fit]).predict(rows[held]) - targets[held] for fit, held in folds)
        return float(sum(np.square(fold).sum() for fold in errors))

    return min(_RIDGE_STRENGTHS, key=error)


def content(item: HistoryItem) -> str:
    """Return an item's values without the user's answer, or the answer if there is no other value."""
    values = [value for name, value in item.fields if name != item.answer_name]
    return " ".join(values or (value for _, value in item.fields))


def _targets(label_set: LabelSet, samples: Sequence[Sample]) -> LabelIds:
    return np.array([label_set.index(sample.target) for sample in samples], dtype=np.int64)


class OptionFinder:
    """Finds options after a task's labels: each label once, in order, with a colon, a period or a bracket after it.

    Args:
        prompts: prompts of the training split. Words that begin or end all their questions are wording of the task, so
            they are removed from every question.
        labels: the markers.

    Attributes:
        everywhere: whether each of these prompts has a non-empty option after every marker.
    """

    def __init__(self, prompts: Sequence[str], labels: Sequence[str]) -> None:
        self._markers = [re.compile(rf"(?<!\w){re.escape(label)}[:.)]") for label in labels]
        self._shared_start = self._shared_end = 0
        options_of_prompts = [self.find(prompt) for prompt in prompts]
        self.everywhere = (
            len(labels) > 1
            and bool(options_of_prompts)
            and all(options and all(options.texts) for options in options_of_prompts)
        )
        questions = [options.question.split() for options in options_of_prompts if options]
        self._shared_start = _count_shared(questions)
        self._shared_end = _count_shared([words[self._shared_start :][::-1] for words in questions])

    def find(self, prompt: str) -> Options | None:
        """Return the options of a prompt, stripped; None if a marker is missing."""
        parts, start = [], 0
        for marker in self._markers:
            match = marker.search(prompt, start)
            if match is None:
                return None
            parts.append(prompt[start : match.start()].strip())
            start = match.end()
        question, *texts = [*parts, prompt[start:].strip()]
        words = question.split()
        return Options(" ".join(words[self._shared_start : len(words) - self._shared_end]), tuple(texts))


def _count_shared(texts: Sequence[Sequence[str]]) -> int:
    """Return the number of first words that all texts have in common."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*texts, strict=False)))
