"""LaMP's seven public-format tasks, folders in LaMP's layout read and written, and tasks of one's own.

A folder holds `{split}_questions.json[.gz]`, `{split}_outputs.json[.gz]` and, for other tasks than LaMP's
own, a `task.json`. Where a folder's task comes from is in `load_task`; the folder's name means nothing.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import ijson  # type: ignore[import-untyped]

from personaplug.data.base import (
    Flaw,
    Reader,
    ReadReport,
    Task,
    TaskKind,
    as_moment,
    as_name,
    as_text,
    check_max_history,
    check_skip_bad,
    latest_items,
    nearest,
    query_of,
    target_of,
)
from personaplug.errors import BadConfig, BadRecord, MissingData, RunConflict, StorageError
from personaplug.records import HistoryItem, Sample

# ---- the built-in tasks

_MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip

# The candidates stand between fixed words, so quotes inside a title do not end it.
_CANDIDATES = r'without explanation\. \[1\]: "(.*?)" \[2\]: "(.*)"\s*\Z'

_BUILT_IN = (
    Task("LaMP_1", "label", ("title", "abstract"), None, ("accuracy", "f1"),
         labels=("[1]", "[2]"), max_new_tokens=6, query_pattern=_CANDIDATES),
    Task("LaMP_2", "label", ("description", "tag"), "tag", ("accuracy", "f1"),
         labels=_MOVIE_TAGS, query_after="description: ", max_new_tokens=12),
    Task("LaMP_3", "rating", ("text", "score"), "score", ("mae", "rmse", "accuracy"),
         labels=("1", "2", "3", "4", "5"), query_after="review: ", max_new_tokens=4),
    Task("LaMP_4", "text", ("title", "text"), "title", ("rouge_1", "rouge_l"), query_after="article: "),
    Task("LaMP_5", "text", ("title", "abstract"), "title", ("rouge_1", "rouge_l"), query_after="paper: "),
    Task("LaMP_7", "text", ("text",), "text", ("rouge_1", "rouge_l"), query_after=": "),
)  # fmt: skip

LAMP_TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _BUILT_IN})
"""LaMP's tasks by canonical name. LaMP_6 is not among them: its data is not public."""


def lamp_task(name: str) -> Task:
    """Return one of LaMP's own tasks; `LaMP-1` is the same as `LaMP_1`.

    Raises:
        BadConfig: if there is no such task, or it is LaMP_6.
    """
    known = {task.lower(): task for task in LAMP_TASKS}
    wanted = name.strip().lower().replace("-", "_")
    if wanted == "lamp_6":
        raise BadConfig("LaMP_6 rests on the Avocado mails, which are not public, so it is not built in.")
    if wanted not in known:
        raise BadConfig(f"There is no built-in task {name!r}; {nearest(name, LAMP_TASKS)}")
    return LAMP_TASKS[known[wanted]]


# ---- a folder's own task

_KEYS = ("name", "kind", "labels", "query_after", "query_pattern", "item_fields", "answer_field", "metrics",
         "max_new_tokens")  # fmt: skip
_METRICS = {
    "label": ("accuracy", "f1"),
    "rating": ("mae", "rmse", "accuracy"),
    "text": ("rouge_1", "rouge_l"),
}
_LENGTHS = {"label": 16, "rating": 4, "text": 128}


def load_task(folder: str | Path, *, task: str | None = None) -> Task:
    """Find out which task a folder holds.

    Asked in this order: `task` (a built-in name, or the name in the folder's task.json), the folder's
    `task.json`, the key "task" in its `*_outputs.json[.gz]`.

    Raises:
        MissingData: if the folder is not there, or nothing in it says which task it is.
        BadConfig: if the task is unknown or wrongly declared, or two files name different ones.
        BadRecord: if a file that should say it is not valid JSON.
    """
    folder = _existing(folder)
    own = folder / "task.json"
    if task is not None:
        return _named_task(own, task)
    if own.is_file():
        return _read_task(own)
    return _task_of_outputs(folder)


def _named_task(own: Path, name: str) -> Task:
    if own.is_file():
        declared = _read_task(own)
        if declared.name == name:
            return declared
    return lamp_task(name)


def _read_task(path: Path) -> Task:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadConfig(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadConfig(
            f"{path} should hold one JSON object that declares a task, found {type(values).__name__}."
        )
    return parse_task(values, source=str(path))


def parse_task(values: Mapping[str, Any], *, source: str = "task.json") -> Task:
    """Make a task of a declaration: all its keys, or `like` with those that differ.

    Raises:
        BadConfig: for an unknown key (with the nearest known one), a missing one, a wrong type or value.
    """
    for key in values:
        if key not in (*_KEYS, "like"):
            raise BadConfig(f"{source}: unknown key {key!r}; {nearest(key, (*_KEYS, 'like'))}")
    merged = {**_inherited(values, source), **{key: values[key] for key in values if key != "like"}}
    for key in ("name", "kind", "item_fields"):
        if key not in merged:
            raise BadConfig(
                f'{source}: the key {key!r} is missing; give it, or inherit a task by "like": "LaMP_4".'
            )
    return _checked(_built(merged, source), source)


def _inherited(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    if "like" not in values:
        return {}
    if not isinstance(values["like"], str):
        raise BadConfig(f"{source}: 'like' should be the name of a built-in task.")
    inherited = asdict(lamp_task(values["like"]))
    # One way of finding the query replaces the other; both at once would contradict each other.
    if "query_after" in values and "query_pattern" not in values:
        inherited["query_pattern"] = ""
    if "query_pattern" in values and "query_after" not in values:
        inherited["query_after"] = ""
    # What follows from the kind is inherited only with the kind.
    if values.get("kind", inherited["kind"]) != inherited["kind"]:
        for key in ("labels", "metrics", "max_new_tokens"):
            inherited.pop(key)
    return inherited


def _built(values: Mapping[str, Any], source: str) -> Task:
    kind = values["kind"]
    if kind not in get_args(TaskKind):
        raise BadConfig(f"{source}: 'kind' should be one of {', '.join(get_args(TaskKind))}; found {kind!r}.")
    answer = values.get("answer_field")
    return Task(
        name=_string(values, "name", source),
        kind=kind,
        item_fields=_strings(values["item_fields"], "item_fields", source),
        answer_field=None if answer is None else _string(values, "answer_field", source),
        metrics=_strings(values.get("metrics", _METRICS[kind]), "metrics", source),
        labels=_labels(values.get("labels", ()), source),
        query_after=_string(values, "query_after", source),
        max_new_tokens=_whole(values.get("max_new_tokens", _LENGTHS[kind]), "max_new_tokens", source),
        query_pattern=_string(values, "query_pattern", source),
    )


def _string(values: Mapping[str, Any], key: str, source: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise BadConfig(f"{source}: {key!r} should be a string, found {type(value).__name__}.")
    return value


def _strings(value: object, key: str, source: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in value):
        raise BadConfig(f"{source}: {key!r} should be a list of non-empty strings.")
    if len(set(value)) < len(value):
        raise BadConfig(f"{source}: {key!r} names something twice.")
    return tuple(value)


def _labels(value: object, source: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise BadConfig(f"{source}: 'labels' should be a list, found {type(value).__name__}.")
    try:
        labels = [as_name(label, "a label") for label in value]
    except Flaw as flaw:
        raise BadConfig(f"{source}: {flaw}.") from None
    if any(label != label.strip() for label in labels):
        raise BadConfig(f"{source}: a label has blanks at its ends; answers are compared without them.")
    return _strings(labels, "labels", source)


def _whole(value: object, key: str, source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadConfig(f"{source}: {key!r} should be a whole number of at least 1.")
    return value


def _checked(task: Task, source: str) -> Task:
    if not task.name.strip():
        raise BadConfig(f"{source}: 'name' is empty.")
    if not task.item_fields or not task.metrics:
        raise BadConfig(f"{source}: 'item_fields' and 'metrics' need at least one entry.")
    if {"id", "date"} & set(task.field_names) or task.answer_field == "":
        raise BadConfig(f"{source}: a field of an item needs a name, and other than 'id' and 'date'.")
    if (task.kind == "text") == bool(task.labels):
        raise BadConfig(f"{source}: the kinds 'label' and 'rating' need 'labels', and 'text' has none.")
    if task.kind == "rating":
        _check_scale(task.labels, source)
    _check_query(task, source)
    return task


def _check_scale(labels: Sequence[str], source: str) -> None:
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        raise BadConfig(
            f"{source}: the labels of a rating should be numbers, found {list(labels)}."
        ) from None
    if not all(low < high for low, high in pairwise(numbers)) or not all(abs(n) < 1e9 for n in numbers):
        raise BadConfig(f"{source}: the labels of a rating should be finite and rise, found {list(labels)}.")


def _check_query(task: Task, source: str) -> None:
    if task.query_after and task.query_pattern:
        raise BadConfig(f"{source}: give 'query_after' or 'query_pattern', not both.")
    try:
        groups = re.compile(task.query_pattern).groups
    except re.error as error:
        raise BadConfig(f"{source}: 'query_pattern' is not a regular expression: {error}.") from None
    if task.query_pattern and not groups:
        raise BadConfig(f"{source}: 'query_pattern' needs a group (…) around what is the query.")


def _task_of_outputs(folder: Path) -> Task:
    found: dict[str, str] = {}
    for path in sorted((*folder.glob("*_outputs.json"), *folder.glob("*_outputs.json.gz"))):
        for _, name in _stream(path, "task", opening=b"{", unit="key"):
            found.setdefault(str(name).replace("-", "_"), path.name)
            break
    if len(found) > 1:
        raise BadConfig(
            f"{folder}: its files name different tasks: {found}. Say which one is meant by `task`."
        )
    if not found:
        raise MissingData(
            f"{folder} does not say which task it holds: there is no task.json and no "
            f'*_outputs.json[.gz] with a "task". Name one of {", ".join(LAMP_TASKS)} by `task`, or write a task.json.'
        )
    name, file = next(iter(found.items()))
    try:
        return lamp_task(name)
    except BadConfig as error:
        raise BadConfig(
            f"{folder / file}: {error} A task of one's own needs a task.json in the folder."
        ) from None


# ---- reading


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
        BadConfig: if the task is wrongly declared, or a setting out of range.
    """
    return LampReader(folder, split, task=task, skip_bad=skip_bad, max_history=max_history)


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
            BadConfig: if the task is wrongly declared, or a setting out of range.
        """
        self._skip_bad = check_skip_bad(skip_bad)
        self._max_history = check_max_history(max_history)
        folder = _existing(folder)
        self._questions = _questions_of(folder, split)
        self._outputs = _plain_or_gz(folder, f"{split}_outputs.json")
        self.task: Task = task if isinstance(task, Task) else load_task(folder, task=task)
        self.report = ReadReport()

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in file order.

        Raises:
            BadRecord: for the first broken record beyond `skip_bad`, and always where a file stops being
                JSON.
        """
        self.report = report = ReadReport()
        golds = self._read_golds(report)
        seen: set[str] = set()
        for number, record in _stream(self._questions, "item", opening=b"[", unit="question"):
            sample = self._read(record, number, golds, seen, report)
            if sample is not None:
                yield report.add(sample)
        for orphan in [gold_id for gold_id in golds or () if gold_id not in seen]:
            self._skip(report, self._outputs, f"gold (id {_short(orphan)})", "no question has this id")

    def _read(
        self, record: object, number: int, golds: _Golds | None, seen: set[str], report: ReadReport
    ) -> Sample | None:
        where = f"question {number}"
        try:
            question = _object(record, "it")
            sample_id = as_name(_value(question, "id"), "its 'id'")
            where = f"question {number} (id {_short(sample_id)})"
            if sample_id in seen:
                raise Flaw("its id is another question's too")
            seen.add(sample_id)
            return self._sample(question, sample_id, golds, report)
        except Flaw as flaw:
            self._skip(report, self._questions, where, str(flaw))
            return None

    def _sample(
        self, question: Mapping[str, Any], sample_id: str, golds: _Golds | None, report: ReadReport
    ) -> Sample:
        user = question.get("user_id")
        prompt = as_name(_value(question, "input"), "its 'input'")
        return Sample(
            id=sample_id,
            user_id=None if user is None else as_name(user, "its 'user_id'"),
            prompt=prompt,
            query=query_of(self.task, prompt),
            target=self._target(sample_id, golds),
            history=self._history(_value(question, "profile"), report),
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
                items.append(_item(self.task, item))
            except Flaw as flaw:
                raise Flaw(f"item {number} of its profile: {flaw}") from None
        return latest_items(items, max_history=self._max_history, report=report)

    def _read_golds(self, report: ReadReport) -> _Golds | None:
        if self._outputs is None:
            return None
        golds: dict[str, str | Flaw] = {}
        for number, record in _stream(self._outputs, "golds.item", opening=b"{", unit="gold"):
            try:
                gold = _object(record, "it")
                gold_id = as_name(_value(gold, "id"), "its 'id'")
                golds[gold_id] = Flaw("two golds have its id") if gold_id in golds else _output(gold)
            except Flaw as flaw:
                self._skip(report, self._outputs, f"gold {number}", str(flaw))
        return golds

    def _skip(self, report: ReadReport, file: Path | None, where: str, reason: str) -> None:
        report.skip(BadRecord(file or "", where, reason=reason), allowed=self._skip_bad)


# A broken gold is kept as its flaw and reported with its question, so that one defect counts once.
_Golds = Mapping[str, str | Flaw]


def _output(gold: Mapping[str, Any]) -> str | Flaw:
    try:
        return as_text(_value(gold, "output"), "its gold's 'output'")
    except Flaw as flaw:
        return flaw


def _item(task: Task, record: object) -> tuple[datetime | None, HistoryItem]:
    values = _object(record, "it")
    stamp = values.get("date")
    moment = None if stamp is None else as_moment(stamp)
    fields = tuple((name, as_text(_value(values, name), f"its {name!r}")) for name in task.field_names)
    item_id = as_name(_value(values, "id"), "its 'id'")
    return moment, HistoryItem(item_id, fields, task.answer_field, moment.date() if moment else None)


def _object(record: object, what: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise Flaw(f"{what} is not a JSON object")
    return record


def _value(record: Mapping[str, Any], key: str) -> object:
    if key not in record:
        raise Flaw(f"its {key!r} is missing")
    return record[key]


def _short(name: str) -> str:
    # An id of one line and bounded length; a text that landed in the id's place stays out of messages.
    line = " ".join(name.split())
    return line if len(line) <= 40 else f"{line[:12]}… of {len(name)} characters"


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingData(f"There is no data folder {folder}.")
    return folder


def _plain_or_gz(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _questions_of(folder: Path, split: str) -> Path:
    name = f"{split}_questions.json"
    path = _plain_or_gz(folder, name)
    if path is None:
        there = sorted(
            {found.name.partition("_questions.json")[0] for found in folder.glob("*_questions.json*")}
        )
        raise MissingData(
            f"{folder} has neither {name} nor {name}.gz; "
            f"{'splits that are there: ' + ', '.join(there) if there else 'no split is there at all'}."
        )
    return path


def _stream(path: Path, prefix: str, *, opening: bytes, unit: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered values under `prefix`, one at a time in memory.

    Raises:
        BadRecord: where the file is not valid JSON or gzip, or is not opened by `opening`; the rest of it is
            lost, so it is never skipped. The parser's own message quotes the file's text, so it is not passed
            on.
    """
    count = 0
    try:
        with _opened(path) as stream:
            _expect(stream, opening)
            for count, value in enumerate(ijson.items(stream, prefix, use_float=True), 1):
                yield count, value
    except Flaw as flaw:
        raise BadRecord(path, "at the start", reason=str(flaw)) from None
    except (ijson.JSONError, UnicodeDecodeError):
        raise BadRecord(
            path, f"after {unit} {count}", reason="the file is not valid JSON from here on"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadRecord(
            path, f"after {unit} {count}", reason="the gzip data is broken or cut short"
        ) from None


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _expect(stream: Any, opening: bytes) -> None:
    # ijson finds nothing under a prefix, silently, where the outermost value has another shape.
    if stream.peek(3)[:3] == codecs.BOM_UTF8:
        stream.read(3)
    while (byte := stream.peek(1)[:1]) and byte in b" \t\r\n":
        stream.read(1)
    if byte != opening:
        shape = "a list" if opening == b"[" else "an object"
        raise Flaw(f"the file should hold {shape} and begin with {opening.decode()!r}")


# ---- writing


def write_lamp(samples: Iterable[Sample], folder: str | Path, split: str, *, task: Task) -> None:
    """Write samples as a split that LampReader reads back as equal samples, with the task beside it.

    Each file appears complete or not at all. Samples are streamed. Where they have no targets no outputs file
    is written, and an earlier one of the split is removed, since it belongs to other questions.

    Raises:
        RunConflict: if the folder's task.json declares another task.
        BadConfig: if samples would not be read back as they are: an id twice, targets on some only, a query
            or fields that are not the task's. Nothing is changed then.
        StorageError: if the disk is full or not writable.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _declare(folder / "task.json", task)
        _write_split(samples, folder, split, task)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror}. What was complete there stays."
        ) from error


def write_json(path: Path, value: object) -> None:
    """Write a small JSON file, complete or not at all.

    Raises:
        OSError: if the disk is full or not writable.
    """
    draft = _draft(path)
    try:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _declare(path: Path, task: Task) -> None:
    if not path.is_file():
        write_json(path, asdict(task))
    elif _read_task(path) != task:
        raise RunConflict(f"{path} declares another task than {task.name}. Write to a new folder.")


def _write_split(samples: Iterable[Sample], folder: Path, split: str, task: Task) -> None:
    questions, outputs = folder / f"{split}_questions.json", folder / f"{split}_outputs.json"
    drafts = _draft(questions), _draft(outputs)
    try:
        has_targets = _write_drafts(samples, drafts, task)
        for old in (outputs, outputs.with_name(f"{outputs.name}.gz")):
            old.unlink(missing_ok=True)
        if has_targets:
            os.replace(drafts[1], outputs)
        os.replace(drafts[0], questions)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def _write_drafts(samples: Iterable[Sample], drafts: tuple[Path, Path], task: Task) -> bool:
    seen: set[str] = set()
    targets = 0
    with ExitStack() as stack:
        questions, outputs = (stack.enter_context(draft.open("w", encoding="utf-8")) for draft in drafts)
        questions.write("[")
        outputs.write(f'{{"task": {json.dumps(task.name)}, "golds": [')
        for sample in samples:
            _check_writable(sample, task, seen)
            questions.write((",\n" if seen else "\n") + json.dumps(_question(sample), ensure_ascii=False))
            if sample.target is not None:
                gold = {"id": sample.id, "output": sample.target}
                outputs.write((",\n" if targets else "\n") + json.dumps(gold, ensure_ascii=False))
                targets += 1
            seen.add(sample.id)
        questions.write("\n]\n")
        outputs.write("\n]}\n")
    if targets not in (0, len(seen)):
        raise BadConfig(
            f"{targets} of {len(seen)} samples have a target; write those without as a split of their own."
        )
    return targets > 0


def _check_writable(sample: Sample, task: Task, seen: set[str]) -> None:
    try:
        if sample.id in seen:
            raise Flaw("its id is another sample's too")
        if query_of(task, sample.prompt) != sample.query:
            raise Flaw("its query is not what the task finds in its prompt")
        if sample.target is not None and target_of(task, sample.target) != sample.target:
            raise Flaw("its target has blanks at its ends")
        if any((tuple(dict(item.fields)), item.answer_name) != (task.field_names, task.answer_field)
               for item in sample.history):  # fmt: skip
            raise Flaw("an item has other fields than the task's")
    except Flaw as flaw:
        raise BadConfig(
            f"Sample {_short(sample.id)} cannot be written for task {task.name}: {flaw}."
        ) from None


def _question(sample: Sample) -> dict[str, Any]:
    user = {} if sample.user_id is None else {"user_id": sample.user_id}
    profile = [_written(item) for item in sample.history]
    return {"id": sample.id, **user, "input": sample.prompt, "profile": profile}


def _written(item: HistoryItem) -> dict[str, str]:
    day = {} if item.date is None else {"date": item.date.isoformat()}
    return {"id": item.id, **dict(item.fields), **day}
