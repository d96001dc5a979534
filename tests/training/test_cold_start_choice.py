"""The choice of the cold start from a table of losses, without a model."""

from __future__ import annotations

import math

import pytest

from personaplug.training.cold_start import CONTROL, NO_ITEMS, PERSONA, choose_cold_start


@pytest.mark.parametrize(
    ("persona", "control", "no_items", "source", "max_items"),
    [
        pytest.param([1, 1], [2, 2], [9, 2], NO_ITEMS, 0, id="persona wins from no items on"),
        pytest.param([math.nan, 1], [1, 1], [9, 1], NO_ITEMS, 0, id="a tie or an unknown loss goes to the persona"),
        pytest.param([1, 2, 2, 1], [2, 9, 9, 9], [9, 1, 1.9, 2], NO_ITEMS, 2, id="own tokens serve up to two items"),
        pytest.param([1, *[2] * 5], [2, *[9] * 5], [9, *[1] * 5], NO_ITEMS, 5, id="own tokens serve up to the bound"),
        pytest.param([2, 1], [1, 1], [9, 9], CONTROL, 0, id="control serves no items"),
        pytest.param([2, 2, 2, 1], [1, 1, 1.9, 2], [9] * 4, CONTROL, 2, id="control serves up to two items"),
        pytest.param([2] * 6, [1] * 6, [9] * 6, CONTROL, 5, id="control serves up to the bound"),
    ],
)
def test_choice_stops_at_the_first_number_of_items_with_a_better_persona(
    persona: list[float], control: list[float], no_items: list[float], source: str, max_items: int
) -> None:
    table = {PERSONA: persona, CONTROL: control, NO_ITEMS: no_items}
    choice = choose_cold_start(lambda items, served_by: table[served_by][items])
    assert (choice.source, choice.max_items) == (source, max_items)
    assert list(choice.losses) == list(range(len(choice.losses)))
    assert all(len(losses) == 2 for losses in choice.losses.values())


def test_choice_ends_at_the_longest_held_out_history() -> None:
    choice = choose_cold_start(lambda items, served_by: None if items > 1 else float(served_by == PERSONA))
    assert (choice.source, choice.max_items, list(choice.losses)) == (CONTROL, 1, [0, 1])


def test_choice_never_exceeds_max_items() -> None:
    choice = choose_cold_start(lambda items, served_by: float(served_by == PERSONA), max_items=1)
    assert choice.max_items == 1
