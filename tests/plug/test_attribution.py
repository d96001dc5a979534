"""Item weights, leave-one-out histories and drift."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plugs import WIDTH, build_plug

from personaplug.encoders.encoded_sample import EncodedHistory, all_answers, no_style
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.attribution import drift, item_weights, leave_one_out
from personaplug.plug.layers import ColdStart
from personaplug.plug.personalizer import Personalizer


def _history(rng: np.random.Generator, *, items: int = 3) -> EncodedHistory:
    vectors = rng.normal(size=(items, WIDTH)).astype(np.float16)
    return EncodedHistory(vectors, np.full(items, -1, dtype=np.int16), no_style(items), all_answers(items))


def test_drift_does_not_depend_on_the_cold_start_tokens() -> None:
    plug, rng = build_plug(), np.random.default_rng(0)

    def make_persona(history: EncodedHistory) -> SoftPrompt:
        return Personalizer(plug).persona("x", history)

    before, after = _history(rng), _history(rng)
    empty, population = before.select(slice(0)), plug.population_prompt()
    moved = drift(make_persona, before, after, population=population)
    from_empty = drift(make_persona, empty, after, population=population)
    plug.cold_start = ColdStart(torch.full_like(population.vectors[0], 9.0))
    assert drift(make_persona, before, after, population=plug.population_prompt()) == moved
    again = drift(make_persona, empty, after, population=plug.population_prompt())
    assert (again.cosine, from_empty.cosine, math.isnan(again.moved)) == (0.0, 0.0, True)


def test_item_weights_sum_to_one_and_are_zero_for_a_cold_user() -> None:
    plug, history = build_plug(persona_tokens=2), _history(np.random.default_rng(0))
    weights = item_weights(Personalizer(plug), "x", history)
    assert weights.sum() == pytest.approx(1)
    plug.cold_start = ColdStart(max_items=3)
    assert item_weights(Personalizer(plug), "x", history).tolist() == [0, 0, 0]
    assert item_weights(Personalizer(build_plug(persona_tokens=0)), "x", history).tolist() == [0, 0, 0]


def test_leave_one_out_drops_each_item_in_turn() -> None:
    history = _history(np.random.default_rng(0))
    rows = history.vectors.tolist()
    assert [part.vectors.tolist() for part in leave_one_out(history)] == [
        [rows[1], rows[2]],
        [rows[0], rows[2]],
        [rows[0], rows[1]],
    ]
