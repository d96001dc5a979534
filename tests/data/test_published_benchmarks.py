"""Published benchmarks: behavior of all readers, and exact samples and defects of LaMP-QA and LongLaMP."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from published import SECRET, choice, paper, post, question, review, shape, users, write

from personaplug.data import open_dataset, write_lamp
from personaplug.data.benchmarks import BENCHMARKS, open_benchmark
from personaplug.data.benchmarks.base import split_files
from personaplug.data.benchmarks.lamp_qa import LampQAReader
from personaplug.data.benchmarks.longlamp import LongLampReader
from personaplug.data.benchmarks.peft_u import PeftUReader
from personaplug.data.benchmarks.personal_llm import PersonalLLMReader, SimulatedUsers
from personaplug.data.task import Reader
from personaplug.errors import ConfigError, MissingData, MissingExtra, RecordError

FEW = SimulatedUsers(count=3, shortest=4, longest=6, queries_per_user=2)


def lamp_qa(folder: Path, **settings: Any) -> Reader:
    return LampQAReader(write(folder / "pets_validation.json", [question(1), question(2)]), "dev", **settings)


def longlamp(folder: Path, **settings: Any) -> Reader:
    return LongLampReader(write(folder / "val.jsonl", [paper(1), paper(2)]), "dev", **settings)


def peft_u(folder: Path, **settings: Any) -> Reader:
    return PeftUReader(write(folder / "user_data_leaked.json", users()), "dev", **settings)


def personal_llm(folder: Path, **settings: Any) -> Reader:
    path = write(folder / "train.jsonl", [choice(number) for number in range(30)])
    return PersonalLLMReader(path, "dev", users=FEW, **settings)


READERS: dict[str, Callable[..., Reader]] = {
    "lamp-qa": lamp_qa,
    "longlamp": longlamp,
    "peft-u": peft_u,
    "personal-llm": personal_llm,
}


# ---- all readers


@pytest.mark.parametrize("name", READERS)
def test_benchmark_written_in_lamp_layout_reads_back_equal(tmp_path: Path, name: str) -> None:
    reader = READERS[name](tmp_path)
    samples = list(reader)
    write_lamp(reader, tmp_path / "lamp", "dev", task=reader.task)
    again = open_dataset(tmp_path / "lamp", "dev")
    assert samples
    assert list(again) == samples
    assert again.task == reader.task


@pytest.mark.parametrize("name", READERS)
def test_max_history_keeps_last_items_and_counts_others(tmp_path: Path, name: str) -> None:
    whole = list(READERS[name](tmp_path))
    reader = READERS[name](tmp_path, max_history=1)
    cut = list(reader)
    assert [sample.history for sample in cut] == [sample.history[-1:] for sample in whole]
    assert reader.report.samples == len(whole)
    assert reader.report.items == sum(len(sample.history) for sample in cut)
    assert reader.report.cut_items == sum(len(sample.history) for sample in whole) - reader.report.items > 0


@pytest.mark.parametrize("name", READERS)
def test_gzipped_file_is_equal_and_truncated_file_is_never_skipped(tmp_path: Path, name: str) -> None:
    reader = READERS[name](tmp_path)
    (path,) = (path for path in tmp_path.iterdir() if path.is_file())
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    own = {"users": FEW} if name == "personal-llm" else {}
    assert list(BENCHMARKS[name](packed, "dev", **own)) == list(reader)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(RecordError, match="gzip data is broken"):
        list(BENCHMARKS[name](packed, "dev", skip_bad=9, **own))


def test_benchmark_is_opened_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "pets_test.json", [question(1), question(1)])
    reader = open_benchmark("LaMP_QA", path, "test", skip_bad=1, max_history=2)
    assert shape(list(reader)) == [("q1", ["p2", "p3"])]
    assert reader.report.skipped == 1
    with pytest.raises(ConfigError, match="no benchmark 'long-lamp'; did you mean 'longlamp'"):
        open_benchmark("long-lamp", path, "test")
    for name in BENCHMARKS:
        with pytest.raises(ConfigError, match="splits are train, dev, test; found 'val'"):
            open_benchmark(name, path, "val")
        with pytest.raises(MissingData, match="nowhere"):
            open_benchmark(name, tmp_path / "nowhere", "dev")
    for reader_of in READERS.values():
        for setting in ("skip_bad", "max_history"):
            with pytest.raises(ConfigError, match=setting):
                reader_of(tmp_path, **{setting: -1})


def test_split_files_are_found_in_folders_but_never_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "pets_validation.json", [])
    assert split_files(tmp_path, "dev") == (path,)
    with pytest.raises(MissingData, match="no file of the split 'test'"):
        split_files(tmp_path, "test")
    write(tmp_path / "data" / "toys_validation.json.gz", [])
    with pytest.raises(ConfigError, match=r"several files .* pets_validation.json, toys_validation.json.gz"):
        split_files(tmp_path, "dev")
    with pytest.raises(ConfigError, match="one of"):
        split_files(write(tmp_path / "table.csv", []), "dev")


# ---- LaMP-QA


def test_lamp_qa_prompt_omits_the_narrative(tmp_path: Path) -> None:
    first, second = lamp_qa(tmp_path)
    assert (first.id, first.user_id, first.target) == ("q1", None, None)
    assert first.query == f"How do I feed {SECRET} 1?"
    assert first.prompt.endswith(f"\nquestion: {first.query}")
    assert [item.fields for item in first.history] == [(("text", f"post {index}"),) for index in (1, 2, 3)]
    assert "balcony" not in first.prompt
    assert second.id == "q2"


BROKEN_QUESTIONS: dict[str, tuple[Any, str]] = {
    "no object": (SECRET, "record 2: it is not a JSON object"),
    "no id": ({"question": SECRET}, "record 2: its 'id' is missing"),
    "no question": ({"id": "q2", "profile": []}, "record 2 (id q2): its 'question' is missing"),
    "blank question": (question(2, question=" "), "record 2 (id q2): its 'question' is empty"),
    "list for question": (question(2, question=[SECRET]), "record 2 (id q2): its 'question' is a list"),
    "no profile": (question(2, profile=None), "record 2 (id q2): its 'profile' is not a list"),
    "text in profile": (question(2, profile=[SECRET]), "(id q2): item 1 of its profile: it is not a JSON object"),
    "no text": (question(2, profile=[{"id": "p"}]), "(id q2): item 1 of its profile: its 'text' is missing"),
    "id twice": (question(1), "record 2 (id q1): an earlier record has the same id"),
}


@pytest.mark.parametrize("name", BROKEN_QUESTIONS)
def test_broken_lamp_qa_question_is_reported_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    broken, message = BROKEN_QUESTIONS[name]
    path = write(tmp_path / "pets_train.json", [question(1), broken, question(3)])
    with pytest.raises(RecordError) as caught:
        list(LampQAReader(path, "train"))
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    reader = LampQAReader(path, "train", skip_bad=1, max_history=1)
    assert shape(list(reader)) == [("q1", ["p3"]), ("q3", ["p3"])]
    assert (reader.report.skipped, reader.report.cut_items) == (1, 4)


# ---- LongLaMP


def test_longlamp_papers_are_sorted_by_year(tmp_path: Path) -> None:
    first, second = longlamp(tmp_path)
    assert (first.id, first.user_id, first.target) == ("row-1", "author 1", "Text 1")
    assert first.prompt == first.query == f"Abstract of {SECRET} 1"
    assert [(item.id, item.date, item.answer) for item in first.history] == [
        ("a2001", date(2001, 1, 1), "Text 2001"),
        ("a2003", date(2003, 1, 1), "Text 2003"),
    ]
    assert first.history[0].text == "title: Title 2001 abstract: Text 2001"
    assert second.id == "row-2"


def test_longlamp_task_follows_from_the_columns(tmp_path: Path) -> None:
    reviews = LongLampReader(write(tmp_path / "train.jsonl", [review(1)]), "train")
    (sample,) = reviews
    assert (reviews.task.name, reviews.task.metrics) == ("LongLaMP_product_review", ("rouge_1", "rouge_l"))
    assert (sample.user_id, sample.history[0].id) == ("R1", "1")
    assert sample.history[0].text == "description: kettle overall: 4.0 summary: fine reviewText: It boils."
    assert sample.history[0].answer == "It boils."
    posts = LongLampReader(write(tmp_path / "test.json", [post(1)]), "test")
    (sample,) = posts
    assert (posts.task.name, sample.user_id, sample.target) == ("LongLaMP_topic_writing", "u1", "It rained.")
    assert sample.history[0].fields == (("summary", "A tale"), ("content", "A long tale."))
    with pytest.raises(ConfigError, match="the task is unknown"):
        LongLampReader(write(tmp_path / "none.jsonl", [question(1)]), "test")


BROKEN_PAPERS: dict[str, tuple[Any, str]] = {
    "no user": ({"input": SECRET}, "line 2 (id row-2): its 'name' is missing"),
    "no output": (paper(2, output=None), "line 2 (id row-2): its 'output' is null"),
    "blank input": (paper(2, input=""), "line 2 (id row-2): its 'input' is empty"),
    "no year": (paper(2, profile=[{"id": "a", "title": "", "abstract": "", "year": SECRET}]), "profile: its 'year' "),
    "no abstract": (
        paper(2, profile=[{"id": "a", "title": SECRET}]),
        "item 1 of its profile: its 'abstract' is missing",
    ),
}


@pytest.mark.parametrize("name", BROKEN_PAPERS)
def test_broken_longlamp_paper_is_reported_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    broken, message = BROKEN_PAPERS[name]
    path = write(tmp_path / "train.jsonl", [paper(1), broken, paper(3)])
    with pytest.raises(RecordError) as caught:
        list(LongLampReader(path, "train"))
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    reader = LongLampReader(path, "train", skip_bad=1)
    assert [sample.id for sample in reader] == ["row-1", "row-3"]
    assert reader.report.skipped == 1


def test_parquet_shards_are_one_split(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    papers = [paper(1), paper(2), paper(3)]
    shards = [tmp_path / "val" / f"val-0000{index}-of-00002.parquet" for index in range(2)]
    shards[0].parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(papers[:2]), shards[0])
    with pytest.raises(MissingData, match="1 shards of this split, but their names say 00002"):
        LongLampReader(tmp_path, "dev")
    parquet.write_table(pyarrow.Table.from_pylist(papers[2:]), shards[1])
    assert list(LongLampReader(tmp_path, "dev")) == list(LongLampReader(write(tmp_path / "a.jsonl", papers), "dev"))
    shards[1].write_bytes(b"PAR1 nothing")
    with pytest.raises(RecordError, match=r"00001-of-00002\.parquet, after row 0"):
        list(LongLampReader(tmp_path, "dev", skip_bad=9))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("longlamp", "personal-llm"):
        with pytest.raises(MissingExtra, match=r"pip install 'personaplug\[parquet\]'"):
            open_benchmark(name, tmp_path, "train")
