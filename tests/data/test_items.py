"""One user's items in a file: every format, and every defect."""

from __future__ import annotations

import gzip
import json
import re
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from personaplug.data import LAMP_TASKS, read_items
from personaplug.data.records import HistoryItem
from personaplug.errors import MissingData, RecordError

TASK = LAMP_TASKS["LaMP_3"]
SECRET = "zanzibar"  # part of every user text; no error may contain it


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {"text": f"{SECRET} {number}", "score": number, **changes}


def as_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(values) + "\n" for values in records).encode()


def as_list(records: list[Any]) -> bytes:
    return json.dumps(records, indent=1).encode()


def put(folder: Path, content: bytes, name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def ids(path: Path) -> list[str]:
    return [item.id for item in read_items(path, task=TASK)]


@pytest.mark.parametrize("form", [as_lines, as_list])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_items_as_lines_or_list_plain_or_gzipped_are_equal(
    tmp_path: Path, form: Callable[[list[Any]], bytes], ending: str
) -> None:
    content = form([record(1, id="a", date="2015-06-01"), record(2, date="2014", id=7, other=[SECRET])])
    path = put(tmp_path, gzip.compress(content) if ending else content, f"items.jsonl{ending}")
    assert read_items(str(path), task=TASK) == (
        HistoryItem("7", (("text", f"{SECRET} 2"), ("score", "2")), "score", date(2014, 1, 1)),
        HistoryItem("a", (("text", f"{SECRET} 1"), ("score", "1")), "score", date(2015, 6, 1)),
    )


def test_item_without_id_gets_its_number(tmp_path: Path) -> None:
    first, last = as_lines([record(1), record(2, id=None)]), as_lines([record(3), record(4, id="x")])
    path = put(tmp_path, first + b"\n \n" + last)
    assert ids(path) == ["1", "2", "5", "x"]
    assert ids(put(tmp_path, as_list([record(1), record(2, id="x"), record(3)]))) == ["1", "x", "3"]


def test_items_of_one_day_are_sorted_by_time(tmp_path: Path) -> None:
    moments = ["2015-06-01 12:00:00", "2015-06-01T08:30:00Z", "2015-06-01"]
    assert ids(put(tmp_path, as_lines([record(1, date=moment) for moment in moments]))) == ["3", "2", "1"]


def test_items_with_a_missing_date_keep_file_order(tmp_path: Path) -> None:
    records = [record(1, date="2015-01-02"), record(2), record(3, date="2014-01-01")]
    assert ids(put(tmp_path, as_lines(records))) == ["1", "2", "3"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"\xef\xbb\xbf\n [ ]\n"])
@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_file_without_items_gives_empty_history(tmp_path: Path, content: bytes, name: str) -> None:
    packed = gzip.compress(content) if name.endswith(".gz") else content
    assert read_items(put(tmp_path, packed, name), task=TASK) == ()


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    assert ids(put(tmp_path, b"\xef\xbb\xbf" + as_lines([record(1)]))) == ["1"]


BROKEN: dict[str, tuple[Any, str]] = {
    "no object": ([SECRET], "it is not a JSON object"),
    "no field": ({"text": SECRET}, "its 'score' is missing"),
    "field of a wrong type": (record(3, text={"a": SECRET}), "its 'text' is an object"),
    "field null": (record(3, score=None), "its 'score' is null"),
    "blank id": (record(3, id=" "), "its 'id' is empty"),
    "id of a wrong type": (record(3, id=[SECRET]), "its 'id' is a list"),
    "bad date": (record(3, date=SECRET), "its 'date' has the form aaaaaaaa,"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_item_error_has_position_and_no_text(tmp_path: Path, name: str) -> None:
    broken, reason = BROKEN[name]
    for form, position in ((as_lines, "line 2"), (as_list, "item 2")):
        path = put(tmp_path, form([record(1), broken]))
        with pytest.raises(RecordError, match=re.escape(f"items.jsonl, {position}: {reason}")) as caught:
            read_items(path, task=TASK)
        assert (caught.value.file, caught.value.position) == (str(path), position)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "position"),
    [
        (as_lines([record(1)]) + b'\n{"text": "zanzibar', "line 3"),
        (as_lines([record(1)]) + b'{"text": "zanzibar\xff", "score": 1}', "line 2"),
        (as_lines([record(1)]) + as_list([record(2)]), "line 2"),
        (as_list([record(1)])[:-1], "after item 1"),
        (as_list([record(1)]) + b"zanzibar", "after item 1"),
        (b"zanzibar", "line 1"),
    ],
)
def test_broken_json_error_has_position(tmp_path: Path, content: bytes, position: str) -> None:
    with pytest.raises(RecordError, match="not valid JSON") as caught:
        read_items(put(tmp_path, content), task=TASK)
    assert caught.value.position == position
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("form", [as_lines, as_list])
def test_broken_gzip_is_reported(tmp_path: Path, form: Callable[[list[Any]], bytes]) -> None:
    packed = gzip.compress(form([record(number) for number in range(1, 200)]))
    for content in (packed[:-9], packed[:40], form([record(1)])):
        with pytest.raises(RecordError, match="gzip"):
            read_items(put(tmp_path, content, "items.jsonl.gz"), task=TASK)


def test_missing_file_is_reported(tmp_path: Path) -> None:
    for path in (tmp_path / "items.jsonl", tmp_path):
        with pytest.raises(MissingData, match="no file"):
            read_items(path, task=TASK)
