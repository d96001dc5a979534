"""PEFT-U: samples with a user's earlier labels, and reports of broken samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from published import SECRET, labelled, shape, users, write

from personaplug.data.benchmarks.peft_u import PeftUReader
from personaplug.errors import ConfigError, MissingData, RecordError


def test_sample_asks_for_a_label_after_earlier_labels(tmp_path: Path) -> None:
    reader = PeftUReader(write(tmp_path / "d.json", users()), "dev")
    (sample,) = reader
    assert (reader.task.kind, reader.task.labels, reader.task.metrics) == ("label", ("even", "odd"), ("accuracy", "f1"))
    assert (sample.id, sample.user_id, sample.target, sample.query) == ("7/v1", "7", "odd", f"{SECRET} is odd")
    assert sample.prompt.startswith(
        "Which label does this user give to the text? Answer with one of: even, odd.\ntext: "
    )
    assert [(item.id, item.answer) for item in sample.history] == [("t1", "odd"), ("t2", "even"), ("t3", "odd")]
    assert sample.history[0].text == f"text: {SECRET} is odd label: odd"


def test_train_history_holds_earlier_samples_only(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", users())
    train = list(PeftUReader(path, "train", queries_per_user=2))
    assert shape(train) == [("7/t2", ["t1"]), ("7/t3", ["t1", "t2"]), ("9/t1", [])]
    assert shape(list(PeftUReader(path, "test"))) == [("7/s1", ["t1", "t2", "t3"]), ("9/s1", ["t1"])]


def test_folder_with_both_files_reads_the_one_without_leak(tmp_path: Path) -> None:
    write(tmp_path / "user_data_leaked.json", users())
    write(tmp_path / "user_data_no_leak.json.gz", {"1": {**users()["9"], "test": {}}})
    assert [sample.user_id for sample in PeftUReader(tmp_path, "train")] == ["1"]


def test_several_labels_count_as_one(tmp_path: Path) -> None:
    dataset = users()
    dataset["7"]["val"]["v1"] = labelled(["sad", "glad"])
    reader = PeftUReader(write(tmp_path / "d.json", dataset), "dev", instruction="What is felt in the text: below?")
    (sample,) = reader
    assert (sample.target, reader.task.labels) == ("glad, sad", ("even", "glad, sad", "odd"))
    assert sample.prompt.startswith("What is felt in the text: below?\ntext: ")
    listed = next(iter(PeftUReader(tmp_path / "d.json", "dev"))).prompt
    assert "one of: even, glad, odd, sad, or several" in listed
    with pytest.raises(ConfigError, match="no line that begins with"):
        PeftUReader(tmp_path / "d.json", "dev", instruction="a\ntext: b")


BROKEN_LABELLED: dict[str, tuple[list[str], Any, str]] = {
    "user": (["7"], SECRET, "user 7: it is not a JSON object"),
    "no split": (["7"], {"train": {}}, "user 7: its 'test' is missing"),
    "sample": (["7", "test", "s1"], SECRET, "user 7, sample s1: it is not a JSON object"),
    "no text": (["7", "test", "s1"], {"label": ["odd"]}, "user 7, sample s1: its 'text' is missing"),
    "blank text": (["7", "test", "s1"], labelled(text=" "), "user 7, sample s1: its 'text' is empty"),
    "no label": (["7", "test", "s1"], labelled([]), "user 7, sample s1: its 'label' is an empty list"),
    "object as label": (
        ["7", "test", "s1"],
        {"text": "x", "label": {SECRET: 1}},
        "sample s1: its 'label' is an object",
    ),
    "in train too": (
        ["7", "train", "s1"],
        labelled(),
        "user 7, sample s1: the user's train split has a sample with the same id",
    ),
}


@pytest.mark.parametrize("name", BROKEN_LABELLED)
def test_broken_labelled_sample_is_reported_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    steps, broken, message = BROKEN_LABELLED[name]
    dataset = users()
    at: Any = dataset
    for step in steps[:-1]:
        at = at[step]
    at[steps[-1]] = broken
    path = write(tmp_path / "d.json", dataset)
    with pytest.raises(RecordError) as caught:
        list(PeftUReader(path, "test"))
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    reader = PeftUReader(path, "test", skip_bad=1)
    assert [sample.id for sample in reader] == ["9/s1"]
    assert reader.report.skipped == 1


def test_broken_train_sample_is_not_in_history(tmp_path: Path) -> None:
    dataset = users()
    dataset["7"]["train"]["t2"]["text"] = None
    reader = PeftUReader(write(tmp_path / "d.json", dataset), "dev", skip_bad=1)
    assert shape(list(reader)) == [("7/v1", ["t1", "t3"])]


def test_file_without_closed_label_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="no sample with a label"):
        PeftUReader(write(tmp_path / "none.json", {"7": {"train": {}}}), "dev")
    many = {str(number): labelled(f"answer {number}") for number in range(3000)}
    with pytest.raises(ConfigError, match="3000 different labels"):
        PeftUReader(write(tmp_path / "many.json", {"7": {"train": many, "val": {}}}), "dev")
    (tmp_path / "cut.json").write_text('{"7": {')
    with pytest.raises(RecordError, match="not valid JSON"):
        PeftUReader(tmp_path / "cut.json", "dev")
    with pytest.raises(ConfigError, match="queries_per_user"):
        PeftUReader(tmp_path / "many.json", "dev", queries_per_user=0)
