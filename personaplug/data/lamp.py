"""Read folders in LaMP's layout (`{split}_questions.json`, `{split}_outputs.json`, also .gz), and one user's items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from personaplug.data.json_stream import existing_folder, holds_list, json_lines, plain_or_gz, stream_values
from personaplug.data.parsing import (
    Flaw,
    as_record,
    as_text,
    context_of,
    id_of,
    item_of,
    name_of,
    short_id,
    target_of,
    text_of,
)
from personaplug.data.record_reader import Limits, RecordReader, in_time_order
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Reader, Task
from personaplug.data.task_registry import load_task
from personaplug.errors import MissingData, RecordError


@dataclass(frozen=True, slots=True, repr=False)
class _Gold:
    answer: str
    rejected: tuple[str, ...]


# A broken gold is stored as a Flaw and reported with its question, so that one defect counts once.
_Golds = Mapping[str, _Gold | Flaw]


def open_dataset(folder: str | Path, split: str, *, task: Task | str | None = None, **limits: Unpack[Limits]) -> Reader:
    """Open one split of a folder in LaMP's layout.

    Args:
        split: "train", "dev", "test" or another prefix of the file names.
        task: a Task, a name for `load_task`, or None for the task that the folder declares.
    """
    folder, name = existing_folder(folder), f"{split}_questions.json"
    questions, outputs = plain_or_gz(folder, name), plain_or_gz(folder, f"{split}_outputs.json")
    if questions is None:
        splits = ", ".join(splits_in(folder)) or "none"
        raise MissingData(f"{folder} has neither {name} nor {name}.gz. Splits in the folder: {splits}.")
    task = task if isinstance(task, Task) else load_task(folder, task=task)
    return _LampReader(questions, outputs, task, **limits)


def splits_in(folder: Path) -> list[str]:
    """Return the sorted names of the splits whose questions are in a folder."""
    return sorted({path.name.partition("_questions.json")[0] for path in folder.glob("*_questions.json*")})


def read_items(
    source: str | Path | Iterable[object], *, task: Task, folder: Path | None = None
) -> tuple[HistoryItem, ...]:
    """Read one user's items: mappings, or a file with a JSON list or one JSON object per line, plain or gzipped.

    An item has the task's fields, and may have a "date" and an "id"; the default id is its line number or its number in
    the list. Items are sorted by time if all have a date.

    Args:
        folder: where relative paths of pictures start: in a file's own folder; otherwise None = paths are refused, as
            in items from strangers.
    """
    name, unit, records = _item_records(source)
    folder = Path(source).parent if isinstance(source, str | Path) else folder
    items = []
    for number, record in records:
        try:
            items.append(item_of(task, record, default_id=str(number), folder=folder))
        except Flaw as flaw:
            raise RecordError(name, f"{unit} {number}", reason=str(flaw)) from None
    return in_time_order(items)


def _item_records(source: str | Path | Iterable[object]) -> tuple[str, str, Iterable[tuple[int, object]]]:
    """Return the name of a source and of its unit for messages, and its records with their numbers."""
    if not isinstance(source, str | Path):
        return "the history", "item", enumerate(source, start=1)
    path = Path(source)
    if not path.is_file():
        raise MissingData(f"There is no file {path}.")
    if holds_list(path):
        return str(path), "item", stream_values(path, "item", opening=b"[", unit="item")
    return str(path), "line", json_lines(path)


class _LampReader(RecordReader):
    """One split of a folder in LaMP's layout.

    Questions, the bulk of the data, are streamed; golds and ids stay in memory. Without an outputs file, every
    target is None. With an outputs file, golds and questions must have the same ids.
    """

    def __init__(self, questions: Path, outputs: Path | None, task: Task, **limits: Unpack[Limits]) -> None:
        super().__init__(task, origin=questions, **limits)
        self._questions, self._outputs = questions, outputs
        self._golds: _Golds = {}

    def _samples(self) -> Iterator[Sample]:
        self._golds = self._read_golds(self._outputs) if self._outputs else {}
        questions = stream_values(self._questions, "item", opening=b"[", unit="question")
        records = ((self._questions, f"question {number}", record) for number, record in questions)
        seen: set[str] = set()
        yield from self._parsed(records, parse_id=lambda entry, _: id_of(entry, "id"), parse=self._sample, seen=seen)
        if self._outputs:
            for orphan in [gold_id for gold_id in self._golds if gold_id not in seen]:
                self._skip(self._outputs, f"gold (id {short_id(orphan)})", Flaw("no question has this id"))

    def _sample(self, question: Mapping[str, Any], sample_id: str) -> Sample:
        prompt = name_of(question, "input")
        user = None if question.get("user_id") is None else id_of(question, "user_id")
        context = context_of(question["context"]) if "context" in question else ()
        target: str | None = None
        rejected: tuple[str, ...] = ()
        if self._outputs:
            gold = self._golds.get(sample_id, Flaw(f"its id is not among the {len(self._golds)} golds"))
            if isinstance(gold, Flaw):
                raise gold
            target, rejected = target_of(self.task, gold.answer), gold.rejected
        items = self._items(question)
        return self._sample_of(sample_id, user, prompt, target=target, items=items, context=context, rejected=rejected)

    def _read_golds(self, path: Path) -> _Golds:
        golds: dict[str, _Gold | Flaw] = {}
        for number, record in stream_values(path, "golds.item", opening=b"{", unit="gold"):
            try:
                gold = as_record(record)
                gold_id = id_of(gold, "id")
            except Flaw as flaw:
                self._skip(path, f"gold {number}", flaw)
                continue
            try:
                golds[gold_id] = Flaw("two golds have its id") if gold_id in golds else _gold_of(gold)
            except Flaw as flaw:
                golds[gold_id] = Flaw(f"its gold: {flaw}")
        return golds


def _gold_of(record: Mapping[str, Any]) -> _Gold:
    rejected = record.get("rejected", [])
    answers = rejected if isinstance(rejected, list) else [rejected]
    return _Gold(text_of(record, "output"), tuple(as_text(answer, "a rejected answer") for answer in answers))
