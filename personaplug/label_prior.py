"""LabelPrior: how much likelier each label is among a user's own answers than among everybody's.

Soft tokens say it badly, and counting says it at once: whoever gives many fives is likely to give another. What the
question says of a label and what the user's other answers say are multiplied, as naive Bayes does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_DOUBT = 4.0  # answers that a user must have given to be believed as much as everybody is, before training


class LabelPrior(nn.Module):
    """What a user's own answers add to the log-probability of each label.

    b_c = trust · log( (n_c + doubt · π_c) / ((n + doubt) · π_c) ), with n_c of the user's n answers being label c and
    π_c everybody's share of it; doubt and trust are trained, two numbers in all. A user without answers has b = 0.

    Args:
        labels: how many there are (C).
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.log_doubt = nn.Parameter(torch.tensor(math.log(_DOUBT)))
        self.trust = nn.Parameter(torch.tensor(1.0))
        self.usual: Tensor
        self.register_buffer("usual", torch.full((labels,), 1 / labels))

    def start_from(self, answers: Tensor) -> None:
        """Take everybody's shares from some answers: places among the labels, (n,), -1 for none of them."""
        counts = torch.bincount(answers[answers >= 0], minlength=len(self.usual)) + 1  # none of them is impossible
        self.usual.copy_(counts / counts.sum())

    def forward(self, answers: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """b of each user, (B, C).

        Args:
            answers: (M,) place of each item's answer among the labels, -1 for none of them.
            lengths: how many of the items each of the B users has.
        """
        counts = self._counts(answers, lengths)
        doubt = self.log_doubt.exp()
        own = (counts + doubt * self.usual) / (counts.sum(dim=1, keepdim=True) + doubt)
        return self.trust * (own / self.usual).log()

    def _counts(self, answers: Tensor, lengths: tuple[int, ...]) -> Tensor:
        labels, users = len(self.usual), len(lengths)
        owners = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=answers.device))
        places = (owners * labels + answers)[answers >= 0]
        return torch.bincount(places, minlength=users * labels).view(users, labels).to(self.usual)
