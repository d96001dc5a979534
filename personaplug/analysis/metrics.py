"""What an answer is worth: LaMP's metrics, their directions, and what counts as an invalid answer.

Every metric is a function of *means of per-sample statistics*. An accuracy is the mean of hits, an RMSE the
root of a mean of squares, a macro-F1 a formula over mean one-hots. So an average over seeds and a bootstrap
need only the statistics, never the texts again, and both are exact for metrics that are no plain means.

The rules are LaMP's to the letter (`eval/evaluation.py` of the LaMP repository): predictions and golds are
stripped first.

A name such as `mae@median` is the metric of answers that were chosen from the labels' probabilities by another decision
than the likeliest (see `decisions.py`); the metric itself is the same. `nll` asks for no answer at all: it is of the
probability that a model gave to the right one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.point_estimates import ARGMAX, MEAN, MEDIAN, check_estimate, scale_of
from personaplug.errors import ConfigError, ShapeMismatch, nearest

Array = NDArray[np.float64]

FALLBACKS = ("lamp", "pplug")
_AT = "@"  # between a metric and the decision whose answers it scores
ERROR_MATCHED_ESTIMATES = (f"mae{_AT}{MEDIAN}", f"rmse{_AT}{MEAN}")
"""Each error of ratings with the decision whose answers it should favour."""


class Metric(ABC):
    """A score of predictions against golds.

    Attributes:
        name: as tasks and results files write it, the decision in it if that is not the argmax.
        greater_is_better: its direction; False for errors.
        takes_estimates: whether answers that are chosen by their place on a scale make sense to it.
        of_answers: whether it scores answers; if not, rows without a language model have no such column.
        averages_over_users: whether it means something of one user's few samples.
        decision: how the answers that it is to score are chosen from the labels' probabilities, where there are any.
    """

    name: str
    greater_is_better: ClassVar[bool] = True
    takes_estimates: ClassVar[bool] = False
    of_answers: ClassVar[bool] = True
    averages_over_users: ClassVar[bool] = True

    def __init__(self, labels: Sequence[str] = (), *, fallback: str = "lamp", decision: str = ARGMAX) -> None:
        """Take what a task declares; a metric uses the part of it that it needs.

        Args:
            labels: the closed set of answers, in order; needed by all but ROUGE.
            fallback: how a rating that is no number is scored, "lamp" or "pplug".
            decision: one of `decisions.POINT_ESTIMATES`.
        Raises:
            ConfigError: if the labels or the decision do not fit the metric, or the fallback is unknown.
        """
        if fallback not in FALLBACKS:
            raise ConfigError(f"The rating fallback is one of {', '.join(FALLBACKS)}; found {fallback!r}.")
        self.labels = tuple(label.strip() for label in labels)
        self.fallback, self.decision = fallback, decision
        if decision != ARGMAX:
            self._take(decision)

    def _take(self, decision: str) -> None:
        check_estimate(decision)
        if not self.takes_estimates:
            raise ConfigError(f"{self.name} knows no scale; leave out {_AT}{decision}, which is for ratings.")
        self.name = f"{self.name}{_AT}{decision}"
        self._scale()

    def _scale(self) -> Array:
        """The labels as numbers: (C,)."""
        scale = scale_of(self.labels)
        if scale is None:
            raise ConfigError(f"{self.name} needs finite numbers as labels, the scale; found {list(self.labels)}.")
        return scale

    @abstractmethod
    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Return what the metric averages, sample by sample: (n, d).

        Raises:
            ShapeMismatch: if there are more predictions than golds, or fewer.
        """

    def value(self, means: Array) -> Array:
        """Return the metric of means of statistics: (..., d) to (...)."""
        first: Array = means[..., 0]
        return first

    def score(self, predictions: Sequence[str], golds: Sequence[str]) -> float:
        """Return the metric of these samples; NaN without samples.

        Raises:
            ShapeMismatch: if there are more predictions than golds, or fewer.
        """
        return value_of(self.statistics(predictions, golds), self)


def value_of(stats: Array, metric: Metric) -> float:
    """Return the metric of per-sample statistics (n, d); NaN without samples."""
    if not len(stats):
        return float("nan")
    # A rating of "1e200" squares to infinity: that is its score, not an accident worth a warning.
    with np.errstate(over="ignore", invalid="ignore"):
        return float(metric.value(stats.mean(axis=0)))


class _LabelMetric(Metric):
    """A metric on a closed set of labels: exact, case-sensitive match; anything else is wrong."""

    def __init__(self, labels: Sequence[str] = (), *, fallback: str = "lamp", decision: str = ARGMAX) -> None:
        super().__init__(labels, fallback=fallback, decision=decision)
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"{self.name} needs the task's labels, each once; found {list(labels)}.")
        self._index = {label: index for index, label in enumerate(self.labels)}

    def _classes(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """The label's index of each text, -1 for anything else: (n,)."""
        return np.array([self._index.get(text.strip(), -1) for text in texts], dtype=np.int64)


class Accuracy(_LabelMetric):
    """The share of answers that are the gold label.

    On a rating task too the labels are compared as texts: "4.0" is not "4". A gold outside the labels is
    never hit.
    """

    name = "accuracy"
    takes_estimates = True

    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Return 1 for a hit, else 0: (n, 1)."""
        _check_paired(predictions, golds)
        said, meant = self._classes(predictions), self._classes(golds)
        hits = np.asarray((said == meant) & (said >= 0), dtype=np.float64)
        return hits.reshape(-1, 1)


class MacroF1(_LabelMetric):
    """The mean over all labels of F1 = 2·TP / (predicted + gold).

    Equals scikit-learn's f1_score(labels=range(C), average="macro", zero_division=0): an invalid answer
    lowers its gold label's recall and no label's precision; a label neither predicted nor gold counts 0.
    """

    name = "f1"
    averages_over_users = False  # most labels never occur there, and count 0

    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Return one-hots of true positive, predicted and gold label, side by side: (n, 3·C)."""
        _check_paired(predictions, golds)
        said, meant = self._one_hot(predictions), self._one_hot(golds)
        return np.concatenate([said * meant, said, meant], axis=1)

    def value(self, means: Array) -> Array:
        """Return the macro-F1 of mean one-hots: (..., 3·C) to (...)."""
        hits, said, meant = np.split(means, 3, axis=-1)
        total = said + meant
        each = np.divide(2 * hits, total, out=np.zeros_like(total), where=total != 0)
        return np.asarray(each.mean(axis=-1))

    def _one_hot(self, texts: Sequence[str]) -> Array:
        classes = self._classes(texts)
        return np.asarray(classes[:, None] == np.arange(len(self.labels)), dtype=np.float64)


class _RatingMetric(Metric):
    """An error of ratings, which are read as numbers.

    The rating is float() of the stripped text, not clipped: "42" is 42, and "nan" makes the whole score NaN,
    as in LaMP. For a text that is no number there are two rules by name:

    - "lamp": the farthest end of the scale; of two equally far ends the highest (gold 3 on 1..5 gives 5).
    - "pplug": the first ASCII digit in the text, else 1.0, as in PPlug's released code. Only ASCII digits
      count, because "²".isnumeric() is true while int("²") raises.
    """

    greater_is_better = False
    takes_estimates = True

    def __init__(self, labels: Sequence[str] = (), *, fallback: str = "lamp", decision: str = ARGMAX) -> None:
        super().__init__(labels, fallback=fallback, decision=decision)
        scale = self._scale()
        self.low, self.high = float(scale.min()), float(scale.max())

    def _errors(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Predicted minus gold rating: (n,)."""
        _check_paired(predictions, golds)
        meant = [self._gold(text, place) for place, text in enumerate(golds, start=1)]
        said = [self._rating(text, gold) for text, gold in zip(predictions, meant, strict=True)]
        return np.array(said, dtype=np.float64) - np.array(meant, dtype=np.float64)

    def _rating(self, text: str, gold: float) -> float:
        number = _number(text)
        if number is not None:
            return number
        if self.fallback == "pplug":
            digit = re.search("[0-9]", text)
            return float(digit.group()) if digit else 1.0
        return self.low if abs(self.low - gold) > abs(self.high - gold) else self.high

    def _gold(self, text: str, place: int) -> float:
        number = _number(text)
        if number is None or not np.isfinite(number):
            raise ConfigError(
                f"{self.name} compares numbers, and the gold answer of sample {place} is none. "
                f"Choose other metrics for this task, or mend its answers."
            )
        return number


class MeanAbsoluteError(_RatingMetric):
    """The mean distance between rating and gold."""

    name = "mae"

    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Return absolute errors: (n, 1)."""
        return np.abs(self._errors(predictions, golds))[:, None]


class RootMeanSquaredError(_RatingMetric):
    """The root of the mean squared distance between rating and gold."""

    name = "rmse"

    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Return squared errors: (n, 1)."""
        with np.errstate(over="ignore"):
            return np.square(self._errors(predictions, golds))[:, None]

    def value(self, means: Array) -> Array:
        """Return the root of mean squared errors: (..., 1) to (...)."""
        return np.sqrt(means[..., 0])


class _Rouge(Metric):
    """ROUGE's F-measure on lower-cased words, without stemmer, averaged over samples.

    Equal to Google's `rouge_score` sample by sample. LaMP reports the middle of a bootstrap over samples,
    whose expectation is this mean; the two differ by resampling noise only.

    Source: Lin, "ROUGE: a Package for Automatic Evaluation of Summaries", 2004.
    """

    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Return F-measures: (n, 1)."""
        _check_paired(predictions, golds)
        pairs = zip(predictions, golds, strict=True)
        return np.array(
            [self._f_measure(_words(said), _words(meant)) for said, meant in pairs], dtype=np.float64
        ).reshape(-1, 1)

    def _f_measure(self, said: list[str], meant: list[str]) -> float:
        """2·P·R / (P + R) with P = common / said, R = common / meant; that is 2·common / (said + meant)."""
        total = len(said) + len(meant)
        return 2 * self._common(said, meant) / total if total else 0.0

    @abstractmethod
    def _common(self, said: list[str], meant: list[str]) -> int:
        """How many words both texts share, in this metric's sense."""


class Rouge1(_Rouge):
    """ROUGE-1: words in common, in any order, each as often as both texts have it."""

    name = "rouge_1"

    def _common(self, said: list[str], meant: list[str]) -> int:
        return (Counter(said) & Counter(meant)).total()


class RougeL(_Rouge):
    """ROUGE-L: the longest common subsequence of words."""

    name = "rouge_l"

    def _common(self, said: list[str], meant: list[str]) -> int:
        return longest_common_subsequence(said, meant)


class NegativeLogLikelihood(Metric):
    """How unlikely the right answers are to a model, in nats per token; per answer of a closed set that is scored.

    A proper score: it takes its best value in expectation for the true probabilities, so it sees what a model has
    learned of a user long before the likeliest text is another.

    Source: Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007.
    """

    name = "nll"
    greater_is_better = False
    of_answers = False

    def statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Refuse: answers as texts do not say how likely they were.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.name} is of a model's probabilities, and of these answers only texts are known. Leave it out of "
            f"the task's metrics: where a language model answers, it is a column of its own."
        )

    def value(self, means: Array) -> Array:
        """Return the mean per token of mean (−log p, tokens): (..., 2) to (...)."""
        return np.asarray(means[..., 0] / means[..., 1])


METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        Accuracy,
        MacroF1,
        MeanAbsoluteError,
        RootMeanSquaredError,
        Rouge1,
        RougeL,
        NegativeLogLikelihood,
    )
}


def get_metric(name: str, *, labels: Sequence[str] = (), fallback: str = "lamp") -> Metric:
    """Return a metric by name.

    Args:
        name: one of `METRICS`; of an error of ratings or the accuracy also with the decision, as in `mae@median`.
        labels: the task's labels; needed by all but ROUGE.
        fallback: how a rating that is no number is scored, "lamp" or "pplug".
    Raises:
        ConfigError: for an unknown name, decision or fallback, or labels or a decision that do not fit the metric.
    """
    kind, (stem, at, decision) = metric_class(name), name.partition(_AT)
    if kind is None:
        raise ConfigError(f"There is no metric {stem!r}; {nearest(stem, METRICS)}")
    if at and decision == ARGMAX:
        # Under two names one number would stand in a table twice.
        raise ConfigError(f"The metric {name!r} is called {stem!r}.")
    return kind(labels, fallback=fallback, decision=decision if at else ARGMAX)


def metric_class(name: str) -> type[Metric] | None:
    """Return the kind of metric that a name is of, with a decision or without; None for an unknown one."""
    return METRICS.get(name.partition(_AT)[0])


def has_estimate(name: str) -> bool:
    """Say whether a metric's name says by which decision its answers are chosen."""
    return _AT in name


def is_invalid(prediction: str, *, kind: str, labels: Sequence[str]) -> bool:
    """Say whether an answer is none of the task's answers: outside the labels, or, for kind "text", empty.

    A rating of "3." is invalid and still scored as 3: the rate tells how often the model left the form, not
    what that cost.
    """
    answer = prediction.strip()
    return not answer if kind == "text" else answer not in {label.strip() for label in labels}


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    One row of the usual table is one integer: a zero bit stands where the row steps up by one, so a row costs
    a few operations on whole integers, not one per cell.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << index
    everywhere = (1 << len(left)) - 1
    row = everywhere
    for word in right:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(left) - row.bit_count()


def _words(text: str) -> list[str]:
    """The words that ROUGE counts: runs of a-z and 0-9 after lower-casing; other characters only separate."""
    return re.findall("[a-z0-9]+", text.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.strip())
    except ValueError:
        return None


def _check_paired(predictions: Sequence[str], golds: Sequence[str]) -> None:
    if len(predictions) != len(golds):
        raise ShapeMismatch(f"Expected {len(golds)} predictions, one per gold; found {len(predictions)}.")
