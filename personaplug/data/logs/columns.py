"""Find the meaning of each column of a log: user, question, answer, date, id of the event, picture and vector.

A well-known name decides, and the values confirm it. A column without such a name is taken only if no other column can
have its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from personaplug.data.ids import short_id
from personaplug.data.logs.column_names import (
    ANSWER_NAMES,
    DATE_NAMES,
    ID_NAMES,
    IMAGE_NAMES,
    OTHER_DATE_WORDS,
    QUESTION_NAMES,
    USER_NAMES,
    VECTOR_NAMES,
    key_of,
    rank_of,
)
from personaplug.data.logs.date_forms import DateColumn, learn_dates
from personaplug.data.logs.options import LogOptions
from personaplug.data.numbers import number_or_none
from personaplug.data.task import Task
from personaplug.errors import ConfigError, nearest

_MIN_DATES = 0.8  # share of a column's values that are dates
_MIN_TEXT_LENGTH = 12  # characters on average, if the values are texts
_MAX_SHOWN = 30
_MAX_DATE_LENGTH = 80
_PARTS = {"image": "pictures", "vector": "vectors"}
_PART_FORMS = {
    "image": "bytes, data URLs, or paths of PNG, JPEG, GIF, WebP or BMP files that start in the log's folder",
    "vector": "lists of finite numbers",
}
_YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)", re.ASCII)
_MIN_PARTS = 0.5  # share of a column's values that are pictures or vectors
_ORDER = ("user", "date", "question", "image", "vector", "answer", "id")


@dataclass(frozen=True)
class Column:
    """A column and its values as texts, without the missing values.

    Attributes:
        values: how many values are not missing.
        pictures, vectors: how many values are pictures, also by their path, or vectors.
    """

    name: str
    texts: Sequence[str] = field(repr=False)
    rows: int
    values: int
    pictures: int = 0
    vectors: int = 0

    @property
    def is_nested(self) -> bool:
        """True if most values are no texts."""
        return self.values - len(self.texts) > len(self.texts)

    @property
    def key(self) -> str:
        """See `key_of`."""
        return key_of(self.name)

    @cached_property
    def distinct(self) -> int:
        return len(set(self.texts))

    @cached_property
    def mean_length(self) -> float:
        return sum(map(len, self.texts)) / max(len(self.texts), 1)

    @cached_property
    def is_number(self) -> bool:
        return all(number_or_none(text) is not None for text in self.texts[:1000])

    @property
    def is_text(self) -> bool:
        return self.mean_length >= _MIN_TEXT_LENGTH and not self.is_number

    def describe(self) -> str:
        """Name the column and count its values, without showing one."""
        if self.pictures or self.vectors:
            counts = f"{self.pictures:,} pictures" if self.pictures else f"{self.vectors:,} vectors"
            return f"{short_id(self.name)!r} ({counts})"
        if self.is_nested:
            return f"{short_id(self.name)!r} (lists or objects, which are not read)"
        kind = "numbers" if self.is_number and self.texts else "texts"
        return f"{short_id(self.name)!r} ({self.distinct:,} different {kind}, {self.rows - len(self.texts):,} missing)"


@dataclass(frozen=True)
class Role:
    """The meaning of columns, and the reason for it."""

    role: str
    columns: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class FoundColumns:
    """The columns of a log by their meaning.

    Attributes:
        roles: the meanings in the order of a report.
        unused: all other columns.
    """

    user: str
    questions: tuple[str, ...]
    answer: str
    date: str | None
    id: str | None
    image: str | None
    vector: str | None
    dates: DateColumn | None
    roles: tuple[Role, ...]
    unused: tuple[str, ...]


def find_columns(columns: Sequence[Column], options: LogOptions, *, task: Task | None = None) -> FoundColumns:
    """Find the meaning of each column; raise ConfigError if one is unclear.

    Args:
        task: of a run: columns with the names of its fields are the questions, the answer, the picture and the vector.
    """
    check_named(columns, options)
    finder = _Finder({column.name: column for column in columns if column.values}, options)
    user = finder.user()
    image = finder.image(task)
    vector = finder.vector(task)
    date, dates = finder.date()
    event = finder.id()
    answer = finder.answer(task.answer_field if task else None)
    questions = finder.questions([name for name in task.field_names if name != task.answer_field] if task else [])
    roles = sorted(finder.roles, key=lambda role: _ORDER.index(role.role))
    unused = [name for name, column in finder.free.items() if not column.is_nested]
    return FoundColumns(
        user, questions, answer, date, event, image, vector, dates, roles=tuple(roles), unused=tuple(unused)
    )


def check_named(columns: Sequence[Column], options: LogOptions) -> None:
    """Raise ConfigError unless the log has a column with values for each name in the options."""
    names = [column.name for column in columns if column.values]
    for name in options.named_columns:
        if name not in names:
            raise ConfigError(f"The log has no column {name!r} with values; {nearest(name, names)}")


class _Finder:
    """Finds one column after the other; `free` holds the columns without a meaning."""

    def __init__(self, columns: Mapping[str, Column], options: LogOptions) -> None:
        self.all, self.options, self.roles = columns, options, list[Role]()
        self.free = {name: column for name, column in columns.items() if not column.is_nested}

    def image(self, task: Task | None) -> str | None:
        counts = {name: column.pictures for name, column in self.all.items()}
        field = task.image_field if task else None
        return self._part("image", counts, named=self.options.image, task=task, field=field)

    def vector(self, task: Task | None) -> str | None:
        counts = {name: column.vectors for name, column in self.all.items()}
        field = task.vector_field if task else None
        return self._part("vector", counts, named=self.options.vector, task=task, field=field)

    def _part(
        self, role: str, counts: Mapping[str, int], *, named: str | None, task: Task | None, field: str | None
    ) -> str | None:
        """Return the column of the pictures or of the vectors, if there is one."""
        if named:
            self._check_part(role, counts, named=named, task=task, field=field)
            return self._take(role, named, f"{self.options.option(role)}; {counts[named]:,} of them")
        if task and not field:
            return None
        reserved = {*self.options.named_columns, *(each.columns[0] for each in self.roles)}
        among = [
            name for name, count in counts.items()
            if name not in reserved and count and count >= _MIN_PARTS * self.all[name].values
        ]  # fmt: skip
        if not among:
            return None
        if field in among:
            return self._take(role, field, "the run's task has this field")
        common = IMAGE_NAMES if role == "image" else VECTOR_NAMES
        name = self._choose(among, common, role=role)
        option = self.options.option(role)
        others = [other for other in among if other != name]
        also = f", not {self._quoted(others)} ({option} gives another)" if others else ""
        return self._take(role, name, f"{counts[name]:,} of its values are {_PARTS[role]}{also}")

    def _check_part(
        self, role: str, counts: Mapping[str, int], *, named: str, task: Task | None, field: str | None
    ) -> None:
        if task and not field:
            raise ConfigError(
                f"The run's task {task.name} has no {role}_field, so its items have none. Leave out "
                f"{self.options.option(role)}, or give a run that was trained on such items."
            )
        if not counts[named]:
            raise ConfigError(f"The column {named!r} holds no {_PARTS[role]}: expected {_PART_FORMS[role]}.")

    def user(self) -> str:
        name, reason = self.options.user, self.options.option("user")
        if name is None:
            name, reason = self._by_name(USER_NAMES, role="user")
        column = self.all[name]
        if column.distinct == len(column.texts):
            raise ConfigError(
                f"The column {name!r} was taken for the user, but no user has two rows, so no row has a history. Give "
                f"another column by {self.options.option('user')}. {self._listed()}"
            )
        return self._take("user", name, f"{reason}; {len(set(map(str.strip, column.texts))):,} different ones")

    def date(self) -> tuple[str | None, DateColumn | None]:
        options = self.options
        if options.no_date:
            self.roles.append(Role("date", (), f"{options.option('no-date')}: the rows count as in time order"))
            return None, None
        if options.date:
            dates = learn_dates(self.all[options.date].texts, formats=options.date_formats)
            self._check_dates(options.date, dates)
            return self._take("date", options.date, f"{options.option('date')}; {dates.describe()}"), dates
        reserved = {*options.named_columns}
        learned = {
            name: learn_dates(column.texts, formats=options.date_formats)
            for name, column in self.free.items()
            if name not in reserved and not _has_any(column.key, OTHER_DATE_WORDS)
        }
        named = {name for name in learned if rank_of(self.free[name].key, DATE_NAMES) is not None}
        readable = {
            name for name, dates in learned.items()
            if dates.readable >= _MIN_DATES and (name in named or not dates.is_numeric)
        }  # fmt: skip
        for name in sorted(named - readable) if not readable else ():
            if not self.free[name].is_text or _are_like_dates(self.free[name].texts):
                self._check_dates(name, learned[name])
        if not readable:
            self.roles.append(Role("date", (), "no column holds dates: the rows count as in time order"))
            return None, None
        name = self._choose(sorted(readable), DATE_NAMES, role="date")
        return self._take("date", name, learned[name].describe()), learned[name]

    def id(self) -> str | None:
        if self.options.id:
            return self._take("id", self.options.id, self.options.option("id"))
        reserved = {*self.options.named_columns}
        named = [name for name in self.free if name not in reserved and self.free[name].key in ID_NAMES]
        named.sort(key=lambda name: ID_NAMES.index(self.free[name].key))
        for name in named:
            column = self.free[name]
            if column.distinct > 0.5 * column.rows:
                return self._take("id", name, "by its name")
        return None

    def answer(self, field: str | None) -> str:
        if self.options.answer:
            return self._take("answer", self.options.answer, self.options.option("answer"))
        if field in self.free:
            return self._take("answer", field, "the run's task has this field")
        free = self._free_except(self.options.questions)
        if any(rank_of(column.key, ANSWER_NAMES) is not None for column in free.values()):
            return self._take("answer", *self._by_name(ANSWER_NAMES, role="answer", among=free))
        others = {name: column for name, column in free.items() if rank_of(column.key, QUESTION_NAMES) is None}
        short = [name for name, column in others.items() if not column.is_text]
        if len(short) == 1 and len(free) > 1:
            return self._take("answer", short[0], "the only other column of short values")
        raise self._unclear("answer")

    def questions(self, fields: Sequence[str]) -> tuple[str, ...]:
        if self.options.questions:
            return self._take_questions(self.options.questions, self.options.option("question"))
        if fields and all(name in self.free for name in fields):
            return self._take_questions(fields, "the run's task has these fields")
        named = [name for name, column in self.free.items() if rank_of(column.key, QUESTION_NAMES) is not None]
        if named:
            name, reason = self._by_name(QUESTION_NAMES, role="question")
            others = [other for other in self.free if other != name and self.free[other].is_text]
            option = self.options.option("question")
            more = f"; {self._quoted(others)} may be given too ({option} for each)" if others else ""
            return self._take_questions([name], reason + more)
        texts = [name for name, column in self.free.items() if column.is_text]
        if len(texts) == 1 or len(self.free) == 1:
            return self._take_questions(texts or list(self.free), "the only other column of texts")
        raise self._unclear("question")

    def _take(self, role: str, name: str, reason: str) -> str:
        self.free.pop(name, None)
        self.roles.append(Role(role, (name,), reason))
        return name

    def _take_questions(self, names: Sequence[str], reason: str) -> tuple[str, ...]:
        for name in names:
            self.free.pop(name, None)
        self.roles.append(Role("question", tuple(names), reason))
        return tuple(names)

    def _free_except(self, names: Collection[str]) -> dict[str, Column]:
        return {name: column for name, column in self.free.items() if name not in names}

    def _by_name(
        self, common: Sequence[str], *, role: str, among: Mapping[str, Column] | None = None
    ) -> tuple[str, str]:
        columns = self._free_except(self.options.named_columns) if among is None else among
        names = [name for name, column in columns.items() if rank_of(column.key, common) is not None]
        if not names:
            raise self._unclear(role)
        chosen = self._choose(names, common, role=role)
        others = [name for name in names if name != chosen and role != "question"]
        also = f", not {self._quoted(others)} ({self.options.option(role)} gives another)" if others else ""
        return chosen, f"by its name{also}"

    def _choose(self, names: Sequence[str], common: Sequence[str], *, role: str) -> str:
        """Return the column with the earliest common name; refuse a tie."""
        places = {name: rank_of(self.all[name].key, common) for name in names}
        ranks = {name: 2 * len(common) if place is None else place for name, place in places.items()}
        ranked = sorted(names, key=ranks.__getitem__)
        if len(ranked) > 1 and ranks[ranked[0]] == ranks[ranked[1]]:
            raise self._unclear(role, names)
        return ranked[0]

    def _check_dates(self, name: str, dates: DateColumn) -> None:
        option = self.options.option
        if dates.unclear:
            raise ConfigError(
                f"The column {name!r} has dates of the form {dates.unclear}, and no value shows whether the day or "
                f"the month comes first. Give {option('date-format')}, such as %d/%m/%Y or %m/%d/%Y."
            )
        if dates.readable < _MIN_DATES:
            raise ConfigError(
                f"Of the column {name!r}, {dates.readable:.0%} of the values are dates. Give their format by "
                f"{option('date-format')}, another column by {option('date')}, or {option('no-date')} if the rows are "
                f"in time order."
            )

    def _unclear(self, role: str, names: Sequence[str] = ()) -> ConfigError:
        listed = f" It may be {self._quoted(names)}." if names else ""
        return ConfigError(
            f"It is unclear which column is the {role}.{listed} Give it by {self.options.option(role, 'COLUMN')}. "
            f"{self._listed()}"
        )

    def _listed(self) -> str:
        shown = [column.describe() for column in self.all.values()][:_MAX_SHOWN]
        return f"The columns are {', '.join(shown)}."

    def _quoted(self, names: Sequence[str]) -> str:
        return ", ".join(repr(short_id(name)) for name in names)


def _are_like_dates(texts: Sequence[str]) -> bool:
    """Return True for values with a year and other numbers, such as `Jan 5 12:00 EST 2024`, which no form may fit."""
    return sum(map(_is_like_date, texts)) >= _MIN_DATES * len(texts)


def _is_like_date(text: str) -> bool:
    return len(text) <= _MAX_DATE_LENGTH and bool(_YEAR.search(text)) and len(re.findall(r"\d+", text)) >= 3


def _has_any(key: str, words: Sequence[str]) -> bool:
    return any(word in key for word in words)
