"""How much each item of a history counts for a query: eq. 3 of PPlug, its ablation and its successor, a class each.

Knows tensors only: no text, no encoder, no language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from personaplug.config import PlugConfig
from personaplug.errors import BadConfig, ShapeMismatch

_HEAD_WIDTH = 64  # r, values that a head compares


class Aggregator(nn.Module):
    """Weighs the items of histories, user by user.

    With shrinkage there is one more, trained score in each user's softmax, of what is common to all: the weights then
    sum to less than 1, the less the fewer the items are and the lower their scores.

    Attributes:
        heads: how many weighings it makes of the same items (H), each with a softmax of its own.
        asks: whether the weights depend on the query.
    """

    asks = True

    def __init__(self, *, heads: int = 1, shrinkage: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.common = nn.Parameter(torch.ones(heads)) if shrinkage else None

    def forward(self, query: Tensor, items: Tensor, *, lengths: Sequence[int]) -> Tensor:
        """Return one weight per item and head; each user's sum to 1, or to less with shrinkage.

        Args:
            query: (B, E) unit vectors.
            items: (M, E) unit vectors, one user's behind the other's.
            lengths: how many each of the B users has, M together; 0 is allowed.
        Returns:
            (M, H) in the format of `query`.
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
        return torch.softmax(torch.cat([scores, self.common.to(scores.dtype)[None]]), dim=0)[:-1]

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        """Return (n, H) scores of one user's (n, E) items for a query (E,), before the softmax."""
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
        return (items @ query / self.temperature)[:, None]


class MeanAggregator(Aggregator):
    """Weigh all items alike (PPlug, Table 8, "without IA")."""

    asks = False

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return items.new_zeros(len(items), 1)


class HeadedAttention(Aggregator):
    """Weigh items by several trained likenesses to the query at once, each for its share of the persona's values.

    score_h(i) = s_h · cos(A_h x, B_h h_i) − r_h · log(1 + age_i), where an item's age counts the later items.

    The first head has no likeness in it: what is true of a user whatever is asked keeps a place. The sharpness s_h is
    trained from 5 (an item may then outweigh another e¹⁰ times, which eq. 3 lacks), the forgetting r_h from 0.
    """

    def __init__(self, width: int, *, heads: int, shrinkage: bool = False) -> None:
        super().__init__(heads=heads, shrinkage=shrinkage)
        self.of_query = nn.Parameter(torch.randn(heads - 1, _HEAD_WIDTH, width) / math.sqrt(width))
        # Alike at first, so that likeness is that of the encoder's own space.
        self.of_items = nn.Parameter(self.of_query.detach().clone())
        self.log_sharpness = nn.Parameter(torch.full((heads - 1,), math.log(5)))
        self.forgetting = nn.Parameter(torch.zeros(heads))

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        asked = nn.functional.normalize(self.of_query @ query, dim=-1)  # (H - 1, r)
        known = nn.functional.normalize(torch.einsum("hre,ne->nhr", self.of_items, items), dim=-1)
        likeness = torch.einsum("hr,nhr->nh", asked, known) * self.log_sharpness.exp()
        ages = torch.arange(len(items) - 1, -1, -1, device=items.device, dtype=items.dtype).log1p()
        return nn.functional.pad(likeness, (1, 0)) - ages[:, None] * self.forgetting


def per_user(values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """What lies one user's behind the other's, user by user."""
    return torch.split_with_sizes(values, list(lengths))


def build_aggregator(config: PlugConfig, *, width: int) -> Aggregator:
    """The aggregator that a plug's config names, for vectors of E values.

    Raises:
        BadConfig: for an unknown name.
    """
    if config.aggregator == "dot":
        return DotAttention(config.temperature, shrinkage=config.shrinkage)
    if config.aggregator == "mean":
        return MeanAggregator(shrinkage=config.shrinkage)
    if config.aggregator == "heads":
        return HeadedAttention(width, heads=config.heads, shrinkage=config.shrinkage)
    raise BadConfig(f"plug.aggregator must be one of dot, mean, heads; found {config.aggregator!r}.")
