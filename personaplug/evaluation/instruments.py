"""The instruments of texts: measures of written answers that need the histories of the evaluation's users."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from personaplug.analysis.attribution_of_texts import AttributionFirst, AttributionRank, AuthorModels
from personaplug.analysis.form_distance import FormDistance, farthest_distances
from personaplug.analysis.identification_metrics import IdentifiedPersona
from personaplug.analysis.method_info import WRONG_USER
from personaplug.analysis.metric_base import AT, Array
from personaplug.analysis.metrics import get_metric
from personaplug.analysis.own_words import OwnWordsPrecision, OwnWordsRecall, Words, own_words, words_of
from personaplug.analysis.sampled_metrics import SAMPLED, can_be_sampled
from personaplug.config import EvaluationConfig
from personaplug.data.records import turns_of
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import past_answers
from personaplug.encoders.style_features import FEATURES, FORM_FEATURES, style_features_of
from personaplug.methods.context import EvalContext

logger = logging.getLogger(__name__)

TEXT_INSTRUMENTS = (
    *(OwnWordsRecall.name, OwnWordsPrecision.name, FormDistance.name),
    *(AttributionRank.name, AttributionFirst.name),
)
"""Metrics that tables of tasks with free text show beside the task's metrics."""


def has_instruments(task: Task) -> bool:
    """Return whether the answers of a task are free text."""
    return not task.labels


def instruments_of(task: Task, config: EvaluationConfig) -> list[str]:
    """Return the names of the instruments that an evaluation of a task shows, in the order of the columns."""
    if not has_instruments(task):
        return []
    identification = (IdentifiedPersona.name,) if config.identification_samples else ()
    metrics = [get_metric(name) for name in task.metrics] if config.sampled_answers else []
    sampled = [f"{metric.name}{AT}{kind}" for metric in metrics if can_be_sampled(metric) for kind in SAMPLED]
    return [*TEXT_INSTRUMENTS, *identification, *sampled]


@dataclass(frozen=True)
class _WordsOfSample:
    """The words of the right answer, of the input and of the past answers."""

    right: Words
    inputs: Words
    past: Words


class TextInstruments:
    """Measures the texts of any row of an evaluation. What they are compared with is the same for all rows."""

    def __init__(self, context: EvalContext) -> None:
        self.context = context
        self._own: dict[int, list[Words]] = {}
        self._farthest: Array | None = None

    def statistics(self, texts: Sequence[str], references: Sequence[str], *, seed: int) -> dict[str, Array]:
        """Return the per-sample statistics of each instrument that applies, (n, d), by name.

        Args:
            seed: the row's. It determines the strangers, which are those of the row `wrong-user`.
        """
        statistics: dict[str, Array] = {}
        own = self.own(seed)
        for metric in (OwnWordsRecall(), OwnWordsPrecision()):
            if own is not None and (counts := metric.of_texts(texts, own)) is not None:
                statistics[metric.name] = counts
        if (distances := self._form_distances(texts, references)) is not None:
            statistics[FormDistance.name] = distances
        return statistics | self.authors.statistics(texts, self.context.owners)

    def _form_distances(self, texts: Sequence[str], references: Sequence[str]) -> Array | None:
        right, is_empty = _forms(references), np.array([not text.strip() for text in texts])
        if is_empty.any() and self._farthest is None:
            self._farthest = farthest_distances(right)
        farthest = np.zeros(len(texts)) if self._farthest is None else self._farthest
        return FormDistance().of_forms(_forms(texts), right, is_empty=is_empty, farthest=farthest)

    def own(self, seed: int) -> list[Words] | None:
        """Return the own words of each sample, the same for all rows; None with fewer than two users."""
        if len(set(self.context.owners)) < 2:
            return None
        if seed not in self._own:
            drawn = self.context.assign(WRONG_USER, seed=seed)
            words = zip(self._words, drawn, strict=True)
            self._own[seed] = [
                own_words(of.right, inputs=of.inputs, past=of.past, stranger=self._words[a.source].past)
                for of, a in words
                if a.source is not None
            ]
        return self._own[seed]

    @cached_property
    def _words(self) -> list[_WordsOfSample]:
        words: dict[str, Words] = {}  # the samples of a user share past answers

        def of_texts(texts: Iterable[str]) -> Words:
            texts = list(texts)
            words.update((text, words_of([text])) for text in texts if text not in words)
            return frozenset().union(*(words[text] for text in texts))

        return [
            _WordsOfSample(
                of_texts([sample.target or ""]),
                of_texts(message for _, message in turns_of(sample.full_prompt)),
                of_texts(past_answers(sample.history)),
            )
            for sample in self.context.texts
        ]

    @cached_property
    def authors(self) -> AuthorModels:
        """The models that attribute texts to users, fitted on all past answers of the evaluation's users."""
        answers: dict[str, list[str]] = {}
        for text in self.context.texts:
            answers.setdefault(text.owner, []).extend(past_answers(text.history))
        references = [text.target for text in self.context.texts if text.target is not None]
        logger.info("Attribution: training on the past answers of %d users.", len(answers))
        return AuthorModels(answers, references, seed=self.context.config.draw_seed)


def _forms(texts: Sequence[str]) -> Array:
    """Return the features of form of each text, (n, F)."""
    columns = [FEATURES.index(name) for name in FORM_FEATURES]
    return style_features_of(texts)[:, columns].astype(np.float64)
