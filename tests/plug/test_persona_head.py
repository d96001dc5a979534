"""PersonaHead: state, attention, shrinkage, answer channels, the query encoder and number formats."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from plugs import QUERIES, WIDTH, build_history, build_plug, head_of

from personaplug.encoders import HashEncoder, QueryEncoder


def test_head_items_in_bfloat16_give_nearly_the_same_persona() -> None:
    plug, history = build_plug(), build_history()
    exact = plug(QUERIES, history).vectors
    assert head_of(plug.compute_items_in("float16")).item_dtype == torch.float32
    approximate = plug.compute_items_in("bfloat16")(QUERIES, history).vectors
    halves = replace(history, vectors=history.vectors.half())  # the dtype of a store
    torch.testing.assert_close(plug(QUERIES, halves).vectors, approximate, atol=0.01, rtol=0.01)
    weights, weights_of_halves = (head_of(plug).item_weights(QUERIES, batch) for batch in (history, halves))
    torch.testing.assert_close(weights_of_halves, weights, atol=1e-3, rtol=1e-3)
    assert not torch.equal(approximate, exact)
    torch.testing.assert_close(approximate, exact, atol=0.02, rtol=0.02)


def test_head_with_repeated_queries_encodes_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plug = build_plug(query_encoder="head")
    encoded: list[list[str]] = []
    encode = QueryEncoder.encode

    def record(encoder: QueryEncoder, texts: list[str]) -> Any:
        encoded.append(texts)
        return encode(encoder, texts)

    monkeypatch.setattr(QueryEncoder, "encode", record)
    first = plug(["tea", "milk", "tea"], build_history()).vectors
    again = plug(["tea", "milk", "tea"], build_history()).vectors
    assert encoded == [["tea", "milk"]]
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", ["trained", "head"])
def test_head_with_mean_pooling_only_has_no_query_encoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashEncoder, "query_encoder", lambda _: pytest.fail("a query encoder was created"))
    plug, history = build_plug(state_tokens=1, query_encoder=kind), build_history()
    assert head_of(plug).query_encoder is None
    assert not any("query_encoder" in name for name in plug.state_dict())
    plug.cache_queries(QUERIES)
    assert torch.equal(plug(QUERIES, history).vectors, plug(QUERIES[::-1], history).vectors)
    assert head_of(plug).item_weights(QUERIES, history).tolist() == [0.25] * 4 + [0.5] * 2


@pytest.mark.parametrize("kind", ["trained", "head"])
def test_head_query_encoder_learns_and_the_frozen_encoder_does_not(kind: str) -> None:
    encoder = HashEncoder(WIDTH)
    plug = build_plug(encoder, query_encoder=kind)
    before = encoder.encode(QUERIES)
    start = head_of(plug).item_weights(QUERIES, build_history()).detach()
    optimizer = torch.optim.SGD(plug.parameters(), lr=1.0)
    plug(QUERIES, build_history()).vectors.pow(2).sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(encoder.encode(QUERIES), before)
    assert not torch.allclose(head_of(plug).item_weights(QUERIES, build_history()), start)


def test_head_label_channel_reads_labels_and_text_channel_does_not() -> None:
    plug, history = build_plug(answer_channel="label", labels=("1", "2", "3")), build_history(lengths=(4, 4, 4))
    other = replace(history, label_ids=(history.label_ids + 1) % 3)
    assert not torch.allclose(plug(QUERIES, history).vectors, plug(QUERIES, other).vectors)
    text_plug = build_plug(answer_channel="text")
    assert torch.equal(text_plug(QUERIES, history).vectors, text_plug(QUERIES, other).vectors)


def test_head_style_channel_reads_style_and_text_channel_does_not() -> None:
    plug, history = build_plug(answer_channel="style"), build_history(lengths=(4, 4, 4))
    other = replace(history, style=history.style + 1)
    assert not torch.allclose(plug(QUERIES, history).vectors, plug(QUERIES, other).vectors)
    text_plug = build_plug(answer_channel="text")
    assert torch.equal(text_plug(QUERIES, history).vectors, text_plug(QUERIES, other).vectors)


def test_head_item_without_label_adds_nothing_to_the_hidden_layer() -> None:
    projector = head_of(build_plug(answer_channel="label", labels=("a", "b", "c"))).projector
    vectors = build_history().vectors
    none = torch.full((len(vectors),), -1)
    answers = torch.zeros_like(none)
    hidden = projector.hidden(vectors, label_ids=none, style=vectors.new_empty(len(vectors), 0), kind_ids=answers)
    expected = torch.nn.functional.linear(vectors, projector.inner.weight * projector.input_scale, projector.inner.bias)
    torch.testing.assert_close(hidden, torch.nn.functional.gelu(expected))


@pytest.mark.parametrize("state_tokens", [0, 1])
def test_head_with_shrinkage_gives_the_population_less_weight_with_every_item(state_tokens: int) -> None:
    head = head_of(build_plug(shrinkage=True, state_tokens=state_tokens))
    own = build_history(lengths=(12,))
    population_weights = []
    for items in range(13):
        part = own.select(torch.arange(items), lengths=(items,))
        population_weights.append(1 - head.item_weights(QUERIES[:1], part).sum().item())
    assert population_weights[0] == 1
    assert all(more > less > 0 for more, less in pairwise(population_weights))
    if state_tokens:  # the score is 1 for the population and 0 for each item
        assert population_weights[5] == pytest.approx(math.e / (math.e + 5))


def test_head_with_shrinkage_adds_the_population_persona_to_the_persona_of_the_items() -> None:
    head, history = head_of(build_plug(shrinkage=True)), build_history(lengths=(4, 2, 0))
    torch.nn.init.normal_(head.population)
    with torch.no_grad():
        weights = head.item_weights(QUERIES, history)
        hidden = head._hidden(history)
        each = torch.nn.functional.linear(hidden, head.projector.outer.weight, head.projector.outer.bias)
        persona = head(QUERIES, history)[:, 0]
    for row, items in enumerate((slice(0, 4), slice(4, 6), slice(6, 6))):
        share = weights[items].sum()
        expected = weights[items] @ each[items] + (1 - share) * head.population[0]
        torch.testing.assert_close(persona[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shrinkage", [False, True])
def test_head_state_tokens_weigh_items_equally_and_other_tokens_attend_to_the_query(shrinkage: bool) -> None:
    settings: dict[str, Any] = {"persona_tokens": 3, "temperature": 0.1, "shrinkage": shrinkage}
    head, history = head_of(build_plug(state_tokens=2, **settings)), build_history()
    torch.nn.init.normal_(head.population)
    state, attention = (head_of(build_plug(state_tokens=count, **settings)) for count in (3, 0))
    for other in (state, attention):
        names = other.state_dict().keys()
        other.load_state_dict({name: value for name, value in head.state_dict().items() if name in names})
    persona = head(QUERIES, history)
    torch.testing.assert_close(persona[:, :2], state(QUERIES, history)[:, :2])
    torch.testing.assert_close(persona[:, 2:], attention(QUERIES, history)[:, 2:])
    moved = head(QUERIES[1:] + QUERIES[:1], history)
    torch.testing.assert_close(moved[:, :2], persona[:, :2])
    assert not torch.allclose(moved[:2, 2:], persona[:2, 2:])
    mixed = (2 * state.item_weights(QUERIES, history) + attention.item_weights(QUERIES, history)) / 3
    torch.testing.assert_close(head.item_weights(QUERIES, history), mixed)


def test_head_with_precomputed_history_makes_the_same_persona_and_selects_items() -> None:
    head, history = head_of(build_plug(persona_tokens=2)), build_history()
    precomputed = head.precompute(history)
    assert precomputed.nbytes > history.nbytes
    assert torch.equal(head(QUERIES, precomputed), head(QUERIES, history))
    items, lengths = torch.tensor([3, 0, 5]), (2, 1, 0)
    selected = precomputed.select(items, lengths=lengths)
    assert selected.hidden is not None
    torch.testing.assert_close(head(QUERIES, selected), head(QUERIES, history.select(items, lengths=lengths)))
