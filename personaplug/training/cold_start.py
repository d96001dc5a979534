"""Cold start: choose the soft tokens of users with few history items, by the loss of held-out users.

Users without items get the tokens of the control (instruction-only), or those of the plug for an empty history. Users
with 1, 2, … items get the same tokens while these have a lower held-out loss than a persona from that many items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.plug.layers import ColdStart
from personaplug.plug.model import PersonaPlug

MAX_ITEMS = 5
"""Upper bound of the search."""

PERSONA, CONTROL, NO_ITEMS = "plug", "instruction-only", "plug without items"

Loss = Callable[[int, str], float | None]
"""(number of items, source of the tokens) → mean held-out loss; None if no held-out user has that many items."""


@dataclass(frozen=True)
class ColdStartChoice:
    """The outcome of the search.

    Attributes:
        source: origin of the tokens for users with few items: `CONTROL` or `NO_ITEMS`.
        max_items: users with at most this many items get these tokens.
        losses: mean held-out loss by number of items, then by source.
    """

    source: str
    max_items: int
    losses: dict[int, dict[str, float]] = field(default_factory=dict)


def choose_cold_start(loss: Loss, *, max_items: int = MAX_ITEMS) -> ColdStartChoice:
    """Search upward from 0 items; stop at the first number of items for which a persona is at least as good."""
    source, chosen = CONTROL, 0
    losses: dict[int, dict[str, float]] = {}
    for items in range(max_items + 1):
        persona = loss(items, PERSONA)
        fallback = loss(items, source)
        if persona is None or fallback is None:
            break
        losses[items] = {PERSONA: persona, source: fallback}
        if fallback < persona:
            chosen = items
        elif items == 0:
            source = NO_ITEMS
        else:
            break
    return ColdStartChoice(source, chosen, losses)


def set_best_cold_start(
    plug: PersonaPlug,
    control: torch.Tensor,
    held_out: Sequence[EncodedSample],
    *,
    mean_loss: Callable[[Sequence[EncodedSample]], float],
) -> dict[int, dict[str, float]]:
    """Search the cold start with the lowest held-out loss, and set it in the plug.

    Args:
        control: (S, D) unscaled tokens of the trained control.
        held_out: samples of held-out users with their whole histories.
        mean_loss: returns the mean loss of samples with the plug's current cold start.
    Returns:
        Mean losses by number of items, then by source.
    """
    tokens = {CONTROL: control, NO_ITEMS: None}
    without_preferences = [sample.without_preferences() for sample in held_out]

    def loss(items: int, source: str) -> float | None:
        subset = [sample.latest(items) for sample in without_preferences if len(sample.rows) >= items]
        if not subset:
            return None
        if source == PERSONA:
            plug.cold_start = ColdStart()
        else:
            plug.cold_start = ColdStart(tokens[source], max_items=items)
        return mean_loss(subset)

    # Users with a full history must get a persona, so the search ends below `max_history`.
    choice = choose_cold_start(loss, max_items=min(MAX_ITEMS, plug.config.max_history - 1))
    plug.cold_start = ColdStart(tokens[choice.source], max_items=choice.max_items)
    return choice.losses
