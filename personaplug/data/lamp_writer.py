"""Write samples in LaMP's layout, so that `open_dataset` reads equal samples back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from personaplug.data.json_stream import stream_values
from personaplug.data.parsing import (
    Flaw,
    as_id,
    context_of,
    item_of,
    numbers_of,
    query_of,
    record_of,
    short_id,
    target_of,
)
from personaplug.data.pictures import Picture, format_of, is_data_url, is_file
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.data.task_registry import check_declared_task
from personaplug.errors import ConfigError, RunConflict, StorageError
from personaplug.infra.atomic_io import atomic_folder, write_json

PICTURES = "pictures"
"""The folder of a data set's pictures; the name of a file is the hash of its bytes."""


class _PictureFolder:
    """Writes pictures as files of a data set: into a draft, until the samples have passed the checks."""

    def __init__(self, draft: Path, *, finished: Path) -> None:
        self._draft, self._finished = draft, finished
        self._files: dict[bytes, Picture] = {}

    def files_of(self, sample: Sample) -> Sample:
        """Write the pictures of a sample, and return the sample with these files."""
        if all(item.picture is None for item in sample.history):
            return sample
        items = [replace(item, picture=item.picture and self._file(item.picture)) for item in sample.history]
        return replace(sample, history=tuple(items))

    def finish(self) -> None:
        """Move the new files to the data set."""
        if self._draft.is_dir():
            self._finished.mkdir(exist_ok=True)
            for path in self._draft.iterdir():
                os.replace(path, self._finished / path.name)

    def _file(self, picture: Picture) -> Picture:
        digest = picture.digest
        if digest not in self._files:
            self._files[digest] = self._written(picture, digest.hex())
        return self._files[digest]

    def _written(self, picture: Picture, name: str) -> Picture:
        """Return the file of a picture, which is new unless the data set has it."""
        content = picture.read()
        file = f"{name}.{format_of(content)}"
        if (self._finished / file).exists():
            return Picture(self._finished / file)
        self._draft.mkdir(exist_ok=True)
        (self._draft / file).write_bytes(content)
        return Picture(self._draft / file)


def write_lamp(samples: Iterable[Sample], folder: str | Path, split: str, *, task: Task) -> None:
    """Write a split and the task. Samples are streamed, and each file appears complete or not at all.

    If the samples have no targets, write no outputs file and remove an older one of the split. If the samples could not
    be read back, raise ConfigError and change nothing. Reasons are an id that occurs twice, targets for only some
    samples, or a query or fields that do not fit the task.
    """
    folder = Path(folder)
    questions, outputs = folder / f"{split}_questions.json", folder / f"{split}_outputs.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_declared_task(folder, task)
        # The drafts replace the files only after the last sample has passed the checks.
        with TemporaryDirectory(prefix=f".{split}.", dir=folder) as drafts:
            draft_questions, draft_outputs = Path(drafts, questions.name), Path(drafts, outputs.name)
            pictures = _PictureFolder(Path(drafts, PICTURES), finished=folder / PICTURES)
            has_targets = _write_drafts(map(pictures.files_of, samples), draft_questions, draft_outputs, task)
            pictures.finish()
            for old in (outputs, outputs.with_name(f"{outputs.name}.gz")):
                old.unlink(missing_ok=True)
            if has_targets:
                os.replace(draft_outputs, outputs)
            os.replace(draft_questions, questions)
        write_json(folder / "task.json", asdict(task))
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror}. Complete files in the folder were kept."
        ) from error


def check_new(folder: Path) -> None:
    """Raise RunConflict if a folder exists."""
    if folder.exists():
        raise RunConflict(f"{folder} exists already. Choose another folder, or remove it.")


def copy_with_train(source: Path, target: Path, samples: Iterable[Sample], *, task: Task) -> None:
    """Write a new data set: these samples as its train split, and the other splits of `source`.

    The folder appears complete or not at all.
    """
    check_new(target)
    with atomic_folder(target) as draft:
        write_lamp(samples, draft, "train", task=task)
        for path in sorted(source.glob("*_*.json*")):
            if not path.name.startswith("train_"):
                shutil.copyfile(path, draft / path.name)
        if task.image_field:
            _copy_pictures(source, draft, task.image_field)


def _copy_pictures(source: Path, target: Path, image_field: str) -> None:
    """Copy the pictures that a data set's splits without train name by relative paths."""
    for questions in sorted(source.glob("*_questions.json*")):
        if questions.name.startswith("train_"):
            continue
        for _, question in stream_values(questions, "item", opening=b"[", unit="question"):
            for name in _paths_in(question, image_field):
                copy = target / name
                if is_file(source / name) and not copy.exists():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name, copy)


def _paths_in(question: object, image_field: str) -> Iterator[PurePath]:
    """Yield the relative paths of a question's pictures; readers report broken values."""
    profile = question.get("profile") if isinstance(question, Mapping) else None
    for item in profile if isinstance(profile, list) else ():
        value = item.get(image_field) if isinstance(item, Mapping) else None
        if isinstance(value, str) and value and not is_data_url(value):
            path = PurePath(value)
            if not path.is_absolute() and ".." not in path.parts:
                yield path


def _write_drafts(samples: Iterable[Sample], to_questions: Path, to_outputs: Path, task: Task) -> bool:
    """Write both files and return whether the samples have targets."""
    seen: set[str] = set()
    targets = 0
    with to_questions.open("w", encoding="utf-8") as questions, to_outputs.open("w", encoding="utf-8") as outputs:
        questions.write("[")
        outputs.write(f'{{"task": {json.dumps(task.name)}, "golds": [')
        for sample in samples:
            _check_writable(sample, task, seen)
            questions.write((",\n" if seen else "\n") + json.dumps(_question(sample, task), ensure_ascii=False))
            if sample.target is not None:
                gold: dict[str, Any] = {"id": sample.id, "output": sample.target}
                gold |= {"rejected": list(sample.rejected)} if sample.rejected else {}
                outputs.write((",\n" if targets else "\n") + json.dumps(gold, ensure_ascii=False))
                targets += 1
            seen.add(sample.id)
        questions.write("\n]\n")
        outputs.write("\n]}\n")
    if targets not in (0, len(seen)):
        raise ConfigError(
            f"{targets} of {len(seen)} samples have a target. Write the samples without a target as another split."
        )
    return targets > 0


def _check_writable(sample: Sample, task: Task, seen: set[str]) -> None:
    try:
        for name in (sample.id, *(() if sample.user_id is None else (sample.user_id,))):
            as_id(name, "its id")
        if sample.id in seen:
            raise Flaw("an earlier sample has the same id")
        if query_of(task, sample.prompt) != sample.query:
            raise Flaw("its query differs from the query that the task finds in its prompt")
        if sample.target is not None and target_of(task, sample.target) != sample.target:
            raise Flaw("its target has leading or trailing blanks")
        context_of(_messages(sample))
        if any(item_of(task, _item(item, task), folder=_folder_of(item))[1] != item for item in sample.history):
            raise Flaw("the fields of an item differ from those of the task")
    except Flaw as flaw:
        raise ConfigError(f"Sample {short_id(sample.id)} cannot be written for task {task.name}: {flaw}.") from None


def _question(sample: Sample, task: Task) -> dict[str, Any]:
    user = {} if sample.user_id is None else {"user_id": sample.user_id}
    context: dict[str, Any] = {"context": _messages(sample)} if sample.context else {}
    profile = [_item(item, task) for item in sample.history]
    return {"id": sample.id, **user, "input": sample.prompt, **context, "profile": profile}


def _messages(sample: Sample) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in sample.context]


def _item(item: HistoryItem, task: Task) -> dict[str, Any]:
    record: dict[str, Any] = {"id": item.id, **record_of(item)}
    if item.picture is not None and task.image_field and isinstance(item.picture.source, Path):
        record[task.image_field] = f"{PICTURES}/{item.picture.source.name}"
    if item.vector is not None and task.vector_field:
        record[task.vector_field] = numbers_of(item.vector)
    return record | ({"date": item.date.isoformat()} if item.date else {})


def _folder_of(item: HistoryItem) -> Path | None:
    """Return the folder of the data set that holds an item's picture."""
    source = item.picture.source if item.picture else None
    return source.parent.parent if isinstance(source, Path) else None
