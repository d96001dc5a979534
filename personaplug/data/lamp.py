"""Folders in LaMP's layout, read: `{split}_questions.json[.gz]` and `{split}_outputs.json[.gz]`; and a user's items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from personaplug.data.json_stream import existing_folder, json_lines, numbered_lines, plain_or_gz, stream_values
from personaplug.data.parsing import (
    Flaw,
    as_name,
    as_record,
    as_text,
    item_of,
    options_of,
    query_of,
    short_id,
    target_of,
    value_of,
)
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import (
    Reader,
    ReadReport,
    Task,
    by_moment,
    check_max_history,
    check_skip_bad,
    latest_items,
)
from personaplug.data.task_registry import load_task
from personaplug.errors import MissingData, RecordError


def open_dataset(
    folder: str | Path,
    split: str,
    *,
    task: Task | str | None = None,
    skip_bad: int = 0,
    max_history: int = 512,
) -> Reader:
    """Open one split of a data folder.

    Raises:
        MissingData: if the folder, the split's questions or the task's declaration are not there.
        ConfigError: if the task is wrongly declared, or a setting out of range.
    """
    return LampReader(folder, split, task=task, skip_bad=skip_bad, max_history=max_history)


def read_items(path: str | Path, *, task: Task) -> tuple[HistoryItem, ...]:
    """Read one user's items: one JSON object a line, or one JSON list of them, plain or *.gz.

    Each holds the task's fields, as an item of a profile does, and may hold a "date" and an "id"; without an id
    the line's number is it (in a list, the item's). They come in time order if all are dated, else as they stand.

    Raises:
        MissingData: if the file is not there.
        RecordError: for the first broken item, or where the file itself breaks off.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingData(f"There is no file {path}.")
    items = []
    for kind, number, record in _records(path):
        try:
            if isinstance(record, Flaw):
                raise record
            items.append(item_of(task, record, default_id=str(number)))
        except Flaw as flaw:
            raise RecordError(path, f"{kind} {number}", reason=str(flaw)) from None
    return by_moment(items)


class LampReader:
    """One split of a folder in LaMP's layout, streamed.

    Golds and the ids seen are held; questions, the bulk of a file, are one at a time in memory. Without an
    outputs file every target is None. With one, its ids and the questions' must be the same.

    Attributes:
        task: what the folder declares, or what was asked for.
        report: what the last (or current) pass met.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        task: Task | str | None = None,
        skip_bad: int = 0,
        max_history: int = 512,
    ) -> None:
        """Find the files and the task; nothing is read of the questions yet.

        Args:
            folder: where the files are.
            split: "train", "dev", "test" or whatever the files' names begin with.
            task: a Task, a name for `load_task`, or None for what the folder says.
            skip_bad: how many broken records may be passed over.
            max_history: how many of the latest items of a history are kept.

        Raises:
            MissingData: if the folder, the questions or the task's declaration are not there.
            ConfigError: if the task is wrongly declared, or a setting out of range.
        """
        self._skip_bad = check_skip_bad(skip_bad)
        self._max_history = check_max_history(max_history)
        folder = existing_folder(folder)
        self._questions = _questions_of(folder, split)
        self._outputs = plain_or_gz(folder, f"{split}_outputs.json")
        self.task: Task = task if isinstance(task, Task) else load_task(folder, task=task)
        self.report = ReadReport()

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in file order.

        Raises:
            RecordError: for the first broken record beyond `skip_bad`, and always where a file stops being
                JSON.
        """
        self.report = report = ReadReport()
        golds = self._read_golds(report)
        seen: set[str] = set()
        for number, record in stream_values(self._questions, "item", opening=b"[", unit="question"):
            sample = self._read(record, number, golds, seen, report)
            if sample is not None:
                yield report.add(sample)
        for orphan in [gold_id for gold_id in golds or () if gold_id not in seen]:
            self._skip(report, self._outputs, f"gold (id {short_id(orphan)})", "no question has this id")

    def _read(
        self, record: object, number: int, golds: _Golds | None, seen: set[str], report: ReadReport
    ) -> Sample | None:
        where = f"question {number}"
        try:
            question = as_record(record)
            sample_id = as_name(value_of(question, "id"), "its 'id'")
            where = f"question {number} (id {short_id(sample_id)})"
            if sample_id in seen:
                raise Flaw("its id is another question's too")
            seen.add(sample_id)
            return self._sample(question, sample_id, golds, report)
        except Flaw as flaw:
            self._skip(report, self._questions, where, str(flaw))
            return None

    def _sample(self, question: Mapping[str, Any], sample_id: str, golds: _Golds | None, report: ReadReport) -> Sample:
        user = question.get("user_id")
        prompt = as_name(value_of(question, "input"), "its 'input'")
        return Sample(
            id=sample_id,
            user_id=None if user is None else as_name(user, "its 'user_id'"),
            prompt=prompt,
            query=query_of(self.task, prompt),
            target=self._target(sample_id, golds),
            history=self._history(value_of(question, "profile"), report),
            options=options_of(self.task, prompt),
        )

    def _target(self, sample_id: str, golds: _Golds | None) -> str | None:
        if golds is None:
            return None
        if sample_id not in golds:
            raise Flaw(f"none of the {len(golds)} golds has its id")
        gold = golds[sample_id]
        if isinstance(gold, Flaw):
            raise gold
        return target_of(self.task, gold)

    def _history(self, profile: object, report: ReadReport) -> tuple[HistoryItem, ...]:
        if not isinstance(profile, list):
            raise Flaw("its 'profile' is not a list")
        items = []
        for number, item in enumerate(profile, 1):
            try:
                items.append(item_of(self.task, item))
            except Flaw as flaw:
                raise Flaw(f"item {number} of its profile: {flaw}") from None
        return latest_items(items, max_history=self._max_history, report=report)

    def _read_golds(self, report: ReadReport) -> _Golds | None:
        if self._outputs is None:
            return None
        golds: dict[str, str | Flaw] = {}
        for number, record in stream_values(self._outputs, "golds.item", opening=b"{", unit="gold"):
            try:
                gold = as_record(record)
                gold_id = as_name(value_of(gold, "id"), "its 'id'")
                golds[gold_id] = Flaw("two golds have its id") if gold_id in golds else _output(gold)
            except Flaw as flaw:
                self._skip(report, self._outputs, f"gold {number}", str(flaw))
        return golds

    def _skip(self, report: ReadReport, file: Path | None, where: str, reason: str) -> None:
        report.skip(RecordError(file or "", where, reason=reason), allowed=self._skip_bad)


# A broken gold is kept as its flaw and reported with its question, so that one defect counts once.
_Golds = Mapping[str, str | Flaw]


def _output(gold: Mapping[str, Any]) -> str | Flaw:
    try:
        return as_text(value_of(gold, "output"), "its 'output'")
    except Flaw as flaw:
        return Flaw(f"its gold: {flaw}")


def _questions_of(folder: Path, split: str) -> Path:
    name = f"{split}_questions.json"
    path = plain_or_gz(folder, name)
    if path is None:
        there = sorted({found.name.partition("_questions.json")[0] for found in folder.glob("*_questions.json*")})
        raise MissingData(
            f"{folder} has neither {name} nor {name}.gz; "
            f"{'splits that are there: ' + ', '.join(there) if there else 'no split is there at all'}."
        )
    return path


def _records(path: Path) -> Iterator[tuple[str, int, object]]:
    first = next((line for _, line in numbered_lines(path) if line.strip()), b"")
    if first.lstrip().startswith(b"["):
        for number, value in stream_values(path, "item", opening=b"[", unit="item"):
            yield "item", number, value
    else:
        for number, record in json_lines(path):
            yield "line", number, record
