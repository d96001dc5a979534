"""How much each item of a history counts for a query: eq. 3 of PPlug and its ablation, one small class each.

Knows tensors only: no text, no encoder, no language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from personaplug.errors import BadConfig, ShapeMismatch


class Aggregator(nn.Module):
    """Weighs the items of a history."""

    def forward(self, query: Tensor, items: Tensor, *, mask: Tensor) -> Tensor:
        """Return one weight per item; padded items get 0.

        Args:
            query: (B, E) unit vectors.
            items: (B, N, E) unit vectors.
            mask: (B, N) bool, True where an item is real.
        Returns:
            (B, N); each row sums to 1, or is all 0 for a user without items.
        Raises:
            ShapeMismatch: if query and items were made by encoders of different width.
        """
        if query.shape[-1] != items.shape[-1]:
            raise ShapeMismatch(
                f"The query has {query.shape[-1]} values and the items have {items.shape[-1]}: "
                f"both must come from the same encoder."
            )
        return masked_softmax(self.scores(query, items), mask=mask)

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        """Return (B, N) scores, before the softmax over the real items."""
        raise NotImplementedError


class DotAttention(Aggregator):
    """Weigh items by their dot product with the query (PPlug, eq. 3).

    w_i = exp(x·h_i / temperature) / Σ_k exp(x·h_k / temperature)

    With unit vectors and temperature 1 the weights are close to uniform: x·h lies in [-1, 1], so no item
    outweighs another by more than e² ≈ 7.4 times. The paper uses temperature 1; it is the default here too.

    Source: PPlug, https://arxiv.org/abs/2409.11901, eq. 3.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return torch.einsum("be,bne->bn", query, items) / self.temperature


class MeanAggregator(Aggregator):
    """Weigh all items alike (PPlug, Table 8, "without IA")."""

    def scores(self, query: Tensor, items: Tensor) -> Tensor:
        return items.new_zeros(items.shape[:2])


def build_aggregator(name: str, *, temperature: float) -> Aggregator:
    """The aggregator of that name.

    Raises:
        BadConfig: for an unknown name.
    """
    if name == "dot":
        return DotAttention(temperature)
    if name == "mean":
        return MeanAggregator()
    raise BadConfig(f"plug.aggregator must be one of dot, mean; found {name!r}.")


def masked_softmax(scores: Tensor, *, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where `mask` is True; a row without any True is all 0, never NaN."""
    weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)
    return weights * mask
