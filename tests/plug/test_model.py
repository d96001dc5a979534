"""PersonaPlug against the paper's equations in numpy, and its parts together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plugs import LLM, OUT, QUERIES, WIDTH, build_history, build_plug, head_of
from scipy.special import erf

from personaplug.config import PAPER
from personaplug.data.records import Options
from personaplug.encoders import HashEncoder
from personaplug.encoders.encoded_sample import no_style
from personaplug.errors import ConfigError, EncoderMismatch
from personaplug.infra.model_hub import LLMIdentity
from personaplug.plug.history_batch import HistoryBatch, split_by_user
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import PlugSpec
from personaplug.training.parts import INSTRUCTION


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_plug_soft_prompt_equals_the_papers_equations(tokens: int, temperature: float) -> None:
    plug = build_plug(persona_tokens=tokens, temperature=temperature)
    encoder, history = HashEncoder(WIDTH), build_history(lengths=(4, 2))
    inner, outer = head_of(plug).projector.inner, head_of(plug).projector.outer
    actual = plug(QUERIES[:2], history).vectors.detach().numpy()
    for row in range(2):
        x = encoder.encode([QUERIES[row]])[0]  # eq. 2; the trained copy starts as the frozen encoder
        h = split_by_user(history.vectors, (4, 2))[row].numpy()  # eq. 1
        w = np.exp(h @ x / temperature)
        w /= w.sum()  # eq. 3
        z = (h * np.sqrt(WIDTH)) @ inner.weight.detach().numpy().T + inner.bias.detach().numpy()
        z = z * (1 + erf(z / np.sqrt(2))) / 2
        projected = z @ outer.weight.detach().numpy().T + outer.bias.detach().numpy()
        persona = (w @ projected).reshape(tokens, OUT)  # eq. 4
        expected = 0.25 * np.concatenate([plug.instruction.detach().numpy(), persona])  # [I; P] of eq. 5
        np.testing.assert_allclose(actual[row], expected, atol=1e-5)


def test_untrained_plug_makes_tokens_with_the_models_embedding_scale() -> None:
    encoder = HashEncoder(256)
    wide = LLMIdentity("wide", None, "0" * 16, 512)
    torch.manual_seed(0)
    plug = PersonaPlug(PAPER, spec=PlugSpec(wide, 0.13, encoder.identity), encoder=encoder)
    vectors = torch.from_numpy(encoder.encode(["an item"]))
    history = HistoryBatch(vectors, (1,), torch.tensor([-1]), torch.from_numpy(no_style(1)), torch.tensor([0]))
    size = plug(["x"], history).vectors.pow(2).mean(dim=-1).sqrt()
    assert size[0, 0].item() == pytest.approx(0.13, rel=0.2)
    assert size[0, 1].item() == pytest.approx(0.13, rel=0.2)


def test_plug_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    plug, history = build_plug(), build_history()
    together = plug(QUERIES, history).vectors
    for row, items in enumerate(split_by_user(torch.arange(6), (4, 2, 0))):
        alone = plug(QUERIES[row : row + 1], history.select(items, lengths=(len(items),))).vectors
        torch.testing.assert_close(together[row : row + 1], alone)


def test_user_without_items_gets_and_trains_the_population_persona() -> None:
    plug = build_plug()
    soft = plug(QUERIES, build_history(lengths=(4, 2, 0))).vectors
    assert torch.isfinite(soft).all()
    torch.testing.assert_close(soft[2, 1:], head_of(plug).population * 0.25)
    soft.sum().backward()
    population = head_of(plug).population
    assert population.grad is not None
    assert population.grad.abs().sum() > 0  # it starts at zero but gets a gradient
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in plug.parameters())


def test_batch_of_users_without_items_has_finite_gradients() -> None:
    plug = build_plug()
    plug(QUERIES, build_history(lengths=(0, 0, 0))).vectors.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in plug.parameters())


def test_persona_does_not_depend_on_the_order_of_items() -> None:
    plug, history = build_plug(), build_history(lengths=(4, 4, 4))
    reversed_items = torch.cat([own.flip(0) for own in split_by_user(torch.arange(12), history.lengths)])
    reversed_history = history.select(reversed_items, lengths=history.lengths)
    torch.testing.assert_close(plug(QUERIES, history).vectors, plug(QUERIES, reversed_history).vectors)


def test_persona_scale_interpolates_and_extrapolates_from_the_population_persona() -> None:
    plug, history = build_plug(persona_tokens=2), build_history()
    torch.nn.init.normal_(head_of(plug).population)
    with torch.no_grad():
        population, own = head_of(plug).population * plug.spec.embedding_scale, plug(QUERIES, history).vectors
        for persona_scale in (0.25, 0.5, 1.0, 2.0):
            scaled = plug(QUERIES, history, persona_scale=persona_scale).vectors
            torch.testing.assert_close(scaled[:, :1], own[:, :1])  # the instruction token is the same for all users
            torch.testing.assert_close(scaled[:, 1:], population + persona_scale * (own[:, 1:] - population))
        assert plug(QUERIES, history, persona_scale=0).vectors.shape == (3, 0, OUT)


def test_persona_scale_changes_only_the_users_part_of_the_option_hint() -> None:
    plug, history = build_plug(options="compare", labels=("[1]", "[2]"), query_encoder="head"), build_history()
    options = [Options("Which is it?", ("red wine", "blue cheese"))] * 3
    with torch.no_grad():
        own = plug(QUERIES, history, options=options).vectors[:, -1]
        without_items = plug(QUERIES, build_history(lengths=(0, 0, 0)), options=options).vectors[:, -1]
        for persona_scale in (0.5, 2.0):
            scaled = plug(QUERIES, history, options=options, persona_scale=persona_scale).vectors[:, -1]
            torch.testing.assert_close(scaled, without_items + persona_scale * (own - without_items))
    assert not torch.allclose(own[0], without_items[0])
    torch.testing.assert_close(own[2], without_items[2])  # this user has no items


def test_compared_options_add_one_token_to_plug_and_control() -> None:
    plug, history = build_plug(options="compare", labels=("[1]", "[2]"), query_encoder="head"), build_history()
    options = [Options("which film?", ("a long walk", "who likes films")), None, Options("what?", ("tea", "rain"))]
    plug.cache_queries(QUERIES, options)
    soft = plug(QUERIES, history, options=options).vectors
    assert soft.shape == (3, 3, OUT)
    assert plug.config.soft_tokens == INSTRUCTION.plug_config(plug.config).soft_tokens == 3
    assert not soft[1, 2].any()
    alone = history.select(torch.arange(4), lengths=(4,))
    torch.testing.assert_close(plug(QUERIES[:1], alone, options=options[:1]).vectors, soft[:1])
    stranger = replace(history, vectors=-history.vectors)
    assert not torch.allclose(plug(QUERIES, stranger, options=options).vectors[0, 2], soft[0, 2])
    soft[:, 2].sum().backward()
    hint = head_of(plug).hint
    assert hint is not None
    assert hint.log_sharpness.grad is not None
    assert hint.option_vectors.grad is not None


def test_plug_without_persona_tokens_is_the_instruction_only_control() -> None:
    config = INSTRUCTION.plug_config(replace(PAPER, instruction_tokens=2, persona_tokens=3))
    assert (config.instruction_tokens, config.persona_tokens) == (5, 0)
    plug = build_plug(instruction_tokens=5, persona_tokens=0)
    assert plug(QUERIES, None).vectors.shape == (3, 5, OUT)
    assert [name for name, _ in plug.named_parameters()] == ["instruction"]
    assert plug.persona is None
    assert plug.ignores_query
    torch.testing.assert_close(plug.population_prompt().vectors, plug(QUERIES[:1], None).vectors)


def test_plug_without_tokens_or_history_is_refused() -> None:
    with pytest.raises(ConfigError, match="both are 0"):
        build_plug(instruction_tokens=0, persona_tokens=0)
    with pytest.raises(ConfigError, match="a history for every query"):
        build_plug()(QUERIES, None)


def test_plug_with_contradicting_settings_is_refused() -> None:
    with pytest.raises(ConfigError, match="answer_channel=text"):
        build_plug(answer_channel="label")
    with pytest.raises(ConfigError, match="closed set of labels"):
        build_plug(label_prior="counts")
    with pytest.raises(ConfigError, match="two or more options"):
        build_plug(options="compare")
    with pytest.raises(ConfigError, match="at most persona_tokens=2"):
        build_plug(persona_tokens=2, state_tokens=3)
    assert build_plug(persona_tokens=2, state_tokens=2).ignores_query
    assert not build_plug(persona_tokens=0, state_tokens=2).config.persona_tokens


def test_plug_with_auto_settings_is_refused() -> None:
    with pytest.raises(ConfigError, match="must not be auto"):
        build_plug(answer_channel="auto")
    with pytest.raises(ConfigError, match="must not be auto"):
        build_plug(options="auto")


def test_plug_with_another_encoder_than_the_specs_is_refused() -> None:
    spec = PlugSpec(LLM, 0.25, HashEncoder(WIDTH).identity)
    with pytest.raises(EncoderMismatch, match="hash:16"):
        PersonaPlug(PAPER, spec=spec, encoder=HashEncoder(WIDTH, seed=5))


KINDS: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "all parts": (
        {
            "state_tokens": 1,
            "persona_tokens": 2,
            "shrinkage": True,
            "label_prior": "counts",
            "options": "compare",
            "answer_channel": "label",
            "query_encoder": "head",
        },
        {
            "tokens": ["instruction", "persona.population", "persona.hint.option_vectors"],
            "numbers": [
                "label_prior.log_doubt",
                "label_prior.trust",
                "persona.item_attention.population_score",
                "persona.state_pooling.population_score",
                "persona.hint.log_sharpness",
            ],
            "encoder": [],
            "layers": [
                "persona.query_encoder.linear.weight",
                "persona.projector.inner.weight",
                "persona.projector.inner.bias",
                "persona.projector.outer.weight",
                "persona.projector.outer.bias",
                "persona.projector.label.weight",
            ],
        },
    ),
    "the paper's": (
        {},
        {
            "tokens": ["instruction", "persona.population"],
            "numbers": [],
            "encoder": ["persona.query_encoder.linear.weight"],
            "layers": [
                "persona.projector.inner.weight",
                "persona.projector.inner.bias",
                "persona.projector.outer.weight",
                "persona.projector.outer.bias",
            ],
        },
    ),
    "no persona": (
        {"persona_tokens": 0},
        {"tokens": ["instruction"], "numbers": [], "encoder": [], "layers": []},
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_parameter_kinds_contain_each_parameter_once_in_order(case: str) -> None:
    settings, expected = KINDS[case]
    plug = build_plug(labels=("1", "2", "3"), **settings)
    names = {id(parameter): name for name, parameter in plug.named_parameters()}
    assert {kind: [names[id(p)] for p in parameters] for kind, parameters in plug.parameter_kinds().items()} == expected
    assert sum(map(len, expected.values())) == len(names)
