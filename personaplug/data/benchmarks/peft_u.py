"""PEFT-U (arXiv 2407.18078): predict the label that a user gives to a text.

A dataset is one JSON object {user: {"train" | "val" | "test": {sample: {"text": …, "label": ["…", …]}}}}, as
`peft_u/preprocess/convert_data_format.py` of the repository ChrisIsKing/Parameter-Efficient-Personalization writes
it: `user_data_no_leak.json` (no test text is in the train split of any user) or `user_data_leaked.json`. The sets with
generated texts (Goodreads, Stack Exchange) are not supported. The benchmark's instructions are in its code, not in the
file; pass one as `instruction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

from personaplug.data.benchmarks.base import check_split
from personaplug.data.json_stream import plain_or_gz, stream_values
from personaplug.data.parsing import Flaw, as_id, as_name, as_record, as_text, name_of, short_id, target_of, value_of
from personaplug.data.record_reader import Limits, RecordReader
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData

_FILES = ("user_data_no_leak.json", "user_data_leaked.json")
_MAX_LABELS = 2048
_MARKER = "\ntext: "  # begins a line, so that an instruction may contain 'text: '


class PeftUReader(RecordReader):
    """One split of a dataset.

    The file is one JSON object and declares no labels, so it is held in memory and first read for its labels. Several
    labels of a sample count as one label, sorted and joined by ", ". Items have no dates. A history consists of the
    user's train samples in file order; for a train sample, of those before it. Ids are `user/sample`.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        queries_per_user: int = 4,
        instruction: str | None = None,
        **limits: Unpack[Limits],
    ) -> None:
        """Find the file and read its labels.

        Args:
            path: the file, or the folder of one dataset, where the file without leak is preferred.
            queries_per_user: in train, the maximum number of samples of a user; the last ones are used.
            instruction: the prompt before the text; None for a sentence that lists the labels.
        """
        path, self._split = Path(path), "val" if check_split(split) == "dev" else split
        files = [path] if path.is_file() else [file for name in _FILES if (file := plain_or_gz(path, name))]
        if not files:
            raise MissingData(f"{path} is neither a file nor a folder with {' or '.join(_FILES)}, plain or .gz.")
        self._path = files[0]
        if queries_per_user < 1:
            raise ConfigError(f"queries_per_user should be at least 1, found {queries_per_user}.")
        self._queries_per_user = queries_per_user
        labels, fields = _labels_in(self._path), ("text", "label")
        task = Task("PEFT_U", "label", fields, "label", ("accuracy", "f1"), labels=labels, query_after=_MARKER)
        super().__init__(task, origin=self._path, **limits)
        self._instruction = _default_instruction(labels) if instruction is None else instruction
        if _MARKER in self._instruction:
            raise ConfigError("The instruction should have no line that begins with 'text: ', which marks the query.")

    def _samples(self) -> Iterator[Sample]:
        seen: set[str] = set()
        for user, splits in _users(self._path):
            position = f"user {short_id(user)}"
            try:
                as_id(user, "its id")
                train, queries = (as_record(value_of(as_record(splits), name)) for name in ("train", self._split))
            except Flaw as flaw:
                self._skip(self._path, position, flaw)
                continue
            self.report.rows += len(train) + len(queries) * (self._split != "train")
            items = self._labelled_items(train, position)
            if self._split == "train":
                first = max(len(items) - self._queries_per_user, 0)
                samples = [self._sample(user, items[index], items[:index]) for index in range(first, len(items))]
            else:
                others = self._labelled_items(queries, position, train=train)
                samples = [self._sample(user, query, items) for query in others]
            for sample in samples:
                if sample.id not in seen:
                    seen.add(sample.id)
                    yield sample
                else:
                    duplicate = f"{position}, sample id {short_id(sample.id)}"
                    self._skip(self._path, duplicate, Flaw("an earlier record has the same id"))

    def _labelled_items(
        self, samples: Mapping[str, Any], position: str, *, train: Mapping[str, Any] = MappingProxyType({})
    ) -> list[HistoryItem]:
        items = []
        for sample_id, values in samples.items():
            try:
                if sample_id in train:
                    raise Flaw("the user's train split has a sample with the same id")
                # A sample may become a query, so its text must not be blank.
                text, label = name_of(as_record(values), "text"), target_of(self.task, _label(values))
                fields, labels = (("text", text), ("label", label)), self.task.labels
                items.append(HistoryItem(as_id(sample_id, "its id"), fields, "label", answer_labels=labels))
            except Flaw as flaw:
                self._skip(self._path, f"{position}, sample {short_id(sample_id)}", flaw)
        return items

    def _sample(self, user: str, query: HistoryItem, items: list[HistoryItem]) -> Sample:
        prompt = f"{self._instruction}{_MARKER}{dict(query.fields)['text']}"
        timed = [(None, item) for item in items]
        return self._sample_of(f"{user}/{query.id}", user, prompt, target=query.answer, items=timed)


def _users(path: Path) -> Iterator[tuple[str, Any]]:
    for _, users in stream_values(path, "", opening=b"{", unit="object"):
        yield from users.items()


def _labels_in(path: Path) -> tuple[str, ...]:
    labels: set[str] = set()
    for _, splits in _users(path):
        for samples in splits.values() if isinstance(splits, dict) else ():
            for sample in samples.values() if isinstance(samples, dict) else ():
                try:
                    labels.add(_label(as_record(sample)))
                except Flaw:
                    continue  # reported with its position when the samples are read
    if not labels:
        raise MissingData(f"{path} has no sample with a label; expected user → split → sample → text and label.")
    if len(labels) > _MAX_LABELS:
        raise ConfigError(
            f"{path} has {len(labels)} different labels, so its answers are free text, which is not supported."
        )
    return tuple(sorted(labels))


def _label(record: Mapping[str, Any]) -> str:
    value = value_of(record, "label")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise Flaw("its 'label' is an empty list")
    return ", ".join(sorted(as_name(as_text(label, "its 'label'").strip(), "its 'label'") for label in values))


def _default_instruction(labels: tuple[str, ...]) -> str:
    single = sorted({part for label in labels for part in label.split(", ")})
    several = "" if len(single) == len(labels) else ", or several of them in this order with commas"
    return f"Which label does this user give to the text? Answer with one of: {', '.join(single)}{several}."
