"""Event logs: equal samples from every format, a split by time without leaks, and reports of broken rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from personaplug.data import LAMP_TASKS, open_dataset, write_lamp
from personaplug.data.event_log import ColumnMapping, EventLogReader
from personaplug.data.records import Sample
from personaplug.data.task import Task
from personaplug.errors import ConfigError, MissingData, MissingExtra, RecordError

SECRET = "zanzibar"
TASK = Task("Stars", "rating", ("text",), "score", ("mae",), ("1", "2", "3", "4", "5"), "title: ")
MAPPING = ColumnMapping(
    user="who",
    fields={"text": "title"},
    answer="stars",
    prompt="What score would this user give? title: {text}",
    id="event",
    date="when",
)


def row(number: int, who: str = "ann", when: Any = None, **changes: Any) -> dict[str, Any]:
    day = when or f"2020-01-{number:02d}"
    return {
        "event": f"e{number}",
        "who": who,
        "when": day,
        "title": f"{SECRET} {number}",
        "stars": 3,
        **changes,
    }


def jsonl(folder: Path, rows: list[Any]) -> Path:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return path


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read(path: Path, mapping: ColumnMapping = MAPPING, task: Task = TASK, **settings: Any) -> list[Sample]:
    return list(EventLogReader(path, mapping, task, **settings))


def shape(samples: list[Sample]) -> list[tuple[str, list[str]]]:
    return [(sample.id, [item.id for item in sample.history]) for sample in samples]


def test_sample_is_a_row_with_its_earlier_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [row(2), row(1, stars="5"), row(3, stars=4.0)])
    (dev,) = read(path, split="dev")
    assert (dev.id, dev.user_id, dev.target, dev.query) == ("e3", "ann", "4", f"{SECRET} 3")
    assert dev.prompt == f"What score would this user give? title: {SECRET} 3"
    assert [(item.id, item.answer, item.date) for item in dev.history] == [
        ("e1", "5", date(2020, 1, 1)),
        ("e2", "3", date(2020, 1, 2)),
    ]


def test_train_holds_the_rows_before_dev(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [row(number) for number in range(1, 9)])
    train = read(path, queries_per_user=2, dev_queries=3)
    dev = read(path, split="dev", dev_queries=3)
    assert shape(train) == [("e4", ["e1", "e2", "e3"]), ("e5", ["e1", "e2", "e3", "e4"])]
    assert [sample.id for sample in dev] == ["e6", "e7", "e8"]


def test_train_with_equal_times_holds_nothing_of_dev(tmp_path: Path) -> None:
    rows = [row(number, when=f"2020-01-{1 + number // 3:02d}") for number in range(1, 20)]
    path = jsonl(tmp_path, rows)
    moments = {values["event"]: values["when"] for values in rows}
    train, dev = read(path, queries_per_user=9, dev_queries=4), read(path, split="dev", dev_queries=4)
    dev_ids = {sample.id for sample in dev}
    assert len(dev_ids) == 4
    for sample in train:
        assert sample.id not in dev_ids
        assert dev_ids.isdisjoint(item.id for item in sample.history)
    for sample in train + dev:
        assert all(moments[item.id] < moments[sample.id] for item in sample.history)


def test_rows_of_one_day_are_sorted_by_time(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [row(1, when="2020-01-01T12:00:00"), row(2, when="2020-01-01 09:00"), row(3)])
    assert shape(read(path, split="dev")) == [("e3", ["e2", "e1"])]
    assert shape(read(path)) == [("e1", ["e2"])]


def test_rows_without_dates_and_ids_keep_file_order_and_numbers(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [row(3), row(2, "bob"), row(1)])
    samples = read(path, replace(MAPPING, id=None, date=None), split="dev", min_history=0)
    assert shape(samples) == [("row-3", ["row-1"]), ("row-2", [])]
    assert samples[0].history[0].date is None


def test_history_too_short_gives_no_query_and_too_long_is_cut(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [row(number) for number in range(1, 6)] + [row(6, "bob")])
    reader = EventLogReader(path, MAPPING, TASK, queries_per_user=9, min_history=2, max_history=2)
    assert shape(list(reader)) == [("e3", ["e1", "e2"]), ("e4", ["e2", "e3"])]
    assert (reader.report.samples, reader.report.items, reader.report.cut_items) == (2, 4, 1)
    assert list(reader) == list(reader)


def test_formats_give_equal_samples(tmp_path: Path) -> None:
    rows = [
        row(1, title='a "quoted", two\nlines'),
        row(2, title="é 😀"),
        row(3, "bob"),
        row(4),
        row(5, "bob"),
    ]
    path = jsonl(tmp_path, rows)
    expected = read(path, split="dev")
    (tmp_path / "log.csv").write_bytes(b"\xef\xbb\xbf" + as_csv(rows).encode())
    for name in ("log.jsonl", "log.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("log.csv", "log.csv.gz", "log.jsonl.gz"):
        assert read(tmp_path / name, split="dev") == expected
    assert len(expected) == 2


def test_parquet_in_batches_with_nanoseconds_gives_equal_samples(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row(1), row(2), row(3, "bob"), row(4, "bob")]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "log.parquet", row_group_size=2)
    assert read(tmp_path / "log.parquet", split="dev") == read(jsonl(tmp_path, rows), split="dev")
    moments = pyarrow.array([datetime.fromisoformat(values["when"]) for values in rows], pyarrow.timestamp("ns"))
    parquet.write_table(table.set_column(2, "when", moments), tmp_path / "fine.parquet")
    assert read(tmp_path / "fine.parquet", split="dev") == read(tmp_path / "log.parquet", split="dev")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'personaplug\[parquet\]'"):
        EventLogReader(tmp_path / "log.parquet", MAPPING, TASK)


def test_prompt_user_text_with_braces_stays_text(tmp_path: Path) -> None:
    nasty = "{text} {0} {stars} {{ } {text!r} {text.__class__}"
    (sample,) = read(jsonl(tmp_path, [row(1), row(2, title=nasty)]), split="dev")
    assert sample.query == nasty
    literal = replace(MAPPING, prompt="{{json}} title: {text}")
    (sample,) = read(tmp_path / "log.jsonl", literal, split="dev")
    assert sample.prompt == f"{{json}} title: {nasty}"


def test_mapping_answer_in_item_fields_and_prompt_only_field_work(tmp_path: Path) -> None:
    headline = ColumnMapping("who", {"text": "title"}, "stars", "article: {text}", "event")
    (sample,) = read(jsonl(tmp_path, [row(1), row(2)]), headline, LAMP_TASKS["LaMP_4"], split="dev")
    assert sample.history[0].fields == (("title", "3"), ("text", f"{SECRET} 1"))
    tweet = ColumnMapping("who", {"plain": "title"}, "stars", "Paraphrase: {plain}", "event")
    (sample,) = read(tmp_path / "log.jsonl", tweet, LAMP_TASKS["LaMP_7"], split="dev")
    assert (sample.query, sample.target, sample.history[0].fields) == (f"{SECRET} 2", "3", (("text", "3"),))


def test_log_converted_to_lamp_reads_back_equal(tmp_path: Path) -> None:
    rows = [row(number, "ann" if number % 3 else "bob", title=f'é "{number}"\n{{x}}') for number in range(1, 15)]
    path = jsonl(tmp_path, rows)
    for split in ("train", "dev"):
        samples = read(path, split=split)
        write_lamp(samples, tmp_path / "lamp", split, task=TASK)
        reader = open_dataset(tmp_path / "lamp", split)
        assert samples
        assert list(reader) == samples
        assert reader.task == TASK


BROKEN_ROWS: dict[str, tuple[Any, str]] = {
    "no object": ([SECRET], "line 2: it is not a JSON object"),
    "no user": ({"event": "e"}, "line 2: its 'who' is missing"),
    "blank user": (row(2, " "), "line 2: its 'who' is empty"),
    "null answer": (row(2, stars=None), "line 2: its 'stars' is null"),
    "no label": (row(2, stars=SECRET), "line 2: its answer is not one of the 5 labels"),
    "nan": (row(2, stars=float("nan")), "line 2: its 'stars' is not a finite number"),
    "no date": (row(2, when=SECRET), "line 2: its 'when' has the form aaaaaaaa,"),
    "list for text": (row(2, title=[SECRET]), "line 2: its 'title' is a list"),
    "half a surrogate": (row(2, title="\ud83d"), "line 2: its 'title' is not valid Unicode"),
    "id twice": (row(1, stars=5), "line 2: an earlier record has the same id"),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_broken_row_is_reported_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    broken, message = BROKEN_ROWS[name]
    path = jsonl(tmp_path, [row(1), broken, row(3)])
    with pytest.raises(RecordError) as caught:
        read(path)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    reader = EventLogReader(path, MAPPING, TASK, split="dev", skip_bad=1)
    assert shape(list(reader)) == [("e3", ["e1"])]
    assert reader.report.skipped == 1


def test_blank_query_is_broken_only_as_a_query(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [row(1, title=""), row(2), row(3, title=" ")])
    assert shape(read(path)) == [("e2", ["e1"])]
    with pytest.raises(RecordError, match="line 3: its input holds no query"):
        read(path, split="dev")


def test_broken_line_of_each_format_is_skipped_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [row(1), row(3)])
    path.write_bytes(path.read_bytes() + b'{"zanzibar\n\n"\xff"\n')
    with pytest.raises(RecordError, match="line 3: it is not valid JSON"):
        read(path)
    assert len(read(path, split="dev", skip_bad=2)) == 1
    table = tmp_path / "log.csv"
    table.write_bytes(as_csv([row(1), row(3)]).encode() + b'e4,ann\r\ne5,ann,2020,"a"b,3\r\ne6,ann,2020,\xff,3\r\n')
    with pytest.raises(RecordError, match="line 4: it has 2 values, but the header has 5"):
        read(table)
    reader = EventLogReader(table, MAPPING, TASK, split="dev", skip_bad=3)
    assert shape(list(reader)) == [("e3", ["e1"])]
    assert "line 5: it is not valid CSV" in reader.report.problems[1]
    assert "line 6: its 'title' is not valid Unicode" in reader.report.problems[2]


def test_truncated_file_is_never_skipped(tmp_path: Path) -> None:
    packed = gzip.compress(jsonl(tmp_path, [row(1), row(2)]).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-9])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 nothing")
    for name in ("cut.jsonl.gz", "cut.parquet"):
        with pytest.raises(RecordError, match="cut"):
            read(tmp_path / name, skip_bad=9)


def test_missing_column_error_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(as_csv([row(1)]))
    with pytest.raises(ConfigError, match="no column 'star'; did you mean 'stars'"):
        read(tmp_path / "log.csv", replace(MAPPING, answer="star"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "title: {titel}"}, "placeholder {titel}"),
        ({"prompt": "title: {text:>4}"}, "no plain field"),
        ({"prompt": "title: {text.x}"}, "no plain field"),
        ({"prompt": "title: {"}, "cannot be read"),
        ({"prompt": "score {text}"}, "does not fit task Stars.*marker"),
        ({"prompt": "{text} title: "}, "does not fit task Stars.*no query"),
        ({"prompt": "title: {score}"}, "placeholder {score}"),
        ({"fields": {}, "prompt": "title: x"}, "no column for 'text'"),
        ({"fields": {"text": "title", "tetx": "title"}}, "'tetx' is not used; did you mean 'text'"),
        ({"fields": {"text": "title", "score": "stars"}}, "name its column by `answer`"),
    ],
)
def test_mapping_that_does_not_fit_the_task_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EventLogReader(jsonl(tmp_path, [row(1)]), replace(MAPPING, **change), TASK)


@pytest.mark.parametrize(
    "settings",
    [{"split": "test"}, {"queries_per_user": 0}, {"dev_queries": 0}, {"min_history": -1}, {"skip_bad": -1},
     {"max_history": -1}],
)  # fmt: skip
def test_setting_out_of_range_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings)) if "split" not in settings else "'train' and 'dev'"):
        EventLogReader(jsonl(tmp_path, [row(1)]), MAPPING, TASK, **settings)


def test_missing_or_unknown_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="no file"):
        EventLogReader(tmp_path / "log.csv", MAPPING, TASK)
    for name in ("log.xlsx", "log", "log.csv.zip"):
        with pytest.raises(ConfigError, match=r"\*\.jsonl"):
            EventLogReader(tmp_path / name, MAPPING, TASK)
