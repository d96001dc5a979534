"""LongLaMP (arXiv 2407.11016): write abstracts, product reviews and posts as a user writes them.

A split is Parquet in shards, one folder for each of the six subsets {abstract_generation, product_review,
topic_writing} × {user, temporal} of the hub's LongLaMP/LongLaMP, with the splits train, val and test. A record is
{user, input, output, profile}; the column of the user tells the tasks apart. E-mail is not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaplug.data.benchmarks.base import PublishedReader, published_records, split_files
from personaplug.data.parsing import as_name, as_text, item_of, query_of, target_of, value_of
from personaplug.data.record_reader import TimedItem
from personaplug.data.records import Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError


@dataclass(frozen=True)
class _Layout:
    """A task's columns: the user's, and those of an item's id and date ("" if items have none)."""

    task: Task
    user: str
    item_id: str = ""
    item_date: str = ""


def _text_task(name: str, fields: tuple[str, ...]) -> Task:
    # The whole input is the query: its wording differs between tasks, and all of it says what to write.
    return Task(f"LongLaMP_{name}", "text", fields, fields[-1], ("rouge_1", "rouge_l"), max_new_tokens=512)


_LAYOUTS = (
    _Layout(_text_task("abstract_generation", ("title", "abstract")), "name", "id", "year"),
    _Layout(_text_task("product_review", ("description", "overall", "summary", "reviewText")), "reviewerId"),
    _Layout(_text_task("topic_writing", ("summary", "content")), "author", "id"),
)


class LongLampReader(PublishedReader):
    """One split of one subset; the first record's columns determine the task.

    A record has no id, so its number in the split makes one ("row-1"). The number of a review in its profile is the
    review's id. Papers are sorted by year, other items are in the file's order.
    """

    def __init__(self, path: str | Path, split: str, *, skip_bad: int = 0, max_history: int = 512) -> None:
        """Find the files; `path` is the split's file, or the folder of one subset."""
        files = split_files(path, split)
        self._layout = _layout_of(files)
        super().__init__(files, task=self._layout.task, skip_bad=skip_bad, max_history=max_history)

    def _id(self, record: Mapping[str, Any], number: int) -> str:
        return f"row-{number}"

    def _sample(self, record: Mapping[str, Any], sample_id: str) -> Sample:
        user = self._layout.user
        prompt = as_name(value_of(record, "input"), "its 'input'")
        return Sample(
            id=sample_id,
            user_id=as_name(value_of(record, user), f"its {user!r}"),
            prompt=prompt,
            query=query_of(self.task, prompt),
            target=target_of(self.task, as_text(value_of(record, "output"), "its 'output'")),
            history=self._history(value_of(record, "profile"), self._item),
        )

    def _item(self, record: object, number: int) -> TimedItem:
        id_key, date_key = self._layout.item_id, self._layout.item_date
        default_id = None if id_key else str(number)
        return item_of(self.task, record, default_id=default_id, id_key=id_key, date_key=date_key)


def _layout_of(files: Sequence[Path]) -> _Layout:
    for _, _, record in published_records(files):
        layouts = [layout for layout in _LAYOUTS if isinstance(record, dict) and layout.user in record]
        if len(layouts) == 1:
            return layouts[0]
    columns = ", ".join(f"{layout.user!r} ({layout.task.name})" for layout in _LAYOUTS)
    raise ConfigError(f"{files[0]}: no record has exactly one of the columns {columns}, so the task is unknown.")
