"""Rows of different lengths as one tensor."""

from __future__ import annotations

import torch

from personaplug.llm.padding import group_by_length, left_padding_mask, pad_states, pad_with_mask

CPU = torch.device("cpu")


def test_pad_states_aligns_ends() -> None:
    states = [torch.randn(4, 2, 2, 3), torch.randn(4, 2, 5, 3)]
    padded, lengths = pad_states(states, device=CPU)
    assert padded.shape == (4, 2, 2, 5, 3)
    assert lengths.tolist() == [2, 5]
    assert torch.equal(padded[:, 0, :, 3:], states[0])
    assert not padded[:, 0, :, :3].any()
    assert torch.equal(padded[:, 1], states[1])
    assert left_padding_mask(lengths, 5).tolist() == [[False] * 3 + [True] * 2, [True] * 5]


def test_pad_with_mask_marks_real_tokens() -> None:
    ids, mask = pad_with_mask([(7,), (8, 9)], side="left", device=CPU)
    assert (ids.tolist(), mask.tolist()) == ([[0, 7], [8, 9]], [[0, 1], [1, 1]])
    ids, mask = pad_with_mask([(7,), (8, 9)], side="right", device=CPU)
    assert (ids.tolist(), mask.tolist()) == ([[7, 0], [8, 9]], [[1, 0], [1, 1]])


def test_group_by_length_bounds_padded_tokens_and_starts_with_the_longest() -> None:
    groups = list(group_by_length([1, 5000, 2000, 2048, 2047, 3], lambda length: length))
    assert groups == [[5000], [2048, 2047], [2000, 3], [1]]
