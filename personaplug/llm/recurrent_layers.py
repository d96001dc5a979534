"""Recurrent layers (Mamba, gated DeltaNet, short convolution) in a cache that continues a prompt.

Their states are copied per row and replaced at each pass. transformers' own layers change them in place, which would
change the prompt's states and break gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from personaplug.llm.prefix_attention import PrefixLayer


class RecurrentLayer(LinearAttentionLayer):
    """Recurrent states of P prompts, later of R rows.

    Args:
        states: conv.N and recurrent.N of the prompts, each (P, …).
    """

    def __init__(self, states: Mapping[str, Tensor]) -> None:
        count = 1 + max(int(name.partition(".")[2]) for name in states)
        LinearAttentionLayer.__init__(self, number_of_states=count)
        for name, tensor in states.items():
            kind, number = name.partition(".")[0], int(name.partition(".")[2])
            getattr(self, f"{kind}_states")[number] = tensor
            getattr(self, f"is_{kind}_states_initialized")[number] = True
            self.has_previous_state[number] = True
        self._is_copied = False

    def copy_for(self, rows: int) -> None:
        """Copy the states of the P prompts for R rows; further calls do nothing."""
        if self._is_copied:
            return
        for states in (self.conv_states, self.recurrent_states):
            for number, tensor in states.items():
                if tensor is not None:
                    states[number] = tensor.repeat_interleave(rows // len(tensor), dim=0)
        self._is_copied = True

    def update_conv_state(  # type: ignore[override]
        self, conv_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        earlier: Any = self.conv_states[state_idx]
        full = torch.cat([earlier, conv_states], dim=-1)
        self.conv_states[state_idx] = full[..., -earlier.shape[-1] :]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class HybridLayer(RecurrentLayer, PrefixLayer):  # type: ignore[misc, no-untyped-call, override]
    """A layer with recurrent states beside keys and values (Falcon-H1)."""

    def __init__(self, states: Mapping[str, Tensor], *, keys: Tensor, values: Tensor, joins: bool) -> None:
        RecurrentLayer.__init__(self, states)
        PrefixLayer.__init__(self, keys, values, joins=joins)

    def copy_for(self, rows: int) -> None:
        RecurrentLayer.copy_for(self, rows)
        PrefixLayer.copy_for(self, rows)


def prefix_layer(tensors: Mapping[str, Tensor], *, joins: bool) -> Any:
    """Return a layer that continues P prompts; `tensors` are its parts by name, each (P, …)."""
    states = {name: tensor for name, tensor in tensors.items() if "." in name}
    if not tensors:
        return DummyLayer()  # type: ignore[no-untyped-call]
    if not states:
        return PrefixLayer(tensors["keys"], tensors["values"], joins=joins)
    if "keys" in tensors:
        return HybridLayer(states, keys=tensors["keys"], values=tensors["values"], joins=joins)
    return RecurrentLayer(states)


def empty_recurrent_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model with recurrent layers. It also keeps tokens beyond a sliding window.

    Args:
        config: of the text model.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_without_window(layer) if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    return cache


def _without_window(layer: Any) -> Any:
    if isinstance(layer, LinearAttentionLayer):
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return DynamicLayer()  # type: ignore[no-untyped-call]
