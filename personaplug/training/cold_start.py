"""Cold start: choose what serves users with few history items, by the loss of held-out users.

Users without items get the tokens of the control (instruction-only) or the plug's own tokens for no items. Users with
1, 2, … items get the same tokens as long as held-out users lose less with them than with a persona of so few items.
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
"""(items shown, what serves these users) → mean held-out loss; None if no held-out user has that many items."""


@dataclass(frozen=True)
class ColdStartChoice:
    """The outcome of the search.

    Attributes:
        source: whose tokens serve users with few items: `CONTROL` or `NO_ITEMS`.
        max_items: users with at most this many items get them.
        losses: mean held-out loss by number of items, then by what serves.
    """

    source: str
    max_items: int
    losses: dict[int, dict[str, float]] = field(default_factory=dict)


def choose_cold_start(loss: Loss, *, max_items: int = MAX_ITEMS) -> ColdStartChoice:
    """Search from no items upward; stop at the first number of items where a persona loses less."""
    source, chosen = CONTROL, 0
    losses: dict[int, dict[str, float]] = {}
    for items in range(max_items + 1):
        persona = loss(items, PERSONA)
        served = loss(items, source)
        if persona is None or served is None:
            break
        losses[items] = {PERSONA: persona, source: served}
        if served < persona:
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
    """Set the plug's cold start to what held-out users lose least with.

    Args:
        control: (S, D) tokens of the trained control, not scaled.
        held_out: samples of held-out users with all items.
        mean_loss: mean loss of samples with the plug as it is set.
    Returns:
        Mean losses by the number of items shown, then by what serves.
    """
    tokens = {CONTROL: control, NO_ITEMS: None}
    without_preferences = [sample.without_preferences() for sample in held_out]

    def loss(items: int, source: str) -> float | None:
        shown = [sample.latest(items) for sample in without_preferences if len(sample.rows) >= items]
        if not shown:
            return None
        if source == PERSONA:
            plug.cold_start = ColdStart()
        else:
            plug.cold_start = ColdStart(tokens[source], max_items=items)
        return mean_loss(shown)

    # At least one item of a full history must give a persona, or nobody would ever have one.
    choice = choose_cold_start(loss, max_items=min(MAX_ITEMS, plug.config.max_history - 1))
    plug.cold_start = ColdStart(tokens[choice.source], max_items=choice.max_items)
    return choice.losses
