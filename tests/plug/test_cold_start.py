"""ColdStart: which users get the cold-start prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plugs import LLM, QUERIES, WIDTH, build_history, build_plug, head_of

from personaplug.data.records import Options
from personaplug.encoders import HashEncoder
from personaplug.encoders.encoded_sample import PREFERENCE_KIND
from personaplug.errors import MissingData
from personaplug.plug.history_batch import HistoryBatch
from personaplug.plug.layers import ColdStart
from personaplug.plug.model import PersonaPlug

LABELS = ("1", "2", "3")


def test_only_users_with_few_items_get_the_cold_start_tokens(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    plug, history = build_plug(encoder), build_history(lengths=(4, 2, 0))
    before = plug(QUERIES, history).vectors
    tokens = torch.full_like(before[0], 2.0)
    plug.cold_start = ColdStart(tokens, max_items=2)
    assert torch.equal(plug(QUERIES, history).vectors[0], before[0])
    assert torch.equal(plug(QUERIES, history).vectors[1], tokens * plug.spec.embedding_scale)
    plug.save_pretrained(tmp_path)
    loaded = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    assert loaded.cold_start.max_items == 2
    assert torch.equal(loaded(QUERIES, history).vectors, plug(QUERIES, history).vectors)


def test_without_max_items_only_users_without_items_get_the_cold_start_tokens(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    plug, history = build_plug(encoder), build_history(lengths=(4, 2, 0))
    before = plug(QUERIES, history).vectors
    plug.cold_start = ColdStart(torch.full_like(before[0], 2.0))
    after = plug(QUERIES, history).vectors
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[2], torch.full_like(before[2], 2.0) * plug.spec.embedding_scale)
    assert torch.equal(plug(QUERIES, history, persona_scale=0.5).vectors[2], after[2])
    assert plug(QUERIES, history, persona_scale=0).vectors.shape[1] == 0
    torch.testing.assert_close(plug.population_prompt().vectors[0], before[2])
    plug.save_pretrained(tmp_path)
    loaded = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    assert torch.equal(loaded(QUERIES, history).vectors, after)


def test_cold_start_tokens_of_another_shape_are_refused_on_loading(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    plug = build_plug(encoder)
    plug.cold_start = ColdStart(torch.zeros_like(plug.population_prompt().vectors[0, :1]))
    plug.save_pretrained(tmp_path)
    with pytest.raises(MissingData, match=r"cold_start\.tokens should have shape"):
        PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)


def test_without_cold_start_tokens_cold_users_are_treated_as_users_without_items(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    settings: dict[str, Any] = {
        "label_prior": "counts",
        "options": "compare",
        "shrinkage": True,
        "answer_channel": "label",
    }
    plug, history = build_plug(encoder, labels=LABELS, **settings), build_history(lengths=(4, 2, 0))
    head = head_of(plug)
    assert head.hint is not None
    with torch.no_grad():
        for value in (head.population, *head.hint.parameters()):
            value.normal_()
    options = [Options("which?", ("tea", "coffee", "milk"))] * 3
    empty = build_history(lengths=(0, 0, 0))
    personal, impersonal = plug(QUERIES, history, options=options), plug(QUERIES, empty, options=options)
    plug.cold_start = ColdStart(max_items=2)
    plug.save_pretrained(tmp_path)
    loaded = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    for tested_plug, batch in ((plug, history), (plug, head.precompute(history)), (loaded, history)):
        soft = tested_plug(QUERIES, batch, options=options)
        assert tested_plug.cold_start.max_items == 2
        torch.testing.assert_close(soft.vectors[0], personal.vectors[0])
        torch.testing.assert_close(soft.vectors[1:], impersonal.vectors[1:])
        torch.testing.assert_close(soft.label_bias[0], personal.label_bias[0])
        assert not soft.label_bias[1:].any()
    assert not torch.equal(personal.vectors[1], impersonal.vectors[1])
    halved = plug(QUERIES, history, options=options, persona_scale=0.5).vectors
    torch.testing.assert_close(halved[1:], impersonal.vectors[1:])
    plug.cold_start = ColdStart()
    assert torch.equal(plug(QUERIES, history, options=options).vectors, personal.vectors)


def test_cold_start_removes_the_label_bias_of_cold_users(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    plug, history = build_plug(encoder, labels=LABELS, label_prior="counts"), build_history(lengths=(4, 2, 0))
    assert plug.label_prior is not None
    plug.label_prior.set_usual(torch.tensor([0, 0, 1, 2]))
    bias = plug(QUERIES, history).label_bias
    torch.testing.assert_close(bias, plug.label_bias(QUERIES, history))
    assert bias[:2].any(dim=1).all()
    assert not bias[2].any()  # a user without answers has no bias
    torch.testing.assert_close(plug(QUERIES, history, persona_scale=0.5).label_bias, bias / 2)
    assert plug(QUERIES, history, persona_scale=0).label_bias is None
    assert plug.population_prompt().label_bias is None
    plug.cold_start = ColdStart(torch.zeros_like(plug(QUERIES, history).vectors[0]), max_items=2)
    bias_with_cold_start = plug(QUERIES, history).label_bias
    torch.testing.assert_close(bias_with_cold_start[0], bias[0])
    assert not bias_with_cold_start[1:].any()
    plug.save_pretrained(tmp_path)
    loaded = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    torch.testing.assert_close(loaded(QUERIES, history).label_bias, bias_with_cold_start)


def _plug_without_persona(encoder: HashEncoder, *, label_prior: str) -> PersonaPlug:
    """Return a plug whose users get other tokens and another label prior."""
    plug = build_plug(encoder, labels=LABELS, label_prior=label_prior, kinds=True)
    assert plug.label_prior is not None
    plug.label_prior.set_usual(torch.tensor([0, 0, 1, 2]))
    numbers = plug.label_prior.numbers().detach() - 0.4
    tokens = torch.full_like(plug.population_prompt().vectors[0], 2.0)
    plug.cold_start = ColdStart(tokens, max_items=plug.config.max_history, prior_numbers=numbers)
    return plug


def _with_a_preference(history: HistoryBatch) -> HistoryBatch:
    """Return a batch in which the first item of the first user is a stated preference."""
    kinds = history.kind_ids.clone()
    kinds[0] = PREFERENCE_KIND
    return replace(history, kind_ids=kinds)


@pytest.mark.parametrize("label_prior", ["counts", "neighbors"])
def test_users_without_persona_get_the_tokens_and_the_other_label_prior(tmp_path: Path, label_prior: str) -> None:
    encoder = HashEncoder(WIDTH)
    plug, history = _plug_without_persona(encoder, label_prior=label_prior), build_history(lengths=(4, 2, 0))
    soft = plug(QUERIES, history)
    assert torch.equal(soft.vectors, torch.full_like(soft.vectors, 2.0) * plug.spec.embedding_scale)
    torch.testing.assert_close(soft.label_bias, plug.label_bias(QUERIES, history, plug.cold_start.prior_numbers))
    assert soft.label_bias[:2].any(dim=1).all()
    assert not soft.label_bias[2].any()
    assert not torch.allclose(soft.label_bias[0], plug.label_bias(QUERIES, history)[0])
    halved = plug(QUERIES, history, persona_scale=0.5)
    torch.testing.assert_close(halved.label_bias, soft.label_bias / 2)
    assert torch.equal(halved.vectors, soft.vectors)
    plug.save_pretrained(tmp_path)
    loaded = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)(QUERIES, history)
    assert torch.equal(loaded.vectors, soft.vectors)
    assert torch.equal(loaded.label_bias, soft.label_bias)


def test_user_with_a_stated_preference_keeps_the_persona() -> None:
    encoder = HashEncoder(WIDTH)
    plug, history = _plug_without_persona(encoder, label_prior="counts"), _with_a_preference(build_history())
    without = plug(QUERIES, history)
    plug.cold_start = ColdStart()
    with_persona = plug(QUERIES, history)
    assert torch.equal(without.vectors[0], with_persona.vectors[0])
    assert torch.equal(without.label_bias[0], with_persona.label_bias[0])
    assert not torch.equal(without.label_bias[1], with_persona.label_bias[1])


@pytest.mark.parametrize(
    ("label_prior", "message"), [("counts", r"prior_numbers should have shape \[2\]"), ("none", "is not expected")]
)
def test_prior_numbers_that_do_not_fit_are_refused_on_loading(tmp_path: Path, label_prior: str, message: str) -> None:
    encoder = HashEncoder(WIDTH)
    plug = build_plug(encoder, labels=LABELS, label_prior=label_prior)
    plug.cold_start = ColdStart(plug.population_prompt().vectors[0], prior_numbers=torch.zeros(5))
    plug.save_pretrained(tmp_path)
    with pytest.raises(MissingData, match=message):
        PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
