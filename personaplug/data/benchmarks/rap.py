"""RAP (arXiv 2410.13360): questions on a user's own concepts, such as a dog or a cup, by their names.

The folder is a copy of the repository Hoar012/RAP-MLLM. `example_database/database.json` has the concepts, each with a
name, a picture, a category and facts. `eval/yollava-text-only-qa.json` has questions with two options each, in which
"sks" stands for the concept. The database has fewer concepts than the questions; the others have no items.

The concepts are the history, which all questions share. The correct option is the target and the other one is a
rejected answer, so a model is scored by likelihood. The paper lets the model choose a letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from personaplug.data.benchmarks.base import check_split
from personaplug.data.json_stream import existing_folder, plain_or_gz, stream_values
from personaplug.data.parsing import Flaw, as_name, as_record, item_of, name_of, short_id, value_of
from personaplug.data.record_reader import Limits, RecordReader, TimedItem
from personaplug.data.records import Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData

RAP = Task(
    "RAP",
    "chat",
    ("name", "category", "info"),
    None,
    ("rouge_1", "rouge_l"),
    image_field="image",
    name_field="name",
)

_DATABASE = "example_database/database.json"
_QUESTIONS = "eval/yollava-text-only-qa.json"
_CONCEPT = re.compile(r"\bsks\b")


class RapReader(RecordReader):
    """The questions on text alone. There is only the split "test"; users are not named."""

    def __init__(self, path: str | Path, split: str, **limits: Unpack[Limits]) -> None:
        """Find the files; `path` is the folder that contains `example_database` and `eval`."""
        check_split(split)
        super().__init__(RAP, origin=path, **limits)
        self._folder = existing_folder(path)
        if split != "test":
            raise ConfigError(f"RAP has only the split 'test', found {split!r}.")
        self._database, self._questions = (_file(self._folder, name) for name in (_DATABASE, _QUESTIONS))

    def _samples(self) -> Iterator[Sample]:
        items = self._concepts()
        for name, records in _object_in(self._questions).items():
            try:
                questions = as_record(records)
            except Flaw as flaw:
                self._skip(self._questions, f"concept {short_id(name)}", flaw)
                continue
            self.report.rows += len(questions)
            if name not in items:
                self.report.left_out["questions on concepts that are not in the database"] += len(questions)
                continue
            for number, record in questions.items():
                sample_id = f"{name}/{number}"
                try:
                    yield self._sample(sample_id, as_record(record), name=name, items=[*items.values()])
                except Flaw as flaw:
                    self._skip(self._questions, f"question {short_id(sample_id)}", flaw)

    def _sample(self, sample_id: str, record: Mapping[str, Any], *, name: str, items: list[TimedItem]) -> Sample:
        prompt, found = _CONCEPT.subn(f"<{name}>", name_of(record, "question"))
        if not found:
            raise Flaw("its question does not contain 'sks', which stands for the concept")
        options = as_record(value_of(record, "option"))
        if sorted(options) != ["A", "B"]:
            raise Flaw("its 'option' does not have exactly the options A and B")
        texts = {letter: as_name(text, f"option {letter}") for letter, text in options.items()}
        correct = texts.pop(name_of(record, "correct_answer"), None)
        if correct is None:
            raise Flaw("its 'correct_answer' is not A or B")
        return self._sample_of(sample_id, None, prompt, target=correct, items=items, rejected=[*texts.values()])

    def _concepts(self) -> dict[str, TimedItem]:
        """Return the items of the database by the names of their concepts."""
        items = {}
        for key, record in _concept_records(self._database).items():
            try:
                values = as_record(record)
                name = name_of(values, "name")
                if not isinstance(value_of(values, "image"), str):
                    raise Flaw("its 'image' is not the path of a picture")
                items[name] = item_of(self.task, values, default_id=name, folder=self._folder)
            except Flaw as flaw:
                self._skip(self._database, f"concept {short_id(key)}", flaw)
        return items


def _file(folder: Path, name: str) -> Path:
    path = plain_or_gz(folder, name)
    if path is None:
        raise MissingData(f"{folder} has no {name}; give a folder with {_DATABASE} and {_QUESTIONS}, as in RAP-MLLM.")
    return path


def _object_in(path: Path) -> Mapping[str, Any]:
    return next((dict(value) for _, value in stream_values(path, "", opening=b"{", unit="object")), {})


def _concept_records(path: Path) -> Mapping[str, Any]:
    records = _object_in(path).get("concept_dict")
    if not isinstance(records, Mapping):
        raise MissingData(f"{path} has no object 'concept_dict' with the concepts, as RAP's database.json has.")
    return records
