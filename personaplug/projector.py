"""Projector: from an item's vector, and what its answer adds to it, to soft tokens (eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Proj of eq. 4: a two-layer MLP from an item's vector to K soft tokens of width D.

    It starts with outputs of unit variance: unit vectors are stretched by √E so that each value is about 1, and both
    layers keep that size. An item's answer, where it is a channel of its own, is added to the hidden layer; that is
    the same as a one-hot, or its form, beside the vector.
    """

    def __init__(self, width: int, *, hidden: int, tokens: int, out: int, labels: int, forms: int) -> None:
        super().__init__()
        self.tokens, self.stretch = tokens, math.sqrt(width)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, tokens * out)
        self.answer = nn.Embedding(labels + 1, hidden) if labels else None
        self.form = nn.Linear(forms, hidden, bias=False) if forms else None
        if self.answer is not None:
            nn.init.zeros_(self.answer.weight[0])  # no answer adds nothing, even where training never shows one
        nn.init.normal_(self.inner.weight, std=1 / math.sqrt(width))
        nn.init.zeros_(self.inner.bias)
        # E[gelu(z)²] = 0.425 for a standard normal z.
        nn.init.normal_(self.outer.weight, std=1 / math.sqrt(0.425 * hidden))
        nn.init.zeros_(self.outer.bias)
        if self.form is not None:
            nn.init.normal_(self.form.weight, std=1 / math.sqrt(forms))

    def hidden(self, items: Tensor, *, answers: Tensor, forms: Tensor) -> Tensor:
        """The inner layer's output for items one by one, (M, hidden), in the number format of the items.

        Args:
            items: (M, E) unit vectors.
            answers: (M,) int64, -1 where an item has none.
            forms: (M, F), or (M, 0) if they are not read.
        """
        # The weights are stretched in place of the items: there are fewer of them.
        weight, bias = (self.inner.weight * self.stretch).to(items.dtype), self.inner.bias.to(items.dtype)
        inner = nn.functional.linear(items, weight, bias)
        if self.answer is not None:
            inner = inner + self.answer(answers + 1).to(items.dtype)
        if self.form is not None:
            inner = inner + nn.functional.linear(forms.to(items.dtype), self.form.weight.to(items.dtype))
        return nn.functional.gelu(inner)

    def out(self, hidden: Tensor, *, shares: Tensor, tokens: slice) -> Tensor:
        """Some tokens' outer layer for weighted sums, Σ w_i (A·g_i + b) = A·(Σ w_i g_i) + b·Σ w_i; (B, k, D).

        Args:
            hidden: (B, hidden) Σ w_i g_i.
            shares: (B,) Σ w_i.
            tokens: which k of the K.
        """
        weight = self.outer.weight.view(self.tokens, -1, hidden.shape[1])[tokens]
        bias = self.outer.bias.view(self.tokens, -1)[tokens]
        return torch.einsum("bh,kdh->bkd", hidden, weight) + shares[:, None, None] * bias
