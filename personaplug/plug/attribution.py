"""Why an answer was personal: which items made the persona, what the answer loses without each, how a user moved.

A weight says how much of the persona an item is; an effect, how much likelier it makes an answer. Only the latter is
about the answer: an item may weigh much and change nothing.
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
    """How far a persona moved.

    Attributes:
        items_before, items_after: that the two personas were made from.
        cosine: of what is the user's own in them (the persona less the population's): 1 = the same direction, 0 = none
            in common.
        moved: the distance between the two, over that of the earlier one from the population's; NaN where the earlier
            one is the population's.
    """

    items_before: int
    items_after: int
    cosine: float
    moved: float


@torch.no_grad()
def item_weights(personalizer: Personalizer, query: str, history: EncodedHistory) -> npt.NDArray[np.float32]:
    """How much each item counts in the persona for a query (w of eq. 3, the mean over persona tokens), (N,).

    They sum to 1, or with shrinkage to the user's share of the persona; they are 0 for a user of too few items to be
    served with a persona of their own.
    """
    if len(history) <= personalizer.plug.few:
        return np.zeros(len(history), dtype=np.float32)
    batch = personalizer.batch(history, lengths=(len(history),))
    weights: npt.NDArray[np.float32] = personalizer.plug.weights([query], batch).cpu().numpy()
    return weights


def left_out(history: EncodedHistory) -> Iterator[EncodedHistory]:
    """The history without each of its items in turn."""
    for place in range(len(history)):
        yield history.only(np.delete(np.arange(len(history)), place))


def drift(
    make: Callable[[EncodedHistory], SoftPrompt],
    before: EncodedHistory,
    after: EncodedHistory,
    *,
    common: SoftPrompt,
    few: int = 0,
) -> Drift:
    """How far a user's persona moved from one state of the history to another.

    Args:
        make: makes a persona of a history.
        common: what is nobody's own in it; see `PersonaPlug.common`.
        few: up to how many items a persona is that.
    """
    # Whatever tokens a cold start is served with.
    both = ((make(part) if len(part) > few else common).vectors - common.vectors for part in (before, after))
    own, now = (difference.double().flatten() for difference in both)
    return Drift(
        len(before),
        len(after),
        cosine=float(torch.cosine_similarity(own, now, dim=0)),
        moved=float((now - own).norm() / own.norm()) if len(before) > few else float("nan"),
    )
