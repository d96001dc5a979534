"""Rows of a table by name: what each of them is made of, and which names there are."""

from __future__ import annotations

import pytest

from personaplug.errors import ConfigError
from personaplug.methods import (
    CONDITIONS,
    DEFAULT,
    INSTRUCTION,
    LORA,
    PLUG,
    RETRIEVERS,
    ROPG,
    Retrieval,
    Rule,
    Trained,
    condition_of,
    info_of,
    needed,
    parse_conditions,
)


@pytest.mark.parametrize("text", ["", "plug,plug", "plug,nonsense", ",", "wrong-user,plug@wrong-user"])
def test_bad_lists_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"instruction-only|did you mean|known are"):
        parse_conditions(text)


@pytest.mark.parametrize(
    "name",
    [
        "bm25",
        "bm25:",
        "bm25:0",
        "bm25:-1",
        "bm25:four",
        "bm25:²",
        "bm26:4",
        "lora+bm25:4",
        "plug+",
        "+bm25:1",
        "plug+profile",
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
        "+phrases",
        "wrong-user+phrases",
        "shuffled+phrases",
        "plug@wrong-user+phrases",
        "instruction-only+phrases",
        "copy+phrases",
        "plug+phrases+phrases",
        "random-vectors+phrases",
        "lora-per-user+phrases",
        "classical:text@wrong-user",
        "classical+bm25:4",
        "user-median:4",
    ],
)
def test_what_is_no_row_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        condition_of(name)


def test_a_list_is_read_in_order() -> None:
    assert [c.name for c in parse_conditions(" plug, bm25:4 ,plain")] == ["plug", "bm25:4", "plain"]


@pytest.mark.parametrize("name", [*CONDITIONS, *DEFAULT])
def test_every_row_says_what_it_guards_and_keeps_its_name(name: str) -> None:
    assert condition_of(name).name == name
    assert len(condition_of(name).guards) > 20


@pytest.mark.parametrize("method", RETRIEVERS)
def test_a_retrieval_row(method: str) -> None:
    row = condition_of(f"{method}:3")
    assert (row.name, row.history, row.retrieval) == (f"{method}:3", "own", Retrieval(method, 3))
    assert row.trained is None
    assert row.needs == ((ROPG,) if method == "ropg" else ())
    assert row.seeded == (method in ("ropg", "random"))
    assert row.in_words


def test_rows_that_are_trained_on_prompts_with_texts() -> None:
    retrieval = Retrieval("bm25", 1)
    assert condition_of("plug+bm25:1").needs == (Trained("plug+bm25:1", "plug", retrieval),)
    assert condition_of("instruction+bm25:1").needs == (Trained("instruction+bm25:1", "instruction", retrieval),)
    assert condition_of("instruction+ropg:2").needs == (
        ROPG,
        Trained("instruction+ropg:2", "instruction", Retrieval("ropg", 2)),
    )


def test_profiles_and_matrices() -> None:
    assert condition_of("profile").in_words
    assert condition_of("profile+bm25:4").profile
    assert condition_of("profile+bm25:4").retrieval == Retrieval("bm25", 4)
    assert condition_of("lora").history == "none"
    assert (condition_of("lora-per-user").per_user, condition_of("lora-per-user").needs) == (True, (LORA,))


def control_of(name: str) -> str | None:
    """The row that measures another row's personal gain; None if that is not personal."""
    try:
        control = info_of(condition_of(f"{name}@wrong-user"))
    except ConfigError:
        return None
    assert control.is_personal_gain_of == name
    return control.name


def is_control(name: str) -> bool:
    return info_of(condition_of(name)).is_control


def is_rule(name: str) -> bool:
    return info_of(condition_of(name)).family == "no-lm"


def test_every_personal_row_has_its_own_control() -> None:
    assert control_of("plug") == "wrong-user"
    for name in (
        "bm25:4",
        "plug+bm25:1",
        "instruction+dense:2",
        "profile",
        "profile+bm25:4",
        "lora-per-user",
        "ropg:4",
    ):
        control = control_of(name)
        assert control == f"{name}@wrong-user"
        row, base = condition_of(control), condition_of(name)
        assert (row.history, row.needs, row.retrieval, row.profile) == (
            "wrong-user",
            base.needs,
            base.retrieval,
            base.profile,
        )
    assert condition_of("plug@wrong-user") is CONDITIONS["wrong-user"]
    for name in ("plain", "instruction-only", "lora", "wrong-user", "random-vectors", "mean-persona", "all-knowing"):
        assert control_of(name) is None


def test_rows_without_a_language_model_need_no_training_and_keep_their_rule_in_their_control() -> None:
    for name in ("classical", "classical:history", "user-median", "user-mean", "user-majority"):
        row, control = condition_of(name), condition_of(f"{name}@wrong-user")
        assert (row.needs, row.seeded, row.history, control.history) == ((), False, "own", "wrong-user")
        assert control.rule == row.rule
        assert control_of(name) == control.name
        assert (is_control(name), is_control(control.name)) == (False, True)
        assert is_rule(name)
        assert is_rule(control.name)
    assert condition_of("classical:text").rule == Rule("classical", "text")
    assert condition_of("copy").rule == Rule("copy")
    assert condition_of("copy:10").rule == Rule("copy", words=10)
    assert condition_of("user-words").rule == Rule("user-words", words=8)
    assert condition_of("user-words:3@wrong-user").rule == Rule("user-words", words=3)
    for name in ("classical:text", "copy", "copy:10"):
        assert (condition_of(name).history, control_of(name)) == ("none", None)
    assert [name for name in ("classical", "copy:3") if condition_of(name).rule.fitted] == ["classical"]  # type: ignore[union-attr]
    assert not any(is_rule(name) for name in ("plain", "plug", "bm25:4"))


def test_what_rows_need_is_trained_once() -> None:
    rows = parse_conditions(
        "plain,plug,wrong-user,shuffled,instruction-only,ropg:4,instruction+ropg:4,lora-per-user,lora"
    )
    assert needed(rows) == [PLUG, INSTRUCTION, ROPG, condition_of("instruction+ropg:4").needs[1], LORA]


def test_phrases_go_with_any_row_of_the_frozen_model() -> None:
    for name, trained in (("plug", PLUG), ("instruction", INSTRUCTION), ("plain", None), ("lora", LORA)):
        row = condition_of(f"{name}+phrases")
        assert (row.trained, row.history, row.phrases) == (trained, "own", True)
        assert control_of(row.name) == f"{row.name}@wrong-user"
        assert is_control(f"{row.name}@wrong-user")
    both = condition_of("plug+bm25:1+phrases")
    assert both.retrieval == Retrieval("bm25", 1)
    assert needed([both, condition_of("plug+bm25:1")]) == [Trained("plug+bm25:1", "plug", Retrieval("bm25", 1))]
    assert condition_of("plug+phrases@wrong-user").phrases
    assert not condition_of("plug").phrases


@pytest.mark.parametrize(
    ("name", "family", "control_of", "parents"),
    [
        ("plain", "none", None, ()),
        ("instruction-only", "none", None, ()),
        ("plug", "plug", None, ()),
        ("paper-plug", "plug", None, ()),
        ("wrong-user", "plug", "plug", ()),
        ("population-persona", "plug", "plug", ()),
        ("plug+bm25:1@shuffled", "plug", "plug+bm25:1", ()),
        ("plug+bm25:1", "plug", None, ("bm25:1", "instruction+bm25:1", "plug")),
        ("plug+phrases", "plug", None, ("plug", "phrases", "instruction+phrases", "plug")),
        ("instruction+bm25:4", "prompt", None, ("bm25:4",)),
        ("instruction+labels", "prompt", None, ("labels",)),
        ("profile+bm25:4", "prompt", None, ("bm25:4",)),
        ("ropg:4", "prompt", None, ("dense:4",)),
        ("lora", "weights", None, ()),
        ("lora-per-user@wrong-user", "weights", "lora-per-user", ()),
        ("lora-per-user", "weights", None, ("lora",)),
        ("plug+lora", "plug", None, ("lora", "instruction+lora", "plug")),
        ("classical", "no-lm", None, ("classical:text", "classical:history")),
        ("copy:10", "no-lm", None, ()),
    ],
)
def test_info_of_row_tells_family_control_and_parents(
    name: str, family: str, control_of: str | None, parents: tuple[str, ...]
) -> None:
    condition, info = condition_of(name), info_of(condition_of(name))
    assert (info.name, info.history, info.is_seeded) == (condition.name, condition.history, condition.seeded)
    assert (info.family, info.control_of, info.parents) == (family, control_of, parents)
    assert info.has_language_model is (condition.rule is None)
