"""Pad rows of different lengths to one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

T = TypeVar("T")

_GROUP_TOKENS = 4096  # prompt tokens per forward pass, padding included


def pad(rows: Sequence[Sequence[int]], *, fill: int, side: str) -> Tensor:
    """Return rows as a (B, T) int64 tensor, padded on the `left` or `right`."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


def pad_with_mask(rows: Sequence[Sequence[int]], *, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids padded with 0, and a mask that is 1 at real tokens; both (B, T)."""
    mask = pad([[1] * len(row) for row in rows], fill=0, side=side)
    return pad(rows, fill=0, side=side).to(device), mask.to(device)


def common_prefix(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the longest prefix of all rows that leaves at least one token of each row."""
    first, last = min(rows), max(rows)  # in lexical order, so all rows between them share their prefix
    longest = min(map(len, rows)) - 1
    length = next((index for index in range(longest) if first[index] != last[index]), max(0, longest))
    return first[:length]


def left_padding_mask(lengths: Tensor, size: int) -> Tensor:
    """Return (B, size) bool: True at the last `lengths[b]` columns of each row."""
    return torch.arange(size, device=lengths.device) >= size - lengths[:, None]


def group_by_length(items: Sequence[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Group items of similar length, longest first, so that each padded group stays within the token limit."""
    group: list[T] = []
    for item in sorted(items, key=length, reverse=True):
        if group and length(group[0]) * (len(group) + 1) > _GROUP_TOKENS:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
