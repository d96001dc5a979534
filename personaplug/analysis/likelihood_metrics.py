"""Metrics of a model's probabilities: of right answers, against rejected ones, against the plain model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from personaplug.analysis.metric_base import Array, LikelihoodMetric, Likelihoods, per_counted


class _PerToken(LikelihoodMetric):
    """A mean over the tokens of all samples, in nats. The statistics are a sample's sum and its tokens, (n, 2)."""

    greater_is_better = False

    def of_likelihoods(self, likelihoods: Likelihoods) -> Array:
        return np.array([row[:2] for row in likelihoods], dtype=np.float64).reshape(-1, 2)

    def value(self, means: Array) -> Array:
        return np.asarray(means[..., 0] / means[..., 1])


class NegativeLogLikelihood(_PerToken):
    """NLL of the right answers, in nats per token; per answer of a closed set that is scored.

    A proper score: it shows what a model knows of a user long before its likeliest text changes.

    Source: Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007.
    """

    name = "nll"


class Divergence(_PerToken):
    """How far a row is from the plain model where the text is neutral, in nats per token; 0 for the row `plain`.

    The text is the plain model's own greedy answer to the bare prompt, at most 32 tokens with the end of text, the same
    for all rows. Over its tokens t this is the mean of KL(plain ‖ row) = Σ_v p(v) · log(p(v) / q(v)), where p and q are
    the distributions of token t behind the tokens before it: p of the plain model, q of the row with its prompt and its
    soft tokens. It needs no right answers.
    """

    name = "divergence"
    of_plain_answers = True


class _AgainstRejected(LikelihoodMetric):
    """A score of the right answer against the best rejected one, by log p per token.

    The statistics are the score and 1; 0 and 0 of a sample without rejected answers, which does not count.
    """

    def of_likelihoods(self, likelihoods: Likelihoods) -> Array | None:
        leads = [_lead_per_token(row) for row in likelihoods]
        statistics = [(0.0, 0.0) if lead is None else (self._score(lead), 1.0) for lead in leads]
        return np.array(statistics) if any(lead is not None for lead in leads) else None

    def value(self, means: Array) -> Array:
        return per_counted(means)

    @abstractmethod
    def _score(self, lead: float) -> float:
        """Return the score of a sample; `lead` is the right answer's log p per token above the best rejected one's."""


class Choice(_AgainstRejected):
    """The share of samples whose right answer is likelier per token than each rejected one.

    Chance is 1 / (1 + rejected answers).
    """

    name = "choice"

    def _score(self, lead: float) -> float:
        return float(lead > 0)


class Margin(_AgainstRejected):
    """The mean distance of the right answer's log p per token to the best rejected one's, in nats."""

    name = "margin"

    def _score(self, lead: float) -> float:
        return lead


def _lead_per_token(row: Sequence[float]) -> float | None:
    """Return the log p per token of a row's first answer above the best other one's; None without others."""
    right, *rejected = (loss / tokens for loss, tokens in zip(row[::2], row[1::2], strict=True))
    return min(rejected) - right if rejected else None
