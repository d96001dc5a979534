"""Rows that use no language model: what they ask of a task, and their fitting on what the run is trained on.

A regression is `classical.py`'s; a rule on the user's own answers, and a copy of the query, are here. A user without
answers gets what the same rule makes of all answers in the training split.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from personaplug.baselines.regression import Answerer, fit_classical
from personaplug.data.label_set import Array, LabelIds, LabelSet, ratings
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Reader, Task
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.errors import ConfigError, MissingData
from personaplug.llm.ngram_cache import check_ngrams
from personaplug.methods import COUNTED, WORDED, Condition, Rule
from personaplug.run import Run, drawn, encoded

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Fitted:
    """A rule that is ready.

    Attributes:
        answerer: answers with it.
        seconds: that fitting it took.
    """

    answerer: Answerer
    seconds: float


class Rules:
    """The rules of one table, each fitted once, on the samples that the run's plugs are trained on.

    Args:
        run: says which of the training split's samples those are.
        train: the training split; None if no row needs it.
        table: holds the vectors by which the run knows its training data again.
    """

    def __init__(self, run: Run, train: Reader | None, *, table: EmbeddingStore) -> None:
        self.run, self.train, self.table = run, train, table
        self._fitted: dict[Rule, Fitted] = {}

    def fitted(self, rule: Rule) -> Fitted:
        """A rule, fitted when it is first asked for.

        Raises:
            ConfigError: if the task does not have what the rule needs.
            MissingData: if the training split is needed and not given, or holds no answers.
            RunConflict: if the run was trained on other data.
        """
        if rule not in self._fitted:
            check_rule(rule, self.run.task)
            train = self._samples if rule.fitted else []
            began = time.monotonic()
            answerer = fit_rule(rule, self.run.task, train)
            self._fitted[rule] = Fitted(answerer, time.monotonic() - began)
        return self._fitted[rule]

    @cached_property
    def _samples(self) -> list[Sample]:
        if self.train is None:
            raise MissingData("Rows without a language model are fitted on the training split, which was not given.")
        samples = list(drawn(self.train, limit=self.run.config.training.train_limit, seed=0))
        if self.run.knows_its_data:
            known = encoded(samples, self.table, plug=self.run.config.plug, labels=self.run.task.labels)
            self.run.check_data(known, self.table)
        return samples


def check_rules(conditions: Sequence[Condition], task: Task) -> None:
    """Check that a task has what some rows need: the rules among them, and those that count or mix in own answers.

    Raises:
        ConfigError: naming the first row for which it has not.
    """
    for condition in conditions:
        if condition.phrases:
            check_ngrams(task)
        if condition.trained == COUNTED and not task.has_labelled_items:
            raise ConfigError(
                f"{condition.name} counts the labels among a user's own answers; {task.name} has none in its items."
            )
        if condition.rule is not None:
            check_rule(condition.rule, task)


def check_rule(rule: Rule, task: Task) -> None:
    """Check that a task has what a rule needs.

    Raises:
        ConfigError: saying what that is.
    """
    if rule.kind in WORDED:
        if task.kind != "text":
            raise ConfigError(
                f"{rule.kind} answers with words, which are no label of {task.name}; it is for free text."
            )
    elif task.kind == "text":
        raise ConfigError(
            f"{rule.kind} answers with one of a task's labels, and {task.name} has none: it writes free text. "
            f"For that there are copy, copy:10 and user-words."
        )
    elif rule.kind in ("user-median", "user-mean") and task.kind != "rating":
        raise ConfigError(
            f"{rule.kind} needs labels that are numbers (kind rating); those of {task.name} are none. "
            f"user-majority takes any labels."
        )
    elif rule.kind != "classical" and task.answer_field is None:
        raise ConfigError(
            f"{rule.kind} needs the answers in a history, and the items of {task.name} hold none (answer_field)."
        )


def fit_rule(rule: Rule, task: Task, train: Sequence[Sample]) -> Answerer:
    """Make a rule ready to answer.

    Args:
        rule: that fits the task; see `check_rule`.
        train: what it is fitted on; nothing for copy and user-words.
    Raises:
        ConfigError, MissingData: if it cannot be fitted on these samples.
    """
    if rule.kind == "classical":
        return fit_classical(task, train, part=rule.part)
    if rule.kind == "copy":
        return Copy(rule.words)
    if rule.kind == "user-words":
        return OwnWords(rule.words)
    closed = LabelSet(task.labels)
    if rule.kind == "user-majority":
        return OwnMajority(closed, train)
    return OwnNumber(closed, train, value=_NUMBERS[rule.kind])


class Copy:
    """The query as the answer, or so many of its first words; 0 = all of it as it is."""

    def __init__(self, words: int) -> None:
        self.words = words

    def answers(self, samples: Sequence[Sample]) -> list[str]:
        """Texts, one per sample."""
        if not self.words:
            return [sample.query for sample in samples]
        return [" ".join(sample.query.split()[: self.words]) for sample in samples]


class OwnWords:
    """The words that most of the user's own answers hold, the most frequent first; nothing for a user without any.

    Whatever is written, a metric of common words rewards the words that somebody always uses; this is what that alone
    is worth. An item without an answer counts as a whole.
    """

    def __init__(self, words: int) -> None:
        self.words = words

    def answers(self, samples: Sequence[Sample]) -> list[str]:
        """Texts, one per sample."""
        return [" ".join(_most_frequent(sample.history, count=self.words)) for sample in samples]


class OwnNumber:
    """A number made of the user's own ratings, as the nearest label.

    Args:
        train: its answers stand in for those of a user who has given none.
        value: makes it, (n,) to a number.
    Raises:
        MissingData: if no training sample has an answer that is a number.
    """

    def __init__(self, closed: LabelSet, train: Sequence[Sample], *, value: Callable[[Array], float]) -> None:
        self.closed, self.value = closed, value
        known = ratings(sample.target for sample in train)
        self.usual = closed.nearest(value(known)) if len(known) else _nothing_known()

    def answers(self, samples: Sequence[Sample]) -> list[str]:
        """Labels, one per sample."""
        own = [ratings(item.answer for item in sample.history) for sample in samples]
        return [self.closed.nearest(self.value(given)) if len(given) else self.usual for given in own]


class OwnMajority:
    """The user's own most frequent answer; of several as frequent the one that was given last.

    Args:
        train: its most frequent answer stands in for that of a user who has given none.
    Raises:
        MissingData: if no training sample has an answer among the labels.
    """

    def __init__(self, closed: LabelSet, train: Sequence[Sample]) -> None:
        self.closed = closed
        known = np.array([place for sample in train if (place := closed.index(sample.target)) >= 0], dtype=np.int64)
        self.usual = closed.labels[_majority(known)] if len(known) else _nothing_known()

    def answers(self, samples: Sequence[Sample]) -> list[str]:
        """Labels, one per sample."""
        own = [self.closed.indices(sample.history) for sample in samples]
        return [self.closed.labels[_majority(given)] if len(given) else self.usual for given in own]


_NUMBERS: dict[str, Callable[[Array], float]] = {
    "user-median": lambda given: float(np.median(given)),
    "user-mean": lambda given: float(np.mean(given)),
}


def _most_frequent(items: Sequence[HistoryItem], *, count: int) -> list[str]:
    texts = [item.text if item.answer is None else item.answer for item in reversed(items)]  # of equals, the later ones
    held = Counter(word for text in texts for word in dict.fromkeys(_WORD.findall(text.lower())))
    return [word for word, _ in held.most_common(count)]


def _majority(places: LabelIds) -> int:
    counts = np.bincount(places)
    return int(next(place for place in places[::-1] if counts[place] == counts.max()))


def _nothing_known() -> str:
    raise MissingData(
        "No training sample has an answer among the task's labels: there is nothing to say of a user without any."
    )
