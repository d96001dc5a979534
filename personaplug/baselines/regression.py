"""Regressions in the language model's place: TF-IDF of texts and features of histories, from labels to labels.

- ratings: ridge regression on the number, its strength by cross-validation over users;
- options behind markers ([1], [2]) in the prompt: logistic regression on how much more an option is like the question,
  and like the user's items, than the others are;
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
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold

from personaplug.baselines.no_lm import Baseline, Predictor
from personaplug.data.label_set import Array, LabelIds, LabelSet, ratings
from personaplug.data.records import HistoryItem, Options, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData

_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # of the ridge
_FOLDS = 5
_LOOSENESS = 10.0  # of the logistic regressions; scikit-learn's C
_STEPS = 2000


Part = Literal["both", "text", "history"]


@dataclass(frozen=True)
class Regression(Baseline):
    """The regression that fits a task.

    Attributes:
        part: what it reads of a sample: its text, its history or both.
    """

    part: Part = "both"

    @property
    def name(self) -> str:  # type: ignore[override]  # derived from the part
        return "classical" if self.part == "both" else f"classical:{self.part}"

    def fit(self, task: Task, train: Sequence[Sample]) -> Predictor:
        """Fit to samples with answers and, unless `part` is "text", histories.

        Raises:
            ConfigError: if histories hold nothing that it could use, or all samples are of one user.
            MissingData: if no training sample has an answer among the labels.
        """
        label_set = LabelSet(task.labels)
        train = [sample for sample in train if label_set.index(sample.target) >= 0]
        if not train:
            raise MissingData("No training sample has an answer among the task's labels: there is nothing to fit.")
        if task.kind == "label":
            finder = OptionFinder([sample.prompt for sample in train], task.labels)
            if finder.everywhere:
                return OptionModel(label_set, finder, train, part=self.part)
        if self.part != "text" and task.answer_field is None:
            raise ConfigError(
                f"{self.name} uses the answers in a history, and the items of {task.name} hold none (answer_field); "
                f"classical:text does without."
            )
        return (RatingModel if task.kind == "rating" else LabelModel)(label_set, train, part=self.part)


class Words:
    """TF-IDF of the 1- and 2-grams that two or more of some texts have, or of all where no two share any."""

    def __init__(self, texts: Iterable[str]) -> None:
        known = list(texts)
        self._vectorizer: TfidfVectorizer | None = None
        for fewest in (2, 1):
            vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=fewest)
            try:
                self._vectorizer = vectorizer.fit(known)
            except ValueError:
                continue  # scikit-learn's word for a vocabulary without a word
            return

    def __call__(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Unit rows, (n, words); zeros for a text without a known word."""
        if self._vectorizer is None or not texts:
            # One column of zeros where there are no words at all: no model takes rows without any.
            width = 1 if self._vectorizer is None else len(self._vectorizer.vocabulary_)
            return sparse.csr_matrix((len(texts), width))
        return self._vectorizer.transform(texts)


class _Features:
    """Samples as rows of numbers: words of the query, answers in the history, or both.

    A user without answers counts as the average of those who have some.
    """

    def __init__(self, closed: LabelSet, train: Sequence[Sample], *, part: Part) -> None:
        self.closed, self.part = closed, part
        self._words = Words(sample.query for sample in train) if part != "history" else None
        told = np.array([closed.features(sample.history) for sample in train])
        known = told[~np.isnan(told[:, 0])]
        self._average = known.mean(axis=0) if len(known) else np.zeros(closed.width)

    def __call__(self, samples: Sequence[Sample]) -> sparse.csr_matrix:
        """(n, features)."""
        parts = []
        if self._words is not None:
            parts.append(self._words([sample.query for sample in samples]))
        if self.part != "text":
            told = np.array([self.closed.features(sample.history) for sample in samples])
            parts.append(sparse.csr_matrix(np.where(np.isnan(told), self._average, told)))
        return sparse.hstack(parts, format="csr")


class RatingModel:
    """Ridge regression; answers with the label nearest to its prediction.

    Raises:
        ConfigError: if all training samples are of one user.
    """

    def __init__(self, closed: LabelSet, train: Sequence[Sample], *, part: Part) -> None:
        self.closed = closed
        self.features = _Features(closed, train, part=part)
        rows, wanted = self.features(train), ratings(sample.target for sample in train)
        self.strength = best_strength(rows, wanted, owners=[sample.owner for sample in train])
        self.ridge = Ridge(alpha=self.strength).fit(rows, wanted)

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        return [self.closed.nearest(value) for value in self.ridge.predict(self.features(samples))]


class LabelModel:
    """Logistic regression over the labels that occur in training."""

    def __init__(self, closed: LabelSet, train: Sequence[Sample], *, part: Part) -> None:
        self.closed = closed
        self.features = _Features(closed, train, part=part)
        places = _places(closed, train)
        self._only = int(places[0]) if len(set(places.tolist())) == 1 else None
        self._model = LogisticRegression(C=_LOOSENESS, max_iter=_STEPS)
        if self._only is None:
            self._model.fit(self.features(train), places)

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        if self._only is not None:
            return [self.closed.labels[self._only]] * len(samples)
        return [self.closed.labels[place] for place in self._model.predict(self.features(samples))]


class OptionModel:
    """Logistic regression on each option's likenesses less the mean of the other options'; the likeliest is the answer.

    So it is the same for every place that an option may stand at, whatever the number of options.
    """

    def __init__(self, closed: LabelSet, finder: OptionFinder, train: Sequence[Sample], *, part: Part) -> None:
        self.closed, self.finder, self.part = closed, finder, part
        self._words = Words(dict.fromkeys(text for sample in train for text in self._texts(sample)))
        right = np.arange(len(closed.labels)) == _places(closed, train)[:, None]
        rows = self.advantages(train)
        self._model = LogisticRegression(C=_LOOSENESS, max_iter=_STEPS)
        self._model.fit(rows.reshape(-1, rows.shape[2]), right.reshape(-1))

    def predict(self, samples: Sequence[Sample]) -> list[str]:
        """Predict a label for each sample."""
        rows = self.advantages(samples)
        scores = self._model.decision_function(rows.reshape(-1, rows.shape[2])).reshape(len(samples), -1)
        return [self.closed.labels[place] for place in scores.argmax(axis=1)]

    def advantages(self, samples: Sequence[Sample]) -> Array:
        """Cosines with the question, and mean and largest with the items, less the mean of the other options'.

        Returns:
            (n, labels, 1 to 3), as `part` says; zeros where a prompt has no options.
        """
        cosines = self._cosines(samples)
        others = (cosines.sum(axis=1, keepdims=True) - cosines) / (cosines.shape[1] - 1)
        return np.asarray(cosines - others)

    def _cosines(self, samples: Sequence[Sample]) -> Array:
        nothing = Options("", ("",) * len(self.closed.labels))
        found = [self.finder.find(sample.prompt) or nothing for sample in samples]
        width = len(self.closed.labels)
        options = self._words([text for one in found for text in one.texts])
        parts = []
        if self.part != "history":
            questions = self._words([one.question for one in found for _ in one.texts])
            parts.append(np.asarray(options.multiply(questions).sum(axis=1)).reshape(-1, width, 1))
        if self.part != "text":
            parts.append(self._with_items(options, samples))
        return np.concatenate(parts, axis=2)

    def _with_items(self, options: sparse.csr_matrix, samples: Sequence[Sample]) -> Array:
        """Mean and largest cosine of each option with the items, (n, labels, 2); zeros without items."""
        width = len(self.closed.labels)
        items = self._words([content(item) for sample in samples for item in sample.history])
        found = np.zeros((len(samples), width, 2))
        start = 0
        for place, sample in enumerate(samples):
            end = start + len(sample.history)
            if end > start:
                likeness = (options[place * width : (place + 1) * width] @ items[start:end].T).toarray()
                found[place] = np.stack([likeness.mean(axis=1), likeness.max(axis=1)], axis=1)
            start = end
        return found

    def _texts(self, sample: Sample) -> list[str]:
        found = self.finder.find(sample.prompt)
        asked = [] if found is None else [found.question, *found.texts]
        return asked if self.part == "text" else [*asked, *(content(item) for item in sample.history)]


def best_strength(rows: sparse.csr_matrix, wanted: Array, *, owners: Sequence[str]) -> float:
    """The ridge's strength with the least squared error on users that it was not fitted on.

    Args:
        rows: (n, features).
        wanted: (n,).
        owners: (n,) users.
    Raises:
        ConfigError: if there are fewer than two users.
    """
    users = len(set(owners))
    if users < 2:
        raise ConfigError(f"classical finds its strength by leaving out users: it needs 2 or more, found {users}.")
    folds = list(GroupKFold(n_splits=min(_FOLDS, users)).split(rows, wanted, groups=list(owners)))

    def error(strength: float) -> float:
        found = [Ridge(alpha=strength).fit(rows[seen], wanted[seen]).predict(rows[left]) for seen, left in folds]
        return float(sum(np.square(said - wanted[left]).sum() for said, (_, left) in zip(found, folds, strict=True)))

    return min(_STRENGTHS, key=error)


def content(item: HistoryItem) -> str:
    """An item's texts without the user's answer, nor the fields' names; with it where that would leave nothing."""
    told = [value for name, value in item.fields if name != item.answer_name]
    return " ".join(told or (value for _, value in item.fields))


def _places(closed: LabelSet, samples: Sequence[Sample]) -> LabelIds:
    return np.array([closed.index(sample.target) for sample in samples], dtype=np.int64)


class OptionFinder:
    """Finds options behind a task's labels: each label once, in order, with a colon, a point or a bracket behind it.

    Args:
        prompts: of the training split; the words with which the questions of all of them begin and end are their
            wording, and are left out of every question.
        labels: the markers.

    Attributes:
        everywhere: whether each of these prompts has something to choose from behind its markers.
    """

    def __init__(self, prompts: Sequence[str], labels: Sequence[str]) -> None:
        self._markers = [re.compile(rf"(?<!\w){re.escape(label)}[:.)]") for label in labels]
        self._first, self._last = 0, 0
        found = [self.find(prompt) for prompt in prompts]
        self.everywhere = len(labels) > 1 and bool(found) and all(one is not None and all(one.texts) for one in found)
        words = [one.question.split() for one in found if one is not None]
        self._first = _shared(words)
        self._last = _shared([told[self._first :][::-1] for told in words])

    def find(self, prompt: str) -> Options | None:
        """The options of a prompt, stripped; None where not all of the markers are in it."""
        parts, start = [], 0
        for marker in self._markers:
            match = marker.search(prompt, start)
            if match is None:
                return None
            parts.append(prompt[start : match.start()].strip())
            start = match.end()
        question, *texts = [*parts, prompt[start:].strip()]
        words = question.split()
        return Options(" ".join(words[self._first : len(words) - self._last]), tuple(texts))


def _shared(texts: Sequence[Sequence[str]]) -> int:
    """How many first words all of some texts have in common."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*texts, strict=False)))
