"""The base class of all readers: settings, checks of records, histories, and the report."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from personaplug.data.parsing import Flaw, as_record, item_of, options_of, query_of, short_id, value_of
from personaplug.data.records import HistoryItem, Sample, Turn
from personaplug.data.task import ReadReport, Task
from personaplug.errors import ConfigError, MissingData, RecordError

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")

PositionedRecord = tuple[Path, str, object]
"""A file, a position in words, and the value; a Flaw replaces a broken record."""

TimedItem = tuple[datetime | None, HistoryItem]


class Limits(TypedDict, total=False):
    """Limits of every reader.

    Attributes:
        skip_bad: the number of broken records that may be skipped; 0 by default.
        max_history: the number of latest items that a history keeps; 512 by default.
    """

    skip_bad: int
    max_history: int


class RecordReader(ABC):
    """A reader of records. A subclass yields the samples and reports defects through `_skip`."""

    def __init__(self, task: Task, *, origin: object = "the data", skip_bad: int = 0, max_history: int = 512) -> None:
        """Check the limits; `origin` is the name of the data in messages."""
        for name, value in (("skip_bad", skip_bad), ("max_history", max_history)):
            if value < 0:
                raise ConfigError(f"{name} should be 0 or more, found {value}.")
        self.task, self.report = task, ReadReport()
        self._picture_folder = origin.parent if isinstance(origin, Path) else None  # of the paths of pictures
        self._origin, self._skip_bad, self._max_history = origin, skip_bad, max_history
        self._has_warned = False

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples.

        Raise RecordError for a broken record beyond `skip_bad` or a truncated file, and MissingData if there is no
        sample.
        """
        self.report = report = ReadReport()
        users: set[str] = set()
        for sample in self._samples():
            report.samples += 1
            report.items += len(sample.history)
            report.own_answers += self._holds_own_answer(sample)
            if sample.user_id is not None:
                users.add(sample.user_id)
                report.users = max(report.users, len(users))
            yield sample
        if not report.samples:
            raise MissingData(f"{self._origin} yields no samples. {self._reason_for_nothing()}")
        if report.own_answers and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "WARNING: %s: in %s of %s samples, an item of the history has the text and the answer of the question. "
                "A model can copy the answer, so scores are too high. Remove these items from the data.",
                self._origin, f"{report.own_answers:,}", f"{report.samples:,}",
            )  # fmt: skip

    def _reason_for_nothing(self) -> str:
        report = self.report
        if not report.rows:
            return "It holds no records."
        first = f" The first defect: {report.problems[0]}." if report.problems else ""
        return f"Found {report.summary()}.{first}"

    def _holds_own_answer(self, sample: Sample) -> bool:
        """Return whether an item of the history has the text and the answer of the question."""
        target, query = (sample.target or "").strip(), sample.query.strip()
        for item in sample.history:
            if target and (item.answer or "").strip() == target:
                contents = [text for name, text in item.fields if name != item.answer_name]
                if query in (*map(str.strip, contents), " ".join(contents).strip()):
                    return True
                if not contents and not self.task.labels:  # the item is only the written text
                    return True
        return False

    @abstractmethod
    def _samples(self) -> Iterator[Sample]:
        """Yield the samples of one pass."""

    def _skip(self, file: str | Path, position: str, flaw: Flaw) -> None:
        error = RecordError(file, position, reason=str(flaw))
        if self.report.skipped >= self._skip_bad:
            raise error
        self.report.skipped += 1
        self.report.problems.append(str(error))

    def _sample_of(
        self,
        name: str,
        user: str | None,
        prompt: str,
        *,
        target: str | None,
        items: Sequence[TimedItem],
        context: Sequence[Turn] = (),
        rejected: Sequence[str] = (),
    ) -> Sample:
        """Find the query and the options in the prompt, and keep the latest items as the history."""
        query, options = query_of(self.task, prompt), options_of(self.task, prompt)
        history = latest(in_time_order(items), self._max_history)
        self.report.cut_items += len(items) - len(history)
        return Sample(
            name,
            user,
            prompt,
            query,
            target,
            history,
            options=options,
            context=tuple(context),
            rejected=tuple(rejected),
        )

    def _parsed(
        self,
        records: Iterable[PositionedRecord],
        *,
        parse_id: Callable[[Mapping[str, Any], int], str],
        parse: Callable[[Mapping[str, Any], str], Parsed],
        seen: set[str] | None = None,
    ) -> Iterator[Parsed]:
        """Yield the parsed records, skip those that have a flaw, and fill `seen` with their ids.

        `parse_id` gets a record and its number, from 1; `parse` gets the record and its id.
        """
        seen = set() if seen is None else seen
        for number, (file, position, record) in enumerate(records, 1):
            self.report.rows += 1
            try:
                values = as_record(record)
                record_id = parse_id(values, number)
                position = f"{position} (id {short_id(record_id)})"
                if record_id in seen:
                    raise Flaw("an earlier record has the same id")
                seen.add(record_id)
                parsed = parse(values, record_id)
            except Flaw as flaw:
                self._skip(file, position, flaw)
            else:
                yield parsed

    def _items(self, record: Mapping[str, Any], *, id_key: str = "id", date_key: str = "date") -> list[TimedItem]:
        """Parse a record's "profile", a list of items; without `id_key`, the ids are numbers from 1."""
        profile = value_of(record, "profile")
        if not isinstance(profile, list):
            raise Flaw("its 'profile' is not a list")
        items = []
        for number, item in enumerate(profile, 1):
            default_id = None if id_key else str(number)
            try:
                keys = {"id_key": id_key, "date_key": date_key}
                items.append(item_of(self.task, item, default_id=default_id, folder=self._picture_folder, **keys))
            except Flaw as flaw:
                raise Flaw(f"item {number} of its profile: {flaw}") from None
        return items


def in_time_order(items: Sequence[TimedItem]) -> tuple[HistoryItem, ...]:
    """Sort items by date and time. Keep their order if any of them has no date."""
    if all(moment is not None for moment, _ in items):
        items = sorted(items, key=lambda pair: pair[0] or datetime.min)
    return tuple(item for _, item in items)


def latest(items: Sequence[HistoryItem], limit: int) -> tuple[HistoryItem, ...]:
    """Keep at most `limit` items in their order: stated preferences take precedence, then the latest other items."""
    if len(items) <= limit:
        return tuple(items)
    places = sorted(range(len(items)), key=lambda place: (items[place].kind == "preference", place), reverse=True)
    return tuple(items[place] for place in sorted(places[:limit]))
