"""A log gives equal samples in every container, and a value that a container cannot express is a clear error."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import numpy as np
import pytest

from personaplug.data.event_log import ColumnMapping, EventLogReader
from personaplug.data.logs.log import read_log
from personaplug.data.logs.options import LogOptions
from personaplug.data.records import Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, RecordError

SECRET = "zanzibar"
TASK = Task("Stars", "rating", ("text", "more"), "score", ("mae",), ("1", "2", "3", "4", "4.5", "5"), "title: ")
MAPPING = ColumnMapping(
    user="who",
    fields={"text": "title", "more": "note"},
    answer="stars",
    prompt="Stars? title: {text}",
    date="when",
)
COLUMNS = ("who", "title", "note", "stars", "when")
ROWS: list[dict[str, Any]] = [
    {"who": "ann", "title": f'{SECRET} "one", b;\tc|d', "note": None, "stars": 4.0, "when": "2024-01-05 12:00:00"},
    {"who": 7, "title": "é 😀\nsecond line", "note": "x", "stars": 4.5, "when": "2024-01-05 12:00:00"},
    {"who": "ann", "title": "b" * 200_000, "note": None, "stars": 1, "when": "2024-02-05 12:00:00"},
    {"who": 7, "title": "c", "note": "", "stars": 5.0, "when": "2024-02-05 12:00:00"},
]  # fmt: skip


def read(source: object, mapping: ColumnMapping = MAPPING, **settings: Any) -> list[Sample]:
    return list(EventLogReader(source, mapping, TASK, **{"split": "dev", **settings}))


@pytest.fixture(scope="module")
def expected() -> list[Sample]:
    samples = read(ROWS)
    assert [(each.user_id, each.target, len(each.history)) for each in samples] == [("ann", "1", 1), ("7", "5", 1)]
    assert [item.answer for each in samples for item in each.history] == ["4", "4.5"]
    assert samples[0].history[0].fields[1] == ("more", "")
    return samples


def delimited(rows: list[dict[str, Any]], delimiter: str, *, end: str = "\r\n") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def with_numbers(change: Callable[[Any], Any]) -> list[dict[str, Any]]:
    return [{**row, "stars": change(row["stars"])} for row in ROWS]


FILES: dict[str, Callable[[], bytes]] = {
    "log.jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "log.ndjson": lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "list.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "lines.json": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "utf16.jsonl": lambda: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode("utf-16"),
    "utf16.json": lambda: json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "comma.csv": lambda: delimited(ROWS, ",").encode(),
    "semicolon.csv": lambda: delimited(with_numbers(lambda stars: str(stars).replace(".", ",")), ";").encode(),
    "excel.csv": lambda: ("sep=;\r\n" + delimited(ROWS, ";")).encode("utf-8-sig"),
    "unicode text.txt": lambda: delimited(ROWS, "\t").encode("utf-16"),
    "tabs.tsv": lambda: delimited(ROWS, "\t", end="\n").encode(),
    "bars.csv": lambda: ("\n" + delimited(ROWS, "|", end="\n")).encode(),
    "old mac.csv": lambda: delimited(ROWS, ",").replace("\r\n", "\r").encode(),
    "spaces.csv": lambda: delimited(ROWS, ",").replace(",title", ", title").encode(),
    "floats.csv": lambda: delimited(with_numbers(lambda stars: f"{stars:.2f}"), ",").encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_each_kind_gives_equal_samples(tmp_path: Path, name: str, expected: list[Sample]) -> None:
    content = FILES[name]()
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == expected
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert read(str(tmp_path / f"{name}.gz")) == expected


def stream() -> Iterator[dict[str, Any]]:
    yield from ROWS


class Rows:
    """Rows that can be iterated more than once, like a Hugging Face Dataset."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return stream()


def test_rows_in_memory_give_equal_samples(expected: list[Sample]) -> None:
    for source in (tuple(ROWS), Rows(), stream()):
        reader = EventLogReader(source, MAPPING, TASK, split="dev")
        assert list(reader) == expected
        assert list(reader) == expected  # even for an iterator, which yields its rows once


def test_dataframe_of_pandas_gives_equal_samples(expected: list[Sample]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert read(frame) == expected
    frame["who"] = frame["who"].astype(str).astype("category")
    frame["when"] = pandas.to_datetime(frame["when"])
    frame["note"] = frame["note"].astype("string")
    frame["stars"] = frame["stars"].astype("float32")
    frame["unused"] = float("nan")
    assert read(frame) == expected
    frame["when"] = frame["when"].dt.tz_localize("UTC")
    assert read(frame.set_index("who", drop=False)) == expected
    by_number = ColumnMapping("0", {"text": "1", "more": "2"}, "3", "Stars? title: {text}", date="4")
    assert read(frame[list(COLUMNS)].set_axis(range(5), axis=1), by_number) == expected
    with pytest.raises(ConfigError, match="the DataFrame has no column 'star'; did you mean 'stars'"):
        read(frame, replace(MAPPING, answer="star"))


def test_missing_date_of_pandas_is_a_broken_row() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    frame["when"] = pandas.to_datetime(frame["when"])
    frame.loc[1, "when"] = pandas.NaT
    with pytest.raises(RecordError, match="the DataFrame, row 2: its 'when' is null"):
        read(frame)


def test_dataframe_of_polars_gives_equal_samples(expected: list[Sample]) -> None:
    polars = pytest.importorskip("polars")
    rows = [{**row, "who": str(row["who"]), "stars": float(row["stars"])} for row in ROWS]
    frame = polars.DataFrame(rows)
    assert read(frame) == expected
    typed = frame.with_columns(
        polars.col("when").str.to_datetime(),
        polars.col("who").cast(polars.Categorical),
        polars.col("stars").cast(polars.Decimal(4, 2)),
    )
    assert read(typed) == expected
    with pytest.raises(ConfigError, match="did you mean 'stars'"):
        read(typed, replace(MAPPING, answer="star"))


def parquet_file(folder: Path, table: Any, name: str = "log.parquet") -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table, folder / name)
    return folder / name


def test_parquet_of_every_type_gives_equal_samples(tmp_path: Path, expected: list[Sample]) -> None:
    dataset = pytest.importorskip("pyarrow.dataset")
    pa = pytest.importorskip("pyarrow")
    users, titles = [str(row["who"]) for row in ROWS], [row["title"] for row in ROWS]
    stars, floats = [Decimal(str(row["stars"])) for row in ROWS], [float(row["stars"]) for row in ROWS]
    times = [datetime.fromisoformat(row["when"]) for row in ROWS]
    epoch = [int(moment.replace(tzinfo=UTC).timestamp()) for moment in times]
    categories = pa.array(users).dictionary_encode()
    variants: list[tuple[Any, Any, Any]] = [
        (categories, pa.array(stars, pa.decimal128(5, 2)), pa.array(times, pa.timestamp("ns"))),
        (pa.array(users, pa.large_string()), pa.array(stars, pa.decimal256(50, 2)), pa.array(epoch)),
        (
            pa.array([user.encode() for user in users]),
            pa.array(floats, pa.float32()),
            pa.array(times, pa.timestamp("s", "UTC")),
        ),
        (categories, pa.array(floats, pa.float16()), pa.array([second * 1000 for second in epoch])),
    ]
    for who, score, when in variants:
        notes = pa.array([row["note"] for row in ROWS], pa.binary())
        table = pa.table({"who": who, "stars": score, "when": when, "title": titles, "note": notes, "more": [[1]] * 4})
        path = parquet_file(tmp_path, table)
        assert read(path) == expected
        assert read(table) == expected
        assert read(dataset.dataset(path)) == expected
        (tmp_path / "log.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
        assert read(tmp_path / "log.parquet.gz") == expected


def test_parquet_ids_are_uuids_and_large_numbers(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    ids = [UUID(int=number) for number in range(4)]
    columns = {name: [row[name] for row in ROWS] for name in ("title", "note", "stars", "when")}
    who = pa.array([2**63 + 1, 2**63, 2**63 + 1, 2**63], pa.uint64())
    table = pa.table({**columns, "who": who, "id": pa.array([each.bytes for each in ids], pa.uuid())})
    samples = read(parquet_file(tmp_path, table), replace(MAPPING, id="id"))
    assert [sample.user_id for sample in samples] == ["9223372036854775809", "9223372036854775808"]
    assert [sample.id for sample in samples] == [str(ids[2]), str(ids[3])]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("title", [["x"]], "its 'title' is a list"),
        ("title", [{"a": 1}], "its 'title' is an object"),
        ("title", [b"\xff\xfe"], "its 'title' is 2 bytes that are not valid UTF-8"),
        ("stars", [True], "its 'stars' is true or false"),
        ("when", [None], "its 'when' is null"),
        ("who", [None], "its 'who' is null"),
        ("who", [1.5e300], "its 'who' is a floating-point number above 2.53, which is not exact"),
    ],
)
def test_parquet_value_that_cannot_be_read_is_described(
    tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    pa = pytest.importorskip("pyarrow")
    row = {"who": ["a"], "title": [SECRET], "note": ["n"], "stars": [1], "when": ["2024"], column: values}
    with pytest.raises(RecordError, match=f"row 1: {message}") as caught:
        read(parquet_file(tmp_path, pa.table(row)))
    assert SECRET not in str(caught.value)


def test_parquet_time_beyond_the_calendar_breaks_only_its_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({name: [row[name] for row in ROWS] for name in ("title", "note", "stars")})
    days = [1_704_456_000, 600_000_000_000, 1_707_134_400, 1_707_134_400]
    table = table.append_column("when", pa.array(days, pa.timestamp("s"))).append_column("who", pa.array(["a"] * 4))
    with pytest.raises(RecordError, match=r"row 2: its 'when' is a timestamp\[ms\] that cannot be read"):
        read(parquet_file(tmp_path, table))
    reader = EventLogReader(tmp_path / "log.parquet", MAPPING, TASK, skip_bad=1, split="dev")
    assert len(list(reader)) == 1


# ---- delimiters and headers


def test_movielens_files_without_header_are_read_by_number(tmp_path: Path) -> None:
    lines = [
        f'{user}::{SECRET} "{movie};::{stars}::{978300000 + movie}'
        for user in (1, 2)
        for movie, stars in ((1, 5), (2, 3), (3, 4))
    ]
    (tmp_path / "ratings.dat").write_text("\n".join(lines) + "\n")
    mapping = ColumnMapping("1", {"text": "2", "more": "2"}, "3", "Stars? title: {text}", date="4")
    samples = read(tmp_path / "ratings.dat", mapping)
    assert [(s.id, s.user_id, s.target, s.history[1].answer) for s in samples] == [
        ("row-3", "1", "4", "3"),
        ("row-6", "2", "4", "3"),
    ]
    assert samples[0].query == f'{SECRET} "3;'
    assert samples[0].history[0].date == date(2000, 12, 31)


def test_delimiter_setting_is_used(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(delimited(ROWS, "^"))
    assert len(read(tmp_path / "log.csv", delimiter="^")) == 2
    with pytest.raises(ConfigError, match="no quote and no line break"):
        read(tmp_path / "log.csv", delimiter='"')


def test_error_of_a_missing_column_shows_columns_and_delimiter(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(delimited(ROWS, ";"))
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "log.csv", replace(MAPPING, answer="star"))
    assert "no column 'star'; did you mean 'stars'? Its columns, split at ';', are: who, title, note" in str(
        caught.value
    )


def test_error_of_a_missing_header_shows_no_value(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(delimited(ROWS, ";").partition("\n")[2])
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "log.csv")
    assert "the first line, split at ';', has 5 values, but none of the columns 'who'" in str(caught.value)
    assert "no header" in str(caught.value)
    assert SECRET not in str(caught.value)


# ---- quotes


def quoted_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"who": "a", "title": f'say "{number}"', "note": "", "stars": 1, "when": 2000 + number}
        for number in range(count)
    ]


@pytest.mark.parametrize("skip_bad", [0, 1, 9])
def test_quote_that_is_never_closed_is_never_skipped(tmp_path: Path, skip_bad: int) -> None:
    rows = [{**row, "title": "x"} for row in quoted_rows(1000)]
    lines = delimited(rows, ",", end="\n").splitlines()
    lines[5] = lines[5].replace("x", f'"{SECRET}')
    (tmp_path / "log.csv").write_text("\n".join(lines))
    with pytest.raises(RecordError, match="line 6: a quote is opened in this line and never closed") as caught:
        read(tmp_path / "log.csv", skip_bad=skip_bad)
    assert SECRET not in str(caught.value)


def with_broken_text(folder: Path, text: str) -> EventLogReader:
    lines = delimited(quoted_rows(20), ",", end="\n").splitlines()
    lines[5] = f"a,{text},,1,2004"
    (folder / "log.csv").write_text("\n".join(lines))
    return EventLogReader(folder / "log.csv", MAPPING, TASK, skip_bad=9, queries_per_user=99, min_history=0)


@pytest.mark.parametrize("text", ['"x', '"""', '"a\n"b"', '"x""'])
def test_quote_that_swallows_other_rows_is_never_skipped(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecordError, match=r"line 6: .*rows after it would be lost"):
        list(with_broken_text(tmp_path, text))


@pytest.mark.parametrize(("text", "skipped"), [('x"', 0), ('x "y" z', 0), ('"a" b', 1), ("x,y", 1)])
def test_quote_that_is_invalid_within_a_line_costs_only_this_line(tmp_path: Path, text: str, skipped: int) -> None:
    reader = with_broken_text(tmp_path, text)
    assert len(list(reader)) == 19 - skipped  # all rows except the last one, which is in dev
    assert reader.report.skipped == skipped


def test_rows_of_several_lines_are_numbered_by_their_first_line(tmp_path: Path) -> None:
    rows = [{**row, "title": "one\ntwo\nthree"} for row in quoted_rows(3)]
    rows[2]["stars"] = SECRET
    (tmp_path / "log.csv").write_text(delimited(rows, ",", end="\n"))
    with pytest.raises(RecordError, match="line 8: its answer is not one of the 6 labels"):
        read(tmp_path / "log.csv")


# ---- large numbers and deep nesting


HUGE: list[tuple[str, str]] = [(str(2**63), str(2**63)), ("1" * 200, "1" * 200)]


@pytest.mark.parametrize("name", ["log.json", "log.jsonl"])
@pytest.mark.parametrize(("number", "user"), HUGE, ids=["2^63", "200 digits"])
def test_large_number_is_an_id(tmp_path: Path, name: str, number: str, user: str) -> None:
    lines = [json.dumps({**row, "who": 0}).replace('"who": 0', f'"who": {number}') for row in ROWS]
    (tmp_path / name).write_text(f"[{','.join(lines)}]" if name == "log.json" else "\n".join(lines))
    assert [sample.user_id for sample in read(tmp_path / name)] == [user]


@pytest.mark.parametrize("name", ["log.json", "log.jsonl"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1" * 400, "has 400 characters"),
        ("1" * 5000, "digits"),
        ("1e400", "digits or above 1e308|not a finite number"),
        ("[" * 100_000, "nested more than 64|not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 64"),
        ("[" * 500 + "]" * 500, "nested more than 64"),
    ],
    ids=["400 digits", "5000 digits", "1e400", "open", "closed", "500 deep"],
)
def test_too_large_or_too_deep_value_is_a_clear_error(tmp_path: Path, name: str, value: str, message: str) -> None:
    lines = [json.dumps({**row, "who": 0}).replace('"who": 0', f'"who": {value}') for row in ROWS]
    (tmp_path / name).write_text(f"[{','.join(lines)}]" if name == "log.json" else "\n".join(lines))
    with pytest.raises(RecordError, match=message):
        read(tmp_path / name)


# ---- other sources


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"who": ["a"], "title": ["b"]}, "found one mapping with the keys title, who"),
        (7, "found the int"),
        (b"log.csv", "found the bytes"),
    ],
)
def test_source_without_rows_is_refused(source: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(source)


def test_row_that_is_not_a_mapping_is_a_broken_row() -> None:
    with pytest.raises(RecordError, match="the list, row 2: it is not a JSON object"):
        read([ROWS[0], ("ann", SECRET)])


GENRES = ["quiet drama", "loud comedy", "old western"]
NUMBERED: list[dict[str, Any]] = [
    {"user": user, "question": f"film {n} of {user}", "genre": (n + len(user)) % 3} for user in "ab" for n in range(9)
]


def genres_of(source: object) -> tuple[tuple[str, ...], list[str]]:
    """Return the labels that a log declares, and the answers of its rows."""
    log = read_log([source], LogOptions(answer="genre"))
    return log.task.labels, [row["genre"] for row in log.rows]


NAMED = (tuple(sorted(GENRES)), [GENRES[row["genre"]] for row in NUMBERED])


def test_a_hugging_face_data_set_gives_the_names_of_its_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        user=datasets.Value("string"), question=datasets.Value("string"), genre=datasets.ClassLabel(names=GENRES)
    )
    data = datasets.Dataset.from_list(NUMBERED, features=features)
    data.to_parquet(tmp_path / "log.parquet")
    for source in (data, data.with_format("numpy"), data.to_iterable_dataset(), tmp_path / "log.parquet"):
        assert genres_of(source) == NAMED


@dataclass
class ClassFeature:
    """The part of `datasets.ClassLabel` that is read."""

    names: list[str]


class NumberedRows(list[dict[str, Any]]):
    """Rows with the attribute `features` of a Hugging Face data set, which these tests do not require."""

    features: ClassVar[dict[str, object]] = {"user": object(), "question": object(), "genre": ClassFeature(GENRES)}


@pytest.mark.parametrize("convert", [int, np.int64, lambda number: GENRES[number]])
def test_class_numbers_are_read_as_their_names(convert: Callable[[int], object]) -> None:
    rows = NumberedRows({**row, "genre": convert(row["genre"])} for row in NUMBERED)
    assert genres_of(rows) == NAMED
    unlabelled = {"user": "a", "question": "a film without a genre", "genre": -1}
    log = read_log([NumberedRows([*rows, unlabelled, {**unlabelled, "genre": None}])], LogOptions(answer="genre"))
    assert log.report.dropped == {"without an answer": 2}
    assert genres_of(NUMBERED)[0] == ("0", "1", "2")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"genre": {"names": GENRES, "_type": "ClassLabel"}, "user": {"_type": "Value"}}, NAMED),
        ({"genre": {"names": 3}}, None),
        (["genre"], None),
    ],
)
def test_class_names_in_the_metadata_of_parquet_are_read(features: object, expected: object, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}  # as `Dataset.to_parquet` writes it
    table = pa.Table.from_pylist(NUMBERED).replace_schema_metadata(metadata)
    parquet.write_table(table, tmp_path / "log.parquet")
    for source in (table, tmp_path / "log.parquet"):
        assert genres_of(source) == (expected or genres_of(NUMBERED))
    parquet.write_table(table.replace_schema_metadata({"huggingface": "[" * 100_000}), tmp_path / "log.parquet")
    assert genres_of(tmp_path / "log.parquet") == genres_of(NUMBERED)
