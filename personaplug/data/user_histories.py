"""The histories that questions are asked with: of a user of a data set, or given as items or rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from personaplug.data.ids import as_id, short_id
from personaplug.data.lamp import open_dataset, read_items, splits_in
from personaplug.data.question_log import HISTORIES, Columns, items_of
from personaplug.data.records import HistoryItem
from personaplug.data.task import Task
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError, MissingData

History = Sequence[HistoryItem | Mapping[str, Any]]
"""Items of one user, or rows of a log that become items."""


@dataclass(frozen=True)
class Histories:
    """Finds histories.

    Attributes:
        folder: a data set, whose users are known; None = nobody is known.
        columns: of the log that the data set was made of; None = rows hold the task's own fields.
        max_history: the number of latest items that a known user's history keeps.
    """

    folder: Path | None
    columns: Columns | None
    task: Task
    max_history: int

    def find(self, *, user: object = None, history: History | None = None) -> tuple[HistoryItem, ...]:
        """Return the history of a known user, or the items that are given.

        Raises:
            ConfigError: if both or neither are given, or no user is known.
            MissingData: if there is no such user.
            RecordError: if a row is broken.
        """
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
        if name not in self._by_user:
            raise MissingData(
                f"There is no user {short_id(name)} among the {len(self._by_user):,} users that the training rows "
                f"name. Give the user's items: history=[…]; a new user has history=[]."
            )
        return self._by_user[name]

    def _of_items(self, history: History) -> tuple[HistoryItem, ...]:
        items = tuple(item for item in history if isinstance(item, HistoryItem))
        rows = [item for item in history if isinstance(item, Mapping)]
        if len(items) == len(history):
            return items
        if len(rows) < len(history):
            raise ConfigError("A history is a list of mappings, or of HistoryItems; found a list of something else.")
        if self.columns is None:
            return read_items(rows, task=self.task)
        return items_of(rows, self.columns, task=self.task)

    @cached_property
    def _by_user(self) -> dict[str, tuple[HistoryItem, ...]]:
        """The history of each user that the data set names: the longest one if there are several."""
        assert self.folder is not None
        splits = splits_in(self.folder)
        histories: dict[str, tuple[HistoryItem, ...]] = {}
        for split in [HISTORIES] if HISTORIES in splits else splits:
            for sample in open_dataset(self.folder, split, task=self.task, max_history=self.max_history):
                if sample.user_id is not None and len(sample.history) >= len(histories.get(sample.user_id, ())):
                    histories[sample.user_id] = sample.history
        return histories
