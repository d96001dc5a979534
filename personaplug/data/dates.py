"""Parse dates and times: ISO and similar forms, epoch times, and other forms by their `strptime` format."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta

from personaplug.data.values import Flaw, as_text, plain_value
from personaplug.errors import ConfigError

_EPOCH = datetime(1970, 1, 1)
_MAX_LENGTH = 64  # characters of a date; checked before any pattern is tried
_EXPECTED = "YYYY[-MM[-DD[ hh:mm:ss]]], YYYY/MM/DD, YYYYMMDD, or an epoch time of 9 or more digits"

# By the number of digits before the point. Each unit covers the years 1973 to 2286. Milliseconds start in 2001 because
# 12 digits may also be YYYYMMDDhhmm.
_UNITS_PER_SECOND = {9: 1, 10: 1, 13: 10**3, 15: 10**6, 16: 10**6, 18: 10**9, 19: 10**9}
_NUMBER = re.compile(r"(\d+)(?:\.(\d*))?", re.ASCII)
_WHOLE = re.compile(r"^(\d{4,19})\.0+$", re.ASCII)  # pandas writes the whole numbers of a column with gaps in this form
_CLOCK, _ZONE = r"(\d{1,2}[\d:.,]*)", r"(Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)"
_CALENDAR = re.compile(
    rf"(\d{{4}})(?:([-/.])(\d{{1,2}})(?:\2(\d{{1,2}})(?:(?: *T *| +){_CLOCK} *{_ZONE}?)?)?)?", re.ASCII | re.IGNORECASE
)
_COMPACT = re.compile(rf"(\d{{4}})(\d\d)(\d\d)(?:(?:T| +)?{_CLOCK} *{_ZONE}?)?", re.ASCII | re.IGNORECASE)
# Directives that strptime ignores unless the format also has one of the others.
_NEEDED = {"%I": ("%p",), "%U": ("%a", "%A", "%w"), "%W": ("%a", "%A", "%w"), "%d": ("%m", "%b", "%B", "%x", "%c")}
_YEAR_DIRECTIVES = re.compile(r"%[YyGcx]")


def as_datetime(value: object, what: str = "its 'date'", *, date_format: str | None = None) -> datetime:
    """Convert a date object, a text or a number to UTC without a time zone. A missing month or day is the first.

    Without `date_format`, a text begins with the year: `2024-01-05T12:00Z`, `2024/01/05`, `20240105`, `2024`. Eight
    digits are a day. Nine or more digits are an epoch time, and their number determines the unit.

    Args:
        date_format: the `strptime` format of a text; the forms above are then not tried.
    """
    value = plain_value(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, date) and value == value:  # pandas' NaT is a datetime that does not equal itself
        return _in_utc(value if isinstance(value, datetime) else datetime.combine(value, time.min), what)
    text = _WHOLE.sub(r"\1", as_text(value, what).strip())
    if not text:
        raise Flaw(f"{what} is empty")
    try:
        moment = datetime.strptime(_short(text), date_format) if date_format else _parse(_short(text))
    except _NoSuchDay:
        reason = "but is not a valid date in the order year, month, day. If the order differs, set date_format"
        raise Flaw(f"{what} has the form {shape_of(text)}, {reason}") from None
    except (ValueError, OverflowError):
        raise Flaw(_defect(what, text, date_format)) from None
    return _in_utc(moment, what)


def check_date_format(date_format: str) -> str:
    """Return a format if `strptime` accepts it and it contains the year; else raise ConfigError."""
    try:
        sample = datetime(2024, 1, 31, 13, 59, 58, tzinfo=UTC)
        parsed = datetime.strptime(sample.strftime(date_format), date_format)
    except (ValueError, re.error):
        parsed = None
    for directive, needed in _NEEDED.items():
        if parsed and directive in date_format and not any(one in date_format for one in needed):
            raise ConfigError(
                f"date_format {date_format[:40]!r}: {directive} has no effect without {' or '.join(needed)}. Add it."
            )
    if parsed is None or not _YEAR_DIRECTIVES.search(date_format):
        raise ConfigError(
            f"date_format should be a format of Python's strptime that includes the year, such as '%d.%m.%Y'; "
            f"found {date_format[:40]!r}."
        )
    return date_format


def shape_of(text: str) -> str:
    """Return the form of a text without the text: `05.01.2024` becomes `99.99.9999`, `Jan 5` becomes `Aaa 9`."""
    kinds = (("9", str.isdecimal), ("A", str.isupper), ("a", str.isalpha))
    shape = "".join(
        next((kind for kind, has_kind in kinds if has_kind(char)), char if char in " -/.:,+" else "?")
        for char in text[:24]
    )
    return shape + ("…" if len(text) > 24 else "")


def _short(text: str) -> str:
    if len(text) > _MAX_LENGTH:
        raise ValueError("too long for a date")
    return text


def _in_utc(moment: datetime, what: str) -> datetime:
    try:
        moment = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
        moment.date()
        return moment
    except (OverflowError, NotImplementedError, ValueError):  # pandas has years outside Python's range
        raise Flaw(f"{what} is outside the years 1 to 9999") from None


def _parse(text: str) -> datetime:
    number = _NUMBER.fullmatch(text)
    if number and len(number[1]) >= 9 and len(number[1]) != 14:
        return _from_epoch(number[1], number[2] or "0")
    if match := _COMPACT.fullmatch(text):
        year, month, day, clock, zone = match.groups()
    elif match := _CALENDAR.fullmatch(text):
        year, separator, month, day, clock, zone = match.groups()
        if separator == "." and day is None:
            raise ValueError("2024.1 is a number, not a month")
    else:
        raise ValueError("no date")
    clock = f"0{clock}" if clock and clock[1:2] == ":" else clock or "00:00"
    offset = zone if zone and zone[0] in "+-" else "+00:00" if zone else ""
    try:
        then = date(int(year), int(month or 1), int(day or 1))
    except ValueError:
        raise _NoSuchDay from None
    return datetime.fromisoformat(f"{then}T{clock}{offset}")


class _NoSuchDay(ValueError):
    """A day that the calendar does not have, such as 2024-02-30."""


def _from_epoch(units: str, fraction: str) -> datetime:
    per_second = _UNITS_PER_SECOND.get(len(units))
    if per_second is None:
        raise ValueError("no unit has this number of digits")
    microseconds = (int(units) * 10**6 + int(float(f"0.{fraction}") * 10**6)) // per_second
    return _EPOCH + timedelta(microseconds=microseconds)


def _defect(what: str, text: str, date_format: str | None) -> str:
    if date_format:
        return f"{what} has the form {shape_of(text)}, which does not match date_format {date_format!r}"
    return (
        f"{what} has the form {shape_of(text)}, expected {_EXPECTED}. "
        f"If the dates of a log have another form, set date_format, for example '%d.%m.%Y'"
    )
