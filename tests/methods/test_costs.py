"""The cost of a user for each row, compared with calculations by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from personaplug.config import Config
from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders import HashEncoder
from personaplug.methods import ModelInputs, find_method
from personaplug.methods.context import EvalContext
from personaplug.methods.costs import CostMeter, UserCost

ITEMS = tuple(HistoryItem(str(k), (("text", "é" * 10), ("score", "4")), "score") for k in range(3))
METER = CostMeter([3, 5], [Sample("1", "u", "p", "q", "1", ITEMS)], encoder=HashEncoder(32))
INPUTS = ModelInputs([], [])
TEXT = len("text: éééééééééé score: 4".encode())


def _cost(name: str, *, meter: CostMeter = METER, inputs: ModelInputs = INPUTS) -> UserCost:
    context = cast(EvalContext, SimpleNamespace(costs=meter, run=SimpleNamespace(config=Config())))
    cost = find_method(name).user_cost(context, inputs)
    assert cost is not None
    return cost


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("plain", 0),
        ("instruction-only", 0),
        ("lora", 0),
        ("instruction+labels", 4),
        ("instruction+neighbors", 4 * 32 * 2 + 4),
        ("plug", 4 * 32 * 2),
        ("wrong-user", 4 * 32 * 2),
        ("population-persona", 0),
        ("mean-persona", 0),
        ("bm25:4", 4 * TEXT),
        ("instruction+recency:2", 4 * TEXT),
        ("dense:4", 4 * (TEXT + 64)),
        ("ropg:4", 4 * (TEXT + 64)),
        ("plug+bm25:1", 4 * (TEXT + 64)),
        ("plug+dense:1", 4 * (TEXT + 64)),
    ],
)
def test_bytes_per_user_are_means_over_samples(name: str, stored: float) -> None:
    assert _cost(name).bytes == pytest.approx(stored)


def test_encoding_takes_time_but_indexing_words_does_not() -> None:
    assert _cost("plug").seconds > 0
    assert _cost("bm25:4").seconds == 0
    assert _cost("plain") == UserCost(0.0, 0.0)


def test_cost_measured_with_the_inputs_is_added() -> None:
    assert _cost("profile", inputs=replace(INPUTS, user_cost=UserCost(50.0, 0.5))) == UserCost(50.0, 0.5)
    assert _cost("profile+bm25:4", inputs=replace(INPUTS, user_cost=UserCost(50.0, 0.5))) == UserCost(
        50.0 + 4 * TEXT, 0.5
    )


def test_cost_is_zero_without_histories() -> None:
    meter = CostMeter([0, 0], [Sample("1", "u", "p", "q", "1")], encoder=HashEncoder(32))
    assert _cost("plug", meter=meter) == UserCost(0.0, 0.0)
