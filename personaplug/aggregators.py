"""How much each item of a history counts for a query: eq. 3 of PPlug and its ablation, a class each.

Knows tensors only: no text, no encoder, no language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from personaplug.config import PlugConfig
from personaplug.errors import BadConfig, ShapeMismatch


class Aggregator(nn.Module):
    """Weighs the items of histories, user by user.

    With shrinkage there is one more, trained score in each user's softmax, of what is common to all: the weights then
    sum to less than 1, the less the fewer the items are and the lower their scores.

    Attributes:
        asks: whether the weights depend on the query.
    """

    asks = True

    def __init__(self, *, shrinkage: bool = False) -> None:
        super().__init__()
        self.common = nn.Parameter(torch.ones(1)) if shrinkage else None

    def forward(self, query: Tensor, items: Tensor, *, lengths: Sequence[int]) -> Tensor:
        """Return one weight per item; each user's sum to 1, or to less with shrinkage.

        Args:
            query: (B, E) unit vectors.
            items: (M, E) unit vectors, one user's behind the other's.
            lengths: how many each of the B users has, M together; 0 is allowed.
        Returns:
            (M,) in the format of `query`.
        Raises:
            ShapeMismatch: if query and items were made by encoders of different width, or the lengths do not fit.
        """
        if query.shape[-1] != items.shape[-1]:
            raise ShapeMismatch(
                f"The query has {query.shape[-1]} values and the items have {items.shape[-1]}: "
                f"both must come from the same encoder."
            )
        if len(lengths) != len(query) or sum(lengths) != len(items):
            raise ShapeMismatch(
                f"{len(query)} queries need as many lengths, {len(items)} items together; found {len(lengths)} with "
                f"{sum(lengths)}."
            )
        users = zip(query, per_user(items, lengths), strict=True)
        return torch.cat([self._softmax(self.scores(one, own.to(query.dtype))) for one, own in users])

    def _softmax(self, scores: Tensor) -> Tensor:
        if self.common is None:
            return torch.softmax(scores, dim=0)
        return torch.softmax(torch.cat([scores, self.common.to(scores.dtype)]), dim=0)[:-1]

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        """Return (n,) scores of one user's (n, E) items for a query (E,), before the softmax."""
        raise NotImplementedError


class DotAttention(Aggregator):
    """Weigh items by their dot product with the query (PPlug, eq. 3).

    w_i = exp(x·h_i / temperature) / Σ_k exp(x·h_k / temperature)

    With unit vectors and temperature 1 the weights are close to uniform: x·h lies in [-1, 1], so no item
    outweighs another by more than e² ≈ 7.4 times. The paper uses temperature 1; it is the default here too.

    Source: PPlug, https://arxiv.org/abs/2409.11901, eq. 3.
    """

    def __init__(self, temperature: float = 1.0, *, shrinkage: bool = False) -> None:
        super().__init__(shrinkage=shrinkage)
        self.temperature = temperature

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return items @ query / self.temperature


class MeanAggregator(Aggregator):
    """Weigh all items alike (PPlug, Table 8, "without IA")."""

    asks = False

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return items.new_zeros(len(items))


def per_user(values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """What lies one user's behind the other's, user by user."""
    return torch.split_with_sizes(values, list(lengths))


def build_aggregator(config: PlugConfig) -> Aggregator:
    """The aggregator that a plug's config names.

    Raises:
        BadConfig: for an unknown name.
    """
    if config.aggregator == "dot":
        return DotAttention(config.temperature, shrinkage=config.shrinkage)
    if config.aggregator == "mean":
        return MeanAggregator(shrinkage=config.shrinkage)
    raise BadConfig(f"plug.aggregator must be one of dot, mean; found {config.aggregator!r}.")
