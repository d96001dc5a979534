"""OptionHint: a soft token that says how the options in a prompt compare with the question and with what the user did.

A small language model compares two titles badly; their vectors do it well, and the history is heard in the same terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LIKENESSES = 3


class OptionHint(nn.Module):
    """One token that leans towards the better options.

    T = Σ_c tanh(a · (f_c − the other options' mean f)) · V_c, with f_c the likenesses of option c: to the question, to
    the user's items on average, and to the nearest of them; a and V are trained. Options that are alike give no signal.

    Args:
        options: how many a prompt has (C).
        width: of the language model's embedding (D).
    """

    def __init__(self, options: int, *, width: int) -> None:
        super().__init__()
        self.log_sharpness = nn.Parameter(torch.full((_LIKENESSES,), math.log(3)))
        self.places = nn.Parameter(torch.randn(options, width))

    def forward(self, question: Tensor, options: Tensor, items: Tensor) -> Tensor:
        """The token of one user, (D,).

        Args:
            question: (E,) unit vector.
            options: (C, E) unit vectors.
            items: (n, E) unit vectors of the history; n may be 0.
        """
        likeness = torch.stack([options @ question, *_to_items(options @ items.T)], dim=1)
        others = (likeness.sum(dim=0) - likeness) / (len(options) - 1)
        leaning = torch.tanh((likeness - others) @ self.log_sharpness.exp())
        return leaning @ self.places


def _to_items(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the largest cosine of each option, (C,) each, of (C, n); 0 without items."""
    if not cosines.shape[1]:
        nothing = cosines.new_zeros(len(cosines))
        return nothing, nothing
    return cosines.mean(dim=1), cosines.amax(dim=1)
