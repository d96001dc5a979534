"""Attention from live tokens (soft tokens and answer) to a cached prompt.

The keys and values of a frozen model's prompt are constant, so they get no gradient. Grouped-query heads are multiplied
together without repeated keys or values. Several live rows can share one cached prompt.
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

from personaplug.llm.model_cache import cache_argument
from personaplug.llm.padding import left_padding_mask

_ATTENTION_NAME = "personaplug_prefix"
_PREFIX = "personaplug_prefix"  # keyword argument that carries the CachedPrefix through a model to `attend`
_UNSUPPORTED_OPTIONS = ("s_aux", "position_bias", "alibi", "indexer")


class CachedPrefix(Cache):
    """Keys and values of P prompts for forward passes of R live rows that follow them; R is a multiple of P.

    The model sees a cache of T + L tokens. Prompt and live tokens are never concatenated; `attend` combines them.

    Args:
        states: (2 · layers, P, heads, T, head width), keys and values alternating, padded on the left.
        lengths: (P,) real tokens of each prompt.
    """

    def __init__(self, states: Tensor, lengths: Tensor) -> None:
        super().__init__(layers=[_PrefixLayer(*states[index : index + 2]) for index in range(0, len(states), 2)])
        self.states, self.lengths = states, lengths
        self._mask = left_padding_mask(lengths, states.shape[3]).long()

    def mask_and_positions(self, rows: int, live: int) -> tuple[Tensor, Tensor]:
        """Return the attention mask (R, T + L + live) and the positions (R, live) of `live` further tokens."""
        earlier, rows_per_prompt = self.get_seq_length() - self.states.shape[3], rows // len(self.lengths)
        lengths = self.lengths.repeat_interleave(rows_per_prompt)
        mask = self._mask.repeat_interleave(rows_per_prompt, dim=0)
        mask = torch.cat([mask, mask.new_ones(rows, earlier + live)], dim=1)
        positions = lengths[:, None] + torch.arange(earlier, earlier + live, device=lengths.device)
        return mask, positions

    def all_states(self) -> Tensor:
        """Return the states of prompts and live tokens, (2 · layers, P, heads, T + L, head width); needs R = P."""
        live = self.live_states()
        return torch.cat([self.states, live], dim=3) if len(live) else self.states

    def live_states(self) -> Tensor:
        """Return the states of the live tokens, (2 · layers, R, heads, L, head width), or an empty tensor."""
        live = [layer.live for layer in self.layers if isinstance(layer, _PrefixLayer)]
        parts = [states for layer in live for states in (layer.keys, layer.values) if states is not None]
        return torch.stack(parts) if parts else self.states[:0]

    def prompt_values(self, layer: int) -> Tensor:
        """Return the values of a layer for the prompts' tokens, (P, T, heads · width)."""
        return layer_values(self.states, layer)

    def live_values(self, layer: int) -> Tensor:
        """Return the values of a layer for the live tokens, (R, L, heads · width)."""
        cached: Any = self.layers[layer]
        return _join_heads(cached.live.values)


class _PrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, True
        self.live = DynamicLayer()  # type: ignore[no-untyped-call]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of live tokens; return the keys and values of all live tokens."""
        if not self.live.is_initialized:  # avoids a copy by concatenation with an empty tensor
            self.live.keys, self.live.values, self.live.is_initialized = key_states, value_states, True
            return key_states, value_states
        return self.live.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.live.get_seq_length()


def layer_values(states: Tensor, layer: int) -> Tensor:
    """Return the values of a layer, (…, T, heads · width), of states (2 · layers, …, heads, T, width)."""
    return _join_heads(states[2 * layer + 1])


def _join_heads(values: Tensor) -> Tensor:
    """Turn values of a layer, (…, heads, T, width), into one vector for each token, (…, T, heads · width)."""
    return values.transpose(-3, -2).flatten(-2)


@contextmanager
def prefix_attention(model: Any, prefix: CachedPrefix) -> Iterator[dict[str, Any]]:
    """Switch a model to `attend` and yield the keyword arguments for its forward pass."""
    # In a composite model, the layers read the config of the text model.
    config = model.config.get_text_config()
    previous = config._attn_implementation
    config._attn_implementation = _ATTENTION_NAME
    try:
        yield {cache_argument(model): prefix, "use_cache": True, _PREFIX: prefix}
    finally:
        config._attn_implementation = previous


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
    """Compute softmax attention over cached and live tokens, (R, Q, H, d). Transformers calls this function.

    Args:
        query: (R, H, Q, d); the rows of a prompt are adjacent.
        key, value: (R, G, L, d) of all live tokens, the last Q of which are queries; G divides H.
        attention_mask: (R, 1, Q, T + L), added to the scores.
        scaling: 1/√d by default.
        softcap: limits scores to ± this value (Gemma 2).
    """
    unsupported = [name for name in _UNSUPPORTED_OPTIONS if options.get(name) is not None]
    if unsupported or _PREFIX not in options:
        raise NotImplementedError(", ".join(unsupported) or "the model passes no keyword arguments to attention")
    prefix = options[_PREFIX].layers[module.layer_idx]
    rows, heads, queries, width = query.shape
    (_, groups, live, _), past = key.shape, prefix.keys.shape[-2]
    query = query * (width**-0.5 if scaling is None else scaling)
    # Query heads that share keys become rows of one matrix: (R · G, H/G · Q, d).
    grouped = query.reshape(rows * groups, -1, width)
    past_scores = _multiply_shared(grouped, prefix.keys.transpose(-1, -2))
    live_scores = torch.bmm(grouped, key.reshape(-1, live, width).transpose(1, 2))
    scores = torch.cat([past_scores, live_scores], dim=-1).view(rows, heads, queries, past + live)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax((scores + attention_mask).float(), dim=-1).to(value.dtype)
    weights = weights.view(*grouped.shape[:2], past + live)
    mixed = _multiply_shared(weights[..., :past], prefix.values) + torch.bmm(
        weights[..., past:], value.reshape(-1, live, value.shape[-1])
    )
    return mixed.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


def _multiply_shared(rows: Tensor, shared: Tensor) -> Tensor:
    """Multiply (P · r · G, n, a) rows with the (P, G, a, b) matrix of their prompt and head: (P · r · G, n, b)."""
    prompts, groups = shared.shape[:2]
    count, size, width = rows.shape
    rows_per_prompt = count // (prompts * groups)
    if rows_per_prompt == 1:
        return torch.bmm(rows, shared.reshape(count, *shared.shape[2:]))
    # Rows of one prompt and head become one matrix, so that a single product is enough.
    by_prompt = rows.view(prompts, rows_per_prompt, groups, size, width).transpose(1, 2)
    product = torch.bmm(
        by_prompt.reshape(prompts * groups, -1, width), shared.reshape(prompts * groups, *shared.shape[2:])
    )
    return product.view(prompts, groups, rows_per_prompt, size, -1).transpose(1, 2).reshape(count, size, -1)


AttentionInterface.register(_ATTENTION_NAME, attend)
AttentionMaskInterface.register(_ATTENTION_NAME, eager_mask)
