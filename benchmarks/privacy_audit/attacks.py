"""Attacks on vectors: arithmetic on arrays, which knows neither plugs nor language models.

Each attack is fitted on strangers and measured on other users. Its settings are chosen on a slice of the strangers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Of the ridge penalty, tried on the slice."""
RESAMPLES = 1000
_WORD = re.compile(r"[^\W\d_]{3,}(?:['’-][^\W\d_]+)*")
_POSSESSIVE = re.compile(r"['’]s$", re.IGNORECASE)


class Estimate(NamedTuple):
    """A figure with its 95 % interval over users."""

    value: float
    low: float
    high: float


def over_users(statistic: Callable[[Indices], float], users: Sequence[int] | Indices, *, seed: int = 0) -> Estimate:
    """Return a statistic of all rows, with a percentile bootstrap whose unit is the user.

    Args:
        statistic: takes row indices, which repeat in a resample.
        users: (n,) the user of each row.
    """
    codes = np.unique(np.asarray(users), return_inverse=True)[1]
    rows_of = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    random = np.random.default_rng(seed)
    draws = (random.integers(len(rows_of), size=len(rows_of)) for _ in range(RESAMPLES))
    values = [statistic(np.concatenate([rows_of[user] for user in draw])) for draw in draws]
    low, high = np.quantile(values, (0.025, 0.975))
    return Estimate(float(statistic(np.arange(len(codes)))), float(low), float(high))


def mean_over_users(values: npt.ArrayLike, users: Sequence[int] | Indices) -> Estimate:
    rows = np.asarray(values, dtype=np.float64)
    return over_users(lambda chosen: float(rows[chosen].mean()), users)


def auc(positive: Array, negative: Array) -> float:
    """Return the chance that a positive has a higher score than a negative; ties count half."""
    ranks = rankdata(np.concatenate([positive, negative]))
    smallest = len(positive) * (len(positive) + 1) / 2
    return float((ranks[: len(positive)].sum() - smallest) / (len(positive) * len(negative)))


def ranks_of(scores: Array, true: Indices) -> Array:
    """Return the rank of each row's true column, (n,), 1 = best; equal scores share the mean of their ranks."""
    own = scores[np.arange(len(true)), true][:, None]
    ranks: Array = (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) + 1) / 2
    return ranks


def ranking(scores: Array, true: Indices, users: Sequence[int] | Indices) -> dict[str, Estimate]:
    """Return how often the true column ranks first and among ten, and the mean reciprocal rank."""
    ranks = ranks_of(scores, true)
    values = {"top_1": ranks < 1.75, "top_10": ranks <= 10, "mrr": 1 / ranks}  # 1.5: one other text has an equal score
    return {name: mean_over_users(value, users) for name, value in values.items()}


def unit(rows: npt.ArrayLike) -> Array:
    """Return rows of length 1; rows of zeros stay."""
    values = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(norms > 0, norms, 1)


@dataclass(frozen=True)
class Ridge:
    """Ridge regression from standardized rows to any number of columns."""

    center: Array
    scale: Array
    weights: Array
    offset: Array

    def __call__(self, rows: npt.ArrayLike) -> Array:
        return (np.asarray(rows, dtype=np.float64) - self.center) / self.scale @ self.weights + self.offset


def fit_ridge(rows: npt.ArrayLike, columns: npt.ArrayLike, strength: float) -> Ridge:
    """Fit by the smaller of the two Gram matrices; `strength` is per row."""
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(columns, dtype=np.float64)
    center, scale, offset = x.mean(axis=0), x.std(axis=0), y.mean(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x, y, penalty = (x - center) / scale, y - offset, strength * len(x)
    if len(x) < x.shape[1]:
        weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    else:
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return Ridge(center, scale, weights, offset)


def best_ridge(
    rows: npt.ArrayLike, columns: npt.ArrayLike, *, slice_: npt.NDArray[np.bool_], score: Callable[[Array], float]
) -> tuple[Ridge, float]:
    """Choose the strength by `score` of the slice's predictions, then fit on all rows; return it too."""
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(columns, dtype=np.float64)
    best = max(STRENGTHS, key=lambda strength: score(fit_ridge(x[~slice_], y[~slice_], strength)(x[slice_])))
    return fit_ridge(x, y, best), best


@dataclass(frozen=True)
class Linker:
    """Bring rows into a space in which those of one user are near each other; compare them by cosine."""

    center: Array
    weights: Array | None = None

    def __call__(self, rows: npt.ArrayLike) -> Array:
        centered = np.asarray(rows, dtype=np.float64) - self.center
        return unit(centered if self.weights is None else centered @ self.weights)


def fit_linker(first: Array, second: Array, *, parts: int, shrink: float) -> Linker:
    """Divide principal components by their spread within users, as first[i] and second[i] are of one user."""
    both = np.concatenate([first, second])
    center = both.mean(axis=0)
    _, sizes, directions = np.linalg.svd(both - center, full_matrices=False)
    basis = directions[: min(parts, int((sizes > 1e-6 * sizes[0]).sum()))].T
    gaps = (first - second) @ basis
    within = gaps.T @ gaps / (2 * len(gaps))
    within += shrink * (((both - center) @ basis) ** 2).mean() * np.eye(len(within))
    values, vectors = np.linalg.eigh(within)
    return Linker(center, basis @ (vectors / np.sqrt(values)))


def best_linker(first: npt.ArrayLike, second: npt.ArrayLike, *, slice_: npt.NDArray[np.bool_]) -> Linker:
    """Choose how to link the rows of one user by the mean reciprocal rank on the slice."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    fits: list[Callable[[Array, Array], Linker]] = [
        lambda a, b: Linker(np.zeros(a.shape[1])),
        lambda a, b: Linker(np.concatenate([a, b]).mean(axis=0)),
        *(partial(fit_linker, parts=parts, shrink=shrink) for parts in (32, 128) for shrink in (0.001, 0.01, 0.1, 1.0)),
    ]

    def score(fit: Callable[[Array, Array], Linker]) -> float:
        linker = fit(a[~slice_], b[~slice_])
        similarity = linker(a[slice_]) @ linker(b[slice_]).T
        return float((1 / ranks_of(similarity, np.arange(len(similarity)))).mean())

    return max(fits, key=score)(a, b)


def words_of(text: str) -> list[str]:
    """Return the content words of a text in its own case, in order: three letters or more, no stop words, no 's."""
    words = (_POSSESSIVE.sub("", word) for word in _WORD.findall(text))
    return [word for word in words if word.lower() not in ENGLISH_STOP_WORDS]


@dataclass(frozen=True)
class Vocabulary:
    """Words and which rows hold them.

    Attributes:
        words: in lower case, the most frequent first.
        holds: (n texts, n words) whether a text holds a word.
    """

    words: tuple[str, ...]
    holds: npt.NDArray[np.bool_]


def vocabulary(texts: Sequence[str], words: Iterable[str]) -> Vocabulary:
    """Look up words, given in lower case, in texts."""
    chosen = tuple(words)
    column = {word: index for index, word in enumerate(chosen)}
    holds = np.zeros((len(texts), len(chosen)), dtype=bool)
    for row, text in enumerate(texts):
        held = [column[word] for word in {word.lower() for word in words_of(text)} if word in column]
        holds[row, held] = True
    return Vocabulary(chosen, holds)


def frequent_words(texts: Sequence[str], *, least: int) -> list[str]:
    """Return the words that at least this many texts hold, the most frequent first."""
    counts = Counter(word for text in texts for word in {word.lower() for word in words_of(text)})
    return [word for word, count in counts.most_common() if count >= least]


def proper_names(texts: Sequence[str]) -> set[str]:
    """Return the words, in lower case, that stand capitalized inside sentences and never in lower case."""
    inside, small = set[str](), set[str]()
    for text in texts:
        small.update(word for word in words_of(text) if word.islower())
        for match in _WORD.finditer(text):
            begins = not text[: match.start()].rstrip(" \"'“‘(—–-") or text[: match.start()].rstrip()[-1:] in '.!?:;…"”'
            if match.group()[0].isupper() and not begins:
                inside.add(_POSSESSIVE.sub("", match.group()).lower())
    return inside - small - set(ENGLISH_STOP_WORDS)


def hits_at(scores: Array, holds: npt.NDArray[np.bool_], count: int) -> Array:
    """Return for each row the found, the named and the true words, (n, 3), if the `count` best words are named."""
    top = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    found = np.take_along_axis(holds, top, axis=1).sum(axis=1)
    return np.stack([found, np.full(len(holds), count), holds.sum(axis=1)], axis=1).astype(np.float64)


def f1(hits: Array) -> float:
    """Return the F1 of all rows of `hits_at` together."""
    found, named, true = hits.sum(axis=0)
    return float(2 * found / (named + true)) if named + true else 0.0


def word_scores(hits: Array, users: Sequence[int] | Indices) -> dict[str, Estimate]:
    """Return precision, recall and F1 of named words."""

    def share(column: int) -> Callable[[Indices], float]:
        return lambda rows: float(hits[rows, 0].sum() / max(1.0, hits[rows, column].sum()))

    found = {"precision": over_users(share(1), users), "recall": over_users(share(2), users)}
    return found | {"f1": over_users(lambda rows: f1(hits[rows]), users)}


def explained(true: Array, predicted: Array, users: Sequence[int] | Indices) -> Estimate:
    """Return R²: 0 = no better than the targets' own mean, 1 = exact."""

    def statistic(rows: Indices) -> float:
        spread = ((true[rows] - true[rows].mean()) ** 2).sum()
        return float(1 - ((true[rows] - predicted[rows]) ** 2).sum() / spread) if spread else float("nan")

    return over_users(statistic, users)
