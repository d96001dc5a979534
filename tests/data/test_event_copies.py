"""Copies of events are left out and counted, repeated events stay, and no history reveals its answer."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaplug.data.event_copies import MAX_DISTANCE, MIN_LENGTH, event_of, find_copies
from personaplug.data.event_log import ColumnMapping, EventLogReader
from personaplug.data.records import Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData

SECRET = "zanzibar"
TASK = Task("Stars", "rating", ("text",), "score", ("mae",), ("1", "2", "3", "4", "5"), "title: ")
MAPPING = ColumnMapping("who", {"text": "title"}, "stars", "Stars? title: {text}", "event", "when")
UNDATED = replace(MAPPING, date=None, id=None)
START = datetime(2024, 1, 1)
LONG = f"{SECRET} is a text of forty characters and more"


def row(number: int, title: str = "", *, hours: float | None = None, **changes: Any) -> dict[str, Any]:
    moment = START + timedelta(hours=24 * number if hours is None else hours)
    title = title or f"{SECRET} {number}"
    return {"event": f"e{number}", "who": "ann", "title": title, "stars": 3, "when": str(moment), **changes}


def reader_of(rows: list[dict[str, Any]], mapping: ColumnMapping = MAPPING, **settings: Any) -> EventLogReader:
    return EventLogReader(rows, mapping, TASK, **{"split": "dev", "dev_queries": 99, **settings})


def assert_no_answer_in_its_history(samples: list[Sample]) -> None:
    for sample in samples:
        assert all((item.content, item.answer) != (f"text: {sample.query}", sample.target) for item in sample.history)


ARRIVALS: dict[str, tuple[ColumnMapping, dict[str, Any]]] = {
    "same row": (MAPPING, row(2)),
    "same id later": (MAPPING, row(2, hours=999)),
    "other id, same time": (MAPPING, row(2, event="x")),
    "a second later": (MAPPING, row(2, event="x", hours=48 + 1 / 3600)),
    "an hour later": (MAPPING, row(2, event="x", hours=49)),
    "a second earlier": (MAPPING, row(2, event="x", hours=48 - 1 / 3600)),
    "with other blanks": (MAPPING, row(2, f" {SECRET}  2\n", event="x")),
    "with a decimal": (MAPPING, row(2, event="x", stars="3,0")),
    "no dates": (UNDATED, row(2, event="x")),
    "no dates, with ids": (replace(MAPPING, date=None), row(2, event="x")),
}


@pytest.mark.parametrize("name", ARRIVALS)
def test_event_that_arrives_twice_counts_once(name: str) -> None:
    mapping, copy = ARRIVALS[name]
    expected = list(reader_of([row(1), row(2), row(3)], mapping))
    for rows in ([row(1), row(2), copy, row(3)], [row(1), row(2), row(3), copy], [copy, row(1), row(2), row(3)]):
        reader = reader_of(rows, mapping)
        samples = list(reader)
        assert_no_answer_in_its_history(samples)
        assert reader.report.copies == 1
        assert len(samples) == len(expected)


def test_log_that_is_imported_twice_gives_the_same_samples(tmp_path: Path) -> None:
    rows = [row(number) for number in range(1, 9)]
    for mapping in (MAPPING, UNDATED):
        assert list(reader_of(rows * 2, mapping)) == list(reader_of(rows, mapping))
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows * 2))
    reader = EventLogReader(path, MAPPING, TASK)
    list(reader)
    assert reader.report.copies == 8


def test_repeated_long_text_is_a_copy_at_any_time() -> None:
    reader = reader_of([row(1, LONG), row(2), row(90, LONG)])
    assert [sample.id for sample in reader] == ["e2"]
    assert reader.report.copies == 1


@pytest.mark.parametrize(
    "other",
    [row(9, "yes", hours=26), row(9, "yes", hours=24.5, stars=4), row(9, "yes", hours=24.5, who="bob"),
     row(9, "no", hours=24)],
    ids=["later", "other answer", "other user", "other text"],
)  # fmt: skip
def test_repeated_event_stays(other: dict[str, Any]) -> None:
    reader = reader_of([row(1, "yes"), other, row(3, "else")], min_history=0)
    assert len(list(reader)) == 3
    assert reader.report.copies == 0


def test_chain_of_copies_is_one_event() -> None:
    reader = reader_of([row(number, "yes", hours=number * 0.9) for number in range(9)], min_history=0)
    assert len(list(reader)) == 1


def test_undated_copies_with_different_answers_are_not_samples() -> None:
    rows = [row(1, "mood"), row(2, "mood", stars=1), row(3, "mood"), row(4, "else"), row(5, "mood", stars=1)]
    reader = reader_of(rows, UNDATED)
    (sample,) = reader
    assert (sample.query, len(sample.history)) == ("else", 2)
    assert (reader.report.copies, reader.report.unclear) == (2, 1)
    assert len(list(reader_of(rows))) == 4  # with dates, each row is a separate event


def test_different_answers_without_copies_are_samples() -> None:
    assert len(list(reader_of([row(1, "mood"), row(2, "mood", stars=1)], UNDATED))) == 1


def test_rows_that_share_an_id_and_differ_are_broken() -> None:
    for change in ({"stars": 4}, {"title": "else"}, {"who": "bob"}):
        with pytest.raises(Exception, match="an earlier record has the same id"):
            list(reader_of([row(1), row(2), row(2, **change)]))


event_lists = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", LONG]), st.sampled_from("xy"), st.one_of(st.none(), st.integers(0, 500))
    ),
    max_size=12,
)  # fmt: skip


@given(event_lists, st.booleans())
def test_remaining_events_have_no_copy_and_lose_no_answer(rows: list[tuple[str, str, int | None]], dated: bool) -> None:
    events = [
        event_of([content], answer, START + timedelta(minutes=minute or 0) if dated else None)
        for content, answer, minute in rows
    ]
    events.sort(key=lambda event: event.moment or START)
    copies = find_copies(events)
    originals = [event for index, event in enumerate(events) if index not in copies.copies]
    assert {(event.content, event.answer) for event in originals} == {(event.content, event.answer) for event in events}
    assert not copies.copies & copies.unclear
    for later, event in enumerate(originals):
        for old in originals[:later]:
            if (old.content, old.answer) == (event.content, event.answer):
                assert event.moment
                assert old.moment
                assert event.moment - old.moment > MAX_DISTANCE
                assert event.length < MIN_LENGTH


# ---- logs without samples, and the report


def test_rows_of_a_user_at_one_time_are_an_error_with_the_reason() -> None:
    rows = [row(number, hours=0) for number in range(5)]
    with pytest.raises(MissingData) as caught:
        list(reader_of(rows))
    assert "0 samples, 0 items of history, from 5 rows" in str(caught.value)
    assert "5 rows left out because their history is too short" in str(caught.value)
    assert "needs min_history=1 rows of its user at earlier times" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "It holds no records"),
        ([row(1, stars=SECRET), row(2, stars=None)], {"skip_bad": 2}, "2 broken records skipped.*row 1: its answer is"),
        (
            [row(1), row(2), row(3)],
            {"min_history": 3},
            "3 rows left out because their history is too short.*min_history=3",
        ),
        ([row(1), row(2, who="bob")], {"split": "train", "dev_queries": 1}, "'train' asks for each user's rows before"),
        (
            [row(1, "a"), row(2, "a", stars=2), row(3, "a")],
            {"mapping": UNDATED},
            "1 rows left out because their copies have",
        ),
    ],
    ids=["empty", "all broken", "min_history", "one row each", "unclear"],
)
def test_log_without_samples_is_an_error_with_the_reason(
    rows: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MissingData, match=message) as caught:
        list(reader_of(rows, **settings))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.tsv"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_file_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(MissingData, match=f"{name} yields no samples. It holds no records"):
        list(EventLogReader(tmp_path / name, MAPPING, TASK))


def test_file_with_only_a_header_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("event,who,title,stars,when\n")
    with pytest.raises(MissingData, match="It holds no records"):
        list(EventLogReader(tmp_path / "log.csv", MAPPING, TASK))


def test_report_counts_everything_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(1), row(2), row(2), row(3), row(4, stars="x"), row(5), row(6, who="bob")]
    reader = reader_of(rows, skip_bad=1, max_history=1)
    with caplog.at_level(logging.INFO, logger="personaplug"):
        samples = list(reader)
        assert list(reader) == samples
    assert [record.getMessage() for record in caplog.records] == [
        "the list, split dev: 3 samples, 3 items of history, from 7 rows of 2 users; 1 broken records skipped; "
        "1 copies of earlier events left out; 2 rows left out because their history is too short; 3 items beyond "
        "max_history left out"
    ]
    assert (reader.report.rows, reader.report.users, reader.report.copies) == (7, 2, 1)


# ---- formats of dates


def test_date_format_of_the_mapping_is_used() -> None:
    rows = [row(1, when="01.02.2024"), row(2, when="02.01.2024")]
    (sample,) = reader_of(rows, replace(MAPPING, date_format="%d.%m.%Y"))
    assert sample.id == "e1"
    with pytest.raises(Exception, match=r"row 1: its 'when' has the form 99\.99\.9999, .*set date_format"):
        list(reader_of(rows))
    with pytest.raises(ConfigError, match="date_format should be"):
        replace(MAPPING, date_format="dd.mm.yyyy")
