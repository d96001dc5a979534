"""Token embeddings of a model, as it reads them in place of ids.

Some families multiply the embeddings of ids by a factor outside of the embedding layer. Others (Gemma 3n, Gemma 4 E)
also look up a vector per token for each layer. An embedding here has both: D values, then those of all layers. A soft
token has no id, so it gets the vectors of the padding token, as pictures do in these families.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Reader = Callable[[Tensor], Tensor]


class TokenEmbedding:
    """Maps token ids (…) to the embeddings (…, D + E) that have the same effect on the model.

    Attributes:
        layer: the model's input embeddings.
        factor: factor that the model applies to the layer's output for ids, but not to embeddings; see `find_factor`.
        per_layer: maps ids (…) to per-layer vectors (…, layers, e), layers · e = E; None = E is 0.
        pad_id: token whose per-layer vectors soft tokens get.
    """

    def __init__(self, layer: Any, *, per_layer: Reader | None = None, pad_id: int = 0) -> None:
        self.layer, self.factor, self.per_layer, self.pad_id = layer, 1.0, per_layer, pad_id

    def __call__(self, ids: Tensor) -> Tensor:
        embeds = self.vectors(ids)
        return embeds if self.per_layer is None else torch.cat([embeds, self.per_layer(ids).flatten(-2)], dim=-1)

    def vectors(self, ids: Tensor) -> Tensor:
        """Return the embeddings without per-layer vectors, (…, D)."""
        embeds: Tensor = self.layer(ids)
        return embeds if self.factor == 1 else embeds * self.factor

    def complete(self, vectors: Tensor) -> Tensor:
        """Return soft tokens (…, D) with per-layer vectors, (…, D + E); keep those that have them."""
        if self.per_layer is None or vectors.shape[-1] != self.weight.shape[1]:
            return vectors
        pad = self._pad_vectors.flatten().to(vectors)
        return torch.cat([vectors, pad.expand(*vectors.shape[:-1], -1)], dim=-1)

    def model_inputs(self, embeds: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a model's forward pass for embeddings (B, T, D + E)."""
        if self.per_layer is None:
            return {"inputs_embeds": embeds}
        vectors, per_layer = embeds.tensor_split([self.weight.shape[1]], dim=-1)
        shape = (*per_layer.shape[:-1], *self._pad_vectors.shape)
        return {"inputs_embeds": vectors, "per_layer_inputs": per_layer.reshape(shape)}

    @cached_property
    def _pad_vectors(self) -> Tensor:
        """The padding token's per-layer vectors, (layers, e)."""
        assert self.per_layer is not None
        with torch.no_grad():
            return self.per_layer(torch.tensor(self.pad_id, device=self.weight.device))

    @property
    def weight(self) -> Tensor:
        """The layer's table, (V, D), without any factor."""
        table: Tensor = self.layer.weight
        return table

    @property
    def num_embeddings(self) -> int:
        return int(self.weight.shape[0])


def find_per_layer(model: Any) -> Reader | None:
    """Return the function that looks up a model's per-layer vectors, or None if it has none."""
    if "per_layer_inputs" not in inspect.signature(model.forward).parameters:
        return None
    owners = (module for module in model.modules() if getattr(module, "hidden_size_per_layer_input", 0))
    return next((owner.get_per_layer_inputs for owner in owners if hasattr(owner, "get_per_layer_inputs")), None)


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
