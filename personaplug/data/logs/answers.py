"""Decide what the answers of a log are: one of a closed set, a rating, or a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from personaplug.data.event_copies import comparable
from personaplug.data.numbers import number_or_none
from personaplug.data.task import Task, TaskKind
from personaplug.errors import ConfigError

_MAX_LABELS = 50
_MAX_RATINGS = 21  # 0 to 10 in half steps, or 0 to 20
_MIN_ROWS_PER_LABEL = 5
_MAX_LABEL_LENGTH = 40
_MIN_NUMBERS = 0.95  # share of the answers that are numbers, if the answer is a rating
_MAX_RARE = 0.002  # share of a number that may be a typing error


@dataclass(frozen=True)
class AnswerKind:
    """What the answers of a column are.

    Attributes:
        labels: the closed set, or the steps of a rating; empty for texts.
        reason: why, in words and numbers.
        spellings: labels by what is equal to them but for capitals and blanks.
    """

    kind: TaskKind
    labels: tuple[str, ...]
    reason: str
    spellings: Mapping[str, str]

    def read(self, text: str) -> str | None:
        """Return the answer that a value stands for; None if it is none of the labels."""
        if not self.labels:
            return text
        label = self.spellings.get(comparable(text))
        if label is None and (number := number_or_none(text)) is not None:
            label = self.spellings.get(_plain(number))
        return label


def decide_answers(
    texts: Sequence[str], *, column: str, kind: str | None = None, labels: Sequence[str] = ()
) -> AnswerKind:
    """Decide the kind of a column's answers; raise ConfigError if it cannot be told.

    Args:
        kind, labels: instead of what the values show.
    """
    counts = Counter(comparable(text) for text in texts)
    if labels:
        is_scale = all(number_or_none(label) is not None for label in labels) and len(labels) > 2
        return _closed(_kind(kind) or ("rating" if is_scale else "label"), labels, f"{len(labels)} labels were given")
    if kind in ("text", "chat"):
        return AnswerKind(_kind(kind) or "text", (), f"--kind {kind}", {})
    if kind != "label" and (scale := _scale(texts)):
        step = "half steps" if any("." in label for label in scale) else "steps of 1"
        return _closed("rating", scale, f"numbers from {scale[0]} to {scale[-1]} in {step}")
    if kind == "rating":
        raise ConfigError(
            f"The column {column!r} is no rating: expected numbers of a scale with at most {_MAX_RATINGS} steps, found "
            f"{len(counts):,} different values. Give another --answer, or each step by --label."
        )
    if kind == "label" or _is_closed(counts, texts):
        if not 2 <= len(counts) <= 1000:
            raise ConfigError(f"A closed set of answers has 2 to 1,000 values; {column!r} has {len(counts):,}.")
        return _closed("label", _spelled(texts), f"{len(counts):,} different short values")
    if _number_share(counts) > _MIN_NUMBERS:
        raise ConfigError(
            f"The column {column!r} has {len(counts):,} different numbers, which are neither a scale of at most "
            f"{_MAX_RATINGS} steps nor a text. Round them to a few steps, or give --kind text or another --answer."
        )
    repeated = len(texts) / max(len(counts), 1)
    if repeated >= _MIN_ROWS_PER_LABEL and max(map(len, counts), default=0) <= _MAX_LABEL_LENGTH:
        raise ConfigError(
            f"The column {column!r} has {len(counts):,} different short values, each in {repeated:.0f} rows on "
            f"average. It cannot be told whether they are a closed set: give --kind label or --kind text."
        )
    length = sum(map(len, texts)) / max(len(texts), 1)
    return AnswerKind("text", (), f"{len(counts):,} different texts of {length:.0f} characters on average", {})


def labels_of(task: Task) -> AnswerKind:
    """Return how answers of a task that is known are read."""
    closed = _closed(task.kind, task.labels, f"the run's task {task.name}")
    return closed if task.labels else AnswerKind(task.kind, (), closed.reason, {})


def _kind(name: str | None) -> TaskKind | None:
    kinds: dict[str, TaskKind] = {"label": "label", "rating": "rating", "text": "text", "chat": "chat"}
    return kinds[name] if name else None


def _closed(kind: TaskKind, labels: Sequence[str], reason: str) -> AnswerKind:
    spellings = {comparable(label): label for label in labels}
    for label in labels:
        if (number := number_or_none(label)) is not None:
            spellings.setdefault(_plain(number), label)
    return AnswerKind(kind, tuple(labels), reason, spellings)


def _is_closed(counts: Counter[str], texts: Sequence[str]) -> bool:
    is_short = max(map(len, counts), default=0) <= _MAX_LABEL_LENGTH
    return is_short and 2 <= len(counts) <= _MAX_LABELS and _MIN_ROWS_PER_LABEL * len(counts) <= len(texts)


def _number_share(counts: Counter[str]) -> float:
    return sum(count for text, count in counts.items() if number_or_none(text) is not None) / max(counts.total(), 1)


def _scale(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the steps of a scale of numbers, without gaps; empty if the texts are none. Two numbers are a choice."""
    numbers = Counter(number for text in texts if (number := number_or_none(text)) is not None)
    if numbers.total() < _MIN_NUMBERS * len(texts):
        return ()
    frequent = [number for number, count in numbers.items() if count > _MAX_RARE * numbers.total()]
    for step in (1.0, 0.5):
        if len(frequent) > 2 and all((number / step).is_integer() for number in frequent):
            count = round((max(frequent) - min(frequent)) / step) + 1
            if count <= _MAX_RATINGS:
                return tuple(_plain(min(frequent) + step * index) for index in range(count))
    return ()


def _spelled(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the most frequent spelling of each value, sorted; numbers by their size."""
    spellings: dict[str, Counter[str]] = {}
    for text in texts:
        spellings.setdefault(comparable(text), Counter())[text.strip()] += 1
    labels = [spelled.most_common(1)[0][0] for spelled in spellings.values()]
    return tuple(sorted(labels, key=lambda label: (number_or_none(label) or 0.0, label)))


def _plain(number: float) -> str:
    return f"{number:.10g}"
