"""Eq. 3 by hand, and the edge cases in the aggregators' contract."""

from __future__ import annotations

import math

import pytest
import torch

from personaplug.aggregators import DotAttention, MeanAggregator, build_aggregator
from personaplug.errors import BadConfig, ShapeMismatch

QUERY = torch.tensor([[1.0, 0.0]])
ITEMS = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
ALL = torch.tensor([[True, True, True]])


def test_dot_attention_is_a_softmax_of_dot_products() -> None:
    raw = [math.exp(1.0), math.exp(0.0), math.exp(0.6)]
    expected = torch.tensor([[value / sum(raw) for value in raw]])
    torch.testing.assert_close(DotAttention()(QUERY, ITEMS, mask=ALL), expected)


def test_temperature_divides_the_scores() -> None:
    raw = [math.exp(10.0), math.exp(0.0), math.exp(6.0)]
    expected = torch.tensor([[value / sum(raw) for value in raw]])
    torch.testing.assert_close(DotAttention(0.1)(QUERY, ITEMS, mask=ALL), expected)


def test_padded_items_weigh_nothing_and_the_rest_sums_to_one() -> None:
    weights = DotAttention()(QUERY, ITEMS, mask=torch.tensor([[True, False, True]]))
    assert weights[0, 1] == 0
    assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["dot", "mean"])
def test_a_user_without_items_has_weights_of_zero_and_finite_gradients(name: str) -> None:
    query = QUERY.clone().requires_grad_()
    weights = build_aggregator(name, temperature=1.0)(query, ITEMS, mask=torch.zeros(1, 3, dtype=torch.bool))
    assert weights.tolist() == [[0, 0, 0]]
    if name == "dot":
        weights.sum().backward()
        assert query.grad is not None
        assert torch.isfinite(query.grad).all()


def test_mean_weighs_all_real_items_alike() -> None:
    weights = MeanAggregator()(QUERY, ITEMS, mask=torch.tensor([[True, True, False]]))
    assert weights.tolist() == [[0.5, 0.5, 0.0]]


def test_vectors_of_two_encoders_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="2 values and the items have 3"):
        DotAttention()(QUERY, torch.zeros(1, 1, 3), mask=torch.tensor([[True]]))


def test_an_unknown_aggregator_is_refused() -> None:
    with pytest.raises(BadConfig, match="dot, mean"):
        build_aggregator("max", temperature=1.0)
