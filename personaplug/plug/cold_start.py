"""ColdStart: the soft prompt of users whose histories are too short for a persona of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from personaplug.plug.history_batch import HistoryBatch


class ColdStart(nn.Module):
    """Give cold users, those with at most `max_items` items, a soft prompt without anything of their own.

    `tokens` are (S, D) and not scaled. None means what the plug makes for users without items.
    """

    tokens: Tensor | None

    def __init__(self, tokens: Tensor | None = None, *, max_items: int = 0) -> None:
        super().__init__()
        self.max_items = max_items
        self.register_buffer("tokens", tokens)

    def hide_items(self, history: HistoryBatch) -> HistoryBatch:
        """Drop the items of cold users, unless their soft tokens are replaced anyway."""
        if self.tokens is not None or not self.max_items or not self._has_cold_users(history.lengths):
            return history
        lengths = torch.tensor(history.lengths)
        is_warm = lengths > self.max_items
        items = is_warm.repeat_interleave(lengths).nonzero().squeeze(1)
        return history.select(items.to(history.vectors.device), lengths=tuple((lengths * is_warm).tolist()))

    def replace_tokens(self, soft: Tensor, lengths: Sequence[int]) -> Tensor:
        """Put `tokens` in place of the (B, S, D) soft tokens of cold users."""
        if self.tokens is None or not self._has_cold_users(lengths):
            return soft
        is_cold = torch.tensor(lengths) <= self.max_items
        return torch.where(is_cold[:, None, None].to(soft.device), self.tokens, soft)

    def mask_bias(self, bias: Tensor, lengths: Sequence[int]) -> Tensor:
        """Zero the (B, C) label bias of cold users."""
        if self.tokens is None and not self.max_items:
            return bias
        is_cold = torch.tensor(lengths) <= self.max_items
        return bias.masked_fill(is_cold[:, None].to(bias.device), 0)

    def _has_cold_users(self, lengths: Sequence[int]) -> bool:
        return min(lengths, default=0) <= self.max_items
