"""Identification by likelihood: does the persona tell the user from 19 others?

For a sample of a user, log p(right text | own persona) is ranked among log p(the same text | stranger's persona) of
19 strangers.

The persona is all that a row makes of a history: soft tokens, texts in the prompt, copied tokens. In a row `wrong-user`
the own persona is the stranger's that the row assigns, so such rows are at the chance level, about .18 for 20
candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from personaplug.analysis.ranking import expected_reciprocal_rank
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.infra.progress import Progress
from personaplug.llm.base import LanguageModel
from personaplug.methods.context import Assignment, EvalContext, Indices
from personaplug.methods.predictions import MAX_PASS_TOKENS, prompt_batch
from personaplug.plug.personalizer import SoftPrompter

if TYPE_CHECKING:
    from personaplug.methods.base import ModelInputs

STRANGERS = 19

_ROUNDING = 1e-5  # the same persona in batches of other sizes differs by less

_NO_ITEMS: Indices = np.empty(0, dtype=np.int64)


def drawn_samples(count: int, *, limit: int, seed: int) -> list[int]:
    """Draw the samples to measure; a larger limit adds samples."""
    return sorted(np.random.default_rng([seed, 12]).permutation(count)[:limit].tolist())


def drawn_strangers(
    owners: Sequence[str], assignments: Sequence[Assignment], *, chosen: Sequence[int], seed: int
) -> dict[int, list[int]]:
    """Draw samples of up to 19 other users for each chosen sample, one of each user.

    The draws are the same for all rows, except that the user whose history a row assigns is not drawn again. All rows
    have equally many strangers: two users less than there are, if these are fewer than 19.
    """
    by_owner: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        by_owner.setdefault(owner, []).append(index)
    count = max(0, min(STRANGERS, len(by_owner) - 2))
    return {
        index: _strangers_of(index, owners, by_owner, assigned=assignments[index].source, count=count, seed=seed)
        for index in chosen
    }


def _strangers_of(
    index: int,
    owners: Sequence[str],
    by_owner: dict[str, list[int]],
    *,
    assigned: int | None,
    count: int,
    seed: int,
) -> list[int]:
    rng = np.random.default_rng([seed, 13, index])
    others = sorted(owner for owner in by_owner if owner != owners[index])
    drawn = [others[place] for place in rng.permutation(len(others))[: count + 1]]
    samples = {owner: by_owner[owner][int(rng.integers(len(by_owner[owner])))] for owner in drawn}
    if assigned is not None:
        samples.pop(owners[assigned], None)
    return [*samples.values()][:count]


def identification(
    context: EvalContext,
    inputs: ModelInputs,
    *,
    build: Callable[[Sequence[Assignment]], ModelInputs],
    prompter: SoftPrompter | None,
    title: str = "identification",
) -> list[float | None] | None:
    """Return the reciprocal rank of the own persona for each drawn sample, and None for the others.

    Args:
        inputs: the row's inputs, with the personas that it assigns.
        build: makes the row's inputs from other assignments.
        prompter: makes the row's soft tokens; None = no soft tokens.
    Returns:
        None with fewer than three users.
    """
    config = context.config
    chosen = drawn_samples(len(context.samples), limit=config.identification_samples, seed=config.draw_seed)
    strangers = drawn_strangers(context.owners, inputs.assignments, chosen=chosen, seed=config.draw_seed)
    if not any(strangers.values()):
        return None
    others = _variants(context, chosen, strangers, build=build)
    judge = _Judge(context.models.llm, prompter, batch_size=config.evaluation_batch_size)
    judge.cache([inputs.samples[index] for index in chosen])
    ranks: list[float | None] = [None] * len(context.samples)
    with Progress(title, total=len(chosen), unit="samples") as progress:
        for index in chosen:
            ranks[index] = judge.persona_rank(inputs.samples[index], others[index])
            progress.advance()
    return ranks


def _variants(
    context: EvalContext,
    chosen: Sequence[int],
    strangers: Mapping[int, Sequence[int]],
    *,
    build: Callable[[Sequence[Assignment]], ModelInputs],
) -> dict[int, list[EncodedSample]]:
    """Return each chosen sample with the personas of its strangers."""
    variants: dict[int, list[EncodedSample]] = {index: [] for index in chosen}
    for place in range(len(strangers[chosen[0]])):
        # The other samples get no items, so that nothing is retrieved or written for them.
        assignments = [Assignment(None, _NO_ITEMS) for _ in context.samples]
        for index in chosen:
            source = strangers[index][place]
            assignments[index] = Assignment(source, context.shown_items[source])
        samples = build(assignments).samples
        for index in chosen:
            variants[index].append(samples[index])
    return variants


class _Judge:
    """Ranks personas by a language model's likelihoods."""

    def __init__(self, llm: LanguageModel, prompter: SoftPrompter | None, *, batch_size: int) -> None:
        self.llm, self.prompter, self.batch_size = llm, prompter, batch_size

    def cache(self, samples: Sequence[EncodedSample]) -> None:
        """Read the prompts once for all personas, if soft tokens follow them."""
        if self.prompter is not None and self.prompter.placement == "suffix":
            self.llm.cache_prompts([sample.prompt for sample in samples])

    @torch.no_grad()
    def persona_rank(self, own: EncodedSample, others: Sequence[EncodedSample]) -> float:
        """Return the reciprocal rank of the own persona by log p of the right text."""
        samples, text = [own, *others], own.target or ""
        step, losses = self._step(text), list[float]()
        for start in range(0, len(samples), step):
            part = samples[start : start + step]
            losses += self.llm.loss(prompt_batch(part, self.prompter), [text] * len(part))[0].tolist()
        return expected_reciprocal_rank(-np.array(losses), 0, tolerance=_ROUNDING)

    def _step(self, text: str) -> int:
        """Return how many copies of this text fit in a pass."""
        (target,) = self.llm.prompt_tokenizer.encode_targets([text])
        return max(1, min(self.batch_size, MAX_PASS_TOKENS // max(1, len(target))))
