"""PEFT-U (arXiv 2407.18078), read: texts that users label by their own lights, so that the same text has other labels.

A dataset is one JSON object {user: {"train" | "val" | "test": {sample: {"text": …, "label": ["…", …]}}}}, in the file
`user_data_no_leak.json` (no text of test is in anybody's train) or `user_data_leaked.json`; other keys of a sample
are not read. The format was read in `peft_u/preprocess/convert_data_format.py` of the repository
ChrisIsKing/Parameter-Efficient-Personalization, which writes it. Its generated-text sets (Goodreads, Stack Exchange)
are left out. The benchmark's per-dataset instructions stand in its code, not in the file: give one by `instruction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from personaplug.data.benchmarks.base import check_split
from personaplug.data.json_stream import plain_or_gz, stream_values
from personaplug.data.parsing import Flaw, as_name, as_record, as_text, query_of, short_id, target_of, value_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import ReadReport, Task, check_max_history, check_skip_bad, latest_items
from personaplug.errors import ConfigError, MissingData, RecordError

_FILES = ("user_data_no_leak.json", "user_data_leaked.json")
_MOST_LABELS = 2048
_MARKER = "\ntext: "  # it begins a line, so that an instruction may speak of a text


class PeftUReader:
    """One split of a PEFT-U dataset.

    The file is one JSON object and the labels are nowhere declared, so it is held in memory as a whole, and read
    once at the start for its labels. Several labels of one sample count as one, sorted and joined by ", ": accuracy
    is that of the whole set. Items are not dated: a history is the user's train samples in the file's order, for a
    sample of train those before it. Ids are `user/sample`.

    Attributes:
        task: "label", with the labels that the file uses, in all its splits.
        report: what the last (or current) pass met.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        queries_per_user: int = 4,
        instruction: str | None = None,
        skip_bad: int = 0,
        max_history: int = 512,
    ) -> None:
        """Find the file and read which labels there are.

        Args:
            path: the file, or the folder of one dataset; of its two files the one without leak is taken.
            split: "train", "dev" (the file's "val") or "test".
            queries_per_user: how many samples of a user train holds at most, the last ones.
            instruction: what the prompt says before the text; None for a sentence with the labels.
            skip_bad: how many broken users and samples may be passed over.
            max_history: how many of the last items of a history are kept.

        Raises:
            MissingData: if the file is not there, or holds no sample with a label.
            ConfigError: if a setting is out of range, or there are too many labels to be a set of labels.
            RecordError: if the file is not valid JSON.
        """
        self._path, self._split = _file_of(Path(path)), "val" if check_split(split) == "dev" else split
        if queries_per_user < 1:
            raise ConfigError(f"queries_per_user should be at least 1, found {queries_per_user}.")
        self._queries_per_user = queries_per_user
        self._skip_bad, self._max_history = check_skip_bad(skip_bad), check_max_history(max_history)
        labels = _labels_in(self._path)
        self.task = Task(
            "PEFT_U", "label", ("text", "label"), "label", ("accuracy", "f1"), labels=labels, query_after=_MARKER
        )
        self._instruction = _instruction(labels) if instruction is None else instruction
        if _MARKER in self._instruction:
            raise ConfigError("The instruction should have no line that begins with 'text: ': the query stands there.")
        self.report = ReadReport()

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples, user by user, in file order.

        Raises:
            RecordError: for the first broken record beyond `skip_bad`.
        """
        self.report = ReadReport()
        seen: set[str] = set()
        for user, values in _users(self._path):
            where = f"user {short_id(user)}"
            try:
                as_name(user, "its id")
                train, asked = (as_record(value_of(as_record(values), name)) for name in ("train", self._split))
            except Flaw as flaw:
                self._skip(where, flaw)
                continue
            for sample in self._samples(user, train, asked, where):
                if sample.id in seen:
                    self._skip(f"{where}, sample id {short_id(sample.id)}", Flaw("its id is another sample's too"))
                    continue
                seen.add(sample.id)
                yield self.report.add(sample)

    def _samples(self, user: str, train: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> Iterator[Sample]:
        known = self._items(train, where)
        if self._split == "train":
            for place in range(max(len(known) - self._queries_per_user, 0), len(known)):
                yield self._sample(user, known[place], known[:place])
        else:
            for item in self._items(asked, where, other=train):
                yield self._sample(user, item, known)

    def _items(
        self, samples: Mapping[str, Any], where: str, *, other: Mapping[str, Any] | None = None
    ) -> list[HistoryItem]:
        items = []
        for sample_id, values in samples.items():
            try:
                if other is not None and sample_id in other:
                    raise Flaw("the user's train holds a sample of the same id")
                items.append(self._item(sample_id, values))
            except Flaw as flaw:
                self._skip(f"{where}, sample {short_id(sample_id)}", flaw)
        return items

    def _item(self, sample_id: str, values: object) -> HistoryItem:
        record = as_record(values)
        # A sample may become a query, and a query says something.
        text = as_name(value_of(record, "text"), "its 'text'")
        label = target_of(self.task, _label(record))
        return HistoryItem(as_name(sample_id, "its id"), (("text", text), ("label", label)), "label")

    def _sample(self, user: str, asked: HistoryItem, known: list[HistoryItem]) -> Sample:
        prompt = f"{self._instruction}{_MARKER}{dict(asked.fields)['text']}"
        query = query_of(self.task, prompt)
        history = latest_items([(None, item) for item in known], max_history=self._max_history, report=self.report)
        return Sample(f"{user}/{asked.id}", user, prompt, query, asked.answer, history)

    def _skip(self, where: str, flaw: Flaw) -> None:
        self.report.skip(RecordError(self._path, where, reason=str(flaw)), allowed=self._skip_bad)


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    found = next((file for name in _FILES if (file := plain_or_gz(path, name))), None)
    if found is None:
        raise MissingData(f"{path} is no file, nor a folder with {' or '.join(_FILES)}, plain or .gz.")
    return found


def _users(path: Path) -> Iterator[tuple[str, Any]]:
    for _, users in stream_values(path, "", opening=b"{", unit="object"):
        yield from users.items()


def _labels_in(path: Path) -> tuple[str, ...]:
    labels: set[str] = set()
    for _, values in _users(path):
        for samples in values.values() if isinstance(values, dict) else ():
            for sample in samples.values() if isinstance(samples, dict) else ():
                try:
                    labels.add(_label(as_record(sample)))
                except Flaw:
                    continue  # said with its place when the samples are read
    if not labels:
        raise MissingData(f"{path} holds no sample with a label; expected user → split → sample → text and label.")
    if len(labels) > _MOST_LABELS:
        raise ConfigError(
            f"{path} holds {len(labels)} different labels: its answers are texts, which are left out here."
        )
    return tuple(sorted(labels))


def _label(record: Mapping[str, Any]) -> str:
    value = value_of(record, "label")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise Flaw("its 'label' is an empty list")
    return ", ".join(sorted(as_name(as_text(label, "its 'label'").strip(), "its 'label'") for label in values))


def _instruction(labels: tuple[str, ...]) -> str:
    single = sorted({part for label in labels for part in label.split(", ")})
    several = "" if len(single) == len(labels) else ", or several of them in this order with commas"
    return f"Which label does this user give to the text? Answer with one of: {', '.join(single)}{several}."
