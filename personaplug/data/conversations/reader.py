"""Read conversations as a data set. A sample is a reply that the user kept; earlier conversations are its history.

All records stay in memory, because a user's records may be anywhere in the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Unpack

from personaplug.data.conversations.base import ConversationFormat
from personaplug.data.conversations.messages import TIME_KEYS, moment_of, present
from personaplug.data.conversations.timeline import Entry, Line, Timeline, timeline_of
from personaplug.data.conversations.turns import conversation_of
from personaplug.data.parsing import Flaw, as_id, as_record, id_of, name_of, short_id
from personaplug.data.record_files import JSON_KINDS, RecordSource, record_source
from personaplug.data.record_reader import Limits, RecordReader
from personaplug.data.records import PREFERENCE, HistoryItem, Sample
from personaplug.data.task import ReadReport
from personaplug.data.task_registry import CHAT
from personaplug.errors import ConfigError

MAX_SAMPLES_PER_USER = 32

_USER_KEYS = ("user", "user_id")
_CONVERSATION = "conversation_id"
_NAMED = "named"


class ConversationReader(RecordReader):
    """Samples from files of conversations, or from mappings in memory.

    A sample is a reply that the user kept. Its prompt is the user's message, and its context the messages before it.
    The history contains the user's exchanges, rejections and stated preferences from other conversations at strictly
    earlier times. Without times, it contains the entries of earlier lines. A reply without history is not a sample.
    If a format has no users, each conversation counts as a separate user; see `ConversationFormat`.

    Users are in the order of their first record, and the samples of a user in time order.
    """

    def __init__(
        self,
        sources: Sequence[object],
        formats: Sequence[ConversationFormat],
        *,
        max_samples_per_user: int = MAX_SAMPLES_PER_USER,
        **limits: Unpack[Limits],
    ) -> None:
        """Open the sources. If a user has more samples than the maximum, keep samples at equal distances."""
        if max_samples_per_user < 1:
            raise ConfigError(f"max_samples_per_user should be at least 1, found {max_samples_per_user}.")
        self._sources = [record_source(source, kinds=(*JSON_KINDS, ".parquet")) for source in sources]
        super().__init__(CHAT, origin=", ".join(source.name for source in self._sources), **limits)
        self._formats, self._max_samples = tuple(formats), max_samples_per_user

    def _samples(self) -> Iterator[Sample]:
        for user, timeline in self._timelines():
            for index in self._sample_indices(timeline):
                yield self._sample(user, timeline, index)

    def histories(self) -> Iterator[tuple[str, list[HistoryItem]]]:
        """Yield each user with all items, oldest first."""
        self.report = ReadReport()
        for user, timeline in self._timelines():
            yield user, [item for entry in timeline.entries for _, item in entry.items]

    def _timelines(self) -> Iterator[tuple[str, Timeline]]:
        users: dict[str, list[Line]] = {}
        for line in self._without_missing_times(list(self._lines())):
            users.setdefault(line.user, []).append(line)
        self.report.users = len(users)
        for user, lines in users.items():
            timeline = timeline_of(lines)
            self.report.copies += timeline.copies
            yield user, timeline

    def _reason_for_nothing(self) -> str:
        return (
            f"{super()._reason_for_nothing()} A reply is a sample only if its user has an earlier item from another "
            f"conversation."
        )

    def _lines(self) -> Iterator[Line]:
        names = _Names()
        for source in self._sources:
            for position, _, record in source.read(()):
                self.report.rows += 1
                try:
                    yield self._line(source, position, present(as_record(record)), names)
                except Flaw as flaw:
                    self._skip(source.name, position, flaw)

    def _line(self, source: RecordSource, position: str, values: Mapping[str, Any], names: _Names) -> Line:
        format_, moment = self._format_of(values), moment_of(values)
        name = id_of(values, "id") if "id" in values else f"row-{self.report.rows}"
        named_user = _user_of(values)
        if named_user is None and (format_ is None or format_.has_users):
            raise Flaw(f"its {' or '.join(map(repr, _USER_KEYS))} is missing; every history needs a user")
        user = name if named_user is None else named_user
        if format_ is None:
            names.check_user(user, start=_NAMED)
            preference = name_of(values, PREFERENCE).strip()
            entry = Entry(names.new(name, user), moment, preference=preference)
            return Line(source.name, position, user, _keys(values, name), (entry,))
        conversation = conversation_of(format_.messages(values), moment=moment)
        names.check_user(user, start=conversation.start if named_user is None else _NAMED)
        self.report.left_out.update(conversation.left_out)
        entries = tuple(Entry(names.new(name, user), one.kept_at, one) for one in conversation.exchanges)
        keys = _keys(values, name, conversation.start)
        return Line(source.name, position, user, keys, entries, is_alone=named_user is None)

    def _format_of(self, values: Mapping[str, Any]) -> ConversationFormat | None:
        """Return the format of a record; None for a stated preference."""
        format_ = next((candidate for candidate in self._formats if candidate.fits(values)), None)
        if format_ is None and PREFERENCE not in values:
            forms = "; ".join(candidate.form for candidate in self._formats)
            raise Flaw(f"its format is unknown; expected the keys {forms}; or {PREFERENCE!r}")
        return format_

    def _without_missing_times(self, lines: Sequence[Line]) -> Iterator[Line]:
        """Yield the lines; if any line has a time, skip lines without a time."""
        is_timed = any(entry.moment for line in lines for entry in line.entries)
        for line in lines:
            if is_timed and not all(_has_times(entry) for entry in line.entries):
                flaw = Flaw(f"it has no time, but other records have one; give each record a {' or '.join(TIME_KEYS)}")
                self._skip(line.file, line.position, flaw)
            else:
                yield line

    def _sample_indices(self, timeline: Timeline) -> list[int]:
        """Return the indices of a user's samples."""
        exchanges = [index for index, entry in enumerate(timeline.entries) if entry.exchange]
        clear = [index for index in exchanges if index not in timeline.unclear]
        answerable = [index for index in clear if timeline.is_alone or any(timeline.history(index))]
        self.report.unclear += len(exchanges) - len(clear)
        self.report.too_early += len(clear) - len(answerable)
        excess = max(len(answerable) - self._max_samples, 0)
        self.report.left_out += Counter({f"replies beyond max_samples_per_user={self._max_samples}": excess})
        return _spread(answerable, self._max_samples)

    def _sample(self, user: str, timeline: Timeline, index: int) -> Sample:
        entry = timeline.entries[index]
        assert entry.exchange is not None
        exchange = entry.exchange
        return self._sample_of(
            entry.id,
            user,
            exchange.question,
            target=exchange.kept,
            items=[item for other in timeline.history(index) for item in other.items],
            context=exchange.context,
            rejected=exchange.rejected,
        )


class _Names:
    """Unique ids of entries: the id of the record, and the number of the entry with this id."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._users: dict[str, str] = {}
        self._starts: dict[str, Hashable] = {}

    def check_user(self, user: str, *, start: Hashable) -> None:
        """Raise a Flaw if a conversation without a user has the id of a user or of another conversation.

        Args:
            start: identifies a conversation without a user; `_NAMED` for a user that a record names.
        """
        if self._starts.setdefault(user, start) != start:
            raise Flaw(
                f"the id {short_id(user)} belongs to a record without a user and also to other data; rename one of them"
            )

    def new(self, name: str, user: str) -> str:
        if self._users.setdefault(name, user) != user:
            raise Flaw(f"a record of another user has the same id {short_id(name)}")
        self._counts[name] += 1
        return as_id(f"{name}/{self._counts[name]}", "its id with the number of the turn")


def _user_of(values: Mapping[str, Any]) -> str | None:
    return next((id_of(values, key) for key in _USER_KEYS if key in values), None)


def _keys(values: Mapping[str, Any], name: str, start: int | None = None) -> tuple[tuple[str, Any], ...]:
    """Return the keys that connect the lines of a conversation."""
    if _CONVERSATION in values:
        return (("id", name), (_CONVERSATION, id_of(values, _CONVERSATION)))
    return (("id", name), *((("start", start),) if start is not None else ()))


def _has_times(entry: Entry) -> bool:
    return entry.moment is not None and (entry.exchange is None or entry.exchange.asked_at is not None)


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the indices at equal distances, the last one included."""
    if len(indices) <= count:
        return list(indices)
    return sorted(indices[len(indices) - 1 - number * len(indices) // count] for number in range(count))
