"""Divergence from the plain model: compared with transformers and scipy on whole sequences, for any batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, small_llm
from scipy.special import log_softmax, rel_entr

import personaplug.methods.divergence
from personaplug.data.records import characters
from personaplug.encoders.encoded_sample import EncodedSample, all_answers, no_style
from personaplug.llm.base import LanguageModel
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import load_tiny_llm
from personaplug.methods.divergence import ANSWER_TOKENS, divergence, plain_answers

NO_ITEMS = np.empty(0, dtype=np.int64)
PROMPTS = ["short", "the longest of these prompts", "in between", "x"]
SAMPLES = [
    EncodedSample(p, p, None, p, p, None, NO_ITEMS, NO_ITEMS.astype(np.int16), no_style(), all_answers())
    for p in PROMPTS
]
LENGTHS = [3, 32, 1, 9]


class FixedSoftPrompts:
    """Soft tokens that depend only on the prompt, times a scale."""

    def __init__(self, llm: CausalLM, placement: str, *, tokens: int = 3, scale: float = 1.0) -> None:
        self.width, self.placement, self.tokens = llm.identity.width, placement, tokens
        self.scale = scale * llm.embedding_scale

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        drawn = [
            torch.randn(self.tokens, self.width, generator=torch.Generator().manual_seed(characters(s.prompt)))
            for s in samples
        ]
        return SoftPrompt(torch.stack(drawn) * self.scale, placement=self.placement)


def _answers(llm: LanguageModel) -> list[Any]:
    """Return the plain answers, cut to different lengths."""
    answers = plain_answers(llm, SAMPLES, batch_size=3)
    return [ids[:length] for ids, length in zip(answers, LENGTHS, strict=True)]


def _divergences(
    llm: LanguageModel, *, samples: Sequence[EncodedSample] = SAMPLES, **settings: Any
) -> list[list[float]]:
    settings = {"answers": _answers(llm), "prompter": None, "batch_size": 3} | settings
    return divergence(llm, samples, plain=SAMPLES, **settings)


def _logits(llm: CausalLM, sample: EncodedSample, answer: Sequence[int], soft: SoftPrompt | None = None) -> Any:
    """Return the logits of transformers for the tokens of an answer, (n, V), without batches and cache."""
    (prompt,) = llm.prompt_tokenizer.encode_prompts([sample.prompt])
    ids = torch.tensor([[*prompt.ids, *answer]])
    embeds = llm.model.get_input_embeddings()(ids)
    if soft is not None:
        at = prompt.soft_position if soft.placement == "prefix" else len(prompt.ids)
        embeds = torch.cat([embeds[:, :at], soft.vectors, embeds[:, at:]], dim=1)
    with torch.no_grad():
        return llm.model(inputs_embeds=embeds).logits[0, -len(answer) - 1 : -1].double().numpy()


def _by_hand(plain: Any, row: Any) -> float:
    p, q = np.exp(log_softmax(plain, axis=-1)), np.exp(log_softmax(row, axis=-1))
    return float(rel_entr(p, q).sum())


def test_plain_answers_equal_those_of_transformers(toy: CausalLM) -> None:
    for sample, answer in zip(SAMPLES, plain_answers(toy, SAMPLES, batch_size=3), strict=True):
        (prompt,) = toy.prompt_tokenizer.encode_prompts([sample.prompt])
        written = toy.model.generate(torch.tensor([prompt.ids]), max_new_tokens=ANSWER_TOKENS, do_sample=False)
        assert list(answer) == written[0, len(prompt.ids) :].tolist()


def test_plain_answer_ends_with_the_end_of_text() -> None:
    llm = load_tiny_llm()
    whole = plain_answers(llm, SAMPLES, batch_size=4)
    ends = [ids[min(2 + number, len(ids) - 1)] for number, ids in enumerate(whole)]
    llm.end_ids = ends[:2]  # tokens that the model generates
    cut = plain_answers(llm, SAMPLES, batch_size=4)
    for before, ids in zip(whole, cut, strict=True):
        first = next((place for place, token in enumerate(before, 1) if token in llm.end_ids), None)
        assert ids == before[:first]
    assert len(cut[0]) <= 3


@pytest.mark.parametrize("max_tokens", [1, 8, 1024])
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_divergence_equals_that_of_whole_sequences(
    toy: CausalLM, placement: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personaplug.methods.predictions, "MAX_PASS_TOKENS", max_tokens)
    prompter = FixedSoftPrompts(toy, placement)
    divergences = _divergences(toy, prompter=prompter)
    assert [tokens for _, tokens in divergences] == LENGTHS
    for sample, answer, (total, _) in zip(SAMPLES, _answers(toy), divergences, strict=True):
        soft = prompter.soft_prompt([sample])
        expected = _by_hand(_logits(toy, sample, answer), _logits(toy, sample, answer, soft))
        assert expected > 0.01
        assert total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_of_another_prompt_uses_the_plain_answer(family: str) -> None:
    llm = small_llm(family)
    others = [replace(sample, prompt=f"Be brief. {sample.prompt}") for sample in SAMPLES]
    divergences = _divergences(llm, samples=others)
    for plain, other, answer, (total, tokens) in zip(SAMPLES, others, _answers(llm), divergences, strict=True):
        rows = llm.prompt_tokenizer.encode_prompts([plain.prompt, other.prompt])
        with torch.no_grad():
            p, q = (llm.model_logits(row.ids, answer).double().numpy() for row in rows)
        assert total == pytest.approx(_by_hand(p, q), rel=1e-3)
        assert (total > 0, tokens) == (True, len(answer))


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_divergence_of_the_plain_model_is_zero(toy: CausalLM, placement: str) -> None:
    zeros = [[0.0, length] for length in LENGTHS]
    assert _divergences(toy) == zeros
    assert _divergences(toy, prompter=FixedSoftPrompts(toy, placement, tokens=0)) == zeros


def test_larger_soft_tokens_diverge_more(toy: CausalLM) -> None:
    prompters = [FixedSoftPrompts(toy, "suffix", scale=scale) for scale in (0.01, 0.5, 2)]
    totals = [sum(total for total, _ in _divergences(toy, prompter=prompter)) for prompter in prompters]
    assert 0 < totals[0] < totals[1] < totals[2]
