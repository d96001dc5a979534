"""Manners: the rules read what they write, and they read other texts like a person."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest

from personaplug.data.contractions import contract, read_contractions
from personaplug.data.manner_wording import INSTRUCTIONS, stated
from personaplug.data.manners import DIMENSIONS, VALUES, Manners, manners_met, read_manners, share_met
from personaplug.data.simulated_manners import all_topics

SENTENCES = ("It is best to wait.", "You will not need more.", "Do not open the lid.")


def visible_manners(manners: Manners, sentences: tuple[str, ...] = SENTENCES) -> dict[str, str | None]:
    """Return the manners that a text shows: no layout of one sentence, and no contractions without a form of them."""
    values: dict[str, str | None] = dict(asdict(manners))
    if manners.length == "one":
        values["layout"] = None
    if read_contractions(" ".join(sentences[: 1 if manners.length == "one" else 3])) is None:
        values["contractions"] = None
    return values


ALL_VALUES = [(name, value) for name, values in VALUES.items() for value in values]


@pytest.mark.parametrize(("dimension", "value"), ALL_VALUES)
def test_each_value_is_read_as_written(dimension: str, value: str) -> None:
    question = VALUES["question"][1]
    for manners in (Manners(), Manners("one", emoji="👍"), Manners(casing="lower", layout="list", question=question)):
        changed = replace(manners, **{dimension: value})
        assert read_manners(changed.apply(SENTENCES)) == visible_manners(changed)


def test_random_combinations_on_all_topics_are_read_as_written() -> None:
    rng = np.random.default_rng(0)
    topics = all_topics()
    for index in range(3000):
        manners = Manners(*(values[int(rng.integers(len(values)))] for values in VALUES.values()))
        sentences = topics[index % len(topics)].sentences[:3]
        text = manners.apply(sentences)
        assert read_manners(text) == visible_manners(manners, sentences)
        assert share_met(text, text) == 1


def test_all_combinations_without_other_parts_are_read_as_written() -> None:
    for values in product(*(VALUES[name] for name in ("length", "layout", "contractions", "casing"))):
        manners = Manners(values[0], values[1], contractions=values[2], casing=values[3])
        assert read_manners(manners.apply(SENTENCES)) == visible_manners(manners)


FREE_TEXTS: list[tuple[str, dict[str, str | None]]] = [
    (
        "Sure! Rice needs about two cups of water. Rinse it first.",
        {"length": "several", "layout": "prose", "emoji": "none", "greeting": "none", "sign_off": "none",
         "contractions": None, "casing": "normal", "question": "none"},
    ),
    (
        "¡Hola! You don’t need oil, e.g. for short pasta. 🎉\n\nDoes that help?\n\nCheers",
        {"length": "one", "layout": None, "emoji": "🎉", "greeting": "Hola!", "sign_off": "Cheers!",
         "contractions": "short", "casing": "normal", "question": "Does that help?"},
    ),
    (
        "Here are some tips:\n\n1. **Soak** the pot.\n2. Scrub it. Do not scratch it.\n3) Rinse 🧽",
        {"length": "several", "layout": "list", "emoji": "other", "greeting": "none", "sign_off": "none",
         "contractions": "full", "casing": "normal", "question": "none"},
    ),
    (
        "hey, it's fine to freeze bread, just slice it first",
        {"length": "one", "layout": None, "emoji": "none", "greeting": "other", "sign_off": "none",
         "contractions": "short", "casing": "lower", "question": "none"},
    ),
    (
        "Hello friend, walk the dog twice a day! Take care, Anna. Would you like more details?",
        {"length": "one", "layout": None, "emoji": "none", "greeting": "Hello friend!", "sign_off": "Take care!",
         "contractions": None, "casing": "normal", "question": "Would you like more details?"},
    ),
    (
        "* Use 2.5 litres of water.\n* Stir it well.\n\nWhat kind of pasta is it?",
        {"length": "several", "layout": "list", "emoji": "none", "greeting": "none", "sign_off": "none",
         "contractions": None, "casing": "normal", "question": "other"},
    ),
    (
        "Is it too hot? Then open a window – the air cools it is often enough\n- and close it at noon.",
        {"length": "several", "layout": "prose", "emoji": "none", "greeting": "none", "sign_off": "none",
         "contractions": "full", "casing": "normal", "question": "none"},
    ),
    (
        "Bonjour 👍🏽 It cannot hurt to wait, and it isn't hard. 😀 Best regards, Your assistant",
        {"length": "one", "layout": None, "emoji": "👍", "greeting": "Bonjour!", "sign_off": "other",
         "contractions": "short", "casing": "normal", "question": "none"},
    ),
    (
        "GOOD DAY! TAKE THE EARLY TRAIN... IT WILL BE CHEAPER!!! ALL THE BEST!",
        {"length": "several", "layout": "prose", "emoji": "none", "greeting": "Good day!", "sign_off": "All the best!",
         "contractions": "full", "casing": "normal", "question": "none"},
    ),
    (" 🌻 \n...", dict.fromkeys(DIMENSIONS)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "manners"), FREE_TEXTS, ids=[str(index) for index in range(len(FREE_TEXTS))])
def test_free_text_is_read_as_a_person_reads_it(text: str, manners: dict[str, str | None]) -> None:
    assert read_manners(text) == manners


def test_share_met_counts_only_manners_that_the_reference_shows() -> None:
    reference = Manners("one", emoji="👍", greeting="Hola!").apply(["Rest is enough."])
    assert set(manners_met("x", reference)) == {*DIMENSIONS} - {"layout", "contractions"}
    assert share_met("Sleep is good.", reference) == pytest.approx(4 / 6)
    assert share_met("", reference) == 0
    assert share_met("Anything", "") == 1


@pytest.mark.parametrize(
    ("full", "short"),
    [("You will not see it.", "You won't see it."), ("It is not so, and that is it.", "It's not so, and that's it."),
     ("There it is.", "There it is."), ("Cannot, do not.", "Can't, don't."), ("A habit is fine.", "A habit is fine."),
     ("Bread is not hot.", "Bread isn't hot."), ("They are what it will be.", "They're what it'll be.")],
)  # fmt: skip
def test_contract_writes_english_contractions(full: str, short: str) -> None:
    assert contract(full) == short
    assert contract(short) == short


def test_every_manner_has_three_wordings() -> None:
    for name, values in VALUES.items():
        for value in values:
            sentences = stated(name, value)
            assert len(set(sentences)) == 3
            if value != "none" and name in ("emoji", "greeting", "sign_off", "question"):
                assert all(value in sentence for sentence in sentences)


@pytest.mark.parametrize("dimension", INSTRUCTIONS)
def test_instruction_changes_only_its_manners(dimension: str) -> None:
    instruction = INSTRUCTIONS[dimension]
    before = Manners("several", "prose", "👍", "Hola!", "Cheers!", "short", "lower", "Shall I go on?")
    after = instruction.obeyed_by(before)
    assert instruction.contradicts(before)
    assert not instruction.contradicts(after)
    changed = {name for name in DIMENSIONS if getattr(after, name) != getattr(before, name)}
    assert changed <= set(instruction.values)
    assert dimension in changed
    assert len(set(instruction.wordings)) == 4
