"""Folders in LaMP's layout: declared tasks, samples read and written, and every defect."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import traceback
import tracemalloc
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from personaplug.data import LAMP_TASKS, load_task, open_dataset, write_lamp
from personaplug.data.parsing import Flaw, as_datetime, as_text, query_of
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.task import ReadReport, Task
from personaplug.data.task_registry import lamp_task, parse_task
from personaplug.errors import ConfigError, MissingData, RecordError, RunConflict, StorageError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SECRET = "zanzibar"  # part of every user text; no error may contain it
REVIEW = "What is the score of the following review on a scale of 1 to 5? review: "


def question(number: int | str = 1, **changes: Any) -> dict[str, Any]:
    items = [
        {"id": "i1", "text": f"{SECRET} one", "score": "4"},
        {"id": "i2", "text": f"{SECRET} two", "score": 5},
    ]
    return {"id": number, "user_id": "u", "input": f"{REVIEW}{SECRET}", "profile": items, **changes}


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def put(folder: Path, questions: Any, golds: Any = None, *, split: str = "dev", task: str = "LaMP_3") -> Path:
    (folder / f"{split}_questions.json").write_text(json.dumps(questions))
    if golds is not None:
        (folder / f"{split}_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))
    return folder


def gold(number: int | str = 1, output: Any = "3") -> dict[str, Any]:
    return {"id": number, "output": output}


def read(folder: Path, split: str = "dev", **settings: Any) -> list[Sample]:
    return list(open_dataset(folder, split, **settings))


# ---- tasks


def test_built_in_tasks_are_the_public_ones() -> None:
    assert list(LAMP_TASKS) == ["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"]
    assert len(LAMP_TASKS["LaMP_2"].labels) == 15
    assert LAMP_TASKS["LaMP_1"].answer_field is None
    assert LAMP_TASKS["LaMP_3"].field_names == ("text", "score")
    for name, task in LAMP_TASKS.items():
        assert lamp_task(name.replace("_", "-")) is task


def test_unavailable_lamp_task_error_gives_the_reason() -> None:
    with pytest.raises(ConfigError, match="not public"):
        lamp_task("LaMP-6")
    with pytest.raises(ConfigError, match="did you mean 'LaMP_4'"):
        lamp_task("LaMP_44")


INPUTS = {
    "LaMP_2": ("Which tag … tags: [sci-fi] description: A description: of it", "A description: of it"),
    "LaMP_3": (f"{REVIEW}Bad review: yes", "Bad review: yes"),
    "LaMP_4": ("Generate a headline for the following article: An article: x", "An article: x"),
    "LaMP_5": ("Generate a title for the following abstract of a paper: This paper: y", "This paper: y"),
    "LaMP_7": ("Paraphrase the following tweet without any explanation before or after it: a: b", "a: b"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_query_follows_the_first_marker(name: str) -> None:
    prompt, query = INPUTS[name]
    assert query_of(LAMP_TASKS[name], prompt) == query


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Plain", "Titles"),
        ('The "Big" One', 'Another "quoted"'),
        ('Ends in a quote"', '"Begins with one'),
        ("[2]: not a candidate", "[1]: neither"),
        (
            "Two\nlines",
            "",
        ),
    ],
)
def test_query_of_lamp_1_takes_candidates_with_any_quotes(first: str, second: str) -> None:
    prompt = (
        'For an author who has written the paper with the title "Own "quoted", title [1]: "x"", which reference '
        f'is related? Just answer with [1] or [2] without explanation. [1]: "{first}" [2]: "{second}"'
    )
    assert query_of(LAMP_TASKS["LaMP_1"], prompt) == f"{first} {second}"
    assert query_of(parse_task({"name": "Citation", "like": "LaMP-1"}), prompt) == f"{first} {second}"


@pytest.mark.parametrize("name", LAMP_TASKS)
def test_missing_marker_error_names_the_record(tmp_path: Path, name: str) -> None:
    item = {"id": 1, **dict.fromkeys(LAMP_TASKS[name].field_names, "x")}
    bad = {"id": "q9", "input": f"{SECRET} without the wording", "profile": [item]}
    with pytest.raises(RecordError, match=r"dev_questions\.json, question 1 \(id q9\): its input") as caught:
        read(put(tmp_path, [bad]), task=name)
    assert SECRET not in str(caught.value)


def test_empty_query_is_an_error() -> None:
    with pytest.raises(Flaw, match="no query"):
        query_of(LAMP_TASKS["LaMP_3"], REVIEW)


def test_without_a_marker_the_input_is_the_query() -> None:
    assert query_of(parse_task({"name": "x", "kind": "text", "item_fields": ["t"]}), "whole") == "whole"


# ---- the task of a folder

OWN = {"name": "Own", "kind": "rating", "labels": ["1", "2"], "query_after": "q: ", "item_fields": ["text"],
       "answer_field": "score", "metrics": ["mae"], "max_new_tokens": 3}  # fmt: skip


def declare(folder: Path, values: Any) -> Path:
    (folder / "task.json").write_text(json.dumps(values))
    return folder


def test_declared_task_is_read_completely(tmp_path: Path) -> None:
    expected = Task("Own", "rating", ("text",), "score", ("mae",), ("1", "2"), "q: ", 3)
    assert load_task(declare(tmp_path, OWN)) == expected


def test_like_inherits_and_overrides() -> None:
    task = parse_task({"name": "News", "like": "LaMP_4", "max_new_tokens": 30, "query_after": "text: "})
    assert (task.name, task.item_fields, task.max_new_tokens) == ("News", ("title", "text"), 30)
    assert task.query_after == "text: "
    pair = parse_task({"name": "Pair", "like": "LaMP_1", "query_after": "which: "})
    assert (pair.query_after, pair.query_pattern) == ("which: ", "")


def test_prompt_templates_are_declared_and_inherited(tmp_path: Path) -> None:
    plain = load_task(declare(tmp_path, OWN))
    assert (plain.item_template, plain.item_joint, plain.history_after) == ("", ", and ", "")
    assert plain.history_template == "{history}. {input}"
    wording = {
        "item_template": "{score} <- {text} {text} { text",
        "item_joint": "; ",
        "history_template": "{input} after {history}",
        "history_after": "score",
    }
    own = load_task(declare(tmp_path, {**OWN, **wording}))
    assert {key: getattr(own, key) for key in wording} == wording
    like = parse_task({"name": "x", "like": "LaMP_5", "item_joint": " | "})
    assert (like.item_template, like.item_joint) == (LAMP_TASKS["LaMP_5"].item_template, " | ")
    assert like.history_template == LAMP_TASKS["LaMP_5"].history_template


@pytest.mark.parametrize(
    "change", [{"item_fields": ["text"]}, {"answer_field": None}, {"item_fields": ["title", "body"]}]
)
def test_item_template_is_inherited_only_with_its_fields(change: dict[str, Any]) -> None:
    assert parse_task({"name": "x", "like": "LaMP_4", **change}).item_template == ""
    own = parse_task({"name": "x", "like": "LaMP_4", **change, "item_fields": ["title"], "item_template": "<{title}>"})
    assert own.item_template == "<{title}>"
    assert parse_task({"name": "x", "like": "LaMP_1", "item_fields": ["title"]}).history_after == ""
    same = {"item_fields": ["title", "text"], "answer_field": "title"}
    assert parse_task({"name": "x", "like": "LaMP_4", **same}).item_template == LAMP_TASKS["LaMP_4"].item_template


@pytest.mark.parametrize("name", LAMP_TASKS)
def test_task_round_trips_through_json(name: str) -> None:
    task = LAMP_TASKS[name]
    assert parse_task(json.loads(json.dumps(asdict(task)))) == task
    assert parse_task({"name": name, "like": name}) == task


def test_task_argument_precedes_task_json_which_precedes_outputs(tmp_path: Path) -> None:
    put(tmp_path, [], [], task="LaMP-4")
    assert load_task(tmp_path).name == "LaMP_4"
    declare(tmp_path, OWN)
    assert load_task(tmp_path).name == "Own"
    assert load_task(tmp_path, task="LaMP-2").name == "LaMP_2"
    assert load_task(tmp_path, task="Own").labels == ("1", "2")


def test_folder_name_is_not_a_task(tmp_path: Path) -> None:
    folder = tmp_path / "LaMP_7"
    folder.mkdir()
    with pytest.raises(MissingData, match=r"task\.json"):
        load_task(folder)
    assert load_task(put(folder, [], [], task="LaMP_3")).name == "LaMP_3"


def test_outputs_with_different_or_unknown_tasks_are_refused(tmp_path: Path) -> None:
    put(tmp_path, [], [], task="Mine")
    with pytest.raises(ConfigError, match=r"Mine.*needs a task\.json"):
        load_task(tmp_path)
    put(tmp_path, [], [], split="train", task="LaMP_3")
    with pytest.raises(ConfigError, match="different tasks"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_feilds": ["x"]}, "unknown key 'item_feilds'; did you mean 'item_fields'?"),
        ({"kind": "score"}, "'kind' should be 'label', 'rating', 'text' or 'chat', found 'score'"),
        ({"kind": ["text"]}, "'kind' should be 'label', 'rating', 'text' or 'chat', found ['text']"),
        ({"labels": []}, "need 'labels'"),
        ({"labels": ["good", "bad"]}, "should be numbers"),
        ({"labels": ["2", "1"]}, "should ascend and be within ±1e9"),
        ({"labels": ["1", "nan"]}, "should be numbers"),
        ({"labels": ["1", "1_0"]}, "should be numbers"),
        ({"max_new_tokens": 10**12}, "max_new_tokens"),
        ({"labels": ["1"]}, "a rating needs two labels or more"),
        ({"labels": "12"}, "'labels' should be a list"),
        ({"labels": [True, "2"]}, "a label is true or false"),
        ({"kind": "label", "labels": ["a", "a"]}, "'labels': the list contains an entry twice"),
        ({"kind": "label", "labels": ["a "]}, "blanks"),
        ({"kind": "text"}, "'text' and 'chat' have none"),
        ({"item_fields": "text"}, "'item_fields' should be a list"),
        ({"item_fields": []}, "'item_fields': value should have at least 1 item"),
        ({"metrics": ["rouge_1", "nll"]}, "remove 'nll' from 'metrics'"),
        ({"item_fields": ["id"]}, "'id' is a reserved key of items"),
        ({"answer_field": 3}, "'answer_field' should be a valid string, found 3"),
        ({"name": " "}, "'name' is empty"),
        ({"max_new_tokens": "4"}, "'max_new_tokens' should be a valid integer, found '4'"),
        ({"max_new_tokens": 0}, "'max_new_tokens' should be greater than or equal to 1, found 0"),
        ({"metrics": ["mae", ""]}, "'metrics.1': string should have at least 1 character"),
        ({"max_new_tokens": True}, "'max_new_tokens' should be a valid integer, found True"),
        ({"query_pattern": "(a)"}, "not both"),
        ({"query_after": "", "query_pattern": "("}, "not a valid RE2 regular expression"),
        ({"query_after": "", "query_pattern": "a"}, "needs a group"),
        ({"item_template": 3}, "'item_template' should be a valid string, found 3"),
        ({"item_template": "words"}, "contains no field of an item"),
        ({"item_template": "{texd}"}, "names {texd}; did you mean 'text'?"),
        ({"item_template": "{text} {}"}, "names {}; expected one of: score, text"),
        ({"item_joint": None}, "'item_joint' should be a valid string, found None"),
        ({"history_template": "{input}"}, "should contain {history} and {input}, each once"),
        ({"history_template": "{history} {history} {input}"}, "each once"),
        ({"history_template": "{history} {input} {text}"}, "each once"),
        ({"history_after": 1}, "'history_after' should be a valid string, found 1"),
        ({"histori_after": "x"}, "unknown key 'histori_after'; did you mean 'history_after'?"),
        ({"like": "LaMP_9"}, "no built-in task"),
        ({"like": 4}, "'like' should be"),
    ],
)
def test_wrong_declaration_error_names_file_and_defect(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_task(declare(tmp_path, {**OWN, **change}))
    assert "task.json" in str(caught.value) or "built-in" in str(caught.value)


@pytest.mark.parametrize("key", ["name", "kind", "item_fields"])
def test_declaration_without_required_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
        parse_task(without(OWN, key))


@pytest.mark.parametrize("content", ["{", "[]", '"x"', ""])
def test_task_json_without_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(ConfigError, match=r"task\.json"):
        load_task(tmp_path)


def test_number_labels_become_text() -> None:
    assert parse_task({**OWN, "labels": [1, 1.5, 2.0]}).labels == ("1", "1.5", "2")


# ---- reading


def test_sample_is_read_completely(tmp_path: Path) -> None:
    reader = open_dataset(put(tmp_path, [question(7)], [gold(7, 3)]), "dev")
    (sample,) = reader
    assert (sample.id, sample.user_id, sample.query, sample.target) == ("7", "u", SECRET, "3")
    assert sample.prompt == f"{REVIEW}{SECRET}"
    assert sample.history[1] == HistoryItem("i2", (("text", f"{SECRET} two"), ("score", "5")), "score")
    assert sample.history[1].answer == "5"
    assert reader.report == ReadReport(rows=1, users=1, samples=1, items=2)
    assert SECRET not in repr(sample) + repr(reader.report)


def test_question_without_user_date_and_items_is_read(tmp_path: Path) -> None:
    official = without(question(1, profile=[]), "user_id")
    (sample,) = read(put(tmp_path, [official], [gold()]))
    assert (sample.user_id, sample.owner, sample.history) == (None, "sample:1", ())


def test_item_needs_only_the_fields_of_the_task(tmp_path: Path) -> None:
    profile = [{"id": 1, "text": "", "score": 4.0, "category": ["anything"], "title": None}]
    (sample,) = read(put(tmp_path, [question(profile=profile)], [gold()]))
    assert sample.history[0].fields == (("text", ""), ("score", "4"))


def test_split_without_golds_has_no_targets(tmp_path: Path) -> None:
    put(tmp_path, [question()], split="test")
    assert [sample.target for sample in read(tmp_path, "test", task="LaMP_3")] == [None]


def test_gzipped_file_equals_the_plain_file_which_has_precedence(tmp_path: Path) -> None:
    put(tmp_path, [question(1), question(2)], [gold(1), gold(2)])
    plain = read(tmp_path)
    for name in ("dev_questions.json", "dev_outputs.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    assert read(tmp_path) == plain
    put(tmp_path, [question(3)], [gold(3)])
    assert [sample.id for sample in read(tmp_path)] == ["3"]


def test_byte_order_mark_and_leading_blanks_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, [question()], [gold()])
    path = tmp_path / "dev_questions.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + path.read_bytes())
    assert len(read(tmp_path)) == 1


def test_reader_second_pass_has_a_new_report(tmp_path: Path) -> None:
    reader = open_dataset(put(tmp_path, [question(1), question(2)], [gold(1), gold(2)]), "dev")
    assert list(reader) == list(reader)
    assert reader.report.samples == 2


def test_open_dataset_accepts_a_task_object(tmp_path: Path) -> None:
    put(tmp_path, [question()], [gold()])
    assert list(open_dataset(tmp_path, "dev", task=LAMP_TASKS["LaMP_3"])) == read(tmp_path)


def dated(*days: Any) -> dict[str, Any]:
    items = [{"id": index, "text": "t", "score": 1, "date": day} for index, day in enumerate(days)]
    return question(profile=items)


def test_dated_items_are_sorted(tmp_path: Path) -> None:
    days = ["2015-06-01 12:00:00", "2014", "2015-06-01T08:30:00Z", "2015-06", 2013, "2015-05-31"]
    (sample,) = read(put(tmp_path, [dated(*days)], [gold()]))
    assert [item.id for item in sample.history] == ["4", "1", "5", "3", "2", "0"]
    assert sample.history[0].date == date(2013, 1, 1)
    assert sample.history[-1].date == date(2015, 6, 1)


def test_items_with_a_missing_date_keep_file_order(tmp_path: Path) -> None:
    (sample,) = read(put(tmp_path, [dated("2015-01-02", None, "2014-01-01")], [gold()]))
    assert [item.id for item in sample.history] == ["0", "1", "2"]


@pytest.mark.parametrize(("cap", "expected"), [(3, ["1", "2", "0"]), (2, ["2", "0"]), (0, [])])
def test_max_history_keeps_latest_items_and_counts_others(tmp_path: Path, cap: int, expected: list[str]) -> None:
    put(tmp_path, [dated("2015-01-03", "2015-01-01", "2015-01-02")], [gold()])
    reader = open_dataset(tmp_path, "dev", max_history=cap)
    assert [item.id for item in next(iter(reader)).history] == expected
    assert (reader.report.cut_items, reader.report.items) == (3 - cap, cap)


@pytest.mark.parametrize(
    "value",
    ["", "soon", "2015-13-01", "2015-02-30", "2015/13/01", "0000", "2015-01-01 25:00", "15", 15, True, ["2015"],
     "143311680012"],
)  # fmt: skip
def test_malformed_date_is_refused(value: object) -> None:
    with pytest.raises(Flaw):
        as_datetime(value)


def test_as_text_converts_numbers_and_refuses_other_values() -> None:
    assert [as_text(value, "it") for value in ("a", 3, 3.0, 2.5)] == ["a", "3", "3", "2.5"]
    refused: list[object] = [None, True, [], {}, float("nan"), float("inf"), 10**5000, "\ud83d"]
    for value in refused:
        with pytest.raises(Flaw, match="it is"):
            as_text(value, "it")


# ---- broken records

ITEM = {"id": "i", "text": f"{SECRET} x", "score": "4"}

BROKEN_QUESTIONS: dict[str, tuple[Any, str]] = {
    "no object": (f"{SECRET}", "question 2: it is not a JSON object"),
    "no id": (without(question(), "id"), "question 2: its 'id' is missing"),
    "blank id": (question(" "), "question 2: its 'id' is empty"),
    "id of a wrong type": (question(id=[1]), "question 2: its 'id' is a list"),
    "no input": (without(question(2), "input"), "(id 2): its 'input' is missing"),
    "empty input": (question(2, input=" "), "(id 2): its 'input' is empty"),
    "input of a wrong type": (question(2, input=None), "(id 2): its 'input' is null"),
    "user of a wrong type": (question(2, user_id={"a": SECRET}), "(id 2): its 'user_id' is an object"),
    "no profile": (without(question(2), "profile"), "(id 2): its 'profile' is missing"),
    "profile no list": (question(2, profile={SECRET: 1}), "(id 2): its 'profile' is not a list"),
    "item no object": (
        question(2, profile=[ITEM, SECRET]),
        "(id 2): item 2 of its profile: it is not a JSON",
    ),
    "item without id": (
        question(2, profile=[without(ITEM, "id")]),
        "item 1 of its profile: its 'id' is missing",
    ),
    "item without field": (question(2, profile=[without(ITEM, "score")]), "its 'score' is missing"),
    "item with a wrong type": (question(2, profile=[{**ITEM, "text": [SECRET]}]), "its 'text' is a list"),
    "item with a bad date": (question(2, profile=[{**ITEM, "date": SECRET}]), "its 'date' has the form aaaaaaaa,"),
    "no marker": (question(2, input=SECRET), "does not contain the marker 'review: '"),
    "id twice": (question(1), "question 2 (id 1): an earlier record has the same id"),
    "no gold": (question(99), "question 2 (id 99): its id is not among the 3 golds"),
}


def three_with(broken: Any) -> list[Any]:
    return [question(1), broken, question(3)]


@pytest.mark.parametrize("name", BROKEN_QUESTIONS)
def test_broken_question_is_reported_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    broken, message = BROKEN_QUESTIONS[name]
    put(tmp_path, three_with(broken), [gold(1), gold(2), gold(3)])
    with pytest.raises(RecordError, match=re.escape(message)) as caught:
        read(tmp_path)
    text = "".join(traceback.format_exception(caught.value))
    assert caught.value.file.endswith("dev_questions.json")
    assert SECRET not in str(caught.value)
    assert f"{SECRET} x" not in text
    # If the question has no valid id, its gold has no question, which is a second problem.
    reader = open_dataset(tmp_path, "dev", skip_bad=2)
    assert [sample.id for sample in reader] == ["1", "3"]
    assert 1 <= reader.report.skipped <= 2
    assert message in reader.report.problems[0]


@pytest.mark.parametrize(
    ("bad_gold", "message"),
    [
        ({"id": 2}, "question 2 (id 2): its gold: its 'output' is missing"),
        (gold(2, None), "its gold: its 'output' is null"),
        (gold(2, "6"), "its answer is not one of the 5 labels"),
        (gold(1), "question 1 (id 1): two golds have its id"),
    ],
)
def test_broken_gold_is_reported_with_its_question(tmp_path: Path, bad_gold: Any, message: str) -> None:
    put(tmp_path, [question(1), question(2)], [gold(1), bad_gold])
    with pytest.raises(RecordError, match=re.escape(message)):
        read(tmp_path)


def test_gold_without_id_or_question_is_reported(tmp_path: Path) -> None:
    put(tmp_path, [question(1)], [gold(1), {"output": "3"}, gold(5)])
    reader = open_dataset(tmp_path, "dev", skip_bad=2)
    assert len(list(reader)) == 1
    assert "gold 2: its 'id' is missing" in reader.report.problems[0]
    assert "gold (id 5): no question has this id" in reader.report.problems[1]
    with pytest.raises(RecordError, match="no question has this id"):
        read(tmp_path, skip_bad=1)


def test_target_label_loses_outer_blanks_and_text_keeps_them(tmp_path: Path) -> None:
    (sample,) = read(put(tmp_path, [question()], [gold(output=" 3\n")]))
    assert sample.target == "3"
    article = question(input="… article: a", profile=[])
    (sample,) = read(put(tmp_path, [article], [gold(output=" A headline ")], task="LaMP_4"))
    assert sample.target == " A headline "


@pytest.mark.parametrize(
    ("content", "position"),
    [
        (b"", "at the start"),
        (b'{"a": []}', "at the start"),
        (json.dumps([question(1), question(2)]).encode()[:-30], "after question 1"),
        (json.dumps([question(1)]).encode() + b"zanzibar", "after question 1"),
        (json.dumps([question(1)]).encode()[:-1] + b', "zanzibar\xff"]', "after question 1"),
    ],
)
def test_broken_json_is_never_skipped(tmp_path: Path, content: bytes, position: str) -> None:
    put(tmp_path, [])
    (tmp_path / "dev_questions.json").write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read(tmp_path, task="LaMP_3", skip_bad=9)
    assert caught.value.position == position
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("opening", ["[", '{"k":', '["]",', r'[{"\\\"]}":'])
def test_deep_nesting_is_refused_in_little_memory(tmp_path: Path, opening: str) -> None:
    (tmp_path / "items.json").write_text(f'[{{"text": "{SECRET}", "other": {opening * 20_000}')
    program = f"""
import resource
from personaplug.data import LAMP_TASKS, read_items
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
read_items({str(tmp_path / "items.json")!r}, task=LAMP_TASKS["LaMP_3"])
"""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=alone)
    assert "RecordError" in done.stderr
    assert "nested more than 64 deep" in done.stderr
    assert SECRET not in done.stderr


def test_brackets_in_strings_do_not_count_as_nesting(tmp_path: Path) -> None:
    nested: Any = "[{" * 200
    for level in range(63):  # with the question, 64
        nested = {'"\\': nested, "]": "}" * level} if level % 2 else [nested]
    wordy = [question(number, note='\\" [' * (13_000 + number)) for number in range(20)]
    assert len(read(put(tmp_path, [*wordy, question(99, note=nested)]), task="LaMP_3")) == 21
    put(tmp_path, [*wordy, question(99, note=[nested])])
    with pytest.raises(RecordError, match="nested more than 64 deep"):
        read(tmp_path, task="LaMP_3", skip_bad=9)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"name": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"name": ' + "[" * 900 + "]" * 900 + "}",
     '{"max_new_tokens": ' + "1" * 5000 + "}", "\ud800", '{"name": NaN}'],
    ids=["open", "closed", "900 deep", "5000 digits", "surrogate", "nan"],
)  # fmt: skip
def test_unusable_task_json_is_a_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "task.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError, match=r"task\.json"):
        load_task(tmp_path)


@pytest.mark.parametrize("number", [2**63, -(2**64), int("7" * 200)], ids=["2^63", "-2^64", "200 digits"])
def test_large_numbers_are_ids(tmp_path: Path, number: int) -> None:
    large = question(number, user_id=number, profile=[{"id": number, "text": "x", "score": 1, "other": number}])
    put(tmp_path, [question(1), large, question(3)], [gold(1), gold(number), gold(3)])
    samples = read(tmp_path)
    assert [each.id for each in samples] == ["1", str(number), "3"]
    assert (samples[1].user_id, samples[1].history[0].id) == (str(number), str(number))


@pytest.mark.parametrize(
    ("value", "message"),
    [("1" * 5000, "question 1: .*digits"), ("1e400", "question 1: .*1e308"),
     ("1" * 400, r"\(id 2\).*has 400 characters")],
)  # fmt: skip
def test_too_large_number_is_a_clear_error(tmp_path: Path, value: str, message: str) -> None:
    put(tmp_path, [question(1), question(2, user_id=0)], [gold(1), gold(2)])
    path = tmp_path / "dev_questions.json"
    path.write_text(path.read_text().replace('"user_id": 0', f'"user_id": {value}'))
    with pytest.raises(RecordError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 400, -4])
def test_broken_gzip_is_never_skipped(tmp_path: Path, keep: int) -> None:
    packed = gzip.compress(json.dumps([question(number) for number in range(200)]).encode())
    (tmp_path / "dev_questions.json.gz").write_bytes(packed[:keep])
    with pytest.raises(RecordError, match=r"dev_questions\.json\.gz"):
        read(tmp_path, task="LaMP_3", skip_bad=9)
    (tmp_path / "dev_questions.json.gz").write_bytes(b"[] is no gzip")
    with pytest.raises(RecordError, match="gzip"):
        read(tmp_path, task="LaMP_3", skip_bad=9)


def test_missing_file_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="no data folder"):
        open_dataset(tmp_path / "nowhere", "dev")
    put(tmp_path, [question()], [gold()], split="train")
    with pytest.raises(
        MissingData, match=r"neither dev_questions\.json nor dev_questions\.json\.gz.*in the folder: train"
    ):
        open_dataset(tmp_path, "dev")


def test_setting_out_of_range_is_refused(tmp_path: Path) -> None:
    put(tmp_path, [question()], [gold()])
    with pytest.raises(ConfigError, match="skip_bad"):
        open_dataset(tmp_path, "dev", skip_bad=-1)
    with pytest.raises(ConfigError, match="max_history"):
        open_dataset(tmp_path, "dev", max_history=-1)


def test_long_id_stays_out_of_messages(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as caught:
        read(put(tmp_path, [question(f"a text of the user {SECRET} " * 5, input="x")]), task="LaMP_3")
    assert SECRET not in str(caught.value)


def peak_of_reading(folder: Path, count: int) -> int:
    folder.mkdir()
    items = [{"id": index, "text": f"some text of an item {index} " * 8, "score": "3"} for index in range(20)]
    put(folder, [question(number, profile=items) for number in range(count)], [gold(n) for n in range(count)])
    reader = open_dataset(folder, "dev")
    tracemalloc.start()
    try:
        assert sum(1 for _ in reader) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reader_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    few, many = peak_of_reading(tmp_path / "few", 300), peak_of_reading(tmp_path / "many", 3000)
    size = (tmp_path / "many" / "dev_questions.json").stat().st_size
    # More questions cost only their golds and ids, a few hundred bytes each, and not their texts.
    assert many - few < 2700 * 400
    assert many < size / 8


# ---- writing


def item(number: int, day: date | None = None) -> HistoryItem:
    return HistoryItem(f"i{number}", (("text", f'é "{number}" \n{{x}}'), ("score", str(number))), "score", day)


def sample(name: str, **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "user_id": "u",
        "query": "good 😀",
        "target": "4",
        "history": (item(1), item(2)),
    }
    return Sample(id=name, prompt=f"{REVIEW}good 😀", **{**values, **changes})


def test_written_samples_read_back_equal(tmp_path: Path) -> None:
    samples = [
        sample("a"),
        sample("b", user_id=None, history=()),
        sample("c", history=(item(1, date(2014, 1, 1)), item(2, date(2015, 2, 3)), item(3, date(2015, 2, 3)))),
    ]
    write_lamp(iter(samples), tmp_path / "new" / "folder", "dev", task=LAMP_TASKS["LaMP_3"])
    reader = open_dataset(tmp_path / "new" / "folder", "dev")
    assert list(reader) == samples
    assert reader.task == LAMP_TASKS["LaMP_3"]
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == ["dev_outputs.json", "dev_questions.json", "task.json"]


def test_samples_without_targets_leave_no_outputs_file(tmp_path: Path) -> None:
    task = LAMP_TASKS["LaMP_3"]
    write_lamp([sample("a")], tmp_path, "test", task=task)
    write_lamp([sample("a", target=None)], tmp_path, "test", task=task)
    assert not (tmp_path / "test_outputs.json").exists()
    assert [each.target for each in read(tmp_path, "test")] == [None]


def test_empty_split_is_written_and_refused_when_read(tmp_path: Path) -> None:
    write_lamp([], tmp_path, "dev", task=LAMP_TASKS["LaMP_3"])
    with pytest.raises(MissingData, match=r"dev_questions\.json yields no samples\. It holds no records"):
        read(tmp_path)


def test_split_whose_records_are_all_skipped_is_refused(tmp_path: Path) -> None:
    put(tmp_path, [{"id": 1}], [])
    with pytest.raises(
        MissingData, match=r"0 samples.*from 1 rows; 1 broken records skipped.*question 1 \(id 1\): its 'in"
    ):
        read(tmp_path, skip_bad=9)


# ---- answers in the history


def leaking(number: int, *, text: str = SECRET, score: Any = "3", query: str = SECRET) -> dict[str, Any]:
    return question(number, input=f"{REVIEW}{query}", profile=[{"id": "i", "text": text, "score": score}])


def test_question_in_its_own_history_is_kept_with_a_warning_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = [leaking(1), leaking(2, text=f" {SECRET}\n", score=3.0), leaking(3, score="4"), leaking(4, text="else")]
    put(tmp_path, questions, [gold(number) for number in range(1, 5)])
    reader = open_dataset(tmp_path, "dev")
    assert [len(sample.history) for sample in reader] == [1, 1, 1, 1]
    assert reader.report.own_answers == 2
    assert list(reader)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1  # although the data is read twice
    assert "in 2 of 4 samples" in warnings[0]
    assert SECRET not in warnings[0]


def test_target_that_is_an_item_of_the_history_is_counted(tmp_path: Path) -> None:
    tweets = [question(n, input=f"Paraphrase: say {n}", profile=[{"id": "i", "text": f"tweet {n}"}]) for n in (1, 2)]
    put(tmp_path, tweets, [gold(1, "tweet 1"), gold(2, "tweet 1")], task="LaMP_7")
    reader = open_dataset(tmp_path, "dev")
    assert len(list(reader)) == 2
    assert reader.report.own_answers == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([sample("a"), sample("a")], "same id"),
        ([sample("a"), sample("b", target=None)], "1 of 2 samples have a target"),
        ([sample("a", query="else")], "its query"),
        ([sample("a\nb")], "contains the control character U\\+000A"),
        ([sample("a", user_id="u" * 256)], "its id has 256 characters"),
        ([sample("a", target="9")], "not one of the 5 labels"),
        ([sample("a", history=(HistoryItem("i", (("title", "x"),)),))], "its 'text' is missing"),
    ],
)
def test_samples_that_could_not_be_read_back_are_not_written(tmp_path: Path, bad: list[Sample], message: str) -> None:
    write_lamp([sample("old")], tmp_path, "dev", task=LAMP_TASKS["LaMP_3"])
    with pytest.raises(ConfigError, match=message):
        write_lamp(bad, tmp_path, "dev", task=LAMP_TASKS["LaMP_3"])
    assert [each.id for each in read(tmp_path)] == ["old"]
    assert not list(tmp_path.glob(".*"))


def test_folder_of_another_task_is_not_changed(tmp_path: Path) -> None:
    write_lamp([sample("a")], tmp_path, "dev", task=LAMP_TASKS["LaMP_3"])
    with pytest.raises(RunConflict, match="a task other than LaMP_4"):
        write_lamp([], tmp_path, "train", task=LAMP_TASKS["LaMP_4"])


def test_folder_not_writable_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_lamp([sample("a")], tmp_path / "file" / "folder", "dev", task=LAMP_TASKS["LaMP_3"])


# ---- the real sets


def shared_table() -> list[tuple[str, str, int, int, int]]:
    """Return the rows of the README's table: set, split, questions, shortest and longest history."""
    row = re.compile(r"\| (\w+) \| \w+ \| (train|dev) \| \d+ \| (\d+) \| (\d+) / \d+ / [\d.]+ / (\d+) \|")
    readme = SHARED / "README.md"
    rows = row.findall(readme.read_text()) if readme.is_file() else []
    return [(name, split, int(count), int(least), int(most)) for name, split, count, least, most in rows]


def test_shared_sets_match_their_readme() -> None:
    table = shared_table()
    if not table:
        pytest.skip(f"the real sets are not at {SHARED}")
    assert len(table) == 16
    for name, split, count, least, most in table:
        lengths = [len(each.history) for each in open_dataset(SHARED / name, split)]
        assert (len(lengths), min(lengths), max(lengths)) == (count, least, most), (name, split)
