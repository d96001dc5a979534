"""LongLaMP (arXiv 2407.11016), read: abstracts, product reviews and posts, written as their users write.

A split is Parquet in shards, one folder for each of the six subsets {abstract_generation, product_review,
topic_writing} × {user, temporal} of the hub's LongLaMP/LongLaMP, with the splits train, val and test. A record is
{user, input, output, profile}, where the user's column and the profile's fields tell the tasks apart (`_TASKS`).
Subsets and splits were read on the hub's viewer page, the columns in code that reads them. E-mail is not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from personaplug.data.benchmarks.base import PublishedReader, published_records, split_files
from personaplug.data.parsing import Flaw, as_moment, as_name, as_text, query_of, target_of, value_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, nearest


@dataclass(frozen=True)
class _Layout:
    """How one task's records look: its fields, the column of the user, and an item's columns of id and date."""

    task: Task
    user: str
    item_id: str | None
    item_date: str | None


def _text_task(name: str, fields: tuple[str, ...]) -> Task:
    # The query is the whole input: the wording differs between tasks, and all of it says what is to be written.
    return Task(f"LongLaMP_{name}", "text", fields, fields[-1], ("rouge_1", "rouge_l"), max_new_tokens=512)


_TASKS: Mapping[str, _Layout] = MappingProxyType(
    {
        "abstract_generation": _Layout(_text_task("abstract_generation", ("title", "abstract")), "name", "id", "year"),
        "product_review": _Layout(
            _text_task("product_review", ("description", "overall", "summary", "reviewText")), "reviewerId", None, None
        ),
        "topic_writing": _Layout(_text_task("topic_writing", ("summary", "content")), "author", "id", None),
    }
)


class LongLampReader(PublishedReader):
    """One split of one subset of LongLaMP, streamed.

    A record has no id of its own, so its number in the split makes one ("row-1"); a review's place in its profile is
    the review's id. Papers come in the order of their years, all else in the file's order.
    """

    def __init__(
        self, path: str | Path, split: str, *, task: str | None = None, skip_bad: int = 0, max_history: int = 512
    ) -> None:
        """Find the files and, from the first record, the task.

        Args:
            path: the split's file, or the folder of one subset.
            split: "train", "dev" (the publishers' "val") or "test".
            task: "abstract_generation", "product_review" or "topic_writing"; None for what the first record's
                columns say.
            skip_bad: how many broken records may be passed over.
            max_history: how many of the latest items of a history are kept.

        Raises:
            MissingData, MissingExtra, ConfigError: as `split_files`.
            ConfigError: if the task is unknown or cannot be told, or a setting is out of range.
            RecordError: if the first file breaks off before its first record.
        """
        files = split_files(path, split)
        self._layout = _layout(task, files)
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

    def _item(self, record: Mapping[str, Any], number: int) -> tuple[datetime | None, HistoryItem]:
        layout, task = self._layout, self.task
        item_id = as_name(value_of(record, layout.item_id), f"its {layout.item_id!r}") if layout.item_id else None
        stamp = record.get(layout.item_date) if layout.item_date else None
        moment = None if stamp is None else as_moment(stamp)
        fields = tuple((name, as_text(value_of(record, name), f"its {name!r}")) for name in task.field_names)
        day = moment.date() if moment else None
        return moment, HistoryItem(item_id or str(number), fields, task.answer_field, day)


def _layout(task: str | None, files: Sequence[Path]) -> _Layout:
    if task is not None:
        if task not in _TASKS:
            raise ConfigError(f"LongLaMP has no task {task!r}; {nearest(task, _TASKS)}")
        return _TASKS[task]
    for _, _, record in published_records(files):
        spec = [layout for layout in _TASKS.values() if not isinstance(record, Flaw) and layout.user in record]
        if len(spec) == 1:
            return spec[0]
    columns = ", ".join(f"{layout.user!r} ({name})" for name, layout in _TASKS.items())
    raise ConfigError(f"{files[0]}: no record has just one of the columns {columns}, so its task is unknown. Name it.")
