"""Joined, damaged and unusual logs are read correctly or refused with a clear error."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from personaplug.data.dates import as_datetime, check_date_format
from personaplug.data.event_log import ColumnMapping, EventLogReader
from personaplug.data.records import Sample
from personaplug.data.task_registry import parse_task
from personaplug.data.values import Flaw
from personaplug.errors import ConfigError, MissingData, RecordError

RATING = parse_task({
    "name": "films", "kind": "rating", "labels": ["1", "2", "3", "4", "5"], "item_fields": ["text"],
    "answer_field": "score", "query_after": "film: ",
})  # fmt: skip
TITLE = parse_task({"name": "titles", "kind": "text", "item_fields": ["text"], "answer_field": "title"})
COLUMNS: dict[str, Any] = {"user": "user", "fields": {"text": "text"}, "answer": "answer", "prompt": "film: {text}"}
DATED, UNDATED = ColumnMapping(**COLUMNS, date="when"), ColumnMapping(**COLUMNS)
HEADER = "user,text,answer,when\n"
LONG = "A long and slow café western about two brothers"


def _read(source: object, mapping: ColumnMapping = DATED, **options: Any) -> list[Sample]:
    return list(EventLogReader(source, mapping, options.pop("task", RATING), split="dev", **options))


def _rows(**second: Any) -> list[dict[str, Any]]:
    first = {"user": "ann", "text": "a", "answer": 3, "when": "2024-01-01"}
    return [first, {**first, "text": "b", "answer": 4, "when": "2024-01-02", **second}]


@pytest.mark.parametrize(
    "copy",
    [LONG.upper(), LONG.replace("é", "e\u0301"), LONG.replace("b", "\u200bb"), "\ufeff" + LONG, LONG.replace("w", "ｗ"),
     LONG.replace(" ", "\u00a0 ")],
    ids=["capitals", "decomposed letters", "zero width", "byte order mark", "full width", "blanks"],
)  # fmt: skip
def test_a_copy_in_another_form_is_left_out(copy: str) -> None:
    rows = [*_rows(), *_rows()]
    for row, text in zip(rows, ("first", LONG, "second", copy), strict=True):
        row["text"] = text
    rows[2]["when"], rows[3]["when"] = "2024-01-03", "2024-01-04"
    rows[3]["answer"] = rows[1]["answer"]
    (sample,) = _read(rows)
    assert (sample.query, len(sample.history)) == ("second", 2)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_repeated_header_in_a_joined_file_is_a_broken_row(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"{HEADER}ann,a,x,1\n{mark}{HEADER}ann,b,y,2\n", encoding="utf-8")
    with pytest.raises(RecordError, match="line 3: it repeats the header; files may have been joined"):
        _read(path, UNDATED, task=TITLE)
    (sample,) = _read(path, UNDATED, task=TITLE, skip_bad=1)
    assert (sample.user_id, sample.target) == ("ann", "y")


@pytest.mark.parametrize("sign", ["\ufeff", "\u200b", "\u2060"])
def test_id_with_an_invisible_character_is_refused(sign: str) -> None:
    with pytest.raises(RecordError, match=r"its 'user' contains the (byte order mark|invisible character) U\+"):
        _read(_rows(user=f"{sign}ann"))


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.json", "log.csv.gz"])
def test_gzip_data_under_another_name_is_refused(tmp_path: Path, name: str) -> None:
    packed = gzip.compress(HEADER.encode())
    path = tmp_path / name
    path.write_bytes(gzip.compress(packed) if name.endswith(".gz") else packed)
    with pytest.raises(RecordError, match=r"compressed twice|its name should end in"):
        _read(path)


def test_damaged_parquet_of_each_kind_is_a_record_error(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(_rows()), tmp_path / "log.parquet")
    whole = (tmp_path / "log.parquet").read_bytes()
    packed = gzip.compress(whole)
    damaged = [("a.parquet.gz", packed[:60] + bytes([packed[60] ^ 255]) + packed[61:]),
               ("b.parquet", whole.replace(b"answer", b"ans\xe9er"))]  # fmt: skip
    for name, content in damaged:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecordError, match="not valid Parquet"):
            _read(tmp_path / name)


def _moment(unit: str) -> Any:
    kind: Any = np.datetime64
    return kind("20000-01-02", unit)


@pytest.mark.parametrize("unit", ["s", "D"])
def test_years_beyond_9999_are_refused(unit: str) -> None:
    for moment in (_moment(unit), pd.Timestamp(np.datetime64("20000-01-02", "s"))):
        with pytest.raises(RecordError, match="its 'when'"):
            _read(_rows(when=moment))
    with pytest.raises(RecordError, match="its 'when' is outside the years 1 to 9999"):
        _read(pd.DataFrame({**pd.DataFrame(_rows()), "when": np.array(["2024", "20000"], dtype="datetime64[s]")}))


def test_whole_numbers_with_a_point_are_dates_also_as_text() -> None:
    assert as_datetime("20240105.0") == as_datetime(20240105.0) == as_datetime("20240105")
    assert as_datetime("1704067200.0") == as_datetime(1704067200.0)


def test_day_that_does_not_exist_is_refused() -> None:
    with pytest.raises(Flaw, match=r"the form 9999-99-99, but is not a valid date in the order year, month, day"):
        as_datetime("2024-02-30")


@pytest.mark.parametrize("form", ["%Y-%m-%d %I:%M", "%Y week %W", "%Y-%U", "%d of %Y"])
def test_date_format_with_parts_that_have_no_effect_is_refused(form: str) -> None:
    with pytest.raises(ConfigError, match="has no effect without"):
        check_date_format(form)
    for whole in ("%Y-%m-%d %I:%M %p", "%Y %W %a", "%d %b %Y", "%Y %j"):
        assert check_date_format(whole) == whole


def test_iterable_for_a_single_pass_can_be_read_twice() -> None:
    class Spent:
        def __init__(self) -> None:
            self.rows: Iterator[dict[str, Any]] = iter(_rows())

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return self.rows

    reader = EventLogReader(Spent(), DATED, RATING, split="dev")
    assert len(list(reader)) == len(list(reader)) == 1


def test_columns_in_the_index_of_a_data_frame_are_found() -> None:
    (sample,) = _read(pd.DataFrame(_rows()).set_index(["user", "text"]))
    assert (sample.user_id, sample.query) == ("ann", "b")


def test_error_of_a_duplicate_column_suggests_no_other_column(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,user,text,answer,when\n")
    with pytest.raises(ConfigError, match=r"has 2 columns 'user'\. Its"):
        _read(tmp_path / "log.csv")


def test_an_empty_json_file_holds_no_records(tmp_path: Path) -> None:
    for name, content in (("a.json", b""), ("b.json.gz", gzip.compress(b" \n"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MissingData, match="It holds no records"):
            _read(tmp_path / name)
