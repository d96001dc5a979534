"""The registry of rows: valid and invalid names, and the parts of each row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from personaplug.baselines.heuristics import CopyQuery, UserWords
from personaplug.baselines.prompt_builder import RETRIEVERS
from personaplug.baselines.regression import Regression
from personaplug.baselines.retrievers import Retrieval
from personaplug.data.task import Task
from personaplug.data.task_registry import CHAT, LAMP_TASKS
from personaplug.errors import ConfigError
from personaplug.methods import default_rows, find_method, needed_parts, parse_methods
from personaplug.methods.language_model import LanguageModelMethod
from personaplug.methods.no_lm import BaselineMethod
from personaplug.methods.prompt_texts import PromptTexts
from personaplug.methods.registry import known_methods
from personaplug.training.baseline_parts import LORA, ROPG
from personaplug.training.copy_head_part import COPY_HEAD, INSTRUCTION_COPY_HEAD
from personaplug.training.parts import INSTRUCTION, PLUG


@pytest.mark.parametrize("text", ["", "plug,plug", "plug,nonsense", ",", "wrong-user,plug@wrong-user"])
def test_rejects_an_invalid_list_of_rows(text: str) -> None:
    with pytest.raises(ConfigError, match=r"instruction-only|did you mean|expected one of"):
        parse_methods(text)


@pytest.mark.parametrize(
    "name",
    [
        "bm25",
        "bm25:",
        "bm25:0",
        "bm25:-1",
        "bm25:four",
        "bm25:²",
        "bm25:04",
        f"bm25:{'9' * 5000}",
        "bm26:4",
        "lora+bm25:4",
        "plug+",
        "+bm25:1",
        "plug+profile",
        "stated:2",
        "stated+",
        "bm25:4+stated",
        "plain@wrong-user",
        "wrong-user@wrong-user",
        "lora@wrong-user",
        "bm25:4@nobody",
        "bm25:4@wrong-user@wrong-user",
        "random-vectors@wrong-user",
        "lora-per-user@shuffled",
        "copy:",
        "copy:0",
        "copy:ten",
        "user-words:0",
        "copy@wrong-user",
        "classical:words",
        "+copy-head",
        "copy-head",
        "plug+copy-head:3",
        "wrong-user+copy-head",
        "shuffled+copy-head",
        "plug@wrong-user+copy-head",
        "instruction-only+copy-head",
        "instruction-only+bm25:4",
        "instruction",
        "copy+copy-head",
        "plug+copy-head+copy-head",
        "plug+bm25:1+dense:1",
        "plug+bm25:1+copy-head",
        "lora-per-user+copy-head",
        "classical:text@wrong-user",
        "classical+bm25:4",
        "user-median:4",
        "plug:4",
    ],
)
def test_rejects_an_invalid_name_of_a_row(name: str) -> None:
    with pytest.raises(ConfigError):
        find_method(name)


def test_parses_a_list_of_rows_in_order() -> None:
    assert [method.name for method in parse_methods(" plug, bm25:4 ,plain")] == ["plug", "bm25:4", "plain"]


@pytest.mark.parametrize(
    ("task", "baselines"),
    [
        (LAMP_TASKS["LaMP_3"], ["user-mean", "user-median", "user-majority", "classical"]),
        (LAMP_TASKS["LaMP_2"], ["user-majority", "classical"]),
        (LAMP_TASKS["LaMP_1"], ["classical"]),  # items have no labels, prompts have options
        (replace(LAMP_TASKS["LaMP_2"], answer_field=None), []),
        (LAMP_TASKS["LaMP_4"], ["copy", "user-words", "reference@wrong-user", "reference"]),
        (CHAT, ["copy", "user-words", "reference@wrong-user", "reference"]),
    ],
)
def test_default_rows_are_the_plug_its_controls_and_suitable_baselines(task: Task, baselines: list[str]) -> None:
    rows = default_rows(task)
    assert [row.name for row in rows] == ["plain", "instruction-only", *baselines, "wrong-user", "plug"]
    assert needed_parts(rows) == [INSTRUCTION, PLUG]
    for row in rows:
        row.check(task)
    unfitted = default_rows(task, has_train_split=False)
    assert unfitted == [row for row in rows if not row.needs_train_split]


@pytest.mark.parametrize(
    ("task", "is_suitable"),
    [
        (LAMP_TASKS["LaMP_3"], True),
        (LAMP_TASKS["LaMP_2"], True),
        (LAMP_TASKS["LaMP_1"], False),
        (LAMP_TASKS["LaMP_4"], False),
        (CHAT, False),
    ],
)
def test_default_rows_include_trained_label_counts_where_items_have_labels(task: Task, is_suitable: bool) -> None:
    counting = ["instruction+labels", "instruction+neighbors"]
    rows = [row.name for row in default_rows(task, trained=["plug", *counting])]
    others = [row.name for row in default_rows(task, trained=["plug"])]
    assert rows == ([*others[:-2], *counting, *others[-2:]] if is_suitable else others)


@pytest.mark.parametrize("name", [*known_methods(), "plug+bm25:1", "plug+copy-head", "bm25:4@wrong-user"])
def test_row_has_a_rationale_and_the_given_name(name: str) -> None:
    method = find_method(name)
    assert method.name == name
    assert len(method.rationale) > 20
    assert name not in method.info.parents


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_retrieval_row_has_texts_and_no_soft_tokens(retriever: str) -> None:
    row = find_method(f"{retriever}:3")
    assert isinstance(row, LanguageModelMethod)
    assert (row.info.family, row.info.history) == ("prompt", "own")
    assert (row.texts, row.soft) == (PromptTexts(Retrieval(retriever, 3)), None)
    assert row.requires == ((ROPG,) if retriever == "ropg" else ())
    assert row.info.is_seeded == (retriever in ("ropg", "random"))
    assert row.info.parents == (("dense:3",) if retriever == "ropg" else ())


def test_soft_tokens_with_retrieval_are_trained_on_prompts_with_texts() -> None:
    plug = replace(PLUG, name="plug+bm25:1", retrieval=Retrieval("bm25", 1))
    instruction = replace(INSTRUCTION, name="instruction+ropg:2", retrieval=Retrieval("ropg", 2))
    assert find_method("plug+bm25:1").requires == (plug,)
    assert find_method("instruction+ropg:2").requires == (ROPG, instruction)
    assert find_method("plug+bm25:1").info.parents == ("bm25:1", "instruction+bm25:1", "plug")
    assert find_method("plug+bm25:1").info.family == "plug"


def test_profile_stated_and_lora_rows_have_their_parts() -> None:
    both = find_method("profile+bm25:4")
    assert isinstance(both, LanguageModelMethod)
    assert both.texts == PromptTexts(Retrieval("bm25", 4), profile=True)
    assert both.info.parents == ("bm25:4",)
    stated = find_method("stated+bm25:4")
    assert isinstance(stated, LanguageModelMethod)
    assert stated.texts == PromptTexts(Retrieval("bm25", 4), stated=True)
    assert (stated.soft, stated.info.parents) == (None, ("bm25:4", "stated"))
    assert find_method("lora").info.history == "none"
    assert find_method("lora-per-user").requires == (LORA,)
    assert find_method("lora-per-user").info.parents == ("lora",)


@pytest.mark.parametrize(
    "name",
    [
        "bm25:4",
        "plug+bm25:1",
        "instruction+dense:2",
        "profile",
        "profile+bm25:4",
        "stated",
        "stated+bm25:4",
        "lora-per-user",
        "ropg:4",
        "classical",
    ],
)
def test_personal_row_has_a_control_that_differs_only_in_the_history(name: str) -> None:
    row, control = find_method(name), find_method(f"{name}@wrong-user")
    assert replace(control, info=row.info, rationale=row.rationale) == row
    assert (control.info.history, control.info.control_of, control.info.gain_of) == ("wrong-user", name, name)
    assert (control.requires, control.info.family, control.info.is_seeded) == (
        row.requires,
        row.info.family,
        row.info.is_seeded,
    )


def test_controls_of_the_plug_have_short_names() -> None:
    assert find_method("plug@wrong-user") == find_method("wrong-user")
    assert find_method("wrong-user").info.gain_of == "plug"
    assert find_method("shuffled").info.gain_of is None
    for name in ("shuffled", "random-vectors", "mean-persona", "population-persona"):
        assert find_method(name).info.control_of == "plug"
    assert find_method("lora").info.family == "weights"
    for name in ("plain", "instruction-only", "lora", "plug", "paper-plug"):
        assert not find_method(name).info.is_control


@pytest.mark.parametrize("name", ["classical", "classical:history", "user-median", "user-mean", "user-majority"])
def test_row_without_a_language_model_needs_no_training(name: str) -> None:
    row = find_method(name)
    assert (row.requires, row.info.is_seeded, row.info.history, row.info.family) == ((), False, "own", "no-lm")
    assert row.needs_train_split


def test_number_in_a_name_reaches_the_baseline() -> None:
    baselines = {
        "classical:text": Regression("text"),
        "copy": CopyQuery("copy"),
        "copy:10": CopyQuery("copy", 10),
        "user-words": UserWords("user-words", 8),
        "user-words:3": UserWords("user-words", 3),
    }
    for name, baseline in baselines.items():
        row = find_method(name)
        assert isinstance(row, BaselineMethod)
        assert row.baseline == baseline
        assert row.needs_train_split == name.startswith("classical")
    for name in ("classical:text", "copy", "copy:10"):
        assert find_method(name).info.history == "none"


def test_parts_that_several_rows_need_are_trained_once() -> None:
    rows = parse_methods("plain,plug,wrong-user,shuffled,instruction-only,ropg:4,instruction+ropg:4,lora-per-user,lora")
    assert needed_parts(rows) == [PLUG, INSTRUCTION, ROPG, find_method("instruction+ropg:4").requires[1], LORA]


def test_copy_head_is_trained_behind_its_base() -> None:
    row = find_method("plug+copy-head")
    assert (row.requires, row.info.history) == ((PLUG, COPY_HEAD), "own")
    assert find_method("instruction+copy-head").requires == (INSTRUCTION, INSTRUCTION_COPY_HEAD)
    assert find_method("plug+copy-head@wrong-user").info.gain_of == "plug+copy-head"
    assert set(row.info.parents) == {"plug", "instruction+copy-head"}
