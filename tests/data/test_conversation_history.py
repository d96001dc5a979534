"""Histories from conversations have no entry of the same conversation, no later entry and no copies; files."""

from __future__ import annotations

import gzip
import json
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conversations import SECRET, assistant, chat, histories, kind_and_texts, read, reader_of, user

from personaplug.data import open_dataset, write_lamp
from personaplug.data.conversations import open_conversations
from personaplug.data.splits import split_by_user
from personaplug.errors import ConfigError, MissingData, RecordError


def at(day: int, hour: int = 9) -> str:
    return f"2024-01-{day:02d}T{hour:02d}:00"


# ---- times


def test_history_has_earlier_conversations_in_any_order_of_the_lines() -> None:
    lines = [chat(f"Question {day}?", f"Reply {day}", time=at(day)) for day in (3, 1, 2)]
    assert histories(read(*lines)) == {"Reply 2": ["Reply 1"], "Reply 3": ["Reply 1", "Reply 2"]}


def test_history_has_no_entry_of_the_same_time() -> None:
    lines = [chat("Question 1?", "Reply 1", time=at(1))]
    lines += [chat(f"Question {name}?", f"Reply {name}", time=at(2)) for name in "ab"]
    assert histories(read(*lines)) == {"Reply a": ["Reply 1"], "Reply b": ["Reply 1"]}


def test_times_of_messages_interleave_two_conversations() -> None:
    def talk(name: str, *hours: int) -> dict[str, Any]:
        messages = [
            message
            for hour in hours
            for message in (
                user(f"Question {name}{hour}?", time=at(1, hour)),
                assistant(f"Reply {name}{hour}", time=at(1, hour)[:-2] + "30"),
            )
        ]
        return {"user": "ann", "messages": messages}

    answers = histories(read(talk("a", 9, 12), talk("b", 10, 13)))
    assert answers == {
        "Reply b10": ["Reply a9"],
        "Reply a12": ["Reply b10"],
        "Reply b13": ["Reply a9", "Reply a12"],
    }


def test_reply_is_in_histories_after_its_own_time_and_not_after_the_time_of_its_question() -> None:
    slow = {"user": "ann", "messages": [user("Question 1?", time=at(1)), assistant("Reply 1", time=at(5))]}
    lines = [slow, *(chat(f"Question {day}?", f"Reply {day}", time=at(day)) for day in (3, 6))]
    assert histories(read(*lines)) == {"Reply 6": ["Reply 3", "Reply 1"]}


def test_without_times_the_lines_are_in_time_order() -> None:
    lines = [chat(f"Question {name}?", f"Reply {name}") for name in "bac"]
    samples = read(*lines)
    assert histories(samples) == {"Reply a": ["Reply b"], "Reply c": ["Reply b", "Reply a"]}
    assert {item.date for sample in samples for item in sample.history} == {None}


@pytest.mark.parametrize("timeless", [chat("Hi", SECRET), {"user": "ann", "preference": SECRET}])
def test_record_without_time_among_timed_records_is_broken(timeless: dict[str, Any]) -> None:
    lines = [chat("Question 1?", "Reply 1", time=at(1)), timeless, chat("Question 2?", "Reply 2", time=at(2))]
    with pytest.raises(RecordError, match="row 2: it has no time, but other records have one") as caught:
        read(*lines)
    assert SECRET not in str(caught.value)
    reader = reader_of(*lines, skip_bad=1)
    assert histories(list(reader)) == {"Reply 2": ["Reply 1"]}
    assert reader.report.skipped == 1


def test_preference_is_in_histories_after_it_was_stated() -> None:
    lines = [chat(f"Question {day}?", f"Reply {day}", time=at(day)) for day in (1, 3, 5)]
    stated = [{"user": "ann", "preference": f"Wish {day}", "time": at(day)} for day in (3, 4)]
    assert histories(read(*lines, *stated)) == {
        "Reply 3": ["Reply 1"],
        "Reply 5": ["Reply 1", "Reply 3", "Wish 3", "Wish 4"],
    }


# ---- the same conversation


def test_history_has_no_entry_of_the_same_conversation() -> None:
    talk = chat("One?", "First.", "Two?", "Second.", time=at(2))
    answers = histories(read(chat("Zero?", "Before.", time=at(1)), talk))
    assert answers == {"First.": ["Before."], "Second.": ["Before."]}


@pytest.mark.parametrize("key", ["id", "conversation_id"])
def test_lines_with_the_same_id_are_one_conversation(key: str) -> None:
    lines = [chat("Zero?", "Before.", time=at(1), **{key: "c0"})]
    lines += [chat(f"Part {day}?", f"Reply {day}", time=at(day), **{key: "c1"}) for day in (2, 3)]
    samples = read(*lines)
    assert histories(samples) == {"Reply 2": ["Before."], "Reply 3": ["Before."]}
    assert len({sample.id for sample in samples}) == 2


@pytest.mark.parametrize("days", [(2, 2, 2), (2, 3, 9), None])
def test_log_that_repeats_the_conversation_gives_each_turn_once(days: tuple[int, ...] | None) -> None:
    texts = ["Hi", "Yo", "Two?", "Second.", "Three?", "Third."]
    times = [{"time": at(day)} for day in (1, *days)] if days else [{}] * 4
    lines = [chat("Zero?", "Before.", id="r0", **times[0])]
    lines += [chat(*texts[: 2 * count], id=f"r{count}", **times[count]) for count in (1, 2, 3)]
    samples = read(*lines)
    assert {item.answer for sample in samples for item in sample.history} == {"Before."}
    assert [sample.target for sample in samples if sample.target != "Yo"] == ["Second.", "Third."]


def test_branch_of_a_conversation_is_the_same_conversation() -> None:
    talk = chat("One?", "First.", "Two?", "Second.", "Three?", "Third.", time=at(2))
    branch = {
        "user": "ann",
        "time": at(4),
        "prompt": [user("One?"), assistant("First."), user("Two?")],
        "chosen": [assistant("Other.")],
        "rejected": [assistant("Second.")],
    }
    answers = histories(read(chat("Zero?", "Before.", time=at(1)), talk, branch, chat("Last?", "End.", time=at(5))))
    assert answers["Other."] == ["Before."]
    assert answers["End."] == ["Before.", "First.", "Second.", "Third.", "Second.", "Other."]


@pytest.mark.parametrize("times", [({}, {}), ({"time": at(2, 9)}, {"time": at(2, 10)})])
def test_repeated_question_has_no_earlier_answer_in_its_history(times: tuple[dict[str, str], ...]) -> None:
    first = chat("Zero?", "Before.", **({"time": at(1)} if times[0] else {}))
    lines = [first, chat("One?", "First.", **times[0]), chat("One?", "Again.", **times[1])]
    assert histories(read(*lines)) == {"First.": ["Before."], "Again.": ["Before."]}


def test_same_question_on_another_day_is_another_conversation() -> None:
    lines = [chat("Plan my day?", f"Plan {day}", time=at(day)) for day in (1, 2, 3)]
    assert histories(read(*lines)) == {"Plan 2": ["Plan 1"], "Plan 3": ["Plan 1", "Plan 2"]}


def random_log(seed: int) -> tuple[list[dict[str, Any]], dict[str, tuple[int, int, int]]]:
    """Return lines in random order, and for each reply its conversation and the minutes of question and reply."""
    rng = random.Random(seed)
    texts: dict[int, list[dict[str, Any]]] = {number: [] for number in range(5)}
    truth, lines, minute = dict[str, tuple[int, int, int]](), list[dict[str, Any]](), 0
    for turn in range(25):
        number = rng.randrange(5)
        asked, answered = minute, minute + rng.randrange(3)
        minute = answered + rng.randrange(2)
        stamp = [(datetime(2024, 1, 1) + timedelta(minutes=when)).isoformat() for when in (asked, answered)]
        before = list(texts[number])
        texts[number] += [user(f"Q{turn}?", time=stamp[0]), assistant(f"A{turn}", time=stamp[1])]
        truth[f"A{turn}"] = (number, asked, answered)
        if rng.random() < 0.5:
            lines.append({"user": "ann", "messages": list(texts[number])})
        else:
            pair = {"chosen": texts[number][-1:], "rejected": [assistant(f"R{turn}", time=stamp[1])]}
            lines.append({"user": "ann", "prompt": [*before, texts[number][-2]], **pair})
    rng.shuffle(lines)
    return lines, truth


@pytest.mark.parametrize("seed", range(20))
def test_history_is_exactly_the_earlier_entries_of_other_conversations(seed: int) -> None:
    lines, truth = random_log(seed)
    samples = read(*lines)
    for sample in samples:
        conversation, asked, _ = truth[str(sample.target)]
        allowed = [
            answer for answer, (other, _, answered) in truth.items() if other != conversation and answered < asked
        ]
        answers = [item.answer for item in sample.history if item.kind == "answer"]
        assert sorted(map(str, answers)) == sorted(allowed)
    others = {conversation for conversation, _, _ in truth.values()}
    assert len(samples) > len(truth) - 2 * len(others)


# ---- copies and limits


def test_copies_count_once() -> None:
    long = "That is a text which nobody writes twice by chance."
    lines = [
        chat("One?", "First.", time=at(1, 9), id="a"),
        chat("One?", "first. ", time=at(1, 10), id="b"),
        chat("Two?", long, time=at(2)),
        chat("Two?", long, time=at(9)),
        {"user": "ann", "preference": "Short, please.", "time": at(3, 9)},
        {"user": "ann", "preference": "short,  please.", "time": at(3, 10)},
        chat("Three?", "Third.", time=at(20)),
    ]
    reader = reader_of(*lines)
    assert histories(list(reader)) == {long: ["First."], "Third.": ["First.", long, "Short, please."]}
    assert reader.report.copies == 3


def test_copies_with_different_answers_are_never_samples() -> None:
    lines = [chat("Hi", answer, id=name) for answer, name in (("Yo", "a"), ("Hello", "b"), ("Yo", "c"))]
    reader = reader_of(*lines, chat("One?", "First."))
    assert histories(list(reader)) == {"First.": ["Yo", "Hello"]}
    assert (reader.report.copies, reader.report.unclear) == (1, 2)


def test_reply_without_history_is_counted_but_not_a_sample() -> None:
    lines = [chat("One?", "First.", "Two?", "Second."), chat("Hi", "Hello.", who="bob")]
    reader = reader_of(*lines, chat("Three?", "Third."))
    assert histories(list(reader)) == {"Third.": ["First.", "Second."]}
    assert (reader.report.too_early, reader.report.users) == (3, 2)
    with pytest.raises(
        MissingData, match=r"3 rows left out because their history is too short.* from another conversation"
    ):
        read(*lines)


def test_samples_beyond_the_maximum_are_spread_and_counted() -> None:
    lines = [chat(f"Question {day}?", f"Reply {day}", time=at(day)) for day in range(1, 12)]
    reader = reader_of(*lines, max_samples_per_user=4)
    assert [sample.target for sample in reader] == ["Reply 4", "Reply 6", "Reply 9", "Reply 11"]
    assert reader.report.left_out == {"replies beyond max_samples_per_user=4": 6}
    assert len(read(*lines, max_samples_per_user=10)) == 10
    with pytest.raises(ConfigError, match="at least 1"):
        reader_of(*lines, max_samples_per_user=0)


def test_max_history_keeps_stated_preferences() -> None:
    lines: list[dict[str, Any]] = [{"user": "ann", "preference": "Short, please.", "time": at(1)}]
    lines += [chat(f"Question {day}?", f"Reply {day}", time=at(day)) for day in range(2, 7)]
    reader = reader_of(*lines, max_history=2)
    assert histories(list(reader))["Reply 6"] == ["Short, please.", "Reply 5"]
    assert reader.report.cut_items == 0 + 0 + 1 + 2 + 3


def test_users_do_not_share_histories() -> None:
    lines = [chat(f"Question {day}?", f"Reply {who}{day}", who=who, time=at(day)) for day in (1, 2) for who in "ab"]
    samples = read(*lines)
    assert histories(samples) == {"Reply a2": ["Reply a1"], "Reply b2": ["Reply b1"]}
    assert [sample.user_id for sample in samples] == ["a", "b"]


# ---- files


def some_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        chat(f"Question {day}?", f"Reply {who}{day}", "And?", f"More {day}", who=who, time=at(day))
        for who in ("ann", "bob", "cem")
        for day in (1, 2)
    ]
    pair = {"prompt": [user("Hi")], "chosen": [assistant("Yo.")], "rejected": [assistant("No.")]}
    return [*lines, {"user": "ann", "preference": "Short.", "time": at(1)}, pair | {"user": "bob", "time": at(3)}]


def test_files_of_every_kind_give_equal_samples(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = some_lines()
    expected = read(*lines)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "chats.jsonl").write_text(text)
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "chats.json").write_text(json.dumps(lines))
    columns = {key: [line.get(key) for line in lines] for key in {key: 0 for line in lines for key in line}}
    parquet.write_table(pyarrow.table(columns), tmp_path / "chats.parquet")
    for name in ("chats.jsonl", "chats.jsonl.gz", "chats.json", "chats.parquet"):
        assert list(open_conversations([tmp_path / name])) == expected, name
    with pytest.raises(ConfigError, match=r"one of \*\.json"):
        open_conversations([tmp_path / "chats.csv"])


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    lines = some_lines()
    for name, part in (("a.jsonl", lines[:3]), ("b.jsonl", lines[3:])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in part))
    assert list(open_conversations([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])) == read(*lines)


def test_data_set_in_lamp_layout_reads_back_equal(tmp_path: Path) -> None:
    reader = reader_of(*some_lines())
    samples = list(reader)
    write_lamp(reader, tmp_path, "train", task=reader.task)
    again = open_dataset(tmp_path, "train")
    assert list(again) == samples
    assert again.task == reader.task
    assert {kind_and_texts(item)[0] for sample in samples for item in sample.history} == {"answer", "preference"}
    assert [sample.rejected for sample in samples if sample.rejected] == [("No.",)]


def test_split_by_user_is_deterministic(tmp_path: Path) -> None:
    parts = [split_by_user(reader_of(*some_lines()), tmp_path / name, share=0.4) for name in "ab"]
    assert parts[0] == parts[1]
    assert (parts[0].train_users, parts[0].dev_users) == (2, 1)
    users = [{sample.user_id for sample in open_dataset(tmp_path / "a", split)} for split in ("train", "dev")]
    assert users[0].isdisjoint(users[1])
    assert list(open_dataset(tmp_path / "a", "dev")) == list(open_dataset(tmp_path / "b", "dev"))


def aloe(name: str, question: str) -> dict[str, Any]:
    answers = {"preferred": "Yes.", "rejected": ["No."]}
    turns = [{"user": text, "assistant": answers, "chosen": "preferred"} for text in (question, "Sure?")]
    return {"id": name, "conversations": turns}


@pytest.mark.parametrize(
    "other", [chat("Hi", "Hello", who="7"), aloe("7", "Coffee?"), {"user": "7", "preference": "Be brief."}]
)
@pytest.mark.parametrize("is_first", [True, False])
def test_id_of_a_conversation_without_a_user_must_be_unique(other: dict[str, Any], is_first: bool) -> None:
    records = [aloe("7", "Tea?"), other]
    with pytest.raises(RecordError, match="the id 7 belongs to a record without a user and also to other data"):
        read(*(records if is_first else reversed(records)))


def test_conversation_without_a_user_may_occur_twice() -> None:
    assert len(read(aloe("7", "Tea?"), aloe("8", "Coffee?"), aloe("7", "Tea?"))) == 4


def test_thousands_of_lines_with_the_same_start_are_one_conversation() -> None:
    lines = [chat("Hi", "Hello!", "And?", f"Answer {number}") for number in range(6_000)]
    (sample,) = read(*lines, chat("Tea?", "A drink."), max_history=3)
    assert sample.target == "A drink."
    assert [item.fields[-1][1] for item in sample.history] == ["Answer 5997", "Answer 5998", "Answer 5999"]
