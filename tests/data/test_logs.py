"""Logs whose columns are found: what each column is taken for, and what is refused because nothing tells."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from personaplug.data.logs.answers import decide_answers
from personaplug.data.logs.date_forms import learn_dates
from personaplug.data.logs.log import Log, read_log, read_rows
from personaplug.data.logs.options import LogOptions
from personaplug.data.logs.row_form import RowForm
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT, parse_task
from personaplug.errors import ConfigError, MissingData, RecordError, UserError

HEADER = "user_id,created_at,title,stars\n"
ROWS = [f"{user},2024-01-{day:02},film {day} of {user},{day % 5 + 1}\n" for user in "abc" for day in range(1, 9)]


def _read(path: Path, text: str, *, encoding: str = "utf-8", **options: Any) -> Log:
    path.write_bytes(text.encode(encoding))
    return read_log([path], LogOptions(**options))


@pytest.mark.parametrize(
    ("texts", "moment"),
    [
        (["05.01.2024", "06.02.2024"], datetime(2024, 1, 5)),
        (["05/01/2024", "25/01/2024"], datetime(2024, 1, 5)),
        (["01/05/2024 3:15 PM", "01/25/2024 3:00 AM"], datetime(2024, 1, 5, 15, 15)),
        (["Jan 5, 2024", "2024-02-01"], datetime(2024, 1, 5)),
        (["Fri, 05 Jan 2024 10:00:00 +0000", "1704067200"], datetime(2024, 1, 5, 10)),
        (["5th January 2024", "25.01.24 10:30"], datetime(2024, 1, 5)),
        (["Fri Jan 05 10:00:00 +0200 2024", "Fri Jan  5 10:00:00 2024"], datetime(2024, 1, 5, 8)),
    ],
)
def test_dates_of_mixed_forms_are_read(texts: list[str], moment: datetime) -> None:
    found = learn_dates(texts)
    assert (found.readable, found.unclear) == (1.0, "")
    assert found.forms.read(texts[0]) == moment


def test_day_or_month_first_is_not_guessed() -> None:
    found = learn_dates(["05/01/2024", "06/02/2024"])
    assert (found.readable, found.unclear) == (0.0, "99/99/9999")
    assert learn_dates(["05/01/2024"], formats=["%d/%m/%Y"]).forms.read("05/01/2024") == datetime(2024, 1, 5)
    contradictory = learn_dates(["13/01/2024", "01/13/2024"])
    assert contradictory.readable == 0.0


@pytest.mark.parametrize(
    ("texts", "kind", "labels"),
    [
        (["1", "2,0", "4", "5.0"] * 5, "rating", ("1", "2", "3", "4", "5")),
        (["3,5", "4", "5"] * 5, "rating", ("3.5", "4", "4.5", "5")),
        (["1", "2", "3"] * 400 + ["33"], "rating", ("1", "2", "3")),
        (["0", "1"] * 5, "label", ("0", "1")),
        (["0", "1.0", "0.0", "1", " 1 "] * 5, "label", ("0", "1")),
        (["1.0", "1.1"] * 10, "label", ("1.0", "1.1")),
        (["Yes", "yes ", "No", "yes", "no", "no"] * 3, "label", ("no", "yes")),
        ([f"some words of answer {n}" for n in range(20)], "text", ()),
    ],
)
def test_the_kind_of_answers_is_decided(texts: list[str], kind: str, labels: tuple[str, ...]) -> None:
    decided = decide_answers(texts, column="answer", options=LogOptions())
    assert (decided.kind, decided.labels) == (kind, labels)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([str(n) for n in range(60)], LogOptions(), "60 different numbers.*--kind text.*--answer"),
        ([str(n) for n in range(60)], LogOptions(in_python=True), "60 different numbers.*kind='text'.*answer="),
        ([f"tag {n % 60}" for n in range(600)], LogOptions(), "--kind label or --kind text"),
        ([f"tag {n % 60}" for n in range(600)], LogOptions(in_python=True), "kind='label' or kind='text'"),
        (["4"] * 30, LogOptions(), "All answers in the column 'answer' are equal.*--answer"),
        (["a", "b"], LogOptions(kind="rating"), "is no rating.*--label"),
        (["a", "b"], LogOptions(kind="rating", in_python=True), "is no rating.*labels="),
        (["a", "b"], LogOptions(kind="stars"), "one of label, rating, text, chat; found 'stars'"),
        (["a", "b"], LogOptions(labels=(None,)), "The labels are wrong: a label is null"),
    ],
)
def test_ambiguous_answers_are_refused_with_the_name_of_the_option(
    texts: list[str], options: LogOptions, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        decide_answers(texts, column="answer", options=options)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_encoding_and_delimiter_are_found(tmp_path: Path, encoding: str, delimiter: str) -> None:
    text = (HEADER + "".join(ROWS).replace("film", "süßer Film")).replace(",", delimiter)
    log = _read(tmp_path / "log.csv", text, encoding=encoding)
    assert log.rows[0]["title"] == "süßer Film 1 of a"
    assert (log.found.user, log.found.date, log.found.answer) == ("user_id", "created_at", "stars")
    assert (log.found.questions, log.task.labels) == (("title",), ("1", "2", "3", "4", "5"))


def test_an_unclear_encoding_is_asked_for(tmp_path: Path) -> None:
    text = HEADER + "".join(ROWS).replace("film", "длинный фильм")
    with pytest.raises(ConfigError, match="--encoding"):
        _read(tmp_path / "log.csv", text, encoding="cp1251")
    (tmp_path / "log.csv").write_bytes(text.encode("cp1251"))
    log = read_log([tmp_path / "log.csv"], LogOptions(encoding="windows-1251"))
    assert log.rows[0]["title"] == "длинный фильм 1 of a"


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("who,created_at,title,stars\n", "It is unclear which column is the user.*--user"),
        ("user_id,created_at,title,x\n", None),
        ("user_id,birthday,title,stars\n", None),
        ("user_id,when,1,stars\n", "no names of columns"),
    ],
)
def test_unknown_names_are_refused_unless_one_column_is_left(tmp_path: Path, header: str, said: str | None) -> None:
    if said:
        with pytest.raises(ConfigError, match=said) as caught:
            _read(tmp_path / "log.csv", header + "".join(ROWS))
        assert "film" not in str(caught.value)
        return
    log = _read(tmp_path / "log.csv", header + "".join(ROWS))
    assert log.found.answer in ("x", "stars")
    assert log.found.date == ("created_at" if "created_at" in header else None)


def test_a_file_without_header_has_numbered_columns(tmp_path: Path) -> None:
    log = _read(tmp_path / "log.csv", "".join(ROWS), user="1", date="2", questions=("3",), answer="4")
    assert len(log.rows) == len(ROWS)
    assert log.rows[0]["3"] == "film 1 of a"


def test_dates_whose_order_is_unknown_name_the_option(tmp_path: Path) -> None:
    text = HEADER + "".join(row.replace("2024-01-", "01/").replace(",film", "/2024,film") for row in ROWS)
    with pytest.raises(ConfigError, match=r"the month comes first. Give --date-format"):
        _read(tmp_path / "log.csv", text)
    log = _read(tmp_path / "log.csv", text, date_formats=("%m/%d/%Y",))
    assert log.rows[7]["created_at"] == datetime(2024, 1, 8)


def test_questions_with_texts_as_answers_are_a_chat(tmp_path: Path) -> None:
    rows = "".join(f"{user},Why {n}?,Because of {n} and {user}.\n" for user in "ab" for n in range(4))
    log = _read(tmp_path / "log.csv", "user,question,answer\n" + rows)
    assert (log.task.kind, log.form.mapping.prompt) == ("chat", "{question}")
    (sample, _) = log.reader("dev")
    assert (sample.prompt, sample.target, len(sample.history)) == ("Why 3?", "Because of 3 and a.", 3)


def test_the_kind_text_is_no_chat_even_if_the_column_holds_requests(tmp_path: Path) -> None:
    rows = "".join(f"{user},Why {n}?,Because of {n} and {user}.\n" for user in "ab" for n in range(4))
    log = _read(tmp_path / "log.csv", "user,question,answer\n" + rows, kind="text")
    assert log.task.kind == "text"
    assert log.form.mapping.prompt == "Write the answer as this user would write it. question: {question}"


def _in_memory() -> list[dict[str, Any]]:
    names = HEADER.strip().split(",")
    return [dict(zip(names, row.strip().split(","), strict=True)) | {"stars": float(row[-2])} for row in ROWS]


def test_rows_in_memory_give_the_samples_of_the_file(tmp_path: Path) -> None:
    log = _read(tmp_path / "log.csv", HEADER + "".join(ROWS))
    frame = pytest.importorskip("pandas").DataFrame(_in_memory())
    for rows in (_in_memory(), iter(_in_memory()), frame, frame.set_index(["user_id", "title"])):
        other = read_log([rows], LogOptions(name="log"))
        assert other.form == log.form
        assert list(other.reader("dev")) == list(log.reader("dev"))


def test_a_row_beyond_the_allowed_number_of_dropped_rows_is_an_error_with_its_position() -> None:
    rows = [*_in_memory(), {"user_id": "a", "created_at": "2024-02-01", "title": "secret", "stars": None}, "secret"]
    log = read_log([rows], LogOptions(), max_dropped=2)
    assert sorted(log.report.dropped) == ["that are no records", "without an answer"]
    for number, message in ((1, "row 25: it is a row without an answer"), (0, "row 26: it is no object")):
        with pytest.raises(RecordError, match=message) as caught:
            read_log([rows], LogOptions(), max_dropped=number)
        assert "secret" not in str(caught.value)


def test_a_saved_form_reads_other_rows_as_the_log(tmp_path: Path) -> None:
    days = [f"{day:02}/01/2024" for day in (5, 25)]
    rows = [{"user": user, "film": f"x {day}", "stars": n % 3, "day": day} for n, day in enumerate(days * 9)
            for user in "ab"]  # fmt: skip
    log = read_log([rows], LogOptions())
    form = RowForm.from_dict(json.loads(json.dumps(log.form.to_dict())), task=log.task)
    assert form == log.form
    ((_, items),) = read_rows([rows[0] | {"stars": "2.0"}], form).histories()
    assert [(item.answer, item.date) for item in items] == [("2", date(2024, 1, 5))]
    with pytest.raises(RecordError, match="the list, row 1: it is a row whose answer is none of the labels"):
        read_rows([rows[0] | {"stars": 9}], form)
    with pytest.raises(ConfigError, match="The log has no column 'film' with values"):
        read_rows([{"user": "a", "stars": 1, "day": "2024-01-01"}], form)


def test_labels_with_the_marker_do_not_hide_the_query(tmp_path: Path) -> None:
    rows = "".join(f"{user},{n}. film,{'title: a' if n % 2 else 'b'}\n" for user in "ab" for n in range(8))
    log = _read(tmp_path / "log.csv", "user,title,label\n" + rows)
    assert [sample.query for sample in log.reader("dev")] == ["7. film", "7. film"]


def test_a_log_of_which_no_row_can_be_used_says_why(tmp_path: Path) -> None:
    rows = "".join(ROWS[:4])
    with pytest.raises(MissingData, match="4 whose answer is none of the labels"):
        _read(tmp_path / "log.csv", HEADER + rows, labels=("8", "9", "10"))


@pytest.mark.parametrize(
    "date", ["2024-01-{:02} 12:00 EST", "2024-01-{:02}T12:00+01:00[Europe/Berlin]", "2024年1月{}日"]
)
def test_a_column_of_dates_that_cannot_be_read_is_not_ignored(tmp_path: Path, date: str) -> None:
    rows = [{"user": user, "when": date.format(day), "title": f"film {day}", "stars": day} for user in "abc"
            for day in range(1, 6)]  # fmt: skip
    with pytest.raises(ConfigError, match=r"Of the column 'when', 0% of the values are dates.*--no-date"):
        read_log([rows], LogOptions())
    words = [{**row, "when": "about the day, in words"} for row in rows]
    assert read_log([words], LogOptions()).found.date is None


@pytest.mark.parametrize(
    ("answer", "error"), [(None, "Not read: 'stars', because several"), ("stars", "2 columns 'stars'")]
)
def test_columns_with_the_same_name_are_not_read(tmp_path: Path, answer: str | None, error: str) -> None:
    twice = HEADER.replace("stars", "stars,stars") + "".join(row.replace("\n", ",5\n") for row in ROWS)
    with pytest.raises(ConfigError, match=error):
        _read(tmp_path / "log.csv", twice, answer=answer)
    with pytest.raises(ConfigError, match="2 columns 'a'"):
        _read(tmp_path / "log.csv", "a,a\nx,1\ny,2\n", answer=answer)
    notes = HEADER.replace("stars", "note,note,stars") + "".join(",x,y,".join(row.rsplit(",", 1)) for row in ROWS)
    log = _read(tmp_path / "log.csv", notes)
    assert (log.found.answer, log.found.unused) == ("stars", ())
    assert "not read: 'note', because several columns have this name" in log.report.files[0]


def test_data_frames_and_tables_with_a_column_twice_are_refused() -> None:
    rows = [["a", "x", 1, 2], ["a", "y", 2, 1]]
    names = ["user", "title", "stars", "stars"]
    table = pa.Table.from_arrays([pa.array(list(column)) for column in zip(*rows, strict=True)], names=names)
    for source in (pd.DataFrame(rows, columns=names), table):
        with pytest.raises(ConfigError, match="has 2 columns 'stars'"):
            read_log([source], LogOptions())


def test_users_that_a_program_wrote_as_decimals_are_whole_numbers(tmp_path: Path) -> None:
    rows = "".join(ROWS).replace("\na,", "\n7.0,").replace("\nb,", "\n7,").replace("\nc,", "\n07.0,")
    log = _read(tmp_path / "log.csv", HEADER + rows)
    assert {row["user_id"] for row in log.rows} == {"a", "7", "07.0"}


@pytest.mark.parametrize("damage", ["cut short", "not compressed"])
def test_broken_gzip_is_a_record_error(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(HEADER.encode())
    (tmp_path / "log.csv.gz").write_bytes(whole[:-8] if damage == "cut short" else HEADER.encode())
    with pytest.raises(RecordError, match="at the start: the gzip data is broken or cut short"):
        read_log([tmp_path / "log.csv.gz"], LogOptions())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoding": "base64"}, ConfigError, "There is no encoding 'base64'"),
        ({"encoding": "utf-16"}, RecordError, "not valid text in the encoding"),
        ({"delimiter": "|"}, ConfigError, "the delimiter '|' does not split its first line"),
        ({"prompt": "no column"}, ConfigError, "does not show what is asked. Write {title}"),
    ],
)
def test_options_that_do_not_fit_the_file_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[UserError], message: str
) -> None:
    (tmp_path / "log.csv").write_text(HEADER + "".join(ROWS), encoding="utf-8")
    with pytest.raises(error, match=re.escape(message)):
        read_log([tmp_path / "log.csv"], LogOptions(**options))


def test_a_header_may_have_a_line_break_in_a_name(tmp_path: Path) -> None:
    log = _read(tmp_path / "log.csv", HEADER.replace("stars", '"star\nrating"') + "".join(ROWS))
    assert log.found.answer == "star\nrating"


_FIELDS = {"item_fields": ["title"], "answer_field": "stars"}
_STARS = parse_task({"name": "Stars", "kind": "rating", "labels": ["1", "2", "3", "4", "5"], **_FIELDS})
_MOODS = parse_task({"name": "Moods", "kind": "label", "labels": ["bad", "good"], **_FIELDS})
_PRICES = parse_task({"name": "Prices", "kind": "text", "item_fields": ["title"], "answer_field": "price"})
_REPLIES = ["I would begin with seeds.", "It depends on the soil.", "Water it twice a week.", "Wait until spring."]


def _table(answer: str, values: Sequence[object]) -> list[dict[str, Any]]:
    return [
        {"user_id": "ab"[n % 2], "question": f"question number {n} about films", answer: v}
        for n, v in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("task", "answer", "values", "message"),
    [
        (CHAT, "stars", [1, 2, 3, 4, 5] * 8, "Chat has replies as answers, but the column 'stars' holds 5 different"),
        (CHAT, "answer", ["4", "5,0", "3", "4"], "holds 3 different numbers"),
        (CHAT, "stars", [n + 0.37 for n in range(60)], "holds 60 different numbers"),
        (CHAT, "category", ["sports", "politics"] * 10, "holds 2 different short values"),
        (_PRICES, "stars", [1, 2, 3, 4, 5] * 8, "Prices has texts as answers"),
        (_STARS, "answer", _REPLIES, "ratings from 1 to 5 as answers, but 4 of 4 values in the column 'answer'"),
        (_STARS, "score", list(range(1, 11)), "but 5 of 10 values"),
        (_STARS, "score", [0, 1, 1, 1, 1], "but 1 of 5 values"),
        (_MOODS, "stars", [1, 2, 3, 4, 5], "2 labels as answers, but 5 of 5 values"),
    ],
)
def test_answers_of_another_kind_than_the_run_are_refused(
    task: Task, answer: str, values: list[object], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_log([_table(answer, values)], LogOptions(), task=task)
    assert "--answer" in str(caught.value)
    assert not any(reply in str(caught.value) for reply in (*_REPLIES, "sports"))


@pytest.mark.parametrize(
    ("task", "answer", "values", "kept"),
    [
        (CHAT, "reply", _REPLIES * 3, 12),
        (CHAT, "reply", ["yes", "no", "10"], 3),
        (_PRICES, "price", [1, 2, 3, 4, 5] * 8, 40),
        (_STARS, "stars", [5] * 20 + [7, None], 20),
        (_STARS, "score", ["4.0", "5"] * 10, 20),
        (_MOODS, "mood", ["good", "bad", "good", "new"], 3),
    ],
)
def test_answers_of_the_kind_of_the_run_are_read(task: Task, answer: str, values: list[object], kept: int) -> None:
    log = read_log([_table(answer, values)], LogOptions(questions=("question",), answer=answer), task=task)
    assert len(log.rows) == kept
