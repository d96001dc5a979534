"""What a data set is: a declared Task, and a Reader that yields Samples one at a time and reports what it met.

A task is declared, never guessed from a path. Readers stream, so that memory does not grow with the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from personaplug.data.records import HistoryItem, Sample
from personaplug.errors import ConfigError, RecordError

TaskKind = Literal["label", "rating", "text"]


@dataclass(frozen=True)
class Task:
    """What is asked, what an item of history looks like, and how an answer is scored.

    Attributes:
        name: what results files call it.
        kind: "label" (one of `labels`), "rating" (labels that are numbers, in order) or "text".
        item_fields: the fields of an item that make its text, in order (PPlug's Table 7).
        answer_field: the field that is the user's answer; added to the item's text if not among
            `item_fields`.
        metrics: names of `personaplug.analysis.metrics`, the first one leads.
        labels: the closed set of answers; empty for "text".
        query_after: the query is what follows the first occurrence of this marker in the input.
        max_new_tokens: how long an answer may be.
        query_pattern: for inputs that no single marker cuts: a regular expression, searched in the input with
            DOTALL, whose groups joined by a space are the query. Without marker and pattern the query is the
            input.
        item_template: how an item stands in a prompt, each `{field}` for that field's value; "" = as
            `HistoryItem.text`.
        item_joint: what stands between two items in a prompt.
        history_template: how items and input make a prompt: `{history}` and `{input}`, each once.
        history_after: if set, the items are put right behind the first occurrence of this word in the input, and
            `history_template` serves inputs without it only.
    """

    name: str
    kind: TaskKind
    item_fields: tuple[str, ...]
    answer_field: str | None
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    query_after: str = ""
    max_new_tokens: int = 128
    query_pattern: str = ""
    item_template: str = ""
    item_joint: str = ", and "
    history_template: str = "{history}. {input}"
    history_after: str = ""

    @property
    def field_names(self) -> tuple[str, ...]:
        """The fields that an item of this task holds: its text's, then the answer's if it is not among
        them."""
        extra = (self.answer_field,) if self.answer_field and self.answer_field not in self.item_fields else ()
        return self.item_fields + extra

    @property
    def has_labelled_items(self) -> bool:
        """Whether the items of a history hold answers from the closed set of labels."""
        return bool(self.labels) and self.answer_field is not None

    @property
    def has_options(self) -> bool:
        """Whether labels stand for options in the input: the pattern of the query has a group for each label."""
        return len(self.labels) > 1 and re.compile(self.query_pattern).groups == len(self.labels)


def template_parts(template: str) -> list[str]:
    """Split a template at its placeholders: text, name, text, name, …, text."""
    return re.split(r"\{([^{}]*)\}", template)


@dataclass
class ReadReport:
    """What a reader met on the way; filled as it is read.

    Attributes:
        samples: how many samples were yielded.
        items: how many items of history they held.
        skipped: records passed over (never more than the `skip_bad` asked for).
        cut_items: items left out because a history was longer than the cap.
        problems: what was wrong with each skipped record, and where.
    """

    samples: int = 0
    items: int = 0
    skipped: int = 0
    cut_items: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, sample: Sample) -> Sample:
        """Count a sample that is about to be yielded, and return it."""
        self.samples += 1
        self.items += len(sample.history)
        return sample

    def skip(self, error: RecordError, *, allowed: int) -> None:
        """Count a broken record, or raise it when no more may be passed over.

        Raises:
            RecordError: the error itself, once `allowed` records have been skipped.
        """
        if self.skipped >= allowed:
            raise error
        self.skipped += 1
        self.problems.append(str(error))


class Reader(Protocol):
    """A data set split that can be read as often as needed."""

    task: Task
    report: ReadReport

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in file order; `report` is fresh at the start and complete at the end.

        Raises:
            RecordError: for the first broken record beyond the allowed number.
        """
        ...


def check_skip_bad(skip_bad: int) -> int:
    """Return `skip_bad` if it can bound something.

    Raises:
        ConfigError: if it is negative.
    """
    if skip_bad < 0:
        raise ConfigError(f"skip_bad bounds how many broken records may be passed over: 0 or more, found {skip_bad}.")
    return skip_bad


def check_max_history(max_history: int) -> int:
    """Return `max_history` if it can bound a history.

    Raises:
        ConfigError: if it is negative.
    """
    if max_history < 0:
        raise ConfigError(f"max_history bounds the items of a history: 0 or more, found {max_history}.")
    return max_history


def by_moment(items: Sequence[tuple[datetime | None, HistoryItem]]) -> tuple[HistoryItem, ...]:
    """Put items in time order; without a moment for each of them they stay as they come.

    The moments order items of one day, which the date of a HistoryItem cannot.
    """
    timed = [(moment, item) for moment, item in items if moment is not None]
    if len(timed) < len(items):
        return tuple(item for _, item in items)
    return tuple(item for _, item in sorted(timed, key=lambda pair: pair[0]))


def latest_items(
    items: Sequence[tuple[datetime | None, HistoryItem]], *, max_history: int, report: ReadReport
) -> tuple[HistoryItem, ...]:
    """Put items in time order, keep the latest `max_history`, and count the others in the report."""
    cut = max(len(items) - max_history, 0)
    report.cut_items += cut
    return by_moment(items)[cut:]
