"""Dates: forms that are detected, forms that need a format, and values that are not dates."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaplug.data.dates import as_datetime, check_date_format, shape_of
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError

NOON = datetime(2024, 1, 5, 12)
EPOCH = 1_704_456_000


@pytest.mark.parametrize(
    "value",
    [
        NOON, NOON.replace(tzinfo=UTC), NOON.replace(hour=14, tzinfo=timezone(timedelta(hours=2))),
        np.datetime64("2024-01-05T12:00"), np.datetime64("2024-01-05T12:00:00.000000000"),
        EPOCH, float(EPOCH), str(EPOCH), f"{EPOCH}.0", Decimal(EPOCH), np.int64(EPOCH), np.uint32(EPOCH),
        EPOCH * 1000, f"{EPOCH}000", float(EPOCH * 1000), EPOCH * 10**6, EPOCH * 10**9, float(EPOCH * 10**9),
        "2024-01-05 12:00", "2024-01-05T12:00", "2024-1-5 12:00:00", "2024-01-05T12:00:00.000000000Z",
        "2024-01-05 12:00:00 UTC", "2024-01-05 12:00:00 GMT", "2024-01-05t12:00z", "2024-01-05T14:00:00+02:00",
        "2024-01-05 14:00:00 +0200", "2024-01-05T14:00+02", "2024-01-05 12:00:00,000", "2024-01-05   12:00",
        "2024/01/05 12:00", "2024/1/5 12:00:00", "2024.01.05 12:00", "20240105T120000Z", "20240105 12:00",
        "20240105120000", "20240105T1200", " 2024-01-05 12:00\n",
    ],
    ids=str,
)  # fmt: skip
def test_time_is_the_same_in_every_form(value: Any) -> None:
    assert as_datetime(value) == NOON


@pytest.mark.parametrize(
    "value", [date(2024, 1, 5), "2024-01-05", "2024/01/05", "2024.01.05", "20240105", 20240105, 20240105.0], ids=str
)
def test_day_begins_at_midnight(value: Any) -> None:
    assert as_datetime(value) == datetime(2024, 1, 5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024", datetime(2024, 1, 1)),
        (2024, datetime(2024, 1, 1)),
        ("2024-03", datetime(2024, 3, 1)),
        (978_300_760, datetime(2000, 12, 31, 22, 12, 40)),
        ("2024/1/5 9:05", datetime(2024, 1, 5, 9, 5)),
        ("20240105 9:05:07Z", datetime(2024, 1, 5, 9, 5, 7)),
        ("1704456000.25", datetime(2024, 1, 5, 12, 0, 0, 250_000)),
        ("1704456000123", datetime(2024, 1, 5, 12, 0, 0, 123_000)),
    ],
)
def test_years_months_and_epoch_times_are_read(value: Any, expected: datetime) -> None:
    assert as_datetime(value) == expected


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ("05.01.2024", "99.99.9999"), ("05/01/2024", "99/99/9999"), ("Jan 5, 2024", "Aaa 9, 9999"),
        ("12.2024", "99.9999"),
        ("2024.1", "9999.9"), ("2024-13-01", "9999-99-99"), ("2024-02-30", "9999-99-99"), ("202401", "999999"),
        ("20241301", "99999999"), (202401051230, "999999999999"), (17044, "99999"), (-EPOCH, "-9999999999"),
        ("2024-01-05 12:00 CET", "9999-99-99 99:99 AAA"), ("2024-01-05 25:00", "9999-99-99 99:99"),
        ("2024-01/05", "9999-99/99"), ("heute", "aaaaa"), ("9" * 70, "9" * 24 + "…"),
        ("2024-01-01" + " " * 32_000 + "\nx", "9999-99-99" + " " * 14 + "…"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_unknown_form_is_refused_and_shown_without_the_value(value: Any, shape: str) -> None:
    with pytest.raises(Flaw) as caught:
        as_datetime(value, "its 'when'")
    assert f"its 'when' has the form {shape}, " in str(caught.value)
    assert "date_format" in str(caught.value)


@pytest.mark.parametrize("value", [None, "", " ", True, [], float("nan"), np.datetime64("NaT"), "\ud800"])
def test_value_that_is_not_a_date_is_a_flaw(value: Any) -> None:
    with pytest.raises(Flaw, match="its 'date'"):
        as_datetime(value)


@pytest.mark.parametrize(
    ("text", "date_format"),
    [
        ("05.01.2024 12:00", "%d.%m.%Y %H:%M"),
        ("01/05/24 12 PM", "%m/%d/%y %I %p"),
        ("Jan 5, 2024, 12:00", "%b %d, %Y, %H:%M"),
        ("Fri, 05 Jan 2024 14:00:00 +0200", "%a, %d %b %Y %H:%M:%S %z"),
        (202401051200, "%Y%m%d%H%M"),
    ],
)
def test_date_format_is_used(text: Any, date_format: str) -> None:
    assert as_datetime(text, date_format=check_date_format(date_format)) == NOON
    with pytest.raises(Flaw, match=re.escape(f"which does not match date_format {date_format!r}")):
        as_datetime("2024", date_format=date_format)
    assert as_datetime(NOON, date_format=date_format) == NOON


@pytest.mark.parametrize("date_format", ["", "%d.%m.", "%Q", "dd.mm.yyyy", "%", "%Y %Y"])
def test_unusable_format_is_refused(date_format: str) -> None:
    with pytest.raises(ConfigError, match="strptime"):
        check_date_format(date_format)


@given(st.datetimes(min_value=datetime(2002, 1, 1), max_value=datetime(2200, 1, 1)))
def test_epoch_times_and_iso_agree(moment: datetime) -> None:
    second = moment.replace(microsecond=0)
    epoch = int(second.replace(tzinfo=UTC).timestamp())
    assert [as_datetime(value) for value in (epoch, epoch * 1000, second.isoformat(), str(second))] == [second] * 4
    assert as_datetime(f"{second:%Y%m%d}") == as_datetime(f"{second:%Y/%m/%d}") == as_datetime(second.date())


@given(st.one_of(st.text(), st.from_regex(r"\d{1,4}[-/. ]\d{1,4}.{0,20}", fullmatch=True), st.integers(), st.floats()))
def test_any_value_is_a_date_or_a_flaw(value: Any) -> None:
    with suppress(Flaw):
        assert as_datetime(value).tzinfo is None


@pytest.mark.parametrize("text", ["2024-01-01" + " " * 10**6 + "x", "9" * 10**6, "2024-01-01 " + ":" * 10**6])
def test_long_text_is_refused_at_once(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(Flaw):
        as_datetime(text)
    assert time.perf_counter() - start < 2


def test_shape_hides_every_letter_and_digit() -> None:
    assert shape_of("Żółw ٣ 漢 #x") == "Aaaa 9 a ?a"
