"""States of prompts of different lengths in one batch."""

from __future__ import annotations

import torch

from personaplug.llm.padding import left_padding_mask
from personaplug.llm.prompt_state import Block, Layout, Part, PromptState, StateBatch

CPU = torch.device("cpu")
LAYOUT = Layout(
    (Block(2, (2, 3), torch.float32), Block(1, (4,), torch.float32, grows=False)),
    (Part(0, "keys", 0, 0), Part(0, "values", 0, 1), Part(1, "recurrent.0", 1, 0)),
)


def _state(tokens: int) -> PromptState:
    torch.manual_seed(tokens)
    return PromptState(LAYOUT, (torch.randn(2, 2, tokens, 3), torch.randn(1, 4)), tokens)


def test_stacked_states_end_in_the_same_column() -> None:
    states = [_state(2), _state(5)]
    batch = StateBatch.stack(states, device=CPU)
    growing, recurrent = batch.blocks
    assert (growing.shape, recurrent.shape) == ((2, 2, 2, 5, 3), (1, 2, 4))
    assert (batch.lengths.tolist(), batch.width) == ([2, 5], 5)
    assert torch.equal(growing[:, 0, :, 3:], states[0].blocks[0])
    assert not growing[:, 0, :, :3].any()
    assert torch.equal(growing[:, 1], states[1].blocks[0])
    assert torch.equal(recurrent[:, 1], states[1].blocks[1])
    assert left_padding_mask(batch.lengths, 5).tolist() == [[False] * 3 + [True] * 2, [True] * 5]


def test_rows_of_a_batch_are_the_stacked_states() -> None:
    states = [_state(4), _state(1), _state(3)]
    rows = StateBatch.stack(states, device=CPU).rows()
    assert [row.tokens for row in rows] == [4, 1, 3]
    for row, state in zip(rows, states, strict=True):
        for own, block in zip(row.blocks, state.blocks, strict=True):
            assert torch.equal(own, block)


def test_values_of_a_layer_have_one_vector_for_each_token() -> None:
    state = _state(3)
    values = state.blocks[0][1]  # (heads, tokens, width)
    assert torch.equal(state.values(0)[2], torch.cat([values[0, 2], values[1, 2]]))
    batch = StateBatch.stack([_state(1), state], device=CPU)
    assert torch.equal(batch.values(0)[1], state.values(0))
