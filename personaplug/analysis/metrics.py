"""Metrics by LaMP's exact rules, as functions of *means of per-sample statistics*.

An accuracy is the mean of hits, an RMSE the root of a mean of squares. So averages over seeds and bootstraps need the
statistics, but not the texts, and are exact for every metric. Predictions and golds are stripped first, as in
`eval/evaluation.py` of the LaMP repository.

`mae@median` scores the median of the label probabilities instead of the likeliest label. `nll` scores the probability
of the right answer. `choice` and `margin` compare it with the probabilities of rejected answers. `divergence` is the
distance from the plain model. The last four are in `likelihood_metrics.py`; measures of what is personal in a text are
in `own_words.py` and `attribution_of_texts.py`, keywords in `keyword_metrics.py`.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from personaplug.analysis.attribution_of_texts import AttributionFirst, AttributionRank
from personaplug.analysis.form_distance import FormDistance
from personaplug.analysis.identification_metrics import IdentifiedPersona
from personaplug.analysis.keyword_metrics import KEYWORD_METRICS
from personaplug.analysis.likelihood_metrics import Choice, Divergence, Margin, NegativeLogLikelihood
from personaplug.analysis.metric_base import AT, Array, LikelihoodMetric, Metric, per_counted, value_of
from personaplug.analysis.own_words import OwnWordsPrecision, OwnWordsRecall
from personaplug.analysis.point_estimates import ARGMAX, MEAN, MEDIAN
from personaplug.analysis.sampled_metrics import SAMPLED, SampledMetric, can_be_sampled
from personaplug.analysis.words import (
    ascii_words,
    is_read_by_ascii_words,
    longest_common_subsequence,
    unicode_words,
)
from personaplug.data.manners import DIMENSIONS, manners_met, share_met
from personaplug.errors import ConfigError, nearest
from personaplug.infra.plugins import load_plugins, register

__all__ = ["ERROR_MATCHED_ESTIMATES", "LIKELIHOOD_METRICS", "MANNER_METRICS", "METRICS", "Accuracy", "Array"]
__all__ += ["LikelihoodMetric", "Metric", "get_metric", "has_estimate", "is_instrument", "is_invalid", "metric_class"]
__all__ += ["register_metric", "value_of"]

logger = logging.getLogger(__name__)

_MAX_UNREADABLE = 0.1  # from this share of references in other scripts on, ROUGE logs a warning
ERROR_MATCHED_ESTIMATES = (f"mae{AT}{MEDIAN}", f"rmse{AT}{MEAN}")  # with the estimates that minimize them


class _LabelMetric(Metric):
    """A metric on a closed set of labels, matched exactly and by case. Any other text is wrong, and has class -1."""

    needs_labels = True

    def _classes(self, texts: Sequence[str]) -> NDArray[np.int64]:
        indices = {label: index for index, label in enumerate(self.labels)}
        return np.array([indices.get(text.strip(), -1) for text in texts], dtype=np.int64)


class Accuracy(_LabelMetric):
    """The share of predictions that are the gold label, compared as texts: "4.0" is not "4"."""

    name = "accuracy"
    takes_estimates = True

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        predicted, gold = self._classes(predictions), self._classes(golds)
        return np.asarray((predicted == gold) & (predicted >= 0), dtype=np.float64)[:, None]


class MacroF1(_LabelMetric):
    """The mean over all labels of F1 = 2·TP / (predicted + gold), 0 for a label neither predicted nor gold.

    Equals scikit-learn's f1_score(labels=range(C), average="macro", zero_division=0). The statistics are one-hots of
    true positive, predicted and gold label, side by side: (n, 3·C).
    """

    name = "f1"
    averages_over_users = False  # most labels do not occur among one user's samples, and count 0

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        predicted, gold = self._one_hot(predictions), self._one_hot(golds)
        return np.concatenate([predicted * gold, predicted, gold], axis=1)

    def value(self, means: Array) -> Array:
        hits, predicted, gold = np.split(means, 3, axis=-1)
        total = predicted + gold
        f1 = np.divide(2 * hits, total, out=np.zeros_like(total), where=total != 0)
        return np.asarray(f1.mean(axis=-1))

    def _one_hot(self, texts: Sequence[str]) -> Array:
        classes = self._classes(texts)
        return np.asarray(classes[:, None] == np.arange(len(self.labels)), dtype=np.float64)


class _RatingMetric(Metric):
    """An error of ratings. A prediction is parsed with float() and not clipped, so "nan" makes the whole score NaN.

    A text that is not a number counts as the end of the scale farthest from the gold, and on a tie as the upper end.
    """

    greater_is_better = False
    takes_estimates = needs_scale = True

    def _errors(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        """Return predicted minus gold ratings: (n,)."""
        gold = np.array([_number(text, math.nan) for text in golds], dtype=np.float64)
        is_valid = np.isfinite(gold)
        if not is_valid.all():
            raise ConfigError(
                f"{self.name} needs numbers as gold answers; the gold answer of sample {is_valid.argmin() + 1} is not "
                f"a number. Choose other metrics for this task, or correct its answers."
            )
        return np.array([*map(self._rating, predictions, gold)], dtype=np.float64) - gold

    def _rating(self, text: str, gold: float) -> float:
        return _number(text, self.low if abs(self.low - gold) > abs(self.high - gold) else self.high)


class MeanAbsoluteError(_RatingMetric):
    """The mean distance between rating and gold."""

    name = "mae"

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        return np.abs(self._errors(predictions, golds))[:, None]


class RootMeanSquaredError(_RatingMetric):
    """The root of the mean squared distance between rating and gold."""

    name = "rmse"

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        with np.errstate(over="ignore"):
            return np.square(self._errors(predictions, golds))[:, None]

    def value(self, means: Array) -> Array:
        return np.sqrt(means[..., 0])


class _Rouge(Metric):
    """ROUGE's F-measure on lower-cased words (runs of a-z and 0-9), without a stemmer, averaged over samples.

    Each sample has the same score as with Google's `rouge_score`. So texts in other scripts have no words and score 0.

    Source: Lin, "ROUGE: a Package for Automatic Evaluation of Summaries", 2004.
    """

    reads_any_script: ClassVar[bool] = False

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        words = unicode_words if self.reads_any_script else ascii_words
        unreadable = sum(not is_read_by_ascii_words(gold) for gold in golds)
        if not self.reads_any_script and unreadable >= max(1, _MAX_UNREADABLE * len(golds)):
            _warn_of_other_scripts()
        pairs = zip(map(words, predictions), map(words, golds), strict=True)
        # 2·P·R / (P + R) with P = common / predicted, R = common / gold.
        scores = [2 * self._common(p, gold) / (len(p) + len(gold) or 1) for p, gold in pairs]
        return np.array(scores, dtype=np.float64).reshape(-1, 1)

    @abstractmethod
    def _common(self, predicted: list[str], gold: list[str]) -> int: ...


class Rouge1(_Rouge):
    """ROUGE-1: words in common, in any order. A repeated word counts up to its smaller count in the two texts."""

    name = "rouge_1"

    def _common(self, predicted: list[str], gold: list[str]) -> int:
        return (Counter(predicted) & Counter(gold)).total()


class RougeL(_Rouge):
    """ROUGE-L: the longest common subsequence of words."""

    name = "rouge_l"

    def _common(self, predicted: list[str], gold: list[str]) -> int:
        return longest_common_subsequence(predicted, gold)


class UnicodeRouge1(Rouge1):
    """ROUGE-1 for texts in any script: words as `unicode_words` finds them."""

    name = "rouge_1_unicode"
    reads_any_script = True


class UnicodeRougeL(RougeL):
    """ROUGE-L for texts in any script: words as `unicode_words` finds them."""

    name = "rouge_l_unicode"
    reads_any_script = True


class Answered(Metric):
    """The share of predictions that contain the words of the right answer, one after the other.

    If the right answer is yes or no, the first of these two words in the prediction counts.
    """

    name = "answered"

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        pairs = zip(map(unicode_words, predictions), map(unicode_words, golds), strict=True)
        return np.array([_gives(text, answer) for text, answer in pairs], dtype=np.float64).reshape(-1, 1)


def _gives(text: Sequence[str], answer: Sequence[str]) -> bool:
    if list(answer) in (["yes"], ["no"]):
        return next((word for word in text if word in ("yes", "no")), None) == answer[0]
    return any(list(text[start : start + len(answer)]) == list(answer) for start in range(len(text)))


class Manners(Metric):
    """The share of the reference's manners that the prediction also shows, detected by rules; averaged over samples."""

    name = "manners"

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        return np.array([share_met(*pair) for pair in zip(predictions, golds, strict=True)]).reshape(-1, 1)


class _MannerOf(Metric):
    """The share of predictions that match the reference in one manner, among samples whose reference shows the manner.

    The statistics are (n, 2): whether the prediction matches, and whether the reference shows the manner.
    """

    dimension: ClassVar[str]
    averages_over_users = False  # a user's references may not show the manner

    def _statistics(self, predictions: Sequence[str], golds: Sequence[str]) -> Array:
        met = (manners_met(*pair).get(self.dimension) for pair in zip(predictions, golds, strict=True))
        return np.array([[bool(each), each is not None] for each in met], dtype=np.float64).reshape(-1, 2)

    def value(self, means: Array) -> Array:
        return per_counted(means)


MANNER_METRICS: tuple[type[Metric], ...] = tuple(
    type(f"_{dimension}", (_MannerOf,), {"name": f"manners_{dimension}", "dimension": dimension, "__doc__": ""})
    for dimension in DIMENSIONS
)
"""One metric for each manner: `manners_length`, `manners_emoji`, …"""


_KINDS: tuple[type[Metric], ...] = (
    *(Accuracy, MacroF1, MeanAbsoluteError, RootMeanSquaredError),
    *(Rouge1, RougeL, UnicodeRouge1, UnicodeRougeL, Answered, Manners),
    *(NegativeLogLikelihood, Choice, Margin, Divergence),
    *(OwnWordsRecall, OwnWordsPrecision, FormDistance, AttributionRank, AttributionFirst),
    IdentifiedPersona,
    *MANNER_METRICS,
    *KEYWORD_METRICS,
)
METRICS: dict[str, type[Metric]] = {kind.name: kind for kind in _KINDS}
LIKELIHOOD_METRICS = (NegativeLogLikelihood.name, Choice.name, Margin.name)
"""Metrics that tables show beside the task's metrics, for rows that have them."""


def register_metric(kind: type[Metric]) -> None:
    """Register a metric, so that the `metrics` of a task can name it."""
    register(METRICS, kind.name, kind, kind="metric")


def get_metric(name: str, *, labels: Sequence[str] = ()) -> Metric:
    """Return a metric of `METRICS` by name; metrics of ratings and the accuracy may have an estimate (`mae@median`).

    Args:
        labels: the task's labels, in order, for metrics that need labels.
    """
    kind, (stem, at, estimate) = metric_class(name), name.partition(AT)
    if kind is None:
        raise ConfigError(f"There is no metric {stem!r}; {nearest(stem, METRICS)}")
    if estimate in SAMPLED:
        return _sampled(kind(labels), estimate)
    if at and estimate == ARGMAX:  # a second name would repeat the same number in a table
        raise ConfigError(f"Write {stem!r} instead of {name!r}.")
    return kind(labels, estimate=estimate if at else ARGMAX)


def _sampled(metric: Metric, kind: str) -> Metric:
    if not can_be_sampled(metric):
        raise ConfigError(f"{metric.name} has no score of sampled answers; remove {AT}{kind}.")
    return SampledMetric(metric, kind)


def metric_class(name: str) -> type[Metric] | None:
    """Return the class of a metric by name, with or without an estimate; None for an unknown name."""
    stem = name.partition(AT)[0]
    if stem not in METRICS:
        load_plugins()
    return METRICS.get(stem)


def has_estimate(name: str) -> bool:
    """Return whether a metric's name contains a point estimate."""
    return AT in name and not _is_sampled(name)


def _is_sampled(name: str) -> bool:
    return name.partition(AT)[2] in SAMPLED


def is_instrument(name: str) -> bool:
    """Return whether a metric is one of the instruments of texts, by name."""
    kind = metric_class(name)
    return kind is not None and (kind.is_instrument or _is_sampled(name))


def is_invalid(prediction: str, labels: Sequence[str]) -> bool:
    """Return whether a prediction is not one of the labels, or, for a task without labels, empty."""
    text = prediction.strip()
    return text not in {label.strip() for label in labels} if labels else not text


@cache  # once a process
def _warn_of_other_scripts() -> None:
    logger.warning(
        "LaMP's ROUGE reads only the letters a to z, but many references are in other scripts: equal texts may score "
        "0. Add 'rouge_1_unicode' and 'rouge_l_unicode' to the task's metrics."
    )


def _number(text: str, default: float) -> float:
    try:
        return float(text.strip())
    except ValueError:
        return default
