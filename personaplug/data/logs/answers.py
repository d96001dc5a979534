"""Decide what the answers of a log are: one of a closed set, a rating, or a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from personaplug.data.event_copies import comparable
from personaplug.data.logs.options import LogOptions
from personaplug.data.numbers import number_or_none
from personaplug.data.task import Task, TaskKind
from personaplug.data.values import Flaw, as_text
from personaplug.errors import ConfigError

_MAX_LABELS = 50
_MAX_RATINGS = 21  # 0 to 10 in half steps, or 0 to 20
_MIN_ROWS_PER_LABEL = 5
_MAX_LABEL_LENGTH = 40
_MIN_NUMBERS = 0.95  # share of numbers among the answers of a rating
_WHOLE = re.compile(r"([+-]?\d+)(?:[.,]0+)?", re.ASCII)
_MAX_RARE = 0.002  # share of a number that counts as a typing error
_MAX_UNKNOWN = {"rating": 0.1, "label": 0.5}  # share of a run's answers; more show another scale or another column


@dataclass(frozen=True)
class AnswerKind:
    """The kind of a column's answers.

    Attributes:
        labels: the closed set, or the steps of a rating; empty for texts.
        reason: of the decision, in words and numbers.
        spellings: labels by their spelling without capitals and extra blanks.
    """

    kind: TaskKind
    labels: tuple[str, ...]
    reason: str
    spellings: Mapping[str, str]

    def read(self, text: str) -> str | None:
        """Return the label that a value means, or a text as it is; None if no label fits."""
        if not self.labels:
            return text
        label = self.spellings.get(comparable(text))
        if label is None and (number := number_or_none(text)) is not None:
            label = self.spellings.get(_plain(number))
        return label


def decide_answers(texts: Sequence[str], *, column: str, options: LogOptions) -> AnswerKind:
    """Decide the kind of a column's answers by its values; `kind` and `labels` of the options override them.

    Raise ConfigError if the kind is unclear.
    """
    texts = _whole(texts)
    counts, option = Counter(comparable(text) for text in texts), options.option
    kind, labels = _checked(options.kind), _label_texts(options.labels)
    if labels:
        is_scale = all(number_or_none(label) is not None for label in labels) and len(labels) > 2
        return _closed(kind or ("rating" if is_scale else "label"), labels, f"{len(labels)} labels were given")
    if kind in ("text", "chat"):
        return AnswerKind(kind, (), option("kind", kind), {})
    if kind is None and len(counts) == 1:
        raise ConfigError(
            f"All answers in the column {column!r} are equal, so there is nothing to learn. Give another column by "
            f"{option('answer')}, or all possible answers by {option('label')}."
        )
    if kind != "label" and (scale := _scale(texts)):
        step = "half steps" if any("." in label for label in scale) else "steps of 1"
        return _closed("rating", scale, f"numbers from {scale[0]} to {scale[-1]} in {step}")
    if kind == "rating":
        raise ConfigError(
            f"The column {column!r} is no rating: expected numbers of a scale with at most {_MAX_RATINGS} steps, found "
            f"{len(counts):,} different values. Give another column by {option('answer')}, or the steps by "
            f"{option('label')}."
        )
    if kind == "label" or _is_closed(counts, texts):
        if not 2 <= len(counts) <= 1000:
            raise ConfigError(f"A closed set of answers has 2 to 1,000 values; {column!r} has {len(counts):,}.")
        return _closed("label", _spelled(texts), f"{len(counts):,} different short values")
    if _number_share(counts) > _MIN_NUMBERS:
        raise ConfigError(
            f"The column {column!r} has {len(counts):,} different numbers. Expected a scale of at most {_MAX_RATINGS} "
            f"steps, or texts. Round the numbers to a few steps, or give {option('kind', 'text')}, or another column "
            f"by {option('answer')}."
        )
    repeated = len(texts) / max(len(counts), 1)
    if repeated >= _MIN_ROWS_PER_LABEL and max(map(len, counts), default=0) <= _MAX_LABEL_LENGTH:
        raise ConfigError(
            f"The column {column!r} has {len(counts):,} different short values, each in {repeated:.0f} rows on "
            f"average. They may be a closed set or texts: give {option('kind', 'label')} or {option('kind', 'text')}."
        )
    length = sum(map(len, texts)) / max(len(texts), 1)
    return AnswerKind("text", (), f"{len(counts):,} different texts of {length:.0f} characters on average", {})


def labels_of(task: Task) -> AnswerKind:
    """Return the kind of a task's answers."""
    closed = _closed(task.kind, task.labels, f"the run's task {task.name}")
    return closed if task.labels else AnswerKind(task.kind, (), closed.reason, {})


def check_answers(texts: Sequence[str], *, column: str, task: Task, has_same_name: bool) -> None:
    """Raise ConfigError if the answers of a log are of another kind than those of a run's task.

    Args:
        has_same_name: the column has the name of the task's answer field. So the texts of such a run may be numbers;
            a chat has the same field for all logs.
    """
    if task.labels:
        _check_known(texts, column=column, task=task)
        return
    found = _closed_values(texts)
    if found and (task.kind == "chat" or not has_same_name):
        expected = "replies" if task.kind == "chat" else "texts"
        raise ConfigError(
            f"The run's task {task.name} has {expected} as answers, but the column {column!r} holds {found}. Give the "
            f"column of the {expected} by --answer, or a run that was trained on such values. If they are {expected}, "
            f"import the log with --kind {task.kind} and load the new folder."
        )


def _check_known(texts: Sequence[str], *, column: str, task: Task) -> None:
    answers = labels_of(task)
    unknown = sum(answers.read(text) is None for text in texts)
    if unknown > _MAX_UNKNOWN[task.kind] * len(texts):
        is_scale = task.kind == "rating"
        expected = f"ratings from {task.labels[0]} to {task.labels[-1]}" if is_scale else f"{len(task.labels)} labels"
        raise ConfigError(
            f"The run's task {task.name} has {expected} as answers, but {unknown:,} of {len(texts):,} values in the "
            f"column {column!r} are none of them. Give the column of these answers by --answer, or a run that was "
            f"trained on this log. If the other rows are right, remove these rows from the log."
        )


def _closed_values(texts: Sequence[str]) -> str:
    """Describe answers that are numbers or a closed set; empty if they are other texts."""
    counts = Counter(comparable(text) for text in texts)
    if counts and _number_share(counts) > _MIN_NUMBERS:
        return f"{len(counts):,} different numbers"
    return f"{len(counts):,} different short values" if _is_closed(counts, texts) else ""


def _checked(name: str | None) -> TaskKind | None:
    kinds: dict[str, TaskKind] = {"label": "label", "rating": "rating", "text": "text", "chat": "chat"}
    if name is not None and name not in kinds:
        raise ConfigError(f"The kind of the answers is one of {', '.join(kinds)}; found {name!r}.")
    return kinds[name] if name else None


def _label_texts(labels: Sequence[object]) -> list[str]:
    try:
        return [as_text(label, "a label") for label in labels]
    except Flaw as flaw:
        raise ConfigError(f"The labels are wrong: {flaw}.") from None


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
    """Return the steps of a scale without gaps; empty if the texts are no scale. Two numbers are labels, no scale."""
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


def _whole(texts: Sequence[str]) -> Sequence[str]:
    """Return whole numbers without decimals, 1.0 as 1; other texts as they are if one of them is no whole number."""
    matches = [_WHOLE.fullmatch(text.strip()) for text in texts]
    return [match[1] for match in matches if match] if all(matches) else texts


def _plain(number: float) -> str:
    return f"{number:.10g}"
