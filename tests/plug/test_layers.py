"""Eq. 3 by hand, and the edge cases in the aggregators' contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from personaplug.config import PlugConfig
from personaplug.errors import ShapeMismatch
from personaplug.plug.layers import Aggregator, DotAttention, MeanPooling, build_pooling

QUERY = torch.tensor([[1.0, 0.0]])
ITEMS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
NAMES = ("dot", "mean")


def _built(name: Any, *, shrinkage: bool = False) -> Aggregator:
    torch.manual_seed(0)
    return build_pooling(PlugConfig(aggregator=name, shrinkage=shrinkage))


def test_dot_attention_is_a_softmax_of_dot_products() -> None:
    raw = [math.exp(1.0), math.exp(0.0), math.exp(0.6)]
    expected = torch.tensor([value / sum(raw) for value in raw])
    torch.testing.assert_close(DotAttention()(QUERY, ITEMS, lengths=[3]), expected)


def test_temperature_divides_the_scores() -> None:
    raw = [math.exp(10.0), math.exp(0.0), math.exp(6.0)]
    expected = torch.tensor([value / sum(raw) for value in raw])
    torch.testing.assert_close(DotAttention(0.1)(QUERY, ITEMS, lengths=[3]), expected)


@pytest.mark.parametrize("name", NAMES)
def test_each_user_has_weights_of_their_own(name: str) -> None:
    aggregator = _built(name)
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    together = aggregator(queries, ITEMS, lengths=[1, 2])
    torch.testing.assert_close(together[:1], aggregator(queries[:1], ITEMS[:1], lengths=[1]))
    torch.testing.assert_close(together[1:], aggregator(queries[1:], ITEMS[1:], lengths=[2]))
    assert together[1:].sum(dim=0).tolist() == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
def test_a_user_without_items_has_no_weights_and_finite_gradients(name: str) -> None:
    query = QUERY.repeat(2, 1).requires_grad_()
    weights = _built(name)(query, ITEMS, lengths=[0, 3])
    assert weights.shape == (3,)
    if name != "mean":
        weights[0].backward()
        assert query.grad is not None
        assert torch.isfinite(query.grad).all()
        assert query.grad[0].tolist() == [0, 0]
        assert query.grad[1].abs().sum() > 0


def test_mean_weighs_all_items_alike() -> None:
    assert MeanPooling()(QUERY, ITEMS[:2], lengths=[2]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", NAMES)
def test_with_shrinkage_something_is_left(name: str) -> None:
    weights = _built(name, shrinkage=True)(QUERY, ITEMS, lengths=[3])
    assert 0 < weights.sum() < 1


def test_vectors_of_two_encoders_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="2 values and the items have 3"):
        DotAttention()(QUERY, torch.zeros(1, 3), lengths=[1])


@pytest.mark.parametrize("lengths", [[2], [1, 2], [4]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ShapeMismatch, match="3 items together"):
        DotAttention()(QUERY, ITEMS, lengths=lengths)
