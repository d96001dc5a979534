"""Insertion of soft tokens by position, for both padding sides."""

from __future__ import annotations

import pytest
import torch

from personaplug.errors import ShapeMismatch
from personaplug.llm.soft_prompt import SoftPrompt, splice


def _row(*values: float) -> list[list[float]]:
    return [[value] for value in values]


SOFT = SoftPrompt(torch.tensor([_row(-1, -2), _row(-3, -4)]))


def test_splice_left_padding_puts_soft_tokens_between_padding_and_text() -> None:
    embeds = torch.tensor([_row(0, 11, 12), _row(21, 22, 23)])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    out = splice(embeds, mask, soft=SOFT, at=torch.tensor([0, 0]))
    assert out.embeds.squeeze(-1).tolist() == [[0, -1, -2, 11, 12], [-3, -4, 21, 22, 23]]
    assert out.mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert out.positions.tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_splice_right_padding_puts_soft_tokens_first() -> None:
    embeds = torch.tensor([_row(11, 12, 0), _row(21, 22, 23)])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    out = splice(embeds, mask, soft=SOFT, at=torch.tensor([0, 0]))
    assert out.embeds.squeeze(-1).tolist() == [[-1, -2, 11, 12, 0], [-3, -4, 21, 22, 23]]
    assert out.mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert out.positions.tolist() == [[0, 1, 2, 3, 3], [0, 1, 2, 3, 4]]


def test_splice_rows_at_different_positions() -> None:
    embeds = torch.tensor([_row(0, 11, 12), _row(21, 22, 23)])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    out = splice(embeds, mask, soft=SOFT, at=torch.tensor([1, 3]))
    assert out.embeds.squeeze(-1).tolist() == [[0, 11, -1, -2, 12], [21, 22, 23, -3, -4]]


def test_splice_empty_prompt_returns_soft_tokens_alone() -> None:
    out = splice(torch.zeros(2, 0, 1), torch.zeros(2, 0, dtype=torch.int64), soft=SOFT, at=torch.tensor([0, 0]))
    assert out.embeds.squeeze(-1).tolist() == [[-1, -2], [-3, -4]]
    assert out.positions.tolist() == [[0, 1], [0, 1]]


def test_splice_empty_row_among_full_ones_keeps_positions() -> None:
    out = splice(torch.tensor([_row(0), _row(21)]), torch.tensor([[0], [1]]), soft=SOFT, at=torch.tensor([0, 0]))
    assert out.embeds.squeeze(-1).tolist() == [[0, -1, -2], [-3, -4, 21]]
    assert out.positions.tolist() == [[0, 0, 1], [0, 1, 2]]


def test_splice_without_soft_prompt_adds_only_positions() -> None:
    embeds, mask = torch.tensor([_row(0, 11)]), torch.tensor([[0, 1]])
    out = splice(embeds, mask, soft=None, at=torch.tensor([0]))
    assert torch.equal(out.embeds, embeds)
    assert out.positions.tolist() == [[0, 0]]


def test_splice_takes_dtype_of_text_and_passes_gradients() -> None:
    soft = torch.ones(1, 1, 2, requires_grad=True)
    embeds = torch.zeros(1, 1, 2, dtype=torch.bfloat16)
    out = splice(embeds, torch.ones(1, 1, dtype=torch.int64), soft=SoftPrompt(soft), at=torch.tensor([0]))
    assert out.embeds.dtype == torch.bfloat16
    torch.autograd.backward(out.embeds.float().sum())
    assert soft.grad is not None
    assert soft.grad.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 1, 5)])
def test_splice_other_batch_or_width_raises(shape: tuple[int, int, int]) -> None:
    embeds, mask = torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.int64)
    with pytest.raises(ShapeMismatch, match="2 rows of width 1"):
        splice(embeds, mask, soft=SoftPrompt(torch.zeros(shape)), at=torch.tensor([0, 0]))


@pytest.mark.parametrize("at", [-1, 2])
def test_splice_position_outside_row_raises(at: int) -> None:
    embeds, mask = torch.zeros(2, 2, 1), torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(ShapeMismatch, match="outside"):
        splice(embeds, mask, soft=SOFT, at=torch.tensor([at, 0]))


def test_soft_prompt_of_two_dimensions_raises() -> None:
    with pytest.raises(ShapeMismatch, match="batch, tokens, width"):
        SoftPrompt(torch.zeros(2, 3))
