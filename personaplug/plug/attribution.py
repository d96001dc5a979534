"""Explain a persona: item weights, leave-one-out histories, and the drift of a user.

An item with a large weight may have no effect. Only the likelihood of an answer without the item measures its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from personaplug.encoders.encoded_sample import EncodedHistory
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.personalizer import Personalizer


@dataclass(frozen=True)
class Drift:
    """How far a persona moved between two histories."""

    items_before: int
    items_after: int
    cosine: float  # between both personas, each minus the population persona
    moved: float  # distance between both personas / distance of the first to the population; NaN for a cold start


@torch.no_grad()
def item_weights(personalizer: Personalizer, query: str, history: EncodedHistory) -> npt.NDArray[np.float32]:
    """Return the weight of each item for a query, (N,); all 0 if the items have no effect.

    The weights are those of the persona. For users without a persona, they are those of the label prior.
    """
    weights: npt.NDArray[np.float32] = (
        personalizer.plug.item_weights(query, personalizer.collate(history)).cpu().numpy()
    )
    return weights


def leave_one_out(history: EncodedHistory) -> Iterator[EncodedHistory]:
    """Yield one history for each item, without this item."""
    return (history.select(np.delete(np.arange(len(history)), index)) for index in range(len(history)))


def drift(
    make_persona: Callable[[EncodedHistory], SoftPrompt],
    before: EncodedHistory,
    after: EncodedHistory,
    *,
    population: SoftPrompt,
    is_cold: Callable[[EncodedHistory], bool] = lambda history: len(history) == 0,
) -> Drift:
    """Measure how far a persona moved. For a cold history, the persona is the `population` prompt."""
    personas = (population if is_cold(history) else make_persona(history) for history in (before, after))
    old, new = ((persona.vectors - population.vectors).double().flatten() for persona in personas)
    return Drift(
        len(before),
        len(after),
        cosine=float(torch.cosine_similarity(old, new, dim=0)),
        moved=float((new - old).norm() / old.norm()) if not is_cold(before) else float("nan"),
    )
