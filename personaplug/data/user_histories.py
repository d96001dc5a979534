"""Find the history for a question: a user's history in a data set, or items and rows that the caller gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from personaplug.data.ids import as_id, short_id
from personaplug.data.lamp import open_dataset, read_items, splits_in
from personaplug.data.logs.log import read_rows
from personaplug.data.logs.row_form import RowForm, is_missing, texts_of, user_name
from personaplug.data.logs.writing import HISTORIES
from personaplug.data.record_files import RecordSource
from personaplug.data.records import HistoryItem
from personaplug.data.tables import Table
from personaplug.data.task import Task
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError, MissingData

History = Iterable[HistoryItem | Mapping[str, Any]]
"""Items of one user, or rows of a log that become items: a list, a DataFrame, or another iterable of mappings."""

_ONE_USER = "the user"


@dataclass(frozen=True)
class Histories:
    """Finds histories.

    Attributes:
        folder: a data set with the histories of users; None = only the caller has histories.
        form: of the log's rows; None = rows hold the task's own fields.
        max_history: the number of latest items in the history of a data set's user.
    """

    folder: Path | None
    form: RowForm | None
    task: Task
    max_history: int

    def find(self, *, user: object = None, history: History | None = None) -> tuple[HistoryItem, ...]:
        """Return the history of a user of the data set, or the caller's items. Raise UserError if none fits."""
        if (user is None) == (history is None):
            found = "neither" if user is None else "both"
            raise ConfigError(
                f"Give user=, one of the training rows, or history=, a list of items; found {found}. A new user has "
                f"history=[]."
            )
        return self._of_user(user) if history is None else self._of_items(history)

    def _of_user(self, user: object) -> tuple[HistoryItem, ...]:
        if self.folder is None:
            raise ConfigError(
                "user= names a user of the training rows, and a saved plug holds nobody's history. Give the user's "
                "items: history=[…]."
            )
        try:
            name = as_id(user, "the user")
        except Flaw as flaw:
            raise ConfigError(f"A user cannot be found: {flaw}.") from None
        name = user_name(name) if self.form else name
        if name not in self._by_user:
            raise MissingData(
                f"There is no user {short_id(name)} among the {len(self._by_user):,} users that the training rows "
                f"name. Give the user's items: history=[…]; a new user has history=[]."
            )
        return self._by_user[name]

    def _of_items(self, history: History) -> tuple[HistoryItem, ...]:
        given = history if isinstance(history, Sequence) else [row for _, _, row in Table(history).records(())]
        items = tuple(item for item in given if isinstance(item, HistoryItem))
        rows = [item for item in given if isinstance(item, Mapping)]
        if len(items) == len(given):
            return items
        if len(rows) < len(given):
            raise ConfigError("A history is a list of mappings, or of HistoryItems; found a list of something else.")
        return _read_rows(rows, self.form) if self.form else read_items(rows, task=self.task, folder=Path())

    @cached_property
    def _by_user(self) -> dict[str, tuple[HistoryItem, ...]]:
        """The longest history of each user in the data set."""
        assert self.folder is not None
        splits = splits_in(self.folder)
        histories: dict[str, tuple[HistoryItem, ...]] = {}
        for split in [HISTORIES] if HISTORIES in splits else splits:
            for sample in open_dataset(self.folder, split, task=self.task, max_history=self.max_history):
                if sample.user_id is not None and len(sample.history) >= len(histories.get(sample.user_id, ())):
                    histories[sample.user_id] = sample.history
        return histories


def _read_rows(rows: Sequence[Mapping[str, Any]], form: RowForm) -> tuple[HistoryItem, ...]:
    """Return the items of one user's rows. The rows need no column of the user, and all or none need a date."""
    if not rows:
        return ()
    date = form.mapping.date
    if date and all(is_missing(texts_of(row).get(date)) for row in rows):
        form = replace(form, mapping=replace(form.mapping, date=None), dates=None)
    records = [(f"item {number}", number, {**row, form.mapping.user: _ONE_USER}) for number, row in enumerate(rows, 1)]
    source = RecordSource("the history", lambda _: iter(records))
    ((_, items),) = read_rows(source, form).histories()
    return tuple(items)
