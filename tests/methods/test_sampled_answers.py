"""Sampled answers: seeded draws per answer in batches of any size, with the model's probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, small_llm

from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.generation import sample_tokens
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.methods.sampled_answers import sampled_answers

NO_ITEMS = np.empty(0, dtype=np.int64)
SAMPLES = [
    EncodedSample(p, p, None, p, p, None, NO_ITEMS, NO_ITEMS.astype(np.int16), no_style(), all_answers())
    for p in ["short", "the longest of these prompts", "in between", "x"]
]
GENERATION = GenerationConfig(max_new_tokens=4, temperature=1.3)


class FixedSoftPrompts:
    """Soft tokens that depend only on the prompt."""

    def __init__(self, llm: LanguageModel, placement: str) -> None:
        self.llm, self.placement = llm, placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        width = self.llm.identity.width
        drawn = [torch.randn(3, width, generator=torch.Generator().manual_seed(len(s.query))) for s in samples]
        return SoftPrompt(torch.stack(drawn) * self.llm.embedding_scale, placement=self.placement)


def _answers(llm: LanguageModel, *, placement: str = "suffix", batch_size: int = 8, **changes: Any) -> list[list[str]]:
    settings: dict[str, Any] = {"generation": GENERATION, "count": 3} | changes
    prompter = None if placement == "none" else FixedSoftPrompts(llm, placement)
    return sampled_answers(llm, SAMPLES, prompter=prompter, batch_size=batch_size, **settings)


@pytest.mark.parametrize("placement", ["prefix", "suffix", "none"])
def test_answers_do_not_depend_on_the_batch_and_repeat(toy: CausalLM, placement: str) -> None:
    answers = _answers(toy, placement=placement)
    assert [len(texts) for texts in answers] == [3] * len(SAMPLES)
    assert len({text for texts in answers for text in texts}) > len(SAMPLES)
    for batch_size in (1, 6, 64):
        assert _answers(toy, placement=placement, batch_size=batch_size) == answers


def test_more_answers_extend_fewer_and_seeds_change_them(toy: CausalLM) -> None:
    few, more = _answers(toy, count=2), _answers(toy, count=4)
    assert [texts[:2] for texts in more] == few
    assert _answers(toy, count=2, generation=GenerationConfig(max_new_tokens=4, temperature=1.3, seed=1)) != few


def test_low_temperature_gives_the_greedy_answer(toy: CausalLM) -> None:
    prompter = FixedSoftPrompts(toy, "suffix")
    batch = PromptBatch([sample.prompt for sample in SAMPLES], prompter.soft_prompt(SAMPLES))
    greedy = [output.text for output in toy.generate(batch, GenerationConfig(max_new_tokens=4))]
    cold = _answers(toy, generation=GenerationConfig(max_new_tokens=4, temperature=1e-4))
    assert cold == [[text] * 3 for text in greedy]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_seeds_are_independent_in_every_family(family: str) -> None:
    llm = small_llm(family)
    config = GenerationConfig(max_new_tokens=3, do_sample=True)
    batch = PromptBatch([SAMPLES[0].prompt] * 3, seeds=[5, 6, 5])
    first, other, again = llm.answer_ids(batch, config)
    assert first == again
    assert [first, other] == [llm.answer_ids(batch.take([row]), config)[0] for row in (0, 1)]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_follow_the_probabilities(top_p: float) -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    config = GenerationConfig(do_sample=True, top_p=top_p)
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = probabilities.log().expand(1000, -1)
    tokens = sample_tokens(logits, config, generator=torch.Generator(), draws=draws)
    expected = np.array([0.5, 0, 0.3, 0.2]) if top_p == 1 else np.array([0.625, 0, 0.375, 0])
    counts = Counter(tokens.tolist())
    assert [counts[token] / 1000 for token in range(4)] == pytest.approx(expected, abs=0.002)


def test_extreme_draws_give_possible_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).log().expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    config = GenerationConfig(do_sample=True)
    assert sample_tokens(logits, config, generator=torch.Generator(), draws=draws).tolist() == [1, 1]
