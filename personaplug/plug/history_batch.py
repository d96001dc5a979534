"""HistoryBatch: the encoded histories of a batch of queries, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HistoryBatch:
    """The histories of B users, one after the other, without padding.

    Attributes:
        vectors: (M, E) unit vectors of all items.
        lengths: items of each user; their sum is M.
        label_ids: (M,) int64 index of each item's answer among the task's labels, -1 if it is none of them.
        style: (M, F) style features of each item's answer; F = 0 if the plug does not use them.
        hidden: (M, hidden) the projector's hidden layer, if it is precomputed; see `PersonaHead.precompute`.
    """

    vectors: Tensor
    lengths: tuple[int, ...]
    label_ids: Tensor
    style: Tensor
    hidden: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        tensors = (self.vectors, self.label_ids, self.style, self.hidden)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def select(self, items: Tensor, *, lengths: tuple[int, ...]) -> HistoryBatch:
        """Keep the items with these indices, user after user; `lengths` says how many of them each user has."""
        hidden = None if self.hidden is None else self.hidden[items]
        return HistoryBatch(self.vectors[items], lengths, self.label_ids[items], self.style[items], hidden=hidden)
