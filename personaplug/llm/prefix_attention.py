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
from personaplug.llm.prompt_state import StateBatch, join_heads, layer_tensors

_ATTENTION_NAME = "personaplug_prefix"
_PREFIX = "personaplug_prefix"  # keyword argument that carries the CachedPrefix through a model to `attend`
_UNSUPPORTED_OPTIONS = ("position_bias", "alibi", "indexer")


class CachedPrefix(Cache):
    """States of P prompts for forward passes of R live rows that follow them; R is a multiple of P.

    The model sees a cache of T + L tokens. Recurrent states are copied for each row.

    Args:
        batch: the states of the prompts.
        joins: True = concatenate keys and values of prompts and live tokens, for the model's own attention. False =
            never concatenate them, because `attend` combines them.
    """

    def __init__(self, batch: StateBatch, *, joins: bool = False) -> None:
        super().__init__(layers=_prefix_layers(batch, joins=joins))
        self.batch, self.joins = batch, joins
        self._mask = left_padding_mask(batch.lengths, batch.width).long()
        self._live = 0  # tokens per row so far

    def begin_pass(self, rows: int, live: int) -> tuple[Tensor, Tensor]:
        """Prepare a pass over `live` further tokens of R rows.

        Returns the attention mask (R, T + L + live), and the positions (R, live).
        """
        rows_per_prompt = rows // len(self.batch.lengths)
        lengths = self.batch.lengths.repeat_interleave(rows_per_prompt)
        mask = self._mask.repeat_interleave(rows_per_prompt, dim=0)
        mask = torch.cat([mask, mask.new_ones(rows, self._live + live)], dim=1)
        positions = lengths[:, None] + torch.arange(self._live, self._live + live, device=lengths.device)
        for layer in self.layers:
            if hasattr(layer, "copy_for"):  # not a layer without a cache
                layer.copy_for(rows)
        self._live += live
        return mask, positions

    def all_states(self) -> StateBatch:
        """Return the states of prompts and live tokens together; needs R = P."""
        layout, live = self.batch.layout, self.live_blocks()
        if not live:
            return self.batch
        blocks = [
            torch.cat([own, further], dim=3) if block.grows else further
            for block, own, further in zip(layout.blocks, self.batch.blocks, live, strict=True)
        ]
        return StateBatch(layout, tuple(blocks), self.batch.lengths + self._live, self.batch.width + self._live)

    def live_blocks(self) -> list[Tensor]:
        """Return the blocks after the live tokens: (parts, R, heads, L, width), or (parts, R, …) of recurrent states.

        The list is empty before the first pass.
        """
        if not self._live:
            return []
        blocks: list[list[Tensor]] = [[] for _ in self.batch.layout.blocks]
        for part in self.batch.layout.parts:
            layer: Any = self.layers[part.layer]
            source = layer.live if part.name in ("keys", "values") else layer
            blocks[part.block].append(next(tensor for name, tensor, _ in layer_tensors(source) if name == part.name))
        return [torch.stack(parts) for parts in blocks]

    def live_values(self, layer: int) -> Tensor:
        """Return the values of a layer for the live tokens, (R, L, heads · width)."""
        cached: Any = self.layers[layer]
        return join_heads(cached.live.values)

    def layer_of(self, keys: Tensor, *, index: int) -> PrefixLayer:
        """Return the layer with these live keys: the one at an index, unless layers share keys (Gemma 4)."""
        layers = [self.layers[index]] if index < len(self.layers) else []
        for layer in (*layers, *self.layers):
            if isinstance(layer, PrefixLayer) and layer.live.keys is keys:
                return layer
        raise NotImplementedError("a layer changes its keys after they are cached")


class PrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of P prompts, each (P, heads, T, width), and apart from them those of live tokens."""

    def __init__(self, keys: Tensor, values: Tensor, *, joins: bool) -> None:
        DynamicLayer.__init__(self)  # type: ignore[no-untyped-call]
        self.prompt, self.joins = (keys, values), joins
        self.live = DynamicLayer()  # type: ignore[no-untyped-call]

    def copy_for(self, rows: int) -> None:
        """Copy the prompts' keys and values for R rows, if they are joined with those of live tokens."""
        if self.joins and len(self.prompt[0]) != rows:
            keys, values = (part.repeat_interleave(rows // len(part), dim=0) for part in self.prompt)
            self.prompt = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of live tokens; return those of all live tokens, after the prompt's if joined."""
        if not self.live.is_initialized:  # avoids a copy by concatenation with an empty tensor
            self.live.keys, self.live.values, self.live.is_initialized = key_states, value_states, True
        else:
            key_states, value_states = self.live.update(key_states, value_states)
        if not self.joins:
            return key_states, value_states
        return torch.cat([self.prompt[0], key_states], dim=2), torch.cat([self.prompt[1], value_states], dim=2)

    def get_seq_length(self) -> int:
        return self.prompt[0].shape[2] + self.live.get_seq_length()


def _prefix_layers(batch: StateBatch, *, joins: bool) -> list[Any]:
    tensors: dict[int, dict[str, Tensor]] = {}
    for part in batch.layout.parts:
        tensors.setdefault(part.layer, {})[part.name] = batch.part(part)
    if not batch.layout.recurrent_bytes:
        return [PrefixLayer(**parts, joins=joins) for parts in tensors.values()]
    from personaplug.llm.recurrent_layers import prefix_layer  # older versions of transformers have no such layers

    return [prefix_layer(tensors.get(index, {}), joins=joins) for index in range(1 + max(tensors))]


@contextmanager
def prefix_attention(model: Any, prefix: CachedPrefix) -> Iterator[dict[str, Any]]:
    """Yield the keyword arguments for a model's forward pass; switch it to `attend` unless the prefix joins."""
    arguments = {cache_argument(model): prefix, "use_cache": True}
    if prefix.joins:
        yield arguments
        return
    # In a composite model, the layers read the config of the text model.
    config = model.config.get_text_config()
    previous = config._attn_implementation
    config._attn_implementation = _ATTENTION_NAME
    try:
        yield {**arguments, _PREFIX: prefix}
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
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute softmax attention over cached and live tokens, (R, Q, H, d). Transformers calls this function.

    Args:
        query: (R, H, Q, d); the rows of a prompt are adjacent.
        key, value: (R, G, L, d) of all live tokens, the last Q of which are queries; G divides H.
        attention_mask: (R, 1, Q, T + L), added to the scores.
        scaling: 1/√d by default.
        softcap: limits scores to ± this value (Gemma 2).
        s_aux: (H,) scores of attention sinks, which take weight from the tokens (GPT-OSS).
    """
    unsupported = [name for name in _UNSUPPORTED_OPTIONS if options.get(name) is not None]
    if unsupported or _PREFIX not in options:
        raise NotImplementedError(", ".join(unsupported) or "the model passes no keyword arguments to attention")
    prefix = options[_PREFIX].layer_of(key, index=module.layer_idx)
    rows, heads, queries, width = query.shape
    (past_keys, past_values), (_, groups, live, _) = prefix.prompt, key.shape
    past = past_keys.shape[2]
    query = query * (width**-0.5 if scaling is None else scaling)
    # Query heads that share keys become rows of one matrix: (R · G, H/G · Q, d).
    grouped = query.reshape(rows * groups, -1, width)
    past_scores = _multiply_shared(grouped, past_keys.transpose(-1, -2))
    live_scores = torch.bmm(grouped, key.reshape(-1, live, width).transpose(1, 2))
    scores = torch.cat([past_scores, live_scores], dim=-1).view(rows, heads, queries, past + live)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = _softmax((scores + attention_mask).float(), sinks=s_aux).to(value.dtype)
    weights = weights.reshape(*grouped.shape[:2], past + live)
    mixed = _multiply_shared(weights[..., :past], past_values) + torch.bmm(
        weights[..., past:], value.reshape(-1, live, value.shape[-1])
    )
    return mixed.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


def _softmax(scores: Tensor, *, sinks: Tensor | None) -> Tensor:
    """Return the weights of the last axis of (R, H, Q, n) scores; a sink per head, (H,), takes a share."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    columns = sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, columns], dim=-1), dim=-1)[..., :-1]


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
