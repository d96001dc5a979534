"""Divergence of a row from the plain model: KL of next tokens along the plain model's greedy answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.llm.base import GenerationConfig, LanguageModel
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.methods.predictions import answer_batches, prompt_batch, prompt_batches
from personaplug.plug.personalizer import SoftPrompter

ANSWER_TOKENS = 32  # length limit of the plain model's answers

_GREEDY = GenerationConfig(max_new_tokens=ANSWER_TOKENS)


def plain_answers(llm: LanguageModel, samples: Sequence[EncodedSample], *, batch_size: int) -> list[Ids]:
    """Return the tokens of the bare model's greedy answer to each sample's prompt, end of text included."""
    answers: dict[int, Ids] = {}
    for indices in prompt_batches(samples, batch_size=batch_size, title="plain answers"):
        batch = prompt_batch([samples[index] for index in indices], None)
        answers.update(zip(indices, llm.answer_ids(batch, _GREEDY), strict=True))
    return [answers[index] for index in range(len(samples))]


@torch.no_grad()
def divergence(
    llm: LanguageModel,
    samples: Sequence[EncodedSample],
    *,
    plain: Sequence[EncodedSample],
    answers: Sequence[Ids],
    prompter: SoftPrompter | None,
    batch_size: int,
    title: str = "divergence",
) -> list[list[float]]:
    """Return the sum of KL(plain ‖ row) over the tokens of each answer, in nats, and the number of tokens.

    Args:
        samples: (n,) samples with the row's prompts.
        plain: (n,) the same samples with bare prompts.
        answers: (n,) answers to the bare prompts, from `plain_answers`.
        prompter: makes the row's soft tokens; None = no soft tokens.
        batch_size: maximum number of answers in a pass.
    """
    divergences: dict[int, list[float]] = {}
    lengths = [*map(len, answers)]
    for indices in answer_batches(lengths, batch_size=batch_size, title=title):
        plain_batch = prompt_batch([plain[index] for index in indices], None)
        row_batch = prompt_batch([samples[index] for index in indices], prompter)
        sums = llm.divergence(plain_batch, row_batch, [answers[index] for index in indices]).tolist()
        divergences.update(
            (index, [round(value, 6), lengths[index]]) for index, value in zip(indices, sums, strict=True)
        )
    return [divergences[index] for index in range(len(answers))]
