"""RAP: exact samples of a small database, records that are left out, and broken files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from published import SECRET, write

from personaplug.data import open_dataset, write_lamp
from personaplug.data.benchmarks import open_benchmark
from personaplug.data.benchmarks.rap import RAP, RapReader
from personaplug.errors import ConfigError, MissingData, RecordError

DATABASE, QUESTIONS = "example_database/database.json", "eval/yollava-text-only-qa.json"


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def concept(name: str, **changes: Any) -> dict[str, Any]:
    record = {"name": name, "image": f"example_database/{name}.png", "info": f"<{name}> likes {SECRET}."}
    return record | {"category": "cat"} | changes


def question(correct: str = "A", **changes: Any) -> dict[str, Any]:
    options = {"A": "Yes", "B": "No"}
    return {"question": "Is sks's tail long, sks?", "option": options, "correct_answer": correct} | changes


def published(folder: Path, *, concepts: Any = None, questions: Any = None) -> Path:
    """Write a database of two concepts, and questions on one of them and on a third."""
    (folder / "example_database").mkdir(parents=True)
    for name, color in (("mo", "red"), ("tea-pot", "blue")):
        (folder / "example_database" / f"{name}.png").write_bytes(picture(color))
    of_mo = {"0": question(), "1": question("B")}
    database = {"<mo>": concept("mo"), "<tea-pot>": concept("tea-pot", category="pot")}
    write(folder / DATABASE, {"concept_dict": database if concepts is None else concepts, "path_to_concept": {}})
    write(folder / QUESTIONS, {"other": {"0": question()}, "mo": of_mo} if questions is None else questions)
    return folder


def test_concepts_are_the_history_and_the_correct_option_is_the_target(tmp_path: Path) -> None:
    reader = open_benchmark("rap", published(tmp_path), "test")
    samples = list(reader)
    assert [(sample.id, sample.target, sample.rejected) for sample in samples] == [
        ("mo/0", "Yes", ("No",)),
        ("mo/1", "No", ("Yes",)),
    ]
    assert samples[0].prompt == "Is <mo>'s tail long, <mo>?"
    first, second = samples[0].history
    assert first.fields == (("name", "mo"), ("category", "cat"), ("info", f"<mo> likes {SECRET}."))
    assert first.picture is not None
    assert first.picture.read() == picture("red")
    assert (second.id, second.answer) == ("tea-pot", None)
    assert reader.report.left_out == {"questions on concepts that are not in the database": 1}
    assert (reader.report.rows, reader.report.samples) == (3, 2)


def test_data_set_in_lamp_layout_reads_back_equal(tmp_path: Path) -> None:
    reader = RapReader(published(tmp_path / "source"), "test")
    write_lamp(reader, tmp_path / "set", "test", task=reader.task)
    again = open_dataset(tmp_path / "set", "test")
    assert list(again) == list(reader)
    assert again.task == RAP


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no placeholder": (question(question=SECRET), "does not contain 'sks'"),
    "three options": (question(option={"A": SECRET, "B": "No", "C": "?"}), "exactly the options A and B"),
    "empty option": (question(option={"A": SECRET, "B": ""}), "option B is empty"),
    "unknown letter": (question(correct=SECRET), "'correct_answer' is not A or B"),
    "another form": ({"question": SECRET, "options": {}}, "does not contain 'sks'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_question_is_reported_without_its_text_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    record, message = BROKEN[name]
    folder = published(tmp_path, questions={"mo": {"0": record, "1": question()}})
    with pytest.raises(RecordError, match=r"question .*mo/0") as caught:
        list(RapReader(folder, "test"))
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    reader = RapReader(folder, "test", skip_bad=1)
    assert [sample.id for sample in reader] == ["mo/1"]


def test_concept_without_its_picture_is_reported(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "example_database" / "mo.png").unlink()
    with pytest.raises(RecordError, match=r"concept .*mo.*: its 'image' names a file that does not exist"):
        list(RapReader(folder, "test"))
    (folder / "example_database" / "mo.png").write_text(SECRET, encoding="utf-8")
    with pytest.raises(RecordError, match="is no picture"):
        list(RapReader(folder, "test"))


def test_unusable_folder_or_split_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "good")
    with pytest.raises(ConfigError, match="only the split 'test'"):
        RapReader(folder, "train")
    with pytest.raises(MissingData, match="has no example_database"):
        RapReader(folder / "eval", "test")
    with pytest.raises(MissingData, match="no object 'concept_dict'"):
        list(RapReader(published(tmp_path / "list", concepts=[SECRET]), "test"))
    with pytest.raises(RecordError, match="concept"):
        list(RapReader(published(tmp_path / "text", questions={"mo": SECRET}), "test"))


def test_published_files_give_eighty_samples(shared_data: Path) -> None:
    if not (shared_data / "RAP").is_dir():
        pytest.skip("the files of RAP are not there")
    samples = list(RapReader(shared_data / "RAP", "test"))
    assert len(samples) == 80
    assert all(len(sample.history) == 8 and len(sample.rejected) == 1 for sample in samples)
    assert all(item.picture is not None for item in samples[0].history)
