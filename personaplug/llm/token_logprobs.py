"""Log-probabilities of the tokens of an answer, and of the likeliest tokens at each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and of the likeliest tokens at its position, in descending order."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True, repr=False)
class NextLogprobs:
    """Log-probabilities (V,) of a row's next token, with the likeliest tokens and their log-probabilities, (k,)."""

    log_probs: Tensor
    top_tokens: Tensor
    top_values: Tensor

    def of(self, token: int) -> TokenLogprob:
        top = zip(self.top_tokens.tolist(), self.top_values.tolist(), strict=True)
        return TokenLogprob(token, float(self.log_probs[token]), list(top))


def next_logprobs(logits: Tensor, counts: Sequence[int | None]) -> list[NextLogprobs | None]:
    """Return the log-probabilities of each row of logits (R, V), or None for a row that needs none.

    Args:
        counts: how many of the likeliest tokens each row lists; None = the row needs no log-probabilities.
    """
    rows = {row: count for row, count in enumerate(counts) if count is not None}
    if not rows:
        return [None] * len(counts)
    log_probs = torch.log_softmax(logits[list(rows)], dim=-1)
    values, tokens = log_probs.topk(max(rows.values()), dim=-1)
    log_probs, values, tokens = log_probs.cpu(), values.cpu(), tokens.cpu()
    found = {
        row: NextLogprobs(log_probs[index], tokens[index, :count], values[index, :count])
        for index, (row, count) in enumerate(rows.items())
    }
    return [found.get(row) for row in range(len(counts))]
