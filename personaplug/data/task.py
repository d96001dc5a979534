"""The Task that a data set declares, and the Reader that yields its samples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from personaplug.data.patterns import group_count
from personaplug.data.records import Sample

TaskKind = Literal["label", "rating", "text", "chat"]

MAX_NEW_TOKENS = 65_536
"""Upper bound of `Task.max_new_tokens`. Decoding allocates memory for all of them at its start."""


@dataclass(frozen=True)
class Task:
    """The form of queries and history items, and the metrics of predictions.

    Without `query_after` and `query_pattern`, the whole input is the query.

    Attributes:
        kind: "label" (one of `labels`), "rating" (labels that are ascending numbers), "text", or "chat" (text that
            answers any prompt, the last message of a conversation).
        item_fields: the fields that make an item's text, in order (PPlug's Table 7).
        answer_field: the field with the user's answer; appended to the item's text if not in `item_fields`.
        metrics: names from `personaplug.analysis.metrics`; the first one is the main metric.
        labels: the closed set of answers; empty for "text" and "chat".
        query_after: a marker; the query is the text after its first occurrence in the input.
        query_pattern: a regular expression of RE2, in which `.` matches line breaks; its groups,
            joined by spaces, are the query.
        item_template: an item in a prompt, with a `{field}` for each value; "" means `HistoryItem.text`.
        item_joint: the text between two items in a prompt.
        history_template: a prompt with items; contains `{history}` and `{input}` once each.
        history_after: a word; if it is in the input, the items follow its first occurrence and `history_template`
            is not used.
        image_field: the field with an item's picture; None = items have no pictures.
        vector_field: the field with an embedding of the item that was computed elsewhere; None = there is none.
        name_field: the field of `item_fields` with the name of a concept, such as a pet; None = items are no concepts.
            A question that names or shows a concept gets the item's fields as text, see `encoders.concepts`.
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
    image_field: str | None = None
    vector_field: str | None = None
    name_field: str | None = None

    @property
    def field_names(self) -> tuple[str, ...]:
        """All fields of an item: `item_fields`, then `answer_field` if it is not among them."""
        return tuple(dict.fromkeys(filter(None, (*self.item_fields, self.answer_field))))

    @property
    def has_labelled_items(self) -> bool:
        """True if history items have answers from the closed set of labels."""
        return bool(self.labels) and self.answer_field is not None

    @property
    def has_options(self) -> bool:
        """True if labels refer to options in the input: `query_pattern` has a group for each label."""
        return len(self.labels) > 1 and group_count(self.query_pattern) == len(self.labels)


def template_parts(template: str) -> list[str]:
    """Split a template at its placeholders: text, name, text, name, …, text."""
    return re.split(r"\{([^{}]*)\}", template)


@dataclass
class ReadReport:
    """Counts of one pass of a reader.

    Attributes:
        rows: records, including broken ones.
        users: users in the records; for LaMP's files, users with a sample.
        rows_of_users: the number of rows of each user of a log, without copies.
        items: items in the histories of the samples.
        skipped: broken records; `problems` holds the position and the defect of each.
        copies: rows left out because an earlier row is the same event.
        unclear: rows without a sample because their copies have different answers.
        too_early: rows without a sample because their history is too short.
        cut_items: items left out because a history was longer than `max_history`.
        own_answers: samples with an item in their history that has the text and the answer of the question.
        left_out: counts of other omissions by reason ("turns with tool calls").
    """

    rows: int = 0
    users: int = 0
    samples: int = 0
    items: int = 0
    skipped: int = 0
    copies: int = 0
    unclear: int = 0
    too_early: int = 0
    cut_items: int = 0
    own_answers: int = 0
    rows_of_users: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Describe the counts in one line."""
        users = f" of {self.users:,} users" if self.users else ""
        omissions = (
            (self.copies, "copies of earlier events left out"),
            (self.too_early, "rows left out because their history is too short"),
            (self.unclear, "rows left out because their copies have different answers"),
            (self.cut_items, "items beyond max_history left out"),
            *((count, f"{reason} left out") for reason, count in self.left_out.items()),
        )
        return "; ".join((
            f"{self.samples:,} samples, {self.items:,} items of history, from {self.rows:,} rows{users}",
            f"{self.skipped:,} broken records skipped",
            *(f"{count:,} {description}" for count, description in omissions if count),
        ))  # fmt: skip


class Reader(Protocol):
    """A split of a data set that can be read more than once; each pass has its own report."""

    task: Task
    report: ReadReport

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in file order; raise RecordError for a broken record beyond the allowed number."""
        ...
