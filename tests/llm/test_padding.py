"""Rows of different lengths as one tensor."""

from __future__ import annotations

import torch

from personaplug.llm.padding import group_by_length, pad_with_mask

CPU = torch.device("cpu")


def test_pad_with_mask_marks_real_tokens() -> None:
    ids, mask = pad_with_mask([(7,), (8, 9)], side="left", device=CPU)
    assert (ids.tolist(), mask.tolist()) == ([[0, 7], [8, 9]], [[0, 1], [1, 1]])
    ids, mask = pad_with_mask([(7,), (8, 9)], side="right", device=CPU)
    assert (ids.tolist(), mask.tolist()) == ([[7, 0], [8, 9]], [[1, 0], [1, 1]])


def test_group_by_length_bounds_padded_tokens_and_starts_with_the_longest() -> None:
    groups = list(group_by_length([1, 5000, 2000, 2048, 2047, 3], lambda length: length))
    assert groups == [[5000], [2048, 2047], [2000, 3], [1]]
