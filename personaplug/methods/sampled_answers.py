"""Several sampled answers for each sample, for the expected score and the best of k."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.llm.base import GenerationConfig, LanguageModel
from personaplug.methods.predictions import prompt_batch, prompt_batches
from personaplug.plug.personalizer import SoftPrompter


def sampled_answers(
    llm: LanguageModel,
    samples: Sequence[EncodedSample],
    *,
    prompter: SoftPrompter | None,
    generation: GenerationConfig,
    count: int,
    batch_size: int,
    title: str = "sampled answers",
) -> list[list[str]]:
    """Return `count` sampled answers for each sample.

    The draws of an answer depend on the seed, the sample's id and the answer's number. So they are the same for all
    rows, and in batches of any size.

    Args:
        prompter: makes the soft tokens; None = the bare model.
        generation: with temperature and seed; it samples even if its `do_sample` is off.
        batch_size: maximum number of answers at a time, at least those of one sample.
    """
    if prompter is not None and prompter.placement == "suffix":
        llm.cache_prompts([sample.prompt for sample in samples])
    generation = replace(generation, do_sample=True, num_beams=1)
    answers: dict[int, list[str]] = {}
    for indices in prompt_batches(samples, batch_size=max(1, batch_size // count), title=title):
        part = [samples[index] for index in indices]
        # The answers of a sample are adjacent, so that they share the cached prompt.
        batch = prompt_batch(part, prompter).take([place for place in range(len(part)) for _ in range(count)])
        seeds = [_seed(generation.seed, sample.id, number) for sample in part for number in range(count)]
        texts = [output.text for output in llm.generate(replace(batch, seeds=seeds), generation)]
        answers |= {index: texts[place * count : (place + 1) * count] for place, index in enumerate(indices)}
    return [answers[index] for index in range(len(samples))]


def _seed(seed: int, sample_id: str, number: int) -> int:
    digest = hashlib.blake2b(json.dumps([seed, sample_id, number]).encode("ascii"), digest_size=7)
    return int.from_bytes(digest.digest())
