"""Keep or drop a trained persona: compare a plug with the row that only counts labels, on held-out users.

On small data, a persona's tokens can add more noise than knowledge to the labels of past answers. Then the plug serves
users with the tokens and the label prior of the row that only counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.plug.layers import ColdStart
from personaplug.plug.model import PersonaPlug
from personaplug.training.cold_start import PERSONA


def keep_better(
    plug: PersonaPlug,
    counting: PersonaPlug,
    held_out: Sequence[EncodedSample],
    *,
    name: str,
    mean_loss: Callable[[Sequence[EncodedSample]], float],
) -> dict[str, object]:
    """Replace the cold start of a plug, so that nobody gets a persona, if that has the lower held-out loss.

    Users with a stated preference keep the persona, which alone can read the preference.

    The lower mean decides, without a test of significance. Both sides are chosen on these users: the plug's checkpoint
    and cold start, and the numbers of the other prior. Both losses are therefore a little too low. A wrong choice
    between nearly equal losses costs little.

    Args:
        plug: the trained plug, with its best cold start.
        counting: soft tokens without a persona, and a label prior of the same kind with fitted numbers.
        held_out: samples of held-out users with their whole histories.
        name: name of the row of `counting`.
        mean_loss: returns the mean loss of samples with the plug's current cold start.
    Returns:
        The choice (`served_as`) and both losses (`loss_by_choice`), as facts of the training.
    """
    assert counting.label_prior is not None
    with_persona = plug.cold_start
    losses = {PERSONA: mean_loss(held_out)}
    plug.cold_start = ColdStart(
        counting.instruction.detach().clone(),
        max_items=plug.config.max_history,
        prior_numbers=counting.label_prior.numbers().detach(),
    )
    losses[name] = mean_loss(held_out)
    is_better = losses[name] < losses[PERSONA]
    if not is_better:
        plug.cold_start = with_persona
    return {"served_as": name if is_better else PERSONA, "loss_by_choice": losses}
