"""Metrics of a model's probabilities: for right answers, against rejected answers, and against the plain model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from personaplug.analysis.metric_base import Array, LikelihoodMetric, Likelihoods, per_counted


class _PerToken(LikelihoodMetric):
    """A mean over the tokens of all samples, in nats. The statistics are each sample's sum and token count, (n, 2)."""

    greater_is_better = False

    def of_likelihoods(self, likelihoods: Likelihoods) -> Array:
        return np.array([row[:2] for row in likelihoods], dtype=np.float64).reshape(-1, 2)

    def value(self, means: Array) -> Array:
        return np.asarray(means[..., 0] / means[..., 1])


class NegativeLogLikelihood(_PerToken):
    """NLL of the right answers, in nats per token; per answer if a closed set of answers is scored.

    As a proper score, it shows an effect of the history even if the likeliest text does not change.

    Source: Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007.
    """

    name = "nll"


class Divergence(_PerToken):
    """The distance of a row from the plain model on that model's answers, in nats per token; 0 for the row `plain`.

    All rows are compared on the same text: the plain model's greedy answer to the bare prompt, up to 32 tokens. The
    value is the mean over its tokens of KL(plain ‖ row) = Σ_v p(v) · log(p(v) / q(v)). Here p is the plain model's
    distribution of the next token, and q the row's, with its prompt and its soft tokens. No right answers are needed.
    """

    name = "divergence"
    of_plain_answers = True


class _AgainstRejected(LikelihoodMetric):
    """A score of the right answer against the best rejected answer, by log p per token.

    The statistics are the score and 1. A sample without rejected answers does not count and has 0 and 0.
    """

    def of_likelihoods(self, likelihoods: Likelihoods) -> Array | None:
        leads = [_lead_per_token(row) for row in likelihoods]
        statistics = [(0.0, 0.0) if lead is None else (self._score(lead), 1.0) for lead in leads]
        return np.array(statistics) if any(lead is not None for lead in leads) else None

    def value(self, means: Array) -> Array:
        return per_counted(means)

    @abstractmethod
    def _score(self, lead: float) -> float:
        """Return the score of a sample.

        `lead` is the right answer's log p per token minus that of the best rejected answer.
        """


class Choice(_AgainstRejected):
    """The share of samples whose right answer is likelier per token than each rejected answer.

    Chance is 1 / (1 + number of rejected answers).
    """

    name = "choice"

    def _score(self, lead: float) -> float:
        return float(lead > 0)


class Margin(_AgainstRejected):
    """The right answer's log p per token minus the best rejected answer's, in nats, averaged over samples."""

    name = "margin"

    def _score(self, lead: float) -> float:
        return lead


def _lead_per_token(row: Sequence[float]) -> float | None:
    """Return the first answer's log p per token minus the best other answer's; None without other answers."""
    right, *rejected = (loss / tokens for loss, tokens in zip(row[::2], row[1::2], strict=True))
    return min(rejected) - right if rejected else None
