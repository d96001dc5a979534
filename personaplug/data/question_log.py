"""A log of questions and the answers that users gave: its task, its prompts, and the data set that is made of it."""

from __future__ import annotations

import filecmp
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from personaplug.data.delimited_files import NumberedRecord, check_columns
from personaplug.data.event_log import ColumnMapping, EventLogReader, as_literal
from personaplug.data.lamp_writer import write_lamp
from personaplug.data.logs.answers import AnswerKind, decide_answers
from personaplug.data.record_files import RecordSource, record_source
from personaplug.data.records import HistoryItem
from personaplug.data.splits import split_by_user
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT, parse_task
from personaplug.data.values import Flaw, as_text
from personaplug.errors import ConfigError, MissingData, RunConflict
from personaplug.infra.atomic_io import storage_errors

logger = logging.getLogger(__name__)

HISTORIES = "histories"
"""The split of a data set that holds the whole history of each user."""

QUESTIONS_PER_USER = 8

_QUESTION, _ANSWER = CHAT.item_fields
_ONE_USER = "the user"
_MAX_SHOWN_LABELS = 12
_MIN_USERS = 4
_MIN_DEV_USERS = 2  # a control shows each user the history of another


@dataclass(frozen=True)
class Columns:
    """The columns of a log; see `ColumnMapping` for the date."""

    user: str
    question: str
    answer: str
    date: str | None = None
    date_format: str | None = None


@dataclass(frozen=True)
class QuestionLog:
    """A log whose columns and answers are known.

    Attributes:
        source: where the rows come from; labels in it are spelled as in the task.
        mapping: of the columns to the task's fields, with the wording of a prompt.
    """

    source: RecordSource
    mapping: ColumnMapping
    task: Task

    def reader(
        self, *, questions_per_user: int = QUESTIONS_PER_USER, max_history: int, skip_bad: int = 0
    ) -> EventLogReader:
        """Return a reader that asks the last rows of each user."""
        return EventLogReader(
            self.source,
            self.mapping,
            self.task,
            split="dev",
            dev_queries=questions_per_user,
            max_history=max_history,
            skip_bad=skip_bad,
        )

    def write(self, folder: Path, *, dev_share: float, reader: EventLogReader) -> None:
        """Write train and dev, which share no user, and the histories of all users; or check that they are there.

        Raises:
            ConfigError: if there are too few users with a question.
            RunConflict: if the folder holds other data.
        """
        with storage_errors(folder), TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
            draft = Path(place, "draft")
            users = len({sample.owner for sample in reader})
            if users < _MIN_USERS:
                raise ConfigError(
                    f"Expected {_MIN_USERS} or more users with a question and an earlier row, to train and to evaluate "
                    f"on; found {users} in {self.source.name}."
                )
            parts = split_by_user(reader, draft, share=max(dev_share, _MIN_DEV_USERS / users))
            write_lamp(reader.history_samples(), draft, HISTORIES, task=self.task)
            counts = (parts.train, parts.train_users, parts.dev, parts.dev_users)
            logger.info("train: %d questions of %d users; held out for evaluation: %d questions of %d users", *counts)
            if not folder.exists():
                draft.rename(folder)
            elif not _holds_same_files(draft, folder):
                raise RunConflict(f"{folder} holds data of other rows. Give the same rows, or choose another `out`.")


def open_log(
    rows: object, columns: Columns, *, name: str, kind: str | None = None, labels: Sequence[object] = ()
) -> QuestionLog:
    """Open a log and find out what its answers are.

    Args:
        rows: a file, a DataFrame or an iterable of mappings; see `record_source`.
        name: of the task.
        kind: label, rating, text or chat; None = what the answers show, and chat for free texts.
        labels: the closed set of answers; none = those that the answers show.
    Raises:
        ConfigError: if a column is missing, or the answers are not of this kind.
        MissingData: if there are no rows.
    """
    source = record_source(rows)
    answers = decide_answers(
        _answers(source, columns),
        column=columns.answer,
        kind=_known_kind(kind),
        labels=_known_labels(labels),
    )
    chosen = answers.kind if answers.labels or kind else CHAT.kind
    labelled = {"labels": answers.labels, "query_after": f"{_QUESTION}: "} if answers.labels else {}
    declared = {"name": name, "kind": chosen, "item_fields": (_QUESTION, _ANSWER), "answer_field": _ANSWER}
    task = parse_task(declared | labelled, source=source.name)
    shown = ", ".join(task.labels[:_MAX_SHOWN_LABELS]) + (", …" if len(task.labels) > _MAX_SHOWN_LABELS else "")
    what = f"one of {len(task.labels)} labels ({shown})" if task.labels else "free text"
    logger.info("%s: an answer is %s: %s; `kind` or `labels` decide otherwise", source.name, what, answers.reason)
    return QuestionLog(_spelled(source, columns.answer, answers), mapping_of(columns, task), task)


def open_known_log(rows: object, columns: Columns, *, task: Task) -> QuestionLog:
    """Open another log with the columns and the task of an earlier one; see `open_log`."""
    source = record_source(rows)
    answers = decide_answers(_answers(source, columns), column=columns.answer, kind=task.kind, labels=task.labels)
    return QuestionLog(_spelled(source, columns.answer, answers), mapping_of(columns, task), task)


def mapping_of(columns: Columns, task: Task) -> ColumnMapping:
    """Return what the columns mean to a task of `open_log`; the prompt lists the labels, if there are any."""
    listed = as_literal(", ".join(task.labels))
    wording = f"Which of these answers would this user give: {listed}? {task.query_after}" if listed else ""
    return ColumnMapping(
        user=columns.user,
        fields={_QUESTION: columns.question},
        answer=columns.answer,
        prompt=f"{wording}{{{_QUESTION}}}",
        date=columns.date,
        date_format=columns.date_format,
    )


def prompt_of(question: str, columns: Columns, *, task: Task) -> str:
    """Return the prompt that asks a question."""
    return mapping_of(columns, task).prompt_of({_QUESTION: question}, task=task)


def items_of(rows: Sequence[Mapping[str, object]], columns: Columns, *, task: Task) -> tuple[HistoryItem, ...]:
    """Return the history of one user from rows, which need no column for the user, and dates all or none."""
    if not rows:
        return ()
    if not any(columns.date in row for row in rows):
        columns = replace(columns, date=None)
    owned = [(f"item {number}", number, {**row, columns.user: _ONE_USER}) for number, row in enumerate(rows, start=1)]
    log = open_known_log(RecordSource("the history", lambda _: iter(owned)), columns, task=task)
    (sample,) = EventLogReader(log.source, log.mapping, task).history_samples()
    return sample.history


def _answers(source: RecordSource, columns: Columns) -> list[str]:
    """Return the answers that can be read; the reader reports the others."""
    names = list(dict.fromkeys(filter(None, (columns.user, columns.question, columns.answer, columns.date))))
    answers, is_empty = [], True
    for _, _, values in source.read(names):
        if is_empty and isinstance(values, Mapping):
            check_columns(source.name, list(map(str, values)), names)
        is_empty = False
        if (answer := _text_or_none(values, columns.answer)) is not None:
            answers.append(answer)
    if is_empty:
        raise MissingData(f"{source.name} holds no rows. Expected rows with the columns {', '.join(names)}.")
    return answers


def _text_or_none(values: object, column: str) -> str | None:
    value = values.get(column) if isinstance(values, Mapping) else None
    try:
        return as_text(value, "it").strip() or None
    except Flaw:
        return None


def _spelled(source: RecordSource, column: str, answers: AnswerKind) -> RecordSource:
    """Return the source with each label in its one spelling."""
    if not answers.labels:
        return source

    def read(columns: Sequence[str]) -> Iterator[NumberedRecord]:
        for position, number, values in source.read(columns):
            text = _text_or_none(values, column)
            label = None if text is None else answers.read(text)
            if label is not None and isinstance(values, Mapping):
                values = {**values, column: label}
            yield position, number, values

    return RecordSource(source.name, read)


def _known_kind(kind: str | None) -> str | None:
    kinds = ("label", "rating", "text", "chat")
    if kind is not None and kind not in kinds:
        raise ConfigError(f"The kind of the answers is one of {', '.join(kinds)}; found {kind!r}.")
    return kind


def _known_labels(labels: Sequence[object]) -> list[str]:
    try:
        return [as_text(label, "a label") for label in labels]
    except Flaw as flaw:
        raise ConfigError(f"The labels are wrong: {flaw}.") from None


def _holds_same_files(one: Path, other: Path) -> bool:
    names = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(one, other, names[0], shallow=False)[1:])
