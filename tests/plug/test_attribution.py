"""Item weights, leave-one-out histories and drift."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from plugs import WIDTH, build_plug

from personaplug.encoders.encoded_sample import PREFERENCE_KIND, EncodedHistory, all_answers, no_style
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


def test_item_weights_of_a_dropped_persona_are_those_of_the_label_prior() -> None:
    plug = build_plug(persona_tokens=2, labels=("1", "2"), label_prior="neighbors")
    history = replace(_history(np.random.default_rng(0)), label_ids=np.array([0, -1, 1], dtype=np.int16))
    of_persona = item_weights(Personalizer(plug), "x", history)
    plug.cold_start = ColdStart(plug.population_prompt().vectors[0], max_items=3, prior_numbers=torch.zeros(5))
    weights = item_weights(Personalizer(plug), "x", history)
    assert of_persona[1] > 0 == weights[1]  # the label prior does not read an item without a label
    assert 0 < weights.sum() < 1
    stated = replace(history, kind_ids=np.array([0, 0, PREFERENCE_KIND], dtype=np.int8))
    assert item_weights(Personalizer(plug), "x", stated).tolist() == pytest.approx(of_persona.tolist())


def test_leave_one_out_drops_each_item_in_turn() -> None:
    history = _history(np.random.default_rng(0))
    rows = history.vectors.tolist()
    assert [part.vectors.tolist() for part in leave_one_out(history)] == [
        [rows[1], rows[2]],
        [rows[0], rows[2]],
        [rows[0], rows[1]],
    ]
