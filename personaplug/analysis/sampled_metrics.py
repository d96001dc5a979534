"""Expected score and best of k: a metric of several sampled answers to each question.

`rouge_1@expected` is the mean over the answers, with less noise than the score of one greedy answer. `rouge_1@best` is
the score of the best of the k answers by that metric, which needs the right answer to choose: the room for a choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from personaplug.analysis.method_info import MethodInfo
from personaplug.analysis.metric_base import AT, Array, MeasuredMetric, Metric

EXPECTED, BEST = "expected", "best"
SAMPLED = (EXPECTED, BEST)


class SampledMetric(MeasuredMetric):
    """A metric of sampled answers.

    Args:
        metric: a metric that is the mean of one number per answer, and greater is better; see `can_be_sampled`.
        kind: "expected" or "best".
    """

    needs = "sampled answers"
    shown_for = "rows with a language model, if sampled_answers is above 0"

    def __init__(self, metric: Metric, kind: str) -> None:
        super().__init__(metric.labels)
        self.metric, self.kind, self.name = metric, kind, f"{metric.name}{AT}{kind}"

    def of_samples(self, answers: Sequence[Sequence[str]], golds: Sequence[str]) -> Array:
        """Compute the statistics of each sample, (n, 1), from its k answers, (n, k) texts."""
        texts = [text for of_sample in answers for text in of_sample]
        repeated = [gold for of_sample, gold in zip(answers, golds, strict=True) for _ in of_sample]
        scores = self.metric.statistics(texts, repeated).reshape(len(answers), -1)
        of_samples: Array = scores.mean(axis=1) if self.kind == EXPECTED else scores.max(axis=1)
        return of_samples[:, None]

    def applies_to(self, method: MethodInfo) -> bool:
        return method.has_language_model


def can_be_sampled(metric: Metric) -> bool:
    """Return whether a metric is the mean of one number per answer, and greater is better."""
    return metric.of_answers and metric.greater_is_better and type(metric).value is Metric.value
