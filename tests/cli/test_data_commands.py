"""The command `import`: data sets from conversations, and error messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conversations import assistant, chat, user

from personaplug.cli.main import main
from personaplug.data import load_task, open_dataset
from personaplug.data.conversations import FORMATS, MAX_SAMPLES_PER_USER


def call(*words: object) -> Result:
    return CliRunner().invoke(main, ["import", *map(str, words)])


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    records = [
        chat(f"Question {day}?", f"Reply {who}{day}", who=who, time=f"2024-01-0{day}")
        for who in ("ann", "bob", "cem", "dan", "eve")
        for day in (1, 2, 3)
    ]
    unanswered = {"user": "ann", "time": "2024-01-04", "messages": [user("Rain?"), assistant(None, tool_calls=[{}])]}
    path.write_text(lines(*records, unanswered))
    return path


def test_conversations_become_a_data_set_split_by_user(chats: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    pair = {"input": {"messages": [user("Hi")]}, "preferred_output": [assistant("Yo.")]}
    pair |= {"non_preferred_output": [assistant("No.")], "user": "ann", "time": "2024-01-05"}
    more.write_text(lines({"user": "ann", "preference": "Short.", "time": "2024-01-04"}, pair))
    done = call(chats, more, "--out", tmp_path / "set", "--share", 0.4)
    assert done.exit_code == 0, done.output
    assert "11 samples" in done.output
    assert "from 18 rows of 5 users" in done.output
    assert "1 turns with tool calls left out" in done.output
    assert "5 rows left out because their history is too short" in done.output
    by_split = {split: list(open_dataset(tmp_path / "set", split)) for split in ("train", "dev")}
    assert {split: len({sample.user_id for sample in samples}) for split, samples in by_split.items()} == {
        "train": 3,
        "dev": 2,
    }
    assert load_task(tmp_path / "set").kind == "chat"
    (sample,) = (sample for samples in by_split.values() for sample in samples if sample.rejected)
    assert (sample.target, sample.rejected) == ("Yo.", ("No.",))
    assert [item.kind for item in sample.history] == ["answer", "answer", "answer", "preference"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing argument 'FILES...'"),
        (["EMPTY/none.jsonl", "--out", "EMPTY/set"], "There is no file"),
        (["CHATS", "--out", "EMPTY/set", "--format", "openai"], "openai-chat"),
        (["CHATS", "--out", "EMPTY/set", "--format", "aloe"], "line 1: its format is unknown"),
        (["CHATS", "--out", "EMPTY/set", "--share", "1"], "between 0 and 1"),
        (["CHATS", "--out", "EMPTY/set", "--max-samples-per-user", "0"], "at least 1"),
        (["CHATS", "--out", "EMPTY/set", "--user", "who"], "apply only to logs"),
        (["CHATS", "EMPTY/log.csv", "--out", "EMPTY/set"], "Some files hold conversations"),
        (["CHATS", "--out", "EMPTY/full"], "already holds a data set"),
        (["EMPTY/one.jsonl", "--out", "EMPTY/set"], "2 or more users, found 1"),
        (["EMPTY/empty.jsonl", "--out", "EMPTY/set"], "it holds no records"),
        (["EMPTY/log.csv", "--out", "EMPTY/set"], "no user has two rows"),
        (["EMPTY/log.csv", "--out", "EMPTY/set", "--share", "0.5"], "are for conversations"),
    ],
)
def test_user_error_exits_with_2_and_a_message(words: list[str], message: str, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train_questions.json").write_text("[]")
    (tmp_path / "one.jsonl").write_text(lines(chat("One?", "First."), chat("Two?", "Second.")))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "log.csv").write_text("user,title,stars\nann,a film,3\nbob,a film,4\n")
    done = call(*(word.replace("CHATS", str(chats)).replace("EMPTY", str(tmp_path)) for word in words))
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "set").exists() or not list((tmp_path / "set").glob("*_questions.json"))


def test_import_help_lists_formats_and_default_limit() -> None:
    text = "".join(call("--help").output.split())
    assert [name for name in FORMATS if name not in text] == []
    assert f"[default:{MAX_SAMPLES_PER_USER}forconversations" in text


def test_import_without_samples_counts_the_dropped_rows(tmp_path: Path) -> None:
    rows = [f"{user},film {number} of {user},{number}" for user in "abcdef" for number in range(1, 6)]
    (tmp_path / "log.csv").write_text("\n".join(["user,title,stars", *rows, ",a film,4"]) + "\n")
    words = ["import", str(tmp_path / "log.csv"), "--out", str(tmp_path / "data"), "--label"]
    for label, message in (
        ("4", "31 rows read, 6 kept, 25 dropped: 24 whose answer is none of the labels, 1 without a user."),
        ("9", "None of the 31 rows can be used: 30 whose answer is none of the labels, 1 without a user."),
    ):
        done = CliRunner().invoke(main, [*words, label])
        assert done.exit_code == 2
        assert message in done.output
        assert not (tmp_path / "data").exists()
