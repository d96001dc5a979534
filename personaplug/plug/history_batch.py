"""HistoryBatch: the encoded histories of a batch of queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HistoryBatch:
    """The histories of B users, concatenated without padding: M items in total."""

    vectors: Tensor  # (M, E) unit vectors
    lengths: tuple[int, ...]  # items of each user
    label_ids: Tensor  # (M,) int64 index of each item's answer among the task's labels, -1 if it is not a label
    style: Tensor  # (M, F) style features of each item's answer; F = 0 if the plug does not use them
    kind_ids: Tensor  # (M,) int64 index of each item's kind in ITEM_KINDS
    hidden: Tensor | None = None  # (M, hidden) precomputed layer of the projector; see `PersonaHead.precompute`

    @property
    def nbytes(self) -> int:
        tensors = (self.vectors, self.label_ids, self.style, self.kind_ids, self.hidden)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def select(self, items: Tensor, *, lengths: tuple[int, ...]) -> HistoryBatch:
        """Return the items with these indices, ordered by user; `lengths` is the number of items of each user."""
        hidden = None if self.hidden is None else self.hidden[items]
        columns = (self.label_ids[items], self.style[items], self.kind_ids[items])
        return HistoryBatch(self.vectors[items], lengths, *columns, hidden=hidden)


def split_by_user(values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(values, list(lengths))
