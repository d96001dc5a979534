"""How likely the right answers were: a pass over them, beside what was written instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from personaplug.answers import phrases_of
from personaplug.backends.base import Backend
from personaplug.batching import in_passes
from personaplug.personalizer import SoftPrompter
from personaplug.progress import Progress
from personaplug.samples import EncodedSample

_TOKENS = 1024  # of answers in one pass, padding included; each has a logit for every word of the model


@torch.no_grad()
def surprises(
    backend: Backend,
    samples: Sequence[EncodedSample],
    *,
    prompter: SoftPrompter | None,
    batch_size: int,
    title: str = "likelihood",
) -> list[list[float]]:
    """−log p of each right answer and its tokens, the end of text among them, in the samples' order.

    Args:
        samples: with targets.
        prompter: makes the soft tokens; None = the bare model.
        batch_size: most samples in a pass; long answers make it fewer.
    """
    prompts, targets = [sample.prompt for sample in samples], [sample.target or "" for sample in samples]
    both = zip(backend.measure(prompts, targets=targets), backend.measure(prompts), strict=True)
    lengths = [whole.tokens - prompt.tokens for whole, prompt in both]
    found: dict[int, list[float]] = {}
    with Progress(title, total=len(samples), unit="answers") as progress:
        for part in in_passes(range(len(samples)), lengths=lengths, most=_TOKENS):
            for start in range(0, len(part), batch_size):
                places = part[start : start + batch_size]
                batch = [samples[place] for place in places]
                losses, tokens = backend.loss(
                    [sample.prompt for sample in batch],
                    [sample.target or "" for sample in batch],
                    soft=None if prompter is None else prompter.soft_prompt(batch),
                    soft_at=[sample.soft_at for sample in batch],
                    phrases=phrases_of(batch, backend),
                )
                pairs = zip(losses.tolist(), tokens.tolist(), strict=True)
                found.update(zip(places, ([round(loss, 6), count] for loss, count in pairs), strict=True))
                progress.advance(len(batch))
    return [found[place] for place in range(len(samples))]
