"""Explain a persona: the weight of each item, histories that leave one item out, and how far a user has moved.

An item may weigh much and change nothing. Only an answer's likelihood without the item says whether it matters.
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
    cosine: float  # between the two personas' differences from the population's
    moved: float  # distance between the personas over the first one's from the population's; NaN if that is 0


@torch.no_grad()
def item_weights(personalizer: Personalizer, query: str, history: EncodedHistory) -> npt.NDArray[np.float32]:
    """Return the weight of each item in the persona for a query, (N,); all 0 for a cold-start user."""
    plug = personalizer.plug
    if plug.persona is None or plug.cold_start.covers(history.kind_ids):
        return np.zeros(len(history), dtype=np.float32)
    weights: npt.NDArray[np.float32] = plug.persona.item_weights([query], personalizer.collate(history)).cpu().numpy()
    return weights


def leave_one_out(history: EncodedHistory) -> Iterator[EncodedHistory]:
    """Yield the history without each of its items in turn."""
    return (history.select(np.delete(np.arange(len(history)), index)) for index in range(len(history)))


def drift(
    make_persona: Callable[[EncodedHistory], SoftPrompt],
    before: EncodedHistory,
    after: EncodedHistory,
    *,
    population: SoftPrompt,
    is_cold: Callable[[EncodedHistory], bool] = lambda history: len(history) == 0,
) -> Drift:
    """Measure how far a persona moved; histories that are cold count as the `population` prompt."""
    personas = (population if is_cold(history) else make_persona(history) for history in (before, after))
    old, new = ((persona.vectors - population.vectors).double().flatten() for persona in personas)
    return Drift(
        len(before),
        len(after),
        cosine=float(torch.cosine_similarity(old, new, dim=0)),
        moved=float((new - old).norm() / old.norm()) if not is_cold(before) else float("nan"),
    )
