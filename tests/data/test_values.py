"""Texts, numbers and ids: a value has the same meaning in every container."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaplug.data.ids import MAX_ID_LENGTH, as_id, short_id
from personaplug.data.numbers import as_number, number_or_none
from personaplug.data.parsing import field_of, item_of, target_of
from personaplug.data.task import Task
from personaplug.data.values import Flaw, as_text

STARS = Task("Stars", "rating", ("text",), "score", ("mae",), ("1", "2", "3", "4", "4.5", "5"))
TEXTS = Task("Texts", "text", ("text",), "title", ("rouge_1",))


def short_repr(value: object) -> str:
    return "many digits" if isinstance(value, int) and abs(value) > 10**40 else ascii(value)[:30]


FOUR: list[Any] = [
    4, 4.0, "4", " 4 ", "4.0", "4,0", "4,00", "+4", "4.", "4e0", "٤", Decimal("4.00"), Decimal("4E+0"),
    np.int8(4), np.uint64(4), np.float16(4), np.float32(4), np.array(4)[()], b"4,0",
]  # fmt: skip


@pytest.mark.parametrize("value", FOUR, ids=repr)
def test_rating_is_the_same_in_every_form(value: Any) -> None:
    assert as_number(value, "it") == 4
    assert field_of(STARS, {"score": value}, "score") == "4"
    assert target_of(STARS, as_text(value, "it")) == "4"


@pytest.mark.parametrize("value", [4.5, "4,5", "4.50", np.float32(4.5), Decimal("4.5")], ids=repr)
def test_rating_between_whole_numbers_is_its_label(value: Any) -> None:
    assert item_of(STARS, {"id": 1, "text": "x", "score": value})[1].answer == "4.5"


def test_number_in_single_precision_keeps_its_digits() -> None:
    assert as_text(np.float32(4.1), "it") == "4.1"
    assert target_of(Task("T", "rating", ("text",), "s", ("mae",), ("4.0", "4.1")), "4.099999904632568") == "4.1"


@pytest.mark.parametrize(
    "value", ["", " ", "four", "4 stars", "4/5", "1,234.5", "1.2.3", "4_0", "0x4", "nan", "inf", "-Infinity", "1e999",
              "9" * 5000, math.nan, math.inf, Decimal("NaN"), Decimal("Infinity"), True, np.bool_(True), None, [], {}],
)  # fmt: skip
def test_value_that_is_not_a_number_is_refused(value: Any) -> None:
    assert number_or_none(value) is None
    with pytest.raises(Flaw, match="it is"):
        as_number(value, "it")
    with pytest.raises(Flaw):
        target_of(STARS, as_text(value, "it"))


def test_answer_that_is_not_a_label_is_unchanged() -> None:
    assert field_of(STARS, {"score": "9,0"}, "score") == "9,0"
    assert field_of(TEXTS, {"title": "4,0"}, "title") == "4,0"


def test_null_is_an_empty_text_but_not_a_label() -> None:
    assert (field_of(STARS, {"text": None}, "text"), field_of(TEXTS, {"title": None}, "title")) == ("", "")
    with pytest.raises(Flaw, match="its 'score' is null"):
        field_of(STARS, {"score": None}, "score")


@given(
    st.one_of(
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.decimals(allow_nan=False, allow_infinity=False),
    )
)
def test_text_of_a_number_has_the_same_value(value: float | Decimal) -> None:
    text = as_text(value, "it")
    assert Decimal(text) == (Decimal(repr(value)) if isinstance(value, float) else value)
    assert not text.endswith(".0")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10**400, str(10**400)),
        (2**63, "9223372036854775808"),
        (-0.0, "0"),
        (1e300, "1e+300"),
        (Decimal("-0.00"), "0"),
        (Decimal("0.10"), "0.1"),
        (Decimal(10**30), str(10**30)),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        ("é".encode(), "é"),
        (dt.date(2024, 1, 5), "2024-01-05"),
        (np.datetime64("2024-01-05T12:00:00.000000001"), "2024-01-05T12:00:00"),
        (np.str_("x"), "x"),
    ],
    ids=short_repr,
)
def test_other_values_are_converted_to_text(value: Any, text: str) -> None:
    assert as_text(value, "it") == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"\xff\xfe", "it is 2 bytes that are not valid UTF-8"),
        (10**5000, "it is a number with more than 4,300 digits"),
        (Decimal("1e5000"), "it is a number with more than 4,300 digits"),
        (Decimal("1e-5000"), "it is a number with more than 4,300 digits"),
        (dt.timedelta(1), "it is a value of type timedelta"),
        (np.array([1]), "it is a list"),
        (np.datetime64("NaT"), "it is null"),
        (1j, "it is a value of type complex"),
    ],
    ids=short_repr,
)
def test_value_that_cannot_become_text_is_described(value: Any, message: str) -> None:
    with pytest.raises(Flaw, match=message):
        as_text(value, "it")


# ---- ids


@pytest.mark.parametrize("value", [7, 7.0, "7", Decimal("7.00"), np.int64(7), np.float64(7), b"7"], ids=repr)
def test_id_is_the_same_in_every_form(value: Any) -> None:
    assert as_id(value, "it") == "7"


@pytest.mark.parametrize(
    "value", ["a", " a ", "007", "7.0", "Jürgen", "a/b", "..", "👩‍👩‍👧", "می‌خواهم", "x" * MAX_ID_LENGTH], ids=ascii
)
def test_text_id_is_unchanged(value: str) -> None:
    assert as_id(value, "it") == value


@pytest.mark.parametrize("value", [2**63, 2**64, 10**254, -(2**63)], ids=lambda value: f"{value:.0e}")
def test_id_of_many_digits_is_unchanged(value: int) -> None:
    assert as_id(value, "it") == str(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "is empty"), (" \t", "is empty"), (None, "is null"), (True, "is true or false"), ([7], "is a list"),
        ("x" * 256, "has 256 characters"), (10**400, "has 401 characters"), (math.nan, "not a finite number"),
        (float(2**53), "which is not exact"), (1.7e18, "which is not exact"), (np.float64(2**60), "which is not exact"),
        ("a\0b", "U+0000"), ("a\nb", "the control character U+000A"), ("a\x7f", "U+007F"), ("a\x85", "U+0085"),
        ("a\u2028", "U+2028"), ("a\u202e", "the control character U+202E"), ("a\u2066", "U+2066"),
        ("a\u200f", "U+200F"), ("a\u061c", "U+061C"),
        ("J\ufffdrgen", "the replacement character U+FFFD"), ("a\ud800", "is not valid Unicode"),
        (b"J\xfcrgen", "not valid UTF-8"),
    ],
    ids=short_repr,
)  # fmt: skip
def test_invalid_id_is_refused_without_showing_it(value: Any, message: str) -> None:
    with pytest.raises(Flaw) as caught:
        as_id(value, "its 'id'")
    assert message in str(caught.value)
    assert "rgen" not in str(caught.value)


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.binary(), st.booleans()))
def test_any_value_is_a_valid_id_or_a_flaw(value: Any) -> None:
    try:
        text = as_id(value, "it")
    except Flaw:
        return
    assert as_id(text, "it") == text
    assert 0 < len(text) <= MAX_ID_LENGTH
    text.encode()


def test_short_id_shows_no_control_character() -> None:
    assert short_id("a\u202eb\0c\n d") == "a?b?c d"
    assert short_id("x" * 41) == f"{'x' * 12}… of 41 characters"
