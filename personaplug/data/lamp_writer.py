"""Samples written as a folder in LaMP's layout, read back by `LampReader` as equal samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from personaplug.data.parsing import Flaw, query_of, short_id, target_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.data.task_registry import read_task
from personaplug.errors import ConfigError, RunConflict, StorageError
from personaplug.infra.atomic_io import write_json


def write_lamp(samples: Iterable[Sample], folder: str | Path, split: str, *, task: Task) -> None:
    """Write samples as a split that LampReader reads back as equal samples, with the task beside it.

    Each file appears complete or not at all. Samples are streamed. Where they have no targets no outputs file
    is written, and an earlier one of the split is removed, since it belongs to other questions.

    Raises:
        RunConflict: if the folder's task.json declares another task.
        ConfigError: if samples would not be read back as they are: an id twice, targets on some only, a query
            or fields that are not the task's. Nothing is changed then.
        StorageError: if the disk is full or not writable.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / "task.json"
        if own.is_file() and read_task(own) != task:
            raise RunConflict(f"{own} declares another task than {task.name}. Write to a new folder.")
        _write_split(samples, folder, split, task)
        write_json(own, asdict(task))
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}. What was complete there stays.") from error


def _write_split(samples: Iterable[Sample], folder: Path, split: str, task: Task) -> None:
    questions, outputs = folder / f"{split}_questions.json", folder / f"{split}_outputs.json"
    # Samples are streamed into drafts beside the files: nothing is changed until the last of them is known to be good.
    with TemporaryDirectory(prefix=f".{split}.", dir=folder) as drafts:
        draft_questions, draft_outputs = Path(drafts, questions.name), Path(drafts, outputs.name)
        has_targets = _write_drafts(samples, draft_questions, draft_outputs, task)
        for old in (outputs, outputs.with_name(f"{outputs.name}.gz")):
            old.unlink(missing_ok=True)
        if has_targets:
            os.replace(draft_outputs, outputs)
        os.replace(draft_questions, questions)


def _write_drafts(samples: Iterable[Sample], to_questions: Path, to_outputs: Path, task: Task) -> bool:
    seen: set[str] = set()
    targets = 0
    with ExitStack() as stack:
        questions, outputs = (
            stack.enter_context(path.open("w", encoding="utf-8")) for path in (to_questions, to_outputs)
        )
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
        raise ConfigError(
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
        raise ConfigError(f"Sample {short_id(sample.id)} cannot be written for task {task.name}: {flaw}.") from None


def _question(sample: Sample) -> dict[str, Any]:
    user = {} if sample.user_id is None else {"user_id": sample.user_id}
    profile = [_written(item) for item in sample.history]
    return {"id": sample.id, **user, "input": sample.prompt, "profile": profile}


def _written(item: HistoryItem) -> dict[str, str]:
    day = {} if item.date is None else {"date": item.date.isoformat()}
    return {"id": item.id, **dict(item.fields), **day}
