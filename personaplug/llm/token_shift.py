"""Changes to the logits of free text that a request asks for: a bias of tokens, and penalties of repeated tokens.

    logit(t) + bias(t) − frequency · count(t) − presence · [count(t) > 0]

count(t) is how often token t occurs in the answer so far. This is OpenAI's definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class TokenShift:
    """The values that are added to the logits of one answer. `count` updates them after each token."""

    def __init__(
        self, *, presence: float = 0.0, frequency: float = 0.0, bias: Mapping[int, float] | None = None
    ) -> None:
        self.presence, self.frequency = presence, frequency
        self.values = dict(bias or {})  # by token
        self._counted: set[int] = set()

    def count(self, token: int) -> None:
        """Apply the penalties of one more occurrence of a token."""
        if not self.presence and not self.frequency:
            return
        presence = 0.0 if token in self._counted else self.presence
        self._counted.add(token)
        self.values[token] = self.values.get(token, 0.0) - self.frequency - presence


def shift_logits(logits: Tensor, shifts: Sequence[TokenShift | None]) -> None:
    """Add the values of each row's shift to its logits (R, V), in place and for all rows at once."""
    shifted = [(row, shift.values) for row, shift in enumerate(shifts) if shift is not None and shift.values]
    if not shifted:
        return
    sizes = torch.tensor([len(values) for _, values in shifted])
    rows = torch.tensor([row for row, _ in shifted]).repeat_interleave(sizes).to(logits.device)
    tokens = torch.tensor([token for _, values in shifted for token in values], device=logits.device)
    added = [value for _, values in shifted for value in values.values()]
    logits[rows, tokens] += torch.tensor(added, dtype=logits.dtype, device=logits.device)
