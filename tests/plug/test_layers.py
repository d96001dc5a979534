"""Layers against hand-computed values: item attention (eq. 3), option hint, cache of the frozen query encoder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from personaplug.data.records import ITEM_KINDS
from personaplug.encoders import HashEncoder
from personaplug.encoders.encoded_sample import PREFERENCE_KIND
from personaplug.errors import ShapeMismatch
from personaplug.plug.layers import Aggregator, DotAttention, FrozenQueryEncoder, MeanPooling, OptionHint

QUERY = torch.tensor([[1.0, 0.0]])
ITEMS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
AGGREGATORS = (DotAttention, MeanPooling)
ANSWERS = torch.zeros(3, dtype=torch.int64)


def test_dot_attention_weights_are_a_softmax_of_dot_products() -> None:
    raw = [math.exp(1.0), math.exp(0.0), math.exp(0.6)]
    expected = torch.tensor([value / sum(raw) for value in raw])
    torch.testing.assert_close(DotAttention()(QUERY, ITEMS, lengths=[3], kind_ids=ANSWERS), expected)


def test_dot_attention_temperature_divides_the_scores() -> None:
    raw = [math.exp(10.0), math.exp(0.0), math.exp(6.0)]
    expected = torch.tensor([value / sum(raw) for value in raw])
    torch.testing.assert_close(DotAttention(0.1)(QUERY, ITEMS, lengths=[3], kind_ids=ANSWERS), expected)


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_aggregator_weighs_each_user_separately(kind: type[Aggregator]) -> None:
    aggregator = kind()
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    together = aggregator(queries, ITEMS, lengths=[1, 2], kind_ids=ANSWERS)
    torch.testing.assert_close(together[:1], aggregator(queries[:1], ITEMS[:1], lengths=[1], kind_ids=ANSWERS[:1]))
    torch.testing.assert_close(together[1:], aggregator(queries[1:], ITEMS[1:], lengths=[2], kind_ids=ANSWERS[1:]))
    assert together[1:].sum(dim=0).tolist() == pytest.approx(1)


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_user_without_items_has_no_weights_and_finite_gradients(kind: type[Aggregator]) -> None:
    query = QUERY.repeat(2, 1).requires_grad_()
    weights = kind()(query, ITEMS, lengths=[0, 3], kind_ids=ANSWERS)
    assert weights.shape == (3,)
    if kind is not MeanPooling:
        weights[0].backward()
        assert query.grad is not None
        assert torch.isfinite(query.grad).all()
        assert query.grad[0].tolist() == [0, 0]
        assert query.grad[1].abs().sum() > 0


def test_mean_pooling_weighs_all_items_equally() -> None:
    assert MeanPooling()(QUERY, ITEMS[:2], lengths=[2], kind_ids=ANSWERS[:2]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_aggregator_weights_with_shrinkage_sum_to_less_than_one(kind: type[Aggregator]) -> None:
    weights = kind(shrinkage=True)(QUERY, ITEMS, lengths=[3], kind_ids=ANSWERS)
    assert 0 < weights.sum() < 1


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_preferences_get_half_of_the_weight_among_many_answers(kind: type[Aggregator]) -> None:
    items = torch.nn.functional.normalize(torch.randn(402, 2), dim=-1)
    kind_ids = torch.zeros(402, dtype=torch.int64)
    kind_ids[[7, 300]] = PREFERENCE_KIND
    weights = kind(kinds=True)(QUERY, items, lengths=[402], kind_ids=kind_ids)
    assert weights[kind_ids == PREFERENCE_KIND].sum().item() == pytest.approx(0.5)
    assert weights.sum().item() == pytest.approx(1)
    without_kinds = kind(kinds=False)(QUERY, items, lengths=[402], kind_ids=kind_ids)
    assert without_kinds[kind_ids == PREFERENCE_KIND].sum() < 0.1


@pytest.mark.parametrize("kind", AGGREGATORS)
@pytest.mark.parametrize("kind_id", range(len(ITEM_KINDS)))
def test_history_of_one_kind_has_the_same_weights_without_kinds(kind: type[Aggregator], kind_id: int) -> None:
    kind_ids = torch.full((3,), kind_id)
    weights = [
        kind(shrinkage=True, kinds=kinds)(QUERY, ITEMS, lengths=[3], kind_ids=kind_ids) for kinds in (True, False)
    ]
    torch.testing.assert_close(*weights)


def test_preference_share_gets_a_gradient() -> None:
    attention = DotAttention(kinds=True)
    weights = attention(QUERY, ITEMS, lengths=[3], kind_ids=torch.tensor([0, PREFERENCE_KIND, 0]))
    weights[1].backward()
    assert attention.preference_share is not None
    assert attention.preference_share.grad is not None
    assert attention.preference_share.grad.item() == pytest.approx(0.25)  # of a sigmoid at 0


def test_aggregator_refuses_vectors_of_different_widths() -> None:
    with pytest.raises(ShapeMismatch, match="2 values and the items have 3"):
        DotAttention()(QUERY, torch.zeros(1, 3), lengths=[1], kind_ids=ANSWERS)


@pytest.mark.parametrize("lengths", [[2], [1, 2], [4]])
def test_aggregator_refuses_lengths_that_do_not_match(lengths: list[int]) -> None:
    with pytest.raises(ShapeMismatch, match="lengths with the sum 3"):
        DotAttention()(QUERY, ITEMS, lengths=lengths, kind_ids=ANSWERS)


def test_option_hint_equals_its_formula_and_is_zero_for_equal_options() -> None:
    torch.manual_seed(0)
    hint = OptionHint(2, width=8)
    with torch.no_grad():
        hint.log_sharpness.copy_(torch.tensor([0.1, 0.2, 0.3]))
    vectors = torch.nn.functional.normalize(torch.randn(6, 16), dim=-1)
    question, options, items = vectors[0], vectors[1:3], vectors[3:]
    cosines = (options @ items.T).numpy()
    features = np.stack([(options @ question).numpy(), cosines.mean(axis=1), cosines.max(axis=1)], axis=1)
    preference = np.tanh((features - features[::-1]) @ np.exp([0.1, 0.2, 0.3]))
    expected = preference @ hint.option_vectors.detach().numpy()
    np.testing.assert_allclose(hint(question, options, items).detach(), expected, atol=1e-5)
    assert not hint(question, options[:1].expand(2, -1), items).any()
    assert torch.isfinite(hint(question, options, items[:0])).all()


def test_cache_of_frozen_query_encoder_is_bounded_and_keeps_the_latest_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personaplug.plug.layers._MAX_CACHED_TEXTS", 4)
    encoder = HashEncoder(16)
    frozen, encoded = FrozenQueryEncoder(encoder), list[str]()
    source = encoder.query_encoder()
    plain = source.encode

    def encode(texts: list[str]) -> np.ndarray[Any, Any]:
        encoded.extend(texts)
        return plain(texts)

    monkeypatch.setattr(source, "encode", encode)
    monkeypatch.setattr(frozen, "_encoder", source)
    for texts in (["a", "b", "c"], ["c", "d", "e"], ["c", "d", "e"], ["f", "g", "h", "i", "j", "k"], ["f", "k"]):
        np.testing.assert_allclose(frozen(texts).numpy(), encoder.encode(texts), atol=1e-6)
    assert encoded == list("abcdefghijk"), "a text is encoded once while it stays cached"
    frozen(["a"])
    assert encoded[-1] == "a", "a dropped text is encoded again"
