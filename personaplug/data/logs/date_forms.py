"""Read the dates of a column in mixed forms: learn from all values whether the day or the month comes first.

05/01/2024 is ambiguous, but 25/01/2024 in the same column settles the order. Points need no such date, because no
country writes the month first before a point.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from personaplug.data.dates import as_datetime, check_date_format, shape_of
from personaplug.data.values import Flaw

_MAX_LENGTH = 64
_MAX_CONTRADICTIONS = 0.02  # share of the unambiguous dates with the rarer order; they stay unreadable
_MAX_SHOWN_FORMS = 4
_CLOCK = (
    r"(?:(?:,? +|T)(\d{1,2})[:.](\d\d)(?:[:.](\d\d(?:\.\d+)?))?(?: ?([ap])\.?m\.?)?(?: *(Z|UTC|GMT|[+-]\d\d:?\d\d))?)?"
)
_NUMBERS = re.compile(rf"(\d{{1,2}})([./-])(\d{{1,2}})\2(\d{{4}}|\d\d){_CLOCK}", re.ASCII | re.IGNORECASE)
_WEEKDAY = r"(?:[a-z]{3,9},? +)?"
_DAY_NAME = re.compile(
    rf"{_WEEKDAY}(\d{{1,2}})(?:st|nd|rd|th|\.)?[ -]([a-z]{{3,9}})\.?,?[ -](\d{{4}}){_CLOCK}", re.IGNORECASE
)
_NAME_DAY = re.compile(rf"{_WEEKDAY}([a-z]{{3,9}})\.? (\d{{1,2}})(?:st|nd|rd|th)?,? (\d{{4}}){_CLOCK}", re.IGNORECASE)
_YEAR_LAST = re.compile(  # as C's asctime writes it, and exports of tweets
    rf"{_WEEKDAY}([a-z]{{3}}) (\d{{1,2}}) (\d\d):(\d\d):(\d\d)(?: (Z|UTC|GMT|[+-]\d\d:?\d\d))? (\d{{4}})", re.IGNORECASE
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


@dataclass(frozen=True)
class DateForms:
    """How the dates of a column are read.

    Attributes:
        formats: formats of `strptime`, which are tried first.
        day_first: by separator, True if the day comes before the month. A separator of unknown order is missing.
    """

    formats: tuple[str, ...]
    day_first: dict[str, bool]

    def read(self, text: str) -> datetime | None:
        """Return a date in UTC; None if it cannot be read."""
        text = " ".join(text.split())
        if not text or len(text) > _MAX_LENGTH:
            return None
        for one in self.formats:
            try:
                return as_datetime(text, date_format=one)
            except Flaw:
                continue
        try:
            return as_datetime(text)
        except Flaw:
            return self._read_local(text)

    def _read_local(self, text: str) -> datetime | None:
        if match := _NUMBERS.fullmatch(text):
            first, separator, second, year, *clock = match.groups()
            if separator not in self.day_first or (len(year) == 2 and separator == "-"):
                return None
            day, month = (first, second) if self.day_first[separator] else (second, first)
            return _moment(year, month, day, clock)
        if match := _DAY_NAME.fullmatch(text):
            day, name, year, *clock = match.groups()
        elif match := _NAME_DAY.fullmatch(text):
            name, day, year, *clock = match.groups()
        elif match := _YEAR_LAST.fullmatch(text):
            name, day, hour, minute, second, zone, year = match.groups()
            clock = [hour, minute, second, None, zone]
        else:
            return None
        month = name.lower()[:3]
        return _moment(year, str(_MONTHS.index(month) + 1), day, clock) if month in _MONTHS else None


@dataclass(frozen=True)
class DateColumn:
    """The dates of a column.

    Attributes:
        readable: the share of dates among the values.
        shapes: forms of readable values, most frequent first.
        unclear: the form of a value whose order of day and month is unknown; "" if no value is ambiguous.
        is_numeric: True if all readable values are numbers, such as epoch times or years.
    """

    forms: DateForms
    readable: float
    shapes: tuple[str, ...]
    unclear: str
    is_numeric: bool

    def describe(self) -> str:
        more = " | …" if len(self.shapes) > _MAX_SHOWN_FORMS else ""
        listed = " | ".join(self.shapes[:_MAX_SHOWN_FORMS]) + more  # a form may hold a comma
        forms = "the form" if len(self.shapes) == 1 else f"{len(self.shapes)} forms:"
        return f"{self.readable:.0%} of its values are dates, in {forms} {listed}"


def learn_dates(texts: Sequence[str], *, formats: Sequence[str] = ()) -> DateColumn:
    """Learn how the dates of a column are read from its values."""
    forms = DateForms(tuple(map(check_date_format, formats)), _orders(texts))
    shapes, is_numeric, unclear = Counter[str](), True, ""
    for text in texts:
        if forms.read(text) is not None:
            shapes[_shape(text)] += 1
            is_numeric = is_numeric and text.strip().replace(".", "", 1).isdecimal()
        elif not unclear and (match := _NUMBERS.fullmatch(text.strip())) and match[2] not in forms.day_first:
            unclear = _shape(text)
    readable = shapes.total() / len(texts) if texts else 0.0
    return DateColumn(forms, readable, tuple(shape for shape, _ in shapes.most_common()), unclear, is_numeric)


def _shape(text: str) -> str:
    """Return the form of a date. One digit and two digits have the same form."""
    return re.sub(r"(?<!9)9(?!9)", "99", shape_of(" ".join(text.split())))


def _orders(texts: Iterable[str]) -> dict[str, bool]:
    """Return by separator whether the day comes first, if unambiguous dates show the order."""
    counts: dict[str, Counter[bool]] = {}
    for text in texts:
        if match := _NUMBERS.fullmatch(text.strip()):
            first, second = int(match[1]), int(match[3])
            evidence = counts.setdefault(match[2], Counter())
            if (first > 12) != (second > 12):
                evidence[first > 12] += 1
    orders = {}
    for separator, evidence in counts.items():
        rarer = min(evidence[True], evidence[False])
        if evidence.total() and rarer <= _MAX_CONTRADICTIONS * evidence.total():
            orders[separator] = evidence[True] > evidence[False]
        elif not evidence.total() and separator == ".":
            orders[separator] = True
    return orders


def _moment(year: str, month: str, day: str, clock: Sequence[str | None]) -> datetime | None:
    hour, minute, second, half, zone = clock
    if len(year) == 2:
        year = f"{'20' if int(year) < 69 else '19'}{year}"  # as POSIX does
    text = f"{year}-{int(month):02}-{int(day):02}"
    if hour is not None:
        hours = int(hour)
        if half:
            hours = hours % 12 + (12 if half.lower() == "p" else 0)
        text += f"T{hours:02}:{minute}:{second or '00'}{zone or ''}"
    try:
        return as_datetime(text)
    except Flaw:
        return None
