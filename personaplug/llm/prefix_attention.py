"""Attention from live tokens (soft tokens and answers) to a prompt whose keys and values are fixed.

The prompt of a frozen model is a constant: no gradient needs to reach its keys and values, and none is computed.
Queries of heads that share keys are multiplied together, so neither keys nor values are repeated; several live rows may
share one kept prompt, which is then not repeated either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import eager_mask

NAME = "personaplug_frozen"
KEPT = "kept_states"
"""What the keyword is called that hands the kept states through a model to its layers."""


class CachedPrefix(Cache):
    """Keys and values of a batch of prompts, all layers, for forward passes of the tokens behind them.

    To the model it is a cache that holds T tokens and grows by the live ones; unlike one it never lays the two side by
    side: they meet in `attend` alone.
    """

    def __init__(self, states: Tensor) -> None:
        """Wrap the states.

        Args:
            states: (2 · layers, P, heads, T, width of a head), keys and values in turn, padded on the left.
        """
        super().__init__(layers=[_KeptLayer(*states[place : place + 2]) for place in range(0, len(states), 2)])
        self.states = states

    def live_states(self) -> Tensor | None:
        """Keys and values of the live tokens so far, (2 · layers, R, heads, L, width); None before the first pass."""
        live = [layer.live for layer in self.layers if isinstance(layer, _KeptLayer)]
        found = [states for layer in live for states in (layer.keys, layer.values) if states is not None]
        return torch.stack(found) if found else None


class _KeptLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, True
        self.live = DynamicLayer()  # type: ignore[no-untyped-call]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the live tokens' keys and values to those of earlier passes; all live ones so far."""
        if not self.live.is_initialized:  # nothing to lay them beside, so nothing is copied
            self.live.keys, self.live.values, self.live.is_initialized = key_states, value_states, True
            return key_states, value_states
        return self.live.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.live.get_seq_length()


@contextmanager
def prefix_attention(model: Any) -> Iterator[None]:
    """Let a model attend by `attend`; its forward passes must be given `kept_states`."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Softmax attention over kept and live tokens together; the signature is transformers'.

    Args:
        module: the layer; its `layer_idx` finds its kept states.
        query: (R, H, Q, d), R = P · rows that share a prompt, those of one prompt together.
        key, value: (R, G, L, d) of the live tokens so far, the last Q of which ask; G heads for H = G · heads that
            share them.
        attention_mask: (R, 1, Q, T + L), added to the scores.
        scaling: factor of the scores; 1/√d otherwise.
        softcap: scores are squeezed into ± this (Gemma-2).
    Returns:
        (R, Q, H, d).
    Raises:
        TypeError: for something that it does not know, such as attention sinks.
    """
    unknown = [name for name, given in options.items() if name in _MATTERS and given is not None]
    if unknown:
        raise TypeError(f"this attention knows no {', '.join(unknown)}")
    kept = options[KEPT].layers[module.layer_idx]
    rows, heads, live, width = query.shape
    (_, groups, seen, _), past = key.shape, kept.keys.shape[-2]
    query = query * (width**-0.5 if scaling is None else scaling)
    # Heads that share keys side by side: (R · G, H/G · Q, d).
    own = query.reshape(rows * groups, -1, width)
    scores = torch.cat(
        [_shared(own, kept.keys.transpose(-1, -2)), torch.bmm(own, key.reshape(-1, seen, width).transpose(1, 2))],
        dim=-1,
    ).view(rows, heads, live, past + seen)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax((scores + attention_mask).float(), dim=-1).to(value.dtype).view(*own.shape[:2], past + seen)
    mixed = _shared(weights[..., :past], kept.values) + torch.bmm(
        weights[..., past:], value.reshape(-1, seen, value.shape[-1])
    )
    return mixed.view(rows, heads, live, -1).transpose(1, 2).contiguous(), None


_MATTERS = ("s_aux", "position_bias", "alibi", "indexer")


def _shared(rows: Tensor, kept: Tensor) -> Tensor:
    """Multiply (P · r · G, n, a) rows with the (P, G, a, b) kept matrix of their prompt and head: (P · r · G, n, b)."""
    prompts, groups = kept.shape[:2]
    count, size, width = rows.shape
    sharing = count // (prompts * groups)
    if sharing == 1:
        return torch.bmm(rows, kept.reshape(count, *kept.shape[2:]))
    # Rows of one prompt and head under each other, so that one product serves them all.
    together = rows.view(prompts, sharing, groups, size, width).transpose(1, 2).reshape(prompts * groups, -1, width)
    found = torch.bmm(together, kept.reshape(prompts * groups, *kept.shape[2:]))
    return found.view(prompts, groups, sharing, size, -1).transpose(1, 2).reshape(count, size, -1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
