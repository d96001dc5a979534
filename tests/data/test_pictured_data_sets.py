"""Data sets with pictures and vectors: written, read back, split and copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from picture_rows import BLUE, GREEN, RED, data_url, packed, png

from personaplug.data import open_dataset, write_lamp
from personaplug.data.lamp_writer import PICTURES, copy_with_train
from personaplug.data.pictures import Picture
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.splits import split_by_user
from personaplug.data.task import Task
from personaplug.errors import ConfigError, RecordError

TASK = Task(
    *("Kept", "label", ("product",), "verdict", ("accuracy",)),
    labels=("kept", "returned"),
    query_after="for: ",
    image_field="photo",
    vector_field="embedding",
)
PARTS: list[tuple[Picture | None, bytes | None]] = [
    (Picture(png(RED)), None),
    (Picture(png(BLUE)), packed(0.1, -2)),
    (None, packed(1e-30, 3)),
    (None, None),
    (Picture(png(RED)), None),
]


def _samples(users: int = 3) -> Iterator[Sample]:
    for user in range(users):
        items = tuple(
            HistoryItem(
                *(f"{user}-{number}", (("product", f"thing {number}"), ("verdict", "kept")), "verdict"),
                answer_labels=TASK.labels,
                picture=picture,
                vector=vector,
            )
            for number, (picture, vector) in enumerate(PARTS)
        )
        yield Sample(f"s{user}", f"u{user}", "Choose for: lamp", "lamp", "kept", items)


def _files(folder: Path) -> set[str]:
    return {path.name for path in (folder / PICTURES).iterdir()} if (folder / PICTURES).exists() else set()


def _names(*colors: tuple[int, int, int]) -> set[str]:
    return {f"{Picture(png(color)).digest.hex()}.png" for color in colors}


def test_written_samples_are_read_back_and_each_picture_is_one_file(tmp_path: Path) -> None:
    write_lamp(_samples(), tmp_path, "train", task=TASK)
    reader = open_dataset(tmp_path, "train")
    assert reader.task == TASK
    assert list(reader) == list(_samples())
    assert _files(tmp_path) == _names(RED, BLUE)
    profile = json.loads((tmp_path / "train_questions.json").read_text())[0]["profile"]
    assert profile[1]["embedding"] == [0.100000001, -2.0]  # nine digits tell all float32 apart
    assert [set(item) - {"id", "product", "verdict"} for item in profile] == [
        {"photo"}, {"photo", "embedding"}, {"embedding"}, set(), {"photo"},
    ]  # fmt: skip


def test_a_data_set_can_be_moved_and_read_again(tmp_path: Path) -> None:
    write_lamp(_samples(), tmp_path / "old", "train", task=TASK)
    (tmp_path / "old").rename(tmp_path / "new")
    write_lamp(open_dataset(tmp_path / "new", "train"), tmp_path / "third", "dev", task=TASK)
    shutil.rmtree(tmp_path / "new")
    assert list(open_dataset(tmp_path / "third", "dev")) == list(_samples())


def test_a_split_by_user_keeps_the_parts_of_items(tmp_path: Path) -> None:
    write_lamp(_samples(), tmp_path / "all", "train", task=TASK)
    split_by_user(open_dataset(tmp_path / "all", "train"), tmp_path / "split", share=0.3)
    halves = [open_dataset(tmp_path / "split", split) for split in ("train", "dev")]
    assert sorted((sample for half in halves for sample in half), key=lambda s: s.id) == list(_samples())


def test_a_copy_with_another_train_split_keeps_the_pictures_of_the_other_splits(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_lamp(_samples(1), source, "train", task=TASK)
    (source / "photos").mkdir()  # a data set that a person has made
    (source / "photos" / "green.png").write_bytes(png(GREEN))
    (source / "photos" / "unused.png").write_bytes(png(GREEN))
    item = {"id": "1", "product": "lamp", "verdict": "kept"}
    no_paths = [data_url(png(GREEN, side=64)).replace("data:", "DATA:"), "x" * 5000]
    photos = ["photos/green.png", str(source / "photos" / "green.png"), "photos/gone.png", *no_paths]
    profile = [{**item, "photo": photo} for photo in photos]
    question = {"id": "q", "input": "Choose for: lamp", "profile": profile}
    (source / "dev_questions.json").write_text(json.dumps([question, "broken"]))
    copy_with_train(source, tmp_path / "copy", _samples(2), task=TASK)
    assert list(open_dataset(tmp_path / "copy", "train")) == list(_samples(2))
    assert _files(tmp_path / "copy") == _names(RED, BLUE)
    assert [path.name for path in (tmp_path / "copy" / "photos").iterdir()] == ["green.png"]
    assert json.loads((tmp_path / "copy" / "dev_questions.json").read_text())[0] == question


def test_no_picture_is_written_outside_the_data_set(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_lamp(_samples(1), source, "train", task=TASK)
    (tmp_path / "red.png").write_bytes(png(RED))
    profile = [{"id": "1", "product": "lamp", "verdict": "kept", "photo": "../red.png"}]
    (source / "dev_questions.json").write_text(json.dumps([{"id": "q", "input": "for: lamp", "profile": profile}]))
    copy_with_train(source, tmp_path / "copies" / "copy", [], task=TASK)
    assert not (tmp_path / "copies" / "red.png").exists()


@pytest.mark.parametrize(
    "task", [replace(TASK, image_field=None), replace(TASK, vector_field=None)], ids=["picture", "vector"]
)
def test_items_with_parts_that_the_task_does_not_declare_are_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the fields of an item differ from those of the task"):
        write_lamp(_samples(), tmp_path, "train", task=task)
    assert not list(tmp_path.iterdir())  # no pictures either


def test_a_missing_picture_is_a_broken_record_that_can_be_skipped(tmp_path: Path) -> None:
    write_lamp(_samples(2), tmp_path, "train", task=TASK)
    for path in (tmp_path / PICTURES).iterdir():
        path.unlink()
    with pytest.raises(RecordError, match="item 1 of its profile: its 'photo' names a file that does not exist"):
        list(open_dataset(tmp_path, "train"))
