"""Divergence from the plain model: against transformers and scipy on whole sequences, in any batches."""

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

NOTHING = np.empty(0, dtype=np.int64)
PROMPTS = ["short", "the longest of these prompts", "in between", "x"]
SAMPLES = [
    EncodedSample(p, p, None, p, p, None, NOTHING, NOTHING.astype(np.int16), no_style(), all_answers()) for p in PROMPTS
]
LENGTHS = [3, 32, 1, 9]


class Given:
    """Soft tokens by prompt, of a scale."""

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


def _measured(llm: LanguageModel, *, samples: Sequence[EncodedSample] = SAMPLES, **settings: Any) -> list[list[float]]:
    settings = {"answers": _answers(llm), "prompter": None, "batch_size": 3} | settings
    return divergence(llm, samples, plain=SAMPLES, **settings)


def _logits(llm: CausalLM, sample: EncodedSample, answer: Sequence[int], soft: SoftPrompt | None = None) -> Any:
    """Return what transformers finds for the tokens of an answer, (n, V), row by row and without a cache."""
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


def test_plain_answers_are_those_of_transformers(toy: CausalLM) -> None:
    for sample, answer in zip(SAMPLES, plain_answers(toy, SAMPLES, batch_size=3), strict=True):
        (prompt,) = toy.prompt_tokenizer.encode_prompts([sample.prompt])
        written = toy.model.generate(torch.tensor([prompt.ids]), max_new_tokens=ANSWER_TOKENS, do_sample=False)
        assert list(answer) == written[0, len(prompt.ids) :].tolist()


def test_plain_answer_ends_with_the_end_of_text() -> None:
    llm = load_tiny_llm()
    whole = plain_answers(llm, SAMPLES, batch_size=4)
    ends = [ids[min(2 + number, len(ids) - 1)] for number, ids in enumerate(whole)]
    llm.end_ids = ends[:2]  # tokens that the model does write
    cut = plain_answers(llm, SAMPLES, batch_size=4)
    for before, ids in zip(whole, cut, strict=True):
        first = next((place for place, token in enumerate(before, 1) if token in llm.end_ids), None)
        assert ids == before[:first]
    assert len(cut[0]) <= 3


@pytest.mark.parametrize("most", [1, 8, 1024])
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_divergence_is_that_of_whole_sequences(
    toy: CausalLM, placement: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personaplug.methods.predictions, "MAX_PASS_TOKENS", most)
    prompter = Given(toy, placement)
    found = _measured(toy, prompter=prompter)
    assert [tokens for _, tokens in found] == LENGTHS
    for sample, answer, (total, _) in zip(SAMPLES, _answers(toy), found, strict=True):
        soft = prompter.soft_prompt([sample])
        expected = _by_hand(_logits(toy, sample, answer), _logits(toy, sample, answer, soft))
        assert expected > 0.01
        assert total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_prompt_is_compared_at_the_same_answer(family: str) -> None:
    llm = small_llm(family)
    others = [replace(sample, prompt=f"Be brief. {sample.prompt}") for sample in SAMPLES]
    found = _measured(llm, samples=others)
    for plain, other, answer, (total, tokens) in zip(SAMPLES, others, _answers(llm), found, strict=True):
        rows = llm.prompt_tokenizer.encode_prompts([plain.prompt, other.prompt])
        with torch.no_grad():
            p, q = (llm.model_logits(row.ids, answer).double().numpy() for row in rows)
        assert total == pytest.approx(_by_hand(p, q), rel=1e-3)
        assert (total > 0, tokens) == (True, len(answer))


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_plain_model_and_no_soft_tokens_have_none(toy: CausalLM, placement: str) -> None:
    nothing = [[0.0, length] for length in LENGTHS]
    assert _measured(toy) == nothing
    assert _measured(toy, prompter=Given(toy, placement, tokens=0)) == nothing


def test_larger_soft_tokens_diverge_more(toy: CausalLM) -> None:
    prompters = [Given(toy, "suffix", scale=scale) for scale in (0.01, 0.5, 2)]
    totals = [sum(total for total, _ in _measured(toy, prompter=prompter)) for prompter in prompters]
    assert 0 < totals[0] < totals[1] < totals[2]
