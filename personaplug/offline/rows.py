"""Parse rows of the input: a user, a prompt and the user's history. An invalid row keeps the reason, without text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from personaplug.data import read_items
from personaplug.data.ids import as_id
from personaplug.data.parsing import Flaw, as_name, as_record, context_of
from personaplug.data.picture_decoding import is_damaged
from personaplug.data.records import PREFERENCE, REJECTED, Chat, HistoryItem, Prompt, last_message
from personaplug.data.task import Task
from personaplug.data.task_prompts import TaskPrompts, TaskQuery
from personaplug.data.wording import Wording
from personaplug.errors import ConfigError, UserError
from personaplug.inference import query_on_task
from personaplug.infra.json_parsing import parse_json
from personaplug.offline.input_files import HISTORY, ID, PROMPT, USER

_NO_QUERY = TaskQuery("", None, is_on_task=True)


@dataclass(frozen=True, slots=True, repr=False)
class Row:
    """One row of the input.

    Attributes:
        id: the row's id, or file name and row number.
        user: None if the input has no column of users, or the name is invalid.
        prompt: "" if a persona is computed without a prompt.
        items: the user's history; empty if a store has it.
        has_other_wording: whether the prompt differs from all prompts of the training.
        error: the reason why the row gets no result; "" = it gets one.
    """

    id: str
    user: str | None = None
    prompt: Prompt = ""
    query: TaskQuery = _NO_QUERY
    items: tuple[HistoryItem, ...] = ()
    has_other_wording: bool = False
    error: str = ""


@dataclass(frozen=True)
class RowParser:
    """Parses rows for a task.

    Attributes:
        columns: the columns of the input.
        wordings: of the training prompts.
        is_plain: whether the plain model answers, which takes any prompt and no history.
        needs_user: whether a store has the histories.
        vector_width: number of values of an item's vector; None = the encoder reads no vectors.
    """

    task: Task
    columns: Sequence[str]
    wordings: Sequence[Wording] = ()
    is_plain: bool = False
    needs_user: bool = False
    vector_width: int | None = None

    def parse(self, values: Mapping[str, Any], *, default_id: str) -> Row:
        """Parse a row; an invalid row has an `error`, and keeps its user."""
        row_id, user = default_id, None
        try:
            if self._reads_user(values):  # first, so that rows of a user can be found whatever else is invalid
                user = as_id(values[USER], "its 'user_id'")
            if ID in self.columns:
                row_id = as_id(values[ID], "its 'id'")
            prompt = _prompt_of(values[PROMPT]) if PROMPT in self.columns else ""
            items = () if self.is_plain or self.needs_user else self._items_of(values.get(HISTORY))
            if self.is_plain or PROMPT not in self.columns:
                return Row(row_id, user, prompt, items=items)
            query, differs = self._query_of(last_message(prompt))
        except (Flaw, UserError) as error:
            return Row(row_id, user, error=str(error))
        return Row(row_id, user, prompt, query, items, has_other_wording=differs)

    def _reads_user(self, values: Mapping[str, Any]) -> bool:
        return self.needs_user or values.get(USER) is not None

    def _query_of(self, text: str) -> tuple[TaskQuery, bool]:
        """Return the query of a prompt, and whether the prompt differs from those of the training."""
        query = query_on_task(self.task, text)
        differs = bool(self.wordings) and not TaskPrompts(self.task, self.wordings).parse(text).is_on_task
        return query, differs

    def _items_of(self, value: object) -> tuple[HistoryItem, ...]:
        if isinstance(value, Flaw):
            raise Flaw(f"its 'history' {value}")
        if isinstance(value, str):
            try:
                value = parse_json(value.encode())
            except ValueError as error:
                raise Flaw(f"its 'history': {error}") from None
        if value is None:
            return ()
        if not isinstance(value, list):
            raise Flaw("its 'history' is neither a list of items nor JSON of such a list")
        items = read_items([_item_values(item, self.task) for item in value], task=self.task)
        for item in items:
            self._check_parts(item)
        return items

    def _check_parts(self, item: HistoryItem) -> None:
        """Raise a Flaw for a picture or a vector that the encoder would refuse, which would stop the job."""
        if item.picture is not None and is_damaged(item.picture):
            raise Flaw("a picture of its 'history' cannot be decoded")
        if item.vector is not None and self.vector_width is not None:
            numbers = len(item.vector) // 4
            if numbers != self.vector_width:
                raise Flaw(f"a vector of its 'history' has {numbers} numbers; expected {self.vector_width}")


def _prompt_of(value: object) -> Prompt:
    """Return a text, or the messages of a conversation that ends with the user's message."""
    if isinstance(value, Flaw):
        raise Flaw(f"its 'prompt' {value}")
    if not isinstance(value, list):
        return as_name(value, "its 'prompt'")
    turns = context_of(value)
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise Flaw("its 'prompt' does not end with a message of the user")
    return Chat(turns)


def _item_values(raw: object, task: Task) -> object:
    """Leave out the keys that an item does not have: in Parquet, all items have all keys, with nulls."""
    if not isinstance(raw, Mapping):
        return raw
    record = as_record(raw)
    values = {key: value for key, value in record.items() if value is not None}
    if PREFERENCE in values:
        return values
    without = task.answer_field if REJECTED in values else None
    return {name: record[name] for name in task.field_names if name in record and name != without} | values


def check_columns(columns: Sequence[str], *, needs_prompt: bool, is_plain: bool, has_store: bool) -> None:
    """Raise ConfigError if the input lacks a column that the job needs."""
    found = f"The input has the columns {', '.join(columns)}" if columns else "The input has none of the known columns"
    if needs_prompt and PROMPT not in columns:
        raise ConfigError(f"The input needs a column {PROMPT!r} with the prompts. {found}.")
    if has_store and USER not in columns:
        raise ConfigError(f"--store needs a column {USER!r} that names the user of each row. {found}.")
    if has_store and HISTORY in columns:
        raise ConfigError(f"Histories come from the column {HISTORY!r} or from --store, not from both. Remove one.")
    if not (is_plain or has_store or HISTORY in columns):
        raise ConfigError(
            f"The input needs a column {HISTORY!r} with the items of each row's user; null means a new user. {found}. "
            f"If a store has the histories, give --store."
        )
