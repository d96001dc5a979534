"""PrefEval (arXiv 2502.09597): questions whose answer depends on a preference that the user stated or showed before.

The folder is `benchmark_dataset` of the repository amazon-science/PrefEval (CC BY-NC 4.0). Each topic is a JSON list in
`mcq_options`, `implicit_preference/choice-based` and `implicit_preference/persona-driven`. Records at the same position
of the lists have the same preference. The first of the four options fits the preference (`utils/utils_mcq.py`).

The paper puts the preference into the conversation and lets the model choose a letter. Here the preference is the
user's history, the fitting option is the target, and the other three are rejected answers. The splits are this
project's: a fifth of the preferences is in dev, and the three forms have the same split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

from personaplug.data.benchmarks.base import check_split
from personaplug.data.event_copies import comparable
from personaplug.data.json_stream import existing_folder
from personaplug.data.parsing import Flaw, as_name, as_record, name_of, value_of
from personaplug.data.record_files import record_source
from personaplug.data.record_reader import Limits, RecordReader
from personaplug.data.records import PREFERENCE, HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData, RecordError

Form = Literal["explicit", "choice", "persona"]

_FOLDERS: Mapping[Form, str] = {
    "explicit": "mcq_options",
    "choice": "implicit_preference/choice-based",
    "persona": "implicit_preference/persona-driven",
}
_OPTIONS = 4
_DEV_STEP = 5
_DIALOGUE = (("query", "assistant_options"), ("user_selection", "assistant_acknowledgment"))


class PrefEvalReader(RecordReader):
    """One split of one form. Each preference is a user.

    The history of "explicit" is the stated preference. The history of "choice" is a dialogue in which the user picks
    the fitting option. The history of "persona" is a longer dialogue that shows the preference indirectly.
    """

    def __init__(self, path: str | Path, split: str, *, form: Form, **limits: Unpack[Limits]) -> None:
        """Find the topics; `path` is the folder that contains `mcq_options`."""
        if check_split(split) == "test":
            raise ConfigError("PrefEval has no split 'test'. Choose 'train' or 'dev'.")
        task = Task(f"PrefEval_{form}", "chat", ("question", "answer"), "answer", ("rouge_1", "rouge_l"))
        super().__init__(task, origin=path, **limits)
        self._folder, self._split, self._form = existing_folder(path), split, form
        self._topics = sorted(self._folder.joinpath("mcq_options").glob("*.json"))
        if not self._topics:
            raise MissingData(f"{path} has no mcq_options/*.json; give the folder 'benchmark_dataset' of PrefEval.")

    def _samples(self) -> Iterator[Sample]:
        for topic in self._topics:
            dialogues_path = self._folder / _FOLDERS[self._form] / topic.name
            for number, (question, dialogue) in enumerate(_pairs(topic, dialogues_path), 1):
                self.report.rows += 1
                name, file = f"{topic.stem}/{number}", topic
                try:
                    query = _question(as_record(question))
                    file = dialogues_path
                    items = self._history(name, query, as_record(dialogue))
                except Flaw as flaw:
                    self._skip(file, f"record {number}", flaw)
                    continue
                if _is_dev(query.preference) == (self._split == "dev"):
                    yield self._sample(name, query, items)

    def _sample(self, name: str, query: _Question, items: Sequence[HistoryItem]) -> Sample:
        fitting, *others = query.options
        timeless = [(None, item) for item in items]
        return self._sample_of(name, name, query.text, target=fitting, items=timeless, rejected=others)

    def _history(self, name: str, query: _Question, record: Mapping[str, Any]) -> list[HistoryItem]:
        if self._form == "explicit":
            return [HistoryItem(f"{name}/preference", ((PREFERENCE, query.preference),), kind="preference")]
        if name_of(record, "question") != query.text:
            raise Flaw("its question differs from the question at the same position in mcq_options")
        dialogue = as_record(value_of(record, "conversation"))
        if self._form == "choice":
            turns = [(name_of(dialogue, one), name_of(dialogue, two)) for one, two in _DIALOGUE]
        else:
            records = [as_record(value_of(dialogue, key)) for key in sorted(dialogue, key=_place)]
            turns = [(name_of(turn, "user"), name_of(turn, "assistant")) for turn in records]
        return [
            HistoryItem(f"{name}/{number}", (("question", one), ("answer", two)), "answer", answer_labels=())
            for number, (one, two) in enumerate(turns, 1)
        ]


@dataclass(frozen=True, slots=True, repr=False)
class _Question:
    """A record of mcq_options; the first option fits the preference."""

    text: str
    preference: str
    options: tuple[str, ...]


def _question(record: Mapping[str, Any]) -> _Question:
    options = value_of(record, "classification_task_options")
    if not isinstance(options, list) or len(options) != _OPTIONS:
        raise Flaw(f"its 'classification_task_options' is not a list of {_OPTIONS} options")
    texts = tuple(as_name(option, "an option") for option in options)
    return _Question(name_of(record, "question"), name_of(record, "preference"), texts)


def _is_dev(preference: str) -> bool:
    """Draw a fifth of the preferences by their text, so that equal preferences are in the same split."""
    digest = hashlib.sha256(comparable(preference).encode()).digest()
    return int.from_bytes(digest[:8]) % _DEV_STEP == 0


def _pairs(topic: Path, dialogues_path: Path) -> Iterator[tuple[object, object]]:
    """Pair the records of two files by their position."""
    questions, dialogues = _values(topic), _values(dialogues_path)
    if len(questions) != len(dialogues):
        reason = f"it has {len(dialogues)} records, but {topic} has {len(questions)}"
        raise RecordError(dialogues_path, "in the file", reason=reason)
    return zip(questions, dialogues, strict=True)


def _values(path: Path) -> list[object]:
    return [value for _, _, value in record_source(path, kinds=(".json",)).read(())]


def _place(key: str) -> int:
    if not key.isdecimal():
        raise Flaw("a turn of its 'conversation' is not numbered")
    return int(key)
