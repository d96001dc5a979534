"""PrefEval: exact samples of its three forms, one split for all of them, and broken files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conversations import kind_and_texts
from published import SECRET, write

from personaplug.data import open_dataset, write_lamp
from personaplug.data.benchmarks import open_benchmark
from personaplug.data.benchmarks.prefeval import Form, PrefEvalReader
from personaplug.errors import ConfigError, MissingData, RecordError

FORMS: list[Form] = ["explicit", "choice", "persona"]
FOLDERS = {"choice": "implicit_preference/choice-based", "persona": "implicit_preference/persona-driven"}
TOPICS = ("pets", "trips")
COUNT = 20


def mcq(number: int, **changes: Any) -> dict[str, Any]:
    options = [f"{fit} option {number}" for fit in ("fitting", "first", "second", "third")]
    common = {"preference": f"I avoid {SECRET} {number}.", "question": f"What of {number}?"}
    return common | {"explanation": "Because.", "classification_task_options": options} | changes


def choice(number: int, **changes: Any) -> dict[str, Any]:
    conversation = {
        "query": f"Which one of {number}?",
        "assistant_options": "1. this 2. that",
        "user_selection": "That.",
        "assistant_acknowledgment": "Good.",
    }
    return mcq(number) | {"conversation": conversation, "aligned_op": "that"} | changes


def persona(number: int, **changes: Any) -> dict[str, Any]:
    turns = {str(turn): {"user": f"Say {turn}", "assistant": f"Said {turn}"} for turn in (1, 0, 2)}
    return mcq(number) | {"persona": "a cook", "conversation": turns} | changes


def published(folder: Path, **changes: Any) -> Path:
    """Write two topics with the same numbers, so that every preference occurs twice."""
    for topic in TOPICS:
        write(folder / "mcq_options" / f"{topic}.json", [mcq(number, **changes) for number in range(COUNT)])
        write(folder / FOLDERS["choice"] / f"{topic}.json", [choice(number) for number in range(COUNT)])
        write(folder / FOLDERS["persona"] / f"{topic}.json", [persona(number) for number in range(COUNT)])
    return folder


def histories(form: Form) -> list[tuple[str, ...]]:
    by_form: dict[Form, list[tuple[str, ...]]] = {
        "explicit": [("preference", f"I avoid {SECRET} 0.")],
        "choice": [("answer", "Which one of 0?", "1. this 2. that"), ("answer", "That.", "Good.")],
        "persona": [("answer", f"Say {turn}", f"Said {turn}") for turn in (0, 1, 2)],
    }
    return by_form[form]


@pytest.mark.parametrize("form", FORMS)
def test_fitting_option_is_the_target_and_the_others_are_rejected(tmp_path: Path, form: Form) -> None:
    reader = PrefEvalReader(published(tmp_path), "train", form=form)
    sample = next(iter(reader))
    assert (sample.id, sample.user_id, sample.prompt) == ("pets/1", "pets/1", "What of 0?")
    assert (sample.target, sample.rejected) == (
        "fitting option 0",
        ("first option 0", "second option 0", "third option 0"),
    )
    assert [kind_and_texts(item) for item in sample.history] == histories(form)
    assert (reader.task.name, reader.task.kind) == (f"PrefEval_{form}", "chat")


def test_all_forms_have_the_same_split_by_preference(tmp_path: Path) -> None:
    folder = published(tmp_path)
    ids = {
        split: [[sample.id for sample in open_benchmark(f"prefeval-{form}", folder, split)] for form in FORMS]
        for split in ("train", "dev")
    }
    for split in ids:
        assert ids[split][0] == ids[split][1] == ids[split][2]
    train, dev = (set(ids[split][0]) for split in ("train", "dev"))
    assert train.isdisjoint(dev)
    assert len(train) + len(dev) == len(TOPICS) * COUNT
    assert 0 < len(dev) < len(train)
    for topic in TOPICS:  # a preference that occurs twice is in one split
        assert {name.split("/")[1] for name in dev if name.startswith(topic)} == {name.split("/")[1] for name in dev}


@pytest.mark.parametrize("form", FORMS)
def test_data_set_in_lamp_layout_reads_back_equal(tmp_path: Path, form: Form) -> None:
    reader = PrefEvalReader(published(tmp_path / "source"), "dev", form=form)
    write_lamp(reader, tmp_path / "set", "dev", task=reader.task)
    assert list(open_dataset(tmp_path / "set", "dev")) == list(reader)


BROKEN: dict[str, tuple[Form, dict[str, Any], str]] = {
    "three options": ("explicit", mcq(0, classification_task_options=["a", SECRET, "c"]), "is not a list of 4 options"),
    "empty option": ("explicit", mcq(0, classification_task_options=[SECRET, "", "c", "d"]), "an option is empty"),
    "no preference": ("explicit", mcq(0, question=SECRET, preference=""), "its 'preference' is empty"),
    "another question": (
        "choice",
        choice(0, question=SECRET),
        "its question differs from the question at the same position",
    ),
    "no selection": ("choice", choice(0, conversation={"query": SECRET, "assistant_options": "1"}), "'user_selection'"),
    "odd turn": ("persona", persona(0, conversation={SECRET: {}}), "a turn of its 'conversation' is not numbered"),
    "no reply": ("persona", persona(0, conversation={"0": {"user": SECRET}}), "its 'assistant' is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_record_is_reported_without_its_text_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    form, record, message = BROKEN[name]
    folder = published(tmp_path)
    good = {"explicit": mcq, "choice": choice, "persona": persona}[form]
    path = folder / FOLDERS.get(form, "mcq_options") / "pets.json"
    write(path, [record, *(good(number) for number in range(1, COUNT))])
    with pytest.raises(RecordError) as caught:
        list(PrefEvalReader(folder, "train", form=form))
    assert f"{path}, record 1: " in str(caught.value)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    reader = PrefEvalReader(folder, "train", form=form, skip_bad=1)
    assert next(iter(reader)).id == "pets/3"  # the second record is in dev
    assert reader.report.skipped == 1


def test_unusable_folder_or_split_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path)
    with pytest.raises(ConfigError, match="has no split 'test'"):
        PrefEvalReader(folder, "test", form="choice")
    with pytest.raises(MissingData, match=r"has no mcq_options/\*\.json"):
        PrefEvalReader(folder / "implicit_preference", "dev", form="choice")
    write(folder / FOLDERS["persona"] / "trips.json", [persona(0)])
    with pytest.raises(RecordError, match=r"it has 1 records, but .*trips\.json has 20"):
        list(PrefEvalReader(folder, "dev", form="persona", skip_bad=9))
    (folder / FOLDERS["choice"] / "pets.json").unlink()
    with pytest.raises(MissingData, match=r"no file .*pets\.json"):
        list(PrefEvalReader(folder, "dev", form="choice"))


@pytest.mark.parametrize(("form", "items"), [("explicit", 1), ("choice", 2), ("persona", 3)])
def test_published_files_give_a_thousand_samples(shared_data: Path, form: Form, items: int) -> None:
    if not (shared_data / "PrefEval").is_dir():
        pytest.skip("the files of PrefEval are not there")
    samples = {split: list(PrefEvalReader(shared_data / "PrefEval", split, form=form)) for split in ("train", "dev")}
    assert {split: len(part) for split, part in samples.items()} == {"train": 797, "dev": 203}
    for sample in (*samples["train"], *samples["dev"]):
        assert len(sample.rejected) == 3
        assert len(sample.history) >= items
