"""Logs whose columns are found: what each column is taken for, and what is refused because nothing tells."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from personaplug.data.logs.answers import decide_answers
from personaplug.data.logs.date_forms import learn_dates
from personaplug.data.logs.log import Log, read_log
from personaplug.data.logs.options import LogOptions
from personaplug.errors import ConfigError, MissingData

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
        (["Yes", "yes ", "No", "yes", "no", "no"] * 3, "label", ("no", "yes")),
        ([f"some words of answer {n}" for n in range(20)], "text", ()),
    ],
)
def test_the_kind_of_answers_is_decided(texts: list[str], kind: str, labels: tuple[str, ...]) -> None:
    decided = decide_answers(texts, column="answer")
    assert (decided.kind, decided.labels) == (kind, labels)


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ([str(n) for n in range(60)], {}, "60 different numbers"),
        ([f"tag {n % 60}" for n in range(600)], {}, "--kind label or --kind text"),
        (["a", "b"], {"kind": "rating"}, "is no rating"),
    ],
)
def test_answers_that_may_be_either_are_refused(texts: list[str], options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        decide_answers(texts, column="answer", **options)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_encoding_and_delimiter_are_found(tmp_path: Path, encoding: str, delimiter: str) -> None:
    text = (HEADER + "".join(ROWS).replace("film", "süßer Film")).replace(",", delimiter)
    log = _read(tmp_path / "log.csv", text, encoding=encoding)
    assert log.rows[0]["title"] == "süßer Film 1 of a"
    assert (log.found.user, log.found.date, log.found.answer) == ("user_id", "created_at", "stars")
    assert (log.found.questions, log.task.labels) == (("title",), ("1", "2", "3", "4", "5"))


def test_an_encoding_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    text = HEADER + "".join(ROWS).replace("film", "длинный фильм")
    with pytest.raises(ConfigError, match="--encoding"):
        _read(tmp_path / "log.csv", text, encoding="cp1251")
    (tmp_path / "log.csv").write_bytes(text.encode("cp1251"))
    log = read_log([tmp_path / "log.csv"], LogOptions(encoding="windows-1251"))
    assert log.rows[0]["title"] == "длинный фильм 1 of a"


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("who,created_at,title,stars\n", "Which column is the user cannot be told.*--user"),
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
    with pytest.raises(ConfigError, match=r"day or the month comes first. Give --date-format"):
        _read(tmp_path / "log.csv", text)
    log = _read(tmp_path / "log.csv", text, date_formats=("%m/%d/%Y",))
    assert log.rows[7]["created_at"] == datetime(2024, 1, 8)


def test_questions_with_texts_as_answers_are_a_chat(tmp_path: Path) -> None:
    rows = "".join(f"{user},Why {n}?,Because of {n} and {user}.\n" for user in "ab" for n in range(4))
    log = _read(tmp_path / "log.csv", "user,question,answer\n" + rows)
    assert (log.task.kind, log.declaration.prompt) == ("chat", "{question}")
    (sample, _) = log.reader("dev")
    assert (sample.prompt, sample.target, len(sample.history)) == ("Why 3?", "Because of 3 and a.", 3)


def test_labels_with_the_marker_do_not_hide_the_query(tmp_path: Path) -> None:
    rows = "".join(f"{user},{n}. film,{'title: a' if n % 2 else 'b'}\n" for user in "ab" for n in range(8))
    log = _read(tmp_path / "log.csv", "user,title,label\n" + rows)
    assert [sample.query for sample in log.reader("dev")] == ["7. film", "7. film"]


def test_a_log_of_which_no_row_can_be_used_says_why(tmp_path: Path) -> None:
    rows = "".join(ROWS[:4])
    with pytest.raises(MissingData, match="4 whose answer is none of the labels"):
        _read(tmp_path / "log.csv", HEADER + rows, labels=("8", "9", "10"))
