"""PrefEval (arXiv 2502.09597): questions where a preference matters that the user stated or showed before.

The folder is `benchmark_dataset` of the repository amazon-science/PrefEval (CC BY-NC 4.0). Each topic is a JSON list in
`mcq_options`, `implicit_preference/choice-based` and `implicit_preference/persona-driven`; equal places in the lists
are the same preference. The first of the four options is the one that fits (`utils/utils_mcq.py`).

The paper puts the preference into the conversation and lets the model choose a letter. Here the preference is the
user's history, the fitting option is the target, and the other three are rejected answers. The splits are this
project's: a fifth of the preferences is dev, the same in all three forms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

from personaplug.data.event_copies import comparable
from personaplug.data.json_stream import existing_folder
from personaplug.data.parsing import Flaw, as_record, name_of, value_of
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

    The history of "explicit" is the stated preference. That of "choice" is a dialogue in which the user picks the
    fitting one of some options; that of "persona" is a longer dialogue that lets the preference show.
    """

    def __init__(self, path: str | Path, split: str, *, form: Form, **limits: Unpack[Limits]) -> None:
        """Find the topics; `path` is the folder that holds `mcq_options`."""
        if split not in ("train", "dev"):
            raise ConfigError(f"PrefEval has the splits 'train' and 'dev'; found {split!r}.")
        task = Task(f"PrefEval_{form}", "chat", ("question", "answer"), "answer", ("rouge_1", "rouge_l"))
        super().__init__(task, origin=path, **limits)
        self._folder, self._split, self._form = existing_folder(path), split, form
        self._topics = sorted(self._folder.joinpath("mcq_options").glob("*.json"))
        if not self._topics:
            raise MissingData(f"{path} holds no mcq_options/*.json; give the folder 'benchmark_dataset' of PrefEval.")

    def _samples(self) -> Iterator[Sample]:
        for topic in self._topics:
            shown = self._folder / _FOLDERS[self._form] / topic.name
            dialogues = _values(shown)
            if len(questions := _values(topic)) != len(dialogues):
                raise RecordError(
                    shown, "in the file", reason=f"it has {len(dialogues)} records, and {topic} has {len(questions)}"
                )
            for number, (question, dialogue) in enumerate(zip(questions, dialogues, strict=True), 1):
                self.report.rows += 1
                try:
                    sample = self._sample(f"{topic.stem}/{number}", as_record(question), as_record(dialogue))
                except Flaw as flaw:
                    self._skip(shown, f"record {number}", flaw)
                else:
                    yield from [sample] if sample else []

    def _sample(self, name: str, question: Mapping[str, Any], dialogue: Mapping[str, Any]) -> Sample | None:
        asked, preference = name_of(question, "question"), name_of(question, "preference")
        if name_of(dialogue, "question") != asked:
            raise Flaw("its question is not that of the same place in mcq_options")
        if _is_dev(preference) != (self._split == "dev"):
            return None
        options = value_of(question, "classification_task_options")
        if not isinstance(options, list) or len(options) != _OPTIONS:
            raise Flaw(f"its 'classification_task_options' is not a list of {_OPTIONS}")
        fitting, *others = (_text(option) for option in options)
        items = [(None, item) for item in self._history(name, preference, dialogue)]
        return self._sample_of(name, name, asked, target=fitting, items=items, rejected=others)

    def _history(self, name: str, preference: str, record: Mapping[str, Any]) -> list[HistoryItem]:
        if self._form == "explicit":
            return [HistoryItem(f"{name}/preference", ((PREFERENCE, preference),), kind="preference")]
        dialogue = as_record(value_of(record, "conversation"))
        if self._form == "choice":
            turns = [(name_of(dialogue, asked), name_of(dialogue, answered)) for asked, answered in _DIALOGUE]
        else:
            records = [as_record(value_of(dialogue, key)) for key in sorted(dialogue, key=_place)]
            turns = [(name_of(turn, "user"), name_of(turn, "assistant")) for turn in records]
        return [
            HistoryItem(f"{name}/{number}", (("question", asked), ("answer", answered)), "answer")
            for number, (asked, answered) in enumerate(turns, 1)
        ]


def _is_dev(preference: str) -> bool:
    """Draw a fifth of the preferences by their text, so that one that occurs twice is in one split."""
    digest = hashlib.sha256(comparable(preference).encode()).digest()
    return int.from_bytes(digest[:8]) % _DEV_STEP == 0


def _values(path: Path) -> list[object]:
    return [value for _, _, value in record_source(path, kinds=(".json",)).read(())]


def _text(option: object) -> str:
    if not isinstance(option, str) or not option.strip():
        raise Flaw("one of its options is no text")
    return option


def _place(key: str) -> int:
    if not key.isdecimal():
        raise Flaw("a turn of its 'conversation' has no number")
    return int(key)
