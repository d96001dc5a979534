"""Token embeddings of a model, with the factor that some families apply outside of the embedding layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reader = Callable[[Tensor], Tensor]


class TokenEmbedding:
    """Maps token ids (…) to the embeddings (…, D) that have the same effect on the model.

    Attributes:
        layer: the model's input embeddings.
        factor: factor that the model applies to the layer's output for ids, but not to embeddings; see `find_factor`.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.factor = layer, 1.0

    def __call__(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.layer(ids)
        return embeds if self.factor == 1 else embeds * self.factor

    @property
    def weight(self) -> Tensor:
        """The layer's table, (V, D), without any factor."""
        table: Tensor = self.layer.weight
        return table

    @property
    def num_embeddings(self) -> int:
        return int(self.weight.shape[0])


@torch.no_grad()
def find_factor(model: Any, layer: Any, *, read_ids: Reader, read_embeds: Reader) -> float:
    """Return the factor by which embeddings must be multiplied to give the same output as their ids."""
    factors = _candidate_factors(model, layer)
    if len(factors) == 1:
        return factors[0]
    ids = torch.arange(1, min(5, len(layer.weight)), device=layer.weight.device)[None]
    try:
        expected, embeds = read_ids(ids).float(), layer(ids)
        errors = [float((read_embeds(embeds * factor).float() - expected).norm()) for factor in factors]
    except Exception:  # the model check reports why such a family fails
        return 1.0
    return factors[errors.index(min(errors))]


def _candidate_factors(model: Any, layer: Any) -> list[float]:
    """Return 1 and the positive float attributes of the modules that contain the embedding layer."""
    # Compare tables, because copies of the layer may share only the table.
    owners = [
        module
        for module in model.modules()
        if any(getattr(child, "weight", None) is layer.weight for child in module.children())
    ]
    numbers = [value for owner in owners for value in vars(owner).values() if isinstance(value, float) and value > 0]
    return list(dict.fromkeys([1.0, *numbers]))
