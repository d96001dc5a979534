"""LaMP-QA (arXiv 2506.00137), read: a user's question, answered with that user's earlier posts in mind.

A split is a JSON list of records {id, question, narrative, category, profile: [{id, text}], rubric_aspects: [{aspect,
reason, evidence}]}, as `utils/download_datasets.py` of the repository LaMP-Benchmark/LaMP-QA writes one per category
(`Art_and_Entertainment_validation.json`). File names, splits and prediction format were read in that repository's
README and script, the fields in code that reads them.

There are no right answers: an answer is judged aspect by aspect by a large language model, outside this project, and
`rubrics` hands over what such a judge needs. So targets are None, and these samples serve prediction alone. The
narrative is what the aspects were drawn from, so it never reaches a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from personaplug.data.benchmarks.base import PublishedReader, published_records, split_files
from personaplug.data.parsing import Flaw, as_name, as_record, as_text, query_of, value_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import RecordError

LAMP_QA = Task(
    "LaMP_QA", "text", ("text",), None, ("rouge_1", "rouge_l"), query_after="question: ", max_new_tokens=1024
)
"""The task. Its metrics are for reference answers of one's own: the benchmark has none, its score is a judge's."""


class LampQAReader(PublishedReader):
    """One split of one category of LaMP-QA, streamed.

    Posts are not dated, so they stay in the file's order and the last ones are kept. Users are not named.
    """

    def __init__(self, path: str | Path, split: str, *, skip_bad: int = 0, max_history: int = 512) -> None:
        """Find the files; nothing is read yet.

        Args:
            path: the split's file, or a folder that holds one file of that split.
            split: "train", "dev" (the publishers' "validation") or "test".
            skip_bad: how many broken records may be passed over.
            max_history: how many of the last items of a history are kept.

        Raises:
            MissingData, MissingExtra, ConfigError: as `split_files`.
            ConfigError: if a setting is out of range.
        """
        super().__init__(split_files(path, split), task=LAMP_QA, skip_bad=skip_bad, max_history=max_history)

    def _id(self, record: Mapping[str, Any], number: int) -> str:
        return _id(record)

    def _sample(self, record: Mapping[str, Any], sample_id: str) -> Sample:
        question = as_name(value_of(record, "question"), "its 'question'")
        prompt = f"Answer the question of this user in detail.\nquestion: {question}"
        query = query_of(self.task, prompt)
        return Sample(sample_id, None, prompt, query, None, self._history(value_of(record, "profile"), _item))


@dataclass(frozen=True, slots=True, repr=False)
class Aspect:
    """One thing that this user's answer should cover.

    Attributes:
        aspect: what it is.
        reason: why it matters to the user; may be empty.
        evidence: where the narrative shows it; may be empty.
    """

    aspect: str
    reason: str
    evidence: str


@dataclass(frozen=True, slots=True, repr=False)
class Rubric:
    """What a judge needs for one question, beside the answer that is judged.

    Attributes:
        id: the sample's id.
        question: what was asked.
        narrative: what the user told beside the question; may be empty. Not for the model that answers.
        aspects: what to judge, each from 0 to 2; a question's score is their mean over 2.
    """

    id: str
    question: str
    narrative: str
    aspects: tuple[Aspect, ...]

    def __repr__(self) -> str:
        return f"Rubric(id={self.id!r}, aspects={len(self.aspects)})"


def rubrics(path: str | Path, split: str) -> Iterator[Rubric]:
    """Yield each question's rubric, in file order, from what LampQAReader reads the samples from.

    Raises:
        MissingData, MissingExtra, ConfigError: as `split_files`.
        RecordError: for the first record without a rubric.
    """
    for file, where, record in published_records(split_files(path, split)):
        try:
            if isinstance(record, Flaw):
                raise record
            yield _rubric(record)
        except Flaw as flaw:
            raise RecordError(file, where, reason=str(flaw)) from None


def _id(record: Mapping[str, Any]) -> str:
    return as_name(value_of(record, "id"), "its 'id'")


def _item(record: Mapping[str, Any], number: int) -> tuple[datetime | None, HistoryItem]:
    return None, HistoryItem(_id(record), (("text", as_text(value_of(record, "text"), "its 'text'")),))


def _rubric(record: Mapping[str, Any]) -> Rubric:
    aspects = value_of(record, "rubric_aspects")
    if not isinstance(aspects, list) or not aspects:
        raise Flaw("its 'rubric_aspects' is not a list with at least one entry")
    question = as_name(value_of(record, "question"), "its 'question'")
    return Rubric(_id(record), question, _optional(record, "narrative"), tuple(map(_aspect, aspects)))


def _aspect(value: object) -> Aspect:
    record = as_record(value)
    name = as_name(value_of(record, "aspect"), "its 'aspect'")
    return Aspect(name, _optional(record, "reason"), _optional(record, "evidence"))


def _optional(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return "" if value is None else as_text(value, f"its {key!r}")
